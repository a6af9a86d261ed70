/* SPDX-License-Identifier: Apache-2.0 */
/* What is pushed next: here it is decided, and nowhere else. On from the page asked for last, because
 * a guest goes on near where it was, else on from where the push is; around, until every page was
 * sent. Pages that will be written again soon are sent last in a pass; the push sends them first, as
 * the guest will want them; but those near a page asked for go before either.
 *
 * Owns the cursor and its lock; borrows the bitmaps and the regions. Who takes a page's bit in `sent`
 * sends it: this does so for the push threads, and a request for the thread that answers it. */
#ifndef POSTCOPYD_ORDER_H
#define POSTCOPYD_ORDER_H

#include "bitmap.h"
#include "engine.h"

/* Bytes of pages in one push frame: one COPY places them while the guest waits for its mmap lock;
 * 256 KiB were seen to hold a busy guest up for 10 ms, 64 KiB for 3 ms. */
enum { RUN_BYTES = 64 << 10, RUN_PAGES = RUN_BYTES / 4096 };

struct order {
  struct region *regions;
  uint64_t slots;
  const _Atomic uint64_t *data;
  _Atomic uint64_t *sent;
  const uint64_t *hot; /* written again and again; NULL: that is not known */
  _Atomic int64_t hint; /* slot after the last page asked for; -1: used up */
  pthread_mutex_t lock; /* guards what follows */
  uint64_t cursor;
  bool data_only;
  enum which { ANY, HOT, COLD } now; /* these, until there are none; ANY then */
};

void order_init(struct order *o, struct region *regions, uint64_t slots,
                const _Atomic uint64_t *data, _Atomic uint64_t *sent);
void order_free(struct order *o);
/* A pass begins, from the first page, and leaves holes out; or (not `pass`) the push, from where it
 * is. No push thread is at work, or the push goes on with more of them. */
void order_begin(struct order *o, bool pass, const uint64_t *hot);
static inline void order_hint(struct order *o, uint64_t slot) {
  atomic_store_explicit(&o->hint, (int64_t)slot, memory_order_relaxed);
}
/* Takes the next run of pages of one region, RUN_BYTES at most. False: there are none. */
bool order_next(struct order *o, struct region **region, uint64_t *page, uint64_t *count);

#endif
