// The fp16 points of a codebook, zeros beyond the last: their low bytes, then their high bytes.
struct Points {
    u64 low[2], high[2];
    __device__ __forceinline__ float operator[](int i) const {
        const u32 l = (i < 8 ? low[0] : low[1]) >> 8 * (i % 8), h = (i < 8 ? high[0] : high[1]) >> 8 * (i % 8);
        return __half2float(__ushort_as_half((l & 0xff) | (h & 0xff) << 8));
    }
};
