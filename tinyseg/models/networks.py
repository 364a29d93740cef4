"""Whole networks, what rebuilds them, and the makers that a file may name.

Rank 2 is the network of images, rank 3 that of volumes; the code is the same. What a rank-3
window does along depth is one `Depth` value, which `inflate` uses too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .. import ops
from ..backend import array_module
from ..nn import GlobalAverage, Linear, Module
from ..tensor import Tensor
from .decoders import HEADS
from .depth import Builder, Depth, expect_positive, plain
from .resnet import ResNet

DECODER = (256, 128, 64, 32, 16)  # segmentation_models_pytorch's
RARE = 1e-3  # the least share that a class begins with


class Classifier(ResNet):
    """Trunk, global average, `fc`: (N, *S, in_channels) -> (N, classes).

    >>> net = ts.models.resnet(rank=2, in_channels=1, classes=5, width=4)
    >>> type(net).__name__, net.channels, net.fc.weight.shape
    ('Classifier', (4, 4, 8, 16, 32), (32, 5))
    """

    head_names = ("fc",)

    def __init__(self, build: Builder, classes: int, **trunk: Any):
        super().__init__(build, **trunk)
        expect_positive(classes=classes)
        self.fc = Linear(self.channels[-1], classes, std=0.01, rng=build.rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(GlobalAverage()(self.features(x)))


class Segmenter(ResNet):
    """Trunk, head, linear upsampling: (N, *S, in_channels) -> logits (N, *S, classes).

    `head` is one of HEADS, `options` what its maker takes.

    >>> net = ts.models.resnet_seg(rank=2, in_channels=1, classes=3, head="unet", width=4)
    >>> type(net).__name__, net.head_names
    ('Segmenter', ('decoder', 'segmentation_head'))
    """

    def __init__(self, build: Builder, classes: int, head: str, align_corners: bool,
                 options: dict[str, Any], **trunk: Any):
        super().__init__(build, **trunk)
        expect_positive(classes=classes)
        if head not in HEADS:
            raise ValueError(f"head is {head!r}; expected one of {', '.join(HEADS)}")
        self.head, self.align_corners = head, align_corners
        parts = HEADS[head].make(build, self.channels, classes, **options)
        vars(self).update(zip(self.head_names, parts, strict=True))

    @property
    def head_names(self) -> tuple[str, ...]:
        """The names of the parts behind the trunk: with these begin those of its parameters."""
        return HEADS[self.head].names

    def prior(self, shares: Sequence[float]) -> None:
        """Let logits begin at the log of the shares (classes,) that classes have of all voxels.

        From a start where all are alike, a network first learns that each but the background is
        rare, by weights that it must unlearn then (Lin et al. 2017, section 3.3). Shares of less
        than RARE count as RARE. ValueError for another number of them, and for what is no share.

        >>> net = ts.models.resnet_seg(rank=2, in_channels=1, classes=2, width=4)
        >>> net.prior([0.75, 0.25])
        >>> ts.ops.softmax(net.fc.bias).data
        array([0.75, 0.25], dtype=float32)
        """
        bias, found = dict(self.named_parameters())[HEADS[self.head].last], np.asarray(shares)
        if found.shape != bias.shape or not (found >= 0).all() or not 0 < found.sum() < np.inf:
            raise ValueError(f"shares are {shares}; expected {len(bias.data)} numbers from 0, not "
                             "all of them 0")
        found = np.maximum(found / found.sum(), RARE)
        bias.data[...] = array_module(bias.data).asarray(np.log(found / found.sum()))
        bias.version += 1

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = (getattr(self, name) for name in self.head_names)
        y = first(x, *self.pyramid(x)) if HEADS[self.head].pyramid else first(self.features(x))
        for part in rest:
            y = part(y)
        return ops.upsample(y, x.shape[1:-1], align_corners=self.align_corners)


def resnet_seg(backbone: str = "resnet18", *, rank: int, in_channels: int, classes: int,
               output_stride: int | None = None, head: str = "linear",
               decoder: tuple[int, ...] | None = None, norm: str = "batch", width: int = 64,
               dilate_first_block: bool = True, align_corners: bool = True, depth: Any = "plane",
               depth_stride: Any = "plane", depth_dilation: Any = "plane",
               depth_padding: str = "zero", pool_depth: int | None = None,
               structure: str = "full", seed: int = 0) -> Segmenter:
    """A segmentation network: logits (N, *S, classes) for images or volumes (N, *S, in_channels).

    The defaults are Pakhomov's ResNet-8s, isotropic at rank 3. `dilate_first_block=False` with
    `align_corners=False` is torchvision's rule. The depth arguments are those of `Depth`. The
    same seed gives the same weights. `net.config` rebuilds the architecture.

    head="unet" goes back up through the stages of a trunk of output stride 32 (others: 8, unless
    told otherwise). decoder: the channels of its blocks, one to five (DECODER); each doubles, and
    what is left after fewer than five is interpolated. norm: "batch" or "group", the decoder's
    alone.

    width: the channels of the stem, to which all others of the trunk are in proportion; 64 is the
    published one, and with 8 a class can train one on a laptop.

    >>> net = ts.models.resnet_seg("resnet18", rank=3, in_channels=1, classes=5, width=4)
    >>> net.conv1.weight.shape, net(np.ones((2, 8, 16, 24, 1))).shape
    ((7, 7, 7, 1, 4), (2, 8, 16, 24, 5))
    """
    along, unet = Depth(depth, depth_stride, depth_dilation, depth_padding, pool_depth,
                        structure), {}
    if head == "unet":
        unet = {"decoder": plain(DECODER if decoder is None else decoder), "norm": norm}
        if output_stride not in (None, 32):
            raise ValueError(f'output_stride is {output_stride!r}; head "unet" has a trunk of 32')
    elif decoder is not None or norm != "batch":
        raise ValueError(f'found decoder {decoder} and norm {norm!r} with head {head!r}; they go '
                         'with "unet"')
    stride = (32 if unet else 8) if output_stride is None else output_stride
    net = Segmenter(Builder(rank, along, seed), classes, head, align_corners, unet,
                    backbone=backbone, in_channels=in_channels, output_stride=stride,
                    dilate_first_block=dilate_first_block, width=width)
    net.config = {"model": "resnet_seg", "backbone": backbone, "rank": rank,
                  "in_channels": in_channels, "classes": classes, "output_stride": stride,
                  "head": head, **unet, "dilate_first_block": dilate_first_block,
                  "align_corners": align_corners, **({"width": width} if width != 64 else {}),
                  **asdict(along)}
    return net


def resnet(backbone: str = "resnet18", *, rank: int, in_channels: int, classes: int,
           width: int = 64, depth: Any = "plane", depth_stride: Any = "plane",
           depth_dilation: Any = "plane", depth_padding: str = "zero",
           pool_depth: int | None = None, structure: str = "full", seed: int = 0) -> Classifier:
    """The classification network: (N, *S, in_channels) -> logits (N, classes).

    >>> net = ts.models.resnet("resnet18", rank=2, in_channels=1, classes=5, width=4)
    >>> net(np.ones((2, 32, 64, 1))).shape
    (2, 5)
    """
    along = Depth(depth, depth_stride, depth_dilation, depth_padding, pool_depth, structure)
    net = Classifier(Builder(rank, along, seed), classes, backbone=backbone,
                     in_channels=in_channels, output_stride=32, dilate_first_block=True,
                     width=width)
    net.config = {"model": "resnet", "backbone": backbone, "rank": rank,
                  "in_channels": in_channels, "classes": classes,
                  **({"width": width} if width != 64 else {}), **asdict(along)}
    return net


MAKERS: dict[str, Callable[..., Module]] = {"resnet_seg": resnet_seg, "resnet": resnet}


def register(name: str, maker: Callable[..., Module]) -> None:
    """Let `build`, and a file that `checkpoint.save` wrote, name a network of one's own.

    maker(**options, seed=...) returns a network with random weights; its `config` becomes
    {"model": name, **options}, unless it has one. What is read from a file decides the options,
    text, numbers, and tuples and dicts of these, and never what is called. What `inflate` makes of
    the network is built too, where the maker takes `rank` and the arguments of `Depth`. Raises
    ValueError for a name that is taken by another maker, TypeError for a maker without a seed.

    >>> def line(channels, seed=0):
    ...     return ts.nn.Linear(channels, 2, rng=seed)
    >>> ts.models.register("line", line)
    >>> ts.models.build({"model": "line", "channels": 3}).weight.shape
    (3, 2)
    """
    if MAKERS.get(name, maker) is not maker:
        raise ValueError(f"{name!r} is the name of another maker; expected a new one, beside "
                         f"{', '.join(MAKERS)}")
    kinds = inspect.signature(maker).parameters
    if "seed" not in kinds and all(p.kind is not p.VAR_KEYWORD for p in kinds.values()):
        raise TypeError(f"the maker of {name!r} takes no seed; expected maker(..., seed=0), which "
                        "every convolution and linear layer takes as its rng")
    MAKERS[name] = maker


def build(config: dict) -> Module:
    """The network that a `config` describes, with random weights: for that of an inflated network,
    its twin with a random start. "seed" in it says which.

    >>> net = ts.models.resnet_seg(rank=2, in_channels=1, classes=3, width=4)
    >>> twin = ts.models.build({**net.config, "seed": 1})
    >>> twin.config == net.config, np.array_equal(twin.conv1.weight.data, net.conv1.weight.data)
    (True, False)
    """
    options = {key: plain(value) for key, value in config.items()}
    name = options.pop("model", None)
    if not isinstance(name, str) or name not in MAKERS:
        raise ValueError(f"model is {name!r}; expected one of {', '.join(MAKERS)} "
                         "(models.register adds another)")
    net = MAKERS[name](**options)
    if not isinstance(getattr(net, "config", None), dict):
        net.config = {"model": name, **{k: v for k, v in options.items() if k != "seed"}}
    return net
