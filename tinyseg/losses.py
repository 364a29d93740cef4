"""Losses of segmentation: cross-entropy, soft Dice, and their sum.

logits (N, *S, C) as a tensor of floats, labels (N, *S) as an integer array -> a single number.
Voxels labelled `ignore` count nowhere, whatever their logits are (NaN too); a class may be masked
by a logit of minus infinity. With `ranks` it is the loss of all ranks' samples together, as if they
were one batch. One operation serves all three: they share the softmax.
"""

from __future__ import annotations

import numpy as np

from . import cuda, parallel
from .backend import Array, array_module
from .ranks import ALONE, Alone
from .tensor import Tensor, op


def cross_entropy(logits: Tensor, labels: Array, ignore: int | None = None,
                  weight: Array | None = None, *, ranks: Alone = ALONE) -> Tensor:
    """Σ w_y (-log softmax(logits)_y) / Σ w_y over the voxels; `weight` is (C,), by default one.

    >>> logits = ts.Tensor(np.log([[[1 / 2, 1 / 2], [7 / 8, 1 / 8]]]))  # (1, 2, 2)
    >>> loss = ts.losses.cross_entropy(logits, np.array([[0, 1]]))
    >>> f"{loss.item() / np.log(2):.3f} bits"  # the mean of 1 and 3
    '2.000 bits'
    """
    return _segmentation(logits, labels, entropy=True, ignore=ignore, weight=weight,
                         ranks=ranks)


def dice(logits: Tensor, labels: Array, ignore: int | None = None, *, smooth: float = 1e-5,
         background: bool = False, ranks: Alone = ALONE) -> Tensor:
    """1 minus the mean over classes of the soft Dice of the softmax p and the labels t,

        (2 Σ p t + smooth) / (Σ p + Σ t + smooth)    (Milletari et al. 2016; nnU-Net's form),

    summed over batch and space; without the background (class 0) unless asked for.

    >>> logits = ts.Tensor(np.zeros((1, 3, 2)))  # three voxels, p = 1/2
    >>> ts.losses.dice(logits, np.array([[0, 1, 255]]), ignore=255, smooth=0).item()
    0.5
    """
    return _segmentation(logits, labels, overlap=True, ignore=ignore, smooth=smooth,
                         background=background, ranks=ranks)


def dice_cross_entropy(logits: Tensor, labels: Array, ignore: int | None = None,
                       weight: Array | None = None, *, smooth: float = 1e-5,
                       background: bool = False, ranks: Alone = ALONE) -> Tensor:
    """`dice` + `cross_entropy`, one to one (nnU-Net's loss).

    >>> logits = ts.Tensor(np.zeros((1, 2, 2)))  # p = 1/2
    >>> loss = ts.losses.dice_cross_entropy(logits, np.array([[0, 1]]))
    >>> f"{loss.item() - np.log(2):.3f}"  # the cross-entropy is log 2
    '0.500'
    """
    return _segmentation(logits, labels, entropy=True, overlap=True, ignore=ignore, weight=weight,
                         smooth=smooth, background=background, ranks=ranks)


@op
def _segmentation(logits, labels, *, entropy=False, overlap=False, ignore=None, weight=None,
                  smooth=1e-5, background=False, ranks=ALONE):
    library, classes = array_module(logits), logits.shape[-1]
    if logits.dtype.kind != "f":
        raise ValueError(f"logits are {logits.dtype}; expected floats")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels {labels.shape} do not fit logits {logits.shape}")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype}; expected integers")
    found = weight.shape if hasattr(weight, "shape") else np.shape(weight)  # of a list
    if weight is not None and found != (classes,):
        raise ValueError(f"weight {found} does not fit {classes} classes")
    if overlap and classes == 1 and not background:
        raise ValueError("soft Dice without background needs at least two classes")
    if ranks.size == 1 and cuda.serves(logits) and classes <= cuda.loss.MAX_CLASSES:
        value, pull = cuda.loss.segmentation(logits, labels, entropy=entropy, overlap=overlap,
                                             ignore=ignore, weight=weight, smooth=smooth,
                                             background=background)
        return value, (pull,)
    weight = None if weight is None else library.asarray(weight, dtype=logits.dtype)
    shape, labels, rows = labels.shape, labels.reshape(-1), logits.reshape(-1, classes)
    counted = library.ones_like(labels, dtype=bool) if ignore is None else labels != ignore
    known = ((labels >= 0) & (labels < classes)) | ~counted
    right = known.all()
    if not cuda.is_capturing() and not right:
        raise ValueError(f"labels hold {int(labels[~known][0])}; expected 0 to {classes - 1}"
                         + ("" if ignore is None else f", or {ignore} to ignore"))
    # Slabs of voxels that stay in cache, classes first: sums over a last axis of three are slow.
    size = max(1, parallel.SLAB // 4 // classes) if library is np else len(labels)
    slabs = parallel.parts(len(labels), size)
    kind = np.result_type(labels.dtype, np.min_scalar_type(classes - 1))
    numbers = library.arange(classes, dtype=kind)[:, None]
    probabilities = [None] * len(slabs)
    sums = library.zeros((2, len(slabs)), "float64")  # of the voxels' weights, and of w (-log p)
    areas = library.zeros((2, len(slabs), classes), "float64")  # Σ p t and Σ p + Σ t

    def targets(slab):
        """t (C, n) of a slab, t times the weights of its classes, and the weights (n,)."""
        t = ((labels[slab] == numbers) & counted[slab]).astype(logits.dtype)
        if weight is None:
            return t, t, counted[slab].astype(logits.dtype)
        weighted = t * weight[:, None]
        return t, weighted, weighted.sum(axis=0)

    def measure(i):
        slab = slabs[i]
        t, _, voxel = targets(slab)
        log_p = library.ascontiguousarray(rows[slab].T)
        # A difference beyond the largest number is as good as -inf; an ignored voxel may be NaN.
        with np.errstate(over="ignore", invalid="ignore"):
            log_p = log_p - log_p.max(axis=0)
        p = library.exp(log_p)
        mass = p.sum(axis=0)
        p /= mass
        if ignore is not None:  # a NaN would pass through every product
            library.copyto(p, 0, where=~counted[slab])
        probabilities[i] = p
        if entropy:
            y = library.where(counted[slab] & known[slab], labels[slab], 0).astype("int64")
            found = log_p.reshape(-1)[y * len(y) + library.arange(len(y))]
            surprise = library.where(voxel > 0, library.log(mass) - found, 0)  # else maybe infinite
            sums[0, i], sums[1, i] = voxel.sum(), (voxel * surprise).sum()
        if overlap:
            areas[0, i] = (p * t).sum(axis=1)
            areas[1, i] = p.sum(axis=1) + t.sum(axis=1)

    parallel.run(measure, range(len(slabs)))
    sums, areas = ranks.total(sums.sum(axis=1)), ranks.total(areas.sum(axis=1))
    weights, surprise = sums
    weights = weights + (weights == 0)  # nothing counts: the sum above it is zero too
    value, first = surprise / weights, 0 if background else 1
    both, either = areas
    both, either = 2 * both + smooth, either + smooth
    if overlap:
        value = value + 1 - (both / either)[first:].mean()
    if cuda.is_capturing():  # nothing may be read: the value tells
        value = library.where(right, value, np.nan)

    def pull(g):
        gradient = library.empty(rows.shape, rows.dtype)
        share = (g / weights).astype(logits.dtype)
        if overlap:  # d loss / dp = slope (Dice - 2 t)
            slope = g / (either * (classes - first))
            slope[:first] = 0
            always, inside = ((slope * x).astype(logits.dtype)[:, None] for x in (both / either, 2))

        def differentiate(i):
            p, (t, weighted, voxel) = probabilities[i], targets(slabs[i])
            if overlap:
                dx = always - inside * t
                dx -= (p * dx).sum(axis=0)  # through the softmax: p (dp - Σ p dp)
                if entropy:
                    dx += voxel * share
                dx *= p
            else:
                dx = p * (voxel * share)
            if entropy:  # its gradient is p - t
                dx -= weighted * share
            gradient[slabs[i]] = dx.T

        parallel.run(differentiate, range(len(slabs)))
        return gradient.reshape(*shape, classes)

    return library.asarray(value, dtype=logits.dtype), (pull,)
