/* SPDX-License-Identifier: Apache-2.0 */
/* Asking the source for pages: the requests on the urgent connection, and when each was made. Owns
 * the queue of requests, its lock, and the times; borrows the urgent connection's stream, which
 * belongs to its struct connection, and the engine's record and regions. No thread of its own: the
 * fault threads alone send, so that a request goes out by the thread that has seen the fault, and
 * nobody waits for the socket here. What does not fit waits for room in it. */
#ifndef POSTCOPYD_ASKING_H
#define POSTCOPYD_ASKING_H

#include "engine.h"
#include "record.h"

/* Requests that may wait for room in the urgent socket. A guest has as many faults as threads (and
 * KVM's asynchronous ones); what does not fit is found in the record again. */
enum { REQUESTS_WAITING = 4096 };
/* When a page was asked for, kept for the latency statistics; a collision loses one sample. */
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
  struct stream urgent; /* none while there is none */
  uint8_t waiting[REQUESTS_WAITING * FRAME_BYTES];
  size_t waiting_from, waiting_to;
  uint64_t look_again; /* slot from which on WANTED pages may not be in `waiting` */
  struct {
    _Atomic uint64_t slot_and_one, at_ns;
  } asked[ASKED_SLOTS];
};

void asking_init(struct asking *a, const struct record *record, const struct region *regions,
                 unsigned count, struct pc_stats *stats);
void asking_free(struct asking *a);
/* There is an urgent connection: all that is wanted is asked for, again where it was asked for
 * already. A fault thread does so the next time that it goes round. */
void asking_begin(struct asking *a, struct stream urgent);
void asking_end(struct asking *a);
/* The descriptor to be polled for room, as requests wait for it; -1: none does. */
int asking_waits(struct asking *a);
/* Asks for these pages and sends what waits, as far as the socket takes it. */
void ask(struct asking *a, const struct wanted *pages, unsigned count);

/* A fault has made this page WANTED now; and it is placed. */
void asked_at(struct asking *a, uint64_t slot, uint64_t now);
void asked_answered(struct asking *a, uint64_t slot);

#endif
