"""Reading a PyTorch file beside torch.load(weights_only=True): seconds, and memory over its size.

Every pair of readings has two fresh processes, one of each reader, that take turns, so that a
machine that slows down slows both; the file is in the operating system's cache from an uncounted
pair on. "First" is the reading that a program does once. "Third" is one after two others, whose
freed memory PyTorch's process keeps and ours gives back: it costs as many page faults again.
"Extra memory" is the growth of the process's peak resident set by its first reading, divided by
the file's size: 1.0 is the arrays alone. Needs PyTorch: pip install torch==2.13.0.

  python benchmarks/read_checkpoint.py resnet50.pth
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


def tinyseg_reader():
    from tinyseg import pretrained

    return pretrained.read


def torch_reader():
    import torch

    return lambda path: torch.load(path, weights_only=True, map_location="cpu")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(pipe, make, path):
    read, idle = make(), None
    pipe.send("ready")
    while pipe.recv():
        idle = peak() if idle is None else idle
        began = time.perf_counter()
        found = read(path)
        pipe.send((time.perf_counter() - began, peak() - idle, len(found)))
        del found


def pair(context, path):
    """{reader: [(seconds, bytes of memory, entries) of three readings]}, in fresh processes."""
    pipes, told = {}, {}
    for name, make in (("tinyseg", tinyseg_reader), ("PyTorch", torch_reader)):
        pipes[name], there = context.Pipe()
        context.Process(target=work, args=(there, make, path), daemon=True).start()
        there.close()
        told[name] = []
    for pipe in pipes.values():
        pipe.recv()  # neither reads while the other still imports
    for _ in range(3):
        for name, pipe in pipes.items():
            pipe.send(True)
            told[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a PyTorch file that holds a state dict")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of processes (%(default)s)")
    args = parser.parse_args()
    if not args.file.is_file():
        parser.error(f"{args.file}: no such file")

    size, told = args.file.stat().st_size, []
    context = multiprocessing.get_context("spawn")
    for number in range(args.pairs + 1):
        told.append(pair(context, args.file))
        print(f"\rpair {number} of {args.pairs}", end="", file=sys.stderr)
    warm = told[1:] or told  # the first pair may have read from the disk

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                            capture_output=True).stdout.strip()
    print(f"\r{args.file.name}: {size / 1e6:.1f} MB, {told[0]['tinyseg'][0][2]} entries, "
          f"{len(warm)} pairs of processes")
    print(f"{platform.processor() or platform.machine()}, {multiprocessing.cpu_count()} cores, "
          f"Python {platform.python_version()}, NumPy {np.__version__}, "
          f"{time.strftime('%Y-%m-%d')}, commit {commit}")
    print(f"{'median of':12}{'first s':>10}{'third s':>10}{'extra memory / file':>22}")
    seconds = {}
    for name in ("tinyseg", "PyTorch"):
        seconds[name] = [median(t[name][i][0] for t in warm) for i in (0, 2)]
        extra = median(t[name][0][1] for t in warm) / size
        print(f"{name:12}{seconds[name][0]:10.4f}{seconds[name][1]:10.4f}{extra:22.2f}")
    first, third = (a / b for a, b in zip(*seconds.values(), strict=True))
    print(f"tinyseg time / PyTorch time: first reading {first:.2f}, third {third:.2f}")


if __name__ == "__main__":
    main()
