"""This library's main job beside nnU-Net v2: Dice of whole held-out volumes against minutes of
training, on the same two cores.

  python benchmarks/beside_nnunet.py --data FOLDER --minutes 5 10 20 40 --seeds 3

Every number of minutes has complete runs of its own, whose schedules end with it:

  tinyseg    examples/train_pancreas_3d.py --data FOLDER --minutes M --seed S, and nothing else
  nnU-Net    its default plan, 3d_fullres, -device cpu, its trainer ended by the clock: how, is said
             in nnunet_by_the_clock.py. No torch.compile: nnU-Net leaves it out on CPUs. Then
             nnUNetv2_predict with its defaults: windows half overlapping, all mirror images

Both hold out fold 0 of 5, the same cases (tinyseg.data.decathlon.folds), and tinyseg.metrics scores
the label maps of both; --cases scores the first of them, where nnU-Net takes minutes to predict a
scan. All processes of a side share the two cores; nnU-Net augments in two of its
own (nnUNet_n_proc_DA=2, what it takes by itself on two cores). Minutes are those of training steps,
waiting for their patches included. The table tells the rest apart. Before: nnU-Net's fingerprint,
plan and preprocessing, once per data set and of all cases, held out or not; all that the job does
beside its steps until its networks are there, looking at held-out patches meanwhile included (what
nnU-Net does of the kind is left out). After: nnU-Net's prediction; the job's prediction and scoring
of its 3D network, and of its 2D one too. A seed names a run: it fixes all of the job's, but of
nnU-Net's the first weights alone.

nnU-Net is installed in an environment of its own, nnunet_env in the system's folder of temporary
files (TMPDIR moves it); converted data and runs lie beside it in beside_nnunet, and runs are
removed when scored (--keep). Where pip would fetch PyTorch for GPUs,
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes.

Results go to --out: beside_nnunet_NAME.csv, a row after each run, and a picture of this machine's
rows. A run that has a row of this machine is not run again, so that an interrupted benchmark goes
on; to measure it anew remove the row. Nothing else should work on the machine. Needs Linux.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import gettempdir
from zlib import crc32

import numpy as np
from tqdm import tqdm

import tinyseg as ts
from tinyseg import files, metrics, report
from tinyseg.data import decathlon, nifti

ROOT = Path(__file__).resolve().parents[1]
JOB = ROOT / "examples/train_pancreas_3d.py"
CLOCK = ROOT / "benchmarks/nnunet_by_the_clock.py"
VERSIONS = ("torch==2.13.0", "torchvision==0.28.0", "nnunetv2==2.8.1")  # that go together
HOME, WORK = (Path(gettempdir()) / name for name in ("nnunet_env", "beside_nnunet"))
TASK, ENDING = "Dataset001_Beside", ".nii.gz"
CORES = 2


def call(command: Sequence[object], log: Path, **environment: object) -> float:
    """Seconds that a command took. What it prints goes to the end of `log`, its bars are shown.

    RuntimeError with the log's last lines where it fails.
    """
    began, threads = time.monotonic(), dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
                                                     CORES)
    told = {name: str(value) for name, value in (threads | environment).items()}
    with open(log, "a", encoding="utf-8") as file:
        code = subprocess.run([str(word) for word in command], stdout=file,
                              env=os.environ | told).returncode
    if code:
        last = log.read_text("utf-8", errors="replace").splitlines()[-15:]
        raise RuntimeError("\n".join([f"exit code {code} of {' '.join(map(str, command))}; the last"
                                      f" lines of {log}:", *last]))
    return time.monotonic() - began


def install() -> None:
    """nnU-Net in its environment, with the trainer that ends by the clock."""
    ready = HOME / "ready.txt"
    if not ready.is_file() or ready.read_text("utf-8").split() != list(VERSIONS):
        shutil.rmtree(HOME, ignore_errors=True)
        print(f"installing {', '.join(VERSIONS)} in {HOME}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", HOME], check=True)
        subprocess.run([HOME / "bin/pip", "install", *VERSIONS], check=True)
        ready.write_text("\n".join(VERSIONS), encoding="utf-8")
    # Beside nnU-Net's own trainer, where it looks first; elsewhere it would load all others too.
    place, = HOME.glob("lib/python3*/site-packages/nnunetv2/training/nnUNetTrainer")
    shutil.copy(CLOCK, place)


def convert(dataset: decathlon.Dataset, folder: Path) -> None:
    """The data set in `folder`/raw as nnU-Net v2 has it, a file for every channel, linked where it
    can be.

    ValueError where the labels are not 0, 1, 2 and so on: nnU-Net takes no others.
    """
    if list(dataset.labels) != list(range(len(dataset.labels))):
        raise ValueError(f"{dataset.name}: found the labels {list(dataset.labels)}, expected 0 to "
                         f"{len(dataset.labels) - 1} as nnU-Net needs them; renumber them")
    raw = folder / "raw" / TASK
    for part in (raw / "imagesTr", raw / "labelsTr"):
        part.mkdir(parents=True)
    for case in tqdm(dataset.cases, desc="convert", unit="case"):
        scans = [raw / "imagesTr" / f"{case.id}_{channel:04d}{ENDING}"
                 for channel in range(len(dataset.modalities))]
        place([case.image, *case.further], scans)
        place([case.label], [raw / "labelsTr" / f"{case.id}{ENDING}"])
    report.write_json(raw / "dataset.json", {
        "channel_names": dataset.modalities, "numTraining": len(dataset.cases),
        "labels": {name if number else "background": number
                   for number, name in dataset.labels.items()},
        "file_ending": ENDING})


def place(sources: Sequence[Path], targets: Sequence[Path]) -> None:
    """Volumes under other names: links, and copies of those with another ending or four axes."""
    import nibabel as nib

    if nib.load(sources[0]).ndim > 3:
        for image, target in zip(nib.four_to_three(nib.load(sources[0])), targets, strict=True):
            nib.save(image, target)
        return
    for source, target in zip(sources, targets, strict=True):
        if source.name.endswith(ENDING):
            target.symlink_to(source.resolve())
        else:
            nib.save(nib.load(source), target)


def planned(dataset: decathlon.Dataset, folder: Path, environment: dict) -> float:
    """Seconds of nnU-Net's fingerprint, plan and preprocessing, made where they are not there."""
    told = folder / "planned.json"
    if not told.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folds = decathlon.folds([case.id for case in dataset.cases])
        convert(dataset, folder)
        seconds = call([HOME / "bin/nnUNetv2_plan_and_preprocess", "-d", 1, "-c", "3d_fullres",
                        "--verify_dataset_integrity", "-npfp", CORES, "-np", CORES],
                       folder / "log.txt", **environment)
        report.write_json(folder / "preprocessed" / TASK / "splits_final.json",
                          [{"train": train, "val": held_out} for train, held_out in folds])
        report.write_json(told, {"seconds": seconds})
    return files.read_json(told)["seconds"]


def nnunet(data: Path, out: Path, minutes: float, seed: int, held_out: Sequence[str]) -> dict:
    """A run of nnU-Net in `out`, predictions of these cases included: steps, and the seconds of its
    parts."""
    install()
    dataset = decathlon.load(data)
    sources = "\n".join(str(path.resolve()) for case in dataset.cases for path in case.files)
    folder = WORK / f"data_{crc32(sources.encode()):08x}"
    environment = {"PYTHONPATH": "", "PATH": f"{HOME / 'bin'}{os.pathsep}{os.environ['PATH']}",
                   "nnUNet_raw": folder / "raw", "nnUNet_preprocessed": folder / "preprocessed",
                   "nnUNet_results": out, "nnUNet_compile": "f", "nnUNet_n_proc_DA": CORES,
                   "nnUNet_def_n_proc": CORES, "MINUTES": minutes, "SEED": seed}
    before = planned(dataset, folder, environment)
    scans = out / "held_out"
    scans.mkdir()
    for case, channel in product(held_out, range(len(dataset.modalities))):
        name = f"{case}_{channel:04d}{ENDING}"
        (scans / name).symlink_to(folder / "raw" / TASK / "imagesTr" / name)
    which = ["-tr", "nnUNetTrainerByTheClock", "-device", "cpu"]
    call([HOME / "bin/nnUNetv2_train", 1, "3d_fullres", 0, *which], out / "log.txt", **environment)
    after = call([HOME / "bin/nnUNetv2_predict", "-i", scans, "-o", out / "predictions", "-d", 1,
                  "-c", "3d_fullres", "-f", 0, *which], out / "log.txt", **environment)
    clock = files.read_json(next(out.glob(f"{TASK}/*/fold_0/clock.json")))
    return {"version": VERSIONS[-1], "steps": clock["iterations"], "training": clock["seconds"],
            "before": before, "after": after}


def tinyseg(data: Path, out: Path, minutes: float, seed: int, held_out: Sequence[str]) -> dict:
    """The same of the main job, which predicts all that it holds out; its steps are those on slices
    and those on volumes."""
    took = call([sys.executable, JOB, "--data", data, "--minutes", f"{minutes:g}", "--seed", seed,
                 "--out", out], out / "log.txt")
    after = time.time() - (out / "model_3d.npz").stat().st_mtime
    history = read_table(out / "history.csv")
    training = sum(float(row["seconds"]) for row in history)
    return {"version": f"tinyseg=={ts.__version__}", "steps": len(history), "training": training,
            "before": took - training - after, "after": after}


SIDES = {"tinyseg": tinyseg, "nnunet": nnunet}
LINES = {"tinyseg": ("tinyseg", "-"), "nnunet": ("nnU-Net", "--")}


def score(predictions: Path, cases: Sequence[decathlon.Case]) -> dict[str, float]:
    """{class: mean Dice} of label maps over whole cases, on the scans' own grids."""
    scores = {}
    for case in tqdm(cases, desc="score", unit="case"):
        scan, truth = case.read()
        predicted = nifti.read(predictions / f"{case.id}{ENDING}", truth.dtype)
        predicted.expect_grid_of(scan)
        scores[case.id] = metrics.per_class(predicted.array, truth, case.labels)
    return {name: measures["dice"] for name, measures in metrics.mean(scores).items()}


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def measure(side: str, data: Path, out: Path, minutes: float, seed: int, most: int | None = None
            ) -> dict:
    """One run of one side in `out`, scored on at most so many held-out cases, as a row of the
    table."""
    dataset = decathlon.load(data)
    train, held_out = decathlon.folds([case.id for case in dataset.cases])[0]
    held_out = held_out[:most]
    shutil.rmtree(out, ignore_errors=True)  # of a run that was interrupted
    out.mkdir(parents=True)
    told = SIDES[side](data, out, minutes, seed, held_out)
    dice = score(out / "predictions", [case for case in dataset.cases if case.id in held_out])
    commit, changed = (subprocess.run(["git", *words], cwd=ROOT, text=True, capture_output=True)
                       .stdout.strip() for words in (
                           ["rev-parse", "--short", "HEAD"],
                           ["status", "--porcelain", "tinyseg", "examples", "kernels"]))
    return {"side": side, "minutes": f"{minutes:g}", "seed": seed,
            "mean Dice": round(mean(dice.values()), 4),
            **{f"Dice {name}": round(value, 4) for name, value in dice.items()},
            "steps": told["steps"],
            **{f"seconds {part}": round(told[part], 1) for part in ("training", "before", "after")},
            "training cases": len(train), "held-out cases": len(held_out),
            "version": told["version"], "commit": commit + "+" * bool(changed),
            "date": time.strftime("%Y-%m-%d"), "cores": CORES, "machine": machine()}


@cache
def machine() -> str:
    """The processor by its name and family: a server's name may stand for any generation."""
    told = (line.partition(":") for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines())
    facts = {name.strip(): value.strip() for name, _, value in told}
    return f"{facts.get('model name', 'unknown')}, family {facts.get('cpu family', 'unknown')}"


def draw(path: Path, rows: Sequence[dict], title: str) -> None:
    """Dice against the minutes that training took: the mean of classes, and each class.

    A point is a run, a line goes through the means over the seeds of each budget.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    budgets = sorted({float(row["minutes"]) for row in rows})
    scores = [key for key in rows[0] if key.startswith("Dice ")]
    for panel, keys in zip(panels, (["mean Dice"], scores), strict=True):
        for (side, (name, style)), (i, key) in product(LINES.items(), enumerate(keys)):
            groups = [np.array([(float(row["seconds training"]) / 60, float(row[key]))
                                for row in rows if row["side"] == side
                                and float(row["minutes"]) == minutes]) for minutes in budgets]
            if not (groups := [group for group in groups if len(group)]):
                continue
            colour = report.COLOURS[i % len(report.COLOURS) if len(keys) > 1
                                    else list(LINES).index(side) + 1]
            panel.plot(*np.concatenate(groups).T, "o", color=colour, markersize=4,
                       fillstyle="full" if style == "-" else "none")
            panel.plot(*np.stack([group.mean(axis=0) for group in groups]).T, style, color=colour,
                       label=f"{key.removeprefix('Dice ')}, {name}")
        panel.set_xscale("log")
        panel.set_xticks(budgets, [f"{minutes:g}" for minutes in budgets])
        panel.minorticks_off()
        panel.set_xlabel("minutes of training")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    panels[0].set_ylabel("Dice of whole held-out volumes")
    figure.suptitle(title)
    with files.whole(path) as draft:
        figure.savefig(draft, dpi=110, format="png")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the Decathlon or of nnU-Net")
    add("--minutes", type=float, nargs="+", required=True, help="of training, a run for each")
    add("--seeds", type=int, default=1, metavar="N", help="runs with seeds 0 to N - 1 (1)")
    add("--cases", type=int, metavar="N", help="score the first N that are held out (all)")
    add("--out", type=Path, default=ROOT / "benchmarks/results", help="where results go")
    add("--only", choices=list(SIDES), help="one side (both)")
    add("--keep", action="store_true", help=f"keep what the runs wrote, in {WORK}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """All runs that the table lacks, one after the other; the exit code."""
    parser = options()
    args = parser.parse_args(argv)
    if min(args.minutes) <= 0 or args.seeds < 1 or args.cases is not None and args.cases < 1:
        parser.error("--minutes must be positive, --seeds and --cases at least 1")
    if not hasattr(os, "sched_setaffinity"):
        parser.error("both sides are held to two cores, which needs Linux")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    try:
        dataset = decathlon.load(args.data)
        name = re.sub(r"\W+", "_", dataset.name.lower())
        table = args.out / f"beside_nnunet_{name}.csv"
        args.out.mkdir(parents=True, exist_ok=True)
        WORK.mkdir(parents=True, exist_ok=True)
        with files.held(WORK):
            rows: list[dict] = list(read_table(table))
            mine = [row for row in rows if row["machine"] == machine()]
            there = {(row["side"], float(row["minutes"]), int(row["seed"])) for row in mine}
            sides = [args.only] if args.only else list(SIDES)
            wanted = [(side, minutes, seed) for minutes, seed, side in
                      product(sorted(set(args.minutes)), range(args.seeds), sides)]
            runs = [run for run in wanted if run not in there]
            print(f"{len(wanted) - len(runs)} of {len(wanted)} runs are in {table}")
            for number, (side, minutes, seed) in enumerate(runs, 1):
                print(f"run {number} of {len(runs)}: {LINES[side][0]}, {minutes:g} minutes, seed "
                      f"{seed}", flush=True)
                out = WORK / f"run_{name}_{side}_{minutes:g}_{seed}"
                row = measure(side, args.data, out, minutes, seed, args.cases)
                report.write_table(table, rows := [*rows, row])
                mine.append(row)
                if not args.keep:
                    shutil.rmtree(out)
                print(", ".join(f"{key} {row[key]:.3f}" for key in row if "Dice" in key),
                      flush=True)
            if mine:
                draw(table.with_suffix(".png"), mine, f"{dataset.name}, fold 0 of 5, "
                     f"{CORES} cores of {mine[-1]['machine']}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the run that was stopped, from its start",
              file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
