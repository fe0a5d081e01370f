// The entry points of the CUDA kernels for the elementwise parts of a block, free of CUDA and torch headers. Formulas: RWKV-v7/rwkvlm/ops/fused.
//
// Tensors are contiguous device memory, 16 byte aligned, bf16 or fp32 alike; C is a multiple of 4, arithmetic is fp32. Every call is
// asynchronous on `stream` (a cudaStream_t) and returns 0, a cudaError_t, or FUSED_UNSUPPORTED. The results are the same bits on each run:
// gradients of parameters are first summed over the tokens of a block into `parts`, fp32 [fused_parts(B, T), vectors, C], then over blocks.
#pragma once

#include <stdint.h>

enum { FUSED_BF16 = 0, FUSED_FP32 = 1 };
enum { FUSED_UNSUPPORTED = -1 };

// out[j] = x + (x of the token before - x) * mix[j], for n = 1 or 6
struct FusedTokenMix {
    int32_t B, T, C, n;
    const void *x, *last;  // [B, T, C]; [B, C], null: zeros
    const void* mix[6];    // [C]
    void* out[6];
    const void* dout[6];
    void *dx, *dlast, *dmix;  // dlast may be null; dmix [n, C]
    float* parts;
};

// What lies between the projections and the wkv7 operator. Heads of N in {16, 32, 64, 128} channels.
struct FusedInputs {
    int32_t rows, C, N, unused;
    const void *w_low, *k, *a_low, *v, *v_first, *v_low;  // v_first, v_low and v0 null: no value residual
    const void *w0, *k_k, *k_a, *a0, *v0;
    void *w, *k_out, *a, *b, *v_out;
    const void *dw, *dk_out, *da, *db, *dv_out;
    void *dk, *da_low, *dv, *dv_first, *dv_low;
    void* sums;  // [5, C]: gradients of w0, k_k, k_a, a0, v0
    float* parts;
};

// What lies between the operator and the output projection. Heads as above.
struct FusedOutput {
    int32_t rows, C, N;
    float eps;
    const void *y, *r, *k, *v, *g;
    const void *weight, *bias, *r_k;
    void* out;
    const void* dout;
    void *dy, *dr, *dk, *dv, *dg;
    void* sums;  // [3, C]: gradients of weight, bias, r_k
    float* parts;
};

extern "C" {
int64_t fused_parts(int64_t B, int64_t T);  // of rows that are not sequences: B = rows, T = 1 gives too many; pass B = 1, T = rows

int fused_token_mix(const FusedTokenMix* task, int dtype, void* stream);
int fused_token_mix_backward(const FusedTokenMix* task, int dtype, void* stream);
int fused_time_mix_inputs(const FusedInputs* task, int dtype, void* stream);
int fused_time_mix_inputs_backward(const FusedInputs* task, int dtype, void* stream);
int fused_time_mix_output(const FusedOutput* task, int dtype, void* stream);
int fused_time_mix_output_backward(const FusedOutput* task, int dtype, void* stream);

// y = max(x, 0)^2; dx = 2 max(x, 0) dy. count is a multiple of 4.
int fused_relu_square(const void* x, void* y, int64_t count, int dtype, void* stream);
int fused_relu_square_backward(const void* dy, const void* x, void* dx, int64_t count, int dtype, void* stream);
}
