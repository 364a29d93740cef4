"""Prediction: `sliding_window` on arrays, `segment` on scans, and what cleans a label map."""

from .fold import fold
from .postprocess import islands
from .scan import numbers, resampled, rows, segment
from .windows import gaussian, slabs, sliding_window, starts

__all__ = ["fold", "gaussian", "islands", "numbers", "resampled", "rows", "segment", "slabs",
           "sliding_window", "starts"]
