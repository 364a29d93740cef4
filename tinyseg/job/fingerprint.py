"""What a folder of training cases holds, found by reading every case once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from ..data import augment, ct
from ..data.decathlon import Case, Dataset
from ..infer.windows import Progress

DRAWN = 50_000  # voxels of a scan, evenly spaced, that its percentiles are of
PERCENTILES = (0.5, 50, 99.5)


@dataclass(frozen=True, eq=False)
class Digest:
    """What is kept of a case: voxels {label number: how many}, `intensities` (2, C, 5) of the scan
    and of its foreground (NaN where there is none): PERCENTILES, mean, standard deviation."""

    id: str
    sample: ct.Sample
    voxels: dict[int, int]
    intensities: np.ndarray

    @property
    def volume(self) -> float:
        """Of one voxel, in ml."""
        return prod(self.sample.spacing) / 1000


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """The cases of a dataset that can be read, and what is wrong with the others: broken {id: why}.

    pairs: names of classes that are each other's mirror image; alone: those that have a side, or
    may have one, and no partner. `str` is a table that a person reads.
    """

    name: str
    labels: dict[int, str]
    modalities: dict[int, str]
    digests: tuple[Digest, ...]
    broken: dict[str, str]
    pairs: tuple[tuple[str, str], ...]
    alone: tuple[str, ...]

    @property
    def samples(self) -> list[ct.Sample]:
        """What `ct.Plan.fit` is fitted to."""
        return [digest.sample for digest in self.digests]

    @property
    def spacings(self) -> np.ndarray:
        """(cases, 3) in mm."""
        return np.array([sample.spacing for sample in self.samples])

    @property
    def extents(self) -> np.ndarray:
        """(cases, 3) of the scans in mm."""
        return self.spacings * [sample.shape[:3] for sample in self.samples]

    @property
    def mirror(self) -> tuple[tuple[str, str], ...] | None:
        """The pairs that change places in a mirror; None, nothing is mirrored, where a class has a
        side and no partner."""
        return None if self.alone else self.pairs

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """The table, line by line."""
        yield (f"{self.name}: {len(self.digests)} cases of {', '.join(self.modalities.values())}, "
               f"classes {', '.join(self.labels.values())}")
        shapes = np.array([sample.shape[:3] for sample in self.samples])
        yield f"\n{'':24}{'smallest':>12}{'median':>12}{'largest':>12}"
        for what, values in (("voxels", shapes), ("spacing in mm", self.spacings),
                             ("extent in mm", self.extents)):
            for axis, name in enumerate(("depth", "height", "width")):
                yield _row(f"{what}, {name}", (values[:, axis].min(), np.median(values[:, axis]),
                                               values[:, axis].max()))
        yield f"\n{'intensities (medians)':24}" + "".join(f"{x:>12}" for x in (
            *(f"{p:g} %" for p in PERCENTILES), "mean", "deviation"))
        medians = np.array([digest.intensities for digest in self.digests])
        for channel, name in enumerate(self.modalities.values()):
            for place, where in enumerate(("scan", "foreground")):
                found = medians[:, place, channel]
                found = found[np.isfinite(found).all(axis=1)]
                if len(found):
                    yield _row(f"{channel} {name}, {where}", np.median(found, axis=0))
        yield (f"\n{'class sizes in ml':24}" + "".join(f"{x:>12}" for x in (
            "smallest", "median", "largest", "share", "in cases")) + "  the largest in")
        for number, name in list(self.labels.items())[1:]:
            sizes = np.array([d.voxels[number] * d.volume for d in self.digests])
            share = sizes.sum() / sum(sum(d.voxels.values()) * d.volume for d in self.digests)
            held = sizes[sizes > 0]
            yield (_row(name, (held.min(), np.median(held), held.max()) if len(held)
                        else (0, 0, 0)) + f"{share:>12.2%}{len(held):>12}"
                   + f"  {self.digests[sizes.argmax()].id}" * bool(len(held)))
        yield "\nleft and right: " + (
            f"{', '.join(self.alone)} may have a side and no partner, so nothing is mirrored"
            if self.alone else
            ", ".join(f"{a} = {b}" for a, b in self.pairs) or "no class has a side")
        for id, why in self.broken.items():
            yield f"broken: {id}: {why}"


def _row(name: str, values: Iterable[float]) -> str:
    return f"{name:24}" + "".join(f"{value:>12.4g}" for value in values)


def digest(case: Case, rng: np.random.Generator) -> Digest:
    """What is kept of a case, which is read once; its errors are those of `case.read`."""
    volume, label = content = case.read()
    counts = np.bincount(label.ravel(), minlength=1 + max(case.labels))
    scan = volume.array.reshape(-1, len(case.modalities))
    drawn = slice(None, None, 1 + len(scan) // DRAWN)
    voxels, inside = scan[drawn], label.reshape(-1)[drawn] > 0
    intensities = np.array([_intensities(voxels), _intensities(voxels[inside])])
    return Digest(case.id, ct.sample(case, content, rng),
                  {number: int(counts[number]) for number in case.labels}, intensities)


def _intensities(voxels: np.ndarray) -> np.ndarray:
    """(C, 5) of (n, C): PERCENTILES, mean, standard deviation."""
    if not len(voxels):
        return np.full((voxels.shape[1], len(PERCENTILES) + 2), np.nan)
    voxels = voxels.astype(np.float64)
    return np.stack([*np.percentile(voxels, PERCENTILES, axis=0), voxels.mean(0), voxels.std(0)], 1)


def fingerprint(dataset: Dataset, progress: Progress = iter, seed: int = 0) -> Fingerprint:
    """The fingerprint of all cases, each of them read once, within `progress` (tqdm, say).

    A case that cannot be read is told in `broken` and left out. ValueError, with the first fault,
    where none can be.
    """
    rng, digests, broken = np.random.default_rng(seed), [], {}
    for case in progress(dataset.cases):
        try:
            digests.append(digest(case, rng))
        except (OSError, ValueError, MemoryError) as fault:
            told = ", ".join([str(fault), *getattr(fault, "__notes__", [])])
            broken[case.id] = told if any(str(f) in told for f in case.files) \
                else f"{case.image}: {told}"
    if not digests:
        raise ValueError(f"found no case of {len(broken)} that can be read, expected one at least: "
                         f"{next(iter(broken.values()), 'there are none')}")
    pairs, alone = augment.sides(dataset.labels.values())
    return Fingerprint(dataset.name, dataset.labels, dataset.modalities, tuple(digests), broken,
                       tuple(pairs), tuple(alone))
