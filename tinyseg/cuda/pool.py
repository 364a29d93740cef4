"""Max pooling and its adjoint, at rank one to three: kernels/pool.cu."""

from __future__ import annotations

from math import ceil, prod
from typing import Any

import numpy as np

from ..backend import Array, array_module
from .loader import launch, plain
from .norm import THREADS, tiles

AXIS = [(name, "int32") for name in ("size", "count", "kernel", "stride", "before", "dilation")]
WINDOW = np.dtype([(axis, AXIS) for axis in ("depth", "height", "width")])  # as in the source
ABSENT = (1, 1, 1, 1, 0, 1)  # an axis that a lower rank has not


def _axes(window: Any, size: tuple[int, ...], count: tuple[int, ...]) -> np.ndarray:
    """struct Window of the source; raises ValueError for what the kernels do not do."""
    if any(window.edge) or len(size) > 3:
        raise ValueError(f"max pooling on the GPU has at most three axes and no padding that "
                         f"repeats the border; found {window}")
    before = [p[0] for p in window.padding]
    axes = list(zip(size, count, window.kernel, window.stride, before, window.dilation,
                    strict=True))
    return np.array((*[ABSENT] * (3 - len(axes)), *axes), WINDOW)


def _run(kernel: str, inputs: tuple, axes: np.ndarray, outputs: tuple) -> None:
    """`kernel`, a thread for each point of the first output and its channels."""
    *points, channels = outputs[0].shape
    vector, block, count = tiles(channels)
    launch("pool", kernel, (ceil(prod(points) / block[1]), count), block, *inputs, axes,
           prod(points), channels, *outputs, VECTOR=vector, THREADS=THREADS)


def maximum(x: Array, window: Any) -> tuple[Array, Array]:
    """The largest number in each window and the tap that holds it: see windows.reference.maximum.

    (N, *S, C) float32 and a windows.Window without edge padding -> (N, *P, C) float32 and int16.
    NaN as there: y is NaN, and the tap is the one that was largest before the NaN.
    """
    library, size = array_module(x), x.shape[1:-1]
    count = window.positions(size)
    y = library.empty((len(x), *count, x.shape[-1]), x.dtype)
    winner = library.empty(y.shape, "int16")
    _run("maximum", (plain(x),), _axes(window, size, count), (y, winner))
    return y, winner


def maximum_adjoint(g: Array, winner: Array, size: tuple[int, ...], window: Any) -> Array:
    """Each gradient goes to the tap that won: (N, *P, C) -> (N, *size, C)."""
    dx = array_module(g).empty((len(g), *size, g.shape[-1]), g.dtype)
    _run("maximum_adjoint", (plain(g), plain(winner)), _axes(window, size, g.shape[1:-1]), (dx,))
    return dx
