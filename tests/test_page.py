"""A page: one file, text that stays text, slices under their numbers, a browser that opens it."""

import base64
import io
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.image import imread

from tinyseg import page, report

NAMES = {0: "background", 1: "liver & co", 2: "tumour"}


def volume():
    """A scan of 5 x 8 x 6 voxels whose voxels tell their place, and labels in two slices."""
    image = np.arange(240.0).reshape(5, 8, 6)
    labels = np.zeros((5, 8, 6), "uint8")
    labels[2, 2:7, 1:5], labels[3, 4, 3] = 1, 2
    return image, labels


def sheets(html):
    """The pictures in a page, (H, W, 3) of bytes, as they stand there."""
    found = re.findall(r"data:image/png;base64,([^)]*)\)", html)
    return [(imread(io.BytesIO(base64.b64decode(each)))[..., :3] * 255).round().astype(int)
            for each in found]


def test_slices_lie_below_each_other_as_a_radiologist_sees_them():
    image, labels = volume()
    html = page.scan(image, labels, NAMES, (2.0, 1.0, 3.0), (2, 4, 3))
    low, high = np.percentile(image, (1, 99.5))
    grey = ((image - low) / (high - low)).clip(0, 1) * 255
    for sheet, axis, (height, width) in zip(sheets(html), range(3), ((8, 6), (5, 6), (5, 8)),
                                            strict=True):
        count = image.shape[axis]
        assert sheet.shape == (count * height, width, 3)
        for i, piece in enumerate(np.split(sheet, count)):
            plane, marked = grey.take(i, axis)[::-1, ::-1], labels.take(i, axis)[::-1, ::-1] > 0
            assert abs(piece - plane[..., None])[~marked].max() <= 1
    assert re.findall(r'max="(\d+)" value="(\d+)"', html) == [("4", "2"), ("7", "4"), ("5", "3")]
    # 8 x 1 mm high and 6 x 3 wide, 5 x 2 and 18, 10 and 8.
    assert re.findall(r"aspect-ratio: ([\d.]+)", html) == ["2.2500", "1.8000", "0.8000"]


def test_outlines_are_drawn_inside_of_what_they_surround():
    image, labels = volume()
    found = report.coloured(image, labels, (0, 240), NAMES)[:, ::-1, ::-1]
    marked = (found != found[..., :1]).any(axis=-1)
    inside = np.zeros_like(marked)
    inside[2, 3:6, 2:4] = True  # what no side of the first label's border touches
    assert (marked == ((labels > 0) & ~inside)).all()
    assert tuple(found[3, 4, 3]) == tuple(int(report.COLOURS[1][i : i + 2], 16) for i in (1, 3, 5))


def test_large_scans_are_thinned():
    image = np.random.default_rng(0).standard_normal((7, 500, 400))
    html = page.scan(image, np.zeros((7, 500, 400), "uint8"), NAMES, (1, 1, 1), (3, 250, 399))
    assert [sheet.shape for sheet in sheets(html)] == [
        (7 * 167, 134, 3), (84 * 7, 134, 3), (80 * 7, 167, 3)]
    assert re.findall(r'max="(\d+)" value="(\d+)"', html) == [("6", "3"), ("83", "41"),
                                                             ("79", "79")]


def test_text_stays_text_and_nothing_is_fetched(tmp_path):
    path = tmp_path / "report.html"
    page.write(path, "a <b> & c", [("<h>", page.table(["<a>"], [["<td>"]]) + page.text("<pre> &")),
                                   ("plot", page.figure(report.forest, [("x<y", 1, 0, 2)]))])
    html = path.read_text("utf-8")
    for wanted in ("a &lt;b&gt; &amp; c", "&lt;h&gt;", "<th>&lt;a&gt;</th>", "<td>&lt;td&gt;</td>",
                   "<pre>&lt;pre&gt; &amp;</pre>", "<svg"):
        assert wanted in html
    assert not re.findall(r'(?:src|href)="(?!#)|url\((?!data:|#)|@import', html)
    assert page.figure(report.progress, []) == ""  # nothing to draw is nothing


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(not BROWSER, reason="needs chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_opens_it_and_its_sliders_move(tmp_path, width):
    image, labels = volume()
    path = tmp_path / "report.html"
    page.write(path, "A scan", [
        ("scan", page.scan(image, labels, NAMES, (2, 1, 1), (2, 4, 3))),
        ("table", page.table(["a long name of a column"] * 9, [["0.123 (0.100 to 0.200)"] * 9])),
        ("plot", page.figure(report.forest, [("zero", 0.1, 0.0, 0.2)], "difference"))])
    path.write_text(path.read_text("utf-8").replace("</body>", """<script>
        document.documentElement.style.width = "WIDTHpx";  // a window has at least 500
        const told = [], plane = document.querySelector(".plane");
        const at = plane.querySelector("input");
        const note = () => told.push(plane.querySelector("output").textContent,
                                     plane.querySelector("div").style.backgroundPositionY);
        note();
        at.value = 4;
        at.dispatchEvent(new Event("input"));
        note();
        const box = plane.querySelector("div").getBoundingClientRect();
        told.push(Math.round(100 * box.width / box.height), document.body.scrollWidth);
        document.title = told.join(";");
        </script></body>""".replace("WIDTH", str(width))), "utf-8")
    done = subprocess.run([
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom",
        path.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search("<title>(.*?)</title>", done.stdout)[1].split(";")
    assert found[:5] == ["3 of 5", "50%", "5 of 5", "100%", "75"]
    assert int(found[5]) <= width
    assert "CONSOLE" not in done.stderr
