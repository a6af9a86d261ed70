/* SPDX-License-Identifier: Apache-2.0 */
/* The native engine, tried with real userfaultfds on this program's own memory and TCP over
 * loopback. `engine_test NAME` runs one subtest and exits with 0 when it holds, 77 when the machine
 * lacks a part (the last line of stderr says which), anything else when it does not hold. Most
 * subtests connect two engines; in some the test itself is one end (`by hand`) and sees every
 * frame.
 *
 * Guest memory proves itself: each word of each page has a value known from its place, and each
 * guest thread writes one word of its own into each page that it visits. A page that was lost,
 * torn, placed twice or overwritten after the guest wrote shows in check_guest. */
#include "engine_rig.h"

#include <dirent.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>

/* --- whole guests ----------------------------------------------------------------------------- */

/* `one_source`: nothing was sent again but requested pages that were on their way already. */
static void check_counts(struct pair *p, bool one_source) {
  struct pc_stats *d = p->at, *s = p->from;
  check(get(d->confirmed_pages) == d->total_pages, " ");
  check(get(d->urgent_pages) + get(d->pushed_pages) + get(d->zero_pages) == d->total_pages,
        "%llu urgent, %llu pushed, %llu zero", (unsigned long long)d->urgent_pages,
        (unsigned long long)d->pushed_pages, (unsigned long long)d->zero_pages);
  check(get(d->existing_pages) == 0 && get(d->stalls) == 0, " ");
  if (!one_source)
    return;
  wait_until(get(s->transferred_bytes) == get(d->transferred_bytes));
  wait_until(get(s->urgent_pages) + get(s->pushed_pages) + get(s->zero_pages) ==
             get(d->total_pages) + get(d->duplicate_pages));
  check(get(d->duplicate_pages) <= get(d->requests), "%llu twice, %llu asked for",
        (unsigned long long)d->duplicate_pages, (unsigned long long)d->requests);
}

static void move(int pushes) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 8192, SMALL, mixed);
  fill_source(m, 0, m->pages);
  struct pair p = start(&g, pushes, 0);
  struct guest_thread *t = guest_start(&g, 4, 0);
  guest_join(t, 4);
  wait_until(drained(&p));
  check_counts(&p, true);
  check(get(p.from->failure) == PC_OK && get(p.at->answered) <= get(p.at->requests), " ");
  if (pushes) {
    wait_until(get(p.from->pushing) == 0);
    check(get(p.at->urgent_pages) + get(p.at->pushed_pages) == count_content(&g, DATA), " ");
  }
  check(!pc_dest_unregister(p.dest, 0), "refused");
  check_guest(&g);
  finish(&p);
  guest_free(&g);
}

static void moved_1(void) { move(1); }
static void moved_4(void) { move(4); }
static void urgent_only(void) { move(0); }
static void moved_tls(void) { with_tls = true, move(2); }
static void urgent_tls(void) { with_tls = true, move(0); }

static void two_regions(void) {
  struct guest g = {0};
  add_ram(&g, 3001, SMALL, mixed); /* not a multiple of the bitmap's word */
  add_ram(&g, 1095, SMALL, mixed);
  fill_source(&g.ram[0], 0, g.ram[0].pages);
  fill_source(&g.ram[1], 0, g.ram[1].pages);
  struct pair p = start(&g, 2, 0);
  guest_join(guest_start(&g, 4, 4000), 4);
  wait_until(drained(&p));
  check_counts(&p, true);
  check_guest(&g);
  finish(&p);
  guest_free(&g);
}

static void huge_pages(void) {
  enum { PAGES = 12 };
  want_huge_pages(2 * PAGES);
  struct guest g = {0};
  add_ram(&g, 1024, SMALL, mixed);
  add_ram(&g, PAGES, HUGE, mixed);
  fill_source(&g.ram[0], 0, g.ram[0].pages);
  fill_source(&g.ram[1], 0, PAGES);
  struct pair p = start(&g, 2, 0);
  guest_join(guest_start(&g, 4, 2000), 4);
  wait_until(drained(&p));
  check_counts(&p, true);
  check_guest(&g);
  uint64_t discarded = get(p.at->discarded_pages);
  for (uint64_t page = 0; page < PAGES; page++) {
    discard(&g.ram[1], page, 1);
    check(page_is(&g.ram[1], page, true), "a discarded huge page came back");
  }
  wait_until(get(p.at->discarded_pages) == discarded + PAGES);
  finish(&p);
  guest_free(&g);
}

static void huge_tls(void) { with_tls = true, huge_pages(); }

static void anonymous(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 4096, SMALL, mixed);
  uint8_t *at = map(m->pages * SMALL, -1);
  int ready[2];
  check(!pipe(ready), "%m");
  pid_t child = fork();
  if (!child) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (uint64_t page = 0; page < m->pages; page++)
      if (mixed(page) != HOLE)
        fill_page(m, page, at + page * SMALL);
    check(write(ready[1], "", 1) == 1, "%m");
    for (;;)
      pause();
  }
  char byte;
  check(read(ready[0], &byte, 1) == 1, "%m");
  struct pair p = new_dest(&g);
  struct pc_region region = {.address = (uintptr_t)at, .pages = m->pages, .page_size = SMALL,
                             .fd = -1, .pid = child};
  char error[200];
  p.source = pc_source_new(&region, 1, p.wake, error);
  check(p.source, "%s", error);
  p.from = pc_source_stats(p.source);
  check(!pc_source_scan(p.source), " ");
  connect_engines(&p, true);
  connect_engines(&p, false);
  connect_engines(&p, false);
  check(!pc_source_serve(p.source) && !pc_source_push(p.source, 0), " ");
  guest_join(guest_start(&g, 4, 2000), 4);
  wait_until(drained(&p));
  check_counts(&p, true);
  check_guest(&g);

  /* The same VMM dies before a second destination has asked for anything. */
  struct guest other = {0};
  add_ram(&other, 4096, SMALL, mixed);
  struct pair q = new_dest(&other);
  q.source = pc_source_new(&region, 1, q.wake, error);
  q.from = pc_source_stats(q.source);
  kill(child, SIGKILL), waitpid(child, NULL, 0);
  connect_engines(&q, true);
  check(!pc_source_serve(q.source), " ");
  struct reader r;
  reader_start(&r, other.ram, 5);
  wait_until(get(q.from->failure) == PC_VMM_GONE);
  usleep(1000);
  check(!get(r.done), "a fault was answered though its page is lost");
  finish(&q);
  pthread_join(r.thread, NULL);
  finish(&p);
  guest_free(&other), guest_free(&g);
  munmap(at, m->pages * SMALL), close(ready[0]), close(ready[1]);
}

/* --- holes and zeros -------------------------------------------------------------------------- */

static void zeros(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 8192, SMALL, mixed);
  fill_source(m, 0, m->pages);
  uint64_t data = count_content(&g, DATA);
  check(allocated(m->source) == (data + count_content(&g, ZEROS)) * SMALL, "the source's holes");
  struct pair p = start(&g, 2, 0);
  wait_until(drained(&p));
  check_counts(&p, true);
  check(get(p.at->zero_pages) == m->pages - data, " ");
  check(get(p.at->transferred_bytes) < data * SMALL * 101 / 100 + m->pages * 2,
        "%llu bytes for %llu pages", (unsigned long long)p.at->transferred_bytes,
        (unsigned long long)data);
  check(allocated(m->file) == data * SMALL, "%llu", (unsigned long long)allocated(m->file));
  check_guest(&g); /* touches all */
  wait_until(get(p.at->discarded_pages) == m->pages - data);
  check(get(p.at->requests) == 0, " ");
  check(allocated(m->source) == (data + count_content(&g, ZEROS)) * SMALL, "holes were read");
  finish(&p);
  guest_free(&g);
}

static enum content sparse_content(uint64_t page) {
  return page % (1 << 20) < 640 ? DATA : HOLE; /* 2.5 MiB at the start of each 4 GiB */
}

static void sparse(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 4 << 20, SMALL, sparse_content);
  for (uint64_t page = 0; page < m->pages; page += 1 << 20)
    fill_source(m, page, page + 640);
  uint64_t before = pc_monotonic_ns();
  struct pair p = start(&g, 2, 0);
  wait_until(drained(&p));
  double ms = (double)(pc_monotonic_ns() - before) / 1e6;
  check(get(p.at->transferred_bytes) < (10 << 20) * 1.01, "%llu bytes",
        (unsigned long long)p.at->transferred_bytes);
  check(allocated(m->file) == 10 << 20 && allocated(m->source) == 10 << 20, " ");
  printf("16 GiB with 10 MiB of data: %.1f ms\n", ms);
  check(ms < 2000, "%.0f ms", ms); /* reading 16 GiB of holes would take longer */
  for (uint64_t page = 0; page < m->pages; page += 1 << 19)
    check(page_is(m, page, sparse_content(page) == HOLE), " ");
  finish(&p);
  guest_free(&g);
}

/* --- one page, by hand ------------------------------------------------------------------------ */

static void one_request(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 64, SMALL, all_data);
  struct pair p = new_dest(&g);
  int source = by_hand(&p, true);
  struct reader r[16];
  for (unsigned i = 0; i < 16; i++)
    reader_start(&r[i], m, 9);
  check(read_request(source) == 9, " ");
  wait_until(get(p.at->faults) == 16);
  struct reader last;
  reader_start(&last, m, 10); /* when its request is here, all before it would be */
  check(read_request(source) == 10, " ");
  check(bytes_waiting(source) == 0 && get(p.at->requests) == 2, "asked again");
  send_page(source, m, 10);
  send_page(source, m, 9);
  for (unsigned i = 0; i < 16; i++) {
    pthread_join(r[i].thread, NULL);
    check(r[i].value == word_of(m, 9, 0), " ");
  }
  pthread_join(last.thread, NULL);
  wait_until(get(p.at->answered) == 2);
  wait_until(get(p.at->urgent_pages) == 2 && get(p.at->confirmed_pages) == 2);
  check(bytes_waiting(source) == 0, "asked again");
  close(source);
  finish(&p);
  guest_free(&g);
}

static void discard_one(bool of_file) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 64, SMALL, all_data);
  if (!of_file) {
    munmap(m->at, m->pages * SMALL);
    close(m->file);
    m->file = -1, m->at = map(m->pages * SMALL, -1);
  }
  struct pair p = new_dest(&g);
  int source = by_hand(&p, true);
  send_page(source, m, 3);
  wait_until(get(p.at->confirmed_pages) == 1);
  check(page_is(m, 3, false) && get(p.at->faults) == 0, "not placed");
  discard(m, 3, 1);
  check(page_is(m, 3, true), "a discarded page is not zeros");
  wait_until(get(p.at->discarded_pages) == 1);
  check(get(p.at->requests) == 0, " ");
  send_page(source, m, 3);
  wait_until(get(p.at->duplicate_pages) == 1);
  check(page_is(m, 3, true), "a late duplicate came through");
  discard(m, 3, 1); /* and with nothing there for EEXIST to protect */
  send_page(source, m, 3);
  wait_until(get(p.at->duplicate_pages) == 2);
  check(page_is(m, 3, true), "a late duplicate came through");
  wait_until(get(p.at->discarded_pages) == 2);

  discard(m, 5, 1); /* never placed: the source's content, or zeros */
  struct reader r;
  reader_start(&r, m, 5);
  check(read_request(source) == 5, " ");
  send_page(source, m, 5);
  pthread_join(r.thread, NULL);
  check(page_is(m, 5, false), " ");
  wait_until(get(p.at->confirmed_pages) == 2);
  close(source);
  finish(&p);
  guest_free(&g);
}

static void discard_file(void) { discard_one(true); }
static void discard_anonymous(void) { discard_one(false); }

/* Placing a long run takes a while, in which its first pages are there and not confirmed yet. */
enum { RACE_RUN = 256 };

struct discarder {
  struct ram *ram;
  atomic_bool end;
  _Atomic uint64_t placing; /* first page of the run being placed */
};

static void *discard_run(void *argument) {
  struct discarder *d = argument;
  for (uint64_t i = 0; !atomic_load(&d->end); i++) {
    discard(d->ram, atomic_load(&d->placing) + mix(i) % RACE_RUN, 1);
    sched_yield();
  }
  return NULL;
}

static void *discard_touch(void *argument) {
  struct discarder *d = argument;
  for (uint64_t i = (uintptr_t)&i; !atomic_load(&d->end); i++) {
    uint64_t page = atomic_load(&d->placing) + mix(i) % RACE_RUN, is = load(d->ram, page, 77);
    check(is == 0 || is == word_of(d->ram, page, 77), "page %llu: %llx", (unsigned long long)page,
          (unsigned long long)is);
    sched_yield();
  }
  return NULL;
}

/* Pages are placed while one thread discards and two touch right there. */
static void discard_race(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 32 * RACE_RUN, SMALL, all_data);
  struct pair p = new_dest(&g);
  take_hold(&p);
  struct discarder d = {.ram = m};
  pthread_t threads[3];
  uint8_t *run = malloc(RACE_RUN * SMALL), drop[4096];
  for (unsigned i = 0; i < 3; i++)
    pthread_create(&threads[i], NULL, i ? discard_touch : discard_run, &d);
  for (uint64_t page = 0; page < m->pages; page += RACE_RUN) {
    for (unsigned i = 0; i < RACE_RUN; i++)
      fill_page(m, page + i, run + i * SMALL);
    atomic_store(&d.placing, page);
    send_frame(p.push, FRAME_PAGES, 0, page, RACE_RUN, run, RACE_RUN * SMALL);
    for (unsigned i = 0; i < RACE_RUN; i += 32) /* duplicates, or not */
      send_frame(p.urgent, FRAME_PAGES, 0, page + i, 1, run + i * SMALL, SMALL);
    while (recv(p.urgent, drop, sizeof drop, MSG_DONTWAIT) > 0)
      ;
    uint64_t all = page + RACE_RUN, some = all / 64;
    wait_until(get(p.at->confirmed_pages) >= all && get(p.at->discarded_pages) >= some);
  }
  atomic_store(&d.end, true);
  for (unsigned i = 0; i < 3; i++)
    pthread_join(threads[i], NULL); /* stuck threads end in the alarm */
  check(drained(&p), " ");
  printf("%llu faults, %llu discarded\n", (unsigned long long)get(p.at->faults),
         (unsigned long long)get(p.at->discarded_pages));
  free(run), let_go(&p);
  finish(&p);
  guest_free(&g);
}

/* --- the kernel says no ----------------------------------------------------------------------- */

static void existing(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 256, SMALL, all_data);
  fill_source(m, 0, m->pages);
  uint8_t states[256] = {0}; /* an engine before this one has placed them */
  for (uint64_t page = 10; page < 110; page += 10) {
    check(pwrite(m->file, "guest's", 8, (off_t)(page * SMALL)) == 8, "%m");
    states[page] = CLAIMED;
  }
  struct pair p = {.guest = &g, .wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  int record = memfd_create("record", MFD_CLOEXEC);
  check(pwrite(record, states, sizeof states, 0) == sizeof states, "%m");
  dest_on(&p, record, false);
  new_source(&p);
  connect_engines(&p, true), connect_engines(&p, false);
  check(!pc_source_serve(p.source) && !pc_source_push(p.source, 0), " ");
  wait_until(drained(&p));
  check(get(p.at->existing_pages) == 10, "%llu", (unsigned long long)p.at->existing_pages);
  for (uint64_t page = 0; page < m->pages; page++) {
    bool ours = page % 10 || page < 10 || page >= 110;
    check(ours ? page_is(m, page, false) : !strcmp((char *)m->at + page * SMALL, "guest's"),
          "page %llu", (unsigned long long)page);
  }
  finish(&p);
  guest_free(&g);
}

static void split_mapping(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 1024, SMALL, all_data);
  fill_source(m, 0, m->pages);
  for (uint64_t page = 5; page < m->pages; page += 23)
    check(!madvise(m->at + page * SMALL, SMALL, MADV_DONTFORK), "%m");
  check(!mprotect(m->at + 600 * SMALL, 50 * SMALL, PROT_READ), "%m");
  struct pair p = start(&g, 1, 0);
  wait_until(drained(&p));
  check_counts(&p, true);
  check(!pc_dest_unregister(p.dest, 0), " ");
  check_guest(&g);
  finish(&p);
  guest_free(&g);
}

static void vmm_gone(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 64, SMALL, all_data);
  int ready[2], theirs;
  check(!pipe(ready), "%m");
  pid_t child = fork();
  if (!child) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    theirs = new_uffd();
    check(write(ready[1], &theirs, sizeof theirs) == sizeof theirs, "%m");
    pause(); /* in the engine's hands from here on */
    _exit(0);
  }
  check(read(ready[0], &theirs, sizeof theirs) == sizeof theirs, "%m");
  close(m->uffd);
  int pidfd = (int)syscall(SYS_pidfd_open, child, 0);
  m->uffd = (int)syscall(SYS_pidfd_getfd, pidfd, theirs, 0);
  check(m->uffd >= 0, "%m");
  struct pair p = new_dest(&g);
  int source = by_hand(&p, false);
  send_page(source, m, 1);
  wait_until(get(p.at->confirmed_pages) == 1);
  kill(child, SIGKILL), waitpid(child, NULL, 0);
  send_page(source, m, 2);
  wait_until(get(p.at->failure) == PC_VMM_GONE);
  check(get(p.at->confirmed_pages) == 1, " ");
  pc_dest_disconnect(p.dest);
  check(get(p.at->failure) == PC_VMM_GONE, "forgotten");
  check(pc_dest_unregister(p.dest, 0) == -EBUSY && !pc_dest_unregister(p.dest, 1), " ");
  close(source), close(pidfd), close(ready[0]), close(ready[1]);
  finish(&p);
  guest_free(&g);
}

static void no_memory(void) {
  struct small_tmpfs s = small_tmpfs(28);
  struct guest g = {0};
  struct ram *m = add_ram(&g, 64, SMALL, all_data);
  fill_source(m, 0, m->pages);
  ram_in(&s, m);
  struct pair p = start(&g, 1, 0);
  wait_until(get(p.at->stalls) > 2);
  check(get(p.at->failure) == PC_OK, "%s", p.at->sentence);
  check(get(p.at->confirmed_pages) < m->pages, " ");
  pc_dest_disconnect(p.dest); /* returns though placing cannot */
  pc_source_disconnect(p.source);
  uint64_t stalls = get(p.at->stalls), confirmed = get(p.at->confirmed_pages);
  check(confirmed < m->pages && get(p.at->failure) == PC_OK, "%s", p.at->sentence);
  connect_engines(&p, true);
  connect_engines(&p, false);
  check(!pc_source_serve(p.source) && !pc_source_push(p.source, 0), " ");
  wait_until(get(p.at->stalls) > stalls + 2);
  check(!ftruncate(s.ballast, 0), "%m");
  wait_until(drained(&p));
  check_guest(&g);
  finish(&p);
  guest_free(&g);
  free_tmpfs(&s);
}

/* Threads that wait for zeros for which there is no memory: nobody else waits for that. */
static void no_memory_for_zeros(void) {
  enum { ZERO_READERS = 80 }; /* more than the engine keeps at a time */
  struct small_tmpfs s = small_tmpfs(0);
  struct guest g = {0};
  struct ram *m = add_ram(&g, 128, SMALL, all_data);
  ram_in(&s, m);
  struct pair p = new_dest(&g);
  int source = by_hand(&p, true);
  send_frame(source, FRAME_ZERO, 0, 0, ZERO_READERS, NULL, 0);
  wait_until(get(p.at->confirmed_pages) == ZERO_READERS);
  struct reader r[ZERO_READERS + 3];
  for (unsigned i = 0; i < ZERO_READERS; i++)
    reader_start(&r[i], m, i);
  wait_until(get(p.at->faults) >= ZERO_READERS && get(p.at->stalls) >= ZERO_READERS);
  for (unsigned i = 0; i < 3; i++) {
    reader_start(&r[ZERO_READERS + i], m, ZERO_READERS + i);
    check(read_request(source) == ZERO_READERS + i, " ");
    send_page(source, m, ZERO_READERS + i);
  }
  uint64_t stalls = get(p.at->stalls);
  wait_until(get(p.at->stalls) > stalls + ZERO_READERS);
  check(get(p.at->failure) == PC_OK, "%s", p.at->sentence);
  check(!ftruncate(s.ballast, 0), "%m");
  for (unsigned i = 0; i < ZERO_READERS + 3; i++) {
    pthread_join(r[i].thread, NULL);
    check(r[i].value == (i < ZERO_READERS ? 0 : word_of(m, i, 0)), " ");
  }
  wait_until(get(p.at->discarded_pages) == ZERO_READERS);
  close(source);
  finish(&p);
  guest_free(&g);
  free_tmpfs(&s);
}

static void no_room_for_record(void) {
  struct small_tmpfs s = small_tmpfs(4);
  struct guest g = {0};
  add_ram(&g, 5 * SMALL, SMALL, all_data);
  struct pc_region region[MAX_REGIONS];
  struct stat is;
  char error[200];
  int record = file_in(&s, "record");
  regions_of(&g, region, DESTINATION);
  check(!pc_dest_new(region, 1, record, -1, 0, error) && strstr(error, "no room for"), "%s", error);
  check(!fstat(record, &is) && is.st_size == 0, "a record was left");
  check(!ftruncate(s.ballast, 0), "%m");
  struct pc_dest *d = pc_dest_new(region, 1, record, -1, 0, error);
  check(d, "%s", error);
  check(!fstat(record, &is) && is.st_blocks * 512 == 5 * SMALL, "not all is allocated");
  pc_dest_free(d);
  for (unsigned i = 0; i < 2; i++) {
    check(!ftruncate(record, i ? 1 : 6 * SMALL), "%m");
    check(!pc_dest_new(region, 1, record, -1, 0, error) && strstr(error, "not this guest's"), " ");
  }
  close(record);
  guest_free(&g);
  free_tmpfs(&s);
}

/* A sanitizer has a limit of its own, and ends. */
static void no_room_for_bitmaps(void) {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  struct pc_region region = {.pages = 1ull << 40, .page_size = SMALL, .fd = 0};
  struct rlimit little = {1 << 30, 1 << 30};
  char error[200];
  check(!setrlimit(RLIMIT_AS, &little), "%m");
  check(!pc_source_new(&region, 1, -1, error) && strstr(error, "Cannot allocate"), "%s", error);
#endif
}

/* --- broken connections ----------------------------------------------------------------------- */

/* A proxy that cuts, or lets no more through, after so many bytes from the source. */
struct proxy {
  int dest, source;
  int64_t bytes;
  bool cuts;
  pthread_t thread;
};

static void *proxy_run(void *argument) {
  struct proxy *x = argument;
  char buffer[16384];
  while (x->bytes > 0) {
    struct pollfd ready[2] = {{.fd = x->dest, .events = POLLIN},
                              {.fd = x->source, .events = POLLIN}};
    poll(ready, 2, -1);
    int from = ready[0].revents ? x->dest : x->source, to = from == x->dest ? x->source : x->dest;
    ssize_t n = recv(from, buffer, sizeof buffer, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN)
      continue;
    if (n <= 0)
      break;
    if (from == x->source)
      x->bytes -= n, n += x->bytes < 0 ? x->bytes : 0;
    struct iovec iov = {buffer, (size_t)n};
    if (write_all(plain(to), &iov, 1))
      break;
  }
  struct pollfd end = {.fd = x->dest, .events = POLLRDHUP};
  if (!x->cuts)
    poll(&end, 1, -1);
  close(x->dest), close(x->source);
  return NULL;
}

static void connect_by_proxy(struct pair *p, struct proxy *x, bool urgent, int64_t bytes,
                             bool cuts) {
  int dest[2], source[2];
  struct pc_tls *t[2];
  tcp_pair(dest), tcp_pair(source);
  *x = (struct proxy){.dest = dest[1], .source = source[1], .bytes = bytes, .cuts = cuts};
  fcntl(x->dest, F_SETFL, 0), fcntl(x->source, F_SETFL, 0);
  pthread_create(&x->thread, NULL, proxy_run, x);
  secure((int[]){dest[0], source[0]}, t);
  check(!pc_dest_connect(p->dest, dest[0], t[0], urgent), "%s", p->at->sentence);
  check(!pc_source_connect(p->source, source[0], t[1], urgent), "%s", p->from->sentence);
}

/* Whoever is quick here, a connection is cut and the source sees it: five times less than 1.5 MB come
 * of 9 MB, and no more than that is on its way. */
static void cut(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 8192, SMALL, mixed);
  fill_source(m, 0, m->pages);
  buffer_bytes = 64 << 10;
  struct pair p = new_dest(&g);
  struct guest_thread *t = guest_start(&g, 4, 0);
  for (int time = 0; time < 6; time++) {
    struct proxy x[3];
    bool last = time == 5, urgent = time % 2; /* which of them is cut */
    new_source(&p);
    for (int i = 0; i < 3; i++)
      connect_by_proxy(&p, &x[i], i == 0, last ? INT64_MAX : 50000 + (int64_t)(draw() % 450000),
                       urgent == (i == 0));
    check(!pc_source_serve(p.source), " ");
    if (!urgent || last)
      check(!pc_source_push(p.source, 0), " ");
    if (last) {
      wait_until(drained(&p));
    } else {
      wait_until(get(p.at->failure) == PC_CONNECTION && get(p.from->failure) == PC_CONNECTION);
      check(get(p.at->confirmed_pages) < p.at->total_pages, "too late");
      check(pc_dest_unregister(p.dest, 0) == -EBUSY, "pages lack");
    }
    pc_dest_disconnect(p.dest);
    pc_source_free(p.source);
    p.source = NULL;
    check(get(p.at->failure) == PC_OK, "not forgotten");
    for (int i = 0; i < 3; i++)
      pthread_join(x[i].thread, NULL);
  }
  guest_join(t, 4);
  check(!pc_dest_unregister(p.dest, 0), " ");
  check_counts(&p, false);
  check_guest(&g);
  finish(&p);
  guest_free(&g);
}

static void cut_tls(void) { with_tls = true, cut(); }

/* The same source engine may be connected again too: it sends again what may have been lost. */
static void connect_again(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 2048, SMALL, mixed);
  fill_source(m, 0, m->pages);
  struct pair p = start(&g, 2, 4 << 20);
  wait_until(get(p.at->pushed_pages) > 100);
  pc_source_disconnect(p.source);
  pc_dest_disconnect(p.dest);
  check(get(p.at->failure) == PC_OK && get(p.from->failure) == PC_OK, " ");
  check(!drained(&p), "too late");
  struct guest_thread *t = guest_start(&g, 2, 0);
  connect_engines(&p, true);
  connect_engines(&p, false);
  check(!pc_source_serve(p.source) && !pc_source_push(p.source, 0), " ");
  guest_join(t, 2);
  wait_until(drained(&p));
  check_counts(&p, false);
  check_guest(&g);
  finish(&p);
  guest_free(&g);
}

/* --- recovery --------------------------------------------------------------------------------- */

static uint64_t count_done(int record, uint64_t pages) {
  uint8_t *states = malloc(pages);
  uint64_t n = 0;
  for (uint64_t i = pread(record, states, pages, 0) == (ssize_t)pages ? pages : 0; i-- > 0;)
    n += (states[i] & DONE) != 0;
  free(states);
  return n;
}

/* Daemons are killed while they take faults and place; each next one has the record of the last.
 * The guest's threads write into what they find and go on all the time: none may be left waiting,
 * and nothing that they wrote be overwritten. */
static void killed(bool anonymous_memory) {
  enum { LIVES = 5 - RARELY / 2 };
  struct guest g = {0};
  struct ram *m = add_ram(&g, 16384, SMALL, mixed);
  fill_source(m, 0, m->pages);
  if (anonymous_memory)
    to_anonymous(m);
  struct pair p = {.guest = &g, .wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  int record = memfd_create("record", MFD_CLOEXEC), go[LIVES][2], ready[2], ends[LIVES][3][2];
  pid_t child[LIVES];
  char byte;
  check(!pipe(ready), "%m");
  for (unsigned life = 0; life < LIVES; life++) { /* all of them before there are threads */
    check(!pipe(go[life]), "%m");
    for (unsigned i = 0; i < 3; i++)
      tcp_pair(ends[life][i]);
    child[life] = fork();
    if (!child[life]) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      check(read(go[life][0], &byte, 1) == 1, "%m");
      dest_on(&p, record, life > 0);
      check(write(ready[1], "", 1) == 1, "%m");
      for (unsigned i = 0; i < 3; i++)
        check(!pc_dest_connect(p.dest, ends[life][i][0], NULL, i == 0), " ");
      for (;;)
        pause();
    }
    for (unsigned i = 0; i < 3; i++)
      close(ends[life][i][0]);
  }
  struct guest_thread *t = NULL;
  new_source(&p);
  for (unsigned life = 0; life < LIVES; life++) {
    uint64_t before = count_done(record, m->pages);
    check(write(go[life][1], "", 1) == 1 && read(ready[0], &byte, 1) == 1, "%m");
    t = t ? t : guest_start(&g, 4, 0);
    for (unsigned i = 0; i < 3; i++)
      check(!pc_source_connect(p.source, ends[life][i][1], NULL, i == 0), " ");
    check(!pc_source_serve(p.source) && !pc_source_push(p.source, 10 << 20), " ");
    wait_until(count_done(record, m->pages) > before + 600);
    kill(child[life], SIGKILL), waitpid(child[life], NULL, 0);
    wait_until(get(p.from->failure) == PC_CONNECTION);
    pc_source_disconnect(p.source);
    close(go[life][0]), close(go[life][1]);
  }
  uint64_t before = count_done(record, m->pages);
  dest_on(&p, record, true);
  check(get(p.at->confirmed_pages) == before && before < m->pages, "%llu of %llu",
        (unsigned long long)p.at->confirmed_pages, (unsigned long long)before);
  check(tell(&p) == before, " ");
  for (unsigned i = 0; i < 3; i++)
    connect_engines(&p, i == 0);
  check(!pc_source_serve(p.source) && !pc_source_push(p.source, 0), " ");
  guest_join(t, 4);
  wait_until(drained(&p) && get(p.from->pushing) == 0);
  check(get(p.at->duplicate_pages) <= get(p.at->requests), "pages were pushed again");
  check(!pc_dest_unregister(p.dest, 0), "refused");
  check_guest(&g);
  finish(&p);
  guest_free(&g);
  close(ready[0]), close(ready[1]);
}

static void killed_file(void) { killed(false); }
static void killed_anonymous(void) { killed(true); }

/* Who waits for an engine that is gone, its message read, is answered by the next one. */
static void waiter_of_another(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 64, SMALL, all_data);
  struct pair p = new_dest(&g);
  int source = by_hand(&p, true);
  struct reader r;
  reader_start(&r, m, 9);
  for (unsigned time = 0; time < 3; time++) {
    check(read_request(source) == 9, " ");
    pc_dest_free(p.dest);
    close(source);
    dest_on(&p, p.record, true);
    source = by_hand(&p, true);
  }
  check(read_request(source) == 9 && !get(r.done), " ");
  send_page(source, m, 9);
  pthread_join(r.thread, NULL);
  check(r.value == word_of(m, 9, 0), " ");
  close(source);
  finish(&p);
  guest_free(&g);
}

/* Connections end at any time and come again, and some of the times the destination's engine is
 * another one; before the push they agree on what is there. */
static void again_and_again(void) {
  struct guest g = {0};
  add_ram(&g, 9001, SMALL, mixed);
  add_ram(&g, 3003, SMALL, mixed);
  fill_source(&g.ram[0], 0, g.ram[0].pages);
  fill_source(&g.ram[1], 0, g.ram[1].pages);
  struct pair p = start(&g, 2, 8 << 20);
  struct guest_thread *t = guest_start(&g, 4, 0);
  uint64_t holes = count_content(&g, HOLE);
  wait_until(get(p.from->zero_pages) >= holes / 2);
  for (unsigned time = 0; time < 30 / RARELY + 1; time++) {
    usleep((useconds_t)(draw() % 8000));
    bool first = draw() % 2;
    if (first)
      pc_source_disconnect(p.source);
    if (time % 2) {
      pc_dest_disconnect(p.dest);
    } else {
      uint64_t confirmed = get(p.at->confirmed_pages);
      pc_dest_free(p.dest);
      dest_on(&p, p.record, true);
      check(get(p.at->confirmed_pages) >= confirmed, "forgotten");
    }
    if (!first)
      pc_source_disconnect(p.source);
    check(get(p.at->failure) == PC_OK && get(p.from->failure) == PC_OK, "not forgotten");
    check(get(p.from->pushing) == 0, "%d are pushing", p.from->pushing);
    uint64_t sent = get(p.from->pushed_pages) + get(p.from->zero_pages), told = tell(&p);
    uint64_t asked = get(p.from->requests), twice = get(p.at->duplicate_pages);
    check(told == get(p.at->confirmed_pages), " ");
    for (unsigned i = 0; i < 3; i++)
      connect_engines(&p, i == 0);
    check(!pc_source_serve(p.source) && !pc_source_push(p.source, 8 << 20), " ");
    if (time % 3 == 0) {
      wait_until(get(p.at->confirmed_pages) > told + 50 || drained(&p));
      uint64_t now = get(p.from->pushed_pages) + get(p.from->zero_pages) - sent;
      check(now <= p.at->total_pages - told + get(p.from->requests) - asked, "pushed again");
      check(get(p.at->duplicate_pages) - twice <= get(p.from->requests) - asked, "pushed again");
    }
  }
  pc_source_disconnect(p.source), pc_dest_disconnect(p.dest);
  tell(&p);
  for (unsigned i = 0; i < 3; i++)
    connect_engines(&p, i == 0);
  check(!pc_source_serve(p.source) && !pc_source_push(p.source, 0), " ");
  guest_join(t, 4);
  wait_until(drained(&p) && get(p.from->pushing) == 0);
  check(!pc_dest_unregister(p.dest, 0), " ");
  check_guest(&g);
  finish(&p);
  guest_free(&g);
}

/* A record as a crash may leave it, state by state. */
static void record_states(void) {
  enum { PAGES = 1000, SLOTS = 1024 };
  struct guest g = {0};
  struct ram *m = add_ram(&g, PAGES, SMALL, all_data);
  fill_source(m, 0, m->pages);
  uint8_t states[SLOTS] = {0};
  bool guests[SLOTS] = {false};
  uint64_t done = 0, there = 0;
  for (uint64_t page = 0; page < PAGES; page++) {
    states[page] = (uint8_t[]){0, WANTED, CLAIMED, CLAIMED | WANTED, DONE, DONE | WANTED,
                               BEGUN | WANTED}[draw() % 7];
    done += (states[page] & DONE) != 0;
    guests[page] = states[page] & (CLAIMED | BEGUN | DONE) && draw() % 2;
    if (guests[page]) { /* placed, then written by the guest */
      check(pwrite(m->file, "guest's", 8, (off_t)(page * SMALL)) == 8, "%m");
      there += !(states[page] & DONE);
    }
  }
  struct pair p = {.guest = &g, .wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  int record = memfd_create("record", MFD_CLOEXEC);
  check(pwrite(record, states, SLOTS, 0) == SLOTS, "%m");
  dest_on(&p, record, false);
  check(get(p.at->confirmed_pages) == done, "%llu", (unsigned long long)p.at->confirmed_pages);
  new_source(&p);
  for (unsigned i = 0; i < 3; i++)
    connect_engines(&p, i == 0); /* nobody has told the source: all is pushed */
  check(!pc_source_serve(p.source) && !pc_source_push(p.source, 0), " ");
  wait_until(drained(&p));
  check(get(p.at->requests) == 0, "an old wish was asked for");
  wait_until(get(p.at->duplicate_pages) == done);
  check(get(p.at->existing_pages) == there, "%llu", (unsigned long long)p.at->existing_pages);
  for (uint64_t page = 0; page < PAGES; page++) {
    if (guests[page])
      check(!strcmp((char *)m->at + page * SMALL, "guest's"), "%llu", (unsigned long long)page);
    else /* done, but not there: the guest has discarded it */
      check(page_is(m, page, states[page] & DONE), "page %llu", (unsigned long long)page);
  }
  finish(&p);
  guest_free(&g);
}

/* What the destination has by hand is told to the source: the rest is pushed, once. */
static void have_marks(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 5000, SMALL, mixed);
  fill_source(m, 0, m->pages);
  struct pair p = new_dest(&g);
  new_source(&p);
  uint8_t *has = calloc(m->pages, 1), byte = 0xff;
  for (unsigned round = 0; round < 4; round++) {
    int source = by_hand(&p, false);
    uint64_t n = 0;
    for (uint64_t page = 0; page < m->pages; page++) {
      if (!has[page] && draw() % 8 == 0) {
        has[page] = 1;
        if (m->content(page) == DATA)
          send_page(source, m, page);
        else
          send_frame(source, FRAME_ZERO, 0, page, 1, NULL, 0);
      }
      n += has[page];
    }
    wait_until(get(p.at->confirmed_pages) == n);
    pc_dest_disconnect(p.dest);
    close(source);
    check(tell(&p) == n, " ");
    for (uint64_t page = 0; page < m->pages; page++)
      check(!pc_dest_have(p.dest, 0, page, 1, &byte) && byte == has[page], " ");
    if (round < 3)
      pc_source_disconnect(p.source); /* forgets it */
  }
  static const struct { unsigned region; uint64_t first, count; } OUTSIDE[] = {
      {1, 0, 1}, {~0u, 0, 1}, {0, 5000, 1}, {0, 5001, 0}, {0, 4999, 2}, {0, ~0ull, 1},
      {0, ~0ull, 2}, {0, 1, ~0ull}, {0, 0, 5001},
  };
  for (unsigned i = 0; i < sizeof OUTSIDE / sizeof *OUTSIDE; i++) {
    check(pc_dest_have(p.dest, OUTSIDE[i].region, OUTSIDE[i].first, OUTSIDE[i].count, &byte) ==
          -EINVAL, "%u", i);
    check(pc_source_have(p.source, OUTSIDE[i].region, OUTSIDE[i].first, OUTSIDE[i].count, &byte) ==
          -EINVAL, "%u", i);
  }
  check(!pc_dest_have(p.dest, 0, 5000, 0, &byte) && !pc_source_have(p.source, 0, 5000, 0, &byte),
        "nothing is not outside");
  int urgent[2], push[2];
  tcp_pair(urgent), tcp_pair(push);
  check(!pc_source_connect(p.source, urgent[1], NULL, true), " ");
  check(!pc_source_connect(p.source, push[1], NULL, false), " ");
  check(!pc_source_serve(p.source) && !pc_source_push(p.source, 0), " ");
  struct frame_reader reader;
  struct frame f;
  uint8_t *payload;
  uint64_t lacks = 0;
  for (uint64_t page = 0; page < m->pages; page++)
    lacks += !has[page];
  check(!frame_reader_init(&reader, plain(push[0]), FRAME_MAX_PAYLOAD, 0), " ");
  while (lacks) {
    check(frame_read(&reader, &f, &payload) == 1, " ");
    for (uint64_t page = f.page; page < f.page + f.count; page++, lacks--) {
      check(!has[page], "page %llu was pushed again", (unsigned long long)page);
      has[page] = 2;
    }
  }
  wait_until(get(p.from->pushing) == 0);
  check(bytes_waiting(push[0]) == 0, "more was pushed");
  frame_reader_free(&reader);
  check(!frame_reader_init(&reader, plain(urgent[0]), FRAME_MAX_PAYLOAD, 0), " ");
  for (uint64_t page = 0; page < m->pages; page += 97) { /* and every request is answered */
    send_frame(urgent[0], FRAME_REQUEST, 0, page, 1, NULL, 0);
    check(frame_read(&reader, &f, &payload) == 1 && f.page == page && f.count == 1, " ");
    check((f.kind == FRAME_PAGES) == (m->content(page) == DATA), " ");
  }
  frame_reader_free(&reader);
  free(has), close(urgent[0]), close(push[0]);
  finish(&p);
  guest_free(&g);
}

/* Wants many pages at once without as many threads: a signal takes the thread out of each fault
 * once the engine has it. */
enum { WANTERS = 16 };

enum given { LACKS, GIVEN, ZEROED };

static enum given given(uint64_t page) {
  return page / 3 % 2 ? LACKS : page % 5 ? GIVEN : ZEROED;
}

struct toucher {
  struct ram *ram;
  uint64_t from, errors;
  pthread_t thread;
};

/* Touches each page: what was given reads as it was given, all the rest is errors, never zeros. */
static void *toucher_run(void *argument) {
  struct toucher *t = argument;
  for (uint64_t i = 0; i < t->ram->pages; i++) {
    uint64_t page = (i + t->from) % t->ram->pages, value;
    bool is = reads(t->ram, page, &value);
    check(is == (given(page) != LACKS), "page %llu: %s, %llx", (unsigned long long)page,
          is ? "read" : "an error", (unsigned long long)value);
    check(!is || value == (given(page) == GIVEN ? word_of(t->ram, page, 7) : 0), " ");
    t->errors += !is;
  }
  return NULL;
}

static void poison(uint64_t pages, uint32_t page_size, bool anonymous_memory) {
  enum { TOUCHERS = 6 };
  needs_poison();
  leave_faults_on(SIGBUS);
  struct guest g = {0};
  struct ram *m = add_ram(&g, pages, page_size, all_data);
  if (anonymous_memory)
    to_anonymous(m);
  struct pair p = new_dest(&g);
  int source = by_hand(&p, true);
  uint64_t lacks = 0;
  for (uint64_t page = 0; page < pages; page++) {
    lacks += given(page) == LACKS;
    if (given(page) == GIVEN)
      send_page(source, m, page);
    else if (given(page) == ZEROED)
      send_frame(source, FRAME_ZERO, 0, page, 1, NULL, 0);
  }
  wait_until(get(p.at->confirmed_pages) == pages - lacks);
  struct toucher t[TOUCHERS];
  for (unsigned i = 0; i < TOUCHERS; i++) {
    t[i] = (struct toucher){.ram = m, .from = i * pages / TOUCHERS};
    check(!pthread_create(&t[i].thread, NULL, toucher_run, &t[i]), "thread");
  }
  wait_until(get(p.at->faults) >= TOUCHERS);
  check(pc_dest_poison(p.dest) == -EBUSY && get(p.at->failure) == PC_OK, "the source is there");
  pc_dest_disconnect(p.dest);
  close(source);
  int64_t poisoned = pc_dest_poison(p.dest);
  check(poisoned == (int64_t)lacks, "%lld of %llu: %s", (long long)poisoned,
        (unsigned long long)lacks, p.at->sentence);
  check(drained(&p) && get(p.at->lost_pages) == lacks, " ");
  for (unsigned i = 0; i < TOUCHERS; i++) {
    pthread_join(t[i].thread, NULL);
    check(t[i].errors == lacks, " ");
  }
  check(pc_dest_poison(p.dest) == 0 && pc_dest_unregister(p.dest, 0) == -EBUSY, " ");

  /* What was lost stays so: discarded, and with another engine. */
  for (unsigned time = 0; time < 2; time++) {
    uint64_t value;
    for (uint64_t page = 0; page < pages; page += 1 + time) {
      if (given(page) == LACKS)
        discard(m, page, 1);
      check(reads(m, page, &value) == (given(page) != LACKS), "%llx", (unsigned long long)value);
    }
    pc_dest_free(p.dest);
    dest_on(&p, p.record, true);
    check(drained(&p) && get(p.at->lost_pages) == lacks, " ");
  }
  finish(&p);
  guest_free(&g);
}

static void poison_file(void) {
  for (unsigned time = 0; time < 8 / RARELY; time++)
    poison(2000, SMALL, false);
}

static void poison_anonymous(void) {
  for (unsigned time = 0; time < 8 / RARELY; time++)
    poison(2000, SMALL, true);
}

static void poison_huge(void) {
  want_huge_pages(24);
  poison(12, HUGE, false);
}

static void *late_run(void *argument) {
  struct toucher *t = argument;
  uint64_t value;
  t->errors = !reads(t->ram, t->from, &value);
  return NULL;
}

/* A fault whose message is older than the error: the kernel would let zeros replace it. */
static void poison_late_fault(void) {
  needs_poison();
  leave_faults_on(SIGBUS);
  struct guest g = {0};
  struct ram *m = add_ram(&g, 64, SMALL, all_data);
  struct pair p = {.guest = &g, .wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  int record = memfd_create("record", MFD_CLOEXEC);
  uint8_t states[64];
  memset(states, DONE | LOST, sizeof states);
  check(pwrite(record, states, sizeof states, 0) == sizeof states, "%m");
  dest_on(&p, record, false);
  for (uint64_t page = 0; page < m->pages; page++) {
    pc_dest_free(p.dest); /* nobody takes faults for a while */
    struct toucher t = {.ram = m, .from = page};
    check(!pthread_create(&t.thread, NULL, late_run, &t), "thread");
    struct pollfd message = {.fd = m->uffd, .events = POLLIN};
    check(poll(&message, 1, -1) == 1, "%m"); /* the fault waits to be read */
    struct uffdio_poison lost = {.range = {(uintptr_t)m->at + page * SMALL, SMALL}, .mode = 1};
    check(!ioctl(m->uffd, UFFDIO_POISON, &lost), "%m"); /* without waking anybody */
    dest_on(&p, p.record, true);
    pthread_join(t.thread, NULL);
    check(t.errors == 1, "zeros");
  }
  finish(&p);
  guest_free(&g);
}

struct wanter {
  struct ram *ram;
  _Atomic uint64_t at;
  pthread_t thread;
};

static void *wanter_run(void *argument) {
  struct wanter *w = argument;
  for (; atomic_load(&w->at) < w->ram->pages; atomic_fetch_add(&w->at, WANTERS))
    if (!_setjmp(out_of_fault))
      load(w->ram, atomic_load(&w->at), 0);
  return NULL;
}

static void want_all(struct pair *p) {
  struct wanter w[WANTERS];
  struct ram *m = p->guest->ram;
  leave_faults_on(SIGUSR1);
  for (unsigned i = 0; i < WANTERS; i++) {
    w[i] = (struct wanter){.ram = m, .at = i};
    pthread_create(&w[i].thread, NULL, wanter_run, &w[i]);
  }
  for (uint64_t page = WANTERS; page <= m->pages; page += WANTERS) {
    wait_until(get(p->at->faults) >= page);
    for (unsigned i = 0; i < WANTERS; i++)
      pthread_kill(w[i].thread, SIGUSR1);
    for (unsigned i = 0; i < WANTERS; i++)
      wait_until(atomic_load(&w[i].at) >= page);
  }
  for (unsigned i = 0; i < WANTERS; i++)
    pthread_join(w[i].thread, NULL);
}

enum connected { AWAY, CONNECTED, CUT }; /* while the guest comes to want all its pages */

static void overflow(enum connected connected) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 5200, SMALL, all_data);
  struct pair p = new_dest(&g);
  int fd[2];
  struct pc_tls *t[2];
  buffer_bytes = 4096;
  tcp_pair(fd), secure(fd, t);
  fcntl(fd[1], F_SETFL, 0);
  if (connected != AWAY)
    check(!pc_dest_connect(p.dest, fd[0], t[0], true), " ");
  want_all(&p);
  check(get(p.at->requests) < m->pages, "the socket took all");
  if (connected == CUT) { /* most likely within a request */
    pc_dest_disconnect(p.dest);
    engine_close((struct stream){.fd = fd[1], .tls = t[1]});
    tcp_pair(fd), secure(fd, t);
    fcntl(fd[1], F_SETFL, 0);
  }
  struct stream source = {.fd = fd[1], .tls = t[1]};
  if (connected != CONNECTED)
    check(!pc_dest_connect(p.dest, fd[0], t[0], true), " ");
  uint8_t *asked = calloc(m->pages, 1);
  for (uint64_t page, n = 0; n < m->pages;) { /* from here on there is no fault to wake anybody */
    page = request_from(source);
    check(page < m->pages, " ");
    n += !asked[page];
    if (!asked[page]++)
      page_to(source, m, page);
  }
  wait_until(drained(&p));
  check_counts(&p, false);
  check(get(p.at->faults) == m->pages, " ");
  check_guest(&g);
  free(asked), engine_close(source);
  finish(&p);
  guest_free(&g);
}

static void overflow_full(void) { overflow(CONNECTED); }
static void overflow_away(void) { overflow(AWAY); }
static void overflow_cut(void) { overflow(CUT); }
static void overflow_tls(void) { with_tls = true, overflow(CONNECTED); }
static void overflow_cut_tls(void) { with_tls = true, overflow(CUT); }

/* --- hostile peers ---------------------------------------------------------------------------- */

static const struct {
  int kind, region;
  uint64_t page;
  uint32_t count, payload;
} BAD[] = {
    {FRAME_REQUEST, 0, 0, 1, 0},           {FRAME_PAGES, 1, 0, 1, SMALL},
    {FRAME_PAGES, 65535, 0, 1, SMALL},     {FRAME_PAGES, 0, 64, 1, SMALL},
    {FRAME_PAGES, 0, ~0ull, 1, SMALL},     {FRAME_PAGES, 0, 1ull << 63, 1, SMALL},
    {FRAME_PAGES, 0, 63, 2, 2 * SMALL},    {FRAME_PAGES, 0, 0, 0, 0},
    {FRAME_PAGES, 0, 0, 0, SMALL},         {FRAME_PAGES, 0, 0, 1, 0},
    {FRAME_PAGES, 0, 0, 1, SMALL - 1},     {FRAME_PAGES, 0, 0, 1, 2 * SMALL},
    {FRAME_PAGES, 0, 0, 1, HUGE},          {FRAME_PAGES, 0, 0, 1, HUGE + 1},
    {FRAME_PAGES, 0, 0, 1, ~0u},           {FRAME_PAGES, 0, 0, 1u << 20, 0},
    {FRAME_PAGES, 0, 0, 65, 65 * SMALL},   {FRAME_PAGES, 0, 0, 1u << 31, HUGE},
    {FRAME_ZERO, 0, 0, 65, 0},             {FRAME_ZERO, 0, 1, 64, 0},
    {FRAME_ZERO, 0, 0, ~0u, 0},            {FRAME_ZERO, 0, ~0ull, 2, 0},
    {FRAME_ZERO, 0, 0, 1, SMALL},          {FRAME_ZERO, 1, 0, 1, 0},
    {FRAME_ZERO, 0, 0, 0, 0},              {0, 0, 0, 1, 0},
    {FRAME_LOST, 0, 0, 65, 0},             {FRAME_LOST, 0, ~0ull, 1, 0},
    {FRAME_LOST, 0, 0, 1, SMALL},          {FRAME_LOST, 1, 0, 1, 0},
    {FRAME_LOST, 0, 0, 0, 0},              {5, 0, 0, 1, 0},
    {255, 0, 0, 1, 0},
};
enum { BADS = sizeof BAD / sizeof *BAD };

/* Sends header and payload, as far as the peer takes it: it may well hang up in the middle. */
static void send_bad(int fd, const uint8_t header[FRAME_BYTES], uint32_t payload) {
  static uint8_t bytes[HUGE + 1];
  if (!*bytes)
    memset(bytes, 0xee, sizeof bytes);
  send(fd, header, FRAME_BYTES, MSG_NOSIGNAL);
  for (uint32_t sent = 0; sent < payload && sent < sizeof bytes;) {
    ssize_t n = send(fd, bytes + sent, (payload < sizeof bytes ? payload : sizeof bytes) - sent,
                     MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno != EAGAIN)
      break;
    if (n < 0 && !usleep(50))
      if (recv(fd, &(char){0}, 1, MSG_DONTWAIT | MSG_PEEK) >= 0 || errno != EAGAIN)
        break;
    sent += n > 0 ? (uint32_t)n : 0;
    if (payload > HUGE)
      break; /* refused by its header */
  }
}

/* Makes a header that must be refused: one of the table, or a good one with bytes spoilt. */
static uint32_t bad_header(unsigned time, uint8_t header[FRAME_BYTES], bool for_source) {
  for (;;) {
    if (time < BADS && !(for_source && BAD[time].kind == FRAME_REQUEST)) {
      pc_frame_encode(header, BAD[time].kind, BAD[time].region, BAD[time].page, BAD[time].count,
                      BAD[time].payload);
      return BAD[time].payload;
    }
    uint64_t r = draw();
    if (r % 8 == 0) {
      for (unsigned i = 0; i < FRAME_BYTES; i++)
        header[i] = (uint8_t)draw();
    } else {
      pc_frame_encode(header, for_source ? FRAME_REQUEST : 1 + (int)(r / 8 % 3), 0, r / 64 % 64, 1,
                      r / 8 % 3 == 1 ? SMALL : 0);
      for (unsigned n = 1 + (unsigned)(r >> 60) % 3; n > 0; n--)
        header[draw() % FRAME_BYTES] = (uint8_t)draw();
    }
    struct frame f;
    if (frame_decode(header, &f))
      return 0;
    bool fits = f.region == 0 && frame_fits(&f, 64, SMALL);
    if (!fits || (for_source ? f.kind != FRAME_REQUEST || f.count != 1 : f.kind == FRAME_REQUEST))
      return f.payload;
  }
}

static void hostile_source(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 64, SMALL, all_data);
  struct pair p = new_dest(&g);
  for (unsigned time = 0; time < BADS + 400 / RARELY; time++) {
    uint8_t header[FRAME_BYTES];
    int fd = by_hand(&p, time % 2);
    uint32_t payload = bad_header(time, header, false);
    send_bad(fd, header, payload);
    shutdown(fd, SHUT_WR);
    wait_until(get(p.at->failure) > PC_OK);
    check(get(p.at->failure) == PC_BAD_FRAME, "time %u: %s", time, p.at->sentence);
    pc_dest_disconnect(p.dest);
    check(get(p.at->failure) == PC_OK, " ");
    close(fd);
  }
  check(get(p.at->confirmed_pages) == 0 && get(p.at->transferred_bytes) == 0, " ");
  check(allocated(m->file) == 0, "a page was touched");
  for (unsigned cut_at = 0; cut_at < FRAME_BYTES + SMALL; cut_at += 1 + cut_at / 8) {
    uint8_t bytes[FRAME_BYTES + SMALL] = {0};
    int fd = by_hand(&p, cut_at % 2);
    pc_frame_encode(bytes, FRAME_PAGES, 0, 7, 1, SMALL);
    check(send(fd, bytes, cut_at, 0) == (ssize_t)cut_at, "%m");
    close(fd);
    wait_until(get(p.at->failure) > PC_OK);
    check(get(p.at->failure) == PC_CONNECTION, "%u: %s", cut_at, p.at->sentence);
    pc_dest_disconnect(p.dest);
  }
  check(get(p.at->confirmed_pages) == 0 && allocated(m->file) == 0, "half a page was placed");
  finish(&p);
  guest_free(&g);
}

static void hostile_destination(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 64, SMALL, all_data);
  fill_source(m, 0, m->pages);
  struct pair p = new_dest(&g);
  new_source(&p);
  for (unsigned time = 0; time < BADS + 400 / RARELY; time++) {
    uint8_t header[FRAME_BYTES], byte;
    int fd[2];
    tcp_pair(fd);
    check(!pc_source_connect(p.source, fd[1], NULL, true) && !pc_source_serve(p.source), " ");
    uint32_t payload = bad_header(time, header, true);
    send_bad(fd[0], header, payload);
    shutdown(fd[0], SHUT_WR);
    wait_until(get(p.from->failure) > PC_OK);
    check(get(p.from->failure) == PC_BAD_FRAME, "time %u: %s", time, p.from->sentence);
    pc_source_disconnect(p.source);
    check(recv(fd[0], &byte, 1, 0) <= 0, "a bad request was answered");
    close(fd[0]);
  }
  check(get(p.from->transferred_bytes) == 0 && get(p.from->requests) == 0, " ");
  finish(&p);
  guest_free(&g);
}

/* --- life ------------------------------------------------------------------------------------- */

static unsigned open_files(void) {
  unsigned n = 0;
  DIR *folder = opendir("/proc/self/fd");
  while (readdir(folder))
    n++;
  closedir(folder);
  return n;
}

static void *aimless_run(void *argument) {
  struct discarder *d = argument;
  for (uint64_t i = (uintptr_t)&i; !atomic_load(&d->end); i++)
    load(d->ram, mix(i) % d->ram->pages, 0);
  return NULL;
}

static void stop_often(unsigned times) {
  unsigned before = 0;
  for (unsigned time = 0; time < times / RARELY; time++) {
    struct guest g = {0};
    struct ram *m = add_ram(&g, 4096, SMALL, mixed);
    if (time % 8 == 0)
      fill_source(m, 0, m->pages);
    struct discarder d = {.ram = m};
    pthread_t threads[3];
    struct pair p = start(&g, (int)(draw() % 4), draw() % 2 ? 0 : 20 << 20);
    for (unsigned i = 0; i < 3; i++)
      pthread_create(&threads[i], NULL, aimless_run, &d);
    usleep((useconds_t)(draw() % 3000));
    switch (draw() % 6) {
    case 0:
      pc_dest_stop(p.dest);
      break;
    case 1:
      pc_dest_disconnect(p.dest);
      break;
    case 2:
      pc_source_disconnect(p.source);
      break;
    case 3:
      pc_source_free(p.source);
      p.source = NULL;
      break;
    case 4:
      pc_dest_disconnect(p.dest);
      pc_source_disconnect(p.source);
      connect_engines(&p, true);
      connect_engines(&p, false);
      check(!pc_source_serve(p.source) && !pc_source_push(p.source, 0), " ");
      usleep((useconds_t)(draw() % 1000));
    }
    atomic_store(&d.end, true);
    finish(&p); /* gives the guest up: who waits reads zeros */
    for (unsigned i = 0; i < 3; i++)
      pthread_join(threads[i], NULL);
    guest_free(&g);
    unsigned now = open_files();
    before = before ? before : now;
    check(now == before, "%u descriptors are open, %u were", now, before);
  }
}

struct passer {
  struct ram *ram;
  atomic_bool end;
  _Atomic uint64_t visits;
};

static void *pass_run(void *argument) {
  struct passer *t = argument;
  for (uint64_t i = (uintptr_t)&i; !atomic_load(&t->end); i++) {
    load(t->ram, mix(i) % t->ram->pages, 0);
    atomic_fetch_add(&t->visits, 1);
    sched_yield();
  }
  return NULL;
}

/* Nobody waits when memory is registered no more, though many threads fault just then. */
static void unregister_race(void) {
  enum { THREADS = 4 };
  for (unsigned time = 0; time < 4000 / RARELY; time++) {
    struct guest g = {0};
    struct ram *m = add_ram(&g, 64, SMALL, mixed);
    struct pair p = new_dest(&g);
    struct passer t[THREADS] = {0};
    pthread_t threads[THREADS];
    for (unsigned i = 0; i < THREADS; i++) {
      t[i].ram = m;
      pthread_create(&threads[i], NULL, pass_run, &t[i]);
    }
    usleep((useconds_t)(draw() % 200));
    check(!pc_dest_unregister(p.dest, 1), "%m");
    for (unsigned i = 0; i < THREADS; i++) {
      uint64_t visits = atomic_load(&t[i].visits);
      wait_until(atomic_load(&t[i].visits) > visits);
    }
    for (unsigned i = 0; i < THREADS; i++) {
      atomic_store(&t[i].end, true);
      pthread_join(threads[i], NULL);
    }
    finish(&p);
    guest_free(&g);
  }
}

static void stop_anytime(void) { stop_often(120); }
static void stop_tls(void) { with_tls = true, stop_often(40); }

static void bandwidth(void) {
  enum { RATE = 8 << 20 };
  struct guest g = {0};
  struct ram *m = add_ram(&g, 4096, SMALL, all_data);
  fill_source(m, 0, m->pages);
  uint64_t before = pc_monotonic_ns();
  struct pair p = start(&g, 2, RATE);
  for (uint64_t page = 3000; page < 3300; page++) /* all these are answered */
    check(load(m, page, 5) == word_of(m, page, 5), " ");
  check(get(p.from->pushing) == 2 && !drained(&p), "urgent pages waited for the push");
  /* Never more than the limit in all; as much as it where this machine was not too busy for it. */
  uint64_t pages = get(p.from->pushed_pages), at = pc_monotonic_ns();
  double all = 0, best = 0;
  for (unsigned i = 0; i < 6; i++) {
    uint64_t then = pages, since = at;
    wait_until(get(p.from->pushed_pages) >= then + 192);
    pages = get(p.from->pushed_pages), at = pc_monotonic_ns();
    double part = (double)((pages - then) * SMALL) / ((double)(at - since) / 1e9) / RATE;
    best = part > best ? part : best;
    all = (double)(pages * SMALL) / ((double)(at - before) / 1e9) / RATE;
  }
  printf("%.3f of the limit, at best %.3f\n", all, best);
  check(all < 1.1 && best > 0.9, "%.3f of the limit, at best %.3f", all, best);
  check(get(p.from->pushing) == 2, " ");
  uint64_t asked = pc_monotonic_ns();
  pc_source_free(p.source);
  p.source = NULL;
  check(pc_monotonic_ns() - asked < 1000000000, "stopping waited for the bandwidth");
  finish(&p);
  guest_free(&g);
}

/* With 1 MB/s a run of 64 KiB lasts 64 ms; none is ever taken and not yet sent. */
static void slow_push(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 256, SMALL, all_data);
  fill_source(m, 0, m->pages);
  struct pair p = start(&g, 2, 16 << 10); /* 64 s for all */
  for (uint64_t page = 0; page < m->pages; page++)
    check(load(m, page, 5) == word_of(m, page, 5), " ");
  wait_until(drained(&p));
  check_counts(&p, true);
  check(get(p.from->pushed_pages) < 128, "%llu", (unsigned long long)p.from->pushed_pages);
  finish(&p);
  guest_free(&g);
}

static const struct subtest SUBTESTS[] = {
    {"moved_1", moved_1},
    {"moved_4", moved_4},
    {"urgent_only", urgent_only},
    {"huge_tls", huge_tls},
    {"moved_tls", moved_tls},
    {"urgent_tls", urgent_tls},
    {"two_regions", two_regions},
    {"huge_pages", huge_pages},
    {"anonymous", anonymous},
    {"zeros", zeros},
    {"sparse", sparse},
    {"one_request", one_request},
    {"discard_file", discard_file},
    {"discard_anonymous", discard_anonymous},
    {"discard_race", discard_race},
    {"existing", existing},
    {"split_mapping", split_mapping},
    {"vmm_gone", vmm_gone},
    {"no_memory", no_memory},
    {"no_memory_for_zeros", no_memory_for_zeros},
    {"no_room_for_record", no_room_for_record},
    {"no_room_for_bitmaps", no_room_for_bitmaps},
    {"cut", cut},
    {"cut_tls", cut_tls},
    {"connect_again", connect_again},
    {"killed_file", killed_file},
    {"killed_anonymous", killed_anonymous},
    {"waiter_of_another", waiter_of_another},
    {"again_and_again", again_and_again},
    {"record_states", record_states},
    {"have_marks", have_marks},
    {"poison_file", poison_file},
    {"poison_anonymous", poison_anonymous},
    {"poison_huge", poison_huge},
    {"poison_late_fault", poison_late_fault},
    {"overflow_full", overflow_full},
    {"overflow_away", overflow_away},
    {"overflow_cut", overflow_cut},
    {"overflow_tls", overflow_tls},
    {"overflow_cut_tls", overflow_cut_tls},
    {"hostile_source", hostile_source},
    {"hostile_destination", hostile_destination},
    {"stop_anytime", stop_anytime},
    {"stop_tls", stop_tls},
    {"unregister_race", unregister_race},
    {"bandwidth", bandwidth},
    {"slow_push", slow_push},
};

int main(int argc, char **argv) {
  return subtest_main(argc, argv, SUBTESTS, sizeof SUBTESTS / sizeof *SUBTESTS);
}
