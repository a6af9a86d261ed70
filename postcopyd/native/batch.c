/* SPDX-License-Identifier: Apache-2.0 */
/* Makes frames of pages that were read, and sends as many as fit by one write. Each thread has its
 * own batch with a buffer (64 KiB, or one page if that is larger).
 *
 * A page that cannot be read (its memory or its swap is broken, the file was cut short) is lost,
 * and only that page: the destination is told (FRAME_LOST) and all others follow. A pass leaves it
 * out; it counts as data that was not found yet, so the next look finds it and the next pass tries
 * it again, as a running guest may write the page anew. A destination that cannot be
 * told of lost pages is sent all the rest, and then the engine fails. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "source.h"

static bool all_zero(const uint8_t *page, size_t bytes) {
  uint64_t first;
  memcpy(&first, page, sizeof first);
  return first == 0 && memcmp(page, page + sizeof first, bytes - sizeof first) == 0;
}

int batch_init(struct batch *b, const struct pc_source *s, size_t bytes) {
  uint32_t largest = largest_page(s);
  *b = (struct batch){.room = largest > bytes ? largest : bytes, .doubts = DOUBTS};
  b->pages = aligned_alloc(4096, b->room);
  return b->pages ? 0 : -ENOMEM;
}

void batch_free(struct batch *b) {
  free(b->pages);
}

void batch_add(struct batch *b, const struct pc_source *s, const struct region *r, uint64_t page,
               bool lost) {
  uint16_t index = (uint16_t)(r - s->regions);
  uint8_t kind = lost                                            ? FRAME_LOST
                 : all_zero(b->pages + b->used, r->is.page_size) ? FRAME_ZERO
                                                                 : FRAME_PAGES;
  uint32_t bytes = kind == FRAME_PAGES ? r->is.page_size : 0;
  struct frame *last = b->count ? &b->frames[b->count - 1] : NULL;
  if (last && last->kind == kind && last->region == index && last->page + last->count == page) {
    last->count++;
    last->payload += bytes;
  } else {
    b->frames[b->count++] = (struct frame){
        .kind = kind, .region = index, .page = page, .count = 1, .payload = bytes};
  }
  b->used += r->is.page_size;
  b->bytes += bytes;
}

int batch_write(struct pc_source *s, struct batch *b, struct connection *c) {
  int n = 0;
  uint64_t pages = 0, zero = 0, lost = 0, bytes = b->bytes + b->count * FRAME_BYTES;
  uint8_t *from = b->pages;
  for (unsigned i = 0; i < b->count; i++) {
    struct frame *f = &b->frames[i];
    frame_encode(b->headers[i], f);
    b->iov[n++] = (struct iovec){b->headers[i], FRAME_BYTES};
    if (f->kind == FRAME_PAGES)
      b->iov[n++] = (struct iovec){from, f->payload};
    else
      *(f->kind == FRAME_LOST ? &lost : &zero) += f->count;
    from += (uint64_t)f->count * s->regions[f->region].is.page_size;
    pages += f->count;
  }
  b->count = 0, b->used = 0, b->bytes = 0;
  int failed = n ? write_all(c->stream, b->iov, n) : 0;
  if (failed)
    return failed;
  count_add(s->stats.transferred_bytes, bytes);
  if (!c->urgent && s->pass) {
    count_add(s->stats.precopied_pages, pages - zero);
    count_add(s->stats.passed_pages, pages);
    return 0;
  }
  count_add(s->stats.zero_pages, zero);
  count_add(s->stats.lost_pages, lost);
  if (c->urgent)
    count_add(s->stats.urgent_pages, pages - zero - lost);
  else
    count_add(s->stats.pushed_pages, pages - zero - lost);
  return 0;
}

static void untold_failed(struct pc_source *s, uint64_t slot) {
  struct region *r = s->regions + s->region_count - 1;
  while (slot < r->first)
    r--;
  engine_fail(&s->stats, s->wake, PC_MEMORY, "page %llu of region %d, and perhaps others, cannot be "
              "read any more, and the version at the destination cannot be told of that; all else "
              "was sent", (unsigned long long)(slot - r->first), (int)(r - s->regions));
}

void look_at_untold(struct pc_source *s) {
  uint64_t untold = atomic_load(&s->untold);
  pthread_mutex_lock(&s->holes.lock);
  bool begun = s->holes.state == HOLES_SENT;
  pthread_mutex_unlock(&s->holes.lock);
  if (untold && begun && !s->pass && !atomic_load(&s->stopping) &&
      !__atomic_load_n(&s->stats.pushing, __ATOMIC_SEQ_CST))
    untold_failed(s, untold - 1);
}

int batch_doubtful(struct pc_source *s, struct batch *b, struct connection *c, struct region *r,
                   uint64_t page) {
  uint64_t slot = r->first + page;
  bool pass = !c->urgent && s->pass; /* while urgent pages are read s->pass may change */
  if (!c->urgent)
    rate_pay(&s->rate, b->bytes);
  int failed = batch_write(s, b, c);
  if (failed)
    return failed;
  failed = pass ? read_pages(s, r, page, 1, b->pages)
                : read_surely(s, r, page, b->pages, &b->doubts);
  if (failed && pass && (is_lost(failed) || failed == -ENOMEM)) {
    /* For the next look to find. In this order, or this pass finds it again. */
    bit_clear(s->data, slot);
    bit_clear(s->sent, slot);
    return 0;
  }
  if (failed && !is_lost(failed)) {
    read_failed(s, r, page, failed);
    return 1;
  }
  if (failed && !s->losses) {
    atomic_store(&s->untold, slot + 1);
    look_at_untold(s);
  } else {
    batch_add(b, s, r, page, failed);
  }
  return 0;
}
