// WKV4 on the GPU, a thread for each channel of each segment of 32 tokens: B C threads alone would leave most of the chip idle.
//
// A segment maps the state before it to the one after it as A, B -> exp(32 w) A + (its own A), likewise B. So: its own
// state from nothing (ends), the states before all segments (carry), then all outputs side by side. Backward likewise:
// what the segment's tokens send to the state before it, and by how much it passes on what comes from behind (slopes),
// the gradients behind all segments (carry_back), then all gradients side by side. Names and formulas are those of
// cpu.cpp: weights that are at most 1, of two the larger one exactly, so that nothing overflows, whatever the keys.
// Bytes: forward reads k and v twice; backward reads k, v and dy twice, most of k and v soon after once more, and each
// state of 12 bytes stands for 32 tokens.
#include "../common/device.cuh"
#include "api.cuh"

namespace wkv4 {
namespace {

using namespace device;

constexpr int threads = 128, segment = WKV4_SEGMENT, stretch = 8;  // tokens in registers
constexpr float empty = -1e38f;

// exp(old - q) and exp(fresh - q), q the larger of them. A NaN stays one.
struct Weights {
    float old, fresh;
    bool stays;  // old is the larger

    __device__ __forceinline__ Weights(float old_exponent, float fresh_exponent) {
        const float difference = old_exponent - fresh_exponent, less = expf(-fabsf(difference));
        stays = difference > 0.f;
        old = stays ? 1.f : less;
        fresh = stays ? less : 1.f;
    }
};

struct State {
    float a, b, p;

    __device__ __forceinline__ void advance(float w, float k, float v) {
        const Weights f(p + w, k);
        a = f.old * a + f.fresh * v;
        b = f.old * b + f.fresh;
        p = f.stays ? p + w : k;
    }
};
__device__ __forceinline__ State load(const float* from, int C) { return {from[0], from[C], from[2 * C]}; }
__device__ __forceinline__ void store(float* to, int C, State s) { to[0] = s.a, to[C] = s.b, to[2 * C] = s.p; }

// Of a thread: its channel, sequence and segment, and the tokens of that.
struct Place {
    int c, b, s, segments, begin, end;

    __device__ __forceinline__ explicit Place(const Wkv4Task& p) {
        const int columns = ceil_div(p.C, threads), row = blockIdx.x / columns;
        segments = ceil_div(p.T, segment);
        c = blockIdx.x % columns * threads + threadIdx.x;
        b = row / segments;
        s = row % segments;
        begin = s * segment;
        end = min(begin + segment, p.T);
    }
    __device__ __forceinline__ int64_t token(const Wkv4Task& p, int t) const { return (int64_t(b) * p.T + t) * p.C + c; }
    __device__ __forceinline__ float* start(const Wkv4Task& p, int which) const {
        return p.starts + (int64_t(b) * segments + which) * 3 * p.C + c;
    }
    __device__ __forceinline__ float* slope(const Wkv4Task& p, int which) const {
        return p.d_starts + (int64_t(b) * segments + which) * 4 * p.C + c;
    }
};

// Numbers of tokens t0 .. t0 + stretch - 1, fetched together; zeros from `end` on.
template <class T> struct Tokens {
    float x[stretch];

    __device__ __forceinline__ Tokens(const void* from, int64_t at, int C, int count) {
#pragma unroll
        for (int i = 0; i < stretch; ++i) x[i] = i < count ? to_float(static_cast<const T*>(from)[at + int64_t(i) * C]) : 0.f;
    }
};

// The state that a segment leaves where it begins with nothing; to the place of the next one's start.
template <class T> __launch_bounds__(threads) __global__ void ends(Wkv4Task p) {
    const Place at(p);
    if (at.c >= p.C || at.s + 1 == at.segments) return;
    const float w = p.w[at.c];
    State state{0.f, 0.f, empty};
#pragma unroll 1
    for (int t = at.begin; t < at.end; t += stretch) {  // whole: only the last segment may not be
        const Tokens<T> k(p.k, at.token(p, t), p.C, stretch), v(p.v, at.token(p, t), p.C, stretch);
#pragma unroll
        for (int i = 0; i < stretch; ++i) state.advance(w, k.x[i], v.x[i]);
    }
    store(at.start(p, at.s + 1), p.C, state);
}

__launch_bounds__(threads) __global__ void carry(Wkv4Task p) {
    const int channel = blockIdx.x * threads + threadIdx.x, b = channel / p.C, c = channel % p.C, segments = ceil_div(p.T, segment);
    if (b >= p.B) return;
    const float w = p.w[c] * segment;
    float* starts = p.starts + int64_t(b) * segments * 3 * p.C + c;
    State state = p.initial ? load(p.initial + int64_t(b) * 3 * p.C + c, p.C) : State{0.f, 0.f, empty};
    store(starts, p.C, state);
    constexpr int batch = 4;
#pragma unroll 1
    for (int s = 1; s < segments; s += batch) {
        State own[batch];
#pragma unroll
        for (int i = 0; i < batch; ++i) own[i] = s + i < segments ? load(starts + int64_t(s + i) * 3 * p.C, p.C) : state;
#pragma unroll
        for (int i = 0; i < batch; ++i)
            if (s + i < segments) {
                const Weights f(state.p + w, own[i].p);
                state = {f.old * state.a + f.fresh * own[i].a, f.old * state.b + f.fresh * own[i].b, f.stays ? state.p + w : own[i].p};
                store(starts + int64_t(s + i) * 3 * p.C, p.C, state);
            }
    }
}

template <class T> __launch_bounds__(threads) __global__ void outputs(Wkv4Task p) {
    const Place at(p);
    if (at.c >= p.C) return;
    const float w = p.w[at.c], u = p.u[at.c];
    State state = load(at.start(p, at.s), p.C);
#pragma unroll 1
    for (int t = at.begin; t < at.end; t += stretch) {
        const int64_t first = at.token(p, t);
        const Tokens<T> k(p.k, first, p.C, at.end - t), v(p.v, first, p.C, at.end - t);
#pragma unroll
        for (int i = 0; i < stretch; ++i)
            if (t + i < at.end) {
                const Weights e(state.p, u + k.x[i]);
                static_cast<T*>(p.y)[first + int64_t(i) * p.C] =
                    from_float<T>((e.old * state.a + e.fresh * v.x[i]) / (e.old * state.b + e.fresh));
                state.advance(w, k.x[i], v.x[i]);
            }
    }
    if (at.s + 1 == at.segments) store(p.final + int64_t(at.b) * 3 * p.C + at.c, p.C, state);
}

// Of a segment: the gradients of the a and b before it that its own outputs make; the factor by which it passes on
// those behind it; whether the exponent behind it is still that of the state before it.
template <class T> __launch_bounds__(threads) __global__ void slopes(Wkv4Task p) {
    const Place at(p);
    if (at.c >= p.C) return;
    const float w = p.w[at.c], u = p.u[at.c];
    State state = load(at.start(p, at.s), p.C);
    float old = state.p, ga = 0.f, gb = 0.f;  // old: p of the state before the segment, decayed since
    bool stays = true;
#pragma unroll 1
    for (int t = at.begin; t < at.end; t += stretch) {
        const int64_t first = at.token(p, t);
        const Tokens<T> k(p.k, first, p.C, at.end - t), v(p.v, first, p.C, at.end - t), dy(p.dy, first, p.C, at.end - t);
#pragma unroll
        for (int i = 0; i < stretch; ++i)
            if (t + i < at.end) {
                const Weights e(state.p, u + k.x[i]);
                const float inverse = 1.f / (e.old * state.b + e.fresh), y = (e.old * state.a + e.fresh * v.x[i]) * inverse;
                const float z = dy.x[i] * inverse * e.old * expf(old - state.p);
                ga += z;
                gb -= z * y;
                stays = stays && state.p + w > k.x[i];
                state.advance(w, k.x[i], v.x[i]);
                old += w;
            }
    }
    float* to = at.slope(p, at.s);
    to[0] = ga, to[p.C] = gb, to[2 * p.C] = expf(old - state.p), to[3 * p.C] = stays ? 1.f : 0.f;
}

__launch_bounds__(threads) __global__ void carry_back(Wkv4Task p) {
    const int channel = blockIdx.x * threads + threadIdx.x, b = channel / p.C, c = channel % p.C, segments = ceil_div(p.T, segment);
    if (b >= p.B) return;
    const int64_t state = int64_t(b) * 3 * p.C + c;
    float* slopes = p.d_starts + int64_t(b) * segments * 4 * p.C + c;
    State g = p.d_final ? load(p.d_final + state, p.C) : State{0.f, 0.f, 0.f};
    constexpr int batch = 4;
#pragma unroll 1
    for (int s = segments - 1; s >= 0; s -= batch) {
        float own[batch][4];
#pragma unroll
        for (int i = 0; i < batch; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) own[i][j] = s - i >= 0 ? slopes[(int64_t(s - i) * 4 + j) * p.C] : 0.f;
#pragma unroll
        for (int i = 0; i < batch; ++i)
            if (s - i >= 0) {
                store(slopes + int64_t(s - i) * 4 * p.C, p.C, g);
                g = {own[i][2] * g.a + own[i][0], own[i][2] * g.b + own[i][1], own[i][3] != 0.f ? g.p : 0.f};
            }
    }
    const State first = load(p.starts + int64_t(b) * segments * 3 * p.C + c, p.C);
    store(p.d_initial + state, p.C, {g.a, g.b, g.a * first.a + g.b * first.b + g.p});
}

template <class T> __launch_bounds__(threads) __global__ void gradients(Wkv4Task p) {
    const Place at(p);
    if (at.c >= p.C) return;
    const float w = p.w[at.c], u = p.u[at.c];
    State g = load(at.slope(p, at.s), p.C);  // p: what is not through a and b
    State starts[segment / stretch];  // of the stretches, from which the states in between are made again
    starts[0] = load(at.start(p, at.s), p.C);
#pragma unroll
    for (int n = 1; n < segment / stretch; ++n) {
        const int t = at.begin + (n - 1) * stretch;
        starts[n] = starts[n - 1];
        const Tokens<T> k(p.k, at.token(p, t), p.C, at.end - t), v(p.v, at.token(p, t), p.C, at.end - t);
#pragma unroll
        for (int i = 0; i < stretch; ++i) starts[n].advance(w, k.x[i], v.x[i]);  // behind the last token it does not matter
    }
    float dw = 0.f, du = 0.f;
#pragma unroll
    for (int n = segment / stretch - 1; n >= 0; --n) {
        const int t = at.begin + n * stretch;
        const int64_t first = at.token(p, t);
        const Tokens<T> k(p.k, first, p.C, at.end - t), v(p.v, first, p.C, at.end - t), dy(p.dy, first, p.C, at.end - t);
        State before[stretch];
        before[0] = starts[n];
#pragma unroll
        for (int i = 1; i < stretch; ++i) {
            before[i] = before[i - 1];
            before[i].advance(w, k.x[i - 1], v.x[i - 1]);
        }
#pragma unroll
        for (int i = stretch - 1; i >= 0; --i)
            if (t + i < at.end) {
                const State s = before[i];
                const float kt = k.x[i], vt = v.x[i];
                const Weights e(s.p, u + kt), f(s.p + w, kt);
                const float inverse = 1.f / (e.old * s.b + e.fresh), y = (e.old * s.a + e.fresh * vt) * inverse, z = dy.x[i] * inverse;
                const float bonus = e.fresh * z * (vt - y);
                static_cast<T*>(p.dv)[first + int64_t(i) * p.C] = from_float<T>(f.fresh * g.a + e.fresh * z);
                static_cast<T*>(p.dk)[first + int64_t(i) * p.C] = from_float<T>(bonus + f.fresh * (g.a * vt + g.b) + (f.stays ? 0.f : g.p));
                if (!f.stays) g.p = 0.f;
                dw += f.old * (g.a * s.a + g.b * s.b) + g.p;
                du += bonus;
                g.a = f.old * g.a + e.old * z;
                g.b = f.old * g.b - e.old * z * y;
            }
    }
    const int64_t rows = int64_t(p.B) * at.segments, row = int64_t(at.b) * at.segments + at.s;
    p.sums[row * p.C + at.c] = dw;
    p.sums[(rows + row) * p.C + at.c] = du;
}

bool valid(const Wkv4Task& p) {
    const int64_t segments = (int64_t(p.T) + segment - 1) / segment, columns = (int64_t(p.C) + threads - 1) / threads;
    return p.B >= 1 && p.T >= 1 && p.T <= INT32_MAX - segment && p.C >= 1 && int64_t(p.B) * p.C <= INT32_MAX - threads &&
           p.B * segments * columns <= INT32_MAX;
}
dim3 all(const Wkv4Task& p) { return dim3(unsigned(p.B) * unsigned(ceil_div(p.T, segment)) * unsigned(ceil_div(p.C, threads))); }
dim3 channels(const Wkv4Task& p) { return dim3(unsigned(ceil_div(p.B * p.C, threads))); }

template <class T> int forward(const Wkv4Task& p, void* stream) {
    int error = p.T > segment ? launch(ends<T>, all(p), threads, 0, stream, p) : 0;
    if (!error) error = launch(carry, channels(p), threads, 0, stream, p);
    return error ? error : launch(outputs<T>, all(p), threads, 0, stream, p);
}

template <class T> int backward(const Wkv4Task& p, void* stream) {
    int error = launch(slopes<T>, all(p), threads, 0, stream, p);
    if (!error) error = launch(carry_back, channels(p), threads, 0, stream, p);
    return error ? error : launch(gradients<T>, all(p), threads, 0, stream, p);
}

}  // namespace
}  // namespace wkv4

extern "C" int wkv4_forward(const Wkv4Task* task, int dtype, void* stream) {
    if (!wkv4::valid(*task)) return WKV4_UNSUPPORTED;
    return dtype == WKV4_BF16 ? wkv4::forward<wkv4::bf16>(*task, stream) : wkv4::forward<float>(*task, stream);
}

extern "C" int wkv4_backward(const Wkv4Task* task, int dtype, void* stream) {
    if (!wkv4::valid(*task)) return WKV4_UNSUPPORTED;
    return dtype == WKV4_BF16 ? wkv4::backward<wkv4::bf16>(*task, stream) : wkv4::backward<float>(*task, stream);
}
