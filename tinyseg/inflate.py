"""From images to volumes: every 2D kernel times a profile along depth.

    w3[t] = alpha[t] * w2,    sum(alpha) = 1

On an input that is constant along depth each rank-3 convolution then answers as the rank-2 one,
slice by slice, wherever its window sees no padding or repeats the border; and so does the network,
because batch-norm, ReLU, pooling and upsampling treat all slices alike. Names, order, biases and
batch-norm state are those of the original.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict

import numpy as np

from .backend import Array, array_module
from .models import Depth
from .nn import Conv, MaxPool, Module, Network
from .tensor import Tensor


def depth_profile(profile: str | Callable[[int], Array] | Array, slots: int,
                  slot: str | int = "center") -> np.ndarray:
    """alpha (slots,), float64, summing to one.

    "average": 1 / slots each (Carreira and Zisserman 2017). "zero": one at `slot` ("center" =
    slots // 2, "first" or a number), zero elsewhere (Mansimov et al. 2015). A callable is called
    with `slots`; an array stands for itself ("scaling"). Raises ValueError where the length is
    not `slots` or the sum is not one.
    """
    if isinstance(profile, str):
        places: dict[str | int, str | int] = {"center": slots // 2, "first": 0}
        at = places.get(slot, slot)
        if not isinstance(at, int) or not 0 <= at < slots:
            raise ValueError(f"slot is {slot!r}; expected center, first or 0 to {slots - 1}")
        named = {"average": np.full(slots, 1 / slots), "zero": np.eye(slots)[at]}
        if profile not in named:
            raise ValueError(f"profile is {profile!r}; expected average, zero, scale, a callable "
                             "or an array")
        return named[profile]
    alpha = np.asarray(profile(slots) if callable(profile) else profile, dtype=float)
    if alpha.shape != (slots,) or not abs(alpha.sum() - 1) < 1e-6:
        raise ValueError(f"alpha has shape {alpha.shape} and sum {alpha.sum():.6g}; expected "
                         f"({slots},) and 1")
    return alpha


def inflate(net: Network, depth: int | tuple[int, int] = 3,
            profile: str | Callable[[int], Array] | Array | Mapping[str, Array] = "average", *,
            slot: str | int = "center", alpha: Array | Mapping[str, Array] | None = None,
            depth_stride: str | int = "plane", depth_dilation: str | int = 1,
            depth_padding: str = "edge") -> Network:
    """A rank-3 network made of a rank-2 one; the original is untouched.

    depth: slots of every kernel larger than one, or (stem, rest). profile, slot: see
    `depth_profile`; "scale" takes its numbers from `alpha`, and a mapping {layer name: alpha}
    gives each convolution with a kernel larger than one its own. depth_stride, depth_dilation,
    depth_padding: see `models.Depth`.

    With depth_padding="edge" the result equals the original on inputs constant along depth, for
    every profile; with "zero", only for profile="zero" at the centre. That profile at depth
    stride 1 equals the original on every volume, slice by slice, unless the head averages over
    all positions. The result equals `resnet_seg(rank=3, ...)` with the same depth arguments and
    this state, where the original is a `resnet_seg`.
    """
    along = Depth(depth, depth_stride, depth_dilation, depth_padding)
    if isinstance(profile, str) and profile == "scale":
        if alpha is None:
            raise ValueError("profile scale needs alpha: numbers that sum to one")
        profile = alpha
    elif alpha is not None:
        raise ValueError('alpha goes with profile="scale"')
    out = net.copy()
    kernels = {name: m for name, m in [("", out), *out.named(Module)] if isinstance(m, Conv)}
    wide = [name for name, conv in kernels.items() if max(conv.window.kernel) > 1]
    wrong = [name for name, conv in kernels.items() if len(conv.window.kernel) != 2]
    if wrong or not kernels:
        raise ValueError("inflate needs a network of rank-2 convolutions, found "
                         + (f"{wrong[0]} of another rank" if wrong else "no convolution"))
    if isinstance(profile, Mapping) and set(profile) != set(wide):
        raise ValueError(f"alpha must name the convolutions {sorted(wide)}, found "
                         f"{sorted(set(profile))}")
    for name, conv in kernels.items():
        conv.window = along.conv(conv.window, stem=name in wide[:1])
        slots = conv.window.kernel[0]
        try:
            if name not in wide:
                numbers = np.ones(1)
            elif isinstance(profile, Mapping):
                numbers = depth_profile(profile[name], slots)
            else:
                numbers = depth_profile(profile, slots, slot)
        except ValueError as error:
            raise ValueError(f"{name or 'the convolution'}: {error}") from None
        w = conv.weight.data
        numbers = array_module(w).asarray(numbers, dtype=w.dtype)
        conv.weight = Tensor(numbers.reshape(-1, *(1,) * w.ndim) * w,
                             requires_grad=conv.weight.requires_grad)
    for _, module in [("", out), *out.named(Module)]:
        if isinstance(module, MaxPool):
            module.window = along.pool(module.window)
        if hasattr(module, "config"):
            module.config = {**module.config, "rank": 3, **asdict(along)}
    return out
