// Sum over the ranks of a group of what each of them has, for messages so small that latency is all that counts.
//
// A thread has 8 bytes. It writes them into the buffer of every other rank, over NVLink, as two words of 4 bytes and an
// epoch each; a word is stored and loaded as one, so that a reader who finds the epoch has the data, without a barrier or
// a fence. Then it polls its own buffer for what the others have written. Addends are summed in fp32 in the order of
// ranks, so that all ranks have the same bits.
//
// Every block counts its own launches and always has the same part of the buffers, and writes all of it: launches of
// different sizes can mix. A buffer has two halves that epochs take in turn. Epoch e + 2 overwrites e only when e has been
// read: a block is there only after its launch e + 1 ended, which had waited for its peers' e + 1, and a peer launches that
// when its launch e has ended. Launches of a group must follow each other in one order on every rank.
//
// Defines: ELEMENT (__half, __nv_bfloat16, float), RANKS, THREADS, BLOCKS (the most of a launch), POLLS (before giving up), TRIES
// (giving up writes nothing, where it otherwise ends the program).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned long long u64;

constexpr int HALF = RANKS * BLOCKS * THREADS;  // pieces of one half, by sender

union Piece {
    uint2 bits;
    ELEMENT elements[sizeof(uint2) / sizeof(ELEMENT)];
    __device__ Piece() {}
};

__device__ __forceinline__ u64 marked(unsigned data, unsigned epoch) { return (u64)epoch << 32 | data; }

__device__ __forceinline__ void send(ulonglong2* to, uint2 data, unsigned epoch) {
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" : : "l"(to), "l"(marked(data.x, epoch)), "l"(marked(data.y, epoch)) : "memory");
}

// Whether the data have come.
__device__ __forceinline__ bool receive(uint2& data, const ulonglong2* from, unsigned epoch) {
    u64 x, y;
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(x), "=l"(y) : "l"(from) : "memory");
    data = make_uint2((unsigned)x, (unsigned)y);
    return (unsigned)(x >> 32) == epoch && (unsigned)(y >> 32) == epoch;
}

// Buffers begin as zeros, so that 0 is none; behind the last epoch, which is odd, comes an even one.
__device__ __forceinline__ unsigned after(unsigned epoch) { return epoch == 0xffffffffu ? 2 : epoch + 1; }

__device__ __forceinline__ uint2 sum_of(const Piece (&addends)[RANKS]) {
    Piece out;
#pragma unroll
    for (int i = 0; i < sizeof(uint2) / sizeof(ELEMENT); i++) {
        float sum = float(addends[0].elements[i]);
#pragma unroll
        for (int r = 1; r < RANKS; r++) sum += float(addends[r].elements[i]);
        out.elements[i] = ELEMENT(sum);
    }
    return out.bits;
}

// Grid: one thread a piece of 8 bytes. x and out: that many; buffers: address of each rank's, [2][RANKS][BLOCKS][THREADS]
// of 16 bytes; epochs: of each block, the next, from 1.
extern "C" __global__ void __launch_bounds__(THREADS)
    sum_ranks(const uint2* __restrict__ x, uint2* __restrict__ out, int pieces, int rank, ulonglong2* const* __restrict__ buffers, unsigned* __restrict__ epochs) {
    const int piece = blockIdx.x * THREADS + threadIdx.x;
    const bool is_there = piece < pieces;
    const unsigned epoch = epochs[blockIdx.x];
    const int at = epoch % 2 * HALF + piece;
    const ulonglong2* const from = buffers[rank] + at;
    const uint2 own = is_there ? x[piece] : make_uint2(0, 0);
#pragma unroll
    for (int i = 1; i < RANKS; i++) send(buffers[(rank + i) % RANKS] + at + rank * BLOCKS * THREADS, own, epoch);
    __syncthreads();  // all have read the epoch
    if (threadIdx.x == 0) epochs[blockIdx.x] = after(epoch);
    if (!is_there) return;
    Piece addends[RANKS];
    bool is_whole = false;
    for (unsigned polls = 0; !is_whole; polls++) {
        if (polls == POLLS) {  // a rank is gone, or what it writes does not arrive
#if TRIES
            return;
#else
            __trap();
#endif
        }
        is_whole = true;
#pragma unroll
        for (int r = 0; r < RANKS; r++) {
            if (r == rank) addends[r].bits = own;
            else is_whole &= receive(addends[r].bits, from + r * BLOCKS * THREADS, epoch);
        }
    }
    out[piece] = sum_of(addends);
}
