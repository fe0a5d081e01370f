// What every WKV7 kernel needs: the decay, and where a sequence lies.
#pragma once

#include "../common/device.cuh"
#include "api.cuh"

namespace wkv7 {

using namespace device;

constexpr float decay_scale = -0.60653065971263342f;  // -exp(-1/2)

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
__device__ __forceinline__ float log_decay(float w) { return decay_scale * sigmoid(w); }
// d log(decay) / dw. 1 - sigmoid(w) is taken as sigmoid(-w): no digit is lost where the sigmoid is near 1.
__device__ __forceinline__ float log_decay_slope(float w) { return decay_scale * sigmoid(w) * sigmoid(-w); }

// Sequences cut into chunks of C tokens. Each (chunk, head) owns a slot in the workspaces. Sequence s of packed documents begins at slot
// floor(start / C) + s: slots never overlap, a few stay empty, and their number needs no look at cu_seqlens.
struct Sequences {
    int T, H, count;
    const int* bounds;  // cu_seqlens, or null: every sequence has T tokens

    // Bounds that are not what they should be must not lead beyond the tensors: nobody has waited for the device to look at them.
    __device__ int bound(int s) const { return min(max(bounds[s], 0), T); }
    __device__ int start(int s) const { return bounds ? bound(s) : s * T; }
    __device__ int length(int s) const { return bounds ? max(bound(s + 1) - bound(s), 0) : T; }
    template <int C> __device__ int first_slot(int s) const { return bounds ? bound(s) / C + s : s * ceil_div(T, C); }
    template <int C> __host__ __device__ int slots() const { return bounds ? T / C + count : count * ceil_div(T, C); }
};

inline Sequences sequences_of(const Wkv7Shape& shape) {
    return {shape.T, shape.H, shape.cu_seqlens ? shape.documents : shape.B, shape.cu_seqlens};
}

inline bool valid(const Wkv7Shape& s) {
    return s.B >= 1 && s.T >= 1 && s.H >= 1 && s.H <= 65535 && s.segment_chunks >= 0 &&
           (s.cu_seqlens ? s.B == 1 && s.documents >= 1 : true) && int64_t(s.B) * s.T <= INT32_MAX;
}

}  // namespace wkv7
