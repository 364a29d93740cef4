"""An affine map of a patch into a volume: image and labels resampled once, in any rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

SLAB = 2**16  # voxels at a time: what is computed of each of them stays in the cache


def sample(image: np.ndarray, labels: np.ndarray, matrix: np.ndarray, origin: np.ndarray,
           size: Sequence[int], outside: int) -> tuple[np.ndarray, np.ndarray]:
    """What lies at origin + matrix @ i, for each voxel i of a patch of `size`.

    image (*S, C) and labels (*S), perhaps memory maps, of which only the box that is needed is
    read -> (*size, C) float32 and (*size), dtype kept; matrix (rank, rank) and origin (rank,) in
    voxels. The image is interpolated linearly, and goes on beyond its border as its edge does. A
    label is the class whose indicator, interpolated so, is largest (ties go to the smaller one, as
    in `ct.resample_labels`), and `outside` is a class that fills what is beyond the border.

    >>> image, labels = np.array([[0.0], [10.0], [20.0], [30.0]]), np.array([0, 0, 1, 1])
    >>> half, from_one = np.array([[0.5]]), np.array([1.0])  # at 1, 1.5, 2 and 2.5
    >>> values, classes = ts.data.affine.sample(image, labels, half, from_one, (4,), outside=255)
    >>> values.ravel(), classes.tolist()
    (array([10., 15., 20., 25.], dtype=float32), [0, 0, 1, 1])
    """
    shape = np.array(labels.shape)
    reach = matrix * (np.array(size) - 1)
    low, high = (np.floor(np.clip(origin + part.sum(axis=1) + margin, -1, shape)).astype(int)
                 for part, margin in ((np.minimum(reach, 0), -1e-3), (np.maximum(reach, 0), 1e-3)))
    low, high = np.minimum(low, shape - 1), high + 2  # of the box, with the cells' far corners
    box = tuple(map(slice, np.maximum(low, 0), np.minimum(high, shape)))
    beyond = list(zip(np.maximum(-low, 0), np.maximum(high - shape, 0), strict=True))
    image, labels = np.array(image[box], np.float32), np.array(labels[box])
    if np.any(beyond):
        image = np.pad(image, [*beyond, (0, 0)], mode="edge")
        labels = np.pad(labels, beyond, constant_values=outside)
    strides = [int(np.prod(labels.shape[axis + 1 :])) for axis in range(labels.ndim)]
    between = [axis for axis, row in enumerate(matrix) if np.any(row % 1) or origin[axis] % 1]
    cell = [sum(steps) for steps in product(*((0, strides[axis]) for axis in between))]
    values, classes = image.reshape(-1, image.shape[-1]), labels.ravel()
    mixed = np.zeros(classes.shape, bool)  # cells that have corners of several classes
    for step in cell[1:]:
        mixed[:-step] |= classes[step:] != classes[:-step]

    images = np.empty((*size, image.shape[-1]), np.float32)
    maps = np.empty(size, labels.dtype)
    thickness = max(1, SLAB * size[0] // maps.size)
    for first in range(0, size[0], thickness):
        part = slice(first, min(first + thickness, size[0]))
        grid = [i.astype(np.float32) for i in np.ogrid[part, *(slice(n) for n in size[1:])]]
        index, shares = np.zeros((1,) * len(size), np.int32), []
        for axis, stride in enumerate(strides):
            x = sum((m * i for m, i in zip(matrix[axis].tolist(), grid, strict=True) if m),
                    np.float32(origin[axis] - low[axis]))
            x = np.clip(x, np.float32(-1 - low[axis]), np.float32(shape[axis] - low[axis]))
            whole = np.floor(x)
            index = index + whole.astype(np.int32) * stride
            if axis in between:
                shares.append(x - whole)
        index = np.broadcast_to(index, maps[part].shape).astype(np.intp)
        images[part] = _linear([values.take(index + step, axis=0, mode="clip") for step in cell],
                               shares)
        maps[part] = classes.take(index, mode="clip")
        places = np.flatnonzero(mixed.take(index, mode="clip"))
        maps[part].reshape(-1)[places] = _vote(
            np.stack([classes.take(index.reshape(-1)[places] + step) for step in cell]),
            [np.broadcast_to(share, index.shape).reshape(-1)[places] for share in shares])
    return images, maps


def _linear(corners: list[np.ndarray], shares: list[np.ndarray]) -> np.ndarray:
    """What the corners of cells hold, the last axis changing first, interpolated: (..., C)."""
    for share in reversed(shares):
        for lower, upper in zip(corners[::2], corners[1::2], strict=True):
            upper -= lower
            upper *= share[..., None]
            upper += lower  # a + t (b - a): constants stay exactly constant
        corners = corners[1::2]
    return corners[0]


def _vote(corners: np.ndarray, shares: list[np.ndarray]) -> np.ndarray:
    """Of labels (corners, n), in the same order, those that have most weight: (n,)."""
    weights = np.ones((1, corners.shape[1]), np.float32)
    for share in shares:
        weights = (weights[:, None] * np.stack([1 - share, share])).reshape(
            2 * len(weights), len(share))
    winner, best = corners[0], np.zeros(corners.shape[1], np.float32)
    for label in np.flatnonzero(np.bincount(corners.ravel())):
        weight = np.where(corners == label, weights, 0).sum(axis=0)
        winner = np.where(weight > best, label, winner)
        best = np.maximum(best, weight)
    return winner
