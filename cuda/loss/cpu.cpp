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
constexpr int64_t kSegments = 16;  // of the vocabulary, with partial sums of their own
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

template <typename T>
class Head {
  static constexpr int64_t pair = 4 / sizeof(T); // elements in a 32-bit unit
  const at::Tensor &x, &weight, &targets;
  const int64_t n, V, C, width; // width: tokens of a chunk, rounded up to whole vectors
  const float l2wrap;
  at::Tensor dx, dw;

  // One chunk's state, all [..., width].
  at::Tensor scores_;             // e, [V, width] T; empty where the weight needs no gradient
  at::Tensor x_units_, xs_units_; // x [C / pair, width] and x / (sum n) [width / pair, C], packed
  at::Tensor sums_, tops_, top_rows_; // [segments, width]
  at::Tensor dx_sums_;            // [segments, C, width]
  at::Tensor accumulator_;        // [V, C] fp32
  std::vector<float> m, target_logit, scale;
  std::vector<Entry> target_entries, entries;

  const T* X() const { return reinterpret_cast<const T*>(x.const_data_ptr()); }
  const T* W() const { return reinterpret_cast<const T*>(weight.const_data_ptr()); }

  int64_t segments() const { return std::min(kSegments, (V + kBlock - 1) / kBlock); }

 public:
  Head(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& targets, int64_t chunk, double l2wrap, bool need_dx, bool need_dw)
      : x(x), weight(weight), targets(targets), n(x.size(0)), V(weight.size(0)), C(weight.size(1)),
        width((std::min(chunk, n) + 31) / 32 * 32), l2wrap(l2wrap) {
    const auto fp32 = x.options().dtype(at::kFloat), int32 = x.options().dtype(at::kInt);
    dx = at::empty({need_dx ? n : 0, C}, x.options());
    dw = at::empty({need_dw ? V : 0, C}, x.options());
    x_units_ = at::empty({C / pair, width}, int32);
    sums_ = at::empty({segments(), width}, fp32);
    tops_ = at::empty({segments(), width}, fp32);
    top_rows_ = at::empty({segments(), width}, int32);
    if (need_dx)
      dx_sums_ = at::empty({segments(), C, width}, fp32);
    if (need_dw) {
      scores_ = at::empty({V, width}, x.options());
      xs_units_ = at::empty({width / pair, C}, int32);
      if (sizeof(T) == 4)
        accumulator_ = dw;
      else if (chunk < n)
        accumulator_ = at::empty({V, C}, fp32);
    }
    m.resize(width), target_logit.resize(width), scale.resize(width);
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor> run(int64_t chunk) {
    double loss = 0;
    for (int64_t begin = 0; begin < n; begin += chunk) {
      const int64_t count = std::min(chunk, n - begin);
      prepare(begin, count);
      exponentiate();
      if (!finite(count))
        exponentiate();
      loss += finish(begin, count);
      if (dx.size(0))
        write_dx(begin, count);
      if (dw.size(0))
        add_dw(begin, count);
    }
    return {at::scalar_tensor(loss / n, x.options().dtype(at::kFloat)), dx, dw};
  }

 private:
  // Packs x, and takes each token's own target logit as its m.
  void prepare(int64_t begin, int64_t count) {
    auto* packed = reinterpret_cast<uint32_t*>(x_units_.data_ptr());
    if (count < width)
      x_units_.zero_();
    transpose(reinterpret_cast<const uint32_t*>(X() + begin * C), C / pair, packed, width, count, C / pair);
    const int64_t* target = targets.const_data_ptr<int64_t>() + begin;
    target_entries.clear();
    for (int64_t i = 0; i < count; ++i) {
      const T *a = X() + (begin + i) * C, *b = W() + target[i] * C;
      float dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t c = 0; c < C; ++c)
        dot += to_float(a[c]) * to_float(b[c]);
      m[i] = target_logit[i] = dot;
      target_entries.push_back({target[i], i, 0});
    }
    std::fill(m.begin() + count, m.end(), 0.0f);
    std::sort(target_entries.begin(), target_entries.end());
  }

  // Pass 1.
  void exponentiate() {
    const bool need_dx = dx.size(0), need_dw = dw.size(0);
    const int64_t blocks = (V + kBlock - 1) / kBlock, parts = segments();
    at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      const int64_t stride = width + kLanes; // not a power of two: columns would share a cache set
      std::vector<float> tile(kBlock * stride);
      std::vector<uint32_t> interleaved(need_dx && pair == 2 ? kBlock / pair * C : 0);
      std::vector<T> turned(need_dx ? C * kBlock : 0); // the block of the weight, transposed
      std::vector<uint32_t> right(need_dx && pair == 2 ? kBlock / pair * width : 0);
      for (int64_t part = first; part < last; ++part) {
        float* sum = sums_.data_ptr<float>() + part * width;
        float* top = tops_.data_ptr<float>() + part * width;
        int32_t* top_row = top_rows_.data_ptr<int32_t>() + part * width;
        std::fill(sum, sum + width, 0.0f);
        std::fill(top, top + width, -INFINITY);
        std::fill(top_row, top_row + width, 0);
        bool add = false;
        for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block, add = true) {
          const int64_t row = block * kBlock, rows = std::min(kBlock, V - row);
          const T* w = W() + row * C;
          for (int64_t r = 0; r < rows; r += kRows) {
            const int64_t here = std::min(kRows, rows - r);
            float* logits = tile.data() + r * stride;
            multiply<T>(here, width, C, w + r * C, C, units_of(x_units_), width, logits, stride, false);
            softmax_rows(logits, stride, row + r, here, sum, top, top_row);
          }
          if (!need_dx && !need_dw)
            continue;
          auto entry = std::lower_bound(target_entries.begin(), target_entries.end(), Entry{row, 0, 0});
          for (; entry != target_entries.end() && entry->row < row + rows; ++entry)
            tile[(entry->row - row) * stride + entry->token] = 0;
          T* kept = need_dw ? reinterpret_cast<T*>(scores_.data_ptr()) + row * width : nullptr;
          keep(tile.data(), stride, rows, kept, right.data());
          if (!need_dx)
            continue;
          float* dx_sum = dx_sums_.data_ptr<float>() + part * C * width;
          const int64_t depth = (rows + pair - 1) / pair * pair;
          if constexpr (pair == 2) {
            interleave(w, C, interleaved.data(), rows, C);
            transpose(interleaved.data(), C, reinterpret_cast<uint32_t*>(turned.data()), kBlock / pair, depth / pair, C);
            multiply<T>(C, width, depth, turned.data(), kBlock, right.data(), width, dx_sum, width, add);
          } else {
            transpose(reinterpret_cast<const uint32_t*>(w), C, reinterpret_cast<uint32_t*>(turned.data()), kBlock, rows, C);
            multiply<T>(C, width, depth, turned.data(), kBlock, reinterpret_cast<uint32_t*>(tile.data()), stride, dx_sum, width, add);
          }
        }
      }
      at::native::cpublas::brgemm_release(pair == 2);
    });
  }

  static const uint32_t* units_of(const at::Tensor& t) { return reinterpret_cast<const uint32_t*>(t.const_data_ptr()); }

  // logits -> e, in place; sums, maxima and where they are.
  void softmax_rows(float* logits, int64_t stride, int64_t row, int64_t rows, float* sum, float* top, int32_t* top_row) const {
    for (int64_t i = 0; i < width; i += kLanes) {
      const floats shift = load<floats>(m.data() + i);
      floats total = {}, best = load<floats>(top + i);
      ints best_row = load<ints>(top_row + i);
      for (int64_t r = 0; r < rows; ++r) {
        float* at = logits + r * stride + i;
        const floats logit = load<floats>(at);
        const ints better = logit > best;
        best = better ? logit : best;
        best_row = better ? ints{} + int32_t(row + r) : best_row;
        const floats e = exponential(logit - shift);
        total += e;
        store(at, e);
      }
      store(sum + i, load<floats>(sum + i) + total);
      store(top + i, best);
      store(top_row + i, best_row);
    }
  }

  // Stores e [rows, width] for pass 2, and for bf16 packs it as the right operand of dX.
  void keep(const float* tile, int64_t stride, int64_t rows, T* kept, uint32_t* right) const {
    if constexpr (pair == 1) {
      for (int64_t r = 0; kept && r < rows; ++r)
        std::memcpy(kept + r * width, tile + r * stride, width * sizeof(T));
    } else {
      using halves = uint16_t __attribute__((vector_size(32)));
      auto* bits = reinterpret_cast<uint16_t*>(kept);
      for (int64_t r = 0; r < rows; r += 2)
        for (int64_t i = 0; i < width; i += kLanes) {
          const units even = round_bf16(load<floats>(tile + r * stride + i)) >> 16;
          units odd = {};
          if (r + 1 < rows)
            odd = round_bf16(load<floats>(tile + (r + 1) * stride + i)) & 0xffff0000u;
          if (bits) {
            store(bits + r * width + i, __builtin_convertvector(even, halves));
            if (r + 1 < rows)
              store(bits + (r + 1) * width + i, __builtin_convertvector(odd >> 16, halves));
          }
          if (right != nullptr)
            store(right + r / 2 * width + i, even | odd);
        }
    }
  }

  // False if a token's m was too low for exp; then m is its maximum instead.
  bool finite(int64_t count) {
    bool good = true;
    for (int64_t i = 0; i < count; ++i) {
      float top = -INFINITY;
      for (int64_t part = 0; part < segments(); ++part)
        top = std::max(top, tops_.data_ptr<float>()[part * width + i]);
      if (top - m[i] > kOverflow)
        m[i] = top, good = false;
    }
    return good;
  }

  // Sum of the chunk's losses; scale = 1 / (sum n), and the entries of target and arg-max.
  double finish(int64_t begin, int64_t count) {
    double loss = 0;
    entries.clear();
    for (int64_t i = 0; i < count; ++i) {
      double sum = 0;
      float top = -INFINITY;
      int64_t top_row = 0;
      for (int64_t part = 0; part < segments(); ++part) {
        const int64_t at = part * width + i;
        sum += sums_.data_ptr<float>()[at];
        if (tops_.data_ptr<float>()[at] > top)
          top = tops_.data_ptr<float>()[at], top_row = top_rows_.data_ptr<int32_t>()[at];
      }
      const double own = std::log(sum) + m[i] - target_logit[i];
      loss += own;
      scale[i] = 1 / (sum * n);
      entries.push_back({targets.const_data_ptr<int64_t>()[begin + i], i, float(std::expm1(-own) / n)});
      if (l2wrap != 0)
        entries.push_back({top_row, i, l2wrap / n * top});
    }
    return loss;
  }

  void write_dx(int64_t begin, int64_t count) {
    const int64_t parts = segments(), per_token = int64_t(entries.size()) / count;
    at::parallel_for(0, (count + kLanes - 1) / kLanes, 1, [&](int64_t first, int64_t last) {
      std::vector<float> total(C * kLanes), out(C);
      for (int64_t block = first; block < last; ++block) {
        const int64_t i = block * kLanes;
        const floats factor = load<floats>(scale.data() + i);
        for (int64_t c = 0; c < C; ++c) {
          floats sum = {};
          for (int64_t part = 0; part < parts; ++part)
            sum += load<floats>(dx_sums_.data_ptr<float>() + (part * C + c) * width + i);
          store(total.data() + c * kLanes, sum * factor);
        }
        for (int64_t j = 0; j < std::min(kLanes, count - i); ++j) {
          for (int64_t c = 0; c < C; ++c)
            out[c] = total[c * kLanes + j];
          for (int64_t k = (i + j) * per_token; k < (i + j + 1) * per_token; ++k) {
            const T* w = W() + entries[k].row * C;
            for (int64_t c = 0; c < C; ++c)
              out[c] += entries[k].value * to_float(w[c]);
          }
          T* to = reinterpret_cast<T*>(dx.data_ptr()) + (begin + i + j) * C;
          for (int64_t c = 0; c < C; ++c)
            to[c] = out[c];
        }
      }
    });
  }

  // Pass 2.
  void add_dw(int64_t begin, int64_t count) {
    pack_scaled(begin, count);
    std::sort(entries.begin(), entries.end());
    const bool first_chunk = begin == 0, last_chunk = begin + count == n, summed = accumulator_.defined();
    at::parallel_for(0, (V + kRows - 1) / kRows, 1, [&](int64_t first, int64_t last) {
      std::vector<float> local(summed ? 0 : kRows * C);
      for (int64_t block = first; block < last; ++block) {
        const int64_t row = block * kRows, rows = std::min(kRows, V - row);
        float* sum = summed ? accumulator_.data_ptr<float>() + row * C : local.data();
        const T* e = reinterpret_cast<const T*>(scores_.const_data_ptr()) + row * width;
        multiply<T>(rows, C, width, e, width, units_of(xs_units_), C, sum, C, !first_chunk);
        auto entry = std::lower_bound(entries.begin(), entries.end(), Entry{row, 0, 0});
        for (; entry != entries.end() && entry->row < row + rows; ++entry) {
          float* to = sum + (entry->row - row) * C;
          const T* from = X() + (begin + entry->token) * C;
          for (int64_t c = 0; c < C; ++c)
            to[c] += entry->value * to_float(from[c]);
        }
        if constexpr (pair == 2)
          if (last_chunk) {
            T* to = reinterpret_cast<T*>(dw.data_ptr()) + row * C;
            for (int64_t k = 0; k < rows * C; ++k)
              to[k] = sum[k];
          }
      }
      at::native::cpublas::brgemm_release(pair == 2);
    });
  }

  // x / (sum n) as the right operand of dW; rows beyond the chunk are zero.
  void pack_scaled(int64_t begin, int64_t count) {
    auto* packed = reinterpret_cast<T*>(xs_units_.data_ptr());
    if (count < width)
      xs_units_.zero_();
    for (int64_t i = 0; i < count; ++i) {
      const T* from = X() + (begin + i) * C;
      T* to = packed + i / pair * pair * C + i % pair;
      for (int64_t c = 0; c < C; ++c)
        to[c * pair] = to_float(from[c]) * scale[i];
    }
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
