/* SPDX-License-Identifier: Apache-2.0 */
/* The source's engine: answers requests at once, and pushes everything else.
 *
 *   urgent_run    one thread: reads requests, sends those pages       on the urgent connection
 *   push_run      one thread for each push connection: next_run chooses, batch_write sends; also in
 *                 a pass, while the guest runs: then only data, and the session looks in between
 *   look_run      a look at the stopped guest, on all CPUs; it is joined before that returns
 *
 * Guest RAM is read with pread (or process_vm_readv for anonymous memory) and not through a
 * mapping: a hole reads as zeros without being allocated, a truncated file is an error and not a
 * SIGBUS, and no page tables are built for a guest that is about to leave.
 *
 * Bitmaps, one bit for each page. Two are changed by atomic operations:
 *   data   found by SEEK_DATA (or /proc/PID/pagemap); a clear bit means hole, after the last scan
 *   sent   who sets it first sends the page; so each is pushed at most once. Cleared when the
 *          connections end, as what was on its way may be lost; pc_source_have then sets it for
 *          what the destination says it has, and by pc_source_look for what was written since
 * The others come with pc_source_track and are changed by pc_source_look only, when no push thread is
 * at work; each of its threads has words of its own:
 *   hot    written in both of the last two looks: a pass sends these last, since they will be
 *          written again, and the push sends them first, since the guest will want them
 *   warm   written in the last look (written again: `found` gathers them while it lasts)
 *   empty  data that was found discarded: zeros, unless it is found written
 *
 * A pass copies what the last look armed, so whatever is written after it was read is found by the
 * next look. No look while a pass is on: the page might be sent again on another connection and
 * arrive there first.
 *
 * A page that cannot be read (its memory or its swap is broken, the file was cut short) is lost, and
 * nothing else is: the destination is told (FRAME_LOST) and all others follow. A pass leaves it out;
 * it counts as data that was not found yet, so the next look finds it and the next pass tries it
 * again: until the guest has stopped it may write it anew. A destination that cannot be told is sent
 * all the rest, and then the engine fails.
 *
 * A request is always answered, also for a page that was pushed: the destination asks once and only
 * for what has not arrived, so it waits behind others on a push connection. To send it again cost
 * 0.1-0.3 % more bytes and took the guest's p99 from 1.6-4.9 ms to 0.4-2.2 ms (1 GiB QEMU guest
 * writing at random, two cores, loopback).
 *
 * Lock: `choosing` guards the push cursor and order, the bandwidth account and who tells of the
 * holes. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "dirty.h"
#include "engine.h"

/* Bytes of pages in one push frame: one COPY places them while the guest waits for its mmap lock;
 * 256 KiB were seen to hold a busy guest up for 10 ms, 64 KiB for 3 ms. */
enum { RUN_BYTES = 64 << 10, RUN_PAGES = RUN_BYTES / 4096 };
/* Answers to requests that came together leave together, at most this many. */
enum { URGENT_PAGES = 16 };
/* How far a push that was held up may catch up above its bandwidth. */
enum { BURST_NS = 10000000 };
/* How long a push that is held up waits before it looks again: the rate may be another one. */
enum { HOLD_NS = 100000000 };
enum { NO_HINT = -1 };
/* Extents of a file that are less apart than this are looked at together: arming the holes between
 * them takes no more page tables than the extents do. Not of anonymous memory, where an armed hole
 * looks like a page that was swapped out. */
enum { GAP_BYTES = 2 << 20 };
/* A slice of a look, in slots: whole words of the bitmaps, so that no two threads change one. */
enum { SLICE = (64 << 20) / 4096, LOOK_THREADS = 7 };
/* Calls of the kernel in one step of a scan: some milliseconds for 2 us each. */
enum { SCAN_CALLS = 4096 };
/* How often reading is tried again, and after how long, where the kernel does not say whether a page
 * is lost or there was no memory to read it with. */
enum { DOUBTS = 50, DOUBT_MS = 10 };

struct pc_source {
  struct pc_stats stats;
  struct region regions[PC_MAX_REGIONS];
  unsigned region_count;
  uint64_t slots;
  _Atomic uint64_t *data, *sent;
  uint64_t *hot, *warm, *found, *empty; /* one allocation; NULL: never tracked */
  int uffd, pagemap;                    /* -1: not tracked */
  int wake, stop;
  atomic_bool stopping;
  struct connection connections[PC_MAX_CONNECTIONS];

  uint64_t scanned; /* slot up to which the scan that is under way has come */
  bool losses;      /* the destination understands FRAME_LOST; changed when no thread is at work */
  _Atomic uint64_t untold; /* slot + 1 of a page that it could not be told of; 0: none */

  _Atomic int64_t hint; /* slot after the last page asked for; NO_HINT: used up */
  pthread_mutex_t choosing;
  pthread_cond_t holes_changed;
  enum { HOLES_UNKNOWN, HOLES_SENDING, HOLES_SENT } holes;
  bool pass; /* else the push; changed when no push thread is at work */
  enum order { ANY, HOT, COLD } order;
  uint64_t cursor;
  _Atomic uint64_t rate; /* bytes per second; 0: no limit; changed under `choosing` */
  uint64_t paid_until_ns;
};

/* --- reading guest RAM ------------------------------------------------------------------------ */

/* Returns 0 or -errno; -ENODATA: the RAM file is shorter than the guest's RAM. */
static int read_pages(const struct region *r, uint64_t page, uint64_t count, uint8_t *to) {
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

/* Whether this page is lost, and no other need be. EFAULT is what anonymous memory has for EIO. */
static bool is_lost(int failed) {
  return failed == -EIO || failed == -EHWPOISON || failed == -EFAULT || failed == -ENODATA;
}

/* Whether a process has ended or is being killed: its memory may be taken away already, page by page
 * (the OOM killer's reaper), and says EFAULT then. */
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

/* Reads one page, for as long as it may yet be read: a page that is swapped out takes memory, which
 * is waited for. Anonymous memory says the same (EFAULT) of that and of a page that is lost; so it
 * is tried `*doubts` times, which pages that follow each other share. -ECANCELED: being stopped. */
static int read_surely(struct pc_source *s, const struct region *r, uint64_t page, uint8_t *to,
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

static void read_failed(struct pc_source *s, const struct region *r, uint64_t page, int failed) {
  if (failed == -ESRCH)
    engine_fail(&s->stats, s->wake, PC_VMM_GONE, "the VMM has ended while its memory was read");
  else if (failed != -ECANCELED)
    engine_fail(&s->stats, s->wake, PC_MEMORY, "reading page %llu of region %d: %s",
                (unsigned long long)page, (int)(r - s->regions), strerrordesc_np(-failed));
}

static bool all_zero(const uint8_t *page, size_t bytes) {
  uint64_t first;
  memcpy(&first, page, sizeof first);
  return first == 0 && memcmp(page, page + sizeof first, bytes - sizeof first) == 0;
}

/* --- bitmaps ---------------------------------------------------------------------------------- */

/* Sets a bit; true when it was clear. */
static bool bit_take(_Atomic uint64_t *map, uint64_t slot) {
  uint64_t bit = 1ull << slot % 64;
  return !(atomic_fetch_or(&map[slot / 64], bit) & bit);
}

static void bits_set(_Atomic uint64_t *map, uint64_t from, uint64_t to) {
  for (uint64_t slot = from; slot < to;) {
    uint64_t n = 64 - slot % 64 < to - slot ? 64 - slot % 64 : to - slot;
    atomic_fetch_or(&map[slot / 64], (n == 64 ? ~0ull : (1ull << n) - 1) << slot % 64);
    slot += n;
  }
}

/* The first slot in [from, to) whose bit is `value`, or `to`. */
static uint64_t bits_find(const _Atomic uint64_t *map, bool value, uint64_t from, uint64_t to) {
  while (from < to) {
    uint64_t word = atomic_load_explicit(&map[from / 64], memory_order_relaxed);
    word = (value ? word : ~word) >> from % 64;
    if (word) {
      from += (uint64_t)__builtin_ctzll(word);
      return from < to ? from : to;
    }
    from += 64 - from % 64;
  }
  return to;
}

/* --- finding data ----------------------------------------------------------------------------- */

/* Marks the data of a shared file in pages [from, to) of a region, with at most `*calls` calls, which
 * are counted down. Returns the page up to which it has come. Only extents are asked for, so a hole
 * costs nothing for each of its pages. A file system without holes (hugetlbfs) is all data. What the
 * file has not got at all is no hole: it is taken for data, and will be found not to be readable. */
static uint64_t scan_file(struct pc_source *s, struct region *r, uint64_t from, uint64_t to,
                          int *calls) {
  off_t end = r->is.offset + (off_t)(to << r->page_shift);
  off_t at = r->is.offset + (off_t)(from << r->page_shift);
  while (at < end && *calls > 0) {
    off_t data = lseek(r->is.fd, at, SEEK_DATA), hole = end;
    *calls -= 2;
    if (data < 0 && errno == ENXIO) {
      struct stat file;
      data = fstat(r->is.fd, &file) || file.st_size < at ? at : file.st_size;
    } else if (data < 0) {
      data = at;
    } else if (data < end) { /* else to find where it ends would take 8 ms for each GiB of it */
      hole = lseek(r->is.fd, data, SEEK_HOLE);
    }
    if (data >= end)
      return to;
    if (hole < 0 || hole > end)
      hole = end;
    bits_set(s->data, r->first + ((uint64_t)(data - r->is.offset) >> r->page_shift),
             r->first + ((uint64_t)(hole - r->is.offset + r->is.page_size - 1) >> r->page_shift));
    at = hole;
  }
  return at < end ? (uint64_t)(at - r->is.offset) >> r->page_shift : to;
}

/* The same for anonymous memory: pagemap has 64 bits a page, 63 present, 62 swapped
 * (Documentation/admin-guide/mm/pagemap.rst). What cannot be known is taken for data. */
static uint64_t scan_anonymous(struct pc_source *s, struct region *r, uint64_t from, uint64_t to,
                               int *calls) {
  char path[32];
  uint64_t entries[512], each = r->is.page_size / 4096;
  snprintf(path, sizeof path, "/proc/%d/pagemap", r->is.pid);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  uint64_t small = from * each, last = to * each;
  for (; small < last && *calls > 0; *calls -= 4) {
    uint64_t n = last - small < 512 ? last - small : 512;
    off_t at = (off_t)((r->is.address / 4096 + small) * 8);
    ssize_t got = fd < 0 ? -1 : pread(fd, entries, n * 8, at);
    if (got < 8) {
      bits_set(s->data, r->first + small / each, r->first + to);
      small = last;
      break;
    }
    for (uint64_t i = 0; i < (uint64_t)got / 8; i++)
      if (entries[i] >> 62)
        bit_take(s->data, r->first + (small + i) / each);
    small += (uint64_t)got / 8;
  }
  if (fd >= 0)
    close(fd);
  return small / each;
}

/* Looks for data wherever none was known. So the scan after the stop only asks about the holes of
 * the scan before it. */
int pc_source_scan(struct pc_source *s) {
  int calls = SCAN_CALLS;
  for (unsigned i = 0; i < s->region_count; i++) {
    struct region *r = &s->regions[i];
    uint64_t end = r->first + r->is.pages;
    uint64_t from = bits_find(s->data, false, s->scanned > r->first ? s->scanned : r->first, end);
    while (from < end) {
      if (calls <= 0) {
        s->scanned = from;
        return 1;
      }
      uint64_t to = bits_find(s->data, true, from, end), at;
      at = (r->is.fd >= 0 ? scan_file : scan_anonymous)(s, r, from - r->first, to - r->first,
                                                        &calls);
      from = bits_find(s->data, false, r->first + at, end);
    }
  }
  s->scanned = 0;
  return 0;
}

/* From the beginning, to the end. */
static void scan_all(struct pc_source *s) {
  s->scanned = 0;
  while (pc_source_scan(s))
    ;
}

/* --- finding what was written ----------------------------------------------------------------- */

/* Pages [from, to) of a region are to be sent again: they were written, or (`discarded`) have become
 * zeros, which counts once. What is not known as data is not noted; it will be found as such. */
static void note(struct pc_source *s, struct region *r, uint64_t from, uint64_t to,
                 bool discarded) {
  for (uint64_t slot = r->first + from, end = r->first + to, n; slot < end; slot += n) {
    n = 64 - slot % 64 < end - slot ? 64 - slot % 64 : end - slot;
    uint64_t i = slot / 64, pages = (n == 64 ? ~0ull : (1ull << n) - 1) << slot % 64;
    pages &= atomic_load_explicit(&s->data[i], memory_order_relaxed);
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

/* Pages [from, to) are armed, but not in the VMM's page tables: the holes among them were data once.
 * hugetlbfs does not say where its holes are, but never swaps: all of them are sent once. */
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

/* What was discarded is not looked for at the stop: that takes five times as long, and a guest may
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

/* Extent by extent: to arm a hole would take page tables for it. */
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

/* In a blackout all CPUs look: a scan is 1 ms for each GiB. Else only this one, as the guest runs
 * on the others. */
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
    if (!failed) /* can it be looked at? */
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
  return atomic_load_explicit(&s->data[word], memory_order_relaxed) &
         ~atomic_load_explicit(&s->sent[word], memory_order_relaxed);
}

int64_t pc_source_look(struct pc_source *s, int how) {
  if (s->pagemap < 0)
    return -EINVAL;
  if (count_get(s->stats.pushing))
    return -EBUSY;
  scan_all(s);
  struct look l = {.source = s, .how = (enum pc_look)how};
  look_everywhere(s, &l);
  /* Asked last: what is found in an address space that ends meanwhile is too little. */
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

/* --- sending ---------------------------------------------------------------------------------- */

/* Waits until what was sent is paid for. It is waited before pages are taken, never with taken ones
 * in hand: nobody else would answer a fault on those. False: being stopped. */
static bool may_push(struct pc_source *s) {
  while (s->rate && !atomic_load(&s->stopping)) {
    pthread_mutex_lock(&s->choosing);
    uint64_t now = pc_monotonic_ns(), until = s->paid_until_ns;
    pthread_mutex_unlock(&s->choosing);
    if (until <= now)
      break;
    struct timespec wait = {0, (long)(until - now < HOLD_NS ? until - now : HOLD_NS)};
    struct pollfd stop = {.fd = s->stop, .events = POLLIN};
    ppoll(&stop, 1, &wait, NULL);
  }
  return !atomic_load(&s->stopping);
}

static void pay(struct pc_source *s, uint64_t bytes) {
  if (!s->rate)
    return;
  pthread_mutex_lock(&s->choosing);
  uint64_t now = pc_monotonic_ns(), rate = s->rate;
  if (s->paid_until_ns + BURST_NS < now)
    s->paid_until_ns = now - BURST_NS;
  if (rate)
    s->paid_until_ns += (uint64_t)((double)bytes * 1e9 / (double)rate);
  pthread_mutex_unlock(&s->choosing);
}

/* Frames being gathered for one write. */
struct batch {
  uint8_t *pages;
  size_t used;    /* bytes of `pages`, those of zero pages among them */
  uint64_t bytes; /* to be sent of these */
  struct frame frames[RUN_PAGES];
  uint8_t headers[RUN_PAGES][FRAME_BYTES];
  struct iovec iov[2 * RUN_PAGES];
  unsigned count;
  unsigned doubts; /* see read_surely */
};

/* Adds the page that stands in batch->pages at `used`, or is `lost`, to the last frame where it
 * follows it. */
static void batch_add(struct batch *b, const struct region *r, unsigned index, uint64_t page,
                      bool lost) {
  uint8_t kind = lost                                            ? FRAME_LOST
                 : all_zero(b->pages + b->used, r->is.page_size) ? FRAME_ZERO
                                                                 : FRAME_PAGES;
  uint32_t bytes = kind == FRAME_PAGES ? r->is.page_size : 0;
  struct frame *last = b->count ? &b->frames[b->count - 1] : NULL;
  if (last && last->kind == kind && last->region == index && last->page + last->count == page) {
    last->count++;
    last->payload += bytes;
  } else {
    b->frames[b->count++] = (struct frame){
        .kind = kind, .region = (uint16_t)index, .page = page, .count = 1, .payload = bytes};
  }
  b->used += r->is.page_size;
  b->bytes += bytes;
}

static int batch_write(struct pc_source *s, struct batch *b, struct connection *c) {
  int n = 0;
  uint64_t pages = 0, zero = 0, lost = 0, bytes = b->bytes + b->count * FRAME_BYTES;
  uint8_t *from = b->pages;
  for (unsigned i = 0; i < b->count; i++) {
    struct frame *f = &b->frames[i];
    frame_encode(b->headers[i], f);
    b->iov[n++] = (struct iovec){b->headers[i], FRAME_BYTES};
    if (f->kind == FRAME_PAGES)
      b->iov[n++] = (struct iovec){from, f->payload};
    else
      *(f->kind == FRAME_LOST ? &lost : &zero) += f->count;
    from += (uint64_t)f->count * s->regions[f->region].is.page_size;
    pages += f->count;
  }
  b->count = 0, b->used = 0, b->bytes = 0;
  int failed = n ? write_all(c->stream, b->iov, n) : 0;
  if (failed)
    return failed;
  count_add(s->stats.transferred_bytes, bytes);
  if (!c->urgent && s->pass) {
    count_add(s->stats.precopied_pages, pages - zero);
    count_add(s->stats.passed_pages, pages);
    return 0;
  }
  count_add(s->stats.zero_pages, zero);
  count_add(s->stats.lost_pages, lost);
  if (c->urgent)
    count_add(s->stats.urgent_pages, pages - zero - lost);
  else
    count_add(s->stats.pushed_pages, pages - zero - lost);
  return 0;
}

static void untold_failed(struct pc_source *s, uint64_t slot) {
  struct region *r = s->regions + s->region_count - 1;
  while (slot < r->first)
    r--;
  engine_fail(&s->stats, s->wake, PC_MEMORY, "page %llu of region %d, and perhaps others, cannot be "
              "read any more, and the version at the destination cannot be told of that; all else "
              "was sent", (unsigned long long)(slot - r->first), (int)(r - s->regions));
}

/* Whoever is the last to see it says so: the push that ends, or a request answered after that. */
static void look_at_untold(struct pc_source *s) {
  uint64_t untold = atomic_load(&s->untold);
  pthread_mutex_lock(&s->choosing);
  bool begun = s->holes == HOLES_SENT;
  pthread_mutex_unlock(&s->choosing);
  if (untold && begun && !s->pass && !atomic_load(&s->stopping) &&
      !__atomic_load_n(&s->stats.pushing, __ATOMIC_SEQ_CST))
    untold_failed(s, untold - 1);
}

/* Puts one page into a batch that could not be read with others, or says that it is lost. What was
 * gathered goes first: nobody waits for this page but who wants it. Returns 0, -errno of the
 * connection, or 1: not to go on. */
static int batch_doubtful(struct pc_source *s, struct batch *b, struct connection *c,
                          struct region *r, uint64_t page) {
  uint64_t slot = r->first + page;
  bool pass = !c->urgent && s->pass; /* while urgent pages are read it may change */
  if (!c->urgent)
    pay(s, b->bytes);
  int failed = batch_write(s, b, c);
  if (failed)
    return failed;
  failed = pass ? read_pages(r, page, 1, b->pages) : read_surely(s, r, page, b->pages, &b->doubts);
  if (failed && pass && (is_lost(failed) || failed == -ENOMEM)) {
    /* For the next look to find; in this order, or it is found by this pass again. */
    atomic_fetch_and(&s->data[slot / 64], ~(1ull << slot % 64));
    atomic_fetch_and(&s->sent[slot / 64], ~(1ull << slot % 64));
    return 0;
  }
  if (failed && !is_lost(failed)) {
    read_failed(s, r, page, failed);
    return 1;
  }
  if (failed && !s->losses) {
    atomic_store(&s->untold, slot + 1);
    look_at_untold(s);
  } else {
    batch_add(b, r, (unsigned)(r - s->regions), page, failed);
  }
  return 0;
}

static void connection_failed(struct pc_source *s, struct connection *c, int failed) {
  if (atomic_load(&s->stopping))
    return;
  engine_fail(&s->stats, s->wake, PC_CONNECTION, "the %s connection %s%s",
              c->urgent ? "urgent" : "push", failed ? "broke: " : "was closed by the destination",
              failed ? stream_why(c->stream, failed) : "");
}

static uint32_t largest_page(struct pc_source *s) {
  uint32_t size = 4096;
  for (unsigned i = 0; i < s->region_count; i++)
    size = s->regions[i].is.page_size > size ? s->regions[i].is.page_size : size;
  return size;
}

static void *urgent_run(void *argument) {
  struct connection *c = argument;
  struct pc_source *s = c->engine;
  struct frame_reader reader;
  struct frame f;
  struct batch b = {.doubts = DOUBTS};
  uint8_t *payload;
  uint32_t largest = largest_page(s);
  size_t room = largest > URGENT_PAGES * 4096 ? largest : URGENT_PAGES * 4096;
  b.pages = aligned_alloc(4096, room);
  int got = frame_reader_init(&reader, c->stream, 0, URGENT_PAGES * FRAME_BYTES);
  if (!b.pages)
    got = -ENOMEM;
  while (got >= 0 && (got = frame_read(&reader, &f, &payload)) == 1) {
    count_set(s->stats.beat_ns, pc_monotonic_ns());
    struct region *r = f.region < s->region_count ? &s->regions[f.region] : NULL;
    if (!r || f.kind != FRAME_REQUEST || f.count != 1 ||
        !frame_fits(&f, r->is.pages, r->is.page_size)) {
      got = -EPROTO;
      break;
    }
    count_add(s->stats.requests, 1);
    uint64_t slot = r->first + f.page;
    atomic_store_explicit(&s->hint, (int64_t)slot + 1, memory_order_relaxed);
    bit_take(s->sent, slot);
    if (b.used + r->is.page_size > room) { /* pages of several sizes: what there is goes first */
      got = batch_write(s, &b, c);
      if (got < 0)
        break;
    }
    if (!read_pages(r, f.page, 1, b.pages + b.used))
      batch_add(&b, r, f.region, f.page, false);
    else if ((got = batch_doubtful(s, &b, c, r, f.page)) > 0)
      goto out;
    if (got >= 0 && (b.used + 4096 > room || b.count == URGENT_PAGES || !frame_waiting(&reader)))
      got = batch_write(s, &b, c);
  }
  if (got == -EPROTO)
    engine_fail(&s->stats, s->wake, PC_BAD_FRAME,
                "the destination sent what is not a request for a page of this guest");
  else
    connection_failed(s, c, got);
out:
  frame_reader_free(&reader);
  free(b.pages);
  return NULL;
}

/* --- pushing ---------------------------------------------------------------------------------- */

/* Of 64 pages, those that are to be sent now. */
static uint64_t unsent(struct pc_source *s, uint64_t word, enum order order) {
  uint64_t pages = ~atomic_load_explicit(&s->sent[word], memory_order_relaxed);
  if (s->pass)
    pages &= atomic_load_explicit(&s->data[word], memory_order_relaxed);
  return order == ANY ? pages : pages & (order == HOT ? s->hot[word] : ~s->hot[word]);
}

/* The first of them from the cursor on and around, or `slots`. */
static uint64_t find_unsent(struct pc_source *s, enum order order) {
  uint64_t words = s->slots / 64, first = s->cursor / 64 % words;
  uint64_t pages = unsent(s, first, order) & ~0ull << s->cursor % 64;
  for (uint64_t i = first, n = 0;; pages = unsent(s, i, order)) {
    if (pages)
      return i * 64 + (uint64_t)__builtin_ctzll(pages);
    if (++n > words)
      return s->slots;
    i = i + 1 == words ? 0 : i + 1;
  }
}

/* The order of pushing, all of it: on from the page asked for last, because a guest goes on near
 * where it was, else on from where the push is; around, until every page was sent. Hot pages go
 * before the others then (after them in a pass), but for those near the page asked for. Takes the
 * pages it returns. */
static bool next_run(struct pc_source *s, struct region **region, uint64_t *page, uint64_t *count) {
  uint64_t run = 0;
  pthread_mutex_lock(&s->choosing);
  int64_t hint = atomic_exchange_explicit(&s->hint, NO_HINT, memory_order_relaxed);
  if (hint != NO_HINT)
    s->cursor = (uint64_t)hint;
  while (!run) {
    enum order order = hint != NO_HINT ? ANY : s->order;
    uint64_t slot = find_unsent(s, order);
    if (slot == s->slots) {
      if (order == ANY)
        break;
      s->order = ANY;
      continue;
    }
    struct region *r = s->regions;
    while (slot >= r->first + r->is.pages) /* a bit beyond it, in its padding, is never clear */
      r++;
    uint64_t most = r->is.page_size > RUN_BYTES ? 1 : RUN_BYTES >> r->page_shift;
    while (run < most && slot + run < r->first + r->is.pages &&
           unsent(s, (slot + run) / 64, order) >> (slot + run) % 64 & 1 &&
           bit_take(s->sent, slot + run))
      run++; /* none: the urgent thread was faster */
    s->cursor = slot + run;
    *region = r, *page = slot - r->first, *count = run;
  }
  pthread_mutex_unlock(&s->choosing);
  return run > 0;
}

/* What is not paid for yet is paid at the new rate. */
void pc_source_limit(struct pc_source *s, uint64_t bytes_per_second) {
  pthread_mutex_lock(&s->choosing);
  uint64_t now = pc_monotonic_ns(), rate = s->rate;
  double owed = s->paid_until_ns > now && rate ? (double)(s->paid_until_ns - now) * (double)rate : 0;
  if (s->paid_until_ns > now)
    s->paid_until_ns = now + (bytes_per_second ? (uint64_t)(owed / (double)bytes_per_second) : 0);
  s->rate = bytes_per_second;
  pthread_mutex_unlock(&s->choosing);
}

/* Zero frames being gathered: a run that may still grow, and whole ones before it. */
struct holes {
  struct frame run;
  uint8_t frames[64][FRAME_BYTES];
  unsigned used;
};

/* Ends the run and, when there are many frames or no more will come, sends them. */
static int holes_end_run(struct pc_source *s, struct holes *h, struct stream to, bool all) {
  if (h->run.count) {
    frame_encode(h->frames[h->used++], &h->run);
    count_add(s->stats.zero_pages, h->run.count);
    h->run.count = 0;
  }
  struct iovec iov = {h->frames, h->used * sizeof *h->frames};
  if (h->used == 0 || (h->used < 64 && !all))
    return 0;
  count_add(s->stats.transferred_bytes, iov.iov_len);
  h->used = 0;
  return write_all(to, &iov, 1);
}

/* Tells the destination of the holes, one frame for each extent. Takes their pages by words; those
 * that the urgent thread took it has answered. */
static int send_holes(struct pc_source *s, struct stream to) {
  struct holes h = {.run = {.kind = FRAME_ZERO}};
  int failed = 0;
  for (unsigned i = 0; i < s->region_count; i++) {
    struct region *r = &s->regions[i];
    for (uint64_t page = 0; page < r->is.pages && !failed; page += 64) {
      uint64_t hole = ~atomic_load(&s->data[(r->first + page) / 64]);
      if (hole)
        hole &= ~atomic_fetch_or(&s->sent[(r->first + page) / 64], hole);
      while (hole && !failed) {
        unsigned from = (unsigned)__builtin_ctzll(hole);
        uint64_t after = ~hole >> from;
        unsigned n = after ? (unsigned)__builtin_ctzll(after) : 64 - from;
        if (h.run.region != i || h.run.page + h.run.count != page + from || h.run.count >> 31)
          failed = holes_end_run(s, &h, to, false);
        if (!h.run.count)
          h.run.region = (uint16_t)i, h.run.page = page + from;
        h.run.count += n;
        hole &= from + n < 64 ? ~0ull << (from + n) : 0;
      }
    }
  }
  return failed ? failed : holes_end_run(s, &h, to, true);
}

/* One push thread finds the holes and tells of them; the others wait for it, so that nobody reads
 * what need not be read. */
static int holes_first(struct pc_source *s, struct stream to) {
  pthread_mutex_lock(&s->choosing);
  while (s->holes == HOLES_SENDING)
    pthread_cond_wait(&s->holes_changed, &s->choosing);
  bool mine = s->holes == HOLES_UNKNOWN;
  s->holes = mine ? HOLES_SENDING : s->holes;
  pthread_mutex_unlock(&s->choosing);
  if (!mine)
    return 0;
  int more = 1;
  s->scanned = 0; /* of the guest as it is now: what is not found is told to be zeros */
  while (more && !atomic_load(&s->stopping))
    more = pc_source_scan(s);
  int failed = more ? -ECANCELED : send_holes(s, to); /* what was not looked at is no hole */
  pthread_mutex_lock(&s->choosing);
  s->holes = HOLES_SENT;
  pthread_cond_broadcast(&s->holes_changed);
  pthread_mutex_unlock(&s->choosing);
  return failed;
}

static void *push_run(void *argument) {
  struct connection *c = argument;
  struct pc_source *s = c->engine;
  struct region *r;
  uint64_t page, count;
  uint32_t largest = largest_page(s);
  struct batch b = {.doubts = DOUBTS};
  b.pages = aligned_alloc(4096, largest > RUN_BYTES ? largest : RUN_BYTES);
  int failed = !b.pages ? -ENOMEM : s->pass ? 0 : holes_first(s, c->stream);
  while (!failed && may_push(s) && next_run(s, &r, &page, &count)) {
    count_set(s->stats.beat_ns, pc_monotonic_ns());
    int unread = read_pages(r, page, count, b.pages);
    for (uint64_t i = 0; i < count && !failed; i++) {
      if (!unread)
        batch_add(&b, r, (unsigned)(r - s->regions), page + i, false);
      else
        failed = batch_doubtful(s, &b, c, r, page + i);
    }
    pay(s, b.bytes);
    if (!failed)
      failed = batch_write(s, &b, c);
  }
  if (failed < 0)
    connection_failed(s, c, failed);
  free(b.pages);
  if (__atomic_sub_fetch(&s->stats.pushing, 1, __ATOMIC_SEQ_CST) == 0) {
    look_at_untold(s);
    engine_wake(s->wake);
  }
  return NULL;
}

/* --- life ------------------------------------------------------------------------------------- */

/* Nothing was sent yet, save the slots between regions: nobody ever finds one of these. */
static void forget_sent(struct pc_source *s) {
  for (uint64_t i = 0; i < s->slots / 64; i++)
    atomic_store_explicit(&s->sent[i], 0, memory_order_relaxed);
  for (struct region *r = s->regions; r < s->regions + s->region_count; r++)
    bits_set(s->sent, r->first + r->is.pages, r->first + ((r->is.pages + 63) & ~63ull));
  s->holes = HOLES_UNKNOWN;
}

void pc_source_tell_losses(struct pc_source *s, int understood) {
  s->losses = understood;
}

struct pc_stats *pc_source_stats(struct pc_source *s) {
  return &s->stats;
}

struct pc_source *pc_source_new(const struct pc_region *regions, unsigned count, int wake,
                                char error[200]) {
  struct pc_source *s = calloc(1, sizeof *s);
  if (!s) {
    snprintf(error, 200, "no memory for the engine");
    return NULL;
  }
  s->wake = wake, s->region_count = count, s->stop = -1, s->pagemap = -1;
  atomic_store(&s->hint, NO_HINT);
  pthread_mutex_init(&s->choosing, NULL);
  pthread_cond_init(&s->holes_changed, NULL);
  for (unsigned i = 0; i < PC_MAX_CONNECTIONS; i++)
    s->connections[i] = (struct connection){.engine = s, .stream = {.fd = -1}};
  s->slots = engine_regions(s->regions, regions, count, error);
  if (s->slots) {
    s->data = calloc(s->slots / 64, sizeof *s->data);
    s->sent = calloc(s->slots / 64, sizeof *s->sent);
    s->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!s->data || !s->sent || s->stop < 0)
      snprintf(error, 200, "making bitmaps of %llu pages: %s", (unsigned long long)s->slots,
               strerrordesc_np(errno));
  }
  if (!s->data || !s->sent || s->stop < 0) {
    pc_source_free(s);
    return NULL;
  }
  for (unsigned i = 0; i < count; i++)
    s->stats.total_pages += s->regions[i].is.pages;
  forget_sent(s);
  return s;
}

int pc_source_connect(struct pc_source *s, int fd, struct pc_tls *tls, int urgent) {
  struct stream stream = {.fd = fd, .tls = tls};
  for (unsigned i = 0; i < PC_MAX_CONNECTIONS; i++) {
    struct connection *c = &s->connections[i];
    if (c->stream.fd >= 0)
      continue;
    engine_socket(stream, urgent);
    c->stream = stream, c->urgent = urgent;
    return 0;
  }
  engine_fail(&s->stats, s->wake, PC_CONNECTION, "more than %d connections", PC_MAX_CONNECTIONS);
  engine_close(stream);
  return -EMFILE;
}

static int start(struct pc_source *s, bool urgent, const char *name, void *(*run)(void *)) {
  for (unsigned i = 0; i < PC_MAX_CONNECTIONS; i++) {
    struct connection *c = &s->connections[i];
    if (c->stream.fd < 0 || c->urgent != urgent || c->running)
      continue;
    if (!urgent)
      count_add(s->stats.pushing, 1);
    int failed = engine_thread(&c->thread, name, run, c);
    if (failed) {
      if (!urgent)
        count_add(s->stats.pushing, -1);
      engine_fail(&s->stats, s->wake, PC_CONNECTION, "starting a thread for a connection: %s",
                  strerrordesc_np(-failed));
      return failed;
    }
    c->running = true;
  }
  return 0;
}

int pc_source_serve(struct pc_source *s) {
  return start(s, true, "pc-urgent", urgent_run);
}

int pc_source_have(struct pc_source *s, unsigned region, uint64_t first, uint64_t count,
                   const uint8_t *bits) {
  struct region *r = region < s->region_count ? &s->regions[region] : NULL;
  if (!r || first > r->is.pages || count > r->is.pages - first)
    return -EINVAL;
  uint64_t slot = r->first + first;
  for (uint64_t i = 0; i < count; i++) {
    uint64_t from = i;
    while (i < count && bits[i / 8] >> i % 8 & 1)
      i++;
    bits_set(s->sent, slot + from, slot + i); /* a word at a time */
  }
  return 0;
}

/* The threads of a pass (or push) that is over end, so that their connections are free again. */
static int join_pushes(struct pc_source *s) {
  if (__atomic_load_n(&s->stats.pushing, __ATOMIC_ACQUIRE))
    return -EBUSY;
  for (struct connection *c = s->connections; c < s->connections + PC_MAX_CONNECTIONS; c++)
    if (c->stream.fd >= 0 && !c->urgent && c->running) {
      pthread_join(c->thread, NULL);
      c->running = false;
    }
  return 0;
}

int pc_source_copy(struct pc_source *s, uint64_t bytes_per_second) {
  int failed = join_pushes(s);
  if (failed)
    return failed;
  s->pass = true, s->order = s->hot ? COLD : ANY, s->cursor = 0;
  pc_source_limit(s, bytes_per_second);
  return start(s, false, "pc-push", push_run);
}

int pc_source_push(struct pc_source *s, uint64_t bytes_per_second) {
  int failed = s->pass ? join_pushes(s) : 0;
  if (failed)
    return failed;
  s->pass = false;
  pc_source_limit(s, bytes_per_second);
  if (s->hot)
    s->order = HOT;
  return start(s, false, "pc-push", push_run);
}

void pc_source_disconnect(struct pc_source *s) {
  atomic_store(&s->stopping, true);
  eventfd_write(s->stop, 1);
  engine_end_connections(s->connections);
  forget_sent(s); /* what was on its way may be lost; the destination drops what it has */
  eventfd_t taken;
  eventfd_read(s->stop, &taken);
  atomic_store(&s->stopping, false);
  atomic_store(&s->untold, 0);
  engine_forget_connections(&s->stats);
}

void pc_source_free(struct pc_source *s) {
  if (s->stop >= 0) {
    pc_source_disconnect(s);
    close(s->stop);
  }
  pc_source_untrack(s);
  free(s->hot);
  free((void *)s->data);
  free((void *)s->sent);
  pthread_cond_destroy(&s->holes_changed);
  pthread_mutex_destroy(&s->choosing);
  free(s);
}
