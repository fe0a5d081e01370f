// What leads from the residual stream into a mixer: the branch before is added, the sum normalised, and each token
// blended with the one before it; forward and backward, each tensor once. A block has all channels of its tokens, as
// their moments need all of them. In runs of 16 tokens first its warps share the tokens, then, when the moments are
// known, strips of 128 channels; what it reads again by then lies in a cache.
#include "rows.cuh"

namespace fused {
namespace {

constexpr int batch = 4;  // loads of a lane that are under way together, where nothing else keeps it busy

// Of a token: its channels are normalised as (x - mean) * inverse. A negative inverse means padding, whose normalised
// channels are all zero.
struct Moments {
    float mean, inverse;

    __device__ __forceinline__ bool padding() const { return inverse < 0.f; }
    template <int V> __device__ __forceinline__ Numbers<V> unit(Numbers<V> x) const { return (x - mean) * inverse; }
    template <int V> __device__ __forceinline__ Numbers<V> affine(Numbers<V> unit, Numbers<V> weight, Numbers<V> bias) const {
        return padding() ? zeros<V>() : unit * weight + bias;
    }
    __device__ __forceinline__ Four normal(Four x, Four weight, Four bias) const { return affine(unit(x), weight, bias); }
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
            const float n = __shfl_xor_sync(~0u, count, mask), m = __shfl_xor_sync(~0u, mean, mask),
                        s = __shfl_xor_sync(~0u, squares, mask);
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

template <class T>
__device__ __forceinline__ Four at(const void* p, int64_t row, int C, int c) {
    return load(static_cast<const T*>(p) + row * C + c);
}

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

// Blocks on a multiprocessor: as many as registers allow without spills. Each waits for loads most of its time.
template <class T, int n> __launch_bounds__(threads, n == 1 ? 4 : 2) __global__ void norm_mix(FusedNormMix p) {
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

// The backward. With u = (x - mean) * inverse, e the gradient of u and < > a mean over the channels:
//     dx = inverse (e - <e> - u <e u>) + dstream

// Tokens that have a place in shared memory. 2048 channels of bf16 take what a block may have on every card from sm_80
// on with six blends, half of it with one, where a multiprocessor has two such blocks.
template <int n> constexpr int ahead = n == 1 ? 4 : 3;
constexpr int lane_channels = 8, most_row_warps = 8;
template <class T, int n> constexpr int slot_bytes = (n + 2) * 32 * lane_channels * int(sizeof(T));  // of a token and a warp

// Where a block of at most eight warps has all channels, a lane eight of them, and shared memory holds a few tokens of
// all tensors. A block walks from the last of its tokens to the first and keeps the sums of the parameters all the way.
// Each lane copies what it needs of a token into places of its own, `ahead` tokens before their turn: registers would
// hold too few bytes on their way. Two numbers a token pass between the warps; everything else stays in its lane, so
// each tensor is read and written once.
template <class T, int n>
__launch_bounds__(32 * most_row_warps, n == 1 ? 2 : 1) __global__ void norm_mix_backward(FusedNormMix p, int each) {
    constexpr int V = lane_channels, slot = slot_bytes<T, n>, step = slot / (n + 2), pieces = step / 512;
    const int c = threadIdx.x * V, warp = threadIdx.x / 32, lane = threadIdx.x % 32, all_warps = blockDim.x / 32;
    const int begin = blockIdx.x * each, end = min(begin + each, p.B * p.T);
    const Access<T, V> x{c < p.C};
    const Moments* moments = reinterpret_cast<const Moments*>(p.moments);
    // A lane's pieces of 16 bytes lie between those of its neighbours.
    const int own = warp * ahead<n> * slot + lane * 16, behind = own + ahead<n> * slot;
    const auto copy = [&](int to, const void* from, int64_t offset, bool valid) {
#pragma unroll
        for (int i = 0; i < pieces; ++i) copy_async(to + i * 512, static_cast<const T*>(from) + offset + i * 16 / int(sizeof(T)), valid);
    };
    const auto read = [&](int at) {
        Numbers<V> a;
#pragma unroll
        for (int i = 0; i < pieces; ++i) {
            const auto part = load<V / pieces>(&shared<T>(at + i * 512));
#pragma unroll
            for (int k = 0; k < V / pieces; ++k) a.x[i * V / pieces + k] = part.x[k];
        }
        return a;
    };
    // Of a token: the gradients, and x of the token before.
    const auto fetch = [&](int row, int at) {
        if (row < begin) return;
        const int64_t offset = int64_t(row) * p.C + (x.inside ? c : 0);
#pragma unroll
        for (int j = 0; j < n; ++j) copy(at + j * step, p.dout[j], offset, x.inside);
        copy(at + n * step, static_cast<const T*>(p.x) - p.C, offset, x.inside && row);
        copy(at + (n + 1) * step, p.dstream, offset, x.inside && p.dstream);
    };
#pragma unroll
    for (int i = 0; i < ahead<n>; ++i) fetch(end - 1 - i, own + i * slot), copy_commit();

    const Numbers<V> weight = x.in(p.weight, c);
    Numbers<V> mix[n], sums[n + 2], next = zeros<V>();
#pragma unroll
    for (int j = 0; j < n; ++j) mix[j] = x.in(p.mix[j], c);
#pragma unroll
    for (int j = 0; j < n + 2; ++j) sums[j] = zeros<V>();
    int b = (end - 1) / p.T, t = (end - 1) % p.T;
    if (t + 1 < p.T)
#pragma unroll
        for (int j = 0; j < n; ++j) next += x.in(p.dout[j], int64_t(end) * p.C + c) * mix[j];
    Moments here = moments[end - 1], earlier = moments[max(end - 2, 0)];
    const Numbers<V> raw = x.in(p.x, int64_t(end - 1) * p.C + c);
    Numbers<V> unit = here.unit(raw);
    const float one = 1.f / p.C;
    // The sums of the warps have two places that take turns: who writes into one has met, at the barrier between, all who read it.
    const int of_warps = all_warps * ahead<n> * slot + lane / 16 * most_row_warps * 4, to = of_warps + warp * 4,
              from = of_warps + lane % 16 * 4;
    int turn = 0, at = own;

    for (int row = end - 1; row >= begin; --row) {
        copy_wait<ahead<n> - 1>();
        const Moments soon = moments[max(row - 2, 0)];
        const Numbers<V> raw_before = read(at + n * step), unit_before = earlier.unit(raw_before);
        const int64_t edge = int64_t(b) * p.C + c;
        Numbers<V> shift = (unit_before - unit) * weight;  // the bias is in both, but for padding and tokens of the state
        if (t == 0 || here.padding() || earlier.padding()) {
            const Numbers<V> bias = x.in(p.bias, c),
                             before = t ? earlier.affine(unit_before, weight, bias) : p.last ? x.in(p.last, edge) : zeros<V>();
            shift = before - here.affine(unit, weight, bias);
        }
        if (t + 1 == p.T) next = p.dnewest ? x.in(p.dnewest, edge) : zeros<V>();
        Numbers<V> dnormal = next;
        next = zeros<V>();
#pragma unroll
        for (int j = 0; j < n; ++j) {
            const Numbers<V> d = read(at + j * step);
            dnormal += d;
            next += d * mix[j];
            sums[j] += d * shift;
        }
        dnormal = dnormal - next;
        if (t == 0 && p.dlast) x.out(p.dlast, edge, next);
        if (here.padding()) dnormal = zeros<V>();
        const Numbers<V> slope = dnormal * weight;
        // Half of a warp adds up one of the two numbers, half the other.
        const bool upper = lane & 16;
        const float total = sum(slope), along = sum(slope * unit);
        float mine = (upper ? along : total) + __shfl_xor_sync(~0u, upper ? total : along, 16);
        mine = over_head(mine, 16);
        if (lane % 16 == 0) shared<float>(to + turn) = mine;
        const Numbers<V> dstream = read(at + (n + 1) * step);
        __syncthreads();
        fetch(row - ahead<n>, at);
        copy_commit();
        at = at + slot < behind ? at + slot : own;
        mine = lane % 16 < all_warps ? shared<float>(from + turn) : 0.f;
        turn ^= 2 * most_row_warps * 4;
        mine = over_head(mine, 8) * one;
        const float mean = __shfl_sync(~0u, mine, 0), slant = __shfl_sync(~0u, mine, 16);
        sums[n] += dnormal * unit;
        sums[n + 1] += dnormal;
        x.out(p.dx, int64_t(row) * p.C + c, dstream + (dnormal * weight - mean - unit * slant) * fmaxf(here.inverse, 0.f));
        unit = unit_before, here = earlier, earlier = soon;
        if (--t < 0) t = p.T - 1, --b;
    }
    if (x.inside)
#pragma unroll
        for (int j = 0; j < n + 2; ++j) store(p.parts + (int64_t(blockIdx.x) * (n + 2) + j) * p.C + c, sums[j]);
}

// Warps of a block of norm_mix_backward_wide such that two blocks fit a multiprocessor and nothing spills: a lane holds
// gradients and sums of four channels for each blend.
template <class T, int n> constexpr int most_warps = n == 1 ? warps : sizeof(T) == 2 ? 6 : 4;

// The same for wider tensors, or small shared memory. First, from the last token of a run to the first, the gradient of
// the normalised channels, which is left in dx; then, when <e> and <e u> are known, the rest. Lane i keeps the two sums
// of the run's token i. Parameters are read for each token again, from a cache: registers are short.
template <class T, int n> __launch_bounds__(32 * most_warps<T, n>, 2) __global__ void norm_mix_backward_wide(FusedNormMix p, int runs) {
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
bool takes(const FusedNormMix& p) {
    return valid(p.B, p.T, p.C) && runs_of(p.B, p.T) <= INT32_MAX && (p.n == 1 || p.n == 6) && p.documents >= 0 &&
           (!p.documents || p.B == 1);
}

template <class T, int n> int forward(const FusedNormMix& p, void* stream) {
    return launch(norm_mix<T, n>, dim3(unsigned(runs_of(p.B, p.T))), threads_for(p.C, warps), (run_tokens + 1) * sizeof(Moments), stream,
                  p);
}

// One kernel or the other, and how many blocks of it run at once: each leaves sums of its own, which cost memory.
template <class T, int n> struct Backward {
    unsigned threads;
    size_t bytes;
    bool rows;
    int64_t work, blocks;  // tokens or runs

    explicit Backward(const FusedNormMix& p) {
        const int row_warps = ceil_div(p.C, 32 * lane_channels);
        threads = 32 * row_warps;
        bytes = size_t(row_warps) * ahead<n> * slot_bytes<T, n> + 4 * most_row_warps * sizeof(float);
        rows = p.C % lane_channels == 0 && row_warps <= most_row_warps && bytes <= shared_limit();
        if (!rows) threads = threads_for(p.C, most_warps<T, n>), bytes = threads / 32 * run_tokens * sizeof(float2);
        work = rows ? int64_t(p.B) * p.T : runs_of(p.B, p.T);
        const int together = !rows ? 2 : min((n == 1 ? 2 : 1) * most_row_warps / row_warps, 4);
        blocks = work < int64_t(together) * multiprocessors() ? work : int64_t(together) * multiprocessors();
    }
};

template <class T, int n> int64_t parts(const FusedNormMix& p) { return Backward<T, n>(p).blocks; }

template <class T, int n> int backward(const FusedNormMix& p, void* stream) {
    const Backward<T, n> plan(p);
    if (p.blocks < 1) return FUSED_UNSUPPORTED;
    const int64_t each = (plan.work + p.blocks - 1) / p.blocks, blocks = (plan.work + each - 1) / each;
    const auto kernel = plan.rows ? norm_mix_backward<T, n> : norm_mix_backward_wide<T, n>;
    const int error = launch(kernel, dim3(unsigned(blocks)), plan.threads, plan.bytes, stream, p, int(each));
    return error ? error : collect_sums<T>(p.parts, blocks, (n + 2) * p.C, p.sums, stream);
}

}  // namespace
}  // namespace fused

#define FUSED_DISPATCH(function, ...)                                                                                      \
    if (dtype == FUSED_BF16)                                                                                               \
        return task->n == 6 ? fused::function<fused::bf16, 6>(__VA_ARGS__) : fused::function<fused::bf16, 1>(__VA_ARGS__); \
    return task->n == 6 ? fused::function<float, 6>(__VA_ARGS__) : fused::function<float, 1>(__VA_ARGS__);

extern "C" int64_t fused_norm_parts(const FusedNormMix* task, int dtype) {
    if (!fused::takes(*task)) return 0;
    FUSED_DISPATCH(parts, *task)
}
extern "C" int fused_norm_mix(const FusedNormMix* task, int dtype, void* stream) {
    if (!fused::takes(*task)) return FUSED_UNSUPPORTED;
    FUSED_DISPATCH(forward, *task, stream)
}
extern "C" int fused_norm_mix_backward(const FusedNormMix* task, int dtype, void* stream) {
    if (!fused::takes(*task)) return FUSED_UNSUPPORTED;
    FUSED_DISPATCH(backward, *task, stream)
}
