"""The comparison of ways: what is run, that it goes on, and what the table says of the scores."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import tinyseg as ts
from tinyseg.intervals import holm, interval
from tinyseg.job import pages, study

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import compare_inflation as comparison  # noqa: E402

pytestmark = pytest.mark.usefixtures("tiny_runs")
TINY = ["--patch", "8", "16", "16", "--steps-2d", "2", "--steps-3d", "2", "--batch", "1",
        "--folds", "2", "--head", "linear", "--spacing", "5", "6", "6", "--augment", "mild"]


@pytest.fixture(scope="module")
def data(tiny_task):
    return tiny_task


def ask(data, out, *more):
    return comparison.main(["--data", str(data), "--out", str(out), *TINY, *more])


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("studies") / "done"
    words = ["--ways", "2d-longer", "random", "zero", "--seeds", "2", "--parts", "2"]
    assert ask(data, out, *words) == 0
    return out, words


def test_words_for_ways():
    assert study.way("random") == {"start": "random"}
    assert study.way("zero:first") == {"profile": "zero", "slot": "first"}
    assert study.way("scale:0.5,1,-.5") == {"profile": "scale", "alpha": (0.5, 1, -0.5)}
    for name in ts.PROFILES:
        assert study.way(name) == {"profile": name}
        assert ts.job.Settings(**study.way(name)).way["profile"] == name
    for wrong in ("2D", "scale", "scaled", "scale:a,b", ""):
        with pytest.raises(ValueError):
            study.way(wrong)


def test_words_for_sources(tmp_path):
    assert study.source("slices") == {} and study.source("random") == {"steps_2d": 0}
    with pytest.raises(ValueError, match="a checkpoint, or the folder of a run"):
        study.source(str(tmp_path))
    (tmp_path / "model_2d.npz").touch()
    for word in (tmp_path, tmp_path / "model_2d.npz"):
        assert study.source(str(word)) == {"steps_2d": 0, "pretrained": tmp_path / "model_2d.npz"}


def test_every_trial_comes_behind_the_one_that_it_takes_from(tmp_path):
    ways, sources = ["random", "zero", "zero:first"], ["a/b.pth", "slices", "c/b.pth"]
    found = study.trials(ways, sources, 3, 2)
    assert len(found) == len({each.folder(tmp_path) for each in found}) == 3 * 2 * (3 * 4 - 2)
    for i, each in enumerate(found):
        assert each.base in found[: i + 1] and each.base.base == each.base
    assert [each.seed for each in found] == sorted(each.seed for each in found)
    assert {each.source for each in found if each.way == "random"} == {"slices"}


def test_plans_are_made_for_every_way_and_taken_by_all(tmp_path, done):
    """One that mixes slices needs flat kernels early; the others then have them too."""
    first, *others = study.trials(["random", "zero", "average"], ["slices"], 2, 2)
    assert first.settings(tmp_path, first, {})["profile"] == "average"
    out, _ = done
    asked = {trial: trial.settings(out, first, {"depth_stride": (1, 1, 2)}) for trial in others}
    assert {(trial.way, trial.fold, told["profile"]) for trial, told in asked.items()
            if "profile" in told} == {("2d", 1, "average"), *(
                (way, fold, way) for way in ("zero", "average") for fold in (0, 1))}
    assert all(("depth_stride" in told) == ("profile" in told) for trial, told in asked.items()
               if trial.network == "2d") and not any(
        "depth_stride" in told for trial, told in asked.items() if trial.network == "3d")
    depths = {tuple(json.loads(path.read_text("utf-8"))["depth"])
              for path in out.glob("fold?_seed?/*/plan.json")}
    assert depths == {(1, 1, 3, 3, 3)}


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_study_leaves_what_it_promises(done):
    out, _ = done
    rows = read(out / "scores.csv")
    # 2 seeds, 2 folds of 2 cases, 2 classes; two ways, and the 2D network, twice
    assert len(rows) == 2 * 4 * 2 * 4 and {row["seed"] for row in rows} == {"0", "1"}
    assert list(rows[0])[:7] == ["way", "source", "fold", "seed", "case", "class", "dice"]
    held_out = [{row["case"] for row in rows if row["fold"] == fold} for fold in "01"]
    assert len(held_out[0] | held_out[1]) == 4 and not held_out[0] & held_out[1]
    told = json.loads((out / "fold1_seed0/slices_zero/metrics.json").read_text("utf-8"))
    for case, classes in told["models"]["3d"]["cases"].items():
        mine = [row for row in rows if (row["way"], row["fold"], row["seed"], row["case"]) == (
            "zero", "1", "0", case)]
        assert {row["class"]: float(row["dice"]) for row in mine} == {
            name: scores["dice"] for name, scores in classes.items()}
    curves = read(out / "curves.csv")
    assert {(row["way"], row["step"]) for row in curves} == {
        *((way, "2") for way in ("2d", "random", "zero")),
        ("2d-longer", "4")}
    plan = json.loads((out / "fold0_seed0/slices_2d-longer/plan.json").read_text("utf-8"))
    voxels = [plan[f"batch_{n}d"] * np.prod(plan[f"patch_{n}d"]) for n in (2, 3)]
    assert plan["steps_2d"] == 4 == 2 + round(2 * voxels[1] / voxels[0])
    assert (out / "report.html").stat().st_size > 10_000
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "comparison.md").read_text("utf-8")
    assert "less random" in text and "Nothing can" not in text and text.count("\n| ") == 4


def test_runs_of_a_fold_share_plan_2d_network_and_prepared_cases(done):
    out, _ = done
    for fold in (0, 1):
        plans = [json.loads(path.read_text("utf-8"))
                 for path in out.glob(f"fold{fold}_*/*/plan.json")]
        longer = [plan for plan in plans if plan["steps_2d"] > 2]
        assert len(plans) == 8 and len(longer) == 2
        assert all(plan | {"steps_2d": 2} == plans[0] | {"steps_2d": 2} for plan in plans)
    for folder in out.glob("fold?_seed?"):
        base = ts.load(folder / "slices_2d/model_2d.npz").state()
        for way in ("zero", "random"):
            mine = folder / f"slices_{way}"
            assert not (mine / "prepared").exists()
            assert all((a == base[n]).all() for n, a in ts.load(
                mine / "model_2d.npz").state().items())
        random, zero = (json.loads((folder / f"slices_{way}/metrics.json").read_text("utf-8"))
                        ["equivalence"]["max_abs_difference"] for way in ("random", "zero"))
        assert zero < 1e-4 < random


def test_interrupted_it_goes_on_to_the_same_scores(data, tmp_path, monkeypatch):
    words = ["--ways", "scale:0.2,0.6,0.2"]
    assert ask(data, tmp_path / "whole", *words) == 0
    fit, left = ts.train.fit, [3]

    def stopped(net, *args, **options):
        for record in fit(net, *args, **options):
            yield record
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(ts.train, "fit", stopped)
    assert ask(data, tmp_path / "run", *words) == 130 and left == [0]
    assert not (tmp_path / "run" / "scores.csv").exists()
    assert ask(data, tmp_path / "run", *words) == 0
    assert (tmp_path / "run/scores.csv").read_bytes() == (
        tmp_path / "whole/scores.csv").read_bytes()


def test_a_study_may_stand_in_a_file(done, data, monkeypatch, tmp_path):
    out, words = done
    before = (out / "scores.csv").read_bytes()
    monkeypatch.setattr(ts.train, "fit", None)
    (tmp_path / "study").write_text("\n".join(["--data", str(data), "--out", str(out), *TINY,
                                               *words]), "utf-8")
    assert comparison.main([f"@{tmp_path / 'study'}"]) == 0
    assert (out / "scores.csv").read_bytes() == before


def test_a_finished_study_is_read_and_may_grow(done, data, capsys, monkeypatch):
    out, words = done
    before = (out / "comparison.md").read_bytes()
    monkeypatch.setattr(ts.train, "fit", None)
    assert ask(data, out, *words) == 0 and (out / "comparison.md").read_bytes() == before
    assert ask(data, out, "--ways", "zero", "--parts", "2") == 0
    assert "Nothing can be concluded" in capsys.readouterr().out
    assert ask(data, out, *words, "--lr", "0.1", "0.1", "--steps-3d", "3") == 1
    told = capsys.readouterr().err
    assert "steps_3d was 2, not 3" in told and "lr was" in told and "trained alike" in told
    assert (out / "comparison.md").exists()


@pytest.mark.parametrize("words, said", [
    (["--ways", "zeros"], "found the way 'zeros'"), (["--sources", "a.pth"], "source 'a.pth'"),
    (["--seeds", "0"], "at least 1"), (["--profile", "zero"], "--ways"),
    (["--parts", "3"], "--fold must be 0 to 1"), (["--seed", "4"], "--seeds"),
    (["--pretrained", "a.pth"], "--sources"), (["--ways", "scale:0.5,0.6"], "whose sum is 1")])
def test_wrong_words(words, said, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        ask(data, tmp_path / "out", *words)
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def simulated(missing=True):
    """Rows of two ways and a reference, 3 seeds, folds of 3 and 4 cases, two classes; a case has
    none of the second, another none at all."""
    rng, rows = np.random.default_rng(0), []
    for way, better in (("random", 0.0), ("zero", 0.1), ("average", -0.02)):
        for seed in range(3):
            for number in range(7):
                for c, name in enumerate(("organ", "tumour")):
                    gone = missing and (number == 2 and c == 1 or number == 5)
                    dice = 0.5 + better + 0.05 * rng.standard_normal()
                    rows.append({"way": way, "source": "slices", "fold": int(number > 2),
                                 "seed": seed, "case": f"case{number}", "class": name,
                                 "dice": np.nan if gone else dice})
    return rows


def test_the_table_against_a_computation_of_its_own():
    rows = simulated()
    found = study.table(rows, "random", {("zero", "slices"): study.Start(0.25, 1.5)})
    assert [row.way for row in found] == ["random", "zero", "average"]

    def mean(way, seed, case):
        return np.nanmean([row["dice"] for row in rows
                           if (row["way"], row["seed"], row["case"]) == (way, seed, case)])

    p = {}
    for row in found:
        for name in ("organ", "tumour"):
            assert row.dice[name] == pytest.approx(np.nanmean(
                [r["dice"] for r in rows if (r["way"], r["class"]) == (row.way, name)]))
        if row.way != "random":
            folds = [np.array([[mean(row.way, s, c) - mean("random", s, c) for c in cases]
                               for s in range(3)])
                     for cases in (["case0", "case1", "case2"], ["case3", "case4", "case6"])]
            assert row.difference == pytest.approx(interval(folds))
            p[row.way] = interval(folds).p
    assert found[0].difference is None and np.isnan(found[0].p)
    assert {row.way: row.p for row in found[1:]} == pytest.approx(holm(p))
    assert found[1].start == (0.25, 1.5) and found[2].start is None
    assert found[1].difference.low > 0 and "| 0.250 | 1.500 |" in study.markdown(found, "random")


def test_steps_to_the_last_dice_of_the_reference():
    tried = [{"way": way, "source": "slices", "step": step, "dice": dice + spread}
             for way, curve in (("random", (0.1, 0.3, 0.6)), ("zero", (0.5, 0.61, 0.59)),
                                ("average", (0.0, 0.2, 0.59)))
             for step, dice in zip((9, 19, 29), curve, strict=True) for spread in (-0.05, 0.05)]
    assert study.reached(tried, "random") == {
        ("random", "slices"): 29, ("zero", "slices"): 19, ("average", "slices"): None}
    assert set(study.reached(tried, "planar").values()) == {None}


def test_one_seed_concludes_nothing():
    found = study.table([row for row in simulated() if row["seed"] == 1], "random", {})
    assert not any(row.difference for row in found)
    assert "needs random among the ways, two seeds" in study.markdown(found, "random")
    assert not any(row.difference for row in study.table(simulated(), "planar", {}))


def test_a_source_is_taken_as_it_is(data, done, tmp_path):
    source = done[0] / "fold0_seed0/slices_2d"
    words = ["--ways", "zero", "--sources", str(source), "random"]
    assert ask(data, tmp_path / "run", *words) == 0
    theirs = ts.load(source / "model_2d.npz")
    folder = tmp_path / "run/fold0_seed0"
    theirs_in, = (path.name.removesuffix("_zero") for path in folder.glob("slices_2d_*_zero"))
    for name, same in ((theirs_in, True), ("random", False)):
        mine = ts.load(folder / f"{name}_2d/model_2d.npz")
        assert all((a.data == b.data).all() == same for (key, a), (_, b) in zip(
            mine.named_parameters(), theirs.named_parameters(), strict=True) if "conv" in key)
        assert (folder / f"{name}_2d/history.csv").read_text("utf-8").strip() == ""
        told = json.loads((folder / f"{name}_zero/metrics.json").read_text("utf-8"))
        assert told["config"]["lr"] == [2e-3, 2e-3]  # not that of going on
    # 2D networks that have seen none of these cases are no way to compare
    assert {(row["way"], row["source"]) for row in read(tmp_path / "run/scores.csv")} == {
        ("zero", str(source)), ("zero", "random")}


def test_a_3d_network_may_be_another_ones(data, done, tmp_path):
    source = done[0] / "fold0_seed0/slices_zero/model_3d.npz"
    words = ["--ways", f"native:{source}", "--steps-3d", "0"]
    assert ask(data, tmp_path / "run", *words) == 0
    folder, = (tmp_path / "run/fold0_seed0").glob("slices_native*")
    mine, theirs = ts.load(folder / "model_3d.npz"), ts.load(source)
    assert all((a.data == b.data).all() for a, b in zip(
        mine.parameters(), theirs.parameters(), strict=True) if a.ndim > 1)  # kernels
    # Gone on with, it tells of where it began, and not of the network before it was loaded.
    began = json.loads((folder / "metrics.json").read_text("utf-8"))["equivalence"]
    (folder / "metrics.json").unlink()
    assert ask(data, tmp_path / "run", *words) == 0
    assert json.loads((folder / "metrics.json").read_text("utf-8"))["equivalence"] == began
    with pytest.raises(ValueError, match="native:FILE"):
        study.way(f"native:{tmp_path / 'none.pth'}")
    with pytest.raises(ts.job.SettingsError, match="--start none.pth: no such file"):
        ts.job.Settings(start="none.pth").expect_files()


def test_a_slot_that_did_not_move_has_not():
    flat = ts.models.resnet_seg(rank=2, in_channels=1, classes=2)
    begun = ts.inflate(flat, 3, "zero")
    assert pages.moved(flat, begun, begun) == [0, 0, 0]
    deep = begun.copy()
    for name, conv in deep.named(ts.nn.Conv):
        if len(conv.weight) == 3:
            conv.weight.data[2] += 0.5 * dict(flat.named(ts.nn.Conv))[name].weight.data
    assert pages.moved(flat, begun, deep) == pytest.approx([0, 0, 0.5])
