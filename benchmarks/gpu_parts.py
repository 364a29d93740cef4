"""What benchmarks/gpu.py measures. `gpu` is its Gpu, `record` its Record; a part writes rows."""

from __future__ import annotations

import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import partial
from math import ceil, nan, prod
from unittest import mock

import torch
from gpu_networks import (
    BACKBONES,
    CASES,
    CLASSES,
    difference,
    inference,
    kernels,
    network,
    step,
    torch_loss,
    torch_twin,
)
from torch.nn import functional
from torch_models import channels_first, channels_last, our_layout, torch_layout

import tinyseg as ts
from tinyseg import losses, ops, windows
from tinyseg.models import Residual
from tinyseg.nn import Conv

__all__ = ["BACKBONES", "CASES", "TILED", "convolution", "inference", "kernels", "layers", "memory",
           "network", "operations", "peaks", "program", "sgd", "step", "tiles", "torch_twin"]

DIRECTIONS = ("forward", "dx", "dw")
LIMITS = {"TF32": 3e-3, "bf16": 1e-2, "fp32": 1e-4}  # of |ours - cuDNN's fp32| / |cuDNN's fp32|
THEIRS = "channels_last", "default"  # PyTorch's layouts
TILES = [  # of the tensor-core kernels; the first are the library's, of 64 and of 128 filters
    {"ROWS": 128, "COLUMNS": columns, "WARP_ROWS": 64, "WARP_COLUMNS": across, "STAGES": 2}
    for columns, across in ((64, 32), (128, 64), (128, 32))]
SECONDS = {"tests": 150.0, "races": 60.0}  # that another program may take
CONV = partial(windows.Window.of, (3, 3, 3), 1)


@dataclass(frozen=True)
class Layer:
    """A convolution by all that decides its time: window, grid (N, *S), channels."""

    window: windows.Window
    grid: tuple[int, ...]
    c_in: int
    c_out: int

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of x, w and y, channels last."""
        positions = self.window.positions(self.grid[1:])
        return [(*self.grid, self.c_in), (*self.window.kernel, self.c_in, self.c_out),
                (self.grid[0], *positions, self.c_out)]

    @property
    def operations(self) -> int:
        """2 N P K C_in C_out: taps in the padding are counted."""
        _, w, y = self.shapes
        return 2 * prod(w) * prod(y[:-1])

    def __str__(self) -> str:
        kernel, stride, dilation, grid = ("x".join(map(str, v)) for v in (
            self.window.kernel, self.window.stride, self.window.dilation, self.grid))
        return f"{self.c_in}->{self.c_out} {kernel} stride {stride} dilation {dilation} @{grid}"


TILED = [Layer(CONV(d, d), grid, c, c) for c, d, grid in (  # of ResNet-18 at 40 x 224 x 224
    (64, 1, (2, 10, 56, 56)), (128, 1, (2, 5, 28, 28)), (256, 2, (2, 5, 28, 28)),
    (512, 4, (2, 5, 28, 28)))]


def layers(net, batch: int, size: tuple[int, ...]) -> Counter:
    """{Layer: how often} of a segmentation network with the linear head; nothing is computed."""
    found: Counter = Counter()

    def through(conv, size):
        found[Layer(conv.window, (batch, *size), *conv.weight.shape[-2:])] += 1
        return conv.window.positions(size)

    size = net.maxpool.window.positions(through(net.conv1, tuple(size)))
    for _, block in net.named(Residual):
        convs = dict(block.named(Conv))
        if "downsample.0" in convs:
            through(convs.pop("downsample.0"), size)
        for conv in convs.values():
            size = through(conv, size)
    through(net.fc, size)
    return found


def peaks(gpu, record, copied=1 << 29, n=8192):
    """What the card gives: bytes per second of a copy, operations of a matrix product."""
    def note(what, call, amount, unit):
        took = gpu.medians({"ours": call})["ours"]
        record.row(part="peaks", what=what, ours=took, rate=amount / took, unit=unit)

    a, b = (gpu.cupy.asarray(gpu.random(copied)) for _ in range(2))
    note("copy, bytes read and written", lambda i: gpu.cupy.copyto(b, a), 8e-6 * copied, "GB/s")
    x, y = gpu.random(n, n), gpu.random(n, n)
    p, q = gpu.cupy.asarray(x), gpu.cupy.asarray(y)
    note("float32 matrix product", lambda i: gpu.cupy.matmul(p, q), 2e-9 * n**3, "TFLOP/s")
    with gpu.precision("TF32"):
        note("TF32 matrix product", lambda i: torch.matmul(x, y), 2e-9 * n**3, "TFLOP/s")


def our_convolution(layer, direction, x, w, y):
    """One of the three readings, on arrays."""
    return {"forward": lambda: windows.correlate(x, w, layer.window),
            "dx": lambda: windows.correlate_dx(y, w, layer.grid[1:], layer.window),
            "dw": lambda: windows.correlate_dw(x, y, layer.window)}[direction]()


def their_convolution(layer, direction, x, w, y):
    """The same in PyTorch, one gradient at a time."""
    window, wanted = layer.window, [direction == "dx", direction == "dw", False]
    options = (window.stride, [p for p, _ in window.padding], window.dilation, False, (0, 0, 0), 1)
    if direction == "forward":
        return torch.ops.aten.convolution(x, w, None, *options)
    gradients = torch.ops.aten.convolution_backward(y, x, w, None, *options, wanted)
    return gradients[wanted.index(True)]


def columns(layer, x, w, y):
    """im2col: a product with columns that are written out."""
    rows = windows.kernels.unfold(x, layer.window).reshape(-1, prod(w.shape[:-1]))
    return (rows @ w.reshape(-1, layer.c_out)).reshape(y.shape)


def in_turn(function, sets, i):
    """`function` of the inputs whose turn it is."""
    return function(*sets[i % len(sets)])


def inputs(gpu, layer):
    """{side: [[x, w, y], ...]}: as many sets as do not fit into the second-level cache."""
    sets: dict = {side: [] for side in ("ours", *THEIRS)}
    for _ in range(min(8, ceil(3 * gpu.cache / (4 * sum(map(prod, layer.shapes)))))):
        x, w, y = (gpu.random(*shape) for shape in layer.shapes)
        sets["ours"].append([gpu.cupy.asarray(a) for a in (x, w, y)])
        for side in THEIRS:
            sets[side].append([gpu.layout(a, side) for a in (
                channels_first(x), torch_layout(w), channels_first(y))])
    return sets


def accepted(calls: dict) -> dict:
    """Those of PyTorch's calls that it does not refuse."""
    def works(call):
        try:
            return call(0) is not None
        except RuntimeError:
            return False

    return {side: call for side, call in calls.items() if side not in THEIRS or works(call)}


def convolution(gpu, record, case, precision, layer, counts, im2col=False):
    """Time and error of a layer in every direction, beside cuDNN in both layouts; in bf16 its
    factors and results are of that type, and ours are float32 and rounded on the way."""
    sets = inputs(gpu, layer)
    halves = {side: [[a.bfloat16() for a in three] for three in sets[side]]
              for side in THEIRS if precision == "bf16"}
    for direction in DIRECTIONS:
        if direction == "dx" and layer.c_in == 1:
            continue  # the image needs no gradient
        functions = {"ours": partial(our_convolution, layer, direction)}
        functions |= dict.fromkeys(THEIRS, partial(their_convolution, layer, direction))
        if im2col and direction == "forward":
            functions["im2col"] = partial(columns, layer)
        calls = {side: partial(in_turn, f, sets["ours" if side == "im2col" else side])
                 for side, f in functions.items()}
        as_ours = our_layout if direction == "dw" else channels_last
        with gpu.precision("fp32", search=False):
            right = next((as_ours(calls[side](0)) for side in ("default", "channels_last")
                          if side in accepted(calls)), None)
        calls |= {side: partial(in_turn, functions[side], halves[side]) for side in halves}
        with gpu.precision(precision):
            took = gpu.medians(calls := accepted(calls))
            answer, again = (gpu.shared(calls["ours"](0)) for _ in range(2))
            theirs = next((as_ours(calls[s](0)) for s in THEIRS if s in calls), None)
        errors = {} if right is None else {
            "error": difference(answer, right), "limit": LIMITS[precision],
            "cudnn_error": nan if theirs is None else difference(theirs, right)}
        record.row(part="layers", case=case, what=str(layer), **counts, direction=direction,
                   precision=precision, **took, rate=layer.operations / took["ours"] / 1e9,
                   unit="TFLOP/s", **errors)
        if not torch.equal(answer, again):
            record.fault(f"{layer} {direction} {precision}: another answer the second time")


def tiles(gpu, record, layer):
    """A layer by the tensor-core kernels with other tiles; in one turn, beside cuDNN's best layout.
    """
    sets, body = inputs(gpu, layer), windows.kernels._body
    for direction in DIRECTIONS:
        def ours(i, constants, direction=direction):
            def chosen(*arguments):
                file, threads, usual = body(*arguments)
                if file != "conv_mma":
                    return file, threads, usual
                warps = prod(constants[a] // constants[f"WARP_{a}"] for a in ("ROWS", "COLUMNS"))
                return file, 32 * warps, {**usual, **constants}

            with mock.patch.object(windows.kernels, "_body", chosen):
                return in_turn(partial(our_convolution, layer, direction), sets["ours"], i)

        calls = {i: partial(ours, constants=constants) for i, constants in enumerate(TILES)}
        theirs = {side: partial(in_turn, partial(their_convolution, layer, direction), sets[side])
                  for side in THEIRS[:1]}
        with gpu.precision("TF32"):
            took = gpu.medians({**calls, **accepted(theirs)})
            right, *others = (gpu.shared(call(0)) for call in calls.values())
        for i, constants in enumerate(TILES):
            record.row(part="tiles", what=str(layer), direction=direction, precision="TF32",
                       ours=took[i], channels_last=took.get("channels_last", nan),
                       rate=layer.operations / took[i] / 1e9, unit="TFLOP/s",
                       error=difference((right, *others)[i], right), limit=1e-5,
                       note=" ".join(f"{k}={v}" for k, v in constants.items()))


def program(record, part, command):
    """Another program's verdict; what it prints goes into <part>.txt."""
    log = record.folder / f"{part}.txt"
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(command, cwd=ts.cuda.loader.FOLDER.parent, stdout=file,
                                  stderr=subprocess.STDOUT, timeout=SECONDS[part]).returncode
        except FileNotFoundError:
            return record.row(part=part, note=f"no {command[0]} here")
        except subprocess.TimeoutExpired:
            return record.fault(f"{part}: not done after {SECONDS[part]:g} s, see {log.name}")
    last = log.read_text("utf-8", "replace").strip().splitlines()[-1:]
    record.row(part=part, what=" ".join(last), note=f"exit code {code}")
    if code:
        record.fault(f"{part}: exit code {code}, see {log.name}")


def operations(gpu, x=(2, 20, 112, 112, 64), coarse=(2, 5, 28, 28, CLASSES), fine=(40, 224, 224)):
    """(what, ours, PyTorch's, shapes of the inputs, fewest bytes forward, fewest backward).

    Batch-norm needs its statistics first: it reads x twice, backward x and g twice, and with a
    residual y once, whose gradient it writes. A pooled value comes with a byte that names its tap.
    """
    size, c = 4 * prod(x), (x[-1],)
    mean, variance = gpu.random(*c), gpu.random(*c)
    norm = partial(ops.batch_norm.__wrapped__, running_mean=gpu.cupy.asarray(mean),
                   running_var=gpu.cupy.asarray(variance), train=True, relu=True)

    def torch_norm(x, gamma, beta, residual=None):
        y = functional.batch_norm(x, mean, variance, gamma, beta, training=True)
        return functional.relu_(y if residual is None else y.add_(residual))

    yield "batch-norm, ReLU", norm, torch_norm, [x, c, c], 3 * size, 5 * size
    yield "batch-norm, addition, ReLU", norm, torch_norm, [x, c, c, x], 4 * size, 7 * size
    pooled, window = 5 * prod(x) // 8, {"kernel": (3,) * 3, "stride": (2,) * 3, "padding": (1,) * 3}
    yield ("max-pool 3x3x3 stride 2", partial(ops.max_pool.__wrapped__, **window),
           lambda x: functional.max_pool3d(x, 3, 2, 1), [x], size + pooled, size + pooled)
    logits = (coarse[0], *fine, CLASSES)
    voxels, up = prod(logits[:-1]), 4 * (prod(coarse) + prod(logits))
    yield ("linear upsampling by 8", partial(ops._upsample.__wrapped__, size=fine,
                                             align_corners=True),
           lambda x: functional.interpolate(x, fine, mode="trilinear", align_corners=True),
           [coarse], up, up)
    labels = torch.randint(0, CLASSES, logits[:-1], device="cuda")
    ours = gpu.cupy.asarray(labels).astype("uint8")
    bytes_ = voxels * (4 * CLASSES + 1), voxels * (8 * CLASSES + 1)
    yield ("Dice + cross-entropy",
           partial(losses._segmentation.__wrapped__, labels=ours, entropy=True, overlap=True),
           partial(torch_loss, labels=labels), [logits], *bytes_)


def memory(gpu, record, what, ours, theirs, shapes, *least):
    """One operation, forward and backward, beside PyTorch's in both layouts."""
    def laid_out(a, side):
        return gpu.layout(channels_first(a), side) if a.ndim == 5 else a

    tensors = [gpu.random(*shape) for shape in shapes]
    arrays = [gpu.cupy.asarray(a) for a in tensors]
    inputs = {s: [laid_out(a, s).requires_grad_() for a in tensors] for s in THEIRS}
    (value, pulls), results = ours(*arrays), {s: theirs(*inputs[s]) for s in THEIRS}
    g = gpu.random(*value.shape)
    mine, cotangents = gpu.cupy.asarray(g), {s: laid_out(g, s) for s in THEIRS}

    def backward(i):
        return pulls(mine, (True,) * len(arrays)) if callable(pulls) else [p(mine) for p in pulls]

    calls: dict = {"forward": {}, "backward": {}}
    for s in THEIRS:
        calls["forward"][s] = lambda i, s=s: theirs(*(a.detach() for a in inputs[s]))
        calls["backward"][s] = lambda i, s=s: torch.autograd.grad(
            results[s], inputs[s], cotangents[s], retain_graph=True)
    calls["forward"]["ours"] = lambda i: ours(*arrays)  # last: a read of ours by the host would end
    calls["backward"]["ours"] = backward  # the hold on what comes after it in a turn
    for (direction, each), bytes_ in zip(calls.items(), least, strict=True):
        took = gpu.medians(each)
        a, b = ((value, results["default"]) if direction == "forward" else
                (backward(0)[0], each["default"](0)[0]))
        record.row(part="memory", what=what, direction=direction, **took, unit="GB/s",
                   rate=bytes_ / took["ours"] / 1e6, limit=1e-4,
                   error=difference(laid_out(gpu.shared(a), "default"), b))


def sgd(gpu, record):
    """SGD with momentum on the parameters of ResNet-50: reads p, g and v, writes p and v."""
    shapes, leaves = [p.shape for p in network("resnet50", False).parameters()], {}
    for side, made in (("ours", lambda a: ts.Tensor(gpu.cupy.asarray(a), requires_grad=True)),
                       ("default", lambda a: a.requires_grad_())):
        leaves[side] = [made(gpu.random(*shape)) for shape in shapes]
        for leaf in leaves[side]:
            leaf.grad = made(gpu.random(*leaf.shape)).data
    ours = ts.optim.SGD(leaves["ours"], 1e-3, momentum=0.9)
    theirs = torch.optim.SGD(leaves["default"], 1e-3, momentum=0.9)
    took = gpu.medians({"ours": lambda i: ours.step(), "default": lambda i: theirs.step()})
    record.row(part="memory", what="SGD of ResNet-50", direction="step", **took, unit="GB/s",
               rate=5 * 4 * sum(map(prod, shapes)) / took["ours"] / 1e6)
