// What the products of product.cu and hopper.cu share: what is done with a sum before it is stored.
#include "common.cuh"

__device__ __forceinline__ u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// What is done with sums that lie in shared memory: rows of WIDTH, STRIDE apart, of which each becomes value(m, n,
// sum). A loop over shared memory keeps this code small and the stores of a warp in one row.
template <class E>
struct Finish {
    typedef typename E::T T;
    u32 M, N;
    const T* bias;  // c = r(r(sum) + bias[n])
    const T* mask;  // c = 0 where mask[m, n] <= 0
    u32 relu;       // c = 0 where c <= 0; nan stays
    u32 add;        // c = r(c + r(sum))
    T* c;

    __device__ __forceinline__ void store(u32 m, u32 n, float sum) const {
        const u64 at = (u64)m * N + n;
        float v = sum;
        if (bias) v = r<E>(v) + E::wide(bias[n]);
        if (add) v = E::wide(c[at]) + r<E>(v);
        if (relu && r<E>(v) <= 0.f) v = 0.f;
        if (mask && E::wide(mask[at]) <= 0.f) v = 0.f;
        c[at] = E::narrow(v);
    }

    // `rows` rows that begin at [m0, n0], by COUNT threads of which this is number `thread`; `scale(m, n, sum)` comes first.
    template <u32 WIDTH, u32 STRIDE, u32 COUNT, class F>
    __device__ __forceinline__ void tile(const float* sums, u32 rows, u32 m0, u32 n0, u32 thread, F scale) const {
#pragma unroll 1
        for (u32 i = thread; i < rows * WIDTH; i += COUNT) {
            const u32 m = m0 + i / WIDTH, n = n0 + i % WIDTH;
            if (m < M && n < N) store(m, n, scale(m, n, sums[i / WIDTH * STRIDE + i % WIDTH]));
        }
    }
};

// The scale of a split product's sum; see `split` in product.cu.
__device__ __forceinline__ float power_of_2(int e) { return __int_as_float((e + 127) << 23); }

__device__ __forceinline__ float unscale(float sum, int a_shift, int b_shift) {
    const int e = -(a_shift + b_shift);  // within ±252: two steps
    return sum * power_of_2(e / 2) * power_of_2(e - e / 2);
}
