// What leads from the residual stream into a mixer: the branch before is added, the sum normalised, and each token blended with the one before
// it; forward and backward, each tensor once. A block has all channels of a run of 16 tokens, as their moments need all of them: first its
// warps share the tokens, then, when the moments are known, strips of 128 channels. What it reads again by then lies in a cache.
#include "rows.cuh"

namespace fused {
namespace {

constexpr int batch = 4;           // loads of a lane that are under way together, where nothing else keeps it busy
constexpr int most_blocks = 512;  // of the backward: each leaves sums of its own, and has as many runs as that takes

// Of a token: its channels are normalised as (x - mean) * inverse. A negative inverse means padding, whose normalised channels are all zero.
struct Moments {
    float mean, inverse;

    __device__ __forceinline__ bool padding() const { return inverse < 0.f; }
    __device__ __forceinline__ Four unit(Four x) const { return (x - mean) * inverse; }
    __device__ __forceinline__ Four normal(Four x, Four weight, Four bias) const { return padding() ? zeros() : unit(x) * weight + bias; }
};

// Mean and sum of squares around it, of numbers that come four at a time (Chan, Golub and LeVeque 1979): read once, without cancellation.
struct Gathered {
    float count = 0.f, mean = 0.f, squares = 0.f;

    __device__ __forceinline__ void add(float n, float m, float s) {
        const float total = count + n, step = m - mean, share = total > 0.f ? n / total : 0.f;
        mean += step * share;
        squares += s + step * step * (count * share);
        count = total;
    }
    __device__ __forceinline__ void add(Four x) {
        const float m = sum(x) * 0.25f;
        const Four away = x - m;
        add(4.f, m, sum(away * away));
    }
    __device__ __forceinline__ void over_warp() {
#pragma unroll
        for (int mask = 16; mask; mask /= 2) {
            const float n = __shfl_xor_sync(~0u, count, mask), m = __shfl_xor_sync(~0u, mean, mask), s = __shfl_xor_sync(~0u, squares, mask);
            add(n, m, s);
        }
    }
};

// Where a block is: a run of tokens of a sequence.
struct Run {
    int b, begin, end;
    int64_t row;  // of the first token, in [B * T]

    __device__ __forceinline__ Run(const FusedNormMix& p, int number) {
        const int runs = ceil_div(p.T, run_tokens);
        b = number / runs;
        begin = number % runs * run_tokens;
        end = min(begin + run_tokens, p.T);
        row = int64_t(b) * p.T + begin;
    }
};

template <class T> __device__ __forceinline__ Four at(const void* p, int64_t row, int C, int c) { return load(static_cast<const T*>(p) + row * C + c); }

// The residual stream, as it is once it has been stored.
template <class T> __device__ __forceinline__ Four stream(const FusedNormMix& p, int64_t row, int c) {
    const Four x = at<T>(p.x, row, p.C, c);
    if (!p.branch) return x;
    Four y = x + at<T>(p.branch, row, p.C, c);
#pragma unroll
    for (int i = 0; i < 4; ++i) y.x[i] = to_float(from_float<T>(y.x[i]));
    return y;
}

// Whether the token is the last one of a document.
__device__ __forceinline__ bool is_padding(const FusedNormMix& p, int t) {
    if (!p.documents) return false;
    int low = 1, high = p.documents;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (p.bounds[middle] - 1 < t)
            low = middle + 1;
        else
            high = middle;
    }
    return p.bounds[low] - 1 == t;
}

template <class T, int n> __launch_bounds__(threads, 2) __global__ void norm_mix(FusedNormMix p) {
    Moments* moments = reinterpret_cast<Moments*>(shared_memory());  // of the token before the run, and of the run
    const Run run(p, blockIdx.x);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stride = blockDim.x / 32;
    for (int t = max(run.begin - 1, 0) + warp; t < run.end; t += stride) {
        const int64_t row = run.row + t - run.begin;
        const bool own = t >= run.begin;
        Gathered all;
        for (int c = lane * 4; c < p.C; c += batch * width) {
            Four x[batch];
#pragma unroll
            for (int i = 0; i < batch; ++i)
                if (c + i * width < p.C) x[i] = stream<T>(p, row, c + i * width);
#pragma unroll
            for (int i = 0; i < batch; ++i)
                if (c + i * width < p.C) {
                    if (own && p.branch) store(static_cast<T*>(p.stream) + row * p.C + c + i * width, x[i]);
                    all.add(x[i]);
                }
        }
        all.over_warp();
        if (lane == 0) {
            const Moments found = {all.mean, is_padding(p, t) ? -1.f : 1.f / sqrtf(all.squares / p.C + p.eps)};
            moments[t - run.begin + 1] = found;
            if (own) p.moments[2 * row] = found.mean, p.moments[2 * row + 1] = found.inverse;
        }
    }
    __syncthreads();

    const void* source = p.branch ? p.stream : p.x;
    for (int c = warp * width + lane * 4; c < p.C; c += stride * width) {
        const Four weight = at<T>(p.weight, 0, 0, c), bias = at<T>(p.bias, 0, 0, c);
        Four mix[n], before = zeros();
#pragma unroll
        for (int j = 0; j < n; ++j) mix[j] = at<T>(p.mix[j], 0, 0, c);
        if (run.begin)
            before = moments[0].normal(stream<T>(p, run.row - 1, c), weight, bias);
        else if (p.last)
            before = at<T>(p.last, run.b, p.C, c);
        for (int t0 = run.begin; t0 < run.end; t0 += batch) {
            const int64_t first = run.row + t0 - run.begin;
            Four here[batch];
#pragma unroll
            for (int i = 0; i < batch; ++i)
                if (t0 + i < run.end) here[i] = at<T>(source, first + i, p.C, c);
#pragma unroll
            for (int i = 0; i < batch; ++i)
                if (t0 + i < run.end) {
                    const Four normal = moments[t0 + i - run.begin + 1].normal(here[i], weight, bias), shift = before - normal;
#pragma unroll
                    for (int j = 0; j < n; ++j) store(static_cast<T*>(p.out[j]) + (first + i) * p.C + c, normal + shift * mix[j]);
                    before = normal;
                }
        }
        if (run.end == p.T) store(static_cast<T*>(p.newest) + int64_t(run.b) * p.C + c, before);
    }
}

// Warps of a block of the backward such that two blocks fit a multiprocessor and nothing spills: a lane holds gradients and sums of four channels
// for each blend.
template <class T, int n> constexpr int most_warps = n == 1 ? warps : sizeof(T) == 2 ? 6 : 4;

// With u = (x - mean) * inverse, e the gradient of u and < > a mean over the channels:
//     dx = inverse (e - <e> - u <e u>) + dstream
// First, from the last token of a run to the first, the gradient of the normalised channels, which is left in dx; then, when <e> and <e u> are
// known, the rest. Lane i keeps the two sums of the run's token i. Parameters are read for each token again, from a cache: registers are short.
template <class T, int n> __launch_bounds__(32 * most_warps<T, n>, 2) __global__ void norm_mix_backward(FusedNormMix p, int runs) {
    float2* memory = reinterpret_cast<float2*>(shared_memory());  // [warps][run_tokens]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stride = blockDim.x / 32;
    const int first = blockIdx.x * runs, last = min(first + runs, p.B * ceil_div(p.T, run_tokens));
    const Moments* moments = reinterpret_cast<const Moments*>(p.moments);
    int number = first;
    const auto add_part = [&](int j, int c, Four sums) {
        if (c >= p.C) return;
        float* part = p.parts + (int64_t(blockIdx.x) * (n + 2) + j) * p.C + c;
        store(part, number > first ? load(part) + sums : sums);
    };
    for (; number < last; ++number) {
        const Run run(p, number);
        float2 mine = make_float2(0.f, 0.f);
        for (int c0 = warp * width; c0 < p.C; c0 += stride * width) {
            const int c = c0 + lane * 4;
            const bool inside = c < p.C;
            const Access<T> x{inside};
            Four sums[n], next = zeros();
#pragma unroll
            for (int j = 0; j < n; ++j) sums[j] = zeros();
            if (run.end < p.T) {
#pragma unroll
                for (int j = 0; j < n; ++j) next += x.in(p.dout[j], (run.row + run.end - run.begin) * p.C + c) * x.in(p.mix[j], c);
            } else if (p.dnewest) {
                next = x.in(p.dnewest, int64_t(run.b) * p.C + c);
            }
            Moments here = moments[run.row + run.end - 1 - run.begin];
            Four raw = x.in(p.x, (run.row + run.end - 1 - run.begin) * p.C + c);
#pragma unroll 1
            for (int t = run.end - 1; t >= run.begin; --t) {
                const int64_t row = run.row + t - run.begin, offset = row * p.C + c;
                Four d[n];
#pragma unroll
                for (int j = 0; j < n; ++j) d[j] = x.in(p.dout[j], offset);
                const Four weight = x.in(p.weight, c), bias = x.in(p.bias, c);
                Moments earlier = here;
                Four raw_before = zeros(), before = zeros();
                if (t) {
                    earlier = moments[row - 1];
                    raw_before = x.in(p.x, offset - p.C);
                    before = earlier.normal(raw_before, weight, bias);
                } else if (p.last) {
                    before = x.in(p.last, int64_t(run.b) * p.C + c);
                }
                const Four unit = here.unit(raw), shift = before - here.normal(raw, weight, bias);
                Four dnormal = next;
                next = zeros();
#pragma unroll
                for (int j = 0; j < n; ++j) {
                    const Four back = d[j] * x.in(p.mix[j], c);
                    dnormal += d[j] - back;
                    next += back;
                    sums[j] += d[j] * shift;
                }
                if (here.padding()) dnormal = zeros();
                x.out(p.dx, offset, dnormal);
                const Four slope = dnormal * weight;
                const float total = over_head(sum(slope), 32), along = over_head(sum(slope * unit), 32);
                if (lane == t - run.begin) mine.x += total, mine.y += along;
                here = earlier;
                raw = raw_before;
            }
            if (run.begin == 0 && p.dlast) x.out(p.dlast, int64_t(run.b) * p.C + c, next);
#pragma unroll
            for (int j = 0; j < n; ++j) add_part(j, c, sums[j]);
        }
        if (lane < run_tokens) memory[warp * run_tokens + lane] = mine;
        __syncthreads();
        mine = make_float2(0.f, 0.f);
        if (lane < run_tokens)
            for (int w = 0; w < stride; ++w) mine.x += memory[w * run_tokens + lane].x, mine.y += memory[w * run_tokens + lane].y;
        __syncthreads();  // the next run's sums come where these were

        for (int c0 = warp * width; c0 < p.C; c0 += stride * width) {
            const int c = c0 + lane * 4;
            const Access<T> x{c < p.C};
            const Four weight = x.in(p.weight, c);
            Four sums[2] = {zeros(), zeros()};  // of weight and bias
            for (int t0 = run.begin; t0 < run.end; t0 += batch) {
                const int64_t row = run.row + t0 - run.begin;
                Four dnormal[batch], raw[batch], dstream[batch];
#pragma unroll
                for (int i = 0; i < batch; ++i)
                    if (t0 + i < run.end) {
                        dnormal[i] = x.in(p.dx, (row + i) * p.C + c);
                        raw[i] = x.in(p.x, (row + i) * p.C + c);
                        dstream[i] = p.dstream ? x.in(p.dstream, (row + i) * p.C + c) : zeros();
                    }
#pragma unroll
                for (int i = 0; i < batch; ++i)
                    if (t0 + i < run.end) {
                        const Moments here = moments[row + i];
                        const int token = t0 + i - run.begin;
                        const float total = __shfl_sync(~0u, mine.x, token) / p.C, along = __shfl_sync(~0u, mine.y, token) / p.C;
                        const Four unit = here.unit(raw[i]), through = (dnormal[i] * weight - total - unit * along) * here.inverse;
                        sums[0] += dnormal[i] * unit;
                        sums[1] += dnormal[i];
                        x.out(p.dx, (row + i) * p.C + c, here.padding() ? dstream[i] : dstream[i] + through);
                    }
            }
            add_part(n, c, sums[0]);
            add_part(n + 1, c, sums[1]);
        }
    }
}

// As many warps, up to `most`, as share the strips of 128 channels evenly.
unsigned threads_for(int C, int most) {
    const int strips = ceil_div(C, width);
    return 32 * ceil_div(strips, ceil_div(strips, most));
}

int64_t runs_of(int64_t B, int64_t T) { return B * ((T + run_tokens - 1) / run_tokens); }
int64_t runs_a_block(int64_t B, int64_t T) { return (runs_of(B, T) + most_blocks - 1) / most_blocks; }

bool takes(const FusedNormMix& p) {
    return valid(p.B, p.T, p.C) && runs_of(p.B, p.T) <= INT32_MAX && (p.n == 1 || p.n == 6) && p.documents >= 0 && (!p.documents || p.B == 1);
}

template <class T, int n> int forward(const FusedNormMix& p, void* stream) {
    return launch(norm_mix<T, n>, dim3(unsigned(runs_of(p.B, p.T))), threads_for(p.C, warps), (run_tokens + 1) * sizeof(Moments), stream, p);
}

template <class T, int n> int backward(const FusedNormMix& p, void* stream) {
    const int64_t blocks = fused_norm_parts(p.B, p.T);
    const unsigned count = threads_for(p.C, most_warps<T, n>);
    const size_t bytes = count / 32 * run_tokens * sizeof(float2);
    const int error = launch(norm_mix_backward<T, n>, dim3(unsigned(blocks)), count, bytes, stream, p, int(runs_a_block(p.B, p.T)));
    return error ? error : collect_sums<T>(p.parts, blocks, (n + 2) * p.C, p.sums, stream);
}

}  // namespace
}  // namespace fused

#define FUSED_DISPATCH(function)                                                                                                                    \
    if (!fused::takes(*task)) return FUSED_UNSUPPORTED;                                                                                             \
    if (dtype == FUSED_BF16) return task->n == 6 ? fused::function<fused::bf16, 6>(*task, stream) : fused::function<fused::bf16, 1>(*task, stream); \
    return task->n == 6 ? fused::function<float, 6>(*task, stream) : fused::function<float, 1>(*task, stream);

extern "C" int64_t fused_norm_parts(int64_t B, int64_t T) {
    const int64_t each = fused::runs_a_block(B, T);
    return (fused::runs_of(B, T) + each - 1) / each;
}
extern "C" int fused_norm_mix(const FusedNormMix* task, int dtype, void* stream) { FUSED_DISPATCH(forward) }
extern "C" int fused_norm_mix_backward(const FusedNormMix* task, int dtype, void* stream) { FUSED_DISPATCH(backward) }
