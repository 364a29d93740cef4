"""Training: one step after the other, each telling what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite
from time import perf_counter

from . import cuda
from .backend import Array, array_module, to_library
from .nn import Module
from .optim import Optimizer, poly
from .tensor import Tensor


@dataclass(frozen=True)
class Record:
    """What one step did. patch_dice: {class number: Dice of the hard prediction on this step's
    patches}, classes absent from both left out; it is not the Dice of whole volumes."""

    step: int
    loss: float
    lr: float
    patch_dice: dict[int, float]
    seconds: float


def patch_dice(logits: Array, labels: Array) -> dict[int, float]:
    """2 |P and T| / (|P| + |T|) per foreground class over the voxels of a batch that are
    labelled with a class."""
    predicted, counted = logits.argmax(axis=-1), labels < logits.shape[-1]
    scores = {}
    for c in range(1, logits.shape[-1]):
        p, t = (predicted == c) & counted, labels == c
        size = int(p.sum()) + int(t.sum())
        if size:
            scores[c] = 2 * int((p & t).sum()) / size
    return scores


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
    Raises FloatingPointError where the loss or the gradient is not finite. However a step ends
    (that, no memory, Ctrl-C), parameters and running statistics are those after the last good
    step, unless `optimizer.steps` has grown: then they were being moved.
    """
    base, parameters = optimizer.lr, net.parameters()
    statistics = net.statistics()
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
                scores = patch_dice(logits.data, labels)
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
            yield Record(step, number, optimizer.lr, scores, perf_counter() - began)
    finally:
        optimizer.lr = base
