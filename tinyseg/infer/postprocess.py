"""What is done to a label map after the network's answer."""

from __future__ import annotations

import numpy as np


def islands(labels: np.ndarray, *, largest: bool = False, smallest: float = 0) -> np.ndarray:
    """A label map, (H, W) or (D, H, W), in which the islands not asked for became background.

    An island is a connected component of one class; voxels that share a face, an edge or a corner
    are connected (26 neighbours in 3D, as in nnU-Net). `smallest` keeps those of at least so many
    voxels, `largest` the largest of each class only, the first among equals.

    >>> labels = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [2, 0, 0, 0]])
    >>> ts.infer.islands(labels, largest=True).tolist()
    [[1, 1, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]]
    >>> ts.infer.islands(labels, smallest=2).tolist()
    [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    """
    if not largest and smallest <= 1:
        return labels
    from scipy.ndimage import find_objects, label  # takes longer than all of tinyseg to import

    result = labels.copy()
    for number, box in enumerate(find_objects(labels), 1):
        if box is None:
            continue
        part = result[box]
        found, count = label(part == number, np.ones((3,) * labels.ndim))
        # Row by row: NumPy widens whole index arrays to 8 bytes a voxel.
        sizes = np.zeros(count + 1, int)
        for ids in found:
            sizes += np.bincount(ids.ravel(), minlength=count + 1)
        keep = sizes >= smallest
        if largest:
            keep &= np.arange(count + 1) == 1 + sizes[1:].argmax()
        keep[0] = True  # other classes and the background
        for row, ids in zip(part, found, strict=True):
            row[~keep[ids]] = 0
    return result
