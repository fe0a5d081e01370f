// Between the wkv7 operator and the output projection: a norm over each head, the current token's own value, the gate;
// forward and backward, each tensor once.
#include "rows.cuh"

namespace fused {
namespace {

// Of a head of one token: y without its mean, the inverse deviation, and the sum of r k r_k.
struct Head {
    Four centred;
    float inverse, bonus;

    __device__ __forceinline__ Head(const FusedOutput& p, Four y, Four r, Four k, Four r_k) {
        const int lanes = p.N / 4;
        centred = y - over_head(sum(y), lanes) / p.N;
        bonus = over_head(sum(r * k * r_k), lanes);
        inverse = 1.f / sqrtf(over_head(sum(centred * centred), lanes) / p.N + p.eps);
    }
};

template <class T> __launch_bounds__(threads) __global__ void time_mix_output(FusedOutput p) {
    const Place at(1, p.rows, p.C);
    const Access<T> x{at.inside};
    const Four weight = x.in(p.weight, at.c), bias = x.in(p.bias, at.c), r_k = x.in(p.r_k, at.c);
    for (int row = at.begin; row < at.end; ++row) {
        const int64_t i = int64_t(row) * p.C + at.c;
        const Four y = x.in(p.y, i), r = x.in(p.r, i), k = x.in(p.k, i), v = x.in(p.v, i), g = x.in(p.g, i);
        const Head h(p, y, r, k, r_k);
        x.out(p.out, i, (h.centred * h.inverse * weight + bias + v * h.bonus) * g);
    }
}

// Tokens of a warp that have a place in shared memory, six tensors each. Each lane copies its own channels there ahead
// of their turn: the chains of sums over a head leave too few loads on their way otherwise.
template <class T> constexpr int ahead = sizeof(T) == 2 ? 3 : 2;
template <class T> constexpr int slot_bytes = 6 * width * int(sizeof(T));

template <class T> __launch_bounds__(threads, 2) __global__ void time_mix_output_backward(FusedOutput p) {
    constexpr int piece = 4 * int(sizeof(T)), step = 32 * piece;
    const Place at(1, p.rows, p.C);
    const Access<T> x{at.inside};
    const int own = threadIdx.x / 32 * ahead<T> * slot_bytes<T> + threadIdx.x % 32 * piece;
    const auto fetch = [&](int row, int to) {
        if (row < at.end) {
            const void* const tensors[6] = {p.dout, p.y, p.r, p.k, p.v, p.g};
            const int64_t i = int64_t(row) * p.C + (at.inside ? at.c : 0);
#pragma unroll
            for (int j = 0; j < 6; ++j) copy_async<piece>(to + j * step, static_cast<const T*>(tensors[j]) + i, at.inside);
        }
        copy_commit();
    };
#pragma unroll
    for (int i = 0; i < ahead<T>; ++i) fetch(at.begin + i, own + i * slot_bytes<T>);
    const Four weight = x.in(p.weight, at.c), bias = x.in(p.bias, at.c), r_k = x.in(p.r_k, at.c);
    Four sums[3] = {zeros(), zeros(), zeros()};  // weight, bias, r_k
    int slot = own;
    for (int row = at.begin; row < at.end; ++row) {
        const int64_t i = int64_t(row) * p.C + at.c;
        const auto read = [&](int j) { return load(&shared<T>(slot + j * step)); };
        copy_wait<ahead<T> - 1>();
        const Four dout = read(0), y = read(1), r = read(2), k = read(3), v = read(4), g = read(5);
        const Head h(p, y, r, k, r_k);
        const Four normal = h.centred * h.inverse, inner = dout * g, dnormal = inner * weight;
        const float mean = over_head(sum(dnormal), p.N / 4) / p.N, slope = over_head(sum(dnormal * normal), p.N / 4) / p.N;
        const float dbonus = over_head(sum(inner * v), p.N / 4);
        x.out(p.dg, i, dout * (normal * weight + bias + v * h.bonus));
        x.out(p.dv, i, inner * h.bonus);
        x.out(p.dy, i, (dnormal - mean - normal * slope) * h.inverse);
        x.out(p.dr, i, k * r_k * dbonus);
        x.out(p.dk, i, r * r_k * dbonus);
        sums[0] += inner * normal;
        sums[1] += inner;
        sums[2] += r * k * dbonus;
        fetch(row + ahead<T>, slot);
        slot = slot + slot_bytes<T> < own + ahead<T> * slot_bytes<T> ? slot + slot_bytes<T> : own;
    }
    __syncthreads();  // the sums come where the tokens were
    leave_sums(sums, at, p.C, p.parts);
}

template <class T> int forward(const FusedOutput& p, void* stream) {
    return launch(time_mix_output<T>, grid_of(1, p.rows, p.C), threads, 0, stream, p);
}

template <class T> int backward(const FusedOutput& p, void* stream) {
    static_assert(warps * ahead<T> * slot_bytes<T> >= int(sums_bytes<3>), "shared memory serves both");
    const int error = launch(time_mix_output_backward<T>, grid_of(1, p.rows, p.C), threads, warps * ahead<T> * slot_bytes<T>, stream, p);
    return error ? error : collect_sums<T>(p.parts, fused_parts(1, p.rows), 3 * p.C, p.sums, stream);
}

bool takes(const FusedOutput& p) { return valid(1, p.rows, p.C) && valid_heads(p.C, p.N); }

}  // namespace
}  // namespace fused

extern "C" int fused_time_mix_output(const FusedOutput* task, int dtype, void* stream) {
    if (!fused::takes(*task)) return FUSED_UNSUPPORTED;
    return dtype == FUSED_BF16 ? fused::forward<fused::bf16>(*task, stream) : fused::forward<float>(*task, stream);
}

extern "C" int fused_time_mix_output_backward(const FusedOutput* task, int dtype, void* stream) {
    if (!fused::takes(*task)) return FUSED_UNSUPPORTED;
    return dtype == FUSED_BF16 ? fused::backward<fused::bf16>(*task, stream) : fused::backward<float>(*task, stream);
}
