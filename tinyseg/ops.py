"""Differentiable operations on tensors, channels last: (N, *S, C) at any rank.

Each function stands beside its pull-back; `tensor.op` explains the form. Arithmetic, matmul,
reductions, reshape, transpose and indexing are methods of `Tensor`.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod

import numpy as np

from . import cuda, parallel, windows
from .backend import array_module
from .tensor import op
from .windows import Window

__all__ = ["batch_norm", "concatenate", "conv", "exp", "group_norm", "log", "max_pool", "relu",
           "softmax", "upsample"]


@op
def relu(x):
    """max(x, 0); the derivative at 0 is 0."""
    y = array_module(x).maximum(x, 0)
    return y, (lambda g: g * (y > 0),)


@op
def exp(x):
    """e to the x."""
    y = array_module(x).exp(x)
    return y, (lambda g: g * y,)


@op
def log(x):
    """Natural logarithm."""
    return array_module(x).log(x), (lambda g: g / x,)


@op
def concatenate(*xs, axis: int = -1):
    """Arrays joined along an existing axis (the channels, unless told otherwise)."""
    ends = list(accumulate(x.shape[axis] for x in xs))

    def part(stop, n):
        return lambda g: g.swapaxes(axis, 0)[stop - n : stop].swapaxes(axis, 0)

    pulls = [part(stop, x.shape[axis]) for stop, x in zip(ends, xs, strict=True)]
    return array_module(xs[0]).concatenate(xs, axis=axis), pulls


@op
def softmax(x, *, axis: int = -1):
    """exp(x) / Σ exp(x) along `axis`, computed from x minus its maximum."""
    p = _softmax(x, axis)
    return p, (lambda g: p * (g - (g * p).sum(axis=axis, keepdims=True)),)


def _softmax(x, axis=-1):
    e = array_module(x).exp(x - x.max(axis=axis, keepdims=True))
    e /= e.sum(axis=axis, keepdims=True)
    return e


@op
def conv(x, w, b=None, *, stride=1, padding=0, dilation=1, padding_mode="zero"):
    """Cross-correlation, as every framework's convolution: see windows.reference.correlate.

    x (N, *S, C_in), w (*K, C_in, C_out), b (C_out,) or None -> (N, *P, C_out) with
    P = floor((S + before + after - dilation (K-1) - 1) / stride) + 1. Options are a number or a
    tuple with one entry per spatial axis; a padding entry is an int or (before, after), a
    padding_mode entry "zero" or "edge". Raises ValueError where shapes do not fit.
    """
    if x.ndim != w.ndim or x.shape[-1] != w.shape[-2]:
        raise ValueError(f"conv: input {x.shape} does not fit kernel {w.shape}; expected "
                         f"(N, *S, C_in) and (*K, C_in, C_out) with equal rank and C_in")
    window, size = Window.of(w.shape[:-2], stride, padding, dilation, padding_mode), x.shape[1:-1]
    y = windows.correlate(x, w, window)
    if b is not None:
        y += b
    return y, (
        lambda g: windows.correlate_dx(g, w, size, window),
        lambda g: windows.correlate_dw(x, g, window),
        lambda g: g.reshape(-1, g.shape[-1]).sum(axis=0),
    )


@op
def max_pool(x, *, kernel, stride=None, padding=0, dilation=1):
    """The maximum over each window, per channel: (N, *S, C) -> (N, *P, C).

    `kernel` is a tuple of length rank; `stride` defaults to it. Padding never wins.
    """
    window, size = Window.of(kernel, stride or kernel, padding, dilation), x.shape[1:-1]
    y, winner = windows.maximum(x, window)
    return y, (lambda g: windows.maximum_adjoint(g, winner, size, window),)


def _slabs(rows) -> list[slice]:
    """Rows (M, C) cut so that what is computed of a slab stays in cache, on all cores; uncut
    where the array is not NumPy's."""
    size = max(1, parallel.SLAB // rows.shape[-1]) if array_module(rows) is np else len(rows)
    return parallel.parts(len(rows), size)


def _moments(rows):
    """Mean and biased variance of each column: (M, C) -> (C,), (C,); those of slabs, each in cache
    for both, put together (Chan, Golub and LeVeque 1983)."""
    slabs, library = _slabs(rows), array_module(rows)
    means, squares = library.empty((2, len(slabs), rows.shape[-1]), rows.dtype)

    def add(i):
        slab = rows[slabs[i]]
        ones = library.ones(len(slab), rows.dtype)
        means[i] = ones @ slab / len(slab)  # thrice as fast as slab.mean(axis=0)
        away = slab - means[i]
        squares[i] = library.einsum("ij,ij->j", away, away)

    parallel.run(add, range(len(slabs)))
    share = library.asarray([[len(rows[slab]) / len(rows)] for slab in slabs], rows.dtype)
    mean = (share * means).sum(axis=0)
    return mean, squares.sum(axis=0) / len(rows) + (share * (means - mean) ** 2).sum(axis=0)


def _normalize(rows, mean, scale, gamma, beta, residual, relu):
    """(rows - mean) scale gamma + beta [+ residual], then max(., 0) where asked."""
    library, factor = array_module(rows), scale * gamma
    y = library.empty_like(rows)

    def normalize(slab):
        part = y[slab]
        library.subtract(rows[slab], mean, out=part)
        part *= factor
        part += beta
        if residual is not None:
            part += residual[slab]
        if relu:
            library.maximum(part, 0, out=part)

    parallel.run(normalize, _slabs(rows))
    return y


def _normalize_adjoint(g, rows, y, mean, scale, gamma, beta, *, train, relu, residual):
    """Gradients in rows, gamma, beta and residual; in train mode mean and scale depend on rows.

    A body may recompute y from beta where no residual was added; this one reads it.
    """
    library, slabs = array_module(rows), _slabs(rows)
    passed = library.empty_like(rows) if relu else g  # the gradient behind the ReLU
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
    dx, factor = library.empty_like(rows), gamma * scale
    if train:
        constant, slope = dbeta / len(rows), dgamma * scale / -len(rows)

    def differentiate(slab):
        part = dx[slab]
        if train:
            library.subtract(rows[slab], mean, out=part)
            part *= slope
            part += passed[slab]
            part -= constant
            part *= factor
        else:
            library.multiply(passed[slab], factor, out=part)

    parallel.run(differentiate, slabs)
    return dx, dgamma, dbeta, passed


@op
def batch_norm(x, gamma, beta, residual=None, *, running_mean, running_var, train: bool = False,
               momentum: float = 0.1, eps: float = 1e-5, relu: bool = False):
    """gamma (x - mean) / sqrt(var + eps) + beta per channel (Ioffe and Szegedy 2015).

    x (N, *S, C); gamma, beta, running_mean, running_var (C,). In train mode mean and biased
    variance are those of `x`, and the running arrays are updated in place: they move by
    `momentum` towards the mean and the unbiased variance. Otherwise the running arrays are used
    and left alone. What follows the normalisation in a residual block can be part of it, in the
    same passes over memory: `residual`, in the shape of x, is added, and `relu` cuts at 0.
    Raises ValueError for a single value per channel in train mode.
    """
    shape, rows = x.shape, x.reshape(-1, x.shape[-1])
    if residual is not None:
        if residual.shape != shape:
            raise ValueError(f"batch_norm: residual {residual.shape} does not fit input {shape}")
        residual = residual.reshape(rows.shape)
    added = residual is not None
    moments, normalize, adjoint = (
        (cuda.norm.moments, cuda.norm.normalize, cuda.norm.normalize_adjoint)
        if cuda.serves(x, gamma, beta, residual) else (_moments, _normalize, _normalize_adjoint))
    if train:
        n = len(rows)
        if n < 2:
            raise ValueError(f"batch_norm in train mode needs more than one value per channel, "
                             f"found input {shape}; use a larger batch or running statistics")
        mean, var = moments(rows)
        running_mean += momentum * (mean - running_mean)
        running_var += momentum * (var * (n / (n - 1)) - running_var)
    else:
        mean, var = running_mean.copy(), running_var
    scale = 1 / array_module(x).sqrt(var + eps)
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
    """
    shape = x.shape
    if shape[-1] % groups:
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
        lambda g: (g.reshape(flat.shape) * flat).sum(axis=0),
        lambda g: g.reshape(flat.shape).sum(axis=0),
    )


def interpolation(n: int, m: int, align_corners: bool) -> np.ndarray:
    """The (m, n) matrix of linear interpolation from n samples to m: cuda.upsample.coordinates."""
    i, (low, fraction) = np.arange(m), cuda.upsample.coordinates(n, m, align_corners)
    matrix = np.zeros((m, n))
    matrix[i, low] = 1 - fraction
    matrix[i, np.minimum(low + 1, n - 1)] += fraction
    return matrix


@op
def upsample(x, size, *, align_corners: bool):
    """Linear interpolation along each spatial axis to `size`: (N, *S, C) -> (N, *size, C).

    One small matrix product per axis (see `interpolation`), last axis first.
    """
    library, shape = array_module(x), x.shape
    if len(size) != x.ndim - 2:
        raise ValueError(f"upsample: size {size} does not fit the spatial axes of {shape}")
    if cuda.serves(x) and len(size) <= 3:
        return cuda.upsample.upsample(x, size, align_corners), (
            lambda g: cuda.upsample.upsample_adjoint(g, shape[1:-1], align_corners),)
    steps = [
        (axis, library.asarray(interpolation(shape[axis], m, align_corners), dtype=x.dtype))
        for axis, m in reversed(list(enumerate(size, start=1)))
        if shape[axis] != m
    ]

    def along(array, axis, matrix):
        head, tail = array.shape[:axis], array.shape[axis + 1 :]
        lines = array.reshape(-1, array.shape[axis], prod(tail))
        y = library.empty((len(lines), len(matrix), lines.shape[-1]), array.dtype)
        before = (slice(None),) * (0 if len(lines) > lines.shape[-1] else 2)  # the longer is cut

        def interpolate(part):
            library.matmul(matrix, lines[*before, part], out=y[*before, part])

        parallel.run(interpolate, parallel.parts(lines.shape[len(before)]) if library is np
                     else [slice(None)])
        return y.reshape(*head, len(matrix), *tail)

    y = x
    for axis, matrix in steps:
        y = along(y, axis, matrix)

    def pull(g):
        for axis, matrix in reversed(steps):
            g = along(g, axis, matrix.T)
        return g

    return y, (pull,)
