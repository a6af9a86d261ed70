/* SPDX-License-Identifier: Apache-2.0 */
/* See order.h. */
#define _GNU_SOURCE
#include "order.h"

enum { NO_HINT = -1 };

void order_init(struct order *o, struct region *regions, uint64_t slots,
                const _Atomic uint64_t *data, _Atomic uint64_t *sent) {
  o->regions = regions, o->slots = slots, o->data = data, o->sent = sent;
  atomic_store(&o->hint, NO_HINT);
  pthread_mutex_init(&o->lock, NULL);
}

void order_free(struct order *o) {
  pthread_mutex_destroy(&o->lock);
}

void order_begin(struct order *o, bool pass, const uint64_t *hot) {
  pthread_mutex_lock(&o->lock);
  o->data_only = pass, o->hot = hot;
  o->now = !hot ? ANY : pass ? COLD : HOT;
  if (pass)
    o->cursor = 0;
  pthread_mutex_unlock(&o->lock);
}

/* Of the 64 pages of a word, those that are to be sent now. */
static uint64_t unsent(const struct order *o, uint64_t word, enum which which) {
  uint64_t pages = ~bits_at(o->sent, word);
  if (o->data_only)
    pages &= bits_at(o->data, word);
  return which == ANY ? pages : pages & (which == HOT ? o->hot[word] : ~o->hot[word]);
}

/* The first such page from the cursor on and around, or `slots`. */
static uint64_t find_unsent(const struct order *o, enum which which) {
  uint64_t words = o->slots / 64, first = o->cursor / 64 % words;
  uint64_t pages = unsent(o, first, which) & ~0ull << o->cursor % 64;
  for (uint64_t i = first, n = 0;; pages = unsent(o, i, which)) {
    if (pages)
      return i * 64 + (uint64_t)__builtin_ctzll(pages);
    if (++n > words)
      return o->slots;
    i = i + 1 == words ? 0 : i + 1;
  }
}

bool order_next(struct order *o, struct region **region, uint64_t *page, uint64_t *count) {
  uint64_t run = 0;
  pthread_mutex_lock(&o->lock);
  int64_t hint = atomic_exchange_explicit(&o->hint, NO_HINT, memory_order_relaxed);
  if (hint != NO_HINT)
    o->cursor = (uint64_t)hint;
  while (!run) {
    enum which which = hint != NO_HINT ? ANY : o->now;
    uint64_t slot = find_unsent(o, which);
    if (slot == o->slots) {
      if (which == ANY)
        break;
      o->now = ANY;
      continue;
    }
    struct region *r = o->regions;
    while (slot >= r->first + r->is.pages) /* bits of the padding behind it are never clear */
      r++;
    uint64_t most = r->is.page_size > RUN_BYTES ? 1 : RUN_BYTES >> r->page_shift;
    while (run < most && slot + run < r->first + r->is.pages &&
           unsent(o, (slot + run) / 64, which) >> (slot + run) % 64 & 1 &&
           bit_take(o->sent, slot + run))
      run++; /* if it stays 0, the urgent thread was faster */
    o->cursor = slot + run;
    *region = r, *page = slot - r->first, *count = run;
  }
  pthread_mutex_unlock(&o->lock);
  return run > 0;
}
