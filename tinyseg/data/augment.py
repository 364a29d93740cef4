"""Random changes that keep a patch plausible. One function for slices and for volumes.

Images are (*S, C), labels (*S); every random number comes from the generator given. `Augmentation`
is a table of changes, each with its probability and range, and `PRESETS` has some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from .ct import THICK, resample
from .mirror import LEFT_RIGHT, numbered, permutation, sides

__all__ = ["LEFT_RIGHT", "PRESETS", "Augmentation", "Change", "blur", "contrast", "flip", "gamma",
           "intensity", "low_resolution", "mild", "numbered", "permutation", "preset", "sides"]


def flip(image: np.ndarray, labels: np.ndarray, rng: np.random.Generator, axes: Iterable[int],
         pairs: Sequence[tuple[int, int]] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Reflect each of the named spatial axes with probability 1/2, image and labels alike.

    Negative axes count over the spatial ones: -1 is left-right in a slice and in a volume. `pairs`
    of labels (uint8) change places with it: in the mirror a left kidney is a right one.

    >>> image, labels = np.array([[[1.0], [2.0], [3.0]]]), np.array([[1, 0, 0]], "uint8")
    >>> rng = np.random.default_rng(2)  # its first draw is below 1/2
    >>> image, labels = ts.data.augment.flip(image, labels, rng, axes=[-1], pairs=[(1, 2)])
    >>> image.ravel(), labels.tolist()
    (array([3., 2., 1.]), [[0, 0, 2]])
    """
    for axis in axes:
        if not -labels.ndim <= axis < labels.ndim:
            raise ValueError(f"found axis {axis}, expected one of {labels.ndim} spatial axes")
        if rng.random() < 0.5:
            image, labels = (np.flip(a, axis % labels.ndim) for a in (image, labels))
            if pairs and axis % labels.ndim == labels.ndim - 1:
                labels = permutation(256, pairs).astype(labels.dtype)[labels]
    return image, labels


def intensity(image: np.ndarray, rng: np.random.Generator, gain: float = 0.1,
              shift: float = 0.1) -> np.ndarray:
    """Per channel a x + b, a in 1 +- gain, b in +- shift (in standard deviations), dtype kept.

    >>> changed = ts.data.augment.intensity(np.ones((4, 5, 2)), np.random.default_rng(0), shift=0)
    >>> bool(0.9 <= changed.min() <= changed.max() <= 1.1), np.ptp(changed, axis=(0, 1))
    (True, array([0., 0.]))
    """
    channels = image.shape[-1:]
    a = rng.uniform(1 - gain, 1 + gain, channels)
    b = rng.uniform(-shift, shift, channels)
    return image * a.astype(image.dtype) + b.astype(image.dtype)


def mild(image: np.ndarray, labels: np.ndarray, rng: np.random.Generator,
         pairs: Sequence[tuple[int, int]] | None = ()) -> tuple[np.ndarray, np.ndarray]:
    """Left-right reflection and a little contrast and brightness: the default.

    `pairs` of classes change places in the reflection; None leaves it out. Mild on purpose. Full
    rotations and reflections cost about 20 points of Dice on NIH Pancreas-CT
    (github.com/HiLab-git/DTC, issue 10): the pancreas is found by where it lies. Left-right stays
    because the headers of some public scans are mirrored.

    >>> image, labels = np.ones((4, 6, 1)), np.arange(24).reshape(4, 6)
    >>> _, seen = ts.data.augment.mild(image, labels, np.random.default_rng(2))
    >>> np.array_equal(seen, labels[:, ::-1])
    True
    """
    if pairs is not None:
        image, labels = flip(image, labels, rng, (LEFT_RIGHT,), pairs)
    return intensity(image, rng), labels


def blur(x: np.ndarray, sigmas: Sequence[float]) -> np.ndarray:
    """A channel (*S) through a Gaussian, one sigma in voxels per axis; beyond the edge, the
    edge.

    >>> ts.data.augment.blur(np.array([0.0, 0.0, 1.0, 0.0, 0.0]), [1.0]).round(1)
    array([0.1, 0.2, 0.4, 0.2, 0.1])
    """
    from scipy.ndimage import gaussian_filter1d  # takes longer than all of tinyseg to import

    for axis, sigma in enumerate(sigmas):
        x = gaussian_filter1d(x, sigma, axis, mode="nearest")
    return x


def contrast(x: np.ndarray, factor: float) -> np.ndarray:
    """A channel's distance from its mean, times `factor`, cut off at the range that it had.

    >>> ts.data.augment.contrast(np.array([0.0, 1.0, 2.0, 3.0, 4.0]), 2)
    array([0., 0., 2., 4., 4.])
    """
    mean = x.mean()
    return np.clip(mean + factor * (x - mean), x.min(), x.max())


def low_resolution(x: np.ndarray, share: float, axes: Sequence[int]) -> np.ndarray:
    """A channel (*S) as a scan would have it that has a `share` of the voxels along each of the
    axes: the nearest ones, interpolated linearly.

    >>> ts.data.augment.low_resolution(np.array([0.0, 1.0, 2.0, 3.0]), 0.5, axes=[0])
    array([1. , 1.5, 2.5, 3. ], dtype=float32)
    """
    small = [max(1, round(n * share)) if axis in axes else n for axis, n in enumerate(x.shape)]
    return resample(resample(x, tuple(small), 0), x.shape, 1)


def gamma(x: np.ndarray, exponent: float) -> np.ndarray:
    """((x - min) / (max - min)) ** exponent, with the mean and the standard deviation of x.

    >>> x = np.array([0.0, 3.0, 4.0])
    >>> y = ts.data.augment.gamma(x, 2)
    >>> np.allclose([y.mean(), y.std()], [x.mean(), x.std()])
    True
    >>> round(float((y[1] - y[0]) / (y[2] - y[0])), 4)  # (3 / 4)**2
    0.5625
    """
    low, high = x.min(), x.max()
    if low == high:
        return x
    y = ((x - low) / (high - low)) ** exponent
    return (y - y.mean()) * (x.std() / y.std()) + x.mean()


class Change(NamedTuple):
    """A change happens with a probability, by an amount between `low` and `high`, in each channel
    with the probability `channels`.

    >>> change = ts.data.augment.Change(probability=0.5, low=0.5, high=3)
    >>> 0.5 <= change.uniform(np.random.default_rng(0)) <= 3
    True
    """

    probability: float = 0.0
    low: float = 1.0
    high: float = 1.0
    channels: float = 1.0

    def uniform(self, rng: np.random.Generator) -> float:
        """An amount between `low` and `high`."""
        return rng.uniform(self.low, self.high)

    def factor(self, rng: np.random.Generator) -> float:
        """An amount that is above one as often as below it, as nnU-Net draws factors."""
        return float(np.interp(rng.random(), (0, 0.5, 1), (self.low, 1, self.high)))


# Of one channel (*S), in this order: (x, change, rng, axes of fine spacing) -> x.
INTENSITIES: dict[str, Callable[[np.ndarray, Change, np.random.Generator, list[int]], Any]] = {
    "noise": lambda x, change, rng, _: (
        x + change.uniform(rng) * rng.standard_normal(x.shape, np.float32)),
    "blur": lambda x, change, rng, _: blur(x, [change.uniform(rng) for _ in x.shape]),
    "brightness": lambda x, change, rng, _: x * change.factor(rng),
    "shift": lambda x, change, rng, _: x + change.uniform(rng),
    "contrast": lambda x, change, rng, _: contrast(x, change.factor(rng)),
    "low_resolution": lambda x, change, rng, axes: low_resolution(x, change.uniform(rng), axes),
    "inverted_gamma": lambda x, change, rng, _: -gamma(-x, change.factor(rng)),
    "gamma": lambda x, change, rng, _: gamma(x, change.factor(rng)),
}
WITHIN = {  # what the ends of a range may be: (least, most) of the low end, and of the high one
    "rotation": (-180, 180, -180, 180), "plane_rotation": (-180, 180, -180, 180),
    "scale": (0.1, 10, 0.1, 10), "noise": (0, math.inf, 0, math.inf),
    "blur": (0, math.inf, 0, math.inf), "shift": (-math.inf, math.inf, -math.inf, math.inf),
    "low_resolution": (0.01, 1, 0.01, 1),
    **dict.fromkeys(("brightness", "contrast"), (0, 1, 1, math.inf)),
    **dict.fromkeys(("inverted_gamma", "gamma"), (0.1, 1, 1, 10))}


@dataclass(frozen=True)
class Augmentation:
    """Random changes of patches; what is not named never happens. What the data decide, spacing
    and pairs, is put in by `preset`. `Augmentation(**asdict(a)) == a`, through JSON too.

    `sampling.patch` takes `spatial` and resamples once, from the case; a call does the rest.
    Intensities are meant to be z-scores: noise and shift are in standard deviations.

    >>> augment = ts.data.augment.Augmentation(shift=(1, 2, 2))  # always, by 2
    >>> image, labels = np.zeros((1, 3, 1)), np.array([[0, 1, 1]])
    >>> augment(image, labels, np.random.default_rng(0))[0].ravel()
    array([2., 2., 2.])
    """

    rotation: Change = Change()  # degrees about each of three axes
    plane_rotation: Change = Change()  # degrees, in slices and in volumes of thick slices
    scale: Change = Change()  # voxels of the case per voxel of the patch: above 1, all is smaller
    noise: Change = Change()  # standard deviation
    blur: Change = Change()  # sigma in voxels, each axis its own
    brightness: Change = Change()  # factor
    shift: Change = Change()  # summand
    contrast: Change = Change()  # factor
    low_resolution: Change = Change()  # share of the voxels along an axis
    inverted_gamma: Change = Change()  # exponent
    gamma: Change = Change()  # exponent
    mirror: tuple[int, ...] = ()  # axes, from the last: -1 is left-right
    pairs: tuple[tuple[int, int], ...] | None = ()  # classes, see `flip`; None: no left-right
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)  # of the prepared cases, mm along (D, H, W)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in WITHIN:
                value = Change(*value)
                if wrong := _fault(value, WITHIN[field.name]):
                    raise ValueError(f"found {field.name} {tuple(value)}, expected {wrong}")
            elif value is not None:
                value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
            object.__setattr__(self, field.name, value)
        if not set(self.mirror) <= {-1, -2, -3} or len(set(self.mirror)) < len(self.mirror):
            raise ValueError(f"found mirror {self.mirror}, expected axes out of -3, -2 and -1,"
                             " each once")
        if len(self.spacing) != 3 or not all(0 < s < math.inf for s in self.spacing):
            raise ValueError(f"found spacing {self.spacing}, expected three positive numbers, of"
                             " mm along (D, H, W)")

    def spatial(self, rng: np.random.Generator, size: Sequence[int]) -> np.ndarray | None:
        """Where the voxels of a patch of `size` lie in the case, both counted from one point: the
        matrix (rank, rank) in voxels; None where it is the identity.

        It turns and scales in millimetres: S^-1 (scale R) S with the spacing S. Axes of thick
        slices, whose spacing is over 3 times the finest (nnU-Net's rule, its "dummy 2D"), and axes
        of one voxel stay as they are.

        >>> augment = ts.data.augment.Augmentation(scale=(1, 2, 2), spacing=(5, 1, 1))
        >>> augment.spatial(np.random.default_rng(0), size=(4, 6, 8)).tolist()  # thick slices stay
        [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]
        """
        spacing = np.array(self.spacing[-len(size):])
        axes = _fine(size, spacing)
        turn = self.rotation if len(axes) > 2 else self.plane_rotation
        turned, scaled = (rng.random() < change.probability for change in (turn, self.scale))
        if not turned and not scaled:
            return None
        matrix = np.eye(len(size))
        for a, b in combinations(axes if turned else [], 2):
            angle, plane = math.radians(turn.uniform(rng)), np.eye(len(size))
            plane[a, a] = plane[b, b] = math.cos(angle)
            plane[a, b], plane[b, a] = -math.sin(angle), math.sin(angle)
            matrix = matrix @ plane
        if scaled:
            matrix[axes] *= self.scale.uniform(rng)
        return matrix * spacing / spacing[:, None]

    def __call__(self, image: np.ndarray, labels: np.ndarray, rng: np.random.Generator
                 ) -> tuple[np.ndarray, np.ndarray]:
        """All but `spatial`: image (*S, C) and labels (*S), which are not written into."""
        axes = _fine(labels.shape, np.array(self.spacing[-labels.ndim:]))
        changed = image
        for name, apply in INTENSITIES.items():
            change: Change = getattr(self, name)
            if rng.random() >= change.probability:
                continue
            if changed is image:
                changed = image.copy()
            for c in range(image.shape[-1]):
                if rng.random() < change.channels:
                    changed[..., c] = apply(changed[..., c], change, rng, axes)
        mirror = [axis for axis in self.mirror if axis >= -labels.ndim
                  and (axis != LEFT_RIGHT or self.pairs is not None)]
        return flip(changed, labels, rng, mirror, self.pairs or ())


def _fine(size: Sequence[int], spacing: np.ndarray) -> list[int]:
    """The axes that are neither one voxel long nor those of thick slices."""
    finest = min((s for n, s in zip(size, spacing, strict=True) if n > 1), default=0)
    return [axis for axis, (n, s) in enumerate(zip(size, spacing, strict=True))
            if n > 1 and s <= THICK * finest]


def _fault(change: Change, within: tuple[float, float, float, float]) -> str:
    """What a change should be and is not, or ""."""
    least, most, least_high, most_high = within
    if not (0 <= change.probability <= 1 and 0 <= change.channels <= 1):
        return "probabilities from 0 to 1"
    if not (least <= change.low <= most and least_high <= change.high <= most_high
            and change.low <= change.high):
        return (f"a range that begins between {least:g} and {most:g} and ends, no lower, between "
                f"{least_high:g} and {most_high:g}")
    return ""


# nnU-Net's are those of nnUNetTrainer.get_training_transforms (version 2; batchgeneratorsv2 draws
# noise by a standard deviation that it calls variance). Two of its rules are left out: that slices
# turn by 15 degrees at most where patches are oblong, for here a patch has no corners to lose; and
# that all channels share one noise.
PRESETS = {
    "none": Augmentation(),
    "mild": Augmentation(
        rotation=Change(0.5, -15, 15), plane_rotation=Change(0.5, -15, 15),
        scale=Change(0.5, 0.85, 1.18), noise=Change(0.1, 0, 0.05), blur=Change(0.1, 0.3, 0.7),
        brightness=Change(0.5, 0.9, 1.1), shift=Change(0.5, -0.1, 0.1),
        contrast=Change(0.3, 0.9, 1.1), gamma=Change(0.2, 0.85, 1.2), mirror=(LEFT_RIGHT,)),
    "nnunet": Augmentation(
        rotation=Change(0.2, -30, 30), plane_rotation=Change(0.2, -180, 180),
        scale=Change(0.2, 0.7, 1.4), noise=Change(0.1, 0, 0.1), blur=Change(0.2, 0.5, 1, 0.5),
        brightness=Change(0.15, 0.75, 1.25), contrast=Change(0.15, 0.75, 1.25),
        low_resolution=Change(0.25, 0.5, 1, 0.5), inverted_gamma=Change(0.1, 0.7, 1.5),
        gamma=Change(0.3, 0.7, 1.5), mirror=(-3, -2, -1)),
}


def preset(name: str, spacing: Sequence[float], pairs: Iterable[tuple[int, int]] | None = ()
           ) -> Augmentation:
    """One of `PRESETS` for cases of this spacing in mm, whose classes change places in the mirror
    as `pairs` says. ValueError for another name.

    >>> augment = ts.data.augment.preset("mild", spacing=(5, 1, 1), pairs=[(1, 2)])
    >>> augment.mirror, augment.pairs, augment.rotation[:3]
    ((-1,), ((1, 2),), (0.5, -15, 15))
    """
    if name not in PRESETS:
        raise ValueError(f"found the augmentation {name!r}, expected one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], spacing=tuple(spacing),
                   pairs=None if pairs is None else tuple(pairs))
