// A randomised Hadamard transform of a head's channels: the numbers of kvloom/codecs/_rotation.py, in the same order of sums.
//
// Defines: HEAD_DIM, HADAMARD_POWER (logarithm of the block), HADAMARD_SIGNS (bits of the channels that change sign, a list of
// 32-bit words).
__device__ constexpr unsigned int HADAMARD_SIGN_BITS[] = {HADAMARD_SIGNS};
constexpr float HADAMARD_UNIT = 1.f / (1 << HADAMARD_POWER / 2);

__device__ __forceinline__ float hadamard_signed(float x, int channel) {
    return HADAMARD_SIGN_BITS[channel / 32] >> channel % 32 & 1 ? -x * HADAMARD_UNIT : x * HADAMARD_UNIT;
}

// Sums and differences of the pairs of a row, by `count` threads that `wait` for each other.
template <class Wait> __device__ __forceinline__ void hadamard_sums(float* row, int thread, int count, Wait wait) {
    wait();
#pragma unroll
    for (int power = 0; power < HADAMARD_POWER; power++) {
        for (int pair = thread; pair < HEAD_DIM / 2; pair += count) {
            const int first = (pair >> power << (power + 1)) | (pair & ((1 << power) - 1)), second = first + (1 << power);
            const float a = row[first], b = row[second];
            row[first] = a + b;
            row[second] = a - b;
        }
        wait();
    }
}
