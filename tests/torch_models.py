"""The networks of `tinyseg.models` in PyTorch, at any rank, and how weights get there and back.

Written from the definitions (He et al. 2016; Pakhomov et al. 2017; torchvision's names), sharing
no code with tinyseg: the oracle of test_parity.
"""

from math import gcd

import torch
import torch.nn.functional as F
from torch import nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3),
          "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}


def conv(rank, c_in, c_out, k, stride=1, dilation=1, bias=False):
    return CONV[rank](c_in, c_out, k, stride, dilation * (k // 2), dilation, bias=bias)


def resize(x, size, align_corners):
    return F.interpolate(x, tuple(size), mode=LINEAR[x.ndim - 2], align_corners=align_corners)


def place(rank, c_in, c_out, k, dilation=1):
    return [conv(rank, c_in, c_out, k, 1, dilation), NORM[rank](c_out), nn.ReLU()]


class Residual(nn.Module):
    def __init__(self, rank, c_in, width, stride, dilation, bottleneck):
        super().__init__()
        c_out = 4 * width if bottleneck else width
        plan = [(width, 1, 1, 1), (width, 3, stride, dilation), (c_out, 1, 1, 1)]
        plan = plan if bottleneck else [(width, 3, stride, dilation), (width, 3, 1, dilation)]
        self.count, channels = len(plan), c_in
        for i, (c, k, s, d) in enumerate(plan, start=1):
            self.add_module(f"conv{i}", conv(rank, channels, c, k, s, d))
            self.add_module(f"bn{i}", NORM[rank](c))
            channels = c
        self.downsample = None
        if stride > 1 or c_in != c_out:
            self.downsample = nn.Sequential(conv(rank, c_in, c_out, 1, stride), NORM[rank](c_out))

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            if i < self.count:
                y = F.relu(y)
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Pyramid(nn.Module):
    def __init__(self, rank, c):
        super().__init__()
        branches = [nn.Sequential(*place(rank, c, 256, 1))]
        branches += [nn.Sequential(*place(rank, c, 256, 3, rate)) for rate in (12, 24, 36)]
        branches += [nn.Sequential(nn.Identity(), *place(rank, c, 256, 1))]
        self.convs = nn.ModuleList(branches)
        self.project = nn.Sequential(*place(rank, 5 * 256, 256, 1))

    def forward(self, x):
        space = tuple(range(2, x.ndim))
        ys = [branch(x) for branch in self.convs[:4]]
        mean = self.convs[4](x.mean(space, keepdim=True))
        return self.project(torch.cat([*ys, mean.expand_as(ys[0])], dim=1))


class Block(nn.Module):
    """Doubled, joined, convolved twice: segmentation_models_pytorch's UnetDecoder block."""

    def __init__(self, rank, c_in, c_out, norm):
        super().__init__()
        for i, c in enumerate((c_in, c_out), start=1):
            layers = place(rank, c, c_out, 3)
            if norm == "group":
                layers[1] = nn.GroupNorm(gcd(c_out, 32), c_out)
            self.add_module(f"conv{i}", nn.Sequential(*layers))

    def forward(self, x, skip, size):
        x = F.interpolate(x, tuple(size), mode="nearest")
        return self.conv2(self.conv1(x if skip is None else torch.cat([x, skip], dim=1)))


class Decoder(nn.Module):
    def __init__(self, rank, stages, widths, norm):
        super().__init__()
        skips, inputs = [*stages[-2::-1], 0], [stages[-1], *widths]
        self.blocks = nn.ModuleList(Block(rank, inputs[i] + skips[i], c, norm)
                                    for i, c in enumerate(widths))

    def forward(self, maps, size):
        *skips, y = maps
        for block in self.blocks:
            skip = skips.pop() if skips else None
            y = block(y, skip, size if skip is None else skip.shape[2:])
        return y


class Net(nn.Module):
    """head "classify": logits (N, classes); else logits (N, classes, *S)."""

    def __init__(self, backbone, rank, in_channels, classes, head="linear", output_stride=8,
                 dilate_first_block=True, align_corners=True, decoder=(), norm="batch"):
        super().__init__()
        bottleneck = backbone not in ("resnet18", "resnet34")
        self.head, self.align_corners = head, align_corners
        self.conv1, self.bn1 = conv(rank, in_channels, 64, 7, 2), NORM[rank](64)
        self.maxpool = POOL[rank](3, 2, 1)
        channels, reached, dilation, stages = 64, 4, 1, [64]
        for i, count in enumerate(BLOCKS[backbone]):
            width, stride, before = 64 * 2**i, 1, dilation
            if i > 0 and reached < output_stride:
                stride, reached = 2, 2 * reached
            elif i > 0:
                dilation *= 2
            blocks = []
            for b in range(count):
                d = before if b == 0 and not dilate_first_block else dilation
                blocks.append(Residual(rank, channels, width, stride if b == 0 else 1, d,
                                       bottleneck))
                channels = 4 * width if bottleneck else width
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            stages.append(channels)
        if head == "classify":
            self.fc = nn.Linear(channels, classes)
        elif head == "linear":
            self.fc = conv(rank, channels, classes, 1, bias=True)
        elif head == "fcn":
            self.classifier = nn.Sequential(*place(rank, channels, channels // 4, 3), nn.Identity(),
                                            conv(rank, channels // 4, classes, 1, bias=True))
        elif head == "unet":
            self.decoder = Decoder(rank, stages, decoder, norm)
            self.segmentation_head = nn.Sequential(conv(rank, decoder[-1], classes, 3, bias=True))
        else:
            self.classifier = nn.Sequential(Pyramid(rank, channels), *place(rank, 256, 256, 3),
                                            conv(rank, 256, classes, 1, bias=True))

    def forward(self, x):
        maps = [F.relu(self.bn1(self.conv1(x)))]
        y = self.maxpool(maps[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            y = layer(y)
            maps.append(y)
        if self.head == "classify":
            return self.fc(y.mean(tuple(range(2, y.ndim))))
        if self.head == "unet":
            y = self.segmentation_head(self.decoder(maps, x.shape[2:]))
        else:
            y = self.fc(y) if self.head == "linear" else self.classifier(y)
        return resize(y, x.shape[2:], self.align_corners)


def segmentation_models_names(state):
    """{name: tensor} of a Net with head "unet" as segmentation_models_pytorch's Unet names them."""
    heads = ("decoder.", "segmentation_head.")
    return {name if name.startswith(heads) else f"encoder.{name}": a for name, a in state.items()}


def channels_first(x):
    """(N, *S, C) -> (N, C, *S)"""
    return x.movedim(-1, 1)


def channels_last(x):
    """(N, C, *S) -> (N, *S, C)"""
    return x.movedim(1, -1)


def torch_layout(w):
    """A kernel (*K, I, O) as (O, I, *K); vectors stay."""
    return w if w.ndim == 1 else w.movedim((-1, -2), (0, 1))


def our_layout(w):
    """A kernel (O, I, *K) as (*K, I, O); vectors stay."""
    return w if w.ndim == 1 else w.movedim((0, 1), (-1, -2))


def twin(net):
    """The PyTorch network of one of ours (rank 3: isotropic), with its weights and dtype."""
    config = dict(net.config)
    options = {k: config[k] for k in ("backbone", "rank", "in_channels", "classes")}
    if config["model"] == "resnet":
        options |= {"head": "classify", "output_stride": 32}
    else:
        options |= {k: config[k] for k in ("head", "output_stride", "dilate_first_block",
                                           "align_corners")}
        options |= {k: config[k] for k in ("decoder", "norm") if k in config}
    state = {name: torch_layout(torch.tensor(a)) for name, a in net.state().items()}
    model = Net(**options).to(state["conv1.weight"].dtype)
    model.load_state_dict(state, strict=False)  # test_parity compares the names
    return model
