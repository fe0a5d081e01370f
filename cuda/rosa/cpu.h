// Loops of ROSA over one row of symbols (cpu.cpp, automaton.cpp) for op.cpp. Definition:
// RWKV-v7/rwkvlm/ops/rosa/__init__.py; gradients: flips.h.
#pragma once
#include <stdint.h>

#include <type_traits>
#include <vector>

namespace rosa {

// T new symbols behind L old ones.
template <class Symbol>
struct Row {
  int64_t L, T;
  const Symbol *q, *k;  // [T] the new ones; [L + T] all
  const int32_t* before;  // [L] lengths of the matches that end at the last old symbol, by lag, lag 1 first; null: L = 0
  int32_t* runs;  // [L + T] the same after the last symbol; null: not wanted
  int32_t* sources;  // [T] the index of the output in v, -1 on a miss
};

// Gradients of the T symbols of a row, each of M bits: sums over the outputs of what turning a bit would change.
struct Flips {
  int64_t T;
  int M;
  bool miss_low;
  const uint8_t *q, *k, *v;  // [T]; k and v null: they are q, and turn together with it
  const float* dout;  // [T, M]
  const float *low, *high;  // [M]
  // [T, M], phi(bit turned) - phi(bit as it is); dk and dv null where k and v are, all where only dlow and dhigh are wanted
  float *dq, *dk, *dv;
  double *dlow, *dhigh;  // [M]
};

using Memory = std::vector<char>;  // of a thread, for the next row again

struct Kernels {
  void (*scan_symbols)(const Row<uint8_t>&, Memory&);
  void (*scan_tokens)(const Row<int64_t>&, Memory&);
  void (*flips)(const Flips&, Memory&);
};

Kernels kernels_plain();
Kernels kernels_avx2();
Kernels kernels_avx512();

// The same results as a scan, in time that grows with L + T and not with T (L + T). symbols: how many there are, 0: any number of them.
template <class Symbol>
void by_automaton(const Row<Symbol>& row, int symbols);

extern template void by_automaton(const Row<uint8_t>&, int);
extern template void by_automaton(const Row<int64_t>&, int);

}  // namespace rosa
