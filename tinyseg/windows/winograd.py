"""Convolution with 3 x 3 taps in the plane (and 1 or 3 in depth) by fewer multiplications.

Winograd's minimal filtering (Lavin and Gray 2016): m outputs of a 3-tap filter cost m + 2 products
instead of 3 m. With matrices A, B, G for an axis, and ⊗ over the axes,

    y = Aᵀ [ (G w) ⊙ (Bᵀ x) ]        m = 4 in the plane (36 products for 16 outputs, 144 direct),
    dw = Gᵀ [ (Bᵀ x) ⊙ (A y) ]       m = 2 in depth (4 for 2, 6 direct)

Each of the products ⊙ is one over channels for all tiles of a block: a matrix product per
frequency. The transforms of a plane are matrix products too, with the Kronecker products of the
axes' matrices; depth needs additions only. Rounding is about 2e-6 of the output's scale.

Dilation d sees every d-th point only: the d phases of each axis are convolutions of their own, and
are computed as so many more images.
"""

from __future__ import annotations

from itertools import product as every
from math import ceil, prod

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .. import parallel
from ..backend import Array
from .geometry import Box, blocks

PLANE, DEPTH = 4, 2  # outputs of a tile along an axis
BLOCK = 1 << 20  # numbers in a block's transformed tiles
WHOLE = 1 << 24  # numbers in all tiles that a weight gradient transforms at a time: 64 MiB

# F(4, 3) for the points 0, 1, -1, 2, -2 and infinity (Lavin and Gray 2016, section 4.3)
A4 = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
B4 = np.array([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
               [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]])
G4 = np.array([[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
               [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]])
INPUT, OUTPUT, KERNEL = (np.kron(m, m).astype("float32") for m in (B4, A4, G4))


def tiles_of(kernel, positions, dilation) -> tuple[list, list, list]:
    """Per axis: dilation that matters, outputs of a tile, tiles along one phase."""
    apart = [d if k > 1 else 1 for k, d in zip(kernel, dilation, strict=True)]
    steps = [*[DEPTH if k > 1 else 1 for k in kernel[:-2]], PLANE, PLANE]
    return apart, steps, [ceil(ceil(p / d) / s)
                          for p, d, s in zip(positions, apart, steps, strict=True)]


def serves(kernel, images: int, channels: int, filters: int, positions, stride, dilation) -> bool:
    """Whether this is the faster way: enough channels to pay for the transforms of x and y, enough
    tiles to pay for that of w, and few that stand over the border."""
    if kernel[-2:] != (3, 3) or kernel[:-2] not in ((), (1,), (3,)) or set(stride) != {1}:
        return False
    apart, steps, tiles = tiles_of(kernel, positions, dilation)
    return (min(channels, filters) >= 32 and images * prod(apart) * prod(tiles) >= 96
            and prod(apart) * prod(tiles) * prod(steps) <= 1.5 * prod(positions))


class Tiling:
    """How the windows of a convolution with stride one fall into tiles and blocks of tiles."""

    def __init__(self, images: int, kernel, positions, dilation, width: int):
        self.images, self.deep = images, kernel[0] == 3
        self.apart, self.steps, self.tiles = tiles_of(kernel, positions, dilation)
        self.phases = list(every(*map(range, self.apart)))
        self.frequencies = 4 if self.deep else 1
        self.row = 36 * self.frequencies * width * self.tiles[2]  # numbers in a row of tiles

    def blocks(self, first: int, last: int) -> list[Box]:
        """The images `first` to `last`, phases counted, as boxes of images, slabs and rows: of
        about BLOCK numbers, as many for each thread, with 24 tiles at least."""
        grid = (last - first, *self.tiles[:2])
        number = ceil(prod(grid) * self.row / BLOCK / parallel.threads()) * parallel.threads()
        limit = max(ceil(prod(grid) / number), ceil(24 / self.tiles[2]))
        return [(slice(first + images.start, first + images.stop), *box)
                for images, *box in blocks(grid, limit)]

    def spread(self, x: Array, before, margin: bool) -> Array:
        """x (N, D, H, W, C) with its phases as images and zeros around: (phases N, *reach, C).

        Window p of a phase stands on point p - before; the margin is what a last tile sees more.
        """
        reach = [t * s + (2 if margin and s > 1 else 0)
                 for t, s in zip(self.tiles, self.steps, strict=True)]
        out = np.zeros((len(self.phases) * len(x), *reach, x.shape[-1]), x.dtype)

        def fill(i: int) -> None:
            source, target = [], []
            for a, d, b, n, r in zip(self.phases[i], self.apart, before, x.shape[1:4], reach,
                                     strict=True):
                first, offset = (a - b) % d, (a - b) // d  # j sees point first + (j + offset) d
                low, high = max(0, -offset), min(r, ceil((n - first) / d) - offset)
                source.append(slice(first + (low + offset) * d, None, d))
                target.append(slice(low, max(low, high)))
            here = out[(slice(i * len(x), (i + 1) * len(x)), *target)]
            here[...] = x[(slice(None), *source)][(slice(None), *map(slice, here.shape[1:4]))]

        parallel.run(fill, range(len(self.phases)))
        return out

    def spectrum(self, spread: Array, block: Box) -> Array:
        """Bᵀ x of a block: (36, frequencies in depth, tiles, C)."""
        images, slab, row = block
        step, across, channels = self.steps[0], self.tiles[2], spread.shape[-1]
        seen = spread[images, slab.start * step : slab.stop * step + 2 * self.deep,
                      row.start * PLANE : row.stop * PLANE + 2]
        if self.deep:
            a, b, c, d = (seen[:, i : seen.shape[1] - 3 + i : 2] for i in range(4))
            planes = np.empty((4, *a.shape), spread.dtype)
            for part, (f, p, q) in zip(planes, ((np.subtract, a, c), (np.add, b, c),
                                                (np.subtract, c, b), (np.subtract, b, d)),
                                       strict=True):
                f(p, q, out=part)
        else:
            planes = np.ascontiguousarray(seen)[None]
        high, s = row.stop - row.start, planes.strides
        tiles = np.ascontiguousarray(as_strided(
            planes, (6, 6, *planes.shape[:3], high, across, channels),
            (s[3], s[4], *s[:3], PLANE * s[3], PLANE * s[4], s[5]), writeable=False))
        return (INPUT @ tiles.reshape(36, -1)).reshape(36, self.frequencies, -1, channels)


def transformed(w: Array) -> Array:
    """G w: (1 or 3, 3, 3, C, F) -> (36, 1 or 4, C, F)."""
    if w.strides[-1] > w.strides[-2]:  # a view of (F, C): products take such a one as it stands
        return transformed(w.swapaxes(-1, -2)).swapaxes(-1, -2)
    factors = np.empty((36, 4 if len(w) == 3 else 1, *w.shape[3:]), w.dtype)

    def transform(channel: slice) -> None:
        planes = [(KERNEL @ plane.reshape(9, -1)).reshape(36, -1, w.shape[-1])
                  for plane in w[:, :, :, channel]]
        if len(w) == 1:
            factors[:, 0, channel] = planes[0]
            return
        first, middle, last = planes
        ends = (first + last) / 2
        middle /= 2
        for i, value in enumerate((first, ends + middle, ends - middle, last)):
            factors[:, i, channel] = value

    parallel.run(transform, parallel.parts(w.shape[3]))
    return factors


def product(x: Array, w: Array, out: Array, dilation, before) -> None:
    """Write correlate(x, w), stride one, zero padding `before`, to `out` (N, *P, C_out)."""
    if out.ndim == 4:  # a plane is a volume of depth one
        x, w, out = x[:, None], w[None], out[:, None]
        dilation, before = (1, *dilation), (0, *before)
    filters = w.shape[-1]
    tiling = Tiling(len(x), w.shape[:3], out.shape[1:4], dilation, max(w.shape[3:]))
    spread, factors, step = tiling.spread(x, before, True), transformed(w), tiling.steps[0]

    def compute(block: Box) -> None:
        answer = np.matmul(tiling.spectrum(spread, block), factors)
        if tiling.deep:  # Aᵀ in depth
            first, second = answer[:, 0], answer[:, 3]
            first += answer[:, 1]
            first += answer[:, 2]
            np.subtract(answer[:, 1], second, out=second)
            second -= answer[:, 2]
            answer = np.ascontiguousarray(answer[:, ::3])
        images, slab, row = block
        count, thick, high = (s.stop - s.start for s in block)
        result = (OUTPUT @ answer.reshape(36, -1)).reshape(
            PLANE, PLANE, step, count, thick, high, tiling.tiles[2], filters)
        result = result.transpose(3, 4, 2, 5, 0, 6, 1, 7).reshape(
            count, thick * step, high * PLANE, -1, filters)
        for values, image in zip(result, range(images.start, images.stop), strict=True):
            phase = [slice(a, None, d) for a, d in
                     zip(tiling.phases[image // len(x)], tiling.apart, strict=True)]
            here = out[(image % len(x), *phase)][
                slab.start * step : slab.stop * step, row.start * PLANE : row.stop * PLANE]
            here[...] = values[tuple(map(slice, here.shape[:3]))]

    parallel.run(compute, tiling.blocks(0, len(spread)))


def weights(x: Array, y: Array, kernel, dilation, before) -> Array:
    """The gradient of correlate(x, w) in w, stride one, zero padding: (*K, C_in, C_out)."""
    if y.ndim == 4:
        return weights(x[:, None], y[:, None], (1, *kernel), (1, *dilation), (0, *before))[0]
    channels, filters = x.shape[-1], y.shape[-1]
    tiling = Tiling(len(x), kernel, y.shape[1:4], dilation, max(channels, filters))
    seen, answers = tiling.spread(x, before, True), tiling.spread(y, (0, 0, 0), False)
    step, each = tiling.steps[0], prod(tiling.tiles)
    sums = np.zeros((36, tiling.frequencies, channels, filters), x.dtype)
    together = max(1, WHOLE // (36 * tiling.frequencies * each * (channels + filters)))
    for start in range(0, len(seen), together):
        boxes = tiling.blocks(start, min(start + together, len(seen)))
        ends = np.cumsum([prod(s.stop - s.start for s in b) * tiling.tiles[2] for b in boxes])
        left = np.empty((36, tiling.frequencies, ends[-1], channels), x.dtype)
        right = np.empty((36, tiling.frequencies, ends[-1], filters), x.dtype)

        def transform(i, boxes=boxes, ends=ends, left=left, right=right) -> None:
            images, slab, row = boxes[i]
            count, thick, high = (s.stop - s.start for s in boxes[i])
            here = slice(ends[i] - count * thick * high * tiling.tiles[2], ends[i])
            left[:, :, here] = tiling.spectrum(seen, boxes[i])
            tiles = answers[images, slab.start * step : slab.stop * step,
                            row.start * PLANE : row.stop * PLANE]
            tiles = tiles.reshape(count, thick, step, high, PLANE, -1, PLANE, filters)
            tiles = tiles.transpose(4, 6, 2, 0, 1, 3, 5, 7)
            spectrum = (OUTPUT.T @ tiles.reshape(16, -1)).reshape(36, step, -1, filters)
            if tiling.deep:  # A in depth
                first, second = spectrum[:, 0], spectrum[:, 1]
                right[:, 0, here], right[:, 3, here] = first, -second
                right[:, 1, here], right[:, 2, here] = first + second, first - second
            else:
                right[:, :, here] = spectrum

        def multiply(f, left=left, right=right) -> None:
            sums[f] += left[f].swapaxes(-1, -2) @ right[f]

        parallel.run(transform, range(len(boxes)))
        parallel.run(multiply, list(every(range(36), range(tiling.frequencies))))

    dw = np.empty((*kernel, channels, filters), x.dtype)

    def back(channel: slice) -> None:
        parts = [sums[:, i, channel] for i in range(tiling.frequencies)]
        if tiling.deep:  # Gᵀ in depth
            first, second, third, last = parts
            middle = (second + third) / 2
            parts = [first + middle, (second - third) / 2, middle + last]
        for i, part in enumerate(parts):
            dw[i, :, :, channel] = (KERNEL.T @ part.reshape(36, -1)).reshape(3, 3, -1, filters)

    parallel.run(back, parallel.parts(channels))
    return dw
