"""Stateful layers over the pure operations of `ops`.

A module is an object whose attributes are tensors (parameters), arrays (running statistics),
modules, or lists and dicts of modules. Nothing is registered: `named` reads the attributes in the
order in which they were set, and a name is the path of attributes joined by dots.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from math import prod, sqrt
from types import ModuleType
from typing import Any, Self, TypeVar

import numpy as np

from . import ops
from .backend import Array, array_module, device, to_library
from .tensor import Tensor
from .windows import Window

Network = TypeVar("Network", bound="Module")


class Module:
    """The base of layers and networks: `forward(x)` on a tensor (N, *S, C).

    `training` tells batch-norm to use the batch's statistics; a new module is in train mode.
    """

    training = True
    config: dict  # of a whole network: what rebuilds it, see models.build
    metadata: dict  # of a loaded network: what was saved with it

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def __call__(self, x: Tensor | Array, *more: Any, **options: Any) -> Tensor:
        return self.forward(x if isinstance(x, Tensor) else Tensor(x), *more, **options)

    def named(self, kind: type | tuple[type, ...] = object) -> Iterator[tuple[str, Any]]:
        """(dotted name, thing) for every module, tensor and array below, outer before inner."""
        stack, seen = list(reversed(vars(self).items())), {id(self)}
        while stack:
            name, thing = stack.pop()
            if id(thing) in seen and (isinstance(thing, Module) or _is_state(thing)):
                continue  # shared: it goes by its first name
            seen.add(id(thing))
            if isinstance(thing, kind) and (isinstance(thing, Module) or _is_state(thing)):
                yield name, thing
            inner = vars(thing) if isinstance(thing, Module) else thing
            if isinstance(inner, list):
                inner = dict(enumerate(inner))
            if isinstance(inner, dict):
                stack += [(f"{name}.{key}", value) for key, value in reversed(inner.items())]

    def modules(self) -> list[Module]:
        """This module and all below it."""
        return [self, *(module for _, module in self.named(Module))]

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all parameters, in a fixed order."""
        return self.named(Tensor)

    def parameters(self) -> list[Tensor]:
        """All parameters."""
        return [tensor for _, tensor in self.named_parameters()]

    def state(self) -> dict[str, Array]:
        """{name: array}: copies of all parameters and running statistics."""
        return {name: array.copy() for name, array in self._arrays().items()}

    def _arrays(self) -> dict[str, Array]:
        return {name: t.data if isinstance(t, Tensor) else t
                for name, t in self.named() if _is_state(t)}

    def statistics(self) -> list[Array]:
        """The arrays themselves that are state but no parameters: batch-norm's running ones."""
        return [thing for _, thing in self.named() if not isinstance(thing, Module | Tensor)]

    def load_state(self, state: Mapping[str, Array], strict: bool = True) -> None:
        """Write `state` into the parameters and statistics, in place, keeping dtype and device.

        Raises ValueError listing what is missing, unexpected or of another shape, before
        anything is written. `strict=False` allows missing and unexpected names, never shapes.
        """
        mine = self._arrays()
        wrong = [f"{name} has shape {tuple(state[name].shape)}, expected {array.shape}"
                 for name, array in mine.items()
                 if name in state and tuple(state[name].shape) != array.shape]
        wrong += [f"{name} holds {state[name].dtype}, expected numbers" for name in mine
                  if name in state and state[name].dtype.kind not in "fiub"]
        if strict:
            wrong += [f"{name} is missing" for name in mine if name not in state]
            wrong += [f"{name} is unexpected" for name in state if name not in mine]
        if wrong:
            rest = [f"... and {len(wrong) - 20} more"] if len(wrong) > 20 else []
            shown = "\n  ".join(wrong[:20] + rest)
            raise ValueError(f"the state does not fit this network:\n  {shown}")
        for name, array in mine.items():
            if name in state:
                array[...] = to_library(state[name], array_module(array))

    def convert(self, change: Callable[[Array], Array]) -> Self:
        """Replace every array `a` of the module by `change(a)`, in place; gradients are dropped."""
        for module in self.modules():
            for key, value in vars(module).items():
                if isinstance(value, Tensor):
                    value.data, value.grad = change(value.data), None
                elif _is_state(value):
                    setattr(module, key, change(value))
        return self

    def astype(self, dtype: str) -> Self:
        """Convert all parameters and statistics, in place; returns the module."""
        return self.convert(lambda array: array.astype(dtype))

    def train(self, statistics: str = "batch") -> Self:
        """Train mode. statistics="running" keeps batch-norm on its running statistics, frozen:
        the choice for batches of one or two and for pretrained networks."""
        if statistics not in ("batch", "running"):
            raise ValueError(f'statistics is {statistics!r}; expected "batch" or "running"')
        for module in self.modules():
            module.training = not (isinstance(module, BatchNorm) and statistics == "running")
        return self

    def eval(self) -> Self:
        """Evaluation mode: batch-norm uses its running statistics."""
        for module in self.modules():
            module.training = False
        return self

    def copy(self) -> Self:
        """An independent copy; no array is shared."""
        return copy.deepcopy(self)


def _is_state(thing: Any) -> bool:
    return isinstance(thing, Tensor) or (hasattr(thing, "dtype") and hasattr(thing, "shape"))


def to_device(net: Network, where: str | ModuleType) -> Network:
    """Move a network's arrays to "cpu" or "cuda" (or what `device` returned), in place."""
    library = device(where) if isinstance(where, str) else where
    return net.convert(lambda array: to_library(array, library))


class Conv(Module):
    """Convolution: weight (*kernel, C_in, C_out), bias (C_out,) or None; see ops.conv.

    The kernel is drawn from N(0, std²), by default with std² = 2 / (C_out prod(kernel)) (He et
    al. 2015, fan-out); the bias is zero.
    """

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, ...], *, stride: Any = 1,
                 padding: Any = 0, dilation: Any = 1, padding_mode: Any = "zero",
                 bias: bool = True, std: float | None = None, rng: np.random.Generator):
        std = sqrt(2 / (c_out * prod(kernel))) if std is None else std
        weight = std * rng.standard_normal((*kernel, c_in, c_out), "float32")
        self.weight = Tensor(weight, requires_grad=True)
        self.bias = Tensor(np.zeros(c_out, "float32"), requires_grad=True) if bias else None
        self.window = Window.of(tuple(kernel), stride, padding, dilation, padding_mode)

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv(x, self.weight, self.bias, **self.window.options)


class Linear(Module):
    """x @ weight + bias: weight (C_in, C_out), bias (C_out,), drawn from N(0, 0.01²) and zero."""

    def __init__(self, c_in: int, c_out: int, *, rng: np.random.Generator):
        weight = 0.01 * rng.standard_normal((c_in, c_out), "float32")
        self.weight = Tensor(weight, requires_grad=True)
        self.bias = Tensor(np.zeros(c_out, "float32"), requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class BatchNorm(Module):
    """Batch normalisation over all axes but the channels; see ops.batch_norm.

    In train mode a forward pass also moves running_mean and running_var, in place. What follows
    it in a residual block, an addition and a ReLU, can be part of the same pass.
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        self.weight = Tensor(np.ones(channels, "float32"), requires_grad=True)
        self.bias = Tensor(np.zeros(channels, "float32"), requires_grad=True)
        self.running_mean = np.zeros(channels, "float32")
        self.running_var = np.ones(channels, "float32")
        self.eps, self.momentum = eps, momentum

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        return ops.batch_norm(x, self.weight, self.bias, residual, running_mean=self.running_mean,
                              running_var=self.running_var, train=self.training,
                              momentum=self.momentum, eps=self.eps, relu=relu)


class GroupNorm(Module):
    """Group normalisation, for batches of one or two; see ops.group_norm."""

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-5):
        self.weight = Tensor(np.ones(channels, "float32"), requires_grad=True)
        self.bias = Tensor(np.zeros(channels, "float32"), requires_grad=True)
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm(x, self.weight, self.bias, groups=self.groups, eps=self.eps)


class MaxPool(Module):
    """Maximum over windows; see ops.max_pool."""

    def __init__(self, kernel: tuple[int, ...], stride: Any = None, padding: Any = 0):
        self.window = Window.of(tuple(kernel), stride or tuple(kernel), padding)

    def forward(self, x: Tensor) -> Tensor:
        w = self.window
        return ops.max_pool(x, kernel=w.kernel, stride=w.stride, padding=w.padding,
                            dilation=w.dilation)


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.relu(x)


class Identity(Module):
    """x itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class GlobalAverage(Module):
    """The mean over all positions: (N, *S, C) -> (N, C), or (N, *1, C) with keepdims."""

    def __init__(self, keepdims: bool = False):
        self.keepdims = keepdims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(axis=tuple(range(1, x.ndim - 1)), keepdims=self.keepdims)


class Sequential(Module):
    """Modules one after the other, named by their number."""

    def __init__(self, *layers: Module):
        vars(self).update({str(i): layer for i, layer in enumerate(layers)})

    def forward(self, x: Tensor) -> Tensor:
        for key in [k for k in vars(self) if k.isdigit()]:
            x = vars(self)[key](x)
        return x
