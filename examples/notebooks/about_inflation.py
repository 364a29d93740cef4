# %% [markdown]
# # What inflation promises, and when it breaks
#
# `inflate` makes a network of volumes that answers as the 2D network does, slice by slice, **on
# inputs that do not change along depth**. That is a theorem about kernels whose numbers along
# depth add up to one, and tests hold every profile to it. It is not a promise about scans, which
# do change. This page measures both.

# %%
import numpy as np

import tinyseg as ts
from tinyseg import models, page, pictures

rng = np.random.default_rng(0)
flat = models.resnet_seg("resnet18", rank=2, in_channels=1, classes=3, width=8).eval()
constant = np.repeat(rng.standard_normal((1, 1, 32, 32, 1)), 8, axis=1).astype("float32")
smooth = constant * np.linspace(0.8, 1.2, 8, dtype="float32")[:, None, None, None]
random = rng.standard_normal(constant.shape).astype("float32")

# %% [markdown]
# The measure is the largest difference of a logit from the 2D network's, slice by slice, as a
# share of the largest logit.

# %%
def difference(volume, net=flat, **options):
    with ts.no_grad():
        slices = net(volume[0]).data[None]
        return abs(ts.inflate(net, **options)(volume).data - slices).max() / abs(slices).max()


def row(**options):
    return [difference(volume, **options) for volume in (constant, smooth, random)]

# %% [markdown]
# ## Profiles
#
# Columns: a volume that is constant along depth, one that grows steadily brighter by half, one
# that is random. All halve depth as the plane (`depth_stride="plane"`).

# %%
names = "average", "triangular", "negative", "zero"
page.figure(pictures.table, {name: row(profile=name) for name in names},
            "constant, smooth, random")

# %% [markdown]
# On the first the promise holds, to rounding. On the others no profile keeps it here, not even
# zero: where depth is halved, only every other slice is looked at.

# %%
page.figure(pictures.table, {f"{name}, stride 1": row(profile=name, depth_stride=1)
                             for name in names}, "constant, smooth, random")

# %% [markdown]
# At depth stride 1 "zero" equals the 2D network on **any** volume: its kernels see one slice.
# Others claim the same, because they start with the identity along depth. What each claims:

# %%
for name, way in ts.PROFILES.items():
    claim = "every volume" if way.volumes else "constant depth" if way.exact else "nothing"
    print(f"{name:11} {claim:15} {way.source[:60]}")

# %% [markdown]
# ## Borders
#
# At its ends a volume has no neighbour slices. Edge padding repeats the last one, so that constant
# stays constant; with zeros the ends are off, and depth strides carry the error inwards.

# %%
for padding in ("edge", "zero"):
    print(padding, f"{difference(constant, profile='average', depth_padding=padding):.1e}")

# %% [markdown]
# ## Batch-norm while training
#
# In evaluation batch-norm is a fixed scale per channel. In training it divides by what the batch
# contains, and a batch of volumes contains other slices than one of images; nobody can promise
# more than that both are the same function of the same statistics.

# %%
net = flat.copy().train()
with ts.no_grad():
    print(f"{abs(ts.inflate(net).train()(constant).data - net(constant[0]).data).max():.1e}")

# %% [markdown]
# Here it holds, as every volume of the batch is constant and all slices have the same statistics.
#
# ## What this means for a scan
#
# Thin slices resemble their neighbours, thick ones do not. The plan of the main job keeps the
# first stages' kernels flat and halves depth late and only while slices are not thicker than twice
# the pixel, and the job prints the Dice of both networks on the same held-out patches right after
# inflating. `benchmarks/README.md`, *What inflation keeps*, has it for real scans.
