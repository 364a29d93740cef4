"""Differentiable operations on tensors, channels last: (N, *S, C) at any rank.

Each function stands beside its pull-back; `tensor.op` explains the form. Arithmetic, matmul,
reductions, reshape, transpose and indexing are methods of `Tensor`. What is said of the derivative
at a kink is PyTorch's choice too.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod

import numpy as np

from . import cuda, parallel, windows
from .backend import array_module
from .convolution import conv, conv_phases, double, phases
from .normalisation import batch_norm, group_norm
from .tensor import Tensor, op, recording
from .windows import Window, reference

__all__ = ["avg_pool", "batch_norm", "clip", "concatenate", "conv", "conv_phases", "double",
           "dropout", "exp", "group_norm", "log", "max_pool", "maximum", "pad", "phases", "relu",
           "sigmoid", "softmax", "sqrt", "stack", "tanh", "upsample", "where"]


@op
def relu(x):
    """max(x, 0); the derivative at 0 is 0.

    >>> ts.ops.relu(np.array([-2.0, 0.0, 3.0]))
    Tensor(array([0., 0., 3.]))
    """
    y = array_module(x).maximum(x, 0)
    return y, (lambda g: g * (y > 0),)


@op
def exp(x):
    """e to the x.

    >>> ts.ops.exp(np.array([0.0, -np.inf]))
    Tensor(array([1., 0.]))
    """
    y = array_module(x).exp(x)
    return y, (lambda g: g * y,)


@op
def log(x):
    """Natural logarithm.

    >>> ts.ops.log(np.array([1.0, np.e]))
    Tensor(array([0., 1.]))
    """
    return array_module(x).log(x), (lambda g: g / x,)


@op
def sqrt(x):
    """The square root; its derivative at 0 is infinite.

    >>> ts.ops.sqrt(np.array([4.0, 9.0]))
    Tensor(array([2., 3.]))
    """
    y = array_module(x).sqrt(x)
    return y, (lambda g: g / (2 * y),)


@op
def tanh(x):
    """The hyperbolic tangent.

    >>> ts.ops.tanh(np.array([-np.inf, 0.0, np.inf]))
    Tensor(array([-1.,  0.,  1.]))
    """
    y = array_module(x).tanh(x)
    return y, (lambda g: g * (1 - y * y),)


@op
def sigmoid(x):
    """1 / (1 + exp(-x)), without exp of a large number.

    >>> ts.ops.sigmoid(np.array([-1000.0, 0.0, 1000.0]))
    Tensor(array([0. , 0.5, 1. ]))
    """
    library = array_module(x)
    e = library.exp(-abs(x if x.dtype.kind == "f" else x * 1.0))  # a byte has no negative
    y = library.where(x < 0, e, 1) / (1 + e)
    return y, (lambda g: g * (y * (1 - y)),)


@op
def maximum(x, y):
    """The larger of x and y, broadcast; where they are equal each gets half the gradient.

    >>> ts.ops.maximum(np.array([1.0, 5.0]), 3)
    Tensor(array([3., 5.]))
    """
    library = array_module(x if hasattr(x, "shape") else y)  # the other may be a number

    def part(mine, other):
        return lambda g: library.where(mine == other, g / 2, g * (mine > other))

    return library.maximum(x, y), (part(x, y), part(y, x))


@op
def where(condition, x, y):
    """x where the condition holds, else y, broadcast; what is not chosen has no part in it.

    >>> ts.ops.where(np.array([True, False, True]), np.array([1.0, 2.0, 3.0]), -1)
    Tensor(array([ 1., -1.,  3.]))
    """
    library = array_module(next((a for a in (condition, x, y) if hasattr(a, "shape")), 0))
    condition = condition.copy() if hasattr(condition, "shape") else condition  # it may change
    return library.where(condition, x, y), (
        None, lambda g: library.where(condition, g, 0), lambda g: library.where(condition, 0, g))


@op
def clip(x, *, low: float | None = None, high: float | None = None):
    """x cut to [low, high], on one side only where the other is None; outside the derivative is 0.
    Raises ValueError where low is above high.

    >>> ts.ops.clip(np.array([-4.0, 0.5, 9.0]), low=0, high=1)
    Tensor(array([0. , 0.5, 1. ]))
    """
    if low is not None and high is not None and low > high:
        raise ValueError(f"clip: low is {low}, above high, which is {high}")
    library, y = array_module(x), x
    y = y if low is None else library.maximum(y, low)
    y = y if high is None else library.minimum(y, high)
    return y, (lambda g: g * (x == y),)


@op
def dropout(x, *, p: float, rng: np.random.Generator):
    """x / (1 - p) with probability 1 - p, else 0, for each number alone (Srivastava et al. 2014):
    for training; in evaluation x itself is its mean. `rng` draws, one array a call.

    >>> np.unique(ts.ops.dropout(np.ones(99), p=0.75, rng=np.random.default_rng(0)).data)
    array([0., 4.])
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p is {p}; expected a probability from 0 to below 1")
    if not hasattr(rng, "random"):
        raise TypeError(f"dropout: rng is {rng!r}; expected a generator, np.random.default_rng("
                        "seed), made once: a seed would draw the same in every call")
    if cuda.is_capturing():
        raise RuntimeError("dropout draws on the host at each step, a captured step would repeat "
                           "one draw: train without capture, or without dropout")
    kept = array_module(x).asarray(rng.random(x.shape, "float32") >= p)
    factor = kept.astype(x.dtype) / (1 - p)
    return x * factor, (lambda g: g * factor,)


@op
def stack(*xs, axis: int = 0):
    """Arrays of one shape joined along a new axis.

    >>> ts.ops.stack(np.zeros(3), np.ones(3), axis=1).shape
    (3, 2)
    """
    library = array_module(xs[0])

    def part(i):
        return lambda g: library.moveaxis(g, axis, 0)[i]

    return library.stack(xs, axis=axis), [part(i) for i in range(len(xs))]


@op
def concatenate(*xs, axis: int = -1):
    """Arrays joined along an existing axis (the channels, unless told otherwise).

    >>> ts.ops.concatenate(np.ones((1, 4, 5, 2)), np.ones((1, 4, 5, 6))).shape
    (1, 4, 5, 8)
    """
    ends = list(accumulate(x.shape[axis] for x in xs))

    def part(stop, n):
        return lambda g: g.swapaxes(axis, 0)[stop - n : stop].swapaxes(axis, 0)

    pulls = [part(stop, x.shape[axis]) for stop, x in zip(ends, xs, strict=True)]
    return array_module(xs[0]).concatenate(xs, axis=axis), pulls


@op
def softmax(x, *, axis: int = -1):
    """exp(x) / Σ exp(x) along `axis`, computed from x minus its maximum.

    >>> ts.ops.softmax(np.log([1.0, 3.0]))
    Tensor(array([0.25, 0.75]))
    """
    p = _softmax(x, axis)
    return p, (lambda g: p * (g - (g * p).sum(axis=axis, keepdims=True)),)


def _softmax(x, axis=-1):
    x = x if x.dtype.kind == "f" else x * 1.0  # a byte has no negative
    with np.errstate(over="ignore"):  # a difference beyond the largest number is as good as -inf
        e = x - x.max(axis=axis, keepdims=True)
    e = array_module(x).exp(e)
    e /= e.sum(axis=axis, keepdims=True)
    return e


def _pooling(rank, kernel, stride=None, padding=0, dilation=1) -> Window:
    """The window of a pooling: an int stands for all axes, the stride is by default the kernel."""
    kernel = (kernel,) * rank if isinstance(kernel, int) else tuple(kernel)
    return Window.of(kernel, stride or kernel, padding, dilation)


@op
def max_pool(x, *, kernel, stride=None, padding=0, dilation=1):
    """The maximum over each window, per channel: (N, *S, C) -> (N, *P, C).

    `kernel` is a number or a tuple of length rank; `stride` defaults to it. Padding never wins: it
    is minus infinity. Raises ValueError where whole numbers are padded, which have no infinity.

    >>> ts.ops.max_pool(np.arange(6.0).reshape(1, 6, 1), kernel=2).data.ravel()
    array([1., 3., 5.])
    """
    window, size = _pooling(x.ndim - 2, kernel, stride, padding, dilation), x.shape[1:-1]
    if x.dtype.kind != "f" and np.any(window.padding):
        raise ValueError(f"max_pool: found {x.dtype} with padding {padding}, which is minus "
                         "infinity; expected floating-point numbers, or no padding")
    y, winner = windows.maximum(x, window, taps=recording())
    return y, (lambda g: windows.maximum_adjoint(g, winner, size, window),)


@op
def avg_pool(x, *, kernel, stride=None, padding=0, dilation=1):
    """The mean over each window, per channel: (N, *S, C) -> (N, *P, C). Options as in max_pool.
    Padding counts as zeros.

    >>> ts.ops.avg_pool(np.arange(6.0).reshape(1, 6, 1), kernel=2).data.ravel()
    array([0.5, 2.5, 4.5])
    """
    window = _pooling(x.ndim - 2, kernel, stride, padding, dilation)
    missing, edge = ((0, 0), *window.padding), (False, *window.edge)
    grown = reference.pad(x, missing, edge)
    seen = [(slice(None), *points) for _, points in window.taps(window.positions(x.shape[1:-1]))]
    y = grown[seen[0]] / len(seen)
    for points in seen[1:]:
        y += grown[points] / len(seen)

    def pull(g):
        back, part = array_module(g).zeros(grown.shape, g.dtype), g / len(seen)
        for points in seen:
            back[points] += part
        return reference.pad_adjoint(back, missing, edge)

    return y, (pull,)


@op
def pad(x, *, padding, padding_mode="zero"):
    """x extended along its spatial axes, as `conv` does it: (N, *S, C) -> (N, *(S + before +
    after), C). A padding entry is an int or (before, after), a mode "zero" or "edge".

    >>> ts.ops.pad(np.array([[[3.0], [4.0]]]), padding=((1, 2),), padding_mode="edge").data.ravel()
    array([3., 3., 4., 4., 4.])
    """
    window = Window.of((1,) * (x.ndim - 2), padding=padding, padding_mode=padding_mode)
    missing, edge = ((0, 0), *window.padding), (False, *window.edge)
    return reference.pad(x, missing, edge), (lambda g: reference.pad_adjoint(g, missing, edge),)


def interpolation(n: int, m: int, align_corners: bool) -> np.ndarray:
    """The (m, n) matrix of linear interpolation from n samples to m: cuda.upsample.coordinates."""
    i, (low, fraction) = np.arange(m), cuda.upsample.coordinates(n, m, align_corners)
    matrix = np.zeros((m, n))
    matrix[i, low] = 1 - fraction
    matrix[i, np.minimum(low + 1, n - 1)] += fraction
    return matrix


def upsample(x: Tensor, size: tuple[int, ...], *, align_corners: bool) -> Tensor:
    """Linear interpolation along each spatial axis to `size`: (N, *S, C) -> (N, *size, C).

    One small matrix product per axis (see `interpolation`), last axis first.

    >>> ts.ops.upsample(np.array([[[0.0], [4.0]]]), (5,), align_corners=True).data.ravel()
    array([0., 1., 2., 3., 4.])
    """
    return _upsample(x, size=tuple(size), align_corners=align_corners)


@op
def _upsample(x, *, size, align_corners):
    library, shape, x = array_module(x), x.shape, x if x.dtype.kind == "f" else x * 1.0
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
