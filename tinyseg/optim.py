"""Optimisers and schedules. `step` changes parameters in place; nothing else does.

Both keep PyTorch's conventions, so that published settings carry over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import cos, inf, pi, sqrt
from typing import Any

import numpy as np

from . import cuda, parallel
from .backend import Array, array_module
from .module import overwrite
from .tensor import Tensor

Group = tuple[Iterable[Tensor], float]  # parameters that move at `factor` times the rate
Schedule = Callable[[int, int], float]  # (step, total) -> a factor of the rate
LIMITS = {"lr": inf, "factor": inf, "weight_decay": inf, "eps": inf, "momentum": 1, "betas": 1}


class Optimizer:
    """Parameters, a learning rate `lr` that may be set at any time, and arrays beside them.

    Parameters are different leaf tensors; frozen ones among them rest. In their list may also stand
    groups, (parameters, factor), which move at the rate lr * factor (their `factors`, one for each
    parameter; 1 outside of groups). Every setting is a number from 0 to below its limit in LIMITS,
    whenever it is set. Raises ValueError for anything else.

    >>> a, b = (ts.Tensor(np.zeros(1), requires_grad=True) for _ in range(2))
    >>> optimizer = ts.optim.SGD([a, ([b], 0.1)], lr=2)
    >>> (a + b).backward()
    >>> optimizer.step()
    >>> a.data, b.data
    (array([-2.]), array([-0.2]))
    """

    slots: tuple[str, ...] = ()  # names of the running arrays, one per parameter each

    def __init__(self, parameters: Iterable[Tensor | Group], lr: float, weight_decay: float):
        self.parameters, self.factors = _leaves(parameters)
        self.lr, self.weight_decay, self.steps = lr, weight_decay, 0
        self.running = {
            name: [array_module(p.data).zeros_like(p.data) for p in self.parameters]
            for name in self.slots
        }

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _setting(name, value) if name in LIMITS else value)

    def step(self) -> None:
        """Move every parameter that has a gradient, in place."""
        self.steps += 1
        for p in self.parameters:
            p.version += p.grad is not None
        groups: dict[float, list[tuple[Array, ...]]] = {}  # by the rate
        for i, (p, factor) in enumerate(zip(self.parameters, self.factors, strict=True)):
            if p.grad is not None:
                groups.setdefault(self.lr * factor, []).append(
                    (p.data, p.grad, *(self.running[name][i] for name in self.slots)))
        if groups and cuda.serves(*(a for rows in groups.values() for row in rows for a in row)):
            for lr, rows in groups.items():
                self.update_all(lr, *map(list, zip(*rows, strict=True)))
        else:
            parallel.run(lambda part: self.update(*part), [
                (lr, *piece) for lr, rows in groups.items() for row in rows
                for piece in parallel.pieces(*row)])

    def update(self, lr: float, p: Array, g: Array, *running: Array) -> None:
        """One parameter with its gradient and running arrays, at the rate `lr`."""
        raise NotImplementedError

    def update_all(self, lr: float, ps: list[Array], gs: list[Array], *running: list[Array]
                   ) -> None:
        """`update` for all of them in one launch, on a GPU."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.parameters:
            p.grad = None

    def state(self) -> dict[str, Array]:
        """Copies of the running arrays and the number of steps, {name: array}."""
        arrays = {f"{name}.{i}": a.copy() for name in self.slots
                  for i, a in enumerate(self.running[name])}
        return {**arrays, "steps": array_module(0).asarray(self.steps)}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """The inverse of `state`; ValueError naming all that does not fit, and then nothing is
        written."""
        mine = {"steps": np.asarray(self.steps), **{
            f"{name}.{i}": a for name in self.slots for i, a in enumerate(self.running[name])}}
        overwrite(mine, state, "optimiser")
        self.steps = int(mine["steps"])


def _leaves(parameters: Iterable[Tensor | Group]) -> tuple[list[Tensor], list[float]]:
    """All parameters, if they are what an optimiser can move, and the factor of each."""
    found: list[Tensor] = []
    factors, seen = [], set()
    for part in _listed(parameters):
        group = isinstance(part, tuple) and len(part) == 2 and not isinstance(part[1], Tensor)
        members, factor = part if group else ([part], 1.0)
        factor = _setting("factor", factor)
        for p in _listed(members):
            i = len(found)
            if not isinstance(p, Tensor):
                raise ValueError(f"parameter {i} is a {type(p).__name__}, expected a Tensor or a "
                                 "group, (tensors, factor); net.parameters() lists those of a "
                                 "network")
            if p.node:
                raise ValueError(f"parameter {i}, of shape {p.shape}, was made by an operation; "
                                 "expected a leaf, Tensor(array, requires_grad=True)")
            if id(p) in seen:
                raise ValueError(f"parameter {i}, of shape {p.shape}, was given before and would "
                                 "move twice a step")
            seen.add(id(p))
            found.append(p)
            factors.append(factor)
    if not any(p.requires_grad for p in found):
        raise ValueError("the optimiser got no parameters that require a gradient")
    return found, factors


def _listed(parameters: Any) -> Iterable:
    if isinstance(parameters, Tensor):
        raise ValueError("parameters is a single tensor; expected a list, [tensor]")
    return parameters


def _setting(name: str, value: Any) -> Any:
    """A number (of betas, two) as Python's own: NumPy's would turn float32 arrays into float64."""
    numbers = tuple(value) if name == "betas" and isinstance(value, list | tuple) else (value,)
    count, limit = 2 if name == "betas" else 1, LIMITS[name]
    if len(numbers) != count or not all(
            isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)
            and 0 <= x < limit for x in numbers):
        raise ValueError(f"{name} is {value!r}; expected {('a number', 'two numbers')[count - 1]} "
                         f"of at least 0 and below {limit}")
    return tuple(map(float, numbers)) if count == 2 else float(value)


class SGD(Optimizer):
    """v <- momentum v + (g + weight_decay p);  p <- p - lr v, or with Nesterov's
    momentum p - lr (g + weight_decay p + momentum v)  (Sutskever et al. 2013, PyTorch's form).

    >>> p = ts.Tensor(np.array([3.0]), requires_grad=True)
    >>> optimizer = ts.optim.SGD([p], lr=0.25)
    >>> (p * p).backward()
    >>> optimizer.step()
    >>> p.data  # 3 - 0.25 * 6
    array([1.5])
    """

    slots = ("velocity",)

    def __init__(self, parameters: Iterable[Tensor | Group], lr: float, momentum: float = 0,
                 nesterov: bool = False, weight_decay: float = 0):
        super().__init__(parameters, lr, weight_decay)
        if nesterov and not momentum:
            raise ValueError("nesterov needs a momentum above zero")
        self.momentum, self.nesterov = momentum, nesterov

    def update(self, lr: float, p: Array, g: Array, velocity: Array) -> None:
        g = g + self.weight_decay * p if self.weight_decay else g
        velocity *= self.momentum
        velocity += g
        p -= lr * (g + self.momentum * velocity if self.nesterov else velocity)

    def update_all(self, lr: float, ps: list[Array], gs: list[Array], *running: list[Array]
                   ) -> None:
        cuda.optim.sgd(ps, gs, *running, lr=lr, momentum=self.momentum,
                       nesterov=self.nesterov, weight_decay=self.weight_decay)


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2):

    p <- p - lr (weight_decay p + m̂ / (sqrt(v̂) + eps)),  m̂ = m / (1 - beta1^t), v̂ likewise.

    t counts the optimiser's steps, also for a parameter that had no gradient in some of them;
    PyTorch's counts for each.

    >>> p = ts.Tensor(np.ones(2), requires_grad=True)
    >>> optimizer = ts.optim.AdamW([p], lr=0.1, weight_decay=0)
    >>> (p * np.array([3.0, -500.0])).sum().backward()
    >>> optimizer.step()
    >>> p.data  # a first step is as long as lr, whatever the gradient
    array([0.9, 1.1])
    """

    slots = ("mean", "square")

    def __init__(self, parameters: Iterable[Tensor | Group], lr: float, betas: tuple = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.01):
        super().__init__(parameters, lr, weight_decay)
        self.betas, self.eps = betas, eps

    def update(self, lr: float, p: Array, g: Array, mean: Array, square: Array) -> None:
        beta1, beta2 = self.betas
        library, unbiased = array_module(p), sqrt(1 - beta2**self.steps)
        step = (1 - beta1) * g  # and then whatever else is computed on the way, in cache
        mean *= beta1
        mean += step
        library.multiply(g, g, out=step)
        step *= 1 - beta2
        square *= beta2
        square += step
        library.sqrt(square, out=step)
        step += self.eps * unbiased  # m̂ / (sqrt(v̂) + eps), multiplied by sqrt(1 - beta2^t)
        step = mean / step
        step *= lr * unbiased / (1 - beta1**self.steps)
        p *= 1 - lr * self.weight_decay
        p -= step

    def update_all(self, lr: float, ps: list[Array], gs: list[Array], *running: list[Array]
                   ) -> None:
        cuda.optim.adamw(ps, gs, *running, lr=lr, betas=self.betas, eps=self.eps,
                         weight_decay=self.weight_decay, step=self.steps)


def poly(step: int, total: int, power: float = 0.9) -> float:
    """(1 - step / total)^power: nnU-Net's schedule, a factor of the base rate.

    >>> [ts.optim.poly(step, 4, power=2) for step in range(5)]
    [1.0, 0.5625, 0.25, 0.0625, 0.0]
    """
    return max(0.0, 1 - step / max(1, total)) ** power


def cosine(step: int, total: int) -> float:
    """(1 + cos(pi x)) / 2, x = step / total (Loshchilov and Hutter 2017, without restarts).

    >>> [round(ts.optim.cosine(step, 6), 6) for step in (0, 2, 3, 4, 6)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return (1 + cos(pi * min(1.0, step / max(1, total)))) / 2


def warmup(steps: int, schedule: Schedule = poly) -> Schedule:
    """The schedule that rises to 1 in a straight line over `steps` steps, and then is `schedule`
    over those that remain.

    >>> schedule = ts.optim.warmup(4, ts.optim.cosine)
    >>> [schedule(step, 10) for step in (0, 1, 2, 3, 4, 7, 10)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.5, 0.0]
    """
    if steps < 0:
        raise ValueError(f"steps of the warm-up are {steps}; expected at least 0")

    def factor(step: int, total: int) -> float:
        if step < steps:
            return (step + 1) / steps
        return schedule(step - steps, max(1, total - steps))

    return factor
