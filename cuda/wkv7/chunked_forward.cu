// WKV7 forward in chunks of 64 tokens (32 where a head has 128 channels) on the tensor cores. Two kernels:
//   chunk_maps   all chunks at once: F and H, which carry the state through the chunk (S <- S F + H), E and O, which give its output
//                (Y = E S^T + O), and X = (I - L)^-1 for the backward;
//   chunk_scan   one chunk after the other, the state in fp32 registers. Value rows do not meet: each warp carries 16 of
//                them. In segments it is the last of the passes of segments.cuh; with steps of test-time training (ttt.cuh)
//                they come between two chunks.
// RWKV-v7/docs/wkv7_chunked.md derives the formulas.
#include "segments.cuh"
#include "ttt.cuh"

namespace wkv7 {
namespace {

// X = (I - L)^-1 of a 16 x 16 strictly lower triangle, by forward substitution in fp32. L: [16][16] floats at an offset
// in shared memory; lane j has column j.
__device__ __forceinline__ void invert_block(float (&x)[16], int L) {
    const int column = lane_index() % 16;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        x[i] = i == column ? 1.f : 0.f;
#pragma unroll
        for (int s = 0; s < i; s += 4) {
            const float4 l = shared<float4>(L + (i * 16 + s) * 4);
            x[i] += l.x * x[s];
            if (s + 1 < i) x[i] += l.y * x[s + 1];
            if (s + 2 < i) x[i] += l.z * x[s + 2];
            if (s + 3 < i) x[i] += l.w * x[s + 3];
        }
    }
}

// One step of the merge of diagonal blocks: where X holds the inverses of the diagonal blocks of h x h 16-blocks, fills
// the blocks below the diagonal of the pairs of them: X21 = X22 L21 X11. A warp makes one 16-block; T = L21 X11 is
// computed transposed, since then its registers are the right factor of the second product.
template <int h, class T> __device__ __forceinline__ void merge_inverses(const T& X, const T& L, int job) {
    const int top = job / (h * h) * 2 * h, row = top + h + job / h % h, column = top + job % h;
    float t[2 * h][4], x[2][4];
    clear(t), clear(x);
    const int lane = lane_index();
#pragma unroll
    for (int m = 0; m < h; ++m)
        if (top + m >= column) {
            uint32_t a[4];
            ldmatrix<true>(a, X.at((top + m) * 16 + lane % 8 + lane / 16 * 8, column * 16 + lane / 8 % 2 * 8));
#pragma unroll
            for (int n = 0; n < h; ++n) {
                uint32_t b[4];
                ldmatrix<false>(b, L.at((top + h + n) * 16 + lane % 8 + lane / 16 * 8, (top + m) * 16 + lane / 8 % 2 * 8));
                const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
                mma(t[2 * n], a, b0);
                mma(t[2 * n + 1], a, b1);
            }
        }
#pragma unroll
    for (int n = 0; n < h; ++n)
        if (top + h + n <= row) {
            uint32_t a[4];
            ldmatrix<false>(a, X.at(row * 16 + lane % 16, (top + h + n) * 16 + lane / 16 * 8));
            const uint32_t b0[2] = {pack(t[2 * n][0], t[2 * n][1]), pack(t[2 * n + 1][0], t[2 * n + 1][1])};
            const uint32_t b1[2] = {pack(t[2 * n][2], t[2 * n][3]), pack(t[2 * n + 1][2], t[2 * n + 1][3])};
            mma(x[0], a, b0);
            mma(x[1], a, b1);
        }
    for_pairs(x, row * 16, [&](int i, int j, float x0, float x1) { X.put(i, column * 16 + j, x0, x1); });
}

template <int C, int N> struct MapsShared {
    static constexpr int tokens = C * N * 2, square = C * C * 2, blocks = C * 16 * 4, sums = C / 8 * N * 4;
    static constexpr size_t size = 6 * tokens + square + (square > tokens ? square : tokens) + blocks + sums + N * 4;
};

template <int C, int N> __launch_bounds__(C * 4 * column_parts(N), blocks_per_sm(MapsShared<C, N>::size, 2))
__global__ void chunk_maps(Sequences q, ChunkInputs in, bf16* __restrict__ saved_, bf16* __restrict__ scratch_) {
    using Token = Tile<C, N>;
    using Square = Tile<C, C>;
    constexpr int threads = C * 4 * column_parts(N), n_blocks = C / 16, width = part_width(N);
    static_assert(n_blocks == 2 || n_blocks == 4, "the merges below are those of 2 and of 4 blocks");
    const Place place = place_in_slot<C>(q, N, blockIdx.x, blockIdx.y);
    if (place.tokens < 1) return;
    bf16* const saved = saved_ + place.record * SavedChunk<C, N>::size;
    bf16* const scratch = scratch_ + place.record * ForwardScratch<C, N>::size;

    const Token At{0}, Rt{At.end()}, Bt{Rt.end()}, Kt{Bt.end()}, V{Kt.end()}, P{V.end()};
    const Square X{P.end()}, L{X.end()};
    const Token W{L.base};  // takes the place of L
    const int blocks = max(L.end(), W.end()), totals = blocks + C * 16 * 4, decay = totals + C / 8 * N * 4;

    copy_tokens<threads>(V, in.v + place.first, place.stride, place.tokens);
    copy_commit();
    const int warp = uniform(warp_index()), group = warp % (2 * n_blocks), block = group % n_blocks;
    const int part = column_parts(N) == 1 ? 0 : warp / (2 * n_blocks), column0 = part * width;
    Columns<C, N, C / 8>{group, part}.scaled_tokens(in, place, At, Rt, Bt, Kt, totals, decay);
    copy_wait<0>();
    __syncthreads();

    // Half of the warps follow a: L, its inverse X, W = X At. The other half: M V and Qk V, then P, Qb, E and O. Each
    // has 16 rows. Then F and H.
    const bool for_a = group < n_blocks;
    const Blocks all{0, N / 16}, lower{0, block + 1};
    float both[2][width / 8][4];  // M V; Qk V, which becomes O
    Sums<width>& O = both[1];
    if (for_a && part == 0) {
        const int mine = blocks + block * 256 * 4;
        const Rows<Token> rows(At, block * 16);
#pragma unroll
        for (int i = 0; i < n_blocks; ++i) {
            float t[2][4];
            if (i > block)
                clear(t);
            else
                triangle_block<true>(t, rows, Bt, block, i, 1);
            if (i == block)
                for_pairs(t, 0, [&](int row, int column, float x, float y) {
                    shared<float2>(mine + (row * 16 + column) * 4) = make_float2(x, y);
                });
            else
                for_pairs(t, block * 16, [&](int row, int column, float x, float y) {
                    Square{i < block ? L.base : X.base}.put(row, i * 16 + column, x, y);
                });
        }
        __syncwarp();
        float x[16];
        invert_block(x, mine);
        const int column = lane_index();
        if (column < 16)
#pragma unroll
            for (int i = 0; i < 16; ++i) shared<bf16>(X.at(block * 16 + i, block * 16 + column)) = from_float<bf16>(x[i]);
    }
    if (!for_a) {
        clear(both[0]), clear(both[1]);  // Rt is fetched with each use: registers are short
        const Rows<Token> a(At, block * 16);
        const Rows<Token, false> r(Rt, block * 16);
        const int lane = forgotten_lane();
#pragma unroll 1
        for (int i = 0; i <= block; ++i) multiply_block_of_both(both, a, 1, r, 0, true, Kt, V, block, i, column0, lane);
        store(both[0], P, block * 16, column0);  // until P replaces it
    }
    __syncthreads();
    if (for_a && block < n_blocks / 2 && part == 0) merge_inverses<1>(X, L, block);
    __syncthreads();
    if constexpr (n_blocks == 4) {
        if (for_a && part == 0) merge_inverses<2>(X, L, block);
        __syncthreads();
    }

    Left<C> x;
    Sums<width> d;
    clear(d);
    load_left<false>(x, X, block * 16, lower);
    if (for_a) {
        multiply<false>(d, x, At, lower, all, column0);
        store(d, W, block * 16, column0);
    } else {
        multiply<false>(d, x, P, lower, all, column0);
    }
    __syncthreads();
    if (!for_a) store(d, P, block * 16, column0);
    __syncthreads();

    if (!for_a) {
        const int lane = forgotten_lane();
        const Rows<Token> rows(Rt, block * 16);
        Left<C> Qb;
#pragma unroll
        for (int i = 0; i < n_blocks; ++i)
            if (i <= block) {
                float t[2][4];
                triangle_block<true>(t, rows, Bt, block, i, 0, lane);
                as_left(Qb[i], t[0], t[1]);
            }
        multiply<false>(O, Qb, P, lower, all, column0, 0, lane);
        store_blocks<N>(O, scratch + ForwardScratch<C, N>::O, block * 16, column0);
        clear(d);
        multiply<false>(d, Qb, W, lower, all, column0, 0, lane);
        for_pairs(d, block * 16, [&](int row, int column, float& x0, float& x1) {
            const float2 r = Rt.get(row, column0 + column);
            x0 += r.x, x1 += r.y;
        });
        store_blocks<N>(d, saved + SavedChunk<C, N>::E, block * 16, column0);
    }
#pragma unroll 1
    for (int row = group * 16; row < N; row += 2 * C) {  // r's warps have a share where N > C
        constexpr Blocks tokens{0, n_blocks};
        float F_H[2][width / 8][4];  // W^T Bt and P^T Bt: what is fetched of Bt serves both
        Left<C> left[2];
        clear(F_H[0]), clear(F_H[1]);
        load_left<true>(left[0], W, row, tokens), load_left<true>(left[1], P, row, tokens);
        multiply<false>(F_H, left, Bt, tokens, {0, width / 16}, column0);
        scale_columns(F_H[0], decay + column0 * 4);
        store_blocks<N>(F_H[0], saved + SavedChunk<C, N>::F, row, column0);
        __syncwarp();  // or else ptxas fetches ahead until it spills
        load_left<true>(left[0], V, row, tokens);
        multiply_rows(F_H[1], left[0], Kt, column0);
        scale_columns(F_H[1], decay + column0 * 4);
        store_blocks<N>(F_H[1], scratch + ForwardScratch<C, N>::H, row, column0);
    }
    for_threads<Square::bytes / 16, threads>([&](unsigned i) {
        const unsigned piece = i / 8;
        *reinterpret_cast<uint4*>(saved + SavedChunk<C, N>::X + i * 8) =
            shared<uint4>(X.at(piece / Square::pieces * 8 + i % 8, piece % Square::pieces * 8));
    });
    if (threadIdx.x < N) reinterpret_cast<float*>(saved + SavedChunk<C, N>::decay)[threadIdx.x] = shared<float>(decay + threadIdx.x * 4);
}

template <int C, int N> struct ScanShared {
    static constexpr int stage = (N * N + 2 * C * N + 2 * N) * 2;
    static constexpr size_t size = scan_stages * stage;
};

// blockIdx: sequence or segment, head, and the part of the value rows where a block has fewer than N / 16 warps. With
// steps of test-time training a block has all of them.
template <int C, int N, class Stepping> __launch_bounds__(N * 2, blocks_per_sm(ScanShared<C, N>::size, scan_blocks(N)))
__global__ void chunk_scan(Segments q, const float* __restrict__ initial_state, bf16* __restrict__ saved, const bf16* __restrict__ scratch,
                           bf16* __restrict__ y, float* __restrict__ final_state, Stepping steps) {
    const int sequence = blockIdx.x, head = blockIdx.y, slab = (blockIdx.z * blockDim.x + threadIdx.x) / 32 * 16, lane = lane_index();
    using Token = BlockTile<C, N>;
    using State = BlockTile<N, N>;
    const int length = q.length(sequence), chunks = ceil_div(length, C);
    const int64_t state_offset = (int64_t(sequence) * q.H + head) * N * N;

    auto fetch = [&](int chunk) {
        if (chunk < chunks) {
            const Place place = place_of<C>(q, N, sequence, chunk * C, head);
            const bf16* record = saved + place.record * SavedChunk<C, N>::size;
            const State F{chunk % scan_stages * ScanShared<C, N>::stage};
            const Token E{F.end()};
            copy_blocks(F, record + SavedChunk<C, N>::F);
            copy_blocks(E, record + SavedChunk<C, N>::E);
            const Token O{E.end()};  // the columns of this block's value rows
            const bf16* from = scratch + place.record * ForwardScratch<C, N>::size + ForwardScratch<C, N>::O;
            const int width = blockDim.x / 2, column0 = blockIdx.z * width;
            for (int i = threadIdx.x; i < C / 8 * width; i += blockDim.x) {
                const int row = i / width * 8, column = column0 + i % width / 8 * 8;
                copy_async(O.at(row + i % 8, column), from + block_offset<N>(row, column) + i % 8 * 8, true);
            }
            if (threadIdx.x < N / 4) copy_async(O.end() + threadIdx.x * 16, record + SavedChunk<C, N>::decay + threadIdx.x * 8, true);
        }
        copy_commit();
    };

    Sums<N> S;
    for_pairs(S, slab, [&](int row, int column, float& x0, float& x1) {
        const float2 s =
            initial_state ? *reinterpret_cast<const float2*>(initial_state + state_offset + row * N + column) : make_float2(0.f, 0.f);
        x0 = s.x, x1 = s.y;
    });
    for (int chunk = 0; chunk < scan_stages - 1; ++chunk) fetch(chunk);

    for (int chunk = 0; chunk < chunks; ++chunk) {
        const Place place = place_of<C>(q, N, sequence, chunk * C, head);
        if constexpr (Stepping::on) fetch_ahead<N>(steps, q.T, q.H, steps.after(chunk, C), sequence, head, true);
        fetch(chunk + scan_stages - 1);

        // H of this warp's rows straight into registers, while the rest arrives.
        const uint32_t* from = reinterpret_cast<const uint32_t*>(scratch + place.record * ForwardScratch<C, N>::size) + lane;
        uint32_t h[N / 8][2];
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) h[j][half] = from[(ForwardScratch<C, N>::H + block_offset<N>(slab + half * 8, j * 8)) / 2];

        store_blocks(S, saved + place.record * SavedChunk<C, N>::size + SavedChunk<C, N>::S, slab);
        Left<N> s;
        as_left(s, S);

        copy_wait<scan_stages - 1>();
        __syncthreads();
        const State F{chunk % scan_stages * ScanShared<C, N>::stage};
        const Token E{F.end()}, O{E.end()};

        scale_columns(S, O.end());
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 x = unpack(h[j][half]);
                S[j][2 * half] += x.x, S[j][2 * half + 1] += x.y;
            }

#pragma unroll
        for (int t = 0; t < C / 16; ++t) {  // 16 tokens of Y = E S^T + O
            Sums<16> d;
            for_pairs(d, t * 16, [&](int row, int column, float& x0, float& x1) {
                const float2 o = O.get(row, slab + column);
                x0 = o.x, x1 = o.y;
            });
#pragma unroll
            for (int k = 0; k < N / 16; ++k) {  // the left fragments of S are, rearranged, the right fragments of its transpose
                uint32_t e[4];
                ldmatrix<false>(e, E.at(t * 16 + lane % 16, k * 16 + lane / 16 * 8));
                const uint32_t upper[2] = {s[k][0], s[k][2]}, lower[2] = {s[k][1], s[k][3]};
                mma(d[0], e, upper);
                mma(d[1], e, lower);
            }
            store(d, O, t * 16, slab);  // Y takes the place of O
        }
        __syncwarp();
        // 16 bytes each of this warp's 16 columns: eight neighbours have eight rows, which lie in different banks.
#pragma unroll
        for (int i = lane; i < C * 2; i += 32) {
            const int t = i / 32 * 16 + i % 16, column = slab + i / 16 % 2 * 8;
            if (t < place.tokens)
                *reinterpret_cast<uint4*>(y + place.first + int64_t(t) * place.stride + column) = shared<uint4>(O.at(t, column));
        }

        multiply_rows(S, s, F);
        __syncthreads();
        if constexpr (Stepping::on)
            make_step<N, false>(steps, q.T, q.H, S, slab, steps.after(forget(chunk), C), sequence, head, chunk % scan_stages,
                                ScanShared<C, N>::stage);
    }
    if (final_state)
        for_pairs(S, slab, [&](int row, int column, float x0, float x1) {
            *reinterpret_cast<float2*>(final_state + state_offset + row * N + column) = make_float2(x0, x1);
        });
}

template <int N>
int forward(const Wkv7Shape& shape, const Wkv7Inputs& in, const Wkv7Steps* steps, void* y, float* final_state, void* saved, void* scratch,
            void* stream) {
    constexpr int C = chunk_tokens(N);
    const Sequences q = sequences_of(shape);
    const int error = launch(chunk_maps<C, N>, dim3(q.slots<C>(), q.H), C * 4 * column_parts(N), MapsShared<C, N>::size, stream, q,
                             ChunkInputs(in), (bf16*)saved, (bf16*)scratch);
    if (error) return error;
    const Segments segments = segments_of(shape);
    if (steps) {
        const Steps p(shape, *steps, in, (char*)saved + records_bytes<SavedChunk>(shape), nullptr);
        return launch(chunk_scan<C, N, Steps>, dim3(shape.B, q.H), N * 2, scan_bytes<N>(ScanShared<C, N>::size, *steps), stream, segments,
                      in.initial_state, (bf16*)saved, (const bf16*)scratch, (bf16*)y, final_state, p);
    }
    const float* entering = in.initial_state;
    if (segments.each > 1) {
        const SegmentMatrices m(segments, N, (char*)scratch + records_bytes<ForwardScratch>(shape));
        const int error =
            enter_segments<C, N>(segments, (const bf16*)saved, (const bf16*)scratch, m, in.initial_state, final_state, false, stream);
        if (error) return error;
        entering = m.states, final_state = nullptr;
    }
    const int count = segments.count * segments.each, parts = parts_of_scan(int64_t(count) * q.H, N, ScanShared<C, N>::size);
    return launch(chunk_scan<C, N, NoSteps>, dim3(count, q.H, parts), N * 2 / parts, ScanShared<C, N>::size, stream, segments, entering,
                  (bf16*)saved, (const bf16*)scratch, (bf16*)y, final_state, NoSteps());
}

}  // namespace
}  // namespace wkv7

extern "C" int64_t wkv7_chunked_saved_bytes(const Wkv7Shape* shape) { return wkv7::records_bytes<wkv7::SavedChunk>(*shape); }

extern "C" int64_t wkv7_chunked_forward_scratch_bytes(const Wkv7Shape* shape) {
    return wkv7::records_bytes<wkv7::ForwardScratch>(*shape) + wkv7::SegmentMatrices::bytes(*shape);
}

namespace {
int forward(const Wkv7Shape& s, const Wkv7Inputs& in, const Wkv7Steps* steps, void* y, float* final_state, void* saved, void* scratch,
            void* stream) {
    switch (wkv7::valid(s) ? s.N : 0) {
        case 16: return wkv7::forward<16>(s, in, steps, y, final_state, saved, scratch, stream);
        case 32: return wkv7::forward<32>(s, in, steps, y, final_state, saved, scratch, stream);
        case 64: return wkv7::forward<64>(s, in, steps, y, final_state, saved, scratch, stream);
        case 128: return wkv7::forward<128>(s, in, steps, y, final_state, saved, scratch, stream);
        default: return WKV7_UNSUPPORTED;
    }
}
}  // namespace

extern "C" int wkv7_chunked_forward(const Wkv7Shape* shape, const Wkv7Inputs* in, void* y, float* final_state, void* saved, void* scratch,
                                    void* stream) {
    return forward(*shape, *in, nullptr, y, final_state, saved, scratch, stream);
}

extern "C" int64_t wkv7_ttt_saved_bytes(const Wkv7Shape* shape, const Wkv7Steps* steps) {
    return wkv7::records_bytes<wkv7::SavedChunk>(*shape) + wkv7::Steps::core_bytes(*shape, *steps) +
           wkv7::Steps::mask_bytes(*shape, *steps);
}

extern "C" int wkv7_ttt_forward(const Wkv7Shape* shape, const Wkv7Inputs* in, const Wkv7Steps* steps, void* y, float* final_state,
                                void* saved, void* scratch, void* stream) {
    if (!wkv7::Steps::valid(*shape, *steps)) return WKV7_UNSUPPORTED;
    return forward(*shape, *in, steps, y, final_state, saved, scratch, stream);
}
