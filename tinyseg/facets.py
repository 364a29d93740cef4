"""The surface that marching cubes draws between voxels of a mask and others: its facets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from math import factorial

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Corner = tuple[int, ...]


@cache
def facets(rank: int) -> np.ndarray:
    """(codes, facets, rank): the facets between the voxels of each neighbour code, as normals.

    A normal is as long as its facet's area on a grid of step 1, without signs. Codes with fewer
    facets than others are filled up with zeros.

    Marching cubes as first published (Lorensen and Cline 1987): a code and its complement have
    one surface, which cuts off the corners in the minority, each connected part on its own. So
    ambiguous faces, where two corners of four touch in a point, need no rule of their own.

    >>> facets(2)[0b0001]  # one corner of four: cut off by half a diagonal, as high as it is wide
    array([[0.5, 0.5],
           [0. , 0. ]])
    """
    corners = list(product((0, 1), repeat=rank))
    table = []
    for code in range(2 ** len(corners)):
        minority = {corner for bit, corner in enumerate(corners) if code >> bit & 1}
        if 2 * len(minority) > len(corners):
            minority = set(corners) - minority
        table.append([normal for part in _parts(minority) for normal in _cap(part)])
    most = max(map(len, table))
    return np.array([found + [np.zeros(rank)] * (most - len(found)) for found in table])


def _beside(corner: Corner) -> list[Corner]:
    return [(*corner[:axis], 1 - at, *corner[axis + 1 :]) for axis, at in enumerate(corner)]


def _parts(corners: set[Corner]) -> Iterator[frozenset[Corner]]:
    """The sets of corners that edges of the cube connect."""
    left = set(corners)
    while left:
        part = grown = {left.pop()}
        while grown:
            grown = {near for corner in grown for near in _beside(corner)} & left
            left -= grown
            part = part | grown
        yield frozenset(part)


@cache
def _cap(part: frozenset[Corner]) -> np.ndarray:
    """(facets, rank): what cuts connected corners, at most half of all, off from the others.

    The cap spans a ring of points, the middles of the edges that it cuts. Where they lie in one
    plane any fan of triangles will do. Where they do not, for an L of three corners and a twisted
    chain of four, it is the fan with the greatest area, which folds into the fewest planes.
    """
    left = [np.add(corner, near) / 2 for corner in sorted(part) for near in _beside(corner)
            if near not in part]
    ring = [left.pop()]
    while left:  # the next is at most 1 away, on the same face of the cube; all others are farther
        ring.append(left.pop(int(np.argmin(np.linalg.norm(left - ring[-1], axis=1)))))
    fans = [_fan(np.roll(ring, -start, axis=0)) for start in range(len(ring))]
    return max(fans, key=lambda normals: float(np.linalg.norm(normals, axis=-1).sum()))


def _fan(ring: np.ndarray) -> np.ndarray:
    """(facets, rank): the simplices that the first point spans with each rank - 1 next ones."""
    rank = ring.shape[1]
    spans = sliding_window_view(ring[1:] - ring[0], rank - 1, axis=0)  # (facets, rank, rank - 1)
    minors = [np.linalg.det(np.delete(spans, axis, axis=1)) for axis in range(rank)]
    return np.abs(np.stack(minors, axis=-1)) / factorial(rank - 1)
