// How ranks leave small addends for one another, without a barrier or a fence.
//
// An addend is cut into pieces of 8 bytes. Whoever has one writes it into the buffer of every other rank, over NVLink, as two
// words of 4 bytes and an epoch each; a word is stored and loaded as one, so that a reader who finds the epoch has the data.
// Then it polls its own buffer for what the others have written. Addends are summed in fp32 in the order of ranks, so that all
// ranks have the same bits.
//
// Pieces have their places in groups of GROUP. Every group has an epoch, which whoever has the group raises, and all places of
// a group are written: launches of different sizes can mix. A buffer has two halves that epochs take in turn. Epoch e + 2
// overwrites e only when e has been read: a block is there only after its launch e + 1 ended, which had waited for its peers'
// e + 1, and a peer launches that when its launch e has ended. Launches must follow each other in one order on every rank.
//
// Defines: ELEMENT (__half, __nv_bfloat16, float), RANKS, GROUP, GROUPS (the most of a launch), POLLS (before giving up), TRIES
// (giving up writes nothing, where it otherwise ends the program).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned long long u64;

constexpr int PLACES = GROUPS * GROUP;  // of one sender
constexpr int HALF = RANKS * PLACES;

union Piece {
    uint2 bits;
    ELEMENT elements[sizeof(uint2) / sizeof(ELEMENT)];
    __device__ Piece() {}
};
constexpr int ELEMENTS = sizeof(uint2) / sizeof(ELEMENT);

__device__ __forceinline__ u64 marked(unsigned data, unsigned epoch) { return (u64)epoch << 32 | data; }

__device__ __forceinline__ void store(ulonglong2* to, uint2 data, unsigned epoch) {
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" : : "l"(to), "l"(marked(data.x, epoch)), "l"(marked(data.y, epoch)) : "memory");
}

// Whether the data have come.
__device__ __forceinline__ bool load(uint2& data, const ulonglong2* from, unsigned epoch) {
    u64 x, y;
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(x), "=l"(y) : "l"(from) : "memory");
    data = make_uint2((unsigned)x, (unsigned)y);
    return (unsigned)(x >> 32) == epoch && (unsigned)(y >> 32) == epoch;
}

// Buffers begin as zeros, so that 0 is none; behind the last epoch, which is odd, comes an even one.
__device__ __forceinline__ unsigned after(unsigned epoch) { return epoch == 0xffffffffu ? 2 : epoch + 1; }

// A rank's place in the group, and the address of each rank's buffer, [2][RANKS][PLACES] of 16 bytes.
struct Ranks {
    int rank;
    ulonglong2* const* buffers;

    __device__ __forceinline__ void send(Piece own, int place, unsigned epoch) const {
#pragma unroll
        for (int i = 1; i < RANKS; i++) store(buffers[(rank + i) % RANKS] + epoch % 2 * HALF + rank * PLACES + place, own.bits, epoch);
    }

    // The sum, and whether all addends have come.
    __device__ __forceinline__ bool receive(Piece& sum, Piece own, int place, unsigned epoch) const {
        const ulonglong2* const from = buffers[rank] + epoch % 2 * HALF + place;
        Piece addends[RANKS];
        bool is_whole = false;
        for (unsigned polls = 0; !is_whole; polls++) {
            if (polls == POLLS) {  // a rank is gone, or what it writes does not arrive
#if TRIES
                return false;
#else
                __trap();
#endif
            }
            is_whole = true;
#pragma unroll
            for (int r = 0; r < RANKS; r++) {
                if (r == rank) addends[r] = own;
                else is_whole &= load(addends[r].bits, from + r * PLACES, epoch);
            }
        }
#pragma unroll
        for (int i = 0; i < ELEMENTS; i++) {
            float all = float(addends[0].elements[i]);
#pragma unroll
            for (int r = 1; r < RANKS; r++) all += float(addends[r].elements[i]);
            sum.elements[i] = ELEMENT(all);
        }
        return true;
    }
};
