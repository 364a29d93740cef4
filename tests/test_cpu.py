"""The fast bodies on a CPU against the specification, and the threads that they run on."""

import dataclasses
import gc
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
from math import prod

import numpy as np
import pytest
from convolutions import arrays, placed
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from tinyseg import Tensor, losses, models, no_grad, ops, optim, parallel, train, windows
from tinyseg.data import phantom
from tinyseg.windows import (
    Window,
    columns,
    cpu,
    lines,
    pooling,
    products,
    reference,
    transforms,
    winograd,
)


@pytest.fixture(autouse=True)
def tilings():
    yield
    winograd.tiling.cache_clear()  # some change what it weighs


def check(x, w, window, seed=0, tolerance=1e-5):
    """All three readings of one convolution: the norm of the difference against that of the truth,
    or of the terms that it sums where it is smaller, because they cancel but their rounding does
    not. What an engine does to its outputs as it goes is what would be done to them afterwards."""
    assert cpu.serves(window, x, w)
    size, rng = x.shape[1:-1], np.random.default_rng(seed)
    g = rng.standard_normal((len(x), *window.positions(size), w.shape[-1])).astype("float32")
    bias, residual = (rng.standard_normal(shape).astype("float32") for shape in (
        w.shape[-1:], g.shape))
    y, before = windows.correlate(x, w, window), [a.copy() for a in (x, bias, residual)]
    for shift, added, relu in ((bias, None, seed % 2 == 0), (bias, residual, True),
                               (None, residual, seed % 2 == 1), (None, None, True)):
        truth = y + (0 if shift is None else shift) + (0 if added is None else added)
        finished = windows.correlate(x, w, window, windows.Finish(shift, added, relu))
        np.testing.assert_allclose(finished, np.maximum(truth, 0) if relu else truth,
                                   rtol=1e-6, atol=tolerance * (1 + abs(y).max()))
    assert all(map(np.array_equal, before, (x, bias, residual)))
    for name, *factors, more in (("correlate", x, w, ()), ("correlate_dx", g, w, (size,)),
                                 ("correlate_dw", x, g, ())):
        ours = getattr(windows, name)(*factors, *more, window)
        truth, squares = (getattr(reference, name)(
            *(f.astype("float64") ** power for f in factors), *more, window) for power in (1, 2))
        assert ours.shape == truth.shape and ours.dtype == "float32" and ours.flags.c_contiguous
        scale = np.sqrt(max((truth**2).sum(), squares.sum()))
        assert np.linalg.norm(ours - truth) <= tolerance * scale


@st.composite
def problems(draw):
    size, window = draw(placed(rank=4, size=7, dilation=4, padding=5))
    return (size, draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 40, 230, 650])),
            draw(st.integers(1, 7)), window)


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(1, 3), st.integers(0, 99))
def test_any_convolution(problem, threads, seed):
    """Groups of all sizes: the channels decide how many taps stand side by side."""
    size, batch, channels, filters, window = problem
    parallel.set_threads(threads)
    check(*arrays(size, batch, channels, filters, window.kernel, seed), window, seed)


@pytest.mark.parametrize("size, channels, filters, kernel, options", [
    ((8, 12, 12), 96, 80, (3, 3, 3), {"padding": 4, "dilation": 4}),
    ((9, 21, 30), 64, 72, (3, 3, 3), {"padding": 1}),
    ((10, 23, 31), 66, 64, (3, 3, 3), {"padding": 1, "padding_mode": ("edge", "zero", "zero")}),
    ((30, 41), 64, 128, (3, 3), {"padding": ((0, 2), 1)}),
    ((10, 21, 30), 16, 24, (3, 3, 3), {"padding": 1, "dilation": (1, 2, 1)}),
    ((4, 5, 4), 96, 200, (3, 3, 3), {"padding": 1}),
    ((4, 15, 13), 450, 460, (3, 3, 3), {"padding": (1, 4, 4), "dilation": (1, 4, 4),
                                        "padding_mode": ("edge", "zero", "zero")}),
    ((20, 33, 18), 1, 64, (7, 7, 7), {"padding": 3, "stride": 2}),
    ((9, 15, 13), 70, 65, (3, 3, 3), {"padding": 1, "stride": 2}),
    ((11, 15, 13), 6, 230, (4, 5, 3), {"padding": (1, 3, 2), "stride": (2, 3, 2)}),
    ((9, 15, 13), 128, 96, (1, 1, 1), {"stride": 2}),
    ((9, 15, 13), 128, 96, (1, 1, 1), {}),
])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_shapes_of_networks(size, channels, filters, kernel, options, threads):
    parallel.set_threads(threads)
    check(*arrays(size, 2, channels, filters, kernel, 1), Window.of(kernel, **options))


@st.composite
def filters_of_three(draw):
    """What Winograd's tiles take: 1 or 3 taps along each axis, at any dilation."""
    kernel = draw(st.lists(st.sampled_from([1, 3, 3]), min_size=1, max_size=3).filter(
        lambda taps: 3 in taps).map(tuple))
    each = [draw(st.tuples(st.integers(1, 11), st.integers(1, 4), st.integers(0, 5),
                           st.integers(0, 5))) for _ in kernel]
    size = tuple(max(n, d * (k - 1) + 1 - a - b) for k, (n, d, a, b) in
                 zip(kernel, each, strict=True))
    edge = tuple(draw(st.sampled_from(["zero", "zero", "edge"])) for _ in kernel)
    return size, Window.of(kernel, 1, tuple((a, b) for _, _, a, b in each),
                           tuple(d for _, d, _, _ in each), edge)


@settings(max_examples=60, deadline=None)
@given(filters_of_three(), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7),
       st.integers(1, 3), st.sampled_from([2**8, 2**12, 2**20]), st.sampled_from([0, 1000]),
       st.integers(0, 99))
def test_tiles(problem, batch, channels, filters, threads, block, image, seed):
    """Winograd's way, also where it would not be chosen, in blocks that end anywhere."""
    size, window = problem
    parallel.set_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "pairs", lambda *_: np.inf)  # the direct products cost more
        patch.setattr(lines, "outputs", lambda *_: 0)
        patch.setattr(winograd, "IMAGE", image)  # more, and tiles are larger
        patch.setattr(winograd, "BLOCK", block)
        patch.setattr(winograd, "WHOLE", 16 * block)
        winograd.tiling.cache_clear()
        x, w = arrays(size, batch, channels, filters, window.kernel, seed)
        assert windows.explain(x.shape, w.shape, window).count("Winograd: ") == 3
        check(x, w, window, seed)


@st.composite
def lines_of_three(draw):
    """Three taps, without stride or dilation, along the first axis; anything along the others."""
    size, window = draw(placed(rank=3, size=6, dilation=3, padding=4))
    length, before, after = draw(st.tuples(*[st.integers(a, b) for a, b in (
        (1, 11), (0, 3), (0, 3))]))
    edge = draw(st.booleans())
    return (max(length, 3 - before - after), *size), Window(
        (3, *window.kernel), (1, *window.stride), ((before, after), *window.padding),
        (1, *window.dilation), (edge, *window.edge))


@settings(max_examples=60, deadline=None)
@given(lines_of_three(), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7),
       st.integers(1, 3), st.sampled_from([2, 3, 4]), st.integers(0, 99))
def test_lines(problem, batch, channels, filters, threads, m, seed):
    """Winograd's way along the first axis, also where it would not be chosen; and again along the
    next, where that allows it."""
    size, window = problem
    parallel.set_threads(threads)

    def outputs(kernel, images, channels, filters, positions, stride, dilation, before, fixed):
        allowed = len(kernel) > 1 and (kernel[0], stride[0], dilation[0]) == (3, 1, 1)
        return m if allowed and before[0] >= 0 else 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "outputs", outputs)
        patch.setattr(winograd, "tiling", lambda *problem: None)
        check(*arrays(size, batch, channels, filters, window.kernel, seed), window, seed)


def test_who_takes_lines():
    def outputs(kernel=(3, 3, 3), images=1, channels=512, filters=512, positions=(12, 16, 12),
                stride=(1, 1, 1), dilation=(1, 4, 4), before=(1, 4, 4)):
        return lines.outputs(kernel, images, channels, filters, positions, stride, dilation, before)

    assert [outputs(positions=(n, 20, 20)) for n in (6, 8, 9, 12)] == [3, 4, 3, 4]
    assert not outputs(positions=(2, 16, 12))  # four products for four
    assert not outputs(kernel=(1, 3, 3)) and not outputs(kernel=(5, 3, 3)) and not outputs(
        kernel=(3,), positions=(9,), stride=(1,), dilation=(1,), before=(1,))
    assert not outputs(stride=(2, 1, 1)) and not outputs(dilation=(4, 4, 4))
    assert not outputs(before=(-1, 4, 4)) and not outputs(channels=16) and not outputs(filters=16)
    assert not outputs(positions=(12, 4, 4))  # the kernel's transform takes longer


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, n) for n in (4, 4, 3, 3)]), min_size=1, max_size=3),
       st.integers(1, 3), st.integers(1, 5), st.sampled_from([1, 2**14]), st.integers(0, 99))
def test_transform(axes, count, channels, row, seed):
    """Matrix after matrix on every tile by itself, to a new array or into columns of another."""
    axes[0] = (2, *axes[0][1:])  # one matrix at least is not a single number
    rng = np.random.default_rng(seed)
    matrices = [rng.standard_normal((f, r)) for f, r, _, _ in axes]
    matrices = [m if m.size > 1 else np.ones((1, 1)) for m in matrices]
    number = tuple(n for *_, n, _ in axes)
    steps = tuple(s if m.size > 1 else 1 for m, (*_, s) in zip(matrices, axes, strict=True))
    size = [(n - 1) * s + m.shape[1] for m, n, s in zip(matrices, number, steps, strict=True)]
    x = rng.standard_normal((count, *size, channels))
    truth = np.empty((*map(len, matrices), count, *number, channels))
    for tile in np.ndindex(count, *number):
        part = x[(tile[0], *(slice(i * s, i * s + m.shape[1]) for i, s, m in
                             zip(tile[1:], steps, matrices, strict=True)))]
        for axis, matrix in enumerate(matrices):
            part = np.moveaxis(np.tensordot(matrix, part, (1, axis)), 0, axis)
        truth[(..., *tile, slice(None))] = part
    if len(axes) > 1 and matrices[-1].size > 1:  # the tiles of the last axis come first
        truth = np.moveaxis(truth, -2, len(axes))
    truth = truth.reshape(prod(map(len, matrices)), -1, channels)
    wide = np.full((len(truth), truth.shape[1] + 3, channels), np.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "ROW", row)
        assert np.allclose(transforms.transform(matrices, x, steps), truth)
        transforms.transform(matrices, x, steps, wide[:, 2:-1])
    assert np.allclose(wide[:, 2:-1], truth)
    assert np.isnan(wide[:, :2]).all() and np.isnan(wide[:, -1]).all()


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_the_matrices_are_a_minimal_filter(m):
    """y = Aᵀ [(G w) ⊙ (Bᵀ x)] is the correlation of m + 2 numbers with 3, for any numbers."""
    a, b, g = transforms.filtering(m)
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, w = rng.standard_normal(m + 2), rng.standard_normal(3)
        assert np.allclose(a @ ((g @ w) * (b @ x)), np.correlate(x, w, "valid"), atol=1e-12)


def test_who_takes_tiles():
    def steps(kernel=(3, 3, 3), images=1, channels=64, filters=64, positions=(16, 24, 24),
              stride=(1, 1, 1), dilation=(1, 1, 1)):
        way = winograd.tiling(kernel, images, channels, filters, positions, stride, dilation)
        return way and way.steps

    assert steps() == (4, 4, 4) and steps((1, 3, 3)) == (1, 4, 4)
    assert steps(dilation=(2, 2, 2)) == (4, 4, 4) and steps(positions=(6, 24, 24)) == (3, 4, 4)
    assert not steps(stride=(1, 2, 2)) and not steps((1, 1, 1)) and not steps((5, 3, 3))
    # Of few channels, transforms tell: the taps along the last axis stand beside the channels.
    assert steps(channels=32, filters=16) == steps(channels=16, filters=3) == (4, 4, 1)
    few = {"positions": (96, 96), "stride": (1, 1), "dilation": (1, 1)}
    assert steps((3, 3), channels=16, filters=16, **few) == (4, 1)
    assert not steps((3, 3), channels=4, filters=16, **few)  # in the plane alone less is saved
    assert steps((3, 3, 1), channels=8, filters=8) != (4, 1, 1)
    assert not steps(positions=(3, 9, 9))
    assert not steps(channels=512, filters=512)  # the transformed kernel alone is 67 MB or more
    # Tiles of three where tiles of four stand over the border.
    assert [winograd.tiling((3, 3), 32, 256, 256, (12, 12), (1, 1), (d, d)).steps
            for d in (1, 2, 3, 4)] == [(4, 4), (3, 3), (4, 4), (3, 3)]


def test_a_grid_that_no_tap_sees():
    """All windows stand in the padding: zeros, in every reading."""
    x, w = arrays((2,), 1, 300, 5, (2,), 0)
    check(x, w, Window.of((2,), 9, ((10, 10),), 20))


def test_the_same_bits_in_every_run():
    x, w = arrays((7, 20, 22), 2, 64, 64, (3, 3, 3), 3)
    window = Window.of((3, 3, 3), 1, 1)
    parallel.set_threads(3)

    def bits():
        y = windows.correlate(x, w, window)
        return (y.tobytes(), windows.correlate_dw(x, y, window).tobytes(),
                windows.correlate_dx(y, w, (7, 20, 22), window).tobytes())

    assert bits() == bits() == bits()


def test_who_computes_what(monkeypatch):
    monkeypatch.setattr(reference, "correlate", lambda *_: "reference")
    x, w = arrays((4,), 1, 2, 3, (1,), 0)
    window = Window.of((1,))
    assert isinstance(windows.correlate(x, w, window), np.ndarray)
    assert windows.correlate(x.astype("float64"), w.astype("float64"), window) == "reference"
    assert windows.correlate(x, w.astype("float64"), window) == "reference"


def test_training_goes_the_same_way(monkeypatch):
    """On the phantom, five steps through all fast bodies give the losses that the specification's
    give. Rounding grows from step to step, in float32 at large: 2e-4 of the loss was measured."""
    rng, taken = np.random.default_rng(0), set()
    scans, labels = zip(*[phantom.volume(rng, (32, 24, 28), (3, 6, 5)) for _ in range(2)],
                        strict=True)
    images, labels = np.stack(scans)[..., None].astype("float32") / 100, np.stack(labels)
    start = models.resnet_seg("resnet18", rank=3, in_channels=1, classes=3, depth=3,
                              depth_dilation=1, depth_padding="edge")

    def curve():
        net = start.copy()
        return [record.loss for record in train.fit(
            net, lambda _: (images, labels), losses.dice_cross_entropy,
            optim.AdamW(net.parameters(), 1e-3), 5)]

    def noted(way, call):
        return lambda *args: taken.add(way) or call(*args)

    for module in (winograd, lines):  # wherever they save a product
        monkeypatch.setattr(module, "IMAGE", 0)
        monkeypatch.setattr(module, "KERNEL", 0)
    winograd.tiling.cache_clear()
    for way, name in ((winograd, "product"), (winograd, "weights"), (lines, "product"),
                      (lines, "weights"), (cpu.Columns, "gather")):
        monkeypatch.setattr(way, name, noted((way, name), getattr(way, name)))
    fast = curve()
    assert len(taken) == 5
    monkeypatch.setattr(cpu, "serves", lambda *_: False)
    plain = curve()
    assert plain[-1] < 0.6 * plain[0] and fast != plain
    np.testing.assert_allclose(fast, plain, rtol=5e-3)


def test_explain():
    """It says what runs: tiles, or groups of taps and how much of them is not padding."""
    plain = windows.explain((1, 16, 24, 24, 64), (3, 3, 3, 64, 64), Window.of((3, 3, 3), 1, 1))
    line = "Winograd: 144 tiles of 4x4x4, 216 products where 1728 would be direct"
    assert plain.splitlines() == [f"y  {line}", f"dx {line}", f"dw {line}"]
    window = Window.of((3, 3, 3), 1, 4, 4)
    far = windows.explain((1, 8, 12, 12, 512), (3, 3, 3, 512, 512), window)
    seen = (4 + 8 + 4) / 24 * ((8 + 12 + 8) / 36) ** 2
    assert far.splitlines()[0] == ("y  columns: 27 groups of 1 taps, 512 numbers wide, "
                                   f"{seen:.0%} of the products (the rest sees padding only)")
    deep = windows.explain((1, 12, 16, 12, 512), (3, 3, 3, 512, 512),
                           Window.of((3, 3, 3), 1, (1, 4, 4), (1, 4, 4)))
    line = ("Winograd along the first axis: 6 convolutions over the other axes for 4 outputs, "
            "where 12 would be direct")
    assert deep.splitlines() == [f"y  {line}", f"dx {line}", f"dw {line}"]
    flat = windows.explain((2, 8, 12, 12, 64), (1, 1, 1, 64, 32), Window.of((1, 1, 1), 2))
    product = "one matrix product: a kernel of one tap"
    assert flat.splitlines() == [f"y  {product}", "dx taps: 1 products, each added to a strided "
                                 "subgrid", f"dw {product}"]
    strided = windows.explain((1, 9, 9, 1), (3, 3, 1, 8), Window.of((3, 3), 2, 1))
    assert [line[:2] for line in strided.splitlines()] == ["y ", *["dx"] * 4, "dw"]
    assert "dx taps: 4 products, each added to a strided subgrid" in strided
    with pytest.raises(ValueError, match="2 spatial axes"):
        windows.explain((1, 9, 9, 1), (3, 3, 3, 1, 8), Window.of((3, 3, 3), 2, 1))


BEGINS = {"point": "one matrix", "lines": "Winograd along", "tiles": "Winograd:", "taps": "taps",
          "columns": "columns"}  # what is told of each way


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0, 90]), st.sets(st.sampled_from(cpu.SHORTER)),
       st.integers(0, 9))
def test_what_is_explained_is_what_runs(problem, cost, avoided, seed):
    """The functions that outputs and gradients in x are computed by, in number and name; they call
    one another along lines, which is no way of its own. Ways that are avoided are none of them, and
    change nothing else."""
    size, batch, channels, filters, window = problem
    x, w = arrays(size, batch, channels, filters, window.kernel, seed)
    y, ran, inside, found = windows.correlate(x, w, window), [], [], {}
    border = products.repeated(window)[1][1:]  # written out, it is a part of the grid
    window = products.repeated(window)[0]
    x = np.pad(x, [(0, 0), *border, (0, 0)], mode="edge")
    size = x.shape[1:-1]

    def noted(way, call):
        def noting(*args):
            if inside:
                return call(*args)
            ran.append(way)
            inside.append(way == "lines")
            try:
                return call(*args)
            finally:
                inside.clear()

        return noting

    with pytest.MonkeyPatch.context() as patch, windows.without(*avoided):
        for module in (winograd, lines):
            patch.setattr(module, "IMAGE", cost)
            patch.setattr(module, "KERNEL", cost)
        winograd.tiling.cache_clear()
        told = windows.explain(x.shape, w.shape, window).splitlines()
        for way, owner, name in (("point", cpu, "_points"), ("lines", lines, "product"),
                                 ("tiles", winograd, "product"), ("taps", cpu, "_taps"),
                                 ("columns", cpu, "_columns")):
            patch.setattr(owner, name, noted(way, getattr(owner, name)))
        for reading, call in (("y ", lambda: windows.correlate(x, w, window)),
                              ("dx", lambda: windows.correlate_dx(y, w, size, window))):
            ran.clear()
            found[reading] = call()
            mine = [line[3:] for line in told if line[:2] == reading]
            assert len(mine) == len(ran)
            for way in BEGINS:
                assert sum(line.startswith(BEGINS[way]) for line in mine) == ran.count(way)
        assert not any(line[3:].startswith(BEGINS[way]) for line in told for way in avoided)
        found["dw"] = windows.correlate_dw(x, y, window)
    x, w, y = (a.astype("float64") for a in (x, w, y))
    for reading, right in (("y ", reference.correlate(x, w, window)),
                           ("dx", reference.correlate_dx(y, w, size, window)),
                           ("dw", reference.correlate_dw(x, y, window))):
        np.testing.assert_allclose(found[reading], right, atol=2e-5 * max(1, abs(right).max()))


def test_ways_are_avoided_in_a_block_only():
    problem = (1, 16, 24, 24, 64), (3, 3, 3, 64, 64), Window.of((3, 3, 3), 1, 1)
    before = windows.explain(*problem)
    with pytest.raises(KeyError), windows.without("tiles"):
        with windows.without("lines"):
            inner = windows.explain(*problem)
        assert "tiles" not in windows.explain(*problem)
        raise KeyError
    assert before.count("Winograd") == 3 and "Winograd" not in inner
    assert inner.count("columns: ") == 3 and windows.explain(*problem) == before
    with pytest.raises(ValueError, match="found columns, winograd; expected some of point, lines"):
        with windows.without("columns", "winograd", "tiles"):
            raise AssertionError
    assert windows.explain(*problem) == before


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_pooling(channels, threads, seed):
    """Blocks are pooled apart: the same bits."""
    parallel.set_threads(threads)
    x, _ = arrays((7, 6, 9), 2, channels, 1, (1,), seed)
    window = Window.of((3, 2, 3), 2, (1, 0, (1, 2)), (1, 2, 1))
    y, winner = windows.maximum(x, window)
    truth = reference.maximum(x, window)
    assert (y == truth[0]).all() and (winner == truth[1]).all()
    alone, nothing = windows.maximum(x, window, taps=False)
    assert nothing is None and (alone == truth[0]).all() and alone.flags.c_contiguous
    dx = windows.maximum_adjoint(y, winner, (7, 6, 9), window)
    assert (dx == reference.maximum_adjoint(y, winner, (7, 6, 9), window)).all()


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1.0])
def test_pooling_where_nothing_is_larger(value):
    """No tap is larger than the padding, or windows see nothing else: nothing leaks elsewhere."""
    x = np.full((2, 4, 5, 3), value, "float32")
    window = Window.of((2, 2), 2, (3, (2, 5)))
    y, winner = windows.maximum(x, window)
    truth = reference.maximum(x, window)
    assert np.array_equal(y, truth[0], equal_nan=True) and (winner == truth[1]).all()
    assert np.array_equal(windows.maximum(x, window, taps=False)[0], y, equal_nan=True)
    g = np.random.default_rng(0).standard_normal(y.shape).astype("float32")
    dx = windows.maximum_adjoint(g, winner, (4, 5), window)
    assert np.allclose(dx, reference.maximum_adjoint(g, winner, (4, 5), window), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(placed(rank=3, size=7, dilation=3, padding=4), st.integers(1, 2), st.integers(1, 5),
       st.sampled_from([1, 50, 10**6]), st.integers(0, 99))
def test_pooling_without_taps(problem, batch, channels, block, seed):
    """One axis after another, in blocks of any size: the same bits, infinities and NaN too."""
    (size, window), rng = problem, np.random.default_rng(seed)
    if any(window.edge):
        window = dataclasses.replace(window, edge=(False,) * len(size))
    x = rng.integers(-2, 3, (batch, *size, channels)).astype("float32")
    for value in (np.nan, np.inf, -np.inf):
        x[rng.random(x.shape) < 0.05] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "BLOCK", block)
        ours, _ = windows.maximum(x, window, taps=False)
    np.testing.assert_array_equal(ours, reference.maximum(x, window)[0])


def test_no_tap_is_sought_where_nothing_is_recorded(monkeypatch):
    asked = []
    monkeypatch.setattr(cpu, "maximum", lambda x, window, taps: (
        asked.append(taps), pooling.maximum(x, window, taps=taps))[1])
    x = Tensor(np.random.default_rng(0).standard_normal((2, 6, 4, 3)).astype("float32"), True)
    with no_grad():
        ops.max_pool(x, kernel=2)
    ops.max_pool(x, kernel=2).sum().backward()
    assert asked == [False, True] and x.grad.sum() == 2 * 3 * 2 * 3


# Kernels that cannot change


def test_a_constant_kernel_is_transformed_once(monkeypatch):
    """As long as it lives, and tiles stay the same; answers are those of one that may change."""
    made, make = [], winograd.transformed
    monkeypatch.setattr(winograd, "transformed", lambda w, steps, width: (
        made.append(steps), make(w, steps, width))[1])
    x, w = arrays((12, 12, 12), 1, 16, 32, (3, 3, 3), 0)
    window = Window.of((3, 3, 3), padding=1)
    truth = windows.correlate(x, w, window)
    fixed = frozen(w.copy())
    gc.collect()  # of other tests
    made.clear()
    for _ in range(3):
        np.testing.assert_allclose(windows.correlate(x, fixed, window), truth, atol=1e-3)
    assert len(made) == 1
    assert products.kept(fixed, ("another",), lambda w: w[:1]).shape == (1, *w.shape[1:])
    assert [*products._kept] == [id(fixed)]  # what was made last, alone
    windows.correlate(x, fixed, window)
    assert len(made) == 2
    del fixed
    assert not products._kept


@pytest.mark.parametrize("some", [
    lambda w: w, lambda w: np.broadcast_to(w, w.shape), lambda w: frozen(w)[...]])
def test_what_may_change_is_not_kept(some):
    """An array that can be written, or that sees one which can, read-only or not."""
    x, w = arrays((12, 12, 12), 1, 16, 32, (3, 3, 3), 0)
    window, seen = Window.of((3, 3, 3), padding=1), some(w)
    gc.collect()
    before = windows.correlate(x, seen, window)
    assert not products._kept
    w.flags.writeable = True
    w *= 2
    np.testing.assert_allclose(windows.correlate(x, seen, window), 2 * before, rtol=1e-3, atol=1e-3)


def frozen(w):
    w.flags.writeable = False
    return w


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(5, 12)] * 3), st.tuples(*[st.integers(1, 5)] * 3),
       st.tuples(*[st.integers(1, 3)] * 3), st.tuples(*[st.integers(0, 3)] * 3),
       st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 2, 3, 99]),
       st.sampled_from([64, 1 << 19]), st.integers(0, 99))
def test_planes_are_shared_along_the_first_axis(size, kernel, stride, padding, batch, channels,
                                                deep, block, seed):
    """Of few channels, in boxes that end anywhere; the same where strides step over planes."""
    window = Window.of(kernel, stride, padding)
    x, w = arrays(size, batch, channels, 4, kernel, seed)
    seen = cpu.Columns(x, kernel, window.positions(size), stride, (1, 1, 1), padding)
    assert (seen.planes is not None) == (channels < 3 and stride[0] < kernel[0])
    with pytest.MonkeyPatch.context() as patch, windows.without(*cpu.SHORTER):
        patch.setattr(columns, "DEEP", deep)
        patch.setattr(columns, "BLOCK", block)
        check(x, w, window, seed)


@settings(max_examples=40, deadline=None)
@given(filters_of_three(), st.integers(1, 2), st.integers(1, 7), st.integers(1, 7),
       st.integers(0, 99))
def test_constant_kernels(problem, batch, channels, filters, seed):
    """Whatever tiling is chosen when the transform is free."""
    size, window = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "pairs", lambda *_: np.inf)
        patch.setattr(lines, "outputs", lambda *_: 0)
        winograd.tiling.cache_clear()
        x, w = arrays(size, batch, channels, filters, window.kernel, seed)
        check(x, frozen(w), window, seed)


# Threads


def test_threads_are_a_setting():
    parallel.set_threads(3)
    assert parallel.threads() == 3
    parallel.set_threads(0)
    assert parallel.threads() >= 1
    for wrong in (-1, 1.5, "2", None):
        with pytest.raises(ValueError, match="from 0"):
            parallel.set_threads(wrong)


@pytest.mark.parametrize("threads", [1, 3])
def test_run(threads):
    """Every item once, by all threads at once; BLAS has one meanwhile; an inner run goes alone."""
    parallel.set_threads(threads)
    done, inner, blas, names = [], [], set(), set()
    together = threading.Barrier(threads)

    def job(item):
        if item <= threads:
            together.wait(60)
        done.append(item)
        names.add(threading.current_thread().name)
        blas.update(blas_threads())
        parallel.run(inner.append, [item, -item])
        return item**2

    before = threadpool_info()
    assert parallel.run(job, range(1, 20)) == [item**2 for item in range(1, 20)]
    assert sorted(done) == list(range(1, 20)) and sorted(map(abs, inner)) == sorted(2 * done)
    names.remove(threading.current_thread().name)
    assert len(names) == threads - 1 and all(name.startswith("tinyseg") for name in names)
    assert blas == {1}
    assert [i["num_threads"] for i in threadpool_info()] == [i["num_threads"] for i in before]


def blas_threads():
    """Of NumPy's BLAS: SciPy has one of its own, which nothing here multiplies with and which is
    not loaded before SciPy's is asked for."""
    return [i["num_threads"] for i in threadpool_info()
            if i["user_api"] == "blas" and "scipy.libs" not in i["filepath"]]


@pytest.mark.parametrize("first_out", ["first in", "last in"])
def test_blas_has_one_thread_while_anyone_is_inside(first_out):
    """Two threads overlap in either way; who limited BLAS need not be the last to leave."""
    with threadpool_limits(2, "blas"):
        before = blas_threads()
        if max(before) < 2:
            pytest.skip("this BLAS has one thread only")
        a_inside, b_inside, one_left, seen = (*(threading.Event() for _ in range(3)), [])

        def a():
            parallel.run(lambda _: (a_inside.set(), b_inside.wait(60), wait_if("last in")), [0])
            one_left.set()

        def b():
            a_inside.wait(60)
            parallel.run(lambda _: (b_inside.set(), wait_if("first in")), [0])
            one_left.set()

        def wait_if(first):
            if first == first_out:
                one_left.wait(60)
                seen.append(blas_threads())

        threads = [threading.Thread(target=target) for target in (a, b)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [[1] * len(before)] and blas_threads() == before
        for _ in range(2):  # and later, from here
            parallel.run(lambda _: seen.append(blas_threads()), [0])
            assert seen[-1] == [1] * len(before) and blas_threads() == before


def test_blas_is_given_back_after_an_error():
    before = blas_threads()
    with pytest.raises(ZeroDivisionError):
        parallel.run(lambda n: 1 / n, [0])
    assert blas_threads() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_process_forked_meanwhile_gets_its_blas_back():
    """Its parent's other thread was inside, and held the lock for all that it can tell."""
    with threadpool_limits(2, "blas"):
        before, inside, done = blas_threads(), threading.Event(), threading.Event()
        thread = threading.Thread(target=parallel.run, args=(
            lambda _: (inside.set(), done.wait(60)), [0]))
        thread.start()
        inside.wait(60)
        with parallel._one_blas_thread.lock:
            child = os.fork()
            if not child:
                threading.Timer(30, os._exit, [2]).start()  # if it hangs
                parallel.run(abs, [1])
                os._exit(blas_threads() != before)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        done.set()
        thread.join()
        assert blas_threads() == before


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc",
                    reason="a setting of glibc")
def test_freed_memory_is_kept():
    """After the first run, arrays of 48 MiB are paged in once, not in every turn; what lies before
    one that lives is given back by `release`."""
    script = """
import resource
import numpy as np
from tinyseg import parallel
parallel.run(abs, [1])
for _ in range(3):
    began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(12 << 20, "float32") for _ in range(3)]
    del arrays
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began)

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

large, small = np.ones(12 << 20, "float32"), np.ones(1 << 20, "float32")
del large
before = held()
parallel.release()
print(before - held())
"""
    first, *later, released = map(int, subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split())
    assert first > 20 and max(later) < first / 4 and released > 40


def test_an_error_in_a_thread_is_raised():
    parallel.set_threads(2)

    def job(item):
        if item == 3:
            raise KeyError(item)

    with pytest.raises(KeyError, match="3"):
        parallel.run(job, range(5))
    done = []
    parallel.run(done.append, range(5))
    assert sorted(done) == list(range(5))


def _child(queue):
    x, w = arrays((9, 16, 17), 1, 64, 64, (3, 3, 3), 4)
    queue.put(windows.correlate(x, w, Window.of((3, 3, 3), 1, 1)).tobytes())


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_in_another_process(method):
    """A worker that was forked after the pool had threads makes its own, and nothing hangs."""
    parallel.set_threads(0)
    x, w = arrays((9, 16, 17), 1, 64, 64, (3, 3, 3), 4)
    here = windows.correlate(x, w, Window.of((3, 3, 3), 1, 1)).tobytes()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,), daemon=True)
    child.start()
    assert queue.get(timeout=120) == here
    child.join(timeout=60)
    assert child.exitcode == 0


def test_every_thread_has_a_larger_product_first(monkeypatch):
    """Once for a number of threads, and nobody else's threads at BLAS meanwhile: OpenBLAS writes
    the buffer of each."""
    taken, multiply = [], np.matmul

    def noted(a, b, **options):
        if (len(a), *b.shape) == (256, 512, 1024):
            taken.append((threading.get_ident(), {
                info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"}))
        return multiply(a, b, **options)

    monkeypatch.setattr(np, "matmul", noted)
    monkeypatch.setattr(parallel._one_blas_thread, "libraries", None)  # SciPy's, loaded since, too
    parallel.set_threads(2)
    parallel._prepare.cache_clear()
    for _ in range(2):
        assert parallel.run(lambda i: i, range(3)) == [0, 1, 2]
    assert len(taken) == 2 and len({thread for thread, _ in taken}) == 2
    assert all(threads <= {1} for _, threads in taken)
