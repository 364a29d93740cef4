# %% [markdown]
# # A slice becomes a stack
#
# Networks for images have been trained on millions of photographs; scans are volumes, and there are
# few. This lesson turns a network of slices into one of volumes that knows all that the first one
# knows, and shows exactly when that promise holds. The idea is one line: **the numbers along depth
# add up to one**.
#
# Fifteen minutes of reading, four exercises.

# %%
import numpy as np

import tinyseg as ts
from tinyseg import nn, ops, page, pictures, report

rng = np.random.default_rng(0)

# %% [markdown]
# ## One kernel
#
# A kernel of a 2D network has taps (k, k). Make T copies of it, each times a number:
#
# $$w_3[t] = \alpha[t] \; w_2, \qquad \sum_t \alpha[t] = 1$$
#
# Look at a volume that does not change along depth. At every depth the window sees the same slice T
# times, weighted by $\alpha$. Since these add up to one, the answer is that of the 2D kernel.

# %%
w2 = rng.standard_normal((3, 3))
rows = {"2D": [w2]}
for name in ("average", "zero", "triangular", "negative"):
    rows[name] = [alpha * w2 for alpha in ts.profiles.depth_profile(name, 3)]
page.figure(report.kernels, rows)

# %% [markdown]
# `ts.PROFILES` has all that have been published, with their source and what each claims.

# %%
for name, row in ts.PROFILES.items():
    print(f"{name:11}{row.formula}\n{'':11}{row.source}")

# %% [markdown]
# ## A whole network
#
# Batch-norm, ReLU and pooling treat all slices alike, so what holds for one kernel holds for a
# network. `inflate` changes kernels and nothing else: names, biases and statistics stay.

# %%
flat = nn.Sequential(nn.Conv(1, 8, (3, 3), padding=1, rng=0), nn.ReLU(),
                     nn.Conv(8, 2, (3, 3), padding=1, rng=1)).eval()
deep = ts.inflate(flat, depth=3, profile="average")
image = rng.standard_normal((1, 10, 12, 1)).astype("float32")
volume = np.repeat(image[:, None], 6, axis=1)  # six times the same slice
with ts.no_grad():
    one, many = flat(image).data, deep(volume).data
print(many.shape, "largest difference", abs(many - one[:, None]).max())

# %% [markdown]
# ## Where it breaks
#
# At the first and the last slice a window looks past the end. `tinyseg` repeats the border there
# (`depth_padding="edge"`), so that a constant volume stays constant. With zeros, as most libraries
# pad, the slices near the ends see something else. The picture has the largest error of every
# slice.

# %%
def errors(**options):
    with ts.no_grad():
        found = ts.inflate(flat, depth=3, **options)(volume).data - flat(image).data[:, None]
    return abs(found).max(axis=(0, 2, 3, 4))


page.figure(pictures.table, {
    f"{profile}, {padding} repeated" if padding == "edge" else f"{profile}, padded with zeros":
    errors(profile=profile, depth_padding=padding)
    for profile in ("average", "zero", "negative") for padding in ("edge", "zero")}, "slice")

# %% [markdown]
# The profile "zero" does not care: all its numbers stand in the middle slot, which never looks past
# an end.

# %% [markdown]
# ## Exercise 1: a profile of your own
#
# "Negative" is the sharpest of the published ones: at the centre of T slots $(2T - 1) / T$, and at
# all others $-1 / T$. Write it for any number of slots.

# %% tags=["exercise"]
def negative(slots):
    alpha = np.zeros(slots)
    ...
    return alpha

# %% tags=["check"]
for slots in (3, 5):
    alpha = negative(slots)
    assert abs(alpha.sum() - 1) < 1e-12, f"{slots} slots add up to {alpha.sum():.3f}, not to one"
    right = ts.profiles.depth_profile("negative", slots)
    assert np.allclose(alpha, right), f"{slots} slots are {alpha.round(3)}: the centre is T // 2"
print(f"right: the largest error of the network is {errors(profile=negative).max():.0e}")

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# Set all to -1/T, then the one in the middle, `slots // 2`. Add them up: what must that give?
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def negative(slots):
#     alpha = np.full(slots, -1 / slots)
#     alpha[slots // 2] = (2 * slots - 1) / slots
#     return alpha
# ```
# </details>

# %% [markdown]
# ## Exercise 2: which slices break?
#
# The profile "zero" with `slot="first"` puts the whole kernel into slot 0, which sees the slice
# *before*. Pad depth with zeros. The network has two convolutions, the volume six slices, 0 to 5.
# Which slices of the answer are wrong? Decide before you look.

# %% tags=["exercise"]
wrong = ...  # a set of numbers

# %% tags=["check"]
assert isinstance(wrong, set), "write a set of slices, such as {2, 3}"
found = errors(profile="zero", slot="first", depth_padding="zero")
broken = {int(d) for d in np.flatnonzero(found > 1e-5)}
assert wrong & broken, f"none of {sorted(wrong)}: which end looks past the border, first or last?"
assert wrong <= broken, f"not {sorted(wrong - broken)}: slot 0 looks back, and at one end only"
assert wrong == broken, f"more than {sorted(wrong)}: layer two reads wrong slices of layer one"
print("right:", found.round(3))

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# After one convolution, slice d has seen slice d - 1 of the input. Which one has seen the padding?
# And after two?
# </details>
# <details><summary>Solution</summary>
#
# ```python
# wrong = {0, 1}
# ```
# </details>

# %% [markdown]
# ## Exercise 3: a way that cannot be exact
#
# ACS (Yang et al. 2021) splits the filters in three: some look at axial slices, some at coronal,
# some at sagittal ones. In two of the three planes, one axis of the kernel lies along depth. Find
# an image on which the result is exact nevertheless, and one on which it is not.

# %%
def off(image):
    kernel = nn.Conv(1, 6, (3, 3), padding=1, padding_mode="edge", rng=0)
    volume = np.repeat(image[:, None], 6, axis=1)
    with ts.no_grad():
        found = ts.inflate(kernel, depth=3, profile="acs")(volume).data
        return abs(found - kernel(image).data[:, None]).max()

# %% tags=["exercise"]
exact = ...  # numbers of the shape (1, 10, 12, 1)
different = ...

# %% tags=["check"]
assert exact is not ... and different is not ..., "write two arrays, or a number for all pixels"
exact, different = (np.zeros((1, 10, 12, 1)) + x for x in (exact, different))
assert abs(exact).max() > 0, "exact is all zeros, of which every way makes zeros: find another"
first, second = off(exact), off(different)
assert first < 1e-5, f"exact is off by {first:.2g}: two planes see the image smeared along an " \
    "axis; what image does not change by that?"
assert second > 1e-3, f"different is off by {second:.2g} only: let it change across the plane"
print(f"right: {first:.0e} and {second:.2f}")

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# A coronal kernel sees one row of the image k times. Where do the rows of an image all look alike,
# and its columns too? (And it must not be all zeros.)
# </details>
# <details><summary>Solution</summary>
#
# ```python
# exact = np.ones((1, 10, 12, 1))
# different = rng.standard_normal((1, 10, 12, 1))
# ```
# </details>

# %% [markdown]
# ## Exercise 4: nothing along depth, yet
#
# A kernel of T x k x k can be split: first 1 x k x k, the 2D kernel as it is, then T x 1 x 1 over
# channels, v. With the right start of v the two together equal the 2D network on **every** volume,
# not only on constant ones, and training decides what depth is for. Write that start.

# %% tags=["exercise"]
v = np.zeros((3, 1, 1, 4, 4), "float32")  # slots, 1, 1, channels in, channels out
...  # v of all zeros forgets its input: set what is not to be zero

# %% tags=["check"]
assert v.shape == (3, 1, 1, 4, 4), f"v is {v.shape}, not (3, 1, 1, 4, 4): fill it, v[...] = ..."
w = rng.standard_normal((1, 3, 3, 2, 4)).astype("float32")
x = rng.standard_normal((1, 6, 8, 9, 2)).astype("float32")
planes = ops.conv(x, w, padding=(0, 1, 1))
error = abs(ops.conv(planes, v, padding=(1, 0, 0)).data - planes.data).max()
assert error < 1e-6, f"off by {error:.2g}: every channel is to be itself, from its own slice"
print(f"right: the largest error on a random volume is {error:.0e}")

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# Two of the three slots see other slices. In the one that is left, which 4 x 4 matrix changes
# nothing?
# </details>
# <details><summary>Solution</summary>
#
# ```python
# v = np.zeros((3, 1, 1, 4, 4), "float32")
# v[1, 0, 0] = np.eye(4)
# ```
# </details>

# %% [markdown]
# This is the row "factored" of the table, and `ts.inflate(net, profile="factored")` does it for any
# network. Which of these starts is best for real scans? That is the next lesson's question, and it
# turns out that one run does not answer it.
