"""Scans in files, segmented by networks in files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import checkpoint, infer, nn
from ..data import decathlon, nifti
from ..data.augment import LEFT_RIGHT
from ..infer.windows import OVERLAP
from ..ranks import Alone, world


def predict(model: Path, scan: Path, out: Path, *, others: Sequence[Path] = (),
            device: str = "cpu", overlap: float = OVERLAP, mirror: bool = False,
            largest: bool = False, smallest: float = 0, probabilities: bool = False) -> int:
    """Segment SCAN with MODEL and write the label map to OUT, on the scan's own grid.

    SCAN may be a folder of .nii and .nii.gz files: OUT is then one too, and names are kept. Where
    channels have files of their own, case_0000 and on, OUT goes by the case, and SCAN is the first.
    A file that fails is named and the others go on; the exit code is then 1. How scans are
    prepared stands in MODEL. Begun by mpiexec, several processes share the files.
    """
    with world() as ranks:
        if not ranks.leads:
            return 0
        _refuse(scan, out)
        nets = _agreeing([model, *others], mirror)
        jobs = _jobs(scan, out, nets[0].config["in_channels"])
        for files, target in jobs:
            _refuse_over(files, target)
        options = {"overlap": overlap, "mirror": [LEFT_RIGHT] * mirror} | (
            {"probabilities": True} if probabilities else
            {"largest": largest, "smallest": smallest})
        failed = ranks.everywhere(_some, nets, jobs, device, options)
    if failed and len(jobs) > 1:
        print(f"{len(failed)} of {len(jobs)} scans failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _some(ranks: Alone, nets: Sequence[nn.Module], jobs: Sequence[tuple], device: str,
          options: dict[str, Any]) -> list[str]:
    """Segment scans, each rank some of them; the names of those that failed."""
    failed, nets = [], [nn.to_device(net, ranks.device(device)) for net in nets]
    for number, ((source, *further), target) in [*enumerate(jobs, 1)][ranks.rank :: ranks.size]:
        try:
            with tqdm(desc=f"{number}/{len(jobs)} {source.name}", unit="window") as bar:
                told = _one(nets, [source, *further], target, progress=partial(_advance, bar),
                            **options)
            print(f"{source.name}: {told}")
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            failed.append(source.name)
            named = str(error) if str(source) in str(error) else f"{source}: {error}"
            print(f"error: {named}", file=sys.stderr)
    return sum(ranks.gather(failed), [])


def _one(nets: Sequence[nn.Module], files: Sequence[Path], target: Path,
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
    for source, target in ([(path, out / path.name) for path in volumes(scan)]
                           if scan.is_dir() else [(scan, out)]):
        _refuse_over([source], target)


def _refuse_over(files: Sequence[Path], target: Path) -> None:
    """ValueError where the label map of a scan would be written over one of its files."""
    if target.exists() and any(map(target.samefile, files)):
        raise ValueError(f"{target}: is the scan itself, expected another place for labels")


def _jobs(scan: Path, out: Path, channels: int) -> list[tuple[list[Path], Path]]:
    """(files of a scan, its label map) of one scan or all in a folder."""
    if scan.is_dir():
        return [(files, out / (id + (".nii.gz" if files[0].suffix == ".gz" else ".nii")))
                for id, files in decathlon.scans(volumes(scan), channels).items()]
    beside = decathlon.scans(volumes(scan.parent), channels).values() if channels > 1 else ()
    return [(next((files for files in beside if files[0] == scan), [scan]), out)]


def _agreeing(paths: Sequence[Path], mirror: bool) -> list[nn.Module]:
    """The networks in files of the main job; ValueError where classes differ, or a
    mirror image is asked of one that has never seen any."""
    nets = []
    for path in paths:
        net = checkpoint.load(path)
        if not {"plan", "patch"} <= net.metadata.keys():
            raise ValueError(f"{path}: holds no preparation; train it with the main job first")
        if mirror and net.metadata["plan"].get("mirror", ()) is None:
            raise ValueError(f"{path}: was trained without left-right reflections, and cannot"
                             " answer them; predict without --mirror")
        nets.append(net)
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


def volumes(folder: Path) -> list[Path]:
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
