"""Overlap measures against sets of voxels, and the conventions for empty masks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tinyseg import metrics

masks = array_shapes(max_dims=3, max_side=4).flatmap(
    lambda shape: st.tuples(arrays(bool, shape), arrays(bool, shape)))


@given(masks)
def test_overlap_equals_that_of_sets(pair):
    p, r = ({tuple(v) for v in np.argwhere(mask)} for mask in pair)
    dice, iou = metrics.dice(*pair), metrics.iou(*pair)
    if not p | r:
        assert math.isnan(dice) and math.isnan(iou)
        return
    assert dice == 2 * len(p & r) / (len(p) + len(r))
    assert iou == len(p & r) / len(p | r)
    assert dice == metrics.dice(*pair[::-1]) and dice == pytest.approx(2 * iou / (1 + iou))
    assert isinstance(dice, float) and isinstance(iou, float)


def test_empty_masks():
    none, some = np.zeros((2, 3), bool), np.eye(2, 3, dtype=bool)
    assert metrics.dice(none, some) == metrics.dice(some, none) == metrics.iou(none, some) == 0
    assert math.isnan(metrics.dice(none, none)) and metrics.dice(some, some) == 1


@pytest.mark.parametrize("measure", [metrics.dice, metrics.iou])
def test_wrong_masks(measure):
    mask = np.ones((2, 3), bool)
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 3\)"):
        measure(mask.T, mask)
    with pytest.raises(ValueError, match="expected bool"):
        measure(mask.astype(int), mask)
    with pytest.raises(ValueError, match="expected bool"):
        measure(mask, mask * 0.5)


def test_per_class_skips_the_background():
    prediction, reference = np.array([0, 1, 1, 2, 0]), np.array([0, 1, 2, 2, 0], np.uint8)
    scores = metrics.per_class(prediction, reference, {0: "none", 1: "organ", 2: "lesion", 3: "x"})
    assert list(scores) == ["organ", "lesion", "x"]
    assert scores["organ"] == {"dice": 2 / 3, "iou": 0.5} == scores["lesion"]
    assert math.isnan(scores["x"]["dice"])
    with pytest.raises(ValueError, match="shape"):
        metrics.per_class(prediction[:4], reference, {1: "organ"})


def test_the_mean_leaves_undefined_cases_out():
    nan = float("nan")
    cases = {"a": {"organ": {"dice": 0.5, "iou": 0.2}, "lesion": {"dice": nan}},
             "b": {"organ": {"dice": 1.0, "iou": nan}, "lesion": {"dice": nan}},
             "c": {"organ": {"dice": nan, "iou": nan}}}
    result = metrics.mean(cases)
    assert result["organ"] == {"dice": 0.75, "iou": 0.2}
    assert math.isnan(result["lesion"]["dice"])
    assert metrics.mean({}) == {}
