"""Foreign names and layouts into ours: which array goes where, and a report of all of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import TEXT
from ..checkpoint import read as read_ours
from ..models import BACKBONES
from ..models.depth import STAGES
from ..nn import Module
from ..ops import interpolation
from .files import read
from .names import HEADS, Renames, choose, first, matcher, places, renamed, under

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1], torchvision's preprocessing
IMAGENET_STD = (0.229, 0.224, 0.225)
UNUSED = ("aux_classifier.",)  # the loss beside the loss in torchvision's training
TRUNK = frozenset({"conv1.weight", "bn1.weight", "bn1.running_mean"} | {  # of every ResNet
    f"layer{i}.{b}.conv{c}.weight" for i in (1, 2, 3, 4) for b in (0, 1) for c in (1, 2)})


@dataclass
class Report:
    """What became of every tensor: lists of names; `reshaped` as (name, from, to).

    `prefix` is what the network's names begin with in the file.

    >>> print(ts.pretrained.Report("net.pt", matched=["fc.bias"], missing=["fc.weight"]))
    net.pt: 1 tensors matched, 0 reshaped, 1 missing, 0 not used
      missing   fc.weight (left as it was)
    """

    source: str
    matched: list[str] = field(default_factory=list)
    reshaped: list[tuple[str, tuple, tuple]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    prefix: str = ""

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.matched)} tensors matched, {len(self.reshaped)} "
                 f"reshaped, {len(self.missing)} missing, {len(self.unexpected)} not used"]
        lines += [f"  prefix    {self.prefix}"] if self.prefix else []
        lines += [f"  reshaped  {name}: {a} -> {b}" for name, a, b in self.reshaped]
        lines += [f"  missing   {name} (left as it was)" for name in self.missing]
        parts: dict[str, list[str]] = {}
        for name in self.unexpected:
            parts.setdefault(".".join(name.split(".")[:2]), []).append(name)
        lines += [f"  not used  {names[0]}" if len(names) == 1 else
                  f"  not used  {part}.* ({len(names)} tensors)" for part, names in parts.items()]
        return "\n".join(lines + [f"  note      {note}" for note in self.notes])


def channels_last(array: np.ndarray, rank: int | None = None) -> np.ndarray:
    """(O, I, *K) -> (*K, I, O); with `rank`, a matrix (O, I) becomes a kernel of ones."""
    if array.ndim < 2:
        return array
    array = np.moveaxis(array, (1, 0), (-2, -1))
    return array if rank is None or array.ndim > 2 else array.reshape(*(1,) * rank, *array.shape)


def _trunk(arrays: Mapping[str, np.ndarray], prefix: str | None) -> tuple[str, dict[str, str]]:
    """Where a ResNet stands: its prefix, and {torchvision's name: the file's}."""
    found = {p: under(p, arrays, TRUNK) for p in places(arrays, TRUNK, prefix)}
    whole = [p for p, names in found.items() if 2 * len(TRUNK & names.keys()) > len(TRUNK)]
    if len(whole) > 1:
        raise ValueError(choose(whole))
    return next(iter(found.items()))


def _unlike(named: Mapping[str, np.ndarray]) -> str:
    """What keeps these from being a plain ResNet's, among the reasons often met; or ""."""
    stem, conv2 = (named[name].shape if name in named else ()
                   for name in ("conv1.weight", "layer1.0.conv2.weight"))
    if any(name.endswith(("weight_v", "weight_g", ".original0")) for name in named):
        return ("its weights are split into norm and direction (weight norm); join them with "
                "torch.nn.utils.remove_weight_norm and save it again")
    if "conv1.0.weight" in named:
        return "its stem is several convolutions (deep stem: conv1.0, ...), expected one of 7x7"
    if len(stem) == 5:
        return ("its kernels are 3D, and only networks of images are recognised; make "
                "models.resnet_seg(rank=3, ...) and pretrained.load into that")
    if len(conv2) == 4 and conv2[1] < conv2[0]:
        return (f"layer1.0.conv2 has kernels over {conv2[1]} of {conv2[0]} channels (groups, as in "
                "ResNeXt), expected over all")
    if len(conv2) == 4 and conv2[0] != 64:
        return f"layer1.0.conv2 has {conv2[0]} filters (wide or thin), expected 64"
    return ""


def recognise(arrays: Mapping[str, np.ndarray], *, prefix: str | None = None,
              rename: Renames = (), ignore: Iterable[str] = ()) -> dict:
    """The `config` of the network that a foreign state dict belongs to (see models.build).

    Backbone from the number of blocks and of convolutions in one; the head from its names. A
    matrix as fc: torchvision's classifier; a 1x1 kernel: Pakhomov's segmentation; classifier.*:
    torchvision's FCN or DeepLabV3, with its dilation rule and corners; decoder.*: the Unet of
    segmentation_models_pytorch. The options are those of
    `load`. ValueError where no network of ours fits, or more than one.

    >>> net = ts.models.resnet("resnet18", rank=2, in_channels=3, classes=10)
    >>> ts.pretrained.recognise(ts.export.state_dict(net))
    {'model': 'resnet', 'classes': 10, 'backbone': 'resnet18', 'rank': 2, 'in_channels': 3}
    """
    if TEXT in arrays:
        raise ValueError("a file of tinyseg already, with nothing to import: ts.load reads it, as "
                         "do the commands that take a MODEL, and --pretrained")
    left_out = matcher(ignore)
    kept = {n: a for n, a in renamed(arrays, rename).items() if not left_out(n)}
    prefix, names = _trunk(kept, prefix)
    named = {n: kept[name] for n, name in names.items() if kept[name].size and not left_out(n)}
    blocks = tuple(len({n.split(".")[1] for n in named if n.startswith(f"layer{i}.")})
                   for i in (1, 2, 3, 4))
    bottleneck, reason = "layer1.0.conv3.weight" in named, _unlike(named)
    found = [name for name, known in BACKBONES.items() if known == (blocks, bottleneck)]
    if found and reason:
        raise ValueError(f"no ResNet that is known: blocks as {found[0]}, but {reason}")
    if not found or "conv1.weight" not in named or named["conv1.weight"].ndim != 4:
        raise ValueError(f"no ResNet that is known: {blocks} blocks in layers 1 to 4, "
                         f"{'three' if bottleneck else 'two'} convolutions each; first names "
                         f"{first(arrays)}; expected conv1.weight, layer1.0.conv1.weight and so on,"
                         f" behind any prefix{reason and '; ' + reason}")
    config = {"backbone": found[0], "rank": 2, "in_channels": named["conv1.weight"].shape[1]}
    trunk = {name.partition(".")[0] for name in TRUNK}
    others = [n for n in named if n.partition(".")[0] not in trunk and not n.startswith(HEADS)]
    heads = [names[n] for n in others if n.endswith((".fc.weight", ".classifier.4.weight"))
             and names[n].startswith(prefix)]
    if heads and any(n.startswith(HEADS) for n in named):
        raise ValueError(f"{first(heads)} may be the head too; leave it out with ignore")
    if "fc.weight" in named and named["fc.weight"].ndim in (2, 4):
        kind = "resnet" if named["fc.weight"].ndim == 2 else "resnet_seg"
        return {"model": kind, "classes": len(named["fc.weight"]), **config}
    if "classifier.4.weight" in named and named["classifier.4.weight"].ndim == 4:
        head = "deeplabv3" if "classifier.0.project.0.weight" in named else "fcn"
        return {"model": "resnet_seg", "head": head, "classes": len(named["classifier.4.weight"]),
                "dilate_first_block": False, "align_corners": False, **config}
    if "segmentation_head.0.weight" in named:
        ends = (named.get(f"decoder.blocks.{i}.conv2.0.weight") for i in range(STAGES))
        return {"model": "resnet_seg", "head": "unet",
                "decoder": tuple(len(w) for w in ends if w is not None),
                "classes": len(named["segmentation_head.0.weight"]), **config}
    raise ValueError(f"a {found[0]} without a head that is known (fc, classifier, or decoder with "
                     "segmentation_head; beside it: "
                     f"{first(others)}): no whole network, but a start for one. Train with "
                     f'--pretrained, or make models.resnet_seg("{found[0]}", ...) and call '
                     'pretrained.load with head="drop"')


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


def _slots(w: np.ndarray, slots: int) -> np.ndarray:
    """A kernel (T, H, W, I, O) with another number of slots along depth: each of its own goes to
    the nearest two, by linear weights, so that the sum over slots is what it was."""
    if len(w) == slots:
        return w
    shares = interpolation(slots, len(w), align_corners=False).astype(w.dtype)  # (T, slots)
    return np.tensordot(shares.T, w, axes=1)


def _fit(net: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray], report: Report,
         left_out: Callable[[str], bool], others: tuple[str, ...], *, drop: bool, ours: bool,
         stem: str, resample: bool, allowed: tuple[str, ...]
         ) -> tuple[dict[str, np.ndarray], list[str]]:
    """The new state of a network whose state is `net`, out of `arrays` under the report's prefix;
    and what is wrong with it. What stands under the prefixes `others` is another network."""
    mine = {n: a for n, a in net.items() if not (drop and n.startswith(HEADS))}
    report.notes += [f"the head stays as it was: {n}" for n in net if n not in mine]
    parts = {n.partition(".")[0] for n in mine}
    names = under(report.prefix, arrays, mine)
    found = {n: arrays[name] for n, name in names.items() if not left_out(n)}
    state, wrong = {}, []
    for name, target in mine.items():
        if name not in found:
            report.missing.append(name)
            if not any(name == a or (a.endswith(".") and name.startswith(a)) for a in allowed):
                wrong.append(f"{name} is missing")
            continue
        array = found[name]
        rank = target.ndim - 2 if target.ndim > 2 else None
        fitted = array if ours else channels_last(array, rank)
        rgb = fitted.ndim == target.ndim and fitted.shape[-2:-1] == (3,)
        if name == "conv1.weight" and fitted.shape != target.shape and rgb:
            fitted, constant = _stem(fitted, target.shape[-2], stem)
            report.notes.append(f"RGB stem to {target.shape[-2]} channels: {stem}")
            if constant is not None and "bn1.running_mean" in found and "bn1.running_mean" in mine:
                found["bn1.running_mean"] = found["bn1.running_mean"] + constant
            elif constant is not None:
                wrong.append('there is no bn1.running_mean for the constant of stem="imagenet"; '
                             'take stem="sum"')
        if resample and fitted.ndim == 5 and fitted.shape[1:] == target.shape[1:]:
            fitted = _slots(fitted, len(target))
        if fitted.shape != target.shape:
            wrong.append(f"{name} has shape {array.shape}, the network needs {target.shape} "
                         "(channels last)")
        elif fitted.dtype.kind == "f" and not _finite(fitted, target.dtype):
            wrong.append(f"{name} holds NaN or infinite numbers")
        elif fitted.shape == array.shape:
            report.matched.append(name)
        else:
            report.reshaped.append((name, array.shape, fitted.shape))
        state[name] = fitted
    report.unexpected = [n for n in names if n not in state]
    wrong += [f"{n} is not in the network" for n in report.unexpected
              if n in found and not names[n].startswith(others) and not n.startswith(UNUSED)
              and (n.partition(".")[0] in parts or
                   not drop and names[n].startswith(report.prefix))]
    return state, wrong


def _only_fit(net: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray], source: str,
              prefix: str | None, head: str, left_out: Callable[[str], bool], **options: Any
              ) -> tuple[Report, dict[str, np.ndarray]]:
    """The one prefix under which all fits, with its report and the new state; or ValueError."""
    ignored = [n for n in arrays if left_out(n)]
    arrays = {n: a for n, a in arrays.items() if not left_out(n)}
    for drop in {"keep": (False,), "drop": (True,), "fit": (False, True)}[head]:
        mine = [n for n in net if not (drop and n.startswith(HEADS))]
        tried = []
        for place in places(arrays, mine, prefix):
            report = Report(source, prefix=place)
            others = tuple(p for p in places(arrays, mine, None) if len(p) > len(place))
            tried.append((report, *_fit(net, arrays, report, left_out, others, drop=drop,
                                        **options)))
            report.unexpected += ignored
        fits = [attempt for attempt in tried if not attempt[2]]
        if fits:
            break
    among = choose(report.prefix for report, *_ in fits or tried)
    if len(fits) > 1:
        raise ValueError(among)
    report, state, wrong = (fits or tried)[0]
    if not wrong:
        return report, state
    told = wrong[:20] + ([f"... and {len(wrong) - 20} more"] if len(wrong) > 20 else [])
    if len(tried) > 1:
        told.append(among)
    if not state:
        told.append(f"none of its names is in the file; the first there are {first(arrays)}")
    if TRUNK <= net.keys() and net["conv1.weight"].ndim == 4:
        named = {n: arrays[name] for n, name in under(report.prefix, arrays, mine).items()}
        told += filter(None, [_unlike(named)])
    if any(line.endswith("is not in the network") for line in wrong):
        told.append("ignore leaves out what the network does not have")
    where = f" under the prefix {report.prefix}" if report.prefix else ""
    raise ValueError(f"does not fit the network{where}:\n  " + "\n  ".join(told))


def _finite(array: np.ndarray, dtype: np.dtype) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array.astype(dtype, copy=False)).all())


def load(net: Module, path: str | Path | Mapping[str, np.ndarray], *, head: str = "keep",
         allow_missing: Iterable[str] = (), stem: str = "sum", resample: bool = False,
         prefix: str | None = None, rename: Renames = (), ignore: Iterable[str] = ()) -> Report:
    """Write the weights of a foreign checkpoint (or one of ours) into a network.

    path: a file, or {name: array} in PyTorch's layout, as `read` gives it. Kernels become
    channels-last, an RGB stem is fitted to the network's input channels (see `_stem` for `stem`).

    head: "keep"; "drop" leaves what follows the trunk (fc, classifier, decoder and
    segmentation_head) as it is, whatever the file has; "fit" keeps it where the file has the very
    same, and drops it otherwise.
    resample: kernels of volumes with another number of slots along depth are resampled (as UpKern,
    Roy et al. 2023, but with the sum over slots kept), and not refused.
    prefix: what the network's names begin with in the file, "" for nothing; None finds it.
    rename: {regular expression: replacement} for the names in the file, in turn, as re.sub has it:
    {"shortcut": "downsample", "^linear": "fc"}.
    ignore: regular expressions of what to leave out, whole names (renamed, with the prefix or
    without): ["projection_head.*", "queue"].
    allow_missing: names, or beginnings of names that end in a dot, that the file need not have.

    Strict: ValueError, naming every tensor, where one is missing, has another shape, is not finite,
    or stands under the prefix and not in the network (auxiliary heads, counters and a dropped head
    excepted), and where the network fits under several prefixes; nothing is written then. The
    report has whatever is not used. Warns where batch-norm statistics are folded (see
    `recalibrate`).

    >>> other = ts.models.resnet(rank=2, in_channels=3, classes=10, width=4)
    >>> file = {f"module.{name}": 2 * a for name, a in ts.export.state_dict(other).items()}
    >>> net = ts.models.resnet_seg(rank=2, in_channels=1, classes=3, width=4)
    >>> report = ts.pretrained.load(net, file, head="drop")
    >>> report.prefix, report.unexpected, report.notes[-1]
    ('module.', ['fc.weight', 'fc.bias'], 'RGB stem to 1 channels: sum')
    """
    if head not in ("keep", "drop", "fit"):
        raise ValueError(f'head is {head!r}; expected "keep", "drop" or "fit"')
    if isinstance(path, Mapping):
        source, raw = "the arrays given", {name: np.asarray(a) for name, a in path.items()}
        ours = raw.pop(TEXT, None) is not None
    else:
        source, raw = str(path), read(path)
        if ours := TEXT in raw:
            raw = read_ours(path)[0]
    if ours and prefix is None:
        prefix = ""
    allowed = (allow_missing,) if isinstance(allow_missing, str) else tuple(allow_missing)
    try:
        report, state = _only_fit(net.state(), renamed(raw, rename), source, prefix, head,
                                  matcher(ignore), ours=ours, stem=stem, resample=resample,
                                  allowed=allowed)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    net.load_state(state, strict=False)
    if folded(net):
        note = ("batch-norm statistics are folded (mean 0, variance 1): right in eval mode, wrong "
                "as soon as batch-norm trains; call pretrained.recalibrate on images first, or "
                'net.train(statistics="running")')
        report.notes.append(note)
        warnings.warn(f"{source}: {note}", stacklevel=2)
    return report


def folded(net: Module) -> bool:
    """Whether all running variances are 1: statistics that are none. (The first mean may hold the
    constant of a stem.)"""
    variances = [a for name, a in net.named() if name.endswith("running_var")]
    return bool(variances) and all(bool((a == 1).all()) for a in variances)
