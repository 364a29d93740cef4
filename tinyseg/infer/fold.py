"""A network as it is at inference: batch-norm is part of the convolution before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from ..backend import array_module
from ..models import Classifier, Residual, ResNet, Segmenter
from ..models.decoders import Block, Decoder, Normalised, Pyramid
from ..module import held
from ..nn import BatchNorm, Conv, Identity, Module, Network, Sequential
from ..tensor import Tensor

CHAINS = Sequential, Normalised  # each part is read by the next alone
NAMED = Residual, ResNet, Classifier, Segmenter  # conv1 is read by bn1 alone, and so on
KNOWN = *CHAINS, *NAMED, Pyramid, Decoder, Block  # which call their parts as a whole


def fold(net: Network) -> Network:
    """A copy of a network, for evaluation only, with batch-norm folded into the convolutions.

    gamma (w * x + b - mean) / sqrt(var + eps) + beta is the convolution with the kernel s w, plus
    s (b - mean) + beta, s = gamma / sqrt(var + eps). This holds where nothing else reads what the
    convolution gives, which is known of `Sequential` and of what `models` makes, from the network
    down to the first module of another class: that may read any part of what it holds, and its
    batch-norms stay as they are. Answers differ by rounding; later changes of `net` do not reach
    the copy, whose kernels are read-only: a CPU transforms each for Winograd's filters once. What
    followed a batch-norm in its pass follows its convolution, which `trace` therefore tells of.

    >>> net = ts.nn.Sequential(ts.nn.Conv(1, 2, (3, 3), rng=0), ts.nn.BatchNorm(2)).eval()
    >>> net[1].running_var[...] = 4
    >>> folded, x = ts.infer.fold(net), np.ones((1, 5, 6, 1))
    >>> np.allclose(2 * folded[0].weight.data, net[0].weight.data, rtol=1e-4)
    True
    >>> np.allclose(folded(x).data, net(x).data, atol=1e-5)
    True
    """
    net = net.copy().eval()
    uses = Counter(id(thing) for holder in net.modules() for _, thing in held(holder))
    for holder in _known(net):
        for first, second in list(_followers(holder)):
            conv, norm = getattr(holder, first), getattr(holder, second)
            if uses[id(conv)] > 1:
                continue
            library = array_module(norm.running_var)
            scale = norm.weight.data / library.sqrt(norm.running_var + norm.eps)
            before = -norm.running_mean if conv.bias is None else conv.bias.data - norm.running_mean
            conv.weight = Tensor(conv.weight.data * scale)
            conv.bias = Tensor(before * scale + norm.bias.data)
            setattr(holder, second, Identity())
    for module in net.modules():
        if type(module) is Conv and isinstance(module.weight.data, np.ndarray):
            module.weight.data.flags.writeable = False  # what is made of it is kept with it
    return net


def _known(module: Module) -> Iterator[Module]:
    """The module and those below it, as far as it is known how each uses its parts."""
    if type(module) in KNOWN:
        yield module
        for _, part in held(module):
            if isinstance(part, Module):
                yield from _known(part)


def _followers(holder: Module) -> Iterator[tuple[str, str]]:
    """The names of convolutions in a module, each with that of the batch-norm that reads it."""
    names = [name for name, thing in vars(holder).items() if isinstance(thing, Module)]
    if type(holder) in CHAINS:
        pairs = list(zip(names, names[1:], strict=False))
    elif type(holder) in NAMED:
        pairs = [(name, name.replace("conv", "bn")) for name in names]
    else:
        pairs = []
    for first, second in pairs:
        conv = getattr(holder, first)
        if type(conv) is Conv and conv.along is None and type(
                vars(holder).get(second)) is BatchNorm:
            yield first, second
