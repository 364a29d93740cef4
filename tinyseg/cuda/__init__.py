"""The GPU: hand-written CUDA kernels on CuPy arrays.

The sources stand in kernels/*.cu, each under the formula that it computes and the NumPy function
that specifies it. `launch` compiles and checks, `captured` repeats many launches as one; each other
module here launches the kernels of one source. Nothing here imports CuPy: an array brings its
library along.
"""

from . import loss, norm, optim, pool, upsample
from .capture import captured, is_capturing
from .loader import (
    MULTIPROCESSORS,
    PRECISIONS,
    Strided,
    launch,
    plain,
    precision,
    precision_here,
    serves,
    signatures,
    source,
)

__all__ = ["MULTIPROCESSORS", "PRECISIONS", "Strided", "captured", "is_capturing", "launch", "loss",
           "norm", "optim", "plain", "pool", "precision", "precision_here", "serves", "signatures",
           "source", "upsample"]
