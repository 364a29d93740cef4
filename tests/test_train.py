"""Training: the steps, the schedule, the clip, and that an interrupted run goes on as it would."""

import math
import os
import signal
import subprocess
import sys
import threading
import traceback
from time import monotonic, sleep

import numpy as np
import pytest
import strictarray
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyseg as ts
from tinyseg import checkpoint
from tinyseg.optim import SGD, AdamW, cosine, poly
from tinyseg.train import Average, clip_norm, dice, fit, overlap, prepared, stalled


def small(seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    return ts.nn.Sequential(
        ts.nn.Conv(2, 5, (3, 3), padding=1, rng=rng), ts.nn.BatchNorm(5), ts.nn.ReLU(),
        ts.nn.Conv(5, 3, (3, 3), padding=1, rng=rng)).astype(dtype)


def batch(step, dtype="float64"):
    rng = np.random.default_rng((1, step))
    return rng.standard_normal((2, 7, 6, 2)).astype(dtype), rng.integers(0, 3, (2, 7, 6))


def optimizers(net):
    return [SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
            AdamW(net.parameters(), 0.01)]


def equal(a, b):
    return list(a) == list(b) and all(np.array_equal(a[k], b[k]) for k in a)


def test_records():
    net = small()
    optimizer = SGD(net.parameters(), 0.1)
    seen = []
    records = fit(net, lambda step: seen.append(step) or batch(step), ts.losses.cross_entropy,
                  optimizer, 7, start=3, ahead=0)
    before = net.state()
    assert iter(records) is records and seen == [] and equal(net.state(), before)
    for count, record in enumerate(records, start=1):
        assert record.step == 2 + count and seen == list(range(3, 3 + count))
        assert record.lr == 0.1 * poly(record.step, 7) == optimizer.lr
        assert math.isfinite(record.loss) and record.seconds >= record.waited >= 0
        assert record.validation is None and record.score is None
        assert set(record.patch_dice) == {1, 2}
    assert count == 4 and optimizer.lr == 0.1 and optimizer.steps == 4
    assert list(fit(net, batch, ts.losses.cross_entropy, optimizer, 5, start=5)) == []


def test_a_record_tells_of_the_network_before_the_step():
    net, twin = small(), small()
    record = next(fit(net, batch, ts.losses.dice_cross_entropy, SGD(net.parameters(), 0.1), 3))
    images, labels = batch(0)
    logits = twin(images)
    assert record.loss == float(ts.losses.dice_cross_entropy(logits, labels).data)
    assert record.patch_dice == dice(overlap(logits.data, labels))


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_resumption_equals_the_uninterrupted_run(tmp_path, kind, dtype):
    def run(net, optimizer, start, stop):
        records = fit(net, lambda s: batch(s, dtype), ts.losses.dice_cross_entropy, optimizer, 6,
                      start=start, clip=0.5)
        return [next(records).loss for _ in range(start, stop)]

    whole = small(dtype=dtype)
    reference = optimizers(whole)[kind]
    losses = run(whole, reference, 0, 6)
    for stop in range(7):
        first = small(dtype=dtype)
        optimizer = optimizers(first)[kind]
        begun = run(first, optimizer, 0, stop)
        arrays = {**first.state(), **{f"optimizer.{k}": a for k, a in optimizer.state().items()}}
        checkpoint.write(tmp_path / "run.npz", arrays, {"step": stop})
        arrays, description = checkpoint.read(tmp_path / "run.npz")

        second = small(seed=9, dtype=dtype)
        optimizer = optimizers(second)[kind]
        second.load_state({k: a for k, a in arrays.items() if not k.startswith("optimizer.")})
        optimizer.load_state({k[10:]: a for k, a in arrays.items() if k.startswith("optimizer.")})
        assert begun + run(second, optimizer, description["step"], 6) == losses
        assert equal(second.state(), whole.state())
        assert equal(optimizer.state(), reference.state())


def test_schedules():
    assert [poly(s, 10) for s in (0, 5, 10, 12)] == pytest.approx([1, 0.5**0.9, 0, 0])
    assert poly(3, 4, power=2) == 1 / 16
    assert [cosine(s, 12) for s in (0, 3, 4, 6, 8, 12, 20)] == pytest.approx(
        [1, (1 + math.sqrt(0.5)) / 2, 3 / 4, 1 / 2, 1 / 4, 0, 0])
    assert cosine(0, 8) == 1 and cosine(2, 8) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    for f in (poly, cosine):
        values = [f(s, 9) for s in range(10)]
        assert values == sorted(values, reverse=True)


def test_fit_follows_its_schedule():
    net = small()
    optimizer = SGD(net.parameters(), 0.5)
    before = net.state()
    rates = [r.lr for r in fit(net, batch, ts.losses.cross_entropy, optimizer, 4, clip=0.25,
                               schedule=lambda step, total: step * 0 if step else 1 / total)]
    assert rates == [0.125, 0, 0, 0] and optimizer.lr == 0.5
    moved = math.sqrt(sum(((before[name] - p.data) ** 2).sum()
                          for name, p in net.named_parameters()))
    assert moved == pytest.approx(0.125 * 0.25)  # one step of the clipped norm


@pytest.mark.parametrize("limit", [0.1, 3.0, 1e9])
def test_clip(limit):
    rng = np.random.default_rng(2)
    parameters = [ts.Tensor(rng.standard_normal(s), requires_grad=True) for s in ((3, 2), (5,), 4)]
    for p in parameters[:2]:
        p.grad = rng.standard_normal(p.shape)
    grads = [p.grad for p in parameters[:2]]
    kept = [g.copy() for g in grads]
    flat = np.concatenate([g.ravel() for g in grads])
    assert clip_norm(parameters, limit) == pytest.approx(np.linalg.norm(flat))
    clipped = np.concatenate([p.grad.ravel() for p in parameters[:2]])
    np.testing.assert_allclose(clipped, flat * min(1, limit / np.linalg.norm(flat)))
    assert parameters[2].grad is None
    assert all(np.array_equal(g, k) for g, k in zip(grads, kept, strict=True))


def test_patch_dice_against_sets():
    rng = np.random.default_rng(3)
    logits, labels = rng.standard_normal((2, 5, 4, 4)), rng.integers(0, 3, (2, 5, 4))
    logits[..., 3] -= 10  # class 3 is in neither
    answers = logits.argmax(-1)
    expected = {}
    for c in (1, 2):
        p, t = ({tuple(v) for v in np.argwhere(a == c)} for a in (answers, labels))
        expected[c] = 2 * len(p & t) / (len(p) + len(t))
    assert dice(overlap(logits, labels)) == pytest.approx(expected)


def test_ignored_voxels_do_not_count_in_the_patch_dice():
    logits, labels = np.eye(2)[[1, 1, 1, 0]], np.array([1, 1, 255, 255])
    assert dice(overlap(logits[None], labels[None])) == {1: 1.0}


@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.sampled_from(["uint8", "int64", "int16"]))
@settings(max_examples=25, deadline=None)
def test_overlap_against_masks(classes, seed, kind):
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 3, (2, 3, 4, classes)).astype("float32")  # ties too
    ignore = 255 if kind == "uint8" else -1
    labels = rng.choice([*range(classes), ignore], (2, 3, 4)).astype(kind)
    answers = np.where(labels == ignore, -5, logits.argmax(-1))
    counts = overlap(logits, labels)
    assert counts.shape == (2, classes - 1, 2) and counts.dtype.kind == "i"
    for n in range(2):
        for c in range(1, classes):
            p, t = answers[n] == c, labels[n] == c
            assert counts[n, c - 1].tolist() == [2 * (p & t).sum(), p.sum() + t.sum()]


def test_overlap_is_counted_patch_by_patch():
    rng = np.random.default_rng(4)
    logits, labels = rng.standard_normal((3, 5, 4, 2, 4)), rng.integers(0, 4, (3, 5, 4, 2))
    counts = overlap(logits, labels)
    assert counts.shape == (3, 3, 2)
    for n in range(3):
        np.testing.assert_array_equal(counts[n], overlap(logits[n : n + 1], labels[n : n + 1])[0])
        assert dice(counts[n : n + 1]) == pytest.approx(dice(overlap(logits[n][None],
                                                                     labels[n][None])))
    assert dice(counts)[2] == counts[:, 1, 0].sum() / counts[:, 1, 1].sum()
    assert dice(overlap(np.zeros((2, 3, 1)), np.zeros((2, 3), int))) == {}


def test_an_optimiser_of_another_network_is_refused_before_a_step():
    flat = small()
    deep = ts.inflate(flat)
    before = deep.state()
    with pytest.raises(ValueError, match="6 of the optimiser's 6 parameters"):
        next(fit(deep, batch, ts.losses.cross_entropy, SGD(flat.parameters(), 0.1), 3))
    assert equal(deep.state(), before)
    head = SGD(flat.parameters()[-2:], 0.1)  # a part is a choice, and so is a loss that learns
    more = SGD([*flat.parameters(), ts.Tensor(np.ones(1), requires_grad=True)], 0.1)
    for optimizer in (head, more):
        assert next(fit(flat, batch, ts.losses.cross_entropy, optimizer, 3)).step == 0


def test_what_the_optimiser_does_not_move_has_no_part_in_the_clipping():
    """A head alone moves as it does where all else is frozen: gradients that nobody asks for, and
    that sum up from step to step, do not count; those of a loss that learns do."""
    free, frozen = small(), small()
    for p in frozen.parameters()[:-2]:
        p.requires_grad = False
    for net in (free, frozen):
        list(fit(net, batch, ts.losses.cross_entropy, SGD(net.parameters()[-2:], 0.1), 6, clip=0.1))
    assert equal(free.state(), frozen.state())
    scale, net = ts.Tensor(np.ones(1, "float32"), requires_grad=True), small()
    optimizer = SGD([*net.parameters(), scale], 1.0)
    next(fit(net, batch, lambda logits, labels: (
        ts.losses.cross_entropy(logits, labels) * scale).sum(), optimizer, 3, clip=0.1))
    assert abs(scale.data - 1) < 0.1


def poisoned(value):
    """cross_entropy whose value is finite or not, and whose gradient is multiplied by `value`."""
    @ts.tensor.op
    def times(x):
        return x, (lambda g: g * value,)

    return lambda logits, labels: ts.losses.cross_entropy(times(logits), labels)


@pytest.mark.parametrize("bad", [
    lambda logits, labels: ts.losses.cross_entropy(logits, labels) * math.nan,
    lambda logits, labels: ts.losses.cross_entropy(logits, labels) + math.inf,
    poisoned(math.nan),
    poisoned(math.inf),
])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_changes_no_parameter(bad):
    net = small()
    optimizer = SGD(net.parameters(), 0.1, momentum=0.9)

    def loss(logits, labels):
        return (bad if optimizer.steps == 2 else ts.losses.cross_entropy)(logits, labels)

    records = fit(net, batch, loss, optimizer, 5)
    assert [next(records).step, next(records).step] == [0, 1]
    before, running = [p.data.copy() for p in net.parameters()], optimizer.state()
    with pytest.raises(FloatingPointError, match="step 2"):
        next(records)
    assert all(np.array_equal(a, p.data) for a, p in zip(before, net.parameters(), strict=True))
    assert equal(optimizer.state(), running) and optimizer.lr == 0.1


def test_the_rate_is_restored_however_the_run_ends():
    net = small()
    optimizer = SGD(net.parameters(), 0.1)
    records = fit(net, batch, ts.losses.cross_entropy, optimizer, 5)
    next(records), next(records)
    assert optimizer.lr < 0.1
    records.close()
    assert optimizer.lr == 0.1

    def broken(step):
        if step:
            raise OSError("no such batch")
        return batch(step)

    with pytest.raises(OSError, match="no such batch"):
        list(fit(net, broken, ts.losses.cross_entropy, optimizer, 5, schedule=lambda s, n: 0.5))
    assert optimizer.lr == 0.1


def test_fit_leaves_the_mode_alone():
    net = small().train("running")
    mean = net.state()["1.running_mean"]
    list(fit(net, batch, ts.losses.cross_entropy, SGD(net.parameters(), 0.1), 2))
    assert net.training and not vars(net)["1"].training
    assert np.array_equal(net.state()["1.running_mean"], mean)


@pytest.mark.parametrize("make", [
    lambda p: SGD(p, 0.2, momentum=0.9, nesterov=True), lambda p: AdamW(p, 0.02),
])
def test_one_batch_is_learnt_by_heart(make):
    net = small(dtype="float32")
    images, _ = batch(0, "float32")
    labels = (images[..., 0] > 0).astype(int) + (images[..., 1] > 0.5)
    losses = [r.loss for r in fit(net, lambda step: (images, labels),
                                  ts.losses.dice_cross_entropy, make(net.parameters()), 120)]
    assert losses[-1] < losses[0] / 10
    assert all(p.data.dtype == "float32" for p in net.parameters())


# The moving average


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=40), st.floats(-9, 9),
       st.sampled_from([0, 0.5, 0.9, 0.999]))
@settings(max_examples=40, deadline=None)
def test_the_average_is_the_weighted_sum_of_all_states(states, first, decay):
    """a_n = (Π d_t) x_0 + Σ (1 - d_t) (Π of later d) x_t, d_t = min(decay, (1 + t) / (10 + t))."""
    net = ts.nn.Sequential(ts.nn.BatchNorm(3)).astype("float64")
    arrays = net._arrays()
    for a in arrays.values():
        a[...] = first
    average = Average(net, decay)
    for number in states:
        for scale, a in enumerate(arrays.values(), start=1):
            a[...] = number * scale
        average.update()
    d = [min(decay, (1 + t) / (10 + t)) for t in range(len(states))]
    later = [math.prod(d[t + 1 :]) for t in range(len(states))]
    moved = sum((1 - d[t]) * later[t] * x for t, x in enumerate(states))
    for scale, (name, a) in enumerate(average.arrays.items(), start=1):
        expected = math.prod(d) * first + moved * scale
        np.testing.assert_allclose(a, np.full(3, expected), rtol=1e-12, atol=1e-12, err_msg=name)
    assert average.steps == len(states)


def averaged(seed=0, dtype="float64", decay=0.9):
    net = small(seed, dtype)
    return net, AdamW(net.parameters(), 0.01), Average(net, decay)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_average_goes_on_bit_for_bit(dtype):
    def run(net, optimizer, average, start, stop):
        records = fit(net, lambda s: batch(s, dtype), ts.losses.cross_entropy, optimizer, 6,
                      start=start, average=average)
        for _ in range(start, stop):
            next(records)

    whole, parts = averaged(dtype=dtype), averaged(dtype=dtype)
    run(*whole, 0, 6)
    run(*parts, 0, 2)
    state = parts[2].state()
    assert all(a.dtype == dtype for name, a in state.items() if name != "steps")
    again = averaged(seed=8, dtype=dtype)
    for new, old in zip(again, parts, strict=True):
        new.load_state(old.state())
    run(*again, 2, 6)
    for a, b in zip(again, whole, strict=True):
        assert equal(a.state(), b.state())
    assert int(state["steps"]) == 2  # a copy
    assert not equal(whole[2].arrays, whole[0].state())


def test_the_average_changes_nothing_of_the_training():
    alone, beside = averaged(), averaged()
    list(fit(alone[0], batch, ts.losses.cross_entropy, alone[1], 4))
    list(fit(beside[0], batch, ts.losses.cross_entropy, beside[1], 4, average=beside[2]))
    assert equal(alone[0].state(), beside[0].state()) and beside[2].steps == 4


def test_the_average_stands_in_for_the_network_only_in_the_block():
    net, _, average = averaged()
    for p in net.parameters():
        p.data += 1
    average.update()
    own, arrays = net.state(), net._arrays()
    versions = [p.version for p in net.parameters()]
    with pytest.raises(OSError, match="in the block"), average.applied() as stand_in:
        assert stand_in is net and equal(net.state(), average.arrays)
        assert all(p.version > v for p, v in zip(net.parameters(), versions, strict=True))
        for array in arrays.values():
            array += 5  # whatever is done there
        raise OSError("in the block")
    assert equal(net.state(), own)
    assert all(a is b for a, b in zip(arrays.values(), net._arrays().values(), strict=True))
    assert not equal(net.state(), average.arrays)


def test_the_average_of_what_rests_is_what_rests():
    net = small(dtype="float32")
    average, before = Average(net), net.state()
    for _ in range(50):
        average.update()
    assert equal(average.arrays, before)


def test_integers_are_not_averaged():
    net = small()
    net.table = np.arange(4)
    average = Average(net, 0.5)
    net.table += 3
    average.update()
    assert average.arrays["table"].tolist() == [3, 4, 5, 6]


def test_wrong_averages():
    for decay in (1, -0.1, math.nan):
        with pytest.raises(ValueError, match="decay is .*expected at least 0 and below 1"):
            Average(small(), decay)
    net, _, average = averaged()
    state = average.state()
    with pytest.raises(ValueError, match="this average:(.|\n)*average.0.weight is missing"):
        average.load_state({k: a for k, a in state.items() if "0.weight" not in k})
    with pytest.raises(ValueError, match="average.0.bias has shape"):
        average.load_state({**state, "average.0.bias": np.zeros(6)})
    assert equal(average.state(), state)
    net.astype("float32")
    with pytest.raises(ValueError, match="other arrays than when its average was begun"):
        average.update()
    other = small()
    with pytest.raises(ValueError, match="average is that of another network"):
        next(fit(other, batch, ts.losses.cross_entropy, SGD(other.parameters(), 0.1), 3,
                 average=average))


def test_training_with_an_average_runs_on_other_arrays_than_those_of_numpy(monkeypatch):
    strict = strictarray.library("strict")
    monkeypatch.setitem(sys.modules, "strict", strict)
    found = []
    for library in (np, strict):
        net = ts.to_device(small(dtype="float32"), library)
        average = Average(net, 0.9)
        records = fit(net, lambda s: batch(s, "float32"), ts.losses.dice_cross_entropy,
                      SGD(net.parameters(), 0.1, 0.9), 3, average=average, every=2, clip=0.5,
                      validate=lambda net: {1: float((net.parameters()[0].data ** 2).sum())})
        told = [(r.loss, r.overlap, r.score or 0) for r in records]
        found.append([*zip(*told, strict=True), *map(ts.to_numpy, average.state().values())])
        assert all(type(a) is library.ndarray for a in average.arrays.values())
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


# Batches ahead of their step


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("tinyseg-batch")]


@pytest.mark.parametrize("ahead", [1, 3, 9])
def test_batches_made_ahead_train_alike(ahead):
    found = []
    for number in (0, ahead):
        net = small()
        records = list(fit(net, batch, ts.losses.cross_entropy, AdamW(net.parameters(), 0.01), 5,
                           start=1, ahead=number))
        found.append(([(r.step, r.loss, r.lr) for r in records], net.state()))
    assert found[0][0] == found[1][0] and equal(found[0][1], found[1][1])
    assert not threads()


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_no_more_batches_are_made_than_asked_for(ahead):
    made, end = [], monotonic() + 30
    for i, item in enumerate(prepared(lambda step: made.append(step) or step, range(3, 9), ahead)):
        expected = min(6, 1 + i + ahead)
        while len(made) < expected and monotonic() < end:
            sleep(0.001)
        sleep(0.01)  # for one too many
        assert item == 3 + i and made == list(range(3, 3 + expected))
    with pytest.raises(ValueError, match="ahead is -1"):
        next(prepared(abs, range(3), -1))


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_what_a_batch_raises_is_raised_at_its_step(ahead):
    def draw(step):
        if step == 2:
            raise OSError("case 7 cannot be read")
        return batch(step)

    net, twin = small(), small()
    optimizer = SGD(net.parameters(), 0.1)
    records = fit(net, draw, ts.losses.cross_entropy, optimizer, 6, ahead=ahead)
    assert [next(records).step, next(records).step] == [0, 1]
    with pytest.raises(OSError, match="case 7") as raised:
        next(records)
    assert "in draw" in "".join(traceback.format_tb(raised.value.__traceback__))
    list(fit(twin, batch, ts.losses.cross_entropy, SGD(twin.parameters(), 0.1), 2,
             schedule=lambda step, _: poly(step, 6)))
    assert equal(net.state(), twin.state()) and optimizer.lr == 0.1 and not threads()


@pytest.mark.parametrize("end", [lambda records: records.close(), lambda records: None])
def test_the_thread_ends_with_the_records(end):
    net = small()
    records = fit(net, batch, ts.losses.cross_entropy, SGD(net.parameters(), 0.1), 100, ahead=5)
    next(records)
    assert len(threads()) == 1
    end(records)
    del records
    assert not threads()


@pytest.fixture
def interruptible():
    """Ctrl-C raises, which what a shell runs in the background would ignore."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_ctrl_c_while_waiting_for_a_batch(interruptible):
    waiting = threading.Event()

    def draw(step):
        if step == 1:
            waiting.wait(30)
            sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)
            sleep(0.5)
        return batch(step)

    net = small()
    optimizer = SGD(net.parameters(), 0.1)
    records = fit(net, draw, ts.losses.cross_entropy, optimizer, 3)
    next(records)
    before = net.state()
    with pytest.raises(KeyboardInterrupt):
        waiting.set()
        next(records)
    assert equal(net.state(), before) and optimizer.steps == 1 and not threads()


def test_a_process_ends_in_the_middle_of_a_training():
    script = ("import numpy as np, tinyseg as ts\n"
              "net = ts.nn.Conv(1, 2, (1,), rng=0)\n"
              "x, y = np.ones((1, 3, 1), 'float32'), np.array([[0, 1, 1]])\n"
              "records = ts.train.fit(net, lambda step: (x, y), ts.losses.cross_entropy,\n"
              "                       ts.optim.SGD(net.parameters(), 0.1), 9)\n"
              "print(next(records).step)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_the_wait_for_a_batch_is_told():
    net = small()

    def slow(step):
        sleep(0.05)
        return batch(step)

    for record in fit(net, slow, ts.losses.cross_entropy, SGD(net.parameters(), 0.1), 3, ahead=0):
        assert 0.05 <= record.waited <= record.seconds


def test_a_batch_sees_the_context_of_its_step():
    """Where nothing is recorded, nothing is in the thread."""
    net = small()
    for ahead in (0, 1):
        with ts.no_grad():
            seen = list(prepared(lambda step: net(batch(step)[0]).node, range(2), ahead))
        assert seen == [False, False]


# Validation


def test_validation_sees_the_average_in_evaluation_mode_and_leaves_no_trace():
    net, optimizer, average = averaged()
    net.train("running")
    modes, seen = [m.training for m in net.modules()], []

    def validate(model):
        assert model is net and not any(m.training for m in net.modules())
        assert net(batch(0)[0]).node is False  # nothing is recorded
        assert equal(net.state(), average.arrays)
        seen.append(optimizer.steps)
        net.train()
        return {"organ": 0.5, "tumour": 0.1 * len(seen)}

    records = list(fit(net, batch, ts.losses.cross_entropy, optimizer, 8, average=average,
                       validate=validate, every=3))
    assert seen == [3, 6, 8] and modes == [m.training for m in net.modules()]
    assert [r.step for r in records if r.validation] == [2, 5, 7]
    assert [r.validation for r in records][5] == {"organ": 0.5, "tumour": 0.2}
    assert records[5].score == pytest.approx(0.35) and records[4].score is None
    plain, other, _ = averaged()
    plain.train("running")
    list(fit(plain, batch, ts.losses.cross_entropy, other, 8))
    assert equal(plain.state(), net.state())


def test_a_validation_that_fails_leaves_the_step_as_it_was():
    net, optimizer, average = averaged()
    twin, other, _ = averaged()
    records = fit(net, batch, ts.losses.cross_entropy, optimizer, 4, average=average, every=2,
                  validate=lambda net: 1 / 0)
    next(records)
    with pytest.raises(ZeroDivisionError):
        next(records)
    told = fit(twin, batch, ts.losses.cross_entropy, other, 4)
    next(told), next(told)
    told.close()
    assert equal(net.state(), twin.state()) and optimizer.steps == 2 and optimizer.lr == 0.01
    assert net.training and not threads()


@given(st.lists(st.integers(0, 4), max_size=12), st.integers(1, 4))
def test_stalled_against_a_count(scores, patience):
    best, waited = -1, 0
    for score in scores:
        best, waited = (score, 0) if score > best else (best, waited + 1)
        if waited == patience:
            break
    seen = [stalled(scores[:n], patience) for n in range(len(scores) + 1)]
    assert any(seen) == (waited == patience) and not stalled(scores, None)


def test_training_ends_when_validation_has_not_risen():
    scores = [0.1, 0.3, 0.2, 0.3, 0.1, 0.9]

    def run(start, past):
        net = small()
        optimizer = SGD(net.parameters(), 0.1)
        number = iter(scores[len(past):])
        return list(fit(net, batch, ts.losses.cross_entropy, optimizer, 12, start=start, every=2,
                        validate=lambda net: {1: next(number)}, patience=3, past=past))

    whole = run(0, [])
    assert whole[-1].step == 9 and [r.score for r in whole[1::2]] == scores[:5]
    for done in range(1, 6):  # an interrupted run ends where the whole one does
        rest = run(2 * done, scores[:done])
        assert [r.step for r in rest] == list(range(2 * done, 10))


@pytest.mark.parametrize("options", [
    {"every": 0}, {"patience": 2}, {"patience": 0, "validate": lambda net: {}}])
def test_wrong_validations(options):
    net = small()
    with pytest.raises(ValueError, match="every is .* and patience .*expected numbers from 1"):
        next(fit(net, batch, ts.losses.cross_entropy, SGD(net.parameters(), 0.1), 3, **options))
