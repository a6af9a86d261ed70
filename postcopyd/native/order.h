/* SPDX-License-Identifier: Apache-2.0 */
/* Decides which page is pushed next; push.c has told of the holes before. First one run of pages
 * behind the page that was asked for last, because a guest goes on near where it was. Then pages
 * that are written again and again (hot), as the guest will want them; in a pass these come last.
 * Then all others, from the page sent last on, and around, until every page was sent.
 *
 * Owns the cursor, what it knows to be sent, and their lock; borrows the bitmaps and the regions. The
 * thread that sets a page's bit in `sent` sends the page. Here that is done for push threads, at a
 * request by its thread. */
#ifndef POSTCOPYD_ORDER_H
#define POSTCOPYD_ORDER_H

#include "bitmap.h"
#include "engine.h"

/* Bytes of pages in one push frame. One COPY places them while the guest waits for its mmap lock:
 * 256 KiB were seen to hold up a busy guest for 10 ms, 64 KiB for 3 ms. */
enum { RUN_BYTES = 64 << 10, RUN_PAGES = RUN_BYTES / 4096 };

struct order {
  struct region *regions;
  uint64_t slots;
  const _Atomic uint64_t *data;
  _Atomic uint64_t *sent;
  const uint64_t *hot; /* written again and again; NULL: not known */
  _Atomic int64_t hint; /* slot after the last page asked for; -1: used up */
  pthread_mutex_t lock; /* guards what follows */
  uint64_t cursor;
  bool data_only;
  enum which { ANY, HOT, COLD } now; /* which pages go next; ANY once there are no more of them */
  /* A bit for each word of `sent` in which nothing is left to push, of all pages and of HOT ones. A
   * guest of 1 TiB has four million words. Not in a pass, which may clear a bit of `sent` again.
   * NULL: there was no memory; it only takes longer. */
  uint64_t *spent[2];
};

void order_init(struct order *o, struct region *regions, uint64_t slots,
                const _Atomic uint64_t *data, _Atomic uint64_t *sent);
void order_free(struct order *o);
/* Begins a pass, at the first page and without holes, or (not `pass`) the push, from where it is.
 * No push thread is at work, or the push goes on with more of them. */
void order_begin(struct order *o, bool pass, const uint64_t *hot);
static inline void order_hint(struct order *o, uint64_t slot) {
  atomic_store_explicit(&o->hint, (int64_t)slot, memory_order_relaxed);
}
/* Takes the next run of pages of one region, at most RUN_BYTES. False: there are no more. */
bool order_next(struct order *o, struct region **region, uint64_t *page, uint64_t *count);

#endif
