/* SPDX-License-Identifier: Apache-2.0 */
/* The kernel's side of seeing which pages of its memory another process writes: asynchronous write
 * protection by userfaultfd and PAGEMAP_SCAN, both since Linux 6.7 (Documentation/admin-guide/mm/
 * userfaultfd.rst and pagemap.rst). The first write to a page that is armed costs a fault in the
 * kernel, for which nobody is asked; the page is then written, and free until it is armed again. A
 * page that was never armed counts as written. Knows nothing of engines.
 *
 * Functions return 0 (or a number) or -errno; -EOPNOTSUPP: this kernel has not what is needed. */
#ifndef POSTCOPYD_DIRTY_H
#define POSTCOPYD_DIRTY_H

#include <stdbool.h>
#include <stdint.h>

struct dirty_range {
  uint64_t start, end; /* addresses */
  bool written;        /* else: not in the page tables, so perhaps discarded */
};

enum { DIRTY_RANGES = 512 };

/* Takes a new userfaultfd of the process; once for each. */
int dirty_open(int uffd);
int dirty_register(int uffd, uint64_t address, uint64_t bytes);
/* Nothing of the range is armed after this. Closing the userfaultfd does the same for all of it. */
void dirty_unregister(int uffd, uint64_t address, uint64_t bytes);

/* The written pages of [*from, to), at most DIRTY_RANGES ranges of them and from at most 64 MiB: a
 * vCPU that faults there waits meanwhile. `pagemap` is the process's. Returns how many ranges were
 * found and sets *from to where to go on. With `arm` what is found is armed, in the same moment.
 *
 * With `absent` also pages that are armed but not in the page tables are found. A file's page stays
 * armed when it is punched (measured on Linux 6.18), so only the file can say whether these have
 * become zeros. Should the process read one before this is called, it is a page like any other and
 * not found: what is read from discarded memory is not what it was, and no kernel tells of it.
 * Anonymous memory that is discarded is simply not armed any more. */
int dirty_scan(int pagemap, uint64_t *from, uint64_t to, bool arm, bool absent,
               struct dirty_range found[DIRTY_RANGES]);
/* Whether the address space of this pagemap is gone: then a scan finds nothing, and says so. */
bool dirty_gone(int pagemap);

#endif
