/* SPDX-License-Identifier: Apache-2.0 */
/* The parts of the kernel's userfaultfd interface that are used here, as of Linux 6.18
 * (Documentation/admin-guide/mm/userfaultfd.rst): a distribution's headers are often older than its
 * kernel. POISON exists since Linux 6.6 (include/uapi/linux/userfaultfd.h); before, it is
 * EINVAL. */
#ifndef POSTCOPYD_UFFD_H
#define POSTCOPYD_UFFD_H

#include <stdint.h>
#include <sys/ioctl.h>

#define UFFD_API 0xAAull
#define UFFD_EVENT_PAGEFAULT 0x12
#define UFFDIO_REGISTER_MODE_MISSING 1ull
#define UFFDIO_REGISTER_MODE_MINOR 4ull
#define UFFD_FEATURE_MINOR_HUGETLBFS (1ull << 9)
#define UFFD_FEATURE_MINOR_SHMEM (1ull << 10)

struct uffdio_range {
  uint64_t start, len;
};
struct uffdio_api {
  uint64_t api, features, ioctls;
};
struct uffdio_register {
  struct uffdio_range range;
  uint64_t mode, ioctls;
};
struct uffdio_copy {
  uint64_t dst, src, len, mode;
  int64_t copy;
};
struct uffdio_zeropage {
  struct uffdio_range range;
  uint64_t mode;
  int64_t zeropage;
};
struct uffdio_continue {
  struct uffdio_range range;
  uint64_t mode;
  int64_t mapped;
};
struct uffdio_poison {
  struct uffdio_range range;
  uint64_t mode;
  int64_t updated;
};
struct uffd_msg {
  uint8_t event, reserved1;
  uint16_t reserved2;
  uint32_t reserved3;
  union {
    struct {
      uint64_t flags, address;
      uint32_t thread;
    } pagefault;
    uint64_t reserved[3];
  } arg;
} __attribute__((packed));

#define UFFDIO_API _IOWR(0xAA, 0x3F, struct uffdio_api)
#define UFFDIO_REGISTER _IOWR(0xAA, 0x00, struct uffdio_register)
#define UFFDIO_UNREGISTER _IOR(0xAA, 0x01, struct uffdio_range)
#define UFFDIO_WAKE _IOR(0xAA, 0x02, struct uffdio_range)
#define UFFDIO_COPY _IOWR(0xAA, 0x03, struct uffdio_copy)
#define UFFDIO_ZEROPAGE _IOWR(0xAA, 0x04, struct uffdio_zeropage)
#define UFFDIO_CONTINUE _IOWR(0xAA, 0x07, struct uffdio_continue)
#define UFFDIO_POISON _IOWR(0xAA, 0x08, struct uffdio_poison)

_Static_assert(sizeof(struct uffd_msg) == 32 && UFFDIO_COPY == 0xc028aa03ul &&
                   UFFDIO_API == 0xc018aa3ful && UFFDIO_ZEROPAGE == 0xc020aa04ul &&
                   UFFDIO_CONTINUE == 0xc020aa07ul && UFFDIO_POISON == 0xc020aa08ul,
               "the kernel's layout");

#endif
