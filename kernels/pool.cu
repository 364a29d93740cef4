// Max pooling, channels last, over three axes; a lower rank has leading axes of size one. It is
// specified by `maximum` and `maximum_adjoint` in tinyseg/windows/reference.py:
//
//   y[n, p, c]  = max over the taps k of x[n, p * stride + k * dilation - before, c]
//   dx[n, s, c] = sum of g[n, p, c] over the windows p whose winner stands on point s
//
// winner[n, p, c] numbers the taps in row-major order, the first of equals. Padding is minus
// infinity. A NaN in a window makes y NaN and ends the contest: the largest before it has won.
//
// A thread owns one point (of y, or of dx) and VECTOR neighbouring channels; those beside it in
// its warp own the next channels and then the next points. Each kernel moves 4 |x| + 6 |y| bytes:
// what overlapping windows read again is mostly in the caches. The adjoint gathers: a point asks
// the windows that cover it, in their order, so that no two threads add to one number.
#include "common.cuh"
#include "pack.cuh"

struct Axis { int size, count, kernel, stride, before, dilation; };  // count: of windows
struct Window { Axis depth, height, width; };

struct __align__(2 * VECTOR) Taps { short of[VECTOR]; };

struct Point { int n, d, h, w; };

// Where point `index`, in memory order, is in samples of this depth, height and width.
__device__ __forceinline__ Point point(unsigned index, int depth, int height, int width) {
  int row = index / width, plane = row / height;
  return {plane / depth, plane % depth, row % height, int(index % width)};
}

// Where tap k of window p stands along an axis, maybe outside.
__device__ __forceinline__ int place(const Axis& a, int p, int k) {
  return p * a.stride + k * a.dilation - a.before;
}

// The windows whose span covers place s.
struct Range { int first, last; };
__device__ __forceinline__ Range covering(const Axis& a, int s) {
  int last = s + a.before, first = last - (a.kernel - 1) * a.dilation;
  return {first > 0 ? (first + a.stride - 1) / a.stride : 0, min(last / a.stride, a.count - 1)};
}

// The tap with which window p stands on place s of its span, or -1 if s lies between two.
__device__ __forceinline__ int tap_on(const Axis& a, int p, int s) {
  int steps = s - place(a, p, 0);
  int k = a.dilation == 1 ? steps : steps / a.dilation;
  return k * a.dilation == steps ? k : -1;
}

// x (N, *S, C) -> y, winner (N, *P, C), of which there are `points` in all channels.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
maximum(const float* __restrict__ x, Window window, int points, int channels,
        float* __restrict__ y, short* __restrict__ winner) {
  const Axis &depth = window.depth, &height = window.height, &width = window.width;
  unsigned index = blockIdx.x * blockDim.y + threadIdx.y;
  int c = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
  if (index >= points || c >= channels) return;
  Point p = point(index, depth.count, height.count, width.count);

  Pack best;
  Taps won = {};
  EACH_CHANNEL best.of[i] = __int_as_float(0xff800000);  // minus infinity
  for (int kd = 0; kd < depth.kernel; ++kd) {
    int d = place(depth, p.d, kd);
    if (d < 0 || d >= depth.size) continue;
    for (int kh = 0; kh < height.kernel; ++kh) {
      int h = place(height, p.h, kh);
      if (h < 0 || h >= height.size) continue;
      long long row = (((long long)p.n * depth.size + d) * height.size + h) * width.size;
      for (int kw = 0; kw < width.kernel; ++kw) {
        int w = place(width, p.w, kw);
        if (w < 0 || w >= width.size) continue;
        short tap = (kd * height.kernel + kh) * width.kernel + kw;
        Pack seen = load(x + (row + w) * channels + c);
        EACH_CHANNEL {
          bool more = seen.of[i] > best.of[i];
          if (more) won.of[i] = tap;
          if (more || isnan(seen.of[i])) best.of[i] = seen.of[i];
        }
      }
    }
  }
  long long at = (long long)index * channels + c;
  store(y + at, best);
  *(Taps*)(winner + at) = won;
}

// g, winner (N, *P, C) -> dx (N, *S, C), of which there are `points` in all channels.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
maximum_adjoint(const float* __restrict__ g, const short* __restrict__ winner, Window window,
                int points, int channels, float* __restrict__ dx) {
  const Axis &depth = window.depth, &height = window.height, &width = window.width;
  unsigned index = blockIdx.x * blockDim.y + threadIdx.y;
  int c = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
  if (index >= points || c >= channels) return;
  Point s = point(index, depth.size, height.size, width.size);
  Range d = covering(depth, s.d), h = covering(height, s.h), w = covering(width, s.w);

  Pack sum = {};
  for (int pd = d.first; pd <= d.last; ++pd) {
    int kd = tap_on(depth, pd, s.d);
    if (kd < 0) continue;
    for (int ph = h.first; ph <= h.last; ++ph) {
      int kh = tap_on(height, ph, s.h);
      if (kh < 0) continue;
      long long row = (((long long)s.n * depth.count + pd) * height.count + ph) * width.count;
      for (int pw = w.first; pw <= w.last; ++pw) {
        int kw = tap_on(width, pw, s.w);
        if (kw < 0) continue;
        int tap = (kd * height.kernel + kh) * width.kernel + kw;
        long long at = (row + pw) * channels + c;
        Taps won = *(const Taps*)(winner + at);
        Pack value = load(g + at);
        EACH_CHANNEL if (won.of[i] == tap) sum.of[i] += value.of[i];
      }
    }
  }
  store(dx + (long long)index * channels + c, sum);
}
