# %% [markdown]
# # Coordinates and spacing
#
# A scan is an array and a promise: where in the patient each number was measured. A network sees
# the array only, so a library for scans has to keep the promise. This page takes one scan from its
# file to a network and back, and shows where every number went.

# %%
from pathlib import Path
from tempfile import mkdtemp

import nibabel
import numpy as np

from tinyseg import page, report
from tinyseg.data import ct, nifti, phantom

folder = Path(mkdtemp())

# %% [markdown]
# ## A file
#
# A synthetic CT, written as scanners may write one: the axes in another order, two of them
# backwards, and the table turned by ten degrees. The **affine** says what a voxel's indices mean:
# it takes (i, j, k, 1) to millimetres towards the patient's right, front and head (NIfTI's frame,
# "RAS").

# %%
hu, truth = phantom.volume(np.random.default_rng(0), (20, 48, 56), (5.0, 3.2, 3.2))
turn = np.radians(10)
axes = np.array([[np.cos(turn), 0, -np.sin(turn)], [0, 1, 0], [np.sin(turn), 0, np.cos(turn)]])
stored = hu.transpose(2, 1, 0)[::-1, ::-1]              # towards left, back, head
affine = np.eye(4)
affine[:3, :3] = axes * [-3.2, -3.2, 5.0]
affine[:3, 3] = [90, 70, -40]
nibabel.save(nibabel.Nifti1Image(stored, affine), folder / "scan.nii.gz")
print("axes towards", nibabel.aff2axcodes(affine), "shape", stored.shape)

# %% [markdown]
# Its spacing is not on the diagonal, which holds it only where nothing is turned. It is the length
# of the affine's columns: how far one step along an axis goes.

# %%
print("diagonal", np.diag(affine)[:3].round(2))
print("columns ", np.linalg.norm(affine[:3, :3], axis=0).round(2))

# %% [markdown]
# ## Into one order
#
# There are 48 ways to order three axes with signs. `nifti.read` brings each scan to one of them,
# towards the head, the front and the right: (D, H, W), slices first. It permutes and reflects and
# does not interpolate, so nothing is lost; and it keeps the affine.

# %%
volume = nifti.read(folder / "scan.nii.gz")
print("array", volume.array.shape, "spacing", np.round(volume.spacing, 2), "mm along D, H, W")
print("the same numbers:", np.array_equal(volume.array, hu))

# %% [markdown]
# `grid` is the affine of the array as it is now. A voxel is where it was before: take one of the
# array, and the same one of the file.

# %%
d, h, w = 3, 10, 20
i, j, k = stored.shape[0] - 1 - w, stored.shape[1] - 1 - h, d
print("in the array", (volume.grid() @ [d, h, w, 1])[:3].round(2), "mm")
print("in the file ", (affine @ [i, j, k, 1])[:3].round(2), "mm")
assert volume.array[d, h, w] == stored[i, j, k]

# %% [markdown]
# ## To one spacing
#
# A filter is three voxels wide, in whatever millimetres these are. So all scans of a task are
# resampled to one spacing, by default about their median. Corners stay where they
# are: with n voxels of s mm the volume is n s mm long, before and after.

# %%
target = (5.0, 2.0, 2.0)
shape = tuple(np.rint(np.multiply(hu.shape, volume.spacing) / target).astype(int).tolist())
image = ct.resample(volume.array, shape)
labels = ct.resample_labels(truth, shape)
print(hu.shape, "->", shape)
print("mm before", np.multiply(hu.shape, volume.spacing).round(1), "after",
      np.multiply(shape, target))
page.figure(report.examples, [("as read", hu, truth, volume.spacing),
                              ("resampled", image, labels, target)],
            {0: "background", 1: "pancreas", 2: "cyst"})

# %% [markdown]
# Labels are not interpolated as numbers, or a boundary between classes 0 and 2 would become a rim
# of class 1. Each class is resampled as a share, and the largest wins. What an organ measures
# stays:

# %%
for name, array, spacing in (("as read", truth, volume.spacing), ("resampled", labels, target)):
    print(f"{name:10}", f"{(array > 0).sum() * np.prod(spacing) / 1000:.1f} ml")

# %% [markdown]
# ## And back
#
# A prediction is brought back to the scan's own voxels and written under the scan's own header, so
# that any viewer lays it over the scan.

# %%
back = ct.resample_labels(labels, hu.shape)
nifti.write(folder / "labels.nii.gz", back.astype("uint8"), volume)
again = nibabel.load(folder / "labels.nii.gz")
same = np.array_equal(again.affine, nibabel.load(folder / "scan.nii.gz").affine)
print("affine", "as the scan's" if same else "another")
print("voxels that changed on the way there and back:", f"{(back != truth).mean():.2%}")

# %% [markdown]
# ## What is refused
#
# A label map that belongs to another grid is the most expensive mistake there is: it trains
# without a complaint. The files are compared by where their corners lie, not by their shapes.

# %%
moved = affine.copy()
moved[2, 3] += 10
nibabel.save(nibabel.Nifti1Image(stored, moved), folder / "moved.nii.gz")
try:
    nifti.read(folder / "moved.nii.gz").expect_grid_of(volume)
except ValueError as error:
    print(str(error).replace(str(folder), ""))
