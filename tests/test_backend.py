"""Devices, and the whole library on an array type that mixes with NumPy as little as CuPy's does.

See `strictarray`: code that calls NumPy where it should ask `array_module` fails on it, without a
GPU.
"""

import operator
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import strictarray
from strictarray import FUNCTIONS, METHODS, PROPERTIES, ndarray

import tinyseg as ts
from tinyseg import (
    backend,
    graph,
    losses,
    models,
    nn,
    normalisation,
    ops,
    optim,
    tensor,
    windows,
)
from tinyseg.windows import reference


@pytest.fixture
def strict(monkeypatch):
    """The library, registered where `array_module` looks for it; NumPy takes the same path."""
    monkeypatch.setattr(windows.cpu, "serves", lambda *_: False)
    library = strictarray.library("strictarray")
    monkeypatch.setitem(sys.modules, "strictarray", library)
    return library


def test_cupy_has_all_that_the_strict_array_offers():
    cupy = pytest.importorskip("cupy")
    missing = [n for n in (*FUNCTIONS, "add", "asarray") if not hasattr(cupy, n)]
    names = *METHODS, *PROPERTIES, "data", "device", "get"
    missing += [n for n in names if not hasattr(cupy.ndarray, n)]
    assert not missing and hasattr(cupy.add, "at")


def test_the_strict_array_is_strict(strict):
    a, b = np.ones(3), strict.asarray(np.ones(3))
    for mix in (lambda: a + b, lambda: b + a, lambda: np.exp(b), lambda: np.asarray(b),
                lambda: np.zeros_like(b), lambda: a.__setitem__(slice(None), b),
                lambda: b.__setitem__(slice(None), a), lambda: a @ b, lambda: b @ a,
                lambda: strict.exp(a), lambda: b[np.array([0])], lambda: np.concatenate([a, b]),
                lambda: operator.iadd(a, b), lambda: operator.iadd(b, a),
                lambda: np.add.at(b, 0, 1), lambda: a == b, lambda: strict.where(b > 0, a, b)):
        with pytest.raises(TypeError):
            mix()
    assert isinstance(b.sum(), ndarray) and isinstance(b[0], ndarray) and (b.get() == a).all()
    c = b
    c += 1
    assert c is b and (b.get() == 2).all() and (a == 1).all()


# Everything that runs on NumPy runs on it, to the bit


def bits(ours, theirs):
    """Strict `theirs` equals NumPy's `ours` in dtype, shape and every bit."""
    assert isinstance(theirs, ndarray) and not isinstance(ours, ndarray)
    a, b = np.asarray(ours), theirs.get()
    assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def both(strict, f, *arrays):
    """f on tensors of both libraries: the value and all gradients agree to the bit."""
    g = None
    results = []
    for library in (np, strict):
        leaves = [ts.Tensor(backend.to_library(a, library), requires_grad=True) for a in arrays]
        y = f(library, *leaves)
        g = np.random.default_rng(5).standard_normal(y.shape).astype("float32") if g is None else g
        y.backward(library.asarray(g))
        results.append([y.data, *(x.grad for x in leaves)])
    for ours, theirs in zip(*results, strict=True):
        bits(ours, theirs)


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


@pytest.mark.parametrize("f", [
    lambda _, x, y: x + y * 2 - x / (y * y + 1), lambda _, x, y: 1 / (x * x + 1) + -y,
    lambda _, x, y: x @ y.transpose(0, 2, 1) / 3, lambda _, x, y: (x * x + 1) ** 0.5 - 2 * y[0],
    lambda _, x, y: x.sum(axis=(0, 2)) * y.mean(axis=1, keepdims=True).sum(),
    lambda _, x, y: x.mean() + y.sum(), lambda _, x, y: x.reshape(-1, 4)[1:, None] * y[1, 0],
    lambda _, x, y: (x + y)[..., ::2], lambda _, x, y: x[1, 2, 3] * y[0, 0, 0],
    lambda lib, x, y: x[lib.asarray(np.array([1, 1, 0]))] + y[:1],
    lambda lib, x, y: x[:, lib.asarray(np.array([True, False, True]))].sum() * y,
    lambda lib, x, y: lib.asarray(np.ones((2, 3, 4), "float32")) * x + y,
    lambda _, x, y: ops.concatenate(ops.softmax(x), ops.relu(y), axis=1),
    lambda _, x, y: ops.exp(x) - ops.log(y * y + 1),
    lambda _, x, y: abs(x) * y.max(axis=[0, 2], keepdims=True),
    lambda _, x, y: ops.maximum(x, y) + ops.maximum(0.5, x) - ops.clip(y, low=-1, high=0.5),
    lambda _, x, y: ops.where(x < y, ops.tanh(x), 0) + ops.sigmoid(y) * ops.sqrt(x * x),
    lambda _, x, y: ops.stack(x, y, axis=2)[:, :, 0] * ops.dropout(
        x[0], p=0.5, rng=np.random.default_rng(1)),
    lambda _, x, y: ops.pad(x, padding=1, padding_mode="edge") + ops.avg_pool(y, kernel=1)[0, 0],
    lambda _, x, y: ops.avg_pool(x, kernel=2, padding=1) * y.max(),
])
def test_arithmetic(strict, f):
    both(strict, f, normal(2, 3, 4), normal(2, 3, 4, seed=2))


@pytest.mark.parametrize("f", [
    lambda _, x, w, b: ops.conv(x, w, b, stride=(2, 1), padding=((2, 1), 1), dilation=(1, 2),
                                padding_mode=("edge", "zero")),
    lambda _, x, w, b: ops.max_pool(x, kernel=(3, 2), stride=2, padding=(1, (1, 0))) + w.sum() + b,
    lambda _, x, w, b: ops.group_norm(x, b, b * 2, groups=2) * w.mean(),
    lambda _, x, w, b: ops.upsample(x, (3, 9), align_corners=False) * w.mean() + b,
    lambda _, x, w, b: (ops.double(x, ops.double(x, size=(11, 7)), size=(11, 7)) * w.mean()
                        + b.sum()),
    lambda lib, x, w, b: ops.batch_norm(
        x, b, b, train=True, running_mean=lib.zeros(4, "float32"),
        running_var=lib.ones(4, "float32")) + w.sum(),
])
def test_operations(strict, f):
    both(strict, f, normal(2, 6, 7, 4), normal(3, 2, 4, 4, seed=2), normal(4, seed=3))


@pytest.fixture
def backbone(monkeypatch):
    """One basic block in each of three layers: small, with every kind of layer."""
    monkeypatch.setitem(models.BACKBONES, "tiny", ((1, 1, 1, 0), False))
    return "tiny"


def train_step(library, net, images, labels, make):
    """One step; what it computed and left behind, by name."""
    net = nn.to_device(net, library)
    optimizer = make(net.parameters())
    loss = losses.dice_cross_entropy(net(library.asarray(images)), library.asarray(labels), 255,
                                     library.asarray(np.array([0.5, 1, 2], "float32")))
    loss.backward()
    gradients = {f"gradient of {n}": p.grad for n, p in net.named_parameters()}
    optimizer.step()
    optimizer.load_state({k: backend.to_numpy(v) for k, v in optimizer.state().items()})
    net.eval()
    with ts.no_grad():
        logits = net(library.asarray(images)).data
    return {"loss": loss.data, "logits": logits, **gradients, **net.state()}


def batch(size, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, (2, *size))
    labels[0, :2] = 255
    return rng.standard_normal((2, *size, 1)).astype("float32"), labels


@pytest.mark.parametrize("rank, size, make, options", [
    (2, (17, 20), lambda ps: optim.AdamW(ps, 1e-2), {}),
    (3, (3, 9, 10), lambda ps: optim.SGD(ps, 1e-2, 0.9, True, 1e-4),
     {"depth_padding": "edge", "depth_stride": 1}),
])
def test_a_network_trains_on_it(strict, backbone, rank, size, make, options):
    net = models.resnet_seg(backbone, rank=rank, in_channels=1, classes=3, **options)
    twin = net.copy()
    ours = train_step(np, net, *batch(size), make)
    theirs = train_step(strict, twin, *batch(size), make)
    assert list(ours) == list(theirs)
    for name in ours:
        bits(ours[name], theirs[name])
    assert all(np.asarray(ours[name]).any() for name in ours if "gradient" in name)


@pytest.mark.parametrize("module", [ops, normalisation, losses, reference, tensor, graph, optim],
                         ids=lambda m: m.__name__)
def test_a_stray_numpy_call_fails_on_it(strict, backbone, monkeypatch, module):
    monkeypatch.setattr(module, "array_module", lambda _: np)
    net = nn.Sequential(nn.Conv(1, 4, (3, 3), padding=1, rng=np.random.default_rng(0)),
                        nn.BatchNorm(4), nn.ReLU(), nn.Conv(4, 3, (1, 1),
                                                            rng=np.random.default_rng(1)))
    with pytest.raises(TypeError):
        train_step(strict, net, *batch((5, 6)), lambda ps: optim.AdamW(ps, 1e-2))


# Devices


def test_array_module(strict):
    class Sub(np.ndarray):
        pass

    for x in (np.ones(2), np.float32(1), 1, 1.5, True, np.ones(2).view(Sub), np.ma.ones(2)):
        assert backend.array_module(x) is np
    assert backend.array_module(strict.asarray([1.0])) is strict


def test_moving_arrays(strict):
    x = np.ones((2, 3), "float32")
    assert ts.to_numpy(x) is x and backend.to_library(x, np) is x
    there = backend.to_library(x, strict)
    assert isinstance(there, ndarray) and there.dtype == "float32"
    back = ts.to_numpy(there)
    assert isinstance(back, np.ndarray) and (back == x).all()
    assert isinstance(ts.to_numpy([1, 2]), np.ndarray)


def test_moving_networks(strict):
    net = nn.Sequential(nn.Conv(1, 2, (3,), rng=np.random.default_rng(0)), nn.BatchNorm(2))
    before = net.state()
    assert ts.to_device(net, strict) is net
    assert all(isinstance(a, ndarray) for a in net.state().values())
    assert ts.to_device(net, "cpu") is net
    assert all((a == before[n]).all() for n, a in net.state().items())
    ts.to_device(net, strict)
    net.load_state(before)  # from host memory, onto the device
    assert all(isinstance(a, ndarray) for a in net.state().values())
    with pytest.raises(ValueError, match="tpu"):
        ts.to_device(net, "tpu")


def fake_cupy(count):
    def get_device_count():
        if isinstance(count, Exception):
            raise count
        return count

    return SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(
        getDeviceCount=get_device_count)))


def test_devices(monkeypatch):
    assert ts.device("cpu") is np
    for name in ("gpu", "cuda:0", "", "CUDA"):
        with pytest.raises(ValueError, match="expected"):
            ts.device(name)
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if not installed
    with pytest.raises(RuntimeError, match="install"):
        ts.device("cuda")
    for count, words in [(0, "no GPU"), (OSError("libcuda"), "libcuda"), (ValueError("x"), "x")]:
        monkeypatch.setitem(sys.modules, "cupy", fake_cupy(count))
        with pytest.raises(RuntimeError, match=words):
            ts.device("cuda")
    working = fake_cupy(1)
    monkeypatch.setitem(sys.modules, "cupy", working)
    assert ts.device("cuda") is working


@pytest.mark.parametrize("fault", ["ImportError('libcudart')", "OSError('libcuda')",
                                   "RuntimeError('driver')"])
def test_a_broken_cupy_does_no_harm(tmp_path, fault):
    """`import tinyseg` never looks at it; asking for the GPU says what is wrong."""
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy/__init__.py").write_text(f"raise {fault}")
    code = ("import tinyseg as ts, numpy as np\n"
            "assert ts.ops.relu(ts.Tensor(np.ones(2))).shape == (2,)\n"
            "try: ts.device('cuda')\n"
            "except RuntimeError as error: print(error)")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert ran.returncode == 0, ran.stderr
    assert fault.split("'")[1] in ran.stdout and "CuPy" in ran.stdout
