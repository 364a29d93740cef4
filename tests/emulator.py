"""CUDA sources on the CPU: what `cupy.RawModule` does, by g++ and emulator.hpp.

`RawModule(code=, options=).get_function(name)(grid, block, args, shared_mem=)` takes the arguments
that CuPy's takes, where an array is anything with the address `.data.ptr`, and runs the kernel
before it returns. Whatever would hang or crash a GPU, and some of what would pass there by luck,
raises `Fault`; the next launch is not affected. `order` says how blocks and warps follow. `traced`
keeps who reads and writes what, and finds threads that race.
"""

import ctypes
import hashlib
import mmap
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyseg.cuda import loader

HEADER = Path(__file__).with_name("emulator.hpp")
COMPILER = "g++"
OPTIONS = ("-std=c++17 -O2 -g1 -w -shared -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti "
           "-fno-strict-aliasing -fno-threadsafe-statics -ffp-contract=off -U_FORTIFY_SOURCE "
           "-fno-crossjumping -fno-tree-tail-merge "  # each trap keeps the line it comes from
           "-fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error").split()
TRACING = "-fsanitize=thread --param tsan-instrument-func-entry-exit=0".split()  # tells accesses to
LIBRARIES = "-nodefaultlibs -lc -lm -lgcc".split()  # functions of emulator.hpp, not of libtsan
ORDERS = "forward", "reversed", "random"
THREADS, SHARED_DEFAULT, SHARED_LIMIT = 1024, 48 << 10, 227 << 10
GRID = 2**31 - 1, 65535, 65535
KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\(([^)]*)\)\s+)?(\w+)\(')

order = "forward"  # one of ORDERS; "random" draws from `seed`
seed = 1
seconds = 60.0  # of processor time that a launch may take
flush = "end"  # the end of a guarded array that touches its guard: "start" or "end"
traces = None  # what launches are added to while they are traced
tape = None  # while a graph is captured: the list of what it will do, launches among that
statistics: defaultdict[str, Counter] = defaultdict(Counter)  # of each kernel, until cleared


class Fault(RuntimeError):
    """A launch that CUDA would refuse, or a kernel that did what no kernel may do."""


def missing() -> str:
    """Why kernels cannot be emulated on this machine; empty where they can."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return "the emulator of CUDA switches stacks on x86-64 Linux only"
    return "" if shutil.which(COMPILER) else f"the emulator of CUDA needs {COMPILER}"


class _Kernel(ctypes.Structure):
    _fields_ = [("function", ctypes.c_void_p), ("call", ctypes.c_void_p), ("limit", ctypes.c_int),
                ("arity", ctypes.c_int), ("sizes", ctypes.c_int * 64),
                ("pointers", ctypes.c_int * 64)]


_Triple = ctypes.c_uint * 3
COUNTS = "switches", "copies", "multiplications", "matrices", "conflicts"


class _Room(ctypes.Structure):
    _fields_ = [("stacks", ctypes.c_void_p), ("prepared", ctypes.c_uint)]


_room = _Room()


class _Job(ctypes.Structure):
    _fields_ = [("kernel", ctypes.POINTER(_Kernel)), ("arguments", ctypes.c_void_p),
                ("blocks", _Triple), ("threads", _Triple), ("shared", ctypes.c_size_t),
                ("order", ctypes.c_uint), ("seed", ctypes.c_uint), ("seconds", ctypes.c_double),
                ("failure", ctypes.c_char_p), ("signal", ctypes.c_int), ("line", ctypes.c_int),
                ("block", _Triple), ("thread", _Triple), ("address", ctypes.c_size_t),
                ("instruction", ctypes.c_size_t), *((n, ctypes.c_longlong) for n in COUNTS),
                ("room", ctypes.POINTER(_Room)), ("accesses", ctypes.c_void_p),
                ("accessed", ctypes.c_longlong), ("accessible", ctypes.c_longlong)]


ACCESS = np.dtype({"names": "address instruction block thread epoch step bytes kind "
                            "line shared".split(),
                   "formats": ["u8"] * 2 + ["u4"] * 4 + ["i4"] * 4})
READ, WRITE, ATOMIC, FENCE = range(4)  # kinds of access; a fence is one to no address
ACCESSIBLE = 1 << 22  # accesses of a launch that is traced


class RawModule:
    """The kernels of one source; it is compiled when the first of them is asked for."""

    def __init__(self, *, code, options=()):
        self.code, self.options = code, tuple(options)
        self._limits = {}  # dynamic shared memory: a property of the kernel, not of who got it

    def _library(self):
        return _loaded(self.code, self.options, traces is not None)

    def get_function(self, name):
        if name not in [m[2] for m in KERNEL.finditer(self.code)]:
            raise Fault(f"the source has no kernel {name!r}")
        return _Function(self, name)


class _Function:
    def __init__(self, module, name):
        self._module, self.name = module, name
        self._load()

    def _load(self):
        self._path, self._library = self._module._library()
        self._kernel = _Kernel.in_dll(self._library, f"emulated_{self.name}")

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._module._limits.get(self.name, SHARED_DEFAULT)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size):
        if not 0 <= size <= SHARED_LIMIT:
            raise Fault(f"{self.name}: {size} bytes of shared memory; a block has {SHARED_LIMIT}")
        self._module._limits[self.name] = size

    def __call__(self, grid, block, args, *, shared_mem=0):
        if tape is not None:
            return tape.append(lambda: self(grid, block, args, shared_mem=shared_mem))
        self._load()  # with or without what traces it
        grid, block = ((*map(int, t), 1, 1)[:3] for t in (grid, block))
        threads = block[0] * block[1] * block[2]
        if not all(0 < n <= limit for n, limit in zip(grid, GRID, strict=True)):
            raise Fault(f"{self.name}: a grid of {grid} blocks")
        if not 0 < threads <= self._kernel.limit or block[2] > 64:
            raise Fault(f"{self.name}: a block of {block} threads; the limit of this kernel is "
                        f"{self._kernel.limit}")
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise Fault(f"{self.name}: {shared_mem} bytes of shared memory; "
                        f"{self.max_dynamic_shared_size_bytes} are allowed so far")
        values = self._values(args)
        addresses = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
        job = _Job(kernel=ctypes.pointer(self._kernel), blocks=grid, threads=block,
                   arguments=ctypes.addressof(addresses), shared=shared_mem, seed=seed,
                   order=ORDERS.index(order), seconds=seconds, room=ctypes.pointer(_room))
        if traces is not None:
            room = np.empty(ACCESSIBLE, ACCESS)  # of which the system gives what is written
            job.accesses, job.accessible = room.ctypes.data, len(room)
        self._library.emulator_launch(ctypes.byref(job))
        if traces is not None:
            traces.append(Trace(self, args, room[: job.accessed].copy()))
        statistics[self.name].update({"launches": 1, **{n: getattr(job, n) for n in COUNTS}})
        if job.failure is not None:
            raise Fault(self._described(job, args))

    def _values(self, args):
        """Each argument as an array of what the kernel receives, of the size that it expects."""
        if len(args) != self._kernel.arity:
            raise TypeError(f"{self.name} takes {self._kernel.arity} arguments, not {len(args)}")
        values = []
        for i, a in enumerate(args):
            if hasattr(getattr(a, "data", None), "ptr"):
                value = np.array([a.data.ptr], np.uintp)
                fits = self._kernel.pointers[i]
            elif isinstance(a, np.generic) or isinstance(a, np.ndarray) and a.size == 1:
                value = np.array(a).reshape(1)
                fits = not self._kernel.pointers[i] or value.dtype == np.uintp
            else:
                raise TypeError(f"{self.name}: argument {i} is {type(a)}, which CUDA cannot take")
            if not fits or value.nbytes != self._kernel.sizes[i]:
                raise TypeError(f"{self.name}: argument {i} is {value.dtype} ({value.nbytes} "
                                f"bytes); the kernel expects {self._kernel.sizes[i]} bytes"
                                f"{' of address' * self._kernel.pointers[i]}")
            values.append(value)
        return values

    def _described(self, job, args):
        line = job.line
        what = job.failure.decode()
        if job.signal:
            line = self._line(job.instruction)
            what = {signal.SIGFPE: "divides by zero", signal.SIGBUS: "accesses no memory",
                    signal.SIGVTALRM: f"still runs after {seconds:g} s",
                    signal.SIGSEGV: f"accesses {_place(job.address, args)}",
                    }.get(job.signal, "indexes outside an array, or an address is misaligned")
        at = f", {quoted}" if (quoted := self._quoted(line)) else ""
        return f"{self.name}: block {(*job.block,)}, thread {(*job.thread,)} {what}{at}"

    def _quoted(self, line):
        lines = self._module.code.splitlines()
        return f"line {line}: {lines[line - 1].strip()}" if 0 < line <= len(lines) else ""

    def _line(self, instruction):
        """The line of the source that an instruction comes from; 0 where that is not known."""
        try:
            out = subprocess.run(["addr2line", "-e", self._path, "-i", hex(instruction)],
                                 capture_output=True, text=True, timeout=20).stdout
        except OSError:
            return 0
        return next((int(m[1]) for m in re.finditer(r"kernel\.cu:(\d+)", out)), 0)


class Trace(NamedTuple):
    """What a launch did to memory: its accesses, of ACCESS, in the order that they came in."""

    function: _Function
    args: tuple
    accesses: np.ndarray

    def of(self, argument=None, write=False):
        """Those that read (write) an argument, by its number, or the shared memory of blocks."""
        found = self.accesses[(self.accesses["kind"] > READ) == write]
        if argument is None:
            return found[found["shared"] != 0]
        array = self.args[argument]
        return found[found["address"] - np.uint64(array.data.ptr) < array.nbytes]

    def bytes(self, argument=None, write=False):
        """How many bytes that is, asked for by all threads together."""
        return int(self.of(argument, write)["bytes"].sum())

    def counts(self, argument, block=0, write=False):
        """How often each thread of a block reads (writes) each number of an argument: (threads,
        numbers)."""
        array, a = self.args[argument], self.of(argument, write)
        a, size = a[a["block"] == block], array.dtype.itemsize
        counts = np.zeros((a["thread"].max(initial=0) + 1, array.size), int)
        number = (a["address"] - np.uint64(array.data.ptr)).astype(int) // size
        for more in range(a["bytes"].max(initial=0) // size):
            wide = a["bytes"] > more * size
            np.add.at(counts, (a["thread"][wide], number[wide] + more), 1)
        return counts

    def races(self):
        """The lines that race, as texts: where two threads of a block meet in shared memory, one of
        them writing, and nothing says which comes first: no barrier, nor, within a warp, a
        __syncwarp."""
        a = self.accesses[self.accesses["shared"] != 0]
        if not len(a):
            return []
        each, place = _places(a)
        a = a[each]
        axes = [place, a["block"], a["epoch"], warp := a["thread"] // 32, a["step"]]
        racing = [a[met] for who, where in ((warp, axes[:3]), (a["thread"], axes))
                  for met in _meetings(
                      np.ravel_multi_index(where, [int(axis.max()) + 1 for axis in where]),
                      who, a["kind"])]
        return self._lines(racing)

    def unordered(self):
        """The lines, as texts, where two blocks meet in global memory, one of them writing, with
        nothing that says which comes first.

        That is a fence and then an atomic access by the one, and an atomic access to the same
        address and then a fence by the other. A fence is for its thread, and for all of the block
        that a barrier lies between.
        """
        a = self.accesses[self.accesses["shared"] == 0]
        data = np.flatnonzero(a["kind"] < FENCE)
        if not (a["kind"] == WRITE).any():
            return []
        each, place = _places(a[data])
        fences = defaultdict(list)
        for i in np.flatnonzero(a["kind"] == FENCE):
            fences[a["block"][i], a["thread"][i]].append((i, a["epoch"][i]))
        counted = defaultdict(list)  # {block: [an atomic access, its thread, address]}
        for i in np.flatnonzero(a["kind"] == ATOMIC):
            counted[a["block"][i]].append((i, a["thread"][i], a["address"][i]))

        @cache
        def beyond(i, way):
            """{address: the first (last) atomic access} with a fence between i and it, forward
            (backward)."""
            block, thread, epoch = (a[name][i] for name in ("block", "thread", "epoch"))
            found = {}
            for at, who, address in counted[block][::-way]:
                if any((at - f) * way > 0 and (e != epoch and (e > epoch) == (way > 0)
                                               or who == thread and (f - i) * way > 0)
                       for f, e in fences[block, who]):
                    found[address] = at
            return found

        def ordered(i, j):
            behind = beyond(j, -1)
            return any(at < behind.get(address, -1) for address, at in beyond(i, 1).items())

        wrong = []
        for met in _meetings(place, a["block"][data][each], a["kind"][data][each]):
            at = np.unique(data[each[met]]).tolist()
            wrong += [a[[i, j]] for n, i in enumerate(at) for j in at[n + 1 :]
                      if a["block"][i] != a["block"][j] and max(a["kind"][[i, j]]) > READ
                      and min(a["kind"][[i, j]]) < ATOMIC and not ordered(i, j)]
        return self._lines(wrong)

    def _lines(self, found):
        """Where accesses stand in the source, as texts."""
        where = {(*x,) for a in found for x in np.unique(a[["instruction", "line"]]).tolist()}
        function = self.function
        return [function._quoted(line) for line in
                sorted({line or function._line(i - 1) for i, line in where})]


def _places(a):
    """Which access, and where it is to, of all that accesses touch, in units that fit each."""
    unit = np.gcd.reduce(np.r_[a["address"].astype(int), a["bytes"]])
    parts = a["bytes"] // unit
    each = np.repeat(np.arange(len(a)), parts)
    part = np.arange(len(each)) - np.repeat(np.cumsum(parts) - parts, parts)
    place = a["address"][each].astype(int) // unit + part
    return each, place - place.min()


def _meetings(key, who, kind):
    """The indices of those that share a key, where they are not all one's, one of them writes, and
    not all are atomic: those come in some order."""
    order = np.argsort(key)
    starts = np.flatnonzero(np.diff(key[order], prepend=-1))
    low, high = ([f.reduceat(v[order], starts) for v in (who, kind)]
                 for f in (np.minimum, np.maximum))
    met = (low[0] < high[0]) & (high[1] > READ) & (low[1] < ATOMIC)
    bounds = np.r_[starts, len(order)]
    return [order[bounds[n] : bounds[n + 1]] for n in np.flatnonzero(met)]


def _place(address, args):
    for i, a in enumerate(args):
        if hasattr(getattr(a, "data", None), "ptr"):
            before, after = a.data.ptr - address, address - a.data.ptr - a.nbytes
            if 0 < before <= 1 << 16 or 0 <= after < 1 << 16:
                where = f"{before} bytes before" if before > 0 else f"{after} bytes past the end of"
                return f"what lies {where} argument {i}, {a.dtype} of shape {a.shape}"
    return f"address {address:#x}"


@cache
def _version():
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout


@cache
def _loaded(code, options, tracing):
    """The path and the library of a source; compiled, unless some process has done so before."""
    if reason := missing():
        raise Fault(reason)
    defines = "".join(f"#define {o[2:].replace('=', ' ', 1)}\n" for o in options
                      if o.startswith("-D"))
    kernels = "".join(f"EMULATED_KERNEL({m[2]}, {m[1] or THREADS})\n"
                      for m in KERNEL.finditer(code))
    code = code.replace('extern "C" __global__', "__global__")  # may be named as in C's library
    text = (f'#include "emulator.hpp"\n{defines}namespace source {{\n#line 1 "kernel.cu"\n{code}\n'
            f"{kernels}}}\n")
    compiler = [COMPILER, *OPTIONS, *(TRACING if tracing else ())]
    parts = [text, HEADER.read_text("utf-8"), *compiler, *LIBRARIES, _version()]
    key = hashlib.sha256("\0".join(parts).encode())
    folder = Path(tempfile.gettempdir()) / f"tinyseg-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{key.hexdigest()[:32]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch, "kernel.so")
            done = subprocess.run([*compiler, f"-I{HEADER.parent}", "-xc++", "-", "-o", built,
                                   *LIBRARIES], input=text, capture_output=True, encoding="utf-8")
            if done.returncode:
                raise Fault(f"{COMPILER} does not compile the source:\n{done.stderr[:4000]}")
            built.replace(path)  # whole or not at all, whoever builds the same
    library = ctypes.PyDLL(str(path))  # keeps other threads of Python out of a launch
    library.emulator_launch.argtypes = [ctypes.POINTER(_Job)]
    library.emulator_launch.restype = None
    return path, library


def guarded(array, at=None, blank=False):
    """A copy between pages that may not be accessed.

    at: which end touches its page, "start" or "end"; by default what `flush` says. Arrays on a GPU
    start at multiples of 16 at least, so up to 15 bytes may lie behind the end. They are 0xFF, and
    so is all of a blank copy.
    """
    page = mmap.PAGESIZE
    size = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    room = np.ndarray(size, np.uint8, memory, page)
    room[:] = 0xFF
    start = room.ctypes.data
    for guard in (start - page, start + size):
        if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(guard), page, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page if (at or flush) == "start" else page + (size - array.nbytes) // 16 * 16
    strides = np.empty_like(array).strides  # the same order of axes, without gaps
    copy = np.ndarray(array.shape, array.dtype, memory, offset, strides)  # keeps the memory alive
    if not blank:
        copy[...] = array
    return copy


def forget():
    """The loader reads and compiles its sources anew."""
    for cached in vars(loader).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


@contextmanager
def traced():
    """Launches within give each a `Trace`, in the list that this is; kernels run slower."""
    global traces
    outer, traces = traces, []
    try:
        yield traces
    finally:
        traces = outer


@contextmanager
def mutated(file, old, new):
    """Launches compile kernels/`file`.cu, headers included, with `new` in place of `old`."""
    original, text = loader.source, loader.source(file)
    assert old in text, f"{file} does not contain {old!r}"
    loader.source = lambda f: text.replace(old, new) if f == file else original(f)
    forget()
    try:
        yield
    finally:
        loader.source = original
        forget()
