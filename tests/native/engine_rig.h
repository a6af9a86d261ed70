/* SPDX-License-Identifier: Apache-2.0 */
/* What the subtests of the native tests are made of: checks, guest memory that proves itself, guest
 * threads, pairs of engines, and one end of a connection played by hand. Knows no subtest. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine.h"
#include "record.h" /* what a page's byte may be */
#include "uffd.h"

#pragma GCC diagnostic ignored "-Wunused-function" /* none uses all of it */

enum { MISSING = 77, SMALL = 4096, HUGE = 2 << 20, MAX_REGIONS = 2, MAX_THREADS = 16 };

#define check(holds, ...)                                                                          \
  do {                                                                                             \
    if (!(holds)) {                                                                                \
      fprintf(stderr, "%s:%d: not so: %s: ", __func__, __LINE__, #holds);                          \
      fprintf(stderr, __VA_ARGS__);                                                                \
      fprintf(stderr, "\n");                                                                       \
      _exit(1);                                                                                    \
    }                                                                                              \
  } while (0)
#define get(field) __atomic_load_n(&(field), __ATOMIC_ACQUIRE)
/* Waits for what other threads bring about; the alarm in main ends a wait in vain. */
#define wait_until(holds)                                                                          \
  do                                                                                               \
    waiting_for = __LINE__;                                                                        \
  while (!(holds) && !usleep(100))

static volatile int waiting_for;

static void missing(const char *what) {
  fprintf(stderr, "missing: %s\n", what);
  _exit(MISSING);
}

struct subtest {
  const char *name;
  void (*run)(void);
};

static void stuck(int signal) {
  (void)signal;
  dprintf(2, "stuck: line %d waits for what does not come\n", waiting_for);
  _exit(2);
}

/* How often something random is repeated: ThreadSanitizer takes ten times as long for it, and sees
 * a race the first time that two threads meet. Nor is an emulated machine (EMULATED, tests/kernels)
 * quick. */
#if defined(__SANITIZE_THREAD__) || defined(EMULATED)
enum { RARELY = 4 };
#else
enum { RARELY = 1 };
#endif
#ifdef EMULATED
enum { PATIENCE_S = 500 }; /* less than inside.py's, which would not tell the line */
#else
enum { PATIENCE_S = 60 };
#endif

/* Runs the subtest that is named, with other random numbers if a number follows; or names all. */
static uint64_t drawn = 1;

static int subtest_main(int argc, char **argv, const struct subtest *subtests, size_t count) {
  struct sigaction action = {.sa_handler = stuck};
  sigaction(SIGALRM, &action, NULL);
  alarm(PATIENCE_S);
  drawn = argc == 3 ? strtoull(argv[2], NULL, 10) << 32 : drawn;
  for (const struct subtest *s = subtests; s < subtests + count; s++) {
    if (argc >= 2 && !strcmp(argv[1], s->name)) {
      s->run();
      return 0;
    }
    if (argc == 1)
      puts(s->name);
  }
  return argc == 1 ? 0 : 64;
}

/* For what goes through all of guest memory: nothing in there is shared with an engine's threads
 * but by the kernel, which ThreadSanitizer does not see. */
#define UNSEEN __attribute__((no_sanitize_thread))

UNSEEN static uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

static uint64_t draw(void) {
  return mix(drawn++);
}

/* --- the kernel's part ------------------------------------------------------------------------ */

/* What an ioctl of the engine is to be answered with, instead of the kernel's answer. */
struct refusal {
  _Atomic uint64_t request, from, bytes; /* the ioctl (0: none) and the addresses it is about */
  _Atomic int error;
  _Atomic uint64_t times; /* how often it was */
};
static struct refusal refusal;

static void refuse(uint64_t request, int error, const void *from, uint64_t bytes) {
  atomic_store(&refusal.error, error);
  atomic_store(&refusal.from, (uintptr_t)from);
  atomic_store(&refusal.bytes, bytes);
  atomic_store(&refusal.times, 0);
  atomic_store(&refusal.request, request);
}

/* The kernel answers again; who was on the way to be refused still is, by that errno. */
static void refuse_no_more(void) {
  atomic_store(&refusal.request, 0);
}

int ioctl(int fd, unsigned long request, ...) {
  va_list list;
  va_start(list, request);
  uint64_t *argument = va_arg(list, uint64_t *);
  va_end(list);
  if (request == refusal.request && *argument - refusal.from < refusal.bytes) {
    refusal.times++;
    errno = refusal.error;
    return -1;
  }
  uint64_t before = request == refusal.request ? refusal.from - *argument : 0;
  uint64_t *length = argument + (request == UFFDIO_COPY ? 2 : 1);
  if (before && before < *length) {
    uint64_t bytes = *length; /* of a range the part before it goes, as the kernel does it */
    *length = before;
    if (!syscall(SYS_ioctl, fd, request, argument))
      errno = EAGAIN;
    *length = bytes;
    return -1;
  }
  return (int)syscall(SYS_ioctl, fd, request, argument);
}

/* --- guest memory ----------------------------------------------------------------------------- */

enum content { HOLE, ZEROS, DATA };

struct guest {
  unsigned count;
  struct ram {
    uint64_t pages;
    uint32_t page_size;
    int source, file, uffd; /* file -1: the destination has anonymous memory */
    uint8_t *at;            /* the destination's mapping */
    enum content (*content)(uint64_t page);
    uint8_t *visited[MAX_THREADS]; /* pages where that thread has left its word */
  } ram[MAX_REGIONS];
};

UNSEEN static enum content all_data(uint64_t page) {
  (void)page;
  return DATA;
}

/* Runs of all kinds, of many lengths. */
UNSEEN static enum content mixed(uint64_t page) {
  uint64_t block = page % 512 < 256 ? page / 64 : page / 3;
  return (enum content)(mix(block) % 3);
}

UNSEEN static uint64_t word_of(const struct ram *m, uint64_t page, uint64_t word) {
  return m->content(page) == DATA ? mix(page << 20 | word) | 1 : 0;
}

UNSEEN static void fill_page(const struct ram *m, uint64_t page, uint8_t *to) {
  for (uint64_t i = 0; i < m->page_size / 8; i++)
    ((uint64_t *)to)[i] = word_of(m, page, i);
}

/* Sanitizers must not shadow guest memory of 16 GiB: past their interceptor. */
static uint8_t *map(uint64_t bytes, int fd) {
  int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
  void *at = (void *)syscall(SYS_mmap, NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0l);
  check(at != MAP_FAILED, "mapping %llu bytes: %m", (unsigned long long)bytes);
  return at;
}

static int new_uffd(void) {
  int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
  if (fd < 0)
    missing("userfaultfd");
  return fd;
}

/* For subtests that make memory errors. */
static inline void needs_poison(void) {
  struct uffdio_api api = {UFFD_API, 0, 0};
  int fd = new_uffd();
  check(!ioctl(fd, UFFDIO_API, &api), "%m");
  close(fd);
  if (!(api.features & 1ull << 14))
    missing("Linux 6.6");
}

static int new_file(uint64_t bytes, uint32_t page_size) {
  int fd = memfd_create("guest", MFD_CLOEXEC | (page_size == HUGE ? MFD_HUGETLB | (21 << 26) : 0));
  check(fd >= 0 && !ftruncate(fd, (off_t)bytes), "memfd: %m");
  return fd;
}

static struct ram *add_ram(struct guest *g, uint64_t pages, uint32_t page_size,
                           enum content (*content)(uint64_t)) {
  struct ram *m = &g->ram[g->count++];
  uint64_t bytes = pages * page_size;
  *m = (struct ram){.pages = pages, .page_size = page_size, .content = content};
  m->source = new_file(bytes, page_size);
  m->file = new_file(bytes, page_size);
  m->at = map(bytes, m->file);
  m->uffd = new_uffd();
  return m;
}

/* Writes what `content` says to the source's file, from page `from` to `to`. */
static void fill_source(struct ram *m, uint64_t from, uint64_t to) {
  uint8_t *at = map(m->pages * m->page_size, m->source);
  for (uint64_t page = from; page < to; page++)
    if (m->content(page) != HOLE)
      fill_page(m, page, at + page * m->page_size);
  munmap(at, m->pages * m->page_size);
}

static uint64_t count_content(struct guest *g, enum content content) {
  uint64_t n = 0;
  for (struct ram *m = g->ram; m < g->ram + g->count; m++)
    for (uint64_t page = 0; page < m->pages; page++)
      n += m->content(page) == content;
  return n;
}

static uint64_t allocated(int fd) {
  struct stat st;
  check(!fstat(fd, &st), "%m");
  return (uint64_t)st.st_blocks * 512;
}

static void discard(struct ram *m, uint64_t page, uint64_t count) {
  if (m->file >= 0)
    check(!fallocate(m->file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                     (off_t)(page * m->page_size), (off_t)(count * m->page_size)), "%m");
  else
    check(!madvise(m->at + page * m->page_size, count * m->page_size, MADV_DONTNEED), "%m");
}

UNSEEN static uint64_t load(struct ram *m, uint64_t page, uint64_t word) {
  return __atomic_load_n((uint64_t *)(m->at + page * m->page_size) + word, __ATOMIC_RELAXED);
}

UNSEEN static bool page_is(struct ram *m, uint64_t page, bool zeros) {
  for (uint64_t i = 0; i < m->page_size / 8; i++)
    if (load(m, page, i) != (zeros ? 0 : word_of(m, page, i)))
      return false;
  return true;
}

static const uint64_t LEFT = 0x5555555555555554ull; /* a thread's word becomes what it was ^ LEFT */

/* Visits one page as guest thread `id`: all must be as in the source or as this thread left it. */
static void visit(struct ram *m, uint64_t page, unsigned id) {
  uint64_t *own = (uint64_t *)(m->at + page * m->page_size) + id;
  uint64_t expected = word_of(m, page, id) ^ (m->visited[id][page] ? LEFT : 0);
  uint64_t is = __atomic_load_n(own, __ATOMIC_RELAXED);
  check(is == expected, "word %u of page %llu is %llx", id, (unsigned long long)page,
        (unsigned long long)is);
  uint64_t far = m->page_size / 8 - 1 - (page + id) % 128;
  check(load(m, page, far) == word_of(m, page, far), "page %llu", (unsigned long long)page);
  if (!m->visited[id][page]) {
    m->visited[id][page] = 1;
    __atomic_store_n(own, expected ^ LEFT, __ATOMIC_RELAXED);
  }
}

struct guest_thread {
  struct guest *guest;
  unsigned id;
  uint64_t visits; /* 0: every page once */
  pthread_t thread;
};

static void *guest_run(void *argument) {
  struct guest_thread *t = argument;
  uint64_t pages = 0, seed = t->id * 1000003ull;
  for (unsigned i = 0; i < t->guest->count; i++)
    pages += t->guest->ram[i].pages;
  for (uint64_t i = 0; i < (t->visits ? t->visits : pages); i++) {
    /* An odd multiplier goes through all of a power of two, and roughly at random. */
    uint64_t page = t->visits ? mix(seed + i) % pages : (i * 0x9e3779b1ull + seed) % pages;
    struct ram *m = t->guest->ram;
    for (; page >= m->pages; m++)
      page -= m->pages;
    visit(m, page, t->id);
  }
  return NULL;
}

static struct guest_thread *guest_start(struct guest *g, unsigned threads, uint64_t visits) {
  struct guest_thread *t = calloc(threads, sizeof *t);
  for (struct ram *m = g->ram; m < g->ram + g->count; m++)
    for (unsigned i = 0; i < threads; i++)
      m->visited[i] = calloc(m->pages, 1);
  for (unsigned i = 0; i < threads; i++) {
    t[i] = (struct guest_thread){.guest = g, .id = i, .visits = visits};
    check(!pthread_create(&t[i].thread, NULL, guest_run, &t[i]), "thread");
  }
  return t;
}

static void guest_join(struct guest_thread *t, unsigned threads) {
  for (unsigned i = 0; i < threads; i++)
    pthread_join(t[i].thread, NULL);
  free(t);
}

/* Every word of every page, and what the guest's threads wrote. */
UNSEEN static void check_guest(struct guest *g) {
  for (struct ram *m = g->ram; m < g->ram + g->count; m++)
    for (uint64_t page = 0; page < m->pages; page++)
      for (uint64_t i = 0; i < m->page_size / 8; i++) {
        uint64_t left = i < MAX_THREADS && m->visited[i] && m->visited[i][page] ? LEFT : 0;
        check(load(m, page, i) == (word_of(m, page, i) ^ left), "word %llu of page %llu is %llx",
              (unsigned long long)i, (unsigned long long)page,
              (unsigned long long)load(m, page, i));
      }
}

static void guest_free(struct guest *g) {
  for (struct ram *m = g->ram; m < g->ram + g->count; m++) {
    munmap(m->at, m->pages * m->page_size);
    close(m->source), close(m->uffd);
    if (m->file >= 0)
      close(m->file);
    for (unsigned i = 0; i < MAX_THREADS; i++)
      free(m->visited[i]);
  }
}

/* conftest.py has reserved them. */
static void want_huge_pages(int count) {
  FILE *f = fopen("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "r");
  int free = 0;
  if (!f || fscanf(f, "%d", &free) != 1 || free < count)
    missing("free huge pages of 2 MiB");
  fclose(f);
}

static void to_anonymous(struct ram *m) {
  munmap(m->at, m->pages * m->page_size), close(m->file);
  m->file = -1, m->at = map(m->pages * m->page_size, -1);
}

/* A tmpfs unseen by others. */
struct small_tmpfs {
  char folder[32];
  int ballast;
};

static int file_in(struct small_tmpfs *s, const char *name) {
  char path[64];
  snprintf(path, sizeof path, "%s/%s", s->folder, name);
  int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  check(fd >= 0, "%m");
  return fd;
}

static struct small_tmpfs new_tmpfs(const char *options) {
  struct small_tmpfs s = {.folder = "/tmp/engine_test.XXXXXX"};
  check(mkdtemp(s.folder), "%m");
  if (unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
      mount("none", s.folder, "tmpfs", 0, options)) {
    rmdir(s.folder);
    missing("the right to mount a tmpfs in a mount namespace");
  }
  s.ballast = file_in(&s, "ballast");
  return s;
}

/* Of 128 pages, of which all but `room` are taken already. */
static struct small_tmpfs small_tmpfs(unsigned room) {
  struct small_tmpfs s = new_tmpfs("size=512k");
  check(!fallocate(s.ballast, 0, 0, (128 - room) * SMALL), "%m");
  return s;
}

static void free_tmpfs(struct small_tmpfs *s) {
  close(s->ballast), umount2(s->folder, MNT_DETACH), rmdir(s->folder);
}

/* The destination's memory of a guest is there instead. */
static void ram_in(struct small_tmpfs *s, struct ram *m) {
  munmap(m->at, m->pages * SMALL), close(m->file);
  m->file = file_in(s, "ram");
  check(!ftruncate(m->file, (off_t)m->pages * SMALL), "%m");
  m->at = map(m->pages * SMALL, m->file);
}

/* --- engines ---------------------------------------------------------------------------------- */

struct pair {
  struct guest *guest;
  bool staged;
  int wake, record, urgent, push; /* the last two: our ends, where one side is played by hand */
  struct pc_dest *dest;
  struct pc_source *source;
  struct pc_stats *at, *from; /* the destination's statistics, the source's */
};

enum side { SOURCE, DESTINATION, STAGED };

static void regions_of(struct guest *g, struct pc_region to[MAX_REGIONS], enum side side) {
  for (unsigned i = 0; i < g->count; i++) {
    struct ram *m = &g->ram[i];
    to[i] = (struct pc_region){.address = (uintptr_t)m->at, .pages = m->pages,
                               .page_size = m->page_size, .uffd = m->uffd,
                               .fd = side == SOURCE ? m->source : side == STAGED ? m->file : -1};
  }
}

static void new_source(struct pair *p) {
  struct pc_region regions[MAX_REGIONS];
  char error[200];
  regions_of(p->guest, regions, SOURCE);
  p->source = pc_source_new(regions, p->guest->count, p->wake, error);
  check(p->source, "%s", error);
  pc_source_tell_losses(p->source, true);
  p->from = pc_source_stats(p->source);
}

/* A destination on this record; `again`: an engine before it has registered. */
static void dest_on(struct pair *p, int record, bool again) {
  struct pc_region regions[MAX_REGIONS];
  char error[200];
  p->record = record;
  regions_of(p->guest, regions, p->staged ? STAGED : DESTINATION);
  p->dest = pc_dest_new(regions, p->guest->count, record, p->wake, p->staged, error);
  check(p->dest, "%s", error);
  p->at = pc_dest_stats(p->dest);
  check(!pc_dest_register(p->dest, again), "%s", p->at->sentence);
}

static struct pair new_dest(struct guest *g) {
  struct pair p = {.guest = g, .wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  dest_on(&p, memfd_create("record", MFD_CLOEXEC), false);
  return p;
}

/* The source hears of all that the destination has, in parts of all sizes. Returns how many. */
static uint64_t tell(struct pair *p) {
  uint64_t told = 0;
  for (unsigned i = 0; i < p->guest->count; i++)
    for (uint64_t first = 0, n, pages = p->guest->ram[i].pages; first < pages; first += n) {
      uint8_t bits[512];
      n = 1 + draw() % (8 * sizeof bits);
      n = n < pages - first ? n : pages - first;
      memset(bits, 0xff, sizeof bits);
      check(!pc_dest_have(p->dest, i, first, n, bits), " ");
      check(!pc_source_have(p->source, i, first, n, bits), " ");
      for (uint64_t page = 0; page < (n + 7) / 8 * 8; page++) {
        check(page < n || !(bits[page / 8] >> page % 8 & 1), "a bit beyond the last page");
        told += bits[page / 8] >> page % 8 & 1;
      }
    }
  return told;
}

static struct stream plain(int fd) {
  return (struct stream){.fd = fd};
}

static int buffer_bytes; /* of sockets made from now on; 0: as the system has it */

static void tcp_pair(int fd[2]) {
  struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
  socklen_t size = sizeof name;
  int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  fd[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (buffer_bytes) {
    setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &buffer_bytes, sizeof buffer_bytes);
    setsockopt(fd[0], SOL_SOCKET, SO_SNDBUF, &buffer_bytes, sizeof buffer_bytes);
  }
  check(!bind(listener, (void *)&name, size) && !listen(listener, 1) &&
            !getsockname(listener, (void *)&name, &size) && !connect(fd[0], (void *)&name, size),
        "%m");
  fd[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK); /* as an event loop has it */
  check(fd[1] >= 0, "%m");
  setsockopt(fd[0], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  close(listener);
}

/* Drives the handshake of both ends until both are done or one has failed; then the other is told,
 * if by no alert then by the end. */
static void shake(struct pc_tls *t[2], int fd[2], int result[2], char error[2][200]) {
  result[0] = result[1] = 1;
  while (result[0] > 0 || result[1] > 0) {
    struct pollfd ready[2];
    for (int i = 0; i < 2; i++) {
      if (result[i] > 0)
        result[i] = pc_tls_handshake(t[i], error[i]);
      if (result[i] < 0)
        shutdown(fd[i], SHUT_WR);
      ready[i] = (struct pollfd){.fd = result[i] > 0 ? fd[i] : -1,
                                 .events = result[i] == 2 ? POLLOUT : POLLIN};
    }
    if (result[0] > 0 || result[1] > 0)
      poll(ready, 2, -1);
  }
}

static bool with_tls; /* all connections made by these; frames by hand too */
static const uint8_t KEY[32] = "of the tests";

/* Both ends of a connection, the destination's first: TLS, or NULL without. */
static void secure(int fd[2], struct pc_tls *t[2]) {
  char error[2][200];
  int result[2];
  t[0] = t[1] = NULL;
  if (!with_tls)
    return;
  for (int i = 0; i < 2; i++) {
    t[i] = pc_tls_new(fd[i], i == 0, KEY, "m1 urgent", error[i]);
    check(t[i], "%s", error[i]);
  }
  shake(t, fd, result, error);
  for (int i = 0; i < 2; i++)
    check(!result[i], "%s", error[i]);
}

static void connect_engines(struct pair *p, bool urgent) {
  int fd[2];
  struct pc_tls *t[2];
  tcp_pair(fd), secure(fd, t);
  check(!pc_dest_connect(p->dest, fd[0], t[0], urgent), "%s", p->at->sentence);
  check(!pc_source_connect(p->source, fd[1], t[1], urgent), "%s", p->from->sentence);
}

/* Both engines with one urgent and some push connections, at work. */
static struct pair start(struct guest *g, int pushes, uint64_t rate) {
  struct pair p = new_dest(g);
  new_source(&p);
  connect_engines(&p, true);
  for (int i = 0; i < pushes; i++)
    connect_engines(&p, false);
  check(!pc_source_serve(p.source), "%s", p.from->sentence);
  if (pushes)
    check(!pc_source_push(p.source, rate), "%s", p.from->sentence);
  return p;
}

static bool drained(struct pair *p) {
  int failure = get(p->at->failure);
  check(failure <= PC_OK, "%s", p->at->sentence);
  return get(p->at->confirmed_pages) == p->at->total_pages;
}

static void finish(struct pair *p) {
  if (p->source)
    pc_source_free(p->source);
  pc_dest_disconnect(p->dest);
  pc_dest_unregister(p->dest, 1);
  pc_dest_free(p->dest);
  close(p->wake), close(p->record);
}

/* One end by hand. */
static void frame_to(struct stream s, enum frame_kind kind, unsigned region, uint64_t page,
                     uint32_t count, const void *payload, uint32_t bytes) {
  uint8_t header[FRAME_BYTES];
  pc_frame_encode(header, kind, (int)region, page, count, bytes);
  struct iovec iov[2] = {{header, sizeof header}, {(void *)payload, bytes}};
  check(!write_all(s, iov, bytes ? 2 : 1), "%m");
}

static void page_to(struct stream s, struct ram *m, uint64_t page) {
  uint8_t *bytes = malloc(m->page_size);
  fill_page(m, page, bytes);
  frame_to(s, FRAME_PAGES, 0, page, 1, bytes, m->page_size);
  free(bytes);
}

static void send_frame(int fd, enum frame_kind kind, unsigned region, uint64_t page, uint32_t count,
                       const void *payload, uint32_t bytes) {
  frame_to(plain(fd), kind, region, page, count, payload, bytes);
}

static void send_page(int fd, struct ram *m, uint64_t page) {
  page_to(plain(fd), m, page);
}

static int bytes_waiting(int fd) {
  int n = 0;
  ioctl(fd, FIONREAD, &n);
  return n;
}

/* A connection of the destination, of which the other end is returned. */
static int by_hand(struct pair *p, bool urgent) {
  int fd[2];
  tcp_pair(fd);
  check(!pc_dest_connect(p->dest, fd[0], NULL, urgent), " ");
  fcntl(fd[1], F_SETFL, 0);
  return fd[1];
}

/* The source is played by hand, by one connection of each kind. */
static void take_hold(struct pair *p) {
  p->urgent = by_hand(p, true), p->push = by_hand(p, false);
}

static void let_go(struct pair *p) {
  close(p->urgent), close(p->push);
}

static uint64_t request_from(struct stream s) {
  uint8_t in[FRAME_BYTES];
  int64_t f[5];
  ssize_t n = s.tls ? tls_read(s.tls, in, sizeof in) : recv(s.fd, in, sizeof in, MSG_WAITALL);
  while (s.tls && n > 0 && n < FRAME_BYTES) { /* a record's end, in the middle of a frame */
    ssize_t more = tls_read(s.tls, in + n, sizeof in - (size_t)n);
    n = more > 0 ? n + more : more;
  }
  check(n == sizeof in && !pc_frame_decode(in, f), "%m");
  check(f[0] == FRAME_REQUEST && f[3] == 1 && f[4] == 0, "not a request");
  return (uint64_t)f[2];
}

static uint64_t read_request(int fd) {
  return request_from(plain(fd));
}

/* A signal takes a thread out of an access: SIGBUS of a memory error, or one sent while it waits for
 * a page. Past the sanitizers' sigaction, which would hold the signal back. */
extern int __sigaction(int, const struct sigaction *, struct sigaction *);
static _Thread_local jmp_buf out_of_fault;

static void leave_fault(int signal) {
  (void)signal;
  _longjmp(out_of_fault, 1);
}

static void leave_faults_on(int signal) {
  struct sigaction action = {.sa_handler = leave_fault, .sa_flags = SA_NODEFER};
  __sigaction(signal, &action, NULL);
}

/* Reads a word; false: a memory error. */
static bool reads(struct ram *m, uint64_t page, uint64_t *value) {
  if (_setjmp(out_of_fault))
    return false;
  *value = load(m, page, 7);
  return true;
}

struct reader {
  struct ram *ram;
  uint64_t page, value;
  bool done;
  pthread_t thread;
};

static void *reader_run(void *argument) {
  struct reader *r = argument;
  r->value = load(r->ram, r->page, 0);
  __atomic_store_n(&r->done, true, __ATOMIC_RELEASE);
  return NULL;
}

static void reader_start(struct reader *r, struct ram *m, uint64_t page) {
  *r = (struct reader){.ram = m, .page = page};
  check(!pthread_create(&r->thread, NULL, reader_run, r), "thread");
}
