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
    adam = optim.AdamW([Tensor(np.ones(2), requires_grad=True)], 1e-3)
    assert (adam.betas, adam.eps, adam.weight_decay) == ((0.9, 0.999), 1e-8, 0.01)
    sgd = optim.SGD([Tensor(np.ones(2), requires_grad=True)], 1e-3)
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
    for dtype in ("complex64", "<U3"):
        with pytest.raises(ValueError, match=f"{first} holds"):
            optimizer.load_state({**state, first: state[first].astype(dtype)})
    with pytest.raises(ValueError, match="steps holds float64, expected numbers that int64"):
        optimizer.load_state({**state, first: state[first] + 1, "steps": np.array(3.0)})
    assert all((array == 0).all() for array in optimizer.state().values())


@pytest.mark.parametrize("make", MAKERS)
def test_a_state_of_other_parameters_is_refused(make):
    three, two = make(parameters()), make(parameters()[:2])
    last = list(three.state())[-2]
    assert last.endswith(".2")
    before = two.state()
    walk(three.parameters, three, 2, seed=1)
    with pytest.raises(ValueError, match=f"this optimiser:(.|\n)*{last} is unexpected"):
        two.load_state(three.state())
    assert all((array == before[name]).all() for name, array in two.state().items())
    with pytest.raises(ValueError, match=f"{last} is missing"):
        three.load_state(before)
    other = MAKERS[make is MAKERS[0]](parameters())
    with pytest.raises(ValueError, match=r"mean\.0 is (missing|unexpected)"):
        three.load_state(other.state())
    assert int(three.state()["steps"]) == 2


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


@pytest.mark.parametrize("make", MAKERS)
def test_an_optimiser_takes_different_leaf_tensors(make):
    one, two, three = parameters()
    for wrong, message in [
        (one, "single tensor; expected a list"), ([one, two * 2, three], r"1, of shape \(4,\), was"
         " made by an operation; expected a leaf"), ([one, two, three, two], r"3, of shape \(4,\), "
         "was given before"), ([one, two.data], "1 is a ndarray, expected a Tensor"),
        (enumerate([one]), "0 is a tuple"), ({"one": one}, "0 is a str.*net.parameters"),
        ([Tensor(np.ones(2))], "no parameters that require a gradient"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(wrong)


@pytest.mark.parametrize("make", MAKERS)
def test_a_frozen_parameter_rests(make):
    moving, frozen = parameters()[:2]
    frozen.requires_grad, before = False, frozen.data.copy()
    optimizer = make([moving, frozen])
    (moving * moving).sum().backward()
    optimizer.step()
    assert (frozen.data == before).all() and (moving.version, frozen.version) == (1, 0)


WRONG = [{"lr": -1e-3}, {"lr": float("nan")}, {"lr": math.inf}, {"lr": "1e-3"}, {"lr": None},
         {"lr": True}, {"lr": [0.1]}, {"lr": np.ones(1)}, {"weight_decay": -1},
         {"weight_decay": math.nan}]


@pytest.mark.parametrize("kind, options", [
    *((optim.SGD, options) for options in [*WRONG, {"momentum": 1}, {"momentum": -0.1}]),
    *((optim.AdamW, options) for options in [
        *WRONG, {"eps": -1e-8}, {"eps": "small"}, {"betas": (1, 1)}, {"betas": (0.9, -0.1)},
        {"betas": (0.9,)}, {"betas": 0.9}, {"betas": (0.9, 0.99, 0.999)}, {"betas": "ab"},
        {"betas": (0.9, math.nan)}]),
])
def test_a_setting_out_of_range_is_refused_whenever_it_is_set(kind, options):
    (name, value), = options.items()
    with pytest.raises(ValueError, match=f"^{name} is "):
        kind(parameters(), **{"lr": 0.1, **options})
    optimizer = kind(parameters(), 0.1)
    before = getattr(optimizer, name)
    with pytest.raises(ValueError, match=f"^{name} is "):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) == before


@pytest.mark.parametrize("number", [np.float64, np.float32])
@pytest.mark.parametrize("kind, options", [
    (optim.SGD, {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1}),
    (optim.AdamW, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1})])
def test_numbers_of_numpy_step_as_those_of_python(kind, options, number):
    """A NumPy float64 would turn a float32 step into float64, and round it once less."""
    def moved(change):
        tensors = parameters()
        optimizer = kind(tensors, **{
            name: tuple(map(change, x)) if isinstance(x, tuple) else change(x)
            for name, x in options.items()})
        walk(tensors, optimizer, 3, seed=4)
        assert type(optimizer.lr) is float
        return [p.data for p in tensors]

    for a, b in zip(moved(number), moved(lambda x: float(number(x))), strict=True):
        assert (a == b).all()


@pytest.mark.parametrize("make", MAKERS)
def test_a_step_counts_as_a_change_of_what_it_moves(make):
    tensors = parameters()
    optimizer = make(tensors)
    walk(tensors, optimizer, 3, seed=1)
    optimizer.zero_grad()
    tensors[1].grad = np.ones(4, "float32")
    optimizer.step()
    assert [p.version for p in tensors] == [3, 4, 3]


def grouped(make, tensors, factors):
    """An optimiser of two groups: the parameters at even places, and the others."""
    return make([(tensors[::2], factors[0]), (tensors[1::2], factors[1])])


@pytest.mark.parametrize("factors", [(1, 0.1), (0.5, 3), (0, 1)])
@pytest.mark.parametrize("kind, options", [
    (optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (optim.AdamW, {"weight_decay": 0.1})])
def test_groups_move_as_under_optimisers_of_their_own(kind, options, factors):
    tensors, twins = parameters(), parameters()
    joint = grouped(lambda groups: kind(groups, 0.05, **options), tensors, factors)
    assert joint.factors == [factors[0], factors[0], factors[1]]
    assert joint.parameters == [tensors[0], tensors[2], tensors[1]]
    apart = [kind(twins[i::2], 0.05 * f, **options) for i, f in enumerate(factors)]
    rng = np.random.default_rng(5)
    for scale in (1, 0.5, 0.25, 1):  # of a schedule
        for p, twin in zip(tensors, twins, strict=True):
            p.grad = twin.grad = rng.standard_normal(p.shape).astype("float32")
        joint.lr = 0.05 * scale
        joint.step()
        for optimizer, f in zip(apart, factors, strict=True):
            optimizer.lr = joint.lr * f
            optimizer.step()
    assert all((p.data == twin.data).all() for p, twin in zip(tensors, twins, strict=True))


@pytest.mark.parametrize("make", MAKERS)
def test_a_group_of_factor_one_is_as_if_there_were_none(make):
    """Their states have the same names, and either goes on from the other's."""
    plain, tensors, mixed = parameters(), parameters(), parameters()
    optimizers = [make(plain), make([(tensors, 1)]),
                  make([mixed[0], ((p for p in mixed[1:]), 1.0)])]
    for some, optimizer in zip((plain, tensors, mixed), optimizers, strict=True):
        walk(some, optimizer, 3, seed=1)
    states = [optimizer.state() for optimizer in optimizers]
    assert list(states[0]) == list(states[1]) == list(states[2])
    for p, *others in zip(plain, tensors, mixed, strict=True):
        assert all((p.data == q.data).all() for q in others)
    optimizers[0].load_state(states[1])


@pytest.mark.parametrize("make", MAKERS)
def test_wrong_groups(make):
    one, two, three = parameters()
    for wrong, message in [
        ([([one, two], -1)], "factor is -1; expected a number of at least 0"),
        ([([one], math.nan)], "factor is nan"), ([([one], "fast")], "factor is 'fast'"),
        ([([one], None)], "factor is None"), ([(one, 0.1)], "single tensor; expected a list"),
        ([([one, two], 1), ([three, two], 0.1)], r"3, of shape \(4,\), was given before"),
        ([([one], 1), (["fc.weight"], 0.1)], "1 is a str, expected a Tensor or a group"),
        ([([one], 1), ([two * 2], 0.1)], "1, of shape .* made by an operation"),
        ([[[one], 0.1]], "0 is a list, expected a Tensor or a group, "),
        ([([], 1)], "no parameters that require a gradient"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(wrong)


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
def test_on_a_gpu_a_group_is_one_launch(cuda, monkeypatch, kind):
    tensors, launches = parameters()[:2] + parameters(seed=3)[:1], []
    twins = [Tensor(cuda.asarray(p.data), requires_grad=True) for p in tensors]
    ours, theirs = (grouped(lambda groups: kind(groups, 0.05), some, (1, 0.1))
                    for some in (tensors, twins))

    def update_all(self, lr, ps, *more, launch=kind.update_all):
        launches.append((lr, len(ps)))
        launch(self, lr, ps, *more)

    monkeypatch.setattr(kind, "update_all", update_all)
    walk(tensors, ours, 2, seed=2)
    assert launches == []
    rng = np.random.default_rng(2)
    for _ in range(2):
        for p in twins:
            p.grad = cuda.asarray(rng.standard_normal(p.shape).astype("float32"))
        theirs.step()
    assert launches == 2 * [(0.05, 2), (0.05 * 0.1, 1)]
    for p, twin in zip(tensors, twins, strict=True):
        np.testing.assert_allclose(twin.data.get(), p.data, rtol=1e-5, atol=1e-7)


def test_a_generator_of_parameters():
    tensors = parameters()
    assert optim.AdamW((p for p in tensors), 0.1).parameters == tensors


def test_schedules():
    assert [optim.poly(s, 4, 2) for s in range(5)] == [1, 0.5625, 0.25, 0.0625, 0]
    assert optim.poly(3, 10) == pytest.approx(0.7**0.9) and optim.poly(11, 10) == 0
    assert [optim.cosine(s, 4) for s in (0, 2, 4, 5)] == pytest.approx([1, 0.5, 0, 0])
    assert optim.cosine(0, 0) == 1


def test_a_warm_up_precedes_a_schedule_and_composes():
    rising = optim.warmup(4)
    assert [rising(s, 10) for s in range(4)] == [0.25, 0.5, 0.75, 1]
    assert [rising(s, 10) for s in range(4, 11)] == [optim.poly(s, 6) for s in range(7)]
    assert [optim.warmup(4, optim.cosine)(s, 12) for s in (0, 1, 3, 4, 8, 12, 20)] == (
        pytest.approx([1 / 4, 1 / 2, 1, 1, 1 / 2, 0, 0]))
    for total in (3, 4, 5, 12):
        for step in range(total + 2):
            assert optim.warmup(0)(step, total) == optim.poly(step, total)
            assert optim.warmup(4)(step, total) == (
                (step + 1) / 4 if step < 4 else optim.poly(step - 4, max(1, total - 4)))
    twice = optim.warmup(2, optim.warmup(3, lambda step, total: step / total))
    assert [twice(s, 9) for s in range(9)] == [
        1 / 2, 1, 1 / 3, 2 / 3, 1, 0, 1 / 4, 2 / 4, 3 / 4]
    with pytest.raises(ValueError, match="steps of the warm-up are -1"):
        optim.warmup(-1)
