// The entry points of the CUDA kernels of ROSA, free of CUDA and torch headers. Definition:
// RWKV-v7/rwkvlm/ops/rosa/__init__.py; gradients: flips.h.
//
// x, q, k, v, out, dout and gradients: [B, T, C] contiguous, bf16 or (fp32 = 1) fp32; symbols [B, C / M, n] of M bits,
// n = L + T with L old ones. Every call is asynchronous on `stream` (a cudaStream_t) and returns 0 or a cudaError_t.
// The results are the same bits on each run.
#pragma once

#include <stdint.h>

struct RosaSize {
    int64_t B, T, C, M, L;
};

struct RosaForward {
    RosaSize size;
    const uint8_t *q, *k, *v;  // [.., n], of q too
    int32_t* runs;  // [.., n]: at first those of the old symbols, then zeros; at the end those of all (RosaState)
    const void *low, *high;  // [C]
    void* out;
    int32_t miss_low;
};

struct RosaBackward {
    RosaSize size;  // L = 0
    const uint8_t *q, *k, *v;  // symbols; k and v null: they are q
    const void* inputs[3];
    const void *dout, *low, *high;
    void* gradients[3];  // null: only the sums
    double* sums;  // [2, B, C]: for low and high, of each sequence
    char* scratch;  // rosa_scratch_bytes(T, M, k is null) for each of `blocks`
    int64_t blocks;
    float tau;
    int32_t miss_low;
};

extern "C" {
int rosa_symbols(const RosaSize* size, const void* x, uint8_t* symbols, int fp32, void* stream);  // behind L old ones
int rosa_forward(const RosaForward* task, int fp32, void* stream);
int rosa_token_rows(int64_t B, int64_t T, int64_t L, const int64_t* k, int32_t* runs, int64_t* y, void* stream);  // k, runs [B, L + T]
int64_t rosa_scratch_bytes(int64_t T, int64_t M, int self);
int rosa_backward(const RosaBackward* task, int fp32, void* stream);
}
