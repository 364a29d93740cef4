"""Flips and intensity changes, the same functions for slices and volumes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyseg.data import augment


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
