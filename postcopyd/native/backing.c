/* SPDX-License-Identifier: Apache-2.0 */
/* See backing.h. */
#define _GNU_SOURCE
#include "backing.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum { HUGE_BYTES = 2 << 20 };

int backing_open(struct backing *b, const struct region *r, bool staged, const uint8_t *zeros) {
  *b = (struct backing){.kind = !staged ? DIRECT : r->is.fd < 0 ? ASIDE : IN_FILE, .fd = -1,
                        .bytes = r->is.pages << r->page_shift, .zeros = zeros};
  if (b->kind == IN_FILE) {
    b->fd = r->is.fd, b->offset = r->is.offset, b->huge = r->is.page_size == HUGE_BYTES;
  } else if (b->kind == ASIDE) {
    b->fd = memfd_create("postcopyd-stage", MFD_CLOEXEC);
    if (b->fd < 0 || ftruncate(b->fd, (off_t)b->bytes))
      return -errno;
  }
  if (b->kind != ASIDE && !b->huge)
    return 0;
  /* NORESERVE: a reservation, if there is one, is the VMM's. */
  void *at = mmap(NULL, b->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, b->fd,
                  b->offset);
  if (at == MAP_FAILED)
    return -errno;
  b->at = at;
  return 0;
}

void backing_close(struct backing *b) {
  if (b->at)
    munmap(b->at, b->bytes);
  if (b->kind == ASIDE && b->fd >= 0)
    close(b->fd);
}

static int write_bytes(const struct backing *b, uint64_t to, const uint8_t *from, uint64_t bytes) {
  for (uint64_t done = 0; done < bytes;) {
    struct iovec here = {(void *)(from + done), bytes - done};
    struct iovec there = {b->huge ? b->at + to + done : NULL, bytes - done};
    /* The kernel writes to this process's mapping: without a huge page it is EFAULT, not SIGBUS. */
    ssize_t n = b->huge ? process_vm_writev(getpid(), &here, 1, &there, 1, 0)
                        : pwrite(b->fd, here.iov_base, here.iov_len,
                                 b->offset + (off_t)(to + done));
    if (n > 0)
      done += (uint64_t)n;
    else if (n == 0 || (b->huge && errno == EFAULT))
      return -ENOMEM;
    else if (errno != EINTR)
      return -errno;
  }
  return 0;
}

int backing_put(const struct backing *b, const struct region *r, uint64_t page, uint64_t count,
                const uint8_t *from) {
  return write_bytes(b, page << r->page_shift, from, count << r->page_shift);
}

int backing_clear(const struct backing *b, const struct region *r, uint64_t page, uint64_t count) {
  uint64_t from = page << r->page_shift, bytes = count << r->page_shift;
  int failed = 0;
  if (b->huge) {
    for (uint64_t done = 0; done < bytes && !failed; done += HUGE_BYTES)
      failed = write_bytes(b, from + done, b->zeros, HUGE_BYTES);
    return failed;
  }
  do
    failed = fallocate(b->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, b->offset + (off_t)from,
                       (off_t)bytes)
                 ? -errno
                 : 0;
  while (failed == -EINTR);
  return failed;
}

enum meaning backing_place(const struct backing *b, const struct region *r, uint64_t page,
                           uint64_t count, const uint8_t *from, struct placing *p) {
  if (b->kind == IN_FILE)
    return place(r, CONTINUE, page, count, NULL, p);
  return place(r, COPY, page, count, from ? from : b->at + (page << r->page_shift), p);
}

/* In a file CONTINUE is tried first: it needs no memory for a page that is there, when a full tmpfs
 * or cgroup has none. */
enum meaning backing_place_zeros(const struct backing *b, const struct region *r, uint64_t page,
                                 bool *zeros, struct placing *p) {
  *zeros = false;
  if (b->kind == IN_FILE) {
    enum meaning is = place(r, CONTINUE, page, 1, NULL, p);
    if (is != PLACED || !p->holes)
      return is;
  }
  enum meaning is = place(r, ZERO, page, 1, b->zeros, p);
  *zeros = is == PLACED && !p->existing;
  if (b->kind == IN_FILE && is == PLACED && p->existing) /* another thread has just made it */
    is = place(r, CONTINUE, page, 1, NULL, p);
  return is;
}

void backing_drop(const struct backing *b, const struct region *r, uint64_t page, uint64_t count) {
  if (b->kind == ASIDE) /* the page is in memory twice */
    backing_clear(b, r, page, count);
}
