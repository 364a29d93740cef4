"""Training: the steps, the schedule, the clip, and that an interrupted run goes on as it would."""

import math

import numpy as np
import pytest

import tinyseg as ts
from tinyseg import checkpoint
from tinyseg.optim import SGD, AdamW, cosine, poly
from tinyseg.train import clip_norm, dice, fit, overlap


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
                  optimizer, 7, start=3)
    before = net.state()
    assert iter(records) is records and seen == [] and equal(net.state(), before)
    for count, record in enumerate(records, start=1):
        assert record.step == 2 + count and seen == list(range(3, 3 + count))
        assert record.lr == 0.1 * poly(record.step, 7) == optimizer.lr
        assert math.isfinite(record.loss) and record.seconds >= 0
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
    assert [cosine(s, 12, warmup=4) for s in (0, 1, 3, 4, 8, 12, 20)] == pytest.approx(
        [1 / 4, 1 / 2, 1, 1, 1 / 2, 0, 0])
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
