"""Whole volumes from windows of the training patch size, and whole scans from whole volumes.

Everything runs as a stream along depth: windows in that order finish rows of logits, rows are
interpolated to the scan's grid with one neighbour at hand, and become labels at once. So the
memory that logits take is a few windows' worth, however long the scan is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, combinations, pairwise, product
from math import ceil, prod
from types import ModuleType

import numpy as np

from . import ops
from .backend import Array, array_module, to_library, to_numpy
from .data.augment import LEFT_RIGHT, numbered, permutation
from .data.ct import Plan, resample, thick_axis
from .data.nifti import Volume
from .data.sampling import pad
from .nn import Module
from .tensor import Tensor, no_grad

Progress = Callable[[Iterable], Iterable]


def starts(length: int, window: int, overlap: float) -> list[int]:
    """Evenly spread first voxels of windows that cover an axis, `overlap` of a window shared."""
    stride = max(1, int(window * (1 - overlap) + 1e-9))  # 20 * (1 - 0.8) is 3.999...
    count = ceil((length - window) / stride) + 1
    return [round(i * (length - window) / max(1, count - 1)) for i in range(count)]


def gaussian(size: tuple[int, ...], sigma: float = 1 / 8) -> np.ndarray:
    """Weights (*size) that fall off from a window's centre; sigma in window lengths, as nnU-Net's.

    The least weight is a thousandth of the largest, so that every voxel is divided by something.
    """
    weights = np.ones(size, "float32")
    for axis, n in enumerate(size):
        x = (np.arange(n) - (n - 1) / 2) / (sigma * n)
        weights *= np.exp(-x * x / 2).reshape([-1 if a == axis else 1 for a in range(len(size))])
    return np.maximum(weights, weights.max() / 1000)


def slabs(net: Module | Callable, volume: Array, patch: tuple[int, ...], overlap: float = 0.5, *,
          batch: int = 1, mirror: Sequence[int] = (), pairs: Sequence[tuple[int, int]] = (),
          progress: Progress = iter) -> Iterator[np.ndarray]:
    """The logits of `sliding_window`, with its arguments, as slabs (d, *S[1:], classes).

    They come in order along the first axis, each as soon as no later window reaches it. Two
    arrays of a window's depth, logits and weights, are all that is held between them.
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
    corners = list(product(*[starts(n, p, overlap)
                             for n, p in zip(padded.shape, size, strict=False)]))
    weight = gaussian(size)[..., None]
    total, norm = None, np.zeros((size[0], *padded.shape[1:-1], 1), "float32")
    row = 0  # of the volume, where both buffers begin
    for group in progress([corners[i : i + batch] for i in range(0, len(corners), batch)]):
        places = [tuple(slice(c, c + p) for c, p in zip(corner, size, strict=True))
                  for corner in group]
        windows = np.stack([padded[place] for place in places]).astype("float32")
        logits = _logits(net, windows[:, 0] if flat else windows, flips, pairs, library)
        logits = logits[:, None] if flat else logits
        if total is None:
            total = np.zeros((*norm.shape[:-1], logits.shape[-1]), "float32")
        for place, answer in zip(places, logits, strict=True):
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


def _logits(net: Module | Callable, windows: np.ndarray, flips: list[tuple[int, ...]],
            pairs: Sequence[tuple[int, int]], library: ModuleType) -> np.ndarray:
    """The mean over flips of the answers (N, *P, classes) to windows (N, *P, C), flipped back;
    where the last spatial axis was, the classes of each pair change places."""
    answers, right = [], windows.ndim - 2
    with _evaluation(net):
        for axes in flips:
            seen = to_library(np.ascontiguousarray(np.flip(windows, axes)), library)
            answer = np.flip(to_numpy(net(Tensor(seen)).data), axes)
            if right in axes and pairs:
                answer = answer[..., permutation(answer.shape[-1], pairs)]
            answers.append(answer)
    return np.mean(answers, axis=0)


@contextmanager
def _evaluation(net: Module | Callable) -> Iterator[None]:
    """Evaluation mode and nothing recorded, and then everything as it was."""
    modules = net.modules() if isinstance(net, Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def sliding_window(net: Module | Callable, volume: Array, patch: tuple[int, ...],
                   overlap: float = 0.5, *, batch: int = 1, mirror: Sequence[int] = (),
                   pairs: Sequence[tuple[int, int]] = (), labels: bool = False,
                   progress: Progress = iter) -> np.ndarray:
    """Logits (*S, classes), float32, or labels (*S), uint8, of a volume (*S, C).

    Windows of the size `patch` overlap by the fraction `overlap` and are averaged with Gaussian
    weights. A volume smaller than the patch is padded as in training and cut back. With a patch
    of one axis less than the volume the network is one of slices: they are taken along the first
    axis, every one once in depth. `mirror` names spatial axes of the volume: logits are averaged
    over the reflections along every subset of them, 2^n times the work (a network of slices has
    nothing to reflect along the first). `pairs` are classes that are each other's mirror image,
    left and right: what a reflection along the last axis answers for one counts for the other.
    `batch` windows go through the network at a time; `progress` wraps the list of such groups
    (tqdm, say). A module is in evaluation mode while it runs, and runs where its parameters are;
    the result is in host memory.

    Raises ValueError where patch or mirror do not fit the volume's rank or overlap is not in
    [0, 1).
    """
    result, row = np.empty(0), 0
    for slab in slabs(net, volume, patch, overlap, batch=batch, mirror=mirror, pairs=pairs,
                      progress=progress):
        slab = slab.argmax(axis=-1).astype("uint8") if labels else slab
        if row == 0:
            result = np.empty((len(volume), *slab.shape[1:]), slab.dtype)
        result[row : row + len(slab)] = slab
        row += len(slab)
    return result


def resampled(parts: Iterable[np.ndarray], depth: int, shape: Sequence[int],
              order: Sequence[int] = (1, 1, 1)) -> Iterator[np.ndarray]:
    """`resample(concatenate(parts), shape, order)` row by row: (H, W, C) each, to rounding.

    parts (d, H', W', C) have `depth` rows in all; shape is (D, H, W); an order is 0, nearest, or
    1, linear. Both are tensor products, so the plane goes first, and depth needs two rows at hand.
    """
    rows = (resample(row, tuple(shape[1:]), order[1:]) for part in parts for row in part)
    pairs = enumerate(pairwise(chain(rows, [np.zeros(1, "float32")])))  # its share is zero
    middles = (2 * np.arange(shape[0]) + 1) * depth  # in units of 1 / (2 D) voxels of the parts
    places = np.clip(middles / (2 * shape[0]) - 0.5, 0, depth - 1) if order[0] \
        else middles // (2 * shape[0])
    index = -1
    for x in places.tolist():
        while index < int(x):
            index, (below, above) = next(pairs)
        yield below + (x - index) * (above - below)


def segment(nets: Module | Sequence[Module], scan: Volume, *, overlap: float = 0.5,
            mirror: Sequence[int] = (), largest: bool = False, smallest: float = 0,
            progress: Progress = iter) -> np.ndarray:
    """The label map (D, H, W) of a scan on its own grid, by networks that `load` returned.

    It holds the numbers that the training files had (`numbers`), in the smallest unsigned type.
    Preparation and patch are those each network was trained with (`net.metadata`); its logits are
    interpolated to the scan's grid before the largest is taken. Of several networks the softmax
    is averaged there, not the logits: those of networks trained apart have no common scale, and
    the one that boasts most would decide alone. `mirror`, `overlap` and `progress` are those of
    `sliding_window`; which classes are left and right of each other stands in the plan. `largest`
    and `smallest`, in ml, are those of `islands`.

    Raises ValueError where networks differ in classes, do not fit the scan's channels, or are asked
    for the left-right reflection that their training left out.
    """
    nets = [nets] if isinstance(nets, Module) else list(nets)
    shape, channels = scan.array.shape[:3], (*scan.array.shape, 1)[3]
    if len({net.config["classes"] for net in nets}) != 1:
        raise ValueError(f"found networks of {[net.config['classes'] for net in nets]} classes,"
                         " expected one or more that agree")
    if wrong := {net.config["in_channels"] for net in nets} - {channels}:
        raise ValueError(f"{scan.path}: found {channels} channels, expected {wrong.pop()}, with"
                         " which the network was trained")
    if len({tuple(numbers(net).items()) for net in nets}) != 1:
        raise ValueError(f"found networks of the labels {[list(numbers(net)) for net in nets]},"
                         " expected one or more that agree")
    images: dict[Plan, np.ndarray] = {}

    def stream(net: Module) -> Iterator[np.ndarray]:
        plan, patch = Plan(**net.metadata["plan"]), net.metadata["patch"][-net.config["rank"] :]
        if plan.mirror is None and LEFT_RIGHT % 3 in [axis % 3 for axis in mirror]:
            raise ValueError("the network was trained without left-right reflections, and cannot"
                             " answer them; predict without mirror")
        if plan not in images:  # in float16, as training stored and saw it
            images[plan] = plan.prepare(scan).astype("float16")
        names = list(net.metadata.get("labels", {}).values())
        parts = slabs(net, images[plan], tuple(patch), overlap, mirror=mirror, progress=progress,
                      pairs=numbered(plan.mirror or (), names), batch=1 if len(patch) == 3 else 8)
        thick = None if plan.blend_slices else thick_axis(plan.spacing, scan.spacing)
        return resampled(parts, len(images[plan]), shape, [int(a != thick) for a in range(3)])

    found, classes = map(np.array, zip(*numbers(nets[0]).items(), strict=True))
    streams = [stream(net) for net in nets]
    labels = np.empty(shape, np.min_scalar_type(found.max()))
    images.clear()  # each stream keeps its own, while it lasts
    for row, votes in zip(labels, zip(*streams, strict=True), strict=True):
        shares = [ops.softmax(Tensor(vote)).data for vote in votes] if len(nets) > 1 else votes
        row[...] = found[sum(shares)[..., classes].argmax(axis=-1)]
    return islands(labels, largest=largest, smallest=smallest * 1000 / prod(scan.spacing))


def numbers(net: Module) -> dict[int, int]:
    """{label number in files: class of the network}: class c stands for the c-th number.

    Of a network that has more classes than numbers, as those with gaps between the numbers had
    before numbers were mapped, a class is its number, and those without a name are never answered.
    ValueError where neither fits.
    """
    classes = net.config["classes"]
    known = sorted(map(int, net.metadata.get("labels", {}))) or list(range(classes))
    if len(known) == classes:
        return {number: c for c, number in enumerate(known)}
    if max(known) >= classes:
        raise ValueError(f"found a network of {classes} classes with the labels {known}, expected"
                         " as many; it was saved with the labels of another")
    return {number: number for number in known}


def islands(labels: np.ndarray, *, largest: bool = False, smallest: float = 0) -> np.ndarray:
    """A label map, (H, W) or (D, H, W), in which the islands not asked for became background.

    An island is a connected component of one class; voxels that share a face, an edge or a corner
    are connected (26 neighbours in 3D, as in nnU-Net). `smallest` keeps those of at least so many
    voxels, `largest` the largest of each class only, the first among equals.
    """
    if not largest and smallest <= 1:
        return labels
    from scipy.ndimage import find_objects, label  # takes longer than all of tinyseg to import

    result = labels.copy()
    for number, box in enumerate(find_objects(labels), 1):
        if box is None:
            continue
        part = result[box]
        found, count = label(part == number, np.ones((3,) * labels.ndim))
        # Row by row: NumPy widens whole index arrays to 8 bytes a voxel.
        sizes = np.zeros(count + 1, int)
        for ids in found:
            sizes += np.bincount(ids.ravel(), minlength=count + 1)
        keep = sizes >= smallest
        if largest:
            keep &= np.arange(count + 1) == 1 + sizes[1:].argmax()
        keep[0] = True  # other classes and the background
        for row, ids in zip(part, found, strict=True):
            row[~keep[ids]] = 0
    return result
