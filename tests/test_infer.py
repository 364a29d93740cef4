"""Windows, slabs of them, mirrors, ensembles and islands, each against what it must equal.

Sliding windows: coverage, weights against naive loops and MONAI, and nothing left changed.
"""

import tracemalloc
from itertools import chain, combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyseg as ts
from tinyseg.data.ct import Plan, resample, thick_axis
from tinyseg.data.sampling import pad
from tinyseg.infer import (
    fold,
    gaussian,
    islands,
    resampled,
    rows,
    segment,
    slabs,
    sliding_window,
    starts,
)
from tinyseg.infer import scan as scan_module
from tinyseg.infer import windows as window_module
from tinyseg.windows.products import constant

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
    # at least the overlap that was asked, to the rounding of window * (1 - overlap)
    assert np.all(steps <= max(1, window * (1 - overlap)) + 1e-9)
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
    before, modes = net.state(), [m.training for m in net.modules()]
    assert len(set(modes)) == 2
    seen = []

    class Watched(ts.nn.Module):
        def __init__(self):
            self.net = net

        def forward(self, x):
            seen.extend(m.training for m in net.modules())
            y = self.net(x)
            assert not y.requires_grad
            if fails:
                raise KeyboardInterrupt
            return y

    volume = NORMAL((6, 5, 7, 2)).astype("float32")
    if fails:
        with pytest.raises(KeyboardInterrupt):
            sliding_window(Watched(), volume, (3, 4, 5))
    else:
        logits = sliding_window(Watched(), volume, (3, 4, 5))
        np.testing.assert_array_equal(logits, sliding_window(net.copy().eval(), volume, (3, 4, 5)))
    assert seen and not any(seen)
    assert [m.training for m in net.modules()] == modes
    assert all(np.array_equal(before[k], a) for k, a in net.state().items())
    assert (net(volume[None]) * 1).requires_grad  # recording is on again
    assert all(p.grad is None for p in net.parameters())


def test_between_slabs_the_network_and_recording_are_as_they_were():
    """Two streams through one network, the first not read to its end, leave no trace."""
    net, volume = small().train(), NORMAL((12, 5, 7, 2)).astype("float32")
    streams = [slabs(net, volume, (3, 4, 5)) for _ in range(2)]
    for _ in zip(*streams, strict=True):
        assert net.training and (net(volume[None]) * 1).requires_grad
        break
    for _ in streams[1]:
        assert net.training
    assert net.training and (net(volume[None]) * 1).requires_grad


@pytest.mark.parametrize("size, patch", [((8, 9, 7), (3, 4, 2)), ((5, 12, 8), (5, 2))])
@pytest.mark.parametrize("mirror", [(), (1, 2)])
@pytest.mark.parametrize("batch", [1, 3])
def test_windows_of_air_are_asked_once(size, patch, mirror, batch):
    """The answer is that of a network that is asked every time; a volume of two channels whose air
    differs between them, and lies on all sides of a body."""
    volume, net, asked = np.full((*size, 2), (-1.5, 0.25), "float16"), small(len(patch)).eval(), []
    volume[3:5, 5:8, 3:4] = NORMAL((2, 3, 1, 2))

    def model(x):
        asked.append(np.ptp(x.data, axis=tuple(range(1, x.data.ndim - 1))).max(axis=-1) == 0)
        return net(x)

    found = sliding_window(model, volume, patch, batch=batch, mirror=mirror)
    constant = np.concatenate(asked)
    assert constant.sum() == 2 ** len(mirror) and len(constant) > constant.sum()
    with pytest.MonkeyPatch.context() as every:
        every.setattr(window_module, "_constant", lambda window: None)
        asked.clear()
        truth = sliding_window(model, volume, patch, batch=batch, mirror=mirror)
    assert np.concatenate(asked).sum() > 20
    np.testing.assert_allclose(found, truth, rtol=1e-6, atol=1e-6)
    assert batch > 1 or np.array_equal(found, truth)


def test_each_constant_has_an_answer_of_its_own():
    """Three regions of one value each, and what is not a number, which is like nothing."""
    volume = np.repeat(np.float32([1, 2, 1, np.nan]), 6)[:, None]
    found = sliding_window(lambda x: ts.Tensor(x.data * 3), volume, (3,), 0)
    np.testing.assert_allclose(found, volume * 3, rtol=1e-6)


def test_groups_hold_as_many_windows_as_the_network_may_see():
    groups, volume = [], np.zeros((24, 1), "float32")
    volume[[4, 7, 10, 20]] = 1  # windows 1, 2, 3 and 6 of 8 are not constant

    def progress(windows):
        groups.extend(map(len, windows))
        return iter(windows)

    sliding_window(lambda x: x, volume, (3,), 0, batch=3, progress=progress)
    assert sum(groups) == 8 and groups == [6, 2]


def test_modules_without_parameters():
    volume = NORMAL((6, 5, 2)).astype("float32")
    np.testing.assert_allclose(sliding_window(ts.nn.ReLU(), volume, (3, 4)), volume.clip(0),
                               rtol=1e-5)


@pytest.mark.parametrize("options, message", [
    ({"patch": (3,)}, "patch"), ({"patch": (3, 3, 3, 3)}, "patch"), ({"patch": ()}, "patch"),
    ({"overlap": 1}, "overlap"), ({"overlap": -0.1}, "overlap"), ({"overlap": np.nan}, "overlap"),
    ({"patch": (3, 0, 2)}, "patch"), ({"patch": (3, -1, 2)}, "patch"), ({"batch": 0}, "batch"),
    ({"batch": -1}, "batch"), ({"mirror": (3,)}, "mirror"), ({"mirror": (0, -4)}, "mirror"),
])
def test_wrong_arguments(options, message):
    volume = NORMAL((4, 5, 6, 2))
    with pytest.raises(ValueError, match=message):
        sliding_window(lambda x: x, volume, **{"patch": (3, 4, 2), **options})


def at_once(model, volume, patch, overlap):
    """Logits of a volume summed in whole arrays, one window after the other."""
    size = (1,) * (volume.ndim - 1 - len(patch)) + patch
    padded, inside = pad(volume, size)
    weight, total = gaussian(size)[..., None], None
    norm = np.zeros((*padded.shape[:-1], 1), "float32")
    for corner in product(*map(starts, padded.shape, size, [overlap] * len(size))):
        place = tuple(slice(c, c + p) for c, p in zip(corner, size, strict=True))
        window = padded[place] if len(size) > len(patch) else padded[place][None]
        answer = model(ts.Tensor(window)).data.reshape(*size, -1)
        if total is None:
            total = np.zeros((*padded.shape[:-1], answer.shape[-1]), "float32")
        total[place] += answer * weight
        norm[place] += weight
    return (total / norm)[inside]


@settings(max_examples=100, deadline=None)
@given(scans(), overlaps, st.integers(1, 5))
def test_slabs_equal_the_volume_at_once_bit_for_bit(scan, overlap, batch):
    size, patch = scan
    volume = NORMAL((*size, 2)).astype("float32")
    parts = list(slabs(cumulative, volume, patch, overlap, batch=batch))
    depth = 1 if len(patch) < len(size) else patch[0]
    assert all(1 <= len(part) <= depth for part in parts)
    whole = np.concatenate(parts)
    np.testing.assert_array_equal(whole, at_once(cumulative, volume, patch, overlap))
    np.testing.assert_array_equal(
        whole, sliding_window(cumulative, volume, patch, overlap, batch=batch))


def test_a_slab_comes_as_soon_as_no_window_reaches_it():
    asked = []

    def model(x):
        asked.append(len(x.data))
        return x

    stream = slabs(model, NORMAL((20, 6, 6, 1)), (8, 6, 6), 0.5)  # windows at 0, 4, 8 and 12
    assert [(len(next(stream)), len(asked)) for _ in range(4)] == [(4, 2), (4, 3), (4, 4), (8, 4)]
    with pytest.raises(StopIteration):
        next(stream)


def test_slabs_do_not_grow_with_the_scan():
    volume = np.zeros((2000, 32, 32, 1), "float16")
    tracemalloc.start()
    for slab in slabs(lambda x: ts.Tensor(np.repeat(x.data, 8, -1)), volume, (8, 32, 32)):
        shape = slab.shape[1:]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert shape == (32, 32, 8) and peak < 4e6 < 65e6  # of all logits


def both_ways(model, axes, swapped=()):
    """The mean of a model's answers to windows reflected along every subset of array axes; classes
    in the order `swapped` where the last spatial one was among them."""
    def answer(x):
        answers = []
        for s in chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)):
            there = np.flip(model(ts.Tensor(np.flip(x.data, s).copy())).data, s)
            mirrored = x.data.ndim - 2 in s and swapped
            answers.append(np.stack([there[..., c] for c in swapped], -1) if mirrored else there)
        return ts.Tensor(np.mean(answers, axis=0))

    return answer


@pytest.mark.parametrize("size, patch, mirror, axes", [
    ((6, 7, 9), (4, 3, 5), (0, 1, 2), (1, 2, 3)), ((6, 7, 9), (4, 3, 5), (-1,), (3,)),
    ((6, 7, 9), (4, 3, 5), [2, 0, -1], (1, 3)), ((6, 7, 9), (3, 5), (0, 1, 2), (1, 2)),
    ((6, 7, 9), (3, 5), (-1,), (2,)), ((6, 7, 9), (3, 5), (0,), ()), ((7, 9), (3, 5), (0,), (1,)),
    ((17, 13), (11, 9), (0, 1), (1, 2)),
])
def test_mirroring_is_the_mean_over_reflections(size, patch, mirror, axes):
    volume = NORMAL((*size, 2)).astype("float32")
    np.testing.assert_allclose(
        sliding_window(cumulative, volume, patch, batch=2, mirror=mirror),
        sliding_window(both_ways(cumulative, axes), volume, patch, batch=2), rtol=1e-6)
    plain = sliding_window(cumulative, volume, patch)
    assert (axes == ()) == np.array_equal(
        plain, sliding_window(cumulative, volume, patch, mirror=mirror))


@pytest.mark.parametrize("patch, axes", [((4, 3, 5), (2, 3)), ((3, 5), (1, 2))])
def test_a_left_class_answers_as_the_right_one_in_the_mirror(patch, axes):
    volume, rng = NORMAL((6, 7, 9, 2)).astype("float32"), np.random.default_rng(3)
    weight = rng.standard_normal((2, 5)).astype("float32")

    def model(x):  # five classes of which 1, 4 and 2, 3 are pairs
        return ts.Tensor(cumulative(x).data @ weight)

    mirrored = sliding_window(model, volume, patch, mirror=(1, 2), pairs=[(1, 4), (3, 2)])
    np.testing.assert_allclose(mirrored, sliding_window(
        both_ways(model, axes, (0, 4, 3, 2, 1)), volume, patch), rtol=2e-5, atol=1e-4)
    assert abs(mirrored - sliding_window(model, volume, patch, mirror=(1, 2))).max() > 0.1


def test_a_network_of_sides_answers_a_mirrored_scan_with_the_sides_exchanged():
    """Whatever the network: its mean with the mirror image is exactly equivariant."""
    image = scan((12, 8, 16), spacing=(2.0, 1.5, 1.0))
    mirrored = SimpleNamespace(array=image.array[..., ::-1].copy(), spacing=image.spacing,
                               path=image.path)
    for rank in (2, 3):
        net = network(rank=rank, classes=5, mirror=[["l", "r"]])
        net.metadata |= {"labels": {"0": "back", "7": "l", "9": "other", "63": "r", "252": "m"},
                         "patch": [6, 8, 8]}
        net.parameters()[-1].data -= logits_at_once(net, image).mean((0, 1, 2))  # all occur
        one, two = (segment(net, s, mirror=[-1]) for s in (image, mirrored))
        table = np.arange(256)
        table[[7, 63]] = 63, 7
        assert {7, 63} <= set(np.unique(one))
        np.testing.assert_array_equal(one, table[two][..., ::-1])


def test_sides_are_classes_in_whatever_order_labels_are_told():
    """And where a class is its number, as networks with gaps had it."""
    image = scan((12, 8, 16), spacing=(2.0, 1.5, 1.0))
    for labels, classes in (({"0": "back", "3": "other", "1": "l", "2": "r"}, 4),
                            ({"0": "back", "3": "l", "5": "r"}, 6)):
        net = network(rank=3, classes=classes, mirror=[["l", "r"]])
        net.metadata |= {"labels": dict(sorted(labels.items())), "patch": [6, 8, 8]}
        right = segment(net, image, mirror=[-1])
        net.metadata |= {"labels": labels}
        np.testing.assert_array_equal(segment(net, image, mirror=[-1]), right)
        # Of this network's answers those of the mirror image count for the other side.
        l, r = (int(number) for number in labels if labels[number] in "lr")  # noqa: E741
        mirrored = SimpleNamespace(array=image.array[..., ::-1].copy(), spacing=image.spacing,
                                   path=image.path)
        table = np.arange(classes)
        table[[l, r]] = r, l
        np.testing.assert_array_equal(right, table[segment(net, mirrored, mirror=[-1])][..., ::-1])


def test_labels_may_be_more_than_a_byte_holds():
    def model(x):
        return np.eye(300, dtype="float32")[np.full(x.shape[:-1], 299)]

    found = sliding_window(model, np.zeros((5, 6, 1), "float32"), (4, 4), labels=True)
    assert (found == 299).all() and found.dtype == "uint16"


def test_what_training_left_out_is_not_asked_of_the_network():
    net = network(mirror=None)
    assert segment(net, scan(), mirror=[0]).shape == (13, 9, 10)
    for axis in (-1, 2):
        with pytest.raises(ValueError, match="without left-right"):
            segment(net, scan(), mirror=[axis])


@pytest.mark.parametrize("known", [(0, 63, 252), (0, 1, 4), (0, 5, 1000)])
def test_classes_are_written_as_the_numbers_of_the_files(known):
    net, volume = network(), scan()
    plain = segment(net, volume)
    net.metadata["labels"] = {str(n): f"class {n}" for n in known}
    mapped = segment(net, volume)
    assert mapped.dtype == np.min_scalar_type(known[-1])
    np.testing.assert_array_equal(mapped, np.array(known)[plain])


def test_classes_without_a_name_are_never_answered():
    net, volume = network(classes=5), scan()
    assert {2, 3} & set(np.unique(segment(net, volume)))
    net.metadata["labels"] = {"0": "background", "1": "necrosis", "4": "enhancing"}
    logits = logits_at_once(net, volume)[..., [0, 1, 4]]
    labels = segment(net, volume)
    assert set(np.unique(labels)) <= {0, 1, 4}
    assert_largest(np.searchsorted([0, 1, 4], labels), logits)
    net.metadata["labels"] = {"0": "background", "7": "other"}
    with pytest.raises(ValueError, match="5 classes with the labels"):
        segment(net, volume)


def test_mirroring_changes_nothing_where_the_function_is_equivariant():
    volume = NORMAL((6, 7, 9, 2)).astype("float32")
    mirrored = sliding_window(ts.ops.relu, volume, (4, 3, 5), mirror=(0, 1, 2))
    np.testing.assert_allclose(mirrored, sliding_window(ts.ops.relu, volume, (4, 3, 5)), rtol=1e-6)


@pytest.mark.parametrize("size, patch, overlap", [
    ((9, 10, 17), (5, 7, 9), 0.5), ((11, 12, 15), (5, 7, 9), 0.25), ((15, 9, 7), (5, 3, 7), 0),
    ((13, 17), (7, 9), 0.5), ((3, 9, 9), (5, 3, 11), 0.5), ((5, 5, 17), (5, 5, 9), 0.5),
])
@pytest.mark.parametrize("batch", [1, 4])
def test_parity_with_monai(size, patch, overlap, batch):
    """MONAI's sliding windows with Gaussian weights, on a function that knows its window.

    The two differ in two points that these sizes avoid. MONAI moves the last window back to the
    border and leaves the others at multiples of the stride; here all are spread evenly, so sizes
    are a window and whole strides. MONAI's least weight is 0.001, here it is a thousandth of the
    largest: the same in windows of odd length, which have a voxel in the centre of weight 1.
    """
    monai = pytest.importorskip("monai.inferers", reason="MONAI is not installed")
    torch = pytest.importorskip("torch")
    assert all((max(n, p) - p) % int(p * (1 - overlap)) == 0
               for n, p in zip(size, patch, strict=True))
    volume = NORMAL((*size, 2)).astype("float32")

    def predictor(x):
        y = cumulative(ts.Tensor(np.moveaxis(x.numpy(), 1, -1))).data
        return torch.from_numpy(np.moveaxis(y, -1, 1).copy())

    theirs = monai.sliding_window_inference(
        torch.from_numpy(np.moveaxis(volume, -1, 0)[None].copy()), patch, batch, predictor,
        overlap=overlap, mode="gaussian", sigma_scale=0.125, padding_mode="replicate")
    ours = sliding_window(cumulative, volume, patch, overlap, batch=batch)
    np.testing.assert_allclose(ours, np.moveaxis(theirs.numpy()[0], 0, -1), rtol=1e-5, atol=1e-5)


@settings(max_examples=150, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 9)] * 3),
       st.tuples(*[st.integers(0, 1)] * 3), st.integers(1, 4))
def test_resampled_rows_equal_the_resampled_volume(size, shape, order, step):
    scores = NORMAL((*size, 2)).astype("float32")
    parts = [scores[i : i + step] for i in range(0, len(scores), step)]
    rows = list(resampled(parts, len(scores), shape, order))
    assert all(row.dtype == np.float32 for row in rows)
    np.testing.assert_allclose(rows, resample(scores, shape, order), rtol=1e-5, atol=1e-5)
    if size == shape:
        np.testing.assert_array_equal(rows, scores)


def network(seed=4, rank=3, classes=3, channels=1, kernel=3, **plan):
    """A small network with random weights that `segment` takes for a loaded one."""
    rng = np.random.default_rng(seed)
    net = ts.nn.Sequential(
        ts.nn.Conv(channels, 4, (kernel,) * rank, padding=kernel // 2, rng=rng), ts.nn.ReLU(),
        ts.nn.Conv(4, classes, (1,) * rank, rng=rng))
    net.parameters()[2].data *= 4  # logits apart, so that classes mix and some are sure
    net.config = {"rank": rank, "classes": classes, "in_channels": channels}
    plan = {"spacing": [2.0, 1.5, 1.0], "clip": [-2, 2], "mean": 0.1, "std": 0.9, **plan}
    net.metadata = {"plan": plan, "patch": [6, 8, 10]}
    return net.eval()


def scan(size=(13, 9, 10), spacing=(1.2, 1.1, 1.3), channels=()):
    array = np.random.default_rng(5).standard_normal((*size, *channels), "float32")
    return SimpleNamespace(array=array, spacing=spacing, path="scan.nii.gz")


def logits_at_once(net, volume, patch=None, **options):
    """On the scan's grid, of windows of this size or of training's."""
    plan = Plan(**net.metadata["plan"])
    image = plan.prepare(volume).astype("float16")
    patch = patch or net.metadata["patch"]
    logits = sliding_window(net, image, tuple(patch[-net.config["rank"] :]), **options)
    thick = None if plan.blend_slices else thick_axis(plan.spacing, volume.spacing)
    orders = [0 if axis == thick else 1 for axis in range(3)]
    return resample(logits, volume.array.shape[:3], orders)


def assert_largest(labels, shares):
    """The labels are where shares (*S, C) are largest, but for what rounding may decide."""
    lost = shares.max(-1) - np.take_along_axis(shares, labels[..., None].astype(int), -1)[..., 0]
    assert lost.max() < 1e-5


PLANS = [{}, {"spacing": [0.9, 1, 1.1]}, {"spacing": [1.2, 1.1, 1.3]}, {"mean": None, "std": None},
         {"spacing": [5, 1, 1], "blend_slices": False},
         {"spacing": [1, 1, 5], "blend_slices": False}]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rank", [2, 3])
def test_segment_equals_logits_resampled_at_once(plan, rank):
    net, volume = network(rank=rank, **plan), scan()
    labels = segment(net, volume)
    assert labels.shape == volume.array.shape and labels.dtype == np.uint8
    assert len(np.unique(labels)) >= 2
    assert_largest(labels, logits_at_once(net, volume))
    options = {"overlap": 0.3, "mirror": (0, 2)}
    assert_largest(segment(net, volume, **options), logits_at_once(net, volume, **options))


def test_segment_of_a_scan_smaller_than_the_patch_and_of_two_channels():
    net, volume = network(channels=2), scan((3, 5, 7), channels=(2,))
    labels = segment(net, volume)
    assert labels.shape == (3, 5, 7)
    assert_largest(labels, logits_at_once(net, volume))


@pytest.mark.parametrize("rank", [2, 3])
def test_window_module_a_size_are_asked_for(rank):
    net, volume = network(rank=rank), scan()
    labels = segment(net, volume, patch=(5, 4, 6))
    assert_largest(labels, logits_at_once(net, volume, [5, 4, 6]))
    assert (labels != segment(net, volume)).any()
    net.metadata["patch"] = [5, 4, 6]
    np.testing.assert_array_equal(labels, segment(net, volume, patch=net.metadata["patch"]))


@pytest.mark.parametrize("stride", [8, None])
def test_slices_are_seen_whole_in_multiples_of_the_stride(stride):
    """As many of them at a time as hold a bounded number of voxels."""
    net, volume, seen = network(rank=2, spacing=[1.2, 1.1, 1.3]), scan(), []
    net.config["output_stride"] = stride
    forward = ts.nn.Sequential.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ts.nn.Sequential, "forward",
                      lambda self, x: seen.append(x.shape) or forward(self, x))
        patch.setattr(scan_module, "BATCH", 16 * 5 * (16 * 16 if stride else 32 * 32))
        labels = segment(net, volume, patch="whole")
    plane = (16, 16) if stride else (32, 32)
    assert seen == [(n, *plane, 1) for n in (5, 5, 3)]
    assert_largest(labels, logits_at_once(net, volume, plane))
    with pytest.raises(ValueError, match="rank 3 and patch whole"):
        segment(network(), volume, patch="whole")


def test_a_network_that_was_never_saved_is_told_plan_and_patch():
    net, volume = network(), scan()
    known, plan = segment(net, volume), Plan(**net.metadata["plan"])
    patch = net.metadata["patch"]
    del net.metadata
    np.testing.assert_array_equal(segment(net, volume, plan=plan, patch=patch), known)
    with pytest.raises(ValueError, match="without a plan"):
        segment(net, volume, patch=patch)
    with pytest.raises(ValueError, match="rank 3 and patch None"):
        segment(net, volume, plan=plan)
    del net.config
    with pytest.raises(ValueError, match="config with its rank"):
        segment(net, volume, plan=plan, patch=patch)
    flat = ts.models.resnet_seg("resnet18", rank=2, in_channels=1, classes=3)
    assert segment(flat, volume, plan=plan, patch="whole").shape == volume.array.shape


def test_another_plan_than_that_of_training():
    net, volume = network(), scan()
    other = Plan((1.2, 1.1, 1.3), mirror=None)
    labels = segment(net, volume, plan=other)
    np.testing.assert_array_equal(labels, segment(network(
        spacing=[1.2, 1.1, 1.3], clip=None, mean=None, std=None), volume))
    with pytest.raises(ValueError, match="without left-right"):
        segment(net, volume, plan=other, mirror=[2])


@pytest.mark.parametrize("count", [1, 2])
def test_probabilities_on_the_scans_grid(count):
    volume, nets = scan(), [network(seed) for seed in range(count)]
    found = segment(nets, volume, probabilities=True)
    truth = sum(softmax(logits_at_once(net, volume)) for net in nets) / count
    assert found.shape == (*volume.array.shape, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-6)
    assert_largest(segment(nets, volume), found)
    numbers, stream = rows(nets, volume)
    assert numbers == [0, 1, 2]
    np.testing.assert_array_equal(list(stream), found)
    with pytest.raises(ValueError, match="clean label maps"):
        segment(nets, volume, probabilities=True, largest=True)


def test_probabilities_are_those_of_the_numbers():
    """Of five classes of which two have no name, and are never answered."""
    net, volume = network(classes=5), scan()
    net.metadata["labels"] = {"0": "background", "1": "necrosis", "4": "enhancing"}
    found = segment(net, volume, probabilities=True)
    np.testing.assert_allclose(found, softmax(logits_at_once(net, volume)[..., [0, 1, 4]]),
                               rtol=1e-4, atol=1e-6)


def test_what_is_wrong_is_said_before_any_row():
    with pytest.raises(ValueError, match="one or more"):
        rows([], scan())


def seasoned(net, seed=0):
    """A network in which every batch-norm does something."""
    rng = np.random.default_rng(seed)
    for module in net.modules():
        if isinstance(module, ts.nn.BatchNorm):
            n = len(module.running_mean)
            module.running_mean[:], module.bias.data[:] = 0.3 * rng.standard_normal((2, n))
            module.running_var[:], module.weight.data[:] = rng.uniform(0.5, 1.5, (2, n))
    return net.eval()


def norms(net):
    return sum(isinstance(module, ts.nn.BatchNorm) for module in net.modules())


@pytest.mark.parametrize("options", [
    {"rank": 2}, {"rank": 3, "depth": 3, "depth_padding": "edge", "depth_dilation": 1},
    {"rank": 2, "head": "fcn"}, {"rank": 2, "head": "deeplabv3", "output_stride": 16},
    {"rank": 2, "backbone": "resnet50"}, {"rank": 2, "head": "unet", "decoder": (6, 5)}])
def test_a_folded_network_answers_as_before_without_a_batch_norm(options, monkeypatch):
    for name, (_, bottleneck) in list(ts.models.BACKBONES.items()):
        monkeypatch.setitem(ts.models.BACKBONES, name, ((1, 1, 1, 1), bottleneck))
    net = seasoned(ts.models.resnet_seg(**{"backbone": "resnet18", "in_channels": 2, "classes": 3,
                                           **options}))
    before = {name: array.copy() for name, array in net.state().items()}
    folded, x = fold(net), NORMAL((2, *(17, 16, 19)[-options["rank"] :], 2)).astype("float32")
    with ts.no_grad():
        truth = net(x).data
        ours, again = folded(x).data, folded(x).data
    assert norms(net) and not norms(folded) and ours.dtype == np.float32
    assert np.linalg.norm(ours - truth) <= 1e-5 * np.linalg.norm(truth)
    np.testing.assert_array_equal(ours, again)  # what is written over is nothing of the network's
    assert all(constant(m.weight.data) is (part is folded) for part in (net, folded)
               for m in part.modules() if isinstance(m, ts.nn.Conv))
    assert all(np.array_equal(before[name], a) for name, a in net.state().items())


def test_only_what_follows_a_convolution_is_folded():
    """A norm before, one behind a ReLU, a convolution that stands twice, and one with a bias."""
    rng = np.random.default_rng(1)

    def conv(**options):
        return ts.nn.Conv(2, 2, (3,), padding=1, rng=rng, **options)

    class Before(ts.nn.Module):  # torchvision's names, in the order of pre-activation
        def __init__(self):
            self.conv1, self.bn1 = conv(), ts.nn.BatchNorm(2)

        def forward(self, x):
            return self.conv1(self.bn1(x))

    twice = conv()
    net = seasoned(ts.nn.Sequential(
        Before(), ts.nn.Sequential(twice, ts.nn.BatchNorm(2)), twice, ts.nn.BatchNorm(2),
        ts.nn.ReLU(), ts.nn.BatchNorm(2), conv(), ts.nn.BatchNorm(2), conv(bias=False),
        ts.nn.BatchNorm(2)))
    folded, x = fold(net), NORMAL((2, 9, 2)).astype("float32")
    assert norms(net) == 6 and norms(folded) == 4
    np.testing.assert_allclose(folded(x).data, net(x).data, rtol=1e-4, atol=1e-5)


def test_derived_classes_may_read_what_a_convolution_gives():
    """Here conv1 is read once more behind bn1."""
    class Derived(ts.models.Classifier):
        def forward(self, x):
            y = self.conv1(x)
            return self.bn1(y) + y

    net = seasoned(Derived(ts.models.Builder(2, ts.models.Depth(), 0), 2, backbone="resnet18",
                           in_channels=1, output_stride=32, dilate_first_block=True))
    x = NORMAL((1, 9, 8, 1)).astype("float32")
    truth = net(x).data
    with ts.no_grad():
        np.testing.assert_allclose(fold(net)(x).data, truth, rtol=1e-4, atol=1e-5)


def test_a_network_of_ones_own_may_read_what_stands_inside_of_a_sequential():
    class Taps(ts.nn.Module):
        def __init__(self):
            self.parts = ts.nn.Sequential(ts.nn.Conv(1, 2, (3,), padding=1, rng=0),
                                          ts.nn.BatchNorm(2), ts.nn.ReLU())

        def forward(self, x):
            first = self.parts[0](x)
            return self.parts[2](self.parts[1](first)) + first

    net, x = seasoned(Taps()), NORMAL((2, 9, 1)).astype("float32")
    truth = net(x).data
    with ts.no_grad():
        np.testing.assert_allclose(fold(net)(x).data, truth, rtol=1e-4, atol=1e-5)


def test_prediction_follows_training():
    """Nothing of one prediction is left in the next: a step between two changes the answer as it
    changes the network's."""
    net, volume = seasoned(ts.nn.Sequential(*network().__iter__(), ts.nn.BatchNorm(3))), scan()
    net.config, net.metadata = network().config, network().metadata
    optimizer, x = ts.optim.SGD(net.parameters(), 0.5), NORMAL((1, 6, 8, 10, 1)).astype("float32")
    answers = []
    for _ in range(2):
        answers.append(segment(net, volume, probabilities=True))
        np.testing.assert_allclose(answers[-1], softmax(logits_at_once(net, volume)), rtol=1e-3,
                                   atol=1e-5)
        net.train()
        ts.losses.cross_entropy(net(x), np.ones(x.shape[:-1], int)).backward()
        optimizer.step()
    assert abs(answers[1] - answers[0]).max() > 0.01


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_an_ensemble_averages_probabilities_on_the_scans_grid():
    volume = scan()
    nets = [network(0), network(1, rank=2, spacing=[1, 1, 1]), network(2, mean=None, std=None)]
    alone = [segment(net, volume) for net in nets]
    labels = segment(nets, volume)
    assert_largest(labels, sum(softmax(logits_at_once(net, volume)) for net in nets) / 3)
    assert all((labels != one).any() for one in alone)
    np.testing.assert_array_equal(segment(nets[::-1], volume), labels)
    np.testing.assert_array_equal(segment(nets, volume, each=True), [*alone, labels])
    cleaned = segment(nets, volume, each=True, largest=True)
    np.testing.assert_array_equal(cleaned, [islands(one, largest=True) for one in (*alone, labels)])
    shares = segment(nets, volume, each=True, probabilities=True)
    np.testing.assert_allclose(shares[:-1].mean(axis=0), shares[-1], rtol=1e-6)
    np.testing.assert_array_equal(segment(nets[:1], volume, each=True), alone[:1] * 2)


@pytest.mark.parametrize("times", [1, 2, 4])
def test_an_ensemble_of_one_network_is_the_network(times):
    net, volume = network(), scan()
    np.testing.assert_array_equal(segment([net] * times, volume), segment(net, volume))


def test_two_networks_that_are_sure_outvote_one_that_boasts():
    volume, nets = scan(), [network(0), network(0), network(1)]
    for parameter in nets[2].parameters()[2:]:
        parameter.data *= 1000
    sure = softmax(logits_at_once(nets[0], volume)).max(-1) > 0.75  # 2 x 0.75 > 1 + 2 x 0.25
    labels, alone = segment(nets, volume), [segment(net, volume) for net in nets]
    assert (alone[0] != alone[2])[sure].any()
    np.testing.assert_array_equal(labels[sure], alone[0][sure])


def test_segment_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\[3, 2\] classes"):
        segment([network(), network(classes=2)], scan())
    with pytest.raises(ValueError, match="one or more"):
        segment([], scan())
    with pytest.raises(ValueError, match=r"scan.nii.gz: found 1 channels, expected 2"):
        segment([network(), network(channels=2)], scan())


def islands_by_flood(labels, largest, smallest):
    """The same from a flood over all neighbours, one voxel at a time."""
    steps = [s for s in product((-1, 0, 1), repeat=labels.ndim) if any(s)]
    left, result = {tuple(v) for v in np.argwhere(labels).tolist()}, np.zeros_like(labels)
    found = {}
    for voxel in sorted(left):
        if voxel not in left:
            continue
        island, edge = [], [voxel]
        left.discard(voxel)
        while edge:
            here = edge.pop()
            island.append(here)
            for step in steps:
                near = tuple(np.add(here, step).tolist())
                if near in left and labels[near] == labels[voxel]:
                    left.discard(near)
                    edge.append(near)
        found.setdefault(labels[voxel], []).append(island)
    for number, parts in found.items():
        for island in [max(parts, key=len)] if largest else parts:
            if len(island) >= smallest:
                result[tuple(np.transpose(island))] = number
    return result


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 3), st.data(), st.booleans(), st.sampled_from([0, 1, 2, 3, 4.5, 100]))
def test_islands_against_a_flood(rank, data, largest, smallest):
    size = data.draw(st.tuples(*[st.integers(1, 7)] * rank))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    labels = rng.choice([0, 1, 3], size, p=[0.7, 0.2, 0.1]).astype("uint8")
    before = labels.copy()
    found = islands(labels, largest=largest, smallest=smallest)
    np.testing.assert_array_equal(found, islands_by_flood(labels, largest, smallest))
    np.testing.assert_array_equal(labels, before)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(islands(found, largest=largest, smallest=smallest), found)


def test_islands_touch_at_corners_and_classes_do_not_mix():
    labels = np.zeros((4, 4, 4), "uint8")
    labels[0, 0, 0] = labels[1, 1, 1] = labels[3, 3, 3] = 1
    labels[2, 2, 2] = 2  # would bridge the two
    kept = islands(labels, largest=True)
    assert kept[0, 0, 0] == kept[1, 1, 1] == 1 and kept[3, 3, 3] == 0 and kept[2, 2, 2] == 2
    assert not islands(labels, smallest=3).any()


def test_segment_cleans_in_millilitres_on_the_scans_grid():
    net, volume = network(), scan()
    labels, voxel = segment(net, volume), np.prod(volume.spacing) / 1000
    cleaned = segment(net, volume, largest=True, smallest=20 * voxel)
    np.testing.assert_array_equal(cleaned, islands_by_flood(labels, True, 20 - 1e-6))
    assert (cleaned != labels).any()
