/* SPDX-License-Identifier: Apache-2.0 */
/* See order.h. */
#define _GNU_SOURCE
#include "order.h"

#include <stdlib.h>
#include <string.h>

enum { NO_HINT = -1 };

void order_init(struct order *o, struct region *regions, uint64_t slots,
                const _Atomic uint64_t *data, _Atomic uint64_t *sent) {
  o->regions = regions, o->slots = slots, o->data = data, o->sent = sent;
  atomic_store(&o->hint, NO_HINT);
  pthread_mutex_init(&o->lock, NULL);
  for (unsigned i = 0; i < 2; i++)
    o->spent[i] = calloc(slots / 64 / 64 + 1, 8);
}

void order_free(struct order *o) {
  pthread_mutex_destroy(&o->lock);
  free(o->spent[0]), free(o->spent[1]);
}

void order_begin(struct order *o, bool pass, const uint64_t *hot) {
  pthread_mutex_lock(&o->lock);
  o->data_only = pass, o->hot = hot;
  o->now = !hot ? ANY : pass ? COLD : HOT;
  if (pass)
    o->cursor = 0;
  for (unsigned i = 0; i < 2 && o->spent[i]; i++)
    memset(o->spent[i], 0, (o->slots / 64 / 64 + 1) * 8);
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
static uint64_t find_unsent(struct order *o, enum which which) {
  uint64_t words = o->slots / 64, i = o->cursor / 64 % words, step = 1;
  uint64_t pages = unsent(o, i, which) & ~0ull << o->cursor % 64;
  uint64_t *spent = o->data_only ? NULL : o->spent[which == HOT];
  for (uint64_t n = 0; !pages && n < words; n += step) {
    i = i + step < words ? i + step : 0;
    step = spent && i % 64 == 0 && words - i >= 64 && spent[i / 64] == ~0ull ? 64 : 1;
    pages = step == 1 ? unsent(o, i, which) : 0;
    if (spent && step == 1 && !pages)
      spent[i / 64] |= 1ull << i % 64;
  }
  return pages ? i * 64 + (uint64_t)__builtin_ctzll(pages) : o->slots;
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
