"""What the job decides before it trains: spacing, patches, depth strides and steps, by rules.

Each rule is a function of what the fingerprint found, with its source; the constants above them are
what measurements may change. The result is one small file, plan.json, that anyone may edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import ceil, isfinite, prod
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from .. import infer, losses, models, optim, train
from ..data import ct
from ..files import read_json
from ..nn import to_device
from ..report import write_json
from .fingerprint import Fingerprint, Progress
from .fingerprint import fingerprint as fingerprint

VOXELS = {"cpu": 2**18, "cuda": 2**21}  # of a patch of a volume, at most
PER_VOXEL = 6_000  # bytes that training takes for a voxel of a batch: ResNet-18, float32
CELL = 8  # voxels that sides of patches are multiples of
CONTEXT = 256  # voxels along a side of a patch of a slice, at most
BATCH = 2  # volumes a step: batch-norm needs two, and context counts for more than a third
SLICES = 32  # slices a step, at most
SMALL = 64  # voxels along every axis of a case that is seen enlarged
ENLARGED = 2**19  # voxels of such a case, at most
COVER = 16  # patches in the median case, at most, before its spacing is coarsened
COARSE = 2.0  # mm, to which a spacing is coarsened at most
LEAST = 4  # voxels along an axis that nnU-Net's halvings leave (UNet_featuremap_min_edge_length)
KEPT = (True, False, False, False, False)  # halvings that leave depth as it is, rule or not
STEPS = 400  # of each stage, where no time is given
SHARE_2D = 0.25  # of the time is the 2D network's
REPEATS = 3  # steps that are timed
OVERLAP = 0.5  # of windows, in predictions
DECODER = (256, 128, 64, 32, 16)
HEADS = ("unet", "linear", "fcn", "deeplabv3")


def _whole(least: int, most: float = float("inf")) -> Any:
    return lambda n: type(n) is int and least <= n <= most


def _each(right: Any, *counts: int) -> Any:
    return lambda value: (isinstance(value, tuple) and len(value) in counts
                          and all(map(right, value)))


RIGHT = {  # what a field may hold: (whether a value is right, how that is said)
    "preprocessing": (lambda x: isinstance(x, ct.Plan), "a preparation of scans"),
    "head": (lambda x: x in HEADS, f"one of {', '.join(HEADS)}"),
    "decoder": (_each(_whole(1), *range(6)), "up to five numbers of channels"),
    "backbone": (lambda x: x in models.BACKBONES, f"one of {', '.join(models.BACKBONES)}"),
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
    def inflation(self) -> dict[str, Any]:
        """The arguments of `inflate`, and of `models.resnet_seg` at rank 3, about depth."""
        return {"depth": self.depth, "depth_stride": self.depth_stride}

    def write(self, path: str | Path) -> None:
        """The plan as a JSON file, whole or not at all."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """The plan that `write` wrote, or someone edited.

        ValueError, naming the file and the entry, where one is missing, unknown or impossible.
        """
        content = read_json(path)
        try:
            _expect(cls, content, "")
            _expect(ct.Plan, content["preprocessing"], "preprocessing.")
            content["preprocessing"] = ct.Plan(**content["preprocessing"])
            return cls(**content)
        except (TypeError, ValueError) as fault:
            raise ValueError(f"{path}: {fault}; mend it, or make another with `tinyseg plan`"
                             ) from None


def _expect(kind: Any, content: Any, prefix: str) -> None:
    """ValueError unless `content` has the fields of a dataclass and no others."""
    if not isinstance(content, dict):
        raise ValueError(f"found {prefix.rstrip('.')} {content!r}, expected an object")
    names = [each.name for each in fields(kind)]
    for told, wrong in (("no", [n for n in names if n not in content]),
                        ("the unknown", [n for n in content if n not in names])):
        if wrong:
            raise ValueError(f"found {told} {', '.join(prefix + name for name in wrong)}")


def working_spacing(spacings: np.ndarray, extents: np.ndarray, voxels: int
                    ) -> tuple[float, float, float]:
    """The spacing in mm that scans of these spacings and extents (cases, 3), in mm, are seen at.

    Their median; of thick slices (over 3 times the rest, and fewer than a third of its voxels) the
    10th percentile, but no finer than the rest (nnU-Net: Isensee et al. 2021). The first halving of
    a ResNet comes before anything is learned of detail, so a case of under SMALL voxels along every
    axis is seen at half the spacing, as long as it then has no more than ENLARGED. Where a patch of
    `voxels` would be under 1 / COVER of the median case, the finest axes are coarsened towards the
    coarsest, up to COARSE mm.
    """
    spacing, extent = np.median(spacings, axis=0), np.median(extents, axis=0)
    coarse = int(spacing.argmax())
    rest = np.delete(spacing, coarse).max()
    if (spacing[coarse] > ct.THICK * rest
            and ct.THICK * extent[coarse] / spacing[coarse] < np.delete(extent / spacing,
                                                                        coarse).min()):
        spacing[coarse] = max(rest, np.percentile(spacings[:, coarse], 10))
    while max(extent / spacing) < SMALL and prod(2 * extent / spacing) <= ENLARGED:
        spacing = spacing / 2
    limit = min(spacing.max(), COARSE)
    while prod(extent / spacing) > COVER * voxels and spacing.min() < limit:
        spacing = np.maximum(spacing, min(1.1 * spacing.min(), limit))
    d, h, w = spacing.tolist()
    return d, h, w


def patch_of_volumes(shape: Sequence[int], spacing: Sequence[float], voxels: int
                     ) -> tuple[int, int, int]:
    """(D, H, W), a case of this shape in multiples of CELL, its longest side in mm cut until it is
    of at most `voxels`: as cubic as the case allows."""
    d, h, w = (CELL * ceil(n / CELL) for n in shape)
    while d * h * w > voxels and max(d, h, w) > CELL:
        long = int(np.argmax([n * s * (n > CELL)
                              for n, s in zip((d, h, w), spacing, strict=True)]))
        d, h, w = (n - CELL * (axis == long) for axis, n in enumerate((d, h, w)))
    return d, h, w


def patch_of_slices(shape: Sequence[int]) -> tuple[int, int]:
    """(H, W), whole slices of a case of this shape, or as much of them as CONTEXT."""
    h, w = (min(CONTEXT, CELL * ceil(n / CELL)) for n in shape[1:])
    return h, w


def depth_strides(spacing: Sequence[float], depth: int, halvings: int = 5,
                  kept: Sequence[bool] = KEPT) -> tuple[int, ...]:
    """The depth stride of each halving of the plane, for a patch of `depth` voxels.

    nnU-Net's rule (get_pool_and_conv_props): an axis is halved while its spacing is under twice the
    finest and at least LEAST voxels remain. Finer than that where `kept`: inflated kernels that
    mix slices before the first halving lose least of what the 2D network knows.
    """
    strides: list[int] = []
    along, across = spacing[0], min(spacing[1:])
    for keep in kept[:halvings]:
        halved = not keep and along < 2 * across and depth >= 2 * LEAST
        strides.append(1 + halved)
        along, across, depth = along * strides[-1], 2 * across, ceil(depth / strides[-1])
    return tuple(strides)


def slots(spacing: Sequence[float], strides: Sequence[int]) -> tuple[int, ...]:
    """Slots along depth of the kernels of the stem and layers 1 to 4, given the strides.

    3 where the spacing along depth is under twice that of the plane, on the grid that they answer
    on, else 1, slice by slice (nnU-Net: get_pool_and_conv_props).
    """
    found = []
    along, across = spacing[0], min(spacing[1:])
    for stride in strides:  # stem, pool (layer 1 answers on its grid), layers 2 to 4
        along, across = along * stride, across * 2
        found.append(3 if along < 2 * across else 1)
    return tuple(found + found[-1:] * (5 - len(found)))


def propose(fingerprint: Fingerprint, *, spacing: Sequence[float] | None = None,
            patch: Sequence[int] | None = None, minutes: float | None = None,
            memory: float | None = None, device: str = "cpu", backbone: str = "resnet18",
            head: str = "unet") -> Plan:
    """The plan for the cases of a fingerprint; spacing (mm) and patch (D, H, W) by rule, or given.

    minutes of training: steps that take as long here, which is measured; else STEPS of each stage.
    memory: GiB that training may take; patches are of VOXELS[device] at most.
    Errors are those of `ct.Plan.fit`, and ValueError for too little time or memory.
    """
    voxels = VOXELS[device]
    if memory is not None:
        voxels = min(voxels, int(memory * 2**30 / (BATCH * PER_VOXEL)))
        if voxels < CELL**3:
            raise ValueError(f"found {memory:g} GiB of memory, expected "
                             f"{BATCH * PER_VOXEL * CELL**3 / 2**30:.2g} at least")
    if spacing is None:
        spacing = working_spacing(fingerprint.spacings, fingerprint.extents, voxels)
    preprocessing = replace(ct.Plan.fit(fingerprint.samples, tuple(spacing)),
                            mirror=fingerprint.mirror)
    shape = median_shape(fingerprint, preprocessing)
    volume = patch_of_volumes(shape, preprocessing.spacing, voxels) if patch is None \
        else (int(patch[0]), int(patch[1]), int(patch[2]))
    slices = patch_of_slices(shape)
    strides = depth_strides(preprocessing.spacing, volume[0], 5 if head == "unet" else 3)
    plan = Plan(
        preprocessing=preprocessing, head=head, decoder=DECODER if head == "unet" else (),
        backbone=backbone, depth=slots(preprocessing.spacing, strides), depth_stride=strides,
        patch_2d=slices, patch_3d=volume, batch_3d=BATCH,
        batch_2d=min(SLICES, max(1, round(BATCH * prod(volume) / prod(slices)))),
        steps_2d=STEPS, steps_3d=STEPS, augmentation="mild")
    return plan if minutes is None else within(plan, minutes, measure(plan, fingerprint, device))


def median_shape(fingerprint: Fingerprint, preprocessing: ct.Plan) -> tuple[int, int, int]:
    """(D, H, W) of a prepared case of the median extents."""
    d, h, w = preprocessing.shape(np.median(fingerprint.extents, axis=0), (1.0, 1.0, 1.0))
    return d, h, w


def within(plan: Plan, minutes: float, seconds: dict[str, float]) -> Plan:
    """The plan with as many steps of both stages as these minutes hold, at the seconds measured."""
    flat, deep = (int(60 * minutes * share / seconds[f"step_{stage}"])
                  for stage, share in (("2d", SHARE_2D), ("3d", 1 - SHARE_2D)))
    if min(flat, deep) < 1:
        raise ValueError(f"found {minutes:g} minutes, in which there is no time for a step of both"
                         f" stages ({seconds['step_2d']:.3g} and {seconds['step_3d']:.3g} seconds"
                         " here); give more time, or take a smaller patch")
    return replace(plan, seconds=seconds, steps_2d=flat, steps_3d=deep)


def measure(plan: Plan, fingerprint: Fingerprint, device: str = "cpu",
            progress: Progress = iter) -> dict[str, float]:
    """Seconds that a training step and the prediction of the median case take here, by rank:
    "step_2d", "step_3d", "scan_2d", "scan_3d".

    Networks of random weights see noise, a few steps each and a group of windows, of which the
    fastest counts; a scan takes as many as cover the median case.
    """
    shape, seconds = median_shape(fingerprint, plan.preprocessing), {}
    for rank, patch, count in progress([(2, plan.patch_2d, plan.batch_2d),
                                        (3, plan.patch_3d, plan.batch_3d)]):
        along = plan.inflation | {"depth_padding": "edge"} if rank == 3 else {}
        net = models.resnet_seg(rank=rank, in_channels=len(fingerprint.modalities),
                                classes=len(fingerprint.labels), **plan.architecture, **along)
        step, window = _timed(to_device(net, device), patch, count)
        windows = prod(len(infer.starts(max(n, p), p, OVERLAP))
                       for n, p in zip(shape, (1, *patch)[-3:], strict=True))
        seconds |= {f"step_{rank}d": round(step, 4), f"scan_{rank}d": round(window * windows, 4)}
    return seconds


def _timed(net: models.Segmenter, patch: tuple[int, ...], count: int) -> tuple[float, float]:
    """Seconds of a step of `count` patches, and of the prediction of a window."""
    rng, classes = np.random.default_rng(0), net.config["classes"]
    images = rng.standard_normal((count, *patch, net.config["in_channels"]), "float32")
    labels = rng.integers(classes, size=(count, *patch)).astype(np.uint8)
    records = train.fit(net, lambda _: (images, labels), losses.dice_cross_entropy,
                        optim.AdamW(net.parameters(), 1e-4), REPEATS)
    step = min(record.seconds for record in records)
    volume = images[:8] if len(patch) == 2 else images[0]  # as many slices as go at a time
    times = []
    for _ in range(2):
        began = perf_counter()
        infer.sliding_window(net, volume, patch, batch=8, labels=True)
        times.append(perf_counter() - began)
    return step, min(times) / (len(volume) if len(patch) == 2 else 1)
