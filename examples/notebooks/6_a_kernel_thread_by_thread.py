# %% [markdown]
# # A kernel, thread by thread
#
# A GPU runs the same few lines in thousands of threads at once. To read the kernels of this
# library you need three ideas: threads share a **tile**, wait for each other at a **barrier**, and
# add up in a **fixed order**. No GPU is needed here: `tests/emulator.py` compiles CUDA with g++ and
# runs it on the CPU, where it sees every access to memory, and finds what a GPU would not tell.
#
# Twenty minutes of reading, three exercises. It needs g++ and Linux.

# %%
import sys

import numpy as np

import tinyseg as ts
from tinyseg import ops, page, pictures

sys.path.append("../../tests")
import emulator
import strictarray

assert not emulator.missing(), emulator.missing()

# %% [markdown]
# ## One thread, one number
#
# A kernel is a function that every thread calls. Threads stand in blocks; `blockIdx` and
# `threadIdx` tell each who it is, and so which number of the answer is its own. This one computes
# $y_i = \sum_k x_{i+k} \, w_k$, a convolution of a line of numbers, as its definition says.

# %%
PLAIN = r"""
extern "C" __global__ void correlate(const float* x, const float* w, float* y, int n, int taps) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;                         // the last block has threads to spare
  float sum = 0;
  for (int k = 0; k < taps; ++k) sum += x[i + k] * w[k];
  y[i] = sum;
}"""

# %% [markdown]
# To launch it: arrays on the device, a grid of blocks, a block of threads, and the arguments, as
# CuPy has it. `strictarray` makes arrays that behave as CuPy's; with a GPU, `import cupy` and
# `cupy.RawModule` would do. `traced` keeps who read and wrote what.

# %%
cupy = strictarray.library("cupy", device=True)


def launch(source, *arrays, n, threads=64, name="correlate"):
    kernel = emulator.RawModule(code=source).get_function(name)
    y, blocks = cupy.empty(n, "float32"), (n + threads - 1) // threads  # rounded up
    sizes = np.int32(n), np.int32(len(arrays[-1]))
    with emulator.traced() as traces:
        kernel((blocks,), (threads,), (*map(cupy.asarray, arrays), y, *sizes))
    return y.get(), traces[0]

# %%
rng = np.random.default_rng(0)
n, taps = 200, 9
x, w = (rng.standard_normal(size).astype("float32") for size in (n + taps - 1, taps))
right = np.correlate(x, w, "valid")
y, plain = launch(PLAIN, x, w, n=n)
print("largest error", abs(y - right).max())
print(f"{len(plain.accesses)} accesses; thread 5 reads", np.flatnonzero(plain.counts(0)[5]))

# %% [markdown]
# ## Exercise 1: predict the bytes
#
# A multiplication is cheap, a number from the GPU's memory is not: it costs as much as dozens of
# them. So the first question to a kernel is what it reads. How many bytes of `x` do the threads of
# this launch ask for, all together? And how many would be enough, if every number of `x` were read
# once? Work it out from `n = 200` and 9 taps; blocks have 64 threads.

# %% tags=["exercise"]
asked = ...
enough = ...

# %% tags=["check"]
assert asked is not ... and enough is not ..., "write two numbers"
assert asked != n * taps, "that many numbers; a float32 has 4 bytes"
assert asked <= plain.bytes(0), "too many: a thread past n returns before it reads"
assert asked == plain.bytes(0), f"too few: {n} threads read {taps} numbers of x each"
assert enough != len(x), "that many numbers; a float32 has 4 bytes"
assert enough == 4 * len(x), f"x has {len(x)} numbers: the last window begins at {n - 1}"
print(f"right: {asked} bytes are asked for where {enough} would be enough: {asked / enough:.1f}")

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# Every thread that does not return reads one number for each tap. How long is `x`, so that the last
# window fits?
# </details>
# <details><summary>Solution</summary>
#
# ```python
# asked = 200 * 9 * 4
# enough = (200 + 9 - 1) * 4
# ```
# </details>

# %% [markdown]
# ## A tile
#
# Neighbours read nearly the same numbers. So let a block bring what all its windows see into
# **shared memory** once, small and fast memory that the threads of a block have in common, and read
# the tile from there. Between bringing and reading stands `__syncthreads()`, the barrier: no thread
# goes on before all have come to it.

# %%
TILED = r"""
extern "C" __global__ void correlate(const float* x, const float* w, float* y, int n, int taps) {
  __shared__ float tile[64 + 8];                            // of 9 taps: a block's windows see this
  const int t = threadIdx.x, first = blockIdx.x * 64, size = n + taps - 1;
  BRING
  __syncthreads();
  float sum = 0;
  for (int k = 0; k < taps; ++k) sum += tile[t + k] * w[k];
  if (first + t < n) y[first + t] = sum;
}"""

# %% [markdown]
# ## Exercise 2: bring it
#
# Write the line of CUDA where `BRING` stands: the block's 72 numbers, `x[first]` and those behind
# it, go into `tile`, but never one past the end of `x`, which has `size` numbers. There are 64
# threads, `t` from 0 to 63. Your score is how many times fewer bytes of `x` are asked for.
#
# If you have never written C: `for (int i = a; i < b; i += c)` is `for i in range(a, b, c):`, `if
# (...)` takes its condition in brackets, and `;` ends a line. What nobody has written to memory is
# nan here.

# %% tags=["exercise"]
bring = ...  # a string

# %% tags=["check"]
assert isinstance(bring, str), "write a line of CUDA as a string"
y, tiled = launch(TILED.replace("BRING", bring), x, w, n=n)
unset = np.flatnonzero(np.isnan(y))
assert not len(unset), f"y[{unset[0]}] is nan: nobody brought all that its window reads, numbers " \
    f"{unset[0]} to {unset[0] + 8} of x (64 threads that bring one each leave 8; x ends at size)"
wrong = np.flatnonzero(abs(y - right) > 1e-4)
assert not len(wrong), f"y[{wrong[0]}] is wrong: the tile of block {wrong[0] // 64} begins at first"
assert tiled.bytes(0) < 2 * enough, f"right, but {tiled.bytes(0)} bytes of x; 928 are enough, " \
    "832 and 8 numbers twice for each of three borders between blocks"
print(f"right, and your score is {plain.bytes(0) / tiled.bytes(0):.1f}")

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# Let thread t bring number t, then t + 64, as long as there is one:
# `for (int i = t; ...; i += 64)`. Two conditions end it: the tile's 72, and the end of x.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# bring = "for (int i = t; i < 72 && first + i < size; i += 64) tile[i] = x[first + i];"
# ```
# </details>

# %% [markdown]
# Which thread reads which address? A row for each of the 64 threads of block 0, a column for each
# of the first 80 numbers of `x`. On the left every thread reads its whole window from memory; on
# the right it brings one number, eight bring another, and the windows are read from the tile.

# %%
page.figure(pictures.maps, {"plain": plain.counts(0)[:, :80],
                            "tiled": tiled.counts(0)[:, :80]})

# %% [markdown]
# ## A sum in a fixed order
#
# The gradient in `w` is a sum over all positions. If every thread simply added its part to one
# number in memory (`atomicAdd`), they would do so in the order in which they happen to come, and
# floating point is not associative: the same three numbers, two answers.

# %%
a, b, c = np.float32([1e8, -1e8, 1])
print((a + b) + c, a + (b + c))

# %% [markdown]
# A seed must give the same run, so sums here are trees: half of the threads add the other half's
# numbers to theirs, then a quarter, and so on, always the same pairs. All meet in shared memory,
# and there barriers are easily forgotten. The letters mark where one could stand. In the end every
# thread is to know the sum. (`a ? b : c` is `b if a else c`; `half /= 2` rounds down, and a loop
# that asks for `half` ends at 0.)

# %%
TREE = r"""
extern "C" __global__ void total(const float* x, float* y, int n, int count) {
  __shared__ float part[128]; const int t = threadIdx.x;
  part[t] = t < count ? x[t] : 0;                           /* a */
  for (int half = 64; half; half /= 2) {
    if (t < half) { part[t] += part[t + half];              /* b */ }
    /* c */
  }                                                         /* d */
  y[t] = part[0];                                           // all are told
}"""

# %% [markdown]
# A GPU runs threads in **warps** of 32, and says nothing of which warp comes first. The emulator
# takes them in three orders; without any barrier they do not agree, or only by luck. `races` needs
# no luck: it finds lines where two threads meet at one address, one of them writing, with no
# barrier between.

# %%
def totals(source):
    for emulator.order in ("random", "reversed", "forward"):
        y, trace = launch(source, np.arange(100, dtype="f4"), n=128, threads=128, name="total")
        yield np.unique(y).tolist(), trace.races()


for found, races in totals(TREE):
    print(f"threads were told {found}, right is {sum(range(100))}; {len(races)} lines race:")
print(*races, sep="\n")

# %% [markdown]
# ## Exercise 3: mend it
#
# Where must a barrier stand, so that the sum is right in every order? As few as possible, and
# beware: a barrier that only some threads of a block come to hangs a GPU.

# %% tags=["exercise"]
where = ...  # a set of letters, such as {"a", "d"}

# %% tags=["check"]
assert isinstance(where, set) and where <= set("abcd"), 'write a set of letters, such as {"a", "d"}'
mended = TREE
for letter in where:
    mended = mended.replace(f"/* {letter} */", "__syncthreads();")
assert "b" not in where, "b stands inside the if: threads from half on never come to it"
found = list(totals(mended))
races = {race for _, some in found for race in some}
assert not races, "the sum is right by luck at most; lines that race:\n" + "\n".join(sorted(races))
assert len(where) == 2, "right, but one is more than needed: look for two that follow each other"
print("right: in every order all threads are told", found[0][0])

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# In each round a thread reads what another wrote in the round before, and in the first round what
# another brought. Inside the `if` only some threads come by.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# where = {"a", "c"}
# ```
# </details>

# %% [markdown]
# ## The library's own
#
# Its convolution does all of this. A block computes a tile of 128 positions times 64 filters, each
# a sum over taps and channels, the *terms*. Both factors pass through shared memory 16 terms at a
# time: `fetch` brings the next into registers, `store` writes them into the other of two buffers
# (`buffer ^ 1`) while one is multiplied. Here is its loop, as `kernels/conv_simt.cu` has it:

# %%
source = ts.cuda.source("conv_simt")
begin = source.index("  fetch(0);")
print(source[begin : source.index("const int row", begin)].rstrip())

# %% [markdown]
# The same code as on a GPU, launched by the same lines of the library, here in the emulator:

# %%
sys.modules["cupy"] = cupy
x = rng.standard_normal((1, 4, 6, 7, 3)).astype("float32")
w = rng.standard_normal((3, 3, 3, 3, 5)).astype("float32")
with emulator.traced() as traces, ts.cuda.precision("fp32"):
    y = ops.conv(cupy.asarray(x), cupy.asarray(w), padding=1).data.get()
conv, = traces
print("largest error", abs(y - ops.conv(x, w, padding=1).data).max(), "races:", conv.races())
print(f"of x {conv.bytes(0) / x.nbytes:.1f} times its bytes, of w {conv.bytes(1) / w.nbytes:.1f}")

# %% [markdown]
# Every number of `x` is asked for once for each tap that sees it, but once for all filters; without
# the tile it would be once for each of the five. And who reads what? Sixteen threads in a row bring
# the sixteen terms of one position, which lie three by three behind each other, as `x` has three
# channels; then comes the next tap.

# %%
page.figure(pictures.maps, {"64 threads, 80 numbers of x": conv.counts(0)[:64, :80]})

# %% [markdown]
# You can now read `kernels/`. `conv_mma.cu` is the same loop on tensor cores, `norm.cu` and
# `loss.cu` are trees; each says at its top what it computes, which function of this library
# specifies it, and how many bytes it could not do without.
