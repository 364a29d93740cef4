"""tinyseg: 2D residual networks inflated to segment volumes, from scratch on NumPy and CuPy."""

from . import checkpoint as checkpoint
from . import (
    cuda,
    data,
    losses,
    metrics,
    models,
    nn,
    ops,
    optim,
    parallel,
    pretrained,
    train,
    windows,
)
from . import infer as infer
from .backend import device, to_numpy
from .checkpoint import load, save
from .inflate import inflate
from .nn import to_device
from .tensor import Tensor, no_grad

__version__ = "0.1.0"
__all__ = ["Tensor", "cuda", "data", "device", "infer", "inflate", "load", "losses", "metrics",
           "models", "nn", "no_grad", "ops", "optim", "parallel", "pretrained", "save",
           "to_device", "to_numpy", "train", "windows"]
