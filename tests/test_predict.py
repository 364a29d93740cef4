"""`python -m tinyseg predict`: files, folders, ensembles, what fails, real scans, and memory."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from test_infer import network

import tinyseg as ts
from tinyseg import __main__ as commands
from tinyseg import files
from tinyseg.data import nifti
from tinyseg.infer import islands, segment

SHARED = Path(__file__).resolve().parents[2] / "shared"
CT = SHARED / "data" / "ct_totalsegmentator_example" / "ts_example_ct.nii.gz"
METADATA = {"plan": {"spacing": [4, 3, 3], "clip": [-100, 200], "mean": 50, "std": 80},
            "patch": [6, 12, 12], "labels": {"0": "background", "1": "pancreas", "2": "cancer"}}


def predict(*words):
    return commands.main(["predict", *map(str, words)])


def labels_in(path):
    return np.asarray(nib.load(path).dataobj)


def balance(net, images):
    """Shift the last bias so that the mean logits are zero: all classes occur."""
    with ts.no_grad():
        logits = net(images).data
    net.parameters()[-1].data -= logits.mean(tuple(range(logits.ndim - 1)))
    return net


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Files of small networks with random weights: two that agree, and two that do not."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ts.models.BACKBONES, "resnet18", ((1, 1, 1, 1), False))
        for name, rank, classes, metadata in (
                ("a", 3, 3, METADATA), ("b", 2, 3, {**METADATA, "patch": [6, 16, 20]}),
                ("four", 2, 4, METADATA), ("raw", 2, 3, {}),
                ("names", 2, 3, {**METADATA, "labels": {"0": "background", "1": "liver"}})):
            net = ts.models.resnet_seg("resnet18", rank=rank, in_channels=1, classes=classes,
                                       seed=ord(name[0]))
            patch = np.random.default_rng(1).standard_normal((1, 6, 12, 12, 1), "float32")
            balance(net.eval(), patch if rank == 3 else patch[0])
            ts.save(folder / f"{name}.npz", net, **metadata)
        yield folder


def write_scan(path, seed, size=(21, 18, 13)):
    image = np.random.default_rng(seed).normal(50, 200, size).astype("int16")
    affine = np.array([[0, -2.5, 0, 30], [2, 0, 0, -7], [0, 0, 4.5, 12], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(image, affine), path)
    return path


@pytest.fixture
def one(tmp_path):
    return write_scan(tmp_path / "scan.nii.gz", 0)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for seed, name in enumerate(("one.nii.gz", "three.nii", "two.nii.gz")):
        write_scan(folder / name, seed)
    for junk in ("._one.nii.gz", ".DS_Store", "notes.txt"):
        (folder / junk).write_bytes(b"\x00\x05\x16\x07")
    return folder


def test_one_file(models, one, tmp_path, capsys):
    out = tmp_path / "new" / "labels.nii.gz"
    assert predict(models / "a.npz", one, out) == 0
    scan, found = nib.load(one), nib.load(out)
    assert found.shape == scan.shape and (found.affine == scan.affine).all()
    expected = segment(ts.load(models / "a.npz"), nifti.read(one))
    np.testing.assert_array_equal(nifti.read(out, "uint8").array, expected)
    told = capsys.readouterr()
    voxels = [np.count_nonzero(labels_in(out) == c) for c in (1, 2)]
    assert min(voxels) > 0
    assert told.out == (f"scan.nii.gz: pancreas {voxels[0] * 0.0225:.1f} ml ({voxels[0]} voxels), "
                        f"cancer {voxels[1] * 0.0225:.1f} ml ({voxels[1]} voxels)\n")
    assert re.search(r"1/1 scan\.nii\.gz: 100%.* (\d+)/\1 \[\d\d:\d\d<00:00,.*window", told.err)


def test_a_folder_without_its_junk(models, folder, tmp_path, capsys):
    assert predict(models / "a.npz", folder, tmp_path / "out") == 0
    names = ["one.nii.gz", "three.nii", "two.nii.gz"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == names
    assert predict(models / "a.npz", folder / "three.nii", tmp_path / "alone.nii") == 0
    np.testing.assert_array_equal(labels_in(tmp_path / "out" / "three.nii"),
                                  labels_in(tmp_path / "alone.nii"))


def test_a_file_that_fails_is_named_and_the_others_go_on(models, folder, tmp_path, capsys):
    broken = folder / "one.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-500])
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 9, 2), "int16"), np.eye(4)), folder / "x.nii.gz")
    assert predict(models / "a.npz", folder, tmp_path / "out") == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["three.nii", "two.nii.gz"]
    told = capsys.readouterr()
    errors = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and str(broken) in errors[0]
    assert f"{folder / 'x.nii.gz'}: found 2 channels, expected 1" in errors[1]
    assert "2 of 4 scans failed: one.nii.gz, x.nii.gz" in told.err
    assert len(told.out.splitlines()) == 2


def test_outputs_are_whole_or_not_there(models, one, tmp_path, monkeypatch, capsys):
    out = tmp_path / "labels.nii.gz"
    out.write_bytes(b"what was there before")
    before = sorted(tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        assert predict(models / "a.npz", one, out) == 1
    told = capsys.readouterr().err
    assert "No space left" in told and str(one) in told
    assert out.read_bytes() == b"what was there before" and sorted(tmp_path.iterdir()) == before

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ts.infer, "segment", stop)
    with pytest.raises(KeyboardInterrupt):
        predict(models / "a.npz", one, out)
    assert out.read_bytes() == b"what was there before" and sorted(tmp_path.iterdir()) == before


def test_ensembles(models, one, tmp_path):
    a, b, out = models / "a.npz", models / "b.npz", tmp_path / "out.nii.gz"
    found = {}
    for name, words in (("a", [a]), ("b", [b]), ("aa", [a, "--with", a]),
                        ("ab", [a, "--with", b]), ("abb", ["--with", b, "--with", b, a])):
        assert predict(*words, one, out) == 0
        found[name] = nifti.read(out, "uint8").array
    np.testing.assert_array_equal(found["a"], found["aa"])
    assert len({array.tobytes() for array in found.values()}) == 4
    nets = [ts.load(a), ts.load(b)]
    np.testing.assert_array_equal(found["ab"], segment(nets, nifti.read(one)))
    np.testing.assert_array_equal(found["abb"], segment([*nets, nets[1]], nifti.read(one)))


@pytest.mark.parametrize("other, message", [
    ("four", "four.npz: found 4 classes"), ("names", "names.npz: found 3 classes.*liver"),
    ("raw", "raw.npz: holds no preparation"), ("none", "none.npz"),
])
def test_models_that_do_not_agree(models, one, tmp_path, capsys, other, message):
    out = tmp_path / "out.nii.gz"
    assert predict(models / "a.npz", one, out, "--with", models / f"{other}.npz") == 1
    assert re.search(message, capsys.readouterr().err) and not out.exists()


def test_options_do_what_they_say(models, one, tmp_path):
    net, scan, out = ts.load(models / "a.npz"), nifti.read(one), tmp_path / "out.nii.gz"
    plain = segment(net, scan)
    voxel = 2 * 2.5 * 4.5 / 1000
    for words, expected in (
            (["--mirror"], segment(net, scan, mirror=(2,))),
            (["--overlap", "0"], segment(net, scan, overlap=0)),
            (["--largest"], islands(plain, largest=True)),
            (["--smallest", 59.9 * voxel], islands(plain, smallest=60)),
            (["--device", "cpu"], plain)):
        assert predict(models / "a.npz", one, out, *words) == 0
        np.testing.assert_array_equal(nifti.read(out, "uint8").array, expected)
        assert words == ["--device", "cpu"] or (expected != plain).any(), words


@pytest.mark.parametrize("name", ["out.nii.gz", "out.nii"])
def test_probabilities_are_written_as_a_fourth_axis(models, one, tmp_path, capsys, name):
    """In the file's own order of axes; the largest is the label map's."""
    nets, out = [ts.load(models / "a.npz"), ts.load(models / "b.npz")], tmp_path / name
    words = models / "a.npz", "--with", models / "b.npz", one
    assert predict(*words, out, "--probabilities") == 0
    told, scan, found = capsys.readouterr().out, nib.load(one), nib.load(out)
    assert found.shape == (*scan.shape, 3) and found.get_data_dtype() == np.float32
    assert (found.affine == scan.affine).all() and {p.name for p in tmp_path.iterdir()} == {
        "scan.nii.gz", name}
    expected = segment(nets, nifti.read(one), probabilities=True)
    np.testing.assert_array_equal(nifti.read(out).array, expected)
    volume = expected.sum((0, 1, 2))[1] * 0.0225
    assert f"scan.nii.gz: pancreas {volume:.1f} ml expected, cancer " in told
    assert predict(*words, tmp_path / "labels.nii") == 0
    np.testing.assert_array_equal(labels_in(out).argmax(-1), labels_in(tmp_path / "labels.nii"))


@pytest.mark.parametrize("name", ["out.nii.gz", "out.nii"])
def test_probabilities_are_whole_or_not_there(models, one, tmp_path, monkeypatch, capsys, name):
    out, rows = tmp_path / name, ts.infer.rows
    out.write_bytes(b"what was there before")
    before = sorted(tmp_path.iterdir())

    def broken(*args, **options):
        numbers, stream = rows(*args, **options)

        def some():
            yield next(stream)
            raise KeyboardInterrupt

        return numbers, some()

    monkeypatch.setattr(ts.infer, "rows", broken)
    with pytest.raises(KeyboardInterrupt):
        predict(models / "a.npz", one, out, "--probabilities")
    monkeypatch.setattr(ts.infer, "rows", lambda *_, **__: ([0, 1, 2], iter(
        [np.zeros((4, 18, 3))])))
    assert predict(models / "a.npz", one, out, "--probabilities") == 1
    assert "found a row of shape (4, 18, 3), expected (21, 18, 3)" in capsys.readouterr().err
    assert out.read_bytes() == b"what was there before" and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("words", [
    ["--probabilities", "--largest"], ["--probabilities", "--smallest", "1"],
    ["--overlap", "1"], ["--overlap", "-0.1"], ["--overlap", "nan"], ["--smallest", "-1"],
    ["--smallest", "inf"], ["--smallest", "much"], ["--device", "tpu"], ["--with"],
])
def test_bad_usage(models, one, tmp_path, words, capsys):
    with pytest.raises(SystemExit) as caught:
        predict(models / "a.npz", one, tmp_path / "out.nii.gz", *words)
    assert caught.value.code == 2 and words[0] in capsys.readouterr().err


def test_what_cannot_end_well_is_refused_before_any_work(models, one, folder, tmp_path, capsys,
                                                        monkeypatch):
    monkeypatch.setattr(commands.checkpoint, "load", lambda path: pytest.fail("worked"))
    (tmp_path / "empty").mkdir()
    kept = one.read_bytes()
    for scan, out, message in (
            (one, one, "is the scan itself"), (folder, folder, "is the scan itself"),
            (one, tmp_path / "out.png", "ends in .nii"), (one, folder, "expected a file name"),
            (folder, one, "expected a folder"), (tmp_path / "empty", tmp_path / "out", "holds no")):
        assert predict(models / "a.npz", scan, out) == 1
        assert message in capsys.readouterr().err
    assert one.read_bytes() == kept and not (tmp_path / "out").exists()


def test_channels_in_files_of_their_own_are_one_scan(models, tmp_path, monkeypatch, capsys):
    net = network(channels=2)
    net.metadata["labels"] = {"0": "background", "1": "a", "2": "b"}
    monkeypatch.setattr(commands.checkpoint, "load", lambda path: net)
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    for case in (1, 2):
        for channel in (0, 1):
            write_scan(scans / f"case_{case}_{channel:04d}.nii.gz", 2 * case + channel)
    assert predict("m.npz", scans, out) == 0
    assert {path.name for path in out.iterdir()} == {"case_1.nii.gz", "case_2.nii.gz"}
    parts = [nifti.read(scans / f"case_2_{channel:04d}.nii.gz") for channel in (0, 1)]
    expected = segment(net, nifti.join(parts))
    np.testing.assert_array_equal(nifti.read(out / "case_2.nii.gz", "uint8").array, expected)
    one = tmp_path / "one.nii.gz"
    assert predict("m.npz", scans / "case_2_0000.nii.gz", one) == 0
    np.testing.assert_array_equal(nifti.read(one, "uint8").array, expected)
    second = scans / "case_2_0001.nii.gz"
    kept = second.read_bytes()
    assert predict("m.npz", scans / "case_2_0000.nii.gz", second) == 1  # it is an input too
    assert "is the scan itself" in capsys.readouterr().err and second.read_bytes() == kept

    net = network()  # of one channel: each file is a scan
    net.metadata["labels"] = {"0": "background", "1": "a", "2": "b"}
    assert predict("m.npz", scans, tmp_path / "each") == 0
    assert len(list((tmp_path / "each").iterdir())) == 4
    for path in scans.glob("*_0001.nii.gz"):
        path.unlink()
    assert predict("m.npz", scans, tmp_path / "nnunet") == 0
    assert {path.name for path in (tmp_path / "nnunet").iterdir()} == {
        "case_1.nii.gz", "case_2.nii.gz"}


def test_a_scan_that_is_not_there(models, tmp_path, capsys):
    assert predict(models / "a.npz", tmp_path / "x.nii.gz", tmp_path / "out.nii.gz") == 1
    assert "x.nii.gz: no such file" in capsys.readouterr().err


def test_a_folder_of_scans_that_is_not_there(models, tmp_path, capsys):
    assert predict(models / "a.npz", tmp_path / "scnas", tmp_path / "out") == 1
    assert f"{tmp_path / 'scnas'}: no such file or folder" in capsys.readouterr().err


def test_a_scan_that_was_unpacked_into_a_folder_of_its_name_is_told(models, tmp_path, capsys):
    (tmp_path / "scans" / "case.nii").mkdir(parents=True)
    write_scan(tmp_path / "scans" / "case.nii" / "case.nii", 0)
    assert predict(models / "a.npz", tmp_path / "scans", tmp_path / "out") == 1
    assert "case.nii is a folder" in capsys.readouterr().err
    assert predict(models / "a.npz", tmp_path / "scans" / "case.nii", tmp_path / "out") == 0


def test_a_device_that_is_not_there(models, one, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    out = tmp_path / "out.nii.gz"
    assert predict(models / "a.npz", one, out, "--device", "cuda") == 1
    assert "needs CuPy" in capsys.readouterr().err and not out.exists()


@pytest.fixture
def ct():
    if not CT.exists():
        pytest.skip(f"{CT} is not here")
    return nib.load(CT)


def ct_network(image, spacing, patch, kernel=3):
    """Random weights on a CT: what it finds means nothing, where it finds it must not move."""
    net = network(3, kernel=kernel, spacing=spacing, clip=[-92, 217], mean=80.0, std=72.0)
    net.metadata["patch"] = patch
    values = (np.asarray(image.dataobj, "float32").clip(-92, 217) - 80) / 72
    return balance(net, values[None, ..., None])


def segmented(net, image, path, **options):
    """The label map of an image, through files."""
    nib.save(image, path)
    scan = nifti.read(path)
    nifti.write(path.with_name(f"labels_{path.name}"), segment(net, scan, **options), scan)
    return nib.load(path.with_name(f"labels_{path.name}"))


def test_a_turned_copy_of_a_ct_has_the_same_prediction(ct, tmp_path):
    """Permuted and reflected: the same labels at the same places of the body, voxel for voxel."""
    small = ct.slicer[20:100, 10:90, 30:80]
    net = ct_network(small, [4.5, 4, 4], [12, 20, 20])
    plain = segmented(net, small, tmp_path / "plain.nii.gz")
    labels = np.asarray(plain.dataobj)
    assert (np.bincount(labels.ravel(), minlength=3) > 0.01 * labels.size).all()
    for axes in ("LAS", "SPR", "IRA"):
        turn = ornt_transform(io_orientation(small.affine), axcodes2ornt(axes))
        copy = small.as_reoriented(turn)
        assert nib.aff2axcodes(copy.affine) == tuple(axes)
        found = segmented(net, copy, tmp_path / "copy.nii.gz")
        expected = plain.as_reoriented(turn)
        np.testing.assert_array_equal(found.affine, expected.affine)
        np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))


def padded(image, before, after):
    """A copy in a larger field of view, of air, with each voxel where it was in the body."""
    array = np.pad(np.asarray(image.dataobj), list(zip(before, after, strict=True)),
                   constant_values=-1024)
    affine = image.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ before
    return nib.Nifti1Image(array, affine)


def test_a_padded_ct_has_the_same_prediction_away_from_the_border(ct, tmp_path):
    """What a larger field of view leaves as it was, exactly.

    Padding by whole strides moves the grid of windows onto itself and adds windows that reach
    half a window into the scan. Farther in, windows and their contents are the same, so the
    labels are, bit for bit, whatever the network does at a window's border.
    """
    small = ct.slicer[10:106, 10:90, 20:92]  # R, A, S: a window and whole strides of 16, 16, 12
    net = ct_network(small, [3, 3, 3], [24, 32, 32])
    plain = np.asarray(segmented(net, small, tmp_path / "plain.nii.gz", overlap=0.5).dataobj)
    wide = padded(small, (16, 32, 12), (32, 16, 0))
    found = np.asarray(segmented(net, wide, tmp_path / "wide.nii.gz", overlap=0.5).dataobj)
    found = found[16:112, 32:112, 12:84]
    inner = np.s_[16:-16, 16:-16, 12:]  # nothing was added above
    np.testing.assert_array_equal(found[inner], plain[inner])
    assert (np.bincount(plain[inner].ravel(), minlength=3) > 1000).all()
    assert (found != plain).any()  # the border itself may change


def test_any_padding_leaves_a_voxelwise_prediction_alone(ct, tmp_path):
    small = ct.slicer[30:91, 20:77, 30:73]
    net = ct_network(small, [3, 3, 3], [24, 32, 32], kernel=1)
    plain = np.asarray(segmented(net, small, tmp_path / "plain.nii.gz", overlap=0.5).dataobj)
    wide = padded(small, (5, 1, 7), (2, 0, 11))
    found = np.asarray(segmented(net, wide, tmp_path / "wide.nii.gz", overlap=0.5).dataobj)
    np.testing.assert_array_equal(found[5:66, 1:58, 7:50], plain)
    assert (np.bincount(plain.ravel(), minlength=3) > 100).sum() >= 2


MEMORY = """
import resource, sys
import numpy as np
import scipy.ndimage
from tinyseg import __main__ as commands, checkpoint, nn

def load(path):  # three thresholds: what a network itself needs is not counted here
    net = nn.Sequential(nn.Conv(1, 3, (1, 1, 1), rng=np.random.default_rng(1)))
    net.config = {"rank": 3, "in_channels": 1, "classes": 3}
    net.metadata = {"plan": {"spacing": [SPACING, 0.8, 0.8], "clip": [-92, 217], "mean": 80.36,
                             "std": 72.71}, "patch": [40, 224, 224], "labels": {}}
    return net.eval()

checkpoint.load = load
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
code = commands.main(["predict", "model", *sys.argv[1:], "--largest", "--smallest", "0.1"])
print(peak() - before)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("spacing", [2.5, 0.9])
def test_memory_of_a_long_scan(tmp_path, spacing):
    """512 x 512 x 700 voxels of 1 mm: under 3 GB more than the interpreter with its imports."""
    if shutil.disk_usage(tmp_path).free < 2e9:
        pytest.skip("needs 2 GB of disk")
    rng = np.random.default_rng(0)
    image = np.full((512, 512, 700), -1000, "int16")
    image[100:400, 150:350] = rng.integers(-100, 200, (300, 200, 1))
    nib.save(nib.Nifti1Image(image, np.diag([-0.8, -0.8, 1, 1])), tmp_path / "scan.nii.gz")
    del image
    done = subprocess.run([sys.executable, "-c", MEMORY.replace("SPACING", str(spacing)),
                           tmp_path / "scan.nii.gz", tmp_path / "out.nii.gz"],
                          capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert nib.load(tmp_path / "out.nii.gz").shape == (512, 512, 700)
    taken = int(done.stdout.splitlines()[-1])
    print(f"{taken / 1e9:.2f} GB")
    assert taken < 3e9
