"""Convolution on the GPU: the functions of `reference`, on CuPy arrays of float32, at rank 1 to 3.

The kernels know zero padding, three axes and one product, `y = correlate(x, w)` with y written to
a comb of points. Everything else is made of it here:

- lower ranks get leading axes of one;
- a border that repeats is written out before (`pad`) and added up after (`pad_adjoint`);
- the gradient in x is that product again. Along an axis with stride s, the inputs a, a + s,
  a + 2s, ... see only the taps k with (a + before - k dilation) divisible by s; walked backwards,
  these step evenly through y, which is a convolution of stride one with a part of the kernel;
- the gradient in w is a second kernel, whose partial sums are added in a fixed order.

TF32 on the tensor cores where the channels allow, float32 inside `cuda.exact()`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil, gcd, prod

import numpy as np

from .. import cuda
from ..backend import Array, array_module
from ..cuda import plain, pool
from .geometry import Window
from .reference import pad, pad_adjoint

AXES = 3
GEOMETRY = np.dtype(  # struct Geometry of kernels/conv.cuh
    [(name, "int32") for name in ("batch", "channels", "filters")]
    + [(name, "int32", AXES) for name in ("size", "positions", "taps", "stride", "dilation",
                                          "before", "grid", "start", "step")])
ROWS = 128  # of a block's tile; its columns are 64, or 128 on the tensor cores
BLOCKS = 512  # that fill a GPU: about four for each multiprocessor of an H100


def serves(window: Window, *arrays: Array) -> bool:
    """Whether the kernels take this convolution."""
    return len(window.kernel) <= AXES and cuda.serves(*arrays)


def _geometry(x_shape, filters, taps, positions, stride, dilation, before,
              grid=None, start=0, step=1) -> np.ndarray:
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
        (batch, channels, filters, spatial(size, 1), spatial(positions, 1), spatial(taps, 1),
         spatial(stride, 1), spatial(dilation, 1), spatial(before, 0), spatial(grid, 1),
         spatial(start, 0), spatial(step, 1)), GEOMETRY)


def _repeated(window: Window) -> tuple[Window, list[tuple[int, int]]]:
    """The window without its repeated border, and how far that extends the grid, batch first."""
    border = [p if e else (0, 0) for p, e in zip(window.padding, window.edge, strict=True)]
    zeros = tuple((0, 0) if e else p for p, e in zip(window.padding, window.edge, strict=True))
    return replace(window, padding=zeros, edge=(False,) * len(zeros)), [(0, 0), *border]


def _body(channels: int, filters: int, taps: int) -> tuple[str, int, dict[str, int]]:
    """The source that computes a convolution, its threads, and its constants."""
    columns = 128 if filters > 64 else 64
    if cuda.is_exact() or channels % 8 or filters % 8 or taps > 32:
        return "conv_simt", 256, {"COLUMNS": 64}
    return "conv_mma", 128, {"COLUMNS": columns, "WARP_COLUMNS": columns // 2,
                             "STAGES": 3 if columns == 128 else 4}


def _product(x: Array, w: Array, y: Array, geometry: np.ndarray) -> None:
    """Write correlate(x, w) to the points of `y` that `geometry` names."""
    filters, taps = w.shape[-1], prod(w.shape[:-2])
    file, threads, constants = _body(x.shape[-1], filters, taps)
    columns = constants["COLUMNS"]
    rows = len(x) * prod(map(int, geometry["positions"]))
    shared = 0 if file == "conv_simt" else 4 * 32 * constants["STAGES"] * (ROWS + columns + 8)
    cuda.launch(file, "correlate", (ceil(rows / ROWS), ceil(filters / columns)), (threads,),
                x, w, y, geometry, shared=shared, **constants)


def correlate(x: Array, w: Array, window: Window) -> Array:
    """See reference.correlate."""
    window, border = _repeated(window)
    x, w = plain(pad(x, border, [True] * len(border))), plain(w)
    positions = window.positions(x.shape[1:-1])
    y = array_module(x).empty((len(x), *positions, w.shape[-1]), x.dtype)
    before = [p[0] for p in window.padding]
    _product(x, w, y, _geometry(x.shape, w.shape[-1], window.kernel, positions, window.stride,
                                window.dilation, before))
    return y


def combs(size: int, kernel: int, stride: int, dilation: int, before: int):
    """The inputs a, a + stride, ... along one axis, for each a, as a convolution of the output.

    Yields (a, how many inputs, the slice of taps, their dilation, padding before); the slice is
    None where no tap reaches these inputs.
    """
    common = gcd(stride, dilation)
    for a in range(min(stride, size)):
        reaching = [k for k in range(kernel) if (a + before - k * dilation) % stride == 0]
        last = reaching[-1] if reaching else None
        taps = None if last is None else slice(last, None, -(stride // common))
        offset = 0 if last is None else (a + before - last * dilation) // stride
        yield a, ceil((size - a) / stride), taps, dilation // common, -offset


def correlate_dx(y: Array, w: Array, size: tuple[int, ...], window: Window) -> Array:
    """See reference.correlate_dx."""
    library, y = array_module(y), plain(y)
    window, border = _repeated(window)
    grid = tuple(n + sum(b) for n, b in zip(size, border[1:], strict=True))
    axes = [list(combs(n, k, s, d, p[0])) for n, k, s, d, p in zip(
        grid, window.kernel, window.stride, window.dilation, window.padding, strict=True)]
    untouched = any(taps is None for axis in axes for _, _, taps, _, _ in axis)
    dx = (library.zeros if untouched else library.empty)((len(y), *grid, w.shape[-2]), y.dtype)
    for start, counts, taps, dilation, before in (
            tuple(zip(*comb, strict=True)) for comb in product(*axes)):
        if None in taps:
            continue
        part = plain(w[taps].swapaxes(-1, -2))
        _product(y, part, dx, _geometry(y.shape, part.shape[-1], part.shape[:-2], counts, 1,
                                            dilation, before, grid, start, window.stride))
    return library.ascontiguousarray(pad_adjoint(dx, border, [True] * len(border)))


def correlate_dw(x: Array, y: Array, window: Window) -> Array:
    """See reference.correlate_dw."""
    window, border = _repeated(window)
    x, y = plain(pad(x, border, [True] * len(border))), plain(y)
    positions, channels, filters = y.shape[1:-1], x.shape[-1], y.shape[-1]
    taps = prod(window.kernel)
    file, threads, constants = _body(channels, filters, taps)
    columns, rows = constants["COLUMNS"], len(y) * prod(positions)
    tiles = ceil(taps * channels / ROWS), ceil(filters / columns)
    share = max(256, ceil(rows / ceil(BLOCKS / prod(tiles))))  # at least eight turns of 32
    slices = array_module(x).empty((ceil(rows / share), taps * channels, filters), x.dtype)
    shared = 0 if file == "conv_simt" else 4 * 32 * constants["STAGES"] * (ROWS + columns + 16)
    before = [p[0] for p in window.padding]
    cuda.launch(file, "correlate_dw", (*tiles, len(slices)), (threads,), x, y, slices,
                _geometry(x.shape, filters, window.kernel, positions, window.stride,
                          window.dilation, before), share, shared=shared, **constants)
    return slices.sum(axis=0).reshape(*window.kernel, channels, filters)


def unfold(x: Array, window: Window) -> Array:
    """Explicit im2col, (N, *S, C) -> (N, *P, *K, C): for comparison, nothing here uses it."""
    window, border = _repeated(window)
    x = plain(pad(x, border, [True] * len(border)))
    positions = window.positions(x.shape[1:-1])
    columns = array_module(x).empty((len(x), *positions, *window.kernel, x.shape[-1]), x.dtype)
    cuda.launch("unfold", "unfold", (min(ceil(columns.size / 256), 1 << 20),), (256,), x, columns,
                _geometry(x.shape, 1, window.kernel, positions, window.stride, window.dilation,
                          [p[0] for p in window.padding]))
    return columns


def fold(columns: Array, size: tuple[int, ...], window: Window) -> Array:
    """The adjoint of `unfold`: (N, *P, *K, C) -> (N, *size, C)."""
    rank = len(size)
    window, border = _repeated(window)
    grid = tuple(n + sum(b) for n, b in zip(size, border[1:], strict=True))
    x = array_module(columns).empty((len(columns), *grid, columns.shape[-1]), columns.dtype)
    cuda.launch("unfold", "fold", (min(ceil(x.size / 256), 1 << 20),), (256,), plain(columns), x,
                _geometry(x.shape, 1, window.kernel, columns.shape[1:1 + rank], window.stride,
                          window.dilation, [p[0] for p in window.padding]))
    return array_module(x).ascontiguousarray(pad_adjoint(x, border, [True] * len(border)))


def maximum(x: Array, window: Window) -> tuple[Array, Array]:
    """See reference.maximum; the padding does not repeat."""
    return pool.maximum(x, window)


def maximum_adjoint(g: Array, winner: Array, size: tuple[int, ...], window: Window) -> Array:
    """See reference.maximum_adjoint."""
    return pool.maximum_adjoint(g, winner, size, window)
