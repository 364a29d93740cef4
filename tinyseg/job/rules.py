"""Rules by which a plan is made of what cases are like: spacing, patches, what is done along depth.

Each is a function with its source; the constants are what measurements may change. Axes are
(D, H, W), lengths in mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

import numpy as np

from ..data import ct

CELL = 8  # voxels that sides of patches are multiples of
CONTEXT = 256  # voxels along a side of a patch of a slice, at most
SMALL = 64  # voxels along every axis of a case that is seen enlarged
ENLARGED = 2**19  # voxels of such a case, at most
COVER = 16  # patches in the median case, at most, before its spacing is coarsened
COARSE = 2.0  # mm, to which a spacing is coarsened at most
WHOLE = 0.9  # of each side of a case makes a patch that is as good as whole
LEAST = 4  # voxels along an axis that nnU-Net's halvings leave (UNet_featuremap_min_edge_length)
# Which halvings leave depth as it is, rule or not, by how many a trunk has: then inflation keeps
# what the 2D network knows, as benchmarks/inflation.py prints; benchmarks/README.md has its table.
KEPT = {5: (True, True, False, False, False), 3: (True, True, False)}
# Times that training sees a voxel of its cases, above which patches are varied: hippocampi in 2D
# were segmented better without where that was 0.2, and with it where it was 4.
SEEN = 2.0
FLAT = 2  # stages, the stem's and layer1's, whose kernels stay flat where inflation mixes slices


def working_spacing(spacings: np.ndarray, extents: np.ndarray, voxels: int
                    ) -> tuple[float, float, float]:
    """The spacing in mm that scans of these spacings and extents (cases, 3), in mm, are seen at.

    Their median; of thick slices (over 3 times the rest, and fewer than a third of its voxels) the
    10th percentile, but no finer than the rest (nnU-Net: Isensee et al. 2021). The first halving of
    a ResNet comes before anything is learned of detail, so a case of under SMALL voxels along every
    axis is seen at half the spacing, as long as it then has no more than ENLARGED. Where a patch of
    `voxels` would be under 1 / COVER of the median case, the finest axes are coarsened towards the
    coarsest, up to COARSE mm.
    """
    spacing, extent = np.median(spacings, axis=0), np.median(extents, axis=0)
    coarse = int(spacing.argmax())
    rest = np.delete(spacing, coarse).max()
    if (spacing[coarse] > ct.THICK * rest
            and ct.THICK * extent[coarse] / spacing[coarse] < np.delete(extent / spacing,
                                                                        coarse).min()):
        spacing[coarse] = max(rest, np.percentile(spacings[:, coarse], 10))
    while max(extent / spacing) < SMALL and prod(2 * extent / spacing) <= ENLARGED:
        spacing = spacing / 2
    limit = min(spacing.max(), COARSE)
    while prod(extent / spacing) > COVER * voxels and spacing.min() < limit:
        spacing = np.maximum(spacing, min(1.1 * spacing.min(), limit))
    d, h, w = spacing.tolist()
    return d, h, w


def enlarged(spacing: Sequence[float], spacings: np.ndarray) -> bool:
    """Whether scans of these spacings (cases, 3) are seen at half of them or finer, so that a
    network's first halving only goes back to what was scanned."""
    return bool((np.array(spacing) <= 0.6 * np.median(spacings, axis=0)).all())


def patch_of_volumes(shape: Sequence[int], spacing: Sequence[float], voxels: int
                     ) -> tuple[int, int, int]:
    """(D, H, W), a case of this shape in multiples of CELL, cut until it is of at most `voxels`:
    first to slices as the 2D network sees them (`patch_of_slices`), then along depth down to CELL,
    then across, the longer side in mm. An inflated network knows whole slices, and loses what it
    knows on parts of them: benchmarks/README.md has the figures."""
    (h, w), d = patch_of_slices(shape), CELL * ceil(shape[0] / CELL)
    while d * h * w > voxels and (d, h, w) != (CELL, CELL, CELL):
        if d > CELL:
            d -= CELL
        elif w == CELL or h > CELL and h * spacing[1] >= w * spacing[2]:
            h -= CELL
        else:
            w -= CELL
    return d, h, w


def patch_of_cases(shape: Sequence[int], voxels: int) -> tuple[int, int, int] | None:
    """(D, H, W), a case of this shape in multiples of CELL, cut to at most `voxels` where it loses
    the least; None where some side would be shorter than the share WHOLE of it."""
    sides = [CELL * ceil(n / CELL) for n in shape]
    while prod(sides) > voxels:
        left, axis = max(((side - CELL) / n, i) for i, (side, n) in enumerate(
            zip(sides, shape, strict=True)))
        if left < WHOLE:
            return None
        sides[axis] -= CELL
    d, h, w = sides
    return d, h, w


def patch_of_slices(shape: Sequence[int]) -> tuple[int, int]:
    """(H, W), whole slices of a case of this shape, or as much of them as CONTEXT."""
    h, w = (min(CONTEXT, CELL * ceil(n / CELL)) for n in shape[1:])
    return h, w


def depth_strides(spacing: Sequence[float], depth: int, kept: Sequence[bool] = KEPT[5]
                  ) -> tuple[int, ...]:
    """The depth stride of each halving of the plane, for a patch of `depth` voxels.

    nnU-Net's rule (get_pool_and_conv_props): an axis is halved while its spacing is under twice the
    finest and at least LEAST voxels remain. Finer than that where `kept`: early halvings lose most
    of what the 2D network knows.
    """
    strides: list[int] = []
    along, across = spacing[0], min(spacing[1:])
    for keep in kept:
        halved = not keep and along < 2 * across and depth >= 2 * LEAST
        strides.append(1 + halved)
        along, across, depth = along * strides[-1], 2 * across, ceil(depth / strides[-1])
    return tuple(strides)


def slots(spacing: Sequence[float], strides: Sequence[int], apart: bool = True) -> tuple[int, ...]:
    """Slots along depth of the kernels of the stem and layers 1 to 4, given the strides.

    3 where the spacing along depth is under twice that of the plane, on the grid that they answer
    on, else 1, slice by slice (nnU-Net: get_pool_and_conv_props). Where inflation mixes slices from
    the first, not keeping them `apart`, little of the 2D network would be kept: 1 in the first
    FLAT stages.
    """
    found: list[int] = []
    along, across = spacing[0], min(spacing[1:])
    for stride in strides:  # stem, pool (layer 1 answers on its grid), layers 2 to 4
        along, across = along * stride, across * 2
        found.append(3 if along < 2 * across and (apart or len(found) >= FLAT) else 1)
    return tuple(found + found[-1:] * (5 - len(found)))


def augmentation(seen: float) -> str:
    """The preset of `data.augment` for training that sees a voxel of its cases `seen` times.

    What is new each time cannot be learned by heart, and is learned faster as it is.
    """
    return "mild" if seen > SEEN else "none"
