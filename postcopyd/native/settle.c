/* SPDX-License-Identifier: Apache-2.0 */
/* Places pages that came before the guest and that no fault asks for, from the first to the last.
 *
 * One thread, pc-place, which pc_dest_settle starts after the seal. It owns the runs that it has
 * claimed, one at a time; a fault on a page of the run waits for all of it. It ends when nothing is
 * left to place, when placing fails, or by pc_dest_stop; it does not depend on connections. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>

#include "dest.h"

/* Bytes that settle_run places at a time; a fault on one of them waits for all. CONTINUE takes 0.2
 * us for a page of 4 KiB in runs from 64 KiB on, which is 100 ms/GiB and 50 us for 512 KiB; page by
 * page it takes 160 ms/GiB. For hugetlbfs it takes 0.1 to 0.3 ms/GiB, 8 us for 64 MiB. A fault on a
 * page that is HERE takes one call beside what any fault takes: of 0.6 us for the page alone (0.5 us
 * for hugetlbfs); with its neighbours (claim_around in uffd_native.c), of a few us. */
enum { SETTLE_BYTES = 512 << 10, SETTLE_HUGE_BYTES = 64 << 20 };

/* Places a claimed run as far as it can; `*placed` pages of it are dealt with. False: it failed. */
static bool settle(struct pc_dest *d, struct region *r, uint64_t page, uint64_t run, bool cached,
                   uint64_t *placed) {
  *placed = cached ? 0 : run; /* zeros stay holes */
  if (!cached)
    confirm_here(d, r, page, run, false);
  while (*placed < run && !atomic_load(&d->stopping)) {
    struct placing p;
    enum meaning is = backing_place(backing_of(d, r), r, page + *placed, run - *placed, NULL, &p);
    if (!explained(d, r, &p))
      return false;
    confirm_here(d, r, page + *placed, p.done, true);
    *placed += p.done;
    if (is == BROKEN && (is = poison_page(d, r, page + *placed, &p)) == PLACED) {
      *placed += 1;
    } else if (is != PLACED && !shall_try_again(d, is)) {
      place_failed(d, r, page + *placed, p.error);
      return false;
    } else if (is != PLACED) {
      wait_to_try(is);
    }
  }
  return true;
}

/* Settles all of a region that is HERE. *passed_by: a fault thread has a page in hand, and may have
 * to give it back unplaced. False: it failed. */
static bool settle_region(struct pc_dest *d, struct region *r, bool *passed_by) {
  const struct record *c = &d->record;
  uint64_t most = (backing_of(d, r)->huge ? SETTLE_HUGE_BYTES : SETTLE_BYTES) >> r->page_shift;
  most = most ? most : 1; /* huge pages of anonymous memory */
  bool good = true;
  for (uint64_t page = 0, run, placed;
       good && page < r->is.pages && !atomic_load(&d->stopping); page += run ? run : 1) {
    uint64_t slot = r->first + page;
    int cached = -1;
    run = 0;
    if (record_none_here(c, slot)) {
      run = 8;
      continue;
    }
    while (run < most && page + run < r->is.pages &&
           record_claim_here(&d->record, slot + run, &cached))
      run++;
    *passed_by |= !run && record_in_hand(c, slot);
    good = settle(d, r, page, run, cached > 0, &placed);
    if (!atomic_load(&d->record.foreign))
      give_back_here(d, r, page + placed, run - placed);
    count_set(d->stats.beat_ns, pc_monotonic_ns());
  }
  return good;
}

static void *settle_run(void *argument) {
  struct pc_dest *d = argument;
  bool passed_by, good = true;
  do {
    passed_by = false;
    for (struct region *r = d->regions; good && r < d->regions + d->region_count; r++)
      good = settle_region(d, r, &passed_by);
    if (passed_by)
      poll(NULL, 0, 1);
  } while (good && passed_by && !atomic_load(&d->stopping));
  atomic_store(&d->settling, false);
  return NULL;
}

int pc_dest_settle(struct pc_dest *d) {
  if (!record_sealed(&d->record))
    return -EBUSY;
  if (!d->record.staged || atomic_load(&d->settling) || atomic_load(&d->record.foreign))
    return 0;
  if (d->settler_started)
    pthread_join(d->settler, NULL);
  atomic_store(&d->settling, true);
  int failed = engine_thread(&d->settler, "pc-place", settle_run, d);
  d->settler_started = !failed;
  if (failed) {
    atomic_store(&d->settling, false);
    engine_fail(&d->stats, d->wake, PC_MEMORY, "starting the thread that places pages: %s",
                strerrordesc_np(-failed));
  }
  return failed;
}
