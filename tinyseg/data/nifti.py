"""NIfTI files to arrays in anatomical axes, and label maps back onto the file's own grid.

A file may store its voxels in any of 48 orders (6 permutations, 8 reflections). Everything else
here sees one order only: (S, A, R), the first axis towards superior, the second towards anterior,
the third towards the patient's right. Permuting and reflecting is exact, so the way back is too:
a label map is written under the scan's own header, byte for byte where it tells positions.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ..files import DEFLATE, GZIP, identify, unpacked, whole
from . import headers

# nibabel is imported where it is called: it takes as long to load as NumPy, and most programs that
# import this library to learn from it read no scan.
ENDINGS = (".nii", ".nii.gz")
SAR = np.array([[2, 1], [1, 1], [0, 1]])  # nibabel's orientation: output axis of each, and its sign
LARGEST = 16 * 2**30  # bytes; the longest published CTs stay under 1 GiB
PIECE = 4 * 2**20  # bytes read at a time
SPARE = 64 * 2**20  # bytes that a file may hold before or after its voxels; DICOM headers fit
ROUNDING = 1 / 20  # of a voxel: what decimals of a spacing make of 500 voxels, and moves nothing


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

    def grid(self) -> np.ndarray:
        """(4, 4): the indices of `array` to millimetres towards (right, anterior, superior)."""
        from nibabel.orientations import inv_ornt_aff

        return np.diag([*[headers.unit(self.header)] * 3, 1]) @ self.affine @ inv_ornt_aff(
            _turn(self.affine), self.original_shape[:3])

    def expect_grid_of(self, other: Volume) -> None:
        """ValueError, naming both files, unless their arrays have the same voxels.

        The order of axes in the files does not matter, and nothing is interpolated. Where corners
        lie half a voxel apart along any axis, the nearest voxels are others: refused. Below that
        they are the same, which is told by a warning from a twentieth on; the grid of `other` is
        then the one to take.
        """
        from nibabel import aff2axcodes

        if self.array.shape[:3] != other.array.shape[:3]:
            mine, theirs = ("".join(aff2axcodes(v.affine)) for v in (self, other))
            raise ValueError(f"{self.path}: found shape {self.original_shape}, expected"
                             f" {other.original_shape[:3]} as in {other.path} (axes towards {mine}"
                             f" and {theirs}); resample one of them to the other's grid")
        corners = [*product(*((-0.5, n - 0.5) for n in self.array.shape[:3]), (1,))]
        gaps = np.linalg.solve(other.grid(), (self.grid() - other.grid()) @ np.transpose(corners))
        share = float(np.abs(gaps[:3]).max())  # of a voxel
        distance = np.linalg.norm(other.grid()[:3] @ gaps, axis=0).max()
        told = (f"{self.path}: found corners of the volume {distance:.3g} mm ({share:.2g} voxels)"
                f" away from those of {other.path}, ")
        if not share < 0.5:
            raise ValueError(f"{told}expected less than half a voxel; the two lie on different"
                             " grids: resample one to the other's, or mend the header that is"
                             " wrong")
        if share > ROUNDING:
            warnings.warn(f"{told}expected none; that is less than half a voxel, so voxels are"
                          " taken to be the same, on the grid of the latter", stacklevel=2)


@np.errstate(over="ignore", invalid="ignore")  # what overflows is refused, by its consequence
def read(path: str | Path, dtype: Any = "float32") -> Volume:
    """The volume in a .nii or .nii.gz file, scaled by its slope and intercept.

    Whether it is packed, its content tells and not its name. Of five axes the fourth, time, must
    have one entry (as ITK writes channels), and is left out.

    The affine is the sform if its code is above 0, else the qform, else pixdim (methods 3, 2 and
    1 of the NIfTI-1 standard); the spacing is the norm of its columns. Warns where programs will
    disagree about positions: axes that are not at right angles, an sform that contradicts the qform
    or pixdim, neither sform nor qform. An integer dtype rounds, and refuses values that are not
    whole numbers (to 1e-3) or overflow; a floating one refuses NaN and infinity.

    Raises FileNotFoundError, or ValueError for a damaged, impossible or unusable file; naming it.
    Memory grows with what the file holds, not with what its header claims.

    >>> import nibabel
    >>> file = nibabel.Nifti1Image(np.zeros((8, 6, 4), "int16"), np.diag([1, 2, 5, 1]))  # (R, A, S)
    >>> nibabel.save(file, "scan.nii.gz")
    >>> scan = ts.data.nifti.read("scan.nii.gz")
    >>> scan.array.shape, scan.spacing
    ((4, 6, 8), (5.0, 2.0, 1.0))
    """
    from nibabel.orientations import apply_orientation

    path, dtype = Path(path), np.dtype(dtype)
    if path.is_dir():
        inside = next((p for p in sorted(path.iterdir()) if p.name.endswith(ENDINGS)), None)
        raise FileNotFoundError(f"{path}: no such file, it is a folder; expected one file"
                                + (f", such as {inside}, to stand in its place" if inside else ""))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.name.endswith(ENDINGS):
        raise ValueError(f"{path}: expected a name that ends in .nii or .nii.gz")
    with open(path, "rb") as file:
        start = file.read(128)
    if told := identify(start):
        raise ValueError(f"{path}: found no NIfTI but a file that is {told}")
    try:
        header = headers.read(path)
        shape, stored = header.get_data_shape(), headers.stored(header)
        offset, scale = float(header["vox_offset"]), header.get_slope_inter()
        affine, unit = headers.affine(header), headers.unit(header)
    except headers.damage() as fault:
        raise ValueError(f"{path}: cannot be read as NIfTI ({fault})") from fault

    original = shape
    shape = shape[:3] + shape[4:] if header["dim"][0] == 5 and shape[3] == 1 else shape
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise ValueError(f"{path}: found shape {original}, expected 3 or 4 axes, none of them empty"
                         " (or 5, with one point in time); save a part of it as a file of its own")
    if stored.kind not in "iuf":
        raise ValueError(f"{path}: found voxels of type {stored}, expected real numbers")
    claimed, on_disk = math.prod(shape) * stored.itemsize, path.stat().st_size
    if claimed * dtype.itemsize > LARGEST * stored.itemsize or claimed > LARGEST:
        raise ValueError(f"{path}: header claims shape {shape}, over {LARGEST >> 30} GiB")
    if not header.single_vox_offset <= offset <= SPARE:
        raise ValueError(f"{path}: header claims that voxels begin at byte {offset:g}, expected"
                         f" {header.single_vox_offset} to {SPARE}; its header is damaged")
    if offset + claimed > on_disk * (DEFLATE if start.startswith(GZIP) else 1):
        raise ValueError(f"{path}: header claims {claimed} bytes of voxels, which the {on_disk} "
                         "bytes of the file cannot hold; it is truncated or its header is damaged")

    try:
        columns = headers.columns(header, affine, unit)
    except ValueError as fault:
        raise ValueError(f"{path}: {fault}") from None
    for doubt in headers.doubts(header, affine, columns, unit):
        warnings.warn(f"{path}: {doubt}", stacklevel=3)  # of read's caller, past errstate's frame
    turn = _turn(affine)
    d, h, w = (columns[np.argsort(turn[:, 0])] * unit).tolist()

    try:
        content = _bytes(path, int(offset), claimed)
    except headers.damage() as fault:
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
    return Volume(array, (d, h, w), affine, header, original, path)


def join(volumes: Sequence[Volume]) -> Volume:
    """One volume, array (D, H, W, C), of the channels of several on the grid of the first.

    ValueError where they lie on different grids.

    >>> import nibabel
    >>> file = nibabel.Nifti1Image(np.zeros((8, 6, 4), "int16"), np.eye(4))
    >>> nibabel.save(file, "scan.nii.gz")
    >>> scan = ts.data.nifti.read("scan.nii.gz")
    >>> ts.data.nifti.join([scan, scan, scan]).array.shape
    (4, 6, 8, 3)
    """
    first, *others = volumes
    for other in others:
        other.expect_grid_of(first)
    channels = [volume.array.reshape(*volume.array.shape[:3], -1) for volume in volumes]
    return replace(first, array=np.concatenate(channels, axis=3) if others else channels[0])


def _turn(affine: np.ndarray) -> np.ndarray:
    """nibabel's transform of a file's axes to ours."""
    from nibabel.orientations import io_orientation, ornt_transform

    return ornt_transform(io_orientation(affine), SAR)


def _bytes(path: Path, offset: int, count: int) -> bytearray:
    """`count` bytes of the unpacked file; memory grows only as they arrive."""
    content = bytearray()
    with unpacked(path) as file:
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

    >>> import nibabel
    >>> file = nibabel.Nifti1Image(np.zeros((8, 6, 4), "int16"), np.diag([1, 2, 5, 1]))  # (R, A, S)
    >>> nibabel.save(file, "scan.nii.gz")
    >>> scan = ts.data.nifti.read("scan.nii.gz")
    >>> ts.data.nifti.write("labels.nii.gz", np.ones((4, 6, 8), "uint8"), like=scan)
    >>> nibabel.load("labels.nii.gz").shape
    (8, 6, 4)
    """
    from nibabel.openers import ImageOpener
    from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

    path, array = _named(path), np.asarray(array)
    if array.shape != like.array.shape[:3]:
        raise ValueError(f"{path}: found a label map of shape {array.shape}, expected"
                         f" {like.array.shape[:3]} as in {like.path}")
    if array.dtype.kind not in "biu" or array.min() < 0:
        raise ValueError(f"{path}: found labels of {array.dtype} from {array.min()},"
                         " expected integers from 0")
    header = _header(like, np.min_scalar_type(int(array.max())))
    labels = apply_orientation(array, ornt_transform(SAR, io_orientation(like.affine)))
    labels = labels.astype(header.get_data_dtype())  # in the header's byte order
    with whole(path) as draft, ImageOpener(str(draft), "wb") as file:
        header.write_to(file)
        file.write(labels.tobytes(order="F"))


def write_maps(path: str | Path, rows: Iterable[np.ndarray], count: int, like: Volume) -> None:
    """Write `count` maps as a fourth axis, float32, under a header as in `write`.

    They come as rows (H, W, count), one for each of the D of `like`, and go to the disk as they
    come: memory does not grow with the scan. The file appears whole or not at all. ValueError where
    a row or their number does not fit.
    """
    from nibabel.openers import ImageOpener
    from nibabel.orientations import apply_orientation

    path, header = _named(path), _header(like, np.dtype("float32"))
    shape = (*like.original_shape[:3], count)
    header["dim"][0], header["dim"][4] = 4, count
    left = math.prod(shape) * 4
    with whole(path) as draft:
        # A packed file is written in one go, and the rows fill another in the file's own order.
        plain = draft.with_suffix("") if path.suffix == ".gz" else draft
        try:
            with open(plain, "wb") as file:
                header.write_to(file)
                start = file.tell()
                for at in range(0, left, PIECE):  # a disk too small says so now, mapped it cannot
                    file.write(bytes(min(PIECE, left - at)))
            maps = np.memmap(plain, header.get_data_dtype(), "r+", start, shape, order="F")
            ours = apply_orientation(maps, _turn(like.affine))  # a view
            for here, row in zip(ours, rows, strict=True):
                if row.shape != here.shape:
                    raise ValueError(f"{path}: found a row of shape {row.shape}, expected"
                                     f" {here.shape}")
                here[...] = row
            maps.flush()
            del maps, ours, here
            if plain != draft:
                with open(plain, "rb") as source, ImageOpener(str(draft), "wb") as packed:
                    shutil.copyfileobj(source, packed, PIECE)
        finally:
            if plain != draft:
                plain.unlink(missing_ok=True)


def _named(path: str | Path) -> Path:
    """The path of a file to write, if its name is that of a NIfTI file."""
    if not Path(path).name.endswith(ENDINGS):
        raise ValueError(f"{path}: expected a name that ends in .nii or .nii.gz")
    return Path(path)


def _header(like: Volume, dtype: np.dtype) -> Any:
    """The header of `like` for other values, of one channel."""
    header = like.header.copy()
    header.set_data_dtype(dtype)
    header.set_slope_inter(1, 0)
    header.set_intent("none")
    header["dim"][0], header["dim"][4:] = 3, 1
    header["cal_min"] = header["cal_max"] = 0  # the scan's display window would hide the values
    header["vox_offset"] = 0  # filled in as it is written
    return header
