"""The convolution engine: arrays only, it knows nothing of tensors.

`reference` is the specification, on arrays of any library, type and rank. Two engines equal it for
float32 and are fast: `cpu` on NumPy arrays, `kernels` on a GPU. Both compute the two products of
`products`, which makes every convolution of them. This file is the one place that chooses.
"""

import numpy as np

from ..backend import Array
from . import cpu, kernels, products, reference
from .geometry import Window

__all__ = ["Window", "correlate", "correlate_dw", "correlate_dx", "explain", "maximum",
           "maximum_adjoint"]


def correlate(x: Array, w: Array, window: Window) -> Array:
    """(N, *S, C_in), (*K, C_in, C_out) -> (N, *P, C_out); see reference.correlate."""
    engine = _engine(window, x, w)
    return products.correlate(engine, x, w, window) if engine else reference.correlate(x, w, window)


def correlate_dx(y: Array, w: Array, size: tuple[int, ...], window: Window) -> Array:
    """(N, *P, C_out), (*K, C_in, C_out) -> (N, *size, C_in), the adjoint of `correlate` in x."""
    engine = _engine(window, y, w)
    return (products.correlate_dx(engine, y, w, size, window) if engine
            else reference.correlate_dx(y, w, size, window))


def correlate_dw(x: Array, y: Array, window: Window) -> Array:
    """(N, *S, C_in), (N, *P, C_out) -> (*K, C_in, C_out), the adjoint of `correlate` in w."""
    engine = _engine(window, x, y)
    return products.correlate_dw(engine, x, y, window) if engine else reference.correlate_dw(
        x, y, window)


def maximum(x: Array, window: Window) -> tuple[Array, Array]:
    """(N, *S, C) -> (N, *P, C) and the tap that won each; see reference.maximum."""
    engine = None if any(window.edge) else _engine(window, x)
    return (engine or reference).maximum(x, window)


def maximum_adjoint(g: Array, winner: Array, size: tuple[int, ...], window: Window) -> Array:
    """(N, *P, C) and the winning taps -> (N, *size, C), the adjoint of `maximum`."""
    engine = None if any(window.edge) else _engine(window, g)
    return (engine or reference).maximum_adjoint(g, winner, size, window)


def explain(x_shape: tuple[int, ...], w_shape: tuple[int, ...], window: Window) -> str:
    """How a float32 convolution (N, *S, C_in) with (*K, C_in, C_out) is computed on a CPU: a line
    for each product of the output, of the gradient in x (one per residue of the stride), and of the
    gradient in w."""
    lines = []

    class Told:
        """Writes down what the CPU's engine would do."""

        def __init__(self, reading: str):
            self.reading = reading

        def products(self, x, problems) -> None:
            for problem in problems:
                positions = cpu.outputs(problem).shape[1:-1]
                self.note(cpu.method(x, problem), x, problem.w.shape[:-2], positions, *problem[4:])

        def weights(self, x, y, kernel, *geometry) -> None:
            positions = y.shape[1:-1]
            self.note(cpu.choose(x.shape, kernel, y.shape[-1], positions, *geometry), x, kernel,
                      positions, *geometry)

        def note(self, *decided) -> None:
            lines.append(f"{self.reading:3}{cpu.reason(*decided)}")

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


def _engine(window: Window, *arrays: Array):
    """The fast engine that takes these arrays, or None."""
    return next((engine for engine in (kernels, cpu) if engine.serves(window, *arrays)), None)
