"""Whole scans from whole volumes: preparation, networks, the scan's own grid, label numbers.

Rows of logits are interpolated to the scan's grid with one neighbour at hand, as they come, and
become labels at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from math import ceil, prod
from typing import Any, Literal

import numpy as np

from .. import ops, parallel
from ..data.augment import LEFT_RIGHT, numbered
from ..data.ct import Plan, resample, thick_axis
from ..data.nifti import Volume
from ..nn import Module
from ..tensor import Tensor
from .fold import fold
from .postprocess import islands
from .windows import OVERLAP, Progress, slabs

STRIDE = 32  # whole slices are padded to multiples of it where a network does not tell its own
BATCH = 1 << 25  # numbers in the widest map of the windows that go through together, 128 MiB: of
WIDE = 16  # logits, or of a stem, 64 channels at half the size in a plane: 16 numbers a voxel


def resampled(parts: Iterable[np.ndarray], depth: int, shape: Sequence[int],
              order: Sequence[int] = (1, 1, 1)) -> Iterator[np.ndarray]:
    """`resample(concatenate(parts), shape, order)` row by row: (H, W, C) each, to rounding.

    parts (d, H', W', C) have `depth` rows in all; shape is (D, H, W); an order is 0, nearest, or
    1, linear. Both are tensor products, so the plane goes first, and depth needs two rows at hand.

    >>> parts = np.zeros((1, 1, 1, 1)), np.ones((1, 1, 1, 1))
    >>> [row.item() for row in ts.infer.resampled(parts, 2, (4, 1, 1))]
    [0.0, 0.25, 0.75, 1.0]
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


def segment(nets: Module | Sequence[Module], scan: Volume, *, each: bool = False,
            largest: bool = False, smallest: float = 0, probabilities: bool = False,
            **options: Any) -> np.ndarray:
    """The label map (D, H, W) of a scan on its own grid, by one network or several.

    It holds the numbers that the training files had (`numbers`), in the smallest unsigned type.
    With `probabilities` the result is (D, H, W, classes) float32, a class for each of `numbers`.
    With `each`, of n networks, it is n + 1 of them, (n + 1, D, H, W, ...): what every one says
    alone, and last what all say together, in the time of that. `largest` and `smallest`, in ml, are
    those of `islands`, of label maps alone. The options plan, patch, overlap, mirror and progress,
    and what is refused, are those of `rows`.

    >>> folder = ts.data.phantom.write("task", cases=1, shape=(4, 24, 32))
    >>> scan, _ = ts.data.decathlon.load(folder).cases[0].read()
    >>> net = ts.models.resnet_seg(rank=2, in_channels=1, classes=3, width=4)
    >>> plan = ts.data.ct.Plan(spacing=(5, 2, 2))
    >>> labels = ts.infer.segment(net, scan, plan=plan, patch=(16, 24))
    >>> labels.shape, labels.dtype
    ((4, 24, 32), dtype('uint8'))
    """
    if probabilities and (largest or smallest):
        raise ValueError("found largest or smallest with probabilities, expected them without; they"
                         " clean label maps")
    nets = _several(nets)
    found, stream = _voices(nets, scan, each=each,
                            soft=probabilities or each or len(nets) > 1, **options)
    shape, count = scan.array.shape[:3], len(nets) + 1 if each else 1
    result = (np.empty((count, *shape, len(found)), "float32") if probabilities else
              np.empty((count, *shape), np.min_scalar_type(max(found))))
    for d, voices in zip(range(shape[0]), stream, strict=True):
        for one, row in zip(result, voices, strict=True):
            one[d] = row if probabilities else np.array(found)[row.argmax(axis=-1)]
    for one in result if largest or smallest else ():
        one[...] = islands(one, largest=largest, smallest=smallest * 1000 / prod(scan.spacing))
    return result if each else result[0]


def rows(nets: Module | Sequence[Module], scan: Volume, *, plan: Plan | None = None,
         patch: Sequence[int] | Literal["whole"] | None = None, overlap: float = OVERLAP,
         mirror: Sequence[int] = (), probabilities: bool = True, progress: Progress = iter
         ) -> tuple[list[int], Iterator[np.ndarray]]:
    """The label numbers, and what their voxels get on the scan's own grid, (H, W, numbers) float32
    for each of its D rows: memory does not grow with the scan.

    They are probabilities, or of one network asked without, its logits. Preparation is that each
    network was trained with (`net.metadata`), or `plan`; a network on its own needs no more than a
    `config` with rank, classes and in_channels. It sees windows of the size that it was trained
    with, or of the size `patch` (D, H, W), of which a network of slices takes the last two; "whole"
    shows it each slice in one piece. That is faster, and for networks trained on as much: one of
    patches of 40 x 40 fell from a Dice of 0.32 to 0.13 on slices of 60-70 x 44-140.

    Logits are interpolated to the scan's grid before anything is decided. Of several networks the
    softmax is averaged there, not the logits: those of networks trained apart have no common scale,
    and the one that boasts most would decide alone. `mirror`, `overlap` and `progress` are those of
    `sliding_window`; which classes are left and right of each other stands in the plan. Networks
    run as they are at the call, in evaluation (`fold`).

    Raises ValueError where networks differ in classes, do not fit the scan's channels, have neither
    a plan nor a patch, or are asked for the left-right reflection that their training left out.
    """
    nets = _several(nets)
    found, voices = _voices(nets, scan, plan=plan, patch=patch, overlap=overlap, mirror=mirror,
                            soft=probabilities or len(nets) > 1, progress=progress)
    return found, (row for row, in voices)


def _several(nets: Module | Sequence[Module]) -> list[Module]:
    return [nets] if isinstance(nets, Module) else list(nets)


def _voices(nets: Sequence[Module], scan: Volume, *, plan: Plan | None = None,
            patch: Sequence[int] | Literal["whole"] | None = None, overlap: float = OVERLAP,
            mirror: Sequence[int] = (), progress: Progress = iter, soft: bool, each: bool = False
            ) -> tuple[list[int], Iterator[list[np.ndarray]]]:
    """`rows` in lists of one: the logits of the only network, if not `soft`; and with `each` behind
    what every network says alone."""
    shape, channels = scan.array.shape[:3], (*scan.array.shape, 1)[3]
    for net in nets:
        if not {"rank", "classes", "in_channels"} <= getattr(net, "config", {}).keys():
            raise ValueError(f"found a {type(net).__name__} that says nothing of itself, expected"
                             " net.config with its rank, classes and in_channels")
    if len({net.config["classes"] for net in nets}) != 1:
        raise ValueError(f"found networks of {[net.config['classes'] for net in nets]} classes,"
                         " expected one or more that agree")
    if wrong := {net.config["in_channels"] for net in nets} - {channels}:
        raise ValueError(f"{scan.path}: found {channels} channels, expected {wrong.pop()}, with"
                         " which the network was trained")
    if len({tuple(numbers(net).items()) for net in nets}) != 1:
        raise ValueError(f"found networks of the labels {[list(numbers(net)) for net in nets]},"
                         " expected one or more that agree")
    plans = [plan or _planned(net) for net in nets]
    if any(p.mirror is None for p in plans) and LEFT_RIGHT % 3 in [axis % 3 for axis in mirror]:
        raise ValueError("the network was trained without left-right reflections, and cannot"
                         " answer them; predict without mirror")
    parallel.release()  # what the scan before has held
    # In float16, as training stored and saw it.
    images = {plan: plan.prepare(scan).astype("float16") for plan in set(plans)}

    def stream(net: Module, plan: Plan) -> Iterator[np.ndarray]:
        image, told = images[plan], _metadata(net).get("labels", {})
        names = [""] * net.config["classes"]
        for number, c in numbers(net).items():
            names[c] = told.get(str(number), "")
        size = _window(net, patch, image.shape[:3])
        parts = slabs(fold(net), image, size, overlap, mirror=mirror, progress=progress,
                      pairs=numbered(plan.mirror or (), names) if mirror else (),
                      batch=max(1, BATCH // (prod(size) * max(WIDE, net.config["classes"]))))
        thick = None if plan.blend_slices else thick_axis(plan.spacing, scan.spacing)
        return resampled(parts, len(image), shape, [int(a != thick) for a in range(3)])

    found, classes = numbers(nets[0]), list(numbers(nets[0]).values())
    streams = [stream(*each) for each in zip(nets, plans, strict=True)]

    def voices() -> Iterator[list[np.ndarray]]:
        for logits in zip(*streams, strict=True):
            if not soft:
                yield [logits[0][..., classes]]
                continue
            shares = [ops.softmax(Tensor(one)).data[..., classes] for one in logits]
            yield [row / row.sum(axis=-1, keepdims=True)  # some classes may have no number
                   for row in (*shares * each, sum(shares))]

    return list(found), voices()


def _metadata(net: Module) -> dict:
    return getattr(net, "metadata", {})


def _planned(net: Module) -> Plan:
    """The plan that a network was trained with."""
    if "plan" not in _metadata(net):
        raise ValueError(f"found a {type(net).__name__} without a plan in its metadata, expected"
                         " plan=, how scans are prepared for it")
    return Plan(**net.metadata["plan"])


def _window(net: Module, patch: Sequence[int] | str | None, size: tuple[int, ...]
            ) -> tuple[int, ...]:
    """How much of a volume (D, H, W) a network sees at a time; see `rows`."""
    rank = net.config["rank"]
    if patch == "whole" and rank == 2:
        stride = net.config.get("output_stride") or STRIDE
        return tuple(ceil(n / stride) * stride for n in size[1:])
    patch = _metadata(net).get("patch") if patch is None else patch
    if patch is None or patch == "whole":
        raise ValueError(f"found a {type(net).__name__} of rank {rank} and patch {patch}, expected"
                         " patch=(D, H, W), the size of the windows it was trained with")
    return tuple(patch[-rank:])


def numbers(net: Module) -> dict[int, int]:
    """{label number in files: class of the network}: class c stands for the c-th number.

    Of a network that has more classes than numbers, as those with gaps between the numbers had
    before numbers were mapped, a class is its number, and those without a name are never answered.
    ValueError where neither fits.

    >>> net = ts.models.resnet_seg(rank=2, in_channels=1, classes=3, width=4)
    >>> net.metadata = {"labels": {"0": "background", "63": "liver", "252": "spleen"}}
    >>> ts.infer.numbers(net)
    {0: 0, 63: 1, 252: 2}
    """
    classes = net.config["classes"]
    known = sorted(map(int, _metadata(net).get("labels", {}))) or list(range(classes))
    if len(known) == classes:
        return {number: c for c, number in enumerate(known)}
    if max(known) >= classes:
        raise ValueError(f"found a network of {classes} classes with the labels {known}, expected"
                         " as many; it was saved with the labels of another")
    return {number: number for number in known}
