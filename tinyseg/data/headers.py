"""What the header of a NIfTI file says of voxels and positions, and what of that is in doubt.

Functions raise ValueError without the file's name, which their caller knows.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ..files import unpacked

UNITS = {0: ("unknown", 1.0), 1: ("metre", 1e3), 2: ("mm", 1.0), 3: ("micron", 1e-3)}  # and its mm
LENGTHS = 1e-6, 1e5  # mm, between which a spacing is believed: from an atom's size to a street's
BODY = 1.0, 1e4  # mm, between which extents are believed: of every scan two are above the lower
SKEW = 1e-4  # cosine between two axes from which ITK refuses an sform (measured, ITK 5.4)


def damage() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    return (ImageFileError, HeaderDataError, ArithmeticError, EOFError, KeyError, OSError,
            TypeError, ValueError, zlib.error)


def read(path: Path) -> Any:
    """The header as it stands in the file, repaired nowhere, so that it can be written back.

    Extensions are not read: they may hold anything (gigabytes, a patient's name).
    """
    import nibabel as nib

    with unpacked(path) as file:
        start = file.read(nib.Nifti2Header.sizeof_hdr)
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(start):
            header = kind(start[: kind.sizeof_hdr], check=False)
            if header["magic"].item() != kind.single_magic:
                raise ValueError("it is the .hdr of a pair, expected header and voxels in one")
            return header
    raise ValueError(f"found the first bytes {start[:8]!r}... without NIfTI's magic n+1 or n+2")


def stored(header: Any) -> np.dtype:
    """The type of the voxels in the file."""
    from nibabel.nifti1 import data_type_codes

    code = int(header["datatype"])
    if code not in data_type_codes.value_set():
        raise ValueError(f"found voxels of type code {code}, which NIfTI does not know")
    return header.get_data_dtype()


def unit(header: Any) -> float:
    """Millimetres per unit of the file's affine."""
    code = int(header["xyzt_units"]) & 7
    if code not in UNITS:
        raise ValueError(f"found unit {code} of length, expected {sorted(UNITS)}")
    return UNITS[code][1]


def affine(header: Any) -> np.ndarray:
    """Voxel indices to (right, anterior, superior), in the file's unit, by NIfTI's precedence."""
    if header["sform_code"] > 0:
        return header.get_sform()
    return qform(header) if header["qform_code"] > 0 else header.get_base_affine()


def qform(header: Any) -> np.ndarray:
    """The affine that quaternion, offset and pixdim say, in the file's unit."""
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


def columns(header: Any, affine: np.ndarray, unit: float) -> np.ndarray:
    """The norms of the affine's columns, its spacing; ValueError where it is none, or the volume
    has no plane as large as the smallest body, or is larger than any."""
    columns, pixdim = np.linalg.norm(affine[:3, :3], axis=0), header["pixdim"][1:4]
    valid = (columns * unit > LENGTHS[0]) & (columns * unit < LENGTHS[1])
    valid &= (header["sform_code"] > 0) | (pixdim > 0)  # 0 is not a millimetre
    if not np.isfinite(affine).all() or not valid.all() \
            or np.linalg.matrix_rank(affine[:3, :3] / columns, tol=1e-4) < 3:
        raise ValueError(f"found the affine {affine[:3].tolist()} with pixdim {pixdim.tolist()},"
                         f" expected a finite affine, a spacing of {LENGTHS[0]} to {LENGTHS[1]} mm"
                         " and three independent directions; repair the file's header")
    shape, code = header.get_data_shape()[:3], int(header["xyzt_units"]) & 7
    extents = columns * unit * shape
    if np.sort(extents)[1] < BODY[0] or extents.max() > BODY[1]:  # a single slice may be thin
        raise ValueError(
            f"found a volume of {' x '.join(f'{x:.3g}' for x in extents)} mm, expected a body's,"
            f" {BODY[0]:g} to {BODY[1]:g} mm (header: shape {shape}, spacing {_plain(columns)} in"
            f" the affine, pixdim {_plain(pixdim)}, xyzt_units {code}: {UNITS[code][0]}); set"
            " xyzt_units to the unit that the affine is in (1 metre, 2 mm, 3 micron), or mend it")
    return columns


def _plain(lengths: np.ndarray) -> list[float]:
    return lengths.astype(float).round(6).tolist()


def doubts(header: Any, affine: np.ndarray, columns: np.ndarray, unit: float) -> Iterator[str]:
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
        yield (f"found spacing {_plain(columns)} in the sform and {_plain(pixdim)} in pixdim,"
               " expected the same; the sform counts here, pixdim in programs built on ITK")
    if header["qform_code"] > 0:
        corners = [*product(*((0, n - 1) for n in header.get_data_shape()[:3]), (1,))]
        try:
            gaps = np.linalg.norm(corners @ (qform(header) - affine)[:3].T, axis=1)
        except damage():  # it is no rotation
            gaps = np.array([np.inf])
        if not gaps.max() <= min(columns) / 2:
            yield (f"found an sform and a qform up to {gaps.max() * unit:g} mm apart, expected at"
                   " most half a voxel; the sform counts here, the qform may in programs built on"
                   " ITK")
