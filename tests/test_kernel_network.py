"""Whole networks on emulated kernels: every operation of training and inference takes its GPU path
and gives what NumPy gives."""

import re
import sys
import weakref
from contextlib import contextmanager
from functools import partial
from unittest import mock

import emulator
import numpy as np
import pytest

import tinyseg as ts
from tinyseg import cuda, infer, losses, models, nn, optim, train
from tinyseg.cuda import loader, norm


@pytest.fixture
def tiny(monkeypatch):
    """One basic block in each of two layers: small, with every kind of layer."""
    monkeypatch.setitem(models.BACKBONES, "tiny", ((1, 1, 0, 0), False))
    return "tiny"


@pytest.fixture
def launched(monkeypatch):
    """{file: kernels} of all launches."""
    found, launch = {}, cuda.launch

    def record(file, kernel, *arguments, **options):
        found.setdefault(file, set()).add(kernel)
        launch(file, kernel, *arguments, **options)

    for module in [m for name, m in sys.modules.items() if name.startswith("tinyseg")]:
        if getattr(module, "launch", None) is launch:
            monkeypatch.setattr(module, "launch", record)
    return found


def curve(library, net, size, make, steps=3):
    """Losses of a few steps and the state they left, in host memory."""
    net = nn.to_device(net, library)
    rng = np.random.default_rng(1)
    images = rng.standard_normal((2, *size, 1), "float32")
    labels = rng.integers(0, 3, (2, *size))
    labels[0, :2] = 255
    records = train.fit(net, lambda _: (images, labels),
                        lambda z, t: losses.dice_cross_entropy(z, t, 255),
                        make(net.parameters()), steps, clip=1.0)
    values = [record.loss for record in records]
    return values, {name: ts.to_numpy(a) for name, a in net.state().items()}


@pytest.mark.parametrize("rank, size, make, options", [
    (2, (17, 20), lambda ps: optim.AdamW(ps, 1e-3), {}),
    (3, (3, 9, 10), lambda ps: optim.SGD(ps, 1e-2, 0.9, True, 1e-4),
     {"depth_padding": "edge", "depth_stride": 1}),
])
def test_training(cuda, tiny, launched, rank, size, make, options):
    net = models.resnet_seg(tiny, rank=rank, in_channels=1, classes=3, **options)
    values, state = curve(np, net.copy(), size, make)
    with ts.cuda.precision("fp32"):
        ours, theirs = curve(cuda, net.copy(), size, make)
    assert np.allclose(values, ours, rtol=1e-4)
    for name, array in state.items():
        moved = array - net.state()[name]
        assert np.linalg.norm(theirs[name] - array) <= 1e-2 * np.linalg.norm(moved) + 1e-6, name
    rough, _ = curve(cuda, net.copy(), size, make)
    assert np.allclose(values, rough, rtol=1e-2) and rough != ours
    with ts.cuda.precision("bf16"):
        rougher, _ = curve(cuda, net.copy(), size, make)
    assert np.allclose(values, rougher, rtol=2e-2) and rougher != rough
    assert set(launched) == {"conv_simt", "conv_mma", "round", "slices", "norm", "pool", "upsample",
                             "loss", "optim"}
    assert launched["norm"] >= {"moments", "normalize", "adjoint_sums", "normalize_dx"}
    assert launched["conv_mma"] == launched["conv_simt"] == {"correlate", "correlate_dw"}


@pytest.mark.parametrize("rank, options", [
    (2, {}), (2, {"head": "fcn"}), (2, {"head": "deeplabv3"}), (2, {"head": "unet"}),
    (3, {"depth_padding": "edge", "depth_stride": 1}), (2, {"classes": 40}),
    (2, {"weight": np.array([0.5, 1, 2])}),  # of the host
])
def test_a_captured_step_gives_the_same_bits(cuda, tiny, monkeypatch, rank, options):
    """Batches of two shapes: each is first run, then captured, then launched again. The host reads
    once a step."""
    curves, states, read, to_numpy = [], [], [], train.to_numpy
    monkeypatch.setattr(train, "to_numpy", lambda a: read.append(1) or to_numpy(a))
    loss = partial(losses.dice_cross_entropy, weight=options.get("weight"))
    options = {"classes": 3} | ({"width": 8} if options else {}) | {
        name: value for name, value in options.items() if name != "weight"}
    for capture in False, True:
        net = nn.to_device(models.resnet_seg(tiny, rank=rank, in_channels=1, **options), cuda)
        rng, size = np.random.default_rng(3), (2, 2, 9)[-rank:]
        batches = [(rng.standard_normal((*size, 8 + i % 2, 1), "float32"),
                    rng.integers(0, 3, (*size, 8 + i % 2))) for i in range(7)]
        curves.append([record.loss for record in train.fit(
            net, batches.__getitem__, loss, optim.SGD(net.parameters(), 1e-2), 7,
            capture=capture)])
        states.append({name: a.get() for name, a in net.state().items()})
    assert curves[0] == curves[1] and len({*curves[0]}) == 7 and len(read) == 2 * 7
    for name, array in states[0].items():
        assert array.tobytes() == states[1][name].tobytes(), name


def test_a_graph_uses_counters_that_outlive_it(cuda, monkeypatch):
    """They are zeroed before it is captured, and not in its memory; and it keeps the stream whose
    counters they are, so that no other gets its name."""
    made, inside, zeros = [], [], cuda.zeros

    @contextmanager
    def using_allocator(_):
        inside.append("a pool")
        yield inside.pop()

    def noted(*options):
        made.append((emulator.tape, *inside, *map(weakref.ref, cuda.cuda.Stream.entered)))
        return zeros(*options)

    monkeypatch.setattr(cuda, "zeros", noted)
    monkeypatch.setattr(cuda.cuda, "using_allocator", using_allocator)
    emulator.forget()
    total = ts.cuda.captured(lambda a: (norm.column_sum(a),))
    for a in np.random.default_rng(0).standard_normal((3, 311, 36), "float32"):
        assert np.allclose(total(cuda.asarray(a))[0].get(), a.sum(0), atol=1e-4)
    (now,), (later, stream) = made
    assert now is later is None and stream() is not None
    del total
    assert stream() is None


def test_what_a_captured_step_cannot_do(cuda, tiny):
    """Labels out of range are found by their number, dropout is refused, hosts run as they do."""
    net = nn.to_device(models.resnet_seg(tiny, rank=2, in_channels=1, classes=3), cuda)
    images = np.ones((2, 9, 8, 1), "float32")

    def steps(loss, labels=lambda step: step % 4):
        return list(train.fit(net, lambda step: (images, np.full((2, 9, 8), labels(step))), loss,
                              optim.SGD(net.parameters(), 1e-2), 5, capture=True))

    with pytest.raises(ValueError, match="labels hold 3; expected 0 to 2"):
        steps(losses.dice_cross_entropy)
    with mock.patch.object(ts.cuda.loss, "MAX_CLASSES", 2):  # as where there are more classes
        with pytest.raises(ValueError, match="labels hold 3; expected 0 to 2"):
            steps(losses.dice_cross_entropy)
    generator = np.random.default_rng(1)
    with pytest.raises(RuntimeError, match="dropout draws on the host"):
        steps(lambda z, t: losses.dice(ts.ops.dropout(z, p=0.5, rng=generator), t),
              labels=lambda _: 1)
    with pytest.raises(RuntimeError, match="capturing"):  # CUDA's own
        steps(lambda z, t: losses.dice(z, t) * float(z.data[0, 0, 0, 0]), labels=lambda _: 1)
    curves = []
    for capture in True, False:
        host = models.resnet_seg(tiny, rank=2, in_channels=1, classes=3)
        curves.append([record.loss for record in train.fit(
            host, lambda step: (images, np.full((2, 9, 8), step % 3)), losses.dice,
            optim.SGD(host.parameters(), 1e-2), 5, capture=capture)])
    assert curves[0] == curves[1]
    with mock.patch.object(train.cuda, "captured", None):  # nor with several ranks
        several = mock.Mock(wraps=ts.ranks.ALONE, size=2)
        several.gather.side_effect = lambda value: [value]
        list(train.fit(net, lambda step: (images, np.full((2, 9, 8), 1)), losses.dice,
                       optim.SGD(net.parameters(), 1e-2), 2, capture=True, ranks=several))


def traced_step(library, rank, precision):
    """Traces of all launches of a training step, of networks with 8 to 64 channels; and of a sum
    by several blocks."""
    size, options = {2: ((9, 11), {}), 3: ((3, 5, 6), {"depth_stride": 1})}[rank]
    net = models.resnet_seg("tiny", rank=rank, in_channels=1, classes=3, width=8, **options)
    with emulator.traced() as traces, cuda.precision(precision):
        curve(library, net, size, lambda ps: optim.AdamW(ps, 1e-3), steps=1)
        norm.column_sum(library.zeros((311, 36), "float32"))
    return traces


@pytest.mark.parametrize("rank, precision", [(2, "fp32"), (3, "tf32"), (2, "bf16")])
def test_no_threads_race(cuda, tiny, rank, precision):
    traces = traced_step(cuda, rank, precision)
    assert {trace.function.name for trace in traces} >= {
        "correlate", "correlate_dw", "normalize", "adjoint_sums", "maximum", "linear", "gradient",
        "adamw", "squares"}
    assert [race for trace in traces for race in trace.races() + trace.unordered()] == []
    assert sum(len(trace.of()) for trace in traces) > 10**5


BARRIERS = [(path.stem, i) for path in sorted(loader.FOLDER.glob("*.cu"))
            for i in range(len(re.findall(r"__sync\w+\(\);", loader.source(path.stem))))]


@pytest.mark.slow
@pytest.mark.parametrize("file, which", BARRIERS)
def test_every_barrier_is_missed(cuda, tiny, monkeypatch, file, which):
    """Without it threads race, or something is at fault, or what is computed is not a number."""
    source, seen = loader.source, iter(range(99))
    text = re.sub(r"__sync\w+\(\);", lambda m: "" if next(seen) == which else m[0], source(file))
    monkeypatch.setattr(loader, "source", lambda f: text if f == file else source(f))
    emulator.forget()
    try:
        with pytest.raises((emulator.Fault, FloatingPointError, AssertionError)):
            for rank, precision in (2, "fp32" if file == "conv_simt" else "tf32"), (3, "tf32"):
                traces = traced_step(cuda, rank, precision)
                assert not any(trace.races() or trace.unordered() for trace in traces)
    finally:
        monkeypatch.undo()
        emulator.forget()


def test_inference_and_files(cuda, tiny, tmp_path):
    """A network on the GPU predicts what its file does on the CPU."""
    net = models.resnet_seg(tiny, rank=3, in_channels=2, classes=3)
    volume = np.random.default_rng(2).standard_normal((9, 13, 11, 2), "float32")
    ts.save(tmp_path / "net.npz", nn.to_device(net, cuda))
    truth = infer.sliding_window(ts.load(tmp_path / "net.npz"), volume, (8, 9, 10))
    with ts.cuda.precision("fp32"):
        ours = infer.sliding_window(net, volume, (8, 9, 10))
        folded = infer.sliding_window(infer.fold(net), volume, (8, 9, 10))
    for answer in ours, folded:
        assert isinstance(answer, np.ndarray)
        assert np.abs(answer - truth).max() < 1e-4 * np.abs(truth).max()
