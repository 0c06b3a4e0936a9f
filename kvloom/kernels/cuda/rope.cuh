// Rotary positions of a head (arXiv:2104.09864): x * cos + [-x's second half, x's first half] * sin, rounded after every step.
//
// Defines: HEAD_DIM.
#include "channels.cuh"

// What eight channels are made of, asked for before it is needed. row, cos and sin [HEAD_DIM].
template <class Element> struct Roped {
    Eight<Element> x, across, cos, sin;
    float sign;

    __device__ __forceinline__ Roped(const Element* row, const Element* cos, const Element* sin, int lane)
        : x(row, lane), cos(cos, lane), sin(sin, lane) {
        constexpr int HALF = HEAD_DIM / 2 / 8;  // lanes of half a head
        sign = lane < HALF ? -1.f : 1.f;
        across = Eight<Element>(row, lane < HALF ? lane + HALF : lane - HALF);
    }
    __device__ __forceinline__ Eight<Element> turned() const {
        Eight<Element> straight, crossed, sum;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            straight.set(i, x.get(i) * cos.get(i));
            crossed.set(i, sign * across.get(i) * sin.get(i));
            sum.set(i, straight.get(i) + crossed.get(i));
        }
        return sum;
    }
};
