"""Every position twice, as decoders go back up, and the convolution of that; `ops` offers both."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from . import parallel, windows
from .backend import Array, array_module
from .normalisation import column_sums
from .tensor import op
from .windows import Window
from .windows.reference import pad, pad_adjoint


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


class Phase(NamedTuple):
    """Some positions of a doubled grid, every second along some axes, from `start`, `step` apart;
    what their windows see is what `window` sees of the padded grid as it was, from `begin`, with a
    kernel each of whose taps is a sum of taps: sums (taps, taps before), one an axis."""

    start: tuple[int, ...]
    step: tuple[int, ...]
    begin: tuple[int, ...]
    sums: tuple[np.ndarray, ...]
    window: Window

    def positions(self, y: Array) -> Array:
        """Those of a doubled grid (N, *S, C)."""
        return y[:, *(slice(a, None, s) for a, s in zip(self.start, self.step, strict=True))]

    def seen(self, x: Array, count: tuple[int, ...]) -> Array:
        """What `count` windows see of the padded grid (N, *S, C)."""
        reach = (s * (n - 1) + span for n, s, span in zip(count, self.window.stride,
                                                          self.window.span, strict=True))
        return x[:, *(slice(a, a + n) for a, n in zip(self.begin, reach, strict=True))]

    def kernel(self, w: Array) -> Array:
        """The kernel (*K, C_in, C_out) as this phase has it."""
        return self._along(w, [matrix.astype(w.dtype) for matrix in self.sums])

    def spread(self, dw: Array) -> Array:
        """The adjoint of `kernel`."""
        return self._along(dw, [matrix.T.astype(dw.dtype) for matrix in self.sums])

    @staticmethod
    def _along(w: Array, matrices: list[np.ndarray]) -> Array:
        for axis, matrix in enumerate(matrices):
            w = np.moveaxis(np.tensordot(matrix, w, (1, axis)), 0, axis)
        return np.ascontiguousarray(w)


@lru_cache(maxsize=1024)
def phases(window: Window, before: tuple[int, ...], size: tuple[int, ...]) -> list[Phase]:
    """The phases of a convolution of a grid `before` that is doubled to `size` along some axes.

    Tap t of window 2q + a stands on point 2q + a + t - p of the doubled grid, which is a copy of
    point q + floor((a + t - p) / 2). None at all where an axis is not exactly doubled or the
    convolution does not keep its size: then they do not fit the border.

    >>> parts = ts.ops.phases(ts.windows.Window.of((3, 3), padding=1), (5, 6), (10, 12))
    >>> len(parts), parts[0].window.kernel
    (4, (2, 2))
    """
    axes: list[list[tuple]] = []
    for n, m, k, s, (p, after), d in zip(before, size, window.kernel, window.stride,
                                         window.padding, window.dilation, strict=True):
        if n == m:
            axes.append([(0, 1, 0, np.eye(k), s, d)])
            continue
        if m != 2 * n or s != 1 or d != 1 or p + after != k - 1:
            return []
        axes.append([])
        for a in (0, 1):
            points = [(a + t - p) // 2 for t in range(k)]
            matrix = np.zeros((points[-1] - points[0] + 1, k))
            matrix[np.subtract(points, points[0]), range(k)] = 1
            axes[-1].append((a, 2, p + points[0], matrix, 1, 1))
    found = []
    for parts in product(*axes):
        start, step, begin, sums, stride, dilation = zip(*parts, strict=True)
        found.append(Phase(start, step, begin, sums, Window(
            tuple(map(len, sums)), stride, ((0, 0),) * len(sums), dilation,
            (False,) * len(sums))))
    return found


@op
def conv_phases(x, w, b=None, *, window, size):
    """conv(double(x, size=size), w, b) with a window of which there are `phases`: the doubled grid
    is never written, and of 3 x 3 x 3 taps each position sees 2 x 2 x 2 points, 8 products where 27
    would be direct.

    >>> x, w = np.ones((1, 5, 6, 2)), np.ones((3, 3, 2, 4))
    >>> window, size = ts.windows.Window.of((3, 3), padding=1), (10, 12)
    >>> y = ts.ops.conv_phases(x, w, window=window, size=size)
    >>> np.allclose(y.data, ts.ops.conv(ts.ops.double(x, size=size), w, padding=1).data)
    True
    """
    parts, border = phases(window, x.shape[1:-1], size), [(0, 0), *window.padding]
    padded = pad(x, border, edge := [False, *window.edge])
    y = np.empty((len(x), *window.positions(size), w.shape[-1]), np.result_type(x, w))
    count = parts[0].positions(y).shape[1:-1]  # every phase has as many

    def each(compute):  # side by side; each on all cores where these are more
        return parallel.run(compute, parts) if parallel.threads() <= len(parts) else [
            *map(compute, parts)]

    def forward(phase):
        phase.positions(y)[...] = windows.correlate(phase.seen(padded, count), phase.kernel(w),
                                                    phase.window)

    each(forward)
    if b is not None:
        y += b

    def dx(g):
        total = np.zeros(padded.shape, y.dtype)
        for phase, part in zip(parts, each(lambda phase: windows.correlate_dx(
                np.ascontiguousarray(phase.positions(g)), phase.kernel(w),
                phase.seen(total, count).shape[1:-1], phase.window)), strict=True):
            phase.seen(total, count)[...] += part
        return pad_adjoint(total, border, edge)

    def dw(g):
        return sum(each(lambda phase: phase.spread(windows.correlate_dw(
            phase.seen(padded, count), np.ascontiguousarray(phase.positions(g)), phase.window))))

    return y, (dx, dw, lambda g: column_sums(g.reshape(-1, g.shape[-1])))
