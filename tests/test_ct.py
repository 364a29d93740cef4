"""Resampling and normalisation against scipy, naive loops and identities."""

import dataclasses
import json
import warnings
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tinyseg.data import ct, nifti

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
shapes = st.tuples(*[st.integers(1, 6)] * 3)


def volume(array, spacing, path="scan.nii.gz"):
    return nifti.Volume(array, spacing, np.eye(4), None, array.shape, Path(path))


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


def zoomed(array, shape, order):
    """SciPy's own resampling in double precision, clipped to the range of the array."""
    result = ndimage.zoom(array, np.divide(shape, array.shape), order=order, mode="nearest",
                          grid_mode=True)
    return np.clip(result, array.min(), array.max())


@settings(max_examples=40, deadline=None)
@given(source=shapes, target=shapes, order=st.sampled_from([0, 1, 3]), seed=st.integers(0, 99))
@example((5, 8, 12), (10, 4, 18), 1, 0)
@example((5, 8, 12), (10, 4, 18), 3, 0)
@example((11, 1, 20), (7, 3, 33), 3, 0)
def test_resample_equals_scipy(source, target, order, seed):
    array = np.random.default_rng(seed).normal(size=source)
    np.testing.assert_allclose(ct.resample(array, target, order), zoomed(array, target, order),
                               rtol=0, atol=3e-6)


def test_every_length_goes_to_every_other():
    """What SciPy rounds a factor to is the length asked for; a mirrored line is mirrored."""
    for n, m, order in product((1, 2, 7, 49, 93, 131, 512), (1, 3, 10, 41, 107, 375), (0, 1, 3)):
        line = np.random.default_rng(n).normal(size=n)
        moved = ct.resample(line, (m,), order)
        assert moved.shape == (m,) and moved.flags.c_contiguous
        if order:  # of two that are equally near, the nearest is the later
            np.testing.assert_allclose(moved[::-1], ct.resample(line[::-1], (m,), order), atol=1e-5)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("thick", [0, 1, 2])
def test_an_order_per_axis_is_nnu_nets_separate_z(order, thick):
    """Its way: every slice zoomed in the plane, then slices picked by SciPy's order 0."""
    array = np.random.default_rng(thick).normal(size=(6, 7, 9))
    target = (11, 9, 13)
    plane = tuple(m for axis, m in enumerate(target) if axis != thick)
    slices = [zoomed(each, plane, order) for each in np.moveaxis(array, thick, 0)]
    where = (np.arange(target[thick]) + 0.5) * len(slices) / target[thick] - 0.5
    picked = ndimage.map_coordinates(np.arange(len(slices)), where[None], order=0, mode="nearest")
    expected = np.moveaxis(np.stack([slices[i] for i in picked]), 0, thick)
    orders = [0 if axis == thick else order for axis in range(3)]
    result = ct.resample(array, target, orders)
    # nnU-Net clips each slice to its own range, ours the volume to its own: compare inside both.
    lines = np.moveaxis(array, thick, 0)[picked]
    low, high = (np.moveaxis(np.broadcast_to(f(lines, axis=(1, 2), keepdims=True),
                                             (len(picked), *plane)), 0, thick)
                 for f in (np.min, np.max))
    np.testing.assert_allclose(np.clip(result, low, high), expected, atol=3e-6)


def test_cubic_stays_in_the_range_of_its_channel():
    step = np.zeros((20, 4, 4, 2), np.float32)
    step[10:] = 1, 100
    result = ct.resample(step, (31, 5, 3), 3)
    np.testing.assert_array_equal(result.min((0, 1, 2)), 0)
    np.testing.assert_array_equal(result.max((0, 1, 2)), (1, 100))
    np.testing.assert_array_equal(ct.resample(step, (20, 4, 4), 3), step)
    constant = np.full((5, 6, 7), 0.1, np.float32)
    np.testing.assert_array_equal(ct.resample(constant, (7, 3, 9), 3), np.float32(0.1))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the example CT is not on this machine")
def test_what_the_defaults_rest_on():
    """The figures in Plan's docstring, in HU after clipping to a soft tissue window."""
    def error(a, b):
        return float(np.sqrt(np.mean((a - b) ** 2)))

    trips = {1: [], 3: []}
    for path in sorted((SHARED / "nih_pancreas_ct_slices").glob("img_*.npy"))[::3]:
        image = np.clip(np.load(path).astype(np.float32), -92, 217)
        for order, errors in trips.items():
            smaller = ct.resample(image, (461, 461), order)
            errors.append(error(ct.resample(smaller, image.shape, order), image))
    assert np.mean(trips[3]) == pytest.approx(4.5, abs=0.1)
    assert np.mean(trips[1]) == pytest.approx(8.2, abs=0.1)

    folder = SHARED / "ct_totalsegmentator_example"
    scan = np.clip(nifti.read(folder / "ts_example_ct.nii.gz").array[:110], -92, 217)
    mean = scan.reshape(22, 5, *scan.shape[1:]).mean(1)
    for slices, blended, nearest in ((scan[2::5], 28.0, 31.8), (mean, 24.0, 24.8)):
        assert error(ct.resample(slices, scan.shape), scan) == pytest.approx(blended, abs=0.1)
        copied = ct.resample(slices, scan.shape, (0, 1, 1))
        assert error(copied, scan) == pytest.approx(nearest, abs=0.1)
    organs = nifti.read(folder / "ts_example_organs15.nii.gz", "uint8").array[2:110:5]
    np.testing.assert_array_equal(ct.resample_labels(organs, scan.shape),
                                  ct.resample_labels(organs, scan.shape, (0, 1, 1)))


@pytest.mark.parametrize(("spacing", "target", "axis"), [
    ((2.5, 0.8, 0.8), (2.5, 0.8, 0.8), 0),  # 3.1 times: Task07's own median is thick
    ((3, 1, 1), (1, 1, 1), None),  # three times is not more than three times
    ((0.8, 0.9, 5), (1, 1, 1), 2), ((1, 1, 1), (0.8, 5, 0.9), 1),
    ((5, 1, 1), (1, 1, 5), 0),  # the source decides first
    ((0.24, 1.25, 1.25), (5, 1, 1), None), ((0.24, 1.25, 1.2500001), (1, 1, 1), None),
])
def test_thick_slices_as_nnu_net_finds_them(spacing, target, axis):
    assert ct.thick_axis(spacing, target) == axis


def test_a_plan_of_thick_slices_takes_them_whole():
    array = np.random.default_rng(0).normal(0, 99, (4, 6, 8)).astype(np.float32)
    scan = volume(array=array, spacing=(5.0, 1.0, 1.0))
    plan = ct.Plan((2.0, 0.8, 0.8), (-92, 217), 80.0, 70.0, order=3, blend_slices=False)
    image = plan.prepare(scan)[..., 0]
    labels = plan.prepare_labels((array > 0).astype(np.uint8), scan.spacing)
    assert image.shape == labels.shape == (10, 8, 10)
    normal = (np.clip(array, -92, 217) - 80) / 70
    np.testing.assert_allclose(image, ct.resample(normal, image.shape, (0, 3, 3)), atol=1e-6)
    np.testing.assert_array_equal(
        labels, ct.resample_labels((array > 0).astype(np.uint8), image.shape, (0, 1, 1)))
    for result in (image, labels):  # every slice comes two or three times, none is a mixture
        assert len(np.unique(result, axis=0)) == 4
    blended = dataclasses.replace(plan, blend_slices=True).prepare(scan)[..., 0]
    np.testing.assert_allclose(blended, ct.resample(normal, image.shape, 3), atol=1e-6)


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
    for order in (2, (1, 2), -1):
        with pytest.raises(ValueError, match="cannot resample by order"):
            ct.resample(np.zeros((2, 3)), (4, 5), order)
    with pytest.raises(ValueError, match="broadcast"):
        ct.resample(np.zeros((2, 3)), (4, 5), (1, 1, 1))
    with pytest.raises(ValueError, match="by splines, expected up to 4096"):
        ct.resample(np.zeros(32767), (30,), 3)
    for array, shape in ((np.zeros((2, 3)), (2, 3, 4)), (np.zeros((2, 3)), (0, 3)),
                         (np.zeros((0, 3)), (2, 3))):
        with pytest.raises(ValueError, match="cannot resample"):
            ct.resample(array, shape)
    with pytest.raises(ValueError, match="integers"):
        ct.resample_labels(np.zeros((2, 3, 4)), (2, 3, 4))


class Case(SimpleNamespace):
    def read(self):
        return volume(array=self.array, spacing=self.spacing, path=self.image), self.truth


def cases(modality, count=3, shape=(4, 5, 6, 1)):
    rng = np.random.default_rng(0)
    return [Case(array=rng.normal(80, 50, shape).astype(np.float32),
                 modalities=dict.fromkeys(range(shape[3]), modality),
                 truth=rng.integers(0, 3, shape[:3]).astype(np.uint8), spacing=(i + 1.0, 2.0, 0.5),
                 image=Path(f"task/imagesTr/{i}.nii"), label=Path(f"task/labelsTr/{i}.nii"))
            for i in range(count)]


@pytest.mark.parametrize("modality", ["CT", "ct", " Ct"])
def test_the_fingerprint_of_ct(modality):
    scans = cases(modality)
    plan = ct.Plan.fit(iter(scans))
    pooled = np.concatenate([s.array[s.truth > 0].ravel() for s in scans]).astype(float)
    assert plan.spacing == (2, 2, 0.5)
    np.testing.assert_allclose(plan.clip, np.percentile(pooled, (0.5, 99.5)))
    np.testing.assert_allclose((plan.mean, plan.std), (pooled.mean(), pooled.std()))
    image = plan.prepare(volume(array=scans[1].array, spacing=plan.spacing))
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
    image = plan.prepare(volume(array=scans[0].array * 3 + 7, spacing=(1, 1, 1)))
    np.testing.assert_allclose(image.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(image.std((0, 1, 2)), 1, atol=1e-5)
    assert image.shape == (4, 5, 6, channels) and image.dtype == np.float32


def test_prepare_resamples_image_and_labels_alike_and_leaves_the_scan_alone():
    plan = ct.Plan((2.0, 1.0, 0.5), (-100, 200), 50.0, 25.0)
    array = np.random.default_rng(0).normal(0, 300, (4, 6, 5)).astype(np.float32)
    before = array.copy()
    image = plan.prepare(volume(array=array, spacing=(3.0, 1.0, 1.0)))
    labels = plan.prepare_labels(array > 0, (3.0, 1.0, 1.0))
    assert image.shape == (6, 6, 10, 1) and labels.shape == (6, 6, 10)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(array, before)
    np.testing.assert_allclose(
        image[..., 0], ct.resample((np.clip(array, -100, 200) - 50) / 25, (6, 6, 10)), atol=1e-6)
    low = volume(array=np.full((2, 2, 2), 7.0), spacing=(1, 1, 1))
    assert (plan.prepare(low) < 0).all()


def test_a_constant_scan_becomes_zero():
    image = ct.Plan((1, 1, 1)).prepare(volume(array=np.full((2, 3, 4), 5.0),
                                                       spacing=(1, 1, 1)))
    np.testing.assert_array_equal(image, 0)


@given(st.tuples(*[st.integers(1, 900)] * 3), st.tuples(*[st.floats(0.3, 8)] * 3))
def test_shapes_keep_the_extent(shape, spacing):
    plan = ct.Plan((2.5, 0.8, 0.8))
    for n, s, m, t in zip(shape, spacing, plan.shape(shape, spacing), plan.spacing, strict=True):
        assert m >= 1 and (m == 1 or abs(m * t - n * s) <= t * 0.5001)


def test_a_plan_survives_json():
    for plan in (ct.Plan((1, 2, 3)), ct.Plan.fit(cases("CT")),
                 ct.Plan((1, 2, 3), order=3, blend_slices=False)):
        assert ct.Plan(**json.loads(json.dumps(dataclasses.asdict(plan)))) == plan


def test_a_plan_from_before_orders_prepares_as_it_did():
    """The fields that checkpoints held then; linear along every axis, thick slices too."""
    plan = ct.Plan(**{"spacing": [2.5, 0.8, 0.8], "clip": [-92, 217], "mean": 80.4, "std": 72.7})
    array = np.random.default_rng(0).normal(0, 300, (4, 6, 5)).astype(np.float32)
    scan = volume(array=array, spacing=(5.0, 0.7, 0.7))
    normal = (np.clip(array, -92, 217) - np.float32(80.4)) / np.float32(72.7)
    np.testing.assert_array_equal(plan.prepare(scan)[..., 0], ct.resample(normal, (8, 5, 4)))
    assert plan.mirror == () and plan.window == (-92, 217)


def before(array, clip, mean, std):
    """How images (D, H, W, C) were normalised when a plan had one rule for all channels."""
    image = np.array(array, np.float32)
    if clip is not None:
        np.clip(image, *clip, out=image)
    if mean is not None:
        mean, std = np.float32(mean), np.float32(std)
    else:
        middle = image.mean((0, 1, 2), dtype=np.float64)
        spread = np.mean([((row - middle) ** 2).mean((0, 1)) for row in image], axis=0)
        mean, std = middle.astype(np.float32), np.sqrt(spread).astype(np.float32)
        std = np.maximum(std, np.float32(1e-8))
    image -= mean
    image /= std
    return image


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize(("clip", "mean", "std"), [
    (None, None, None), ([-92.3, 217.1], None, None), ([-92.3, 217.1], 80.36, 72.7),
    ([-np.inf, 217.1], 80.36, 72.7), (None, 80.36, 72.7)])
def test_plans_of_one_rule_prepare_bit_for_bit_as_they_did(clip, mean, std, channels):
    array = np.random.default_rng(0).normal(50, 300, (7, 8, 9, channels)).astype(np.float32)
    plan = ct.Plan(**{"spacing": [1, 2, 3], "clip": clip, "mean": mean, "std": std})
    np.testing.assert_array_equal(plan.prepare(volume(array, (1, 2, 3))),
                                  before(array, clip, mean, std))


def test_every_channel_has_a_rule_of_its_own():
    """CT beside PET: Hounsfield units by the fingerprint, the other scan by scan."""
    scans = cases("CT", shape=(4, 5, 6, 3))
    for case in scans:
        case.modalities = {0: "CT", 1: "PET", 2: "ct"}
        case.array *= 1, 30, 5
    plan = ct.Plan.fit(scans)
    assert plan == ct.Plan(**json.loads(json.dumps(dataclasses.asdict(plan))))
    assert hash(plan) == hash(ct.Plan(**json.loads(json.dumps(dataclasses.asdict(plan)))))
    pooled = [np.concatenate([s.array[s.truth > 0, c] for s in scans]).astype(float)
              for c in range(3)]
    for c in (0, 2):
        np.testing.assert_allclose(plan.clip[c], np.percentile(pooled[c], (0.5, 99.5)))
        np.testing.assert_allclose((plan.mean[c], plan.std[c]), (pooled[c].mean(), pooled[c].std()))
    assert (plan.clip[1], plan.mean[1], plan.std[1]) == (None, None, None)
    assert plan.window == plan.clip[0] != plan.clip[2]
    array = scans[0].array * 2 - 40
    image = plan.prepare(volume(array, plan.spacing))
    for c in (0, 2):
        alone = ct.Plan(plan.spacing, plan.clip[c], plan.mean[c], plan.std[c])
        np.testing.assert_array_equal(image[..., c],
                                      alone.prepare(volume(array[..., c], plan.spacing))[..., 0])
    pet = array[..., 1].astype(float)
    np.testing.assert_allclose(image[..., 1], (pet - pet.mean()) / pet.std(), atol=1e-5)
    with pytest.raises(ValueError, match="scan.nii.gz: found 2 channels, expected 3"):
        plan.prepare(volume(array[..., :2], plan.spacing))


@pytest.mark.parametrize("plan", [
    ct.Plan((1, 2, 3)), ct.Plan((1, 2, 3), (None, (0, 9)), (None, 1), (None, 2))])
def test_what_is_not_clipped_is_shown_whole(plan):
    array = np.random.default_rng(0).normal(0, 999, (3, 4))
    np.testing.assert_array_equal(np.clip(array, *plan.window), array)


def test_classes_that_change_places_are_kept():
    for pairs, kept in (((), ()), (None, None), ([["left", "right"], ("l", "r")],
                                                 (("left", "right"), ("l", "r")))):
        plan = ct.Plan((1, 2, 3), mirror=pairs)
        assert plan.mirror == kept
        assert ct.Plan(**json.loads(json.dumps(dataclasses.asdict(plan)))) == plan


def test_a_spacing_beyond_all_memory_is_refused():
    """A header in metres, or a hostile one: 8 voxels of 80 m at 0.8 mm."""
    plan, spacing = ct.Plan((0.8, 0.8, 0.8), (0, 1), 0.0, 1.0), (8e4, 8e4, 8e4)
    with pytest.raises(ValueError, match="scan.nii.gz: .*over 16 GiB.*unit of length"):
        plan.prepare(volume(array=np.zeros((2, 2, 2)), spacing=spacing))
    with pytest.raises(ValueError, match="unit of length"):
        plan.prepare_labels(np.zeros((2, 2, 2), np.uint8), spacing)


@pytest.mark.parametrize(("shape", "spacing", "fits"), [
    ((20, 40, 40), (5, 3.8, 3.8), True), ((20, 40, 40), (5e-3, 3.8e-3, 3.8e-3), False),
    ((20, 1, 40), (5, 0.1, 3.8), True),  # a slice is as thin as it is
    ((4, 2, 9), (0.7, 1.1, 3.8), True), ((4, 2, 9), (0.6, 1.1, 3.8), False),
    ((4, 2, 9), (0.7, 0.9, 3.8), False)])
def test_a_grid_that_collapses_is_refused_by_name(shape, spacing, fits):
    """Where half a voxel or less is left of an axis of several."""
    array = np.random.default_rng(0).normal(size=shape)
    plan = ct.Plan((5, 4, 4))
    if fits:
        image = plan.prepare(volume(array, spacing))
        labels = plan.prepare_labels(array > 0, spacing)
        assert image.shape[:3] == labels.shape == plan.shape(shape, spacing)
    else:
        with pytest.raises(ValueError, match="scan.nii.gz: .*half a voxel along an axis.*unit"):
            plan.prepare(volume(array, spacing))
        with pytest.raises(ValueError, match="half a voxel along an axis"):
            plan.prepare_labels(array > 0, spacing)


@pytest.mark.parametrize("modality", ["CT", "MRI"])
def test_one_training_case_that_collapses_is_named(modality):
    scans = cases(modality, 5)
    scans[3].spacing = (4e-3, 2e-3, 5e-4)
    with pytest.raises(ValueError, match="imagesTr/3.nii: .*less than half a voxel"):
        ct.Plan.fit(scans)
    with pytest.raises(ValueError, match="0.nii: .*spacing of 0.001 x .*16 GiB; ask for another"):
        ct.Plan.fit(cases(modality), (1e-3, 1e-3, 1e-3))
    with pytest.raises(ValueError, match="0.nii: .*spacing of .*half a voxel.*; ask for another"):
        ct.Plan.fit(cases(modality), (500, 500, 500))


@pytest.mark.parametrize(("scale", "told"), [(0.09, True), (0.2, False), (5, False), (10, True)])
def test_one_training_case_of_another_size_is_told(scale, told):
    scans = cases("CT", 5, shape=(40, 50, 60, 1))
    scans[3].spacing = tuple(scale * s for s in scans[2].spacing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ct.Plan.fit(scans)
    assert [("3.nii" in str(w.message), w.filename) for w in caught] == [(True, __file__)] * told


@pytest.mark.parametrize("wrong", [
    {"clip": ((0, 1), None)}, {"clip": ((0, 1), (0, 2))}, {"clip": (0, 1, 2)}, {"clip": 3},
    {"mean": (1, 2), "std": (1, 2)}, {"mean": (1, 2), "std": 3.0, "clip": ((0, 1), None)},
    {"mean": 3.0, "std": (1.0,)}, {"mean": (1, None), "std": (1, 2), "clip": (None, None)},
    {"mean": (1, 2), "std": (1, 0), "clip": (None, None)},
    {"mean": (1, 2), "std": (1, 2), "clip": (0, 1)}, {"mean": (), "std": (), "clip": ()},
    {"mean": (1, 2), "std": (1, 2), "clip": (None, (2, 1))},
    {"mirror": ["left", "right"]}, {"mirror": [("a", "b", "c")]}, {"mirror": [("a", "a")]},
    {"mirror": [("a", "b"), ("b", "c")]}, {"mirror": [(1, 2)]}, {"mirror": "none"},
    {"order": 2}, {"order": "3"}, {"order": [1]}, {"blend_slices": 1}, {"blend_slices": "no"},
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


@pytest.mark.parametrize("modality", ["CT", "MRI"])
def test_no_foreground_anywhere_is_refused_with_the_folder(modality):
    scans = cases(modality)
    for case in scans[1:]:
        case.truth[:] = 0
    ct.Plan.fit(scans)
    scans[0].truth[:] = 0
    with pytest.raises(ValueError, match="task/labelsTr: found no foreground voxel in any of 3"):
        ct.Plan.fit(scans)


def test_a_ct_that_is_constant_in_the_foreground_is_refused_with_the_folder():
    scans = cases("CT")
    for case in scans:
        case.array[case.truth > 0] = 50
    with pytest.raises(ValueError, match="task/imagesTr: found the value 50 in all of the fore"):
        ct.Plan.fit(scans)


def test_label_numbers_that_are_no_classes_are_not_cut():
    plan = ct.Plan((1, 1, 1))
    for wrong in (np.array([0, 256]), np.array([0, -1], np.int16)):
        with pytest.raises(ValueError, match="expected classes from 0 to 255"):
            plan.prepare_labels(wrong.reshape(1, 1, 2), (1, 1, 1))
