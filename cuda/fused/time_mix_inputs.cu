// Between the projections and the wkv7 operator: decay bias, in-context rate, normalised key, value residual; forward and backward, each
// tensor once. What backward needs of the forward is computed again.
#include "rows.cuh"

namespace fused {
namespace {

// 1 / max(length, 1e-12) of a head's keys, and whether the length counts: torch.nn.functional.normalize.
__device__ __forceinline__ float inverse_length(Four z, int lanes, bool& counts) {
    const float length = sqrtf(over_head(sum(z * z), lanes));
    counts = !(length <= 1e-12f);
    return 1.f / (counts ? length : 1e-12f);
}

template <class T, bool residual> __launch_bounds__(threads, 4) __global__ void time_mix_inputs(FusedInputs p) {
    const Place at(1, p.rows, p.C);
    const Access<T> x{at.inside};
    const Four w0 = x.in(p.w0, at.c), k_k = x.in(p.k_k, at.c), k_a = x.in(p.k_a, at.c), a0 = x.in(p.a0, at.c);
    const Four v0 = residual ? x.in(p.v0, at.c) : zeros();
    for (int row = at.begin; row < at.end; ++row) {
        const int64_t i = int64_t(row) * p.C + at.c;
        const Four w_low = x.in(p.w_low, i), k = x.in(p.k, i), a_low = x.in(p.a_low, i);
        Four rate, rest;
        if (residual) {
            const Four v = x.in(p.v, i), v_first = x.in(p.v_first, i), v_low = x.in(p.v_low, i);
            sigmoids(v0 + v_low, rate, rest);
            x.out(p.v_out, i, v * rest + v_first * rate);
        }
        x.out(p.w, i, w0 + w_low);
        const Four z = k * k_k;
        bool counts;
        const Four kk = z * inverse_length(z, p.N / 4, counts);
        sigmoids(a0 + a_low, rate, rest);
        x.out(p.k_out, i, k - k * rest * k_a);
        x.out(p.a, i, zeros() - kk);
        x.out(p.b, i, kk * rate);
    }
}

// Tokens of a warp that have a place in shared memory. Each lane copies its own channels there ahead of their turn, as
// in time_mix_output.cu. At most 44 KB a block: two blocks fit a multiprocessor of 100 KB, and the three that registers
// allow where it has more.
template <bool residual> constexpr int tensors = residual ? 11 : 6;
template <class T, bool residual> constexpr int slot_bytes = tensors<residual> * width * int(sizeof(T));
template <class T, bool residual> constexpr int ahead = 44 * 1024 / (warps * slot_bytes<T, residual>);

template <class T, bool residual>
__launch_bounds__(threads, sizeof(T) == 2 ? 3 : 2) __global__ void time_mix_inputs_backward(FusedInputs p) {
    constexpr int piece = 4 * int(sizeof(T)), step = 32 * piece, bytes = slot_bytes<T, residual>, slots = ahead<T, residual>;
    const Place at(1, p.rows, p.C);
    const Access<T> x{at.inside};
    const int own = threadIdx.x / 32 * slots * bytes + threadIdx.x % 32 * piece;
    const auto slot_of = [&](int row) { return own + unsigned(row) % slots * bytes; };
    const auto fetch = [&](int row, int64_t i) {
        if (row < at.end) {
            const void* const from[11] = {p.dw, p.dk_out, p.da, p.db, p.k, p.a_low, p.dv_out, p.v, p.v_first, p.v_low,
                                          p.more_dv_first ? p.more_dv_first : p.dw};
            const int to = slot_of(row);
#pragma unroll
            for (int j = 0; j < tensors<residual>; ++j)
                copy_async<piece>(to + j * step, static_cast<const T*>(from[j]) + i, at.inside && (j < 10 || p.more_dv_first));
        }
        copy_commit();
    };
#pragma unroll
    for (int i = 0; i < slots; ++i) fetch(at.begin + i, int64_t(at.begin + i) * p.C + at.c);
    const Four k_k = x.in(p.k_k, at.c), k_a = x.in(p.k_a, at.c), a0 = x.in(p.a0, at.c), v0 = residual ? x.in(p.v0, at.c) : zeros();
    Four sums[5] = {zeros(), zeros(), zeros(), zeros(), zeros()};  // w0, k_k, k_a, a0, v0
    for (int row = at.begin; row < at.end; ++row) {
        const int64_t i = int64_t(row) * p.C + at.c;
        const int slot = slot_of(row);
        const auto read = [&](int j) { return load(&shared<T>(slot + j * step)); };
        copy_wait<slots - 1>();
        Four rate, rest;
        if (residual) {
            const Four dv = read(6), v = read(7), v_first = read(8);
            sigmoids(v0 + read(9), rate, rest);
            const Four dv_low = dv * (v_first - v) * rate * rest;
            x.out(p.dv, i, dv * rest);
            x.out(p.dv_first, i, dv * rate + read(10));
            x.out(p.dv_low, i, dv_low);
            sums[4] += dv_low;
        }
        sums[0] += read(0);
        const Four dk_out = read(1), da = read(2), db = read(3), k = read(4), a_low = read(5);
        fetch(row + slots, i + int64_t(slots) * p.C);  // what was there is read: the copies run beside the sums over heads
        const Four z = k * k_k;
        bool counts;
        const float inverse = inverse_length(z, p.N / 4, counts);
        const Four kk = z * inverse;
        sigmoids(a0 + a_low, rate, rest);
        const Four da_low = (db * kk + dk_out * k * k_a) * rate * rest, dkk = db * rate - da;
        const float along = over_head(sum(kk * dkk), p.N / 4);
        const Four dz = (dkk - kk * (counts ? along : 0.f)) * inverse;
        x.out(p.da_low, i, da_low);
        x.out(p.dk, i, dk_out - dk_out * rest * k_a + dz * k_k);
        sums[1] += dz * k;
        sums[2] += zeros() - dk_out * k * rest;
        sums[3] += da_low;
    }
    __syncthreads();  // the sums come where the tokens were
    leave_sums(sums, at, p.C, p.parts);
}

template <class T> int forward(const FusedInputs& p, void* stream) {
    return launch(p.v_first ? time_mix_inputs<T, true> : time_mix_inputs<T, false>, grid_of(1, p.rows, p.C), threads, 0, stream, p);
}

template <class T, bool residual> int backward(const FusedInputs& p, void* stream) {
    constexpr int bytes = warps * ahead<T, residual> * slot_bytes<T, residual>;
    static_assert(bytes >= int(sums_bytes<5>), "shared memory serves both");
    const int error = launch(time_mix_inputs_backward<T, residual>, grid_of(1, p.rows, p.C), threads, bytes, stream, p);
    return error ? error : collect_sums<T>(p.parts, fused_parts(1, p.rows), 5 * p.C, p.sums, stream);
}

template <class T>
int backward(const FusedInputs& p, void* stream) {
    return p.v_first ? backward<T, true>(p, stream) : backward<T, false>(p, stream);
}

bool takes(const FusedInputs& p) {
    return valid(1, p.rows, p.C) && valid_heads(p.C, p.N) && !p.v_first == !p.v_low && !p.v_first == !p.v0;
}

}  // namespace
}  // namespace fused

extern "C" int fused_time_mix_inputs(const FusedInputs* task, int dtype, void* stream) {
    if (!fused::takes(*task)) return FUSED_UNSUPPORTED;
    return dtype == FUSED_BF16 ? fused::forward<fused::bf16>(*task, stream) : fused::forward<float>(*task, stream);
}

extern "C" int fused_time_mix_inputs_backward(const FusedInputs* task, int dtype, void* stream) {
    if (!fused::takes(*task) || !task->dv_out != !task->v_first) return FUSED_UNSUPPORTED;
    return dtype == FUSED_BF16 ? fused::backward<fused::bf16>(*task, stream) : fused::backward<float>(*task, stream);
}
