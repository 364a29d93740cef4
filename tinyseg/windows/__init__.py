"""The convolution engine: arrays only, it knows nothing of tensors.

`reference` is the specification, on arrays of any library, type and rank. Two engines equal it for
float32 and are fast: `cpu` on NumPy arrays, `kernels` on a GPU. Both compute the two products of
`products`, which makes every convolution of them. This file is the one place that chooses.
"""

from typing import Any

from ..backend import Array
from . import cpu, kernels, products, reference
from .cpu import without
from .explanation import explain
from .geometry import Window
from .products import PLAIN, Finish

__all__ = ["Finish", "Window", "correlate", "correlate_dw", "correlate_dx", "explain", "maximum",
           "maximum_adjoint", "without"]


def correlate(x: Array, w: Array, window: Window, finish: Finish = PLAIN) -> Array:
    """(N, *S, C_in), (*K, C_in, C_out) -> (N, *P, C_out), finished; see reference.correlate.

    >>> x, w = np.arange(5.0).reshape(1, 5, 1), np.array([1.0, 10.0]).reshape(2, 1, 1)
    >>> ts.windows.correlate(x, w, ts.windows.Window.of((2,))).ravel()  # x[p] + 10 x[p + 1]
    array([10., 21., 32., 43.])
    """
    engine = _engine(window, x, w)
    if engine:
        return products.correlate(engine, x, w, window, finish)
    y = reference.correlate(x, w, window)
    finish(y, y)
    return y


def correlate_dx(y: Array, w: Array, size: tuple[int, ...], window: Window) -> Array:
    """(N, *P, C_out), (*K, C_in, C_out) -> (N, *size, C_in), the adjoint of `correlate` in x.

    >>> y, w = np.array([[[1.0], [0.0], [0.0], [2.0]]]), np.array([1.0, 10.0]).reshape(2, 1, 1)
    >>> ts.windows.correlate_dx(y, w, (5,), ts.windows.Window.of((2,))).ravel()
    array([ 1., 10.,  0.,  2., 20.])
    """
    engine = _engine(window, y, w)
    return (products.correlate_dx(engine, y, w, size, window) if engine
            else reference.correlate_dx(y, w, size, window))


def correlate_dw(x: Array, y: Array, window: Window) -> Array:
    """(N, *S, C_in), (N, *P, C_out) -> (*K, C_in, C_out), the adjoint of `correlate` in w.

    >>> x, y = np.arange(5.0).reshape(1, 5, 1), np.array([[[1.0], [0.0], [0.0], [2.0]]])
    >>> ts.windows.correlate_dw(x, y, ts.windows.Window.of((2,))).ravel()  # 0 + 2 * 3, 1 + 2 * 4
    array([6., 9.])
    """
    engine = _engine(window, x, y)
    return products.correlate_dw(engine, x, y, window) if engine else reference.correlate_dw(
        x, y, window)


def maximum(x: Array, window: Window, *, taps: bool = True) -> tuple[Array, Any]:
    """(N, *S, C) -> (N, *P, C) and the tap that won each (without `taps`, where nobody asks for
    them, maybe None); see reference.maximum.

    >>> x = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0]).reshape(1, 6, 1)
    >>> y, winner = ts.windows.maximum(x, ts.windows.Window.of((2,), stride=2))
    >>> y.ravel(), winner.ravel().tolist()
    (array([3., 4., 9.]), [0, 0, 1])
    """
    engine = None if any(window.edge) else _engine(window, x)
    return engine.maximum(x, window, taps=taps) if engine else reference.maximum(x, window)


def maximum_adjoint(g: Array, winner: Array, size: tuple[int, ...], window: Window) -> Array:
    """(N, *P, C) and the winning taps -> (N, *size, C), the adjoint of `maximum`.

    >>> g, winner = np.array([[[5.0], [7.0]]]), np.array([[[1], [0]]])
    >>> window = ts.windows.Window.of((2,), stride=2)
    >>> ts.windows.maximum_adjoint(g, winner, (4,), window).ravel()
    array([0., 5., 7., 0.])
    """
    engine = None if any(window.edge) else _engine(window, g)
    return (engine or reference).maximum_adjoint(g, winner, size, window)


def _engine(window: Window, *arrays: Array):
    """The fast engine that takes these arrays, or None."""
    return next((engine for engine in (kernels, cpu) if engine.serves(window, *arrays)), None)
