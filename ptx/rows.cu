// Conversions, sums over rows and columns, norms, losses, Adam. Formulas are those of `Backend` in src/backend/mod.rs.
#include "common.cuh"

// The number of this thread in a grid of one dimension.
__device__ __forceinline__ u64 element() { return (u64)blockIdx.x * BLOCK + threadIdx.x; }
// How many threads such a grid has.
__device__ __forceinline__ u64 elements() { return (u64)gridDim.x * BLOCK; }

// *flag |= 1 if an element is not finite. Grid of any size. An or has no order: the result repeats.
template <class E>
__device__ void nonfinite(u64 n, const typename E::T* m, u32* flag) {
    constexpr u32 L = E::LANES;
    u32 bad = 0;
    pieces<L, 4>(n, element(), elements(), true, [&](u64 i, bool whole, u32 left) {
        float v[L];
        load<E>(m + i, whole, left, v);
#pragma unroll
        for (u32 l = 0; l < L; l++) bad |= !(fabsf(v[l]) < __int_as_float(0x7f800000));
    });
    if (bad) atomicOr(flag, 1u);
}

// parts[c, k] = Σ_b v(m[b, k]) over the rows b of chunk c, `per` rows a chunk; v(a) = r(g · a) if `scaled`, else a.
// Grid: columns / BLOCK, chunks.
template <class E>
__device__ void column_parts(u32 rows, u32 cols, u32 per, const typename E::T* m, u32 scaled, float g, float* parts) {
    u32 k = blockIdx.x * BLOCK + threadIdx.x;
    if (k >= cols) return;
    u32 end = min(rows, (blockIdx.y + 1) * per);
    float sum = 0.f;
    for (u32 b = blockIdx.y * per; b < end; b++) {
        float v = E::wide(m[(u64)b * cols + k]);
        sum += scaled ? r<E>(g * v) : v;
    }
    parts[(u64)blockIdx.y * cols + k] = sum;
}

// out[k] = r((Σ_c parts[c, k]) / divisor). One thread a column.
template <class E>
__device__ void column_total(u32 chunks, u32 cols, const float* parts, float divisor, typename E::T* out) {
    u32 k = blockIdx.x * BLOCK + threadIdx.x;
    if (k >= cols) return;
    float sum = 0.f;
    for (u32 c = 0; c < chunks; c++) sum += parts[(u64)c * cols + k];
    out[k] = E::narrow(sum / divisor);
}

// out[i] = r(Σ_j m[i, j]). One block a row.
template <class E>
__device__ void row_sums(u32 cols, const typename E::T* m, typename E::T* out) {
    const typename E::T* row = m + (u64)blockIdx.x * cols;
    float sum = 0.f;
    for (u32 j = threadIdx.x; j < cols; j += BLOCK) sum += E::wide(row[j]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = E::narrow(sum);
}

// out[b] = Σ (a - b)² over the columns from..to, each step rounded if `rounded`; b has one row if `one_row`. One block
// a row.
template <class E>
__device__ void squared_distances(u32 cols, u32 from, u32 to, const typename E::T* a, const typename E::T* b, u32 one_row,
                                  u32 rounded, float* out) {
    a += (u64)blockIdx.x * cols;
    if (!one_row) b += (u64)blockIdx.x * cols;
    float sum = 0.f;
    for (u32 k = from + threadIdx.x; k < to; k += BLOCK) {
        float d = E::wide(a[k]) - E::wide(b[k]);
        if (rounded) d = r<E>(d);
        float square = d * d;
        sum += rounded ? r<E>(square) : square;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = rounded ? r<E>(sum) : sum;
}

// out = r(g · (2 · (a - b))). One thread 16 bytes.
template <class E>
__device__ void squared_distances_grad(u64 n, const typename E::T* __restrict__ a, const typename E::T* __restrict__ b,
                                       float g, typename E::T* __restrict__ out) {
    constexpr u32 L = E::LANES;
    pieces<L, 1>(n, element(), elements(), true, [&](u64 i, bool whole, u32 left) {
        float x[L], y[L];
        load<E>(a + i, whole, left, x);
        load<E>(b + i, whole, left, y);
#pragma unroll
        for (u32 l = 0; l < L; l++) x[l] = g * (2.f * (x[l] - y[l]));
        store<E>(out + i, whole, left, x);
    });
}

// out[h, m] = r(√(Σ_d w[h, m, d]²)): `d` elements a group. One block a group.
template <class E>
__device__ void group_norms(u32 d, const typename E::T* w, typename E::T* out) {
    const typename E::T* group = w + (u64)blockIdx.x * d;
    float sum = 0.f;
    for (u32 i = threadIdx.x; i < d; i += BLOCK) {
        float v = E::wide(group[i]);
        sum = fmaf(v, v, sum);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = E::narrow(sqrtf(sum));
}

// out = r(r(w[h, m, d] / n[h, m]) · d_t[h]), 0 where n is 0, added to out if `add`. One block a group, `d` elements
// each.
template <class E>
__device__ void group_norms_grad(u32 d, u32 groups, const typename E::T* __restrict__ w, const typename E::T* norms,
                                 const typename E::T* d_t, u32 add, typename E::T* __restrict__ out) {
    constexpr u32 L = E::LANES;
    const float norm = E::wide(norms[blockIdx.x]), g = E::wide(d_t[blockIdx.x / groups]);
    w += (u64)blockIdx.x * d;
    out += (u64)blockIdx.x * d;
    pieces<L, 4>(d, (u32)threadIdx.x, (u32)BLOCK, d % L == 0, [&](u32 i, bool whole, u32 left) {
        float v[L], before[L] = {};
        load<E>(w + i, whole, left, v);
        if (add) load<E>(out + i, whole, left, before);
#pragma unroll
        for (u32 l = 0; l < L; l++) {
            v[l] = (norm == 0.f ? 0.f : r<E>(v[l] / norm)) * g;
            if (add) v[l] = before[l] + r<E>(v[l]);
        }
        store<E>(out + i, whole, left, v);
    });
}

// parts[i] = Σ v² over the elements that block i meets. The grid's size is fixed, so the order of terms is.
template <class E>
__device__ void norm_parts(u64 n, const typename E::T* m, float* parts) {
    constexpr u32 L = E::LANES;
    float sum[L] = {};
    pieces<L, 4>(n, element(), elements(), true, [&](u64 i, bool whole, u32 left) {
        float v[L];
        load<E>(m + i, whole, left, v);
#pragma unroll
        for (u32 l = 0; l < L; l++) sum[l] = fmaf(v[l], v[l], sum[l]);
    });
    const float total = block_sum(lane_sum<L>(sum));
    if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

// a · b + c: fused in float32, where PyTorch and the CPU backend fuse the moments' sums, else with the product rounded.
template <class E>
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
    return sizeof(typename E::T) == 4 ? fmaf(a, b, c) : a * b + c;
}

// One step of Adam, as `Backend::adam` states it. One thread 16 bytes.
template <class E>
__device__ void adam(u64 n, typename E::T* __restrict__ p, const typename E::T* __restrict__ g,
                     typename E::T* __restrict__ m, typename E::T* __restrict__ v, float clip, float one_minus_beta1,
                     float beta2, float one_minus_beta2, float step_size, float bias_correction2_sqrt, float eps) {
    constexpr u32 L = E::LANES;
    // A mask that the compiler cannot see through: of a condition it makes two loops.
    const bool near_g = one_minus_beta1 >= 0.5f;
    const float weight = near_g ? one_minus_beta1 - 1.0f : one_minus_beta1;
    u32 of_g;
    asm("mov.b32 %0, %1;" : "=r"(of_g) : "r"(near_g ? ~0u : 0u));
    pieces<L, 1>(n, element(), elements(), true, [&](u64 i, bool whole, u32 left) {
        float ps[L], gs[L], ms[L], vs[L];
        load<E>(p + i, whole, left, ps);
        load<E>(g + i, whole, left, gs);
        load<E>(m + i, whole, left, ms);
        load<E>(v + i, whole, left, vs);
#pragma unroll
        for (u32 l = 0; l < L; l++) {
            const float gi = r<E>(clip * gs[l]);
            const float from = __uint_as_float(__float_as_uint(gi) & of_g | __float_as_uint(ms[l]) & ~of_g);
            ms[l] = r<E>(multiply_add<E>(weight, gi - ms[l], from));
            vs[l] = r<E>(multiply_add<E>(one_minus_beta2 * gi, gi, r<E>(beta2 * vs[l])));
            const float denom = r<E>(r<E>(r<E>(sqrtf(vs[l])) / bias_correction2_sqrt) + eps);
            ps[l] = ps[l] - step_size * ms[l] / denom;
        }
        store<E>(p + i, whole, left, ps);
        store<E>(m + i, whole, left, ms);
        store<E>(v + i, whole, left, vs);
    });
}

#define KERNELS(E)                                                                                                     \
    extern "C" __global__ void nonfinite_##E(u64 n, const E::T* m, u32* flag) { nonfinite<E>(n, m, flag); }            \
    extern "C" __global__ void column_parts_##E(u32 rows, u32 cols, u32 per, const E::T* m, u32 scaled, float g,       \
                                                float* parts) {                                                        \
        column_parts<E>(rows, cols, per, m, scaled, g, parts);                                                         \
    }                                                                                                                  \
    extern "C" __global__ void column_total_##E(u32 chunks, u32 cols, const float* parts, float divisor, E::T* out) {  \
        column_total<E>(chunks, cols, parts, divisor, out);                                                            \
    }                                                                                                                  \
    extern "C" __global__ void row_sums_##E(u32 cols, const E::T* m, E::T* out) { row_sums<E>(cols, m, out); }         \
    extern "C" __global__ void squared_distances_##E(u32 cols, u32 from, u32 to, const E::T* a, const E::T* b,         \
                                                     u32 one_row, u32 rounded, float* out) {                           \
        squared_distances<E>(cols, from, to, a, b, one_row, rounded, out);                                             \
    }                                                                                                                  \
    extern "C" __global__ void squared_distances_grad_##E(u64 n, const E::T* a, const E::T* b, float g, E::T* out) {   \
        squared_distances_grad<E>(n, a, b, g, out);                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void group_norms_##E(u32 d, const E::T* w, E::T* out) { group_norms<E>(d, w, out); }         \
    extern "C" __global__ void group_norms_grad_##E(u32 d, u32 groups, const E::T* w, const E::T* norms,               \
                                                    const E::T* d_t, u32 add, E::T* out) {                             \
        group_norms_grad<E>(d, groups, w, norms, d_t, add, out);                                                       \
    }                                                                                                                  \
    extern "C" __global__ void norm_parts_##E(u64 n, const E::T* m, float* parts) { norm_parts<E>(n, m, parts); }      \
    extern "C" __global__ void adam_##E(u64 n, E::T* p, const E::T* g, E::T* m, E::T* v, float clip,                   \
                                        float one_minus_beta1, float beta2, float one_minus_beta2, float step_size,    \
                                        float bias_correction2_sqrt, float eps) {                                      \
        adam<E>(n, p, g, m, v, clip, one_minus_beta1, beta2, one_minus_beta2, step_size, bias_correction2_sqrt, eps);  \
    }
EACH(KERNELS)
