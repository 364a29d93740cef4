"""What a run is asked for: one frozen value, from Python, from JSON or from a command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from math import ceil, prod
from operator import index
from pathlib import Path
from typing import Any

from .. import models
from ..cuda import PRECISIONS
from ..profiles import PROFILES

# What --quick asks for, where nothing else is. A decoder from a random start has learned nothing
# after so few steps: the Dice of training patches was still 0 after 40. They are too few for varied
# patches to pay, and volumes are as wide as slices: in smaller ones the 2D network finds nothing.
QUICK: dict[str, Any] = {"steps_2d": 40, "steps_3d": 16, "batch": 1, "head": "linear",
                         "patch": (24, 96, 96), "augment": "none"}
QUICK_SLICES = 8  # a step, for every volume
BACKBONE, HEAD = "resnet18", "unet"  # of a plan, where nothing else is asked for


class SettingsError(ValueError):
    """What a run cannot be asked for: of a command, bad usage."""


def _halving(text: Any) -> Any:
    """A stride along depth, or the word plane."""
    return text if text == "plane" else int(text)


def option(default: Any, about: str, **how: Any) -> Any:
    """A setting: its default, what its help says, and how argparse reads it (type, nargs, ...).

    movable: a resumed run may find it elsewhere; grows: it may ask for more.
    """
    return field(default=default, metadata={"about": about, **how})


@dataclass(frozen=True)
class Settings:
    """What a run is asked for; None leaves it to the plan.

    Raises SettingsError, a ValueError that names the option, for what no run can be asked for.
    Settings(**settings.json()) == settings, also through JSON.

    >>> from tinyseg.job import Settings
    >>> asked = Settings(minutes=60, depth_stride=(1, 1, 2, 2, 2))
    >>> Settings(**asked.json()) == asked
    True
    >>> Settings(profile="scale")
    Traceback (most recent call last):
    tinyseg.job.settings.SettingsError: --alpha goes with --profile scale, found None and scale
    """

    data: Path | None = option(
        None, "Decathlon or nnU-Net folder with dataset.json (default: a phantom in OUT)",
        type=Path, movable=True)
    images: Path | None = option(None, "instead of --data: a folder of scans", type=Path,
                                 movable=True)
    label_maps: Path | None = option(None, "and one of label maps of the same names", type=Path,
                                     movable=True, flag="--labels", metavar="LABELS")
    modality: str = option("unknown", "of --images: CT keeps its units, others are standardised "
                           "scan by scan", metavar="NAME")
    plan: Path | None = option(None, "take this plan.json, of another run or of tinyseg plan",
                               type=Path, metavar="FILE")
    minutes: float | None = option(None, "of training, which the plan's steps fill", type=float,
                                   metavar="M")
    memory: float | None = option(None, "that training may take, which the plan's patches fit",
                                  type=float, metavar="GIB")
    pretrained: Path | None = option(None, "start the 2D network from this checkpoint (PyTorch, "
                                     "safetensors or ours)", type=Path)
    from_2d: Path | None = option(None, "take the trained 2D network and the plan of this run's "
                                  "folder", type=Path, metavar="RUN", movable=True)
    backbone: str | None = option(None, "the residual network (default: the plan's)",
                                  choices=list(models.BACKBONES)[:4])
    head: str | None = option(None, "what makes labels of its features (default: the "
                              "plan's; quick linear)",
                              choices=["linear", "fcn", "deeplabv3", "unet"])
    depth_stride: tuple[int | str, ...] | None = option(
        None, "strides along depth: plane, as in the plane, or one of 1 and 2 for every halving: "
        "stem, pool, layers 2, 3, 4 (default: the plan's)", type=_halving, nargs="+", metavar="N")
    profile: str = option(
        "zero", "how 2D kernels spread along depth, a name in tinyseg.PROFILES; zero keeps slices "
        "apart and so starts closest to the 2D network on real volumes", metavar="NAME",
        choices=[*PROFILES, "scale"])
    alpha: tuple[float, ...] | None = option(
        None, "of the profile scale: a number for each slot, 1 together", type=float, nargs="+",
        metavar="A")
    slot: str = option("center", "of a profile that has one: center, first, or its number from 0",
                       metavar="SLOT")
    start: str = option("inflated", "where the 3D network begins: inflated, random, the same "
                        "network without anything of the 2D one, or a checkpoint of a 3D network",
                        metavar="START")
    freeze: tuple[str, ...] = option((), "parts of the 3D network that rest, by the beginning of "
                                     "their names", nargs="+", metavar="PREFIX")
    spacing: tuple[float, ...] | None = option(
        None, "millimetres to resample to (default: by the median of cases)", type=float,
        nargs=3, metavar=("D", "H", "W"))
    order: int | None = option(None, "how scans are interpolated: 1 linear, 3 cubic (default: the "
                               "plan's)", type=int, choices=[1, 3])
    patch: tuple[int, ...] | None = option(
        None, "voxels the 3D network sees at a time (default: the plan's; quick 24 96 96)",
        type=int, nargs=3, metavar=("D", "H", "W"))
    augment: str | None = option(None, "how training patches are varied (default: the plan's; "
                                 "quick none)", choices=["none", "mild", "nnunet"])
    mirror: tuple[str, ...] = option(
        ("auto",), "classes that change places when a patch is mirrored left-right, by name or "
        "number; none: nothing is mirrored; auto: by the sides in their names, and nothing where "
        "one has no partner", nargs="+", metavar="A=B")
    steps_2d: int | None = option(None, "steps on slices (default: the plan's; quick 40)", type=int,
                                  metavar="N", grows=True)
    steps_3d: int | None = option(None, "steps on volumes (default: the plan's; quick 16)",
                                  type=int, metavar="N", grows=True)
    batch: int | None = option(None, "volumes a step, and slices in proportion (default: the "
                               "plan's; quick 1)", type=int, metavar="N")
    lr: tuple[float, ...] = option((2e-3, 3e-4), "AdamW's rate on slices and on volumes; a 3D "
                                   "network that is not inflated has that of slices", type=float,
                                   nargs=2, metavar=("2D", "3D"))
    lr_new: float = option(5.0, "times that is the rate of what begins at random in the 2D "
                           "network: its last layer, and the head on pretrained weights",
                           type=float, metavar="TIMES")
    folds: int = option(5, "parts of the cross-validation", type=int, metavar="K")
    fold: int = option(0, "the part held out, from 0", type=int, metavar="I")
    training_cases: int | None = option(None, "of the others, drawn by the seed, to learn from "
                                        "(default: all)", type=int, metavar="N")
    local_norm: bool = option(False, "of several processes (mpiexec -n N) each normalises by its "
                              "own patches (default: by those of all)")
    device: str = option("cpu", "where it computes", choices=["cpu", "cuda"], movable=True)
    precision: str = option("tf32", "what convolutions multiply in training on a GPU: fp32, tf32 "
                            "or bf16; everything else is float32", choices=list(PRECISIONS),
                            movable=True)
    seed: int = option(0, "of all that is random", type=int)
    score_mirrored: bool = option(False, "score the mean of the answers to a scan and to its "
                                  "mirror image, in twice the time")
    quick: bool = option(False, "a small run of under two minutes")

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, _value(each, getattr(self, each.name)))
        decided = {"head", "patch"} if self._taken else {"patch"} if self.memory else set()
        decided |= {"steps_2d", "steps_3d", "augment"} if self.minutes is not None else set()
        for name in QUICK.keys() - decided if self.quick else ():
            if getattr(self, name) is None:
                object.__setattr__(self, name, QUICK[name])
        if wrong := next(self._wrong(), ""):
            raise SettingsError(wrong)

    @property
    def _taken(self) -> bool:
        """Whether the plan is another's."""
        return bool(self.plan or self.from_2d)

    def _wrong(self) -> Iterator[str]:
        """What cannot be, one sentence each."""
        if min(self.steps_2d or 0, self.steps_3d or 0, self.seed) < 0 or self.batch == 0:
            yield "steps and seed must be at least 0 and batch at least 1"
        for name in ("spacing", "patch", "lr", "lr_new", "minutes", "memory", "batch",
                     "training_cases"):
            value = getattr(self, name)
            if value is not None and not min(value if isinstance(value, tuple) else [value]) > 0:
                yield f"--{name.replace('_', '-')} is {value}, expected positive numbers"
        head = self.head or (None if self._taken else HEAD)
        if not 0 <= self.fold < self.folds:
            yield f"--fold must be 0 to {self.folds - 1}, found {self.fold}"
        if (self.images is None) != (self.label_maps is None) or self.images and self.data:
            yield "--images and --labels go together, and without --data"
        if self.device == "cpu" and self.precision != "tf32":
            yield "--precision goes with --device cuda; a CPU computes in float32"
        if self.modality != "unknown" and not self.images:
            yield "--modality is for --images; with --data it stands in dataset.json"
        if self.mirror not in (("auto",), ("none",)) and not all("=" in p for p in self.mirror):
            yield (f"--mirror is {' '.join(self.mirror)}; expected auto, none, or pairs such as "
                   "'left kidney=right kidney'")
        if self.depth_stride and self.depth_stride != ("plane",) and not (
                {*self.depth_stride} <= {1, 2}):
            yield (f"--depth-stride is {' '.join(map(str, self.depth_stride))}; expected plane, or "
                   "1 or 2 for every halving")
        elif self.depth_stride and head and self.depth_stride != ("plane",) and (
                len(self.depth_stride) != (5 if head == "unet" else 3)):
            yield (f"--depth-stride is {' '.join(map(str, self.depth_stride))}; expected "
                   f"{5 if head == 'unet' else 3} numbers with the head {head}")
        elif self.patch and self.batch == 1 and self.steps_3d != 0:
            plane = 32 if head == "unet" else 8
            along = self.depth_stride or (1,)  # a plan's may be as fine as that
            depth = plane if along == ("plane",) else prod(map(int, along))
            yield from starved(self.patch, (depth, plane, plane), 1)
        if self._taken and (self.minutes or self.memory):
            yield ("--minutes and --memory are for a plan that is made here; one that is taken has "
                   "steps and patches: ask for others by --steps-2d, --steps-3d and --patch")
        if self.memory and self.patch:
            yield "--memory chooses a patch that fits it; --patch is one already: give either"
        if (self.alpha is None) != (self.profile != "scale"):
            yield f"--alpha goes with --profile scale, found {self.alpha} and {self.profile}"
        elif self.alpha and not abs(sum(self.alpha) - 1) < 1e-6:
            yield f"--alpha is {_shown(self.alpha)}; expected numbers whose sum is 1"
        if self.from_2d and (self.plan or self.pretrained or self.backbone or self.head
                             or "=" in self.mirror[0]):
            yield ("--from-2d takes plan and network of that run, without --plan, --pretrained, "
                   "--backbone, --head and pairs for --mirror")

    @property
    def apart(self) -> bool:
        """Whether the inflated network sees slice by slice before any training."""
        named = PROFILES.get(self.profile)
        return bool(named and named.volumes and self.slot == "center")

    @property
    def way(self) -> dict[str, Any]:
        """The arguments of `inflate` that say how kernels spread along depth."""
        slot = int(self.slot) if self.slot.isdecimal() else self.slot
        return {"profile": self.profile, "alpha": self.alpha, "slot": slot, "seed": self.seed}

    def expect_files(self) -> None:
        """SettingsError for a file that is asked for and not there."""
        run, named = self.from_2d, self.start in ("inflated", "random")
        for name, path in (("plan", self.plan), ("pretrained", self.pretrained),
                           ("start", None if named else Path(self.start)), *(
                               ("from-2d", run and run / part)
                               for part in ("model_2d.npz", "plan.json", "run.json"))):
            if path and not path.is_file():
                raise SettingsError(f"--{name} {path}: no such file")

    def json(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return {key: str(value) if isinstance(value, Path) else
                list(value) if isinstance(value, tuple) else value
                for key, value in asdict(self).items()}

    def resumed(self, **asked: Any) -> Settings:
        """These settings with what a resumed run may change; SettingsError names all else."""
        if asked.get("pretrained") or asked.get("from_2d"):
            raise SettingsError("a run goes on with its own network; --pretrained and --from-2d "
                                "would replace it")
        after = Settings(**{**self.json(), **asked})
        if changed := self.unlike(after, grown=True):
            raise SettingsError(f"a resumed run keeps its settings: {'; '.join(changed)}")
        return after

    def unlike(self, after: Settings, grown: bool = False) -> list[str]:
        """In what others differ from these, in words, but for where things lie, and for more steps
        of those that have `grown`."""
        changed = []
        for each in fields(self):
            was, now = getattr(self, each.name), getattr(after, each.name)
            more = grown and each.metadata.get("grows") and now is not None and (
                was is None or now > was)
            if was != now and not more and not each.metadata.get("movable"):
                changed.append(f"{each.name} was {_shown(was)}, not {_shown(now)}")
        return changed


def starved(patch: Sequence[int], strides: Sequence[int], batch: int) -> Iterator[str]:
    """What is wrong with patches that leave one value per channel at these output strides."""
    if batch * prod(ceil(n / s) for n, s in zip(patch, strides, strict=True)) == 1:
        yield (f"a batch of one patch of {' x '.join(map(str, patch))} voxels leaves one value per "
               f"channel at output stride {max(strides)}, and batch-norm nothing to normalise by; "
               "take a larger --patch or --batch")


def parser(**how: Any) -> argparse.ArgumentParser:
    """The command line of all settings; what it does not give is absent from the namespace."""
    made = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, **how)
    for each in fields(Settings):
        told = {key: value for key, value in each.metadata.items()
                if key in ("type", "nargs", "metavar", "choices")}
        default = "" if each.default in (None, False, ()) else f" ({_shown(each.default)})"
        made.add_argument(_flag(each), dest=each.name, help=each.metadata["about"] + default,
                          **told or {"action": "store_true"})
    return made


def _flag(each: Field) -> str:
    return each.metadata.get("flag", "--" + each.name.replace("_", "-"))


def _shown(value: Any) -> str:
    return " ".join(f"{x:g}" if isinstance(x, float) else str(x)
                    for x in (value if isinstance(value, tuple) else [value]))


def _value(each: Field, value: Any) -> Any:
    """The value in the setting's type, a list as a tuple; SettingsError where it is none."""
    how = each.metadata
    if value is None and each.default is None:
        return None
    try:
        if "nargs" in how:
            if isinstance(value, str) or how["nargs"] not in ("+", len(value)):
                raise TypeError
            return tuple(_one(how.get("type", str), x) for x in value)
        found = _one(how.get("type", bool if each.default is False else str), value)
        if found not in how.get("choices", [found]):
            raise TypeError
        return found
    except (TypeError, ValueError):
        expected = how.get("choices", how["about"])
        raise SettingsError(f"{_flag(each)} is {value!r}; expected {expected}") from None


def _one(kind: Any, value: Any) -> Any:
    """The value as one of this kind, where nothing of it gets lost; else TypeError."""
    if isinstance(value, bool) != (kind is bool):
        raise TypeError
    if kind in (int, _halving):
        return value if value == "plane" and kind is _halving else index(value)
    if kind is not Path and not isinstance(value, (float, int) if kind is float else kind):
        raise TypeError
    return kind(value)
