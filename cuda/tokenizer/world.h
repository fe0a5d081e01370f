// Greedy longest match over a vocabulary of byte strings: RWKV's World tokenizer.
#pragma once
#include <stdint.h>

#include <vector>

namespace tokenizer {

// A trie in a double array: the child of a node by byte c lies in cells[base ^ c], if that cell's label is c. Bases are unique to
// their nodes (but of leaves, which share one that leads nowhere) and no free cell has a label that some base reaches, so the
// label alone tells.
class World {
 public:
  // Tokens 1 to n, one after the other in `bytes`. `complete()` says whether all 256 single bytes are among them: only then
  // does every text have ids, and only then may encode be called.
  World(const uint8_t* bytes, const int64_t* lengths, int64_t n);
  bool complete() const { return complete_; }

  // Texts one after the other in `text`, the k-th from ends[k - 1] (or 0) to ends[k]. Writes the ids of each, followed by a 0, one
  // after the other to ids, which needs room for ends[n - 1] + n of them, and where the k-th stops to id_ends[k].
  void encode(const uint8_t* text, const int64_t* ends, int64_t n, uint16_t* ids, int64_t* id_ends) const;

 private:
  struct Cell {
    uint32_t base;
    uint16_t id;  // of the token that ends here, or 0
    uint8_t label;
    bool used;
  };
  // What the first two bytes of a match lead to.
  struct Entry {
    uint32_t base;
    uint16_t id;
    uint8_t length;  // of that id's token: 1 or 2
    bool goes_on;    // whether longer tokens begin with the two bytes
  };
  struct Lane;
  // The same for the rest of one text; returns where its ids end.
  uint16_t* encode_rest(const uint8_t* at, const uint8_t* end, uint16_t* ids) const;

  std::vector<Cell> cells_;
  std::vector<Entry> pairs_ = std::vector<Entry>(65536);  // by first byte * 256 + second byte
  uint16_t single_[256] = {};                            // ids of the single bytes
  int64_t longest_ = 0;                                  // bytes
  bool complete_ = false;
};

}  // namespace tokenizer
