// Convolution in float32 on the plain arithmetic units: any channels, taps, strides, dilations.
// Specification: correlate and correlate_dw in windows/reference.py (conv.cuh has the formula).
//
// A block computes a tile of ROWS x COLUMNS numbers of a matrix product, 8 x 4 per thread. Both
// factors pass through shared memory DEPTH terms of the sum at a time, in two buffers: while one
// is multiplied, the next waits in registers. The matrix of patches is never stored: each thread
// works out where on the grid its number stands.
//
// Least traffic: x, w and y once, 4 (N S C_in + K C_in C_out + N P C_out) bytes. This form loads
// each row's patch once for every COLUMNS filters, mostly from the caches.
#include "common.cuh"
#include "conv.cuh"

#define ROWS 128
#ifndef COLUMNS
#define COLUMNS 64
#endif
#define DEPTH 16
#define THREADS (ROWS / 8 * COLUMNS / 4)
#define A_LOADS (ROWS * DEPTH / THREADS)     // numbers of each factor that one thread brings
#define B_LOADS (DEPTH * COLUMNS / THREADS)

// sum[i][j] += a[., 8 rows of this thread] b[., 4 columns of this thread] over one buffer
__device__ __forceinline__ void multiply(float (&sum)[8][4], const float (&a)[DEPTH][ROWS + 4],
                                         const float (&b)[DEPTH][COLUMNS]) {
  const int row = threadIdx.x / (COLUMNS / 4) * 8, column = threadIdx.x % (COLUMNS / 4) * 4;
#pragma unroll
  for (int k = 0; k < DEPTH; ++k) {
    const float4 low = *(const float4*)&a[k][row], high = *(const float4*)&a[k][row + 4];
    const float4 right = *(const float4*)&b[k][column];
    const float left[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sum[i][0] += left[i] * right.x;
      sum[i][1] += left[i] * right.y;
      sum[i][2] += left[i] * right.z;
      sum[i][3] += left[i] * right.w;
    }
  }
}

// y = correlate(x, w) of each problem. Rows: positions; columns: filters; the sum over (tap, channel).
// grid (ceil(N P / ROWS), ceil(C_out / COLUMNS), PROBLEMS), N P the most of a problem
extern "C" __global__ void __launch_bounds__(THREADS) correlate(
    const float* __restrict__ x, const float* __restrict__ w, float* __restrict__ y,
    const __grid_constant__ Problems problems) {
  __shared__ __align__(16) float a[2][DEPTH][ROWS + 4], b[2][DEPTH][COLUMNS];
  const Geometry& g = problems.of[blockIdx.z];
  const int t = threadIdx.x, first_row = blockIdx.x * ROWS, first_column = blockIdx.y * COLUMNS;
  const int count = rows(g), terms = taps(g) * g.channels;
  if (PROBLEMS > 1 && first_row >= count) return;
  const int a_term = t % DEPTH, a_row = t / DEPTH;              // DEPTH neighbours read one patch
  const int b_column = t % COLUMNS, b_term = t / COLUMNS;

  Place from[A_LOADS];
#pragma unroll
  for (int i = 0; i < A_LOADS; ++i) {
    const int row = first_row + a_row + i * (THREADS / DEPTH);
    from[i] = corner(place(min(row, count - 1), g.positions), g);
    if (row >= count) from[i].d = -(1 << 30);                   // outside for every tap
  }
  float next_a[A_LOADS], next_b[B_LOADS];
  auto fetch = [&](int first_term) {
    const int term = first_term + a_term, channel = term % g.channels;
    const Place step = tap(term / g.channels, g);
#pragma unroll
    for (int i = 0; i < A_LOADS; ++i) {
      const Place at = from[i] + step;
      const bool valid = term < terms && inside(at, g);
      next_a[i] = valid ? __ldg(x + (long long)point(at, g.size) * g.channels + channel) : 0.f;
    }
#pragma unroll
    for (int i = 0; i < B_LOADS; ++i) {
      const int row = first_term + b_term + i * (THREADS / COLUMNS), column = first_column + b_column;
      const bool valid = row < terms && column < g.filters;
      next_b[i] = valid ? __ldg(w + g.origin + (long long)row * g.filters + column) : 0.f;
    }
  };
  auto store = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < A_LOADS; ++i) a[buffer][a_term][a_row + i * (THREADS / DEPTH)] = next_a[i];
#pragma unroll
    for (int i = 0; i < B_LOADS; ++i) b[buffer][b_term + i * (THREADS / COLUMNS)][b_column] = next_b[i];
  };

  float sum[8][4] = {};
  fetch(0);
  store(0);
  __syncthreads();
  for (int term = 0, buffer = 0; term < terms; term += DEPTH, buffer ^= 1) {
    const bool more = term + DEPTH < terms;
    if (more) fetch(term + DEPTH);
    multiply(sum, a[buffer], b[buffer]);
    if (more) store(buffer ^ 1);
    __syncthreads();
  }

  const int row = first_row + t / (COLUMNS / 4) * 8, column = first_column + t % (COLUMNS / 4) * 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (row + i >= count) break;
    float* out = y + output(row + i, g);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (column + j < g.filters) out[column + j] = sum[i][j];
  }
}

// slices[s] = the part of correlate_dw(x, y) that the s-th part of the positions gives. Rows: (tap,
// channel); columns: filters; the sum over positions, cut into slices that fill the GPU and that
// slices.cu adds in order.
// slices (gridDim.z, gridDim.x ROWS, C_out); grid (ceil(K C_in / ROWS), ceil(C_out / COLUMNS), slices)
extern "C" __global__ void __launch_bounds__(THREADS) correlate_dw(
    const float* __restrict__ x, const float* __restrict__ y, float* __restrict__ slices, Geometry g) {
  __shared__ __align__(16) float a[2][DEPTH][ROWS + 4], b[2][DEPTH][COLUMNS];
  __shared__ Place corners[2][DEPTH];                           // of the positions of two buffers
  const int t = threadIdx.x, first_row = blockIdx.x * ROWS, first_column = blockIdx.y * COLUMNS;
  const int share = (rows(g) - 1) / (int)gridDim.z + 1;
  const int begin = blockIdx.z * share, end = min(rows(g), begin + share);
  const int count = taps(g) * g.channels;
  const int a_row = t % ROWS, a_term = t / ROWS;                // neighbours read one position
  const int b_column = t % COLUMNS, b_term = t / COLUMNS;
  const int row = first_row + a_row, channel = row % g.channels;
  const Place step = tap(row / g.channels, g);

  auto locate = [&](int first_term, int buffer) {
    if (t >= DEPTH) return;
    const int term = first_term + t;
    corners[buffer][t] = corner(place(min(term, end - 1), g.positions), g);
    if (term >= end) corners[buffer][t].d = -(1 << 30);
  };
  float next_a[A_LOADS], next_b[B_LOADS];
  auto fetch = [&](int first_term, int buffer) {
#pragma unroll
    for (int i = 0; i < A_LOADS; ++i) {
      const Place at = corners[buffer][a_term + i * (THREADS / ROWS)] + step;
      const bool valid = row < count && inside(at, g);
      next_a[i] = valid ? __ldg(x + (long long)point(at, g.size) * g.channels + channel) : 0.f;
    }
#pragma unroll
    for (int i = 0; i < B_LOADS; ++i) {
      const int term = first_term + b_term + i * (THREADS / COLUMNS), column = first_column + b_column;
      const bool valid = term < end && column < g.filters;
      next_b[i] = valid ? __ldg(y + (long long)term * g.filters + column) : 0.f;
    }
  };
  auto store = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < A_LOADS; ++i) a[buffer][a_term + i * (THREADS / ROWS)][a_row] = next_a[i];
#pragma unroll
    for (int i = 0; i < B_LOADS; ++i) b[buffer][b_term + i * (THREADS / COLUMNS)][b_column] = next_b[i];
  };

  float sum[8][4] = {};
  locate(begin, 0);
  locate(begin + DEPTH, 1);
  __syncthreads();
  fetch(begin, 0);
  store(0);
  __syncthreads();
  for (int term = begin, buffer = 0; term < end; term += DEPTH, buffer ^= 1) {
    const bool more = term + DEPTH < end;
    if (more) fetch(term + DEPTH, buffer ^ 1);
    locate(term + 2 * DEPTH, buffer);                           // read before the last barrier
    multiply(sum, a[buffer], b[buffer]);
    if (more) store(buffer ^ 1);
    __syncthreads();
  }

  const int out_row = first_row + t / (COLUMNS / 4) * 8, column = first_column + t % (COLUMNS / 4) * 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (out_row + i >= count) break;
    float* out = slices + ((long long)blockIdx.z * gridDim.x * ROWS + out_row + i) * g.filters;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (column + j < g.filters) out[column + j] = sum[i][j];
  }
}
