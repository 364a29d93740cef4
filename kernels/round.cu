// The numbers of a factor in bfloat16, for the tensor cores in conv_mma.cu: rounded once for a
// convolution, and not at every product that they take part in. bf16 in tests/test_kernel_conv.py, on
// NumPy, specifies it.
//
//   to[i] = the bfloat16 nearest to  from[i],  of two the even one;  i < count, a multiple of eight
//
// Least traffic, and all there is: 6 bytes a number.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) rounded(
    const float* __restrict__ from, unsigned short* __restrict__ to, long long count) {
  const long long at = (blockIdx.x * 256LL + threadIdx.x) * 8;
  if (at >= count) return;
  const float4 low = *(const float4*)(from + at), high = *(const float4*)(from + at + 4);
  *(uint4*)(to + at) = make_uint4(bf16(low.x, low.y), bf16(low.z, low.w), bf16(high.x, high.y),
                                  bf16(high.z, high.w));
}
