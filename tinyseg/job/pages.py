"""What people look at when a run or a study is done: report.html, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np

from .. import page, report
from ..backend import to_numpy
from ..checkpoint import load
from ..data import decathlon, nifti
from ..inflate import inflate
from ..nn import Conv, Module
from . import prepare
from .evaluate import predictions
from .plan import Plan
from .settings import Settings
from .study import Row, Trial, cells, conclusion, metrics, reached, way

KERNEL = "One filter of {}, the largest, and its slots along depth: red is positive, blue negative."


def founding(flat: Module, begun: Module, deep: Module) -> str:
    """A 2D kernel beside the 3D one that was made of it, before and after training: of the first
    convolution that reaches along depth, the filter and channel of the largest numbers."""
    kernels = [{name: conv for name, conv in net.named(Conv)} for net in (flat, begun, deep)]
    name = next((name for name, conv in kernels[1].items() if len(conv.weight) > 1), None)
    if name is None:  # no kernel has slots
        return ""
    w2, before, after = (to_numpy(each[name].weight.data) for each in kernels)
    channel, filter_ = np.unravel_index((w2**2).sum(axis=(0, 1)).argmax(), w2.shape[-2:])
    return page.figure(report.kernels, {
        "2D": [w2[..., channel, filter_]], "made 3D": before[..., channel, filter_],
        "trained": after[..., channel, filter_]}, caption=KERNEL.format(name))


def asked_for(settings: Settings) -> str:
    """The settings that are not the defaults, one a line."""
    usual = Settings().json()
    return "\n".join(f"{name} {value}" for name, value in settings.json().items()
                     if value != usual[name])


def scores(models: Mapping[str, Any]) -> str:
    """The means of metrics.json, a row for each network and class."""
    measures = [(key, told) for key, told in report.MEASURES.items() if key != "iou"]
    rows = [[f"{name}: {label}", *("" if isnan(found.get(key, nan)) else f"{found[key]:.3f}"
                                  for key, _ in measures)]
            for name, model in models.items() for label, found in model["mean"].items()]
    return page.table(["network and class", *(told for _, told in measures)], rows)


def of_run(run: Any, nets: Mapping[str, Module], found: Mapping[str, Any]) -> None:
    """Write report.html of a run (`Run`) that has scored `nets`."""
    sections = [("Scores of whole held-out volumes", scores(found))]
    if {"2d", "3d"} <= nets.keys() and run.settings.start == "inflated":
        begun = inflate(nets["2d"], **run.settings.way, **run.plan.inflation)
        sections.append(("From a slice's kernel to a volume's",
                         founding(nets["2d"], begun, nets["3d"])))
    sections.append(("Training", page.figure(report.progress, run.history.rows)))
    sections += viewers(run.dataset, run.held_out[0], run.folder, [*found][-1], run.plan)
    sections += [("Plan", page.text(str(run.plan))), ("How it was made", page.text(
        f"{page.made()}\n{asked_for(run.settings)}"))]
    page.write(run.folder / "report.html", f"{run.dataset.name}: slices, volumes, scores",
               [each for each in sections if each[1]])


def viewers(dataset: decathlon.Dataset, id: str, run: Path, name: str, plan: Plan
            ) -> list[tuple[str, str]]:
    """A held-out case to leaf through, with what the network `name` of a run found and with what
    is known of it."""
    scan, truth = next(case for case in dataset.cases if case.id == id).read()
    image = np.clip(scan.array[..., 0], *plan.preprocessing.window)
    at = [int((truth > 0).sum(axis=rest).argmax()) for _, _, rest in report.PLANES]
    found = nifti.read(predictions(run, name) / f"{id}.nii.gz", truth.dtype).array
    return [(f"{id}, held out, {by}", page.scan(image, labels, dataset.labels, scan.spacing, at))
            for by, labels in ((f"by {name}", found), ("by its expert", truth))]


def moved(flat: Module, begun: Module, deep: Module) -> list[float]:
    """How far each slot along depth has moved in training: the mean over kernels, of T x k x k, of
    |w3[t] after - before| / |w2|; of kernels of the most slots."""
    kernels = [{name: to_numpy(conv.weight.data) for name, conv in net.named(Conv)}
               for net in (flat, begun, deep)]
    most = max(len(each) for each in kernels[1].values())
    parts = [np.sqrt(((kernels[2][name] - before) ** 2).sum(axis=(1, 2, 3, 4))
                     / (kernels[0][name] ** 2).sum())
             for name, before in kernels[1].items() if len(before) == most]
    return np.mean(parts, axis=0).tolist()


def of_study(out: Path, trials: Sequence[Trial], rows: Sequence[Row], reference: str,
             scored: Sequence[Mapping[str, Any]], tried: Sequence[Mapping[str, Any]],
             asked: Mapping[str, Any]) -> None:
    """Write report.html of a study in the folder `out`: what its `table`, `scores` and `curves`
    say, and one of its runs to look at; and comparison.png, its differences alone."""
    (head, *lines), paired = cells(rows, reference), pairs(scored, reference)
    compared = [(f"{row.way}, {row.source}", *row.difference[:3])
                for row in rows if row.difference]
    if compared:
        report.drawn(report.forest, out / "comparison.png", compared,
                     f"mean Dice less that of {reference}")
    sections = [("Answer", f'<p>{escape(conclusion(rows, reference))}</p>' + (page.figure(
        report.forest, compared, f"mean Dice less that of {reference}", caption="95 % intervals "
        "over cases and seeds; grey ones hold zero.") if compared else "")),
        ("Dice of whole held-out volumes", page.table(head, lines)),
        ("Learning", page.figure(report.learning, [
            {**row, "way": f"{row['way']}, {row['source']}"} for row in tried],
            caption="Dice on patches of held-out cases; bands reach over seeds and folds.")),
        ("Case by case", page.figure(
            report.scatter, paired, reference, caption="Each point is a case and class, the mean "
            "over seeds; above the line the way is better than the reference.") if paired else "")]
    goals = reached(tried, reference)
    slots: list[list[str]] = []
    for trial in trials:
        if (trial.seed, trial.fold, trial.network) == (0, 0, "3d") and "start" not in way(
                trial.way):
            folder, flat = trial.folder(out), load(trial.base.folder(out) / "model_2d.npz")
            plan, deep = Plan.read(folder / "plan.json"), load(folder / "model_3d.npz")
            begun = inflate(flat, **Settings(**way(trial.way)).way, **plan.inflation)
            if not slots:
                sections.insert(2, (f"From a slice's kernel to a volume's: {trial.way}",
                                    founding(flat, begun, deep)))
                shown = viewers(prepare.scans(Settings(**asked), out / "phantom", None),
                                next(iter(metrics(trial, out)["models"]["3d"]["cases"])), folder,
                                "3d", plan)
            slots.append([f"{trial.way}, {trial.source}",
                          " ".join(f"{x:.3f}" for x in moved(flat, begun, deep)),
                          str(goals.get((trial.way, trial.source)) or "never")])
    if slots:
        sections += [("What training changes", page.table(
            ["way", "how far slots moved, in kernels", f"steps to {reference}'s last Dice"],
            slots)), *shown]
    sections.append(("How it was made", page.text(
        f"{page.made()}\n{asked_for(Settings(**asked))}")))
    page.write(out / "report.html", "From slices to volumes: which way of inflating a network",
               [each for each in sections if each[1]])


def pairs(rows: Sequence[Mapping[str, Any]], reference: str
          ) -> dict[str, tuple[list[float], list[float]]]:
    """{way: (Dice of the reference, of the way)} of every case and class, the mean over seeds."""
    found: dict[tuple[str, str], dict[tuple, list[float]]] = {}
    for row in rows:
        if row["dice"] is not None and not isnan(row["dice"]):
            found.setdefault((row["way"], row["source"]), {}).setdefault(
                (row["case"], row["class"]), []).append(row["dice"])
    base = next((cases for (name, _), cases in found.items() if name == reference), {})
    return {f"{name}, {source}": (
        [float(np.mean(base[key])) for key in cases if key in base],
        [float(np.mean(cases[key])) for key in cases if key in base])
        for (name, source), cases in found.items() if name != reference and base}
