"""Sliding windows: coverage, weights against naive loops, and nothing left changed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyseg as ts
from tinyseg.infer import gaussian, sliding_window, starts

NORMAL = np.random.default_rng(0).standard_normal
overlaps = st.floats(0, 0.99)


@given(st.integers(1, 40), st.integers(1, 40), overlaps)
def test_starts_cover_the_axis(length, window, overlap):
    length = max(length, window)
    first = starts(length, window, overlap)
    assert first[0] == 0 and first[-1] == length - window and first == sorted(set(first))
    seen = [0] * length
    for start in first:
        for i in range(start, start + window):
            seen[i] += 1
    assert min(seen) == 1 or overlap > 0
    assert min(seen) >= 1
    steps = np.diff(first)
    assert np.all(steps <= max(1, window * (1 - overlap)))  # at least the overlap that was asked
    assert steps.size == 0 or np.ptp(steps) <= 1  # evenly


@pytest.mark.parametrize("length, window, overlap, expected", [
    (10, 10, 0.5, [0]), (20, 10, 0.5, [0, 5, 10]), (20, 10, 0, [0, 10]), (21, 10, 0, [0, 6, 11]),
    (40, 20, 0.8, [0, 4, 8, 12, 16, 20]), (10, 5, 0.4, [0, 2, 5]),
])
def test_starts_by_hand(length, window, overlap, expected):
    found = starts(length, window, overlap)
    assert len(found) == len(expected)
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))


@given(st.tuples(*[st.integers(1, 9)] * 3), st.sampled_from([1 / 8, 1 / 4]))
def test_gaussian(size, sigma):
    weights = gaussian(size, sigma)
    assert weights.shape == size and weights.dtype == np.float32
    expected = np.ones(size)
    for place in np.ndindex(*size):
        for i, n in zip(place, size, strict=True):
            expected[place] *= np.exp(-(((i - (n - 1) / 2) / (sigma * n)) ** 2) / 2)
    np.testing.assert_allclose(weights, np.maximum(expected, expected.max() / 1000), rtol=1e-5)
    np.testing.assert_array_equal(weights, weights[::-1, ::-1, ::-1])


@st.composite
def scans(draw):
    """The size of a volume, and a patch of as many axes or one less."""
    rank = draw(st.integers(1, 3))
    size = draw(st.tuples(*[st.integers(1, 9)] * rank))
    axes = rank if rank == 1 else draw(st.integers(rank - 1, rank))
    return size, draw(st.tuples(*[st.integers(1, 6)] * axes))


@settings(max_examples=150, deadline=None)
@given(scans(), overlaps, st.integers(1, 5))
def test_constant_and_pointwise_models_are_reproduced(scan, overlap, batch):
    size, patch = scan
    shapes = set()

    def model(x):
        shapes.add(x.shape[1:-1])
        assert 1 <= len(x.data) <= batch and x.dtype == "float32"
        first = x.data[..., :1]
        return ts.Tensor(np.concatenate([first**2 - 1, 0 * first + 3.7, x.data], axis=-1))

    volume = NORMAL((*size, 2)).astype("float32")
    logits = sliding_window(model, volume, patch, overlap, batch=batch)
    assert shapes == {patch}  # every window has the size that the network was trained on
    assert logits.shape == (*size, 4) and logits.dtype == np.float32
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[..., 1], 3.7, rtol=1e-6)
    np.testing.assert_allclose(logits[..., 2:], volume, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits[..., 0], volume[..., 0] ** 2 - 1, rtol=1e-5, atol=1e-5)
    labels = sliding_window(model, volume, patch, overlap, batch=batch, labels=True)
    assert labels.shape == size and labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, logits.argmax(-1))


def cumulative(x):
    """A model whose answer depends on where the window is: sums from its first corner."""
    y = x.data
    for axis in range(1, y.ndim - 1):
        y = y.cumsum(axis)
    return ts.Tensor(y)


@pytest.mark.parametrize("size, patch", [
    ((11, 7), (4, 3)), ((9,), (4,)), ((5, 8, 7), (3, 5, 4)), ((3, 9), (5, 4)), ((2, 3), (5, 6)),
    ((4, 7, 6), (5, 4)), ((4, 3, 9), (5, 4)),
])
@pytest.mark.parametrize("overlap", [0, 0.5, 0.7])
@pytest.mark.parametrize("batch", [1, 3])
def test_against_naive_loops(size, patch, overlap, batch):
    """The Gaussian average of the windows' answers, voxel by voxel."""
    volume = NORMAL((*size, 2)).astype("float32")
    window = (1,) * (len(size) - len(patch)) + patch
    missing = [max(p - n, 0) for n, p in zip(size, window, strict=True)]
    padded = np.pad(volume, [(m // 2, m - m // 2) for m in missing] + [(0, 0)], mode="edge")
    weights = gaussian(window)
    total, norm = np.zeros(padded.shape), np.zeros((*padded.shape[:-1], 1))
    corners = [starts(n, w, overlap) for n, w in zip(padded.shape, window, strict=False)]
    for index in np.ndindex(*map(len, corners)):
        corner = [c[i] for c, i in zip(corners, index, strict=True)]
        for place in np.ndindex(*window):
            voxel = tuple(np.add(corner, place))
            below = tuple(slice(c, v + 1) for c, v in zip(corner, voxel, strict=True))
            total[voxel] += weights[place] * padded[below].sum(tuple(range(len(size))))
            norm[voxel] += weights[place]
    inside = tuple(slice(m // 2, m // 2 + n) for n, m in zip(size, missing, strict=True))
    np.testing.assert_allclose(
        sliding_window(cumulative, volume, patch, overlap, batch=batch),
        (total / norm)[inside], rtol=1e-4, atol=1e-5)


def test_a_volume_as_large_as_the_patch_is_one_forward_pass():
    net = small().eval()
    volume = NORMAL((6, 5, 7, 2)).astype("float32")
    np.testing.assert_allclose(sliding_window(net, volume, (6, 5, 7)), net(volume[None]).data[0],
                               rtol=1e-5, atol=1e-6)


def test_slices_are_taken_each_once_and_alone():
    net, seen = small(rank=2).eval(), []

    def counted(x):
        seen.extend(x.data)
        return net(x)

    volume = NORMAL((5, 6, 7, 2)).astype("float32")
    logits = sliding_window(counted, volume, (6, 7), 0.9)
    np.testing.assert_array_equal(seen, volume)
    np.testing.assert_allclose(logits, net(volume).data, rtol=1e-5, atol=1e-6)


def test_progress_and_the_kind_of_volume():
    groups = []

    def progress(windows):
        groups.extend(windows)
        return iter(groups)

    volume = NORMAL((9, 4, 2)).astype("float16")
    logits = sliding_window(lambda x: x, volume, (3, 4), 0, batch=2, progress=progress)
    assert [len(group) for group in groups] == [2, 1]
    np.testing.assert_allclose(logits, volume, rtol=1e-3)
    np.testing.assert_array_equal(
        logits, sliding_window(lambda x: x, volume.astype("float64"), (3, 4), 0))


def small(rank=3):
    rng = np.random.default_rng(4)
    inner = ts.nn.Sequential(ts.nn.BatchNorm(4), ts.nn.ReLU())
    return ts.nn.Sequential(ts.nn.Conv(2, 4, (3,) * rank, padding=1, rng=rng), inner,
                            ts.nn.Conv(4, 3, (1,) * rank, rng=rng))


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_statistics_are_left_as_they_were(fails):
    net = small().train()
    vars(net)["1"].eval()
    before, modes = net.state(), [net.training, *(m.training for _, m in net.named(ts.nn.Module))]
    assert len(set(modes)) == 2
    seen = []

    def progress(windows):
        seen.extend(m.training for _, m in net.named(ts.nn.Module))
        if fails:
            raise KeyboardInterrupt
        return windows

    volume = NORMAL((6, 5, 7, 2)).astype("float32")
    if fails:
        with pytest.raises(KeyboardInterrupt):
            sliding_window(net, volume, (3, 4, 5), progress=progress)
    else:
        logits = sliding_window(net, volume, (3, 4, 5), progress=progress)
        np.testing.assert_array_equal(logits, sliding_window(net.copy().eval(), volume, (3, 4, 5)))
    assert seen and not any(seen)
    assert [net.training, *(m.training for _, m in net.named(ts.nn.Module))] == modes
    assert all(np.array_equal(before[k], a) for k, a in net.state().items())
    assert (net(volume[None]) * 1).requires_grad  # recording is on again
    assert all(p.grad is None for p in net.parameters())


def test_modules_without_parameters():
    volume = NORMAL((6, 5, 2)).astype("float32")
    np.testing.assert_allclose(sliding_window(ts.nn.ReLU(), volume, (3, 4)), volume.clip(0),
                               rtol=1e-5)


@pytest.mark.parametrize("options, message", [
    ({"patch": (3,)}, "patch"), ({"patch": (3, 3, 3, 3)}, "patch"), ({"patch": ()}, "patch"),
    ({"overlap": 1}, "overlap"), ({"overlap": -0.1}, "overlap"), ({"overlap": np.nan}, "overlap"),
    ({"patch": (3, 0, 2)}, "patch"), ({"patch": (3, -1, 2)}, "patch"), ({"batch": 0}, "batch"),
    ({"batch": -1}, "batch"),
])
def test_wrong_arguments(options, message):
    volume = NORMAL((4, 5, 6, 2))
    with pytest.raises(ValueError, match=message):
        sliding_window(lambda x: x, volume, **{"patch": (3, 4, 2), **options})
