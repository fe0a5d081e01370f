// A strict parser of JSON lines in one pass over their bytes, eight at a time where they are plain.
#include "jsonl.h"

#include <cstring>

namespace tokenizer {
namespace {

constexpr int DEEPEST = 32;
constexpr int64_t LONGEST_NUMBER = 300;

// Whether one of eight bytes ends a plain ASCII run of a string: a quote, a backslash, a control character, a byte above 127.
bool has_special(uint64_t eight) {
  constexpr uint64_t ONES = 0x0101010101010101, HIGH = 0x8080808080808080;
  const auto zero = [](uint64_t x) { return (x - ONES) & ~x; };
  return ((eight - ONES * 0x20) | zero(eight ^ ONES * '"') | zero(eight ^ ONES * '\\') | eight) & HIGH;
}

// Length of the UTF-8 sequence of two to four bytes that stands here, or 0 if it is not valid (Unicode 15, table 3-7).
int64_t sequence(const uint8_t* at, const uint8_t* end) {
  const auto follows = [&](int k, uint8_t low = 0x80, uint8_t high = 0xBF) { return at + k < end && at[k] >= low && at[k] <= high; };
  const uint8_t c = at[0];
  if (c < 0xC2) return 0;
  if (c < 0xE0) return follows(1) ? 2 : 0;
  if (c < 0xF0) return follows(1, c == 0xE0 ? 0xA0 : 0x80, c == 0xED ? 0x9F : 0xBF) && follows(2) ? 3 : 0;
  if (c < 0xF5) return follows(1, c == 0xF0 ? 0x90 : 0x80, c == 0xF4 ? 0x8F : 0xBF) && follows(2) && follows(3) ? 4 : 0;
  return 0;
}

uint8_t* put(uint32_t point, uint8_t* to) {
  if (point < 0x80) {
    *to++ = uint8_t(point);
    return to;
  }
  const int more = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
  constexpr uint8_t MARK[] = {0, 0xC0, 0xE0, 0xF0};
  *to++ = uint8_t(MARK[more] | point >> 6 * more);
  for (int k = more - 1; k >= 0; --k) *to++ = uint8_t(0x80 | (point >> 6 * k & 0x3F));
  return to;
}

// One line. Every function returns false where the line is not for us.
struct Parser {
  const uint8_t *at, *end;

  void blanks() {
    while (at < end && (*at == ' ' || *at == '\t' || *at == '\r')) ++at;
  }

  bool eat(char c) {
    if (at == end || *at != uint8_t(c)) return false;
    ++at;
    return true;
  }

  bool word(const char* letters) {
    while (*letters)
      if (!eat(*letters++)) return false;
    return true;
  }

  bool hex(uint32_t& value) {
    value = 0;
    for (int k = 0; k < 4; ++k, ++at) {
      if (at == end) return false;
      const uint8_t c = *at, lower = c | 0x20;
      if (c >= '0' && c <= '9') value = value * 16 + (c - '0');
      else if (lower >= 'a' && lower <= 'f') value = value * 16 + (lower - 'a' + 10);
      else return false;
    }
    return true;
  }

  // Behind a backslash. Half of a pair of surrogates alone is refused, though JSON allows it.
  bool escape(uint8_t*& to) {
    if (at == end) return false;
    static constexpr char FROM[] = "\"\\/bfnrt", TO[] = "\"\\/\b\f\n\r\t";
    const uint8_t c = *at++;
    if (c != 'u') {
      const void* found = c ? std::memchr(FROM, c, 8) : nullptr;
      if (found) *to++ = uint8_t(TO[static_cast<const char*>(found) - FROM]);
      return found;
    }
    uint32_t point, low;
    if (!hex(point)) return false;
    if (point >= 0xD800 && point < 0xE000) {
      if (point >= 0xDC00 || !word("\\u") || !hex(low) || low < 0xDC00 || low >= 0xE000) return false;
      point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
    }
    to = put(point, to);
    return true;
  }

  // Behind the opening quote. What it writes is never longer than what it reads.
  bool string(uint8_t*& to) {
    for (;;) {
      for (uint64_t eight; end - at >= 8; at += 8, to += 8) {
        std::memcpy(&eight, at, 8);
        if (has_special(eight)) break;
        std::memcpy(to, &eight, 8);
      }
      if (at == end || *at < 0x20) return false;
      if (*at >= 0x80) {
        const int64_t n = sequence(at, end);
        if (!n) return false;
        for (int64_t k = 0; k < n; ++k) *to++ = *at++;
        continue;
      }
      const uint8_t c = *at++;
      if (c == '"') return true;
      if (c != '\\') *to++ = c;
      else if (!escape(to)) return false;
    }
  }

  bool digits() {
    const uint8_t* first = at;
    while (at < end && *at >= '0' && *at <= '9') ++at;
    return at > first;
  }

  bool number() {
    const uint8_t* first = at;
    eat('-');
    if (!eat('0') && !digits()) return false;
    if (eat('.') && !digits()) return false;
    if (eat('e') || eat('E')) {
      if (!eat('+')) eat('-');
      if (!digits()) return false;
    }
    return at - first <= LONGEST_NUMBER;
  }

  // Any value; `scratch` has room for its strings.
  bool skip(uint8_t* scratch, int depth) {
    if (at == end || depth > DEEPEST) return false;
    switch (*at) {
      case '"': ++at; return string(scratch);
      case 't': return word("true");
      case 'f': return word("false");
      case 'n': return word("null");
      case '{':
      case '[': break;
      default: return number();
    }
    const bool object = *at++ == '{';
    const char close = object ? '}' : ']';
    blanks();
    if (eat(close)) return true;
    for (;;) {
      if (object) {
        uint8_t* to = scratch;
        if (!eat('"') || !string(to)) return false;
        blanks();
        if (!eat(':')) return false;
        blanks();
      }
      if (!skip(scratch, depth + 1)) return false;
      blanks();
      if (eat(close)) return true;
      if (!eat(',')) return false;
      blanks();
    }
  }

  // The whole line; moves `to` behind the text.
  bool line(const uint8_t* key, int64_t key_size, uint8_t*& to) {
    bool found = false;
    if (!eat('{')) return false;
    do {
      blanks();
      if (!eat('"')) return false;
      const uint8_t* name = at;
      uint8_t* scratch = to;
      if (!string(scratch)) return false;
      const int64_t size = at - 1 - name;
      if (std::memchr(name, '\\', size_t(size))) return false;
      blanks();
      if (!eat(':')) return false;
      blanks();
      if (size == key_size && !std::memcmp(name, key, size_t(size))) {
        if (found || !eat('"') || !string(to)) return false;
        found = true;
      } else if (!skip(to, 0)) {
        return false;
      }
      blanks();
    } while (eat(','));
    if (!eat('}')) return false;
    blanks();
    return found && at == end;
  }
};

}  // namespace

int64_t jsonl_texts(const uint8_t* block, int64_t size, const uint8_t* key, int64_t key_size, uint8_t* text, int64_t* ends,
                    int64_t* lines) {
  int64_t n = 0;
  uint8_t* to = text;
  const uint8_t *at = block, *end = block + size;
  for (int64_t line = 0; at < end; ++line) {
    const void* newline = std::memchr(at, '\n', size_t(end - at));
    const uint8_t* stop = newline ? static_cast<const uint8_t*>(newline) : end;
    Parser parser{at, stop};
    parser.blanks();
    if (parser.at < stop) {
      if (!parser.line(key, key_size, to)) return -1;
      ends[n] = to - text;
      lines[n++] = line;
    }
    at = newline ? stop + 1 : end;
  }
  return n;
}

}  // namespace tokenizer
