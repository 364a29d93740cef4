"""The losses against sums over voxels, their gradients against differences."""

from functools import partial

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyseg import Tensor, check_gradients, losses, parallel

leaf = partial(Tensor, requires_grad=True)
ALL = [losses.cross_entropy, losses.dice, losses.dice_cross_entropy]


def batch(shape=(2, 3, 4), classes=3, seed=1, ignore=None):
    """Logits and labels; about a third of the labels are `ignore` where it is given."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, shape)
    if ignore is not None:
        labels[rng.random(shape) < 0.3] = ignore
    return rng.standard_normal((*shape, classes)), labels


@st.composite
def batches(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    ignore = draw(st.sampled_from([None, -1, 255, 1]))
    logits, labels = batch(shape, draw(st.integers(2, 5)), draw(st.integers(0, 2**32 - 1)), ignore)
    return logits, labels, ignore


@given(batches(), st.booleans(), st.sampled_from([1e-5, 1.0]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_values(case, weighted, smooth, background):
    logits, labels, ignore = case
    weight = np.linspace(0.5, 3, logits.shape[-1]) if weighted else None
    entropy = losses.cross_entropy(Tensor(logits), labels, ignore, weight).data
    overlap = losses.dice(Tensor(logits), labels, ignore, smooth=smooth,
                          background=background).data
    both = losses.dice_cross_entropy(Tensor(logits), labels, ignore, weight, smooth=smooth,
                                     background=background).data
    assert entropy == pytest.approx(oracle.cross_entropy(logits, labels, ignore, weight), abs=1e-12)
    assert overlap == pytest.approx(oracle.dice(logits, labels, ignore, smooth, background),
                                    abs=1e-12)
    assert both == pytest.approx(float(entropy + overlap), abs=1e-12)
    assert entropy.shape == overlap.shape == both.shape == ()


@pytest.mark.parametrize("ignore", [None, 255])
@pytest.mark.parametrize("name, options", [
    ("cross_entropy", {}), ("cross_entropy", {"weight": np.array([0.2, 1.0, 3.0])}),
    ("dice", {}), ("dice", {"background": True, "smooth": 1.0}), ("dice_cross_entropy", {}),
    ("dice_cross_entropy", {"weight": np.array([0.2, 1.0, 3.0]), "background": True}),
])
def test_gradients(name, options, ignore):
    for shape in [(5,), (2, 3, 4), (2, 2, 3, 2)]:
        logits, labels = batch(shape, ignore=ignore)
        check_gradients(lambda x, labels=labels: getattr(losses, name)(
            x, labels, ignore, **options) * 2.5, logits, tolerance=1e-8)


@pytest.mark.parametrize("name, options", [
    ("cross_entropy", {"weight": np.array([0.2, 1.0, 3.0])}), ("dice", {"background": True}),
    ("dice_cross_entropy", {}),
])
def test_slabs_add_up_to_the_whole_alike_on_any_threads(monkeypatch, name, options):
    logits, labels = batch((2, 3, 5, 7), ignore=5)
    found = []
    for slab, threads in [(2**18, 1), (12, 1), (100, 1), (100, 3)]:
        monkeypatch.setattr(parallel, "SLAB", slab)
        monkeypatch.setattr(parallel, "_setting", threads)
        x = leaf(logits)
        value = getattr(losses, name)(x, labels, 5, **options)
        value.backward(np.array(1.5))
        found.append((value.item(), x.grad))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-14)
        np.testing.assert_allclose(gradient, found[0][1], rtol=1e-12, atol=1e-16)
    assert found[2][0] == found[3][0] and (found[2][1] == found[3][1]).all()


def test_the_sum_has_the_sum_of_gradients():
    logits, labels = batch(ignore=9)
    gradients = []
    for loss in ALL:
        x = leaf(logits)
        loss(x, labels, 9).backward()
        gradients.append(x.grad)
    np.testing.assert_allclose(gradients[0] + gradients[1], gradients[2], atol=1e-15)


@pytest.mark.parametrize("loss", ALL)
def test_ignored_voxels_count_nowhere(loss):
    logits, labels = batch(ignore=7)
    x, other = leaf(logits), leaf(np.where((labels == 7)[..., None], 50.0, logits))
    for t in (x, other):
        loss(t, labels, 7).backward()
    assert (x.grad[labels == 7] == 0).all() and (x.grad[labels != 7] != 0).all()
    np.testing.assert_allclose(x.grad, other.grad, atol=1e-15)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("loss", ALL)
def test_whatever_an_ignored_voxel_holds_counts_nowhere(loss, value):
    logits, labels = batch(ignore=7)
    x, other = leaf(logits), leaf(np.where((labels == 7)[..., None], value, logits))
    other.data[labels == 7, 0] = 3.0
    values = [loss(t, labels, 7) for t in (x, other)]
    for v in values:
        v.backward()
    assert values[0].item() == values[1].item() and (x.grad == other.grad).all()
    assert (other.grad[labels == 7] == 0).all()
    with np.errstate(invalid="ignore"):
        kept = loss(other, np.where(labels == 7, 0, labels), 7)
    assert value < 0 or np.isnan(kept.item())  # a NaN that counts is told


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", ALL)
def test_a_masked_class_is_as_if_it_were_not_there(loss, dtype):
    """Minus infinity for a class that is no label: the loss of the others, and no gradient."""
    logits, labels = batch()
    wide = np.full((*labels.shape, 4), -np.inf, dtype)
    wide[..., :3] = logits
    x, y = leaf(logits.astype(dtype)), leaf(wide)
    options = {} if loss is losses.cross_entropy else {"background": True, "smooth": 1e-9}
    value, masked = loss(x, labels, **options), loss(y, labels, **options)
    entropy = losses.cross_entropy(x, labels).item()
    overlap = losses.dice(x, labels, smooth=1e-9, background=True).item()
    absent = 1 - (3 * (1 - overlap) + 1) / 4  # of nothing predicted and nothing there the Dice is 1
    expected = {losses.cross_entropy: entropy, losses.dice: absent}.get(loss, entropy + absent)
    assert masked.item() == pytest.approx(expected, rel=1e-6)
    masked.backward()
    value.backward()
    assert (y.grad[..., 3] == 0).all() and np.isfinite(y.grad).all()
    if loss is losses.cross_entropy:
        np.testing.assert_allclose(y.grad[..., :3], x.grad, rtol=1e-5)


def test_where_the_exact_value_is_infinite_so_is_the_loss():
    x = leaf(np.array([[-np.inf, 1.0, 2.0], [0, 0, 0]]))
    value = losses.cross_entropy(x, np.array([0, 1]))
    value.backward()
    assert value.item() == np.inf and np.isfinite(x.grad).all()
    weight = np.array([0, 1.0, 1])
    x.grad = None
    value = losses.cross_entropy(x, np.array([0, 1]), weight=weight)  # it weighs nothing
    value.backward()
    assert value.item() == pytest.approx(np.log(3)) and (x.grad[0] == 0).all()


@pytest.mark.parametrize("loss", ALL)
def test_logits_further_apart_than_the_largest_number(loss):
    logits, labels = np.array([[3e38, -3e38, 0], [0, 1, 2]], "float32"), np.array([0, 2])
    x, exact = leaf(logits), leaf(logits.astype(float))
    values = [loss(t, labels) for t in (x, exact)]
    for v in values:
        v.backward()
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-6)
    np.testing.assert_allclose(x.grad, exact.grad, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", ALL)
def test_a_batch_that_is_ignored_altogether(loss, dtype):
    x = leaf(batch()[0].astype(dtype))
    value = loss(x, np.full((2, 3, 4), -1), -1)
    value.backward()
    assert np.isfinite(value.data) and (x.grad == 0).all()
    assert value.dtype == x.grad.dtype == dtype


def test_a_batch_whose_classes_weigh_nothing():
    x, weight = leaf(batch()[0]), np.array([0.0, 1.0, 1.0])
    value = losses.cross_entropy(x, np.zeros((2, 3, 4), int), weight=weight)
    value.backward()
    assert np.isfinite(value.data) and (x.grad == 0).all()


@pytest.mark.parametrize("loss", ALL)
def test_huge_logits_are_finite(loss):
    logits = np.array([[1e30, -1e30, 0], [-1e30, 1e30, 1e30], [3e4, 3e4, 3e4]], "float32")
    x = leaf(logits)
    value = loss(x, np.array([0, 1, 2]))
    value.backward()
    assert np.isfinite(value.data) and np.isfinite(x.grad).all()


def test_known_values():
    logits = Tensor(np.zeros((1, 2, 2, 4)))
    assert losses.cross_entropy(logits, np.zeros((1, 2, 2), int)).data == pytest.approx(np.log(4))
    sure = np.full((1, 3, 3), -60.0)
    sure[0, np.arange(3), [0, 1, 2]] = 60
    right, wrong = np.array([[0, 1, 2]]), np.array([[0, 2, 1]])
    assert losses.dice(Tensor(sure), right).data == pytest.approx(0, abs=1e-12)
    assert losses.dice(Tensor(sure), wrong).data == pytest.approx(1, abs=1e-4)
    assert losses.dice(Tensor(sure), wrong, background=True).data == pytest.approx(2 / 3, abs=1e-4)
    assert losses.cross_entropy(Tensor(sure), right).data == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64"])
def test_any_integer_labels(dtype):
    logits, labels = batch(ignore=200 if dtype == "uint8" else -3)
    ignore = 200 if dtype == "uint8" else -3
    for loss in ALL:
        assert loss(Tensor(logits), labels.astype(dtype), ignore).data == \
            loss(Tensor(logits), labels, ignore).data
    assert losses.dice(Tensor(logits), np.abs(labels % 3).astype(dtype), -1).data > 0


def test_float32_stays():
    logits, labels = batch()
    for loss, options in zip(ALL, [{"weight": np.ones(3)}, {}, {"weight": np.ones(3)}],
                             strict=True):
        x = leaf(logits.astype("float32"))
        value = loss(x, labels, **options)
        value.backward()
        assert value.dtype == x.grad.dtype == "float32"


@pytest.mark.parametrize("loss", ALL)
def test_wrong_labels(loss):
    logits, labels = batch()
    x = leaf(logits)
    for wrong in (labels[:1], labels[..., None], labels.transpose(0, 2, 1)):
        with pytest.raises(ValueError, match="do not fit logits"):
            loss(x, wrong)
    for wrong in (labels.astype("float64"), labels > 0):
        with pytest.raises(ValueError, match="expected integers"):
            loss(x, wrong)
    for value in (3, -1, 255):
        stray = labels.copy()
        stray[1, 2, 3] = value
        with pytest.raises(ValueError, match=f"hold {value}; expected 0 to 2"):
            loss(x, stray)
        with pytest.raises(ValueError, match=f"hold {value}; .* 77"):
            loss(x, stray, 77)
        assert np.isfinite(loss(x, stray, value).data)


def test_lists_and_numbers_of_another_type():
    logits, labels = batch()
    for loss in ALL:
        with pytest.raises(TypeError, match="is a list; expected .* an array"):
            loss(Tensor(logits), labels.tolist())
        with pytest.raises(ValueError, match="logits are int64; expected floats"):
            loss(Tensor(logits.astype(int)), labels)
    for loss in (losses.cross_entropy, losses.dice_cross_entropy):
        weights = [1, 0.5, 2], np.array([1, 0.5, 2]), np.array([1, 0.5, 2], "float32")
        assert len({loss(Tensor(logits), labels, weight=w).item() for w in weights}) == 1


def test_wrong_options():
    logits, labels = batch()
    for loss in (losses.cross_entropy, losses.dice_cross_entropy):
        with pytest.raises(ValueError, match="weight"):
            loss(Tensor(logits), labels, weight=np.ones(4))
    single = Tensor(logits[..., :1])
    with pytest.raises(ValueError, match="two classes"):
        losses.dice(single, labels * 0)
    assert np.isfinite(losses.dice(single, labels * 0, background=True).data)


def test_a_single_class_is_certain():
    x = leaf(batch()[0][..., :1])
    value = losses.cross_entropy(x, np.zeros((2, 3, 4), int))
    value.backward()
    assert value.item() == 0 and (x.grad == 0).all()
