"""Convolution, of a grid and of a grid that has every position twice, as decoders go back up; `ops`
offers all of it."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

from . import parallel, windows
from .backend import Array, array_module
from .normalisation import column_sums
from .tensor import op
from .windows import Finish, Window


@op
def conv(x, w, b=None, residual=None, *, relu: bool = False, stride=1, padding=0, dilation=1,
         padding_mode="zero"):
    """Cross-correlation, as every framework's convolution: see windows.reference.correlate.

    x (N, *S, C_in), w (*K, C_in, C_out), b (C_out,) or None -> (N, *P, C_out) with
    P = floor((S + before + after - dilation (K-1) - 1) / stride) + 1. Options are a number or a
    tuple with one entry per spatial axis; a padding entry is an int or (before, after), a
    padding_mode entry "zero" or "edge". What follows in a residual block without a batch-norm can
    be part of it: `residual`, in the shape of the output, is added, and `relu` cuts at 0. Raises
    ValueError where shapes do not fit.

    >>> ts.ops.conv(np.ones((1, 8, 9, 2)), np.ones((3, 4, 2, 5)), stride=(2, 1)).shape
    (1, 3, 6, 5)
    """
    if (x.ndim != w.ndim or x.shape[-1] != w.shape[-2]
            or b is not None and getattr(b, "shape", ()) != w.shape[-1:]):
        raise ValueError(f"conv: input {x.shape} does not fit kernel {w.shape} and bias; expected "
                         f"(N, *S, C_in) and (*K, C_in, C_out) with equal rank and C_in, (C_out,)")
    window, size = Window.of(w.shape[:-2], stride, padding, dilation, padding_mode), x.shape[1:-1]
    if residual is not None:
        found, shape = getattr(residual, "shape", residual), (*window.positions(size), w.shape[-1])
        if found != (len(x), *shape):
            raise ValueError(f"conv: residual {found} does not fit the output; expected its shape "
                             f"{(len(x), *shape)}")
    y = windows.correlate(x, w, window, Finish(b, residual, relu))
    cut = y if relu else None

    def passed(g):
        return g if cut is None else g * (cut > 0)

    return y, (  # each keeps what it needs, and no more
        lambda g: windows.correlate_dx(passed(g), w, size, window),
        lambda g: windows.correlate_dw(x, passed(g), window),
        lambda g: column_sums(passed(g).reshape(-1, g.shape[-1])),
        passed,
    )


@op
def double(x, skip=None, *, size):
    """Every position twice along each spatial axis, cut to `size` (nearest neighbour), and the
    channels of `skip` behind: (N, *S, C), (N, *size, C') or None -> (N, *size, C + C').

    An axis that has its size already stays. All is written once, in its place. Raises ValueError
    where a size is none of n, 2n - 1 and 2n, or skip is of another.

    >>> ts.ops.double(np.array([[[1.0], [2.0]]]), size=(3,)).data.ravel()
    array([1., 1., 2.])
    """
    library, before, c, size = array_module(x), x.shape[1:-1], x.shape[-1], tuple(size)
    if len(size) != len(before) or any(m not in (n, 2 * n - 1, 2 * n)
                                       for n, m in zip(before, size, strict=True)):
        raise ValueError(f"double: size {size} is not that of {x.shape}, nor of it doubled")
    if skip is not None and skip.shape[:-1] != (len(x), *size):
        raise ValueError(f"double: skip {skip.shape} does not fit {(len(x), *size)}")
    steps = [1 if n == m else 2 for n, m in zip(before, size, strict=True)]
    wide, kinds = (c, (x,)) if skip is None else (c + skip.shape[-1], (x, skip))
    y = library.empty((len(x), *size, wide), library.result_type(*kinds))
    few = max(1, parallel.SLAB * before[0] // max(y.size, 1))  # rows whose copies fit the cache
    slabs = parallel.parts(before[0], few) if library is np else [slice(0, before[0])]

    def above(slab):
        return slice(slab.start * steps[0], slab.stop * steps[0])

    def copies(fine, coarse):  # each copy in `fine`, and what of `coarse` it is a copy of
        for phase in product(*map(range, steps)):
            part = fine[:, *(slice(p, None, s) for p, s in zip(phase, steps, strict=True))]
            yield part, coarse[:, *map(slice, part.shape[1:-1])]

    def write(slab):
        rows = y[:, above(slab)]
        for part, source in copies(rows[..., :c], x[:, slab]):
            part[...] = source
        if skip is not None:
            rows[..., c:] = skip[:, above(slab)]

    parallel.run(write, slabs)

    def pull(g):
        out = library.zeros((len(g), *before, c), g.dtype)

        def add(slab):
            for part, total in copies(g[:, above(slab), ..., :c], out[:, slab]):
                total += part

        parallel.run(add, slabs)
        return out

    return y, (pull, lambda g: g[..., c:])


class Phases(NamedTuple):
    """The convolution of a doubled grid as one of the grid as it was. Its filters are those of each
    phase, of the outputs 2q and of the outputs 2q + 1 along each axis, beside each other.

    sums: (phase, tap, tap before): a tap of a phase is the sum of those before that stand on one
    point. window: over the grid as it was. steps: how many phases an axis has, 1 or 2.
    """

    sums: list[list[int]]
    window: Window
    steps: tuple[int, ...]

    def kernel(self, w: Array) -> Array:
        """(*K, C, F) -> (*K', C, phases F)."""
        *_, channels, filters = w.shape
        w = w.reshape(-1, channels, filters)
        taps = np.zeros((prod(self.window.kernel), channels, prod(self.steps), filters), w.dtype)
        for phase, tap, before in self.sums:
            taps[tap, :, phase] += w[before]
        return taps.reshape(*self.window.kernel, channels, -1)

    def kernel_adjoint(self, dw: Array, shape: tuple[int, ...]) -> Array:
        """(*K', C, phases F) -> (*K, C, F), which is `shape`."""
        taps = dw.reshape(-1, shape[-2], prod(self.steps), shape[-1])
        total = np.zeros((prod(shape[:-2]), *shape[-2:]), dw.dtype)
        for phase, tap, before in self.sums:
            total[before] += taps[tap, :, phase]
        return total.reshape(shape)

    def apart(self, y: Array) -> Array:
        """The phases of a grid (N, *P, F), as a view (N, *P', *steps, F)."""
        batch, *size, filters = y.shape
        axes = range(1, 2 * len(size), 2)
        split = (n for m, s in zip(size, self.steps, strict=True) for n in (m // s, s))
        return y.reshape(batch, *split, filters).transpose(
            0, *axes, *(axis + 1 for axis in axes), -1)


@lru_cache(maxsize=1024)
def phases(window: Window, before: tuple[int, ...], size: tuple[int, ...]) -> Phases | None:
    """How to convolve a grid `before` that is doubled to `size` along some axes.

    Tap t of window 2q + a stands on point 2q + a + t - p of the doubled grid, which is a copy of
    point q + floor((a + t - p) / 2). None where an axis is not exactly doubled or the convolution
    does not keep its size: then phases differ in number.

    >>> parts = ts.ops.phases(ts.windows.Window.of((3, 3), padding=1), (5, 6), (10, 12))
    >>> parts.steps, parts.window.kernel, len(parts.sums)
    ((2, 2), (3, 3), 36)
    """
    matrix: np.ndarray = np.ones((1, 1, 1))  # (phases, taps, taps before)
    axes = []
    for n, m, k, s, (p, after), d in zip(before, size, window.kernel, window.stride,
                                         window.padding, window.dilation, strict=True):
        if n == m:
            matrix = np.kron(matrix, np.eye(k)[None])
            axes.append((k, s, (p, after), d))
            continue
        if m != 2 * n or s != 1 or d != 1 or p + after != k - 1:
            return None
        points = np.add.outer((0, 1), np.arange(k) - p) // 2  # of each phase and tap
        low, high = int(points.min()), int(points.max())
        matrix = np.kron(matrix, points[:, None] == np.arange(low, high + 1)[:, None])
        axes.append((high - low + 1, 1, (-low, high), 1))
    kernel, stride, padding, dilation = zip(*axes, strict=True)
    return Phases(np.argwhere(matrix).tolist(),
                  Window(kernel, stride, padding, dilation, window.edge),
                  tuple(m // n for n, m in zip(before, size, strict=True)))


@op
def conv_phases(x, w, b=None, *, window, size, relu: bool = False):
    """conv(double(x, size=size), w, b, relu=relu) of NumPy arrays, with a window of which there are
    `phases`: the doubled grid is never written, and the engine shares what it makes of x among all
    phases. Of 3 x 3 x 3 taps of a phase 2 x 2 x 2 are not zero. ValueError where there are none.

    >>> x, w = np.ones((1, 5, 6, 2)), np.ones((3, 3, 2, 4))
    >>> window, size = ts.windows.Window.of((3, 3), padding=1), (10, 12)
    >>> y = ts.ops.conv_phases(x, w, window=window, size=size)
    >>> np.allclose(y.data, ts.ops.conv(ts.ops.double(x, size=size), w, padding=1).data)
    True
    """
    before = x.shape[1:-1]
    if (parts := phases(window, before, size)) is None:
        raise ValueError(f"conv_phases: {before} is not doubled to {size}, or {window} does not "
                         "keep that; use conv of double")
    kernel = parts.kernel(w)
    y = np.empty((len(x), *window.positions(size), w.shape[-1]), np.result_type(x, w))
    each = None if b is None else np.tile(b, prod(parts.steps))  # the bias of each phase
    _copy(windows.correlate(x, kernel, parts.window, Finish(each, relu=relu)),
          parts.apart(y))

    cut = y if relu else None

    def pull(g, wanted):
        g = g if cut is None else g * (cut > 0)
        apart = parts.apart(g)
        rows = np.empty(apart.shape, g.dtype)
        _copy(apart, rows)
        rows = rows.reshape(*apart.shape[: x.ndim - 1], -1)
        return (windows.correlate_dx(rows, kernel, before, parts.window) if wanted[0] else None,
                parts.kernel_adjoint(windows.correlate_dw(x, rows, parts.window), w.shape)
                if wanted[1] else None,
                column_sums(g.reshape(-1, g.shape[-1])) if b is not None and wanted[2] else None)

    return y, pull


def _copy(source: Array, target: Array) -> None:
    """source, in the order of its numbers, to a target (N, P, ...), side by side."""
    source = source.reshape(target.shape)
    few = max(1, target.shape[1] * parallel.SLAB // max(1, target.size))  # rows in the cache
    parallel.run(lambda rows: np.copyto(target[:, rows], source[:, rows]),
                 parallel.parts(target.shape[1], few))
