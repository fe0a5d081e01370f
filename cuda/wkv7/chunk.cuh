// What the chunk-parallel kernels share: the chunk length, what the forward leaves behind, and the tokens of a chunk
// scaled by their decays. The mathematics is derived in RWKV-v7/docs/wkv7_chunked.md; names are those of that document.
#pragma once

#include "tile.cuh"

namespace wkv7 {

// Tokens of a chunk. Those of heads with 128 channels are short: the tiles then fit into the shared memory of every card.
constexpr int chunk_tokens(int N) { return N == 128 ? 32 : 64; }

// Wide matrices are divided into parts of at most 64 columns, a warp for each: more sums would not fit into its registers.
__host__ __device__ constexpr int part_width(int N) { return N < 64 ? N : 64; }
__host__ __device__ constexpr int column_parts(int N) { return N / part_width(N); }

// Blocks with `bytes` of shared memory that fit on a multiprocessor, at most `wanted`: what the registers are divided by.
constexpr int blocks_per_sm(int bytes, int wanted) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ / 100 == 9 || __CUDA_ARCH__ / 100 == 10
    const int fit = 228 * 1024 / (bytes + 1024);
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870
    const int fit = 164 * 1024 / (bytes + 1024);
#else
    const int fit = 100 * 1024 / (bytes + 1024);
#endif
    return fit < 1 ? 1 : fit < wanted ? fit : wanted;
}

struct ChunkInputs {
    const bf16 *r, *w, *k, *v, *a, *b;
    explicit ChunkInputs(const Wkv7Inputs& in)
        : r((const bf16*)in.r), w((const bf16*)in.w), k((const bf16*)in.k), v((const bf16*)in.v), a((const bf16*)in.a),
          b((const bf16*)in.b) {}
};

// A record for each (slot, head): what the forward leaves for the scan and the backward. bf16 matrices in blocks, the decay in fp32.
template <int C, int N> struct SavedChunk {
    static constexpr int64_t F = 0, E = F + N * N, S = E + C * N, X = S + N * N, decay = X + C * C, size = decay + 2 * N;  // in bf16s
};
// H and O, which live from the intra-chunk kernel to the scan; and G, the scaled gradient of the leaving state, in the backward.
template <int C, int N> struct ForwardScratch { static constexpr int64_t H = 0, O = H + N * N, size = O + C * N; };
template <int C, int N> struct BackwardScratch { static constexpr int64_t G = 0, size = N * N; };

// One chunk of one head.
struct Place {
    int64_t record;  // (slot, head)
    int64_t first;   // element offset of token 0, channel 0
    int tokens;      // 1 .. C
    int stride;      // elements from a token to the next
};

// The chunk of sequence s that begins at its token t0.
template <int C, class Q> __device__ __forceinline__ Place place_of(const Q& q, int N, int s, int t0, int head) {
    return {int64_t(q.template first_slot<C>(s) + t0 / C) * q.H + head, (int64_t(q.start(s) + t0) * q.H + head) * N,
            min(C, q.length(s) - t0), q.H * N};
}

// The chunk in `slot`, found by bisection among packed documents; tokens < 1: the slot is empty.
template <int C> __device__ __forceinline__ Place place_in_slot(const Sequences& q, int N, int slot, int head) {
    int low = 0, high = q.count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (q.first_slot<C>(middle) <= slot)
            low = middle;
        else
            high = middle - 1;
    }
    Place place = place_of<C>(q, N, low, (slot - q.first_slot<C>(low)) * C, head);
    if (slot < q.first_slot<C>(low)) place.tokens = 0;  // bounds that fall
    return place;
}

// Elementwise passes: warp w of the `warps` of a part has `rows` tokens of the chunk from w * rows on, lane l channels
// 2 l and 2 l + 1 of the part (none where N < 64 runs out).
template <int C, int N, int warps> struct Columns {
    static_assert(C % warps == 0, "as many tokens for each warp");
    static constexpr int rows = C / warps;
    int warp, part, lane = forgotten_lane();

    __device__ bool active() const { return lane * 2 < N; }
    __device__ int column() const { return part * part_width(N) + lane * 2; }
    __device__ int row() const { return warp * rows; }

    // Two channels of a warp's tokens as they lie in memory, `padding` behind the last token.
    __device__ void load(uint32_t (&to)[rows], const bf16* x, const Place& place, uint32_t padding = 0u) const {
        const uint32_t* const from = reinterpret_cast<const uint32_t*>(x + place.first + int64_t(row()) * place.stride + column());
#pragma unroll
        for (int t = 0; t < rows; ++t) to[t] = active() && row() + t < place.tokens ? from[int64_t(t) * (place.stride / 2)] : padding;
    }

    // Two channels of w whose token does not decay: -infinity. A condition would become a branch, and the sums would
    // wait at each for the sigmoids before it.
    static constexpr uint32_t no_decay = 0xff80ff80u;

    __device__ static float2 add_log_decay(float2 sum, float2 w) {  // to a sum of log2 of decays
        constexpr float scale = decay_scale * 1.4426950408889634f;
        return make_float2(sum.x + scale * sigmoid_fast(w.x), sum.y + scale * sigmoid_fast(w.y));
    }

    // One value per warp and column through totals [warps][N]: the sums over the warps before this one and after it.
    // A barrier inside; the caller puts another before totals is used again.
    __device__ void across_warps(float2 mine, int totals, float2& before, float2& after) const {
        if (active()) shared<float2>(totals + (warp * N + column()) * 4) = mine;
        __syncthreads();
        before = after = make_float2(0.f, 0.f);
        if (active())
#pragma unroll
            for (int i = 0; i < warps; ++i) {
                const float2 x = shared<float2>(totals + (i * N + column()) * 4);
                if (i < warp) before = make_float2(before.x + x.x, before.y + x.y);
                if (i > warp) after = make_float2(after.x + x.x, after.y + x.y);
            }
    }

    // Tiles of the chunk: At = a 2^e, Rt = r 2^g, Bt = b 2^-g, Kt = k 2^-g with g (e) the log2 decay up to and with (without) the token,
    // and decay [N] = 2^g of the whole chunk. The caller's barrier makes them visible.
    template <class T>
    __device__ void scaled_tokens(const ChunkInputs& in, const Place& place, const T& At, const T& Rt, const T& Bt, const T& Kt, int totals,
                                  int decay) const {
        uint32_t r[rows], w[rows], k[rows], a[rows], b[rows];
        float2 g[rows], before, after, total = make_float2(0.f, 0.f);
        load(w, in.w, place, no_decay), load(r, in.r, place), load(k, in.k, place), load(a, in.a, place), load(b, in.b, place);
#pragma unroll
        for (int t = 0; t < rows; ++t) {
            total = g[t] = add_log_decay(total, unpack(w[t]));
        }
        across_warps(total, totals, before, after);
        if (!active()) return;
        float2 e = make_float2(exp2_fast(before.x), exp2_fast(before.y));
#pragma unroll
        for (int t = 0; t < rows; ++t) {
            const float2 sum = make_float2(before.x + g[t].x, before.y + g[t].y);
            const float2 up = make_float2(exp2_fast(sum.x), exp2_fast(sum.y)), down = make_float2(exp2_fast(-sum.x), exp2_fast(-sum.y));
            const float2 at = unpack(a[t]), rt = unpack(r[t]), bt = unpack(b[t]), kt = unpack(k[t]);
            At.put(row() + t, column(), at.x * e.x, at.y * e.y);
            Rt.put(row() + t, column(), rt.x * up.x, rt.y * up.y);
            Bt.put(row() + t, column(), bt.x * down.x, bt.y * down.y);
            Kt.put(row() + t, column(), kt.x * down.x, kt.y * down.y);
            e = up;
        }
        if (warp == warps - 1) shared<float2>(decay + column() * 4) = e;
    }
};

// Multiplies columns by the decays [N] at an offset in shared memory.
template <int J> __device__ __forceinline__ void scale_columns(float (&d)[J][4], int decay) {
    for_pairs(d, 0, [&](int, int column, float& x, float& y) {
        const float2 by = shared<float2>(decay + column * 4);
        x *= by.x, y *= by.y;
    });
}

constexpr int scan_stages = 2;  // chunks of factors that a scan has in flight or in use
constexpr int scan_blocks(int N) { return N == 64 ? 4 : 160 / N; }  // per multiprocessor, wanted

// With few (sequence, head) pairs a scan divides a head's value rows over blocks, to fill the chip: into as many parts
// as run at once there, but no more, for each part reads all of F and E. bytes: of a block's shared memory, of which a
// multiprocessor has 1 KB more than a block may ask for, and each block takes 1 KB more.
inline int parts_of_scan(int64_t pairs, int N, int bytes) {
    const int64_t at_once = int64_t(multiprocessors()) * int((shared_limit() + 1024) / (bytes + 1024));
    int parts = N / 16;
    while (parts > 1 && pairs * parts > at_once) parts /= 2;
    return parts;
}

template <template <int, int> class Record, int N> int64_t records_bytes(const Wkv7Shape& s) {
    constexpr int C = chunk_tokens(N);
    return Record<C, N>::size * int64_t(sizeof(bf16)) * sequences_of(s).slots<C>() * s.H;
}
template <template <int, int> class Record> int64_t records_bytes(const Wkv7Shape& s) {
    switch (s.N) {
        case 16: return records_bytes<Record, 16>(s);
        case 32: return records_bytes<Record, 32>(s);
        case 64: return records_bytes<Record, 64>(s);
        case 128: return records_bytes<Record, 128>(s);
        default: return 0;
    }
}

}  // namespace wkv7
