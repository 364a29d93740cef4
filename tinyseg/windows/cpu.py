"""Convolution on the cores of a CPU: NumPy arrays of float32, any rank.

Every product and every weight gradient is computed in one of five ways, as `choose` decides.

    point    a kernel of one tap: one matrix product
    lines    three taps along the first axis, wide kernels: see `lines`
    tiles    three taps along several axes, enough channels and points: see `winograd`
    taps     outputs on a strided subgrid, as in a strided gradient in x: tap by tap
    columns  any other: im2col for some taps at a time; could compute them all, see `without`

Columns: outputs are computed in blocks that stay in cache, side by side on all cores. For each
block, what a group of taps sees is copied into `columns`, multiplied with its part of the kernel,
and added to the block. Where all outputs are one block, threads share the filters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product as every
from math import ceil, prod
from typing import Any, NamedTuple

import numpy as np

from .. import parallel
from ..backend import Array
from . import lines, winograd
from .columns import BLOCK, ROWS, Columns, boxes, even, shape, volume
from .geometry import Box, Window, blocks
from .pooling import maximum, maximum_adjoint
from .products import Correlation, Finish, constant, outputs

__all__ = ["maximum", "maximum_adjoint", "products", "serves", "weights"]  # the engine

SHORTER = ("point", "lines", "tiles", "taps")  # than columns, where they can be had
_avoided: set[str] = set()


def serves(window: Window, *arrays: Array) -> bool:
    """Whether this engine takes these arrays; float64 is for checking and goes to the reference."""
    return all(isinstance(a, np.ndarray) and a.dtype == np.float32 and a.size for a in arrays)


def _common(a: Box, b: Box) -> Box:
    """What two boxes share, empty along an axis where nothing."""
    low = [max(x.start, y.start) for x, y in zip(a, b, strict=True)]
    return tuple(slice(n, max(n, min(x.stop, y.stop)))
                 for n, x, y in zip(low, a, b, strict=True))


class Method(NamedTuple):
    """How something is computed: one of the five ways, and what that needs to know, the outputs of
    a line or the `Tiling`."""

    name: str
    plan: Any = None


def choose(x_shape: tuple[int, ...], kernel, filters: int, positions, stride, dilation, before, *,
           subgrid: bool = False, apart: bool = False, fixed: bool = False) -> Method:
    """The way that a product, or a weight gradient, of these sizes is computed.

    subgrid: its outputs are a strided subgrid of an array; apart: they do not lie together there;
    fixed: its kernel is constant, so that what is made of it is kept.
    """
    images, *size, channels = x_shape
    sizes = kernel, images, channels, filters, positions, stride, dilation
    if "lines" not in _avoided and (m := lines.outputs(*sizes, before, fixed)):
        return Method("lines", m)
    if "tiles" not in _avoided and (way := winograd.tiling(*sizes, fixed)):
        return Method("tiles", way)
    inside = not any(before) and all((p - 1) * s < n for p, s, n in
                                     zip(positions, stride, size, strict=True))
    if "point" not in _avoided and prod(kernel) == 1 and inside and not apart:
        return Method("point")
    return Method("taps" if subgrid and "taps" not in _avoided else "columns")


@contextmanager
def without(*ways: str) -> Iterator[None]:
    """In the block, a CPU computes no convolution in the ways that are named, of "point", "lines",
    "tiles" (both of Winograd) and "taps", but in those that are left; `explain` tells of them.
    Holds for all threads of the process. ValueError for others, "columns" among them, which takes
    their place."""
    if wrong := sorted({*ways} - {*SHORTER}):
        raise ValueError(f"found {', '.join(wrong)}; expected some of {', '.join(SHORTER)}")
    before = {*_avoided}
    _avoided.update(ways)
    try:
        yield
    finally:
        _avoided.intersection_update(before)


def _points(x: Array, positions, stride) -> Array:
    """What a kernel of one tap sees, (points, C), where it sees no padding."""
    seen = (slice(0, (p - 1) * s + 1, s) for p, s in zip(positions, stride, strict=True))
    return x[(slice(None), *seen)].reshape(-1, x.shape[-1])


def method(x: Array, problem: Correlation) -> Method:
    """How a problem is computed; see `choose`."""
    w, out = problem.w, outputs(problem)
    return choose(x.shape, w.shape[:-2], w.shape[-1], out.shape[1:-1], problem.stride,
                  problem.dilation, problem.before, subgrid=max(problem.step) > 1,
                  apart=not out.flags.c_contiguous, fixed=constant(w))


def products(x: Array, problems: Iterable[Correlation]) -> None:
    """See products: into[:, start::step] = correlate(x, w) of each."""
    jobs: list = []
    for problem in sorted(problems, key=lambda problem: -problem.w.size):  # the longest jobs first
        w, out, (name, plan) = problem.w, outputs(problem), method(x, problem)
        *_, stride, dilation, before, finish = problem
        if name == "lines":
            lines.product(products, x, w, out, plan, stride, dilation, before, finish)
        elif name == "tiles":
            winograd.product(plan, x, w, out, before, finish)
        elif name == "point":
            points, matrix = _points(x, out.shape[1:-1], stride), w.reshape(w.shape[-2:])
            y = out.reshape(-1, out.shape[-1])
            if finish.residual is not None:
                finish = finish._replace(residual=finish.residual.reshape(y.shape))
            number = even(ceil(len(y) * max(matrix.shape) / BLOCK), (len(y),))
            jobs += [partial(_multiply, points, matrix, rows, y, finish)
                     for rows in parallel.parts(len(y), ceil(len(y) / number))]
        else:
            terms, boxes = (_taps(x, w, out, dilation, before) if name == "taps" else
                            _columns(x, w, out, stride, dilation, before))
            one, filters = out[..., 0].size < ROWS, w.shape[-1]
            size = max(64, ceil(filters / parallel.threads())) if one else filters
            jobs += [partial(_add, terms, block, part, out, finish) for block in boxes
                     for part in parallel.parts(filters, size)]
    parallel.run(lambda job: job(), jobs)


def _multiply(points: Array, matrix: Array, rows: slice, out: Array, finish: Finish) -> None:
    """Write some rows of points @ matrix, finished, to those of `out`."""
    y = out[rows]
    np.matmul(points[rows], matrix, out=y)
    finish(y, y, rows)


def _add(terms: Callable[[Box, slice], Iterator[tuple[Box, Array]]], block: Box, part: slice,
         out: Array, finish: Finish) -> None:
    """Write the sum of its terms, each an array in its box, finished, to a block of `out`, some
    filters."""
    out, total = out[..., part], None
    for box, term in terms(block, part):
        if total is None and box == block:
            total = term
            continue
        if total is None:
            total = np.zeros((*shape(block), out.shape[-1]), out.dtype)
        total[tuple(slice(a.start - b.start, a.stop - b.start)
                    for a, b in zip(box, block, strict=True))] += term
    if total is None:
        total = np.zeros((*shape(block), out.shape[-1]), out.dtype)
    finish(total, out[block], block, part)


def _columns(x: Array, w: Array, out: Array, stride, dilation, before):
    """The terms of correlate(x, w), a group of taps each, and blocks to take them in."""
    columns = Columns(x, w.shape[:-2], out.shape[1:-1], stride, dilation, before)
    matrices = {head: w[head].reshape(-1, w.shape[-1]) for head, _ in columns.groups}

    def terms(block: Box, part: slice) -> Iterator[tuple[Box, Array]]:
        memory = np.empty(volume(block) * columns.width, x.dtype)
        for head, sees in columns.groups:
            box = _common(sees, block)
            if volume(box):
                answer = np.matmul(columns.terms(head, box, memory), matrices[head][:, part])
                yield box, answer.reshape(*shape(box), -1)

    return terms, columns.boxes(w.shape[-1])


def _taps(x: Array, w: Array, out: Array, dilation, before):
    """The terms of correlate(x, w) at stride one, a tap each, and blocks to take them in. All
    points that lie together in x are multiplied, those at the border that no window sees with this
    tap too: nothing is gathered or padded, and the kernel is read as it lies."""
    taps = [(w[tap], [0, *(k * d - b for k, d, b in zip(tap, dilation, before, strict=True))])
            for tap in np.ndindex(w.shape[:-2])]

    def terms(block: Box, part: slice) -> Iterator[tuple[Box, Array]]:
        # Behind this axis the block is whole, and points lie together.
        cut = max(axis for axis, (a, b) in enumerate(zip(shape(block), out.shape, strict=False))
                  if a < b or axis < 2)
        for matrix, shift in taps:
            box = _common(tuple(slice(-s, n - s) for n, s in zip(x.shape, shift, strict=False)),
                          block)
            if volume(box):
                points = tuple(slice(b.start + s, b.stop + s)
                               for b, s in zip(box, shift, strict=True))
                seen = x[points[: cut + 1]]
                answer = np.matmul(seen.reshape(len(seen), -1, x.shape[-1]), matrix[:, part])
                answer = answer.reshape(*seen.shape[:-1], -1)
                yield box, answer[(..., *points[cut + 1 :], slice(None))]

    return terms, blocks(out.shape[:-1], max(ROWS, BLOCK // max(w.shape[-2:])))


def weights(x: Array, y: Array, kernel, stride, dilation, before) -> Array:
    """See products: the gradient of correlate(x, w) in w, (*K, C_in, C_out)."""
    filters = y.shape[-1]
    name, plan = choose(x.shape, kernel, filters, y.shape[1:-1], stride, dilation, before)
    if name == "lines":
        return lines.weights(weights, x, y, plan, kernel, stride, dilation, before)
    if name == "tiles":
        return winograd.weights(plan, x, y, before)
    if name == "point":
        dw = np.empty((*kernel, x.shape[-1], filters), x.dtype)
        points = _points(x, y.shape[1:-1], stride)
        rows, matrix = (a.reshape(-1, a.shape[-1]) for a in (y, dw))
        parallel.run(lambda part: np.matmul(points[:, part].T, rows, out=matrix[part]),
                     parallel.parts(len(matrix)))
        return dw
    columns = Columns(x, kernel, y.shape[1:-1], stride, dilation, before)
    cut = boxes(y.shape[:-1], max(4, columns.width, filters) // 4)  # long sums, less to add
    threads, groups = parallel.threads(), columns.groups
    shares = 1 if len(groups) >= 4 * threads else min(len(cut), threads)
    # The first share of the boxes is summed in dw itself; groups that see nothing are none.
    unseen = len(groups) < prod(kernel[: columns.lead])
    dw = (np.zeros if unseen else np.empty)((*kernel, x.shape[-1], filters), x.dtype)
    more = np.empty((shares - 1, len(groups), columns.width, filters), x.dtype)

    def compute(item: tuple[int, int]) -> None:
        share, number = item
        head, sees = groups[number]
        memory = np.empty(max(map(volume, cut)) * columns.width, x.dtype)
        total = more[share - 1, number] if share else dw[head].reshape(-1, filters)
        empty = True
        for block in cut[share::shares]:
            box = _common(sees, block)
            if volume(box):
                seen, g = columns.gather(head, box, memory), y[box].reshape(-1, filters)
                if empty:
                    np.matmul(seen.T, g, out=total)
                else:
                    total += seen.T @ g
                empty = False
        if empty:
            total[...] = 0

    parallel.run(compute, list(every(range(shares), range(len(groups)))))
    for (head, _), parts in zip(groups, more.swapaxes(0, 1), strict=True):
        for part in parts:
            dw[head].reshape(-1, filters)[...] += part
    return dw
