/* SPDX-License-Identifier: Apache-2.0 */
/* The source's engine, as its files see it:
 *
 *   answer.c     answers requests at once: thread pc-urgent
 *   push.c       tells of holes, pushes everything else: threads pc-push; also in a pass, while the
 *                guest runs: then only data, and the session looks in between
 *   order.c      what is pushed next
 *   rate.c       how fast
 *   batch.c      pages and frames that are gathered for one write
 *   ram.c        reads guest RAM
 *   scan.c       finds data, by SEEK_DATA or pagemap
 *   tracking.c   finds what was written: threads pc-look
 *   source.c     life: owns all of the below, starts and joins all threads but pc-look
 *
 * Bitmaps, one bit for each page. Two are changed by atomic operations:
 *   data   found by a scan; a clear bit means hole, after the last scan
 *   sent   who sets it first sends the page; so each is pushed at most once. Cleared when the
 *          connections end, as what was on its way may be lost; pc_source_have then sets it for
 *          what the destination says it has, and by pc_source_look for what was written since
 * The others come with pc_source_track and are changed by pc_source_look only, when no push thread is
 * at work; each of its threads has words of its own:
 *   hot    written in both of the last two looks: a pass sends these last, since they will be
 *          written again, and the push sends them first, since the guest will want them
 *   warm   written in the last look (written again: `found` gathers them while it lasts)
 *   empty  data that was found discarded: zeros, unless it is found written
 *
 * A pass copies what the last look armed, so whatever is written after it was read is found by the
 * next look. No look while a pass is on: the page might be sent again on another connection and
 * arrive there first.
 *
 * Locks: those of `order`, `rate` and `holes`, never one within another. */
#ifndef POSTCOPYD_SOURCE_H
#define POSTCOPYD_SOURCE_H

#include "bitmap.h"
#include "engine.h"
#include "order.h"
#include "rate.h"

/* Answers to requests that came together leave together, at most this many. */
enum { URGENT_PAGES = 16 };

struct pc_source {
  struct pc_stats stats;
  struct region regions[PC_MAX_REGIONS];
  unsigned region_count;
  uint64_t slots;
  _Atomic uint64_t *data, *sent;
  uint64_t *hot, *warm, *found, *empty; /* one allocation; NULL: never tracked */
  int uffd, pagemap; /* -1: not tracked; the first is borrowed */
  int wake, stop;    /* the first is borrowed; the other ends waits of the threads */
  atomic_bool stopping;
  struct connection connections[PC_MAX_CONNECTIONS];

  uint64_t scanned; /* slot up to which the scan that is under way has come */
  bool losses;      /* the destination understands FRAME_LOST; changed when no thread is at work */
  bool pass;        /* else the push; changed when no push thread is at work */
  _Atomic uint64_t untold; /* slot + 1 of a page that it could not be told of; 0: none */
  struct order order;
  struct rate rate;
  struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    enum { HOLES_UNKNOWN, HOLES_SENDING, HOLES_SENT } state;
  } holes;
};

/* --- threads ---------------------------------------------------------------------------------- */

void *urgent_run(void *connection); /* pc_source_disconnect ends both */
void *push_run(void *connection);

/* --- ram.c ------------------------------------------------------------------------------------ */

/* Returns 0 or -errno; -ENODATA: the RAM file is shorter than the guest's RAM. */
int read_pages(const struct region *r, uint64_t page, uint64_t count, uint8_t *to);
/* How often reading is tried again, where the kernel does not say whether a page is lost or there was
 * no memory to read it with. */
enum { DOUBTS = 50 };
/* Reads one page, for as long as it may yet be read: a page that is swapped out takes memory, which
 * is waited for. Anonymous memory says the same (EFAULT) of that and of a page that is lost; so it
 * is tried `*doubts` times, which pages that follow each other share. -ECANCELED: being stopped. */
int read_surely(struct pc_source *s, const struct region *r, uint64_t page, uint8_t *to,
                unsigned *doubts);
/* Whether this page is lost, and no other need be. */
bool is_lost(int failed);
void read_failed(struct pc_source *s, const struct region *r, uint64_t page, int failed);
uint32_t largest_page(const struct pc_source *s);

/* --- scan.c ----------------------------------------------------------------------------------- */

/* From the beginning to the end. False: being stopped. */
bool scan_all(struct pc_source *s);

/* --- batch.c ---------------------------------------------------------------------------------- */

/* Frames being gathered for one write; a thread's own. */
struct batch {
  uint8_t *pages;
  size_t room, used; /* bytes of `pages`, those of zero pages among them */
  uint64_t bytes;    /* to be sent of these */
  struct frame frames[RUN_PAGES];
  uint8_t headers[RUN_PAGES][FRAME_BYTES];
  struct iovec iov[2 * RUN_PAGES];
  unsigned count;
  unsigned doubts; /* see read_surely */
};

/* Room for one page, however large, and at least for `bytes`. Returns 0 or -ENOMEM. */
int batch_init(struct batch *b, const struct pc_source *s, size_t bytes);
void batch_free(struct batch *b);
/* Adds the page that stands in batch->pages at `used`, or is `lost`, to the last frame where it
 * follows it. */
void batch_add(struct batch *b, const struct pc_source *s, const struct region *r, uint64_t page,
               bool lost);
/* Sends all that was gathered. Returns 0 or -errno of the connection. */
int batch_write(struct pc_source *s, struct batch *b, struct connection *c);
/* Puts one page into a batch that could not be read with others, or says that it is lost. What was
 * gathered goes first: nobody waits for this page but who wants it. Returns 0, -errno of the
 * connection, or 1: not to go on. */
int batch_doubtful(struct pc_source *s, struct batch *b, struct connection *c, struct region *r,
                   uint64_t page);
/* Fails once all else was sent, if there are pages that the destination could not be told of. Whoever
 * is the last to see it says so: the push that ends, or a request answered after that. */
void look_at_untold(struct pc_source *s);
void connection_failed(struct pc_source *s, struct connection *c, int failed);

#endif
