/* SPDX-License-Identifier: Apache-2.0 */
/* What is behind a region of the guest's memory, and how a page gets from there to the guest. Owns
 * the memfd and its mapping; the RAM file is the session's. Knows no record, no connections and no
 * threads, and never waits.
 *
 *   kind      pages that come before the seal    and after it             placed by
 *   DIRECT    none: the engine is not staged     copied into the guest    COPY
 *   IN_FILE   put into the guest's RAM file      the same                 CONTINUE
 *   ASIDE     put into a memfd, as the guest's   copied into the guest    COPY, then the memfd's
 *             memory is anonymous                                         page is dropped
 *
 * IN_FILE: the VMM maps nothing before a page is placed, so nobody sees what is put into the file.
 * A page that was mapped does not stay so: the kernel reclaims pages, splits huge ones, and gives a
 * page neighbours that are zeros (a huge page of tmpfs). So where zeros belong, the file's own page
 * is placed; zeros are placed only where the file has a hole, as the guest has discarded that page.
 *
 * The kernel writes the file (pwrite, or process_vm_writev for hugetlbfs); nothing is stored through
 * a mapping: if no page can be had, that is an error and not a SIGBUS. Pages that are written are
 * charged to this process's memory cgroup, unlike those of UFFDIO_COPY. */
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
  uint8_t *at; /* mapped: the memfd, to place from; hugetlbfs, as it lacks write(2). Or NULL */
  const uint8_t *zeros; /* at least one page of zeros; borrowed */
};

/* Returns 0 or -errno; call backing_close in either case. */
int backing_open(struct backing *b, const struct region *r, bool staged, const uint8_t *zeros);
void backing_close(struct backing *b);

/* Writes pages of the region there; or makes what is there zeros. Not for DIRECT. -ENOMEM or
 * -ENOSPC: no page can be had. In hugetlbfs zeros are written, as punching a hole would give its
 * reservation away. */
int backing_put(const struct backing *b, const struct region *r, uint64_t page, uint64_t count,
                const uint8_t *from);
int backing_clear(const struct backing *b, const struct region *r, uint64_t page, uint64_t count);
/* Places pages: those at `from`, unless they were put there; if NULL, what was put there. */
enum meaning backing_place(const struct backing *b, const struct region *r, uint64_t page,
                           uint64_t count, const uint8_t *from, struct placing *p);
/* Places zeros where the guest has nothing. *zeros: it did; else something was there. */
enum meaning backing_place_zeros(const struct backing *b, const struct region *r, uint64_t page,
                                 bool *zeros, struct placing *p);
/* Drops the copies of pages that were placed from here. */
void backing_drop(const struct backing *b, const struct region *r, uint64_t page, uint64_t count);

#endif
