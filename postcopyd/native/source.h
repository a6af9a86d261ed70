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
 *   sent   the thread that sets a bit sends the page, so each page is pushed at most once. Cleared
 *          when the connections end, as pages on their way may be lost; pc_source_have then sets it
 *          for pages that the destination has. pc_source_look clears it for pages written since
 * The others come with pc_source_track. Only pc_source_look changes them, while no push thread is
 * at work; each of its threads has words of its own:
 *   hot    written in both of the last two looks: a pass sends these last, since they will be
 *          written again, and the push sends them first, since the guest will want them
 *   warm   written in the last look (during a look `found` gathers those written again)
 *   empty  data that was found discarded: zeros, unless it is found written
 *
 * A pass copies what the last look armed, so the next look finds whatever is written after it was
 * read. There is no look during a pass: the page might be sent again on another connection and
 * arrive there first.
 *
 * Locks: those of `order`, `rate` and `holes`; none is taken within another. */
#ifndef POSTCOPYD_SOURCE_H
#define POSTCOPYD_SOURCE_H

#include "bitmap.h"
#include "engine.h"
#include "order.h"
#include "rate.h"

/* Answers to requests that came together are sent together, at most this many. */
enum { URGENT_PAGES = 16 };

/* Descriptors in /proc of the VMM, if it has RAM without a file, and of its keeper. -1: none. */
struct private {
  int mem, pagemap, status;
  _Atomic int keeper; /* its status */
};

struct pc_source {
  struct pc_stats stats;
  struct region regions[PC_MAX_REGIONS];
  unsigned region_count;
  uint64_t slots;
  _Atomic uint64_t *data, *sent;
  uint64_t *hot, *warm, *found, *empty; /* one allocation; NULL: never tracked */
  struct private private;
  int uffd, pagemap; /* -1: not tracked; the first is borrowed */
  int wake, stop;    /* the first is borrowed; the other ends waits of the threads */
  atomic_bool stopping;
  struct connection connections[PC_MAX_CONNECTIONS];

  uint64_t scanned; /* slot up to which the present scan has come */
  bool losses;      /* the destination understands FRAME_LOST; changed when no thread is at work */
  bool pass;        /* else the push; changed when no push thread is at work */
  _Atomic uint64_t untold; /* slot + 1 of a lost page that the peer cannot be told of; 0: none */
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

/* --- source.c --------------------------------------------------------------------------------- */

/* Fails for a connection that has ended (`failed` is 0) or broken, unless it was to end. */
void connection_failed(struct pc_source *s, struct connection *c, int failed);

/* --- ram.c ------------------------------------------------------------------------------------ */

/* Returns 0 or -errno: what could not be opened. Call private_close after either. */
int private_open(struct private *p, pid_t pid);
void private_close(struct private *p);
/* Returns 0 or -errno; -ENODATA: the RAM file is shorter than the guest's RAM; -ESRCH: no process
 * has that memory any more. */
int read_pages(const struct pc_source *s, const struct region *r, uint64_t page, uint64_t count,
               uint8_t *to);
/* How one thread reads runs of 4 KiB pages. Pages of anonymous memory that were swapped out are put
 * back there once they were read: else reading would bring into memory all that a host which is
 * short of it had put aside. Pages that a fault asks for stay; they are few. */
struct reader {
  int pidfd; /* -1: the VMM has ended, or had nothing swapped out at reader_init */
};
void reader_init(struct reader *d, const struct pc_source *s);
void reader_free(struct reader *d);
int read_run(const struct reader *d, const struct pc_source *s, const struct region *r,
             uint64_t page, uint64_t count, uint8_t *to);
/* How often reading is tried again, when the kernel does not say whether a page is lost or there
 * was no memory to read it with. */
enum { DOUBTS = 50 };
/* Reads one page, as long as it may still be read: reading a page that is swapped out takes memory,
 * which is waited for. For anonymous memory the kernel says EIO both for that and for a lost
 * page; so it is tried `*doubts` times, shared by pages that follow each other. -ECANCELED:
 * stopping. */
int read_surely(struct pc_source *s, const struct region *r, uint64_t page, uint8_t *to,
                unsigned *doubts);
/* Whether this error means that the page is lost, and others need not be. */
bool is_lost(int failed);
void read_failed(struct pc_source *s, const struct region *r, uint64_t page, int failed);
uint32_t largest_page(const struct pc_source *s);

/* --- scan.c ----------------------------------------------------------------------------------- */

/* Scans from beginning to end. False: stopping. */
bool scan_all(struct pc_source *s);

/* --- batch.c ---------------------------------------------------------------------------------- */

/* Frames that are gathered for one write; each thread has its own. */
struct batch {
  uint8_t *pages;
  size_t room, used; /* bytes of `pages`, including zero pages */
  uint64_t bytes;    /* of these, to be sent */
  struct frame frames[RUN_PAGES];
  uint8_t headers[RUN_PAGES][FRAME_BYTES];
  struct iovec iov[2 * RUN_PAGES];
  unsigned count;
  unsigned doubts; /* see read_surely */
};

/* Room for one page, however large, and for at least `bytes`. Returns 0 or -ENOMEM. */
int batch_init(struct batch *b, const struct pc_source *s, size_t bytes);
void batch_free(struct batch *b);
/* Adds the page at `used` in batch->pages, or one that is `lost`; to the last frame if it follows
 * that. */
void batch_add(struct batch *b, const struct pc_source *s, const struct region *r, uint64_t page,
               bool lost);
/* Sends all that was gathered. Returns 0 or -errno of the connection. */
int batch_write(struct pc_source *s, struct batch *b, struct connection *c);
/* Puts one page into a batch that could not be read with others, or says that it is lost. Sends
 * first what was gathered, so that only this page's reader waits for it. Returns 0, -errno of the
 * connection, or 1: do not go on. */
int batch_doubtful(struct pc_source *s, struct batch *b, struct connection *c, struct region *r,
                   uint64_t page);
/* Fails once all else was sent, if the destination could not be told of some lost pages. The last
 * thread to see it reports it: the push that ends, or a request that is answered after that. */
void look_at_untold(struct pc_source *s);

#endif
