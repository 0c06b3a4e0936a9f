// A randomised Hadamard transform of a head's channels: the numbers of kvloom/codecs/_rotation.py, with the same sums.
//
// A lane holds 8 channels of a token; lanes that hold a token follow each other. Sums reach 8 channels within a lane, then
// other lanes.
//
// Defines: HEAD_DIM, HADAMARD_POWER (logarithm of the block), HADAMARD_SIGNS (bits of the channels that change sign, a list of
// 32-bit words).
__device__ constexpr unsigned int HADAMARD_SIGN_BITS[] = {HADAMARD_SIGNS};
constexpr float HADAMARD_UNIT = 1.f / (1 << HADAMARD_POWER / 2);
constexpr int HADAMARD_LANES = HEAD_DIM / 8;  // that hold a token

// The eight channels from 8 * lane on, turned, from one row to another; every lane of the warp takes part.
template <class Element> __device__ __forceinline__ void hadamard_turn(const Element* from, Element* to, int lane, bool is_active) {
    constexpr int WORDS = 8 * sizeof(Element) / 16;
    uint4 words[WORDS] = {};
    Element* element = reinterpret_cast<Element*>(words);
    if (is_active)
#pragma unroll
        for (int i = 0; i < WORDS; i++) words[i] = __ldcs(reinterpret_cast<const uint4*>(from) + WORDS * lane + i);
    const unsigned int signs = HADAMARD_SIGN_BITS[lane / 4 % (HEAD_DIM / 32 + (HEAD_DIM % 32 != 0))] >> lane % 4 * 8;
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = static_cast<float>(element[i]) * (signs >> i & 1 ? -HADAMARD_UNIT : HADAMARD_UNIT);
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
#pragma unroll
    for (int i = 0; i < 8; i++) element[i] = static_cast<Element>(x[i]);
    if (is_active)
#pragma unroll
        for (int i = 0; i < WORDS; i++) reinterpret_cast<uint4*>(to)[WORDS * lane + i] = words[i];
}
