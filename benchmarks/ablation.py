"""What each part of the main job's defaults adds: every one alone, and all of them, in the same
minutes of training. (Mirror images can be asked for of networks that have seen some: that row has
the augmentation too, and differs from that one in how it is scored.)

    python benchmarks/ablation.py --data Task04_Hippocampus --minutes 5 --seeds 3

Without any, the network has the linear head at output stride 8 in depth as in the plane, patches
are plain, the last weights count, and scans are scored without their mirror image. Each run is the
main job, fold 0 of --folds, in a folder of --out; one that has its metrics.json is not run again,
so that an interrupted benchmark goes on. Prints the mean Dice over classes of whole held-out
volumes, and how far seeds lie apart. Minutes are by steps that are timed for every network before
any trains, and that all runs of it take: until then nothing else should work on the machine.
"""

from __future__ import annotations

import argparse
import sys
from functools import reduce
from itertools import product
from operator import or_
from pathlib import Path
from statistics import mean
from unittest.mock import patch

from tinyseg import job
from tinyseg.files import read_json
from tinyseg.job import evaluate, stages

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import train_pancreas_3d as example  # noqa: E402

NOTHING = {"head": "linear", "depth_stride": ("plane",), "augment": "none"}
PARTS: dict[str, dict] = {  # what each changes of NOTHING; the moving average is no setting
    "decoder": {"head": "unet"},
    "depth strides": {"depth_stride": None},
    "augmentation": {"augment": "mild"},
    "moving average": {},
    "mirror image": {"augment": "mild", "score_mirrored": True},
}
NETWORKS = "2d", "3d", evaluate.ENSEMBLE  # each alone, and the mean of their probabilities
ROWS = {"none": (), **{name: (name,) for name in PARTS}, "all": tuple(PARTS)}


def begun(parts: tuple[str, ...], folder: Path, **asked) -> job.Run:
    """The run in a folder; a new one has these parts."""
    if (folder / "run.json").exists():
        return job.Run.resume(folder)
    return job.Run(folder, job.Settings(**asked, **settings(parts)))


def settings(parts: tuple[str, ...]) -> dict:
    """What a run with these parts asks for."""
    return reduce(or_, [PARTS[part] for part in parts], NOTHING)


def planner(row: str, rows: list[str]) -> str:
    """The first row whose network is trained as this one's, so that it takes as long."""
    wanted = settings(ROWS[row]) | {"score_mirrored": False}
    return next(each for each in rows
                if settings(ROWS[each]) | {"score_mirrored": False} == wanted)


def measure(parts: tuple[str, ...], folder: Path, **asked) -> dict[str, float]:
    """Dice of both networks and of both together, the mean over classes, of a run with these
    parts."""
    if not (folder / "metrics.json").exists():
        decay = stages.AVERAGE if "moving average" in parts else 0.0
        with patch.object(stages, "AVERAGE", decay), begun(parts, folder, **asked) as run:
            example.method(run)
    models = read_json(folder / "metrics.json")["models"]
    return {name: mean(each["dice"] for each in models[name]["mean"].values())
            for name in NETWORKS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the Decathlon or of nnU-Net")
    add("--minutes", type=float, required=True, help="of training, for every run")
    add("--seeds", type=int, default=1, metavar="N", help="runs with seeds 0 to N - 1 (1)")
    add("--folds", type=int, default=5, metavar="K", help="one of which is held out (5)")
    add("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW",
        help=f"of {', '.join(ROWS)} (all)")
    add("--out", type=Path, default=Path("runs/ablation"), help="where runs go (runs/ablation)")
    asked = parser.parse_args()
    if asked.minutes <= 0 or asked.seeds < 1:
        parser.error("--minutes must be positive and --seeds at least 1")
    folders = {(row, seed): asked.out / f"{row.replace(' ', '_')}_{seed}"
               for seed, row in product(range(asked.seeds), asked.only)}  # soon one seed is whole
    common, first = {"data": asked.data, "folds": asked.folds}, {"minutes": asked.minutes}
    plans = {row: folders[planner(row, asked.only), 0] / "plan.json" for row in asked.only}
    for row, path in plans.items():
        if not path.exists():
            with begun(ROWS[row], path.parent, seed=0, **first, **common) as run:
                run.decide()
    found: dict[str, list[dict]] = {row: [] for row in asked.only}
    for (row, seed), folder in folders.items():
        print(f"\n{row}, seed {seed}", flush=True)
        steps = first if folder == plans[row].parent else {"plan": plans[row]}
        found[row].append(measure(ROWS[row], folder, seed=seed, **steps, **common))
    print("\n| parts | 2D | 3D | both | seeds |\n|---|---|---|---|---|")
    for row, runs in found.items():
        told = [f"{mean(scores):.3f}" + (f" ({min(scores):.3f} to {max(scores):.3f})"
                                         if len(scores) > 1 else "")
                for scores in ([run[name] for run in runs] for name in NETWORKS)]
        print(f"| {row} | {' | '.join(told)} | {len(runs)} |")


if __name__ == "__main__":
    try:
        main()
    except example.FAULTS as error:
        sys.exit(example.failed(error))
