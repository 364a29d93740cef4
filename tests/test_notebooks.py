"""The lessons: they run from top to bottom with the solutions; blanks, and what a student might
write wrongly, fail with a message that helps; and the notebooks are what their sources say."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import emulator
import pytest
import strictarray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples/notebooks"))

import lessons  # noqa: E402

LOOPS = """    for i in range(x.shape[0] - kernel[0] + 1):
        for j in range(x.shape[1] - kernel[1] + 1):
            """
FOLD = """    rows = iter(columns)
    for i in range(size[0] - kernel[0] + 1):
        for j in range(size[1] - kernel[1] + 1):
            block, row = x[i : i + kernel[0], j : j + kernel[1]], next(rows)
            """
WRONG = {  # of each exercise, in order: what a student might write, and a word of what is said
    "1_one_number_many_paths": [
        [("lambda g: ...", "lambda g: y * (1 - y)", "times that|along a random direction"),
         ("lambda g: ...", "lambda g: g * y", "input 0.*times that"),
         ("lambda g: ...", "lambda g: g * x * (1 - x)", "input 0.*times that")],
        [("= ...\nedges = ...", "= 27\nedges = 4", "differentiate"),
         ("= ...\nedges = ...", "= 29\nedges = 3", "count how often"),
         ("= ...\nedges = ...", "= 29\nedges = 2", "count how often")],
        [("= ...", "= first", "first is right"), ("= ...", "= third", "third is right"),
         ("= ...", "= 'second'", "without quotes")],
        [("...  # go", "loss.backward()  # go", "no number yet"),
         ("= ...  # a", "= parameter.data - rate * parameter.grad  # a", "loss.backward..."),
         ("...  # go backward\n    for parameter in net.parameters():\n        "
          "parameter.data[...] = ...", "loss.backward()\n    for parameter in net.parameters():\n"
          "        parameter.data[...] = parameter.data + rate * parameter.grad", "minus the")]],
    "2_three_readings_of_one_sum": [
        [("    ...\n", LOOPS + "rows.append(x[i : i + kernel[0], j : j + kernel[1]].ravel('F'))\n",
          "check the order"),
         ("    ...\n", LOOPS.replace(" + 1", "") + "rows.append(x[i : i + kernel[0], "
          "j : j + kernel[1]].ravel())\n", "4 x 5 windows fit"),
         ("    ...\n", LOOPS + "rows.append(x[i, j])\n", "each sees 3 x 4 x 2")],
        [("    ...\n", FOLD + "block[...] = row.reshape(block.shape)\n", "added up"),
         ("    ...\n", FOLD + "block += row.reshape(block.shape[::-1]).T\n", "row i of c"),
         ("    ...\n", FOLD + "block += row.sum()\n", "row i of c")],
        [("= ...\nmebibytes = ...", "= 16 * 24 * 24 * 27 * 64\nmebibytes = 61", "channels in x"),
         ("= ...\nmebibytes = ...", "= 14 * 22 * 22 * 27 * 64 * 64\nmebibytes = 61", "positions"),
         ("= ...\nmebibytes = ...", "= 16 * 24 * 24 * 27 * 64 * 64\nmebibytes = 15.2", "4 bytes")],
        [("return ...", "return (x[1] - x[2]) * (w[0] - w[1] + w[2]) / 2", "y is off"),
         ("return ...", "return (x[2] - x[1]) * (w[0] + w[1] - w[2]) / 2", "y is off"),
         ("return ...", "return (x[2] - x[1]) * (w[0] - w[1] + w[2])", "y is off")]],
    "3_what_one_voxel_sees": [
        [("= ...", "= 7 + 2 * 2", "a layer before"), ("= ...", "= 7 * 3 * 5", "step is 1"),
         ("= ...", "= 7 + 2 * 2 + 2 * 4", "then 4")],
        [("= ...", "= 10**2", "further in"), ("= ...", "= 9 * 9", "each layer"),
         ("= ...", "= 0", "each layer")],
        [("= ...", "= 16 / 24", "that is one axis"), ("= ...", "= 1 / 9", "8 positions x 3 taps"),
         ("= ...", "= 5 / 9", "count along one axis")],
        [("= ...", "= 3", "see 7 pixels"), ("= ...", "= 5", "4 see 9 already"),
         ("= ...", "= 8", "more than needed")]],
    "4_a_slice_becomes_a_stack": [
        [("    ...\n", "    alpha[:] = -1 / slots\n    alpha[slots // 2] = 2\n", "not to one"),
         ("    ...\n", "    alpha[:] = -1 / slots\n    alpha[0] = 2 - 1 / slots\n", "T // 2"),
         ("    ...\n", "    alpha[slots // 2] = 1\n", "3 slots are")],
        [("= ...  # a", "= {0}  # a", "more than"), ("= ...  # a", "= {0, 5}  # a", "not .5."),
         ("= ...  # a", "= [0, 1]  # a", "write a set")],
        [("= ...", "= rng.standard_normal((1, 10, 12, 1))", "exact is off by .* smeared"),
         ("= ...", "= 0", "exact is all zeros"), ("= ...", "= 1", "different is off")],
        [("...  # v", "v[...] = 1 / 3  # v", "every channel"),
         ("...  # v", "v[...] = np.eye(4)  # v", "its own slice"),
         ("...  # v", "v = np.eye(4)  # v", "fill it")]],
    "5_does_it_help": [
        [("return ...", "return (predicted & truth).sum() / (predicted | truth).sum()", "2 x 4"),
         ("return ...", "return 2 * (predicted & truth).sum() / max(1, predicted.sum() + "
          "truth.sum())", "it is nan, not 0"),
         ("return ...", "return (predicted == truth).mean()", "2 x 4 / .* not 0.5")],
        [("= ...", "= differences[rng.integers(len(differences), size=times)]", "with replacement"),
         ("= ...", "= [rng.permutation(differences).mean() for _ in range(times)]", "wide, not"),
         ("= ...", "= differences[rng.integers(len(differences), size=(times, 5))].mean(axis=1)",
          "as many cases")],
        [("= ...", "= 3", "two sets"), ("= ...", "= {*range(12)}", "better: seed"),
         ("better = ...  # a set of seeds, 0 to 11\nworse = ...",
          "ends = [bootstrap(row, np.random.default_rng(0)) for row in study]\n"
          "better = {s for s in range(12) if ends[s][0] > 0}\n"
          "worse = {s for s in range(12) if ends[s][0] < 0}", "worse: seed .* its signs")]],
    "6_a_kernel_thread_by_thread": [
        [("= ...\nenough = ...", "= 256 * 9 * 4\nenough = 832", "returns before it reads"),
         ("= ...\nenough = ...", "= 200 * 9\nenough = 832", "has 4 bytes"),
         ("= ...\nenough = ...", "= 7200\nenough = 800", "the last window")],
        [("= ...", "= 'if (first + t < size) tile[t] = x[first + t];'", "nan: nobody brought"),
         ("= ...", "= 'for (int i = t; i < 72; i += 64) tile[i] = x[first + i];'",
          "past the end of argument 0, float32 of shape .208.*line 5"),
         ("= ...", "= 'for (int i = t; i < 72; i += 64) tile[i] = x[i];'", "begins at first")],
        [("= ...", "= {'a'}", "lines that race:\n.*part.t. "),
         ("= ...", "= {'a', 'b'}", "b stands inside the if"),
         ("= ...", "= {'a', 'c', 'd'}", "one is more than needed")]],
}


SOURCES = lessons.sources()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_lesson_runs_and_checks_what_is_written(path, monkeypatch, capsys):
    if "sklearn" in path.read_text("utf-8"):
        pytest.importorskip("sklearn")
    if "emulator" in path.read_text("utf-8"):
        if reason := emulator.missing():
            pytest.skip(reason)
        monkeypatch.setitem(sys.modules, "cupy", strictarray.library("cupy", device=True))
    monkeypatch.chdir(lessons.HERE)
    names, wrong = {"__name__": path.stem}, list(WRONG.get(path.stem, []))
    for first, *rest in lessons.steps(path):
        if not rest:
            exec(compile(first, str(path), "exec"), names)
            continue
        check, right = rest
        tried = [(first, ".")] + [(first.replace(blank, written), says)
                                 for blank, written, says in wrong.pop(0)]
        assert "..." in first and all(text != first for text, _ in tried[1:])
        for text, says in tried:
            mine = dict(names)
            with pytest.raises((AssertionError, TypeError, ValueError, RuntimeError), match=says):
                exec(compile(text, "an answer", "exec"), mine)
                exec(compile(check, "a check", "exec"), mine)
        exec(compile(right, "a solution", "exec"), names)
        capsys.readouterr()
        exec(compile(check, "a check", "exec"), names)
        assert capsys.readouterr().out.startswith("right")
    assert not wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_cells_are_short_and_every_exercise_has_a_hint(path):
    for is_text, tag, body in lessons.cells(path):
        if not is_text:
            ast.parse(body)
            assert len([line for line in body.split("\n") if line.strip()]) <= 10, body
        if tag == "solution":
            assert body.count("<details>") == body.count("</details>") == 2
            assert "<summary>Hint</summary>" in body and "<summary>Solution</summary>" in body


def test_the_notebooks_are_what_their_sources_say(capsys):
    assert len(SOURCES) > 0 and lessons.main(["--check"]) == 0, capsys.readouterr().out


def test_a_notebook_is_made_of_its_source(tmp_path, monkeypatch, capsys):
    shutil.copy(SOURCES[0], tmp_path)
    monkeypatch.setattr(lessons, "HERE", tmp_path)
    assert lessons.main(["--check"]) == 1 and "is not what" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.ipynb"))
    assert lessons.main([]) == 0 and lessons.main(["--check"]) == 0
    made = json.loads(next(tmp_path.glob("*.ipynb")).read_text("utf-8"))
    kinds = [cell["cell_type"] for cell in made["cells"]]
    assert kinds[0] == "markdown" and made["cells"][0]["source"][0].startswith("# ")
    assert all(cell["outputs"] == [] for cell in made["cells"] if cell["cell_type"] == "code")
    blanks = [cell for cell in made["cells"] if cell["metadata"].get("tags") == ["exercise"]]
    assert len(blanks) == len(WRONG[SOURCES[0].stem])
    assert all("..." in "".join(cell["source"]) for cell in blanks)
    solved = [cell for cell in lessons.notebook(SOURCES[0], solved=True)["cells"]
              if cell["metadata"].get("tags") == ["exercise"]]
    assert [cell["source"] for cell in solved] != [cell["source"] for cell in blanks]


def test_an_index_links_to_what_is_there(tmp_path):
    lessons.index(tmp_path)
    text = (tmp_path / "index.html").read_text("utf-8")
    links = re.findall(r'href="(.*?)"', text)
    assert links == [f"{path.stem}.html" for path in SOURCES] and "**" not in text
    (tmp_path / "tinyseg.html").touch()
    lessons.index(tmp_path)
    assert "tinyseg.html" in (tmp_path / "index.html").read_text("utf-8")


def test_a_source_that_is_none_is_refused(tmp_path):
    (tmp_path / "x.py").write_text("print(1)\n", encoding="utf-8")
    with pytest.raises(ValueError, match="does not begin with a cell"):
        list(lessons.cells(tmp_path / "x.py"))
