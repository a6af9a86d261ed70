/* SPDX-License-Identifier: Apache-2.0 */
/* What the session asks and decides about pages at the destination: which are there, which are old,
 * that the guest is handed over, that pages are given up or not needed any more. Owns nothing; each
 * is one call by the session's thread. No receiving thread may have a page in hand that is given
 * up, so there must be no connections. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>

#include "dest.h"

/* The region, if these pages are in it, or NULL. */
static struct region *region_of(struct pc_dest *d, unsigned region, uint64_t first,
                                uint64_t count) {
  struct region *r = region < d->region_count ? &d->regions[region] : NULL;
  return r && first <= r->is.pages && count <= r->is.pages - first ? r : NULL;
}

int pc_dest_have(struct pc_dest *d, unsigned region, uint64_t first, uint64_t count,
                 uint8_t *bits) {
  struct region *r = region_of(d, region, first, count);
  if (!r)
    return -EINVAL;
  record_have(&d->record, r->first + first, count, bits);
  return 0;
}

int pc_dest_stale(struct pc_dest *d, unsigned region, uint64_t first, uint64_t count,
                  const uint8_t *bits) {
  struct region *r = region_of(d, region, first, count);
  struct owed o = {0};
  if (!r)
    return -EINVAL;
  if (record_sealed(&d->record))
    return -EBUSY;
  for (uint64_t i = 0; i < count; i++) {
    if (i % 8 == 0 && !bits[i / 8]) {
      i += 7;
      continue;
    }
    if (!(bits[i / 8] >> i % 8 & 1))
      continue;
    while (!record_stale(&d->record, r->first + first + i, &o)) /* as long as a write takes */
      sched_yield();
  }
  count_owed(d, &o);
  return 0;
}

int pc_dest_seal(struct pc_dest *d) {
  if (record_sealed(&d->record))
    return 0;
  record_seal(&d->record);
  /* Threads that have faulted fault again, and are answered. */
  for (struct region *r = d->regions; r < d->regions + d->registered; r++)
    wake_all(r);
  return 0;
}

/* Whether pages may be given up. FOREIGN pages stay CLAIMED. */
static bool quiet(struct pc_dest *d) {
  for (unsigned i = 0; i < PC_MAX_CONNECTIONS; i++)
    if (d->connections[i].stream.fd >= 0)
      return false;
  return record_sealed(&d->record) && !atomic_load(&d->record.foreign);
}

/* Gives up a claimed run of missing pages, as many as it can. Returns 0 or -errno. */
static int poison_run(struct pc_dest *d, struct region *r, uint64_t page, uint64_t run,
                      struct placing *p) {
  enum meaning is = place(r, POISON, page, run, NULL, p);
  /* A page that is there already may be the error that a killed engine has left: it is LOST too. */
  confirm(d, r, page, p->done, true);
  count_add(d->stats.lost_pages, p->done);
  for (uint64_t i = page + p->done; i < page + run; i++)
    record_unclaim(&d->record, r->first + i);
  if (is == AGAIN) {
    sched_yield(); /* the caller goes on from the page that failed */
  } else if (is == NEVER) {
    engine_fail(&d->stats, d->wake, PC_MEMORY, "giving up the pages that lack: this kernel "
                "has no UFFDIO_POISON, Linux 6.6 or later is needed");
    return -EINVAL;
  } else if (is != PLACED) {
    place_failed(d, r, page + p->done, p->error);
    return -p->error;
  }
  return 0;
}

int64_t pc_dest_poison(struct pc_dest *d) {
  int64_t poisoned = 0;
  if (!quiet(d))
    return -EBUSY;
  for (struct region *r = d->regions; r < d->regions + d->region_count; r++)
    for (uint64_t page = 0, run; page < r->is.pages;) {
      struct placing p;
      /* Claimed first: otherwise an engine after a kill would take the errors for FOREIGN. */
      for (run = 0; page + run < r->is.pages &&
                    record_claim_lacking(&d->record, r->first + page + run);)
        run++;
      if (!run) {
        page++;
        continue;
      }
      int failed = poison_run(d, r, page, run, &p);
      if (failed)
        return failed;
      poisoned += (int64_t)(p.done - p.existing);
      page += p.done;
    }
  return poisoned;
}

/* Only the thread that places staged pages may have pages in hand: it finds the region gone too,
 * and gives them back. */
int pc_dest_gone(struct pc_dest *d, unsigned region) {
  struct region *r = region_of(d, region, 0, 0);
  struct owed o = {0};
  if (!r)
    return -EINVAL;
  if (!quiet(d))
    return -EBUSY;
  d->gone[region] = true;
  for (uint64_t slot = r->first; slot < r->first + r->is.pages; slot++)
    while (!atomic_load(&d->record.foreign) && !record_give_up(&d->record, slot, &o))
      poll(NULL, 0, 1);
  count_owed(d, &o);
  return 0;
}
