"""Reverse-mode differentiation: tensors, and how an operation on them is made.

An operation is a function of arrays that returns its value and how to pull a gradient back:

    @op
    def multiply(x, y):
        return x * y, (lambda g: g * y, lambda g: g * x)

Either one pull-back per positional input, or a single `pull(g, wanted)` that returns all gradients
together (None where `wanted` is False). What a pull-back returns is g, a part of it, or an array
that nothing else keeps: gradients of other paths may be added to that in place. Options are
keyword-only and carry no gradient.

What leads to no leaf with `requires_grad` is never recorded; `graph` has the rest of the story.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, Literal

import numpy as np

from . import arithmetic
from .backend import Array, array_module, memory, within
from .graph import Node, walk

_pauses: ContextVar[tuple] = ContextVar("pauses", default=())
_keeping: ContextVar[tuple] = ContextVar("keeping", default=())


def no_grad() -> AbstractContextManager:
    """Operations inside this context record no graph.

    >>> x = ts.Tensor(np.ones(3), requires_grad=True)
    >>> with ts.no_grad():
    ...     (2 * x).requires_grad
    False
    """
    return within(_pauses)


def recording() -> bool:
    """Whether operations record a graph here, which they do outside `no_grad`."""
    return not _pauses.get()


def keeping_inputs() -> AbstractContextManager:
    """What is recorded inside this context keeps its inputs alive, in the node's `options`, so that
    it can be told again in another language; otherwise an array lives only as long as a pull-back
    needs it."""
    return within(_keeping)


def op(function: Callable) -> Callable:
    """Make an operation on tensors of a function on arrays (see the module's first lines).

    Inputs are tensors, arrays or numbers; a NumPy number beside a tensor of floats is taken as
    Python's, so that it does not widen it. TypeError says what else was found.

    >>> @ts.op
    ... def cube(x):
    ...     return x**3, (lambda g: g * 3 * x**2,)
    >>> ts.check_gradients(cube, np.array([1.0, -2.0])) < 1e-6
    True
    """
    name = getattr(function, "__name__", type(function).__name__).lstrip("_")
    most = getattr(getattr(function, "__code__", None), "co_argcount", 0)

    @functools.wraps(function)
    def apply(*inputs: Any, **options: Any) -> Tensor:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        floats = any(x.data.dtype.kind == "f" for x in tensors)
        for key, x in options.items():
            if isinstance(x, Tensor):
                raise TypeError(f"{name}: {key} is a tensor given by name; tensors are given by "
                                "position, options by name")
            if floats and isinstance(x, np.generic):
                options[key] = x.item()
        answer = function(*(_array(x, name, floats) for x in inputs), **options)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise TypeError(f"{name} returned no pair; an operation returns (value, pull-backs)")
        result, pull = Tensor(answer[0]), answer[1]
        result._changes = next((x._changes for x in tensors  # of a view, told all the same
                                if memory(x.data) == memory(result.data)), result._changes)
        result.node = False  # no leaf, whether it is recorded or not
        if tensors and result.data.dtype.kind == "f" and recording():
            edges = [(v, i) for i, x in enumerate(inputs)
                     if isinstance(x, Tensor) and (v := x._vertex()) is not None]
            if edges:
                result.node = Node(name, result.data, edges, pull, max(most, len(inputs)),
                                   [(x._changes, x.version, x.shape) for x in tensors],
                                   options | dict(enumerate(inputs)) if _keeping.get() else {})
                result._requires_grad = True
        return result

    return apply


def _array(x: Any, name: str, floats: bool) -> Any:
    """What an operation computes with for an input."""
    if isinstance(x, Tensor):
        return x.data
    if floats and isinstance(x, np.ndarray | np.generic) and not x.ndim:
        return x.item()
    if isinstance(x, list | tuple | str):
        raise TypeError(f"{name}: an input is a {type(x).__name__}; expected a tensor, an array or "
                        "a number (np.asarray makes an array of it)")
    return x


def _compared(compare: Callable) -> Any:
    return lambda self, other: compare(
        self.data, other.data if isinstance(other, Tensor) else other)


add, subtract = op(arithmetic.add), op(arithmetic.subtract)
multiply, divide, power = op(arithmetic.multiply), op(arithmetic.divide), op(arithmetic.power)
absolute, matmul = op(arithmetic.absolute), op(arithmetic.matmul)
sum, amax = op(arithmetic.sum), op(arithmetic.amax)
reshape, transpose, index = op(arithmetic.reshape), op(arithmetic.transpose), op(arithmetic.index)


class Tensor:
    """An array with a place in the graph.

    `data` is the array; `grad` is None or the gradient of the last `backward` calls, summed, in
    the shape and type of `data`; it is kept for leaves (tensors that no operation made) only.
    Only floats can require one. `version` counts changes of `data` in place: whoever makes one
    adds 1, and backward refuses to use what an operation read before it.

    `np.asarray(t)` is the data. Comparisons give arrays of bool without a gradient; tensors are
    equal as keys only to themselves.

    >>> x = ts.Tensor(np.array([1.0, 2.0, 3.0]), requires_grad=True)
    >>> y = (x * x).sum()
    >>> y.backward()
    >>> y.item(), x.grad.tolist()
    (14.0, [2.0, 4.0, 6.0])
    """

    __slots__ = ("data", "grad", "node", "_changes", "_requires_grad", "__weakref__")
    __array_ufunc__ = None  # array + tensor asks the tensor
    __hash__ = object.__hash__

    def __init__(self, array: Array, requires_grad: bool = False):
        if isinstance(array, Tensor):
            raise TypeError("this is a tensor already; Tensor(t.data) makes a leaf of its array")
        is_array = hasattr(array, "shape") and not isinstance(array, np.generic)
        self.data: Array = array if is_array else np.asarray(array)
        self.grad: Array | None = None
        self._changes = [0]  # shared with whoever shares the array
        self.node: Node | Literal[False] | None = None  # a leaf's; False: made and not recorded
        self.requires_grad = requires_grad

    @property
    def version(self) -> int:
        """How often `data` has been changed in place."""
        return self._changes[0]

    @version.setter
    def version(self, number: int) -> None:
        self._changes[0] = number

    @property
    def requires_grad(self) -> bool:
        """Whether `backward` goes here; TypeError for other numbers than floats, and ValueError for
        taking what an operation made out of its graph."""
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if wanted and self.dtype.kind != "f":
            raise TypeError(f"a tensor of {self.dtype} has no gradient, which would be rounded; "
                            "make it of floats, array.astype('float32')")
        if self.node and not wanted:
            raise ValueError(f"{self.node.name} made it; detach() gives one outside the graph")
        if wanted and self.node is False:
            self.node = None  # made by an operation, and told to be a leaf
        self._requires_grad = wanted

    def _vertex(self) -> Node | Tensor | None:
        return self.node or (self if self._requires_grad else None)

    def backward(self, g: Array | None = None,
                 ready: Callable[[Tensor], None] | None = None) -> None:
        """Add d⟨g, self⟩/d(leaf) to `leaf.grad` for every leaf behind this tensor.

        `g` has the shape of `self`; without it `self` must hold a single number, and g is one.
        `ready(leaf)` is called as soon as a leaf's gradient is complete, while the walk goes on.
        The graph is freed on the way: a second call needs a second forward pass. RuntimeError
        where it was freed, or where a tensor changed in place since an operation read it.

        >>> x = ts.Tensor(np.array([3.0, 5.0]), requires_grad=True)
        >>> (2 * x).backward(np.array([1.0, 10.0]))
        >>> (2 * x).backward(np.array([1.0, 10.0]))
        >>> x.grad.tolist()
        [4.0, 40.0]
        """
        root = self._vertex()
        if root is None:
            raise ValueError("backward from a tensor that depends on no leaf with requires_grad")
        if g is None and self.data.size != 1:
            raise ValueError(f"backward without g needs a single number, not shape {self.shape}")
        library = array_module(self.data)
        g = library.ones_like(self.data) if g is None else library.asarray(g, dtype=self.dtype)
        if g.shape != self.shape:
            raise ValueError(f"g has shape {g.shape}, the tensor has shape {self.shape}")
        walk(root, g, ready)

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

    def __iter__(self) -> Iterator[Tensor]:
        if not self.ndim:
            raise TypeError("iteration over a tensor of a single number; use item()")
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.data, dtype, copy=copy)

    def __array_function__(self, function, types, arguments, options):
        raise TypeError(f"np.{function.__name__} of a tensor would lose its gradient; use the "
                        "operations of tensors, or its array, t.data")

    def item(self) -> float:
        """The number of a tensor that holds a single one; ValueError otherwise.

        >>> ts.Tensor(np.array([[7.0]])).item()
        7.0
        """
        return self.data.item()

    def detach(self) -> Tensor:
        """A tensor of the same array, outside the graph; a change of the one is one of both.

        >>> x = ts.Tensor(np.ones(3), requires_grad=True)
        >>> y = x.detach()
        >>> y.data is x.data, y.requires_grad
        (True, False)
        """
        other = Tensor(self.data)
        other._changes = self._changes
        return other

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.data)

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else repr(self)

    __lt__, __le__, __gt__, __ge__, __eq__, __ne__ = map(_compared, (
        operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne))

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

    def __abs__(self):
        return absolute(self)

    def __pow__(self, exponent):
        return power(self, exponent)

    def __getitem__(self, key):
        return index(self, key=key.data if isinstance(key, Tensor) else key)

    def sum(self, axis=None, keepdims: bool = False) -> Tensor:
        return sum(self, axis=axis, keepdims=keepdims)

    def mean(self, axis=None, keepdims: bool = False) -> Tensor:
        total = sum(self, axis=axis, keepdims=keepdims)
        if total.data.size and not self.data.size:
            raise ValueError(f"mean of no numbers: shape {self.shape}, axis {axis}")
        return total * (total.data.size / (self.data.size or 1))

    def max(self, axis=None, keepdims: bool = False) -> Tensor:
        return amax(self, axis=axis, keepdims=keepdims)

    def reshape(self, *shape: int) -> Tensor:
        return reshape(self, shape=shape[0] if isinstance(shape[0], tuple | list) else shape)

    def transpose(self, *axes: int) -> Tensor:
        axes = axes[0] if axes and isinstance(axes[0], tuple | list) else axes
        return transpose(self, axes=axes or tuple(reversed(range(self.ndim))))
