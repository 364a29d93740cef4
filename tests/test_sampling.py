"""Patches: what is guaranteed of every one, and that storing changes nothing."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyseg.data import augment, decathlon, nifti, phantom, sampling
from tinyseg.data.ct import Plan

sizes = st.tuples(*[st.integers(1, 9)] * 3)


def prepared(shape=(6, 8, 10), channels=2, name="case", foreground=True):
    """Every voxel knows where it is: image[..., 0] counts voxels, so patches can be located."""
    label = np.zeros(shape, np.uint8)
    if foreground:
        label[shape[0] // 2, :, :] = 1
        label[-1, -1, -1] = 2
    count = np.arange(label.size, dtype=np.float16).reshape(shape)
    image = np.stack([count + c for c in range(channels)], -1)
    coordinates = {int(c): np.argwhere(label == c) for c in np.unique(label[label > 0])}
    return sampling.Prepared(name, image, label, coordinates)


@given(shape=sizes, size=sizes, value=st.sampled_from([None, 255]))
def test_padding_is_centred_and_undone_by_its_slices(shape, size, value):
    array = np.random.default_rng(0).integers(0, 9, (*shape, 2))
    padded, slices = sampling.pad(array, size, value)
    assert padded.shape == (*np.maximum(shape, size), 2)
    np.testing.assert_array_equal(padded[slices], array)
    for n, want, cut in zip(shape, size, slices, strict=True):
        before, after = cut.start, max(n, want) - cut.stop
        assert after - before in (0, 1)
    if all(n >= want for n, want in zip(shape, size, strict=True)):
        assert padded is array
    elif value is None:
        index = np.ix_(*[np.clip(np.arange(m) - cut.start, 0, n - 1)
                         for m, cut, n in zip(padded.shape, slices, shape, strict=False)])
        np.testing.assert_array_equal(padded, array[index])
    else:
        assert (padded == 255).sum() == padded.size - array.size


@settings(max_examples=50, deadline=None)
@given(shape=sizes, size=sizes, seed=st.integers(0, 999), foreground=st.sampled_from([0, 0.5, 1]))
def test_a_patch_is_a_window_of_the_volume(shape, size, seed, foreground):
    case = prepared(shape)
    image, labels = sampling.patch(case, size, np.random.default_rng(seed), foreground)
    assert image.shape == (*size, 2) and image.dtype == np.float32
    assert labels.shape == size and labels.dtype == np.uint8
    np.testing.assert_array_equal(image[..., 1], image[..., 0] + 1)
    inside = labels != sampling.IGNORE
    flat = image[inside][:, 0].astype(int)
    np.testing.assert_array_equal(labels[inside], case.label.ravel()[flat])
    assert inside.sum() == np.prod(np.minimum(shape, size))  # no more padding than there must be
    if foreground == 1:
        assert (labels[inside] > 0).any()


def test_the_centre_is_a_voxel_of_a_class_drawn_uniformly():
    case = prepared((11, 11, 11))
    case.label[:] = 0
    case.label[5, 5, 5], case.label[3:8, 3, 3] = 2, 1
    case.foreground = {1: np.argwhere(case.label == 1), 2: np.argwhere(case.label == 2)}
    rng = np.random.default_rng(0)
    centres = [sampling.patch(case, (3, 3, 3), rng, 1.0)[1][1, 1, 1] for _ in range(400)]
    assert set(centres) == {1, 2} and 160 < centres.count(2) < 240


def test_uniform_patches_reach_every_corner():
    case, rng = prepared((3, 4, 5)), np.random.default_rng(0)
    starts = {int(sampling.patch(case, (2, 2, 2), rng, 0)[0][0, 0, 0, 0]) for _ in range(600)}
    expected = {d * 20 + h * 5 + w for d in range(2) for h in range(3) for w in range(4)}
    assert starts == expected


@pytest.mark.parametrize("size", [(3, 4, 5), (4, 5)])
def test_a_batch_keeps_its_promise(size):
    cases = [prepared(name="full"), prepared(name="void", foreground=False)]
    for count, share, certain in ((5, 0.5, (0, 2, 4)), (2, 0.33, (0,)), (4, 1.0, range(4)),
                                  (3, 0.0, ())):
        images, labels = sampling.batch(cases, size, count, np.random.default_rng(count), share,
                                        first=0)
        assert images.shape == (count, *size, 2) and images.dtype == np.float32
        assert labels.shape == (count, *size) and labels.dtype == np.uint8
        assert all((labels[number] > 0).any() for number in certain)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.data())
def test_some_patches_of_a_batch_are_as_they_are_among_all(count, data):
    """Whoever makes the others: their numbers, of foreground too, and what varies them."""
    cases = [prepared((5, 9, 8)), prepared((7, 6, 11), name="other", foreground=False)]
    varied = augment.preset("mild", (2.0, 1.0, 1.0), None)
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=2)))

    def drawn(only=slice(None)):
        return [*sampling.patches(cases, (4, 6, 5), count, np.random.default_rng((3, count)), 0.4,
                                  varied, first=2 * count, only=only)]

    whole = drawn()
    parts = [patch for part in map(slice, [0, *cuts], [*cuts, count]) for patch in drawn(part)]
    assert len(parts) == count
    for one, other in zip(whole, parts, strict=True):
        assert one[0] == other[0]
        np.testing.assert_array_equal(one[1], other[1])
        np.testing.assert_array_equal(one[2], other[2])


@pytest.mark.parametrize("share", [0, 0.25, 1 / 3, 0.5, 0.7, 1])
def test_the_share_of_foreground_holds_over_steps_whatever_the_batch(share):
    """Patches of one voxel: one that is centred on foreground holds it, others almost never."""
    case = prepared((30, 30, 30))
    case.label[:] = 0
    case.label[3, 4, 5] = 1
    case.foreground = {1: np.argwhere(case.label == 1)}
    for count in range(1, 6):
        drawn = [sampling.batch([case], (1, 1, 1), count, np.random.default_rng((7, step)), share,
                                first=step * count)[1].ravel() for step in range(24)]
        seen = np.cumsum(np.concatenate(drawn))
        expected = [math.ceil(n * share - 1e-9) for n in range(1, len(seen) + 1)]
        np.testing.assert_array_equal(seen, expected)


def test_slices_are_planes_of_volumes():
    case = prepared()
    images, labels = sampling.batch([case], (8, 10), 6, np.random.default_rng(0), first=0)
    for image, label in zip(images, labels, strict=True):
        depth = int(image[0, 0, 0]) // 80
        np.testing.assert_array_equal(image, case.image[depth])
        np.testing.assert_array_equal(label, case.label[depth])


def test_only_the_generator_decides():
    cases = [prepared(), prepared((5, 9, 7))]
    args = (cases, (3, 4, 5), 4)
    first = sampling.batch(*args, np.random.default_rng(7), augment=augment.mild, first=0)
    again = sampling.batch(*args, np.random.default_rng(7), augment=augment.mild, first=0)
    other = sampling.batch(*args, np.random.default_rng(8), augment=augment.mild, first=0)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[0] != other[0]).any()
    seen = []
    sampling.batch(cases, (4, 5), 3, np.random.default_rng(0), first=0,
                   augment=lambda x, y, rng: (seen.append(x.shape), (x, y))[1])
    assert seen == [(4, 5, 2)] * 3


@settings(max_examples=60, deadline=None)
@given(shape=sizes, size=sizes, seed=st.integers(0, 999), foreground=st.sampled_from([0, 0.5, 1]))
def test_the_identity_gives_the_patch_that_is_not_resampled(shape, size, seed, foreground):
    case = prepared(shape)
    plain, same = (sampling.patch(case, size, np.random.default_rng(seed), foreground, spatial)
                   for spatial in (None, lambda rng, size: np.eye(3)))
    for expected, found in zip(plain, same, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


TURNING = augment.Augmentation(rotation=augment.Change(1, -180, 180),
                               plane_rotation=augment.Change(1, -180, 180),
                               scale=augment.Change(1, 0.4, 2.5))


@settings(max_examples=100, deadline=None)
@given(shape=sizes, size=sizes, seed=st.integers(0, 999), thick=st.booleans(), data=st.data())
def test_the_voxel_that_a_patch_is_centred_on_stays_in_it(shape, size, seed, thick, data):
    """However it is turned and scaled, and exactly: one voxel is all there is of the class."""
    voxel = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    case = prepared(shape, foreground=False)
    case.label[voxel] = 1
    case.foreground = {1: np.array([voxel], np.int32)}
    turning = replace(TURNING, spacing=(5.0 if thick else 1.5, 1.0, 1.2))
    image, labels = sampling.patch(case, size, np.random.default_rng(seed), 1.0, turning.spatial)
    assert image.shape == (*size, 2) and image.dtype == np.float32
    assert labels.shape == size and labels.dtype == np.uint8
    assert set(np.unique(labels)) <= {0, 1, sampling.IGNORE} and (labels == 1).any()
    seen = np.abs(image[labels == 1][:, 0] - np.float32(case.image[voxel][0]))
    assert seen.min() < 0.02  # of counts that go to 728


def balls(shape, spacing, radius):
    """A case whose image is the distance in mm from its middle, and the ball of a radius."""
    at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    distance = np.linalg.norm((at - (np.array(shape) - 1) / 2) * spacing, axis=-1)
    label = (distance < radius).astype(np.uint8)
    return sampling.Prepared("ball", distance[..., None], label, {})


@pytest.mark.parametrize("spacing", [(1, 1, 1), (2.5, 1, 1.25), (1, 1.5, 2), (6, 1.5, 1)])
def test_a_ball_in_millimetres_stays_one_and_labels_stay_with_the_image(spacing):
    shape = tuple(int(40 / s) | 1 for s in spacing)
    case = balls(shape, spacing, 12)
    steps = np.array([s for s in spacing if s <= 3])  # thick slices are not resampled
    turning = replace(TURNING, scale=augment.Change(), spacing=spacing)
    for seed in range(4):
        turned = sampling.patch(case, shape, np.random.default_rng(seed), 0, turning.spatial)
        inside = case.image[..., 0] < 18  # where no corner sticks out
        # A distance r bends by at most 1/r: between voxels h apart a line is off by h^2 / 8 of it.
        bent = np.sum(steps**2) / 8 / np.maximum(case.image - np.linalg.norm(steps), 1)
        assert (np.abs(turned[0] - case.image)[inside] <= bent[inside] + 1e-5).all()
        assert (turned[1][inside] != case.label[inside]).mean() < 0.03
        consistent = np.abs(turned[0][..., 0] - 12) > steps.max() / 2
        known = turned[1] != sampling.IGNORE
        assert ((turned[0][..., 0] < 12) == turned[1])[consistent & known].all()
        assert known[inside].all() and set(np.unique(turned[1])) <= {0, 1, sampling.IGNORE}


def test_patches_turned_in_the_middle_of_a_volume_have_no_corners_cut_off():
    case = balls((40, 40, 40), (1, 1, 1), 9)
    case.foreground = {1: np.array([[20, 20, 20]], np.int32)}
    turning = replace(TURNING, scale=augment.Change())
    for seed in range(10):
        _, labels = sampling.patch(case, (20, 20, 20), np.random.default_rng(seed), 1,
                                   turning.spatial)
        assert (labels != sampling.IGNORE).all()


@pytest.mark.parametrize("size", [(4, 9, 11), (9, 11), (9, 14)])
def test_thick_slices_turn_in_their_plane(size):
    """Each slice of the image holds its number, so does each slice of a patch; and slices are
    turned as those of thick volumes are."""
    case = prepared((6, 12, 13), channels=1)
    case.image[:] = np.arange(6)[:, None, None, None]
    turning = replace(TURNING, spacing=(3.2, 1, 1))
    images, _ = sampling.batch([case], size, 12, np.random.default_rng(0), 1.0, turning, first=0)
    if len(size) == 2:
        images = images[:, None]
    assert (images == images[:, :, :1, :1]).all()
    assert (np.diff(images[:, :, 0, 0, 0]) == 1).all()
    if len(size) == 3:
        turning = replace(TURNING, spacing=(3, 1, 1))
        images, _ = sampling.batch([case], size, 1, np.random.default_rng(0), 1.0, turning, first=0)
        assert (images != images[:, :, :1, :1]).any()


@pytest.mark.parametrize("name", augment.PRESETS)
def test_batches_do_not_depend_on_the_threads_that_draw_them(name):
    cases = [prepared(), prepared((5, 9, 7), name="other")]
    chosen = augment.preset(name, (2.0, 1.0, 1.0), [(1, 2)])

    def draw(step):
        return sampling.batch(cases, (4, 6, 5), 2, np.random.default_rng((3, step)),
                              augment=chosen, first=2 * step)

    with np.errstate(divide="raise", invalid="raise", over="raise"):
        alone = [draw(step) for step in range(12)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(draw, reversed(range(12))))[::-1]
    for (x, y), (image, labels) in zip(alone, together, strict=True):
        np.testing.assert_array_equal(x, image)
        np.testing.assert_array_equal(y, labels)
        assert np.isfinite(x).all() and set(np.unique(y)) <= {0, 1, 2, sampling.IGNORE}


def test_wrong_batches():
    for cases, size, count in (([], (2, 2, 2), 1), ([prepared()], (2,), 1),
                               ([prepared()], (2, 2, 2, 2), 1), ([prepared()], (2, 2), 0)):
        with pytest.raises(ValueError, match="expected two or three"):
            sampling.batch(cases, size, count, np.random.default_rng(0), first=0)


def test_a_case_is_prepared_stored_and_mapped(tmp_path):
    folder = phantom.write(tmp_path / "task", cases=1, shape=(16, 40, 44), spacing=(5, 3.6, 3.5))
    case = decathlon.load(folder).cases[0]
    plan = Plan.fit([case], spacing=(5.0, 3.0, 3.0))
    ready = sampling.prepare(case, plan, seed=1)
    volume, label = case.read()
    np.testing.assert_array_equal(ready.image, plan.prepare(volume).astype(np.float16))
    np.testing.assert_array_equal(ready.label, plan.prepare_labels(label, volume.spacing))
    assert ready.image.dtype == np.float16 and ready.image.shape == (*ready.label.shape, 1)
    for number in (1, 2):
        np.testing.assert_array_equal(ready.foreground[number], np.argwhere(ready.label == number))

    sampling.store(tmp_path / "store", ready)
    mapped = sampling.open(tmp_path / "store", case.id)
    assert isinstance(mapped.image, np.memmap) and isinstance(mapped.label, np.memmap)
    assert list(mapped.foreground) == [1, 2] and len(list((tmp_path / "store").iterdir())) == 3
    draws = [sampling.batch([c], (4, 8, 8), 3, np.random.default_rng(0), first=0)
             for c in (ready, mapped)]
    np.testing.assert_array_equal(draws[0][0], draws[1][0])
    assert type(draws[1][0]) is np.ndarray


def test_coordinates_are_bounded_drawn_without_repeats_and_seeded(monkeypatch):
    monkeypatch.setattr(sampling, "COORDINATES", 50)
    label = np.ones((8, 9, 10), np.uint8)
    label[0] = 0
    volume = nifti.Volume(label[..., None].astype(np.float32), (1, 1, 1), np.eye(4), None, (), None)
    case = SimpleNamespace(id="x", read=lambda: (volume, label), labels={0: "back", 1: "all"})
    first, again, other = (sampling.prepare(case, Plan((1, 1, 1)), seed).foreground[1]
                           for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and len(np.unique(first, axis=0)) == 50
    assert (label[tuple(first.T)] == 1).all()


@pytest.mark.parametrize("numbers", [(0, 1, 4), (0, 63, 252), (0, 255), (0, 2, 700, 14175)])
def test_label_numbers_become_classes(numbers):
    rng = np.random.default_rng(0)
    classes = rng.integers(0, len(numbers), (5, 6, 7))
    label = np.array(numbers, np.min_scalar_type(numbers[-1]))[classes]
    volume = nifti.Volume(np.zeros((5, 6, 7, 1), "f4"), (1, 1, 1), np.eye(4), None, (), None)
    case = SimpleNamespace(id="x", read=lambda: (volume, label),
                           labels={n: f"class {n}" for n in reversed(numbers)})
    ready = sampling.prepare(case, Plan((1, 1, 1)), 0)
    np.testing.assert_array_equal(ready.label, classes)
    assert ready.label.dtype == np.uint8 and list(ready.foreground) == [*range(1, len(numbers))]


def test_a_prepared_case_knows_what_it_was_made_of(tmp_path):
    folder = phantom.write(tmp_path / "task", cases=2, shape=(8, 20, 22), spacing=(9, 7.2, 7))
    case, other = decathlon.load(folder).cases
    plan = Plan((9.0, 7.2, 7.0))
    sampling.store(tmp_path / "p", sampling.prepare(case, plan, 0), sampling.source(case, plan))
    assert sampling.changed(tmp_path / "p", case, plan) == []
    assert sampling.changed(tmp_path / "p", other, plan) == []  # never stored
    content, told = case.label.read_bytes(), case.label.stat()
    case.label.write_bytes(content)  # another time, the same bytes
    assert sampling.changed(tmp_path / "p", case, plan) == []
    case.label.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert sampling.changed(tmp_path / "p", case, plan) == [str(case.label)]
    os.utime(case.label, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert sampling.changed(tmp_path / "p", case, plan) == []  # what a size and a time can tell
    case.label.write_bytes(content + b"0")
    case.image.write_bytes(b"")
    assert sampling.changed(tmp_path / "p", case, plan) == [str(case.image), str(case.label)]
    case.label.write_bytes(content)
    case.image.write_bytes(content)
    named = replace(case, labels={0: "background", 1: "liver", 2: "cancer"})
    assert sampling.changed(tmp_path / "p", named, Plan((9.0, 7.2, 7.5))) == [
        "plan", "labels", str(case.image)]


def test_a_case_without_foreground_is_stored_too(tmp_path):
    sampling.store(tmp_path, prepared(foreground=False))
    assert sampling.open(tmp_path, "case").foreground == {}


def test_wrong_stores_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"case\.image\.npy"):
        sampling.open(tmp_path, "case")
    sampling.store(tmp_path, prepared())
    for content in (b"", b"junk", (tmp_path / "case.label.npy").read_bytes()[:-9]):
        (tmp_path / "case.label.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"case\.label\.npy"):
            sampling.open(tmp_path, "case")
    np.save(tmp_path / "case.label.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"case\.label\.npy"):
        sampling.open(tmp_path, "case")


def test_a_failed_store_leaves_the_old_one(tmp_path, monkeypatch):
    sampling.store(tmp_path, prepared())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(np, "save", lambda path, *a, **k: path.write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampling.store(tmp_path, prepared((2, 3, 4)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
