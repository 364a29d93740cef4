"""Cross-entropy and soft Dice on the GPU: the kernels of kernels/loss.cu."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import numpy as np

from ..backend import Array, array_module
from .capture import is_capturing
from .loader import MULTIPROCESSORS, SHARED_LIMIT, launch

MAX_CLASSES = 32  # a thread holds all classes of a voxel in registers
THREADS, BLOCKS = 256, 8 * MULTIPROCESSORS  # as many threads as are in flight at once
_NOTHING = 2**31  # a label to ignore that no int32 equals


@cache
def _weights(weight: tuple[float, ...], library: ModuleType, device: int) -> Array:
    """Weights of the host on the current GPU, whose number is `device`. A step that is captured
    finds here what the one before it brought: it may not bring anything."""
    return library.asarray(weight, "float32")


def _narrow(labels: Array) -> Array:
    """A copy of `labels` as int32; those that do not fit saturate, and are out of range still."""
    library, held, fits = array_module(labels), np.iinfo(labels.dtype), np.iinfo("int32")
    if held.max > fits.max:
        labels = library.minimum(labels, fits.max)
    if held.min < fits.min:
        labels = library.maximum(labels, fits.min)
    return library.array(labels, dtype="int32", order="C")


def confusion(logits: Array, labels: Array) -> Array | None:
    """train._confusion, (N, C, C + 1) int32 on the GPU; None for more classes than a block holds.

    logits (N, *S, C), labels (N, *S) of any integers.
    """
    library, classes, n = array_module(logits), logits.shape[-1], len(labels)
    voxels, shared = labels.size // n, 4 * classes * (classes + 1)
    if shared > SHARED_LIMIT:
        return None
    counts = library.zeros((n, classes, classes + 1), "int32")
    launch("loss", "confusion", (min(-(-voxels // THREADS), max(1, BLOCKS // n)), n), (THREADS,),
           library.ascontiguousarray(logits), _narrow(labels), classes, voxels, counts,
           shared=shared)
    return counts


def segmentation(logits: Array, labels: Array, *, entropy: bool = False, overlap: bool = False,
                 ignore: int | None = None, weight: Array | None = None, smooth: float = 1e-5,
                 background: bool = False) -> tuple[Array, Callable[[Array], Array]]:
    """The loss of losses._segmentation, and pull(g) -> its gradient in the logits times `g`.

    logits (N, *S, C) with at most MAX_CLASSES classes, labels (N, *S) of any integers, weight
    (C,) or None, g (). The value stays on the GPU; one number is read from there, whether a label
    is out of range, and ValueError says which; where nothing may be read, as launches are being
    captured, the value is NaN then. That shapes fit is the caller's care.
    """
    library, classes, voxels = array_module(logits), logits.shape[-1], labels.size
    narrow = _narrow(labels)
    inputs = (library.ascontiguousarray(logits), narrow, voxels,
              _NOTHING if ignore is None else int(ignore))
    if weight is not None:
        if not isinstance(weight, library.ndarray):
            weight = _weights(tuple(map(float, weight)), library, logits.device.id)
        weight = library.ascontiguousarray(weight, dtype="float32")
    grid = (min(-(-voxels // THREADS), BLOCKS),)
    partials = library.empty((*grid, 4 * classes + 1), "float32")
    value, wrong = library.empty((), "float32"), library.empty((), "int32")
    factors = library.empty((3, classes), "float32")
    launch("loss", "sums", grid, (THREADS,), *inputs, partials, CLASSES=classes)
    launch("loss", "merge", (1,), (1024,), partials, len(partials), weight, int(entropy),
           int(overlap), int(not background), smooth, value, wrong, factors, CLASSES=classes)
    if not is_capturing() and int(wrong):
        known = (narrow >= 0) & (narrow < classes)
        if ignore is not None:
            known |= narrow == ignore
        raise ValueError(f"labels hold {int(labels[~known][0])}; expected 0 to {classes - 1}"
                         + ("" if ignore is None else f", or {ignore} to ignore"))

    def pull(g: Array) -> Array:
        dx = library.empty(logits.shape, "float32")
        launch("loss", "gradient", grid, (THREADS,), *inputs, factors,
               library.asarray(g, dtype="float32"), dx, CLASSES=classes)
        return dx

    return value, pull
