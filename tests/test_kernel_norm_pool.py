"""The kernels of batch normalisation and max pooling against NumPy in float64."""

import emulator
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyseg.cuda import norm, pool
from tinyseg.windows import Window, reference

SEEDS = st.integers(0, 2**32 - 1)


def few(n):
    return settings(max_examples=n, deadline=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])


def in_every_order(run):
    """The arrays that `run()` returns, as NumPy's; they have the same bits in every order."""
    results, before = [], emulator.order
    try:
        for order in emulator.ORDERS:
            emulator.order = order
            results.append([a if a is None else a.get() for a in run()])
    finally:
        emulator.order = before
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            same = (a is None and b is None) or a.tobytes() == b.tobytes()
            assert same  # by itself: pytest would explain at length how the bytes differ
    return results[0]


def close(ours, expected, scale=None, tolerance=3e-6):
    """Equal but for a few roundings of numbers as large as `scale`, by default the largest here."""
    assert ours.dtype == "float32" and ours.shape == expected.shape
    scale = np.abs(expected).max() if scale is None else scale
    np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance * scale)


# Batch normalisation


def drawn(m, c, seed):
    """x, g, residual (M, C) and mean, scale, gamma, beta (C,), each channel with its own."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, c)) * rng.uniform(0.5, 2, c) + rng.normal(0, 3, c)
    scale = 1 / np.sqrt(x.var(axis=0) + 1e-1)
    made = (x, *rng.standard_normal((2, m, c)), x.mean(axis=0), scale, *rng.normal(0, 1, (2, c)))
    return [a.astype("float32") for a in made]


def expected_adjoint(g, x, y, mean, scale, gamma, train, relu):
    g, x, mean, scale, gamma = (a.astype(float) for a in (g, x, mean, scale, gamma))
    g = np.where(y > 0, g, 0) if relu else g
    xhat = (x - mean) * scale
    dx = g - (g.mean(axis=0) + xhat * (g * xhat).mean(axis=0) if train else 0)
    return gamma * scale * dx, (g * xhat).sum(axis=0), g.sum(axis=0), g


def check_moments(cuda, m, c, seed):
    x = drawn(m, c, seed)[0]
    rows, exact = cuda.asarray(x), x.astype(float)
    mean, variance, total = in_every_order(lambda: (*norm.moments(rows), norm.column_sum(rows)))
    close(mean, exact.mean(axis=0), np.abs(exact).max())
    close(variance, exact.var(axis=0))
    close(total, exact.sum(axis=0), np.abs(exact).sum(axis=0).max(), 1e-6)


def check_normalize(cuda, m, c, seed, residual, relu):
    x, _, other, *vectors = drawn(m, c, seed)
    ours = [cuda.asarray(a) for a in (x, *vectors)] + [cuda.asarray(other) if residual else None]
    y, = in_every_order(lambda: (norm.normalize(*ours, relu=relu),))
    x, other, mean, scale, gamma, beta = (a.astype(float) for a in (x, other, *vectors))
    expected = (x - mean) * scale * gamma + beta + (other if residual else 0)
    close(y, np.maximum(expected, 0) if relu else expected, np.abs(expected).max())


def check_adjoint(cuda, m, c, seed, train, relu, residual):
    x, g, other, *vectors, beta = drawn(m, c, seed)
    g_ours, rows, other, *ours = (cuda.asarray(a) for a in (g, x, other, *vectors, beta))
    y = norm.normalize(rows, *ours, other if residual else None, relu)
    *results, dresidual = in_every_order(lambda: norm.normalize_adjoint(
        g_ours, rows, y, *ours, train=train, relu=relu, residual=residual))
    *expected, passed = expected_adjoint(g, x, y.get(), *vectors, train, relu)
    for a, b in zip(results, expected, strict=True):
        close(a, b, max(1, np.abs(b).max()), 1e-5)
    assert (dresidual == passed).all() if residual else dresidual is None


SHAPES = st.tuples(st.integers(1, 150), st.integers(1, 40) | st.sampled_from([64, 130, 132]))


@given(SHAPES, SEEDS)
@few(8)
def test_moments_and_sums(cuda, shape, seed):
    check_moments(cuda, *shape, seed)


@given(SHAPES, SEEDS, st.booleans(), st.booleans())
@few(10)
def test_normalize(cuda, shape, seed, residual, relu):
    check_normalize(cuda, *shape, seed, residual, relu)


@given(SHAPES, SEEDS, st.booleans(), st.booleans(), st.booleans())
@few(15)
def test_normalize_adjoint(cuda, shape, seed, train, relu, residual):
    check_adjoint(cuda, *shape, seed, train, relu, residual)


@pytest.mark.parametrize("m, c", [(311, 36), (601, 3), (4507, 5)])
def test_several_chunks_of_rows(cuda, m, c):
    assert m > 2 * norm._chunk(m, c, 8) and m % norm._chunk(m, c, 8)
    check_moments(cuda, m, c, 1)
    check_normalize(cuda, m, c, 2, True, True)
    check_adjoint(cuda, m, c, 3, True, True, False)
    check_adjoint(cuda, m, c, 4, False, True, True)


def test_the_adjoint_is_the_derivative(cuda):
    """Along a random direction, by differences in float64 of normalisation, statistics included."""
    m, c, t = 37, 5, 1e-5
    x, g, other, *_, gamma, beta = (a.astype(float) for a in drawn(m, c, 5))

    def f(x, gamma, beta, other):
        z = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5) * gamma + beta + other
        return (g * np.maximum(z, 0)).sum()

    point = [a.astype("float32").astype(float) for a in (x, gamma, beta, other)]
    ours = [cuda.asarray(a, dtype="float32") for a in (*point, g)]
    mean, variance = norm.moments(ours[0])
    scale = 1 / cuda.sqrt(variance + 1e-5)
    y = norm.normalize(ours[0], mean, scale, *ours[1:4], relu=True)
    gradients = norm.normalize_adjoint(ours[4], ours[0], y, mean, scale, *ours[1:3], train=True,
                                       relu=True, residual=True)
    rng = np.random.default_rng(6)
    for i, gradient in enumerate(gradients):
        step = t * rng.standard_normal(point[i].shape)
        ahead, behind = ([a + s * step if i == j else a for j, a in enumerate(point)]
                         for s in (1, -1))
        along = (f(*ahead) - f(*behind)) / 2
        assert along == pytest.approx((gradient.get() * step).sum(), rel=1e-4, abs=1e-4 * t)


@pytest.mark.parametrize("m, c", [(3, 4), (150, 7), (311, 36), (4507, 5)])
@pytest.mark.parametrize("offset, outlier, tolerance", [
    (1e3, 0, 1e-6), (-3e4, 0, 1e-6), (1e3, 1e4, 1e-5), (0, 0, 1e-6)])
def test_the_variance_of_large_numbers(cuda, m, c, offset, outlier, tolerance):
    """As a two-pass float64 variance of the same float32 numbers, with an outlier in row 0 too."""
    x = offset + np.random.default_rng(7).standard_normal((m, c))
    x[0] += outlier
    x = x.astype("float32")
    mean, variance = (a.get() for a in norm.moments(cuda.asarray(x)))
    np.testing.assert_allclose(variance, x.astype(float).var(axis=0), rtol=tolerance)
    np.testing.assert_allclose(mean, x.astype(float).mean(axis=0), rtol=0, atol=2e-7 * abs(x).max())


def test_constant_columns_have_no_variance(cuda):
    x = np.broadcast_to(np.float32([1e-3, 7.7, -3e5, 0, 1 / 3]), (290, 5))
    mean, variance = norm.moments(cuda.asarray(x))
    assert (mean.get() == x[0]).all() and (variance.get() == 0).all()


def test_nan_passes_the_relu(cuda):
    one, x = cuda.ones(4, "float32"), cuda.asarray(np.float32([[np.nan, -1, 0, 2]]))
    y = norm.normalize(x, 0 * one, one, one, 0 * one, relu=True).get()
    np.testing.assert_array_equal(y, np.float32([[np.nan, 0, 0, 2]]))


def test_arrays_that_are_strided_or_not_aligned(cuda):
    x, g, other, *vectors, beta = drawn(30, 8, 8)

    def odd(a):  # the same numbers from an address that is no multiple of 16
        return cuda.asarray(np.concatenate([[0], a.ravel()]).astype("float32"))[1:].reshape(a.shape)

    def turned(a):
        return cuda.asarray(a.T.copy()).T

    def run(big, small):
        rows, more, mine = big(x), big(other), [small(a) for a in (*vectors, beta)]
        y, moving = norm.normalize(rows, *mine, more, True), [small(a) for a in vectors[:2]]
        return [y, *norm.moments(rows), norm.column_sum(rows), *norm.normalize_adjoint(
            big(g), rows, big(y.get()), *mine, train=True, relu=True, residual=True),
            *norm.statistics(rows, *moving, 0.1, 1e-5), *moving]

    straight = [a.get().tobytes() for a in run(cuda.asarray, cuda.asarray)]
    assert straight == [a.get().tobytes() for a in run(odd, odd)]
    assert straight == [a.get().tobytes() for a in run(turned, odd)]


def test_the_residual_gets_the_very_gradient_without_a_relu(cuda):
    x, g, y, *vectors = map(cuda.asarray, drawn(3, 5, 9))
    assert norm.normalize_adjoint(g, x, y, *vectors, train=True, relu=False, residual=True)[3] is g


@pytest.mark.parametrize("c", [1, 3, 16, 50, 64, 96, 2048])
@pytest.mark.parametrize("m", [1, 49, 7_000, 100_000, 4_000_000])
@pytest.mark.parametrize("lanes", [8, 32])
def test_blocks_fill_a_gpu_or_have_enough_to_do(m, c, lanes):
    vector, (wide, tall), count = norm.tiles(c, lanes)
    chunk = norm._chunk(m, c, lanes)
    blocks = -(-m // chunk) * count
    assert c % vector == 0 and count * wide * vector >= c > (count - 1) * wide * vector
    assert wide * tall == norm.THREADS and tall & (tall - 1) == 0
    assert blocks >= 132 or chunk <= norm.ROWS * tall
    assert blocks <= 2 * norm.BLOCKS and -(-m // chunk) < 65536


# Max pooling


@st.composite
def windows(draw):
    """(size, window): one to three axes, all that `Window` knows but edge padding."""
    rank = draw(st.integers(1, 3))
    kernel, stride, dilation = (draw(st.tuples(*[st.integers(1, 3)] * rank)) for _ in range(3))
    padding = draw(st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 2))] * rank))
    size = tuple(draw(st.integers(max(1, d * (k - 1) + 1 - sum(p)), 9 - 2 * rank + d * (k - 1)))
                 for k, d, p in zip(kernel, dilation, padding, strict=True))
    return size, Window.of(kernel, stride, padding, dilation)


def check_pool(cuda, size, window, c, seed, odd=()):
    """Values with many ties, and the `odd` ones here and there."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 3, (2, *size, c)).astype("float32")
    for value in odd:
        x[rng.random(x.shape) < 0.1] = value
    ours = cuda.asarray(x)
    y, winner = in_every_order(lambda: pool.maximum(ours, window))
    expected, taps = reference.maximum(x.astype(float), window)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(winner, taps)
    assert y.dtype == "float32" and winner.dtype == "int16"
    g = rng.standard_normal(y.shape).astype("float32")
    given = cuda.asarray(g), cuda.asarray(winner)
    dx, = in_every_order(lambda: (pool.maximum_adjoint(*given, size, window),))
    close(dx, reference.maximum_adjoint(g.astype(float), winner, size, window), np.abs(g).max())


@given(windows(), st.sampled_from([1, 3, 4, 6, 36]), SEEDS,
       st.sampled_from([(), (np.nan,), (-np.inf,), (np.inf, -np.inf, np.nan)]))
@few(40)
def test_pooling(cuda, case, c, seed, odd):
    check_pool(cuda, *case, c, seed, odd)


def test_pooling_of_networks(cuda):
    check_pool(cuda, (5, 7, 6), Window.of((3, 3, 3), 2, 1), 12, 1)
    check_pool(cuda, (9, 8), Window.of((3, 3), 2, 1), 132, 2)


def test_pooling_that_the_kernels_do_not_do(cuda):
    x = cuda.ones((1, 5, 4), "float32")
    with pytest.raises(ValueError, match="repeats the border"):
        pool.maximum(x, Window.of((3,), 1, 1, 1, "edge"))
    with pytest.raises(ValueError, match="at most three axes"):
        pool.maximum(x.reshape(1, 5, 1, 1, 1, 4), Window.of((1, 1, 1, 1)))


# Would these tests see an error?


def check_blocks_meet(cuda, m, c):
    """No two blocks of a sum do so without order."""
    rows, *vectors = (cuda.asarray(a) for a in drawn(m, c, 1)[::3])  # x, mean, beta
    with emulator.traced() as traces:
        norm.statistics(rows, *vectors, 0.1, 1e-5)
        norm.column_sum(rows)
        for residual in False, True:
            norm.normalize_adjoint(rows, rows, rows, vectors[0], vectors[0], *vectors, train=True,
                                   relu=True, residual=residual)
    assert [trace.races() + trace.unordered() for trace in traces] == [[]] * 6
    assert all(trace.accesses["block"].max() > 1 for trace in traces)


def all_of_norm(cuda):
    check_blocks_meet(cuda, 311, 36)
    check_blocks_meet(cuda, 4507, 5)
    for shape in ((311, 36), (4507, 5), (70, 36), (3, 5)):
        check_moments(cuda, *shape, 1)
        check_normalize(cuda, *shape, 2, False, True)
        check_adjoint(cuda, *shape, 3, True, True, True)


def all_of_pool(cuda):
    for c, odd in ((12, ()), (5, (np.nan,))):
        check_pool(cuda, (5, 7, 6), Window.of((3, 2, 3), 2, 1, (1, 1, 2)), c, 1, odd)
    check_pool(cuda, (5, 8), Window.of((2, 3), (3, 2), 1), 4, 1)


TREE = "    __syncthreads();\n    if (threadIdx.y < half) {\n      "


@pytest.mark.parametrize("file, old, new", [
    ("norm", TREE + "Pack", TREE.replace("    __syncthreads();\n", "") + "Pack"),
    ("norm", TREE + "merge", TREE.replace("    __syncthreads();\n", "") + "merge"),
    ("norm", "sum_over_block(along, slots[1])", "sum_over_block(along, slots[0])"),
    ("norm", "c < channels && left > 0", "left > 0"),
    ("norm", "min((long long)chunk, rows - start)", "(long long)chunk"),
    ("norm", "(left - 1) / int(blockDim.y) + 1", "left / int(blockDim.y)"),
    ("norm", "float weight = b.n", "float weight = a.n"),
    ("norm", "(a.n * weight)", "(b.n * weight)"),
    ("norm", "  if (b.n == 0) return;\n", ""),
    ("norm", "n = min((long long)size, left)", "n = size"),
    ("norm", "squares.of[i] += n * d * d", "squares.of[i] += d * d"),
    ("norm", "sum.of[i] += n * d", "sum.of[i] += d"),
    ("norm", "left -= (long long)blockDim.y * size", "left -= size"),
    ("norm", "share(gridDim.x, channels, gridDim.x, 0)", "share(gridDim.x, channels, chunk, 0)"),
    ("norm", "share(gridDim.x, channels, gridDim.x, 0)",
     "share(gridDim.x, channels, gridDim.x, blockIdx.x)"),
    ("norm", "arrived + blockIdx.y", "arrived"),
    ("norm", "gridDim.x - 1) == gridDim.x - 1", "gridDim.x - 1) == 0"),
    ("norm", "atomicInc(arrived + blockIdx.y, gridDim.x - 1)",
     "atomicAdd(arrived + blockIdx.y, 1)"),
    ("norm", "    __threadfence();\n    last", "    last"),
    ("norm", "gridDim.x - 1;\n    __threadfence();", "gridDim.x - 1;"),
    ("norm", "bool last = false;\n  __syncthreads();", "bool last = false;"),
    ("norm", "return __syncthreads_or(last)", "return last"),
    ("norm", "!(y.of[i] > 0)", "!(y.of[i] >= 0)"),
    ("pool", "index >= points || ", ""),
    ("pool", " || c >= channels", ""),
    ("pool", "seen.of[i] > best.of[i]", "seen.of[i] >= best.of[i]"),
    ("pool", "more || isnan(seen.of[i])", "more"),
    ("pool", "a.count - 1)", "a.count)"),
    ("pool", "k * a.dilation == steps ? k : -1", "k"),
    ("pool", "w < 0 || w >= width.size", "w > width.size"),
])
def test_a_planted_error_is_seen(cuda, file, old, new):
    check = all_of_norm if file == "norm" else all_of_pool
    with emulator.mutated(file, old, new), pytest.raises((AssertionError, emulator.Fault)):
        check(cuda)


@pytest.mark.parametrize("check", [all_of_norm, all_of_pool])
@pytest.mark.parametrize("flush", ["start", "end"])
def test_nothing_is_seen_where_nothing_is_planted(cuda, monkeypatch, check, flush):
    monkeypatch.setattr(emulator, "flush", flush)
    check(cuda)
