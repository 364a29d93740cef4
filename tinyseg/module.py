"""What a network is made of: modules, and the names of what they hold.

A module is an object, and nothing is registered: what it holds are its attributes, in the order in
which they were set, those in lists, tuples and dicts among them. A name is the path joined by dots.

    a module          a part of this one
    a leaf tensor     a parameter; a frozen one where it does not require a gradient
    an array          state that no gradient moves: running statistics, tables of numbers
    anything else     an option (a window, an eps); so is a NumPy scalar

A tensor that an operation made, an activation kept for later, is none of these (Tensor(t.data)
makes a leaf of it); neither are the mode, `training` and `frozen`, and `config` and `metadata`,
which describe a network. What is held twice goes by its first name and stays one thing; two things
of one name are refused.
"""

from __future__ import annotations

import copy
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Self, TypeVar

import numpy as np

from .backend import Array, array_module, device, to_library
from .tensor import Tensor, no_grad
from .windows import Window

Network = TypeVar("Network", bound="Module")
APART = ("training", "frozen", "config", "metadata")  # no part of what a module holds
_watching: ContextVar[Callable | None] = ContextVar("watching", default=None)


class Module:
    """The base of layers and networks: `forward(x)` on a tensor (N, *S, C).

    `training` tells batch-norm to use the batch's statistics, unless it is `frozen`; a new module
    is in train mode.

    >>> class Scale(ts.nn.Module):
    ...     def __init__(self):
    ...         self.factor = ts.Tensor(np.array([2.0]), requires_grad=True)
    ...     def forward(self, x):
    ...         return x * self.factor
    >>> net = Scale()
    >>> net(np.array([1.0, 3.0])).data, net.state()
    (array([2., 6.]), {'factor': array([2.])})
    """

    training = True
    frozen = False
    config: dict  # of a whole network: what rebuilds it, see models.build
    metadata: dict  # of a loaded network: what was saved with it

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def __call__(self, x: Tensor | Array, *more: Any, **options: Any) -> Tensor:
        if not isinstance(x, Tensor):  # float64 would leave the fast path; integers may be indices
            x = Tensor(x)
            mine = (p.dtype for _, p in self.named_parameters() if p.dtype.kind == "f")
            if x.dtype.kind == "f" and (dtype := next(mine, x.dtype)) != x.dtype:
                x = Tensor(x.data.astype(dtype))
        y = self.forward(x, *more, **options)
        if watch := _watching.get():
            watch(self, x, y)
        return y

    def trace(self, x: Tensor | Array) -> dict[str, Array]:
        """{name: answer} of every layer to x, in the order in which they give it, in evaluation
        mode; "" is the network itself. What is called again is "relu (2)". The arrays are not
        copied.

        >>> net = ts.nn.Sequential(ts.nn.ReLU(), ts.nn.GlobalAverage())
        >>> {name: a.shape for name, a in net.trace(np.ones((1, 4, 5, 3))).items()}
        {'0': (1, 4, 5, 3), '1': (1, 3), '': (1, 3)}
        """
        names = {id(module): name for name, module in [("", self), *self.named(Module)]}
        answers, calls = {}, Counter[str]()

        def note(module: Module, _: Tensor, y: Tensor) -> None:
            if id(module) in names:
                calls[name := names[id(module)]] += 1
                answers[f"{name} ({calls[name]})" if calls[name] > 1 else name] = y.data

        with evaluation(self), watched(note):
            self(x)
        return answers

    @reprlib.recursive_repr("...")
    def __repr__(self) -> str:
        own, layers = [], []
        for name, thing in held(self):
            if isinstance(thing, Module):
                layers += f"{name}: {thing!r}".split("\n")
            elif isinstance(thing, Window):
                plain = vars(Window.of(thing.kernel))
                own += [f"{field} {value}" for field, value in vars(thing).items()
                        if field == "kernel" or value != plain[field]]
            elif isinstance(thing, Tensor):
                own.append(f"{name} {thing.shape}")
            elif thing is not None and not is_state(thing):
                own.append(f"{name} {reprlib.repr(thing)}")
        inside = "".join(f"\n  {line}" for line in layers)
        return f"{type(self).__name__}({', '.join(own)}{inside}" + ("\n)" if layers else ")")

    def named(self, kind: type | tuple[type, ...] = object) -> Iterator[tuple[str, Any]]:
        """(dotted name, thing) for every module, tensor and array below, outer before inner.

        Raises ValueError where two of them have one name.
        """
        waiting, seen, names = list(held(self))[::-1], {id(self)}, set()
        while waiting:
            name, thing = waiting.pop()
            if id(thing) in seen or not (isinstance(thing, Module) or is_state(thing)):
                continue
            if name in names:
                raise ValueError(f"{type(self).__name__} holds two things of the name {name}; "
                                 "rename an attribute or a dict's key (1 and '1' are alike)")
            seen.add(id(thing))
            names.add(name)
            if isinstance(thing, kind):
                yield name, thing
            if isinstance(thing, Module):
                waiting += list(held(thing, f"{name}."))[::-1]

    def modules(self) -> list[Module]:
        """This module and all below it."""
        return [self, *(module for _, module in self.named(Module))]

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all parameters, in a fixed order."""
        return self.named(Tensor)

    def parameters(self) -> list[Tensor]:
        """All parameters."""
        return [tensor for _, tensor in self.named_parameters()]

    def trainable(self) -> dict[str, Tensor | Module]:
        """{name: part} of what training moves: parameters, and modules for their statistics."""
        return {name: part for name, part in [("", self), *self.named((Module, Tensor))]
                if isinstance(part, Tensor) or hasattr(part, "running_mean")}

    def state(self) -> dict[str, Array]:
        """{name: array}: copies of all parameters and running statistics."""
        return {name: array.copy() for name, array in self._arrays().items()}

    def _arrays(self) -> dict[str, Array]:
        return {name: t.data if isinstance(t, Tensor) else t
                for name, t in self.named() if is_state(t)}

    def statistics(self) -> list[Array]:
        """The arrays themselves that are state but no parameters: batch-norm's running ones."""
        return [thing for _, thing in self.named() if not isinstance(thing, Module | Tensor)]

    def load_state(self, state: Mapping[str, Array], strict: bool = True) -> None:
        """Write `state` into the parameters and statistics, in place, keeping dtype and device.

        Raises ValueError listing what is missing, unexpected, no array, of another shape or of
        numbers that do not fit, before anything is written. `strict=False` allows missing and
        unexpected names only.
        """
        overwrite(self._arrays(), state, "network", strict)
        for name, parameter in self.named_parameters():
            parameter.version += name in state

    def convert(self, change: Callable[[Array], Array]) -> Self:
        """Replace every array `a` of the module by `change(a)`, in place; gradients are dropped."""
        changed: dict[int, tuple] = {}
        for parameter in self.parameters():
            parameter.data, parameter.grad = change(parameter.data), None
            parameter.version += 1
        for module in self.modules():
            vars(module).update({key: _converted(thing, change, changed)
                                 for key, thing in vars(module).items() if not _apart(key, thing)})
        return self

    def astype(self, dtype: str) -> Self:
        """Convert all floating-point parameters and statistics, in place; returns the module."""
        if np.dtype(dtype).kind != "f":
            raise ValueError(f"dtype is {dtype!r}; expected one of floating-point numbers")
        return self.convert(lambda a: a.astype(dtype, copy=False) if a.dtype.kind == "f" else a)

    def train(self, statistics: str = "batch") -> Self:
        """Train mode. statistics="running" keeps batch-norm on its running statistics, frozen:
        the choice for batches of one or two and for pretrained networks."""
        if statistics not in ("batch", "running"):
            raise ValueError(f'statistics is {statistics!r}; expected "batch" or "running"')
        for module in self.modules():
            module.training = not (statistics == "running" and hasattr(module, "running_mean"))
        return self

    def eval(self) -> Self:
        """Evaluation mode: batch-norm uses its running statistics."""
        for module in self.modules():
            module.training = False
        return self

    def freeze(self, prefix: str = "") -> Self:
        """Let all under a dotted name rest, "layer1" or "layer1.0.bn1.weight", by default the whole
        module: parameters require no gradient, and batch-norm keeps to its running statistics in
        train mode too and leaves them alone. Raises ValueError where nothing has that name.

        >>> net = ts.nn.Sequential(ts.nn.Linear(3, 4, rng=0), ts.nn.Linear(4, 2, rng=1)).freeze("0")
        >>> [name for name, p in net.named_parameters() if p.requires_grad]
        ['1.weight', '1.bias']
        """
        return self._let(prefix, move=False)

    def unfreeze(self, prefix: str = "") -> Self:
        """Undo `freeze` for all under a dotted name."""
        return self._let(prefix, move=True)

    def _let(self, prefix: str, move: bool) -> Self:
        parts, under = self.trainable(), f"{prefix}." if prefix else ""
        chosen = [part for name, part in parts.items() if f"{name}.".startswith(under)]
        if not chosen:
            level = prefix.count(".") + 1
            there = dict.fromkeys(".".join(name.split(".")[:level]) for name in parts)
            raise ValueError(f"{type(self).__name__} holds nothing of the name {prefix!r} that "
                             f"training moves; expected one of {', '.join(filter(None, there))}")
        for part in chosen:
            if isinstance(part, Module):
                part.frozen = not move
            elif part.dtype.kind == "f":
                part.requires_grad, part.grad = move, None
        return self

    def copy(self) -> Self:
        """An independent copy; no array is shared."""
        return copy.deepcopy(self)


@contextmanager
def evaluation(net: Module | Callable) -> Iterator[None]:
    """Evaluation mode and nothing recorded in the block, and then every module in its mode again.

    Of a function, which has no mode, nothing is recorded.
    """
    modules = net.modules() if isinstance(net, Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@contextmanager
def watched(watch: Callable[[Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Every call of a module in the block tells watch(module, input, answer) when it is done."""
    before = _watching.set(watch)
    try:
        yield
    finally:
        _watching.reset(before)


def held(holder: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, thing) of all that a module holds itself: its lists, tuples and dicts are opened, its
    modules are not."""
    inside = vars(holder) if isinstance(holder, Module) else holder
    for key, thing in list(inside.items() if isinstance(inside, dict) else enumerate(inside)):
        if isinstance(thing, Tensor) and thing.node is not None or (
                inside is not holder and _apart(key, thing)):
            continue
        if isinstance(thing, list | tuple | dict):
            yield from held(thing, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", thing


def _apart(key: str, thing: Any) -> bool:
    """Whether an attribute of a module is no part of what it holds."""
    return key in APART and not isinstance(thing, Module | Tensor)


def is_state(thing: Any) -> bool:
    """Whether what a module holds is a tensor or an array."""
    return isinstance(thing, Tensor) or all(
        hasattr(thing, name) for name in ("dtype", "shape", "__setitem__"))


def _converted(thing: Any, change: Callable[[Array], Array], changed: dict[int, tuple]) -> Any:
    """`thing` with each array `a` that it is or holds replaced by `change(a)`, once where it is
    shared: changed[id(a)] = a, change(a)."""
    if isinstance(thing, list):
        thing[:] = [_converted(part, change, changed) for part in thing]
    elif isinstance(thing, tuple):
        parts = [_converted(part, change, changed) for part in thing]
        return tuple.__new__(type(thing), parts)  # a named tuple too
    elif isinstance(thing, dict):
        thing.update({key: _converted(part, change, changed) for key, part in thing.items()})
    elif is_state(thing) and not isinstance(thing, Tensor):
        if id(thing) not in changed:
            changed[id(thing)] = thing, change(thing)
        return changed[id(thing)][1]
    return thing


def overwrite(mine: Mapping[str, Array], state: Mapping[str, Array], whose: str,
              strict: bool = True) -> None:
    """Write the arrays of `state` into those of the same names; see Module.load_state."""
    given = {name: a.data if isinstance(a, Tensor) else a for name, a in state.items()}
    both = [(name, array, given[name]) for name, array in mine.items() if name in given]
    wrong = [f"{name} {fault}" for name, array, a in both if (fault := _misfit(array, a))]
    if strict:
        wrong += [f"{name} is missing" for name in mine if name not in given]
        wrong += [f"{name} is unexpected" for name in given if name not in mine]
    if wrong:
        rest = [f"... and {len(wrong) - 20} more"] if len(wrong) > 20 else []
        shown = "\n  ".join(wrong[:20] + rest)
        raise ValueError(f"the state does not fit this {whose}:\n  {shown}")
    for array, a in [(array, to_library(a, array_module(array))) for _, array, a in both]:
        array[...] = a


def _misfit(array: Array, a: Any) -> str:
    """What keeps `a` from being written into `array`, or nothing."""
    if not isinstance(getattr(a, "dtype", None), np.dtype):
        return f"is a {type(a).__module__}.{type(a).__name__}, expected a NumPy or CuPy array"
    if tuple(a.shape) != array.shape:
        return f"has shape {tuple(a.shape)}, expected {array.shape}"
    if not np.can_cast(a.dtype, array.dtype, "same_kind"):
        return f"holds {a.dtype}, expected numbers that {array.dtype} can hold"
    return "" if getattr(array.flags, "writeable", True) else "is read-only in the network"


def to_device(net: Network, where: str | ModuleType) -> Network:
    """Move a network's arrays to "cpu" or "cuda" (or what `device` returned), in place.

    >>> net = ts.nn.Linear(3, 2, rng=0)
    >>> ts.to_device(net, "cpu") is net
    True
    """
    library = device(where) if isinstance(where, str) else where
    return net.convert(lambda array: to_library(array, library))
