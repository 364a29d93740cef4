"""Train on slices, inflate to volumes, fine-tune, and score both on held-out cases, and together.

The scans come as a folder of the Medical Segmentation Decathlon or of nnU-Net, as it is, or as two
folders with the same names; without any, a synthetic one is written first and takes the same path.
Everything lands in --out:

  model_2d.npz, model_3d.npz   the networks with their preparation (tinyseg.load)
  history.csv, progress.png    loss and Dice of each step, on patches centred on foreground, drawn
                               anywhere (over the last 50 steps) and of held-out cases
  metrics.json                 Dice, IoU and distances per class and case, on whole volumes, and how
                               scored
  predictions/, overlay_*.png  label maps on the scans' own grids, and pictures of them; of the 2D
                               network in predictions_2d/, of both together in predictions_ensemble/
  run.json, plan.json          what was asked for, and what was decided
  checkpoint.npz               where --resume goes on
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

import tinyseg as ts
from tinyseg import job, report

FAULTS = (OSError, ValueError, RuntimeError, ArithmeticError, MemoryError)  # that are told
EXAMPLES = """\
examples:
  python examples/train_pancreas_3d.py --quick
      two minutes on a synthetic task: does everything work here?
  python examples/train_pancreas_3d.py --data Task07_Pancreas --out runs/pancreas --device cuda
      the main job; however it ends, go on with --resume --out runs/pancreas
"""


def method(run: job.Run) -> None:
    """From a folder of scans to two networks and their scores."""
    run.decide()  # spacing, patches, depth strides, steps
    flat = slices(run)
    run.evaluate({"2d": flat, "3d": volumes(run, flat)})


def slices(run: job.Run) -> ts.nn.Module:
    """The 2D network, trained on slices, or another run's."""
    asked = run.settings
    if asked.from_2d:
        return run.take("2d", asked.from_2d)
    new = ts.models.resnet_seg(rank=2, in_channels=run.channels, classes=len(run.labels),
                               seed=asked.seed, **run.plan.architecture)
    if run.fresh:
        new.prior(run.shares)  # background is common, a tumour rare
        if asked.pretrained:
            run.pretrain(new)
    with stopping() as stop:
        return run.train("2d", new, stop=stop)


def volumes(run: job.Run, flat: ts.nn.Module) -> ts.nn.Module:
    """The 3D network that is made of it, trained on volumes."""
    asked = run.settings
    deep = ts.inflate(flat, **asked.way, **run.plan.inflation)
    if asked.start != "inflated":
        deep = ts.models.build(deep.config | {"seed": asked.seed})
        assert isinstance(deep, ts.models.Segmenter)
        deep.prior(run.shares)
        if asked.start != "random" and run.stage != "3d":
            run.pretrain(deep)
    run.compare(flat, deep)
    for prefix in asked.freeze:
        deep.freeze(prefix)
    with stopping() as stop:
        return run.train("3d", deep, stop=stop)


def begin(argv: list[str] | None, ranks: ts.ranks.Alone) -> job.Run:
    """The run that a command line asks for; what is wrong exits with code 2."""
    parser = job.parser(description=__doc__, epilog=EXAMPLES,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pancreas"),
                        help="where results go (runs/pancreas)")
    parser.add_argument("--resume", action="store_true", default=False,
                        help="go on with the run in OUT, with its settings")
    asked = vars(parser.parse_args(argv))
    out, resume = asked.pop("out"), asked.pop("resume")
    try:
        return job.Run.resume(out, ranks, **asked) if resume else job.Run(
            out, job.Settings(**asked), ranks=ranks)
    except job.SettingsError as error:
        parser.error(str(error))


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Ctrl-C in the block is noted, to stop after a step; a second one raises. Gives a function
    that says whether to stop."""
    noted = threading.Event()

    def note(*_) -> None:
        noted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    ours = (threading.current_thread() is threading.main_thread()  # others can set no handler
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler)  # nohup ignores it
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if noted.is_set():  # after the last step
        raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns its exit code."""
    report.spell_out()
    try:
        with ts.ranks.world() as ranks:  # all that mpiexec has begun; the others work for the first
            if ranks.leads:
                with begin(argv, ranks) as run:
                    method(run)
    except KeyboardInterrupt:
        print("\nstopped; go on with --resume and the same --out", file=sys.stderr)
        return 130
    except FAULTS as error:
        return failed(error)
    return 0


def failed(error: BaseException) -> int:
    """Tell a person what went wrong; the exit code."""
    told = ", ".join([str(error), *getattr(error, "__notes__", [])])
    if isinstance(error, MemoryError):
        told = (f"out of memory: {told}; a new run needs less with a smaller --patch or "
                "--batch, or a coarser --spacing")
    tqdm.write(f"error: {told}", file=sys.stderr)
    return 2 if isinstance(error, job.SettingsError) else 1


if __name__ == "__main__":
    sys.exit(main())
