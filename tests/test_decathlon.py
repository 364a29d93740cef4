"""The Decathlon folder: its quirks are read, its damage is refused by name."""

import json
import random
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyseg import files
from tinyseg.data import decathlon

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
AFFINE = np.diag((1.0, 2.0, 3.0, 1.0))


def task(folder, ids=("b_10", "a_2"), channels=None, **changes):
    """A little task; `changes` replace entries of dataset.json."""
    rng = np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    shape = (3, 4, 5) if channels is None else (3, 4, 5, channels)
    for name in ids:
        nib.save(nib.Nifti1Image(rng.normal(size=shape).astype(np.float32), AFFINE),
                 folder / f"imagesTr/{name}.nii.gz")
        nib.save(nib.Nifti1Image(rng.integers(0, 3, (3, 4, 5)).astype(np.float32), AFFINE),
                 folder / f"labelsTr/{name}.nii.gz")
    content = {"name": "Toy", "relase": "1.0", "modality": {"0": "CT"}, "numTraining": 99,
               "labels": {"0": "background", "1": "organ", "2": "lesion"},
               "training": [pair(name) for name in ids],
               "test": ["./imagesTs/z_1.nii.gz", {"image": "./imagesTs/y_1.nii.gz"}]} | changes
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def pair(name):
    return {part: f"./{part}sTr/{name}.nii.gz" for part in ("image", "label")}


def replace(folder, part, array, affine=AFFINE, name="a_2"):
    nib.save(nib.Nifti1Image(array, affine), folder / f"{part}sTr/{name}.nii.gz")


def test_a_task_is_read(tmp_path):
    junk = {"image": "./imagesTr/._a_2.nii.gz", "label": "./labelsTr/._a_2.nii.gz"}
    folder = task(tmp_path, training=[pair("b_10"), junk, pair("a_2")])
    dataset = decathlon.load(folder)
    assert (dataset.name, dataset.modalities) == ("Toy", {0: "CT"})
    assert dataset.labels == {0: "background", 1: "organ", 2: "lesion"}
    assert [case.id for case in dataset.cases] == ["a_2", "b_10"]
    assert [path.name for path in dataset.test] == ["y_1.nii.gz", "z_1.nii.gz"]
    assert dataset.skipped == ("./imagesTr/._a_2.nii.gz",)
    volume, label = dataset.cases[0].read()
    assert volume.array.shape == (5, 4, 3, 1) and volume.array.dtype == np.float32
    assert label.shape == (5, 4, 3) and label.dtype == np.uint8 and volume.spacing == (3, 2, 1)
    stored = np.asarray(nib.load(folder / "labelsTr/a_2.nii.gz").dataobj)
    np.testing.assert_array_equal(label, stored.transpose(2, 1, 0))


def test_modalities_are_channels(tmp_path):
    folder = task(tmp_path, channels=2, modality={"0": "T2", "1": "ADC"})
    replace(folder, "label", np.ones((3, 4, 5, 1), np.int16))  # a trailing axis of one is dropped
    volume, label = decathlon.load(folder).cases[0].read()
    assert volume.array.shape == (5, 4, 3, 2) and label.shape == (5, 4, 3)


@pytest.mark.parametrize("codes", ["LPS", "PIR", "SLA"])
def test_a_label_map_in_another_order_of_axes_is_that_of_the_scan(codes, tmp_path):
    folder = task(tmp_path)
    expected = decathlon.load(folder).cases[0].read()[1]
    path = folder / "labelsTr/a_2.nii.gz"
    stored = nib.load(path)
    turn = nib.orientations.ornt_transform(nib.io_orientation(stored.affine),
                                           nib.orientations.axcodes2ornt(codes))
    nib.save(stored.as_reoriented(turn), path)
    assert nib.load(path).shape != stored.shape or codes == "LPS"
    volume, label = decathlon.load(folder).cases[0].read()
    np.testing.assert_array_equal(label, expected)
    assert volume.spacing == (3, 2, 1)


def test_a_label_map_that_is_off_by_less_than_half_a_voxel_is_told(tmp_path):
    folder = task(tmp_path)
    moved = AFFINE.copy()
    moved[:3, 3] = 0.4, 0.1, 0.2
    replace(folder, "label", np.ones((3, 4, 5), np.uint8), moved)
    with pytest.warns(UserWarning, match=r"labelsTr/a_2.* 0.458 mm \(0.4 voxels\) .*imagesTr/a_2"):
        volume, _ = decathlon.load(folder).cases[0].read()
    np.testing.assert_array_equal(volume.affine, AFFINE)


def test_small_disagreement_of_affines_is_rounding(tmp_path):
    folder = task(tmp_path)
    near = AFFINE + 5e-4 * np.eye(4)[:, [1, 2, 3, 0]]
    replace(folder, "label", np.ones((3, 4, 5), np.uint8), near)
    decathlon.load(folder).cases[0].read()


@pytest.mark.parametrize(("part", "array", "affine", "message"), [
    ("label", np.ones((3, 4, 6)), AFFINE, r"found shape \(3, 4, 6\), expected \(3, 4, 5\)"),
    ("label", np.ones((3, 4, 5, 2)), AFFINE, "found shape"),
    ("label", np.ones((3, 4, 5)), np.diag((1, 2, 3.4, 1)), "1.8 mm .* different grids"),
    ("label", np.ones((3, 4, 5)), np.diag((-1.0, 2, 3, 1)), "2 mm .* different grids"),
    ("label", np.full((3, 4, 5), 1.5), AFFINE, "whole numbers"),
    ("label", np.full((3, 4, 5), 7.0), AFFINE, r"label values \[7\], expected only \[0, 1, 2\]"),
    ("image", np.full((3, 4, 5), np.nan), AFFINE, "found 60 voxels"),
    ("image", np.full((3, 4, 5, 2), 1.0), AFFINE, "found 2 channels, expected 1"),
])
def test_a_wrong_case_is_refused_by_name(part, array, affine, message, tmp_path):
    folder = task(tmp_path)
    replace(folder, part, array, affine)
    with pytest.raises(ValueError, match=message) as caught:
        decathlon.load(folder).cases[0].read()
    assert str(folder / f"{part}sTr" / "a_2.nii.gz") in str(caught.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"training": []}, "no training cases"),
    ({"training": {}}, "expected a list"),
    ({"training": ["./imagesTr/a_2.nii.gz"]}, "training entry"),
    ({"training": [pair("a_2"), pair("a_2")]}, "twice"),
    ({"training": [{"image": "../a.nii.gz", "label": "b.nii.gz"}]}, "inside"),
    ({"training": [{"image": "imagesTr/../../a.nii.gz", "label": "b.nii.gz"}]}, "inside"),
    ({"training": [{"image": "/a.nii.gz", "label": "b.nii.gz"}]}, "inside"),
    ({"training": [{"image": 3, "label": "b.nii.gz"}]}, "inside"),
    ({"test": ["../../secret.nii.gz"]}, "inside"),
    ({"test": [3]}, "inside"),
    ({"training": [{"image": "..\\a.nii.gz", "label": "b.nii.gz"}]}, "inside"),
    ({"training": [{"image": "imagesTr\\..\\..\\a.nii.gz", "label": "b.nii.gz"}]}, "inside"),
    ({"training": [{"image": "C:\\a.nii.gz", "label": "b.nii.gz"}]}, "inside"),
    ({"training": [{"image": "c:a.nii.gz", "label": "b.nii.gz"}]}, "inside"),
    ({"training": [{"image": "\\\\host\\share\\a.nii.gz", "label": "b.nii.gz"}]}, "inside"),
    ({"training": [{"image": "\\a.nii.gz", "label": "b.nii.gz"}]}, "inside"),
    ({"training": [{"image": ".", "label": "b.nii.gz"}]}, "inside"),
    ({"labels": {"background": 0}}, "label numbers .* 1 to 254 others"),
    ({"labels": None}, "labels"),
    ({"labels": {"background": "0", "organ": 1.5}}, "labels"),
    ({"labels": {"1": "organ"}}, "expected 0"),
    ({"labels": {"0": "background", "-1": "organ"}}, "expected 0"),
    ({"labels": {"0": "background", "65536": "void"}}, "up to 65535"),
    ({"labels": {str(i): f"organ {i}" for i in range(256)}}, "1 to 254 others"),
    ({"labels": {"0": "background", "1": "organ", "01": "lesion"}}, "numbers .* each once"),
    ({"labels": {"0": "background", "1": "organ", "2": "organ"}}, "names .* each once"),
    ({"labels": {"background": 0, "organ": 1, "lesion": 1}}, "numbers .* each once"),
    ({"labels": {"background": 0, "organ": [1, 2], "lesion": 2}}, r"regions \['organ'\]"),
    ({"labels": {"background": 0, "organ": 1, "ignore": 2}}, "'ignore'.*leave out"),
    ({"file_ending": ".png"}, r"'\.png', expected \.nii"),
    ({"modality": {}}, r"'modality'.*channel_names.*\{\"0\": \"CT\"\}"),
    ({"modality": ["CT"]}, "'modality'"),
])
def test_a_wrong_description_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        decathlon.load(task(tmp_path, **changes))
    assert str(tmp_path / "dataset.json") in str(caught.value)


@pytest.mark.parametrize("write", [lambda path: path.replace("/", "\\"),
                                   lambda path: path[2:].replace("/", "\\"), lambda path: path[2:]])
def test_backslashes_separate_folders_too(write, tmp_path):
    ids = ("a_2", "_b_10", "__c")
    training = [{part: write(path) for part, path in pair(id).items()} for id in ids]
    dataset = decathlon.load(task(tmp_path, ids, training=training))
    assert [case.id for case in dataset.cases] == sorted(ids) and dataset.skipped == ()
    assert dataset.cases[0].read()[1].shape == (5, 4, 3)


@pytest.mark.parametrize(("numbers", "dtype"), [
    ((0, 1, 4), "u1"), ((0, 63, 252), "u1"), ((0, 255), "u1"), ((0, 256), "u2"),
    ((0, 17, 251, 14175), "u2"), ((0, 9, 10, 65535), "u2")])
def test_labels_keep_the_numbers_of_their_files(numbers, dtype, tmp_path):
    names = {str(n): f"name {n}" for n in sorted(numbers, key=str)}  # as JSON sorts strings
    folder = task(tmp_path, labels=names)
    stored = np.random.default_rng(0).choice(numbers, (3, 4, 5))
    replace(folder, "label", stored.astype(np.int32))
    dataset = decathlon.load(folder)
    assert tuple(dataset.labels) == numbers == tuple(dataset.cases[0].labels)
    _, label = dataset.cases[0].read()
    assert label.dtype == dtype
    np.testing.assert_array_equal(label, stored.T)
    stored[0, 0, 0] = 2
    replace(folder, "label", stored.astype(np.int32))
    with pytest.raises(ValueError, match=r"label values \[2\], expected only \[0, "):
        dataset.cases[0].read()


def test_names_of_classes_are_those_of_the_task(tmp_path):
    for labels in ({"0": "background", "63": "liver", "126": "right kidney"},
                   {"right kidney": 126, "background": 0, "liver": "63"}):
        source = task(tmp_path, labels=labels) / "dataset.json"
        assert list(decathlon.class_names(source).items()) == [
            (0, "background"), (63, "liver"), (126, "right kidney")]
    source.write_text(json.dumps({"labels": {"0": "背景", "1": "胰腺"}}, ensure_ascii=False),
                      encoding="utf-8")
    assert decathlon.class_names(source) == {0: "背景", 1: "胰腺"}


def nnunet(folder, ids=("a_2", "b_10"), channels=2, **changes):
    """A folder of nnU-Net's second version: no list, and a file for each channel."""
    rng = np.random.default_rng(1)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for id in ids:
        for channel in range(channels):
            nib.save(nib.Nifti1Image(rng.normal(size=(3, 4, 5)).astype(np.float32), AFFINE),
                     folder / f"imagesTr/{id}_{channel:04d}.nii.gz")
        nib.save(nib.Nifti1Image(rng.integers(0, 2, (3, 4, 5)).astype(np.uint8), AFFINE),
                 folder / f"labelsTr/{id}.nii.gz")
    content = {"channel_names": {str(i): ("CT", "PET", "T2")[i] for i in range(channels)},
               "labels": {"background": 0, "organ": 1}, "numTraining": len(ids),
               "file_ending": ".nii.gz"} | changes
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_folder_of_nnu_net_is_read_as_it_is(channels, tmp_path):
    folder = nnunet(tmp_path / "Dataset007", channels=channels)
    (folder / "imagesTr/._a_2_0000.nii.gz").write_bytes(b"junk")
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5)), AFFINE), folder / "imagesTr/c_0000.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5)), AFFINE), folder / "labelsTr/d.nii.gz")
    dataset = decathlon.load(folder)
    assert dataset.name == "Dataset007" and dataset.labels == {0: "background", 1: "organ"}
    assert list(dataset.modalities.values()) == ["CT", "PET", "T2"][:channels]
    assert [case.id for case in dataset.cases] == ["a_2", "b_10"]
    assert dataset.skipped == ("imagesTr/._a_2_0000.nii.gz", "imagesTr/c_0000.nii.gz",
                               "labelsTr/d.nii.gz")
    case = dataset.cases[1]
    volume, label = case.read()
    assert volume.array.shape == (5, 4, 3, channels) and label.shape == (5, 4, 3)
    assert [path.name for path in case.files] == [
        *(f"b_10_{channel:04d}.nii.gz" for channel in range(channels)), "b_10.nii.gz"]
    for channel, path in enumerate(case.files[:-1]):
        np.testing.assert_array_equal(volume.array[..., channel],
                                      np.asarray(nib.load(path).dataobj).T)


def test_a_list_may_name_scans_without_their_channels(tmp_path):
    """As nnU-Net's first version does."""
    folder = nnunet(tmp_path, training=[pair("b_10")])
    case, = decathlon.load(folder).cases
    assert case.read()[0].array.shape == (5, 4, 3, 2)


def test_channels_must_all_be_there_on_one_grid(tmp_path):
    folder = nnunet(tmp_path, channels=3)
    moved = AFFINE.copy()
    moved[0, 3] = 0.7
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5)), moved), folder / "imagesTr/b_10_0001.nii.gz")
    with pytest.raises(ValueError, match="b_10_0001.nii.gz: .*0.7 mm .*b_10_0000.nii.gz"):
        decathlon.load(folder).cases[1].read()
    (folder / "imagesTr/a_2_0001.nii.gz").unlink()
    with pytest.raises(ValueError, match="a_2_0000.nii.gz: found 1 channels, expected 3"):
        decathlon.load(folder).cases[0].read()
    (folder / "imagesTr/b_10_0002.nii.gz").unlink()
    with pytest.raises(ValueError, match="b_10_0000.nii.gz: found 2 files of channels, expected 3"):
        decathlon.load(folder)


@pytest.mark.parametrize("names, channels, found", [
    ("a_0000 a_0001 b_0000 b_0001", 2, {"a": 2, "b": 2}),
    ("a_0001 a_0002 a_0003", 2, {"a_0001": 1, "a_0002": 1, "a_0003": 1}),  # of three patients
    ("a_0001 a_0002", 2, {"a_0001": 1, "a_0002": 1}),
    ("a_0000 a_0001 b", 2, {"a": 2, "b": 1}),
    ("a_0000 b_0000", 1, {"a": 1, "b": 1}), ("a_0000 b", 1, {"a_0000": 1, "b": 1})])
def test_files_of_one_scan_are_those_of_every_channel(names, channels, found):
    files = [Path(f"{name}.nii.gz") for name in names.split()]
    told = decathlon.scans(reversed(files), channels)
    assert {id: len(paths) for id, paths in told.items()} == found
    assert [path for paths in told.values() for path in paths] == files


def test_two_folders_are_a_task(tmp_path):
    nnunet(tmp_path, channels=2)
    folders = tmp_path / "imagesTr", tmp_path / "labelsTr"
    stored = np.random.default_rng(0).choice((0, 4, 300), (3, 4, 5)).astype(np.int16)
    replace(tmp_path, "label", stored)
    dataset = decathlon.pair(*folders)
    assert dataset.labels == {0: "background", 1: "class 1", 4: "class 4", 300: "class 300"}
    assert dataset.modalities == {0: "unknown", 1: "unknown"} and dataset.skipped == ()
    volume, label = dataset.cases[0].read()
    assert volume.array.shape == (5, 4, 3, 2)
    np.testing.assert_array_equal(label, stored.T)

    asked = []
    named = decathlon.pair(*folders, modality=("CT", "PET"), progress=asked.append,
                           names={4: "liver", 1: "lung", 0: "air", 300: "skin"})
    assert named.labels == {0: "air", 1: "lung", 4: "liver", 300: "skin"} and asked == []
    assert named.modalities == {0: "CT", 1: "PET"}
    with pytest.raises(ValueError, match="found 2 channels, expected 1"):
        decathlon.pair(*folders, modality=["CT"])


def test_files_of_one_name_are_a_pair(tmp_path):
    """With a number of four digits at the end that counts cases and not channels."""
    task(tmp_path, ("case_0001", "case_0000"))
    (tmp_path / "imagesTr/notes.txt").write_text("")
    (tmp_path / "labelsTr/case_0002.nii.gz").mkdir()
    dataset = decathlon.pair(tmp_path / "imagesTr", tmp_path / "labelsTr", "CT")
    assert [case.id for case in dataset.cases] == ["case_0000", "case_0001"]
    assert dataset.modalities == {0: "CT"} and dataset.cases[0].further == ()
    assert dataset.skipped == ("imagesTr/notes.txt", "labelsTr/case_0002.nii.gz")


def test_folders_that_are_no_pair_are_refused_by_name(tmp_path):
    task(tmp_path, ("a", "b"))
    images, labels = tmp_path / "imagesTr", tmp_path / "labelsTr"
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        decathlon.pair(tmp_path / "nowhere", labels)
    with pytest.raises(ValueError, match="in one folder, expected two"):
        decathlon.pair(images, tmp_path / "imagesTr/../imagesTr")
    for path in labels.iterdir():
        replace(tmp_path, "label", np.zeros((3, 4, 5)), name=path.name[0])
    with pytest.raises(ValueError, match=r"labelsTr: found label numbers \[0\], expected 0 for"):
        decathlon.pair(images, labels)
    for path in list(labels.iterdir()):
        path.rename(path.with_name(f"{path.name[0]}_seg.nii.gz"))
    with pytest.raises(ValueError, match="labelsTr: found no label map .*a.nii.gz.*b_seg.nii.gz"):
        decathlon.pair(images, labels)


def test_missing_and_damaged_descriptions(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="dataset.json.*imagesTr"):
        decathlon.load(tmp_path)
    source = tmp_path / "dataset.json"
    for content in (b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"[]", b"3"):
        source.write_bytes(content)
        with pytest.raises(ValueError, match="dataset.json"):
            decathlon.load(tmp_path)
    monkeypatch.setattr(files, "LARGEST_JSON", 10)
    source.write_bytes(b" " * 11)
    with pytest.raises(ValueError, match="found 11 bytes"):
        decathlon.load(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    folder = task(tmp_path)
    (folder / "labelsTr/b_10.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"labelsTr/b_10\.nii\.gz"):
        decathlon.load(folder)


def shuffled(n, seed):
    """Fisher-Yates as scikit-learn's random_state does it, on Python's own Mersenne Twister."""
    _, key, position, *_ = np.random.RandomState(seed).get_state()
    twister = random.Random()
    twister.setstate((3, (*map(int, key), position), None))
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        while (j := twister.getrandbits(32) & ((1 << i.bit_length()) - 1)) > i:
            pass
        order[i], order[j] = order[j], order[i]
    return order


@given(n=st.integers(2, 60), k=st.integers(2, 7), seed=st.integers(0, 2**32 - 1))
def test_folds_are_kfold_by_another_generator(n, k, seed):
    ids = [f"case_{i:03d}" for i in range(n)]
    if k > n:
        with pytest.raises(ValueError, match="folds"):
            decathlon.folds(ids, k, seed)
        return
    order, start = shuffled(n, seed), 0
    for fold, (train, held) in enumerate(decathlon.folds(reversed(ids), k, seed)):
        stop = start + n // k + (fold < n % k)
        assert held == [ids[i] for i in sorted(order[start:stop])]
        assert train == sorted(set(ids) - set(held))
        start = stop
    assert start == n


def test_folds_equal_scikit_learn():
    model_selection = pytest.importorskip("sklearn.model_selection")
    ids = [f"pancreas_{i:03d}" for i in range(281)]
    split = model_selection.KFold(5, shuffle=True, random_state=12345).split(ids)
    for (train, held), (t, h) in zip(decathlon.folds(ids), split, strict=True):
        assert train == [ids[i] for i in t] and held == [ids[i] for i in h]


def test_wrong_folds():
    for ids, k, told in ((["a", "b"], 3, "3 folds for 2 cases, .* 2 to 2 folds, or add cases"),
                         (["a", "b"], 1, "expected a case at least for each"),
                         (["a"], 5, "found 1 case, expected two .* one to hold out"),
                         (["a", "a", "b"], 2, "expected every id once")):
        with pytest.raises(ValueError, match=told):
            decathlon.folds(ids, k)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the hippocampus volumes are not on this machine")
def test_the_hippocampus_task():
    dataset = decathlon.load(SHARED / "msd_task04_hippocampus")
    assert len(dataset.cases) == 208 and dataset.modalities == {0: "MRI"}
    assert dataset.labels == {0: "background", 1: "Anterior", 2: "Posterior"}
    for case in dataset.cases[:3]:
        volume, label = case.read()
        assert volume.spacing == (1, 1, 1) and set(np.unique(label)) == {0, 1, 2}
        anterior, posterior = (np.argwhere(label == c)[:, 1].mean() for c in (1, 2))
        assert anterior > posterior  # the second axis runs towards anterior


@pytest.mark.skipif(not SHARED.is_dir(), reason="the official descriptions are not on this machine")
def test_the_official_pancreas_description(tmp_path):
    content = json.loads((SHARED / "msd_json/Task07_Pancreas_dataset.json").read_text("utf-8"))
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    for entry in content["training"]:
        for path in entry.values():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).touch()
    dataset = decathlon.load(tmp_path)
    assert (len(dataset.cases), len(dataset.test)) == (281, 139)
    assert dataset.cases[0].id == "pancreas_001"
    folds = decathlon.folds(case.id for case in dataset.cases)
    assert [len(held) for _, held in folds] == [57] + [56] * 4
