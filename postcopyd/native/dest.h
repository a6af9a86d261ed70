/* SPDX-License-Identifier: Apache-2.0 */
/* The destination's engine, as its files see it:
 *
 *   uffd_native.c  faults, and pages that are placed: threads pc-faults
 *   asking.c       requests to the source
 *   receive.c      frames from the source: threads pc-urgent and pc-receive
 *   settle.c       places pages that came before the guest: thread pc-place
 *   pages.c        what the session asks and decides about pages
 *   dest.c         life: owns all of the below, starts all threads but pc-place, joins all
 *   record.c, backing.c, place.c   know none of these
 *
 * The only lock is that of `asking`. All else that several threads change is the record's bytes,
 * counters and flags, by atomic operations.
 *
 * On failure nothing here ever closes a userfaultfd, or unregisters memory that a guest may have
 * touched: a guest whose engine has stopped waits and does not read zeros. */
#ifndef POSTCOPYD_DEST_H
#define POSTCOPYD_DEST_H

#include "asking.h"
#include "backing.h"
#include "engine.h"
#include "place.h"
#include "record.h"

struct fault_thread {
  struct pc_dest *dest;
  int uffd; /* borrowed */
  bool running;
  pthread_t thread;
  _Atomic uint64_t turned_ns; /* when it last went round; UINT64_MAX once it has ended */
};

struct pc_dest {
  struct pc_stats stats;
  struct region regions[PC_MAX_REGIONS];
  unsigned region_count;
  struct record record;
  struct backing backings[PC_MAX_REGIONS]; /* of the regions */
  unsigned backing_count;
  const uint8_t *zeros; /* a 2 MiB page of zeros */
  int wake;             /* borrowed: tells Python */
  int notice;           /* tells the fault threads: a new urgent connection, or to stop */
  atomic_bool stopping, ending; /* the engine; the connections */
  unsigned registered;          /* number of regions, from the first on */
  bool gone[PC_MAX_REGIONS];    /* regions that the VMM has unmapped; set and read by the session */

  struct fault_thread takers[PC_MAX_REGIONS];
  unsigned taker_count;
  pthread_t settler;
  bool settler_started;
  atomic_bool settling;

  struct connection connections[PC_MAX_CONNECTIONS];
  struct asking asking;
};

static inline const struct backing *backing_of(const struct pc_dest *d, const struct region *r) {
  return &d->backings[r - d->regions];
}

/* Whether a receiving thread is to end, and so to stop waiting for memory. */
static inline bool shall_stop(struct pc_dest *d) {
  return atomic_load(&d->stopping) || atomic_load(&d->ending) || atomic_load(&d->record.foreign);
}

/* --- threads ---------------------------------------------------------------------------------- */

void *faults_run(void *fault_thread); /* pc_dest_stop ends it */
void *receive_run(void *connection);  /* pc_dest_disconnect ends it */

/* --- uffd_native.c: pages that a thread has claimed -------------------------------------------- */

/* Pages that have come after the seal, and that this thread has claimed. */
struct arrived {
  uint64_t page, count;
  const uint8_t *from; /* NULL: zeros, one page */
  uint8_t were;        /* their bits in the record before, or-ed together */
  bool urgent;
};
/* Places and confirms them. False: it has failed, or was called off. */
bool deliver(struct pc_dest *d, struct region *r, const struct arrived *a);
/* Makes a memory error of one page, and notes it. If a page is there already it may be the error
 * that a killed engine has left, so it becomes LOST too. */
enum meaning poison_page(struct pc_dest *d, struct region *r, uint64_t page, struct placing *p);

/* Notes pages as placed, or (`lost`) as memory errors, and wakes threads that wait since. */
void confirm(struct pc_dest *d, struct region *r, uint64_t page, uint64_t count, bool lost);
/* Notes HERE pages that are placed, or are zeros (not `cached`) and stay holes. */
void confirm_here(struct pc_dest *d, struct region *r, uint64_t page, uint64_t count, bool cached);
/* Gives claimed pages back unplaced; HERE pages as they were. */
void give_back(struct pc_dest *d, struct region *r, uint64_t page, uint64_t count);
void give_back_here(struct pc_dest *d, struct region *r, uint64_t page, uint64_t count);
/* Adds to the counts what changes of the record owe them; tells Python when all pages are here. */
void count_owed(struct pc_dest *d, const struct owed *o);

/* Called after placing pages that this thread had claimed, all of them BEGUN or none. False: some
 * were in guest memory already and nothing explains that. */
bool explained(struct pc_dest *d, struct region *r, const struct placing *p);
/* Whether placing may succeed a while later: there is no memory now (the guest waits rather than
 * lose a page), or the VMM is changing its mappings. */
bool shall_try_again(struct pc_dest *d, enum meaning is);
/* Waits for that while. */
void wait_to_try(enum meaning is);
/* Both, for a receiving thread. False: it must not go on. */
bool patient(struct pc_dest *d, enum meaning is);
void place_failed(struct pc_dest *d, struct region *r, uint64_t page, int error);
void foreign_failed(struct pc_dest *d);
/* Fails when all pages are here but LOST ones of which no memory errors can be made: nothing more
 * can come. Pages that came early count as here until settling starts, since a guest of a precopy
 * runs only when it is whole. */
void look_at_unpoisoned(struct pc_dest *d);

#endif
