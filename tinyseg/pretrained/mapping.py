"""Foreign names and layouts into ours: which array goes where, and a report of all of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..checkpoint import TEXT
from ..checkpoint import read as read_ours
from ..models import BACKBONES
from ..nn import Module
from .files import read

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1], torchvision's preprocessing
IMAGENET_STD = (0.229, 0.224, 0.225)
HEADS = ("fc.", "classifier.")
UNUSED = ("aux_classifier.",)  # the loss beside the loss in torchvision's training
RENAMES = (  # applied in turn until none fits: pattern, replacement, where it comes from
    (r"^(module|_orig_mod|model|encoder)\.", "", "DataParallel, torch.compile, wrappers"),
    (r"^resnet\d+_\d+s\.", "", "Pakhomov's Resnet*_8s and _16s"),
    (r"^backbone\.0\.", "conv1.", "RadImageNet: the children of a torchvision ResNet by number"),
    (r"^backbone\.1\.", "bn1.", "RadImageNet"),
    (r"^backbone\.([4-7])\.", lambda m: f"layer{int(m[1]) - 3}.", "RadImageNet"),
    (r"^backbone\.", "", "torchvision's fcn_resnet and deeplabv3_resnet"),
)


@dataclass
class Report:
    """What became of every tensor: lists of names; `reshaped` as (name, from, to)."""

    source: str
    matched: list[str] = field(default_factory=list)
    reshaped: list[tuple[str, tuple, tuple]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.matched)} tensors matched, {len(self.reshaped)} "
                 f"reshaped, {len(self.missing)} missing, {len(self.unexpected)} not used"]
        lines += [f"  reshaped  {name}: {a} -> {b}" for name, a, b in self.reshaped]
        lines += [f"  missing   {name} (left as it was)" for name in self.missing]
        lines += [f"  not used  {name}" for name in self.unexpected]
        return "\n".join(lines + [f"  note      {note}" for note in self.notes])


def rename(name: str) -> str:
    """A foreign name in torchvision's form, prefixes taken off."""
    while True:
        for pattern, replacement, _ in RENAMES:
            changed = re.sub(pattern, replacement, name)
            if changed != name:
                name = changed
                break
        else:
            return name


def channels_last(array: np.ndarray, rank: int | None = None) -> np.ndarray:
    """(O, I, *K) -> (*K, I, O); with `rank`, a matrix (O, I) becomes a kernel of ones."""
    if array.ndim < 2:
        return array
    array = np.moveaxis(array, (1, 0), (-2, -1))
    return array if rank is None or array.ndim > 2 else array.reshape(*(1,) * rank, *array.shape)


def torchvision_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays under torchvision's names, without counters; ValueError where two collide."""
    out: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if not name.endswith("num_batches_tracked"):
            short = rename(name)
            if short in out:
                raise ValueError(f"{name} and another tensor are both {short} without prefixes")
            out[short] = array
    return out


def recognise(arrays: Mapping[str, np.ndarray]) -> dict:
    """The `config` of the network that a foreign state dict belongs to (see models.build).

    Backbone from the number of blocks and of convolutions in one; the head from its names. A
    matrix as fc: torchvision's classifier; a 1x1 kernel: Pakhomov's segmentation; classifier.*:
    torchvision's FCN or DeepLabV3, with its dilation rule and corners. ValueError where no
    network of ours fits.
    """
    named = {name: a for name, a in torchvision_names(arrays).items() if a.size}
    blocks = tuple(len({n.split(".")[1] for n in named if n.startswith(f"layer{i}.")})
                   for i in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in named
    found = [name for name, known in BACKBONES.items() if known == (blocks, bottleneck)]
    if not found or "conv1.weight" not in named or named["conv1.weight"].ndim != 4:
        raise ValueError(f"no ResNet that is known: {blocks} blocks in layers 1 to 4, "
                         f"{'three' if bottleneck else 'two'} convolutions each; first names "
                         f"{', '.join(list(named)[:3])}")
    config = {"backbone": found[0], "rank": 2, "in_channels": named["conv1.weight"].shape[1]}
    if "fc.weight" in named and named["fc.weight"].ndim in (2, 4):
        kind = "resnet" if named["fc.weight"].ndim == 2 else "resnet_seg"
        return {"model": kind, "classes": len(named["fc.weight"]), **config}
    if "classifier.4.weight" in named and named["classifier.4.weight"].ndim == 4:
        head = "deeplabv3" if "classifier.0.project.0.weight" in named else "fcn"
        return {"model": "resnet_seg", "head": head, "classes": len(named["classifier.4.weight"]),
                "dilate_first_block": False, "align_corners": False, **config}
    raise ValueError(f"a {found[0]} without a head (fc or classifier); make the network and load "
                     'with head="drop"')


def _stem(w: np.ndarray, channels: int, how: str) -> tuple[np.ndarray, np.ndarray | None]:
    """RGB kernel (*K, 3, O) for `channels` inputs; and what it adds to each output, or None.

    "sum": the colours' sum, shared among the channels: exact where all channels hold the same
    normalised grey image. "mean": a third of that. "imagenet": for grey values in [0, 1] that were
    not normalised: w_c / std_c summed, its constant -Σ w_c mean_c / std_c goes to batch-norm.
    """
    if how == "imagenet":
        scaled = w / np.asarray(IMAGENET_STD, w.dtype)[:, None]
        constant = (scaled * np.asarray(IMAGENET_MEAN, w.dtype)[:, None]).sum(
            axis=tuple(range(w.ndim - 1)))
    elif how in ("sum", "mean"):
        scaled, constant = w / (3 if how == "mean" else 1), None
    else:
        raise ValueError(f'stem is {how!r}; expected "sum", "mean" or "imagenet"')
    grey = scaled.sum(axis=-2, keepdims=True) / channels
    return np.repeat(grey, channels, axis=-2), constant


def load(net: Module, path: str | Path, *, head: str = "keep", allow_missing: Iterable[str] = (),
         stem: str = "sum") -> Report:
    """Write the weights of a foreign checkpoint (or one of ours) into a rank-2 network.

    Names lose their prefixes, kernels become channels-last, an RGB stem is fitted to the network's
    input channels (see `_stem` for `stem`). head="drop" leaves fc or classifier as it is.
    allow_missing: names, or beginnings of names that end in a dot, that the file need not have.

    Strict: ValueError, naming every tensor, where one is missing, has another shape, or is in the
    file and not in the network (auxiliary heads, counters and a dropped head excepted); nothing
    is written then. Warns where batch-norm statistics are folded (see `recalibrate`).
    """
    if head not in ("keep", "drop"):
        raise ValueError(f'head is {head!r}; expected "keep" or "drop"')
    raw = read(path)
    report, mine = Report(str(path)), net.state()
    ours = TEXT in raw
    found = read_ours(path)[0] if ours else torchvision_names(raw)
    if head == "drop":
        report.notes += [f"the head stays as it was: {n}" for n in mine if n.startswith(HEADS)]
        mine = {n: a for n, a in mine.items() if not n.startswith(HEADS)}
    skipped = UNUSED + (HEADS if head == "drop" else ())
    state, wrong = {}, []
    for name, target in mine.items():
        if name not in found:
            report.missing.append(name)
            continue
        array = found.pop(name)
        rank = target.ndim - 2 if target.ndim > 2 else None
        fitted = array if ours else channels_last(array, rank)
        rgb = fitted.ndim == target.ndim and fitted.shape[-2:-1] == (3,)
        if name == "conv1.weight" and fitted.shape != target.shape and rgb:
            fitted, constant = _stem(fitted, target.shape[-2], stem)
            report.notes.append(f"RGB stem to {target.shape[-2]} channels: {stem}")
            if constant is not None:
                found["bn1.running_mean"] = found["bn1.running_mean"] + constant
        if fitted.shape != target.shape:
            wrong.append(f"{name} has shape {array.shape}, the network needs {target.shape} "
                         "(channels last)")
        elif fitted.shape == array.shape:
            report.matched.append(name)
        else:
            report.reshaped.append((name, array.shape, fitted.shape))
        state[name] = fitted
    report.unexpected = list(found)
    allowed = tuple(allow_missing)
    wrong += [f"{name} is missing" for name in report.missing if not any(
        name == a or (a.endswith(".") and name.startswith(a)) for a in allowed)]
    wrong += [f"{name} is not in the network" for name in found if not name.startswith(skipped)]
    if wrong:
        more = [f"... and {len(wrong) - 20} more"] if len(wrong) > 20 else []
        raise ValueError(f"{path}: does not fit the network:\n  " + "\n  ".join(wrong[:20] + more))
    net.load_state(state, strict=False)
    if folded(net):
        note = ("batch-norm statistics are folded (mean 0, variance 1): right in eval mode, wrong "
                "as soon as batch-norm trains; call pretrained.recalibrate on images first, or "
                'net.train(statistics="running")')
        report.notes.append(note)
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return report


def folded(net: Module) -> bool:
    """Whether all running variances are 1: statistics that are none. (The first mean may hold the
    constant of a stem.)"""
    variances = [a for name, a in net.named() if name.endswith("running_var")]
    return bool(variances) and all(bool((a == 1).all()) for a in variances)
