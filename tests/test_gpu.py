"""On a GPU: NumPy in float64, CuPy's own functions and the kernels give the same answers.

Skipped, with the reason, where there is no GPU; the kernels' own tests (test_kernel_*.py) need
none. "Generic" is the code that NumPy runs, on CuPy arrays, with the kernels switched off.
"""

from contextlib import contextmanager
from functools import partial
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_windows import cases

import tinyseg as ts
from tinyseg import losses, nn, ops, optim, train
from tinyseg.cuda import PRECISIONS, loader, norm, precision
from tinyseg.windows import Window

pytestmark = pytest.mark.gpu
FEW = settings(max_examples=50, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def cupy():
    """CuPy, with a GPU behind it."""
    try:
        return ts.device("cuda")
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tensor_cores(cupy):
    """CuPy, with a GPU that multiplies TF32 and copies to shared memory on its own."""
    capability = cupy.cuda.Device().compute_capability
    if int(capability) < 80:
        pytest.skip(f"compute capability is {capability}; the tensor-core kernels need 80")
    return cupy


@contextmanager
def generic():
    """The kernels switched off."""
    with mock.patch.object(ts.cuda, "serves", lambda *arrays: False):
        yield


@contextmanager
def launched():
    """The sources of the kernels that ran."""
    files, function = [], loader._function

    def noted(library, file, *rest):
        files.append(file)
        return function(library, file, *rest)

    with mock.patch.object(loader, "_function", noted):
        yield files


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def tf32(x):
    """The nearest numbers with ten bits of mantissa: tensor cores lose nothing of them."""
    return ((x.view("uint32") + 0x1000) & 0xFFFFE000).view("float32")


def bf16(x):
    """The nearest numbers with seven bits of mantissa."""
    return ((x.view("uint32") + 0x8000) & 0xFFFF0000).view("float32")


ROUNDED = {"fp32": np.asarray, "tf32": tf32, "bf16": bf16}


def error(a, b):
    """The largest difference, in units of the largest number."""
    assert a.shape == b.shape
    a, b = (np.where(np.isinf(v), np.sign(v), v) for v in (a, b))  # a maximum over padding alone
    return float(abs(a - b).max() / max(abs(b).max(), 1e-30)) if b.size else 0.0


def run(library, dtype, op, arrays, constants, g):
    """[y, the gradients in `arrays`] of op(*arrays, *constants), for the cotangent g(y)."""
    leaves = [ts.Tensor(library.asarray(a.astype(dtype)), requires_grad=True) for a in arrays]
    y = op(*leaves, *map(library.asarray, constants))
    y.backward(library.asarray(g(ts.to_numpy(y.data)).astype(dtype)))
    return [ts.to_numpy(a) for a in (y.data, *(leaf.grad for leaf in leaves))]


def check(cupy, op, *arrays, constants=(), tolerance=1e-5, seed=0, rounded=np.asarray):
    """The three ways agree, values and gradients, for factors that are `rounded`."""
    def drawn(y):  # none where rounding decides which side of a ReLU a number falls on
        return rounded(np.asarray(normal(seed, *y.shape) * (abs(y) > 1e-4)))

    arrays = [rounded(a) for a in arrays]
    truth = run(np, "float64", op, arrays, constants, drawn)
    g = drawn(truth[0])
    with generic(), launched() as files:
        plain = run(cupy, "float32", op, arrays, constants, lambda y: g)
    assert not files
    with launched() as files:
        ours = run(cupy, "float32", op, arrays, constants, lambda y: g)
    assert files
    for i, (a, b, right) in enumerate(zip(ours, plain, truth, strict=True)):
        name = f"gradient {i}" if i else "value"
        assert a.dtype == b.dtype == "float32" and error(b, right) < 2e-5, f"generic, {name}"
        assert error(a, right) < tolerance, name


# Operations

def check_convolution(cupy, size, options, c_in, c_out, seed, multiplied):
    window = Window.of(*options)
    x, w, b = normal(seed, 2, *size, c_in), normal(1, *window.kernel, c_in, c_out), normal(2, c_out)
    with precision(multiplied):
        check(cupy, partial(ops.conv, **window.options), x, w, b, seed=seed,
              tolerance=1e-5 if multiplied == "fp32" else 1e-4, rounded=ROUNDED[multiplied])


@given(cases(largest=11), *2 * [st.sampled_from([1, 3, 8, 20, 64, 72])])
@FEW
def test_convolution_in_float32(cupy, case, c_in, c_out):
    check_convolution(cupy, *case[:2], c_in, c_out, case[2], "fp32")


@given(cases(largest=11), *2 * [st.sampled_from([8, 24, 64, 72])],
       st.sampled_from(["tf32", "bf16"]))
@FEW
def test_convolution_on_tensor_cores(tensor_cores, case, c_in, c_out, multiplied):
    check_convolution(tensor_cores, *case[:2], c_in, c_out, case[2], multiplied)


@pytest.mark.parametrize("multiplied", PRECISIONS)
@pytest.mark.parametrize("size, c_in, c_out, kernel, stride, dilation", [
    ((11, 18, 17), 1, 64, 7, 2, 1),
    ((5, 14, 13), 64, 64, 3, 1, 1),
    ((6, 14, 15), 64, 128, 3, 2, 1),
    ((6, 14, 15), 64, 128, 1, 2, 1),
    ((5, 9, 10), 128, 256, 3, 1, 4),
    ((3, 9, 7), 256, 512, 1, 1, 1),
    ((3, 9, 7), 512, 3, 1, 1, 1),
    ((40, 37), 64, 128, 3, 2, 1),
])
def test_layers_of_networks(tensor_cores, size, c_in, c_out, kernel, stride, dilation, multiplied):
    rank = len(size)
    options = (kernel,) * rank, stride, dilation * (kernel // 2), dilation
    check_convolution(tensor_cores, size, options, c_in, c_out, 0, multiplied)


@given(cases(largest=11), st.sampled_from([1, 3, 8, 64]))
@FEW
def test_max_pool(cupy, case, channels):
    size, (kernel, stride, padding, dilation, _), seed = case
    x = np.random.default_rng(seed).integers(-3, 4, (2, *size, channels)).astype("float32")
    check(cupy, lambda x: ops.max_pool(x, kernel=kernel, stride=stride, padding=padding,
                                       dilation=dilation), x)  # many numbers are equal


@given(st.integers(2, 700), st.sampled_from([1, 3, 8, 64, 72, 256]), st.booleans(), st.booleans(),
       st.booleans(), SEEDS)
@FEW
def test_batch_norm(cupy, rows, channels, training, residual, relu, seed):
    kept = []

    def op(x, gamma, beta, *residual):
        library = ts.backend.array_module(x.data)
        mean, var = (library.asarray(a.astype(x.dtype)) for a in statistics)
        y = ops.batch_norm(x, gamma, beta, *residual, running_mean=mean, running_var=var,
                           train=training, relu=relu)
        kept.append([ts.to_numpy(mean), ts.to_numpy(var)])
        return y

    statistics = normal(seed, channels), 0.5 + abs(normal(1, channels))
    x = normal(seed, 2, rows, channels) + 3 * normal(2, channels)
    vectors = 1 + 0.1 * normal(3, channels), normal(4, channels)
    more = [normal(5, *x.shape)] if residual else []
    check(cupy, op, x, *vectors, *more, tolerance=2e-5)
    for ours in kept[1:]:
        for a, b, before in zip(ours, kept[0], statistics, strict=True):
            assert error(a, b) < 1e-5 and training == (a != before).any()


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=3),
       st.sampled_from([1, 3, 64]), st.booleans(), SEEDS)
@FEW
def test_upsampling(cupy, axes, channels, align_corners, seed):
    before, after = zip(*axes, strict=True)
    if before == after:
        after = *after[:-1], after[-1] + 1  # there is nothing to launch
    check(cupy, lambda x: ops.upsample(x, after, align_corners=align_corners),
          normal(seed, 2, *before, channels), seed=seed)


@given(st.sampled_from([losses.cross_entropy, losses.dice, losses.dice_cross_entropy]),
       st.integers(2, 9), st.sampled_from(["uint8", "int32", "int64"]), st.booleans(),
       st.booleans(), SEEDS)
@FEW
def test_losses(cupy, loss, classes, dtype, ignoring, weighted, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, (2, 5, 30, 41)).astype(dtype)
    constants = [labels]
    if weighted and loss is not losses.dice:
        constants.append(rng.uniform(0.5, 2, classes).astype("float32"))
    if ignoring:
        labels[rng.random(labels.shape) < 0.3] = 255 if dtype == "uint8" else 100

    def op(logits, labels, weight=None):
        options = {} if weight is None else {"weight": weight}
        ignore = (255 if dtype == "uint8" else 100) if ignoring else None
        return loss(logits, labels, ignore=ignore, **options)

    check(cupy, op, 3 * normal(seed, *labels.shape, classes), constants=constants)


def test_labels_out_of_range(cupy):
    with pytest.raises(ValueError, match="labels hold 7; expected 0 to 2"):
        losses.cross_entropy(ts.Tensor(cupy.zeros((1, 4, 3), "float32")),
                             cupy.asarray(np.array([[0, 1, 7, 2]])))


@pytest.mark.parametrize("make", [
    partial(optim.SGD, lr=0.1),
    partial(optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2),
    partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    partial(optim.AdamW, lr=1e-2, weight_decay=0.1)])
def test_optimisers(cupy, make):
    shapes = [(3, 3, 3, 8, 16), (1,), (5, 7), (20000,)]

    def steps(library, dtype):
        leaves = [ts.Tensor(library.asarray(normal(i, *shape).astype(dtype)), requires_grad=True)
                  for i, shape in enumerate(shapes)]
        optimizer, norms = make(leaves), []
        for number in range(3):
            for i, leaf in enumerate(leaves[number % 2 :], start=number):  # some have no gradient
                leaf.grad = library.asarray(normal(100 + i, *leaf.shape).astype(dtype))
            norms.append(train.clip_norm(leaves, 50.0))
            optimizer.step()
            optimizer.zero_grad()
        return [np.array(norms), *(ts.to_numpy(leaf.data) for leaf in leaves)]

    truth = steps(np, "float64")
    with generic():
        plain = steps(cupy, "float32")
    with launched() as files:
        ours = steps(cupy, "float32")
    assert "optim" in files
    for a, b, right in zip(ours, plain, truth, strict=True):
        assert error(a, right) < 1e-5 and error(b, right) < 1e-5


# Networks

class Small(nn.Module):
    """Every kind of layer that the large ones have, in a network that two devices train alike."""

    def __init__(self):
        conv = partial(nn.Conv, rng=np.random.default_rng(0))
        self.conv1 = conv(1, 16, (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2), bias=False)
        self.conv2 = conv(16, 24, (3, 3, 3), padding=1, bias=False)
        self.conv3 = conv(24, 24, (3, 3, 3), padding=2, dilation=2, bias=False,
                          padding_mode=("edge", "zero", "zero"))
        self.bn1, self.bn2, self.bn3 = map(nn.BatchNorm, (16, 24, 24))
        self.pool = nn.MaxPool((1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.fc = conv(24, 3, (1, 1, 1))

    def forward(self, x):
        y = self.pool(self.bn1(self.conv1(x), relu=True))
        y = self.bn2(self.conv2(y), relu=True)
        y = self.bn3(self.conv3(y), y, relu=True)
        return ops.upsample(self.fc(y), x.shape[1:-1], align_corners=True)


SGD, ADAMW = partial(optim.SGD, lr=0.02, momentum=0.9), partial(optim.AdamW, lr=1e-3)


def fitted(library, make=SGD, steps=20):
    """(network, the loss of each step) of a task that can be learned: blobs, by brightness."""
    net, curve = ts.to_device(Small(), library), []
    optimizer = make(net.parameters())
    for number in range(steps):
        coarse = normal(number, 2, 4, 6, 6, 1)
        x = coarse.repeat(2, axis=1).repeat(4, axis=2).repeat(4, axis=3)
        labels = ((x > -0.5).astype("uint8") + (x > 0.5))[..., 0]
        optimizer.zero_grad()
        loss = losses.dice_cross_entropy(net(library.asarray(x)), library.asarray(labels))
        loss.backward()
        optimizer.step()
        curve.append(float(loss.data))
    return net, curve


@pytest.mark.parametrize("make", [SGD, ADAMW], ids=["SGD", "AdamW"])
def test_training_goes_the_same_way(cupy, make):
    _, cpu = fitted(np, make)
    with precision("fp32"):
        _, gpu = fitted(cupy, make)
    assert cpu[-1] < 0.9 * cpu[0]
    np.testing.assert_allclose(gpu, cpu, rtol=1e-3)


@pytest.mark.parametrize("multiplied", PRECISIONS)
def test_the_same_seed_gives_the_same_bits(tensor_cores, multiplied):
    with precision(multiplied):
        states = [fitted(tensor_cores, steps=8)[0].state() for _ in range(2)]
    for name, a in states[0].items():
        assert a.get().tobytes() == states[1][name].get().tobytes(), name


def test_a_step_on_tensor_cores(tensor_cores):
    """Of numbers that TF32 does round: a whole network's gradients change about as much as with
    input, weights and cotangent off by half a step of it, which turns some ReLUs, too."""
    rng = np.random.default_rng(2)

    def gradients(library, shaken=False):
        net = Small()
        arrays = [p.data for p in net.parameters()]
        x, g = (normal(i, 2, 8, 24, 24, c) for i, c in ((0, 1), (1, 3)))
        for a in (*arrays, x, g) if shaken else ():
            a *= (1 + 2.0**-11 * rng.uniform(-1, 1, a.shape)).astype("float32")
        ts.to_device(net, library)(library.asarray(x)).backward(library.asarray(g))
        return np.concatenate([ts.to_numpy(p.grad).ravel() for p in net.parameters()])

    truth = gradients(np)
    with precision("fp32"), launched() as files:
        full = gradients(tensor_cores)
    assert "conv_mma" not in files and error(full, truth) < 1e-5
    with launched() as files:
        rounded = gradients(tensor_cores)
    assert "conv_mma" in files
    noise = max(np.linalg.norm(gradients(np, True) - truth) for _ in range(6))
    assert 0 < np.linalg.norm(rounded - truth) < 1.5 * noise


def test_checkpoints_move_between_devices(cupy, tmp_path):
    net = ts.models.resnet_seg("resnet18", rank=2, in_channels=1, classes=3, seed=5).eval()
    x = normal(0, 1, 40, 33, 1)
    with ts.no_grad(), precision("fp32"):
        cpu = net(x).data
        ts.to_device(net, "cuda")
        ts.save(tmp_path / "gpu.npz", net, patch=[40, 33])
        back = ts.load(tmp_path / "gpu.npz")
        assert back.metadata == {"patch": [40, 33]} and (back(x).data == cpu).all()
        again = ts.to_device(back, cupy)
        assert error(again(cupy.asarray(x)).data.get(), cpu) < 1e-4
    for name, a in net.state().items():
        assert (a == again.state()[name]).all()


@pytest.mark.parametrize("batch, labels", [(1, False), (3, True)])
def test_sliding_window(cupy, batch, labels):
    net = fitted(np, steps=3)[0]
    slide = partial(ts.infer.sliding_window, volume=normal(9, 11, 30, 26, 1), patch=(8, 16, 16),
                    batch=batch, labels=labels)
    cpu = slide(net)
    with precision("fp32"):
        gpu = slide(ts.to_device(net, cupy))
    if labels:
        assert gpu.dtype == "uint8" and (gpu != cpu).mean() < 1e-3
    else:
        assert isinstance(gpu, np.ndarray) and error(gpu, cpu) < 1e-4


def test_more_than_two_billion_elements(cupy):
    shape = 34, 1000, 1000, 64  # 8.7 GB
    free = cupy.cuda.Device().mem_info[0]
    if free < 4.5 * 4 * np.prod(shape):
        pytest.skip(f"{free / 2**30:.0f} GiB of the GPU's memory are free; 37 GiB are needed")
    assert np.prod(shape) > 2**31
    x, one = cupy.empty(shape, "float32"), cupy.asarray(normal(0, *shape[1:]))
    for i in range(shape[0]):
        x[i] = (1 + i / 10) * one
    gamma, beta, mean = (cupy.asarray(normal(i, 64)) for i in (1, 2, 3))
    var = cupy.ones(64, "float32")
    norm = partial(ops.batch_norm, gamma=gamma, beta=beta, running_mean=mean, running_var=var)
    y = norm(x, train=False).data
    for i in 0, 17, 33:
        assert (y[i] == norm(x[i : i + 1], train=False).data[0]).all()
    del y
    leaf = ts.Tensor(x, requires_grad=True)
    before = mean.copy()
    norm(leaf, train=True).backward(x)
    factor = np.mean([1 + i / 10 for i in range(shape[0])])
    expected = 0.9 * before.get() + 0.1 * factor * one.get().astype(float).mean(axis=(0, 1))
    np.testing.assert_allclose(mean.get(), expected, atol=1e-4)
    for i in 0, 33:  # batch-norm ignores scale and offset: no gradient along x itself, nor along 1
        assert float(abs(leaf.grad[i]).max()) < 1e-2


@pytest.mark.parametrize("rows, channels", [(400_009, 64), (100_003, 5), (9_001, 512), (70, 36)])
def test_blocks_that_add_up_miss_none(cupy, rows, channels):
    """A hundred times, by two streams at once, and by graphs that come and go."""
    x = cupy.asarray(normal(1, rows, channels) + normal(2, channels))
    exact = x.get().astype(float)
    total, captured = norm.column_sum(x).get(), ts.cuda.captured
    np.testing.assert_allclose(total, exact.sum(axis=0), atol=1e-5 * abs(exact).sum(axis=0).max())
    mean, variance = (a.get() for a in norm.moments(x))
    np.testing.assert_allclose(mean, exact.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(variance, exact.var(axis=0), rtol=1e-5)
    cupy.cuda.Device().synchronize()
    found, streams = [], [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    for _ in range(50):
        for stream in streams:
            with stream:
                found.append((norm.column_sum(x), *norm.moments(x)))
    cupy.cuda.Device().synchronize()
    for _ in range(3):
        graph = captured(lambda x: (norm.column_sum(x), *norm.moments(x)))
        for _ in range(4):
            found.append([a.copy() for a in graph(x)])
        del graph
        cupy.full(1 << 20, -1, "int32")  # where its memory was
    for answer in found:
        for a, b in zip(answer, (total, mean, variance), strict=True):
            assert a.get().tobytes() == b.tobytes()


def test_a_captured_step_gives_the_same_bits(tensor_cores):
    """Over batches of two shapes, each of which is first run, then captured, then launched."""
    states, curves = [], []
    for capture in False, True:
        net = ts.to_device(Small(), tensor_cores)

        def batch(step):
            x = normal(step, 2, 8 + 2 * (step % 2), 12, 12, 1)
            return x, (x[..., 0] > 0).astype("uint8")

        curves.append([record.loss for record in train.fit(
            net, batch, losses.dice_cross_entropy, SGD(net.parameters()), 9, capture=capture)])
        states.append(net.state())
    assert curves[0] == curves[1] and len({*curves[0]}) == 9
    for name, a in states[0].items():
        assert a.get().tobytes() == states[1][name].get().tobytes(), name


def test_a_captured_step_finds_labels_out_of_range(tensor_cores):
    net = ts.to_device(Small(), tensor_cores)

    def batch(step):
        return normal(step, 1, 8, 12, 12, 1), np.full((1, 8, 12, 12), step, "uint8")

    with pytest.raises(ValueError, match="labels hold 3; expected 0 to 2"):
        list(train.fit(net, batch, losses.dice_cross_entropy, SGD(net.parameters()), 9,
                       capture=True))
