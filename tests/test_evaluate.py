"""The evaluate command: what it writes and prints, and what it refuses."""

import csv
import json
import math

import nibabel as nib
import numpy as np
import pytest

from tinyseg import __main__ as commands
from tinyseg import metrics

AFFINE = np.diag([0.8, 0.7, 2.5, 1.0])


def put(path, array, affine=AFFINE):
    path.parent.mkdir(exist_ok=True, parents=True)
    nib.save(nib.Nifti1Image(np.asarray(array, np.uint8), affine), path)


def run(folder, *options):
    return commands.main(["evaluate", str(folder / "out"), str(folder / "labelsTr"), *options])


@pytest.fixture
def folder(tmp_path):
    """Three cases of which one lacks class 2, in files whose axes run (R, A, S)."""
    rng = np.random.default_rng(0)
    for case in ("a", "b", "c"):
        for name in ("out", "labelsTr"):
            array = rng.integers(0, 3, (9, 8, 7))
            if case == "b":
                array[array == 2] = 0
            if case == "c" and name == "out":
                array[array == 2] = 1
            if case == "a" and name == "out":
                array = array[..., None]  # some programs keep an axis of channels
            put(tmp_path / name / f"{case}.nii.gz", array)
    put(tmp_path / "out" / "._a.nii.gz", np.zeros((2, 2, 2)))
    return tmp_path


def test_every_figure_is_that_of_the_functions(folder, capsys):
    assert run(folder, "--tolerance", "1.5") == 0
    told = json.loads((folder / "out" / "metrics.json").read_text("utf-8"))
    with open(folder / "out" / "metrics.csv", newline="") as file:
        rows = {(row.pop("case"), row.pop("class")): row for row in csv.DictReader(file)}
    assert set(told) == {"tolerance_mm", "cases", "mean", "counts", "missing"}
    assert told["tolerance_mm"] == 1.5 and told["missing"] == []
    assert list(rows) == [(f"{case}.nii.gz", f"class {n}") for case in "abc" for n in (1, 2)]
    for (case, name), row in rows.items():
        p, r = (np.asarray(nib.load(folder / part / case).dataobj).reshape(9, 8, 7) == int(name[-1])
                for part in ("out", "labelsTr"))
        spacing = (0.8, 0.7, 2.5)
        want = {"dice": metrics.dice(p, r), "iou": metrics.iou(p, r),
                "surface_dice": metrics.surface_dice(p, r, spacing, 1.5),
                "hausdorff95": metrics.hausdorff95(p, r, spacing),
                "mean_surface_distance": metrics.mean_surface_distance(p, r, spacing),
                "prediction_ml": metrics.volume(p, spacing),
                "reference_ml": metrics.volume(r, spacing)}
        assert row.keys() == want.keys() == told["cases"][case][name].keys()
        for measure, value in want.items():
            assert float(row[measure]) == pytest.approx(value, rel=1e-6, nan_ok=True)
            kept = told["cases"][case][name][measure]
            assert kept == (pytest.approx(value, rel=1e-6) if math.isfinite(value) else None)
    finite = told["cases"]["a.nii.gz"]["class 2"]["hausdorff95"]
    assert told["mean"]["class 2"]["hausdorff95"] == finite
    assert told["counts"]["class 2"] == {"cases": 3, "empty_predictions": 2,
                                         "empty_references": 1, "infinite_distances": 1}
    printed = capsys.readouterr().out
    assert f"{told['mean']['class 1']['dice']:.3f}" in printed and "1.5 mm" in printed
    assert "class 2: empty in 2 predictions and 1 references of 3; " in printed


def test_names_and_the_default_tolerance(folder, capsys):
    (folder / "dataset.json").write_text('{"labels": {"0": "background", "1": "pancreas",'
                                         ' "2": "cancer", "3": "duct"}}')
    assert run(folder) == 0
    told = json.loads((folder / "out" / "metrics.json").read_text("utf-8"))
    assert told["tolerance_mm"] == 5.0
    assert list(told["mean"]) == ["pancreas", "cancer", "duct"]
    assert told["mean"]["duct"]["dice"] is None and told["counts"]["duct"]["cases"] == 3
    put(folder / "out" / "b.nii.gz", np.full((9, 8, 7), 9))
    assert run(folder) == 0
    told = json.loads((folder / "out" / "metrics.json").read_text("utf-8"))
    assert told["cases"]["b.nii.gz"]["class 9"]["dice"] == 0
    assert told["cases"]["a.nii.gz"]["class 9"]["dice"] is None
    capsys.readouterr()


@pytest.mark.parametrize("content", ["", "[]", '{"labels": []}', '{"labels": {"a": "b"}}', "{}",
                                     '{"labels": {"1": "organ", "2": "organ"}}'])
def test_a_damaged_description_is_named(folder, content, capsys):
    (folder / "dataset.json").write_text(content)
    assert run(folder) == 1
    assert "dataset.json" in capsys.readouterr().err


def test_what_it_refuses(folder, capsys):
    def error(*options):
        assert run(folder, *options) == 1
        assert not list((folder / "out").glob("metrics.*"))
        return capsys.readouterr().err

    moved = AFFINE.copy()
    moved[0, 3] = 0.5
    whole = (folder / "out" / "b.nii.gz").read_bytes()
    put(folder / "out" / "b.nii.gz", np.zeros((9, 8, 7)), moved)
    told = error()
    assert "0.5 mm" in told and "out/b.nii.gz" in told and "labelsTr/b.nii.gz" in told
    moved[0, 3] = 0.0005
    put(folder / "out" / "b.nii.gz", np.zeros((9, 7, 7)), moved)
    told = error()
    assert "(9, 7, 7)" in told and "out/b.nii.gz" in told and "labelsTr/b.nii.gz" in told
    put(folder / "out" / "b.nii.gz", np.zeros((9, 8, 7, 2)))
    assert "out/b.nii.gz" in error()
    put(folder / "out" / "d.nii.gz", np.zeros((9, 8, 7)))
    told = error()
    assert "1 of 4" in told and "d.nii.gz" in told
    (folder / "out" / "d.nii.gz").unlink()
    (folder / "out" / "b.nii.gz").write_bytes(whole)
    for tolerance in ("-1", "nan", "inf", "much"):
        with pytest.raises(SystemExit) as stop:
            run(folder, "--tolerance", tolerance)
        assert stop.value.code == 2
    assert "--tolerance" in capsys.readouterr().err
    assert run(folder) == 0


def test_references_without_a_prediction_are_named_and_counted(folder, capsys):
    (folder / "out" / "b.nii.gz").unlink()
    assert run(folder) == 1
    told = capsys.readouterr()
    assert "2 of 3 references" in told.out and "b.nii.gz" in told.err
    content = json.loads((folder / "out" / "metrics.json").read_text("utf-8"))
    assert content["missing"] == ["b.nii.gz"] and set(content["cases"]) == {"a.nii.gz", "c.nii.gz"}
    assert run(folder, "--missing", "ignore") == 0
    assert "b.nii.gz" in capsys.readouterr().err


def test_the_table_is_printed_before_files_are_written_and_they_may_go_elsewhere(folder, capsys,
                                                                                 monkeypatch):
    elsewhere = folder / "new" / "place"
    assert run(folder, "--out", str(elsewhere)) == 0
    assert {p.name for p in elsewhere.iterdir()} == {"metrics.csv", "metrics.json"}
    assert not (folder / "out" / "metrics.csv").exists()
    capsys.readouterr()

    def refuse(path, *content):
        raise PermissionError(13, "cannot be written: Permission denied", str(path))

    monkeypatch.setattr(commands.report, "write_table", refuse)
    assert run(folder) == 1
    told = capsys.readouterr()
    assert "class 1" in told.out and "0.330" in told.out
    assert "metrics.csv" in told.err and "--out names another place" in told.err


def test_what_is_no_folder_of_label_maps_is_told_as_such(folder, tmp_path, capsys):
    file = folder / "out" / "a.nii.gz"
    (tmp_path / "empty").mkdir()
    for predictions, labels, said in ((file, folder / "labelsTr", "is a file"),
                                      (tmp_path / "nowhere", folder / "labelsTr", "no such folder"),
                                      (folder / "out", tmp_path / "nowhere", "no such folder"),
                                      (tmp_path / "empty", folder / "labelsTr", "holds no .nii")):
        assert commands.main(["evaluate", str(predictions), str(labels)]) == 1
        wrong = predictions if predictions != folder / "out" else labels
        assert f"{wrong}: {said}" in capsys.readouterr().err


def test_what_lies_beside_label_maps_is_no_prediction(folder):
    (folder / "out" / "a.nii.gz.json").write_text("{}")
    (folder / "out" / "c.nii").mkdir()
    assert run(folder) == 0
