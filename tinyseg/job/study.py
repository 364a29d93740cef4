"""A study: ways of making a 3D network of a 2D one, each a run of the main job, and what they say.

A way is trained for every fold, seed and source of its 2D network, with the plan, the 2D network
and the patches of the others of that fold and seed. Differences are paired, case by case.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan, prod
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from ..files import read_json
from ..intervals import Interval, holm, interval
from ..profiles import PROFILES
from .plan import Plan
from .settings import Settings

Kind = tuple[str, str]  # a way and the source of its 2D network
FLAT = "2d"  # the way of a 2D network, slice by slice
LONGER = "2d-longer"  # the same, trained for as many voxels as it and a 3D one together
RANDOM = "random"  # the way, and the source, of random weights
SLICES = "slices"  # the source of a 2D network that is trained on the slices of the same cases
OF_THE_PLAN = ("minutes", "memory", "plan", "head", "backbone", "depth_stride")  # with the network
ALIKE = {"profile": "average"}  # of the runs that make plans: then the slots suit every way


def way(word: str) -> dict[str, Any]:
    """The settings of a run that makes its 3D network so: "random", "zero", "zero:first" (the
    profile and its slot), "scale:0.2,0.6,0.2", "native:FILE", a checkpoint of a 3D network; or goes
    on in 2D, "2d-longer". ValueError for another word."""
    name, _, more = word.partition(":")
    if word == RANDOM:
        return {"start": word}
    if word == LONGER:
        return {}
    if name == "native" and Path(more).is_file():
        return {"start": more}
    if name == "scale" and more:
        return {"profile": name, "alpha": tuple(map(float, more.split(",")))}
    if name not in PROFILES:
        raise ValueError(f"found the way {word!r}, expected {LONGER}, {RANDOM}, scale:A,B,C,"
                         f" native:FILE or one of {', '.join(PROFILES)}")
    return {"profile": name, **({"slot": more} if more else {})}


def source(word: str) -> dict[str, Any]:
    """The settings of a run whose 2D network is this: "slices", "random", a checkpoint, or the
    folder of another run. ValueError for what is not there."""
    if word in (SLICES, RANDOM):
        return {} if word == SLICES else {"steps_2d": 0}
    path = Path(word, "model_2d.npz") if Path(word).is_dir() else Path(word)
    if not path.is_file():
        raise ValueError(f"found the source {word!r}, expected {SLICES}, {RANDOM}, a checkpoint, or"
                         " the folder of a run that has trained a 2D network")
    return {"steps_2d": 0, "pretrained": path}


@dataclass(frozen=True)
class Trial:
    """One run of a study: a way, the source of its 2D network, a fold and a seed."""

    way: str
    source: str
    fold: int
    seed: int

    @property
    def base(self) -> Trial:
        """The run that makes the 2D network which this one takes."""
        return replace(self, way=FLAT)

    @property
    def network(self) -> str:
        """Which network of the run it is about, "2d" or "3d"."""
        return "2d" if self.way in (FLAT, LONGER) else "3d"

    @property
    def learned(self) -> bool:
        """Whether its network has learned from these cases: one that is only a source has not."""
        return self.way != FLAT or not source(self.source)

    def folder(self, out: Path) -> Path:
        """Where it lies."""
        origin = self.source
        if origin not in (SLICES, RANDOM):  # two files may have one name
            origin = f"{Path(origin).name} {crc32(origin.encode()):08x}"
        name = "".join(c if c.isalnum() or c in "-.," else "_" for c in f"{origin} {self.way}")
        return out / f"fold{self.fold}_seed{self.seed}" / name

    def settings(self, out: Path, first: Trial, asked: dict[str, Any]) -> dict[str, Any]:
        """The settings of its run, given those that are asked for of all. `first`: the trial whose
        plan all others take, each fold with what it finds in its own cases."""
        own: dict[str, Any] = {"fold": self.fold, "seed": self.seed}
        rest = {key: value for key, value in asked.items() if key not in OF_THE_PLAN}
        if self.network == "3d":
            if source(self.source):  # its 2D network has learned nothing of these scans yet
                own["lr"] = (asked.get("lr", Settings.lr)[0],) * 2
            return rest | way(self.way) | own | {"from_2d": self.base.folder(out)}
        planner = replace(first, fold=self.fold)
        if self == planner:
            own |= ALIKE
        if self == first:
            return asked | source(self.source) | own
        plan = Plan.read(first.folder(out) / "plan.json")
        steps = {name: asked.get(name, getattr(plan, name)) for name in ("steps_2d", "steps_3d")}
        if self != planner:
            told = rest | steps | source(self.source) | own | {
                "plan": planner.folder(out) / "plan.json"}
            more = plan.batch_3d * prod(plan.patch_3d) / plan.batch_2d / prod(plan.patch_2d)
            longer = round(more * told["steps_3d"]) * (self.way == LONGER)
            return told | {"steps_2d": told["steps_2d"] + longer}
        return {key: value for key, value in (asked | steps).items() if key != "minutes"} | (
            source(self.source) | own)


def trials(ways: Sequence[str], sources: Sequence[str], seeds: int, folds: int) -> list[Trial]:
    """All runs, each behind the 2D one that it begins with; a seed after the other, so that one is
    soon complete; slices first, whose steps the plan has. A start without the 2D network is the
    same whatever the source: it goes with the first."""
    sources = sorted(dict.fromkeys(sources), key=lambda origin: origin != SLICES)
    return [Trial(each, origin, fold, seed)
            for seed in range(seeds) for fold in range(folds) for origin in sources
            for each in dict.fromkeys((FLAT, *ways))
            if "start" not in (way(each) if each != FLAT else {}) or origin == sources[0]]


def scores(done: Sequence[Trial], out: Path) -> list[dict[str, Any]]:
    """A row for each run that has learned, case and class: "way", "source", "fold", "seed", "case",
    "class" and the measures of metrics.json."""
    return [{**vars(trial), "case": case, "class": name, **measures}
            for trial in done if trial.learned
            for case, classes in metrics(trial, out)["models"][trial.network]["cases"].items()
            for name, measures in classes.items()]


def curves(done: Sequence[Trial], out: Path) -> list[dict[str, Any]]:
    """A row for each time that a 3D network was tried on patches of held-out cases: "step",
    how many were done, "seconds" of training until then, and the mean "dice" over classes."""
    rows = []
    for trial in done:
        seconds = 0.0
        for row in _history(trial, out):
            if row["stage"] != trial.network:
                continue
            seconds += float(row["seconds"])
            tried = [float(value) for key, value in row.items()
                     if key.startswith("validation ") and value]
            if tried:
                rows.append({**vars(trial), "step": int(row["step"]) + 1,
                             "seconds": round(seconds, 3), "dice": float(np.mean(tried))})
    return rows


def _history(trial: Trial, out: Path) -> list[dict[str, str]]:
    with open(trial.folder(out) / "history.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def metrics(trial: Trial, out: Path) -> dict[str, Any]:
    """What its metrics.json holds."""
    return read_json(trial.folder(out) / "metrics.json")


class Start(NamedTuple):
    """Where 3D training begins: the mean Dice on patches of held-out cases before any step, and the
    loss of the first."""

    dice: float
    loss: float


@dataclass(frozen=True)
class Row:
    """What a study says of one way from one source: Dice by class, over cases and seeds, and the
    difference of its mean to the reference, of which one seed says nothing; where it began."""

    way: str
    source: str
    dice: dict[str, float]
    start: Start | None
    difference: Interval | None
    p: float


def table(rows: Sequence[dict[str, Any]], reference: str, starts: dict[Kind, Start]) -> list[Row]:
    """The ways of `scores`, each compared with the way `reference`, p by Holm over all of them."""
    kinds = [*dict.fromkeys((row["way"], row["source"]) for row in rows)]
    classes = list(dict.fromkeys(row["class"] for row in rows))
    where = {key: i for i, key in enumerate(dict.fromkeys((r["fold"], r["case"]) for r in rows))}
    seeds = sorted({row["seed"] for row in rows})
    dice = np.full((len(kinds), len(classes), len(seeds), len(where)), nan)
    for row in rows:
        if row["dice"] is not None:  # of a class that is neither found nor there
            dice[kinds.index((row["way"], row["source"])), classes.index(row["class"]),
                 seeds.index(row["seed"]), where[row["fold"], row["case"]]] = row["dice"]
    folds = np.array([fold for fold, _ in where])
    known = ~np.isnan(dice)
    mean = np.where(known, dice, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    mean[~known.any(axis=1)] = nan  # of a case without any of the classes
    at = next((i for i, (each, _) in enumerate(kinds) if each == reference), None)
    found: dict[int, Interval] = {}
    for i in range(len(kinds)):
        if at is None or i == at or len(seeds) < 2:
            continue
        apart = mean[i] - mean[at]
        scored = np.isfinite(apart).all(axis=0)
        parts = [apart[:, scored & (folds == fold)] for fold in np.unique(folds)]
        if all(part.shape[1] > 1 for part in parts):
            one = interval(parts)  # and Dice cannot differ by more than one
            found[i] = one._replace(low=max(one.low, -1.0), high=min(one.high, 1.0))
    raised = holm({str(i): each.p for i, each in found.items()})
    return [Row(*kind, {name: float(np.nanmean(dice[i, c])) for c, name in enumerate(classes)},
                starts.get(kind), found.get(i), raised.get(str(i), nan))
            for i, kind in enumerate(kinds)]


def starts(done: Sequence[Trial], out: Path) -> dict[Kind, Start]:
    """{(way, source): where it began}, of those in 3D, the means over runs."""
    found: dict[Kind, list[tuple[float, float]]] = {}
    for trial in done:
        if trial.network == "3d":
            tried = metrics(trial, out)["equivalence"]["held_out_patches"]["3d"].values()
            scores = [each["dice"] for each in tried if each["dice"] is not None]
            losses = [float(row["loss"]) for row in _history(trial, out) if row["stage"] == "3d"]
            found.setdefault((trial.way, trial.source), []).append(
                (float(np.mean(scores)) if scores else nan, losses[0] if losses else nan))
    return {kind: Start(*np.mean(values, axis=0).tolist()) for kind, values in found.items()}


def reached(tried: Sequence[Mapping[str, Any]], reference: str) -> dict[Kind, int | None]:
    """{(way, source): the first step of `curves` at which its mean Dice is at least the last of the
    reference}; None where it never is."""
    means: dict[Kind, dict[int, list[float]]] = {}
    for row in tried:
        means.setdefault((row["way"], row["source"]), {}).setdefault(row["step"], []).append(
            row["dice"])
    goal = next((np.mean(steps[max(steps)]) for (name, _), steps in means.items()
                 if name == reference), np.inf)
    return {kind: next((step for step in sorted(steps) if np.mean(steps[step]) >= goal), None)
            for kind, steps in means.items()}


def cells(rows: Sequence[Row], reference: str) -> list[list[str]]:
    """The table as text, its head first."""
    lines = [["way", "2D network", *rows[0].dice, "mean", "Dice before 3D", "first loss",
              f"less {reference}", "p (Holm)"]]
    for row in rows:
        told = ["", ""]
        if row.difference:
            mean, low, high, _ = row.difference
            told = [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})", f"{row.p:.3g}"]
        lines.append([row.way, row.source, *(f"{x:.3f}" for x in row.dice.values()),
                      f"{np.mean(list(row.dice.values())):.3f}",
                      *([f"{x:.3f}" for x in row.start] if row.start else ["", ""]), *told])
    return lines


def conclusion(rows: Sequence[Row], reference: str) -> str:
    """What the table lets one say, in a sentence or two."""
    compared = [row for row in rows if row.difference]
    if not compared:
        return (f"Nothing can be concluded: that needs {reference} among the ways, two seeds, as "
                "another gives other networks and other scores, and two cases in every fold.")
    kinds = (("better than", 1), ("worse than", -1))
    told = []
    for what, sign in kinds:
        names = [f"{row.way} ({row.source})" for row in compared
                 if row.p < 0.05 and row.difference and row.difference.mean * sign > 0]
        told.append(f"{what} {reference}: {', '.join(names) or 'none'}")
    return (f"At 5 % over all comparisons, {'; '.join(told)}. Where an interval holds zero, either "
            "may be the better one.")


def markdown(rows: Sequence[Row], reference: str) -> str:
    """The table as Markdown, with what it lets one say below."""
    head, *lines = (f"| {' | '.join(line)} |" for line in cells(rows, reference))
    return "\n".join([head, "|---" * (len(rows[0].dice) + 7) + "|", *lines, "",
                      conclusion(rows, reference)])
