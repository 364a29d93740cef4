"""NIfTI files to arrays in anatomical axes, and label maps back onto the file's own grid.

A file may store its voxels in any of 48 orders (6 permutations, 8 reflections). Everything else
here sees one order only: (S, A, R), the first axis towards superior, the second towards anterior,
the third towards the patient's right. Permuting and reflecting is exact, so the way back is too.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

SAR = axcodes2ornt("SAR")
MILLIMETRES = {"meter": 1e3, "micron": 1e-3}  # NIfTI's other two units; "unknown" means mm
LARGEST = 16 * 2**30  # bytes; the longest published CTs stay under 1 GiB
DEFLATE = 1032  # the most that deflate can shrink anything (zlib technical details)

_DAMAGE = (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError,
           ArithmeticError, AttributeError, EOFError, KeyError, OSError, TypeError, ValueError,
           zlib.error)


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan in anatomical axes, with what is needed to go exactly back to its file's grid.

    array: (D, H, W) or (D, H, W, C) in (S, A, R) axes; spacing: mm along D, H, W.
    affine (4, 4), header and original_shape are the file's, in the file's axes.
    """

    array: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    header: Any
    original_shape: tuple[int, ...]
    path: Path


def read(path: str | Path, dtype: Any = "float32") -> Volume:
    """The volume in a .nii or .nii.gz file, scaled by its slope and intercept.

    The affine is the sform, else the qform, else pixdim; the spacing is the norm of its columns.
    An integer dtype rounds, and refuses values that are not whole numbers (to 1e-3) or overflow.
    Raises FileNotFoundError, or ValueError for a damaged, impossible or unusable file; naming it.
    """
    path, dtype = Path(path), np.dtype(dtype)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: expected a name that ends in .nii or .nii.gz")
    try:
        image: Any = nib.load(path)
        affine, stored, shape = image.affine, image.get_data_dtype(), image.shape
        unit = image.header.get_xyzt_units()[0]
        with nib.openers.ImageOpener(str(path)) as file:  # load() repairs a zero pixdim to 1 mm
            raw = type(image.header).from_fileobj(file, check=False)
    except _DAMAGE as fault:
        raise ValueError(f"{path}: cannot be read as NIfTI ({fault})") from fault

    if len(shape) not in (3, 4) or min(shape) < 1:
        raise ValueError(f"{path}: found shape {shape}, expected 3 or 4 axes, none of them empty")
    if stored.kind not in "iuf":
        raise ValueError(f"{path}: found voxels of type {stored}, expected real numbers")
    claimed, on_disk = math.prod(shape) * stored.itemsize, path.stat().st_size
    if claimed * dtype.itemsize > LARGEST * stored.itemsize or claimed > LARGEST:
        raise ValueError(f"{path}: header claims shape {shape}, over {LARGEST >> 30} GiB")
    if claimed > on_disk * (DEFLATE if path.name.endswith(".gz") else 1):
        raise ValueError(f"{path}: header claims {claimed} bytes of voxels, which the {on_disk} "
                         "bytes of the file cannot hold; it is truncated or its header is damaged")

    columns = nib.affines.voxel_sizes(affine)
    if raw["sform_code"] <= 0:
        columns = columns * np.where(raw["pixdim"][1:4] > 0, 1, np.nan)
    if not np.isfinite(affine).all() or not (columns > 0).all() \
            or np.linalg.matrix_rank(affine[:3, :3] / columns, tol=1e-4) < 3:
        raise ValueError(f"{path}: found the affine {affine[:3].tolist()} with spacing"
                         f" {columns.tolist()}, expected finite numbers and three independent"
                         " directions; repair the file's header")
    turn = ornt_transform(io_orientation(affine), SAR)
    d, h, w = (columns[np.argsort(turn[:, 0])] * MILLIMETRES.get(unit, 1.0)).tolist()

    try:
        with nib.openers.ImageOpener(str(path)) as file:
            lazy = image.dataobj
            layout = lazy.shape, lazy.dtype, lazy.offset, lazy.slope, lazy.inter
            values = np.asarray(nib.arrayproxy.ArrayProxy(file, layout, mmap=False),
                                dtype=dtype if dtype.kind == "f" else None)
            while file.read(2**20):  # gzip compares its checksum only at the very end
                pass
    except _DAMAGE as fault:
        raise ValueError(f"{path}: voxels cannot be read ({fault}); the file is truncated or"
                         " damaged, fetch it again") from fault
    if dtype.kind in "iu":
        values = _whole_numbers(values, dtype, path)
    array = np.ascontiguousarray(apply_orientation(values, turn), dtype=dtype)
    return Volume(array, (d, h, w), affine, image.header.copy(), shape, path)


def _whole_numbers(values: np.ndarray, dtype: np.dtype, path: Path) -> np.ndarray:
    if values.dtype.kind == "f":
        nearest = np.rint(values)
        wrong = values[~np.isclose(values, nearest, rtol=0, atol=1e-3)]  # NaN is not close
        if wrong.size:
            raise ValueError(f"{path}: found {wrong.size} values such as {wrong[0]},"
                             " expected whole numbers")
        values = nearest
    low, high, bounds = values.min(), values.max(), np.iinfo(dtype)
    if low < bounds.min or high > bounds.max:
        raise ValueError(f"{path}: found values from {low} to {high}, expected {dtype}:"
                         f" {bounds.min} to {bounds.max}")
    return values


def write(path: str | Path, array: np.ndarray, like: Volume) -> None:
    """Write a label map (D, H, W) in (S, A, R) axes onto the grid of the file `like` came from.

    Affine, codes and units are that file's; voxels are the smallest unsigned type that holds the
    labels. The file appears whole or not at all. ValueError where shape or values do not fit.
    """
    path, array = Path(path), np.asarray(array)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: expected a name that ends in .nii or .nii.gz")
    if array.shape != like.array.shape[:3]:
        raise ValueError(f"{path}: found a label map of shape {array.shape}, expected"
                         f" {like.array.shape[:3]} as in {like.path}")
    if array.dtype.kind not in "biu" or array.min() < 0:
        raise ValueError(f"{path}: found labels of {array.dtype} from {array.min()},"
                         " expected integers from 0")
    back = ornt_transform(SAR, io_orientation(like.affine))
    labels = apply_orientation(array, back).astype(np.min_scalar_type(int(array.max())))
    header = like.header.copy()
    header.set_data_dtype(labels.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # the scan's display window would hide the labels
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    with whole(path) as draft:
        nib.save(kind(labels, like.affine, header), draft)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft beside `path` that takes its place at the end, or vanishes if the block fails."""
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield draft
        with open(draft, "rb") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the content
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
