// Head and cross entropy on the CPU, bf16 or fp32: logits, softmax and all gradients of a chunk of tokens in two passes over
// the vocabulary, at the speed of its three matrix products.
//
// Everything is held transposed, [vocabulary, tokens]: SIMD lanes are tokens, so that softmax needs no horizontal sums, the
// weight is a left operand as it lies in memory, and the packed right operand (x) is shared by all blocks of the vocabulary.
//
// Pass 1, over blocks of the vocabulary, while a block's logits are in the cache:
//     e = exp(logit - m), summed over the vocabulary; dX += e W
// with m the logit of the token's own target, so that nothing needs the row's maximum in advance, the loss is log(sum e), and
// the sums are final without rescaling. Should a logit exceed m by more than 60 nats (e might overflow later on), the chunk is
// done again with m = its maximum. e is kept, in the dtype of the products.
// Pass 2: dW += e^T (x / sum), in fp32.
//
// The entries of the target (softmax - 1) and of L2Wrap at the arg-max are left out of the matrix and added in fp32: in bf16
// they would drown in the rounding of their neighbours. The result does not depend on the number of threads: partial sums
// belong to fixed segments of the vocabulary.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kLanes = 16;     // fp32 lanes of a vector
constexpr int64_t kBlock = 128;    // rows of the vocabulary whose logits are in the cache at a time
constexpr int64_t kRows = 32;      // rows per matrix product: the fastest with AMX
constexpr int64_t kColumns = 1024; // columns per matrix product, so that its right operand stays in the cache
constexpr int64_t kParts = 16;     // of the vocabulary, with partial sums of their own
constexpr float kOverflow = 60;    // nats

using floats = float __attribute__((vector_size(64)));
using ints = int32_t __attribute__((vector_size(64)));
using units = uint32_t __attribute__((vector_size(64)));

template <typename V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V>
inline void store(void* p, const V& v) {
  std::memcpy(p, &v, sizeof v);
}

inline float to_float(float v) { return v; }
inline float to_float(at::BFloat16 v) { return v; }

// exp for z <= 88; Cephes' polynomial, relative error 2e-7. NaN stays NaN.
inline floats exponential(floats z) {
  z = z < -87.0f ? floats{} - 87.0f : z;
  const floats shifted = z * 1.44269504088896341f + 12582912.0f; // the integer lands in the low bits
  const floats n = shifted - 12582912.0f;
  const floats f = z - n * 0.693359375f - n * -2.12194440e-4f;
  floats p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
  return (floats)((ints)p + ((ints)shifted << 23));
}

// The same to a relative error of 1e-4.
inline floats rough_exponential(floats z) {
  z = z < -87.0f ? floats{} - 87.0f : z;
  z = z * 1.44269504088896341f;
  const floats shifted = z + 12582912.0f;
  const floats f = z - (shifted - 12582912.0f);
  floats p = f * 0.05517167f + 0.24261114f;
  p = p * f + 0.69326099f;
  p = p * f + 0.99992807f;
  return (floats)((ints)p + ((ints)shifted << 23));
}

// Bits of bf16 in the upper half, rounded to nearest.
inline units round_bf16(floats v) { return (units)v + 0x8000u; }

// A matrix of 32-bit units, transposed: to[c][r] = from[r][c].
void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      if (r + kLanes > rows || c + kLanes > columns) {
        for (int64_t i = r; i < std::min(rows, r + kLanes); ++i)
          for (int64_t j = c; j < std::min(columns, c + kLanes); ++j)
            to[j * to_stride + i] = from[i * from_stride + j];
        continue;
      }
      units a[16], b[16];
      for (int i = 0; i < 16; ++i)
        a[i] = load<units>(from + (r + i) * from_stride + c);
      // Four rounds; each interleaves row i with row i + 8, which rotates one bit of the row number into the column number.
      const units low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
      const units high = low + 8u;
      for (int round = 0; round < 2; ++round) {
        for (int i = 0; i < 8; ++i) {
          b[2 * i] = __builtin_shuffle(a[i], a[i + 8], low);
          b[2 * i + 1] = __builtin_shuffle(a[i], a[i + 8], high);
        }
        for (int i = 0; i < 8; ++i) {
          a[2 * i] = __builtin_shuffle(b[i], b[i + 8], low);
          a[2 * i + 1] = __builtin_shuffle(b[i], b[i + 8], high);
        }
      }
      for (int i = 0; i < 16; ++i)
        store(to + (c + i) * to_stride + r, a[i]);
    }
}

// to[r][c] = the pair (from[2r][c], from[2r+1][c]): the order in which the bf16 products read their right operand.
void interleave(const at::BFloat16* from, int64_t stride, uint32_t* to, int64_t rows, int64_t columns) {
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  for (int64_t r = 0; r < rows; r += 2) {
    const uint16_t* even = bits + r * stride;
    const uint16_t* odd = even + stride;
    uint32_t* out = to + r / 2 * columns;
    if (r + 1 < rows)
      for (int64_t c = 0; c < columns; ++c)
        out[c] = even[c] | uint32_t(odd[c]) << 16;
    else
      for (int64_t c = 0; c < columns; ++c)
        out[c] = even[c];
  }
}

// C [rows, columns] (+)= A [rows, depth] B, B packed as [depth / pair, b_stride] units.
template <typename T>
void multiply(
    int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, float* c,
    int64_t c_stride, bool add) {
  constexpr bool paired = sizeof(T) == 2;
  for (int64_t j = 0; j < columns; j += kColumns)
    for (int64_t i = 0; i < rows; i += kRows)
      at::native::cpublas::brgemm(
          std::min(kRows, rows - i), std::min(kColumns, columns - j), depth, a_stride, b_stride, c_stride, add, a + i * a_stride,
          reinterpret_cast<const T*>(b + j), c + i * c_stride + j, paired);
}

// A row of a token's own: its target, or its arg-max, with what is added to the gradient of that logit.
struct Entry {
  int64_t row, token;
  float value;
  bool operator<(const Entry& other) const { return row != other.row ? row < other.row : token < other.token; }
};

// Tokens whose logits are in the cache at a time.
struct Chunk {
  int64_t begin, count;
  std::vector<float> m, target_logit, scale; // scale = 1 / (sum e * all tokens)
  std::vector<Entry> targets;                // sorted by row; tokens counted from `begin`
  at::Tensor x;                              // [C / pair, width] units
  at::Tensor scaled_x;                       // x * scale, [width / pair, C] units
};

template <typename T>
class Head {
  static constexpr int64_t pair = 4 / sizeof(T); // elements in a 32-bit unit
  // bf16 products are so fast that computing e again in pass 2 is cheaper than writing it to memory and reading it back.
  static constexpr bool again = sizeof(T) == 2;

  const at::Tensor &x_, &weight_, &targets_;
  const int64_t n, V, C;
  const int64_t width; // tokens of a chunk, rounded up to whole vectors
  const float l2wrap;
  const bool need_dx, need_dw;
  const int64_t blocks, parts; // of the vocabulary
  const T *const x, *const weight;
  at::Tensor dx, dw;
  at::Tensor scores;               // e of one chunk, [V, width], where it is kept
  at::Tensor sums, tops, top_rows; // [parts, width]
  at::Tensor dx_sums;              // [parts, C, width]
  std::vector<Entry> entries;      // sorted by row; tokens counted from 0

 public:
  Head(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& targets, int64_t chunk, double l2wrap, bool need_dx, bool need_dw)
      : x_(x), weight_(weight), targets_(targets), n(x.size(0)), V(weight.size(0)), C(weight.size(1)),
        width((std::min(chunk, n) + 31) / 32 * 32), l2wrap(l2wrap), need_dx(need_dx), need_dw(need_dw),
        blocks((V + kBlock - 1) / kBlock), parts(std::min(kParts, blocks)), x(pointer<T>(x)), weight(pointer<T>(weight)) {
    const auto fp32 = x.options().dtype(at::kFloat);
    dx = at::empty({need_dx ? n : 0, C}, x.options());
    dw = at::empty({need_dw ? V : 0, C}, x.options());
    sums = at::empty({parts, width}, fp32);
    tops = at::empty({parts, width}, fp32);
    top_rows = at::empty({parts, width}, x.options().dtype(at::kInt));
    if (need_dx)
      dx_sums = at::empty({parts, C, width}, fp32);
    if (need_dw && !again)
      scores = at::empty({V, width}, x.options());
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor> run(int64_t size) {
    double loss = 0;
    std::vector<Chunk> chunks;
    for (int64_t begin = 0; begin < n; begin += size) {
      chunks.push_back({begin, std::min(size, n - begin)});
      Chunk& chunk = chunks.back();
      prepare(chunk);
      exponentiate(chunk);
      if (!in_range(chunk))
        exponentiate(chunk);
      loss += finish(chunk);
      if (need_dx)
        write_dx(chunk);
      if (need_dw)
        pack_scaled(chunk);
      if (need_dw && (!again || begin + size >= n)) {
        add_dw(chunks);
        entries.clear();
      }
      if (!need_dw || !again)
        chunks.clear(), entries.clear();
    }
    return {at::scalar_tensor(loss / n, x_.options().dtype(at::kFloat)), dx, dw};
  }

 private:
  template <typename P>
  static P* pointer(const at::Tensor& t) { return reinterpret_cast<P*>(t.data_ptr()); }

  // Packs x, and takes each token's own target logit as its m.
  void prepare(Chunk& chunk) {
    const T* from = x + chunk.begin * C;
    chunk.x = at::empty({C / pair, width}, x_.options().dtype(at::kInt));
    if (chunk.count < width)
      chunk.x.zero_();
    transpose(reinterpret_cast<const uint32_t*>(from), C / pair, pointer<uint32_t>(chunk.x), width, chunk.count, C / pair);
    chunk.m.assign(width, 0);
    chunk.scale.assign(width, 0);
    const int64_t* target = targets_.const_data_ptr<int64_t>() + chunk.begin;
    for (int64_t i = 0; i < chunk.count; ++i) {
      const T *a = from + i * C, *b = weight + target[i] * C;
      float dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t c = 0; c < C; ++c)
        dot += to_float(a[c]) * to_float(b[c]);
      chunk.m[i] = dot;
      chunk.targets.push_back({target[i], i, 0});
    }
    chunk.target_logit = chunk.m;
    std::sort(chunk.targets.begin(), chunk.targets.end());
  }

  // Pass 1.
  void exponentiate(const Chunk& chunk) {
    at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      const int64_t stride = width + kLanes; // not a power of two: columns would share a cache set
      std::vector<float> tile(kBlock * stride);
      std::vector<uint32_t> right(need_dx && pair == 2 ? kBlock / pair * width : 0); // e packed
      std::vector<uint32_t> paired(need_dx && pair == 2 ? kBlock / pair * C : 0);
      std::vector<T> turned(need_dx ? C * kBlock : 0); // the block of the weight, transposed
      for (int64_t part = first; part < last; ++part) {
        float* sum = pointer<float>(sums) + part * width;
        float* top = pointer<float>(tops) + part * width;
        int32_t* top_row = pointer<int32_t>(top_rows) + part * width;
        std::fill(sum, sum + width, 0.0f);
        std::fill(top, top + width, -INFINITY);
        std::fill(top_row, top_row + width, 0);
        const int64_t begin = blocks * part / parts;
        for (int64_t block = begin; block < blocks * (part + 1) / parts; ++block) {
          const int64_t row = block * kBlock, rows = std::min(kBlock, V - row);
          const T* w = weight + row * C;
          for (int64_t r = 0; r < rows; r += kRows) {
            const int64_t here = std::min(kRows, rows - r);
            float* logits = tile.data() + r * stride;
            multiply<T>(here, width, C, w + r * C, C, pointer<uint32_t>(chunk.x), width, logits, stride, false);
            softmax(chunk, logits, stride, row + r, here, sum, top, top_row);
          }
          if (!need_dx && !scores.defined())
            continue;
          clear_targets(chunk, row, rows, tile.data(), stride);
          if (scores.defined())
            for (int64_t r = 0; r < rows; ++r)
              std::memcpy(pointer<T>(scores) + (row + r) * width, tile.data() + r * stride, width * sizeof(T));
          if (!need_dx)
            continue;
          float* to = pointer<float>(dx_sums) + part * C * width;
          auto* left = reinterpret_cast<uint32_t*>(turned.data());
          if constexpr (pair == 2) {
            pack(tile.data(), stride, rows, right.data());
            interleave(w, C, paired.data(), rows, C);
            transpose(paired.data(), C, left, kBlock / 2, (rows + 1) / 2, C);
            multiply<T>(C, width, (rows + 1) / 2 * 2, turned.data(), kBlock, right.data(), width, to, width, block > begin);
          } else {
            transpose(reinterpret_cast<const uint32_t*>(w), C, left, kBlock, rows, C);
            const auto* e = reinterpret_cast<uint32_t*>(tile.data());
            multiply<T>(C, width, rows, turned.data(), kBlock, e, stride, to, width, block > begin);
          }
        }
      }
      at::native::cpublas::brgemm_release(pair == 2);
    });
  }

  // logits -> e, in place; sums, maxima and where they are.
  void softmax(const Chunk& chunk, float* logits, int64_t stride, int64_t row, int64_t rows, float* sum, float* top, int32_t* top_row) const {
    for (int64_t i = 0; i < width; i += kLanes) {
      const floats m = load<floats>(chunk.m.data() + i);
      floats total = {}, best = load<floats>(top + i);
      ints best_row = load<ints>(top_row + i);
      for (int64_t r = 0; r < rows; ++r) {
        float* at = logits + r * stride + i;
        const floats logit = load<floats>(at);
        const ints better = logit > best;
        best = better ? logit : best;
        best_row = better ? ints{} + int32_t(row + r) : best_row;
        const floats e = exponential(logit - m);
        total += e;
        store(at, e);
      }
      store(sum + i, load<floats>(sum + i) + total);
      store(top + i, best);
      store(top_row + i, best_row);
    }
  }

  // The targets' own entries are added later, in fp32.
  static void clear_targets(const Chunk& chunk, int64_t row, int64_t rows, float* tile, int64_t stride) {
    auto entry = std::lower_bound(chunk.targets.begin(), chunk.targets.end(), Entry{row, 0, 0});
    for (; entry != chunk.targets.end() && entry->row < row + rows; ++entry)
      tile[(entry->row - row) * stride + entry->token] = 0;
  }

  // e [rows, width] in bf16 as the right operand of dX.
  void pack(const float* tile, int64_t stride, int64_t rows, uint32_t* right) const {
    for (int64_t r = 0; r < rows; r += 2, tile += 2 * stride, right += width)
      for (int64_t i = 0; i < width; i += kLanes) {
        const units even = round_bf16(load<floats>(tile + i)) >> 16;
        const units odd = r + 1 < rows ? round_bf16(load<floats>(tile + stride + i)) & 0xffff0000u : units{};
        store(right + i, even | odd);
      }
  }

  // False if a token's m was too low for exp; then m is its maximum instead.
  bool in_range(Chunk& chunk) const {
    bool good = true;
    for (int64_t i = 0; i < chunk.count; ++i)
      for (int64_t part = 0; part < parts; ++part) {
        const float top = pointer<float>(tops)[part * width + i];
        if (top - chunk.target_logit[i] > kOverflow)
          chunk.m[i] = std::max(chunk.m[i], top), good = false;
      }
    return good;
  }

  // Sum of the chunk's losses; its scales, and the entries of targets and arg-maxima.
  double finish(Chunk& chunk) {
    double loss = 0;
    for (int64_t i = 0; i < chunk.count; ++i) {
      double sum = 0;
      float top = -INFINITY;
      int64_t top_row = 0;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t at = part * width + i;
        sum += pointer<float>(sums)[at];
        if (pointer<float>(tops)[at] > top)
          top = pointer<float>(tops)[at], top_row = pointer<int32_t>(top_rows)[at];
      }
      const double own = std::log(sum) + chunk.m[i] - chunk.target_logit[i];
      loss += own;
      chunk.scale[i] = 1 / (sum * n);
      entries.push_back({targets_.const_data_ptr<int64_t>()[chunk.begin + i], chunk.begin + i, float(std::expm1(-own) / n)});
      entries.push_back({top_row, chunk.begin + i, l2wrap / n * top});
    }
    return loss;
  }

  void write_dx(const Chunk& chunk) {
    const Entry* own = entries.data() + entries.size() - 2 * chunk.count; // two of each token, in order
    at::parallel_for(0, (chunk.count + kLanes - 1) / kLanes, 1, [&](int64_t first, int64_t last) {
      std::vector<float> total(C * kLanes), out(C);
      for (int64_t i = first * kLanes; i < std::min(last * kLanes, chunk.count); i += kLanes) {
        const floats scale = load<floats>(chunk.scale.data() + i);
        for (int64_t c = 0; c < C; ++c) {
          floats sum = {};
          for (int64_t part = 0; part < parts; ++part)
            sum += load<floats>(pointer<float>(dx_sums) + (part * C + c) * width + i);
          store(total.data() + c * kLanes, sum * scale);
        }
        for (int64_t j = 0; j < std::min(kLanes, chunk.count - i); ++j) {
          for (int64_t c = 0; c < C; ++c)
            out[c] = total[c * kLanes + j];
          for (const Entry* entry = own + 2 * (i + j); entry < own + 2 * (i + j + 1); ++entry)
            add_scaled(out.data(), weight + entry->row * C, entry->value);
          T* to = pointer<T>(dx) + (chunk.begin + i + j) * C;
          for (int64_t c = 0; c < C; ++c)
            to[c] = out[c];
        }
      }
    });
  }

  void add_scaled(float* to, const T* from, float factor) const {
    for (int64_t c = 0; c < C; ++c)
      to[c] += factor * to_float(from[c]);
  }

  // x * scale as the right operand of dW; rows beyond the chunk are zero.
  void pack_scaled(Chunk& chunk) {
    chunk.scaled_x = at::empty({width / pair, C}, x_.options().dtype(at::kInt));
    if (chunk.count < width)
      chunk.scaled_x.zero_();
    for (int64_t i = 0; i < chunk.count; ++i) {
      const T* from = x + (chunk.begin + i) * C;
      T* to = pointer<T>(chunk.scaled_x) + i / pair * pair * C + i % pair;
      for (int64_t c = 0; c < C; ++c)
        to[c * pair] = to_float(from[c]) * chunk.scale[i];
    }
  }

  // Pass 2.
  void add_dw(const std::vector<Chunk>& chunks) {
    std::sort(entries.begin(), entries.end());
    at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      const int64_t stride = width + kLanes;
      std::vector<float> tile(again ? kRows * stride : 0), local(again ? kBlock * C : 0);
      std::vector<T> rounded(again ? kRows * width : 0);
      for (int64_t block = first; block < last; ++block) {
        const int64_t row = block * kBlock, rows = std::min(kBlock, V - row);
        float* sum = local.data();
        if constexpr (!again)
          sum = pointer<float>(dw) + row * C;
        for (const Chunk& chunk : chunks)
          for (int64_t r = 0; r < rows; r += kRows) {
            const int64_t here = std::min(kRows, rows - r);
            const T* e = rounded.data();
            if constexpr (again) {
              multiply<T>(here, width, C, weight + (row + r) * C, C, pointer<uint32_t>(chunk.x), width, tile.data(), stride, false);
              softmax_again(chunk, tile.data(), stride, row + r, here, rounded.data());
            } else {
              e = pointer<T>(scores) + (row + r) * width;
            }
            multiply<T>(here, C, width, e, width, pointer<uint32_t>(chunk.scaled_x), C, sum + r * C, C, chunk.begin > 0);
          }
        auto entry = std::lower_bound(entries.begin(), entries.end(), Entry{row, 0, 0});
        for (; entry != entries.end() && entry->row < row + rows; ++entry)
          add_scaled(sum + (entry->row - row) * C, x + entry->token * C, entry->value);
        if constexpr (again)
          for (int64_t k = 0; k < rows * C; ++k)
            pointer<T>(dw)[row * C + k] = sum[k];
      }
      at::native::cpublas::brgemm_release(pair == 2);
    });
  }

  // logits -> e in bf16, as the left operand of dW; exp to 1e-4 is enough for it.
  void softmax_again(const Chunk& chunk, float* logits, int64_t stride, int64_t row, int64_t rows, T* e) const {
    using halves = uint16_t __attribute__((vector_size(32)));
    for (int64_t i = 0; i < width; i += kLanes) {
      const floats m = load<floats>(chunk.m.data() + i);
      for (int64_t r = 0; r < rows; ++r) {
        const floats p = rough_exponential(load<floats>(logits + r * stride + i) - m);
        store(e + r * width + i, __builtin_convertvector(round_bf16(p) >> 16, halves));
      }
    }
    auto entry = std::lower_bound(chunk.targets.begin(), chunk.targets.end(), Entry{row, 0, 0});
    for (; entry != chunk.targets.end() && entry->row < row + rows; ++entry)
      e[(entry->row - row) * width + entry->token] = 0;
  }
};

} // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> head_ce_cpu(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& targets, int64_t chunk, double l2wrap, bool need_dx, bool need_dw) {
  if (x.scalar_type() == at::kFloat)
    return Head<float>(x, weight, targets, chunk, l2wrap, need_dx, need_dw).run(chunk);
  return Head<at::BFloat16>(x, weight, targets, chunk, l2wrap, need_dx, need_dw).run(chunk);
}

bool head_ce_supported(bool bf16) {
  alignas(64) float a[16 * 16] = {}, b[16 * 16] = {}, c[16 * 16];
  try {
    if (bf16)
      at::native::cpublas::brgemm(
          16, 16, 16, 16, 16, 16, false, reinterpret_cast<at::BFloat16*>(a), reinterpret_cast<at::BFloat16*>(b), c, true);
    else
      at::native::cpublas::brgemm(16, 16, 16, 16, 16, 16, false, a, b, c, false);
    at::native::cpublas::brgemm_release(bf16);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}
