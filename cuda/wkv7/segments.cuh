// The scans in segments, for few (sequence, head) pairs with many chunks each. The chunks of a segment are together one
// affine map of the state, S <- S P + R: P the product of their F, R what they leave of a zero state. Three passes,
// forwards as backwards:
//   segment_maps   all segments at once: P and R (backwards P alone: gradient_scan, begun with zeros, leaves R);
//   carry_states   from segment to segment: the state that enters each. In fp32, as P holds the decay that the scans keep exact;
//   the scan       itself, in all segments at once, each from its state.
#pragma once

#include "chunk.cuh"

namespace wkv7 {

// Sequences cut into segments of whole chunks, which stand for sequences in a scan: segment j of sequence s has the
// number s * each + j. Behind the end of a sequence that is shorter than others they are empty.
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

// blockIdx: segment, head, and which matrix: 0 is P, an identity carried through the chunks without their H (stored
// transposed for the way back); 1 is R. Both are rounded as a scan rounds: to bf16 as a factor only.
template <int C, int N> __launch_bounds__(N * 2, blocks_per_sm(SegmentShared<N>::size, scan_blocks(N)))
__global__ void segment_maps(Segments q, const bf16* __restrict__ saved, const bf16* __restrict__ scratch, SegmentMatrices out,
                             bool transposed) {
    using State = BlockTile<N, N>;
    const int segment = blockIdx.x, head = blockIdx.y, slab = uniform(warp_index()) * 16, lane = lane_index();
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
            const uint32_t* from =
                reinterpret_cast<const uint32_t*>(scratch + record * ForwardScratch<C, N>::size + ForwardScratch<C, N>::H) + lane;
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

// Up to 2048 numbers of a state are the share of a block, 16 those of a thread. Shared memory has them twice, for the
// segments in turn, and the next 16 KB pieces of the P, which wait for no state.
template <int N> struct CarryShared {
    static constexpr int rows = N < 2048 / N ? N : 2048 / N, threads = rows * N / 16;
    static constexpr int slice = N < 4096 / N ? N : 4096 / N, slices = N / slice, stages = 3;  // rows of P in a piece
    static constexpr int state = rows * N * 4, piece = slice * N * 4, P = 2 * state;
    static constexpr size_t size = P + stages * piece;
};

// blockIdx: sequence, head, and which of the state's rows. A thread has four columns of four rows. begin, end: the
// states [sequences, H, N, N] that enter the first segment on the way and leave the last; may be null.
template <int N> __launch_bounds__(CarryShared<N>::threads)
__global__ void carry_states(Segments q, SegmentMatrices m, const float* __restrict__ begin, float* __restrict__ end, bool backwards) {
    using Shared = CarryShared<N>;
    const int sequence = blockIdx.x, head = blockIdx.y, row0 = threadIdx.x % (Shared::rows / 4) * 4,
              column0 = threadIdx.x / (Shared::rows / 4) * 4;
    const int used = q.used(sequence), products = used - !end;
    const int64_t mine = int64_t(blockIdx.z * Shared::rows + row0) * N + column0, whole = (int64_t(sequence) * q.H + head) * N * N + mine;
    auto matrix = [&](int i) { return (int64_t(sequence * q.each + (backwards ? used - 1 - i : i)) * q.H + head) * N * N; };
    auto fetch = [&](int piece) {
        if (piece < products * Shared::slices) {
            const float* const from = m.P + matrix(piece / Shared::slices) + piece % Shared::slices * Shared::slice * N;
            for_threads<Shared::piece / 16, Shared::threads>(
                [&](unsigned i) { copy_async(Shared::P + piece % Shared::stages * Shared::piece + i * 16, from + i * 4, true); });
        }
        copy_commit();
    };
    auto load = [&](float (&x)[4][4], const float* from) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const float4 four = *reinterpret_cast<const float4*>(from + r * N);
            x[r][0] = four.x, x[r][1] = four.y, x[r][2] = four.z, x[r][3] = four.w;
        }
    };
    auto store = [&](float* to, const float (&x)[4][4]) {
#pragma unroll
        for (int r = 0; r < 4; ++r) *reinterpret_cast<float4*>(to + r * N) = make_float4(x[r][0], x[r][1], x[r][2], x[r][3]);
    };

    float S[4][4] = {}, R[4][4] = {};
    for (int piece = 0; piece < Shared::stages - 1; ++piece) fetch(piece);
    if (begin) load(S, begin + whole);
    if (used) load(R, m.states + matrix(0) + mine);
    for (int i = 0; i < used; ++i) {
        store(m.states + matrix(i) + mine, S);  // in the place of R, which this thread has read
        if (i == products) break;
        const int factor = i % 2 * Shared::state + row0 * 4;  // column by column: all rows of one meet the same number of P
#pragma unroll
        for (int j = 0; j < 4; ++j)
            shared<float4>(factor + (column0 + j) * Shared::rows * 4) = make_float4(S[0][j], S[1][j], S[2][j], S[3][j]);
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int j = 0; j < 4; ++j) S[r][j] = R[r][j];
        if (i + 1 < used) load(R, m.states + matrix(i + 1) + mine);
        for (int part = 0; part < Shared::slices; ++part) {
            const int piece = i * Shared::slices + part;
            copy_wait<Shared::stages - 2>();
            __syncthreads();  // the piece is there, and so is the factor; nobody needs the piece before any more
            fetch(piece + Shared::stages - 1);
            const int column = factor + part * Shared::slice * Shared::rows * 4,
                      P = Shared::P + piece % Shared::stages * Shared::piece + column0 * 4;
#pragma unroll 8
            for (int k = 0; k < Shared::slice; ++k) {
                const float4 s = shared<float4>(column + k * Shared::rows * 4), p = shared<float4>(P + k * N * 4);
                const float left[4] = {s.x, s.y, s.z, s.w}, right[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
                for (int r = 0; r < 4; ++r)
#pragma unroll
                    for (int j = 0; j < 4; ++j) S[r][j] += left[r] * right[j];
            }
        }
    }
    if (end) store(end + whole, S);
}

// The last step of both directions, once m has R: the states that enter the segments.
template <int C, int N>
int enter_segments(const Segments& q, const bf16* saved, const bf16* scratch, const SegmentMatrices& m, const float* begin, float* end,
                   bool backwards, void* stream) {
    const int error = launch(segment_maps<C, N>, dim3(q.count * q.each, q.H, backwards ? 1 : 2), N * 2, SegmentShared<N>::size, stream, q,
                             saved, scratch, m, backwards);
    if (error) return error;
    using Shared = CarryShared<N>;
    return launch(carry_states<N>, dim3(q.count, q.H, N / Shared::rows), Shared::threads, Shared::size, stream, q, m, begin, end,
                  backwards);
}

}  // namespace
}  // namespace wkv7
