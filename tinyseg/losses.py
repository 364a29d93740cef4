"""Losses of segmentation: cross-entropy, soft Dice, and their sum.

logits (N, *S, C) as a tensor of floats, labels (N, *S) as an integer array -> a single number.
Voxels labelled `ignore` count nowhere, whatever their logits are (NaN too); a class may be masked
by a logit of minus infinity. One operation serves all three: they share the softmax.
"""

from __future__ import annotations

import numpy as np

from . import cuda
from .backend import Array, array_module
from .tensor import Tensor, op


def cross_entropy(logits: Tensor, labels: Array, ignore: int | None = None,
                  weight: Array | None = None) -> Tensor:
    """Σ w_y (-log softmax(logits)_y) / Σ w_y over the voxels; `weight` is (C,), by default one."""
    return _segmentation(logits, labels, entropy=True, ignore=ignore, weight=weight)


def dice(logits: Tensor, labels: Array, ignore: int | None = None, *, smooth: float = 1e-5,
         background: bool = False) -> Tensor:
    """1 minus the mean over classes of the soft Dice of the softmax p and the labels t,

        (2 Σ p t + smooth) / (Σ p + Σ t + smooth)    (Milletari et al. 2016; nnU-Net's form),

    summed over batch and space; without the background (class 0) unless asked for.
    """
    return _segmentation(logits, labels, overlap=True, ignore=ignore, smooth=smooth,
                         background=background)


def dice_cross_entropy(logits: Tensor, labels: Array, ignore: int | None = None,
                       weight: Array | None = None, *, smooth: float = 1e-5,
                       background: bool = False) -> Tensor:
    """`dice` + `cross_entropy`, one to one (nnU-Net's loss)."""
    return _segmentation(logits, labels, entropy=True, overlap=True, ignore=ignore, weight=weight,
                         smooth=smooth, background=background)


@op
def _segmentation(logits, labels, *, entropy=False, overlap=False, ignore=None, weight=None,
                  smooth=1e-5, background=False):
    library, classes = array_module(logits), logits.shape[-1]
    if logits.dtype.kind != "f":
        raise ValueError(f"logits are {logits.dtype}; expected floats")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels {labels.shape} do not fit logits {logits.shape}")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype}; expected integers")
    weight = None if weight is None else library.asarray(weight, dtype=logits.dtype)
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"weight {weight.shape} does not fit {classes} classes")
    if overlap and classes == 1 and not background:
        raise ValueError("soft Dice without background needs at least two classes")
    if cuda.serves(logits) and classes <= cuda.loss.MAX_CLASSES:
        value, pull = cuda.loss.segmentation(logits, labels, entropy=entropy, overlap=overlap,
                                             ignore=ignore, weight=weight, smooth=smooth,
                                             background=background)
        return value, (pull,)
    # Classes first, voxels in one axis: sums over a last axis of three numbers are slow.
    shape, labels = labels.shape, labels.reshape(-1)
    log_p = library.ascontiguousarray(logits.reshape(-1, classes).T)
    counted = library.ones_like(labels, dtype=bool) if ignore is None else labels != ignore
    known = ((labels >= 0) & (labels < classes)) | ~counted
    if not known.all():
        raise ValueError(f"labels hold {int(labels[~known][0])}; expected 0 to {classes - 1}"
                         + ("" if ignore is None else f", or {ignore} to ignore"))

    # A difference beyond the largest number is as good as -inf; an ignored voxel may hold anything.
    with np.errstate(over="ignore", invalid="ignore"):
        log_p = log_p - log_p.max(axis=0)
    p = library.exp(log_p)
    mass = p.sum(axis=0)
    p /= mass
    if ignore is not None:
        p = library.where(counted, p, 0)  # a NaN would pass through every product
    t = ((labels == library.arange(classes)[:, None]) & counted).astype(logits.dtype)
    value, parts = library.zeros((), logits.dtype), []

    if entropy:
        weighted = t if weight is None else t * weight[:, None]
        voxel = weighted.sum(axis=0)
        total = voxel.sum()
        total = total + (total == 0)  # nothing counts: the sum above it is zero too
        found = log_p[library.where(counted, labels, 0), library.arange(len(labels))]
        surprise = library.where(voxel > 0, library.log(mass) - found, 0)  # else it may be infinite
        value = value + (voxel * surprise).sum() / total
        parts.append(lambda: (p * voxel - weighted) / total)

    if overlap:
        first = 0 if background else 1
        both = 2 * (p * t).sum(axis=1) + smooth
        either = p.sum(axis=1) + t.sum(axis=1) + smooth
        ratio = both / either
        value = value + 1 - ratio[first:].mean()

        def through_softmax():
            dp = ratio[:, None] * counted - 2 * t
            dp /= either[:, None] * (classes - first)
            dp[:first] = 0
            return p * (dp - (p * dp).sum(axis=0))

        parts.append(through_softmax)

    def pull(g):
        gradient = parts[0]()
        for part in parts[1:]:
            gradient += part()
        gradient *= g
        return library.ascontiguousarray(gradient.T).reshape(*shape, classes)

    return value, (pull,)
