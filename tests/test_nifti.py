"""Files to anatomical axes and back: nibabel's own reorientation is the oracle."""

from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tinyseg.data import nifti

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ORIENTATIONS = ["".join(code) for axes in permutations(("LR", "PA", "IS"))
                for code in product(*axes)]
SHAPE, SPACING = (4, 5, 6), (0.75, 1.5, 2.5)


def oblique(codes, shape=SHAPE, spacing=SPACING):
    """An affine with these nearest axes, turned by a few degrees."""
    turn = nib.orientations.axcodes2ornt(codes)
    affine = np.zeros((4, 4))
    for column, ((row, sign), s) in enumerate(zip(turn.astype(int), spacing, strict=True)):
        affine[row, column] = sign * s
    affine[:, 3] = -11.5, 7.25, 101, 1
    a, b = 0.1, 0.07
    rotation = (np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
                @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]]))
    affine[:3, :3] = rotation @ affine[:3, :3]
    return affine


def save(path, array, affine=None, **fields):
    image = nib.Nifti1Image(array, np.diag((2.0, 3.0, 4.0, 1.0)) if affine is None else affine)
    for name, value in fields.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def patched(path, **fields):
    """Overwrite header fields in an uncompressed file, past nibabel's own checks."""
    content = bytearray(path.read_bytes())
    raw = np.frombuffer(content, nib.Nifti1Header.template_dtype, count=1)
    for name, value in fields.items():
        raw[name] = value
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_reads_as_the_oracle_and_returns_exactly(codes, tmp_path):
    values = np.random.default_rng(1).integers(0, 200, SHAPE).astype(np.uint8)
    source = save(tmp_path / "a.nii.gz", values, oblique(codes))
    volume = nifti.read(source, dtype="uint8")
    canonical = nib.as_closest_canonical(nib.load(source))
    np.testing.assert_array_equal(volume.array, np.asarray(canonical.dataobj).transpose(2, 1, 0))
    np.testing.assert_allclose(volume.spacing, canonical.header.get_zooms()[::-1], rtol=1e-6)

    nifti.write(tmp_path / "b.nii.gz", volume.array, volume)
    first, second = nib.load(source), nib.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(np.asarray(second.dataobj), values)
    np.testing.assert_array_equal(second.affine, first.affine)
    for field in ("sform_code", "qform_code", "xyzt_units", "pixdim"):
        np.testing.assert_array_equal(second.header[field], first.header[field])


def test_there_are_48_orientations():
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("codes", ["RAS", "PIL", "SRA"])
def test_channels_stay_last(codes, tmp_path):
    values = np.random.default_rng(0).normal(size=(*SHAPE, 3)).astype(np.float32)
    volume = nifti.read(save(tmp_path / "a.nii", values, oblique(codes)))
    for channel in range(3):
        alone = nifti.read(save(tmp_path / "c.nii", values[..., channel], oblique(codes)))
        np.testing.assert_array_equal(volume.array[..., channel], alone.array)
    nifti.write(tmp_path / "l.nii", np.zeros(volume.array.shape[:3], int), volume)
    assert nib.load(tmp_path / "l.nii").shape == SHAPE


def test_slope_and_intercept_are_honoured(tmp_path):
    stored = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    path = patched(save(tmp_path / "a.nii", stored), scl_slope=2, scl_inter=-1024)
    expected = (stored * 2.0 - 1024).transpose(2, 1, 0)
    np.testing.assert_array_equal(nifti.read(path).array, expected)
    np.testing.assert_array_equal(nifti.read(path, "int32").array, expected)
    volume = nifti.read(path)
    nifti.write(tmp_path / "b.nii", np.ones(volume.array.shape, np.int64), volume)
    np.testing.assert_array_equal(nifti.read(tmp_path / "b.nii").array, 1)


@pytest.mark.parametrize(("top", "dtype"), [(1, "u1"), (255, "u1"), (256, "u2"), (70000, "u4")])
def test_labels_take_the_smallest_unsigned_type(top, dtype, tmp_path):
    like = nifti.read(save(tmp_path / "a.nii", np.zeros((2, 3, 4), np.float32), cal_max=300))
    labels = np.zeros(like.array.shape, np.int64)
    labels[1, 2, 0] = top
    nifti.write(tmp_path / "b.nii.gz", labels, like)
    written = nib.load(tmp_path / "b.nii.gz")
    assert written.get_data_dtype() == np.dtype(dtype) and written.header["cal_max"] == 0
    np.testing.assert_array_equal(nifti.read(tmp_path / "b.nii.gz", "int64").array, labels)


def test_nifti2_stays_nifti2_and_units_become_millimetres(tmp_path):
    image = nib.Nifti2Image(np.zeros((2, 3, 4), np.int16), np.diag((0.002, 0.003, 0.004, 1)))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "a.nii")
    volume = nifti.read(tmp_path / "a.nii")
    np.testing.assert_allclose(volume.spacing, (4, 3, 2))
    nifti.write(tmp_path / "b.nii", volume.array.astype(int), volume)
    assert isinstance(nib.load(tmp_path / "b.nii"), nib.Nifti2Image)
    assert nib.load(tmp_path / "b.nii").header.get_xyzt_units()[0] == "meter"


def refuses(path, message, error=ValueError, dtype="float32"):
    with pytest.raises(error, match=message) as caught:
        nifti.read(path, dtype)
    assert str(path) in str(caught.value)


def test_wrong_files_are_refused_by_name(tmp_path):
    good = save(tmp_path / "good.nii", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    packed = save(tmp_path / "good.nii.gz", np.random.default_rng(0).random((9, 9, 9)))
    refuses(tmp_path / "none.nii", "no such file", FileNotFoundError)
    refuses(tmp_path, "no such file", FileNotFoundError)
    for name, content, message in (
        ("scan.dcm", good.read_bytes(), "ends in .nii"),
        ("empty.nii.gz", b"", "NIfTI"),
        ("junk.nii.gz", b"\x00\x05\x16\x07" + bytes(400), "NIfTI"),
        ("header.nii", good.read_bytes()[:200], "NIfTI"),
        ("short.nii", good.read_bytes()[:-1], "truncated"),
        ("short.nii.gz", packed.read_bytes()[:-100], "truncated"),
        ("flipped.nii.gz", packed.read_bytes()[:-8] + bytes(8), "damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        refuses(tmp_path / name, message)


def test_wrong_shapes_and_types_are_refused(tmp_path):
    refuses(save(tmp_path / "2.nii", np.zeros((3, 4))), r"shape \(3, 4\)")
    refuses(save(tmp_path / "5.nii", np.zeros((3, 4, 5, 1, 2))), "3 or 4 axes")
    refuses(save(tmp_path / "c.nii", np.zeros((3, 4, 5), np.complex64)), "complex64")
    path = save(tmp_path / "huge.nii", np.zeros((3, 4, 5), np.uint8))
    refuses(patched(path, dim=[3, 32000, 32000, 30, 1, 1, 1, 1]), "GiB")
    refuses(patched(path, dim=[3, 300, 400, 5, 1, 1, 1, 1]), "truncated")
    refuses(patched(path, dim=[3, 3, 0, 5, 1, 1, 1, 1]), "shape|NIfTI")


@pytest.mark.parametrize("row", [(0, 0, 0, 0), (np.nan, 0, 0, 0), (np.inf, 0, 0, 0), (0, 3, 0, 0)])
def test_impossible_affines_are_refused(row, tmp_path):
    path = save(tmp_path / "a.nii", np.zeros((3, 4, 5), np.uint8))
    refuses(patched(path, srow_x=row), "affine")


@pytest.mark.parametrize("size", [0.0, np.nan, -1.0])
def test_spacing_is_never_defaulted(size, tmp_path):
    path = save(tmp_path / "a.nii", np.zeros((3, 4, 5), np.uint8))
    patched(path, sform_code=0, qform_code=0)
    assert nifti.read(path).spacing == (4, 3, 2)  # pixdim is a real source
    refuses(patched(path, pixdim=[1, 2, size, 4, 0, 0, 0, 0]), "spacing|NIfTI")


def test_integers_are_whole_or_refused(tmp_path):
    values = np.full((2, 3, 4), 1.0004, np.float32)
    assert (nifti.read(save(tmp_path / "a.nii", values), "uint8").array == 1).all()
    for wrong in (1.4, np.nan, np.inf, -1, 256):
        values[1, 1, 1] = wrong
        refuses(save(tmp_path / "b.nii", values), "whole numbers|expected uint8", dtype="uint8")


def test_wrong_label_maps_are_refused_and_leave_nothing(tmp_path, monkeypatch):
    like = nifti.read(save(tmp_path / "a.nii", np.zeros((2, 3, 4), np.int16)))
    target = tmp_path / "out.nii.gz"
    for array, message in ((np.zeros((2, 3, 4), int), r"\(2, 3, 4\).*expected \(4, 3, 2\)"),
                           (np.zeros((4, 3, 2)), "float64"),
                           (np.full((4, 3, 2), -1), "from -1")):
        with pytest.raises(ValueError, match=message) as caught:
            nifti.write(target, array, like)
        assert str(target) in str(caught.value)
    with pytest.raises(ValueError, match=".nii"):
        nifti.write(tmp_path / "out.png", np.zeros((4, 3, 2), int), like)

    target.write_bytes(b"before")
    monkeypatch.setattr(nib, "save", lambda image, path: path.write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        nifti.write(target, np.zeros((4, 3, 2), int), like)
    assert target.read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii", "out.nii.gz"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the example CT is not on this machine")
def test_an_abdominal_ct():
    folder = SHARED / "ct_totalsegmentator_example"
    ct = nifti.read(folder / "ts_example_ct.nii.gz")
    organs = nifti.read(folder / "ts_example_organs15.nii.gz", "uint8")
    assert ct.array.shape == organs.array.shape == (112, 101, 122)
    assert ct.spacing == (3, 3, 3) and -1300 < ct.array.min() < -1000
    assert np.sum(organs.array == 8) == 818
    assert -50 < np.median(ct.array[organs.array == 8]) < 150  # soft tissue, not air or bone
