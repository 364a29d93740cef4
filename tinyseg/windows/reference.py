"""The specification of convolution: one bilinear form, read three ways, in any rank.

    ⟨correlate(x, w), y⟩ = ⟨x, correlate_dx(y, w)⟩ = ⟨w, correlate_dw(x, y)⟩

    x  (N, *S, C_in)     the input on its grid S
    w  (*K, C_in, C_out) the kernel
    y  (N, *P, C_out)    the output, one position per window

`unfold` copies what each window sees into a row of a matrix (im2col), so that a convolution is one
matrix product; `fold` is its adjoint (col2im) and adds the rows back to where they came from.
The matrix is never whole: windows are taken in blocks whose columns fill at most WORKSPACE bytes,
and nothing is kept for the backward pass. The batch is one more axis of the grid, along which
every window is a single point.
"""

from __future__ import annotations

from math import prod

from ..backend import Array, array_module
from .geometry import Box, Window, blocks

WORKSPACE = 32 << 20  # bytes of columns at a time: few enough to bound, enough to fill the product


def pad(x: Array, missing, edge, fill: float = 0.0) -> Array:
    """`x` extended by `missing` (before, after) per axis: the border repeated, or `fill`."""
    borders = list(zip(missing, edge, strict=True))
    if not any(map(any, missing)):
        return x
    widths = [*missing, *[(0, 0)] * (x.ndim - len(missing))]
    shape = [n + sum(m) for n, m in zip(x.shape, widths, strict=True)]
    grown = array_module(x).empty(shape, x.dtype)
    grown[tuple(slice(m[0], m[0] + n) for n, m in zip(x.shape, widths, strict=True))] = x
    for axis, ((before, after), repeats) in enumerate(borders):
        lines = grown.swapaxes(0, axis)
        lines[:before] = lines[before] if repeats else fill
        lines[len(lines) - after :] = lines[len(lines) - after - 1] if repeats else fill
    return grown


def pad_adjoint(g: Array, missing, edge) -> Array:
    """The adjoint of `pad`: what came from a repeated border is added to that border."""
    for axis, ((before, after), repeats) in enumerate(zip(missing, edge, strict=True)):
        if not before and not after:
            continue
        g = g.swapaxes(0, axis)
        core = g[before : len(g) - after]
        if repeats:
            core = core.copy()
            core[0] += g[:before].sum(axis=0)
            core[-1] += g[len(g) - after :].sum(axis=0)
        g = core.swapaxes(0, axis)
    return g


def _batched(x: Array, window: Window, columns: int, workspace: int = 0):
    """The window over (N, *S) and the blocks of its positions, `columns` numbers per position."""
    window = window.over_batch()
    limit = (workspace or WORKSPACE) // (columns * x.dtype.itemsize)
    return window, list(blocks(window.positions(x.shape[:-1]), limit))


def unfold(x: Array, window: Window, block: Box) -> Array:
    """What a block of windows sees: (N, *S, C) -> (*block, *K, C), K with the batch's 1 in front.

    `window` is over the batch too; `block` is a box of its positions.
    """
    inside, missing = window.region(block, x.shape[:-1])
    region = pad(x[inside], missing, window.edge)
    count = tuple(b.stop - b.start for b in block)
    columns = array_module(x).empty((*count, *window.kernel, x.shape[-1]), x.dtype)
    for k, points in window.taps(count):
        columns[(..., *k, slice(None))] = region[points]
    return columns


def fold(columns: Array, window: Window, block: Box, into: Array) -> None:
    """The adjoint of `unfold`: adds (*block, *K, C) to the points of `into` (N, *S, C)."""
    inside, missing = window.region(block, into.shape[:-1])
    shape = [i.stop - i.start + sum(m) for i, m in zip(inside, missing, strict=True)]
    region = array_module(into).zeros((*shape, into.shape[-1]), into.dtype)
    count = tuple(b.stop - b.start for b in block)
    for k, points in window.taps(count):
        region[points] += columns[(..., *k, slice(None))]
    into[inside] += pad_adjoint(region, missing, window.edge)


def correlate(x: Array, w: Array, window: Window) -> Array:
    """y[n, p, o] = Σ_k,c x[n, p*stride + k*dilation - before, c] w[k, c, o].

    (N, *S, C_in), (*K, C_in, C_out) -> (N, *P, C_out).
    """
    matrix = w.reshape(-1, w.shape[-1])
    window, boxes = _batched(x, window, len(matrix))
    positions = window.positions(x.shape[:-1])
    y = array_module(x).empty((*positions, w.shape[-1]), array_module(x).result_type(x, w))
    for block in boxes:
        rows = unfold(x, window, block).reshape(-1, len(matrix))
        y[block] = (rows @ matrix).reshape(y[block].shape)
    return y


def correlate_dx(y: Array, w: Array, size: tuple[int, ...], window: Window) -> Array:
    """The adjoint of `correlate` in x: (N, *P, C_out), (*K, C_in, C_out) -> (N, *size, C_in)."""
    matrix = w.reshape(-1, w.shape[-1])
    dx = array_module(y).zeros((len(y), *size, w.shape[-2]), array_module(y).result_type(y, w))
    window, boxes = _batched(dx, window, len(matrix))
    for block in boxes:
        columns = y[block].reshape(-1, w.shape[-1]) @ matrix.T
        count = tuple(b.stop - b.start for b in block)
        fold(columns.reshape(*count, *window.kernel, w.shape[-2]), window, block, dx)
    return dx


def correlate_dw(x: Array, y: Array, window: Window) -> Array:
    """The adjoint of `correlate` in w: (N, *S, C_in), (N, *P, C_out) -> (*K, C_in, C_out)."""
    shape = (*window.kernel, x.shape[-1], y.shape[-1])
    dw = array_module(x).zeros((prod(shape[:-1]), shape[-1]), array_module(x).result_type(x, y))
    window, boxes = _batched(x, window, len(dw))
    for block in boxes:
        dw += unfold(x, window, block).reshape(-1, len(dw)).T @ y[block].reshape(-1, shape[-1])
    return dw.reshape(shape)


def maximum(x: Array, window: Window, workspace: int = 0, run=map) -> tuple[Array, Array]:
    """The largest number in each window, per channel, and the tap that holds it.

    (N, *S, C) -> (N, *P, C) and its taps in row-major order, the first of equals, as int16.
    Zero padding is minus infinity here: a window never answers with its padding. `run` goes
    through the blocks, of `workspace` bytes (0: WORKSPACE), which know nothing of each other.
    """
    library = array_module(x)
    window, boxes = _batched(x, window, x.shape[-1], workspace)
    y = library.empty((*window.positions(x.shape[:-1]), x.shape[-1]), x.dtype)
    winner = library.zeros(y.shape, "int16")

    def compute(block: Box) -> None:
        inside, missing = window.region(block, x.shape[:-1])
        region = pad(x[inside], missing, window.edge, fill=-float("inf"))
        best, tap = y[block], winner[block]
        for i, (_, points) in enumerate(window.taps(tuple(b.stop - b.start for b in block))):
            seen = region[points]
            if i:
                # i grows, so that the last tap to be larger is the largest number of those seen
                library.maximum(tap, (seen > best) * tap.dtype.type(i), out=tap)
                library.maximum(best, seen, out=best)
            else:
                best[...] = seen

    list(run(compute, boxes))
    return y, winner


def maximum_adjoint(g: Array, winner: Array, size: tuple[int, ...], window: Window) -> Array:
    """Each gradient goes to the tap that won: (N, *P, C) -> (N, *size, C)."""
    library = array_module(g)
    dx = library.zeros((len(g), *size, g.shape[-1]), g.dtype)
    window, boxes = _batched(dx, window, g.shape[-1])
    for block in boxes:
        inside, missing = window.region(block, dx.shape[:-1])
        shape = [i.stop - i.start + sum(m) for i, m in zip(inside, missing, strict=True)]
        region = library.zeros((*shape, g.shape[-1]), g.dtype)
        for i, (_, points) in enumerate(window.taps(tuple(b.stop - b.start for b in block))):
            region[points] += library.where(winner[block] == i, g[block], 0 * g.dtype.type(0))
        dx[inside] += pad_adjoint(region, missing, window.edge)
    return dx
