"""Fixtures of all tests, and the one environment that they and the processes they start see,
whatever the user's says of bars, widths, colours, drawing, threads and languages."""

import os
import sys

import pytest

NAMES = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "MPLBACKEND", "LANG", "LANGUAGE",
         "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONWARNINGS", "OMP_NUM_THREADS",
         "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}
for name in {*os.environ}:  # before NumPy, tqdm and matplotlib are imported, which read them
    if name in NAMES or name.startswith(("TQDM_", "LC_")):
        del os.environ[name]


@pytest.fixture(autouse=True)
def all_cores():
    """No test leaves the next a number of threads, on which the last bits depend."""
    yield
    from tinyseg import parallel

    parallel.set_threads(0)


def draw_nothing(change):
    """Let runs draw nothing: pictures take most of the time of so small ones."""
    from tinyseg import report
    from tinyseg.job import pages

    for owner, name in ((report, "progress"), (report, "overlay"), (pages, "of_run")):
        change.setattr(owner, name, lambda *content: None)


@pytest.fixture(scope="module")
def tiny_task(tmp_path_factory):
    """A synthetic task of four cases of a few thousand voxels."""
    from tinyseg.data import phantom

    return phantom.write(tmp_path_factory.mktemp("task"), 4, 1, (8, 24, 24), (5, 6, 6))


@pytest.fixture(scope="module")
def tiny_runs():
    """ResNet-18 has two residual blocks, and no run draws anything."""
    from tinyseg import models

    with pytest.MonkeyPatch.context() as change:
        change.setitem(models.BACKBONES, "resnet18", ((1, 1, 0, 0), False))
        draw_nothing(change)
        yield


@pytest.fixture
def undrawn(monkeypatch):
    """No run draws anything."""
    draw_nothing(monkeypatch)


@pytest.fixture
def cuda(monkeypatch):
    """CuPy's stand-in, with kernels on the CPU: one library, so that each source compiles once."""
    import emulator
    import strictarray

    if reason := emulator.missing():
        pytest.skip(reason)
    library = strictarray.library("cupy", device=True)
    monkeypatch.setitem(sys.modules, "cupy", library)
    return library
