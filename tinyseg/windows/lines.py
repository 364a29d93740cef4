"""Convolution with three taps along the first axis by fewer multiplications along that axis alone.

Winograd's filter (see `winograd`) turns m outputs of a line into m + 2 products. Applied to the
first axis only, these products are convolutions over the other axes, which any body computes:

    y = Aᵀ [ correlate(Bᵀ x, G w) ]        dw = Gᵀ [ correlate_dw(Bᵀ x, A y) ]

It is the way for the wide layers of inflated networks. Their kernels are large and their grids
small: taking tiles in the plane too would multiply the kernel by four or more, and cost more than
it saves. The tiles of the line stand beside each other as one more axis, next to the channels.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, prod

import numpy as np

from .. import parallel
from ..backend import Array
from .products import Correlation, Finish
from .reference import pad
from .transforms import FILTERS, transform
from .winograd import direct, per_pair, tiling

IMAGE, KERNEL = 70, 160  # cost of a transformed number, in products; measured as in `winograd`


def outputs(kernel, images: int, channels: int, filters: int, positions, stride, dilation,
            before, fixed: bool = False) -> int:
    """How many outputs of a line to compute together; 0 where another way is faster.

    As in `winograd`, by products for each pair of channels, with those that the transforms of the
    kernel and of the images cost (KERNEL and IMAGE a number). Along the first axis stride and
    dilation must be one. fixed: of a kernel that `winograd` may have transformed already.
    """
    if len(kernel) < 2 or kernel[0] != 3 or stride[0] != 1 or dilation[0] != 1 or before[0] < 0:
        return 0
    m = min((4, 3, 2), key=lambda m: ceil(positions[0] / m) * (m + 2))
    products = ceil(positions[0] / m) * (m + 2) * images
    cost = (direct(kernel[1:], products, filters, positions[1:], dilation[1:])
            + (m + 2) * prod(kernel[1:]) * KERNEL
            + products * prod(positions[1:]) * IMAGE * per_pair(channels, filters))
    tiles = tiling(kernel, images, channels, filters, positions, stride, dilation, fixed)
    other = tiles.cost if tiles else direct(kernel, images, filters, positions, dilation)
    return m if cost < other else 0


def along(matrix: Array, lines: Array, step: int) -> Array:
    """The matrix (f, r) times the tiles of r points of each line, `step` apart:
    (N, D, S, ..., C) -> (f, S, ..., N tiles, C)."""
    images, length, *size, channels = lines.shape
    tiles = images * ((length - matrix.shape[1]) // step + 1)
    out = np.empty((len(matrix), *size, tiles, channels), lines.dtype)

    def compute(part: slice) -> None:
        here = lines[:, :, part]
        answer = transform([matrix], here.reshape(images, length, -1), (step,))
        out[:, part] = np.moveaxis(answer.reshape(len(matrix), tiles, *here.shape[2:]), 1, -2)

    parallel.run(compute, parallel.parts(size[0]))
    return out


def spectrum(x: Array, m: int, tiles: int, before: int) -> Array:
    """Bᵀ x of the lines of x (N, D, S, ..., C): (m + 2, S, ..., N tiles, C)."""
    reach = tiles * m + 2  # of all windows together; padding alone may be longer
    before = min(before, reach)
    x = x[:, : reach - before]
    x = pad(x, [(0, 0), (before, reach - before - x.shape[1])], [False, False])
    return along(FILTERS[m][1], x, m)


def combined(w: Array, row: Array) -> Array:
    """Σ_k row[k] w[k], and a last axis of one tap: (3, K, ..., C, F) -> (K, ..., 1, C, F).

    The result lies in memory as w does: transposing a kernel takes longer than the rest of this.
    """
    used = [k for k in range(3) if row[k]]
    total = np.empty_like(w[0])

    def add(tap: tuple[int, ...]) -> None:  # tap by tap: in cache
        here = total[tap]
        np.multiply(w[(used[0], *tap)], row[used[0]], out=here)
        for k in used[1:]:
            here += w[(k, *tap)] * row[k]

    parallel.run(add, list(np.ndindex(w.shape[1:-2])))
    return np.expand_dims(total, -3)


def product(others: Callable, x: Array, w: Array, out: Array, m: int, stride, dilation,
            before, finish: Finish) -> None:
    """Write correlate(x, w), stride one along the first axis, finished, to `out` (N, *P, C_out);
    `others` gives the products over the other axes."""
    output, _, kernel = FILTERS[m]
    tiles = ceil(out.shape[1] / m)
    seen = spectrum(x, m, tiles, before[0])
    answers = np.empty((m + 2, *out.shape[2:-1], len(x) * tiles, out.shape[-1]), x.dtype)
    zeros, ones = (0,) * len(stride), (1,) * len(stride)
    for image, row, into in zip(seen[:, None], kernel, answers[:, None], strict=True):
        others(image, [Correlation(combined(w, row), into, zeros, ones, (*stride[1:], 1),
                                   (*dilation[1:], 1), (*before[1:], 0))])

    def back(part: slice) -> None:
        here = answers[:, part]
        lines = transform([output], here.reshape(1, m + 2, -1)).reshape(
            m, *here.shape[1:-2], len(x), tiles, -1)
        lines = np.moveaxis(lines, (-3, -2, 0), (0, 1, 2))
        lines = lines.reshape(len(x), tiles * m, *lines.shape[3:])
        lines = lines[:, : out.shape[1]]
        finish(lines, out[:, :, part], (slice(None), slice(None), part))

    parallel.run(back, parallel.parts(out.shape[2]))


def weights(others: Callable, x: Array, y: Array, m: int, kernel, stride, dilation,
            before) -> Array:
    """The gradient of correlate(x, w) in w, (*K, C_in, C_out); `others` gives those over the other
    axes."""
    output, _, matrix = FILTERS[m]
    tiles = ceil(y.shape[1] / m)
    seen = spectrum(x, m, tiles, before[0])
    y = pad(y, [(0, 0), (0, tiles * m - y.shape[1])], [False, False])
    answers = along(output.T, y, m)
    parts = [others(x, y, (*kernel[1:], 1), (*stride[1:], 1), (*dilation[1:], 1), (*before[1:], 0))
             for x, y in zip(seen[:, None], answers[:, None], strict=True)]
    dw: Array = np.empty((*kernel, x.shape[-1], y.shape[-1]), x.dtype)

    def back(tap: tuple[int, ...]) -> None:
        here = np.stack([part[tap] for part in parts])
        dw[(slice(None), *tap)] = (matrix.T @ here.reshape(m + 2, -1)).reshape(3, *here.shape[2:])

    parallel.run(back, list(np.ndindex(kernel[1:])))
    return dw
