// Unpacks whole pages: one block decodes the keys or the values of one page and KV head.
//
// Planes are read 16 bytes a thread and spread over shared memory as one byte a code, in the order of encode.cu; then every
// thread takes a quad of tokens (16s + 2t + {0, 1, 8, 9}) x one 16-byte vector of channels, scales it and writes it out.
//
// Defines: PAGE_TOKENS, HEAD_DIM, ELEMENT (float, __half, __nv_bfloat16), WARPS, VALUE_OFFSET (first byte of the values), and
// for KEY and VALUE: _BITS, _LOW_BITS (of the first plane), _LOW_TILES, _HIGH_TILES (tiles of a chunk, by plane),
// _PER_CHANNEL, _GROUP, _SYMMETRIC, _POINTS (codes stand for the points of a codebook). TABLE: records are found through one.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned char u8;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#include "points.cuh"

constexpr int THREADS = WARPS * 32, P = PAGE_TOKENS, D = HEAD_DIM;
constexpr int V = 16 / sizeof(ELEMENT);  // elements of a 16-byte vector

template <bool IS_KEY_, int BITS_, int LOW_BITS_, int LOW_TILES_, int HIGH_TILES_, bool PER_CHANNEL_, int GROUP_, bool SYMMETRIC_,
          bool POINTS_>
struct Side {
    static constexpr bool IS_KEY = IS_KEY_, PER_CHANNEL = PER_CHANNEL_, SYMMETRIC = SYMMETRIC_, POINTS = POINTS_;
    static constexpr int BITS = BITS_, LOW_BITS = LOW_BITS_, HIGH_BITS = BITS_ - LOW_BITS_, GROUP = GROUP_;
    static constexpr int LOW_TILES = LOW_TILES_, HIGH_TILES = HIGH_TILES_;
    static constexpr float SYMMETRIC_ZERO = POINTS ? 0.f : -0.5f * ((1 << BITS) - 1);  // in units of the scale
    static constexpr int ROWS = IS_KEY ? P : D, COLS = IS_KEY ? D : P;
    static constexpr int PITCH = COLS + 4;  // bytes of a row of codes in shared memory; odd in words, against bank conflicts
    static constexpr int PARAMS = P * D * BITS / 8;
};
typedef Side<true, KEY_BITS, KEY_LOW_BITS, KEY_LOW_TILES, KEY_HIGH_TILES, KEY_PER_CHANNEL, KEY_GROUP, KEY_SYMMETRIC, KEY_POINTS>
    Keys;
typedef Side<false, VALUE_BITS, VALUE_LOW_BITS, VALUE_LOW_TILES, VALUE_HIGH_TILES, VALUE_PER_CHANNEL, VALUE_GROUP, VALUE_SYMMETRIC,
             VALUE_POINTS>
    Values;

__device__ __forceinline__ float low_half(u32 w) { return __low2float(*reinterpret_cast<const __half2*>(&w)); }
__device__ __forceinline__ float high_half(u32 w) { return __high2float(*reinterpret_cast<const __half2*>(&w)); }

// One plane of 16-byte pieces in registers.
template <class S, int BITS, int SHIFT, int TILES> struct Plane {
    static constexpr u32 PIECES = S::ROWS * S::COLS * BITS / 128, OWN = (PIECES + THREADS - 1) / THREADS;
    static constexpr u32 PAIRS = S::COLS / 8, KJ = 16 / BITS, WORDS = TILES * 2 * PAIRS / KJ;  // pairs of a row, of a word; words of a lane
    static constexpr u32 CODES = ((1u << BITS) - 1) * 0x01010101u, TWO = ((1u << 2 * BITS) - 1) * 0x00010001u;
    uint4 piece[OWN];

    __device__ __forceinline__ explicit Plane(const u8* plane) {
#pragma unroll
        for (u32 n = 0; n < OWN; n++) {
            const u32 v = n * THREADS + threadIdx.x;
            piece[n] = PIECES % THREADS == 0 || v < PIECES ? __ldg(reinterpret_cast<const uint4*>(plane) + v) : make_uint4(0, 0, 0, 0);
        }
    }

    // Rows of codes are a plane's rows, columns are in the order of a lane's fields.
    __device__ __forceinline__ void spread(u8* codes) const {
#pragma unroll
        for (u32 n = 0; n < OWN; n++) {
            const u32 v = n * THREADS + threadIdx.x, word[4] = {piece[n].x, piece[n].y, piece[n].z, piece[n].w};
            if (PIECES % THREADS != 0 && v >= PIECES) continue;
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const u32 holder = WORDS % 4 ? (4 * v + i) / WORDS : v / (WORDS % 4 ? 1 : WORDS / 4);
                const u32 w = WORDS % 4 ? (4 * v + i) % WORDS : v % (WORDS % 4 ? 1 : WORDS / 4) * 4 + i;
                const u32 lane = holder % 32, first_row = holder / 32 * TILES * 16 + lane / 4;
                u8* own = codes + first_row * S::PITCH + lane % 4 * (S::COLS / 4);
#pragma unroll
                for (u32 q = 0; q < KJ / 2; q++) {
                    const u32 stream = PAIRS % KJ ? (w * KJ + 2 * q) / PAIRS : w / (PAIRS % KJ ? 1 : PAIRS / KJ);
                    const u32 pair = PAIRS % KJ ? (w * KJ + 2 * q) % PAIRS : w % (PAIRS % KJ ? 1 : PAIRS / KJ) * KJ + 2 * q;
                    const u32 two = word[i] >> (BITS == 8 ? 0 : 2 * BITS * q) & TWO;
                    const u32 split = BITS == 8 ? word[i] : (two | two << (8 - BITS)) & CODES;
                    u32* at = reinterpret_cast<u32*>(own + stream * 8 * S::PITCH + 2 * pair);
                    const u32 four = __byte_perm(split, 0, 0x3120);
                    *at = SHIFT == 0 ? four : *at | four << SHIFT;
                }
            }
        }
    }
};

template <class S> __device__ __forceinline__ void spread_codes(const u8* record, u8* codes) {
    const Plane<S, S::LOW_BITS, 0, S::LOW_TILES> low(record);
    if constexpr (S::HIGH_BITS > 0) {
        const Plane<S, S::HIGH_BITS, S::LOW_BITS, S::HIGH_TILES> high(record + S::ROWS * S::COLS * S::LOW_BITS / 8);
        low.spread(codes);
        __syncthreads();
        high.spread(codes);
    } else {
        low.spread(codes);
    }
    __syncthreads();
}

__device__ __forceinline__ constexpr int quad_token(int quad, int i) { return quad / 4 * 16 + quad % 4 * 2 + i % 2 + i / 2 * 8; }

// A byte of a word as a float: 2^23 + byte is a number, less 2^23.
__device__ __forceinline__ float byte(u32 word, int i) {
    return __fsub_rn(__uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + i)), 8388608.f);
}

struct Params {
    float scale, zero;
};

// Parameters of V channels from `channel` on, of the group that holds the quad.
template <class S> __device__ __forceinline__ void params_by_channel(Params (&out)[V], const u8* record, int quad, int channel) {
    const u8* at = record + S::PARAMS + (quad / 4 * 16 / S::GROUP * D + channel) * 2;
    u32 scale[V / 2], zero[V / 2] = {};
#pragma unroll
    for (int i = 0; i < V / 2; i += 2) {
        const uint2 s = __ldg(reinterpret_cast<const uint2*>(at + 4 * i));
        scale[i] = s.x, scale[i + 1] = s.y;
        if (!S::SYMMETRIC) {
            const uint2 z = __ldg(reinterpret_cast<const uint2*>(at + P / S::GROUP * D * 2 + 4 * i));
            zero[i] = z.x, zero[i + 1] = z.y;
        }
    }
#pragma unroll
    for (int i = 0; i < V; i++) {
        const float s = i % 2 ? high_half(scale[i / 2]) : low_half(scale[i / 2]);
        const float z = i % 2 ? high_half(zero[i / 2]) : low_half(zero[i / 2]);
        out[i] = {s, S::SYMMETRIC ? __fmul_rn(s, S::SYMMETRIC_ZERO) : z};
    }
}

// Parameters of the quad's tokens, of the group that holds the channel.
template <class S> __device__ __forceinline__ void params_by_token(Params (&out)[4], const u8* record, int quad, int channel) {
    const int group = channel / S::GROUP;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int slot = group * P + quad_token(quad, i);
        if (S::SYMMETRIC) {
            const float s = __half2float(__ldg(reinterpret_cast<const __half*>(record + S::PARAMS) + slot));
            out[i] = {s, __fmul_rn(s, S::SYMMETRIC_ZERO)};
        } else {
            const u32 pair = __ldg(reinterpret_cast<const u32*>(record + S::PARAMS) + slot);
            out[i] = {low_half(pair), high_half(pair)};
        }
    }
}

__device__ __forceinline__ uint4 vector_of(const float (&x)[V], float) {
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}
__device__ __forceinline__ u32 two_of(float a, float b, __half) {  // an extreme of fp16 may be lifted over its end
    const __half2 end = __floats2half2_rn(65504.f, 65504.f), x = __hmin2_nan(__hmax2_nan(__floats2half2_rn(a, b), __hneg2(end)), end);
    return *reinterpret_cast<const u32*>(&x);
}
__device__ __forceinline__ u32 two_of(float a, float b, __nv_bfloat16) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const u32*>(&x);
}
template <class T> __device__ __forceinline__ uint4 vector_of(const float (&x)[V], T t) {
    return make_uint4(two_of(x[0], x[1], t), two_of(x[2], x[3], t), two_of(x[4], x[5], t), two_of(x[6], x[7], t));
}

// `scale * code` is exact in fp32 (11 bits times 8, or 11 of a point), so that fusing the sum changes nothing.
template <class S>
__device__ __forceinline__ void scale_codes(const u8* record, const u8* codes, const float* points, ELEMENT* out) {
    auto number = [&](u32 word, int i) { return S::POINTS ? points[word >> 8 * i & 15] : byte(word, i); };
    constexpr int COLUMNS = D / V;
    for (int item = threadIdx.x; item < P / 4 * COLUMNS; item += THREADS) {
        const int channel = item % COLUMNS * V, quad = item / COLUMNS;
        Params params[S::PER_CHANNEL ? V : 4];
        if constexpr (S::PER_CHANNEL) params_by_channel<S>(params, record, quad, channel);
        else params_by_token<S>(params, record, quad, channel);
        u32 word[V];  // of four channels of a token, token by token (keys); of four tokens of a channel (values)
#pragma unroll
        for (int i = 0; i < V; i++)
            word[i] = *reinterpret_cast<const u32*>(
                S::IS_KEY ? codes + quad_token(quad, i / (V / 4)) * S::PITCH + channel + i % (V / 4) * 4
                          : codes + (channel + i) * S::PITCH + quad % 4 * (P / 4) + quad / 4 * 4);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x[V];
#pragma unroll
            for (int k = 0; k < V; k++) {
                const Params& own = params[S::PER_CHANNEL ? k : i];
                x[k] = __fmaf_rn(S::IS_KEY ? number(word[i * (V / 4) + k / 4], k % 4) : number(word[k], i), own.scale, own.zero);
            }
            *reinterpret_cast<uint4*>(out + quad_token(quad, i) * D + channel) = vector_of(x, ELEMENT());
        }
    }
}

template <class S> __device__ __forceinline__ void decode_side(const u8* record, const Points& codebook, u8* codes, ELEMENT* out) {
    __shared__ float points[16];  // side by side in the banks, so that lanes look up at the same time
    if constexpr (S::POINTS)
        if (threadIdx.x < 16) points[threadIdx.x] = codebook[threadIdx.x];
    if constexpr (S::BITS == 16) {
        for (int v = threadIdx.x; v < P * D / V; v += THREADS)
            reinterpret_cast<uint4*>(out)[v] = __ldg(reinterpret_cast<const uint4*>(record) + v);
    } else {
        spread_codes<S>(record, codes);
        scale_codes<S>(record, codes, points, out);
    }
}

// Grid (2 * pages, heads, batch): even blocks take keys, odd ones values. Strides of records in bytes.
// records [batch, heads, pages, bytes], or [heads, records, bytes] with table [batch, pages], rows `table_row` apart; key,
// value [batch, heads, pages * P, D], contiguous. The rest: see Points.
extern "C" __global__ void __launch_bounds__(THREADS)
    decode_pages(const u8* __restrict__ records, i64 record_batch, i64 record_head, i64 record_page, ELEMENT* __restrict__ key,
                 ELEMENT* __restrict__ value, u64 key_low0, u64 key_low1, u64 key_high0, u64 key_high1, u64 value_low0,
                 u64 value_low1, u64 value_high0, u64 value_high1
#if TABLE
                 , const int* __restrict__ table, int table_row
#endif
    ) {
    extern __shared__ __align__(16) u8 shared[];
    const i64 page = blockIdx.x / 2, head = blockIdx.y, batch = blockIdx.z;
#if TABLE
    const u8* record = records + head * record_head + table[batch * table_row + page] * record_page;
#else
    const u8* record = records + batch * record_batch + head * record_head + page * record_page;
#endif
    const i64 first = ((batch * gridDim.y + head) * (gridDim.x / 2) + page) * (P * D);
    if (blockIdx.x % 2 == 0) decode_side<Keys>(record, {{key_low0, key_low1}, {key_high0, key_high1}}, shared, key + first);
    else decode_side<Values>(record + VALUE_OFFSET, {{value_low0, value_low1}, {value_high0, value_high1}}, shared, value + first);
}
