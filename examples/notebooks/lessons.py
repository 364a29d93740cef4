"""The lessons, and pages about one subject each, as notebooks: their sources are the .py files
beside this one that are numbered or called about_*.

  python examples/notebooks/lessons.py               write the .ipynb of each, without outputs
  python examples/notebooks/lessons.py --check       say which is not what its source says
  python examples/notebooks/lessons.py --run FOLDER  run all with their solutions, a page each, and
                                                     an index.html

The second exits with 1 where there is one; the third needs nbconvert and ipykernel (pip install -e
".[lessons]").

A source is made of cells, each behind a line "# %%", with "[markdown]" where it is text. An
exercise is a cell tagged "exercise" with "..." for what is to be written, one tagged "check", and
text tagged "solution" with a hint and the code.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
CELL = re.compile(r'^# %%( \[markdown\])?(?: tags=\["(\w+)"\])?\n', re.M)


def sources() -> list[Path]:
    """The lessons in their order, then the pages."""
    return [*sorted(HERE.glob("[0-9]_*.py")), *sorted(HERE.glob("about_*.py"))]


def cells(path: Path) -> Iterator[tuple[bool, str | None, str]]:
    """(whether it is text, its tag, what it says) of every cell of a source."""
    text = path.read_text("utf-8")
    marks = list(CELL.finditer(text))
    if not marks or marks[0].start():
        raise ValueError(f"{path}: does not begin with a cell, a line with # %%")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=True):
        body = text[mark.end() : end].rstrip("\n")
        if mark[1]:
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.split("\n"))
        yield bool(mark[1]), mark[2], body


def solution(text: str) -> str:
    """The code in a cell that holds a solution."""
    code, = re.findall(r"```python\n(.*?)\n```", text, re.S)
    return code


def steps(path: Path) -> Iterator[tuple[str, ...]]:
    """A lesson as (code,) and (exercise with its blank, check, solution), in order."""
    waiting: list[str] = []
    for is_text, tag, body in cells(path):
        if tag in ("exercise", "check"):
            waiting.append(body)
        elif tag == "solution":
            blank, check = waiting
            waiting = []
            yield blank, check, solution(body)
        elif not is_text:
            yield (body,)


def notebook(path: Path, solved: bool = False) -> dict:
    """What the .ipynb of a source holds, version 4.5 of the format; `solved`: with its solutions in
    place of the blanks."""
    right = [step[2] for step in steps(path) if len(step) > 1][::-1]
    found: list[dict] = []
    for number, (is_text, tag, body) in enumerate(cells(path)):
        if solved and tag == "exercise":
            body = right.pop()
        cell = {"cell_type": "markdown" if is_text else "code", "id": f"cell-{number}",
                "metadata": {"tags": [tag]} if tag else {},
                "source": body.splitlines(keepends=True)}
        found.append(cell if is_text else cell | {"execution_count": None, "outputs": []})
    return {"cells": found, "metadata": {"kernelspec": {
        "display_name": "Python 3", "language": "python", "name": "python3"}},
        "nbformat": 4, "nbformat_minor": 5}


def written(path: Path) -> str:
    """The text of a lesson's .ipynb."""
    return json.dumps(notebook(path), indent=1, ensure_ascii=False) + "\n"


def run(path: Path, folder: Path) -> float:
    """Run a lesson with its solutions and write it as a page; seconds that it took."""
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import ExecutePreprocessor

    content = nbformat.reads(json.dumps(notebook(path, solved=True)), as_version=4)
    began = time.monotonic()
    ExecutePreprocessor(timeout=600).preprocess(content, {"metadata": {"path": str(HERE)}})
    seconds = time.monotonic() - began
    page, _ = HTMLExporter().from_notebook_node(content)
    (folder / f"{path.stem}.html").write_text(page, encoding="utf-8")
    return seconds


def index(folder: Path) -> None:
    """What is in the folder: the titles and first paragraphs of all pages, and `pdoc`'s of the
    library where it was called before."""
    from tinyseg import page

    entries = {}
    for path in sources():
        title, first, *_ = next(cells(path))[2].split("\n\n")
        entries[path.stem] = title.removeprefix("# "), re.sub(r"[*`]|\$[^$]*\$", "", first)
    parts = {heading: "".join(f'<p><a href="{name}.html">{escape(title)}</a><br>{escape(first)}</p>'
                              for name, (title, first) in entries.items() if name[0].isdigit() == n)
             for heading, n in (("Lessons", True), ("Pages", False))}
    if (folder / "tinyseg.html").exists():
        parts["Reference"] = ('<p><a href="tinyseg.html">tinyseg</a>, and the main job as a '
                              'library, <a href="tinyseg/job.html">tinyseg.job</a><br>Every public '
                              "name: shapes, units, errors, sources of formulas.</p>")
    page.write(folder / "index.html", "tinyseg", list(parts.items()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing")
    what.add_argument("--run", type=Path, metavar="FOLDER", help="where pages go")
    asked = parser.parse_args(argv)
    if asked.run:
        asked.run.mkdir(parents=True, exist_ok=True)
        for path in sources():
            print(f"{path.stem}: {run(path, asked.run):.0f} s", flush=True)
        index(asked.run)
        return 0
    stale = [path for path in sources() if not path.with_suffix(".ipynb").is_file()
             or path.with_suffix(".ipynb").read_text("utf-8") != written(path)]
    for path in stale:
        print(f"{path.with_suffix('.ipynb').name} "
              + ("is not what its source says" if asked.check else "written"))
        if not asked.check:
            path.with_suffix(".ipynb").write_text(written(path), encoding="utf-8")
    return int(asked.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
