"""Batch and group normalisation, channels last: (N, *S, C) at any rank; `ops` offers them."""

from __future__ import annotations

from functools import partial

import numpy as np

from . import cuda, parallel
from .backend import array_module
from .parallel import widened
from .ranks import ALONE, Alone
from .tensor import op


def row_slabs(rows) -> list[slice]:
    """Rows (M, C) cut so that what is computed of a slab stays in cache, on all cores; uncut
    where the array is not NumPy's."""
    size = max(1, parallel.SLAB // rows.shape[-1]) if array_module(rows) is np else len(rows)
    return parallel.parts(len(rows), size)


def column_sums(rows):
    """(M, C) -> (C,), added slab by slab: row by row, as NumPy would, the float32 sum of two
    million equal numbers is 2 % off. A GPU adds as in a tree."""
    if cuda.serves(rows):
        return rows.sum(axis=0)
    library = array_module(rows)
    return library.stack(parallel.run(
        lambda slab: library.ones(len(rows[slab]), rows.dtype) @ rows[slab], row_slabs(rows))
    ).sum(axis=0)


def _moments(rows):
    """(M, C) -> how many rows slabs have, each in cache, the means of their columns and the sums of
    squares about those, (slabs, C)."""
    slabs, library = row_slabs(rows), array_module(rows)
    means, squares = library.empty((2, len(slabs), rows.shape[-1]), rows.dtype)

    def add(i):
        slab = rows[slabs[i]]
        ones = library.ones(len(slab), rows.dtype)
        means[i] = ones @ slab / len(slab)  # thrice as fast as slab.mean(axis=0)
        away = slab - means[i]
        squares[i] = library.einsum("ij,ij->j", away, away)

    parallel.run(add, range(len(slabs)))
    return [len(rows[slab]) for slab in slabs], means, squares


def _merged(counts, means, squares):
    """Mean and biased variance of all rows, of which parts hold `counts`, each (parts, C) (Chan,
    Golub and LeVeque 1983)."""
    library, total = array_module(means), sum(counts)
    share = library.asarray([[n / total] for n in counts], means.dtype)
    mean = (share * means).sum(axis=0)
    return mean, squares.sum(axis=0) / total + (share * (means - mean) ** 2).sum(axis=0)


def _statistics(rows, running_mean, running_var, momentum, eps, ranks=ALONE):
    """Mean and 1 / sqrt(variance + eps) of each column, (C,), and of how many rows: those of all
    ranks. Towards them the running ones move: by `momentum` of the way, to the variance without
    bias."""
    library, parts = array_module(rows), _moments(rows)
    if ranks.size > 1:  # merging what is one part would round anew
        n, (mean, var) = len(rows), _merged(*parts)
        counts, *parts = zip(*ranks.gather((n, mean, n * var)), strict=True)
        parts = counts, *map(library.stack, parts)
    n, (mean, var) = sum(parts[0]), _merged(*parts)
    _expect_several(n)
    running_mean += momentum * (mean - running_mean)
    running_var += momentum * (var * (n / (n - 1)) - running_var)
    return mean, 1 / library.sqrt(var + eps), n


def _expect_several(n: int) -> None:
    """ValueError unless n values have a variance."""
    if n < 2:
        raise ValueError("batch_norm in train mode needs more than one value per channel, found "
                         f"{n}; use a larger batch or running statistics")


def _normalize(rows, mean, scale, gamma, beta, residual, relu):
    """(rows - mean) scale gamma + beta [+ residual], then max(., 0) where asked."""
    library, shape = array_module(rows), rows.shape
    rows, mean, factor, beta = widened(rows, mean, scale * gamma, beta)
    y, zero = library.empty(rows.shape, rows.dtype), library.zeros_like(beta)
    added = residual.reshape(rows.shape) if residual is not None else None

    def normalize(slab):
        part = y[slab]
        library.subtract(rows[slab], mean, out=part)
        part *= factor
        part += beta
        if added is not None:
            part += added[slab]
        if relu:
            library.maximum(part, zero, out=part)

    parallel.run(normalize, row_slabs(rows))
    return y.reshape(shape)


def _normalize_adjoint(g, rows, y, mean, scale, gamma, beta, *, train, relu, residual, n=0,
                       ranks=ALONE):
    """Gradients in rows, gamma, beta and residual; in train mode mean and scale depend on the
    n rows of all ranks.

    A body may recompute y from beta where no residual was added; this one reads it.
    """
    library, slabs = array_module(rows), row_slabs(rows)
    passed = library.empty(rows.shape, rows.dtype) if relu else g  # the gradient behind the ReLU
    sums = library.empty((2, len(slabs), rows.shape[-1]), rows.dtype)

    def add(i):
        slab = slabs[i]
        part = passed[slab]
        if relu:
            library.multiply(g[slab], y[slab] > 0, out=part)
        sums[0, i] = library.ones(len(part), rows.dtype) @ part
        sums[1, i] = library.einsum("ij,ij->j", rows[slab] - mean, part)

    parallel.run(add, range(len(slabs)))
    dbeta, dgamma = sums[0].sum(axis=0), sums[1].sum(axis=0) * scale
    lines, middle, factor = widened(rows, mean, gamma * scale)
    dx, behind = library.empty(lines.shape, lines.dtype), passed.reshape(lines.shape)
    if train:
        all_beta, all_gamma = ranks.total(library.stack([dbeta, dgamma]))
        _, constant, slope = widened(rows, all_beta / n, all_gamma * scale / -n)

    def differentiate(slab):
        part = dx[slab]
        if train:
            library.subtract(lines[slab], middle, out=part)
            part *= slope
            part += behind[slab]
            part -= constant
            part *= factor
        else:
            library.multiply(behind[slab], factor, out=part)

    parallel.run(differentiate, row_slabs(lines))
    return dx, dgamma, dbeta, passed


def _check(name, x, **arrays) -> None:
    """Raise ValueError unless each of the arrays has one number for each channel of x."""
    for what, array in arrays.items():
        if array.shape != x.shape[-1:]:
            raise ValueError(f"{name}: {what} {array.shape} does not fit the channels of input "
                             f"{x.shape}")


@op
def batch_norm(x, gamma, beta, residual=None, *, running_mean, running_var, train: bool = False,
               momentum: float = 0.1, eps: float = 1e-5, relu: bool = False,
               ranks: Alone = ALONE):
    """gamma (x - mean) / sqrt(var + eps) + beta per channel (Ioffe and Szegedy 2015).

    x (N, *S, C); gamma, beta, running_mean, running_var (C,). In train mode mean and biased
    variance are those of `x`, and the running arrays are updated in place: they move by
    `momentum` towards the mean and the unbiased variance. Otherwise the running arrays are used
    and left alone. What follows the normalisation in a residual block can be part of it, in the
    same passes over memory: `residual`, in the shape of x, is added, and `relu` cuts at 0. With
    `ranks`, mean and variance in train mode are those of what all of them give together.
    Raises ValueError for a single value per channel in train mode.

    >>> x, mean, var = np.array([[1.0], [3.0]]), np.zeros(1), np.ones(1)
    >>> y = ts.ops.batch_norm(x, np.ones(1), np.zeros(1), running_mean=mean, running_var=var,
    ...                       train=True, eps=0)
    >>> y.data.ravel(), mean, var  # a tenth of the way to the mean 2, the unbiased variance 2
    (array([-1.,  1.]), array([0.2]), array([1.1]))
    """
    _check("batch_norm", x, gamma=gamma, beta=beta, running_mean=running_mean,
           running_var=running_var)
    shape, rows = x.shape, x.reshape(-1, x.shape[-1])
    if residual is not None:
        if residual.shape != shape:
            raise ValueError(f"batch_norm: residual {residual.shape} does not fit input {shape}")
        residual = residual.reshape(rows.shape)
    n, added, ranks = len(rows), residual is not None, ranks if train else ALONE
    fused = ranks.size == 1 and cuda.serves(x, gamma, beta, residual, running_mean, running_var)
    if not train:
        mean, scale = running_mean.copy(), 1 / array_module(x).sqrt(running_var + eps)
    elif fused:
        _expect_several(n)
        mean, scale = cuda.norm.statistics(rows, running_mean, running_var, momentum, eps)
    else:
        mean, scale, n = _statistics(rows, running_mean, running_var, momentum, eps, ranks)
    normalize, adjoint = (
        (cuda.norm.normalize, cuda.norm.normalize_adjoint) if fused else
        (_normalize, partial(_normalize_adjoint, n=n, ranks=ranks)))
    y = normalize(rows, mean, scale, gamma, beta, residual, relu)

    def pull(g, wanted):
        dx, dgamma, dbeta, passed = adjoint(g.reshape(y.shape), rows, y, mean, scale, gamma, beta,
                                            train=train, relu=relu, residual=added)
        return dx.reshape(shape), dgamma, dbeta, passed.reshape(shape) if added else None

    return y.reshape(shape), pull


@op
def group_norm(x, gamma, beta, *, groups: int, eps: float = 1e-5):
    """Like batch_norm, over the positions and channels of one group in one sample (Wu and He 2018).

    x (N, *S, C) with C divisible by `groups`; gamma, beta (C,).

    >>> x = np.array([[[1.0, 3.0, 10.0, 20.0]]])  # (1, 1, 4), two groups of two channels
    >>> ts.ops.group_norm(x, np.ones(4), np.zeros(4), groups=2, eps=0).data.ravel()
    array([-1.,  1., -1.,  1.])
    """
    _check("group_norm", x, gamma=gamma, beta=beta)
    shape = x.shape
    if groups < 1 or shape[-1] % groups:
        raise ValueError(f"group_norm: {shape[-1]} channels do not divide into {groups} groups")
    grouped, axes = (shape[0], -1, groups, shape[-1] // groups), (1, 3)
    xhat = x.reshape(grouped)
    xhat = xhat - xhat.mean(axis=axes, keepdims=True)
    scale = 1 / array_module(x).sqrt((xhat * xhat).mean(axis=axes, keepdims=True) + eps)
    xhat *= scale
    flat = xhat.reshape(-1, shape[-1])

    def dx(g):
        g = (g * gamma).reshape(grouped)
        along = (g * xhat).mean(axis=axes, keepdims=True)
        return (scale * (g - g.mean(axis=axes, keepdims=True) - xhat * along)).reshape(shape)

    return (flat * gamma + beta).reshape(shape), (
        dx,
        lambda g: column_sums(g.reshape(flat.shape) * flat),
        lambda g: column_sums(g.reshape(flat.shape)),
    )
