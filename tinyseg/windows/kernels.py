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
from .products import Correlation, count, outputs, repeated
from .reference import pad, pad_adjoint

AXES = 3
GEOMETRY = np.dtype(  # struct Geometry of kernels/conv.cuh
    [(name, "int32") for name in ("batch", "channels", "filters", "origin", "pitch")]
    + [(name, "int32", AXES) for name in ("walk", "size", "positions", "taps", "stride", "dilation",
                                          "before", "grid", "start", "step")])
ROWS = 128  # of a block's tile; its columns are 64, or 128 on the tensor cores
BLOCKS = 2 * cuda.MULTIPROCESSORS  # that a GPU runs at once, of the widest tile
LINE = 128  # bytes of terms of a sum that a block adds in one turn
MOST = 27  # problems of a launch, which takes 4 KiB of arguments
BF16 = "unsigned short"  # the type that holds the bits of a bfloat16


def serves(window: Window, *arrays: Array) -> bool:
    """Whether the kernels take this convolution."""
    return len(window.kernel) <= AXES and cuda.serves(*arrays)


@lru_cache(maxsize=4096)
def _geometry(problems: tuple[tuple, ...]) -> np.ndarray:
    """struct Geometry of each problem, see `_fields`."""
    return np.array([_fields(*problem) for problem in problems], GEOMETRY)


def _fields(x_shape, filters, taps, positions, stride, dilation, before,
            grid=None, start=0, step=1, origin=0, pitch=0, walk=0) -> tuple:
    """The fields of a struct Geometry, scalars repeated and leading axes of one added; the grid is
    by default the positions."""

    def spatial(values, fill):
        values = (values,) * len(taps) if isinstance(values, int) else tuple(values)
        return (fill,) * (AXES - len(values)) + values

    batch, *size, channels = x_shape
    grid = positions if grid is None else grid
    for name, shape in (("input", size), ("output", positions), ("output", grid)):
        if batch * prod(shape) >= 2**31 - 2**16:  # the last tile of rows reaches past the end
            raise ValueError(f"convolution: an {name} of {batch} x {tuple(shape)} points is more "
                             "than the kernels count; use a smaller batch or patch")
    return (batch, channels, filters, origin, pitch, spatial(walk, 0), spatial(size, 1),
            spatial(positions, 1), spatial(taps, 1), spatial(stride, 1), spatial(dilation, 1),
            spatial(before, 0), spatial(grid, 1), spatial(start, 0), spatial(step, 1))


def tile(columns: int) -> dict[str, Any]:
    """The constants of conv_mma for a tile of 64 or 128 columns."""
    return {"COLUMNS": columns, "WARP_COLUMNS": columns // 2, "STAGES": 2}


def _body(channels: int, filters: int, taps: int) -> tuple[str, int, dict[str, Any]]:
    """The source that computes a convolution, its threads, and its constants."""
    if cuda.precision_here() == "fp32" or filters % 4:
        return "conv_simt", 256, {"COLUMNS": 64}
    constants = tile(128 if filters > 64 else 64)
    if cuda.precision_here() == "bf16" and 1 < taps <= 32 and not (channels % 8 or filters % 8):
        return "conv_mma", 128, constants | {"CHUNK": 8, "NUMBER": BF16}
    return "conv_mma", 128, constants | {"CHUNK": 1 if channels % 4 or taps > 32 else 4}


def _rounded(a: Array, numbers: int = 0) -> Array:
    """A factor in bfloat16: all of it, or so many numbers from where it begins."""
    halves = array_module(a).empty(numbers or a.shape, "uint16")
    cuda.launch("round", "rounded", (ceil(halves.size / (256 * 8)),), (256,), cuda.Strided(a),
                halves, halves.size)
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
def _slices(kernel: str, tiles: int, turns: tuple[int, ...], numbers: int, geometry: bytes,
            sparse: bool) -> int:
    """Into how many slices a sum of so many turns, of each problem, is cut, where a block does one
    tile of one slice.

    As many as make the whole quickest, counted in turns: BLOCKS run at once, each begins and ends
    in the time of 8 turns, and 900,000 of the `numbers` of a slice are moved in one. sparse:
    whether terms outside the grid are left out.
    """
    shares = [_inside(kernel, g) if sparse else (1.0, 1.0)
              for g in np.frombuffer(geometry, GEOMETRY)]
    mean = sum(n * some for n, (some, _) in zip(turns, shares, strict=True)) / len(turns)
    most = max(n * some for n, (_, some) in zip(turns, shares, strict=True))

    def took(n):
        waves, longest = tiles * n / BLOCKS, most / n + 8
        moved = (n + 1) * numbers / 900_000 if n > 1 else 0
        if waves <= 1:
            return longest + moved
        return waves * (mean / n + 8) + longest / 2 + moved

    return min(range(1, max(1, max(turns) // 4) + 1), key=took)


def _launch(kernel: str, body: tuple, x: Array, other: Array | cuda.Strided, into: Array,
            rows: int, terms: list[int], geometry: np.ndarray, written: np.ndarray, pitch: int
            ) -> None:
    """`kernel`, the matrix products of one or several problems, in slices if need be.

    rows: the most of a problem. terms: of the sums of each. written: the geometry of the outputs,
    where slices are added up. pitch: what a term of a tile takes in shared memory beside its
    numbers.
    """
    file, threads, constants = body
    columns, filters = constants["COLUMNS"], into.shape[-1]
    tiles, number = (ceil(rows / ROWS), ceil(filters / columns)), len(terms)
    whole = file == "conv_simt" and kernel == "correlate"  # it has no slices
    slices = 1 if whole else _slices(
        kernel, prod(tiles) * number, tuple(ceil(n * x.itemsize / LINE) for n in terms),
        number * rows * filters, geometry.tobytes(), constants.get("CHUNK", 1) > 1)
    apart = tiles[0] * ROWS  # rows from a slice to the next
    target = into if slices == 1 else array_module(x).empty((number, slices, apart, filters),
                                                            into.dtype)
    stages = constants.get("STAGES", 0)  # float32's buffers are declared in its source
    several = {"PROBLEMS": number} if number > 1 else {}
    cuda.launch(file, kernel, (*tiles, number * slices), (threads,), x, other, target, geometry,
                shared=LINE * stages * (ROWS + columns + pitch), **constants, **several)
    if slices > 1:
        vector = 1 if filters % 4 else 4
        cuda.launch("slices", "total", (ceil(rows * filters / (256 * vector)), number), (256,),
                    target, slices, apart, written, into, VECTOR=vector, THREADS=256, **several)


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in numbers, of an array of this shape without gaps."""
    return tuple(prod(shape[i + 1:]) for i in range(len(shape)))


@lru_cache(maxsize=4096)
def _layout(shapes: tuple, strides: tuple, offsets: tuple[int, ...], strided: bool) -> tuple:
    """What `_joined` tells of kernels of these shapes, with strides in numbers, that begin so far
    behind the first one; before that which of them has the lowest number, where it stands, and
    whether the sources can read them."""
    *_, channels, filters = shapes[0]
    walks = [each[:-2] for each in strides]
    low, high = ([begin + sum((k - 1) * edge(0, far) for k, far in zip(shape, walk, strict=False))
                  for shape, walk, begin in zip(shapes, walks, offsets, strict=True)]
                 for edge in (min, max))
    begins = [begin - min(low) for begin in offsets]
    packed = map(_packed, shapes)
    rows = strides[0][-2:]
    swapped = strided and rows == (1, channels) and channels > 1
    fits = all(n == 1 or far == right for shape, each, whole in zip(
        shapes, strides, packed, strict=True) for n, far, right in zip(
            shape, each, whole, strict=True))
    fits |= strided and (swapped or rows == (filters, 1)) and not any(
        far % 8 for walk in walks for far in walk)
    return (low.index(min(low)), min(low), fits and not any(begin % 8 for begin in begins),
            max(high) - min(low) + channels * filters, swapped,
            list(zip(begins, walks, strict=True)))


def _joined(kernels: list[Array], strided: bool) -> tuple[Array, int, bool, list[tuple]]:
    """Kernels (*K, C, F), parts of one array: that array from the first number that they hold, how
    many numbers it has, whether channels stand beside each other in it and not filters, and of each
    kernel where its first tap stands and how far apart its taps are.

    A copy where the sources could not read it. Whole rows of eight numbers they can, from 16 bytes
    on, and, if `strided`, in any order of taps and turned by a gradient in x.
    """
    w, size = kernels[0], kernels[0].itemsize
    origin = w.data.ptr
    offsets = tuple([(each.data.ptr - origin) // size for each in kernels])
    which, lowest, fits, numbers, swapped, places = _layout(
        tuple([each.shape for each in kernels]),
        tuple([tuple([s // size for s in each.strides]) for each in kernels]), offsets, strided)
    if fits and not (origin + lowest * size) % 16:
        w = kernels[which]  # which may walk backwards
        w = w[tuple(slice(None, None, -1 if s < 0 else 1) for s in w.strides)] if lowest else w
        return w, numbers, swapped, places
    ends = np.cumsum([0, *(each.size for each in kernels)]).tolist()
    copy = array_module(w).empty(ends[-1], w.dtype)
    for each, begin, end in zip(kernels, ends, ends[1:], strict=False):
        copy[begin:end].reshape(each.shape)[...] = each
    return copy, copy.size, False, [(begin, _packed(each.shape)[:-2])
                                    for each, begin in zip(kernels, ends, strict=False)]


def products(x: Array, problems: Iterable[Correlation]) -> None:
    """See products: into[:, start::step] = correlate(x, w) of each."""
    problems = sorted(problems, key=lambda problem: -problem.w.size)  # the longest blocks first
    if not problems:
        return
    x, into, w = plain(x), problems[0].into, problems[0].w
    channels, filters = w.shape[-2:]
    file, threads, constants = _body(channels, filters, prod(w.shape[:-2]))
    w, numbers, swapped, places = _joined([problem.w for problem in problems],
                                          constants.get("CHUNK", 1) > 1)
    if constants.get("NUMBER") == BF16:
        x, w = _rounded(x), _rounded(w, numbers)
    if file == "conv_mma":
        constants = {**constants, "SWAPPED": int(swapped)}
    for i in range(0, len(problems), MOST):
        some = problems[i:i + MOST]
        positions = [count(into.shape[1:-1], p.start, p.step) for p in some]
        geometry = _geometry(tuple([
            (x.shape, filters, p.w.shape[:-2], seen, p.stride, p.dilation, p.before,
             into.shape[1:-1], p.start, p.step, origin, channels if swapped else filters, walk)
            for p, seen, (origin, walk) in zip(some, positions, places[i:i + MOST], strict=True)]))
        _launch("correlate", (file, threads, constants), x, cuda.Strided(w), into,
                len(x) * max(map(prod, positions)), [prod(p.w.shape[:-1]) for p in some],
                geometry, geometry, pitch=8)
    for problem in problems:
        if not problem.finish.plain:
            y = outputs(problem)
            problem.finish(y, y)


def weights(x: Array, y: Array, kernel, stride, dilation, before) -> Array:
    """See products: the gradient of correlate(x, w) in w, (*K, C_in, C_out)."""
    x, y = plain(x), plain(y)
    positions, channels, filters = y.shape[1:-1], x.shape[-1], y.shape[-1]
    dw = array_module(x).empty((*kernel, channels, filters), x.dtype)
    rows, terms = prod(kernel) * channels, len(y) * prod(positions)
    geometry = _geometry(((x.shape, filters, kernel, positions, stride, dilation, before),))
    body = _body(channels, filters, prod(kernel))
    if body[2].get("NUMBER") == BF16:
        x, y = _rounded(x), _rounded(y)
    _launch("correlate_dw", body, x, y, dw, rows, [terms], geometry,
            _geometry((((1, 1, 1), filters, (1,), (rows,), 1, 1, 0),)), pitch=16)
    return dw


def unfold(x: Array, window: Window) -> Array:
    """Explicit im2col, (N, *S, C) -> (N, *P, *K, C): for comparison, nothing here uses it."""
    window, border = repeated(window)
    x = plain(pad(x, border, [True] * len(border)))
    positions = window.positions(x.shape[1:-1])
    columns = array_module(x).empty((len(x), *positions, *window.kernel, x.shape[-1]), x.dtype)
    cuda.launch("unfold", "unfold", (min(ceil(columns.size / 256), 1 << 20),), (256,), x, columns,
                _geometry(((x.shape, 1, window.kernel, positions, window.stride, window.dilation,
                            tuple(p[0] for p in window.padding)),)))
    return columns


def fold(columns: Array, size: tuple[int, ...], window: Window) -> Array:
    """The adjoint of `unfold`: (N, *P, *K, C) -> (N, *size, C)."""
    rank = len(size)
    window, border = repeated(window)
    grid = tuple(n + sum(b) for n, b in zip(size, border[1:], strict=True))
    x = array_module(columns).empty((len(columns), *grid, columns.shape[-1]), columns.dtype)
    cuda.launch("unfold", "fold", (min(ceil(x.size / 256), 1 << 20),), (256,), plain(columns), x,
                _geometry(((x.shape, 1, window.kernel, columns.shape[1:1 + rank], window.stride,
                            window.dilation, tuple(p[0] for p in window.padding)),)))
    return array_module(x).ascontiguousarray(pad_adjoint(x, border, [True] * len(border)))


def maximum(x: Array, window: Window, *, taps: bool = True) -> tuple[Array, Array]:
    """See reference.maximum; the padding does not repeat, and taps come at no cost."""
    return pool.maximum(x, window)


def maximum_adjoint(g: Array, winner: Array, size: tuple[int, ...], window: Window) -> Array:
    """See reference.maximum_adjoint."""
    return pool.maximum_adjoint(g, winner, size, window)
