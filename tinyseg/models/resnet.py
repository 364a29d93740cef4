"""The residual trunk, plain or dilated (He et al. 2016; Pakhomov et al. 2017).

State names are torchvision's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ..nn import BatchNorm, Module, Sequential, normalised
from ..tensor import Tensor
from .depth import STAGES, Builder, expect_positive

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


class Residual(Module):
    """relu(shortcut(x) + F(x)), F alternating convolution and batch-norm with ReLU between.

    Basic: two 3x3 convolutions of `width` channels; bottleneck: 1x1, 3x3, 1x1 with 4 `width`
    channels out, the stride in the 3x3. The shortcut is a strided 1x1 convolution with
    batch-norm where the shape changes, x otherwise.

    >>> build = ts.models.Builder(rank=2, depth=ts.models.Depth(), seed=0)
    >>> block = ts.models.Residual(build, 3, width=4, stride=2, dilation=1, bottleneck=True)
    >>> block(np.ones((1, 8, 12, 3))).shape
    (1, 4, 6, 16)
    """

    def __init__(self, build: Builder, c_in: int, width: int, stride: int, dilation: int,
                 bottleneck: bool):
        if bottleneck:
            convs = [build.conv(c_in, width, 1, reduces=True),
                     build.conv(width, width, 3, stride, dilation),
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
            y = normalised(getattr(self, f"conv{i}"), getattr(self, f"bn{i}"), y,
                           shortcut if i == self.layers else None, relu=True)
        return y


class ResNet(Module):
    """The residual trunk: (N, *S, in_channels) -> (N, *ceil(S / output_stride), channels[-1]).

    `width` channels leave the stem, 64 in all published ones; every layer's are in proportion.

    >>> build = ts.models.Builder(rank=2, depth=ts.models.Depth(), seed=0)
    >>> trunk = ts.models.ResNet(build, "resnet18", in_channels=1, output_stride=8,
    ...                          dilate_first_block=True, width=4)
    >>> [y.shape for y in trunk.pyramid(ts.Tensor(np.ones((1, 32, 48, 1), "float32")))]
    [(1, 16, 24, 4), (1, 8, 12, 4), (1, 4, 6, 8), (1, 4, 6, 16), (1, 4, 6, 32)]
    """

    def __init__(self, build: Builder, backbone: str, in_channels: int, output_stride: int,
                 dilate_first_block: bool, width: int = 64):
        if backbone not in BACKBONES:
            raise ValueError(f"backbone is {backbone!r}; expected one of {', '.join(BACKBONES)}")
        if output_stride not in STRIDES:
            raise ValueError(f"output_stride is {output_stride!r}; expected 8, 16 or 32")
        expect_positive(in_channels=in_channels, width=width)
        blocks, bottleneck = BACKBONES[backbone]
        build.depth.check(range(2 + STRIDES[output_stride][0].count(2)))
        build.stage = 0
        self.conv1 = build.conv(in_channels, width, 7, 2)
        self.bn1 = BatchNorm(width)
        build.stage = 1
        self.maxpool = build.pool(3, 2)
        c_in, before = width, 1
        for i, (count, stride, dilation) in enumerate(
            zip(blocks, *STRIDES[output_stride], strict=True)
        ):
            layer, build.stage = [], i + 1
            for b in range(count):
                first = dilation if b or dilate_first_block else before
                layer.append(Residual(build, c_in, width << i, stride if b == 0 else 1, first,
                                      bottleneck))
                c_in = layer[-1].c_out
            setattr(self, f"layer{i + 1}", Sequential(*layer))
            before = dilation

    @property
    def channels(self) -> tuple[int, ...]:
        """How many each map of the pyramid has."""
        found = [self.conv1.weight.shape[-1]]
        for layer in (getattr(self, f"layer{i}") for i in range(1, STAGES)):
            found.append(layer[-1].c_out if len(layer) else found[-1])
        return tuple(found)

    def _stages(self, x: Tensor) -> Iterator[Tensor]:
        x = normalised(self.conv1, self.bn1, x, relu=True)
        yield x
        x = self.maxpool(x)
        for i in range(1, STAGES):
            x = getattr(self, f"layer{i}")(x)
            yield x

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """The maps of all stages, finest first: those of the stem and of layers 1 to 4."""
        return list(self._stages(x))

    def features(self, x: Tensor) -> Tensor:
        """The map of the last stage; the others are not kept."""
        return deque(self._stages(x), maxlen=1).pop()
