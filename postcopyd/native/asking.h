/* SPDX-License-Identifier: Apache-2.0 */
/* Asks the source for pages: the requests on the urgent connection, and when each was made. Owns
 * the queue of requests, its lock, and the times; borrows the urgent connection's stream, which
 * belongs to its struct connection, and the engine's record and regions. Has no thread of its own:
 * only fault threads send, so that the thread that has read a fault sends the request for it.
 * Nobody waits for the socket here: requests that do not fit stay in the queue until it has
 * room. */
#ifndef POSTCOPYD_ASKING_H
#define POSTCOPYD_ASKING_H

#include "engine.h"
#include "record.h"

/* Requests that may wait for room in the urgent socket. A guest has as many faults as threads (and
 * KVM's asynchronous ones); requests that do not fit are found in the record again. */
enum { REQUESTS_WAITING = 4096 };
/* Times of requests, kept for the latency statistics; a collision loses one sample. */
enum { ASKED_SLOTS = 4096 };

struct wanted {
  struct region *region;
  uint64_t page;
};

struct asking {
  const struct record *record;
  const struct region *regions;
  unsigned region_count;
  struct pc_stats *stats;
  pthread_mutex_t lock; /* guards the next five */
  struct stream urgent; /* fd -1 while there is no connection */
  uint8_t waiting[REQUESTS_WAITING * FRAME_BYTES];
  size_t waiting_from, waiting_to;
  uint64_t look_again; /* WANTED pages from this slot on may be missing in `waiting` */
  struct {
    _Atomic uint64_t slot_and_one, at_ns;
  } asked[ASKED_SLOTS];
};

void asking_init(struct asking *a, const struct record *record, const struct region *regions,
                 unsigned count, struct pc_stats *stats);
void asking_free(struct asking *a);
/* There is a new urgent connection: all WANTED pages are to be asked for, also those asked for
 * before. A fault thread does that the next time that it goes round. */
void asking_begin(struct asking *a, struct stream urgent);
void asking_end(struct asking *a);
/* The descriptor to poll for room, if requests wait for that; else -1. */
int asking_waits(struct asking *a);
/* Asks for these pages, and sends waiting requests as far as the socket takes them. */
void ask(struct asking *a, const struct wanted *pages, unsigned count);

/* Notes that a fault has just made this page WANTED; and that it is placed. */
void asked_at(struct asking *a, uint64_t slot, uint64_t now);
void asked_answered(struct asking *a, uint64_t slot);

#endif
