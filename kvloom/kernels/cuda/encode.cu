// Packs whole pages: one block quantises the keys or the values of one page and KV head and writes its part of the record.
// Appends a token to a cache of fixed size, and packs the page that becomes full by it, in one launch.
//
// A block reads its elements once, into registers: a lane holds 4 tokens (a "quad") or 8 of one or more 16-byte vectors of
// channels. Extremes are reduced, codes go to shared memory as bytes, and every thread gathers 16-byte pieces of the planes.
// The quad s, t is tokens 16s + 2t + {0, 1, 8, 9}: the four columns of a value plane that lie together in a lane's fields
// (kvloom/pages/_fragment.py).
//
// Defines: PAGE_TOKENS, HEAD_DIM, ELEMENT (float, __half, __nv_bfloat16), WARPS, CHANNEL_TILE (channels of a warp in
// per_channel groups), VALUE_OFFSET (first byte of the values), and for KEY and VALUE: _BITS, _LOW_BITS (of the first plane),
// _LOW_TILES, _HIGH_TILES (tiles of a chunk, by plane), _PER_CHANNEL, _GROUP, _SYMMETRIC, _CODEC (a name in capitals), _ROTATED
// (what is appended is to be turned; then those of hadamard.cuh, too). APPEND: which of the two kernels. ROPED: keys that are
// appended have no positions yet.
//
// Codecs that search for a group's grid keep its elements in the registers of a few lanes, see `quantise_by_search`.
//
// Codes of AFFINE and NUQ are the reference's bit for bit (compile without -use_fast_math, -ftz or -prec-div=false); those of
// CLIPPED and LLOYD, too, unless two grids' errors are equal but for rounding.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned char u8;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#include "follow.cuh"
#include "points.cuh"
#include "rope.cuh"
#if APPEND && (KEY_ROTATED || VALUE_ROTATED)
#include "hadamard.cuh"
#endif

enum Codec { AFFINE, CLIPPED, LLOYD, NUQ };

constexpr int THREADS = WARPS * 32, P = PAGE_TOKENS, D = HEAD_DIM;
constexpr int V = 16 / sizeof(ELEMENT);  // elements of a 16-byte vector
constexpr bool IS_WIDE = sizeof(ELEMENT) == 4;
constexpr float FP16_MAX = 65504.f;
constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded, half to even

template <bool IS_KEY_, int BITS_, int LOW_BITS_, int LOW_TILES_, int HIGH_TILES_, bool PER_CHANNEL_, int GROUP_, bool SYMMETRIC_,
          Codec CODEC_, bool ROTATED_>
struct Side {
    static constexpr bool IS_KEY = IS_KEY_, PER_CHANNEL = PER_CHANNEL_, SYMMETRIC = SYMMETRIC_, ROTATED = ROTATED_;
    static constexpr Codec CODEC = CODEC_;
    static constexpr int BITS = BITS_, LOW_BITS = LOW_BITS_, HIGH_BITS = BITS_ - LOW_BITS_, GROUP = GROUP_;
    static constexpr int LOW_TILES = LOW_TILES_, HIGH_TILES = HIGH_TILES_;
    static constexpr int LEVELS = (1 << BITS) - 1;
    static constexpr int ROWS = IS_KEY ? P : D, COLS = IS_KEY ? D : P;
    static constexpr int PITCH = COLS + 4;  // bytes of a row of codes in shared memory; odd in words, against bank conflicts
    static constexpr int PARAMS = P * D * BITS / 8, SCRATCH = ROWS * PITCH;
};
typedef Side<true, KEY_BITS, KEY_LOW_BITS, KEY_LOW_TILES, KEY_HIGH_TILES, KEY_PER_CHANNEL, KEY_GROUP, KEY_SYMMETRIC, KEY_CODEC,
             KEY_ROTATED>
    Keys;
typedef Side<false, VALUE_BITS, VALUE_LOW_BITS, VALUE_LOW_TILES, VALUE_HIGH_TILES, VALUE_PER_CHANNEL, VALUE_GROUP, VALUE_SYMMETRIC,
             VALUE_CODEC, VALUE_ROTATED>
    Values;

// 16 bytes of elements; the overloads' last argument only says how a word is to be read.
struct Vector {
    u32 word[4];
};

template <class T> __device__ __forceinline__ u32 bits_of(T x) { return *reinterpret_cast<u32*>(&x); }
__device__ __forceinline__ __half2 as_half2(u32 w) { return *reinterpret_cast<__half2*>(&w); }
__device__ __forceinline__ __nv_bfloat162 as_bfloat162(u32 w) { return *reinterpret_cast<__nv_bfloat162*>(&w); }

__device__ __forceinline__ u32 lower(u32 a, u32 b, float) { return __float_as_uint(fminf(__uint_as_float(a), __uint_as_float(b))); }
__device__ __forceinline__ u32 upper(u32 a, u32 b, float) { return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b))); }
__device__ __forceinline__ u32 lower(u32 a, u32 b, __half) { return bits_of(__hmin2_nan(as_half2(a), as_half2(b))); }
__device__ __forceinline__ u32 upper(u32 a, u32 b, __half) { return bits_of(__hmax2_nan(as_half2(a), as_half2(b))); }
__device__ __forceinline__ u32 lower(u32 a, u32 b, __nv_bfloat16) { return bits_of(__hmin2_nan(as_bfloat162(a), as_bfloat162(b))); }
__device__ __forceinline__ u32 upper(u32 a, u32 b, __nv_bfloat16) { return bits_of(__hmax2_nan(as_bfloat162(a), as_bfloat162(b))); }

// Whether a word holds NaN, infinity or a magnitude above 65504. `LEAST` is the bits of the smallest such magnitude; adding
// what it lacks to 2^15 carries into the (cleared) sign bits.
template <u32 LEAST> __device__ __forceinline__ bool reaches(u32 pair) {
    return (((pair & 0x7fff7fffu) + (0x8000u - LEAST) * 0x00010001u) & 0x80008000u) != 0;
}
__device__ __forceinline__ bool is_beyond(u32 w, float) { return !(fabsf(__uint_as_float(w)) <= FP16_MAX); }
__device__ __forceinline__ bool is_beyond(u32 w, __half) { return reaches<0x7c00>(w); }
__device__ __forceinline__ bool is_beyond(u32 w, __nv_bfloat16) { return reaches<0x4780>(w); }

__device__ __forceinline__ float number(const Vector& x, int i, float) { return __uint_as_float(x.word[i]); }
__device__ __forceinline__ float number(const Vector& x, int i, __half) {
    return i % 2 ? __high2float(as_half2(x.word[i / 2])) : __low2float(as_half2(x.word[i / 2]));
}
__device__ __forceinline__ float number(const Vector& x, int i, __nv_bfloat16) {
    return __uint_as_float(i % 2 ? x.word[i / 2] & 0xffff0000u : x.word[i / 2] << 16);
}
__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(__half x) { return __half2float(x); }
__device__ __forceinline__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ Vector load(const ELEMENT* at) {
    const uint4 v = __ldcs(reinterpret_cast<const uint4*>(at));
    return {{v.x, v.y, v.z, v.w}};
}

// Extremes of `COUNT` vectors, place by place. NaN stays NaN in 16-bit elements and is looked for one by one in float.
template <int COUNT> struct Extremes {
    Vector low, high;
    __device__ __forceinline__ Extremes(const Vector (&x)[COUNT], bool& is_bad) : low(x[0]), high(x[0]) {
#pragma unroll
        for (int n = 1; n < COUNT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                low.word[i] = lower(low.word[i], x[n].word[i], ELEMENT());
                high.word[i] = upper(high.word[i], x[n].word[i], ELEMENT());
            }
#pragma unroll
        for (int n = 0; n < (IS_WIDE ? COUNT : 1); n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (IS_WIDE) is_bad |= is_beyond(x[n].word[i], ELEMENT());
                else is_bad |= is_beyond(low.word[i], ELEMENT()) || is_beyond(high.word[i], ELEMENT());
            }
    }
};

struct Grid {
    float zero, scale, inverse;
};

// kvloom/codecs/_affine.py: the zero point rounds down, the scale up, so that the grid covers the group.
template <class S> struct Params {
    __half scale, zero;
    __device__ __forceinline__ Params(float low, float high) {
        float step;
        if (S::SYMMETRIC) {
            constexpr float FACTOR = (float)(2.0 / S::LEVELS);
            step = __fmul_rn(fmaxf(fabsf(low), fabsf(high)), FACTOR);
            zero = __float2half_rn(0.f);
        } else {
            zero = __float2half_rd(__fadd_rn(low, 0.f));  // -0 becomes +0, as in the reference
            constexpr float PART = 1.f / S::LEVELS;  // corrected once: the rounded quotient, for every significand
            const float whole = __fsub_rn(high, __half2float(zero)), near = __fmul_rn(whole, PART);
            step = __fmaf_rn(__fmaf_rn(-near, (float)S::LEVELS, whole), PART, near);
        }
        scale = __float2half_ru(fminf(step, FP16_MAX));
    }
    __device__ __forceinline__ Grid grid() const {
        const float s = __half2float(scale);
        const float z = S::SYMMETRIC ? __fmul_rn(s, -0.5f * S::LEVELS) : __half2float(zero);
        return {z, s, s > 0.f ? __frcp_rn(s) : 0.f};
    }
};

// The code of x in the low byte of the result. The quotient is the correctly rounded one: a product with the rounded
// reciprocal and one correction equal the division for every fp32 x and every fp16 scale (checked over all significands).
template <class S> __device__ __forceinline__ u32 code(float x, const Grid& grid) {
    const float a = __fsub_rn(x, grid.zero);
    const float near = __fmul_rn(a, grid.inverse);
    float quotient = __fmaf_rn(__fmaf_rn(-near, grid.scale, a), grid.inverse, near);
    if (S::CODEC == CLIPPED) quotient = fminf(fmaxf(quotient, 0.f), (float)S::LEVELS);
    else if (S::LEVELS == 1) quotient = fminf(quotient, 1.f);  // only there a scale above 65504 is cut off
    return __float_as_uint(__fadd_rn(quotient, ROUND));
}

__device__ __forceinline__ u32 low_bytes(const u32 (&x)[4]) {
    return __byte_perm(__byte_perm(x[0], x[1], 0x0040), __byte_perm(x[2], x[3], 0x0040), 0x5410);
}

__device__ __forceinline__ constexpr int quad_token(int quad, int i) { return quad / 4 * 16 + quad % 4 * 2 + i % 2 + i / 2 * 8; }

// Codes of 4 channels of a quad to shared memory: rows are a plane's rows, columns are in the order of a lane's fields.
template <class S> __device__ __forceinline__ void put(u8* codes, int quad, int channel, const u32 (&code)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 by_channel[4] = {code[0][i], code[1][i], code[2][i], code[3][i]};
        u8* at = S::IS_KEY ? codes + quad_token(quad, i) * S::PITCH + channel
                           : codes + (channel + i) * S::PITCH + quad % 4 * (P / 4) + quad / 4 * 4;
        *reinterpret_cast<u32*>(at) = low_bytes(S::IS_KEY ? code[i] : by_channel);
    }
}

// Groups of tokens. A warp takes 64 tokens x CHANNEL_TILE channels at a time; a larger group is shared by its warps.
template <class S> __device__ __forceinline__ bool quantise_per_channel(const ELEMENT* x, i64 stride, u8* record, u8* codes) {
    constexpr int COLUMNS = CHANNEL_TILE / V, LANE_ROWS = 32 / COLUMNS, QUADS = 16 / LANE_ROWS;  // of a warp; quads of a lane
    constexpr int TALL = (S::GROUP > 64 ? S::GROUP : 64) / 64, ACROSS = WARPS / TALL;
    constexpr int TOKENS = 64 * TALL, CHANNELS = CHANNEL_TILE * ACROSS, GROUPS = TOKENS / S::GROUP, SHARERS = S::GROUP / (4 * QUADS);
    static_assert(WARPS % TALL == 0 && P % TOKENS == 0, "a block's warps hold whole groups");
    Vector* lows = reinterpret_cast<Vector*>(codes + S::SCRATCH);
    Vector* highs = lows + THREADS;
    Grid* grids = reinterpret_cast<Grid*>(highs + THREADS);
    __half* params = reinterpret_cast<__half*>(record + S::PARAMS);
    const int tid = threadIdx.x, warp = tid / 32, lane_row = tid % 32 / COLUMNS + warp % TALL * LANE_ROWS;
    const int unit_channel = warp / TALL * CHANNEL_TILE + tid % COLUMNS * V;
    bool is_bad = false;
    for (int first_token = 0; first_token < P; first_token += TOKENS)
        for (int first_channel = 0; first_channel < D; first_channel += CHANNELS) {
            const int channel = first_channel + unit_channel;
            const bool is_active = D % CHANNELS == 0 || channel < D;
            Vector raw[4 * QUADS];
            if (is_active) {
#pragma unroll
                for (int i = 0; i < 4 * QUADS; i++)
                    raw[i] = load(x + (first_token + quad_token(lane_row * QUADS + i / 4, i % 4)) * stride + channel);
                const Extremes<4 * QUADS> extremes(raw, is_bad);
                lows[tid] = extremes.low;
                highs[tid] = extremes.high;
            }
            __syncthreads();
            for (int task = tid; task < GROUPS * CHANNELS; task += THREADS) {
                const int group = task / CHANNELS, own = task % CHANNELS;
                if (D % CHANNELS != 0 && first_channel + own >= D) continue;
                float low = 0.f, high = 0.f;
#pragma unroll 8
                for (int i = 0; i < SHARERS; i++) {
                    const int row = group * SHARERS + i, holder = own / CHANNEL_TILE * TALL + row / LANE_ROWS;
                    const int at = (holder * LANE_ROWS + row % LANE_ROWS) * CHANNEL_TILE + own % CHANNEL_TILE;
                    const float l = number(reinterpret_cast<const ELEMENT*>(lows)[at]);
                    const float h = number(reinterpret_cast<const ELEMENT*>(highs)[at]);
                    low = i ? fminf(low, l) : l;
                    high = i ? fmaxf(high, h) : h;
                }
                const Params<S> own_params(low, high);
                grids[task] = own_params.grid();
                const int at = (first_token / S::GROUP + group) * D + first_channel + own;
                params[at] = own_params.scale;
                if (!S::SYMMETRIC) params[P / S::GROUP * D + at] = own_params.zero;
            }
            __syncthreads();
            if (is_active) {
                const Grid* own = grids + lane_row / SHARERS * CHANNELS + unit_channel;
#pragma unroll
                for (int block = 0; block < V / 4; block++) {
                    Grid grid[4];
#pragma unroll
                    for (int k = 0; k < 4; k++) grid[k] = own[4 * block + k];
#pragma unroll
                    for (int q = 0; q < QUADS; q++) {
                        u32 c[4][4];
#pragma unroll
                        for (int i = 0; i < 16; i++)
                            c[i / 4][i % 4] = code<S>(number(raw[4 * q + i / 4], 4 * block + i % 4, ELEMENT()), grid[i % 4]);
                        put<S>(codes, first_token / 4 + lane_row * QUADS + q, channel + 4 * block, c);
                    }
                }
            }
        }
    return is_bad;
}

// Lanes that share a group of so many vectors: as few as leave each at most three.
__host__ __device__ constexpr int sharers(int vectors) {
    int lanes = 1;
    while (lanes * 3 < vectors) lanes *= 2;
    return lanes;
}

// Groups of channels. The lanes of a group hold a quad of tokens; each computes the parameters of one of the tokens.
template <class S> __device__ __forceinline__ bool quantise_per_token(const ELEMENT* x, i64 stride, u8* record, u8* codes) {
    constexpr int VECTORS = S::GROUP / V, LANES = sharers(VECTORS), OWN = (VECTORS + LANES - 1) / LANES;
    constexpr int GROUPS = D / S::GROUP, TOTAL = P / 4 * GROUPS * LANES, SPREAD = LANES < 4 ? LANES : 4;
    __half* params = reinterpret_cast<__half*>(record + S::PARAMS);
    const int lane = threadIdx.x % 32;
    bool is_bad = false;
    for (int first = threadIdx.x - lane; first < TOTAL; first += THREADS) {
        const int at = min(first + lane, TOTAL - 1);  // spare lanes do the last one's work again
        const int group = at / LANES % GROUPS, quad = at / LANES / GROUPS;
        int channel[OWN];
#pragma unroll
        for (int n = 0; n < OWN; n++) channel[n] = group * S::GROUP + min(n * LANES + at % LANES, VECTORS - 1) * V;
        Vector raw[4][OWN];
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int n = 0; n < OWN; n++) raw[i][n] = load(x + quad_token(quad, i) * stride + channel[n]);
        float low[4], high[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            Extremes<OWN> extremes(raw[i], is_bad);
#pragma unroll
            for (int k = 1; k < 4; k++) {
                extremes.low.word[0] = lower(extremes.low.word[0], extremes.low.word[k], ELEMENT());
                extremes.high.word[0] = upper(extremes.high.word[0], extremes.high.word[k], ELEMENT());
            }
            low[i] = fminf(number(extremes.low, 0, ELEMENT()), number(extremes.low, IS_WIDE ? 0 : 1, ELEMENT()));
            high[i] = fmaxf(number(extremes.high, 0, ELEMENT()), number(extremes.high, IS_WIDE ? 0 : 1, ELEMENT()));
#pragma unroll
            for (int step = 1; step < LANES; step *= 2) {
                low[i] = fminf(low[i], __shfl_xor_sync(~0u, low[i], step));
                high[i] = fmaxf(high[i], __shfl_xor_sync(~0u, high[i], step));
            }
        }
        Grid grid[4];
#pragma unroll
        for (int k = 0; k < 4; k += SPREAD) {
            float own_low = low[k], own_high = high[k];
            const int mine = at % SPREAD;
#pragma unroll
            for (int i = 1; i < SPREAD; i++) {
                own_low = mine == i ? low[k + i] : own_low;
                own_high = mine == i ? high[k + i] : own_high;
            }
            const Params<S> own(own_low, own_high);
            const int slot = group * P + quad_token(quad, k + mine);
            if (at % LANES < SPREAD) {
                if (S::SYMMETRIC) params[slot] = own.scale;
                else reinterpret_cast<__half2*>(params)[slot] = __halves2half2(own.scale, own.zero);
            }
            const Grid own_grid = own.grid();
#pragma unroll
            for (int i = 0; i < SPREAD; i++) {
                const int source = lane / SPREAD * SPREAD + i;
                grid[k + i] = {__shfl_sync(~0u, own_grid.zero, source), __shfl_sync(~0u, own_grid.scale, source),
                               __shfl_sync(~0u, own_grid.inverse, source)};
            }
        }
#pragma unroll
        for (int n = 0; n < OWN; n++)
#pragma unroll
            for (int block = 0; block < V / 4; block++) {
                u32 c[4][4];
#pragma unroll
                for (int i = 0; i < 16; i++)
                    c[i / 4][i % 4] = code<S>(number(raw[i / 4][n], 4 * block + i % 4, ELEMENT()), grid[i / 4]);
                put<S>(codes, quad, channel[n] + 4 * block, c);
            }
    }
    return is_bad;
}

// Lanes that share a group: as few as leave each at most `most` elements.
__host__ __device__ constexpr int team_lanes(int group, int most) {
    int lanes = 1;
    while (lanes * most < group && group % (2 * lanes) == 0) lanes *= 2;
    return lanes;
}

// A group in the registers of its lanes. In per_channel groups neighbouring lanes have neighbouring channels, else elements.
// What a lane does once for each of many grids is little beside 64 elements of few bits (timed: 652 us at 2 bits where 32
// take 739; at 4 bits 852 and 750); Lloyd-Max has two grids, and much to unroll.
template <class S> struct Team {
    static constexpr int MOST = S::CODEC != CLIPPED ? 31 : S::BITS < 4 ? 64 : 32;
    static constexpr int LANES = team_lanes(S::GROUP, MOST), OWN = S::GROUP / LANES;
    static constexpr int TEAMS = 32 / LANES, STEP = S::PER_CHANNEL ? TEAMS : 1;
    float x[OWN];

    template <class T, class F> static __device__ __forceinline__ T reduced(T own, F join) {
#pragma unroll
        for (int step = STEP; step < STEP * LANES; step *= 2) own = join(own, __shfl_xor_sync(~0u, own, step));
        return own;
    }
    template <class T> static __device__ __forceinline__ T sum(T own) {
        return reduced(own, [](T a, T b) { return a + b; });
    }
    __device__ __forceinline__ float low() const {
        float own = x[0];
#pragma unroll
        for (int i = 1; i < OWN; i++) own = fminf(own, x[i]);
        return reduced(own, [](float a, float b) { return fminf(a, b); });
    }
    __device__ __forceinline__ float high() const {
        float own = x[0];
#pragma unroll
        for (int i = 1; i < OWN; i++) own = fmaxf(own, x[i]);
        return reduced(own, [](float a, float b) { return fmaxf(a, b); });
    }
};

__device__ __forceinline__ __half half_near(double x) { return __double2half(fmin(fmax(x, -(double)FP16_MAX), (double)FP16_MAX)); }

// kvloom/codecs/_clipped.py: of the grids of clipped ranges, the one of the least squared error.
template <class S> struct ClipSearch {
    const Team<S>& team;
    float low, high, spread;  // of the whole range
    float best_low, best_high, error;  // of the best grid so far
    Params<S> best;

    static constexpr int PLACES = 8, TURNS = S::SYMMETRIC ? 1 : 3, REFITS = 2;
    static constexpr double LARGEST = 1.0 / S::LEVELS < 0.35 ? 1.0 / S::LEVELS : 0.35;

    __device__ __forceinline__ ClipSearch(const Team<S>& team, float least, float most)
        : team(team), low(S::SYMMETRIC ? -fmaxf(fabsf(least), fabsf(most)) : least),
          high(S::SYMMETRIC ? fmaxf(fabsf(least), fabsf(most)) : most), spread(high - low), best_low(low), best_high(high),
          error(3.4e38f), best(low, high) {}
    // Six instructions an element. Quotients miss 2^-21 of their size, which matters only half-way between two codes, where both
    // have the same error. Elements' distances from zero miss 2^-24 of theirs, a sum of 64 squares 64 * 2^-24 of its own.
    __device__ __forceinline__ float squared_error(const Params<S>& params) const {
        const float scale = __half2float(params.scale), part = scale > 0.f ? __fdividef(1.f / S::LEVELS, scale) : 0.f;
        const float zero = S::SYMMETRIC ? -0.5f * S::LEVELS * scale : __half2float(params.zero);
        float own = 0.f;
#pragma unroll
        for (int i = 0; i < Team<S>::OWN; i++) {
            const float from = __fsub_rn(team.x[i], zero);
            const float near = __fsub_rn(__fmaf_rn(__saturatef(__fmul_rn(from, part)), (float)S::LEVELS, ROUND), ROUND);
            const float off = __fmaf_rn(near, -scale, from);
            own = __fmaf_rn(off, off, own);
        }
        return Team<S>::sum(own);
    }
    __device__ __forceinline__ bool attempt(float from, float to) {
        const Params<S> params(from, to);
        const float own = squared_error(params);
        const bool is_better = own < error;
        if (is_better) {
            error = own;
            best = params;
            best_low = from;
            best_high = to;
        }
        return is_better;
    }
    // Shares of the range to cut off, as constants: divided in fp64 for every grid, they take an eighth of the search.
    __host__ __device__ static constexpr float share(int place) { return (float)(LARGEST * place / (PLACES - 1)); }
    static __device__ __forceinline__ float share_of(int place) {
        constexpr float S1 = share(1), S2 = share(2), S3 = share(3), S4 = share(4), S5 = share(5), S6 = share(6), S7 = share(7);
        const float few = place & 1 ? (place & 2 ? S3 : S1) : (place & 2 ? S2 : 0.f);
        const float more = place & 1 ? (place & 2 ? S7 : S5) : (place & 2 ? S6 : S4);
        return place & 4 ? more : few;
    }
    // Every place of the ends that move in this turn but the one where they are; in the first turn that one, too.
    __device__ __forceinline__ void move(int turn, int& low_place) {
        const bool moves_low = S::SYMMETRIC || turn != 1, moves_high = S::SYMMETRIC || turn == 1;
        const int now = turn == 2 ? low_place : 0;
#pragma unroll 1
        for (int i = turn > 0; i < PLACES; i++) {
            const int place = i - (i > 0 && i <= now);
            const float cut = __fmul_rn(share_of(place), spread);
            const float from = moves_low ? __fadd_rn(low, cut) : best_low, to = moves_high ? __fsub_rn(high, cut) : best_high;
            if (attempt(from, to) && moves_low) low_place = place;
        }
    }
    // The line of least squares through the elements over their codes is the grid's and that of what the grid leaves of them:
    // sums of codes are exact in fp32, and those of what is left need not be, as it is small.
    __device__ __forceinline__ void refit() {
        const Grid grid = best.grid();
        float codes = 0.f, squares = 0.f, offs = 0.f, products = 0.f;
#pragma unroll
        for (int i = 0; i < Team<S>::OWN; i++) {
            const float own = __fsub_rn(__uint_as_float(code<S>(team.x[i], grid)), ROUND);
            const float off = __fmaf_rn(own, -grid.scale, __fsub_rn(team.x[i], grid.zero));
            codes += own;
            squares = __fmaf_rn(own, own, squares);
            offs += off;
            products = __fmaf_rn(off, own, products);
        }
        const double sum = Team<S>::sum(codes), left = Team<S>::sum(offs), about = S::SYMMETRIC ? 0.5 * S::LEVELS : sum / S::GROUP;
        const double product = Team<S>::sum(products) - about * left;
        const double square = Team<S>::sum(squares) - about * (2 * sum - S::GROUP * about);
        const double more = square > 0 ? __fdividef(product, square) : -grid.scale;  // than the grid's slope
        const double start = grid.zero + (S::SYMMETRIC ? 0.0 : left / S::GROUP) - more * about;
        const float most = __fmul_rn((float)LARGEST, spread), end = (float)(start + (grid.scale + more) * S::LEVELS);
        attempt(fminf(fmaxf((float)start, low), __fadd_rn(low, most)), fminf(fmaxf(end, __fsub_rn(high, most)), high));
    }
    __device__ __forceinline__ void run() {
        int low_place = 0;
#pragma unroll 1
        for (int turn = 0; turn < TURNS; turn++) move(turn, low_place);
#pragma unroll 1
        for (int i = 0; i < REFITS; i++) refit();
    }
};

// The code of the point nearest to x, in units of the scale.
template <class S> __device__ __forceinline__ u32 point_code(float x, const float* points) {
    u32 code = 0;
#pragma unroll
    for (int i = 0; i < (S::BITS <= 4 ? S::LEVELS : 0); i++) code += x > (points[i] + points[i + 1]) / 2;
    return code;
}

// kvloom/codecs/_lloyd.py: the root mean square, or the scale of least squares where that has the smaller error.
template <class S> struct LloydFit {
    const Team<S>& team;
    const float* points;

    __device__ __forceinline__ float chosen(float x, float step) const {
        return points[point_code<S>(__fdiv_rn(x, step > 0.f ? step : 1.f), points)];
    }
    __device__ __forceinline__ double squared_error(__half scale) const {
        const float step = __half2float(scale);
        double own = 0;
#pragma unroll
        for (int i = 0; i < Team<S>::OWN; i++) {
            const float off = __fsub_rn(__fmul_rn(chosen(team.x[i], step), step), team.x[i]);
            own += __fmul_rn(off, off);
        }
        return Team<S>::sum(own);
    }
    __device__ __forceinline__ __half scale() const {
        double own = 0, products = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < Team<S>::OWN; i++) own += __fmul_rn(team.x[i], team.x[i]);
        const __half root = half_near(sqrt(Team<S>::sum(own) / S::GROUP));
#pragma unroll
        for (int i = 0; i < Team<S>::OWN; i++) {
            const float point = chosen(team.x[i], __half2float(root));
            products += __fmul_rn(team.x[i], point);
            squares += __fmul_rn(point, point);
        }
        products = Team<S>::sum(products);
        squares = Team<S>::sum(squares);
        const __half fitted = half_near(products / squares);
        return squared_error(fitted) < squared_error(root) ? fitted : root;
    }
};

// Where the code of an element lies in shared memory: see `put`.
template <class S> __device__ __forceinline__ int place(int token, int channel) {
    const int within = token % 16;
    return S::IS_KEY ? token * S::PITCH + channel
                     : channel * S::PITCH + within % 8 / 2 * (P / 4) + token / 16 * 4 + within % 2 + within / 8 * 2;
}

// Groups by teams of lanes; the page is staged in shared memory after the codes.
template <class S>
__device__ __forceinline__ bool quantise_by_search(const ELEMENT* x, i64 stride, u8* record, u8* codes, const Points& codebook) {
    typedef Team<S> T;
    constexpr int PITCH = D + V, TOTAL = P * D / S::GROUP;  // elements of a staged row; groups
    __shared__ float points[16];
    ELEMENT* staged = reinterpret_cast<ELEMENT*>(codes + S::SCRATCH);
    __half* params = reinterpret_cast<__half*>(record + S::PARAMS);
    if (threadIdx.x < 16) points[threadIdx.x] = codebook[threadIdx.x];
    bool is_bad = false;
    for (int v = threadIdx.x; v < P * D / V; v += THREADS) {
        const int token = v / (D / V), channel = v % (D / V) * V;
        const Vector vector = load(x + token * stride + channel);
#pragma unroll
        for (int i = 0; i < 4; i++) is_bad |= is_beyond(vector.word[i], ELEMENT());
        *reinterpret_cast<uint4*>(staged + token * PITCH + channel) = make_uint4(vector.word[0], vector.word[1], vector.word[2], vector.word[3]);
    }
    __syncthreads();
    const int lane = threadIdx.x % 32, part = lane / T::STEP % T::LANES, own = S::PER_CHANNEL ? lane % T::TEAMS : lane / T::LANES;
    for (int first = threadIdx.x / 32 * T::TEAMS; first < TOTAL; first += WARPS * T::TEAMS) {
        const int group = min(first + own, TOTAL - 1);  // spare lanes do the last one's work again
        const int token0 = S::PER_CHANNEL ? group / D * S::GROUP : group / (D / S::GROUP);
        const int channel0 = S::PER_CHANNEL ? group % D : group % (D / S::GROUP) * S::GROUP;
        T team;
#pragma unroll
        for (int i = 0; i < T::OWN; i++) {
            const int at = part + i * T::LANES;
            team.x[i] = number(staged[(token0 + (S::PER_CHANNEL ? at : 0)) * PITCH + channel0 + (S::PER_CHANNEL ? 0 : at)]);
        }
        __half scale, zero = __float2half_rn(0.f);
        if constexpr (S::CODEC == CLIPPED) {
            ClipSearch<S> search(team, team.low(), team.high());
            search.run();
            scale = search.best.scale;
            zero = search.best.zero;
        } else if constexpr (S::CODEC == LLOYD) {
            scale = LloydFit<S>{team, points}.scale();
        } else {  // kvloom/codecs/_nuq.py
            const float low = team.low(), high = team.high();
            zero = half_near(__fadd_rn(__fmul_rn(low, 0.5f), __fmul_rn(high, 0.5f)));
            const float middle = __half2float(zero);
            scale = __float2half_ru(fminf(fmaxf(__fsub_rn(high, middle), __fsub_rn(middle, low)), FP16_MAX));
        }
        if (part == 0) {
            const int slot = S::PER_CHANNEL ? token0 / S::GROUP * D + channel0 : channel0 / S::GROUP * P + token0;
            if (S::SYMMETRIC) params[slot] = scale;
            else if (S::PER_CHANNEL) params[slot] = scale, params[P / S::GROUP * D + slot] = zero;
            else reinterpret_cast<__half2*>(params)[slot] = __halves2half2(scale, zero);
        }
        const float step = __half2float(scale), start = __half2float(zero);
        const Grid grid = {S::SYMMETRIC ? __fmul_rn(step, -0.5f * S::LEVELS) : start, step, step > 0.f ? __frcp_rn(step) : 0.f};
#pragma unroll
        for (int i = 0; i < T::OWN; i++) {
            const int at = part + i * T::LANES;
            u32 c;
            if constexpr (S::CODEC == CLIPPED) c = code<S>(team.x[i], grid);
            else c = point_code<S>(__fdiv_rn(__fsub_rn(team.x[i], start), step > 0.f ? step : 1.f), points);
            codes[place<S>(token0 + (S::PER_CHANNEL ? at : 0), channel0 + (S::PER_CHANNEL ? 0 : at))] = c;
        }
    }
    return is_bad;
}

// One plane: 16 bytes a thread, word by word, two pairs of columns (4 adjacent codes of a row) at a time.
template <class S, int BITS, int SHIFT, int TILES> __device__ __forceinline__ void pack(const u8* codes, u8* plane) {
    constexpr u32 PAIRS = S::COLS / 8, KJ = 16 / BITS, WORDS = TILES * 2 * PAIRS / KJ;  // pairs of a row, of a word; words of a lane
    constexpr u32 BYTES = S::ROWS * S::COLS * BITS / 8, OWN = ((1u << BITS) - 1) * 0x01010101u, TWO = ((1u << 2 * BITS) - 1) * 0x00010001u;
    for (u32 v = threadIdx.x; v < BYTES / 16; v += THREADS) {
        u32 out[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 holder = WORDS % 4 ? (4 * v + i) / WORDS : v / (WORDS % 4 ? 1 : WORDS / 4);
            const u32 w = WORDS % 4 ? (4 * v + i) % WORDS : v % (WORDS % 4 ? 1 : WORDS / 4) * 4 + i;
            const u32 lane = holder % 32, first_row = holder / 32 * TILES * 16 + lane / 4;
            const u8* own = codes + first_row * S::PITCH + lane % 4 * (S::COLS / 4);
            u32 word = 0;
#pragma unroll
            for (u32 q = 0; q < KJ / 2; q++) {
                const u32 stream = PAIRS % KJ ? (w * KJ + 2 * q) / PAIRS : w / (PAIRS % KJ ? 1 : PAIRS / KJ);
                const u32 pair = PAIRS % KJ ? (w * KJ + 2 * q) % PAIRS : w % (PAIRS % KJ ? 1 : PAIRS / KJ) * KJ + 2 * q;
                const u32 four = *reinterpret_cast<const u32*>(own + stream * 8 * S::PITCH + 2 * pair);
                const u32 split = __byte_perm(four, 0, 0x3120) >> SHIFT & OWN;  // first of each pair low, second high
                word |= BITS == 8 ? split : ((split | split >> (8 - BITS)) & TWO) << (2 * BITS * q);
            }
            out[i] = word;
        }
        reinterpret_cast<uint4*>(plane)[v] = make_uint4(out[0], out[1], out[2], out[3]);
    }
}

__device__ __forceinline__ void copy_elements(const ELEMENT* x, i64 stride, u8* record) {
    for (int v = threadIdx.x; v < P * D / V; v += THREADS)
        reinterpret_cast<uint4*>(record)[v] = __ldcs(reinterpret_cast<const uint4*>(x + v / (D / V) * stride + v % (D / V) * V));
}

template <class S> __device__ __forceinline__ void encode_side(const ELEMENT* x, i64 stride, u8* record, u8* codes, int* flag,
                                                                  const Points& points) {
    if constexpr (S::BITS == 16) {
        copy_elements(x, stride, record);
    } else {
        bool is_bad;
        if constexpr (S::CODEC != AFFINE) is_bad = quantise_by_search<S>(x, stride, record, codes, points);
        else if constexpr (S::PER_CHANNEL) is_bad = quantise_per_channel<S>(x, stride, record, codes);
        else is_bad = quantise_per_token<S>(x, stride, record, codes);
        if (is_bad) *flag = 1;
        __syncthreads();
        pack<S, S::LOW_BITS, 0, S::LOW_TILES>(codes, record);
        if constexpr (S::HIGH_BITS > 0)
            pack<S, S::HIGH_BITS, S::LOW_BITS, S::HIGH_TILES>(codes, record + S::ROWS * S::COLS * S::LOW_BITS / 8);
    }
}

// Grid (2 * pages, heads, batch): even blocks take keys, odd ones values. Strides in elements, of records in bytes.
// key, value [batch, heads, pages * P, D]; records [batch, heads, pages, bytes]; flag becomes 1 if a group to be quantised
// holds NaN, infinity or a magnitude above 65504. The rest: see Points.
#if !APPEND
extern "C" __global__ void __launch_bounds__(THREADS)
    encode_pages(const ELEMENT* __restrict__ key, i64 key_batch, i64 key_head, i64 key_token, const ELEMENT* __restrict__ value,
                 i64 value_batch, i64 value_head, i64 value_token, u8* __restrict__ records, i64 record_batch, i64 record_head,
                 i64 record_page, int* __restrict__ flag, u64 key_low0, u64 key_low1, u64 key_high0, u64 key_high1, u64 value_low0,
                 u64 value_low1, u64 value_high0, u64 value_high1) {
    extern __shared__ __align__(16) u8 shared[];
    const i64 page = blockIdx.x / 2, head = blockIdx.y, batch = blockIdx.z;
    u8* record = records + batch * record_batch + head * record_head + page * record_page;
    if (blockIdx.x % 2 == 0)
        encode_side<Keys>(key + batch * key_batch + head * key_head + page * P * key_token, key_token, record, shared, flag,
                         {{key_low0, key_low1}, {key_high0, key_high1}});
    else
        encode_side<Values>(value + batch * value_batch + head * value_head + page * P * value_token, value_token,
                            record + VALUE_OFFSET, shared, flag, {{value_low0, value_low1}, {value_high0, value_high1}});
}
#else

// Appends one token to every sequence of a cache of fixed size and packs the page that is full with it. Grid (2, heads of
// records, batch). key, value [batch, kv_heads, 1, D], sinks [batch, kv_heads, num_sinks, D] and ring [batch, kv_heads, ring, D]
// by strides in elements: the token of slot s lies at (s - num_sinks) % ring. heads: KV head of each head of records. Records by
// strides in bytes, in order, or through table [batch, table_stride] of page numbers. state: (tokens, pages that
// the newest token reads) of each sequence, then a ticket for each, zero between launches. flags become 1: what was packed is
// out of range; the cache was full and the token is lost. filled [capacity + 1]: full pages by number of tokens. is_last: no
// launch for other heads of this token follows, so the sequences grow. extents [batch, heads of records, 2]: the first record
// of a head, and how many pages it has before those that are counted. The rest: see Points.
// With POOLED exact tokens lie in the blocks of the records, block_tokens of them in each, sink_batch elements apart: those of
// page p from block table[p + 1] on, so that the page can be packed into block table[p], and sinks in the block before
// table[0]; the ring is room for one page. With ROPED cos and sin are [batch, 1, D] by the first one's stride in elements.
extern "C" __global__ void __launch_bounds__(THREADS)
    append_token(const ELEMENT* key, i64 key_batch, i64 key_head, const ELEMENT* value, i64 value_batch, i64 value_head,
                 const int* heads, ELEMENT* sink_key, ELEMENT* sink_value, i64 sink_batch, i64 sink_head, i64 sink_token,
                 int num_sinks, ELEMENT* ring_key, ELEMENT* ring_value, i64 ring_batch, i64 ring_head, i64 ring_token, int ring,
                 u8* records, i64 record_batch, i64 record_head, i64 record_page, const int* table, int table_stride,
                 int* state, int* flags, const int* filled, int capacity, int is_last, const int2* extents, u64 key_low0, u64 key_low1,
                 u64 key_high0, u64 key_high1, u64 value_low0, u64 value_low1, u64 value_high0, u64 value_high1
#if POOLED
                 , int block_tokens
#endif
#if ROPED
                 , const ELEMENT* cos, i64 cos_batch, const ELEMENT* sin, i64 sin_batch
#endif
    ) {
    extern __shared__ __align__(16) u8 shared[];
    follow();
    let_next_begin();
    const bool is_key = blockIdx.x == 0;
    const int head = heads ? heads[blockIdx.y] : blockIdx.y;
    const i64 batch = blockIdx.z;
    const int length = state[2 * batch];
    int page = 0;
    if (length < capacity) {
        page = filled[length];
        const int pages = filled[length + 1], at = length - num_sinks;
        const ELEMENT* from = is_key ? key + batch * key_batch + head * key_head : value + batch * value_batch + head * value_head;
        ELEMENT* own = (is_key ? ring_key : ring_value) + batch * ring_batch + head * ring_head;
        ELEMENT* sinks = (is_key ? sink_key : sink_value) + batch * sink_batch + head * sink_head;
#if POOLED
        sinks -= batch * sink_batch;
        auto place = [&](int token) {
            const int block = max(0, table[batch * table_stride + (at < 0 ? -1 : page + 1 + token / block_tokens)]);
            return sinks + block * sink_batch + token % block_tokens * sink_token;
        };
        ELEMENT* to = place(at < 0 ? length : at - page * P);
#else
        ELEMENT* to = at < 0 ? sinks + length * sink_token : own + at % ring * ring_token;
#endif
        if (threadIdx.x < 32) {
            const int lane = threadIdx.x, there = min(lane, D / 8 - 1);
#if ROPED
            Eight<ELEMENT> token = is_key ? Roped<ELEMENT>(from, cos + batch * cos_batch, sin + batch * sin_batch, there).turned()
                                          : Eight<ELEMENT>(from, there);
#else
            Eight<ELEMENT> token(from, there);
#endif
#if KEY_ROTATED || VALUE_ROTATED
            if (is_key ? Keys::ROTATED : Values::ROTATED) hadamard_turn(token, lane, HADAMARD_UNIT);
#endif
            if (lane == there) token.store(to, lane);
        }
        if (pages > page) {
            __syncthreads();
            const i64 number = table ? table[batch * table_stride + page] : page;
            u8* record = records + (table ? 0 : batch * record_batch) + blockIdx.y * record_head + number * record_page;
            if (extents) {
                const int2 kept = extents[batch * gridDim.y + blockIdx.y];
                record += (i64)(kept.x + kept.y) * record_page;
            }
#if POOLED
            for (int v = threadIdx.x; v < P * D / V; v += THREADS)
                reinterpret_cast<uint4*>(own + v / (D / V) * ring_token)[v % (D / V)] =
                    reinterpret_cast<const uint4*>(place(v / (D / V)))[v % (D / V)];
            __syncthreads();
#endif
            const ELEMENT* x = own + page * P % ring * ring_token;
            if (is_key) encode_side<Keys>(x, ring_token, record, shared, flags, {{key_low0, key_low1}, {key_high0, key_high1}});
            else
                encode_side<Values>(x, ring_token, record + VALUE_OFFSET, shared, flags,
                                    {{value_low0, value_low1}, {value_high0, value_high1}});
        }
    }
    __syncthreads();  // everybody has read the length
    int* ticket = state + 2 * gridDim.z + batch;
    if (!is_last || threadIdx.x != 0 || atomicAdd(ticket, 1) != gridDim.x * gridDim.y - 1) return;
    *ticket = 0;
    if (length < capacity) {
        state[2 * batch] = length + 1;
        state[2 * batch + 1] = page;
    } else {
        flags[1] = 1;
    }
}
#endif
