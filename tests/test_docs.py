"""Links of what is written lead somewhere, every page of the reference is made, and the examples in
docstrings are true."""

import doctest
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinyseg as ts

ROOT = Path(__file__).resolve().parents[1]
PAGES = [path for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]]
MODULES = ["tinyseg", *(m.name for m in pkgutil.walk_packages(ts.__path__, "tinyseg."))]
SHOWN = ["", ".ops", ".nn", ".losses", ".models", ".optim", ".profiles", ".intervals", ".metrics",
         ".train"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files(path):
    text = path.read_text("utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    gone = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not gone
    for name in re.findall(r"`((?:tinyseg|tests|examples|benchmarks|kernels)/[\w/.]+)`", text):
        assert "NAME" in name or (ROOT / name).exists(), name


def test_the_front_door_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120
    assert len((ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines()) <= 45


def test_every_public_name_has_a_page_and_no_link_is_broken(tmp_path):
    pytest.importorskip("pdoc")
    subprocess.run([sys.executable, "-m", "pdoc", "tinyseg", "tinyseg.job", "-o", tmp_path],
                   check=True, capture_output=True)
    pages = {path: re.sub("<script.*?</script>", "", path.read_text("utf-8"), flags=re.S)
             for path in tmp_path.rglob("*.html")}
    assert len(pages) > 30
    anchors = {path: set(re.findall(r'id="([^"]+)"', text)) for path, text in pages.items()}
    checked = 0
    for path, text in pages.items():
        for link in set(re.findall(r'href="([^":]+)"', text)):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target in pages and (not anchor or anchor in anchors[target]), (path, link)
            checked += 1
    assert checked > 300
    shown = anchors[tmp_path / "tinyseg.html"]
    modules = {path.stem for path in (tmp_path / "tinyseg").glob("*.html")}
    assert set(ts.__all__) <= shown | modules


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_are_true(name, tmp_path, monkeypatch, capsys):
    module = pytest.importorskip(name)  # it may need a package that is not here
    monkeypatch.chdir(tmp_path)  # where examples write
    monkeypatch.setattr(ts.models.networks, "MAKERS", dict(ts.models.networks.MAKERS))
    failed, tried = doctest.testmod(module, extraglobs={"np": np, "ts": ts})
    assert not failed, capsys.readouterr().out
    assert tried == Path(module.__file__).read_text("utf-8").count(">>> ")  # it found them all


def public(module):
    """The names that a module offers: `__all__`, else what it defines without an underscore."""
    return getattr(module, "__all__", [name for name, thing in vars(module).items()
                                       if name[0] != "_"
                                       and getattr(thing, "__module__", "") == module.__name__])


@pytest.mark.parametrize("name", SHOWN)
def test_every_public_name_has_an_example(name):
    module = sys.modules[f"tinyseg{name}"]
    named = {each: getattr(module, each) for each in public(module)}
    called = {each: thing for each, thing in named.items() if callable(thing)}
    assert called and not [each for each, thing in called.items()
                           if ">>> " not in str(thing.__doc__)]
