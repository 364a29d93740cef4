"""The ways from a 2D network to a 3D one, in one table: numbers along depth, and of what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .backend import Array


@dataclass(frozen=True)
class Profile:
    """A way from 2D to 3D: alpha(slots, slot) -> (slots,), a formula, where it is published.

    exact: whether the network begins equal to the 2D one on inputs constant along depth; volumes:
    and on every volume, at depth stride 1. structure: what kernels become, a name in
    `models.STRUCTURES`; alpha is then of what goes along depth. noise: in units of std(w2).

    >>> way = ts.PROFILES["zero"]
    >>> way.formula, way.alpha(3, 1).tolist(), way.volumes
    ('1 at c, 0 elsewhere', [0.0, 1.0, 0.0], True)
    """

    alpha: Callable[[int, int], np.ndarray]
    formula: str
    source: str
    exact: bool = True
    noise: float = 0.0
    volumes: bool = False
    structure: str = "full"


def _offset(slots: int, slot: int) -> np.ndarray:
    return np.arange(slots) - slot


def _normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def gaussian(sigma: float) -> Callable[[int], np.ndarray]:
    """exp(-(t - c)² / 2 sigma²) normalised, c = slots // 2; sigma in slots, from "zero" (0) to
    "average" (infinity).

    >>> [ts.profiles.gaussian(sigma)(3).round(2).tolist() for sigma in (0.1, 100)]
    [[0.0, 1.0, 0.0], [0.33, 0.33, 0.33]]
    """
    wide = max(sigma, 1e-9)
    return lambda slots: _normalised(np.exp(-(_offset(slots, slots // 2) / wide) ** 2 / 2))


def dirichlet(seed: int, concentration: float = 1.0) -> Callable[[int], np.ndarray]:
    """Random positive numbers that sum to one, others for every layer: a Dirichlet draw a call.

    >>> draw = ts.profiles.dirichlet(seed=0)
    >>> first, second = draw(5), draw(5)
    >>> np.allclose([first.sum(), second.sum()], 1), np.allclose(first, second)
    (True, False)
    """
    rng = np.random.default_rng(seed)
    return lambda slots: rng.dirichlet(np.full(slots, concentration))


def _average(slots: int, slot: int) -> np.ndarray:
    return np.full(slots, 1 / slots)


def _one(slots: int, slot: int) -> np.ndarray:
    return np.eye(slots)[slot]


# c is the slot asked for, by default slots // 2; T the number of slots; * convolution; x[d] a
# slice.
PROFILES = {
    "average": Profile(_average, "1/T", "Carreira and Zisserman 2017 (I3D)"),
    "zero": Profile(_one, "1 at c, 0 elsewhere", "Mansimov et al. 2015", volumes=True),
    "negative": Profile(lambda n, c: 2 * np.eye(n)[c] - 1 / n, "(2T-1)/T at c, -1/T elsewhere",
                        "Mansimov et al. 2015"),
    "triangular": Profile(lambda n, c: _normalised(n - np.abs(_offset(n, c))),
                          "T - |t - c|, normalised", "a linear kernel around c"),
    "gaussian": Profile(lambda n, c: _normalised(np.exp(-8 * (_offset(n, c) / n) ** 2)),
                        "exp(-(t-c)²/2σ²), normalised, σ = T/4", "between zero and average"),
    "dirichlet": Profile(lambda n, c: dirichlet(0)(n), "a draw from Dirichlet(1), seed 0",
                         "scaling (Mansimov et al. 2015) at random"),
    "noise": Profile(_one, "1 at c, 0 elsewhere, plus N(0, (0.1 std(w2))²) at the other slots",
                     "breaks the symmetry of zero", exact=False, noise=0.1),
    "replicate": Profile(lambda n, c: np.ones(n), "1 everywhere: activations T times too large",
                         "a frequent mistake, here to compare with", exact=False),
    # Not one larger kernel: the 2D one stays, and has something along depth beside it.
    "planar": Profile(_one, "w2 * x[d]: no slice sees another", "a control (Kolarik et al. 2020)",
                      volumes=True, structure="planar"),
    "pointwise": Profile(_average, "1/T of the first 1x1 of each bottleneck",
                         "Wang et al. 2018 (non-local), 3x1x1", structure="pointwise"),
    "factored": Profile(_one, "v * (w2 * x), v[t] = I at c, 0 elsewhere", "Tran et al. 2018 "
                        "(R(2+1)D), from a Dirac kernel", volumes=True, structure="factored"),
    "depthwise": Profile(_one, "the same with a number for each channel as v[t]", "Pan et al. 2022 "
                         "(ST-Adapter), without its bottleneck", volumes=True,
                         structure="depthwise"),
    "mixed": Profile(_average, "softmax(a)[t] w2, a (T, C_out) trained, from 0",
                     "scaling (Mansimov et al. 2015) that is learned", structure="mixed"),
    "shift": Profile(_one, "w2 * (C/8 of x[d+1], C/8 of x[d-1], the rest of x[d])",
                     "Lin et al. 2019 (TSM)", structure="shift"),
    "gate-shift": Profile(_one, "w2 * (shift(g x) + (1-g) x), g = tanh(v * x), v from 0",
                          "Sudhakaran et al. 2020 (GSM)", volumes=True, structure="gate-shift"),
    "acs": Profile(_one, "w2 in three planes, a third of the filters in each",
                   "Yang et al. 2021 (ACS)", exact=False, structure="acs"),
    "mean-acs": Profile(_one, "the mean of w2 in three planes", "Yang et al. 2021", exact=False,
                        structure="mean-acs"),
    "soft-acs": Profile(_one, "softmax(a) of w2 in three planes, a (3, C_out) trained, from 0",
                        "Yang et al. 2021", exact=False, structure="soft-acs"),
}


def depth_profile(profile: str | Callable[[int], Array] | Array, slots: int,
                  slot: str | int = "center") -> np.ndarray:
    """alpha (slots,), float64, summing to one unless PROFILES says otherwise.

    A name in PROFILES; a callable, called with `slots`; or an array, which stands for itself
    ("scaling"). slot: "center" (slots // 2), "first" or a number, for the names that have a c.
    Raises ValueError where the length is not `slots` or the sum is not one, and for another slot
    with numbers of your own, which have no c.

    >>> ts.profiles.depth_profile("negative", 4).tolist()
    [-0.25, -0.25, 1.75, -0.25]
    >>> ts.profiles.depth_profile([0.25, 0.75], 2).tolist()
    [0.25, 0.75]
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
