"""Figures and texts: what a person must be able to see in them."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tinyseg import report

RNG = np.random.default_rng


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, drawn."""
    kept, save = [], report.write_figure

    def keep(figure, path):
        save(figure, path)
        figure.canvas.draw()
        kept.append(figure)

    monkeypatch.setattr(report, "write_figure", keep)
    return kept


def organs(count, shape=(9, 20, 24)):
    """A label map of boxes in which every number occurs in each middle plane, and their names."""
    labels = np.zeros(shape, np.uint8)
    for number in range(1, count + 1):
        labels[:, number % shape[1], number % shape[2]] = number
    return labels, {0: "background", **{n: f"right adrenal gland {n}" for n in range(1, count + 1)}}


@pytest.mark.parametrize("count", [1, 2, 9, 15, 31])
def test_the_legend_of_an_overlay_lies_inside_the_picture_in_the_order_of_the_numbers(
        tmp_path, figures, count):
    labels, names = organs(count)
    image = RNG(0).standard_normal(labels.shape)
    report.overlay(tmp_path / "a.png", image, {"reference": labels, "3d": labels}, names, (5, 3, 2))
    legend = figures[0].legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [*names.values()][1:]
    box, page = legend.get_window_extent(), figures[0].bbox
    assert box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0
    looks = {(line.get_color(), line.get_linestyle()) for line in legend.get_lines()}
    assert len(looks) == count  # no two classes look alike


@pytest.mark.parametrize("shape", [(1, 20, 24), (9, 1, 24), (9, 20, 1), (2, 2, 2), (1, 1, 5)])
def test_scans_of_one_slice_are_drawn_in_the_planes_that_they_have(tmp_path, figures, shape):
    labels = np.zeros(shape, np.uint8)
    labels[tuple(n // 2 for n in shape)] = 2
    report.overlay(tmp_path / "a.png", RNG(0).standard_normal(shape), {"reference": labels},
                   {0: "b", 2: "tumour"}, (5, 3, 2))
    shown = [axes.get_ylabel().split()[0] for axes in figures[0].axes if axes.get_ylabel()]
    thin = [axis for axis, n in enumerate(shape) if n == 1]
    planes = {0: "axial", 1: "coronal", 2: "sagittal"}
    assert set(shown) == ({planes[thin[0]]} if len(thin) == 1 else set(planes.values()))
    drawn = sum(len(axes.collections) for axes in figures[0].axes)
    assert drawn == len(shown)  # the voxel has its line in every plane


def test_cases_are_drawn_below_each_other_where_they_have_most_foreground(tmp_path, figures):
    cases = []
    for row, shape in enumerate([(9, 20, 24), (1, 7, 6), (12, 5, 8)]):
        labels = np.zeros(shape, np.uint8)
        middle = tuple(n // 2 for n in shape)
        labels[middle] = 7 if row < 2 else 2
        cases.append((f"case {row}", RNG(row).standard_normal(shape), labels, (5, 3, 2)))
    report.examples(tmp_path / "a.png", cases, {0: "background", 2: "tumour", 7: "liver"}, "three")
    panels = np.reshape([axes for axes in figures[0].axes], (3, 3))
    for (name, image, labels, spacing), row in zip(cases, panels, strict=True):
        assert row[0].get_ylabel() == name
        for axis, (panel, plane) in enumerate(zip(row, ("axial", "coronal", "sagittal"),
                                                  strict=True)):
            at = labels.shape[axis] // 2
            assert panel.get_title() == f"{plane} {at}"
            np.testing.assert_array_equal(panel.images[0].get_array(),
                                          image.take(at, axis)[::-1, ::-1])
            up, across = (spacing[a] for a in range(3) if a != axis)
            assert panel.get_aspect() == up / across and len(panel.collections) == 1
    legend = figures[0].legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["tumour", "liver"]
    assert legend.get_window_extent().y0 >= figures[0].bbox.y0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_both_kinds_of_dice_are_drawn_over_the_steps(tmp_path, figures):
    rows = [{"stage": "3d", "step": step, "loss": 1.0, "lr": 0.1,
             **({"patch_dice liver": 0.5} if step % 2 == 0 else {}),
             **({"uniform_dice liver": 0.25} if step > 2 else {})} for step in range(8)]
    report.progress(tmp_path / "a.png", rows)
    lines = {line.get_linestyle(): line.get_xydata() for line in figures[0].axes[1].lines}
    np.testing.assert_array_equal(lines["-"], [(step, 0.5) for step in (0, 2, 4, 6)])
    np.testing.assert_array_equal(lines["--"], [(step, 0.25) for step in range(3, 8)])


ASCII = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, env=ASCII,
                          check=True)


def test_letters_that_a_terminal_lacks_are_spelt_out():
    done = python("import sys; from tinyseg import report; report.spell_out();"
                  r"print('\u80f0\u817a'); print('\u80bf', file=sys.stderr)")
    assert done.stdout.strip() == rb"\u80f0\u817a" and done.stderr.strip() == rb"\u80bf"


def test_files_are_utf8_whatever_the_locale(tmp_path):
    python(f"from tinyseg import report; report.write_json(r'{tmp_path / 'a.json'}', ['a']);"
           rf"report.write_table(r'{tmp_path / 'a.csv'}', [{{'\u80f0': 1}}])")
    assert (tmp_path / "a.csv").read_text(encoding="utf-8").startswith("\u80f0")
