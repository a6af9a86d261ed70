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
#include <unistd.h>

#include "source.h"

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

/* Whether a process has ended or is being killed: its memory may then be taken away page by page
 * (by the OOM killer's reaper), and reading it gives EFAULT. */
static bool ends(pid_t pid) {
  char path[32], text[4096] = "";
  snprintf(path, sizeof path, "/proc/%d/status", pid);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
  if (fd >= 0)
    close(fd);
  const char *state = strstr(text, "\nState:\t");
  const char *own = strstr(text, "\nSigPnd:\t"), *all = strstr(text, "\nShdPnd:\t");
  if (n <= 0 || !state || !own || !all)
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
