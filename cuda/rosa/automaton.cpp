// ROSA by a suffix automaton (Blumer et al. 1985), for long rows: a transition or two for each symbol.
//
// Each state knows where one of its strings ended last. To keep that up to date after each symbol would take a walk
// along all suffix links, as many as there are symbols on a constant row. But it is asked for only where the match in
// hand does not go on: while the latest longest match goes on it stays the latest longest one, since one that is
// longer, or as long and later, would have been so a symbol before. So the walks are put off until somebody asks, and
// then made latest symbol first, each up to the first state that a later one has seen: a constant row makes none.
#include <algorithm>
#include <cstring>

#include "cpu.h"

namespace {

using rosa::Row;

// Where each symbol leads from a state: tables for alphabets that are small.
class Table {
  const int width;
  std::vector<int32_t> to;

 public:
  Table(int64_t states, int symbols) : width(symbols), to(size_t(states) * symbols) {}
  void begin(int32_t state) { std::fill_n(&to[size_t(state) * width], width, -1); }
  int32_t get(int32_t state, uint8_t symbol) const { return to[size_t(state) * width + symbol]; }
  void set(int32_t state, uint8_t symbol, int32_t target) { to[size_t(state) * width + symbol] = target; }
  void copy(int32_t from, int32_t state) { std::memcpy(&to[size_t(state) * width], &to[size_t(from) * width], width * sizeof(int32_t)); }
};

// The same for any symbols: one hash table for all, whose entries of a state are a list.
class Hash {
  struct Entry {
    int64_t symbol;
    int32_t state = -1, target, next;
  };
  std::vector<Entry> entries;
  std::vector<int32_t> first;

  size_t place(int32_t state, int64_t symbol) const {
    uint64_t h = (uint64_t(symbol) * 0x9e3779b97f4a7c15u ^ uint64_t(state)) * 0xd6e8feb86659fd93u;
    size_t i = (h ^ h >> 32) & (entries.size() - 1);
    while (entries[i].state >= 0 && (entries[i].state != state || entries[i].symbol != symbol)) i = (i + 1) & (entries.size() - 1);
    return i;
  }

 public:
  // n symbols make at most 2 n states and 3 n transitions.
  Hash(int64_t states, int) : first(states) {
    size_t size = 16;
    while (size < size_t(states) * 2) size *= 2;
    entries.resize(size);
  }
  void begin(int32_t state) { first[state] = -1; }
  int32_t get(int32_t state, int64_t symbol) const {
    const Entry& e = entries[place(state, symbol)];
    return e.state < 0 ? -1 : e.target;
  }
  void set(int32_t state, int64_t symbol, int32_t target) {
    const size_t i = place(state, symbol);
    Entry& e = entries[i];
    if (e.state < 0) {
      e.symbol = symbol, e.state = state, e.next = first[state];
      first[state] = int32_t(i);
    }
    e.target = target;
  }
  void copy(int32_t from, int32_t state) {
    begin(state);
    for (int32_t i = first[from]; i >= 0; i = entries[i].next) set(state, entries[i].symbol, entries[i].target);
  }
};

template <class Symbol, class Transitions>
class Automaton {
  Transitions next;
  // Of each state: its suffix link, its longest string, where one of its strings ended last (see seen)
  std::vector<int32_t> link, length, last;
  std::vector<int32_t> prefix;  // the state of the first j + 1 symbols
  int32_t states = 1, seen = 0;  // `last` is right as far as the first `seen` symbols go

 public:
  Automaton(int64_t n, int symbols) : next(2 * n + 2, symbols), link(2 * n + 2), length(2 * n + 2), last(2 * n + 2), prefix(n) {
    next.begin(0);
    link[0] = last[0] = -1;
    length[0] = 0;
  }

  void insert(int32_t j, Symbol symbol) {
    int32_t p = j ? prefix[j - 1] : 0;
    const int32_t state = states++;
    prefix[j] = state;
    next.begin(state);
    length[state] = length[p] + 1, last[state] = -1;
    for (; p >= 0 && next.get(p, symbol) < 0; p = link[p]) next.set(p, symbol, state);
    if (p < 0) {
      link[state] = 0;
      return;
    }
    const int32_t there = next.get(p, symbol);
    if (length[p] + 1 == length[there]) {
      link[state] = there;
      return;
    }
    const int32_t copy = states++;
    next.copy(there, copy);
    length[copy] = length[p] + 1, link[copy] = link[there], last[copy] = last[there];
    for (; p >= 0 && next.get(p, symbol) == there; p = link[p]) next.set(p, symbol, copy);
    link[there] = link[state] = copy;
  }

  // The state of the string of this length that ends at symbol j.
  int32_t at(int32_t j, int32_t matched) const { return matched ? up(prefix[j], matched) : 0; }

  // From the longest suffix that was known, `matched` symbols long, to that with another symbol behind it.
  void step(int32_t& state, int32_t& matched, Symbol symbol) const {
    int32_t p = state, target;
    while ((target = next.get(p, symbol)) < 0) {
      p = link[p];
      if (p < 0) {
        state = matched = 0;
        return;
      }
      matched = std::min(matched, length[p]);
    }
    matched = std::min(matched, length[p]) + 1;
    state = target;
  }

  // Where among the first n symbols the string of this length ended last.
  int32_t latest(int32_t state, int32_t matched, int32_t n) {
    for (int32_t j = n - 1; j >= seen; --j)
      for (int32_t s = prefix[j]; s >= 0 && last[s] < seen; s = link[s]) last[s] = j;
    seen = n;
    return last[up(state, matched)];
  }

 private:
  int32_t up(int32_t state, int32_t matched) const {
    while (link[state] >= 0 && length[link[state]] >= matched) state = link[state];
    return state;
  }
};

// Row::runs by the Z function: how far the new symbols of q, read backwards, agree with k read backwards from each place on.
template <class Symbol>
void final_runs(const Row<Symbol>& row) {
  const int64_t T = row.T, n = row.L + T;
  std::vector<int32_t> own(T);  // how far q agrees with itself
  const auto z_function = [&](int64_t size, const Symbol* end_of_text, const auto& put) {
    for (int64_t i = 1, begin = 0, end = 0; i < size; ++i) {
      int64_t z = i < end ? std::min<int64_t>(end - i, own[i - begin]) : 0;
      while (z < T && i + z < size && row.q[T - 1 - z] == end_of_text[-1 - i - z]) ++z;
      put(i, int32_t(z));
      if (i + z > end) begin = i, end = i + z;
    }
  };
  z_function(T, row.q + T, [&](int64_t i, int32_t z) { own[i] = z; });
  z_function(n, row.k + n, [&](int64_t i, int32_t z) { row.runs[i - 1] = z + (z == T && i <= row.L ? row.before[i - 1] : 0); });
  row.runs[n - 1] = 0;
}

template <class Symbol, class Transitions>
void run(const Row<Symbol>& row, int symbols) {
  const int64_t n = row.L + row.T;
  Automaton<Symbol, Transitions> automaton(n, symbols);
  for (int64_t j = 0; j < row.L; ++j) automaton.insert(int32_t(j), row.k[j]);
  int32_t source = -1, matched = 0, state = 0;  // source: the end of the match, which is where the next output comes from, less one
  if (row.L) {
    const int64_t lag = std::max_element(row.before, row.before + row.L) - row.before + 1;
    matched = row.before[lag - 1];
    if (matched) source = int32_t(row.L - 1 - lag), state = automaton.at(source, matched);
  }
  for (int64_t t = 0; t < row.T; ++t) {
    const int32_t i = int32_t(row.L + t);
    const Symbol symbol = row.q[t];
    const bool goes_on = source >= 0 && row.k[source + 1] == symbol;
    automaton.step(state, matched, symbol);
    source = goes_on ? source + 1 : matched ? automaton.latest(state, matched, i) : -1;
    row.sources[t] = source < 0 ? -1 : source + 1;
    automaton.insert(i, row.k[i]);
  }
  if (row.runs) final_runs(row);
}

}  // namespace

namespace rosa {

template <class Symbol>
void by_automaton(const Row<Symbol>& row, int symbols) {
  if constexpr (sizeof(Symbol) == 1)
    run<Symbol, Table>(row, symbols);
  else
    run<Symbol, Hash>(row, symbols);
}

template void by_automaton(const Row<uint8_t>&, int);
template void by_automaton(const Row<int64_t>&, int);

}  // namespace rosa
