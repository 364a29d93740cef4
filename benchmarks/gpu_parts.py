"""What benchmarks/gpu.py measures. `gpu` is its Gpu, `record` its Record; a part writes rows."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from math import ceil, prod
from statistics import median

import numpy as np
import torch
from torch.nn import functional
from torch_models import Net, channels_first, channels_last, our_layout, torch_layout

import tinyseg as ts
from tinyseg import losses, ops, windows
from tinyseg.models import Residual
from tinyseg.nn import Conv, MaxPool

BACKBONES, CLASSES = ("resnet18", "resnet50"), 3
CASES = {  # batch, patch, and whether inflated: depth 3, no stride or dilation along depth
    "2x40x224x224 isotropic": (2, (40, 224, 224), False),
    "1x96x96x96 isotropic": (1, (96, 96, 96), False),
    "2x40x224x224 inflated": (2, (40, 224, 224), True),
    "1x96x96x96 inflated": (1, (96, 96, 96), True)}
VOLUME = (96, 256, 256)  # of inference
DIRECTIONS = ("forward", "dx", "dw")
LIMITS = {"TF32": 3e-3, "fp32": 1e-4}  # of |ours - cuDNN's float32| / |cuDNN's float32|
SIDES = "ours", *(THEIRS := ("channels_last", "default"))  # PyTorch's layouts


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


@cache
def network(backbone: str, inflated: bool):
    """A network on the CPU, with the options of a case."""
    depth = {"depth": 3, "depth_stride": 1, "depth_dilation": 1} if inflated else {}
    return ts.models.resnet_seg(backbone, rank=3, in_channels=1, classes=CLASSES, **depth)


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


def difference(a, b) -> float:
    """|a - b| / |b| of tensors."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


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


def convolution(gpu, record, case, precision, layer, counts, im2col=False):
    """Time and error of a layer in every direction, beside cuDNN in both layouts."""
    sets: dict = {side: [] for side in SIDES}
    for _ in range(min(8, ceil(3 * gpu.cache / (4 * sum(map(prod, layer.shapes)))))):
        x, w, y = (gpu.random(*shape) for shape in layer.shapes)
        sets["ours"].append([gpu.cupy.asarray(a) for a in (x, w, y)])
        for side in THEIRS:
            sets[side].append([gpu.layout(a, side) for a in (
                channels_first(x), torch_layout(w), channels_first(y))])
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
            right = as_ours(calls["channels_last"](0))
        with gpu.precision(precision):
            took = gpu.medians(calls)
            error = difference(gpu.shared(calls["ours"](0)), right)
            cudnn_error = difference(as_ours(calls["channels_last"](0)), right)
        record.row(part="layers", case=case, what=str(layer), **counts, direction=direction,
                   precision=precision, **took, rate=layer.operations / took["ours"] / 1e9,
                   unit="TFLOP/s", error=error, limit=LIMITS[precision], cudnn_error=cudnn_error)


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


def training(gpu, net, side, x, labels):
    """step(i) on one side; it returns the loss."""
    if side == "ours":
        net, loss = ts.to_device(net.copy(), gpu.cupy), losses.dice_cross_entropy
        optimizer = ts.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
        x, labels = gpu.cupy.asarray(x), gpu.cupy.asarray(labels).astype("uint8")
    else:
        net, loss = gpu.layout(torch_twin(net).cuda(), side), torch_loss
        optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
        x = gpu.layout(channels_first(x), side)

    def step(i):
        optimizer.zero_grad()
        value = loss(net(x), labels)
        value.backward()
        optimizer.step()
        return value.data

    return step


def reserved(gpu, run):
    """(what run() returns, the GiB reserved by both libraries, of which one does nothing)."""
    gpu.release()  # cuDNN's search took more memory than what comes after it
    torch.cuda.reset_peak_memory_stats()
    answer = run()
    return answer, (gpu.pool.total_bytes() + torch.cuda.max_memory_reserved()) / 2**30


def step(gpu, record, case, backbone):
    """A whole training step; the losses of the first must agree."""
    batch, size, inflated = CASES[case]
    x, values, row = gpu.random(batch, *size, 1), {}, {}
    labels = torch.randint(0, CLASSES, (batch, *size), device="cuda")
    with gpu.precision("TF32"):
        for side in SIDES:
            run = training(gpu, network(backbone, inflated), side, x, labels)
            values[side] = float(run(0))
            took, row[f"{side}_gib"] = reserved(
                gpu, lambda run=run, side=side: gpu.medians({side: run}, budget=1, hold=False))
            row |= took
            del run
            gpu.release()
    record.row(part="steps", case=case, what=backbone, precision="TF32", **row, limit=1e-2,
               error=abs(values["ours"] / values["default"] - 1))


def predictor(gpu, net, side):
    """The network of one side, from host memory to host memory."""
    if side == "ours":
        return ts.to_device(net.copy(), gpu.cupy)
    twin = gpu.layout(torch_twin(net).cuda(), side).eval()

    def run(x):
        x = gpu.layout(channels_first(torch.from_numpy(x.data)).cuda(), side)
        with torch.inference_mode():
            return ts.Tensor(channels_last(twin(x)).cpu().numpy())

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
        for side in SIDES:
            run = predictor(gpu, network(backbone, inflated), side)
            seconds(side, run, 1)
            took, row[f"{side}_gib"] = reserved(gpu, partial(seconds, side, run, 3))
            row[side] = 1e3 * took
            del run
    error = difference(*(torch.from_numpy(answers[side]) for side in ("ours", "default")))
    record.row(part="inference", case=case, what=backbone, precision="TF32", **row, error=error,
               limit=3e-2, note=f"volume {'x'.join(map(str, VOLUME))}, overlap a half")


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
    yield ("linear upsampling by 8", partial(ops.upsample.__wrapped__, size=fine,
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

    calls: dict = {"forward": {"ours": lambda i: ours(*arrays)}, "backward": {"ours": backward}}
    for s in THEIRS:
        calls["forward"][s] = lambda i, s=s: theirs(*(a.detach() for a in inputs[s]))
        calls["backward"][s] = lambda i, s=s: torch.autograd.grad(
            results[s], inputs[s], cotangents[s], retain_graph=True)
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
