// Cross-entropy and soft Dice of the softmax p over the classes of each voxel, and the gradient in
// the logits; losses._segmentation on NumPy specifies them. With t the labels one-hot, over the
// voxels v that are not ignored,
//
//   value = Σ_v w_y (-log p_y) / Σ_v w_y  +  1 - mean over c of R_c,
//   R_c = B_c / E_c,  B_c = 2 Σ_v p_c t_c + smooth,  E_c = Σ_v p_c + Σ_v t_c + smooth
//
// Every sum over voxels is one of four per class: p, p t, t and -t log p (`sums`, then `merge`);
// the rest is arithmetic on a few numbers, which `merge` does where it stands, because a launch
// costs more. With K classes in the mean the gradient is
//
//   w_y / Σ w (p - t) + p (q - <p, q>),  q_c = (R_c - 2 t_c) / (E_c K), zero for a class not in it.
//
// A thread takes one voxel at a time and holds its classes in registers; the softmax is computed
// twice and never stored. `sums` reads logits and labels, 4 V (C + 1) bytes for V voxels;
// `gradient` reads them again and writes 4 V C.
#include "common.cuh"

#ifndef CLASSES
#define CLASSES 3
#endif
#define WRONG (4 * CLASSES)  // after the four sums per class: how many labels are out of range
#define SUMS (WRONG + 1)

// p = softmax(x); returns -log p[label].
__device__ __forceinline__ float softmax(const float* x, int label, float (&p)[CLASSES]) {
  float top = x[0], sum = 0, chosen = 0;
#pragma unroll
  for (int c = 0; c < CLASSES; c++) {
    p[c] = x[c];
    top = fmaxf(top, p[c]);
  }
#pragma unroll
  for (int c = 0; c < CLASSES; c++) {
    if (c == label) chosen = p[c] - top;
    p[c] = expf(p[c] - top);
    sum += p[c];
  }
#pragma unroll
  for (int c = 0; c < CLASSES; c++) p[c] /= sum;
  return logf(sum) - chosen;
}

__device__ __forceinline__ double warp_sum(double v) {  // the same bits in every lane
  for (int lanes = 16; lanes; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

// partials (blocks, SUMS): what the voxels of each block add up to, in a fixed order.
extern "C" __global__ void __launch_bounds__(256)
sums(const float* __restrict__ logits, const int* __restrict__ labels, long long voxels,
     long long ignore, float* __restrict__ partials) {
  float sum[SUMS] = {};
  long long step = (long long)gridDim.x * blockDim.x;
  for (long long v = (long long)blockIdx.x * blockDim.x + threadIdx.x; v < voxels; v += step) {
    int label = labels[v];
    if (label == ignore) continue;
    if (label < 0 || label >= CLASSES) {
      sum[WRONG] += 1;
      continue;
    }
    float p[CLASSES], surprise = softmax(logits + v * CLASSES, label, p);
#pragma unroll
    for (int c = 0; c < CLASSES; c++) {
      sum[c] += p[c];
      if (c == label) {
        sum[CLASSES + c] += p[c];
        sum[2 * CLASSES + c] += 1;
        sum[3 * CLASSES + c] += surprise;
      }
    }
  }
  __shared__ float warps[8][SUMS];
#pragma unroll
  for (int s = 0; s < SUMS; s++) {
    float total = warp_sum(sum[s]);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][s] = total;
  }
  __syncthreads();
  if (threadIdx.x >= SUMS) return;
  float total = 0;
  for (int warp = 0; warp < 8; warp++) total += warps[warp][threadIdx.x];
  partials[(long long)blockIdx.x * SUMS + threadIdx.x] = total;
}

// The value of the loss, NaN if a label is out of range, whether one is, and what the gradient needs
// per class:
// factors (3, CLASSES) holds w / Σ w, R / (E K) and 2 / (E K). One block, a warp for each sum,
// in double: millions of voxels count one by one. No weight means a weight of one.
extern "C" __global__ void __launch_bounds__(1024)
merge(const float* __restrict__ partials, int blocks, const float* __restrict__ weight,
      int entropy, int overlap, int first, float smooth, float* __restrict__ value,
      int* __restrict__ wrong, float* __restrict__ factors) {
  __shared__ double sum[SUMS];
  for (int s = threadIdx.x / 32; s < SUMS; s += 32) {
    double total = 0;
    for (int b = threadIdx.x % 32; b < blocks; b += 32) total += partials[b * SUMS + s];
    total = warp_sum(total);
    if (threadIdx.x % 32 == 0) sum[s] = total;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;

  const double *p = sum, *both = p + CLASSES, *t = both + CLASSES, *surprise = t + CLASSES;
  double mass = 0, surprises = 0, mean = 0;
  for (int c = 0; c < CLASSES; c++) {
    mass += (weight ? weight[c] : 1) * t[c];
    if (!weight || weight[c] != 0)  // a label of minus infinity may be weighed by nothing
      surprises += (weight ? weight[c] : 1) * surprise[c];
  }
  if (mass == 0) mass = 1;  // nothing counts: the sum above it is zero too
  for (int c = 0; c < CLASSES; c++) {
    double either = p[c] + t[c] + smooth, ratio = (2 * both[c] + smooth) / either;
    double share = overlap && c >= first ? 1. / (CLASSES - first) : 0;
    mean += share * ratio;
    factors[c] = entropy ? (weight ? weight[c] : 1) / mass : 0;
    factors[CLASSES + c] = share * ratio / either;
    factors[2 * CLASSES + c] = share * 2 / either;
  }
  *wrong = sum[WRONG] > 0;
  *value = *wrong ? __int_as_float(0x7fffffff) : (entropy ? surprises / mass : 0) + (overlap ? 1 - mean : 0);
}

// dx = g times the gradient; zero where the label is ignored.
extern "C" __global__ void __launch_bounds__(256)
gradient(const float* __restrict__ logits, const int* __restrict__ labels, long long voxels,
         long long ignore, const float* __restrict__ factors, const float* __restrict__ g,
         float* __restrict__ dx) {
  __shared__ float factor[3][CLASSES];
  if (threadIdx.x < 3 * CLASSES)
    factor[threadIdx.x / CLASSES][threadIdx.x % CLASSES] = *g * factors[threadIdx.x];
  __syncthreads();
  long long step = (long long)gridDim.x * blockDim.x;
  for (long long v = (long long)blockIdx.x * blockDim.x + threadIdx.x; v < voxels; v += step) {
    int label = labels[v];
    float p[CLASSES], q[CLASSES], along = 0, w = 0;
    if (label == ignore) {
      for (int c = 0; c < CLASSES; c++) dx[v * CLASSES + c] = 0;
      continue;
    }
    softmax(logits + v * CLASSES, label, p);
#pragma unroll
    for (int c = 0; c < CLASSES; c++) {
      q[c] = factor[1][c];
      if (c == label) {
        w = factor[0][c];
        q[c] -= factor[2][c];
      }
      along += p[c] * q[c];
    }
#pragma unroll
    for (int c = 0; c < CLASSES; c++)
      dx[v * CLASSES + c] = w * (p[c] - (c == label)) + p[c] * (q[c] - along);
  }
}

// counts (N, C, C + 1), from zeros: the voxels of each patch by their prediction, the first of the largest
// logits (NaN is larger), and by their label, where what is no class is one more. train._confusion on
// NumPy specifies it. grid (any, N), a block for some voxels of one patch; shared C (C + 1) integers,
// of which sums come out the same in any order.
extern "C" __global__ void __launch_bounds__(256)
confusion(const float* __restrict__ logits, const int* __restrict__ labels, int classes, long long voxels,
          int* __restrict__ counts) {
  DYNAMIC_SHARED(memory);
  int* const table = (int*)memory;
  const int cells = classes * (classes + 1);
  for (int i = threadIdx.x; i < cells; i += blockDim.x) table[i] = 0;
  __syncthreads();
  const long long first = blockIdx.y * voxels, step = (long long)gridDim.x * blockDim.x;
  for (long long v = (long long)blockIdx.x * blockDim.x + threadIdx.x; v < voxels; v += step) {
    const float* x = logits + (first + v) * classes;
    float top = x[0];
    int best = 0;
    for (int c = 1; c < classes && top == top; c++)
      if (!(x[c] <= top)) top = x[best = c];
    const int label = labels[first + v];
    atomicAdd(table + best * (classes + 1) + (label >= 0 && label < classes ? label : classes), 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < cells; i += blockDim.x)
    if (table[i]) atomicAdd(counts + blockIdx.y * cells + i, table[i]);
}
