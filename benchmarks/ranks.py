"""Several processes at one training: what a step takes, how much of the sums hides, and how far
that goes.

  measure   training steps of ResNet-18 3D, a patch of 64x96x96 and one thread for each process:
            without MPI, one rank, and two. Throughput is in patches a second, that of the first
            being one. Beside it the sum of all gradients with nothing to hide behind (alone), and
            what of it a step waits for at its end (left). "apart" are two processes that do the
            same and never meet: what the machine lets two cores do. Sides take turns, figures are
            medians.
  model     the same on paper for larger N, see `efficiency`: its sums against those measured, and
            a table for links that a cluster has

  python benchmarks/ranks.py                   both, three minutes on two cores
  python benchmarks/ranks.py --parts model     at once

Needs mpi4py and an mpiexec of its MPI: pip install tinyseg[mpi] mpich.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from math import log2
from pathlib import Path
from statistics import median

import numpy as np

import tinyseg as ts

SIZE = (64, 96, 96)
APART = "2, apart"
NORMS, MOMENTS = 20, 2048  # batch-norms of ResNet-18, gathering twice a step so many bytes a rank
BACKWARD = 2 / 3  # of a step, during which sums of the gradients behind it travel
LINKS = {  # nominal: bytes a second each way, seconds of a message
    "Ethernet, 25 Gb/s": (3.1e9, 30e-6),
    "InfiniBand NDR, 400 Gb/s": (50e9, 2e-6),
    "NVLink 4, in a machine": (450e9, 8e-6),  # a step of NCCL's ring
}
STEPS = {  # seconds of a step whose patches each rank has for itself; see benchmarks/README.md
    "H100, 2 x 40x224x224 a rank, TF32": 14.9e-3,
    "two Zen 1 cores, 1x64x96x96 a rank": 2.27,
}


def reduction(ranks: int, size: float, bandwidth: float, latency: float) -> float:
    """Seconds of a sum over ranks of `size` bytes, scattered and gathered again: each passes on
    2 (N - 1) / N of them in 2 log2 N messages (Rabenseifner's; Thakur et al. 2005, section 4.5)."""
    return 2 * log2(ranks) * latency + 2 * (ranks - 1) / ranks * size / bandwidth


def efficiency(ranks: int, step: float, size: float, bandwidth: float, latency: float) -> float:
    """The share of N times one rank's patches a second that N ranks reach, each with as many.

    Buckets that travel in the backward pass cost nothing; the last one has nothing to hide behind,
    and batch-norms wait for what all ranks gather, log2 N messages deep.
    """
    last = reduction(ranks, ts.ranks.BUCKET, bandwidth, latency)
    late = max(size / ts.ranks.BUCKET * last - BACKWARD * step, 0)
    norms = 2 * NORMS * (log2(ranks) * latency + ranks * MOMENTS / bandwidth)
    return step / (step + max(late, last) + norms)


def network() -> ts.models.Segmenter:
    return ts.models.resnet_seg("resnet18", rank=3, in_channels=1, classes=3)


def steps(ranks: ts.ranks.Alone, count: int) -> dict[str, float]:
    """Median seconds on this rank, of steps of a patch for each."""
    ts.parallel.set_threads(1)
    net, rng = network(), np.random.default_rng(0)
    optimizer = ts.optim.AdamW(net.parameters(), 1e-4)
    images = rng.standard_normal((1, *SIZE, 1), "float32")
    labels = rng.integers(0, 3, images.shape[:-1])
    found: dict[str, list[float]] = {"step": [], "left": [], "alone": []}
    with ts.nn.synchronised(net, ranks):
        for _ in range(count + 1):
            began = time.perf_counter()
            optimizer.zero_grad()
            loss = ts.losses.dice_cross_entropy(net(images), labels, ranks=ranks)
            with ranks.summing() as ready:
                loss.backward(ready=ready)
                walked = time.perf_counter()
            summed = time.perf_counter()
            optimizer.step()
            found["step"].append(time.perf_counter() - began)
            found["left"].append(summed - walked)
            ranks.gather(None)
            began = time.perf_counter()
            with ranks.summing() as ready:
                for p in net.parameters() if ready else ():
                    ready(p)
            found["alone"].append(time.perf_counter() - began)
    return {name: median(seconds[1:]) for name, seconds in found.items()}


def serve(count: int) -> None:
    with ts.ranks.world() as ranks:
        if ranks.leads:
            print(json.dumps(ranks.everywhere(steps, count)))


def measure(turns: int, count: int) -> dict[str, dict[str, float]]:
    """{side: medians of its first process}."""
    mpiexec = shutil.which("mpiexec", path=os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ["PATH"]]))
    if mpiexec is None:
        sys.exit("found no mpiexec: pip install mpich, or apt install openmpi-bin")
    found: dict[str, list[dict[str, float]]] = {side: [] for side in ("no MPI", "1", "2", APART)}
    for _ in range(turns):
        for side, runs in found.items():
            begun = [mpiexec, "-n", side] if side.isdigit() else []
            words = [*begun, sys.executable, __file__, "--serve", str(count)]
            processes = [subprocess.Popen(words, text=True, stdout=subprocess.PIPE)
                         for _ in range(1 + (side == APART))]
            told = [process.communicate()[0] for process in processes]
            runs.append(json.loads(told[0]))
    return {side: {name: median(run[name] for run in runs) for name in runs[0]}
            for side, runs in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=("measure", "model"), default=("measure", "model"))
    add("--turns", type=int, default=3, help="of all sides (%(default)s)")
    add("--steps", type=int, default=3, help="timed in a turn (%(default)s)")
    add("--serve", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.serve)
        return
    size = sum(p.data.nbytes for p in network().parameters())
    print(f"ResNet-18 3D, {size / 1e6:.0f} MB of gradients")
    if "measure" in asked.parts:
        found = measure(asked.turns, asked.steps)
        print("\n| ranks | step s | throughput | sums alone s | left s | overlap |\n"
              "|---|---|---|---|---|---|")
        one = found["no MPI"]["step"]
        for side, run in found.items():
            told = [f"{x:.3f}" for x in (run["alone"], run["left"])] + [
                f"{1 - run['left'] / run['alone']:.0%}"] if side == "2" else [""] * 3
            many = (1 + ("2" in side)) * one / run["step"]
            print(f"| {side} | {run['step']:.2f} | {many:.3f} | {' | '.join(told)} |")
        two, apart = found["2"], found[APART]["step"]
        speed = size / two["alone"]
        paper = efficiency(2, apart, size, speed, 20e-6)
        print(f"\nMemory between 2 ranks passes {speed / 1e9:.2f} GB/s; on paper they reach "
              f"{paper:.3f} of what they do apart, measured {apart / two['step']:.3f}")
    if "model" in asked.parts:
        counts = (2, 8, 64, 512)
        for name, step in STEPS.items():
            print(f"\n| {name}: {1e3 * step:.0f} ms a step | "
                  + " | ".join(f"{n} ranks" for n in counts) + " | half is lost, 64 ranks |\n"
                  + "|---" * (len(counts) + 2) + "|")
            for link, (bandwidth, latency) in LINKS.items():
                told = [f"{efficiency(n, step, size, bandwidth, latency):.0%}" for n in counts]
                least = next(t for t in np.geomspace(1e-4, 10, 500)
                             if efficiency(64, t, size, bandwidth, latency) > 0.5)
                print(f"| {link} | {' | '.join(told)} | below {1e3 * least:.1f} ms a step |")


if __name__ == "__main__":
    main()
