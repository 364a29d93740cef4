"""tinyseg: plan a task, train, segment scans, score label maps, import checkpoints and export
networks, look into models."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import inf, prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from . import checkpoint, infer, nn, pretrained, report
from .data import decathlon, nifti
from .data.augment import LEFT_RIGHT
from .export import write as write_exported
from .infer.windows import OVERLAP
from .job.evaluate import TOLERANCE, Scores
from .job.plan import describe
from .ranks import world


def predict(model: Path, scan: Path, out: Path, *, others: Sequence[Path] = (),
            device: str = "cpu", overlap: float = OVERLAP, mirror: bool = False,
            largest: bool = False, smallest: float = 0, probabilities: bool = False) -> int:
    """Segment SCAN with MODEL and write the label map to OUT, on the scan's own grid.

    SCAN may be a folder of .nii and .nii.gz files: OUT is then one too, and names are kept. Where
    channels have files of their own, case_0000 and on, OUT goes by the case, and SCAN is the first.
    A file that fails is named and the others go on; the exit code is then 1. How scans are
    prepared stands in MODEL. Begun by mpiexec, several processes share the files.
    """
    _refuse(scan, out)
    ranks, failed = world(), []
    nets = _agreeing([model, *others], ranks.device(device), mirror)
    jobs = _jobs(scan, out, nets[0].config["in_channels"])[ranks.rank :: ranks.size]
    for number, ((source, *further), target) in enumerate(jobs, 1):
        try:
            with tqdm(desc=f"{number}/{len(jobs)} {source.name}", unit="window") as bar:
                told = _predict(nets, [source, *further], target, overlap=overlap,
                                mirror=[LEFT_RIGHT] * mirror, progress=partial(_advance, bar),
                                **({"probabilities": True} if probabilities else
                                   {"largest": largest, "smallest": smallest}))
            print(f"{source.name}: {told}")
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            failed.append(source.name)
            named = str(error) if str(source) in str(error) else f"{source}: {error}"
            print(f"error: {named}", file=sys.stderr)
    if failed and len(jobs) > 1:
        print(f"{len(failed)} of {len(jobs)} scans failed: {', '.join(failed)}", file=sys.stderr)
    return int(any(ranks.gather(failed)))


def _predict(nets: Sequence[nn.Module], files: Sequence[Path], target: Path,
             probabilities: bool = False, **options: Any) -> str:
    """Segment one scan; returns how much of each class was found."""
    scan = nifti.join([nifti.read(path) for path in files])
    names, voxel = nets[0].metadata.get("labels", {}), prod(scan.spacing) / 1000
    if probabilities:
        numbers, rows = infer.rows(nets, scan, **options)
        sums = np.zeros(len(numbers))
        target.parent.mkdir(parents=True, exist_ok=True)
        nifti.write_maps(target, _added(rows, sums), len(numbers), scan)
        return ", ".join(f"{names.get(str(number), number)} {n * voxel:.1f} ml expected"
                         for number, n in zip(numbers, sums, strict=True) if number)
    labels = infer.segment(nets, scan, **options)
    target.parent.mkdir(parents=True, exist_ok=True)
    nifti.write(target, labels, scan)
    counts = {names.get(str(number), number): np.count_nonzero(labels == number)
              for number in infer.numbers(nets[0]) if number}
    return ", ".join(f"{name} {n * voxel:.1f} ml ({n} voxels)" for name, n in counts.items())


def _added(rows: Iterator[np.ndarray], sums: np.ndarray) -> Iterator[np.ndarray]:
    """The rows (H, W, classes) as they are; their sum for each class is added to `sums`."""
    for row in rows:
        sums += row.sum(axis=(0, 1), dtype="float64")
        yield row


def _refuse(scan: Path, out: Path) -> None:
    """ValueError or FileNotFoundError for what would fail at the end."""
    if not scan.exists():
        raise FileNotFoundError(f"{scan}: no such file or folder")
    if scan.is_dir() and out.exists() and not out.is_dir():
        raise ValueError(f"{out}: expected a folder, as {scan} is one")
    if not scan.is_dir() and (not out.name.endswith(nifti.ENDINGS) or out.is_dir()):
        raise ValueError(f"{out}: expected a file name that ends in .nii or .nii.gz")
    for source, target in ([(path, out / path.name) for path in _volumes(scan)]
                           if scan.is_dir() else [(scan, out)]):
        if target.exists() and target.samefile(source):
            raise ValueError(f"{target}: is the scan itself, expected another place for labels")


def _jobs(scan: Path, out: Path, channels: int) -> list[tuple[list[Path], Path]]:
    """(files of a scan, its label map) of one scan or all in a folder."""
    if scan.is_dir():
        return [(files, out / (id + (".nii.gz" if files[0].suffix == ".gz" else ".nii")))
                for id, files in decathlon.scans(_volumes(scan), channels).items()]
    beside = decathlon.scans(_volumes(scan.parent), channels).values() if channels > 1 else ()
    return [(next((files for files in beside if files[0] == scan), [scan]), out)]


def _agreeing(paths: Sequence[Path], device: ModuleType, mirror: bool) -> list[nn.Module]:
    """The networks in files of the main job, on a device; ValueError where classes differ, or a
    mirror image is asked of one that has never seen any."""
    nets = []
    for path in paths:
        net = checkpoint.load(path)
        if not {"plan", "patch"} <= net.metadata.keys():
            raise ValueError(f"{path}: holds no preparation; train it with the main job first")
        if mirror and net.metadata["plan"].get("mirror", ()) is None:
            raise ValueError(f"{path}: was trained without left-right reflections, and cannot"
                             " answer them; predict without --mirror")
        nets.append(nn.to_device(net, device))
        told = [(n.config["classes"], n.metadata.get("labels")) for n in (nets[0], net)]
        if told[0] != told[1]:
            raise ValueError(f"{path}: found {told[1][0]} classes {told[1][1]}, expected"
                             f" {told[0][0]} classes {told[0][1]} as in {paths[0]}")
    return nets


def _advance(bar: tqdm, groups: Sequence[Sequence]) -> Iterator[Sequence]:
    """Groups of windows, one after the other, on a bar that several networks may share."""
    bar.total = (bar.total or 0) + sum(map(len, groups))
    for group in groups:
        yield group
        bar.update(len(group))


def evaluate(predictions: Path, labels: Path, *, tolerance: float = TOLERANCE,
             missing: str = "fail", out: Path | None = None) -> int:
    """Score every label map in PREDICTIONS against the file of the same name in LABELS.

    Overlap, distances between surfaces and volumes of each class go to metrics.csv, a row for each
    case and class, and with their means to metrics.json, both in PREDICTIONS or --out. Classes are
    named as in a dataset.json beside the folder LABELS. References without a prediction are named;
    the exit code is then 1, but for --missing ignore.
    """
    found, references = ({path.name for path in _volumes(folder)}
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


def _volumes(folder: Path) -> list[Path]:
    """The .nii and .nii.gz files in a folder, sorted; those of file managers begin with a dot."""
    if not folder.is_dir():
        told = "is a file, expected the folder it lies in" if folder.exists() else "no such folder"
        raise ValueError(f"{folder}: {told}")
    found = [path for path in sorted(folder.iterdir())
             if path.name.endswith(nifti.ENDINGS) and path.name[0] != "." and path.is_file()]
    if not found:
        inner = [path.name for path in sorted(folder.glob("*.nii*")) if path.is_dir()]
        told = f"; {inner[0]} is a folder, give that or move its files here" if inner else ""
        raise ValueError(f"{folder}: holds no .nii or .nii.gz file{told}")
    return found


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
         out: Path, **options: Any) -> int:
    """Read all cases in FOLDER, a Decathlon or nnU-Net task, and propose how to train on them.

    What they are like and the plan are printed; plan.json and plan.png, a picture of three cases,
    go to OUT. A training step and a prediction are timed here for it. Cases that cannot be read are
    told and left out; the exit code is then 1.
    """
    bar = partial(tqdm, desc="labels")
    dataset = decathlon.load(folder) if folder else decathlon.pair(
        images or "", label_maps or "", modality, progress=bar)
    return int(bool(describe(dataset, out, **options).broken))


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
