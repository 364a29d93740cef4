"""Stateful layers over the pure operations of `ops`; `module` says what a module is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod, sqrt
from typing import Any

import numpy as np

from . import ops
from .backend import array_module
from .module import Module, Network, to_device
from .ranks import ALONE, Alone
from .tensor import Tensor
from .windows import Window

__all__ = ["BatchNorm", "Conv", "GlobalAverage", "GroupNorm", "Identity", "Linear", "MaxPool",
           "Module", "Network", "ReLU", "Sequential", "normalised", "to_device"]


def _normal(rng: np.random.Generator | int, std: float, shape: tuple[int, ...]) -> Tensor:
    """A parameter drawn from N(0, std²), float32."""
    weight = np.random.default_rng(rng).standard_normal(shape, "float32")
    weight *= std
    return Tensor(weight, requires_grad=True)


def _per_axis(kernel: Any) -> tuple[int, ...]:
    """A kernel as a tuple; ValueError for a number, which tells no rank."""
    if isinstance(kernel, int | np.integer):
        raise ValueError(f"kernel is {kernel!r}; expected a size per axis, which tells the rank: "
                         f"({kernel}, {kernel}) for images, ({kernel}, {kernel}, {kernel}) for "
                         "volumes")
    return tuple(int(k) if isinstance(k, np.integer) else k for k in kernel)


def _floats(x: Tensor, weight: Tensor) -> Tensor:
    """`x`; an image of integers in the type of the weight, where others would make it float64."""
    return Tensor(x.data.astype(weight.dtype)) if x.dtype.kind in "iub" else x


def _fitting(x: Tensor, layer: Any) -> Tensor:
    """`x` in floats; ValueError where it has other channels than the layer."""
    channels = layer.weight.shape[0]
    if x.shape[-1:] != (channels,):
        raise ValueError(f"{type(layer).__name__}: input {x.shape} does not fit weight "
                         f"{layer.weight.shape}; expected {channels} channels in the last axis")
    return _floats(x, layer.weight)


class Conv(Module):
    """Convolution: weight (*kernel, C_in, C_out), bias (C_out,) or None; see ops.conv.

    The kernel is drawn from N(0, std²), by default with std² = 2 / (C_out prod(kernel)) (He et
    al. 2015, fan-out); the bias is zero. `kernel` is a tuple of length rank; `rng` a generator or
    a seed of one.

    >>> conv = ts.nn.Conv(2, 5, (3, 4), stride=(2, 1), rng=0)
    >>> conv.weight.shape, conv(np.ones((1, 8, 9, 2))).shape
    ((3, 4, 2, 5), (1, 3, 6, 5))
    """

    stage: int | None = None  # of a ResNet that it works in, see models.Depth
    reduces = False  # the channels that a bottleneck works on: its first 1x1
    along: Any = None  # what computes in its place, see models.structures

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, ...], *, stride: Any = 1,
                 padding: Any = 0, dilation: Any = 1, padding_mode: Any = "zero",
                 bias: bool = True, std: float | None = None, rng: np.random.Generator | int):
        kernel = _per_axis(kernel)
        self.window = Window.of(kernel, stride, padding, dilation, padding_mode)
        self.weight = _normal(rng, sqrt(2 / (c_out * prod(kernel))) if std is None else std,
                              (*kernel, c_in, c_out))
        self.bias = Tensor(np.zeros(c_out, "float32"), requires_grad=True) if bias else None

    def forward(self, x: Tensor, size: tuple[int, ...] | None = None,
                residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Of x, or of x with every position twice (see ops.double), to that size; then [+ residual]
        and max(., 0), where asked. ValueError for either where something else computes `along`."""
        x = _floats(x, self.weight)
        if size is not None:
            # Where their kernel is no larger than the doubled grid, which a CPU need not write.
            small = self.weight.data.size << len(size) <= len(x) * prod(size) * x.shape[-1]
            if (small and self.along is None and residual is None and array_module(x.data) is np
                    and ops.phases(self.window, x.shape[1:-1], size)):
                return ops.conv_phases(x, self.weight, self.bias, window=self.window, size=size,
                                       relu=relu)
            x = ops.double(x, size=size)
        if self.along is None:
            return ops.conv(x, self.weight, self.bias, residual, relu=relu, **self.window.options)
        if residual is not None or relu:
            raise ValueError(f"{type(self.along).__name__} computes this; add and cut afterwards")
        return self.along.apply(x, self)


class Linear(Module):
    """x @ weight + bias: (*, C_in) -> (*, C_out), weight (C_in, C_out), bias (C_out,).

    The weight is drawn from N(0, std²), by default with std² = 2 / C_in (He et al. 2015, eq. 10,
    fan-in: with ReLU between, layers of any widths keep the size of what passes through); the bias
    is zero. `rng` is a generator or a seed of one.

    >>> ts.nn.Linear(3, 2, rng=0)(np.ones((4, 5, 3))).shape
    (4, 5, 2)
    """

    def __init__(self, c_in: int, c_out: int, *, std: float | None = None,
                 rng: np.random.Generator | int):
        self.weight = _normal(rng, sqrt(2 / c_in) if std is None else std, (c_in, c_out))
        self.bias = Tensor(np.zeros(c_out, "float32"), requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return _fitting(x, self) @ self.weight + self.bias


class BatchNorm(Module):
    """Batch normalisation over all axes but the channels; see ops.batch_norm.

    In train mode a forward pass also moves running_mean and running_var, in place, unless it is
    frozen. What follows it in a residual block, an addition and a ReLU, can be part of the same
    pass. The batch is that of all `ranks`.

    >>> norm = ts.nn.BatchNorm(2)
    >>> norm(np.array([[1.0, 50.0], [3.0, 70.0]])).data.round(2).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    >>> norm.running_mean  # a tenth of the way from 0 to 2 and to 60
    array([0.2, 6. ], dtype=float32)
    """

    ranks: Alone = ALONE

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        self.weight = Tensor(np.ones(channels, "float32"), requires_grad=True)
        self.bias = Tensor(np.zeros(channels, "float32"), requires_grad=True)
        self.running_mean = np.zeros(channels, "float32")
        self.running_var = np.ones(channels, "float32")
        self.eps, self.momentum = eps, momentum

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        x = _fitting(x, self)
        return ops.batch_norm(x, self.weight, self.bias, residual, running_mean=self.running_mean,
                              running_var=self.running_var,
                              train=self.training and not self.frozen, momentum=self.momentum,
                              eps=self.eps, relu=relu, ranks=self.ranks)


@contextmanager
def synchronised(net: Module, ranks: Alone) -> Iterator[None]:
    """In the block, batch-norms of the network in train mode see the batches of all ranks as one
    (synchronised batch normalisation); with `ALONE`, each its own."""
    norms = [layer for layer in net.modules() if isinstance(layer, BatchNorm)]
    for layer in norms:
        layer.ranks = ranks
    try:
        yield
    finally:
        for layer in norms:
            vars(layer).pop("ranks", None)


class GroupNorm(Module):
    """Group normalisation, for batches of one or two; see ops.group_norm.

    >>> norm = ts.nn.GroupNorm(4, groups=2)
    >>> norm(np.array([[[1.0, 3.0, 10.0, 20.0]]])).data.round(2).tolist()
    [[[-1.0, 1.0, -1.0, 1.0]]]
    """

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-5):
        if not isinstance(groups, int | np.integer) or groups < 1 or channels % groups:
            raise ValueError(f"groups is {groups!r}; expected a number that divides the {channels} "
                             "channels")
        self.weight = Tensor(np.ones(channels, "float32"), requires_grad=True)
        self.bias = Tensor(np.zeros(channels, "float32"), requires_grad=True)
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        x = _fitting(x, self)
        return ops.group_norm(x, self.weight, self.bias, groups=self.groups, eps=self.eps)


class MaxPool(Module):
    """Maximum over windows; see ops.max_pool. `kernel` is a tuple of length rank.

    >>> ts.nn.MaxPool((2, 3))(np.ones((1, 4, 9, 5))).shape
    (1, 2, 3, 5)
    """

    stage: int | None = None  # as a convolution's

    def __init__(self, kernel: tuple[int, ...], stride: Any = None, padding: Any = 0):
        kernel = _per_axis(kernel)
        self.window = Window.of(kernel, stride or kernel, padding)

    def forward(self, x: Tensor) -> Tensor:
        w = self.window
        return ops.max_pool(x, kernel=w.kernel, stride=w.stride, padding=w.padding,
                            dilation=w.dilation)


class ReLU(Module):
    """max(x, 0).

    >>> ts.nn.ReLU()(np.array([-1.0, 2.0])).data
    array([0., 2.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.relu(x)


class Identity(Module):
    """x itself.

    >>> x = ts.Tensor(np.ones(3))
    >>> ts.nn.Identity()(x) is x
    True
    """

    def forward(self, x: Tensor) -> Tensor:
        return x


def normalised(conv: Module, norm: Module, x: Tensor, residual: Tensor | None = None, *,
               relu: bool = False, size: tuple[int, ...] | None = None) -> Tensor:
    """norm(conv(x)) [+ residual], then max(., 0) where asked: in the pass of the batch-norm or,
    where that was folded into the convolution and Identity stands in its place, of the convolution.
    `size`: see Conv.

    >>> conv, x = ts.nn.Conv(1, 2, (3,), rng=0), np.ones((1, 4, 1), "float32")
    >>> y = ts.nn.normalised(conv, ts.nn.Identity(), ts.Tensor(x), relu=True)
    >>> np.allclose(y.data, np.maximum(conv(x).data, 0))
    True
    """
    given = () if size is None else (size,)  # another module in a convolution's place takes x alone
    if not isinstance(norm, Identity):
        return norm(conv(x, *given), residual, relu=relu)
    if type(conv) is Conv and conv.along is None:
        return conv(x, size, residual, relu)
    y = conv(x, *given)
    y = y if residual is None else y + residual
    return ops.relu(y) if relu else y


class GlobalAverage(Module):
    """The mean over all positions: (N, *S, C) -> (N, C), or (N, *1, C) with keepdims.

    >>> ts.nn.GlobalAverage()(np.ones((2, 4, 5, 3))).shape
    (2, 3)
    """

    def __init__(self, keepdims: bool = False):
        self.keepdims = keepdims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(axis=tuple(range(1, x.ndim - 1)), keepdims=self.keepdims)


class Sequential(Module):
    """Modules one after the other, named by their number; a slice of them shares the modules.

    >>> net = ts.nn.Sequential(ts.nn.Linear(3, 4, rng=0), ts.nn.ReLU(), ts.nn.Linear(4, 2, rng=1))
    >>> list(net.state())
    ['0.weight', '0.bias', '2.weight', '2.bias']
    >>> net[:2](np.ones((5, 3))).shape
    (5, 4)
    """

    def __init__(self, *layers: Module):
        vars(self).update({str(i): layer for i, layer in enumerate(layers)})

    def _layers(self) -> list[Module]:
        return [vars(self)[key] for key in sorted(filter(str.isdigit, vars(self)), key=int)]

    def __iter__(self) -> Iterator[Module]:
        return iter(self._layers())

    def __len__(self) -> int:
        return len(self._layers())

    def __getitem__(self, key: int | slice) -> Module:
        found = self._layers()[key]
        return Sequential(*found) if isinstance(found, list) else found

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._layers():
            x = layer(x)
        return x
