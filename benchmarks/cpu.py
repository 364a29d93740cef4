"""This library on the cores of a CPU beside PyTorch: time and memory, in one run.

  steps        forward, cross-entropy, backward, AdamW of whole networks, and memory
  inference    a volume of 96x256x256 in windows of 64x96x96, ResNet-18, also as a U-Net; also
               beside OpenVINO, ONNX Runtime and JAX, where they are installed (float32, the network
               as `tinyseg export` writes it); --quick: one such window
  growth       one step against depth, batch and cores
  layers       each distinct convolution of ResNet-18 and -50, output stride 8, at rank 3 on
               1x64x96x96 and at rank 2 on 8x256x256: forward, gradient in x, gradient in w. Beside
               them, NumPy's matrix product of 1024 x 1024 (peak), and that of the layer's own sizes
               with the columns of im2col at hand (product): what a body that saves no
               multiplications can at best reach
  profile      where the time of the 3x3x3 convolutions of stride 2 goes

PyTorch runs in its faster memory format, at the same number of threads. Layers take turns in one
process, each in bursts of which the first 30 ms do not count: the threads of PyTorch's OpenMP keep
a core busy for a while after their work. Steps and inference have a process for each side, and
their runs alternate, so that a machine that slows down slows both. Figures are medians; a ratio is
theirs / ours in time, ours / theirs in memory.

  python benchmarks/cpu.py                     all parts, about 20 minutes on two cores
  python benchmarks/cpu.py --parts steps       one of them
  python benchmarks/cpu.py --quick             a minute: few layers, small steps

Needs PyTorch: pip install torch==2.13.0; beside the others: pip install onnx and openvino,
onnxruntime or jax.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from itertools import product
from math import exp, log, prod
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np

from tinyseg import parallel

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("steps", "inference", "growth", "layers", "profile")
STEPS = {  # name: (backbone, rank, batch, size, options of the network: a kind is a row)
    "ResNet-18 3D": ("resnet18", 3, 1, (64, 96, 96), {}),
    "ResNet-18 3D, inflated": ("resnet18", 3, 1, (64, 96, 96), {
        "depth": 3, "depth_dilation": 1, "depth_padding": "edge"}),
    "ResNet-18 3D, U-Net": ("resnet18", 3, 1, (64, 96, 96), {
        "head": "unet", "output_stride": 32, "decoder": (256, 128, 64, 32, 16)}),
    "ResNet-18 2D": ("resnet18", 2, 8, (256, 256), {}),
    "ResNet-50 3D": ("resnet50", 3, 1, (32, 96, 96), {}),
}


def layers(backbone: str, rank: int, size: tuple[int, ...]) -> dict:
    """{(size, channels, filters, window): how often} of a network's convolutions."""
    import tinyseg as ts

    found: dict = {}
    original = ts.windows.correlate

    def record(x, w, window):
        key = (x.shape[1:-1], *w.shape[-2:], window)
        found[key] = found.get(key, 0) + 1
        shape = (1, *window.positions(x.shape[1:-1]), w.shape[-1])
        return np.broadcast_to(np.float32(0), shape).copy()

    ts.windows.correlate = record
    try:
        with ts.no_grad():
            net = ts.models.resnet_seg(backbone, rank=rank, in_channels=1, classes=3).eval()
            net(np.zeros((1, *size, 1), "float32"))
    finally:
        ts.windows.correlate = original
    return found


def alternate(calls: dict, turns: int) -> dict[str, float]:
    """Median seconds of each call, in bursts that take turns."""
    seconds: dict = {name: [] for name in calls}
    for _, (name, call) in product(range(turns), calls.items()):
        began = time.perf_counter()
        while time.perf_counter() < began + 0.03:
            call()
        for _ in range(3):
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: median(taken) for name, taken in seconds.items()}


def layer_table(quick: bool, threads: int) -> None:
    import torch

    import tinyseg as ts
    from tinyseg import windows

    torch.set_num_threads(threads)
    ts.parallel.set_threads(threads)
    rng, square = np.random.default_rng(0), np.ones((1024, 1024), "float32")

    def multiply(a: np.ndarray, b: np.ndarray) -> None:
        parallel.run(lambda rows: a[rows] @ b, parallel.parts(len(a)))

    print(f"\n{'convolution':42}{'peak':>6}{'product':>9}" + "".join(
        f"{d + ': ours':>14}{'PyTorch':>9}{'ratio':>7}" for d in ("y", "dx", "dw"))
        + "   GFLOP/s of the arithmetic as written", flush=True)
    ratios: dict = {"y": [], "dx": [], "dw": []}
    for (rank, size, batch), backbone in product(
            ((3, (64, 96, 96), 1), (2, (256, 256), 8)), ("resnet18", "resnet50")):
        chosen = list(layers(backbone, rank, size).items())
        for i, ((grid, channels, filters, window), count) in enumerate(chosen):
            if quick and (rank == 2 or i % 4 != 1):
                continue
            x = rng.standard_normal((batch, *grid, channels), "float32")
            w = rng.standard_normal((*window.kernel, channels, filters), "float32")
            y = rng.standard_normal((batch, *window.positions(grid), filters), "float32")
            formats = [torch.contiguous_format, {2: torch.channels_last,
                                                 3: torch.channels_last_3d}[rank]]
            options = (None, list(window.stride), [p[0] for p in window.padding],
                       list(window.dilation), False, [0] * rank, 1)
            columns = np.ones((y[..., 0].size, w[..., 0].size), "float32")
            calls = {"peak": lambda: multiply(square, square),
                     "product": lambda a=columns, w=w: multiply(a, w.reshape(a.shape[1], -1)),
                     "y": lambda x=x, w=w, v=window: windows.correlate(x, w, v),
                     "dx": lambda y=y, w=w, g=grid, v=window: windows.correlate_dx(y, w, g, v),
                     "dw": lambda x=x, y=y, v=window: windows.correlate_dw(x, y, v)}
            if channels == 1:
                del calls["dx"]  # an image needs no gradient
            for form in formats:
                tx, ty, tw = (torch.from_numpy(a).movedim(-1, 1).contiguous(memory_format=form)
                              for a in (x, y, w.transpose(-1, *range(rank), -2)))
                mask = {"dx": [True, False, False], "dw": [False, True, False]}
                calls[f"y {form}"] = lambda x=tx, w=tw, o=options: torch.convolution(x, w, *o)
                for d in mask:
                    if d in calls:
                        calls[f"{d} {form}"] = lambda g=ty, x=tx, w=tw, o=options, m=mask[d]: (
                            torch.ops.aten.convolution_backward(g, x, w, *o, m))
            took = alternate(calls, 2 if quick else 4)
            work = 2e-9 * batch * prod(window.positions(grid)) * prod(window.kernel)
            work *= channels * filters
            name = (f"{backbone[6:]} x{count} {'x'.join(map(str, grid))} {channels}-{filters} "
                    f"k{window.kernel[-1]} s{window.stride[-1]} d{window.dilation[-1]}")
            row = f"{name:42}{2 * 1.024**3 / took['peak']:6.0f}{work / took['product']:9.0f}"
            for d in ratios:
                if d not in calls:
                    row += " " * 30
                    continue
                theirs = min(took[f"{d} {form}"] for form in formats)
                ratios[d].append(theirs / took[d])
                row += f"{work / took[d]:14.0f}{work / theirs:9.0f}{theirs / took[d]:7.2f}"
            print(row, flush=True)
    print(f"{'geometric mean':57}" + "".join(
        f"{exp(sum(map(log, r)) / len(r)):30.2f}" for r in ratios.values()))


def profile(threads: int, turns: int) -> None:
    from tinyseg import windows
    from tinyseg.windows import cpu

    spent: dict = {}

    def timed(name: str, owner, attribute: str):
        """Adds what calls of owner.attribute take, in whichever thread, to spent[name]."""
        original = getattr(owner, attribute)

        def call(*args, **options):
            began = time.perf_counter()
            answer = original(*args, **options)
            spent[name].append(time.perf_counter() - began)
            return answer

        spent[name] = []
        return patch.object(owner, attribute, call)

    parallel.set_threads(threads)
    rng, window = np.random.default_rng(0), windows.Window.of((3, 3, 3), 2, 1)
    grid, filters, runs = (16, 24, 24), 128, 10 * turns
    print(f"\n{'share of the time of all threads':42}{'ms':>6}{'multiplying':>13}{'gathering':>11}"
          f"{'padding':>9}{'rest':>6}")
    for channels in (64, 128):
        x = rng.standard_normal((1, *grid, channels), "float32")
        w = rng.standard_normal((*window.kernel, channels, filters), "float32")
        y = rng.standard_normal((1, *window.positions(grid), filters), "float32")
        for direction, call in (("y", partial(windows.correlate, x, w, window)),
                                ("dx", partial(windows.correlate_dx, y, w, grid, window))):
            call()
            with (timed("multiplying", np, "matmul"), timed("gathering", cpu.Columns, "gather"),
                  timed("padding", cpu.Columns, "__init__")):
                began = time.perf_counter()
                for _ in range(runs):
                    call()
                wall = time.perf_counter() - began
            shares = [sum(seconds) / (threads * wall) for seconds in spent.values()]
            name = f"{direction} of 1x{'x'.join(map(str, grid))}, {channels}-{filters}, stride 2"
            print(f"{name:42}{1e3 * wall / runs:6.1f}{shares[0]:13.0%}{shares[1]:11.0%}"
                  f"{shares[2]:9.0%}{1 - sum(shares):6.0%}", flush=True)


def our_side(case: tuple, threads: int, train: bool):
    import tinyseg as ts

    backbone, rank, batch, size, options = case
    ts.parallel.set_threads(threads)
    net = ts.models.resnet_seg(backbone, rank=rank, in_channels=1, classes=3, **options)
    if not train:
        folded = ts.infer.fold(net)
        return lambda x, _: ts.infer.sliding_window(folded, x[0], size)
    optimizer = ts.optim.AdamW(net.parameters(), 1e-4)

    def step(x, y):
        optimizer.zero_grad()
        ts.losses.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def torch_network(case: tuple):
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from torch_models import Net

    backbone, rank, batch, size, options = case
    net = Net(backbone, rank, 1, 3, **{k: v for k, v in options.items() if "depth" not in k})
    if "depth" in options:  # kernels of three in depth, dilated in the plane alone, zero-padded
        for module in net.modules():
            if isinstance(module, torch.nn.Conv3d) and module.kernel_size[0] > 1:
                shape = (*module.weight.shape[:2], 3, *module.weight.shape[3:])
                module.weight = torch.nn.Parameter(torch.randn(shape) * 0.01)
                module.dilation = (1, *module.dilation[1:])
                module.padding = (1, *module.padding[1:])
    return net


def torch_side(case: tuple, threads: int, train: bool, last: bool):
    import torch

    import tinyseg as ts

    rank, size = case[1], case[3]
    torch.set_num_threads(threads)
    form = torch.contiguous_format
    if last:
        form = torch.channels_last if rank == 2 else torch.channels_last_3d
    net = torch_network(case).to(memory_format=form)

    def tensor(x):
        return torch.from_numpy(x).movedim(-1, 1).contiguous(memory_format=form)

    if not train:
        net.eval()

        def predict(x):
            with torch.inference_mode():
                return ts.Tensor(net(tensor(x.data)).movedim(1, -1).numpy())

        return lambda x, _: ts.infer.sliding_window(predict, x[0], size)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)

    def step(x, y):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(tensor(x)), torch.from_numpy(y)).backward()
        optimizer.step()

    return step


def engine_side(case: tuple, threads: int, engine):
    """The same network as `tinyseg export` writes it, computed by another engine."""
    import tinyseg as ts

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [*os.sched_getaffinity(0)][:threads])
    backbone, rank, _, size, options = case
    net = ts.models.resnet_seg(backbone, rank=rank, in_channels=1, classes=3, **options)
    predict = engine(ts.export.onnx(net, size), size, threads)
    return lambda x, _: ts.infer.sliding_window(
        lambda windows: ts.Tensor(predict(windows.data)), x[0], size)


def openvino(model, size: tuple[int, ...], threads: int):
    import openvino

    graph = openvino.Core().read_model(model.SerializeToString())
    graph.reshape([1, 1, *size])
    request = openvino.compile_model(graph, "CPU", {
        "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
    return channels_last(lambda x: next(iter(request.infer([x]).values())))


def onnxruntime(model, size: tuple[int, ...], threads: int):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options,
                                           providers=["CPUExecutionProvider"])
    return channels_last(lambda x: session.run(None, {"image": x})[0])


def channels_last(run):
    """A function of an array (N, C, *S) as one of (N, *S, C)."""
    return lambda x: np.moveaxis(run(np.ascontiguousarray(np.moveaxis(x, -1, 1))), 1, -1)


def jax(model, size: tuple[int, ...], threads: int):
    """Compiled by XLA, channels last, which it has its fast convolutions for; its threads are as
    many as the process has cores."""
    import jax
    from jax import numpy as jnp
    from onnx import helper, numpy_helper

    letters = "DHW"[-len(size):]
    form = f"N{letters}C", f"{letters}IO", f"N{letters}C"
    known = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}

    def sides(pads):
        return list(zip(pads[: len(size)], pads[len(size) :], strict=True))

    def conv(x, w, b=0, *, strides, pads, dilations, **_):
        return jax.lax.conv_general_dilated(x, np.moveaxis(w, (0, 1), (-1, -2)), strides,
                                            sides(pads), None, dilations, form) + b

    def pool(x, *, kernel_shape, strides, pads, **_):
        return jax.lax.reduce_window(x, -np.inf, jax.lax.max, (1, *kernel_shape, 1),
                                     (1, *strides, 1), ((0, 0), *sides(pads), (0, 0)))

    def resize(x, *sizes, axes, mode, **_):
        shape = list(x.shape)
        for axis, n in zip(axes, sizes[-1], strict=True):
            shape[axis - 1] = int(n) if sizes[-1].dtype.kind == "i" else int(n * shape[axis - 1])
        return jax.image.resize(x, shape, mode.decode(), antialias=False)

    def cut(x, begin, end, axes, step):
        at = [slice(None)] * x.ndim
        for axis, *ends in zip(axes, begin, end, step, strict=True):
            at[axis - 1] = slice(*map(int, ends))
        return x[tuple(at)]

    operators = {
        "Conv": conv, "MaxPool": pool, "Resize": resize, "Slice": cut, "Relu": jax.nn.relu,
        "Add": jnp.add, "Identity": lambda x: x,
        "Concat": lambda *xs, axis: jnp.concatenate(xs, -1),
        "BatchNormalization": lambda x, g, b, m, v, *, epsilon=1e-5, **_: (
            x * (g / np.sqrt(v + epsilon)) + (b - m * g / np.sqrt(v + epsilon)))}

    def network(x):
        found = {**known, "image": x}
        for node in model.graph.node:
            options = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            inputs = [found[name] for name in node.input if name]
            found[node.output[0]] = operators[node.op_type](*inputs, **options)
        return found["logits"]

    network = jax.jit(network)
    return lambda x: np.asarray(network(x))


ENGINES = {"OpenVINO": openvino, "ONNX Runtime": onnxruntime, "JAX": jax}


def work(pipe, make, arguments, shape) -> None:
    """One side in a process of its own: a run for every message."""
    run, rng = make(*arguments), np.random.default_rng(0)
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while pipe.recv():
        x, y = rng.standard_normal((*shape, 1), "float32"), rng.integers(0, 3, shape)
        began = time.perf_counter()
        run(x, y)
        took = time.perf_counter() - began
        pipe.send((took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) / 2**20))


def side_by_side(case: tuple, shape: tuple, threads: int, turns: int, train: bool = True) -> dict:
    """{side: (median seconds, GiB above idle)} of ours, of PyTorch's two formats and, in inference,
    of the other engines that are installed."""
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")  # the children read the thread count at start
    sides = {"ours": (our_side, train), "first": (torch_side, train, False),
             "last": (torch_side, train, True)}
    if not train:
        sides |= {name: (engine_side, engine) for name, engine in ENGINES.items()
                  if find_spec(engine.__name__)}
    pipes = {}
    for name, (make, *more) in sides.items():
        pipes[name], there = context.Pipe()
        context.Process(target=work, args=(there, make, (case, threads, *more), shape),
                        daemon=True).start()
        there.close()
    seconds: dict = {name: [] for name in pipes}
    memory: dict = {}
    for turn in range(turns + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            took, memory[name] = pipe.recv()
            if turn:
                seconds[name].append(took)
    for pipe in pipes.values():
        pipe.send(False)
    return {name: (median(seconds[name]), memory[name]) for name in pipes}


HEAD = (f"{'':34}{'ours s':>9}{'PyTorch s':>11}{'ratio':>7}{'ours GiB':>10}{'PyTorch GiB':>13}"
        f"{'ratio':>7}")


def row(name: str, sides: dict) -> str:
    """A line: PyTorch in its faster format, with the memory of that one; and one for each other
    engine."""
    (ours, gib), (theirs, their_gib) = sides["ours"], min(sides["first"], sides["last"])
    line = (f"{name:34}{ours:9.2f}{theirs:11.2f}{theirs / ours:7.2f}{gib:10.2f}{their_gib:13.2f}"
            f"{gib / their_gib:7.2f}")
    for engine in [name for name in ENGINES if name in sides]:
        other, other_gib = sides[engine]
        line += f"\n{engine:>43}{other:11.2f}{other / ours:7.2f}{other_gib:23.2f}"
        line += f"{gib / other_gib:7.2f}" if other_gib else ""  # less than making it has taken
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                        help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--threads", type=int, default=parallel.threads())
    parser.add_argument("--turns", type=int, default=5, help="timed runs of each (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="few and small: a minute")
    args = parser.parse_args()
    if min(args.threads, args.turns) < 1:
        parser.error(f"found --threads {args.threads} --turns {args.turns}, expected at least 1")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                            capture_output=True).stdout.strip()
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, Python "
          f"{platform.python_version()}, NumPy {np.__version__}, {time.strftime('%Y-%m-%d')}, "
          f"commit {commit}")
    turns = 2 if args.quick else args.turns
    if "steps" in args.parts:
        print(f"\ntraining step\n{HEAD}")
        for name, case in STEPS.items():
            size = tuple(n // 2 for n in case[3]) if args.quick else case[3]
            shape = (case[2], *size)
            print(row(f"{name} {'x'.join(map(str, shape))}",
                      side_by_side((*case[:3], size, case[4]), shape, args.threads, turns)),
                  flush=True)
    if "inference" in args.parts:
        print(f"\ninference\n{HEAD}")
        for name in ("ResNet-18 3D", "ResNet-18 3D, U-Net"):
            shape, often = ((1, 96, 256, 256), max(1, turns // 2)) if not args.quick else (
                (1, *STEPS[name][3]), 9)
            print(row(f"{name}, {'x'.join(map(str, shape[1:]))}", side_by_side(
                STEPS[name], shape, args.threads, often, train=False)), flush=True)
    if "growth" in args.parts and not args.quick:
        print(f"\ngrowth of a step of ResNet-18 3D\n{HEAD}")
        for batch, depth, threads in ((1, 16, args.threads), (1, 32, args.threads),
                                      (1, 64, args.threads), (2, 32, args.threads),
                                      *(((1, 32, 1),) if args.threads > 1 else ())):
            size = (depth, 96, 96)
            print(row(f"{batch}x{depth}x96x96, {threads} threads", side_by_side(
                ("resnet18", 3, batch, size, {}), (batch, *size), threads, 3)), flush=True)
    if "layers" in args.parts:  # last: a process counts its parent's peak of memory as its own
        layer_table(args.quick, args.threads)
    if "profile" in args.parts:
        profile(args.threads, turns)


if __name__ == "__main__":
    main()
