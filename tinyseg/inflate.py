"""From images to volumes: every 2D kernel times a profile along depth.

    w3[t] = alpha[t] * w2,    sum(alpha) = 1

On an input that is constant along depth each rank-3 convolution then answers as the rank-2 one,
slice by slice, wherever its window sees no padding or repeats the border; and so does the network,
because batch-norm, ReLU, pooling and upsampling treat all slices alike. Names, order, biases and
batch-norm state are those of the original.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .backend import Array, array_module
from .models import Depth
from .nn import Conv, MaxPool, Module, Network


@dataclass(frozen=True)
class Profile:
    """alpha(slots, slot) -> (slots,); `exact` where it sums to one; noise in units of std(w2)."""

    alpha: Callable[[int, int], np.ndarray]
    formula: str
    source: str
    exact: bool = True
    noise: float = 0.0


def _offset(slots: int, slot: int) -> np.ndarray:
    return np.arange(slots) - slot


def _normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def gaussian(sigma: float) -> Callable[[int], np.ndarray]:
    """exp(-(t - c)² / 2 sigma²) normalised, c = slots // 2; sigma in slots, from "zero" (0) to
    "average" (infinity)."""
    return lambda slots: _normalised(np.exp(-(_offset(slots, slots // 2) / sigma) ** 2 / 2))


def dirichlet(seed: int, concentration: float = 1.0) -> Callable[[int], np.ndarray]:
    """Random positive numbers that sum to one, others for every layer: a Dirichlet draw a call."""
    rng = np.random.default_rng(seed)
    return lambda slots: rng.dirichlet(np.full(slots, concentration))


# c is the slot asked for, by default slots // 2; T the number of slots.
PROFILES = {
    "average": Profile(lambda n, c: np.full(n, 1 / n), "1/T", "Carreira and Zisserman 2017 (I3D)"),
    "zero": Profile(lambda n, c: np.eye(n)[c], "1 at c, 0 elsewhere", "Mansimov et al. 2015"),
    "negative": Profile(lambda n, c: 2 * np.eye(n)[c] - 1 / n, "(2T-1)/T at c, -1/T elsewhere",
                        "Mansimov et al. 2015"),
    "triangular": Profile(lambda n, c: _normalised(n - np.abs(_offset(n, c))),
                          "T - |t - c|, normalised", "a linear kernel around c"),
    "gaussian": Profile(lambda n, c: _normalised(np.exp(-8 * (_offset(n, c) / n) ** 2)),
                        "exp(-(t-c)²/2σ²), normalised, σ = T/4", "between zero and average"),
    "dirichlet": Profile(lambda n, c: dirichlet(0)(n), "a draw from Dirichlet(1), seed 0",
                         "scaling (Mansimov et al. 2015) at random"),
    "noise": Profile(lambda n, c: np.eye(n)[c], "1 at c, 0 elsewhere, plus N(0, (0.1 std(w2))²) "
                     "at the other slots", "breaks the symmetry of zero", exact=False, noise=0.1),
    "replicate": Profile(lambda n, c: np.ones(n), "1 everywhere: activations T times too large",
                         "a frequent mistake, here to compare with", exact=False),
}


def depth_profile(profile: str | Callable[[int], Array] | Array, slots: int,
                  slot: str | int = "center") -> np.ndarray:
    """alpha (slots,), float64, summing to one unless PROFILES says otherwise.

    A name in PROFILES; a callable, called with `slots`; or an array, which stands for itself
    ("scaling"). slot: "center" (slots // 2), "first" or a number, for the names that have a c.
    Raises ValueError where the length is not `slots` or the sum is not one, and for another slot
    with numbers of your own, which have no c.
    """
    if isinstance(profile, str):
        at = {"center": slots // 2, "first": 0}.get(slot, -1) if isinstance(slot, str) else slot
        if isinstance(at, bool) or not isinstance(at, int | np.integer) or not 0 <= at < slots:
            raise ValueError(f"slot is {slot!r}; expected center, first or 0 to {slots - 1}")
        if profile not in PROFILES:
            raise ValueError(f"profile is {profile!r}; expected one of {', '.join(PROFILES)}, "
                             "scale, a callable or an array")
        return PROFILES[profile].alpha(slots, at)
    if slot != "center":
        raise ValueError(f"slot is {slot!r}; it goes with a profile's name, an alpha has its own")
    alpha = np.asarray(profile(slots) if callable(profile) else profile, dtype=float)
    if alpha.shape != (slots,) or not abs(alpha.sum() - 1) < 1e-6:
        raise ValueError(f"alpha has shape {alpha.shape} and sum {alpha.sum():.6g}; expected "
                         f"({slots},) and 1")
    return alpha


def inflate(net: Network, depth: int | tuple[int, ...] = 3,
            profile: str | Callable[[int], Array] | Array | Mapping[str, Array] = "average", *,
            slot: str | int = "center", alpha: Array | Mapping[str, Array] | None = None,
            depth_stride: str | int | tuple[int, ...] = "plane", depth_dilation: str | int = 1,
            depth_padding: str = "edge", stem: str = "profile", seed: int = 0) -> Network:
    """A rank-3 network made of a rank-2 one; the original is untouched, tied weights stay tied.

    depth: slots of every kernel larger than one, (stem, rest), or five. profile, slot: see
    `depth_profile`; "scale" takes its numbers from `alpha`, and a mapping {layer name: alpha}
    gives each convolution with a kernel larger than one its own (the first of tied ones).
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
    """
    along = Depth(depth, depth_stride, depth_dilation, depth_padding)
    if isinstance(profile, str) and profile == "scale":
        if alpha is None:
            raise ValueError("profile scale needs alpha: numbers that sum to one")
        profile = alpha
    elif alpha is not None:
        raise ValueError('alpha goes with profile="scale"')
    if stem not in ("profile", "colour"):
        raise ValueError(f'stem is {stem!r}; expected "profile" or "colour"')
    draw = dirichlet(seed) if isinstance(profile, str) and profile == "dirichlet" else None
    out, rng = net.copy(), np.random.default_rng(seed)
    kernels = {name: m for name, m in [("", out), *out.named(Module)] if isinstance(m, Conv)}
    first = {id(conv.weight): name for name, conv in reversed(kernels.items())}  # tied or not
    wide = [name for name, conv in kernels.items()
            if max(conv.window.kernel) > 1 and first[id(conv.weight)] == name]
    wrong = [name for name, conv in kernels.items() if len(conv.window.kernel) != 2]
    if wrong or not kernels:
        raise ValueError("inflate needs a network of rank-2 convolutions, found "
                         + (f"{wrong[0]} of another rank" if wrong else "no convolution"))
    if isinstance(profile, Mapping) and set(profile) != set(wide):
        raise ValueError(f"alpha must name the convolutions {sorted(wide)}, found "
                         f"{sorted(set(profile))}")
    along.check({m.stage for m in out.modules() if isinstance(m, Conv | MaxPool)
                 and m.window.stride[0] > 1})
    for name, conv in kernels.items():
        conv.window = along.conv(conv.window, first[id(conv.weight)] in wide[:1], conv.stage)
        if first[id(conv.weight)] != name:
            continue
        w, slots = conv.weight.data, conv.window.kernel[0]
        if stem == "colour" and name in wide[:1]:
            w3 = _colour_to_depth(w, slots, name)
        else:
            numbers: Any = np.ones(1)
            try:
                if name in wide:
                    each = profile[name] if isinstance(profile, Mapping) else profile
                    numbers = depth_profile(each, slots, slot)
                    numbers = draw(slots) if draw else numbers
            except ValueError as error:
                raise ValueError(f"{name or 'the convolution'}: {error}") from None
            numbers = array_module(w).asarray(numbers, dtype=w.dtype).reshape(-1, *(1,) * w.ndim)
            w3 = numbers * w
            noise = PROFILES[profile].noise if isinstance(profile, str) else 0.0
            if noise:
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


def _colour_to_depth(w: Array, slots: int, name: str) -> Array:
    """(*K, 3, C_out) -> (3, *K, 1, C_out)."""
    if w.shape[-2] != slots:
        raise ValueError(f"{name}: stem colour needs as many slots as input channels, found "
                         f"{slots} and {w.shape[-2]}")
    return array_module(w).moveaxis(w, -2, 0)[..., None, :].copy()
