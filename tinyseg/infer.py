"""Whole volumes from windows of the training patch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from math import ceil

import numpy as np

from .backend import Array, array_module, to_library, to_numpy
from .data.ct import Plan, resample
from .data.nifti import Volume
from .data.sampling import pad
from .nn import Module
from .tensor import Tensor, no_grad


def starts(length: int, window: int, overlap: float) -> list[int]:
    """Evenly spread first voxels of windows that cover an axis, `overlap` of a window shared."""
    stride = max(1, int(window * (1 - overlap) + 1e-9))  # 20 * (1 - 0.8) is 3.999...
    count = ceil((length - window) / stride) + 1
    return [round(i * (length - window) / max(1, count - 1)) for i in range(count)]


def gaussian(size: tuple[int, ...], sigma: float = 1 / 8) -> np.ndarray:
    """Weights (*size) that fall off from a window's centre; sigma in window lengths, as nnU-Net's.

    The least weight is a thousandth of the largest, so that every voxel is divided by something.
    """
    weights = np.ones(size, "float32")
    for axis, n in enumerate(size):
        x = (np.arange(n) - (n - 1) / 2) / (sigma * n)
        weights *= np.exp(-x * x / 2).reshape([-1 if a == axis else 1 for a in range(len(size))])
    return np.maximum(weights, weights.max() / 1000)


def sliding_window(net: Module | Callable, volume: Array, patch: tuple[int, ...],
                   overlap: float = 0.5, *, batch: int = 1, labels: bool = False,
                   progress: Callable[[Iterable], Iterable] = iter) -> np.ndarray:
    """Logits (*S, classes), float32, or labels (*S), uint8, of a volume (*S, C).

    Windows of the size `patch` overlap by the fraction `overlap` and are averaged with Gaussian
    weights. A volume smaller than the patch is padded as in training and cut back. With a patch
    of one axis less than the volume the network is one of slices: they are taken along the first
    axis, every one once in depth. `batch` windows go through the network at a time; `progress`
    wraps the windows (tqdm, say). A module is put into evaluation mode for the call, its network
    runs where its parameters are, and the result is in host memory.

    Raises ValueError where the patch does not fit the volume's rank or overlap is not in [0, 1).
    """
    flat = len(patch) == volume.ndim - 2
    size = (1, *patch) if flat else tuple(patch)
    if len(size) != volume.ndim - 1:
        raise ValueError(f"a patch {patch} does not fit a volume of shape {volume.shape} "
                         "(spatial axes and channels)")
    if min(size) < 1 or batch < 1:
        raise ValueError(f"patch is {patch} and batch {batch}; expected at least 1")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; expected 0 <= overlap < 1")
    padded, inside = pad(to_numpy(volume), size)
    grid = [starts(n, p, overlap) for n, p in zip(padded.shape, size, strict=False)]
    corners = list(product(*grid))
    weight = gaussian(size)[..., None]
    total, norm = None, np.zeros((*padded.shape[:-1], 1), "float32")
    modules, library = [], np
    if isinstance(net, Module):
        modules = net.modules()
        library = next((array_module(p.data) for p in net.parameters()), np)
    modes = [m.training for m in modules]
    try:
        for module in modules:
            module.training = False
        with no_grad():
            for group in progress([corners[i : i + batch] for i in range(0, len(corners), batch)]):
                places = [tuple(slice(c, c + p) for c, p in zip(corner, size, strict=True))
                          for corner in group]
                windows = np.stack([padded[place] for place in places]).astype("float32")
                windows = to_library(windows[:, 0] if flat else windows, library)
                logits = to_numpy(net(Tensor(windows)).data)
                logits = logits[:, None] if flat else logits
                if total is None:
                    total = np.zeros((*padded.shape[:-1], logits.shape[-1]), "float32")
                for place, answer in zip(places, logits, strict=True):
                    total[place] += answer * weight
                    norm[place] += weight
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
    total /= norm
    total = total[inside]
    return total.argmax(axis=-1).astype("uint8") if labels else total


def segment(net: Module, scan: Volume, *, overlap: float = 0.5,
            progress: Callable[[Iterable], Iterable] = iter) -> np.ndarray:
    """The label map (D, H, W), uint8, of a scan on its own grid, by a network that `load` returned.

    Preparation and patch are those the network was trained with (`net.metadata`); the logits are
    resampled to the scan's grid before the largest is taken.
    """
    plan, patch = Plan(**net.metadata["plan"]), tuple(net.metadata["patch"])
    patch = patch[-net.config["rank"] :]
    image = plan.prepare(scan)
    logits = sliding_window(net, image, patch, overlap, batch=1 if len(patch) == 3 else 8,
                            progress=progress)
    return resample(logits, scan.array.shape[:3]).argmax(axis=-1).astype("uint8")
