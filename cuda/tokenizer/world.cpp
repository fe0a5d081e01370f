// The World tokenizer's trie: how its double array is filled, and the walk over texts.
#include "world.h"

#include <algorithm>
#include <cstring>
#include <string_view>

namespace tokenizer {
namespace {

constexpr size_t WINDOW = 512;  // cells

struct Token {
  std::string_view bytes;
  uint16_t id;
};

// A node of the trie: the tokens first to last - 1 in sorted order, which share their first `depth` bytes.
struct Node {
  size_t first, last, depth;
  uint32_t cell;
};

std::vector<Token> sorted_tokens(const uint8_t* bytes, const int64_t* lengths, int64_t n) {
  std::vector<Token> tokens;
  for (int64_t i = 0; i < n; bytes += lengths[i++])
    tokens.push_back({{reinterpret_cast<const char*>(bytes), size_t(lengths[i])}, uint16_t(i + 1)});
  std::sort(tokens.begin(), tokens.end(), [](const Token& a, const Token& b) { return a.bytes < b.bytes; });
  return tokens;
}

}  // namespace

World::World(const uint8_t* bytes, const int64_t* lengths, int64_t n) {
  const std::vector<Token> tokens = sorted_tokens(bytes, lengths, n);
  for (const Token& token : tokens) longest_ = std::max(longest_, int64_t(token.bytes.size()));
  std::vector<bool> taken;  // bases in use
  const auto grow = [&](size_t cell) {
    if (cell < cells_.size()) return;
    cells_.resize(cells_.size() + 256, Cell{});
    taken.resize(cells_.size());
  };
  grow(0);
  cells_[0].used = true;
  // Breadth first, so that the cells of short matches, the frequent ones, lie together.
  std::vector<Node> nodes{{0, tokens.size(), 0, 0}};
  std::vector<uint32_t> leaves;
  uint32_t first_free = 1;
  for (size_t next = 0; next < nodes.size(); ++next) {
    Node node = nodes[next];
    for (; node.first < node.last && tokens[node.first].bytes.size() == node.depth; ++node.first)
      cells_[node.cell].id = tokens[node.first].id;
    if (node.first == node.last) {
      leaves.push_back(node.cell);
      continue;
    }
    std::vector<Node> children;
    std::vector<uint8_t> labels;
    for (size_t k = node.first; k < node.last; ++k) {
      const uint8_t label = uint8_t(tokens[k].bytes[node.depth]);
      if (labels.empty() || labels.back() != label) {
        labels.push_back(label);
        children.push_back({k, k, node.depth + 1, 0});
      }
      children.back().last = k + 1;
    }
    for (grow(first_free); cells_[first_free].used; grow(first_free)) ++first_free;
    // Old gaps are left alone: searching them all takes seconds.
    uint32_t cell = std::max(first_free, uint32_t(std::max<size_t>(cells_.size(), WINDOW) - WINDOW)), base = cell ^ labels[0];
    const auto clash = [&](uint8_t c) { return cells_[base ^ c].used; };
    while (taken[base] || std::any_of(labels.begin(), labels.end(), clash)) {
      grow(++cell);
      base = cell ^ labels[0];
    }
    taken[base] = true;
    cells_[node.cell].base = base;
    for (size_t k = 0; k < labels.size(); ++k) {
      children[k].cell = base ^ labels[k];
      cells_[children[k].cell].label = labels[k];
      cells_[children[k].cell].used = true;
    }
    nodes.insert(nodes.end(), children.begin(), children.end());
  }
  // Leaves share the base of a last block, whose cells answer to nobody.
  const uint32_t nowhere = uint32_t(cells_.size());
  grow(nowhere);
  taken[nowhere] = true;
  for (const uint32_t leaf : leaves) cells_[leaf].base = nowhere;
  // A free cell gets a label that no base reaches. There is one: each base of a block has a child in the block's 256 cells, and
  // this one is nobody's child.
  cells_[0].used = false;
  for (uint32_t cell = 0; cell < cells_.size(); ++cell)
    while (!cells_[cell].used && taken[cell ^ cells_[cell].label]) ++cells_[cell].label;

  complete_ = true;
  for (int a = 0; a < 256; ++a) {
    const Cell& cell = cells_[cells_[0].base ^ uint32_t(a)];
    single_[a] = cell.label == a ? cell.id : 0;
    complete_ = complete_ && single_[a];
    for (int b = 0; b < 256; ++b) {
      const uint32_t base = cell.label == a ? cell.base : nowhere;
      const Cell& second = cells_[base ^ uint32_t(b)];
      Entry& entry = pairs_[a * 256 + b];
      entry = {nowhere, single_[a], 1, false};
      if (second.label != b) continue;
      if (second.id) entry.id = second.id, entry.length = 2;
      entry.base = second.base;
      entry.goes_on = second.base != nowhere;
    }
  }
}

uint16_t* World::encode_rest(const uint8_t* at, const uint8_t* end, uint16_t* ids) const {
  const Cell* cells = cells_.data();
  const Entry* pairs = pairs_.data();
  while (at + 1 < end) {
    const Entry entry = pairs[at[0] * 256 + at[1]];
    uint16_t id = entry.id;
    const uint8_t* best = at + entry.length;
    if (entry.goes_on) {
      uint32_t base = entry.base;
      for (const uint8_t* next = at + 2; next < end; ++next) {
        const Cell cell = cells[base ^ *next];
        if (cell.label != *next) break;
        base = cell.base;
        if (cell.id) id = cell.id, best = next + 1;
      }
    }
    *ids++ = id;
    at = best;
  }
  if (at < end) *ids++ = single_[*at];
  return ids;
}

// a where the mask is all ones, b where it is zero; compilers make branches of ?:.
int64_t either(int64_t mask, int64_t a, int64_t b) { return b ^ ((a ^ b) & mask); }

// One text on its way. A match has been followed up to `next`; the longest token in it, `id`, ends at `best`.
struct World::Lane {
  int64_t begin, next, best;  // positions
  int64_t safe, end;          // a match that begins up to `safe` cannot pass the end of the text
  int64_t id;
  uint32_t base;
  uint16_t* out;
  int64_t number;  // of the text

};

void World::encode(const uint8_t* text, const int64_t* ends, int64_t n, uint16_t* ids, int64_t* id_ends) const {
  const Cell* cells = cells_.data();
  const Entry* pairs = pairs_.data();
  const auto first = [&](int64_t k) { return k ? ends[k - 1] : 0; };
  int64_t waiting = 0;
  // The next text that is long enough to be worth a lane; shorter ones are encoded on the way.
  const auto board = [&](Lane& lane) {
    for (; waiting < n; ++waiting) {
      lane.begin = first(waiting), lane.end = ends[waiting], lane.number = waiting;
      lane.out = ids + lane.begin + waiting;
      if (lane.end - lane.begin > 2 * longest_) break;
      id_ends[waiting] = encode_rest(text + lane.begin, text + lane.end, lane.out) - ids;
    }
    if (waiting == n) return false;
    ++waiting;
    const Entry entry = pairs[text[lane.begin] * 256 + text[lane.begin + 1]];
    lane.next = lane.begin + 2, lane.best = lane.begin + entry.length;
    lane.base = entry.base, lane.id = entry.id;
    lane.safe = lane.end - longest_ - 2;
    return true;
  };
  const auto finish = [&](const Lane& lane) { id_ends[lane.number] = encode_rest(text + lane.begin, text + lane.end, lane.out) - ids; };
  // Three texts take turns, a byte at a time and without a branch on what the byte is: a match ends where no processor can predict it.
  constexpr int LANES = 3;
  Lane lanes[LANES];
  int busy = 0;
  while (busy < LANES && board(lanes[busy])) ++busy;
  while (busy == LANES) {
    for (bool passed = false; !passed;)
#pragma GCC unroll 3
      for (Lane& lane : lanes) {
        const uint8_t c = text[lane.next];
        const Cell cell = cells[lane.base ^ c];
        const Entry entry = pairs[text[lane.best] * 256 + text[lane.best + 1]];  // of the next match, should this one end here
        const int64_t hit = -int64_t(cell.label == c), token = hit & -int64_t(cell.id != 0);
        *lane.out = uint16_t(lane.id);
        lane.out += 1 + hit;
        lane.begin = either(hit, lane.begin, lane.best);
        lane.base = uint32_t(either(hit, cell.base, entry.base));
        lane.id = either(token, cell.id, either(hit, lane.id, entry.id));
        const int64_t next = lane.next + 1;
        lane.next = either(hit, next, lane.best + 2);
        lane.best = either(token, next, lane.best + (entry.length & ~hit));
        passed |= lane.begin > lane.safe;
      }
    for (int k = 0; k < busy;) {
      if (lanes[k].begin <= lanes[k].safe) {
        ++k;
        continue;
      }
      finish(lanes[k]);
      if (!board(lanes[k])) lanes[k] = lanes[--busy];
    }
  }
  for (int k = 0; k < busy; ++k) finish(lanes[k]);
  // Close the gaps.
  uint16_t* out = ids;
  for (int64_t k = 0; k < n; ++k) {
    const int64_t from = first(k) + k, size = id_ends[k] - from;
    std::memmove(out, ids + from, size_t(size) * sizeof *ids);
    out += size;
    *out++ = 0;
    id_ends[k] = out - ids;
  }
}

}  // namespace tokenizer
