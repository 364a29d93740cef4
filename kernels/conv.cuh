// A convolution of rank three (lower ranks have leading axes of one) with zero padding, as all
// kernels of this family see it. x (N, *S, C_in), w (*K, C_in, C_out), y (N, *P, C_out):
//
//   y[n, p, o] = sum over taps k and channels c of  x[n, p * stride + k * dilation - before, c] w[k, c, o]
//
// As a matrix product (implicit im2col): rows are the positions (n, p), columns are the filters
// o, and the sum runs over (k, c). Position p is written to point `start + p * step` of the output
// grid: the gradient in x is this same product on y, once per residue of the stride, each residue
// on its own comb of points (windows/kernels.py makes the combs). Many such PROBLEMS are one launch.
#ifndef TINYSEG_CONV
#define TINYSEG_CONV

struct Geometry {
  int batch, channels, filters;                 // N, C_in, C_out
  int origin, pitch, walk[3];                   // in w: the first tap, from a row and a tap to the next
  int size[3], positions[3], taps[3];           // S, P, K
  int stride[3], dilation[3], before[3];
  int grid[3], start[3], step[3];               // the output's grid, where it is written
};

#ifndef PROBLEMS
#define PROBLEMS 1
#endif
struct Problems { Geometry of[PROBLEMS]; };     // convolutions of one x that write to one y

struct Place { int n, d, h, w; };

// Row `i` of the matrix as sample and position.
__device__ __forceinline__ Place place(int i, const int (&positions)[3]) {
  Place p;
  p.w = i % positions[2]; i /= positions[2];
  p.h = i % positions[1]; i /= positions[1];
  p.d = i % positions[0]; p.n = i / positions[0];
  return p;
}

__device__ __forceinline__ int rows(const Geometry& g) {
  return g.batch * g.positions[0] * g.positions[1] * g.positions[2];
}
__device__ __forceinline__ int taps(const Geometry& g) { return g.taps[0] * g.taps[1] * g.taps[2]; }

// Where the first tap of position p stands on the input's grid; may lie in the padding.
__device__ __forceinline__ Place corner(const Place& p, const Geometry& g) {
  return {p.n, p.d * g.stride[0] - g.before[0], p.h * g.stride[1] - g.before[1],
          p.w * g.stride[2] - g.before[2]};
}

// Tap `k` (row-major) as a step from the corner.
__device__ __forceinline__ Place tap(int k, const Geometry& g) {
  Place p = place(k, g.taps);
  return {0, p.d * g.dilation[0], p.h * g.dilation[1], p.w * g.dilation[2]};
}

__device__ __forceinline__ bool inside(const Place& p, const Geometry& g) {
  return (unsigned)p.d < (unsigned)g.size[0] && (unsigned)p.h < (unsigned)g.size[1] &&
         (unsigned)p.w < (unsigned)g.size[2];
}

// One bit for each tap, at most 32 and row-major, that lies inside if the first stands at `at`.
__device__ __forceinline__ unsigned seen(const Place& at, const Geometry& g) {
  unsigned line = 0, mask = 0;
  for (int w = 0; w < g.taps[2]; ++w)
    line |= (unsigned)((unsigned)(at.w + w * g.dilation[2]) < (unsigned)g.size[2]) << w;
  for (int d = 0, first = 0; d < g.taps[0]; ++d)
    for (int h = 0; h < g.taps[1]; ++h, first += g.taps[2])
      if ((unsigned)(at.d + d * g.dilation[0]) < (unsigned)g.size[0] &&
          (unsigned)(at.h + h * g.dilation[1]) < (unsigned)g.size[1])
        mask |= line << first;
  return mask;
}

__device__ __forceinline__ Place operator+(const Place& a, const Place& b) {
  return {a.n + b.n, a.d + b.d, a.h + b.h, a.w + b.w};
}

// The number of a point on a grid; grids have fewer than 2^31 points, arrays may have more numbers.
__device__ __forceinline__ int point(const Place& p, const int (&size)[3]) {
  return ((p.n * size[0] + p.d) * size[1] + p.h) * size[2] + p.w;
}

// The point of the output's grid that position p is written to.
__device__ __forceinline__ int written(const Place& p, const Geometry& g) {
  return point({p.n, g.start[0] + p.d * g.step[0], g.start[1] + p.h * g.step[1],
                g.start[2] + p.w * g.step[2]}, g.grid);
}

// The first number of row `i` of the output.
__device__ __forceinline__ long long output(int i, const Geometry& g) {
  return (long long)written(place(i, g.positions), g) * g.filters;
}
#endif
