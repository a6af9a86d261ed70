/* SPDX-License-Identifier: Apache-2.0 */
/* Finds what the guest has written since it was sent, or discarded. Owns the bitmaps hot, warm,
 * found and empty, and the pagemap's descriptor; borrows the userfaultfd. The session calls it when
 * no push thread is at work. A look in a blackout has threads of its own, pc-look, and joins them
 * before it returns: no other thread can stop them, or need to. dirty.h says how the kernel is
 * asked. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "dirty.h"
#include "source.h"

/* Extents of a file that are closer together than this are looked at together: arming the holes
 * between them takes no more page tables than the extents do. Not in anonymous memory, where an
 * armed hole looks like a page that was swapped out. */
enum { GAP_BYTES = 2 << 20 };
/* Slots of one slice of a look: whole words of the bitmaps, so that no two threads change one. */
enum { SLICE = (64 << 20) / 4096, LOOK_THREADS = 7 };

/* Pages [from, to) of a region are to be sent again: they were written, or (`discarded`) have
 * become zeros, which counts once. Pages that are not known as data are not noted; the scan finds
 * them. */
static void note(struct pc_source *s, struct region *r, uint64_t from, uint64_t to,
                 bool discarded) {
  for (uint64_t slot = r->first + from, end = r->first + to, n; slot < end; slot += n) {
    uint64_t i = slot / 64, pages = bits_in_word(slot, end, &n) & bits_at(s->data, i);
    if (discarded)
      pages &= ~s->empty[i];
    if (!pages)
      continue;
    s->empty[i] = discarded ? s->empty[i] | pages : s->empty[i] & ~pages;
    uint64_t again = atomic_fetch_and(&s->sent[i], ~pages) & pages;
    s->found[i] |= again | (pages & s->warm[i]);
    count_add(s->stats.dirty_pages, (uint64_t)__builtin_popcountll(again));
  }
}

/* Pages [from, to) are armed, but not in the VMM's page tables: the holes among them were data
 * once. hugetlbfs does not say where its holes are, but never swaps: all of them are sent once. */
static void note_absent(struct pc_source *s, struct region *r, uint64_t from, uint64_t to) {
  off_t end = r->is.offset + (off_t)(to << r->page_shift);
  off_t at = r->is.offset + (off_t)(from << r->page_shift);
  if (r->is.page_size > 4096) {
    note(s, r, from, to, true);
    return;
  }
  while (at < end) {
    off_t hole = lseek(r->is.fd, at, SEEK_HOLE);
    if (hole < 0 || hole >= end)
      return;
    at = lseek(r->is.fd, hole, SEEK_DATA);
    if (at < 0 || at > end)
      at = end;
    note(s, r, (uint64_t)(hole - r->is.offset) >> r->page_shift,
         (uint64_t)(at - r->is.offset) >> r->page_shift, true);
  }
}

/* At the stop it does not look for discarded pages: that takes five times as long, and a guest may
 * not rely on what it has just given back. */
static int look_at(struct pc_source *s, struct region *r, uint64_t from, uint64_t to,
                   enum pc_look how) {
  struct dirty_range found[DIRTY_RANGES];
  bool absent = how != PC_LOOK_STOPPED && (r->is.fd >= 0 || r->is.page_size > 4096);
  uint64_t at = r->is.address + (from << r->page_shift);
  uint64_t end = r->is.address + (to << r->page_shift);
  while (at < end) {
    int n = dirty_scan(s->pagemap, &at, end, how == PC_LOOK_ARM, absent, found);
    if (n < 0)
      return n;
    for (int i = 0; i < n; i++) {
      uint64_t first = (found[i].start - r->is.address) >> r->page_shift;
      uint64_t last = (found[i].end - r->is.address + r->is.page_size - 1) >> r->page_shift;
      if (found[i].written)
        note(s, r, first, last, false);
      else
        note_absent(s, r, first, last);
    }
  }
  return 0;
}

/* Looks extent by extent: arming a hole would take page tables for it. */
static int look_between(struct pc_source *s, struct region *r, uint64_t from, uint64_t end,
                        enum pc_look how) {
  uint64_t gap = r->is.fd >= 0 ? GAP_BYTES >> r->page_shift : 0;
  int failed = 0;
  from = bits_find(s->data, true, from, end);
  while (from < end && !failed) {
    uint64_t to, next = from;
    do {
      to = bits_find(s->data, false, next, end);
      next = bits_find(s->data, true, to, end);
    } while (next < end && next - to < gap);
    failed = look_at(s, r, from - r->first, to - r->first, how);
    from = next;
  }
  return failed;
}

/* One look, by one or more threads, each of which takes the next slice of the slots. */
struct look {
  struct pc_source *source;
  enum pc_look how;
  atomic_uint_fast64_t next;
  atomic_int failed, region;
};

static void *look_run(void *argument) {
  struct look *l = argument;
  struct pc_source *s = l->source;
  uint64_t start;
  while (!atomic_load(&l->failed) && (start = atomic_fetch_add(&l->next, SLICE)) < s->slots)
    for (unsigned i = 0; i < s->region_count; i++) {
      struct region *r = &s->regions[i];
      uint64_t end = r->first + r->is.pages;
      end = end < start + SLICE ? end : start + SLICE;
      int failed = look_between(s, r, r->first > start ? r->first : start, end, l->how);
      if (failed) {
        atomic_store(&l->region, (int)i);
        atomic_store(&l->failed, failed);
      }
    }
  return NULL;
}

/* In a blackout all CPUs look, as a scan takes 1 ms for each GiB. Otherwise only this one does, as
 * the guest runs on the others. */
static void look_everywhere(struct pc_source *s, struct look *l) {
  pthread_t threads[LOOK_THREADS];
  uint64_t most = (s->slots - 1) / SLICE;
  long cpus = l->how == PC_LOOK_STOPPED ? sysconf(_SC_NPROCESSORS_ONLN) : 1;
  unsigned n = 0;
  while (n < LOOK_THREADS && n < most && (long)n + 1 < cpus &&
         !engine_thread(&threads[n], "pc-look", look_run, l))
    n++;
  look_run(l);
  while (n)
    pthread_join(threads[--n], NULL);
}

static int track_failed(struct pc_source *s, const char *doing, int region, int failed) {
  if (s->pagemap >= 0 && dirty_gone(s->pagemap)) {
    engine_fail(&s->stats, s->wake, PC_VMM_GONE, "%s: the VMM has ended", doing);
    return -ESRCH;
  }
  if (failed == -EOPNOTSUPP)
    engine_fail(&s->stats, s->wake, PC_MEMORY,
                "%s: this kernel cannot say which pages a guest writes (userfaultfd WP_ASYNC and "
                "PAGEMAP_SCAN), Linux 6.7 or newer can", doing);
  else if (failed)
    engine_fail(&s->stats, s->wake, PC_MEMORY, "%s, region %d: %s", doing, region,
                failed == -EPERM ? "not tracked (has the VMM mapped it anew?)"
                                 : strerrordesc_np(-failed));
  return failed;
}

int pc_source_track(struct pc_source *s, int uffd) {
  static const char DOING[] = "tracking what the guest writes";
  char path[32];
  uint64_t words = s->slots / 64;
  if (s->pagemap >= 0)
    return -EBUSY;
  free(s->hot);
  s->hot = calloc(4 * words, sizeof *s->hot);
  if (!s->hot)
    return track_failed(s, DOING, 0, -ENOMEM);
  s->warm = s->hot + words, s->found = s->warm + words, s->empty = s->found + words;
  snprintf(path, sizeof path, "/proc/%d/pagemap", s->regions[0].is.pid);
  s->uffd = uffd, s->pagemap = open(path, O_RDONLY | O_CLOEXEC);
  if (s->pagemap < 0) {
    int failed = -errno;
    if (failed != -ENOENT && failed != -ESRCH)
      return track_failed(s, DOING, 0, failed);
    engine_fail(&s->stats, s->wake, PC_VMM_GONE, "%s: the VMM has ended", DOING);
    return -ESRCH;
  }
  int failed = dirty_open(uffd);
  unsigned i = 0;
  for (; i < s->region_count && !failed; i++) {
    struct dirty_range found[DIRTY_RANGES];
    struct pc_region *r = &s->regions[i].is;
    uint64_t at = r->address;
    failed = dirty_register(uffd, at, r->pages * r->page_size);
    if (!failed) /* whether it can be looked at */
      failed = dirty_scan(s->pagemap, &at, at + r->page_size, false, false, found);
    failed = failed > 0 ? 0 : failed;
  }
  if (failed) {
    failed = track_failed(s, DOING, (int)i - 1, failed);
    pc_source_untrack(s);
  }
  return failed;
}

/* Data that the destination lacks, or has an old copy of. */
static uint64_t lacking(struct pc_source *s, uint64_t word) {
  return bits_at(s->data, word) & ~bits_at(s->sent, word);
}

int64_t pc_source_look(struct pc_source *s, int how) {
  if (s->pagemap < 0)
    return -EINVAL;
  if (count_get(s->stats.pushing))
    return -EBUSY;
  scan_all(s);
  struct look l = {.source = s, .how = (enum pc_look)how};
  look_everywhere(s, &l);
  /* Asked last: a look at an address space that ends meanwhile finds too little. */
  int failed = track_failed(s, "looking for what the guest has written", l.region, l.failed);
  if (failed)
    return failed;
  int64_t left = 0;
  for (uint64_t i = 0; i < s->slots / 64; i++) {
    s->hot[i] = s->warm[i] & s->found[i];
    s->warm[i] = s->found[i];
    s->found[i] = 0;
    left += __builtin_popcountll(lacking(s, i));
  }
  return left;
}

int64_t pc_source_stale(struct pc_source *s, unsigned region, uint64_t first, uint64_t count,
                        uint8_t *bits) {
  struct region *r = region < s->region_count ? &s->regions[region] : NULL;
  if (!r || first > r->is.pages || count > r->is.pages - first)
    return -EINVAL;
  int64_t stale = 0;
  for (uint64_t i = 0; i < count; i += 64) { /* a word is eight bytes of bits on x86-64 */
    uint64_t slot = r->first + first + i, left = count - i;
    uint64_t word = lacking(s, slot / 64) >> slot % 64;
    if (slot % 64 && slot / 64 + 1 < s->slots / 64)
      word |= lacking(s, slot / 64 + 1) << (64 - slot % 64);
    word &= left < 64 ? (1ull << left) - 1 : ~0ull;
    stale += __builtin_popcountll(word);
    memcpy(bits + i / 8, &word, left < 64 ? (left + 7) / 8 : 8);
  }
  return stale;
}

void pc_source_untrack(struct pc_source *s) {
  if (s->pagemap < 0)
    return;
  for (struct region *r = s->regions; r < s->regions + s->region_count; r++)
    dirty_unregister(s->uffd, r->is.address, r->is.pages * r->is.page_size);
  close(s->pagemap);
  s->pagemap = -1;
}
