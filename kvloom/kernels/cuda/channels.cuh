// Eight channels of a head from 8 * lane on, as a lane holds them. Rows lie at multiples of 16 bytes.
template <class Element> struct Eight {
    static constexpr int WORDS = 8 * sizeof(Element) / 16;
    uint4 words[WORDS];

    __device__ __forceinline__ Eight() {}
    __device__ __forceinline__ Eight(const Element* row, int lane) {
#pragma unroll
        for (int i = 0; i < WORDS; i++) words[i] = reinterpret_cast<const uint4*>(row)[WORDS * lane + i];
    }
    __device__ __forceinline__ void store(Element* row, int lane) const {
#pragma unroll
        for (int i = 0; i < WORDS; i++) reinterpret_cast<uint4*>(row)[WORDS * lane + i] = words[i];
    }
    __device__ __forceinline__ float get(int i) const { return static_cast<float>(reinterpret_cast<const Element*>(words)[i]); }
    __device__ __forceinline__ void set(int i, float x) { reinterpret_cast<Element*>(words)[i] = static_cast<Element>(x); }
};
