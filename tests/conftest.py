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
