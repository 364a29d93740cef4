"""python -m tinyseg: segment scans, score label maps, import checkpoints, look into models."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import checkpoint, infer, metrics, models, pretrained, report
from .data import nifti


def predict(model: Path, scan: Path, out: Path) -> None:
    """Segment SCAN with MODEL and write the label map to OUT, on the scan's own grid."""
    net, volume = checkpoint.load(model), nifti.read(scan)
    if "plan" not in net.metadata:
        raise ValueError(f"{model}: holds no preparation; train it with the main job first")
    bar = partial(tqdm, desc=scan.name, unit="window")
    labels = infer.segment(net, volume, progress=bar)
    nifti.write(out, labels, volume)
    names, voxel = net.metadata["labels"], np.prod(volume.spacing) / 1000
    for number, count in zip(*np.unique(labels, return_counts=True), strict=True):
        if number:
            print(f"{names.get(str(number), number)}: {count} voxels, {count * voxel:.1f} ml")


def evaluate(predictions: Path, labels: Path) -> None:
    """Score every label map in PREDICTIONS against the file of the same name in LABELS."""
    found = sorted(p for p in predictions.glob("*.nii*") if not p.name.startswith("."))
    if not found:
        raise ValueError(f"{predictions}: holds no .nii or .nii.gz file")
    cases = {}
    pairs = [(nifti.read(path, "uint8").array, nifti.read(labels / path.name, "uint8").array)
             for path in tqdm(found, desc="read", unit="case")]
    numbers = {n for pair in pairs for each in pair for n in np.unique(each).tolist()}
    classes = {n: f"class {n}" for n in sorted(numbers)}
    for path, (prediction, truth) in zip(found, pairs, strict=True):
        try:
            cases[path.name] = metrics.per_class(prediction, truth, classes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    means = metrics.mean(cases)
    for name, scores in [*cases.items(), ("mean", means)]:
        print(f"{name:32}" + "  ".join(f"{c}: Dice {s['dice']:.3f} IoU {s['iou']:.3f}"
                                       for c, s in scores.items()))
    report.write_json(predictions / "metrics.json", {"cases": cases, "mean": means})
    print(f"written to {predictions / 'metrics.json'}")


def convert(source: Path, target: Path) -> None:
    """Import the foreign checkpoint SOURCE (PyTorch, safetensors, npz) into our format, TARGET."""
    if target.suffix != ".npz":
        raise ValueError(f"{target}: expected a name that ends in .npz")
    arrays = pretrained.read(source)
    try:
        net = models.build(pretrained.recognise(arrays))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says the same
        told = pretrained.load(net, source)
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    rgb = {"mean": pretrained.IMAGENET_MEAN, "std": pretrained.IMAGENET_STD}
    checkpoint.save(target, net, source=source.name, sha256=digest, report=str(told),
                    normalisation=rgb if net.config["in_channels"] == 3 else None)
    print(told)
    print(json.dumps(net.config))
    print(f"written to {target}")


def inspect(model: Path) -> None:
    """Print the architecture, the preparation and the size of MODEL."""
    net = checkpoint.load(model)
    print(json.dumps({"architecture": net.config, "metadata": net.metadata,
                      "parameters": sum(p.data.size for p in net.parameters())}, indent=1))


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tinyseg", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for function, names in ((predict, ("MODEL", "SCAN", "OUT")),
                            (evaluate, ("PREDICTIONS", "LABELS")),
                            (convert, ("SOURCE", "TARGET")), (inspect, ("MODEL",))):
        sub = commands.add_parser(function.__name__, help=function.__doc__,
                                  description=function.__doc__)
        for name in names:
            sub.add_argument(name.lower(), metavar=name, type=Path)
        sub.set_defaults(run=function)
    options = vars(parser.parse_args(argv))
    run = options.pop("run")
    options.pop("command")
    try:
        run(**options)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
