"""The convolution engine: arrays only, it knows nothing of tensors.

`reference` is the specification, on the arrays of any library; `kernels` equals it on a GPU. This
file is the one place that chooses.
"""

from ..backend import Array
from . import kernels, reference
from .geometry import Window

__all__ = ["Window", "correlate", "correlate_dw", "correlate_dx", "maximum", "maximum_adjoint"]


def correlate(x: Array, w: Array, window: Window) -> Array:
    """(N, *S, C_in), (*K, C_in, C_out) -> (N, *P, C_out); see reference.correlate."""
    return _body(window, x, w).correlate(x, w, window)


def correlate_dx(y: Array, w: Array, size: tuple[int, ...], window: Window) -> Array:
    """(N, *P, C_out), (*K, C_in, C_out) -> (N, *size, C_in), the adjoint of `correlate` in x."""
    return _body(window, y, w).correlate_dx(y, w, size, window)


def correlate_dw(x: Array, y: Array, window: Window) -> Array:
    """(N, *S, C_in), (N, *P, C_out) -> (*K, C_in, C_out), the adjoint of `correlate` in w."""
    return _body(window, x, y).correlate_dw(x, y, window)


def maximum(x: Array, window: Window) -> tuple[Array, Array]:
    """(N, *S, C) -> (N, *P, C) and the tap that won each; see reference.maximum."""
    return _body(window, x).maximum(x, window)


def maximum_adjoint(g: Array, winner: Array, size: tuple[int, ...], window: Window) -> Array:
    """(N, *P, C) and the winning taps -> (N, *size, C), the adjoint of `maximum`."""
    return _body(window, g).maximum_adjoint(g, winner, size, window)


def _body(window: Window, *arrays: Array):
    return kernels if kernels.serves(window, *arrays) else reference
