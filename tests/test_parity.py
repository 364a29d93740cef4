"""Everything against PyTorch, in float64, with random cotangents: values, gradients, training."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyseg as ts

torch = pytest.importorskip("torch")
F = torch.nn.functional
from torch_models import (  # noqa: E402
    channels_first,
    channels_last,
    our_layout,
    resize,
    torch_layout,
    twin,
)

torch.set_num_threads(1)  # NumPy has threads of its own; together they wait for each other


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


def close(ours, theirs, tolerance=1e-8):
    """Whether the norm of the difference is small beside the norm."""
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


def check(ours, theirs, *arrays):
    """The same value, and the same gradient for every array under a random cotangent."""
    xs = [ts.Tensor(a, requires_grad=True) for a in arrays]
    ps = [torch.tensor(a, requires_grad=True) for a in arrays]
    y, q = ours(*xs), theirs(*ps)
    assert close(y.data, q)
    g = normal(*y.shape, seed=1)
    y.backward(g)
    q.backward(torch.tensor(g))
    for i, (x, p) in enumerate(zip(xs, ps, strict=True)):
        assert close(x.grad, p.grad), f"gradient {i}"


A, B = normal(4, 1, 5), normal(3, 1)
POSITIVE = np.exp(normal(3, 4))


@pytest.mark.parametrize("f", [
    lambda x, y: x + y, lambda x, y: x - y, lambda x, y: x * y, lambda x, y: x / y,
    lambda x, y: 2 - x * 3 + y, lambda x, y: 1.5 / y + -x, lambda x, y: (x - 1) * (y + 2) * x / 4,
    lambda x, y: abs(x) - abs(y * x), lambda x, y: x * y**0 + y**1, lambda x, y: x + x * x * y - x,
])
def test_arithmetic_broadcasts(f):
    check(f, f, A, B)


@pytest.mark.parametrize("exponent", [3, 2, 1, 0, 0.0, 0.5, -1.5])
def test_power(exponent):
    check(lambda x: x**exponent, lambda x: x**exponent, POSITIVE)
    if exponent in (0, 1, 2, 3):
        check(lambda x: x**exponent, lambda x: x**exponent, np.array([0.0, -2, 0, 3]))


WITH_TIES = np.array([[0.0, 1, -1], [1, 1, -0.5], [0, 0, 0]])


@pytest.mark.parametrize("x, y", [(A, B), (WITH_TIES, WITH_TIES.T)])
def test_choices(x, y):
    """The derivative at a kink too."""
    check(ts.ops.maximum, torch.maximum, x, y)
    check(lambda x, y: ts.ops.where(x > y, x * y, y),
          lambda x, y: torch.where(x > y, x * y, y), x, y)
    check(lambda x: ts.ops.clip(x, low=-0.5, high=1), lambda x: x.clamp(-0.5, 1), x)
    check(lambda x: ts.ops.clip(x, low=0), lambda x: x.clamp(min=0), x)
    check(abs, abs, x)
    check(ts.ops.relu, torch.relu, x)
    for axis in (0, -1, (0, 1), None):
        axes = tuple(range(x.ndim)) if axis is None else axis
        check(lambda x, axis=axis: x.max(axis=axis), lambda x, axes=axes: x.amax(axes), x)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_stack(axis):
    check(lambda *xs: ts.ops.stack(*xs, axis=axis), lambda *xs: torch.stack(xs, axis),
          *(normal(3, 4, seed=i) for i in range(3)))


@pytest.mark.parametrize("kernel, options", [
    (2, {}), (3, {"stride": 2, "padding": 1}), ((2, 3), {"stride": (1, 2), "padding": (1, 0)})])
def test_avg_pool(kernel, options):
    check(lambda x: ts.ops.avg_pool(x, kernel=kernel, **options),
          lambda x: channels_last(F.avg_pool2d(channels_first(x), kernel, **options)),
          normal(2, 7, 6, 3))


@pytest.mark.parametrize("edge", [(False, False), (True, True), (True, False)])
def test_pad(edge):
    padding, modes = ((2, 1), (0, 3)), tuple("edge" if e else "zero" for e in edge)
    check(lambda x: ts.ops.pad(x, padding=padding, padding_mode=modes),
          lambda x: channels_last(padded(channels_first(x), padding, edge)), normal(2, 4, 5, 3))


@pytest.mark.parametrize("f, g", [
    (lambda x, y: (x @ y).sum(axis=0) / (x * x + 1).mean(), lambda x, y: (x @ y).sum(0) / (
        x * x + 1).mean()),
    (lambda x, y: ts.ops.log(ts.ops.exp(x).sum(axis=1, keepdims=True)) - x.mean(axis=0) @ y[:, :1],
     lambda x, y: x.logsumexp(1, keepdim=True) - x.mean(0) @ y[:, :1]),
    (lambda x, y: ts.ops.relu(x @ y + 1).transpose() @ x[:, ::2] - 3,
     lambda x, y: torch.relu(x @ y + 1).T @ x[:, ::2] - 3),
    (lambda x, y: ts.ops.sigmoid(x @ y) * ts.ops.tanh(x[:, :2]) + x.reshape(2, -1)[1, :3].sum(),
     lambda x, y: torch.sigmoid(x @ y) * torch.tanh(x[:, :2]) + x.reshape(2, -1)[1, :3].sum()),
    (lambda x, y: ((x - x.mean(axis=1, keepdims=True)) ** 2).mean(axis=1) ** 0.5 + y.max(),
     lambda x, y: x.std(1, correction=0) + y.max()),
    (lambda x, y: ts.ops.concatenate(x, x * 2, axis=0)[[0, 4, 4, 7]] @ y / 3 + y[2],
     lambda x, y: torch.cat([x, x * 2])[[0, 4, 4, 7]] @ y / 3 + y[2]),
    (lambda x, y: ts.ops.softmax(x, axis=0) @ ts.ops.stack(y, y * y)[1] - abs(x[:, 1:3]),
     lambda x, y: x.softmax(0) @ torch.stack([y, y * y])[1] - x[:, 1:3].abs()),
])
def test_expressions(f, g):
    check(f, g, normal(4, 6), normal(6, 2, seed=2))


@pytest.mark.parametrize("x, y", [
    ((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((3, 4), (2, 4, 5)), ((2, 1, 3, 4), (6, 4, 5)),
    ((4,), (4, 5)), ((3, 4), (4,)), ((4,), (4,)), ((4,), (2, 4, 5)), ((2, 3, 4), (4,)),
])
def test_matmul(x, y):
    check(lambda x, y: x @ y, torch.matmul, normal(*x), normal(*y, seed=2))


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (-2, 1, 0)])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("name", ["sum", "mean"])
def test_reductions(name, axis, keepdims):
    axes = tuple(range(4)) if axis is None else axis
    check(lambda x: getattr(x, name)(axis=axis, keepdims=keepdims),
          lambda x: getattr(x, name)(axes, keepdim=keepdims), normal(2, 3, 5, 4))


@pytest.mark.parametrize("key", [
    1, (slice(None), -2), (slice(1, 6, 2), None, Ellipsis, 0), slice(0, 0),
    np.array([3, 0, 3, 3]), (slice(None), np.array([[1, 1], [2, 0]])),
    (np.array([0, 5, 0]), np.array([1, 2, 1])), normal(6, 3, 4) > 0.2,
])
def test_indexing(key):
    def theirs(x):
        keys = key if isinstance(key, tuple) else (key,)
        return x[tuple(torch.tensor(k) if isinstance(k, np.ndarray) else k for k in keys)]

    check(lambda x: x[key], theirs, normal(6, 3, 4))


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_concatenate(axis):
    shapes = [[2, 3, 5] for _ in range(3)]
    for i, shape in enumerate(shapes):
        shape[axis] = i + 1
    check(lambda *xs: ts.ops.concatenate(*xs, axis=axis), lambda *xs: torch.cat(xs, axis),
          *(normal(*shape) for shape in shapes))


@pytest.mark.parametrize("ours, theirs, x", [
    (ts.ops.relu, torch.relu, A), (ts.ops.exp, torch.exp, A), (ts.ops.log, torch.log, POSITIVE),
    (ts.ops.sqrt, torch.sqrt, POSITIVE), (ts.ops.tanh, torch.tanh, 3 * A),
    (ts.ops.sigmoid, torch.sigmoid, 30 * A), (ts.ops.sigmoid, torch.sigmoid, WITH_TIES),
    (ts.ops.softmax, lambda x: x.softmax(-1), 50 * A),
    (lambda x: ts.ops.softmax(x, axis=0), lambda x: x.softmax(0), A),
    (lambda x: x.reshape(-1, 10), lambda x: x.reshape(-1, 10), A),
    (lambda x: x.transpose(2, 0, 1), lambda x: x.permute(2, 0, 1), A),
    (lambda x: x.transpose(), lambda x: x.permute(2, 1, 0), A),
])
def test_pointwise_and_shape(ours, theirs, x):
    check(ours, theirs, x)


def padded(x, padding, edge, fill=0.0):
    """(N, C, *S) extended by (before, after) per axis, the border repeated where `edge`."""
    for mode in ("constant", "replicate"):
        pairs = [p if e == (mode == "replicate") else (0, 0)
                 for p, e in zip(padding, edge, strict=True)]
        flat = list(itertools.chain(*reversed(pairs)))
        x = F.pad(x, flat, mode, fill) if mode == "constant" else F.pad(x, flat, mode)
    return x


@st.composite
def windows(draw, largest_padding=3):
    """Options of a window at rank 1 to 3, and a grid on which at least one fits."""
    rank = draw(st.integers(1, 3))

    def axes(strategy):
        return draw(st.tuples(*[strategy] * rank))

    kernel, stride, dilation = axes(st.integers(1, 4)), axes(st.integers(1, 3)), None
    dilation = axes(st.integers(1, 3))
    ends = st.integers(0, largest_padding)
    padding = axes(st.tuples(ends, ends))
    edge = axes(st.booleans())
    size = tuple(max(1, d * (k - 1) + 1 - sum(p)) + extra for k, d, p, extra in
                 zip(kernel, dilation, padding, axes(st.integers(0, 4)), strict=True))
    return kernel, stride, padding, dilation, edge, size


@settings(max_examples=60, deadline=None)
@given(windows(), st.booleans())
def test_convolution(window, bias):
    kernel, stride, padding, dilation, edge, size = window
    modes = tuple("edge" if e else "zero" for e in edge)
    native = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    check(lambda *a: ts.ops.conv(*a, stride=stride, padding=padding, dilation=dilation,
                                 padding_mode=modes),
          lambda x, w, b=None: channels_last(native(
              padded(channels_first(x), padding, edge), torch_layout(w), b, stride, 0, dilation)),
          normal(2, *size, 3), normal(*kernel, 3, 4, seed=3), *[normal(4)] * bias)


@settings(max_examples=40, deadline=None)
@given(windows(largest_padding=0), st.data())
def test_max_pool(window, data):
    kernel, stride, _, dilation, _, size = window
    padding = tuple(data.draw(st.tuples(*[st.integers(0, k // 2)] * 2)) for k in kernel)
    native = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    check(lambda x: ts.ops.max_pool(x, kernel=kernel, stride=stride, padding=padding,
                                    dilation=dilation),
          lambda x: channels_last(native(
              padded(channels_first(x), padding, [False] * len(kernel), -torch.inf), kernel,
              stride, 0, dilation)),
          normal(2, *size, 3))


@pytest.mark.parametrize("size", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm(size, train):
    mean, var = normal(6), np.exp(normal(6, seed=1))
    ours, theirs = (mean.copy(), var.copy()), (torch.tensor(mean), torch.tensor(var))
    check(lambda x, gamma, beta: ts.ops.batch_norm(
              x, gamma, beta, running_mean=ours[0], running_var=ours[1], train=train,
              momentum=0.3, eps=1e-3),
          lambda x, gamma, beta: channels_last(F.batch_norm(
              channels_first(x), *theirs, gamma, beta, train, 0.3, 1e-3)),
          2 + 3 * normal(4, *size, 6), normal(6, seed=2), normal(6, seed=3))
    assert close(ours[0], theirs[0]) and close(ours[1], theirs[1])
    assert train != np.array_equal(ours[0], mean)


@pytest.mark.parametrize("size, groups", [((7,), 1), ((3, 5), 3), ((2, 3, 4), 6)])
def test_group_norm(size, groups):
    check(lambda *a: ts.ops.group_norm(*a, groups=groups, eps=1e-3),
          lambda x, *a: channels_last(F.group_norm(channels_first(x), groups, *a, 1e-3)),
          2 + 3 * normal(2, *size, 6), normal(6, seed=2), normal(6, seed=3))


@pytest.mark.parametrize("size, to", [
    ((5,), (9,)), ((3, 4), (6, 8)), ((1, 4), (1, 7)), ((2, 3, 1), (2, 5, 2)),
    ((4, 3, 2), (7, 3, 4)),
])
@pytest.mark.parametrize("joined", [True, False])
def test_double(size, to, joined):
    more = [normal(2, *to, 2)] if joined else []
    check(lambda x, *skip: ts.ops.double(x, *skip, size=to),
          lambda x, *skip: torch.cat([channels_last(F.interpolate(channels_first(x), to)), *skip],
                                     dim=-1), normal(2, *size, 3), *more)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size, to", [
    ((5,), (13,)), ((9,), (4,)), ((3, 4), (17, 25)), ((1, 6), (5, 1)), ((2, 3, 5), (9, 17, 15)),
    ((4, 1, 3), (4, 6, 2)),
])
def test_upsample(size, to, align_corners):
    check(lambda x: ts.ops.upsample(x, to, align_corners=align_corners),
          lambda x: channels_last(resize(channels_first(x), to, align_corners)),
          normal(2, *size, 3))


@pytest.mark.parametrize("size", [(7,), (5, 6), (3, 4, 5)])
@pytest.mark.parametrize("ignore", [None, 255, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses(size, ignore, weighted):
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 4, (2, *size))
    if ignore is not None:
        labels[rng.random(labels.shape) < 0.3] = ignore
    weight = rng.uniform(0.5, 3, 4) if weighted else None
    target = torch.tensor(labels)

    def entropy(x):
        return F.cross_entropy(channels_first(x), target,
                               None if weight is None else torch.tensor(weight),
                               ignore_index=-100 if ignore is None else ignore)

    def dice(x, first=1, smooth=1e-5):
        kept = (target != (-1 if ignore is None else ignore))[..., None]
        p = (x.softmax(-1) * kept).flatten(0, -2)
        t = (F.one_hot(torch.where(kept[..., 0], target, 0), 4) * kept).flatten(0, -2)
        ratio = (2 * (p * t).sum(0) + smooth) / (p.sum(0) + t.sum(0) + smooth)
        return 1 - ratio[first:].mean()

    x = normal(2, *size, 4)
    check(lambda x: ts.losses.cross_entropy(x, labels, ignore, weight), entropy, x)
    check(lambda x: ts.losses.dice(x, labels, ignore), dice, x)
    check(lambda x: ts.losses.dice(x, labels, ignore, background=True, smooth=0.1),
          lambda x: dice(x, 0, 0.1), x)
    check(lambda x: ts.losses.dice_cross_entropy(x, labels, ignore, weight),
          lambda x: dice(x) + entropy(x), x)


def test_cross_entropy_of_masked_classes():
    x, labels = normal(2, 5, 6, 4), np.random.default_rng(1).integers(0, 3, (2, 5, 6))
    x[..., 3] = -np.inf
    x[0, 1:3, :, 1] = np.where(labels[0, 1:3] == 1, 0, -np.inf)
    check(lambda x: ts.losses.cross_entropy(x, labels),
          lambda x: F.cross_entropy(channels_first(x), torch.tensor(labels)), x)


def network(make, backbone, dtype="float64", **options):
    """A network with random batch-norm parameters and statistics, and its PyTorch twin."""
    net = make(backbone, in_channels=2, classes=3, **options).astype(dtype)
    rng = np.random.default_rng(7)
    for name, array in net.state().items():
        if array.ndim == 1:
            low, high = (0.5, 1.5) if name.endswith(("weight", "var")) else (-0.5, 0.5)
            net.load_state({name: rng.uniform(low, high, array.shape)}, strict=False)
    return net, twin(net)


def predict(net, model, x):
    logits = net(x)
    theirs = model(channels_first(torch.tensor(x)))
    return logits, channels_last(theirs) if theirs.ndim > 2 else theirs


def check_gradients(net, model, x):
    logits, theirs = predict(net.train(), model.train(), x)
    assert close(logits.data, theirs)
    g = normal(*logits.shape, seed=9)
    logits.backward(g)
    theirs.backward(torch.tensor(g))
    parameters = dict(model.named_parameters())
    assert [name for name, _ in net.named_parameters()] == list(parameters)
    for name, p in net.named_parameters():
        assert close(p.grad, our_layout(parameters[name].grad)), name
    check_state(net, model)


def check_state(net, model):
    theirs = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    assert list(net.state()) == list(theirs)
    for name, array in net.state().items():
        assert close(array, our_layout(theirs[name])), name


@pytest.mark.parametrize("backbone, shape", [
    ("resnet18", (2, 17, 25, 2)), ("resnet18", (1, 9, 17, 15, 2)),
    ("resnet50", (2, 9, 25, 2)), ("resnet50", (1, 9, 17, 15, 2)),
])
def test_whole_segmentation_network(backbone, shape):
    check_gradients(*network(ts.models.resnet_seg, backbone, rank=len(shape) - 2), normal(*shape))


@pytest.mark.parametrize("options", [
    {"rank": 2, "dilate_first_block": False, "align_corners": False}, {"rank": 1},
    {"rank": 1, "output_stride": 16}, {"rank": 1, "output_stride": 32, "head": "fcn"},
    {"rank": 1, "output_stride": 16, "dilate_first_block": False, "backbone": "resnet50"},
])
def test_variants_of_the_network(options):
    shape = (2, 17, 33, 2) if options["rank"] == 2 else (4, 77, 2)
    options = {"backbone": "resnet18", **options}
    check_gradients(*network(ts.models.resnet_seg, **options), normal(*shape))


@pytest.mark.parametrize("shape, options", [
    ((2, 17, 34, 19, 2), {"decoder": (8, 7, 6, 5, 4)}), ((3, 101, 2), {}),
    ((4, 77, 2), {"decoder": (64, 32), "norm": "group"}),
    ((2, 36, 33, 2), {"decoder": (8, 12, 6, 4), "align_corners": False}),
])
def test_whole_encoder_and_decoder(shape, options):
    net, model = network(ts.models.resnet_seg, "resnet18", rank=len(shape) - 2, head="unet",
                         **options)
    check_gradients(net, model, normal(*shape))


@pytest.mark.parametrize("head, shape", [
    ("linear", (2, 33, 25, 2)), ("fcn", (2, 33, 25, 2)), ("deeplabv3", (2, 33, 25, 2)),
    ("fcn", (2, 81, 2)), ("deeplabv3", (2, 81, 2)),
])
def test_heads_in_evaluation_mode(head, shape):
    net, model = network(ts.models.resnet_seg, "resnet18", rank=len(shape) - 2, head=head)
    with torch.no_grad(), ts.no_grad():
        assert close(*(y if isinstance(y, torch.Tensor) else y.data
                       for y in predict(net.eval(), model.eval(), normal(*shape))))
    check_state(net, model)


@pytest.mark.parametrize("backbone, shape", [
    ("resnet18", (3, 17, 65, 2)), ("resnet50", (5, 65, 2)),
])
def test_whole_classification_network(backbone, shape):
    check_gradients(*network(ts.models.resnet, backbone, rank=len(shape) - 2), normal(*shape))


@pytest.mark.parametrize("shape", [(2, 33, 25, 2), (1, 9, 17, 25, 2)])
def test_single_precision(shape):
    net, model = network(ts.models.resnet_seg, "resnet18", "float32", rank=len(shape) - 2)
    with torch.no_grad(), ts.no_grad():
        for mode in (True, False):
            (net.train if mode else net.eval)()
            logits, theirs = predict(net, model.train(mode), normal(*shape).astype("float32"))
            assert logits.dtype == "float32" and close(logits.data, theirs, 1e-4)


def batch(size, step):
    rng = np.random.default_rng((step, *size))
    return rng.standard_normal((*size, 2)), rng.integers(0, 3, size)


@pytest.mark.parametrize("rank, ours, theirs, options", [
    (2, ts.optim.SGD, torch.optim.SGD,
     {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    (1, ts.optim.AdamW, torch.optim.AdamW,
     {"lr": 2e-3, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}),
])
def test_ten_training_steps(rank, ours, theirs, options):
    """fit's gradient clipping and schedule are written out; the clip bites in the first steps."""
    net, model = network(ts.models.resnet_seg, "resnet18", rank=rank)
    size = (2, 9, 13) if rank == 2 else (3, 41)
    optimizer = theirs(model.parameters(), **options)
    records = ts.train.fit(net, lambda step: batch(size, step), ts.losses.cross_entropy,
                           ours(net.parameters(), **options), 10, clip=3.0)
    clipped = 0
    for step, record in enumerate(records):
        optimizer.param_groups[0]["lr"] = options["lr"] * (1 - step / 10) ** 0.9
        x, labels = map(torch.tensor, batch(size, step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(channels_first(x)), labels)
        loss.backward()
        norm = sum((p.grad**2).sum() for p in model.parameters()) ** 0.5
        clipped += bool(norm > 3)
        for p in model.parameters():
            p.grad *= min(1.0, 3 / norm)
        optimizer.step()
        assert record.loss == pytest.approx(loss.item(), rel=1e-8)
    assert step == 9 and clipped
    check_state(net, model)
