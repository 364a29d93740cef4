"""Work on the GPU that is launched again as a whole: a CUDA graph.

A training step is some two hundred launches; Python and CuPy take longer to ask for them than an
H100 takes to run those of a small network. A graph holds them, with the addresses that they use,
and one call runs all. What it costs is memory of its own and that shapes stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ..backend import Array, array_module, within
from .loader import arrived

_capturing: ContextVar[tuple] = ContextVar("capturing", default=())


def is_capturing() -> bool:
    """Whether launches are being noted and not run: nothing may be read from the GPU meanwhile."""
    return bool(_capturing.get())


def captured(work: Callable[..., tuple]) -> Callable[..., tuple]:
    """`work`, a function of arrays on the GPU that returns arrays there, in one launch.

    The first call for given shapes and types runs it, which compiles and allocates; the second
    notes its launches and runs them; each further one copies its arguments to where those of the
    second stood, and runs them. All return the arrays of the second from then on, with new numbers.
    Python inside `work` is not run again: what it decides, draws or reads must not change, and
    arrays beside its arguments must stay where they are and be changed in place only.
    RuntimeError where `work` needs the host, CUDA's own where it does what a graph cannot hold.
    """
    seen: dict[tuple, tuple | None] = {}

    def call(*arrays: Array) -> tuple:
        key = tuple((a.shape, a.dtype.str) for a in arrays)
        if key not in seen:
            seen[key] = None
            return work(*arrays)
        held = seen[key] = seen[key] or _record(work, arrays)
        inputs, graph, results, _ = held
        for to, a in zip(inputs, arrays, strict=True):
            to[...] = a
        graph.launch()
        return results

    return call


def _record(work: Callable[..., tuple], arrays: tuple[Array, ...]) -> tuple[list, Any, tuple, Any]:
    """(where its arguments stand, the graph, where its results stand, what must stay with it: the
    pool of their memory, and the stream, or another might get its name and its counters)."""
    library = array_module(arrays[0])
    library.get_default_memory_pool().free_all_blocks()  # what the first call worked in
    cuda = library.cuda
    pool, stream = cuda.MemoryPool(), cuda.Stream(non_blocking=True)
    stream.wait_event(cuda.get_current_stream().record())
    with stream:
        arrived(library)  # made and zeroed here: not noted for later, and not in the pool
        with cuda.using_allocator(pool.malloc):  # memory that nothing else is ever given
            inputs = [a.copy() for a in arrays]
            stream.begin_capture()
            try:
                with within(_capturing):
                    results = work(*inputs)
            finally:
                graph = stream.end_capture()
    cuda.get_current_stream().wait_event(stream.record())
    return inputs, graph, results, (pool, stream)
