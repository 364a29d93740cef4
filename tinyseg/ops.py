"""Differentiable operations on tensors, channels last: (N, *S, C) at any rank.

Each function stands beside its pull-back; `tensor.op` explains the form. Arithmetic, matmul,
reductions, reshape, transpose and indexing are methods of `Tensor`.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from . import windows
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


def _standardize(x, axes, eps):
    """x̂ = (x - mean) / sqrt(var + eps) over `axes`, its pull-back, mean and (biased) variance."""
    mean = x.mean(axis=axes, keepdims=True)
    xhat = x - mean
    var = (xhat * xhat).mean(axis=axes, keepdims=True)
    scale = 1 / array_module(x).sqrt(var + eps)
    xhat *= scale

    def pull(g):
        along = (g * xhat).mean(axis=axes, keepdims=True)
        return scale * (g - g.mean(axis=axes, keepdims=True) - xhat * along)

    return xhat, pull, mean, var


@op
def batch_norm(x, gamma, beta, *, running_mean, running_var, train: bool = False,
               momentum: float = 0.1, eps: float = 1e-5):
    """gamma (x - mean) / sqrt(var + eps) + beta per channel (Ioffe and Szegedy 2015).

    x (N, *S, C); gamma, beta, running_mean, running_var (C,). In train mode mean and biased
    variance are those of `x`, and the running arrays are updated in place: they move by
    `momentum` towards the mean and the unbiased variance. Otherwise the running arrays are used
    and left alone. Raises ValueError for a single value per channel in train mode.
    """
    shape, rows = x.shape, x.reshape(-1, x.shape[-1])
    if train:
        n = len(rows)
        if n < 2:
            raise ValueError(f"batch_norm in train mode needs more than one value per channel, "
                             f"found input {shape}; use a larger batch or running statistics")
        xhat, standardize_dx, mean, var = _standardize(rows, 0, eps)
        running_mean += momentum * (mean[0] - running_mean)
        running_var += momentum * (var[0] * (n / (n - 1)) - running_var)
    else:
        scale = 1 / array_module(x).sqrt(running_var + eps)
        xhat = (rows - running_mean) * scale

        def standardize_dx(g):
            return g * scale

    def pull(g, wanted):
        g = g.reshape(-1, shape[-1])
        return (
            standardize_dx(g * gamma).reshape(shape) if wanted[0] else None,
            (g * xhat).sum(axis=0) if wanted[1] else None,
            g.sum(axis=0) if wanted[2] else None,
        )

    y = xhat * gamma
    y += beta
    return y.reshape(shape), pull


@op
def group_norm(x, gamma, beta, *, groups: int, eps: float = 1e-5):
    """Like batch_norm, over the positions and channels of one group in one sample (Wu and He 2018).

    x (N, *S, C) with C divisible by `groups`; gamma, beta (C,).
    """
    shape = x.shape
    if shape[-1] % groups:
        raise ValueError(f"group_norm: {shape[-1]} channels do not divide into {groups} groups")
    grouped = (shape[0], -1, groups, shape[-1] // groups)
    xhat, standardize_dx, _, _ = _standardize(x.reshape(grouped), (1, 3), eps)
    xhat = xhat.reshape(-1, shape[-1])

    def pull(g, wanted):
        g = g.reshape(-1, shape[-1])
        return (
            standardize_dx((g * gamma).reshape(grouped)).reshape(shape) if wanted[0] else None,
            (g * xhat).sum(axis=0) if wanted[1] else None,
            g.sum(axis=0) if wanted[2] else None,
        )

    return (xhat * gamma + beta).reshape(shape), pull


def interpolation(n: int, m: int, align_corners: bool) -> np.ndarray:
    """The (m, n) matrix of linear interpolation from n samples to m.

    Output i reads at i (n-1)/(m-1) where corners are aligned, else at (i + 1/2) n/m - 1/2,
    clamped to the samples.
    """
    i = np.arange(m)
    at = i * (n - 1) / max(m - 1, 1) if align_corners else (i + 0.5) * n / m - 0.5
    at = at.clip(0, n - 1)
    low = np.floor(at).astype(int)
    matrix = np.zeros((m, n))
    matrix[i, low] = 1 - (at - low)
    matrix[i, np.minimum(low + 1, n - 1)] += at - low
    return matrix


@op
def upsample(x, size, *, align_corners: bool):
    """Linear interpolation along each spatial axis to `size`: (N, *S, C) -> (N, *size, C).

    One small matrix product per axis (see `interpolation`), last axis first.
    """
    library, before = array_module(x), x.shape
    if len(size) != x.ndim - 2:
        raise ValueError(f"upsample: size {size} does not fit the spatial axes of {before}")
    steps = [
        (axis, library.asarray(interpolation(before[axis], m, align_corners), dtype=x.dtype))
        for axis, m in reversed(list(enumerate(size, start=1)))
        if before[axis] != m
    ]

    def along(array, axis, matrix):
        head, tail = array.shape[:axis], array.shape[axis + 1 :]
        lines = matrix @ array.reshape(-1, array.shape[axis], int(np.prod(tail)))
        return lines.reshape(*head, len(matrix), *tail)

    y = x
    for axis, matrix in steps:
        y = along(y, axis, matrix)

    def pull(g):
        for axis, matrix in reversed(steps):
            g = along(g, axis, matrix.T)
        return g

    return y, (pull,)
