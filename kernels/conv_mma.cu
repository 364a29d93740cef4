// Convolution on the tensor cores: factors in TF32, sums in float32; channels and filters are
// multiples of four, at most 32 taps.
// Specification: correlate and correlate_dw in windows/reference.py (conv.cuh has the formula),
// to about 3e-4 of the output's scale, what rounding the factors to 10 bits of mantissa costs.
//
// A block computes a tile of ROWS x COLUMNS numbers of a matrix product, a warp a WARP_ROWS x
// WARP_COLUMNS part of it in fragments of 16 x 8. The sum advances 32 terms at a time through
// STAGES buffers in shared memory that cp.async fills in the background, so that the multiplying
// warps never wait for global memory. The matrix of patches is never stored.
//
// Least traffic: x, w and y once, 4 (N S C_in + K C_in C_out + N P C_out) bytes; as implicit GEMM
// each row's patch crosses from the second-level cache once for every COLUMNS filters, less what
// the first level keeps: the sum runs over taps inside of 32 channels, and taps along an axis
// read nearly the same rows.
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
#define STAGES 3
#endif
#define TERMS 32                                             // 128 bytes of channels
#define THREADS (ROWS / WARP_ROWS * (COLUMNS / WARP_COLUMNS) * 32)
#define FRAGMENTS_DOWN (WARP_ROWS / 16)
#define FRAGMENTS_ACROSS (WARP_COLUMNS / 8)
// Row lengths of the buffers with one row per term. 8 more than a multiple of 32: the lanes of a
// fragment, 4 terms by 8 columns, then stand in 32 different banks.
#define A_PITCH (ROWS + 8)
#define B_PITCH (COLUMNS + 8)

typedef float Sums[FRAGMENTS_DOWN][FRAGMENTS_ACROSS][4];
typedef unsigned A[FRAGMENTS_DOWN][4];
typedef unsigned B[FRAGMENTS_ACROSS][2];

// In a buffer with one 128-byte line per row, chunk c of 16 bytes of row r stands at chunk
// c ^ (r % 8): eight rows at one chunk, what ldmatrix reads, then lie in different banks.
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * 32 + ((chunk ^ (row & 7)) << 2);
}

// The fragments of eight terms of the right factor, one row of the buffer per term.
__device__ __forceinline__ void load_b(B& b, const float* buffer, int term, int column) {
  const int lane = threadIdx.x & 31;
  const unsigned* from = (const unsigned*)buffer + (term + lane % 4) * B_PITCH + column + lane / 4;
#pragma unroll
  for (int j = 0; j < FRAGMENTS_ACROSS; ++j) {
    b[j][0] = tf32(from[j * 8]);
    b[j][1] = tf32(from[j * 8 + 4 * B_PITCH]);
  }
}

__device__ __forceinline__ void multiply(Sums& sum, const A& a, const B& b) {
#pragma unroll
  for (int i = 0; i < FRAGMENTS_DOWN; ++i)
#pragma unroll
    for (int j = 0; j < FRAGMENTS_ACROSS; ++j) multiply_tf32(sum[i][j], a[i], b[j][0], b[j][1]);
}

// Hands every pair of neighbouring sums to `write(row of the tile, column of the tile, pair)`.
template <class Write> __device__ __forceinline__ void for_pairs(const Sums& sum, Write write) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int row = warp % (ROWS / WARP_ROWS) * WARP_ROWS + lane / 4;
  const int column = warp / (ROWS / WARP_ROWS) * WARP_COLUMNS + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < FRAGMENTS_DOWN; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < FRAGMENTS_ACROSS; ++j)
        write(row + i * 16 + half * 8, column + j * 8,
              make_float2(sum[i][j][half * 2], sum[i][j][half * 2 + 1]));
}

// y = correlate(x, w). Rows: positions; columns: filters; the sum over (32 channels, tap).
// grid (ceil(N P / ROWS), ceil(C_out / COLUMNS)); shared STAGES (ROWS * 32 + 32 * B_PITCH) floats
extern "C" __global__ void __launch_bounds__(THREADS) correlate(
    const float* __restrict__ x, const float* __restrict__ w, float* __restrict__ y, Geometry g) {
  DYNAMIC_SHARED(memory);
  __shared__ int reach[32];                                  // from the corner to each tap, in points
  float* const buffers = (float*)memory;
  const int t = threadIdx.x, lane = t & 31, warp = t / 32, kernel = taps(g), count = rows(g);
  const int first_row = blockIdx.x * ROWS, first_column = blockIdx.y * COLUMNS;
  if (t < kernel) reach[t] = point(tap(t, g), g.size);

  // A thread brings one chunk of 4 channels of every THREADS / 8th row: the point of its corner
  // (which may lie in the padding) and one bit for every tap that lies inside.
  constexpr int A_LOADS = ROWS * 8 / THREADS, B_CHUNKS = COLUMNS / 4, B_LOADS = 32 * B_CHUNKS / THREADS;
  int from[A_LOADS];
  unsigned valid[A_LOADS];
#pragma unroll
  for (int i = 0; i < A_LOADS; ++i) {
    const int row = first_row + t / 8 + i * (THREADS / 8);
    const Place at = corner(place(min(row, count - 1), g.positions), g);
    from[i] = point(at, g.size);
    valid[i] = 0;
    for (int k = 0; k < kernel; ++k) valid[i] |= (unsigned)(row < count && inside(at + tap(k, g), g)) << k;
  }
  __syncthreads();

  int next_tap = 0, next_channel = 0;                        // of the buffer to be filled next
  auto fill = [&](int stage) {
    float* a = buffers + stage * (ROWS * 32 + 32 * B_PITCH);
    float* b = a + ROWS * 32;
    const int channel = next_channel + t % 8 * 4, step = reach[next_tap];
#pragma unroll
    for (int i = 0; i < A_LOADS; ++i) {
      const bool ok = valid[i] >> next_tap & 1 && channel < g.channels;
      copy_async(a + swizzled(t / 8 + i * (THREADS / 8), t % 8),
                 ok ? x + (long long)(from[i] + step) * g.channels + channel : x, ok);
    }
    const int column = first_column + t % B_CHUNKS * 4;
#pragma unroll
    for (int i = 0; i < B_LOADS; ++i) {
      const int term = t / B_CHUNKS + i * (THREADS / B_CHUNKS);
      const bool ok = next_channel + term < g.channels && column < g.filters;
      const long long row = (long long)next_tap * g.channels + next_channel + term;
      copy_async(b + term * B_PITCH + t % B_CHUNKS * 4, ok ? w + row * g.filters + column : w, ok);
    }
    if (++next_tap == kernel) next_tap = 0, next_channel += TERMS;
  };

  const int turns = kernel * ((g.channels + TERMS - 1) / TERMS);
  const int row = warp % (ROWS / WARP_ROWS) * WARP_ROWS, column = warp / (ROWS / WARP_ROWS) * WARP_COLUMNS;
  Sums sum = {};
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) {
    if (i < turns) fill(i);
    copy_commit();
  }
  for (int turn = 0; turn < turns; ++turn) {
    copy_wait<STAGES - 2>();
    __syncthreads();                                         // this buffer is full, the last one free
    if (turn + STAGES - 1 < turns) fill((turn + STAGES - 1) % STAGES);
    copy_commit();
    const float* a = buffers + turn % STAGES * (ROWS * 32 + 32 * B_PITCH);
#pragma unroll
    for (int term = 0; term < TERMS; term += 8) {
      A left;
      B right;
#pragma unroll
      for (int i = 0; i < FRAGMENTS_DOWN; ++i) {
        load_matrices(left[i], a + swizzled(row + i * 16 + lane % 16, term / 4 + lane / 16));
#pragma unroll
        for (int e = 0; e < 4; ++e) left[i][e] = tf32(left[i][e]);
      }
      load_b(right, a + ROWS * 32, term, column);
      multiply(sum, left, right);
    }
  }
  for_pairs(sum, [&](int i, int j, float2 pair) {
    if (first_row + i < count && first_column + j < g.filters)
      *(float2*)(y + output(first_row + i, g) + first_column + j) = pair;
  });
}

// slices[s] = the part of correlate_dw(x, y) that positions s * share to (s + 1) * share give.
// Rows: (tap, channel); columns: filters; the sum over positions, cut into slices that fill the
// GPU; adding the slices in order makes the result the same in every run.
// slices (gridDim.z, K C_in, C_out); grid (ceil(K C_in / ROWS), ceil(C_out / COLUMNS), slices);
// shared STAGES * 32 (A_PITCH + B_PITCH) floats
extern "C" __global__ void __launch_bounds__(THREADS) correlate_dw(
    const float* __restrict__ x, const float* __restrict__ y, float* __restrict__ slices, Geometry g,
    int share) {
  DYNAMIC_SHARED(memory);
  __shared__ __align__(16) Place corners[2][TERMS];          // of the positions of two turns
  float* const buffers = (float*)memory;
  const int t = threadIdx.x, lane = t & 31, warp = t / 32, count = taps(g) * g.channels;
  const int first_row = blockIdx.x * ROWS, first_column = blockIdx.y * COLUMNS;
  const int begin = blockIdx.z * share, end = min(rows(g), begin + share);
  const int turns = (end - begin + TERMS - 1) / TERMS;

  auto locate = [&](int turn) {
    if (t >= TERMS) return;
    const int term = begin + turn * TERMS + t;
    Place at = corner(place(min(term, end - 1), g.positions), g);
    if (term >= end) at.d = -(1 << 30);                      // outside for every tap
    corners[turn & 1][t] = at;
  };

  constexpr int A_CHUNKS = ROWS / 4, A_LOADS = TERMS * A_CHUNKS / THREADS;
  constexpr int B_CHUNKS = COLUMNS / 4, B_LOADS = TERMS * B_CHUNKS / THREADS;
  const int a_row = first_row + t % A_CHUNKS * 4, b_column = first_column + t % B_CHUNKS * 4;
  const Place step = tap(a_row / g.channels, g);             // 4 channels never straddle two taps
  const int channel = a_row % g.channels;
  auto fill = [&](int turn) {
    float* a = buffers + turn % STAGES * (TERMS * (A_PITCH + B_PITCH));
    float* b = a + TERMS * A_PITCH;
#pragma unroll
    for (int i = 0; i < A_LOADS; ++i) {
      const int term = t / A_CHUNKS + i * (THREADS / A_CHUNKS);
      const Place at = corners[turn & 1][term] + step;
      const bool ok = a_row < count && inside(at, g);
      copy_async(a + term * A_PITCH + t % A_CHUNKS * 4,
                 ok ? x + (long long)point(at, g.size) * g.channels + channel : x, ok);
    }
#pragma unroll
    for (int i = 0; i < B_LOADS; ++i) {
      const int term = t / B_CHUNKS + i * (THREADS / B_CHUNKS), position = begin + turn * TERMS + term;
      const bool ok = position < end && b_column < g.filters;
      copy_async(b + term * B_PITCH + t % B_CHUNKS * 4,
                 ok ? y + (long long)position * g.filters + b_column : y, ok);
    }
  };

  const int row = warp % (ROWS / WARP_ROWS) * WARP_ROWS, column = warp / (ROWS / WARP_ROWS) * WARP_COLUMNS;
  Sums sum = {};
  for (int i = 0; i < STAGES - 1; ++i) {
    locate(i);
    __syncthreads();
    if (i < turns) fill(i);
    copy_commit();
  }
  locate(STAGES - 1);
  for (int turn = 0; turn < turns; ++turn) {
    copy_wait<STAGES - 2>();
    __syncthreads();                                         // this buffer is full, the last one free
    if (turn + STAGES - 1 < turns) fill(turn + STAGES - 1);
    copy_commit();
    locate(turn + STAGES);
    const float* a = buffers + turn % STAGES * (TERMS * (A_PITCH + B_PITCH));
#pragma unroll
    for (int term = 0; term < TERMS; term += 8) {
      A left;
      B right;
      const unsigned* from = (const unsigned*)a + (term + lane % 4) * A_PITCH + row + lane / 4;
#pragma unroll
      for (int i = 0; i < FRAGMENTS_DOWN; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) left[i][e] = tf32(from[i * 16 + e % 2 * 8 + e / 2 * 4 * A_PITCH]);
      load_b(right, a + TERMS * A_PITCH, term, column);
      multiply(sum, left, right);
    }
  }
  for_pairs(sum, [&](int i, int j, float2 pair) {
    if (first_row + i < count && first_column + j < g.filters)
      *(float2*)(slices + ((long long)blockIdx.z * count + first_row + i) * g.filters + first_column + j) = pair;
  });
}
