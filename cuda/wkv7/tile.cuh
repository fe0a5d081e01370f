// Matrices for the tensor cores: bf16 tiles in shared memory, fragments and sums in registers, bf16 blocks in global memory.
#pragma once

#include "mma.cuh"

namespace wkv7 {

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }

__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }

// A value on which all 32 lanes agree, in a form that lets the compiler know. Every lane must come here.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// x, of which the compiler knows nothing any more: addresses made from it are computed anew. Otherwise ptxas keeps
// those of an earlier phase of a kernel in registers that the phases between need, and spills.
__device__ __forceinline__ int forget(int x) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// The lane, of which the compiler knows only that it has five bits.
__device__ __forceinline__ int forgotten_lane() { return forget(lane_index()) & 31; }

// A bf16 matrix in shared memory, row by row. The 16 byte pieces of a row are permuted by the row, so that neither the eight rows that one
// ldmatrix reads, nor a row, nor a fragment of sums that a warp writes, ever meet twice in a bank; nothing is lost to padding.
template <int rows_, int columns_> struct Tile {
    static constexpr int rows = rows_, columns = columns_, pieces = columns / 8, bytes = rows * columns * 2;
    int base;  // byte offset in the block's shared memory: address arithmetic stays in 32 bits

    __device__ __forceinline__ int end() const { return base + bytes; }
    // base is a multiple of a row's bytes, and so stays outside the permutation: what depends on the lane is the same
    // for all tiles, their bases are immediates.
    static __device__ __forceinline__ int offset(int row, int column) {
        constexpr int rows_per_line = pieces < 8 ? 8 / pieces : 1, mask = (pieces < 8 ? pieces : 8) - 1;  // a line: all 32 banks
        const unsigned r = row, c = column;  // never negative: a signed division by a power of two takes four instructions
        return (r * columns * 2 + (r / rows_per_line & mask) * 16 + c % 8 * 2) ^ c / 8 * 16;
    }
    __device__ __forceinline__ int at(int row, int column) const { return base + offset(row, column); }
    // The offset `blocks` times 16 columns to the right of one in the first 16: the permutation is an exclusive or, and so is this.
    static __device__ __forceinline__ int beside(int offset, int blocks) { return offset ^ blocks * 32; }
    // As many times 16 rows below: 16 rows further the permutation is the same.
    static __device__ __forceinline__ int below(int offset, int blocks) { return offset + blocks * 16 * columns * 2; }
    // column: even
    __device__ __forceinline__ void put(int row, int column, float x, float y) const { shared<uint32_t>(at(row, column)) = pack(x, y); }
    __device__ __forceinline__ float2 get(int row, int column) const { return unpack(shared<uint32_t>(at(row, column))); }
};

// A bf16 matrix in shared memory in the 8 x 8 blocks of global memory (block_offset), one behind the other. A matrix
// that ldmatrix reads and a fragment of sums are 128 bytes in a row; rows are not, eight lanes of one meet in a bank.
// For what comes by copy_blocks: the copies of a warp are the same 512 bytes on both sides. To the rows of a Tile each
// 16 bytes went alone, half a sector from the L2 cache and a wavefront each.
template <int rows_, int columns_> struct BlockTile {
    static constexpr int rows = rows_, columns = columns_, pieces = columns / 8, bytes = rows * columns * 2;
    int base;

    __device__ __forceinline__ int end() const { return base + bytes; }
    static __device__ __forceinline__ int offset(int row, int column) {
        const unsigned r = row, c = column;
        return (r / 8 * pieces + c / 8) * 128 + r % 8 * 16 + c % 8 * 2;
    }
    __device__ __forceinline__ int at(int row, int column) const { return base + offset(row, column); }
    static __device__ __forceinline__ int beside(int offset, int blocks) { return offset + blocks * 256; }
    static __device__ __forceinline__ int below(int offset, int blocks) { return offset + blocks * 16 * columns * 2; }
    // column: even
    __device__ __forceinline__ void put(int row, int column, float x, float y) const { shared<uint32_t>(at(row, column)) = pack(x, y); }
    __device__ __forceinline__ float2 get(int row, int column) const { return unpack(shared<uint32_t>(at(row, column))); }
};

// 16 rows of fp32 sums over `columns` columns, the d tiles of mma side by side.
// (Named through a struct: nvcc 12.4 dies of a direct alias.)
template <int columns> struct SumsOf { using type = float[columns / 8][4]; };
template <int columns> using Sums = typename SumsOf<columns>::type;
// 16 rows of a left factor with `inner` columns, the a tiles of mma side by side.
template <int inner> using Left = uint32_t[inner / 16][4];

// Which 16-blocks of a dimension a product visits: the others are known to be zero, or not wanted.
struct Blocks { int begin, end; };

template <int J> __device__ __forceinline__ void clear(float (&d)[J][4]) {
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) d[j][e] = 0.f;
}

// Calls f(row, column, x, y) for each pair of neighbours that this lane holds; rows count from `row0`.
template <int J, class F> __device__ __forceinline__ void for_pairs(float (&d)[J][4], int row0, F f) {
    const int row = row0 + lane_index() / 4, column = lane_index() % 4 * 2;
#pragma unroll
    for (int j = 0; j < J; ++j) {
        f(row, j * 8 + column, d[j][0], d[j][1]);
        f(row + 8, j * 8 + column, d[j][2], d[j][3]);
    }
}

template <int J, class T> __device__ __forceinline__ void store(float (&d)[J][4], const T& tile, int row0, int column0 = 0) {
    for_pairs(d, row0, [&](int row, int column, float x, float y) { tile.put(row, column0 + column, x, y); });
}

// Rows row0.. of a tile as a left factor, or (transposed) its columns row0.. as rows.
template <bool transposed, int K, class T>
__device__ __forceinline__ void load_left(uint32_t (&a)[K][4], const T& tile, int row0, Blocks inner) {
    const int lane = forgotten_lane();
    const int first = transposed ? T::beside(T::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8), row0 / 16)
                                 : T::below(T::offset(lane % 16, lane / 16 * 8), row0 / 16);
#pragma unroll
    for (int k = 0; k < K; ++k)
        if (inner.begin <= k && k < inner.end)
            ldmatrix<transposed>(a[k], tile.base + (transposed ? T::below(first, k) : T::beside(first, k)));
}

// Sums rounded to bf16 as a left factor: they stay in their registers.
__device__ __forceinline__ void as_left(uint32_t (&a)[4], const float (&d)[4], const float (&next)[4]) {
    a[0] = pack(d[0], d[1]), a[1] = pack(d[2], d[3]), a[2] = pack(next[0], next[1]), a[3] = pack(next[2], next[3]);
}
template <int K> __device__ __forceinline__ void as_left(uint32_t (&a)[K][4], const float (&d)[2 * K][4]) {
#pragma unroll
    for (int k = 0; k < K; ++k) as_left(a[k], d[2 * k], d[2 * k + 1]);
}

// d += a B over inner blocks `inner` and column blocks `outer`, where B is the tile, or (transposed) its transpose, for
// M left factors that share what is fetched of it. Column 0 of d is column `column0` of B, a multiple of the columns of
// d; column 0 of a is row `inner0` of B, a multiple of those of a.
template <bool transposed, int M, int J, int K, class T>
__device__ __forceinline__ void multiply(float (&d)[M][J][4], const uint32_t (&a)[M][K][4], const T& tile, Blocks inner, Blocks outer,
                                         int column0 = 0, int inner0 = 0, int lane = lane_index()) {
    const int first = transposed ? T::beside(T::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8), inner0 / 16)
                                 : T::beside(T::offset(lane % 16, lane / 16 * 8), column0 / 16);
    const int start = tile.base + T::below(0, (transposed ? column0 : inner0) / 16);
#pragma unroll
    for (int k = 0; k < K; ++k)
        if (inner.begin <= k && k < inner.end) {
#pragma unroll
            for (int n = 0; n < J / 2; ++n)
                if (outer.begin <= n && n < outer.end) {
                    uint32_t b[4];
                    ldmatrix<!transposed>(b, start + (transposed ? T::below(T::beside(first, k), n) : T::below(T::beside(first, n), k)));
                    const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        mma(d[m][2 * n], a[m][k], b0);
                        mma(d[m][2 * n + 1], a[m][k], b1);
                    }
                }
        }
}
template <bool transposed, int J, int K, class T>
__device__ __forceinline__ void multiply(float (&d)[J][4], const uint32_t (&a)[K][4], const T& tile, Blocks inner, Blocks outer,
                                         int column0 = 0, int inner0 = 0, int lane = lane_index()) {
    multiply<transposed>(reinterpret_cast<float (&)[1][J][4]>(d), reinterpret_cast<const uint32_t (&)[1][K][4]>(a), tile, inner, outer,
                         column0, inner0, lane);
}

template <int K, int J, class T>
__device__ __forceinline__ void multiply_rows(float (&d)[J][4], const uint32_t (&a)[K][4], const T& tile, int column0 = 0) {
    multiply<false>(d, a, tile, {0, K}, {0, J / 2}, column0);
}
template <int K, int J, class T>
__device__ __forceinline__ void multiply_transpose(float (&d)[J][4], const uint32_t (&a)[K][4], const T& tile, int column0 = 0,
                                                   int lane = lane_index()) {
    multiply<true>(d, a, tile, {0, K}, {0, J / 2}, column0, 0, lane);
}

// 16 rows of a tile as a left factor with every use of it: of at most 64 columns kept in registers, else fetched anew each time.
template <class T, bool kept = T::columns <= 64> struct Rows {
    Left<T::columns> a;
    __device__ __forceinline__ Rows(const T& tile, int row0) { load_left<false>(a, tile, row0, {0, T::columns / 16}); }
    __device__ __forceinline__ void fragment(uint32_t (&x)[1][4], int k, int) const {
        for (int i = 0; i < 4; ++i) x[0][i] = a[k][i];
    }
};
template <class T> struct Rows<T, false> {
    T tile;
    int row0;
    __device__ __forceinline__ Rows(const T& tile_, int row0_) : tile(tile_), row0(row0_) {}
    __device__ __forceinline__ void fragment(uint32_t (&x)[1][4], int k, int lane) const {
        ldmatrix<false>(x[0], tile.base + T::below(T::beside(T::offset(lane % 16, lane / 16 * 8), k), row0 / 16));
    }
};
template <class R, bool kept, int J, class T>
__device__ __forceinline__ void multiply_transpose(float (&d)[J][4], const Rows<R, kept>& rows, const T& tile, int column0 = 0,
                                                   int lane = lane_index()) {
#pragma unroll
    for (int k = 0; k < R::columns / 16; ++k) {
        uint32_t a[1][4];
        rows.fragment(a, k, lane);
        multiply<true>(d, a, tile, {0, 1}, {0, J / 2}, column0, k * 16, lane);
    }
}

// Of a 16 x 16 block on the diagonal keeps the elements with row >= column + distance (lower) or
// column >= row + distance (upper). By selection and not by multiplication: what is dropped can be huge.
template <bool lower> __device__ __forceinline__ void keep_triangle(float (&d)[2][4], int distance, int lane) {
    const int corner = lane / 4 - lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int below = corner + i / 2 % 2 * 8 - i / 4 * 8 - i % 2;  // row - column
        float& x = d[i / 4][i % 4];
        x = (lower ? below : -below) >= distance ? x : 0.f;
    }
}

// One 16 x 16 block of a B^T, rows `row` and columns `column` (in blocks) of a triangular C x C matrix; a holds the 16 rows.
template <bool lower, class A, class T>
__device__ __forceinline__ void triangle_block(float (&d)[2][4], const A& a, const T& B, int row, int column, int distance,
                                               int lane = lane_index()) {
    clear(d);
    multiply_transpose(d, a, B, column * 16, lane);
    if (row == column) keep_triangle<lower>(d, distance, lane);  // the other blocks that are visited lie inside
}

// d += triangle(a B^T) D for 16 rows, block after block: the triangular matrix passes from sums to factors within the registers.
template <bool lower, int J, class A, class T, class U>
__device__ __forceinline__ void multiply_triangle(float (&d)[J][4], const A& a, const T& B, int distance, const U& D, int row,
                                                  int column0 = 0) {
    constexpr int n = T::rows / 16;
    const int lane = forgotten_lane();
#pragma unroll 1
    for (int i = lower ? 0 : row; i < (lower ? row + 1 : n); ++i) {
        float t[2][4];
        uint32_t left[1][4];
        triangle_block<lower>(t, a, B, row, i, distance, lane);
        as_left(left, t);
        multiply<false>(d, left, D, {0, 1}, {0, J / 2}, column0, i * 16, lane);
    }
}

// d += triangle(a B0^T) D0 + triangle(a B1^T) D1, a block of each at a time: an mma waits long for the sums of the one
// before it, and so four chains of them run side by side instead of two.
template <bool lower, int J, class A, class T, class U0, class U1>
__device__ __forceinline__ void multiply_triangles(float (&d)[J][4], const A& a, const T& B0, int distance0, const U0& D0, const T& B1,
                                                   int distance1, const U1& D1, int row, int column0 = 0) {
    constexpr int n = T::rows / 16;
    const int lane = forgotten_lane();
#pragma unroll 1
    for (int i = lower ? 0 : row; i < (lower ? row + 1 : n); ++i) {
        float t[2][2][4];
        uint32_t left[2][1][4];
        clear(t[0]), clear(t[1]);
        multiply_transpose(t[0], a, B0, i * 16, lane);
        multiply_transpose(t[1], a, B1, i * 16, lane);
        if (i == row) {
            const int here = forgotten_lane();  // or else the masks are kept in registers from before the loop
            keep_triangle<lower>(t[0], distance0, here), keep_triangle<lower>(t[1], distance1, here);
        }
        as_left(left[0], t[0]), as_left(left[1], t[1]);
        multiply<false>(d, left[0], D0, {0, 1}, {0, J / 2}, column0, i * 16, lane);
        multiply<false>(d, left[1], D1, {0, 1}, {0, J / 2}, column0, i * 16, lane);
    }
}

// Block i of d[0] += triangle(a0 B^T) D and d[1] += triangle(a1 B^T) D, likewise; what is fetched of B and D serves both.
template <int J, class A0, class A1, class T, class U>
__device__ __forceinline__ void multiply_block_of_both(float (&d)[2][J][4], const A0& a0, int distance0, const A1& a1, int distance1,
                                                       bool lower, const T& B, const U& D, int row, int i, int column0, int lane) {
    float t[2][2][4];
    uint32_t left[2][1][4];
    clear(t[0]), clear(t[1]);
#pragma unroll
    for (int k = 0; k < T::columns / 16; ++k) {
        a0.fragment(left[0], k, lane), a1.fragment(left[1], k, lane);
        multiply<true>(t, left, B, {0, 1}, {0, 1}, i * 16, k * 16, lane);
    }
    if (i == row) {
        const int here = forgotten_lane();
        if (lower)
            keep_triangle<true>(t[0], distance0, here), keep_triangle<true>(t[1], distance1, here);
        else
            keep_triangle<false>(t[0], distance0, here), keep_triangle<false>(t[1], distance1, here);
    }
    as_left(left[0], t[0]), as_left(left[1], t[1]);
    multiply<false>(d, left, D, {0, 1}, {0, J / 2}, column0, i * 16, lane);
}

// In global memory a bf16 matrix lies in blocks of 8 x 8, 128 bytes each, so that a warp writes and reads a d tile in whole lines.
template <int columns>
__device__ __forceinline__ int block_offset(unsigned row, unsigned column) {
    return (row / 8 * (columns / 8) + column / 8) * 64;
}

// Sums into rows row0.. and columns column0.. of a matrix with `columns` of them.
template <int columns, int J> __device__ __forceinline__ void store_blocks(float (&d)[J][4], bf16* matrix, int row0, int column0) {
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            *reinterpret_cast<uint32_t*>(matrix + block_offset<columns>(row0 + half * 8, column0 + j * 8) + lane_index() * 2) =
                pack(d[j][2 * half], d[j][2 * half + 1]);
}
template <int J>
__device__ __forceinline__ void store_blocks(float (&d)[J][4], bf16* matrix, int row0) {
    store_blocks<J * 8>(d, matrix, row0, 0);
}

// Calls f(i) for i = 0 .. count - 1, each by another thread of the block. A number of `threads` that is known to the
// compiler saves most of the address arithmetic; 0: it is not.
template <int count, int threads, class F> __device__ __forceinline__ void for_threads(F f) {
    if constexpr (threads) {
#pragma unroll
        for (unsigned k = 0; k < (count + threads - 1) / threads; ++k)
            if (count % threads == 0 || threadIdx.x + k * threads < count) f(threadIdx.x + k * threads);
    } else {
        for (unsigned i = threadIdx.x; i < count; i += blockDim.x) f(i);
    }
}

// A matrix of blocks into a tile, by all threads of the block, asynchronously.
template <int threads = 0, int rows, int columns>
__device__ __forceinline__ void copy_blocks(const BlockTile<rows, columns>& tile, const bf16* matrix) {
    for_threads<rows * columns / 8, threads>([&](unsigned i) { copy_async(tile.base + i * 16, matrix + i * 8, true); });
}

// Tokens (rows of one head, `stride` elements apart) into a tile, zeros behind the last; by all threads, asynchronously.
template <int threads = 0, class T>
__device__ __forceinline__ void copy_tokens(const T& tile, const bf16* first, int64_t stride, int tokens) {
    for_threads<T::bytes / 16, threads>([&](unsigned i) {
        const int row = i / T::pieces, column = i % T::pieces * 8;
        const bool inside = row < tokens;
        copy_async(tile.at(row, column), first + (inside ? row : 0) * stride + column, inside);
    });
}

}  // namespace wkv7
