// ROSA over one row: run lengths by lag, and what turning each bit would change; see cpu.h. Compiled once per instruction set.
#include "cpu.h"

#include "../common/simd.h"
#include "flips.h"

namespace {

using rosa::Kernels;
using rosa::Row;

// Lengths of the matches that end at i, for all lags at once: one more where the symbol matches, else 0.
template <class Symbol>
void scan(const Row<Symbol>& row, Memory& memory) {
  const int64_t L = row.L, n = L + row.T, symbols = (n * sizeof(Symbol) + 3) / 4 * 4;  // bytes, so that the lengths behind them are aligned
  memory.resize(symbols + n * 4);
  Symbol* const backwards = reinterpret_cast<Symbol*>(memory.data());
  int32_t* const runs = row.runs ? row.runs : reinterpret_cast<int32_t*>(memory.data() + symbols);
  for (int64_t j = 0; j < n; j++) backwards[j] = row.k[n - 1 - j];
  if (L) memcpy(runs, row.before, L * 4);
  memset(runs + L, 0, row.T * 4);
  int64_t best = -1;  // its place: lag - 1
  for (int64_t i = L; i < n; i++) {
    const Symbol symbol = row.q[i - L], *k = backwards + n - i;
    int32_t longest = 0;
    for (int64_t c = 0; c < i; c++) {
      const int32_t run = k[c] == symbol ? runs[c] + 1 : 0;
      runs[c] = run;
      longest = run > longest ? run : longest;
    }
    if (longest == 0)
      best = -1;
    else if (best < 0 || runs[best] == 0)  // else it goes on, and nothing is longer, or as long and later (automaton.cpp)
      for (best = 0; runs[best] != longest;) best++;
    row.sources[i - L] = best < 0 ? -1 : int32_t(i - best);
  }
}

template <int BITS, class Lag>
void flips_of(const Flips& task, Memory& memory) {
  if (task.k)
    Turns<false, BITS, Lag>(task, memory).run();
  else
    Turns<true, BITS, Lag>(task, memory).run();
}

void flips(const Flips& task, Memory& memory) {
  if (task.T >= 1 << 15)
    flips_of<0, int32_t>(task, memory);
  else if (task.M == 1)
    flips_of<1, int16_t>(task, memory);
  else if (task.M == 4)
    flips_of<4, int16_t>(task, memory);
  else
    flips_of<0, int16_t>(task, memory);
}

}  // namespace

namespace rosa {

Kernels KERNELS_OF(ISA)() { return {scan<uint8_t>, scan<int64_t>, flips}; }

}  // namespace rosa
