"""Train on slices, inflate to volumes, fine-tune, and score both on held-out cases.

The scans come as a folder of the Medical Segmentation Decathlon or of nnU-Net, as it is, or as two
folders with the same names; without any, a synthetic one is written first and takes the same path.
Everything lands in --out:

  model_2d.npz, model_3d.npz   the networks with their preparation (tinyseg.load)
  history.csv, progress.png    loss and Dice on training patches, step by step: of those centred on
                               foreground, and of those drawn anywhere, over the last 50 steps
  metrics.json                 Dice and IoU per class and case, on whole volumes, and how scored
  predictions/, overlay_*.png  label maps on the scans' own grids, and pictures of them
  run.json, checkpoint.npz     what was asked for, and where --resume goes on
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import monotonic

import numpy as np
from tqdm import tqdm

import tinyseg as ts
from tinyseg import checkpoint, files, nn, report
from tinyseg.data import augment, ct, decathlon, nifti, phantom, sampling

EXAMPLES = """\
examples:
  python examples/train_pancreas_3d.py --quick
      two minutes on a synthetic task: does everything work here?
  python examples/train_pancreas_3d.py --data Task07_Pancreas --out runs/pancreas --device cuda
      the main job; however it ends, go on with --resume --out runs/pancreas
"""
RATES = {"2d": 1e-3, "3d": 3e-4}  # AdamW; the 3D network starts trained
SLICES = 8  # slices per step of the 2D stage for every volume per step of the 3D stage
SAVE_EVERY = 120.0  # seconds between checkpoints
FOREGROUND = 0.5  # of all patches is centred on foreground
RECENT = 50  # steps whose patches drawn anywhere are scored together
MOVABLE = {"data", "images", "label_maps", "device"}  # a resumed run may find scans elsewhere
VOXELS = {"cpu": 2**18, "cuda": 2**21}  # of the default patch: 40x224x224 fits the larger


def options(**how) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, **how,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="Decathlon or nnU-Net folder with dataset.json (default: a "
        "phantom in OUT)")
    add("--images", type=Path, help="instead of --data: a folder of scans")
    add("--labels", type=Path, dest="label_maps", metavar="LABELS",
        help="and one of label maps of the same names")
    add("--modality", default="unknown", metavar="NAME", help="of --images: CT keeps its units, "
        "others are standardised scan by scan (%(default)s)")
    add("--out", type=Path, default=Path("runs/pancreas"), help="where results go (%(default)s)")
    add("--pretrained", type=Path, help="start the 2D network from this checkpoint "
        "(PyTorch, safetensors or ours)")
    add("--backbone", default="resnet18", choices=list(ts.models.BACKBONES)[:4])
    add("--profile", default="zero", choices=["zero", "average"],
        help="how 2D kernels spread along depth: the centre slot alone, or all alike; zero keeps "
        "slices apart and so starts closer to the 2D network on real volumes (%(default)s)")
    add("--spacing", type=float, nargs=3, metavar=("D", "H", "W"),
        help="millimetres to resample to (default: the median of the training cases)")
    add("--patch", type=int, nargs=3, metavar=("D", "H", "W"),
        help="voxels the 3D network sees at a time (default: as much of the median case as fits)")
    add("--steps-2d", type=int, metavar="N", help="steps on slices (400; quick 40)")
    add("--steps-3d", type=int, metavar="N", help="steps on volumes (400; quick 22)")
    add("--batch", type=int, metavar="N", help=f"volumes a step (2; quick 1); {SLICES}x as many "
        "slices")
    add("--mirror", nargs="+", default=["auto"], metavar="A=B", help="classes that change places "
        "when a patch is mirrored left-right, by name or number; none: nothing is mirrored; auto: "
        "by the sides in their names, and nothing where one has no partner (auto)")
    add("--folds", type=int, default=5, metavar="K", help="parts of the cross-validation (5)")
    add("--fold", type=int, default=0, metavar="I", help="the part held out, from 0 (0)")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on with the run in OUT, with its settings")
    add("--quick", action="store_true", help="a small run of under two minutes")
    return parser


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """The options, checked and with their defaults; what is wrong exits with code 2."""
    args = parser.parse_args(words)
    default = {"steps_2d": 40, "steps_3d": 22, "batch": 1} if args.quick else \
              {"steps_2d": 400, "steps_3d": 400, "batch": 2}
    for name, value in default.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if min(args.steps_2d, args.steps_3d, args.seed) < 0 or args.batch < 1:
        parser.error("steps and seed must be at least 0 and batch at least 1")
    if args.patch and min(args.patch) < 1 or args.spacing and min(args.spacing) <= 0:
        parser.error("--patch and --spacing must be positive")
    if args.patch and args.steps_3d and (wrong := starved(args.patch, args.batch)):
        parser.error(wrong)
    if not 0 <= args.fold < args.folds:
        parser.error(f"--fold must be 0 to {args.folds - 1}, found {args.fold}")
    if (args.images is None) != (args.label_maps is None) or args.images and args.data:
        parser.error("--images and --labels go together, and without --data")
    if args.modality != "unknown" and not args.images:
        parser.error("--modality is for --images; with --data it stands in dataset.json")
    if args.mirror not in (["auto"], ["none"]) and not all("=" in pair for pair in args.mirror):
        parser.error(f"--mirror is {' '.join(args.mirror)}; expected auto, none, or pairs such as "
                     "'left kidney=right kidney'")
    return args


def arguments(argv: list[str] | None = None) -> tuple[Path, dict]:
    """The run's folder and its settings: a new run's, or with --resume those it began with."""
    words = sys.argv[1:] if argv is None else argv
    parser = options()
    args = parse(parser, words)
    out, told = args.out, args.out / "run.json"
    if out.exists() and not out.is_dir():
        parser.error(f"--out {out} is a file; expected a folder, or a name for a new one")
    if not args.resume:
        parts = [name for name in ("run.json", "checkpoint.npz", "prepared")
                 if (out / name).exists()]
        if parts:
            parser.error(f"{out} holds a run already ({', '.join(parts)}); go on with --resume, or "
                         "choose another --out")
        if args.pretrained and not args.pretrained.is_file():
            parser.error(f"--pretrained {args.pretrained}: no such file")
        return out, settings_of(args)

    if args.pretrained:
        parser.error("--resume goes on with the network in OUT; --pretrained would replace it")
    if not told.is_file():
        parser.error(f"--resume: there is no run to go on with in {out} ({told.name} is missing)")
    kept, keys = files.read_json(told), settings_of(args).keys()
    if missing := sorted(keys - kept.keys()):
        raise ValueError(f"{told}: found no {', '.join(missing)}, which every run writes; one of "
                         "an earlier version cannot go on (its models predict): begin another")
    # Anyone may have edited the file; as words it can ask for no more than a command line can.
    before = words_of({key: kept[key] for key in keys})
    begun = settings_of(parse(options(prog=str(told), usage=argparse.SUPPRESS), before))
    asked = settings_of(parse(parser, before + words))
    changed = [f"{key} was {begun[key]}, not {asked[key]}" for key in asked
               if asked[key] != begun[key] and key not in MOVABLE]
    if changed:
        parser.error(f"a resumed run keeps its settings: {'; '.join(changed)}")
    return out, kept | asked


def settings_of(args: argparse.Namespace) -> dict:
    """What a run depends on, as JSON has it."""
    return {key: str(value) if isinstance(value, Path) else value
            for key, value in vars(args).items() if key not in ("out", "resume")}


def words_of(settings: dict) -> list[str]:
    """The command line that asks for these settings."""
    words = []
    for key, value in settings.items():
        flag = "--labels" if key == "label_maps" else "--" + key.replace("_", "-")
        if isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None and value is not False:
            words.append(flag if value is True else f"{flag}={value}")
    return words


def default_patch(cases: list[sampling.Prepared], spacing: tuple, voxels: int) -> tuple:
    """The median case in multiples of 8 voxels, its longest side in mm cut until it is small
    enough."""
    shape = np.median([case.label.shape for case in cases], axis=0)
    patch = [max(8, 8 * round(n / 8)) for n in shape]
    while np.prod(patch) > voxels:
        long = int(np.argmax([n * s * (n > 8) for n, s in zip(patch, spacing, strict=True)]))
        patch[long] -= 8
    return tuple(patch)


def starved(patch: Sequence[int], batch: int) -> str:
    """What is wrong with patches that leave one value per channel at output stride 8, or ""."""
    return "" if batch > 1 or max(patch) > 8 else (
        f"a batch of one patch of {' x '.join(map(str, patch))} voxels leaves one value per "
        "channel at output stride 8, and batch-norm nothing to normalise by; take a larger --patch "
        "or --batch")


def begin_from(path: Path, flat) -> None:
    """Load pretrained weights; the head only where it has these classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of folded statistics: `recalibrate` replaces them
        told = ts.pretrained.load(flat, path, head="fit")
    print(str(told).splitlines()[0])
    if any(note.startswith("the head stays") for note in told.notes):
        print("its head is for other classes: ours starts at random")


def reflection(words: list[str], labels: dict[int, str]) -> tuple[tuple[str, str], ...] | None:
    """Which classes change places when a patch is mirrored; None where none is. Says which."""
    names = list(labels.values())
    pairs, alone = augment.sides(names)
    if words == ["none"] or words == ["auto"] and alone:
        print("nothing is mirrored" + (f": {', '.join(alone)} has a side and no partner; --mirror "
                                       "names pairs" if words == ["auto"] else ""))
        return None
    if words != ["auto"]:
        numbers = {str(number): name for number, name in labels.items()}
        halves = [word.split("=", 1) for word in words]
        pairs = [(numbers.get(a, a), numbers.get(b, b)) for a, b in halves]
        augment.numbered(pairs, names)  # or it says which is no class
    print("patches are mirrored left-right" + "".join(
        f"; {a} and {b} change places" for a, b in pairs))
    return tuple(pairs)


@contextmanager
def during(what: str) -> Iterator[None]:
    """Whatever goes wrong in the block tells what was being done."""
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise


@contextmanager
def stopping() -> Iterator[list]:
    """Ctrl-C in the block is noted, for a loop to stop after its step; a second one raises."""
    noted: list = []

    def note(*_) -> None:
        noted.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    ours = (threading.current_thread() is threading.main_thread()  # others can set no handler
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler)  # nohup ignores it
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def prepare(dataset, plan, folder: Path, seed: int) -> dict[str, sampling.Prepared]:
    """All cases, normalised and resampled once and kept in `folder`, by id; what of them changed
    since is refused, before anything is prepared."""
    if other := [what for case in dataset.cases for what in sampling.changed(folder, case, plan)]:
        raise ValueError(f"{folder}: made of other data: {', '.join(dict.fromkeys(other))} changed "
                         "since this run began; bring that back, or begin again in another --out")
    cases = {}
    for number, case in enumerate(tqdm(dataset.cases, desc="prepare", unit="case")):
        try:
            cases[case.id] = sampling.open(folder, case.id)
        except (FileNotFoundError, ValueError):
            with during(f"preparing case {case.id}"):
                source = sampling.source(case, plan)
                sampling.store(folder, sampling.prepare(case, plan, seed + number), source)
                cases[case.id] = sampling.open(folder, case.id)
    return cases


def suspects(patches) -> list[str]:
    """The cases whose patches hold voxels that are not finite, else all that were drawn."""
    drawn = [(id, bool(np.isfinite(image).all())) for id, image, _ in patches]
    return sorted({id for id, finite in drawn if not finite} or {id for id, _ in drawn})


def drawn(figure: Callable, path: Path, *content) -> None:
    """`figure(path, *content)`; a picture that cannot be drawn ends no run."""
    try:
        figure(path, *content)
    except Exception as error:  # whatever a drawing library raises
        tqdm.write(f"{path}: not drawn ({type(error).__name__}: {error})", file=sys.stderr)


class Run:
    """One run in one folder: what it was told, what it has learned, and where it stands."""

    def __init__(self, out: Path, settings: dict):
        self.out, self.settings = out, settings
        self.fixed = {key: value for key, value in settings.items() if key not in MOVABLE}
        self.history: list[dict] = []
        self.recent: list = []  # the overlap of patches drawn anywhere, step by step
        self.device = ts.device(settings["device"])

    def save(self, stage: str, step: int, net, optimizer) -> None:
        """All that the rest of the run depends on. No generator is part of it: what is random in
        a step is a function of the seed, the stage and the step."""
        arrays = {f"net/{k}": a for k, a in net.state().items()}
        arrays |= {f"optimizer/{k}": a for k, a in optimizer.state().items()}
        checkpoint.write(self.out / "checkpoint.npz", arrays,
                         {"settings": self.fixed, "stage": stage, "step": step,
                          "history": self.history, "recent": self.recent})
        report.write_table(self.out / "history.csv", self.history)

    def recall(self) -> tuple[str, tuple | None]:
        """The stage the run has come to, and its arrays and step where a checkpoint has them."""
        path = self.out / "checkpoint.npz"
        if not path.exists():
            return "2d", None
        arrays, told = checkpoint.read(path)
        if told.get("settings") != self.fixed:
            raise ValueError(f"{path}: this is no checkpoint of the run that run.json describes")
        self.history, self.recent = told["history"], told["recent"]
        print(f"resuming the {told['stage']} stage after step {told['step']}")
        return told["stage"], (arrays, told["step"])

    def row(self, stage: str, record: ts.train.Record) -> dict:
        """What history.csv tells of a step: the Dice of its patches that were centred on
        foreground, and that of those drawn anywhere in the last steps, which tells of false
        positives too. A class that is in none has no entry."""
        count = len(record.overlap)
        chosen = np.array([sampling.centred(record.step * count + i, FOREGROUND)
                           for i in range(count)])
        self.recent = [*self.recent, record.overlap[~chosen].sum(axis=0).tolist()][-RECENT:]
        scores = {"patch_dice": ts.train.dice(record.overlap[chosen]),
                  "uniform_dice": ts.train.dice(np.array(self.recent))}
        names = list(self.settings["labels"].values())
        return {"stage": stage, "step": record.step, "loss": record.loss, "lr": record.lr,
                "seconds": round(record.seconds, 4),
                **{f"{kind} {names[c]}": round(x, 4) for kind, found in scores.items()
                   for c, x in found.items()}}

    def train(self, stage: str, net, batch, steps: int, resume: tuple | None) -> None:
        """`steps` steps of one stage, from the checkpoint's if it is given.

        `batch(step)` gives arrays, `batch(step, sampling.patches)` the same with their cases.
        """
        ts.to_device(net, self.device).train()
        optimizer = ts.optim.AdamW(net.parameters(), RATES[stage], weight_decay=1e-2)
        step = 0
        if resume:
            arrays, step = resume
            parts = {part: {k.removeprefix(part): a for k, a in arrays.items()
                            if k.startswith(part)} for part in ("net/", "optimizer/")}
            net.load_state(parts["net/"])
            optimizer.load_state(parts["optimizer/"])
        else:
            self.recent = []
        loss = partial(ts.losses.dice_cross_entropy, ignore=sampling.IGNORE)
        saved = monotonic()
        bar = tqdm(total=steps, initial=step, desc=f"train {stage}", unit="step")
        try:
            with stopping() as noted:
                for record in ts.train.fit(net, batch, loss, optimizer, steps, start=step):
                    self.history.append(self.row(stage, record))
                    step = record.step + 1
                    told = self.history[-1].items()
                    bar.set_postfix_str(f"loss {record.loss:.2f}" + "".join(
                        f", {where} {np.mean(found):.2f}" for kind, where in (
                            ("patch_dice", "Dice"), ("uniform_dice", "anywhere"))
                        if (found := [x for key, x in told if key.startswith(kind)])))
                    bar.update()
                    if monotonic() - saved > SAVE_EVERY:
                        self.save(stage, step, net, optimizer)
                        saved = monotonic()
                    if noted:
                        raise KeyboardInterrupt
        except FloatingPointError as error:
            error.add_note(f"in the {stage} stage, on patches of "
                           + ", ".join(suspects(batch(step, sampling.patches))))
            raise
        except MemoryError as error:
            error.add_note(f"at step {step} of the {stage} stage")
            raise
        finally:
            bar.close()
            if optimizer.steps == step:  # however the step after it ended, unless halfway
                self.save(stage, step, net, optimizer)
                drawn(report.progress, self.out / "progress.png", self.history)


def equivalence(flat, deep, patch: tuple, seed: int) -> float:
    """The largest difference of logits between both nets on an input constant along depth."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((1, *patch[1:], flat.config["in_channels"]), "float32")
    with ts.no_grad():
        one = flat.eval()(image).data[:, None]
        many = deep.eval()(np.repeat(image[:, None], patch[0], axis=1)).data
    return float(abs(many - one).max())


def evaluate(dataset, held_out: list[str], nets: dict, out: Path, mirror: list[int]) -> dict:
    """Predict every held-out case with every network, write the label maps, score, draw.

    `mirror`: answers are averaged with those to the mirror image. What an interrupted evaluation
    has written since the networks were, is scored as it lies there.
    """
    scores: dict = {name: {} for name in nets}
    cases = [case for case in dataset.cases if case.id in held_out]
    shown = {case.id for case in cases[:: max(1, len(cases) // 3)][:3]}
    for case in tqdm(cases, desc="evaluate", unit="case"):
        with during(f"evaluating case {case.id}"):
            scan, truth = case.read()
            maps = {"reference": truth}
            for name, net in nets.items():
                folder = out / ("predictions" if name == "3d" else f"predictions_{name}")
                target, model = folder / f"{case.id}.nii.gz", out / f"model_{name}.npz"
                if target.exists() and target.stat().st_mtime_ns >= model.stat().st_mtime_ns:
                    maps[name] = nifti.read(target, truth.dtype).array
                else:
                    maps[name] = ts.infer.segment(net, scan, mirror=mirror)
                    folder.mkdir(exist_ok=True)
                    nifti.write(target, maps[name], scan)
                scores[name][case.id] = ts.metrics.per_class(maps[name], truth, dataset.labels)
            if case.id in shown:
                image = np.clip(scan.array[..., 0], *ct.Plan(**net.metadata["plan"]).window)
                drawn(report.overlay, out / f"overlay_{case.id}.png", image, maps, dataset.labels,
                      scan.spacing, f"{dataset.name} {case.id}, held out")
    return {name: {"cases": per, "mean": ts.metrics.mean(per)} for name, per in scores.items()}


def tasks(out: Path, settings: dict) -> decathlon.Dataset:
    """The scans that the settings ask for; without any, a phantom that is written first."""
    folder = Path(settings["data"] or out / "phantom")
    if not (settings["data"] or settings["images"] or (folder / "dataset.json").exists()):
        report.write_json(out / "run.json", settings)
        print("no --data: writing a synthetic Decathlon folder to", folder)
        phantom.write(folder, cases=10 if settings["quick"] else 25, seed=settings["seed"])
    try:
        if not settings["images"]:
            return decathlon.load(folder)
        names = {int(number): name for number, name in settings.get("labels", {}).items()}
        return decathlon.pair(settings["images"], settings["label_maps"], settings["modality"],
                              names or None, partial(tqdm, desc="labels"))
    except FileNotFoundError as error:
        if "cases" in settings:
            error.add_note("where it lies now can be told with "
                           + ("--images and --labels" if settings["images"] else "--data"))
        raise


def work(out: Path, settings: dict) -> None:
    """The whole run, or what is left of it."""
    ts.device(settings["device"])  # before any work is done
    out.mkdir(parents=True, exist_ok=True)
    with files.held(out):
        files.sweep(out)
        execute(out, settings)


def execute(out: Path, settings: dict) -> None:
    """The whole run, in a folder that is ours alone."""
    description, dataset = out / "run.json", tasks(out, settings)
    names = {str(number): name for number, name in dataset.labels.items()}
    for key, found in (("labels", names), ("cases", [case.id for case in dataset.cases])):
        if settings.setdefault(key, found) != found:
            raise ValueError(f"{dataset.cases[0].label.parent}: the {key} are no longer those that "
                             f"the run in {out} began with; bring them back, or begin again in "
                             "another --out")
    train_ids, held_out = decathlon.folds(settings["cases"], settings["folds"])[settings["fold"]]
    anew = not (out / "checkpoint.npz").exists()
    flat: nn.Module = ts.models.resnet_seg(
        settings["backbone"], rank=2, in_channels=len(dataset.modalities), classes=len(names),
        seed=settings["seed"])
    if settings["pretrained"] and anew:
        begin_from(Path(settings["pretrained"]), flat)
    mirror = reflection(settings["mirror"], dataset.labels)
    report.write_json(description, settings)  # not before: a mistyped path begins no run
    training = [case for case in dataset.cases if case.id in train_ids]
    print(f"{dataset.name}: {len(training)} training and {len(held_out)} held-out cases, "
          f"classes {', '.join(names.values())}")
    if dataset.skipped:
        print(f"left out: {len(dataset.skipped)} ({', '.join(dataset.skipped)})")

    if "plan" not in settings:
        plan = ct.Plan.fit(tqdm(training, desc="read", unit="case"), settings["spacing"])
        settings["plan"] = asdict(replace(plan, mirror=mirror))
        report.write_json(description, settings)
    try:
        plan = ct.Plan(**settings["plan"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{description}: no usable plan ({error})") from None
    prepared = prepare(dataset, plan, out / "prepared", settings["seed"])
    cases = [prepared[case.id] for case in training]
    if not settings["patch"]:
        settings["patch"] = default_patch(cases, plan.spacing, VOXELS[settings["device"]])
    report.write_json(description, settings)
    settings = files.read_json(description)  # the same types now as after a resume
    patch = tuple(settings["patch"])
    small = sum(any(n < p for n, p in zip(case.label.shape, patch, strict=True)) for case in cases)
    print(f"spacing {' x '.join(f'{s:.3g}' for s in plan.spacing)} mm, patch "
          f"{' x '.join(map(str, patch))} voxels"
          + (f"; {small} smaller cases are padded" if small else ""))
    if settings["steps_3d"] and (wrong := starved(patch, settings["batch"])):
        raise ValueError(wrong)

    run = Run(out, settings)
    stage, resume = run.recall()
    pairs = None if plan.mirror is None else augment.numbered(plan.mirror, list(names.values()))

    def batches(size, count, salt):
        return lambda step, draw=sampling.batch: draw(
            cases, size, count, np.random.default_rng((settings["seed"], salt, step)),
            FOREGROUND, partial(augment.mild, pairs=pairs), first=step * count)

    metadata = {"plan": settings["plan"], "patch": patch, "labels": names,
                "dataset": dataset.name}
    if stage == "2d":
        if settings["pretrained"] and anew:
            draw = batches(patch[1:], SLICES, 1)
            ts.pretrained.recalibrate(flat, (draw(i)[0] for i in range(8)))
            print("batch-norm recalibrated on 8 batches of training slices; in eval mode nothing "
                  "changed")
        run.train("2d", flat, batches(patch[1:], SLICES * settings["batch"], 2),
                  settings["steps_2d"], resume)
        ts.save(out / "model_2d.npz", ts.to_device(flat, "cpu"), **metadata)
        resume = None
    flat = ts.load(out / "model_2d.npz")

    deep = ts.inflate(flat, profile=settings["profile"])
    difference = equivalence(flat, deep, patch, settings["seed"])
    print(f"2D and inflated 3D logits differ by at most {difference:.2g} on an input constant "
          "along depth")
    if not (resume and resume[1] >= settings["steps_3d"] and (out / "model_3d.npz").exists()):
        run.train("3d", deep, batches(patch, settings["batch"], 3), settings["steps_3d"], resume)
        ts.save(out / "model_3d.npz", ts.to_device(deep, "cpu"), **metadata)

    nets = {name: ts.to_device(ts.load(out / f"model_{name}.npz"), run.device)
            for name in ("2d", "3d")}
    axes = [] if plan.mirror is None else [augment.LEFT_RIGHT]
    models = evaluate(dataset, held_out, nets, out, axes)
    report.write_json(out / "metrics.json", {
        "config": settings, "models": models,
        "equivalence": {"max_abs_difference": difference},
        "scoring": {"grid": "the scans' own", "overlap": 0.5,
                    "mean_with_mirror_image": bool(axes), "exchanged_classes": plan.mirror or []}})
    print(report.score_lines({name: m["mean"] for name, m in models.items()}, "dice"))
    print(f"on {len(held_out)} held-out cases; see {out / 'progress.png'} and overlay_*.png")


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns its exit code."""
    report.spell_out()
    try:
        work(*arguments(argv))
    except KeyboardInterrupt:
        print("\nstopped; go on with --resume and the same --out", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        told = ", ".join([str(error), *getattr(error, "__notes__", [])])
        if isinstance(error, MemoryError):
            told = (f"out of memory: {told}; a new run needs less with a smaller --patch or "
                    "--batch, or a coarser --spacing")
        tqdm.write(f"error: {told}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
