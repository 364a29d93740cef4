// Batch normalisation of rows (M, C), channels last, with a residual and a ReLU where wanted:
//
//   moments         mean and variance over the rows
//   normalize       xhat = (x - mean) * scale,  y = max(0, xhat * gamma + beta + residual)
//   adjoint_sums    g' = g where y > 0, else 0;  dbeta = sum g',  dgamma = sum g' xhat
//   normalize_dx    dx = gamma * scale * (g' - dbeta / M - xhat * dgamma / M); in evaluation, where
//                   mean and scale do not depend on x, without what is divided by M
//   column_sum      the sum over the rows
//
// Specified by `batch_norm` in tinyseg/normalisation.py. Of arrays with M * C floats `moments`
// reads x; `normalize` reads x (and residual) and writes y; `adjoint_sums` reads g and x (with a
// residual and a ReLU also y, and writes g'); `normalize_dx` reads g (or g') and x and writes dx;
// the rest is small. That traffic is all they cost: hence 16 bytes a load, and loops that unroll
// into several rows whose loads come first and are under way together.
//
// Block (i, j) owns chunk i of the rows and tile j of the channels. Thread (x, y) of it owns VECTOR
// neighbouring channels and every blockDim.y-th row of the chunk, from its row y on: the numbers
// that belong to channels stay in its registers, and a warp reads whole rows of the tile. What is
// summed over rows a block leaves for its chunk, and whichever comes last adds up what all left for
// the tile. Threads add in the order of rows, then blocks in a tree, then chunks in the same way:
// always in the same order.
#include "common.cuh"
#include "pack.cuh"

#define EACH_ROW(own) for (; own.count; --own.count, own.at += own.step)

// What a thread owns: `count` rows, `step` numbers apart, of which the first begins `at`.
struct Share { int channel, count; long long at, step; };

__device__ __forceinline__ Share share(long long rows, int channels, int chunk,
                                       unsigned which = blockIdx.x) {
  int c = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
  long long start = (long long)which * chunk;
  int left = int(min((long long)chunk, rows - start)) - int(threadIdx.y);
  int count = c < channels && left > 0 ? (left - 1) / int(blockDim.y) + 1 : 0;
  return {c, count, (start + threadIdx.y) * channels + c, (long long)blockDim.y * channels};
}

// xhat, and what becomes of it: here for all kernels, as `gate` must see the sign that y had.
__device__ __forceinline__ Pack standard(Pack x, const Pack& mean, const Pack& scale) {
  EACH_CHANNEL x.of[i] = (x.of[i] - mean.of[i]) * scale.of[i];
  return x;
}
__device__ __forceinline__ Pack affine(Pack xhat, const Pack& gamma, const Pack& beta) {
  EACH_CHANNEL xhat.of[i] = fmaf(xhat.of[i], gamma.of[i], beta.of[i]);
  return xhat;
}

// `floor` is 0 or minus infinity, residual may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
normalize(const float* __restrict__ x, const float* __restrict__ mean,
          const float* __restrict__ scale, const float* __restrict__ gamma,
          const float* __restrict__ beta, const float* __restrict__ residual, float floor,
          long long rows, int channels, int chunk, float* __restrict__ y) {
  Share own = share(rows, channels, chunk);
  int c = own.channel;
  if (!own.count) return;
  Pack m = load(mean + c), s = load(scale + c), slope = load(gamma + c), shift = load(beta + c);
#pragma unroll 2
  EACH_ROW(own) {
    Pack v = affine(standard(load(x + own.at), m, s), slope, shift);
    if (residual) {
      Pack r = load(residual + own.at);
      EACH_CHANNEL v.of[i] += r.of[i];
    }
    EACH_CHANNEL if (v.of[i] < floor) v.of[i] = floor;  // a NaN stays
    store(y + own.at, v);
  }
}

// g where the ReLU let y pass.
__device__ __forceinline__ Pack gate(Pack g, const Pack& y) {
  EACH_CHANNEL if (!(y.of[i] > 0)) g.of[i] = 0;
  return g;
}

// Adds `v` over the rows of a block; the sum is whole in the threads of the first row.
__device__ __forceinline__ void sum_over_block(Pack& v, Pack* slots) {
  int own = threadIdx.y * blockDim.x + threadIdx.x;
  slots[own] = v;
  for (int half = blockDim.y / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) {
      Pack other = slots[own + half * blockDim.x];
      EACH_CHANNEL v.of[i] += other.of[i];
      slots[own] = v;
    }
  }
}

// The sum of the rows of x that a block owns; it is whole in the threads of the first row.
__device__ __forceinline__ Pack sum_rows(const float* x, Share own, Pack* slots) {
  Pack sum = {};
#pragma unroll 4
  EACH_ROW(own) {
    Pack v = load(x + own.at);
    EACH_CHANNEL sum.of[i] += v.of[i];
  }
  sum_over_block(sum, slots);
  return sum;
}

// What a block has of a sum, to where its chunk's stands in `parts` (chunks, C).
__device__ __forceinline__ void leave(const Pack& v, int c, int channels, float* parts) {
  if (threadIdx.y == 0 && c < channels) store(parts + (long long)blockIdx.x * channels + c, v);
}

// The sum over chunks, parts (chunks, C) -> sum (C,), of this block's tile.
__device__ __forceinline__ void add_chunks(const float* parts, int channels, Pack* slots,
                                           float* sum) {
  Share own = share(gridDim.x, channels, gridDim.x, 0);
  Pack all = sum_rows(parts, own, slots);
  if (threadIdx.y == 0 && own.channel < channels) store(sum + own.channel, all);
}

// Whether of the blocks of a tile this is the one that comes here last, told to all of its threads:
// what any of them stored before is then there to be read. A counter in `arrived`, of each tile, is
// 0 before the first comes and, as it wraps around, after the last. The fences are for the whole
// block, which waits before and after.
__device__ __forceinline__ bool is_last(unsigned* arrived) {
  bool last = false;
  __syncthreads();
  if (!threadIdx.x && !threadIdx.y) {
    __threadfence();
    last = atomicInc(arrived + blockIdx.y, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  return __syncthreads_or(last);
}

// x (M, C) -> sum (C,), with room for the chunks' `parts` (chunks, C).
extern "C" __global__ void __launch_bounds__(THREADS, 4)
column_sum(const float* __restrict__ x, long long rows, int channels, int chunk, float* parts,
           unsigned* arrived, float* __restrict__ sum) {
  __shared__ Pack slots[THREADS];
  Share own = share(rows, channels, chunk);
  leave(sum_rows(x, own, slots), own.channel, channels, parts);
  if (is_last(arrived)) add_chunks(parts, channels, slots, sum);
}

// dbeta, dgamma (C,), with room for the chunks' parts (2, chunks, C). What a ReLU let pass is read
// from y, and g' written to `passed`; or y is computed again with beta, if nothing else was added.
// Without a ReLU y, beta and `passed` are null.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
adjoint_sums(const float* __restrict__ g, const float* __restrict__ x, const float* __restrict__ y,
             const float* __restrict__ mean, const float* __restrict__ scale,
             const float* __restrict__ gamma, const float* __restrict__ beta, long long rows,
             int channels, int chunk, float* parts, unsigned* arrived, float* __restrict__ passed,
             float* __restrict__ dbeta, float* __restrict__ dgamma) {
  __shared__ Pack slots[2][THREADS];
  Share own = share(rows, channels, chunk);
  int c = own.channel;
  Pack sum = {}, along = {};
  if (own.count) {
    Pack m = load(mean + c), s = load(scale + c), slope = load(gamma + c), shift = {};
    if (beta) shift = load(beta + c);
#pragma unroll 2
    EACH_ROW(own) {
      Pack d = load(g + own.at), xhat = standard(load(x + own.at), m, s);
      if (beta) d = gate(d, affine(xhat, slope, shift));
      if (y) {
        d = gate(d, load(y + own.at));
        store(passed + own.at, d);
      }
      EACH_CHANNEL {
        sum.of[i] += d.of[i];
        along.of[i] += d.of[i] * xhat.of[i];
      }
    }
  }
  sum_over_block(sum, slots[0]);
  sum_over_block(along, slots[1]);
  float* second = parts + (long long)gridDim.x * channels;
  leave(sum, c, channels, parts);
  leave(along, c, channels, second);
  if (!is_last(arrived)) return;
  add_chunks(parts, channels, slots[0], dbeta);
  add_chunks(second, channels, slots[1], dgamma);
}

// `average` is 1 / M in training and 0 in evaluation. Without beta g is g' already.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
normalize_dx(const float* __restrict__ g, const float* __restrict__ x,
             const float* __restrict__ mean, const float* __restrict__ scale,
             const float* __restrict__ gamma, const float* __restrict__ beta,
             const float* __restrict__ dbeta, const float* __restrict__ dgamma, float average,
             long long rows, int channels, int chunk, float* __restrict__ dx) {
  Share own = share(rows, channels, chunk);
  int c = own.channel;
  if (!own.count) return;
  Pack m = load(mean + c), s = load(scale + c), slope = load(gamma + c), shift = {};
  if (beta) shift = load(beta + c);
  Pack level = load(dbeta + c), along = load(dgamma + c);
  EACH_CHANNEL level.of[i] *= average, along.of[i] *= average;
#pragma unroll 2
  EACH_ROW(own) {
    Pack d = load(g + own.at), xhat = standard(load(x + own.at), m, s);
    if (beta) d = gate(d, affine(xhat, slope, shift));
    EACH_CHANNEL d.of[i] =
        slope.of[i] * s.of[i] * (d.of[i] - level.of[i] - xhat.of[i] * along.of[i]);
    store(dx + own.at, d);
  }
}

// How many numbers, their mean and M2 = sum (x - mean)^2, for each channel of a thread.
struct Moments { float n; Pack mean, m2; };

// The moments of two sets from those of each (Chan, Golub and LeVeque 1983).
__device__ __forceinline__ void merge(Moments& a, const Moments& b) {
  if (b.n == 0) return;
  float weight = b.n / (a.n + b.n);
  EACH_CHANNEL {
    float delta = b.mean.of[i] - a.mean.of[i];
    a.mean.of[i] += delta * weight;
    a.m2.of[i] += b.m2.of[i] + delta * delta * (a.n * weight);
  }
  a.n += b.n;
}

// As sum_over_block.
__device__ __forceinline__ void merge_over_block(Moments& moments, Moments* slots) {
  int own = threadIdx.y * blockDim.x + threadIdx.x;
  slots[own] = moments;
  for (int half = blockDim.y / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) {
      merge(moments, slots[own + half * blockDim.x]);
      slots[own] = moments;
    }
  }
}

// The moments, as differences from `origin`, of the rows of x that a thread owns. Where there are
// `m2s`, a row of x is the mean of `size` rows, and that of m2s their M2; `left` of them are there
// from the thread's first on. It sums differences from its own first value: as that is one of its
// n, the sum of their squares is at most n times M2, and little cancels when the square of their
// sum is taken off, whatever the data.
__device__ __forceinline__ Moments moments_of(const float* x, const Pack& origin, Share own,
                                              const float* m2s = nullptr, int size = 0,
                                              long long left = 0) {
  Moments all = {};
  if (!own.count) return all;
  Pack pivot = load(x + own.at), sum = {}, squares = {};
#pragma unroll 4
  EACH_ROW(own) {
    Pack v = load(x + own.at);
    float n = 1;
    if (m2s) {
      Pack m2 = load(m2s + own.at);
      EACH_CHANNEL squares.of[i] += m2.of[i];
      n = min((long long)size, left);
      left -= (long long)blockDim.y * size;
    }
    all.n += n;
    EACH_CHANNEL {
      float d = v.of[i] - pivot.of[i];
      sum.of[i] += n * d;
      squares.of[i] += n * d * d;
    }
  }
  EACH_CHANNEL {
    float mean = sum.of[i] / all.n;
    all.mean.of[i] = pivot.of[i] - origin.of[i] + mean;
    all.m2.of[i] = squares.of[i] - sum.of[i] * mean;
  }
  return all;
}

// x (M, C) -> mean, variance (C,), with room for the chunks' parts (2, chunks, C): their means, as
// differences from the first row of x, so that none is large against the deviations, and their M2.
// Where there is a `scale`, it becomes 1 / sqrt(variance + eps), and the running statistics, the
// variance of them without bias, move by `momentum` towards these.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
moments(const float* __restrict__ x, long long rows, int channels, int chunk, float* parts,
        unsigned* arrived, float* __restrict__ mean, float* __restrict__ variance, float eps,
        float momentum, float* __restrict__ scale, float* __restrict__ running_mean,
        float* __restrict__ running_variance) {
  __shared__ Moments slots[THREADS];
  Share own = share(rows, channels, chunk);
  int c = own.channel;
  Pack origin = {};
  if (c < channels) origin = load(x + c);
  Moments seen = moments_of(x, origin, own);
  merge_over_block(seen, slots);
  float* m2s = parts + (long long)gridDim.x * channels;
  leave(seen.mean, c, channels, parts);
  leave(seen.m2, c, channels, m2s);
  if (!is_last(arrived)) return;
  Moments all = moments_of(parts, {}, share(gridDim.x, channels, gridDim.x, 0), m2s, chunk,
                           rows - (long long)threadIdx.y * chunk);
  merge_over_block(all, slots);
  if (threadIdx.y || c >= channels) return;
  EACH_CHANNEL all.mean.of[i] += origin.of[i], all.m2.of[i] /= all.n;
  store(mean + c, all.mean);
  store(variance + c, all.m2);
  if (!scale) return;
  Pack before = load(running_mean + c), spread = load(running_variance + c), factor;
  EACH_CHANNEL {
    factor.of[i] = 1 / sqrtf(all.m2.of[i] + eps);
    before.of[i] += momentum * (all.mean.of[i] - before.of[i]);
    spread.of[i] += momentum * (all.m2.of[i] * (all.n / (all.n - 1)) - spread.of[i]);
  }
  store(scale + c, factor);
  store(running_mean + c, before);
  store(running_variance + c, spread);
}
