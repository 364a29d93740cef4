"""Naive loops over the definitions, in plain Python and float64.

Nothing here calls the library. A grid is described by `size`, a window by `kernel`, `stride`,
`padding` ((before, after) pairs), `dilation` and `edge` (booleans), one entry per spatial axis
each.
"""

import math
from itertools import product

import numpy as np


def positions(size, kernel, stride, padding, dilation, edge=None):
    """How many windows fit, counted one by one: the last tap must stand on the padded grid."""
    counts = []
    for n, k, s, (before, after), d in zip(size, kernel, stride, padding, dilation, strict=True):
        count = 0
        while count * s + (k - 1) * d - before <= n - 1 + after:
            count += 1
        counts.append(count)
    return tuple(counts)


def visits(size, kernel, stride, padding, dilation, edge):
    """(window, tap, grid point) for every window and tap; None for a point in zero padding."""
    for p in np.ndindex(*positions(size, kernel, stride, padding, dilation)):
        for k in np.ndindex(*kernel):
            point = []
            for axis, n in enumerate(size):
                i = p[axis] * stride[axis] + k[axis] * dilation[axis] - padding[axis][0]
                if edge[axis]:
                    i = min(max(i, 0), n - 1)
                point.append(i)
            inside = all(0 <= i < n for i, n in zip(point, size, strict=True))
            yield p, k, tuple(point) if inside else None


def _terms(batch, c_in, c_out, size, window):
    for p, k, s in visits(size, **window):
        if s is not None:
            for n, c, o in product(range(batch), range(c_in), range(c_out)):
                yield (n, *p, o), (n, *s, c), (*k, c, o)


def correlate(x, w, **window):
    """y[n, p, o] = sum over taps k and channels c of x[n, point(p, k), c] w[k, c, o]."""
    size = x.shape[1:-1]
    y = np.zeros((len(x), *positions(size, **window), w.shape[-1]))
    for at, seen, tap in _terms(len(x), *w.shape[-2:], size, window):
        y[at] += x[seen] * w[tap]
    return y


def correlate_dx(y, w, size, **window):
    """The gradient of <correlate(x, w), y> in x, term by term."""
    dx = np.zeros((len(y), *size, w.shape[-2]))
    for at, seen, tap in _terms(len(y), *w.shape[-2:], size, window):
        dx[seen] += y[at] * w[tap]
    return dx


def correlate_dw(x, y, **window):
    """The gradient of <correlate(x, w), y> in w, term by term."""
    dw = np.zeros((*window["kernel"], x.shape[-1], y.shape[-1]))
    for at, seen, tap in _terms(len(x), *dw.shape[-2:], x.shape[1:-1], window):
        dw[tap] += y[at] * x[seen]
    return dw


def max_pool(x, g=None, **window):
    """(y, tap, dx): the largest number of each window, the number of the first tap that holds it,
    and where `g` goes. Zero padding is minus infinity, and what it wins is lost."""
    size, channels = x.shape[1:-1], x.shape[-1]
    y = np.full((len(x), *positions(size, **window), channels), -math.inf)
    tap, dx, point = np.zeros(y.shape, int), np.zeros(x.shape), {}
    for p, k, s in visits(size, **window):
        number = int(np.ravel_multi_index(k, window["kernel"]))
        for n, c in product(range(len(x)), range(channels)):
            at = (n, *p, c)
            value = -math.inf if s is None else x[(n, *s, c)]
            if number == 0 or value > y[at]:
                y[at], tap[at], point[at] = value, number, s and (n, *s, c)
    for at, seen in point.items():
        if g is not None and seen is not None:
            dx[seen] += g[at]
    return y, tap, dx


def upsample(x, size, align_corners):
    """Linear interpolation, output point by output point, corner by corner."""
    def reads(i, n, m):
        if align_corners:
            at = i * (n - 1) / (m - 1) if m > 1 else 0.0
        else:
            at = min(max((i + 0.5) * n / m - 0.5, 0.0), n - 1.0)
        low = min(math.floor(at), n - 1)
        return (low, 1 - (at - low)), (min(low + 1, n - 1), at - low)

    y = np.zeros((len(x), *size, x.shape[-1]))
    for p in np.ndindex(*size):
        axes = [reads(i, n, m) for i, n, m in zip(p, x.shape[1:-1], size, strict=True)]
        for corner in product(*axes):
            share = math.prod(weight for _, weight in corner)
            y[(slice(None), *p)] += share * x[(slice(None), *(i for i, _ in corner))]
    return y


def normalise(values, eps):
    """(values standardised, mean, biased variance) of a list of numbers."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
    return [(v - mean) / math.sqrt(variance + eps) for v in values], mean, variance


def batch_norm(x, gamma, beta, eps):
    """(y, mean, biased variance) with the statistics of `x`, channel by channel."""
    y, mean, variance = np.zeros(x.shape), np.zeros(len(gamma)), np.zeros(len(gamma))
    for c in range(len(gamma)):
        xhat, mean[c], variance[c] = normalise(x[..., c].ravel().tolist(), eps)
        y[..., c] = gamma[c] * np.reshape(xhat, x.shape[:-1]) + beta[c]
    return y, mean, variance


def group_norm(x, gamma, beta, groups, eps):
    """Sample by sample and group by group."""
    y, width = np.zeros(x.shape), x.shape[-1] // groups
    for n, first in product(range(len(x)), range(0, x.shape[-1], width)):
        part = (n, ..., slice(first, first + width))
        y[part] = np.reshape(normalise(x[part].ravel().tolist(), eps)[0], x[part].shape)
    return y * gamma + beta


def softmax(row):
    """exp(row_c) / sum of exp(row) of a list of numbers."""
    powers = [math.exp(v - max(row)) for v in row]
    return [e / math.fsum(powers) for e in powers]


def _voxels(logits, labels, ignore):
    for at in np.ndindex(*labels.shape):
        if ignore is None or labels[at] != ignore:
            yield logits[at].tolist(), int(labels[at])


def cross_entropy(logits, labels, ignore=None, weight=None):
    """The weighted mean of -log softmax over the voxels that count; 0 where none does."""
    above, below = [], []
    for row, label in _voxels(logits, labels, ignore):
        w = 1.0 if weight is None else float(weight[label])
        log_sum = max(row) + math.log(math.fsum(math.exp(v - max(row)) for v in row))
        above.append(w * (log_sum - row[label]))
        below.append(w)
    return math.fsum(above) / math.fsum(below) if below else 0.0


def dice(logits, labels, ignore=None, smooth=1e-5, background=False):
    """1 - mean over classes of (2 sum pt + smooth) / (sum p + sum t + smooth)."""
    scores = []
    for c in range(0 if background else 1, logits.shape[-1]):
        both = either = 0.0
        for row, label in _voxels(logits, labels, ignore):
            p, t = softmax(row)[c], float(label == c)
            both, either = both + p * t, either + p + t
        scores.append((2 * both + smooth) / (either + smooth))
    return 1 - math.fsum(scores) / len(scores)
