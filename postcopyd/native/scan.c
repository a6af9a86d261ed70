/* SPDX-License-Identifier: Apache-2.0 */
/* Finds which pages of the guest have data, by asking for the holes. Owns the bits of `data` and
 * how far the scan has come. The session calls it in steps while the guest runs; a push thread
 * (holes_first) calls it once the guest is stopped; never both. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "source.h"

/* Calls of the kernel in one step of a scan: some milliseconds, at 2 us each. */
enum { SCAN_CALLS = 4096 };

/* Marks the data of a shared file in pages [from, to) of a region, with at most `*calls` calls,
 * which are counted down. Returns the page up to which it has come. It asks for extents only, so a
 * hole costs nothing for each of its pages. A file system without holes (hugetlbfs) is all data.
 * Pages beyond the file's end are no hole: they count as data, and will be found unreadable. */
static uint64_t scan_file(struct pc_source *s, struct region *r, uint64_t from, uint64_t to,
                          int *calls) {
  off_t end = r->is.offset + (off_t)(to << r->page_shift);
  off_t at = r->is.offset + (off_t)(from << r->page_shift);
  while (at < end && *calls > 0) {
    off_t data = lseek(r->is.fd, at, SEEK_DATA), hole = end;
    *calls -= 2;
    if (data < 0 && errno == ENXIO) {
      struct stat file;
      data = fstat(r->is.fd, &file) || file.st_size < at ? at : file.st_size;
    } else if (data < 0) {
      data = at;
    } else if (data < end) { /* otherwise finding its end would take 8 ms for each GiB of it */
      hole = lseek(r->is.fd, data, SEEK_HOLE);
    }
    if (data >= end)
      return to;
    if (hole < 0 || hole > end)
      hole = end;
    bits_set(s->data, r->first + ((uint64_t)(data - r->is.offset) >> r->page_shift),
             r->first + ((uint64_t)(hole - r->is.offset + r->is.page_size - 1) >> r->page_shift));
    at = hole;
  }
  return at < end ? (uint64_t)(at - r->is.offset) >> r->page_shift : to;
}

/* The same for anonymous memory: pagemap has 64 bits a page, 63 present, 62 swapped
 * (Documentation/admin-guide/mm/pagemap.rst). A page that cannot be looked up counts as data. */
static uint64_t scan_anonymous(struct pc_source *s, struct region *r, uint64_t from, uint64_t to,
                               int *calls) {
  uint64_t entries[512], each = r->is.page_size / 4096;
  uint64_t small = from * each, last = to * each;
  for (; small < last && *calls > 0; *calls -= 4) {
    uint64_t n = last - small < 512 ? last - small : 512;
    off_t at = (off_t)((r->is.address / 4096 + small) * 8);
    ssize_t got = pread(s->private.pagemap, entries, n * 8, at);
    if (got < 8) {
      bits_set(s->data, r->first + small / each, r->first + to);
      small = last;
      break;
    }
    for (uint64_t i = 0; i < (uint64_t)got / 8; i++)
      if (entries[i] >> 62)
        bit_take(s->data, r->first + (small + i) / each);
    small += (uint64_t)got / 8;
  }
  return small / each;
}

/* Looks for data only where none was known. So the scan after the stop only asks about the holes of
 * the scan before it. */
int pc_source_scan(struct pc_source *s) {
  int calls = SCAN_CALLS;
  for (unsigned i = 0; i < s->region_count; i++) {
    struct region *r = &s->regions[i];
    uint64_t end = r->first + r->is.pages;
    uint64_t from = bits_find(s->data, false, s->scanned > r->first ? s->scanned : r->first, end);
    while (from < end) {
      if (calls <= 0) {
        s->scanned = from;
        return 1;
      }
      uint64_t to = bits_find(s->data, true, from, end), at;
      at = (r->is.fd >= 0 ? scan_file : scan_anonymous)(s, r, from - r->first, to - r->first,
                                                        &calls);
      from = bits_find(s->data, false, r->first + at, end);
    }
  }
  s->scanned = 0;
  return 0;
}

bool scan_all(struct pc_source *s) {
  s->scanned = 0;
  while (pc_source_scan(s))
    if (atomic_load(&s->stopping))
      return false;
  return true;
}
