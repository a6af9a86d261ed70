/* SPDX-License-Identifier: Apache-2.0 */
/* Reads the guest's RAM. Owns nothing; the caller's thread waits here, for memory but for no lock.
 *
 * Reads with pread (or process_vm_readv for anonymous memory) and not through a mapping: a hole
 * reads as zeros without being allocated, a truncated file is an error and not a SIGBUS, and no
 * page tables are built for a guest that is about to leave. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "source.h"

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21 /* Linux 5.4; of other processes 5.10 */
#endif

/* How long until reading is tried again. */
enum { DOUBT_MS = 10 };

int read_pages(const struct region *r, uint64_t page, uint64_t count, uint8_t *to) {
  size_t bytes = count << r->page_shift, done = 0;
  uint64_t from = page << r->page_shift;
  while (done < bytes) {
    ssize_t n;
    if (r->is.fd >= 0) {
      n = pread(r->is.fd, to + done, bytes - done, r->is.offset + (off_t)(from + done));
    } else {
      struct iovec local = {to + done, bytes - done};
      struct iovec remote = {(void *)(r->is.address + from + done), bytes - done};
      n = process_vm_readv(r->is.pid, &local, 1, &remote, 1, 0);
    }
    if (n <= 0 && !(n < 0 && errno == EINTR))
      return n ? -errno : -ENODATA;
    done += n > 0 ? (size_t)n : 0;
  }
  return 0;
}

/* For anonymous memory EFAULT stands for EIO. */
bool is_lost(int failed) {
  return failed == -EIO || failed == -EHWPOISON || failed == -EFAULT || failed == -ENODATA;
}

/* /proc/PID/status as a string; false: there is none. */
static bool status_of(pid_t pid, char text[4096]) {
  char path[32];
  snprintf(path, sizeof path, "/proc/%d/status", pid);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t n = fd < 0 ? -1 : read(fd, text, 4095);
  if (fd >= 0)
    close(fd);
  text[n > 0 ? n : 0] = '\0';
  return n > 0;
}

void reader_init(struct reader *d, const struct pc_source *s) {
  char text[4096], path[32];
  const struct region *r = s->regions;
  while (r < s->regions + s->region_count && r->is.fd >= 0)
    r++;
  *d = (struct reader){-1, -1};
  if (r == s->regions + s->region_count || !status_of(r->is.pid, text))
    return;
  const char *swapped = strstr(text, "\nVmSwap:");
  if (!swapped || !strtoull(swapped + 8, NULL, 10))
    return;
  snprintf(path, sizeof path, "/proc/%d/pagemap", r->is.pid);
  d->pagemap = open(path, O_RDONLY | O_CLOEXEC);
  d->pidfd = (int)syscall(SYS_pidfd_open, r->is.pid, 0u);
}

void reader_free(struct reader *d) {
  if (d->pagemap >= 0)
    close(d->pagemap);
  if (d->pidfd >= 0)
    close(d->pidfd);
}

/* Best effort: a page that stays is only memory in use. By number: glibc has it from 2.36 on. */
static void put_back(int pidfd, uint64_t address, uint64_t bytes) {
  struct iovec range = {(void *)address, bytes};
  syscall(SYS_process_madvise, pidfd, &range, 1ul, MADV_PAGEOUT, 0u);
}

int read_run(const struct reader *d, const struct region *r, uint64_t page, uint64_t count,
             uint8_t *to) {
  uint64_t entries[RUN_PAGES], address = r->is.address + (page << r->page_shift), known = 0;
  if (d->pagemap >= 0 && r->is.fd < 0 && r->is.page_size == 4096) {
    ssize_t got = pread(d->pagemap, entries, count * 8, (off_t)(address / 4096 * 8));
    known = got > 0 ? (uint64_t)got / 8 : 0;
  }
  int failed = read_pages(r, page, count, to);
  for (uint64_t from = 0, i; from < known; from = i + 1) {
    for (i = from; i < known && entries[i] >> 62 & 1; i++) /* swapped, see scan.c */
      ;
    if (i > from)
      put_back(d->pidfd, address + from * 4096, (i - from) * 4096);
  }
  return failed;
}

/* Whether a process has ended or is being killed: its memory may then be taken away page by page
 * (by the OOM killer's reaper), and reading it gives EFAULT. */
static bool ends(pid_t pid) {
  char text[4096];
  bool known = status_of(pid, text);
  const char *state = strstr(text, "\nState:\t");
  const char *own = strstr(text, "\nSigPnd:\t"), *all = strstr(text, "\nShdPnd:\t");
  if (!known || !state || !own || !all)
    return true;
  uint64_t signals = strtoull(own + 9, NULL, 16) | strtoull(all + 9, NULL, 16);
  return state[8] == 'Z' || state[8] == 'X' || signals >> (SIGKILL - 1) & 1;
}

int read_surely(struct pc_source *s, const struct region *r, uint64_t page, uint8_t *to,
                unsigned *doubts) {
  for (;;) {
    int failed = read_pages(r, page, 1, to);
    if (!failed)
      *doubts = DOUBTS;
    if (failed == -EFAULT && r->is.fd < 0 && ends(r->is.pid))
      return -ESRCH;
    if (failed == -EFAULT && *doubts)
      --*doubts;
    else if (failed != -ENOMEM && failed != -EAGAIN)
      return failed;
    struct pollfd stop = {.fd = s->stop, .events = POLLIN};
    poll(&stop, 1, DOUBT_MS);
    if (atomic_load(&s->stopping))
      return -ECANCELED;
  }
}

void read_failed(struct pc_source *s, const struct region *r, uint64_t page, int failed) {
  if (failed == -ESRCH)
    engine_fail(&s->stats, s->wake, PC_VMM_GONE, "the VMM has ended while its memory was read");
  else if (failed != -ECANCELED)
    engine_fail(&s->stats, s->wake, PC_MEMORY, "reading page %llu of region %d: %s",
                (unsigned long long)page, (int)(r - s->regions), strerrordesc_np(-failed));
}

uint32_t largest_page(const struct pc_source *s) {
  uint32_t size = 4096;
  for (unsigned i = 0; i < s->region_count; i++)
    size = s->regions[i].is.page_size > size ? s->regions[i].is.page_size : size;
  return size;
}
