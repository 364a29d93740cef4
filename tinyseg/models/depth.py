"""What the windows of a network do along depth, beside what they do in the plane.

A network works in five stages, at strides 2, 4, 8, 16 and 32 in the plane: the stem; pooling and
layer1; layers 2, 3 and 4. Each begins with a halving, unless a trunk keeps its resolution there.
Where slices are thick, depth may be halved later than the plane, and kernels be flat at first.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from ..nn import Conv, MaxPool
from ..windows import Window
from .structures import STRUCTURES

STAGES = 5
WIDE = 3  # slots, where they are as many as in the plane, of a kernel of one tap there


def positive(n: Any) -> bool:
    """Whether n is a whole number from 1."""
    return isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= 1


def expect_positive(**numbers: Any) -> None:
    """ValueError, by name, unless each is a whole number from 1."""
    for name, number in numbers.items():
        if not positive(number):
            raise ValueError(f"{name} is {number!r}; expected a positive int")


def plain(n: Any) -> Any:
    """NumPy's integers as Python's, and a list, as JSON has it, as a tuple."""
    if isinstance(n, list | tuple):
        return tuple(map(plain, n))
    return int(n) if isinstance(n, np.integer) else n


@dataclass(frozen=True)
class Depth:
    """What windows do along depth, given what they do in the plane.

    depth: slots of every kernel larger than one: "plane" (as many as in the plane), an int,
    (stem, rest), or five: (stem, layer1, layer2, layer3, layer4). A decoder's kernels take those of
    the stage whose resolution they have; at the stem's and at full size at most layer1's.
    depth_stride: "plane", 1, or one number, 1 or 2, for each halving in the plane: (stem, pool,
    layer2, layer3, layer4), of which a trunk of output stride 16 has four and one of 8 three.
    depth_dilation: "plane" or 1. depth_padding: "zero" or "edge". pool_depth: slots of max-pooling;
    None: as in the plane where pooling halves depth, else 1. structure: a name in STRUCTURES, what
    a convolution of more than one slot is.

    Padding keeps the depth (divided by the stride, rounded up): the window's slot T // 2 stands
    on the position itself.

    >>> plane = ts.windows.Window.of((3, 3), stride=2, padding=1)
    >>> window = ts.models.Depth(depth=5, depth_stride=1).conv(plane, stem=False)
    >>> window.kernel, window.stride, window.padding
    ((5, 3, 3), (1, 2, 2), ((2, 2), (1, 1), (1, 1)))
    """

    depth: Any = "plane"
    depth_stride: Any = "plane"
    depth_dilation: Any = "plane"
    depth_padding: str = "zero"
    pool_depth: int | None = None
    structure: str = "full"

    def __post_init__(self):
        for name, value in vars(self).items():
            object.__setattr__(self, name, plain(value))
        if self.pool_depth is not None and not positive(self.pool_depth):
            raise ValueError(f"pool_depth is {self.pool_depth!r}; expected a positive int or None")
        stride, per_stage = self.depth_stride, isinstance(self.depth_stride, tuple)
        if not (stride == "plane" or _one(stride) or per_stage and 3 <= len(stride) <= STAGES
                and all(positive(n) and n <= 2 for n in stride)):
            raise ValueError(f'depth_stride is {stride!r}; expected "plane", 1, or 1 or 2 for each '
                             "halving: stem, pool, layer2, layer3, layer4")
        if self.depth_dilation != "plane" and not _one(self.depth_dilation):
            raise ValueError(f'depth_dilation is {self.depth_dilation!r}; expected "plane" or 1')
        if self.depth_padding not in ("zero", "edge"):
            raise ValueError(f'depth_padding is {self.depth_padding!r}; expected "zero" or "edge"')
        if self.structure not in STRUCTURES:
            raise ValueError(f"structure is {self.structure!r}; expected one of "
                             f"{', '.join(STRUCTURES)}")
        slots = self._slots()
        if len(slots) not in (2, STAGES) or not all(t == "plane" or positive(t) for t in slots):
            raise ValueError(f'depth is {self.depth!r}; expected "plane", a positive int, one for '
                             "the stem and one for the rest, or five: stem, layer1, layer2, "
                             "layer3, layer4")

    def check(self, halving: Collection[int | None]) -> None:
        """Raise ValueError where depth_stride has not a number for each of these stages, which
        halve the plane; None: for layers that are in none."""
        if not isinstance(self.depth_stride, tuple):
            return
        if None in halving:
            self._of(self.depth_stride, None, "depth_stride")
        if len(self.depth_stride) != len(halving):
            raise ValueError(f"depth_stride is {self.depth_stride}; expected {len(halving)} "
                             "numbers, one for each time that the network halves the plane")

    def _slots(self) -> tuple:
        return self.depth if isinstance(self.depth, tuple) else (self.depth, self.depth)

    def _of(self, numbers: tuple, stage: int | None, name: str) -> Any:
        if stage is None:
            raise ValueError(f"{name} is {numbers}, a number for each stage of a ResNet, and the "
                             f"network has layers that are in none; give one {name} for all")
        return numbers[stage]

    def _stride(self, plane: Window, stage: int | None) -> int:
        if self.depth_stride == "plane":
            return plane.stride[0]
        if self.depth_stride == 1 or plane.stride[0] == 1:
            return 1
        return self._of(self.depth_stride, stage, "depth_stride")

    def _prepend(self, plane: Window, slots: int, stage: int | None) -> Window:
        dilation = plane.dilation[0] if self.depth_dilation == "plane" else 1
        before = slots // 2 * dilation
        return Window(
            kernel=(slots, *plane.kernel),
            stride=(self._stride(plane, stage), *plane.stride),
            padding=((before, (slots - 1) * dilation - before), *plane.padding),
            dilation=(dilation, *plane.dilation),
            edge=(self.depth_padding == "edge", *plane.edge),
        )

    def reaches(self, plane: Window, reduces: bool) -> bool:
        """Whether a kernel that has this window in the plane gets slots along depth."""
        if self.structure == "pointwise":
            return reduces
        return self.structure != "planar" and max(plane.kernel) > 1

    def conv(self, plane: Window, stem: bool, stage: int | None = None, reduces: bool = False
             ) -> Window:
        """The rank-3 window of a convolution that has the window `plane` in the plane; `stage`
        counts from 0, None: in none. reduces: see `Conv`."""
        if not self.reaches(plane, reduces):
            return self._prepend(plane, 1, stage)
        numbers = [max(plane.kernel[0], WIDE * reduces) if t == "plane" else t
                   for t in self._slots()]
        if len(numbers) == 2:
            slots = numbers[0 if stem else 1]
        else:
            slots = self._of(tuple(numbers), stage, "depth")
        if stage == 0 and not stem:  # a decoder's
            slots = min(numbers[:2])
        return self._prepend(plane, slots, stage)

    def pool(self, plane: Window, stage: int | None = None) -> Window:
        """The rank-3 window of max-pooling; its padding never wins, whatever depth_padding is."""
        slots = self.pool_depth
        if slots is None:
            halved = self.depth_stride == "plane" or self._stride(plane, stage) > 1
            slots = plane.kernel[0] if halved else 1
        window = self._prepend(plane, slots, stage)
        return Window(window.kernel, window.stride, window.padding, window.dilation,
                      (False, *plane.edge))


def _one(n: Any) -> bool:
    return positive(n) and n == 1


class Builder:
    """Makes convolutions and pools of one rank from one generator; the first wide is the stem.

    `stage` is written into what it makes: see `Depth`, which `inflate` asks again.

    >>> build = ts.models.Builder(rank=3, depth=ts.models.Depth(), seed=0)
    >>> build.conv(2, 4, 5).weight.shape
    (5, 5, 5, 2, 4)
    """

    stage: int | None = None

    def __init__(self, rank: int, depth: Depth, seed: int):
        if not positive(rank) or rank > 3:
            raise ValueError(f"rank is {rank!r}; expected 1, 2 or 3 spatial axes")
        if rank != 3 and depth != Depth():
            raise ValueError(f"the depth arguments are for rank 3; rank is {rank}")
        self.rank, self.depth, self.rng, self.stem = rank, depth, np.random.default_rng(seed), True

    def _plane(self, k, stride, dilation):
        axes = min(self.rank, 2)
        return Window.of((k,) * axes, stride, (k - 1) * dilation // 2, dilation)

    def conv(self, c_in: int, c_out: int, k: int, stride: int = 1, dilation: int = 1,
             *, reduces: bool = False, **options: Any) -> Conv:
        plane, options = self._plane(k, stride, dilation), {"bias": False, **options}
        window, along = plane, None
        if self.rank == 3:
            window = self.depth.conv(plane, self.stem, self.stage, reduces)
            along = STRUCTURES[self.depth.structure] if window.kernel[0] > 1 else None
        self.stem = self.stem and k == 1
        made = Conv(c_in, c_out, (1, *plane.kernel) if along else window.kernel,
                    **window.options, **options, rng=self.rng)
        made.window, made.stage, made.reduces = window, self.stage, reduces
        made.along = along(made) if along else None
        return made

    def pool(self, k: int, stride: int) -> MaxPool:
        window = self._plane(k, stride, 1)
        if self.rank == 3:
            window = self.depth.pool(window, self.stage)
        made = MaxPool(window.kernel, window.stride, window.padding)
        made.stage = self.stage
        return made
