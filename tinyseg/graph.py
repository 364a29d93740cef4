"""The graph of operations and the one walk backwards: it knows arrays and vertices, not tensors.

A vertex is a leaf, whose gradient is kept in its `grad`, or the `Node` of an operation's result,
which holds its parents and their pull-backs. Edges point backwards only, so there are no reference
cycles, and an array lives only while a pull-back has captured it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from inspect import CO_VARARGS
from typing import Any

from .backend import Array, array_module, memory, writable


class Node:
    """The result of the operation `name`; `edges` are its wanted (parent, input number) pairs.

    `pull` is what the operation returned for its inputs, of which there are `inputs`; `read` are
    ([how often it has changed], how often when it was read, its shape) of all tensors among them.
    `options` are the operation's, by name, and its inputs, by number, where these are kept.
    """

    __slots__ = ("name", "shape", "dtype", "edges", "pull", "read", "options")

    def __init__(self, name: str, value: Array, edges: list, pull: Callable | Sequence,
                 inputs: int, read: list, options: dict):
        self.name, self.shape, self.dtype = name, value.shape, value.dtype
        self.edges, self.read, self.options = edges, read, options
        self.pull: Any  # taken away when it has run
        if callable(pull):
            code = getattr(pull, "__code__", None)
            if code and code.co_argcount < 2 and not code.co_flags & CO_VARARGS:
                raise TypeError(f"{name}: a function alone is called pull(g, wanted), this one "
                                "takes less; a pull-back of one input is a tuple: (pull,)")
            positions = {i for _, i in edges}
            wanted = tuple(i in positions for i in range(inputs))
            self.pull = lambda g: pull(g, wanted)
        else:
            missing = [i for _, i in edges if i >= len(pull) or not callable(pull[i])]
            if missing or len(pull) > inputs:
                raise TypeError(f"{name} returned {len(pull)} pull-backs for {inputs} inputs; "
                                + (f"input {missing[0]} needs one" if missing else
                                   "expected at most one for each"))
            self.pull = [pull[i] for _, i in edges]

    def check(self) -> None:
        """Raise RuntimeError unless a gradient can be pulled back through this node."""
        if self.pull is None:
            raise RuntimeError(f"{self.name}: backward ran through this graph before and freed "
                               "it; run the forward pass again (or add the losses and go backward "
                               "once)")
        for changes, before, shape in self.read:
            if changes[0] != before:
                raise RuntimeError(
                    f"{self.name}: a tensor of shape {shape} that it read was changed in place "
                    "since (by an optimiser's step or load_state), so that its gradient may be "
                    "wrong; go backward before, or run the forward pass again after the change")

    def gradients(self, g: Array) -> Iterator[tuple[Any, Array, bool]]:
        """(parent, gradient, whether that is an array of its own) for each input; the pull-backs,
        and all they captured, are let go."""
        edges, pull, self.edges, self.pull, self.read = self.edges, self.pull, [], None, []
        if callable(pull):
            pulled = pull(g)
            del pull
            if not isinstance(pulled, tuple | list) or len(pulled) <= edges[-1][1]:
                raise TypeError(f"{self.name}: its pull-back returned {_described(pulled)}; "
                                "expected a tuple with a gradient for each input")
            seen = [memory(a) for a in (g, *pulled)]
            for parent, i in edges:
                answer = self._fitted(pulled[i], parent, i)
                yield parent, answer, seen.count(memory(answer)) < 2 and writable(answer)
        else:
            pull.reverse()
            for parent, i in edges:  # popped: what it captured dies before the next runs
                answer = self._fitted(pull.pop()(g), parent, i)
                yield parent, answer, memory(answer) != memory(g) and writable(answer)

    def _fitted(self, g: Array, parent: Any, i: int) -> Array:
        """A pull-back's answer as the gradient in `parent`: summed over the axes along which that
        was repeated (the adjoint of broadcasting), in its precision."""
        shape = parent.shape
        if getattr(getattr(g, "dtype", None), "kind", None) != "f":
            raise TypeError(f"{self.name}: the gradient in input {i} is {_described(g)}; expected "
                            f"an array of floats of shape {shape}")
        if g.shape != shape:
            extra = g.ndim - len(shape)
            axes = list(zip(shape, g.shape[max(extra, 0):], strict=False))
            if extra < 0 or any(n not in (1, m) for n, m in axes):
                raise ValueError(f"{self.name}: the gradient in input {i} has shape {g.shape}; "
                                 f"expected {shape}, or a shape to which that broadcasts")
            g = g.sum(axis=tuple(range(extra))) if extra else g
            repeated = tuple(a for a, (n, m) in enumerate(axes) if n != m)
            g = g.sum(axis=repeated, keepdims=True) if repeated else g
        return g if g.dtype == parent.dtype else g.astype(parent.dtype)


def _described(answer: Any) -> str:
    if hasattr(answer, "dtype"):
        return f"an array of {answer.dtype} of shape {answer.shape}"
    return f"{len(answer)} gradients" if isinstance(answer, tuple | list) else repr(answer)[:80]


def walk(root: Any, g: Array, ready: Callable[[Any], None] | None = None) -> None:
    """Add d⟨g, root⟩/d(leaf) to `leaf.grad` for every leaf behind the vertex `root`.

    `ready(leaf)` is called as soon as a leaf's gradient is complete. RuntimeError, before any
    gradient is written, where the graph was freed or what an operation read has changed.
    """
    library, waiting = array_module(g), _consumers(root)
    # The gradient so far, and whether it is in memory of its own; what waits for no more of it.
    sums, complete = {root: (g, False)}, [root]
    while complete:
        vertex = complete.pop()
        g, own = sums.pop(vertex)
        if not isinstance(vertex, Node):
            vertex.grad = library.asarray(vertex.grad + g if vertex.grad is not None else
                                          g if own else g.copy())
            if ready is not None:
                ready(vertex)
            continue
        for parent, pulled, own in vertex.gradients(g):
            if parent not in sums:
                sums[parent] = pulled, own
            elif sums[parent][1]:
                library.add(sums[parent][0], pulled, out=sums[parent][0])
            else:
                sums[parent] = library.asarray(sums[parent][0] + pulled), True
            waiting[parent] -= 1
            if not waiting[parent]:
                complete.append(parent)


def _consumers(root: Any) -> dict:
    """How many edges lead to each vertex behind `root`: gradients it must wait for."""
    waiting, stack = Counter[Any](), [root]
    while stack:
        vertex = stack.pop()
        if isinstance(vertex, Node):
            vertex.check()
            for parent, _ in vertex.edges:
                stack += [parent] * (parent not in waiting)
                waiting[parent] += 1
    return waiting
