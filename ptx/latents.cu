// Latents on their support: compaction of what is not zero, and the products that need the support alone.
//
// The support is held twice. By row: row b has the entries starts[b] .. starts[b+1], columns ascending, with a value
// each. By column: column h has the places col_starts[h] .. col_starts[h+1], rows ascending, each with its row and its
// entry. Both are made from one pass over the dense latents, as bits, and every position is a count of bits: no
// atomics, no sorting, always the same order.
#include "common.cuh"

// Loads that a thread has in flight.
#define AHEAD 16

// row_bits[b, h/32] and col_bits[b/32, h]: bit h%32 or b%32 is set where dense[b, h] is not 0 (nan is not 0).
// One warp a tile of 32 × 32. Grid: columns / 32 / (BLOCK / 32), rows / 32.
template <class E>
__device__ void support_bits(u32 rows, u32 cols, const typename E::T* dense, u32* row_bits, u32* col_bits) {
    u32 tile = blockIdx.x * (BLOCK / 32) + threadIdx.x / 32, words = (cols + 31) / 32;
    u32 h = tile * 32 + threadIdx.x % 32, b0 = blockIdx.y * 32, column = 0;
    if (tile >= words) return;
#pragma unroll 1
    for (u32 i0 = 0; i0 < 32; i0 += AHEAD) {
        float v[AHEAD];
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) {
            const u32 b = b0 + i0 + i;
            v[i] = b < rows && h < cols ? E::wide(dense[(u64)b * cols + h]) : 0.f;
        }
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) {
            const u32 b = b0 + i0 + i, row = __ballot_sync(0xffffffffu, v[i] != 0.f);
            if (threadIdx.x % 32 == 0 && b < rows) row_bits[(u64)b * words + tile] = row;
            column |= (u32)(v[i] != 0.f) << (i0 + i);
        }
    }
    if (h < cols) col_bits[(u64)blockIdx.y * cols + h] = column;
}

// The sum over the threads before this one, and over all of them. `part` has BLOCK / 32 elements.
__device__ __forceinline__ u32 scan_block(u32 v, u32* part, u32* total) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = v;
#pragma unroll
    for (u32 o = 1; o < 32; o *= 2) {
        u32 below = __shfl_up_sync(0xffffffffu, sum, o);
        if (lane >= o) sum += below;
    }
    if (lane == 31) part[warp] = sum;
    __syncthreads();
    u32 before = 0, all = 0;
    for (u32 i = 0; i < BLOCK / 32; i++) {
        before += i < warp ? part[i] : 0;
        all += part[i];
    }
    __syncthreads();
    *total = all;
    return before + sum - v;
}

// counts[b] = the number of bits of row b. One block a row.
extern "C" __global__ void row_counts(u32 words, const u32* row_bits, u32* counts) {
    __shared__ u32 part[BLOCK / 32];
    u32 n = 0, total;
    for (u32 w = threadIdx.x; w < words; w += BLOCK) n += __popc(row_bits[(u64)blockIdx.x * words + w]);
    scan_block(n, part, &total);
    if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

// before[w, h] = the number of bits of column h above row 32·w; counts[h] = of all. One thread a column.
extern "C" __global__ void column_counts(u32 words, u32 cols, const u32* __restrict__ col_bits, u32* __restrict__ before,
                                         u32* __restrict__ counts) {
    u32 h = blockIdx.x * BLOCK + threadIdx.x, n = 0;
    if (h >= cols) return;
#pragma unroll 16
    for (u32 w = 0; w < words; w++) {
        before[(u64)w * cols + h] = n;
        n += __popc(col_bits[(u64)w * cols + h]);
    }
    counts[h] = n;
}

// starts[i] = Σ_{j < i} counts[j], for i = 0 ..= n. One block.
extern "C" __global__ void starts(u32 n, const u32* __restrict__ counts, u32* __restrict__ starts) {
    constexpr u32 EACH_THREAD = 16;
    __shared__ u32 part[BLOCK / 32];
    u32 base = 0, total;
#pragma unroll 1
    for (u32 i0 = 0; i0 < n; i0 += BLOCK * EACH_THREAD) {
        const u32 i = i0 + threadIdx.x * EACH_THREAD;
        u32 v[EACH_THREAD], sum = 0;
#pragma unroll
        for (u32 j = 0; j < EACH_THREAD; j++) v[j] = i + j < n ? counts[i + j] : 0;
#pragma unroll
        for (u32 j = 0; j < EACH_THREAD; j++) sum += v[j];
        u32 before = base + scan_block(sum, part, &total);
#pragma unroll
        for (u32 j = 0; j < EACH_THREAD; j++) {
            if (i + j < n) starts[i + j] = before;
            before += v[j];
        }
        base += total;
    }
    if (threadIdx.x == 0) starts[n] = base;
}

// Columns and values of the entries, and for each its row and number at its place by column. One block a row.
template <class E>
__device__ void support_fill(u32 cols, const typename E::T* dense, const u32* row_bits, const u32* col_bits,
                             const u32* before, const u32* starts, const u32* col_starts, u32* columns,
                             typename E::T* values, u32* col_rows, u32* col_entries) {
    __shared__ u32 part[BLOCK / 32];
    u32 b = blockIdx.x, words = (cols + 31) / 32, entry0 = starts[b], total;
    u64 tile = (u64)(b / 32) * cols;
    for (u32 w0 = 0; w0 < words; w0 += BLOCK) {
        u32 w = w0 + threadIdx.x, bits = w < words ? row_bits[(u64)b * words + w] : 0;
        u32 entry = entry0 + scan_block(__popc(bits), part, &total);
        entry0 += total;
        for (; bits; bits &= bits - 1, entry++) {
            u32 h = w * 32 + __ffs(bits) - 1;
            u32 above = before[tile + h] + __popc(col_bits[tile + h] & ((1u << b % 32) - 1));
            u32 place = col_starts[h] + above;
            columns[entry] = h;
            values[entry] = dense[(u64)b * cols + h];
            col_rows[place] = b;
            col_entries[place] = entry;
        }
    }
}

// out[b, columns[e]] = values[e] for the entries e of row b; the rest of out is zero already. One block a row.
template <class E>
__device__ void scatter(u32 cols, const u32* starts, const u32* columns, const typename E::T* values, typename E::T* out) {
    u32 b = blockIdx.x;
    for (u32 e = starts[b] + threadIdx.x; e < starts[b + 1]; e += BLOCK) out[(u64)b * cols + columns[e]] = values[e];
}

// s[k] = Σ_j value(j) · m[index[j], k] over j = starts[i] .. starts[i+1], in this order; value(j) = values[entries[j]],
// or values[j] where entries is null. Then out[i, k] = r(r(s) + bias[k]) if there is a bias, else r(s), added to out if
// `add`. Decode: i is a row of the batch, m is W_dec. Weight gradients: i is a latent, m is x or d_rec. Where m is not
// finite (*nonfinite), all its `rows` rows count, with value 0 for those not listed: 0 · nan is nan. One block an i and
// a tile of BLOCK · lanes columns. Grid: i first, so that the blocks that run together read the same tile of m, which
// stays in L2.
template <class E>
__device__ void gather(u32 rows, u32 cols, const u32* starts, const u32* index, const u32* entries,
                       const typename E::T* values, const typename E::T* m, const u32* nonfinite,
                       const typename E::T* bias, u32 add, typename E::T* out) {
    constexpr u32 L = E::LANES;
    __shared__ u32 at[BLOCK];
    __shared__ float by[BLOCK];
    u32 k = (blockIdx.y * BLOCK + threadIdx.x) * L, start = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    u32 left = k < cols ? cols - k : 0;
    bool whole = cols % L == 0 && left;
    float sum[L] = {}, v[L];
    if (*nonfinite) {
        u32 j = start;
        for (u32 i = 0; i < rows; i++) {
            bool listed = j < end && index[j] == i;
            float value = listed ? E::wide(values[entries ? entries[j] : j]) : 0.f;
            j += listed;
            load<E>(m + (u64)i * cols + k, whole, left, v);
#pragma unroll
            for (u32 l = 0; l < L; l++) sum[l] = fmaf(value, v[l], sum[l]);
        }
    } else {
        for (u32 j0 = start; j0 < end; j0 += BLOCK) {
            u32 j = j0 + threadIdx.x, n = min(end - j0, BLOCK);
            if (j < end) {
                at[threadIdx.x] = index[j];
                by[threadIdx.x] = E::wide(values[entries ? entries[j] : j]);
            }
            __syncthreads();
            if (left) {
#pragma unroll 4
                for (u32 i = 0; i < n; i++) {
                    load<E>(m + (u64)at[i] * cols + k, whole, left, v);
#pragma unroll
                    for (u32 l = 0; l < L; l++) sum[l] = fmaf(by[i], v[l], sum[l]);
                }
            }
            __syncthreads();
        }
    }
    typename E::T* to = out + (u64)blockIdx.x * cols + k;
    if (bias || add) {
        load<E>(bias ? bias + k : to, whole, left, v);
#pragma unroll
        for (u32 l = 0; l < L; l++) sum[l] = r<E>(sum[l]) + v[l];
    }
    store<E>(to, whole, left, sum);
}

// parts[t, e] = Σ_k d[b, k] · w[columns[e], k] over the WIDTH columns of tile t, for the entries e of row b. One block a
// row and a tile, one warp an entry at a time. Grid: rows first, so that the blocks that run together read the same tile
// of w, which stays in L2.
template <class E>
__device__ void latents_grad_parts(u32 cols, u32 entries, const u32* starts, const u32* columns, const typename E::T* d,
                                   const typename E::T* w, float* parts) {
    constexpr u32 L = E::LANES, WIDTH = BLOCK * L, PIECES = WIDTH / (32 * L);
    const u32 lane = threadIdx.x % 32, end = starts[blockIdx.x + 1], k0 = blockIdx.y * WIDTH + lane * L;
    const bool aligned = cols % L == 0;
    float x[PIECES][L];
#pragma unroll
    for (u32 p = 0; p < PIECES; p++) {
        const u32 k = k0 + p * 32 * L, left = k < cols ? cols - k : 0;
        load<E>(d + (u64)blockIdx.x * cols + k, aligned && left, left, x[p]);
    }
    parts += (u64)blockIdx.y * entries;
    for (u32 e = starts[blockIdx.x] + threadIdx.x / 32; e < end; e += BLOCK / 32) {
        const typename E::T* row = w + (u64)columns[e] * cols;
        float sum[L] = {}, y[L];
#pragma unroll
        for (u32 p = 0; p < PIECES; p++) {
            const u32 k = k0 + p * 32 * L, left = k < cols ? cols - k : 0;
            load<E>(row + k, aligned && left, left, y);
#pragma unroll
            for (u32 l = 0; l < L; l++) sum[l] = fmaf(x[p][l], y[l], sum[l]);
        }
        const float s = warp_sum(lane_sum<L>(sum));
        if (lane == 0) parts[e] = s;
    }
}

// out[e] = r(Σ_t parts[t, e]) for the entries e where values[e] > 0 or nan, else 0; added to out if `add`. One thread an
// entry.
template <class E>
__device__ void latents_grad_total(u32 tiles, u32 entries, const float* __restrict__ parts,
                                   const typename E::T* __restrict__ values, u32 add, typename E::T* __restrict__ out) {
    const u32 e = blockIdx.x * BLOCK + threadIdx.x;
    if (e >= entries) return;
    float s = 0.f;
    for (u32 t = 0; t < tiles; t++) s += parts[(u64)t * entries + e];
    const bool stopped = E::wide(values[e]) <= 0.f;
    out[e] = E::narrow(stopped ? 0.f : add ? E::wide(out[e]) + r<E>(s) : s);
}

// out[h] = r(Σ_b v(latents[b, h])) by the places of column h; v(a) = r(g · a) if `scaled`, else a. One warp a column.
template <class E>
__device__ void support_column_sums(u32 cols, const u32* col_starts, const u32* col_entries, const typename E::T* values,
                                    u32 scaled, float g, typename E::T* out) {
    u32 h = blockIdx.x * (BLOCK / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (h >= cols) return;
    float sum = 0.f;
    for (u32 j = col_starts[h] + lane; j < col_starts[h + 1]; j += 32) {
        float v = E::wide(values[col_entries[j]]);
        sum += scaled ? r<E>(g * v) : v;
    }
    sum = warp_sum(sum);
    if (lane == 0) out[h] = E::narrow(sum);
}

// The kernels below take latents in either form: where `starts` is null they are dense, [rows, cols].

// out[b] = r(Σ_h r(acts[b, h] · t[h])). Where t is not finite every latent counts. One block a row.
template <class E>
__device__ void weighted_sums(u32 cols, const u32* starts, const u32* columns, const typename E::T* values,
                              const typename E::T* t, const u32* nonfinite, float* out) {
    u32 b = blockIdx.x;
    float sum = 0.f;
    if (starts) {
        for (u32 e = starts[b] + threadIdx.x; e < starts[b + 1]; e += BLOCK)
            sum += r<E>(E::wide(values[e]) * E::wide(t[columns[e]]));
        if (*nonfinite)
            for (u32 h = threadIdx.x; h < cols; h += BLOCK) {
                u32 low = starts[b], high = starts[b + 1];
                while (low < high) {
                    u32 middle = low + (high - low) / 2;
                    if (columns[middle] < h) low = middle + 1; else high = middle;
                }
                if (low == starts[b + 1] || columns[low] != h) sum += 0.f * E::wide(t[h]);
            }
    } else {
        for (u32 h = threadIdx.x; h < cols; h += BLOCK) sum += r<E>(E::wide(values[(u64)b * cols + h]) * E::wide(t[h]));
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[b] = r<E>(sum);
}

// out[b, h] = r(g · t[h]) where acts[b, h] > 0 or nan, else 0. One block a row.
template <class E>
__device__ void weighted_sums_grad(u32 cols, const u32* starts, const u32* columns, const typename E::T* values,
                                   const typename E::T* t, float g, typename E::T* out) {
    u64 start = starts ? starts[blockIdx.x] : (u64)blockIdx.x * cols;
    u64 end = starts ? starts[blockIdx.x + 1] : start + cols;
    for (u64 e = start + threadIdx.x; e < end; e += BLOCK) {
        u32 h = starts ? columns[e] : (u32)(e - start);
        out[e] = E::narrow(E::wide(values[e]) <= 0.f ? 0.f : g * E::wide(t[h]));
    }
}

// out[b] = the number of latents above 0. One block a row.
template <class E>
__device__ void active_counts(u32 cols, const u32* starts, const typename E::T* values, float* out) {
    u64 start = starts ? starts[blockIdx.x] : (u64)blockIdx.x * cols;
    u64 end = starts ? starts[blockIdx.x + 1] : start + cols;
    __shared__ u32 part[BLOCK / 32];
    u32 n = 0, total;
    for (u64 e = start + threadIdx.x; e < end; e += BLOCK) n += E::wide(values[e]) > 0.f;
    scan_block(n, part, &total);
    if (threadIdx.x == 0) out[blockIdx.x] = (float)total;
}

#define KERNELS(E)                                                                                                     \
    extern "C" __global__ void support_bits_##E(u32 rows, u32 cols, const E::T* dense, u32* row_bits, u32* col_bits) { \
        support_bits<E>(rows, cols, dense, row_bits, col_bits);                                                        \
    }                                                                                                                  \
    extern "C" __global__ void support_fill_##E(u32 cols, const E::T* dense, const u32* row_bits, const u32* col_bits, \
                                                const u32* before, const u32* starts, const u32* col_starts,           \
                                                u32* columns, E::T* values, u32* col_rows, u32* col_entries) {         \
        support_fill<E>(cols, dense, row_bits, col_bits, before, starts, col_starts, columns, values, col_rows,        \
                        col_entries);                                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void scatter_##E(u32 cols, const u32* starts, const u32* columns, const E::T* values,        \
                                           E::T* out) {                                                                \
        scatter<E>(cols, starts, columns, values, out);                                                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(BLOCK, 8)                                                             \
        gather_##E(u32 rows, u32 cols, const u32* starts, const u32* index, const u32* entries,                        \
                   const E::T* __restrict__ values, const E::T* __restrict__ m, const u32* nonfinite,                  \
                   const E::T* __restrict__ bias, u32 add, E::T* __restrict__ out) {                                   \
        gather<E>(rows, cols, starts, index, entries, values, m, nonfinite, bias, add, out);                           \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(BLOCK, 4)                                                             \
        latents_grad_parts_##E(u32 cols, u32 entries, const u32* __restrict__ starts, const u32* __restrict__ columns, \
                               const E::T* __restrict__ d, const E::T* __restrict__ w, float* __restrict__ parts) {    \
        latents_grad_parts<E>(cols, entries, starts, columns, d, w, parts);                                            \
    }                                                                                                                  \
    extern "C" __global__ void latents_grad_total_##E(u32 tiles, u32 entries, const float* parts, const E::T* values,  \
                                                      u32 add, E::T* out) {                                            \
        latents_grad_total<E>(tiles, entries, parts, values, add, out);                                                \
    }                                                                                                                  \
    extern "C" __global__ void support_column_sums_##E(u32 cols, const u32* col_starts, const u32* col_entries,        \
                                                       const E::T* values, u32 scaled, float g, E::T* out) {           \
        support_column_sums<E>(cols, col_starts, col_entries, values, scaled, g, out);                                 \
    }                                                                                                                  \
    extern "C" __global__ void weighted_sums_##E(u32 cols, const u32* starts, const u32* columns, const E::T* values,  \
                                                 const E::T* t, const u32* nonfinite, float* out) {                    \
        weighted_sums<E>(cols, starts, columns, values, t, nonfinite, out);                                            \
    }                                                                                                                  \
    extern "C" __global__ void weighted_sums_grad_##E(u32 cols, const u32* starts, const u32* columns,                 \
                                                      const E::T* values, const E::T* t, float g, E::T* out) {         \
        weighted_sums_grad<E>(cols, starts, columns, values, t, g, out);                                               \
    }                                                                                                                  \
    extern "C" __global__ void active_counts_##E(u32 cols, const u32* starts, const E::T* values, float* out) {        \
        active_counts<E>(cols, starts, values, out);                                                                   \
    }
EACH(KERNELS)
