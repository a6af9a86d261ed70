/* SPDX-License-Identifier: Apache-2.0 */
/* The staged destination: pages that come in passes while the guest runs elsewhere, come again,
 * turn out old, and are placed after the seal. Runs like engine_test.c; the test is the source, by
 * hand.
 *
 * What is to be seen in the end is the rig's content(page). Before the seal a page may be sent with
 * that, with zeros, or with junk, any number of times; what was not right last is called stale. */
#include "engine_rig.h"

#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum memory { TMPFS, ANONYMOUS, HUGETLB, HUGE_TMPFS };
enum sent { NEVER, JUNK, ZERO, FINAL };
enum { GUESTS = 4, DISCARDERS = 3, PUSHES = 2 };

static struct small_tmpfs huge_tmpfs;

/* Regions of this kind of memory; the guest's threads visit the first. */
static void make(struct guest *g, enum memory memory, uint64_t pages, unsigned regions) {
  if (memory == HUGETLB)
    want_huge_pages((int)(pages * regions));
  if (memory == HUGE_TMPFS)
    huge_tmpfs = new_tmpfs("size=256m,huge=always");
  for (unsigned i = 0; i < regions; i++) {
    struct ram *m = add_ram(g, pages, memory == HUGETLB ? HUGE : SMALL, mixed);
    if (memory == ANONYMOUS)
      to_anonymous(m);
    if (memory == HUGE_TMPFS) {
      close(m->file);
      m->file = file_in(&huge_tmpfs, i ? "second" : "first");
      check(!ftruncate(m->file, (off_t)pages * SMALL), "%m");
      check(pwrite(m->file, "", 1, 0) == 1, "%m");
      if (allocated(m->file) < HUGE)
        missing("huge pages on a tmpfs mounted with huge=always");
      discard(m, 0, 512);
      munmap(m->at, pages * SMALL);
      m->at = map(pages * SMALL, m->file);
    }
  }
}

static void unmake(struct guest *g, enum memory memory) {
  guest_free(g);
  if (memory == HUGE_TMPFS)
    free_tmpfs(&huge_tmpfs);
}

static struct pair new_staged(struct guest *g) {
  struct pair p = {.guest = g, .staged = true, .wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  dest_on(&p, memfd_create("record", MFD_CLOEXEC), false);
  return p;
}

static bool try_frame(int fd, enum frame_kind kind, unsigned region, uint64_t page, uint32_t count,
                      void *payload, uint32_t bytes) {
  uint8_t header[FRAME_BYTES];
  pc_frame_encode(header, kind, (int)region, page, count, bytes);
  struct iovec iov[2] = {{header, sizeof header}, {payload, bytes}};
  return !write_all(plain(fd), iov, bytes ? 2 : 1);
}

/* False: the connection has ended. */
UNSEEN static bool try_as(int fd, struct guest *g, unsigned region, uint64_t page, uint32_t count,
                    enum sent as) {
  struct ram *m = &g->ram[region];
  uint32_t bytes = count * m->page_size;
  bool zeros = as == ZERO;
  if (as == FINAL && draw() % 4) /* else zeros may be carried too */
    for (uint32_t i = zeros = 1; i <= count && zeros; i++)
      zeros = m->content(page + i - 1) != DATA;
  if (zeros)
    return try_frame(fd, FRAME_ZERO, region, page, count, NULL, 0);
  uint64_t *payload = malloc(bytes), junk = draw() | 1;
  for (uint32_t i = 0; i < count; i++)
    fill_page(m, page + i, (uint8_t *)payload + i * m->page_size);
  for (uint32_t i = 0; as == JUNK && i < bytes / 8; i++)
    payload[i] ^= junk;
  bool sent = try_frame(fd, FRAME_PAGES, region, page, count, payload, bytes);
  free(payload);
  return sent;
}

static void send_as(int fd, struct guest *g, unsigned region, uint64_t page, uint32_t count,
                    enum sent as) {
  check(try_as(fd, g, region, page, count, as), "%m");
}

/* --- a source by hand ------------------------------------------------------------------------- */

struct hand {
  struct guest *guest;
  int urgent, push[PUSHES];
  uint64_t passed; /* pages sent in passes */
  uint8_t *last[MAX_REGIONS]; /* how each page was sent last; NEVER once it is called stale */
  pthread_t answerer;
};

static bool right(struct hand *h, unsigned region, uint64_t page) {
  uint8_t last = h->last[region][page];
  return last == FINAL || (last == ZERO && h->guest->ram[region].content(page) != DATA);
}

/* Each page at most once, all that was sent before has arrived. */
static void send_pass(struct hand *h) {
  for (unsigned i = 0; i < h->guest->count; i++) {
    uint64_t pages = h->guest->ram[i].pages, count;
    for (uint64_t page = draw() % 12; page < pages; page += count + draw() % 12) {
      enum sent as = JUNK + draw() % 3;
      count = 1 + draw() % 40;
      count = count < pages - page ? count : pages - page;
      count = h->guest->ram[i].page_size == HUGE ? 1 : count;
      send_as(h->push[draw() % PUSHES], h->guest, i, page, (uint32_t)count, as);
      memset(h->last[i] + page, as, count);
      h->passed += count;
    }
  }
}

/* The bits of what is not right, and of some that is; they count as never sent from here on.
 * Returns how many are right. */
static uint64_t stale_bits(struct hand *h, unsigned region, uint8_t *bits) {
  uint64_t rights = 0;
  memset(bits, 0, h->guest->ram[region].pages / 8 + 1);
  for (uint64_t page = 0; page < h->guest->ram[region].pages; page++) {
    if (right(h, region, page) && draw() % 8) {
      rights++;
    } else {
      if (h->last[region][page] != NEVER || draw() % 2)
        bits[page / 8] |= (uint8_t)(1 << page % 8);
      h->last[region][page] = NEVER;
    }
  }
  return rights;
}

/* Answers requests until the connection ends. What is here is never asked for. */
static void *answerer_run(void *argument) {
  struct hand *h = argument;
  uint8_t in[FRAME_BYTES];
  struct frame f;
  uint64_t seed = 1;
  while (recv(h->urgent, in, sizeof in, MSG_WAITALL) == sizeof in) {
    check(!frame_decode(in, &f) && f.kind == FRAME_REQUEST && f.count == 1, " ");
    check(h->last[f.region][f.page] == NEVER, "page %llu of region %d was asked for",
          (unsigned long long)f.page, f.region);
    if (mix(seed++) % 4) { /* the others come by the push, sooner or later */
      uint8_t *payload = malloc(HUGE);
      struct ram *m = &h->guest->ram[f.region];
      bool zeros = m->content(f.page) != DATA;
      fill_page(m, f.page, payload);
      bool sent = try_frame(h->urgent, zeros ? FRAME_ZERO : FRAME_PAGES, f.region, f.page, 1,
                            payload, zeros ? 0 : m->page_size);
      free(payload);
      if (!sent)
        break;
    }
  }
  return NULL;
}

/* Everything that lacks, with duplicates of what does not: those are junk, and never to be seen.
 * Returns early when the connections end. */
static void push_rest(struct hand *h, uint64_t slowly) {
  for (unsigned i = 0; i < h->guest->count; i++) {
    uint64_t pages = h->guest->ram[i].pages, start = draw() % pages, count;
    for (uint64_t n = 0; n < pages; n += count) {
      uint64_t page = (start + n) % pages;
      bool lacks = h->last[i][page] == NEVER;
      uint64_t most = h->guest->ram[i].page_size == HUGE ? 1 : 1 + draw() % 30;
      for (count = 1; count < most && page + count < pages && n + count < pages &&
                      (h->last[i][page + count] == NEVER) == lacks;)
        count++;
      if ((lacks || draw() % 4 == 0) && !try_as(h->push[draw() % PUSHES], h->guest, i, page,
                                                (uint32_t)count, lacks ? FINAL : JUNK))
        return;
      if (slowly && draw() % slowly == 0)
        usleep(50);
    }
  }
}

static void answer(struct hand *h) {
  check(!pthread_create(&h->answerer, NULL, answerer_run, h), "thread");
}

static void connect_hand(struct pair *p, struct hand *h) {
  h->urgent = by_hand(p, true);
  for (unsigned i = 0; i < PUSHES; i++)
    h->push[i] = by_hand(p, false);
  answer(h);
}

static struct hand new_hand(struct guest *g) {
  struct hand h = {.guest = g};
  for (unsigned i = 0; i < g->count; i++)
    h.last[i] = calloc(g->ram[i].pages, 1);
  return h;
}

static void hang_up(struct hand *h) {
  shutdown(h->urgent, SHUT_RDWR);
  pthread_join(h->answerer, NULL);
  close(h->urgent);
  for (unsigned i = 0; i < PUSHES; i++)
    close(h->push[i]);
}

static void free_hand(struct hand *h) {
  for (unsigned i = 0; i < MAX_REGIONS; i++)
    free(h->last[i]);
}

/* --- everything at once, against a model ------------------------------------------------------ */

/* Discards pages of its own in the second region, before they were seen and after. */
struct discards {
  struct ram *ram;
  unsigned id, rounds;
  bool unseen; /* may also discard what it has not seen */
  uint8_t *is; /* of each page: not known, as the source had it, zeros */
  pthread_t thread;
};

static void *discards_run(void *argument) {
  struct discards *d = argument;
  for (uint64_t i = 0, seed = d->id * 7777777ull; i < d->rounds; i++) {
    uint64_t r = mix(seed + i), page = r % d->ram->pages;
    page -= page % DISCARDERS;
    page += d->id;
    if (page >= d->ram->pages)
      continue;
    if (d->unseen && !d->is[page] && r >> 40 & 1)
      discard(d->ram, page, 1);
    else if (d->is[page] && r >> 41 & 1)
      discard(d->ram, page, 1), d->is[page] = 2;
    if (!d->is[page])
      d->is[page] = page_is(d->ram, page, false) ? 1 : 2;
    check(page_is(d->ram, page, d->is[page] == 2), "page %llu", (unsigned long long)page);
  }
  return NULL;
}

static void model_once(enum memory memory, uint64_t pages, unsigned passes) {
  struct guest g = {0};
  make(&g, memory, pages, 2);
  struct guest visited = g;
  visited.count = 1;
  struct pair p = new_staged(&g);
  struct hand h = new_hand(&g);
  connect_hand(&p, &h);
  struct discards d[DISCARDERS];
  struct guest_thread *t = NULL;
  uint8_t *known = calloc(pages, 1), *bits = malloc(pages / 8 + 1);
  unsigned guests_at = (unsigned)(draw() % (passes + 3)), settle_at = (unsigned)(draw() % 3);
  uint64_t rights = 0;
  for (unsigned at = 0; at < passes + 3; at++) {
    if (at == passes) { /* the last pass has arrived */
      wait_until(get(p.at->passed_pages) == h.passed);
      for (unsigned i = 0; i < g.count; i++) {
        rights += stale_bits(&h, i, bits);
        check(!pc_dest_stale(p.dest, i, 0, pages / 2, bits), " ");
        for (uint64_t page = pages / 2; page < pages; page++) /* and one by one */
          check(!pc_dest_stale(p.dest, i, page, 1, &(uint8_t){bits[page / 8] >> page % 8 & 1}),
                " ");
      }
      check(get(p.at->present_pages) == rights, "%llu are present, %llu should be",
            (unsigned long long)p.at->present_pages, (unsigned long long)rights);
      check(get(p.at->requests) == 0 && get(p.at->confirmed_pages) == 0, "before the seal");
      for (unsigned i = 0; i < g.count; i++)
        for (uint64_t page = 0; page < pages; page++) {
          uint8_t bit = 0xff;
          check(!pc_dest_have(p.dest, i, page, 1, &bit) && bit == (h.last[i][page] != NEVER), " ");
        }
    }
    if (at == guests_at) {
      t = guest_start(&visited, GUESTS, 0);
      for (unsigned i = 0; i < DISCARDERS; i++) {
        d[i] = (struct discards){.ram = &g.ram[1], .id = i, .is = known,
                                 .unseen = memory != HUGETLB,
                                 .rounds = memory == HUGETLB ? 60 : (unsigned)pages};
        check(!pthread_create(&d[i].thread, NULL, discards_run, &d[i]), "thread");
      }
    }
    if (at == passes)
      check(!pc_dest_seal(p.dest), " ");
    if (at >= passes && at - passes == settle_at)
      check(!pc_dest_settle(p.dest), " ");
    if (at == passes + 1)
      push_rest(&h, 16);
    if (at < passes) {
      wait_until(get(p.at->passed_pages) == h.passed);
      send_pass(&h);
    }
  }
  guest_join(t, GUESTS);
  for (unsigned i = 0; i < DISCARDERS; i++)
    pthread_join(d[i].thread, NULL);
  wait_until(drained(&p));
  struct pc_stats *s = p.at;
  check(get(s->present_pages) == s->total_pages, " ");
  check(get(s->zero_pages) + get(s->urgent_pages) + get(s->pushed_pages) +
            get(s->precopied_pages) == s->total_pages, " ");
  if (draw() % 2)
    check(!pc_dest_unregister(p.dest, 0), "refused");
  check_guest(&visited);
  for (uint64_t page = 0; page < pages; page++)
    check(page_is(&g.ram[1], page, known[page] == 2), "page %llu", (unsigned long long)page);
  for (unsigned i = 0; i < GUESTS; i++)
    free(visited.ram[0].visited[i]);
  pc_dest_disconnect(p.dest);
  hang_up(&h), free_hand(&h);
  free(known), free(bits);
  finish(&p);
  unmake(&g, memory);
}

static void model(enum memory memory, uint64_t pages) {
  for (unsigned time = 0; time < 6; time += memory == HUGETLB || RARELY > 1 ? 2 : 1)
    model_once(memory, pages, time);
}

static void model_file(void) { model(TMPFS, 1501); }
static void model_anonymous(void) { model(ANONYMOUS, 1501); }
static void model_hugetlb(void) { model(HUGETLB, 10); }
static void model_huge_tmpfs(void) { model(HUGE_TMPFS, 2000); }

/* --- page by page ----------------------------------------------------------------------------- */

static void pass_one(struct pair *p, int fd, uint64_t page, enum sent as) {
  uint64_t passed = get(p->at->passed_pages);
  send_as(fd, p->guest, 0, page, 1, as);
  wait_until(get(p->at->passed_pages) == passed + 1);
}

static void call_stale(struct pair *p, uint64_t page) {
  check(!pc_dest_stale(p->dest, 0, page, 1, &(uint8_t){1}), " ");
}

/* Faults before the seal wait, for what is here too; the seal answers them or asks. */
static void waits(enum memory memory) {
  struct guest g = {0};
  make(&g, memory, 24, 1);
  struct ram *m = g.ram;
  m->content = all_data;
  struct pair p = new_staged(&g);
  take_hold(&p);
  pass_one(&p, p.push, 3, FINAL);
  pass_one(&p, p.push, 4, JUNK);
  struct reader r[3];
  for (unsigned i = 0; i < 3; i++)
    reader_start(&r[i], m, 3 + i);
  wait_until(get(p.at->faults) == 3);
  pass_one(&p, p.push, 6, FINAL); /* its time is enough for an answer that must not come */
  call_stale(&p, 4);
  check(get(p.at->present_pages) == 2, " ");
  check(pc_dest_settle(p.dest) == -EBUSY && pc_dest_poison(p.dest) == -EBUSY, "before the seal");
  check(!get(r[0].done) && !get(r[1].done) && !get(r[2].done), "answered");
  check(get(p.at->requests) == 0 && get(p.at->confirmed_pages) == 0, " ");
  check(!pc_dest_seal(p.dest) && !pc_dest_seal(p.dest), " ");
  pthread_join(r[0].thread, NULL);
  check(r[0].value == word_of(m, 3, 0), "%llx", (unsigned long long)r[0].value);
  uint64_t first = read_request(p.urgent), second = read_request(p.urgent);
  check((first == 4 && second == 5) || (first == 5 && second == 4), " ");
  check(!get(r[1].done) && !get(r[2].done) && bytes_waiting(p.urgent) == 0, " ");
  check(pc_dest_stale(p.dest, 0, 3, 1, &(uint8_t){1}) == -EBUSY, "after the seal");
  send_as(p.push, &g, 0, 3, 1, JUNK), send_as(p.push, &g, 0, 6, 1, JUNK); /* duplicates */
  send_page(p.urgent, m, 4), send_page(p.urgent, m, 5);
  pthread_join(r[1].thread, NULL), pthread_join(r[2].thread, NULL);
  wait_until(get(p.at->duplicate_pages) == 2);
  for (uint64_t page = 3; page < 7; page++)
    check(page_is(m, page, false), "page %llu", (unsigned long long)page);
  wait_until(get(p.at->confirmed_pages) == 4);
  check(get(p.at->precopied_pages) == 2 && get(p.at->urgent_pages) == 2, " ");
  pc_dest_disconnect(p.dest);
  let_go(&p);
  finish(&p);
  unmake(&g, memory);
}

static void waits_file(void) { waits(TMPFS); }
static void waits_anonymous(void) { waits(ANONYMOUS); }
static void waits_hugetlb(void) { waits(HUGETLB); }

/* Data, then zeros; zeros, then data; and so on: the last is right, by fault and in the background,
 * and zeros take no memory (but of hugetlbfs, which keeps its reservation). */
static void versions(enum memory memory) {
  static const enum sent PLAN[][3] = {
      {FINAL, ZERO, NEVER}, {ZERO, FINAL, NEVER}, {JUNK, FINAL, NEVER}, {ZERO, ZERO, NEVER},
      {JUNK, ZERO, FINAL},  {FINAL, JUNK, ZERO},  {ZERO, JUNK, FINAL},  {FINAL, FINAL, FINAL},
  };
  enum { PLANS = sizeof PLAN / sizeof *PLAN };
  struct guest g = {0};
  make(&g, memory, 2 * PLANS, 1);
  struct ram *m = g.ram;
  m->content = all_data;
  struct pair p = new_staged(&g);
  int push = by_hand(&p, false);
  bool zeros[2 * PLANS];
  uint64_t data = 0;
  for (unsigned pass = 0; pass < 3; pass++)
    for (uint64_t page = 0; page < 2 * PLANS; page++)
      if (PLAN[page % PLANS][pass] != NEVER) {
        pass_one(&p, push, page, PLAN[page % PLANS][pass]);
        zeros[page] = PLAN[page % PLANS][pass] == ZERO;
      }
  for (uint64_t page = 0; page < 2 * PLANS; page++)
    data += !zeros[page];
  check(get(p.at->present_pages) == 2 * PLANS, " ");
  check(!pc_dest_seal(p.dest), " ");
  for (uint64_t page = 0; page < PLANS; page++)
    check(page_is(m, page, zeros[page]), "page %llu", (unsigned long long)page);
  wait_until(get(p.at->confirmed_pages) == PLANS);
  check(!pc_dest_settle(p.dest), " ");
  wait_until(drained(&p));
  if (memory == TMPFS) /* the zeros of the second half were not touched */
    check(allocated(m->file) == (data + (2 * PLANS - data) / 2) * SMALL, "%llu",
          (unsigned long long)allocated(m->file));
  check(get(p.at->precopied_pages) == data && get(p.at->zero_pages) == 2 * PLANS - data, " ");
  uint64_t faults = get(p.at->faults);
  for (uint64_t page = PLANS; page < 2 * PLANS; page++)
    check(page_is(m, page, zeros[page]), "page %llu", (unsigned long long)page);
  check(get(p.at->faults) <= faults + (2 * PLANS - data), "data was not placed");
  check(!pc_dest_unregister(p.dest, 0), "refused");
  close(push);
  finish(&p);
  unmake(&g, memory);
}

static void versions_file(void) { versions(TMPFS); }
static void versions_anonymous(void) { versions(ANONYMOUS); }
static void versions_hugetlb(void) { versions(HUGETLB); }

/* One fault places what came in passes around its page, in the same 64 KiB, and nothing else. */
static void around(enum memory memory) {
  enum { PAGES = 40, WINDOW = 16 };
  struct guest g = {0};
  make(&g, memory, PAGES, 1);
  struct ram *m = g.ram;
  m->content = all_data;
  struct pair p = new_staged(&g);
  take_hold(&p);
  for (uint64_t page = 0; page < PAGES; page++)
    if (page != 5)
      pass_one(&p, p.push, page, page == 9 ? ZERO : page == 11 ? JUNK : FINAL);
  call_stale(&p, 11);
  check(!pc_dest_seal(p.dest), " ");
  check(page_is(m, 7, false) && page_is(m, 6, false) && page_is(m, 8, false), " ");
  check(get(p.at->faults) == 1, "%llu faults", (unsigned long long)get(p.at->faults));
  for (uint64_t page = PAGES - 1; page >= PAGES - PAGES % WINDOW; page--)
    check(page_is(m, page, false), " ");
  check(get(p.at->faults) == 2, "%llu faults", (unsigned long long)get(p.at->faults));
  wait_until(get(p.at->confirmed_pages) == 3 + PAGES % WINDOW);
  check(page_is(m, 9, true) && page_is(m, 0, false) && page_is(m, 4, false), " ");
  check(get(p.at->faults) == 4 && get(p.at->requests) == 0, "%llu faults",
        (unsigned long long)get(p.at->faults)); /* 0 to 4 by one */
  for (uint64_t page = 5; page <= 11; page += 6) {
    struct reader r;
    reader_start(&r, m, page);
    check(read_request(p.urgent) == page && !get(r.done), " ");
    send_page(p.urgent, m, page);
    pthread_join(r.thread, NULL);
    check(page_is(m, page, false), " ");
  }
  pc_dest_disconnect(p.dest);
  let_go(&p);
  finish(&p);
  unmake(&g, memory);
}

static void around_file(void) { around(TMPFS); }
static void around_anonymous(void) { around(ANONYMOUS); }

/* A page of a huge page of tmpfs has neighbours in the cache that nobody has sent. */
static void neighbours(void) {
  struct guest g = {0};
  make(&g, HUGE_TMPFS, 1024, 1);
  struct ram *m = g.ram;
  m->content = all_data;
  struct pair p = new_staged(&g);
  take_hold(&p);
  pass_one(&p, p.push, 5, FINAL);
  pass_one(&p, p.push, 8, ZERO);
  pass_one(&p, p.push, 9, JUNK);
  check(allocated(m->file) >= HUGE, "not a huge page");
  call_stale(&p, 9);
  check(!pc_dest_seal(p.dest) && !pc_dest_settle(p.dest), " ");
  check(page_is(m, 5, false) && page_is(m, 8, true), " ");
  struct reader r[2];
  for (unsigned i = 0; i < 2; i++) {
    uint64_t page = i ? 9 : 6;
    reader_start(&r[i], m, page);
    check(read_request(p.urgent) == page && !get(r[i].done), " ");
  }
  send_as(p.push, &g, 0, 7, 1, ZERO); /* not told in a pass */
  wait_until(get(p.at->confirmed_pages) == 3);
  check(page_is(m, 7, true), " ");
  send_as(p.push, &g, 0, 10, 1, FINAL);
  wait_until(get(p.at->confirmed_pages) == 4);
  for (unsigned i = 0; i < 2; i++) {
    check(!get(r[i].done), "a neighbour was seen");
    send_page(p.urgent, m, r[i].page);
    pthread_join(r[i].thread, NULL);
    check(page_is(m, r[i].page, false), " ");
  }
  /* Punched within the huge page, which is split then: all others are as they were. */
  discard(m, 5, 1);
  for (uint64_t page = 5; page <= 10; page++)
    check(page_is(m, page, page == 5 || page == 7 || page == 8), "page %llu",
          (unsigned long long)page);
  send_as(p.push, &g, 0, 11, 1, ZERO);
  wait_until(get(p.at->confirmed_pages) == 7);
  check(page_is(m, 11, true) && get(p.at->requests) == 2, " ");
  pc_dest_disconnect(p.dest);
  let_go(&p);
  finish(&p);
  unmake(&g, HUGE_TMPFS);
}

/* What is placed leaves the page tables and comes back, with what the guest has written. */
static void reclaimed(void) {
  enum { PAGES = 256 };
  struct guest g = {0};
  make(&g, TMPFS, PAGES, 1);
  struct ram *m = g.ram;
  struct pair p = new_staged(&g);
  int push = by_hand(&p, false);
  for (uint64_t page = 0; page < PAGES; page += 2)
    pass_one(&p, push, page, FINAL);
  check(!pc_dest_seal(p.dest) && !pc_dest_settle(p.dest), " ");
  for (uint64_t page = 1; page < PAGES; page += 2)
    send_as(push, &g, 0, page, 1, FINAL);
  wait_until(drained(&p));
  struct guest_thread *t = guest_start(&g, 1, 0);
  guest_join(t, 1);
  for (unsigned time = 0; time < 2; time++) {
    uint64_t faults = get(p.at->faults);
    madvise(m->at, PAGES * SMALL, MADV_PAGEOUT); /* which may be without effect */
    check_guest(&g);
    check(!madvise(m->at, PAGES * SMALL, MADV_DONTNEED), "%m");
    check_guest(&g);
    check(get(p.at->faults) >= faults + PAGES, "nothing left the page tables");
  }
  discard(m, 7, 3);
  check(page_is(m, 7, true) && page_is(m, 8, true) && page_is(m, 9, true), "not discarded");
  check(get(p.at->requests) == 0, " ");
  close(push);
  finish(&p);
  unmake(&g, TMPFS);
}

/* --- the kernel says no ----------------------------------------------------------------------- */

/* Without memory a pass fails; what comes after the seal waits until there is some. */
static void shortage(void) {
  struct small_tmpfs s = small_tmpfs(28);
  struct guest g = {0};
  struct ram *m = add_ram(&g, 64, SMALL, all_data);
  ram_in(&s, m);
  struct pair p = new_staged(&g);
  p.push = by_hand(&p, false);
  send_as(p.push, &g, 0, 0, 16, FINAL);
  send_as(p.push, &g, 0, 16, 32, JUNK);
  wait_until(get(p.at->failure) > PC_OK);
  check(get(p.at->failure) == PC_MEMORY && strstr(p.at->sentence, "page 16 of region 0"), "%s",
        p.at->sentence);
  check(get(p.at->passed_pages) == 16 && get(p.at->present_pages) == 16, " ");
  pc_dest_disconnect(p.dest);
  close(p.push);
  check(get(p.at->failure) == PC_OK, "not forgotten");
  check(!pc_dest_seal(p.dest) && !pc_dest_settle(p.dest), " ");
  wait_until(get(p.at->confirmed_pages) == 16);
  struct reader r;
  reader_start(&r, m, 40);
  take_hold(&p);
  check(read_request(p.urgent) == 40, " ");
  send_as(p.push, &g, 0, 16, 48, FINAL);
  wait_until(get(p.at->stalls) > 2);
  check(get(p.at->failure) == PC_OK && !get(r.done), "%s", p.at->sentence);
  pc_dest_disconnect(p.dest); /* returns though there is no memory */
  let_go(&p);
  check(get(p.at->confirmed_pages) == 16 && get(p.at->present_pages) == 16, " ");
  take_hold(&p);
  while (read_request(p.urgent) != 40) /* with what it came with, which was given back */
    ;
  send_page(p.urgent, m, 40);
  uint64_t stalls = get(p.at->stalls);
  wait_until(get(p.at->stalls) > stalls + 2);
  check(!ftruncate(s.ballast, 0), "%m");
  pthread_join(r.thread, NULL);
  send_as(p.push, &g, 0, 16, 48, FINAL);
  wait_until(drained(&p));
  check_guest(&g);
  let_go(&p);
  finish(&p);
  guest_free(&g);
  free_tmpfs(&s);
}

/* Before the seal: nobody waits any more. */
static void called_off(void) {
  struct guest g = {0};
  make(&g, TMPFS, 64, 1);
  struct pair p = new_staged(&g);
  int push = by_hand(&p, false);
  pass_one(&p, push, 3, FINAL);
  struct reader r[2];
  reader_start(&r[0], g.ram, 3), reader_start(&r[1], g.ram, 4);
  wait_until(get(p.at->faults) == 2);
  check(pc_dest_unregister(p.dest, 0) == -EBUSY && !get(r[0].done), " ");
  check(!pc_dest_unregister(p.dest, 1), " ");
  pthread_join(r[0].thread, NULL), pthread_join(r[1].thread, NULL);
  close(push);
  finish(&p);
  unmake(&g, TMPFS);
}

/* After the seal: what is here is not lost. */
static void given_up(void) {
  needs_poison();
  struct guest g = {0};
  make(&g, TMPFS, 64, 1);
  g.ram->content = all_data;
  struct pair p = new_staged(&g);
  int push = by_hand(&p, false);
  for (uint64_t page = 0; page < 40; page++)
    pass_one(&p, push, page, page < 30 ? FINAL : JUNK);
  for (uint64_t page = 30; page < 40; page++)
    call_stale(&p, page);
  check(!pc_dest_seal(p.dest), " ");
  pc_dest_disconnect(p.dest);
  check(pc_dest_poison(p.dest) == 34, "%s", p.at->sentence);
  check(get(p.at->present_pages) == 64 && get(p.at->confirmed_pages) == 34, " ");
  for (uint64_t page = 0; page < 15; page++)
    check(page_is(g.ram, page, false), " ");
  check(!pc_dest_settle(p.dest), " ");
  wait_until(drained(&p));
  for (uint64_t page = 0; page < 30; page++)
    check(page_is(g.ram, page, false), " ");
  close(push);
  finish(&p);
  unmake(&g, TMPFS);
}

/* --- recovery --------------------------------------------------------------------------------- */

/* An engine goes on with what a killed one has left: with all of a sealed record, with nothing that
 * was HERE of another one. */
static void record_states(bool seal) {
  enum { PAGES = 1000, SLOTS = 1024 };
  static const uint8_t STATES[] = {
      0, WANTED, CACHED, CACHED | WANTED, CLAIMED | CACHED, CLAIMED, HERE, HERE | CACHED, DONE,
      CLAIMED | HERE | CACHED, CLAIMED | HERE | CACHED | WANTED, DONE | WANTED,
  };
  struct guest g = {0};
  struct ram *m = add_ram(&g, PAGES, SMALL, mixed);
  struct pair p = {.guest = &g, .wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  uint8_t states[SLOTS + 1] = {[SLOTS] = seal}, now[SLOTS + 1], bytes[SMALL];
  uint64_t done = 0, here = 0;
  for (uint64_t page = 0; page < PAGES; page++) {
    uint8_t is = states[page] = STATES[draw() % sizeof STATES];
    if (!(is & CACHED) && is & (HERE | DONE) && mixed(page) == DATA)
      states[page] = is |= is & HERE ? CACHED : 0;
    done += (is & DONE) != 0, here += seal && is & HERE;
    fill_page(m, page, bytes);
    if (is & DONE || (is & HERE && is & CACHED && seal))
      check(pwrite(m->file, bytes, SMALL, (off_t)(page * SMALL)) == SMALL, "%m");
    else if (is & (CACHED | CLAIMED))
      check(pwrite(m->file, "old", 4, (off_t)(page * SMALL)) == 4, "%m");
  }
  int record = memfd_create("record", MFD_CLOEXEC);
  check(pwrite(record, states, sizeof states, 0) == sizeof states, "%m");
  p.staged = true;
  dest_on(&p, record, false);
  check(get(p.at->confirmed_pages) == done && get(p.at->present_pages) == done + here, " ");
  check(pread(record, now, sizeof now, 0) == sizeof now && now[SLOTS] == seal, " ");
  for (uint64_t page = 0; page < PAGES; page++) {
    uint8_t is = states[page], bit;
    uint8_t keeps = is & DONE ? DONE : (is & (seal ? HERE | CACHED : CACHED)) |
                                           (is & CLAIMED ? CACHED : 0);
    check(now[page] == keeps, "%x became %x", is, now[page]);
    check(!pc_dest_have(p.dest, 0, page, 1, &bit) && bit == !!(keeps & (DONE | HERE)), " ");
  }
  int push = by_hand(&p, false);
  if (!seal) { /* it may be passed on to the seal */
    send_as(push, &g, 0, 0, 100, FINAL);
    wait_until(get(p.at->passed_pages) == 100);
  }
  check(!pc_dest_seal(p.dest) && !pc_dest_settle(p.dest), " ");
  struct guest_thread *t = guest_start(&g, 2, 0);
  for (uint64_t page = 0; page < PAGES; page += 20)
    send_as(push, &g, 0, page, 20, FINAL);
  guest_join(t, 2);
  wait_until(drained(&p));
  check_guest(&g);
  close(push);
  finish(&p);
  guest_free(&g);
}

static void goes_on_sealed(void) { record_states(true); }
static void record_unsealed(void) { record_states(false); }

/* Daemons are killed after the seal while they take faults, receive and place. Between the lives
 * the source hears what is here. Threads of the guest write into what they find all the time. */
enum { LIVES = 5 - RARELY / 2 };

struct shared { /* with the daemons */
  uint64_t passed;
  uint8_t stale[512], have[512];
};

static void daemon_run(struct pair *p, int record, struct shared *s, int go, int ready,
                       int ends[1 + PUSHES], bool first) {
  char byte;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  check(read(go, &byte, 1) == 1, "%m");
  dest_on(p, record, !first);
  if (!first) {
    check(!pc_dest_have(p->dest, 0, 0, p->guest->ram->pages, s->have), " ");
    check(!pc_dest_settle(p->dest), " ");
  }
  check(write(ready, "", 1) == 1, "%m");
  for (unsigned i = 0; i < 1 + PUSHES; i++)
    check(!pc_dest_connect(p->dest, ends[i], NULL, i == 0), " ");
  if (first) {
    check(read(go, &byte, 1) == 1, "%m"); /* the passes were sent */
    wait_until(get(p->at->passed_pages) == get(s->passed));
    check(!pc_dest_stale(p->dest, 0, 0, p->guest->ram->pages, s->stale), " ");
    check(!pc_dest_seal(p->dest) && !pc_dest_settle(p->dest), " ");
    check(write(ready, "", 1) == 1, "%m");
  }
  for (;;)
    pause();
}

static void take_up(struct hand *h, int ends[1 + PUSHES]) {
  h->urgent = ends[0];
  memcpy(h->push, ends + 1, sizeof h->push);
  for (unsigned i = 0; i < 1 + PUSHES; i++)
    fcntl(ends[i], F_SETFL, 0);
}

/* What the destination has is not sent again; the rest is. */
static void told(struct hand *h, const uint8_t *have) {
  for (uint64_t page = 0; page < h->guest->ram->pages; page++)
    h->last[0][page] = have[page / 8] >> page % 8 & 1 ? FINAL : NEVER;
}

static void *pusher_run(void *argument) {
  push_rest(argument, 2);
  return NULL;
}

static void killed(enum memory memory, uint64_t pages) {
  struct guest g = {0};
  make(&g, memory, pages, 1);
  struct pair p = {.guest = &g, .staged = true, .wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  int record = memfd_create("record", MFD_CLOEXEC), go[LIVES][2], ready[2];
  int ends[LIVES][1 + PUSHES][2];
  struct shared *s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
                          0);
  pid_t child[LIVES];
  char byte;
  check(!pipe(ready), "%m");
  for (unsigned life = 0; life < LIVES; life++) { /* all of them before there are threads */
    int theirs[1 + PUSHES];
    check(!pipe(go[life]), "%m");
    for (unsigned i = 0; i < 1 + PUSHES; i++)
      tcp_pair(ends[life][i]), theirs[i] = ends[life][i][0];
    child[life] = fork();
    if (!child[life])
      daemon_run(&p, record, s, go[life][0], ready[1], theirs, life == 0);
    for (unsigned i = 0; i < 1 + PUSHES; i++)
      close(theirs[i]);
  }
  struct hand h = new_hand(&g);
  struct guest_thread *t = NULL;
  for (unsigned life = 0; life < LIVES; life++) {
    int mine[1 + PUSHES];
    pthread_t pusher;
    for (unsigned i = 0; i < 1 + PUSHES; i++)
      mine[i] = ends[life][i][1];
    check(write(go[life][1], "", 1) == 1 && read(ready[0], &byte, 1) == 1, "%m");
    if (life)
      told(&h, s->have);
    take_up(&h, mine);
    if (!life) {
      send_pass(&h);
      s->passed = h.passed;
      stale_bits(&h, 0, s->stale);
    }
    answer(&h);
    if (!life) {
      t = guest_start(&g, GUESTS, 0);
      check(write(go[life][1], "", 1) == 1 && read(ready[0], &byte, 1) == 1, "%m");
    }
    useconds_t lives = (useconds_t)(draw() % (life ? 4000 : 1500));
    check(!pthread_create(&pusher, NULL, pusher_run, &h), "thread");
    usleep(lives);
    kill(child[life], SIGKILL), waitpid(child[life], NULL, 0);
    pthread_join(pusher, NULL);
    hang_up(&h);
    close(go[life][0]), close(go[life][1]);
  }
  dest_on(&p, record, true);
  printf("%llu of %llu pages were here\n", (unsigned long long)p.at->present_pages,
         (unsigned long long)pages);
  check(!pc_dest_have(p.dest, 0, 0, pages, s->have) && !pc_dest_settle(p.dest), " ");
  told(&h, s->have);
  connect_hand(&p, &h);
  push_rest(&h, 0);
  guest_join(t, GUESTS);
  wait_until(drained(&p));
  check(!pc_dest_unregister(p.dest, 0), "refused");
  check_guest(&g);
  pc_dest_disconnect(p.dest);
  hang_up(&h), free_hand(&h);
  finish(&p);
  unmake(&g, memory);
  munmap(s, sizeof *s), close(ready[0]), close(ready[1]);
}

static void killed_file(void) { killed(TMPFS, 4000); }
static void killed_anonymous(void) { killed(ANONYMOUS, 4000); }
static void killed_hugetlb(void) { killed(HUGETLB, 16); }
static void killed_huge_tmpfs(void) { killed(HUGE_TMPFS, 4000); }

static const struct subtest SUBTESTS[] = {
    {"model_file", model_file},
    {"model_anonymous", model_anonymous},
    {"model_hugetlb", model_hugetlb},
    {"model_huge_tmpfs", model_huge_tmpfs},
    {"waits_file", waits_file},
    {"waits_anonymous", waits_anonymous},
    {"waits_hugetlb", waits_hugetlb},
    {"versions_file", versions_file},
    {"versions_anonymous", versions_anonymous},
    {"versions_hugetlb", versions_hugetlb},
    {"around_file", around_file},
    {"around_anonymous", around_anonymous},
    {"neighbours", neighbours},
    {"reclaimed", reclaimed},
    {"shortage", shortage},
    {"called_off", called_off},
    {"given_up", given_up},
    {"record_sealed", goes_on_sealed},
    {"record_unsealed", record_unsealed},
    {"killed_file", killed_file},
    {"killed_anonymous", killed_anonymous},
    {"killed_hugetlb", killed_hugetlb},
    {"killed_huge_tmpfs", killed_huge_tmpfs},
};

int main(int argc, char **argv) {
  return subtest_main(argc, argv, SUBTESTS, sizeof SUBTESTS / sizeof *SUBTESTS);
}
