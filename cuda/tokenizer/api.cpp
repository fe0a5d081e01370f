// The C interface, for ctypes. Nothing here throws, and nothing fails but for memory.
#include <memory>
#include <new>

#include "jsonl.h"
#include "world.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using tokenizer::World;

// Null when some single byte is no token, or memory is short. Never freed: a tokenizer lives as long as its process.
EXPORT const World* rwkvlm_world(const uint8_t* bytes, const int64_t* lengths, int64_t n) try {
  auto world = std::make_unique<World>(bytes, lengths, n);
  return world->complete() ? world.release() : nullptr;
} catch (const std::bad_alloc&) {
  return nullptr;
}

EXPORT void rwkvlm_world_encode(const World* world, const uint8_t* text, const int64_t* ends, int64_t n, uint16_t* ids, int64_t* id_ends) {
  world->encode(text, ends, n, ids, id_ends);
}

// Sets seen[id] for every id that occurs.
EXPORT void rwkvlm_occurring(const uint16_t* ids, int64_t n, uint8_t* seen) {
  for (int64_t k = 0; k < n; ++k) seen[ids[k]] = 1;
}

EXPORT int64_t rwkvlm_jsonl_texts(const uint8_t* block, int64_t size, const uint8_t* key, int64_t key_size, uint8_t* text, int64_t* ends,
                                  int64_t* lines) {
  return tokenizer::jsonl_texts(block, size, key, key_size, text, ends, lines);
}
