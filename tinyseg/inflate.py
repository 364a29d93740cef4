"""From images to volumes and back: every 2D kernel times a profile along depth.

    w3[t] = alpha[t] * w2,    sum(alpha) = 1,    w2 = sum over t of w3[t]

On an input that is constant along depth each rank-3 convolution then answers as the rank-2 one,
slice by slice, wherever its window sees no padding or repeats the border; and so does the network,
because batch-norm, ReLU, pooling and upsampling treat all slices alike. Names, order, biases and
batch-norm state are those of the original. Other ways keep the 2D kernel and put something along
depth beside it, see `models.structures`; `profiles` has them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from .backend import Array, array_module
from .models import STRUCTURES, Depth
from .nn import Conv, MaxPool, Module, Network
from .profiles import PROFILES, depth_profile, dirichlet
from .windows import Window


def inflate(net: Network, depth: int | tuple[int, ...] = 3,
            profile: str | Callable[[int], Array] | Array | Mapping[str, Array] = "average", *,
            slot: str | int = "center", alpha: Array | Mapping[str, Array] | None = None,
            depth_stride: str | int | tuple[int, ...] = "plane", depth_dilation: str | int = 1,
            depth_padding: str = "edge", stem: str = "profile", seed: int = 0) -> Network:
    """A rank-3 network made of a rank-2 one; the original is untouched, tied weights stay tied.

    depth: slots of every kernel larger than one, (stem, rest), or five. profile, slot: see
    `depth_profile`; "scale" takes its numbers from `alpha`, and a mapping {layer name: alpha}
    gives each convolution with a kernel larger than one its own (the first of tied ones). A kernel
    of one slot is the 2D one, whatever the profile.
    depth, depth_stride, depth_dilation, depth_padding: see `models.Depth`. stem="colour": the first
    kernel's colour axis becomes its depth, so that a network of RGB images sees three neighbouring
    slices of one channel instead (AH-Net, Liu et al. 2018). seed: of the profile "dirichlet",
    another draw for every layer, and of the noise.

    With depth_padding="edge" the result equals the original on inputs constant along depth, for
    every exact profile; with "zero", only for profile="zero" at the centre. That profile at depth
    stride 1 equals the original on every volume, slice by slice, unless the head averages over
    all positions. The result equals `resnet_seg(rank=3, ...)` with the same depth arguments and
    this state, where the original is a `resnet_seg`; `models.build(result.config)` is its twin with
    a random start.

    >>> flat = ts.models.resnet_seg("resnet18", rank=2, in_channels=1, classes=3, width=8)
    >>> deep = ts.inflate(flat, depth=5, profile="average")
    >>> flat.conv1.weight.shape, deep.conv1.weight.shape
    ((7, 7, 1, 8), (5, 7, 7, 1, 8))
    >>> np.allclose(5 * deep.conv1.weight.data, flat.conv1.weight.data)
    True
    """
    row = PROFILES.get(profile) if isinstance(profile, str) else None
    structure = row.structure if row else "full"
    along = Depth(depth, depth_stride, depth_dilation, depth_padding, structure=structure)
    make = STRUCTURES[structure]
    if isinstance(profile, str) and profile == "scale":
        if alpha is None:
            raise ValueError("profile scale needs alpha: numbers that sum to one")
        profile = alpha
    elif alpha is not None:
        raise ValueError('alpha goes with profile="scale"')
    if stem not in ("profile", "colour") or stem == "colour" and structure != "full":
        raise ValueError(f'stem is {stem!r} with the profile {profile!r}; expected "profile", or '
                         '"colour" with one of T x k x k kernels')
    draw = dirichlet(seed) if isinstance(profile, str) and profile == "dirichlet" else None
    out, rng = net.copy(), np.random.default_rng(seed)
    kernels = _convolutions(out, 2, "inflate")
    first = {id(conv.weight): name for name, conv in reversed(kernels.items())}  # tied or not
    owned = [name for name, conv in kernels.items() if first[id(conv.weight)] == name]
    wide = [name for name in owned if max(kernels[name].window.kernel) > 1]
    reaching = [name for name in owned
                if along.reaches(kernels[name].window, kernels[name].reduces)]
    if not reaching and structure == "pointwise":
        raise ValueError("profile is 'pointwise', and the network has no bottleneck; expected one, "
                         "as resnet50 has")
    if isinstance(profile, Mapping) and set(profile) != set(reaching):
        raise ValueError(f"alpha must name the convolutions {sorted(reaching)}, found "
                         f"{sorted(set(profile))}")
    along.check({m.stage for m in out.modules() if isinstance(m, Conv | MaxPool)
                 and m.window.stride[0] > 1})
    for name, conv in kernels.items():
        conv.window = along.conv(conv.window, first[id(conv.weight)] in wide[:1], conv.stage,
                                 conv.reduces)
        if first[id(conv.weight)] != name:
            conv.along = kernels[first[id(conv.weight)]].along
            continue
        w, slots = conv.weight.data, conv.window.kernel[0]
        if stem == "colour" and name in wide[:1]:
            w3 = _colour_to_depth(w, slots, name)
        else:
            numbers: Any = np.ones(1)
            try:
                if name in reaching and (slots > 1 or isinstance(profile, Mapping)):
                    each = profile[name] if isinstance(profile, Mapping) else profile
                    numbers = depth_profile(each, slots, slot)
                    numbers = draw(slots) if draw else numbers
                if make and slots > 1:
                    conv.along, numbers = make(conv, numbers), np.ones(1)
            except ValueError as error:
                raise ValueError(f"{name or 'the convolution'}: {error}") from None
            numbers = array_module(w).asarray(numbers, dtype=w.dtype).reshape(-1, *(1,) * w.ndim)
            w3 = numbers * w
            if noise := row.noise if row else 0.0:
                drawn = array_module(w).asarray(rng.standard_normal(w3.shape), dtype=w.dtype)
                w3 += noise * w.std() * drawn * (numbers == 0)
        conv.weight.data, conv.weight.grad = w3, None
    for module in out.modules():
        if isinstance(module, MaxPool):
            module.window = along.pool(module.window, module.stage)
        if isinstance(getattr(module, "config", None), dict):
            channels = {"in_channels": 1} if stem == "colour" else {}
            module.config = {**module.config, **channels, "rank": 3, **asdict(along)}
    return out


def deflate(net: Network) -> Network:
    """The rank-2 network that answers as a rank-3 one on inputs constant along depth, padded by
    their edge: w2 = sum over t of w3[t], the inverse of `inflate` for every exact profile. The
    original is untouched, tied weights stay tied.

    Raises ValueError for a network that has convolutions of another rank, and for those of ACS,
    which look along depth as they do across.

    >>> flat = ts.nn.Conv(1, 4, (3, 3), padding=1, rng=0)
    >>> again = ts.deflate(ts.inflate(flat, depth=5, profile="zero"))
    >>> np.array_equal(again.weight.data, flat.weight.data)
    True
    """
    out, flat = net.copy(), {}
    for name, conv in _convolutions(out, 3, "deflate").items():
        try:
            if id(conv.weight) not in flat:
                flat[id(conv.weight)] = conv.weight, (
                    conv.along.flat(conv) if conv.along else conv.weight.data.sum(axis=0))
        except ValueError as error:
            raise ValueError(f"{name or 'the convolution'}: {error}") from None
    for weight, w2 in flat.values():
        weight.data, weight.grad = w2, None
    for module in out.modules():
        if isinstance(module, Conv | MaxPool):
            module.window = _in_plane(module.window)
        if isinstance(module, Conv):
            module.along = None
        if isinstance(getattr(module, "config", None), dict):
            module.config = {**module.config, "rank": 2, **asdict(Depth())}
    return out


def _convolutions(net: Module, rank: int, whose: str) -> dict[str, Conv]:
    """{name: convolution} of a network; ValueError unless there is one and all are of this rank."""
    found = {name: m for name, m in [("", net), *net.named(Module)] if isinstance(m, Conv)}
    wrong = [name for name, conv in found.items() if len(conv.window.kernel) != rank]
    if wrong or not found:
        raise ValueError(f"{whose} needs a network of rank-{rank} convolutions, found "
                         + (f"{wrong[0]} of another rank" if wrong else "no convolution"))
    return found


def _in_plane(window: Window) -> Window:
    """A rank-3 window without its first axis."""
    return Window(*(value[1:] for value in vars(window).values()))


def _colour_to_depth(w: Array, slots: int, name: str) -> Array:
    """(*K, 3, C_out) -> (3, *K, 1, C_out)."""
    if w.shape[-2] != slots:
        raise ValueError(f"{name}: stem colour needs as many slots as input channels, found "
                         f"{slots} and {w.shape[-2]}")
    return array_module(w).moveaxis(w, -2, 0)[..., None, :].copy()
