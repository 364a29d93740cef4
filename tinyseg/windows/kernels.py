"""Convolution and pooling on the GPU: CuPy arrays of float32, rank 1 to 3.

The kernels know three axes, zero padding and the two products of `products`; lower ranks get
leading axes of one. On the tensor cores, in TF32 or bfloat16, where the channels allow it and
`cuda.precision` does: bfloat16 needs them in eights, and a kernel of several taps (of one, an H200
took no longer in TF32 than for rounding and bfloat16). Partial sums of a weight gradient are added
in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from math import ceil, prod
from typing import Any

import numpy as np

from .. import cuda
from ..backend import Array, array_module
from ..cuda import plain, pool
from .geometry import Window
from .products import Correlation, count, repeated
from .reference import pad, pad_adjoint

AXES = 3
GEOMETRY = np.dtype(  # struct Geometry of kernels/conv.cuh
    [(name, "int32") for name in ("batch", "channels", "filters", "pitch")]
    + [(name, "int32", AXES) for name in ("walk", "size", "positions", "taps", "stride", "dilation",
                                          "before", "grid", "start", "step")])
ROWS = 128  # of a block's tile; its columns are 64, or 128 on the tensor cores
BLOCKS = 2 * cuda.MULTIPROCESSORS  # that a GPU runs at once, of the widest tile
LINE = 128  # bytes of terms of a sum that a block adds in one turn
BF16 = "unsigned short"  # the type that holds the bits of a bfloat16


def serves(window: Window, *arrays: Array) -> bool:
    """Whether the kernels take this convolution."""
    return len(window.kernel) <= AXES and cuda.serves(*arrays)


@lru_cache(maxsize=4096)
def _geometry(x_shape, filters, taps, positions, stride, dilation, before,
              grid=None, start=0, step=1, pitch=0, walk=0) -> np.ndarray:
    """struct Geometry, scalars repeated and leading axes of one added; the grid is by default
    the positions."""

    def spatial(values, fill):
        values = (values,) * len(taps) if isinstance(values, int) else tuple(values)
        return (fill,) * (AXES - len(values)) + values

    batch, *size, channels = x_shape
    grid = positions if grid is None else grid
    for name, shape in (("input", size), ("output", positions), ("output", grid)):
        if batch * prod(shape) >= 2**31 - 2**16:  # the last tile of rows reaches past the end
            raise ValueError(f"convolution: an {name} of {batch} x {tuple(shape)} points is more "
                             "than the kernels count; use a smaller batch or patch")
    return np.array(
        (batch, channels, filters, pitch, spatial(walk, 0), spatial(size, 1),
         spatial(positions, 1), spatial(taps, 1), spatial(stride, 1), spatial(dilation, 1),
         spatial(before, 0), spatial(grid, 1), spatial(start, 0), spatial(step, 1)), GEOMETRY)


def tile(columns: int) -> dict[str, Any]:
    """The constants of conv_mma for a tile of 64 or 128 columns."""
    return {"COLUMNS": columns, "WARP_COLUMNS": columns // 2, "STAGES": columns // 64 + 1}


def _body(channels: int, filters: int, taps: int) -> tuple[str, int, dict[str, Any]]:
    """The source that computes a convolution, its threads, and its constants."""
    if cuda.precision_here() == "fp32" or filters % 4:
        return "conv_simt", 256, {"COLUMNS": 64}
    constants = tile(128 if filters > 64 else 64)
    if cuda.precision_here() == "bf16" and 1 < taps <= 32 and not (channels % 8 or filters % 8):
        return "conv_mma", 128, constants | {"CHUNK": 8, "NUMBER": BF16}
    return "conv_mma", 128, constants | {"CHUNK": 1 if channels % 4 or taps > 32 else 4}


def _rounded(a: Array, taps: tuple[int, ...] = (), walk: tuple[int, ...] = ()) -> Array:
    """A factor in bfloat16, as it lies in memory; its taps, if any, may stand apart by `walk`."""
    halves = array_module(a).empty(a.shape, "uint16")
    block = a.size // prod(taps)
    cuda.launch("round", "rounded", (ceil(a.size / (256 * 8)),), (256,), cuda.Strided(a), halves,
                block, _geometry((1, 1, 1), 1, taps, (1,), 1, 1, 0, walk=walk))
    return halves


def _inside(kernel: str, g: np.ndarray) -> tuple[float, float]:
    """The share of a sum's terms that lie inside the grid, in the mean and at most over the tiles.

    A tile of correlate has all positions along the last axis and about one along the others; a tile
    of correlate_dw has one tap.
    """
    mean = most = 1.0
    for axis in range(AXES if kernel == "correlate_dw" else AXES - 1):
        size, count, taps, stride, dilation, before = (int(g[name][axis]) for name in (
            "size", "positions", "taps", "stride", "dilation", "before"))
        at = np.arange(count)[:, None] * stride + np.arange(taps) * dilation - before
        shares = ((at >= 0) & (at < size)).mean(axis=0 if kernel == "correlate_dw" else 1)
        mean, most = mean * shares.mean(), most * shares.max()
    return mean, most


@lru_cache(maxsize=4096)
def _slices(kernel: str, tiles: int, turns: int, numbers: int, geometry: bytes, sparse: bool
            ) -> int:
    """Into how many slices a sum of so many turns is cut, where a block does one tile of one slice.

    As many as make the whole quickest, counted in turns: BLOCKS run at once, each begins and ends
    in the time of 8 turns, and 900,000 of the `numbers` of a slice are moved in one. sparse:
    whether terms outside the grid are left out.
    """
    mean, most = _inside(kernel, np.frombuffer(geometry, GEOMETRY)[0]) if sparse else (1.0, 1.0)

    def took(n):
        waves, longest = tiles * n / BLOCKS, turns * most / n + 8
        moved = (n + 1) * numbers / 900_000 if n > 1 else 0
        if waves <= 1:
            return longest + moved
        return waves * (turns * mean / n + 8) + longest / 2 + moved

    return min(range(1, max(1, turns // 4) + 1), key=took)


def _launch(kernel: str, body: tuple, x: Array, other: Array | cuda.Strided, into: Array,
            shape: tuple[int, int, int], geometry: np.ndarray, written: np.ndarray, pitch: int
            ) -> None:
    """`kernel`, a matrix product of `shape` (rows, terms, columns), in slices if need be.

    written: the geometry of the output, where slices are added up. pitch: what a term of a tile
    takes in shared memory beside its numbers.
    """
    (rows, terms, filters), (file, threads, constants) = shape, body
    columns = constants["COLUMNS"]
    tiles = ceil(rows / ROWS), ceil(filters / columns)
    whole = file == "conv_simt" and kernel == "correlate"  # it has no slices
    slices = 1 if whole else _slices(kernel, prod(tiles), ceil(terms * x.itemsize / LINE),
                                     rows * filters, geometry.tobytes(),
                                     constants.get("CHUNK", 1) > 1)
    target = into if slices == 1 else array_module(x).empty((slices, rows, filters), into.dtype)
    stages = constants.get("STAGES", 0)  # float32's buffers are declared in its source
    cuda.launch(file, kernel, (*tiles, slices), (threads,), x, other, target, geometry,
                shared=LINE * stages * (ROWS + columns + pitch), **constants)
    if slices > 1:
        vector = 1 if filters % 4 else 4
        cuda.launch("slices", "total", (ceil(rows * filters / (256 * vector)),), (256,), target,
                    slices, written, into, VECTOR=vector, THREADS=256)


def products(x: Array, problems: Iterable[Correlation]) -> None:
    """See products: into[:, start::step] = correlate(x, w) of each."""
    x, halves, problems = plain(x), None, list(problems)
    several = any(prod(problem.w.shape[:-2]) > 1 for problem in problems)  # taps, in one of them
    for w, into, start, step, stride, dilation, before in problems:
        taps, (channels, filters) = w.shape[:-2], w.shape[-2:]
        positions = count(into.shape[1:-1], start, step)
        file, threads, constants = _body(channels, filters, max(prod(taps), 1 + several))
        *walk, row, column = (s // w.itemsize for s in w.strides)
        swapped = (row, column) == (1, channels) and channels > 1  # as the gradient in x has it
        packed = [channels * filters * prod(taps[axis + 1:]) for axis in range(len(taps))]
        if (constants.get("CHUNK", 1) == 1 or w.data.ptr % 16 or any(far % 4 for far in walk)
                or not swapped and (row, column) != (filters, 1)):
            w, swapped, walk = plain(w), False, packed
        factor = x
        if constants.get("NUMBER") == BF16:
            halves = _rounded(x) if halves is None else halves
            w, factor, walk = _rounded(w, taps, tuple(walk)), halves, packed
        if file == "conv_mma":
            constants = {**constants, "SWAPPED": int(swapped)}
        geometry = _geometry(x.shape, filters, taps, positions, stride, dilation, before,
                             into.shape[1:-1], start, step, channels if swapped else filters,
                             tuple(walk))
        shape = len(x) * prod(positions), prod(w.shape[:-1]), filters
        _launch("correlate", (file, threads, constants), factor, cuda.Strided(w), into, shape,
                geometry, geometry, pitch=8)


def weights(x: Array, y: Array, kernel, stride, dilation, before) -> Array:
    """See products: the gradient of correlate(x, w) in w, (*K, C_in, C_out)."""
    x, y = plain(x), plain(y)
    positions, channels, filters = y.shape[1:-1], x.shape[-1], y.shape[-1]
    dw = array_module(x).empty((*kernel, channels, filters), x.dtype)
    shape = prod(kernel) * channels, len(y) * prod(positions), filters
    body = _body(channels, filters, prod(kernel))
    if body[2].get("NUMBER") == BF16:
        x, y = _rounded(x), _rounded(y)
    _launch("correlate_dw", body, x, y, dw, shape,
            _geometry(x.shape, filters, kernel, positions, stride, dilation, before),
            _geometry((1, 1, 1), filters, (1,), shape[:1], 1, 1, 0), pitch=16)
    return dw


def unfold(x: Array, window: Window) -> Array:
    """Explicit im2col, (N, *S, C) -> (N, *P, *K, C): for comparison, nothing here uses it."""
    window, border = repeated(window)
    x = plain(pad(x, border, [True] * len(border)))
    positions = window.positions(x.shape[1:-1])
    columns = array_module(x).empty((len(x), *positions, *window.kernel, x.shape[-1]), x.dtype)
    cuda.launch("unfold", "unfold", (min(ceil(columns.size / 256), 1 << 20),), (256,), x, columns,
                _geometry(x.shape, 1, window.kernel, positions, window.stride, window.dilation,
                          tuple(p[0] for p in window.padding)))
    return columns


def fold(columns: Array, size: tuple[int, ...], window: Window) -> Array:
    """The adjoint of `unfold`: (N, *P, *K, C) -> (N, *size, C)."""
    rank = len(size)
    window, border = repeated(window)
    grid = tuple(n + sum(b) for n, b in zip(size, border[1:], strict=True))
    x = array_module(columns).empty((len(columns), *grid, columns.shape[-1]), columns.dtype)
    cuda.launch("unfold", "fold", (min(ceil(x.size / 256), 1 << 20),), (256,), plain(columns), x,
                _geometry(x.shape, 1, window.kernel, columns.shape[1:1 + rank], window.stride,
                          window.dilation, tuple(p[0] for p in window.padding)))
    return array_module(x).ascontiguousarray(pad_adjoint(x, border, [True] * len(border)))


def maximum(x: Array, window: Window, *, taps: bool = True) -> tuple[Array, Array]:
    """See reference.maximum; the padding does not repeat, and taps come at no cost."""
    return pool.maximum(x, window)


def maximum_adjoint(g: Array, winner: Array, size: tuple[int, ...], window: Window) -> Array:
    """See reference.maximum_adjoint."""
    return pool.maximum_adjoint(g, winner, size, window)
