// Explicit im2col and its adjoint: convolution as one matrix product, for reading and for checks.
//
//   columns[i, k, c] = x[corner(i) + k * dilation, c], zero in the padding        (unfold)
//   x[s, c] = sum of columns[i, k, c] over all (i, k) that stand on s             (fold)
//
// Specification: unfold and fold in windows/reference.py; conv.cuh has the names. One thread per
// number of the result, channels fastest. The columns are K times as large as x and cross memory
// twice, 8 K N P C bytes: that is why convolution here does not store them (conv_simt, conv_mma).
#include "common.cuh"
#include "conv.cuh"

extern "C" __global__ void __launch_bounds__(256) unfold(
    const float* __restrict__ x, float* __restrict__ columns, Geometry g) {
  const int kernel = taps(g);
  const long long count = (long long)rows(g) * kernel * g.channels;
  for (long long i = blockIdx.x * 256LL + threadIdx.x; i < count; i += gridDim.x * 256LL) {
    const int channel = i % g.channels, k = i / g.channels % kernel;
    const Place at = corner(place(i / g.channels / kernel, g.positions), g) + tap(k, g);
    columns[i] = inside(at, g) ? x[(long long)point(at, g.size) * g.channels + channel] : 0.f;
  }
}

// The one window whose tap stands `step` after its corner and on `at`, along one axis; below 0: none.
__device__ __forceinline__ int window(int at, int step, int before, int stride, int positions) {
  const int from = at + before - step;
  return from % stride == 0 && from / stride < positions ? from / stride : -1;
}

extern "C" __global__ void __launch_bounds__(256) fold(
    const float* __restrict__ columns, float* __restrict__ x, Geometry g) {
  const int kernel = taps(g);
  const long long count = (long long)g.batch * g.size[0] * g.size[1] * g.size[2] * g.channels;
  for (long long i = blockIdx.x * 256LL + threadIdx.x; i < count; i += gridDim.x * 256LL) {
    const int channel = i % g.channels;
    const Place at = place(i / g.channels, g.size);
    float sum = 0.f;
    for (int k = 0; k < kernel; ++k) {
      const Place step = tap(k, g);
      const Place from = {at.n, window(at.d, step.d, g.before[0], g.stride[0], g.positions[0]),
                          window(at.h, step.h, g.before[1], g.stride[1], g.positions[1]),
                          window(at.w, step.w, g.before[2], g.stride[2], g.positions[2])};
      if (from.d < 0 || from.h < 0 || from.w < 0) continue;
      sum += columns[((long long)point(from, g.positions) * kernel + k) * g.channels + channel];
    }
    x[i] = sum;
  }
}
