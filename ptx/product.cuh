// What the products of product.cu and hopper.cu share: what is done with a sum before it is stored.
#include "common.cuh"

__device__ __forceinline__ u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Which tile this block makes, of M and N. Blocks run in the order of their numbers, so those that run together lie along the
// side with fewer tiles, whose operand stays in L2 while the other one is read once.
__device__ __forceinline__ uint2 block_tile() {
    const u32 number = blockIdx.y * gridDim.x + blockIdx.x;
    return gridDim.x <= gridDim.y ? make_uint2(blockIdx.x, blockIdx.y)
                                  : make_uint2(number / gridDim.y, number % gridDim.y);
}

// What is done with sums that lie in shared memory: rows of WIDTH, STRIDE apart, of which each becomes value(m, n,
// sum). A thread takes 16 bytes of the result at a time, and so waits once for all that it reads; a loop over shared
// memory keeps this code small.
template <class E>
struct Finish {
    typedef typename E::T T;
    static constexpr u32 L = E::LANES;
    u32 M, N;
    const T* bias;  // c = r(r(sum) + bias[n])
    const T* mask;  // c = 0 where mask[m, n] <= 0
    u32 relu;       // c = 0 where c <= 0; nan stays
    u32 add;        // c = r(c + r(sum))
    T* c;

    // The sums v of L columns of row m from n on, of which N - n exist.
    __device__ __forceinline__ void store(u32 m, u32 n, float* v) const {
        const u64 at = (u64)m * N + n;
        const u32 left = N - n;
        const bool whole = N % L == 0;
        float x[L];
        if (bias) {
            load<E>(bias + n, whole, left, x);
#pragma unroll
            for (u32 i = 0; i < L; i++) v[i] = r<E>(v[i]) + x[i];
        }
        if (add) {
            load<E>(c + at, whole, left, x);
#pragma unroll
            for (u32 i = 0; i < L; i++) v[i] = x[i] + r<E>(v[i]);
        }
        if (relu) {
#pragma unroll
            for (u32 i = 0; i < L; i++)
                if (r<E>(v[i]) <= 0.f) v[i] = 0.f;
        }
        if (mask) {
            load<E>(mask + at, whole, left, x);
#pragma unroll
            for (u32 i = 0; i < L; i++)
                if (x[i] <= 0.f) v[i] = 0.f;
        }
        ::store<E>(c + at, whole, left, v);
    }

    // `rows` rows that begin at [m0, n0], by COUNT threads of which this is number `thread`; `scale(m, n, sum)` comes first.
    template <u32 WIDTH, u32 STRIDE, u32 COUNT, class F>
    __device__ __forceinline__ void tile(const float* sums, u32 rows, u32 m0, u32 n0, u32 thread, F scale) const {
        static_assert(WIDTH % L == 0 && STRIDE % 4 == 0, "columns in pieces of 16 bytes");
#pragma unroll 1
        for (u32 i = thread; i < rows * (WIDTH / L); i += COUNT) {
            const u32 row = i / (WIDTH / L), col = i % (WIDTH / L) * L, m = m0 + row, n = n0 + col;
            if (m >= M || n >= N) continue;
            float v[L];
#pragma unroll
            for (u32 l = 0; l < L; l += 4) *(float4*)&v[l] = *(const float4*)&sums[row * STRIDE + col + l];
#pragma unroll
            for (u32 l = 0; l < L; l++) v[l] = n + l < N ? scale(m, n + l, v[l]) : 0.f;
            store(m, n, v);
        }
    }
};

// The scale of a split product's sum; see `split` in product.cu.
__device__ __forceinline__ float power_of_2(int e) { return __int_as_float((e + 127) << 23); }

__device__ __forceinline__ float unscale(float sum, int a_shift, int b_shift) {
    const int e = -(a_shift + b_shift);  // within ±252: two steps
    return sum * power_of_2(e / 2) * power_of_2(e - e / 2);
}
