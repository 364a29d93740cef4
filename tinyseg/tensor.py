"""Reverse-mode differentiation: tensors, operations, and one walk backwards.

An operation is a function of arrays that returns its value and how to pull a gradient back:

    @op
    def multiply(x, y):
        return x * y, (lambda g: g * y, lambda g: g * x)

Either one pull-back per positional input, or a single `pull(g, wanted)` that returns all gradients
together (None where `wanted` is False). Options are keyword-only and carry no gradient.

The graph consists of vertices, not tensors. A leaf tensor is its own vertex; the result of an
operation has a `Node` that holds its parents and their pull-backs. Edges point backwards only, so
there are no reference cycles, and an array lives only while a pull-back has captured it. Vertices
that lead to no leaf with `requires_grad` are never recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .backend import Array, array_module

_recording: ContextVar[bool] = ContextVar("recording", default=True)


@contextmanager
def no_grad() -> Iterator[None]:
    """Operations inside this context record no graph."""
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


class Node:
    """The result of one operation: `edges` are its wanted (parent, input number) pairs."""

    __slots__ = ("edges", "pull", "shape")

    def __init__(self, shape: tuple[int, ...], edges: list, pull: Callable | list):
        self.shape, self.edges = shape, edges
        self.pull: Callable | list | None = pull

    def gradients(self, g: Array) -> Iterator[tuple[Any, Array]]:
        """(parent, gradient) pairs; the pull-backs, and all they captured, are let go."""
        if self.pull is None:
            raise RuntimeError("backward ran through this graph before and freed it; run the "
                               "forward pass again (or add the losses and go backward once)")
        edges, pull, self.edges, self.pull = self.edges, self.pull, [], None
        if callable(pull):
            pulled = pull(g)
            del pull
            for parent, position in edges:
                yield parent, pulled[position]
        else:
            pull.reverse()
            for parent, _ in edges:
                yield parent, pull.pop()(g)  # popped: what it captured dies before the next runs


def op(function: Callable) -> Callable:
    """Make an operation on tensors of a function on arrays (see the module's first lines)."""

    @functools.wraps(function)
    def apply(*inputs: Any, **options: Any) -> Tensor:
        arrays = [x.data if isinstance(x, Tensor) else x for x in inputs]
        value, pull = function(*arrays, **options)
        result = Tensor(array_module(value).asarray(value))  # a NumPy scalar is no array
        if _recording.get():
            vertices = [x._vertex() if isinstance(x, Tensor) else None for x in inputs]
            edges = [(v, i) for i, v in enumerate(vertices) if v is not None]
            if edges:
                wanted = tuple(v is not None for v in vertices)
                kept = (lambda g: pull(g, wanted)) if callable(pull) else [
                    pull[i] for _, i in edges]
                result.node, result.requires_grad = Node(value.shape, edges, kept), True
        return result

    return apply


class Tensor:
    """An array with a place in the graph.

    `data` is the array; `grad` is None or the gradient of the last `backward` calls, summed, in
    the shape of `data`; it is kept for leaves (tensors that no operation made) only.
    """

    __slots__ = ("data", "grad", "requires_grad", "node", "version", "__weakref__")
    __array_ufunc__ = None  # array + tensor asks the tensor

    def __init__(self, array: Array, requires_grad: bool = False):
        if isinstance(array, Tensor):
            raise TypeError("this is a tensor already; Tensor(t.data) makes a leaf of its array")
        self.data: Array = array if hasattr(array, "shape") else array_module(0).asarray(array)
        self.grad: Array | None = None
        self.requires_grad = requires_grad
        self.node: Node | None = None
        self.version = 0  # how often the array has been changed in place

    def _vertex(self) -> Node | Tensor | None:
        return self.node or (self if self.requires_grad else None)

    def backward(
        self, g: Array | None = None, ready: Callable[[Tensor], None] | None = None
    ) -> None:
        """Add d⟨g, self⟩/d(leaf) to `leaf.grad` for every leaf behind this tensor.

        `g` has the shape of `self`; without it `self` must hold a single number, and g is one.
        `ready(leaf)` is called as soon as a leaf's gradient is complete, while the walk goes on.
        The graph is freed on the way: a second call needs a second forward pass.
        """
        root = self._vertex()
        if root is None:
            raise ValueError("backward from a tensor that depends on no leaf with requires_grad")
        library = array_module(self.data)
        if g is None and self.data.size != 1:
            raise ValueError(f"backward without g needs a single number, not shape {self.shape}")
        g = library.ones_like(self.data) if g is None else g
        if g.shape != self.shape:
            raise ValueError(f"g has shape {g.shape}, the tensor has shape {self.shape}")

        waiting = _consumers(root)
        sums = {root: (g, False)}  # the gradient so far, and whether it was allocated here
        complete = [root]
        while complete:
            vertex = complete.pop()
            g, allocated = sums.pop(vertex)
            if isinstance(vertex, Tensor):
                g = g if allocated else g.copy()  # a pull-back may have returned g or a view
                vertex.grad = library.asarray(g if vertex.grad is None else vertex.grad + g)
                if ready is not None:
                    ready(vertex)
                continue
            for parent, pulled in vertex.gradients(g):
                pulled = _sum_to(pulled, parent.shape)
                if parent not in sums:
                    sums[parent] = pulled, False
                elif sums[parent][1]:
                    total = sums[parent][0]
                    total += pulled
                else:
                    sums[parent] = library.asarray(sums[parent][0] + pulled), True
                waiting[parent] -= 1
                if not waiting[parent]:
                    complete.append(parent)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    def __repr__(self) -> str:
        return f"Tensor({self.data!r}{', requires_grad=True' if self.requires_grad else ''})"

    def __len__(self) -> int:
        return len(self.data)

    def __add__(self, other):
        return add(self, other)

    def __sub__(self, other):
        return subtract(self, other)

    def __mul__(self, other):
        return multiply(self, other)

    def __truediv__(self, other):
        return divide(self, other)

    def __matmul__(self, other):
        return matmul(self, other)

    def __rsub__(self, other):
        return subtract(other, self)

    def __rtruediv__(self, other):
        return divide(other, self)

    def __rmatmul__(self, other):
        return matmul(other, self)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self):
        return multiply(self, -1)

    def __pow__(self, exponent: float):
        return power(self, exponent=exponent)

    def __getitem__(self, key):
        return index(self, key=key)

    def sum(self, axis=None, keepdims: bool = False) -> Tensor:
        return sum(self, axis=axis, keepdims=keepdims)

    def mean(self, axis=None, keepdims: bool = False) -> Tensor:
        total = sum(self, axis=axis, keepdims=keepdims)
        return total * (total.data.size / self.data.size)

    def reshape(self, *shape: int) -> Tensor:
        return reshape(self, shape=shape[0] if isinstance(shape[0], tuple | list) else shape)

    def transpose(self, *axes: int) -> Tensor:
        axes = axes[0] if axes and isinstance(axes[0], tuple | list) else axes
        return transpose(self, axes=axes or tuple(reversed(range(self.ndim))))


def _consumers(root: Node | Tensor) -> dict:
    """How many edges lead to each vertex behind `root`: gradients it must wait for."""
    waiting: dict = {}
    stack = [root]
    while stack:
        for parent, _ in getattr(stack.pop(), "edges", ()):
            if parent not in waiting:
                waiting[parent] = 0
                stack.append(parent)
            waiting[parent] += 1
    return waiting


def _sum_to(g: Array, shape: tuple[int, ...]) -> Array:
    """The adjoint of broadcasting: `g` summed over the axes that `shape` was repeated along."""
    if g.shape == shape:
        return g
    g = g.sum(axis=tuple(range(g.ndim - len(shape)))) if g.ndim > len(shape) else g
    repeated = tuple(a for a, n in enumerate(shape) if n == 1 and g.shape[a] != 1)
    return g.sum(axis=repeated, keepdims=True) if repeated else g


@op
def add(x, y):
    """x + y, broadcast."""
    return x + y, (lambda g: g, lambda g: g)


@op
def subtract(x, y):
    """x - y, broadcast."""
    return x - y, (lambda g: g, lambda g: -g)


@op
def multiply(x, y):
    """x y, element by element, broadcast."""
    return x * y, (lambda g: g * y, lambda g: g * x)


@op
def divide(x, y):
    """x / y, broadcast."""
    return x / y, (lambda g: g / y, lambda g: -g * x / (y * y))


@op
def power(x, *, exponent: float):
    """x to a constant power."""
    return x**exponent, (lambda g: g * (exponent * x ** (exponent - 1)),)


@op
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


@op
def sum(x, *, axis=None, keepdims: bool = False):
    """The sum over `axis` (an int, a tuple, or None for all)."""
    library, shape = array_module(x), x.shape
    axes = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if any(not -x.ndim <= a < x.ndim for a in axes):
        raise ValueError(f"sum over axis {axis} of an array of shape {shape}")
    gone = tuple(sorted({a % x.ndim for a in axes}))
    kept = tuple(1 if a in gone else n for a, n in enumerate(shape))
    y = x.sum(axis=gone, keepdims=keepdims)
    return y, (lambda g: library.broadcast_to(g.reshape(kept), shape),)


@op
def reshape(x, *, shape: tuple[int, ...]):
    """The same numbers in another shape; one entry may be -1."""
    before = x.shape
    return x.reshape(shape), (lambda g: g.reshape(before),)


@op
def transpose(x, *, axes: tuple[int, ...]):
    """Axis i of the result is axis axes[i] of x."""
    inverse = sorted(range(len(axes)), key=lambda i: axes[i] % x.ndim)
    return x.transpose(axes), (lambda g: g.transpose(inverse),)


@op
def index(x, *, key):
    """x[key]: slices, integers, integer arrays (repeated entries add up), boolean masks."""
    library, shape, dtype = array_module(x), x.shape, x.dtype
    parts = key if isinstance(key, tuple) else (key,)
    basic = all(p is None or p is Ellipsis or isinstance(p, int | slice) for p in parts)

    def scatter(g):
        out = library.zeros(shape, dtype)
        if basic:
            out[key] = g
        else:
            library.add.at(out, key, g)
        return out

    return x[key], (scatter,)
