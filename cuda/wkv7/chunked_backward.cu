// WKV7 backward in chunks of 64 tokens (32 where a head has 128 channels) on the tensor cores. Two kernels:
//   gradient_scan     from the last chunk to the first: the gradient of the state, G <- G F^T + dY^T E, in fp32 registers;
//                     leaves for each chunk the gradient of the state after it, scaled by the chunk's decay. Value rows do
//                     not meet: each warp carries 16 of them. In segments it is the first and the last of the passes of
//                     segments.cuh; with steps of test-time training (ttt.cuh) they come between two chunks.
//   chunk_gradients   all chunks at once: the six gradients, from the state before the chunk (saved by the forward) and the
//                     gradient of that after it.
// No state is ever recomputed backwards, which would divide by decays. RWKV-v7/docs/wkv7_chunked.md derives the formulas.
#include "segments.cuh"
#include "ttt.cuh"

namespace wkv7 {
namespace {

struct ChunkGradients {
    bf16 *dr, *dw, *dk, *dv, *da, *db;
    const bf16 *more_dr, *more_dk, *more_dv;
    explicit ChunkGradients(const Wkv7Gradients& g)
        : dr((bf16*)g.dr), dw((bf16*)g.dw), dk((bf16*)g.dk), dv((bf16*)g.dv), da((bf16*)g.da), db((bf16*)g.db),
          more_dr((const bf16*)g.more_dr), more_dk((const bf16*)g.more_dk), more_dv((const bf16*)g.more_dv) {}
};

template <int C, int N> struct ScanShared {
    static constexpr int stage = (N * N + 2 * C * N + 2 * N) * 2;
    static constexpr size_t size = scan_stages * stage;
};

// blockIdx: sequence or segment, head, and the part of the value rows where a block has fewer than N / 16 warps. With
// steps of test-time training a block has all of them.
template <int C, int N, class Stepping> __launch_bounds__(N * 2, blocks_per_sm(ScanShared<C, N>::size, scan_blocks(N)))
__global__ void gradient_scan(Segments q, const bf16* __restrict__ saved, const bf16* __restrict__ dy,
                              const float* __restrict__ d_final_state, bf16* __restrict__ scratch, float* __restrict__ d_initial_state,
                              Stepping steps) {
    using State = BlockTile<N, N>;
    const int sequence = blockIdx.x, head = blockIdx.y, slab = (blockIdx.z * blockDim.x + threadIdx.x) / 32 * 16;
    const int chunks = ceil_div(q.length(sequence), C);
    const int64_t state_offset = (int64_t(sequence) * q.H + head) * N * N;

    auto fetch = [&](int chunk) {
        if (chunk >= 0) {
            const Place place = place_of<C>(q, N, sequence, chunk * C, head);
            const bf16* record = saved + place.record * SavedChunk<C, N>::size;
            const State F{chunk % scan_stages * ScanShared<C, N>::stage};
            const BlockTile<C, N> E{F.end()};
            const Tile<C, N> Y{E.end()};
            copy_blocks(F, record + SavedChunk<C, N>::F);
            copy_blocks(E, record + SavedChunk<C, N>::E);
            copy_tokens(Y, dy + place.first, place.stride, place.tokens);
            if (threadIdx.x < N / 4) copy_async(Y.end() + threadIdx.x * 16, record + SavedChunk<C, N>::decay + threadIdx.x * 8, true);
        }
        copy_commit();
    };

    Sums<N> G;
    for_pairs(G, slab, [&](int row, int column, float& x0, float& x1) {
        const float2 g =
            d_final_state ? *reinterpret_cast<const float2*>(d_final_state + state_offset + row * N + column) : make_float2(0.f, 0.f);
        x0 = g.x, x1 = g.y;
    });
    for (int i = 1; i < scan_stages; ++i) fetch(chunks - i);

    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
        if constexpr (Stepping::on) fetch_ahead<N>(steps, q.T, q.H, steps.after(chunk - 1, C), sequence, head, false);
        fetch(chunk - scan_stages + 1);
        Left<N> g;
        as_left(g, G);
        copy_wait<scan_stages - 1>();
        __syncthreads();
        const State F{chunk % scan_stages * ScanShared<C, N>::stage};
        const BlockTile<C, N> E{F.end()};
        const Tile<C, N> Y{E.end()};

        scale_columns(G, Y.end());
        store_blocks(G,
                     scratch + place_of<C>(q, N, sequence, chunk * C, head).record * BackwardScratch<C, N>::size + BackwardScratch<C, N>::G,
                     slab);
        __syncwarp();  // or else ptxas fetches ahead until it spills
        multiply_transpose(G, g, F);
        __syncwarp();
        Left<C> y;
        load_left<true>(y, Y, slab, {0, C / 16});
        multiply_rows(G, y, E);
        __syncthreads();
        if constexpr (Stepping::on)
            make_step<N, true>(steps, q.T, q.H, G, slab, steps.after(forget(chunk) - 1, C), sequence, head, chunk % scan_stages,
                               ScanShared<C, N>::stage);
    }
    if (d_initial_state)
        for_pairs(G, slab, [&](int row, int column, float x0, float x1) {
            *reinterpret_cast<float2*>(d_initial_state + state_offset + row * N + column) = make_float2(x0, x1);
        });
}

// fp32 [C][N] in shared memory; the padding keeps the rows of a fragment in different banks.
template <int C, int N> struct Plane {
    static constexpr int stride = N + 8, bytes = C * stride * 4;
    int base;  // byte offset
    __device__ __forceinline__ int end() const { return base + bytes; }
    __device__ __forceinline__ float2& at(int row, int column) const { return shared<float2>(base + (row * stride + column) * 4); }
};

template <int C, int N> struct GradientsShared {
    static constexpr int w = (C > N ? C : N) * C * 2;                 // X, whose place w takes
    static constexpr int factors = 4 * C * N * 2 + w;                 // At, Rt, Bt, Kt, X
    static constexpr int rest = (4 * C + 2 * N) * part_width(N) * 2;  // V, Y, U, Z, S, G: as many value rows as are treated at a time
    static constexpr int planes = 3 * Plane<C, N>::bytes;              // take the place of the rest
    static constexpr int sums = (C / 16 + 1 + C / 8) * N * 4;
    static constexpr size_t size = factors + (rest > planes ? rest : planes) + sums + N * 4;
};

// Sums over this warp's 16 rows of tile o d go to, or are added to, sums [columns of the tile]; d has its columns from column0 on.
template <int J, class T>
__device__ __forceinline__ void column_sums(const float (&d)[J][4], const T& tile, int row0, int column0, int sums, bool add) {
    const int lane = lane_index(), row = row0 + lane / 4, column = column0 + lane % 4 * 2;
    const bool right = lane & 16, odd = lane & 8;
#pragma unroll
    for (int n = 0; n < J; n += 2) {
        float2 x[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float2 upper = tile.get(row, column + (n + j) * 8), lower = tile.get(row + 8, column + (n + j) * 8);
            x[j] = make_float2(upper.x * d[n + j][0] + lower.x * d[n + j][2], upper.y * d[n + j][1] + lower.y * d[n + j][3]);
        }
        // Of four columns a lane keeps two, of these one.
        const float2 mine = right ? x[1] : x[0], other = right ? x[0] : x[1];
        const float even = mine.x + __shfl_xor_sync(~0u, other.x, 16), uneven = mine.y + __shfl_xor_sync(~0u, other.y, 16);
        float sum = (odd ? uneven : even) + __shfl_xor_sync(~0u, odd ? even : uneven, 8);
        sum += __shfl_xor_sync(~0u, sum, 4);
        if (!(lane & 4)) {
            float& to = shared<float>(sums + (column + (n + right) * 8 + odd) * 4);
            to = add ? to + sum : sum;
        }
    }
}

// Two blocks of 8 warps on a multiprocessor; for N = 128 one, whose sums last through both passes and take the registers of two.
template <int C, int N> __launch_bounds__(C * 4 * column_parts(N), blocks_per_sm(GradientsShared<C, N>::size, N == 128 ? 1 : 2))
__global__ void chunk_gradients(Sequences q, ChunkInputs in, const bf16* __restrict__ saved_, const bf16* __restrict__ dy,
                                const bf16* __restrict__ scratch, ChunkGradients out) {
    // width: of a warp's columns; values: the value rows of a pass.
    constexpr int threads = C * 4 * column_parts(N), width = part_width(N), values = width, parts = column_parts(N);
    using Token = Tile<C, N>;
    using Value = Tile<C, values>;
    using Unknown = BlockTile<C, values>;  // written and read in blocks only
    using State = BlockTile<values, N>;
    const Place place = place_in_slot<C>(q, N, blockIdx.x, blockIdx.y);
    if (place.tokens < 1) return;
    const bf16* const saved = saved_ + place.record * SavedChunk<C, N>::size;

    const Token At{0}, Rt{At.end()}, Bt{Rt.end()}, Kt{Bt.end()}, w{Kt.end()};
    const BlockTile<C, C> X{w.base};
    const Value V{GradientsShared<C, N>::factors}, Y{V.end()};
    const Unknown U{Y.end()}, Z{U.end()};
    const State S{Z.end()}, G{S.end()};
    constexpr int n_blocks = C / 16, decay = GradientsShared<C, N>::size - N * 4, totals = decay - C / 8 * N * 4,
                  sums = totals - (n_blocks + 1) * N * 4;

    // A pass takes `values` value rows of all that has them; the gradients of r, a, k and b are sums over the passes.
    const auto fetch = [&](int value0) {
        copy_tokens<threads>(V, in.v + place.first + value0, place.stride, place.tokens);
        copy_tokens<threads>(Y, dy + place.first + value0, place.stride, place.tokens);
        copy_blocks<threads>(S, saved + SavedChunk<C, N>::S + value0 * N);
        copy_blocks<threads>(G, scratch + place.record * BackwardScratch<C, N>::size + BackwardScratch<C, N>::G + value0 * N);
        copy_commit();
    };
    copy_blocks<threads>(X, saved + SavedChunk<C, N>::X);
    fetch(0);
    const int warp = uniform(warp_index()), group = warp % (C / 8), part = parts == 1 ? 0 : warp / (C / 8), block = group % n_blocks,
              row0 = block * 16;
    Columns<C, N, C / 8>{group, part}.scaled_tokens(in, place, At, Rt, Bt, Kt, totals, decay);

    // Half of the warps follow a (and what it shares with b), the other half r (and k). Each has 16 rows, and a part of the columns.
    const bool for_a = group < n_blocks;
    const auto choose = [for_a](const auto& a, const auto& r) { auto x = a; return x.base = forget(for_a) ? a.base : r.base, x; };
    constexpr Blocks all{0, N / 16};
    const Blocks lower{0, block + 1}, upper{block, n_blocks};
    const int column0 = part * width;
    float d[2][width / 8][4];  // dAt and dRt, or dBt and dKt
    clear(d[0]), clear(d[1]);
#pragma unroll 1
    for (int value0 = 0; value0 < N; value0 += values) {
        copy_wait<0>();
        __syncthreads();
        {
            // U's right side At S^T + M V | dU = Qb^T Y + Bt G^T.
            Sums<values / parts> u;
            const int mine = part * (values / parts);
            const Rows<Token> keys(choose(At, Bt), row0);
            clear(u);
            multiply_transpose(u, keys, State{for_a ? S.base : G.base}, mine);
            if (for_a)
                multiply_triangle<true>(u, keys, Kt, 1, V, block, mine);
            else
                multiply_triangle<false>(u, keys, Rt, 0, Y, block, mine);
            store(u, choose(U, Z), row0, mine);
            __syncthreads();

            // U = X (...) | Z = X^T dU.
            Left<C> x;
            clear(u);
            if (for_a) {
                load_left<false>(x, X, row0, lower);
                multiply<false>(u, x, U, lower, all, mine);
            } else {
                load_left<true>(x, X, row0, upper);
                multiply<false>(u, x, Z, upper, all, mine);
            }
            __syncthreads();
            store(u, choose(U, Z), row0, mine);
        }
        if (value0 == N - values) {  // needed again at the end: fetched once X has served
            copy_tokens<threads>(w, in.w + place.first, place.stride, place.tokens);
            copy_commit();
        }
        __syncthreads();

        // dV = Kt G^T + Qk^T Y + M^T Z, by the warps that have the fewest products below.
        const int rank = for_a ? block : n_blocks - 1 - block;
        if (rank < n_blocks / 2) {
            constexpr int share = values / parts;
            const int mine = part * share, rows16 = 2 * rank + !for_a;
            Sums<share> dv;
            const Rows<Token> keys(Kt, rows16 * 16);
            const auto at = [&](int row, int column) { return place.first + int64_t(row) * place.stride + value0 + mine + column; };
            for_pairs(dv, forget(rows16 * 16), [&](int row, int column, float& x, float& y) {
                const float2 more = out.more_dv && row < place.tokens
                                        ? unpack(*reinterpret_cast<const uint32_t*>(out.more_dv + at(row, column)))
                                        : make_float2(0.f, 0.f);
                x = more.x, y = more.y;
            });
            multiply_transpose(dv, keys, G, mine);
            multiply_triangles<false>(dv, keys, Rt, 0, Y, At, 1, Z, rows16, mine);
            for_pairs(dv, forget(rows16 * 16), [&](int row, int column, float x, float y) {
                if (row < place.tokens) *reinterpret_cast<uint32_t*>(out.dv + at(row, column)) = pack(x, y);
            });
        }

        // Half of the warps have what reads the state, the other half what writes it: both of their gradients meet the
        // same right factors, fetched once.
        //     dAt = Z S + tril(Z U^T, -1) Bt + tril(Z V^T, -1) Kt,   dRt = Y S + tril(Y U^T) Bt + tril(Y V^T) Kt
        //     dBt = U G + triu(U Z^T, 1) At + triu(U Y^T) Rt,        dKt = V G + triu(V Z^T, 1) At + triu(V Y^T) Rt
        const int lane = forgotten_lane();
        const Rows<Unknown> rows0(choose(Z, U), row0);
        const Rows<Value, false> rows1(choose(Y, V), row0);  // fetched with each use: registers are short
        {
            float fresh[2][width / 8][4];
            clear(fresh[0]), clear(fresh[1]);
#pragma unroll
            for (int k = 0; k < values / 16; ++k) {
                uint32_t left[2][1][4];
                rows0.fragment(left[0], k, lane), rows1.fragment(left[1], k, lane);
                multiply<false>(fresh, left, choose(S, G), {0, 1}, {0, width / 16}, column0, k * 16, lane);
            }
            // U G and V G belong to the tokens scaled to the chunk's end: their share in the decay's gradient goes to
            // all tokens alike, and so does that of S decaying through the whole chunk.
            if (for_a) {
                for (int column = column0 + block * 8; column < column0 + width; column += n_blocks * 8) {
                    const int mine = column + lane % 4 * 2;
                    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
                    for (int i = 0; i < values; i += 8) {
                        const float2 s = S.get(i + lane / 4, mine), g = G.get(i + lane / 4, mine);
                        sum = make_float2(sum.x + s.x * g.x, sum.y + s.y * g.y);
                    }
#pragma unroll
                    for (int mask = 4; mask < 32; mask *= 2)
                        sum = make_float2(sum.x + __shfl_xor_sync(~0u, sum.x, mask), sum.y + __shfl_xor_sync(~0u, sum.y, mask));
                    if (lane < 4) {
                        float2& to = shared<float2>(sums + (n_blocks * N + mine) * 4);
                        to = value0 > 0 ? make_float2(to.x + sum.x, to.y + sum.y) : sum;
                    }
                }
            } else {
                column_sums(fresh[0], Bt, forget(row0), column0, sums + block * N * 4, value0 > 0);
                column_sums(fresh[1], Kt, forget(row0), column0, sums + block * N * 4, true);
            }
#pragma unroll
            for (int i = 0; i < width; ++i) {
                float& x = d[i / (width / 2)][i / 4 % (width / 8)][i % 4];
                x = values == N ? fresh[i / (width / 2)][i / 4 % (width / 8)][i % 4]
                                : x + fresh[i / (width / 2)][i / 4 % (width / 8)][i % 4];
            }
        }
#pragma unroll 1
        for (int i = for_a ? 0 : block; i < (for_a ? block + 1 : n_blocks); ++i) {
            multiply_block_of_both(d, rows0, 1, rows1, !for_a, for_a, choose(U, Z), choose(Bt, At), block, i, column0, forgotten_lane());
            multiply_block_of_both(d, rows0, for_a, rows1, 0, for_a, choose(V, Y), choose(Kt, Rt), block, i, column0, forgotten_lane());
        }
        if (value0 < N - values) {
            __syncthreads();
            fetch(value0 + values);
        }
    }
    copy_wait<0>();
    __syncthreads();

    // The tiles behind X are dead. Through their place the sums go to where a thread has eight tokens of two channels:
    // the decays and what they earn are sums along a channel, and stay in registers there. There is room for three
    // planes; dKt comes when one is free. No condition between the tokens becomes a branch, behind which each would
    // wait for the one before.
    const Columns<C, N, C / 8> channels{group, part};
    const Plane<C, N> first{V.base}, second{first.end()}, third{second.end()};
    const auto lay = [&](auto& d, const Plane<C, N>& plane) {
        for_pairs(d, forget(row0), [&](int row, int column, float x, float y) { plane.at(row, column0 + column) = make_float2(x, y); });
    };
    lay(d[0], choose(first, third));
    if (for_a) lay(d[1], second);

    constexpr int rows = channels.rows;
    Place here = place;
    here.tokens = forget(place.tokens);
    const int inside = here.tokens - channels.row();
    const int64_t at = place.first + int64_t(channels.row()) * place.stride + channels.column();
    uint32_t more_r[rows] = {}, more_k[rows] = {};
    if (out.more_dr) channels.load(more_r, out.more_dr, here);
    float2 g[rows], before, after, sum = make_float2(0.f, 0.f);  // g: log2 decay up to and with the token, then 2^-g
#pragma unroll
    for (int t = 0; t < rows; ++t) {
        const uint32_t raw =
            t < inside && channels.active() ? shared<uint32_t>(w.at(channels.row() + t, channels.column())) : channels.no_decay;
        sum = g[t] = channels.add_log_decay(sum, unpack(raw));
    }
    channels.across_warps(sum, totals, before, after);  // its barrier is also that of the planes

    const auto write = [&](bf16* to, int t, float x, float y) {
        store_if(t < inside, reinterpret_cast<uint32_t*>(to + at) + int64_t(t) * (place.stride / 2), pack(x, y));
    };
    // Writes the gradient of one token of a tile; returns what the decay in it earns.
    const auto finish = [&](const Plane<C, N>& plane, const Token& tile, int t, float2 scale, bf16* to, uint32_t more) {
        const float2 d = plane.at(channels.row() + t, channels.column()), x = tile.get(channels.row() + t, channels.column()),
                     others = unpack(more);
        write(to, t, d.x * scale.x + others.x, d.y * scale.y + others.y);
        return make_float2(d.x * x.x, d.y * x.y);
    };
    float2 earned[rows + 1] = {}, scale = make_float2(exp2_fast(before.x), exp2_fast(before.y));
    if (channels.active())
#pragma unroll
        for (int t = 0; t < rows; ++t) {
            // a_t meets the decays before its token, r_t that of its token as well
            const float2 a = finish(first, At, t, scale, out.da, 0u);
            earned[t] = make_float2(earned[t].x + a.x, earned[t].y + a.y);
            g[t] = make_float2(before.x + g[t].x, before.y + g[t].y);
            scale = make_float2(exp2_fast(g[t].x), exp2_fast(g[t].y));
            g[t] = make_float2(exp2_fast(-g[t].x), exp2_fast(-g[t].y));
            const float2 r = finish(second, Rt, t, scale, out.dr, more_r[t]), b = finish(third, Bt, t, g[t], out.db, 0u);
            earned[t + 1] = make_float2(r.x - b.x, r.y - b.y);  // [0]: what the token before this warp's first earns
        }
    if (out.more_dk) channels.load(more_k, out.more_dk, here);
    __syncthreads();
    if (!for_a) lay(d[1], first);
    __syncthreads();
    sum = make_float2(0.f, 0.f);
    if (channels.active())
#pragma unroll
        for (int t = rows - 1; t >= 0; --t) {
            const float2 k = finish(first, Kt, t, g[t], out.dk, more_k[t]);
            sum = make_float2(sum.x + earned[t + 1].x - k.x, sum.y + earned[t + 1].y - k.y);
            earned[t + 1] = sum;
        }
    channels.across_warps(make_float2(sum.x + earned[0].x, sum.y + earned[0].y), totals, before, after);
    if (!channels.active()) return;
#pragma unroll
    for (int i = 0; i <= n_blocks; ++i) {
        const float2 x = shared<float2>(sums + (i * N + channels.column()) * 4);
        after = make_float2(after.x + x.x, after.y + x.y);
    }
#pragma unroll
    for (int t = 0; t < rows; ++t) {
        const float2 w_t = w.get(channels.row() + t, channels.column());
        write(out.dw, t, (earned[t + 1].x + after.x) * log_decay_slope_fast(w_t.x),
              (earned[t + 1].y + after.y) * log_decay_slope_fast(w_t.y));
    }
}

template <int N>
int backward(const Wkv7Shape& shape, const Wkv7Inputs& in, const Wkv7Steps* steps, const void* saved, const void* dy,
             const float* d_final_state, const Wkv7Gradients& out, float* sums, void* scratch, void* stream) {
    constexpr int C = chunk_tokens(N);
    const Sequences q = sequences_of(shape);
    const Segments segments = segments_of(shape);
    const int count = segments.count * segments.each, parts = parts_of_scan(int64_t(count) * q.H, N, ScanShared<C, N>::size);
    const auto scan = [&](const float* last, float* first) {
        return launch(gradient_scan<C, N, NoSteps>, dim3(count, q.H, parts), N * 2 / parts, ScanShared<C, N>::size, stream, segments,
                      (const bf16*)saved, (const bf16*)dy, last, (bf16*)scratch, first, NoSteps());
    };
    const auto gradients = [&] {
        return launch(chunk_gradients<C, N>, dim3(q.slots<C>(), q.H), C * 4 * column_parts(N), GradientsShared<C, N>::size, stream, q,
                      ChunkInputs(in), (const bf16*)saved, (const bf16*)dy, (const bf16*)scratch, ChunkGradients(out));
    };
    int error;
    if (steps) {
        const Steps p(shape, *steps, in, (char*)saved + records_bytes<SavedChunk>(shape),
                      (char*)scratch + records_bytes<BackwardScratch>(shape));
        error = launch(gradient_scan<C, N, Steps>, dim3(shape.B, q.H), N * 2, scan_bytes<N>(ScanShared<C, N>::size, *steps), stream,
                       segments, (const bf16*)saved, (const bf16*)dy, d_final_state, (bf16*)scratch, out.d_initial_state, p);
        if (!error) error = gradients();
        return error ? error : launch_step_gradients<N>(p, shape, out.da, sums, stream);
    }
    if (segments.each > 1) {
        const SegmentMatrices m(segments, N, (char*)scratch + records_bytes<BackwardScratch>(shape));
        error = scan(nullptr, m.states);
        if (!error)
            error = enter_segments<C, N>(segments, (const bf16*)saved, nullptr, m, d_final_state, out.d_initial_state, true, stream);
        if (!error) error = scan(m.states, nullptr);
    } else {
        error = scan(d_final_state, out.d_initial_state);
    }
    return error ? error : gradients();
}

}  // namespace
}  // namespace wkv7

extern "C" int64_t wkv7_chunked_backward_scratch_bytes(const Wkv7Shape* shape) {
    return wkv7::records_bytes<wkv7::BackwardScratch>(*shape) + wkv7::SegmentMatrices::bytes(*shape);
}

namespace {
int backward(const Wkv7Shape& s, const Wkv7Inputs& in, const Wkv7Steps* steps, const void* saved, const void* dy,
             const float* d_final_state, const Wkv7Gradients& out, float* sums, void* scratch, void* stream) {
    switch (wkv7::valid(s) ? s.N : 0) {
        case 16: return wkv7::backward<16>(s, in, steps, saved, dy, d_final_state, out, sums, scratch, stream);
        case 32: return wkv7::backward<32>(s, in, steps, saved, dy, d_final_state, out, sums, scratch, stream);
        case 64: return wkv7::backward<64>(s, in, steps, saved, dy, d_final_state, out, sums, scratch, stream);
        case 128: return wkv7::backward<128>(s, in, steps, saved, dy, d_final_state, out, sums, scratch, stream);
        default: return WKV7_UNSUPPORTED;
    }
}
}  // namespace

extern "C" int wkv7_chunked_backward(const Wkv7Shape* shape, const Wkv7Inputs* in, const void* saved, const void* dy,
                                     const float* d_final_state, const Wkv7Gradients* out, void* scratch, void* stream) {
    return backward(*shape, *in, nullptr, saved, dy, d_final_state, *out, nullptr, scratch, stream);
}

extern "C" int64_t wkv7_ttt_backward_scratch_bytes(const Wkv7Shape* shape, const Wkv7Steps* steps) {
    return wkv7::records_bytes<wkv7::BackwardScratch>(*shape) + wkv7::Steps::core_bytes(*shape, *steps);
}

extern "C" int wkv7_ttt_backward(const Wkv7Shape* shape, const Wkv7Inputs* in, const Wkv7Steps* steps, const void* saved, const void* dy,
                                 const float* d_final_state, const Wkv7Gradients* out, float* sums, void* scratch, void* stream) {
    if (!wkv7::Steps::valid(*shape, *steps)) return WKV7_UNSUPPORTED;
    return backward(*shape, *in, steps, saved, dy, d_final_state, *out, sums, scratch, stream);
}
