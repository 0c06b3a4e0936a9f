// Sum over the ranks of a group of what each of them has, for messages so small that latency is all that counts: see ranks.cuh.
#include "follow.cuh"
#include "ranks.cuh"

// Grid: one thread a piece of 8 bytes. x and out: that many; buffers: see Ranks; epochs: of each group, the next, from 1.
extern "C" __global__ void __launch_bounds__(GROUP)
    sum_ranks(const Piece* x, Piece* out, int pieces, int rank, ulonglong2* const* __restrict__ buffers, unsigned* epochs) {
    const int piece = blockIdx.x * GROUP + threadIdx.x;
    const bool is_there = piece < pieces;
    const Ranks ranks = {rank, buffers};
    follow();
    let_next_begin();
    const unsigned epoch = epochs[blockIdx.x];
    Piece own, sum;
    own.bits = is_there ? x[piece].bits : make_uint2(0, 0);
    ranks.send(own, piece, epoch);
    __syncthreads();  // all have read the epoch
    if (threadIdx.x == 0) epochs[blockIdx.x] = after(epoch);
    if (is_there && ranks.receive(sum, own, piece, epoch)) out[piece].bits = sum.bits;
}
