// Matrices for the tensor cores: bf16 tiles in shared memory, fragments and sums in registers, bf16 blocks in global memory.
#pragma once

#include "mma.cuh"

namespace wkv7 {

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }

__device__ __forceinline__ int warp_index() {
#ifdef __CUDACC__
    return __shfl_sync(~0u, int(threadIdx.x / 32), 0);  // the compiler sees that a warp agrees on it
#else
    return threadIdx.x / 32;
#endif
}

// A bf16 matrix in shared memory, row by row. The 16 byte pieces of a row are permuted by the row, so that neither the eight rows that one
// ldmatrix reads, nor a row, nor a fragment of sums that a warp writes, ever meet twice in a bank; nothing is lost to padding.
template <int rows_, int columns_> struct Tile {
    static constexpr int rows = rows_, columns = columns_, pieces = columns / 8, size = rows * columns;
    bf16* base;

    __device__ __forceinline__ bf16* at(int row, int column) const {
        constexpr int rows_per_line = pieces < 8 ? 8 / pieces : 1, mask = (pieces < 8 ? pieces : 8) - 1;  // a line: all 32 banks
        return base + row * columns + ((column / 8 ^ (row / rows_per_line & mask)) * 8 | column % 8);
    }
    __device__ __forceinline__ void put(int row, int column, float x, float y) const {  // column even
        *reinterpret_cast<uint32_t*>(at(row, column)) = pack(x, y);
    }
    __device__ __forceinline__ float2 get(int row, int column) const { return unpack(*reinterpret_cast<const uint32_t*>(at(row, column))); }
};

// 16 rows of fp32 sums over `columns` columns, the d tiles of mma side by side.
template <int columns> using Sums = float[columns / 8][4];
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

// Keeps row >= column + distance (lower) or column >= row + distance (upper). By selection: the dropped sums can be huge.
template <bool lower, int distance, int J> __device__ __forceinline__ void keep_triangle(float (&d)[J][4], int row0) {
    for_pairs(d, row0, [](int row, int column, float& x, float& y) {
        x = (lower ? row - column : column - row) >= distance ? x : 0.f;
        y = (lower ? row - column - 1 : column + 1 - row) >= distance ? y : 0.f;
    });
}

template <int J, class T> __device__ __forceinline__ void store(float (&d)[J][4], const T& tile, int row0) {
    for_pairs(d, row0, [&](int row, int column, float x, float y) { tile.put(row, column, x, y); });
}

// Rows row0.. of a tile as a left factor, or (transposed) its columns row0.. as rows.
template <bool transposed, int K, class T> __device__ __forceinline__ void load_left(uint32_t (&a)[K][4], const T& tile, int row0, Blocks inner) {
    const int lane = lane_index();
#pragma unroll
    for (int k = 0; k < K; ++k)
        if (inner.begin <= k && k < inner.end) {
            if constexpr (transposed)
                ldmatrix<true>(a[k], tile.at(k * 16 + lane % 8 + lane / 16 * 8, row0 + lane / 8 % 2 * 8));
            else
                ldmatrix<false>(a[k], tile.at(row0 + lane % 16, k * 16 + lane / 16 * 8));
        }
}

// Sums rounded to bf16 as a left factor: they stay in their registers.
template <int K> __device__ __forceinline__ void as_left(uint32_t (&a)[K][4], const float (&d)[2 * K][4]) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
        a[k][0] = pack(d[2 * k][0], d[2 * k][1]), a[k][1] = pack(d[2 * k][2], d[2 * k][3]);
        a[k][2] = pack(d[2 * k + 1][0], d[2 * k + 1][1]), a[k][3] = pack(d[2 * k + 1][2], d[2 * k + 1][3]);
    }
}

// d += a B over inner blocks `inner` and column blocks `outer`, where B is the tile, or (transposed) its transpose. The columns of d
// begin at column `column0` of B.
template <bool transposed, int J, int K, class T>
__device__ __forceinline__ void multiply(float (&d)[J][4], const uint32_t (&a)[K][4], const T& tile, Blocks inner, Blocks outer, int column0 = 0) {
    const int lane = lane_index();
#pragma unroll
    for (int k = 0; k < K; ++k)
        if (inner.begin <= k && k < inner.end) {
#pragma unroll
            for (int n = 0; n < J / 2; ++n)
                if (outer.begin <= n && n < outer.end) {
                    uint32_t b[4];
                    if constexpr (transposed)
                        ldmatrix<false>(b, tile.at(column0 + n * 16 + lane % 8 + lane / 16 * 8, k * 16 + lane / 8 % 2 * 8));
                    else
                        ldmatrix<true>(b, tile.at(k * 16 + lane % 16, column0 + n * 16 + lane / 16 * 8));
                    const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
                    mma(d[2 * n], a[k], b0);
                    mma(d[2 * n + 1], a[k], b1);
                }
        }
}

// d = a B^T for a 16 row band of a triangular product: only the wanted blocks are computed, the rest is zero.
template <bool lower, int distance, int J, int K, class T>
__device__ __forceinline__ void triangle(float (&d)[J][4], const uint32_t (&a)[K][4], const T& tile, int block) {
    clear(d);
    multiply<true>(d, a, tile, {0, K}, lower ? Blocks{0, block + 1} : Blocks{block, J / 2});
    keep_triangle<lower, distance>(d, block * 16);
}

// In global memory a bf16 matrix lies in blocks of 8 x 8, 128 bytes each, so that a warp writes and reads a d tile in whole lines.
template <int columns> __device__ __forceinline__ int block_offset(int row, int column) { return (row / 8 * (columns / 8) + column / 8) * 64; }

template <int J> __device__ __forceinline__ void store_blocks(float (&d)[J][4], bf16* matrix, int row0) {
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            *reinterpret_cast<uint32_t*>(matrix + block_offset<J * 8>(row0 + half * 8, j * 8) + lane_index() * 2) = pack(d[j][2 * half], d[j][2 * half + 1]);
}

// A matrix of blocks into a tile, by all threads of the block, asynchronously.
template <class T> __device__ __forceinline__ void copy_blocks(const T& tile, const bf16* matrix) {
    for (int i = threadIdx.x; i < T::size / 8; i += blockDim.x) {
        const int block = i / 8, row = block / T::pieces * 8 + i % 8, column = block % T::pieces * 8;
        copy_async(tile.at(row, column), matrix + i * 8, true);
    }
}

// Tokens (rows of one head, `stride` elements apart) into a tile, zeros behind the last; by all threads, asynchronously.
template <class T> __device__ __forceinline__ void copy_tokens(const T& tile, const bf16* first, int64_t stride, int tokens) {
    for (int i = threadIdx.x; i < T::size / 8; i += blockDim.x) {
        const int row = i / T::pieces, column = i % T::pieces * 8;
        const bool inside = row < tokens;
        copy_async(tile.at(row, column), first + (inside ? row : 0) * stride + column, inside);
    }
}

}  // namespace wkv7
