// A sum that kernels of convolution left in slices, added in order: the last step of correlate and
// correlate_dw wherever they cut theirs.
//
//   y[output(row), filter] = sum over s of  slices[problem, s, row, filter]
//
// slices (PROBLEMS, count, pitch, C_out), pitch at least N P, is read once and y written once; a thread
// owns VECTOR filters of a row. grid (ceil(N P C_out / (THREADS VECTOR)), PROBLEMS), N P the most.
#include "common.cuh"
#include "conv.cuh"
#include "pack.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) total(
    const float* __restrict__ slices, int count, int pitch, const __grid_constant__ Problems problems,
    float* __restrict__ y) {
  const Geometry& g = problems.of[blockIdx.y];
  const long long numbers = (long long)pitch * g.filters;
  const long long at = ((long long)blockIdx.x * THREADS + threadIdx.x) * VECTOR;
  if (at >= (long long)rows(g) * g.filters) return;
  slices += blockIdx.y * count * numbers;
  Pack sum = load(slices + at);
#pragma unroll 4
  for (int s = 1; s < count; ++s) {
    const Pack v = load(slices + s * numbers + at);
    EACH_CHANNEL sum.of[i] += v.of[i];
  }
  store(y + output(int(at / g.filters), g) + at % g.filters, sum);
}
