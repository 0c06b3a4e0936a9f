// Rotary positions of one token's query and key heads: x * cos + [-x's second half, x's first half] * sin, rounded after every step.
//
// A lane has 8 channels of the first half of a head, and their partners in the second.
//
// Defines: ELEMENT (__half, __nv_bfloat16), D (channels of a head), THREADS.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "follow.cuh"

typedef long long i64;

constexpr int V = 8, LANES = D / 2 / V;  // of a head

union Eight {
    uint4 bits;
    ELEMENT elements[V];
    __device__ Eight() {}
    __device__ explicit Eight(const ELEMENT* from) : bits(*reinterpret_cast<const uint4*>(from)) {}
};

// a * cos + b * sin
__device__ __forceinline__ void turn(ELEMENT* to, const Eight& a, const Eight& b, const ELEMENT* cos, const ELEMENT* sin, float sign) {
    const Eight c(cos), s(sin);
    Eight out;
#pragma unroll
    for (int i = 0; i < V; i++) {
        const ELEMENT straight = ELEMENT(float(a.elements[i]) * float(c.elements[i]));
        const ELEMENT across = ELEMENT(sign * float(b.elements[i]) * float(s.elements[i]));
        out.elements[i] = ELEMENT(float(straight) + float(across));
    }
    *reinterpret_cast<uint4*>(to) = out.bits;
}

// Grid: LANES threads a head, query heads of a sequence before its KV heads. query and key [batch, heads, 1, D] by strides in
// elements, to contiguous ones; cos and sin [batch, 1, 1, D] by the first one's.
extern "C" __global__ void __launch_bounds__(THREADS)
    rope(const ELEMENT* query, i64 query_batch, i64 query_head, const ELEMENT* key, i64 key_batch, i64 key_head, const ELEMENT* cos,
         i64 cos_batch, const ELEMENT* sin, i64 sin_batch, ELEMENT* turned_query, ELEMENT* turned_key, int batch, int query_heads, int kv_heads) {
    const int thread = blockIdx.x * THREADS + threadIdx.x, lane = thread % LANES, heads = query_heads + kv_heads;
    const i64 sequence = thread / LANES / heads;
    const int head = thread / LANES % heads;
    let_next_begin();
    follow();
    if (sequence >= batch) return;
    const bool is_query = head < query_heads;
    const ELEMENT* x = is_query ? query + sequence * query_batch + head * query_head : key + sequence * key_batch + (head - query_heads) * key_head;
    ELEMENT* to = is_query ? turned_query + (sequence * query_heads + head) * D : turned_key + (sequence * kv_heads + head - query_heads) * D;
    const ELEMENT *c = cos + sequence * cos_batch + V * lane, *s = sin + sequence * sin_batch + V * lane;
    const Eight low(x + V * lane), high(x + D / 2 + V * lane);
    turn(to + V * lane, low, high, c, s, -1);
    turn(to + D / 2 + V * lane, high, low, c + D / 2, s + D / 2, 1);
}
