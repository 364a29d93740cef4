"""Files to anatomical axes and back: nibabel's own reorientation is the oracle."""

import gzip
import re
import tracemalloc
import warnings
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    refuses(save(tmp_path / "5.nii", np.zeros((3, 4, 5, 6, 2))), "3 or 4 axes.*one point in time")
    refuses(save(tmp_path / "c.nii", np.zeros((3, 4, 5), np.complex64)), "complex64")
    path = save(tmp_path / "huge.nii", np.zeros((3, 4, 5), np.uint8))
    refuses(patched(path, dim=[3, 32000, 32000, 30, 1, 1, 1, 1]), "GiB")
    refuses(patched(path, dim=[3, 300, 400, 5, 1, 1, 1, 1]), "truncated")
    refuses(patched(path, dim=[3, 3, 0, 5, 1, 1, 1, 1]), "shape|NIfTI")


@pytest.mark.parametrize(("fields", "message"), [
    ({"dim": [4, 30000, 30000, 30000, 30000, 1, 1, 1]}, "GiB"),
    ({"dim": [3, -3, 4, 5, 1, 1, 1, 1]}, r"shape \(-3, 4, 5\)"),
    ({"dim": [-4, 3, 4, 5, 1, 1, 1, 1]}, "3 or 4 axes"),
    ({"dim": [99, 3, 4, 5, 1, 1, 1, 1]}, "3 or 4 axes"),
    ({"vox_offset": 0}, "begin at byte 0, expected 352"),  # the header would be read as voxels
    ({"vox_offset": -352}, "begin at byte -352"),
    ({"vox_offset": 3e38}, "begin at byte 3e[+]38"),
    ({"vox_offset": np.inf}, "begin at byte inf"),
    ({"vox_offset": np.nan}, "begin at byte nan"),
    ({"magic": b"ni1"}, "pair"),
    ({"magic": b"n+3"}, "magic"),
    ({"xyzt_units": 5}, "unit 5"),
    ({"datatype": 75}, "type code 75"),
    ({"scl_slope": 1, "scl_inter": np.inf}, "intercept"),
    ({"sform_code": 0, "qform_code": 1, "quatern_b": 1, "quatern_c": 1}, "NIfTI"),
    ({"sform_code": 0, "qform_code": 1, "qoffset_x": np.nan}, "affine"),
    ({"srow_x": [1e38, 0, 0, 0]}, "spacing of"),
    ({"srow_x": [1e-38, 0, 0, 0]}, "spacing of"),
])
def test_hostile_headers_are_refused_in_little_memory(fields, message, tmp_path):
    path = save(tmp_path / "a.nii", np.full((2, 3, 4), 9, np.int16))
    assert peak(refuses, patched(path, **fields), message) < 2**20


def peak(function, *arguments):
    """The most memory, in bytes, that Python and NumPy held for a call."""
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_with_what_a_file_holds_not_with_what_it_claims(tmp_path):
    """A megabyte of noise could unpack to a gigabyte, so its header may claim one; it is not had.

    Nor are extensions read, which may claim two gigabytes or be there, packed a thousandfold.
    """
    noise = np.random.default_rng(0).integers(0, 256, 1_200_000, np.uint8)
    plain = save(tmp_path / "a.nii", noise.reshape(100, 100, 120))
    packed = tmp_path / "a.nii.gz"
    packed.write_bytes(gzip.compress(patched(plain, dim=[3, 1000, 1000, 1000, 1, 1, 1, 1])
                                     .read_bytes()))
    assert peak(refuses, packed, "found 1200000 of 1000000000 bytes") < 16 * 2**20

    for size in (2**31 - 16, 48 * 2**20):  # of an extension: claimed in vain, and truly there
        content = bytearray(save(plain, np.full((2, 3, 4), 7, np.uint8)).read_bytes())
        raw = np.frombuffer(content, nib.Nifti1Header.template_dtype, count=1)
        raw["vox_offset"] = 352 + size
        extension = np.array([1, size, 6], "<i4").tobytes() + bytes(min(size, 2**26) - 8)
        packed.write_bytes(gzip.compress(content[:348] + extension + content[352:], 1))
        if size < 2**26:
            assert peak(nifti.read, packed) < 16 * 2**20
            assert (nifti.read(packed).array == 7).all()
        else:
            assert peak(refuses, packed, "begin at byte 2.147") < 2**20

    content = save(plain, np.full((2, 3, 4), 7, np.uint8)).read_bytes()
    packed.write_bytes(gzip.compress(content + bytes(65 * 2**20), 1))
    refuses(packed, "over 64 MiB after the voxels")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Small files of both kinds of NIfTI, and the places of the header fields that matter."""
    folder, made = tmp_path_factory.mktemp("sources"), []
    for kind, form in product((nib.Nifti1Image, nib.Nifti2Image), ("sform", "qform", "pixdim")):
        image = kind(np.arange(60, dtype=np.int16).reshape(3, 4, 5), None)
        image.set_sform(oblique("RAS"), int(form == "sform"))
        image.set_qform(oblique("RAS"), int(form == "qform"))
        image.header.set_slope_inter(2, 1)
        nib.save(image, folder / "a.nii")
        fields = kind.header_class.template_dtype.fields
        made.append(((folder / "a.nii").read_bytes(), [
            (fields[name][1], fields[name][0].itemsize) for name in (
                "dim", "pixdim", "vox_offset", "datatype", "scl_slope", "scl_inter", "xyzt_units",
                "qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_y")]))
    return folder, made


STRANGE = [b"\xff" * 8, bytes(8), b"\x7f" * 8, np.float32([np.nan] * 2).tobytes(),
           np.float32([-np.inf] * 2).tobytes(), np.float64(1e300).tobytes(),
           np.int64(2**62).tobytes(), np.int16([-5] * 4).tobytes(), b"\x00\x80" * 4]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_header_is_read_or_refused_by_name(sources, data):
    folder, made = sources
    content, places = data.draw(st.sampled_from(made))
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        start, length = data.draw(st.sampled_from(places))
        at = start + data.draw(st.integers(0, length - 1)) // 2 * 2
        piece = data.draw(st.sampled_from(STRANGE) | st.binary(min_size=1, max_size=4))
        content[at : at + len(piece)] = piece
    packed = data.draw(st.booleans())
    path = folder / f"strange.nii{'.gz' * packed}"
    path.write_bytes(gzip.compress(content) if packed else content)

    def attempt():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                volume = nifti.read(path, data.draw(st.sampled_from(["float32", "uint8"])))
            except ValueError as refused:
                assert str(refused).startswith(f"{path}: ")
            else:
                assert np.isfinite(volume.array).all() and 0 < min(volume.spacing)
                assert sorted(volume.array.shape[:3]) == sorted(volume.original_shape[:3])
    assert peak(attempt) < 8 * 2**20


@pytest.mark.parametrize("row", [(0, 0, 0, 0), (np.nan, 0, 0, 0), (np.inf, 0, 0, 0), (0, 3, 0, 0)])
def test_impossible_affines_are_refused(row, tmp_path):
    path = save(tmp_path / "a.nii", np.zeros((3, 4, 5), np.uint8))
    refuses(patched(path, srow_x=row), "affine")


@pytest.mark.parametrize("size", [0.0, np.nan, -1.0])
def test_spacing_is_never_defaulted(size, tmp_path):
    path = save(tmp_path / "a.nii", np.zeros((3, 4, 5), np.uint8))
    patched(path, sform_code=0, qform_code=0)
    with pytest.warns(UserWarning, match="neither sform nor qform.*left"):
        assert nifti.read(path).spacing == (4, 3, 2)  # pixdim is a real source
    refuses(patched(path, pixdim=[1, 2, size, 4, 0, 0, 0, 0]), "spacing|NIfTI")


def test_the_sform_comes_first_then_the_qform_then_pixdim(tmp_path):
    """By code above 0, also codes that are not invented yet; pixdim[0] = 0 means 1."""
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), None)
    image.set_sform(np.diag((2.0, 3.0, 4.0, 1.0)))
    image.set_qform(oblique("RAI"))  # left-handed: pixdim[0] is -1
    nib.save(image, tmp_path / "a.nii")
    sform, qform = image.get_sform(), image.get_qform()
    pixdim = nib.Nifti1Header.from_header(image.header).get_base_affine()
    for s, q, expected in ((1, 1, sform), (4, 0, sform), (9, 1, sform), (0, 2, qform),
                           (-1, 1, qform), (0, 9, qform), (0, 0, pixdim), (-1, -1, pixdim)):
        path = patched(tmp_path / "a.nii", sform_code=s, qform_code=q)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            np.testing.assert_array_equal(nifti.read(path).affine, expected)
    turned = image.header["pixdim"].copy()
    turned[0] = 0
    volume = nifti.read(patched(path, sform_code=0, qform_code=1, pixdim=turned))
    np.testing.assert_array_equal(volume.affine, qform * (1, 1, -1, 1))


@pytest.mark.parametrize(("skew", "angle"), [(0, None), (9e-5, None), (1.2e-4, "89.993"),
                                             (0.1, "84.289"), (-0.1, "95.711")])
def test_axes_that_are_not_at_right_angles_are_read_with_a_warning(skew, angle, tmp_path):
    sheared = np.diag((2.0, 3.0, 4.0, 1.0))
    sheared[:2, 1] = 3 * skew, 3 * np.sqrt(1 - skew**2) if abs(skew) < 0.05 else 3
    path = save(tmp_path / "a.nii", np.arange(60.0).reshape(3, 4, 5), sheared)
    if angle is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            nifti.read(path)
    else:
        with pytest.warns(UserWarning, match=f"axes 0 and 1 at {angle} degrees, expected 90"):
            volume = nifti.read(path)
        np.testing.assert_allclose(volume.spacing, (4, 3 * max(1, np.hypot(1, skew)), 2), rtol=1e-4)
        nifti.write(tmp_path / "b.nii", np.ones(volume.array.shape, int), volume)
        np.testing.assert_array_equal(nib.load(tmp_path / "b.nii").affine, nib.load(path).affine)


def test_an_sform_and_pixdim_that_disagree_are_told(tmp_path):
    path = patched(save(tmp_path / "a.nii", np.zeros((3, 4, 5), np.uint8)),
                   pixdim=[1, 2, 3, 5, 0, 0, 0, 0])
    with pytest.warns(UserWarning, match=r"4.0\] in the sform and \[2.0, 3.0, 5.0\] in pixdim"):
        assert nifti.read(path).spacing == (4, 3, 2)


@pytest.mark.parametrize(("shift", "told"), [(0, None), (0.9, None), (1.1, "1.1 mm apart")])
def test_an_sform_and_a_qform_that_disagree_are_told(shift, told, tmp_path):
    """From half a voxel on, at any corner: what rounds a quaternion is less."""
    affine = oblique("PIR", spacing=(2, 3, 4))
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), affine)
    affine[1, 3] += shift
    image.set_qform(affine, 1)
    nib.save(image, tmp_path / "a.nii")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(nifti.read(tmp_path / "a.nii").affine, image.get_sform())
        patched(tmp_path / "a.nii", quatern_b=1, quatern_c=1)  # no rotation at all
        np.testing.assert_array_equal(nifti.read(tmp_path / "a.nii").affine, image.get_sform())
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (2 if told else 1) and "inf mm apart" in messages[-1]
    assert all(warning.filename == __file__ for warning in caught)
    assert told is None or told in messages[0] and str(tmp_path / "a.nii") in messages[0]


@pytest.mark.parametrize(("other", "fits"), [
    (np.diag((2.0, 3.0, 4.0, 1.0)), True), (np.diag((2.0, 3.0, 4.0009, 1.0)), True),
    (np.diag((2.0, 3.0, 4.5, 1.0)), False), (np.diag((-2.0, 3.0, 4.0, 1.0)), False)])
@pytest.mark.parametrize(("unit", "length"), [("mm", 1), ("meter", 1e-3), ("micron", 1e3)])
def test_one_grid_is_told_from_two_in_millimetres(other, fits, unit, length, tmp_path):
    volumes = []
    for name, affine in (("a.nii", np.diag((2.0, 3.0, 4.0, 1.0))), ("b.nii", other)):
        image = nib.Nifti2Image(np.zeros((3, 4, 5), np.uint8), affine * ([[length]] * 3 + [[1]]))
        image.header.set_xyzt_units(unit)
        nib.save(image, tmp_path / name)
        volumes.append(nifti.read(tmp_path / name))
    plain = nifti.read(save(tmp_path / "c.nii", np.zeros((3, 4, 5, 2), np.uint8)))
    plain.expect_grid_of(volumes[0])  # the same place, said in another unit, with channels
    if fits:
        volumes[1].expect_grid_of(volumes[0])
    else:
        distance = {4: "4", 4.5: "2.25"}[other[2, 2]]  # mirrored: 2 voxels of 2 mm; 4.5 of 0.5 mm
        with pytest.raises(ValueError, match=f"b.nii: found corners .* {distance} mm .*a.nii"):
            volumes[1].expect_grid_of(volumes[0])
    with pytest.raises(ValueError, match=r"shape \(3, 4, 6\), expected \(3, 4, 5\)"):
        nifti.read(save(tmp_path / "d.nii", np.zeros((3, 4, 6)))).expect_grid_of(plain)


def corner_distance(first, second, shape):
    """The farthest that any corner of two files' volumes lies apart, in mm."""
    ends = [(-0.5, n - 0.5) for n in shape]
    return max(np.linalg.norm((first - second) @ (*corner, 1)) for corner in product(*ends))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SRA"])
@pytest.mark.parametrize("share", [0, 0.04, 0.06, 0.49, 0.51, 30])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_grids_agree_by_a_share_of_a_voxel_at_the_corners(codes, share, axis, tmp_path):
    """Silently under a twentieth, with a warning under a half, else not; scaled or moved."""
    affine, shape = oblique(codes), (8, 9, 10)
    moved, scaled = affine.copy(), affine.copy()
    moved[:, 3] += share * affine[:, axis]
    scaled[:, axis] *= 1 + share / (shape[axis] - 0.5)  # the far corner is that far from voxel 0
    one = nifti.read(save(tmp_path / "one.nii", np.zeros(shape, np.uint8), affine))
    for other in (moved, scaled):
        two = nifti.read(save(tmp_path / "two.nii", np.zeros(shape, np.uint8), other))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if share < 0.5:
                two.expect_grid_of(one)
                told = "".join(str(warning.message) for warning in caught)
                assert bool(told) == (share > 0.05)
            else:
                with pytest.raises(ValueError, match="different grids: resample") as refused:
                    two.expect_grid_of(one)
                told = str(refused.value)
        if told:
            found = re.search(r"two.nii: found corners of the volume (\S+) mm", told)
            assert float(found[1]) == pytest.approx(corner_distance(affine, other, shape), rel=0.01)
            assert str(tmp_path / "one.nii") in told


def test_a_small_turn_is_measured_where_it_moves_voxels_most(tmp_path):
    """By 0.07 degrees: nothing on a small grid, over half a voxel at the end of a long one."""
    turn = np.array([[np.cos(1.2e-3), -np.sin(1.2e-3)], [np.sin(1.2e-3), np.cos(1.2e-3)]])
    for length, fits in ((40, True), (600, False)):
        plain, turned = np.diag((1.0, 1, 1, 1)), np.diag((1.0, 1, 1, 1))
        turned[:2, :2] = turn
        one, two = (nifti.read(save(tmp_path / f"{name}.nii", np.zeros((length, 3, 2), "u1"), a))
                    for name, a in (("one", plain), ("two", turned)))
        if fits:
            one.expect_grid_of(two)
        else:
            with pytest.raises(ValueError, match=r"0.719 mm \(0.72 voxels\)"):
                one.expect_grid_of(two)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_one_grid_in_any_order_of_axes_is_one(codes, tmp_path):
    """The same voxels turned: arrays are equal, so are their grids, and no position is lost."""
    values = np.random.default_rng(0).integers(0, 200, SHAPE).astype(np.uint8)
    first = nib.Nifti1Image(values, oblique("RAS"))
    there = nib.orientations.axcodes2ornt(codes)
    second = first.as_reoriented(nib.orientations.ornt_transform(
        nib.io_orientation(first.affine), there))
    volumes = []
    for name, image in (("a.nii", first), ("b.nii", second)):
        nib.save(image, tmp_path / name)
        volumes.append(nifti.read(tmp_path / name, "uint8"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        volumes[0].expect_grid_of(volumes[1])
    np.testing.assert_array_equal(volumes[0].array, volumes[1].array)
    for volume in volumes:
        voxel = np.argwhere(volume.array == volume.array.max())[0]
        stored = np.argwhere(np.asarray(nib.load(volume.path).dataobj) == volume.array.max())
        places = [volume.affine @ (*index, 1) for index in stored]
        assert any(np.allclose(volume.grid() @ (*voxel, 1), place, atol=1e-4) for place in places)


FIELDS = r"shape \(20, 40, 50\), spacing \[.*\] in the affine, pixdim \[.*\], xyzt_units "


@pytest.mark.parametrize(("scale", "code", "told"), [
    (1, 2, None), (1e-3, 1, None), (1e3, 3, None), (1, 0, None),
    (1, 3, f"0.1 x 0.152 x 0.04 mm, .*{FIELDS}3: micron"),
    (1e-3, 2, f"0.1 x 0.152 x 0.04 mm, .*{FIELDS}2: mm"),
    (1e-3, 0, f"0.1 x 0.152 x 0.04 mm, .*{FIELDS}0: unknown"),
    (1, 1, rf"1e\+05 x 1.52e\+05 x 4e\+04 mm, .*{FIELDS}1: metre"),
    (120, 2, f"{FIELDS}2: mm"),
])
def test_an_extent_that_no_body_has_is_refused_with_the_headers_fields(scale, code, told, tmp_path):
    affine = np.diag((5 * scale, 3.8 * scale, 0.8 * scale, 1))
    path = save(tmp_path / "a.nii", np.zeros((20, 40, 50), np.uint8), affine)
    patched(path, xyzt_units=code)
    if told is None:
        np.testing.assert_allclose(nifti.read(path).spacing, (0.8, 3.8, 5), rtol=1e-6)
    else:
        refuses(path, told)
        refuses(path, "set xyzt_units to the unit that the affine is in")


def test_a_thin_slice_alone_is_a_scan(tmp_path):
    thin = save(tmp_path / "a.nii", np.zeros((200, 300, 1), np.uint8), np.diag((0.7, 0.7, 0.5, 1)))
    assert nifti.read(thin).array.shape == (1, 300, 200)
    line = save(tmp_path / "b.nii", np.zeros((1, 300, 1), np.uint8), np.diag((0.7, 0.7, 0.5, 1)))
    refuses(line, "expected a body's")


@pytest.mark.parametrize("named", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_content_tells_whether_a_file_is_packed(named, packed, tmp_path):
    values = np.random.default_rng(0).integers(0, 99, (3, 4, 5)).astype(np.int16)
    content = save(tmp_path / "plain.nii", values).read_bytes()
    path = tmp_path / named
    path.write_bytes(gzip.compress(content) if packed else content)
    np.testing.assert_array_equal(nifti.read(path).array, values.T)
    path.write_bytes(content[:-1])
    refuses(path, "truncated")


def test_channels_behind_one_point_in_time_are_channels(tmp_path):
    """As ITK writes vectors: (x, y, z, t, C)."""
    values = np.random.default_rng(0).normal(size=(3, 4, 5, 1, 2)).astype(np.float32)
    volume = nifti.read(save(tmp_path / "five.nii.gz", values, oblique("PIL")))
    plain = nifti.read(save(tmp_path / "four.nii.gz", values[:, :, :, 0], oblique("PIL")))
    np.testing.assert_array_equal(volume.array, plain.array)
    assert volume.array.shape[3:] == (2,)
    nifti.write(tmp_path / "labels.nii", np.ones(volume.array.shape[:3], int), volume)
    assert nib.load(tmp_path / "labels.nii").shape == (3, 4, 5)
    nifti.read(tmp_path / "labels.nii").expect_grid_of(plain)


@pytest.mark.parametrize(("content", "told"), [
    (b"", "empty; fetch"), (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    (b"<!DOCTYPE html><html>", "web page")])
def test_what_is_no_scan_is_told_as_what_it_is(content, told, tmp_path):
    for name in ("a.nii", "a.nii.gz"):
        (tmp_path / name).write_bytes(content)
        refuses(tmp_path / name, told)


def test_a_folder_of_a_files_name_is_told(tmp_path):
    """As some archives unpack: case.nii/case.nii."""
    (tmp_path / "case.nii").mkdir()
    refuses(tmp_path / "case.nii", "it is a folder", FileNotFoundError)
    inside = save(tmp_path / "case.nii/case.nii", np.zeros((2, 3, 4)))
    refuses(tmp_path / "case.nii", f"it is a folder.*such as {inside}", FileNotFoundError)


def test_what_is_not_finite_is_refused(tmp_path):
    for wrong in (np.nan, np.inf):
        values = np.zeros((2, 3, 4), np.float32)
        values[1, 2, 3] = wrong
        refuses(save(tmp_path / "a.nii", values), "found 1 voxels that are NaN or infinite")
    values[1, 2, 3] = 1e5
    refuses(save(tmp_path / "a.nii", values), "infinite as float16", dtype="float16")
    refuses(patched(tmp_path / "a.nii", scl_slope=3e38), "found 1 voxels .* infinite as float32")


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
    monkeypatch.setattr(nib.Nifti1Header, "write_to", lambda self, file: file.write(b"half") / 0)
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
