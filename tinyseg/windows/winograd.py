"""Convolution with three taps along several axes by fewer multiplications.

Winograd's minimal filtering (Lavin and Gray 2016): m outputs of a 3-tap filter cost m + 2 products
instead of 3 m. With matrices A, B, G for an axis, and ⊗ over the axes,

    y = Aᵀ [ (G w) ⊙ (Bᵀ x) ]        m = 2, 3 or 4 along each axis, as it costs least
    dw = Gᵀ [ (Bᵀ x) ⊙ (A y) ]       (4 x 4 outputs: 36 products, 144 direct)

Each of the products ⊙ is one over channels for all tiles of a block: a matrix product per
frequency. All transforms are one function: axis after axis, a small matrix times rows of channels
that it reads where they lie. Where channels are few, these cost most, and the last axis is not
transformed: its three taps stand beside the channels of each product, and rows are whole lines.
Rounding is about 2e-6 of the output's scale. Dilation d sees every d-th point only: the d phases of
an axis are computed as so many more images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import product as every
from math import ceil, prod

import numpy as np

from .. import parallel
from ..backend import Array
from .geometry import Box, blocks
from .products import Finish, kept

BLOCK = 1 << 19  # numbers in a block's transformed tiles: 2 MiB
ROW = 1 << 14  # numbers in a row that a transform takes at a time
IMAGE, KERNEL = 40, 90  # cost of a transformed number, in products; measured on Zen 5, 2 threads
FIXED = 45  # that of one of a kernel that is transformed already: it is read, and takes memory
SHORT = 48  # channels: rows of fewer cost more
GATHER = 20  # cost of copying a column, in products
SLAB = 64  # filters that lie together in a transformed kernel: products of slabs, small enough for
SMALL = 10**6  # OpenBLAS to take them as they lie, run at its AVX-512 kernels' full speed
WHOLE = 10 << 20  # numbers in a transformed kernel, or tiles of a weight gradient at a time: 40 MiB


def filtering(m: int) -> tuple[Array, Array, Array]:
    """Aᵀ (m, m + 2), Bᵀ (m + 2, m + 2) and G (m + 2, 3) of F(m, 3), by Toom and Cook.

    Signals are polynomials, known by their values at the points 0, 1, -1, 1/2, -2 (the first m + 1)
    and infinity. G evaluates the filter, divided by the denominators of Lagrange's interpolation;
    Bᵀ holds the coefficients of its numerators; a correlation is the transpose of a product
    (Barabasz et al. 2020, "Error analysis and improving the accuracy of Winograd convolution";
    with 2 in place of 1/2, rounding is half as much again for each axis).
    """
    points = np.array((0, 1, -1, 1 / 2, -2)[: m + 1])
    others = [np.delete(points, i) for i in range(m + 1)]
    infinity = np.eye(m + 2)[-1:]
    a = np.vstack([np.vander(points, m, increasing=True), infinity[:, -m:]])
    b = [[*np.poly(o)[::-1], 0] for o in others] + [np.poly(points)[::-1]]
    g = np.vander(points, 3, increasing=True) / [[np.prod(p - o)] for p, o in
                                                 zip(points, others, strict=True)]
    return a.T, np.array(b), np.vstack([g, infinity[:, -3:]])


# Aᵀ, Bᵀ and G for m outputs of a tile along an axis; an axis of one tap has m = 1.
FILTERS = {1: [np.ones((1, 1), "float32")] * 3,
           **{m: [matrix.astype("float32") for matrix in filtering(m)] for m in (2, 3, 4)}}


def transform(matrices: list[Array], x: Array, steps: tuple[int, ...] | None = None,
              out: Array | None = None) -> Array:
    """The matrices (f, r), one an axis and ⊗ over the axes, times tiles of r x ... points of x:
    (N, *S, C) -> (frequencies, N tiles, C). Tiles begin `steps` apart; without, there is one.
    Where the last of several axes is transformed, its tiles come first: (tiles, N, others)."""
    count, *size, channels = x.shape
    steps = steps or tuple(size)
    last = max(i for i, matrix in enumerate(matrices) if matrix.size > 1)
    x, lead, tiles = np.ascontiguousarray(x), 1, count
    for i, (matrix, step, n) in enumerate(zip(matrices, steps, size, strict=True)):
        if matrix.size == 1:
            tiles *= n
            continue
        frequencies, reach = matrix.shape
        number, row, cut = (n - reach) // step + 1, prod(size[i + 1 :]) * channels, 1
        for points in size[i + 1 :]:  # what lies behind a point is one long row, cut where too long
            cut *= points if row > ROW * cut else 1
        if 0 < i == len(size) - 1:  # nothing lies behind: there the tiles of the other axes go
            x = whole(x.reshape(lead, tiles, n, row)).swapaxes(1, 2).copy().view(x.dtype)
            cut = next(c for c in range(1, tiles + 1)
                       if tiles % c == 0 and (tiles * row <= ROW * c or c == tiles))
            row, tiles = tiles * row, 1
        length = row // cut
        seen = np.ndarray((lead, tiles, number, cut, reach, length), x.dtype, x, 0, [  # uncopied
            x.itemsize * far for far in (tiles * n * row, n * row, step * row, length, row, 1)])
        x = out if i == last and out is not None else np.empty(
            (lead * frequencies, tiles * number, row), x.dtype)
        np.matmul(matrix, seen, out=x.reshape(
            lead, frequencies, tiles, number, cut, length).transpose(0, 2, 3, 4, 1, 5))
        lead, tiles = lead * frequencies, tiles * number
    return x.reshape(lead, -1, channels)


def whole(x: Array) -> Array:
    """x (..., C), its last axis as one item: runs of few channels are copied twice as fast."""
    return x.view(np.dtype((np.void, x.shape[-1] * x.itemsize)))[..., 0]


def pairs(kernel, positions, dilation) -> int:
    """How many pairs of a tap and an output stand on the grid and not in its padding."""
    return prod(p + (k - 1) * max(0, p - d) for k, p, d in
                zip(kernel, positions, dilation, strict=True))


def direct(kernel, images: int, filters: int, positions, dilation) -> float:
    """What the products of columns cost, in products for each pair of channels."""
    return images * pairs(kernel, positions, dilation) * (1 + GATHER / filters)


def per_pair(channels: int, filters: int, short: int = SHORT) -> float:
    """What transforming an element of each tile costs, spread over channels x filters products."""
    return sum(max(1, short / n) / n for n in (channels, filters))


@dataclass(frozen=True)
class Tiling:
    """How the windows of a convolution with stride one fall into tiles.

    apart: the dilation that matters along each axis. steps: the outputs of a tile. tiles: how many
    there are in one phase of one of the images. taps: three where those along the last axis are
    taken as they are, beside the channels. fixed: whether the kernel is transformed already.
    """

    apart: tuple[int, ...]
    steps: tuple[int, ...]
    tiles: tuple[int, ...]
    images: int
    channels: int
    filters: int
    taps: int = 1
    fixed: bool = False

    @property
    def frequencies(self) -> int:
        """How many numbers a tile becomes; its prod(steps) outputs cost `taps` products of each."""
        return prod(s + 2 for s in self.steps if s > 1)

    @property
    def number(self) -> int:
        """How many tiles there are."""
        return prod((self.images, *self.apart, *self.tiles))

    @property
    def cost(self) -> float:
        """Products and transforms, in products for each pair of channels."""
        beside = self.taps > 1
        images = self.taps * (1 + beside * GATHER / self.filters) + IMAGE * per_pair(
            self.channels, self.filters, 0 if beside else SHORT)
        kernel = self.taps * (FIXED if self.fixed else KERNEL)
        return self.frequencies * (self.number * images + kernel)

    @property
    def phases(self) -> list[tuple[int, ...]]:
        """Where the phases of the dilation begin; their images come one after another."""
        return list(every(*map(range, self.apart)))

    def groups(self) -> list[list[Box]]:
        """The tiles in batches whose products are taken together: of about BLOCK elements, or more
        where the products would have fewer rows than a quarter of the channels; as many batches
        for each thread. Where all is less than one such, threads share it, a box each."""
        grid, threads = (len(self.phases) * self.images, *self.tiles), parallel.threads()
        widest = max(self.taps * self.channels, self.filters)
        limit = max(BLOCK / (self.frequencies * widest), widest / 4)
        number = ceil(self.number / limit / threads) * threads
        boxes = list(blocks(grid, parallel.share(grid, number)))
        return [[box] for box in boxes] if self.number > limit else [boxes]

    def pieces(self, images: slice) -> Iterator[tuple[tuple[int, ...], slice, slice]]:
        """(phase, which of these images have it, which of the batch those are) for each phase."""
        for i, phase in enumerate(self.phases):
            first = i * self.images
            low, high = max(images.start, first), min(images.stop, first + self.images)
            if low < high:
                yield phase, slice(low - images.start, high - images.start), slice(
                    low - first, high - first)

    def region(self, x: Array, box: Box, before, margin: int) -> Array:
        """What the windows of a box see of x (N, *S, C), with zeros around: (images, *reach, C).
        Window p of a phase stands on point p - before; the margin is what a last tile sees more."""
        images, *tiles = box
        start = [t.start * s for t, s in zip(tiles, self.steps, strict=True)]
        reach = [(t.stop - t.start) * s + margin * (s > 1)
                 for t, s in zip(tiles, self.steps, strict=True)]
        reach[-1] += margin * (self.taps > 1)
        out = np.empty((images.stop - images.start, *reach, x.shape[-1]), x.dtype)
        for phase, here, batch in self.pieces(images):
            source, target = [batch], [here]
            for a, d, b, n, p, r in zip(phase, self.apart, before, x.shape[1:-1], start, reach,
                                        strict=True):
                first, offset = (a - b) % d, (a - b) // d + p  # j sees point first + (j + offset) d
                low, high = max(0, -offset), min(r, ceil((n - first) / d) - offset)
                source.append(slice(first + (low + offset) * d, None, d))
                target.append(slice(low, max(low, high)))
            inside = out[tuple(target)]
            if inside.shape[1:-1] != out.shape[1:-1]:
                out[here] = 0
            inside[...] = x[tuple(source)][(slice(None), *map(slice, inside.shape[1:-1]))]
        return out

    def spectrum(self, x: Array, box: Box, before, out: Array) -> None:
        """Bᵀ x of a box to `out` (frequencies, tiles, taps C)."""
        seen, matrices = self.region(x, box, before, 2), [FILTERS[m][1] for m in self.steps]
        if self.taps == 1:
            transform(matrices, seen, self.steps, out)
            return
        length, lines = seen.shape[-2], transform(matrices, seen, self.steps)
        point = lines[0, 0].nbytes
        out = whole(out).reshape(len(out), -1, length - 2)  # runs of three points overlap
        out[...] = np.ndarray(out.shape, out.dtype, lines, 0, [
            lines[0].nbytes, length * point, point])

    def write(self, answers: Array, box: Box, out: Array, finish: Finish) -> None:
        """Aᵀ of a box's products (frequencies, tiles, F), finished, to its windows in `out`."""
        if finish.bias is not None:  # at the points 1, whose powers are ones: added to each output
            answers[reduce(lambda f, s: f * (s + 2) + 1, [s for s in self.steps if s > 1], 0)
                    ] += finish.bias
            finish = finish._replace(bias=None)
        images, *tiles = box
        count, axes = [s.stop - s.start for s in box], len(tiles)
        values = whole(transform([FILTERS[m][0] for m in self.steps], answers.reshape(
            1, *(s + 2 if s > 1 else 1 for s in self.steps), -1)).reshape(-1, out.shape[-1]))
        if self.steps[-1] > 1 < axes:
            values = np.moveaxis(values.reshape(*self.steps, count[-1], *count[:-1]), axes, -1)
        values = values.reshape(*self.steps, *count).transpose(
            axes, *(i for axis in range(axes) for i in (axes + 1 + axis, axis)))
        values = values.reshape(
            count[0], *(c * s for c, s in zip(count[1:], self.steps, strict=True)))
        numbers = values.view(np.dtype((out.dtype, out.shape[-1])))
        for phase, here, batch in self.pieces(images):
            where = (batch, *(slice(a + t.start * s * d, a + t.stop * s * d, d) for a, t, s, d
                              in zip(phase, tiles, self.steps, self.apart, strict=True)))
            part = here, *map(slice, out[where].shape[1:-1])
            if finish.plain:
                whole(out[where])[...] = values[part]
            else:
                finish(numbers[part], out, where)


@lru_cache(1024)
def tiling(kernel, images: int, channels: int, filters: int, positions, stride, dilation,
           fixed: bool = False) -> Tiling | None:
    """The tiles that cost least, of those whose transformed kernel has at most WHOLE numbers; None
    where the direct products cost less."""
    if not {3} <= set(kernel) <= {1, 3} or set(stride) != {1}:
        return None
    apart = tuple(d if k > 1 else 1 for k, d in zip(kernel, dilation, strict=True))
    phase = [ceil(p / d) for p, d in zip(positions, apart, strict=True)]
    ways = [Tiling(apart, steps, tuple(ceil(p / s) for p, s in zip(phase, steps, strict=True)),
                   images, channels, filters, fixed=fixed)
            for steps in every(*((2, 3, 4) if k > 1 else (1,) for k in kernel))]
    if kernel[-1] > 1 < max(kernel[:-1], default=1):
        ways += [replace(way, steps=(*way.steps[:-1], 1), tiles=(*way.tiles[:-1], phase[-1]),
                         taps=3) for way in ways if way.steps[-1] == 2]
    best = min((way for way in ways if way.frequencies * way.taps * channels * filters <= WHOLE),
               key=lambda way: way.cost, default=None)
    other = direct(kernel, images, filters, positions, dilation)
    return best if best and best.cost < other else None


def transformed(w: Array, steps: tuple[int, ...], width: int) -> Array:
    """G w, (*K, C, F) -> (frequencies, F / width, C, width): the filters in slabs.

    So in memory whatever the order of w: products with a transposed view take 20 % longer."""
    *kernel, channels, filters = w.shape
    matrices = [FILTERS[m][2] for m in steps]
    factors = np.empty((prod(map(len, matrices)), filters // width, channels, width), w.dtype)

    def compute(item: tuple[int, slice]) -> None:
        i, part = item
        here = np.ascontiguousarray(w[..., part, i * width : (i + 1) * width])
        transform(matrices, here.reshape(1, *kernel, -1),
                  out=factors[:, i, part].reshape(len(factors), 1, -1))

    parallel.run(compute, list(every(range(factors.shape[1]), portions(factors[:, 0]))))
    return factors


def portions(factors: Array) -> list[slice]:
    """The channels of (frequencies, C, F), some at a time: about BLOCK numbers."""
    frequencies, channels, filters = factors.shape
    return parallel.parts(channels, max(1, BLOCK // (frequencies * filters)))


def product(way: Tiling, x: Array, w: Array, out: Array, before, finish: Finish) -> None:
    """Write correlate(x, w), stride one, padded with zeros, finished, to `out` (N, *P, C_out)."""
    channels, filters = way.taps * way.channels, way.filters
    width = SLAB if filters % SLAB == 0 and 48 * channels * SLAB <= SMALL else filters
    factors = kept(w, (way.steps, width), lambda w: transformed(
        w.reshape(*w.shape[:-3], -1, channels, filters), way.steps, width))

    def compute(boxes: list[Box]) -> None:
        places = together(boxes)
        tiles = places[-1].stop
        seen = np.empty((len(factors), tiles, channels), x.dtype)
        answers = np.empty((len(factors), tiles, filters), x.dtype)
        rows = next((n for n in range(tiles, 23, -1)
                     if tiles % n == 0 and n * channels * width <= SMALL), tiles)
        left = seen.reshape(len(factors), 1, -1, rows, channels)
        parts = answers.reshape(len(factors), -1, rows, filters // width, width)
        parts = parts.transpose(0, 3, 1, 2, 4)
        every_box = range(len(boxes))
        parallel.run(lambda i: way.spectrum(x, boxes[i], before, seen[:, places[i]]), every_box)
        parallel.run(lambda f: np.matmul(left[f], factors[f, :, None], out=parts[f]),
                     parallel.parts(len(factors)))
        parallel.run(lambda i: way.write(answers[:, places[i]], boxes[i], out, finish), every_box)

    parallel.run(compute, way.groups())


def together(boxes: list[Box]) -> list[slice]:
    """Where the tiles of each box stand among those of all."""
    ends = np.cumsum([prod(s.stop - s.start for s in box) for box in boxes]).tolist()
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def weights(way: Tiling, x: Array, y: Array, before) -> Array:
    """The gradient of correlate(x, w) in w, stride one, zero padding: (*K, C_in, C_out)."""
    channels, filters = way.taps * way.channels, way.filters
    output, matrices = ([FILTERS[m][i].T for m in way.steps] for i in (0, 2))
    sums = np.empty((way.frequencies, channels, filters), x.dtype)
    boxes = [box for group in way.groups() for box in group]
    size = together(boxes)[0].stop * way.frequencies * (channels + filters)
    number = max(1, WHOLE // size)
    for start in range(0, len(boxes), number):
        group = boxes[start : start + number]
        places = together(group)
        left = np.empty((len(sums), places[-1].stop, channels), x.dtype)
        right = np.empty((len(sums), places[-1].stop, filters), x.dtype)

        def compute(i, group=group, places=places, left=left, right=right) -> None:
            way.spectrum(x, group[i], before, left[:, places[i]])
            transform(output, way.region(y, group[i], (0,) * len(output), 0), way.steps,
                      right[:, places[i]])

        def multiply(f: slice, first=start == 0, left=left, right=right) -> None:
            if first:
                np.matmul(left[f].swapaxes(1, 2), right[f], out=sums[f])
            else:
                sums[f] += np.matmul(left[f].swapaxes(1, 2), right[f])

        parallel.run(compute, range(len(group)))
        parallel.run(multiply, parallel.parts(len(sums)))

    dw = np.empty((*map(len, matrices), channels, filters), x.dtype)

    def back(part: slice) -> None:
        dw[..., part, :] = transform(matrices, np.ascontiguousarray(sums[:, part]).reshape(
            1, *map(len, output), -1)).reshape(dw[..., part, :].shape)

    parallel.run(back, portions(sums))
    return dw.reshape(*dw.shape[:-3], -1, way.channels, filters)
