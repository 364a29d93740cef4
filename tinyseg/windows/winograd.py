"""Convolution with 3 x 3 taps in the plane (and 1 or 3 in depth) by fewer multiplications.

Winograd's minimal filtering (Lavin and Gray 2016): m outputs of a 3-tap filter cost m + 2 products
instead of 3 m. With matrices A, B, G for an axis, and ⊗ over the axes,

    y = Aᵀ [ (G w) ⊙ (Bᵀ x) ]        m = 4 in the plane (36 products for 16 outputs, 144 direct),
                                     m = 2 in depth (4 for 2, 6 direct)

Each of the products ⊙ is one over channels for all tiles of a block: a matrix product per
frequency. The transforms of a plane are matrix products too, with the Kronecker products of the
axes' matrices; depth needs additions only. Rounding is about 2e-6 of the output's scale.
"""

from __future__ import annotations

from itertools import product as every
from math import ceil, prod

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .. import parallel
from ..backend import Array

PLANE, DEPTH = 4, 2  # outputs of a tile along an axis
BLOCK = 1 << 20  # numbers in a block's transformed tiles

# F(4, 3) for the points 0, 1, -1, 2, -2 and infinity (Lavin and Gray 2016, section 4.3), F(2, 3)
A4 = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
B4 = np.array([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
               [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]])
G4 = np.array([[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
               [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]])
INPUT, OUTPUT, KERNEL = (np.kron(m, m).astype("float32") for m in (B4, A4, G4))


def serves(kernel, channels: int, filters: int, positions, stride, dilation) -> bool:
    """Whether this is the faster way: enough channels to pay for the transforms of x and y, enough
    tiles to pay for that of w, and few that stand over the border."""
    if kernel[-2:] != (3, 3) or kernel[:-2] not in ((), (1,), (3,)):
        return False
    tiles = (*[DEPTH * (k == 3) or 1 for k in kernel[:-2]], PLANE, PLANE)
    number = prod(ceil(p / t) for p, t in zip(positions, tiles, strict=True))
    return (set(stride) == {1} and set(dilation) == {1} and min(channels, filters) >= 32
            and number >= 96 and number * prod(tiles) <= 1.5 * prod(positions))


def transformed(w: Array) -> Array:
    """G w along each axis: (1 or 3, 3, 3, C, F) -> (36, 1 or 4, C, F)."""
    factors = np.empty((36, 4 if len(w) == 3 else 1, *w.shape[3:]), w.dtype)

    def transform(channel: slice) -> None:
        planes = [(KERNEL @ plane.reshape(9, -1)).reshape(36, -1, w.shape[-1])
                  for plane in w[..., channel, :]]
        if len(w) == 1:
            factors[:, 0, channel] = planes[0]
            return
        first, middle, last = planes
        ends = (first + last) / 2
        middle /= 2
        for i, value in enumerate((first, ends + middle, ends - middle, last)):
            factors[:, i, channel] = value

    channels = w.shape[3]
    size = max(1, -(-channels // parallel.threads()))
    parallel.run(transform, [slice(i, i + size) for i in range(0, channels, size)])
    return factors


def product(x: Array, w: Array, out: Array, before) -> None:
    """Write correlate(x, w), stride one, zero padding `before`, to `out` (N, *P, C_out)."""
    if out.ndim == 4:  # a plane is a volume of depth one
        x, w, out, before = x[:, None], w[None], out[:, None], (0, *before)
    deep, (channels, filters) = len(w) == 3, w.shape[-2:]
    step = DEPTH if deep else 1
    depth, height, width = out.shape[1:4]
    slabs, down, across = ceil(depth / step), ceil(height / PLANE), ceil(width / PLANE)

    reach = (slabs * step + 2 * deep, down * PLANE + 2, across * PLANE + 2)
    padded = np.zeros((len(x), *reach, channels), x.dtype)
    source = [slice(max(0, -b), min(n, r - b)) for b, n, r in
              zip(before, x.shape[1:4], reach, strict=True)]
    target = [slice(s.start + b, s.stop + b) for s, b in zip(source, before, strict=True)]
    padded[(slice(None), *target)] = x[(slice(None), *source)]

    factors = transformed(w)  # (36, frequencies, C, F)
    frequencies = factors.shape[1]

    tile = 36 * frequencies * max(channels, filters)
    high = max(1, min(down, BLOCK // (tile * across)))  # rows of tiles in a block
    thick = max(1, min(slabs, BLOCK // (tile * across * high)))

    def compute(block: tuple[int, int, int]) -> None:
        n, slab, row = block
        thick_, high_ = min(thick, slabs - slab), min(high, down - row)
        seen = padded[n, slab * step : (slab + thick_) * step + 2 * deep,
                      row * PLANE : (row + high_) * PLANE + 2, :]
        if deep:  # Bᵀ of F(2, 3)
            a, b, c, d = (seen[i : i + 2 * thick_ - 1 : 2] for i in range(4))
            planes = np.empty((4, *a.shape), x.dtype)
            for result, (f, p, q) in zip(planes, ((np.subtract, a, c), (np.add, b, c),
                                                  (np.subtract, c, b), (np.subtract, b, d)),
                                         strict=True):
                f(p, q, out=result)
        else:
            planes = np.ascontiguousarray(seen)[None]
        s = planes.strides
        tiles = np.ascontiguousarray(as_strided(
            planes, (6, 6, frequencies, thick_, high_, across, channels),
            (s[2], s[3], s[0], s[1], PLANE * s[2], PLANE * s[3], s[4]), writeable=False))
        count = thick_ * high_ * across
        spectrum = (INPUT @ tiles.reshape(36, -1)).reshape(36, frequencies, count, channels)
        answer = np.matmul(spectrum, factors)
        if deep:  # Aᵀ of F(2, 3)
            first, second = answer[:, 0], answer[:, 3]
            first += answer[:, 1]
            first += answer[:, 2]
            np.subtract(answer[:, 1], second, out=second)
            second -= answer[:, 2]
            answer = answer[:, ::3]
        result = OUTPUT @ np.ascontiguousarray(answer).reshape(36, -1)
        result = result.reshape(PLANE, PLANE, step, thick_, high_, across, filters)
        whole = result.transpose(3, 2, 4, 0, 5, 1, 6).reshape(
            thick_ * step, high_ * PLANE, across * PLANE, filters)
        here = out[n, slab * step : (slab + thick_) * step, row * PLANE : (row + high_) * PLANE]
        here[...] = whole[: here.shape[0], : here.shape[1], :width]

    parallel.run(compute, list(every(range(len(x)), range(0, slabs, thick), range(0, down, high))))
