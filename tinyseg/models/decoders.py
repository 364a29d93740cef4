"""The heads of segmentation networks: from the maps of a trunk to logits.

`HEADS` is the one place that says which there are and what their parts are called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

from .. import ops
from ..nn import (
    BatchNorm,
    GlobalAverage,
    GroupNorm,
    Identity,
    Module,
    ReLU,
    Sequential,
    normalised,
)
from ..tensor import Tensor
from .depth import STAGES, Builder, positive

NORMS: dict[str, Callable[[int], Module]] = {
    "batch": BatchNorm, "group": lambda channels: GroupNorm(channels, gcd(channels, 32))}


@dataclass(frozen=True)
class Head:
    """`make(build, channels, classes, **options)` returns its parts, called `names` in the network
    and in files, one after the other from the trunk's maps to logits; `last` is the name of the
    bias of the logits. `pyramid`: the first part takes the image and the maps of all stages, and
    not the last map alone."""

    make: Callable[..., tuple[Module, ...]]
    names: tuple[str, ...]
    last: str
    pyramid: bool = False


def linear_head(build: Builder, channels: tuple[int, ...], classes: int) -> tuple[Module, ...]:
    """A 1x1 convolution."""
    return (build.conv(channels[-1], classes, 1, bias=True, std=0.01),)


def fcn_head(build: Builder, channels: tuple[int, ...], classes: int) -> tuple[Module, ...]:
    """torchvision's FCNHead: 3x3 to a quarter of the channels, then 1x1; without its dropout."""
    c = channels[-1]
    return (Sequential(build.conv(c, c // 4, 3), BatchNorm(c // 4), ReLU(), Identity(),
                       build.conv(c // 4, classes, 1, bias=True)),)


def deeplabv3_head(build: Builder, channels: tuple[int, ...], classes: int) -> tuple[Module, ...]:
    """torchvision's DeepLabHead with rates 12, 24, 36 (Chen et al. 2017); without its dropout."""
    return (Sequential(Pyramid(build, channels[-1], 256, (12, 24, 36)), build.conv(256, 256, 3),
                       BatchNorm(256), ReLU(), build.conv(256, classes, 1, bias=True)),)


class Pyramid(Module):
    """Atrous spatial pyramid pooling: 1x1, three dilated 3x3 and a global average, joined.

    The global average spans depth too: a rank-3 network with this head mixes all slices.
    """

    def __init__(self, build: Builder, c_in: int, c_out: int, rates: tuple[int, ...]):
        def layers(conv):
            return conv, BatchNorm(c_out), ReLU()

        self.convs = [
            Sequential(*layers(build.conv(c_in, c_out, 1))),
            *(Sequential(*layers(build.conv(c_in, c_out, 3, 1, r))) for r in rates),
            Sequential(GlobalAverage(keepdims=True), *layers(build.conv(c_in, c_out, 1))),
        ]
        joined = len(self.convs) * c_out
        self.project = Sequential(*layers(build.conv(joined, c_out, 1)))

    def forward(self, x: Tensor) -> Tensor:
        *local, mean = [branch(x) for branch in self.convs]
        everywhere = ops.upsample(mean, x.shape[1:-1], align_corners=False)
        return self.project(ops.concatenate(*local, everywhere))


def unet_head(build: Builder, channels: tuple[int, ...], classes: int, *, decoder: Any, norm: Any
              ) -> tuple[Module, ...]:
    """The decoder of a U-Net (Ronneberger et al. 2015) and a 3x3 convolution, as
    segmentation_models_pytorch has them."""
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; expected one of {', '.join(NORMS)}")
    if not (isinstance(decoder, tuple) and 1 <= len(decoder) <= STAGES
            and all(map(positive, decoder))):
        raise ValueError(f"decoder is {decoder!r}; expected the channels of 1 to {STAGES} blocks")
    # Logits of unit variance (LeCun et al. 1998): few channels, drawn as small as those of a linear
    # head, would hardly learn.
    std = (decoder[-1] * 3**build.rank) ** -0.5
    return (Decoder(build, channels, decoder, NORMS[norm]),
            Sequential(build.conv(decoder[-1], classes, 3, bias=True, std=std)))


class Decoder(Module):
    """From the coarsest map up: each block doubles, joins the stage of that size, convolves twice.

    `channels` are those of the trunk's stages, `widths` those of the blocks; a fifth block ends at
    full size, where nothing is joined.
    """

    def __init__(self, build: Builder, channels: tuple[int, ...], widths: tuple[int, ...],
                 norm: Callable[[int], Module]):
        self.blocks, c_in = [], channels[-1]
        for i, c_out in enumerate(widths):
            skip = (*channels[-2::-1], 0)[i]
            build.stage = max(len(channels) - 2 - i, 0)
            self.blocks.append(Block(build, c_in + skip, c_out, norm))
            c_in = c_out

    def forward(self, x: Tensor, *maps: Tensor) -> Tensor:
        *skips, y = maps
        for block in self.blocks:
            y = (block(ops.double(y, skip := skips.pop(), size=skip.shape[1:-1])) if skips else
                 block(y, x.shape[1:-1]))
        return y


class Block(Module):
    """Two 3x3 convolutions, each normalised, with ReLU; the first of x doubled to `size`, if that
    is given."""

    def __init__(self, build: Builder, c_in: int, c_out: int, norm: Callable[[int], Module]):
        self.conv1 = Normalised(build.conv(c_in, c_out, 3), norm(c_out))
        self.conv2 = Normalised(build.conv(c_out, c_out, 3), norm(c_out))

    def forward(self, x: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        return self.conv2(self.conv1(x, size))


class Normalised(Sequential):
    """Convolution, normalisation, ReLU; the ReLU in the pass of a batch-norm."""

    def forward(self, x: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        conv, norm = self
        if isinstance(norm, GroupNorm):
            return ops.relu(norm(conv(x, size)))
        return normalised(conv, norm, x, relu=True, size=size)


HEADS = {
    "linear": Head(linear_head, ("fc",), "fc.bias"),
    "fcn": Head(fcn_head, ("classifier",), "classifier.4.bias"),
    "deeplabv3": Head(deeplabv3_head, ("classifier",), "classifier.4.bias"),
    "unet": Head(unet_head, ("decoder", "segmentation_head"), "segmentation_head.0.bias",
                 pyramid=True),
}
