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
from operator import attrgetter
from pathlib import Path
from threading import get_ident
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, array_module, within

_HERE = Path(__file__).resolve()
FOLDER = next(f for f in (_HERE.parents[1] / "kernels", _HERE.parents[2] / "kernels")
              if f.name and f.is_dir())  # installed, or in a checkout
POINTERS = {"float": "float32", "double": "float64", "int": "int32", "short": "int16",
            "long long": "int64", "unsigned char": "uint8", "unsigned short": "uint16",
            "unsigned": "uint32", "unsigned long long": "uint64"}
NUMBERS = {"int": "int32", "long long": "int64", "float": "float32"}
_NULL, _OBJECT = np.uintp(0), np.dtype("O")
_facts = attrgetter("dtype", "flags.c_contiguous", "data.device_id")
# What a launch may ask for at most: a block of any card since Ampere has 99 KiB of shared memory,
# of which a kernel may declare a part itself.
GRID_LIMIT, SHARED_LIMIT = (2**31 - 1, 65535, 65535), 72 << 10
MULTIPROCESSORS = 132  # of an H100, which blocks should fill


class Strided(NamedTuple):
    """An array whose strides the kernel is told by other arguments: it need not be contiguous."""

    array: Array


PRECISIONS = "fp32", "tf32", "bf16"
_precisions: ContextVar[tuple] = ContextVar("precisions", default=())


def precision(name: str) -> AbstractContextManager:
    """What convolutions inside this context multiply; arrays and sums are of float32 in any case.

    "fp32": the numbers as they are. "tf32", as outside: rounded to 10 bits of mantissa for the
    tensor cores, as PyTorch's convolutions do, and an output differs by about 3e-4 of its scale.
    "bf16": to 7 bits, about 2e-3, where kernels have several taps and channels in eights, and as
    in "tf32" elsewhere. ValueError for other names.
    """
    if name not in PRECISIONS:
        raise ValueError(f"found precision {name!r}; expected one of {', '.join(PRECISIONS)}")
    return within(_precisions, name)


def precision_here() -> str:
    """The name of the `precision` in force: the last of those that are open."""
    return _precisions.get()[-1][0] if _precisions.get() else "tf32"


def serves(*arrays: Array | None) -> bool:
    """Whether the kernels take these arrays: on a GPU, float32, not empty. None is passed over."""
    return bool(arrays) and all(
        type(a).__module__.partition(".")[0] == "cupy" and a.dtype == "float32" and a.size
        for a in arrays if a is not None)


def plain(array: Array) -> Array:
    """`array`, contiguous from an address where 16-byte loads may start; a copy where need be."""
    if array.flags.c_contiguous and not array.data.ptr % 16:
        return array
    return array.copy()


def arrived(library: ModuleType) -> Array:
    """Counters, all 0, by which blocks of a launch know which of them comes last: `is_last` in
    kernels/norm.cu leaves them so. Launches that may run side by side need their own, and so each
    stream of each GPU has some, for each thread, whose default stream may be its own."""
    cuda = library.cuda
    return _counters(library, cuda.runtime.getDevice(), cuda.get_current_stream().ptr, get_ident())


@cache
def _counters(library: ModuleType, *_: int) -> Array:
    return library.zeros(GRID_LIMIT[1], "uint32")


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
    parameter = re.compile(r"\s*(?:const )?(?:__grid_constant__ )?(\w[\w ]*?\*?)\s+"
                           r"(?:__restrict__ )?(\w+)\s*")
    return {kernel: [(m[1], m[2]) for p in parameters.split(",") if (m := parameter.fullmatch(p))]
            for kernel, parameters in declaration.findall(source(file))}


@cache
def _function(library: ModuleType, file: str, kernel: str, constants: tuple) -> Any:
    options = ("-std=c++17", *(f"-D{name}={value}" for name, value in sorted(constants)))
    return _module(library, file, options).get_function(kernel)


@cache
def _module(library: ModuleType, file: str, options: tuple[str, ...]) -> Any:
    return library.RawModule(code=source(file), options=options)


@cache
def _parameters(file: str, kernel: str, number: str) -> list[tuple[str, str, Any, tuple | None]]:
    """(name, declared type, what an argument must be, the limits of a whole number) of each
    parameter: a data type for a pointer, a scalar type for a number, None for a struct. NUMBER is
    the macro of that name."""
    rows: list = []
    for declared, name in signatures(file)[kernel]:
        declared = declared.replace("NUMBER", number)
        kind = np.dtype(NUMBERS.get(declared, "V"))
        held = np.iinfo(kind) if kind.kind == "i" else None
        rows.append((name, declared, np.dtype(POINTERS[declared.rstrip(" *")])
                     if declared.endswith("*") else kind.type if declared in NUMBERS else None,
                     held and (int(held.min), int(held.max))))
    return rows


def _passed(file: str, kernel: str, number: str, arguments: tuple) -> tuple[list, ModuleType]:
    """`arguments` as the kernel takes them, and the library of their arrays.

    This runs hundreds of times a training step: what is right passes with few questions, and what
    is wrong is asked all of them by `_refused`.
    """
    passed: list = []
    library: Any = np
    current = 0
    parameters = _parameters(file, kernel, number)
    if len(arguments) != len(parameters):
        raise TypeError(f"{file}.{kernel} takes {len(parameters)} arguments, got {len(arguments)}")
    for (name, declared, wanted, limits), value in zip(parameters, arguments, strict=True):
        if wanted is None:  # a struct, which CuPy passes by value, quickly if it is bare of fields
            if getattr(value, "dtype", _OBJECT).names is None:
                raise TypeError(f"{file}.{kernel}: {name} is {value!r}; expected the fields of "
                                f"struct {declared}")
            value = np.asarray(value).reshape(-1).view(f"V{value.nbytes}")
        elif type(wanted) is type:  # a number
            if limits:
                if type(value) is not int and not hasattr(value, "__index__"):
                    raise TypeError(f"{file}.{kernel}: {name} is {value!r}; expected an integer")
                if not limits[0] <= value <= limits[1]:
                    raise ValueError(f"{file}.{kernel}: {name} is {value}: more than {declared} "
                                     "holds; use a smaller patch or batch")
            value = wanted(value)
        elif value is None:
            value = _NULL
        else:
            if library is np and hasattr(value, "device"):  # a host array has one, too
                library = array_module(value)
                current = 0 if library is np else library.cuda.runtime.getDevice()
            contiguous = True
            if isinstance(value, Strided):
                value = value.array
                contiguous = value.flags.c_contiguous
            if found(value) != (wanted, contiguous, current):
                raise _refused(f"{file}.{kernel}: {name}", value, wanted, current)
        passed.append(value)
    return passed, library


def found(value: Any) -> tuple | None:
    """(data type, whether it is contiguous, number of its GPU) of an array on one."""
    try:
        return _facts(value)
    except AttributeError:
        return None


def _refused(where: str, value: Any, dtype: np.dtype, current: int) -> Exception:
    """What is wrong with an array for a pointer to `dtype` on GPU number `current`."""
    if not hasattr(value, "device") or isinstance(value, np.ndarray):
        return TypeError(f"{where} is a {type(value).__name__}; expected an array on the GPU")
    if value.dtype != dtype:
        return TypeError(f"{where} is {value.dtype}; expected {dtype}")
    if not value.flags.c_contiguous:
        return ValueError(f"{where} is not contiguous; pass ascontiguousarray of it")
    return ValueError(f"{where} lies on GPU {value.data.device_id}; the current one is {current}")


def launch(file: str, kernel: str, grid: tuple[int, ...], block: tuple[int, ...],
           *arguments: Any, shared: int = 0, **constants: int | str) -> None:
    """Run `kernel` of kernels/`file`.cu on `grid` blocks of `block` threads.

    arguments: as declared; an array for a pointer (None for a null pointer), a Python number for a
    number, a structured NumPy array for a struct. shared: bytes of dynamic shared memory.
    constants: macros that the source is compiled with; declarations may name NUMBER, by default
    float. Raises TypeError or ValueError naming the parameter, before anything runs.
    """
    passed, library = _passed(file, kernel, str(constants.get("NUMBER", "float")), arguments)
    for n, limit in zip(grid, GRID_LIMIT, strict=False):
        if not 0 < n <= limit:
            raise ValueError(f"{file}.{kernel}: grid {grid}; expected at most {GRID_LIMIT}, at "
                             "least one; use a smaller patch or batch")
    if shared > SHARED_LIMIT:
        raise ValueError(f"{file}.{kernel}: {shared} bytes of shared memory; at most "
                         f"{SHARED_LIMIT} serve every card")
    function = _function(library, file, kernel, tuple(constants.items()))
    if shared > 48 << 10 and shared > function.max_dynamic_shared_size_bytes:
        function.max_dynamic_shared_size_bytes = shared  # so much a kernel must ask for
        function.preferred_shared_memory_carveout = 100  # percent: several blocks side by side
    function(grid, block, passed, shared_mem=shared)
