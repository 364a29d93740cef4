"""One 3D training step beside PyTorch, in one run: seconds and peak memory of each.

ResNet-18, output stride 8, isotropic and zero-padded (as PyTorch has it), cross-entropy, backward,
AdamW. Each framework lives in a process of its own; their steps alternate, so that a machine that
slows down slows both. Needs PyTorch: pip install torch==2.13.0.

  python benchmarks/train_step.py                     patch 64x96x96, the figure in the README
  python benchmarks/train_step.py --patch 32 48 48    seconds instead of minutes
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def tinyseg_step(patch, threads):
    import tinyseg as ts

    net = ts.models.resnet_seg("resnet18", rank=3, in_channels=1, classes=3)
    optimizer = ts.optim.AdamW(net.parameters(), 1e-4)

    def step(x, y):
        optimizer.zero_grad()
        ts.losses.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def torch_step(patch, threads):
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from torch_models import Net

    torch.set_num_threads(threads)
    net = Net("resnet18", 3, 1, 3)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)

    def step(x, y):
        optimizer.zero_grad()
        x, y = torch.from_numpy(x).movedim(-1, 1).contiguous(), torch.from_numpy(y)
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def work(pipe, make, patch, threads):
    step, rng = make(patch, threads), np.random.default_rng(0)
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while pipe.recv():
        x = rng.standard_normal((1, *patch, 1), "float32")
        y = rng.integers(0, 3, (1, *patch))
        began = time.perf_counter()
        step(x, y)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send((time.perf_counter() - began, (peak - idle) / 2**20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, nargs=3, default=(64, 96, 96), metavar=("D", "H", "W"))
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each (%(default)s)")
    parser.add_argument("--threads", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args()

    import os
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(args.threads)
    context = multiprocessing.get_context("spawn")  # the children read the thread count at start
    sides = {}
    for name, make in (("tinyseg", tinyseg_step), ("PyTorch", torch_step)):
        here, there = context.Pipe()
        context.Process(target=work, args=(there, make, tuple(args.patch), args.threads),
                        daemon=True).start()
        there.close()
        sides[name] = here
    seconds, memory = {name: [] for name in sides}, {}
    for number in range(args.steps + 1):
        for name, pipe in sides.items():
            pipe.send(True)
            took, memory[name] = pipe.recv()
            if number:  # the first step warms up
                seconds[name].append(took)
        print(f"\rstep {number} of {args.steps}", end="", file=sys.stderr)
    for pipe in sides.values():
        pipe.send(False)

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                            capture_output=True).stdout.strip()
    print(f"\rResNet-18 3D, output stride 8, 1x{'x'.join(map(str, args.patch))}x1, float32, "
          f"{args.threads} threads")
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
          f"NumPy {np.__version__}, {time.strftime('%Y-%m-%d')}, commit {commit}")
    print(f"{'':10}{'median s':>10}{'least s':>10}{'peak GiB above idle':>22}")
    for name in sides:
        print(f"{name:10}{median(seconds[name]):10.2f}{min(seconds[name]):10.2f}"
              f"{memory[name]:22.2f}")
    ours, theirs = (median(seconds[name]) for name in ("tinyseg", "PyTorch"))
    print(f"PyTorch time / tinyseg time {theirs / ours:.2f}; "
          f"tinyseg memory / PyTorch memory {memory['tinyseg'] / memory['PyTorch']:.2f}")


if __name__ == "__main__":
    main()
