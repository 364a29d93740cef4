"""Processes that work on one job together: who each is, and sums over all of them.

All else is handed one of two objects, and does not know which: `Alone`, the only process, or a
`World`, all that `mpiexec -n N` began, by mpi4py (and NCCL, for arrays on GPUs). One of them leads:
it reads and writes, and sends the others to work beside it.

    with ts.ranks.world() as ranks:       # the others serve here, until the leader has left
        if ranks.leads:
            ranks.everywhere(function, *arguments)       # function(ranks, *arguments), on each

Ranks agree in everything but the patches that they have seen: each has the same network, and makes
the same step of the same summed gradient.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing import get_context, parent_process
from threading import Thread
from types import ModuleType
from typing import Any, Self

import numpy as np

from . import backend, parallel
from .backend import Array, array_module

# How many processes were begun, as MPICH's mpiexec and its kin, Open MPI's, and srun tell it.
BEGUN = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
BUCKET = 4 * 2**20  # bytes of gradients that travel together, at least
NAP = 0.01  # seconds between looks for work: MPI itself would keep a core busy
TOLD = 0.5  # seconds in which mpiexec passes on what a rank says at its end


class Stopped(KeyboardInterrupt):
    """The leader was asked to stop, and all ranks do, after the same step."""


class Alone:
    """The only process: its sums are its own numbers.

    >>> ranks = ts.ranks.Alone()
    >>> ranks.part(5), ranks.gather("a"), ranks.everywhere(lambda ranks, x: x + ranks.size, 2)
    (slice(0, 5, None), ['a'], 3)
    """

    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this is the rank that reads and writes."""
        return self.rank == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *what: Any) -> None:
        pass

    def part(self, count: int) -> slice:
        """Which of `count` things are this rank's: parts that follow one another, alike but for
        one. ValueError where there are fewer than ranks."""
        if count < self.size:
            raise ValueError(f"found {count} patches a step for {self.size} ranks, expected one for"
                             f" each at least; ask for a larger batch, or begin fewer ranks")
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, value: Any) -> list:
        """What every rank gives, in their order, on each of them."""
        return [value]

    def total(self, array: Array) -> Array:
        """The sum over ranks of small arrays, the same bits on each."""
        parts = self.gather(array)
        return sum(parts[1:], parts[0])

    def agreed(self, value: Any) -> Any:
        """What the leader gives, on every rank."""
        return self.gather(value)[0]

    def summing(self) -> AbstractContextManager[Callable[[Any], None] | None]:
        """A context that gives `ready` for one `Tensor.backward`, of leaves without a gradient: at
        its end theirs are sums over ranks. They are on their way while others are computed."""
        return nullcontext()

    def everywhere(self, function: Callable, *arguments: Any, **own: Any) -> Any:
        """function(ranks, *arguments) on every rank at once, what it returns on this one; `own` are
        for this rank only. Function and arguments are pickled."""
        return function(self, *arguments, **own)

    @contextmanager
    def pool(self, jobs: int) -> Iterator[Executor]:
        """An executor (concurrent.futures) of work that does not meet: `jobs` processes, or of
        several ranks all but this one. An error in the block ends it, with what was not begun."""
        with ProcessPoolExecutor(jobs, get_context("spawn"), _follow) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def device(self, name: str) -> ModuleType:
        """`backend.device`; of several GPUs in a machine, each rank there takes another."""
        return backend.device(name)


def _follow() -> None:  # ends with the process that began this one, however that ends
    parent: Any = parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


ALONE = Alone()


class World(Alone):
    """All processes of an MPI communicator, the first of which leads. In a `with` block of their
    own the others do what `everywhere` sends them, until the leader has left its block.

    What all raise alike, AGREED, is raised where it would be in one process. Any other error in one
    of them, while they work together, ends all: the others wait for sums that will not come. It is
    told with its traceback, and the exit code is 1, or 130 for Ctrl-C.
    """

    AGREED = (FloatingPointError, Stopped)

    def __init__(self, comm: Any):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.torn = False
        here = comm.Split_type(_mpi().COMM_TYPE_SHARED)  # those of this machine
        self.local, self.neighbours = here.rank, here.size
        cores = here.allgather(sorted(os.sched_getaffinity(0))
                               if hasattr(os, "sched_getaffinity") else [])
        sharing = cores.count(cores[self.local])  # these have the same cores
        parallel.set_threads(max(1, parallel.threads() // sharing))

    def __enter__(self) -> Self:
        if not self.leads:
            self._serve()
        return self

    def __exit__(self, kind: Any, *what: Any) -> None:
        if self.torn:
            self._end()
        if self.leads:
            self._wake(False)

    def _wake(self, more: bool) -> None:
        """Tell the others whether there is more to do."""
        for rank in range(1, self.size):
            self.comm.send(more, rank)

    def gather(self, value: Any) -> list:
        return self.comm.allgather(value)

    def everywhere(self, function: Callable, *arguments: Any, **own: Any) -> Any:
        self._wake(True)
        self.comm.bcast((function, arguments))
        try:
            return function(self, *arguments, **own)
        except BaseException as error:
            self.torn = not isinstance(error, self.AGREED)
            raise

    def _serve(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader says when to stop
        while True:
            while not self.comm.Iprobe(0):
                time.sleep(NAP)
            if not self.comm.recv(source=0):
                return
            work = self.comm.bcast(None)
            try:
                work[0](self, *work[1])
            except self.AGREED:
                pass  # the leader has the same to tell
            except BaseException:
                self._end()
            del work  # or its files would stay open until there is more

    def _end(self) -> None:
        """End all ranks, and tell why."""
        stopped = issubclass(sys.exc_info()[0] or Exception, KeyboardInterrupt)
        told = "stopped" if stopped else (
            f"rank {self.rank} of {self.size} failed, which ends all:\n{traceback.format_exc()}")
        print(f"\n{told}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        time.sleep(TOLD)
        self.comm.Abort(code := 130 if stopped else 1)
        os._exit(code)  # Abort may return before the process is ended, and more would be told

    @contextmanager
    def summing(self) -> Iterator[Callable[[Any], None]]:
        seen: set[int] = set()
        waiting: list = []  # small leaves, which go together
        going: list = []  # (leaves that were copied, to what, the sum of it that was begun)

        def begin(leaves: list) -> None:
            flat = array_module(leaves[0].grad).concatenate([a.grad.reshape(-1) for a in leaves])
            going.append((leaves[:], flat, self._begin(flat)))
            leaves.clear()

        def ready(leaf: Any) -> None:
            if id(leaf) in seen:
                raise RuntimeError("a gradient is ready twice, and was summed over ranks before; "
                                   "expected one backward pass in a block of `summing`")
            seen.add(id(leaf))
            if leaf.grad.nbytes >= BUCKET and leaf.grad.flags.c_contiguous:
                going.append(([], None, self._begin(leaf.grad)))
            else:
                if waiting and waiting[0].grad.dtype != leaf.grad.dtype:
                    begin(waiting)
                waiting.append(leaf)
                if sum(each.grad.nbytes for each in waiting) >= BUCKET:
                    begin(waiting)
            for *_, each in going:
                each.advance()

        yield ready
        if waiting:
            begin(waiting)
        for leaves, flat, each in going:
            each.finish()
            first = 0
            for leaf in leaves:
                leaf.grad[...] = flat[first : first + leaf.grad.size].reshape(leaf.grad.shape)
                first += leaf.grad.size

    def _begin(self, array: Array) -> Any:
        """Begin the sum of an array over ranks, in its place."""
        if isinstance(array, np.ndarray):
            return _InMemory(self.comm, array)
        cuda = array_module(array).cuda
        nccl = getattr(cuda, "nccl", None)
        if nccl is None or not getattr(nccl, "available", False):
            return _Staged(self.comm, array)
        if not hasattr(self, "_nccl"):
            name = self.agreed(nccl.get_unique_id() if self.leads else None)
            self._nccl = nccl.NcclCommunicator(self.size, name, self.rank)
            self._stream = cuda.Stream(non_blocking=True)
        return _OnGpus(self._nccl, self._stream, array)

    @contextmanager
    def pool(self, jobs: int) -> Iterator[Executor]:
        with self.everywhere(_pooled) as pool:
            try:
                yield pool
            except KeyboardInterrupt:
                self._end()  # now, and not when all that was handed out is done
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def device(self, name: str) -> ModuleType:
        library = backend.device(name)
        if library is not np:
            if (count := library.cuda.runtime.getDeviceCount()) < self.neighbours:
                raise RuntimeError(f"found {self.neighbours} ranks for {count} GPUs of a machine, "
                                   "expected one for each at most")
            library.cuda.Device(self.local).use()
        return library


class _InMemory:
    """A sum over ranks of an array in host memory, in place, that goes on while others work."""

    def __init__(self, comm: Any, array: np.ndarray):
        self.request = comm.Iallreduce(_mpi().IN_PLACE, array)

    def advance(self) -> None:
        """MPI moves on when it is called, and not by itself."""
        self.request.Test()

    def finish(self) -> None:
        """Wait for the sum."""
        self.request.Wait()


class _Staged(_InMemory):
    """The same of an array on a GPU, by way of host memory."""

    def __init__(self, comm: Any, array: Array):
        self.array, self.host = array, array.get()
        super().__init__(comm, self.host)

    def finish(self) -> None:
        super().finish()
        self.array[...] = array_module(self.array).asarray(self.host)


class _OnGpus:
    """The same by NCCL, on a stream of its own."""

    def __init__(self, nccl: Any, stream: Any, array: Array):
        cuda = array_module(array).cuda
        stream.wait_event(cuda.get_current_stream().record())
        kind = {"float32": cuda.nccl.NCCL_FLOAT32, "float64": cuda.nccl.NCCL_FLOAT64}[
            str(array.dtype)]
        nccl.allReduce(array.data.ptr, array.data.ptr, array.size, kind, cuda.nccl.NCCL_SUM,
                       stream.ptr)
        self.done, self.cuda = stream.record(), cuda

    def advance(self) -> None:
        """It does by itself."""

    def finish(self) -> None:
        """What is computed from here on waits for the sum; the host does not."""
        self.cuda.get_current_stream().wait_event(self.done)


def _pooled(ranks: World) -> Any:
    """What the leader enters to hand out work; the others do it, until it has left."""
    from mpi4py.futures import MPICommExecutor

    pool = MPICommExecutor(ranks.comm, 0)
    if not ranks.leads:
        with pool:
            pass
    return pool


def _mpi() -> Any:
    from mpi4py import MPI  # starts MPI: not before it is wanted

    return MPI


def world() -> Alone:
    """All processes that were begun together, or this one alone.

    RuntimeError where mpiexec has begun several and there is no mpi4py, or one of another MPI.
    """
    begun = max(int(os.environ.get(name, 1)) for name in BEGUN)
    if begun == 1:
        return ALONE
    try:
        comm = _mpi().COMM_WORLD
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(f"mpiexec began {begun} processes, which need mpi4py to work together:"
                           f" pip install tinyseg[mpi] ({error})") from None
    if comm.size != begun:
        raise RuntimeError(f"mpiexec began {begun} processes, of which mpi4py finds {comm.size}: it"
                           " is of another MPI; begin them by the mpiexec of that one")
    return World(comm)
