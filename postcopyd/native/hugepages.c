/* SPDX-License-Identifier: Apache-2.0 */
/* Makes huge pages in another process: the one system call for it that Python lacks. */
#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "native.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif

int pc_collapse(int pidfd, uint64_t address, uint64_t bytes) {
  struct iovec range = {(void *)(uintptr_t)address, bytes};
  /* By number: glibc has process_madvise only from 2.36 on. */
  return syscall(SYS_process_madvise, pidfd, &range, 1ul, MADV_COLLAPSE, 0u) < 0 ? -errno : 0;
}
