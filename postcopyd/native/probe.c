/* SPDX-License-Identifier: Apache-2.0 */
/* Tries out, on this process's memory, what this kernel does with memory that a userfaultfd
 * watches. A feature bit says that an interface exists, a version what a kernel was made from;
 * neither says that it works. Owns nothing between two calls; each takes a millisecond. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "dirty.h"
#include "native.h"
#include "uffd.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif
#define UFFD_USER_MODE_ONLY 1

enum { SMALL = 4096, HUGE = 2 << 20 };

/* Shared memory of two huge pages, at an address that suits a huge page, and descriptors to look at
 * it. All are -1 or MAP_FAILED until they are made. */
struct piece {
  int uffd, file, pagemap;
  uint8_t *room, *at;
};

/* 0 or -errno; call piece_end in either case. Nothing is registered; UFFDIO_API is not done. */
static int piece_make(struct piece *p) {
  *p = (struct piece){-1, -1, -1, MAP_FAILED, MAP_FAILED};
  p->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
  if (p->uffd < 0)
    return -errno;
  p->file = memfd_create("postcopyd-probe", MFD_CLOEXEC);
  p->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (p->file < 0 || p->pagemap < 0 || ftruncate(p->file, 2 * HUGE))
    return -errno;
  p->room = mmap(NULL, 3 * HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p->room == MAP_FAILED)
    return -errno;
  uint8_t *suits = (uint8_t *)(((uintptr_t)p->room + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
  p->at = mmap(suits, 2 * HUGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, p->file, 0);
  return p->at == MAP_FAILED ? -errno : 0;
}

static void piece_end(struct piece *p) {
  if (p->room != MAP_FAILED)
    munmap(p->room, 3 * HUGE);
  for (unsigned i = 0; i < 3; i++) {
    int fd = (int[]){p->uffd, p->file, p->pagemap}[i];
    if (fd >= 0)
      close(fd);
  }
}

/* --- written pages ---------------------------------------------------------------------------- */

/* Whether a look finds this one page written. 0, 1 or -errno. */
static int seen(const struct piece *p, uint64_t page, bool absent) {
  struct dirty_range found[DIRTY_RANGES];
  uint64_t from = (uintptr_t)p->at, end = from + 2 * HUGE, wanted = from + page * SMALL;
  while (from < end) {
    int n = dirty_scan(p->pagemap, &from, end, false, absent, found);
    if (n < 0)
      return n;
    for (int i = 0; i < n; i++)
      if (found[i].written && found[i].start <= wanted && wanted < found[i].end)
        return 1;
  }
  return 0;
}

static int arm(const struct piece *p, uint64_t bytes) {
  struct dirty_range found[DIRTY_RANGES];
  uint64_t from = (uintptr_t)p->at, end = from + bytes;
  int n = 0;
  while (from < end && n >= 0)
    n = dirty_scan(p->pagemap, &from, end, true, false, found);
  return n < 0 ? n : 0;
}

/* Pages in the first huge page's range: QUIET stays as it was armed, WRITTEN is written after that,
 * ZAPPED too and is then taken out of the page tables, as when it is swapped out. PAGE_TABLE is in
 * the second range, which has no page table at all, as when a huge page was split or swapped
 * out. */
enum { QUIET = 1, WRITTEN = 2, ZAPPED = 3, PAGE_TABLE = HUGE / SMALL + 7 };

static int look_for_written(const struct piece *p) {
  static const uint8_t data[SMALL] = {1};
  if (pwrite(p->file, data, sizeof data, PAGE_TABLE * SMALL) != (ssize_t)sizeof data)
    return -errno;
  /* Small pages, like guest RAM when its pages are armed one by one. */
  if (madvise(p->at, 2 * HUGE, MADV_NOHUGEPAGE) && errno != EINVAL) /* EINVAL: no huge pages */
    return -errno;
  for (uint64_t i = 0; i < HUGE / SMALL; i++)
    p->at[i * SMALL] = 1;
  int failed = dirty_open(p->uffd);
  failed = failed ? failed : dirty_register(p->uffd, (uintptr_t)p->at, 2 * HUGE);
  failed = failed ? failed : arm(p, HUGE);
  if (failed)
    return failed;
  __atomic_store_n(&p->at[WRITTEN * SMALL], 2, __ATOMIC_SEQ_CST);
  __atomic_store_n(&p->at[ZAPPED * SMALL], 2, __ATOMIC_SEQ_CST);
  if (madvise(p->at + ZAPPED * SMALL, SMALL, MADV_DONTNEED)) /* the file keeps the page */
    return -errno;
  int wrong = 0;
  for (int absent = 0; absent < 2; absent++) { /* the two forms of a look */
    static const struct {
      uint64_t page;
      int right, bit;
    } cases[] = {
        {QUIET, 0, PC_SEES_QUIET},
        {WRITTEN, 1, PC_MISSES_WRITTEN},
        {ZAPPED, 1, PC_MISSES_ZAPPED},
        {PAGE_TABLE, 1, PC_MISSES_TABLES},
    };
    for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++) {
      int is = seen(p, cases[i].page, absent);
      if (is < 0)
        return is;
      wrong |= is == cases[i].right ? 0 : cases[i].bit;
    }
  }
  return wrong;
}

int pc_probe_written(void) {
  struct piece p;
  int result = piece_make(&p);
  result = result ? result : look_for_written(&p);
  piece_end(&p);
  return result;
}

/* --- huge pages ------------------------------------------------------------------------------- */

/* Makes a huge page of a range of which the file has only the first page. 0: made; 1: refused for
 * this range; -errno: failed for another reason. */
static int collapse(uint8_t *at) {
  at[0] = 1;
  if (!madvise(at, HUGE, MADV_COLLAPSE))
    return 0;
  return errno == EAGAIN || errno == EBUSY || errno == EINVAL ? 1 : -errno;
}

/* khugepaged and MADV_COLLAPSE make huge pages by the same function (mm/khugepaged.c,
 * collapse_file); only MADV_COLLAPSE does it when it is called. */
static int look_for_zeros(const struct piece *p) {
  struct uffdio_api api = {UFFD_API, 0, 0};
  struct uffdio_register missing = {{(uintptr_t)p->at, HUGE}, UFFDIO_REGISTER_MODE_MISSING, 0};
  p->at[0] = 1; /* before it is watched: nobody would answer the fault */
  if (ioctl(p->uffd, UFFDIO_API, &api) || ioctl(p->uffd, UFFDIO_REGISTER, &missing))
    return -errno;
  int made = collapse(p->at);
  if (made < 0)
    return made;
  if (lseek(p->file, 0, SEEK_HOLE) != SMALL)
    return 1;
  /* Was it refused because it is watched? Then the same call works for the range that is not. */
  int other = collapse(p->at + HUGE);
  return other == 0 ? 0 : other < 0 ? other : -EOPNOTSUPP;
}

int pc_probe_huge_zeros(void) {
  struct piece p;
  int result = piece_make(&p);
  result = result ? result : look_for_zeros(&p);
  piece_end(&p);
  return result;
}
