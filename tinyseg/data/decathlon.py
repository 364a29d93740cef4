"""The folder format of the Medical Segmentation Decathlon (Antonelli et al. 2022), as downloaded.

`dataset.json` maps label and modality numbers (as strings) to names and lists pairs of files.
Its quirks are kept: paths begin with `./`, the release date is spelt "relase", the training list
is unsorted, `numTraining` may be wrong, and folders may hold AppleDouble junk named `._*`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_json
from . import nifti


@dataclass(frozen=True)
class Case:
    """One scan and its label map on disk; labels and modalities are those of the dataset."""

    id: str
    image: Path
    label: Path
    labels: dict[int, str]
    modalities: dict[int, str]

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the case, the label map's last."""
        return self.image, self.label

    def read(self) -> tuple[nifti.Volume, np.ndarray]:
        """The scan, array (D, H, W, C) float32, and its label map (D, H, W) uint8.

        Raises ValueError, with the file's name, where the two lie on different grids, a voxel is
        not finite, or channels or label values are not those that dataset.json announces.
        """
        try:
            return self._read()
        except MemoryError as error:
            error.add_note(f"reading {self.image}")
            raise

    def _read(self) -> tuple[nifti.Volume, np.ndarray]:
        scan, truth = nifti.read(self.image), nifti.read(self.label, dtype="uint8")
        image = scan.array.reshape(*scan.array.shape[:3], -1)
        label = truth.array[..., 0] if truth.array.shape[3:] == (1,) else truth.array
        truth.expect_grid_of(scan)
        if label.ndim != 3:
            raise ValueError(f"{self.label}: found shape {truth.original_shape}, expected"
                             f" {scan.original_shape[:3]} as in {self.image}")
        if image.shape[3] != len(self.modalities):
            raise ValueError(f"{self.image}: found {image.shape[3]} channels, expected"
                             f" {len(self.modalities)}: {list(self.modalities.values())}")
        strange = sorted(set(np.unique(label).tolist()) - set(self.labels))
        if strange:
            raise ValueError(f"{self.label}: found label values {strange}, expected only"
                             f" {sorted(self.labels)} as in dataset.json")
        return replace(scan, array=image), label


@dataclass(frozen=True)
class Dataset:
    """A Decathlon task; cases are sorted by id, test scans have no labels."""

    name: str
    labels: dict[int, str]
    modalities: dict[int, str]
    cases: tuple[Case, ...]
    test: tuple[Path, ...]


def load(folder: str | Path) -> Dataset:
    """The task in `folder`; no scan is opened, but every training file must be there.

    Raises FileNotFoundError or ValueError that names the file and says what to do.
    """
    folder = Path(folder)
    source = folder / "dataset.json"
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; expected the folder of a Decathlon task"
                                " as downloaded, with dataset.json, imagesTr and labelsTr")
    content = read_json(source)
    labels, modalities = (_numbered(content, key, source) for key in ("labels", "modality"))
    if 0 not in labels or not all(0 <= number < 255 for number in labels):
        raise ValueError(f"{source}: found label numbers {sorted(labels)}, expected 0 for the"
                         " background and others up to 254")
    cases: dict[str, Case] = {}
    for entry in _listed(content, "training", source):
        if not isinstance(entry, dict) or not {"image", "label"} <= entry.keys():
            raise ValueError(f"{source}: found the training entry {entry!r}, expected"
                             ' {"image": path, "label": path}')
        image, label = (_inside(folder, entry[key], source) for key in ("image", "label"))
        if image.name.startswith((".", "_")):
            continue
        for path in (image, label):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file, though {source} lists it; unpack"
                                        " the archive again or remove the entry")
        name = image.name.removesuffix(".gz").removesuffix(".nii")
        if name in cases:
            raise ValueError(f"{source}: found case {name} twice, expected every case once")
        cases[name] = Case(name, image, label, labels, modalities)
    if not cases:
        raise ValueError(f"{source}: found no training cases, expected a list of image and label"
                         ' paths under "training"')
    entries = (entry["image"] if isinstance(entry, dict) and "image" in entry else entry
               for entry in _listed(content, "test", source))
    test = (_inside(folder, entry, source) for entry in entries)
    return Dataset(str(content.get("name", folder.name)), labels, modalities,
                   tuple(cases[name] for name in sorted(cases)),
                   tuple(sorted(path for path in test if not path.name.startswith((".", "_")))))


def _numbered(content: dict, key: str, source: Path) -> dict[int, str]:
    try:
        names = {int(number): str(name) for number, name in sorted(content[key].items())}
    except (KeyError, AttributeError, ValueError):
        names = {}
    if not names:
        raise ValueError(f"{source}: found {content.get(key)!r} under {key!r}, expected numbers"
                         ' mapped to names, such as {"0": "background", "1": "pancreas"}')
    return names


def _listed(content: dict, key: str, source: Path) -> list:
    entries = content.get(key, [])
    if type(entries) is not list:
        raise ValueError(f"{source}: found a {type(entries).__name__} under {key!r},"
                         " expected a list")
    return entries


def _inside(folder: Path, entry: Any, source: Path) -> Path:
    # normpath, not lstrip("./"), which would also eat the dot of "._junk" and of "../up".
    if isinstance(entry, str):
        relative = os.path.normpath(entry)
        if not os.path.isabs(relative) and relative.split(os.sep)[0] not in ("..", "."):
            return folder / relative
    raise ValueError(f"{source}: found the path {entry!r}, expected one inside {folder}")


def folds(ids: Iterable[str], k: int = 5, seed: int = 12345) -> list[tuple[list[str], list[str]]]:
    """k pairs (training ids, held-out ids), the split that nnU-Net makes, so figures compare.

    scikit-learn's KFold(k, shuffle=True, random_state=seed) on the sorted ids: one Mersenne
    Twister shuffle, cut into k runs of which the first n mod k are longer by one.
    """
    names = np.array(sorted(ids), dtype=object)
    if len(set(names)) != len(names):
        raise ValueError("found ids that occur twice, expected every id once")
    if not 2 <= k <= len(names):
        raise ValueError(f"found k = {k} folds for {len(names)} cases, expected 2 to {len(names)}")
    order = np.arange(len(names))
    np.random.RandomState(seed).shuffle(order)
    pairs = []
    for run in np.array_split(order, k):  # array_split, too, makes the first n mod k longer
        held = np.isin(np.arange(len(names)), run)
        pairs.append((names[~held].tolist(), names[held].tolist()))
    return pairs
