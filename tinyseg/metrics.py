"""How well two masks agree, in volume and at their surfaces: per class, per case, and the mean.

What empty masks score, here and nowhere else:

    masks that are empty   dice, iou, surface_dice   hausdorff95, mean_surface_distance
    both                   NaN, nothing to compare   NaN
    exactly one            0                         infinity

Means leave out what is not finite, and `counts` says how often that was: one missed tumour would
make a mean distance infinite, and a mean over the found ones says nothing about the missed ones.
Overlap follows nnU-Net v2, surfaces follow DeepMind's `surface-distance` (Nikolov et al. 2018,
arXiv:1809.04430) to rounding. Volumes are scored whole: a mean of slice scores is another number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf, isfinite, isinf, nan
from typing import NamedTuple

import numpy as np

from .facets import facets

Scores = dict[str, dict[str, float]]


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """2 |P and R| / (|P| + |R|) of two boolean masks of one shape, any rank.

    >>> ts.metrics.dice(np.array([True, True, False]), np.array([False, True, False]))
    0.6666666666666666
    """
    both, p, r = _counts(prediction, reference)
    return 2 * both / (p + r) if p + r else nan


def iou(prediction: np.ndarray, reference: np.ndarray) -> float:
    """|P and R| / |P or R| (Jaccard) of two boolean masks of one shape, any rank.

    >>> ts.metrics.iou(np.array([True, True, False]), np.array([False, True, False]))
    0.5
    """
    both, p, r = _counts(prediction, reference)
    return both / (p + r - both) if p + r else nan


def volume(mask: np.ndarray, spacing: Sequence[float]) -> float:
    """The volume in ml of a boolean mask (D, H, W) whose voxels measure `spacing` mm.

    >>> ts.metrics.volume(np.ones((2, 3, 4), bool), spacing=(10, 5, 2))
    2.4
    """
    mask = _mask(mask)
    if mask.ndim != 3:
        raise ValueError(f"found a mask of shape {mask.shape}, expected three axes: (D, H, W)")
    return float(np.count_nonzero(mask) * np.prod(_spacing(spacing, 3)) / 1000)


def surface_dice(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float],
                 tolerance: float) -> float:
    """The share of both surfaces that lies within `tolerance` mm of the other one, by area.

    Also called normalised surface distance. Two boolean masks (H, W) or (D, H, W), spacing in mm.

    >>> p, r = np.zeros((2, 8, 8, 8), bool)
    >>> p[2:6, 2:6, 2:6] = r[2:6, 2:6, 3:7] = True  # a cube, and it moved by a voxel of 2 mm
    >>> [round(ts.metrics.surface_dice(p, r, (3, 1, 2), mm), 2) for mm in (0, 1, 2)]
    [0.71, 0.77, 1.0]
    """
    return surface_distances(prediction, reference, spacing).dice(tolerance)


def hausdorff95(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> float:
    """The distance in mm within which 95% of either surface, by area, has the other one.

    The larger of the two directed percentiles. Two boolean masks (H, W) or (D, H, W).

    >>> p, r = np.zeros((2, 6, 9), bool)
    >>> p[1:4, 1:3] = r[1:4, 1:6] = True  # 3 pixels more along W
    >>> ts.metrics.hausdorff95(p, r, spacing=(1, 2))
    6.0
    """
    return max(surface_distances(prediction, reference, spacing).percentiles(95))


def mean_surface_distance(prediction: np.ndarray, reference: np.ndarray,
                          spacing: Sequence[float]) -> float:
    """The mean distance in mm from one surface to the other, by area, averaged over both ways.

    Both ways weigh the same however large either surface is. To have them one by one, call
    `surface_distances(...).averages()`. Two boolean masks (H, W) or (D, H, W); spacing in mm.

    >>> mask = np.eye(5, 7) > 0
    >>> ts.metrics.mean_surface_distance(mask, mask, spacing=(2, 3))
    0.0
    """
    return sum(surface_distances(prediction, reference, spacing).averages()) / 2


class Surface(NamedTuple):
    """The surfels (surface elements) of one mask, in ascending order of their distance.

    distances (n,) in mm to the other mask's surface, infinite where that mask is empty;
    areas (n,) in mm^2, for masks of rank 2 lengths in mm.

    >>> square = np.ones((3, 4), bool)
    >>> float(ts.metrics.surface_distances(square, square, (1, 1)).prediction.areas.sum())
    12.82842712474619

    Its outline is 14 long but for four corners, each cut off by half a diagonal: 10 + 4 / sqrt(2).
    """

    distances: np.ndarray
    areas: np.ndarray


@dataclass(frozen=True, eq=False)
class Surfaces:
    """The surfaces of a prediction and a reference, each with its distances to the other one.

    >>> p, r = np.zeros((2, 6, 9), bool)
    >>> p[1:4, 1:3] = r[1:4, 1:6] = True  # 3 pixels more along W
    >>> ts.metrics.surface_distances(p, r, spacing=(1, 1)).percentiles(100)
    (1.0, 3.0)
    """

    prediction: Surface
    reference: Surface

    def dice(self, tolerance: float) -> float:
        """(area of both surfaces within `tolerance` mm of the other one) / (area of both)."""
        if not (isfinite(tolerance) and tolerance >= 0):
            raise ValueError(f"found the tolerance {tolerance}, expected millimetres from 0")
        sides = self.prediction, self.reference
        total = sum(side.areas.sum() for side in sides)
        near = sum(side.areas[side.distances <= tolerance].sum() for side in sides)
        return float(near / total) if total else nan

    def percentiles(self, percent: float) -> tuple[float, float]:
        """The distance in mm that `percent` of each surface, by area, stays within.

        The first surfel, in order of distance, at which the area so far reaches the share.
        """
        def reach(side: Surface) -> float:
            share = np.cumsum(side.areas) / side.areas.sum()
            last = len(share) - 1  # where rounding leaves the sum of the shares below 1
            return side.distances[min(int(np.searchsorted(share, percent / 100)), last)]

        return self._each(reach)

    def averages(self) -> tuple[float, float]:
        """The mean distance in mm by area, (prediction to reference, reference to prediction)."""
        return self._each(lambda side: (side.distances * side.areas).sum() / side.areas.sum())

    def _each(self, measure: Callable[[Surface], float]) -> tuple[float, float]:
        found = [len(side.areas) > 0 for side in (self.prediction, self.reference)]
        if not all(found):
            return (inf, inf) if any(found) else (nan, nan)
        return float(measure(self.prediction)), float(measure(self.reference))


def surface_distances(prediction: np.ndarray, reference: np.ndarray,
                      spacing: Sequence[float]) -> Surfaces:
    """How far the surfaces of two boolean masks, (H, W) or (D, H, W), are apart; spacing in mm.

    A surfel stands at each point where 2^rank voxels meet of which some are in the mask and some
    are not (outside the array nothing is), its area is that of the marching-cubes surface between
    them. It is as far from the other surface as from that one's nearest surfel.

    Time and memory go with the box around both masks, about 20 bytes a voxel of it.

    >>> one, other = np.zeros((2, 1, 3, 9), bool)
    >>> one[0, 1, 2] = other[0, 1, 6] = True  # the far sides are four voxels of 5 mm away
    >>> ts.metrics.surface_distances(one, other, (2, 2, 5)).percentiles(100)
    (20.0, 20.0)
    """
    prediction, reference = _pair(prediction, reference)
    rank = prediction.ndim
    if rank not in (2, 3):
        raise ValueError(f"found masks of shape {prediction.shape}, expected 2 or 3 axes")
    steps = _spacing(spacing, rank)
    box = _box(prediction | reference)
    codes = [_neighbours(mask[box]) for mask in (prediction, reference)]
    border = [(code > 0) & (code < 2 ** 2**rank - 1) for code in codes]
    # A facet's normal, as long as its area, shrinks and grows with the steps of the *other* axes.
    areas = np.linalg.norm(facets(rank) * (steps.prod() / steps), axis=-1).sum(axis=-1)

    def seen(mine: int, other: int) -> Surface:
        distances = _distances(border[mine], border[other], steps)
        sizes = areas[codes[mine][border[mine]]]
        order = np.lexsort((sizes, distances))  # both: sums must not depend on the voxels' order
        return Surface(distances[order], sizes[order])

    return Surfaces(seen(0, 1), seen(1, 0))


def _distances(points: np.ndarray, targets: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """(n,) mm from each of the n true voxels of `points` to the nearest one of `targets`."""
    from scipy.ndimage import distance_transform_edt  # takes longer than all of tinyseg to import

    if not targets.any():
        return np.full(np.count_nonzero(points), inf)
    # SciPy would go on to distances everywhere, at five times the memory; a surface is thin.
    nearest = distance_transform_edt(~targets, sampling=steps, return_distances=False,
                                     return_indices=True)[:, points]
    return np.linalg.norm((nearest - np.nonzero(points)) * steps[:, None], axis=0)


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds all true voxels; one without extent where there are none."""
    box = []
    for axis in range(mask.ndim):
        where = np.flatnonzero(mask.any(axis=tuple({*range(mask.ndim)} - {axis})))
        box.append(slice(int(where[0]), int(where[-1]) + 1) if where.size else slice(0))
    return tuple(box)


def _neighbours(mask: np.ndarray) -> np.ndarray:
    """(*S) -> (*S + 1) uint8: bit i of a point is the i-th of the 2^rank voxels around it."""
    padded = np.pad(mask, 1).view(np.uint8)
    codes = np.zeros([n + 1 for n in mask.shape], np.uint8)
    for bit, corner in enumerate(product((slice(-1), slice(1, None)), repeat=mask.ndim)):
        codes |= padded[corner] << bit
    return codes


def _counts(prediction: np.ndarray, reference: np.ndarray) -> tuple[int, int, int]:
    prediction, reference = _pair(prediction, reference)
    both, p, r = map(np.count_nonzero, (prediction & reference, prediction, reference))
    return int(both), int(p), int(r)


def _pair(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    prediction, reference = _mask(prediction), _mask(reference)
    _same_shape(prediction, reference)
    return prediction, reference


def _mask(mask: np.ndarray) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise ValueError(f"found a mask of {mask.dtype}, expected bool; compare a label map with"
                         " the class first: labels == 1")
    return mask


def _same_shape(prediction: np.ndarray, reference: np.ndarray) -> None:
    if prediction.shape != reference.shape:
        raise ValueError(f"found a prediction of shape {prediction.shape}, expected"
                         f" {reference.shape} as the reference has")


def _spacing(spacing: Sequence[float], rank: int) -> np.ndarray:
    steps = np.asarray(spacing, float)
    if steps.shape != (rank,) or not (np.isfinite(steps) & (steps > 0)).all():
        raise ValueError(f"found the spacing {spacing}, expected {rank} positive numbers: mm along"
                         " each axis")
    return steps


def per_class(prediction: np.ndarray, reference: np.ndarray, labels: Mapping[int, str],
              spacing: Sequence[float] | None = None, tolerance: float | None = None) -> Scores:
    """{class name: {measure: x}} of two label maps of one shape, for every class but 0.

    Measures are "dice" and "iou"; for volumes (D, H, W) with a spacing in mm also "hausdorff95"
    and "mean_surface_distance" in mm, "prediction_ml" and "reference_ml"; and "surface_dice"
    where a tolerance in mm is given too.

    >>> prediction, reference = np.array([0, 1, 1, 1, 2]), np.array([0, 0, 1, 2, 2])
    >>> ts.metrics.per_class(prediction, reference, {0: "background", 1: "organ"})
    {'organ': {'dice': 0.5, 'iou': 0.3333333333333333}}
    """
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    _same_shape(prediction, reference)
    if tolerance is not None and spacing is None:
        raise ValueError(f"found a tolerance of {tolerance} mm without a spacing, expected both")
    scores: Scores = {}
    for number, name in labels.items():
        if number == 0:
            continue
        p, r = prediction == number, reference == number
        scores[name] = {"dice": dice(p, r), "iou": iou(p, r)}
        if spacing is not None:
            surfaces = surface_distances(p, r, spacing)
            if tolerance is not None:
                scores[name]["surface_dice"] = surfaces.dice(tolerance)
            scores[name] |= {"hausdorff95": max(surfaces.percentiles(95)),
                             "mean_surface_distance": sum(surfaces.averages()) / 2,
                             "prediction_ml": volume(p, spacing),
                             "reference_ml": volume(r, spacing)}
    return scores


def mean(cases: Mapping[str, Scores]) -> Scores:
    """{case: {class: {measure: x}}} -> {class: {measure: mean over the cases where it is finite}}.

    NaN where it is finite in no case. A mean distance is thus one over the cases in which both
    masks have the class: read it beside `counts`.

    >>> ts.metrics.mean({"a": {"organ": {"dice": 0.5}}, "b": {"organ": {"dice": 1.0}},
    ...                  "c": {"organ": {"dice": np.nan}}})
    {'organ': {'dice': 0.75}}
    """
    pooled: dict[str, dict[str, list[float]]] = {}
    for scores in cases.values():
        for name, measures in scores.items():
            for measure, value in measures.items():
                values = pooled.setdefault(name, {}).setdefault(measure, [])
                if isfinite(value):
                    values.append(value)
    return {name: {measure: float(np.mean(values)) if values else nan
                   for measure, values in measures.items()}
            for name, measures in pooled.items()}


def counts(cases: Mapping[str, Scores]) -> dict[str, dict[str, int]]:
    """What the means leave out: {class: {"cases", "empty_predictions", "empty_references",
    "infinite_distances"}}, numbers of cases.

    Of scores that `per_class` made with a spacing. A distance is infinite where exactly one of the
    masks is empty, and undefined where both are.

    >>> some, none = np.ones((1, 2, 3), int), np.zeros((1, 2, 3), int)
    >>> ts.metrics.counts({"a": ts.metrics.per_class(none, some, {1: "organ"}, (1, 1, 1)),
    ...                    "b": ts.metrics.per_class(some, some, {1: "organ"}, (1, 1, 1))})
    {'organ': {'cases': 2, 'empty_predictions': 1, 'empty_references': 0, 'infinite_distances': 1}}
    """
    found: dict[str, dict[str, int]] = {}
    for scores in cases.values():
        for name, measures in scores.items():
            seen = {"cases": True, "empty_predictions": measures["prediction_ml"] == 0,
                    "empty_references": measures["reference_ml"] == 0,
                    "infinite_distances": isinf(measures["hausdorff95"])}
            tally = found.setdefault(name, dict.fromkeys(seen, 0))
            for what, here in seen.items():
                tally[what] += here
    return found
