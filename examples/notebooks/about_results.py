# %% [markdown]
# # Reading results
#
# What a number in a report of this library means, what it hides, and what a difference of two
# needs.

# %%
import numpy as np

from tinyseg import intervals, metrics, page, report
from tinyseg.data import phantom

rng = np.random.default_rng(0)
spacing = (5.0, 3.2, 3.2)
_, truth = phantom.volume(rng, (20, 48, 48), spacing)
organ = truth > 0

# %% [markdown]
# ## Dice
#
# $2 |A \cap B| / (|A| + |B|)$. The same mistake costs a small organ more: one voxel too many all
# around is little for a liver and a disaster for a duct.

# %%
def ball(radius, n=41):
    grid = np.indices((n,) * 3) - n // 2
    return (grid**2).sum(axis=0) <= radius**2


for radius in (3, 6, 12):
    print(f"radius {radius:2}: Dice {metrics.dice(ball(radius + 1), ball(radius)):.3f}")

# %% [markdown]
# ## Surface Dice
#
# The share of both surfaces that lies within a tolerance of the other, in millimetres: what would
# not have to be redrawn. It asks for the spacing, and forgives what Dice does not; and the
# reverse.

# %%
shifted = np.roll(organ, 1, axis=2)              # by one voxel, 3.2 mm
holes = organ & (rng.random(organ.shape) > 0.1)  # a tenth of its voxels is missing
for name, found in (("shifted", shifted), ("holes", holes)):
    surface = [metrics.surface_dice(found, organ, spacing, mm) for mm in (2.0, 4.0)]
    print(f"{name:8} Dice {metrics.dice(found, organ):.3f}, surface Dice within 2 and 4 mm",
          np.round(surface, 3))

# %% [markdown]
# ## Nothing there
#
# Where a class is absent in a patient and none is predicted, there is nothing to score: `nan`,
# which no mean counts. Where it is absent and something is predicted, Dice is 0. `counts` in
# `metrics.json` says how many cases a mean is over.

# %%
empty = np.zeros_like(organ)
print(metrics.dice(empty, empty), metrics.dice(organ, empty))

# %% [markdown]
# ## Patches are not patients
#
# While it trains, the job prints the Dice of its own patches. Half of them are centred on
# foreground, so a network that sees organs everywhere looks good there. Believe the numbers from
# whole held-out scans, which stand at the end, and while training those called "anywhere" and
# "held out".
#
# ## A difference
#
# Two ways, four seeds, twelve patients. The second way is better by 0.01; another seed moves all
# patients by 0.02, patients differ by 0.1. Compared patient by patient, most of that cancels; what
# another seed does, does not.

# %%
patients = 0.7 + 0.1 * rng.standard_normal(12)


def way(gain):
    by_seed, rest = rng.standard_normal((4, 1)), rng.standard_normal((4, 12))
    return patients + gain + 0.02 * by_seed + 0.02 * rest


first, second = way(0), way(0.01)
page.figure(report.scatter, {"second way": (first.ravel(), second.ravel())}, "first way")

# %% [markdown]
# `intervals.interval` takes the differences as (seeds, cases), and treats both as random: another
# seed gives another network, another hospital other patients. With one seed it refuses.

# %%
found = intervals.interval([second - first])
print(f"mean {found.mean:+.3f}, 95 % interval {found.low:+.3f} to {found.high:+.3f}")
alone = (second - first)[0]
half = 2.2 * alone.std(ddof=1) / np.sqrt(len(alone))
print(f"one seed, over cases alone: {alone.mean():+.3f}, {alone.mean() - half:+.3f} to "
      f"{alone.mean() + half:+.3f}")

# %% [markdown]
# The second line is what is often published. It is narrow because it never asks what another seed
# would have said. Several comparisons at once are several chances to be wrong: `intervals.holm`
# raises p for that, and the comparison of `examples/compare_inflation.py` uses both.

# %%
print(intervals.holm({"zero": 0.01, "average": 0.03, "planar": 0.5}))
