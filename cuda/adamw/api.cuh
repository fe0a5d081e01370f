// The entry points of the CUDA kernels of the optimizer, free of CUDA and torch headers. Formulas: RWKV-v7/rwkvlm/ops/adamw/reference.py.
//
// Arrays have an entry for each of n tensors and lie in host memory, which is free again when the call returns:
// addresses and sizes travel in the kernels' parameters. The tensors are contiguous device memory of any size, aligned
// as their elements are; those at multiples of 16 bytes are read faster. Arithmetic is fp32. Every call is asynchronous
// on `stream` (a cudaStream_t), can be captured in a CUDA graph, and returns 0, a cudaError_t or ADAMW_UNSUPPORTED. The
// results are the same bits on each run.
#pragma once

#include <stdint.h>

enum { ADAMW_UNSUPPORTED = -1 };

struct AdamwStep {
    int64_t n;
    const int64_t* sizes;  // elements
    float* const* masters;
    void* const* rounded;  // bf16; null: none
    const void* const* grads;
    const uint8_t* narrow;  // whether a gradient is bf16; else it is fp32
    float* const* exp_avgs;
    float* const* exp_avg_sqs;
    float* const* steps;  // scalars, each in a place of its own; raised by 1
    const float* scale;  // scalar that multiplies the gradients; null: 1
    const float* found_inf;  // scalar: where it is not 0, nothing changes; null: 0
    float* rates;  // memory for [n, 4], 16 byte aligned
    double lr, beta1, beta2, eps, weight_decay;
};

extern "C" {
int adamw_step(const AdamwStep* task, void* stream);

// norms [n] fp32: the square root of the sum of squares of each gradient. parts: memory for fp32 [adamw_norm_parts(n, sizes)].
int64_t adamw_norm_parts(int64_t n, const int64_t* sizes);
int adamw_norms(int64_t n, const int64_t* sizes, const void* const* grads, const uint8_t* narrow, float* parts, float* norms, void* stream);
}
