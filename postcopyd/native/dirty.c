/* SPDX-License-Identifier: Apache-2.0 */
/* See dirty.h. The constants are those of Linux 6.18 (include/uapi/linux/fs.h, userfaultfd.h). */
#define _GNU_SOURCE
#include "dirty.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native.h"
#include "uffd.h"

/* UFFD_FEATURE_*. UNPOPULATED: pages that are not in the page tables can be armed too. */
enum {
  FEATURE_PAGEFAULT_FLAG_WP = 1 << 0,
  FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12,
  FEATURE_WP_UNPOPULATED = 1 << 13,
  FEATURE_WP_ASYNC = 1 << 15,
};
#define UFFDIO_REGISTER_MODE_WP 2ull
#define UFFD_USER_MODE_ONLY 1

struct pm_scan_arg {
  uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
  uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
struct page_region {
  uint64_t start, end, categories;
};
enum { PM_SCAN_WP_MATCHING = 1 << 0, PM_SCAN_CHECK_WPASYNC = 1 << 1 };
enum { PAGE_IS_WRITTEN = 1 << 1, PAGE_IS_PRESENT = 1 << 3 };
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)

_Static_assert(sizeof(struct pm_scan_arg) == 96 && sizeof(struct page_region) == 24,
               "the kernel's layout");

/* One call holds up faults in the process: for 64 MiB a scan takes 0.1 ms, unregistering 1 ms. */
enum { STEP_BYTES = 64 << 20 };
enum { COST_PAGES = 512 };

int dirty_open(int uffd) {
  struct uffdio_api api = {
      UFFD_API,
      FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED |
          FEATURE_WP_ASYNC,
      0,
  };
  if (!ioctl(uffd, UFFDIO_API, &api))
    return 0;
  return errno == EINVAL ? -EOPNOTSUPP : -errno;
}

int dirty_register(int uffd, uint64_t address, uint64_t bytes) {
  struct uffdio_register wanted = {{address, bytes}, UFFDIO_REGISTER_MODE_WP, 0};
  return ioctl(uffd, UFFDIO_REGISTER, &wanted) ? -errno : 0;
}

void dirty_unregister(int uffd, uint64_t address, uint64_t bytes) {
  for (uint64_t done = 0; done < bytes; done += STEP_BYTES) {
    struct uffdio_range range = {address + done,
                                 bytes - done > STEP_BYTES ? STEP_BYTES : bytes - done};
    ioctl(uffd, UFFDIO_UNREGISTER, &range); /* fails only when there is nothing to undo */
  }
}

int dirty_scan(int pagemap, uint64_t *from, uint64_t to, bool arm, bool absent,
               struct dirty_range found[DIRTY_RANGES]) {
  struct page_region regions[DIRTY_RANGES];
  struct pm_scan_arg scan = {
      .size = sizeof scan,
      .flags = PM_SCAN_CHECK_WPASYNC | (arm ? PM_SCAN_WP_MATCHING : 0),
      .start = *from,
      .end = to - *from > STEP_BYTES ? *from + STEP_BYTES : to,
      .vec = (uintptr_t)regions,
      .vec_len = DIRTY_RANGES,
      /* The kernel has a faster way if only "written" is asked for. */
      .category_mask = absent ? 0 : PAGE_IS_WRITTEN,
      .category_inverted = absent ? PAGE_IS_PRESENT : 0,
      .category_anyof_mask = absent ? PAGE_IS_WRITTEN | PAGE_IS_PRESENT : 0,
      .return_mask = PAGE_IS_WRITTEN,
  };
  int n = ioctl(pagemap, PAGEMAP_SCAN, &scan);
  if (n < 0)
    return errno == ENOTTY ? -EOPNOTSUPP : -errno;
  for (int i = 0; i < n; i++)
    found[i] = (struct dirty_range){regions[i].start, regions[i].end,
                                    regions[i].categories & PAGE_IS_WRITTEN};
  *from = scan.walk_end;
  return n;
}

bool dirty_gone(int pagemap) {
  uint64_t entry;
  return pread(pagemap, &entry, sizeof entry, 0) == 0;
}

/* --- what it costs the writer ----------------------------------------------------------------- */

static int ascending(const void *a, const void *b) {
  const int64_t *x = a, *y = b;
  return (*x > *y) - (*x < *y);
}

static int64_t write_cost(int uffd, int pagemap, uint8_t *at, uint64_t bytes) {
  struct dirty_range found[DIRTY_RANGES];
  int64_t cost[COST_PAGES];
  uint64_t from = (uintptr_t)at, end = from + bytes;
  for (uint64_t i = 0; i < COST_PAGES; i++)
    at[i * 4096] = 1;
  int failed = dirty_open(uffd);
  failed = failed ? failed : dirty_register(uffd, from, bytes);
  while (!failed && from < end) {
    int n = dirty_scan(pagemap, &from, end, true, false, found);
    failed = n < 0 ? n : 0;
  }
  if (failed)
    return failed;
  for (uint64_t i = 0; i < COST_PAGES; i++) {
    uint64_t before = pc_monotonic_ns();
    __atomic_store_n(&at[i * 4096], 2, __ATOMIC_SEQ_CST);
    cost[i] = (int64_t)(pc_monotonic_ns() - before);
  }
  qsort(cost, COST_PAGES, sizeof *cost, ascending);
  return cost[COST_PAGES / 2];
}

int64_t pc_track_cost_ns(void) {
  uint64_t bytes = COST_PAGES * 4096;
  int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
  int file = memfd_create("cost", MFD_CLOEXEC); /* guest RAM is mostly shared memory */
  int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  void *at = MAP_FAILED;
  int64_t cost;
  if (uffd >= 0 && file >= 0 && pagemap >= 0 && !ftruncate(file, (off_t)bytes))
    at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (at != MAP_FAILED) {
    madvise(at, bytes, MADV_NOHUGEPAGE);
    cost = write_cost(uffd, pagemap, at, bytes);
    munmap(at, bytes);
  } else {
    cost = -errno;
  }
  for (unsigned i = 0; i < 3; i++) {
    int fd = (int[]){uffd, file, pagemap}[i];
    if (fd >= 0)
      close(fd);
  }
  return cost;
}
