// The entry points of the CUDA kernels for the elementwise parts of a block, free of CUDA and torch headers. Formulas:
// RWKV-v7/rwkvlm/ops/fused.
//
// Tensors are contiguous device memory, 16 byte aligned, bf16 or fp32 alike; C is a multiple of 4, arithmetic is fp32. Every call is
// asynchronous on `stream` (a cudaStream_t) and returns 0, a cudaError_t, or FUSED_UNSUPPORTED. The results are the same bits on each run:
// gradients of parameters are first summed over the tokens of a block into `parts`, fp32 [fused_parts(B, T), vectors, C], then over blocks.
#pragma once

#include <stdint.h>

enum { FUSED_BF16 = 0, FUSED_FP32 = 1 };
enum { FUSED_UNSUPPORTED = -1 };

// out[j] = x + (x of the token before - x) * mix[j], for n = 1, 2, 3, 4 or 6
struct FusedTokenMix {
    int32_t B, T, C, n;
    const void *x, *last;  // [B, T, C]; [B, C], null: zeros
    const void* mix[6];    // [C]
    void* out[6];
    const void* dout[6];
    void *dx, *dlast, *dmix;  // dlast may be null; dmix [n, C]
    float* parts;
};

// s = x + branch;  u = s, normalised over the channels of a token, * weight + bias;  out[j] = u + (u of the token
// before - u) * mix[j], for n = 1 or 6. Backward has s as x. Its parts are [blocks, n + 2, C], and blocks is what
// fused_norm_parts makes of B, T, C and n.
struct FusedNormMix {
    int32_t B, T, C, n, documents, blocks;
    float eps;
    const void *x, *branch;  // [B, T, C]; branch null: s is x
    const void *weight, *bias;  // [C]
    const void* last;  // [B, C], u of the tokens before the first ones; null: zeros
    // [documents + 1], B = 1: where documents begin, at last T; u of a document's last token is zeros. documents = 0: none
    const int32_t* bounds;
    const void* mix[6];  // [C]
    void* stream;  // s; not written where branch is null
    float* moments;  // [B, T, 2], from forward to backward
    void* newest;  // [B, C], u of the last tokens
    void* out[6];
    const void *dstream, *dnewest;  // null: zeros
    const void* dout[6];
    void *dx, *dlast;  // dlast may be null
    void* sums;  // [n + 2, C]: gradients of the mixes, of weight and bias
    float* parts;
};

// What lies between the projections and the wkv7 operator. Heads of N in {16, 32, 64, 128} channels.
struct FusedInputs {
    int32_t rows, C, N;
    const void *w_low, *k, *a_low, *v, *v_first, *v_low;  // v_first, v_low and v0 null: no value residual
    const void *w0, *k_k, *k_a, *a0, *v0;
    void *w, *k_out, *a, *b, *v_out;
    const void *dw, *dk_out, *da, *db, *dv_out;
    const void* more_dv_first;  // what other uses of v_first have given, which dv_first then includes; null: nothing
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
int64_t fused_parts(int64_t B, int64_t T);  // where rows are no sequences: B = 1, T = rows (B = rows, T = 1 makes many more)

// Asks the GPU in use how many blocks it runs at once. 0: a shape that the kernels do not take.
int64_t fused_norm_parts(const FusedNormMix* task, int dtype);

int fused_norm_mix(const FusedNormMix* task, int dtype, void* stream);
int fused_norm_mix_backward(const FusedNormMix* task, int dtype, void* stream);
int fused_token_mix(const FusedTokenMix* task, int dtype, void* stream);
int fused_token_mix_backward(const FusedTokenMix* task, int dtype, void* stream);
int fused_time_mix_inputs(const FusedInputs* task, int dtype, void* stream);
int fused_time_mix_inputs_backward(const FusedInputs* task, int dtype, void* stream);
int fused_time_mix_output(const FusedOutput* task, int dtype, void* stream);
int fused_time_mix_output_backward(const FusedOutput* task, int dtype, void* stream);

// y = max(x, 0)^2; dx = 2 max(x, 0) dy, from y. count is a multiple of 4.
int fused_relu_square(const void* x, void* y, int64_t count, int dtype, void* stream);
int fused_relu_square_backward(const void* dy, const void* y, void* dx, int64_t count, int dtype, void* stream);
}
