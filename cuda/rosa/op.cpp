// Registration of ROSA with torch, on its stable ABI: symbols out of channels and back, a row of symbols to a task.
// Each row is one thread's, and sums over rows are made in order: the same bits for any number of threads.
#include "../common/torch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "../common/isa.h"
#include "../common/parallel.h"
#include "cpu.h"

namespace {

using rosa::Flips;
using rosa::Kernels;
using rosa::Memory;
using rosa::Row;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Maybe = std::optional<Tensor>;

Kernels kernels_here() { return OF_ISA_IN_USE(rosa::kernels); }

// Calls work(i, memory) for i = 0 .. count - 1.
template <class Work>
void for_each(int64_t count, const Work& work) {
  in_parallel(count, [&](const auto& next) {
    Memory memory;
    for (int64_t i; next(i);) work(i, memory);
  });
}

template <class X>
X* data(const Tensor& x, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.is_contiguous() && x.numel() == count,
                  "rosa: expected contiguous tensors whose dtypes and sizes fit");
  return static_cast<X*>(x.data_ptr());
}
uint8_t* bytes(const Tensor& x, int64_t count) { return data<uint8_t>(x, ScalarType::Byte, count); }
int32_t* ints(const Tensor& x, int64_t count) { return data<int32_t>(x, ScalarType::Int, count); }

struct bf16 {
  uint16_t bits;
};
float to_float(float x) { return x; }
float to_float(bf16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
void from_float(float x, float& to) { to = x; }
void from_float(float x, bf16& to) {  // to the nearest, ties to even; a NaN stays one
  uint32_t u;
  memcpy(&u, &x, 4);
  to.bits = x == x ? uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16) : 0x7fc0;
}

// [B, T, C] of bf16 or fp32 numbers; M channels are a symbol, and each of the B G rows of symbols a text of its own.
struct Shape {
  ScalarType type;
  int64_t B, T, C, M, G, rows;

  Shape(const Tensor& x, int64_t bits)
      : type(x.scalar_type()), B(x.size(0)), T(x.size(1)), C(x.size(2)), M(bits), G(C / bits), rows(B * G) {
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "rosa: expected bfloat16 or float32");
    STD_TORCH_CHECK(M >= 1 && M <= 8 && G * M == C, "rosa: 1 to 8 bits that divide the channels");
  }
  template <class X>
  X* whole(const Tensor& x) const {
    return data<X>(x, type, B * T * C);
  }
  template <class X>
  std::vector<float> vector(const Tensor& x) const {
    const X* from = data<X>(x, type, C);
    std::vector<float> to(C);
    std::transform(from, from + C, to.begin(), [](X y) { return to_float(y); });
    return to;
  }
  template <class Work>  // work(X()) with the type of the numbers
  auto typed(const Work& work) const {
    return type == ScalarType::Float ? work(float()) : work(bf16());
  }
};

constexpr int64_t kTokens = 64;  // of a piece where no sequence matters

// Calls work(b, begin, end) for pieces of all sequences.
template <class Work>
void over_tokens(const Shape& s, const Work& work) {
  const int64_t pieces = (s.T + kTokens - 1) / kTokens;
  for_each(s.B * pieces, [&](int64_t i, Memory&) { work(i / pieces, i % pieces * kTokens, std::min(s.T, (i % pieces + 1) * kTokens)); });
}

// Symbols [B, G, L + T] of x [B, T, C] behind those of `old` [B, G, L]. A bit is x > 0.
Tensor symbols_of(const Shape& s, const Tensor& x, const Maybe& old) {
  const int64_t L = old ? old->size(2) : 0;
  Tensor result = torch::stable::new_empty(x, {s.B, s.G, L + s.T}, ScalarType::Byte);
  uint8_t* to = bytes(result, s.rows * (L + s.T));
  if (old) {
    const uint8_t* from = bytes(*old, s.rows * L);
    for_each(s.rows, [&](int64_t r, Memory&) { memcpy(to + r * (L + s.T), from + r * L, L); });
  }
  s.typed([&](auto kind) {
    using X = decltype(kind);
    const X* from = s.whole<const X>(x);
    over_tokens(s, [&](int64_t b, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        for (int64_t g = 0; g < s.G; g++) {
          const X* channels = from + (b * s.T + t) * s.C + g * s.M;
          unsigned symbol = 0;
          for (int64_t m = 0; m < s.M; m++) symbol |= unsigned(to_float(channels[m]) > 0) << m;
          to[(b * s.G + g) * (L + s.T) + L + t] = uint8_t(symbol);
        }
    });
  });
  return result;
}

// Which is faster, by what they took on one core of a Zen 4: a scan 0.1 ns for each symbol and lag, the automaton so many for a symbol.
bool scans(int64_t L, int64_t T, double automaton) { return double(T) * (double(L) + 0.5 * double(T)) * 0.1 < automaton * double(L + T); }

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor q, Maybe k, Maybe v, Tensor low, Tensor high, int64_t bits, bool miss_low, double,
                                                   bool, Maybe old_k, Maybe old_v, Maybe old_runs, bool with_state) {
  const Shape s(q, bits);
  const int64_t L = old_k ? old_k->size(2) : 0, n = L + s.T;
  STD_TORCH_CHECK(k.has_value() == v.has_value() && n < INT32_MAX, "rosa: k and v come together");
  STD_TORCH_CHECK(L == 0 || (old_runs && (old_v || !v)), "rosa: expected old_k, old_v and old_runs, or none of them");
  const Tensor new_q = k ? symbols_of(s, q, std::nullopt) : Tensor(), all_k = symbols_of(s, k ? *k : q, old_k),
               all_v = v ? symbols_of(s, *v, old_v) : all_k;
  const uint8_t *ks = bytes(all_k, s.rows * n), *vs = bytes(all_v, s.rows * n), *qs = k ? bytes(new_q, s.rows * s.T) : nullptr;
  const int32_t* before = L ? ints(*old_runs, s.rows * L) : nullptr;
  Tensor after = torch::stable::new_empty(q, {s.B, s.G, with_state ? n : 0}, ScalarType::Int);
  int32_t* const runs = with_state ? ints(after, s.rows * n) : nullptr;
  Tensor outputs = torch::stable::new_empty(q, {s.B, s.G, s.T}, ScalarType::Short);  // symbols, -1 on a miss
  int16_t* const ys = data<int16_t>(outputs, ScalarType::Short, s.rows * s.T);
  const Kernels kernels = kernels_here();
  const bool scan = scans(L, s.T, 25);
  for_each(s.rows, [&](int64_t r, Memory& memory) {
    std::vector<int32_t> sources(s.T);
    const uint8_t* const row_k = ks + r * n;
    const Row<uint8_t> row{L, s.T, qs ? qs + r * s.T : row_k + L, row_k, before ? before + r * L : nullptr, runs ? runs + r * n : nullptr,
                           sources.data()};
    scan ? kernels.scan_symbols(row, memory) : rosa::by_automaton(row, 1 << s.M);
    for (int64_t t = 0; t < s.T; t++) ys[r * s.T + t] = sources[t] < 0 ? -1 : vs[r * n + sources[t]];
  });
  Tensor out = torch::stable::empty_like(q);
  s.typed([&](auto kind) {
    using X = decltype(kind);
    X *const to = s.whole<X>(out), *const lows = data<X>(low, s.type, s.C), *const highs = data<X>(high, s.type, s.C);
    over_tokens(s, [&](int64_t b, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        for (int64_t c = 0; c < s.C; c++) {
          const int16_t y = ys[(b * s.G + c / s.M) * s.T + t];
          to[(b * s.T + t) * s.C + c] = y < 0 ? (miss_low ? lows[c] : X{}) : y >> c % s.M & 1 ? highs[c] : lows[c];
        }
    });
  });
  const auto if_wanted = [&](bool wanted, const Tensor& x) {
    return wanted ? x : torch::stable::new_empty(q, {s.B, s.G, 0}, ScalarType::Byte);
  };
  return {out, if_wanted(with_state, all_k), if_wanted(with_state && v.has_value(), all_v), after};
}

// With `flips` the gradients of q, k and v, or of q alone where k and v are it; then those of low and high.
Tensors backward(Tensor dout, Tensor q, Maybe k, Maybe v, Tensor low, Tensor high, int64_t bits, bool miss_low, double tau,
                 bool flips) {
  const Shape s(q, bits);
  STD_TORCH_CHECK(k.has_value() == v.has_value(), "rosa: k and v come together");
  Tensors inputs = k ? Tensors{q, *k, *v} : Tensors{q}, symbols, gradients;
  for (const Tensor& x : inputs) symbols.push_back(symbols_of(s, x, std::nullopt));
  if (flips)
    for (const Tensor& x : inputs) gradients.push_back(torch::stable::empty_like(x));
  Tensor sums = torch::stable::new_empty(q, {2, s.B, s.C}, ScalarType::Double);
  double* const lows = data<double>(sums, ScalarType::Double, 2 * s.B * s.C);
  const Kernels kernels = kernels_here();
  Tensors totals{torch::stable::empty_like(low), torch::stable::empty_like(low)};
  s.typed([&](auto kind) {
    using X = decltype(kind);
    const X* const slopes = s.whole<const X>(dout);
    const std::vector<float> low_values = s.vector<const X>(low), high_values = s.vector<const X>(high);
    for_each(s.rows, [&](int64_t r, Memory& memory) {
      const int64_t size = s.T * s.M, first = r / s.G * s.T * s.C + r % s.G * s.M;  // of this row's channels
      std::vector<float> numbers((1 + inputs.size()) * size);
      for (int64_t t = 0; t < s.T; t++)
        for (int64_t m = 0; m < s.M; m++) numbers[t * s.M + m] = to_float(slopes[first + t * s.C + m]);
      Flips task{.T = s.T, .M = int(s.M), .miss_low = miss_low};
      const uint8_t** const from[] = {&task.q, &task.k, &task.v};
      float** const to[] = {&task.dq, &task.dk, &task.dv};
      for (size_t i = 0; i < inputs.size(); i++) *from[i] = bytes(symbols[i], s.rows * s.T) + r * s.T;
      for (size_t i = 0; i < gradients.size(); i++) *to[i] = numbers.data() + (1 + i) * size;
      task.dout = numbers.data(), task.low = low_values.data() + r % s.G * s.M, task.high = high_values.data() + r % s.G * s.M;
      task.dlow = lows + r * s.M, task.dhigh = lows + s.B * s.C + r * s.M;
      kernels.flips(task, memory);
      for (size_t i = 0; i < gradients.size(); i++) {
        const X* const x = s.whole<const X>(inputs[i]) + first;
        X* const dx = s.whole<X>(gradients[i]) + first;
        for (int64_t t = 0; t < s.T; t++)
          for (int64_t m = 0; m < s.M; m++) {
            const float value = to_float(x[t * s.C + m]), size_of = std::fabs(value), turned = (*to[i])[t * s.M + m];
            const float divisor = 2 * (size_of < float(tau) ? float(tau) : size_of);  // a NaN stays one
            from_float((value > 0 ? -turned : turned) / divisor, dx[t * s.C + m]);
          }
      }
    });
    for (int i = 0; i < 2; i++)
      for (int64_t c = 0; c < s.C; c++) {
        double sum = 0;
        for (int64_t b = 0; b < s.B; b++) sum += lows[(i * s.B + b) * s.C + c];
        from_float(float(sum), data<X>(totals[i], s.type, s.C)[c]);
      }
  });
  gradients.insert(gradients.end(), totals.begin(), totals.end());
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> tokens(Tensor x, Maybe old, Maybe old_runs, bool with_state) {
  const int64_t B = x.size(0), T = x.size(1), L = old ? old->size(1) : 0, n = L + T;
  STD_TORCH_CHECK(n < INT32_MAX, "rosa_tokens: too long");
  STD_TORCH_CHECK(L == 0 || old_runs, "rosa_tokens: expected old and old_runs, or neither");
  const int64_t* const from = data<int64_t>(x, ScalarType::Long, B * T);
  Tensor all = torch::stable::new_empty(x, {B, n}), y = torch::stable::empty_like(x);
  Tensor after = torch::stable::new_empty(x, {B, with_state ? n : 0}, ScalarType::Int);
  int64_t *const k = data<int64_t>(all, ScalarType::Long, B * n), *const to = data<int64_t>(y, ScalarType::Long, B * T);
  const int64_t* const before_k = L ? data<int64_t>(*old, ScalarType::Long, B * L) : nullptr;
  const int32_t* const before = L ? ints(*old_runs, B * L) : nullptr;
  int32_t* const runs = with_state ? ints(after, B * n) : nullptr;
  const Kernels kernels = kernels_here();
  const bool scan = scans(L, T, 60);
  for_each(B, [&](int64_t b, Memory& memory) {
    int64_t* const row_k = k + b * n;
    if (L) memcpy(row_k, before_k + b * L, L * 8);
    memcpy(row_k + L, from + b * T, T * 8);
    std::vector<int32_t> sources(T);
    const Row<int64_t> row{L, T, row_k + L, row_k, before ? before + b * L : nullptr, runs ? runs + b * n : nullptr, sources.data()};
    scan ? kernels.scan_tokens(row, memory) : rosa::by_automaton(row, 0);
    for (int64_t t = 0; t < T; t++) to[b * T + t] = sources[t] < 0 ? -1 : row_k[sources[t]];
  });
  return {y, with_state ? all : torch::stable::new_empty(x, {B, 0}), after};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rwkvlm, m) {
  m.def(
      "rosa(Tensor q, Tensor? k, Tensor? v, Tensor low, Tensor high, int bits, bool miss_low, float tau, bool soft, Tensor? old_k,"
      " Tensor? old_v, Tensor? old_runs, bool with_state) -> (Tensor out, Tensor k, Tensor v, Tensor runs)");
  m.def(
      "rosa_backward(Tensor dout, Tensor q, Tensor? k, Tensor? v, Tensor low, Tensor high, int bits, bool miss_low, float tau, bool flips)"
      " -> Tensor[]");
  m.def("rosa_tokens(Tensor x, Tensor? old, Tensor? old_runs, bool with_state) -> (Tensor y, Tensor k, Tensor runs)");
  m.def("rosa_limit_isa(int level) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(rwkvlm, CPU, m) {
  m.impl("rosa", TORCH_BOX(&forward));
  m.impl("rosa_backward", TORCH_BOX(&backward));
  m.impl("rosa_tokens", TORCH_BOX(&tokens));
}

STABLE_TORCH_LIBRARY_IMPL(rwkvlm, CompositeExplicitAutograd, m) { m.impl("rosa_limit_isa", TORCH_BOX(&isa::limit_level)); }
