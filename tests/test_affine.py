"""One resampling: equal to SciPy's, to windows, to np.rot90; and it reads no more than it needs."""

from itertools import product
from unittest.mock import patch as replaced

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from tinyseg.data import affine

OUTSIDE = 255


def volume(shape, channels=2, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(*shape, channels)).astype(np.float16)
    return image, rng.integers(0, classes, shape).astype(np.uint8)


def places(matrix, origin, size):
    """(rank, *size) source coordinates, voxel by voxel."""
    found = [origin + matrix @ i for i in product(*map(range, size))]
    return np.array(found).T.reshape(len(size), *size)


@settings(max_examples=60, deadline=None)
@given(rank=st.integers(1, 3), seed=st.integers(0, 9999), thickness=st.integers(1, 3),
       inside=st.booleans(), data=st.data())
def test_any_map_samples_as_scipy_does_and_labels_win_by_weight(rank, seed, thickness, inside,
                                                                data):
    """Images go on as their edge; the indicator of each class is zero beyond the border, where
    that of `outside` is one."""
    shape = data.draw(st.tuples(*[st.integers(1, 7)] * rank))
    size = data.draw(st.tuples(*[st.integers(1, 5)] * rank))
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rank, rank)) * rng.choice([0, 0.3, 1], (rank, rank))
    origin = rng.uniform(0, shape) if inside else rng.uniform(-9, 15, rank)
    image, labels = volume(shape, seed=seed)
    with replaced.object(affine, "SLAB", thickness * int(np.prod(size[1:]))):
        sampled, voted = affine.sample(image, labels, matrix, origin, size, OUTSIDE)
    assert sampled.shape == (*size, 2) and sampled.dtype == np.float32
    assert voted.shape == size and voted.dtype == np.uint8
    where = places(matrix, origin, size)
    for c in range(2):
        expected = map_coordinates(image[..., c].astype(float), where, order=1, mode="nearest")
        np.testing.assert_allclose(sampled[..., c], expected, atol=2e-4)
    weight = {label: map_coordinates((labels == label).astype(float), where, order=1,
                                     mode="grid-constant") for label in np.unique(labels)}
    weight[OUTSIDE] = 1 - sum(weight.values())
    table = np.stack(list(weight.values()))
    chosen = np.stack([weight.get(label, np.nan) for label in range(256)
                       if label in weight])[np.searchsorted(sorted(weight), voted),
                                            *np.indices(size)]
    np.testing.assert_allclose(chosen, table.max(axis=0), atol=2e-4)


def test_ties_go_to_the_smaller_label():
    labels = np.array([3, 1, 2, 2, 7], np.uint8)
    _, voted = affine.sample(labels[:, None], labels, np.eye(1), np.array([0.5]), (4,), OUTSIDE)
    assert voted.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("shape, plane", [((5, 5), (0, 1)), ((4, 4, 3), (0, 1)),
                                          ((4, 3, 4), (0, 2)), ((2, 5, 5), (1, 2))])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_are_those_of_numpy(shape, plane, turns):
    image, labels = volume(shape)
    a, b = plane
    matrix = np.eye(len(shape))
    cos, sin = np.cos(turns * np.pi / 2), np.sin(turns * np.pi / 2)
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = cos, sin, -sin, cos
    middle = (np.array(shape) - 1) / 2
    turned, voted = affine.sample(image, labels, matrix, middle - matrix @ middle, shape, OUTSIDE)
    np.testing.assert_allclose(turned, np.rot90(image.astype("f4"), turns, plane), atol=1e-5)
    np.testing.assert_array_equal(voted, np.rot90(labels, turns, plane))


def test_whole_voxels_are_copied_bit_for_bit_and_constants_stay():
    image, labels = volume((5, 6, 7))
    sampled, voted = affine.sample(image, labels, np.diag([1.0, 2, 1]), np.array([1.0, 0, 2]),
                                   (3, 3, 4), OUTSIDE)
    np.testing.assert_array_equal(sampled, image[1:4, ::2, 2:6].astype(np.float32))
    np.testing.assert_array_equal(voted, labels[1:4, ::2, 2:6])
    constant = np.full((5, 6, 7, 1), 0.1, np.float16)
    matrix = np.random.default_rng(0).normal(size=(3, 3))
    sampled, _ = affine.sample(constant, labels, matrix, np.array([2.0, 3, 3]), (6, 7, 8), OUTSIDE)
    assert (sampled == np.float32(np.float16(0.1))).all()


@pytest.mark.parametrize("factor", [0.6, 0.8, 1.3])
def test_volumes_change_by_the_determinant(factor):
    """A ball seen at another scale, and turned."""
    at = np.stack(np.meshgrid(*[np.arange(36)] * 3, indexing="ij"), -1) - 17.5
    labels = (np.linalg.norm(at, axis=-1) < 8).astype(np.uint8)
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    matrix = factor * turn * np.sign(np.linalg.det(turn))
    origin = 17.5 - matrix.sum(axis=1) * 17
    _, voted = affine.sample(labels[..., None], labels, matrix, origin, (35, 35, 35), OUTSIDE)
    assert abs((voted == 1).sum() * np.linalg.det(matrix) / labels.sum() - 1) < 0.03


def test_only_the_box_is_read():
    read = []

    class Watched(np.ndarray):
        def __getitem__(self, item):
            part = super().__getitem__(item)
            if self.base is None:
                read.append(part.shape[:3])
            return part

    def watched(array):
        result = np.ndarray.__new__(Watched, array.shape, array.dtype)
        result[...] = array
        return result

    image, labels = volume((30, 40, 50))
    turn = np.array([[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]])
    origin = np.array([3.0, 20, 20])
    affine.sample(watched(image), watched(labels), turn, origin, (4, 6, 5), OUTSIDE)
    assert len(read) == 2 and read[0] == read[1]
    assert all(n <= reach for n, reach in zip(read[0], (6, 10, 10), strict=True))
