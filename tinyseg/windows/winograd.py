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
from itertools import accumulate
from itertools import product as every
from math import ceil, prod
from typing import NamedTuple

import numpy as np

from .. import parallel
from ..backend import Array
from .geometry import Box, blocks
from .products import Finish, kept
from .transforms import FILTERS, transform, whole

BLOCK = 1 << 19  # numbers in a block's transformed tiles: 2 MiB
IMAGE, KERNEL = 40, 90  # cost of a transformed number, in products; measured on Zen 5, 2 threads
FIXED = 45  # that of one of a kernel that is transformed already: it is read, and takes memory
SHORT = 48  # channels: rows of fewer cost more
GATHER = 20  # cost of copying a column, in products
SLAB = 64  # filters that lie together in a transformed kernel: products of slabs, small enough for
SMALL = 10**6  # OpenBLAS to take them as they lie, run at its AVX-512 kernels' full speed
WHOLE = 10 << 20  # numbers in a transformed kernel, or tiles of a weight gradient at a time: 40 MiB


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

    @property
    def ones(self) -> int:
        """Which frequency belongs to the point 1 of each axis that is transformed."""
        return reduce(lambda f, s: f * (s + 2) + 1, (s for s in self.steps if s > 1), 0)

    def groups(self, threads: int, numbers: int) -> list[list[Box]]:
        """The tiles in batches whose products are taken together: of about so many elements, or
        more where the products would have fewer rows than a quarter of the channels; as many
        batches for each thread. Where all is less than one such, threads share it, a box each."""
        grid = (len(self.phases) * self.images, *self.tiles)
        widest = max(self.taps * self.channels, self.filters)
        limit = max(numbers / (self.frequencies * widest), widest / 4)
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

    def region(self, box: Box, grid: tuple[int, ...], before, margin: int) -> Region:
        """What the windows of a box see of a grid. Window p of a phase stands on point p - before;
        the margin is what a last tile sees more."""
        images, *tiles = box
        start = [t.start * s for t, s in zip(tiles, self.steps, strict=True)]
        reach = [(t.stop - t.start) * s + margin * (s > 1)
                 for t, s in zip(tiles, self.steps, strict=True)]
        reach[-1] += margin * (self.taps > 1)
        pairs, padded = [], False
        for phase, here, batch in self.pieces(images):
            source, target = [batch], [here]
            for a, d, b, n, p, r in zip(phase, self.apart, before, grid, start, reach, strict=True):
                first, offset = (a - b) % d, (a - b) // d + p  # j sees point first + (j + offset) d
                low = max(0, -offset)
                high = max(low, min(r, ceil((n - first) / d) - offset))
                begin = first + (low + offset) * d
                source.append(slice(begin, max(begin, begin + (high - low - 1) * d + 1), d))
                target.append(slice(low, high))
                padded |= (low, high) != (0, r)
            pairs.append((tuple(source), tuple(target)))
        return Region((images.stop - images.start, *reach), pairs, padded)

    def spectrum(self, x: Array, part: Part, out: Array) -> None:
        """Bᵀ x of a part to `out` (frequencies, tiles, taps C)."""
        seen, matrices = part.seen.read(x), [FILTERS[m][1] for m in self.steps]
        if self.taps == 1:
            transform(matrices, seen, self.steps, out)
            return
        length, lines = seen.shape[-2], transform(matrices, seen, self.steps)
        point = lines[0, 0].nbytes
        out = whole(out).reshape(len(out), -1, length - 2)  # runs of three points overlap
        out[...] = np.ndarray(out.shape, out.dtype, lines, 0, [
            lines[0].nbytes, length * point, point])

    def write(self, answers: Array, part: Part, out: Array, finish: Finish) -> None:
        """Aᵀ of a part's products (frequencies, tiles, F), finished, to its windows in `out`."""
        if finish.bias is not None:  # the powers of 1 are ones: it is added to each output
            answers[self.ones] += finish.bias
            finish = finish._replace(bias=None)
        values = transform([FILTERS[m][0] for m in self.steps], answers.reshape(
            1, *(s + 2 if s > 1 else 1 for s in self.steps), -1))
        values = whole(values.reshape(-1, out.shape[-1])).reshape(part.shape).transpose(part.order)
        values = values.reshape(part.own.shape)
        numbers = values.view(np.dtype((out.dtype, out.shape[-1])))
        for where, here in part.own.pairs:
            if finish.plain:
                whole(out[where])[...] = values[here]
            else:
                finish(numbers[here], out[where], where)


class Region(NamedTuple):
    """Points of a grid (N, *S): its shape, pairs (index of the grid, index of the region), and
    whether zeros lie around."""

    shape: tuple[int, ...]
    pairs: list[tuple[tuple[slice, ...], tuple[slice, ...]]]
    padded: bool

    def read(self, x: Array) -> Array:
        """What it has of x (N, *S, C)."""
        out = (np.zeros if self.padded else np.empty)((*self.shape, x.shape[-1]), x.dtype)
        for there, here in self.pairs:
            out[here] = x[there]
        return out


class Part(NamedTuple):
    """A box of tiles: how many, what they see of x, where their outputs stand, and how these come
    out of a transform: in this shape, to be taken in this order of axes."""

    tiles: int
    seen: Region
    own: Region
    shape: tuple[int, ...]
    order: tuple[int, ...]


@lru_cache(128)
def placed(way: Tiling, grid: tuple[int, ...], positions: tuple[int, ...], before: tuple[int, ...],
          threads: int, numbers: int) -> list[list[Part]]:
    """The groups of a tiling, see there, with all that is known before there are numbers."""
    axes = len(grid)
    turned = way.steps[-1] > 1 < axes  # see transform: the tiles of the last axis come first
    places = [*range(axes + 1, 2 * axes + 1), axes] if turned else [*range(axes, 2 * axes + 1)]
    order = (places[0], *(i for axis in range(axes) for i in (places[axis + 1], axis)))

    def part(box: Box) -> Part:
        count = [s.stop - s.start for s in box]
        return Part(prod(count), way.region(box, grid, before, 2),
                    way.region(box, positions, (0,) * axes, 0),
                    (*way.steps, *(count[-1:] + count[:-1] if turned else count)), order)

    return [[part(box) for box in boxes] for boxes in way.groups(threads, numbers)]


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

    def compute(group: list[Part]) -> None:
        places = together(group)
        tiles = places[-1].stop
        seen = np.empty((len(factors), tiles, channels), x.dtype)
        answers = np.empty((len(factors), tiles, filters), x.dtype)
        rows = next((n for n in range(tiles, 23, -1)
                     if tiles % n == 0 and n * channels * width <= SMALL), tiles)
        left = seen.reshape(len(factors), 1, -1, rows, channels)
        into = answers.reshape(len(factors), -1, rows, filters // width, width)
        into = into.transpose(0, 3, 1, 2, 4)
        each = range(len(group))
        parallel.run(lambda i: way.spectrum(x, group[i], seen[:, places[i]]), each)
        parallel.run(lambda f: np.matmul(left[f], factors[f, :, None], out=into[f]),
                     parallel.parts(len(factors)))
        parallel.run(lambda i: way.write(answers[:, places[i]], group[i], out, finish), each)

    parallel.run(compute, placed(way, x.shape[1:-1], out.shape[1:-1], before, parallel.threads(),
                                 BLOCK))


def together(group: list[Part]) -> list[slice]:
    """Where the tiles of each part stand among those of all."""
    ends = list(accumulate(part.tiles for part in group))
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def weights(way: Tiling, x: Array, y: Array, before) -> Array:
    """The gradient of correlate(x, w) in w, stride one, zero padding: (*K, C_in, C_out)."""
    channels, filters = way.taps * way.channels, way.filters
    output, matrices = ([FILTERS[m][i].T for m in way.steps] for i in (0, 2))
    sums = np.empty((way.frequencies, channels, filters), x.dtype)
    parts = [part for group in placed(way, x.shape[1:-1], y.shape[1:-1], before,
                                      parallel.threads(), BLOCK) for part in group]
    number = max(1, WHOLE // (parts[0].tiles * way.frequencies * (channels + filters)))
    for start in range(0, len(parts), number):
        group = parts[start : start + number]
        places = together(group)
        left = np.empty((len(sums), places[-1].stop, channels), x.dtype)
        right = np.empty((len(sums), places[-1].stop, filters), x.dtype)

        def compute(i, group=group, places=places, left=left, right=right) -> None:
            way.spectrum(x, group[i], left[:, places[i]])
            transform(output, group[i].own.read(y), way.steps, right[:, places[i]])

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
