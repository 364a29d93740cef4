"""Finds, compiles and launches the kernels in kernels/*.cu, with checks.

The declaration of a kernel in its source is what a launch is checked against: a pointer takes a
contiguous array of that type on the current GPU, a number must fit its type, and a struct is
passed by value. CuPy compiles a source at its first use and keeps the binary on disk.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..backend import Array, array_module, within

_HERE = Path(__file__).resolve()
FOLDER = next(f for f in (_HERE.parents[1] / "kernels", _HERE.parents[2] / "kernels")
              if f.name and f.is_dir())  # installed, or in a checkout
POINTERS = {"float": "float32", "double": "float64", "int": "int32", "short": "int16",
            "long long": "int64", "unsigned char": "uint8", "unsigned long long": "uint64"}
NUMBERS = {"int": "int32", "long long": "int64", "float": "float32"}
GRID_LIMIT, SHARED_LIMIT = (2**31 - 1, 65535, 65535), 227 << 10  # bytes a block, H100

_exact: ContextVar[frozenset] = ContextVar("exact", default=frozenset())


def exact() -> AbstractContextManager:
    """Convolutions inside this context multiply in full float32.

    Otherwise they round their factors to TF32 (10 bits of mantissa) for the tensor cores and sum
    in float32, as PyTorch's convolutions do; an output then differs by about 3e-4 of its scale.
    """
    return within(_exact)


def is_exact() -> bool:
    """Whether `exact` is in force."""
    return bool(_exact.get())


def serves(*arrays: Array | None) -> bool:
    """Whether the kernels take these arrays: on a GPU, float32, not empty. None is passed over."""
    return bool(arrays) and all(
        type(a).__module__.partition(".")[0] == "cupy" and a.dtype == "float32" and a.size
        for a in arrays if a is not None)


def plain(array: Array) -> Array:
    """`array`, contiguous from an address where 16-byte loads may start; a copy where need be."""
    array = array_module(array).ascontiguousarray(array)
    return array.copy() if array.data.ptr % 16 else array


@cache
def source(file: str) -> str:
    """The text of kernels/`file`.cu with its headers inlined.

    CuPy's cache of binaries looks at the text alone: a header that changes must change the text.
    """
    text = (FOLDER / f"{file}.cu").read_text("utf-8")
    return re.sub(r'^#include "(\w+\.cuh)"$', lambda m: (FOLDER / m[1]).read_text("utf-8"), text,
                  flags=re.MULTILINE)


@cache
def signatures(file: str) -> dict[str, list[tuple[str, str]]]:
    """{kernel: [(type, name) of each parameter]} as kernels/`file`.cu declares them."""
    declaration = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?'
                             r"(\w+)\(([^)]*)\)")
    parameter = re.compile(r"\s*(?:const )?(\w[\w ]*?\*?)\s+(?:__restrict__ )?(\w+)\s*")
    return {kernel: [(m[1], m[2]) for p in parameters.split(",") if (m := parameter.fullmatch(p))]
            for kernel, parameters in declaration.findall(source(file))}


@cache
def _function(library: ModuleType, file: str, kernel: str, constants: tuple) -> Any:
    options = ("-std=c++17", *(f"-D{name}={value}" for name, value in constants))
    return _module(library, file, options).get_function(kernel)


@cache
def _module(library: ModuleType, file: str, options: tuple[str, ...]) -> Any:
    return library.RawModule(code=source(file), options=options)


def _checked(declared: str, value: Any, where: str) -> Any:
    """`value` as it is passed for a parameter of the type `declared`."""
    if declared.endswith("*"):
        dtype = POINTERS[declared.rstrip(" *")]
        if value is None:
            return np.uintp(0)
        if not hasattr(value, "device") or isinstance(value, np.ndarray):
            raise TypeError(f"{where} is a {type(value).__name__}; expected an array on the GPU")
        if value.dtype != dtype:
            raise TypeError(f"{where} is {value.dtype}; expected {dtype}")
        if not value.flags.c_contiguous:
            raise ValueError(f"{where} is not contiguous; pass ascontiguousarray of it")
        current = array_module(value).cuda.runtime.getDevice()
        if value.device.id != current:
            raise ValueError(f"{where} lies on GPU {value.device.id}; the current one is {current}")
        return value
    if declared not in NUMBERS:
        if getattr(value, "dtype", np.dtype("O")).names is None:
            raise TypeError(f"{where} is {value!r}; expected the fields of struct {declared}")
        return np.asarray(value).reshape(1)  # CuPy passes an array of size one by value
    number = np.dtype(NUMBERS[declared])
    if number.kind == "i" and not hasattr(value, "__index__"):
        raise TypeError(f"{where} is {value!r}; expected an integer")
    if number.kind == "i" and not np.iinfo(number).min <= value <= np.iinfo(number).max:
        raise ValueError(f"{where} is {value}: more than {declared} holds; use a smaller patch or "
                         "batch")
    return number.type(value)


def launch(file: str, kernel: str, grid: tuple[int, ...], block: tuple[int, ...],
           *arguments: Any, shared: int = 0, **constants: int) -> None:
    """Run `kernel` of kernels/`file`.cu on `grid` blocks of `block` threads.

    arguments: as declared; an array for a pointer (None for a null pointer), a Python number for a
    number, a structured NumPy scalar for a struct. shared: bytes of dynamic shared memory.
    constants: macros that the source is compiled with. Raises TypeError or ValueError naming the
    parameter, before anything runs.
    """
    declared = signatures(file)[kernel]
    name = f"{file}.{kernel}"
    if len(arguments) != len(declared):
        raise TypeError(f"{name} takes {len(declared)} arguments, got {len(arguments)}")
    passed = tuple(_checked(kind, value, f"{name}: {parameter}")
                   for (kind, parameter), value in zip(declared, arguments, strict=True))
    for n, limit in zip(grid, GRID_LIMIT, strict=False):
        if not 0 < n <= limit:
            raise ValueError(f"{name}: grid {grid}; expected at most {GRID_LIMIT}, at least one; "
                             "use a smaller patch or batch")
    if shared > SHARED_LIMIT:
        raise ValueError(f"{name}: {shared} bytes of shared memory; a block has {SHARED_LIMIT}")
    library = next(array_module(a) for (kind, _), a in zip(declared, arguments, strict=True)
                   if kind.endswith("*") and a is not None)
    function = _function(library, file, kernel, tuple(sorted(constants.items())))
    if shared > 48 << 10 and shared > function.max_dynamic_shared_size_bytes:
        function.max_dynamic_shared_size_bytes = shared  # so much a kernel must ask for
        function.preferred_shared_memory_carveout = 100  # percent: several blocks side by side
    function(tuple(grid), tuple(block), passed, shared_mem=shared)
