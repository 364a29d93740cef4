# %% [markdown]
# # Five decisions
#
# Why the code is as it is: each decision with the few lines that show it, and what it costs.

# %%
import numpy as np

import tinyseg as ts
from tinyseg import models, ops, windows
from tinyseg.windows import Window

rng = np.random.default_rng(0)

# %% [markdown]
# ## An op is its value and its pull-backs
#
# An operation is a function of arrays that returns its answer and, for each input, the function
# that takes the gradient of the answer back to it. Nothing else is registered anywhere, and the
# derivative stands in the next line to what it differentiates.

# %%
@ts.op
def swish(x):
    s = 1 / (1 + np.exp(-x))
    return x * s, [lambda g: g * (s + x * s * (1 - s))]


ts.check_gradients(swish, rng.standard_normal((3, 4)))
print("right, in a random direction with a random cotangent")

# %% [markdown]
# A gradient is an array and not a tensor: gradients of gradients are not to be had. No network
# here asks for them, and the engine fits on two pages.
#
# ## Channels last
#
# Arrays are (N, D, H, W, C). The numbers of one voxel lie side by side, so a window is a few runs
# of memory, a convolution over one voxel is one matrix product, and batch-norm's sums run along
# rows.

# %%
x, w = rng.standard_normal((2, 5, 6, 7, 4)), rng.standard_normal((1, 1, 1, 4, 3))
print(abs(ops.conv(x, w).data - x @ w[0, 0, 0]).max())

# %% [markdown]
# The price is paid at the border: PyTorch's checkpoints are transposed when they are read.
#
# ## Rank is data
#
# There is no Conv2d and no Conv3d. A kernel's shape says its rank, and one function serves lines,
# images and volumes; what is true of one is tested for all.

# %%
for rank in (1, 2, 3):
    x = rng.standard_normal((1, *(6, 7, 8)[:rank], 2))
    w = rng.standard_normal((*(3, 2, 3)[:rank], 2, 5))
    net = models.resnet_seg("resnet18", rank=rank, in_channels=2, classes=3, width=8)
    print(ops.conv(x, w, padding=1).shape, "a network's first kernel", net.conv1.weight.shape)

# %% [markdown]
# ## One bilinear form
#
# A convolution is a number made of three arrays, linear in each: the sum over positions, taps and
# channels of $x \, w \, y$. Its value and both gradients leave one of the three out, and every
# fast way, on CPUs and GPUs, is held to that identity.

# %%
x, w = rng.standard_normal((2, 6, 7, 3)), rng.standard_normal((3, 3, 3, 4))
window = Window.of((3, 3), 2, 1, 1)
y = rng.standard_normal(windows.correlate(x, w, window).shape)
print((windows.correlate(x, w, window) * y).sum(),
      (x * windows.correlate_dx(y, w, x.shape[1:-1], window)).sum(),
      (w * windows.correlate_dw(x, y, window)).sum())

# %% [markdown]
# ## A profile is a row
#
# All published ways from slices to volumes stand in one table: numbers along depth, and of what. A
# new one is a row, which `inflate`, the main job and the comparison then take by its name; any
# function of the number of slots will do, too.

# %%
flat = models.resnet_seg("resnet18", rank=2, in_channels=1, classes=3, width=8)
hann = lambda slots: np.hanning(slots + 2)[1:-1] * 2 / (slots + 1)  # noqa: E731
deep = ts.inflate(flat, depth=5, profile=hann)
print((deep.conv1.weight.data.sum(axis=(1, 2, 3, 4)) / flat.conv1.weight.data.sum()).round(3))
