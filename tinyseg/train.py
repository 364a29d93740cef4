"""Training: one step after the other, each telling what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite
from time import perf_counter

import numpy as np

from . import cuda
from .backend import Array, array_module, to_library, to_numpy
from .nn import Module
from .optim import Optimizer, poly
from .tensor import Tensor


@dataclass(frozen=True, eq=False)
class Record:
    """What one step did. `overlap` of its patches is that of the network before the step."""

    step: int
    loss: float
    lr: float
    overlap: np.ndarray
    seconds: float

    @property
    def patch_dice(self) -> dict[int, float]:
        """The Dice of the hard prediction on this step's patches; not that of whole volumes."""
        return dice(self.overlap)


def overlap(logits: Array, labels: Array) -> np.ndarray:
    """(N, classes - 1, 2) integers: 2 |P and T| and |P| + |T| of the hard prediction P and the
    labels T, for every patch and class but 0, over the voxels that are labelled with a class."""
    library, space = array_module(logits), tuple(range(1, labels.ndim))
    predicted, counted = logits.argmax(axis=-1), labels < logits.shape[-1]
    pairs = [((predicted == c) & counted, labels == c) for c in range(1, logits.shape[-1])]
    sums = [library.stack([2 * (p & t).sum(space), p.sum(space) + t.sum(space)], axis=-1)
            for p, t in pairs]
    return to_numpy(library.stack(sums, axis=1)) if sums else np.zeros((len(labels), 0, 2), int)


def dice(overlap: np.ndarray) -> dict[int, float]:
    """{class: Σ 2 |P and T| / Σ (|P| + |T|)} over patches, classes that are in none left out."""
    both, sizes = overlap.sum(axis=0).T
    return {c: float(b / n) for c, (b, n) in enumerate(zip(both, sizes, strict=True), 1) if n}


def clip_norm(parameters: list[Tensor], limit: float) -> float:
    """Scale all gradients so that their joint Euclidean norm is at most `limit`; returns the norm
    before. Gradients are replaced, not written into."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = (float(cuda.optim.norm(grads)) if cuda.serves(*grads)
            else sum(float((g * g).sum()) for g in grads) ** 0.5)
    if norm > limit:
        for p in parameters:
            if p.grad is not None:
                p.grad = p.grad * (limit / norm)
    return norm


def fit(net: Module, batch: Callable[[int], tuple[Array, Array]],
        loss: Callable[[Tensor, Array], Tensor], optimizer: Optimizer, steps: int, *,
        start: int = 0, schedule: Callable[[int, int], float] = poly,
        clip: float = 12.0) -> Iterator[Record]:
    """Train from step `start` to `steps`, yielding a `Record` after each.

    batch(step) -> (images (N, *S, C), labels (N, *S)) is a function of the step, so that a run
    that was interrupted goes on exactly as it would have. The learning rate of a step is the
    optimiser's rate at the start of this call times schedule(step, steps); gradients are clipped
    to the norm `clip` (nnU-Net's 12). The network's train or eval mode is the caller's choice.
    Raises ValueError for an optimiser of parameters that are not this network's, and
    FloatingPointError where the loss or the gradient is not finite. However a step ends
    (that, no memory, Ctrl-C), parameters and running statistics are those after the last good
    step, unless `optimizer.steps` has grown: then they were being moved.
    """
    base, parameters = optimizer.lr, net.parameters()
    statistics = net.statistics()
    moved, mine = {*map(id, optimizer.parameters)}, {*map(id, parameters)}
    if moved - mine and any(p.requires_grad and id(p) not in moved for p in parameters):
        raise ValueError(f"{len(moved - mine)} of the optimiser's {len(moved)} parameters are not"
                         " in this network, and some of the network's are not in the optimiser;"
                         " make it of net.parameters(), after inflating or loading")
    library = array_module(parameters[0].data)
    try:
        for step in range(start, steps):
            began = perf_counter()
            images, labels = (to_library(a, library) for a in batch(step))
            taken, before = optimizer.steps, [array.copy() for array in statistics]
            try:
                logits = net(images)
                value = loss(logits, labels)
                number = float(value.data)
                counts = overlap(logits.data, labels)
                del logits
                optimizer.zero_grad()
                value.backward()
                norm = clip_norm(parameters, clip)
                if not (isfinite(number) and isfinite(norm)):
                    raise FloatingPointError(f"loss {number}, norm of the gradient {norm} at step "
                                             f"{step}; lower the learning rate or look at this "
                                             "step's images")
                optimizer.lr = base * schedule(step, steps)
                optimizer.step()
            except BaseException:  # Ctrl-C too may come at any time
                if optimizer.steps == taken:
                    for array, good in zip(statistics, before, strict=True):
                        array[...] = good
                raise
            yield Record(step, number, optimizer.lr, counts, perf_counter() - began)
    finally:
        optimizer.lr = base
