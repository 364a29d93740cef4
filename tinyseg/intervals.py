"""What a difference between two ways of training is known to: an interval over cases and seeds.

Another seed gives another network, and another patient another score. With few seeds the first
counts most, so an interval over cases alone promises too much; so does a bootstrap over both, whose
95 % hold the truth in 86 % of simulated studies of three seeds (tests/test_intervals.py). Readers
and cases of radiology's studies are the same design.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean difference, the ends of its interval, and p of a mean at least as far from zero.

    >>> found = ts.intervals.Interval(mean=0.02, low=-0.01, high=0.05, p=0.18)
    >>> found.low <= 0 <= found.high  # the difference may be none
    True
    """

    mean: float
    low: float
    high: float
    p: float


def interval(differences: Sequence[np.ndarray], level: float = 0.95) -> Interval:
    """The mean over cases of paired differences, with a confidence interval.

    differences: for each fold an array (seeds, cases), of every case that it holds out and every
    network trained without them. Both are random and cross, d[s, c] = mean + a[s] + b[c] + e[s, c],
    a of its own in every fold. With the mean squares of the seeds, of the cases and of what is left
    in a fold of S seeds and n cases, the variance of its mean is (MS_s + MS_c - MS_e) / (S n), with
    no less in the brackets than any of the three, which chance can bring about; its degrees of
    freedom are Satterthwaite's (1946), as for readers and cases (Dorfman, Berbaum and Metz 1992;
    Hillis 2007), and at least those of the fewest seeds or cases. That networks
    of two folds have learned from many of the same cases is not in it: nothing in a study tells how
    much that counts (Bengio and Grandvalet 2004).

    ValueError for fewer than two seeds or cases, of which nothing is known, and for what is not
    finite.

    >>> fold = np.array([[0.01, 0.03, 0.02, 0.04], [0.02, 0.03, 0.03, 0.06]])  # 2 seeds, 4 cases
    >>> found = ts.intervals.interval([fold])
    >>> f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f}), p = {found.p:.2f}"
    '0.030 (0.005 to 0.055), p = 0.03'
    """
    from scipy.stats import t  # takes longer than all of tinyseg to import

    folds = [np.asarray(fold, float) for fold in differences]
    if not folds or any(fold.ndim != 2 or min(fold.shape) < 2 for fold in folds):
        raise ValueError(f"found differences of the shapes {[fold.shape for fold in folds]}, "
                         "expected (seeds, cases) of a fold at least, two of each at least")
    if not all(np.isfinite(fold).all() for fold in folds):
        raise ValueError("found differences that are not finite; leave out the cases that have no "
                         "score")
    cases = sum(fold.shape[1] for fold in folds)
    mean = float(sum(fold.sum(axis=1).mean() for fold in folds) / cases)
    variance = spread = 0.0
    for fold in folds:
        seeds, here = fold.shape
        by_seed, by_case = fold.mean(axis=1), fold.mean(axis=0)
        rest = fold - by_seed[:, None] - by_case + fold.mean()
        squares = (here * by_seed.var(ddof=1), seeds * by_case.var(ddof=1),
                   (rest**2).sum() / ((seeds - 1) * (here - 1)))
        share = (here / cases) ** 2 / (seeds * here)
        variance += share * max(squares[0] + squares[1] - squares[2], *squares)
        spread += sum((share * square) ** 2 / free for square, free in zip(
            squares, (seeds - 1, here - 1, (seeds - 1) * (here - 1)), strict=True))
    if variance == 0:
        return Interval(mean, mean, mean, float(mean == 0))
    least = min(n - 1 for fold in folds for n in fold.shape)  # a difference of squares has less
    free, error = max(least, variance**2 / spread), sqrt(variance)
    half = float(t.ppf((1 + level) / 2, free)) * error
    return Interval(mean, mean - half, mean + half, float(2 * t.sf(abs(mean) / error, free)))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p of several comparisons, raised so that one study in 20 at most has any false one below 5 %
    (Holm 1979): the k-th smallest of n times n - k, counted from 0, and none below one before.

    >>> ts.intervals.holm({"average": 0.01, "zero": 0.04, "planar": 0.5})
    {'average': 0.03, 'zero': 0.08, 'planar': 0.5}
    """
    raised, least = {}, 0.0
    for k, name in enumerate(sorted(p, key=lambda name: p[name])):
        least = min(1.0, max(least, p[name] * (len(p) - k)))
        raised[name] = least
    return {name: raised[name] for name in p}
