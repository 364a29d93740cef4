"""tinyseg: plan a task, train, segment scans, score label maps, import checkpoints and export
networks, look into models."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import inf, prod
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from . import checkpoint, pretrained, report
from .data import decathlon, nifti
from .export import write as write_exported
from .infer.windows import OVERLAP
from .job.evaluate import TOLERANCE, Scores
from .job.fingerprint import fingerprint
from .job.plan import measure, propose, varied, within
from .job.predict import predict, volumes


def evaluate(predictions: Path, labels: Path, *, tolerance: float = TOLERANCE,
             missing: str = "fail", out: Path | None = None) -> int:
    """Score every label map in PREDICTIONS against the file of the same name in LABELS.

    Overlap, distances between surfaces and volumes of each class go to metrics.csv, a row for each
    case and class, and with their means to metrics.json, both in PREDICTIONS or --out. Classes are
    named as in a dataset.json beside the folder LABELS. References without a prediction are named;
    the exit code is then 1, but for --missing ignore.
    """
    found, references = ({path.name for path in volumes(folder)}
                         for folder in (predictions, labels))
    if lost := sorted(found - references):
        raise FileNotFoundError(f"{labels}: holds no file for {len(lost)} of {len(found)}"
                                f" predictions, such as {lost[0]}")
    absent = sorted(references - found)
    source = labels.resolve().parent / "dataset.json"
    scores = Scores(decathlon.class_names(source) if source.is_file() else {}, tolerance)
    for name in tqdm(sorted(found), desc="evaluate", unit="case"):
        prediction, truth = _label_map(predictions / name), _label_map(labels / name)
        prediction.expect_grid_of(truth)
        scores.add(name, prediction.array, truth.array, truth.spacing)
    told = scores.told()
    print(report.summary(told["mean"], told["counts"]))
    print(f"means over {len(found)} of {len(references)} references; surface Dice at {tolerance:g} "
          "mm")
    if absent:
        print(f"no prediction for {', '.join(absent)}", file=sys.stderr)
    out = predictions if out is None else out
    try:
        out.mkdir(parents=True, exist_ok=True)
        report.write_table(out / "metrics.csv", [
            {"case": case, "class": name, **measures}
            for case, classes in told["cases"].items() for name, measures in classes.items()])
        report.write_json(out / "metrics.json", {**told, "missing": absent})
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; --out names another place",
                      error.filename) from None
    print(f"every case stands in {out / 'metrics.csv'} and metrics.json")
    return int(bool(absent) and missing == "fail")


def _label_map(path: Path) -> nifti.Volume:
    """The label map in a file, array (D, H, W); some programs keep an axis of channels, of one."""
    volume = nifti.read(path, decathlon.NUMBERS)
    if prod(volume.array.shape[3:]) != 1:
        raise ValueError(f"{path}: found shape {volume.original_shape}, expected one label map")
    return replace(volume, array=volume.array.reshape(volume.array.shape[:3]))


def convert(source: Path, target: Path, **names: Any) -> None:
    """Import the foreign checkpoint SOURCE (PyTorch, safetensors, npz) into our format, TARGET.

    Where the network stands in the file is found and printed, with whatever is not used.
    """
    told, config = pretrained.convert(source, target, **names)
    print(told, json.dumps(config), f"written to {target}", sep="\n")


def _pair(text: str) -> tuple[str, str]:
    pattern, equals, new = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} has no =, expected PATTERN=TEXT")
    return pattern, new


def export(model: Path, target: Path, *, size: Sequence[int]) -> None:
    """Write MODEL for other programs to TARGET: .onnx, or .safetensors in PyTorch's layout.

    An .onnx graph takes "image", float32 (N, C, ...) prepared as MODEL says, of one size along its
    spatial axes, and answers "logits". The preparation goes with it as JSON.
    """
    net = checkpoint.load(model)
    write_exported(target, net, size, **net.metadata)
    print(f"written to {target}")


def train(arguments: Sequence[str]) -> int:
    """The main job, of examples/train_pancreas_3d.py: tinyseg train --help tells of it."""
    here = Path(__file__).resolve().parent
    path = next(path for folder in (here, here.parent / "examples")  # installed, or in a checkout
                if (path := folder / "train_pancreas_3d.py").is_file())
    return runpy.run_path(str(path))["main"](list(arguments))


def inspect(model: Path) -> None:
    """Print the architecture, the preparation and the size of MODEL."""
    net = checkpoint.load(model)
    print(json.dumps({"architecture": net.config, "metadata": net.metadata,
                      "parameters": sum(p.data.size for p in net.parameters())}, indent=1))


def plan(folder: Path | None, *, images: Path | None, label_maps: Path | None, modality: str,
         out: Path, minutes: float | None, memory: float | None, device: str) -> int:
    """Read all cases in FOLDER, a Decathlon or nnU-Net task, and propose how to train on them.

    What they are like and the plan are printed; plan.json and plan.png, a picture of three cases,
    go to OUT. A training step and a prediction are timed here for it. Cases that cannot be read are
    told and left out; the exit code is then 1.
    """
    if (out / "run.json").exists():
        raise ValueError(f"{out}: holds a run, and its plan; choose another folder")
    bar = partial(tqdm, desc="labels")
    dataset = decathlon.load(folder) if folder else decathlon.pair(
        images or "", label_maps or "", modality, progress=bar)
    out.mkdir(parents=True, exist_ok=True)
    found = fingerprint(dataset, partial(tqdm, desc="read", unit="case"))
    print(found)
    made = propose(found, memory=memory, device=device)
    seconds = measure(made, found, device, partial(tqdm, desc="measure", unit="network"))
    made = replace(made, seconds=seconds) if minutes is None else varied(
        within(made, minutes, seconds), found)
    print(f"\nplan\n{made}")
    made.write(out / "plan.json")
    by_size = sorted(found.digests, key=lambda each: sum(list(each.voxels.values())[1:]))
    ids = {by_size[at].id: None for at in (0, len(by_size) // 2, -1)}
    cases = {case.id: case for case in dataset.cases}
    shown = []
    for id in ids:
        scan, label = cases[id].read()
        image = np.clip(scan.array[..., 0], *made.preprocessing.window)
        shown.append((id, image, label, scan.spacing))
    print(f"\nwritten to {out / 'plan.json'}, and three cases to {out / 'plan.png'}")
    report.drawn(report.examples, out / "plan.png", shown, dataset.labels,
                 f"{dataset.name}: cases of least, median and most foreground")
    return int(bool(found.broken))


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="tinyseg", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", add_help=False, help=(train.__doc__ or "").partition(":")[0])
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["train"]:
        return train(given[1:])
    for function, names in ((plan, ()), (predict, ("MODEL", "SCAN", "OUT")),
                            (evaluate, ("PREDICTIONS", "LABELS")),
                            (convert, ("SOURCE", "TARGET")), (export, ("MODEL", "TARGET")),
                            (inspect, ("MODEL",))):
        about = function.__doc__ or ""
        sub = commands.add_parser(function.__name__, help=about.partition("\n")[0],
                                  description=about)
        for name in names:
            sub.add_argument(name.lower(), metavar=name, type=Path)
        sub.set_defaults(run=function)
    add = commands.choices["plan"].add_argument
    add("folder", metavar="FOLDER", type=Path, nargs="?", help="the task, with dataset.json")
    add("--images", type=Path, metavar="FOLDER", help="instead: a folder of scans")
    add("--labels", type=Path, dest="label_maps", metavar="FOLDER",
        help="and one of label maps of the same names")
    add("--modality", default="unknown", metavar="NAME", help="of --images: CT keeps its units, "
        "others are standardised scan by scan (%(default)s)")
    add("--out", type=Path, default=Path(), metavar="FOLDER", help="where plan.json and plan.png "
        "go (the current folder)")
    add("--minutes", type=float, metavar="M", help="of training, for which steps are counted")
    add("--memory", type=float, metavar="GIB", help="that training may take")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add = commands.choices["predict"].add_argument
    add("--with", dest="others", metavar="MODEL", type=Path, action="append", default=[],
        help="another network, to average its probabilities too; may be repeated")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--overlap", type=float, default=OVERLAP, metavar="X",
        help="the fraction of a window shared with the next, below 1 (%(default)s)")
    add("--mirror", action="store_true", help="average with the answer to the left-right mirror "
        "image; left and right classes change places as in training; twice the time")
    add("--largest", action="store_true", help="keep only the largest connected component of "
        "each class (26 neighbours)")
    add("--smallest", type=float, default=0, metavar="ML",
        help="drop connected components of fewer millilitres")
    add("--probabilities", action="store_true", help="write the probabilities of all classes "
        "instead of the label map, one after the other as a fourth axis of OUT, in the order of "
        "the label numbers (float32)")
    commands.choices["evaluate"].add_argument(
        "--tolerance", type=float, default=TOLERANCE, metavar="MM", help="how far apart surfaces "
        "may be for the surface Dice (%(default)s, the Decathlon's for pancreas; also liver 7, "
        "brain 5, heart, colon and prostate 4, spleen and hepatic vessels 3, lung 2, hippocampus "
        "1)")
    add = commands.choices["evaluate"].add_argument
    add("--missing", choices=["fail", "ignore"], default="fail", help="what references without a "
        "prediction do to the exit code (%(default)s)")
    add("--out", metavar="FOLDER", type=Path, help="where metrics.csv and metrics.json go "
        "(PREDICTIONS)")
    add = commands.choices["convert"].add_argument
    add("--prefix", metavar="TEXT", help='what the network\'s names begin with in SOURCE, as in '
        '"teacher."; by default the only one that fits')
    add("--rename", metavar="PATTERN=TEXT", action="append", default=[], type=_pair,
        help="replace what matches this regular expression in each name; may be repeated")
    add("--ignore", metavar="PATTERN", action="append", default=[], help="leave out the names that "
        'this regular expression matches wholly, as in "projection_head.*"; may be repeated')
    commands.choices["export"].add_argument(
        "--size", type=int, nargs="+", metavar="N", default=(), help="of .onnx, along the spatial "
        "axes (the patch that MODEL was trained with)")
    report.spell_out()
    options = vars(parser.parse_args(argv))
    command, run = options.pop("command"), options.pop("run")
    if command == "plan":
        two = options["images"], options["label_maps"]
        if not (all(two) and not options["folder"] or options["folder"] and not any(two)):
            parser.error("plan takes FOLDER, or --images and --labels")
        for name in ("minutes", "memory"):
            if options[name] is not None and not 0 < options[name] < inf:
                parser.error(f"--{name} is {options[name]}, expected more than 0")
    if command == "predict" and not 0 <= options["overlap"] < 1:
        parser.error(f"--overlap is {options['overlap']}, expected 0 <= X < 1")
    if command == "predict" and not 0 <= options["smallest"] < inf:
        parser.error(f"--smallest is {options['smallest']}, expected millilitres")
    if command == "predict" and options["probabilities"] and (
            options["largest"] or options["smallest"]):
        parser.error("--largest and --smallest clean a label map, not --probabilities")
    if command == "evaluate" and not 0 <= options["tolerance"] < inf:
        parser.error(f"--tolerance is {options['tolerance']}, expected millimetres")
    try:
        return run(**options) or 0
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
