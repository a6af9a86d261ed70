/* SPDX-License-Identifier: Apache-2.0 */
/* Pushes everything that nobody has asked for: first it tells of the holes, which are not sent;
 * then it sends pages in the order of order.c.
 *
 * Each push connection has one thread, pc-push, for one pass or push. It owns its batch, its reader, and
 * the pages that it has taken until they are sent. It ends when all is sent, when its connection
 * breaks, or by pc_source_disconnect; the last one tells Python. */
#define _GNU_SOURCE
#include <errno.h>

#include "source.h"

/* Zero frames that are being gathered: a run that may still grow, and whole ones before it. */
struct hole_frames {
  struct frame run;
  uint8_t frames[64][FRAME_BYTES];
  unsigned used;
};

/* Ends the run; sends the frames if there are many, or (`all`) if no more will come. */
static int holes_end_run(struct pc_source *s, struct hole_frames *h, struct stream to, bool all) {
  if (h->run.count) {
    frame_encode(h->frames[h->used++], &h->run);
    count_add(s->stats.zero_pages, h->run.count);
    h->run.count = 0;
  }
  struct iovec iov = {h->frames, h->used * sizeof *h->frames};
  if (h->used == 0 || (h->used < 64 && !all))
    return 0;
  count_add(s->stats.transferred_bytes, iov.iov_len);
  h->used = 0;
  return write_all(to, &iov, 1);
}

/* Tells the destination of the holes, one frame for each extent. Takes their pages by words; the
 * urgent thread has answered those that it took. */
static int send_holes(struct pc_source *s, struct stream to) {
  struct hole_frames h = {.run = {.kind = FRAME_ZERO}};
  int failed = 0;
  for (unsigned i = 0; i < s->region_count; i++) {
    struct region *r = &s->regions[i];
    for (uint64_t page = 0; page < r->is.pages && !failed; page += 64) {
      uint64_t hole = ~atomic_load(&s->data[(r->first + page) / 64]);
      if (hole)
        hole &= ~atomic_fetch_or(&s->sent[(r->first + page) / 64], hole);
      while (hole && !failed) {
        unsigned from = (unsigned)__builtin_ctzll(hole);
        uint64_t after = ~hole >> from;
        unsigned n = after ? (unsigned)__builtin_ctzll(after) : 64 - from;
        if (h.run.region != i || h.run.page + h.run.count != page + from || h.run.count >> 31)
          failed = holes_end_run(s, &h, to, false);
        if (!h.run.count)
          h.run.region = (uint16_t)i, h.run.page = page + from;
        h.run.count += n;
        hole &= from + n < 64 ? ~0ull << (from + n) : 0;
      }
    }
  }
  return failed ? failed : holes_end_run(s, &h, to, true);
}

/* One push thread finds the holes and tells of them. The others wait for it, so that no thread
 * reads a page that need not be read. */
static int holes_first(struct pc_source *s, struct stream to) {
  pthread_mutex_lock(&s->holes.lock);
  while (s->holes.state == HOLES_SENDING)
    pthread_cond_wait(&s->holes.changed, &s->holes.lock);
  bool mine = s->holes.state == HOLES_UNKNOWN;
  s->holes.state = mine ? HOLES_SENDING : s->holes.state;
  pthread_mutex_unlock(&s->holes.lock);
  if (!mine)
    return 0;
  /* Scans the stopped guest to its end first: pages without known data are told to be zeros, and a
   * page that was not scanned is no hole. */
  int failed = scan_all(s) ? send_holes(s, to) : -ECANCELED;
  pthread_mutex_lock(&s->holes.lock);
  s->holes.state = HOLES_SENT;
  pthread_cond_broadcast(&s->holes.changed);
  pthread_mutex_unlock(&s->holes.lock);
  return failed;
}

/* Waits until what was sent is paid for. Called before pages are taken, so that it never waits with
 * taken pages in hand. False: stopping. */
static bool may_push(struct pc_source *s) {
  while (!atomic_load(&s->stopping))
    if (rate_wait(&s->rate, s->stop))
      return true;
  return false;
}

void *push_run(void *argument) {
  struct connection *c = argument;
  struct pc_source *s = c->engine;
  struct region *r;
  struct batch b;
  struct reader reader;
  uint64_t page, count;
  reader_init(&reader, s);
  int failed = batch_init(&b, s, RUN_BYTES);
  if (!failed && !s->pass)
    failed = holes_first(s, c->stream);
  while (!failed && may_push(s) && order_next(&s->order, &r, &page, &count)) {
    count_set(s->stats.beat_ns, pc_monotonic_ns());
    int unread = read_run(&reader, s, r, page, count, b.pages);
    for (uint64_t i = 0; i < count && !failed; i++) {
      if (!unread)
        batch_add(&b, s, r, page + i, false);
      else
        failed = batch_doubtful(s, &b, c, r, page + i);
    }
    rate_pay(&s->rate, b.bytes);
    if (!failed)
      failed = batch_write(s, &b, c);
  }
  if (failed < 0)
    connection_failed(s, c, failed);
  batch_free(&b);
  reader_free(&reader);
  if (__atomic_sub_fetch(&s->stats.pushing, 1, __ATOMIC_SEQ_CST) == 0) {
    look_at_untold(s);
    engine_wake(s->wake);
  }
  return NULL;
}
