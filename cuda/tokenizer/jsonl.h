// The texts of a block of JSON lines.
#pragma once
#include <stdint.h>

namespace tokenizer {

// For every line of `block` that is not blank, the value of the key in UTF-8: one after the other in `text` (room: size bytes), where
// each stops in ends, and the number of its line, from 0, in lines (room: one a line). Returns how many there are, or -1 if some line
// is anything but an object, valid to the letter, in which the key occurs once and has a text: then Python's parser must judge.
// So must it on what is valid but rare: keys with escapes, NaN, numbers above 300 digits, nesting above 32.
int64_t jsonl_texts(const uint8_t* block, int64_t size, const uint8_t* key, int64_t key_size, uint8_t* text, int64_t* ends, int64_t* lines);

}  // namespace tokenizer
