"""A report in one HTML file which opens without a network: figures, tables, scans."""

from __future__ import annotations

import platform
import shlex
import sys
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from html import escape
from importlib import import_module
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from .files import whole
from .report import PLANES, coloured

SIDE = 192  # pixels of a scan's longest side, at most, where one pages through it
STYLE = """
:root { --ink: #1c2430; --line: #d8dde4; --soft: #f5f7f9; --mark: #3a5bd9 }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); margin: 0 auto; padding: 1rem;
  max-width: 68rem }
h1 { font-size: 1.7rem; line-height: 1.2 } h2 { font-size: 1.25rem; margin-top: 2.2rem }
figure { margin: 1rem 0; overflow-x: auto } figcaption, .note { color: #55606e; font-size: .9rem }
svg { display: block }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right;
  white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal }
thead th { background: var(--soft) }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; font-size: .85rem }
.planes { display: flex; flex-wrap: wrap; gap: 1rem }
.plane { flex: 1 1 14rem; max-width: 22rem }
.plane div { width: 100%; background-repeat: no-repeat; image-rendering: pixelated }
.plane input { width: 100%; accent-color: var(--mark) }
@media print { body { max-width: none } svg { max-width: 100%; height: auto }
  .plane input { display: none } h2 { break-after: avoid } figure, table { break-inside: avoid } }
"""
SCRIPT = """
for (const plane of document.querySelectorAll(".plane")) {
  const view = plane.querySelector("div"), at = plane.querySelector("input");
  const told = plane.querySelector("output"), count = Number(at.max) + 1;
  const show = () => {
    view.style.backgroundPositionY = count > 1 ? `${100 * at.value / (count - 1)}%` : "0";
    told.textContent = `${Number(at.value) + 1} of ${count}`;
  };
  at.addEventListener("input", show);
  show();
}
"""


def write(path: str | Path, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """The page of these (heading, HTML), whole or not at all. Headings are text."""
    body = "".join(f"<section><h2>{escape(heading)}</h2>{html}</section>\n"
                   for heading, html in sections)
    with whole(Path(path)) as draft:
        draft.write_text(
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
            f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>\n{body}"
            f"<script>{SCRIPT}</script></body></html>\n", encoding="utf-8")


class Html(str):
    """Text that a notebook shows as it stands in a page."""

    def _repr_html_(self) -> str:
        return self


def figure(draw: Callable, *content: Any, caption: str = "") -> Html:
    """What `draw(path, *content)`, a figure of `report` or `pictures`, draws, for a page or a
    notebook."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "figure.svg")
        draw(path, *content)
        if not path.exists():  # there was nothing to draw
            return Html()
        text = path.read_text("utf-8")
    told = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Html(f"<figure>{text[text.index('<svg'):]}{told}</figure>")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in rows and columns, which scrolls where a screen is narrow."""
    top, *lines = ("".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row)
                   for kind, row in (("th", head), *(("td", row) for row in rows)))
    return ('<div class="wide"><table><thead><tr>' + top + "</tr></thead><tbody><tr>"
            + "</tr><tr>".join(lines) + "</tr></tbody></table></div>")


def text(content: str) -> str:
    """Text as it stands, in letters of one width."""
    return f"<pre>{escape(content)}</pre>"


def made() -> str:
    """With which command, packages and machine this process works, and when it asks."""
    packages = [f"{name} {import_module(name).__version__}"  # tinyseg may be a bare checkout
                for name in ("tinyseg", "numpy", "scipy", "nibabel")]
    return "\n".join([shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                      f"{', '.join(packages)}, Python {platform.python_version()}",
                      f"{platform.platform()}, {date.today().isoformat()}"])


def scan(image: np.ndarray, labels: np.ndarray, names: Mapping[int, str],
         spacing: Sequence[float], at: Sequence[int]) -> str:
    """A scan with the outlines of a label map, to be leafed through in three planes by sliders.

    image and labels (D, H, W) in (S, A, R) axes, spacing in mm; the view is the radiologist's, as
    in `report.overlay`. It opens at the voxel `at`. Of axes with more voxels than SIDE every n-th
    is shown.
    """
    window = np.percentile(image, (1, 99.5))
    parts = []
    for plane, axis, rest in PLANES:
        step = [-(-n // SIDE) for n in image.shape]
        step[axis] = max(1, -(-image.shape[axis] // (SIDE // 2)))
        thin = tuple(slice(None, None, n) for n in step)
        slices = coloured(np.moveaxis(image[thin], axis, 0), np.moveaxis(labels[thin], axis, 0),
                          window, names)
        count = len(slices)
        ratio = (image.shape[rest[0]] * spacing[rest[0]]) / (image.shape[rest[1]]
                                                            * spacing[rest[1]])
        sheet = _png(slices.reshape(-1, *slices.shape[2:]))  # the slices one below the other
        parts.append(
            f'<div class="plane"><div role="img" aria-label="{plane} slice" style="aspect-ratio: '
            f"{1 / ratio:.4f}; background-size: 100% {count}00%; "
            f'background-image: url(data:image/png;base64,{sheet})"></div><label>{plane} '
            f'<output></output><input type="range" min="0" max="{count - 1}" '
            f'value="{at[axis] // step[axis]}">'
            "</label></div>")
    return f'<div class="planes">{"".join(parts)}</div>'


def _png(pixels: np.ndarray) -> str:
    """An image (H, W, 3) of bytes as a PNG in base64."""
    from matplotlib.image import imsave  # takes longer to load than all of tinyseg

    buffer = BytesIO()
    imsave(buffer, pixels, format="png")
    return b64encode(buffer.getvalue()).decode("ascii")
