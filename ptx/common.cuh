// What all kernels share: element types, and sums in a fixed order.
//
// An element is stored in the dtype and computed with in float32. r(v) rounds to the dtype, to nearest even. Compiled
// with -fmad=false: a product and a sum are fused only where fmaf says so, as on the CPU.

typedef unsigned u32;
typedef unsigned long long u64;
typedef unsigned short u16;

// Threads of a block, in every kernel that does not say otherwise.
#define BLOCK 128

struct f32 {
    typedef float T;
    static constexpr u32 LANES = 4;  // in 16 bytes
    static __device__ float wide(float v) { return v; }
    static __device__ float narrow(float v) { return v; }
};

struct f16 {
    typedef u16 T;
    static constexpr u32 LANES = 8;
    static __device__ float wide(u16 v) {
        float out;
        asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v));
        return out;
    }
    static __device__ u16 narrow(float v) {
        u16 out;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(v));
        return out;
    }
};

struct bf16 {
    typedef u16 T;
    static constexpr u32 LANES = 8;
    static __device__ float wide(u16 v) { return __uint_as_float((u32)v << 16); }
    static __device__ u16 narrow(float v) {
        u16 out;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(v));
        return out;
    }
};

// r(v)
template <class E>
__device__ __forceinline__ float r(float v) {
    return E::wide(E::narrow(v));
}

// LANES elements from p on: `left` of them exist. `whole`: p lies at 16 bytes and all exist.
template <class E>
__device__ __forceinline__ void load(const typename E::T* p, bool whole, u32 left, float* out) {
    typename E::T v[E::LANES];
    if (whole) {
        *(uint4*)v = *(const uint4*)p;
#pragma unroll
        for (u32 i = 0; i < E::LANES; i++) out[i] = E::wide(v[i]);
    } else {
#pragma unroll
        for (u32 i = 0; i < E::LANES; i++) out[i] = i < left ? E::wide(p[i]) : 0.f;
    }
}

// r(v[i]) for LANES elements from p on; `whole` and `left` as for load.
template <class E>
__device__ __forceinline__ void store(typename E::T* p, bool whole, u32 left, const float* v) {
    typename E::T out[E::LANES];
#pragma unroll
    for (u32 i = 0; i < E::LANES; i++) out[i] = E::narrow(v[i]);
    if (whole) {
        *(uint4*)p = *(const uint4*)out;
    } else {
#pragma unroll
        for (u32 i = 0; i < E::LANES; i++)
            if (i < left) p[i] = out[i];
    }
}

// Calls f(i, whole, left) for this thread's pieces, of L of n elements each, `stride` pieces apart, AHEAD of them at a
// time: `left` elements exist from i on, all L of them at 16 bytes if `whole`.
template <u32 L, u32 AHEAD, class N, class F>
__device__ __forceinline__ void pieces(N n, N i, N stride, bool aligned, F f) {
    i *= L, stride *= L;
    if (AHEAD > 1) {
#pragma unroll 1
        for (; aligned && i + stride * (AHEAD - 1) + L <= n; i += stride * AHEAD)
#pragma unroll
            for (u32 j = 0; j < AHEAD; j++) f(i + j * stride, true, L);
    }
#pragma unroll 1
    for (; aligned && i + L <= n; i += stride) f(i, true, L);
#pragma unroll 1
    for (; i < n; i += stride) f(i, false, (u32)min(n - i, (N)L));
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

// v[0] + … + v[L - 1] as a tree.
template <u32 L>
__device__ __forceinline__ float lane_sum(float* v) {
#pragma unroll
    for (u32 half = L / 2; half; half /= 2)
#pragma unroll
        for (u32 l = 0; l < half; l++) v[l] += v[l + half];
    return v[0];
}

// The sum over a block of BLOCK threads, the same in each of them.
__device__ __forceinline__ float block_sum(float v) {
    __shared__ float part[BLOCK / 32];
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = part[0];
#pragma unroll
    for (int i = 1; i < BLOCK / 32; i++) sum += part[i];
    __syncthreads();
    return sum;
}

// A kernel for each element type: K(f32) K(f16) K(bf16).
#define EACH(K) K(f32) K(f16) K(bf16)
