"""Measures of agreement against sets, boxes, spheres and brute force, and what is undefined."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tinyseg import metrics
from tinyseg.facets import facets

nan, inf = math.nan, math.inf
masks = array_shapes(max_dims=3, max_side=4).flatmap(
    lambda shape: st.tuples(arrays(bool, shape), arrays(bool, shape)))
steps = st.sampled_from([0.5, 0.7, 0.8, 1.0, 1.25, 2.5, 3.0])


@st.composite
def spaced(draw):
    """Two masks of rank 2 or 3, neither empty, and a spacing."""
    shape = draw(array_shapes(min_dims=2, max_dims=3, max_side=5))
    pair = [draw(arrays(bool, shape).filter(np.any)) for _ in range(2)]
    return *pair, tuple(draw(steps) for _ in shape)


def measures(prediction, reference, spacing, tolerance=1.0):
    return np.array([metrics.surface_dice(prediction, reference, spacing, tolerance),
                     metrics.hausdorff95(prediction, reference, spacing),
                     metrics.mean_surface_distance(prediction, reference, spacing)])


def solid(shape, start, stop):
    mask = np.zeros(shape, bool)
    mask[tuple(map(slice, start, stop))] = True
    return mask


def ball(radius, spacing, shape, moved=0.0):
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    axes[0] = axes[0] - moved
    return sum(x * x for x in np.meshgrid(*axes, indexing="ij", sparse=True)) <= radius**2


@given(masks)
def test_overlap_equals_that_of_sets(pair):
    p, r = ({tuple(v) for v in np.argwhere(mask)} for mask in pair)
    dice, iou = metrics.dice(*pair), metrics.iou(*pair)
    if not p | r:
        assert math.isnan(dice) and math.isnan(iou)
        return
    assert dice == 2 * len(p & r) / (len(p) + len(r))
    assert iou == len(p & r) / len(p | r)
    assert dice == metrics.dice(*pair[::-1]) and dice == pytest.approx(2 * iou / (1 + iou))
    assert isinstance(dice, float) and isinstance(iou, float)


UNIT_AREAS = {  # of the marching-cubes surface that cuts these corners off from the other ones
    ((0, 0, 0),): math.sqrt(3) / 8,
    ((0, 0, 0), (0, 0, 1)): math.sqrt(1 / 2),
    ((0, 0, 0), (0, 0, 1), (0, 1, 0)): 1 / 2 + 3 / 8 * math.sqrt(3),  # bent once
    ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)): 1.0,
    ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)): 3 / 4 * math.sqrt(3),  # a regular hexagon
    ((1, 0, 0), (0, 0, 0), (0, 0, 1), (0, 1, 1)): math.sqrt(3 / 4) + math.sqrt(1 / 2),  # bent twice
    ((0, 0, 0), (0, 1, 1)): 2 * math.sqrt(3) / 8,
    ((0, 0, 0), (1, 1, 1)): 2 * math.sqrt(3) / 8,
    ((0, 0, 0), (0, 1, 1), (1, 0, 1)): 3 * math.sqrt(3) / 8,
    ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)): 4 * math.sqrt(3) / 8,
    ((0, 0, 0), (0, 0, 1), (1, 1, 0)): math.sqrt(1 / 2) + math.sqrt(3) / 8,
    ((0, 0, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1)): 2 * math.sqrt(1 / 2),
    ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 1, 1)): 1 / 2 + math.sqrt(3) / 2,
}


def test_the_fourteen_ways_to_cut_a_cube():
    """Every one of the 256 neighbour codes is one of these, turned, mirrored or complemented."""
    table = np.linalg.norm(facets(3), axis=-1).sum(axis=-1)
    seen = {0: 0.0, 255: 0.0}
    for corners, area in UNIT_AREAS.items():
        for order in itertools.permutations(range(3)):
            for flip in itertools.product((0, 1), repeat=3):
                turned = [[corner[a] ^ flip[a] for a in order] for corner in corners]
                code = sum(1 << (4 * i + 2 * j + k) for i, j, k in turned)
                seen[code] = seen[255 - code] = area
    assert sorted(seen) == list(range(256))
    assert np.allclose(table, [seen[code] for code in range(256)], rtol=1e-14)


@given(st.tuples(*[st.integers(1, 5)] * 3), st.tuples(steps, steps, steps), st.integers(2, 3))
def test_the_surface_of_a_box(size, spacing, rank):
    """Faces, edges cut at 45 degrees of the grid, and corners: an octahedron for one voxel."""
    n, s = size[:rank], np.array(spacing[:rank])
    both = metrics.surface_distances(np.ones(n, bool), np.ones(n, bool), s)
    surface = both.prediction
    assert (surface.distances == 0).all() and (surface.areas == both.reference.areas).all()
    assert len(surface.areas) == np.prod(np.add(n, 1)) - np.prod(np.subtract(n, 1))
    length = (np.array(n) - 1) * s
    if rank == 2:
        want = 2 * length.sum() + 2 * np.hypot(*s)
    else:
        want = math.sqrt(sum((s.prod() / x) ** 2 for x in s))
        for a, b, c in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
            want += 2 * length[a] * length[b] + 2 * length[c] * np.hypot(s[a], s[b])
    assert surface.areas.sum() == pytest.approx(want, rel=1e-12)


def border(mask):
    """Points at which voxels of the mask and others meet, in voxels, one by one."""
    found = []
    for point in itertools.product(*[range(n + 1) for n in mask.shape]):
        around = [all(0 <= i < n for i, n in zip(at, mask.shape, strict=True)) and bool(mask[at])
                  for at in itertools.product(*[(i - 1, i) for i in point])]
        if any(around) and not all(around):
            found.append(point)
    return np.array(found)


@settings(max_examples=50)
@given(spaced())
def test_distances_equal_brute_force(case):
    p, r, spacing = case
    a, b = border(p) * spacing, border(r) * spacing
    between = np.linalg.norm(a[:, None] - b, axis=-1)
    both = metrics.surface_distances(p, r, spacing)
    assert np.allclose(both.prediction.distances, np.sort(between.min(axis=1)), atol=1e-12)
    assert np.allclose(both.reference.distances, np.sort(between.min(axis=0)), atol=1e-12)


@settings(max_examples=50)
@given(spaced(), st.sampled_from([0.31, 0.99, 1.73, 2.61]))  # no distances between voxels
def test_what_does_not_change_the_measures(case, tolerance):
    p, r, spacing = case
    want = measures(p, r, spacing, tolerance)
    assert np.isfinite(want).all() and (want >= 0).all() and want[0] <= 1

    def same(*other):
        return np.allclose(measures(*other), want, rtol=1e-12)

    assert same(r, p, spacing, tolerance)
    assert same(np.pad(p, ((2, 0),) * p.ndim), np.pad(r, ((2, 0),) * p.ndim), spacing, tolerance)
    assert same(np.flip(p), np.flip(r), spacing, tolerance)
    double = measures(p, r, np.multiply(2, spacing), 2 * tolerance)
    assert np.allclose(double, want * (1, 2, 2), rtol=1e-14)


@settings(max_examples=50)
@given(spaced(), st.lists(st.floats(0, 20), min_size=2))
def test_surface_dice_grows_with_the_tolerance(case, tolerances):
    p, r, spacing = case
    shares = [metrics.surface_dice(p, r, spacing, t) for t in sorted(tolerances)]
    assert shares == sorted(shares)
    assert metrics.surface_dice(p, r, spacing, 100.0) == 1
    assert metrics.surface_dice(p, p, spacing, 0.0) == 1
    assert measures(p, p, spacing).tolist() == [1, 0, 0]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 0.8, 0.7)])
@pytest.mark.parametrize("axis, moved", [(0, 1), (0, 3), (1, 2), (2, 5)])
def test_a_box_that_is_moved(axis, moved, spacing):
    """Its leading face is as far from where it was as it moved, and nothing is farther."""
    start, stop = np.array([2, 3, 4]), np.array([9, 12, 11])
    way = moved * np.eye(3, dtype=int)[axis]
    p, r = (solid((16, 18, 20), start + w, stop + w) for w in (way, 0 * way))
    told = moved * spacing[axis]
    assert metrics.hausdorff95(p, r, spacing) == pytest.approx(told, rel=1e-15)
    assert metrics.surface_dice(p, r, spacing, told * 1.001) == 1
    assert metrics.surface_dice(p, r, spacing, told * 0.999) < 1
    assert metrics.surface_distances(p, r, spacing).averages() == pytest.approx(
        metrics.surface_distances(r, p, spacing).averages())
    assert 0 < metrics.mean_surface_distance(p, r, spacing) < told


def test_masks_that_lie_apart():
    """Two single voxels: every surfel of an octahedron, and its distance, by hand."""
    p, r = np.zeros((2, 1, 1, 8), bool)
    p[0, 0, 1], r[0, 0, 6] = True, True
    spacing = (2.0, 3.0, 0.5)
    both = metrics.surface_distances(p, r, spacing)
    assert both.prediction.distances.tolist() == [2.0] * 4 + [2.5] * 4
    assert both.averages() == (2.25, 2.25) and both.percentiles(50) == (2.0, 2.0)
    assert metrics.hausdorff95(p, r, spacing) == 2.5
    assert metrics.surface_dice(p, r, spacing, tolerance=2.2) == 0.5


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.5), (1.0, 0.5, 0.4)])
def test_concentric_balls(spacing):
    shape = [int(2 * 15 / s) for s in spacing]
    p, r = ball(13, spacing, shape), ball(9, spacing, shape)
    both = metrics.surface_distances(p, r, spacing)
    blur = np.linalg.norm(spacing)  # a surfel lies within half a voxel's diagonal of its sphere
    for side, radius in ((both.prediction, 13), (both.reference, 9)):
        assert 1 < side.areas.sum() / (4 * math.pi * radius**2) < 1.2  # stairs
        assert abs(side.distances - 4).max() < blur
    assert both.averages() == pytest.approx((4, 4), abs=blur / 2)
    assert metrics.hausdorff95(p, r, spacing) == pytest.approx(4, abs=blur)
    assert metrics.surface_dice(p, r, spacing, 4 - blur) == 0
    assert metrics.surface_dice(p, r, spacing, 4 + blur) == 1
    assert metrics.volume(p, spacing) == pytest.approx(4 / 3 * math.pi * 1.3**3, rel=0.01)


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.5), (1.0, 0.5, 0.4)])
def test_a_ball_that_is_moved(spacing):
    """On a sphere the cosine u to an axis is uniform, so all measures are integrals over it."""
    radius, moved, shape = 14, 7.0, [int(44 / s) for s in spacing]
    p, r = ball(radius, spacing, shape, moved), ball(radius, spacing, shape)
    u, blur = np.linspace(-1, 1, 10_001), np.linalg.norm(spacing) / 2
    away = abs(np.sqrt(radius**2 + moved**2 + 2 * radius * moved * u) - radius)
    dice, percentile, average = measures(p, r, spacing, tolerance=3.5)
    assert dice == pytest.approx((away <= 3.5).mean(), abs=blur / 7)
    assert percentile == pytest.approx(np.percentile(away, 95), abs=blur)
    assert average == pytest.approx(away.mean(), abs=blur)


def test_a_mask_that_fills_the_array_has_a_surface():
    p = np.ones((3, 4, 5), bool)
    want = measures(np.pad(p, 1), np.pad(solid(p.shape, (0, 0, 0), (3, 4, 3)), 1), (1, 2, 3), 2)
    got = measures(p, solid(p.shape, (0, 0, 0), (3, 4, 3)), (1, 2, 3), 2)
    assert (got == want).all() and got[1] == 6


def test_empty_masks():
    none, some = np.zeros((2, 3), bool), np.eye(2, 3, dtype=bool)
    assert metrics.dice(none, some) == metrics.dice(some, none) == metrics.iou(none, some) == 0
    assert math.isnan(metrics.dice(none, none)) and metrics.dice(some, some) == 1
    for shape, spacing in (((2, 3), (1.0, 2.0)), ((2, 3, 1), (1.0, 2.0, 3.0))):
        none, some = np.zeros(shape, bool), np.ones(shape, bool)
        assert np.isnan(measures(none, none, spacing)).all()
        assert measures(none, some, spacing).tolist() == [0, inf, inf]
        assert measures(some, none, spacing).tolist() == [0, inf, inf]
        assert all(type(m) is float for m in (metrics.surface_dice(none, some, spacing, 1),
                                              metrics.hausdorff95(some, some, spacing),
                                              metrics.mean_surface_distance(some, some, spacing)))


@pytest.mark.parametrize("measure", [
    metrics.dice, metrics.iou, lambda p, r: metrics.surface_dice(p, r, (1, 1), 1),
    lambda p, r: metrics.hausdorff95(p, r, (1, 1)),
    lambda p, r: metrics.mean_surface_distance(p, r, (1, 1))])
def test_wrong_masks(measure):
    mask = np.ones((2, 3), bool)
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 3\)"):
        measure(mask.T, mask)
    with pytest.raises(ValueError, match="expected bool"):
        measure(mask.astype(int), mask)
    with pytest.raises(ValueError, match="expected bool"):
        measure(mask, mask * 0.5)


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, -1, 1), (1, nan, 1), (inf, 1, 1), 1,
                                     (1, 1, 1, 1)])
def test_wrong_spacing(spacing):
    mask = np.ones((2, 3, 4), bool)
    for measure in (lambda: metrics.hausdorff95(mask, mask, spacing),
                    lambda: metrics.volume(mask, spacing)):
        with pytest.raises(ValueError, match="spacing.*3 positive numbers"):
            measure()


def test_wrong_ranks_and_tolerances():
    for shape in ((4,), (2, 2, 2, 2), ()):
        mask = np.ones(shape, bool)
        with pytest.raises(ValueError, match="2 or 3 axes"):
            metrics.hausdorff95(mask, mask, (1.0,) * mask.ndim)
    with pytest.raises(ValueError, match="three axes"):
        metrics.volume(np.ones((2, 2), bool), (1, 1))
    with pytest.raises(ValueError, match="expected bool"):
        metrics.volume(np.ones((2, 2, 2)), (1, 1, 1))
    mask = np.ones((2, 2), bool)
    for tolerance in (-1.0, nan, inf):
        with pytest.raises(ValueError, match="tolerance"):
            metrics.surface_dice(mask, mask, (1, 1), tolerance)


def test_volume_in_millilitres():
    mask = solid((20, 20, 20), (0, 0, 0), (10, 10, 20))
    assert metrics.volume(mask, (2.5, 1.0, 0.5)) == 2.5
    assert metrics.volume(~mask & mask, (2.5, 1.0, 0.5)) == 0


def test_per_class_skips_the_background():
    prediction, reference = np.array([0, 1, 1, 2, 0]), np.array([0, 1, 2, 2, 0], np.uint8)
    scores = metrics.per_class(prediction, reference, {0: "none", 1: "organ", 2: "lesion", 3: "x"})
    assert list(scores) == ["organ", "lesion", "x"]
    assert scores["organ"] == {"dice": 2 / 3, "iou": 0.5} == scores["lesion"]
    assert math.isnan(scores["x"]["dice"])
    with pytest.raises(ValueError, match="shape"):
        metrics.per_class(prediction[:4], reference, {1: "organ"})


def test_per_class_measures_surfaces_where_it_is_told_the_spacing():
    rng = np.random.default_rng(0)
    prediction, reference = rng.integers(0, 3, (2, 5, 6, 7))
    labels, spacing = {0: "none", 1: "organ", 2: "lesion", 3: "x"}, (2.0, 0.8, 0.7)
    scores = metrics.per_class(prediction, reference, labels, spacing=spacing, tolerance=0.75)
    for number, name in ((1, "organ"), (2, "lesion")):
        p, r = prediction == number, reference == number
        want = dict(zip(("surface_dice", "hausdorff95", "mean_surface_distance"),
                        measures(p, r, spacing, 0.75), strict=True))
        assert scores[name] == want | {
            "dice": metrics.dice(p, r), "iou": metrics.iou(p, r),
            "prediction_ml": p.sum() * 1.12e-3, "reference_ml": r.sum() * 1.12e-3}
    assert {m for m, value in scores["x"].items() if value == 0} == {"prediction_ml",
                                                                     "reference_ml"}
    bare = metrics.per_class(prediction, reference, labels, spacing=spacing)
    assert "surface_dice" not in bare["organ"] and "hausdorff95" in bare["organ"]
    with pytest.raises(ValueError, match="without a spacing"):
        metrics.per_class(prediction, reference, labels, tolerance=1.0)


def test_the_mean_leaves_undefined_cases_out():
    cases = {"a": {"organ": {"dice": 0.5, "iou": 0.2}, "lesion": {"dice": nan}},
             "b": {"organ": {"dice": 1.0, "iou": nan}, "lesion": {"dice": nan}},
             "c": {"organ": {"dice": nan, "iou": nan}}}
    result = metrics.mean(cases)
    assert result["organ"] == {"dice": 0.75, "iou": 0.2}
    assert math.isnan(result["lesion"]["dice"])
    assert metrics.mean({}) == {}


def test_the_mean_leaves_missed_cases_out_and_counts_tell():
    none, one, two = np.zeros((1, 1, 9), int), *np.eye(9, dtype=int)[[1, 4], None, None]
    pairs = {"found": (one, two), "equal": (two, two), "missed": (none, one),
             "invented": (two, none), "absent": (none, none)}
    cases = {name: metrics.per_class(*pair, {1: "organ"}, (10, 10, 2), 1)
             for name, pair in pairs.items()}
    result = metrics.mean(cases)["organ"]
    assert result["dice"] == 0.25 and result["surface_dice"] == 0.25  # of four, all but "absent"
    assert result["hausdorff95"] == 3.0  # of two, "found" and "equal"
    assert result["prediction_ml"] == pytest.approx(3 / 5 * 0.2)
    assert metrics.counts(cases) == {"organ": {
        "cases": 5, "empty_predictions": 2, "empty_references": 2, "infinite_distances": 2}}
    assert math.isnan(metrics.mean({"missed": cases["missed"]})["organ"]["hausdorff95"])
    assert metrics.counts({}) == {}
