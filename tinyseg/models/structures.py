"""Ways along depth other than a kernel of T x k x k.

Each is a module that stands in a convolution as `along`: the 2D kernel (1, k, k, C_in, C_out) keeps
its name, and what goes along depth is beside it. On an input constant along depth, padded by its
edge, a convolution with any of them but the three of ACS answers as its 2D one, whatever training
made of it, as long as what goes along depth sums to one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from .. import ops
from ..backend import Array, array_module
from ..nn import Conv, Module
from ..tensor import Tensor
from ..windows import Window

SHIFTED = 8  # one of so many channels is shifted each way (Lin et al. 2019, section 5)


def plane(window: Window, stride: int | None = None) -> Window:
    """The window of a slice of a rank-3 window; stride along depth, by default its own."""
    return Window((1, *window.kernel[1:]), (stride or window.stride[0], *window.stride[1:]),
                  ((0, 0), *window.padding[1:]), (1, *window.dilation[1:]), window.edge)


def line(window: Window) -> Window:
    """What a rank-3 window does along depth, on one point of the plane."""
    return Window((window.kernel[0], 1, 1), (window.stride[0], 1, 1),
                  (window.padding[0], (0, 0), (0, 0)), (window.dilation[0], 1, 1),
                  (window.edge[0], False, False))


def convolve(x: Tensor, weight: Tensor, window: Window, bias: Tensor | None = None) -> Tensor:
    """ops.conv with a window."""
    return ops.conv(x, weight, bias, **window.options)


def parameter(conv: Conv, numbers: np.ndarray) -> Tensor:
    """Numbers as a parameter beside the convolution's kernel: its type, where it is."""
    w = conv.weight.data
    return Tensor(array_module(w).asarray(numbers, dtype=w.dtype), requires_grad=numbers.size > 0)


class Along(Module):
    """What stands in a convolution of window (T, k, k) as `along`. alpha (T,): where its numbers
    along depth begin, by default where it is known to."""

    def __init__(self, conv: Conv, alpha: Array | None = None):
        self.begin(conv, self.known(conv.window.kernel[0]) if alpha is None else np.array(alpha))

    @staticmethod
    def known(slots: int) -> Array:
        """The slice itself and no other."""
        return np.eye(slots)[slots // 2]

    def begin(self, conv: Conv, alpha: Array) -> None:
        """Make the numbers of its own, if it has any."""

    def apply(self, x: Tensor, conv: Conv) -> Tensor:
        """What the convolution answers; by default the 2D kernel's answer to each slice."""
        return convolve(x, conv.weight, plane(conv.window), conv.bias)

    def flat(self, conv: Conv) -> Array:
        """The 2D kernel that answers alike where nothing changes along depth."""
        return conv.weight.data[0]


class Factored(Along):
    """1 x k x k, then T x 1 x 1 over all channels: weight (T, 1, 1, C_out, C_out), alpha[t] on the
    diagonal."""

    def begin(self, conv: Conv, alpha: Array) -> None:
        same = np.eye(conv.weight.shape[-1])
        self.weight = parameter(conv, np.multiply.outer(alpha, same)[:, None, None])

    def apply(self, x: Tensor, conv: Conv) -> Tensor:
        y = convolve(x, conv.weight, plane(conv.window, 1))
        return convolve(y, self.weight, line(conv.window), conv.bias)

    def flat(self, conv: Conv) -> Array:
        return conv.weight.data[0] @ self.weight.data.sum(axis=0)


class Depthwise(Along):
    """1 x k x k, then T taps along depth, of each channel its own: weight (T, C_out)."""

    def begin(self, conv: Conv, alpha: Array) -> None:
        self.weight = parameter(conv, np.repeat(alpha[:, None], conv.weight.shape[-1], 1))

    def apply(self, x: Tensor, conv: Conv) -> Tensor:
        y, window = convolve(x, conv.weight, plane(conv.window, 1)), line(conv.window)
        count, options = window.positions(y.shape[1:-1]), window.options
        y = ops.pad(y, padding=options["padding"], padding_mode=options["padding_mode"])
        parts = [y[(slice(None), *points)] * self.weight[tap[0]]
                 for tap, points in window.taps(count)]
        y = sum(parts[1:], parts[0])
        return y if conv.bias is None else y + conv.bias

    def flat(self, conv: Conv) -> Array:
        return conv.weight.data[0] * self.weight.data.sum(axis=0)


class Mixed(Along):
    """w3[t] = softmax(logits)[t] w2, another mixture for every filter: logits (T, C_out)."""

    @staticmethod
    def known(slots: int) -> Array:
        return np.full(slots, 1 / slots)

    def begin(self, conv: Conv, alpha: Array) -> None:
        self.logits = parameter(conv, np.repeat(np.log(alpha)[:, None], conv.weight.shape[-1], 1))

    def apply(self, x: Tensor, conv: Conv) -> Tensor:
        shares = ops.softmax(self.logits, axis=0)
        weight = shares.reshape(len(shares), 1, 1, 1, -1) * conv.weight
        return convolve(x, weight, conv.window, conv.bias)


class Shift(Along):
    """An eighth of the channels from the slice after, another from the slice before, the others
    from their own; then 1 x k x k. No numbers of its own, and T does not count."""

    def apply(self, x: Tensor, conv: Conv) -> Tensor:
        return super().apply(self.shifted(x, conv.window), conv)

    @staticmethod
    def shifted(x: Tensor, window: Window, count: int | None = None) -> Tensor:
        """x (N, D, H, W, C) with its first `count` channels of the slice after, as many of the
        slice before, and the rest as it is."""
        count = x.shape[-1] // SHIFTED if count is None else count
        if not count:
            return x
        padded = ops.pad(x, padding=((1, 1), 0, 0), padding_mode=(
            "edge" if window.edge[0] else "zero", "zero", "zero"))
        return ops.concatenate(padded[:, 2:, ..., :count], padded[:, :-2, ..., count : 2 * count],
                               *[x[..., 2 * count :]] * (2 * count < x.shape[-1]))


class Gated(Along):
    """What a gate lets through is shifted, y = shift(g x) + (1 - g) x, g = tanh(T x 3 x 3 * x), a
    gate for either half of the channels: weight (2, T, 3, 3, C_in / 2, 1), from zero."""

    def begin(self, conv: Conv, alpha: Array) -> None:
        half = conv.weight.shape[-2] // 2
        self.weight = parameter(conv, np.zeros((2, len(alpha), 3, 3, half, 1)))

    def apply(self, x: Tensor, conv: Conv) -> Tensor:
        half, window = self.weight.shape[-2], replace(
            line(conv.window), kernel=(self.weight.shape[1], 3, 3), stride=(1, 1, 1),
            padding=(conv.window.padding[0], (1, 1), (1, 1)))
        if half:
            parts = x[..., :half], x[..., half : 2 * half]
            moved = ops.concatenate(*(
                part * ops.tanh(convolve(part, self.weight[i], window))
                for i, part in enumerate(parts)))
            both = x[..., : 2 * half]
            stay, rest = both - moved, [x[..., 2 * half :]] * (2 * half < x.shape[-1])
            x = ops.concatenate(Shift.shifted(moved, conv.window, half) + stay, *rest)
        return super().apply(x, conv)


class Views(Along):
    """The 2D kernel in the axial, the coronal and the sagittal plane: a third of the filters in
    each (`split`), or the mean of the three, or their mixture by softmax(logits (3, C_out))."""

    def __init__(self, conv: Conv, alpha: Array | None = None, *, blend: str):
        self.blend = blend
        super().__init__(conv, alpha)

    def begin(self, conv: Conv, alpha: Array) -> None:
        window = conv.window
        axes = {*zip(*(part[1:] for part in vars(window).values()), strict=True)}
        if len(axes) > 1 or any(sum(p) != (k - 1) * d for k, _, p, d, _ in axes):
            raise ValueError(f"found the window {window}, expected one alike along both axes of the"
                             " plane that keeps its size; other kernels do not turn into a plane")
        if self.blend == "softmax":
            self.logits = parameter(conv, np.zeros((3, conv.weight.shape[-1])))

    def apply(self, x: Tensor, conv: Conv) -> Tensor:
        filters = conv.weight.shape[-1]
        cuts = [slice(None)] * 3
        if self.blend == "split":  # the first ones take what a third leaves over
            ends = [0, *np.cumsum([(filters + 2 - i) // 3 for i in range(3)]).tolist()]
            cuts = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
        parts = [convolve(x, self.turned(conv.weight[..., cut], axis), self.view(conv.window, axis))
                 for axis, cut in enumerate(cuts) if cut.start != cut.stop or cut.start is None]
        if self.blend == "split":
            y = ops.concatenate(*parts)
        else:
            shares = ops.softmax(self.logits, axis=0) if self.blend == "softmax" else [1 / 3] * 3
            y = sum((part * share for part, share in zip(parts[1:], shares[1:], strict=True)),
                    parts[0] * shares[0])
        return y if conv.bias is None else y + conv.bias

    @staticmethod
    def turned(weight: Tensor, axis: int) -> Tensor:
        """(1, k, k, ...) with the axis of one tap in another place."""
        _, k, _, *channels = weight.shape
        return weight.reshape(*(1 if a == axis else k for a in range(3)), *channels)

    @staticmethod
    def view(window: Window, axis: int) -> Window:
        """The window of a plane across `axis`."""
        k, d = window.kernel[1], window.dilation[0]
        padding = ((k // 2 * d, (k - 1) * d - k // 2 * d), *window.padding[1:])
        return replace(window, kernel=tuple(1 if a == axis else k for a in range(3)),
                       padding=tuple((0, 0) if a == axis else padding[a] for a in range(3)))

    def flat(self, conv: Conv) -> Array:
        raise ValueError("a convolution in three planes has no 2D one that answers alike")


# What makes each of a convolution; None: a kernel of T x k x k or, where that has no slots, of
# 1 x k x k. "planar" gives no kernel slots, "pointwise" the first 1x1 of each bottleneck alone.
STRUCTURES: dict[str, Callable[..., Along] | None] = {
    "full": None, "planar": None, "pointwise": None, "factored": Factored, "depthwise": Depthwise,
    "mixed": Mixed, "shift": Shift, "gate-shift": Gated, "acs": partial(Views, blend="split"),
    "mean-acs": partial(Views, blend="mean"), "soft-acs": partial(Views, blend="softmax"),
}
