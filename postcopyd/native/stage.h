/* SPDX-License-Identifier: Apache-2.0 */
/* Where a staged destination puts pages before the guest may see them: the RAM file itself, or for
 * anonymous memory a memfd that dies with the process. Knows nothing of records or userfaultfds.
 *
 * The file is written, never touched through a mapping: where no page can be had that is an error,
 * and no SIGBUS. What is written is charged to this process's memory cgroup, unlike UFFDIO_COPY. */
#ifndef POSTCOPYD_STAGE_H
#define POSTCOPYD_STAGE_H

#include <stdbool.h>
#include <stdint.h>

struct pc_region;

struct stage {
  int fd;         /* -1: there is none */
  bool own, huge; /* the memfd; hugetlbfs */
  int64_t offset; /* of the region in the file, bytes */
  uint64_t bytes;
  uint8_t *at; /* mapped: the memfd, to place from; hugetlbfs, which knows no write(2). Or NULL */
};

/* Sets `at` and `fd` in any case, for stage_close. Returns 0 or -errno. */
int stage_open(struct stage *s, const struct pc_region *region);
/* All offsets and lengths are in bytes of the region. -ENOMEM or -ENOSPC: no page can be had. */
int stage_write(struct stage *s, uint64_t to, const uint8_t *from, uint64_t bytes);
/* Makes zeros of it. `zeros`: one page of them. hugetlbfs keeps its pages: a hole punched into it
 * gives the reservation away. */
int stage_clear(struct stage *s, uint64_t from, uint64_t bytes, const uint8_t *zeros);
void stage_close(struct stage *s);

#endif
