# %% [markdown]
# # Does it help?
#
# From a scan to a prediction to a score, and to the question of every paper: is this way better
# than that one? One run on a few patients cannot say. This lesson shows how far scores move by luck
# alone, and what a difference needs before anybody may believe it.
#
# Twenty minutes of reading, three exercises. It trains six small networks, in under a minute.

# %%
import numpy as np

import tinyseg as ts
from tinyseg import losses, models, optim, page, report
from tinyseg.data import phantom

# %% [markdown]
# ## Scans
#
# Synthetic abdomens, in Hounsfield units: a pancreas (1) among other organs, with a cyst in it (2).
# The first eight are to learn from; six are held out.

# %%
SHAPE, SPACING = (20, 48, 48), (5.0, 3.2, 3.2)
scans = [phantom.volume(np.random.default_rng(i), SHAPE, SPACING) for i in range(14)]
images = [np.clip(hu / 100, -2, 3).astype("float32")[..., None] for hu, _ in scans]
labels = [truth for _, truth in scans]
train, held_out = range(8), range(8, 14)
page.figure(report.examples, [(f"case {i}", scans[i][0], labels[i], SPACING) for i in (8, 9)],
            {0: "background", 1: "pancreas", 2: "cyst"})

# %% [markdown]
# ## Exercise 1: Dice
#
# $\text{Dice} = 2 |A \cap B| / (|A| + |B|)$ of two sets of voxels. What if both are empty, as in a
# patient without a cyst for whom none is predicted? There is nothing to score: it must be `nan`, so
# that no mean counts it as a failure, nor as a success. Write it for two arrays of bool.

# %% tags=["exercise"]
def dice(predicted, truth):
    return ...

# %% tags=["check"]
full, half, none = np.ones(8, bool), np.arange(8) < 4, np.zeros(8, bool)
with np.errstate(invalid="ignore"):
    found = [dice(*pair) for pair in ((full, full), (half, full), (half, none), (none, none))]
assert found[0] == 1, f"Dice of a set with itself is 1, not {found[0]}"
assert abs(found[1] - 2 / 3) < 1e-9, f"4 voxels in 8: 2 x 4 / (4 + 8), not {found[1]}"
assert found[2] == 0, f"where nothing is there and something is found, it is 0, not {found[2]}"
assert np.isnan(found[3]), f"of two empty sets it is nan, not {found[3]}"
print("right:", np.round(found, 3))

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# `(predicted & truth).sum()` counts what both have. Ask first whether there is anything to divide
# by.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def dice(predicted, truth):
#     together = predicted.sum() + truth.sum()
#     return 2 * (predicted & truth).sum() / together if together else np.nan
# ```
# </details>

# %% [markdown]
# ## Two ways, three seeds
#
# Two losses: cross-entropy alone, and with soft Dice added. Both get the same slices in the same
# order; a seed decides that order and the first weights. The network is a small U-Net: `width=8`
# has an eighth of ResNet-18's channels.

# %%
def untrained(seed):
    net = models.resnet_seg(rank=2, in_channels=1, classes=3, head="unet", width=8,
                            decoder=(32, 24, 16, 12, 8), seed=seed)
    net.prior([0.97, 0.02, 0.01])
    return net


def slices(rng):
    some = [(rng.integers(8), rng.integers(4, 18)) for _ in range(8)]
    return (np.stack([volumes[i][d] for i, d in some]) for volumes in (images, labels))

# %%
def trained(loss, seed, steps=40):
    net, rng = untrained(seed), np.random.default_rng(seed)
    optimizer = optim.AdamW(net.parameters(), 4e-3)
    for _ in range(steps):
        x, y = slices(rng)
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()
    return net.eval()

# %%
nets = {way.__name__: [trained(way, seed) for seed in range(3)]
        for way in (losses.cross_entropy, losses.dice_cross_entropy)}

# %% [markdown]
# Look at each class first, and at what one network says of a case that it has never seen:

# %%
def found_in(net):
    with ts.no_grad():
        return [net(images[i]).data.argmax(axis=-1) for i in held_out]


first = found_in(nets["cross_entropy"][0])
for c, name in ((1, "pancreas"), (2, "cyst")):
    each = [dice(a == c, labels[i] == c) for i, a in zip(held_out, first, strict=True)]
    print(f"{name:9}", np.round(each, 2))
page.figure(report.overlay, scans[8][0], {"by hand": labels[8], "found": first[0]},
            {0: "background", 1: "pancreas", 2: "cyst"}, SPACING)

# %% [markdown]
# After 40 steps it has an idea where the pancreas is, and has given up on the cyst: cross-entropy
# loses little by leaving out what is rare. A mean of both classes would not have told. A case's
# score is that mean nevertheless: `scores[way][seed, case]`.

# %%
def scored(net):
    return [np.nanmean([dice(a == c, labels[i] == c) for c in (1, 2)])
            for i, a in zip(held_out, found_in(net), strict=True)]


scores = {name: np.array([scored(net) for net in each]) for name, each in nets.items()}
for name, table in scores.items():
    print(f"{name:20} seeds {table.mean(axis=1).round(3)}")

# %% [markdown]
# Look at the seeds: the same way, the same scans, another number to start from. What is compared is
# the difference **case by case**, as cases differ far more than ways do.

# %%
plain, both = scores["cross_entropy"], scores["dice_cross_entropy"]
page.figure(report.scatter, {"with Dice": (plain.ravel(), both.ravel())}, "cross-entropy alone")

# %% [markdown]
# ## Exercise 2: an interval by hand
#
# Take one seed. The six differences are a sample; how far might their mean lie from that of all
# patients? The bootstrap draws as many cases as there are, *with replacement*, again and again, and
# looks at how the mean moves: 95 of 100 means lie between the 2.5 and the 97.5 percentile. (Of so
# few cases the interval comes out too narrow; of forty, as in the check, it is about right.)

# %% tags=["exercise"]
def bootstrap(differences, rng, times=4000):
    means = ...  # of `times` draws
    return np.percentile(means, (2.5, 97.5)) if means is not ... else None

# %% tags=["check"]
assert bootstrap(np.ones(3), np.random.default_rng(0)) is not None, "means are still to be written"
sample = np.random.default_rng(5).normal(0.3, 1, 40)
low, high = bootstrap(sample, np.random.default_rng(0))
half_width = 1.96 * sample.std() / np.sqrt(len(sample))
assert abs((high - low) / 2 / half_width - 1) < 0.1, f"the interval is {high - low:.2f} wide, " \
    f"not {2 * half_width:.2f}: each mean is over as many cases as there are, with replacement"
assert abs((high + low) / 2 - sample.mean()) < 0.1, "its middle is not the mean"
print("right: seed 0 says", bootstrap((both - plain)[0], np.random.default_rng(0)).round(3))

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# `rng.integers(n, size=(times, n))` draws numbers of cases; index with it, and take the mean of
# each row.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def bootstrap(differences, rng, times=4000):
#     n = len(differences)
#     means = differences[rng.integers(n, size=(times, n))].mean(axis=1)
#     return np.percentile(means, (2.5, 97.5))
# ```
# </details>

# %% [markdown]
# ## Exercise 3: overturn a win
#
# That interval knows of other patients, and nothing of other seeds. Here is a made-up study of two
# ways that are **equally good**: twelve seeds, eight cases. The first term is the luck of a seed,
# which all its cases share, the second the luck of each case. Which seeds say that the new way is
# better, their interval all above zero, and which that it is worse?

# %%
rng = np.random.default_rng(3)
study = 0.02 * rng.standard_normal((12, 1)) + 0.015 * rng.standard_normal((12, 8))

# %% tags=["exercise"]
better = ...  # a set of seeds, 0 to 11
worse = ...

# %% tags=["check"]
assert isinstance(better, set) and isinstance(worse, set), "write two sets, such as {0, 5}"
ends = dict(enumerate(bootstrap(row, np.random.default_rng(0)).round(4) for row in study))
for name, given, right in (("better", better, {s for s in ends if ends[s][0] > 0}),
                           ("worse", worse, {s for s in ends if ends[s][1] < 0})):
    for s in sorted(given ^ right):
        raise AssertionError(f"{name}: seed {s} has the interval {ends[s]}, look at its signs")
print(f"right: {len(better | worse)} of 12 seeds find a difference that is not there, either way")

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# `for seed, row in enumerate(study): print(seed, bootstrap(row, np.random.default_rng(0)))`
# </details>
# <details><summary>Solution</summary>
#
# ```python
# found = [bootstrap(row, np.random.default_rng(0)) for row in study]
# better = {seed for seed, (low, high) in enumerate(found) if low > 0}
# worse = {seed for seed, (low, high) in enumerate(found) if high < 0}
# ```
# </details>

# %% [markdown]
# ## What to report
#
# Cases and seeds are both random, and an interval has to know of both. `ts.intervals` computes one
# from all seeds and all cases together (as radiology does where several readers look at the same
# cases: a seed here is what a reader is there).

# %%
found = ts.intervals.interval([both - plain])
print(f"Dice added to cross-entropy: {found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})")
rows = [("made-up study, all seeds", *ts.intervals.interval([study])[:3]),
        ("losses, three seeds", *found[:3])]
page.figure(report.forest, rows, "difference of Dice")

# %% [markdown]
# `python examples/compare_inflation.py` does this for ways of making a network of volumes from one
# of slices, on any scans, with as many seeds and folds as you have patience for.
