"""Everything on one GPU beside PyTorch and cuDNN, in one run: tables and logs in one folder.

Parts; what matters most is measured first, as far as the time goes:

  peaks      what the card gives: copy, float32 and TF32 matrix product
  steps      forward, Dice + cross-entropy, backward, SGD; memory
  kernels    where the time of such a step goes: each kernel's launches and milliseconds
  tests      pytest -m gpu: NumPy, CuPy and kernels agree on this card
  layers     every distinct convolution of ResNet-18 and -50 at rank 3, output stride 8: forward,
             gradient in x, gradient in w; TF32 beside TF32, bf16 beside bf16 (whose arrays are
             of that type in cuDNN only), float32 beside float32 and, for the layers with most
             columns, beside im2col (columns written out, then multiplied)
  memory     operations bound by memory, in GB/s of the fewest bytes they can move
  inference  a whole volume through infer.sliding_window
  races      a step of a small network under NVIDIA's compute-sanitizer
  tiles      a few convolutions with other tiles and numbers of buffers

Times are medians of CUDA events on random data, ours and PyTorch's in turn. Single operations are
queued while the stream is held: gaps between launches do not count; steps and inference include
what the host does. PyTorch runs with cudnn.benchmark, TF32 in channels_last_3d and in its default
layout, whole networks also as its users run them, under AMP in bf16; steps of both libraries run
as Python asks for them, and captured as a CUDA graph. A cell that PyTorch refuses is left empty. An
answer further from PyTorch's float32 than by rounding, one that differs in a bit from the same
call again, or a test that fails makes the exit code 1.

  python benchmarks/gpu.py                        all parts, in 8.5 minutes
  python benchmarks/gpu.py --parts layers steps   these parts
  python benchmarks/gpu.py --quick                one network and few layers, with tests: 4 minutes

gpu.csv, gpu.md, tests.txt and races.txt under --out hold what was found, also when the run is
stopped. Needs a GPU, CuPy (tinyseg[cuda13] or [cuda12]) and PyTorch with CUDA; exit code 2 without.
"""

from __future__ import annotations

import argparse
import csv
import gc
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import inf, prod
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # a bare checkout will do; PyTorch's twins

from gpu_tables import SIDES, report  # noqa: E402

from tinyseg import cuda as ours  # noqa: E402
from tinyseg import device  # noqa: E402

PARTS = "peaks steps kernels tests layers memory inference races tiles".split()
FIELDS = ("part case what resnet18 resnet50 direction precision".split() + list(SIDES)
          + "im2col launches rate unit error limit cudnn_error".split()
          + [f"{side}_gib" for side in SIDES] + ["note"])


class Gpu:
    """CuPy and PyTorch in one process, both on the default stream, and the card's time."""

    def __init__(self, cupy, torch):
        self.cupy, self.torch, self.pool = cupy, torch, cupy.get_default_memory_pool()
        properties = cupy.cuda.runtime.getDeviceProperties(0)
        self.name, self.cache = properties["name"].decode(), properties["l2CacheSize"]
        torch.autograd.set_multithreading_enabled(False)  # cuDNN's choices are kept per thread

    @contextmanager
    def precision(self, name: str, search: bool = True):
        """Factors of products rounded to TF32, bfloat16 (PyTorch's are then of that type), or
        float32 in full, in both libraries.

        search: cuDNN tries its algorithms. If not it guesses, and is asked for a deterministic
        one: what it keeps then does not stand in the way of a later search.
        """
        cudnn, cuda = self.torch.backends.cudnn, self.torch.backends.cuda
        cudnn.benchmark, cudnn.deterministic = search, not search
        cudnn.benchmark_limit = 4  # candidates, as its own ranking has them: the rest costs minutes
        cudnn.allow_tf32 = cuda.matmul.allow_tf32 = name == "TF32"  # sets PyTorch 2.9's new names
        with ours.precision(name.lower()):
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
    """The rows measured so far, in gpu.csv as soon as they are known, and what went wrong.

    Times are in milliseconds, `rate` is ours; resnet18 and resnet50 say how often a layer occurs.
    """

    def __init__(self, folder: Path, header: dict):
        folder.mkdir(parents=True, exist_ok=True)
        self.rows, self.faults, self.folder, self.header = [], [], folder, header
        self.file = (folder / "gpu.csv").open("w", newline="", encoding="utf-8")
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

    def tables(self) -> str:
        """What gpu.md holds from now on: the machine and all tables of what was measured."""
        text = ", ".join(f"{k} {v}" for k, v in self.header.items()) + "\n\n" + report(self)
        (self.folder / "gpu.md").write_text(text, "utf-8")
        return text

    def of(self, part: str, **wanted) -> list[dict]:
        """The rows of a part that were measured."""
        return [row for row in self.rows if row["part"] == part and any(s in row for s in SIDES)
                and all(row.get(k) == v for k, v in wanted.items())]


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

    def networks(part, function, case, backbones=parts.BACKBONES):
        for backbone in backbones:
            yield part, f"{case} {backbone}", partial(function, gpu, record, case, backbone)

    small, large = ([b] for b in parts.BACKBONES)
    theirs = [s for s in SIDES if s.endswith(" captured")]
    step = partial(parts.step, sides=[s for s in SIDES if s not in theirs])
    first, *others = parts.CASES
    yield "peaks", "", partial(parts.peaks, gpu, record)
    yield from networks("steps", step, first, small)
    yield from networks("kernels", parts.kernels, first, small)
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    yield "tests", "", partial(parts.program, record, "tests", [*tests, "tests/test_gpu.py"])
    yield from layers(first, "TF32")
    for operation in parts.operations(gpu):
        yield "memory", operation[0], partial(parts.memory, gpu, record, *operation)
    yield "memory", "SGD", partial(parts.sgd, gpu, record)
    if not quick:
        yield from networks("steps", step, first, large)
    yield from networks("steps", partial(parts.step, sides=theirs), first,
                        small if quick else parts.BACKBONES)
    if not quick:
        yield from layers(first, "bf16")
        yield from networks("inference", parts.inference, first)
    yield "races", "", partial(parts.program, record, "races", [
        "compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", *tests,
        "tests/test_gpu.py::test_a_step_on_tensor_cores"])
    for layer in parts.TILED:
        yield "tiles", str(layer), partial(parts.tiles, gpu, record, layer)
    if quick:
        return
    for case in others:
        yield from networks("steps", step, case)
    yield from layers(first, "fp32")
    for precision in "TF32", "fp32":
        for case in others:
            yield from layers(case, precision)


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
    """Work through the plan, without what would end after `deadline`: it takes up to twice as long
    as the longest of its part did."""
    from gpu_parts import SECONDS

    longest: dict[str, float] = {}  # of each part, so far
    for part, label, call in plan(gpu, record, quick):
        if part not in parts:
            continue
        began = time.monotonic()
        takes = 2 * longest[part] if part in longest else SECONDS.get(part, 15.0)
        if began + takes > deadline:  # something short may still do
            record.row(part=part, what=label, note="not measured (time)")
            continue
        try:
            call()
        except Exception as error:  # the rest of the run is worth having
            record.fault(f"{part} {label}: {type(error).__name__}: {str(error)[:500]}")
            record.row(part=part, what=label, note=f"failed: {type(error).__name__}")
        gpu.release()
        record.tables()
        longest[part] = max(longest.get(part, 0), time.monotonic() - began)


def main(arguments: list[str] | None = None) -> int:
    """0: measured; 1: something is wrong; 2: no GPU."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu",
                        metavar="FOLDER", help="where all files go (%(default)s)")
    parser.add_argument("--minutes", type=float, default=8.5,
                        help="start no measurement that would end later (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                        help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--quick", action="store_true",
                        help="one network and few layers, no inference")
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
    print("", record.tables(), sep="\n")
    print(f"{len(record.rows)} rows in {record.folder}; not measured for lack of time: {missed}")
    print(*(f"WRONG: {fault}" for fault in record.faults), sep="\n")
    return 1 if record.faults else 0


if __name__ == "__main__":
    sys.exit(main())
