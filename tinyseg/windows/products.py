"""Every convolution as one of two primitives with zero padding, which an engine implements.

    products  into[:, start::step] = correlate(x, w), for an x and several `Correlation`s: the
              output may be a strided subgrid
    weights   the gradient of correlate(x, w) in w

- A border that repeats is written out before (`pad`) and added up after (`pad_adjoint`).
- The gradient in x is a product again. Along an axis with stride s, the inputs a, a + s, a + 2s,
  ... see only the taps k with (a + before - k dilation) divisible by s; walked backwards, these
  step evenly through y, which is a convolution of stride one with a part of the kernel.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import product
from math import ceil, gcd
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..backend import Array, array_module
from ..parallel import widened
from .geometry import Window
from .reference import pad, pad_adjoint


class Finish(NamedTuple):
    """max(y [+ bias] [+ residual], 0), the maximum where asked, of outputs y (N, *P, C_out): bias
    (C_out,), residual (N, *P, C_out). The CPU's engine does it block by block, each in cache."""

    bias: Array | None = None
    residual: Array | None = None
    relu: bool = False

    @property
    def plain(self) -> bool:
        """Whether outputs stay as they are."""
        return self.bias is None and self.residual is None and not self.relu

    def __call__(self, y: Array, out: Array, where: Any = ..., filters: slice = slice(None)
                 ) -> None:
        """Of the outputs at the index `where`, some filters, written to `out`, and over y on the
        way, which may be the same array."""
        if self.bias is not None:
            rows, bias = y, self.bias[filters]
            if y.flags.c_contiguous:
                rows, bias = widened(y.reshape(-1, y.shape[-1]), bias)
            rows += bias
        if self.residual is not None:
            y += self.residual[where][..., filters]
        if self.relu:  # NumPy takes a third as long with zeros of two axes as with the number
            library = array_module(y)
            library.maximum(y, np.zeros(y.shape[-2:], y.dtype) if library is np else 0, out=out)
        elif out is not y:
            out[...] = y


PLAIN = Finish()


class Correlation(NamedTuple):
    """into[:, start::step] = correlate(x, w): w (*K, C_in, C_out), into (N, *S, C_out), and for
    each axis where the outputs begin and how far apart they stand in `into`, stride and dilation of
    the kernel, and how far before the grid (of zeros outside) its first tap stands; and what is
    done to the outputs."""

    w: Array
    into: Array
    start: tuple[int, ...]
    step: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    finish: Finish = PLAIN


def outputs(problem: Correlation) -> Array:
    """Where the outputs of a problem stand, (N, *P, C_out): a view."""
    return problem.into[(slice(None), *(slice(a, None, s) for a, s in zip(
        problem.start, problem.step, strict=True)))]


class Engine(Protocol):
    """What computes the two primitives."""

    def products(self, x: Array, problems: Iterable[Correlation]) -> None:
        """Each of the problems, for x (N, *S, C_in), all with the same `into`; their kernels are
        parts of one array."""

    def weights(self, x: Array, y: Array, kernel: tuple[int, ...], stride: tuple[int, ...],
                dilation: tuple[int, ...], before: tuple[int, ...]) -> Array:
        """The gradient, (*K, C_in, C_out), for x (N, *S, C_in) and y (N, *P, C_out)."""


@lru_cache(maxsize=4096)
def repeated(window: Window) -> tuple[Window, tuple[tuple[int, int], ...]]:
    """The window without its repeated border, and how far that extends the grid, batch first."""
    border = [p if e else (0, 0) for p, e in zip(window.padding, window.edge, strict=True)]
    zeros = tuple((0, 0) if e else p for p, e in zip(window.padding, window.edge, strict=True))
    return replace(window, padding=zeros, edge=(False,) * len(zeros)), ((0, 0), *border)


_kept: dict[int, tuple[weakref.ref, tuple, Array]] = {}  # of constant arrays: made in which way


def constant(w: Array) -> bool:
    """Whether a NumPy array is to stay as it is: read-only, in memory of its own. Who lets it be
    written again must not freeze it anew with other numbers."""
    return w.flags.owndata and not w.flags.writeable


def kept(w: Array, way: tuple, make: Callable[[Array], Array]) -> Array:
    """make(w); of a constant w it is kept as long as w lives and is asked for in the same `way`."""
    if not constant(w):
        return make(w)
    name, (_, before, made) = id(w), _kept.get(id(w), (None, None, None))
    if before != way:
        made = make(w)
        _kept[name] = weakref.ref(w, lambda _: _kept.pop(name, None)), way, made
    return made


def correlate(engine: Engine, x: Array, w: Array, window: Window, finish: Finish = PLAIN
              ) -> Array:
    """See reference.correlate; its outputs finished."""
    window, border = repeated(window)
    x, rank = pad(x, border, [True] * len(border)), len(window.kernel)
    y = array_module(x).empty((len(x), *window.positions(x.shape[1:-1]), w.shape[-1]), x.dtype)
    engine.products(x, [Correlation(w, y, (0,) * rank, (1,) * rank, window.stride, window.dilation,
                                    tuple(p[0] for p in window.padding), finish)])
    return y


@lru_cache(maxsize=4096)
def phases(size: int, kernel: int, stride: int, dilation: int, before: int) -> list[tuple]:
    """The inputs a, a + stride, ... along one axis, for each a, as a convolution of the output.

    Each is (a, the slice of taps, their dilation, padding before); the slice is None where no tap
    reaches these inputs.
    """
    common = gcd(stride, dilation)
    found: list[tuple] = []
    for a in range(min(stride, size)):
        reaching = [k for k in range(kernel) if (a + before - k * dilation) % stride == 0]
        if not reaching:
            found.append((a, None, 1, 0))
            continue
        last = reaching[-1]
        found.append((a, slice(last, None, -(stride // common)), dilation // common,
                      -((a + before - last * dilation) // stride)))
    return found


def correlate_dx(engine: Engine, y: Array, w: Array, size: tuple[int, ...],
                 window: Window) -> Array:
    """See reference.correlate_dx."""
    library = array_module(y)
    window, border = repeated(window)
    grid = tuple(n + sum(b) for n, b in zip(size, border[1:], strict=True))
    axes = [phases(n, k, s, d, p[0]) for n, k, s, d, p in zip(
        grid, window.kernel, window.stride, window.dilation, window.padding, strict=True)]
    untouched = any(taps is None for axis in axes for _, taps, _, _ in axis)
    dx = (library.zeros if untouched else library.empty)((len(y), *grid, w.shape[-2]), y.dtype)
    swapped, ones = w.swapaxes(-1, -2), (1,) * len(size)
    engine.products(y, [
        Correlation(swapped[taps], dx, start, window.stride, ones, dilation, before)
        for start, taps, dilation, before in (zip(*c, strict=True) for c in product(*axes))
        if None not in taps])
    return library.ascontiguousarray(pad_adjoint(dx, border, [True] * len(border)))


def correlate_dw(engine: Engine, x: Array, y: Array, window: Window) -> Array:
    """See reference.correlate_dw."""
    window, border = repeated(window)
    return engine.weights(pad(x, border, [True] * len(border)), y, window.kernel, window.stride,
                          window.dilation, tuple(p[0] for p in window.padding))


def count(grid: tuple[int, ...], start: tuple[int, ...], step: tuple[int, ...]) -> tuple[int, ...]:
    """How many points start, start + step, ... each axis of a grid has."""
    return tuple(ceil((n - a) / s) for n, a, s in zip(grid, start, step, strict=True))
