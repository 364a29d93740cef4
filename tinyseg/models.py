"""Residual networks that classify and segment, at any rank (He et al. 2016; Pakhomov et al. 2017).

Rank 2 is the network of images, rank 3 that of volumes; the code is the same. What a rank-3
window does along depth is one `Depth` value, which `inflate` uses too. State names are
torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any

import numpy as np

from . import ops
from .nn import BatchNorm, Conv, GlobalAverage, Identity, Linear, MaxPool, Module, ReLU, Sequential
from .tensor import Tensor
from .windows import Window

BACKBONES = {  # blocks per layer; bottleneck blocks have three convolutions and 4x the channels
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}
STRIDES = {8: ((1, 2, 1, 1), (1, 1, 2, 4)),  # output stride: strides and dilations of layers 1-4
           16: ((1, 2, 2, 1), (1, 1, 1, 2)),
           32: ((1, 2, 2, 2), (1, 1, 1, 1))}


def _positive(n: Any) -> bool:
    return isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= 1


def _plain(n: Any) -> Any:
    """NumPy's integers as Python's, and a list, as JSON has it, as a tuple."""
    if isinstance(n, list | tuple):
        return tuple(map(_plain, n))
    return int(n) if isinstance(n, np.integer) else n


@dataclass(frozen=True)
class Depth:
    """What windows do along depth, given what they do in the plane.

    depth: slots of every kernel larger than one: "plane" (as many as in the plane), an int, or
    (stem, rest). depth_stride, depth_dilation: "plane" or 1. depth_padding: "zero" or "edge".
    pool_depth: slots of max-pooling; None: as in the plane, or 1 at depth stride 1.

    Padding keeps the depth (divided by the stride, rounded up): the window's slot T // 2 stands
    on the position itself.
    """

    depth: Any = "plane"
    depth_stride: Any = "plane"
    depth_dilation: Any = "plane"
    depth_padding: str = "zero"
    pool_depth: int | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            object.__setattr__(self, name, _plain(value))
        if self.pool_depth is not None and not _positive(self.pool_depth):
            raise ValueError(f"pool_depth is {self.pool_depth!r}; expected a positive int or None")
        for name in ("depth_stride", "depth_dilation"):
            value = getattr(self, name)
            if value != "plane" and not (_positive(value) and value == 1):
                raise ValueError(f'{name} is {value!r}; expected "plane" or 1')
        if self.depth_padding not in ("zero", "edge"):
            raise ValueError(f'depth_padding is {self.depth_padding!r}; expected "zero" or "edge"')
        pair = self._pair()
        if len(pair) != 2 or not all(t == "plane" or _positive(t) for t in pair):
            raise ValueError(f'depth is {self.depth!r}; expected "plane", a positive int, or one '
                             "for the stem and one for the rest")

    def _pair(self) -> tuple:
        return self.depth if isinstance(self.depth, tuple) else (self.depth, self.depth)

    def _prepend(self, plane: Window, slots: int) -> Window:
        stride = plane.stride[0] if self.depth_stride == "plane" else 1
        dilation = plane.dilation[0] if self.depth_dilation == "plane" else 1
        before = slots // 2 * dilation
        return Window(
            kernel=(slots, *plane.kernel),
            stride=(stride, *plane.stride),
            padding=((before, (slots - 1) * dilation - before), *plane.padding),
            dilation=(dilation, *plane.dilation),
            edge=(self.depth_padding == "edge", *plane.edge),
        )

    def conv(self, plane: Window, stem: bool) -> Window:
        """The rank-3 window of a convolution that has the window `plane` in the plane."""
        if max(plane.kernel) == 1:
            return self._prepend(plane, 1)
        slots = self._pair()[0 if stem else 1]
        return self._prepend(plane, plane.kernel[0] if slots == "plane" else slots)

    def pool(self, plane: Window) -> Window:
        """The rank-3 window of max-pooling; its padding never wins, whatever depth_padding is."""
        slots = self.pool_depth
        if slots is None:
            slots = plane.kernel[0] if self.depth_stride == "plane" else 1
        window = self._prepend(plane, slots)
        return Window(window.kernel, window.stride, window.padding, window.dilation,
                      (False, *plane.edge))


class Builder:
    """Makes convolutions and pools of one rank from one generator; the first wide is the stem."""

    def __init__(self, rank: int, depth: Depth, seed: int):
        if not _positive(rank) or rank > 3:
            raise ValueError(f"rank is {rank!r}; expected 1, 2 or 3 spatial axes")
        if rank != 3 and depth != Depth():
            raise ValueError(f"the depth arguments are for rank 3; rank is {rank}")
        self.rank, self.depth, self.rng, self.stem = rank, depth, np.random.default_rng(seed), True

    def _plane(self, k, stride, dilation):
        axes = min(self.rank, 2)
        return Window.of((k,) * axes, stride, (k - 1) * dilation // 2, dilation)

    def conv(self, c_in: int, c_out: int, k: int, stride: int = 1, dilation: int = 1,
             **options: Any) -> Conv:
        window = self._plane(k, stride, dilation)
        if self.rank == 3:
            window = self.depth.conv(window, self.stem)
        self.stem = self.stem and k == 1
        options = {"bias": False, **options}
        return Conv(c_in, c_out, window.kernel, **window.options, **options, rng=self.rng)

    def pool(self, k: int, stride: int) -> MaxPool:
        window = self._plane(k, stride, 1)
        if self.rank == 3:
            window = self.depth.pool(window)
        return MaxPool(window.kernel, window.stride, window.padding)


class Residual(Module):
    """relu(shortcut(x) + F(x)), F alternating convolution and batch-norm with ReLU between.

    Basic: two 3x3 convolutions of `width` channels; bottleneck: 1x1, 3x3, 1x1 with 4 `width`
    channels out, the stride in the 3x3. The shortcut is a strided 1x1 convolution with
    batch-norm where the shape changes, x otherwise.
    """

    def __init__(self, build: Builder, c_in: int, width: int, stride: int, dilation: int,
                 bottleneck: bool):
        if bottleneck:
            convs = [build.conv(c_in, width, 1), build.conv(width, width, 3, stride, dilation),
                     build.conv(width, 4 * width, 1)]
        else:
            convs = [build.conv(c_in, width, 3, stride, dilation),
                     build.conv(width, width, 3, 1, dilation)]
        for i, conv in enumerate(convs, start=1):
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", BatchNorm(conv.weight.shape[-1]))
        self.layers = len(convs)
        self.c_out = convs[-1].weight.shape[-1]
        self.downsample = None
        if stride != 1 or c_in != self.c_out:
            self.downsample = Sequential(build.conv(c_in, self.c_out, 1, stride),
                                         BatchNorm(self.c_out))

    def forward(self, x: Tensor) -> Tensor:
        y, shortcut = x, x if self.downsample is None else self.downsample(x)
        for i in range(1, self.layers + 1):
            y = getattr(self, f"conv{i}")(y)
            y = getattr(self, f"bn{i}")(y, shortcut if i == self.layers else None, relu=True)
        return y


class ResNet(Module):
    """The residual trunk: (N, *S, in_channels) -> (N, *ceil(S / output_stride), channels)."""

    def __init__(self, build: Builder, backbone: str, in_channels: int, output_stride: int,
                 dilate_first_block: bool):
        if backbone not in BACKBONES:
            raise ValueError(f"backbone is {backbone!r}; expected one of {', '.join(BACKBONES)}")
        if output_stride not in STRIDES:
            raise ValueError(f"output_stride is {output_stride!r}; expected 8, 16 or 32")
        if not _positive(in_channels):
            raise ValueError(f"in_channels is {in_channels!r}; expected a positive int")
        blocks, bottleneck = BACKBONES[backbone]
        self.conv1 = build.conv(in_channels, 64, 7, 2)
        self.bn1 = BatchNorm(64)
        self.maxpool = build.pool(3, 2)
        channels, before = 64, 1
        for i, (count, stride, dilation) in enumerate(
            zip(blocks, *STRIDES[output_stride], strict=True)
        ):
            layer = []
            for b in range(count):
                first = dilation if b or dilate_first_block else before
                layer.append(Residual(build, channels, 64 << i, stride if b == 0 else 1, first,
                                      bottleneck))
                channels = layer[-1].c_out
            setattr(self, f"layer{i + 1}", Sequential(*layer))
            before = dilation
        self.channels = channels

    def features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x), relu=True))
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return x


def _check_classes(classes: Any) -> None:
    if not _positive(classes):
        raise ValueError(f"classes is {classes!r}; expected a positive int")


class Classifier(ResNet):
    """Trunk, global average, `fc`: (N, *S, in_channels) -> (N, classes)."""

    def __init__(self, build: Builder, classes: int, **trunk: Any):
        super().__init__(build, **trunk)
        _check_classes(classes)
        self.fc = Linear(self.channels, classes, std=0.01, rng=build.rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(GlobalAverage()(self.features(x)))


class Segmenter(ResNet):
    """Trunk, head, linear upsampling: (N, *S, in_channels) -> logits (N, *S, classes)."""

    def __init__(self, build: Builder, classes: int, head: str, align_corners: bool, **trunk: Any):
        super().__init__(build, **trunk)
        _check_classes(classes)
        if head == "linear":
            self.fc = build.conv(self.channels, classes, 1, bias=True, std=0.01)
        elif head == "fcn":
            self.classifier = fcn_head(build, self.channels, classes)
        elif head == "deeplabv3":
            self.classifier = deeplabv3_head(build, self.channels, classes)
        else:
            raise ValueError(f'head is {head!r}; expected "linear", "fcn" or "deeplabv3"')
        self.align_corners = align_corners

    def forward(self, x: Tensor) -> Tensor:
        head = self.fc if hasattr(self, "fc") else self.classifier
        y = head(self.features(x))
        return ops.upsample(y, x.shape[1:-1], align_corners=self.align_corners)


def fcn_head(build: Builder, channels: int, classes: int) -> Sequential:
    """torchvision's FCNHead: 3x3 to a quarter of the channels, then 1x1; without its dropout."""
    return Sequential(build.conv(channels, channels // 4, 3), BatchNorm(channels // 4), ReLU(),
                      Identity(), build.conv(channels // 4, classes, 1, bias=True))


def deeplabv3_head(build: Builder, channels: int, classes: int) -> Sequential:
    """torchvision's DeepLabHead with rates 12, 24, 36 (Chen et al. 2017); without its dropout."""
    return Sequential(Pyramid(build, channels, 256, (12, 24, 36)), build.conv(256, 256, 3),
                      BatchNorm(256), ReLU(), build.conv(256, classes, 1, bias=True))


class Pyramid(Module):
    """Atrous spatial pyramid pooling: 1x1, three dilated 3x3 and a global average, joined.

    The global average spans depth too: a rank-3 network with this head mixes all slices.
    """

    def __init__(self, build: Builder, c_in: int, c_out: int, rates: tuple[int, ...]):
        def normalised(conv):
            return conv, BatchNorm(c_out), ReLU()

        self.convs = [
            Sequential(*normalised(build.conv(c_in, c_out, 1))),
            *(Sequential(*normalised(build.conv(c_in, c_out, 3, 1, r))) for r in rates),
            Sequential(GlobalAverage(keepdims=True), *normalised(build.conv(c_in, c_out, 1))),
        ]
        joined = len(self.convs) * c_out
        self.project = Sequential(*normalised(build.conv(joined, c_out, 1)))

    def forward(self, x: Tensor) -> Tensor:
        *local, mean = [branch(x) for branch in self.convs]
        everywhere = ops.upsample(mean, x.shape[1:-1], align_corners=False)
        return self.project(ops.concatenate(*local, everywhere))


def resnet_seg(backbone: str = "resnet18", *, rank: int, in_channels: int, classes: int,
               output_stride: int = 8, head: str = "linear", dilate_first_block: bool = True,
               align_corners: bool = True, depth: Any = "plane", depth_stride: Any = "plane",
               depth_dilation: Any = "plane", depth_padding: str = "zero",
               pool_depth: int | None = None, seed: int = 0) -> Segmenter:
    """A segmentation network: logits (N, *S, classes) for images or volumes (N, *S, in_channels).

    The defaults are Pakhomov's ResNet-8s, isotropic at rank 3. `dilate_first_block=False` with
    `align_corners=False` is torchvision's rule. The depth arguments are those of `Depth`. The
    same seed gives the same weights. `net.config` rebuilds the architecture.
    """
    along = Depth(depth, depth_stride, depth_dilation, depth_padding, pool_depth)
    net = Segmenter(Builder(rank, along, seed), classes, head, align_corners, backbone=backbone,
                    in_channels=in_channels, output_stride=output_stride,
                    dilate_first_block=dilate_first_block)
    net.config = {"model": "resnet_seg", "backbone": backbone, "rank": rank,
                  "in_channels": in_channels, "classes": classes, "output_stride": output_stride,
                  "head": head, "dilate_first_block": dilate_first_block,
                  "align_corners": align_corners, **asdict(along)}
    return net


def resnet(backbone: str = "resnet18", *, rank: int, in_channels: int, classes: int,
           depth: Any = "plane", depth_stride: Any = "plane", depth_dilation: Any = "plane",
           depth_padding: str = "zero", pool_depth: int | None = None, seed: int = 0
           ) -> Classifier:
    """The classification network: (N, *S, in_channels) -> logits (N, classes)."""
    along = Depth(depth, depth_stride, depth_dilation, depth_padding, pool_depth)
    net = Classifier(Builder(rank, along, seed), classes, backbone=backbone,
                     in_channels=in_channels, output_stride=32, dilate_first_block=True)
    net.config = {"model": "resnet", "backbone": backbone, "rank": rank,
                  "in_channels": in_channels, "classes": classes, **asdict(along)}
    return net


def build(config: dict) -> ResNet:
    """The network that a `config` describes, with random weights."""
    makers: dict[str, Callable[..., ResNet]] = {"resnet_seg": resnet_seg, "resnet": resnet}
    options = dict(config)
    name = options.pop("model", None)
    if name not in makers:
        raise ValueError(f"model is {name!r}; expected one of {', '.join(makers)}")
    return makers[name](**options)
