"""The main job as a user runs it, on a phantom of a few thousand voxels; and its commands."""

import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import tinyseg as ts
from tinyseg import __main__ as commands
from tinyseg.data import decathlon, phantom

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_pancreas_3d.py"
SMALL = ["--patch", "12", "24", "32", "--steps-2d", "4", "--steps-3d", "3", "--batch", "1",
         "--folds", "2", "--seed", "3", "--head", "linear", "--spacing", "5", "3.6", "3.5",
         "--augment", "mild"]
FILES = {"model_2d.npz", "model_3d.npz", "history.csv", "metrics.json", "progress.png",
         "checkpoint.npz", "run.json", "plan.json", "predictions", "predictions_2d",
         "predictions_ensemble", "prepared", "report.html"}


@pytest.fixture(scope="module", autouse=True)
def small_and_quick():
    """One block a layer: the same code at a third of the arithmetic. And no waiting for the disk:
    nothing here outlives a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        patch.setitem(ts.models.BACKBONES, "resnet18", ((1, 1, 1, 1), False))
        yield


spec = importlib.util.spec_from_file_location("train_pancreas_3d", SCRIPT)
job = importlib.util.module_from_spec(spec)
spec.loader.exec_module(job)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return phantom.write(tmp_path_factory.mktemp("task"), 4, 1, (14, 40, 44), (5, 3.6, 3.5))


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert job.main(["--data", str(data), "--out", str(out), *SMALL]) == 0
    return out


def test_a_run_leaves_what_it_promises(done, data):
    assert FILES <= {p.name for p in done.iterdir()}
    assert list(done.glob("overlay_*.png"))
    for picture in done.glob("*.png"):
        assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 10_000
    metrics = json.loads((done / "metrics.json").read_text("utf-8"))
    dataset = decathlon.load(data)
    _, held_out = decathlon.folds([c.id for c in dataset.cases], 2)[0]
    assert 0 <= metrics["equivalence"]["max_abs_difference"] < 1e-4
    for model in ("2d", "3d", "ensemble"):
        cases = metrics["models"][model]["cases"]
        assert set(cases) == set(held_out)
        for scores in [*cases.values(), metrics["models"][model]["mean"]]:
            assert set(scores) == {"pancreas", "cancer"}
            assert all(0 <= scores[c][m] <= 1 for c in scores for m in ("dice", "iou"))
    with open(done / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["stage"], r["step"]) for r in rows] == [
        *(("2d", str(i)) for i in range(4)), *(("3d", str(i)) for i in range(3))]


def test_predictions_lie_on_the_scans_grid_and_score_as_told(done, data, capsys):
    metrics = json.loads((done / "metrics.json").read_text("utf-8"))["models"]["3d"]["cases"]
    for path in (done / "predictions").iterdir():
        scan, map_ = nib.load(data / "imagesTr" / path.name), nib.load(path)
        assert map_.shape == scan.shape and (map_.affine == scan.affine).all()
        truth = np.asarray(nib.load(data / "labelsTr" / path.name).dataobj)
        mine = np.asarray(map_.dataobj)
        for number, name in ((1, "pancreas"), (2, "cancer")):
            p, t = mine == number, truth == number
            want = 2 * (p & t).sum() / (p.sum() + t.sum())
            assert metrics[path.name.removesuffix(".nii.gz")][name]["dice"] == pytest.approx(want)
    shutil.copytree(done / "predictions", done / "copy")
    words = ["evaluate", str(done / "copy"), str(data / "labelsTr"), "--missing", "ignore"]
    assert commands.main(words) == 0  # the other references were trained on
    told = json.loads((done / "copy" / "metrics.json").read_text("utf-8"))["cases"]
    for name, scores in metrics.items():
        assert told[f"{name}.nii.gz"]["pancreas"].items() >= scores["pancreas"].items()


def test_predict_command_repeats_the_evaluation(done, data, tmp_path, capsys):
    path = next((done / "predictions").iterdir())
    out = tmp_path / "out.nii.gz"
    scan = data / "imagesTr" / path.name
    words = ["predict", "--mirror", str(done / "model_3d.npz"), str(scan), str(out)]
    assert commands.main(words) == 0
    same = np.asarray(nib.load(out).dataobj) == np.asarray(nib.load(path).dataobj)
    assert same.all()
    assert commands.main([*words, "--with", str(done / "model_2d.npz")]) == 0
    both = nib.load(done / "predictions_ensemble" / path.name)
    assert (np.asarray(nib.load(out).dataobj) == np.asarray(both.dataobj)).all()
    assert commands.main(["inspect", str(done / "model_2d.npz")]) == 0
    assert '"rank": 2' in capsys.readouterr().out


def test_models_are_an_inflated_pair(done):
    flat, deep = ts.load(done / "model_2d.npz"), ts.load(done / "model_3d.npz")
    assert flat.config["rank"] == 2 and deep.config["rank"] == 3
    assert list(flat.state()) == list(deep.state())
    decided = json.loads((done / "plan.json").read_text("utf-8"))
    assert flat.metadata["patch"] == decided["patch_2d"]
    assert flat.metadata["labels"]["2"] == "cancer"
    assert deep.metadata == {**flat.metadata, "patch": [12, 24, 32]}


@pytest.mark.parametrize("stage, step", [("2d", 2), ("3d", 0), ("3d", 2)])
def test_interrupted_and_resumed_equals_uninterrupted(undrawn, done, data, tmp_path, monkeypatch,
                                                      stage, step):
    fit = ts.train.fit

    def interrupted(net, *args, **options):
        for record in fit(net, *args, **options):
            rank = f"{net.config['rank']}d"
            yield record
            if (rank, record.step) == (stage, step):
                raise KeyboardInterrupt

    out = tmp_path / "run"
    monkeypatch.setattr(ts.train, "fit", interrupted)
    assert job.main(["--data", str(data), "--out", str(out), *SMALL]) == 130
    assert (out / "checkpoint.npz").exists() and not (out / "metrics.json").exists()
    monkeypatch.setattr(ts.train, "fit", fit)
    assert job.main(["--resume", "--out", str(out)]) == 0
    for name in ("model_2d.npz", "model_3d.npz"):
        ours, theirs = ts.load(out / name).state(), ts.load(done / name).state()
        assert all((ours[key] == theirs[key]).all() for key in theirs), name
    mine, whole = (json.loads((o / "metrics.json").read_bytes())["models"] for o in (out, done))
    assert mine == whole


def test_sigint_exits_130_with_a_checkpoint(data, tmp_path):
    out = tmp_path / "run"
    steps = ["--steps-2d", "100000", "--steps-3d", "1"]
    # A parent in the background ignores SIGINT, and children inherit that.
    process = subprocess.Popen([sys.executable, SCRIPT, "--data", data, "--out", out, *SMALL[:4],
                                *steps, *SMALL[8:]], stderr=open(tmp_path / "told", "w"),
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def read_some():
        return (tmp_path / "told").read_text("utf-8")

    try:
        deadline = time.monotonic() + 60
        while "loss" not in read_some() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert "stopping after this step" in read_some() and "--resume" in read_some()
    finally:
        process.kill()
    assert (out / "checkpoint.npz").exists() and (out / "progress.png").exists()


def test_a_loss_that_is_not_finite_keeps_the_last_good_step(data, tmp_path, monkeypatch, capsys):
    fit = ts.train.fit

    def poisoned(net, batch, *args, **options):
        def bad(step, *how):
            images, labels = batch(step)
            return (images * np.nan if step == 2 else images), labels
        return fit(net, bad, *args, **options)

    monkeypatch.setattr(ts.train, "fit", poisoned)
    assert job.main(["--data", str(data), "--out", str(tmp_path / "run"), *SMALL]) == 1
    assert "loss nan" in (told := capsys.readouterr().err) and "step 2" in told
    arrays, told = ts.checkpoint.read(tmp_path / "run" / "checkpoint.npz")
    assert told["step"] == 2
    assert all(np.isfinite(a).all() for a in arrays.values())


def copy_of(data, tmp_path):
    return Path(shutil.copytree(data, tmp_path / "task"))


def broken_label(folder, change):
    path = sorted((folder / "labelsTr").glob("*.nii.gz"))[0]
    image = nib.load(path)
    nib.save(change(np.asarray(image.dataobj), image.affine.copy()), path)
    return path.name


def test_bad_data_is_named_and_nothing_is_trained(data, tmp_path, capsys):
    def truncated(folder):
        path = sorted((folder / "imagesTr").glob("[!.]*.nii.gz"))[1]
        path.write_bytes(path.read_bytes()[:-900])
        return path.name

    def shape(folder):
        return broken_label(folder, lambda a, m: nib.Nifti1Image(a[1:], m))

    def affine(folder):
        shift = 3 * np.outer(np.eye(4)[0], np.eye(4)[3])
        return broken_label(folder, lambda a, m: nib.Nifti1Image(a, m + shift))

    def label(folder):
        return broken_label(folder, lambda a, m: nib.Nifti1Image(a + 5, m))

    for number, damage in enumerate((truncated, shape, affine, label)):
        folder = copy_of(data, tmp_path / str(number))
        name = damage(folder)
        out = tmp_path / f"out{number}"
        assert job.main(["--data", str(folder), "--out", str(out), *SMALL]) == 1
        assert name in capsys.readouterr().err
        assert not list(out.glob("model*"))


def test_wrong_arguments(data, done, tmp_path, capsys):
    for words, told in (
            (["--batch", "0"], "batch"), (["--fold", "5"], "--fold"), (["--seed", "-1"], "seed"),
            (["--device", "tpu"], "--device"), (["--patch", "1", "2"], "--patch"),
            (["--spacing", "1", "0", "1"], "--spacing"), (["--data", str(data)], "--resume"),
            (["--pretrained", "no.pth", "--out", str(tmp_path / "new")], "no.pth")):
        with pytest.raises(SystemExit) as caught:
            job.main(["--out", str(done), *words])
        assert caught.value.code == 2 and told in capsys.readouterr().err
    new = ["--out", str(tmp_path / "a")]
    assert job.main(["--data", str(tmp_path), *new]) == 1
    assert "dataset.json" in capsys.readouterr().err
    assert job.main(["--data", str(data), *new, *SMALL, "--folds", "9"]) == 1
    assert "9 folds for 4 cases" in capsys.readouterr().err
    # The same command, put right, is a new run.
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["run.lock"]
    wrong = tmp_path / "wrong.npz"
    ts.save(wrong, ts.models.resnet_seg(rank=2, in_channels=2, classes=3))
    assert job.main(["--data", str(data), "--out", str(tmp_path / "b"), "--pretrained", str(wrong),
                     *SMALL]) == 1
    assert "conv1.weight" in capsys.readouterr().err
    run = subprocess.run([sys.executable, SCRIPT, "--data", tmp_path / "none", "--out",
                          tmp_path / "c"], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and "none" in run.stderr
    assert commands.main(["predict", str(wrong), "scan.nii.gz", "out.nii.gz"]) == 1
    assert commands.main(["evaluate", str(tmp_path), str(tmp_path)]) == 1


def begun(data, out, *words):
    """A run that was stopped after its first step on volumes."""
    assert job.main(["--data", str(data), "--out", str(out), *SMALL, *words]) == 0
    (out / "metrics.json").unlink()


def relabelled(folder, table, **description):
    """The folder with its label numbers changed, and its dataset.json."""
    for path in (folder / "labelsTr").glob("[!.]*.nii.gz"):
        image = nib.load(path)
        label = np.array(table, np.min_scalar_type(max(table)))[np.asarray(image.dataobj)]
        nib.save(nib.Nifti1Image(label, image.affine), path)
    told = json.loads((folder / "dataset.json").read_text("utf-8"))
    (folder / "dataset.json").write_text(json.dumps(told | description))
    return folder


@pytest.mark.parametrize("numbers", [(0, 1, 4), (0, 63, 252)])
def test_label_numbers_with_gaps_are_those_of_the_predictions(undrawn, data, done, tmp_path,
                                                              numbers):
    labels = dict(zip(map(str, numbers), ("background", "pancreas", "cancer"), strict=True))
    folder = relabelled(copy_of(data, tmp_path), numbers, labels=labels)
    out = tmp_path / "run"
    assert job.main(["--data", str(folder), "--out", str(out), *SMALL]) == 0
    one, other = (json.loads((o / "metrics.json").read_text("utf-8")) for o in (out, done))
    assert one["models"] == other["models"]
    assert ts.load(out / "model_3d.npz").config["classes"] == 3
    for path in (out / "predictions").iterdir():
        mine, theirs = (np.asarray(nib.load(o / "predictions" / path.name).dataobj)
                        for o in (out, done))
        np.testing.assert_array_equal(mine, np.array(numbers)[theirs])


def test_a_network_that_saw_no_mirror_image_is_not_asked_about_one(undrawn, data, tmp_path, capsys):
    assert job.main(["--data", str(data), "--out", str(tmp_path), *SMALL[:-2], "--steps-2d", "0",
                     "--steps-3d", "0", "--folds", "4", "--score-mirrored"]) == 0
    assert "none is varied, so nothing is mirrored\n" in capsys.readouterr().out
    decided, metrics = (json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
                        for name in ("plan", "metrics"))
    assert decided["augmentation"] == "none" and decided["preprocessing"]["mirror"] is None
    assert ts.load(tmp_path / "model_2d.npz").metadata["plan"]["mirror"] is None
    assert metrics["scoring"]["mean_with_mirror_image"] is False


def test_what_is_mirrored_is_told_and_kept_with_the_network(undrawn, data, tmp_path, capsys):
    sided = relabelled(copy_of(data, tmp_path), (0, 1, 2), labels={
        "0": "background", "1": "left kidney", "2": "right kidney"})
    one = copy_of(sided, tmp_path / "one")
    relabelled(one, (0, 1, 2), labels={"0": "background", "1": "left kidney", "2": "spleen"})
    steps = [*SMALL, "--steps-2d", "0", "--steps-3d", "0", "--folds", "4", "--score-mirrored"]
    for number, (folder, words, plan, told) in enumerate((
            (data, [], [], "patches may be mirrored left-right\\n"),
            (sided, [], [["left kidney", "right kidney"]], "left kidney and right kidney then"),
            (sided, ["--mirror", "none"], None, "nothing is mirrored\\n"),
            (one, [], None, "left kidney has a side and no partner"),
            (one, ["--mirror", "2=left kidney"], [["spleen", "left kidney"]], "spleen and left"))):
        out = tmp_path / str(number)
        assert job.main(["--data", str(folder), "--out", str(out), *steps, *words]) == 0
        assert told.replace("\\n", "\n") in capsys.readouterr().out
        model, decided = out / "model_3d.npz", json.loads((out / "plan.json").read_text("utf-8"))
        assert decided["preprocessing"]["mirror"] == plan
        assert ts.load(model).metadata["plan"]["mirror"] == plan
        scoring = json.loads((out / "metrics.json").read_text("utf-8"))["scoring"]
        assert scoring["mean_with_mirror_image"] == (plan is not None)
        assert scoring["exchanged_classes"] == (plan or [])
        scan = next((folder / "imagesTr").glob("[!.]*.gz"))
        code = commands.main(["predict", "--mirror", str(model), str(scan),
                              str(tmp_path / "p.nii.gz")])
        assert code == int(plan is None)
        assert ("without left-right" in capsys.readouterr().err) == (plan is None)
    for words, said in ((["liver=pancreas"], "liver"), (["pancreas=pancreas"], "twice"),
                        (["1=2", "2=background"], "cancer")):
        assert job.main(["--data", str(data), "--out", str(tmp_path / "x"), *SMALL, "--mirror",
                         *words]) == 1
        assert said in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["run.lock"]  # nothing begun


def test_a_network_learns_left_from_right(undrawn, tmp_path):
    """Two organs alike but for their side. Shown in the mirror under their own names, they would
    be told apart by nothing."""
    task = tmp_path / "task"
    for part in ("imagesTr", "labelsTr"):
        (task / part).mkdir(parents=True)
    training = []
    for case in range(4):
        rng = np.random.default_rng(case)
        image, label = rng.normal(0, 10, (32, 24, 8)), np.zeros((32, 24, 8), np.uint8)
        for number, x in ((1, 8), (2, 23)):
            at = np.s_[x - 4 : x + 4, 6 + case % 3 : 18, 1:7]
            image[at] += 120
            label[at] = number
        paths = {part: f"./{part}sTr/c{case}.nii.gz" for part in ("image", "label")}
        for part, array in (("image", image.astype("int16")), ("label", label)):
            nib.save(nib.Nifti1Image(array, np.diag([3, 3, 5, 1.0])), task / paths[part])
        training.append(paths)
    (task / "dataset.json").write_text(json.dumps({
        "name": "Sides", "modality": {"0": "CT"}, "training": training,
        "labels": {"0": "background", "1": "left organ", "2": "right organ"}}))
    out = tmp_path / "run"
    assert job.main(["--data", str(task), "--out", str(out), "--patch", "8", "24", "32",
                     "--steps-2d", "60", "--steps-3d", "0", "--batch", "1", "--folds", "4",
                     "--head", "linear", "--spacing", "5", "3", "3"]) == 0
    scores = json.loads((out / "metrics.json").read_text("utf-8"))["models"]["2d"]["mean"]
    assert all(scores[name]["dice"] > 0.75 for name in ("left organ", "right organ")), scores


def test_a_label_corrected_since_the_run_began_is_named_and_nothing_goes_on(
        undrawn, data, tmp_path, capsys):
    folder, out = copy_of(data, tmp_path), tmp_path / "run"
    begun(folder, out)
    name = broken_label(folder, lambda a, m: nib.Nifti1Image(a * (a != 2), m))
    assert job.main(["--resume", "--out", str(out)]) == 1
    assert str(folder / "labelsTr" / name) in capsys.readouterr().err
    assert not (out / "metrics.json").exists()
    assert job.main(["--resume", "--out", str(out), "--data", str(data)]) == 0  # the old ones


def test_two_runs_share_no_folder(undrawn, data, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", f"""
import time
from pathlib import Path
from tinyseg import files
with files.held(Path({str(out)!r})):
    print("held", flush=True)
    time.sleep(100)"""], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert job.main(["--data", str(data), "--out", str(out), *SMALL]) == 1
        told = capsys.readouterr().err
        assert f"process {holder.pid} on " in told and str(out) in told
        assert not (out / "run.json").exists()
    finally:
        holder.kill()
        holder.wait()
    assert job.main(["--data", str(data), "--out", str(out), *SMALL[:3], "24", "--steps-2d", "0",
                     "--steps-3d", "0", *SMALL[-12:]]) == 0


def test_a_scan_of_one_slice_is_scored_and_drawn(data, tmp_path):
    folder, out = copy_of(data, tmp_path), tmp_path / "run"
    _, held_out = decathlon.folds([c.id for c in decathlon.load(folder).cases], 2)[0]
    for part in ("imagesTr", "labelsTr"):
        path = folder / part / f"{held_out[0]}.nii.gz"
        image = nib.as_closest_canonical(nib.load(path))
        nib.save(image.slicer[:, :, 6:7], path)
    assert job.main(["--data", str(folder), "--out", str(out), *SMALL]) == 0
    assert (out / f"overlay_{held_out[0]}.png").stat().st_size > 10_000
    scored = json.loads((out / "metrics.json").read_bytes())["models"]["3d"]["cases"]
    assert held_out[0] in scored


def test_a_picture_that_fails_ends_no_run(data, tmp_path, monkeypatch, capsys):
    for name in ("overlay", "progress"):
        monkeypatch.setattr(job.report, name, lambda *content: 1 / 0)
    out = tmp_path / "run"
    assert job.main(["--data", str(data), "--out", str(out), *SMALL]) == 0
    told = capsys.readouterr().err
    assert "progress.png: not drawn (ZeroDivisionError" in told and "overlay_" in told
    assert (out / "metrics.json").exists()


def test_going_on_after_training_evaluates_what_is_left(undrawn, data, done, tmp_path, monkeypatch):
    out, segment, seen = tmp_path / "run", ts.infer.segment, []

    def once(nets, scan, **options):
        if len(seen) == 1:
            raise OSError("the disk is gone")
        seen.append(scan.path.name)
        return segment(nets, scan, **options)

    monkeypatch.setattr(ts.infer, "segment", once)
    assert job.main(["--data", str(data), "--out", str(out), *SMALL]) == 1
    first, seen = seen, []
    assert job.main(["--resume", "--out", str(out)]) == 0
    assert len(seen) == 1 and not set(first) & set(seen)
    assert json.loads((out / "metrics.json").read_text("utf-8"))["models"] == json.loads(
        (done / "metrics.json").read_text("utf-8"))["models"]


def test_pretrained_weights_are_read_before_any_work_is_done(undrawn, data, tmp_path, capsys):
    pointer = tmp_path / "weights.pth"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    out = tmp_path / "run"
    words = ["--data", str(data), "--out", str(out), *SMALL, "--pretrained"]
    assert job.main([*words, str(pointer)]) == 1
    assert str(pointer) in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["run.lock"]
    ts.save(tmp_path / "good.npz", ts.models.resnet_seg(rank=2, in_channels=1, classes=3))
    assert job.main([*words, str(tmp_path / "good.npz")]) == 0  # a new run in the same folder
    assert "recalibrated" in capsys.readouterr().out


def test_a_batch_that_leaves_one_value_per_channel_is_refused_at_the_start(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        job.main(["--data", str(data), "--out", str(tmp_path / "a"), *SMALL, "--patch", "8", "8",
                  "8", "--depth-stride", "plane"])
    assert "one value per channel" in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_patches_drawn_anywhere_have_a_figure_of_their_own(done):
    with open(done / "history.csv") as file:
        rows = list(csv.DictReader(file))
    shown = {stage: [bool(row["patch_dice pancreas"]) for row in rows if row["stage"] == stage]
             for stage in ("2d", "3d")}
    assert shown == {"2d": [True] * 4, "3d": [True, False, True]}  # a batch of one: by turns
    assert all("uniform_dice pancreas" in row for row in rows)
    assert any(row["uniform_dice pancreas"] for row in rows)


def test_two_folders_or_nnu_nets_are_trained_on_as_they_are(undrawn, data, done, tmp_path, capsys):
    steps = [*SMALL, "--steps-2d", "1", "--steps-3d", "1"]
    words = ["--images", str(data / "imagesTr"), "--labels", str(data / "labelsTr")]
    out = tmp_path / "pair"
    assert job.main([*words, "--modality", "CT", "--out", str(out), *steps]) == 0
    assert "left out: 1 (imagesTr/._phantom_000.nii.gz)" in capsys.readouterr().out
    plans = [json.loads((o / "plan.json").read_text("utf-8")) for o in (out, done)]
    for plan in plans:
        plan["steps"] = [plan.pop("steps_2d"), plan.pop("steps_3d")]
    assert [plan.pop("steps") for plan in plans] == [[1, 1], [4, 3]] and plans[0] == plans[1]
    (out / "metrics.json").unlink()
    assert job.main(["--resume", "--out", str(out)]) == 0
    assert set(json.loads((out / "metrics.json").read_text("utf-8"))["models"]["3d"]["mean"]) == {
        "class 1", "class 2"}

    folder = copy_of(data, tmp_path)
    for path in (folder / "imagesTr").glob("[!.]*.nii.gz"):
        path.rename(path.with_name(path.name.replace(".nii", "_0000.nii")))
    (folder / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "CT"}, "labels": {"background": 0, "cancer": 2, "pancreas": 1},
        "numTraining": 4, "file_ending": ".nii.gz"}))
    out = tmp_path / "nnunet"
    assert job.main(["--data", str(folder), "--out", str(out), *steps]) == 0
    assert plans[1].items() <= json.loads((out / "plan.json").read_text("utf-8")).items()
    assert commands.main(["evaluate", str(out / "predictions"), str(folder / "labelsTr"),
                          "--missing", "ignore"]) == 0
    assert "pancreas" in capsys.readouterr().out
    for wrong in (["--images", str(data)], [*words, "--data", str(data)],
                  ["--data", str(data), "--modality", "CT"], ["--mirror", "left"]):
        with pytest.raises(SystemExit):
            job.main([*wrong, "--out", str(tmp_path / "x")])
