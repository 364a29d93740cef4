"""The fingerprint of a folder, the plan that follows from it, its file and its command."""

import dataclasses
import gzip
import itertools
import json
from math import ceil, prod

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyseg as ts
from tinyseg import PROFILES, cuda, models, nn, report, train
from tinyseg import __main__ as commands
from tinyseg.data import ct, decathlon, nifti, phantom
from tinyseg.job import Settings, fingerprint, rules, study
from tinyseg.job import plan as plans

SHAPE, SPACING = (14, 30, 26), (5.0, 4.1, 4.3)
SECONDS = {"step_2d": 0.5, "scan_2d": 3.0, "step_3d": 2.0, "scan_3d": 7.5}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return phantom.write(tmp_path_factory.mktemp("task"), 5, 3, SHAPE, SPACING)


@pytest.fixture
def task(source, tmp_path):
    """A copy that a test may damage."""
    folder = tmp_path / "task"
    for path in source.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def unmeasured(monkeypatch):
    for module in (plans, commands):
        monkeypatch.setattr(module, "measure", lambda *_, **__: dict(SECONDS))


def proposed(folder, **options):
    return plans.propose(fingerprint.fingerprint(decathlon.load(folder)), **options)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


def reshape(path):
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[:-1], image.affine), path)


# The fingerprint.

def test_channels_may_have_any_numbers(source):
    found = fingerprint.fingerprint(decathlon.load(source))
    name, = found.modalities.values()
    assert str(dataclasses.replace(found, modalities={1: name})) == str(found)


def test_one_reading_of_every_file_serves_the_fingerprint_and_the_plan(source, monkeypatch):
    dataset, read = decathlon.load(source), []
    whole = nifti.read
    monkeypatch.setattr(nifti, "read", lambda path, *a: read.append(path) or whole(path, *a))
    seen = []
    found = fingerprint.fingerprint(dataset, lambda cases: (seen.append(c) or c for c in cases))
    made = plans.propose(found)
    files = [path for case in dataset.cases for path in case.files]
    assert sorted(read) == sorted(files) and seen == list(dataset.cases)
    monkeypatch.undo()
    fitted = ct.Plan.fit(dataset.cases, made.preprocessing.spacing)
    assert made.preprocessing == fitted and fitted.clip is not None


def test_the_fingerprint_counts_what_the_arrays_hold(source):
    dataset = decathlon.load(source)
    found = fingerprint.fingerprint(dataset)
    assert [digest.id for digest in found.digests] == [case.id for case in dataset.cases]
    np.testing.assert_allclose(found.spacings, [SPACING] * 5, rtol=1e-5)
    np.testing.assert_allclose(found.extents, [np.multiply(SHAPE, SPACING)] * 5, rtol=1e-5)
    sizes = {1: [], 2: []}
    for case, digest in zip(dataset.cases, found.digests, strict=True):
        scan, label = case.read()
        assert digest.voxels == {n: int((label == n).sum()) for n in (0, 1, 2)}
        array = scan.array[..., 0].astype(float)
        for voxels, row in zip((array, array[label > 0]), digest.intensities[:, 0], strict=True):
            np.testing.assert_allclose(row, [*np.percentile(voxels, (0.5, 50, 99.5)),
                                             voxels.mean(), voxels.std()], rtol=1e-6)
        for n, each in sizes.items():
            each.append((label == n).sum() * prod(scan.spacing) / 1000)
    lines = {line[:24].strip(): line[24:].split() for line in str(found).splitlines()}
    for n, name in ((1, "pancreas"), (2, "cancer")):
        low, middle, high, share, count, largest = lines[name]
        np.testing.assert_allclose([float(low), float(middle), float(high)],
                                   [min(sizes[n]), np.median(sizes[n]), max(sizes[n])], rtol=1e-3)
        total = 5 * prod(SHAPE) * prod(SPACING) / 1000
        assert abs(float(share.rstrip("%")) - 100 * sum(sizes[n]) / total) < 0.006
        assert count == str(sum(size > 0 for size in sizes[n]))
        assert largest == dataset.cases[int(np.argmax(sizes[n]))].id
    assert lines["voxels, width"] == ["26"] * 3
    assert [float(x) for x in lines["spacing in mm, height"]] == [4.1] * 3


def test_a_class_that_a_case_lacks_is_not_in_it(task):
    case = decathlon.load(task).cases[2]
    image = nib.load(case.label)
    nib.save(nib.Nifti1Image(np.minimum(np.asarray(image.dataobj), 1), image.affine), case.label)
    found = fingerprint.fingerprint(decathlon.load(task))
    assert found.digests[2].voxels[2] == 0 < found.digests[1].voxels[2]
    row = next(line for line in str(found).splitlines() if line.startswith("cancer"))
    sizes = [digest.voxels[2] * digest.volume for digest in found.digests]
    assert row.split()[5] == "4" and float(row.split()[1]) == pytest.approx(
        min(size for size in sizes if size), rel=1e-3)


def test_percentiles_of_long_scans_are_those_of_evenly_drawn_voxels(source, monkeypatch):
    case = decathlon.load(source).cases[0]
    every = fingerprint.fingerprint(decathlon.load(source)).digests[0].intensities
    monkeypatch.setattr(ct, "SAMPLES", 50)
    monkeypatch.setattr(fingerprint, "DRAWN", 3000)
    found = fingerprint.fingerprint(decathlon.load(source)).digests[0]
    assert len(found.sample.foreground[0]) == 50
    voxels = case.read()[0].array[..., 0].ravel()
    drawn = voxels[:: 1 + voxels.size // 3000]
    np.testing.assert_allclose(found.intensities[0, 0, 3], drawn.mean(), rtol=1e-6)
    assert not np.allclose(found.intensities, every)
    np.testing.assert_allclose(found.intensities[0], every[0], atol=0.1 * every[0, 0, 4])


def test_broken_cases_are_told_by_name_and_the_others_make_the_plan(task):
    cases = decathlon.load(task).cases
    truncate(cases[1].image)
    reshape(cases[3].label)
    found = fingerprint.fingerprint(decathlon.load(task))
    assert list(found.broken) == [cases[1].id, cases[3].id]
    assert str(cases[1].image) in found.broken[cases[1].id]
    assert str(cases[3].label) in found.broken[cases[3].id]
    assert "expected" in found.broken[cases[3].id]
    for id, why in found.broken.items():
        assert f"broken: {id}: {why}" in str(found)
    kept = [case for number, case in enumerate(cases) if number not in (1, 3)]
    assert plans.propose(found, spacing=(5, 4, 4)).preprocessing == ct.Plan.fit(kept, (5, 4, 4))


def test_a_fault_that_names_no_file_is_told_with_the_scans(source, monkeypatch):
    def fail(case):
        raise MemoryError("no room")

    monkeypatch.setattr(decathlon.Case, "read", fail)
    dataset = decathlon.load(source)
    with pytest.raises(ValueError, match="no case of 5 that can be read.*phantom_000.*: no room"):
        fingerprint.fingerprint(dataset)
    with pytest.raises(ValueError, match="no case of 0 that can be read.*there are none"):
        fingerprint.fingerprint(dataclasses.replace(dataset, cases=()))


def test_sides_of_names_decide_what_is_mirrored(source):
    dataset = decathlon.load(source)
    for names, mirror, told in (
            (("left kidney", "right kidney"), (("left kidney", "right kidney"),),
             "left kidney = right kidney"),
            (("left kidney", "cancer"), None, "left kidney may have a side and no partner"),
            (("pancreas", "cancer"), (), "no class has a side")):
        labels = dict(enumerate(("background", *names)))
        cases = tuple(dataclasses.replace(case, labels=labels) for case in dataset.cases[:2])
        found = fingerprint.fingerprint(dataclasses.replace(dataset, labels=labels, cases=cases))
        assert plans.propose(found).preprocessing.mirror == mirror and told in str(found)


# Rules.

def like(shape, spacing, count=4):
    spacings = np.array([spacing] * count, float)
    return spacings, spacings * shape


@pytest.mark.parametrize(("shape", "spacing", "voxels", "expected"), [
    ((36, 50, 35), (1, 1, 1), 2**18, (0.5, 0.5, 0.5)),  # a hippocampus
    ((30, 64, 30), (1, 1, 1), 2**18, (1, 1, 1)),  # as long as SMALL along an axis
    ((50, 50, 50), (1, 1, 1), 2**18, (1, 1, 1)),  # a million voxels at half
    ((15, 15, 15), (1, 1, 1), 2**18, (0.25, 0.25, 0.25)),  # twice
    ((40, 96, 96), (2.5, 1.6, 1.6), 2**18, (2.5, 1.6, 1.6)),
    ((117, 305, 305), (3, 1.5, 1.5), 2**18, (3, 2, 2)),
    ((117, 305, 305), (3, 1.5, 1.5), 2**21, (3, 1.5, 1.5)),  # where patches are larger
    ((96, 512, 512), (2.5, 0.8, 0.8), 2**18, (2.5, 2, 2)),
    ((400, 400, 400), (1, 1, 1), 2**18, (1, 1, 1)),  # no axis is coarser
    ((300, 300, 300), (1.8, 0.8, 1.0), 2**18, (1.8, 1.8, 1.8)),
])
def test_the_working_spacing(shape, spacing, voxels, expected):
    found = rules.working_spacing(*like(shape, spacing), voxels)
    np.testing.assert_allclose(found, expected)
    assert all(type(s) is float for s in found)


def test_a_spacing_is_coarsened_no_further_than_a_patch_needs():
    spacings, extents = like((60, 400, 400), (3, 0.9, 0.9))
    s = rules.working_spacing(spacings, extents, 2**18)
    assert 0.9 < s[1] == s[2] < 2 and s[0] == 3
    assert prod(extents[0] / s) <= 16 * 2**18 < prod(extents[0] / (3, s[1] / 1.1, s[2] / 1.1))


def test_thick_slices_take_the_tenth_percentile_as_nnunet_does():
    spacings = np.array([(z, 0.5, 0.6) for z in (2.0, 4.0, 5.0, 6.0, 7.0)])
    extents = spacings * (20, 320, 300)
    assert rules.working_spacing(spacings, extents, 2**21) == (2.8, 0.5, 0.6)  # of the five
    many = spacings * (120, 320, 300)  # no third of the others' voxels
    assert rules.working_spacing(spacings, many, 2**21) == (5, 0.5, 0.6)
    near = spacings.copy()
    near[0, 0] = near[1, 0] = 0.3  # never finer than the others
    assert rules.working_spacing(near, extents, 2**21) == (0.6, 0.5, 0.6)


@given(st.tuples(*[st.integers(1, 600)] * 3), st.tuples(*[st.floats(0.3, 8)] * 3),
       st.integers(2**12, 2**21))
def test_a_patch_has_slices_as_wide_as_a_few_of_them_allow(shape, spacing, voxels):
    patch = rules.patch_of_volumes(shape, spacing, voxels)
    full = 8 * ceil(shape[0] / 8), *rules.patch_of_slices(shape)
    assert prod(patch) <= voxels
    assert all(n % 8 == 0 and 8 <= n <= whole for n, whole in zip(patch, full, strict=True))
    cut = [axis for axis in range(3) if patch[axis] < full[axis]]
    # No cut was one too many, and none across while depth had more to give.
    assert not cut or any(prod(patch) // patch[axis] * (patch[axis] + 8) > voxels for axis in cut)
    if {1, 2} & {*cut}:
        assert patch[0] == 8
    for one, other in ((1, 2), (2, 1)):  # what was cut across was the longer side
        if one in cut and patch[other] > 8:
            assert (patch[one] + 8) * spacing[one] >= patch[other] * spacing[other] * (1 - 1e-9)


@pytest.mark.parametrize(("shape", "patch"), [
    ((9, 100, 70), (104, 72)), ((9, 305, 200), (256, 200)), ((9, 512, 513), (256, 256)),
    ((1, 3, 8), (8, 8))])
def test_slices_are_seen_whole_or_in_context(shape, patch):
    assert rules.patch_of_slices(shape) == patch


def nnunet(spacing, size, most):
    """Halvings and kernels of an axis by nnU-Net's words, apart from the code: [[bool] * 3], [[int]
    * 3] for every stage but the last."""
    spacing, size, kernels, pools, wide = list(spacing), list(size), [], [], [False] * 3
    for _ in range(most):
        large = [a for a in range(3) if size[a] >= 8]
        if not large:
            break
        finest = min(spacing[a] for a in large)
        halved = [a in large and spacing[a] / finest < 2 for a in range(3)]
        wide = [wide[a] or spacing[a] / min(spacing) < 2 for a in range(3)]
        kernels.append([3 if w else 1 for w in wide])
        pools.append(halved)
        for a in range(3):
            if halved[a]:
                spacing[a], size[a] = 2 * spacing[a], ceil(size[a] / 2)
    return pools, kernels


@given(st.floats(0.2, 12), st.floats(0.3, 4), st.integers(1, 300))
def test_depth_is_halved_by_nnunets_rule_and_never_more(along, across, depth):
    spacing = (along, across, across)
    pools, _ = nnunet(spacing, (depth, 4096, 4096), 40)
    rule = rules.depth_strides(spacing, depth, kept=(False,) * 5)
    ours = rules.depth_strides(spacing, depth)
    # nnU-Net rests the plane until depth has come near; here the plane is halved at every step.
    theirs = [1 + halved[0] for halved in pools if halved[1]]
    rested = sum(not halved[1] for halved in pools)
    if not rested:
        assert rule == tuple(theirs[:5])
    for n in range(1, 6):
        before = prod(1 + halved[0] for halved in pools[: n + rested])
        assert prod(ours[:n]) <= prod(rule[:n]) <= before
    assert ours[0] == 1 and prod(ours) <= prod(rule)
    three = rules.depth_strides(spacing, depth, rules.KEPT[3])
    assert three[:2] == (1, 1) and prod(three) <= prod(rule[:3])
    assert ceil(depth / prod(ours)) >= min(depth, 4)


@pytest.mark.parametrize(("spacing", "depth", "strides", "depths"), [
    ((0.5, 0.5, 0.5), 64, (1, 1, 2, 2, 2), (3, 3, 3, 3, 3)),
    ((0.5, 0.5, 0.5), 20, (1, 1, 2, 2, 1), (3, 3, 3, 3, 3)),  # 5 slices are left
    ((3, 1.5, 1.5), 64, (1, 1, 2, 2, 2), (3, 3, 3, 3, 3)),
    ((5, 0.8, 0.8), 32, (1, 1, 2, 2, 2), (1, 3, 3, 3, 3)),
    ((10, 1.0, 1.4), 16, (1, 1, 1, 2, 2), (1, 1, 3, 3, 3)),
    ((12, 1.5, 1.5), 16, (1, 1, 1, 2, 2), (1, 1, 3, 3, 3)),  # twice the plane is too much
    ((10, 0.2, 0.2), 16, (1, 1, 1, 1, 1), (1, 1, 1, 1, 3)),
])
def test_strides_and_slots_go_by_millimetres(spacing, depth, strides, depths):
    assert rules.depth_strides(spacing, depth) == strides
    assert rules.slots(spacing, strides) == depths
    assert rules.slots(spacing, strides, apart=False) == (1, 1, *depths[2:])
    three = rules.depth_strides(spacing, depth, rules.KEPT[5][:3])  # a trunk of stride 8
    assert three == strides[:3]
    assert rules.slots(spacing, three) == (*depths[:3], depths[2], depths[2])


@given(st.tuples(*[st.integers(1, 200)] * 3), st.integers(16, 24))
def test_a_whole_case_is_cut_where_it_loses_least(shape, power):
    """Of all patches in eights within the budget, none leaves more of its shortest side."""
    found = rules.patch_of_cases(shape, 2**power)
    sides = [range(8, 8 * ceil(n / 8) + 1, 8) for n in shape]
    best = max((min(1.0, *(m / n for m, n in zip(patch, shape, strict=True)))
                for patch in itertools.product(*sides) if prod(patch) <= 2**power), default=0)
    assert (found is None) == (best < 0.9)
    if found:
        assert prod(found) <= 2**power and not any(side % 8 for side in found)
        assert min(1.0, *(m / n for m, n in zip(found, shape, strict=True))) == best


def test_an_axis_of_twice_the_finest_spacing_is_not_halved():
    rule = rules.depth_strides((3, 1.5, 1.5), 64, kept=(False,) * 5)
    assert rule == (1, 2, 2, 2, 2) == tuple(
        1 + halved[0] for halved in nnunet((3, 1.5, 1.5), (64, 4096, 4096), 5)[0])


@given(st.floats(0.2, 12), st.floats(0.3, 4))
def test_slots_are_nnunets_kernels_at_nnunets_strides(along, across):
    spacing, size = (along, across, across), (2**14,) * 3
    pools, kernels = nnunet(spacing, size, 6)
    if all(halved[1] for halved in pools):
        strides = rules.depth_strides(spacing, 2**14, kept=(False,) * 5)
        theirs = tuple(kernel[0] for kernel in kernels[1:])
        assert rules.slots(spacing, strides) == theirs


# The plan.

def test_a_proposal_follows_the_rules(source):
    made = proposed(source)
    spacing = made.preprocessing.spacing
    np.testing.assert_allclose(spacing, np.divide(SPACING, 2), rtol=1e-5)  # 11,000 voxels, then 8x
    assert made.patch_3d == (32, 64, 56) and made.patch_2d == (64, 56)
    assert made.batch_3d == 2 and made.batch_2d == 16  # 2 x 32 slices are more than enough
    assert (made.depth, made.depth_stride) == ((3,) * 5, (2, 1, 2, 2, 1))  # enlarged
    assert (made.head, len(made.decoder), made.backbone) == ("unet", 4, "resnet18")
    assert made.steps_2d == made.steps_3d == plans.STEPS and made.seconds == {}
    assert made.architecture == {"backbone": "resnet18", "head": "unet", "decoder": made.decoder}
    assert made.inflation == {"depth": made.depth, "depth_stride": made.depth_stride}


def test_what_is_given_is_taken(source):
    made = proposed(source, spacing=(5, 2, 3), patch=(16, 24, 40), head="linear",
                    backbone="resnet50")
    assert made.preprocessing.spacing == (5, 2, 3) and made.patch_3d == (16, 24, 40)
    assert made.patch_2d == (64, 40)  # 123 and 111.8 mm
    assert made.batch_2d == round(2 * 16 * 24 * 40 / (64 * 40))
    assert made.decoder == () and made.depth_stride == (1, 1, 2)
    assert made.depth == (3,) * 5
    assert made.architecture == {"backbone": "resnet50", "head": "linear"}


@pytest.mark.parametrize("word", [*PROFILES, "scale:0.2,0.5,0.3", "zero:first"])
def test_early_kernels_reach_along_depth_where_that_changes_nothing_at_first(source, word):
    """On volumes that are not constant along depth, at depth stride 1, an inflated network of the
    plan's slots begins as the 2D one, or its first stages see slice by slice."""
    asked = Settings(**study.way(word))
    made = proposed(source, apart=asked.apart)
    assert made.depth[2:] == (3, 3, 3)
    flat = models.resnet_seg("resnet50", rank=2, in_channels=1, classes=3, width=4).eval()
    deep = ts.inflate(flat, made.depth, depth_stride=1, **asked.way).eval()
    volume = np.random.default_rng(0).standard_normal((1, 8, 32, 40, 1), "float32")
    with ts.no_grad():
        many, one = deep(volume).data[0], flat(volume[0]).data
    same = np.abs(many - one).max() < 1e-3 * np.abs(one).max()
    assert made.depth[:2] == ((3, 3) if same else (1, 1))


def test_less_memory_makes_smaller_patches(source):
    fine = tuple(np.divide(SPACING, 4).tolist())
    made = [proposed(source, memory=memory, spacing=fine) for memory in (1.07, 1.1, 2, 64)]
    sizes = [prod(plan.patch_3d) for plan in made]
    assert sizes == sorted(sizes) and sizes[0] < sizes[1] < sizes[2] == sizes[3] == 16 * 120 * 104
    for memory, plan, size in zip((1.07, 1.1), made, sizes, strict=False):
        assert plan.batch_3d * size * plans.PER_VOXEL + plans.FIXED <= memory * 2**30
    with pytest.raises(ValueError, match="found 1 GiB of memory, expected 1.06 at least"):
        proposed(source, memory=1)


def test_a_case_that_fills_a_batch_is_seen_whole(source, monkeypatch):
    shape = plans.median_shape(fingerprint.fingerprint(decathlon.load(source)),
                               proposed(source).preprocessing)
    for voxels, batch in ((32 * 64 * 56, 2), (32 * 64 * 56 - 1, 1), (32 * 64 * 28, 1),
                          (32 * 64 * 20, 2)):
        monkeypatch.setitem(plans.VOXELS, "cpu", voxels)
        made = proposed(source)
        whole = all(n >= 0.9 * m for n, m in zip(made.patch_3d, shape, strict=True))
        assert (made.batch_3d, whole) == (batch, voxels > 32 * 64 * 20)
        assert made.batch_3d * prod(made.patch_3d) <= 2 * voxels


def test_a_spacing_that_a_scan_cannot_have_is_refused_by_the_file(source):
    with pytest.raises(ValueError, match="phantom_000.nii.gz: .*ask for another"):
        proposed(source, spacing=(500, 500, 500))


@given(st.floats(0.2, 600), st.floats(1e-3, 5), st.floats(1e-3, 5))
def test_steps_fill_the_minutes_in_their_shares(minutes, flat, deep):
    seconds, slices = {"step_2d": flat, "step_3d": deep}, min(0.6 * minutes, 3000 * flat / 60)
    try:
        made = plans.within(PLAN, minutes, seconds)
    except ValueError as error:
        assert "minutes, in which there is no time" in str(error)
        assert 60 * slices < flat or 60 * (minutes - slices) < deep
        return
    assert made.seconds == seconds
    for left, step in ((60 * slices - flat * made.steps_2d, flat),
                       (60 * (minutes - slices) - deep * made.steps_3d, deep)):
        assert -1e-9 * minutes <= left < step * (1 + 1e-6)  # but for rounding
    assert dataclasses.replace(made, steps_2d=4, steps_3d=0, seconds={"scan_2d": 1.5}) == PLAN


def test_patches_are_varied_where_training_sees_the_same_voxels_often(source):
    found = fingerprint.fingerprint(decathlon.load(source))
    made = plans.propose(found)
    often = rules.SEEN * 5 * prod(plans.median_shape(found, made.preprocessing))
    deep, flat = 2 * prod(made.patch_3d), 16 * prod(made.patch_2d)
    for slices in (0, 3):
        volumes = int((often - slices * flat) / deep)
        for steps, name in ((volumes, "none"), (volumes + 1, "mild")):
            asked = dataclasses.replace(made, steps_2d=slices, steps_3d=steps, augmentation="x")
            assert plans.varied(asked, found) == dataclasses.replace(asked, augmentation=name)
    assert made == plans.varied(made, found)


def test_the_networks_of_the_plan_are_timed_on_its_patches(source, monkeypatch):
    asked, seen, precisions, captured, fit = [], [], set(), [], train.fit
    monkeypatch.setattr(train, "fit", lambda *args, capture, **options: (
        captured.append(capture), fit(*args, capture=capture, **options))[1])

    class Pointwise(nn.Module):
        def __init__(self, rank, in_channels, classes):
            self.conv = nn.Conv(in_channels, classes, (1,) * rank, rng=np.random.default_rng(0))
            self.config = {"rank": rank, "in_channels": in_channels, "classes": classes}

        def forward(self, x):
            seen.append((self.training, x.shape))
            precisions.add((self.training, cuda.precision_here()))
            return self.conv(x)

    def resnet_seg(backbone, *, rank, in_channels, classes, **options):
        asked.append((backbone, rank, options))
        return Pointwise(rank, in_channels, classes)

    monkeypatch.setattr(models, "resnet_seg", resnet_seg)
    found = fingerprint.fingerprint(decathlon.load(source))
    made = plans.propose(found)
    made = plans.within(made, 1, plans.measure(made, found))
    along = {"depth": made.depth, "depth_stride": made.depth_stride, "depth_padding": "edge"}
    network = {"head": "unet", "decoder": made.decoder}
    assert asked == [("resnet18", 2, network), ("resnet18", 3, network | along)]
    assert set(seen) == {(True, (16, 64, 56, 1)), (False, (8, 64, 56, 1)),
                         (True, (2, 32, 64, 56, 1)), (False, (1, 32, 64, 56, 1))}
    assert set(made.seconds) == {"step_2d", "step_3d", "scan_2d", "scan_3d"}
    assert made.steps_2d == min(3000, int(36 / made.seconds["step_2d"])) > 0
    assert captured == [True, True] and precisions == {(True, "tf32"), (False, "tf32")}
    plans.measure(made, found, ranks=2, precision="bf16")  # as they train, and predict
    assert captured[2:] == [False, False] and (True, "bf16") in precisions
    assert (False, "bf16") not in precisions

    times = iter(range(0, 10**6, 4))  # seconds
    monkeypatch.setattr(plans, "perf_counter", lambda: next(times))
    for patch, window in (((64, 56), 4 / 8), ((32, 64, 56), 4)):  # eight slices go at a time
        assert plans._timed(Pointwise(len(patch), 1, 3), patch, 9, True, "tf32")[1] == window

    windows = [(made, 28, 1), (dataclasses.replace(made, patch_2d=(32, 56), patch_3d=(16, 64, 56)),
                               28 * 3, 3)]  # 28 x 60 x 52 voxels: windows of half overlap
    monkeypatch.setattr(plans, "_timed", lambda net, patch, count, *_: (count, 1.0))
    for each, slices, volumes in windows:
        assert plans.measure(each, found) == {"step_2d": 16, "scan_2d": slices,
                                              "step_3d": 2, "scan_3d": volumes}


# Its file.

PLAN = plans.Plan(
    preprocessing=ct.Plan((2.5, 0.8, 0.75), (-92.5, 217), 80.4, 72.7, mirror=(("胰L", "胰R"),)),
    head="unet", decoder=(64, 32), backbone="resnet34", depth=(1, 3, 3, 3, 5),
    depth_stride=(1, 1, 2, 2, 2), patch_2d=(192, 160), patch_3d=(24, 96, 88), batch_2d=7,
    batch_3d=2, steps_2d=4, steps_3d=0, augmentation="mild", seconds={"scan_2d": 1.5})
positive = st.integers(1, 10**6)
lengths = st.floats(1e-3, 1e3)


@settings(max_examples=30, deadline=None)  # each waits for the disk
@given(st.builds(
    lambda unet, **fields: plans.Plan(**fields, **(
        {"head": "unet", "decoder": (9, 1, 4), "depth_stride": (2, 1, 2, 1, 2)} if unet else
        {"head": "fcn", "decoder": (), "depth_stride": (1, 2, 2)})),
    st.booleans(),
    preprocessing=st.builds(ct.Plan, st.tuples(*[lengths] * 3),
                            st.just((None, (-1.5, 3.25))), st.just((None, 0.1)),
                            st.tuples(st.none(), lengths), order=st.sampled_from([1, 3]),
                            blend_slices=st.booleans(),
                            mirror=st.sampled_from([None, (), (("左 'a\"", "右\n"),)])),
    backbone=st.sampled_from(sorted(models.BACKBONES)), depth=st.tuples(*[positive] * 5),
    patch_2d=st.tuples(positive, positive), patch_3d=st.tuples(*[positive] * 3),
    batch_2d=positive, batch_3d=positive, steps_2d=st.integers(0, 10**7), steps_3d=positive,
    augmentation=st.text(min_size=1), seconds=st.dictionaries(st.text(), st.floats(0, 1e300))))
def test_a_file_gives_exactly_the_plan_back(tmp_path_factory, made):
    path = tmp_path_factory.getbasetemp() / "round.json"
    made.write(path)
    assert plans.Plan.read(path) == made
    assert json.loads(path.read_text("utf-8")) == json.loads(json.dumps(dataclasses.asdict(made)))


def test_a_file_has_a_line_for_each_entry(tmp_path):
    PLAN.write(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text("utf-8")
    assert '\n  "spacing": [2.5, 0.8, 0.75],\n' in text
    assert '\n "patch_3d": [24, 96, 88],\n' in text and "胰L" in text
    assert len(text.splitlines()) == 2 + 12 + (2 + 7) + (2 + 1)


GONE = object()


@pytest.mark.parametrize(("place", "value", "told"), [
    (("patch_3d",), GONE, "no patch_3d"), (("preprocessing", "mirror"), GONE,
                                           "no preprocessing.mirror"),
    (("patch",), 3, "the unknown patch"), (("preprocessing", "size"), 1,
                                           "the unknown preprocessing.size"),
    (("preprocessing",), [1], r"preprocessing \[1\], expected an object"),
    (("preprocessing", "spacing"), [1, 2], "spacing .* expected three positive"),
    (("preprocessing", "spacing"), ["1", 2, 3], "preprocessing.spacing .* expected numbers"),
    (("preprocessing", "clip"), [True, 3], "preprocessing.clip .* expected numbers"),
    (("preprocessing", "mean"), {}, "preprocessing.mean .* expected numbers"),
    (("preprocessing", "std"), 0, "std"), (("preprocessing", "std"), 10**400, "int too large"),
    (("preprocessing", "mirror"), [["a", "a"]], "mirrored"),
    (("head",), "segformer", "head 'segformer', expected one of linear, fcn"),
    (("head",), ["unet"], "head"), (("head",), "linear", "expected a decoder and five"),
    (("decoder",), [], "expected a decoder and five"), (("decoder",), [1] * 6, "decoder"),
    (("decoder",), [8, 0], "decoder"), (("backbone",), "vgg", "backbone"),
    (("backbone",), {}, "backbone"), (("depth",), [3, 3], "depth"), (("depth",), 3, "depth"),
    (("depth",), "33333", "depth"), (("depth_stride",), [1, 2, 3, 1, 1], "depth_stride"),
    (("depth_stride",), [1, 2, 2], "expected a decoder and five"),
    (("patch_2d",), [8, 8, 8], "patch_2d"), (("patch_2d",), [8, 8.0], "patch_2d"),
    (("patch_3d",), [8, 8, 0], "patch_3d"), (("patch_3d",), [8, 8, True], "patch_3d"),
    (("batch_2d",), 0, "batch_2d 0, expected a positive number of slices"),
    (("batch_3d",), "2", "batch_3d"), (("batch_3d",), None, "batch_3d"),
    (("steps_2d",), -1, "steps_2d"), (("steps_3d",), 1.5, "steps_3d"),
    (("augmentation",), "", "augmentation"), (("augmentation",), None, "augmentation"),
    (("seconds",), [1], "seconds"), (("seconds", "step_2d"), float("nan"), "seconds"),
    (("seconds", "step_2d"), "1", "seconds"), (("seconds", "step_2d"), -1.0, "seconds"),
])
def test_a_wrong_entry_is_refused_by_name_and_file(tmp_path, place, value, told):
    path = tmp_path / "plan.json"
    content = json.loads(json.dumps(dataclasses.asdict(PLAN)))
    inside = content
    for key in place[:-1]:
        inside = inside[key]
    if value is GONE:
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=f"plan.json: .*{told}"):
        plans.Plan.read(path)


def test_what_is_no_plan_at_all_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    for text in ("", "[]", "{", "null"):
        path.write_text(text)
        with pytest.raises(ValueError, match="plan.json"):
            plans.Plan.read(path)
    with pytest.raises(FileNotFoundError):
        plans.Plan.read(tmp_path / "another.json")


def test_a_plan_tells_what_it_is():
    text = str(dataclasses.replace(PLAN, steps_2d=60, seconds=SECONDS))
    assert "2.5 x 0.8 x 0.75 mm" in text and "胰L and 胰R change places" in text
    assert "60 steps of 7 slices of 192 x 160 voxels: 0.5 minutes at 0.5 s" in text
    assert "predicted in 7.5 s" in text and "minutes" not in str(PLAN)


# The command.

def run(*words):
    return commands.main(["plan", *map(str, words)])


def test_the_command_tells_the_plan_and_draws_three_cases(source, tmp_path, capsys, unmeasured,
                                                          monkeypatch):
    shown = []
    draw = report.examples
    monkeypatch.setattr(report, "examples", lambda *a: shown.append(a) or draw(*a))
    assert run(source, "--out", tmp_path / "new" / "out", "--minutes", 2) == 0
    out = tmp_path / "new" / "out"
    made = plans.Plan.read(out / "plan.json")
    found = fingerprint.fingerprint(decathlon.load(source))
    assert made == plans.varied(plans.within(proposed(source), 2, SECONDS), found)
    assert (made.steps_2d, made.steps_3d) == (144, 24)
    assert {path.name for path in out.iterdir()} == {"plan.json", "plan.png"}
    told = capsys.readouterr().out
    assert str(found) in told and str(made) in told
    ((_, cases, labels, _),) = shown
    sizes = {case.id: int((case.read()[1] > 0).sum()) for case in decathlon.load(source).cases}
    order = sorted(sizes, key=sizes.get)
    assert [name for name, *_ in cases] == [order[0], order[2], order[4]]
    low, high = made.preprocessing.window
    assert all(low <= image.min() and image.max() <= high for _, image, _, _ in cases)


def test_a_picture_that_cannot_be_drawn_is_told(source, tmp_path, capsys, unmeasured, monkeypatch):
    monkeypatch.setattr(report, "examples", lambda *a: 1 / 0)
    assert run(source, "--out", tmp_path) == 0
    assert "plan.png: not drawn (ZeroDivisionError" in capsys.readouterr().err


def test_two_folders_do_as_well_as_a_task(source, tmp_path, unmeasured):
    assert run("--images", source / "imagesTr", "--labels", source / "labelsTr", "--modality",
               "CT", "--out", tmp_path) == 0
    assert plans.Plan.read(tmp_path / "plan.json") == dataclasses.replace(
        proposed(source), seconds=SECONDS)


def test_broken_files_are_told_and_the_exit_code_is_one(task, tmp_path, capsys, unmeasured):
    truncate(task / "imagesTr" / "phantom_004.nii.gz")
    assert run(task, "--out", tmp_path) == 1
    assert "broken: phantom_004: " in capsys.readouterr().out
    assert plans.Plan.read(tmp_path / "plan.json").seconds == SECONDS


def test_a_case_alone_is_planned(task, tmp_path, unmeasured):
    for case in decathlon.load(task).cases[1:]:
        (task / case.label.relative_to(task)).write_bytes(gzip.compress(b"no scan"))
    assert run(task, "--out", tmp_path) == 1
    assert plans.Plan.read(tmp_path / "plan.json").patch_3d == (32, 64, 56)


@pytest.mark.parametrize("words", [
    (), ("TASK", "--images", "TASK"), ("--images", "TASK"), ("--labels", "TASK"),
    ("TASK", "--minutes", "0"), ("TASK", "--minutes", "nan"), ("TASK", "--memory", "-1"),
    ("TASK", "--memory", "inf"), ("TASK", "--minutes", "soon"), ("TASK", "--device", "abacus"),
    ("TASK", "another")])
def test_wrong_words_exit_with_two_and_write_nothing(source, tmp_path, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(*(source if word == "TASK" else word for word in words))
    assert stop.value.code == 2 and not list(tmp_path.iterdir())


def test_what_cannot_be_planned_ends_with_a_line(task, tmp_path, capsys, unmeasured):
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    assert run(empty, "--out", out) == 1 and "dataset.json: no such file" in capsys.readouterr().err
    for case in decathlon.load(task).cases:
        truncate(case.image)
    assert run(task, "--out", out) == 1
    assert "no case of 5 that can be read" in capsys.readouterr().err
    assert not (out / "plan.json").exists()
    (out / "run.json").write_text("{}")
    (out / "plan.json").write_text("kept")
    assert run(task, "--out", out) == 1 and "holds a run" in capsys.readouterr().err
    assert (out / "plan.json").read_text() == "kept"
