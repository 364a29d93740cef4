"""What the job decides before it trains, in one small file, plan.json, that anyone may edit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import ceil, isfinite, prod
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from .. import cuda, infer, losses, models, optim, train
from ..data import ct
from ..files import read_json, whole
from ..infer.windows import OVERLAP, Progress
from ..nn import to_device
from . import rules
from .fingerprint import Fingerprint
from .settings import BACKBONE, HEAD, starved

VOXELS = {"cpu": 2**18, "cuda": 2**21}  # of a patch of a volume, at most
FIXED = 2**30  # bytes that training takes for weights, gradients, moments and libraries
PER_VOXEL = 1_000  # and for a voxel of a batch: twice what tracemalloc tells of ResNet-18's U-Net
LEAST = 32**3  # voxels of a patch of a volume: the deepest layer of a U-Net keeps one of these
BATCH = 2  # volumes a step: batch-norm needs two, and context counts for more than a third; one,
# of as many voxels as two, where that is a whole case (rules.patch_of_cases)
SLICES = 16  # slices a step, at most
STEPS = 400  # of each stage, where no time is given
SHARE_2D = 0.6  # of the time is the 2D network's: a minute of slices teaches more than of volumes,
MOST_2D = 3000  # in so many steps at most: then it learns little, and the inflated one goes on
REPEATS = 4  # steps that are timed; on a GPU all but two are launched as a whole


def _whole(least: int, most: float = float("inf")) -> Any:
    return lambda n: type(n) is int and least <= n <= most


def _each(right: Any, *counts: int) -> Any:
    return lambda value: (isinstance(value, tuple) and len(value) in counts
                          and all(map(right, value)))


RIGHT = {  # what a field may hold: (whether a value is right, how that is said)
    "preprocessing": (lambda x: isinstance(x, ct.Plan), "a preparation of scans"),
    "head": (lambda x: x in list(models.HEADS), f"one of {', '.join(models.HEADS)}"),
    "decoder": (_each(_whole(1), *range(6)), "up to five numbers of channels"),
    "backbone": (lambda x: x in list(models.BACKBONES), f"one of {', '.join(models.BACKBONES)}"),
    "depth": (_each(_whole(1), 5), "five numbers of slots: of the stem and of layers 1 to 4"),
    "depth_stride": (_each(_whole(1, 2), 3, 5), "1 or 2 for each halving of the trunk"),
    "patch_2d": (_each(_whole(1), 2), "two positive numbers of voxels"),
    "patch_3d": (_each(_whole(1), 3), "three positive numbers of voxels"),
    "batch_2d": (_whole(1), "a positive number of slices"),
    "batch_3d": (_whole(1), "a positive number of volumes"),
    "steps_2d": (_whole(0), "a number of steps"),
    "steps_3d": (_whole(0), "a number of steps"),
    "augmentation": (lambda x: isinstance(x, str) and x != "", "the name of a preset"),
    "seconds": (lambda x: isinstance(x, dict) and all(
        isinstance(k, str) and type(s) in (int, float) and isfinite(s) and s >= 0
        for k, s in x.items()), "names with the seconds that each takes"),
}


@dataclass(frozen=True)
class Plan:
    """How a task is trained; made by `propose`, or read from a file.

    preprocessing: how scans become arrays. backbone, head, decoder: the networks; depth and
    depth_stride: what the inflated one does along depth, slots of the stem and of layers 1 to 4,
    and a stride for each halving. Patches (H, W) and (D, H, W) are in voxels of the preprocessing's
    spacing. augmentation: the name of a preset. seconds: measured, of a training step ("step_2d",
    "step_3d") and of predicting the median scan ("scan_2d", "scan_3d"); may be empty.

    ValueError, naming the field, for what is impossible.
    """

    preprocessing: ct.Plan
    head: str
    decoder: tuple[int, ...]
    backbone: str
    depth: tuple[int, ...]
    depth_stride: tuple[int, ...]
    patch_2d: tuple[int, int]
    patch_3d: tuple[int, int, int]
    batch_2d: int
    batch_3d: int
    steps_2d: int
    steps_3d: int
    augmentation: str
    seconds: dict[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, (right, expected) in RIGHT.items():
            value = getattr(self, name)
            if isinstance(value, list):  # as JSON has a tuple
                object.__setattr__(self, name, value := tuple(value))
            if not right(value):
                raise ValueError(f"found {name} {value!r}, expected {expected}")
        unet = self.head == "unet"
        if bool(self.decoder) != unet or len(self.depth_stride) != (5 if unet else 3):
            raise ValueError(
                f"found head {self.head}, decoder {self.decoder} and depth_stride"
                f" {self.depth_stride}, expected a decoder and five strides for unet, none and"
                " three for the others")

    @property
    def architecture(self) -> dict[str, Any]:
        """The arguments of `models.resnet_seg` that a network of either rank takes."""
        return {"backbone": self.backbone, "head": self.head} | (
            {"decoder": self.decoder} if self.decoder else {})

    @property
    def strides(self) -> tuple[int, int, int]:
        """Voxels of a patch for each of the coarsest features, along (D, H, W)."""
        plane = 2 ** len(self.depth_stride)
        return prod(self.depth_stride), plane, plane

    @property
    def inflation(self) -> dict[str, Any]:
        """The arguments of `inflate`, and of `models.resnet_seg` at rank 3, about depth."""
        return {"depth": self.depth, "depth_stride": self.depth_stride}

    def __str__(self) -> str:
        one = self.preprocessing
        rules = [f"clipped to [{clip[0]:g}, {clip[1]:g}], less {mean:.4g}, over {std:.4g}" if clip
                 else "less the mean of its scan, over the deviation"
                 for clip, mean, std in one.rules(1)]
        return "\n".join(f"{name:14}{told}" for name, told in {
            "spacing": ct.mm(one.spacing),
            "intensities": "; ".join(rules),
            "mirror": "nothing is mirrored" if one.mirror is None else "left-right" + "".join(
                f"; {a} and {b} change places" for a, b in one.mirror),
            "augmentation": self.augmentation,
            "network": f"{self.backbone}, {self.head} {' '.join(map(str, self.decoder))}",
            "along depth": f"strides {' '.join(map(str, self.depth_stride))} of stem, pool, layer2"
                           f" on; slots {' '.join(map(str, self.depth))} of stem, layer1 on",
            "2D": f"{self.steps_2d} steps of {self.batch_2d} slices of"
                  f" {' x '.join(map(str, self.patch_2d))} voxels"
                  + self._told(self.steps_2d, "2d"),
            "3D": f"{self.steps_3d} steps of {self.batch_3d} volumes of"
                  f" {' x '.join(map(str, self.patch_3d))} voxels"
                  f" ({ct.mm(np.multiply(self.patch_3d, one.spacing))})"
                  + self._told(self.steps_3d, "3d"),
        }.items())

    def _told(self, steps: int, stage: str) -> str:
        if not {f"step_{stage}", f"scan_{stage}"} <= self.seconds.keys():
            return ""
        step, scan = self.seconds[f"step_{stage}"], self.seconds[f"scan_{stage}"]
        return (f": {steps * step / 60:.3g} minutes at {step:.3g} s; the median scan is predicted"
                f" in {scan:.3g} s")

    def write(self, path: str | Path) -> None:
        """The plan as a JSON file with a line for each entry, whole or not at all."""
        with whole(Path(path)) as draft:
            draft.write_text(_text(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """The plan that `write` wrote, or someone edited.

        ValueError, naming the file and the entry, where one is missing, unknown or impossible.
        """
        content = read_json(path)
        try:
            _expect(cls, content, "")
            _expect(ct.Plan, told := content["preprocessing"], "preprocessing.")
            for name in ("spacing", "clip", "mean", "std"):
                if not _numbers(told[name]):
                    raise ValueError(f"found preprocessing.{name} {told[name]!r}, expected numbers")
            return cls(**content | {"preprocessing": ct.Plan(**told)})
        except (ArithmeticError, TypeError, ValueError) as fault:
            raise ValueError(f"{path}: {fault}; mend it, or make another with `tinyseg plan`"
                             ) from None


def _text(content: Any, indent: str = "\n ") -> str:
    if not isinstance(content, dict) or not content:
        return json.dumps(content, ensure_ascii=False, allow_nan=False)
    lines = [f"{json.dumps(name, ensure_ascii=False)}: {_text(value, indent + ' ')}"
             for name, value in content.items()]
    return f"{{{indent}{f',{indent}'.join(lines)}{indent[:-1]}}}"


def _expect(kind: Any, content: Any, prefix: str) -> None:
    """ValueError unless `content` has the fields of a dataclass and no others."""
    if not isinstance(content, dict):
        raise ValueError(f"found {prefix.rstrip('.')} {content!r}, expected an object")
    names = [each.name for each in fields(kind)]
    for told, wrong in (("no", [n for n in names if n not in content]),
                        ("the unknown", [n for n in content if n not in names])):
        if wrong:
            raise ValueError(f"found {told} {', '.join(prefix + name for name in wrong)}")


def _numbers(value: Any) -> bool:
    return (all(map(_numbers, value)) if isinstance(value, list)
            else value is None or type(value) in (int, float))


def propose(fingerprint: Fingerprint, *, spacing: Sequence[float] | None = None,
            patch: Sequence[int] | None = None, memory: float | None = None, device: str = "cpu",
            backbone: str = BACKBONE, head: str = HEAD, apart: bool = True) -> Plan:
    """The plan for the cases of a fingerprint, with STEPS of each stage; spacing (mm) and patch
    (D, H, W) by rule, or given. apart: whether inflation keeps slices apart at first, which decides
    how early kernels see others than their own (`rules.slots`).

    memory: GiB that training may take; a step's patches are of BATCH * VOXELS[device] together at
    most. Errors are those of `ct.Plan.fit`, and ValueError for too little memory.
    """
    voxels = VOXELS[device]
    if memory is not None:
        voxels = min(voxels, int((memory * 2**30 - FIXED) / (BATCH * PER_VOXEL)))
        if voxels < LEAST:
            raise ValueError(f"found {memory:g} GiB of memory, expected"
                             f" {(FIXED + BATCH * PER_VOXEL * LEAST) / 2**30:.3g} at least")
    if spacing is None:
        spacing = rules.working_spacing(fingerprint.spacings, fingerprint.extents, voxels)
    preprocessing = replace(ct.Plan.fit(fingerprint.samples, tuple(spacing)),
                            mirror=fingerprint.mirror)
    shape = median_shape(fingerprint, preprocessing)
    count = BATCH
    if patch is None:
        volume = rules.patch_of_volumes(shape, preprocessing.spacing, voxels)
        case = rules.patch_of_cases(shape, BATCH * voxels)
        if case and prod(case) > voxels:
            volume, count = case, 1
    else:
        volume = int(patch[0]), int(patch[1]), int(patch[2])
    slices = rules.patch_of_slices(shape)
    plan = Plan(
        preprocessing=preprocessing, backbone=backbone,
        **going_with(head, preprocessing.spacing, volume[0],
                     rules.enlarged(preprocessing.spacing, fingerprint.spacings), apart),
        patch_2d=slices, patch_3d=volume, batch_3d=count,
        batch_2d=min(SLICES, max(1, round(count * prod(volume) / prod(slices)))),
        steps_2d=STEPS, steps_3d=STEPS, augmentation="none")
    return varied(plan, fingerprint)


def going_with(head: str, spacing: Sequence[float], depth: int, enlarged: bool, apart: bool
               ) -> dict[str, Any]:
    """The head and what of a plan goes with it: decoder, strides and slots along depth, for cases
    of this spacing (mm) and patches of `depth` voxels. Where scans are seen enlarged, the stem's
    halving undoes it, and a decoder ends there."""
    decoder: tuple[int, ...] = models.DECODER if head == "unet" else ()
    kept: tuple[bool, ...] = rules.KEPT[len(decoder) or 3]
    strides = rules.depth_strides(spacing, depth, (False, *kept[1:]) if enlarged else kept)
    return {"head": head, "decoder": decoder[:4] if enlarged else decoder,
            "depth": rules.slots(spacing, strides, apart), "depth_stride": strides}


def median_shape(fingerprint: Fingerprint, preprocessing: ct.Plan) -> tuple[int, int, int]:
    """(D, H, W) of a prepared case of the median extents."""
    d, h, w = preprocessing.shape(np.median(fingerprint.extents, axis=0), (1.0, 1.0, 1.0))
    return d, h, w


def within(plan: Plan, minutes: float, seconds: dict[str, float]) -> Plan:
    """The plan with as many steps of both stages as these minutes hold, at the seconds measured:
    SHARE_2D of them, or MOST_2D steps where these take less, are for slices."""
    share, step = 60 * SHARE_2D * minutes, seconds["step_2d"]
    flat = min(int(share / step), MOST_2D)
    deep = int((60 * minutes - min(share, MOST_2D * step)) / seconds["step_3d"])
    if min(flat, deep) < 1:
        raise ValueError(f"found {minutes:g} minutes, in which there is no time for a step of both"
                         f" stages ({seconds['step_2d']:.3g} and {seconds['step_3d']:.3g} seconds"
                         " here); give more time, or take a smaller patch")
    return replace(plan, seconds=seconds, steps_2d=flat, steps_3d=deep)


def varied(plan: Plan, fingerprint: Fingerprint) -> Plan:
    """The plan with the augmentation that goes with how often its steps see these cases."""
    seen = sum(steps * count * prod(patch) for steps, count, patch in (
        (plan.steps_2d, plan.batch_2d, plan.patch_2d),
        (plan.steps_3d, plan.batch_3d, plan.patch_3d)))
    shape = median_shape(fingerprint, plan.preprocessing)
    return replace(plan, augmentation=rules.augmentation(
        seen / prod(shape) / len(fingerprint.digests)))


def measure(plan: Plan, fingerprint: Fingerprint, device: str = "cpu", progress: Progress = iter,
            ranks: int = 1, precision: str = "tf32") -> dict[str, float]:
    """Seconds that a training step and the prediction of the median case take here, by rank:
    "step_2d", "step_3d", "scan_2d", "scan_3d".

    Networks of random weights see noise, a few steps each and a group of windows, of which the
    fastest counts; a scan takes as many as cover the median case. Of a step that several ranks
    share, what one of them has of it. precision: that of training (`cuda.precision`).
    """
    seconds: dict[str, float] = {}
    shape = median_shape(fingerprint, plan.preprocessing)
    for rank, patch, count in progress([(2, plan.patch_2d, plan.batch_2d),
                                        (3, plan.patch_3d, plan.batch_3d)]):
        along = plan.inflation | {"depth_padding": "edge"} if rank == 3 else {}
        net = models.resnet_seg(rank=rank, in_channels=len(fingerprint.modalities),
                                classes=len(fingerprint.labels), **plan.architecture, **along)
        part = ceil(count / ranks)  # of a single value per channel there is no variance
        part += any(starved(patch, plan.strides[-rank:], part))
        step, window = _timed(to_device(net, device), patch, part, ranks == 1, precision)
        windows = prod(len(infer.starts(max(n, p), p, OVERLAP))
                       for n, p in zip(shape, (1, *patch)[-3:], strict=True))
        seconds |= {f"step_{rank}d": round(step, 4), f"scan_{rank}d": round(window * windows, 4)}
    return seconds


def _timed(net: models.Segmenter, patch: tuple[int, ...], count: int, capture: bool,
           precision: str) -> tuple[float, float]:
    """Seconds of a step of `count` patches, and of the prediction of a window."""
    rng, classes = np.random.default_rng(0), net.config["classes"]
    images = rng.standard_normal((count, *patch, net.config["in_channels"]), "float32")
    labels = rng.integers(classes, size=(count, *patch)).astype(np.uint8)
    with cuda.precision(precision):
        step = min(record.seconds for record in train.fit(
            net, lambda _: (images, labels), losses.dice_cross_entropy,
            optim.AdamW(net.parameters(), 1e-4), REPEATS, capture=capture))
    volume = images[:8] if len(patch) == 2 else images[0]  # as many slices as go at a time
    times = []
    for _ in range(2):
        began = perf_counter()
        infer.sliding_window(net, volume, patch, batch=8, labels=True)
        times.append(perf_counter() - began)
    return step, min(times) / (len(volume) if len(patch) == 2 else 1)
