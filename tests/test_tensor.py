"""Values and gradients of the arithmetic, and what the graph promises about work and memory."""

import contextvars
import gc
import operator
import threading
import weakref
from functools import partial

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import BroadcastableShapes, mutually_broadcastable_shapes

from tinyseg import Tensor, check_gradients, nn, no_grad, ops, optim
from tinyseg.tensor import op

leaf = partial(Tensor, requires_grad=True)
check = partial(check_gradients, tolerance=1e-8)


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
    check(f, x, y)


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


@op
def transposed_wrongly(x):
    return x.T, (lambda g: g.reshape(x.shape),)


@op
def twice_as_steep(x, y):
    return x * y, (lambda g: g * y, lambda g: 2 * g * x)


@op
def greedy(x):
    def pull(g):
        g *= 2
        return g

    return x + x, (pull,)


@pytest.mark.parametrize("f, inputs, says", [
    (transposed_wrongly, 1, r"^input 0, of shape \(3, 4\): along a random direction .* says"),
    (twice_as_steep, 2, r"^input 1, of shape \(3, 4\): .*, 2 times that$"),
    (lambda x, y: x * y.data, 2, r"^input 1, of shape \(3, 4\): no gradient; .*t\.data"),
    (lambda x: Tensor(x.data), 1, "^input 0.*: no gradient"),
])
def test_check_gradients_says_which_input_is_wrong(f, inputs, says):
    arrays = [normal(3, 4, seed=i) for i in range(inputs)]
    before = [a.copy() for a in arrays]
    with pytest.raises(AssertionError, match=says):
        check_gradients(f, *arrays)
    assert all((a == b).all() for a, b in zip(arrays, before, strict=True))


def test_check_gradients_finds_what_a_cotangent_of_ones_lets_pass():
    ones = leaf(normal(3, 4))
    transposed_wrongly(ones).backward(np.ones((4, 3)))
    assert (ones.grad == 1).all()


def test_check_gradients_returns_the_largest_error():
    """A pull-back that is off by a share has that error, over 1 and the sum of the terms."""
    @op
    def off(x, y):
        return x + y, (lambda g: g * (1 + 1e-9), lambda g: g * (1 + 1e-4))

    x, y = normal(5), normal(5, seed=2)
    assert 1e-10 < check_gradients(lambda x: off(x, y), x) < 1e-9
    assert 1e-6 < check_gradients(off, x, y, tolerance=1) < 1e-4
    assert check_gradients(lambda x, y: x * y, x, y) < 1e-11
    with pytest.raises(ValueError, match="read-only"):
        check_gradients(greedy, x)
    with pytest.raises(TypeError, match="returned a float, expected a tensor"):
        check_gradients(lambda x: 1.0, x)


@pytest.mark.parametrize("f", [
    lambda x: x + 2, lambda x: 2 + x, lambda x: x - 2, lambda x: 2 - x, lambda x: 2.5 * x,
    lambda x: x * 2.5, lambda x: x / 3, lambda x: 3 / x, lambda x: -x, lambda x: x**2,
    lambda x: x**0.5, lambda x: x**-1.5, lambda x: x**1, lambda x: x * x + x / x,
])
def test_python_scalars(f):
    x = 0.5 + np.random.default_rng(0).random((3, 4))
    np.testing.assert_allclose(f(Tensor(x)).data, f(x), rtol=1e-15)
    check(f, x)
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


@pytest.mark.parametrize("exponent, slopes", [
    (0, [0, 0, 0]), (0.0, [0, 0, 0]), (1, [1, 1, 1]), (2, [0, 4, -6]), (3, [0, 12, 27]),
    (np.array([0, 1, 2]), [0, 1, -6]),
])
def test_a_zero_power_has_derivative_zero(exponent, slopes):
    """And the others their own, at 0 too: of x = 0, 2 and -3."""
    x = leaf(np.array([0.0, 2, -3]))
    y = x**exponent
    assert (y.data == x.data**exponent).all()
    y.backward(np.ones(3))
    assert x.grad.tolist() == slopes


NUMBERS = [np.float64(2.5), np.sqrt(2), np.mean([1, 2]), np.int64(3), np.array(1.5), np.array(2)]


@pytest.mark.parametrize("f", [
    lambda x, n: x + n, lambda x, n: n - x, lambda x, n: x * n, lambda x, n: n * x,
    lambda x, n: x / n, lambda x, n: n / (x * x + n), lambda x, n: (x * x + 1) ** n,
    lambda x, n: (x * n).sum(axis=np.int64(0)) * x.mean(),
])
def test_a_number_of_numpy_does_not_widen_a_tensor(f):
    for number in NUMBERS:
        x = leaf(normal(3, 4).astype("float32"))
        y = f(x, number)
        y.backward(np.ones(y.shape))
        assert y.dtype == x.grad.dtype == "float32"
        np.testing.assert_array_equal(y.data, f(x, number.item()).data)
        assert f(Tensor(x.data.astype(float)), number).dtype == "float64"


def test_integers_keep_the_types_of_numpy():
    x = np.array([1, 200], "uint8")
    for n in (np.int64(128), np.float32(2)):
        expected = x - n
        y = Tensor(x) - n
        assert y.dtype == expected.dtype and (y.data == expected).all()


def test_an_array_of_float64_is_meant():
    """It widens the result, and the gradient of what was narrow is narrow again."""
    x, a = leaf(normal(3).astype("float32")), normal(2, 3, seed=2)
    y = x * a
    assert y.dtype == "float64"
    y.backward(np.ones((2, 3)))
    assert x.grad.dtype == "float32"
    np.testing.assert_allclose(x.grad, a.sum(axis=0), rtol=1e-6)


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
    check(lambda x, y: x @ y, x, y)


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
        check(f, x)


@pytest.mark.parametrize("axis", [2, -3, (0, 2)])
def test_sum_refuses_an_axis_that_is_not_there(axis):
    with pytest.raises(ValueError):
        Tensor(normal(2, 3)).sum(axis=axis)


def test_axes_may_be_a_list():
    x = normal(2, 3, 4)
    for name in ("sum", "mean", "max"):
        for axis in ([0], [2, 0], [], [-1, 1]):
            ours = getattr(Tensor(x), name)(axis=axis).data
            np.testing.assert_allclose(ours, getattr(x, name)(axis=tuple(axis)), rtol=1e-13)


def test_a_mean_of_no_numbers_is_refused():
    x = leaf(np.zeros((0, 3)))
    for axis in (None, 0, (0, 1)):
        with pytest.raises(ValueError, match=r"no numbers: shape \(0, 3\)"):
            x.mean(axis=axis)
    assert x.mean(axis=1).shape == (0,) and x.sum().item() == 0


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (1, -1, 0)])
def test_maximum_over_axes(axis, keepdims):
    x = np.random.default_rng(1).permutation(24).reshape(2, 3, 4) + 0.25
    for array in (x, -x):
        y = Tensor(array).max(axis=axis, keepdims=keepdims).data
        np.testing.assert_array_equal(y, array.max(axis=axis, keepdims=keepdims))
        check(lambda x: x.max(axis=axis, keepdims=keepdims), array)


def test_equal_maxima_share_the_gradient():
    x = leaf(np.array([[3.0, 3, 1, 3], [2, 0, 2, -1]]))
    x.max(axis=1).backward(np.array([6.0, 5]))
    assert x.grad.tolist() == [[2, 2, 0, 2], [2.5, 0, 2.5, 0]]
    single = leaf(x.data.astype("float32"))
    single.max().backward()
    assert single.grad.dtype == "float32" and single.grad.sum() == pytest.approx(1)
    with pytest.raises(ValueError):
        Tensor(np.zeros((0, 3))).max()


def test_absolute():
    x = normal(3, 4)
    assert (abs(Tensor(x)).data == np.abs(x)).all()
    check(abs, x)
    zero = leaf(np.array([0.0, -0.0, -2]))
    abs(zero).backward(np.array([3.0, 5, 7]))
    assert zero.grad.tolist() == [0, 0, -7]


@pytest.mark.parametrize("f", [
    lambda x: x.reshape(4, 6), lambda x: x.reshape((3, -1)), lambda x: x.reshape(-1),
    lambda x: x.transpose(), lambda x: x.transpose(1, 2, 0), lambda x: x.transpose((2, 0, 1)),
    lambda x: x.transpose(-1, 0, 1), lambda x: x.transpose(0, -1, -2),
])
def test_reshape_and_transpose(f):
    x = normal(2, 3, 4)
    np.testing.assert_array_equal(f(Tensor(x)).data, f(x))
    check(f, x)


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
    check(lambda x: x[key], x)
    variable, which = leaf(x), np.arange(24).reshape(4, 3, 2)[key]
    y = variable[key]
    g = normal(*y.shape, seed=5)
    y.backward(g)
    expected = np.zeros(24)
    for number, value in zip(np.ravel(which), np.ravel(g), strict=True):
        expected[number] += value
    np.testing.assert_allclose(variable.grad.ravel(), expected, rtol=1e-13)


@pytest.mark.parametrize("make", [np.array, list])
def test_an_index_is_that_of_the_forward_pass(make):
    x, rows = leaf(normal(3, 2)), make([0, 0])
    y = x[rows, make([1, 0])] if make is list else x[rows]
    rows[0] = rows[1] = 2
    y.sum().backward()
    assert x.grad[0].any() and not x.grad[1:].any()


def test_rows_can_be_walked():
    x = leaf(normal(3, 2))
    assert len(x) == 3 and len(list(x)) == 3
    for i, row in enumerate(x):
        row.sum().backward()
        assert (x.grad[: i + 1] == 1).all() and (x.grad[i + 1 :] == 0).all()
    with pytest.raises(IndexError):
        x[3]
    with pytest.raises(TypeError, match="iteration"):
        list(Tensor(1.0))


def test_an_array_on_the_left():
    x = normal(3, 3)
    a = normal(3, 3, seed=2)
    for f in (lambda x: a + x, lambda x: a - x, lambda x: a * x, lambda x: a / (x * x + 1),
              lambda x: a @ x, lambda x: np.float64(2) * x, lambda x: a[0] @ x):
        y = f(leaf(x))
        assert isinstance(y, Tensor)
        np.testing.assert_allclose(y.data, f(x), rtol=1e-15)
        check(f, x)


def test_making_tensors():
    assert Tensor([[1.0, 2.0]]).shape == (1, 2) and Tensor(3).shape == ()
    x = leaf(normal(2))
    same = Tensor(x.data)
    assert same.data is x.data and not same.requires_grad and x.grad is None
    assert "requires_grad" in repr(x) and "requires_grad" not in repr(same)


def test_only_floats_have_gradients():
    for array in (np.array([1, 2]), np.array(3), np.array([True]), [1, 2], np.uint8([7])):
        with pytest.raises(TypeError, match="floats"):
            leaf(array)
        x = Tensor(array)
        with pytest.raises(TypeError, match="floats"):
            x.requires_grad = True
        assert not x.requires_grad and x.grad is None
    x = Tensor(np.ones(2, "float16"))
    x.requires_grad = True
    (x * 2).sum().backward()
    assert x.grad.dtype == "float16" and (x.grad == 2).all()

    @op
    def rounded(x):
        return np.rint(x).astype(int), (lambda g: g,)

    assert not rounded(leaf(normal(3))).requires_grad  # through integers no gradient comes


def test_tensors_as_arrays_and_numbers():
    x = leaf(normal(2, 3).astype("float32"))
    assert np.asarray(x) is x.data and np.array(x) is not x.data
    assert np.asarray(x, "float64").dtype == "float64"
    assert (np.array([x, x]) == np.array([x.data, x.data])).all()
    same = (x * 1).detach()
    assert not same.requires_grad and same.node is None
    assert x.detach().data is x.data
    for shape in ((), (1,), (1, 1)):
        t = Tensor(np.full(shape, 2.75, "float32"))
        assert t.item() == float(t) == 2.75 and type(t.item()) is float and int(t) == 2
        assert bool(t) and not Tensor(np.zeros(shape))
    for convert in (float, int, bool, Tensor.item):
        with pytest.raises(ValueError):
            convert(x)
    assert Tensor(np.float32(3)).data.flags.writeable  # a scalar becomes an array


def test_numpy_is_told_to_ask_the_array():
    x = leaf(normal(2, 3))
    for f in (np.mean, np.sum, np.max, np.argmax, np.transpose, lambda x: np.stack([x, x])):
        with pytest.raises(TypeError, match=r"np\.\w+ of a tensor .* t\.data"):
            f(x)
    with pytest.raises(TypeError, match="ufunc"):
        np.exp(x)


@pytest.mark.parametrize("name", ["lt", "le", "gt", "ge", "eq", "ne"])
def test_comparisons_are_arrays_of_bool(name):
    compare = getattr(operator, name)
    x, y = np.array([[1.0, 2, 3]]), np.array([[2.0], [3.0]])
    for a, b in ((leaf(x), Tensor(y)), (leaf(x), y), (x, leaf(y)), (leaf(x), 2), (2.0, leaf(x)),
                 (leaf(x), np.float64(2))):
        plain = (t.data if isinstance(t, Tensor) else t for t in (a, b))
        ours, expected = compare(a, b), compare(*plain)
        assert type(ours) is np.ndarray and ours.dtype == bool and (ours == expected).all()


def test_tensors_are_keys_by_identity():
    x, y = leaf(np.ones(2)), leaf(np.ones(2))
    assert len({x, y, x}) == 2 and {x: 1, y: 2}[x] == 1 and (x == y).all()
    z = x * y + x
    z.backward(np.ones(2))
    assert (x.grad == 2).all() and (y.grad == 1).all()


def test_operations_say_what_they_take():
    x = leaf(normal(2, 3))
    for wrong in ([1, 2, 3], (1, 2, 3), "x"):
        for f in (lambda x, w=wrong: x + w, lambda x, w=wrong: w * x):
            with pytest.raises(TypeError, match=f"is a {type(wrong).__name__}; expected a tensor"):
                f(x)

    @op
    def scaled(x, *, by=2):
        return x * by, (lambda g: g * by,)

    with pytest.raises(TypeError, match="scaled: x is a tensor given by name"):
        scaled(x=x)
    with pytest.raises(TypeError, match="scaled: by is a tensor given by name"):
        scaled(x, by=x)
    with pytest.raises(TypeError, match="scaled: an input is a list"):
        scaled([1, 2])
    with pytest.raises(TypeError, match="power returned .* input 1 needs one"):
        abs(x) ** x


# The walk


def test_diamonds_accumulate():
    def f(x):
        a = x * x
        b, c = a * 3, a / 2
        return (b + c) * a + b * c + x

    x = normal(3, 2)
    check(f, x)
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


def test_g_is_taken_in_the_type_of_the_tensor():
    counted = np.arange(1, 7).reshape(2, 3)
    for g in (counted, counted.tolist(), counted.astype(float)):
        x = leaf(normal(2, 3).astype("float32"))
        (x * 2).backward(g)
        assert x.grad.dtype == "float32" and x.grad.ravel().tolist() == [2, 4, 6, 8, 10, 12]


def ones(*shape, dtype=float):
    return np.ones(shape, dtype)


@pytest.mark.parametrize("answer, words", [
    (lambda g: g[0], r"shape \(4,\); expected \(3, 4\)"),
    (lambda g: g[:1], r"shape \(1, 4\); expected \(3, 4\)"),
    (lambda g: g.T, r"shape \(4, 3\); expected \(3, 4\)"),
    (lambda g: ones(2, 5, 4), r"shape \(2, 5, 4\); expected \(3, 4\)"),
    (lambda g: g.sum(), r"shape \(\); expected \(3, 4\)"),
    (lambda g: 1.0, r"is 1\.0; expected an array of floats of shape \(3, 4\)"),
    (lambda g: None, r"is None; expected an array"),
    (lambda g: [g], r"is 1 gradients; expected an array"),
    (lambda g: ones(3, 4, dtype=int), r"is an array of int64 of shape \(3, 4\)"),
    (lambda g: g > 0, r"array of bool"),
])
def test_the_answer_of_a_pull_back_is_checked(answer, words):
    """By position or all together, to a leaf or to the result of another operation."""
    @op
    def apart(x, y):
        return x + y, (lambda g: g, answer)

    @op
    def together(x, y):
        return x + y, lambda g, wanted: (g, answer(g))

    for wrong in (apart, together):
        for inner in (lambda y: y, lambda y: y * 1):
            x, y = leaf(normal(3, 4)), leaf(normal(3, 4))
            with pytest.raises((TypeError, ValueError), match="gradient in input 1.*" + words) as e:
                wrong(x, inner(y)).backward(ones(3, 4))
            assert wrong.__name__ in str(e.value) and y.grad is None


def test_what_broadcasting_repeats_may_be_answered_whole():
    @op
    def product(x, y):
        return x * y, (lambda g: g * y, lambda g: (g * x).sum(axis=0, keepdims=True))

    check(product, normal(3, 4), normal(4))
    check(product, normal(2, 1, 4), normal(3, 1))


@pytest.mark.parametrize("returned, words", [
    (lambda x: x, "wrong returned no pair"),
    (lambda x: (x, (lambda g: g), 0), "wrong returned no pair"),
    (lambda x: (x, (lambda g: g)), r"wrong: .* a tuple: \(pull,\)"),
    (lambda x: (x, lambda: x), r"wrong: .* a tuple: \(pull,\)"),
    (lambda x: (x, ()), "wrong returned .* input 0 needs one"),
    (lambda x: (x, (None,)), "wrong returned .* input 0 needs one"),
    (lambda x: (x, (lambda g: g, lambda g: g)), "wrong returned 2 pull-backs for 1 inputs"),
    (lambda x: (x, (x,)), "wrong returned .* input 0 needs one"),
    (lambda x: (x, x), "wrong returned 1 pull-backs for 1 inputs; input 0"),
])
def test_an_operation_returns_a_value_and_its_pull_backs(returned, words):
    @op
    def wrong(x):
        return returned(x)

    with pytest.raises(TypeError, match=words):
        wrong(leaf(normal(1, 4)))


def test_a_joint_pull_back_answers_for_every_input():
    for few in (lambda g: (g,), lambda g: g, lambda g: None):
        @op
        def joint(x, y, few=few):
            return x + y, lambda g, wanted: few(g)

        x, y = leaf(normal(3)), leaf(normal(3))
        with pytest.raises(TypeError, match="joint: its pull-back returned .* each input"):
            joint(x, y).sum().backward()
        assert x.grad is None and y.grad is None


def change(x):
    x.data += 1
    x.version += 1


@pytest.mark.parametrize("f", [
    lambda x, w: x * w, lambda x, w: w @ x, lambda x, w: x / w, lambda x, w: (x * w) * 2,
])
@pytest.mark.parametrize("trained", [True, False])
def test_a_change_between_forward_and_backward_is_noticed(f, trained):
    """Whether the changed tensor is trained or frozen; no gradient has been written by then."""
    x, w = leaf(normal(3, 3)), Tensor(normal(3, 3, seed=2) + 3, requires_grad=trained)
    other = leaf(normal(3))
    for changed in (w, x):
        loss = other.sum() + f(x, w).sum() + (other * 2).sum()
        change(changed)
        with pytest.raises(RuntimeError, match=r"(multiply|matmul|divide): .*\(3, 3\).* forward"):
            loss.backward()
        assert x.grad is None and w.grad is None and other.grad is None


def test_a_change_at_any_other_time_is_fine():
    x, w = Tensor(normal(3)), leaf(normal(3))
    for _ in range(3):  # two passes add up, then a step
        for _ in range(2):
            (x * w).sum().backward()
        assert (w.grad == 2 * x.data).all()
        change(w)
        w.grad = None
        with no_grad():
            assert not (x * w).requires_grad
    first = w * 2
    del first  # never pulled back
    change(w)
    y = (w * w).sum()
    y.backward(ready=change)  # complete when told: nobody reads it again in this walk
    assert w.version == 5


def test_what_an_operation_read_is_not_kept_alive():
    array = normal(3)
    seen = weakref.ref(array)
    gc.disable()
    try:
        w = leaf(normal(3))
        y = w + Tensor(array)  # the sum captures neither
        del array
        assert seen() is None
        y.sum().backward()
        assert (w.grad == 1).all()
    finally:
        gc.enable()


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


def pausing():
    with no_grad():
        yield


def recording():
    return (leaf(normal(1)) * 1).requires_grad


def test_generators_may_leave_no_grad_in_any_order():
    for first, second in ((0, 1), (1, 0)):
        pair = pausing(), pausing()
        for generator in pair:
            next(generator)
            assert not recording()
        pair[first].close()
        assert not recording()
        pair[second].close()
        assert recording()


def test_no_grad_left_from_another_thread_changes_nothing_there():
    generator, seen = pausing(), []
    contextvars.copy_context().run(next, generator)

    def leave():
        generator.close()
        seen.append(recording())
        with no_grad():
            seen.append(recording())

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert seen == [True, False]


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


def test_what_an_operation_made_may_be_told_to_be_a_leaf():
    with no_grad():
        w = Tensor(np.arange(3.0)) * 2
    w.requires_grad = True
    (w * w).sum().backward()
    np.testing.assert_array_equal(w.grad, 2 * w.data)
    net = nn.Sequential()
    net.w = w
    assert net.parameters() == [w] and optim.SGD([w], 0.1).parameters == [w]


def test_a_detached_tensor_shares_the_changes_of_its_array():
    p, q = (Tensor(np.arange(1.0, 4), requires_grad=True) for _ in range(2))
    y = (p.detach() * q).sum()
    p.version += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


def test_so_does_a_view_that_is_not_recorded():
    w, x = Tensor(np.arange(1.0, 4)), Tensor(np.ones(3), requires_grad=True)
    y = (x * w.reshape(3)).sum()
    w.data *= 2
    w.version += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


def test_what_an_operation_made_stays_in_its_graph():
    x = Tensor(np.ones(3), requires_grad=True)
    y = x * 2
    with pytest.raises(ValueError, match="multiply made it; detach"):
        y.requires_grad = False
    y.sum().backward()
    assert (x.grad == 2).all()


def test_sums_of_many_numbers_are_not_percents_off():
    """Float32 added number to number would lose 2 % of two million equal ones."""
    x = Tensor(np.full((128, 128, 128, 2), 0.1, "float32"), requires_grad=True)
    assert abs(x.mean(axis=(0, 1, 2)).data - 0.1).max() < 1e-6 and x.mean().dtype == "float32"
    bias = Tensor(np.zeros(2, "float32"), requires_grad=True)
    y = ops.conv(x[None], np.ones((1, 1, 1, 2, 2), "float32"), bias)
    y.backward(np.full(y.shape, 0.3 / 128**3, "float32"))
    assert abs(bias.grad - 0.3).max() < 1e-4


def test_a_quotient_has_a_gradient_wherever_it_is_finite():
    for a, b, slope in ((0.0, 1e-25, 0.0), (1e30, 1e20, -1e-10)):
        x, y = (Tensor(np.array([number], "float32"), requires_grad=True) for number in (a, b))
        (x / y).backward()
        np.testing.assert_allclose(y.grad, slope, rtol=1e-6)


def test_a_tensor_is_an_index_and_a_number_is_formatted():
    t = Tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
    t[Tensor(np.array([1, 1]))].sum().backward()
    np.testing.assert_array_equal(t.grad, [[0, 0, 0], [2, 2, 2]])
    assert f"{Tensor(2 / 3):.3f}" == "0.667" and f"{t}" == repr(t)


def test_an_operation_may_be_any_callable():
    def scaled(factor, x):
        return x * factor, (None, lambda g: g * factor)

    times = op(partial(scaled, 3.0))
    with pytest.raises(TypeError, match="returned 2 pull-backs for 1 inputs"):
        times(Tensor(np.ones(2), requires_grad=True))
    twice = op(partial(lambda factor, x: (x * factor, (lambda g: g * factor,)), 2.0))
    x = Tensor(np.ones(2), requires_grad=True)
    twice(x).sum().backward()
    np.testing.assert_array_equal(x.grad, [2, 2])


@op
def pair(x, y):
    """x + y, by one pull-back that gives both inputs the same array, made anew."""
    def pull(g, wanted):
        both = 1 * g
        return both, both

    return x + y, pull


@op
def split(x, y):
    """The same, whose answers are views of one array."""
    def pull(g, wanted):
        both = 1 * g
        return both.reshape(g.shape), both[:]

    return x + y, pull


@pytest.mark.parametrize("add", [operator.add, pair, split])
def test_nor_do_those_of_one_pull_back(add):
    """Whatever pull-backs return, what is written into one gradient shows in no other, and none is
    counted twice where paths meet."""
    x, y, weights = leaf(normal(3, 2)), leaf(normal(3, 2, seed=2)), normal(3, 2, seed=3)
    total = add(x, y)
    (weights * (total + add(total, x))).sum().backward()
    assert np.allclose(x.grad, 3 * weights) and np.allclose(y.grad, 2 * weights)
    assert not np.shares_memory(x.grad, y.grad) and not np.shares_memory(x.grad, weights)
    x.grad += 1
    assert np.allclose(y.grad, 2 * weights)


def test_a_gradient_made_for_a_leaf_is_not_copied():
    made = []

    @op
    def twice(x):
        def pull(g):
            made.append(2 * g)
            return made[-1]
        return 2 * x, (pull,)

    x = leaf(normal(4))
    twice(x).backward(np.ones(4))
    assert x.grad is made[0]
