"""tinyseg: 2D residual networks inflated to segment volumes, from scratch on NumPy and CuPy."""

from . import checkpoint as checkpoint
from . import (
    cuda,
    data,
    export,
    intervals,
    losses,
    metrics,
    models,
    nn,
    ops,
    optim,
    page,
    parallel,
    pictures,
    pretrained,
    profiles,
    ranks,
    report,
    train,
    windows,
)
from . import infer as infer
from .backend import device, to_numpy
from .checkpoint import load, save
from .gradients import check_gradients
from .inflate import deflate, inflate
from .nn import to_device
from .profiles import PROFILES
from .summary import summary
from .tensor import Tensor, no_grad, op

__version__ = "0.1.0"
__all__ = ["PROFILES", "Tensor", "check_gradients", "checkpoint", "cuda", "data", "deflate",
           "device", "export", "infer", "inflate", "intervals", "load", "losses", "metrics",
           "models", "nn", "no_grad", "op", "ops", "optim", "page", "parallel", "pictures",
           "pretrained", "profiles", "ranks", "report", "save", "summary", "to_device",
           "to_numpy", "train", "windows"]
