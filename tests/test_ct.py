"""Resampling and normalisation against scipy, naive loops and identities."""

import dataclasses
import json
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyseg.data import ct

shapes = st.tuples(*[st.integers(1, 6)] * 3)


def naive(array, shape):
    """Trilinear interpolation, one output voxel at a time."""
    out = np.zeros(shape)
    for voxel in product(*map(range, shape)):
        corners = []
        for i, n, m in zip(voxel, array.shape, shape, strict=True):
            x = min(max((i + 0.5) * n / m - 0.5, 0), n - 1)
            a = int(x)
            corners.append([(a, 1 - (x - a)), (min(a + 1, n - 1), x - a)])
        for (i, a), (j, b), (k, c) in product(*corners):
            out[voxel] += a * b * c * array[i, j, k]
    return out


@settings(max_examples=40, deadline=None)
@given(source=shapes, target=shapes, seed=st.integers(0, 99))
def test_resample_equals_the_naive_loop(source, target, seed):
    array = np.random.default_rng(seed).normal(size=source)
    np.testing.assert_allclose(ct.resample(array, target), naive(array, target), atol=2e-6)


def test_resample_equals_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    array = np.random.default_rng(0).normal(size=(5, 8, 12))
    target = (10, 4, 18)
    zoomed = ndimage.zoom(array, np.divide(target, array.shape), order=1, mode="nearest",
                          grid_mode=True)
    np.testing.assert_allclose(ct.resample(array, target), zoomed, atol=1e-6)


@given(source=shapes, target=shapes)
def test_constants_and_identity(source, target):
    array = np.full(source, 0.1, np.float32)
    np.testing.assert_array_equal(ct.resample(array, target), np.float32(0.1))
    noise = np.random.default_rng(0).normal(size=(*source, 2)).astype(np.float32)
    np.testing.assert_array_equal(ct.resample(noise, source), noise)
    assert ct.resample(noise, target).shape == (*target, 2)


def test_ramps_are_exact_inside_and_clamped_outside():
    n, m = (8, 5, 6), (12, 15, 4)
    corners = [(np.arange(b) + 0.5) * a / b for a, b in zip(n, m, strict=True)]  # voxel units
    ramp = np.add.outer(np.add.outer(np.arange(8), 10 * np.arange(5)), 100 * np.arange(6)) + 555 / 5
    centres = [np.clip(c - 0.5, 0, a - 1) for c, a in zip(corners, n, strict=True)]
    expected = np.add.outer(np.add.outer(centres[0], 10 * centres[1]), 100 * centres[2]) + 111
    np.testing.assert_allclose(ct.resample(ramp, m), expected, rtol=1e-6)


def test_channels_are_independent_and_rank_is_free():
    array = np.random.default_rng(0).normal(size=(4, 5, 6, 3))
    whole = ct.resample(array, (3, 7, 5))
    for channel in range(3):
        np.testing.assert_array_equal(whole[..., channel],
                                      ct.resample(array[..., channel], (3, 7, 5)))
    np.testing.assert_array_equal(ct.resample(array[:1], (1, 7, 5))[0],
                                  ct.resample(array[0], (7, 5)))
    assert whole.dtype == np.float32


@settings(max_examples=30, deadline=None)
@given(source=shapes, target=shapes, seed=st.integers(0, 99))
def test_labels_are_the_argmax_of_resampled_indicators(source, target, seed):
    labels = np.random.default_rng(seed).choice(np.array([0, 2, 7], np.uint8), source)
    result = ct.resample_labels(labels, target)
    shares = np.stack([ct.resample(labels == c, target) for c in range(8)])
    np.testing.assert_array_equal(result, shares.argmax(0))
    assert result.dtype == np.uint8 and set(np.unique(result)) <= set(np.unique(labels))


def test_no_class_appears_between_two():
    labels = np.repeat(np.array([0, 2], np.int16), 4)[:, None, None]
    assert set(np.unique(ct.resample_labels(labels, (7, 2, 3)))) == {0, 2}
    np.testing.assert_array_equal(ct.resample_labels(labels, labels.shape), labels)


def test_wrong_resampling():
    for array, shape in ((np.zeros((2, 3)), (2, 3, 4)), (np.zeros((2, 3)), (0, 3)),
                         (np.zeros((0, 3)), (2, 3))):
        with pytest.raises(ValueError, match="cannot resample"):
            ct.resample(array, shape)
    with pytest.raises(ValueError, match="integers"):
        ct.resample_labels(np.zeros((2, 3, 4)), (2, 3, 4))


class Case(SimpleNamespace):
    def read(self):
        return SimpleNamespace(array=self.array, spacing=self.spacing), self.label


def cases(modality, count=3, shape=(4, 5, 6, 1)):
    rng = np.random.default_rng(0)
    return [Case(array=rng.normal(80, 50, shape).astype(np.float32), modalities={0: modality},
                 label=rng.integers(0, 3, shape[:3]).astype(np.uint8), spacing=(i + 1.0, 2.0, 0.5))
            for i in range(count)]


@pytest.mark.parametrize("modality", ["CT", "ct", " Ct"])
def test_the_fingerprint_of_ct(modality):
    scans = cases(modality)
    plan = ct.Plan.fit(iter(scans))
    pooled = np.concatenate([s.array[s.label > 0].ravel() for s in scans]).astype(float)
    assert plan.spacing == (2, 2, 0.5)
    np.testing.assert_allclose(plan.clip, np.percentile(pooled, (0.5, 99.5)))
    np.testing.assert_allclose((plan.mean, plan.std), (pooled.mean(), pooled.std()))
    image = plan.prepare(SimpleNamespace(array=scans[1].array, spacing=plan.spacing))
    expected = (np.clip(scans[1].array, *plan.clip) - plan.mean) / plan.std
    np.testing.assert_allclose(image, expected, atol=1e-5)


def test_a_fit_samples_a_bounded_number(monkeypatch):
    monkeypatch.setattr(ct, "SAMPLES", 20)
    plan = ct.Plan.fit(cases("CT"))
    assert plan == ct.Plan.fit(cases("CT")) != ct.Plan.fit(cases("CT"), seed=1)


@pytest.mark.parametrize("channels", [1, 2])
def test_other_modalities_standardise_each_scan_and_channel(channels):
    scans = cases("MRI", shape=(4, 5, 6, channels))
    plan = ct.Plan.fit(scans, spacing=[1, 1, 1])
    assert plan == ct.Plan((1, 1, 1))
    image = plan.prepare(SimpleNamespace(array=scans[0].array * 3 + 7, spacing=(1, 1, 1)))
    np.testing.assert_allclose(image.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(image.std((0, 1, 2)), 1, atol=1e-5)
    assert image.shape == (4, 5, 6, channels) and image.dtype == np.float32


def test_prepare_resamples_image_and_labels_alike_and_leaves_the_scan_alone():
    plan = ct.Plan((2.0, 1.0, 0.5), (-100, 200), 50.0, 25.0)
    array = np.random.default_rng(0).normal(0, 300, (4, 6, 5)).astype(np.float32)
    before = array.copy()
    image = plan.prepare(SimpleNamespace(array=array, spacing=(3.0, 1.0, 1.0)))
    labels = plan.prepare_labels(array > 0, (3.0, 1.0, 1.0))
    assert image.shape == (6, 6, 10, 1) and labels.shape == (6, 6, 10)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(array, before)
    np.testing.assert_allclose(
        image[..., 0], ct.resample((np.clip(array, -100, 200) - 50) / 25, (6, 6, 10)), atol=1e-6)
    low = SimpleNamespace(array=np.full((2, 2, 2), 7.0), spacing=(1, 1, 1))
    assert (plan.prepare(low) < 0).all()


def test_a_constant_scan_becomes_zero():
    image = ct.Plan((1, 1, 1)).prepare(SimpleNamespace(array=np.full((2, 3, 4), 5.0),
                                                       spacing=(1, 1, 1)))
    np.testing.assert_array_equal(image, 0)


@given(st.tuples(*[st.integers(1, 900)] * 3), st.tuples(*[st.floats(0.3, 8)] * 3))
def test_shapes_keep_the_extent(shape, spacing):
    plan = ct.Plan((2.5, 0.8, 0.8))
    for n, s, m, t in zip(shape, spacing, plan.shape(shape, spacing), plan.spacing, strict=True):
        assert m >= 1 and (m == 1 or abs(m * t - n * s) <= t * 0.5001)


def test_a_plan_survives_json():
    for plan in (ct.Plan((1, 2, 3)), ct.Plan.fit(cases("CT"))):
        assert ct.Plan(**json.loads(json.dumps(dataclasses.asdict(plan)))) == plan


@pytest.mark.parametrize("wrong", [
    {"spacing": (1, 2)}, {"spacing": (1, 0, 2)}, {"spacing": (1, np.nan, 2)},
    {"clip": (3, 3)}, {"clip": (np.nan, 1)}, {"mean": 3.0}, {"std": 1.0},
    {"mean": 0.0, "std": 0.0}, {"mean": np.nan, "std": 1.0},
])
def test_wrong_plans(wrong):
    with pytest.raises(ValueError, match="expected"):
        ct.Plan(**({"spacing": (1, 1, 1)} | wrong))


def test_nothing_to_fit():
    with pytest.raises(ValueError, match="no cases"):
        ct.Plan.fit([])
    empty = cases("CT", 1)
    empty[0].label[:] = 0
    with pytest.raises(ValueError, match="no foreground"):
        ct.Plan.fit(empty)
