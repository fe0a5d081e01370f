// Pairs of bf16 in one register.
#pragma once

#include "device.cuh"

namespace device {

// Two floats as bf16 in one register, the first in the low half.
__device__ __forceinline__ uint32_t pack(float low, float high) {
#ifdef __CUDACC__
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
#else
    return __float2bfloat16_rn(low).bits | uint32_t(__float2bfloat16_rn(high).bits) << 16;
#endif
}
__device__ __forceinline__ float2 unpack(uint32_t x) {
#ifdef __CUDACC__
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
#else
    return make_float2(emulation::bf16_low(x), emulation::bf16_high(x));
#endif
}

}  // namespace device
