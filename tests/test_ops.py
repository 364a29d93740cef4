"""Each operation against naive loops, and its gradients against differences."""

from functools import partial
from math import prod

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyseg import Tensor, ops, windows

leaf = partial(Tensor, requires_grad=True)
check = oracle.check_gradients
few = settings(max_examples=20, deadline=None)


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape)


def apart(*shape, seed=1):
    """Numbers no two of which, nor zero and one of which, are close: safe for kinks."""
    rng = np.random.default_rng(seed)
    return (rng.permutation(prod(shape)) - prod(shape) / 2 + 0.25).reshape(shape)


def close(a, b):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_relu():
    x = apart(3, 4)
    y = ops.relu(Tensor(x)).data
    assert all(v == (u if u > 0 else 0) for u, v in zip(x.flat, y.flat, strict=True))
    check(ops.relu, leaf, x)
    zero = leaf(np.array([0.0, -0.0, 1.0]))
    ops.relu(zero).backward(np.array([3.0, 5.0, 7.0]))
    assert zero.grad.tolist() == [0, 0, 7]


def test_exp_and_log():
    x = normal(3, 4)
    close(ops.log(ops.exp(Tensor(x))).data, x)
    assert ops.exp(Tensor(np.array([1.0]))).data[0] == pytest.approx(2.718281828459045)
    check(ops.exp, leaf, x)
    check(ops.log, leaf, abs(x) + 0.5)


@pytest.mark.parametrize("axis", [-1, 0, 1, -2])
def test_softmax(axis):
    x = normal(3, 4, 5)
    y = ops.softmax(Tensor(x), axis=axis).data
    rows = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
    expected = [oracle.softmax(row.tolist()) for row in rows]
    close(np.moveaxis(y, axis, -1).reshape(rows.shape), np.array(expected))
    close(ops.softmax(Tensor(x + 1e4), axis=axis).data, y)
    check(lambda x: ops.softmax(x, axis=axis), leaf, x)


def test_softmax_of_huge_numbers():
    x = leaf(np.array([[1e38, -1e38, 0], [-3e38, -3e38, -3e38]], "float32"))
    y = ops.softmax(x)
    close(y.data, np.array([[1, 0, 0], [1 / 3] * 3], "float32"))
    y.backward(np.array([[1, 2, 3], [4, 5, 6]], "float32"))
    assert np.isfinite(x.grad).all() and x.grad.dtype == "float32"


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_concatenate(axis):
    parts = [normal(*(n if a == axis % 3 else 2 + a for a in range(3)), seed=n) for n in (1, 4, 2)]
    close(ops.concatenate(*map(Tensor, parts), axis=axis).data, np.concatenate(parts, axis))
    check(lambda *xs: ops.concatenate(*xs, axis=axis), leaf, *parts)
    first, _, last = parts
    ours = leaf(last)
    y = ops.concatenate(Tensor(first), ours, ours, axis=axis)
    y.backward(np.ones(y.shape))
    assert (ours.grad == 2).all()


# Convolution and pooling


@pytest.mark.parametrize("size, kernel, options", [
    ((7,), (3,), {"stride": 2, "padding": ((2, 0),), "padding_mode": "edge"}),
    ((5, 6), (3, 2), {"stride": (2, 1), "padding": (1, (0, 1)), "dilation": (1, 2),
                      "padding_mode": ("zero", "edge")}),
    ((4, 5, 3), (2, 3, 1), {"stride": (1, 2, 1), "padding": ((1, 0), 2, 0), "dilation": (2, 1, 1),
                            "padding_mode": ("edge", "zero", "zero")}),
])
def test_conv(size, kernel, options):
    x, w, b = normal(2, *size, 3), normal(*kernel, 3, 4, seed=2), normal(4, seed=3)
    window = windows.Window.of(kernel, **options)
    expected = oracle.correlate(x, w, kernel=kernel, stride=window.stride, padding=window.padding,
                                dilation=window.dilation, edge=window.edge)
    close(ops.conv(Tensor(x), Tensor(w), **options).data, expected)
    close(ops.conv(Tensor(x), Tensor(w), Tensor(b), **options).data, expected + b)
    check(lambda x, w, b: ops.conv(x, w, b, **options), leaf, x, w, b)
    check(lambda x, w: ops.conv(x, w, **options), leaf, x, w)


def test_conv_refuses_what_does_not_fit():
    x = Tensor(normal(2, 5, 6, 3))
    for shape in [(3, 3, 4, 2), (3, 3, 2), (3, 3, 3, 3, 2)]:
        with pytest.raises(ValueError, match="does not fit kernel"):
            ops.conv(x, Tensor(normal(*shape)))
    with pytest.raises(ValueError, match="no window fits"):
        ops.conv(x, Tensor(normal(3, 7, 3, 2)))
    with pytest.raises(ValueError, match="^stride"):
        ops.conv(x, Tensor(normal(3, 3, 3, 2)), stride=(1, 1, 1))


def test_the_first_layer_never_asks_for_the_gradient_of_its_image(monkeypatch):
    def never(*_):
        raise AssertionError("computed")

    monkeypatch.setattr(windows, "correlate_dx", never)
    w = leaf(normal(3, 3, 2, 4))
    ops.conv(Tensor(normal(1, 5, 6, 2)), w).sum().backward()
    assert w.grad.shape == w.shape
    with pytest.raises(AssertionError, match="computed"):
        ops.conv(leaf(normal(1, 5, 6, 2)), w).sum().backward()


@pytest.mark.parametrize("size, options", [
    ((7,), {"kernel": (3,), "stride": (2,), "padding": ((1, 0),)}),
    ((5, 6), {"kernel": (2, 3), "stride": 1, "padding": (0, 1), "dilation": (2, 1)}),
    ((4, 5, 6), {"kernel": (2, 1, 3)}),
    ((3, 4, 5), {"kernel": (3, 3, 3), "stride": 2, "padding": 1}),
])
def test_max_pool(size, options):
    x = apart(2, *size, 3)
    window = windows.Window.of(options["kernel"], options.get("stride", options["kernel"]),
                               options.get("padding", 0), options.get("dilation", 1))
    expected, _, _ = oracle.max_pool(x, kernel=window.kernel, stride=window.stride,
                                     padding=window.padding, dilation=window.dilation,
                                     edge=window.edge)
    close(ops.max_pool(Tensor(x), **options).data, expected)
    check(lambda x: ops.max_pool(x, **options), leaf, x)


# Normalisation


@given(st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 4),
       st.integers(0, 2**32 - 1))
@few
def test_batch_norm_in_train_mode(batch, size, channels, seed):
    x = normal(batch + 1, *size, channels, seed=seed) * 3 + 7
    gamma, beta = normal(2, channels, seed=seed + 1)
    running = np.full(channels, 5.0), np.full(channels, 2.0)
    y, mean, variance = oracle.batch_norm(x, gamma, beta, 1e-3)
    n = x.size // channels
    mean_after = 0.75 * 5 + 0.25 * mean
    variance_after = 0.75 * 2 + 0.25 * variance * n / (n - 1)  # unbiased
    ours = ops.batch_norm(*map(Tensor, (x, gamma, beta)), running_mean=running[0],
                          running_var=running[1], train=True, momentum=0.25, eps=1e-3)
    close(ours.data, y)
    close(running[0], mean_after)
    close(running[1], variance_after)


def batch_norm(x, gamma, beta, train, **options):
    """With running arrays of its own, so that it can be called again."""
    c = x.shape[-1]
    return ops.batch_norm(x, gamma, beta, running_mean=np.linspace(-1, 1, c), train=train,
                          running_var=np.linspace(0.5, 2, c), **options)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("size", [(5,), (3, 4), (2, 3, 2)])
def test_batch_norm_gradients(size, train):
    check(lambda *t: batch_norm(*t, train, eps=0.1), leaf, normal(2, *size, 3), normal(3, seed=2),
          normal(3, seed=3))


def test_batch_norm_in_eval_mode():
    x, gamma, beta = normal(2, 3, 4, 3), normal(3, seed=2), normal(3, seed=3)
    mean, var = normal(3, seed=4), abs(normal(3, seed=5))
    for array in (x, mean, var):
        array.flags.writeable = False
    y = ops.batch_norm(Tensor(x), Tensor(gamma), Tensor(beta), running_mean=mean, running_var=var,
                       eps=1e-2).data
    for at in np.ndindex(*x.shape):
        c = at[-1]
        assert y[at] == pytest.approx(
            gamma[c] * (x[at] - mean[c]) / (var[c] + 1e-2) ** 0.5 + beta[c], abs=1e-12)


def test_batch_norm_of_constants_and_of_a_single_value():
    one, zero = np.ones(2), np.zeros(2)
    y = batch_norm(Tensor(np.full((2, 3, 2), 1e6)), one, zero, True)
    assert (y.data == 0).all()
    running = np.zeros(2), np.ones(2)
    with pytest.raises(ValueError, match="more than one value"):
        ops.batch_norm(Tensor(normal(1, 1, 1, 2)), one, zero, running_mean=running[0],
                       running_var=running[1], train=True)
    assert (running[0] == 0).all() and (running[1] == 1).all()


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
@pytest.mark.parametrize("train", [True, False])
def test_norms_answer_only_what_is_wanted(wanted, train):
    arrays = normal(2, 3, 4), normal(4, seed=2), normal(4, seed=3)
    for norm in (lambda *t: batch_norm(*t, train), lambda *t: ops.group_norm(*t, groups=2)):
        everything = [leaf(a) for a in arrays]
        some = [Tensor(a, requires_grad=bool(w)) for a, w in zip(arrays, wanted, strict=True)]
        g = normal(2, 3, 4, seed=4)
        norm(*everything).backward(g)
        norm(*some).backward(g)
        for a, b, w in zip(everything, some, wanted, strict=True):
            assert (a.grad == b.grad).all() if w else b.grad is None


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(5,), (3, 4), (2, 3, 2)])
def test_group_norm(size, groups):
    x, gamma, beta = 2 * normal(2, *size, 6) - 3, normal(6, seed=2), normal(6, seed=3)
    close(ops.group_norm(*map(Tensor, (x, gamma, beta)), groups=groups, eps=1e-2).data,
          oracle.group_norm(x, gamma, beta, groups, 1e-2))
    check(lambda *t: ops.group_norm(*t, groups=groups, eps=0.1), leaf, x, gamma, beta)


def test_group_norm_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="6 channels.*4 groups"):
        ops.group_norm(Tensor(normal(2, 3, 6)), np.ones(6), np.zeros(6), groups=4)


# Interpolation

lengths = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=3)


@given(lengths, st.booleans())
@few
def test_upsample(pairs, align_corners):
    before, after = zip(*pairs, strict=True)
    x = normal(2, *before, 3)
    upsample = partial(ops.upsample, size=after, align_corners=align_corners)
    y = upsample(Tensor(x)).data
    close(y, oracle.upsample(x, after, align_corners))
    variable, g = leaf(x), normal(*y.shape, seed=2)
    upsample(variable).backward(g)
    assert (y * g).sum() == pytest.approx((x * variable.grad).sum(), abs=1e-10)  # the adjoint


@pytest.mark.parametrize("align_corners", [True, False])
def test_upsample_gradients_and_fixed_points(align_corners):
    upsample = partial(ops.upsample, align_corners=align_corners)
    check(lambda x: upsample(x, (4, 7, 3)), leaf, normal(2, 2, 3, 5, 2))
    x = normal(2, 3, 4, 2)
    assert (upsample(Tensor(x), (3, 4)).data == x).all()
    close(upsample(Tensor(np.full((1, 3, 4, 1), 2.5)), (7, 2)).data, np.full((1, 7, 2, 1), 2.5))
    line = np.arange(5.0).reshape(1, 5, 1)
    y = upsample(Tensor(line), (9,)).data.ravel()
    close(y, np.arange(9) / 2 if align_corners else
          ((np.arange(9) + 0.5) * 5 / 9 - 0.5).clip(0, 4))
    assert upsample(leaf(x.astype("float32")), (5, 5)).dtype == "float32"
    for size in [(3,), (3, 4, 5)]:
        with pytest.raises(ValueError, match="upsample"):
            upsample(Tensor(x), size)


def test_upsample_to_the_same_size_keeps_the_gradient_apart():
    x, g = leaf(normal(1, 3, 2)), normal(1, 3, 2, seed=2)
    ops.upsample(x, (3,), align_corners=True).backward(g)
    assert (x.grad == g).all() and not np.shares_memory(x.grad, g)


@pytest.mark.parametrize("f", [
    ops.relu, ops.exp, ops.softmax, lambda x: ops.log(x * x + 1), lambda x: ops.concatenate(x, x),
    lambda x: ops.conv(x, Tensor(np.ones((2, 2, 4, 3), "float32")), padding_mode="edge"),
    lambda x: ops.max_pool(x, kernel=(2, 2)), lambda x: ops.upsample(x, (5, 2), align_corners=True),
    lambda x: ops.group_norm(x, np.ones(4, "float32"), np.zeros(4, "float32"), groups=2),
    lambda x: ops.batch_norm(x, np.ones(4, "float32"), np.zeros(4, "float32"), train=True,
                             running_mean=np.zeros(4, "float32"),
                             running_var=np.ones(4, "float32")),
])
def test_float32_stays_and_inputs_are_left_alone(f):
    array = normal(2, 3, 4, 4).astype("float32")
    array.flags.writeable = False
    x = leaf(array)
    y = f(x)
    g = normal(*y.shape, seed=2).astype("float32")
    g.flags.writeable = False
    y.backward(g)
    assert y.dtype == x.grad.dtype == "float32" and x.grad.shape == x.shape
