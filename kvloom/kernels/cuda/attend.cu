// Decode attention over packed pages, exact sinks and an exact tail, in one softmax and one launch.
//
// A warp walks pages; up to 8 rows (query heads of one KV head x queries) are the N of mma.m16n8k16, codes are its A
// operand as fp16 subnormals (page-format.md, "What makes it work"). The splits of a row tile are merged inside their
// cluster, or, without clusters, by the last block to finish. Record layout: kvloom/pages/_layout.py; order of the codes:
// kvloom/pages/_fragment.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Shape of the problem: D channels, P tokens in a page. KB0 + KB1, VB0 + VB1: bits of the planes (KB0 = 16: raw
// elements). KTOK: keys are grouped per token; VCH: values per channel. KSYM, VSYM: no zero points are stored. KPOINTS,
// VPOINTS: codes stand for the points of a codebook. MASKED: 1 by mask, position and pages, query by query; 2 by the mask of
// the one query there is. ROPED: queries have no positions yet. KTURNED, VTURNED: pages and exact tokens hold keys and values
// turned by hadamard.cuh (then with its defines), queries and outputs are not. PLACE: bytes of the place of a token in its
// sequence, by which the mask is; 0: it is by slot.
#ifndef D
#define D 128
#define P 64
#define KB0 4
#define KB1 0
#define VB0 4
#define VB1 0
#define KGROUPS 1
#define VGROUPS 1
#define KSYM 0
#define VSYM 0
#define KPOINTS 0
#define VPOINTS 0
#define KTOK 0
#define VCH 0
#define BF16 0
#define MASKED 0
#define PLACE 0
#define ROPED 0
#define KTURNED 0
#define VTURNED 0
#define SOFTCAP 0
#define WARPS 4
#define CLUSTER 0
#endif

typedef unsigned int u32;
typedef unsigned char u8;
typedef long long i64;
typedef unsigned long long u64;

#define HEAD_DIM D
#include "follow.cuh"
#include "rope.cuh"
#if KTURNED || VTURNED
#include "hadamard.cuh"
#endif

#if BF16
typedef __nv_bfloat16 Element;
#else
typedef __half Element;
#endif

constexpr int STAGES = 2, MT = P / 16, DT = D / 16, PAIRS = D / 8;
constexpr bool KRAW = KB0 == 16, VRAW = VB0 == 16;
constexpr int KB = KB0 + KB1, VB = VB0 + VB1;
constexpr int KCODES = P * D * KB / 8, VCODES = P * D * VB / 8;
constexpr int KPARAMS = KRAW ? 0 : KGROUPS * (KTOK ? P : D) * (2 - KSYM) * 2;
constexpr int VPARAMS = VRAW ? 0 : VGROUPS * (VCH ? D : P) * (2 - VSYM) * 2;
// Products of codes, which are fp16 subnormals, are in units of 2^-24; points are what they are.
constexpr int KUNIT = KPOINTS ? 0 : 24, VUNIT = VPOINTS ? 0 : 24;
// Where no zero points are stored: the zero point in units of the scale.
constexpr float KZERO = KPOINTS ? 0.f : -0.5f * ((1 << KB) - 1), VZERO = VPOINTS ? 0.f : -0.5f * ((1 << VB) - 1);
constexpr int PAGE = KCODES + KPARAMS + VCODES + VPARAMS;
// Shared bytes of a warp: pages on their way, the last slot shared with 16 exact values before it is needed.
constexpr int RING = STAGES * PAGE > (STAGES - 1) * PAGE + 32 * D ? STAGES * PAGE : (STAGES - 1) * PAGE + 32 * D;
// Past the rings, or what merging the warps needs in their place, lie queries as keys meet them, and then what the blocks of a
// cluster send each other.
constexpr int PITCH = D + 4, MERGE = WARPS * 8 * (PITCH + 2) * 4;
constexpr int MADE = WARPS * RING > MERGE ? WARPS * RING : MERGE, LANDING = MADE + 8 * D * 2;
#ifndef HELD
#define HELD 32  // words of codes that a thread holds at a time
#endif
constexpr float NEVER = -1e30f;
constexpr u32 ALL = ~0u;

__host__ __device__ constexpr int tiles_per_chunk(int tiles, int lane_bytes) {
    for (int load = 16; load >= 4; load /= 2)
        for (int n = 1; n <= tiles; n++)
            if (tiles % n == 0 && n * lane_bytes % load == 0) return n;
    return 1;
}

__device__ __forceinline__ u32 bits(half2 x) { return *reinterpret_cast<u32*>(&x); }
__device__ __forceinline__ half2 as_half2(u32 x) { return *reinterpret_cast<half2*>(&x); }
__device__ __forceinline__ half2 both(float x) { return __float2half2_rn(x); }
__device__ __forceinline__ float exp2_(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float rounded(float x) { return __half2float(__float2half_rn(x * 256.f)) * (1 / 256.f); }
__device__ __forceinline__ float pow2(int e) { return __int_as_float((e + 127) << 23); }

__device__ __forceinline__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 transposed(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
// Two elements of the compute dtype as fp16; bf16 beyond fp16's range is held at its end.
__device__ __forceinline__ u32 element2(u32 x) {
#if BF16
    const float lo = __uint_as_float(x << 16), hi = __uint_as_float(x & 0xffff0000u);
    return bits(__floats2half2_rn(fminf(fmaxf(lo, -65504.f), 65504.f), fminf(fmaxf(hi, -65504.f), 65504.f)));
#else
    return x;
#endif
}

// Bytes of a (0 to 3) and b (4 to 7) by the four nibbles of `by`, whose top bits are zero.
__device__ __forceinline__ u32 permuted(u32 a, u32 b, u32 by) {
    u32 y;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(by));
    return y;
}

// A thread's D / 4 halves.
__device__ __forceinline__ void load_channels(u32* x, const u8* at) {
    if constexpr (D % 32 == 0) {
#pragma unroll
        for (int i = 0; i < PAIRS / 4; i++) {
            const uint4 v = reinterpret_cast<const uint4*>(at)[i];
            x[4 * i] = v.x; x[4 * i + 1] = v.y; x[4 * i + 2] = v.z; x[4 * i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < PAIRS / 2; i++) {
            const uint2 v = reinterpret_cast<const uint2*>(at)[i];
            x[2 * i] = v.x; x[2 * i + 1] = v.y;
        }
    }
}

// One bit plane as the A operand: 16-row tiles, pairs of columns in the halves of words.
template <int ROWS, int COLS, int BITS> struct Plane {
    static constexpr int PAIRS = COLS / 8, KJ = 16 / BITS, TILES = ROWS / 16, LANE_BYTES = COLS * BITS / 16;
    static constexpr int T = tiles_per_chunk(TILES, LANE_BYTES), W = T * LANE_BYTES / 4, CHUNKS = TILES / T;
    static constexpr int BLOCK = W >= HELD ? 1 : HELD / W > CHUNKS ? CHUNKS : HELD / W;  // chunks held at a time
    static constexpr int JS = 10 / BITS > KJ ? KJ : 10 / BITS;  // fields below the exponent
    // Where rows begin inside words, a pair's field differs from row to row: bring every field to bit 0.
    static constexpr bool ALIGNED = PAIRS % KJ == 0 || KJ % PAIRS == 0;
    static __host__ __device__ constexpr int exponent(int pair) { return ALIGNED ? BITS * ((pair % KJ) % JS) : 0; }
    static __device__ __forceinline__ u32 field(const u32* w, int row, int pair) {
        const int first = row * PAIRS, seq = first + pair;
        const int base = !ALIGNED ? seq % KJ : PAIRS < KJ ? first % KJ : 0;  // brings the row's fields to bit 0
        const int j = seq % KJ - base;
        const int shift = BITS * base + BITS * JS * (j / JS);
        const u32 mask = ((1u << BITS) - 1) * 0x00010001u << (BITS * (j % JS));
        return (shift ? w[seq / KJ] >> shift : w[seq / KJ]) & mask;
    }
    // Four codes of a row, a nibble each: of the pairs 2 * step and 2 * step + 1, first in the low halves, then in the high.
    // More bits follow above the fourth nibble.
    static __device__ __forceinline__ u32 nibbles(const u32* w, int row, int step) {
        const int seq = row * PAIRS + 2 * step, at = seq % KJ * BITS, byte = at / 8;  // both pairs' fields are in one byte
        u32 x = w[seq / KJ];
        if constexpr (BITS < 4) {
            constexpr u32 MASK = ((1u << BITS) - 1) * 0x01010101u;
            const int first = at % 8, second = first + BITS - 4;
            x = (x >> first & MASK) | ((second >= 0 ? x >> second : x << -second) & MASK << 4);
        }
        return permuted(x, 0, byte + (byte + 2) * 16);
    }
    static __host__ __device__ constexpr bool touches(int chunk, int tile0, int tiles) {
        return chunk * T + T > tile0 && chunk * T < tile0 + tiles;
    }
    static __device__ __forceinline__ void load(u32* w, const u8* plane, int chunk, int lane) {
        const u8* at = plane + (chunk * 32 + lane) * (W * 4);
        if constexpr (W % 4 == 0) {
#pragma unroll
            for (int i = 0; i < W / 4; i++) {
                const uint4 v = reinterpret_cast<const uint4*>(at)[i];
                w[4 * i] = v.x; w[4 * i + 1] = v.y; w[4 * i + 2] = v.z; w[4 * i + 3] = v.w;
            }
        } else if constexpr (W % 2 == 0) {
#pragma unroll
            for (int i = 0; i < W / 2; i++) {
                const uint2 v = reinterpret_cast<const uint2*>(at)[i];
                w[2 * i] = v.x; w[2 * i + 1] = v.y;
            }
        } else {
#pragma unroll
            for (int i = 0; i < W; i++) w[i] = reinterpret_cast<const u32*>(at)[i];
        }
    }
};

// s[m] += codes of token tile m . q, for tiles [mtile0, mtile0 + mtiles) and column pairs of channel group `group` of
// `groups` (others count as zero); in units of 2^-24.
template <int BITS, int WEIGHT>
__device__ __forceinline__ void code_scores(float (*s)[4], const u8* plane, const half2* q, int lane, int mtile0, int mtiles,
                                            int group, int groups) {
    using K = Plane<P, D, BITS>;
    u32 b[PAIRS];
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
        b[p] = bits(__hmul2(q[p], both((float)(1 << WEIGHT) / (1 << K::exponent(p)))));
        if (groups > 1 && ((lane & 3) * (D / 4) + 2 * p) * groups / D != group) b[p] = 0;
    }
#pragma unroll
    for (int chunk0 = 0; chunk0 < K::CHUNKS; chunk0 += K::BLOCK) {  // independent sums side by side hide the latency of mma
        u32 w[K::BLOCK][K::W];
#pragma unroll
        for (int i = 0; i < K::BLOCK; i++)
            if (chunk0 + i < K::CHUNKS && K::touches(chunk0 + i, mtile0, mtiles)) K::load(w[i], plane, chunk0 + i, lane);
#pragma unroll
        for (int ks = 0; ks < DT; ks++)
#pragma unroll
            for (int i = 0; i < K::BLOCK * K::T; i++) {
                const int m = chunk0 * K::T + i, tile = i % K::T;
                if (m < mtile0 || m >= mtile0 + mtiles) continue;
                mma(s[m], K::field(w[i / K::T], 2 * tile, 2 * ks), K::field(w[i / K::T], 2 * tile + 1, 2 * ks),
                    K::field(w[i / K::T], 2 * tile, 2 * ks + 1), K::field(w[i / K::T], 2 * tile + 1, 2 * ks + 1), b[2 * ks], b[2 * ks + 1]);
            }
    }
}

// o[d] += codes of channel tile d . p over token tiles [mtile0, mtile0 + mtiles), for tiles [dtile0, dtile0 + dtiles).
template <int BITS, int WEIGHT>
__device__ __forceinline__ void code_values(float (*o)[4], const u8* plane, float (*p)[4], float unit, int lane, int mtile0,
                                            int mtiles, int dtile0, int dtiles) {
    using V = Plane<D, P, BITS>;
    u32 b[MT][2];
#pragma unroll
    for (int m = mtile0; m < mtile0 + mtiles; m++)
#pragma unroll
        for (int a = 0; a < 2; a++) {
            const float x = unit * ((float)(1 << WEIGHT) / (1 << V::exponent(2 * m + a)));
            b[m][a] = transposed(bits(__floats2half2_rn(p[m][2 * a] * x, p[m][2 * a + 1] * x)));
        }
#pragma unroll
    for (int chunk0 = 0; chunk0 < V::CHUNKS; chunk0 += V::BLOCK) {
        u32 w[V::BLOCK][V::W];
#pragma unroll
        for (int i = 0; i < V::BLOCK; i++)
            if (chunk0 + i < V::CHUNKS && V::touches(chunk0 + i, dtile0, dtiles)) V::load(w[i], plane, chunk0 + i, lane);
#pragma unroll
        for (int m = mtile0; m < mtile0 + mtiles; m++)
#pragma unroll
            for (int i = 0; i < V::BLOCK * V::T; i++) {
                const int d = chunk0 * V::T + i, tile = i % V::T;
                if (d < dtile0 || d >= dtile0 + dtiles) continue;
                mma(o[d], V::field(w[i / V::T], 2 * tile, 2 * m), V::field(w[i / V::T], 2 * tile + 1, 2 * m),
                    V::field(w[i / V::T], 2 * tile, 2 * m + 1), V::field(w[i / V::T], 2 * tile + 1, 2 * m + 1), b[m][0], b[m][1]);
            }
    }
}

#if KPOINTS || VPOINTS
// The fp16 points of a codebook, zeros beyond the last: their low bytes, then their high bytes.
struct Points {
    u32 low[4], high[4];
    __device__ __forceinline__ Points(u64 low0, u64 low1, u64 high0, u64 high1)
        : low{(u32)low0, (u32)(low0 >> 32), (u32)low1, (u32)(low1 >> 32)},
          high{(u32)high0, (u32)(high0 >> 32), (u32)high1, (u32)(high1 >> 32)} {}

    // Points of the codes in four nibbles: of the first two to a, of the others to b.
    template <int BITS> __device__ __forceinline__ void of(u32 codes, u32& a, u32& b) const {
        u32 l, h;
        if constexpr (BITS < 4) {
            l = permuted(low[0], low[1], codes);
            h = permuted(high[0], high[1], codes);
        } else {  // eight points in two registers: the upper eight where the code's top bit is set
            const u32 index = codes & 0x7777, upper = permuted(0xff00, 0, codes >> 3 & 0x1111);
            l = (permuted(low[0], low[1], index) & ~upper) | (permuted(low[2], low[3], index) & upper);
            h = (permuted(high[0], high[1], index) & ~upper) | (permuted(high[2], high[3], index) & upper);
        }
        a = permuted(l, h, 0x5140);
        b = permuted(l, h, 0x7362);
    }
};

// The planes of a side as points, T tiles of 16 rows at a time. A register has the same half of two neighbouring pairs, so
// that a look-up serves two registers; `by_half` puts the moving operand in that order.
template <int ROWS, int COLS, int LOW, int HIGH> struct PointTiles {
    using L = Plane<ROWS, COLS, LOW>;
    using H = Plane<ROWS, COLS, HIGH ? HIGH : LOW>;
    static_assert(H::T % L::T == 0, "a chunk of the high plane is whole chunks of the low one");
    static constexpr int T = H::T, CHUNKS = H::CHUNKS, PARTS = T / L::T, W = PARTS * L::W + (HIGH ? H::W : 0);
    static constexpr int BLOCK = W >= HELD ? 1 : HELD / W > CHUNKS ? CHUNKS : HELD / W;  // chunks held at a time
    u32 low[PARTS][L::W], high[H::W];

    __device__ __forceinline__ void load(const u8* planes, int chunk, int lane) {
#pragma unroll
        for (int i = 0; i < PARTS; i++) L::load(low[i], planes, chunk * PARTS + i, lane);
        if constexpr (HIGH > 0) H::load(high, planes + ROWS * COLS * LOW / 8, chunk, lane);
    }
    __device__ __forceinline__ void row(int row, int step, const Points& points, u32& a, u32& b) const {
        u32 codes = L::nibbles(low[row / (2 * L::T)], row % (2 * L::T), step);
        if constexpr (HIGH > 0) codes |= H::nibbles(high, row, step) << LOW;
        points.of<LOW + HIGH>(codes, a, b);
    }
    __device__ __forceinline__ void product(float* c, int tile, int step, const Points& points, u32 b0, u32 b1) const {
        u32 a0, a1, a2, a3;
        row(2 * tile, step, points, a0, a2);
        row(2 * tile + 1, step, points, a1, a3);
        mma(c, a0, a1, a2, a3, b0, b1);
    }
    static __device__ __forceinline__ void by_half(u32& b0, u32& b1) {
        const u32 low = permuted(b0, b1, 0x5410);
        b1 = permuted(b0, b1, 0x7632);
        b0 = low;
    }
};

// `code_scores` with points for codes, over all planes.
template <int LOW, int HIGH>
__device__ __forceinline__ void point_scores(float (*s)[4], const u8* planes, const Points& points, const half2* q, int lane, int mtile0,
                                             int mtiles, int group, int groups) {
    using K = PointTiles<P, D, LOW, HIGH>;
    u32 b[PAIRS];
#pragma unroll
    for (int p = 0; p < PAIRS; p++) b[p] = groups > 1 && ((lane & 3) * (D / 4) + 2 * p) * groups / D != group ? 0 : bits(q[p]);
#pragma unroll
    for (int ks = 0; ks < DT; ks++) K::by_half(b[2 * ks], b[2 * ks + 1]);
#pragma unroll
    for (int chunk0 = 0; chunk0 < K::CHUNKS; chunk0 += K::BLOCK) {
        K tiles[K::BLOCK];
#pragma unroll
        for (int i = 0; i < K::BLOCK; i++)
            if (chunk0 + i < K::CHUNKS && K::H::touches(chunk0 + i, mtile0, mtiles)) tiles[i].load(planes, chunk0 + i, lane);
#pragma unroll
        for (int ks = 0; ks < DT; ks++)
#pragma unroll
            for (int i = 0; i < K::BLOCK * K::T; i++) {
                const int m = chunk0 * K::T + i;
                if (m < mtile0 || m >= mtile0 + mtiles) continue;
                tiles[i / K::T].product(s[m], i % K::T, ks, points, b[2 * ks], b[2 * ks + 1]);
            }
    }
}

// `code_values` with points for codes, over all planes.
template <int LOW, int HIGH>
__device__ __forceinline__ void point_values(float (*o)[4], const u8* planes, const Points& points, float (*p)[4], float unit, int lane,
                                             int mtile0, int mtiles, int dtile0, int dtiles) {
    using V = PointTiles<D, P, LOW, HIGH>;
    u32 b[MT][2];
#pragma unroll
    for (int m = mtile0; m < mtile0 + mtiles; m++) {
#pragma unroll
        for (int a = 0; a < 2; a++) b[m][a] = transposed(bits(__floats2half2_rn(p[m][2 * a] * unit, p[m][2 * a + 1] * unit)));
        V::by_half(b[m][0], b[m][1]);
    }
#pragma unroll
    for (int chunk0 = 0; chunk0 < V::CHUNKS; chunk0 += V::BLOCK) {
        V tiles[V::BLOCK];
#pragma unroll
        for (int i = 0; i < V::BLOCK; i++)
            if (chunk0 + i < V::CHUNKS && V::H::touches(chunk0 + i, dtile0, dtiles)) tiles[i].load(planes, chunk0 + i, lane);
#pragma unroll
        for (int m = mtile0; m < mtile0 + mtiles; m++)
#pragma unroll
            for (int i = 0; i < V::BLOCK * V::T; i++) {
                const int d = chunk0 * V::T + i;
                if (d < dtile0 || d >= dtile0 + dtiles) continue;
                tiles[i / V::T].product(o[d], i % V::T, m, points, b[m][0], b[m][1]);
            }
    }
}
#endif

// s += elements of 16 tokens . q; lo and hi are rows g and g + 8 at this thread's channels.
__device__ __forceinline__ void raw_scores(float* s, const u8* lo, const u8* hi, const half2* q) {
#pragma unroll
    for (int ks = 0; ks < DT; ks++) {
        const uint2 a = reinterpret_cast<const uint2*>(lo)[ks], c = reinterpret_cast<const uint2*>(hi)[ks];
        mma(s, element2(a.x), element2(c.x), element2(a.y), element2(c.y), bits(q[2 * ks]), bits(q[2 * ks + 1]));
    }
}

// o += p . elements of 16 tokens, fp16 rows of D in shared memory (bf16 there is converted on the way).
__device__ __forceinline__ void raw_values(float (*o)[4], u32 rows, const float* p, int lane, bool converted) {
    const u32 b0 = transposed(bits(__floats2half2_rn(p[0], p[1]))), b1 = transposed(bits(__floats2half2_rn(p[2], p[3])));
    const u32 at = rows + ((lane & 7) + (lane >= 16 ? 8 : 0)) * (D * 2) + (lane & 8) * 2;
#pragma unroll
    for (int d = 0; d < DT; d++) {
        u32 a0, a1, a2, a3;
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a0), "=r"(a1), "=r"(a2), "=r"(a3) : "r"(at + d * 32));
        if (!converted) { a0 = element2(a0); a1 = element2(a1); a2 = element2(a2); a3 = element2(a3); }
        mma(o[d], a0, a1, a2, a3, b0, b1);
    }
}

// Where the share of a worker begins, of `total` things in order.
__device__ __forceinline__ int share(u32 worker, u32 workers, u32 total) {
    const u32 each = total / workers, more = total % workers;
    return worker * each + worker * more / workers;
}

// Places count from the least number of their type.
#if PLACE == 2
typedef unsigned short Place;
#else
typedef u32 Place;
#endif
__device__ __forceinline__ int counted(Place x) { return (Place)(x ^ (Place)1 << (8 * sizeof(Place) - 1)); }

struct Row {  // one of the two rows whose scores a thread holds
    const u8* mask;
    int last, boundary;  // newest slot it may read; first slot that it reads from the tail rather than from pages
    __device__ __forceinline__ bool sees(int slot) const { return slot <= last && (!mask || mask[slot]); }
};

struct Softmax {  // a reference for the exponents (base 2) and the sum of the two rows
    static constexpr float GROWTH = 2.f;
    float m0 = NEVER, m1 = NEVER, l0 = 0.f, l1 = 0.f;
    // Turns scores of n tiles into weights, at most 2^GROWTH. Whether a larger score moved the reference; what was summed
    // before must then be multiplied with r0, r1.
    template <int N> __device__ __forceinline__ bool update(float (*s)[4], float& r0, float& r1) {
        float x0 = NEVER, x1 = NEVER;
#pragma unroll
        for (int m = 0; m < N; m++) { x0 = fmaxf(x0, fmaxf(s[m][0], s[m][2])); x1 = fmaxf(x1, fmaxf(s[m][1], s[m][3])); }
        const bool is_moved = __any_sync(ALL, x0 > m0 + GROWTH || x1 > m1 + GROWTH);
        if (is_moved) {
            x0 = fmaxf(x0, m0); x1 = fmaxf(x1, m1);
#pragma unroll
            for (int k = 4; k < 32; k *= 2) { x0 = fmaxf(x0, __shfl_xor_sync(ALL, x0, k)); x1 = fmaxf(x1, __shfl_xor_sync(ALL, x1, k)); }
            r0 = exp2_(m0 - x0); r1 = exp2_(m1 - x1);
            m0 = x0; m1 = x1; l0 *= r0; l1 *= r1;
        }
#pragma unroll
        for (int m = 0; m < N; m++) {
            s[m][0] = exp2_(s[m][0] - m0); s[m][1] = exp2_(s[m][1] - m1); s[m][2] = exp2_(s[m][2] - m0); s[m][3] = exp2_(s[m][3] - m1);
            l0 += s[m][0] + s[m][2]; l1 += s[m][1] + s[m][3];
        }
        return is_moved;
    }
};

__device__ __forceinline__ void scale_all(float (*o)[4], float r0, float r1) {
#pragma unroll
    for (int i = 0; i < DT; i++) { o[i][0] *= r0; o[i][1] *= r1; o[i][2] *= r0; o[i][3] *= r1; }
}

__device__ __forceinline__ float over_rows(float x) {  // sum over the 8 lanes that share a column
#pragma unroll
    for (int k = 4; k < 32; k *= 2) x += __shfl_xor_sync(ALL, x, k);
    return x;
}

#if CLUSTER
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ u32 in_block(u32 address, u32 rank) {  // the same place in another block's shared memory
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
#endif

// Query [batch, query_heads, queries, D] by strides in elements; rows of a KV head: row = head * queries + query.
// Pages: by strides in bytes, in order, or through table [batch, table_stride] of page numbers. heads: KV head of each
// head of `pages`. Sinks and tail [batch, kv_heads, tokens, D] by strides in elements. state: (tokens, pages) of each
// sequence, read on the device in place of the four numbers; the tail is then a ring, in which the token of slot s lies at
// (s - num_sinks) % tail_ring, a multiple of P. With POOLED exact tokens lie in the blocks of the pages, tail_ring of them in
// each, tail_batch elements apart: those behind page p from block table[p + 2] on, sinks in the one before table[0].
// mask [batch, query, slot]. visible: pages each query may read. extents [batch, heads of `pages`, 2]: first record of a
// head, and how many pages it has before those that have slots. With PLACE there is a mask [batch, query, place];
// page_places: of the records, by strides in elements; exact_places [batch, kv_heads, slot] by strides. With ROPED cos and sin
// [batch, 1, D] by the first one's stride in elements; queries are then, as with KTURNED, at multiples of 16 bytes. Out [batch,
// queries, query_heads, D] contiguous; lse [batch, query_heads, queries], natural. part_o, part_ml: [batch, tiles, splits, 8,
// D], [.., 8, 2]; turn: zeros [batch, tiles], left zero. The rest: see Points.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) attend(
    const u8* q, i64 q_batch, i64 q_head, i64 q_query, int group, int queries, int query_heads,
    const u8* pages, i64 page_batch, i64 page_head, i64 page_bytes, const int* table, int table_stride,
    const int* heads, const u8* sink_k, const u8* sink_v, i64 sink_batch, i64 sink_head,
    i64 sink_token, int num_sinks, const u8* tail_k, const u8* tail_v, i64 tail_batch, i64 tail_head,
    i64 tail_token, int tail_ring, const int* state, int num_pages, int num_tail, int length, const u8* mask,
    i64 mask_batch, i64 mask_query, const i64* visible, const int2* extents, float scale_log2,
    float softcap, const float* sink_logits, float* part_o, float* part_ml,
    int* turn, u8* out, float* lse
#if PLACE
    , const Place* page_places, i64 place_batch, i64 place_head, const Place* exact_places,
    i64 exact_batch, i64 exact_head
#endif
#if KPOINTS
    , u64 key_low0, u64 key_low1, u64 key_high0, u64 key_high1
#endif
#if VPOINTS
    , u64 value_low0, u64 value_low1, u64 value_high0, u64 value_high1
#endif
#if ROPED
    , const Element* cos, i64 cos_batch, const Element* sin, i64 sin_batch
#endif
) {
    follow();
#if KPOINTS
    const Points key_points(key_low0, key_low1, key_high0, key_high1);
#endif
#if VPOINTS
    const Points value_points(value_low0, value_low1, value_high0, value_high1);
#endif
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int split = blockIdx.x, splits = gridDim.x, batch = blockIdx.z;
    const int row_tiles = (group * queries + 7) / 8, own = blockIdx.y / row_tiles, row0 = blockIdx.y % row_tiles * 8;
    const int head = heads ? heads[own] : own, rows = min(8, group * queries - row0);
    int tail_start = 0;
    if (state) {
        const int2 now = reinterpret_cast<const int2*>(state)[batch];
        length = now.x; num_pages = now.y; num_sinks = min(num_sinks, length); num_tail = length - num_sinks - num_pages * P;
        tail_start = num_pages * P % tail_ring;
    }
    int2 kept = make_int2(0, 0);
    if (extents) kept = extents[batch * (gridDim.y / row_tiles) + own];
    const int all_pages = num_pages + kept.y;
    extern __shared__ __align__(16) u8 shared[];
#if CLUSTER
    cluster_arrive();  // no block sends before the others have begun
#endif

    // Every warp takes an even share of the pages, in order, and of the exact tokens, 16 at a time.
    const int sink_units = (num_sinks + 15) / 16, exact_units = sink_units + (num_tail + 15) / 16;
    const u32 workers = splits * WARPS, worker = split * WARPS + warp;
    const bool apart = all_pages + exact_units <= workers;  // then nobody has more than one of either
    const int first = apart ? min(worker, all_pages) : share(worker, workers, all_pages);
    const int last = apart ? min(worker + 1, all_pages) : share(worker + 1, workers, all_pages);
    const int first_unit = apart ? min(max((int)worker - all_pages, 0), exact_units) : share(worker, workers, exact_units);
    const int last_unit = apart ? min(max((int)worker + 1 - all_pages, 0), exact_units) : share(worker + 1, workers, exact_units);
    const u8* base = pages + batch * (table ? 0 : page_batch) + own * page_head + kept.x * page_bytes;
    u8* ring = shared + warp * RING;
    auto fetch = [&](int page) {
        if (page < last) {
            const i64 number = table ? table[(i64)batch * table_stride + page] : page;
            const u8* from = base + number * page_bytes;
            const u32 to = (u32)__cvta_generic_to_shared(ring + ((page - first) % STAGES) * PAGE);
#pragma unroll
            for (int i = 0; i < (PAGE / 16 + 31) / 32; i++)
                if (i * 32 + lane < PAGE / 16)
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + (i * 32 + lane) * 16), "l"(from + (i * 32 + lane) * 16));
        }
        asm volatile("cp.async.commit_group;");
    };
    auto query_row = [&](int i) {  // of the row tile
        const int r = row0 + (i < rows ? i : 0);
        return q + 2 * (batch * q_batch + (i64)(head * group + r / queries) * q_head + (r % queries) * q_query);
    };
#if ROPED || KTURNED
    // Eight channels a thread, asked for before the pages: behind them they would come last.
    const int eights = rows * (D / 8);
    auto ask = [&](int i) {
        const Element* row = reinterpret_cast<const Element*>(query_row(i / (D / 8)));
#if ROPED
        return Roped<Element>(row, cos + batch * cos_batch, sin + batch * sin_batch, i % (D / 8));
#else
        return Eight<Element>(row, i % (D / 8));
#endif
    };
    auto asked = ask(threadIdx.x);
    Element* made = reinterpret_cast<Element*>(shared + MADE);  // [rows][D]
#endif
    // The query, normalised by a power of two so that products with scales stay in fp16: row g, channels t * D/4 ..
#if ROPED || KTURNED
    const u8* q_row = shared + MADE + 2 * (g * D + t * (D / 4));
#else
    const u8* q_row = query_row(g) + 2 * t * (D / 4);
#endif
    auto load_query = [&](u32* raw) {
#pragma unroll
        for (int p = 0; p < PAIRS; p++) raw[p] = g < rows ? reinterpret_cast<const u32*>(q_row)[p] : 0u;
    };
    u32 raw_query[PAIRS];
#if !ROPED && !KTURNED
    load_query(raw_query);  // before the pages, too
#endif

    // The last slot of the ring is free from the start where no exact tokens need it.
    const bool is_free = first_unit == last_unit;
#pragma unroll
    for (int i = 0; i < STAGES; i++)
        if (i < STAGES - 1 || is_free) fetch(first + i);

#if ROPED || KTURNED
    for (int i = threadIdx.x; i - lane < eights; i += WARPS * 32) {  // by whole warps
        if (i >= WARPS * 32) asked = ask(i);
#if ROPED
        Eight<Element> own = asked.turned();
#else
        Eight<Element> own = asked;
#endif
#if KTURNED
        hadamard_turn(own, i % (D / 8), HADAMARD_DUAL_UNIT);
#endif
        if (i < eights) own.store(made, i);
    }
    __syncthreads();
    load_query(raw_query);
#endif

    half2 q2[PAIRS];
    float down;            // brings the query's largest element to [0.5, 1)
    float unit0, unit1;    // of scores of rows 2t, 2t + 1, in base 2
    int kexp = 4, vexp = 8;  // powers of two on Q for the keys' scales, on P for the values'
    auto element = [&](u32 x, float& lo, float& hi) {
#if BF16
        lo = __uint_as_float(x << 16); hi = __uint_as_float(x & 0xffff0000u);
#else
        lo = __low2float(as_half2(x)); hi = __high2float(as_half2(x));
#endif
    };
    auto scale_query = [&](const u32* raw, float factor) {
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            float lo, hi;
            element(raw[p], lo, hi);
            q2[p] = __floats2half2_rn(lo * factor, hi * factor);
        }
    };
    {
        float norm = 0x1p-90f;
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            float lo, hi;
            element(raw_query[p], lo, hi);
            norm = fmaxf(norm, fmaxf(fabsf(lo), fabsf(hi)));
        }
        norm = fmaxf(norm, __shfl_xor_sync(ALL, norm, 1));
        norm = fmaxf(norm, __shfl_xor_sync(ALL, norm, 2));
        const int e = (__float_as_int(norm) >> 23) - 126;
        down = pow2(-e);
        const float unit = pow2(e) * scale_log2;
        unit0 = __shfl_sync(ALL, unit, 8 * t); unit1 = __shfl_sync(ALL, unit, 8 * t + 4);
        scale_query(raw_query, down * pow2(kexp));
    }
    Row seer[2];
    if constexpr (MASKED) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int query = (row0 + min(2 * t + i, rows - 1)) % queries;
            seer[i].last = PLACE ? 0x7fffffff : length - queries + query;  // a mask by place is causal itself
            seer[i].boundary = num_sinks + (visible ? (int)visible[query] : num_pages) * P;
            seer[i].mask = mask ? mask + batch * mask_batch + query * mask_query : nullptr;
        }
    }
    // With one query, which tokens of a page it sees is one bit each, read a page ahead.
    constexpr bool BITS = MASKED == 2;
    u8 ahead[P / 32];
    u32 seen[P / 32];
#if PLACE
    page_places += batch * place_batch + own * place_head + (i64)kept.x * P;
    exact_places += batch * exact_batch + head * exact_head;
    Place where[P / 32] = {};  // the places themselves another page ahead
    auto look_up = [&](int page) {
        if (!BITS || page >= last) return;
#pragma unroll
        for (int i = 0; i < P / 32; i++) where[i] = page_places[(i64)page * P + 32 * i + lane];
    };
    look_up(first);
#endif
    auto look_ahead = [&](int page) {
        if (!BITS || page >= last) return;
        const u8* at = mask + batch * mask_batch;
#if PLACE
#pragma unroll
        for (int i = 0; i < P / 32; i++) ahead[i] = at[counted(where[i])];
        look_up(page + 1);
#else
        at += num_sinks + page * P + lane;
#pragma unroll
        for (int i = 0; i < P / 32; i++) ahead[i] = at[32 * i];
#endif
    };
    look_ahead(first);
    auto capped = [&](float s) { return SOFTCAP ? softcap * tanhf(s / softcap) : s; };

    float o[DT][4] = {}, z0[VGROUPS] = {}, z1[VGROUPS] = {};
    Softmax sm;
    u32* stage = reinterpret_cast<u32*>(ring + (STAGES - 1) * PAGE);
    for (int unit = first_unit; unit < last_unit; unit++) {
        const bool is_sink = unit < sink_units;
        const int begin = (unit - (is_sink ? 0 : sink_units)) * 16, count = is_sink ? num_sinks : num_tail;
        const u8* const k = is_sink ? sink_k : tail_k;
        const u8* const v = is_sink ? sink_v : tail_v;
#if POOLED
        auto place = [&](int token) {
            const int block = max(0, table[(i64)batch * table_stride + (is_sink ? -1 : num_pages + 1 + token / tail_ring)]);
            return 2 * (block * tail_batch + head * tail_head + (is_sink ? token : token % tail_ring) * tail_token);
        };
#else
        int row = begin;
        if (tail_ring && !is_sink) { row += tail_start; if (row >= tail_ring) row -= tail_ring; }
        const i64 stride = is_sink ? sink_token : tail_token;
        const i64 at = is_sink ? batch * sink_batch + head * sink_head : batch * tail_batch + head * tail_head;
        auto place = [&](int token) { return 2 * (at + (row + token - begin) * stride); };
#endif
        constexpr int LOADS = D / 8;  // of 16 bytes, a row; two rows' worth or more at a time
        uint4 x[LOADS / 2];
#pragma unroll
        for (int i = 0; i < LOADS / 2; i++) {
            const int n = i * 32 + lane, token = begin + n / LOADS;
            x[i] = token < count ? *reinterpret_cast<const uint4*>(v + place(token) + n % LOADS * 16) : make_uint4(0, 0, 0, 0);
        }
        float s[1][4] = {};
        const int lo = begin + min(g, count - 1 - begin), hi = begin + min(g + 8, count - 1 - begin);
        raw_scores(s[0], k + place(lo) + t * (D / 2), k + place(hi) + t * (D / 2), q2);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < LOADS / 2; i++)
            reinterpret_cast<uint4*>(stage)[i * 32 + lane] = make_uint4(element2(x[i].x), element2(x[i].y), element2(x[i].z), element2(x[i].w));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = begin + 8 * (i >> 1) + g, slot = is_sink ? token : length - num_tail + token;
            s[0][i] = capped(s[0][i] * (i & 1 ? unit1 : unit0) * pow2(-kexp));
            if (token >= count) s[0][i] = NEVER;
#if PLACE
            else if (!seer[i & 1].sees(counted(exact_places[slot]))) s[0][i] = NEVER;
#else
            if constexpr (MASKED)
                if ((!is_sink && slot < seer[i & 1].boundary) || !seer[i & 1].sees(slot)) s[0][i] = NEVER;
#endif
        }
        float r0, r1;
        if (sm.update<1>(s, r0, r1)) scale_all(o, r0, r1);
        __syncwarp();
        raw_values(o, (u32)__cvta_generic_to_shared(stage), s[0], lane, true);
    }

    float qsum0[KGROUPS] = {}, qsum1[KGROUPS] = {};
    if constexpr (KTOK && !KRAW) {  // sums of q over each channel group, for the zero points
#pragma unroll
        for (int grp = 0; grp < KGROUPS; grp++) {
            float c[4] = {};
#pragma unroll
            for (int ks = 0; ks < DT; ks++) {
                const bool a = (t * (D / 4) + 4 * ks) * KGROUPS / D == grp, b = (t * (D / 4) + 4 * ks + 2) * KGROUPS / D == grp;
                const u32 one = bits(both(1.f));
                mma(c, one, one, one, one, a ? bits(q2[2 * ks]) : 0u, b ? bits(q2[2 * ks + 1]) : 0u);
            }
            qsum0[grp] = c[0] * pow2(-kexp); qsum1[grp] = c[1] * pow2(-kexp);
        }
    }

    if constexpr (!VRAW && !VCH) scale_all(o, pow2(vexp - VUNIT), pow2(vexp - VUNIT));  // to units of codes and scaled weights
    for (int page = first; page < last; page++) {
        __syncwarp();
        if (page > first || !is_free) fetch(page + STAGES - 1);
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1));
        __syncwarp();
        const u8* rec = ring + ((page - first) % STAGES) * PAGE;
        u32 all_seen = ALL;
        if constexpr (BITS) {
#pragma unroll
            for (int i = 0; i < P / 32; i++) { seen[i] = __ballot_sync(ALL, ahead[i]); all_seen &= seen[i]; }
            look_ahead(page + 1);
        }

        float s[MT][4] = {};
        if constexpr (KRAW) {
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const u8* lo = rec + 2 * ((16 * m + g) * D + t * (D / 4));
                raw_scores(s[m], lo, lo + 2 * 8 * D, q2);
#pragma unroll
                for (int i = 0; i < 4; i++) s[m][i] *= (i & 1 ? unit1 : unit0) * pow2(-kexp);
            }
        } else if constexpr (KTOK) {
            const float kunit = pow2(KUNIT - kexp);
#pragma unroll
            for (int grp = 0; grp < KGROUPS; grp++) {
                float part[MT][4] = {};
#if KPOINTS
                point_scores<KB0, KB1>(part, rec, key_points, q2, lane, 0, MT, grp, KGROUPS);
#else
                code_scores<KB0, 0>(part, rec, q2, lane, 0, MT, grp, KGROUPS);
                if constexpr (KB1 > 0) code_scores<KB1 ? KB1 : 1, KB0>(part, rec + P * D * KB0 / 8, q2, lane, 0, MT, grp, KGROUPS);
#endif
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int a = 0; a < 2; a++) {
                        const int token = grp * P + 16 * m + 8 * a + g;
                        float scale, zero;
                        if constexpr (KSYM) {
                            scale = __half2float(reinterpret_cast<const __half*>(rec + KCODES)[token]);
                            zero = KZERO * scale;
                        } else {
                            const half2 pair = reinterpret_cast<const half2*>(rec + KCODES)[token];
                            scale = __low2float(pair); zero = __high2float(pair);
                        }
                        s[m][2 * a] += (part[m][2 * a] * kunit * scale + zero * qsum0[grp]) * unit0;
                        s[m][2 * a + 1] += (part[m][2 * a + 1] * kunit * scale + zero * qsum1[grp]) * unit1;
                    }
            }
        } else {
            u32 scales[KGROUPS][PAIRS];
            half2 most = both(0.f);
#pragma unroll
            for (int grp = 0; grp < KGROUPS; grp++) {
                load_channels(scales[grp], rec + KCODES + 2 * (grp * D + t * (D / 4)));
#pragma unroll
                for (int p = 0; p < PAIRS; p++) most = __hmax2(most, as_half2(scales[grp][p]));
            }
            // Keep the largest product within 2^0 .. 2^6: weights of the second plane fit above it, small ones below.
            const int own_most = max(__half_as_ushort(__low2half(most)), __half_as_ushort(__high2half(most)));
            if (__any_sync(ALL, own_most >= (21 - kexp) << 10) || __all_sync(ALL, own_most < (15 - kexp) << 10)) {
                const int top = ((int)__reduce_max_sync(ALL, (u32)own_most) >> 10) - 14;  // scales < 2^top
                kexp = min(4 - top, 14);
                u32 raw[PAIRS];
                load_query(raw);
                scale_query(raw, down * pow2(kexp));
            }
            const float kunit = pow2(KUNIT - kexp), zunit = pow2(-kexp);
            float zs[KGROUPS][4] = {};
#pragma unroll
            for (int grp = 0; grp < KGROUPS; grp++) {
                half2 qs[PAIRS];
#pragma unroll
                for (int p = 0; p < PAIRS; p++) qs[p] = __hmul2(q2[p], as_half2(scales[grp][p]));
                if constexpr (KSYM && KPOINTS) {  // no zero points at all
                } else if constexpr (KSYM) {
#pragma unroll
                    for (int ks = 0; ks < DT; ks++) {
                        const u32 half_levels = bits(both(KZERO));
                        mma(zs[grp], half_levels, half_levels, half_levels, half_levels, bits(qs[2 * ks]), bits(qs[2 * ks + 1]));
                    }
                } else {
                    u32 z[PAIRS];
                    load_channels(z, rec + KCODES + 2 * (KGROUPS * D + grp * D + t * (D / 4)));
#pragma unroll
                    for (int ks = 0; ks < DT; ks++)
                        mma(zs[grp], z[2 * ks], z[2 * ks], z[2 * ks + 1], z[2 * ks + 1], bits(q2[2 * ks]), bits(q2[2 * ks + 1]));
                }
                constexpr int OWN = MT / KGROUPS;
#if KPOINTS
                point_scores<KB0, KB1>(s, rec, key_points, qs, lane, grp * OWN, OWN, 0, 1);
#else
                code_scores<KB0, 0>(s, rec, qs, lane, grp * OWN, OWN, 0, 1);
                if constexpr (KB1 > 0) code_scores<KB1 ? KB1 : 1, KB0>(s, rec + P * D * KB0 / 8, qs, lane, grp * OWN, OWN, 0, 1);
#endif
            }
            const float f0 = unit0 * kunit, f1 = unit1 * kunit, e0 = unit0 * zunit, e1 = unit1 * zunit;
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const float* z = zs[m * KGROUPS / MT];
                s[m][0] = s[m][0] * f0 + z[0] * e0; s[m][1] = s[m][1] * f1 + z[1] * e1;
                s[m][2] = s[m][2] * f0 + z[0] * e0; s[m][3] = s[m][3] * f1 + z[1] * e1;
            }
        }
        if constexpr (SOFTCAP || MASKED == 1) {
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int token = page * P + 16 * m + 8 * (i >> 1) + g;
                    s[m][i] = capped(s[m][i]);
#if PLACE
                    if constexpr (MASKED == 1)
                        if (!seer[i & 1].sees(counted(page_places[token]))) s[m][i] = NEVER;
#else
                    const int slot = num_sinks + token - kept.y * P;
                    if constexpr (MASKED == 1)
                        if (slot >= seer[i & 1].boundary || !seer[i & 1].sees(slot)) s[m][i] = NEVER;
#endif
                }
        }
        if constexpr (BITS)
            if (all_seen != ALL) {
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (!(seen[m / 2] >> (m % 2 * 16 + 8 * (i >> 1) + g) & 1)) s[m][i] = NEVER;
            }
        float r0, r1;
        const bool is_moved = sm.update<MT>(s, r0, r1);

        const u8* vrec = rec + KCODES + KPARAMS;
        if constexpr (VRAW) {
            if (is_moved) scale_all(o, r0, r1);
#pragma unroll
            for (int m = 0; m < MT; m++)
                raw_values(o, (u32)__cvta_generic_to_shared(vrec + 16 * m * D * 2), s[m], lane, false);
        } else if constexpr (VCH) {
            if (is_moved) scale_all(o, r0, r1);
            const __half* scales = reinterpret_cast<const __half*>(vrec + VCODES);
            constexpr int OWN = MT / VGROUPS;
#pragma unroll
            for (int grp = 0; grp < VGROUPS; grp++) {
                float part[DT][4] = {}, sum0 = 0.f, sum1 = 0.f;
#if VPOINTS
                point_values<VB0, VB1>(part, vrec, value_points, s, 256.f, lane, grp * OWN, OWN, 0, DT);
#else
                code_values<VB0, 0>(part, vrec, s, 256.f, lane, grp * OWN, OWN, 0, DT);
                if constexpr (VB1 > 0) code_values<VB1 ? VB1 : 1, VB0>(part, vrec + P * D * VB0 / 8, s, 256.f, lane, grp * OWN, OWN, 0, DT);
#endif
#pragma unroll
                for (int m = grp * OWN; m < grp * OWN + OWN; m++) {  // of the rounded weights, as the codes meet them
                    sum0 += rounded(s[m][0]) + rounded(s[m][2]); sum1 += rounded(s[m][1]) + rounded(s[m][3]);
                }
                sum0 = over_rows(sum0); sum1 = over_rows(sum1);
#pragma unroll
                for (int i = 0; i < 2 * DT; i++) {
                    const int channel = grp * D + 16 * (i >> 1) + 8 * (i & 1) + g;
                    const float scale = __half2float(scales[channel]);
                    const float zero = VSYM ? VZERO * scale : __half2float(scales[VGROUPS * D + channel]);
                    float* c = o[i >> 1] + 2 * (i & 1);
                    const float* x = part[i >> 1] + 2 * (i & 1);
                    c[0] += x[0] * (scale * pow2(VUNIT - 8)) + zero * sum0; c[1] += x[1] * (scale * pow2(VUNIT - 8)) + zero * sum1;
                }
            }
        } else {
            half2 pairs[VGROUPS * MT][2];  // (scale, zero) of the thread's tokens
            u32 most = 0;
#pragma unroll
            for (int i = 0; i < VGROUPS * MT * 2; i++) {
                const int token = i / (2 * MT) * P + 16 * (i / 2 % MT) + 8 * (i & 1) + g;
                if constexpr (VSYM) {
                    const __half scale = reinterpret_cast<const __half*>(vrec + VCODES)[token];
                    pairs[i >> 1][i & 1] = __floats2half2_rn(__half2float(scale), 0.f);
                } else {
                    pairs[i >> 1][i & 1] = reinterpret_cast<const half2*>(vrec + VCODES)[token];
                }
                most = max(most, bits(pairs[i >> 1][i & 1]) & 0x7fffu);
            }
            if (is_moved) {
                scale_all(o, r0, r1);
#pragma unroll
                for (int grp = 0; grp < VGROUPS; grp++) { z0[grp] *= r0; z1[grp] *= r1; }
            }
            if (__any_sync(ALL, (int)most >= (24 - vexp) << 10) || __all_sync(ALL, (int)most < (13 - vexp) << 10)) {
                const int now = min(7 - (((int)__reduce_max_sync(ALL, most) >> 10) - 14), 20);
                scale_all(o, pow2(now - vexp), pow2(now - vexp));
                vexp = now;
            }
            constexpr int OWN = DT / VGROUPS;
#pragma unroll
            for (int grp = 0; grp < VGROUPS; grp++) {
                float ps[MT][4];
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int a = 0; a < 2; a++) {
                        const half2 pair = pairs[grp * MT + m][a];
                        const float scale = __low2float(pair), zero = VSYM ? VZERO * scale : __high2float(pair);
                        ps[m][2 * a] = s[m][2 * a] * scale; ps[m][2 * a + 1] = s[m][2 * a + 1] * scale;
                        z0[grp] += s[m][2 * a] * zero; z1[grp] += s[m][2 * a + 1] * zero;
                    }
#if VPOINTS
                point_values<VB0, VB1>(o, vrec, value_points, ps, pow2(vexp), lane, 0, MT, grp * OWN, OWN);
#else
                code_values<VB0, 0>(o, vrec, ps, pow2(vexp), lane, 0, MT, grp * OWN, OWN);
                if constexpr (VB1 > 0) code_values<VB1 ? VB1 : 1, VB0>(o, vrec + P * D * VB0 / 8, ps, pow2(vexp), lane, 0, MT, grp * OWN, OWN);
#endif
            }
        }
    }
    if constexpr (!VRAW && !VCH) {  // back to true units, zero points included
        const float vunit = pow2(VUNIT - vexp);
#pragma unroll
        for (int grp = 0; grp < VGROUPS; grp++) { z0[grp] = over_rows(z0[grp]); z1[grp] = over_rows(z1[grp]); }
#pragma unroll
        for (int i = 0; i < DT; i++) {
            const float a = z0[i * VGROUPS / DT], b = z1[i * VGROUPS / DT];
            o[i][0] = o[i][0] * vunit + a; o[i][1] = o[i][1] * vunit + b; o[i][2] = o[i][2] * vunit + a; o[i][3] = o[i][3] * vunit + b;
        }
    }

    // Merge the block's warps, then, in the last block of the row tile, the splits.
    sm.l0 = over_rows(sm.l0); sm.l1 = over_rows(sm.l1);
    __syncthreads();
    float* so = reinterpret_cast<float*>(shared);  // [WARPS][8][PITCH]
    float* sml = so + WARPS * 8 * PITCH;           // [WARPS][8][2]
#pragma unroll
    for (int i = 0; i < DT; i++) {
        float* lo = so + (warp * 8 + 2 * t) * PITCH + 16 * i + g;
        lo[0] = o[i][0]; lo[PITCH] = o[i][1]; lo[8] = o[i][2]; lo[PITCH + 8] = o[i][3];
    }
    if (g == 0) {
        float* ml = sml + (warp * 8 + 2 * t) * 2;
        ml[0] = sm.m0; ml[1] = sm.l0; ml[2] = sm.m1; ml[3] = sm.l1;
    }
    __syncthreads();
#if CLUSTER
    // Results are shared out among the blocks of the cluster, one after the other; every block gets all maxima and sums.
    float2* land_ml = reinterpret_cast<float2*>(shared + LANDING);  // [splits][8]
    float4* land_o = reinterpret_cast<float4*>(land_ml + 8 * splits);  // [own results][splits]
    cluster_wait();
#else
    const i64 tile = (i64)batch * gridDim.y + blockIdx.y;
    float* my_o = part_o + (tile * splits + split) * 8 * D;
    float* my_ml = part_ml + (tile * splits + split) * 16;
#endif
    // A thread has 4 channels of a row, or 8 that are turned back: every split's own, since sums of splits are linear in them.
    constexpr int CHANNELS = VTURNED ? 8 : 4;
    for (int i = threadIdx.x; (VTURNED ? i - lane : i) < rows * D / CHANNELS; i += WARPS * 32) {
        const bool is_there = !VTURNED || i < rows * D / CHANNELS;
        const int r = is_there ? CHANNELS * i / D : 0, c = CHANNELS * i % D;
        float mx = NEVER, l = 0.f, sum[CHANNELS] = {};
#pragma unroll
        for (int w = 0; w < WARPS; w++) mx = fmaxf(mx, sml[(w * 8 + r) * 2]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float f = exp2_(sml[(w * 8 + r) * 2] - mx);
            l += f * sml[(w * 8 + r) * 2 + 1];
#pragma unroll
            for (int e = 0; e < CHANNELS; e += 4) {
                const float4 v = *reinterpret_cast<const float4*>(so + (w * 8 + r) * PITCH + c + e);
                sum[e] += f * v.x; sum[e + 1] += f * v.y; sum[e + 2] += f * v.z; sum[e + 3] += f * v.w;
            }
        }
#if VTURNED
        hadamard_turn_back(sum, c / 8);
        if (!is_there) continue;
#endif
#pragma unroll
        for (int e = 0; e < CHANNELS; e += 4) {
            const int result = (CHANNELS * i + e) / 4;
            const float4 x = make_float4(sum[e], sum[e + 1], sum[e + 2], sum[e + 3]);
#if CLUSTER
            const u32 to = in_block((u32)__cvta_generic_to_shared(land_o + result / splits * splits + split), result % splits);
            asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
            for (int to_block = (c + e) / 4; to_block < splits; to_block += D / 4) {
                const u32 to_ml = in_block((u32)__cvta_generic_to_shared(land_ml + split * 8 + r), to_block);
                asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(to_ml), "f"(mx), "f"(l) : "memory");
            }
#else
            reinterpret_cast<float4*>(my_o)[result] = x;
#endif
        }
#if !CLUSTER
        if (c == 0) { my_ml[2 * r] = mx; my_ml[2 * r + 1] = l; }
#endif
    }
    auto store = [&](int i, float4 x) {  // result i, 4 channels
        const int r = 4 * i / D, row = row0 + r;
        const i64 to = (((i64)batch * queries + row % queries) * query_heads + head * group + row / queries) * D + 4 * i % D;
#if BF16
        __nv_bfloat162* at = reinterpret_cast<__nv_bfloat162*>(out + 2 * to);
        at[0] = __floats2bfloat162_rn(x.x, x.y); at[1] = __floats2bfloat162_rn(x.z, x.w);
#else
        half2* at = reinterpret_cast<half2*>(out + 2 * to);
        at[0] = __floats2half2_rn(x.x, x.y); at[1] = __floats2half2_rn(x.z, x.w);
#endif
    };
    auto store_lse = [&](int r, float mx, float l) {
        const int row = row0 + r, h = head * group + row / queries;
        lse[((i64)batch * query_heads + h) * queries + row % queries] = (mx + log2f(l)) * 0.6931471805599453f;
    };
#if CLUSTER
    cluster_arrive();
    cluster_wait();
    for (int own_i = threadIdx.x; own_i * splits + split < rows * D / 4; own_i += WARPS * 32) {
        const int i = own_i * splits + split, r = 4 * i / D;
        const float sink = sink_logits ? sink_logits[head * group + (row0 + r) / queries] * 1.4426950408889634f : NEVER;
        float mx = sink, l = 0.f;
        for (int k = 0; k < splits; k++) mx = fmaxf(mx, land_ml[k * 8 + r].x);
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 2
        for (int k = 0; k < splits; k++) {
            const float2 ml = land_ml[k * 8 + r];
            const float4 v = land_o[own_i * splits + k];
            const float f = exp2_(ml.x - mx);
            l += f * ml.y; x.x += f * v.x; x.y += f * v.y; x.z += f * v.z; x.w += f * v.w;
        }
        if (sink_logits) l += exp2_(sink - mx);  // only the sum knows of it
        store(i, make_float4(x.x / l, x.y / l, x.z / l, x.w / l));
        if (lse && 4 * i % D == 0) store_lse(r, mx, l);
    }
#else
    __syncthreads();
    int* ticket = reinterpret_cast<int*>(shared);
    if (threadIdx.x == 0) {
        __threadfence();
        *ticket = atomicAdd(turn + tile, 1);
    }
    __syncthreads();
    const bool is_last = *ticket == splits - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (threadIdx.x == 0) turn[tile] = 0;

    // The first partial results are on their way while their weights are worked out.
    constexpr int AHEAD = 16;
    const float4* all_o = reinterpret_cast<const float4*>(part_o + tile * splits * 8 * D);
    const int mine = min((int)threadIdx.x, rows * D / 4 - 1);
    float4 early[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) early[k] = __ldcg(all_o + (i64)min(k, splits - 1) * 2 * D + mine);

    float* weights = reinterpret_cast<float*>(shared);  // [8][splits]
    const float* all_ml = part_ml + tile * splits * 16;
    for (int r = warp; r < rows; r += WARPS) {
        const int h = head * group + (row0 + r) / queries;
        float mx = sink_logits ? sink_logits[h] * 1.4426950408889634f : NEVER, l = 0.f;  // a sink is in the sum alone
        const float sink = mx;
        for (int i = lane; i < splits; i += 32) {
            const float2 ml = __ldcg(reinterpret_cast<const float2*>(all_ml + i * 16 + 2 * r));
            const float top = fmaxf(mx, ml.x);
            l = l * exp2_(mx - top) + ml.y * exp2_(ml.x - top);
            weights[r * splits + i] = ml.x;
            mx = top;
        }
        const float own = mx;
#pragma unroll
        for (int k = 1; k < 32; k *= 2) mx = fmaxf(mx, __shfl_xor_sync(ALL, mx, k));
        l *= exp2_(own - mx);
#pragma unroll
        for (int k = 1; k < 32; k *= 2) l += __shfl_xor_sync(ALL, l, k);
        if (sink_logits) l += exp2_(sink - mx);
        for (int i = lane; i < splits; i += 32) weights[r * splits + i] = exp2_(weights[r * splits + i] - mx) / l;
        if (lse && lane == 0) store_lse(r, mx, l);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * D / 4; i += WARPS * 32) {
        const int r = 4 * i / D;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        auto add = [&](const float4& v, float f) { sum.x += f * v.x; sum.y += f * v.y; sum.z += f * v.z; sum.w += f * v.w; };
        int k = 0;
        if (i == mine) {
#pragma unroll
            for (; k < AHEAD; k++) add(early[k], k < splits ? weights[r * splits + k] : 0.f);
        }
#pragma unroll 8
        for (; k < splits; k++) add(__ldcg(all_o + (i64)k * 2 * D + i), weights[r * splits + k]);
        store(i, sum);
    }
#endif
}
