/* SPDX-License-Identifier: Apache-2.0 */
/* The source's engine while the guest runs: what it sees of writes, and what it copies in passes.
 * `dirty_test NAME` runs one subtest, as engine_test does (see there for how it ends).
 *
 * A child process plays the VMM: it has guest RAM mapped and writes what it is told to, or at random
 * until it is stopped. It has no sanitizer's runtime to fear: it only loads and stores. The test
 * has the child's userfaultfd, as the daemon has. */
#pragma GCC diagnostic ignored "-Wunused-function"
#include "engine_rig.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>

/* --- the VMM ---------------------------------------------------------------------------------- */

enum { MAX_RAM = 3 };
enum kind { FILE_RAM, ANONYMOUS, HUGE_FILE, KINDS };
static const char *const KIND[] = {"file", "anonymous", "huge"};

struct order {
  enum { NOTHING, FILL, READ, DISCARD, WRITE_AT_RANDOM, FROM_PIPE, FROM_FILE, CLOSE, END } what;
  unsigned ram;
  uint64_t page, count, value; /* CLOSE: the descriptor */
};

struct vmm {
  pid_t pid;
  int orders, uffd; /* uffd: ours; -1 once closed */
  unsigned count;
  struct part {
    uint64_t pages;
    uint32_t page_size;
    int fd;
    uint8_t *at;
  } ram[MAX_RAM];
  volatile int *stop; /* of WRITE_AT_RANDOM */
};

static long faults_taken(void) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_minflt;
}

static void store(struct part *m, uint64_t page, uint64_t value) {
  volatile uint64_t *words = (uint64_t *)(m->at + page * m->page_size);
  words[page % 512] = value; /* and nothing else: a page is found by its least change */
}

static void discard_part(struct part *m, uint64_t page, uint64_t count) {
  uint8_t *at = m->at + page * m->page_size;
  if (m->fd >= 0)
    fallocate(m->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(page * m->page_size),
              (off_t)(count * m->page_size));
  madvise(at, count * m->page_size, MADV_DONTNEED);
}

static long from_kernel(struct part *m, struct order *o) {
  int fd[2];
  uint64_t bytes[512];
  for (unsigned i = 0; i < 512; i++)
    bytes[i] = o->value;
  if (o->what == FROM_PIPE ? pipe(fd) : (fd[0] = fd[1] = memfd_create("disk", 0)) < 0)
    return -1;
  for (uint64_t page = o->page; page < o->page + o->count; page++) {
    if (write(fd[1], bytes, sizeof bytes) != sizeof bytes)
      return -1;
    if (o->what == FROM_FILE)
      lseek(fd[0], 0, SEEK_SET);
    if (read(fd[0], m->at + page * m->page_size, sizeof bytes) != sizeof bytes)
      return -1;
    if (o->what == FROM_FILE)
      lseek(fd[0], 0, SEEK_SET);
  }
  close(fd[0]), close(fd[1]);
  return 0;
}

static void vmm_run(struct vmm *v, int orders) {
  struct order o;
  uint64_t seed = 1;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  alarm(0);
  int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
  long answer = uffd;
  while (write(orders, &answer, sizeof answer) == sizeof answer &&
         read(orders, &o, sizeof o) == sizeof o) {
    struct part *m = &v->ram[o.ram];
    answer = faults_taken();
    volatile uint64_t sum = 0;
    switch (o.what) {
    case FILL:
      for (uint64_t page = o.page; page < o.page + o.count; page++)
        store(m, page, o.value);
      break;
    case READ:
      for (uint64_t page = o.page; page < o.page + o.count; page++)
        sum += *(volatile uint64_t *)(m->at + page * m->page_size);
      break;
    case DISCARD:
      discard_part(m, o.page, o.count);
      break;
    case WRITE_AT_RANDOM:
      answer = 0;
      if (write(orders, &answer, sizeof answer) != sizeof answer)
        _exit(1);
      for (; !*v->stop; seed++) {
        struct part *any = &v->ram[mix(seed) % v->count];
        store(any, mix(~seed) % any->pages, mix(seed) | 1);
        if (seed % 64 == 0)
          sched_yield();
      }
      break;
    case FROM_PIPE:
    case FROM_FILE:
      if (from_kernel(m, &o))
        _exit(1);
      break;
    case CLOSE:
      close((int)o.value);
      break;
    default:
      _exit(0);
    }
    answer = faults_taken() - answer;
  }
  _exit(0);
}

static long answer_of(struct vmm *v) {
  long answer;
  check(read(v->orders, &answer, sizeof answer) == sizeof answer, "the VMM has ended: %m");
  return answer;
}

/* Returns how many faults the VMM took. */
static long tell_vmm(struct vmm *v, struct order o) {
  check(write(v->orders, &o, sizeof o) == sizeof o, "%m");
  return answer_of(v);
}

static void add_part(struct vmm *v, enum kind kind, uint64_t pages) {
  struct part *m = &v->ram[v->count++];
  *m = (struct part){.pages = pages, .page_size = kind == HUGE_FILE ? HUGE : SMALL, .fd = -1};
  uint64_t bytes = pages * m->page_size;
  if (kind == HUGE_FILE)
    want_huge_pages((int)pages);
  if (kind != ANONYMOUS)
    m->fd = new_file(bytes, m->page_size);
  m->at = map(bytes, m->fd);
  if (m->page_size == SMALL)
    madvise(m->at, bytes, MADV_NOHUGEPAGE);
}

static void vmm_start(struct vmm *v) {
  int ends[2], pidfd;
  v->stop = (int *)mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  check(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), "%m");
  fflush(NULL);
  v->pid = fork();
  if (v->pid == 0)
    vmm_run(v, ends[1]);
  close(ends[1]);
  v->orders = ends[0];
  int theirs = (int)answer_of(v);
  if (theirs < 0)
    missing("userfaultfd");
  pidfd = (int)syscall(SYS_pidfd_open, v->pid, 0);
  v->uffd = (int)syscall(SYS_pidfd_getfd, pidfd, theirs, 0);
  check(v->uffd >= 0, "pidfd_getfd: %m");
  close(pidfd);
  tell_vmm(v, (struct order){.what = CLOSE, .value = (uint64_t)theirs});
}

static void vmm_kill(struct vmm *v) {
  kill(v->pid, SIGKILL);
  check(waitpid(v->pid, NULL, 0) == v->pid, "%m");
}

static void run_free(struct vmm *v) {
  *v->stop = 0;
  tell_vmm(v, (struct order){.what = WRITE_AT_RANDOM});
}

static void stop_vmm(struct vmm *v) {
  *v->stop = 1;
  answer_of(v);
}

static void vmm_end(struct vmm *v) {
  vmm_kill(v);
  for (struct part *m = v->ram; m < v->ram + v->count; m++) {
    munmap(m->at, m->pages * m->page_size);
    if (m->fd >= 0)
      close(m->fd);
  }
  munmap((void *)v->stop, 4096);
  close(v->orders);
  if (v->uffd >= 0)
    close(v->uffd);
}

/* What the VMM has, without changing it. */
static void peek(struct vmm *v, unsigned ram, uint64_t page, uint64_t count, uint8_t *to) {
  struct part *m = &v->ram[ram];
  size_t bytes = count * m->page_size;
  uint64_t at = page * m->page_size;
  struct iovec local = {to, bytes}, remote = {m->at + at, bytes};
  ssize_t n = m->fd >= 0 ? pread(m->fd, to, bytes, (off_t)at)
                         : process_vm_readv(v->pid, &local, 1, &remote, 1, 0);
  check(n == (ssize_t)bytes, "reading page %lu: %m", page);
}

/* A number of the lines "NAME: number" of a file of the VMM's in /proc, or how many have `word`. */
static uint64_t proc(struct vmm *v, const char *file, const char *name, const char *word) {
  char path[64], line[512];
  uint64_t number = 0;
  snprintf(path, sizeof path, "/proc/%d/%s", v->pid, file);
  FILE *f = fopen(path, "r");
  check(f, "%s: %m", path);
  while (fgets(line, sizeof line, f))
    if (!strncmp(line, name, strlen(name)))
      number += word ? strstr(line, word) != NULL : strtoull(line + strlen(name), NULL, 10);
  fclose(f);
  return number;
}

static uint64_t protected_areas(struct vmm *v) {
  return proc(v, "smaps", "VmFlags:", " uw");
}

/* --- the engine ------------------------------------------------------------------------------- */

struct tracker {
  struct vmm *vmm;
  int wake;
  struct pc_source *source;
  struct pc_stats *stats;
  uint8_t *copy[MAX_RAM]; /* what the destination would have */
};

static struct tracker source_of(struct vmm *v) {
  struct tracker s = {.vmm = v, .wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  struct pc_region regions[MAX_RAM];
  char error[200];
  for (unsigned i = 0; i < v->count; i++) {
    struct part *m = &v->ram[i];
    regions[i] = (struct pc_region){.address = (uintptr_t)m->at, .pages = m->pages, .fd = m->fd,
                                    .page_size = m->page_size, .pid = v->pid, .uffd = -1};
    s.copy[i] = map(m->pages * m->page_size, -1);
  }
  s.source = pc_source_new(regions, v->count, s.wake, error);
  check(s.source, "%s", error);
  s.stats = pc_source_stats(s.source);
  return s;
}

static struct tracker tracked(struct vmm *v) {
  struct tracker s = source_of(v);
  int failed = pc_source_track(s.source, v->uffd);
  if (failed == -EOPNOTSUPP)
    missing("Linux 6.7");
  check(!failed, "%d: %s", failed, s.stats->sentence);
  return s;
}

static void side_end(struct tracker *s) {
  pc_source_free(s->source);
  for (unsigned i = 0; i < s->vmm->count; i++)
    munmap(s->copy[i], s->vmm->ram[i].pages * s->vmm->ram[i].page_size);
  close(s->wake);
}

static uint64_t look(struct tracker *s, int arm) {
  int64_t n = pc_source_look(s->source, arm);
  check(n >= 0, "%ld: %s", n, s->stats->sentence);
  return (uint64_t)n;
}

/* Takes what is to be sent, in parts of all sizes, as sent; `bits` (one byte a page) says what it
 * was. `read`: also copies it. */
static uint64_t take(struct tracker *s, unsigned ram, uint8_t *pages, bool read) {
  struct part *m = &s->vmm->ram[ram];
  uint64_t taken = 0;
  for (uint64_t first = 0, n; first < m->pages; first += n) {
    uint8_t bits[64];
    n = 1 + draw() % (8 * sizeof bits);
    n = n < m->pages - first ? n : m->pages - first;
    memset(bits, 0xff, sizeof bits);
    int64_t stale = pc_source_stale(s->source, ram, first, n, bits);
    check(stale >= 0 && !pc_source_have(s->source, ram, first, n, bits), " ");
    for (uint64_t i = 0; i < (n + 7) / 8 * 8; i++) {
      bool is = bits[i / 8] >> i % 8 & 1;
      check(!is || i < n, "a bit beyond the last page");
      stale -= is, taken += is;
      if (pages && i < n)
        pages[first + i] = is;
      if (is && read)
        peek(s->vmm, ram, first + i, 1, s->copy[ram] + (first + i) * m->page_size);
    }
    check(stale == 0, "%ld pages more than bits", stale);
  }
  return taken;
}

static uint64_t take_all(struct tracker *s, bool read) {
  uint64_t taken = 0;
  for (unsigned i = 0; i < s->vmm->count; i++)
    taken += take(s, i, NULL, read);
  return taken;
}

static void check_copy(struct tracker *s) {
  enum { PIECE = HUGE };
  static uint8_t is[PIECE];
  for (unsigned i = 0; i < s->vmm->count; i++) {
    struct part *m = &s->vmm->ram[i];
    uint64_t step = PIECE / m->page_size;
    for (uint64_t page = 0, n; page < m->pages; page += n) {
      n = m->pages - page < step ? m->pages - page : step;
      peek(s->vmm, i, page, n, is);
      for (uint64_t k = 0; k < n; k++)
        check(!memcmp(is + k * m->page_size, s->copy[i] + (page + k) * m->page_size, m->page_size),
              "page %lu of %u was missed", page + k, i);
    }
  }
}

/* --- what is seen ----------------------------------------------------------------------------- */

/* The VMM writes pages drawn at random and holds still: the look finds these pages, and no others
 * but for those that the kernel counts as written falsely. */
static void exact(enum kind kind) {
  struct vmm v = {0};
  add_part(&v, kind, kind == HUGE_FILE ? 5 : 600);
  vmm_start(&v);
  struct part *m = &v.ram[0];
  struct tracker s = tracked(&v);
  uint8_t *written = calloc(m->pages, 1), *found = calloc(m->pages, 1);
  uint64_t falsely = 0, all = 0;
  tell_vmm(&v, (struct order){FILL, 0, 0, m->pages, 7});
  check(look(&s, 1) == m->pages, "what was never armed counts as written");
  check(take_all(&s, true) == m->pages && look(&s, 1) == 0, " ");
  for (unsigned round = 0; round < 1000 / RARELY; round++) {
    memset(written, 0, m->pages);
    for (uint64_t n = draw() % (kind == HUGE_FILE ? 3 : 8); n; n--) {
      uint64_t page = draw() % m->pages, count = kind == HUGE_FILE ? 1 : 1 + draw() % 5;
      count = count < m->pages - page ? count : m->pages - page;
      tell_vmm(&v, (struct order){FILL, 0, page, count, draw()});
      memset(written + page, 1, count);
    }
    if (round % 3 == 0) /* reading is not writing */
      tell_vmm(&v, (struct order){READ, 0, 0, m->pages, 0});
    bool arm = round % 5 != 0; /* what is looked at only is found again */
    uint64_t n = look(&s, arm);
    if (!arm)
      check(take_all(&s, false) == n && look(&s, 1) == n, "not the same again");
    check(take(&s, 0, found, true) == n, " ");
    for (uint64_t page = 0; page < m->pages; page++) {
      check(found[page] || !written[page], "page %lu was missed in round %u", page, round);
      falsely += found[page] && !written[page];
    }
    all += n;
    if (round % 50 == 0)
      check_copy(&s);
  }
  check_copy(&s);
  printf("%s: %lu pages found, %lu of them falsely\n", KIND[kind], all, falsely);
  check(falsely <= all / 100, "%lu of %lu", falsely, all);
  check(get(s.stats->failure) == PC_OK, " ");
  side_end(&s);
  vmm_end(&v);
  free(written), free(found);
}

static void exact_file(void) {
  exact(FILE_RAM);
}

static void exact_anonymous(void) {
  exact(ANONYMOUS);
}

static void exact_huge(void) {
  exact(HUGE_FILE);
}

/* The VMM writes all the time: armed, then read; and once it is stopped nothing was missed. */
static void racing(enum kind kind) {
  struct vmm v = {0};
  add_part(&v, kind, kind == HUGE_FILE ? 4 : 700);
  add_part(&v, ANONYMOUS, 130);
  vmm_start(&v);
  struct tracker s = tracked(&v);
  unsigned rounds = kind == HUGE_FILE ? 15 / RARELY : 150 / RARELY;
  for (unsigned round = 0; round < rounds; round++) {
    run_free(&v);
    for (unsigned i = 0; i < 1 + round % 6; i++) {
      look(&s, 1);
      take_all(&s, true);
    }
    stop_vmm(&v);
    uint64_t last = look(&s, round % 2);
    check(take_all(&s, true) == last, " ");
    check_copy(&s);
  }
  side_end(&s);
  vmm_end(&v);
}

static void racing_file(void) {
  racing(FILE_RAM);
}

static void racing_anonymous(void) {
  racing(ANONYMOUS);
}

static void racing_huge(void) {
  racing(HUGE_FILE);
}

static void several_regions(void) {
  struct vmm v = {0};
  add_part(&v, FILE_RAM, 100);
  add_part(&v, ANONYMOUS, 65);
  add_part(&v, FILE_RAM, 2000);
  vmm_start(&v);
  struct tracker s = tracked(&v);
  check(protected_areas(&v) >= 3, " ");
  for (unsigned i = 0; i < 3; i++)
    tell_vmm(&v, (struct order){FILL, i, 0, v.ram[i].pages, 3});
  check(look(&s, 1) == 2165 && take_all(&s, true) == 2165, " ");
  for (unsigned i = 0; i < 3; i++) {
    uint8_t found[2000];
    uint64_t last = v.ram[i].pages - 1;
    tell_vmm(&v, (struct order){FILL, i, last, 1, 4});
    check(look(&s, 1) == 1 && take(&s, i, found, true) == 1 && found[last], "region %u", i);
  }
  check_copy(&s);
  uint8_t bits[8];
  check(pc_source_stale(s.source, 3, 0, 1, bits) == -EINVAL, " ");
  check(pc_source_stale(s.source, 1, 64, 65, bits) == -EINVAL, " ");
  check(pc_source_stale(s.source, 1, ~0ull, 2, bits) == -EINVAL, " ");
  check(pc_source_stale(s.source, 1, 64, 0, bits) == 0, " ");
  side_end(&s);
  vmm_end(&v);
}

/* A sparse guest has page tables for its data, tracked or not; and what comes to a hole is seen. */
static void holes(enum kind kind) {
  enum { PAGES = 1 << 20, STEP = 1 << 15, DATA_PAGES = 64 };
  struct vmm v = {0};
  add_part(&v, kind, PAGES);
  vmm_start(&v);
  for (uint64_t page = 0; page < PAGES; page += STEP)
    tell_vmm(&v, (struct order){FILL, 0, page, DATA_PAGES, 5});
  struct tracker s = tracked(&v);
  uint64_t before = proc(&v, "status", "VmPTE:", NULL), data = PAGES / STEP * DATA_PAGES;
  for (unsigned i = 0; i < 3; i++) {
    check(look(&s, 1) == (i ? 0 : data), "round %u", i);
    take_all(&s, true);
  }
  uint64_t after = proc(&v, "status", "VmPTE:", NULL);
  check(after <= before + 8, "page tables: %lu KiB, then %lu", before, after);
  tell_vmm(&v, (struct order){FILL, 0, 7 * STEP + 5000, 3, 6});
  tell_vmm(&v, (struct order){FILL, 0, 9 * STEP + DATA_PAGES, 1, 6});
  check(look(&s, 1) == 4 && take_all(&s, true) == 4, "data in holes");
  tell_vmm(&v, (struct order){FILL, 0, 7 * STEP + 5001, 1, 8});
  check(look(&s, 1) == 1 && take_all(&s, true) == 1, "it is armed from then on");
  check(get(s.stats->dirty_pages) == 1, "%lu", s.stats->dirty_pages);
  side_end(&s);
  vmm_end(&v);
}

static void holes_file(void) {
  holes(FILE_RAM);
}

static void holes_anonymous(void) {
  holes(ANONYMOUS);
}

/* What is discarded is found once, as zeros; and what is written there after that, and so on. */
static void discarded(enum kind kind) {
  struct vmm v = {0};
  add_part(&v, kind, kind == HUGE_FILE ? 8 : 256);
  vmm_start(&v);
  struct part *m = &v.ram[0];
  struct tracker s = tracked(&v);
  tell_vmm(&v, (struct order){FILL, 0, 0, m->pages, 5});
  look(&s, 1), take_all(&s, true);
  for (unsigned round = 0; round < 4; round++) {
    tell_vmm(&v, (struct order){DISCARD, 0, 2, 3, 0});
    check(look(&s, 1) == 3 && take_all(&s, true) == 3, "round %u", round);
    check_copy(&s);
    check(look(&s, 1) == 0, "found again in round %u", round);
    if (round == 1) { /* zeros were sent, and zeros are what is read */
      tell_vmm(&v, (struct order){READ, 0, 2, 3, 0});
      check(look(&s, 1) <= 3, " ");
      take_all(&s, true);
      check_copy(&s);
      check(look(&s, 1) == 0, " ");
    }
    tell_vmm(&v, (struct order){FILL, 0, 3, 1, 6}); /* written and discarded between looks */
    tell_vmm(&v, (struct order){DISCARD, 0, 3, 1, 0});
    look(&s, 1), take_all(&s, true);
    check_copy(&s);
    tell_vmm(&v, (struct order){FILL, 0, 2, 3, 7});
    check(look(&s, 1) == 3 && take_all(&s, true) == 3, "written in round %u", round);
    check_copy(&s);
  }
  tell_vmm(&v, (struct order){DISCARD, 0, 0, m->pages, 0});
  check(look(&s, 0) == m->pages && take_all(&s, true) == m->pages, "at the stop");
  check_copy(&s);
  side_end(&s);
  vmm_end(&v);
}

static void discarded_file(void) {
  discarded(FILE_RAM);
}

static void discarded_anonymous(void) {
  discarded(ANONYMOUS);
}

static void discarded_huge(void) {
  discarded(HUGE_FILE);
}

/* Buffered I/O of the VMM writes through its page tables, in the kernel. */
static void kernel_writes(void) {
  struct vmm v = {0};
  add_part(&v, FILE_RAM, 64);
  add_part(&v, ANONYMOUS, 64);
  vmm_start(&v);
  struct tracker s = tracked(&v);
  for (unsigned i = 0; i < 2; i++)
    tell_vmm(&v, (struct order){FILL, i, 0, 64, 5});
  look(&s, 1), take_all(&s, true);
  for (unsigned i = 0; i < 4; i++) {
    tell_vmm(&v, (struct order){i & 2 ? FROM_PIPE : FROM_FILE, i % 2, 10, 7, 9 + i});
    check(look(&s, 1) == 7 && take_all(&s, true) == 7, "%u", i);
    check_copy(&s);
  }
  side_end(&s);
  vmm_end(&v);
}

/* --- passes ----------------------------------------------------------------------------------- */

/* One end of a push connection, by hand: frames in the order they came, pages of zeros as well. */
struct receiver {
  struct tracker *side;
  struct frame_reader reader;
  uint64_t pages, zeros;
  uint64_t order[1 << 16]; /* of region 0 */
  unsigned ordered;
  pthread_t thread;
};

static struct receiver *receiver_of(struct tracker *s) {
  struct receiver *r = calloc(1, sizeof *r);
  int fd[2];
  tcp_pair(fd);
  fcntl(fd[0], F_SETFL, 0);
  r->side = s;
  check(!frame_reader_init(&r->reader, plain(fd[0]), HUGE, 0), " ");
  check(!pc_source_connect(s->source, fd[1], NULL, 0), "%s", s->stats->sentence);
  return r;
}

/* False at the end of the connection. */
static bool receive(struct receiver *r) {
  struct frame f;
  uint8_t *payload;
  int got = frame_read(&r->reader, &f, &payload);
  if (got <= 0)
    return false;
  struct part *m = &r->side->vmm->ram[f.region];
  check(frame_fits(&f, m->pages, m->page_size), " ");
  for (uint64_t i = 0; i < f.count && f.region == 0; i++)
    if (r->ordered < sizeof r->order / sizeof *r->order)
      r->order[r->ordered++] = f.page + i;
  uint8_t *to = r->side->copy[f.region] + f.page * m->page_size;
  if (f.kind == FRAME_ZERO)
    memset(to, 0, (size_t)f.count * m->page_size);
  else
    memcpy(to, payload, f.payload);
  if (f.kind == FRAME_ZERO)
    count_add(r->zeros, f.count);
  __atomic_add_fetch(&r->pages, f.count, __ATOMIC_RELEASE);
  return true;
}

static void *receiver_run(void *argument) {
  while (receive(argument))
    ;
  return NULL;
}

/* Until so many pages have come in all and nothing more is sent. */
static void receive_to(struct receiver *r, uint64_t pages) {
  while (r->pages < pages)
    check(receive(r), "the connection ended: %s", r->side->stats->sentence);
  check(r->pages == pages, "%lu pages, not %lu", r->pages, pages);
  wait_until(get(r->side->stats->pushing) == 0);
  check(bytes_waiting(r->reader.stream.fd) == 0, " ");
}

static void receiver_end(struct receiver *r) {
  close(r->reader.stream.fd);
  frame_reader_free(&r->reader);
  free(r);
}

/* Passes while the VMM writes, several connections, and the push: the destination has it all. */
static void passes(enum kind kind) {
  enum { CONNECTIONS = 3 };
  struct vmm v = {0};
  add_part(&v, kind, kind == HUGE_FILE ? 3 : 3000);
  add_part(&v, ANONYMOUS, 100);
  vmm_start(&v);
  struct tracker s = tracked(&v);
  tell_vmm(&v, (struct order){FILL, 0, 0, v.ram[0].pages / 2, 0}); /* zeros that are data */
  struct receiver *r[CONNECTIONS];
  for (unsigned i = 0; i < CONNECTIONS; i++) {
    r[i] = receiver_of(&s);
    check(!pthread_create(&r[i]->thread, NULL, receiver_run, r[i]), "thread");
  }
  uint64_t sent = 0, total = 0;
  for (unsigned round = 0; round < 12 / RARELY; round++) {
    run_free(&v);
    for (unsigned pass = 0; pass < 3; pass++) {
      total += look(&s, 1);
      check(!pc_source_copy(s.source, 0), "%s", s.stats->sentence);
      wait_until(get(s.stats->pushing) == 0);
      check(get(s.stats->passed_pages) == total, "%lu sent, not %lu", s.stats->passed_pages,
            total);
      do { /* the barrier: what is sent has arrived */
        sent = 0;
        for (unsigned i = 0; i < CONNECTIONS; i++)
          sent += get(r[i]->pages);
      } while (sent < total);
    }
    stop_vmm(&v);
  }
  uint64_t last = look(&s, 0);
  pc_source_untrack(s.source);
  uint64_t zeros = 0, carried = get(s.stats->precopied_pages);
  for (unsigned i = 0; i < CONNECTIONS; i++)
    zeros += get(r[i]->zeros);
  check(zeros + carried == total, "%lu zero pages, %lu carried", zeros, carried);
  check(get(s.stats->pushed_pages) + get(s.stats->zero_pages) == 0, "counted twice");
  check(!pc_source_push(s.source, 0), "%s", s.stats->sentence);
  wait_until(get(s.stats->pushing) == 0);
  pc_source_disconnect(s.source);
  for (unsigned i = 0; i < CONNECTIONS; i++)
    pthread_join(r[i]->thread, NULL);
  check_copy(&s);
  check(get(s.stats->pushed_pages) <= last && get(s.stats->passed_pages) == total, " ");
  check(get(s.stats->pushed_pages) + get(s.stats->zero_pages) >= last, " ");
  check(get(s.stats->failure) == PC_OK, "%s", s.stats->sentence);
  for (unsigned i = 0; i < CONNECTIONS; i++)
    receiver_end(r[i]);
  side_end(&s);
  vmm_end(&v);
}

static void passes_file(void) {
  passes(FILE_RAM);
}

static void passes_anonymous(void) {
  passes(ANONYMOUS);
}

static void passes_huge(void) {
  passes(HUGE_FILE);
}

/* Pages written again and again go last in a pass and first in the push, but for a page asked for. */
static void hot_and_cold(void) {
  enum { PAGES = 512, HOT_FROM = 96, HOT_PAGES = 40 };
  struct vmm v = {0};
  add_part(&v, FILE_RAM, PAGES);
  vmm_start(&v);
  struct tracker s = tracked(&v);
  struct receiver *r = receiver_of(&s);
  tell_vmm(&v, (struct order){FILL, 0, 0, PAGES, 5});
  uint64_t total = look(&s, 1);
  check(!pc_source_copy(s.source, 0), " ");
  check(pc_source_copy(s.source, 0) == -EBUSY || get(s.stats->pushing) == 0, " ");
  receive_to(r, total);
  for (unsigned i = 0; i < PAGES; i++)
    check(r->order[i] == i, "the first pass has no order but from first to last");
  for (unsigned i = 0; i < 2; i++) {
    tell_vmm(&v, (struct order){FILL, 0, HOT_FROM, HOT_PAGES, 6 + i});
    if (i)
      tell_vmm(&v, (struct order){FILL, 0, 0, PAGES, 8}); /* the others once */
    total += look(&s, 1);
    r->ordered = 0;
    check(!pc_source_copy(s.source, 0), " ");
    receive_to(r, total);
  }
  check(r->ordered == PAGES, "%u", r->ordered);
  for (unsigned i = 0; i < PAGES; i++) {
    bool hot = r->order[i] >= HOT_FROM && r->order[i] < HOT_FROM + HOT_PAGES;
    check(hot == (i >= PAGES - HOT_PAGES), "page %lu came as number %u", r->order[i], i);
  }
  check(get(s.stats->dirty_pages) == HOT_PAGES + PAGES, "%lu", s.stats->dirty_pages);
  /* Twice more, so that the others are cold again; then all is stale, and page 300 is asked for. */
  tell_vmm(&v, (struct order){FILL, 0, HOT_FROM, HOT_PAGES, 9});
  total += look(&s, 1);
  check(!pc_source_copy(s.source, 0), " ");
  receive_to(r, total);
  tell_vmm(&v, (struct order){FILL, 0, 0, PAGES, 10});
  check(look(&s, 0) == PAGES, " ");
  pc_source_untrack(s.source);
  int urgent[2];
  uint8_t answer[FRAME_BYTES + SMALL];
  tcp_pair(urgent);
  fcntl(urgent[0], F_SETFL, 0);
  check(!pc_source_connect(s.source, urgent[1], NULL, 1) && !pc_source_serve(s.source), " ");
  send_frame(urgent[0], FRAME_REQUEST, 0, 300, 1, NULL, 0);
  check(recv(urgent[0], answer, sizeof answer, MSG_WAITALL) == sizeof answer, "%m");
  r->ordered = 0;
  check(!pc_source_push(s.source, 0), " ");
  receive_to(r, total + PAGES - 1);
  check(r->order[0] == 301, "page %lu after page 300 was asked for", r->order[0]);
  unsigned run = 0;
  while (r->order[run] == 301 + run)
    run++;
  for (unsigned i = run; i < run + HOT_PAGES; i++)
    check(r->order[i] >= HOT_FROM && r->order[i] < HOT_FROM + HOT_PAGES, "page %lu came as %u",
          r->order[i], i);
  memcpy(s.copy[0] + 300 * SMALL, answer + FRAME_BYTES, SMALL);
  check_copy(&s);
  check(get(s.stats->urgent_pages) == 1 && get(s.stats->pushed_pages) == PAGES - 1, " ");
  receiver_end(r), close(urgent[0]);
  side_end(&s);
  vmm_end(&v);
}

/* A pass has a limit, and does not hold up who stops it; what was under way is sent again. */
static void pass_bandwidth(void) {
  enum { PAGES = 2048, RATE = 4 << 20, PART = 256 };
  struct vmm v = {0};
  add_part(&v, FILE_RAM, PAGES);
  vmm_start(&v);
  struct tracker s = tracked(&v);
  struct receiver *r = receiver_of(&s);
  tell_vmm(&v, (struct order){FILL, 0, 0, PAGES, 5});
  check(look(&s, 1) == PAGES, " ");
  uint64_t before = pc_monotonic_ns();
  check(!pc_source_copy(s.source, RATE), " ");
  while (r->pages < PART)
    check(receive(r), " ");
  double rate = (double)r->pages * SMALL / ((double)(pc_monotonic_ns() - before) / 1e9);
  check(rate < 1.6 * RATE, "%.3g of the limit", rate / RATE); /* one run may be ahead */
  check(pc_source_look(s.source, 1) == -EBUSY, "a page could overtake itself");
  check(pc_source_copy(s.source, 0) == -EBUSY && pc_source_push(s.source, 0) == -EBUSY, " ");
  uint64_t asked = pc_monotonic_ns();
  pc_source_disconnect(s.source);
  check(pc_monotonic_ns() - asked < 1000000000, "stopping waited for the bandwidth");
  check(get(s.stats->failure) == PC_OK && get(s.stats->pushing) == 0, "%s", s.stats->sentence);
  receiver_end(r);
  check(look(&s, 1) == PAGES, "all is to be sent again");
  r = receiver_of(&s);
  check(!pc_source_copy(s.source, 0), " ");
  receive_to(r, PAGES);
  check_copy(&s);
  receiver_end(r);
  side_end(&s);
  vmm_end(&v);
}

/* The destination goes in the middle of a pass, at any time: a sentence, and it can begin again. */
static void pass_cut(void) {
  enum { PAGES = 512 };
  struct vmm v = {0};
  add_part(&v, FILE_RAM, PAGES);
  vmm_start(&v);
  struct tracker s = tracked(&v);
  tell_vmm(&v, (struct order){FILL, 0, 0, PAGES, 5});
  for (unsigned round = 0; round < 40 / RARELY; round++) {
    struct receiver *r = receiver_of(&s);
    check(look(&s, 1) == PAGES, "round %u", round);
    check(!pc_source_copy(s.source, 0), " ");
    for (unsigned i = 0; i < round % 20; i++)
      receive(r);
    if (round % 2)
      receiver_end(r);
    pc_source_disconnect(s.source);
    check(get(s.stats->failure) == PC_OK && get(s.stats->pushing) == 0, "%s", s.stats->sentence);
    if (round % 2 == 0)
      receiver_end(r);
  }
  side_end(&s);
  vmm_end(&v);
}

/* --- the end of tracking ---------------------------------------------------------------------- */

/* Nothing is left in the VMM, whether tracking is ended or its userfaultfd closed (as when the
 * daemon is killed): its writes take no faults. */
static void untracked(void) {
  for (unsigned i = 0; i < 2 * KINDS; i++) {
    enum kind kind = i / 2;
    struct vmm v = {0};
    uint64_t pages = kind == HUGE_FILE ? 8 : 1024;
    add_part(&v, kind, pages);
    vmm_start(&v);
    struct tracker s = tracked(&v);
    struct order write_all_pages = {FILL, 0, 0, pages, 7};
    tell_vmm(&v, write_all_pages);
    look(&s, 1);
    check(protected_areas(&v) == 1, "%lu", protected_areas(&v));
    check(tell_vmm(&v, write_all_pages) >= (long)pages, "armed pages fault");
    look(&s, 1);
    if (i % 2) {
      close(v.uffd);
      v.uffd = -1;
    } else {
      pc_source_untrack(s.source);
      pc_source_untrack(s.source);
      check(pc_source_look(s.source, 1) == -EINVAL, " ");
    }
    check(protected_areas(&v) == 0, "%s", KIND[kind]);
    long faults = tell_vmm(&v, write_all_pages); /* the kernel leaves each page read-only once */
    check(faults <= (long)pages + 8, "%ld faults in %s", faults, KIND[kind]);
    faults = tell_vmm(&v, write_all_pages);
    check(faults < 8, "%ld faults in %s", faults, KIND[kind]);
    if (i % 2) {
      check(pc_source_look(s.source, 1) == -EPERM, "who is not tracked is not called clean");
      check(get(s.stats->failure) == PC_MEMORY, " ");
      printf("%s\n", s.stats->sentence);
    }
    side_end(&s);
    vmm_end(&v);
  }
}

/* At the stop several threads look; pages on both sides of their slices' edges are found. */
static void stopped(void) {
  enum { PAGES = 3 << 14, EDGE = 1 << 14 };
  struct vmm v = {0};
  add_part(&v, FILE_RAM, PAGES + 5);
  add_part(&v, ANONYMOUS, EDGE + 1);
  vmm_start(&v);
  struct tracker s = tracked(&v);
  for (unsigned i = 0; i < 2; i++)
    tell_vmm(&v, (struct order){FILL, i, 0, v.ram[i].pages, 5});
  check(look(&s, 1) == PAGES + EDGE + 6, " ");
  take_all(&s, true);
  for (unsigned round = 0; round < 4; round++) {
    uint64_t pages = 0;
    for (unsigned i = 0; i < 2; i++)
      for (uint64_t page = 0; page < v.ram[i].pages; page += EDGE) {
        uint64_t from = page ? page - 1 : 0, n = v.ram[i].pages - from < 3 ? 2 : 3;
        tell_vmm(&v, (struct order){FILL, i, from, n, draw()});
        pages += n;
      }
    uint64_t dirty = get(s.stats->dirty_pages);
    check(look(&s, round % 2) == pages, "round %u", round);
    check(get(s.stats->dirty_pages) - dirty == pages, "%lu", pages);
    check(take_all(&s, true) == pages, " ");
  }
  check_copy(&s);
  side_end(&s);
  vmm_end(&v);
}

static void *killer_run(void *argument) {
  struct vmm *v = argument;
  usleep((unsigned)(draw() % 6000));
  kill(v->pid, SIGKILL);
  return NULL;
}

/* The VMM is killed at any time: a sentence, at the latest from the next look, and no hang. */
static void killed(enum kind kind) {
  for (unsigned round = 0; round < 30 / RARELY; round++) {
    struct vmm v = {0};
    pthread_t killer;
    add_part(&v, kind, 2000);
    vmm_start(&v);
    struct tracker s = source_of(&v);
    struct receiver *r = receiver_of(&s);
    check(!pthread_create(&r->thread, NULL, receiver_run, r), "thread");
    tell_vmm(&v, (struct order){FILL, 0, 0, 2000, 5});
    *v.stop = 0;
    tell_vmm(&v, (struct order){.what = WRITE_AT_RANDOM});
    if (round == 0)
      vmm_kill(&v);
    else
      check(!pthread_create(&killer, NULL, killer_run, &v), "thread");
    int64_t failed = pc_source_track(s.source, v.uffd);
    if (failed == -EOPNOTSUPP)
      missing("Linux 6.7");
    while (failed >= 0 && get(s.stats->failure) == PC_OK) {
      failed = pc_source_look(s.source, 1);
      if (failed >= 0)
        failed = pc_source_copy(s.source, 0);
      wait_until(get(s.stats->pushing) == 0);
    }
    check(get(s.stats->failure) == PC_VMM_GONE, "%ld, %d: %s", failed, s.stats->failure,
          s.stats->sentence);
    check(strstr(s.stats->sentence, "has ended"), "%s", s.stats->sentence);
    pc_source_untrack(s.source);
    pc_source_disconnect(s.source);
    check(get(s.stats->failure) == PC_VMM_GONE, "that is not forgotten");
    pthread_join(r->thread, NULL);
    if (round)
      pthread_join(killer, NULL);
    receiver_end(r);
    side_end(&s);
    if (round == 0)
      v.pid = fork();
    if (v.pid == 0)
      _exit(0);
    vmm_end(&v);
  }
}

static void killed_file(void) {
  killed(FILE_RAM);
}

static void killed_anonymous(void) {
  killed(ANONYMOUS);
}

static void refuse_ioctl(uint32_t request, int failure) {
  struct sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, request, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (uint32_t)failure),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
  check(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) &&
            !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), "%m");
}

/* Kernels before 6.7 refuse the features of the userfaultfd, or do not know PAGEMAP_SCAN. */
static void old_kernel(uint32_t request, int failure) {
  struct vmm v = {0};
  add_part(&v, FILE_RAM, 64);
  vmm_start(&v);
  struct tracker s = source_of(&v);
  refuse_ioctl(request, failure);
  check(pc_source_track(s.source, v.uffd) == -EOPNOTSUPP, "%s", s.stats->sentence);
  check(get(s.stats->failure) > PC_OK && strstr(s.stats->sentence, "Linux 6.7"), "%s",
        s.stats->sentence);
  check(protected_areas(&v) == 0 && pc_source_look(s.source, 1) == -EINVAL, " ");
  check(pc_track_cost_ns() == -EOPNOTSUPP, " ");
  pc_source_disconnect(s.source);
  check(get(s.stats->failure) == PC_OK, "postcopy can go on");
  side_end(&s);
  vmm_end(&v);
}

static void no_wp_async(void) {
  old_kernel((uint32_t)UFFDIO_API, EINVAL);
}

static void no_pagemap_scan(void) {
  old_kernel(0xc0606610u, ENOTTY);
}

static void cost(void) {
  int64_t ns = pc_track_cost_ns();
  if (ns == -EOPNOTSUPP)
    missing("Linux 6.7");
  printf("a write fault of a tracked page: %ld ns\n", ns);
  check(ns > 0, "%ld", ns);
}

static const struct subtest SUBTESTS[] = {
    {"exact_file", exact_file},
    {"exact_anonymous", exact_anonymous},
    {"exact_huge", exact_huge},
    {"racing_file", racing_file},
    {"racing_anonymous", racing_anonymous},
    {"racing_huge", racing_huge},
    {"several_regions", several_regions},
    {"stopped", stopped},
    {"holes_file", holes_file},
    {"holes_anonymous", holes_anonymous},
    {"discarded_file", discarded_file},
    {"discarded_anonymous", discarded_anonymous},
    {"discarded_huge", discarded_huge},
    {"kernel_writes", kernel_writes},
    {"passes_file", passes_file},
    {"passes_anonymous", passes_anonymous},
    {"passes_huge", passes_huge},
    {"hot_and_cold", hot_and_cold},
    {"pass_bandwidth", pass_bandwidth},
    {"pass_cut", pass_cut},
    {"untracked", untracked},
    {"killed_file", killed_file},
    {"killed_anonymous", killed_anonymous},
    {"no_wp_async", no_wp_async},
    {"no_pagemap_scan", no_pagemap_scan},
    {"cost", cost},
};

int main(int argc, char **argv) {
  return subtest_main(argc, argv, SUBTESTS, sizeof SUBTESTS / sizeof *SUBTESTS);
}
