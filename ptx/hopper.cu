// Dense products for Hopper: operands come by the copy engine (TMA), sums are made by wgmma.
//
// c[m, n] = Σ_k a(m, k) · b(n, k) in the layouts of product.cu, nt, nn and tn, finished as Finish in product.cuh says; a
// and b are described by tensor maps, which have zeros beyond the ends.
//
// A block of three warpgroups makes a tile of 128 × N_TILE: one asks for tiles of 64 k, STAGES of them in flight, two
// compute 64 rows each. Grid: tiles of M, tiles of N.
#include "product.cuh"

#define M_TILE 128
#define K_TILE 64
#define GROUP 128  // threads of a warpgroup

// A tensor map, as the driver makes it.
struct alignas(64) Map {
    u64 opaque[16];
};

// A barrier's phase ends when all that are awaited have arrived and all bytes that are expected have come.
__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Waits until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    u32 over;
    do {
        asm volatile("{\n.reg .pred over;\nmbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, over;\n}"
                     : "=r"(over) : "r"(barrier), "r"(parity) : "memory");
    } while (!over);
}

// Asks for the box that begins at row `row` and column `k`; it arrives at `barrier`.
__device__ __forceinline__ void fetch(u32 to, const Map* map, u32 barrier, u32 k, u32 row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(map), "r"(barrier), "r"(k), "r"(row) : "memory");
}

// An operand's tile in shared memory: boxes of 64 elements (128 bytes) across, swizzled as the copy engine does. K-minor: one
// box of 64 k across, a row each. Otherwise boxes of 64 rows of the operand across, 64 k down, after each other.
#define BOX_BYTES (64 * K_TILE * 2)

template <bool K_MINOR, u32 ROWS>
__device__ __forceinline__ void bring(u32 to, const Map* map, u32 barrier, u32 k, u32 row) {
    if (K_MINOR) {
        fetch(to, map, barrier, k, row);
    } else {
#pragma unroll
        for (u32 i = 0; i < ROWS / 64; i++) fetch(to + i * BOX_BYTES, map, barrier, row + i * 64, k);
    }
}

// Where wgmma finds 16 k of an operand: groups of 8 lines of 128 bytes, 1024 bytes apart; boxes, where there are several,
// BOX_BYTES apart. `k`: a multiple of 16.
template <bool K_MINOR>
__device__ __forceinline__ u64 operand(u32 at, u32 k) {
    at += K_MINOR ? k * 2 : k * 128;
    return (u64)((at & 0x3ffff) >> 4) | (u64)(K_MINOR ? 1 : BOX_BYTES >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// d = a · b, added to d if `keep`: [64, n] from 16 k. A_T, B_T: 1 where an operand is not k-minor. Asynchronous; d must
// not be touched before wgmma_finish.
#define WGMMA_128(NAME, TYPE)                                                                                          \
    template <u32 A_T, u32 B_T>\
    __device__ __forceinline__ void NAME(float (&d)[64], u64 a, u64 b, u32 keep) {\
        asm volatile(                                                                                                  \
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %66, 0;\n"                                                             \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " "                                               \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11,"                                                           \
        " %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23,"                                                 \
        " %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35,"                                                 \
        " %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"                                                 \
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59,"                                                 \
        " %60, %61, %62, %63},"                                                                                        \
        " %64, %65, keep, 1, 1, %67, %68;\n}\n"                                                                            \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),                                      \
          "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),                                    \
          "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),                                \
          "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),                                \
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),                                \
          "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),                                \
          "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),                                \
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),                                \
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]),                                \
          "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),                                \
          "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])                                                           \
        : "l"(a), "l"(b), "r"(keep), "n"(A_T), "n"(B_T));                                                                                  \
    }
#define WGMMA_256(NAME, TYPE)                                                                                          \
    template <u32 A_T, u32 B_T>\
    __device__ __forceinline__ void NAME(float (&d)[128], u64 a, u64 b, u32 keep) {\
        asm volatile(                                                                                                  \
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %130, 0;\n"                                                            \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " "                                               \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11,"                                                           \
        " %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23,"                                                 \
        " %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35,"                                                 \
        " %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"                                                 \
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59,"                                                 \
        " %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71,"                                                 \
        " %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83,"                                                 \
        " %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95,"                                                 \
        " %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107,"                                         \
        " %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119,"                                     \
        " %120, %121, %122, %123, %124, %125, %126, %127},"                                                            \
        " %128, %129, keep, 1, 1, %131, %132;\n}\n"                                                                          \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),                                      \
          "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),                                    \
          "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),                                \
          "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),                                \
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),                                \
          "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),                                \
          "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),                                \
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),                                \
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]),                                \
          "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),                                \
          "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]),                                \
          "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),                                \
          "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]),                                \
          "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),                                \
          "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]),                                \
          "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),                                \
          "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]),                              \
          "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]),                          \
          "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]),                          \
          "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),                          \
          "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]),                          \
          "+f"(d[126]), "+f"(d[127])                                                                                   \
        : "l"(a), "l"(b), "r"(keep), "n"(A_T), "n"(B_T));                                                                                  \
    }
WGMMA_128(wgmma_128_f16, "f16")
WGMMA_256(wgmma_256_f16, "f16")
WGMMA_256(wgmma_256_bf16, "bf16")

struct Split {
    static constexpr u32 N_TILE = 128, PARTS = 2, STAGES = 3;
    template <u32 A_T, u32 B_T>
    static __device__ __forceinline__ void multiply(float (&d)[64], u64 a, u64 b, u32 keep) {
        wgmma_128_f16<A_T, B_T>(d, a, b, keep);
    }
};
struct Half {
    static constexpr u32 N_TILE = 256, PARTS = 1, STAGES = 4;
};
struct HalfF16 : Half {
    template <u32 A_T, u32 B_T>
    static __device__ __forceinline__ void multiply(float (&d)[128], u64 a, u64 b, u32 keep) {
        wgmma_256_f16<A_T, B_T>(d, a, b, keep);
    }
};
struct HalfBf16 : Half {
    template <u32 A_T, u32 B_T>
    static __device__ __forceinline__ void multiply(float (&d)[128], u64 a, u64 b, u32 keep) {
        wgmma_256_bf16<A_T, B_T>(d, a, b, keep);
    }
};

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all that was begun, and keeps the uses of d behind the wait.
template <u32 COUNT>
__device__ __forceinline__ void wgmma_finish(float (&d)[COUNT]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// P: the shape of the product. With two parts each operand is high and low, as `split` in product.cu makes them; the
// smallest products come first, and each tile of k is summed apart and added by the ordinary adder, since tensor cores
// truncate.
template <class P, bool A_K, bool B_K, class E, class F>
__device__ __forceinline__ void product(u32 K, const Map* const* a, const Map* const* b, const Finish<E>& finish, F scale) {
    extern __shared__ __align__(1024) unsigned char memory[];
    constexpr u32 PARTS = P::PARTS, STAGES = P::STAGES, N_TILE = P::N_TILE, SUMS = N_TILE / 2;
    constexpr u32 A_BYTES = M_TILE * K_TILE * 2, B_BYTES = N_TILE * K_TILE * 2, STAGE = PARTS * (A_BYTES + B_BYTES);
    const u32 group = threadIdx.x / GROUP, m0 = block_tile().x * M_TILE, n0 = block_tile().y * N_TILE;
    const u32 steps = (K + K_TILE - 1) / K_TILE, base = shared(memory);
    auto full = [&](u32 s) { return base + STAGES * STAGE + s * 16; };
    auto empty = [&](u32 s) { return full(s) + 8; };
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; s++) {
            barrier_init(full(s), 1);
            barrier_init(empty(s), 2 * GROUP / 32);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) {
            for (u32 step = 0; step < steps; step++) {
                const u32 s = step % STAGES, at = base + s * STAGE;
                if (step >= STAGES) barrier_wait(empty(s), (step / STAGES - 1) & 1);
                barrier_expect(full(s), STAGE);
#pragma unroll
                for (u32 p = 0; p < PARTS; p++) {
                    bring<A_K, M_TILE>(at + p * A_BYTES, a[p], full(s), step * K_TILE, m0);
                    bring<B_K, N_TILE>(at + PARTS * A_BYTES + p * B_BYTES, b[p], full(s), step * K_TILE, n0);
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const u32 rows = (group - 1) * 64;
        float sum[SUMS], part[SUMS];
#pragma unroll
        for (u32 i = 0; i < SUMS; i++) sum[i] = 0.f;
        for (u32 step = 0; step < steps; step++) {
            const u32 s = step % STAGES, at = base + s * STAGE + rows * K_TILE * 2, bt = base + s * STAGE + PARTS * A_BYTES;
            barrier_wait(full(s), step / STAGES & 1);
            wgmma_begin();
#pragma unroll
            for (u32 k = 0; k < K_TILE; k += 16) {
                auto multiply = [&](float(&d)[SUMS], u32 a_part, u32 b_part, u32 keep) {
                    P::template multiply<!A_K, !B_K>(d, operand<A_K>(at + a_part * A_BYTES, k),
                                                     operand<B_K>(bt + b_part * B_BYTES, k), keep);
                };
                if constexpr (PARTS == 1) {
                    multiply(sum, 0, 0, 1);
                } else {
                    multiply(part, 1, 0, k > 0);
                    multiply(part, 0, 1, 1);
                    multiply(part, 0, 0, 1);
                }
            }
            wgmma_commit();
            // While one group waits here for its sums, the other's keep the tensor cores busy.
            wgmma_finish(PARTS == 1 ? sum : part);
            if (threadIdx.x % 32 == 0) barrier_arrive(empty(s));  // a wait holds for its warp alone
            if constexpr (PARTS > 1) {
#pragma unroll
                for (u32 i = 0; i < SUMS; i++) sum[i] += part[i];
            }
        }
        // Both groups are done with the tiles: their memory takes the sums.
        asm volatile("bar.sync 1, 256;" ::: "memory");
        constexpr u32 STRIDE = N_TILE + 8;
        const u32 warp = threadIdx.x % GROUP / 32, lane = threadIdx.x % 32;
        float* sums = (float*)memory + rows * STRIDE;
#pragma unroll
        for (u32 j = 0; j < N_TILE / 8; j++)
#pragma unroll
            for (u32 e = 0; e < 2; e++)
                *(float2*)&sums[(warp * 16 + lane / 4 + e * 8) * STRIDE + j * 8 + lane % 4 * 2] =
                    make_float2(sum[j * 4 + e * 2], sum[j * 4 + e * 2 + 1]);
        asm volatile("bar.sync 1, 256;" ::: "memory");
        finish.template tile<N_TILE, STRIDE, GROUP>(sums, 64, m0 + rows, n0, threadIdx.x % GROUP, scale);
    }
}

#define HALF(NAME, E, P, A_K, B_K)                                                                                     \
    extern "C" __global__ void __launch_bounds__(3 * GROUP, 1)                                                         \
        NAME(u32 M, u32 N, u32 K, const __grid_constant__ Map a, const __grid_constant__ Map b, const u16* bias,       \
             const u16* mask, u32 relu, u32 add, u16* c) {                                                             \
        const Map *as = &a, *bs = &b;                                                                                  \
        product<P, A_K, B_K>(K, &as, &bs, Finish<E>{M, N, bias, mask, relu, add, c},                                   \
                             [](u32, u32, float v) { return v; });                                                     \
    }
HALF(hopper_nt_f16, f16, HalfF16, true, true)
HALF(hopper_nn_f16, f16, HalfF16, true, false)
HALF(hopper_tn_f16, f16, HalfF16, false, false)
HALF(hopper_nt_bf16, bf16, HalfBf16, true, true)
HALF(hopper_nn_bf16, bf16, HalfBf16, true, false)
HALF(hopper_tn_bf16, bf16, HalfBf16, false, false)

// Nothing is done if *nonfinite: then the float32 product of the same layout runs.
#define SPLIT(NAME, A_K, B_K)                                                                                          \
    extern "C" __global__ void __launch_bounds__(3 * GROUP, 1)                                                         \
        NAME(u32 M, u32 N, u32 K, const __grid_constant__ Map a_high, const __grid_constant__ Map a_low,               \
             const int* a_shift, const __grid_constant__ Map b_high, const __grid_constant__ Map b_low,                \
             const int* b_shift, const u32* nonfinite, const float* bias, const float* mask, u32 relu, u32 add,        \
             float* c) {                                                                                               \
        if (*nonfinite) return;                                                                                        \
        const Map *a[2] = {&a_high, &a_low}, *b[2] = {&b_high, &b_low};                                                \
        product<Split, A_K, B_K>(K, a, b, Finish<f32>{M, N, bias, mask, relu, add, c},                                 \
                                 [&](u32 m, u32 n, float v) { return unscale(v, a_shift[m], b_shift[n]); });           \
    }
SPLIT(hopper_nt_split, true, true)
SPLIT(hopper_nn_split, true, false)
SPLIT(hopper_tn_split, false, false)
