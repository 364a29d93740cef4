"""Which array library an array belongs to, and how arrays move between devices.

The whole library is written against the interface that NumPy and CuPy share. `array_module(x)` is
the `np` or `cupy` that owns `x`; no other module asks for CuPy by name, and importing tinyseg
never imports it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # an n-dimensional array of NumPy, CuPy or a library with their interface


def array_module(x: Array) -> ModuleType:
    """The library that `x` belongs to: the top-level package that defines its type."""
    kind: Any = type(x)
    return _library(kind)


@cache
def _library(kind: Any) -> ModuleType:
    if issubclass(kind, (np.ndarray, np.generic, int, float)):
        return np
    library = sys.modules[kind.__module__.partition(".")[0]]
    if not hasattr(library, "ndarray"):
        raise TypeError(f"found a {kind.__name__}; expected an array of NumPy or CuPy")
    return library


def memory(array: Any) -> int:
    """Equal for arrays that show the memory of one."""
    base = getattr(array, "base", None)
    return id(array if base is None else base)


def writable(array: Array) -> bool:
    """Whether each of its numbers stands in a place of its own, one after the other, and may be
    changed: not so in what was broadcast."""
    return array.flags.c_contiguous and getattr(array.flags, "writeable", True)  # CuPy's all are


@contextmanager
def within(contexts: ContextVar[tuple], value: Any = None) -> Iterator[None]:
    """One more of the contexts that are open, (value, a mark of its own), the last behind the
    others. Generators may leave theirs in any order, and from another thread: none takes more with
    it than its own."""
    mine = value, object()
    contexts.set((*contexts.get(), mine))
    try:
        yield
    finally:
        contexts.set(tuple(other for other in contexts.get() if other is not mine))


def device(name: str) -> ModuleType:
    """The array library of a device: "cpu" is NumPy, "cuda" is CuPy on the current GPU.

    Raises ValueError for another name and RuntimeError, with what to do, where "cuda" has no
    working CuPy or no GPU.

    >>> ts.device("cpu") is np
    True
    """
    if name == "cpu":
        return np
    if name != "cuda":
        raise ValueError(f'device is {name!r}; expected "cpu" or "cuda"')
    try:
        cupy = importlib.import_module("cupy")
        count = cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        raise RuntimeError(
            "device cuda needs CuPy: install tinyseg[cuda13] for a CUDA 13 driver or "
            f"tinyseg[cuda12] for CUDA 12, never both ({error})"
        ) from None
    except Exception as error:  # a half-installed CUDA raises OSError, RuntimeError and its own
        raise RuntimeError(f"CuPy is installed but finds no working GPU: {error}") from None
    if count == 0:
        raise RuntimeError("CuPy is installed but the driver shows no GPU")
    return cupy


def to_numpy(array: Array) -> np.ndarray:
    """`array` in host memory; no copy where it already is a NumPy array.

    >>> x = np.ones(3)
    >>> ts.to_numpy(x) is x
    True
    """
    return array.get() if hasattr(array, "get") else np.asarray(array)


def to_library(array: Array, library: ModuleType) -> Array:
    """`array` as an array of `library`, which `device` returned."""
    return to_numpy(array) if library is np else library.asarray(array)
