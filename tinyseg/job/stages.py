"""Training one network through a stage, on slices or on volumes, and what history tells of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import cuda, losses, optim, parallel, train
from ..backend import Array, array_module, to_library
from ..data import sampling
from ..module import Module, evaluation, to_device
from ..nn import synchronised
from ..ranks import ALONE, Alone, Stopped
from .plan import Plan
from .settings import Settings

WARM = 15  # of a stage's steps, one part is for the rate to rise
SAVE_EVERY = 120.0  # seconds between checkpoints
FOREGROUND = 0.5  # of all patches is centred on foreground
RECENT = 50  # steps whose patches drawn anywhere are scored together
TIMED = 5  # steps after which the time of all is told, the first of them apart
# Decay of the moving average of weights, which is what a stage leaves: the last one, as the best on
# held-out patches would be chosen by the cases that it is scored on.
AVERAGE = 0.99
VALIDATIONS, LEAST = 10, 25  # how often held-out patches are looked at: times a stage, steps apart

Batch = Callable[..., Any]  # (step) -> (images, labels); (step, sampling.patches): with their cases


@dataclass(frozen=True)
class Stage:
    """A part of training: what a step sees, how many there are, at which rate of AdamW.

    size: voxels of a patch, (H, W) of a slice or (D, H, W); count: patches a step; salt: of its
    random numbers, beside the seed; faster: times the rate is that of parts that start at random.
    """

    name: str
    size: tuple[int, ...]
    count: int
    steps: int
    rate: float
    salt: int
    faster: float

    def batches(self, cases: Sequence[sampling.Prepared], seed: int,
                augment: Callable | None, only: slice = slice(None)) -> Batch:
        """What step i sees of the cases: a function of the seed, the salt and i, so that a run that
        was interrupted goes on exactly as it would have, and `only` some of its patches are the
        same as in the whole."""
        return lambda step, draw=sampling.batch: draw(
            cases, self.size, self.count, np.random.default_rng((seed, self.salt, step)),
            FOREGROUND, augment, first=step * self.count, only=only)


def stages(plan: Plan, settings: Settings) -> dict[str, Stage]:
    """The stages of a run in their order, by name."""
    (slices, volumes), faster = settings.lr, settings.lr_new
    if settings.start != "inflated":  # it has to learn what a 2D network learns on slices
        volumes = slices
    return {"2d": Stage("2d", plan.patch_2d, plan.batch_2d, plan.steps_2d, slices, 2, faster),
            "3d": Stage("3d", plan.patch_3d, plan.batch_3d, plan.steps_3d, volumes, 3, 1)}


class History:
    """The rows of history.csv, and the overlap of recent patches drawn anywhere, step by step."""

    def __init__(self, names: Sequence[str], rows: Iterable[dict] = (), recent: Iterable = ()):
        self.names, self.rows, self.recent = list(names), list(rows), list(recent)

    def add(self, stage: str, record: train.Record) -> str:
        """A row for a step; returns what a bar tells of it.

        It has the Dice of the patches that were centred on foreground, that of those drawn anywhere
        in the last steps, which tells of false positives too, and now and then that on patches of
        held-out cases, always the same. A class that is in none has no entry.
        """
        count = len(record.overlap)
        chosen = np.array([sampling.centred(record.step * count + i, FOREGROUND)
                           for i in range(count)])
        if not self.rows or self.rows[-1]["stage"] != stage:
            self.recent = []
        self.recent = [*self.recent, record.overlap[~chosen].sum(axis=0).tolist()][-RECENT:]
        scores = {"patch_dice": train.dice(record.overlap[chosen]),
                  "uniform_dice": train.dice(np.array(self.recent)),
                  "validation": record.validation or {}}
        self.rows.append({
            "stage": stage, "step": record.step, "loss": record.loss, "lr": record.lr,
            "seconds": round(record.seconds, 4), "waited": round(record.waited, 4),
            **{f"{kind} {self.names[c]}": round(x, 4) for kind, found in scores.items()
               for c, x in found.items()}})
        return f"loss {record.loss:.2f}" + "".join(
            f", {where} {np.mean(list(scores[kind].values())):.2f}"
            for kind, where in (("patch_dice", "Dice"), ("uniform_dice", "anywhere"),
                                ("validation", "held out"))
            if scores[kind])


def run(ranks: Alone, stage: Stage, net: Module, cases: Sequence[sampling.Prepared],
        settings: Settings, augment: Callable | None, patches: tuple[Array, Array],
        place: tuple[int, dict[str, Array]] | None = None, new: Sequence[str] = (), *,
        history: History | None = None, save: Callable[[int, dict[str, Array]], None] | None = None,
        stop: Callable[[], bool] = lambda: False) -> Module:
    """Train `net` through the stage, all ranks together, from the (step, arrays) of a checkpoint
    if it is given; returns it, as the moving average of what it was.

    patches: of held-out cases, that it is tried on. new: top-level parts that have the rate times
    stage.faster. save(step, arrays) keeps all that the rest of the stage depends on, every two
    minutes and however it ends; no generator is part of it, see `Stage.batches`. Where stop() is
    true after a step, `Stopped`, a KeyboardInterrupt, ends it. History, save and stop are the
    leader's.
    """
    to_device(net, ranks.device(settings.device))
    parallel.release()  # what preparing cases, or a stage before, has held
    parts_of = partial(stage.batches, cases, settings.seed, augment)
    batch = parts_of(ranks.part(stage.count))
    history = history or History(list(map(str, range(net.config["classes"]))))
    fresh = [p for name, p in net.named_parameters() if name.split(".")[0] in new]
    others = [p for name, p in net.named_parameters() if name.split(".")[0] not in new]
    optimizer = optim.AdamW([(others, 1), (fresh, stage.faster)], stage.rate, weight_decay=1e-2)
    average = train.Average(net, AVERAGE)
    parts: dict[str, Any] = {"net/": net, "optimizer/": optimizer, "average/": average}
    step, arrays = place or (0, {})
    for prefix, part in parts.items():
        if place:
            part.load_state({key.removeprefix(prefix): array for key, array in arrays.items()
                             if key.startswith(prefix)})

    def keep() -> None:
        if save:
            save(step, {prefix + key: array for prefix, part in parts.items()
                        for key, array in part.state().items()})

    loss = partial(losses.dice_cross_entropy, ignore=sampling.IGNORE, ranks=ranks)
    saved, seconds = monotonic(), []
    bar = tqdm(total=stage.steps, initial=step, desc=f"train {stage.name}", unit="step",
               disable=not ranks.leads)
    try:
        norm = ALONE if settings.local_norm else ranks
        with synchronised(net, norm), cuda.precision(settings.precision):
            for record in train.fit(net.train(), batch, loss, optimizer, stage.steps, start=step,
                                    schedule=optim.warmup(stage.steps // WARM), average=average,
                                    validate=partial(patch_dice, patches=patches),
                                    every=max(LEAST, stage.steps // VALIDATIONS),
                                    capture=True, ranks=ranks):
                bar.set_postfix_str(history.add(stage.name, record))
                bar.update()
                step = record.step + 1
                seconds.append(record.seconds)
                if len(seconds) == TIMED and ranks.leads:
                    left = (stage.steps - step) * float(np.median(seconds[1:]))
                    tqdm.write(f"{stage.name}: {stage.steps - step} more steps, {about(left)}")
                if monotonic() - saved > SAVE_EVERY:
                    keep()
                    saved = monotonic()
                if ranks.agreed(stop()):
                    raise Stopped
    except FloatingPointError as error:
        error.add_note(f"in the {stage.name} stage, on patches of "
                       + ", ".join(suspects(parts_of()(step, sampling.patches))))
        raise
    except MemoryError as error:
        error.add_note(f"at step {step} of the {stage.name} stage")
        raise
    finally:
        bar.close()
        if optimizer.steps == average.steps == step:  # unless the step after it ended halfway
            keep()
    net.load_state(average.arrays)
    return net


def shares(batches: Iterable[tuple[Array, Array]], classes: int) -> Array:
    """What share of the voxels of these batches is of each class, (classes,)."""
    counts = np.sum([np.bincount(labels.ravel(), minlength=sampling.IGNORE + 1)[:classes]
                     for _, labels in batches], axis=0)
    return counts / counts.sum()


def about(seconds: float) -> str:
    """A time that is to come, in words."""
    return f"about {seconds / 60:.0f} minutes" if seconds > 90 else f"about {seconds:.0f} seconds"


def suspects(patches: Iterable[tuple[str, Array, Array]]) -> list[str]:
    """The cases whose patches hold voxels that are not finite, else all that were drawn."""
    drawn = [(id, bool(np.isfinite(image).all())) for id, image, _ in patches]
    return sorted({id for id, finite in drawn if not finite} or {id for id, _ in drawn})


def patch_dice(net: Module, patches: tuple[Array, Array]) -> dict[int, float]:
    """{class: Dice} of a network on patches, images (N, *S, C) and labels (N, *S), each on its
    own. One of a rank less sees the slices of each."""
    library, found = array_module(net.parameters()[0].data), []
    with evaluation(net):
        for image, truth in zip(*patches, strict=True):
            if net.config["rank"] == truth.ndim:
                image, truth = image[None], truth[None]
            logits = net(to_library(image, library)).data
            found.append(train.overlap(logits, to_library(truth, library)).sum(axis=0))
    return train.dice(np.array(found))
