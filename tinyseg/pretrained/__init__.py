"""Foreign checkpoints into ours: `files` reads them, `names` finds the network in them, `mapping`
says what goes where."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..backend import Array, array_module
from ..checkpoint import save
from ..models import build
from ..nn import BatchNorm, Module
from ..tensor import Tensor, no_grad
from .files import read
from .mapping import IMAGENET_MEAN, IMAGENET_STD, Report, load, recognise

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Report", "convert", "load", "read", "recalibrate",
           "recognise"]


def convert(source: str | Path, target: str | Path, **names: Any) -> tuple[Report, dict]:
    """The network of the foreign checkpoint SOURCE in our format, TARGET, with where it is from and
    the preparation of images that it was trained with; what became of its tensors, and its config.

    names: the options of `load`. ValueError where none of our networks fits, see `recognise`.
    """
    source, target = Path(source), Path(target)
    if target.suffix != ".npz":
        raise ValueError(f"{target}: expected a name that ends in .npz")
    try:
        net = build(recognise(read(source), **names))
    except ValueError as error:
        raise error if str(source) in str(error) else ValueError(f"{source}: {error}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says the same
        told = load(net, source, **names)
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    rgb = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if net.config["in_channels"] == 3 else None
    save(target, net, source=source.name, sha256=digest, report=str(told), normalisation=rgb)
    return told, net.config


def recalibrate(net: Module, batches: Iterable[Array]) -> None:
    """Give every batch-norm the statistics of these batches; in eval mode nothing changes.

    batches: inputs (N, *S, C) of the network. Each layer's mean mu and variance v over all of them
    become its running statistics, and gamma' = s sqrt(v + eps), beta' = b + s mu with the scale s
    and shift b = beta - s running_mean that the layer applied before. Needed where statistics are
    folded into gamma and beta, before batch-norm runs in train mode. ValueError without a batch.

    >>> net = ts.nn.Sequential(ts.nn.BatchNorm(1)).eval()
    >>> before = net(np.array([[7.0]])).item()
    >>> ts.pretrained.recalibrate(net, [np.array([[3.0], [5.0]])])
    >>> net[0].running_mean.item(), net[0].running_var.item()
    (4.0, 1.0)
    >>> round(before - net(np.array([[7.0]])).item(), 4)
    0.0
    """
    layers = [module for module in net.modules() if isinstance(module, BatchNorm)]
    sums: dict[BatchNorm, tuple[int, Array, Array]] = {}

    def observe(layer):
        def forward(x: Tensor, *also: Any, **options: Any) -> Tensor:
            rows = x.data.reshape(-1, x.shape[-1]).astype("float64")
            n, mean = len(rows), rows.mean(axis=0)
            spread = ((rows - mean) ** 2).sum(axis=0)
            if layer in sums:  # Chan et al. 1979: pooled mean and sum of squares
                before, old, total = sums[layer]
                share = n / (n + before)
                spread = total + spread + (mean - old) ** 2 * (before * share)
                mean, n = old + (mean - old) * share, n + before
            sums[layer] = n, mean, spread
            return BatchNorm.forward(layer, x, *also, **options)
        return forward

    modes = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training, layer.forward = False, observe(layer)  # type: ignore[method-assign]
        with no_grad():
            for batch in batches:
                net(batch)
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode
            del layer.forward
    if layers and not sums:
        raise ValueError("recalibrate needs at least one batch")
    for layer, (n, mean, spread) in sums.items():
        var, sqrt = spread / n, array_module(mean).sqrt
        scale = layer.weight.data / sqrt(layer.running_var + layer.eps)
        layer.bias.data += scale * (mean - layer.running_mean)
        layer.weight.data[...] = scale * sqrt(var + layer.eps)
        for parameter in (layer.weight, layer.bias):
            parameter.version += 1
        layer.running_mean[...], layer.running_var[...] = mean, var
