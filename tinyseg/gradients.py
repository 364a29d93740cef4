"""Whether the gradients of a function are right: differences along random directions tell."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .tensor import Tensor

STEP = 1e-3  # of the differences, whose error is some STEP**4


def check_gradients(function: Callable[..., Tensor], *arrays: np.ndarray, seed: int = 0,
                    tolerance: float = 1e-6) -> float:
    """Compare the gradients of y = function(*tensors) with differences; the largest error.

        ⟨gradient in x of ⟨y, v⟩, u⟩ = d⟨function(x + t u), v⟩/dt at t = 0

    for a random cotangent v and, input by input, a random direction u: with v of ones a transposed
    matrix may pass, or a gradient that is right in sum only. Differences are central, of fourth
    order, in float64, so `arrays` (floats of any shapes) should keep away from kinks such as relu's
    at 0. An error is relative to 1 + the sum of |gradient u|.

    Inputs and cotangent are read-only: a pull-back that writes into them fails. AssertionError
    names an input whose gradient is missing, of another shape, or off by more than `tolerance`;
    TypeError says that the function returned no tensor.

    >>> x, w = np.array([[1.0, 2.0, 3.0]]), np.array([[4.0], [5.0], [6.0]])
    >>> ts.check_gradients(lambda x, w: x @ w, x, w) < 1e-6
    True
    """
    rng = np.random.default_rng(seed)
    inputs = [np.array(a, "float64") for a in arrays]
    leaves = [Tensor(a, requires_grad=True) for a in inputs]
    y = function(*leaves)
    if not isinstance(y, Tensor):
        raise TypeError(f"the function returned a {type(y).__name__}, expected a tensor")
    cotangent = np.array(rng.standard_normal(y.shape))
    for array in (*inputs, cotangent):
        array.flags.writeable = False
    if y.requires_grad:
        y.backward(cotangent)
    worst = 0.0
    for i, (x, leaf) in enumerate(zip(inputs, leaves, strict=True)):
        which, direction = f"input {i}, of shape {x.shape}", rng.standard_normal(x.shape)
        if leaf.grad is None:
            raise AssertionError(f"{which}: no gradient; the function does not use it, or leaves "
                                 "the graph (t.data, float(t))")
        assert leaf.grad.shape == x.shape, f"{which}: its gradient has shape {leaf.grad.shape}"

        def changed(t: float, i=i, x=x, direction=direction) -> float:
            moved = [*inputs[:i], x + t * direction, *inputs[i + 1 :]]
            return float((np.asarray(function(*map(Tensor, moved)).data) * cotangent).sum())

        slope = (8 * (changed(STEP) - changed(-STEP)) - changed(2 * STEP) + changed(-2 * STEP)
                 ) / (12 * STEP)
        terms = leaf.grad * direction
        error = abs(terms.sum() - slope) / (1 + abs(terms).sum())
        if not error <= tolerance:
            share = f", {terms.sum() / slope:.3g} times that" if slope else ""
            raise AssertionError(f"{which}: along a random direction the function changes by "
                                 f"{slope:.6g}, its gradient says {terms.sum():.6g}{share}")
        worst = max(worst, float(error))
    return worst
