// The residual stream and its norm, in one launch: h = residual + x, y = h / sqrt(mean(h^2) + eps) * weight, with the roundings
// that a model has which is not compiled. With RANKS > 1, x is first summed over the ranks of a group, see ranks.cuh.
//
// A block has a row, a thread PIECES pieces of 8 bytes.
//
// Defines: those of ranks.cuh (with one rank GROUP, GROUPS, POLLS and TRIES mean nothing), THREADS, PIECES.
#include "follow.cuh"
#include "ranks.cuh"

__device__ __forceinline__ float sum_of_block(float x) {
    __shared__ float part[THREADS / 32];
#pragma unroll
    for (int by = 16; by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < THREADS / 32 ? part[threadIdx.x % 32] : 0;
#pragma unroll
    for (int by = 16; by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
    return x;
}

// Grid: rows. x, residual, h, y [rows, pieces]; weight [pieces]; with several ranks pieces is a multiple of GROUP. The rest: see
// sum_ranks.cu.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_norm(const Piece* x, const Piece* residual, const Piece* __restrict__ weight, float eps, Piece* h, Piece* y,
             int pieces
#if RANKS > 1
             , int rank, ulonglong2* const* __restrict__ buffers, unsigned* epochs
#endif
    ) {
    Piece scale[PIECES], addend[PIECES], stream[PIECES];
    const int first = blockIdx.x * pieces;
#define EACH(i, p) for (int i = 0, p = threadIdx.x; i < PIECES && p < pieces; i++, p += THREADS)
#pragma unroll
    EACH(i, p) scale[i].bits = weight[p].bits;
    follow();
    let_next_begin();
#if RANKS > 1
    const Ranks ranks = {rank, buffers};
    unsigned epoch[PIECES];
#pragma unroll
    EACH(i, p) {
        epoch[i] = epochs[(first + p) / GROUP];
        addend[i].bits = x[first + p].bits;
        ranks.send(addend[i], first + p, epoch[i]);
    }
    __syncthreads();  // all have read the epochs
#pragma unroll
    EACH(i, p) if (p % GROUP == 0) epochs[(first + p) / GROUP] = after(epoch[i]);
#else
#pragma unroll
    EACH(i, p) addend[i].bits = x[first + p].bits;
#endif
#pragma unroll
    EACH(i, p) stream[i].bits = residual[first + p].bits;
    float squares = 0;
#pragma unroll
    EACH(i, p) {
#if RANKS > 1
        Piece sum;
        ranks.receive(sum, addend[i], first + p, epoch[i]);
        addend[i] = sum;
#endif
#pragma unroll
        for (int e = 0; e < ELEMENTS; e++) {
            const ELEMENT here = ELEMENT(float(stream[i].elements[e]) + float(addend[i].elements[e]));
            stream[i].elements[e] = here;
            squares += float(here) * float(here);
        }
        h[first + p].bits = stream[i].bits;
    }
    const float by = rsqrtf(sum_of_block(squares) / (ELEMENTS * pieces) + eps);
#pragma unroll
    EACH(i, p) {
        Piece out;
#pragma unroll
        for (int e = 0; e < ELEMENTS; e++)
            out.elements[e] = ELEMENT(float(ELEMENT(float(stream[i].elements[e]) * by)) * float(scale[i].elements[e]));
        y[first + p].bits = out.bits;
    }
}
