/* SPDX-License-Identifier: Apache-2.0 */
/* How the kernel shows which pages of its memory another process writes: asynchronous write
 * protection by userfaultfd and PAGEMAP_SCAN, both since Linux 6.7 (Documentation/admin-guide/mm/
 * userfaultfd.rst and pagemap.rst). The first write to an armed page costs a fault that the kernel
 * handles alone; the page then counts as written, and costs nothing until it is armed again. A page
 * that was never armed counts as written. Knows nothing of engines.
 *
 * Functions return 0 (or a number) or -errno; -EOPNOTSUPP: this kernel lacks what is needed. */
#ifndef POSTCOPYD_DIRTY_H
#define POSTCOPYD_DIRTY_H

#include <stdbool.h>
#include <stdint.h>

struct dirty_range {
  uint64_t start, end; /* addresses */
  bool written;        /* else: not in the page tables, so perhaps discarded */
};

enum { DIRTY_RANGES = 512 };

/* Prepares a new userfaultfd of the process; once for each. */
int dirty_open(int uffd);
int dirty_register(int uffd, uint64_t address, uint64_t bytes);
/* Disarms the range. Closing the userfaultfd does the same for all ranges. */
void dirty_unregister(int uffd, uint64_t address, uint64_t bytes);

/* Finds the written pages of [*from, to): at most DIRTY_RANGES ranges of them, in at most 64 MiB,
 * because a vCPU that faults there waits meanwhile. `pagemap` is the process's. Returns how many
 * ranges were found, and sets *from to where to go on. With `arm` it arms what it finds,
 * atomically.
 *
 * With `absent` it also finds pages that are armed but not in the page tables. A file's page stays
 * armed when it is punched (measured on Linux 6.18), so only the file can tell whether it has
 * become zeros. If the process has read a discarded page before this call, the page is like any
 * other and is not found: no kernel tells of that. Discarded anonymous memory is simply not armed
 * any more. */
int dirty_scan(int pagemap, uint64_t *from, uint64_t to, bool arm, bool absent,
               struct dirty_range found[DIRTY_RANGES]);
/* Whether the address space of this pagemap is gone: a scan then finds nothing, without an
 * error. */
bool dirty_gone(int pagemap);

#endif
