"""Figures, tables and files that a person reads: curves, overlays, scores."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, product
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .files import whole

# matplotlib is imported where it draws: it takes longer to load than all of tinyseg.
COLOURS = ("#ffb000", "#dc267f", "#648fff", "#fe6100", "#785ef0", "#009e73", "#56b4e9", "#d55e00")
STYLES = ("-", "--", ":", "-.")  # of lines, after the last colour
PER_ROW = 3  # names in a row of a legend
PLANES = (("axial", 0, (1, 2)), ("coronal", 1, (0, 2)), ("sagittal", 2, (0, 1)))  # axes of each


def spell_out() -> None:
    """Let a terminal spell out letters that it lacks (\\u80f0), where printing them would fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def write_json(path: str | Path, content: Any) -> None:
    """JSON with null for every number that is not finite, written whole or not at all."""

    def plain(x):
        if isinstance(x, Mapping):
            return {str(key): plain(value) for key, value in x.items()}
        if isinstance(x, list | tuple):
            return [plain(value) for value in x]
        return None if isinstance(x, float) and not isfinite(x) else x

    with whole(Path(path)) as draft:
        draft.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n",
                         encoding="utf-8")


def write_table(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV with one line a row and all keys that occur as columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with whole(Path(path)) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def drawn(figure: Callable, path: Path, *content: Any) -> None:
    """`figure(path, *content)`; a picture that cannot be drawn is told, and ends nothing."""
    try:
        figure(path, *content)
    except Exception as error:  # whatever a drawing library raises
        tqdm.write(f"{path}: not drawn ({type(error).__name__}: {error})", file=sys.stderr)


def progress(path: str | Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Loss, Dice on training patches and learning rate over the steps, one column a stage.

    `history` rows have "stage", "step", "loss", "lr", "patch_dice CLASS", "uniform_dice CLASS", of
    patches drawn anywhere, dashed, and "validation CLASS", of held-out cases, dotted. Thin lines
    are single steps, thick ones an average over the last tenth.
    """
    stages = list(dict.fromkeys(row["stage"] for row in history))
    if not stages:
        return
    figure = new_figure(6 * len(stages), 8)
    panels = figure.subplots(3, len(stages), squeeze=False, sharex="col", sharey="row")
    for column, stage in enumerate(stages):
        rows = [row for row in history if row["stage"] == stage]
        keys = {kind: list(dict.fromkeys(k for row in rows for k in row if k.startswith(kind)))
                for kind in ("patch_dice", "uniform_dice", "validation")}
        panels[0, column].set_title(f"{stage}: {len(rows)} steps")
        _curves(panels[0, column], rows, ["loss"], "loss (cross-entropy + Dice)")
        _curves(panels[1, column], rows, keys["patch_dice"], "Dice on training patches")
        _curves(panels[1, column], rows, keys["uniform_dice"],
                "", average=False, style="--")
        _curves(panels[1, column], rows, keys["validation"], "Dice of patches\n(dashed: anywhere, "
                "\ndotted: held out)", average=False, style=":o")
        panels[1, column].set_ylim(0, 1)
        _curves(panels[2, column], rows, ["lr"], "learning rate", average=False)
        panels[2, column].set_xlabel("step")
    write_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, in inches, that needs no screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _curves(panel, rows, keys, label, average=True, style="-"):
    for key, colour in zip(keys, COLOURS * (1 + len(keys)), strict=False):
        points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
        steps, values = np.array(points, float).reshape(-1, 2).T
        width = max(1, len(values) // 10) if average else 1
        panel.plot(steps, values, style, color=colour, linewidth=0.8 if width > 1 else 2,
                   alpha=0.3 if width > 1 else 1)
        if width > 1:
            smooth = np.convolve(values, np.ones(width) / width, "valid")
            panel.plot(steps[width - 1 :], smooth, color=colour, linewidth=2,
                       label=key.removeprefix("patch_dice "))
    panel.set_ylabel(label)
    panel.grid(alpha=0.3)
    if len(keys) > 1 and panel.get_legend_handles_labels()[0]:
        panel.legend(loc="lower right", ncols=PER_ROW, fontsize="small")


def overlay(path: str | Path, image: np.ndarray, maps: Mapping[str, np.ndarray],
            labels: Mapping[int, str], spacing: Sequence[float], title: str = "") -> None:
    """A scan with several label maps side by side, in the three planes through its foreground.

    image (D, H, W) in (S, A, R) axes, maps {name: (D, H, W)} of which the first is the reference;
    spacing in mm. Each plane is the one that shows most foreground in the reference. Radiological
    view: superior or anterior is up, the patient's right is on the left. Planes that are one voxel
    thin are left out.
    """
    reference = next(iter(maps.values()))
    window = np.percentile(image, (1, 99.5))
    planes = [plane for plane in PLANES if min(image.shape[a] for a in plane[2]) > 1] or PLANES
    extent = np.multiply(image.shape, spacing)
    heights = [extent[rest[0]] / extent[rest[1]] for _, _, rest in planes]
    rows = -(-(len(labels) - 1) // PER_ROW)
    figure = new_figure(3 * (1 + len(maps)), 3 * sum(heights) + 0.8 + 0.25 * rows)
    panels = figure.subplots(len(planes), 1 + len(maps), squeeze=False, height_ratios=heights)
    for row, (plane, axis, rest) in enumerate(planes):
        at = int((reference > 0).sum(axis=rest).argmax())
        for column, (name, shown) in enumerate([("scan", None), *maps.items()]):
            panel = panels[row, column]
            _cut(panel, image, shown, axis, rest, at, spacing, window, labels)
            if row == 0:
                panel.set_title(name)
            if column == 0:
                panel.set_ylabel(f"{plane} {at}")
    _legend(figure, panels[-1, 0], labels)
    figure.suptitle(title)
    write_figure(figure, path)


def examples(path: str | Path, cases: Sequence[tuple[str, np.ndarray, np.ndarray, Sequence[float]]],
             labels: Mapping[int, str], title: str = "") -> None:
    """Cases below each other, each in three planes: (name, image (D, H, W), label map, spacing).

    Planes, axes and lines are those of `overlay`.
    """
    extent = np.max([np.multiply(image.shape, spacing) for _, image, _, spacing in cases], axis=0)
    depth, height, width = extent / extent.max()
    scale = 10 / (2 * width + height)  # inches
    rows = -(-(len(labels) - 1) // PER_ROW)
    figure = new_figure(10, scale * max(depth, height) * len(cases) + 0.8 + 0.25 * rows)
    panels = figure.subplots(len(cases), len(PLANES), squeeze=False,
                             width_ratios=(width, width, height))
    for row, (name, image, shown, spacing) in enumerate(cases):
        window = np.percentile(image, (1, 99.5))
        for panel, (plane, axis, rest) in zip(panels[row], PLANES, strict=True):
            at = int((shown > 0).sum(axis=rest).argmax())
            _cut(panel, image, shown, axis, rest, at, spacing, window, labels)
            panel.set_title(f"{plane} {at}", fontsize="small")
        panels[row, 0].set_ylabel(name)
    _legend(figure, panels[-1, 0], labels)
    figure.suptitle(title)
    write_figure(figure, path)


def forest(path: str | Path, rows: Sequence[tuple[str, float, float, float]], title: str = ""
           ) -> None:
    """Differences with their intervals, (name, mean, low, high), one below the other; those that
    hold zero are grey."""
    figure = new_figure(7, 1.2 + 0.32 * len(rows))
    panel = figure.subplots()
    for y, (_, mean, low, high) in enumerate(rows):
        colour = "#888888" if low <= 0 <= high else COLOURS[2]
        panel.plot([low, high], [y, y], color=colour, linewidth=2)
        panel.plot([mean], [y], "o", color=colour)
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set_yticks(range(len(rows)), [name for name, *_ in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.grid(axis="x", alpha=0.3)
    panel.set_xlabel(title)
    write_figure(figure, path)


def _lines(labels: Mapping[int, str]) -> dict[int, tuple[str, str]]:
    """{number: (style, colour)} of the outlines of all classes but the background."""
    return dict(zip(filter(None, labels), cycle(product(STYLES, COLOURS)), strict=False))


def coloured(slices: np.ndarray, labels: np.ndarray, window: Any, names: Mapping[int, str]
             ) -> np.ndarray:
    """Slices (N, H, W) as pictures (N, H, W, 3) of bytes with the outlines of their labels, in the
    colours and the view of `overlay`; window: the values that are black and white."""
    low, high = window
    grey = np.clip((slices.astype("float32") - low) / max(high - low, 1e-9), 0, 1) * 255
    found = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)
    for number, (_, colour) in _lines(names).items():
        inside = np.pad(labels == number, ((0, 0), (1, 1), (1, 1)))
        core = inside[:, 1:-1, 1:-1].copy()
        for axis, shift in product((1, 2), (1, -1)):
            core &= np.roll(inside, shift, axis)[:, 1:-1, 1:-1]
        found[(labels == number) & ~core] = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return found[:, ::-1, ::-1]


def learning(path: str | Path, rows: Sequence[Mapping[str, Any]], label: str = "Dice") -> None:
    """Dice of ways against steps and against seconds: the mean over runs, and a band to the least
    and the most. `rows` have "way", "step", "seconds" and "dice"."""
    figure = new_figure(10, 4)
    panels = figure.subplots(1, 2, sharey=True)
    ways = list(dict.fromkeys(row["way"] for row in rows))
    for way, (style, colour) in zip(ways, cycle(product(STYLES, COLOURS)), strict=False):
        mine = [row for row in rows if row["way"] == way]
        steps = sorted({row["step"] for row in mine})
        runs = [[row for row in mine if row["step"] == step] for step in steps]
        low, middle, high = ([f([row["dice"] for row in run]) for run in runs]
                             for f in (min, np.mean, max))
        for panel, x in ((panels[0], steps), (panels[1], [
                np.mean([row["seconds"] for row in run]) for run in runs])):
            panel.plot(x, middle, style, color=colour, label=way, marker=".")
            panel.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            panel.grid(alpha=0.3)
    panels[0].set_xlabel("step")
    panels[1].set_xlabel("seconds of training")
    panels[0].set_ylabel(label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    write_figure(figure, path)


def scatter(path: str | Path, pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
            reference: str, label: str = "Dice") -> None:
    """Scores of single cases, a panel a way: of the reference along x, of the way along y."""
    figure = new_figure(2.6 * min(4, len(pairs)) + 0.4, 3 * -(-len(pairs) // 4) + 0.4)
    panels = figure.subplots(-(-len(pairs) // 4), min(4, len(pairs)), squeeze=False, sharex=True,
                             sharey=True)
    for panel in panels.flat[len(pairs):]:
        panel.set_axis_off()
    for panel, (name, (x, y)) in zip(panels.flat, pairs.items(), strict=False):
        panel.plot([0, 1], [0, 1], color="black", linewidth=0.8)
        panel.plot(x, y, ".", color=COLOURS[2], alpha=0.6)
        better = np.mean(np.asarray(y) > np.asarray(x))
        panel.set_title(f"{name}\n{better:.0%} above", fontsize="small")
        panel.set_box_aspect(1)
    low = min(min(*x, *y) for x, y in pairs.values())
    panels[0, 0].set_xlim(max(0, low - 0.02), 1)
    panels[0, 0].set_ylim(max(0, low - 0.02), 1)
    figure.supxlabel(f"{label}, {reference}", fontsize="small")
    figure.supylabel(label, fontsize="small")
    write_figure(figure, path)


def kernels(path: str | Path, rows: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Kernels as pictures, a row of them after each name: one (k, k) of a slice, or T of a volume.
    Red is positive, blue negative, on one scale."""
    wide, most = max(map(len, rows.values())), max(
        float(abs(np.asarray(each)).max()) for row in rows.values() for each in row)
    figure = new_figure(1.6 + 1.3 * wide, 1.4 * len(rows))
    panels = figure.subplots(len(rows), wide, squeeze=False)
    for line, (name, row) in zip(panels, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
        for panel in line:
            panel.set(xticks=[], yticks=[])
        for panel in line[len(row):]:
            panel.set_axis_off()
        for t, (panel, each) in enumerate(zip(line, row, strict=False)):
            panel.imshow(each, cmap="RdBu_r", vmin=-most, vmax=most)
            if len(row) > 1:
                panel.set_title(f"slot {t}", fontsize="small")
    write_figure(figure, path)


def _cut(panel: Any, image: np.ndarray, shown: np.ndarray | None, axis: int, rest: tuple[int, int],
         at: int, spacing: Sequence[float], window: Any, labels: Mapping[int, str]) -> None:
    """One plane of a scan on a panel, the `at`-th along `axis`, with outlines of a label map."""
    panel.imshow(_view(image.take(at, axis)), cmap="gray", vmin=window[0], vmax=window[1],
                 aspect=spacing[rest[0]] / spacing[rest[1]], interpolation="nearest")
    if shown is not None:
        cut = _view(shown.take(at, axis))
        edges = [np.arange(-1, n + 1) for n in reversed(cut.shape)]
        for number, (style, colour) in _lines(labels).items():
            if (cut == number).any():  # a border around it: a line needs two voxels
                panel.contour(*edges, np.pad(cut == number, 1), [0.5], linewidths=1.4,
                              colors=colour, linestyles=style)
        panel.set_xlim(-0.5, cut.shape[1] - 0.5)
        panel.set_ylim(cut.shape[0] - 0.5, -0.5)
    panel.set_xticks([])
    panel.set_yticks([])


def _legend(figure: Any, panel: Any, labels: Mapping[int, str]) -> None:
    for number, (style, colour) in _lines(labels).items():
        panel.plot([], [], style, color=colour, label=labels[number])
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center",
                  ncols=min(PER_ROW, len(labels) - 1))


def _view(plane: np.ndarray) -> np.ndarray:
    """Rows downwards and the last axis reversed: how a radiologist hangs the picture."""
    return plane[::-1, ::-1]


def write_figure(figure: Any, path: str | Path) -> None:
    """The figure as a PNG, whole or not at all."""
    with whole(Path(path)) as draft:
        figure.savefig(draft, dpi=110)


def score_lines(means: Mapping[str, Mapping[str, Mapping[str, float]]], measure: str) -> str:
    """{model: {class: {measure: mean}}} as a small text table, one line a class.

    >>> print(ts.report.score_lines({"2d": {"liver": {"dice": 0.5}}}, "dice"))
    mean dice        2d
    liver         0.500
    """
    classes = list(next(iter(means.values())))
    width = max(len(text) for text in (*classes, f"mean {measure}"))
    lines = [f"{'mean ' + measure:{width}}" + "".join(f"{model:>10}" for model in means)]
    lines += [f"{c:{width}}" + "".join(f"{scores[c][measure]:10.3f}" for scores in means.values())
              for c in classes]
    return "\n".join(lines)


MEASURES = {"dice": "Dice", "iou": "IoU", "surface_dice": "surface Dice", "hausdorff95": "HD95 mm",
            "mean_surface_distance": "distance mm", "prediction_ml": "predicted ml",
            "reference_ml": "reference ml"}


def summary(means: Mapping[str, Mapping[str, float]],
            counts: Mapping[str, Mapping[str, int]]) -> str:
    """The means of `metrics.mean` as a text table, one line a class, and what they leave out."""
    width = max([len(name) for name in means] + [10])
    measures = [m for m in MEASURES if any(m in scores for scores in means.values())]
    lines = [" ".join([f"{'mean':{width}}", *(f"{MEASURES[m]:>12}" for m in measures)])]
    lines += [" ".join([f"{name:{width}}", *(f"{scores[m]:12.3f}" for m in measures)])
              for name, scores in means.items()]
    for name, told in counts.items():
        if told["empty_predictions"] or told["empty_references"]:
            lines.append(f"{name}: empty in {told['empty_predictions']} predictions and"
                         f" {told['empty_references']} references of {told['cases']}; its distance"
                         f" is infinite, and not in the mean, in {told['infinite_distances']}")
    return "\n".join(lines)
