/* SPDX-License-Identifier: Apache-2.0 */
/* Puts a page into the guest's page tables: one call of the kernel, and what its answer means. Owns
 * nothing; knows nothing of records, connections and threads, and never waits. */
#ifndef POSTCOPYD_PLACE_H
#define POSTCOPYD_PLACE_H

#include <stdbool.h>
#include <stdint.h>

#include "engine.h"

enum verb {
  COPY,     /* UFFDIO_COPY: these bytes, in a new page */
  ZERO,     /* UFFDIO_ZEROPAGE where there is a hole; on hugetlbfs, which lacks it, COPY of zeros */
  CONTINUE, /* UFFDIO_CONTINUE: what the file has there; takes no new page */
  POISON,   /* UFFDIO_POISON: a memory error */
};

/* What the kernel has answered, as far as a caller can act on it. */
enum meaning {
  PLACED, /* all is dealt with: placed, there already, or (CONTINUE) a hole */
  AGAIN,  /* the VMM is changing its mappings: try again at once */
  LATER,  /* there is no memory now */
  BROKEN, /* CONTINUE: the file's page cannot be read any more (its memory or its swap is broken) */
  NEVER,  /* POISON: this kernel cannot make memory errors (before Linux 6.6) */
  GONE,   /* the VMM's address space is gone */
  WRONG,  /* nothing that should happen; `error` says what */
};

struct placing {
  uint64_t done;     /* pages dealt with */
  uint64_t existing; /* of these, there already: left alone */
  uint64_t first_existing; /* the first of them, a page of the region */
  uint64_t holes;    /* of these, nothing was there for CONTINUE: left alone */
  int error;         /* errno of the last call that was not PLACED */
};

/* Puts `count` pages from `page` on into the guest, and wakes the threads that wait for them, even
 * for one that was there already. COPY takes them from `from`; ZERO on hugetlbfs takes each from
 * there. `p` is set, whatever is returned. */
enum meaning place(const struct region *r, enum verb verb, uint64_t page, uint64_t count,
                   const uint8_t *from, struct placing *p);

/* Threads that wait for this page, or for any page of the region, touch it again. */
void wake_page(const struct region *r, uint64_t page);
void wake_all(const struct region *r);

#endif
