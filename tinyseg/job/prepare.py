"""From what a run is asked for to prepared cases: the scans, their mirror pairs, their files."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import models, pretrained
from ..data import augment, decathlon, phantom, sampling
from ..files import read_json
from ..inflate import inflate
from ..nn import Module
from . import rules
from .fingerprint import fingerprint
from .plan import Plan, going_with, measure, propose, varied, within
from .settings import BACKBONE, HEAD, QUICK_SLICES, Settings, SettingsError, starved

SUBSET = 6  # salt, of which cases are learned from


@contextmanager
def during(what: str) -> Iterator[None]:
    """Whatever goes wrong in the block tells what was being done."""
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise


def scans(settings: Settings, folder: Path, labels: dict[int, str] | None) -> decathlon.Dataset:
    """The scans that the settings ask for; without any, a phantom that is written first, to
    `folder`. labels: the classes of --images, where they are known already."""
    source = settings.data or folder
    if not (settings.data or settings.images or (source / "dataset.json").exists()):
        print("no --data: writing a synthetic Decathlon folder to", source)
        phantom.write(source, cases=10 if settings.quick else 25, seed=settings.seed)
    if settings.images is None or settings.label_maps is None:
        return decathlon.load(source)
    return decathlon.pair(settings.images, settings.label_maps, settings.modality, labels,
                          partial(tqdm, desc="labels"))


def reflection(asked: Settings, labels: dict[int, str],
               plan: Plan | None) -> tuple[tuple[str, str], ...] | None:
    """Which classes change places when a patch is mirrored; None where none is. Says which.

    Where nothing else is asked for, those of the plan, if that is taken and names any.
    """
    names, auto = list(labels.values()), asked.mirror == ("auto",)
    augmentation = asked.augment or (plan.augmentation if plan else None)
    decided = plan.preprocessing.mirror if plan and auto else ()
    pairs, alone = augment.sides(names)
    alone = alone if auto and not decided else []
    if "none" in (*asked.mirror, augmentation) or decided is None or alone:
        print("nothing is mirrored" + (f": {', '.join(alone)} has a side and no partner; --mirror "
                                       "names pairs" if alone else ""))
        return None
    if decided or not auto:
        numbers = {str(number): name for number, name in labels.items()}
        pairs = list(decided) or [(numbers.get(a, a), numbers.get(b, b)) for a, b in (
            word.split("=", 1) for word in asked.mirror)]
        augment.numbered(pairs, names)  # or it says which is no class
    print("patches may be mirrored left-right" + "".join(
        f"; {a} and {b} then change places" for a, b in pairs))
    return tuple(pairs)


def taken(asked: Settings) -> Plan | None:
    """The plan of a file or of another run that is asked for."""
    source = asked.from_2d / "plan.json" if asked.from_2d else asked.plan
    if source is None:
        return None
    plan = Plan.read(source)
    if plan.augmentation not in augment.PRESETS and asked.augment is None:
        raise ValueError(f"{source}: found augmentation {plan.augmentation!r}, expected one of "
                         f"{', '.join(augment.PRESETS)}")
    return plan


def decide(asked: Settings, training: decathlon.Dataset,
           mirror: tuple[tuple[str, str], ...] | None, ranks: int = 1) -> Plan:
    """The plan that is asked for, or one for these cases; what else is asked for, in its place. One
    that is made has a patch at least for each of the ranks, which share the minutes of a step."""
    plan = taken(asked)
    if plan is None:
        wanted: dict[str, Any] = {
            "spacing": asked.spacing, "patch": asked.patch, "memory": asked.memory,
            "backbone": asked.backbone, "head": asked.head, "apart": asked.apart}
        found = fingerprint(training, partial(tqdm, desc="read", unit="case"))
        if found.broken:
            raise ValueError("; ".join(found.broken.values()))
        plan = propose(found, device=asked.device, **_given(wanted))
        if asked.batch is None and plan.batch_3d < ranks:
            print(f"a patch for each of {ranks} ranks: --batch {ranks}")
            asked = replace(asked, batch=ranks)
        if asked.minutes is not None:
            plan = adjusted(plan, asked, mirror)  # what is trained is what is timed
            seconds = measure(plan, found, asked.device, partial(
                tqdm, desc="measure", unit="network"), ranks, asked.precision)
            plan = within(plan, asked.minutes, seconds)
        plan = varied(adjusted(plan, asked, mirror), found)
        if plan.augmentation == "none" and not asked.augment and mirror is not None:
            print("patches are seldom seen twice: none is varied, so nothing is mirrored")
            mirror = None  # a network that saw no mirror image must not be asked about one
    return adjusted(plan, asked, mirror)


def expect_several(plan: Plan, apart: int = 1) -> None:
    """ValueError where a step on volumes leaves a batch-norm one value per channel; apart: ranks
    that each normalise by their own patches."""
    for wrong in starved(plan.patch_3d, plan.strides, plan.batch_3d // apart):
        if plan.steps_3d:
            raise ValueError(wrong)


def adjusted(plan: Plan, asked: Settings, mirror: tuple[tuple[str, str], ...] | None) -> Plan:
    """The plan with what is asked for in the place of what it says; without its times, where they
    are of something else then."""
    depth, given = asked.depth_stride, plan
    if asked.head and asked.head != plan.head:
        plan = replace(plan, **going_with(asked.head, plan.preprocessing.spacing,
                                          (asked.patch or plan.patch_3d)[0],
                                          _enlarged(plan), asked.apart))
    if depth == ("plane",):
        depth = (2,) * len(plan.depth_stride)
    slots = plan.depth
    if depth:
        slots = rules.slots(asked.spacing or plan.preprocessing.spacing, [*map(int, depth)],
                            asked.apart)
    elif asked.from_2d and not asked.apart:  # whose plan was for its own way
        slots = (1,) * rules.FLAT + slots[rules.FLAT:]
    slices = asked.batch and (QUICK_SLICES * asked.batch if asked.quick else max(
        1, plan.batch_2d * asked.batch // plan.batch_3d))
    made = replace(plan, **_given({
        "preprocessing": replace(plan.preprocessing, mirror=mirror, **_given(
            {"spacing": asked.spacing, "order": asked.order})),
        "backbone": asked.backbone, "depth": slots, "depth_stride": depth,
        "patch_3d": asked.patch, "batch_3d": asked.batch,
        "batch_2d": slices,
        "steps_2d": asked.steps_2d, "steps_3d": asked.steps_3d, "augmentation": asked.augment}))
    spacing = replace(given.preprocessing, spacing=made.preprocessing.spacing)
    timed = replace(made, preprocessing=spacing, steps_2d=given.steps_2d,
                    steps_3d=given.steps_3d, augmentation=given.augmentation)
    return made if timed == given else replace(made, seconds={})


def _enlarged(plan: Plan) -> bool:
    """Whether it sees scans enlarged: then a decoder ends early, and strides begin so."""
    return len(plan.decoder) == 4 if plan.decoder else plan.depth_stride[:2] == (2, 1)


def outline(asked: Settings, plan: Plan | None, channels: int, classes: int) -> models.Segmenter:
    """The 2D network that is asked for, if need be before there is a plan, to try on it what will
    be done; ValueError where --freeze names none of its parts, or it cannot be inflated so."""
    net = models.resnet_seg(rank=2, in_channels=channels, classes=classes, **plan.architecture
                            if plan else {"backbone": asked.backbone or BACKBONE,
                                          "head": asked.head or HEAD})
    for prefix in asked.freeze:  # an inflated network has the same names
        net.copy().freeze(prefix)
    if (asked.profile, asked.slot) != (Settings.profile, Settings.slot):  # which always can be
        inflate(net, plan.depth if plan else 3, **asked.way)
    return net


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def split(asked: Settings, ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """The cases that are learned from, in their order, and those that are held out."""
    trained, held_out = decathlon.folds(ids, asked.folds)[asked.fold]
    if asked.training_cases is None:
        return [id for id in ids if id in trained], held_out
    if asked.training_cases > len(trained):
        raise SettingsError(f"--training-cases is {asked.training_cases}; this fold leaves "
                            f"{len(trained)}")
    order = np.random.default_rng((asked.seed, SUBSET)).permutation(trained).tolist()
    drawn = set(order[: asked.training_cases])
    return [id for id in ids if id in drawn], held_out


def cases(dataset: decathlon.Dataset, asked: Settings, decided: Plan, run: Path,
          used: Collection[str]) -> dict[str, sampling.Prepared]:
    """The cases that are used, normalised and resampled once and kept in the folder of a run, or of
    that which its 2D network is taken from, if they are prepared alike there, by id; what of them
    changed since is refused, before anything is prepared."""
    plan, folder = decided.preprocessing, run / "prepared"
    theirs = asked.from_2d
    if theirs and (theirs / "prepared").is_dir() and (
            Plan.read(theirs / "plan.json").preprocessing == plan):
        folder = theirs / "prepared"
    if other := [what for case in dataset.cases if case.id in used
                 for what in sampling.changed(folder, case, plan)]:
        raise ValueError(f"{folder}: made of other data: {', '.join(dict.fromkeys(other))} changed "
                         "since this run began; bring that back, or begin again in another --out")
    found = {}
    chosen = [(i, case) for i, case in enumerate(dataset.cases) if case.id in used]
    for number, case in tqdm(chosen, desc="prepare", unit="case"):
        try:
            found[case.id] = sampling.open(folder, case.id)
        except (FileNotFoundError, ValueError):
            with during(f"preparing case {case.id}"):
                source = sampling.source(case, plan)
                sampling.store(folder, sampling.prepare(case, plan, asked.seed + number), source)
                found[case.id] = sampling.open(folder, case.id)
    return found


def expect_split(source: Path, told: dict[str, Any], of_these: bool = True) -> None:
    """ValueError unless the run in `source` learned from the cases that one of this run.json
    does; without `of_these` it may be one of other cases, or none."""
    path = source / "run.json"
    theirs = read_json(path) if of_these or path.is_file() else {}
    if not of_these and theirs.get("cases") != told["cases"]:
        return
    for key in ("labels", "cases", "folds", "fold"):
        if theirs.get(key) != told[key]:
            raise ValueError(f"{source}: its {key} are {theirs.get(key)}, not {told[key]}; scores "
                             "would be of scans that its network has seen")


def imported(net: Module, path: str | Path) -> pretrained.Report:
    """Load pretrained weights into a network, and its head only where it has these classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of folded statistics: `recalibrate` replaces them
        return pretrained.load(net, path, head="fit", resample=True)
