# %% [markdown]
# # Three readings of one sum
#
# Nearly all the work of a segmentation network is one operation. This lesson takes it apart: what
# it computes, why its two gradients are the same operation read from other sides, why it is done as
# a matrix product, and how to do fewer multiplications than the definition asks for.
#
# Fifteen minutes of reading, four exercises.

# %%
import timeit

import numpy as np

from tinyseg import page, pictures, windows
from tinyseg.windows import Window

rng = np.random.default_rng(0)

# %% [markdown]
# ## The sum
#
# An image $x$ has positions and channels. A kernel $w$ has taps $k$, channels in $c$ and channels
# out $o$. At every position $p$ where the kernel fits,
#
# $$y[p, o] = \sum_{k, c} x[p + k, c] \; w[k, c, o]$$
#
# `tinyseg` keeps channels last. The sizes below are all different, so that nothing that is mixed up
# can fit by accident.

# %%
x = rng.standard_normal((1, 6, 8, 2))  # one image of 6 x 8 with 2 channels
w = rng.standard_normal((3, 4, 2, 5))  # taps of 3 x 4, from 2 channels to 5
window = Window.of((3, 4))
y = windows.correlate(x, w, window)
print(x.shape, "*", w.shape, "->", y.shape)

# %% [markdown]
# Multiply every number of $y$ with a number of $g$, an array of the same shape, and add up; that is
# written $\langle y, g \rangle$. This one number is linear in $x$, in $w$ and in $g$ alike, and so
# it can be read in three ways:
#
# $$\langle \mathrm{correlate}(x, w), g \rangle = \langle x, \mathrm{correlate\_dx}(g, w) \rangle
# = \langle w, \mathrm{correlate\_dw}(x, g) \rangle$$
#
# The other two readings *are* the gradients. The identity is their whole specification.

# %%
g = rng.standard_normal(y.shape)
dx = windows.correlate_dx(g, w, (6, 8), window)
dw = windows.correlate_dw(x, g, window)
print((y * g).sum(), (x * dx).sum(), (w * dw).sum())

# %% [markdown]
# ## Columns
#
# What a window sees is a short list of numbers. Write these lists below each other, and the sum
# becomes a product of two matrices. Computers are very good at those.

# %%
image = rng.standard_normal((6, 8))
page.figure(pictures.columns, image, rng.standard_normal((3, 3)), (1, 4))

# %% [markdown]
# In a volume nothing changes but the length of the list: the window sees three slices.

# %%
volume = rng.standard_normal((4, 6, 8))
page.figure(pictures.columns, volume, rng.standard_normal((3, 3, 3)), (1, 2, 3))

# %% [markdown]
# ## Exercise 1: im2col
#
# Write it: `x` is (H, W, C); row after row, what each window sees, in the order of `kernel`, C.

# %% tags=["exercise"]
def unfold(x, kernel):
    rows = []
    ...
    return np.array(rows)

# %% tags=["check"]
columns = unfold(x[0], (3, 4))
assert columns.shape == (20, 24), \
    f"columns are {columns.shape}, not (20, 24): 4 x 5 windows fit, each sees 3 x 4 x 2 numbers"
error = abs(columns @ w.reshape(-1, 5) - y.reshape(-1, 5)).max()
assert error < 1e-12, f"the largest error is {error:.2g}: check the order, of windows and in one"
print(f"right: the largest error is {error:.0e}")

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# Two loops over where a window begins. `x[i : i + 3, j : j + 4]` is what it sees, and `.ravel()`
# makes a list of it.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def unfold(x, kernel):
#     rows = []
#     for i in range(x.shape[0] - kernel[0] + 1):
#         for j in range(x.shape[1] - kernel[1] + 1):
#             rows.append(x[i : i + kernel[0], j : j + kernel[1]].ravel())
#     return np.array(rows)
# ```
# </details>

# %% [markdown]
# ## Exercise 2: the way back
#
# `unfold` copies numbers, so it is linear, and there is exactly one function `fold` with
# $\langle \mathrm{unfold}(x), c \rangle = \langle x, \mathrm{fold}(c) \rangle$ for all $x$ and
# $c$. It is called its *adjoint*, and is its pull-back: it brings gradients to where the numbers
# came from. Use nothing but the identity: what must happen to a number that several windows have
# seen?

# %% tags=["exercise"]
def fold(columns, size, kernel):
    x = np.zeros(size)
    ...
    return x

# %% tags=["check"]
c = rng.standard_normal(columns.shape)
back = fold(c, (6, 8, 2), (3, 4))
one, other = (unfold(x[0], (3, 4)) * c).sum(), (x[0] * back).sum()
assert abs(one - other) < 1e-9, f"<unfold(x), c> is {one:.4f}, <x, fold(c)> is {other:.4f}: " \
    "row i of c goes where window i was, and where windows overlap, what comes back is added up"
error = abs(fold(g.reshape(-1, 5) @ w.reshape(-1, 5).T, (6, 8, 2), (3, 4)) - dx[0]).max()
assert error < 1e-12, f"the gradient of the convolution is off by {error:.2g}"
print(f"right: and so the gradient in x, the largest error is {error:.0e}")

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# The loops of `unfold`. Where it read a block, add a row, as a block, in the same place.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def fold(columns, size, kernel):
#     x = np.zeros(size)
#     rows = iter(columns)
#     for i in range(size[0] - kernel[0] + 1):
#         for j in range(size[1] - kernel[1] + 1):
#             block = x[i : i + kernel[0], j : j + kernel[1]]
#             block += next(rows).reshape(block.shape)
#     return x
# ```
# </details>

# %% [markdown]
# ## Exercise 3: what does it cost?
#
# A layer in the middle of ResNet-18 on a volume: 16 x 24 x 24 positions, 64 channels in and out,
# taps of 3 x 3 x 3, with zeros around the volume (*padding*) so that the size stays, float32. How
# many multiplications does the sum ask for, and how many MiB would its columns take, all at once?

# %% tags=["exercise"]
multiplications = ...
mebibytes = ...

# %% tags=["check"]
assert multiplications is not ... and mebibytes is not ..., "write two numbers"
true = 16 * 24 * 24 * 27 * 64 * 64
assert multiplications == true, f"not {multiplications}: positions x taps x channels in x out"
size = 16 * 24 * 24 * 27 * 64 * 4 / 2**20
assert abs(mebibytes - size) < 0.5, f"not {mebibytes} MiB: a row a position, 4 bytes a number, " \
    "2**20 bytes a MiB"
print(f"right: {true:,} multiplications, {size:.2f} MiB; the input has {size / 27:.2f} MiB")

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# Every position looks through 27 taps at 64 channels, for 64 filters; a row of the columns has 27 x
# 64 numbers. A MiB is 2**20 bytes.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# multiplications = 16 * 24 * 24 * 27 * 64 * 64
# mebibytes = 16 * 24 * 24 * 27 * 64 * 4 / 2**20
# ```
# </details>

# %% [markdown]
# Nobody needs them all at once: `tinyseg` makes the columns of a block of positions that fits the
# processor's cache, multiplies, and goes on. And it does not do all the multiplications.
# `windows.explain` says what it does instead:

# %%
window = Window.of((3, 3, 3), padding=1)
print(windows.explain((1, 16, 24, 24, 64), (3, 3, 3, 64, 64), window))

# %% [markdown]
# ## Exercise 4: fewer multiplications
#
# Winograd's trick, for one line. Two outputs of a filter with three taps need 6 multiplications by
# the definition. Four are enough:
#
# $$y_0 = m_1 + m_2 + m_3, \qquad y_1 = m_2 - m_3 - m_4$$
# $$m_1 = (x_0 - x_2) \, w_0, \qquad m_4 = (x_1 - x_3) \, w_2$$
# $$m_2 = (x_1 + x_2) \, \tfrac{w_0 + w_1 + w_2}{2}, \qquad m_3 = \;?$$
#
# Find $m_3$: one sum of two numbers of $x$, times half a sum of the taps (with signs).

# %% tags=["exercise"]
def third(x, w):
    return ...

# %% tags=["check"]
for _ in range(20):
    a, t = rng.standard_normal(4), rng.standard_normal(3)
    m1, m2 = (a[0] - a[2]) * t[0], (a[1] + a[2]) * (t[0] + t[1] + t[2]) / 2
    m3, m4 = third(a, t), (a[1] - a[3]) * t[2]
    assert m3 is not ..., "write m3 as a formula of x[0] ... x[3] and w[0] ... w[2]"
    error = max(abs(m1 + m2 + m3 - np.dot(a[:3], t)), abs(m2 - m3 - m4 - np.dot(a[1:], t)))
    assert error < 1e-12, f"y is off by {error:.2g}: m1 + m2 + m3 is to be x0 w0 + x1 w1 + x2 w2" \
        ", and m1 + m2 has too much of x1 w0, x1 w2 and x2 w0, and too little of x1 w1 and x2 w2"
print("right: 4 multiplications where 6 would be direct")

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# $m_2$ holds $x_1 (w_0 + w_1 + w_2) / 2$, of which $y_0$ wants only $x_1 w_1$. What has to be added
# to $x_1$'s share, and does the same with the opposite sign work for $x_2$?
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def third(x, w):
#     return (x[2] - x[1]) * (w[0] - w[1] + w[2]) / 2
# ```
# </details>

# %% [markdown]
# The same in three axes, with four outputs each, is what `explain` told above: 6 numbers of x an
# axis, $6^3 = 216$ products for 64 outputs, where 27 taps each make 1728. The sums
# before and after take time too. `windows.without` forbids a way, and shows what it is worth:

# %%
x = rng.standard_normal((1, 16, 24, 24, 64)).astype("float32")
w = rng.standard_normal((3, 3, 3, 64, 64)).astype("float32")
def seconds():
    return min(timeit.repeat(lambda: windows.correlate(x, w, window), number=1, repeat=3))
fast = seconds()
with windows.without("tiles"):
    print(windows.explain(x.shape, w.shape, window).splitlines()[0].removeprefix("y  "))
    print(f"takes {seconds() / fast:.1f} times as long, for {1728 / 216:.0f} times the products")

# %% [markdown]
# And where the taps of a kernel stand far apart (*dilation*: 2 means every other voxel) and the
# grid is small, most taps of most windows stand in the padding, and multiply zeros. They are taken
# one by one then, each over the positions where it stands on the grid; this many products are left:

# %%
for dilation in (1, 2, 4):
    window = Window.of((3, 3, 3), padding=dilation, dilation=dilation)
    told = windows.explain((1, 8, 12, 12, 512), (3, 3, 3, 512, 512), window)
    print(f"dilation {dilation}:", told.splitlines()[0].removeprefix("y  "))

# %% [markdown]
# `tinyseg/windows/reference.py` is the sum as you wrote it, in blocks; `cpu.py` and `winograd.py`
# are the fast ways, and every one is held to the identity at the top of this page.
