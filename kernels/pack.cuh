// VECTOR neighbouring channels of one point, moved with one instruction: all that a thread of the
// kernels bound by memory holds of a row at a time.
#ifndef TINYSEG_PACK
#define TINYSEG_PACK

#ifndef VECTOR
#define VECTOR 4     // channels of a thread, a divisor of C: 4 or 1
#endif
#ifndef THREADS
#define THREADS 256  // of a block, a power of two: along the channels, and along rows or points
#endif

struct __align__(4 * VECTOR) Pack { float of[VECTOR]; };

__device__ __forceinline__ Pack load(const float* p) { return *(const Pack*)p; }
__device__ __forceinline__ void store(float* p, const Pack& v) { *(Pack*)p = v; }

#define EACH_CHANNEL _Pragma("unroll") for (int i = 0; i < VECTOR; ++i)
#endif
