"""Folders of scans and label maps: the Decathlon's, nnU-Net's, and any two with the same names.

The Medical Segmentation Decathlon (Antonelli et al. 2022), as downloaded: `dataset.json` maps label
and modality numbers (as strings) to names and lists pairs of files. Its quirks are kept: paths
begin with `./`, the release date is spelt "relase", the training list is unsorted, `numTraining`
may be wrong, and folders may hold AppleDouble junk named `._*`.

nnU-Net, version 2: `channel_names` instead of `modality`, labels by name, no list, and a file for
each channel, `case_0000.nii.gz` on.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from ..files import read_json
from . import nifti

NUMBERS = "uint16"  # what label numbers in files must fit; FreeSurfer's reach 14,175
CLASSES = 254  # beside the background: maps of classes are uint8, and 255 marks what is left out
Pairs = dict[str, tuple[list[Path], Path]]  # by case: the scan's files and the label map's


@dataclass(frozen=True)
class Case:
    """One scan and its label map on disk; labels and modalities are those of the dataset.

    further: the files of the second channel on, where each channel has a file of its own.
    """

    id: str
    image: Path
    label: Path
    labels: dict[int, str]
    modalities: dict[int, str]
    further: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that the case is read from."""
        return self.image, *self.further, self.label

    def read(self) -> tuple[nifti.Volume, np.ndarray]:
        """The scan, array (D, H, W, C) float32, and its label map (D, H, W) of the file's numbers,
        in the smallest unsigned type that holds those of the dataset.

        Raises ValueError, with the file's name, where files lie on different grids, a voxel is not
        finite, or channels or label values are not those that the dataset announces.
        """
        try:
            return self._read()
        except MemoryError as error:
            error.add_note(f"reading {self.image}")
            raise

    def _read(self) -> tuple[nifti.Volume, np.ndarray]:
        scan = nifti.join([nifti.read(path) for path in (self.image, *self.further)])
        truth = nifti.read(self.label, NUMBERS)
        label = truth.array[..., 0] if truth.array.shape[3:] == (1,) else truth.array
        truth.expect_grid_of(scan)
        if label.ndim != 3:
            raise ValueError(f"{self.label}: found shape {truth.original_shape}, expected"
                             f" {scan.original_shape[:3]} as in {self.image}")
        if scan.array.shape[3] != len(self.modalities):
            raise ValueError(f"{self.image}: found {scan.array.shape[3]} channels, expected"
                             f" {len(self.modalities)}: {list(self.modalities.values())}")
        if strange := sorted(set(np.unique(label).tolist()) - set(self.labels)):
            raise ValueError(f"{self.label}: found label values {strange}, expected only"
                             f" {sorted(self.labels)}, the numbers of the dataset's labels")
        return scan, label.astype(np.min_scalar_type(max(self.labels)))


@dataclass(frozen=True)
class Dataset:
    """A task; cases are sorted by id, labels by number, and listed test scans have no labels.

    skipped: what was left out of it, by name: entries and files that begin with a dot, and in
    folders without a list what has no partner in the other.
    """

    name: str
    labels: dict[int, str]
    modalities: dict[int, str]
    cases: tuple[Case, ...]
    test: tuple[Path, ...] = ()
    skipped: tuple[str, ...] = ()


def load(folder: str | Path) -> Dataset:
    """The task in `folder`; no scan is opened, but every training file must be there.

    Labels may have any numbers up to 65535, and 0 is the background. Where dataset.json has no list
    of cases, they are the label maps in labelsTr with scans of their names in imagesTr.

    Raises FileNotFoundError or ValueError that names the file and says what to do.

    >>> ts.data.decathlon.load(ts.data.phantom.write("task", cases=2, shape=(4, 6, 8))).labels
    {0: 'background', 1: 'pancreas', 2: 'cancer'}
    """
    source = (folder := Path(folder)) / "dataset.json"
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; expected the folder of a Decathlon or"
                                " nnU-Net task, with dataset.json, imagesTr and labelsTr")
    content = read_json(source)
    labels, modalities = _labels(content, source), _modalities(content, source)
    if (ending := content.get("file_ending", nifti.ENDINGS[0])) not in nifti.ENDINGS:
        raise ValueError(f"{source}: found files that end in {ending!r}, expected .nii or .nii.gz;"
                         " convert them first (SimpleITK reads and writes both)")
    if "training" in content:
        pairs, skipped = _listed_pairs(folder, content, source)
    else:
        pairs, skipped = _paired(folder / "imagesTr", folder / "labelsTr")
    test = []
    for entry in _listed(content, "test", source):
        entry = entry["image"] if isinstance(entry, dict) and "image" in entry else entry
        path = _inside(folder, entry, source)
        test.append(path) if path.name[0] != "." else skipped.append(entry)
    return Dataset(str(content.get("name", folder.resolve().name)), labels, modalities,
                   _cases(pairs, labels, modalities), tuple(sorted(test)), tuple(skipped))


def pair(images: str | Path, labels: str | Path, modality: str | Sequence[str] = "unknown",
         names: dict[int, str] | None = None,
         progress: Callable[[Iterable], Iterable] = iter) -> Dataset:
    """The task in two folders without a description: scans and label maps of the same names.

    A scan may be one file, or one for each channel as nnU-Net has them (`case_0000.nii.gz` on).
    `modality` names all channels or each of them; only "CT" makes a difference. `names` are those
    of the label numbers; without it every label map is read to find the numbers, within `progress`,
    and they are called "class 1" and so on.

    Raises FileNotFoundError or ValueError that names the folder.
    """
    images, labels = Path(images), Path(labels)
    pairs, skipped = _paired(images, labels)
    if names is None:
        numbers = {0}
        for _, label in progress(list(pairs.values())):
            numbers.update(np.unique(nifti.read(label, NUMBERS).array).tolist())
        names = {number: f"class {number}" for number in numbers} | {0: "background"}
    names = _checked(list(names.items()), labels)
    scans, _ = next(iter(pairs.values()))
    channels = nifti.join([nifti.read(path) for path in scans]).array.shape[3]
    each = [modality] * channels if isinstance(modality, str) else list(modality)
    if len(each) != channels:
        raise ValueError(f"{scans[0]}: found {channels} channels, expected {len(each)}: {each}")
    modalities = dict(enumerate(each))
    return Dataset(images.resolve().parent.name, names, modalities,
                   _cases(pairs, names, modalities), (), tuple(skipped))


def class_names(source: str | Path) -> dict[int, str]:
    """{number: name}, in numeric order, from a dataset.json; ValueError where it has none."""
    return _labels(read_json(source), Path(source))


def _labels(content: dict, source: Path) -> dict[int, str]:
    """Numbers to names as the Decathlon has them, or names to numbers as nnU-Net does."""
    found = content.get("labels")
    entries = list(found.items()) if isinstance(found, dict) else []
    if regions := [name for name, number in entries if isinstance(number, list)]:
        raise ValueError(f"{source}: found the regions {regions} of several labels each, which may"
                         " overlap; a network here gives every voxel one class, so give each name"
                         ' one number, such as {"background": 0, "edema": 1}')
    numbered = _numbered(entries) or _numbered([(number, name) for name, number in entries])
    if not numbered:
        raise ValueError(f"{source}: found {found!r} under 'labels', expected numbers mapped to"
                         ' names, such as {"0": "background", "1": "pancreas"}')
    return _checked(numbered, source)


def _modalities(content: dict, source: Path) -> dict[int, str]:
    found = content.get("modality", content.get("channel_names"))
    numbered = _numbered(list(found.items()) if isinstance(found, dict) else [])
    if not numbered:
        raise ValueError(f"{source}: found {found!r} under 'modality' (or nnU-Net's"
                         " 'channel_names'), expected channel numbers mapped to names, such as"
                         ' {"0": "CT"}')
    return dict(numbered)


def _numbered(entries: list[tuple]) -> list[tuple[int, str]]:
    """(number, name) in numeric order; nothing where one is no number."""
    try:
        return sorted((int(str(number)), str(name)) for number, name in entries)
    except ValueError:
        return []


def _checked(numbered: list[tuple[int, str]], source: Path) -> dict[int, str]:
    """{number: name} of labels that networks, metrics and files can tell apart."""
    numbers, names = zip(*sorted(numbered), strict=True)
    for what, each in (("label numbers", numbers), ("class names", names)):
        if len(set(each)) < len(each):
            raise ValueError(f"{source}: found the {what} {list(each)}, expected each once")
    top = np.iinfo(NUMBERS).max
    if numbers[0] != 0 or numbers[-1] > top or not 1 < len(numbers) <= 1 + CLASSES:
        raise ValueError(f"{source}: found label numbers {list(numbers)}, expected 0 for the"
                         f" background and 1 to {CLASSES} others up to {top}")
    if "ignore" in names:
        raise ValueError(f"{source}: found the label 'ignore', of voxels that nobody has labelled;"
                         " training and scores here count every voxel: label them, or leave out the"
                         " cases that have them and this name")
    return dict(zip(numbers, names, strict=True))


def _cases(pairs: Pairs, labels: dict[int, str], modalities: dict[int, str]) -> tuple[Case, ...]:
    for (first, *others), _ in pairs.values():
        if others and 1 + len(others) != len(modalities):
            raise ValueError(f"{first}: found {1 + len(others)} files of channels, expected"
                             f" {len(modalities)}: {list(modalities.values())}")
    return tuple(Case(id, scan[0], label, labels, modalities, tuple(scan[1:]))
                 for id, (scan, label) in sorted(pairs.items()))


def _listed_pairs(folder: Path, content: dict, source: Path) -> tuple[Pairs, list[str]]:
    """The training cases in a list, and the entries that are left out."""
    pairs: Pairs = {}
    skipped = []
    for entry in _listed(content, "training", source):
        if not isinstance(entry, dict) or not {"image", "label"} <= entry.keys():
            raise ValueError(f"{source}: found the training entry {entry!r}, expected"
                             ' {"image": path, "label": path}')
        image, label = (_inside(folder, entry[key], source) for key in ("image", "label"))
        if image.name.startswith("."):
            skipped.append(entry["image"])
            continue
        id = _id(image)
        scan = [image] if image.is_file() else _scan(image.parent, id)
        for path in (*(scan or [image]), label):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file, though {source} lists it; unpack"
                                        " the archive again or remove the entry")
        if id in pairs:
            raise ValueError(f"{source}: found case {id} twice, expected every case once")
        pairs[id] = scan, label
    if not pairs:
        raise ValueError(f"{source}: found no training cases, expected a list of image and label"
                         ' paths under "training"')
    return pairs, skipped


def _paired(images: Path, labels: Path) -> tuple[Pairs, list[str]]:
    """The label maps in a folder with the scans of their names in another, and what is left over.
    """
    for folder in (images, labels):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; expected one of scans and one of"
                                    " label maps, with the same names")
    if images.samefile(labels):
        raise ValueError(f"{images}: found scans and label maps in one folder, expected two")
    pairs: Pairs = {}
    for label in sorted(labels.iterdir()):
        if label.is_file() and label.name.endswith(nifti.ENDINGS) and label.name[0] != ".":
            id = _id(label)
            if id in pairs:
                raise ValueError(f"{labels}: found label maps of {id} twice, expected one")
            if scan := _scan(images, id):
                pairs[id] = scan, label
    used = {path for scan, label in pairs.values() for path in (*scan, label)}
    left = [path for folder in (images, labels) for path in sorted(folder.iterdir())
            if path not in used]
    if not pairs:
        raise ValueError(f"{labels}: found no label map with a scan of its name in {images},"
                         " expected case.nii.gz in both, or case_0000.nii.gz there and case.nii.gz"
                         f" here; found {[str(path) for path in left[:2] + left[-2:]]}")
    return pairs, [f"{path.parent.name}/{path.name}" for path in left]


def _scan(folder: Path, id: str) -> list[Path]:
    """The files of a scan: the one of this name, or as nnU-Net has them one for each channel."""
    for ending in nifti.ENDINGS:
        if (path := folder / f"{id}{ending}").is_file():
            return [path]
        channels = (folder / f"{id}_{channel:04d}{ending}" for channel in count())
        if found := list(takewhile(Path.is_file, channels)):
            return found
    return []


def scans(files: Iterable[Path], channels: int) -> dict[str, list[Path]]:
    """{id: its files} of scans of so many channels, one file each or, as nnU-Net has them, one for
    every channel, no more and no less: case_0000, case_0001 and on. Of one channel each file is a
    scan, and goes by its name without _0000 where all have that."""
    found, ends = dict[str, list[Path]](), dict[str, set[str]]()
    parted = {path: _id(path).rpartition("_") for path in sorted(files)}
    for case, _, end in parted.values():
        ends.setdefault(case, set()).add(end)
    every = {f"{channel:04d}" for channel in range(channels)}
    numbered = {path for path, (case, _, _) in parted.items() if case and ends[case] == every}
    if channels == 1 and len(numbered) < len(parted):
        numbered = set()
    for path in parted:
        found.setdefault(parted[path][0] if path in numbered else _id(path), []).append(path)
    return found


def _id(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _listed(content: dict, key: str, source: Path) -> list:
    entries = content.get(key, [])
    if type(entries) is not list:
        raise ValueError(f"{source}: found a {type(entries).__name__} under {key!r},"
                         " expected a list")
    return entries


def _inside(folder: Path, entry: Any, source: Path) -> Path:
    # normpath, not lstrip("./"), which would also eat the dot of "._junk" and of "../up".
    if isinstance(entry, str):
        relative = posixpath.normpath(entry.replace("\\", "/"))  # Windows writes those
        if not PureWindowsPath(relative).anchor and relative.split("/")[0] not in ("..", "."):
            return folder / relative
    raise ValueError(f"{source}: found the path {entry!r}, expected one inside {folder}")


def folds(ids: Iterable[str], k: int = 5, seed: int = 12345) -> list[tuple[list[str], list[str]]]:
    """k pairs (training ids, held-out ids), the split that nnU-Net makes, so figures compare.

    scikit-learn's KFold(k, shuffle=True, random_state=seed) on the sorted ids: one Mersenne
    Twister shuffle, cut into k runs of which the first n mod k are longer by one.

    >>> ts.data.decathlon.folds(["case1", "case2", "case3", "case4"], k=2)[0]
    (['case2', 'case3'], ['case1', 'case4'])
    """
    names = np.array(sorted(ids), dtype=object)
    if len(set(names)) != len(names):
        raise ValueError("found ids that occur twice, expected every id once")
    if len(names) < 2:
        raise ValueError(f"found {len(names)} case, expected two for folds at least: one to train"
                         " on and one to hold out; add cases")
    if not 2 <= k <= len(names):
        raise ValueError(f"found {k} folds for {len(names)} cases, expected a case at least for"
                         f" each; ask for 2 to {len(names)} folds, or add cases")
    order = np.arange(len(names))
    np.random.RandomState(seed).shuffle(order)
    pairs = []
    for run in np.array_split(order, k):  # array_split, too, makes the first n mod k longer
        held = np.isin(np.arange(len(names)), run)
        pairs.append((names[~held].tolist(), names[held].tolist()))
    return pairs
