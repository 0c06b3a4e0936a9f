// Turns head channels by a randomised Hadamard transform: a warp a token, rows of sums in shared memory.
//
// Defines: ELEMENT (float, __half, __nv_bfloat16), WARPS, and those of hadamard.cuh.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned int u32;
typedef long long i64;

#include "hadamard.cuh"

constexpr int D = HEAD_DIM, V = 16 / sizeof(ELEMENT);  // elements of a 16-byte vector

// Grid (tokens / WARPS, rounded up, heads, batch). x by strides in elements; out [batch, heads, tokens, D], contiguous.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    rotate_states(const ELEMENT* __restrict__ x, i64 x_batch, i64 x_head, i64 x_token, ELEMENT* __restrict__ out, int tokens) {
    __shared__ float rows[WARPS][D];
    const int lane = threadIdx.x % 32;
    const i64 token = (i64)blockIdx.x * WARPS + threadIdx.x / 32, head = blockIdx.y, batch = blockIdx.z;
    if (token >= tokens) return;
    float* row = rows[threadIdx.x / 32];
    const uint4* from = reinterpret_cast<const uint4*>(x + batch * x_batch + head * x_head + token * x_token);
    uint4* to = reinterpret_cast<uint4*>(out + ((batch * gridDim.y + head) * tokens + token) * D);
    for (int v = lane; v < D / V; v += 32) {
        const uint4 vector = __ldcs(from + v);
        const ELEMENT* element = reinterpret_cast<const ELEMENT*>(&vector);
#pragma unroll
        for (int i = 0; i < V; i++) row[v * V + i] = hadamard_signed(static_cast<float>(element[i]), v * V + i);
    }
    hadamard_sums(row, lane, 32, [] { __syncwarp(); });
    for (int v = lane; v < D / V; v += 32) {
        uint4 vector;
        ELEMENT* element = reinterpret_cast<ELEMENT*>(&vector);
#pragma unroll
        for (int i = 0; i < V; i++) element[i] = static_cast<ELEMENT>(row[v * V + i]);
        to[v] = vector;
    }
}
