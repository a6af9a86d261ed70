/* SPDX-License-Identifier: Apache-2.0 */
/* Receives frames from the source: which pages they bring, and whether these are here already.
 *
 * Each connection has one thread. It owns its buffer (2 MiB and what it reads ahead: a header, or
 * 16 pages on the urgent connection), and the pages that it has claimed in the record until they
 * are confirmed or given back. It may wait for memory, and then only its connection waits. It ends
 * with its connection, at a frame that is wrong, or by pc_dest_disconnect, which shuts the
 * connection down and joins the thread. The thread that joins it closes the stream. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>

#include "dest.h"

/* How much is read ahead on the urgent connection: 16 pages of 4 KiB with their headers. */
enum { URGENT_AHEAD = 16 * (4096 + FRAME_BYTES) };
/* Pages of one frame between two looks whether its connection is to end: 24 bytes can name all
 * pages of a guest. */
enum { STEP_PAGES = 1 << 16 };

/* Places the pages of one frame that are not here yet, in runs as long as possible; zeros (payload
 * NULL) one by one. */
static bool receive_pages(struct pc_dest *d, struct region *r, const struct frame *f,
                          const uint8_t *payload, bool urgent) {
  bool cached = payload && backing_of(d, r)->kind == IN_FILE;
  for (uint64_t i = 0, run; i < f->count; i += run) {
    struct arrived a = {.page = f->page + i, .urgent = urgent,
                        .from = payload ? payload + (i << r->page_shift) : NULL};
    uint64_t slot = r->first + a.page;
    bool begun = record_begun(&d->record, slot); /* all of a run or none: see `explained` */
    for (run = 0; i + run < f->count && (payload || run == 0) &&
                  record_begun(&d->record, slot + run) == begun &&
                  record_claim(&d->record, slot + run, cached, &a.were);)
      run++;
    a.count = run;
    if (run && !deliver(d, r, &a))
      return false;
    if (!run) {
      count_add(d->stats.duplicate_pages, 1);
      run = 1;
    }
  }
  return true;
}

/* The source cannot read these pages: each becomes a memory error for whatever touches it. Pages
 * that are here are not lost: one that came before it became unreadable stays. */
static bool receive_lost(struct pc_dest *d, struct region *r, const struct frame *f, bool urgent) {
  for (uint64_t page = f->page; page < f->page + f->count; page++) {
    struct placing p;
    enum meaning is;
    uint8_t was = 0;
    if (!record_claim(&d->record, r->first + page, false, &was)) {
      count_add(d->stats.duplicate_pages, 1);
      continue;
    }
    do
      is = poison_page(d, r, page, &p);
    while (is != PLACED && patient(d, is));
    if (is == PLACED) {
      if (was & WANTED)
        asked_answered(&d->asking, r->first + page);
      if (was & WANTED || urgent)
        count_set(d->stats.last_urgent_ns, pc_monotonic_ns());
    } else if (is == NEVER) {
      record_keep_lost(&d->record, r->first + page);
      look_at_unpoisoned(d);
    } else {
      give_back(d, r, page, 1);
      if (!shall_stop(d))
        place_failed(d, r, page, p.error);
      return false;
    }
  }
  return true;
}

/* Notes pages of zeros and does not place them: the guest stays as sparse as it was. Only a page
 * that a fault waits for is placed. */
static bool receive_zeros(struct pc_dest *d, struct region *r, const struct frame *f, bool urgent) {
  struct owed noted = {0};
  uint64_t twice = 0;
  bool good = true;
  for (uint64_t page = f->page, end = f->page + f->count, n; page < end && good; page += n) {
    bool news;
    n = record_zeros(&d->record, r->first + page, end - page, &news);
    if (n) {
      *(news ? &noted.confirmed : &twice) += n;
      continue;
    }
    struct frame one = {.kind = FRAME_ZERO, .region = f->region, .page = page, .count = 1};
    good = receive_pages(d, r, &one, NULL, urgent);
    n = 1;
  }
  count_add(d->stats.zero_pages, noted.confirmed);
  count_add(d->stats.duplicate_pages, twice);
  noted.present = noted.confirmed;
  count_owed(d, &noted);
  return good;
}

/* Before the seal: puts a run that this thread has claimed in place of what is there. */
static bool put_early(struct pc_dest *d, struct region *r, uint64_t page, uint64_t run,
                      const uint8_t *from, bool cached) {
  struct owed o = {0};
  int failed = from     ? backing_put(backing_of(d, r), r, page, run, from)
               : cached ? backing_clear(backing_of(d, r), r, page, run)
                        : 0; /* a page that is not CACHED is zeros */
  enum put put = failed ? NOTHING_PUT : from ? DATA_PUT : ZEROS_PUT;
  for (uint64_t i = page; i < page + run; i++)
    if (record_early(&d->record, r->first + i, put, &o))
      wake_page(r, i); /* the seal came meanwhile, and a fault */
  count_owed(d, &o);
  if (failed)
    engine_fail(&d->stats, d->wake, PC_MEMORY, "writing page %llu of region %d, before the guest "
                "is handed over: %s", (unsigned long long)page, (int)(r - d->regions),
                strerrordesc_np(-failed));
  return !failed;
}

/* Before the seal: puts the pages of a frame into the backing, in place of what is there. */
static bool receive_early(struct pc_dest *d, struct region *r, const struct frame *f,
                          const uint8_t *payload) {
  for (uint64_t page = f->page, end = f->page + f->count, run; page < end; page += run) {
    struct owed o = {0};
    if (!payload && record_zeros_early(&d->record, r->first + page, end - page, &o)) {
      count_owed(d, &o);
      run = 8;
      continue;
    }
    int cached = -1;
    for (run = 0; page + run < end && record_claim_early(&d->record, r->first + page + run,
                                                         !payload, &cached, &o);)
      run++;
    if (run == 0) { /* another connection has the page: the copy that came last must stay */
      if (record_done(&d->record, r->first + page)) /* no pass sends after the seal */
        run = 1;
      else
        sched_yield();
      continue;
    }
    count_owed(d, &o); /* their copies are old before they are written over */
    const uint8_t *from = payload ? payload + ((page - f->page) << r->page_shift) : NULL;
    if (!put_early(d, r, page, run, from, cached))
      return false;
  }
  count_add(d->stats.passed_pages, f->count);
  return true;
}

/* Receives some pages of a frame. */
static bool receive_part(struct pc_dest *d, struct region *r, const struct frame *f,
                         const uint8_t *payload, bool urgent) {
  if (!record_sealed(&d->record))
    return receive_early(d, r, f, f->kind == FRAME_ZERO ? NULL : payload);
  if (f->kind == FRAME_ZERO)
    return receive_zeros(d, r, f, urgent);
  if (f->kind == FRAME_LOST)
    return receive_lost(d, r, f, urgent);
  return receive_pages(d, r, f, payload, urgent);
}

static bool receive(struct pc_dest *d, const struct frame *f, const uint8_t *payload, bool urgent) {
  struct region *r = f->region < d->region_count ? &d->regions[f->region] : NULL;
  if (!r || f->kind == FRAME_REQUEST ||
      (f->kind == FRAME_LOST && !record_sealed(&d->record)) ||
      !frame_fits(f, r->is.pages, r->is.page_size)) {
    engine_fail(&d->stats, d->wake, PC_BAD_FRAME,
                "the source sent a frame that does not fit the guest: kind %d, region %d, "
                "page %llu, count %u, payload %u",
                f->kind, f->region, (unsigned long long)f->page, f->count, f->payload);
    return false;
  }
  count_add(d->stats.transferred_bytes, FRAME_BYTES + f->payload);
  if (urgent)
    count_add(d->stats.unanswered, -(int64_t)f->count);
  bool good = true;
  struct frame part = *f;
  for (uint64_t done = 0; good && done < f->count; done += part.count) {
    part.page = f->page + done; /* a frame with a payload is less than one step */
    part.count = f->count - done < STEP_PAGES ? f->count - (uint32_t)done : STEP_PAGES;
    good = !shall_stop(d) && receive_part(d, r, &part, payload, urgent);
  }
  return good;
}

void *receive_run(void *argument) {
  struct connection *c = argument;
  struct pc_dest *d = c->engine;
  struct frame_reader reader;
  struct frame f;
  uint8_t *payload;
  int got = frame_reader_init(&reader, c->stream, FRAME_MAX_PAYLOAD,
                              c->urgent ? URGENT_AHEAD : FRAME_BYTES);
  while (got == 0 || got == 1) {
    got = frame_read(&reader, &f, &payload);
    if (got != 1 || !receive(d, &f, payload, c->urgent))
      break;
  }
  if (got == -EPROTO)
    engine_fail(&d->stats, d->wake, PC_BAD_FRAME, "the source sent what is not a frame");
  else if (got <= 0 && !shall_stop(d))
    engine_fail(&d->stats, d->wake, PC_CONNECTION, "the %s connection %s%s",
                c->urgent ? "urgent" : "push", got ? "broke: " : "was closed by the source",
                got ? stream_why(c->stream, got) : "");
  frame_reader_free(&reader);
  return NULL;
}
