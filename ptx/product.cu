// Dense products: float32 by fused multiply-adds, half precision and split float32 by tensor cores (mma.sync).
//
// c[m, n] = Σ_k a(m, k) · b(n, k). Layouts: `nt`, a [M, K] and b [N, K] (encode, latents gradient); `nn`, a [M, K] and
// b [K, N] (decode); `tn`, a [K, M] and b [K, N] (weight gradients). All row-major and dense. What a block stores is
// finished as Finish in product.cuh says. A block makes a tile of 128 × 128. Grid: tiles of M, tiles of N.
#include "product.cuh"

#define THREADS 256  // of a block that makes a float32 product
#define TILE 128

// ---- float32 ---------------------------------------------------------------------------------------------------------

#define DEPTH 8

// Four elements of an operand's tile from global memory. K_MINOR: [rows, K], four along k; otherwise [K, rows], four
// along the row.
template <bool K_MINOR>
__device__ __forceinline__ void fetch(const float* p, u32 rows, u32 K, u32 row, u32 k, float* v) {
    const u32 minor = K_MINOR ? K : rows, major = K_MINOR ? row : k, at = K_MINOR ? k : row;
    const bool there = major < (K_MINOR ? rows : K);
    const float* from = p + (u64)major * minor + at;
    if (there && minor % 4 == 0 && at < minor) {
        *(float4*)v = *(const float4*)from;
    } else {
#pragma unroll
        for (u32 i = 0; i < 4; i++) v[i] = there && at + i < minor ? from[i] : 0.f;
    }
}

// `only_if`: run only if this is not 0 (null: always).
template <bool A_K, bool B_K>
__device__ __forceinline__ void product_ffma(u32 M, u32 N, u32 K, const float* a, const float* b, const u32* only_if,
                                             Finish<f32> finish) {
    __shared__ __align__(16) float memory[64 * TILE];  // the tiles, later 64 rows of sums
    typedef float Tiles[2][DEPTH][TILE + 4];           // double buffer
    static_assert(2 * sizeof(Tiles) <= sizeof(memory), "a's and b's tiles");
    Tiles &as = ((Tiles*)memory)[0], &bs = ((Tiles*)memory)[1];
    if (only_if && !*only_if) return;
    const u32 t = threadIdx.x, tx = t % 16, ty = t / 16, m0 = block_tile().x * TILE, n0 = block_tile().y * TILE;
    // k-minor: 128 rows × 2 fours; otherwise 8 k × 32 fours.
    const u32 ar = A_K ? t / 2 : t % 32 * 4, ak = A_K ? t % 2 * 4 : t / 32;
    const u32 br = B_K ? t / 2 : t % 32 * 4, bk = B_K ? t % 2 * 4 : t / 32;
    float sum[8][8] = {};
    float a4[4], b4[4];
    auto load = [&](u32 k0) {
        fetch<A_K>(a, M, K, m0 + ar, k0 + ak, a4);
        fetch<B_K>(b, N, K, n0 + br, k0 + bk, b4);
    };
    auto put = [&](u32 s) {
        if (A_K) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) as[s][ak + i][ar] = a4[i];
        } else {
            *(float4*)&as[s][ak][ar] = *(float4*)a4;
        }
        if (B_K) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) bs[s][bk + i][br] = b4[i];
        } else {
            *(float4*)&bs[s][bk][br] = *(float4*)b4;
        }
    };
    load(0);
    put(0);
    __syncthreads();
    u32 s = 0;
    for (u32 k0 = 0; k0 < K; k0 += DEPTH, s ^= 1) {
        if (k0 + DEPTH < K) load(k0 + DEPTH);
#pragma unroll
        for (u32 k = 0; k < DEPTH; k++) {
            float x[8], y[8];
            *(float4*)&x[0] = *(const float4*)&as[s][k][ty * 4];
            *(float4*)&x[4] = *(const float4*)&as[s][k][64 + ty * 4];
            *(float4*)&y[0] = *(const float4*)&bs[s][k][tx * 4];
            *(float4*)&y[4] = *(const float4*)&bs[s][k][64 + tx * 4];
#pragma unroll
            for (u32 i = 0; i < 8; i++)
#pragma unroll
                for (u32 j = 0; j < 8; j++) sum[i][j] = fmaf(x[i], y[j], sum[i][j]);
        }
        if (k0 + DEPTH < K) put(s ^ 1);
        __syncthreads();
    }
    // Rows 0..64 are those of sum[0..4], 64..128 those of sum[4..8].
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
#pragma unroll
            for (u32 j = 0; j < 2; j++)
                *(float4*)&memory[(ty * 4 + i) * TILE + j * 64 + tx * 4] = *(float4*)&sum[half * 4 + i][j * 4];
        __syncthreads();
        finish.template tile<TILE, TILE, THREADS>(memory, 64, m0 + half * 64, n0, t, [](u32, u32, float v) { return v; });
        __syncthreads();
    }
}

// ---- tensor cores ----------------------------------------------------------------------------------------------------

#define KTILE 32

// 16 bytes of which `n` are copied and the others are 0.
__device__ __forceinline__ void copy16(u32 to, const void* from, u32 n) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(n) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void ldmatrix(u32* v, u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void ldmatrix_t(u32* v, u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
}

__device__ __forceinline__ void mma(f16, float* c, const u32* a, const u32* b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(bf16, float* c, const u32* a, const u32* b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// An operand's tile in shared memory: 512 chunks of 8 elements. K-minor: 128 rows of 4 chunks; otherwise 32 k of 16
// chunks along the row. Chunks are permuted so that the eight addresses of a matrix that ldmatrix reads, and the rows
// that copies write, lie in different banks.
template <bool K_MINOR>
__device__ __forceinline__ u32 place(u32 major, u32 chunk) {
    return K_MINOR ? major * 4 + (chunk ^ (major / 2 & 3)) : major * 16 + (chunk ^ (major & 7));
}

// Keeps a value in a register, where the compiler would compute it again in each turn of a loop.
__device__ __forceinline__ void keep(u32& v) { asm volatile("" : "+r"(v)); }

// Copies an operand's tiles of rows from row0 on, one after the other along k, by COUNT threads.
template <bool K_MINOR, u32 COUNT>
struct Source {
    static constexpr u32 CHUNKS = K_MINOR ? 4 : 16, LINES = COUNT / CHUNKS;  // of a line; lines that are copied at a time
    static_assert(LINES % 8 == 0, "chunks of all lines that a thread copies are permuted alike");
    u32 minor, majors;  // elements of a line in memory, and how many lines there are
    u32 major, at, to;  // this thread's first line, its first element there, and where that goes in the tile
    u64 from;           // major · minor + at

    __device__ __forceinline__ Source(u32 rows, u32 K, u32 row0) {
        minor = K_MINOR ? K : rows, majors = K_MINOR ? rows : K;
        const u32 line = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        major = (K_MINOR ? row0 : 0) + line, at = (K_MINOR ? 0 : row0) + chunk * 8;
        to = place<K_MINOR>(line, chunk) * 16;
        from = (u64)major * minor + at;
        keep(to), keep(major), keep(at);
    }

    // The next tile of p. Where lines are no multiple of 16 bytes, element by element.
    __device__ __forceinline__ void copy(u32 tile, const u16* p) const {
        if (minor % 8 == 0) {
#pragma unroll
            for (u32 i = 0; i < 512 / COUNT; i++) {
                const bool there = major + i * LINES < majors && at < minor;
                copy16(tile + to + i * COUNT * 16, p + from + (u64)(i * LINES) * minor, there ? 16 : 0);
            }
        } else {
#pragma unroll 1
            for (u32 i = 0; i < 512 / COUNT; i++)
#pragma unroll 1
                for (u32 j = 0; j < 8; j++) {
                    const bool there = major + i * LINES < majors && at + j < minor;
                    const u16 v = there ? p[from + (u64)(i * LINES) * minor + j] : 0;
                    asm volatile("st.shared.u16 [%0], %1;" ::"r"(tile + to + i * COUNT * 16 + j * 2), "h"(v) : "memory");
                }
        }
    }

    __device__ __forceinline__ void advance() {
        (K_MINOR ? at : major) += KTILE;
        from += K_MINOR ? KTILE : (u64)KTILE * minor;
    }
};

// How a block makes a product by tensor cores: each warp makes 64 × N of the tile, as [4][N / 8] pieces of 16 × 8; each
// operand is the sum of so many parts; so many tiles of k are in flight.
template <u32 N, u32 PARTS_, u32 STAGES_>
struct Way {
    static constexpr u32 PARTS = PARTS_, STAGES = STAGES_, WARP_N = N, ACROSS = TILE / N, COUNT = 2 * ACROSS * 32;
    typedef float Sum[4][N / 8][4];
    static __device__ __forceinline__ u32 warp_m() { return threadIdx.x / 32 / ACROSS * 64; }
    static __device__ __forceinline__ u32 warp_n() { return threadIdx.x / 32 % ACROSS * N; }
};
// A warp that makes 64 × 64 reads the least from shared memory; where products have parts, that takes too many registers.
typedef Way<64, 1, 4> Whole;
typedef Way<32, 2, 3> Split;

// The sum of one block in the tensor cores' layout. With two parts, high and low, three of the four products are made, the
// smallest first.
//
// The tensor cores do not round sums to nearest. With two parts, where that would show, the sum of each tile of k is
// made apart and added by the ordinary adder.
template <class E, bool A_K, bool B_K, class W>
__device__ __forceinline__ void product_mma(u32 M, u32 N, u32 K, const u16* const* a, const u16* const* b,
                                            typename W::Sum& sum) {
    extern __shared__ __align__(16) u16 tiles[];  // [STAGES][a's parts, b's parts][512 · 8]
    constexpr u32 PARTS = W::PARTS, STAGES = W::STAGES, PIECES = W::WARP_N / 8;
    const u32 lane = threadIdx.x % 32, wm = W::warp_m(), wn = W::warp_n();
    const u32 m0 = block_tile().x * TILE, n0 = block_tile().y * TILE, steps = (K + KTILE - 1) / KTILE;
    constexpr u32 TILE_BYTES = TILE * KTILE * 2;
    auto tile = [&](u32 s, u32 i) { return shared(tiles) + (s * 2 * PARTS + i) * TILE_BYTES; };
    Source<A_K, W::COUNT> a_source(M, K, m0);
    Source<B_K, W::COUNT> b_source(N, K, n0);
    auto load = [&](u32 s) {
#pragma unroll
        for (u32 p = 0; p < PARTS; p++) {
            a_source.copy(tile(s, p), a[p]);
            b_source.copy(tile(s, PARTS + p), b[p]);
        }
        a_source.advance();
        b_source.advance();
    };
#pragma unroll
    for (u32 s = 0; s < STAGES - 1; s++) {
        if (s < steps) load(s);
        commit();
    }
    // Where this lane finds its part of the first piece of 16 rows in a tile, for each 16 k.
    u32 x_at[KTILE / 16], y_at[KTILE / 16];
#pragma unroll
    for (u32 k = 0; k < KTILE / 16; k++) {
        x_at[k] = 16 * (A_K ? place<true>(wm + lane % 16, k * 2 + lane / 16)
                            : place<false>(k * 16 + lane / 16 * 8 + lane % 8, wm / 8 + lane / 8 % 2));
        y_at[k] = 16 * (B_K ? place<true>(wn + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2)
                            : place<false>(k * 16 + lane % 16, wn / 8 + lane / 16));
        keep(x_at[k]), keep(y_at[k]);
    }
    // Two sets of registers take turns: one is multiplied while the other is loaded.
    u32 x[2][PARTS][4][4], y[2][PARTS][PIECES / 2][4];
    auto fetch = [&](u32 step, u32 k, u32 to) {
#pragma unroll
        for (u32 p = 0; p < PARTS; p++) {
            const u32 at = tile(step % STAGES, p), bt = tile(step % STAGES, PARTS + p);
            // 16 rows further: 1024 bytes, or two chunks in the same line, whose number `place` permutes by xor.
#pragma unroll
            for (u32 i = 0; i < 4; i++)
                if (A_K) ldmatrix(x[to][p][i], at + x_at[k] + i * 1024);
                else ldmatrix_t(x[to][p][i], at + (x_at[k] ^ i * 32));
#pragma unroll
            for (u32 j = 0; j < PIECES / 2; j++)
                if (B_K) ldmatrix(y[to][p][j], bt + y_at[k] + j * 1024);
                else ldmatrix_t(y[to][p][j], bt + (y_at[k] ^ j * 32));
        }
    };
    auto multiply = [&](typename W::Sum& to, u32 f) {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
#pragma unroll
            for (u32 j = 0; j < PIECES; j++) {
                const u32 h = j % 2 * 2;
                if (PARTS > 1) {
                    mma(E(), to[i][j], x[f][PARTS - 1][i], &y[f][0][j / 2][h]);
                    mma(E(), to[i][j], x[f][0][i], &y[f][PARTS - 1][j / 2][h]);
                }
                mma(E(), to[i][j], x[f][0][i], &y[f][0][j / 2][h]);
            }
    };
    wait<STAGES - 2>();
    __syncthreads();  // the first tile is there
    if (steps) fetch(0, 0, 0);
    for (u32 step = 0; step < steps; step++) {
        // All are done with the tile before this one.
        if (step + STAGES - 1 < steps) load((step + STAGES - 1) % STAGES);
        commit();
        typename W::Sum part;
        typename W::Sum& to = PARTS == 1 ? sum : part;
        if (PARTS > 1)
#pragma unroll
            for (u32 i = 0; i < 16 * PIECES; i++) part[i / (4 * PIECES)][i / 4 % PIECES][i % 4] = 0.f;
#pragma unroll
        for (u32 k = 0; k < KTILE / 16; k++) {
            if (k + 1 < KTILE / 16) {
                fetch(step, k + 1, (k + 1) % 2);
            } else {
                wait<STAGES - 2>();
                __syncthreads();  // the next tile is there, and all are done with this one
                if (step + 1 < steps) fetch(step + 1, 0, 0);
            }
            multiply(to, k % 2);
        }
        if (PARTS > 1)
#pragma unroll
            for (u32 i = 0; i < 16 * PIECES; i++)
                sum[i / (4 * PIECES)][i / 4 % PIECES][i % 4] += part[i / (4 * PIECES)][i / 4 % PIECES][i % 4];
    }
}

// The sums of a block in shared memory, where the tiles were: since the last barrier nobody reads them or waits for one.
// Rows are SUM_STRIDE apart: a multiple of 32 banks and 8, so that the four rows that half a warp writes at a time lie in
// different banks.
#define SUM_STRIDE (TILE + 8)

template <class W>
__device__ __forceinline__ const float* put_sums(const typename W::Sum& sum) {
    extern __shared__ __align__(16) u16 tiles[];
    const u32 lane = threadIdx.x % 32;
    float* sums = (float*)tiles;
#pragma unroll
    for (u32 i = 0; i < 4; i++)
#pragma unroll
        for (u32 j = 0; j < W::WARP_N / 8; j++)
#pragma unroll
            for (u32 e = 0; e < 2; e++) {
                const u32 m = W::warp_m() + i * 16 + lane / 4 + e * 8, n = W::warp_n() + j * 8 + lane % 4 * 2;
                *(float2*)&sums[m * SUM_STRIDE + n] = make_float2(sum[i][j][e * 2], sum[i][j][e * 2 + 1]);
            }
    __syncthreads();
    return sums;
}

// ---- float32 as two float16 ------------------------------------------------------------------------------------------

// For each row of an operand, x[row] · 2^shift[row] ≈ high + low, both float16, `shift` such that the largest magnitude
// lies in [2^14, 2^15). float16 has 11 bits, so high + low has 22 and the product of two such sums, without low · low, errs
// by some 2^-21 of its factors; two bfloat16 would have 16 bits, which is not enough for the golden cases. Elements below
// 2^-28 of the row's largest lose bits, which errs by 2^-40 of that. *nonfinite is set if an element is not finite.
__device__ __forceinline__ int shift_of(u32 largest) { return min(14 - ((int)(largest >> 23) - 127), 126); }

__device__ __forceinline__ void split4(const float* x, const int* shift, u16* high, u16* low) {
    __align__(8) u16 h[4], l[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const float v = x[i] * power_of_2(shift[i]);
        h[i] = f16::narrow(v);
        l[i] = f16::narrow(v - f16::wide(h[i]));
    }
    *(uint2*)high = *(const uint2*)h;
    *(uint2*)low = *(const uint2*)l;
}

// An operand that is k-minor, x [rows, cols], its rows padded with zeros to `ld`, a multiple of 8. One block a row.
extern "C" __global__ void __launch_bounds__(BLOCK)
    split_rows(u32 cols, u32 ld, u32 keep, const float* __restrict__ x, u16* __restrict__ high, u16* __restrict__ low, int* shift,
          u32* nonfinite) {
    extern __shared__ __align__(16) float row[];  // [ld] if `keep`: the row is read once
    __shared__ u32 part[BLOCK / 32];
    const bool aligned = cols % 4 == 0;
    x += (u64)blockIdx.x * cols;
    high += (u64)blockIdx.x * ld;
    low += (u64)blockIdx.x * ld;
    u32 largest = 0;  // magnitudes order as their bits do
    pieces<4, 4>(ld, (u32)threadIdx.x, (u32)BLOCK, true, [&](u32 k, bool, u32) {
        float v[4];
        const u32 left = k < cols ? cols - k : 0;
        load<f32>(x + k, aligned && left, left, v);
        if (keep) *(float4*)&row[k] = *(const float4*)v;
#pragma unroll
        for (u32 i = 0; i < 4; i++) largest = max(largest, __float_as_uint(v[i]) & 0x7fffffffu);
    });
    for (u32 o = 16; o; o >>= 1) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, o));
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = largest;
    __syncthreads();
    for (u32 i = 0; i < BLOCK / 32; i++) largest = max(largest, part[i]);
    if (threadIdx.x == 0 && largest >= 0x7f800000u) atomicOr(nonfinite, 1u);
    const int s = shift_of(largest), shifts[4] = {s, s, s, s};
    if (threadIdx.x == 0) shift[blockIdx.x] = s;
    pieces<4, 4>(ld, (u32)threadIdx.x, (u32)BLOCK, true, [&](u32 k, bool, u32) {
        float v[4];
        const u32 left = k < cols ? cols - k : 0;
        if (keep) *(float4*)v = *(const float4*)&row[k];  // what this thread wrote
        else load<f32>(x + k, aligned && left, left, v);
        split4(v, shifts, high + k, low + k);
    });
}

// An operand that is not: a row of it is a column of x [k, cols]. First, largest[col] = the bits of the column's largest
// magnitude; 0 before. One thread a column and 64 k. Grid: columns / BLOCK, k / 64. A maximum has no order: the result repeats.
extern "C" __global__ void column_largest(u32 K, u32 cols, const float* __restrict__ x, u32* largest) {
    const u32 col = blockIdx.x * BLOCK + threadIdx.x, end = min(K, (blockIdx.y + 1) * 64);
    if (col >= cols) return;
    u32 v = 0;
#pragma unroll 8
    for (u32 k = blockIdx.y * 64; k < end; k++) v = max(v, __float_as_uint(x[(u64)k * cols + col]) & 0x7fffffffu);
    atomicMax(&largest[col], v);
}

// Then high and low, padded with zeros to [k of the grid, ld]. One thread four columns of a k. Grid: k, ld / 4 / BLOCK.
extern "C" __global__ void split_columns(u32 K, u32 cols, u32 ld, const float* __restrict__ x,
                                         const u32* __restrict__ largest, u16* __restrict__ high, u16* __restrict__ low,
                                         int* __restrict__ shift, u32* nonfinite) {
    const u32 k = blockIdx.x, col = (blockIdx.y * BLOCK + threadIdx.x) * 4, left = col < cols ? cols - col : 0;
    if (col >= ld) return;
    float v[4];
    int s[4];
    const u32 there = k < K ? left : 0;
    load<f32>(x + (u64)k * cols + col, cols % 4 == 0 && there, there, v);
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u32 of = i < left ? largest[col + i] : 0;
        s[i] = shift_of(of);
        if (k == 0 && i < left) {
            shift[col + i] = s[i];
            if (of >= 0x7f800000u) atomicOr(nonfinite, 1u);
        }
    }
    const u64 at = (u64)k * ld + col;
    split4(v, s, high + at, low + at);
}

// A product of what was split, in each layout, M, N and K being those of padded operands; of c [rows, cols] are stored. Nothing
// is done if *nonfinite: then the float32 product runs.
#define SPLIT(NAME, A_K, B_K)                                                                                          \
    extern "C" __global__ void __launch_bounds__(Split::COUNT, 1)                                                      \
        NAME(u32 M, u32 N, u32 K, u32 rows, u32 cols, const u16* a_high, const u16* a_low, const int* a_shift,         \
             const u16* b_high, const u16* b_low, const int* b_shift, const u32* nonfinite, const float* bias,         \
             const float* mask, u32 relu, u32 add, float* c) {                                                         \
        if (*nonfinite) return;                                                                                        \
        const u16 *a[2] = {a_high, a_low}, *b[2] = {b_high, b_low};                                                    \
        Split::Sum sum = {};                                                                                           \
        product_mma<f16, A_K, B_K, Split>(M, N, K, a, b, sum);                                                         \
        const Finish<f32> finish = {rows, cols, bias, mask, relu, add, c};                                             \
        finish.tile<TILE, SUM_STRIDE, Split::COUNT>(                                                                   \
            put_sums<Split>(sum), TILE, block_tile().x * TILE, block_tile().y * TILE, threadIdx.x,                     \
            [&](u32 m, u32 n, float v) { return unscale(v, a_shift[m], b_shift[n]); });                                \
    }
SPLIT(product_nt_split, true, true)
SPLIT(product_nn_split, true, false)
SPLIT(product_tn_split, false, false)

#define FFMA(NAME, A_K, B_K)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
        NAME(u32 M, u32 N, u32 K, const float* a, const float* b, const u32* only_if, const float* bias,               \
             const float* mask, u32 relu, u32 add, float* c) {                                                         \
        product_ffma<A_K, B_K>(M, N, K, a, b, only_if, Finish<f32>{M, N, bias, mask, relu, add, c});                      \
    }
FFMA(product_nt_f32, true, true)
FFMA(product_nn_f32, true, false)
FFMA(product_tn_f32, false, false)

#define MMA(NAME, E, A_K, B_K)                                                                                         \
    extern "C" __global__ void __launch_bounds__(Whole::COUNT, 2)                                                      \
        NAME(u32 M, u32 N, u32 K, const u16* a, const u16* b, const u32* only_if, const u16* bias, const u16* mask,    \
             u32 relu, u32 add, u16* c) {                                                                              \
        if (only_if && !*only_if) return;                                                                              \
        Whole::Sum sum = {};                                                                                           \
        product_mma<E, A_K, B_K, Whole>(M, N, K, &a, &b, sum);                                                         \
        const Finish<E> finish = {M, N, bias, mask, relu, add, c};                                                     \
        finish.tile<TILE, SUM_STRIDE, Whole::COUNT>(put_sums<Whole>(sum), TILE, block_tile().x * TILE,                 \
                                                    block_tile().y * TILE, threadIdx.x,                                \
                                                    [](u32, u32, float v) { return v; });                              \
    }
MMA(product_nt_f16, f16, true, true)
MMA(product_nn_f16, f16, true, false)
MMA(product_tn_f16, f16, false, false)
MMA(product_nt_bf16, bf16, true, true)
MMA(product_nn_bf16, bf16, true, false)
MMA(product_tn_bf16, bf16, false, false)
