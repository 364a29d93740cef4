"""What inflation keeps: Dice of a trained 2D network and of what it becomes, with no step more.

    python benchmarks/inflation.py runs/hippocampus --cases 4

RUN is a folder of the main job. Its 2D network is inflated with several slots and strides along
depth, and every result segments the first held-out scans. Prints a table, and the CPU seconds that
a scan takes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import process_time

import numpy as np
from tqdm import tqdm

import tinyseg as ts
from tinyseg.data import decathlon
from tinyseg.files import read_json
from tinyseg.job import Plan, rules

PROFILES = ("zero", "gaussian", "average")


def ways(plan: Plan) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(slots, strides): slots by the millimetres, and with flat first stages; strides as in the
    plane, the plan's, and no halving but that of the stem, if the plan has it."""
    n, first = len(plan.depth_stride), plan.depth_stride[0]
    return [(rules.slots(plan.preprocessing.spacing, plan.depth_stride, apart), strides)
            for strides in ((2,) * n, plan.depth_stride, (first, *(1,) * (n - 1)))
            for apart in (True, False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--cases", type=int, default=4, help="held-out scans to score (4)")
    asked = parser.parse_args()
    told, plan = read_json(asked.run / "run.json"), Plan.read(asked.run / "plan.json")
    dataset = decathlon.load(told["data"] or asked.run / "phantom")
    _, held_out = decathlon.folds(told["cases"], told["folds"])[told["fold"]]
    scans = [case.read() for case in dataset.cases if case.id in held_out[: asked.cases]]
    flat = ts.load(asked.run / "model_2d.npz")
    metadata = {**flat.metadata, "patch": plan.patch_3d}

    def score(net: ts.nn.Module) -> tuple[str, float]:
        began = process_time()
        found = {str(i): ts.metrics.per_class(ts.infer.segment(net, scan), truth, dataset.labels)
                 for i, (scan, truth) in enumerate(scans)}
        seconds = (process_time() - began) / len(scans)
        mean = ts.metrics.mean(found)
        return " / ".join(f"{each['dice']:.3f}" for each in mean.values()), seconds

    names, seconds = score(flat)
    rows = [["2D", "", names, "", "", f"{seconds:.1f}"]]
    for depth, stride in tqdm(ways(plan), desc="inflate", unit="way"):
        found = []
        for profile in PROFILES:
            deep = ts.inflate(flat, depth, profile, depth_stride=stride)
            deep.metadata = metadata
            found.append(score(deep))
        rows.append([" ".join(map(str, depth)), " ".join(map(str, stride)),
                     *(told for told, _ in found), f"{np.median([s for _, s in found]):.1f}"])
    print("| slots | strides | " + " | ".join(PROFILES) + " | CPU s a scan |\n" + "|---" * 6 + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
