"""The phantom: a real Decathlon folder with what the real task has."""

import json

import nibabel as nib
import numpy as np
import pytest

from tinyseg.data import decathlon, nifti, phantom

SMALL = {"shape": (16, 40, 44), "spacing": (5.0, 3.6, 3.5)}


def test_a_folder_is_a_task_in_many_orientations(tmp_path):
    folder = phantom.write(tmp_path / "new" / "task", cases=4, seed=3, **SMALL)
    content = json.loads((folder / "dataset.json").read_text("utf-8"))
    assert "relase" in content and content["numTraining"] == 4
    assert (folder / "imagesTr/._phantom_000.nii.gz").read_bytes()[:4] == b"\x00\x05\x16\x07"
    dataset = decathlon.load(folder)
    assert dataset.labels == {0: "background", 1: "pancreas", 2: "cancer"}
    assert [case.id for case in dataset.cases] == [f"phantom_{i:03d}" for i in range(4)]
    seen = set()
    for index, case in enumerate(dataset.cases):
        volume, label = case.read()
        hu, truth = phantom.volume(np.random.default_rng((3, index)), **SMALL)
        np.testing.assert_array_equal(volume.array[..., 0], hu)
        np.testing.assert_array_equal(label, truth)
        np.testing.assert_allclose(volume.spacing, SMALL["spacing"], rtol=1e-6)
        stored = nib.load(case.image)
        assert stored.get_data_dtype() == np.int16
        seen.add(nib.aff2axcodes(stored.affine))
    assert len(seen) == 4 and ("L", "P", "S") in seen


def test_the_seed_decides_every_byte(tmp_path):
    first, again, other, more = (
        phantom.write(tmp_path / name, cases=cases, seed=seed, **SMALL)
        for name, cases, seed in (("a", 2, 0), ("b", 2, 0), ("c", 2, 1), ("d", 3, 0)))
    for part in ("imagesTr", "labelsTr"):
        name = f"{part}/phantom_001.nii.gz"
        assert (first / name).read_bytes() == (again / name).read_bytes()
        assert (first / name).read_bytes() == (more / name).read_bytes()
        assert (first / name).read_bytes() != (other / name).read_bytes()


@pytest.mark.parametrize("seed", range(6))
def test_anatomy(seed):
    hu, labels = phantom.volume(np.random.default_rng(seed))
    assert hu.shape == labels.shape == phantom.SHAPE
    assert (hu.dtype, labels.dtype) == (np.int16, np.uint8)
    body, pancreas, cancer = hu > -300, labels == 1, labels == 2
    assert 0.01 < pancreas.sum() / body.sum() < 0.05
    voxel = np.prod(phantom.SPACING)
    assert 0.6 * 4 / 3 * np.pi * 8**3 < cancer.sum() * voxel < 1.6 * 4 / 3 * np.pi * 14**3
    assert 90 < hu[pancreas].mean() < 125
    assert 75 < hu[pancreas].mean() - hu[cancer].mean() < 125
    assert np.median(hu[:, 0]) < -950 and (hu > 180).any()
    assert 10 < np.std(hu[:, :2, :2]) < 14  # noise in air
    depth, height, width = np.array(np.nonzero(pancreas)), *np.array(phantom.SHAPE[1:])
    order = depth[2].argsort()
    tail, head = depth[:, order[:200]].mean(1), depth[:, order[-200:]].mean(1)
    assert head[2] > width / 2 > tail[2]  # the head lies right of the spine
    assert depth[1].mean() > 0.45 * height  # in front of it


def test_patients_differ_and_wrong_output_is_never_half_there(tmp_path, monkeypatch):
    a, b = (phantom.volume(np.random.default_rng(s), **SMALL)[1] for s in (0, 1))
    assert (a != b).any()
    monkeypatch.setattr(nib, "save", lambda image, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        phantom.write(tmp_path, cases=1, **SMALL)
    assert not (tmp_path / "dataset.json").exists()
    assert not list(tmp_path.glob("*/*"))


def test_the_labels_can_be_written_back(tmp_path):
    case = decathlon.load(phantom.write(tmp_path, cases=1, **SMALL)).cases[0]
    volume, label = case.read()
    nifti.write(tmp_path / "prediction.nii.gz", label, volume)
    written, truth = nib.load(tmp_path / "prediction.nii.gz"), nib.load(case.label)
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(truth.dataobj))
    np.testing.assert_array_equal(written.affine, truth.affine)
