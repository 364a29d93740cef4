"""Intervals over cases and seeds: how often they hold the truth, and against scipy's tests."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tinyseg.intervals import holm, interval


def simulated(rng, mean, folds, seeds, cases, by_case=1.0, by_seed=1.0, rest=1.0):
    """Differences of a study: of every case, of every training, and of both together."""
    return [mean + by_case * rng.standard_normal(cases) + by_seed * rng.standard_normal((seeds, 1))
            + rest * rng.standard_normal((seeds, cases)) for _ in range(folds)]


@pytest.mark.parametrize("folds, seeds, cases, by_seed", [
    (2, 3, 20, 1.0), (1, 5, 12, 0.3)])
def test_95_of_100_intervals_hold_the_truth(folds, seeds, cases, by_seed):
    rng, number = np.random.default_rng(0), 2000
    held = sum(found.low <= 0.7 <= found.high for found in (
        interval(simulated(rng, 0.7, folds, seeds, cases, by_seed=by_seed))
        for _ in range(number)))
    assert 0.93 <= held / number <= 0.97


def test_a_bootstrap_over_cases_and_seeds_promises_too_much():
    """Which is why there is none."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        study = simulated(rng, 0.0, 2, 3, 20)
        means = np.zeros(300)
        for fold in study:
            seeds, cases = (rng.integers(n, size=(300, n)) for n in fold.shape)
            means += [fold[s][:, c].mean() / 2 for s, c in zip(seeds, cases, strict=True)]
        low, high = np.quantile(means, (0.025, 0.975))
        held += low <= 0 <= high
    assert held / 300 < 0.9


def test_where_nothing_differs_nothing_is_found():
    """Five ways against one reference, all alike: a false one in at most 5 of 100 studies."""
    rng, false = np.random.default_rng(0), 0
    for _ in range(600):
        reference = simulated(rng, 0.0, 2, 3, 10)
        found = {str(way): interval([a - b for a, b in zip(
            simulated(rng, 0.0, 2, 3, 10), reference, strict=True)]).p for way in range(5)}
        false += min(holm(found).values()) < 0.05
    assert false / 600 <= 0.05


def test_where_seeds_agree_it_is_the_paired_t_test():
    """Without any difference between seeds, cases alone are random."""
    d = np.random.default_rng(0).standard_normal(17) + 0.4
    found, wanted = interval([np.stack([d, d, d])]), stats.ttest_1samp(d, 0)
    ends = wanted.confidence_interval(0.95)
    assert found == pytest.approx((d.mean(), ends.low, ends.high, wanted.pvalue))
    # And without any between cases, seeds alone.
    found = interval([np.repeat(d[:, None], 4, axis=1)], 0.9)
    ends = wanted.confidence_interval(0.9)
    assert found == pytest.approx((d.mean(), ends.low, ends.high, wanted.pvalue))


def test_a_permutation_test_finds_the_same_where_seeds_do_not_matter():
    rng = np.random.default_rng(0)
    d = simulated(rng, 0.5, 1, 8, 15, by_seed=0.0, rest=0.1)
    signs = rng.choice([-1, 1], (20_000, 15))
    means = (signs * d[0].mean(axis=0)).mean(axis=1)
    p = (abs(means) >= abs(d[0].mean()) - 1e-12).mean()
    assert interval(d).p == pytest.approx(p, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 4), st.integers(2, 6), st.floats(-3, 3), st.floats(0.1, 9),
       st.integers(0, 99))
def test_it_moves_and_grows_with_the_numbers_and_knows_no_order(seeds, cases, shift, scale, seed):
    rng = np.random.default_rng(seed)
    study = simulated(rng, 0.2, 2, seeds, cases)
    study[1] = study[1][:, :-1] if cases > 2 else study[1]  # folds of other sizes
    found = interval(study)
    moved = interval([scale * fold + shift for fold in study])
    assert moved[:3] == pytest.approx([scale * x + shift for x in found[:3]])
    mixed = interval([fold[::-1, ::-1]
                      for fold in study[::-1]])
    assert mixed == pytest.approx(found)
    assert found.low <= found.mean <= found.high and 0 <= found.p <= 1
    assert (found.p < 0.05) == (not found.low <= 0 <= found.high)


def test_all_alike():
    assert interval([np.zeros((2, 3))]) == (0, 0, 0, 1)
    assert interval([np.full((2, 3), 0.5)]) == (0.5, 0.5, 0.5, 0)


@pytest.mark.parametrize("wrong, said", [
    ([], "expected"), ([np.zeros((1, 5))], r"\(1, 5\)"), ([np.zeros((3, 1))], r"\(3, 1\)"),
    ([np.zeros((3, 2)), np.zeros(3)], r"\(3,\)"), ([np.full((2, 2), np.nan)], "not finite")])
def test_what_nothing_is_known_of(wrong, said):
    with pytest.raises(ValueError, match=said):
        interval(wrong)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_against_its_definition(p):
    """Rejected at level a are the smallest ones, as long as p (n - k) <= a."""
    names = {str(i): x for i, x in enumerate(p)}
    raised, order = holm(names), sorted(names, key=lambda name: names[name])
    assert list(raised) == list(names)
    for level in (0.01, 0.05, 0.5):
        rejected = []
        for k, name in enumerate(order):
            if names[name] * (len(p) - k) > level:
                break
            rejected.append(name)
        assert sorted(rejected) == sorted(n for n in raised if raised[n] <= level)
