/* SPDX-License-Identifier: Apache-2.0 */
/* See stage.h. */
#define _GNU_SOURCE
#include "stage.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "native.h"

enum { HUGE_BYTES = 2 << 20 };

int stage_open(struct stage *s, const struct pc_region *region) {
  *s = (struct stage){.fd = region->fd, .own = region->fd < 0, .offset = region->offset,
                      .huge = region->fd >= 0 && region->page_size == HUGE_BYTES,
                      .bytes = region->pages * region->page_size};
  if (s->own) {
    s->fd = memfd_create("postcopyd-stage", MFD_CLOEXEC);
    s->offset = 0;
    if (s->fd < 0 || ftruncate(s->fd, (off_t)s->bytes))
      return -errno;
  }
  if (!s->own && !s->huge)
    return 0;
  /* The reservation, if there is one, is the VMM's. */
  void *at = mmap(NULL, s->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, s->fd,
                  s->offset);
  if (at == MAP_FAILED)
    return -errno;
  s->at = at;
  return 0;
}

int stage_write(struct stage *s, uint64_t to, const uint8_t *from, uint64_t bytes) {
  for (uint64_t done = 0; done < bytes;) {
    struct iovec here = {(void *)(from + done), bytes - done};
    struct iovec there = {s->huge ? s->at + to + done : NULL, bytes - done};
    /* To a mapping of our own, but by the kernel: no huge page is EFAULT then, and not SIGBUS. */
    ssize_t n = s->huge ? process_vm_writev(getpid(), &here, 1, &there, 1, 0)
                        : pwrite(s->fd, here.iov_base, here.iov_len,
                                 s->offset + (off_t)(to + done));
    if (n > 0)
      done += (uint64_t)n;
    else if (n == 0 || (s->huge && errno == EFAULT))
      return -ENOMEM;
    else if (errno != EINTR)
      return -errno;
  }
  return 0;
}

int stage_clear(struct stage *s, uint64_t from, uint64_t bytes, const uint8_t *zeros) {
  int failed = 0;
  if (s->huge) {
    for (uint64_t done = 0; done < bytes && !failed; done += HUGE_BYTES)
      failed = stage_write(s, from + done, zeros, HUGE_BYTES);
    return failed;
  }
  do
    failed = fallocate(s->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, s->offset + (off_t)from,
                       (off_t)bytes)
                 ? -errno
                 : 0;
  while (failed == -EINTR);
  return failed;
}

void stage_close(struct stage *s) {
  if (s->at)
    munmap(s->at, s->bytes);
  if (s->own && s->fd >= 0)
    close(s->fd);
}
