// The numbers of a factor in bfloat16, for the tensor cores in conv_mma.cu: rounded once for a
// convolution, and not at every product that they take part in. bf16 in tests/test_kernel_conv.py, on
// NumPy, specifies it.
//
//   to[k, i] = the bfloat16 nearest to  from[k . walk + i],  of two the even one
//
// Blocks k of `count` numbers (a multiple of eight) are a kernel's taps, in whatever order they are
// walked; an array is one block. Least traffic, and all there is: 6 bytes a number.
#include "common.cuh"
#include "conv.cuh"

extern "C" __global__ void __launch_bounds__(256) rounded(
    const float* __restrict__ from, unsigned short* __restrict__ to, long long count, Geometry g) {
  const long long at = (blockIdx.x * 256LL + threadIdx.x) * 8;
  if (at >= count * taps(g)) return;
  const Place k = place(int(at / count), g.taps);
  from += (long long)k.d * g.walk[0] + (long long)k.h * g.walk[1] + (long long)k.w * g.walk[2] + at % count;
  const float4 low = *(const float4*)from, high = *(const float4*)(from + 4);
  *(uint4*)(to + at) = make_uint4(bf16(low.x, low.y), bf16(low.z, low.w), bf16(high.x, high.y),
                                  bf16(high.z, high.w));
}
