"""How much two masks overlap, per class and case, and the mean over cases.

Conventions of nnU-Net v2: two empty masks have no overlap to speak of, NaN, and means leave NaN
out; one empty mask scores 0. Volumes are scored whole: a mean of slice scores is another number.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Scores = dict[str, dict[str, float]]


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """2 |P and R| / (|P| + |R|) of two boolean masks of one shape, any rank."""
    both, p, r = _counts(prediction, reference)
    return 2 * both / (p + r) if p + r else float("nan")


def iou(prediction: np.ndarray, reference: np.ndarray) -> float:
    """|P and R| / |P or R| (Jaccard) of two boolean masks of one shape, any rank."""
    both, p, r = _counts(prediction, reference)
    return both / (p + r - both) if p + r else float("nan")


def _counts(prediction: np.ndarray, reference: np.ndarray) -> tuple[int, int, int]:
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    if prediction.dtype != bool or reference.dtype != bool:
        raise ValueError(f"found masks of {prediction.dtype} and {reference.dtype}, expected bool;"
                         " compare a label map with the class first: labels == 1")
    _same_shape(prediction, reference)
    both, p, r = map(np.count_nonzero, (prediction & reference, prediction, reference))
    return int(both), int(p), int(r)


def _same_shape(prediction: np.ndarray, reference: np.ndarray) -> None:
    if prediction.shape != reference.shape:
        raise ValueError(f"found a prediction of shape {prediction.shape}, expected"
                         f" {reference.shape} as the reference has")


def per_class(prediction: np.ndarray, reference: np.ndarray, labels: Mapping[int, str]) -> Scores:
    """{class name: {"dice": x, "iou": x}} of two label maps, for every class but 0."""
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    _same_shape(prediction, reference)
    return {name: {measure.__name__: measure(prediction == number, reference == number)
                   for measure in (dice, iou)}
            for number, name in labels.items() if number != 0}


def mean(cases: Mapping[str, Scores]) -> Scores:
    """{case: {class: {metric: x}}} -> {class: {metric: mean over the cases where it is defined}}.

    NaN where no case defines it.
    """
    pooled: dict[str, dict[str, list[float]]] = {}
    for scores in cases.values():
        for name, measures in scores.items():
            for measure, value in measures.items():
                values = pooled.setdefault(name, {}).setdefault(measure, [])
                if not np.isnan(value):
                    values.append(value)
    return {name: {measure: float(np.mean(values)) if values else float("nan")
                   for measure, values in measures.items()}
            for name, measures in pooled.items()}
