// The token shift and its blends, forward and backward, each tensor once (and at the end of a run of 16 tokens the
// gradients of one token more).
#include "rows.cuh"

namespace fused {
namespace {

template <class T> __device__ __forceinline__ Four token_before(const FusedTokenMix& p, const Place& at, int t) {
    const T *x = static_cast<const T*>(p.x), *last = static_cast<const T*>(p.last);
    if (t) return load(x + (int64_t(at.b) * p.T + t - 1) * p.C + at.c);
    return last ? load(last + int64_t(at.b) * p.C + at.c) : zeros();
}

template <class T, int n> __launch_bounds__(threads) __global__ void token_mix(FusedTokenMix p) {
    const Place at(p.B, p.T, p.C);
    if (!at.inside) return;
    Four mix[n];
#pragma unroll
    for (int j = 0; j < n; ++j) mix[j] = load(static_cast<const T*>(p.mix[j]) + at.c);
    Four before = token_before<T>(p, at, at.begin);
    constexpr int batch = 4;  // tokens whose loads are under way together
    for (int t0 = at.begin; t0 < at.end; t0 += batch) {
        const int64_t first = (int64_t(at.b) * p.T + t0) * p.C + at.c;
        Four here[batch];
#pragma unroll
        for (int i = 0; i < batch; ++i)
            if (t0 + i < at.end) here[i] = load(static_cast<const T*>(p.x) + first + int64_t(i) * p.C);
#pragma unroll
        for (int i = 0; i < batch; ++i)
            if (t0 + i < at.end) {
                const Four shift = before - here[i];
#pragma unroll
                for (int j = 0; j < n; ++j) store(static_cast<T*>(p.out[j]) + first + int64_t(i) * p.C, here[i] + shift * mix[j]);
                before = here[i];
            }
    }
}

// dx_t = sum of dout_t (1 - mix) + sum of dout_{t+1} mix: from the last token of the run to the first, so that the second sum is at hand.
template <class T, int n> __launch_bounds__(threads) __global__ void token_mix_backward(FusedTokenMix p) {
    const Place at(p.B, p.T, p.C);
    Four sums[n];
#pragma unroll
    for (int j = 0; j < n; ++j) sums[j] = zeros();
    if (at.inside) {
        Four mix[n], next = zeros();
#pragma unroll
        for (int j = 0; j < n; ++j) mix[j] = load(static_cast<const T*>(p.mix[j]) + at.c);
        const int64_t sequence = int64_t(at.b) * p.T * p.C + at.c;
        if (at.end < p.T) {
#pragma unroll
            for (int j = 0; j < n; ++j) next += load(static_cast<const T*>(p.dout[j]) + sequence + int64_t(at.end) * p.C) * mix[j];
        }
        Four here = load(static_cast<const T*>(p.x) + sequence + int64_t(at.end - 1) * p.C);
        for (int t = at.end - 1; t >= at.begin; --t) {
            const int64_t offset = sequence + int64_t(t) * p.C;
            Four d[n];
#pragma unroll
            for (int j = 0; j < n; ++j) d[j] = load(static_cast<const T*>(p.dout[j]) + offset);
            const Four before = token_before<T>(p, at, t), shift = before - here;
            Four dx = next;
            next = zeros();
#pragma unroll
            for (int j = 0; j < n; ++j) {
                const Four back = d[j] * mix[j];
                dx += d[j] - back;
                next += back;
                sums[j] += d[j] * shift;
            }
            store(static_cast<T*>(p.dx) + offset, dx);
            here = before;
        }
        if (at.begin == 0 && p.dlast) store(static_cast<T*>(p.dlast) + int64_t(at.b) * p.C + at.c, next);
    }
    leave_sums(sums, at, p.C, p.parts);
}

template <class T, int n> int forward(const FusedTokenMix& p, void* stream) {
    return launch(token_mix<T, n>, grid_of(p.B, p.T, p.C), threads, 0, stream, p);
}

template <class T, int n> int backward(const FusedTokenMix& p, void* stream) {
    const int error = launch(token_mix_backward<T, n>, grid_of(p.B, p.T, p.C), threads, sums_bytes<n>, stream, p);
    return error ? error : collect_sums<T>(p.parts, fused_parts(p.B, p.T), n * p.C, p.dmix, stream);
}

}  // namespace
}  // namespace fused

#define FUSED_DISPATCH(function)                                                                                         \
    if (!fused::valid(task->B, task->T, task->C)) return FUSED_UNSUPPORTED;                                              \
    const bool bf16 = dtype == FUSED_BF16;                                                                               \
    switch (task->n) {                                                                                                   \
        case 1: return bf16 ? fused::function<fused::bf16, 1>(*task, stream) : fused::function<float, 1>(*task, stream); \
        case 2: return bf16 ? fused::function<fused::bf16, 2>(*task, stream) : fused::function<float, 2>(*task, stream); \
        case 3: return bf16 ? fused::function<fused::bf16, 3>(*task, stream) : fused::function<float, 3>(*task, stream); \
        case 4: return bf16 ? fused::function<fused::bf16, 4>(*task, stream) : fused::function<float, 4>(*task, stream); \
        case 6: return bf16 ? fused::function<fused::bf16, 6>(*task, stream) : fused::function<float, 6>(*task, stream); \
    }                                                                                                                    \
    return FUSED_UNSUPPORTED;

extern "C" int64_t fused_parts(int64_t B, int64_t T) {
    using namespace fused;
    return (B * ((T + run_tokens - 1) / run_tokens) + warps - 1) / warps;
}
extern "C" int fused_token_mix(const FusedTokenMix* task, int dtype, void* stream) { FUSED_DISPATCH(forward) }
extern "C" int fused_token_mix_backward(const FusedTokenMix* task, int dtype, void* stream) { FUSED_DISPATCH(backward) }
