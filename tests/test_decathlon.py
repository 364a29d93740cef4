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


def test_small_disagreement_of_affines_is_rounding(tmp_path):
    folder = task(tmp_path)
    near = AFFINE + 5e-4 * np.eye(4)[:, [1, 2, 3, 0]]
    replace(folder, "label", np.ones((3, 4, 5), np.uint8), near)
    decathlon.load(folder).cases[0].read()


@pytest.mark.parametrize(("part", "array", "affine", "message"), [
    ("label", np.ones((3, 4, 6)), AFFINE, r"found shape \(3, 4, 6\), expected \(3, 4, 5\)"),
    ("label", np.ones((3, 4, 5, 2)), AFFINE, "found shape"),
    ("label", np.ones((3, 4, 5)), np.diag((1, 2, 3.01, 1)), "affine"),
    ("label", np.ones((3, 4, 5)), np.diag((-1.0, 2, 3, 1)), "affine"),
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
    ({"labels": {"background": 0}}, "labels"),
    ({"labels": None}, "labels"),
    ({"labels": {"1": "organ"}}, "expected 0"),
    ({"labels": {"0": "background", "255": "void"}}, "up to 254"),
    ({"modality": {}}, "modality"),
])
def test_a_wrong_description_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        decathlon.load(task(tmp_path, **changes))
    assert str(tmp_path / "dataset.json") in str(caught.value)


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
    for ids, k in ((["a", "b"], 3), (["a", "b"], 1), (["a", "a", "b"], 2)):
        with pytest.raises(ValueError, match="expected"):
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
    content = json.loads((SHARED / "msd_json/Task07_Pancreas_dataset.json").read_text())
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
