// Products of few rows with weights that are read once: y[m, n] = sum over k of x[m, k] * w[n, k].
//
// Features are the M of mma.m16n8k16, rows of x its N. A block has 16 features, and its warps take channels in turn, 64 at
// a time. A lane reads 16 bytes of a feature at once: what an mma calls channels 2c, 2c + 1, 2c + 8 and 2c + 9 are four
// neighbours of the 8 that lane c of a quad has read, of weights and of x alike. Partial sums meet in shared memory, always
// in the same order. Weights that share x are one launch: a small one would leave most of the device idle. A block asks for its
// first weights before the launch in front of it has ended.
//
// With GATED the features of the first two weights meet: out = silu(x @ w0.T) * (x @ w1.T), of which a block has half as many.
//
// Defines: ELEMENT (__half, __nv_bfloat16), KIND (f16, bf16), WARPS, GATED.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "follow.cuh"

typedef long long i64;

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

constexpr int ROWS = 8, FEATURES = 16;
constexpr int STEP = 64;  // channels: 128 bytes of a feature

struct Step {
    uint4 w[2][2];  // [feature r, r + 8][channels 8c of the first, of the second 32]
    uint4 x[2];
};

__device__ __forceinline__ uint4 read_once(const ELEMENT* from) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

__device__ __forceinline__ void read_weights(Step& s, const ELEMENT* const (&w)[2], int at, int channels) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int r = 0; r < 2; r++) s.w[r][half] = at < channels ? read_once(w[r] + at + 32 * half) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ void read_rows(Step& s, const ELEMENT* x, int at, int channels) {
#pragma unroll
    for (int half = 0; half < 2; half++)
        s.x[half] = at < channels ? *reinterpret_cast<const uint4*>(x + at + 32 * half) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ void mma(float (&acc)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TEXT(KIND) "." TEXT(KIND) ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(float (&acc)[4], const Step& s) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 low = s.w[0][half], high = s.w[1][half], x = s.x[half];
        mma(acc, low.x, high.x, low.y, high.y, x.x, x.y);
        mma(acc, low.z, high.z, low.w, high.w, x.z, x.w);
    }
}

__device__ __forceinline__ float silu(float x) { return x / (1 + expf(-x)); }

// Grid: (blocks of FEATURES of every weight, one weight's after another's, or, GATED, of FEATURES / 2 of the two). x [rows,
// channels], at most ROWS of them, and weights [features, channels] by strides in elements, 16-byte aligned; out [rows,
// features]. A weight of 0 features is none; a bias [features] is added before rounding, null is none (GATED: all are).
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    products(const ELEMENT* x, i64 x_row, int rows, int channels,
             const ELEMENT* w0, i64 row0, const ELEMENT* bias0, ELEMENT* out0, int features0,
             const ELEMENT* w1, i64 row1, const ELEMENT* bias1, ELEMENT* out1, int features1,
             const ELEMENT* w2, i64 row2, const ELEMENT* bias2, ELEMENT* out2, int features2,
             const ELEMENT* w3, i64 row3, const ELEMENT* bias3, ELEMENT* out3, int features3) {
    __shared__ float part[WARPS][ROWS][FEATURES + 1];
    const ELEMENT *w = w0, *bias = bias0;
    i64 w_row = row0;
    ELEMENT* out = out0;
    int features = features0, block = blockIdx.x;
#if !GATED
#define NEXT(n)                                      \
    if (features##n && block >= features / FEATURES) \
        block -= features / FEATURES, w = w##n, w_row = row##n, bias = bias##n, out = out##n, features = features##n;
    NEXT(1) NEXT(2) NEXT(3)
#endif
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
#if GATED
    const int first = block * (FEATURES / 2);
    const ELEMENT* const w_at[2] = {w + (first + r) * w_row + 8 * c, w1 + (first + r) * row1 + 8 * c};
#else
    const int first = block * FEATURES;
    const ELEMENT* const w_at[2] = {w + (first + r) * w_row + 8 * c, w + (first + r + 8) * w_row + 8 * c};
#endif
    float acc[4] = {};
    Step now, next;
    read_weights(now, w_at, STEP * warp, channels);
    follow();
    let_next_begin();
    const ELEMENT* const x_at = x + min(r, rows - 1) * x_row + 8 * c;
    read_rows(now, x_at, STEP * warp, channels);
    for (int at = STEP * warp; at < channels; at += STEP * WARPS) {
        read_weights(next, w_at, at + STEP * WARPS, channels);
        read_rows(next, x_at, at + STEP * WARPS, channels);
        multiply(acc, now);
        now = next;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) part[warp][2 * c + i % 2][r + i / 2 * 8] = acc[i];
    __syncthreads();
    auto sum = [&](int row, int feature) {
        float all = bias ? float(bias[first + feature]) : 0;
#pragma unroll
        for (int from = 0; from < WARPS; from++) all += part[from][row][feature];
        return ELEMENT(all);
    };
    constexpr int OWN = GATED ? FEATURES / 2 : FEATURES;
    for (int i = threadIdx.x; i < rows * OWN; i += 32 * WARPS) {
        const int row = i / OWN, feature = i % OWN;
        ELEMENT y = sum(row, feature);
        if (GATED) y = ELEMENT(float(ELEMENT(silu(float(y)))) * float(sum(row, feature + OWN)));
        out[(i64)row * features + first + feature] = y;
    }
}
