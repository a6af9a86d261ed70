/* SPDX-License-Identifier: Apache-2.0 */
/* What is behind a region of the guest's memory, and by which way a page gets from there to the
 * guest. Owns the memfd and the mapping of it; the RAM file is the session's. Knows no record, no
 * connections and no threads, and never waits.
 *
 *   kind      pages that come before the seal    and after it             placed by
 *   DIRECT    none: the engine is not staged     copied into the guest    COPY
 *   IN_FILE   put into the guest's RAM file      the same                 CONTINUE
 *   ASIDE     put into a memfd, as the guest's   copied into the guest    COPY, then the memfd's
 *             memory is anonymous                                         page is dropped
 *
 * Of IN_FILE the VMM has nothing mapped before a page is placed, so nobody sees what is put there.
 * What is there is not always mapped afterwards: the kernel reclaims pages, splits huge ones, and
 * gives a page neighbours that are zeros (a huge page of tmpfs). So where zeros belong, what the
 * file has is placed, and zeros only where it has a hole: discarded by the guest.
 *
 * A file is written, never touched through a mapping: where no page can be had that is an error, and
 * no SIGBUS. What is written is charged to this process's memory cgroup, unlike UFFDIO_COPY. */
#ifndef POSTCOPYD_BACKING_H
#define POSTCOPYD_BACKING_H

#include <stdbool.h>
#include <stdint.h>

#include "place.h"

struct backing {
  enum { DIRECT, IN_FILE, ASIDE } kind;
  bool huge;      /* IN_FILE: hugetlbfs */
  int fd;         /* -1: none */
  int64_t offset; /* of the region in the file, bytes */
  uint64_t bytes;
  uint8_t *at; /* mapped: the memfd, to place from; hugetlbfs, which knows no write(2). Or NULL */
  const uint8_t *zeros; /* one page of them, at least; borrowed */
};

/* Returns 0 or -errno; backing_close in either case. */
int backing_open(struct backing *b, const struct region *r, bool staged, const uint8_t *zeros);
void backing_close(struct backing *b);

/* Puts pages of the region there; or makes zeros of what is there. Never of DIRECT. -ENOMEM or
 * -ENOSPC: no page can be had. Zeros of hugetlbfs are written, as a hole punched into it gives the
 * reservation away. */
int backing_put(const struct backing *b, const struct region *r, uint64_t page, uint64_t count,
                const uint8_t *from);
int backing_clear(const struct backing *b, const struct region *r, uint64_t page, uint64_t count);
/* Places pages: those of `from`, unless they were put there; else (NULL) what was put there. */
enum meaning backing_place(const struct backing *b, const struct region *r, uint64_t page,
                           uint64_t count, const uint8_t *from, struct placing *p);
/* Places zeros where the guest has nothing. *zeros: whether it did, else something was there. */
enum meaning backing_place_zeros(const struct backing *b, const struct region *r, uint64_t page,
                                 bool *zeros, struct placing *p);
/* Pages that were placed from here are nobody's any more. */
void backing_drop(const struct backing *b, const struct region *r, uint64_t page, uint64_t count);

#endif
