"""Scores of label maps: the one evaluation, of the job and of the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import infer, metrics, report
from ..backend import Array
from ..data import ct, decathlon, nifti
from ..module import Module, evaluation, to_device
from ..ranks import Alone
from .prepare import during
from .stages import patch_dice

TOLERANCE = 5.0  # mm between surfaces: the Decathlon's for the pancreas
ENSEMBLE = "ensemble"  # the name of all networks together: the mean of their probabilities


class Scores:
    """Overlap, distances between surfaces and volumes, case by case and class by class.

    classes {number: name}: another number that a map holds is a class of its own. spacing and
    tolerance in mm.
    """

    def __init__(self, classes: Mapping[int, str], tolerance: float = TOLERANCE):
        self.classes, self.tolerance = dict(classes), tolerance
        self.cases: dict[str, Any] = {}

    def add(self, case: str, prediction: np.ndarray, reference: np.ndarray,
            spacing: Sequence[float]) -> None:
        """Score one label map (D, H, W) against another."""
        for number in np.union1d(prediction, reference).tolist():
            self.classes.setdefault(number, f"class {number}")
        self.cases[case] = metrics.per_class(prediction, reference, self.classes, spacing,
                                             self.tolerance)

    def join(self, parts: Sequence[Scores], order: Sequence[str]) -> None:
        """Take what several have, cases in this order."""
        for part in parts:
            self.classes |= part.classes
        found = {case: scores for part in parts for case, scores in part.cases.items()}
        self.cases = {case: found[case] for case in order}

    def told(self) -> dict[str, Any]:
        """{"tolerance_mm", "cases", "mean", "counts"}, as metrics.json has them."""
        # A class may first be met in a late case: in the others it is absent.
        nothing = np.zeros((1, 1, 1), "uint8")
        none = metrics.per_class(nothing, nothing, dict(sorted(self.classes.items())), (1, 1, 1),
                                 self.tolerance)
        cases = {case: none | scores for case, scores in self.cases.items()}
        return {"tolerance_mm": self.tolerance, "cases": cases, "mean": metrics.mean(cases),
                "counts": metrics.counts(cases)}


def evaluate(ranks: Alone, dataset: decathlon.Dataset, held_out: Sequence[str],
             nets: Mapping[str, Module], out: Path, mirror: Sequence[int] = (),
             device: str = "cpu") -> dict[str, dict]:
    """Predict every held-out case with every network and with all together, write the label maps,
    score, draw; each rank some of the cases.

    `mirror`: answers are averaged with those to the mirror image. What an interrupted evaluation
    has written since the networks were, is scored as it lies there.
    """
    names = [*nets, ENSEMBLE] if len(nets) > 1 else [*nets]
    nets = {name: to_device(net, ranks.device(device)) for name, net in nets.items()}
    scores = {name: Scores(dataset.labels) for name in names}
    folders = {name: predictions(out, name) for name in names}
    since = max((out / f"model_{name}.npz").stat().st_mtime_ns for name in nets)
    cases = [case for case in dataset.cases if case.id in held_out]
    shown = {case.id for case in cases[:: max(1, len(cases) // 3)][:3]}
    for case in tqdm(cases[ranks.rank :: ranks.size], desc="evaluate", unit="case",
                     disable=not ranks.leads):
        with during(f"evaluating case {case.id}"):
            scan, truth = case.read()
            targets = {name: folder / f"{case.id}.nii.gz" for name, folder in folders.items()}
            if all(path.exists() and path.stat().st_mtime_ns >= since
                   for path in targets.values()):
                maps = {name: nifti.read(path, truth.dtype).array
                        for name, path in targets.items()}
            else:
                found = infer.segment(list(nets.values()), scan, each=True, mirror=mirror)
                maps = dict(zip(names, found, strict=False))  # of one network two, alike
                for name, path in targets.items():
                    path.parent.mkdir(exist_ok=True)
                    nifti.write(path, maps[name], scan)
            for name, labels in maps.items():
                scores[name].add(case.id, labels, truth, scan.spacing)
            if case.id in shown:
                net = next(iter(nets.values()))
                image = np.clip(scan.array[..., 0], *ct.Plan(**net.metadata["plan"]).window)
                report.drawn(report.overlay, out / f"overlay_{case.id}.png", image,
                             {"reference": truth, **maps}, dataset.labels, scan.spacing,
                             f"{dataset.name} {case.id}, held out")
    for each in scores.values():
        each.join(ranks.gather(each), [case.id for case in cases])
    return {name: each.told() for name, each in scores.items()}


def predictions(run: Path, name: str) -> Path:
    """The folder of a run that holds the label maps by a network, "2d", "3d" or ENSEMBLE."""
    return run / ("predictions" if name == "3d" else f"predictions_{name}")


def compare(flat: Module, deep: Module, patches: tuple[Array, Array], names: Sequence[str],
            seed: int) -> dict[str, Any]:
    """What inflation keeps: how far logits of both networks are apart on an input constant along
    depth, and the Dice of both on the same patches, images (N, D, H, W, C) and labels. Prints it.
    """
    difference = equivalence(flat, deep, patches[1].shape[1:], seed)
    print(f"2D and inflated 3D logits differ by at most {difference:.2g} on an input constant "
          "along depth")
    found = {name: patch_dice(net, patches) for name, net in (("2d", flat), ("3d", deep))}
    kept = {name: {each: {"dice": scores.get(c, nan)} for c, each in enumerate(names) if c}
            for name, scores in found.items()}
    print(f"on the same {len(patches[0])} patches of held-out cases, just inflated:")
    print(report.score_lines(kept, "dice"))
    return {"max_abs_difference": difference, "held_out_patches": kept}


def equivalence(flat: Module, deep: Module, patch: Sequence[int], seed: int) -> float:
    """The largest difference of logits between both nets on an input constant along depth."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((1, *patch[1:], flat.config["in_channels"]), "float32")
    with evaluation(flat), evaluation(deep):
        one = flat(image).data[:, None]
        many = deep(np.repeat(image[:, None], patch[0], axis=1)).data
    return float(abs(many - one).max())
