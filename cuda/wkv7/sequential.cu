// WKV7 token by token in fp32, one thread per state row (forward) and per row and column (backward): any shape, bf16 or fp32.
// One block of N threads per (sequence, head). Not the fast path: chunked_*.cu is; this one serves fp32 and old cards.
//
// The backward goes over chunks of 16 tokens from the last to the first. It never divides by a decay, and never rebuilds a state inside the
// chunk. With S0 the checkpoint that enters the chunk, G the gradient of the state that leaves it, s_t = S_{t-1} a_t (saved) and
// u_t = dL/ds_t, column j of a state inside the chunk is a recurrence over scalars:
//     S_t[:,j] . x = ( ... (S0[:,j] . x) d_1 + b_1 (s_1 . x) + k_1 (v_1 . x) ...) d_t + b_t (s_t . x) + k_t (v_t . x)      (all at j)
// so that dr_t = S_t^T dy_t, da_t = S_{t-1}^T u_t, dk_t = G_t^T v_t and db_t = G_t^T s_t need the 16 x 16 tables u.s, u.v, dy.s, dy.v and
// products with S0 and G alone. u_t = G_t b_t and dv_t = G_t k_t come from the row that each thread carries. The decay:
//     dlogd_t = dlogd_{t+1} + a_{t+1} da_{t+1} + r_t dr_t - b_t db_t - k_t dk_t,   begun with sum_i G[i,j] S_end[i,j] after the last token.
#include "device.cuh"

namespace wkv7 {
namespace {

constexpr int C = 16;  // tokens between two checkpoints

template <class T> struct Inputs {
    const T *r, *w, *k, *v, *a, *b;
    const float* initial_state;
    explicit Inputs(const Wkv7Inputs& in)
        : r((const T*)in.r), w((const T*)in.w), k((const T*)in.k), v((const T*)in.v), a((const T*)in.a), b((const T*)in.b),
          initial_state(in.initial_state) {}
};

template <class T> struct Gradients {
    T *dr, *dw, *dk, *dv, *da, *db;
    float* d_initial_state;
    const T *more_dr, *more_dk, *more_dv;
    explicit Gradients(const Wkv7Gradients& g)
        : dr((T*)g.dr), dw((T*)g.dw), dk((T*)g.dk), dv((T*)g.dv), da((T*)g.da), db((T*)g.db), d_initial_state(g.d_initial_state),
          more_dr((const T*)g.more_dr), more_dk((const T*)g.more_dk), more_dv((const T*)g.more_dv) {}
};

// What the forward leaves for the backward, fp32: the state after each chunk [slots, H, N, N] and s_t = S_{t-1} a_t [B, T, H, N].
template <int N> struct Saved {
    float *checkpoints, *s;
    Saved(const Sequences& q, void* memory)
        : checkpoints((float*)memory), s(checkpoints ? checkpoints + int64_t(q.slots<C>()) * q.H * N * N : nullptr) {}
};

// Tokens of a chunk in shared memory: rows of N floats, padded so that float4 reads of different rows touch different banks.
template <int N> struct Tokens {
    static constexpr int stride = N + 4;
    static constexpr int size = C * stride;
    float* base;
    __device__ float& at(int t, int i) const { return base[t * stride + i]; }
    __device__ float4 four(int t, int i) const { return *reinterpret_cast<const float4*>(base + t * stride + i); }
};

__device__ __forceinline__ float dot(float4 x, float4 y, float sum) { return sum + x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w; }

// Blocks on a multiprocessor: of 8 warps together, so that a thread may have 255 registers. Its row and its sums need them.
constexpr int blocks_per_sm(int N) { return N > 32 ? 256 / N : 8; }

// Token t of the chunk, channel i = the thread; 0 behind the end (then k = v = a = b = r = 0 and d = 1 leave state and gradients alone).
template <class T>
__device__ __forceinline__ float load(const T* x, int64_t offset, bool inside) {
    return inside ? to_float(x[offset]) : 0.f;
}

template <class T, int N> __launch_bounds__(N, blocks_per_sm(N))
__global__ void sequential_forward(Sequences q, Inputs<T> in, T* __restrict__ y, float* __restrict__ final_state, Saved<N> saved) {
    const int sequence = blockIdx.x, head = blockIdx.y, i = threadIdx.x;
    const int start = q.start(sequence), length = q.length(sequence);
    const int64_t state_offset = (int64_t(sequence) * q.H + head) * N * N + i * N;
    float* memory = reinterpret_cast<float*>(shared_memory());
    const Tokens<N> r{memory}, d{r.base + r.size}, k{d.base + r.size}, v{k.base + r.size}, a{v.base + r.size}, b{a.base + r.size};

    float S[N];  // row i
#pragma unroll
    for (int j = 0; j < N; ++j) S[j] = in.initial_state ? in.initial_state[state_offset + j] : 0.f;

    for (int t0 = 0; t0 < length; t0 += C) {
        const int64_t first = (int64_t(start + t0) * q.H + head) * N + i;
        const int tokens = min(C, length - t0);
        __syncthreads();
#pragma unroll 4
        for (int t = 0; t < C; ++t) {
            const int64_t x = first + int64_t(t) * q.H * N;
            const bool inside = t < tokens;
            r.at(t, i) = load(in.r, x, inside);
            d.at(t, i) = inside ? expf(log_decay(to_float(in.w[x]))) : 1.f;
            k.at(t, i) = load(in.k, x, inside);
            a.at(t, i) = load(in.a, x, inside);
            b.at(t, i) = load(in.b, x, inside);
            v.at(t, i) = load(in.v, x, inside);
        }
        __syncthreads();
#pragma unroll 1
        for (int t = 0; t < tokens; ++t) {
            const float vt = v.at(t, i);
            float s = 0.f, out = 0.f;
#pragma unroll
            for (int j = 0; j < N; j += 4) s = dot(make_float4(S[j], S[j + 1], S[j + 2], S[j + 3]), a.four(t, j), s);
#pragma unroll
            for (int j = 0; j < N; j += 4) {
                const float4 d4 = d.four(t, j), k4 = k.four(t, j), b4 = b.four(t, j), r4 = r.four(t, j);
                S[j] = S[j] * d4.x + s * b4.x + vt * k4.x;
                S[j + 1] = S[j + 1] * d4.y + s * b4.y + vt * k4.y;
                S[j + 2] = S[j + 2] * d4.z + s * b4.z + vt * k4.z;
                S[j + 3] = S[j + 3] * d4.w + s * b4.w + vt * k4.w;
                out = dot(make_float4(S[j], S[j + 1], S[j + 2], S[j + 3]), r4, out);
            }
            const int64_t x = first + int64_t(t) * q.H * N;
            y[x] = from_float<T>(out);
            if (saved.s) saved.s[x] = s;
        }
        if (saved.checkpoints) {
            float4* row =
                reinterpret_cast<float4*>(saved.checkpoints + (int64_t(q.first_slot<C>(sequence) + t0 / C) * q.H + head) * N * N + i * N);
#pragma unroll
            for (int j = 0; j < N; j += 4) row[j / 4] = make_float4(S[j], S[j + 1], S[j + 2], S[j + 3]);
        }
    }
    if (final_state) {
#pragma unroll
        for (int j = 0; j < N; ++j) final_state[state_offset + j] = S[j];
    }
}

template <int N> constexpr size_t forward_shared = 6 * Tokens<N>::size * sizeof(float);

constexpr int table_stride = C + 1;
template <int N> constexpr size_t backward_shared = (10 * Tokens<N>::size + 4 * C * table_stride) * sizeof(float);

template <class T, int N> __launch_bounds__(N, blocks_per_sm(N))
__global__ void sequential_backward(Sequences q, Inputs<T> in, Saved<N> saved, const T* __restrict__ dy_,
                                    const float* __restrict__ d_final_state, Gradients<T> out) {
    const int sequence = blockIdx.x, head = blockIdx.y, i = threadIdx.x;
    const int start = q.start(sequence), length = q.length(sequence);
    const int64_t state_block = (int64_t(sequence) * q.H + head) * N * N;
    float* memory = reinterpret_cast<float*>(shared_memory());
    const Tokens<N> r{memory}, d{r.base + r.size}, k{d.base + r.size}, v{k.base + r.size}, a{v.base + r.size}, b{a.base + r.size};
    const Tokens<N> dy{b.base + r.size}, s{dy.base + r.size}, u{s.base + r.size}, slab{u.base + r.size};
    float* const us = slab.base + r.size;  // tables [t][c]: u_t . s_c, u_t . v_c, dy_t . s_c, dy_t . v_c
    float *const uv = us + C * table_stride, *const ys = uv + C * table_stride, *const yv = ys + C * table_stride;

    float G[N];  // row i of the gradient of the state, without the part of the dy that lie further back
#pragma unroll
    for (int j = 0; j < N; ++j) G[j] = d_final_state ? d_final_state[state_block + i * N + j] : 0.f;

    for (int t0 = (length - 1) / C * C; t0 >= 0 && length > 0; t0 -= C) {
        const int64_t first = (int64_t(start + t0) * q.H + head) * N + i;
        const int tokens = min(C, length - t0), step = q.H * N;
        const int64_t slot = (int64_t(q.first_slot<C>(sequence) + t0 / C) * q.H + head) * N * N;
        const float* S_end = saved.checkpoints + slot;
        const float* S0 = t0 ? S_end - int64_t(q.H) * N * N : in.initial_state ? in.initial_state + state_block : nullptr;

        __syncthreads();
#pragma unroll 4
        for (int t = 0; t < C; ++t) {
            const int64_t x = first + t * step;
            const bool inside = t < tokens;
            r.at(t, i) = load(in.r, x, inside);
            d.at(t, i) = inside ? expf(log_decay(to_float(in.w[x]))) : 1.f;
            k.at(t, i) = load(in.k, x, inside);
            v.at(t, i) = load(in.v, x, inside);
            a.at(t, i) = load(in.a, x, inside);
            b.at(t, i) = load(in.b, x, inside);
            dy.at(t, i) = load(dy_, x, inside);
            s.at(t, i) = load(saved.s, x, inside);
        }

        // Column i of the gradient leaving the chunk, 16 rows at a time: dk = G^T v and db = G^T s so far, and G . S_end for the decay.
        float dk[C], db[C], dlog = 0.f;
#pragma unroll
        for (int t = 0; t < C; ++t) dk[t] = db[t] = 0.f;
#pragma unroll 1
        for (int row = 0; row < N; row += C) {
            if (row) __syncthreads();  // first: of what the chunk before has left there nobody reads any more
            if (i >= row && i < row + C) {
#pragma unroll
                for (int j = 0; j < N; ++j) slab.at(i - row, j) = G[j];
            }
            __syncthreads();
#pragma unroll 1
            for (int m = 0; m < C; m += 4) {
                const float4 g = make_float4(slab.at(m, i), slab.at(m + 1, i), slab.at(m + 2, i), slab.at(m + 3, i));
                const float* S = S_end + (row + m) * N + i;
                dlog = dot(g, make_float4(S[0], S[N], S[2 * N], S[3 * N]), dlog);
#pragma unroll
                for (int t = 0; t < C; ++t) {
                    dk[t] = dot(g, v.four(t, row + m), dk[t]);
                    db[t] = dot(g, s.four(t, row + m), db[t]);
                }
            }
        }

        // Row i of the gradient back through the chunk.
#pragma unroll 1
        for (int t = C - 1; t >= 0; --t) {
            float ut = 0.f, dv = 0.f;
            const float dyt = dy.at(t, i);
#pragma unroll
            for (int j = 0; j < N; j += 4) {
                const float4 r4 = r.four(t, j);
                G[j] += dyt * r4.x, G[j + 1] += dyt * r4.y, G[j + 2] += dyt * r4.z, G[j + 3] += dyt * r4.w;
                const float4 g = make_float4(G[j], G[j + 1], G[j + 2], G[j + 3]);
                ut = dot(g, b.four(t, j), ut);
                dv = dot(g, k.four(t, j), dv);
            }
#pragma unroll
            for (int j = 0; j < N; j += 4) {
                const float4 d4 = d.four(t, j), a4 = a.four(t, j);
                G[j] = G[j] * d4.x + ut * a4.x, G[j + 1] = G[j + 1] * d4.y + ut * a4.y;
                G[j + 2] = G[j + 2] * d4.z + ut * a4.z, G[j + 3] = G[j + 3] * d4.w + ut * a4.w;
            }
            u.at(t, i) = ut;
            if (t < tokens) out.dv[first + t * step] = from_float<T>(dv + load(out.more_dv, first + t * step, out.more_dv));
        }
        __syncthreads();

#pragma unroll 1
        for (int pair = i; pair < C * C; pair += N) {
            const int t = pair / C, c = pair % C;
            float sums[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
            for (int j = 0; j < N; j += 4) {
                const float4 u4 = u.four(t, j), y4 = dy.four(t, j), s4 = s.four(c, j), v4 = v.four(c, j);
                sums[0] = dot(u4, s4, sums[0]), sums[1] = dot(u4, v4, sums[1]);
                sums[2] = dot(y4, s4, sums[2]), sums[3] = dot(y4, v4, sums[3]);
            }
            const int at = t * table_stride + c;
            us[at] = sums[0], uv[at] = sums[1], ys[at] = sums[2], yv[at] = sums[3];
        }
        __syncthreads();

        // Columns backwards: dk_t = G_t^T v_t and db_t = G_t^T s_t, G_t with dy_t in it.
#pragma unroll 1
        for (int c = C - 1; c >= 0; --c) {
            const float dc = d.at(c, i), rc = r.at(c, i), ac = a.at(c, i);
#pragma unroll
            for (int t = 0; t < C; ++t) {
                const int at = c * table_stride + t;
                if (c >= t) dk[t] += rc * yv[at], db[t] += rc * ys[at];
                if (c > t) dk[t] = dk[t] * dc + ac * uv[at], db[t] = db[t] * dc + ac * us[at];
            }
        }
        float change[C];  // what token t adds to dlogd_t
#pragma unroll
        for (int t = 0; t < C; ++t) {
            change[t] = -b.at(t, i) * db[t] - k.at(t, i) * dk[t];
            if (t < tokens) {
                out.dk[first + t * step] = from_float<T>(dk[t] + load(out.more_dk, first + t * step, out.more_dk));
                out.db[first + t * step] = from_float<T>(db[t]);
            }
        }

        // Columns forwards: dr_t = S_t^T dy_t and da_t = S_{t-1}^T u_t.
        float dr[C], da[C];
#pragma unroll
        for (int t = 0; t < C; ++t) dr[t] = da[t] = 0.f;
#pragma unroll 1
        for (int m = 0; m < (S0 ? N : 0); m += 4) {
            const float* S = S0 + m * N + i;
            const float4 S4 = make_float4(S[0], S[N], S[2 * N], S[3 * N]);
#pragma unroll
            for (int t = 0; t < C; ++t) {
                dr[t] = dot(S4, dy.four(t, m), dr[t]);
                da[t] = dot(S4, u.four(t, m), da[t]);
            }
        }
#pragma unroll 1
        for (int c = 0; c < C; ++c) {
            const float dc = d.at(c, i), bc = b.at(c, i), kc = k.at(c, i);
#pragma unroll
            for (int t = 0; t < C; ++t) {
                const int at = t * table_stride + c;
                if (c <= t) dr[t] = dr[t] * dc + bc * ys[at] + kc * yv[at];
                if (c < t) da[t] = da[t] * dc + bc * us[at] + kc * uv[at];
            }
        }
#pragma unroll
        for (int t = C - 1; t >= 0; --t) {
            dlog += change[t] + r.at(t, i) * dr[t];
            if (t < tokens) {
                const int64_t x = first + t * step;
                out.dr[x] = from_float<T>(dr[t] + load(out.more_dr, x, out.more_dr));
                out.da[x] = from_float<T>(da[t]);
                out.dw[x] = from_float<T>(dlog * log_decay_slope(to_float(in.w[x])));
            }
            dlog += a.at(t, i) * da[t];
        }
    }
    if (out.d_initial_state) {
#pragma unroll
        for (int j = 0; j < N; ++j) out.d_initial_state[state_block + i * N + j] = G[j];
    }
}

template <class T, int N>
int forward(const Wkv7Shape& shape, const Wkv7Inputs& in, void* y, float* final_state, void* saved, void* stream) {
    const Sequences q = sequences_of(shape);
    return launch(sequential_forward<T, N>, dim3(q.count, q.H), N, forward_shared<N>, stream, q, Inputs<T>(in), (T*)y, final_state,
                  Saved<N>(q, saved));
}

template <class T, int N>
int backward(const Wkv7Shape& shape, const Wkv7Inputs& in, const void* saved, const void* dy, const float* d_final_state,
             const Wkv7Gradients& out, void* stream) {
    const Sequences q = sequences_of(shape);
    return launch(sequential_backward<T, N>, dim3(q.count, q.H), N, backward_shared<N>, stream, q, Inputs<T>(in),
                  Saved<N>(q, const_cast<void*>(saved)), (const T*)dy, d_final_state, Gradients<T>(out));
}

}  // namespace
}  // namespace wkv7

#define WKV7_DISPATCH(function, ...)                                                                                                  \
    switch (wkv7::valid(*shape) ? shape->N : 0) {                                                                                     \
        case 16: return dtype == WKV7_BF16 ? wkv7::function<wkv7::bf16, 16>(__VA_ARGS__) : wkv7::function<float, 16>(__VA_ARGS__);    \
        case 32: return dtype == WKV7_BF16 ? wkv7::function<wkv7::bf16, 32>(__VA_ARGS__) : wkv7::function<float, 32>(__VA_ARGS__);    \
        case 64: return dtype == WKV7_BF16 ? wkv7::function<wkv7::bf16, 64>(__VA_ARGS__) : wkv7::function<float, 64>(__VA_ARGS__);    \
        case 128: return dtype == WKV7_BF16 ? wkv7::function<wkv7::bf16, 128>(__VA_ARGS__) : wkv7::function<float, 128>(__VA_ARGS__); \
        default: return WKV7_UNSUPPORTED;                                                                                             \
    }

extern "C" int64_t wkv7_sequential_saved_bytes(const Wkv7Shape* shape) {
    const int64_t N = shape->N, slots = wkv7::sequences_of(*shape).slots<wkv7::C>();
    return 4 * N * shape->H * (slots * N + int64_t(shape->B) * shape->T);
}

extern "C" int wkv7_sequential_forward(const Wkv7Shape* shape, int dtype, const Wkv7Inputs* in, void* y, float* final_state, void* saved,
                                       void* stream) {
    WKV7_DISPATCH(forward, *shape, *in, y, final_state, saved, stream)
}

extern "C" int wkv7_sequential_backward(const Wkv7Shape* shape, int dtype, const Wkv7Inputs* in, const void* saved, const void* dy,
                                        const float* d_final_state, const Wkv7Gradients* out, void* stream) {
    WKV7_DISPATCH(backward, *shape, *in, saved, dy, d_final_state, *out, stream)
}
