"""Training: one step after the other, each telling what it did."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from math import isfinite
from time import perf_counter
from typing import Any

import numpy as np

from . import cuda, parallel
from .backend import Array, array_module, to_library, to_numpy
from .module import Module, evaluation, overwrite
from .optim import Optimizer, Schedule, poly
from .ranks import ALONE, Alone
from .tensor import Tensor


@dataclass(frozen=True, eq=False)
class Record:
    """What one step did. `overlap` of its patches is that of the network before the step. Of its
    `seconds` it `waited` some for its batch; validation comes on top. `validation` is what
    `validate` said of the network after the step, where that was asked.

    >>> record = ts.train.Record(step=0, loss=0.7, lr=0.01, overlap=np.array([[[6, 8]]]), seconds=1)
    >>> record.patch_dice
    {1: 0.75}
    """

    step: int
    loss: float
    lr: float
    overlap: np.ndarray
    seconds: float
    waited: float = 0.0
    validation: dict[Any, float] | None = None

    @property
    def patch_dice(self) -> dict[int, float]:
        """The Dice of the hard prediction on this step's patches; not that of whole volumes."""
        return dice(self.overlap)

    @property
    def score(self) -> float | None:
        """The mean over classes of the validation, None where there was none."""
        return float(np.mean(list(self.validation.values()))) if self.validation else None


class Average:
    """The exponential moving average of a network's parameters and running statistics.

    Each `update` moves it, a <- d a + (1 - d) x with d = min(decay, (1 + t) / (10 + t)) after t
    updates: it soon forgets where it began (the warm-up of TensorFlow's ExponentialMovingAverage).
    The arrays stand beside the network's, and change in place; integers are the network's own.
    Raises ValueError for a decay outside [0, 1), and for a network that has changed its parts.

    >>> net = ts.nn.Linear(1, 1, std=0, rng=0)
    >>> average = ts.train.Average(net)
    >>> net.weight.data += 10
    >>> average.update()  # d = 1 / 10
    >>> with average.applied():
    ...     net.weight.data.item()
    9.0
    """

    def __init__(self, net: Module, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay!r}; expected at least 0 and below 1")
        self.net, self.decay, self.steps, self.arrays = net, float(decay), 0, net.state()

    def update(self) -> None:
        """Take the network's present state into the average."""
        mine = self.net._arrays()
        if _kinds(mine) != _kinds(self.arrays):
            raise ValueError("the network has other arrays than when its average was begun; make "
                             "the average after inflating, loading, converting or moving it")
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))

        def approach(a: Array, x: Array) -> None:  # d a + (1 - d) x without another array
            a -= x
            a *= decay
            a += x

        pairs = [(self.arrays[name], x) for name, x in mine.items()]
        floats = [(a, x) for a, x in pairs if a.dtype.kind == "f"]
        if cuda.serves(*(a for pair in floats for a in pair)):
            averages, present = zip(*floats, strict=True)
            cuda.optim.average(averages, present, decay)
        else:
            parallel.run(lambda piece: approach(*piece), [
                piece for pair in floats for piece in parallel.pieces(*pair)])
        for a, x in (pair for pair in pairs if pair[0].dtype.kind != "f"):
            a[...] = x
        self.steps += 1

    @contextmanager
    def applied(self) -> Iterator[Module]:
        """The network with the average in its place; after the block its own state is back."""
        own = self.net.state()
        try:
            self.net.load_state(self.arrays)
            yield self.net
        finally:
            self.net.load_state(own)

    def state(self) -> dict[str, Array]:
        """Copies of the average and the number of updates, {name: array}."""
        arrays = {f"average.{name}": a.copy() for name, a in self.arrays.items()}
        return {**arrays, "steps": np.asarray(self.steps)}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """The inverse of `state`; ValueError naming all that does not fit, and then nothing is
        written."""
        mine = {f"average.{name}": a for name, a in self.arrays.items()}
        mine["steps"] = np.asarray(self.steps)
        overwrite(mine, state, "average")
        self.steps = int(mine["steps"])


def _kinds(arrays: Mapping[str, Array]) -> dict[str, tuple]:
    return {name: (array_module(a), a.dtype, a.shape) for name, a in arrays.items()}


def _confusion(logits: Array, labels: Array) -> Array:
    """(N, classes, classes + 1) integers, where the logits are: the voxels of every patch by their
    prediction, the largest of the logits (N, *S, classes), and label (N, *S), if no class one more.
    """
    library, n, classes = array_module(logits), len(labels), logits.shape[-1]
    counts = cuda.loss.confusion(logits, labels) if cuda.serves(logits) else None
    if counts is None:  # one count of all triples (patch, prediction, label)
        known = library.where((labels >= 0) & (labels < classes), labels.astype("int64"), classes)
        triples = (logits.argmax(axis=-1) * (classes + 1) + known).reshape(n, -1)
        triples += library.arange(n)[:, None] * (classes * (classes + 1))
        counts = library.bincount(triples.reshape(-1), minlength=n * classes * (classes + 1))
    return counts.reshape(n, classes, classes + 1)


def overlap(logits: Array, labels: Array) -> np.ndarray:
    """(N, classes - 1, 2) integers: 2 |P and T| and |P| + |T| of the hard prediction P and the
    labels T, for every patch and class but 0, over the voxels that are labelled with a class.

    >>> logits = np.eye(2)[[[0, 1, 1, 1]]]  # a patch of four voxels: P has three, T two of them
    >>> ts.train.overlap(logits, np.array([[0, 0, 1, 1]])).tolist()
    [[[4, 5]]]
    """
    return _overlap(to_numpy(_confusion(logits, labels)))


def _overlap(table: np.ndarray) -> np.ndarray:
    table = table[:, :, :-1]
    return np.stack([2 * table.diagonal(axis1=1, axis2=2), table.sum(axis=1) + table.sum(axis=2)],
                    axis=-1)[:, 1:]


def dice(overlap: np.ndarray) -> dict[int, float]:
    """{class: Σ 2 |P and T| / Σ (|P| + |T|)} over patches, classes that are in none left out.

    >>> ts.train.dice(np.array([[[4, 5], [0, 0]], [[2, 3], [0, 0]]]))  # (2 patches, 2 classes, 2)
    {1: 0.75}
    """
    both, sizes = overlap.sum(axis=0).T
    return {c: float(b / n) for c, (b, n) in enumerate(zip(both, sizes, strict=True), 1) if n}


def _norm(gradients: Sequence[Array]) -> Array:
    """The joint Euclidean norm, () float64 where the gradients are."""
    if cuda.serves(*gradients):
        return cuda.optim.norm(gradients)
    parts = [piece.reshape(-1) for g in gradients for piece, in parallel.pieces(g)]
    return sum(parallel.run(lambda g: (g @ g).astype("float64"), parts)) ** 0.5


def clip_norm(parameters: list[Tensor], limit: float, before: float | None = None) -> float:
    """Scale all gradients so that their joint Euclidean norm is at most `limit`; returns the norm
    `before`, or takes it where it is known. Gradients are replaced, not written into.

    >>> p = ts.Tensor(np.zeros(2), requires_grad=True)
    >>> p.grad = np.array([3.0, 4.0])
    >>> ts.train.clip_norm([p], limit=2.5), p.grad
    (5.0, array([1.5, 2. ]))
    """
    if before is None:
        before = float(_norm([p.grad for p in parameters if p.grad is not None]))
    if before > limit:
        for p in parameters:
            p.grad = p.grad if p.grad is None else p.grad * (limit / before)
    return before


def prepared(batch: Callable[[int], Any], steps: Sequence[int], ahead: int
             ) -> Generator[Any, None, None]:
    """batch(step) of every step, in turn; while one is in use, one thread makes up to `ahead` more.

    What `batch` raises is raised at its step. However the iterator ends, so does the thread.

    >>> list(ts.train.prepared(lambda step: step**2, range(3, 6), ahead=1))
    [9, 16, 25]
    """
    if ahead < 0:
        raise ValueError(f"ahead is {ahead}; expected a number of steps from 0")
    if not ahead:
        yield from map(batch, steps)
        return
    coming, waiting = iter(steps), deque[Future]()
    pool = ThreadPoolExecutor(1, "tinyseg-batch")
    try:
        for _ in steps:
            while len(waiting) <= ahead and (step := next(coming, None)) is not None:
                waiting.append(pool.submit(copy_context().run, batch, step))
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _whole(optimizer: Optimizer, statistics: list[Array]) -> Iterator[None]:
    """A step in the block is taken whole, or what it has done to the running statistics undone."""
    taken, flat = optimizer.steps, [array.reshape(-1) for array in statistics]  # views
    before: Any = array_module(flat[0]).concatenate(flat) if flat else None  # one launch on a GPU
    try:
        yield
    except BaseException:  # Ctrl-C too may come at any time
        if optimizer.steps == taken:
            for array in flat:
                array[...], before = before[: array.size], before[array.size :]
        raise


def stalled(scores: Sequence[float], patience: int | None) -> bool:
    """Whether none of the last `patience` scores is above all before them.

    >>> [ts.train.stalled(scores, patience=2) for scores in ([0.7, 0.6, 0.7], [0.7, 0.6, 0.8])]
    [True, False]
    """
    return (patience is not None and len(scores) > patience
            and max(scores[-patience:]) <= max(scores[:-patience]))


def fit(net: Module, batch: Callable[[int], tuple[Array, Array]],
        loss: Callable[[Tensor, Array], Tensor], optimizer: Optimizer, steps: int, *,
        start: int = 0, schedule: Schedule = poly, clip: float = 12.0,
        average: Average | None = None,
        validate: Callable[[Module], dict[Any, float]] | None = None, every: int = 50,
        patience: int | None = None, past: Sequence[float] = (), ahead: int = 1,
        capture: bool = False, ranks: Alone = ALONE) -> Iterator[Record]:
    """Train from step `start` to `steps`, yielding a `Record` after each.

    batch(step) -> (images (N, *S, C), labels (N, *S)) is a function of the step, so that a run
    that was interrupted goes on exactly as it would have. Batches are made in a thread, `ahead`
    steps before their turn; 0 makes each when it is its turn, with the same results. The learning
    rate of a step is the optimiser's rate at the start of this call times schedule(step, steps);
    the gradients of its parameters are clipped to the norm `clip` (nnU-Net's 12). The network's
    train or eval mode is the caller's choice. An `average` of it is updated after each step.

    validate(net) -> {class: Dice} is asked after every `every` steps and after the last, of the
    average where there is one, in evaluation mode; the network is then again as it was. With
    `patience`, training ends once the mean Dice of that many validations in a row has not risen
    above the best before them; `past` are the means (`Record.score`) of those before `start`.

    ranks: processes that train this network together, each calling this with its part of every
    batch, and with the loss of all parts (`losses` take `ranks`). Gradients are summed over them,
    and records have the overlap of all patches, in their order.

    capture: forward and backward passes of a network on a GPU run as one launch, with the same
    results, from the third step on (`cuda.captured`): batches of one shape, no dropout, no loss
    that reads from the GPU. It changes nothing on a CPU, nor with several ranks.

    Raises ValueError for an optimiser of parameters that are not this network's, and
    FloatingPointError where the loss or the gradient is not finite. However a step ends
    (that, no memory, Ctrl-C), parameters and running statistics are those after the last good
    step, unless `optimizer.steps` has grown: then they, or the average, were being moved, or the
    step was complete and was being validated.

    >>> net = ts.nn.Conv(1, 2, (1, 1), rng=0)
    >>> images, labels = np.array([[[[-1.0], [1.0]]]], "float32"), np.array([[[0, 1]]])
    >>> optimizer = ts.optim.SGD(net.parameters(), lr=1)
    >>> first, *_, last = ts.train.fit(net, lambda step: (images, labels), ts.losses.cross_entropy,
    ...                                optimizer, steps=20)
    >>> last.step, last.loss < first.loss, last.patch_dice
    (19, True, {1: 1.0})
    """
    base, parameters = optimizer.lr, net.parameters()
    statistics = net.statistics()
    moved, mine = {*map(id, optimizer.parameters)}, {*map(id, parameters)}
    if moved - mine and any(p.requires_grad and id(p) not in moved for p in parameters):
        raise ValueError(f"{len(moved - mine)} of the optimiser's {len(moved)} parameters are not"
                         " in this network, and some of the network's are not in the optimiser;"
                         " make it of net.parameters(), after inflating or loading")
    if average is not None and average.net is not net:
        raise ValueError("the average is that of another network; make it of this one")
    if every < 1 or patience is not None and (validate is None or patience < 1):
        raise ValueError(f"every is {every} and patience {patience}; expected numbers from 1, and "
                         "patience with validate only")
    library, scores = array_module(parameters[0].data), [*past]

    def joined(*arrays: Array) -> Array:  # what the host reads of a step, at once
        return library.concatenate([library.asarray(a, "float64").reshape(-1) for a in arrays])

    def passes(images: Array, labels: Array) -> tuple:
        optimizer.zero_grad()
        logits = net(images)
        value = loss(logits, labels)
        with ranks.summing() as ready:
            value.backward(ready=ready)
        told = joined(value.data, _confusion(logits.data, labels))
        return told, logits.data, [p.grad for p in optimizer.parameters]

    passes = cuda.captured(passes) if capture and library is not np and ranks.size == 1 else passes
    try:
        with closing(prepared(batch, range(start, steps), ahead)) as batches:
            for step in range(start, steps):
                if patience is not None and ranks.agreed(stalled(scores, patience)):
                    return
                began = perf_counter()
                images, labels = next(batches)
                waited = perf_counter() - began
                images, labels = to_library(images, library), to_library(labels, library)
                with _whole(optimizer, statistics):
                    told, logits, gradients = passes(images, labels)
                    told = to_numpy(joined(told, _norm([g for g in gradients if g is not None])))
                    number, length, table = *map(float, told[[0, -1]]), told[1:-1].astype("int64")
                    counts = np.concatenate(ranks.gather(_overlap(
                        table.reshape(len(labels), logits.shape[-1], -1))))
                    for p, g in zip(optimizer.parameters, gradients, strict=True):
                        p.grad = g  # of a captured step: where they were made anew
                    clip_norm(optimizer.parameters, clip, length)
                    if not (isfinite(number) and isfinite(length)):
                        loss(Tensor(logits), labels)  # of a captured step: labels out of range
                        raise FloatingPointError(
                            f"loss {number}, norm of the gradient {length} at step {step}; lower "
                            "the learning rate or look at this step's images")
                    optimizer.lr = base * schedule(step, steps)
                    optimizer.step()
                if average:
                    average.update()
                seconds, validation = perf_counter() - began, None
                if validate and ((step + 1) % every == 0 or step + 1 == steps):
                    with average.applied() if average else nullcontext(), evaluation(net):
                        validation = validate(net)
                record = Record(step, number, optimizer.lr, counts, seconds, waited, validation)
                scores += [record.score] if record.score is not None else []
                yield record
    finally:
        optimizer.lr = base
