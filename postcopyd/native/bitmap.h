/* SPDX-License-Identifier: Apache-2.0 */
/* Bitmaps of one bit for each slot, changed by atomic operations. */
#ifndef POSTCOPYD_BITMAP_H
#define POSTCOPYD_BITMAP_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* Sets a bit; true if it was clear. */
static inline bool bit_take(_Atomic uint64_t *map, uint64_t slot) {
  uint64_t bit = 1ull << slot % 64;
  return !(atomic_fetch_or(&map[slot / 64], bit) & bit);
}

static inline void bit_clear(_Atomic uint64_t *map, uint64_t slot) {
  atomic_fetch_and(&map[slot / 64], ~(1ull << slot % 64));
}

static inline uint64_t bits_at(const _Atomic uint64_t *map, uint64_t word) {
  return atomic_load_explicit(&map[word], memory_order_relaxed);
}

/* The part of [from, to) that is in one word: sets *n to its length and returns its bits. */
static inline uint64_t bits_in_word(uint64_t from, uint64_t to, uint64_t *n) {
  *n = 64 - from % 64 < to - from ? 64 - from % 64 : to - from;
  return (*n == 64 ? ~0ull : (1ull << *n) - 1) << from % 64;
}

static inline void bits_set(_Atomic uint64_t *map, uint64_t from, uint64_t to) {
  for (uint64_t slot = from, n; slot < to; slot += n) {
    uint64_t bits = bits_in_word(slot, to, &n);
    atomic_fetch_or(&map[slot / 64], bits);
  }
}

/* The first slot in [from, to) whose bit is `value`, or `to`. */
static inline uint64_t bits_find(const _Atomic uint64_t *map, bool value, uint64_t from,
                                 uint64_t to) {
  while (from < to) {
    uint64_t word = bits_at(map, from / 64);
    word = (value ? word : ~word) >> from % 64;
    if (word) {
      from += (uint64_t)__builtin_ctzll(word);
      return from < to ? from : to;
    }
    from += 64 - from % 64;
  }
  return to;
}

#endif
