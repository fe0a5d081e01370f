// Head and cross entropy on the CPU: logits, softmax and both gradients of a chunk of tokens, at the speed of the matrix products.
//
// Everything is held transposed, [vocabulary, tokens]: SIMD lanes are tokens, so that softmax needs no horizontal sums, the
// weight is a left operand as it lies in memory, and one packed right operand, x, serves the whole vocabulary.
//
// Pass 1, over blocks of the vocabulary, while a block's logits are in the cache:
//     e = exp(logit - m), summed over the vocabulary;  dX += e^T W
// with m the logit of the token's own target: nothing needs the largest logit in advance, no sum is ever rescaled, and the
// loss is log(sum e). Should a logit exceed m by more than 60 nats, e might overflow: the chunk is done again with m = its maximum.
// Pass 2: dW += e (x / sum e), with the e that pass 1 has kept in memory, of as many chunks as kKept allows: while these pass by, a block
// of dW stays in the cache. bf16 adds up more chunks than that in fp32, in memory.
//
// The entries of the targets (softmax - 1) and of L2Wrap at each arg-max are left out of e and added in fp32: rounded to bf16
// they would drown. The result does not depend on the number of threads: partial sums belong to fixed parts of the vocabulary.
#include "head_ce.h"

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../common/isa.h"
#include "../common/parallel.h"
#include "cpu.h"

namespace {

using at::native::cpublas::brgemm;
using at::native::cpublas::brgemm_release;
using loss::Kernels;
using loss::Problem;
using loss::Totals;

constexpr int64_t kRows = 32;       // rows per matrix product: the fastest with AMX
constexpr int64_t kColumns = 1024;  // columns per matrix product, so that the right operand stays in the cache
constexpr int64_t kBlock = 256;     // rows of the vocabulary that pass 1 takes at a time: the depth of its products for dX
constexpr int64_t kParts = 16;      // of the vocabulary, with partial sums of their own
constexpr int64_t kKept = 128 << 20;  // bytes of e that are kept, unless a single chunk has more
constexpr float kOverflow = 60;     // nats

Kernels kernels_for(bool is_bf16) {
  return OF_ISA_IN_USE(loss::kernels, is_bf16);
}

// Uninitialised memory on cache lines.
template <class T>
struct Buffer {
  std::unique_ptr<T, decltype(&std::free)> memory{nullptr, &std::free};
  explicit Buffer(int64_t count = 0) {
    if (count == 0) return;
    memory.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
    if (!memory) throw std::bad_alloc();
  }
  operator T*() const { return memory.get(); }
};

// What is added to the gradient of one logit: at a token's target, or at its arg-max.
struct Entry {
  int64_t row, token;
  float value;
  bool operator<(const Entry& other) const { return row != other.row ? row < other.row : token < other.token; }
};

// Calls see(row - first, token, value) for the entries, which are sorted, of rows first .. first + rows - 1.
template <class See>
void for_rows(const std::vector<Entry>& entries, int64_t first, int64_t rows, const See& see) {
  auto entry = std::lower_bound(entries.begin(), entries.end(), Entry{first, 0, 0});
  for (; entry != entries.end() && entry->row < first + rows; ++entry) see(entry->row - first, entry->token, entry->value);
}

struct Chunk {
  int64_t begin, count;                                      // tokens
  std::vector<float> m, target_logit, scale;                 // [width]; scale = 1 / (sum e * all tokens)
  std::vector<Entry> targets;                                // sorted; tokens counted from `begin`
  Buffer<uint32_t> x, scaled_x;                              // right operands [C / pair, width], [width / pair, C]
  uint32_t* e;                                               // kept from pass 1 for pass 2, as a right operand [V / pair, width]; or null
};

template <class T>
class Head {
  static constexpr int64_t pair = 4 / sizeof(T);

  const Problem& p;
  const Kernels simd = kernels_for(pair == 2);
  const int64_t n = p.n, V = p.V, C = p.C;
  const int64_t width = (std::min(p.chunk, n) + 31) / 32 * 32;  // tokens of a chunk
  const int64_t stride = width + 16;                            // of logits; a power of two would crowd one cache set
  const int64_t blocks = (V + kBlock - 1) / kBlock, parts = std::min(kParts, blocks);
  const T *const x = static_cast<const T*>(p.x), *const weight = static_cast<const T*>(p.weight);
  T *const dx = static_cast<T*>(p.dx), *const dw = static_cast<T*>(p.dw);

  Buffer<float> sums{parts * width}, tops{parts * width};
  Buffer<int32_t> top_rows{parts * width};
  Buffer<float> dx_sums{dx ? parts * C * width : 0};
  const int64_t units = (V + pair - 1) / pair * width;  // of e of a chunk
  const int64_t group = std::clamp<int64_t>(kKept / (4 * units), 1, (n + p.chunk - 1) / p.chunk);  // chunks whose e is kept
  Buffer<uint32_t> kept{dw ? group * units : 0};
  Buffer<float> dw_sums{dw && pair == 2 && n > group * p.chunk ? V * C : 0};
  std::vector<Chunk> chunks;   // of one group
  std::vector<Entry> entries;  // of their tokens

 public:
  explicit Head(const Problem& problem) : p(problem) {}

  double run() {
    double loss = 0;
    for (int64_t begin = 0; begin < n; begin += p.chunk) {
      uint32_t* e = dw ? kept + int64_t(chunks.size()) * units : nullptr;
      Chunk& chunk = chunks.emplace_back();
      chunk.begin = begin, chunk.count = std::min(p.chunk, n - begin), chunk.e = e;
      prepare(chunk);
      pass_1(chunk);
      if (!in_range(chunk)) pass_1(chunk);
      loss += finish(chunk);
      if (dx) write_dx(chunk);
      if (begin + p.chunk < n && int64_t(chunks.size()) < group) continue;
      if (dw) pass_2();
      chunks.clear(), entries.clear();
    }
    return loss / n;
  }

 private:
  // C [rows, columns] (+)= A [rows, depth] B; strides of A and C in elements, of B in units.
  static void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_stride, const uint32_t* b, int64_t b_stride,
                       float* c, int64_t c_stride, bool add) {
    for (int64_t j = 0; j < columns; j += kColumns)
      for (int64_t i = 0; i < rows; i += kRows)
        brgemm(std::min(kRows, rows - i), std::min(kColumns, columns - j), depth, a_stride, b_stride, c_stride, add, a + i * a_stride,
               reinterpret_cast<const T*>(b + j), c + i * c_stride + j, pair == 2);
  }

  loss::Logits logits(const Chunk& chunk, int64_t row, int64_t rows, float* tile) const {
    const T* w = weight + row * C;
    multiply(rows, width, C, w, C, chunk.x, width, tile, stride, false);
    const int64_t ahead = std::min(rows, V - row - rows) * C * int64_t(sizeof(T));
    return {tile, stride, row, rows, width, chunk.m.data(), reinterpret_cast<const char*>(w + rows * C), ahead};
  }

  // Packs x, and takes each token's own target logit as its m.
  void prepare(Chunk& chunk) const {
    const T* rows = x + chunk.begin * C;
    chunk.x = Buffer<uint32_t>(C / pair * width);
    if (chunk.count < width) std::memset(chunk.x, 0, C / pair * width * 4);
    simd.transpose(rows, C / pair, chunk.count, C / pair, chunk.x, width);
    chunk.m.assign(width, 0);
    chunk.scale.assign(width, 0);
    for (int64_t i = 0; i < chunk.count; i++) {
      const int64_t target = p.targets[chunk.begin + i];
      chunk.m[i] = simd.dot(rows + i * C, weight + target * C, C);
      chunk.targets.push_back({target, i, 0});
    }
    chunk.target_logit = chunk.m;
    std::sort(chunk.targets.begin(), chunk.targets.end());
  }

  void pass_1(const Chunk& chunk) const {
    in_parallel(parts, [&](const auto& next) {
      Buffer<float> tile(kRows * stride);
      Buffer<uint32_t> local(dx && !chunk.e ? kBlock / pair * width : 0), turned(dx ? C * kBlock / pair : 0);
      for (int64_t part; next(part);) {
        const Totals totals{sums + part * width, tops + part * width, top_rows + part * width};
        std::fill_n(totals.sum, width, 0.0f);
        std::fill_n(totals.top, width, -INFINITY);
        std::fill_n(totals.top_row, width, 0);
        const int64_t begin = blocks * part / parts, end = blocks * (part + 1) / parts;
        for (int64_t block = begin; block < end; block++) {
          const int64_t row = block * kBlock, rows = std::min(kBlock, V - row);
          uint32_t* const e = chunk.e ? chunk.e + row / pair * width : local;
          for (int64_t r = 0; r < rows; r += kRows)
            simd.softmax(logits(chunk, row + r, std::min(kRows, rows - r), tile), totals, e ? e + r / pair * width : nullptr);
          if (!e) continue;
          for_rows(chunk.targets, row, rows, [&](int64_t r, int64_t token, float) {
            reinterpret_cast<T*>(e)[(r / pair * width + token) * pair + r % pair] = T{};
          });
          if (!dx) continue;
          simd.turn(weight + row * C, rows, C, turned, kBlock / pair);
          multiply(C, width, (rows + pair - 1) / pair * pair, reinterpret_cast<const T*>(static_cast<uint32_t*>(turned)), kBlock, e, width,
                   dx_sums + part * C * width, width, block > begin);
        }
      }
      brgemm_release(pair == 2);
    });
  }

  // False if a token's m was too low for exp; then m becomes its maximum.
  bool in_range(Chunk& chunk) const {
    bool good = true;
    for (int64_t part = 0; part < parts; part++)
      for (int64_t i = 0; i < chunk.count; i++) {
        const float top = tops[part * width + i];
        if (top - chunk.target_logit[i] > kOverflow) chunk.m[i] = std::max(chunk.m[i], top), good = false;
      }
    return good;
  }

  // Sum of the chunk's losses; its scales, and its entries, two of each token in order.
  double finish(Chunk& chunk) {
    double loss = 0;
    for (int64_t i = 0; i < chunk.count; i++) {
      double sum = 0;
      int64_t best = i;
      for (int64_t at = i; at < parts * width; at += width) {
        sum += sums[at];
        if (tops[at] > tops[best]) best = at;
      }
      const double own = std::log(sum) + chunk.m[i] - chunk.target_logit[i];
      loss += own;
      if (p.nats) p.nats[chunk.begin + i] = own;
      if (p.likeliest) p.likeliest[chunk.begin + i] = top_rows[best];
      chunk.scale[i] = float(1 / (sum * n));
      entries.push_back({p.targets[chunk.begin + i], chunk.begin + i, float(std::expm1(-own) / n)});
      entries.push_back({top_rows[best], chunk.begin + i, p.l2wrap / n * tops[best]});
    }
    return loss;
  }

  void write_dx(const Chunk& chunk) const {
    const Entry* own = entries.data() + entries.size() - 2 * chunk.count;
    in_parallel((chunk.count + simd.lanes - 1) / simd.lanes, [&](const auto& next) {
      Buffer<float> rows(simd.lanes * C);
      for (int64_t group; next(group);) {
        const int64_t i = group * simd.lanes;
        simd.collect(dx_sums + i, parts, C * width, C, width, chunk.scale.data() + i, rows);
        for (int64_t j = 0; j < std::min(simd.lanes, chunk.count - i); j++) {
          for (const Entry* entry = own + 2 * (i + j); entry < own + 2 * (i + j + 1); entry++)
            simd.add_scaled(rows + j * C, weight + entry->row * C, entry->value, C);
          simd.narrow(rows + j * C, dx + (chunk.begin + i + j) * C, C);
        }
      }
    });
  }

  // Adds what this group gives to dW.
  void pass_2() {
    for (Chunk& chunk : chunks) {
      chunk.scaled_x = Buffer<uint32_t>(width / pair * C);
      for (int64_t i = 0; i < width; i += pair)
        simd.scale_rows(x + (chunk.begin + i) * C, chunk.count - i, C, chunk.scale.data() + i, chunk.scaled_x + i / pair * C);
    }
    std::sort(entries.begin(), entries.end());
    const bool last = chunks.back().begin + p.chunk >= n;
    // Rows whose dW stays in the cache while the chunks pass by: few, if all chunks of x stay there as well.
    const int64_t all_x = int64_t(chunks.size()) * width * C * 2 * int64_t(sizeof(T));
    const int64_t block = all_x <= (5 << 18) ? kRows : std::max(kRows, (1 << 17) / C / kRows * kRows);
    in_parallel((V + block - 1) / block, [&](const auto& next) {
      Buffer<float> local(pair == 2 && !dw_sums ? block * C : 0);
      Buffer<T> left(pair == 2 ? kRows * width : 0);
      for (int64_t i; next(i);) {
        const int64_t row = i * block, rows = std::min(block, V - row);
        float* sum = dw_sums ? dw_sums + row * C : local;
        if constexpr (pair == 1) sum = dw + row * C;
        for (const Chunk& chunk : chunks)
          for (int64_t r = 0; r < rows; r += kRows) {
            const int64_t here = std::min(kRows, rows - r);
            const uint32_t* e = chunk.e + (row + r) / pair * width;
            if constexpr (pair == 2) simd.split(e, here, width, left);
            multiply(here, C, width, left ? left : reinterpret_cast<const T*>(e), width, chunk.scaled_x, C, sum + r * C, C,
                     chunk.begin > 0);
          }
        for_rows(entries, row, rows, [&](int64_t r, int64_t token, float value) { simd.add_scaled(sum + r * C, x + token * C, value, C); });
        if (pair == 2 && last) simd.narrow(sum, dw + row * C, rows * C);
      }
      brgemm_release(pair == 2);
    });
  }
};

}  // namespace

namespace loss {

double head_ce(const Problem& problem) {
  return problem.is_bf16 ? Head<at::BFloat16>(problem).run() : Head<float>(problem).run();
}

bool head_ce_supported(bool is_bf16) {
  float a[16 * 16] = {}, b[16 * 16] = {}, c[16 * 16];
  try {
    if (is_bf16)
      brgemm(16, 16, 16, 16, 16, 16, false, reinterpret_cast<at::BFloat16*>(a), reinterpret_cast<at::BFloat16*>(b), c, true);
    else
      brgemm(16, 16, 16, 16, 16, 16, false, a, b, c, false);
    brgemm_release(is_bf16);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace loss
