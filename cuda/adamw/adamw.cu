// The optimizer's step and gradient norms, over many tensors of very different sizes in few launches: a launch has its tensors in its
// parameters, and a block works on a tile of one of them, which it finds by its number.
#include <math.h>

#include "../common/pack.cuh"
#include "api.cuh"

namespace adamw {
namespace {

using namespace device;

constexpr int threads = 256, warps = threads / 32;
constexpr size_t most_bytes = 4096;  // of a kernel's parameters, which every driver takes

struct Parameter {
    float *master, *exp_avg, *exp_avg_sq;
    const void* grad;
    bf16* rounded;
    int64_t size;
    uint32_t first;  // block of the launch
    uint32_t narrow;
};

struct Gradient {
    const void* grad;
    int64_t size;
    uint32_t first, narrow;
};

// What a parameter's blocks need to know of its step; go: 0 where nothing may change.
struct alignas(16) Rates {
    float step, root, scale, go;  // step = lr / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t)
};

struct Steps {
    static constexpr int most = 496;
    float* steps[most];
    const float *scale, *found_inf;
    Rates* rates;
    double lr, log_beta1, log_beta2;
    int n;
};

// Without padding, as Gradients: g++ 12 with -ftrivial-auto-var-init, as the tests compile, clears what is behind an array of structures at
// the beginning of the array.
struct Parameters {
    static constexpr int most = 72, tile = 8 * threads;
    Parameter tensors[most];
    const Rates* rates;
    float keep, beta1, rest1, beta2, rest2, eps;  // keep = 1 - lr * weight decay, rest = 1 - beta
    uint32_t blocks;
    int n;
};

struct Gradients {
    static constexpr int most = 168, tile = 32 * threads;
    Gradient tensors[most];
    float *parts, *norms;
    uint32_t blocks;
    int n;
};

static_assert(sizeof(Steps) <= most_bytes && sizeof(Parameters) <= most_bytes && sizeof(Gradients) <= most_bytes,
              "beyond what a launch may carry");

// The tensor that this block works on: the last one that does not begin behind it. (An empty one begins where the next does.)
template <class Launch> __device__ __forceinline__ int owner(const Launch& launch) {
    int low = 0, high = launch.n;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (launch.tensors[middle].first <= blockIdx.x)
            low = middle;
        else
            high = middle;
    }
    return low;
}

__device__ __forceinline__ bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

__device__ __forceinline__ void load(const float* p, float* x) {
    const float4 v = *reinterpret_cast<const float4*>(p);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}
__device__ __forceinline__ void load(const bf16* p, float* x) {
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    const float2 low = unpack(v.x), high = unpack(v.y);
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
}
// 16 bytes: four numbers, or eight.
__device__ __forceinline__ void load_piece(const float* p, float* x) { load(p, x); }
__device__ __forceinline__ void load_piece(const bf16* p, float* x) {
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 two = unpack(words[i]);
        x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
}
__device__ __forceinline__ void store(float* p, const float* x) { *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]); }
__device__ __forceinline__ void store(bf16* p, const float* x) {
    *reinterpret_cast<uint2*>(p) = make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
}

// To within two units of the last digit. The exact one calls a function where a number is zero or tiny, as the second
// moments of rare tokens are.
__device__ __forceinline__ float square_root(float x) {
#ifdef __CUDACC__
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
    return root;
#else
    return sqrtf(x);
#endif
}

// Before the tiles: in double precision, which some GPUs have little of, once for each parameter. Raising the steps here, where nobody else
// reads them, leaves no order of blocks to think about.
__launch_bounds__(threads) __global__ void begin_step(const Steps launch) {
    const int i = blockIdx.x * threads + threadIdx.x;
    if (i >= launch.n) return;
    const bool stay = launch.found_inf && *launch.found_inf != 0.f;  // NaN: stay
    const float t = *launch.steps[i] + 1.f;
    if (!stay) *launch.steps[i] = t;
    const double left1 = -expm1(t * launch.log_beta1), left2 = -expm1(t * launch.log_beta2);
    launch.rates[i] = {float(launch.lr / left1), float(1. / sqrt(left2)), launch.scale ? *launch.scale : 1.f, stay ? 0.f : 1.f};
}

// A thread has eight numbers: two times four neighbours, or, in a tile that is not whole or not aligned, single ones, one a round.
template <class G>
__device__ __forceinline__ void work(const Parameters& launch, const Parameter& at, const Rates* its_rates, int64_t begin) {
    const G* const grad = static_cast<const G*>(at.grad);
    const bool whole = at.size - begin >= Parameters::tile && aligned(at.master) && aligned(at.exp_avg) && aligned(at.exp_avg_sq) &&
                       aligned(grad) && aligned(at.rounded);
    float g[8], p[8], m[8], v[8];
    if (whole) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            const int64_t here = begin + i * threads + threadIdx.x * 4;
            load(grad + here, g + i), load(at.master + here, p + i), load(at.exp_avg + here, m + i), load(at.exp_avg_sq + here, v + i);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int64_t here = begin + i * threads + threadIdx.x;
            const bool inside = here < at.size;
            g[i] = inside ? to_float(grad[here]) : 0.f, p[i] = inside ? at.master[here] : 0.f;
            m[i] = inside ? at.exp_avg[here] : 0.f, v[i] = inside ? at.exp_avg_sq[here] : 0.f;
        }
    }
    const Rates rates = *its_rates;
    if (rates.go == 0.f) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float x = g[i] * rates.scale;
        m[i] = fmaf(launch.beta1, m[i], launch.rest1 * x);
        v[i] = fmaf(launch.beta2, v[i], launch.rest2 * x * x);
        p[i] = fmaf(launch.keep, p[i], -quotient(rates.step * m[i], fmaf(square_root(v[i]), rates.root, launch.eps)));
    }
    if (whole) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            const int64_t here = begin + i * threads + threadIdx.x * 4;
            store(at.master + here, p + i), store(at.exp_avg + here, m + i), store(at.exp_avg_sq + here, v + i);
            if (at.rounded) store(at.rounded + here, p + i);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int64_t here = begin + i * threads + threadIdx.x;
            if (here >= at.size) break;
            at.master[here] = p[i], at.exp_avg[here] = m[i], at.exp_avg_sq[here] = v[i];
            if (at.rounded) at.rounded[here] = from_float<bf16>(p[i]);
        }
    }
}

__launch_bounds__(threads) __global__ void update(const Parameters launch) {
    const int i = owner(launch);
    const Parameter& at = launch.tensors[i];
    const int64_t begin = int64_t(blockIdx.x - at.first) * Parameters::tile;
    at.narrow ? work<bf16>(launch, at, launch.rates + i, begin) : work<float>(launch, at, launch.rates + i, begin);
}

// The sum over the block, in thread 0, always in the same order. Every thread must come here.
template <class T> __device__ __forceinline__ T over_block(T x) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
    T* const memory = reinterpret_cast<T*>(shared_memory());
    if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x == 0)
#pragma unroll
        for (int w = 1; w < warps; ++w) x += memory[w];
    return x;
}

// Of this thread's 32 numbers of a tile.
template <class G> __device__ __forceinline__ float squares_of(const Gradient& at, int64_t begin) {
    const G* const grad = static_cast<const G*>(at.grad);
    float x[32], sums[4] = {0.f, 0.f, 0.f, 0.f};
    if (at.size - begin >= Gradients::tile && aligned(grad)) {
        constexpr int piece = 16 / sizeof(G);
#pragma unroll
        for (int i = 0; i < 32; i += piece) load_piece(grad + begin + i * threads + threadIdx.x * piece, x + i);
    } else {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const int64_t here = begin + i * threads + threadIdx.x;
            x[i] = here < at.size ? to_float(grad[here]) : 0.f;
        }
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) sums[i % 4] = fmaf(x[i], x[i], sums[i % 4]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

__launch_bounds__(threads) __global__ void sum_squares(const Gradients launch) {
    const Gradient& at = launch.tensors[owner(launch)];
    const int64_t begin = int64_t(blockIdx.x - at.first) * Gradients::tile;
    const float sum = over_block(at.narrow ? squares_of<bf16>(at, begin) : squares_of<float>(at, begin));
    if (threadIdx.x == 0) launch.parts[blockIdx.x] = sum;
}

// A block for each tensor. In double precision: a matrix of 100 million numbers has ten thousand parts.
__launch_bounds__(threads) __global__ void finish_norms(const Gradients launch) {
    const int i = blockIdx.x;
    const uint32_t end = i + 1 < launch.n ? launch.tensors[i + 1].first : launch.blocks;
    double sum = 0.;
#pragma unroll 8
    for (uint32_t part = launch.tensors[i].first + threadIdx.x; part < end; part += threads) sum += double(launch.parts[part]);
    sum = over_block(sum);
    if (threadIdx.x == 0) launch.norms[i] = float(sqrt(sum));
}

int64_t blocks_of(int64_t size, int tile) { return (size + tile - 1) / tile; }

// Fills launches with tensors, and starts each when it is full.
template <class Launch, class Fill, class Start> int in_launches(int64_t n, const int64_t* sizes, const Fill& fill, const Start& start) {
    Launch launch;
    for (int64_t begin = 0, i = 0; begin < n; begin = i) {
        int64_t blocks = 0;
        for (launch.n = 0; i < n && launch.n < Launch::most; ++i, ++launch.n) {
            const int64_t more = blocks_of(sizes[i], Launch::tile);
            if (launch.n && blocks + more > INT32_MAX) break;
            auto& at = launch.tensors[launch.n];
            fill(at, i);
            at.size = sizes[i], at.first = uint32_t(blocks);
            blocks += more;
        }
        if (blocks > INT32_MAX) return ADAMW_UNSUPPORTED;  // one tensor of terabytes
        launch.blocks = uint32_t(blocks);
        const int error = start(launch, begin);
        if (error) return error;
    }
    return 0;
}

}  // namespace
}  // namespace adamw

extern "C" int adamw_step(const AdamwStep* task, void* stream) {
    using namespace adamw;
    Rates* const rates = reinterpret_cast<Rates*>(task->rates);
    Steps steps;
    steps.scale = task->scale, steps.found_inf = task->found_inf;
    steps.lr = task->lr, steps.log_beta1 = log(task->beta1), steps.log_beta2 = log(task->beta2);
    for (int64_t begin = 0; begin < task->n; begin += steps.n) {
        steps.n = int(task->n - begin < Steps::most ? task->n - begin : Steps::most);
        for (int i = 0; i < steps.n; ++i) steps.steps[i] = task->steps[begin + i];
        steps.rates = rates + begin;
        const int error = launch(begin_step, dim3(ceil_div(steps.n, threads)), threads, 0, stream, steps);
        if (error) return error;
    }
    const auto fill = [&](Parameter& at, int64_t i) {
        at = {task->masters[i], task->exp_avgs[i], task->exp_avg_sqs[i], task->grads[i],
              task->rounded ? static_cast<device::bf16*>(task->rounded[i]) : nullptr, 0, 0, task->narrow[i]};
    };
    return in_launches<Parameters>(task->n, task->sizes, fill, [&](Parameters& these, int64_t begin) {
        these.rates = rates + begin;
        these.keep = float(1 - task->lr * task->weight_decay), these.eps = float(task->eps);
        these.beta1 = float(task->beta1), these.rest1 = float(1 - task->beta1), these.beta2 = float(task->beta2),
        these.rest2 = float(1 - task->beta2);
        return these.blocks ? launch(update, dim3(these.blocks), threads, 0, stream, these) : 0;
    });
}

extern "C" int64_t adamw_norm_parts(int64_t n, const int64_t* sizes) {
    int64_t parts = 0;
    for (int64_t i = 0; i < n; ++i) parts += adamw::blocks_of(sizes[i], adamw::Gradients::tile);
    return parts;
}

extern "C" int adamw_norms(int64_t n, const int64_t* sizes, const void* const* grads, const uint8_t* narrow, float* parts, float* norms,
                           void* stream) {
    using namespace adamw;
    const auto fill = [&](Gradient& at, int64_t i) { at = {grads[i], 0, 0, narrow[i]}; };
    return in_launches<Gradients>(n, sizes, fill, [&](Gradients& these, int64_t begin) {
        these.parts = parts, these.norms = norms + begin;  // the next launch may have the same parts: the stream keeps the order
        const int error = these.blocks ? launch(sum_squares, dim3(these.blocks), threads, warps * sizeof(float), stream, these) : 0;
        if (error) return error;
        return launch(finish_norms, dim3(these.n), threads, warps * sizeof(double), stream, these);
    });
}
