/* SPDX-License-Identifier: Apache-2.0 */
/* What a peer may send to the native engines, for libFuzzer (llvm.org/docs/LibFuzzer.html): frames to
 * the destination, requests to the source, the numbers of a Have; and to a staged destination frames,
 * numbers of a Stale, the seal and faults in any order. Real engines on memory of this
 * process, a real userfaultfd, real sockets; made once. A connection's thread function is called
 * here, without the thread, on a socket that has all of the input and then ends: thousands of
 * connections a second, and each run does the same again. (Threads: tests/native.)
 *
 * An input is one byte for the role, one that seeds what the guest did before, then what the peer
 * sends. With LONG set payloads are not in the input but made here, so that an input of some bytes
 * can carry many pages.
 *
 * Each run is held to a model that reads the same bytes: which pages come to be there, with what
 * content, what stays as it was, what is counted, what is answered. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine.h"

/* The buffers of 2 MiB are kept: to make one under the sanitizer takes longer than all the rest. */
static int kept_reader(struct frame_reader *r, struct stream s, size_t payload, size_t ahead);
#define frame_reader_init kept_reader
#define frame_reader_free(reader) (void)(reader)
/* For what is static in them. */
#include "answer.c"
#include "receive.c"
#include "source.c"
#include "uffd_native.c"
#undef frame_reader_init

enum { PAGE = 4096, BEFORE = 1, FIRST = 12, SECOND = 21, ALL = FIRST + SECOND };
enum { FILE_PAGES = BEFORE + ALL + 1 }; /* one at each end that belongs to nobody */
enum role { PUSH, URGENT, REQUESTS, HAVE, STAGED, ROLES, LONG = 0x80 };
/* What befalls a staged engine: one byte, and behind it what the step needs. */
enum step { FRAMES, STALE, FAULT, SEAL, SETTLE, HAVE_NOW, STEPS };
/* What both ways of a unix socket take before they are read: 40 requests are answered by 40 pages. */
enum { MOST_SENT = 150000, MOST_REQUESTED = 40 * FRAME_BYTES };

static struct pc_dest *dest, *staged;
static struct pc_source *source;
static int guest_file, source_file, record_file, wake;
static uint8_t *guest_at; /* where guest_file is mapped */
static uint8_t is[FILE_PAGES * PAGE];   /* the guest's memory as it is */
static uint8_t want[FILE_PAGES * PAGE]; /* as the model has it */
static uint8_t states[ALL];
static uint8_t stream[MOST_SENT];
static uint8_t source_pages[ALL * PAGE];

#define must(holds)                                                                                \
  do {                                                                                             \
    if (!(holds)) {                                                                                \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #holds);                          \
      abort();                                                                                     \
    }                                                                                              \
  } while (0)

static uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

static uint64_t pages_of(unsigned region) {
  return region == 0 ? FIRST : region == 1 ? SECOND : 0;
}

static uint8_t *page_at(uint8_t *memory, unsigned page) {
  return memory + (BEFORE + page) * PAGE;
}

static _Atomic uint8_t *state_of(unsigned page) {
  return &dest->record.pages[page < FIRST ? page : dest->regions[1].first + page - FIRST];
}

/* A staged engine's pages: the first region is a file, the second anonymous memory. */
static struct {
  uint8_t state, content, guest; /* content of the stage; what the guest sees, if it is mapped */
  bool mapped;
} shadow[ALL];
static uint8_t *staged_memory[2];
static int staged_file, staged_record;

/* --- once ------------------------------------------------------------------------------------- */

static int kept_reader(struct frame_reader *r, struct stream s, size_t payload, size_t ahead) {
  static struct frame_reader kept[3];
  struct frame_reader *one = &kept[payload == 0 ? 0 : ahead == FRAME_BYTES ? 1 : 2];
  if (!one->buffer)
    must(!frame_reader_init(one, s, payload, ahead));
  *r = *one;
  r->stream = s;
  return 0;
}

static void make_engines(void) {
  char error[200];
  guest_file = memfd_create("guest", MFD_CLOEXEC);
  source_file = memfd_create("source", MFD_CLOEXEC);
  record_file = memfd_create("record", MFD_CLOEXEC);
  wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  must(!ftruncate(guest_file, sizeof is) && !ftruncate(source_file, sizeof source_pages));
  uint8_t *at = mmap(NULL, sizeof is, PROT_READ | PROT_WRITE, MAP_SHARED, guest_file, 0);
  must(at != MAP_FAILED);
  guest_at = at;
  int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
  if (uffd < 0) {
    fprintf(stderr, "missing: userfaultfd\n");
    _exit(77);
  }
  struct pc_region regions[2] = {
      {.address = (uintptr_t)at + BEFORE * PAGE, .pages = FIRST, .page_size = PAGE, .uffd = uffd},
      {.address = (uintptr_t)at + (BEFORE + FIRST) * PAGE, .pages = SECOND, .page_size = PAGE,
       .uffd = uffd}};
  dest = pc_dest_new(regions, 2, record_file, wake, 0, error);
  must(dest && !pc_dest_register(dest, 0));
  regions[0].fd = regions[1].fd = source_file;
  regions[1].offset = FIRST * PAGE;
  for (unsigned page = 0; page < ALL; page++) /* every third a hole, every seventh written zeros */
    for (unsigned i = 0; i < PAGE; i++)
      source_pages[page * PAGE + i] = page % 3 && page % 7 ? (uint8_t)(page + i % 251) : 0;
  for (unsigned page = 0; page < ALL; page++)
    if (page % 3)
      must(pwrite(source_file, source_pages + page * PAGE, PAGE, page * PAGE) == PAGE);
  source = pc_source_new(regions, 2, wake, error);
  must(source && !pc_source_scan(source));
}

static void make_staged(void) {
  char error[200];
  staged_file = memfd_create("guest", MFD_CLOEXEC), staged_record = memfd_create("r", MFD_CLOEXEC);
  must(!ftruncate(staged_file, FIRST * PAGE));
  staged_memory[0] = mmap(NULL, FIRST * PAGE, PROT_READ, MAP_SHARED, staged_file, 0);
  staged_memory[1] = mmap(NULL, SECOND * PAGE, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  must(staged_memory[0] != MAP_FAILED && staged_memory[1] != MAP_FAILED);
  int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
  struct pc_region regions[2] = {
      {.address = (uintptr_t)staged_memory[0], .pages = FIRST, .page_size = PAGE, .uffd = uffd,
       .fd = staged_file},
      {.address = (uintptr_t)staged_memory[1], .pages = SECOND, .page_size = PAGE, .uffd = uffd,
       .fd = -1}};
  staged = pc_dest_new(regions, 2, staged_record, wake, 1, error);
  must(staged && !pc_dest_register(staged, 0));
}

static int connected(const uint8_t *data, size_t size, int *peer) {
  int fd[2], bytes = 1 << 20;
  must(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd));
  for (int i = 0; i < 2; i++)
    setsockopt(fd[i], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
  must(send(fd[1], data, size, MSG_DONTWAIT) == (ssize_t)size);
  must(!shutdown(fd[1], SHUT_WR));
  *peer = fd[1];
  return fd[0];
}

/* --- the destination -------------------------------------------------------------------------- */

/* What the model expects to be counted, and why the connection ended. */
struct counts {
  uint64_t confirmed, zero, carried, lost, duplicate, existing, bytes, passed, precopied;
  int64_t answered;
  int failure;
};

/* The guest and its host before the peer sends: some pages are waited for, some are in the file
 * already (an engine was killed before it confirmed them), some are confirmed. */
static void begin(unsigned seed) {
  must(!madvise(guest_at, sizeof is, MADV_DONTNEED)); /* memory errors too */
  must(!fallocate(guest_file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, sizeof is));
  memset(want, 0, sizeof want);
  memset(states, 0, sizeof states);
  memset((void *)dest->record.pages, 0, dest->record.slots);
  memset(&dest->stats, 0, sizeof dest->stats);
  dest->stats.total_pages = ALL;
  dest->stats.unanswered = ALL;
  for (unsigned page = 0; seed && page < ALL; page++) {
    uint32_t kind = mix(seed << 16 | page) % 8;
    if (kind == 1 || kind == 2) {
      memset(page_at(want, page), 0x77, PAGE);
      must(pwrite(guest_file, page_at(want, page), PAGE, (BEFORE + page) * PAGE) == PAGE);
      atomic_store(state_of(page), BEGUN);
      states[page] = BEGUN;
    }
    if (kind == 2 || kind == 3) {
      struct region *r = &dest->regions[page >= FIRST];
      must(fault(dest, r, page < FIRST ? page : page - FIRST, pc_monotonic_ns()) == ASK);
      states[page] |= WANTED;
    } else if (kind == 4) {
      atomic_store(state_of(page), DONE);
      states[page] = DONE;
      dest->stats.confirmed_pages++;
    }
  }
}

static bool there(unsigned page) {
  return page_at(want, page)[0] == 0x77;
}

static void model_page(struct counts *c, unsigned page, unsigned kind, const uint8_t *payload) {
  bool zero = kind == FRAME_ZERO;
  if (states[page] & DONE) {
    c->duplicate++;
    return;
  }
  if (kind == FRAME_LOST) { /* what is in the file and not mapped is hidden by the error */
    states[page] = DONE | LOST;
    c->confirmed++, c->lost++;
    return;
  }
  if (!zero || states[page]) { /* else it is noted, and nothing is placed */
    c->existing += there(page);
    if (payload && !there(page))
      memcpy(page_at(want, page), payload, PAGE);
  }
  states[page] = DONE;
  c->confirmed++;
  c->zero += zero;
  c->carried += !zero;
}

static uint64_t number(const uint8_t *from, unsigned bytes) {
  uint64_t n = 0;
  while (bytes--)
    n = n << 8 | *from++;
  return n;
}

typedef void page_model(struct counts *c, unsigned page, unsigned kind, const uint8_t *payload);

static bool may_be_lost = true; /* not before the seal */

static void model(struct counts *c, const uint8_t *at, size_t left, page_model *each) {
  for (;;) {
    c->failure = PC_CONNECTION;
    if (left < FRAME_BYTES)
      return;
    unsigned kind = at[1], region = (unsigned)number(at + 3, 2);
    uint64_t page = number(at + 6, 8), count = number(at + 15, 4), bytes = number(at + 20, 4);
    c->failure = PC_BAD_FRAME;
    if (at[0] != 0x95 || at[2] != 0xcd || at[5] != 0xcf || at[14] != 0xce || at[19] != 0xc6)
      return;
    if (kind < 1 || kind > 4 || bytes > 2 << 20)
      return;
    if (left - FRAME_BYTES < bytes) {
      c->failure = PC_CONNECTION;
      return;
    }
    uint64_t pages = pages_of(region);
    if (kind == 1 || (kind == 4 && !may_be_lost) || count == 0 || page >= pages || count > pages - page)
      return;
    if (bytes != (kind == 2 ? count * PAGE : 0))
      return;
    unsigned first = (unsigned)page + (region ? FIRST : 0);
    c->bytes += FRAME_BYTES + bytes;
    c->answered += (int64_t)count;
    for (unsigned i = 0; i < count; i++)
      each(c, first + i, kind, kind == 2 ? at + FRAME_BYTES + i * PAGE : NULL);
    at += FRAME_BYTES + bytes, left -= FRAME_BYTES + bytes;
  }
}

static void to_destination(const uint8_t *data, size_t size, bool urgent, unsigned seed) {
  int peer;
  struct counts c = {0};
  begin(seed);
  struct pc_stats before = dest->stats, *s = &dest->stats;
  model(&c, data, size, model_page);
  struct connection connection = {
      .engine = dest, .stream = {connected(data, size, &peer), NULL}, .urgent = urgent};
  receive_run(&connection);
  close(connection.stream.fd), close(peer);

  must(s->failure == c.failure && s->sentence[0]);
  must(s->confirmed_pages == before.confirmed_pages + c.confirmed);
  must(s->zero_pages == c.zero && s->duplicate_pages == c.duplicate);
  must(s->lost_pages == c.lost);
  must(s->existing_pages == c.existing && s->transferred_bytes == c.bytes);
  must((urgent ? s->urgent_pages : s->pushed_pages) == c.carried);
  must((urgent ? s->pushed_pages : s->urgent_pages) == 0);
  must(s->unanswered == ALL - (urgent ? c.answered : 0));
  for (unsigned page = 0; page < ALL; page++)
    must(*state_of(page) == states[page]);
  must(pread(guest_file, is, sizeof is, 0) == sizeof is);
  must(!memcmp(is, want, sizeof is));
}

/* --- a staged destination --------------------------------------------------------------------- */

static bool is_sealed;

static void place_as(unsigned page, uint8_t content) {
  shadow[page].state = DONE, shadow[page].mapped = true, shadow[page].guest = content;
}

static void model_staged(struct counts *c, unsigned page, unsigned kind, const uint8_t *payload) {
  bool zero = kind == FRAME_ZERO;
  uint8_t *state = &shadow[page].state;
  c->passed += !is_sealed;
  if (!is_sealed) {
    *state = zero ? HERE : HERE | CACHED;
    shadow[page].content = zero ? 0 : payload[0];
  } else if (*state & (DONE | HERE)) {
    c->duplicate++;
  } else if (kind == FRAME_LOST) {
    *state = DONE | LOST;
    c->confirmed++, c->lost++;
  } else {
    bool wanted = *state & WANTED, known = *state;
    /* Zeros for which nobody waits need no page; known anonymous memory gets one. */
    if (!zero || wanted || (page >= FIRST && known))
      place_as(page, zero ? 0 : payload[0]);
    *state = DONE;
    c->confirmed++, c->zero += zero, c->carried += !zero;
  }
}

/* The guest touches it, or nobody does and settle_run places it. */
static void model_here(struct counts *c, unsigned page, bool touched) {
  bool cached = shadow[page].state & CACHED;
  shadow[page].state = DONE;
  if (cached || touched)
    place_as(page, cached ? shadow[page].content : 0);
  c->confirmed++, c->precopied += cached, c->zero += !cached;
}

static bool came_in_a_pass(unsigned page) {
  return (shadow[page].state & (HERE | CACHED)) == (HERE | CACHED);
}

/* The guest touches it, and what came in passes beside it is placed too. */
static void model_around(struct counts *c, unsigned page) {
  unsigned most = AROUND_BYTES / PAGE, from = page, to = page + 1;
  unsigned first = page >= FIRST ? FIRST : 0, end = page >= FIRST ? ALL : FIRST;
  bool cached = came_in_a_pass(page);
  while (cached && (from - first) % most && came_in_a_pass(from - 1))
    from--;
  while (cached && (to - first) % most && to < end && came_in_a_pass(to))
    to++;
  while (from < to)
    model_here(c, from++, true);
}

static void model_fault(struct counts *c, unsigned page) {
  uint8_t *state = &shadow[page].state;
  struct region *r = &staged->regions[page >= FIRST];
  enum due expected = is_sealed && !(*state & (DONE | HERE | WANTED)) ? ASK : NOTHING_DUE;
  must(fault(staged, r, page < FIRST ? page : page - FIRST, pc_monotonic_ns()) == expected);
  if (!is_sealed)
    return;
  if (*state & HERE)
    model_around(c, page);
  else if (*state & DONE && !(*state & LOST) && !shadow[page].mapped)
    place_as(page, 0);
  else if (!(*state & DONE))
    *state |= WANTED;
}

static bool all_of(const uint8_t *at, uint8_t content) {
  return at[0] == content && !memcmp(at, at + 1, PAGE - 1);
}

/* All that can be seen of guest, file, record and counters. */
static void look_at_staged(const struct counts *c) {
  struct pc_stats *s = &staged->stats;
  uint64_t present = 0;
  for (unsigned page = 0; page < ALL; page++) {
    unsigned second = page >= FIRST, at = second ? page - FIRST : page;
    uint8_t state = atomic_load(&staged->record.pages[staged->regions[second].first + at]), one[PAGE];
    must(state == shadow[page].state);
    present += (state & (DONE | HERE)) != 0;
    uint64_t entry;
    static int pagemap = -1;
    if (pagemap < 0)
      pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uintptr_t address = (uintptr_t)staged_memory[second] + at * PAGE;
    must(pread(pagemap, &entry, 8, (off_t)(address / PAGE * 8)) == 8);
    bool mapped = entry >> 63;
    must(mapped == shadow[page].mapped);
    if (mapped)
      must(all_of(staged_memory[second] + at * PAGE, shadow[page].guest));
    if (!second && state & HERE) {
      must(pread(staged_file, one, PAGE, at * PAGE) == PAGE);
      must(all_of(one, shadow[page].content));
    }
    if (second && (state & (HERE | CACHED)) == (HERE | CACHED))
      must(all_of(staged->backings[1].at + at * PAGE, shadow[page].content));
  }
  must(s->present_pages == present && s->confirmed_pages == c->confirmed);
  must(s->zero_pages == c->zero && s->pushed_pages == c->carried && s->urgent_pages == 0);
  must(s->duplicate_pages == c->duplicate && s->precopied_pages == c->precopied);
  must(s->lost_pages == c->lost);
  must(s->passed_pages == c->passed && s->transferred_bytes == c->bytes);
  must(record_sealed(&staged->record) == is_sealed);
}

static void begin_staged(void) {
  must(!fallocate(staged_file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, FIRST * PAGE));
  must(!madvise(staged_memory[1], SECOND * PAGE, MADV_DONTNEED));
  must(!backing_clear(&staged->backings[1], &staged->regions[1], 0, SECOND));
  memset(shadow, 0, sizeof shadow);
  memset((void *)staged->record.pages, 0, staged->record.slots + 1);
  memset(&staged->stats, 0, sizeof staged->stats);
  staged->stats.total_pages = ALL;
  is_sealed = false;
}

/* The numbers of a Stale or a Have: region, first page, and as many pages as there are bits. */
static size_t bits_of(const uint8_t *data, size_t size, unsigned *region, uint64_t *first,
                      uint64_t *count) {
  if (size < 10)
    return 0;
  *region = data[0], *first = number(data + 1, 8), *count = data[9];
  size_t bytes = (*count + 7) / 8;
  return size - 10 < bytes ? 0 : 10 + bytes;
}

static size_t stale_step(const uint8_t *data, size_t size) {
  unsigned region;
  uint64_t first, count;
  size_t used = bits_of(data, size, &region, &first, &count);
  if (!used)
    return size;
  uint8_t *bits = malloc((count + 7) / 8 + !count); /* of its very size, for the sanitizer */
  memcpy(bits, data + 10, (count + 7) / 8);
  bool fits = region < 2 && first <= pages_of(region) && count <= pages_of(region) - first;
  int expected = !fits ? -EINVAL : is_sealed ? -EBUSY : 0;
  must(pc_dest_stale(staged, region, first, count, bits) == expected);
  for (uint64_t i = 0; !expected && i < count; i++)
    if (bits[i / 8] >> i % 8 & 1)
      shadow[first + i + (region ? FIRST : 0)].state &= (uint8_t)~HERE;
  free(bits);
  return used;
}

static size_t have_step(const uint8_t *data, size_t size) {
  unsigned region;
  uint64_t first, count;
  size_t used = bits_of(data, size, &region, &first, &count);
  if (!used)
    return size;
  uint8_t bits[32];
  bool fits = region < 2 && first <= pages_of(region) && count <= pages_of(region) - first;
  must(pc_dest_have(staged, region, first, count, bits) == (fits ? 0 : -EINVAL));
  for (uint64_t i = 0; fits && i < count; i++)
    must((bits[i / 8] >> i % 8 & 1) ==
         !!(shadow[first + i + (region ? FIRST : 0)].state & (DONE | HERE)));
  return used;
}

static void frames_step(struct counts *c, const uint8_t *data, size_t size) {
  int peer;
  may_be_lost = is_sealed;
  model(c, data, size, model_staged);
  may_be_lost = true;
  struct connection connection = {.engine = staged, .stream = {connected(data, size, &peer), NULL}};
  receive_run(&connection);
  close(connection.stream.fd), close(peer);
  must(staged->stats.failure == c->failure && staged->stats.sentence[0]);
  engine_forget_connections(&staged->stats);
  staged->stats.failure = PC_OK, staged->stats.sentence[0] = 0; /* a session would end here */
}

static size_t lengthened(const uint8_t *data, size_t size, unsigned n);

static void to_staged(const uint8_t *data, size_t size, bool longer) {
  struct counts c = {0};
  begin_staged();
  for (unsigned steps = 1; size; steps++) {
    enum step step = *data % STEPS;
    size_t used = 0;
    data++, size--;
    switch (step) {
    case FRAMES:
      if (size) {
        used = data[0] < size ? data[0] + 1u : size;
        if (longer)
          frames_step(&c, stream, lengthened(data + 1, used - 1, 16 * steps));
        else
          frames_step(&c, data + 1, used - 1);
      }
      break;
    case STALE:
      used = stale_step(data, size);
      break;
    case FAULT:
      if (size)
        model_fault(&c, data[0] % ALL), used = 1;
      break;
    case SEAL:
      must(!pc_dest_seal(staged));
      is_sealed = true;
      break;
    case SETTLE:
      must(pc_dest_settle(staged) == (is_sealed ? 0 : -EBUSY));
      if (staged->settler_started)
        must(!pthread_join(staged->settler, NULL));
      staged->settler_started = false;
      for (unsigned page = 0; is_sealed && page < ALL; page++)
        if (shadow[page].state & HERE)
          model_here(&c, page, false);
      break;
    default:
      used = have_step(data, size);
    }
    data += used, size -= used;
    look_at_staged(&c);
  }
}

/* --- the source ------------------------------------------------------------------------------- */

static bool is_request(const uint8_t *at) {
  return at[0] == 0x95 && at[1] == 1 && at[2] == 0xcd && at[5] == 0xcf && at[14] == 0xce &&
         at[19] == 0xc6 && number(at + 6, 8) < pages_of((unsigned)number(at + 3, 2)) &&
         number(at + 15, 4) == 1 && number(at + 20, 4) == 0;
}

static void to_source(const uint8_t *data, size_t size) {
  unsigned asked[MOST_REQUESTED / FRAME_BYTES], count = 0, answered = 0;
  for (; (count + 1) * FRAME_BYTES <= size && is_request(data + count * FRAME_BYTES); count++) {
    const uint8_t *at = data + count * FRAME_BYTES;
    asked[count] = (unsigned)number(at + 6, 8) + (number(at + 3, 2) ? FIRST : 0);
  }
  uint64_t total = source->stats.total_pages;
  source->stats = (struct pc_stats){.total_pages = total};
  int peer;
  struct connection connection = {
      .engine = source, .stream = {connected(data, size, &peer), NULL}, .urgent = true};
  urgent_run(&connection);
  close(connection.stream.fd);

  must(source->stats.requests == count);
  must(source->stats.failure == PC_BAD_FRAME || source->stats.failure == PC_CONNECTION);
  static uint8_t answers[MOST_REQUESTED / FRAME_BYTES * (FRAME_BYTES + PAGE)];
  size_t got = 0;
  for (ssize_t n; (n = recv(peer, answers + got, sizeof answers - got, 0)) > 0;)
    got += (size_t)n;
  close(peer);
  for (size_t at = 0; at < got;) {
    struct frame f;
    must(at + FRAME_BYTES <= got && !frame_decode(answers + at, &f));
    must(frame_fits(&f, pages_of(f.region), PAGE) && f.kind != FRAME_REQUEST);
    at += FRAME_BYTES;
    for (unsigned i = 0; i < f.count; i++, answered++) {
      unsigned page = (unsigned)f.page + i + (f.region ? FIRST : 0);
      must(answered < count && page == asked[answered]);
      must(f.kind == FRAME_ZERO ? page % 3 == 0 || page % 7 == 0
                                : !memcmp(answers + at + i * PAGE, source_pages + page * PAGE, PAGE));
    }
    at += f.payload;
    must(at <= got);
  }
  /* Only what came together with a header that is no request may stay without its answer. */
  must(answered == count || size >= (count + 1) * FRAME_BYTES);
}

/* The numbers as Python passes them on: it has seen to it that there are as many bits. */
static void have(const uint8_t *data, size_t size) {
  if (size < 11)
    return;
  unsigned region = data[0];
  uint64_t first = number(data + 1, 8), count = number(data + 9, 2);
  count = count < (size - 11) * 8 ? count : (size - 11) * 8;
  uint8_t *bits = malloc((count + 7) / 8 + !count); /* of its very size, for the sanitizer */
  memcpy(bits, data + 11, (count + 7) / 8);
  forget_sent(source);
  uint64_t pages = pages_of(region);
  bool fits = first <= pages && count <= pages - first && region < 2;
  must(pc_source_have(source, region, first, count, bits) == (fits ? 0 : -EINVAL));
  for (unsigned r = 0; r < 2; r++)
    for (uint64_t page = 0; page < pages_of(r); page++) {
      uint64_t slot = source->regions[r].first + page, i = page - first;
      bool told = fits && r == region && page >= first && i < count && bits[i / 8] >> i % 8 & 1;
      must((source->sent[slot / 64] >> slot % 64 & 1) == told);
    }
  free(bits);
}

/* --- one input -------------------------------------------------------------------------------- */

/* The payloads that the headers promise, made here: each of another content, from the n-th on. */
static size_t lengthened(const uint8_t *data, size_t size, unsigned n) {
  size_t to = 0;
  for (; size >= FRAME_BYTES && to + FRAME_BYTES <= sizeof stream; n++) {
    uint64_t bytes = number(data + 20, 4);
    memcpy(stream + to, data, FRAME_BYTES);
    to += FRAME_BYTES, data += FRAME_BYTES, size -= FRAME_BYTES;
    bytes = bytes < sizeof stream - to ? bytes : sizeof stream - to;
    for (uint64_t i = 0; i < bytes; i += PAGE, n++)
      memset(stream + to + i, (int)(n % 0x70 + 1), bytes - i < PAGE ? bytes - i : PAGE);
    to += bytes;
  }
  size = size < sizeof stream - to ? size : sizeof stream - to;
  memcpy(stream + to, data, size);
  return to + size;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (!dest)
    make_engines(), make_staged();
  if (size < 2)
    return 0;
  enum role role = (data[0] & 0x7f) % ROLES;
  bool longer = data[0] & LONG;
  unsigned seed = data[1];
  data += 2, size -= 2;
  if (role == REQUESTS) {
    to_source(data, size < MOST_REQUESTED ? size : MOST_REQUESTED);
  } else if (role == HAVE) {
    have(data, size);
  } else if (role == STAGED) {
    to_staged(data, size, longer);
  } else {
    if (longer)
      size = lengthened(data, size, 1), data = stream;
    to_destination(data, size < MOST_SENT ? size : MOST_SENT, role == URGENT, seed);
  }
  return 0;
}
