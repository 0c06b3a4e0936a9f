// Turns head channels by a randomised Hadamard transform; a warp takes as many tokens as it has lanes for.
//
// Defines: ELEMENT (float, __half, __nv_bfloat16), WARPS, and those of hadamard.cuh.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef long long i64;

#include "channels.cuh"
#include "follow.cuh"
#include "hadamard.cuh"

constexpr int TOKENS = 32 / HADAMARD_LANES;  // of a warp

// Grid (tokens / (WARPS * TOKENS), rounded up, heads, batch). x by strides in elements; out [batch, heads, tokens, HEAD_DIM].
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    rotate_states(const ELEMENT* x, i64 x_batch, i64 x_head, i64 x_token, ELEMENT* out, int tokens) {
    follow();
    let_next_begin();
    const int own = threadIdx.x % 32 / HADAMARD_LANES, lane = threadIdx.x % 32 % HADAMARD_LANES;
    const i64 token = ((i64)blockIdx.x * WARPS + threadIdx.x / 32) * TOKENS + own, head = blockIdx.y, batch = blockIdx.z;
    const bool is_there = own < TOKENS && token < tokens;
    Eight<ELEMENT> row(x + batch * x_batch + head * x_head + (is_there ? token : 0) * x_token, lane);
    hadamard_turn(row, lane, HADAMARD_UNIT);
    if (is_there) row.store(out + ((batch * gridDim.y + head) * tokens + token) * HEAD_DIM, lane);
}
