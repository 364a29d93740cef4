"""The operations that are methods of a tensor, as functions of arrays: each returns its value and
its pull-backs, as `tensor.op` wants them."""

from __future__ import annotations

from copy import deepcopy

from .backend import array_module


def add(x, y):
    """x + y, broadcast."""
    return x + y, (lambda g: g, lambda g: g)


def subtract(x, y):
    """x - y, broadcast."""
    return x - y, (lambda g: g, lambda g: -g)


def multiply(x, y):
    """x y, element by element, broadcast."""
    return x * y, (lambda g: g * y, lambda g: g * x)


def divide(x, y):
    """x / y, broadcast."""
    return x / y, (lambda g: g / y, lambda g: -(g / y) * (x / y))


def power(x, exponent):
    """x to a constant power; the derivative of power 0 is 0 everywhere, also at 0."""
    below = exponent - (exponent != 0)
    return x**exponent, (lambda g: g * (exponent * x**below), None)


def absolute(x):
    """|x|; the derivative at 0 is 0."""
    library = array_module(x)
    return abs(x), (lambda g: g * library.sign(x),)


def matmul(x, y):
    """Matrix product over the last two axes; a vector stands for a row before, a column after."""
    if x.ndim == 0 or y.ndim == 0:
        raise ValueError(f"matmul needs arrays, not shapes {x.shape} and {y.shape}")
    row, column = x.ndim == 1, y.ndim == 1

    def matrix(g):
        g = g[..., None] if column else g
        return g[..., None, :] if row else g

    def dx(g):
        g = matrix(g) @ (y[None] if column else y.swapaxes(-1, -2))
        return g[..., 0, :] if row else g

    def dy(g):
        g = (x[:, None] if row else x.swapaxes(-1, -2)) @ matrix(g)
        return g[..., 0] if column else g

    return x @ y, (dx, dy)


def _reduced(x, axis) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes that `axis` names (an int, several, or None for all) and the shape without them,
    where they are kept with length one."""
    named = range(x.ndim) if axis is None else axis if isinstance(axis, tuple | list) else (axis,)
    if any(not -x.ndim <= a < x.ndim for a in named):
        raise ValueError(f"axis is {axis}, of an array of shape {x.shape}")
    gone = tuple(sorted({a % x.ndim for a in named}))
    return gone, tuple(1 if a in gone else n for a, n in enumerate(x.shape))


def sum(x, *, axis=None, keepdims: bool = False):
    """The sum over `axis`: an int, several of them, or None for all. Floats are added in float64:
    where other axes stay NumPy adds row to row, and would lose percents of long sums."""
    library, shape, (gone, kept) = array_module(x), x.shape, _reduced(x, axis)
    floats = x.dtype.kind == "f"
    y = x.sum(axis=gone, keepdims=keepdims, dtype="float64" if floats else None)
    y = y.astype(x.dtype) if floats else y
    return y, (lambda g: library.broadcast_to(g.reshape(kept), shape),)


def amax(x, *, axis=None, keepdims: bool = False):
    """The maximum over `axis`, as in `sum`; those that reach it share the gradient equally."""
    gone, kept = _reduced(x, axis)
    y = x.max(axis=gone, keepdims=keepdims)

    def pull(g):
        reached = (x == y.reshape(kept)).astype(x.dtype)
        return reached * (g.reshape(kept) / reached.sum(axis=gone, keepdims=True))

    return y, (pull,)


def reshape(x, *, shape: tuple[int, ...]):
    """The same numbers in another shape; one entry may be -1."""
    before = x.shape
    return x.reshape(shape), (lambda g: g.reshape(before),)


def transpose(x, *, axes: tuple[int, ...]):
    """Axis i of the result is axis axes[i] of x."""
    inverse = sorted(range(len(axes)), key=lambda i: axes[i] % x.ndim)
    return x.transpose(axes), (lambda g: g.transpose(inverse),)


def index(x, *, key):
    """x[key]: slices, integers, integer arrays (repeated entries add up), boolean masks."""
    library, shape, dtype = array_module(x), x.shape, x.dtype
    parts = key if isinstance(key, tuple) else (key,)
    basic = all(p is None or p is Ellipsis or isinstance(p, int | slice) for p in parts)
    key = key if basic else deepcopy(key)  # whose it is may change it before backward

    def scatter(g):
        out = library.zeros(shape, dtype)
        if basic:
            out[key] = g
        else:
            library.add.at(out, key, g)
        return out

    return x[key], (scatter,)
