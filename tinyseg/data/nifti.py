"""NIfTI files to arrays in anatomical axes, and label maps back onto the file's own grid.

A file may store its voxels in any of 48 orders (6 permutations, 8 reflections). Everything else
here sees one order only: (S, A, R), the first axis towards superior, the second towards anterior,
the third towards the patient's right. Permuting and reflecting is exact, so the way back is too:
a label map is written under the scan's own header, byte for byte where it tells positions.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ..files import whole

# nibabel is imported where it is called: it takes as long to load as NumPy, and most programs that
# import this library to learn from it read no scan.
SAR = np.array([[2, 1], [1, 1], [0, 1]])  # nibabel's orientation: output axis of each, and its sign
MILLIMETRES = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}  # by NIfTI's unit code: unknown, m, mm, micron
LENGTHS = 1e-6, 1e5  # mm, between which a spacing is believed: from an atom's size to a street's
LARGEST = 16 * 2**30  # bytes; the longest published CTs stay under 1 GiB
DEFLATE = 1032  # the most that deflate can shrink anything (zlib technical details)
PIECE = 4 * 2**20  # bytes read at a time
SPARE = 64 * 2**20  # bytes that a file may hold before or after its voxels; DICOM headers fit
SAME_GRID = 1e-3  # mm, the most by which the affines of one grid may differ
SKEW = 1e-4  # cosine between two axes from which ITK refuses an sform (measured, ITK 5.4)


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan in anatomical axes, with what is needed to go exactly back to its file's grid.

    array: (D, H, W) or (D, H, W, C) in (S, A, R) axes; spacing: mm along D, H, W.
    affine (4, 4), header and original_shape are the file's, in the file's axes and unit.
    """

    array: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    header: Any
    original_shape: tuple[int, ...]
    path: Path

    def expect_grid_of(self, other: Volume) -> None:
        """ValueError, naming both files, unless shape and affine (to 1e-3 mm) are the same."""
        if self.original_shape[:3] != other.original_shape[:3]:
            raise ValueError(f"{self.path}: found shape {self.original_shape}, expected"
                             f" {other.original_shape[:3]} as in {other.path}")
        mine, theirs = (volume.affine[:3] * _unit(volume.header) for volume in (self, other))
        distance = float(np.abs(mine - theirs).max())
        if distance > SAME_GRID:
            raise ValueError(f"{self.path}: found an affine {distance:g} mm away from that of"
                             f" {other.path}, expected at most {SAME_GRID}; the two lie on"
                             " different grids")


@np.errstate(over="ignore", invalid="ignore")  # what overflows is refused, by its consequence
def read(path: str | Path, dtype: Any = "float32") -> Volume:
    """The volume in a .nii or .nii.gz file, scaled by its slope and intercept.

    The affine is the sform if its code is above 0, else the qform, else pixdim (methods 3, 2 and
    1 of the NIfTI-1 standard); the spacing is the norm of its columns. Warns where programs will
    disagree about positions: axes that are not at right angles, an sform that contradicts the qform
    or pixdim, neither sform nor qform. An integer dtype rounds, and refuses values that are not
    whole numbers (to 1e-3) or overflow; a floating one refuses NaN and infinity.

    Raises FileNotFoundError, or ValueError for a damaged, impossible or unusable file; naming it.
    Memory grows with what the file holds, not with what its header claims.
    """
    from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

    path, dtype = Path(path), np.dtype(dtype)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: expected a name that ends in .nii or .nii.gz")
    try:
        header = _header(path)
        shape, stored = header.get_data_shape(), _stored(header)
        offset, scale = float(header["vox_offset"]), header.get_slope_inter()
        affine, unit = _affine(header), _unit(header)
    except _damage() as fault:
        raise ValueError(f"{path}: cannot be read as NIfTI ({fault})") from fault

    if header["dim"][0] not in (3, 4) or min(shape) < 1:
        raise ValueError(f"{path}: found shape {shape}, expected 3 or 4 axes, none of them empty")
    if stored.kind not in "iuf":
        raise ValueError(f"{path}: found voxels of type {stored}, expected real numbers")
    claimed, on_disk = math.prod(shape) * stored.itemsize, path.stat().st_size
    if claimed * dtype.itemsize > LARGEST * stored.itemsize or claimed > LARGEST:
        raise ValueError(f"{path}: header claims shape {shape}, over {LARGEST >> 30} GiB")
    if not header.single_vox_offset <= offset <= SPARE:
        raise ValueError(f"{path}: header claims that voxels begin at byte {offset:g}, expected"
                         f" {header.single_vox_offset} to {SPARE}; its header is damaged")
    if offset + claimed > on_disk * (DEFLATE if path.name.endswith(".gz") else 1):
        raise ValueError(f"{path}: header claims {claimed} bytes of voxels, which the {on_disk} "
                         "bytes of the file cannot hold; it is truncated or its header is damaged")

    try:
        columns = _columns(header, affine, unit)
    except ValueError as fault:
        raise ValueError(f"{path}: {fault}") from None
    for doubt in _doubts(header, affine, columns, unit):
        warnings.warn(f"{path}: {doubt}", stacklevel=3)  # of read's caller, past errstate's frame
    turn = ornt_transform(io_orientation(affine), SAR)
    d, h, w = (columns[np.argsort(turn[:, 0])] * unit).tolist()

    try:
        content = _bytes(path, int(offset), claimed)
    except _damage() as fault:
        raise ValueError(f"{path}: voxels cannot be read ({fault}); the file is truncated or"
                         " damaged, fetch it again") from fault
    values: np.ndarray = np.frombuffer(content, stored).reshape(shape, order="F")
    if scale not in ((None, None), (1, 0)):
        values = values * np.float64(scale[0])
        values += scale[1]
    if dtype.kind in "iu":
        values = _whole_numbers(values, dtype, path)
    array = np.ascontiguousarray(apply_orientation(values, turn), dtype=dtype)
    if dtype.kind == "f" and (wrong := array.size - np.count_nonzero(np.isfinite(array))):
        raise ValueError(f"{path}: found {wrong} voxels that are NaN or infinite as {dtype},"
                         " expected finite numbers")
    return Volume(array, (d, h, w), affine, header, shape, path)


def _damage() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    return (ImageFileError, HeaderDataError, ArithmeticError, EOFError, KeyError, OSError,
            TypeError, ValueError, zlib.error)


def _header(path: Path) -> Any:
    """The header as it stands in the file, repaired nowhere, so that it can be written back.

    Extensions are not read: they may hold anything (gigabytes, a patient's name).
    """
    import nibabel as nib

    with nib.openers.ImageOpener(str(path)) as file:
        start = file.read(nib.Nifti2Header.sizeof_hdr)
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(start):
            header = kind(start[: kind.sizeof_hdr], check=False)
            if header["magic"].item() != kind.single_magic:
                raise ValueError("it is the .hdr of a pair, expected header and voxels in one")
            return header
    raise ValueError(f"found the first bytes {start[:8]!r}... without NIfTI's magic n+1 or n+2")


def _stored(header: Any) -> np.dtype:
    """The type of the voxels in the file."""
    from nibabel.nifti1 import data_type_codes

    code = int(header["datatype"])
    if code not in data_type_codes.value_set():
        raise ValueError(f"found voxels of type code {code}, which NIfTI does not know")
    return header.get_data_dtype()


def _unit(header: Any) -> float:
    """Millimetres per unit of the file's affine."""
    code = int(header["xyzt_units"]) & 7
    if code not in MILLIMETRES:
        raise ValueError(f"found unit {code} of length, expected {sorted(MILLIMETRES)}")
    return MILLIMETRES[code]


def _affine(header: Any) -> np.ndarray:
    """Voxel indices to (right, anterior, superior), in the file's unit, by NIfTI's precedence."""
    if header["sform_code"] > 0:
        return header.get_sform()
    return _qform(header) if header["qform_code"] > 0 else header.get_base_affine()


def _qform(header: Any) -> np.ndarray:
    form = header.copy()
    form["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # 0 means 1, says the standard
    try:
        return form.get_qform()
    except ValueError:  # b, c, d longer than 1; that rounding does so at half turns is no fault
        names = "quatern_b", "quatern_c", "quatern_d"
        length = math.hypot(*(float(form[name]) for name in names))
        if length > 1.001:
            raise
        for name in names:
            form[name] = form[name] / (length * (1 + 4e-16))  # not longer than 1 once more
        return form.get_qform()


def _columns(header: Any, affine: np.ndarray, unit: float) -> np.ndarray:
    """The norms of the affine's columns, its spacing; ValueError where it is none."""
    columns, pixdim = np.linalg.norm(affine[:3, :3], axis=0), header["pixdim"][1:4]
    valid = (columns * unit > LENGTHS[0]) & (columns * unit < LENGTHS[1])
    valid &= (header["sform_code"] > 0) | (pixdim > 0)  # 0 is not a millimetre
    if not np.isfinite(affine).all() or not valid.all() \
            or np.linalg.matrix_rank(affine[:3, :3] / columns, tol=1e-4) < 3:
        raise ValueError(f"found the affine {affine[:3].tolist()} with pixdim {pixdim.tolist()},"
                         f" expected a finite affine, a spacing of {LENGTHS[0]} to {LENGTHS[1]} mm"
                         " and three independent directions; repair the file's header")
    return columns


def _doubts(header: Any, affine: np.ndarray, columns: np.ndarray, unit: float) -> Iterator[str]:
    """What is readable, but not by every program as the same positions."""
    axes, pixdim = affine[:3, :3] / columns, np.abs(header["pixdim"][1:4])
    cosines = np.triu(axes.T @ axes, 1)
    a, b = np.unravel_index(np.abs(cosines).argmax(), cosines.shape)
    if abs(cosines[a, b]) > SKEW:
        yield (f"found axes {a} and {b} at {np.degrees(np.arccos(cosines[a, b])):.3f} degrees,"
               " expected 90; distances are measured as if they were at right angles, and programs"
               " built on ITK refuse the file or place it by its qform")
    if header["sform_code"] <= 0:
        if header["qform_code"] <= 0:
            yield ("found neither sform nor qform, so that nothing tells left from right; the first"
                   " axis is taken to point left, the second to the front, the third up, as nibabel"
                   " does")
        return
    if not np.allclose(pixdim, columns, rtol=1e-3, atol=0):
        yield (f"found spacing {columns.tolist()} in the sform and {pixdim.tolist()} in pixdim,"
               " expected the same; the sform counts here, pixdim in programs built on ITK")
    if header["qform_code"] > 0:
        corners = [*product(*((0, n - 1) for n in header.get_data_shape()[:3]), (1,))]
        try:
            gaps = np.linalg.norm(corners @ (_qform(header) - affine)[:3].T, axis=1)
        except _damage():  # it is no rotation
            gaps = np.array([np.inf])
        if not gaps.max() <= min(columns) / 2:
            yield (f"found an sform and a qform up to {gaps.max() * unit:g} mm apart, expected at"
                   " most half a voxel; the sform counts here, the qform may in programs built on"
                   " ITK")


def _bytes(path: Path, offset: int, count: int) -> bytearray:
    """`count` bytes of the unpacked file; memory grows only as they arrive."""
    from nibabel.openers import ImageOpener

    content = bytearray()
    with ImageOpener(str(path)) as file:
        file.seek(offset)
        while len(content) < count and (piece := file.read(min(PIECE, count - len(content)))):
            content += piece
        if len(content) < count:
            raise EOFError(f"found {len(content)} of {count} bytes")
        for _ in range(SPARE // PIECE):  # gzip compares its checksum only at the very end
            if not file.read(PIECE):
                return content
    raise ValueError(f"found over {SPARE >> 20} MiB after the voxels")


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

    The header is that file's own: affines, codes, units and spacing keep their very bytes, and
    only what describes the scan's values (type, scaling, display window, intent, channels) is
    replaced; extensions are left out. Voxels are the smallest unsigned type that holds the
    labels. The file appears whole or not at all. ValueError where shape or values do not fit.
    """
    from nibabel.openers import ImageOpener
    from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

    path, array = Path(path), np.asarray(array)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: expected a name that ends in .nii or .nii.gz")
    if array.shape != like.array.shape[:3]:
        raise ValueError(f"{path}: found a label map of shape {array.shape}, expected"
                         f" {like.array.shape[:3]} as in {like.path}")
    if array.dtype.kind not in "biu" or array.min() < 0:
        raise ValueError(f"{path}: found labels of {array.dtype} from {array.min()},"
                         " expected integers from 0")
    header = like.header.copy()
    header.set_data_dtype(np.min_scalar_type(int(array.max())))
    header.set_slope_inter(1, 0)
    header.set_intent("none")
    header["dim"][0], header["dim"][4:] = 3, 1
    header["cal_min"] = header["cal_max"] = 0  # the scan's display window would hide the labels
    header["vox_offset"] = 0  # filled in as it is written
    labels = apply_orientation(array, ornt_transform(SAR, io_orientation(like.affine)))
    labels = labels.astype(header.get_data_dtype())  # in the header's byte order
    with whole(path) as draft, ImageOpener(str(draft), "wb") as file:
        header.write_to(file)
        file.write(labels.tobytes(order="F"))
