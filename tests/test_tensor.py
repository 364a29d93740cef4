"""Values and gradients of the arithmetic, and what the graph promises about work and memory."""

import gc
import weakref
from functools import partial

import numpy as np
import oracle
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import BroadcastableShapes, mutually_broadcastable_shapes

from tinyseg import Tensor, no_grad
from tinyseg.tensor import op

leaf = partial(Tensor, requires_grad=True)
check = oracle.check_gradients


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape)


shapes = mutually_broadcastable_shapes(num_shapes=2, max_dims=3, min_side=0, max_side=3)
empty = BroadcastableShapes(input_shapes=((0,), (1,)), result_shape=(0,))
few = settings(max_examples=25, deadline=None)
ARITHMETIC = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: x / (y * y + 1),
}


@pytest.mark.parametrize("name", ARITHMETIC)
@given(shapes=shapes)
@example(shapes=empty)
@few
def test_arithmetic_broadcasts_both_ways(name, shapes):
    f, (a, b) = ARITHMETIC[name], shapes.input_shapes
    x, y = normal(*a, seed=2), normal(*b, seed=3)
    np.testing.assert_allclose(f(Tensor(x), Tensor(y)).data, f(x, y), rtol=1e-15)
    check(f, leaf, x, y)


@given(shapes=shapes)
@example(shapes=empty)
@few
def test_gradients_of_repeated_entries_add_up(shapes):
    x, y = (leaf(normal(*shape)) for shape in shapes.input_shapes)
    z = x * y
    g = normal(*z.shape, seed=4)
    z.backward(g)
    expected = np.zeros(x.shape), np.zeros(y.shape)
    for at in np.ndindex(*z.shape):
        i, j = (tuple(0 if n == 1 else p for p, n in zip(at[len(at) - t.ndim :], t.shape,
                                                         strict=True)) for t in (x, y))
        expected[0][i] += g[at] * y.data[j]
        expected[1][j] += g[at] * x.data[i]
    for t, value in zip((x, y), expected, strict=True):
        assert t.grad.shape == t.shape
        np.testing.assert_allclose(t.grad, value, atol=1e-12)


def test_check_gradients_can_fail():
    @op
    def transposed_wrongly(x):
        return x.T, (lambda g: g.reshape(x.shape),)

    x = normal(3, 4)
    with pytest.raises(AssertionError, match="input 0"):
        check(transposed_wrongly, leaf, x)
    ones = leaf(x)
    transposed_wrongly(ones).backward(np.ones((4, 3)))
    assert (ones.grad == 1).all()  # a cotangent of ones would have passed it


@pytest.mark.parametrize("f", [
    lambda x: x + 2, lambda x: 2 + x, lambda x: x - 2, lambda x: 2 - x, lambda x: 2.5 * x,
    lambda x: x * 2.5, lambda x: x / 3, lambda x: 3 / x, lambda x: -x, lambda x: x**2,
    lambda x: x**0.5, lambda x: x**-1.5, lambda x: x**1, lambda x: x * x + x / x,
])
def test_python_scalars(f):
    x = 0.5 + np.random.default_rng(0).random((3, 4))
    np.testing.assert_allclose(f(Tensor(x)).data, f(x), rtol=1e-15)
    check(f, leaf, x)
    single = leaf(x.astype("float32"))
    y = f(single)
    assert y.dtype == "float32"
    y.backward(np.ones((3, 4), "float32"))
    assert single.grad.dtype == "float32"


def test_float32_stays_through_reductions_and_numbers():
    x = leaf(normal(3, 4).astype("float32"))
    y = (x.mean(axis=0) * 0.5 + 1).sum() / 3 + x[1, 2] * 2.0 + x.mean() ** 2
    assert y.dtype == "float32"
    y.backward()
    assert x.grad.dtype == "float32"


@pytest.mark.parametrize("a, b", [
    ((3,), (3,)), ((3,), (3, 4)), ((2, 3), (3,)), ((2, 3), (3, 4)), ((5, 2, 3), (3,)),
    ((3,), (5, 3, 4)), ((5, 2, 3), (3, 4)), ((2, 3), (5, 3, 4)), ((5, 2, 3), (5, 3, 4)),
    ((6, 1, 2, 3), (5, 3, 4)), ((1, 2, 3), (5, 3, 4)), ((5, 2, 3), (6, 1, 3, 4)), ((1, 1), (1, 1)),
])
def test_matmul(a, b):
    x, y = normal(*a, seed=1), normal(*b, seed=2)
    np.testing.assert_allclose((Tensor(x) @ Tensor(y)).data, np.einsum(
        "...ij,...jk->...ik", x[None] if len(a) == 1 else x, y[:, None] if len(b) == 1 else y
    ).reshape((x @ y).shape), rtol=1e-13)
    check(lambda x, y: x @ y, leaf, x, y)


def test_matmul_refuses_numbers_and_misfits():
    with pytest.raises(ValueError, match="matmul"):
        leaf(normal(3)) @ Tensor(np.array(2.0))
    with pytest.raises(ValueError):
        leaf(normal(3, 4)) @ leaf(normal(3, 4))


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 2), (-1, 0), (1,), (), (0, 1, 2)])
def test_sum_and_mean(axis, keepdims):
    x = normal(2, 3, 4)
    for f in (lambda x: x.sum(axis=axis, keepdims=keepdims),
              lambda x: x.mean(axis=axis, keepdims=keepdims)):
        y = f(Tensor(x))
        assert y.shape == f(x).shape
        np.testing.assert_allclose(y.data, f(x), rtol=1e-13)
        check(f, leaf, x)


@pytest.mark.parametrize("axis", [2, -3, (0, 2)])
def test_sum_refuses_an_axis_that_is_not_there(axis):
    with pytest.raises(ValueError):
        Tensor(normal(2, 3)).sum(axis=axis)


@pytest.mark.parametrize("f", [
    lambda x: x.reshape(4, 6), lambda x: x.reshape((3, -1)), lambda x: x.reshape(-1),
    lambda x: x.transpose(), lambda x: x.transpose(1, 2, 0), lambda x: x.transpose((2, 0, 1)),
    lambda x: x.transpose(-1, 0, 1), lambda x: x.transpose(0, -1, -2),
])
def test_reshape_and_transpose(f):
    x = normal(2, 3, 4)
    np.testing.assert_array_equal(f(Tensor(x)).data, f(x))
    check(f, leaf, x)


def test_transpose_refuses_wrong_axes():
    for axes in [(0, 1), (0, 0, 1), (0, 1, 3)]:
        with pytest.raises(ValueError):
            Tensor(normal(2, 3, 4)).transpose(*axes)


KEYS = [
    1, -1, slice(1, 3), slice(None, None, -2), (slice(None), 2), (..., 0), (None, 1), (2, 0, 1),
    (slice(1, None), None, slice(0, 0)), np.array([0, 2, 2, 2, 1]), [3, 3, 0],
    (np.array([0, 0, 3]), np.array([1, 1, 2])), (slice(None), np.array([[0, 1], [1, 1]])),
    (np.array([1, 1]), slice(None), np.array([0, 1])), np.arange(24).reshape(4, 3, 2) % 5 == 0,
    np.array([True, False, True, True]), (slice(None), np.array([True, False, True])),
    np.zeros((4, 3, 2), bool), np.int64(2), (np.array([-1, 3]), 0),
]


@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
def test_indexing(key):
    x = normal(4, 3, 2)
    np.testing.assert_array_equal(Tensor(x)[key].data, x[key])
    check(lambda x: x[key], leaf, x)
    variable, which = leaf(x), np.arange(24).reshape(4, 3, 2)[key]
    y = variable[key]
    g = normal(*y.shape, seed=5)
    y.backward(g)
    expected = np.zeros(24)
    for number, value in zip(np.ravel(which), np.ravel(g), strict=True):
        expected[number] += value
    np.testing.assert_allclose(variable.grad.ravel(), expected, rtol=1e-13)


def test_rows_can_be_walked():
    x = leaf(normal(3, 2))
    assert len(x) == 3 and len(list(x)) == 3
    with pytest.raises(IndexError):
        x[3]


def test_an_array_on_the_left():
    x = normal(3, 3)
    a = normal(3, 3, seed=2)
    for f in (lambda x: a + x, lambda x: a - x, lambda x: a * x, lambda x: a / (x * x + 1),
              lambda x: a @ x, lambda x: np.float64(2) * x, lambda x: a[0] @ x):
        y = f(leaf(x))
        assert isinstance(y, Tensor)
        np.testing.assert_allclose(y.data, f(x), rtol=1e-15)
        check(f, leaf, x)


def test_making_tensors():
    assert Tensor([[1.0, 2.0]]).shape == (1, 2) and Tensor(3).shape == ()
    x = leaf(normal(2))
    same = Tensor(x.data)
    assert same.data is x.data and not same.requires_grad and x.grad is None
    assert "requires_grad" in repr(x) and "requires_grad" not in repr(same)


# The walk


def test_diamonds_accumulate():
    def f(x):
        a = x * x
        b, c = a * 3, a / 2
        return (b + c) * a + b * c + x

    x = normal(3, 2)
    check(f, leaf, x)
    variable = leaf(x)
    f(variable).backward(np.ones((3, 2)))
    np.testing.assert_allclose(variable.grad, 20 * x**3 + 1, rtol=1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_a_tensor_used_many_times(shape):
    x = leaf(normal(*shape))
    y = x * 2
    total = x
    for k in range(4):
        total = total + y * (k + 1) + x
    total.backward(np.ones(shape))
    np.testing.assert_allclose(x.grad, np.full(shape, 1 + 4 + 2 * 10.0))


def test_gradients_and_data_are_arrays_even_of_numbers():
    for f, slope in [(lambda x: x * 3, 3), (lambda x: x * x + x, 5)]:
        x = leaf(np.array(2.0))
        for times in (1, 2):  # a second walk adds
            y = f(x)
            y.backward()
            assert isinstance(y.data, np.ndarray) and isinstance(x.grad, np.ndarray)
            assert x.grad == times * slope


def test_gradients_do_not_share_memory():
    a, b, c = leaf(normal(2, 3)), leaf(normal(2, 3)), leaf(normal(3, 2))
    g = normal(2, 3, seed=7)
    (a + b + c.reshape(2, 3) + c.transpose()).backward(g)
    grads = [a.grad, b.grad, c.grad]
    for i, x in enumerate(grads):
        assert not np.shares_memory(x, g) and x.flags.writeable
        assert not any(np.shares_memory(x, y) for y in grads[:i])
    x = leaf(normal(2, 3))
    x.backward(g)
    assert (x.grad == g).all() and not np.shares_memory(x.grad, g)


def test_a_pull_back_that_returns_one_array_twice():
    @op
    def both(x, y):
        def pull(g, wanted):
            g = 2 * g
            return g, g
        return 2 * (x + y), pull

    a, b = leaf(normal(3)), leaf(normal(3))
    g = normal(3, seed=8)
    (both(a, b) + a * 3).backward(g)
    np.testing.assert_allclose(a.grad, 5 * g)
    np.testing.assert_allclose(b.grad, 2 * g)
    assert not np.shares_memory(a.grad, b.grad)


def test_backward_twice_adds_and_none_is_a_fresh_start():
    x = leaf(normal(3))
    (x * 2).sum().backward()
    first = x.grad
    (x * 5).sum().backward()
    assert (x.grad == 7).all() and (first == 2).all()
    x.grad = None
    (x * 3).sum().backward()
    assert (x.grad == 3).all()


def test_a_graph_serves_once():
    x = leaf(normal(3))
    y = x * x
    z = y.sum()
    z.backward()
    with pytest.raises(RuntimeError, match="forward"):
        z.backward()
    with pytest.raises(RuntimeError, match="forward"):
        (y * 2).sum().backward()  # a part of the graph is gone too


def test_backward_refuses():
    x = leaf(normal(2, 3))
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        (x * 2).backward()
    for shape in [(3, 2), (3,), (), (1, 2, 3)]:
        with pytest.raises(ValueError, match="shape"):
            (x * 2).backward(np.ones(shape))
    with pytest.raises(ValueError, match="requires_grad"):
        (Tensor(normal(2)) * 2).sum().backward()
    assert x.grad is None
    (x.sum().reshape(1, 1)).backward()  # a single number in any shape
    assert (x.grad == 1).all()


def test_no_grad():
    x = leaf(normal(3))
    with no_grad():
        with no_grad():
            assert not (x * 2).requires_grad
        assert not (x * 2).requires_grad
        y = x * 2
    assert (x * 2).requires_grad and not y.requires_grad
    with pytest.raises(ValueError):
        y.sum().backward()
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert (x * 2).requires_grad


def test_unwanted_gradients_are_never_computed():
    def never(g):
        raise AssertionError("computed")

    @op
    def f(x, y):
        return x + y, (lambda g: g, never)

    x, y = normal(3), normal(3, seed=2)
    for other in (y, Tensor(y), Tensor(y) * 2):
        variable = leaf(x)
        f(variable, other).sum().backward()
        assert (variable.grad == 1).all()
    with pytest.raises(AssertionError, match="computed"):
        f(leaf(x), leaf(y)).sum().backward()


@pytest.mark.parametrize("wants", [(1, 1, 1), (1, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 1)])
def test_a_joint_pull_back_is_told_what_is_wanted(wants):
    told = []

    @op
    def f(x, y, z):
        def pull(g, wanted):
            told.append([bool(w) for w in wanted] + [False] * (3 - len(wanted)))
            return tuple(k * g if any(wanted[k : k + 1]) else None for k in range(3))
        return 0 * x + y + 2 * z, pull

    inputs = [Tensor(normal(3), requires_grad=bool(w)) for w in wants]
    f(*inputs).sum().backward()
    assert told == [[bool(w) for w in wants]]
    for k, (x, w) in enumerate(zip(inputs, wants, strict=True)):
        assert (x.grad == k).all() if w else x.grad is None


def test_ready_is_called_once_and_early():
    events = []

    @op
    def mark(x, *, name):
        def pull(g):
            events.append(name)
            return g
        return x * 1, (pull,)

    a, b, c, d = leaves = [leaf(normal(3, seed=i)) for i in range(4)]
    names = dict(zip(map(id, leaves), "abcd", strict=True))
    seen = {}

    def ready(x):
        events.append(names[id(x)])
        seen[names[id(x)]] = x.grad.copy()

    h = mark(mark(a * b, name="first") * c + a, name="second") * d
    (h * c).sum().backward(ready=ready)
    assert sorted(e for e in events if len(e) == 1) == list("abcd")
    assert events.index("d") < events.index("second") < events.index("first")
    assert events.index("c") < events.index("first") < events.index("b")
    for x in leaves:
        assert (seen[names[id(x)]] == x.grad).all()


def test_ready_sees_what_earlier_walks_left():
    x, totals = leaf(normal(3)), []
    for _ in range(2):
        (x * 3).sum().backward(ready=lambda x: totals.append(x.grad.sum()))
    assert totals == [9, 18]


# Memory


def test_a_chain_of_twenty_thousand():
    x = y = leaf(np.full(2, 0.5))
    for i in range(20_000):
        y = y * 1.0 if i % 2 else y + 1e-4
    y.sum().backward()
    assert (x.grad == 1).all()
    y = x
    for _ in range(20_000):
        y = y * x
    del y  # no recursion deep enough to hurt
    assert x.grad.shape == (2,)


@op
def remember(x, *, arrays, log, joint):
    """x, with a captured array of its own that can be watched."""
    kept = x + 0
    arrays.append(weakref.ref(kept))

    def pull(g, wanted=None):
        log.append([r() is not None for r in arrays])
        kept.sum()
        return (g,) if joint else g

    return x * 1, pull if joint else (pull,)


@pytest.mark.parametrize("joint", [False, True])
def test_activations_are_freed_while_backward_runs(joint):
    arrays, log, n = [], [], 5
    gc.disable()
    try:
        y = leaf(normal(3))
        for _ in range(n):
            y = remember(y, arrays=arrays, log=log, joint=joint)
        y = y.sum()
        y.backward()
        assert log == [[True] * (n - i) + [False] * i for i in range(n)]
        assert not any(r() is not None for r in arrays)
    finally:
        gc.enable()


def test_a_dropped_graph_leaves_nothing():
    arrays = []
    gc.collect()
    gc.disable()
    try:
        x = leaf(normal(3, 3))
        y = x
        for _ in range(4):
            y = remember(y @ x, arrays=arrays, log=[], joint=False)
            y = (y * y).transpose()[1:, [0, 1, 1]].reshape(3, 2).sum(axis=1) / (y + 3)
        assert all(r() is not None for r in arrays)
        del y
        assert not any(r() is not None for r in arrays)
        assert gc.collect() == 0
        z = (x @ x / 2).mean()
        z.backward()
        del z
        assert gc.collect() == 0
    finally:
        gc.enable()


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
@few
def test_backward_is_linear_in_g(n, m, seed):
    x, a, b = normal(n, m, seed=seed), normal(m, seed=seed + 1), normal(m, seed=seed + 2)

    def gradient(g):
        variable = leaf(x)
        ((variable * variable + 1) ** 0.5 / (variable.mean(axis=0) + 9)).sum(axis=0).backward(g)
        return variable.grad

    np.testing.assert_allclose(gradient(2 * a - 3 * b), 2 * gradient(a) - 3 * gradient(b),
                               atol=1e-12)
