/* SPDX-License-Identifier: Apache-2.0 */
/* Reads the guest's RAM. Owns the descriptors of the VMM's memory (`struct private`); the caller's
 * thread waits here, for memory but for no lock.
 *
 * Reads with pread, of a RAM file or of /proc/PID/mem, and not through a mapping: a hole reads as
 * zeros without being allocated, a truncated file is an error and not a SIGBUS, and no page tables
 * are built for a guest that is about to leave.
 *
 * /proc/PID/mem is the memory that the VMM has when it is opened, whatever becomes of the number.
 * It can be read for as long as any process has that memory: the VMM, or its keeper. */
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

static int open_proc(pid_t pid, const char *name) {
  char path[40];
  snprintf(path, sizeof path, "/proc/%d/%s", pid, name);
  return open(path, O_RDONLY | O_CLOEXEC);
}

int private_open(struct private *p, pid_t pid) {
  p->mem = open_proc(pid, "mem"), p->pagemap = open_proc(pid, "pagemap");
  p->status = open_proc(pid, "status");
  return p->mem < 0 || p->pagemap < 0 || p->status < 0 ? -errno : 0;
}

void private_close(struct private *p) {
  int all[] = {p->mem, p->pagemap, p->status, p->keeper};
  for (unsigned i = 0; i < sizeof all / sizeof *all; i++)
    if (all[i] >= 0)
      close(all[i]);
}

int pc_source_kept(struct pc_source *s, int pid) {
  int fd = open_proc(pid, "status");
  if (fd < 0)
    return -errno;
  int before = atomic_exchange(&s->private.keeper, fd);
  if (before >= 0)
    close(before);
  return 0;
}

int read_pages(const struct pc_source *s, const struct region *r, uint64_t page, uint64_t count,
               uint8_t *to) {
  bool file = r->is.fd >= 0;
  int fd = file ? r->is.fd : s->private.mem;
  size_t bytes = count << r->page_shift, done = 0;
  off_t from = (file ? r->is.offset : (off_t)r->is.address) + (off_t)(page << r->page_shift);
  while (done < bytes) {
    ssize_t n = pread(fd, to + done, bytes - done, from + (off_t)done);
    if (n <= 0 && !(n < 0 && errno == EINTR))
      return n ? -errno : file ? -ENODATA : -ESRCH;
    done += n > 0 ? (size_t)n : 0;
  }
  return 0;
}

bool is_lost(int failed) {
  return failed == -EIO || failed == -EHWPOISON || failed == -ENODATA;
}

/* What a descriptor of /proc/PID/status says now; false: the process has ended, or there is none. */
static bool status_of(int fd, char text[4096]) {
  ssize_t n = fd < 0 ? -1 : pread(fd, text, 4095, 0);
  text[n > 0 ? n : 0] = '\0';
  return n > 0;
}

void reader_init(struct reader *d, const struct pc_source *s) {
  char text[4096];
  const struct region *r = s->regions;
  *d = (struct reader){-1};
  if (!status_of(s->private.status, text))
    return;
  const char *swapped = strstr(text, "\nVmSwap:");
  if (!swapped || !strtoull(swapped + 8, NULL, 10))
    return;
  while (r->is.fd >= 0)
    r++;
  d->pidfd = (int)syscall(SYS_pidfd_open, r->is.pid, 0u);
}

void reader_free(struct reader *d) {
  if (d->pidfd >= 0)
    close(d->pidfd);
}

/* Best effort: a page that stays is only memory in use. By number: glibc has it from 2.36 on. */
static void put_back(int pidfd, uint64_t address, uint64_t bytes) {
  struct iovec range = {(void *)address, bytes};
  syscall(SYS_process_madvise, pidfd, &range, 1ul, MADV_PAGEOUT, 0u);
}

int read_run(const struct reader *d, const struct pc_source *s, const struct region *r,
             uint64_t page, uint64_t count, uint8_t *to) {
  uint64_t entries[RUN_PAGES], address = r->is.address + (page << r->page_shift), known = 0;
  if (d->pidfd >= 0 && r->is.fd < 0 && r->is.page_size == 4096) {
    ssize_t got = pread(s->private.pagemap, entries, count * 8, (off_t)(address / 4096 * 8));
    known = got > 0 ? (uint64_t)got / 8 : 0;
  }
  int failed = read_pages(s, r, page, count, to);
  for (uint64_t from = 0, i; from < known; from = i + 1) {
    for (i = from; i < known && entries[i] >> 62 & 1; i++) /* swapped, see scan.c */
      ;
    if (i > from)
      put_back(d->pidfd, address + from * 4096, (i - from) * 4096);
  }
  return failed;
}

/* Whether a process, by its /proc/PID/status, has ended or is being killed: its memory may then be
 * taken away page by page (by the OOM killer's reaper), and reading it gives EIO. */
static bool ends(int status) {
  char text[4096];
  bool known = status_of(status, text);
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
    int failed = read_pages(s, r, page, 1, to);
    bool doubtful = failed == -EIO && r->is.fd < 0;
    if (!failed)
      *doubts = DOUBTS;
    if (doubtful && ends(s->private.status) && ends(atomic_load(&s->private.keeper)))
      return -ESRCH;
    if (doubtful && *doubts)
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
