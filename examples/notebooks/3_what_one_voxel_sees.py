# %% [markdown]
# # What one voxel sees
#
# A network decides about one voxel by looking around it. How far? This lesson computes it, draws
# it, shows what happens at borders, and why a network that was trained on small patches may fail on
# whole volumes. At the end you choose how deep a network must be to read digits.
#
# Fifteen minutes of reading, four exercises. The last part needs scikit-learn.

# %%
import numpy as np

import tinyseg as ts
from tinyseg import models, nn, page, pictures

rng = np.random.default_rng(0)

# %% [markdown]
# ## The rule
#
# Layer by layer, keep two numbers: how many voxels of the input one position *sees*, and how many
# voxels apart neighbouring positions stand, the *step*. Both begin at 1. A kernel of k taps with
# dilation d and stride s makes of them
#
# $$\text{sees} \leftarrow \text{sees} + (k - 1) \, d \cdot \text{step}, \qquad
# \text{step} \leftarrow \text{step} \cdot s$$
#
# ## Exercise 1: by hand
#
# A stem with 7 taps and stride 2, then 3 taps with stride 2, then 3 taps with dilation 2 (pooling
# windows count like kernels). How many voxels does one number of the answer see, along one axis?

# %% tags=["exercise"]
sees = ...

# %% tags=["check"]
net = nn.Sequential(nn.Conv(1, 4, (7, 7), stride=2, padding=3, rng=0),
                    nn.Conv(4, 4, (3, 3), stride=2, padding=1, rng=1),
                    nn.Conv(4, 4, (3, 3), dilation=2, padding=2, rng=2))
told = ts.summary(net, (1, 64, 64, 1))
after = [layer.sees[0] for layer in told.layers]
assert sees not in after[:-1], f"{sees} is what a layer before sees; the last one adds to it"
assert sees == after[-1], f"not {sees}: (k - 1) d step for each, and step is 1, then 2, then 4"
print("right\n")
print(told)

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# After the stem: sees 7, step 2. Now the second layer: 7 + (3 - 1) x 1 x 2.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# sees = 7 + 2 * 1 * 2 + 2 * 2 * 4
# ```
# </details>

# %% [markdown]
# ## A residual network
#
# ResNet-18 for segmentation halves three times and then dilates instead (Pakhomov et al. 2017), so
# that what it sees goes on growing while its maps stay as fine: an eighth of the image along each
# axis, *output stride* 8. `ts.summary` follows all paths; here is the last convolution of each
# block. An image smaller than that is seen as a whole, and padding around it.

# %%
net = models.resnet_seg("resnet18", rank=2, in_channels=1, classes=2).eval()
for layer in ts.summary(net, (1, 64, 64, 1)).layers:
    if layer.name.endswith("conv2"):
        print(f"{layer.name} answers {layer.shape[1:3]}, sees {layer.sees[0]:3} x {layer.sees[1]}")

# %% [markdown]
# That is what it *can* see. How much each voxel counts is a gradient: of one number in the middle
# of a map, in all voxels of the input. It is far from even: the middle is reached on many more
# paths.

# %%
def influence(layers):
    x = ts.Tensor(rng.standard_normal((1, 160, 160, 1)), requires_grad=True)
    y = net.maxpool(net.bn1(net.conv1(x), relu=True))
    for i in range(1, layers + 1):
        y = getattr(net, f"layer{i}")(y)
    y[0, y.shape[1] // 2, y.shape[2] // 2].sum().backward()
    return abs(x.grad[0, ..., 0])


net.astype("float64")
page.figure(pictures.maps, {f"layer{i}": influence(i) for i in range(1, 5)})

# %% [markdown]
# ## Exercise 2: borders
#
# Three convolutions with 3 x 3 taps, each padded by one so that 12 x 12 positions stay 12 x 12.
# Some positions of the answer have seen padding, through one layer or another. How many have not?

# %% tags=["exercise"]
untouched = ...

# %% tags=["check"]
image = rng.standard_normal((1, 12, 12, 1))
answers = []
for mode in ("zero", "edge"):  # whoever sees the border notices how it is padded
    layers = [nn.Conv(1, 1, (3, 3), padding=1, padding_mode=mode, rng=i) for i in range(3)]
    answers.append(nn.Sequential(*layers).astype("float64")(image).data)
same = int(np.isclose(*answers).sum())
assert untouched == same, f"not {untouched}: each layer carries the border one position further in"
print(f"right: {same} of {12 * 12}")

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# After one layer, a frame of one position has seen padding. What is left of 12 after three?
# </details>
# <details><summary>Solution</summary>
#
# ```python
# untouched = (12 - 2 * 3) ** 2
# ```
# </details>

# %% [markdown]
# ## Exercise 3: taps that never see anything
#
# Train on patches of 64 x 64: at output stride 8 the maps of the last block are 8 x 8, and its
# kernels have 3 x 3 taps with dilation 4. Of all pairs of a position and a tap, which share stands
# on the map, and not in the padding? (Count along one axis first.)

# %% tags=["exercise"]
share = ...

# %% tags=["check"]
position, tap = np.arange(8)[:, None], 4 * np.arange(-1, 2)
on_the_map = ((position + tap >= 0) & (position + tap < 8)).mean()
assert share is not ..., "write a number between 0 and 1"
assert abs(share - on_the_map) > 5e-3, "that is one axis: a pair must be on the map along both"
assert abs(share - on_the_map**2) < 5e-3, f"not {share:.3f}: count along one axis, of 8 " \
    "positions x 3 taps, and then think of two axes"
print(f"right: {share:.0%}; on 40 x 40, where 8 of 120 miss, it would be {(1 - 8 / 120)**2:.0%}")

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# The middle tap always stands on the map, 8 of 8 positions. The first one does for positions 4 to
# 7.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# share = ((4 + 8 + 4) / 24) ** 2
# ```
# </details>

# %% [markdown]
# On patches most outer taps multiply zeros: they hardly learn, and yet they are there. Given a
# whole volume, where those taps stand on voxels, they add what nobody has trained. A network like
# this one scored a Dice of 0.86 on hippocampi in windows of the size of its patches, and 0.16 on
# the same volumes as a whole. So `tinyseg` predicts in windows of the patch's size, and joins them.
#
# ## Exercise 4: deep enough to read
#
# Digits of 8 x 8 pixels. A network of convolutions with 3 x 3 taps, then the mean over all
# positions, then one linear layer. With one convolution it knows which strokes there are, and not
# how they stand to each other. How many are needed, at least, until one position sees 8 pixels
# along each axis?

# %%
def reader(layers):
    made = []
    for i in range(layers):
        made += [nn.Conv(16 if i else 1, 16, (3, 3), padding=1, rng=i), nn.ReLU()]
    return nn.Sequential(*made, nn.GlobalAverage(), nn.Linear(16, 10, rng=99))

# %% tags=["exercise"]
layers = ...

# %% tags=["check"]
assert layers is not ... and layers > 0, "give a number of layers"
sees = [ts.summary(reader(n), (1, 8, 8, 1)).layers[2 * n - 2].sees[0] for n in range(1, layers + 1)]
assert sees[-1] >= 8, f"{layers} layers see {sees[-1]} pixels of 8: each adds (3 - 1) x 1 x 1"
assert sees[-2] < 8, f"{layers} are more than needed: {layers - 1} see {sees[-2]} already"
print("right:", sees)

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# One layer sees 3 pixels, two see 5.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# layers = 4
# ```
# </details>

# %%
from sklearn.datasets import load_digits

images, digits = load_digits(return_X_y=True)
images, order = images.reshape(-1, 8, 8, 1).astype("float32") / 16, rng.permutation(1797)
known, new = order[:1400], order[1400:]

# %%
def accuracy(net, steps=120):
    optimizer = ts.optim.AdamW(net.parameters(), 5e-3)
    for _ in range(steps):
        some = rng.choice(known, 64)
        optimizer.zero_grad()
        ts.losses.cross_entropy(net(images[some]), digits[some]).backward()
        optimizer.step()
    return (net(images[new]).data.argmax(axis=-1) == digits[new]).mean()

# %%
for n in (1, 2, layers):
    found = [accuracy(reader(n)) for _ in range(3)]
    print(f"{n} layers:", " ".join(f"{share:.0%}" for share in found), "of digits not seen before")

# %% [markdown]
# Three runs each, as another order of the digits gives another network. (More layers are also more
# numbers to learn; what a difference needs to be believed is the subject of lesson five.)
