// Linear interpolation along each spatial axis, and its adjoint; ops.upsample on NumPy specifies
// them:
//
//   y[n, d, h, w, c] = Σ over the 8 corners (d', h', w') around the point that (d, h, w) reads
//                      of weight_d weight_h weight_w x[n, d', h', w', c]
//
// A table per axis, made on the host in float64 (cuda.upsample.coordinates), says that output m
// reads sample low[m] with weight 1 - fraction[m] and the next one with weight fraction[m]. Where
// the fraction is zero the next one is the same one again: the last sample has no neighbour, and
// an axis that keeps its size costs no traffic.
//
// `linear`: a block takes one row of outputs (n, d, h), a thread the numbers (w, c) of it, channels
// fastest, so that neighbours write and read side by side. It moves x once (the caches serve the
// other seven reads) and y once: 4 (|x| + |y|) bytes.
#include "common.cuh"

#ifndef ROWS
#define ROWS 4  // of x around a row of y: 4, or 2 if the depth stays, or 1 if the height does too
#endif

extern "C" __global__ void __launch_bounds__(256)
linear(const float* __restrict__ x, const int* __restrict__ low_d,
       const float* __restrict__ fraction_d, const int* __restrict__ low_h,
       const float* __restrict__ fraction_h, const int* __restrict__ low_w,
       const float* __restrict__ fraction_w, int depth, int height, int width, int new_depth,
       int new_height, int row, int channels, float* __restrict__ y) {
  int h = blockIdx.x % new_height, plane = blockIdx.x / new_height;
  int d = plane % new_depth, n = plane / new_depth;
  float fd = fraction_d[d], fh = fraction_h[h], weight[ROWS];
  const float* around[ROWS];
#pragma unroll
  for (int k = 0; k < ROWS; k++) {
    int deeper = k / 2, lower = k % 2;
    int dd = low_d[d] + (deeper && fd > 0), hh = low_h[h] + (lower && fh > 0);
    around[k] = x + (((long long)n * depth + dd) * height + hh) * width * channels;
    weight[k] = (deeper ? fd : 1 - fd) * (lower ? fh : 1 - fh);
  }
  y += (long long)blockIdx.x * row;
  unsigned step = gridDim.y * blockDim.x;
  for (unsigned i = blockIdx.y * blockDim.x + threadIdx.x; i < (unsigned)row; i += step) {
    unsigned w = i / channels;
    float f = fraction_w[w], sum = 0;
    long long here = (long long)low_w[w] * channels + i % channels;
    long long next = here + (f > 0 ? channels : 0);
#pragma unroll
    for (int k = 0; k < ROWS; k++)
      sum += weight[k] * ((1 - f) * around[k][here] + f * around[k][next]);
    y[i] = sum;
  }
}

// The adjoint along one axis: g (outer, after, inner) -> dx (outer, before, inner), a thread per
// number of dx. The outputs that read sample j are a range: from start[j] on they read it as the
// upper one of two, from start[j + 1] on as the lower, and start[j + 2] ends it. Summed in that
// order, without atomics, the result is the same every time.
//
// One axis at a time and the first axis first. Eightfold in three axes a sample collects 16 terms
// three times instead of 4096 at once, and the first launch, which has nearly all the work, has
// `after / before` times fewer outputs than g has numbers, plenty still: (40, 224, 224, 3) ->
// (5, 28, 28, 3) runs 750 thousand threads and not 12 thousand. First the first axis because its
// `inner` is long: neighbours read side by side. It moves 4 (|g| + |dx|) bytes; a row of g is read
// twice, the second time mostly from the L2 cache.
extern "C" __global__ void __launch_bounds__(256)
linear_adjoint(const float* __restrict__ g, const int* __restrict__ start,
               const float* __restrict__ fraction, int before, int after, long long inner,
               long long size, float* __restrict__ dx) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= size) return;
  long long line = i / inner, outer = line / before;
  int j = line % before, m = start[j];
  const float* at = g + (outer * after + m) * inner + i % inner;
  float sum = 0;
  for (; m < start[j + 1]; m++, at += inner) sum += fraction[m] * *at;
  for (; m < start[j + 2]; m++, at += inner) sum += (1 - fraction[m]) * *at;
  dx[i] = sum;
}
