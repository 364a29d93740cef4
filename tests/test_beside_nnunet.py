"""benchmarks/beside_nnunet.py as far as it goes without nnU-Net: conversion, resuming, the picture,
the job's times, and the clock that ends nnU-Net's training."""

import csv
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure

from tinyseg.data import decathlon, nifti, phantom

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import beside_nnunet as beside  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the script needs Linux")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return phantom.write(tmp_path_factory.mktemp("data"), cases=6, seed=1, shape=(6, 22, 19))


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    monkeypatch.setattr(beside, "WORK", tmp_path / "work")
    monkeypatch.setattr(beside, "HOME", tmp_path / "environment")
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)


def same(converted, dataset):
    """Whether two data sets have the same cases, classes, channels and voxels."""
    assert [case.id for case in converted.cases] == [case.id for case in dataset.cases]
    assert (converted.labels, converted.modalities) == (dataset.labels, dataset.modalities)
    for one, other in zip(converted.cases, dataset.cases, strict=True):
        (scan, truth), (first, labels) = one.read(), other.read()
        np.testing.assert_array_equal(scan.array, first.array)
        np.testing.assert_array_equal(truth, labels)
        np.testing.assert_allclose(scan.affine, first.affine)
    return True


def test_a_converted_folder_is_the_same_data_set(data, tmp_path):
    dataset = decathlon.load(data)
    beside.convert(dataset, tmp_path)
    assert same(decathlon.load(tmp_path / "raw/Dataset001_Beside"), dataset)


def test_channels_in_one_file_become_files_of_their_own(tmp_path):
    rng, source = np.random.default_rng(0), tmp_path / "source"
    affine = np.diag([1.5, 0.7, 3, 1])
    for part in ("imagesTr", "labelsTr"):
        (source / part).mkdir(parents=True)
    for name in ("a", "b"):
        image = rng.standard_normal((4, 5, 6, 3)).astype("float32")
        nib.save(nib.Nifti1Image(image, affine), source / f"imagesTr/{name}.nii")
        truth = rng.integers(0, 2, (4, 5, 6), "uint8")
        nib.save(nib.Nifti1Image(truth, affine), source / f"labelsTr/{name}.nii")
    (source / "dataset.json").write_text(json.dumps({
        "modality": {"0": "T1", "1": "T2", "2": "FLAIR"}, "labels": {"0": "nothing", "1": "x"},
        "training": [{"image": f"./imagesTr/{c}.nii", "label": f"./labelsTr/{c}.nii"}
                     for c in "ab"]}), encoding="utf-8")
    dataset = decathlon.load(source)
    beside.convert(dataset, tmp_path)
    converted = decathlon.load(tmp_path / "raw/Dataset001_Beside")
    assert converted.labels == {0: "background", 1: "x"}  # nnU-Net insists on the word
    converted.labels[0] = "nothing"
    assert same(converted, dataset) and len(converted.cases[0].further) == 2


def test_labels_that_nnunet_does_not_take_are_refused_before_anything_is_written(tmp_path):
    dataset = SimpleNamespace(name="Spleen", labels={0: "background", 2: "spleen"}, cases=())
    with pytest.raises(ValueError, match=r"Spleen: found the labels \[0, 2\], expected 0 to 1"):
        beside.convert(dataset, tmp_path)
    assert not list(tmp_path.iterdir())


def stub(share, ran, fails=()):
    """A side whose predictions have the first `share` of each class's voxels, and no others."""
    def run(data, out, minutes, seed, held_out):
        ran.append((minutes, seed))
        if (minutes, seed) in fails:
            raise RuntimeError("the power went")
        (out / "predictions").mkdir()
        for case in decathlon.load(data).cases:
            scan, truth = case.read()
            kept = np.zeros_like(truth)
            for number in (1, 2):
                places = np.flatnonzero(truth == number)
                kept.flat[places[: round(share(minutes) * len(places))]] = number
            nifti.write(out / f"predictions/{case.id}.nii.gz", kept, scan)
        return {"version": "0", "steps": 7, "training": 59 * minutes + seed, "before": 2.0,
                "after": 3.0}

    return run


def rows(out):
    with open(out / "beside_nnunet_phantom.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_an_interrupted_benchmark_goes_on_where_it_was(data, tmp_path, monkeypatch, capsys):
    command = ["--data", str(data), "--minutes", "4", "2", "--seeds", "2", "--out", str(tmp_path)]
    ours, theirs = [], []
    monkeypatch.setattr(beside, "SIDES", {"tinyseg": stub(lambda m: 1.0, ours, [(2, 1)]),
                                          "nnunet": stub(lambda m: m / 8, theirs)})
    assert beside.main(command) == 1
    assert "the power went" in capsys.readouterr().err
    assert (ours, theirs) == ([(2, 0), (2, 1)], [(2, 0)])
    assert [(row["side"], row["minutes"], row["seed"]) for row in rows(tmp_path)] == [
        ("tinyseg", "2", "0"), ("nnunet", "2", "0")]

    monkeypatch.setitem(beside.SIDES, "tinyseg", stub(lambda m: 1.0, ours))
    assert beside.main([*command, "--keep"]) == 0
    assert ours[2:] == [(2, 1), (4, 0), (4, 1)] and theirs[1:] == [(2, 1), (4, 0), (4, 1)]
    found = rows(tmp_path)
    assert [row["mean Dice"] for row in found if row["side"] == "tinyseg"] == ["1.0"] * 4
    # A share s of the voxels and no others: 2 s / (1 + s), to the rounding of their number.
    for row in (row for row in found if row["side"] == "nnunet"):
        share = float(row["minutes"]) / 8
        assert float(row["Dice pancreas"]) == pytest.approx(2 * share / (1 + share), abs=0.02)
    assert {(row["training cases"], row["held-out cases"]) for row in found} == {("4", "2")}
    kept = {path.name for path in (tmp_path / "work").iterdir() if path.is_dir()}
    assert kept == {f"run_phantom_{side}_{run}" for side in beside.SIDES
                    for run in ("2_1", "4_0", "4_1")}  # --keep was not said of the first ones

    assert beside.main(command) == 0
    assert len(ours) == 5 and rows(tmp_path) == found


def test_another_machine_has_runs_and_a_picture_of_its_own(data, tmp_path, monkeypatch):
    command = ["--data", str(data), "--minutes", "3", "--only", "tinyseg", "--out", str(tmp_path)]
    ran, drawn = [], []
    monkeypatch.setattr(beside, "SIDES", {"tinyseg": stub(lambda m: 1.0, ran)})
    monkeypatch.setattr(beside, "draw", lambda path, rows, title: drawn.append((rows, title)))
    for name in ("old, family 1", "new, family 2", "new, family 2"):
        monkeypatch.setattr(beside, "machine", lambda name=name: name)
        assert beside.main(command) == 0
    assert ran == [(3, 0)] * 2
    assert [row["machine"] for row in rows(tmp_path)] == ["old, family 1", "new, family 2"]
    assert all([row["machine"] for row in mine] == [title.partition("cores of ")[2]]
               for mine, title in drawn)


def test_wrong_options_run_nothing(data, tmp_path, capsys):
    for wrong in (["--minutes", "0"], ["--minutes", "5", "--seeds", "0"],
                  ["--minutes", "5", "--cases", "0"], []):
        with pytest.raises(SystemExit):
            beside.main(["--data", str(data), "--out", str(tmp_path / "out"), *wrong])
    capsys.readouterr()
    assert beside.main(["--data", str(tmp_path), "--minutes", "5"]) == 1
    assert f"{tmp_path / 'dataset.json'}: no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_curves_go_through_the_means_over_seeds(tmp_path, monkeypatch):
    table = [{"side": side, "minutes": str(minutes), "seed": str(seed),
              "seconds training": str(60 * minutes + 6 * seed),
              "mean Dice": str(base + minutes / 100 + seed / 50),
              "Dice left": str(base), "Dice right": str(base + minutes / 50 + seed / 25)}
             for side, base in (("nnunet", 0.3), ("tinyseg", 0.5))
             for minutes in (10, 5) for seed in (1, 0) if (side, minutes) != ("nnunet", 5)]
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (
        drawn.append(figure), path.write_bytes(b"png")))
    beside.draw(tmp_path / "x.png", table, "a title")
    lines = [{line.get_label(): line.get_xydata() for line in panel.lines
              if line.get_linestyle() != "None"} for panel in drawn[0].axes]
    assert [list(panel) for panel in lines] == [
        ["mean Dice, tinyseg", "mean Dice, nnU-Net"],
        ["left, tinyseg", "right, tinyseg", "left, nnU-Net", "right, nnU-Net"]]
    np.testing.assert_allclose(lines[0]["mean Dice, tinyseg"], [(5.05, 0.56), (10.05, 0.61)])
    np.testing.assert_allclose(lines[1]["right, nnU-Net"], [(10.05, 0.52)])
    points = [line for line in drawn[0].axes[1].lines if line.get_linestyle() == "None"]
    assert sum(len(line.get_xydata()) for line in points) == 2 * len(table)
    assert (tmp_path / "x.png").read_bytes() == b"png"


NNUNET = """#!{python}
# A stand-in for nnU-Net's three commands: notes what it is told, and knows the truth.
import json, os, shutil, sys
from pathlib import Path

command = Path(sys.argv[0]).name.removeprefix("nnUNetv2_")
results = Path(os.environ["nnUNet_results"])
told = {{key: os.environ[key] for key in ("nnUNet_n_proc_DA", "nnUNet_compile", "OMP_NUM_THREADS",
                                        "MINUTES", "SEED")}}
with open(Path(os.environ["nnUNet_raw"]).parent / "told.jsonl", "a") as file:
    print(json.dumps([command, sys.argv[1:], told]), file=file)
if command == "plan_and_preprocess":
    Path(os.environ["nnUNet_preprocessed"], "Dataset001_Beside").mkdir(parents=True)
if command == "train":
    fold = results / "Dataset001_Beside/trainer/fold_0"
    fold.mkdir(parents=True)
    (fold / "clock.json").write_text('{{"seconds": 58.5, "iterations": 7}}')
if command == "predict":
    source, target = (Path(sys.argv[sys.argv.index(word) + 1]) for word in ("-i", "-o"))
    target.mkdir()
    for scan in source.iterdir():
        name = scan.name.replace("_0000", "")
        shutil.copy(Path(os.environ["nnUNet_raw"], "Dataset001_Beside/labelsTr", name), target)
"""


def test_nnunet_plans_once_and_holds_out_the_same_cases(data, tmp_path, monkeypatch):
    (tmp_path / "environment/bin").mkdir(parents=True)
    for command in ("plan_and_preprocess", "train", "predict"):
        script = tmp_path / f"environment/bin/nnUNetv2_{command}"
        script.write_text(NNUNET.format(python=sys.executable), encoding="utf-8")
        script.chmod(0o755)
    monkeypatch.setattr(beside, "install", lambda: None)
    held_out = decathlon.folds([case.id for case in decathlon.load(data).cases])[0][1]
    for seed, most in ((0, None), (1, 1)):
        row = beside.measure("nnunet", data, tmp_path / f"run{seed}", 2.5, seed, most)
        scans = sorted(path.name for path in (tmp_path / f"run{seed}/held_out").iterdir())
        assert scans == sorted(f"{case}_0000.nii.gz" for case in held_out[:most])
        assert row["held-out cases"] == len(scans) == (most or 2)
        assert (row["mean Dice"], row["steps"], row["seconds training"]) == (1, 7, 58.5)
    folder, = (tmp_path / "work").iterdir()
    told = [json.loads(line) for line in (folder / "told.jsonl").read_text("utf-8").splitlines()]
    assert [command for command, *_ in told] == ["plan_and_preprocess", "train", "predict",
                                                 "train", "predict"]
    assert {(variables["MINUTES"], variables["nnUNet_n_proc_DA"], variables["OMP_NUM_THREADS"],
             variables["nnUNet_compile"]) for *_, variables in told} == {("2.5", "2", "2", "f")}
    assert [variables["SEED"] for *_, variables in told] == ["0", "0", "0", "1", "1"]
    assert told[1][1] == ["1", "3d_fullres", "0", "-tr", "nnUNetTrainerByTheClock",
                          "-device", "cpu"]
    assert not {"--disable_tta", "-step_size"} & {*told[2][1]}
    splits = json.loads((folder / "preprocessed/Dataset001_Beside/splits_final.json").read_text())
    assert [(split["train"], split["val"]) for split in splits] == decathlon.folds(
        [case.id for case in decathlon.load(data).cases])


JOB = """
import sys
from pathlib import Path

words = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
assert words.keys() == {"--data", "--minutes", "--seed", "--out"}, words
out = Path(words["--out"])
(out / "history.csv").write_text("stage,step,seconds\\n2d,0,0.25\\n2d,1,0.5\\n3d,0,0.125\\n")
(out / "model_3d.npz").write_bytes(b"")
print("minutes", words["--minutes"], "seed", words["--seed"])
sys.exit(int(words["--seed"]) // 9)
"""


def test_the_job_is_asked_for_minutes_and_its_steps_are_what_counts(tmp_path, monkeypatch):
    (tmp_path / "job.py").write_text(JOB, encoding="utf-8")
    monkeypatch.setattr(beside, "JOB", tmp_path / "job.py")
    told = beside.tinyseg(tmp_path, tmp_path, 2.5, 3, [])
    assert (told["steps"], told["training"]) == (3, 0.875)
    assert (tmp_path / "log.txt").read_text("utf-8") == "minutes 2.5 seed 3\n"
    with pytest.raises(RuntimeError, match=r"(?s)exit code 1 of .*job\.py.*minutes 5 seed 9"):
        beside.tinyseg(tmp_path, tmp_path, 5, 9, [])


@pytest.mark.parametrize("budget, took, iterations", [
    (60, 7.0, 9),  # 63 s lie nearer to the minute than 56
    (60, 7.9, 8),  # 63.2 s nearer than 55.3
    (60, 8.1, 7),  # 56.7 s nearer than 64.8
    (60, 200.0, 1),
    (300, 1.5, 200),
])
def test_nnunets_training_ends_nearest_to_its_minutes_with_its_schedule_complete(
        budget, took, iterations, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    now, rates, calls = [100.0], [], []

    class Trainer:
        """nnU-Net's, as far as the clock uses it; a step takes `took` seconds, a third waiting."""

        initial_lr, output_folder = 0.01, tmp_path
        optimizer = SimpleNamespace(param_groups=[{"lr": None}])
        network = SimpleNamespace(train=lambda: calls.append("train"))

        def on_train_start(self):
            calls.append("start")
            now[0] += 1000
            self.dataloader_train = self.batches()

        def batches(self):
            while True:
                now[0] += took / 3
                yield {"data": np.empty((7, 1, 2, 3, 4))}

        def train_step(self, batch):
            rates.append(self.optimizer.param_groups[0]["lr"])
            now[0] += 2 * took / 3
            return {"loss": np.float32(0.5)}

        def on_train_end(self):
            calls.append("end")

    name = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
    for depth in range(1, 5):
        part = ".".join(name.split(".")[:depth])
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    sys.modules[name].nnUNetTrainer = Trainer
    import torch

    threads = torch.get_num_threads()
    for key, value in (("OMP_NUM_THREADS", threads), ("MINUTES", budget / 60), ("SEED", 0)):
        monkeypatch.setenv(key, str(value))
    monkeypatch.delitem(sys.modules, "nnunet_by_the_clock", raising=False)
    import nnunet_by_the_clock

    monkeypatch.setattr(nnunet_by_the_clock, "perf_counter", lambda: now[0])
    nnunet_by_the_clock.nnUNetTrainerByTheClock().run_training()
    told = json.loads((tmp_path / "clock.json").read_text("utf-8"))
    assert calls == ["start", "train", "end"]
    assert told["iterations"] == len(rates) == iterations
    assert told["seconds"] == pytest.approx(iterations * took)
    assert told["waited"] == pytest.approx(iterations * took / 3)
    assert told["batch"] == [7, 1, 2, 3, 4]
    elapsed = took * np.arange(iterations)
    np.testing.assert_allclose(rates, 0.01 * (1 - elapsed / budget) ** 0.9)
