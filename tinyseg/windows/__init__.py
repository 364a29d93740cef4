"""The convolution engine: arrays only, it knows nothing of tensors.

`reference` is the specification, on arrays of any library, type and rank. Two bodies equal it for
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
    body = _body(window, x, w)
    return products.correlate(body, x, w, window) if body else reference.correlate(x, w, window)


def correlate_dx(y: Array, w: Array, size: tuple[int, ...], window: Window) -> Array:
    """(N, *P, C_out), (*K, C_in, C_out) -> (N, *size, C_in), the adjoint of `correlate` in x."""
    body = _body(window, y, w)
    return (products.correlate_dx(body, y, w, size, window) if body
            else reference.correlate_dx(y, w, size, window))


def correlate_dw(x: Array, y: Array, window: Window) -> Array:
    """(N, *S, C_in), (N, *P, C_out) -> (*K, C_in, C_out), the adjoint of `correlate` in w."""
    body = _body(window, x, y)
    return products.correlate_dw(body, x, y, window) if body else reference.correlate_dw(
        x, y, window)


def maximum(x: Array, window: Window) -> tuple[Array, Array]:
    """(N, *S, C) -> (N, *P, C) and the tap that won each; see reference.maximum."""
    body = None if any(window.edge) else _body(window, x)
    return (body or reference).maximum(x, window)


def maximum_adjoint(g: Array, winner: Array, size: tuple[int, ...], window: Window) -> Array:
    """(N, *P, C) and the winning taps -> (N, *size, C), the adjoint of `maximum`."""
    body = None if any(window.edge) else _body(window, g)
    return (body or reference).maximum_adjoint(g, winner, size, window)


def explain(x_shape: tuple[int, ...], w_shape: tuple[int, ...], window: Window) -> str:
    """How a float32 convolution (N, *S, C_in) with (*K, C_in, C_out) is computed on a CPU: a line
    for each product of the output, of the gradient in x (one per residue of the stride), and of the
    gradient in w."""
    lines = []

    class Body:
        """Writes down what the CPU's body would do."""

        def __init__(self, reading: str):
            self.reading = reading

        def note(self, *problem) -> None:
            lines.append(f"{self.reading:3}{cpu.reason(*problem)}")

        def products(self, x, problems) -> None:
            for w, into, start, step, *geometry in problems:
                positions = products.count(into.shape[1:-1], start, step)
                self.note(x, w.shape[:-2], w.shape[-1], positions, *geometry, max(step) > 1)

        def weights(self, x, y, kernel, stride, dilation, before) -> None:
            self.note(x, kernel, y.shape[-1], y.shape[1:-1], stride, dilation, before)

    batch, *grid, channels = x_shape
    positions = window.positions(tuple(grid))
    window, border = products.repeated(window)  # written out, it is a part of the grid
    size = tuple(n + sum(b) for n, b in zip(grid, border[1:], strict=True))
    x, w, y = (np.broadcast_to(np.float32(0), shape) for shape in (
        (batch, *size, channels), w_shape, (batch, *positions, w_shape[-1])))
    products.correlate(Body("y"), x, w, window)
    products.correlate_dx(Body("dx"), y, w, size, window)
    products.correlate_dw(Body("dw"), x, y, window)
    return "\n".join(lines)


def _body(window: Window, *arrays: Array):
    """The fast body that takes these arrays, or None."""
    return next((body for body in (kernels, cpu) if body.serves(window, *arrays)), None)
