"""Optimisers against recurrences on single numbers, states, schedules."""

import math

import numpy as np
import pytest

from tinyseg import Tensor, optim

GRADIENTS = [0.5, -1.25, 3.0, 0.0, 2.0, -0.75]


def run(make, p=2.0, gradients=GRADIENTS, dtype="float64"):
    """The values of one parameter after each step, the numbers of a small array alike."""
    tensor = Tensor(np.full((2, 3), p, dtype), requires_grad=True)
    optimizer, values = make([tensor]), []
    for g in gradients:
        tensor.grad = np.full((2, 3), g, dtype)
        optimizer.step()
        assert (tensor.data == tensor.data[0, 0]).all() and tensor.data.dtype == dtype
        values.append(float(tensor.data[0, 0]))
    return values


@pytest.mark.parametrize("momentum, nesterov, decay", [
    (0, False, 0), (0, False, 0.3), (0.9, False, 0), (0.9, False, 0.3), (0.8, True, 0.1),
])
def test_sgd(momentum, nesterov, decay):
    p, v, expected = 2.0, 0.0, []
    for g in GRADIENTS:
        g += decay * p
        v = momentum * v + g
        p -= 0.1 * (g + momentum * v if nesterov else v)
        expected.append(p)
    ours = run(lambda ps: optim.SGD(ps, 0.1, momentum, nesterov, decay))
    assert ours == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("decay, betas, eps", [(0, (0.9, 0.999), 1e-8), (0.2, (0.7, 0.9), 1e-2)])
def test_adamw(decay, betas, eps):
    p, m, s, expected = 2.0, 0.0, 0.0, []
    for t, g in enumerate(GRADIENTS, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        s = betas[1] * s + (1 - betas[1]) * g * g
        direction = (m / (1 - betas[0] ** t)) / (math.sqrt(s / (1 - betas[1] ** t)) + eps)
        p = p - 0.1 * decay * p - 0.1 * direction
        expected.append(p)
    ours = run(lambda ps: optim.AdamW(ps, 0.1, betas, eps, decay))
    assert ours == pytest.approx(expected, rel=1e-12)


def test_the_defaults():
    adam = optim.AdamW([Tensor(np.ones(2))], 1e-3)
    assert (adam.betas, adam.eps, adam.weight_decay) == ((0.9, 0.999), 1e-8, 0.01)
    sgd = optim.SGD([Tensor(np.ones(2))], 1e-3)
    assert (sgd.momentum, sgd.nesterov, sgd.weight_decay) == (0, False, 0)


MAKERS = [lambda ps: optim.SGD(ps, 0.1, 0.9, True, 0.01), lambda ps: optim.AdamW(ps, 0.05)]


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    return [Tensor(rng.standard_normal(shape).astype("float32"), requires_grad=True)
            for shape in [(2, 3), (4,), ()]]


def walk(tensors, optimizer, steps, seed):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        for p in tensors:
            p.grad = rng.standard_normal(p.shape).astype("float32")
        optimizer.step()


@pytest.mark.parametrize("make", MAKERS)
def test_a_run_goes_on_bit_for_bit_from_its_state(make):
    whole = parameters()
    optimizer = make(whole)
    walk(whole, optimizer, 3, seed=1)
    state, saved = optimizer.state(), [p.data.copy() for p in whole]
    walk(whole, optimizer, 4, seed=2)

    resumed = [Tensor(a, requires_grad=True) for a in saved]
    again = make(resumed)
    again.load_state(state)
    walk(resumed, again, 4, seed=2)
    for a, b in zip(whole, resumed, strict=True):
        assert a.data.dtype == "float32" and (a.data == b.data).all()
    for name, array in again.state().items():
        assert (array == optimizer.state()[name]).all()
        assert isinstance(array, np.ndarray)


@pytest.mark.parametrize("make", MAKERS)
def test_a_state_is_a_copy(make):
    tensors = parameters()
    optimizer = make(tensors)
    walk(tensors, optimizer, 2, seed=1)
    state = optimizer.state()
    kept = {name: array.copy() for name, array in state.items()}
    walk(tensors, optimizer, 2, seed=2)
    assert all((state[name] == kept[name]).all() for name in kept)
    assert int(state["steps"]) == 2


@pytest.mark.parametrize("make", MAKERS)
def test_a_state_that_does_not_fit_is_refused(make):
    optimizer = make(parameters())
    state = optimizer.state()
    first = next(iter(state))
    for missing in (first, "steps"):
        with pytest.raises((KeyError, ValueError)):
            optimizer.load_state({k: v for k, v in state.items() if k != missing})
    for shape in [(3, 2), (5,), (1, 3), (1,), ()]:  # the last three would broadcast
        with pytest.raises(ValueError):
            optimizer.load_state({**state, first: np.ones(shape, "float32")})
    assert all((array == 0).all() for array in optimizer.state().values())


@pytest.mark.parametrize("make", MAKERS)
def test_parameters_move_in_place_and_only_with_a_gradient(make):
    moved, still = parameters()[:2]
    array, before, rest = moved.data, moved.data.copy(), still.data.copy()
    optimizer = make([moved, still])
    moved.grad = np.ones((2, 3), "float32")
    moved.grad.flags.writeable = False
    optimizer.step()
    assert moved.data is array and (array != before).all()
    assert (still.data == rest).all()
    optimizer.zero_grad()
    assert moved.grad is None
    before = array.copy()
    optimizer.step()
    assert (array == before).all()


def test_the_rate_may_change_between_steps():
    p = Tensor(np.array([1.0]), requires_grad=True)
    optimizer = optim.SGD([p], 0.5)
    for rate in (0.5, 0.25, 0.0):
        optimizer.lr, p.grad = rate, np.array([1.0])
        optimizer.step()
    assert p.data.tolist() == [0.25]


def test_wrong_optimisers():
    with pytest.raises(ValueError, match="no parameters"):
        optim.SGD([], 0.1)
    with pytest.raises(ValueError, match="nesterov"):
        optim.SGD(parameters(), 0.1, nesterov=True)


def test_a_generator_of_parameters():
    tensors = parameters()
    assert optim.AdamW((p for p in tensors), 0.1).parameters == tensors


def test_schedules():
    assert [optim.poly(s, 4, 2) for s in range(5)] == [1, 0.5625, 0.25, 0.0625, 0]
    assert optim.poly(3, 10) == pytest.approx(0.7**0.9) and optim.poly(11, 10) == 0
    assert [optim.cosine(s, 8, 4) for s in range(4)] == [0.25, 0.5, 0.75, 1]
    assert [optim.cosine(s, 8, 4) for s in (4, 6, 8, 9)] == pytest.approx([1, 0.5, 0, 0])
    assert optim.cosine(0, 0) == 1
