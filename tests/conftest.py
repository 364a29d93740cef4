"""Fixtures of all tests."""

import sys

import emulator
import pytest
import strictarray


@pytest.fixture
def cuda(monkeypatch):
    """CuPy's stand-in, with kernels on the CPU: one library, so that each source compiles once."""
    if reason := emulator.missing():
        pytest.skip(reason)
    library = strictarray.library("cupy", device=True)
    monkeypatch.setitem(sys.modules, "cupy", library)
    return library
