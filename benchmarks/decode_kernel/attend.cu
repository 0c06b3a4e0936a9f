// Decode attention over packed pages. One warp walks pages; 8 query heads of one KV head are the N of mma.m16n8k16.
#include <cuda_fp16.h>
#ifndef D
#define D 128
#define KB0 4
#define KB1 0
#define VB0 4
#define VB1 0
#define KGROUPS 1
#define VGROUPS 1
#define KSYM 0
#define VSYM 0
#define HEADS 4
#endif
typedef unsigned int u32;
typedef unsigned char u8;
constexpr int P = 64;
#ifndef NWARPS
#define NWARPS 4
#endif
#ifndef STAGES
#define STAGES 0
#endif
constexpr int WARPS = NWARPS;
template <class T> __device__ __forceinline__ T get(const T* p) {
    if constexpr (STAGES > 0) return *p; else return __ldg(p);
}
constexpr int KB = KB0 + KB1, VB = VB0 + VB1;

__host__ __device__ constexpr int tiles_per_chunk(int tiles, int lane_bytes) {
    for (int load = 16; load >= 4; load /= 2)
        for (int n = 1; n <= tiles; n++)
            if (tiles % n == 0 && n * lane_bytes % load == 0) return n;
    return 1;
}

template <int ROWS, int COLS, int BITS> struct Plane {
    static constexpr int PAIRS = COLS / 8, KJ = 16 / BITS, TILES = ROWS / 16;
    static constexpr int LANE_BYTES = COLS * BITS / 16;
    static constexpr int T = tiles_per_chunk(TILES, LANE_BYTES);
    static constexpr int W = T * LANE_BYTES / 4, CHUNKS = TILES / T;
    static constexpr int NBYTES = ROWS * COLS * BITS / 8;
    static constexpr int JS = 10 / BITS > KJ ? KJ : 10 / BITS;   // fields reachable without the exponent
    static_assert(PAIRS % KJ == 0 || KJ % PAIRS == 0, "a row's fields must not straddle words unevenly");
    static __host__ __device__ constexpr int exponent(int pair) { return BITS * ((pair % KJ) % JS); }
    static __device__ __forceinline__ u32 field(const u32* w, int row, int pair) {
        const int first = row * PAIRS, seq = first + pair;
        const int base = PAIRS < KJ ? first % KJ : 0;              // align the row's fields to bit 0
        const int j = seq % KJ - base;
        const int shift = BITS * base + BITS * JS * (j / JS);
        const u32 mask = ((1u << BITS) - 1) * 0x00010001u << (BITS * (j % JS));
        return (shift ? w[seq / KJ] >> shift : w[seq / KJ]) & mask;
    }
    static __device__ __forceinline__ void load(u32* w, const u8* plane, int chunk, int lane) {
        const u8* at = plane + (chunk * 32 + lane) * (W * 4);
        if constexpr (W % 4 == 0) {
#pragma unroll
            for (int i = 0; i < W / 4; i++) {
                uint4 v = get(reinterpret_cast<const uint4*>(at) + i);
                w[4 * i] = v.x; w[4 * i + 1] = v.y; w[4 * i + 2] = v.z; w[4 * i + 3] = v.w;
            }
        } else if constexpr (W % 2 == 0) {
#pragma unroll
            for (int i = 0; i < W / 2; i++) {
                uint2 v = get(reinterpret_cast<const uint2*>(at) + i);
                w[2 * i] = v.x; w[2 * i + 1] = v.y;
            }
        } else {
#pragma unroll
            for (int i = 0; i < W; i++) w[i] = get(reinterpret_cast<const u32*>(at) + i);
        }
    }
};

__device__ __forceinline__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 transposed(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
__device__ __forceinline__ u32 bits(half2 x) { return *reinterpret_cast<u32*>(&x); }
__device__ __forceinline__ half2 half2_of(u32 x) { return *reinterpret_cast<half2*>(&x); }
__device__ __forceinline__ float exp2_(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

constexpr int QX = 4, VX = 8;   // powers of two that keep scaled Q and P normal in fp16
constexpr int PAIRS_Q = D / 8, GROUP_PAIRS = PAIRS_Q;

template <int BITS, int WEIGHT>
__device__ __forceinline__ void scores(float (*s)[4], const u8* plane, const half2* qs, int lane, int mtile0, int mtiles) {
    using K = Plane<P, D, BITS>;
    u32 b[PAIRS_Q];
#pragma unroll
    for (int p = 0; p < PAIRS_Q; p++) b[p] = bits(__hmul2(qs[p], __float2half2_rn((float)(1 << WEIGHT) * (1 << QX) / (1 << K::exponent(p)))));
#pragma unroll
    for (int chunk = 0; chunk < K::CHUNKS; chunk++) {
        if (chunk * K::T + K::T <= mtile0 || chunk * K::T >= mtile0 + mtiles) continue;
        u32 w[K::W];
        K::load(w, plane, chunk, lane);
#pragma unroll
        for (int tile = 0; tile < K::T; tile++) {
            const int m = chunk * K::T + tile;
            if (m < mtile0 || m >= mtile0 + mtiles) continue;
#pragma unroll
            for (int ks = 0; ks < D / 16; ks++)
                mma(s[m], K::field(w, 2 * tile, 2 * ks), K::field(w, 2 * tile + 1, 2 * ks), K::field(w, 2 * tile, 2 * ks + 1),
                    K::field(w, 2 * tile + 1, 2 * ks + 1), b[2 * ks], b[2 * ks + 1]);
        }
    }
}

template <int BITS, int WEIGHT>
__device__ __forceinline__ void values(float (*o)[4], const u8* plane, float (*p)[4], int lane, int dtile0, int dtiles) {
    using V = Plane<D, P, BITS>;
    u32 b[P / 16][2];
#pragma unroll
    for (int m = 0; m < P / 16; m++)
#pragma unroll
        for (int a = 0; a < 2; a++) {
            const float x = (float)(1 << WEIGHT) * (1 << VX) / (1 << V::exponent(2 * m + a));
            b[m][a] = transposed(bits(__floats2half2_rn(p[m][2 * a] * x, p[m][2 * a + 1] * x)));
        }
#pragma unroll
    for (int chunk = 0; chunk < V::CHUNKS; chunk++) {
        if (chunk * V::T + V::T <= dtile0 || chunk * V::T >= dtile0 + dtiles) continue;
        u32 w[V::W];
        V::load(w, plane, chunk, lane);
#pragma unroll
        for (int tile = 0; tile < V::T; tile++) {
            const int dt = chunk * V::T + tile;
            if (dt < dtile0 || dt >= dtile0 + dtiles) continue;
#pragma unroll
            for (int m = 0; m < P / 16; m++)
                mma(o[dt], V::field(w, 2 * tile, 2 * m), V::field(w, 2 * tile + 1, 2 * m), V::field(w, 2 * tile, 2 * m + 1),
                    V::field(w, 2 * tile + 1, 2 * m + 1), b[m][0], b[m][1]);
        }
    }
}

constexpr int KCODES = P * D * KB / 8, KPARAMS = KGROUPS * D * (2 - KSYM) * 2;
constexpr int VCODES = P * D * VB / 8, VPARAMS = VGROUPS * P * (2 - VSYM) * 2;
constexpr int PAGE = KCODES + KPARAMS + VCODES + VPARAMS;

// q [batch, kv_heads, HEADS, D] fp16; partials: o [batch, kv_heads, splits, HEADS, D] f32, ml [.., HEADS, 2] f32 (base 2)
extern "C" __global__ void __launch_bounds__(WARPS * 32) attend_pages(
    const __half* __restrict__ q, const u8* __restrict__ pages, long long batch_stride, long long head_stride, int num_pages,
    float scale_log2, float* __restrict__ part_o, float* __restrict__ part_ml) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int split = blockIdx.x, splits = gridDim.x, head = blockIdx.y, b = blockIdx.z, kv_heads = gridDim.y;
    const u8* base = pages + b * batch_stride + head * head_stride;

    half2 q2[PAIRS_Q];   // head g, channels t*D/4 ..
    float norm = 0.f;
    {
        const __half* row = q + (((long long)b * kv_heads + head) * HEADS + (g < HEADS ? g : 0)) * D + t * (D / 4);
#pragma unroll
        for (int p = 0; p < PAIRS_Q; p++) {
            q2[p] = g < HEADS ? *reinterpret_cast<const half2*>(row + 2 * p) : __float2half2_rn(0.f);
            norm = fmaxf(norm, fmaxf(fabsf(__low2float(q2[p])), fabsf(__high2float(q2[p]))));
        }
        norm = fmaxf(norm, __shfl_xor_sync(~0u, norm, 1));
        norm = fmaxf(norm, __shfl_xor_sync(~0u, norm, 2));
        int e = norm > 0.f ? ilogbf(norm) + 1 : 0;
        const float down = ldexpf(1.f, -e);
#pragma unroll
        for (int p = 0; p < PAIRS_Q; p++)
            q2[p] = __floats2half2_rn(__low2float(q2[p]) * down, __high2float(q2[p]) * down);
        norm = ldexpf(1.f, e) * scale_log2;
    }
    const float unit0 = __shfl_sync(~0u, norm, 8 * t), unit1 = __shfl_sync(~0u, norm, 8 * t + 4);  // heads 2t, 2t+1

    float o[D / 16][4] = {}, m0 = -1e30f, m1 = -1e30f, l0 = 0.f, l1 = 0.f, z0[VGROUPS] = {}, z1[VGROUPS] = {};

    const int per = (num_pages + splits * WARPS - 1) / (splits * WARPS);
    const int first = (split * WARPS + warp) * per, last = min(first + per, num_pages);
#if STAGES > 0
    extern __shared__ __align__(16) u8 ring[];
    u8* mine = ring + warp * STAGES * PAGE;
    auto fetch = [&](int page) {
        if (page < last) {
            const u8* src = base + (long long)page * PAGE;
            const u32 dst = (u32)__cvta_generic_to_shared(mine + ((page - first) % STAGES) * PAGE);
#pragma unroll
            for (int i = 0; i < (PAGE / 16 + 31) / 32; i++)
                if (i * 32 + lane < PAGE / 16)
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst + (i * 32 + lane) * 16), "l"(src + (i * 32 + lane) * 16));
        }
        asm volatile("cp.async.commit_group;");
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) fetch(first + i);
#endif
    for (int page = first; page < last; page++) {
#if STAGES > 0
        __syncwarp();
        fetch(page + STAGES - 1);
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1));
        __syncwarp();
        const u8* rec = mine + ((page - first) % STAGES) * PAGE;
#else
        const u8* rec = base + (long long)page * PAGE;
#endif
        float s[P / 16][4] = {}, sz[KGROUPS][4] = {};
#pragma unroll
        for (int grp = 0; grp < KGROUPS; grp++) {
            half2 qs[PAIRS_Q];
            const half2* sc = reinterpret_cast<const half2*>(rec + KCODES) + (grp * D + t * (D / 4)) / 2;
#pragma unroll
            for (int p = 0; p < PAIRS_Q; p++) qs[p] = __hmul2(q2[p], half2_of(get(reinterpret_cast<const u32*>(sc + p))));
            if constexpr (!KSYM) {
                const u32* zp = reinterpret_cast<const u32*>(rec + KCODES + KGROUPS * D * 2) + (grp * D + t * (D / 4)) / 2;
#pragma unroll
                for (int ks = 0; ks < D / 16; ks++) {
                    const u32 za = get(zp + 2 * ks), zb = get(zp + 2 * ks + 1);
                    mma(sz[grp], za, za, zb, zb, bits(q2[2 * ks]), bits(q2[2 * ks + 1]));
                }
            } else {
#pragma unroll
                for (int ks = 0; ks < D / 16; ks++) {   // zero = -scale * levels / 2
                    const u32 one = bits(__float2half2_rn(-0.5f * ((1 << KB) - 1)));
                    mma(sz[grp], one, one, one, one, bits(qs[2 * ks]), bits(qs[2 * ks + 1]));
                }
            }
            constexpr int MT = P / 16 / KGROUPS;
            scores<KB0, 0>(s, rec, qs, lane, grp * MT, MT);
            if constexpr (KB1 > 0) scores<KB1 ? KB1 : 1, KB0>(s, rec + P * D * KB0 / 8, qs, lane, grp * MT, MT);
        }
        float x0 = m0, x1 = m1;
        constexpr float KUNIT = (float)(1 << (24 - QX));
#pragma unroll
        for (int m = 0; m < P / 16; m++) {
            const int grp = m * KGROUPS / (P / 16);
            s[m][0] = (s[m][0] * KUNIT + sz[grp][0]) * unit0; s[m][1] = (s[m][1] * KUNIT + sz[grp][1]) * unit1;
            s[m][2] = (s[m][2] * KUNIT + sz[grp][0]) * unit0; s[m][3] = (s[m][3] * KUNIT + sz[grp][1]) * unit1;
            x0 = fmaxf(x0, fmaxf(s[m][0], s[m][2])); x1 = fmaxf(x1, fmaxf(s[m][1], s[m][3]));
        }
#pragma unroll
        for (int k = 4; k < 32; k *= 2) { x0 = fmaxf(x0, __shfl_xor_sync(~0u, x0, k)); x1 = fmaxf(x1, __shfl_xor_sync(~0u, x1, k)); }
        const float r0 = exp2_(m0 - x0), r1 = exp2_(m1 - x1);
        m0 = x0; m1 = x1; l0 *= r0; l1 *= r1;
#pragma unroll
        for (int i = 0; i < D / 16; i++) { o[i][0] *= r0; o[i][1] *= r1; o[i][2] *= r0; o[i][3] *= r1; }
#pragma unroll
        for (int m = 0; m < P / 16; m++) {
            s[m][0] = exp2_(s[m][0] - m0); s[m][1] = exp2_(s[m][1] - m1); s[m][2] = exp2_(s[m][2] - m0); s[m][3] = exp2_(s[m][3] - m1);
            l0 += s[m][0] + s[m][2]; l1 += s[m][1] + s[m][3];
        }
        const u8* vrec = rec + KCODES + KPARAMS;
#pragma unroll
        for (int grp = 0; grp < VGROUPS; grp++) {
            float ps[P / 16][4];
            z0[grp] *= r0; z1[grp] *= r1;
#pragma unroll
            for (int m = 0; m < P / 16; m++)
#pragma unroll
                for (int a = 0; a < 2; a++) {
                    const int token = grp * P + 16 * m + 8 * a + g;
                    float sc, zp;
                    if constexpr (VSYM) {
                        sc = __half2float(get(reinterpret_cast<const __half*>(vrec + VCODES) + token));
                        zp = -0.5f * ((1 << VB) - 1) * sc;
                    } else {
                        const half2 pair = half2_of(get(reinterpret_cast<const u32*>(vrec + VCODES) + token));
                        sc = __low2float(pair); zp = __high2float(pair);
                    }
                    ps[m][2 * a] = s[m][2 * a] * sc; ps[m][2 * a + 1] = s[m][2 * a + 1] * sc;
                    z0[grp] += s[m][2 * a] * zp; z1[grp] += s[m][2 * a + 1] * zp;
                }
            constexpr int DT = D / 16 / VGROUPS;
            values<VB0, 0>(o, vrec, ps, lane, grp * DT, DT);
            if constexpr (VB1 > 0) values<VB1 ? VB1 : 1, VB0>(o, vrec + P * D * VB0 / 8, ps, lane, grp * DT, DT);
        }
    }
#pragma unroll
    for (int k = 4; k < 32; k *= 2) {
        l0 += __shfl_xor_sync(~0u, l0, k); l1 += __shfl_xor_sync(~0u, l1, k);
#pragma unroll
        for (int grp = 0; grp < VGROUPS; grp++) {
            z0[grp] += __shfl_xor_sync(~0u, z0[grp], k); z1[grp] += __shfl_xor_sync(~0u, z1[grp], k);
        }
    }
    __shared__ float so[WARPS][8][D + 4], sml[WARPS][8][2];
    constexpr float VUNIT = (float)(1 << (24 - VX));
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int grp = i * VGROUPS / (D / 16);
        so[warp][2 * t][16 * i + g] = o[i][0] * VUNIT + z0[grp]; so[warp][2 * t + 1][16 * i + g] = o[i][1] * VUNIT + z1[grp];
        so[warp][2 * t][16 * i + g + 8] = o[i][2] * VUNIT + z0[grp]; so[warp][2 * t + 1][16 * i + g + 8] = o[i][3] * VUNIT + z1[grp];
    }
    if (g == 0) { sml[warp][2 * t][0] = m0; sml[warp][2 * t][1] = l0; sml[warp][2 * t + 1][0] = m1; sml[warp][2 * t + 1][1] = l1; }
    __syncthreads();
    const long long out = (((long long)b * kv_heads + head) * splits + split) * HEADS;
    for (int i = threadIdx.x; i < HEADS * D; i += WARPS * 32) {
        const int h = i / D, c = i % D;
        float mx = -1e30f, l = 0.f, acc = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) mx = fmaxf(mx, sml[w][h][0]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) { const float f = exp2_(sml[w][h][0] - mx); l += f * sml[w][h][1]; acc += f * so[w][h][c]; }
        part_o[(out + h) * D + c] = acc;
        if (c == 0) { part_ml[(out + h) * 2] = mx; part_ml[(out + h) * 2 + 1] = l; }
    }
}

// merges splits: out [batch, kv_heads, HEADS, D] f32 (normalised), lse [batch, kv_heads, HEADS] f32 (natural log)
extern "C" __global__ void combine(const float* __restrict__ part_o, const float* __restrict__ part_ml, int splits,
                                   float* __restrict__ out, float* __restrict__ lse) {
    const int row = blockIdx.x, h = row % HEADS, bh = row / HEADS, c = threadIdx.x;
    float mx = -1e30f, l = 0.f, acc = 0.f;
    for (int s = 0; s < splits; s++) mx = fmaxf(mx, part_ml[(((long long)bh * splits + s) * HEADS + h) * 2]);
    for (int s = 0; s < splits; s++) {
        const long long at = ((long long)bh * splits + s) * HEADS + h;
        const float f = exp2_(part_ml[at * 2] - mx);
        l += f * part_ml[at * 2 + 1]; acc += f * part_o[at * D + c];
    }
    out[(long long)row * D + c] = acc / l;
    if (c == 0) lse[row] = (mx + log2f(l)) * 0.6931471805599453f;
}
