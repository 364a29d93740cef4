"""Batch normalisation of rows, with a residual and a ReLU where wanted: kernels/norm.cu.

`rows` is x (N, *S, C) as a matrix (M, C); everything is float32. A sum over rows is one over chunks
of rows and then one over the chunks, by the block that comes last, so that its order is fixed and
its bits are the same every time.
"""

from __future__ import annotations

from functools import cache
from math import ceil, inf

from ..backend import Array, array_module
from .loader import MULTIPROCESSORS, arrived, launch, plain

THREADS = 256  # of a block
BLOCKS = 4 * MULTIPROCESSORS  # that share an array
ROWS = 4  # of a thread, at least: as many as it reads at once


@cache
def tiles(channels: int, lanes: int = 32) -> tuple[int, tuple[int, int], int]:
    """How blocks share the channels: channels of a thread, (lanes, rows) of a block, tiles."""
    vector = 1 if channels % 4 else 4
    vectors = channels // vector
    wide = min(lanes, 1 << (vectors - 1).bit_length())
    return vector, (wide, THREADS // wide), ceil(vectors / wide)


@cache
def _chunk(rows: int, channels: int, lanes: int = 32) -> int:
    """How many rows a block takes so that the blocks fill a GPU, or have enough to do each."""
    _, (_, tall), count = tiles(channels, lanes)
    return ceil(rows / min(ceil(BLOCKS / count), ceil(rows / (ROWS * tall))))


def _run(kernel: str, rows: Array, inputs: tuple, outputs: tuple, sums: int = 0) -> None:
    """`kernel` on arrays of the shape of `rows`, a block for each chunk and tile.

    Where it sums over the rows, so many `sums`, it gets room for those of the chunks and what
    counts its blocks; and tiles are narrow, so that a block which adds up finds few numbers.
    """
    (m, channels), library = rows.shape, array_module(rows)
    lanes = 8 if sums else 32
    vector, block, count = tiles(channels, lanes)
    chunk = _chunk(m, channels, lanes)
    grid = ceil(m / chunk), count
    room = (library.empty((sums, grid[0], channels), rows.dtype), arrived(library)) if sums else ()
    launch("norm", kernel, grid, block, *inputs, m, channels, chunk, *room, *outputs,
           VECTOR=vector, THREADS=THREADS)


def _vectors(rows: Array, count: int) -> list[Array]:
    return [array_module(rows).empty(rows.shape[1], rows.dtype) for _ in range(count)]


def column_sum(rows: Array) -> Array:
    """The sum of each column: (M, C) -> (C,)."""
    rows, (total,) = plain(rows), _vectors(rows, 1)
    _run("column_sum", rows, (rows,), (total,), sums=1)
    return total


def moments(rows: Array) -> tuple[Array, Array]:
    """Mean and biased variance of each column: (M, C) -> (C,), (C,)."""
    return _moments(rows)


def statistics(rows: Array, running_mean: Array, running_var: Array, momentum: float, eps: float
               ) -> tuple[Array, Array]:
    """Mean and 1 / sqrt(variance + eps) of each column, towards which the running statistics move
    by `momentum`: see normalisation._statistics."""
    scale, = _vectors(rows, 1)
    moved = [plain(a) for a in (running_mean, running_var)]
    mean, _ = _moments(rows, eps, momentum, scale, *moved)
    for kept, a in zip((running_mean, running_var), moved, strict=True):
        if kept is not a:  # it began where no 16-byte load may
            kept[...] = a
    return mean, scale


def _moments(rows: Array, eps: float = 0, momentum: float = 0, *updated: Array
             ) -> tuple[Array, Array]:
    rows, (mean, variance) = plain(rows), _vectors(rows, 2)
    _run("moments", rows, (rows,),
         (mean, variance, eps, momentum, *(updated or (None, None, None))), sums=2)
    return mean, variance


def normalize(rows: Array, mean: Array, scale: Array, gamma: Array, beta: Array,
              residual: Array | None = None, relu: bool = False) -> Array:
    """(rows - mean) scale gamma + beta [+ residual], cut at 0 where `relu`: (M, C).

    mean, scale, gamma, beta (C,), residual (M, C).
    """
    y = array_module(rows).empty(rows.shape, rows.dtype)
    added = residual if residual is None else plain(residual)
    _run("normalize", rows,
         (*map(plain, (rows, mean, scale, gamma, beta)), added, 0.0 if relu else -inf), (y,))
    return y


def normalize_adjoint(g: Array, rows: Array, y: Array, mean: Array, scale: Array, gamma: Array,
                      beta: Array, *, train: bool, relu: bool, residual: bool,
                      ) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of `normalize` in rows, gamma, beta and residual from `g` in y: (M, C) and (C,).

    In train mode mean and scale are those of `rows`. What a ReLU let pass is read from `y` if a
    `residual` was added; else it is computed again, which saves reading y twice. The gradient in
    the residual is `g` itself where there was no ReLU, and None where there was no residual.
    """
    library = array_module(rows)
    dresidual = g if residual else None
    g, rows, *vectors = map(plain, (g, rows, mean, scale, gamma))
    kept = plain(y) if relu and residual else None
    again = plain(beta) if relu and not residual else None
    passed = None if kept is None else library.empty(g.shape, g.dtype)
    dbeta, dgamma = _vectors(rows, 2)
    _run("adjoint_sums", rows, (g, rows, kept, *vectors, again), (passed, dbeta, dgamma), sums=2)
    if passed is not None:
        g = dresidual = passed
    dx = library.empty(g.shape, g.dtype)
    _run("normalize_dx", rows,
         (g, rows, *vectors, again, dbeta, dgamma, 1 / len(rows) if train else 0.0), (dx,))
    return dx, dgamma, dbeta, dresidual
