/* SPDX-License-Identifier: Apache-2.0 */
/* See place.h. */
#define _GNU_SOURCE
#include "place.h"

#include <errno.h>
#include <sys/ioctl.h>

#include "uffd.h"

/* The meaning of an errno depends on the verb. THERE, NOTHING and SPLIT are dealt with here, page
 * by page; all others end the run. Seen on Linux 6.18 and read in mm/userfaultfd.c. */
enum { THERE = WRONG + 1, NOTHING, SPLIT };

static const struct {
  int error;
  uint8_t of[4]; /* by verb */
} MEANINGS[] = {
    /* errno     COPY    ZERO    CONTINUE POISON */
    {EEXIST,    {THERE,  THERE,  THERE,   THERE}},  /* COPY and ZERO look into the file as well */
    {EFAULT,    {WRONG,  WRONG,  NOTHING, WRONG}},  /* CONTINUE: a hole. COPY: own buffer */
    {EIO,       {WRONG,  WRONG,  BROKEN,  WRONG}},  /* PG_hwpoison, or reading from swap failed */
    {EHWPOISON, {WRONG,  WRONG,  BROKEN,  WRONG}},  /* the same, of hugetlbfs */
    {ENOENT,    {SPLIT,  SPLIT,  SPLIT,   SPLIT}},  /* a run across two mappings, or none */
    {EAGAIN,    {AGAIN,  AGAIN,  AGAIN,   AGAIN}},
    {ENOMEM,    {LATER,  LATER,  LATER,   LATER}},  /* a page, its cgroup, or a page table */
    {ENOSPC,    {LATER,  LATER,  LATER,   LATER}},  /* the tmpfs is full, or no huge page is free */
    {EINVAL,    {WRONG,  WRONG,  WRONG,   NEVER}},  /* an ioctl that the kernel lacks */
    {ENOTTY,    {WRONG,  WRONG,  WRONG,   NEVER}},
    {ESRCH,     {GONE,   GONE,   GONE,    GONE}},
};

static unsigned meaning_of(enum verb verb, int error) {
  for (unsigned i = 0; i < sizeof MEANINGS / sizeof *MEANINGS; i++)
    if (MEANINGS[i].error == error)
      return MEANINGS[i].of[verb];
  return WRONG;
}

void wake_page(const struct region *r, uint64_t page) {
  struct uffdio_range range = {r->is.address + (page << r->page_shift), r->is.page_size};
  ioctl(r->is.uffd, UFFDIO_WAKE, &range);
}

void wake_all(const struct region *r) {
  struct uffdio_range range = {r->is.address, r->is.pages << r->page_shift};
  ioctl(r->is.uffd, UFFDIO_WAKE, &range);
}

/* Makes one call for a run. Returns 0, or errno with the number of pages done before it. */
static int call(const struct region *r, enum verb verb, uint64_t page, uint64_t count,
                const uint8_t *from, uint64_t *done) {
  uint64_t to = r->is.address + (page << r->page_shift), bytes = count << r->page_shift;
  int64_t got = 0;
  int failed = 0;
  if (verb == POISON) {
    struct uffdio_poison poison = {.range = {to, bytes}};
    failed = ioctl(r->is.uffd, UFFDIO_POISON, &poison);
    got = poison.updated;
  } else if (verb == CONTINUE) {
    struct uffdio_continue map = {.range = {to, bytes}};
    failed = ioctl(r->is.uffd, UFFDIO_CONTINUE, &map);
    got = map.mapped;
  } else if (verb == ZERO && r->is.page_size == 4096) {
    struct uffdio_zeropage zero = {.range = {to, bytes}};
    failed = ioctl(r->is.uffd, UFFDIO_ZEROPAGE, &zero);
    got = zero.zeropage;
  } else {
    struct uffdio_copy copy = {.dst = to, .src = (uintptr_t)from, .len = bytes};
    failed = ioctl(r->is.uffd, UFFDIO_COPY, &copy);
    got = copy.copy;
  }
  failed = failed ? errno : 0;
  *done = !failed ? count : got > 0 ? (uint64_t)got >> r->page_shift : 0;
  return failed;
}

enum meaning place(const struct region *r, enum verb verb, uint64_t page, uint64_t count,
                   const uint8_t *from, struct placing *p) {
  bool one_by_one = verb == ZERO && r->is.page_size != 4096; /* `from` has one huge page of zeros */
  uint64_t span = one_by_one ? 1 : count;
  *p = (struct placing){.done = 0};
  while (p->done < count) {
    uint64_t pages = span < count - p->done ? span : count - p->done, done;
    const uint8_t *at = verb == COPY ? from + (p->done << r->page_shift) : from;
    int error = call(r, verb, page + p->done, pages, at, &done);
    p->done += done;
    if (!error)
      span = one_by_one ? 1 : 2 * pages;
    if (!error || done) /* partly done: the next call says why it stopped */
      continue;
    p->error = error;
    unsigned meaning = meaning_of(verb, error);
    if (meaning == SPLIT && pages > 1) {
      span = pages / 2;
      continue;
    }
    if (meaning != THERE && meaning != NOTHING)
      return meaning == SPLIT ? WRONG : (enum meaning)meaning;
    wake_page(r, page + p->done); /* its thread may still sleep */
    if (meaning == THERE && !p->existing++)
      p->first_existing = page + p->done;
    p->holes += meaning == NOTHING;
    p->done++;
  }
  return PLACED;
}
