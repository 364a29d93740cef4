"""Whole volumes from windows, as a stream along depth: arrays only.

Windows in that order finish rows of logits, and the memory that logits take is a few windows' worth
however long the volume is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, combinations, groupby, product
from math import ceil
from types import ModuleType

import numpy as np

from ..backend import Array, array_module, to_library, to_numpy
from ..data.augment import permutation
from ..data.sampling import pad
from ..module import Module, evaluation
from ..tensor import Tensor
from ..windows.geometry import Box

Progress = Callable[[Iterable], Iterable]
# Of a window, with the next: 14 held-out hippocampi, 3D, predicted with --overlap 0.5 and 0.33, had
# Dice 0.836/0.848 and 0.837/0.846, in 4.3 and 3.2 s a scan; a large scan takes 0.59 of the windows.
OVERLAP = 0.33


def starts(length: int, window: int, overlap: float) -> list[int]:
    """Evenly spread first voxels of windows that cover an axis, `overlap` of a window shared.

    >>> ts.infer.starts(length=10, window=4, overlap=0.5)
    [0, 2, 4, 6]
    """
    stride = max(1, int(window * (1 - overlap) + 1e-9))  # 20 * (1 - 0.8) is 3.999...
    count = ceil((length - window) / stride) + 1
    return [round(i * (length - window) / max(1, count - 1)) for i in range(count)]


def gaussian(size: tuple[int, ...], sigma: float = 1 / 8) -> np.ndarray:
    """Weights (*size) that fall off from a window's centre; sigma in window lengths, as nnU-Net's.

    The least weight is a thousandth of the largest, so that every voxel is divided by something.

    >>> ts.infer.gaussian((5,)).round(2)
    array([0.01, 0.28, 1.  , 0.28, 0.01], dtype=float32)
    """
    weights = np.ones(size, "float32")
    for axis, n in enumerate(size):
        x = (np.arange(n) - (n - 1) / 2) / (sigma * n)
        weights *= np.exp(-x * x / 2).reshape([-1 if a == axis else 1 for a in range(len(size))])
    return np.maximum(weights, weights.max() / 1000)


def slabs(net: Module | Callable, volume: Array, patch: tuple[int, ...], overlap: float = OVERLAP,
          *, batch: int = 1, mirror: Sequence[int] = (), pairs: Sequence[tuple[int, int]] = (),
          progress: Progress = iter) -> Iterator[np.ndarray]:
    """The logits of `sliding_window`, with its arguments, as slabs (d, *S[1:], classes).

    They come in order along the first axis, each as soon as no later window reaches it. Two
    arrays of a window's depth, logits and weights, and the answers to a batch are all that is held
    between them.

    >>> parts = ts.infer.slabs(lambda x: x, np.ones((8, 5, 6, 3)), (4, 5, 6), overlap=0.5)
    >>> [part.shape for part in parts]
    [(2, 5, 6, 3), (2, 5, 6, 3), (4, 5, 6, 3)]
    """
    flat = len(patch) == volume.ndim - 2
    size, rank = (1, *patch) if flat else tuple(patch), volume.ndim - 1
    if len(size) != rank:
        raise ValueError(f"a patch {patch} does not fit a volume of shape {volume.shape} "
                         "(spatial axes and channels)")
    if min(size) < 1 or batch < 1:
        raise ValueError(f"patch is {patch} and batch {batch}; expected at least 1")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; expected 0 <= overlap < 1")
    if not all(-rank <= axis < rank for axis in mirror):
        raise ValueError(f"found axes {tuple(mirror)} to mirror, expected some of {rank} axes")
    axes = sorted({axis % rank + 1 - flat for axis in mirror} - {0})  # of a batch of windows
    flips = [some for count in range(len(axes) + 1) for some in combinations(axes, count)]
    library = np
    if isinstance(net, Module):
        library = next((array_module(p.data) for p in net.parameters()), np)

    padded, inside = pad(to_numpy(volume), size)
    corners = product(*[starts(n, p, overlap) for n, p in zip(padded.shape, size, strict=False)])
    places = [tuple(slice(c, c + p) for c, p in zip(corner, size, strict=True))
              for corner in corners]
    values = [_constant(padded[place]) for place in places]
    weight = gaussian(size)[..., None]
    total, norm = None, np.zeros((size[0], *padded.shape[1:-1], 1), "float32")
    row = 0  # of the volume, where both buffers begin
    known: dict[bytes, np.ndarray] = {}  # the answer to the last constant that was met

    def ask(chosen: list[Box]) -> np.ndarray:
        windows = np.stack([padded[place] for place in chosen]).astype("float32")
        logits = _logits(net, windows[:, 0] if flat else windows, flips, pairs, library)
        return logits[:, None] if flat else logits

    for group in progress(_groups(values, batch)):
        busy = [places[i] for i in group if values[i] is None]
        answers = iter(ask(busy) if busy else ())
        for i in group:
            place, value = places[i], values[i]
            if value is not None and value not in known:
                known = {value: ask([place])[0]}
            answer = next(answers) if value is None else known[value]
            if total is None:
                total = np.zeros((*norm.shape[:-1], answer.shape[-1]), "float32")
            if done := place[0].start - row:
                yield (total[:done] / norm[:done])[inside]
                for buffer in (total, norm):
                    buffer[:-done] = buffer[done:]
                    buffer[-done:] = 0
                row += done
            here = (slice(None), *place[1:])
            total[here] += answer * weight
            norm[here] += weight
    assert total is not None
    yield (total / norm)[inside]  # a volume padded along depth is one slab, so `inside` fits all


def _constant(window: np.ndarray) -> bytes | None:
    """The channels of a window (*P, C) all of whose voxels are alike, as bytes; else None."""
    first = window[(0,) * (window.ndim - 1)]
    return first.tobytes() if all((part == first).all() for part in window) else None


def _groups(values: list[bytes | None], batch: int) -> list[list[int]]:
    """The windows in groups, in order: `batch` that the network must see, and the constant ones
    between them."""
    seen = accumulate(value is None for value in values)
    numbers = [max(0, n - 1) // batch for n in seen]
    return [list(group) for _, group in groupby(range(len(values)), numbers.__getitem__)]


def _logits(net: Module | Callable, windows: np.ndarray, flips: list[tuple[int, ...]],
            pairs: Sequence[tuple[int, int]], library: ModuleType) -> np.ndarray:
    """The mean over flips of the answers (N, *P, classes) to windows (N, *P, C), flipped back;
    where the last spatial axis was, the classes of each pair change places."""
    answers, right = [], windows.ndim - 2
    with evaluation(net):
        for axes in flips:
            seen = to_library(np.ascontiguousarray(np.flip(windows, axes)), library)
            answer = np.flip(to_numpy(net(Tensor(seen)).data), axes)
            if right in axes and pairs:
                answer = answer[..., permutation(answer.shape[-1], pairs)]
            answers.append(answer)
    return np.mean(answers, axis=0)


def sliding_window(net: Module | Callable, volume: Array, patch: tuple[int, ...],
                   overlap: float = OVERLAP, *, batch: int = 1, mirror: Sequence[int] = (),
                   pairs: Sequence[tuple[int, int]] = (), labels: bool = False,
                   progress: Progress = iter) -> np.ndarray:
    """Logits (*S, classes), float32, or labels (*S), uint8 (of over 256 classes uint16), of a
    volume (*S, C).

    Windows of the size `patch` overlap by the fraction `overlap` and are averaged with Gaussian
    weights. A volume smaller than the patch is padded as in training and cut back. With a patch
    of one axis less than the volume the network is one of slices: they are taken along the first
    axis, every one once in depth. `mirror` names spatial axes of the volume: logits are averaged
    over the reflections along every subset of them, 2^n times the work (a network of slices has
    nothing to reflect along the first). `pairs` are classes that are each other's mirror image,
    left and right: what a reflection along the last axis answers for one counts for the other.
    `batch` windows go through the network at a time; what it says of a window that holds one value
    throughout, as of air, is computed once for all of them. `progress` wraps the list of groups of
    windows (tqdm, say). A module is in evaluation mode while it runs, and runs where its parameters
    are; the result is in host memory.

    Raises ValueError where patch or mirror do not fit the volume's rank or overlap is not in
    [0, 1).

    >>> volume = np.arange(7.0).reshape(7, 1)
    >>> ts.infer.sliding_window(lambda x: 2 * x, volume, patch=(3,)).ravel().round(3)
    array([ 0.,  2.,  4.,  6.,  8., 10., 12.], dtype=float32)
    """
    result, row = np.empty(0), 0
    for slab in slabs(net, volume, patch, overlap, batch=batch, mirror=mirror, pairs=pairs,
                      progress=progress):
        if labels:
            slab = slab.argmax(axis=-1).astype(np.min_scalar_type(slab.shape[-1] - 1))
        if row == 0:
            result = np.empty((len(volume), *slab.shape[1:]), slab.dtype)
        result[row : row + len(slab)] = slab
        row += len(slab)
    return result
