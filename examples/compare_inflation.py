"""Does a network trained on slices help on volumes, and which way of extending it is best?

Ways of making a 3D network, each trained by the main job with the same plan, the same 2D network
and the same patches, with several seeds on several folds, and scored on whole held-out volumes:

  2d            the 2D network itself, slice by slice (always, where it learned from these cases)
  2d-longer     the same, trained on slices for as many voxels as it and a 3D network together
  random        the 3D network of the main job, from random weights
  NAME          inflated by a profile: zero, average, negative, planar, factored, acs, ...
  NAME:SLOT     by one that has a slot: zero:first
  scale:A,B,C   by numbers: scale:0.2,0.6,0.2
  native:FILE   the 3D network from a checkpoint of one, under torchvision's names

What the 2D network is before is its source: slices (trained on those of the same cases), random, a
checkpoint (resnet18.pth, of ImageNet say), or the folder of another run of the main job.

All have the plan's slots along depth, which leave the first kernels flat, as some ways need it. All
else is asked for as of the main job. Words may stand in a file, one a line, that @FILE takes: a
study to keep. Every run has a folder in --out; what is finished there is not done again, so the
same command goes on after an interruption. It writes there

  scores.csv      a row for each run, case and class: Dice, surface Dice, distances
  curves.csv      Dice on patches of held-out cases, step by step
  comparison.md   the means, and the differences to --reference with 95 % intervals over cases and
                  seeds; comparison.png has the latter
  report.html     all of it to look at, in one file
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import Executor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm
from train_pancreas_3d import FAULTS, failed, slices, volumes

from tinyseg import job, parallel, ranks, report
from tinyseg.files import whole
from tinyseg.job import pages, prepare, study

WAYS = ["2d-longer", "random", "zero", "average"]
QUICK = {"quick": True, "spacing": (3.5, 2.2, 2.2), "patch": (24, 64, 64)}
CHOSEN = "fold", "seed", "profile", "alpha", "slot", "start", "from_2d", "pretrained"
EXAMPLES = """\
examples:
  python examples/compare_inflation.py --quick --out runs/quick
      three minutes on a synthetic task: what does it look like?
  python examples/compare_inflation.py --data Task04_Hippocampus --steps-2d 60 --steps-3d 60 \\
      --seeds 3 --parts 2 --ways 2d-longer random zero average planar --out runs/hippocampus
"""


def work(trial: study.Trial, out: Path, first: study.Trial, asked: dict[str, Any]) -> None:
    """Do one run, or what is left of it; ValueError where it began with other settings."""
    folder, settings = trial.folder(out), job.Settings(**trial.settings(out, first, asked))
    begun = (folder / "run.json").exists()
    run = job.Run.resume(folder) if begun else job.Run(folder, settings)
    if trial != first:  # its plan is one of the study, which may lie elsewhere now
        settings = replace(settings, plan=run.settings.plan)
    if other := run.settings.unlike(settings):
        raise ValueError(f"{folder}: {'; '.join(other)}; runs of one study are trained alike: ask "
                         "as before, or choose another --out")
    if (folder / "metrics.json").exists():
        return
    with run:
        run.decide()
        flat = slices(run)
        run.evaluate({"2d": flat} if trial.network == "2d" else {"3d": volumes(run, flat)})


def quietly(threads: int | None, *what: Any) -> None:
    """`work` in a process of its own, on as many cores; what it prints goes to a file beside its
    folder, of that name and .log."""
    trial, out, *_ = what
    if threads:
        parallel.set_threads(threads)
    folder = trial.folder(out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.log", "a", encoding="utf-8") as log:
        with redirect_stdout(log), redirect_stderr(log):
            work(*what)


def main(argv: list[str] | None = None) -> int:
    """Run the study; returns its exit code."""
    report.spell_out()
    parser = job.parser(description=__doc__, epilog=EXAMPLES, fromfile_prefix_chars="@",
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/comparison"), help="where runs and results lie "
        "(runs/comparison)")
    add("--ways", nargs="+", default=None, metavar="WAY",
        help=f"beside the 2D networks ({' '.join(WAYS)}; quick without the first)")
    add("--sources", nargs="+", default=[study.SLICES], metavar="SOURCE",
        help="of the 2D networks (slices)")
    add("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N - 1 (1)")
    add("--parts", type=int, default=1, metavar="N", help="of the --folds, that are held out in "
        "turn (1)")
    add("--reference", default=study.RANDOM, metavar="WAY", help="that others are compared with "
        "(random)")
    add("--jobs", type=int, default=1, metavar="N", help="runs side by side, a core each (1: one "
        "on all); begun by mpiexec -n N, one in each process but the first, which deals them out")
    asked = vars(parser.parse_args(argv))
    out, ways, sources, seeds, parts, reference, jobs = (asked.pop(name) for name in (
        "out", "ways", "sources", "seeds", "parts", "reference", "jobs"))
    try:
        if chosen := [name for name in CHOSEN if name in asked]:
            raise ValueError(f"found --{chosen[0].replace('_', '-')}, which a study chooses; use "
                             "--parts, --seeds, --ways and --sources")
        if min(seeds, parts, jobs) < 1:
            raise ValueError("--seeds, --parts and --jobs must be at least 1")
        ways = list(dict.fromkeys(ways or WAYS[bool(asked.get("quick")):]))
        for each in ways:
            job.Settings(**study.way(each))
        for each in sources:
            study.source(each)
        if asked.get("quick"):
            asked = QUICK | asked
        job.Settings(**asked, fold=parts - 1)
    except ValueError as error:
        parser.error(str(error))
    try:
        with ranks.world() as world:
            if not world.leads:
                return 0
            found = compare(out, study.trials(ways, sources, seeds, parts), asked, reference, jobs,
                            world)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    except FAULTS as error:
        return failed(error)
    print(f"\n{found}\n\nsee {out / 'report.html'}, comparison.md, scores.csv and curves.csv")
    return 0


def compare(out: Path, trials: list[study.Trial], asked: dict[str, Any], reference: str,
            jobs: int = 1, world: ranks.Alone = ranks.ALONE) -> str:
    """Do all runs that are not done, write what they say, and return the table."""
    if not {"data", "images"} & asked.keys():  # one synthetic task for all of them
        prepare.scans(job.Settings(**asked), out / "phantom", None)
        asked = asked | {"data": out / "phantom"}
    bar = tqdm(total=len(trials), desc="study", unit="run", position=0)
    with bar:
        if jobs == 1 and world.size == 1:
            for trial in trials:
                tqdm.write(f"\n{trial}")
                work(trial, out, trials[0], asked)
                bar.update()
        else:
            with world.pool(jobs) as pool:
                side_by_side(out, trials, asked, pool, bar, 1 if world.size == 1 else None)
    rows = study.scores(trials, out)
    report.write_table(out / "scores.csv", rows)
    tried = study.curves(trials, out)
    report.write_table(out / "curves.csv", tried)
    found = study.table(rows, reference, study.starts(trials, out))
    text = study.markdown(found, reference)
    with whole(out / "comparison.md") as draft:
        draft.write_text(text + "\n", encoding="utf-8")
    pages.of_study(out, trials, found, reference, rows, tried, asked)
    return text


def side_by_side(out: Path, trials: list[study.Trial], asked: dict[str, Any], pool: Executor,
                 bar: tqdm, threads: int | None) -> None:
    """The runs in processes: the first of all, which makes the plan, then those that make the plan
    of a fold, then all other 2D networks, and then what is made of them."""
    first, flat = trials[0], [trial for trial in trials if trial.way == study.FLAT]
    planners = [trial for trial in flat if (trial.seed, trial.source) == (0, first.source)]
    groups = [[first], planners[1:], [trial for trial in flat if trial not in planners],
              [trial for trial in trials if trial.way != study.FLAT]]
    for group in groups:
        for done in [pool.submit(quietly, threads, trial, out, first, asked) for trial in group]:
            done.result()
            bar.update()


if __name__ == "__main__":
    sys.exit(main())
