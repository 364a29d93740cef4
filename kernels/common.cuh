// What every kernel stands on. The only file that knows whether it is compiled for a GPU (NVRTC,
// nvcc) or for the emulator of the tests, whose header stands in front and defines the same names.
//
// Rules that keep each kernel testable on a CPU: no inline assembly and no `extern __shared__`
// outside this file, warp-wide calls with all 32 lanes, no templates around `__shared__` arrays,
// constants as macros with a default (so that each file compiles alone; the launcher sets others).
#ifndef TINYSEG_COMMON
#define TINYSEG_COMMON

#ifdef __CUDACC__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return (unsigned)__cvta_generic_to_shared(p);
}

// 16 bytes, or 4, from global to shared memory in the background, or zero bytes where `valid` is not
// set: then `global` may point anywhere. 16 go past the first-level cache, whose place is shared
// memory's here.
template <int BYTES = 16> __device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  if (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid ? 16 : 0) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid ? 4 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int N> __device__ __forceinline__ void copy_wait() {  // all but the last N groups landed
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Four 8x4 matrices of 32-bit numbers; lane l gives the address of row l % 8 of matrix l / 8 and
// receives number (l / 4, l % 4) of each.
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(shared)) : "memory");
}

// Likewise of four 8x8 matrices of 16-bit numbers; the lane receives numbers (2 (l % 4), l / 4) and
// (2 (l % 4) + 1, l / 4) of each.
__device__ __forceinline__ void load_turned(unsigned (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(shared)) : "memory");
}

// d (16x8) += a (16x8) b (8x8) on the tensor cores: TF32 factors, float32 sums. With g = lane / 4
// and t = lane % 4 a lane holds a[g][t], a[g+8][t], a[g][t+4], a[g+8][t+4]; b[t][g], b[t+4][g];
// d[g][2t], d[g][2t+1], d[g+8][2t], d[g+8][2t+1].
__device__ __forceinline__ void multiply_tf32(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two float32 in bfloat16 (8 bits of exponent, 7 of mantissa), the nearest ones, of two the even.
__device__ __forceinline__ unsigned bf16(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// d (16x8) += a (16x16) b (16x8) likewise: bfloat16 factors, float32 sums. A lane holds pairs:
// a[g][2t, 2t+1], a[g+8][2t, 2t+1], a[g][2t+8, 2t+9], a[g+8][2t+8, 2t+9]; b[2t, 2t+1][g],
// b[2t+8, 2t+9][g]; d as above.
__device__ __forceinline__ void multiply_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// A float32 for the tensor cores, which read it as TF32 (8 bits of exponent, 10 of mantissa): they
// leave out its low 13 bits, and so would make numbers smaller by 2^-11 E[1 / m] = 3.5e-4 on average
// (mantissas m in [1, 2) with density 1 / (m ln 2)). Made larger by that much, 3 * 2^-13, before, they
// are right on average and off by at most 0.75 * 2^-10, at the price of one multiplication; a
// number that is one of TF32 stays so, as m * 3 * 2^-13 < 2^-10, NaN stays NaN and infinity infinity.
// The last numbers before 2^128 become infinite, and denormal ones may become zero.
__device__ __forceinline__ unsigned tf32(float v) { return __float_as_uint(v * (1 + 3 / 8192.f)); }

__device__ __forceinline__ float warp_sum(float v) {  // the same bits in every lane
  for (int lanes = 16; lanes; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}
#endif
