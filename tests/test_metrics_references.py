"""Our measures beside the packages that define them, on random blobs and on real label maps."""

import warnings
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from tinyseg import metrics
from tinyseg.data import nifti
from tinyseg.facets import facets

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TOLERANCES = (0.0, 0.5, 1.0, 2.0, 3.5, 5.0)
real = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real label maps beside the project")


@pytest.fixture
def theirs(monkeypatch):
    """DeepMind's package, which still names things that NumPy 2 and SciPy have moved."""
    package = pytest.importorskip("surface_distance", reason="needs surface-distance")
    monkeypatch.setattr(np, "Inf", np.inf, raising=False)
    monkeypatch.setattr(np, "NaN", np.nan, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield package


def blob(rng, shape, smooth=2.0, level=0.0):
    field = ndimage.gaussian_filter(rng.standard_normal(shape), smooth)
    return field > level * field.std()


def check(package, prediction, reference, spacing):
    """All measures equal to 1e-6; both masks hold something."""
    far = package.compute_surface_distances(reference, prediction, spacing)
    ours = metrics.surface_distances(prediction, reference, spacing)
    for name, side in (("gt", ours.reference), ("pred", ours.prediction)):
        assert side.areas.sum() == pytest.approx(far[f"surfel_areas_{name}"].sum(), abs=1e-6)
    for tolerance in TOLERANCES:
        assert metrics.surface_dice(prediction, reference, spacing, tolerance) == pytest.approx(
            package.compute_surface_dice_at_tolerance(far, tolerance), abs=1e-6)
    for percent in (50, 95, 100):
        assert max(ours.percentiles(percent)) == pytest.approx(
            package.compute_robust_hausdorff(far, percent), abs=1e-6)
    assert metrics.hausdorff95(prediction, reference, spacing) == max(ours.percentiles(95))
    pair = package.compute_average_surface_distance(far)
    assert ours.averages()[::-1] == pytest.approx(pair, abs=1e-6)
    assert metrics.mean_surface_distance(prediction, reference, spacing) == pytest.approx(
        sum(pair) / 2, abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_random_blobs(theirs, seed):
    """Of rank 3 and 2, in spacings of all kinds, through the borders of the array."""
    rng = np.random.default_rng(seed)
    for rank, spacing in ((3, rng.uniform(0.4, 5, 3)), (3, (2.5, 0.8, 0.8)), (3, (1, 1, 1)),
                          (2, rng.uniform(0.4, 5, 2)), (2, (0.7, 0.7))):
        shape = rng.integers(6, 30, rank)
        smooth, level = rng.uniform(0, 3), rng.uniform(-1, 1)
        p, r = (blob(rng, shape, smooth, level) for _ in range(2))
        p.flat[0] = r.flat[-1] = True
        check(theirs, p, r, spacing)


def test_every_neighbour_code(theirs):
    """Noise holds all 256 (and all 16), so every area is compared, each with its own weight."""
    rng = np.random.default_rng(0)
    for rank, spacing in ((3, (0.7, 1.1, 3.1)), (2, (0.7, 3.1))):
        table = {3: theirs.lookup_tables.create_table_neighbour_code_to_surface_area,
                 2: theirs.lookup_tables.create_table_neighbour_code_to_contour_length}[rank]
        weights = np.prod(spacing) / np.array(spacing)
        areas = np.linalg.norm(facets(rank) * weights, axis=-1).sum(axis=-1)
        assert areas == pytest.approx(table(spacing), abs=1e-12)  # any order of bits will do
        noise = rng.random((2, *(24,) * rank)) < 0.5
        check(theirs, *noise, spacing)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.5, 0.8)])
def test_small_and_full_masks(theirs, spacing):
    shape = (5, 6, 7)
    full, corner, middle = np.ones(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool)
    corner[0, 0, 0], middle[2, 3, 3] = True, True
    shell = full.copy()
    shell[1:-1, 1:-1, 1:-1] = False
    for p in (full, corner, middle, shell):
        for r in (full, corner, middle, shell):
            check(theirs, p, r, spacing)


def test_empty_masks(theirs):
    """What the package defines; one of its averages is then 0 / 0, which we call infinite too."""
    none, some = np.zeros((4, 5, 6), bool), np.zeros((4, 5, 6), bool)
    some[1:3, 2:4, 2:5] = True
    for p, r in ((none, some), (some, none), (none, none)):
        far = theirs.compute_surface_distances(r, p, (1, 2, 3))
        want = theirs.compute_surface_dice_at_tolerance(far, 5)
        assert metrics.surface_dice(p, r, (1, 2, 3), 5) == pytest.approx(want, nan_ok=True)
        if p.any() or r.any():
            assert metrics.hausdorff95(p, r, (1, 2, 3)) == np.inf
            assert theirs.compute_robust_hausdorff(far, 95) == np.inf
            assert np.inf in theirs.compute_average_surface_distance(far)
            assert metrics.mean_surface_distance(p, r, (1, 2, 3)) == np.inf


@real
def test_hippocampi(theirs):
    """Each one's anterior and posterior part against those of the next patient."""
    folder = DATA / "msd_task04_hippocampus" / "labelsTr"
    paths = [path for path in sorted(folder.glob("*.nii*")) if not path.name.startswith(".")]
    maps = [nifti.read(path, "uint8") for path in islice(paths, 0, None, 20)]
    assert len(maps) > 5
    for one, other in zip(maps, maps[1:], strict=False):
        box = tuple(map(slice, np.minimum(one.array.shape, other.array.shape)))
        for number in (1, 2):
            masks = [volume.array[box] == number for volume in (one, other)]
            check(theirs, *masks, one.spacing)
            check(theirs, *masks, (2.5, 0.8, 0.7))


@real
def test_organs_of_a_ct(theirs):
    """Organs against one another, far apart too, and against themselves moved and grown."""
    volume = nifti.read(DATA / "ct_totalsegmentator_example" / "ts_example_organs15.nii.gz",
                        "uint8")
    organs = {n: volume.array == n for n in np.unique(volume.array).tolist() if n}
    assert len(organs) > 10
    for one, other in islice(combinations(organs, 2), 0, None, 23):
        check(theirs, organs[one], organs[other], volume.spacing)
    for mask in islice(organs.values(), 0, None, 4):
        other = np.roll(ndimage.binary_dilation(mask), (1, -2, 3), axis=(0, 1, 2))
        check(theirs, mask, other, volume.spacing)


@real
def test_slices_of_pancreas(theirs):
    """Contours in the plane: each slice against the next one."""
    paths = sorted((DATA / "nih_pancreas_ct_slices").glob("mask_*.npy"))
    masks = [np.load(path) > 0 for path in paths]
    assert len(masks) == 15
    for one, other in zip(masks, masks[1:], strict=False):
        check(theirs, one.squeeze(), other.squeeze(), (0.8, 0.8))
        check(theirs, one.squeeze(), other.squeeze(), (0.7, 1.3))


@pytest.fixture(scope="module")
def monai():
    torch = pytest.importorskip("torch", reason="MONAI needs torch")
    package = pytest.importorskip("monai.metrics", reason="needs monai")

    def batch(mask):
        return torch.tensor(mask)[None, None]

    return package, batch


@pytest.mark.parametrize("seed", range(5))
def test_dice_and_iou_equal_monais(monai, seed):
    package, batch = monai
    rng = np.random.default_rng(seed)
    p, r = (blob(rng, (9, 10, 11), rng.uniform(0, 2), rng.uniform(-1, 1)) for _ in range(2))
    none = np.zeros_like(p)
    # Where the reference is empty MONAI tells NaN even of a prediction that deserves a 0.
    for pair in ((p, r), (r, p), (p, p), (none, r), (none, none)):
        tensors = [batch(mask) for mask in pair]
        for ours, theirs in ((metrics.dice, package.compute_dice),
                             (metrics.iou, package.compute_iou)):
            assert ours(*pair) == pytest.approx(theirs(*tensors).item(), abs=1e-6, nan_ok=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 0.8, 0.7)])
def test_surface_dice_equals_monais_with_subvoxels(monai, spacing):
    package, batch = monai
    rng = np.random.default_rng(3)
    p, r = (blob(rng, (18, 20, 22)) for _ in range(2))
    for tolerance in (0.6, 1.5, 3.0):
        want = package.compute_surface_dice(batch(p), batch(r), [tolerance], spacing=spacing,
                                            include_background=True, use_subvoxels=True).item()
        assert metrics.surface_dice(p, r, spacing, tolerance) == pytest.approx(want, abs=1e-6)
