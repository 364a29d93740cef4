"""Intensity and spacing: what turns a scan in file units into what a network sees, and back.

Geometry in two rules. A grid of spacing s and n voxels becomes one of max(1, round(n s / s'))
voxels, and the corners of the volume stay in place: its spacing is then n s / m exactly (m voxels),
and its first centre moves from s / 2 to n s / (2 m) behind the corner.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .nifti import LARGEST, Volume

SAMPLES = 10_000  # foreground voxels drawn per case: percentiles to 0.1 %, 281 cases in 11 MB
LONGEST = 4096  # voxels along an axis for cubic splines, whose weights are a square matrix
BLOCK = 2**25  # bytes of linear interpolation at a time: beside the result it needs little
ODD = 8  # times the others' size: no two bodies differ so, and centimetres taken for mm do by 10
THICK = 3  # slices are thick that exceed the finest spacing by this factor; nnU-Net's threshold


def resample(array: np.ndarray, shape: tuple[int, ...],
             order: int | Sequence[int] = 1) -> np.ndarray:
    """Interpolation (*S, ...) -> (*shape, ...) float32 over the first len(shape) axes.

    order, one for all or one per axis: 0 takes the nearest voxel, 1 is linear, 3 a cubic spline.
    The corners of the volume stay in place: voxel i of n' looks at (i + 1/2) n/n' - 1/2, clamped
    to the outermost centres (PyTorch's align_corners=False, scipy's zoom with grid_mode). There is
    no low-pass filter. Splines overshoot at edges; what leaves the range of its channel is clipped
    (so does scikit-image's resize, which nnU-Net calls).

    ValueError where the shapes do not fit or an order is another number.
    """
    if len(shape) > array.ndim or min(shape) < 1 or 0 in array.shape:
        raise ValueError(f"cannot resample an array of shape {array.shape} to {tuple(shape)}")
    orders = np.broadcast_to(order, len(shape)).tolist()
    if not set(orders) <= ALONG.keys():
        raise ValueError(f"cannot resample by order {order}, expected one of {sorted(ALONG)}")
    result = array = np.asarray(array, dtype=np.float32)
    # All are tensor products, so one axis at a time is exact. The axis that shrinks most goes
    # first, so the others have less to do.
    for axis in sorted(range(len(shape)), key=lambda axis: shape[axis] / array.shape[axis]):
        if result.shape[axis] != shape[axis]:
            result = ALONG[orders[axis]](result, axis, shape[axis])
    if 3 in orders and result is not array:
        space = tuple(range(len(shape)))
        result = np.clip(result, array.min(space), array.max(space), order="C")
    return result


def _nearest(array: np.ndarray, axis: int, m: int) -> np.ndarray:
    return array.take((2 * np.arange(m) + 1) * array.shape[axis] // (2 * m), axis)


def _linear(array: np.ndarray, axis: int, m: int) -> np.ndarray:
    n = array.shape[axis]
    x = np.clip((np.arange(m) + 0.5) * (n / m) - 0.5, 0, n - 1)
    left = np.minimum(x.astype(int), max(n - 2, 0))
    weight = (x - left).astype(np.float32).reshape(-1, *(1,) * (array.ndim - 1 - axis))
    result = np.empty((*array.shape[:axis], m, *array.shape[axis + 1 :]), np.float32)
    count = max(1, BLOCK * m // result.nbytes)
    for start in range(0, m, count):
        part = slice(start, start + count)
        value = array.take(left[part], axis)
        step = array.take(np.minimum(left[part] + 1, n - 1), axis)
        step -= value
        step *= weight[part]
        value += step  # a + t (b - a): constants stay exactly constant
        result[(slice(None),) * axis + (part,)] = value
    return result


def _cubic(array: np.ndarray, axis: int, m: int) -> np.ndarray:
    from scipy.ndimage import zoom  # slow to import, and most plans are linear

    n = array.shape[axis]
    if max(n, m) > LONGEST:
        raise ValueError(f"cannot resample {n} voxels to {m} by splines, expected up to {LONGEST}")
    # A spline depends linearly on its samples: SciPy's zoom of the identity holds the weights,
    # and one matrix product applies them, in a tenth of the time that zoom takes for the volume.
    weights = zoom(np.eye(n), (m / n, 1), order=3, mode="nearest", grid_mode=True)
    return np.moveaxis(np.tensordot(weights.astype(np.float32), array, (1, axis)), 0, axis)


ALONG = {0: _nearest, 1: _linear, 3: _cubic}  # order -> (array, axis, length) -> array


def resample_labels(labels: np.ndarray, shape: tuple[int, ...],
                    order: int | Sequence[int] = 1) -> np.ndarray:
    """Label map (*S) -> (*shape), same dtype: the class whose indicator, resampled, is largest.

    The same code path as the image, so both stay aligned; ties go to the smaller label, and no
    class appears that was not there (interpolating label numbers would invent some).
    """
    if labels.dtype.kind not in "biu":
        raise ValueError(f"found labels of {labels.dtype}, expected integers")
    if labels.shape == tuple(shape):
        return labels.copy()
    result = np.zeros(shape, labels.dtype)
    best = np.full(shape, -1, np.float32)
    for label in np.unique(labels):
        share = resample(labels == label, shape, order)
        closer = share > best
        result[closer] = label
        np.maximum(best, share, out=best)
    return result


def thick_axis(spacing: Sequence[float], target: Sequence[float]) -> int | None:
    """The axis of thick slices when a grid of `spacing` goes to `target` (mm), or None.

    nnU-Net's rule (default_resampling.py): where the coarsest spacing is over 3 times the finest,
    in the source or else in the target, the coarsest axis; none where two are as coarse (to 0.1 %).
    """
    for lengths in (spacing, target):
        if max(lengths) > THICK * min(lengths):
            coarse = [axis for axis, s in enumerate(lengths) if s > 0.999 * max(lengths)]
            return coarse[0] if len(coarse) == 1 else None
    return None


@dataclass(frozen=True, eq=False)
class Sample:
    """What a plan asks of one case, in at most 40 kB a channel: its grid, and its foreground.

    shape: (D, H, W, C); spacing in mm; inhabited: whether a voxel is labelled above 0; foreground:
    {channel: (n,) values of up to SAMPLES voxels that are}, of the channels that are CT.
    """

    image: Path
    label: Path
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    inhabited: bool
    foreground: dict[int, np.ndarray]


def sample(case: Any, content: tuple[Volume, np.ndarray], rng: np.random.Generator) -> Sample:
    """The sample of a case, given its content: what `case.read()` returned."""
    volume, label = content
    labelled, drawn = label > 0, {}
    for channel, name in enumerate(case.modalities.values()):
        if name.strip().lower() == "ct":
            voxels = volume.array[..., channel][labelled]
            drawn[channel] = rng.choice(voxels, min(len(voxels), SAMPLES), replace=False) \
                if len(voxels) else voxels
    shape = (*volume.array.shape[:3], len(case.modalities))
    return Sample(volume.path, case.label, shape, volume.spacing, bool(labelled.any()), drawn)


@dataclass(frozen=True)
class Plan:
    """How scans are prepared. spacing: mm along (D, H, W); clip, mean, std: in the scan's units.

    clip (low, high), mean and std are those of all channels, or tuples with one for each channel.
    A channel without mean and std is standardised by its own in every scan (MRI has no unit).
    order: how images are interpolated, 1 linear or 3 cubic; label maps and a network's scores are
    always linear. blend_slices=False takes the nearest of thick slices (`thick_axis`) instead of
    blending two, in images, labels and scores. nnU-Net is order=3, blend_slices=False.
    mirror: pairs of names of classes that change places where an image is reflected left-right;
    None where it must not be.

    Cubic keeps more: CT slices clipped to [-92, 217] that go to 0.9 times their size and back are
    off by 4.5 HU (RMS), 8.2 if linear. Linear is the default because the figures of this project
    were made with it. Blending is, because it is closer to the truth wherever slices are aligned:
    of an abdominal CT every fifth slice, 15 mm apart, brought back to 3 mm, is off by 28 HU blended
    and 32 nearest (24.0 and 24.8 for means of five slices), and label maps are the same both ways.
    nnU-Net's reason for nearest are slices that moved against each other.

    Plan(**dataclasses.asdict(plan)) == plan, also through JSON; plans stored before order,
    blend_slices and mirror existed mean their defaults.
    """

    spacing: tuple[float, ...]
    clip: tuple[Any, ...] | None = None
    mean: float | tuple[float | None, ...] | None = None
    std: float | tuple[float | None, ...] | None = None
    order: int = 1
    blend_slices: bool = True
    mirror: tuple[tuple[str, str], ...] | None = ()

    def __post_init__(self) -> None:
        for name in ("spacing", "clip", "mean", "std"):  # lists, as JSON has them, become tuples
            object.__setattr__(self, name, _floats(getattr(self, name)))
        if len(self.spacing) != 3 or not all(0 < s < np.inf for s in self.spacing):
            raise ValueError(f"found spacing {self.spacing}, expected three positive lengths in mm")
        counts = {len(part) if isinstance(part, tuple) else 0
                  for part in (self.clip, self.mean, self.std)}
        if isinstance(self.mean, tuple) and (len(counts) > 1 or counts == {0}):
            raise ValueError(f"found clip {self.clip}, mean {self.mean} and std {self.std},"
                             " expected one of each for every channel")
        for clip, mean, std in self.rules(1):
            if clip is not None and not (
                    isinstance(clip, tuple) and [float] * 2 == list(map(type, clip))
                    and clip[0] < clip[1]):
                raise ValueError(f"found clip {clip}, expected (low, high) with low < high")
            if type(mean) is not type(std) or isinstance(std, tuple):
                raise ValueError(f"found mean {mean} and std {std}, expected both or none")
            if mean is not None and not (np.isfinite(mean) and 0 < std < np.inf):
                raise ValueError(f"found mean {mean}, std {std}, expected finite, std > 0")
        if self.order not in (1, 3) or not isinstance(self.blend_slices, bool):
            raise ValueError(f"found order {self.order} and blend_slices {self.blend_slices},"
                             " expected 1 (linear) or 3 (cubic), and true or false")
        if self.mirror is not None:
            object.__setattr__(self, "mirror", tuple(map(tuple, self.mirror)))
            names = [name for pair in self.mirror for name in pair]
            if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names) \
                    or not all(len(pair) == 2 for pair in self.mirror):
                raise ValueError(f"found {self.mirror} to change places when mirrored, expected"
                                 " pairs of class names, each name once")

    @classmethod
    def fit(cls, cases: Iterable[Any], spacing: tuple[float, ...] | None = None, *,
            seed: int = 0) -> Plan:
        """The plan that training cases, or samples of them, ask for; spacing is their median unless
        given.

        Channels of CT (Hounsfield units mean the same in every scan): nnU-Net's fingerprint, the
        0.5 and 99.5 percentiles, mean and standard deviation of the foreground voxels (Isensee et
        al. 2021). Others are standardised scan by scan.

        ValueError, naming file or folder, where there is no foreground, CT is constant there, or a
        scan is too small or large for the spacing. Warns of a scan whose size makes no sense among
        the others: a middle extent that is over 8 times theirs or under an eighth.
        """
        rng = np.random.default_rng(seed)
        found = [case if isinstance(case, Sample) else sample(case, case.read(), rng)
                 for case in cases]
        if not found:
            raise ValueError("found no cases to fit a plan to, expected at least one")
        if not any(each.inhabited for each in found):
            raise ValueError(f"{found[-1].label.parent}: found no foreground voxel in any of"
                             f" {len(found)} label maps, expected labels above 0; are these the"
                             " label maps of the scans?")
        rules: list[tuple] = []
        for channel in range(found[-1].shape[3]):
            drawn = [each.foreground[channel] for each in found if channel in each.foreground]
            pooled = np.concatenate([[], *drawn]).astype(np.float64)
            low, high = np.percentile(pooled, (0.5, 99.5)) if len(pooled) else (0, 0)
            if len(drawn) < len(found):
                rules.append((None, None, None))
            elif low < high:
                rules.append(((low, high), float(pooled.mean()), float(pooled.std())))
            else:
                raise ValueError(f"{found[-1].image.parent}: found the value {low:g} in all of the"
                                 f" foreground of channel {channel}, a CT, expected Hounsfield"
                                 " units that differ; bring the scans of these label maps, or give"
                                 " the channel another modality than CT")
        same = len(set(rules)) == 1  # then one for all
        plan = cls(tuple(np.median([each.spacing for each in found], axis=0)) if spacing is None
                   else spacing, *(rules[0] if same else zip(*rules, strict=True)))
        middle = [sorted(np.multiply(each.shape[:3], each.spacing))[1] for each in found]
        for each, extent in zip(found, middle, strict=True):
            plan._grid(each.shape, each.spacing, each.image)
            if not 1 / ODD < extent / np.median(middle) < ODD:
                warnings.warn(f"{each.image}: found a scan of {each.shape[:3]} voxels of"
                              f" {mm(each.spacing)}, while the others are about"
                              f" {np.median(middle):.3g} mm wide; is its unit of length right?",
                              stacklevel=2)
        return plan

    def rules(self, channels: int) -> list[tuple]:
        """(clip, mean, std) of each channel: of as many as the plan has, or of `channels` alike."""
        rule: tuple[Any, ...] = self.clip, self.mean, self.std
        return list(zip(*rule, strict=True)) if isinstance(self.mean, tuple) else [rule] * channels

    @property
    def window(self) -> tuple[float, float]:
        """(low, high) to show the first channel between; infinite where it is not clipped."""
        return self.rules(1)[0][0] or (-np.inf, np.inf)

    def shape(self, shape: tuple[int, ...], spacing: tuple[float, ...]) -> tuple[int, ...]:
        """The shape of a grid of this spacing over the same extent, max(1, round(n s / s'))."""
        return tuple(max(1, round(n * s / t))
                     for n, s, t in zip(shape, spacing, self.spacing, strict=True))

    def prepare(self, volume: Volume) -> np.ndarray:
        """volume.array (D, H, W[, C]) -> (D', H', W', C) float32: normalised, then resampled.

        In this order, as nnU-Net does: a clipped scan has no metal for interpolation to smear.
        ValueError, naming the file, where the scan has other channels than the plan, or nothing or
        too much is left of it at the plan's spacing.
        """
        image = np.array(volume.array, dtype=np.float32, order="C")  # a copy, changed in place
        image = image[..., None] if image.ndim == 3 else image
        grid = self._grid(image.shape, volume.spacing, volume.path)
        rules = self.rules(image.shape[3])
        if len(rules) != image.shape[3]:
            raise ValueError(f"{volume.path}: found {image.shape[3]} channels, expected"
                             f" {len(rules)}, of which the plan was made")
        channels = np.moveaxis(image, -1, 0)  # views: NumPy is slow along an axis of two or three
        for channel, (clip, _, _) in zip(channels, rules, strict=True):
            if clip:
                np.clip(channel, *clip, out=channel)
        mean, std = np.array([rule[1:] for rule in rules], np.float32).T  # None is NaN
        if (own := np.isnan(mean)).any():
            # Slice by slice: NumPy's own std would hold the whole scan in float64.
            middle = image.mean((0, 1, 2), dtype=np.float64)
            spread = np.mean([((row - middle) ** 2).mean((0, 1)) for row in image], axis=0)
            mean[own] = middle[own]
            std[own] = np.maximum(np.sqrt(spread[own]), 1e-8)  # a constant channel becomes zero
        for channel, shift, scale in zip(channels, mean, std, strict=True):
            channel -= shift
            channel /= scale
        return resample(image, grid, self._orders(self.order, volume.spacing))

    def prepare_labels(self, label: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
        """Map of classes (D, H, W) of `spacing` -> (D', H', W') uint8 on the grid of `prepare`."""
        if label.size and not 0 <= label.min() <= label.max() <= 255:
            raise ValueError(f"found labels from {label.min()} to {label.max()}, expected classes"
                             " from 0 to 255")
        grid = self._grid(label.shape, spacing)
        return resample_labels(label, grid, self._orders(1, spacing)).astype(np.uint8)

    def _orders(self, order: int, source: Sequence[float]) -> tuple[int, ...]:
        thick = None if self.blend_slices else thick_axis(source, self.spacing)
        return tuple(0 if axis == thick else order for axis in range(3))

    def _grid(self, shape: tuple[int, ...], spacing: tuple[float, ...],
              path: Path | None = None) -> tuple[int, ...]:
        """`shape` where something is left of every axis of several voxels, and memory holds it."""
        grid = self.shape(shape[:3], spacing)
        lost = any(n > 1 and n * s < t / 2
                   for n, s, t in zip(shape, spacing, self.spacing, strict=False))
        if lost or 4 * math.prod(grid) * math.prod(shape[3:]) > LARGEST:
            what = "less than half a voxel along an axis" if lost else f"over {LARGEST >> 30} GiB"
            raise ValueError(f"{path}: " * bool(path) + f"found a scan of {shape[:3]} voxels of"
                             f" {mm(spacing)}, which the plan's spacing of {mm(self.spacing)}"
                             f" makes {grid} voxels, {what}; ask for another spacing, or mend the"
                             " file if its unit of length is wrong")
        return grid


def mm(lengths: Iterable[float]) -> str:
    """Lengths as a person reads them, 2.5 x 0.8 x 0.8 mm."""
    return f"{' x '.join(f'{length:.3g}' for length in lengths)} mm"


def _floats(value: Any) -> Any:
    if isinstance(value, list | tuple | np.ndarray):
        return tuple(map(_floats, value))
    return None if value is None else float(value)
