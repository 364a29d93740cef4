// One step of SGD or AdamW for all parameters of a network at once, the average of them, and the sum
// of squares that clipping needs; optim.SGD.update, optim.AdamW.update, train.Average and
// train.clip_norm on NumPy specify them.
//
// A network has a hundred arrays and more, most of them small: one launch takes them all. `arrays`
// holds the address of each one's gradient, parameter and running arrays, side by side; `chunks`
// holds (which, from, to) for each block, whose threads take its elements in turn, neighbours side
// by side. Per element SGD reads 12 bytes and writes 8, AdamW reads 16 and writes 12, the sum of
// squares reads 4.
#include "common.cuh"

// g' = g + decay p;  v <- momentum v + g';  p <- p - lr v, with Nesterov p - lr (g' + momentum v).
extern "C" __global__ void __launch_bounds__(256)
sgd(const unsigned long long* __restrict__ arrays, const long long* __restrict__ chunks, float lr,
    float momentum, float decay, int nesterov) {
  const long long* chunk = chunks + 3 * (long long)blockIdx.x;
  const unsigned long long* array = arrays + 3 * chunk[0];
  const float* gradient = (const float*)array[0];
  float *parameter = (float*)array[1], *velocity = (float*)array[2];
  for (long long i = chunk[1] + threadIdx.x; i < chunk[2]; i += blockDim.x) {
    float p = parameter[i], g = gradient[i] + decay * p, v = momentum * velocity[i] + g;
    velocity[i] = v;
    parameter[i] = p - lr * (nesterov ? g + momentum * v : v);
  }
}

// m <- m + gain1 (g - m);  s <- s + gain2 (g² - s);  p <- keep p - rate m / (sqrt(s) / root + eps)
// with gain = 1 - beta, keep = 1 - lr decay, rate = lr / (1 - beta1^t), root = sqrt(1 - beta2^t).
extern "C" __global__ void __launch_bounds__(256)
adamw(const unsigned long long* __restrict__ arrays, const long long* __restrict__ chunks,
      float gain1, float gain2, float keep, float rate, float root, float eps) {
  const long long* chunk = chunks + 3 * (long long)blockIdx.x;
  const unsigned long long* array = arrays + 4 * chunk[0];
  const float* gradient = (const float*)array[0];
  float *parameter = (float*)array[1], *mean = (float*)array[2], *square = (float*)array[3];
  for (long long i = chunk[1] + threadIdx.x; i < chunk[2]; i += blockDim.x) {
    float g = gradient[i], m = mean[i], s = square[i];
    mean[i] = m += gain1 * (g - m);
    square[i] = s += gain2 * (g * g - s);
    parameter[i] = keep * parameter[i] - rate * m / (sqrtf(s) / root + eps);
  }
}

// a <- x + decay (a - x), an exponential moving average.
extern "C" __global__ void __launch_bounds__(256)
average(const unsigned long long* __restrict__ arrays, const long long* __restrict__ chunks,
        float decay) {
  const long long* chunk = chunks + 3 * (long long)blockIdx.x;
  const unsigned long long* array = arrays + 2 * chunk[0];
  const float* x = (const float*)array[0];
  float* a = (float*)array[1];
  for (long long i = chunk[1] + threadIdx.x; i < chunk[2]; i += blockDim.x)
    a[i] = x[i] + decay * (a[i] - x[i]);
}

// partials (blocks,): Σ g² over each chunk, in a fixed order.
extern "C" __global__ void __launch_bounds__(256)
squares(const unsigned long long* __restrict__ arrays, const long long* __restrict__ chunks,
        float* __restrict__ partials) {
  const long long* chunk = chunks + 3 * (long long)blockIdx.x;
  const float* gradient = (const float*)arrays[chunk[0]];
  float sum = 0;
  for (long long i = chunk[1] + threadIdx.x; i < chunk[2]; i += blockDim.x)
    sum += gradient[i] * gradient[i];
  __shared__ float warps[8];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < 8; warp++) sum += warps[warp];
  partials[blockIdx.x] = sum;
}
