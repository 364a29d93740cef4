"""Convolution with 3 x 3 taps in the plane (and 1 or 3 in depth) by fewer multiplications.

Winograd's minimal filtering (Lavin and Gray 2016): m outputs of a 3-tap filter cost m + 2 products
instead of 3 m. With matrices A, B, G for an axis, and ⊗ over the axes,

    y = Aᵀ [ (G w) ⊙ (Bᵀ x) ]        m = 4 or 3 in the plane (36 products for 16 outputs, 144
    dw = Gᵀ [ (Bᵀ x) ⊙ (A y) ]       direct), m = 2 in depth (4 for 2, 6 direct)

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

DEPTH = 2  # outputs of a tile in depth
BLOCK = 1 << 20  # numbers in a block's transformed tiles
IMAGE, KERNEL = 70, 80  # cost of a transformed number, in products; measured on Zen 3, 2 threads
WHOLE = 1 << 24  # numbers in a transformed kernel, or tiles of a weight gradient at a time: 64 MiB


def filtering(m: int) -> tuple[Array, Array, Array]:
    """Aᵀ (m, m + 2), Bᵀ (m + 2, m + 2) and G (m + 2, 3) of F(m, 3), by Toom and Cook.

    Signals are polynomials, known by their values at the points 0, 1, -1, 2, -2 (the first m + 1)
    and infinity. G evaluates the filter, divided by the denominators of Lagrange's interpolation;
    Bᵀ holds the coefficients of its numerators; a correlation is the transpose of a product
    (Barabasz et al. 2020, "Error analysis and improving the accuracy of Winograd convolution").
    """
    points = np.array((0, 1, -1, 2, -2)[: m + 1])
    others = [np.delete(points, i) for i in range(m + 1)]
    infinity = np.eye(m + 2)[-1:]
    a = np.vstack([np.vander(points, m, increasing=True), infinity[:, -m:]])
    b = [[*np.poly(o)[::-1], 0] for o in others] + [np.poly(points)[::-1]]
    g = np.vander(points, 3, increasing=True) / [[np.prod(p - o)] for p, o in
                                                 zip(points, others, strict=True)]
    return a.T, np.array(b), np.vstack([g, infinity[:, -3:]])


PLANES = {m: [np.kron(matrix, matrix).astype("float32") for matrix in filtering(m)]
          for m in (4, 3)}  # outputs of a tile along an axis of the plane: Aᵀ, Bᵀ, G of the plane


def tiles_of(kernel, positions, dilation) -> tuple[list, list, list]:
    """Per axis: dilation that matters, outputs of a tile, tiles along one phase; with the tiles of
    the plane that take fewer products."""
    apart = [d if k > 1 else 1 for k, d in zip(kernel, dilation, strict=True)]

    def cut(m: int) -> tuple[list, list]:
        steps = [*[DEPTH if k > 1 else 1 for k in kernel[:-2]], m, m]
        return steps, [ceil(ceil(p / d) / s)
                       for p, d, s in zip(positions, apart, steps, strict=True)]

    return apart, *min(map(cut, PLANES), key=lambda c: (c[0][-1] + 2) ** 2 * prod(c[1]))


def pairs(kernel, positions, dilation) -> int:
    """How many pairs of a tap and an output stand on the grid and not in its padding."""
    return prod(p + (k - 1) * max(0, p - d) for k, p, d in
                zip(kernel, positions, dilation, strict=True))


def serves(kernel, images: int, channels: int, filters: int, positions, stride, dilation) -> bool:
    """Whether this is the faster way, by products for each pair of channels: what the transforms
    of images (IMAGE products a number) and of the kernel (KERNEL) cost, against what they save.
    A kernel that would take more than WHOLE numbers stays as it is."""
    if kernel[-2:] != (3, 3) or kernel[:-2] not in ((), (1,), (3,)) or set(stride) != {1}:
        return False
    apart, steps, tiles = tiles_of(kernel, positions, dilation)
    number, frequencies = images * prod(apart) * prod(tiles), prod(s + 2 for s in steps if s > 1)
    here = frequencies * (number * (1 + IMAGE / channels + IMAGE / filters) + KERNEL)
    direct = images * pairs(kernel, positions, dilation)
    return here < direct and frequencies * channels * filters <= WHOLE


class Tiling:
    """How the windows of a convolution with stride one fall into tiles and blocks of tiles."""

    def __init__(self, kernel, positions, dilation, width: int):
        self.deep = kernel[0] == 3
        self.apart, self.steps, self.tiles = tiles_of(kernel, positions, dilation)
        self.plane = self.steps[-1]  # outputs of a tile along an axis of the plane
        self.phases = list(every(*map(range, self.apart)))
        self.frequencies = 4 if self.deep else 1
        # Numbers in a row of tiles.
        self.row = (self.plane + 2) ** 2 * self.frequencies * width * self.tiles[2]

    def blocks(self, first: int, last: int) -> list[Box]:
        """The images `first` to `last`, phases counted, as boxes of images, slabs and rows: of
        about BLOCK numbers, or of more where products would be shorter than 96 tiles; as many for
        each thread, as long as they hold 24."""
        grid, threads = (last - first, *self.tiles[:2]), parallel.threads()
        number = min(prod(grid) * self.row / BLOCK, prod(grid) * self.tiles[2] / 96)
        number = ceil(number / threads) * threads
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
        """Bᵀ x of a block: (frequencies of the plane, of the depth, tiles, C)."""
        images, slab, row = block
        matrix, m = PLANES[self.plane][1], self.plane
        step, across, channels = self.steps[0], self.tiles[2], spread.shape[-1]
        seen = spread[images, slab.start * step : slab.stop * step + 2 * self.deep,
                      row.start * m : row.stop * m + 2]
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
            planes, (m + 2, m + 2, *planes.shape[:3], high, across, channels),
            (s[3], s[4], *s[:3], m * s[3], m * s[4], s[5]), writeable=False))
        tiles = tiles.reshape(len(matrix), -1)
        return (matrix @ tiles).reshape(len(matrix), self.frequencies, -1, channels)


def transformed(w: Array, matrix: Array) -> Array:
    """G w: (1 or 3, 3, 3, C, F) -> (frequencies of the plane, of the depth, C, F).

    In this order in memory whatever that of w: products with a transposed view take 20 % longer.
    """
    factors = np.empty((len(matrix), 4 if len(w) == 3 else 1, *w.shape[3:]), w.dtype)

    def transform(channel: slice) -> None:
        planes = list(w[:, :, :, channel])
        if len(w) == 3:  # G in depth
            first, middle, last = planes
            ends, middle = (first + last) / 2, middle / 2
            planes = [first, ends + middle, ends - middle, last]
        for i, plane in enumerate(planes):
            np.matmul(matrix, plane.reshape(9, -1), out=factors[:, i, channel].reshape(
                len(matrix), -1))

    parallel.run(transform, parallel.parts(w.shape[3]))
    return factors


def product(x: Array, w: Array, out: Array, dilation, before) -> None:
    """Write correlate(x, w), stride one, zero padding `before`, to `out` (N, *P, C_out)."""
    if out.ndim == 4:  # a plane is a volume of depth one
        x, w, out = x[:, None], w[None], out[:, None]
        dilation, before = (1, *dilation), (0, *before)
    filters = w.shape[-1]
    tiling = Tiling(w.shape[:3], out.shape[1:4], dilation, max(w.shape[3:]))
    (output, _, kernel), m, step = PLANES[tiling.plane], tiling.plane, tiling.steps[0]
    spread, factors = tiling.spread(x, before, True), transformed(w, kernel)

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
        result = (output @ answer.reshape(len(factors), -1)).reshape(
            m, m, step, count, thick, high, tiling.tiles[2], filters)
        result = result.transpose(3, 4, 2, 5, 0, 6, 1, 7).reshape(
            count, thick * step, high * m, -1, filters)
        for values, image in zip(result, range(images.start, images.stop), strict=True):
            phase = [slice(a, None, d) for a, d in
                     zip(tiling.phases[image // len(x)], tiling.apart, strict=True)]
            here = out[(image % len(x), *phase)][
                slab.start * step : slab.stop * step, row.start * m : row.stop * m]
            here[...] = values[tuple(map(slice, here.shape[:3]))]

    parallel.run(compute, tiling.blocks(0, len(spread)))


def weights(x: Array, y: Array, kernel, dilation, before) -> Array:
    """The gradient of correlate(x, w) in w, stride one, zero padding: (*K, C_in, C_out)."""
    if y.ndim == 4:
        return weights(x[:, None], y[:, None], (1, *kernel), (1, *dilation), (0, *before))[0]
    channels, filters = x.shape[-1], y.shape[-1]
    tiling = Tiling(kernel, y.shape[1:4], dilation, max(channels, filters))
    seen, answers = tiling.spread(x, before, True), tiling.spread(y, (0, 0, 0), False)
    (output, _, matrix), m, step = PLANES[tiling.plane], tiling.plane, tiling.steps[0]
    sums = np.empty((len(matrix), tiling.frequencies, channels, filters), x.dtype)
    frequencies = list(every(*map(range, sums.shape[:2])))
    together = max(1, WHOLE // (len(frequencies) * prod(tiling.tiles) * (channels + filters)))
    for start in range(0, len(seen), together):
        boxes = tiling.blocks(start, min(start + together, len(seen)))
        ends = np.cumsum([prod(s.stop - s.start for s in b) * tiling.tiles[2] for b in boxes])
        left = np.empty((*sums.shape[:2], ends[-1], channels), x.dtype)
        right = np.empty((*sums.shape[:2], ends[-1], filters), x.dtype)

        def transform(i, boxes=boxes, ends=ends, left=left, right=right) -> None:
            images, slab, row = boxes[i]
            count, thick, high = (s.stop - s.start for s in boxes[i])
            here = slice(ends[i] - count * thick * high * tiling.tiles[2], ends[i])
            left[:, :, here] = tiling.spectrum(seen, boxes[i])
            tiles = answers[images, slab.start * step : slab.stop * step,
                            row.start * m : row.stop * m]
            tiles = tiles.reshape(count, thick, step, high, m, -1, m, filters)
            tiles = tiles.transpose(4, 6, 2, 0, 1, 3, 5, 7)
            spectrum = (output.T @ tiles.reshape(m * m, -1)).reshape(len(sums), step, -1, filters)
            if tiling.deep:  # A in depth
                first, second = spectrum[:, 0], spectrum[:, 1]
                right[:, 0, here], right[:, 3, here] = first, -second
                right[:, 1, here], right[:, 2, here] = first + second, first - second
            else:
                right[:, :, here] = spectrum

        def multiply(f, first=start == 0, left=left, right=right) -> None:
            if first:
                np.matmul(left[f].T, right[f], out=sums[f])
            else:
                sums[f] += left[f].T @ right[f]

        parallel.run(transform, range(len(boxes)))
        parallel.run(multiply, frequencies)

    dw = np.empty((*kernel, channels, filters), x.dtype)

    def back(channel: slice) -> None:
        planes = [matrix.T @ sums[:, i, channel].reshape(len(sums), -1)
                  for i in range(tiling.frequencies)]
        if tiling.deep:  # Gᵀ in depth
            first, second, third, last = planes
            middle = (second + third) / 2
            planes = [first + middle, (second - third) / 2, middle + last]
        for i, plane in enumerate(planes):
            dw[i, :, :, channel] = plane.reshape(3, 3, -1, filters)

    parallel.run(back, parallel.parts(channels))
    return dw
