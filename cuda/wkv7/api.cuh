// The entry points of the WKV7 kernels, free of CUDA and torch headers: whoever binds them includes this file.
//
//     S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   d_t = exp(-exp(-1/2) sigmoid(w_t)),   y_t = S_t r_t
//
// Tensors are contiguous device memory, 16 byte aligned. r, w, k, v, a, b, y and their gradients: [B, T, H, N] bf16 or
// fp32; states: fp32 [sequences, H, N, N], rows value, columns key. With cu_seqlens (int32 [documents + 1] on the
// device, from 0 to T, not falling) B is 1 and the sequences are the documents; without it they are the B rows.
// Every call is asynchronous on `stream` (a cudaStream_t) and returns 0, a cudaError_t, or WKV7_UNSUPPORTED. The results
// are the same bits on each run.
#pragma once

#include <stdint.h>

enum { WKV7_BF16 = 0, WKV7_FP32 = 1 };
enum { WKV7_UNSUPPORTED = -1 };

struct Wkv7Shape {
    int32_t B, T, H, N;
    int32_t documents;          // 0 when cu_seqlens is null
    const int32_t* cu_seqlens;  // may be null
    int32_t segment_chunks;     // of the chunked scans; 0: they are not cut into segments
};

struct Wkv7Inputs {
    const void *r, *w, *k, *v, *a, *b;
    const float* initial_state;  // may be null: zeros
};

// One gradient step of test-time training after each of the first (T - 1) / segment segments: with S the first `rows`
// rows of a head's state, kk = -a, targets z = v (stored: v (k . kk)) and P(u) = u + W2 relu(W1 u), S becomes
//     S - rate grad_S sum_t 1/2 |P(S kk_t) - z_t|^2     over the segment's tokens.
struct Wkv7Steps {
    int32_t rows;         // a multiple of 8, at most N
    int32_t hidden;       // rows of W1; 0: without W1 and W2, P(u) = u; at most 32
    int32_t segment;      // tokens, a multiple of a chunk's
    int32_t stored;       // 0 or 1
    const float *rate;    // [H]
    const float *head;    // [2, hidden, rows]: W1 and the transpose of W2
};

struct Wkv7Gradients {
    void *dr, *dw, *dk, *dv, *da, *db;
    float* d_initial_state;  // may be null: not wanted
    // What other uses of r, k and v have given already, [B, T, H, N] like dr, which dr, dk and dv then include; each may be null: nothing.
    const void *more_dr, *more_dk, *more_dv;
};

extern "C" {

// One thread per state row, fp32 arithmetic throughout: N in {16, 32, 64, 128}, bf16 or fp32.
// saved: wkv7_sequential_saved_bytes, written by the forward for its backward; null when there will be none.
// final_state, d_final_state: may be null.
int64_t wkv7_sequential_saved_bytes(const Wkv7Shape* shape);
int wkv7_sequential_forward(const Wkv7Shape* shape, int dtype, const Wkv7Inputs* in, void* y, float* final_state, void* saved,
                            void* stream);
int wkv7_sequential_backward(const Wkv7Shape* shape, int dtype, const Wkv7Inputs* in, const void* saved, const void* dy,
                             const float* d_final_state, const Wkv7Gradients* out, void* stream);

// Chunks of 64 tokens, of 32 for N = 128, on the tensor cores of compute capability 8.0 and above: bf16, any T, N in
// {16, 32, 64, 128}; the state is carried in fp32.
// saved: wkv7_chunked_saved_bytes, written and read by the forward (so never null), then read by the backward. The
// scratches are free after the call. With segment_chunks the scans run in segments of so many chunks (segments.cuh), for
// the same results within rounding; each call may choose anew.
int64_t wkv7_chunked_saved_bytes(const Wkv7Shape* shape);
int64_t wkv7_chunked_forward_scratch_bytes(const Wkv7Shape* shape);
int64_t wkv7_chunked_backward_scratch_bytes(const Wkv7Shape* shape);
int wkv7_chunked_forward(const Wkv7Shape* shape, const Wkv7Inputs* in, void* y, float* final_state, void* saved, void* scratch,
                         void* stream);
int wkv7_chunked_backward(const Wkv7Shape* shape, const Wkv7Inputs* in, const void* saved, const void* dy, const float* d_final_state,
                          const Wkv7Gradients* out, void* scratch, void* stream);

// The same with steps of test-time training in the scans, without cu_seqlens and segments of the scans. The forward's
// scratch is that of wkv7_chunked_forward.
// sums: fp32 [(T - 1) / segment * B, H, 1 + 2 hidden rows], the gradients of rate and head by segment and sequence;
// targets are constants.
int64_t wkv7_ttt_saved_bytes(const Wkv7Shape* shape, const Wkv7Steps* steps);
int64_t wkv7_ttt_backward_scratch_bytes(const Wkv7Shape* shape, const Wkv7Steps* steps);
int wkv7_ttt_forward(const Wkv7Shape* shape, const Wkv7Inputs* in, const Wkv7Steps* steps, void* y, float* final_state, void* saved,
                     void* scratch, void* stream);
int wkv7_ttt_backward(const Wkv7Shape* shape, const Wkv7Inputs* in, const Wkv7Steps* steps, const void* saved, const void* dy,
                      const float* d_final_state, const Wkv7Gradients* out, float* sums, void* scratch, void* stream);
}
