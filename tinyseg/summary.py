"""What a network is made of, layer by layer: shapes, parameters, work, memory, receptive field."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, inf
from typing import Any, NamedTuple

import numpy as np

from .graph import Node
from .module import Module, watched
from .nn import Conv, Linear, MaxPool
from .tensor import Tensor
from .windows import Window

KEEP_THE_GRID = {"pad", "index"}  # operations that change a grid's size and not its spacing


class Reach(NamedTuple):
    """What the positions p of a map see of the input: along each axis the voxels from step p + low
    to step p + high."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    step: tuple[float, ...]

    def through(self, window: Window) -> Reach:
        """What the answer of a window sees of what is before this one."""
        low, high = [], []
        for a, b, step, k, (before, _), d in zip(*self, window.kernel, window.padding,
                                                 window.dilation, strict=True):
            low.append(a - before * step)
            high.append(b + ((k - 1) * d - before) * step)
        steps = (step * s for step, s in zip(self.step, window.stride, strict=True))
        return Reach(tuple(low), tuple(high), tuple(steps))

    def behind(self, operation: str, before: tuple[int, ...], after: tuple[int, ...]) -> Reach:
        """Of an operation's answer on a grid of another size: what its positions see at most."""
        if before == after or operation in KEEP_THE_GRID:
            return self
        if operation not in ("double", "upsample"):
            return self._replace(low=(-inf,) * len(before), high=(inf,) * len(before))
        finer = [m / n if operation == "upsample" else 1 + (m != n)
                 for n, m in zip(before, after, strict=True)]
        near = [step * (m != n) * (1 if operation == "upsample" else 0.5)
                for step, n, m in zip(self.step, before, after, strict=True)]
        return Reach(tuple(np.subtract(self.low, near)), tuple(
            np.add(self.high, near if operation == "upsample" else 0)),
            tuple(np.divide(self.step, finer)))


@dataclass(frozen=True)
class Layer:
    """A layer that computes: its name and kind, the shape of its answer, how many parameters it has
    and multiply-adds it does (as written, padding included), the bytes of its answer, and how many
    voxels of the input a position of that sees along each axis, at most; inf for all."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    products: int
    bytes: int
    sees: tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """The layers of a network in the order in which they work; `print` shows a table."""

    layers: list[Layer]
    parameters: int

    @property
    def products(self) -> int:
        """Multiply-adds of a pass."""
        return sum(layer.products for layer in self.layers)

    @property
    def bytes(self) -> int:
        """What the answers of all layers take together, which training keeps."""
        return sum(layer.bytes for layer in self.layers)

    def __str__(self) -> str:
        rows = [("layer", "kind", "answer", "parameters", "multiply-adds", "MiB", "sees")]
        for layer in [*self.layers,
                      Layer("all", "", (), self.parameters, self.products, self.bytes, ())]:
            rows.append((layer.name, layer.kind, "x".join(map(str, layer.shape)),
                         f"{layer.parameters:,}", f"{layer.products / 1e6:,.1f} M",
                         f"{layer.bytes / 2**20:,.1f}",
                         "x".join("all" if n == inf else str(n) for n in layer.sees)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows)


def summary(net: Module, shape: tuple[int, ...]) -> Summary:
    """What the layers of a network do with an input of this shape, (N, *S, C).

    A forward pass of zeros through a copy, with a graph, finds it, in the time and memory that it
    takes. What is seen follows from windows and interpolations, back along every path to the input
    (Araujo et al. 2019, "Computing receptive fields of convolutional neural networks"); statistics
    of normalisation do not count. ValueError where the network does not take the shape.

    >>> net = ts.nn.Sequential(ts.nn.Conv(1, 4, (3, 3), padding=1, rng=0), ts.nn.MaxPool((2, 2)),
    ...                        ts.nn.Conv(4, 2, (3, 3), padding=1, rng=0))
    >>> told = ts.summary(net, (1, 8, 12, 1))
    >>> [(layer.name, layer.shape, layer.sees) for layer in told.layers]
    [('0', (1, 8, 12, 4), (3, 3)), ('1', (1, 4, 6, 4), (4, 4)), ('2', (1, 4, 6, 2), (8, 8))]
    """
    net, rank = net.copy().eval(), len(shape) - 2
    names = {id(module): name for name, module in [("", net), *net.named(Module)]}
    x = Tensor(np.zeros(shape, "float32"), requires_grad=True)
    point = (0.0,) * rank
    known: dict[Any, Reach | None] = {x: Reach(point, point, (1.0,) * rank)}  # None: of no input
    layers: list[Layer] = []

    def reach(vertex: Any) -> Reach | None:
        waiting = [vertex]
        while waiting:
            here = waiting.pop()
            if here in known:
                continue
            edges = here.edges if isinstance(here, Node) else []
            if missing := [parent for parent, _ in edges if parent not in known]:
                waiting += [here, *missing]
                continue
            paths = [before.behind(here.name, parent.shape[1:-1], here.shape[1:-1])
                     if len(parent.shape) == len(here.shape) else
                     before._replace(low=(-inf,) * rank, high=(inf,) * rank)
                     for parent, _ in edges if (before := known[parent])]
            known[here] = joined(paths) if paths else None
        return known[vertex]

    def joined(paths: list[Reach]) -> Reach:
        return paths[0]._replace(
            low=tuple(map(min, zip(*(path.low for path in paths), strict=True))),
            high=tuple(map(max, zip(*(path.high for path in paths), strict=True))))

    def note(module: Module, seen: Tensor, answer: Tensor) -> None:
        leaf = isinstance(module, Conv) or not any(module.named(Module))
        if id(module) not in names or not leaf:
            return
        if isinstance(module, Conv | MaxPool) and (before := reach(seen.node or seen)):
            if module.window.positions(grid := seen.shape[1:-1]) != answer.shape[1:-1]:
                before = before.behind("double", grid, answer.shape[1:-1])  # see Conv.forward
            edges = answer.node.edges if isinstance(answer.node, Node) else []
            added = [path for parent, i in edges if i == 3 and (path := reach(parent))]
            known[answer.node] = joined([before.through(module.window), *added])
        found, products = reach(answer.node or answer), 0
        if isinstance(module, Conv | Linear):
            weights = sum(p.data.size for p in module.parameters() if p.ndim > 1)
            products = answer.data.size // answer.shape[-1] * weights
        layers.append(Layer(
            names[id(module)], type(module).__name__, answer.shape,
            sum(p.data.size for p in module.parameters()), products, answer.data.nbytes,
            tuple(b - a + 1 if b == inf else floor(b - a) + 1
                  for a, b in zip(found.low, found.high, strict=True)) if found else (0,) * rank))

    with watched(note):
        net(x)
    return Summary(layers, sum(p.data.size for p in net.parameters()))
