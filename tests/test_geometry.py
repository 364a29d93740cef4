"""Where a voxel is, from any file to the network's grid and back; ITK gives a second opinion.

The tests with SimpleITK run where it is installed: it reads NIfTI by code that shares nothing with
ours, has its own reorientation and its own resampling, and is what 3D Slicer and ITK-SNAP show.
"""

import warnings
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from tinyseg.data import ct, nifti

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CT = SHARED / "ct_totalsegmentator_example" / "ts_example_ct.nii.gz"
real = pytest.mark.skipif(not CT.is_file(), reason="the example CT is not on this machine")
ORDERS = list(product(permutations(range(3)), product((1, -1), repeat=3)))  # all 48
FORMS = ["sform", "qform", "both", "torn", "pixdim"]  # torn: a qform that must lose
UNITS = {"unknown": 1.0, "mm": 1.0, "meter": 1e3, "micron": 1e-3}  # millimetres
OURS = {"dim", "datatype", "bitpix", "vox_offset", "scl_slope", "scl_inter", "cal_min", "cal_max",
        "intent_code", "intent_p1", "intent_p2", "intent_p3", "intent_name"}  # of a label map


@pytest.fixture
def sitk():
    return pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("geometry")


def rotation(axis, angle):
    """About an axis by an angle (Rodrigues)."""
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def oblique(order, signs, spacing, axis=(3, -2, 5), angle=0.3, origin=(-91.5, 47.25, 101)):
    """An affine (4, 4) in mm whose voxel axes lie near +-R, A, S in this order, then turned."""
    affine = np.eye(4)
    near = np.zeros((3, 3))
    near[list(order), range(3)] = signs
    affine[:3, :3] = rotation(axis, angle) @ near * spacing
    affine[:3, 3] = origin
    return affine


@st.composite
def affines(draw, steepest):
    number = st.floats(-1, 1, width=32)
    axis = draw(st.tuples(number, number, number).filter(lambda v: np.linalg.norm(v) > 0.1))
    return oblique(*draw(st.sampled_from(ORDERS)), draw(st.tuples(*[st.floats(0.3, 5)] * 3)),
                   axis, draw(st.floats(0, steepest)), draw(st.tuples(*[st.floats(-150, 150)] * 3)))


def store(path, values, affine, form="sform", unit="mm", kind=nib.Nifti1Image, endian="<"):
    """A file that states the affine (mm) in one of the FORMS."""
    image = kind(values, None, kind.header_class(endianness=endian))
    image.set_data_dtype(values.dtype)
    affine = affine.copy()
    affine[:3] /= UNITS[unit]
    image.header.set_zooms(tuple(nib.affines.voxel_sizes(affine)) + (1,) * (values.ndim - 3))
    if form in ("qform", "both", "torn"):
        image.set_qform(affine * ([[1], [1], [-1], [1]] if form == "torn" else 1), 1)
    codes = {"sform": 2, "both": 1, "torn": 4}
    image.set_sform(affine if form in codes else None, codes.get(form, 0))
    image.header.set_xyzt_units(unit, "sec")
    image.header["descrip"], image.header["cal_max"], image.header["intent_code"] = b"a", 300, 3
    nib.save(image, path)


def untouched(path):
    """The header, unrepaired, without the fields that tell how a label map is stored."""
    with nib.openers.ImageOpener(str(path)) as file:
        start = file.read(540)
    kind = nib.Nifti1Header if start[344:347] == b"n+1" else nib.Nifti2Header
    header = kind(start[: kind.sizeof_hdr], check=False)
    return {"kind": kind, "endian": header.endianness, "shape": tuple(header["dim"][1:4])} | {
        name: header[name].tobytes() for name in header.keys() if name not in OURS}


def answer(codes):
    """The prediction in these tests: any function of the voxels' values will do."""
    return np.rint(codes).astype(np.int64) * 7 // 3 % 5


@settings(max_examples=150, deadline=None)
@given(affine=affines(np.pi), form=st.sampled_from(FORMS), unit=st.sampled_from(sorted(UNITS)),
       kind=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]), endian=st.sampled_from("<>"),
       shape=st.permutations((3, 5, 7)), channels=st.sampled_from([None, 1, 2]),
       dtype=st.sampled_from(["u1", "i2", "f4"]), scaling=st.sampled_from([None, (0.5, -30)]),
       suffixes=st.tuples(*[st.sampled_from([".nii", ".nii.gz"])] * 2))
@pytest.mark.filterwarnings("ignore:.*neither sform nor qform", "ignore:.*sform and a qform")
def test_any_file_and_back(folder, affine, form, unit, kind, endian, shape, channels, dtype,
                           scaling, suffixes):
    """Voxel for voxel, the affine bit for bit, the header but for what says how labels are kept."""
    codes = np.arange(np.prod(shape)).reshape(shape)
    values = codes if channels is None else np.stack([codes + c for c in range(channels)], -1)
    values = values.astype(np.dtype(dtype).newbyteorder(endian))
    source, target = (folder / f"{name}{suffix}" for name, suffix
                      in zip(("scan", "labels"), suffixes, strict=True))
    try:
        store(source, values, affine, form, unit, kind, endian)
        nib.load(source)
    except ValueError:  # nibabel refuses some half turns of its own; another test has them
        reject()
    if scaling:  # past nibabel, which would store other numbers
        with nib.openers.ImageOpener(str(source)) as file:
            content = file.read()
        header = kind.header_class(content[: kind.header_class.sizeof_hdr])
        header["scl_slope"], header["scl_inter"] = scaling
        with nib.openers.ImageOpener(str(source), "wb") as file:
            file.write(header.binaryblock + content[kind.header_class.sizeof_hdr :])

    volume, image = nifti.read(source), nib.load(source)
    slope, inter = scaling or (1, 0)
    stored = (volume.array - inter) / slope
    inside = stored if channels is None else stored[..., 0]
    canonical = np.asarray(nib.as_closest_canonical(image).dataobj)
    np.testing.assert_array_equal(volume.array, canonical.swapaxes(0, 2).astype(np.float32))
    assert volume.affine.tobytes() == image.affine.tobytes()
    if form not in ("qform", "pixdim"):
        np.testing.assert_allclose(volume.affine[:3] * UNITS[unit], affine[:3], atol=1e-4)

    corner, steps = (0, 0, 0), np.eye(3, dtype=int)
    place = {voxel: volume.affine @ (*np.argwhere(codes == inside[voxel])[0], 1)
             for voxel in (corner, *map(tuple, steps))}
    for axis, (step, spacing) in enumerate(zip(steps, volume.spacing, strict=True)):
        moved = (place[tuple(step)] - place[corner])[:3] * UNITS[unit]
        assert np.linalg.norm(moved) == pytest.approx(spacing, rel=1e-6)
        assert moved[2 - axis] > 0  # D goes up, H to the front, W to the right

    nifti.write(target, answer(inside), volume)
    written = nib.load(target)
    np.testing.assert_array_equal(np.asarray(written.dataobj), answer(codes))
    assert written.affine.tobytes() == image.affine.tobytes()
    assert untouched(target) == untouched(source)
    assert written.get_data_dtype() == np.uint8 and written.header["intent_code"] == 0
    again = nifti.read(target, "uint8")
    again.expect_grid_of(volume)
    np.testing.assert_array_equal(again.array, answer(inside))
    assert again.spacing == volume.spacing


@pytest.mark.parametrize("change", [{"pixdim": 0}, {"sform_code": 9}, {"qform_code": -3}])
def test_even_odd_headers_come_back_as_they_were(change, tmp_path):
    affine = oblique(*ORDERS[20], (1, 2, 3))
    store(tmp_path / "a.nii", np.zeros((3, 5, 7), np.int16), affine, "both")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    raw = np.frombuffer(content, nib.Nifti1Header.template_dtype, count=1)
    for name, value in change.items():
        raw[name][..., :1] = value
    (tmp_path / "a.nii").write_bytes(content)
    volume = nifti.read(tmp_path / "a.nii")
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    nifti.write(tmp_path / "b.nii", np.full(volume.array.shape, 300), volume)
    assert untouched(tmp_path / "b.nii") == untouched(tmp_path / "a.nii")
    np.testing.assert_array_equal(nifti.read(tmp_path / "b.nii").affine, volume.affine)
    assert nib.load(tmp_path / "b.nii").get_data_dtype() == np.uint16


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_half_turns_are_read_though_rounding_makes_them_too_long(kind, tmp_path):
    """Where a quaternion's real part is zero, the other three may exceed 1; no harm is done."""
    header, path = kind.header_class(), tmp_path / "a.nii"
    precision = np.finfo(header["quatern_b"].dtype).eps
    for number in range(50):
        rng = np.random.default_rng(number)
        axis = rng.normal(size=3)
        less, affine = (oblique((0, 1, 2), (1, 1, 1), (1, 2, 3), axis, turn) for turn in (1, np.pi))
        store(path, np.zeros((3, 5, 7), np.uint8), less, "qform", kind=kind)
        content = path.read_bytes()
        raw = kind.header_class(content[: header.sizeof_hdr], check=False)
        for part, value in zip("bcd", axis / np.linalg.norm(axis), strict=True):
            raw[f"quatern_{part}"] = value * (1 + rng.uniform(0, 20) * precision)
        path.write_bytes(raw.binaryblock + content[header.sizeof_hdr :])
        np.testing.assert_allclose(nifti.read(path).affine, affine, atol=1e-5)


def itk_grid(image):
    """What ITK says of where an image lies."""
    return image.GetSize(), image.GetOrigin(), image.GetSpacing(), image.GetDirection()


def points(sitk, size, origin, spacing, direction):
    """ITK's position (x, y, z in LPS, mm) of every voxel, (*size[::-1], 3)."""
    source = sitk.PhysicalPointSource(sitk.sitkVectorFloat64, size, origin, spacing, direction)
    return sitk.GetArrayFromImage(source)


@pytest.mark.parametrize("unit", ["mm", "meter", "micron"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:.*neither sform nor qform", "ignore:.*sform and a qform")
def test_itk_finds_the_prediction_where_it_finds_the_scan(form, unit, sitk, tmp_path):
    """In every orientation; and where the file says so itself, both where our affine says."""
    codes = np.arange(105, dtype=np.int16).reshape(3, 5, 7)
    index = np.stack([*np.indices(codes.shape), np.ones(codes.shape)])
    source, target = str(tmp_path / "scan.nii"), str(tmp_path / "labels.nii.gz")
    for order, signs in ORDERS:
        store(source, codes, oblique(order, signs, (0.7, 1.3, 4.0)), form, unit)
        volume = nifti.read(source)
        nifti.write(target, answer(volume.array), volume)
        scan, labels = sitk.ReadImage(source), sitk.ReadImage(target)
        assert itk_grid(labels) == itk_grid(scan)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(labels).T, answer(codes))
        assert labels.GetPixelID() == sitk.sitkUInt8
        if form not in ("pixdim", "torn"):  # where ITK and nibabel, whom we follow, disagree
            ours = np.tensordot(volume.affine[:3], index, 1)
            theirs = points(sitk, *itk_grid(scan)).T * np.reshape([-1, -1, 1], (3, 1, 1, 1))
            np.testing.assert_allclose(ours * UNITS[unit], theirs, rtol=0, atol=1e-4)


def test_itk_orients_as_we_do(sitk, tmp_path):
    codes = np.arange(105, dtype=np.int16).reshape(3, 5, 7)
    for order, signs in ORDERS:
        store(tmp_path / "a.nii", codes, oblique(order, signs, (0.7, 1.3, 4.0)))
        volume = nifti.read(tmp_path / "a.nii", "int16")
        turned = sitk.DICOMOrient(sitk.ReadImage(str(tmp_path / "a.nii")), "RAS")
        np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(turned))
        np.testing.assert_allclose(volume.spacing, turned.GetSpacing()[::-1], rtol=1e-6)


def centred(image, shape):
    """ITK's grid of an image resampled to (D, H, W) by the rule that corners stay in place."""
    size, origin, spacing, direction = itk_grid(image)
    new = [n * s / m for n, s, m in zip(size, spacing, shape[::-1], strict=True)]
    shift = np.reshape(direction, (3, 3)) @ (np.subtract(new, spacing) / 2)
    return shape[::-1], tuple(np.add(origin, shift).tolist()), new, direction


def interior(source, target, margin):
    """The voxels of a resampled grid that look at least `margin` voxels into the source."""
    return tuple(slice(*np.flatnonzero((x >= margin) & (x <= n - 1 - margin))[[0, -1]] + [0, 1])
                 for n, m in zip(source, target, strict=True)
                 for x in [(np.arange(m) + 0.5) * n / m - 0.5])


@settings(max_examples=25, deadline=None)
@given(affine=affines(0.5), shape=st.tuples(*[st.integers(30, 36)] * 3),
       target=st.tuples(*[st.integers(12, 48)] * 3))
def test_resampled_voxels_lie_where_itk_says(folder, affine, shape, target):
    """Three channels hold ITK's own position of each voxel; resampled, they are those of the grid.

    Linear interpolation is exact between the outermost centres, a spline ten voxels farther in
    (the border's influence falls off by 0.27 a voxel), the nearest voxel to half a voxel. From the
    volume's centre, because float32 keeps seven digits, not millimetres.
    """
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    path = folder / "positions.nii"
    store(path, np.zeros(shape, np.uint8), affine)
    image = sitk.ReadImage(str(path))
    positions = points(sitk, *itk_grid(image)).transpose(2, 1, 0, 3)
    centre = positions.mean((0, 1, 2))
    store(path, positions - centre, affine)
    volume = nifti.read(path, "float64")
    source = volume.array.shape[:3]
    spacing = [n * s / m for n, s, m in zip(source, volume.spacing, target, strict=True)]
    assert ct.Plan(spacing).shape(source, volume.spacing) == target
    expected = points(sitk, *centred(sitk.DICOMOrient(image, "RAS"), target)) - centre
    for order, margin in ((0, 0), (1, 0), (3, 10)):
        found = ct.resample(volume.array, target, order)
        distance = np.linalg.norm(found - expected, axis=-1)[interior(source, target, margin)]
        assert distance.max() < (1e-4 if order else np.linalg.norm(volume.spacing) / 2 + 1e-4)


@pytest.mark.parametrize(("order", "name", "margin", "error"), [
    (0, "NearestNeighbor", 0, 0), (1, "Linear", 0, 1e-3), (3, "BSpline", 12, 2e-3)])
@real
def test_itk_resamples_a_ct_as_we_do(order, name, margin, error, sitk):
    """In HU. ITK mirrors at the border where we repeat the edge, hence the spline's margin."""
    image = sitk.DICOMOrient(sitk.ReadImage(str(CT), sitk.sitkFloat64), "RAS")
    volume, target = nifti.read(CT), (80, 131, 96)  # no voxel is as near to two
    theirs = sitk.GetArrayFromImage(sitk.Resample(
        image, *centred(image, target)[:1], sitk.Transform(), getattr(sitk, f"sitk{name}"),
        *centred(image, target)[1:]))
    ours = ct.resample(volume.array, target, order)
    inner = interior(volume.array.shape, target, margin)
    theirs = np.clip(theirs, volume.array.min(), volume.array.max())
    assert np.abs(ours - theirs)[inner].max() <= error


@pytest.fixture(scope="module")
def scan(folder):
    """The middle of the CT as int16 with an oblique affine: (path, values, affine)."""
    values = np.asarray(nib.load(CT).dataobj).astype(np.int16)[20:90, 15:80, 30:90]
    affine = oblique((0, 1, 2), (1, 1, 1), (3, 3, 3))
    store(folder / "ct.nii", values, affine)
    return folder / "ct.nii", values, nib.load(folder / "ct.nii").affine


@real
def test_a_ct_is_the_same_however_it_is_stored(scan, folder):
    """Flipped and permuted in all 48 ways: the network sees the same bits, the answer fits each."""
    path, values, affine = scan
    plan = ct.Plan((4.1, 3.3, 2.9), (-92, 217), 80.4, 72.7)
    original = nifti.read(path)
    prepared = plan.prepare(original)
    prediction = (original.array > 150) + 2 * (np.abs(original.array) < 30)
    for order, signs in ORDERS:
        copy = values.transpose(order)[tuple(slice(None, None, s) for s in signs)]
        ends = [(n - 1) * (s < 0) for n, s in zip(copy.shape, signs, strict=True)]
        way = np.eye(4)  # from the copy's voxels to the original's
        way[:3, :3] = np.eye(3)[:, order] * signs
        way[:3, 3] = np.eye(3)[:, order] @ ends
        store(folder / "copy.nii", copy, affine @ way)
        volume = nifti.read(folder / "copy.nii")
        np.testing.assert_array_equal(volume.array, original.array)
        assert volume.spacing == original.spacing
        nifti.write(folder / "labels.nii", prediction, volume)
        written = np.asarray(nib.load(folder / "labels.nii").dataobj)
        np.testing.assert_array_equal(written, (copy > 150) + 2 * (np.abs(copy) < 30))
        np.testing.assert_array_equal(plan.prepare(volume), prepared)


@real
def test_a_padded_ct_holds_the_same_anatomy(scan, folder):
    path, values, affine = scan
    original = nifti.read(path)
    widths = ((3, 8), (0, 5), (6, 1))
    way = np.eye(4)
    way[:3, 3] = [-before for before, _ in widths]
    store(folder / "padded.nii.gz", np.pad(values, widths, constant_values=-1024), affine @ way)
    volume = nifti.read(folder / "padded.nii.gz")
    inside = tuple(slice(before, before + n) for (before, _), n
                   in zip(widths[::-1], original.array.shape, strict=True))
    np.testing.assert_array_equal(volume.array[inside], original.array)
    nifti.write(folder / "labels.nii.gz", (volume.array > 150).astype(int), volume)
    written = np.asarray(nib.load(folder / "labels.nii.gz").dataobj)
    np.testing.assert_array_equal(written[3:-8, :-5, 6:-1], values > 150)


@real
def test_the_ct_and_its_organs_lie_on_one_grid(tmp_path):
    volume = nifti.read(CT)
    organs = nifti.read(CT.with_name("ts_example_organs15.nii.gz"), "uint8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        organs.expect_grid_of(volume)
    with pytest.raises(ValueError, match="shape"):
        nifti.read(CT.with_name("ts_example_ct_sm.nii.gz")).expect_grid_of(volume)
