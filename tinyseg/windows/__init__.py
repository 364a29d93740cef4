"""The convolution engine: arrays only, it knows nothing of tensors.

`reference` is the specification in NumPy; this file is the one place where a faster body that
equals it would be chosen.
"""

from .geometry import Window
from .reference import correlate, correlate_dw, correlate_dx, maximum, maximum_adjoint

__all__ = ["Window", "correlate", "correlate_dw", "correlate_dx", "maximum", "maximum_adjoint"]
