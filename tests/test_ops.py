"""Each operation against naive loops, and its gradients against differences."""

import gc
import math
import weakref
from functools import partial
from itertools import product
from math import prod

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyseg import Tensor, check_gradients, ops, parallel, windows

leaf = partial(Tensor, requires_grad=True)
check = partial(check_gradients, tolerance=1e-8)
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
    check(ops.relu, x)
    zero = leaf(np.array([0.0, -0.0, 1.0]))
    ops.relu(zero).backward(np.array([3.0, 5.0, 7.0]))
    assert zero.grad.tolist() == [0, 0, 7]


def test_exp_and_log():
    x = normal(3, 4)
    close(ops.log(ops.exp(Tensor(x))).data, x)
    assert ops.exp(Tensor(np.array([1.0]))).data[0] == pytest.approx(2.718281828459045)
    check(ops.exp, x)
    check(ops.log, abs(x) + 0.5)


@pytest.mark.parametrize("f, scalar", [
    (ops.sqrt, math.sqrt), (ops.tanh, math.tanh), (ops.sigmoid, lambda v: 1 / (1 + math.exp(-v)))])
def test_functions_of_single_numbers(f, scalar):
    x = abs(normal(3, 4)) + 0.5 if f is ops.sqrt else 3 * normal(3, 4)
    close(f(Tensor(x)).data, np.reshape([scalar(v) for v in x.flat], x.shape))
    check(f, x)


def test_sigmoid_of_large_numbers():
    """sigmoid(-x) = exp(-x) / (1 + exp(-x)) to the last digits, and nothing overflows."""
    x = np.array([-700.0, -40, 0, 40, 1e30, -1e30, np.inf, -np.inf])
    y = ops.sigmoid(Tensor(x)).data
    np.testing.assert_allclose(y, [math.exp(-700), math.exp(-40), 0.5, 1, 1, 0, 1, 0], rtol=1e-14)
    single = leaf(np.float32([-200, 200, 3]))
    ops.sigmoid(single).sum().backward()
    assert np.isfinite(single.grad).all() and np.isnan(ops.sigmoid(Tensor(np.nan)).item())


@pytest.mark.parametrize("a, b", [((3, 4), (3, 4)), ((3, 1), (4,)), ((4,), (2, 3, 4))])
def test_maximum(a, b):
    x, y = apart(*a), apart(*b, seed=2) + 0.3
    expected = [u if u > v else v for u, v in np.broadcast(x, y)]
    close(ops.maximum(Tensor(x), Tensor(y)).data, np.reshape(expected, np.broadcast(x, y).shape))
    check(ops.maximum, x, y)


def test_equals_share_the_gradient_of_their_maximum():
    x, y = leaf(np.array([2.0, 1, 3])), leaf(np.array([2.0, 4, -3]))
    ops.maximum(x, y).backward(np.array([6.0, 5, 7]))
    assert x.grad.tolist() == [3, 0, 7] and y.grad.tolist() == [3, 5, 0]
    for f in (lambda x: ops.maximum(x, 2.5), lambda x: ops.maximum(2.5, x)):
        x = leaf(np.float32([2, 3, 2.5]))
        z = f(x)
        z.sum().backward()
        assert z.data.tolist() == [2.5, 3, 2.5] and x.grad.tolist() == [0, 1, 0.5]
        assert z.dtype == x.grad.dtype == "float32"


def test_where():
    x, y = normal(3, 4), normal(4, seed=2)
    condition = normal(2, 3, 1, seed=3) > 0
    expected = [u if c else v for c, u, v in np.broadcast(condition, x, y)]
    close(ops.where(condition, Tensor(x), Tensor(y)).data, np.reshape(expected, (2, 3, 4)))
    check(lambda x, y: ops.where(condition, x, y), x, y)
    z = leaf(x)
    check(lambda z: ops.where(z > 0.1, z * z, -1.0), apart(3, 4))
    assert ops.where(z > 0, z.detach(), 0).requires_grad is False


def test_what_was_not_chosen_has_no_part_in_the_gradient():
    x = leaf(np.array([4.0, 0.0]))
    with np.errstate(divide="ignore", invalid="ignore"):
        ops.where(x > 0, ops.sqrt(x), x).backward(np.array([1.0, np.nan]))
    assert x.grad[0] == 0.25  # the NaN stays where it came in
    g = np.array([np.inf, 2.0])
    x, y = leaf(np.ones(2)), leaf(np.ones(2))
    ops.where(np.array([True, False]), x, y).backward(g)
    assert x.grad.tolist() == [np.inf, 0] and y.grad.tolist() == [0, 2]


@pytest.mark.parametrize("low, high", [(-3, 4), (None, 2.1), (-2, None), (None, None), (1.2, 1.2)])
def test_clip(low, high):
    x = apart(3, 4)
    expected = [min(max(v, -math.inf if low is None else low), math.inf if high is None else high)
                for v in x.flat]
    close(ops.clip(Tensor(x), low=low, high=high).data, np.reshape(expected, x.shape))
    check(lambda x: ops.clip(x, low=low, high=high), x)


def test_clip_lets_the_gradient_of_its_bounds_through():
    x = leaf(np.array([-3.0, -2, 0, 1, 2]))
    ops.clip(x, low=-2, high=1).backward(np.arange(1.0, 6))
    assert x.grad.tolist() == [0, 2, 3, 4, 0]
    with pytest.raises(ValueError, match="low is 2, above high"):
        ops.clip(x, low=2, high=1)


def test_dropout():
    """What stays is scaled, a share 1 - p stays, and the gradient goes where the value went."""
    x, p = leaf(1 + np.random.default_rng(1).random((200, 300))), 0.3
    y = ops.dropout(x, p=p, rng=np.random.default_rng(2))
    kept = y.data != 0
    close(y.data[kept], x.data[kept] / 0.7)
    assert abs(kept.mean() - 0.7) < 4 * math.sqrt(0.3 * 0.7 / kept.size)
    g = normal(200, 300)
    y.backward(g)
    close(x.grad, g * kept / 0.7)
    rng = np.random.default_rng(2)
    draws = [ops.dropout(x, p=p, rng=rng).data for _ in range(2)]
    assert (draws[0] == y.data).all() and (draws[1] != y.data).any()  # the generator moves on
    check(lambda x: ops.dropout(x, p=0.5, rng=np.random.default_rng(3)), normal(3, 4))
    assert (ops.dropout(x, p=0, rng=rng).data == x.data).all()
    for wrong in (1, -0.1, 1.5):
        with pytest.raises(ValueError, match="probability"):
            ops.dropout(x, p=wrong, rng=rng)
    with pytest.raises(TypeError, match=r"default_rng\(seed\)"):
        ops.dropout(x, p=0.5, rng=0)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_stack(axis):
    parts = [normal(2, 3, seed=n) for n in range(4)]
    y = ops.stack(*map(Tensor, parts), axis=axis).data
    for i, part in enumerate(parts):
        assert (np.moveaxis(y, axis, 0)[i] == part).all()
    check(lambda *xs: ops.stack(*xs, axis=axis), *parts)
    with pytest.raises(ValueError):
        ops.stack(Tensor(normal(2, 3)), Tensor(normal(3, 2)))


@pytest.mark.parametrize("axis", [-1, 0, 1, -2])
def test_softmax(axis):
    x = normal(3, 4, 5)
    y = ops.softmax(Tensor(x), axis=axis).data
    rows = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
    expected = [oracle.softmax(row.tolist()) for row in rows]
    close(np.moveaxis(y, axis, -1).reshape(rows.shape), np.array(expected))
    close(ops.softmax(Tensor(x + 1e4), axis=axis).data, y)
    check(lambda x: ops.softmax(x, axis=axis), x)


def test_softmax_of_huge_numbers():
    x = leaf(np.array([[1e38, -1e38, 0], [-3e38, -3e38, -3e38]], "float32"))
    y = ops.softmax(x)
    close(y.data, np.array([[1, 0, 0], [1 / 3] * 3], "float32"))
    y.backward(np.array([[1, 2, 3], [4, 5, 6]], "float32"))
    assert np.isfinite(x.grad).all() and x.grad.dtype == "float32"


def test_softmax_of_what_is_masked_or_further_apart_than_the_largest_number():
    x = leaf(np.array([[3e38, -3e38, 0], [1, -np.inf, 1]], "float32"))
    y = ops.softmax(x)
    assert y.data.tolist() == [[1, 0, 0], [0.5, 0, 0.5]]
    y.backward(np.array([[1, 2, 3], [4, 5, 6]], "float32"))
    assert x.grad.tolist() == [[0, 0, 0], [-0.5, 0, 0.5]]


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_concatenate(axis):
    parts = [normal(*(n if a == axis % 3 else 2 + a for a in range(3)), seed=n) for n in (1, 4, 2)]
    close(ops.concatenate(*map(Tensor, parts), axis=axis).data, np.concatenate(parts, axis))
    check(lambda *xs: ops.concatenate(*xs, axis=axis), *parts)
    first, _, last = parts
    ours = leaf(last)
    y = ops.concatenate(Tensor(first), ours, ours, axis=axis)
    y.backward(np.ones(y.shape))
    assert (ours.grad == 2).all()


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from([0, -1, None])), min_size=1,
                max_size=3), st.booleans())
@few
def test_double(axes, joined):
    """Position i is position i // 2 where the size changes; the rest is the adjoint's business."""
    before = [n for n, _ in axes]
    after = [n if cut is None else 2 * n + cut for n, cut in axes]
    x, more = normal(2, *before, 3), [normal(2, *after, 4, seed=2)] if joined else []
    y = ops.double(Tensor(x), *map(Tensor, more), size=after).data
    for at in np.ndindex(2, *after):
        source = [i if m == n else i // 2 for i, n, m in zip(at[1:], before, after, strict=True)]
        assert y[at].tolist() == [*x[at[0], *source], *(more[0][at] if joined else [])]
    variables, g = [leaf(a) for a in (x, *more)], normal(*y.shape, seed=3)
    ops.double(*variables, size=after).backward(g)
    products = [(a * v.grad).sum() for a, v in zip((x, *more), variables, strict=True)]
    assert (y * g).sum() == pytest.approx(sum(products), abs=1e-10)
    if joined:
        np.testing.assert_array_equal(variables[1].grad, g[..., 3:])


def test_double_in_slabs(monkeypatch):
    """However the rows are cut, the answer is the same."""
    x, skip, g = normal(2, 7, 5, 3), normal(2, 13, 5, 2), normal(2, 13, 5, 5)

    def answer():
        variables = leaf(x), leaf(skip)
        y = ops.double(*variables, size=(13, 5))
        y.backward(g)
        return [y.data, *(v.grad for v in variables)]

    whole = answer()
    monkeypatch.setattr(ops.parallel, "SLAB", 200)
    for one, other in zip(whole, answer(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("size, skip, message", [
    ((6, 8), None, "size"), ((4, 9), None, "size"), ((8,), None, "size"), ((2, 8), None, "size"),
    ((8, 8), (2, 8, 7, 1), "skip"), ((8, 8), (1, 8, 8, 1), "skip"), ((8, 8), (2, 8, 8), "skip"),
])
def test_double_refuses(size, skip, message):
    more = [] if skip is None else [Tensor(normal(*skip))]
    x = Tensor(normal(2, 4, 4, 3))
    with pytest.raises(ValueError, match=f"double: {message}"):
        ops.double(x, *more, size=size)


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
    check(lambda x, w, b: ops.conv(x, w, b, **options), x, w, b)
    check(lambda x, w: ops.conv(x, w, **options), x, w)
    r = normal(*expected.shape, seed=4)
    for bias in (Tensor(b), None):
        truth = expected + r if bias is None else expected + b + r
        close(ops.conv(Tensor(x), Tensor(w), bias, Tensor(r), **options).data, truth)
        close(ops.conv(Tensor(x), Tensor(w), bias, Tensor(r), relu=True, **options).data,
              np.maximum(truth, 0))
    check(lambda x, w, b, r: ops.conv(x, w, b, r, relu=True, **options), x, w, b, r)
    check(lambda x, w, r: ops.conv(x, w, None, r, **options), x, w, r)


def test_conv_refuses_what_does_not_fit():
    x = Tensor(normal(2, 5, 6, 3))
    for shape in [(3, 3, 4, 2), (3, 3, 2), (3, 3, 3, 3, 2)]:
        with pytest.raises(ValueError, match="does not fit kernel"):
            ops.conv(x, Tensor(normal(*shape)))
    for bias in Tensor(normal(3)), 1.0:
        with pytest.raises(ValueError, match=r"and bias; .*\(C_out,\)"):
            ops.conv(x, Tensor(normal(3, 3, 3, 2)), bias)
    for residual, told in (Tensor(normal(2, 3, 4)), r"\(2, 3, 4\)"), (1.5, "1.5"):
        with pytest.raises(ValueError, match=f"residual {told} does not fit the output; expected "
                                             r"its shape \(2, 3, 4, 2\)"):
            ops.conv(x, Tensor(normal(3, 3, 3, 2)), None, residual)
    with pytest.raises(ValueError, match="no window fits"):
        ops.conv(x, Tensor(normal(3, 7, 3, 2)))
    with pytest.raises(ValueError, match="^stride"):
        ops.conv(x, Tensor(normal(3, 3, 3, 2)), stride=(1, 1, 1))
    for f in (lambda x: ops.conv(x, Tensor(normal(3, 3, 3, 2))), partial(ops.max_pool, kernel=2)):
        with pytest.raises(ValueError, match=r"grid \(0, 5, 6\).* empty"):
            f(Tensor(normal(0, 5, 6, 3)))


@pytest.mark.parametrize("doubled", [False, True])
def test_a_convolution_keeps_what_its_gradients_need(doubled):
    """A frozen kernel's input is free, and an answer that was not cut."""
    x, w = leaf(normal(1, 4, 6, 2)), Tensor(normal(3, 3, 2, 5))
    h = x + 1.0
    gone, window = [weakref.ref(h.data)], windows.Window.of((3, 3), padding=1)
    y = (ops.conv_phases(h, w, window=window, size=(8, 12)) if doubled else
         ops.conv(h, w, **window.options))
    gone += [weakref.ref(y.data)]
    z = y + 0.0
    del h, y
    gc.collect()
    assert [ref() is None for ref in gone] == [not doubled, True]  # phases have one pull-back
    z.sum().backward()
    assert x.grad.shape == x.shape


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
    check(lambda x: ops.max_pool(x, **options), x)


def test_max_pool_pads_no_whole_numbers():
    x = np.array([3, 1, 4], "uint8").reshape(1, 3, 1)
    assert ops.max_pool(x, kernel=2, stride=1).data.ravel().tolist() == [3, 4]
    with pytest.raises(ValueError, match="found uint8 with padding 1, which is minus infinity"):
        ops.max_pool(x, kernel=2, padding=1)


def padded(x, padding, edge):
    """(N, *S, C) extended, number by number."""
    y = np.zeros((len(x), *(n + sum(p) for n, p in zip(x.shape[1:-1], padding, strict=True)),
                  x.shape[-1]))
    for at in np.ndindex(*y.shape[1:-1]):
        point = [i - before for i, (before, _) in zip(at, padding, strict=True)]
        point = [min(max(i, 0), n - 1) if e else i
                 for i, n, e in zip(point, x.shape[1:-1], edge, strict=True)]
        if all(0 <= i < n for i, n in zip(point, x.shape[1:-1], strict=True)):
            y[(slice(None), *at)] = x[(slice(None), *point)]
    return y


@pytest.mark.parametrize("size, padding, mode", [
    ((4,), ((2, 1),), "zero"), ((3, 4), ((0, 2), (1, 0)), ("edge", "zero")),
    ((2, 3, 4), ((1, 2), (0, 0), (3, 1)), "edge"), ((3, 2), 1, "edge"), ((2, 2), 0, "zero"),
])
def test_pad(size, padding, mode):
    x = normal(2, *size, 3)
    pairs = ((padding, padding),) * len(size) if isinstance(padding, int) else padding
    modes = (mode,) * len(size) if isinstance(mode, str) else mode
    pad = partial(ops.pad, padding=padding, padding_mode=mode)
    close(pad(Tensor(x)).data, padded(x, pairs, [m == "edge" for m in modes]))
    check(pad, x)
    with pytest.raises(ValueError, match="padding"):
        ops.pad(Tensor(x), padding=(1,) * (len(size) + 1))


@pytest.mark.parametrize("size, options", [
    ((7,), {"kernel": (3,), "stride": (2,), "padding": ((1, 0),)}),
    ((5, 6), {"kernel": (2, 3), "stride": 1, "padding": (0, 1), "dilation": (2, 1)}),
    ((4, 5, 6), {"kernel": (2, 1, 3)}), ((4, 6), {"kernel": 2}),
])
def test_avg_pool(size, options):
    x = normal(2, *size, 3)
    kernel = options["kernel"]
    kernel = (kernel,) * len(size) if isinstance(kernel, int) else kernel
    window = windows.Window.of(kernel, options.get("stride", kernel), options.get("padding", 0),
                               options.get("dilation", 1))
    expected = np.zeros((2, *window.positions(size), 3))
    for p, _, s in oracle.visits(size, window.kernel, window.stride, window.padding,
                                 window.dilation, window.edge):
        if s is not None:
            for n, c in product(range(2), range(3)):
                expected[(n, *p, c)] += x[(n, *s, c)] / prod(kernel)
    close(ops.avg_pool(Tensor(x), **options).data, expected)
    check(lambda x: ops.avg_pool(x, **options), x)


def test_a_number_is_a_kernel_along_all_axes():
    x = Tensor(normal(2, 4, 6, 8, 3))
    for pool in (ops.max_pool, ops.avg_pool):
        for options in ({}, {"stride": 1, "padding": 1}):
            ours = pool(x, kernel=2, **options).data
            assert (ours == pool(x, kernel=(2, 2, 2), **options).data).all()


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
    check(lambda *t: batch_norm(*t, train, eps=0.1), normal(2, *size, 3), normal(3, seed=2),
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
    check(lambda *t: ops.group_norm(*t, groups=groups, eps=0.1), x, gamma, beta)


def test_group_norm_refuses_groups_that_do_not_divide():
    for groups in (4, 0, -2):
        with pytest.raises(ValueError, match=f"6 channels.*{groups} groups"):
            ops.group_norm(Tensor(normal(2, 3, 6)), np.ones(6), np.zeros(6), groups=groups)


@pytest.mark.parametrize("channels", [1, 3])
def test_norms_refuse_another_number_of_channels(channels):
    x, right, wrong = Tensor(normal(4, 3, 2)), np.ones(2), np.ones(channels)
    for i in range(4):
        arrays = [wrong if i == k else right for k in range(4)]
        with pytest.raises(ValueError, match=rf"\({channels},\) does not fit .*\(4, 3, 2\)"):
            ops.batch_norm(x, *arrays[:2], running_mean=arrays[2], running_var=arrays[3])
        if i < 2:
            with pytest.raises(ValueError, match="group_norm: (gamma|beta) .* does not fit"):
                ops.group_norm(x, *arrays[:2], groups=1)


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
    check(lambda x: upsample(x, (4, 7, 3)), normal(2, 2, 3, 5, 2))
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
    lambda x: ops.sqrt(x * x + 1), ops.tanh, ops.sigmoid, lambda x: ops.maximum(x, 0.5 - x),
    lambda x: ops.where(x > 0, x, 0), lambda x: ops.clip(x, low=-np.float64(1), high=0.5),
    lambda x: ops.dropout(x, p=np.float64(0.5), rng=np.random.default_rng(1)), abs, Tensor.max,
    lambda x: ops.stack(x, x), lambda x: ops.pad(x, padding=1, padding_mode="edge"),
    lambda x: ops.avg_pool(x, kernel=2, padding=1),
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


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32"])
def test_integers_have_the_exponentials_of_floats(dtype):
    x = np.array([[3, 0, 100], [-128, 7, 1]]).astype(dtype)
    for operation in (ops.sigmoid, ops.softmax):
        np.testing.assert_allclose(operation(x).data, operation(x.astype("float64")).data)


def test_the_condition_is_that_of_the_forward_pass():
    x, condition = Tensor(np.arange(3.0), requires_grad=True), np.array([True, False, True])
    y = ops.where(condition, x, 0.0).sum()
    condition[:] = False
    y.backward()
    np.testing.assert_array_equal(x.grad, [1, 0, 1])


@pytest.mark.parametrize("rows, channels, together", [
    (12, 3, 4), (7, 3, 1), (4096, 3, 128), (96, 512, 1), (8, 700, 1), (0, 5, 64)])
def test_rows_of_few_channels_are_taken_together(rows, channels, together):
    """As many as a row of 512 numbers holds, a power of two; what is added to each is the same."""
    rng = np.random.default_rng(0)
    x, b, r = (rng.standard_normal(shape) for shape in (
        (rows, channels), channels, (rows, channels)))
    lines, wide = parallel.widened(x, b)
    assert lines.shape == (rows // together, together * channels) and wide.shape == lines.shape[1:]
    np.testing.assert_array_equal((lines + wide).reshape(x.shape), x + b)
    truth = np.maximum(x + b + r, 0)
    windows.Finish(b, r, relu=True)(x, x)
    np.testing.assert_array_equal(x, truth)
    ends = np.ones((4, 3))
    windows.Finish(np.array([np.inf, -np.inf, -2]), relu=True)(ends, ends)
    assert ends.tolist() == [[np.inf, 0, 0]] * 4
