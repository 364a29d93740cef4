"""Linear interpolation on the GPU and its adjoint: the kernels of kernels/upsample.cu."""

from __future__ import annotations

from functools import cache
from math import prod
from types import ModuleType

import numpy as np

from ..backend import Array, array_module
from .loader import launch

THREADS = 256


def coordinates(n: int, m: int, align_corners: bool) -> tuple[np.ndarray, np.ndarray]:
    """Where the m points of a linear interpolation read n samples: `low` and `fraction`, (m,) each.

    Point i reads at i (n-1)/(m-1) where corners are aligned, else at (i + 1/2) n/m - 1/2, clamped
    to the samples: sample low with weight 1 - fraction, the next one with weight fraction, which
    is zero where there is none.
    """
    i = np.arange(m)
    at = i * (n - 1) / max(m - 1, 1) if align_corners else (i + 0.5) * n / m - 0.5
    at = at.clip(0, n - 1)
    low = np.floor(at).astype(int)
    return low, at - low


@cache  # never let go: a captured step knows them by their address
def _tables(n: int, m: int, align_corners: bool, library: ModuleType,
            device: int) -> tuple[Array, Array, Array]:
    """low (m,), fraction (m,) and start (n + 2,) on the current GPU, whose number is `device`.

    Points start[j] to start[j+1] read sample j as the upper one of two, points start[j+1] to
    start[j+2] as the lower.
    """
    low, fraction = coordinates(n, m, align_corners)
    start = np.searchsorted(low, np.arange(-1, n + 1))
    return (library.asarray(low, dtype="int32"), library.asarray(fraction, dtype="float32"),
            library.asarray(start, dtype="int32"))


def upsample(x: Array, size: tuple[int, ...], align_corners: bool) -> Array:
    """`x` interpolated along its spatial axes, at most three: (N, *S, C) -> (N, *size, C)."""
    if x.shape[1:-1] == tuple(size):
        return x
    library, flat = array_module(x), (1,) * (3 - len(size))  # a plane is a volume of depth one
    before, after = (*flat, *x.shape[1:-1]), (*flat, *size)
    tables = [_tables(n, m, align_corners, library, x.device.id)[:2]
              for n, m in zip(before, after, strict=True)]
    y = library.empty((len(x), *size, x.shape[-1]), x.dtype)
    row = after[2] * x.shape[-1]
    threads = min(THREADS, -(-row // 32) * 32)
    grid = y.size // row, min(-(-row // (4 * threads)), 65535)  # a thread makes about four numbers
    rows = 4 if before[0] != after[0] else 2 if before[1] != after[1] else 1
    launch("upsample", "linear", grid, (threads,), library.ascontiguousarray(x),
           *(table for axis in tables for table in axis), *before, *after[:2], row, x.shape[-1], y,
           ROWS=rows)
    return y


def upsample_adjoint(g: Array, before: tuple[int, ...], align_corners: bool) -> Array:
    """The adjoint of `upsample` from the spatial shape `before`: (N, *size, C) -> (N, *before, C).

    One launch for each axis whose size changed, first axis first.
    """
    library = array_module(g)
    for axis, n in enumerate(before, start=1):
        m = g.shape[axis]
        if n == m:
            continue
        _, fraction, start = _tables(n, m, align_corners, library, g.device.id)
        dx = library.empty((*g.shape[:axis], n, *g.shape[axis + 1 :]), g.dtype)
        launch("upsample", "linear_adjoint", (-(-dx.size // THREADS),), (THREADS,),
               library.ascontiguousarray(g), start, fraction, n, m, prod(g.shape[axis + 1 :]),
               dx.size, dx)
        g = dx
    return g
