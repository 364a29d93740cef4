"""The convolution of a doubled grid by its phases: what it is of the grid written out, in all three
readings, and where a layer takes which way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyseg import Tensor, check_gradients, models, nn, no_grad, ops, parallel
from tinyseg.windows import Window


@st.composite
def doublings(draw):
    """A grid, what it becomes, and a window over that which keeps its size where it is doubled."""
    axes = []
    for _ in range(draw(st.integers(1, 3))):
        n, doubled, k = draw(st.integers(1, 5)), draw(st.booleans()), draw(st.integers(1, 5))
        before = draw(st.integers(0, k - 1))
        stride, dilation = (1, 1) if doubled else draw(st.tuples(*[st.integers(1, 2)] * 2))
        after = k - 1 - before if doubled else draw(st.integers(
            max(0, (k - 1) * dilation + 1 - n - before), 9))
        axes.append((n, n * (1 + doubled), k, stride, (before, after), dilation,
                     draw(st.sampled_from(["zero", "edge"]))))
    before, size, kernel, stride, padding, dilation, mode = zip(*axes, strict=True)
    return before, size, Window.of(kernel, stride, padding, dilation, mode)


@settings(max_examples=60, deadline=None)
@given(doublings(), st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3),
       st.integers(0, 99))
def test_phases_are_the_convolution_of_the_doubled_grid(problem, batch, c_in, c_out, threads, seed):
    before, size, window = problem
    parallel.set_threads(threads)
    rng = np.random.default_rng(seed)
    x, w, b = (rng.standard_normal(shape) for shape in (
        (batch, *before, c_in), (*window.kernel, c_in, c_out), (c_out,)))
    assert ops.phases(window, before, size).steps == tuple(
        1 + (n != m) for n, m in zip(before, size, strict=True))

    def phases(x, w, b, relu=False):
        return ops.conv_phases(x, w, b, window=window, size=size, relu=relu)

    written = ops.conv(ops.double(x, size=size), w, b, **window.options).data
    np.testing.assert_allclose(phases(x, w, b).data, written, atol=1e-12)
    assert check_gradients(phases, x, w, b, seed=seed) < 1e-8
    cut = []  # in the convolution, and after it
    for relu in (True, False):
        leaves = [Tensor(a, requires_grad=True) for a in (x, w, b)]
        y = phases(*leaves, relu=relu)
        y = y if relu else ops.relu(y)
        y.backward(np.cos(np.arange(y.data.size)).reshape(y.shape))
        cut.append((y.data, *(leaf.grad for leaf in leaves)))
    for ours, truth in zip(*cut, strict=True):
        np.testing.assert_array_equal(ours, truth)
    single = ops.conv_phases(*(a.astype("float32") for a in (x, w)), window=window, size=size)
    assert single.dtype == "float32"
    np.testing.assert_allclose(single.data + b, written, atol=1e-4)


@pytest.mark.parametrize("size, kernel, options", [
    ((5, 8), (3, 3), {"padding": 1}),  # cut to 2n - 1
    ((6, 8), (3, 3), {"padding": 1, "stride": 2}),
    ((6, 8), (3, 3), {"padding": 2, "dilation": 2}),
    ((6, 8), (3, 3), {"padding": 0}),  # a smaller answer
])
def test_where_phases_do_not_fit_the_grid_is_written(size, kernel, options):
    window = Window.of(kernel, **options)
    assert ops.phases(window, (3, 4), size) is None
    with pytest.raises(ValueError, match="use conv of double"):
        ops.conv_phases(np.ones((1, 3, 4, 5)), np.ones((*kernel, 5, 2)), window=window, size=size)
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype("float32")
    layer = nn.Conv(5, 2, kernel, **options, rng=0)
    with no_grad():
        np.testing.assert_array_equal(layer(x, size).data, layer(ops.double(x, size=size)).data)


def test_a_layer_takes_phases(monkeypatch):
    """No doubled grid is made, and the answer is that of one; ways along depth see it written, and
    kernels that are larger than it."""
    made, double = [], ops.double
    monkeypatch.setattr(ops, "double", lambda *args, **options: (
        made.append(options["size"]), double(*args, **options))[1])
    x = Tensor(np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype("float32"))
    layer = nn.Conv(5, 2, (3, 3), padding=1, rng=0)
    with no_grad():
        answer = layer(x, (6, 8)).data
        assert not made
        np.testing.assert_allclose(answer, layer(double(x, size=(6, 8))).data, atol=1e-5)
        nn.Conv(5, 3, (3, 3), padding=1, rng=0)(x, (6, 8))
        assert len(made) == 1
    for way, written in (("zero", 4), ("depthwise", 5)):
        net = models.resnet_seg("resnet18", rank=3, in_channels=1, classes=2, head="unet",
                                depth=3, structure={"zero": "full"}.get(way, way)).eval()
        made.clear()
        with no_grad():
            net(np.zeros((1, 32, 32, 32, 1), "float32"))
        assert len(made) == written  # four blocks join what the trunk has
