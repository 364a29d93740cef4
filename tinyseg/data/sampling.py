"""Prepared cases on disk, and the random patches that training sees of them.

Files hold label numbers, 0, 63 and 252 perhaps; what is prepared holds classes, 0, 1 and 2: class c
is the c-th number of the dataset.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_json, whole
from .affine import sample
from .ct import Plan

IGNORE = 255  # the label of padding: no class, left out of losses
COORDINATES = 10_000  # per class and case: enough to centre patches on, and it bounds memory


@dataclass
class Prepared:
    """A case as the network sees it; the arrays may be memory maps.

    image (D, H, W, C) float16, label (D, H, W) uint8, foreground {class: (n, 3) int32 voxels}.
    float16 because z-scores of a few units keep three digits in it, finer than a scanner's noise,
    at half the disk, memory and reading of float32. folder: where it is stored, if it is.
    """

    id: str
    image: np.ndarray
    label: np.ndarray
    foreground: dict[int, np.ndarray]
    folder: Path | None = None

    def __reduce__(self) -> tuple:
        """A stored case goes to another process as its place: both map the same files."""
        if self.folder:
            return open, (self.folder, self.id)
        return Prepared, (self.id, self.image, self.label, self.foreground)


def prepare(case: Any, plan: Plan, seed: int) -> Prepared:
    """Read a case, normalise and resample it, and draw the voxels that patches centre on.

    >>> folder = ts.data.phantom.write("task", cases=1, shape=(4, 6, 8))  # 2.5 x 1.6 x 1.6 mm
    >>> case = ts.data.decathlon.load(folder).cases[0]
    >>> prepared = ts.data.sampling.prepare(case, ts.data.ct.Plan(spacing=(5, 1.6, 0.8)), seed=0)
    >>> prepared.image.shape, prepared.label.shape
    ((2, 6, 16, 1), (2, 6, 16))
    """
    volume, label = case.read()
    image = plan.prepare(volume).astype(np.float16)
    classes = np.zeros(1 + max(case.labels), np.uint8)
    classes[sorted(case.labels)] = np.arange(len(case.labels))
    label = plan.prepare_labels(classes[label], volume.spacing)
    rng, foreground = np.random.default_rng(seed), {}
    for number in np.unique(label[label > 0]).tolist():
        voxels = np.argwhere(label == number).astype(np.int32)
        if len(voxels) > COORDINATES:
            voxels = voxels[np.sort(rng.choice(len(voxels), COORDINATES, replace=False))]
        foreground[number] = voxels
    return Prepared(case.id, image, label, foreground)


def store(folder: str | Path, prepared: Prepared, source: dict | None = None) -> None:
    """Write the case as three .npy files, each of them whole or not at all, the image last.

    `source`, what it was made of (see `source`), goes before them to a JSON file.

    >>> image, label = np.zeros((2, 3, 4, 1), "float16"), np.zeros((2, 3, 4), "uint8")
    >>> ts.data.sampling.store("cases", ts.data.sampling.Prepared("one", image, label, {}))
    >>> ts.data.sampling.open("cases", "one").image.shape
    (2, 3, 4, 1)
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [np.insert(voxels, 0, number, axis=1)
            for number, voxels in prepared.foreground.items()]
    table = np.concatenate(rows) if rows else np.empty((0, 4), np.int32)  # (class, d, h, w)
    if source is not None:
        with whole(folder / f"{prepared.id}.source.json") as draft:
            draft.write_text(json.dumps(source, indent=1), encoding="utf-8")
    for part, array in (("foreground", table), ("label", prepared.label),
                        ("image", prepared.image)):
        with whole(folder / f"{prepared.id}.{part}.npy") as draft:
            np.save(draft, array, allow_pickle=False)


def source(case: Any, plan: Plan) -> dict:
    """What a prepared case is made of, as JSON has it: the plan, the labels, and of each file the
    bytes, the time of its last change in ns and its SHA-256."""
    return {**_told(case, plan),
            "files": [{**_stamp(path), "sha256": _digest(path)} for path in case.files]}


def changed(folder: str | Path, case: Any, plan: Plan) -> list[str]:
    """What is other than when the case was stored: paths of files, "labels", "plan". Of a case that
    was never stored with its `source`, nothing.

    A file of the same size and time is taken for the same, one of another time if its SHA-256 is.
    """
    path = Path(folder) / f"{case.id}.source.json"
    if not path.is_file():
        return []
    told = read_json(path)
    wrong = [key for key, now in _told(case, plan).items() if told.get(key) != now]
    before = told.get("files", [])
    if len(before) != len(case.files):
        return [*wrong, *map(str, case.files)]
    return wrong + [str(file) for file, then in zip(case.files, before, strict=True)
                    if not _same(file, then)]


def _told(case: Any, plan: Plan) -> dict:
    return {"plan": json.loads(json.dumps(asdict(plan))),
            "labels": {str(number): name for number, name in case.labels.items()}}


def _same(path: Path, then: dict) -> bool:
    now = _stamp(path)
    return then.get("bytes") == now["bytes"] and (
        then.get("changed") == now["changed"] or then.get("sha256") == _digest(path))


def _stamp(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "changed": path.stat().st_mtime_ns}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open(folder: str | Path, id: str) -> Prepared:
    """The stored case with image and label memory-mapped: hundreds of CTs need no memory.

    FileNotFoundError and ValueError name the file.
    """
    parts = {}
    for part in ("image", "label", "foreground"):
        path = Path(folder) / f"{id}.{part}.npy"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; prepare and store case {id} first")
        try:
            parts[part] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as fault:
            raise ValueError(f"{path}: cannot be read ({fault}); remove it and prepare case {id}"
                             " again") from fault
    table = np.array(parts["foreground"])  # small, and looked up at random
    foreground = {int(number): table[table[:, 0] == number, 1:]
                  for number in np.unique(table[:, 0])}
    return Prepared(id, parts["image"], parts["label"], foreground, Path(folder).absolute())


def pad(array: np.ndarray, size: Sequence[int],
        value: int | None = None) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Centre (*S, ...) in at least `size` along the first len(size) axes, by its edge or `value`.

    The slices cut the original back out. Nothing to pad: the very same array comes back.

    >>> padded, inside = ts.data.sampling.pad(np.array([7, 8]), (5,))
    >>> padded.tolist(), inside
    ([7, 7, 8, 8, 8], (slice(1, 3, None),))
    """
    missing = [max(want - n, 0) for n, want in zip(array.shape, size, strict=False)]
    slices = tuple(slice(m // 2, m // 2 + n) for n, m in zip(array.shape, missing, strict=False))
    if not any(missing):
        return array, slices
    widths = [(m // 2, m - m // 2) for m in missing] + [(0, 0)] * (array.ndim - len(missing))
    if value is None:
        return np.pad(array, widths, mode="edge"), slices
    return np.pad(array, widths, constant_values=value), slices


def patch(case: Prepared, size: Sequence[int], rng: np.random.Generator, foreground: float = 0.5,
          spatial: Callable | None = None) -> tuple[np.ndarray, np.ndarray]:
    """One patch: image (*size, C) float32, labels (*size) uint8, size of three ints.

    With probability `foreground` it is centred, as far as the volume's border allows, on a voxel
    of a class drawn uniformly among those present (so a small tumour is seen as often as its
    organ); else its place is uniform. Smaller volumes are padded: the edge, and IGNORE.

    `spatial(rng, size)` may turn and scale it about its centre (`Augmentation.spatial`): it is
    resampled from the case, so no corner of it is lost, and what sticks out of the volume is padded
    likewise. The voxel that it was centred on stays in it, on its grid.

    >>> label = np.zeros((4, 5, 6), "uint8")
    >>> label[1, 2, 3] = 1
    >>> case = ts.data.sampling.Prepared("one", label[..., None], label, {1: np.array([[1, 2, 3]])})
    >>> image, labels = ts.data.sampling.patch(case, (1, 3, 5), np.random.default_rng(0), 1.0)
    >>> image.shape, labels.tolist()
    ((1, 3, 5, 1), [[[0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]])
    """
    shape, voxel = case.label.shape, None
    room = np.maximum(np.subtract(shape, size), 0)
    if rng.random() < foreground and case.foreground:
        voxels = case.foreground[int(rng.choice(sorted(case.foreground)))]
        voxel = voxels[rng.integers(len(voxels))]
        start = np.clip(voxel - np.array(size) // 2, 0, room)
    else:
        start = rng.integers(0, room + 1)
    matrix = spatial(rng, size) if spatial else None
    if matrix is not None:
        middle = (np.array(size) - 1) / 2
        centre = start - np.maximum(np.subtract(size, shape), 0) // 2 + middle
        if voxel is not None:
            place = np.linalg.solve(matrix, voxel - centre) + middle
            place = np.clip(np.rint(place), 0, 2 * middle)
            centre = voxel - matrix @ (place - middle)
        return sample(case.image, case.label, matrix, centre - matrix @ middle, size, IGNORE)
    window = tuple(slice(a, a + s) for a, s in zip(start.tolist(), size, strict=True))
    image = np.array(case.image[window], dtype=np.float32)  # a memory map reads only the window
    labels = np.array(case.label[window], dtype=np.uint8)
    return pad(image, size)[0], pad(labels, size, IGNORE)[0]


def centred(number: int, share: float) -> bool:
    """Whether patch `number` of a run, from 0, is one of those centred on foreground.

    Of the first n patches ceil(n share) are, spread evenly, however they are cut into batches.

    >>> [ts.data.sampling.centred(number, 0.25) for number in range(5)]
    [True, False, False, False, True]
    """
    return math.ceil((number + 1) * share - 1e-9) > math.ceil(number * share - 1e-9)


def patches(cases: Sequence[Prepared], size: Sequence[int], count: int, rng: np.random.Generator,
            foreground: float = 0.5, augment: Callable | None = None, *, first: int,
            only: slice = slice(None)) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(id, image (*size, C) float32, labels (*size) uint8) of `count` cases drawn uniformly.

    Two sizes (H, W) mean slices: patches of depth one without the depth axis. A share `foreground`
    of all patches is centred on foreground, by their number in the run and not by chance
    (`centred`; nnU-Net's oversampling): `first` is that of the first one here, step * count. Those
    cases are drawn among the ones that have any. `augment(image, labels, rng)` changes each patch;
    if it has a `spatial`, as an `Augmentation` has, that turns and scales it before. Each patch has
    a generator of its own, spawned from `rng`: some of them, `only`, are as they are among all.
    """
    if len(size) not in (2, 3) or not cases or count < 1:
        raise ValueError(f"found size {tuple(size)}, {len(cases)} cases and count {count},"
                         " expected two or three sizes, a case and a patch at least")
    inhabited = [case for case in cases if case.foreground] or cases
    spawned = [*zip(range(first, first + count), rng.spawn(count), strict=True)]
    for number, rng in spawned[only]:
        certain = centred(number, foreground)
        among = inhabited if certain else cases
        case = among[int(rng.integers(len(among)))]
        image, labels = patch(case, (1, *size)[-3:], rng, float(certain),
                              getattr(augment, "spatial", None))
        if len(size) == 2:
            image, labels = image[0], labels[0]
        image, labels = augment(image, labels, rng) if augment else (image, labels)
        yield case.id, image, labels


def batch(cases: Sequence[Prepared], size: Sequence[int], count: int, rng: np.random.Generator,
          foreground: float = 0.5, augment: Callable | None = None, *, first: int,
          only: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """`patches` as two arrays: images (N, *size, C) float32 and labels (N, *size) uint8.

    >>> label, rng = np.ones((4, 5, 6), "uint8"), np.random.default_rng(0)
    >>> case = ts.data.sampling.Prepared("one", label[..., None], label, {1: np.array([[1, 2, 3]])})
    >>> images, labels = ts.data.sampling.batch([case], (3, 2), 7, rng, first=0)
    >>> images.shape, labels.shape
    ((7, 3, 2, 1), (7, 3, 2))
    """
    drawn = patches(cases, size, count, rng, foreground, augment, first=first, only=only)
    _, images, labels = zip(*drawn, strict=True)
    return np.stack(images), np.stack(labels)
