"""Convolution and pooling over arrays: naive loops, adjoint identities, ranks, borders, memory."""

import tracemalloc
from math import prod

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyseg import parallel, windows
from tinyseg.windows import Window, reference
from tinyseg.windows.geometry import blocks

few = settings(max_examples=40, deadline=None)


@st.composite
def cases(draw, ranks=(1, 2, 3), largest=6):
    """(size, Window.of's arguments, seed) where at least one window fits, often none in full."""
    rank = draw(st.sampled_from(ranks))
    side = largest if rank < 3 else min(largest, 4)
    kernel, stride, padding, dilation, mode, size = [], [], [], [], [], []
    for _ in range(rank):
        k, d = draw(st.integers(1, 4 - (rank > 1))), draw(st.integers(1, 3))
        pair = draw(st.tuples(st.integers(0, 5 - rank), st.integers(0, 5 - rank)))
        least = max(1, d * (k - 1) + 1 - sum(pair))
        kernel.append(k)
        dilation.append(d)
        padding.append(pair)
        stride.append(draw(st.integers(1, 3)))
        mode.append(draw(st.sampled_from(["zero", "edge"])))
        size.append(draw(st.integers(least, max(least, side))))
    options = [tuple(v) for v in (kernel, stride, padding, dilation, mode)]
    return tuple(size), options, draw(st.integers(0, 2**32 - 1))


def naive(kernel, stride, padding, dilation, mode):
    return {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation,
            "edge": tuple(m == "edge" for m in mode)}


def arrays(size, options, seed, batch=2, c_in=2, c_out=3):
    rng, window = np.random.default_rng(seed), Window.of(*options)
    shapes = ((batch, *size, c_in), (*options[0], c_in, c_out),
              (batch, *window.positions(size), c_out))
    made = [rng.standard_normal(shape) for shape in shapes]
    for array in made:
        array.flags.writeable = False  # nothing may write into what it is given
    return *made, window


def close(a, b, tolerance=1e-11):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@given(cases())
@few
def test_the_three_forms_equal_naive_loops(case):
    size, options, _ = case
    x, w, y, window = arrays(*case)
    assert window.positions(size) == oracle.positions(size, **naive(*options))
    close(windows.correlate(x, w, window), oracle.correlate(x, w, **naive(*options)))
    close(windows.correlate_dx(y, w, size, window),
          oracle.correlate_dx(y, w, size, **naive(*options)))
    close(windows.correlate_dw(x, y, window), oracle.correlate_dw(x, y, **naive(*options)))


@given(cases(largest=11), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
@few
def test_one_bilinear_form(case, batch, c_in, c_out):
    x, w, y, window = arrays(*case, batch, c_in, c_out)
    forms = [(windows.correlate(x, w, window) * y).sum(),
             (x * windows.correlate_dx(y, w, case[0], window)).sum(),
             (w * windows.correlate_dw(x, y, window)).sum()]
    scale = 1 + (windows.correlate(abs(x), abs(w), window) * abs(y)).sum()
    assert max(forms) - min(forms) < 1e-10 * min(scale, 100)


@given(cases(), st.sampled_from([-1.0, 1.0]))
@few
def test_max_pool_equals_naive_loops(case, sign):
    size, options, seed = case
    rng, window = np.random.default_rng(seed), Window.of(*options)
    x = sign * rng.integers(1, 4, (2, *size, 2)).astype("float64")  # many equals, one sign
    g = rng.standard_normal((2, *window.positions(size), 2))
    y, tap, dx = oracle.max_pool(x, g, **naive(*options))
    ours, winner = windows.maximum(x, window)
    assert (ours == y).all() and winner.shape == tap.shape and (winner == tap).all()
    close(windows.maximum_adjoint(g, winner, size, window), dx)


def test_the_first_of_equals_wins():
    window = Window.of((2, 3), 1)
    y, winner = windows.maximum(np.full((1, 2, 3, 1), 7.0), window)
    dx = windows.maximum_adjoint(np.full((1, 1, 1, 1), 5.0), winner, (2, 3), window)
    assert y.item() == 7 and winner.item() == 0
    assert dx.ravel().tolist() == [5, 0, 0, 0, 0, 0]


def test_padding_never_wins():
    x = -1 - np.random.default_rng(0).random((2, 5, 4, 3))
    window = Window.of((3, 2), 2, ((1, 1), (1, 0)))
    y, winner = windows.maximum(x, window)
    g = np.ones(y.shape)
    assert (y < 0).all()
    assert windows.maximum_adjoint(g, winner, (5, 4), window).sum() == y.size


@pytest.mark.parametrize("edge", ["zero", "edge"])
def test_windows_wholly_inside_padding(edge):
    options = [(2,), (3,), ((7, 8),), (1,), (edge,)]
    x, w, y, window = arrays((2,), options, 0)
    answer = windows.correlate(x, w, window)
    close(answer, oracle.correlate(x, w, **naive(*options)))
    border = x[:, 0] @ w.sum(axis=0) if edge == "edge" else 0 * answer[:, 0]
    close(answer[:, 0], border)
    close(windows.correlate_dx(y, w, (2,), window),
          oracle.correlate_dx(y, w, (2,), **naive(*options)))
    close(windows.correlate_dw(x, y, window), oracle.correlate_dw(x, y, **naive(*options)))


@given(cases(ranks=(1, 2)), st.sampled_from(["float32", "float64"]))
@few
def test_one_more_axis_of_one_point_changes_no_bit(case, dtype):
    size, options, seed = case
    *small, window = arrays(*case)
    x, w, y = (a.astype(dtype) for a in small)
    more = Window.of((1, *options[0]), (1, *options[1]), ((0, 0), *options[2]), (1, *options[3]),
                     ("edge", *options[4]))
    flat = [reference.correlate(x, w, window), reference.correlate_dx(y, w, size, window),
            reference.correlate_dw(x, y, window)]
    deep = [reference.correlate(x[:, None], w[None], more)[:, 0],
            reference.correlate_dx(y[:, None], w[None], (1, *size), more)[:, 0],
            reference.correlate_dw(x[:, None], y[:, None], more)[0]]
    for a, b in zip(flat, deep, strict=True):
        assert a.dtype == dtype and (a == b).all()
    a, winner = reference.maximum(x, window)
    b, deeper = reference.maximum(x[:, None], more)
    assert (a == b[:, 0]).all() and (winner == deeper[:, 0]).all()


@given(cases(), st.sampled_from([1, 100, 1000, 5000]))
@few
def test_the_workspace_changes_nothing(case, workspace):
    size, _, _ = case
    x, w, y, window = arrays(*case)

    def answers():
        best, winner = reference.maximum(x, window)
        return [reference.correlate(x, w, window), reference.correlate_dx(y, w, size, window),
                reference.correlate_dw(x, y, window), best, winner,
                reference.maximum_adjoint(best, winner, size, window)]

    whole = answers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "WORKSPACE", workspace)
        for a, b in zip(answers(), whole, strict=True):
            close(a, b)


@given(cases())
@few
def test_memory_order_changes_nothing(case):
    size, _, _ = case
    x, w, y, window = arrays(*case)
    strided = [np.repeat(np.asfortranarray(a), 2, axis=-1)[..., ::2] for a in (x, w, y)]
    for f in (lambda x, w, y: windows.correlate(x, w, window),
              lambda x, w, y: windows.correlate_dx(y, w, size, window),
              lambda x, w, y: windows.correlate_dw(x, y, window),
              lambda x, w, y: windows.maximum(x, window)[0]):
        close(f(*strided), f(x, w, y))


def peak(f):
    tracemalloc.start()
    try:
        f()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("edge", ["zero", "edge"])
def test_the_workspace_is_bounded(monkeypatch, edge):
    x, w = np.ones((2, 20, 24, 28, 4), "float32"), np.ones((3, 3, 3, 4, 4), "float32")
    window = Window.of((3, 3, 3), 1, 1, 1, edge)
    y, columns = np.ones_like(x), 27 * x.nbytes
    workspace = columns // 40
    monkeypatch.setattr(reference, "WORKSPACE", workspace)
    for f in (lambda: reference.correlate(x, w, window),
              lambda: reference.correlate_dx(y, w, x.shape[1:-1], window),
              lambda: reference.correlate_dw(x, y, window)):
        assert peak(f) < x.nbytes + 3 * workspace < columns / 8
    _, winner = reference.maximum(x, window)

    def there_and_back():
        y, winner = reference.maximum(x, window)
        reference.maximum_adjoint(y, winner, x.shape[1:-1], window)

    assert peak(there_and_back) < 2 * x.nbytes + winner.nbytes + 3 * workspace < columns / 4


@given(st.lists(st.integers(1, 6), max_size=4).map(tuple), st.integers(0, 200))
def test_blocks_partition_their_grid(grid, limit):
    order = np.arange(prod(grid)).reshape(grid)
    at = 0
    for box in blocks(grid, limit):
        points = order[box].ravel()
        assert 1 <= len(points) <= max(1, limit)
        assert (points == np.arange(at, at + len(points))).all()  # contiguous, in memory order
        at += len(points)
    assert at == order.size


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), st.integers(1, 50))
def test_shares_are_about_as_many_as_asked(grid, number):
    """Fewer where rows are rounded up, never twice as many, and as many where rows are even."""
    order = np.arange(prod(grid)).reshape(grid)
    boxes = list(blocks(grid, parallel.share(grid, number)))
    assert (np.concatenate([order[box].ravel() for box in boxes]) == order.ravel()).all()
    assert len(boxes) < 2 * number
    if grid[0] % number == 0:
        assert len(boxes) == number


def test_window_fills_in():
    window = Window.of((3, 2), 2, (1, (0, 1)), 1, "edge")
    assert window == Window((3, 2), (2, 2), ((1, 1), (0, 1)), (1, 1), (True, True))
    assert Window.of(window.kernel, **window.options) == window
    assert window.span == (3, 2) and window.positions((5, 4)) == (3, 2)
    assert Window.of((3,), padding=((2, 1),)).padding == ((2, 1),)


@pytest.mark.parametrize("name, wrong", [
    ("stride", 0), ("stride", -1), ("stride", (1, 2)), ("stride", 1.5), ("stride", (1, 1, 0)),
    ("stride", "1"), ("dilation", 0), ("dilation", (1,)), ("padding", -1), ("padding", (1, 2)),
    ("padding", (0, 0, (1, -1))), ("padding", (0, 0, (1, 1, 1))), ("padding", 0.5),
    ("padding_mode", "reflect"), ("padding_mode", ("zero", "edge")), ("padding_mode", None),
])
def test_wrong_windows(name, wrong):
    with pytest.raises(ValueError, match=f"^{name} is"):
        Window.of((3, 3, 3), **{name: wrong})


def test_wrong_kernels_and_grids():
    with pytest.raises(ValueError, match="kernel"):
        Window.of((3, 0))
    window = Window.of((3, 3), 1, (1, 0), 2)
    for size in [(2, 7), (7, 4), (0, 7)]:
        with pytest.raises(ValueError, match="no window fits"):
            window.positions(size)
    with pytest.raises(ValueError, match="spatial axes"):
        window.positions((7, 7, 7))
    with pytest.raises(ValueError, match="no window fits"):
        Window.of((3, 3), padding=3).positions((0, 5))


def test_a_check_does_not_depend_on_what_was_asked_before():
    Window.of((2, 4), 2)
    with pytest.raises(ValueError, match="stride"):
        Window.of((2, 4), 2.0)
