"""Columns, im2col for some taps at a time: what the positions of a block see of a NumPy array.

The taps are taken in groups: as many trailing axes of the kernel as make columns of at most WIDTH
numbers, so that a product is long enough whatever the channels. Along the other axes a group is
applied only to the positions from which it sees the grid: far taps of a dilated kernel on a small
grid stand in the padding for most positions, and that product is never computed (at dilation 4 on
an 8 x 12 x 12 grid, 60 % of all).

Of few channels, as in the stem of a network, gathering takes as long as half the product. There
the columns of a plane are gathered once for all positions along the first axis that see it: those
of one position are a stretch of the memory that the next one's overlap.
"""

from __future__ import annotations

from itertools import product as every
from math import ceil, prod

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .. import parallel
from ..backend import Array
from . import reference
from .geometry import Box, blocks

WIDTH = 640  # numbers in a row of columns, at most
BLOCK = 1 << 19  # numbers in the columns of a block: 2 MiB
ROWS = 192  # outputs of a block, at least
FEW = 3  # channels: columns of fewer are gathered one after another
DEEP = 8  # positions along the first axis that share the columns of their planes


def shape(box: Box) -> list[int]:
    """How many positions a box has along each axis."""
    return [b.stop - b.start for b in box]


def volume(box: Box) -> int:
    """How many positions a box holds."""
    return prod(shape(box))


def even(number: int, positions: tuple[int, ...]) -> int:
    """Of boxes of so many positions, as many for each thread, unless they hold few."""
    threads = parallel.threads()
    return ceil(number / threads) * threads if prod(positions) >= 128 * threads else number


def boxes(positions: tuple[int, ...], width: int) -> list[Box]:
    """The positions in boxes whose columns fill BLOCK numbers, as many for each thread."""
    number = even(ceil(prod(positions) / max(ROWS, BLOCK // width)), positions)
    return list(blocks(positions, parallel.share(positions, number)))


class Columns:
    """Partial im2col matrices of x, one for each group of taps: `groups` lists (index of the group
    among the kernel's leading axes, the box of outputs that it affects), fullest first."""

    def __init__(self, x: Array, kernel, positions, stride, dilation, before):
        batch, *size, channels = x.shape
        axes = len(kernel)
        lead = next(m for m in range(axes + 1)
                    if m == axes or prod(kernel[m:]) * channels <= WIDTH)
        geometry = list(zip(size, kernel, positions, stride, dilation, before, strict=True))
        self.width = prod(kernel[lead:]) * channels
        self.lead, self.steps = lead, [(s, d, b) for *_, s, d, b in geometry[:lead]]

        # Trailing axes are padded and seen through overlapping windows, without a copy.
        padding = [(b, max(0, (p - 1) * s + (k - 1) * d + 1 - b - n))
                   for n, k, p, s, d, b in geometry[lead:]]
        grown = [(0, 0)] * (1 + lead) + [(max(b, 0), a) for b, a in padding]
        x = reference.pad(x, grown, [False] * len(grown))
        x = x[(slice(None),) * (1 + lead) + tuple(slice(max(-b, 0), None) for b, _ in padding)]

        def windows(first: int) -> Array:  # over the axes from the first on
            steps = list(zip(x.strides[1 + first : -1], geometry[first:], strict=True))
            return as_strided(
                x, (*x.shape[: 1 + first], *positions[first:], *kernel[first:], channels),
                (*x.strides[: 1 + first], *(one * g[3] for one, g in steps),
                 *(one * g[4] for one, g in steps), x.strides[-1]), writeable=False)

        self.windows = windows(lead)
        # What the positions of a plane see, where those along the first axis share their planes.
        deep = axes > 2 and lead == 0 and channels < FEW
        self.planes = windows(1) if deep and dilation[0] == 1 and stride[0] < kernel[0] else None
        self.taps, self.stride, self.positions = kernel[0], stride[0], (batch, *positions)

        self.groups = []
        for head in every(*map(range, kernel[:lead])):
            seen = [slice(max(0, ceil((b - i * d) / s)), min(p, (n - 1 + b - i * d) // s + 1))
                    for i, (n, _, p, s, d, b) in zip(head, geometry, strict=False)]
            if all(r.start < r.stop for r in seen):
                self.groups.append((head, (slice(0, batch), *seen,
                                           *(slice(0, p) for p in positions[lead:]))))
        self.groups.sort(key=lambda group: -volume(group[1]))

    def boxes(self, filters: int) -> list[Box]:
        """The positions in boxes, for `terms` of so many filters: as `boxes`, or DEEP along the
        first axis."""
        if self.planes is None:
            return boxes(self.positions, max(self.width, filters))
        batch, first, *others = self.positions
        thick = [(slice(i, i + 1), part) for i in range(batch)
                 for part in parallel.parts(first, DEEP)]
        depth, plane = min(first, DEEP), self.width // self.taps
        numbers = max(((depth - 1) * self.stride + self.taps) * plane, depth * filters)
        number = even(len(thick) * ceil(prod(others) * numbers / BLOCK), self.positions)
        rows = parallel.share(tuple(others), ceil(number / len(thick)))
        return [(*some, *box) for some in thick for box in blocks(tuple(others), rows)]

    def terms(self, head: tuple[int, ...], box: Box, memory: Array) -> Array:
        """What the group `head` sees from the positions of `box`, (..., rows, width): the left
        factor of as many products as there are leading axes."""
        if self.planes is None:
            return self.gather(head, box, memory)
        images, first, *others = box
        reach = slice(first.start * self.stride, (first.stop - 1) * self.stride + self.taps)
        seen = self.planes[(images, reach, *others)]
        memory = self._columnwise(seen, len(box), 2, memory)
        rows, plane = volume(tuple(others)), seen[0, 0].nbytes
        return as_strided(
            memory, (len(seen), first.stop - first.start, rows, self.width),
            (seen.shape[1] * plane, self.stride * plane, seen.itemsize, rows * seen.itemsize))

    def gather(self, head: tuple[int, ...], box: Box, memory: Array) -> Array:
        """What the group `head` sees from the positions of `box`, (rows, width): in `memory`
        unless it is a run of x as it stands. Of few channels it lies there column after column,
        because positions are longer runs to copy than taps then."""
        points = [slice(r.start * s + i * d - b, (r.stop - 1) * s + i * d - b + 1, s)
                  for r, i, (s, d, b) in zip(box[1:], head, self.steps, strict=False)]
        seen = self.windows[(box[0], *points, *box[1 + self.lead :])]
        if seen.flags.c_contiguous:
            return seen.reshape(-1, self.width)
        if seen.shape[-1] < FEW:
            return self._columnwise(seen, len(box), 0, memory).reshape(self.width, -1).T
        memory[: seen.size].reshape(seen.shape)[...] = seen
        return memory[: seen.size].reshape(-1, self.width)

    @staticmethod
    def _columnwise(seen: Array, axes: int, place: int, memory: Array) -> Array:
        """Copies to memory what positions (that many axes) see, the taps before the axis `place`
        of theirs; returns that memory."""
        seen = np.moveaxis(seen, range(axes, seen.ndim), range(place, place + seen.ndim - axes))
        memory = memory[: seen.size]
        memory.reshape(seen.shape)[...] = seen
        return memory
