"""What a run survives, and what it says: kills at any moment, full disks, bad scans, edited files.

Only files outlive a kill, so all that matters of its moment is what has touched which file: runs
are killed at such touches, and by the clock. They train one residual block on 4608 voxels a scan.
"""

import csv
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import tinyseg as ts
from tinyseg import checkpoint, files, report
from tinyseg.data import ct, decathlon, nifti, phantom, sampling
from tinyseg.job import pages, stages

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "train_pancreas_3d.py"
SMALL = ["--patch", "8", "16", "16", "--steps-2d", "3", "--steps-3d", "3", "--batch", "1",
         "--folds", "2", "--seed", "3", "--head", "linear", "--spacing", "5", "6", "6",
         "--augment", "mild"]
TRAINED, HELD_OUT = decathlon.folds([f"phantom_{i:03d}" for i in range(4)], 2)[0]

spec = importlib.util.spec_from_file_location("train_pancreas_3d", SCRIPT)
job = importlib.util.module_from_spec(spec)
spec.loader.exec_module(job)


def tiny(change):
    """The main job at its smallest. Figures would take most of the time, and nothing depends on
    them: empty files stand for them."""
    write = phantom.write
    change.setattr(phantom, "write", lambda folder, cases, seed: write(
        folder, 4, seed, (8, 24, 24), (5, 6, 6)))
    for figure in ("progress", "overlay"):
        change.setattr(report, figure, lambda path, *content: report.write_json(path, []))
    change.setattr(pages, "of_run", lambda *content: None)
    change.setitem(ts.models.BACKBONES, "resnet18", ((1, 1, 0, 0), False))
    change.setattr(stages, "SAVE_EVERY", 0)


def drive(fault, where, count, out, *words):
    """The tiny job, in a process of its own, with a fault at the `count`-th event about `where`:
    "kill" kills the process and cuts what it wrote last anywhere, unless that has been given its
    name; "full" lets no file grow."""
    import resource

    left, written = int(count), ""

    def happens(event, arguments):
        nonlocal left, written
        path = str(arguments[0]) if event in ("open", "os.rename", "os.remove", "os.mkdir") else ""
        if path.startswith(out):
            left -= where in path.removeprefix(out)
        elif event.startswith("call "):
            left -= where in event
        else:
            return
        if left == 0 and fault == "kill":
            if os.path.exists(written):
                os.truncate(written, random.randint(0, os.path.getsize(written)))
            os.kill(os.getpid(), signal.SIGKILL)
        if left == 0 and fault == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
        if event == "open" and "w" in str(arguments[1]):
            written = path

    def watch(owner, name):
        function = getattr(owner, name)

        def call(*arguments, **options):
            sys.audit(f"call {name}")
            return function(*arguments, **options)

        setattr(owner, name, call)

    tiny(pytest.MonkeyPatch())
    for owner, name in ((ct.Plan, "fit"), (ts.losses, "dice_cross_entropy"), (ts, "inflate"),
                        (ts.infer, "segment")):
        watch(owner, name)
    print("ready", flush=True)
    sys.addaudithook(happens)
    return job.main(["--out", out, *words])


def attempt(out, fault="none", where="", count=0, seconds=None):
    """(exit code, stderr) of a run in a process of its own, with a fault as `drive` has them, or
    killed after some seconds of work. It goes on wherever there is something to go on with."""
    words = ["--resume"] if (out / "run.json").exists() else SMALL
    process = subprocess.Popen([sys.executable, __file__, fault, where, str(count), out, *words],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    if seconds is not None:
        process.stdout.readline()
        time.sleep(seconds)
        process.kill()
    _, told = process.communicate(timeout=120)
    return process.returncode, told


def results(out):
    """All that a run has to say, but for how long its steps took and waited. What is done needs no
    weights in its checkpoint, which are hundreds of megabytes."""
    with open(out / "history.csv") as file:
        history = [{k: v for k, v in row.items() if k not in ("seconds", "waited")}
                   for row in csv.DictReader(file)]
    metrics = json.loads((out / "metrics.json").read_text("utf-8"))
    arrays, told = checkpoint.read(out / "checkpoint.npz")
    assert [(row["stage"], row["step"]) for row in history] == [
        (stage, str(step)) for stage in ("2d", "3d") for step in range(3)]
    assert not arrays
    kept = {}
    for name in ("model_2d.npz", "model_3d.npz"):
        kept |= {f"{name} {key}": a for key, a in checkpoint.read(out / name)[0].items()}
    for path in out.glob("predictions*/*"):
        kept[str(path.relative_to(out))] = np.asarray(nib.load(path).dataobj)
    return (history, metrics["models"], metrics["equivalence"], told["stage"], told["step"],
            {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in kept.items()})


def nothing_left_over(out):
    """No draft is; the phantom has junk of its own."""
    return not [path for path in out.rglob(".*") if path.name != "._phantom_000.nii.gz"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run that nothing went wrong in."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert attempt(out)[0] == 0
    return out


@pytest.fixture(scope="module")
def expected(done):
    return results(done)


MOMENTS = (  # about what, and the first and last of the events about it, one of which is drawn
    ("phantom", 1, 40), ("fit", 1, 1), ("prepared", 1, 60), ("dice_cross_entropy", 1, 3),
    ("checkpoint", 1, 8), ("history", 1, 4), ("model_2d", 1, 4), ("inflate", 1, 1),
    ("checkpoint", 4, 12), ("dice_cross_entropy", 1, 1), ("model_3d", 1, 4), ("segment", 1, 2),
    ("predictions", 1, 12), ("metrics", 1, 4),
)


def test_killed_in_every_stage_a_run_ends_as_if_nothing_had_happened(expected, tmp_path):
    out = tmp_path / "run"
    for where, first, last in MOMENTS:
        count = random.randint(first, last)
        print(f"killed at event {count} about {where}")
        code, told = attempt(out, "kill", where, count)
        assert code == -signal.SIGKILL, told
    assert attempt(out)[0] == 0
    assert results(out) == expected and nothing_left_over(out)


@pytest.mark.slow
def test_two_hundred_kills(expected, tmp_path):
    """Half of them by the clock, from outside; half at any event at all."""
    began = time.monotonic()
    attempt(tmp_path / "timed", seconds=0)
    ready = time.monotonic()
    attempt(tmp_path / "timed")
    seconds, kills, runs = (time.monotonic() - ready) - (ready - began), 0, 0
    while kills < 200:
        out, code = tmp_path / str(runs), -signal.SIGKILL
        while code == -signal.SIGKILL:
            if kills == 200:
                code, told = attempt(out)
            elif kills % 2:
                code, told = attempt(out, seconds=random.uniform(0, seconds))
            else:
                code, told = attempt(out, "kill", "", random.randint(1, 300))
            kills += code == -signal.SIGKILL
        assert code == 0, told
        assert results(out) == expected and nothing_left_over(out)
        runs += 1
        shutil.rmtree(out)
    print(f"{kills} kills in {runs} runs")


def test_a_full_disk_is_told_and_when_there_is_room_the_run_goes_on(expected, tmp_path):
    out = tmp_path / "run"
    for where, count in (("prepared", 30), ("checkpoint", 9), ("model_2d", 1), ("predictions", 6),
                         ("metrics", 1)):
        kept = (out / "checkpoint.npz").exists() and checkpoint.read(out / "checkpoint.npz")[1]
        code, told = attempt(out, "full", where, count)
        last = told.strip().splitlines()[-1]
        assert code == 1 and last.startswith("error: ") and where in last, told
        assert "Traceback" not in told and "ignored" not in told
        if kept:
            assert checkpoint.read(out / "checkpoint.npz")[1]["step"] >= kept["step"]
    assert attempt(out)[0] == 0
    assert results(out) == expected and nothing_left_over(out)


# From here on within this process.


@pytest.fixture
def at_hand(monkeypatch):
    tiny(monkeypatch)


@pytest.fixture
def copy(done, tmp_path, at_hand):
    """The finished run, to be gone on with after something happened to it."""
    return Path(shutil.copytree(done, tmp_path / "copy"))


def fails(capsys, words, *said, code=1):
    """The job must exit with this code and tell all of `said` in its last line."""
    try:
        found = job.main([str(word) for word in words])
    except SystemExit as end:
        found = end.code
    told = capsys.readouterr().err
    last = told.strip().splitlines()[-1]
    assert found == code and all(word in last for word in said), told


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (MemoryError, 1)])
@pytest.mark.parametrize("where", ["loss", "update"])
def test_what_ends_a_step_halfway_ends_no_run(expected, tmp_path, monkeypatch, at_hand, capsys,
                                              where, error, code):
    """In the loss running statistics have moved already; in the update some parameters have."""
    out, calls = tmp_path / "run", []
    owner, name = {"loss": (ts.losses, "dice_cross_entropy"),
                   "update": (ts.optim.AdamW, "update")}[where]
    function = getattr(owner, name)

    def broken(*arguments, **options):
        step = len(calls) + 1 if where == "loss" else arguments[0].steps
        calls.append(step)
        if step == 2 and calls.count(2) == (1 if where == "loss" else 5):
            raise error
        return function(*arguments, **options)

    monkeypatch.setattr(stages, "SAVE_EVERY", 1e9)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        assert job.main(["--out", str(out), *SMALL]) == code
    told = capsys.readouterr().err
    assert ("at step 1 of the 2d stage" in told) == (error is MemoryError)
    if where == "loss":
        assert checkpoint.read(out / "checkpoint.npz")[1]["step"] == 1
    else:
        assert not (out / "checkpoint.npz").exists()
    assert job.main(["--out", str(out), "--resume"]) == 0
    assert results(out) == expected


def interrupted(out, monkeypatch):
    """A run that was stopped after its first step."""
    fit = ts.train.fit

    def short(*arguments, **options):
        yield next(fit(*arguments, **options))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ts.train, "fit", short)
        assert job.main(["--out", str(out), *SMALL]) == 130
    assert checkpoint.read(out / "checkpoint.npz")[1]["step"] == 1


def test_a_loss_that_is_not_finite_is_told_with_step_and_case(expected, tmp_path, monkeypatch,
                                                              at_hand, capsys):
    out = tmp_path / "run"
    interrupted(out, monkeypatch)
    path = out / "prepared" / f"{TRAINED[0]}.image.npy"
    good = path.read_bytes()
    image = np.load(path)
    np.save(path, np.full_like(image, np.nan))
    fails(capsys, ["--out", out, "--resume"], "loss nan", "2d stage", f"of {TRAINED[0]}")
    arrays, told = checkpoint.read(out / "checkpoint.npz")
    assert told["step"] >= 1 and all(np.isfinite(a).all() for a in arrays.values())
    path.write_bytes(good)
    assert job.main(["--out", str(out), "--resume"]) == 0
    assert results(out) == expected


def test_suspects_are_all_where_every_image_is_finite():
    good, bad = np.zeros(3), np.array([0, np.inf])
    assert stages.suspects([("b", good, None), ("a", good, None), ("b", good, None)]) == ["a", "b"]
    assert stages.suspects([("b", good, None), ("a", bad, None), ("b", good, None)]) == ["a"]


@pytest.mark.parametrize("name", [TRAINED[1], HELD_OUT[1]])
def test_a_damaged_scan_is_named_and_once_repaired_the_run_goes_on(copy, expected, tmp_path,
                                                                   capsys, name):
    """One of those that are trained on, in a new run; and one held out, when all is trained."""
    out, words = (copy, ["--resume"]) if name in HELD_OUT else (tmp_path / "run", SMALL)
    path = copy / "phantom" / "imagesTr" / f"{name}.nii.gz"
    good = path.read_bytes()
    path.write_bytes(good[:-50])
    fails(capsys, ["--out", out, "--data", copy / "phantom", *words], path.name)
    if out == copy:
        assert checkpoint.read(out / "checkpoint.npz")[1]["step"] == 3
    path.write_bytes(good)
    assert job.main(["--out", str(out), "--resume"]) == 0
    assert results(out) == expected


def test_no_memory_for_a_patch_says_what_to_lower(tmp_path, capsys, at_hand):
    out = tmp_path / "run"
    fails(capsys, ["--out", out, *SMALL, "--patch", 8, 10**7, 10**7], "out of memory",
          "held-out", "--patch", "--batch")
    assert checkpoint.read(out / "checkpoint.npz")[1]["stage"] == "2d"  # whose patches are smaller


@pytest.mark.parametrize("owner, name", [(ct.Plan, "prepare"), (ts.infer, "segment"),
                                         (nifti, "read")])
def test_no_memory_for_a_case_names_it(tmp_path, capsys, monkeypatch, at_hand, owner, name):
    function = getattr(owner, name)

    def short(*arguments, **options):
        thing = arguments[-1]
        if HELD_OUT[1] in str(getattr(thing, "path", thing)):
            raise MemoryError("Unable to allocate 9 GiB")
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, short)
    fails(capsys, ["--out", tmp_path / "run", *SMALL], "Unable to allocate 9 GiB", HELD_OUT[1],
          "--spacing")


def test_going_on_needs_a_run_that_is_there(copy, tmp_path, capsys):
    fails(capsys, ["--resume", "--out", tmp_path / "none"], "no run to go on with", code=2)
    assert not (tmp_path / "none").exists()
    fails(capsys, ["--resume", "--out", copy, "--pretrained", "x.pth"], "--pretrained", code=2)
    for part in ("run.json", "checkpoint.npz", "prepared"):
        (tmp_path / part).mkdir()
        (tmp_path / part / part).touch()
        fails(capsys, ["--out", tmp_path / part, *SMALL], part, "--resume", code=2)


def test_going_on_keeps_all_settings(copy, expected, capsys):
    before = {path: path.read_bytes() for path in copy.glob("*.*")}
    for words in (["--seed", 4], ["--patch", 8, 16, 24], ["--profile", "average"], ["--batch", 2],
                  ["--steps-3d", 2], ["--steps-3d", 4], ["--steps-2d", 9], ["--fold", 1],
                  ["--folds", 3], ["--spacing", 5, 5, 5], ["--quick"]):
        key = words[0].strip("-").replace("-", "_")
        fails(capsys, ["--resume", "--out", copy, *words], key, code=2)
    fails(capsys, ["--resume", "--out", copy, "--seed", 4, "--batch", 2], "seed was 3, not 4",
          "batch was 1, not 2", code=2)
    assert before == {path: path.read_bytes() for path in copy.glob("*.*")}
    assert job.main(["--resume", "--out", str(copy), *SMALL, "--device", "cpu"]) == 0
    assert results(copy) == expected


def test_going_on_needs_the_same_cases(copy, capsys):
    source = copy / "phantom" / "dataset.json"
    content = json.loads(source.read_text("utf-8"))
    content["training"].pop()
    source.write_text(json.dumps(content))
    fails(capsys, ["--resume", "--out", copy], "phantom", "cases")
    content["labels"]["3"] = "cyst"
    source.write_text(json.dumps(content))
    fails(capsys, ["--resume", "--out", copy], "phantom", "labels")


def test_going_on_needs_the_checkpoint_of_this_run(copy, capsys):
    arrays, told = checkpoint.read(copy / "checkpoint.npz")
    told["settings"]["seed"] = 9
    checkpoint.write(copy / "checkpoint.npz", arrays, told)
    fails(capsys, ["--resume", "--out", copy], "checkpoint.npz", "run.json")
    shutil.copy(copy / "model_3d.npz", copy / "checkpoint.npz")
    fails(capsys, ["--resume", "--out", copy], "checkpoint.npz", "run.json")
    with open(copy / "checkpoint.npz", "r+b") as file:
        file.truncate(999)
    fails(capsys, ["--resume", "--out", copy], "checkpoint.npz", "not a complete")


@pytest.mark.parametrize("change", [
    {"seed": "three"}, {"seed": None, "batch": {}}, {"patch": [8, 8]}, {"patch": "big"},
    {"patch": [8, 16, 16, 16]}, {"backbone": "vgg"}, {"folds": True}, {"steps_2d": -1},
    {"lr": [1e-3]}, {"depth_stride": [3]}, {"freeze": "stem"}, {"order": 2}, {"minutes": 0},
])
def test_an_edited_description_of_the_run_is_refused(copy, capsys, change):
    path = copy / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change))
    fails(capsys, ["--resume", "--out", copy], "run.json", code=2)


@pytest.mark.parametrize("change", [
    {"preprocessing": 3}, {"preprocessing": {"spacing": None}}, {"colour": 1},
    {"preprocessing": {"spacing": [5, 5, 5], "colour": 1}},
])
def test_an_edited_plan_of_the_run_is_refused(copy, capsys, change):
    path = copy / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change))
    fails(capsys, ["--resume", "--out", copy], "plan.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b"{}", b"\xff", b"0" * 5000])
def test_what_is_no_description_of_a_run_is_refused(copy, capsys, content):
    (copy / "run.json").write_bytes(content)
    fails(capsys, ["--resume", "--out", copy], "run.json")


def test_descriptions_are_bounded_before_they_are_read(copy, capsys, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_JSON", 100)
    monkeypatch.setattr(files.json, "loads", None)
    fails(capsys, ["--resume", "--out", copy], "run.json", "at most 100")
    fails(capsys, ["--out", copy.parent / "new", "--data", copy / "phantom"], "dataset.json",
          "at most 100")


WRITERS = {
    "net.npz": lambda path: checkpoint.write(path, {"a": np.zeros(10**5)}, {}),
    "small.npz": lambda path: checkpoint.write(path, {"a": np.zeros(3)}, {}),
    "rows.csv": lambda path: report.write_table(path, [{"a": 1}]),
    "all.json": lambda path: report.write_json(path, {"a": 1}),
    "map.nii.gz": lambda path: nifti.write(path, np.zeros((2, 3, 4), int), VOLUME),
    "map.nii": lambda path: nifti.write(path, np.zeros((2, 3, 4), int), VOLUME),
    "x.image.npy": lambda path: sampling.store(path.parent, CASE),
    "p.png": lambda path: report.progress(path, [{"stage": "2d", "step": 0, "loss": 1, "lr": 1}]),
}
VOLUME = nifti.Volume(np.zeros((2, 3, 4)), (1, 1, 1), np.diag((-1.0, 1, 1, 1)),
                      nib.Nifti1Header(), (4, 3, 2), Path("scan.nii"))
CASE = sampling.Prepared("x", np.zeros((9, 9, 9, 1), "float16"), np.zeros((9, 9, 9), "uint8"), {})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_names_the_file_that_a_full_disk_refuses(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"as it was")
    with suppress(OSError), files.whole(path) as draft:
        pass
    draft.symlink_to("/dev/full")
    with pytest.raises(OSError, match="cannot be written") as caught:
        WRITERS[name](path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"as it was" and not draft.is_symlink()


def test_drafts_of_killed_processes_are_swept(copy):
    for path in (copy / ".draft.1.checkpoint.npz", copy / "predictions" / ".draft.12.a.nii.gz"):
        path.write_bytes(b"PK half a file")
    assert job.main(["--resume", "--out", str(copy)]) == 0
    assert nothing_left_over(copy)


if __name__ == "__main__":
    sys.exit(drive(*sys.argv[1:]))
