"""Flips and intensity changes, the same functions for slices and volumes."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from tinyseg.data import augment
from tinyseg.data.augment import Augmentation, Change


def pair(shape, channels=2):
    labels = np.arange(np.prod(shape)).reshape(shape)
    return np.stack([labels + 1000 * c for c in range(channels)], -1).astype(np.float32), labels


@given(shape=st.sampled_from([(3, 4), (2, 3, 4)]), seed=st.integers(0, 50), data=st.data())
def test_flip_moves_image_and_labels_alike(shape, seed, data):
    image, labels = pair(shape)
    axes = data.draw(st.lists(st.integers(-len(shape), len(shape) - 1), max_size=3))
    x, y = augment.flip(image, labels, np.random.default_rng(seed), axes)
    np.testing.assert_array_equal(x[..., 0], y)
    np.testing.assert_array_equal(x[..., 1], y + 1000)
    expected = labels
    for axis, drawn in zip(axes, np.random.default_rng(seed).random(len(axes)), strict=True):
        expected = np.flip(expected, axis) if drawn < 0.5 else expected
    np.testing.assert_array_equal(y, expected)


def test_minus_one_is_left_right_at_any_rank_and_half_are_flipped():
    image, labels = pair((2, 3, 4))
    flips = 0
    for seed in range(400):
        _, volume = augment.flip(image, labels, np.random.default_rng(seed), (-1,))
        _, plane = augment.flip(image[0], labels[0], np.random.default_rng(seed), (-1,))
        np.testing.assert_array_equal(volume[0], plane)
        flips += volume[0, 0, 0] != 0
        assert volume[0, 0, 0] in (0, 3)
    assert 160 < flips < 240  # four standard deviations


def test_wrong_axis():
    image, labels = pair((3, 4))
    for axis in (2, -3):
        with pytest.raises(ValueError, match="spatial"):
            augment.flip(image, labels, np.random.default_rng(0), (axis,))


@given(seed=st.integers(0, 99), dtype=st.sampled_from(["float32", "float64"]))
def test_intensity_is_affine_per_channel_and_bounded(seed, dtype):
    x = np.random.default_rng(seed + 1000).normal(size=(3, 4, 5, 2)).astype(dtype)
    y = augment.intensity(x, np.random.default_rng(seed), gain=0.2, shift=0.3)
    assert y.dtype == x.dtype and y is not x
    for c in range(2):
        a, b = np.polyfit(x[..., c].ravel(), y[..., c].ravel(), 1)
        assert abs(a - 1) <= 0.2001 and abs(b) <= 0.3001
        np.testing.assert_allclose(y[..., c], a * x[..., c] + b, atol=1e-5)
    np.testing.assert_array_equal(augment.intensity(x, np.random.default_rng(0), 0, 0), x)


def test_mild_is_reproducible_and_keeps_depth_and_height():
    image, labels = pair((2, 3, 4))
    x, y = augment.mild(image, labels, np.random.default_rng(5))
    again = augment.mild(image, labels, np.random.default_rng(5))
    np.testing.assert_array_equal(x, again[0])
    np.testing.assert_array_equal(np.sort(y, axis=-1), labels)
    assert x.shape == image.shape and x.dtype == np.float32


def test_classes_that_are_mirror_images_change_places_with_the_reflection():
    rng, reflected = np.random.default_rng(0), 0
    labels = rng.integers(0, 6, (3, 4, 5)).astype(np.uint8)
    labels[0, 0, 0] = 255  # what is ignored stays so
    image = labels[..., None].astype(np.float32)
    table = np.arange(256)
    table[[1, 5, 2, 3]] = 5, 1, 3, 2
    for seed in range(40):
        x, y = augment.flip(image, labels, np.random.default_rng(seed), (0, -1), [(1, 5), (3, 2)])
        first, last = np.random.default_rng(seed).random(2) < 0.5
        expected = labels[::-1] if first else labels
        expected = table[expected][..., ::-1] if last else expected
        np.testing.assert_array_equal(y, expected)
        assert y.dtype == np.uint8
        reflected += last
        moved = x[..., 0].astype(np.uint8)
        np.testing.assert_array_equal(y, table[moved] if last else moved)
    assert 8 < reflected < 32


def test_mild_leaves_the_reflection_out_where_it_is_told_to():
    image, labels = pair((2, 3, 4))
    for seed in range(12):
        _, y = augment.mild(image, labels, np.random.default_rng(seed), None)
        np.testing.assert_array_equal(y, labels)


shapes = st.sampled_from([(7, 9), (4, 5, 6)])


def channel(shape, seed=0):
    return np.random.default_rng(seed).normal(2, 3, shape).astype(np.float32)


@settings(deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), sigma=st.floats(0.3, 1.5))
def test_blur_is_scipys_gaussian_and_keeps_the_type(shape, seed, sigma):
    x = channel(shape, seed)
    sigmas = [sigma * (axis + 1) / 2 for axis in range(len(shape))]
    y = augment.blur(x, sigmas)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y, gaussian_filter(x.astype(float), sigmas, mode="nearest"),
                               atol=1e-5)


@settings(deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), factor=st.floats(0.5, 2))
def test_contrast_scales_about_the_mean_within_the_range(shape, seed, factor):
    x = channel(shape, seed)
    y = augment.contrast(x, factor)
    m = x.astype(float).mean()
    np.testing.assert_allclose(y, np.clip(m + factor * (x - m), x.min(), x.max()), atol=1e-5)
    assert y.dtype == x.dtype and y.min() >= x.min() and y.max() <= x.max()


@settings(deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), exponent=st.floats(0.5, 2))
def test_gamma_keeps_order_mean_and_deviation(shape, seed, exponent):
    x = channel(shape, seed)
    y = augment.gamma(x, exponent)
    assert y.dtype == x.dtype
    assert (np.diff(y.ravel()[np.argsort(x.ravel())]) >= 0).all()
    np.testing.assert_allclose([y.mean(), y.std()], [x.mean(), x.std()], atol=1e-4)
    np.testing.assert_allclose(augment.gamma(x, 1.0), x, atol=1e-5)
    np.testing.assert_allclose(augment.gamma(3 * x + 1, exponent), 3 * y + 1, atol=1e-4)
    bend = np.diff(augment.gamma(np.linspace(-2, 3, 50), exponent), 2) * (exponent - 1)
    assert (bend > -1e-9).all() and (bend.max() > 1e-4 or abs(exponent - 1) < 0.1)
    flat = np.full(shape, 5, np.float32)
    np.testing.assert_array_equal(augment.gamma(flat, exponent), flat)


@settings(deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), share=st.floats(0.05, 1), data=st.data())
def test_low_resolution_leaves_the_other_axes_and_the_range(shape, seed, share, data):
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True))
    x = channel(shape, seed)
    y = augment.low_resolution(x, share, axes)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert y.min() >= x.min() - 1e-5 and y.max() <= x.max() + 1e-5
    np.testing.assert_array_equal(augment.low_resolution(x, 1.0, axes), x)
    for axis in set(range(len(shape))) - set(axes):
        part = np.take(x, [1], axis)
        np.testing.assert_array_equal(augment.low_resolution(part, share, axes),
                                      np.take(y, [1], axis))


def test_low_resolution_takes_every_other_voxel_and_draws_lines_between():
    x = np.random.default_rng(0).normal(size=16).astype(np.float32)
    y = augment.low_resolution(x, 0.5, [0])
    at = (np.arange(16) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(y, np.interp(at, np.arange(8), x[1::2]), atol=1e-6)


ALWAYS = {name: change._replace(probability=1.0, channels=1.0) for name, change in
          asdict(augment.PRESETS["nnunet"]).items() if name in augment.WITHIN}
ALWAYS["shift"] = Change(1, 0.1, 0.2)


@pytest.mark.parametrize("name", augment.INTENSITIES)
@pytest.mark.parametrize("shape", [(8, 9), (5, 6, 7)])
def test_every_change_of_intensities_changes_them_alone_and_channel_by_channel(name, shape):
    image = np.random.default_rng(0).normal(size=(*shape, 3)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 3, shape).astype(np.uint8)
    kept = image.copy()
    for dtype in ("float32", "float64"):
        x, y = Augmentation(**{name: ALWAYS[name]})(image.astype(dtype), labels,
                                                    np.random.default_rng(2))
        assert y is labels and x.dtype == dtype and x.shape == image.shape
        assert (x != image).any(axis=tuple(range(len(shape)))).all()
    half = Augmentation(**{name: ALWAYS[name]._replace(channels=0.5)})
    changed = np.array([(half(image, labels, np.random.default_rng(seed))[0] != image)
                        .any(axis=tuple(range(len(shape)))) for seed in range(60)])
    assert 60 < changed.sum() < 120 and (changed[:, 0] != changed[:, 1]).any()
    np.testing.assert_array_equal(image, kept)


def test_inverted_gamma_is_the_gamma_of_the_negative():
    x, change = channel((6, 7)), Change(1, 0.7, 1.5)
    for seed in range(5):
        inverted, plain = (augment.INTENSITIES[name](sign * x, change, np.random.default_rng(seed),
                                                     []) for name, sign in
                           (("inverted_gamma", 1), ("gamma", -1)))
        np.testing.assert_array_equal(inverted, -plain)
        assert abs(inverted - x).max() > 1e-3


def test_factors_are_above_one_as_often_as_below_and_ranges_are_uniform():
    rng, change = np.random.default_rng(0), Change(1, 0.7, 1.5)
    factors = np.array([change.factor(rng) for _ in range(4000)])
    assert 0.7 <= factors.min() < 0.71 and 1.48 < factors.max() <= 1.5
    assert abs((factors < 1).mean() - 0.5) < 0.03
    assert abs((factors < 0.85).mean() - 0.25) < 0.03 and abs((factors > 1.25).mean() - 0.25) < 0.03
    values = np.array([change.uniform(rng) for _ in range(4000)])
    assert abs(np.quantile(values, [0.25, 0.5, 0.75]) - [0.9, 1.1, 1.3]).max() < 0.03


@settings(deadline=None)
@given(seed=st.integers(0, 9999), thick=st.sampled_from([0.5, 1, 2.9, 3.1, 8]),
       size=st.sampled_from([(4, 5, 6), (1, 5, 6), (5, 6)]))
def test_maps_turn_and_scale_in_millimetres(seed, thick, size):
    """S M S^-1 is a rotation times the scale; of thick slices, and of one slice, in the plane."""
    spacing = np.array((1.2 * thick, 1.5, 1.2))
    chosen = Augmentation(rotation=Change(1, 5, 30), plane_rotation=Change(1, 40, 60),
                          scale=Change(1, 0.8, 1.3), spacing=tuple(spacing))
    matrix = chosen.spatial(np.random.default_rng(seed), size)
    rank = len(size)
    spacing = spacing[-rank:]
    metric = matrix * spacing[:, None] / spacing
    if rank == 3 and (size[0] == 1 or thick > 3):
        np.testing.assert_array_equal(matrix[0], [1, 0, 0])
        np.testing.assert_array_equal(matrix[:, 0], [1, 0, 0])
        metric = metric[1:, 1:]
    scale = np.sqrt(metric[0] @ metric[0])
    assert 0.8 <= scale <= 1.3
    turn = metric / scale
    np.testing.assert_allclose(turn @ turn.T, np.eye(len(turn)), atol=1e-12)
    assert abs(np.linalg.det(turn) - 1) < 1e-12
    if len(turn) == 2:
        assert 40 <= np.degrees(np.arctan2(turn[1, 0], turn[0, 0])) <= 60
    else:  # three turns of 5 to 30 degrees
        assert 5 < np.degrees(np.arccos((np.trace(turn) - 1) / 2)) < 60


def test_maps_happen_with_their_probability():
    chosen = Augmentation(rotation=Change(0.2, -30, 30), scale=Change(0.25, 0.7, 1.4))
    rng = np.random.default_rng(0)
    maps = [chosen.spatial(rng, (4, 5, 6)) for _ in range(2000)]
    drawn = [m for m in maps if m is not None]
    assert abs(len(drawn) / 2000 - (1 - 0.8 * 0.75)) < 0.045  # four standard deviations
    volumes = np.array([np.linalg.det(m) for m in drawn])
    assert abs((abs(volumes - 1) > 1e-9).mean() - 0.25 / 0.4) < 0.07
    alone = Augmentation(plane_rotation=Change(1, -9, 9))
    assert alone.spatial(rng, (4, 5, 6)) is None and alone.spatial(rng, (5, 6)) is not None


@pytest.mark.parametrize("name", augment.PRESETS)
@pytest.mark.parametrize("shape", [(8, 9), (5, 6, 7)])
def test_presets_are_reproducible_keep_types_and_come_back_from_json(name, shape):
    chosen = augment.preset(name, [3.0, 1.5, 1.5], [(1, 2)])
    assert Augmentation(**json.loads(json.dumps(asdict(chosen)))) == chosen
    image, labels = channel((*shape, 2)), np.random.default_rng(0).integers(0, 3, shape, np.uint8)
    different = 0
    for seed in range(8):
        x, y = chosen(image, labels, np.random.default_rng(seed))
        again = chosen(image, labels, np.random.default_rng(seed))
        np.testing.assert_array_equal(x, again[0])
        np.testing.assert_array_equal(y, again[1])
        assert x.dtype == np.float32 and x.shape == image.shape and y.dtype == np.uint8
        np.testing.assert_array_equal(np.bincount(y.ravel())[:1], np.bincount(labels.ravel())[:1])
        different += not np.array_equal(x, image)
    if name == "none":
        assert different == 0 and chosen.spatial(np.random.default_rng(0), shape) is None
    else:
        assert different > 3


def test_presets_mirror_left_and_right_by_the_pairs_or_not_at_all():
    image = np.arange(24, dtype=np.float32).reshape(2, 3, 4, 1)
    labels = np.tile(np.array([1, 0, 3, 2], np.uint8), (2, 3, 1))
    mirroring = {name: replace(Augmentation(), mirror=augment.PRESETS[name].mirror)
                 for name in augment.PRESETS}
    assert mirroring["none"].mirror == ()
    seen = {name: set() for name in mirroring}
    for name, chosen in mirroring.items():
        for seed in range(40):
            x, y = replace(chosen, pairs=((1, 2),))(image, labels, np.random.default_rng(seed))
            seen[name].add(int(x[0, 0, 0, 0]))
            row = [1, 3, 0, 2] if x[0, 0, 0, 0] % 4 else [1, 0, 3, 2]
            assert y.tolist() == [[row] * 3] * 2
            x, y = replace(chosen, pairs=None)(image, labels, np.random.default_rng(seed))
            assert x[0, 0, 0, 0] % 4 == 0 and y.tolist() == labels.tolist()
    assert seen["none"] == {0} and seen["mild"] == {0, 3}
    assert seen["nnunet"] == {d + h + w for d in (0, 12) for h in (0, 8) for w in (0, 3)}
    flat, _ = mirroring["nnunet"](image[0], labels[0], np.random.default_rng(3))
    assert flat.shape == (3, 4, 1)


@pytest.mark.parametrize("fields, message", [
    ({"rotation": (1, 30, -30)}, "rotation.*no lower"),
    ({"noise": (2, 0, 1)}, "noise.*from 0 to 1"),
    ({"blur": (-0.1, 0, 1)}, "blur.*from 0 to 1"), ({"blur": (0.1, -1, 1)}, "blur.*between 0"),
    ({"gamma": (1, 1.2, 1.5)}, "gamma.*between 0.1 and 1"), ({"scale": (1, 0, 1)}, "scale"),
    ({"contrast": (1, 0.5, 0.9)}, "contrast.*between 1"), ({"rotation": (1, -200, 0)}, "rotation"),
    ({"low_resolution": (1, 0.5, 2)}, "low_resolution"), ({"noise": (1, 0, 1, 3)}, "noise"),
    ({"noise": (float("nan"), 0, 1)}, "noise"), ({"shift": (1, float("nan"), 1)}, "shift"),
    ({"mirror": (0,)}, "mirror"), ({"mirror": (-1, -1)}, "mirror"),
    ({"spacing": (1.0, 0.0, 1.0)}, "spacing"), ({"spacing": (1.0, 1.0)}, "three"),
])
def test_wrong_augmentations(fields, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**fields)


def test_wrong_presets():
    with pytest.raises(ValueError, match="'wild'.*none, mild, nnunet"):
        augment.preset("wild", (1.0, 1.0, 1.0))
