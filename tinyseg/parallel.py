"""All cores: a shared pool of threads for work on NumPy arrays.

NumPy lets go of the interpreter inside products and elementwise functions, so that threads that
each work on a slab of an array run side by side, elementwise work included. BLAS is held to one
thread meanwhile: its own would contend with these, and keep a core busy for a while after a product
(a training step took 20 % longer where single products had BLAS's threads). Apple's Accelerate,
which has no such setting, is left to itself.

Freed memory is kept for the next arrays. glibc would give it back to the system and have it paged
in anew, 100 MiB in every step of a small 3D network, which took 4 to 10 % longer. The first run
tells it, for the whole process, to map no array apart from the others and to keep up to 1 GiB at
their end: a window's largest arrays, mapped apart, made a U-Net take 6 % longer. What lies before
others that live is kept until `release`.

OpenBLAS copies what it multiplies to a buffer, one for each thread, and its kernels fetch ahead
beyond what small products have ever written there: pages that do not exist are looked up anew each
time. Products of 144 x 256 x 256 took 3.7 times as long on a virtual machine until a larger one had
used the buffer, so the first run takes one in each thread.

How work is cut depends on the number of threads, so a result is the same in every run with the
same number, and may differ in the last bits with another.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from math import ceil, gcd, prod
from typing import Any

import numpy as np
from threadpoolctl import OpenBLASController, ThreadpoolController

from .backend import Array, array_module

SLAB = 2**18  # numbers: few enough for the cache, enough that threads seldom meet in Python
WIDE = 512  # numbers in a row, up to which NumPy's loops take longer for each

_setting = 0
_here = threading.local()


def threads() -> int:
    """How many threads work: what `set_threads` said, by default the cores of this process."""
    if _setting:
        return _setting
    # Where the system can tell, the cores that this process may use and not those of the machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(number: int) -> None:
    """Let `number` threads work on arrays, 0 for as many as this process has cores."""
    global _setting
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"number of threads is {number!r}; expected an int from 0")
    _setting = number


def parts(length: int, size: int = 0) -> list[slice]:
    """An axis of this length cut into parts of `size`, by default one for each thread."""
    size = size or max(1, -(-length // threads()))
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def pieces(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Arrays of one shape in pieces that stay in cache; whole where they are not NumPy's."""
    if array_module(arrays[0]) is not np or not all(a.flags.c_contiguous for a in arrays):
        yield arrays
        return
    flat = [a.reshape(-1) for a in arrays]
    for part in parts(flat[0].size, SLAB):
        yield tuple(a[part] for a in flat)


def widened(rows: Array, *columns: Array) -> tuple[Array, ...]:
    """Rows (M, C) as (M / k, k C), and each of the columns (C,) k times over, so that few channels
    do not make short loops; k, a power of two, is 1 where the array is not NumPy's."""
    library, channels = array_module(rows), rows.shape[-1]
    most = 1 << max(1, WIDE // channels).bit_length() - 1
    k = gcd(len(rows), most) if library is np else 1
    wide = [library.tile(column, k) for column in columns] if k > 1 else columns
    return rows.reshape(-1, k * channels), *wide


def share(grid: tuple[int, ...], number: int) -> int:
    """How many points each of about `number` shares of a grid has: whole rows, where it has one."""
    limit, row = ceil(prod(grid) / number), 1
    for n in reversed(grid[1:]):
        if row * n > limit:
            break
        row *= n
    return ceil(limit / row) * row


@cache
def _pool(process: int, number: int) -> ThreadPoolExecutor:
    # Keyed by the process: a forked one has this cache, but none of the threads.
    return ThreadPoolExecutor(number, "tinyseg")


class _OneBlasThread:
    """BLAS held to one thread from the first who comes in to the last who leaves, in whatever
    order their threads do; then it has again as many as before the first."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.libraries: list | None = None
        self.before: list[int] = []  # of each library, while they are held

    def __enter__(self) -> None:
        with self.lock:
            if self.libraries is None:
                self.libraries = ThreadpoolController().select(user_api="blas").lib_controllers
                if hasattr(os, "register_at_fork"):
                    os.register_at_fork(after_in_child=self._alone)
            self.inside += 1
            if not self.before:
                self.before = [library.get_num_threads() for library in self.libraries]
                self._set([1] * len(self.before))

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self._set(self.before)
                self.before = []

    def _set(self, numbers: list[int]) -> None:
        # threadpoolctl, from 3.8 on, lets only one thread change OpenBLAS until that thread gives
        # it free, and passes over all others: here the last to leave may be another than the first.
        release = getattr(OpenBLASController, "clear_controlling_thread", lambda force: None)
        release(force=True)
        for library, number in zip(self.libraries or (), numbers, strict=True):
            library.set_num_threads(number)
        release(force=True)

    def _alone(self) -> None:
        # A forked process has none of the other threads, who may have been inside.
        self.lock, self.inside = threading.Lock(), 0


_one_blas_thread = _OneBlasThread()


@cache
def _prepare(process: int, number: int) -> None:
    """What the first run of a process with so many threads does, while BLAS has one thread."""
    a, b = np.ones((256, 512), "float32"), np.ones((512, 1024), "float32")
    others = [_pool(process, number - 1).submit(np.matmul, a, b) for _ in range(number - 1)]
    np.matmul(a, b)
    wait(others)
    if mallopt := _in_glibc("mallopt"):
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def _in_glibc(name: str) -> Any:
    """A function that manages memory; musl's C library and other systems than Linux have none."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def release() -> None:
    """Give freed memory back to the system, where one kind of work ends and another begins."""
    if trim := _in_glibc("malloc_trim"):
        trim(0)


def run(job: Callable[[Any], Any], items: Sequence) -> list:
    """[job(item) for item in items], side by side where there are several; an error is raised.

    A job that calls `run` itself does that part alone.
    """
    if getattr(_here, "busy", False):
        return [job(item) for item in items]

    most = threads()
    number = min(most, len(items))
    results: list = [None] * len(items)
    waiting = iter(enumerate(items))  # shared: whoever is free takes the next

    def work() -> None:
        _here.busy = number > 1
        try:
            for i, item in waiting:
                results[i] = job(item)
        finally:
            _here.busy = False

    with _one_blas_thread:
        _prepare(os.getpid(), most)
        others = [_pool(os.getpid(), number - 1).submit(work) for _ in range(number - 1)]
        try:
            work()
        finally:  # those who have not begun need not; then nobody writes to the arrays any more
            others = [other for other in others if not other.cancel()]
            wait(others)
    for other in others:
        other.result()
    return results
