/* SPDX-License-Identifier: Apache-2.0 */
/* How a page gets into the guest's page tables: one call of the kernel, and what its answer means.
 * Owns nothing; knows nothing of records, connections and threads, and never waits. */
#ifndef POSTCOPYD_PLACE_H
#define POSTCOPYD_PLACE_H

#include <stdbool.h>
#include <stdint.h>

#include "engine.h"

enum verb {
  COPY,     /* UFFDIO_COPY: these bytes, in a new page */
  ZERO,     /* UFFDIO_ZEROPAGE, or COPY of zeros for hugetlbfs, which has no other: where a hole is */
  CONTINUE, /* UFFDIO_CONTINUE: what the file has there; takes no new page */
  POISON,   /* UFFDIO_POISON: a memory error */
};

/* What the kernel has answered, as far as somebody can act on it. */
enum meaning {
  PLACED, /* all is dealt with: placed, there already, or (CONTINUE) a hole */
  AGAIN,  /* the VMM is changing its mappings: at once */
  LATER,  /* there is no memory now */
  BROKEN, /* CONTINUE: the file's page cannot be read any more (its memory or its swap is broken) */
  NEVER,  /* POISON: this kernel knows no memory errors (before Linux 6.6) */
  GONE,   /* the VMM's address space is */
  WRONG,  /* nothing that should be; `error` says what */
};

struct placing {
  uint64_t done;     /* pages dealt with */
  uint64_t existing; /* of these, there before: left alone */
  uint64_t first_existing; /* the first of them, a page of the region */
  uint64_t holes;    /* of these, nothing was there for CONTINUE: left alone */
  int error;         /* errno of the last call that was not PLACED */
};

/* Puts `count` pages from `page` on into the guest and wakes who waits for them; also who waits for
 * one that was there. COPY takes them from `from`; ZERO, of hugetlbfs, each from there. `p` is set,
 * whatever is returned. */
enum meaning place(const struct region *r, enum verb verb, uint64_t page, uint64_t count,
                   const uint8_t *from, struct placing *p);

/* Who waits for this page, or for any page of the region, touches it again. */
void wake_page(const struct region *r, uint64_t page);
void wake_all(const struct region *r);

#endif
