// The entry points of the WKV4 CUDA kernels, free of CUDA and torch headers. Formulas: RWKV-v7/rwkvlm/ops/wkv4.
//
// Tensors are contiguous device memory: k, v, y and their gradients [B, T, C] bf16 or fp32, all else fp32; a state is [3, C]. Every call is
// asynchronous on `stream` (a cudaStream_t) and returns 0, a cudaError_t, or WKV4_UNSUPPORTED. The results are the same bits on each run.
#pragma once

#include <stdint.h>

enum { WKV4_BF16 = 0, WKV4_FP32 = 1 };
enum { WKV4_UNSUPPORTED = -1 };
enum { WKV4_SEGMENT = 32 };  // tokens; segments = ceil(T / WKV4_SEGMENT)

struct Wkv4Task {
    int32_t B, T, C;
    const float *w, *u;    // [C]: logarithm of the decay, bonus
    const void *k, *v;
    const float* initial;  // [B, 3, C]; null: nothing seen yet
    void* y;
    float* final;          // [B, 3, C]
    float* starts;         // [B, segments, 3, C], states before the segments: written by the forward, read by the backward
    const void* dy;
    const float* d_final;  // [B, 3, C]: gradients of numerator and denominator, and of the exponent what is not through these; null: zeros
    void *dk, *dv;
    float* d_starts;       // [B, segments, 4, C], scratch
    float* d_initial;      // [B, 3, C]
    float* sums;           // [2, B * segments, C]: gradients of w and u by segment
};

extern "C" {
int wkv4_forward(const Wkv4Task* task, int dtype, void* stream);
int wkv4_backward(const Wkv4Task* task, int dtype, void* stream);
}
