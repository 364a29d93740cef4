"""Batch normalisation of rows, with a residual and a ReLU where wanted: kernels/norm.cu.

`rows` is x (N, *S, C) as a matrix (M, C); everything is float32. A sum over rows takes two
launches, first over chunks of rows and then over the chunks, so that its order is fixed and its
bits are the same every time.
"""

from __future__ import annotations

from functools import cache
from math import ceil, inf

from ..backend import Array, array_module
from .loader import MULTIPROCESSORS, launch, plain

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
def _chunk(rows: int, channels: int) -> int:
    """How many rows a block takes so that the blocks fill a GPU, or have enough to do each."""
    _, (_, tall), count = tiles(channels)
    return ceil(rows / min(ceil(BLOCKS / count), ceil(rows / (ROWS * tall))))


def _run(kernel: str, shape: tuple[int, int], inputs: tuple, outputs: tuple, chunk: int,
         lanes: int = 32, layers: int = 1) -> None:
    """`kernel` on the rows of arrays of this shape, a block for each chunk and tile and layer."""
    rows, channels = shape
    vector, block, count = tiles(channels, lanes)
    launch("norm", kernel, (ceil(rows / chunk), count, layers), block, *inputs, rows, channels,
           chunk, *outputs, VECTOR=vector, THREADS=THREADS)


def column_sum(rows: Array) -> Array:
    """The sum of each column: (M, C) -> (C,)."""
    rows, chunk = plain(rows), _chunk(*rows.shape)
    parts = array_module(rows).empty((ceil(len(rows) / chunk), rows.shape[1]), rows.dtype)
    _run("column_sum", rows.shape, (rows,), (parts, None), chunk)
    return _totals(parts[None])[0]


def _totals(parts: Array) -> list[Array]:
    """The sums over what the chunks left, in narrow tiles to have more blocks: for one or two
    quantities, (1 or 2, P, C) -> (C,) of each."""
    layers, count, channels = parts.shape
    totals = [array_module(parts).empty(channels, parts.dtype) for _ in range(layers)]
    _run("column_sum", (count, channels), (parts,), (*totals, None)[:2], count, 2, layers)
    return totals


def moments(rows: Array) -> tuple[Array, Array]:
    """Mean and biased variance of each column: (M, C) -> (C,), (C,)."""
    return _moments(rows)[:2]


def statistics(rows: Array, running_mean: Array, running_var: Array, momentum: float, eps: float
               ) -> tuple[Array, Array]:
    """Mean and 1 / sqrt(variance + eps) of each column, towards which the running statistics move
    by `momentum`: see normalisation._statistics."""
    mean, _, scale = _moments(rows, eps, momentum, array_module(rows).empty_like(running_mean),
                              running_mean, running_var)
    return mean, scale


def _moments(rows: Array, eps: float = 0, momentum: float = 0, scale: Array | None = None,
             running_mean: Array | None = None, running_var: Array | None = None) -> tuple:
    rows, library, (m, channels) = plain(rows), array_module(rows), rows.shape
    chunk = _chunk(m, channels)
    means, m2s = (library.empty((ceil(m / chunk), channels), rows.dtype) for _ in range(2))
    mean, variance = (library.empty(channels, rows.dtype) for _ in range(2))
    _run("moments", rows.shape, (rows,), (means, m2s), chunk)
    _run("merge_moments", means.shape, (rows, m, chunk, means, m2s),
         (mean, variance, eps, momentum, scale, running_mean, running_var), len(means), lanes=2)
    return mean, variance, scale


def normalize(rows: Array, mean: Array, scale: Array, gamma: Array, beta: Array,
              residual: Array | None = None, relu: bool = False) -> Array:
    """(rows - mean) scale gamma + beta [+ residual], cut at 0 where `relu`: (M, C).

    mean, scale, gamma, beta (C,), residual (M, C).
    """
    y = array_module(rows).empty(rows.shape, rows.dtype)
    added = residual if residual is None else plain(residual)
    _run("normalize", rows.shape,
         (*map(plain, (rows, mean, scale, gamma, beta)), added, 0.0 if relu else -inf), (y,),
         _chunk(*rows.shape))
    return y


def normalize_adjoint(g: Array, rows: Array, y: Array, mean: Array, scale: Array, gamma: Array,
                      beta: Array, *, train: bool, relu: bool, residual: bool,
                      ) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of `normalize` in rows, gamma, beta and residual from `g` in y: (M, C) and (C,).

    In train mode mean and scale are those of `rows`. What a ReLU let pass is read from `y` if a
    `residual` was added; else it is computed again, which saves reading y twice. The gradient in
    the residual is `g` itself where there was no ReLU, and None where there was no residual.
    """
    library, (m, channels), chunk = array_module(rows), rows.shape, _chunk(*rows.shape)
    dresidual = g if residual else None
    g, rows, *vectors = map(plain, (g, rows, mean, scale, gamma))
    parts = library.empty((2, ceil(m / chunk), channels), g.dtype)
    kept = plain(y) if relu and residual else None
    again = plain(beta) if relu and not residual else None
    passed = None if kept is None else library.empty(g.shape, g.dtype)
    _run("adjoint_sums", rows.shape, (g, rows, kept, *vectors, again), (parts, passed), chunk)
    dbeta, dgamma = _totals(parts)
    if passed is not None:
        g = dresidual = passed
    dx = library.empty(g.shape, g.dtype)
    _run("normalize_dx", rows.shape,
         (g, rows, *vectors, again, dbeta, dgamma, 1 / m if train else 0.0), (dx,), chunk)
    return dx, dgamma, dbeta, dresidual
