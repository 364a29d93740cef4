"""How a window walks over a grid, and what it meets at the border. Integers and slices only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil, prod

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Window:
    """A window over `rank` spatial axes; every field has one entry per axis.

    kernel: how many taps. stride: steps between windows. dilation: steps between taps.
    padding: (before, after), how far the grid is extended. edge: whether the extension repeats
    the border (True) or is filled with zeros (False).

    Tap k of window p stands on grid point `p * stride + k * dilation - before`.

    >>> window = ts.windows.Window.of((3, 5), stride=2, padding=((1, 0), 2))
    >>> window.padding, window.positions((8, 11))
    (((1, 0), (2, 2)), (4, 6))
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    edge: tuple[bool, ...]

    @staticmethod
    def of(kernel, stride=1, padding=0, dilation=1, padding_mode="zero") -> Window:
        """A checked window: a number or a name stands for all axes; padding entries are an int
        or (before, after). Raises ValueError naming the argument."""
        rank = len(kernel)

        def per_axis(name, value, check):
            values = value if isinstance(value, tuple) else (value,) * rank
            if len(values) != rank or not all(map(check, values)):
                raise ValueError(f"{name} is {value!r}; a kernel over {rank} axes needs {rank} "
                                 f"{'names' if name == 'padding_mode' else 'integers'}, "
                                 f"{'zero or edge' if name == 'padding_mode' else 'in range'}")
            return values

        def positive(n):
            return isinstance(n, int) and n >= 1

        def extent(p):
            return all(isinstance(n, int) and n >= 0 for n in ends(p)) and len(ends(p)) == 2

        def ends(p):
            return p if isinstance(p, tuple) else (p, p)

        modes = per_axis("padding_mode", padding_mode, ("zero", "edge").__contains__)
        return Window(
            kernel=per_axis("kernel", kernel, positive),
            stride=per_axis("stride", stride, positive),
            padding=tuple(map(ends, per_axis("padding", padding, extent))),
            dilation=per_axis("dilation", dilation, positive),
            edge=tuple(mode == "edge" for mode in modes),
        )

    @property
    def options(self) -> dict:
        """The keyword options of `of`, and of a convolution: all but the kernel."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation,
                "padding_mode": tuple("edge" if e else "zero" for e in self.edge)}

    @property
    def span(self) -> tuple[int, ...]:
        """How many grid points a window reaches over, first tap to last, per axis."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    def positions(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """How many windows fit per axis: floor((size + before + after - span) / stride) + 1."""
        if len(size) != len(self.kernel):
            raise ValueError(f"the grid {size} has {len(size)} spatial axes, the kernel "
                             f"{self.kernel} has {len(self.kernel)}")
        counts = tuple(
            (n + sum(p) - span) // s + 1
            for n, p, span, s in zip(size, self.padding, self.span, self.stride, strict=True)
        )
        if min(counts) < 1 or min(size) < 1:
            raise ValueError(f"no window fits: grid {size} with padding {self.padding} is empty or "
                             f"smaller than the span {self.span} of kernel {self.kernel} at "
                             f"dilation {self.dilation}")
        return counts

    def over_batch(self) -> Window:
        """The same window with the batch as a first axis, along which it is a single point."""
        return Window((1, *self.kernel), (1, *self.stride), ((0, 0), *self.padding),
                      (1, *self.dilation), (False, *self.edge))

    def taps(self, count: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Box]]:
        """Each tap k with the points that it visits in the region under `count` windows."""
        for k in product(*map(range, self.kernel)):
            yield k, tuple(
                slice(i * d, i * d + (n - 1) * s + 1, s)
                for i, d, n, s in zip(k, self.dilation, count, self.stride, strict=True)
            )

    def region(self, block: Box, size: tuple[int, ...]) -> tuple[Box, tuple[tuple[int, int], ...]]:
        """The receptive field of a block of outputs, and how far it stands over the grid."""
        inside, missing = [], []
        for b, n, s, (before, _), span, edge in zip(
            block, size, self.stride, self.padding, self.span, self.edge, strict=True
        ):
            low, high = b.start * s - before, (b.stop - 1) * s + span - before
            reach = int(edge)  # a window wholly outside still sees the border point if it repeats
            start, stop = min(max(low, 0), n - reach), max(min(high, n), reach)
            start = min(start, stop)
            outside = (high - low) - (stop - start)
            front = min(max(start - low, 0), outside)
            inside.append(slice(start, stop))
            missing.append((front, outside - front))
        return tuple(inside), tuple(missing)


def blocks(grid: tuple[int, ...], limit: int) -> Iterator[Box]:
    """Cut a grid into boxes of at most `limit` points (at least one), in memory order.

    All leading axes of a box have length one and all trailing axes are whole, so that a box of a
    C-ordered array is one contiguous run.
    """
    if not grid:
        yield ()
        return
    first, *rest = grid
    whole = tuple(slice(0, n) for n in rest)
    rows = limit // max(1, prod(rest))
    if rows:
        rows = ceil(first / ceil(first / rows))  # as even as they come
        for start in range(0, first, rows):
            yield slice(start, min(start + rows, first)), *whole
    else:
        for start in range(first):
            for box in blocks(tuple(rest), limit):
                yield slice(start, start + 1), *box
