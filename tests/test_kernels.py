"""The CUDA sources: the emulator that they are tested in, NVIDIA's compiler, and the loader.

What each kernel computes is tested beside the function that specifies it; here stands what all of
them share.
"""

import re
import sys
from pathlib import Path

import emulator
import numpy as np
import pytest
from emulator import Fault, mutated

from tinyseg.cuda import launch, loader, serves, signatures, source
from tinyseg.windows.kernels import LINE, ROWS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_instructions  # noqa: E402
from gpu_instructions import compiled, nvrtc  # noqa: E402

FILES = sorted(path.stem for path in loader.FOLDER.glob("*.cu"))
VARIANTS = {  # {file: [constants of each way that the library compiles it]}; otherwise [{}]
    "conv_mma": gpu_instructions.BODIES,
    "conv_simt": [{}, {"PROBLEMS": 8}],
    "slices": [{}, {"VECTOR": 1}, {"PROBLEMS": 8}],
    "norm": [{}, {"VECTOR": 1}],
    "pool": [{}, {"VECTOR": 1}],
    "upsample": [{"ROWS": rows} for rows in (1, 2, 4)],
    "loss": [{"CLASSES": classes} for classes in (2, 3, 32)],
}


# The emulator

COMMON = (loader.FOLDER / "common.cuh").read_text("utf-8")
KERNELS = COMMON + r'''
struct Line { float slope; int offset[2]; long long n; };

extern "C" __global__ void __launch_bounds__(256, 2) total(const float* __restrict__ x,
                                                           float* __restrict__ y, int n) {
  __shared__ float part[256];
  const int t = threadIdx.x, i = blockIdx.x * 256 + t;
  part[t] = i < n ? x[i] : 0;
  __syncthreads();
  for (int half = 128; half; half /= 2) {
    if (t < half) part[t] += part[t + half];
    __syncthreads();
  }
  if (t == 0) y[blockIdx.x] = part[0];
}

extern "C" __global__ void line(Line a, float b, long long c, const int* x, float* y) {
  const long long i = threadIdx.x + threadIdx.y * blockDim.x + blockIdx.y * blockDim.x * blockDim.y;
  if (i < a.n) y[i] = a.slope * (x ? x[i] : 1) + a.offset[0] + a.offset[1] * b + c;
}

// Named like a function of the C library.
extern "C" __global__ void sync(float* y, int at, float v) { y[at + (int)threadIdx.x] = v; }

extern "C" __global__ void warps(const float* x, float* y, int n) {
  const int t = threadIdx.x;
  const float v = x[t];
  y[t] = warp_sum(v);
  y[t + n] = __shfl_down_sync(0xffffffffu, v, 3);
  y[t + 2 * n] = __shfl_up_sync(0xffffffffu, v, 3, 8);
  y[t + 3 * n] = __shfl_sync(0xffffffffu, v, 5, 16);
  y[t + 4 * n] = __ballot_sync(0xffffffffu, v > 0) >> t % 32 & 1;
  y[t + 5 * n] = __any_sync(0xffffffffu, v > 1.5f) + 2 * __all_sync(0xffffffffu, v > -9);
  y[t + 6 * n] = __syncthreads_count(v > 0);
}

extern "C" __global__ void copies(const float* x, float* y, float* z) {
  DYNAMIC_SHARED(memory);
  float* a = (float*)memory;
  const int t = threadIdx.x;
  copy_async(a + 4 * t, x + 4 * t, true);
  copy_commit();
  copy_async(a + 128 + 4 * t, t % 2 ? x + 4 * t : x - 4, t % 2);
  copy_commit();
  copy_wait<1>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) y[4 * t + i] = a[127 - 4 * t - i], z[4 * t + i] = a[128 + 4 * t + i];
  copy_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) y[4 * t + i + 128] = a[128 + 4 * t + i];
}

extern "C" __global__ void product(const float* a, const unsigned* b, float* d) {
  __shared__ __align__(16) float m[4][8][4];
  const int l = threadIdx.x, g = l / 4, t = l % 4;
  for (int i = 0; i < 4; ++i) m[i][g][t] = a[(g + i % 2 * 8) * 8 + t + i / 2 * 4];
  __syncwarp();
  unsigned r[4];
  load_matrices(r, m[l / 8][l % 8]);
  float sum[4] = {d[g * 8 + 2 * t], d[g * 8 + 2 * t + 1], d[g * 8 + 64 + 2 * t], 0};
  multiply_tf32(sum, r, b[t * 8 + g], b[(t + 4) * 8 + g]);
  multiply_tf32(sum, r, b[t * 8 + g], b[(t + 4) * 8 + g]);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

extern "C" __global__ void product_of_pairs(const float* a, const float* b, float* d) {
  const int l = threadIdx.x, g = l / 4, t = l % 4;
  unsigned left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    const float* from = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    left[i] = bf16(from[0], from[1]);
  }
  for (int i = 0; i < 2; ++i)
    right[i] = bf16(b[(2 * t + i * 8) * 8 + g], b[(2 * t + 1 + i * 8) * 8 + g]);
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  multiply_bf16(sum, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

extern "C" __global__ void turned(const unsigned short* x, unsigned* y) {
  __shared__ __align__(16) unsigned short m[4][8][8];
  const int l = threadIdx.x;
  for (int i = 0; i < 8; ++i) m[l / 8][l % 8][i] = x[8 * l + i];
  __syncwarp();
  unsigned r[4];
  load_turned(r, m[l / 8][l % 8]);
  for (int i = 0; i < 4; ++i) y[32 * i + l] = r[i];
}

extern "C" __global__ void conflicts(int pitch) {
  DYNAMIC_SHARED(memory);
  unsigned r[4];
  load_matrices(r, memory + threadIdx.x % 8 * pitch);
}

extern "C" __global__ void poison(float* y) {
  __shared__ float fixed;
  DYNAMIC_SHARED(memory);
  y[2 * blockIdx.x] = fixed;
  y[2 * blockIdx.x + 1] = *(float*)memory;
  fixed = *(float*)memory = 1;
}

extern "C" __global__ void leave(float* y) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  y[threadIdx.x] = 1;
}

extern "C" __global__ void numbers(const float* x, float* y) {
  y[0] = x[0] * x[0];
  y[1] = max(x[1], 2.f);
  y[2] = fminf(3.f, x[1]);
  y[3] = min(4, 5u);
  y[4] = __int_as_float(0x40a00000) + (tf32(1) & 0xfff);
  y[5] = fmaf(3.f, 1.f, 3.f) + abs(-.5f) + sqrt(.25f);
  y[6] = atomicAdd(y + 7, 2);
}

extern "C" __global__ void fault(int which, int zero, float* y) {
  __shared__ float tile[32];
  DYNAMIC_SHARED(memory);
  unsigned r[4];
  const int t = threadIdx.x;
  float v = 0;
  if (which == 0) y[0] = 7 / zero;
  if (which == 1) *(float4*)(y + 1 + zero) = make_float4(1, 2, 3, 4);
  if (which == 2) y[0] = tile[32 + zero];
  if (which == 3) y[0] = ((float*)memory)[32 + t];
  if (which == 4 && t < 32) __syncthreads();
  if (which == 4 && t >= 32) __syncthreads();
  if (which == 5 && t > 3) v = warp_sum(v);
  if (which == 6) { if (t % 2) __syncwarp(); else v = warp_sum(v); }
  if (which == 7) __syncwarp(0xffff);
  if (which == 8) copy_async(y, y, true);
  if (which == 9) copy_async(memory, y + 1, true);
  if (which == 10) load_matrices(r, y);
  if (which == 11) { v = warp_sum(v);
                     if (t < 32) __syncthreads();
                     __syncthreads(); }
  if (which == 12) for (;;) copy_async(memory, y, true);
  if (which == 13) for (volatile int i = 0;; ++i) {}
  y[t] = v + r[0];
}
'''


@pytest.fixture
def kernel(cuda):
    return cuda.RawModule(code=KERNELS).get_function


@pytest.fixture(params=emulator.ORDERS)
def order(request, monkeypatch):
    monkeypatch.setattr(emulator, "order", request.param)
    return request.param


def i32(*values):
    return tuple(map(np.int32, values))


def test_a_reduction_over_a_block(cuda, kernel, order):
    x = np.arange(1000, dtype="float32")
    y = cuda.empty(4, "float32")
    kernel("total")((4,), (256,), (cuda.asarray(x), y, *i32(1000)))
    assert (y.get() == np.pad(x, (0, 24)).reshape(4, 256).sum(1)).all()


@pytest.mark.parametrize("line", [0, 1])
def test_a_missing_barrier_shows(cuda, monkeypatch, line):
    pieces = KERNELS.split("__syncthreads();")
    code = "".join(p + "__syncthreads();" * (i != line) for i, p in enumerate(pieces[:-1]))
    module = cuda.RawModule(code=code + pieces[-1])
    wrong = 0
    for o in emulator.ORDERS:
        monkeypatch.setattr(emulator, "order", o)
        y = cuda.empty(1, "float32")
        module.get_function("total")((1,), (256,), (cuda.ones(256, "float32"), y, *i32(256)))
        wrong += not y.get() == 256
    assert wrong


def test_arguments_by_value(cuda, kernel, order):
    fields = [("slope", "f4"), ("offset", "i4", 2), ("n", "i8")]
    values = np.array([(0.5, (3, 4), 22)], np.dtype(fields, align=True))
    x = np.arange(24, dtype="int32")
    for there, factor in (cuda.asarray(x), x), (np.uintp(0), np.ones(24)):
        y = cuda.empty(24, "float32")
        arguments = values, np.float32(0.25), np.int64(2**20), there, y
        kernel("line")((1, 2), (4, 3), arguments)
        assert (y.get()[:22] == 0.5 * factor[:22] + 4 + 2**20).all()
        assert np.isnan(y.get()[22:]).all()
    with pytest.raises(TypeError, match=r"argument 0 .*\(20 bytes\).* expects 24"):
        kernel("line")((1, 2), (4, 3), (np.zeros(1, fields), *arguments[1:]))


def test_calls_of_a_warp(cuda, kernel, order):
    v = np.random.default_rng(0).standard_normal(64).astype("float32")
    y = cuda.empty((7, 64), "float32")
    kernel("warps")((1,), (64,), (cuda.asarray(v), y, *i32(64)))
    sums, down, up, one, ballot, votes, count = y.get()
    lane = np.arange(64) % 32
    at = np.arange(64)
    assert np.allclose(sums, np.repeat(v.reshape(2, 32).sum(1), 32), atol=1e-5)
    assert len(set(sums[:32])) == len(set(sums[32:])) == 1
    assert (down == v[np.where(lane + 3 < 32, at + 3, at)]).all()
    assert (up == v[np.where(at % 8 >= 3, at - 3, at)]).all()
    assert (one == v[at // 16 * 16 + 5]).all()
    assert (ballot == (v > 0)).all() and (count == (v > 0).sum()).all()
    assert (votes.reshape(2, 32) == (v.reshape(2, 32) > 1.5).any(1)[:, None] + 2).all()


def test_asynchronous_copies(cuda, kernel, order):
    x = np.arange(128, dtype="float32")
    y, z = cuda.empty(256, "float32"), cuda.empty(128, "float32")
    kernel("copies")((1,), (32,), (cuda.asarray(x), y, z), shared_mem=1024)
    late = np.isnan(z.get()).mean()  # of the second group, when only the first was waited for
    assert (0 < late < 1) if order == "random" else late == 1
    first, second = y.get().reshape(2, 128)
    assert (first == x[::-1]).all()
    assert (second == np.where(np.arange(128) // 4 % 2, x, 0)).all()


def test_a_product_in_tf32(cuda, kernel, order):
    rng = np.random.default_rng(1)
    a, b, d = (rng.standard_normal(n).astype("float32") for n in ((16, 8), (8, 8), (16, 8)))
    d[8:, 1::2] = 0
    there = cuda.asarray(d)
    kernel("product")((1,), (32,), (cuda.asarray(a), cuda.asarray(b.view("uint32")), there))
    cut = [(m.view("uint32") & 0xFFFFE000).view("float32") for m in (a, b)]
    exact = d + 2 * cut[0].astype("float64") @ cut[1]
    assert np.allclose(there.get(), exact, atol=1e-5)
    assert not np.allclose(there.get(), d + 2 * a @ b, atol=1e-5)


def test_a_product_in_bfloat16(cuda, kernel, order):
    rng = np.random.default_rng(2)
    a, b, d = (rng.standard_normal(n).astype("float32") for n in ((16, 16), (16, 8), (16, 8)))
    there = cuda.asarray(d)
    kernel("product_of_pairs")((1,), (32,), (cuda.asarray(a), cuda.asarray(b), there))
    mantissas = [(np.round(m * 2**8) / 2**8, e) for m, e in map(np.frexp, (a, b))]
    exact = d + np.matmul(*(np.ldexp(m.astype("float64"), e) for m, e in mantissas))
    assert np.allclose(there.get(), exact, atol=1e-5)
    assert not np.allclose(there.get(), d + a @ b, atol=1e-4)


def test_matrices_of_halves_are_turned(cuda, kernel, order):
    x, y = np.arange(256, dtype="uint16"), cuda.empty((4, 8, 4), "uint32")
    kernel("turned")((1,), (32,), (cuda.asarray(x), y))
    pairs = x.reshape(4, 8, 8).swapaxes(1, 2).copy().view("uint32")
    assert (y.get() == pairs).all()


@pytest.mark.parametrize("pitch, extra", [(16, 0), (32, 4), (64, 12), (128, 28), (144, 0)])
def test_bank_conflicts_are_counted(kernel, pitch, extra):
    emulator.statistics.clear()
    kernel("conflicts")((2,), (64,), i32(pitch), shared_mem=2048)
    counted = emulator.statistics["conflicts"]
    assert counted["matrices"] == 4 and counted["conflicts"] == 4 * extra


def test_a_trace_tells_who_reads_and_writes_what(cuda, kernel, order):
    x, y = cuda.asarray(np.arange(300, dtype="float32")), cuda.empty(2, "float32")
    with emulator.traced() as traces:
        kernel("total")((2,), (256,), (x, y, *i32(300)))
        with emulator.traced() as inner:
            kernel("total")((1,), (256,), (x, y, *i32(256)))
    outer, = traces
    assert len(inner) == 1 and inner[0].bytes(0) == 1024 and emulator.traces is None
    assert (outer.counts(0, block=0)[:, :256] == np.eye(256)).all()
    assert (outer.counts(0, block=1)[:44, 256:] == np.eye(44)).all()
    assert outer.counts(0).sum() == 256 and outer.bytes(0) == 1200
    assert outer.counts(1, write=True).tolist() == [[1, 0]] and outer.bytes(1) == 0
    # 256 + 255 numbers are written of each block, 2 x 255 + 1 are read
    assert outer.bytes(write=True) == 2 * 4 * 511 and outer.bytes() == 2 * 4 * 511
    assert max(outer.accesses["epoch"]) == 9 and outer.function.name == "total"


def test_wide_accesses_count_for_each_number(cuda):
    code = COMMON + """
extern "C" __global__ void wide(const float* x, float* y) {
  *(float4*)(y + 4 * threadIdx.x) = *(const float4*)(x + 4 * threadIdx.x);
}"""
    x, y = cuda.asarray(np.arange(12, dtype="float32")), cuda.empty(12, "float32")
    with emulator.traced() as traces:
        cuda.RawModule(code=code).get_function("wide")((1,), (3,), (x, y))
    expected = np.kron(np.eye(3, dtype=int), np.ones(4, int))
    assert (traces[0].counts(0) == expected).all() and (y.get() == x.get()).all()
    assert (traces[0].counts(1, write=True) == expected).all()


RACES = COMMON + r'''
extern "C" __global__ void meet(float* y, int which) {
  __shared__ float a[128];
  __shared__ int count;
  DYNAMIC_SHARED(memory);
  const int t = threadIdx.x;
  if (which == 0) { a[t] = t; __syncthreads(); y[t] = a[t ^ 64]; }
  if (which == 1) { a[t] = t; y[t] = a[t ^ 64]; }
  if (which == 2) { a[t] = t; __syncwarp(); y[t] = a[t ^ 64]; }
  if (which == 3) { a[t] = t; __syncwarp(); y[t] = a[t ^ 1]; }
  if (which == 4) { a[t] = t; warp_sum(t); y[t] = a[t ^ 1]; }
  if (which == 5) { atomicAdd(&count, 1); __syncthreads(); y[t] = count; }
  if (which == 6) { atomicAdd(&count, 1); y[t] = count; }
  if (which == 7) { y[t] = a[0]; }
  if (which >= 8) {
    float* const b = (float*)memory;
    copy_async(b + 4 * t, y + 4 * t, true);
    copy_commit();
    if (which == 8) y[t] = b[4 * t ^ 4];
    if (which == 9) __syncthreads();
    copy_wait<0>();
    if (which == 10) __syncthreads();
    y[t] = b[4 * t ^ 4];
  }
}
'''


@pytest.mark.parametrize("which, racing", [*enumerate([0, 1, 1, 0, 1, 0, 1, 0, 3, 2, 0])])
def test_races_are_found_in_any_order(cuda, order, which, racing):
    """Barriers order the threads of a block, __syncwarp those of a warp, shuffles nobody; a copy in
    the background writes at any time from its start to the wait for it."""
    kernel = cuda.RawModule(code=RACES).get_function("meet")
    with emulator.traced() as traces:
        kernel((2,), (128,), (cuda.zeros(512, "float32"), np.int32(which)), shared_mem=2048)
    found, start = traces[0].races(), RACES[: RACES.index("  if (which == 0)")].count("\n") + 1
    assert len(found) == racing, found
    for text in found:
        line = int(text.split(":")[0].removeprefix("line "))
        assert line == start + which if which < 8 else line >= start + 8


BLOCKS = COMMON + r'''
extern "C" __global__ void meet(float* parts, unsigned* counters, float* sum, int which) {
  const int t = threadIdx.x, b = blockIdx.x;
  bool last = false;
  if (which != 8) parts[64 * b + t] = t + b;
  if (which != 1) __syncthreads();
  if (which == 9 && t == 1) __threadfence();
  if (t == 0) {
    if (which != 2 && which != 9) __threadfence();
    if (which == 8) parts[64 * b] = b;
    last = atomicInc(counters + (which == 3 ? b : 0), 3) == 3 || which == 3;
    if (which != 4) __threadfence();
  }
  if (which == 10 && t == 0) counters[1] = 0;
  if (which != 5) last = __syncthreads_or(last);
  if (!last || which == 6) return;
  float all = 0;
  for (int i = 0; i < 4; ++i) all += parts[64 * i + (t ^ (which == 7))];
  sum[t] = all;
}
'''


@pytest.mark.parametrize("which, unordered", [*enumerate(
    [[], ["parts["], ["parts["], ["parts[", "sum["], ["parts["], [], [], [], ["parts["],
     ["parts["], ["counters["]])])
def test_blocks_that_meet_are_found_in_any_order(cuda, order, which, unordered):
    """The last one may read what the others wrote where fences by the threads that count, a counter
    that all have in common, and the barriers of each block say so; what a thread did itself it
    knows without a barrier. A store behind the fence is not covered, nor is a plain one to what
    others store to."""
    kernel = cuda.RawModule(code=BLOCKS).get_function("meet")
    parts, counters = cuda.zeros(256, "float32"), cuda.zeros(4, "uint32")
    sums = cuda.zeros(64, "float32")
    with emulator.traced() as traces:
        kernel((4,), (64,), (parts, counters, sums, np.int32(which)))
    found = traces[0].unordered()
    assert len(found) >= len(unordered) and bool(found) == bool(unordered)
    assert all(any(text in line for line in found) for text in unordered)
    assert all(any(text in line for text in unordered) for line in found)
    if which == 0:
        assert (sums.get() == 4 * np.arange(64) + 6).all() and (counters.get() == 0).all()
        assert not traces[0].races()


def test_blocks_run_once_each_in_the_order_of_the_launch(cuda, order):
    code = COMMON + """
extern "C" __global__ void number(int* y, int* count) {
  const int b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  if (threadIdx.x == 0) y[atomicAdd(count, 1)] = b;
}"""
    y, count = cuda.zeros(30, "int32"), cuda.zeros(1, "int32")
    cuda.RawModule(code=code).get_function("number")((5, 3, 2), (40,), (y, count))
    blocks = y.get().tolist()
    assert sorted(blocks) == list(range(30))
    assert (blocks == sorted(blocks)) == (order == "forward")
    assert (blocks[::-1] == sorted(blocks)) == (order == "reversed")


def test_shared_memory_starts_as_nan(cuda, kernel):
    y = cuda.zeros(6, "float32")
    kernel("poison")((3,), (1,), (y,), shared_mem=4)
    assert np.isnan(y.get()).all()


def test_threads_that_left_are_not_waited_for(cuda, kernel, order):
    y = cuda.empty(64, "float32")
    kernel("leave")((1,), (64,), (y,))
    assert (y.get()[:40] == 1).all() and np.isnan(y.get()[40:]).all()


def test_numbers(cuda, kernel):
    y = cuda.zeros(8, "float32")
    kernel("numbers")((1,), (1,), (cuda.asarray(np.array([1e-20, np.nan], "float32")), y))
    assert y.get().tolist() == [0, 2, 3, 4, 5 + 0xc00, 7, 0, 2]
    assert np.float32(1e-20) * np.float32(1e-20) > 0  # no subnormal numbers there, but here


@pytest.mark.parametrize("flush, at, n, where", [
    ("end", 60, 64, None), ("end", 61, 64, "0 bytes past the end"), ("end", 70, 64, "24 bytes"),
    ("start", 0, 64, None), ("start", -1, 64, "4 bytes before"), ("end", 0, 3, None),
    ("end", 1, 3, "4 bytes past the end"),  # 12 bytes; arrays start at multiples of 16
])
def test_guard_pages(cuda, kernel, monkeypatch, flush, at, n, where):
    monkeypatch.setattr(emulator, "flush", flush)
    y = cuda.zeros(n, "float32")
    arguments = y, *i32(at), np.float32(1)
    if where is None:
        kernel("sync")((1,), (4 if n > 4 else 3,), arguments)
        return
    with pytest.raises(Fault, match=rf"sync: block \(0, 0, 0\), thread \(\d, 0, 0\) .*{where}.* "
                                    r"argument 0, float32 of shape \(\d+,\), line \d+: extern"):
        kernel("sync")((1,), (4,), arguments)


@pytest.mark.parametrize("which, message", [
    (0, "divides by zero, line .*7 / zero"), (1, r"misaligned, line .*float4"),
    (2, r"outside an array.*tile\[32"), (3, r"accesses .*memory\)\[32 \+ t\]"),
    (4, "comes to this barrier while others wait at another"), (5, "never come to this call"),
    (6, "wait in another"), (7, "a part of its warp, line .*syncwarp"), (8, "not shared memory"),
    (9, "copies across 16 bytes"), (10, "loads what is not shared"), (11, "at another one"),
    (12, "waits for none of its copies"), (13, "still runs after 0.2 s, line .*volatile"),
])
def test_faults(cuda, kernel, monkeypatch, order, which, message):
    monkeypatch.setattr(emulator, "seconds", 0.2)
    y = cuda.empty(64, "float32")
    with pytest.raises(Fault, match=f"fault: block .*{message}"):
        kernel("fault")((1,), (64,), (*i32(which, 0), y), shared_mem=128)
    test_a_reduction_over_a_block(cuda, kernel, order)  # and all is well again


def test_a_null_pointer_is_a_fault(kernel):
    with pytest.raises(Fault, match="address 0x4"):
        kernel("sync")((1,), (1,), (np.uintp(0), *i32(1), np.float32(1)))


@pytest.mark.parametrize("grid, block, shared, message", [
    ((0,), (1,), 0, "grid"), ((1, 65536), (1,), 0, "grid"), ((1,), (1025,), 0, "1024"),
    ((1,), (32, 33), 0, "1024"), ((1,), (1,), (48 << 10) + 1, "49152 are allowed"),
])
def test_limits_of_a_launch(cuda, kernel, grid, block, shared, message):
    with pytest.raises(Fault, match=message):
        kernel("sync")(grid, block, (cuda.zeros(2048, "float32"), *i32(0), np.float32(1)),
                       shared_mem=shared)


def test_limits_of_a_kernel(cuda, kernel):
    with pytest.raises(Fault, match="256"):
        kernel("total")((1,), (288,), (cuda.zeros(4, "float32"), cuda.zeros(1, "float32"), *i32(4)))
    with pytest.raises(Fault, match="no kernel"):
        kernel("none")
    y = cuda.zeros(2, "float32")
    function = kernel("poison")
    function.max_dynamic_shared_size_bytes = 100_000
    function((1,), (1,), (y,), shared_mem=100_000)
    with pytest.raises(Fault, match="100000 are allowed"):
        function((1,), (1,), (y,), shared_mem=100_001)
    with pytest.raises(Fault, match="a block has"):
        function.max_dynamic_shared_size_bytes = (227 << 10) + 1


def test_wrong_arguments(cuda, kernel):
    y = cuda.zeros(4, "float32")
    good = y, *i32(0), np.float32(1)
    for wrong in (good[:2], (*good, y), (y, 0, good[2]), (y, np.int64(0), good[2]),
                  (y.get(), *good[1:]), (y, y, good[2]), (np.float32(1), *good[1:]),
                  (None, *good[1:])):
        with pytest.raises(TypeError, match="sync"):
            kernel("sync")((1,), (1,), wrong)


def test_a_source_that_does_not_compile(cuda):
    with pytest.raises(Fault, match="(?s)kernel.cu:2.*nowhere"):
        cuda.RawModule(code='\nextern "C" __global__ void f() { nowhere(); }').get_function("f")


def test_memory_of_the_stand_in(cuda):
    for a in (cuda.empty((2, 3), "float32"), cuda.empty_like(cuda.zeros(6, "float32"))):
        assert np.isnan(a.get()).all() and a.data.ptr % 16 == 0 and a.device.id == 0
    assert (cuda.empty(3, "int32").get() == -1).all() and cuda.zeros((0, 3)).shape == (0, 3)
    a = cuda.asarray(np.arange(6.0, dtype="float32").reshape(2, 3))
    assert not a.T.flags.c_contiguous and cuda.ascontiguousarray(a).data.ptr == a.data.ptr
    assert (cuda.ascontiguousarray(a.T).get() == a.get().T).all()
    assert cuda.empty_like(a.T).strides == a.T.strides == (4, 12)  # as CuPy's
    assert np.isnan(cuda.empty_like(a.T).get()).all()
    a.reshape(-1)[0] = 7
    assert a.get()[0, 0] == 7 and (cuda.stack([a, a]).get()[1] == a.get()).all()


# NVIDIA's compiler


needs_nvrtc = pytest.mark.skipif(not nvrtc(), reason="needs the package nvidia-cuda-nvrtc")


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("file, constants", [
    pytest.param(f, c, id="-".join([f, *(f"{k}={v}" for k, v in c.items())]))
    for f in FILES for c in VARIANTS.get(f, [{}])])
def test_nvidia_compiles(file, constants, arch):
    log, _ = compiled(source(file), f"-arch={arch}", *(f"-D{k}={v}" for k, v in constants.items()))
    kernels = re.findall(r"Compiling entry function '(\w+)' for", log)
    assert sorted(kernels) == sorted(signatures(file))
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) >= len(kernels) and set(spills) == {("0", "0")}, log
    assert not re.search(r"kernel\.cu\(\d+\): warning", log), log
    own = max(map(int, re.findall(r"(\d+) bytes smem", log)), default=0)
    assert own + loader.SHARED_LIMIT <= 99 << 10, log  # what a block has on sm_86, sm_89 and sm_120


@pytest.mark.skipif(not (nvrtc() and gpu_instructions.nvdisasm()),
                    reason="needs the packages nvidia-cuda-nvrtc and nvidia-cuda-nvdisasm")
def test_all_products_of_a_kernel_are_in_one_loop():
    """As many as a warp, of four, has of the tile; and what is kept tells of every body."""
    constants = gpu_instructions.BODIES[-1]
    log, binary = compiled(source("conv_mma"), "-arch=sm_90",
                           *(f"-D{k}={v}" for k, v in constants.items()))
    found = gpu_instructions.bodies(binary)
    assert found.keys() == signatures("conv_mma").keys() == gpu_instructions.registers(log).keys()
    for body in found.values():
        assert body.mma == LINE // 32 * ROWS // 16 * constants["COLUMNS"] // 8 // 4
        assert body.loop > body.mma and min(body.before, body.behind) > 0
    kept = (ROOT / "benchmarks/results/gpu/instructions.md").read_text("utf-8")
    rows = [line.split("|")[1:-1] for line in kept.splitlines() if line.startswith("| correlate")]
    transposed = sum(body["SWAPPED"] for body in gpu_instructions.BODIES)  # w, which one only has
    assert len(rows) == 2 * (2 * len(gpu_instructions.BODIES) - transposed)
    assert all(row[10] == row[2] for row in rows)


@needs_nvrtc
def test_nvidia_and_the_emulator_take_the_same_sources():
    compiled(KERNELS, "-arch=sm_80")
    with pytest.raises(AssertionError, match="nowhere"):
        compiled("__global__ void f() { nowhere(); }", "-arch=sm_80")


# The loader

TINY = '''// A source and its header.
#include "tiny.cuh"
#ifndef FACTOR
#define FACTOR 2
#endif
#ifndef NUMBER
#define NUMBER float
#endif
struct Shift { int by; float scale; };

// y = FACTOR (x + by) scale + z, where there is z
extern "C" __global__ void __launch_bounds__(128) apply(
    const NUMBER* __restrict__ x, const float* z, float* __restrict__ y, int n, long long skip,
    float bias, Shift shift) {
  const int i = threadIdx.x + blockIdx.x * blockDim.x;
  if (i < n)
    y[i + skip] = FACTOR * twice((x[i] + shift.by) * shift.scale / 2) + (z ? z[i] : 0) + bias;
}
extern "C" __global__ void big(float* y) {
  DYNAMIC_SHARED(memory);
  memory[threadIdx.x] = 3;
  y[threadIdx.x] = memory[threadIdx.x];
}
'''
SHIFT = np.dtype([("by", "i4"), ("scale", "f4")])


@pytest.fixture
def tiny(cuda, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "FOLDER", tmp_path)
    emulator.forget()
    (tmp_path / "tiny.cu").write_text(TINY)
    (tmp_path / "tiny.cuh").write_text(
        COMMON + "__device__ __forceinline__ float twice(float v) { return v + v; }\n")
    yield cuda
    emulator.forget()


def apply(library, grid=(2,), block=(8,), shared=0, constants=(), **changes):
    """The result of a launch of `apply` on 0..9 with some arguments changed."""
    arguments = {"x": library.asarray(np.arange(10, dtype="float32")), "z": None,
                 "y": library.empty(10, "float32"), "n": 10, "skip": 0, "bias": 0.5,
                 "shift": np.array((1, 3.0), SHIFT)[()]} | changes
    launch("tiny", "apply", grid, block, *arguments.values(), shared=shared, **dict(constants))
    return arguments["y"].get()


def test_a_launch(tiny):
    x = np.arange(10)
    assert signatures("tiny") == {
        "apply": [("NUMBER*", "x"), ("float*", "z"), ("float*", "y"), ("int", "n"),
                  ("long long", "skip"), ("float", "bias"), ("Shift", "shift")],
        "big": [("float*", "y")]}
    assert (apply(tiny) == 6 * (x + 1) + 0.5).all()
    assert (apply(tiny, constants={"FACTOR": 5}) == 15 * (x + 1) + 0.5).all()
    assert (apply(tiny, z=tiny.asarray(x.astype("float32"))) == 7 * x + 6.5).all()
    halves = {"constants": {"NUMBER": "unsigned short"}}
    assert (apply(tiny, x=tiny.asarray(x.astype("uint16")), **halves) == 6 * (x + 1) + 0.5).all()
    with pytest.raises(TypeError, match="x is float32; expected uint16"):
        apply(tiny, **halves)
    assert (apply(tiny, n=np.int64(10), shift=np.array([(0, 0)], SHIFT)) == 0.5).all()


def test_a_header_becomes_part_of_the_source(tiny):
    assert "#include" not in source("tiny") and "twice(float v)" in source("tiny")


@pytest.mark.parametrize("error, words, changes", [
    (TypeError, "tiny.apply: x is float64; expected float32", {"x": lambda lib: lib.zeros(10)}),
    (ValueError, "x is not contiguous", {"x": lambda lib: lib.zeros((10, 2), "float32")[:, 0]}),
    (TypeError, "z is a ndarray; expected an array on the GPU",
     {"z": lambda _: np.zeros(10, "float32")}),
    (TypeError, "y is a float; expected an array", {"y": lambda _: 1.0}),
    (ValueError, "n is 2147483648: more than int holds", {"n": lambda _: 2**31}),
    (ValueError, "n is -2147483649", {"n": lambda _: -(2**31) - 1}),
    (ValueError, "skip is 9223372036854775808: more than long long", {"skip": lambda _: 2**63}),
    (TypeError, "n", {"n": lambda _: 2.5}),
    (TypeError, "shift is 3; expected the fields of struct Shift", {"shift": lambda _: 3}),
    (TypeError, "expected the fields", {"shift": lambda _: np.float64(3)}),
    (TypeError, "takes 7 arguments, got 8", {"more": lambda _: 1}),
    (ValueError, r"grid \(0,\); expected", {"grid": lambda _: (0,)}),
    (ValueError, "use a smaller", {"grid": lambda _: (1, 65536)}),
    (ValueError, "use a smaller", {"grid": lambda _: (2**31,)}),
    (ValueError, "300000 bytes of shared memory", {"shared": lambda _: 300_000}),
])
def test_wrong_launches(tiny, error, words, changes):
    with pytest.raises(error, match=words):
        apply(tiny, **{name: make(tiny) for name, make in changes.items()})


def test_another_gpu(tiny, monkeypatch):
    monkeypatch.setattr(tiny.cuda.runtime, "getDevice", lambda: 1)
    with pytest.raises(ValueError, match="x lies on GPU 0; the current one is 1"):
        apply(tiny)


def test_shared_memory_may_grow_and_shrink(tiny):
    y = tiny.zeros(4, "float32")
    for kibibytes in (70, 60, 70, 8, 72, 70):
        launch("tiny", "big", (1,), (4,), y, shared=kibibytes << 10)
        assert (y.get() == 3).all()


def test_what_the_kernels_serve(cuda):
    a = cuda.zeros(3, "float32")
    assert serves(a, None, a) and not serves(a, cuda.zeros(3)) and not serves(cuda.zeros((0, 3)))
    assert not serves(np.zeros(3, "float32"))


@pytest.mark.parametrize("file", FILES)
def test_declarations_are_read_as_they_compile(cuda, file):
    module = cuda.RawModule(code=source(file), options=("-std=c++17",))
    assert signatures(file)
    for kernel, parameters in signatures(file).items():
        compiled = module.get_function(kernel)._kernel
        assert compiled.arity == len(parameters)
        for pointer, size, (kind, _) in zip(compiled.pointers, compiled.sizes, parameters,
                                            strict=False):
            assert pointer == kind.endswith("*")
            assert kind not in loader.NUMBERS or size == np.dtype(loader.NUMBERS[kind]).itemsize


def test_a_planted_bug(tiny):
    with mutated("tiny", "return v + v", "return v"):  # in the header
        assert (apply(tiny) == 3 * (np.arange(10) + 1) + 0.5).all()
    with mutated("tiny", "if (i < n)\n", ""), pytest.raises(Fault, match="apply: .*argument 0"):
        apply(tiny)
    assert apply(tiny)[0] == 6.5
    with pytest.raises(AssertionError, match="does not contain"), mutated("tiny", "nowhere", ""):
        pass
