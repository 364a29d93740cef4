"""Synthetic abdominal CTs with a pancreas and a tumour in it, as a Decathlon folder.

For proofs that need no download: not anatomy, but its problem. A small curved organ among others,
a lesion in it, partial volume, noise, and files in all kinds of orientations.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ..files import whole
from . import nifti

SHAPE, SPACING = (40, 96, 96), (2.5, 1.6, 1.6)
FIELD = np.array((100.0, 154.0, 154.0))  # mm, what the numbers below are drawn for
ORIENTATIONS = ("LPS", "RAS", "LAS", "PIR", "SLA", "RPI")
INF = np.inf
# Centre and radii in mm along (superior, anterior, right), then HU. Later ones cover earlier ones.
ORGANS = (
    ((0, -32, 0), (INF, 13, 15), 220),  # spine
    ((0, -46, 0), (INF, 5, 6), 30),  # its canal
    ((18, 14, 43), (42, 30, 19), 75),  # liver
    ((22, -10, -48), (26, 18, 11), 140),  # spleen
    ((-16, -24, 36), (26, 12, 11), 170),  # kidneys
    ((-12, -24, -36), (26, 12, 11), 170),
    ((26, 30, -24), (20, 15, 20), 20),  # stomach
    ((28, 37, -24), (12, 6, 11), -700),  # its gas
    ((0, -12, -7), (INF, 7, 7), 190),  # aorta
    ((0, -11, 13), (INF, 7, 8), 130),  # vena cava
)


def volume(rng: np.random.Generator, shape: tuple[int, int, int] = SHAPE,
           spacing: tuple[float, float, float] = SPACING) -> tuple[np.ndarray, np.ndarray]:
    """One scan (D, H, W) int16 in HU and its labels uint8 (1 pancreas, 2 cancer), (S, A, R) axes.

    Spacing in mm. The body fills the field of view: a smaller field holds a smaller body.

    >>> scan, labels = ts.data.phantom.volume(np.random.default_rng(0), shape=(8, 24, 32))
    >>> scan.shape, scan.dtype, np.unique(labels).tolist()
    ((8, 24, 32), dtype('int16'), [0, 1, 2])
    """
    scale = float(np.min(np.multiply(shape, spacing) / FIELD))
    axes = [(np.arange(n) + 0.5 - n / 2) * s / scale for n, s in zip(shape, spacing, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)  # (3, D, H, W) mm
    grid += _waves(rng, grid)
    voxel = float(np.mean(spacing)) / scale
    hu = np.full(shape, -1000.0, np.float32)

    def paint(distance: np.ndarray, value: float) -> None:
        # Partial volume: a voxel that the surface cuts is a mixture of both sides.
        hu[...] += (value - hu) * np.clip(0.5 - distance / voxel, 0, 1)

    girth = rng.uniform(0.94, 1.04, 3)
    paint(_ellipsoid(grid, (0, 0, 0), girth * (INF, 58, 70)), -100)  # skin and fat
    cavity = _ellipsoid(grid, (0, 0, 0), girth * (INF, 58, 70) - rng.uniform(6, 9))
    paint(cavity, 50)
    for _ in range(8):  # loops of bowel
        centre = rng.uniform((-45, 8, -42), (0, 38, 38))
        loop = _ellipsoid(grid, centre, rng.uniform(7, 13, 3))
        paint(np.maximum(loop, cavity), rng.uniform(-10, 45))
    for place, radii, value in ORGANS:
        organ = _ellipsoid(grid, place + rng.normal(0, 2, 3), radii * rng.uniform(0.9, 1.1, 3))
        paint(np.maximum(organ, cavity), value + rng.normal(0, 5))

    # The pancreas: balls along a line from the head (right, low) over the spine to the tail.
    t = np.linspace(0, 1, 32)
    line = np.stack((-14 + 28 * t, 6 + 14 * np.sin(np.pi * t) - 12 * t, 26 - 64 * t), axis=1)
    line += rng.normal(0, 3, 3) + np.outer(np.sin(2 * np.pi * t), rng.normal(0, 2.5, 3))
    radius = 13 - 3.5 * t + rng.uniform(-0.5, 1)
    pancreas = np.full(shape, INF, np.float32)
    for centre, r in zip(line, radius, strict=True):
        np.minimum(pancreas, _ellipsoid(grid, centre, (r, r, r)), out=pancreas)
    seat = rng.integers(3, 29)
    offset = rng.normal(0, 1, 3)
    offset *= rng.uniform(0, 0.6) * radius[seat] / np.linalg.norm(offset)
    cancer = _ellipsoid(grid, line[seat] + offset, np.full(3, rng.uniform(9, 14)))
    parenchyma = 110 + rng.normal(0, 4)
    paint(pancreas, parenchyma)
    paint(cancer, rng.uniform(5, 25))  # a cyst: fluid, as most of the easier lesions are

    hu += rng.normal(0, 12, shape)
    labels = np.where(cancer < 0, 2, pancreas < 0).astype(np.uint8)
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16), labels


def _ellipsoid(grid: np.ndarray, centre: ArrayLike, radii: ArrayLike) -> np.ndarray:
    """About the signed distance (mm) to an ellipsoid's surface, negative inside; exact for balls.
    """
    centre, radii = np.asarray(centre, np.float32), np.asarray(radii, np.float32)
    square = sum(((x - c) / r) ** 2 for x, c, r in zip(grid, centre, radii, strict=True) if r < INF)
    return (np.sqrt(square) - 1) * np.min(radii)


def _waves(rng: np.random.Generator, grid: np.ndarray) -> np.ndarray:
    """A smooth displacement (3, D, H, W) in mm: three waves of 60 to 120 mm along each axis."""
    displacement = np.zeros_like(grid)
    for axis in np.repeat(np.arange(3), 3):
        direction = rng.normal(0, 1, 3)
        direction *= 2 * np.pi / rng.uniform(60, 120) / np.linalg.norm(direction)
        phase = np.tensordot(direction.astype(np.float32), grid, 1) + rng.uniform(0, 2 * np.pi)
        displacement[axis] += np.float32(rng.uniform(0.8, 1.6)) * np.cos(phase)
    return displacement


def write(folder: str | Path, cases: int = 8, seed: int = 0,
          shape: tuple[int, int, int] = SHAPE,
          spacing: tuple[float, float, float] = SPACING) -> Path:
    """A Decathlon folder of phantoms, the same files for the same arguments. Returns the folder.

    >>> folder = ts.data.phantom.write("task", cases=2, shape=(4, 6, 8))
    >>> sorted(path.name for path in folder.glob("imagesTr/p*"))
    ['phantom_000.nii.gz', 'phantom_001.nii.gz']
    """
    import nibabel as nib
    from nibabel import orientations

    folder = Path(folder)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    training = []
    for case in range(cases):
        rng = np.random.default_rng((seed, case))  # a case does not depend on how many there are
        arrays = volume(rng, shape, spacing)
        codes = ORIENTATIONS[case % len(ORIENTATIONS)]
        turn = orientations.ornt_transform(nifti.SAR, orientations.axcodes2ornt(codes))
        affine = np.zeros((4, 4))
        affine[(2, 1, 0), (0, 1, 2)] = spacing
        affine[:, 3] = *np.round(rng.uniform(-200, 0, 3), 2), 1
        affine = affine @ orientations.inv_ornt_aff(turn, shape)
        entry = {}
        for part, array in zip(("image", "label"), arrays, strict=True):
            name = f"./{part}sTr/phantom_{case:03d}.nii.gz"
            stored = nib.Nifti1Image(orientations.apply_orientation(array, turn), affine)
            stored.header.set_xyzt_units("mm", "sec")
            with whole(folder / name) as draft:
                nib.save(stored, draft)
            entry[part] = name
        training.append(entry)
    (folder / "imagesTr" / "._phantom_000.nii.gz").write_bytes(b"\x00\x05\x16\x07" + bytes(12))
    content = {
        "name": "Phantom", "description": "Synthetic pancreas and cancer",
        "reference": "tinyseg", "licence": "CC0", "relase": "1.0", "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "pancreas", "2": "cancer"},
        "numTraining": cases, "numTest": 0, "training": training, "test": [],
    }
    with whole(folder / "dataset.json") as draft:
        draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder
