"""benchmarks/ablation.py asks for what its rows say."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import ablation  # noqa: E402

from tinyseg import job  # noqa: E402
from tinyseg.job import stages  # noqa: E402


@pytest.fixture
def begun(monkeypatch):
    """What runs were asked for, and the decay of their averages."""
    asked, decided, made = [], [], {}

    class Run:
        def __init__(self, folder, settings):
            self.folder, self.settings = folder, settings

        @classmethod
        def resume(cls, folder):
            return cls(folder, made[folder])

        def __enter__(self):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "run.json").touch()
            made[self.folder] = self.settings
            return self

        def __exit__(self, *what):
            pass

        def decide(self):
            decided.append(self.folder.name)
            (self.folder / "plan.json").touch()

    def method(run):
        folder, settings = run.folder, run.settings
        asked.append((settings, stages.AVERAGE))
        mean = {name: {"dice": dice + settings.seed} for name, dice in (("a", 0.25), ("b", 0.75))}
        (folder / "metrics.json").write_text(json.dumps(
            {"models": {"2d": {"mean": mean}, "3d": {"mean": {"a": {"dice": 0.125}}},
                        "ensemble": {"mean": {"a": {"dice": 0.625}}}}}))

    monkeypatch.setattr(ablation.job, "Run", Run)
    monkeypatch.setattr(ablation.example, "method", method)
    return asked, decided


def test_a_row_differs_from_none_by_its_part_and_all_from_it_by_every_one(begun, tmp_path):
    kept, found, (asked, _) = stages.AVERAGE, {}, begun
    for row, parts in ablation.ROWS.items():
        for _ in range(2):  # the second time it is read
            assert ablation.measure(parts, tmp_path / row, minutes=2, seed=3) == {
                "2d": 3.5, "3d": 0.125, "ensemble": 0.625}
        (settings, decay), = asked
        asked.clear()
        found[row] = {**settings.json(), "average": decay}
    none, defaults = found.pop("none"), job.Settings(minutes=2, seed=3).json()
    assert none == defaults | {"head": "linear", "depth_stride": ["plane"], "augment": "none",
                               "average": 0.0}
    changed = {row: {key for key in none if told[key] != none[key]} for row, told in found.items()}
    assert changed == {
        "decoder": {"head"}, "depth strides": {"depth_stride"}, "augmentation": {"augment"},
        "moving average": {"average"}, "mirror image": {"augment", "score_mirrored"},
        "all": {"head", "depth_stride", "augment", "average", "score_mirrored"}}
    assert found["all"] == defaults | {"head": "unet", "augment": "mild", "score_mirrored": True,
                                       "average": kept} and stages.AVERAGE == kept


def test_a_table_tells_means_and_how_far_seeds_lie_apart(begun, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [
        "ablation.py", "--data", "x", "--minutes", "1", "--seeds", "2", "--only", "decoder", "none",
        "--out", str(tmp_path)])
    ablation.main()
    assert [settings.seed for settings, _ in begun[0]] == [0, 0, 1, 1]
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first == "| decoder | 1.000 (0.500 to 1.500) | 0.125 (0.125 to 0.125) | " \
        "0.625 (0.625 to 0.625) | 2 |"
    assert second.startswith("| none | 1.000 ")


def test_seeds_share_the_steps_that_were_timed_before_any_row_was_trained(begun, tmp_path,
                                                                          monkeypatch):
    asked, decided = begun
    for seeds in ("1", "2"):  # the first seed is there by the second time
        monkeypatch.setattr(sys, "argv", [
            "ablation.py", "--data", str(tmp_path), "--minutes", "2", "--folds", "10", "--seeds",
            seeds, "--only", "none", "moving average", "decoder", "--out", str(tmp_path / "out")])
        ablation.main()
    plan = {row: tmp_path / "out" / f"{row}_0" / "plan.json" for row in ("none", "decoder")}
    assert decided == ["none_0", "decoder_0"]
    assert [(s.seed, s.minutes, s.plan, s.folds) for s, _ in asked] == [
        (0, 2, None, 10), (0, None, plan["none"], 10), (0, 2, None, 10),
        (1, None, plan["none"], 10), (1, None, plan["none"], 10), (1, None, plan["decoder"], 10)]
    assert [ablation.planner(row, list(ablation.ROWS)) for row in ablation.ROWS] == [
        "none", "decoder", "depth strides", "augmentation", "none", "augmentation", "all"]
