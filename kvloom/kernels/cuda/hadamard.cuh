// A randomised Hadamard transform of a head's channels: the numbers of kvloom/codecs/_rotation.py, with the same sums.
//
// A lane holds 8 channels of a row; lanes that hold a row follow each other. Sums reach 8 channels within a lane, then other
// lanes: every lane of the warp takes part.
//
// Defines: HEAD_DIM, HADAMARD_POWER (logarithm of the block), HADAMARD_SIGNS (bits of the channels that change sign, a list of
// 32-bit words).
__device__ constexpr unsigned int HADAMARD_SIGN_BITS[] = {HADAMARD_SIGNS};
constexpr float HADAMARD_UNIT = 1.f / (1 << HADAMARD_POWER / 2);             // F's
constexpr float HADAMARD_DUAL_UNIT = 1.f / (1 << (HADAMARD_POWER + 1) / 2);  // G's
constexpr int HADAMARD_LANES = HEAD_DIM / 8;                                 // that hold a row

__device__ __forceinline__ void hadamard_signs(float (&x)[8], int lane, float unit) {
    const unsigned int signs = HADAMARD_SIGN_BITS[lane / 4 % (HEAD_DIM / 32 + (HEAD_DIM % 32 != 0))] >> lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] *= signs >> i & 1 ? -unit : unit;
}

__device__ __forceinline__ void hadamard_sums(float (&x)[8], int lane) {
#pragma unroll
    for (int power = 0; power < HADAMARD_POWER; power++) {
        if (power < 3) {
#pragma unroll
            for (int pair = 0; pair < 4; pair++) {
                const int first = (pair >> power << (power + 1)) | (pair & ((1 << power) - 1)), second = first + (1 << power);
                const float a = x[first], b = x[second];
                x[first] = a + b;
                x[second] = a - b;
            }
        } else {
            const int step = 1 << (power - 3);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float other = __shfl_xor_sync(~0u, x[i], step);
                x[i] = lane & step ? other - x[i] : x[i] + other;
            }
        }
    }
}

// x F, by HADAMARD_UNIT, or x G, by HADAMARD_DUAL_UNIT.
template <class Row> __device__ __forceinline__ void hadamard_turn(Row& row, int lane, float unit) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = row.get(i);
    hadamard_signs(x, lane, unit);
    hadamard_sums(x, lane);
#pragma unroll
    for (int i = 0; i < 8; i++) row.set(i, x[i]);
}

// x G^T: what attention over turned values returns.
__device__ __forceinline__ void hadamard_turn_back(float (&x)[8], int lane) {
    hadamard_sums(x, lane);
    hadamard_signs(x, lane, HADAMARD_DUAL_UNIT);
}
