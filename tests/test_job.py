"""The job from Python: settings, runs in a folder, what they take from others, one evaluation."""

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyseg as ts
from tinyseg import job, metrics
from tinyseg.job import evaluate, prepare, stages
from tinyseg.job import plan as plans
from tinyseg.job import settings as asking

pytestmark = pytest.mark.usefixtures("tiny_runs")
SMALL = {"patch": (8, 16, 16), "steps_2d": 2, "steps_3d": 3, "batch": 1, "folds": 2, "seed": 3,
         "head": "linear", "spacing": (5, 6, 6)}
EXAMPLES = st.fixed_dictionaries({}, optional={
    "data": st.text("ab/", min_size=1).map(Path), "minutes": st.floats(0.1, 1e3),
    "patch": st.tuples(*[st.integers(33, 99)] * 3), "batch": st.integers(1, 9),
    "depth_stride": st.lists(st.sampled_from([1, 2]), min_size=3, max_size=3) | st.just(["plane"]),
    "mirror": st.lists(st.sampled_from(["a=b", "2=3"]), min_size=1),
    "order": st.sampled_from([1, 3]),
    "lr": st.tuples(*[st.floats(1e-6, 1)] * 2), "quick": st.booleans(), "seed": st.integers(0, 9),
    "freeze": st.lists(st.sampled_from(["conv1", "layer1"])), "folds": st.integers(2, 9)}).map(
    lambda asked: asked | ({"head": "linear"} if len(asked.get("depth_stride", [])) == 3 else {}))


@settings(max_examples=40, deadline=None)
@given(EXAMPLES)
def test_settings_from_python_json_and_words_are_the_same(asked):
    made = job.Settings(**asked)
    assert job.Settings(**json.loads(json.dumps(made.json()))) == made
    words = []
    for each in fields(made):
        value, flag = getattr(made, each.name), asking._flag(each)
        if value is True:
            words.append(flag)
        elif value not in (None, False, ()):
            words += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    assert job.Settings(**vars(job.parser().parse_args(words))) == made


def test_a_command_line_says_every_default_and_only_what_was_given():
    assert vars(job.parser().parse_args([])) == {}
    told = job.parser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=200))
    told = told.format_help()
    for each in fields(job.Settings):
        assert asking._flag(each) in told
        if each.default not in (None, False, ()):
            assert f"({asking._shown(each.default)})" in told, each.name


@pytest.mark.parametrize("wrong, said", [
    ({"seed": -1}, "seed"), ({"seed": 1.5}, "--seed"), ({"seed": True}, "--seed"),
    ({"patch": (8, 8)}, "--patch"), ({"patch": "888"}, "--patch"),
    ({"patch": (8, 0, 8)}, "--patch"),
    ({"patch": (1, 8, 8), "batch": 1}, "one value per channel"),
    ({"patch": (32, 32, 32), "batch": 1, "depth_stride": ["plane"]}, "output stride 32"),
    ({"quick": 1}, "--quick"), ({"head": "head"}, "--head"), ({"order": 2}, "--order"),
    ({"patch": (16, 32, 32), "batch": 1, "depth_stride": [2, 2, 2, 2, 1]}, "output stride 32"),
    ({"depth_stride": [1, 1, 2]}, "5 numbers"),
    ({"depth_stride": [2] * 5, "head": "fcn"}, "3 numbers"), ({"depth_stride": [3]}, "--depth"),
     ({"depth_stride": ["plane", 1]}, "--depth-stride"),
    ({"memory": 5, "patch": (9, 32, 48)}, "--memory chooses a patch"),
    ({"plan": "a", "minutes": 5}, "--minutes"), ({"from_2d": "a", "memory": 5}, "--memory"),
    ({"minutes": 0}, "minutes"), ({"lr_new": 0}, "--lr-new is 0"), ({"lr": (1e-3,)}, "--lr"),
    ({"training_cases": 0}, "--training-cases is 0"), ({"folds": 2, "fold": 2}, "--fold"),
    ({"precision": "bf16"}, "--device cuda"), ({"precision": "half"}, "--precision"),
    ({"images": "a"}, "--labels"), ({"modality": "CT"}, "--modality"), ({"mirror": ["a"]}, "pairs"),
    ({"from_2d": "a", "plan": "b"}, "--from-2d"), ({"from_2d": "a", "head": "fcn"}, "--head"),
    ({"from_2d": "a", "mirror": ["1=2"]}, "--mirror"),
    ({"profile": "cubic"}, "--profile"), ({"profile": "scale"}, "--alpha goes with"),
    ({"alpha": [0.5, 0.5]}, "--alpha goes with"), 
    ({"profile": "scale", "alpha": [0.5, 0.2, 0.2]}, "sum is 1"),
])
def test_what_no_run_can_be_asked_for_is_named(wrong, said):
    with pytest.raises(job.SettingsError, match=said):
        job.Settings(**wrong)


def test_fewer_cases_to_learn_from_are_drawn_by_the_seed():
    ids = [f"case{i}" for i in (3, 0, 2, 1, 5, 4, 6, 8, 7, 9)]
    whole, held_out = prepare.split(job.Settings(fold=1), ids)
    assert len(whole) == 8 and {*whole} | {*held_out} == {*ids} and not {*whole} & {*held_out}
    assert whole == [id for id in ids if id in whole]
    drawn = [prepare.split(job.Settings(fold=1, training_cases=3, seed=seed), ids)
             for seed in (0, 0, 1, 2)]
    assert all(len(some) == 3 and {*some} <= {*whole} and rest == held_out for some, rest in drawn)
    assert drawn[0] == drawn[1] and len({tuple(some) for some, _ in drawn}) > 1
    assert prepare.split(job.Settings(fold=1, training_cases=8), ids) == (whole, held_out)
    with pytest.raises(job.SettingsError, match="is 9; this fold leaves 8"):
        prepare.split(job.Settings(fold=1, training_cases=9), ids)


def test_a_random_start_on_volumes_has_the_rate_of_slices(done):
    plan = job.Plan.read(done / "plan.json")
    for start, rate in (("inflated", 1e-4), ("random", 1e-2)):
        made = stages.stages(plan, job.Settings(lr=(1e-2, 1e-4), start=start, lr_new=3.0))
        assert [stage.rate for stage in made.values()] == [1e-2, rate]
        assert [stage.faster for stage in made.values()] == [3, 1]  # of slices only


def test_no_other_case_is_prepared(data, tmp_path):
    asked = {**SMALL, "steps_2d": 0, "steps_3d": 0, "training_cases": 1}
    with job.Run(tmp_path / "run", job.Settings(data=data, **asked)) as run:
        run.decide()
        assert len(run.trained) == len(run.prepared["training"]) == 1
        assert {path.name.split(".")[0] for path in (tmp_path / "run/prepared").iterdir()} == {
            *run.trained, *run.held_out}


def test_a_resumed_run_moves_and_grows_and_changes_nothing_else():
    begun = job.Settings(**SMALL)
    assert begun.resumed() == begun
    assert begun.resumed(data="x", steps_3d=9) == replace(begun, data=Path("x"), steps_3d=9)
    on_gpu = replace(begun, device="cuda", precision="bf16")
    assert on_gpu.resumed(device="cpu", precision="tf32") == begun
    assert replace(begun, steps_2d=None).resumed(steps_2d=1).steps_2d == 1  # the plan's may be less
    for wrong in ({"steps_3d": 2}, {"seed": 4}, {"plan": "x"}, {"head": "fcn"},
                  {"pretrained": "x"}):
        with pytest.raises(job.SettingsError, match=next(iter(wrong))):
            begun.resumed(**wrong)


def test_patches_are_scored_one_by_one_and_by_slices_where_a_network_sees_slices():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 3, 16, 24, 1), "float32")
    labels = rng.integers(0, 3, (2, 3, 16, 24)).astype("uint8")
    labels[0, 0, 0] = 255
    net = ts.models.resnet_seg("resnet18", rank=2, in_channels=1, classes=3)
    before = net.state()
    with ts.no_grad():
        answers = net.eval()(images.reshape(-1, 16, 24, 1)).data.argmax(-1).reshape(labels.shape)
    known = labels < 3
    want = {c: metrics.dice((answers == c) & known, labels == c) for c in (1, 2)}
    assert stages.patch_dice(net.train(), (images, labels)) == pytest.approx(want)
    assert net.training and all((a == before[k]).all() for k, a in net.state().items())


def test_classes_that_are_met_late_are_absent_before():
    scores = evaluate.Scores({0: "background", 1: "organ"}, tolerance=2)
    one, two = np.zeros((2, 3, 4, 5), "uint8")
    one[0, 0], two[0] = 1, 7
    scores.add("a", one, one, (1, 2, 3))
    scores.add("b", two, one, (1, 2, 3))
    told = scores.told()
    assert set(told) == {"tolerance_mm", "cases", "mean", "counts"} and told["tolerance_mm"] == 2
    assert list(told["mean"]) == ["organ", "class 7"]
    assert told["cases"]["a"]["organ"] == metrics.per_class(one, one, {1: "organ"}, (1, 2, 3),
                                                            2)["organ"]
    assert np.isnan(told["cases"]["a"]["class 7"]["dice"])
    assert told["cases"]["b"]["class 7"]["dice"] == 0


# From here on runs, of one residual block on a few thousand voxels.


@pytest.fixture(scope="module")
def data(tiny_task):
    return tiny_task


def network(run):
    return ts.models.resnet_seg(rank=2, in_channels=run.channels, classes=len(run.labels),
                                seed=run.settings.seed, **run.plan.architecture)


def go(run, stop=lambda: False):
    """The method, as a notebook has it."""
    with run:
        run.decide()
        flat = (run.take("2d", run.settings.from_2d) if run.settings.from_2d
                else run.train("2d", network(run)))
        deep = ts.inflate(flat, **run.settings.way, **run.plan.inflation)
        kept = run.compare(flat, deep)
        deep = run.train("3d", deep, stop=stop)
        return kept, run.evaluate({"2d": flat, "3d": deep})


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "done"
    go(job.Run(out, job.Settings(data=data, **SMALL)))
    return out


def weights(path):
    return ts.load(path).state()


def test_training_multiplies_in_the_precision_asked_for(data, tmp_path, monkeypatch):
    """In a stage, where it looks at held-out patches too; what comes after is in TF32 again."""
    seen, conv = {}, ts.ops.conv
    monkeypatch.setattr(ts.ranks.Alone, "device", lambda self, name: np)
    monkeypatch.setattr(ts.ops, "conv", lambda x, *args, **options: (
        seen.setdefault(x.requires_grad, set()).add(ts.cuda.precision_here()),
        conv(x, *args, **options))[1])
    go(job.Run(tmp_path / "run", job.Settings(data=data, device="cuda", precision="bf16", **SMALL)))
    assert seen == {True: {"bf16"}, False: {"bf16", "tf32"}}  # by whether a gradient is wanted
    assert ts.cuda.precision_here() == "tf32"


def test_steps_are_launched_as_a_whole(data, tmp_path, monkeypatch):
    """Where there are launches: `train.fit` knows whether."""
    asked, fit = [], ts.train.fit
    monkeypatch.setattr(ts.train, "fit", lambda *args, capture, **options: (
        asked.append(capture), fit(*args, capture=capture, **options))[1])
    go(job.Run(tmp_path / "run", job.Settings(data=data, **SMALL)))
    assert asked == [True, True]


def test_a_run_is_stopped_grows_and_is_finished(data, tmp_path, done):
    out, calls = tmp_path / "run", []
    with pytest.raises(KeyboardInterrupt):
        go(job.Run(out, job.Settings(data=data, **SMALL)), stop=lambda: calls.append(1) or True)
    assert len(calls) == 1
    arrays, told = ts.checkpoint.read(out / "checkpoint.npz")
    assert (told["stage"], told["step"]) == ("3d", 1) and arrays
    with pytest.raises(job.SettingsError, match="holds a run already"):
        job.Run(out, job.Settings())
    with pytest.raises(job.SettingsError, match="steps_2d was 2, not 5"):
        go(job.Run.resume(out, steps_2d=5))
    go(job.Run.resume(out, steps_3d=4))
    rows = (out / "history.csv").read_text("utf-8").splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [
        ["2d", "0"], ["2d", "1"], *(["3d", str(i)] for i in range(4))]
    assert json.loads((out / "plan.json").read_text("utf-8"))["steps_3d"] == 4
    mine, theirs = weights(out / "model_2d.npz"), weights(done / "model_2d.npz")
    assert all((mine[name] == a).all() for name, a in theirs.items())
    assert ts.checkpoint.read(out / "checkpoint.npz")[0] == {}
    with pytest.raises(job.SettingsError, match="steps_3d was 4, not 6"):
        go(job.Run.resume(out, steps_3d=6))
    before = (out / "model_3d.npz").read_bytes()
    kept, found = go(job.Run.resume(out))
    assert (out / "model_3d.npz").read_bytes() == before
    told = json.loads((out / "metrics.json").read_text("utf-8"))
    assert told["models"].keys() == found.keys() == {"2d", "3d", "ensemble"}
    assert told["equivalence"] == kept and kept["max_abs_difference"] < 1e-4
    assert kept["held_out_patches"].keys() == {"2d", "3d"}
    scores = told["models"]["3d"]["mean"]["pancreas"]
    assert {"dice", "iou", "surface_dice", "hausdorff95"} <= scores.keys()


def test_held_out_patches_have_a_curve(done):
    rows = (done / "history.csv").read_text("utf-8").splitlines()
    names = rows[0].split(",")
    assert "waited" in names and "validation pancreas" in names
    at = names.index("validation pancreas")
    assert [bool(row.split(",")[at]) for row in rows[1:]] == [False, True, False, False, True]


def test_another_run_takes_network_and_plan_unless_it_holds_out_others(data, done, tmp_path):
    out = tmp_path / "run"
    asked = {**SMALL, "steps_3d": 1, "profile": "average", "head": None}
    go(job.Run(out, job.Settings(data=data, from_2d=done, **asked)))
    mine, theirs = weights(out / "model_2d.npz"), weights(done / "model_2d.npz")
    assert all((mine[name] == a).all() for name, a in theirs.items())
    rows = (out / "history.csv").read_text("utf-8").splitlines()
    assert [row.split(",")[0] for row in rows] == ["stage", "3d"]
    plans = [json.loads((o / "plan.json").read_text("utf-8")) for o in (out, done)]
    assert [plan.pop("steps_3d") for plan in plans] == [1, 3]
    assert [plan.pop("depth") for plan in plans] == [[1, 1, 3, 3, 3], [3] * 5]  # as it mixes slices
    assert plans[0] == plans[1]
    with pytest.raises(ValueError, match="fold"), job.Run(
            tmp_path / "b", job.Settings(data=data, from_2d=done, **{**asked, "fold": 1})):
        pass
    assert not (tmp_path / "b" / "run.json").exists()
    with pytest.raises(job.SettingsError, match="model_2d.npz: no such file"):
        job.Run(tmp_path / "b", job.Settings(from_2d=tmp_path))
    # The same network as a checkpoint has seen the same cases.
    asked = {**SMALL, "pretrained": done / "model_2d.npz", "fold": 1}
    with pytest.raises(ValueError, match="fold are 0, not 1"), job.Run(
            tmp_path / "b", job.Settings(data=data, **asked)):
        pass
    with job.Run(tmp_path / "c", job.Settings(data=data, **{**asked, "fold": 0})):
        pass


def test_a_network_of_another_run_keeps_the_preparation_that_it_was_trained_with(data, tmp_path):
    source, out = tmp_path / "source", tmp_path / "run"
    with job.Run(source, job.Settings(data=data, **{**SMALL, "augment": "none"})) as run:
        run.decide()
        run.train("2d", network(run))
    asked = {"folds": 2, "seed": 3, "from_2d": source, "spacing": (5, 5, 7), "augment": "mild"}
    with job.Run(out, job.Settings(data=data, **asked)) as run:
        made = run.decide().preprocessing
        assert made.spacing == (5, 5, 7) and made.mirror is None  # as theirs
        flat = run.take("2d", source)
    assert flat.metadata == ts.load(source / "model_2d.npz").metadata
    assert tuple(flat.metadata["plan"]["spacing"]) == (5, 6, 6)


@pytest.mark.parametrize("asked, theirs, want", [
    ({}, None, None), ({}, (("pancreas", "cancer"),), (("pancreas", "cancer"),)), ({}, (), ()),
    ({"mirror": ["none"]}, (), None), ({"mirror": ["1=2"]}, None, (("pancreas", "cancer"),)),
    ({"augment": "none"}, (), None)])
def test_the_mirror_of_a_plan_is_taken_unless_another_is_asked_for(data, done, tmp_path, asked,
                                                                  theirs, want):
    plan, path = job.Plan.read(done / "plan.json"), tmp_path / "plan.json"
    for augmentation in ("mild", "none"):
        replace(plan, augmentation=augmentation,
                preprocessing=replace(plan.preprocessing, mirror=theirs)).write(path)
        with job.Run(tmp_path / augmentation, job.Settings(data=data, folds=2, plan=path,
                                                           **asked)) as run:
            assert run.mirror == (None if augmentation == "none" else want)


def test_a_plan_is_taken_as_it_is_but_for_what_is_asked(data, done, tmp_path):
    asked = job.Settings(data=data, folds=2, seed=3, plan=done / "plan.json", order=3,
                         depth_stride=("plane",), augment="none")
    with job.Run(tmp_path / "run", asked) as run:
        plan, theirs = run.decide(), job.Plan.read(done / "plan.json")
        made = replace(theirs.preprocessing, order=3, mirror=None)
        assert plan == replace(theirs, preprocessing=made, depth_stride=(2, 2, 2),
                               augmentation="none")
        assert job.Plan.read(tmp_path / "run" / "plan.json") == plan


@pytest.mark.parametrize("asked, slots", [
    ({}, (3, 1, 1, 3, 3)), ({"profile": "average"}, (3, 1, 1, 3, 3)),  # as someone edited it
    ({"depth_stride": ("plane",)}, (1,) * 5), ({"depth_stride": (1, 2, 1)}, (3,) * 5),
    ({"depth_stride": (1, 2, 1), "profile": "average"}, (1, 1, 3, 3, 3)),
    ({"depth_stride": (1, 2, 1), "spacing": (24, 6, 6)}, (1, 1, 3, 3, 3)),
    ({"depth_stride": (1, 2, 1), "slot": "first"}, (1, 1, 3, 3, 3))])
def test_slots_follow_the_strides_that_are_asked_for(done, asked, slots):
    """A kernel sees other slices where these are closer than twice the plane's voxels."""
    plan = job.Plan.read(done / "plan.json")
    plan = replace(plan, depth=(3, 1, 1, 3, 3),
                   preprocessing=replace(plan.preprocessing, spacing=(12, 6, 6)))
    made = prepare.adjusted(plan, job.Settings(plan=done / "plan.json", **asked), None)
    assert made.depth == slots


@pytest.mark.parametrize("strides, enlarged", [
    ((2, 2, 2), False), ((2, 1, 2), True), ((1, 1, 2), False), ((1, 2, 2), False)])
def test_what_a_plan_sees_enlarged_stays_so_with_another_head(done, strides, enlarged):
    plan = replace(job.Plan.read(done / "plan.json"), depth_stride=strides)
    unet, back = (job.Settings(plan=done / "plan.json", head=head) for head in ("unet", "linear"))
    made = prepare.adjusted(plan, unet, None)
    assert (len(made.decoder) == 4) == enlarged == (made.depth_stride[0] == 2)
    plane = replace(made, depth_stride=(2,) * 5)
    assert (prepare.adjusted(plane, back, None).depth_stride[0] == 2) == enlarged


def test_a_plan_with_another_head_has_the_strides_and_the_decoder_of_that(data, done, tmp_path):
    theirs = job.Plan.read(done / "plan.json")
    asked = job.Settings(data=data, folds=2, plan=done / "plan.json", head="unet")
    with job.Run(tmp_path / "run", asked) as run:
        plan = run.decide()
    assert (plan.head, len(plan.decoder), len(plan.depth_stride)) == ("unet", 5, 5)
    changed = {"head": "unet", "decoder": plan.decoder, "depth": plan.depth,
               "depth_stride": plan.depth_stride}
    assert plan == replace(theirs, **changed)
    back = job.Settings(data=data, folds=2, plan=tmp_path / "run" / "plan.json", head="linear")
    with job.Run(tmp_path / "back", back) as run:
        assert run.decide() == theirs


def test_minutes_are_filled_by_steps_of_what_is_trained(data, tmp_path, monkeypatch):
    timed = []

    def measure(plan, *told):
        timed.append((plan, *told[-1:]))
        return {"step_2d": 0.1 * plan.batch_2d, "step_3d": plan.batch_3d}

    monkeypatch.setattr(prepare, "measure", measure)
    monkeypatch.setattr(ts.ranks.Alone, "device", lambda self, name: np)
    asked = job.Settings(data=data, folds=2, quick=True, batch=3, minutes=2, device="cuda",
                         precision="bf16")
    with job.Run(tmp_path / "run", asked) as run:
        plan = run.decide()
    (ours, *told), = timed
    assert (ours.batch_2d, ours.batch_3d, ours.patch_3d, *told) == (24, 3, (24, 96, 96), "bf16")
    assert plan == plans.within(ours, 2, measure(ours)) and plan.steps_3d > 0


def test_a_plan_that_lies_in_the_folder_is_taken_or_kept(data, done, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes((done / "plan.json").read_bytes())
    with pytest.raises(job.SettingsError, match="plan.json; take it by --plan"):
        job.Run(tmp_path, job.Settings(data=data, **SMALL))
    with job.Run(tmp_path, job.Settings(data=data, folds=2, plan=path)) as run:
        assert run.decide() == job.Plan.read(done / "plan.json") == job.Plan.read(path)


def test_a_run_without_its_plan_is_no_source(done, tmp_path):
    (tmp_path / "model_2d.npz").write_bytes((done / "model_2d.npz").read_bytes())
    with pytest.raises(job.SettingsError, match="from-2d .*plan.json: no such file"):
        job.Run(tmp_path / "run", job.Settings(from_2d=tmp_path))


def test_a_plan_that_was_edited_is_not_gone_on_with(data, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        go(job.Run(out, job.Settings(data=data, **SMALL)), stop=lambda: True)
    plan = job.Plan.read(out / "plan.json")
    replace(plan, augmentation="nnunet").write(out / "plan.json")
    with pytest.raises(ValueError, match="no checkpoint of the run"):
        go(job.Run.resume(out))
    plan.write(out / "plan.json")
    go(job.Run.resume(out))


def test_times_of_a_plan_are_kept_while_they_are_of_what_is_trained(data, done, tmp_path):
    seconds = {"step_2d": 1.0, "scan_2d": 2.0, "step_3d": 3.0, "scan_3d": 4.0}
    path = tmp_path / "plan.json"
    replace(job.Plan.read(done / "plan.json"), seconds=seconds).write(path)
    for number, (asked, kept) in enumerate((({"steps_3d": 7, "augment": "none", "order": 3}, True),
                                            ({"batch": 2}, False), ({"head": "unet"}, False),
                                            ({"spacing": (5, 6, 7)}, False))):
        settings = job.Settings(data=data, folds=2, plan=path, **asked)
        with job.Run(tmp_path / str(number), settings) as run:
            assert run.decide().seconds == (seconds if kept else {})


def test_what_does_not_fit_the_network_begins_no_run(data, done, tmp_path):
    for wrong, said in (({"depth_stride": (1,) * 5, "plan": done / "plan.json", "head": None},
                         "depth_stride"),
                        ({"freeze": ("layer",)}, "layer1"),
                        ({"freeze": ("fc",), "head": None}, "decoder")):
        asked = job.Settings(**{"data": data, **SMALL, "batch": 2, **wrong})
        with pytest.raises(ValueError, match=said), job.Run(tmp_path / "run", asked):
            pass
        assert not (tmp_path / "run" / "run.json").exists()
    path = tmp_path / "plan.json"
    replace(job.Plan.read(done / "plan.json"), augmentation="strong").write(path)
    asked = job.Settings(data=data, folds=2, plan=path)
    with pytest.raises(ValueError, match="plan.json: found augmentation"), job.Run(
            tmp_path / "run", asked):
        pass
    assert not (tmp_path / "run" / "run.json").exists()


def test_nothing_can_be_trained_before_it_is_decided(data, tmp_path):
    with job.Run(tmp_path / "run", job.Settings(data=data, **SMALL)) as run:
        with pytest.raises(RuntimeError, match="decide"):
            run.train("2d", None)
