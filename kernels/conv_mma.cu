// Convolution on the tensor cores: factors are float32, rounded here to TF32, with filters in fours, or
// bfloat16 (kernels/round.cu makes them), with channels and filters in eights; sums and results are
// float32. Specification: correlate and correlate_dw in windows/reference.py (conv.cuh has the
// formula), to about 3e-4 or 2e-3 of the output's scale, what 10 or 7 bits of mantissa cost.
//
// A block computes a tile of ROWS x COLUMNS numbers of a matrix product, a warp a WARP_ROWS x
// WARP_COLUMNS part of it in fragments of 16 x 8. The sum advances TERMS terms, a turn, at a time
// through STAGES buffers in shared memory that cp.async fills in the background, so that the
// multiplying warps never wait for global memory. The matrix of patches is never stored. Where the
// tiles are few, the sum is cut into slices along gridDim.z, which kernels/slices.cu adds in order: the
// result is the same in every run.
//
// Least traffic: x, w and y once; as implicit GEMM each row's patch crosses from the second-level cache
// once for every COLUMNS filters.
#include "common.cuh"
#include "conv.cuh"

#ifndef ROWS
#define ROWS 128
#endif
#ifndef COLUMNS
#define COLUMNS 128
#endif
#ifndef WARP_ROWS
#define WARP_ROWS 64
#endif
#ifndef WARP_COLUMNS
#define WARP_COLUMNS 64
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef NUMBER
#define NUMBER float                                         // of a factor; unsigned short: bfloat16
#endif
#define WIDE (16 / (int)sizeof(NUMBER))                      // numbers in 16 bytes
// What is brought of x at once, in numbers: WIDE neighbouring channels, where those are a multiple
// of that and the taps at most 32; or one by one, of float32, at the price of more instructions.
#ifndef CHUNK
#define CHUNK WIDE
#endif
#ifndef SWAPPED
#define SWAPPED 0                                            // the last two axes of w, in memory
#endif
#define BF16 (sizeof(NUMBER) == 2)                           // or TF32
#define TERMS (8 * WIDE)                                     // 128 bytes of channels
#define DEPTH (2 * WIDE)                                     // terms of a product of the tensor cores
static_assert(!BF16 || CHUNK == WIDE, "two bytes cannot be copied alone");
#define THREADS (ROWS / WARP_ROWS * (COLUMNS / WARP_COLUMNS) * 32)
#define FRAGMENTS_DOWN (WARP_ROWS / 16)
#define FRAGMENTS_ACROSS (WARP_COLUMNS / 8)
// Row lengths of the buffers with one row per term. 8 more than a multiple of 32: the 16 bytes that
// eight lanes read at once, of 4 terms and 2 groups or of 8 terms, then lie in different banks.
#define A_PITCH (ROWS + 8)
#define B_PITCH (COLUMNS + 8)

typedef float Sums[FRAGMENTS_DOWN][FRAGMENTS_ACROSS][4];
typedef unsigned A[FRAGMENTS_DOWN][4];                       // a warp's factors
typedef unsigned B[FRAGMENTS_ACROSS][2];

// In a buffer of 128-byte lines, chunk c of 16 bytes stands at chunk c ^ (order % 8) of its line:
// eight lines of different order at one chunk, what ldmatrix reads, then lie in different banks.
__device__ __forceinline__ int swizzled(int line, int chunk, int order) {
  return line * TERMS + (chunk ^ (order & 7)) * WIDE;
}

// Which row or column of a warp's part is number `group` (of eight) of fragment `i` is free, if all
// agree. In TF32 four neighbours belong to four fragments, so that a lane moves them as one float4;
// in bfloat16 eight belong to one, as its instruction has them.
#define APART (BF16 ? 1 : 4)
__device__ __forceinline__ int spread(int i, int group) {
  return i / APART * 8 * APART + group * APART + i % APART;
}

// What lies in a buffer as the tensor cores take it.
__device__ __forceinline__ unsigned factor(unsigned bits) {
  return BF16 ? bits : tf32(__uint_as_float(bits));
}

// Four neighbours of a buffer with one row per term: of fragments i to i + 3, for this lane's term.
template <int PITCH>
__device__ __forceinline__ float4 neighbours(const NUMBER* buffer, int term, int at, int i) {
  const int lane = threadIdx.x & 31;
  return *(const float4*)(buffer + (term + lane % 4) * PITCH + at + spread(i, lane / 4));
}

// The fragments of DEPTH terms of the right factor, one line of the buffer per column; those that are
// read at one chunk are APART.
__device__ __forceinline__ void load_b_swapped(B& b, const NUMBER* buffer, int term, int column) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < FRAGMENTS_ACROSS; j += 2) {
    unsigned r[4];
    const int line = column + spread(j + lane / 16, lane % 8);
    load_matrices(r, buffer + swizzled(line, term / WIDE + lane / 8 % 2, line / APART));
#pragma unroll
    for (int e = 0; e < 4; ++e) b[j + e / 2][e % 2] = factor(r[e]);
  }
}

// The fragments of DEPTH terms of the right factor, one row of the buffer per term.
__device__ __forceinline__ void load_b(B& b, const NUMBER* buffer, int term, int column) {
  const int lane = threadIdx.x & 31;
  if (BF16) {
#pragma unroll
    for (int j = 0; j < FRAGMENTS_ACROSS; j += 2) {
      unsigned r[4];
      load_turned(r, buffer + (term + lane % 16) * B_PITCH + column + spread(j + lane / 16, 0));
#pragma unroll
      for (int e = 0; e < 4; ++e) b[j + e / 2][e % 2] = r[e];
    }
  } else {
#pragma unroll
    for (int j = 0; j < FRAGMENTS_ACROSS; j += 4)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 v = neighbours<B_PITCH>(buffer, term + half * 4, column, j);
        b[j][half] = tf32(v.x), b[j + 1][half] = tf32(v.y);
        b[j + 2][half] = tf32(v.z), b[j + 3][half] = tf32(v.w);
      }
  }
}

// The fragments of DEPTH terms of the left factor, likewise; in TF32 fragment i has the rows of 2i and
// 2i + 1.
__device__ __forceinline__ void load_a(A& a, const NUMBER* buffer, int term, int row) {
  const int lane = threadIdx.x & 31;
  if (BF16) {
#pragma unroll
    for (int i = 0; i < FRAGMENTS_DOWN; ++i)
      load_turned(a[i], buffer + (term + lane / 16 * 8 + lane % 8) * A_PITCH + row +
                            spread(2 * i + lane / 8 % 2, 0));
  } else {
#pragma unroll
    for (int i = 0; i < FRAGMENTS_DOWN; i += 2)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 v = neighbours<A_PITCH>(buffer, term + half * 4, row, 2 * i);
        a[i][2 * half] = tf32(v.x), a[i][2 * half + 1] = tf32(v.y);
        a[i + 1][2 * half] = tf32(v.z), a[i + 1][2 * half + 1] = tf32(v.w);
      }
  }
}

__device__ __forceinline__ void multiply(Sums& sum, const A& a, const B& b) {
#pragma unroll
  for (int i = 0; i < FRAGMENTS_DOWN; ++i)
#pragma unroll
    for (int j = 0; j < FRAGMENTS_ACROSS; ++j)
      if (BF16) multiply_bf16(sum[i][j], a[i], b[j][0], b[j][1]);
      else multiply_tf32(sum[i][j], a[i], b[j][0], b[j][1]);
}

// sum = all turns of a tile's sum. fill(turn) brings one into buffer turn % STAGES, STAGES - 1 of them
// ahead of the one that is multiplied; load(a, b, turn, term) takes the fragments of DEPTH terms from
// there.
template <class Fill, class Load>
__device__ __forceinline__ void accumulate(Sums& sum, int turns, Fill fill, Load load) {
#pragma unroll 1
  for (int turn = 0; turn < STAGES - 1; ++turn) {
    if (turn < turns) fill(turn);
    copy_commit();
  }
  for (int turn = 0; turn < turns; ++turn) {
    copy_wait<STAGES - 2>();
    __syncthreads();                                         // this buffer is full, the last one free
    if (turn + STAGES - 1 < turns) fill(turn + STAGES - 1);
    copy_commit();
#pragma unroll
    for (int term = 0; term < TERMS; term += DEPTH) {
      A a;
      B b;
      load(a, b, turn, term);
      multiply(sum, a, b);
    }
  }
}

// Writes the `columns` first numbers of each row of a warp's part: row `place(q)` of the tile, for
// the q-th of this lane, begins at `out(place(q))`, null for a row that is not there.
template <class Where, class Out>
__device__ __forceinline__ void store(const Sums& sum, Where place, Out out, int column, int columns) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int q = 0; q < 2 * FRAGMENTS_DOWN; ++q) {
    float* to = out(place(q));
    if (!to) continue;
#pragma unroll
    for (int j = 0; j < FRAGMENTS_ACROSS; j += APART)
#pragma unroll
      for (int i = 0; i < (BF16 ? 1 : 2); ++i) {
        const int at = column + spread(j, lane % 4 * 2 + i), e = q % 2 * 2 + i;
        if (at >= columns) continue;
        if (BF16) *(float2*)(to + at) = make_float2(sum[q / 2][j][e], sum[q / 2][j][e + 1]);
        else
          *(float4*)(to + at) = make_float4(sum[q / 2][j][e], sum[q / 2][j + 1][e], sum[q / 2][j + 2][e],
                                            sum[q / 2][j + 3][e]);
      }
  }
}

// y = correlate(x, w) of each problem. Rows: positions; columns: filters; the sum over (TERMS channels,
// tap), without the taps that no row of the tile sees, or one by one over (tap, channel).
// grid (ceil(N P / ROWS), ceil(C_out / COLUMNS), PROBLEMS slices), N P the most of a problem;
// with more than one slice y is (PROBLEMS, slices, gridDim.x ROWS, C_out).
// shared STAGES TERMS (ROWS + B_PITCH) numbers
extern "C" __global__ void __launch_bounds__(THREADS) correlate(
    const NUMBER* __restrict__ x, const NUMBER* __restrict__ w, float* __restrict__ y,
    const __grid_constant__ Problems problems) {
  DYNAMIC_SHARED(memory);
  __shared__ int reach[32], shift[32];                       // of each tap, in x and in w
  __shared__ int points[ROWS], outputs[ROWS];                // of each row: its corner in x, and in y
  __shared__ unsigned masks[ROWS], any;                      // taps that a row sees, that any row sees
  __shared__ __align__(16) Place corners[ROWS];
  NUMBER* const buffers = (NUMBER*)memory;
  const int slices = gridDim.z / PROBLEMS, problem = PROBLEMS > 1 ? blockIdx.z / slices : 0;
  const int slice = blockIdx.z - problem * slices;
  const Geometry& g = problems.of[problem];
  const int t = threadIdx.x, lane = t & 31, warp = t / 32, count = rows(g);
  const int first_row = blockIdx.x * ROWS, first_column = blockIdx.y * COLUMNS;
  if (PROBLEMS > 1 && first_row >= count) return;
  if (CHUNK > 1 && t < taps(g)) {
    const Place k = place(t, g.taps);
    reach[t] = point(tap(t, g), g.size);
    shift[t] = g.origin + k.d * g.walk[0] + k.h * g.walk[1] + k.w * g.walk[2];
  }
  if (t == 0) any = 0;
  __syncthreads();
  for (int r = t; r < ROWS; r += THREADS) {
    const Place p = place(min(first_row + r, count - 1), g.positions), at = corner(p, g);
    corners[r] = at;
    points[r] = point(at, g.size);
    outputs[r] = written(p, g);
    if (CHUNK > 1) atomicOr(&any, masks[r] = seen(at, g));
  }
  __syncthreads();

  // A thread brings one chunk of every THREADS / A_CHUNKS-th row.
  constexpr int A_CHUNKS = TERMS / CHUNK, A_LOADS = ROWS * A_CHUNKS / THREADS;
  constexpr int B_CHUNKS = COLUMNS / WIDE, B_LOADS = TERMS * B_CHUNKS / THREADS;
  constexpr int HELD = CHUNK > 1 ? A_LOADS : 0;             // too many where numbers come one by one
  int from[HELD + 1];
  unsigned valid[HELD + 1];
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    from[i] = points[t / A_CHUNKS + i * (THREADS / A_CHUNKS)];
    valid[i] = masks[t / A_CHUNKS + i * (THREADS / A_CHUNKS)];
  }

  // This slice's turns; the tap and the channels, or the first term, of the next buffer to be filled.
  const unsigned live = any;
  const int terms = taps(g) * g.channels;
  const int all = CHUNK > 1 ? __popc(live) * ((g.channels + TERMS - 1) / TERMS) : (terms + TERMS - 1) / TERMS;
  const int begin = (long long)all * slice / slices;
  const int turns = (int)((long long)all * (slice + 1) / slices) - begin;
  int next_channel = CHUNK > 1 && live ? begin / __popc(live) * TERMS : 0, next_term = begin * TERMS;
  unsigned left = live;
  if (CHUNK > 1 && live)
    for (int skipped = begin % __popc(live); skipped; --skipped) left &= left - 1;
  constexpr int STAGE = ROWS * TERMS + TERMS * B_PITCH;      // numbers of a buffer: of x, then of w
  auto fill = [&](int turn) {
    NUMBER* a = buffers + turn % STAGES * STAGE;
    NUMBER* b = a + ROWS * TERMS;
    const NUMBER* from_w;                                    // the first row, and how many terms there are
    int count_here;
    if (CHUNK > 1) {
      const int next_tap = __ffs(left) - 1, step = reach[next_tap];
      const int channel = next_channel + t % A_CHUNKS * CHUNK;
      const unsigned bit = channel < g.channels ? 1u << next_tap : 0;
      from_w = w + (shift[next_tap] + next_channel * (SWAPPED ? 1 : g.pitch));
      count_here = g.channels - next_channel;
#pragma unroll
      for (int i = 0; i < A_LOADS; ++i) {
        const int row = t / A_CHUNKS + i * (THREADS / A_CHUNKS);
        copy_async(a + swizzled(row, t % A_CHUNKS, row),
                   x + ((long long)(from[i] + step) * g.channels + channel), valid[i] & bit);
      }
      if (!(left &= left - 1)) left = live, next_channel += TERMS;
    } else {
      const int term = next_term + lane;
      const Place step = tap(min(term, terms - 1) / g.channels, g);
      const long long reached = (long long)point(step, g.size) * g.channels + term % g.channels;
      from_w = w + (g.origin + (long long)next_term * g.pitch), count_here = terms - next_term;
#pragma unroll 4
      for (int row = warp; row < ROWS; row += THREADS / 32) {
        copy_async<4>(a + swizzled(row, lane / 4, row) + lane % 4,
                      x + (long long)points[row] * g.channels + reached,
                      lane < count_here && inside(corners[row] + step, g));
      }
      next_term += TERMS;
    }
#pragma unroll
    for (int i = 0; i < B_LOADS; ++i) {
      const int at = t + i * THREADS;
      const int term = SWAPPED ? at % 8 * WIDE : at / B_CHUNKS;
      const int column = SWAPPED ? at / 8 : at % B_CHUNKS * WIDE;
      copy_async(b + (SWAPPED ? swizzled(column, term / WIDE, column / APART) : term * B_PITCH + column),
                 from_w + (SWAPPED ? (first_column + column) * g.pitch + term
                                   : term * g.pitch + first_column + column),
                 term < count_here && first_column + column < g.filters);
    }
  };

  const int row = warp % (ROWS / WARP_ROWS) * WARP_ROWS, column = warp / (ROWS / WARP_ROWS) * WARP_COLUMNS;
  Sums sum = {};
  accumulate(sum, turns, fill, [&](A& left, B& right, int turn, int term) {
    const NUMBER* a = buffers + turn % STAGES * STAGE;
#pragma unroll
    for (int i = 0; i < FRAGMENTS_DOWN; ++i) {
      load_matrices(left[i], a + swizzled(row + i * 16 + lane % 16, term / WIDE + lane / 16, lane));
#pragma unroll
      for (int e = 0; e < 4; ++e) left[i][e] = factor(left[i][e]);
    }
    if (SWAPPED)
      load_b_swapped(right, a + ROWS * TERMS, term, column);
    else
      load_b(right, a + ROWS * TERMS, term, column);
  });
  const auto out = [&](int i) -> float* {
    if (first_row + i >= count) return nullptr;
    return y + first_column + (slices == 1 ? outputs[i]
        : (long long)blockIdx.z * gridDim.x * ROWS + first_row + i) * g.filters;
  };
  store(sum, [&](int q) { return row + q * 8 + lane / 4; }, out, column, g.filters - first_column);
}

// slices[s] = a part of correlate_dw(x, y). Rows: (tap, channel); columns: filters; the sum over the
// box of positions where a tap of the tile lies inside, a part of which each slice has.
// slices (gridDim.z, gridDim.x ROWS, C_out); grid (ceil(K C_in / ROWS), ceil(C_out / COLUMNS), slices);
// shared STAGES TERMS (A_PITCH + B_PITCH) numbers
extern "C" __global__ void __launch_bounds__(THREADS) correlate_dw(
    const NUMBER* __restrict__ x, const NUMBER* __restrict__ y, float* __restrict__ slices, Geometry g) {
  DYNAMIC_SHARED(memory);
  __shared__ int low[3], box[3];                             // where the box begins, its size
  __shared__ int points[2][THREADS], numbers[2][THREADS];    // of the positions of two rounds: their
  __shared__ unsigned masks[2][THREADS];                     // corners, rows of y, taps they see
  __shared__ __align__(16) Place corners[2][THREADS];
  NUMBER* const buffers = (NUMBER*)memory;
  const int t = threadIdx.x, lane = t & 31, warp = t / 32, count = taps(g) * g.channels;
  const int first_row = blockIdx.x * ROWS, first_column = blockIdx.y * COLUMNS;
  if (t < 3) {
    int begin = g.positions[t], end = 0;
    for (int k = first_row / g.channels; k <= (min(first_row + ROWS, count) - 1) / g.channels; ++k) {
      const Place at = tap(k, g);
      const int reach = (t == 0 ? at.d : t == 1 ? at.h : at.w) - g.before[t];
      begin = min(begin, max(0, (g.stride[t] - 1 - reach) / g.stride[t]));
      end = max(end, min(g.positions[t], (g.size[t] - 1 - reach + g.stride[t]) / g.stride[t]));
    }
    low[t] = min(begin, end), box[t] = max(0, end - begin);
  }
  __syncthreads();
  const int all = g.batch * box[0] * box[1] * box[2];
  const int share = ((all - 1) / (int)gridDim.z / TERMS + 1) * TERMS;
  const int begin = min(all, (int)blockIdx.z * share), end = min(all, begin + share);
  const int turns = (end - begin + TERMS - 1) / TERMS;

  // A round of turns is located at once, a position by each thread.
  constexpr int ROUND = THREADS / TERMS;
  static_assert(ROUND >= STAGES - 1, "the first buffers are filled from the first round");
  auto locate = [&](int round) {
    const int term = begin + round * THREADS + t, slot = round & 1;
    if (!turns) return;
    Place at = place(min(term, end - 1), box);
    at = {at.n, at.d + low[0], at.h + low[1], at.w + low[2]};
    numbers[slot][t] = point(at, g.positions);
    at = corner(at, g);
    points[slot][t] = point(at, g.size);
    if (CHUNK > 1) masks[slot][t] = term < end ? seen(at, g) : 0;
    if (term >= end) at.d = -(1 << 30);                      // outside for every tap
    corners[slot][t] = at;
  };

  constexpr int A_CHUNKS = ROWS / CHUNK, A_LOADS = TERMS * A_CHUNKS / THREADS;
  constexpr int B_CHUNKS = COLUMNS / WIDE, B_LOADS = TERMS * B_CHUNKS / THREADS;
  const int a_row = first_row + t % A_CHUNKS * CHUNK, b_column = first_column + t % B_CHUNKS * WIDE;
  const int k = min(a_row, count - 1) / g.channels;          // a chunk never straddles two taps
  const Place way = tap(k, g);
  const int step = point(way, g.size), channel = a_row % g.channels;
  const unsigned bit = 1u << k % 32;
  constexpr int STAGE = TERMS * (A_PITCH + B_PITCH);         // numbers of a buffer: of x, then of y
  auto fill = [&](int turn) {
    NUMBER* a = buffers + turn % STAGES * STAGE;
    NUMBER* b = a + TERMS * A_PITCH;
    const int slot = turn / ROUND & 1, first = turn % ROUND * TERMS;
#pragma unroll
    for (int i = 0; i < A_LOADS; ++i) {
      const int term = t / A_CHUNKS + i * (THREADS / A_CHUNKS);
      copy_async<(int)sizeof(NUMBER) * CHUNK>(a + term * A_PITCH + t % A_CHUNKS * CHUNK,
                            x + ((long long)(points[slot][first + term] + step) * g.channels + channel),
                            CHUNK > 1 ? masks[slot][first + term] & bit
                                      : inside(corners[slot][first + term] + way, g));
    }
#pragma unroll
    for (int i = 0; i < B_LOADS; ++i) {
      const int term = t / B_CHUNKS + i * (THREADS / B_CHUNKS);
      copy_async(b + term * B_PITCH + t % B_CHUNKS * WIDE,
                 y + ((long long)numbers[slot][first + term] * g.filters + b_column), b_column < g.filters);
    }
    if ((turn + 1) % ROUND == 0) locate((turn + 1) / ROUND);
  };

  const int row = warp % (ROWS / WARP_ROWS) * WARP_ROWS, column = warp / (ROWS / WARP_ROWS) * WARP_COLUMNS;
  Sums sum = {};
  locate(0);
  __syncthreads();
  accumulate(sum, turns, fill, [&](A& left, B& right, int turn, int term) {
    const NUMBER* a = buffers + turn % STAGES * STAGE;
    load_a(left, a, term, row);
    load_b(right, a + TERMS * A_PITCH, term, column);
  });
  const auto out = [&](int i) -> float* {
    if (first_row + i >= count) return nullptr;
    return slices + ((long long)blockIdx.z * gridDim.x * ROWS + first_row + i) * g.filters + first_column;
  };
  store(sum, [&](int q) { return row + spread(q, lane / 4); }, out, column, g.filters - first_column);
}
