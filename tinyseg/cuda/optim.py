"""SGD, AdamW, averages and the norm of all gradients on the GPU: the kernels of kernels/optim.cu.

Each function takes lists with one array per parameter and launches one kernel for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import sqrt
from types import ModuleType

import numpy as np

from ..backend import Array, array_module
from .loader import found, launch

THREADS, CHUNK = 256, 16384  # a block's threads and the elements that they share
_FLOAT = np.dtype("float32")


@lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], chunk: int, library: ModuleType, device: int) -> Array:
    """(blocks, 3) int64 on the current GPU, number `device`: (which array, from, to) per block."""
    rows = [(which, start, min(start + chunk, size)) for which, size in enumerate(sizes)
            for start in range(0, size, chunk)]
    return library.asarray(np.array(rows, "int64").reshape(-1, 3))


@lru_cache(maxsize=16)
def _addresses(rows: tuple[tuple[int, ...], ...], library: ModuleType, device: int) -> Array:
    """`rows` as uint64 on the current GPU. A pool of memory hands a training loop the same
    addresses again and again; most steps find their table here."""
    return library.asarray(np.array(rows, "uint64"))


def _launch(kernel: str, gradients: Sequence[Array], written: Sequence[Sequence[Array]],
            *arguments: float | int | Array) -> None:
    """Run `kernel` on the chunks of all gradients and of the arrays beside them that it writes."""
    library, device = array_module(gradients[0]), gradients[0].data.device_id
    gradients = [library.ascontiguousarray(g) for g in gradients]  # alive until the launch below
    rows = list(zip(gradients, *written, strict=True))
    for row in rows:  # the kernel gets bare addresses, so that the launch cannot look
        for a in row:
            if found(a) != (_FLOAT, True, device) or a.shape != row[0].shape:
                raise ValueError(f"{kernel}: found {a.dtype} {a.shape} with strides {a.strides} on "
                                 f"GPU {a.data.device_id} beside a gradient {row[0].shape}; "
                                 "expected contiguous float32 arrays of equal shape on GPU "
                                 f"{device}")
    chunks = _chunks(tuple(g.size for g in gradients), CHUNK, library, device)
    addresses = _addresses(tuple(tuple(a.data.ptr for a in row) for row in rows), library, device)
    if len(chunks):
        launch("optim", kernel, (len(chunks),), (THREADS,), addresses, chunks, *arguments)


def sgd(parameters: Sequence[Array], gradients: Sequence[Array], velocities: Sequence[Array], *,
        lr: float, momentum: float, nesterov: bool, weight_decay: float) -> None:
    """One step of optim.SGD; parameters and velocities change in place."""
    _launch("sgd", gradients, (parameters, velocities), lr, momentum, weight_decay, int(nesterov))


def adamw(parameters: Sequence[Array], gradients: Sequence[Array], means: Sequence[Array],
          squares: Sequence[Array], *, lr: float, betas: tuple[float, float], eps: float,
          weight_decay: float, step: int) -> None:
    """Step number `step` (from 1) of optim.AdamW; all but the gradients change in place."""
    beta1, beta2 = betas
    _launch("adamw", gradients, (parameters, means, squares), 1 - beta1, 1 - beta2,
            1 - lr * weight_decay, lr / (1 - beta1**step), sqrt(1 - beta2**step), eps)


def average(averages: Sequence[Array], arrays: Sequence[Array], decay: float) -> None:
    """a <- decay a + (1 - decay) x for each pair; the averages change in place."""
    _launch("average", arrays, (averages,), decay)


def norm(gradients: Sequence[Array]) -> Array:
    """The joint Euclidean norm, () float64 on the GPU: for train.clip_norm."""
    blocks = sum(-(-g.size // CHUNK) for g in gradients)
    partials = array_module(gradients[0]).empty(blocks, "float32")
    _launch("squares", gradients, (), partials)
    return partials.sum(dtype="float64") ** 0.5
