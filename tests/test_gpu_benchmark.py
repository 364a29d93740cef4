"""benchmarks/gpu.py as far as it goes without a GPU: what it would measure, and its tables."""

import csv
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/gpu.py"
sys.path.insert(0, str(SCRIPT.parent))

import gpu  # noqa: E402
import gpu_networks as networks  # noqa: E402
import gpu_parts as parts  # noqa: E402
import gpu_tables as tables  # noqa: E402
import torch_models  # noqa: E402

from tinyseg import models  # noqa: E402

CASE = "2x40x224x224 isotropic"


@pytest.fixture(scope="module", autouse=True)
def _forget():
    yield
    parts.network.cache_clear()  # four networks of up to 180 MB


def counted(model, batch, size):
    """(multiply-adds, shapes and options of each convolution) of a network of PyTorch."""
    found = []

    def note(module, inputs, y):
        taps = math.prod(module.kernel_size) * module.in_channels
        found.append((y.numel() * taps, (*inputs[0].shape, *module.weight.shape, *module.stride,
                                         *module.dilation)))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model.eval()(torch.empty(batch, 1, *size, device="meta"))
    return sum(n for n, _ in found), [shapes for _, shapes in found]


def ours(case, backbone):
    batch, size, inflated = parts.CASES[case]
    return parts.layers(parts.network(backbone, inflated), batch, size)


@pytest.mark.parametrize("case", parts.CASES)
@pytest.mark.parametrize("backbone", parts.BACKBONES)
def test_the_layers_are_those_of_the_network(case, backbone):
    batch, size, inflated = parts.CASES[case]
    net = parts.network(backbone, inflated)
    with torch.device("meta"):  # shapes alone
        model = (parts.torch_twin(net) if inflated else
                 torch_models.Net(backbone, 3, 1, parts.CLASSES))
    macs, shapes = counted(model, batch, size)
    found = ours(case, backbone)
    assert sum(n * layer.operations for layer, n in found.items()) == 2 * macs
    assert sum(found.values()) == len(shapes) and len(found) == len(set(shapes))


def test_known_counts():
    found = {backbone: ours(CASE, backbone) for backbone in parts.BACKBONES}
    assert [sum(f.values()) for f in found.values()] == [21, 54]
    assert [len(f) for f in found.values()] == [12, 22]
    assert len(found["resnet18"] | found["resnet50"]) == 29
    assert sum(n * a.operations for a, n in found["resnet18"].items()) == 2 * 295_030_865_920
    stem = next(iter(found["resnet50"]))
    assert str(stem) == "1->64 7x7x7 stride 2x2x2 dilation 1x1x1 @2x40x224x224"
    assert stem.shapes == [(2, 40, 224, 224, 1), (7, 7, 7, 1, 64), (2, 20, 112, 112, 64)]


def test_twins_of_inflated_networks_answer_alike():
    net = parts.network("resnet18", True).copy().eval()
    x = torch.randn(1, 3, 24, 16, 1)
    with torch.no_grad():
        theirs = torch_models.channels_last(parts.torch_twin(net).eval()(
            torch_models.channels_first(x)))
    assert parts.difference(torch.from_numpy(net(x.numpy()).data), theirs) < 1e-4


def row(direction, network, ours, theirs, rate=10.0, **more):
    counts = {"resnet18": network == 18, "resnet50": 2 * (network == 50)}
    return {"part": "layers", "case": CASE, "what": "a layer", **counts, "direction": direction,
            "precision": "TF32", "ours": ours, "channels_last": theirs, "default": 4 * theirs,
            "rate": rate, "unit": "TFLOP/s", "error": 1e-4, "limit": 3e-3, **more}


@pytest.fixture
def record(tmp_path):
    made = gpu.Record(tmp_path / "new", {"card": "none", "commit": "none"})
    with made.file:
        yield made


def test_means():
    assert tables.geometric_mean([1, 4]) == pytest.approx(2)
    assert tables.geometric_mean(iter([0.5, 0.5, 4])) == pytest.approx(1)
    assert math.isnan(tables.geometric_mean([])) and math.isnan(tables.throughput([], "resnet18"))
    rows = [{"ours": 1.0, "rate": 30.0, "resnet18": 1}, {"ours": 1.0, "rate": 60.0, "resnet18": 2}]
    assert tables.throughput(rows, "resnet18") == pytest.approx((30 + 2 * 60) / 3)


def test_tables(record, tmp_path):
    assert tables.report(record) == ""
    record.row(**row("forward", 18, 4.0, 1.0))
    record.row(**row("forward", 18, 1.0, 4.0, rate=20.0, im2col=7.0))
    record.row(**row("dx", 18, 2.0, 1.0, rate=40.0))
    record.row(part="layers", what="another", note="not measured (time)")
    record.row(part="peaks", what="copy, bytes", ours=1.0, rate=3000.0, unit="GB/s")
    record.row(part="memory", what="SGD", direction="step", ours=2.0, default=3.0, rate=1500.0)
    record.row(part="steps", what="resnet18", case=CASE, precision="TF32", ours=10.0, ours_gib=1.5,
               channels_last=8.0, channels_last_gib=2.0, default=20.0, default_gib=2.5)
    text = tables.report(record)
    for line in (f"| resnet18, {CASE}, TF32 | 2 | cuDNN (channels_last_3d) / ours "
                 "| 1.00 | 0.50 | nan |",
                 f"| resnet18, {CASE}, TF32 | 2 | cuDNN (default) / ours | 4.00 | 2.00 | nan |",
                 f"| resnet18, {CASE}, TF32 | 2 | ours, TFLOP/s | 12 | 40 | nan |",
                 "|  |  | target | 0.80 | 0.75 | 0.65 |",
                 "| a layer | 1.000 | 7.000 | 4.000 |",
                 "| copy, bytes | 3000 GB/s |",
                 "| SGD | step | 1500 GB/s | 0.50 | 1.50 |",
                 f"| steps | resnet18, {CASE} |", "| tinyseg TF32 | 10.0 ms, 1.5 GiB |",
                 "| PyTorch TF32 channels_last_3d | 8.0 ms (0.80), 2.0 GiB |",
                 "| PyTorch TF32 default | 20.0 ms (2.00), 2.5 GiB |"):
        assert line + "\n" in text, line
    for heading, rule in zip(*[iter(text.splitlines())] * 2, strict=False):
        if rule.startswith("|---"):
            assert heading.count("|") == rule.count("|")
    lines = (tmp_path / "new/gpu.csv").read_text("utf-8").splitlines()
    assert lines[:2] == ["# card: none", "# commit: none"]
    rows = list(csv.DictReader(lines[2:]))
    assert len(rows) == 7 and rows[0]["ours"] == "4" and rows[3]["note"] == "not measured (time)"
    assert not record.faults


@pytest.mark.parametrize("error", [4e-3, math.nan, math.inf])
def test_wrong_answers_are_told(record, capsys, error):
    record.row(**row("dw", 50, 1.0, 1.0, error=error))
    assert len(record.faults) == 1 and "WRONG: layers" in capsys.readouterr().out


@pytest.fixture
def card():
    """What the run asks of a GPU, without one: events that are a step of the clock apart."""
    clock = iter(range(10**6))

    class Event:
        def record(self):
            self.time = next(clock)

    def nothing(*_):
        return None

    cuda = SimpleNamespace(Event=Event, get_elapsed_time=lambda a, b: float(b.time - a.time),
                           runtime=SimpleNamespace(getDeviceProperties=lambda i: {
                               "name": b"none", "l2CacheSize": 1}))
    pool = SimpleNamespace(free_all_blocks=nothing)
    library = SimpleNamespace(cuda=cuda, get_default_memory_pool=lambda: pool)
    theirs = SimpleNamespace(cuda=SimpleNamespace(synchronize=nothing, _sleep=nothing,
                                                  empty_cache=nothing),
                             autograd=SimpleNamespace(set_multithreading_enabled=nothing))
    return gpu.Gpu(library, theirs)


def test_a_turn_gives_every_call_its_own_inputs(card):
    asked = {"a": [], "b": []}
    took = card.medians({name: seen.append for name, seen in asked.items()}, budget=0)
    assert took == {"a": 1, "b": 1}
    assert asked == {"a": [0, 1, 0, 1, 2, 3, 4], "b": [1, 2, 1, 2, 3, 4, 5]}


def test_a_run_keeps_to_its_time_and_survives_a_failure(card, record, monkeypatch):
    done = []

    def plan(*_):
        yield "peaks", "one", lambda: done.append(1)
        yield "layers", "two", lambda: 1 / 0
        yield "steps", "three", lambda: done.append(3)
        yield "memory", "four", lambda: setattr(gpu.time, "monotonic", lambda: 85.1)
        yield "memory", "five", lambda: done.append(5)
        yield "layers", "six", lambda: done.append(6)

    monkeypatch.setattr(gpu, "plan", plan)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: 0.0))
    gpu.run(card, record, ["peaks", "layers", "memory"], False, 100.0)
    assert done == [1, 6]  # what is short is measured still
    assert [(r["what"], r["note"]) for r in record.rows] == [
        ("two", "failed: ZeroDivisionError"), ("five", "not measured (time)")]
    assert record.faults == ["layers two: ZeroDivisionError: division by zero"]


def command(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True,
                          env=environment, timeout=120)


def test_help_teaches():
    done = command("--help")
    assert done.returncode == 0 and not done.stderr
    for word in (*gpu.PARTS, "--quick", "--minutes", "--out", "cudnn.benchmark", "exit code"):
        assert word in done.stdout


def test_without_a_gpu_it_says_so(tmp_path):
    done = command("--out", tmp_path / "new")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gpu.py: ") and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
    assert command("--parts", "everything").returncode == 2


def test_without_pytorch_s_cuda_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "device", lambda name: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "new")]) == 2
    assert "finds no GPU" in capsys.readouterr().err


@pytest.fixture
def posing(cuda, monkeypatch):
    """CuPy's stand-in, kernels in emulation, and PyTorch on the CPU posing as a GPU."""
    import strictarray

    class Event:
        def record(self):
            self.time = time.perf_counter()

    def on_cpu(function):
        def call(*args, **options):
            if options.pop("device", None) not in (None, "cuda"):
                raise ValueError
            if isinstance(args[0], strictarray.ndarray):
                args = torch.from_numpy(args[0].get()), *args[1:]
            return function(*args, **options)
        return call

    def asarray(a, dtype=None, made=cuda.asarray):
        return made(a.numpy() if isinstance(a, torch.Tensor) else a, dtype)  # not if it has a tape

    def nothing(*_):
        return None

    pool = SimpleNamespace(free_all_blocks=nothing, total_bytes=lambda: 2**30)
    for owner, name, value in (
            *((torch, f, on_cpu(getattr(torch, f))) for f in ("randn", "randint", "as_tensor")),
            *((torch.cuda, f, nothing) for f in (
                "synchronize", "_sleep", "empty_cache", "reset_peak_memory_stats")),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "max_memory_reserved", lambda: 2**30),
            (torch, "autocast", lambda *_, **options: torch.amp.autocast(
                "cpu", torch.bfloat16, **options)),
            (torch.cuda, "Stream", nothing), (torch.cuda, "stream", lambda _: nullcontext()),
            (torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=nothing)),
            (torch.cuda, "graph", lambda _: nullcontext()),
            (torch.Tensor, "cuda", torch.Tensor.clone),
            (torch.nn.Module, "cuda", lambda self: self),
            (cuda, "asarray", asarray), (cuda, "get_default_memory_pool", lambda: pool),
            (cuda, "__version__", "none"), (cuda.cuda, "Event", Event),
            (cuda.cuda, "get_elapsed_time", lambda a, b: 1e3 * (b.time - a.time) + 1e-3),
            (cuda.cuda.runtime, "getDeviceProperties",
             lambda _: {"name": b"none", "l2CacheSize": 1}),
            (cuda.cuda.runtime, "runtimeGetVersion", lambda: 13000)):
        monkeypatch.setattr(owner, name, value, raising=False)
    parts.network.cache_clear()
    monkeypatch.setitem(models.BACKBONES, "resnet18", ((1, 1, 0, 0), False))
    monkeypatch.setitem(torch_models.BLOCKS, "resnet18", (1, 1, 0, 0))
    cases = {"tiny isotropic": (2, (3, 13, 14), False), "tiny inflated": (1, (3, 14, 13), True)}
    for owner, name, value in (
            (gpu, "device", lambda name: cuda), (networks, "VOLUME", (10, 40, 40)),
            (networks, "CASES", cases), (parts, "CASES", cases),
            (parts, "TILED", [parts.Layer(parts.CONV(1, 1), (1, 1, 5, 8), 8, 72)]),
            (parts, "peaks", partial(parts.peaks, copied=1 << 16, n=64)),
            (parts, "operations", partial(parts.operations, x=(2, 4, 6, 6, 64),
                                          coarse=(2, 2, 4, 4, 3), fine=(8, 20, 20))),
            (gpu.Gpu, "medians", once)):
        monkeypatch.setattr(owner, name, value)
    yield cuda
    parts.network.cache_clear()


def once(self, calls, budget=0, hold=True):
    """Gpu.medians, of one turn."""
    took = {}
    for i, (name, call) in enumerate(calls.items()):
        start, stop = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        start.record()
        call(i)
        stop.record()
        took[name] = self.cupy.cuda.get_elapsed_time(start, stop)
    return took


def test_every_part_runs(posing, tmp_path, monkeypatch):
    """With a convolution in channels_last that PyTorch refuses."""
    theirs = parts.their_convolution

    def refusing(layer, direction, x, w, y):
        if layer.c_in == 1 and x.is_contiguous(memory_format=torch.channels_last_3d) \
                and not x.is_contiguous():
            raise RuntimeError("refused")
        return theirs(layer, direction, x, w, y)

    monkeypatch.setattr(parts, "their_convolution", refusing)
    monkeypatch.setattr(parts, "subprocess", SimpleNamespace(
        run=lambda *_, **__: SimpleNamespace(returncode=0), STDOUT=None))
    status = gpu.main(["--quick", "--minutes", "30", "--out", str(tmp_path)])
    lines = (tmp_path / "gpu.csv").read_text("utf-8").splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert status == 0
    assert {row["part"] for row in rows} == {*gpu.PARTS} - {"inference"}
