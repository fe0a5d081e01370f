// The scans in segments, for few (sequence, head) pairs with many chunks each. The chunks of a segment are together one affine map of the state,
// S <- S P + R: P the product of their F, R what they leave of a zero state. Three passes, forwards as backwards:
//   segment_maps   all segments at once: P and R (backwards P alone: gradient_scan, begun with zeros, leaves R);
//   carry_states   from segment to segment: the state that enters each. In fp32, as P holds the decay that the scans keep exact;
//   the scan       itself, in all segments at once, each from its state.
#pragma once

#include "chunk.cuh"

namespace wkv7 {

// Sequences cut into segments of whole chunks, which stand for sequences in a scan: segment j of sequence s is s * each + j. Behind the end of a
// sequence that is shorter than others they are empty.
struct Segments : Sequences {
    int each, tokens;  // segments of a sequence, tokens of a segment

    __device__ int offset(int s) const { return s % each * tokens; }
    __device__ int start(int s) const { return Sequences::start(s / each) + offset(s); }
    __device__ int length(int s) const { return max(min(Sequences::length(s / each) - offset(s), tokens), 0); }
    template <int C> __device__ int first_slot(int s) const { return Sequences::first_slot<C>(s / each) + offset(s) / C; }
    __device__ int used(int sequence) const { return ceil_div(Sequences::length(sequence), tokens); }
};

// One segment a sequence where the shape asks for none: the plain scan.
inline Segments segments_of(const Wkv7Shape& shape) {
    const int C = chunk_tokens(shape.N), chunks = ceil_div(shape.T, C);
    const int segment = shape.segment_chunks > 0 && shape.segment_chunks < chunks ? shape.segment_chunks : chunks;
    return {sequences_of(shape), ceil_div(chunks, segment), segment * C};
}

// What the passes hand on, fp32 [segments, H, N, N] each, behind the records of a scratch. states: R, then what enters each segment.
struct SegmentMatrices {
    float *P, *states;
    SegmentMatrices(const Segments& q, int N, void* memory) : P((float*)memory), states(P + int64_t(q.count) * q.each * q.H * N * N) {}
    static int64_t bytes(const Wkv7Shape& shape) {
        const Segments q = segments_of(shape);
        return q.each > 1 ? int64_t(2) * q.count * q.each * q.H * shape.N * shape.N * int64_t(sizeof(float)) : 0;
    }
};

namespace {

template <int N> struct SegmentShared {
    static constexpr int stage = (N * N + 2 * N) * 2;
    static constexpr size_t size = scan_stages * stage;
};

// blockIdx: segment, head, and which matrix: 0 is P, an identity carried through the chunks without their H (stored transposed for the way back);
// 1 is R. Both are rounded as a scan rounds: to bf16 as a factor only.
template <int C, int N> __launch_bounds__(N * 2, blocks_per_sm(SegmentShared<N>::size, scan_blocks(N)))
__global__ void segment_maps(Segments q, const bf16* __restrict__ saved, const bf16* __restrict__ scratch, SegmentMatrices out, bool transposed) {
    using State = Tile<N, N>;
    const int segment = blockIdx.x, head = blockIdx.y, slab = warp_index() * 16, lane = lane_index();
    const bool for_P = blockIdx.z == 0;
    const int chunks = ceil_div(q.length(segment), C);
    if (chunks == 0) return;

    auto fetch = [&](int chunk) {
        if (chunk < chunks) {
            const bf16* record = saved + place_of<C>(q, N, segment, chunk * C, head).record * SavedChunk<C, N>::size;
            const State F{chunk % scan_stages * SegmentShared<N>::stage};
            copy_blocks(F, record + SavedChunk<C, N>::F);
            if (threadIdx.x < N / 4) copy_async(F.end() + threadIdx.x * 16, record + SavedChunk<C, N>::decay + threadIdx.x * 8, true);
        }
        copy_commit();
    };

    Sums<N> S;
    for_pairs(S, slab, [&](int row, int column, float& x0, float& x1) { x0 = for_P && row == column, x1 = for_P && row == column + 1; });
    for (int chunk = 0; chunk < scan_stages - 1; ++chunk) fetch(chunk);

    for (int chunk = 0; chunk < chunks; ++chunk) {
        fetch(chunk + scan_stages - 1);
        uint32_t h[N / 8][2];
        if (!for_P) {
            const int64_t record = place_of<C>(q, N, segment, chunk * C, head).record;
            const uint32_t* from = reinterpret_cast<const uint32_t*>(scratch + record * ForwardScratch<C, N>::size + ForwardScratch<C, N>::H) + lane;
#pragma unroll
            for (int j = 0; j < N / 8; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) h[j][half] = from[block_offset<N>(slab + half * 8, j * 8) / 2];
        }
        Left<N> s;
        as_left(s, S);
        copy_wait<scan_stages - 1>();
        __syncthreads();
        const State F{chunk % scan_stages * SegmentShared<N>::stage};
        scale_columns(S, F.end());
        if (!for_P)
#pragma unroll
            for (int j = 0; j < N / 8; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 x = unpack(h[j][half]);
                    S[j][2 * half] += x.x, S[j][2 * half + 1] += x.y;
                }
        multiply_rows(S, s, F);
        __syncthreads();
    }

    float* const matrix = (for_P ? out.P : out.states) + (int64_t(segment) * q.H + head) * N * N;
    for_pairs(S, slab, [&](int row, int column, float x0, float x1) {
        if (for_P && transposed)
            matrix[column * N + row] = x0, matrix[(column + 1) * N + row] = x1;
        else
            *reinterpret_cast<float2*>(matrix + row * N + column) = make_float2(x0, x1);
    });
}

// blockIdx: sequence, head, and 16 of the state's rows. A thread has one column of `rows` of them. begin, end: the states [sequences, H, N, N] that
// enter the first segment on the way and leave the last; may be null.
template <int N> __launch_bounds__(N * 4)
__global__ void carry_states(Segments q, SegmentMatrices m, const float* __restrict__ begin, float* __restrict__ end, bool backwards) {
    constexpr int rows = 4;
    const int sequence = blockIdx.x, head = blockIdx.y, column = threadIdx.x % N, row0 = threadIdx.x / N * rows, slab = blockIdx.z * 16;
    const int used = q.used(sequence);
    const int64_t mine = int64_t(slab + row0) * N + column, whole = (int64_t(sequence) * q.H + head) * N * N + mine;

    float S[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) S[r] = begin ? begin[whole + r * N] : 0.f;
    for (int i = 0; i < used; ++i) {
        const int segment = sequence * q.each + (backwards ? used - 1 - i : i);
        const int64_t matrix = (int64_t(segment) * q.H + head) * N * N;
        const float* const P = m.P + matrix + column;
        float* const state = m.states + matrix + mine;
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            shared<float>(((row0 + r) * N + column) * 4) = S[r];
            const float entering = S[r];
            S[r] = state[r * N];
            state[r * N] = entering;
        }
        __syncthreads();
#pragma unroll 4
        for (int k = 0; k < N; k += 4) {
            const float p0 = P[k * N], p1 = P[(k + 1) * N], p2 = P[(k + 2) * N], p3 = P[(k + 3) * N];
#pragma unroll
            for (int r = 0; r < rows; ++r) {
                const float4 s = shared<float4>(((row0 + r) * N + k) * 4);
                S[r] += s.x * p0 + s.y * p1 + s.z * p2 + s.w * p3;
            }
        }
        __syncthreads();
    }
    if (end)
#pragma unroll
        for (int r = 0; r < rows; ++r) end[whole + r * N] = S[r];
}

// The last step of both directions, once m has R: the states that enter the segments.
template <int C, int N>
int enter_segments(const Segments& q, const bf16* saved, const bf16* scratch, const SegmentMatrices& m, const float* begin, float* end, bool backwards,
                   void* stream) {
    const int error = launch(segment_maps<C, N>, dim3(q.count * q.each, q.H, backwards ? 1 : 2), N * 2, SegmentShared<N>::size, stream, q, saved, scratch, m,
                             backwards);
    if (error) return error;
    return launch(carry_states<N>, dim3(q.count, q.H, N / 16), N * 4, 16 * N * 4, stream, q, m, begin, end, backwards);
}

}  // namespace
}  // namespace wkv7
