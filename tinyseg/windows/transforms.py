"""Small matrices along the axes of an array, as Winograd's filters have them (see `winograd`)."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

from ..backend import Array

ROW = 1 << 14  # numbers in a row that a transform takes at a time


def filtering(m: int) -> tuple[Array, Array, Array]:
    """Aᵀ (m, m + 2), Bᵀ (m + 2, m + 2) and G (m + 2, 3) of F(m, 3), by Toom and Cook.

    Signals are polynomials, known by their values at the points 0, 1, -1, 1/2, -2 (the first m + 1)
    and infinity. G evaluates the filter, divided by the denominators of Lagrange's interpolation;
    Bᵀ holds the coefficients of its numerators; a correlation is the transpose of a product
    (Barabasz et al. 2020, "Error analysis and improving the accuracy of Winograd convolution";
    with 2 in place of 1/2, rounding is half as much again for each axis).
    """
    points = np.array((0, 1, -1, 1 / 2, -2)[: m + 1])
    others = [np.delete(points, i) for i in range(m + 1)]
    infinity = np.eye(m + 2)[-1:]
    a = np.vstack([np.vander(points, m, increasing=True), infinity[:, -m:]])
    b = [[*np.poly(o)[::-1], 0] for o in others] + [np.poly(points)[::-1]]
    g = np.vander(points, 3, increasing=True) / [[np.prod(p - o)] for p, o in
                                                 zip(points, others, strict=True)]
    return a.T, np.array(b), np.vstack([g, infinity[:, -3:]])


# Aᵀ, Bᵀ and G for m outputs of a tile along an axis; an axis of one tap has m = 1.
FILTERS = {1: [np.ones((1, 1), "float32")] * 3,
           **{m: [matrix.astype("float32") for matrix in filtering(m)] for m in (2, 3, 4)}}


class Pass(NamedTuple):
    """A matrix along one axis, as one product of views.

    number: of the matrix. turned: the shape in which to exchange the two axes in the middle before,
    if at all. seen, strides: those of the points that tiles see, in x as it lies. made, view: the
    shape of the answer, and in which shape the product writes it.
    """

    number: int
    turned: tuple[int, ...] | None
    seen: tuple[int, ...]
    strides: tuple[int, ...]
    made: tuple[int, ...]
    view: tuple[int, ...]


@lru_cache(4096)
def passes(shape: tuple[int, ...], matrices: tuple[tuple[int, int], ...], steps: tuple[int, ...],
           itemsize: int, longest: int) -> list[Pass]:
    """How to transform an array of this shape with matrices of those; `longest`: see ROW."""
    count, *size, channels = shape
    found, lead, tiles = [], 1, count
    for i, ((frequencies, reach), step, n) in enumerate(zip(matrices, steps, size, strict=True)):
        if frequencies == reach == 1:
            tiles *= n
            continue
        number, row, cut = (n - reach) // step + 1, prod(size[i + 1 :]) * channels, 1
        for points in size[i + 1 :]:  # what lies behind a point is one long row, cut where too long
            cut *= points if row > longest * cut else 1
        turned = None
        if 0 < i == len(size) - 1:  # nothing lies behind: there the tiles of the other axes go
            turned = lead, tiles, n, row
            cut = next(c for c in range(1, tiles + 1)
                       if tiles % c == 0 and (tiles * row <= longest * c or c == tiles))
            row, tiles = tiles * row, 1
        length = row // cut
        found.append(Pass(
            i, turned, (lead, tiles, number, cut, reach, length),
            tuple(itemsize * far for far in (tiles * n * row, n * row, step * row, length, row, 1)),
            (lead * frequencies, tiles * number, row),
            (lead, frequencies, tiles, number, cut, length)))
        lead, tiles = lead * frequencies, tiles * number
    return found


def transform(matrices: list[Array], x: Array, steps: tuple[int, ...] | None = None,
              out: Array | None = None) -> Array:
    """The matrices (f, r), one an axis and ⊗ over the axes, times tiles of r x ... points of x:
    (N, *S, C) -> (frequencies, N tiles, C). Tiles begin `steps` apart; without, there is one.
    Where the last of several axes is transformed, its tiles come first: (tiles, N, others)."""
    x, shape = np.ascontiguousarray(x), x.shape
    todo = passes(shape, tuple([m.shape for m in matrices]), steps or shape[1:-1], x.itemsize, ROW)
    for number, turned, seen, strides, made, view in todo:
        if turned:
            x = whole(x.reshape(turned)).swapaxes(1, 2).copy().view(x.dtype)
        points = np.ndarray(seen, x.dtype, x, 0, strides)  # uncopied
        x = np.empty(made, x.dtype) if out is None or number < todo[-1].number else out
        np.matmul(matrices[number], points, out=x.reshape(view).transpose(0, 2, 3, 4, 1, 5))
    return x.reshape(todo[-1].made[0], -1, shape[-1])


def whole(x: Array) -> Array:
    """x (..., C), its last axis as one item: runs of few channels are copied twice as fast."""
    return x.view(np.dtype((np.void, x.shape[-1] * x.itemsize)))[..., 0]
