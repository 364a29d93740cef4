"""A run: one folder, what was asked for, and how far it has come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from .. import checkpoint, files, pretrained, report
from ..backend import Array
from ..data import augment
from ..infer.windows import OVERLAP
from ..nn import Module, to_device
from ..ranks import ALONE, Alone
from . import pages, prepare, stages
from .evaluate import compare, evaluate
from .plan import Plan
from .settings import Settings, SettingsError

PARTS = ("run.json", "checkpoint.npz", "prepared")  # by which a folder is known to hold a run
LOOK: dict[str, Any] = {"salt": 1, "count": 8}  # patches of a batch that is looked at
LOOKS = 8  # batches
COMPARISON = 4  # salt, of patches of held-out cases
SHOWN = {"2d": 32, "3d": 4}  # of them that a network is compared on


class Run:
    """One run in one folder, for this process alone while it is open.

        with Run(folder, Settings(data="Task07_Pancreas")) as run:   # or Run.resume(folder)
            plan = run.decide()
            flat = run.train("2d", models.resnet_seg(rank=2, ..., **plan.architecture))
            deep = run.train("3d", inflate(flat, profile="zero", **plan.inflation))
            run.evaluate({"2d": flat, "3d": deep})

    However that ends, `Run.resume(folder)` and the same lines go on to the same weights, bit for
    bit on one device: what was done is not done again.

    run.json holds what was asked for, plan.json what was decided, checkpoint.npz how far it is.
    """

    def __init__(self, folder: str | Path, settings: Settings, kept: Mapping | None = None,
                 ranks: Alone = ALONE):
        """A new run; kept: the run.json of one that goes on; ranks: that this process leads, and
        share its work. Nothing is written before it is opened (`with`). Raises SettingsError for a
        folder that holds a run, and for files not there."""
        self.folder, self.settings, self.kept = Path(folder), settings, dict(kept or {})
        self.ranks = ranks
        if self.folder.exists() and not self.folder.is_dir():
            raise SettingsError(f"--out {folder} is a file; expected a folder, or a name for a new "
                                "one")
        if kept is not None:
            return
        if parts := [name for name in PARTS if (self.folder / name).exists()]:
            raise SettingsError(f"{folder} holds a run already ({', '.join(parts)}); go on with "
                                "--resume, or choose another --out")
        settings.expect_files()
        decided = self.folder / "plan.json"  # of `tinyseg plan`, which someone may have edited
        if decided.exists() and not (settings.plan and settings.plan.samefile(decided)):
            raise SettingsError(f"{folder} holds a plan.json; take it by --plan {decided}, or "
                                "choose another --out")

    @classmethod
    def resume(cls, folder: str | Path, ranks: Alone = ALONE, **asked: Any) -> Self:
        """The run in a folder; `asked` are settings that may change: where things lie, more steps.

        Raises SettingsError where there is no run or another setting is asked for, ValueError
        where run.json is damaged.
        """
        told = Path(folder) / "run.json"
        if not told.is_file():
            raise SettingsError(f"--resume: there is no run to go on with in {folder} "
                                f"({told.name} is missing)")
        kept, keys = files.read_json(told), {each.name for each in fields(Settings)}
        if missing := sorted(keys - kept.keys()):
            raise ValueError(f"{told}: found no {', '.join(missing)}, which every run writes; one "
                             "of an earlier version cannot go on (its models predict): begin "
                             "another")
        try:
            begun = Settings(**{key: kept[key] for key in keys})
        except SettingsError as error:
            raise SettingsError(f"{told}: {error}") from None
        return cls(folder, begun.resumed(**asked), kept, ranks)

    def __enter__(self) -> Self:
        self.ranks.device(self.settings.device)  # before any work is done
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(files.held(self.folder))
            files.sweep(self.folder)
            self._begin()
            self._open = stack.pop_all()
        return self

    def __exit__(self, *what: Any) -> None:
        self._open.close()

    def _begin(self) -> None:
        """Find the scans, and what of the run is there; write run.json."""
        asked, labels = self.settings, self.kept.get("labels", {})
        self.ranks.part(asked.batch or self.ranks.size)  # or it says that there are too many
        if not (asked.data or asked.images or self.kept):
            report.write_json(self.folder / "run.json", asked.json())
        try:
            names = {int(number): name for number, name in labels.items()}
            self.dataset = prepare.scans(asked, self.folder / "phantom", names or None)
        except FileNotFoundError as error:
            if labels:
                error.add_note("where it lies now can be told with "
                               + ("--images and --labels" if asked.images else "--data"))
            raise
        self.labels = {str(number): name for number, name in self.dataset.labels.items()}
        self.cases = [case.id for case in self.dataset.cases]
        for key, found in (("labels", self.labels), ("cases", self.cases)):
            if self.kept.get(key, found) != found:
                raise ValueError(f"{self.dataset.cases[0].label.parent}: the {key} are no longer "
                                 f"those that the run in {self.folder} began with; bring them "
                                 "back, or begin again in another --out")
        self.trained, self.held_out = prepare.split(asked, self.cases)
        self._recall()
        plan = self._plan or prepare.taken(asked)
        self.mirror = prepare.reflection(asked, self.dataset.labels, plan)
        if plan and self.fresh:
            plan = prepare.adjusted(plan, asked, self.mirror)
        self.ranks.part(min(plan.batch_2d, plan.batch_3d) if plan else self.ranks.size)
        trial = prepare.outline(asked, plan, self.channels, len(self.labels))
        if asked.pretrained and self.fresh:
            prepare.imported(trial, asked.pretrained)
            prepare.expect_split(asked.pretrained.parent, self._told(), of_these=False)
        if asked.from_2d and self.fresh:
            prepare.expect_split(asked.from_2d, self._told())
        # Not before: a mistyped path begins no run.
        report.write_json(self.folder / "run.json", self._told())
        if self._plan:
            self._plan.write(self.folder / "plan.json")
        print(f"{self.dataset.name}: {len(self.trained)} training and {len(self.held_out)} "
              f"held-out cases, classes {', '.join(self.labels.values())}")
        if self.dataset.skipped:
            print(f"left out: {len(self.dataset.skipped)} ({', '.join(self.dataset.skipped)})")

    def _told(self) -> dict[str, Any]:
        return {**self.settings.json(), "labels": self.labels, "cases": self.cases}

    def _fixed(self) -> dict[str, Any]:
        """All that a checkpoint must agree with: what may change of a resumed run left out."""
        changing = {each.name for each in fields(Settings)
                    if {"movable", "grows"} & each.metadata.keys()}
        told = {**self._told(), "plan": {**asdict(self._plan), "steps_2d": 0, "steps_3d": 0}
                if self._plan else None}
        return json.loads(json.dumps({k: v for k, v in told.items() if k not in changing}))

    def _recall(self) -> None:
        """Where the run stands, as plan.json and checkpoint.npz have it."""
        self._plan: Plan | None = None
        self.history = stages.History(list(self.labels.values()))
        self.inflated: dict[str, Any] = {}  # what `compare` found
        self.stage, self.step = "", 0
        self.arrays: dict[str, Array] = {}
        decided, path = self.folder / "plan.json", self.folder / "checkpoint.npz"
        if self.kept and decided.exists():
            self._plan = Plan.read(decided)
        if path.exists():
            self.arrays, told = checkpoint.read(path)
            if told.get("settings") != self._fixed():
                raise ValueError(f"{path}: this is no checkpoint of the run that run.json and "
                                 "plan.json describe")
            self.stage, self.step = told["stage"], told["step"]
            self.inflated = told.get("inflated", {})
            self.history = stages.History(self.history.names, told["history"], told["recent"])
            print(f"resuming the {self.stage} stage after step {self.step}" if self.arrays else
                  f"the {self.stage} stage is finished")
        if self._plan:
            steps: dict[str, Any] = {key: asked for key in ("steps_2d", "steps_3d")
                                     if (asked := getattr(self.settings, key)) is not None}
            for key, asked in steps.items():
                before = getattr(self._plan, key)
                if asked < before or asked > before and self._finished(key[-2:]):
                    raise SettingsError(f"{key} was {before}, not {asked}, and can only grow while "
                                        "that stage is trained")
            self._plan = replace(self._plan, **steps)

    @property
    def plan(self) -> Plan:
        """What was decided; RuntimeError before that."""
        if self._plan is None:
            raise RuntimeError("this run has no plan yet; call run.decide() first")
        return self._plan

    @property
    def channels(self) -> int:
        """Channels of a scan."""
        return len(self.dataset.modalities)

    @property
    def fresh(self) -> bool:
        """Whether nothing has been trained yet."""
        return not self.stage

    def _finished(self, stage: str) -> bool:
        """Whether the network of a stage is written: the checkpoint has no arrays of it."""
        return self.stage > stage or self.stage == stage and not self.arrays  # "", "2d", "3d"

    def decide(self) -> Plan:
        """The plan, made at the first call or taken, and every case prepared by it."""
        asked, path = self.settings, self.folder / "plan.json"
        if self._plan is None:
            mine = tuple(case for case in self.dataset.cases if case.id in self.trained)
            known = replace(self.dataset, cases=mine)
            prepare.decide(asked, known, self.mirror, self.ranks.size).write(path)
            self._plan = Plan.read(path)  # the same types now as after a resume
        plan = self.plan
        prepare.expect_several(plan, self.ranks.size if asked.local_norm else 1)
        made = prepare.cases(self.dataset, asked, plan, self.folder, self.trained + self.held_out)
        self.prepared = {"training": [made[id] for id in self.trained],
                         "held out": [made[id] for id in self.held_out]}
        small = sum(any(n < p for n, p in zip(case.label.shape, plan.patch_3d, strict=True))
                    for case in self.prepared["training"])
        print(f"spacing {' x '.join(f'{s:.3g}' for s in plan.preprocessing.spacing)} mm, patch "
              f"{' x '.join(map(str, plan.patch_3d))} voxels"
              + (f"; {small} smaller cases are padded" if small else ""))
        return plan

    def pretrain(self, net: Module) -> None:
        """Load the weights asked for, and give batch-norm statistics of training patches."""
        name, asked = f"{net.config['rank']}d", self.settings
        told = prepare.imported(net, (name == "2d" and asked.pretrained) or asked.start)
        print(str(told).splitlines()[0])
        if any(note.startswith("the head stays") for note in told.notes):
            print("its head is for other classes: ours starts at random")
        pretrained.recalibrate(net, (images for images, _ in self._looked(name)))
        print(f"batch-norm recalibrated on {LOOKS} batches; in eval mode nothing changed")

    @property
    def shares(self) -> Array:
        """What share of the voxels of training slices is of each class, (classes,)."""
        return stages.shares(self._looked(), len(self.labels))

    def _looked(self, name: str = "2d") -> Iterator[tuple[Array, Array]]:
        """Some batches of training slices, always the same, before any step."""
        draw = replace(self.stages[name], **LOOK).batches(
            self.prepared["training"], self.settings.seed, self._augment())
        return map(draw, range(LOOKS))

    def _augment(self) -> Callable | None:
        made = self.plan.preprocessing
        pairs = None if made.mirror is None else augment.numbered(made.mirror,
                                                                  list(self.labels.values()))
        return augment.preset(self.plan.augmentation, made.spacing, pairs)

    @property
    def stages(self) -> dict[str, stages.Stage]:
        """The stages of the plan, by name."""
        return stages.stages(self.plan, self.settings)

    def train(self, name: str, net: Module, *,
              stop: Callable[[], bool] = lambda: False) -> Module:
        """`net` trained through the stage "2d" or "3d", as model_NAME.npz then holds it; where that
        was done, the network of the file.

        Where stop() is true after a step, KeyboardInterrupt ends the stage there, as Ctrl-C does at
        any moment.
        """
        stage, model = self.stages[name], self.folder / f"model_{name}.npz"
        if not self._finished(name):
            place = (self.step, self.arrays) if self.stage == name else None
            try:
                self.ranks.everywhere(
                    stages.run, stage, net, self.prepared["training"], self.settings,
                    self._augment(), self._shown(name), place, self._new(name, net),
                    history=self.history, save=partial(self._save, name), stop=stop)
            finally:
                report.drawn(report.progress, self.folder / "progress.png", self.history.rows)
            self._write(name, net)
        return checkpoint.load(model)

    def _new(self, name: str, net: Module) -> tuple[str, ...]:
        """The parts of a network that are to move faster: what makes logits, and of a network that
        begins with pretrained weights, the whole head."""
        names = getattr(net, "head_names", ()) if name == "2d" else ()
        return names if self.settings.pretrained else names[-1:]

    def take(self, name: str, source: str | Path) -> Module:
        """The network of a stage of another run's folder, in place of training one here.

        ValueError where that run held out other cases, or its classes are others.
        """
        path = Path(source) / f"model_{name}.npz"
        if not self._finished(name):
            prepare.expect_split(path.parent, self._told())
            net = checkpoint.load(path)
            self._write(name, net, **net.metadata)
        return checkpoint.load(self.folder / path.name)

    def _write(self, name: str, net: Module, **own: Any) -> None:
        """The network of a finished stage, and a checkpoint that only says so. own: preparation
        that it was trained with elsewhere."""
        checkpoint.save(self.folder / f"model_{name}.npz", to_device(net, "cpu"), **{
            "plan": asdict(self.plan.preprocessing), "patch": self.stages[name].size,
            "labels": self.labels, "dataset": self.dataset.name, **own})
        self._save(name, self.stages[name].steps, {})
        self.stage, self.arrays = name, {}

    def _save(self, stage: str, step: int, arrays: Mapping[str, Array]) -> None:
        """All that the rest of the run depends on."""
        checkpoint.write(self.folder / "checkpoint.npz", arrays, {
            "settings": self._fixed(), "stage": stage, "step": step, "history": self.history.rows,
            "recent": self.history.recent, "inflated": self.inflated})
        report.write_table(self.folder / "history.csv", self.history.rows)

    def compare(self, flat: Module, deep: Module) -> dict[str, Any]:
        """What inflation keeps, before any training of volumes, or what was found then: how far
        logits of both networks are apart on an input constant along depth, and their Dice on the
        same held-out patches."""
        if self.stage != "3d" or not self.inflated:
            self.inflated = compare(flat, deep, self._shown("3d"), list(self.labels.values()),
                                    self.settings.seed)
        return self.inflated

    def _shown(self, name: str) -> tuple[Array, Array]:
        """Patches of held-out cases, always the same, by which networks are compared."""
        count = SHOWN[name] // (1 + self.settings.quick)
        stage = replace(self.stages[name], salt=COMPARISON, count=count)
        with prepare.during("drawing patches of held-out cases"):
            return stage.batches(self.prepared["held out"], self.settings.seed, None)(0)

    def evaluate(self, nets: Mapping[str, Module]) -> dict[str, dict]:
        """Segment and score the held-out cases; writes label maps, overlays and metrics.json."""
        mirror = self.plan.preprocessing.mirror
        axes = [augment.LEFT_RIGHT] * (self.settings.score_mirrored and mirror is not None)
        if seconds := sum(self.plan.seconds.get(f"scan_{name}", 0) for name in nets):
            print(f"{len(self.held_out)} held-out cases to score, "
                  + stages.about(seconds * len(self.held_out) * 2 ** len(axes) / self.ranks.size))
        found = self.ranks.everywhere(evaluate, self.dataset, self.held_out, dict(nets),
                                      self.folder, axes, self.settings.device)
        decided = asdict(self.plan)
        decided |= {"plan": decided.pop("preprocessing"), "patch": self.plan.patch_3d,
                    "batch": self.plan.batch_3d}
        report.write_json(self.folder / "metrics.json", {
            "config": self._told() | decided,
            "models": found, "equivalence": self.inflated,
            "scoring": {"grid": "the scans' own", "overlap": OVERLAP,
                        "mean_with_mirror_image": bool(axes), "exchanged_classes": mirror or []}})
        report.drawn(lambda _: pages.of_run(self, nets, found), self.folder / "report.html")
        print(report.score_lines({name: m["mean"] for name, m in found.items()}, "dice"))
        print(f"on {len(self.held_out)} held-out cases; see {self.folder / 'report.html'}")
        return found
