"""Whole networks of benchmarks/gpu.py: training steps, their kernels, inference."""

from __future__ import annotations

import time
from functools import cache, partial
from statistics import median
from unittest import mock

import numpy as np
import torch
from gpu_tables import SIDES
from torch.nn import functional
from torch_models import Net, channels_first, channels_last, torch_layout

import tinyseg as ts
from tinyseg import losses
from tinyseg.cuda import loader
from tinyseg.nn import Conv, MaxPool

BACKBONES, CLASSES = ("resnet18", "resnet50"), 3
CASES = {  # batch, patch, and whether inflated: depth 3, no stride or dilation along depth
    "2x40x224x224 isotropic": (2, (40, 224, 224), False),
    "1x96x96x96 isotropic": (1, (96, 96, 96), False),
    "2x40x224x224 inflated": (2, (40, 224, 224), True),
    "1x96x96x96 inflated": (1, (96, 96, 96), True)}
VOLUME = (96, 256, 256)  # of inference


@cache
def network(backbone: str, inflated: bool):
    """A network on the CPU, with the options of a case."""
    depth = {"depth": 3, "depth_stride": 1, "depth_dilation": 1} if inflated else {}
    return ts.models.resnet_seg(backbone, rank=3, in_channels=1, classes=CLASSES, **depth)


def difference(a, b) -> float:
    """|a - b| / |b| of tensors."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def torch_twin(net):
    """The PyTorch network with the windows and weights of ours."""
    model = Net(net.config["backbone"], 3, 1, CLASSES)
    for name, module in net.named((Conv, MaxPool)):
        w = module.window
        walk = w.kernel, w.stride, tuple(before for before, _ in w.padding), w.dilation
        model.set_submodule(name, torch.nn.MaxPool3d(*walk) if isinstance(module, MaxPool) else
                            torch.nn.Conv3d(*module.weight.shape[-2:], *walk, bias=name == "fc"))
    weights = {name: torch_layout(torch.tensor(a)) for name, a in net.state().items()}
    model.load_state_dict(weights, strict=False)  # all but num_batches_tracked
    return model


def torch_loss(logits, labels):
    """losses.dice_cross_entropy, written in PyTorch."""
    p, t = logits.softmax(1), channels_first(functional.one_hot(labels, CLASSES))
    space = (0, 2, 3, 4)
    ratio = (2 * (p * t).sum(space) + 1e-5) / (p.sum(space) + t.sum(space) + 1e-5)
    return functional.cross_entropy(logits, labels) + 1 - ratio[1:].mean()


def our_training(gpu, net, x, labels, captured):
    """step(i), which returns the loss."""
    net = ts.to_device(net.copy(), gpu.cupy)
    optimizer = ts.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
    x, labels = gpu.cupy.asarray(x), gpu.cupy.asarray(labels).astype("uint8")

    def passes(x, labels):
        optimizer.zero_grad()
        value = losses.dice_cross_entropy(net(x), labels)
        value.backward()
        return value.data, *(p.grad for p in optimizer.parameters)

    passes = ts.cuda.captured(passes) if captured else passes

    def step(i):
        value, *gradients = passes(x, labels)
        for p, g in zip(optimizer.parameters, gradients, strict=True):
            p.grad = g
        optimizer.step()
        return value

    return step


def their_training(gpu, net, side, x, labels, captured):
    """The same in PyTorch; captured, the whole step is one graph."""
    amp = side == "amp"
    net = gpu.layout(torch_twin(net).cuda(), side)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
    x = gpu.layout(channels_first(x), side)

    def step(i=0):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=amp, cache_enabled=not captured):
            value = torch_loss(net(x), labels)  # the loss itself in float32, as autocast has it
        value.backward()
        optimizer.step()
        return value.detach()

    if not captured:
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):  # as PyTorch asks for before it captures
            step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        value = step()

    def replay(i, worked_on=step):  # the network and the images must live as long as the graph
        graph.replay()
        return value

    return replay


def training(gpu, net, side, x, labels):
    """step(i) on one side, captured or not."""
    layout, captured = side.removesuffix(" captured"), side.endswith("captured")
    if layout in ("ours", "captured", "bf16"):
        run = our_training(gpu, net, x, labels, captured)

        def in_bf16(i):
            with ts.cuda.precision("bf16"):
                return run(i)

        return in_bf16 if layout == "bf16" else run
    return their_training(gpu, net, layout, x, labels, captured)


def reserved(gpu, run):
    """(what run() returns, the GiB reserved by both libraries, of which one does nothing)."""
    gpu.release()  # cuDNN's search took more memory than what comes after it
    torch.cuda.reset_peak_memory_stats()
    answer = run()
    return answer, (gpu.pool.total_bytes() + torch.cuda.max_memory_reserved()) / 2**30


def steps(gpu, case, backbone, sides):
    """(side, step(i)) of each, which is forgotten before the next is built."""
    batch, size, inflated = CASES[case]
    x = gpu.random(batch, *size, 1)
    labels = torch.randint(0, CLASSES, (batch, *size), device="cuda")
    with gpu.precision("TF32"):
        for side in sides:
            yield side, training(gpu, network(backbone, inflated), side, x, labels)
            gpu.release()


def step(gpu, record, case, backbone, sides=SIDES):
    """A whole training step; the losses of the first must agree. A side may refuse."""
    values, row, notes = {}, {}, []
    for side, run in steps(gpu, case, backbone, sides):
        try:
            values[side] = float(run(0))
            took, gib = reserved(
                gpu, lambda run=run, side=side: gpu.medians({side: run}, budget=0.6, hold=False))
            if not side.endswith("captured"):  # graphs have pools of their own
                row[f"{side}_gib"] = gib
        except RuntimeError as error:
            if side == "ours":
                raise
            notes.append(f"{side}: {type(error).__name__}")
            continue
        finally:
            del run
        row |= took
    theirs = next((values[s] for s in ("default", "channels_last") if s in values), None)
    agreement = {} if theirs is None else {"limit": 1e-2, "error": max(
        abs(values[side] / theirs - 1) for side in ("ours", "bf16") if side in values)}
    record.row(part="steps", case=case, what=backbone, precision="TF32", **row, **agreement,
               note=", ".join(notes))


def kernels(gpu, record, case, backbone):
    """Launches and time of each kernel in one of our steps, the stream held meanwhile.

    What is left of the step are CuPy's own kernels and the gaps where the stream ran empty.
    """
    found, compiled, Event = {}, loader._function, gpu.cupy.cuda.Event

    def timed(library, file, kernel, constants):
        function, marks = compiled(library, file, kernel, constants), found.setdefault(kernel, [])

        def call(*arguments, **options):
            start, stop = Event(), Event()
            start.record()
            function(*arguments, **options)
            stop.record()
            marks.append((start, stop))

        call.max_dynamic_shared_size_bytes = loader.SHARED_LIMIT  # it was asked for before
        return call

    for _, run in steps(gpu, case, backbone, ["ours"]):
        run(0)
        whole = gpu.medians({"ours": run}, budget=0.5, hold=False)["ours"]
        with mock.patch.object(loader, "_function", timed):
            run(0)
        torch.cuda.synchronize()
    rows = {name: (len(marks), sum(gpu.cupy.cuda.get_elapsed_time(*pair) for pair in marks))
            for name, marks in found.items()}
    rest = whole - sum(took for _, took in rows.values())
    for name, (count, took) in sorted(rows.items(), key=lambda item: -item[1][1]):
        record.row(part="kernels", case=case, what=name, launches=count, ours=took)
    record.row(part="kernels", case=case, what="CuPy's own kernels and gaps", launches="",
               ours=rest)


def predictor(gpu, net, side):
    """The network of one side, from host memory to host memory."""
    if side == "ours":
        return ts.to_device(net.copy(), gpu.cupy)
    twin = gpu.layout(torch_twin(net).cuda(), side).eval()

    def run(x):
        x = gpu.layout(channels_first(torch.from_numpy(x.data)).cuda(), side)
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=side == "amp"):
            return ts.Tensor(channels_last(twin(x)).float().cpu().numpy())

    return run


def inference(gpu, record, case, backbone):
    """A whole volume in windows of the case."""
    batch, patch, inflated = CASES[case]
    row, answers = {}, {}
    image = np.random.default_rng(0).standard_normal((*VOLUME, 1), "float32")

    def seconds(side, run, times):
        took = []
        for _ in range(times):
            began = time.perf_counter()
            answers[side] = ts.infer.sliding_window(run, image, patch, batch=batch)
            took.append(time.perf_counter() - began)
        return median(took)

    with gpu.precision("TF32"):
        for side in [s for s in SIDES if "captured" not in s and s != "bf16"]:
            run = predictor(gpu, network(backbone, inflated), side)
            seconds(side, run, 1)
            took, row[f"{side}_gib"] = reserved(gpu, partial(seconds, side, run, 3))
            row[side] = 1e3 * took
            del run
    error = difference(*(torch.from_numpy(answers[side]) for side in ("ours", "default")))
    record.row(part="inference", case=case, what=backbone, precision="TF32", **row, error=error,
               limit=3e-2, note=f"volume {'x'.join(map(str, VOLUME))}, overlap a half")
