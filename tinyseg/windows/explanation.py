"""What the CPU's engine would do with a convolution, in words."""

from __future__ import annotations

from math import prod

import numpy as np

from ..backend import Array
from . import cpu, products
from .geometry import Window


def explain(x_shape: tuple[int, ...], w_shape: tuple[int, ...], window: Window) -> str:
    """How a float32 convolution (N, *S, C_in) with (*K, C_in, C_out) is computed on a CPU: a line
    for each product of the output, of the gradient in x (one per residue of the stride), and of the
    gradient in w.

    >>> window = ts.windows.Window.of((1, 1))
    >>> print(ts.windows.explain((1, 8, 9, 3), (1, 1, 3, 5), window))
    y  one matrix product: a kernel of one tap
    dx one matrix product: a kernel of one tap
    dw one matrix product: a kernel of one tap
    >>> with ts.windows.without("point"):
    ...     print(ts.windows.explain((1, 8, 9, 3), (1, 1, 3, 5), window)[:50])
    y  columns: 1 groups of 1 taps, 3 numbers wide, 10
    """
    lines = []

    class Told:
        """Writes down what the CPU's engine would do."""

        def __init__(self, reading: str):
            self.reading = reading

        def products(self, x, problems) -> None:
            for problem in problems:
                positions = products.outputs(problem).shape[1:-1]
                self.note(cpu.method(x, problem), x, problem.w.shape[:-2], positions,
                          problem.stride, problem.dilation, problem.before)

        def weights(self, x, y, kernel, *geometry) -> None:
            positions = y.shape[1:-1]
            self.note(cpu.choose(x.shape, kernel, y.shape[-1], positions, *geometry), x, kernel,
                      positions, *geometry)

        def note(self, *decided) -> None:
            lines.append(f"{self.reading:3}{_reason(*decided)}")

    batch, *grid, channels = x_shape
    positions = window.positions(tuple(grid))
    window, border = products.repeated(window)  # written out, it is a part of the grid
    size = tuple(n + sum(b) for n, b in zip(grid, border[1:], strict=True))
    x, w, y = (np.broadcast_to(np.float32(0), shape) for shape in (
        (batch, *size, channels), w_shape, (batch, *positions, w_shape[-1])))
    products.correlate(Told("y"), x, w, window)
    products.correlate_dx(Told("dx"), y, w, size, window)
    products.correlate_dw(Told("dw"), x, y, window)
    return "\n".join(lines)


def _reason(method: cpu.Method, x: Array, kernel, positions, stride, dilation, before) -> str:
    """What the engine decided for these sizes, and why."""
    name, plan = method
    if name == "point":
        return "one matrix product: a kernel of one tap"
    if name == "lines":
        return (f"Winograd along the first axis: {plan + 2} convolutions over the other axes for "
                f"{plan} outputs, where {3 * plan} would be direct")
    if name == "tiles":
        return (f"Winograd: {plan.number} tiles of {'x'.join(map(str, plan.steps))}, "
                f"{plan.frequencies * plan.taps} products where {prod(plan.steps) * prod(kernel)} "
                f"would be direct")
    if name == "taps":
        return f"taps: {prod(kernel)} products, each added to a strided subgrid"
    columns = cpu.Columns(x, kernel, positions, stride, dilation, before)
    taps = columns.width // x.shape[-1]
    seen = sum(cpu.volume(sees) for _, sees in columns.groups) * taps
    share = seen / (len(x) * prod(positions) * prod(kernel))
    return (f"columns: {len(columns.groups)} groups of {taps} taps, {columns.width} numbers wide, "
            f"{share:.0%} of the products (the rest sees padding only)")
