"""Everything on one GPU beside PyTorch and cuDNN, in one run: a CSV file and tables in Markdown.

Parts; what matters most is measured first, as far as the time goes:

  peaks      what the card gives: copy, float32 and TF32 matrix product
  layers     every distinct convolution of ResNet-18 and -50 at rank 3, output stride 8: forward,
             gradient in x, gradient in w; TF32 beside TF32, float32 beside float32 and, for the
             layers with most columns, beside im2col (columns written out, then multiplied)
  steps      forward, Dice + cross-entropy, backward, SGD; memory
  memory     operations bound by memory, in GB/s of the fewest bytes they can move
  inference  a whole volume through infer.sliding_window

Times are medians of CUDA events on random data, ours and PyTorch's in turn. Single operations are
queued while the stream is held: gaps between launches do not count; steps and inference include
what the host does. PyTorch runs eagerly with cudnn.benchmark, in channels_last_3d and in its
default layout. An answer further from PyTorch's float32 than by rounding makes the exit code 1.

  python benchmarks/gpu.py                        all parts, in 8.5 minutes
  python benchmarks/gpu.py --parts layers steps   these parts
  python benchmarks/gpu.py --quick                few layers and one step: a minute or two

Needs a GPU, CuPy (tinyseg[cuda13] or [cuda12]) and PyTorch with CUDA; exit code 2 without.
"""

from __future__ import annotations

import argparse
import csv
import gc
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from math import exp, inf, log, nan, prod
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # a bare checkout will do; PyTorch's twins

from tinyseg import device  # noqa: E402
from tinyseg.cuda import exact  # noqa: E402

PARTS = ("peaks", "layers", "steps", "memory", "inference")
TARGETS = {"forward": 0.5, "dx": 0.45, "dw": 0.35}  # cuDNN's time / ours, for a first release
LAYOUTS = {"channels_last": "channels_last_3d", "default": "default"}
FIELDS = ("part case what resnet18 resnet50 direction precision ours channels_last default im2col "
          "rate unit error limit cudnn_error ours_gib channels_last_gib default_gib note").split()


class Gpu:
    """CuPy and PyTorch in one process, both on the default stream, and the card's time."""

    def __init__(self, cupy, torch):
        self.cupy, self.torch, self.pool = cupy, torch, cupy.get_default_memory_pool()
        properties = cupy.cuda.runtime.getDeviceProperties(0)
        self.name, self.cache = properties["name"].decode(), properties["l2CacheSize"]
        torch.autograd.set_multithreading_enabled(False)  # cuDNN's choices are kept per thread

    @contextmanager
    def precision(self, name: str, search: bool = True):
        """Factors of products rounded to TF32, or float32 in full, in both libraries.

        search: cuDNN tries its algorithms. If not it guesses, and is asked for a deterministic
        one: what it keeps then does not stand in the way of a later search.
        """
        cudnn, cuda = self.torch.backends.cudnn, self.torch.backends.cuda
        cudnn.benchmark, cudnn.deterministic = search, not search
        cudnn.allow_tf32 = cuda.matmul.allow_tf32 = name == "TF32"  # sets PyTorch 2.9's new names
        with exact() if name == "fp32" else nullcontext():
            yield

    def random(self, *shape: int):
        """A tensor of normally distributed numbers."""
        return self.torch.randn(shape, device="cuda")

    def shared(self, array):
        """A CuPy array as a tensor on the same memory; `cupy.asarray` is the way back."""
        return self.torch.as_tensor(array, device="cuda")

    def layout(self, thing, side: str):
        """A tensor or network of PyTorch in the layout of this side."""
        form = getattr(self.torch, {"default": "contiguous_format"}.get(side, "channels_last_3d"))
        module = isinstance(thing, self.torch.nn.Module)
        return (thing.to if module else thing.contiguous)(memory_format=form)

    def medians(self, calls: dict, budget: float = 0.06, hold: bool = True) -> dict:
        """Median milliseconds of each call(i), turn by turn, about `budget` seconds for each.

        hold: the stream waits until a whole turn is queued. In a turn, calls that choose their
        inputs by i use different ones, so that none finds its own in the cache.
        """
        marks: dict = {name: [] for name in calls}
        synchronize = self.torch.cuda.synchronize

        def turn(i):
            began = time.perf_counter()
            for offset, (name, call) in enumerate(calls.items()):
                start, stop = self.cupy.cuda.Event(), self.cupy.cuda.Event()
                start.record()
                call(i + offset)
                stop.record()
                marks[name].append((start, stop))
            queued = time.perf_counter() - began
            synchronize()
            return queued, time.perf_counter() - began

        turn(0)  # compiles, allocates, lets cuDNN search
        queued, took = turn(1)
        for i in range(min(100, max(5, int(budget * len(calls) / took)))):
            if hold:  # cycles of a clock of at most 2 GHz
                self.torch.cuda._sleep(int(1.5 * min(queued, 0.02) * 2e9))
            turn(i)
        return {name: median(self.cupy.cuda.get_elapsed_time(*pair) for pair in pairs[2:])
                for name, pairs in marks.items()}

    def release(self) -> None:
        """Give back the memory that both libraries keep."""
        gc.collect()
        self.torch.cuda.synchronize()
        self.pool.free_all_blocks()
        self.torch.cuda.empty_cache()


class Record:
    """The rows measured so far, in the CSV file as soon as they are known, and what went wrong.

    Times are in milliseconds, `rate` is ours; resnet18 and resnet50 say how often a layer occurs.
    """

    def __init__(self, path: Path, header: dict):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows, self.faults, self.file = [], [], path.open("w", newline="", encoding="utf-8")
        self.file.writelines(f"# {name}: {value}\n" for name, value in header.items())
        self.writer = csv.DictWriter(self.file, FIELDS)
        self.writer.writeheader()

    def row(self, **values) -> None:
        """Write, print and check one row."""
        self.rows.append(values)
        self.writer.writerow({k: f"{v:.5g}" if type(v) is float else v for k, v in values.items()})
        self.file.flush()
        name = " ".join(values[k] for k in "part case what precision direction note".split()
                        if k in values)
        numbers = (f"{k} {v:.4g}" for k, v in values.items() if type(v) is float)
        print(name, *numbers, values.get("unit", ""), flush=True)
        if not values.get("error", 0) <= values.get("limit", inf):  # NaN is wrong too
            self.fault(f"{name}: off by {values['error']:.1e}, limit {values['limit']:.0e}")

    def fault(self, text: str) -> None:
        """Something that must not be."""
        self.faults.append(text)
        print(f"WRONG: {text}", flush=True)

    def of(self, part: str, **wanted) -> list[dict]:
        """The rows of a part that were measured."""
        return [row for row in self.rows if row["part"] == part and "ours" in row
                and all(row.get(k) == v for k, v in wanted.items())]


def geometric_mean(numbers) -> float:
    """NaN of nothing."""
    logs = [log(n) for n in numbers]
    return exp(sum(logs) / len(logs)) if logs else nan


def throughput(rows: list[dict], network: str) -> float:
    """Ours, over all layers of a network, as often as each occurs."""
    took = [row["ours"] * row[network] for row in rows]
    done = sum(t * row["rate"] for t, row in zip(took, rows, strict=True))
    return done / sum(took) if took else nan


def table(*rows) -> str:
    """Rows, the first of them the heading, as Markdown; nothing without a second."""
    lines = ["| " + " | ".join(map(str, row)) + " |\n" for row in rows]
    return "".join([lines[0], "|---" * len(rows[0]) + "|\n", *lines[1:]]) if rows[1:] else ""


def layer_table(record: Record) -> str:
    """The layers of each network beside cuDNN; in a mean each distinct one counts once."""
    rows = []
    for case, precision in dict.fromkeys((r["case"], r["precision"]) for r in record.of("layers")):
        for network in ("resnet18", "resnet50"):
            found = [[r for r in record.of("layers", case=case, precision=precision, direction=d)
                      if r[network]] for d in TARGETS]
            head = f"{network}, {case}, {precision}", len(found[0])
            for s, layout in LAYOUTS.items():
                means = (geometric_mean(r[s] / r["ours"] for r in f) for f in found)
                rows.append((*head, f"cuDNN ({layout}) / ours", *(f"{m:.2f}" for m in means)))
            rows.append((*head, "ours, TFLOP/s", *(f"{throughput(f, network):.0f}" for f in found)))
    goal = "", "", "target of a first release", *(f"{t:.2f}" for t in TARGETS.values())
    return table(("convolutions", "layers", "time", *TARGETS), *rows, goal) if rows else ""


def side_by_side(title: str, rows: list[dict]) -> str:
    """Whole networks beside PyTorch."""
    def line(row):
        return (f"{row['what']}, {row['case']}, {row['precision']}",
                *(f"{row[side]:.1f} ms" for side in ("ours", *LAYOUTS)),
                ", ".join(f"{row[side] / row['ours']:.2f}" for side in LAYOUTS),
                ", ".join(f"{row.get(f'{s}_gib', nan):.1f}" for s in ("ours", *LAYOUTS)))

    return table((title, "tinyseg", *(f"PyTorch {layout}" for layout in LAYOUTS.values()),
                  "PyTorch / tinyseg", "GiB of each"), *map(line, rows))


def report(record: Record) -> str:
    """All tables, of what was measured."""
    peaks = record.of("peaks")
    copy = next((row["rate"] for row in peaks if row["unit"] == "GB/s"), nan)
    texts = [
        table(("peak", "measured"), *((r["what"], f"{r['rate']:.0f} {r['unit']}") for r in peaks)),
        layer_table(record),
        table(("forward, fp32, ms", "ours", "im2col", "cuDNN channels_last_3d"), *(
            (r["what"], *(f"{r[s]:.3f}" for s in ("ours", "im2col", "channels_last")))
            for r in record.of("layers") if "im2col" in r)),
        *(side_by_side(part, record.of(part)) for part in ("steps", "inference")),
        table(("bound by memory", "", "tinyseg", "of a copy", "PyTorch / tinyseg"), *(
            (r["what"], r["direction"], f"{r['rate']:.0f} GB/s", f"{r['rate'] / copy:.2f}",
             ", ".join(f"{r[s] / r['ours']:.2f}" for s in LAYOUTS if s in r))
            for r in record.of("memory")))]
    return "\n".join(filter(None, texts))


def plan(gpu: Gpu, record: Record, quick: bool) -> Iterator[tuple]:
    """(part, label, what to call), the most important first."""
    import gpu_parts as parts

    def layers(case, precision):
        batch, size, inflated = parts.CASES[case]
        each = {b: parts.layers(parts.network(b, inflated), batch, size) for b in parts.BACKBONES}
        union = list(each["resnet18"] | each["resnet50"])
        if quick:
            union = union[:8:2]
        wide = sorted((a for a in union if max(a.window.kernel) > 1),
                      key=lambda a: prod(a.shapes[2][:-1]) * prod(a.shapes[1][:-1]))[-3:]
        for layer in union:
            counts = {backbone: each[backbone][layer] for backbone in parts.BACKBONES}
            im2col = precision == "fp32" and case == first and layer in wide
            yield "layers", f"{case} {precision} {layer}", partial(
                parts.convolution, gpu, record, case, precision, layer, counts, im2col)

    def networks(part, function, case):
        for backbone in parts.BACKBONES[:1 if quick else None]:
            yield part, f"{case} {backbone}", partial(function, gpu, record, case, backbone)

    first, *others = parts.CASES
    yield "peaks", "", partial(parts.peaks, gpu, record)
    yield from layers(first, "TF32")
    yield from networks("steps", parts.step, first)  # quick here: cuDNN has searched these layers
    yield from layers(first, "fp32")
    for operation in parts.operations(gpu):
        yield "memory", operation[0], partial(parts.memory, gpu, record, *operation)
    yield "memory", "SGD", partial(parts.sgd, gpu, record)
    if quick:
        return
    yield from networks("inference", parts.inference, first)
    for case in others:
        yield from layers(case, "TF32")
        yield from networks("steps", parts.step, case)
    for case in others:
        yield from layers(case, "fp32")


def libraries():
    """CuPy and PyTorch, both with a GPU; RuntimeError says what is missing."""
    try:
        cupy = device("cuda")
        import torch
    except ImportError as error:
        raise RuntimeError(f"the comparison needs PyTorch with CUDA ({error})") from None
    if torch.cuda.is_available():
        return cupy, torch
    raise RuntimeError(f"PyTorch {torch.__version__} finds no GPU; install a build with CUDA")


def header(gpu: Gpu) -> dict:
    """What the figures depend on."""
    def said(*command):
        try:
            return subprocess.run(command, cwd=ROOT, text=True, capture_output=True).stdout.strip()
        except OSError:  # no such command
            return ""

    commit = said("git", "describe", "--always", "--dirty", "--exclude=*")
    driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {"card": gpu.name, "driver": driver or "unknown",
            "CUDA runtime": gpu.cupy.cuda.runtime.runtimeGetVersion(),
            "CuPy": gpu.cupy.__version__, "PyTorch": gpu.torch.__version__,
            "cuDNN": gpu.torch.backends.cudnn.version(), "Python": sys.version.split()[0],
            "date": time.strftime("%Y-%m-%d"), "commit": commit or "unknown, no git here"}


def run(gpu: Gpu, record: Record, parts: list[str], quick: bool, deadline: float) -> None:
    """Work through the plan until what comes next would end after `deadline`."""
    longest, late = dict.fromkeys(PARTS, 15.0), False  # seconds
    for part, label, call in plan(gpu, record, quick):
        if part not in parts:
            continue
        began = time.monotonic()
        if late := late or began + longest[part] > deadline:
            record.row(part=part, what=label, note="not measured (time)")
            continue
        try:
            call()
        except Exception as error:  # the rest of the run is worth having
            record.fault(f"{part} {label}: {type(error).__name__}: {str(error)[:500]}")
            record.row(part=part, what=label, note=f"failed: {type(error).__name__}")
        gpu.release()
        longest[part] = max(longest[part], time.monotonic() - began)


def main(arguments: list[str] | None = None) -> int:
    """0: measured; 1: something is wrong; 2: no GPU."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu.csv",
                        help="the CSV file (%(default)s)")
    parser.add_argument("--minutes", type=float, default=8.5,
                        help="start no measurement that would end later (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                        help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--quick", action="store_true", help="few layers, one step, no inference")
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * args.minutes

    try:
        cupy, torch = libraries()
    except RuntimeError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    described = header(gpu := Gpu(cupy, torch))
    record = Record(args.out, described)
    with record.file:
        try:
            run(gpu, record, args.parts, args.quick, deadline)
        except Exception as error:  # a kernel that fails may take the whole context with it
            record.fault(f"stopped early: {type(error).__name__}: {str(error)[:500]}")
    missed = sum(r.get("note", "").startswith("not measured") for r in record.rows)
    print("", ", ".join(f"{k} {v}" for k, v in described.items()), report(record), sep="\n")
    print(f"{len(record.rows)} rows in {args.out}; not measured for lack of time: {missed}")
    print(*(f"WRONG: {fault}" for fault in record.faults), sep="\n")
    return 1 if record.faults else 0


if __name__ == "__main__":
    sys.exit(main())
