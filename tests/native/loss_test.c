/* SPDX-License-Identifier: Apache-2.0 */
/* What cannot be read at the source, what cannot be placed at the destination, and frames that are
 * much work. One page that is lost takes no other with it, and no guest thread is left behind. Runs
 * like engine_test.c. */
#include "engine_rig.h"

#include <sys/prctl.h>
#include <sys/wait.h>

enum { PAGES = 64, CUT = 40 };

/* A guest thread that may find a memory error. */
struct toucher {
  struct ram *ram;
  uint64_t page, value;
  bool error, done;
  pthread_t thread;
};

static void *touch_run(void *argument) {
  struct toucher *t = argument;
  uint64_t value = 0;
  t->error = !reads(t->ram, t->page, &value);
  t->value = value;
  __atomic_store_n(&t->done, true, __ATOMIC_RELEASE);
  return NULL;
}

static void touch(struct toucher *t, struct ram *m, uint64_t page) {
  *t = (struct toucher){.ram = m, .page = page};
  check(!pthread_create(&t->thread, NULL, touch_run, t), "thread");
}

static void must_find(struct toucher *t, bool error) {
  pthread_join(t->thread, NULL);
  check(t->error == error, "page %llu: %llx", (unsigned long long)t->page,
        (unsigned long long)t->value);
  check(error || t->value == word_of(t->ram, t->page, 7), "page %llu is %llx",
        (unsigned long long)t->page, (unsigned long long)t->value);
}

static bool is_error(struct ram *m, uint64_t page) {
  uint64_t value;
  return !reads(m, page, &value);
}

static struct ram *guest_of(struct guest *g, uint64_t pages, bool filled) {
  struct ram *m = add_ram(g, pages, SMALL, all_data);
  if (filled)
    fill_source(m, 0, pages);
  leave_faults_on(SIGBUS);
  return m;
}

/* The end of the RAM file is gone at the source. */
static struct ram *cut_short(struct guest *g) {
  struct ram *m = guest_of(g, PAGES, true);
  check(!ftruncate(m->source, CUT * SMALL), "%m");
  return m;
}

static void close_guest(struct pair *p, struct guest *g) {
  finish(p);
  guest_free(g);
}

static void serve(struct pair *p, bool push) {
  connect_engines(p, true);
  for (unsigned i = 0; push && i < 2; i++)
    connect_engines(p, false);
  check(!pc_source_serve(p->source), "%s", p->from->sentence);
  check(!push || !pc_source_push(p->source, 0), "%s", p->from->sentence);
}

static uint8_t state_of(struct pair *p, uint64_t page) {
  uint8_t state;
  check(pread(p->record, &state, 1, (off_t)page) == 1, "%m");
  return state;
}

/* --- at the source ---------------------------------------------------------------------------- */

/* The end of the RAM file is gone: those pages are lost, and told as lost; all others follow, asked
 * for or not, and who waits for a lost page gets an error. */
static void unreadable(bool secure) {
  needs_poison();
  with_tls = secure;
  struct guest g = {0};
  struct ram *m = cut_short(&g);
  struct pair p = new_dest(&g);
  new_source(&p);
  struct toucher good[4], bad[2];
  for (unsigned i = 0; i < 2; i++)
    touch(&bad[i], m, CUT + i);
  for (unsigned i = 0; i < 4; i++)
    touch(&good[i], m, 10 + 2 * i);
  wait_until(get(p.at->faults) == 6);
  serve(&p, false);
  for (unsigned i = 0; i < 4; i++)
    must_find(&good[i], false);
  for (unsigned i = 0; i < 2; i++)
    must_find(&bad[i], true);
  for (unsigned i = 0; i < 2; i++)
    connect_engines(&p, false);
  check(!pc_source_push(p.source, 0), " ");
  wait_until(drained(&p) && get(p.from->pushing) == 0);
  check(get(p.from->failure) == PC_OK, "%s", p.from->sentence);
  check(get(p.at->lost_pages) == PAGES - CUT && get(p.from->lost_pages) == PAGES - CUT, "%llu",
        (unsigned long long)p.at->lost_pages);
  check(get(p.at->urgent_pages) + get(p.at->pushed_pages) == CUT, " ");
  for (uint64_t page = 0; page < PAGES; page++) {
    check(page < CUT ? page_is(m, page, false) : is_error(m, page), "%llu",
          (unsigned long long)page);
    check(state_of(&p, page) == (page < CUT ? DONE : DONE | LOST), " ");
  }
  check(pc_dest_unregister(p.dest, 0) == -EBUSY, "the errors would become zeros");
  close_guest(&p, &g);
}

static void unreadable_file(void) { unreadable(false); }
static void unreadable_tls(void) { unreadable(true); }

/* A destination that cannot be told has all that can be read before the engine fails, however often
 * it asks again. */
static void unreadable_untold(void) {
  needs_poison();
  struct guest g = {0};
  struct ram *m = cut_short(&g);
  struct pair p = new_dest(&g);
  new_source(&p);
  pc_source_tell_losses(p.source, false);
  struct toucher good, bad;
  touch(&bad, m, CUT), touch(&good, m, 9);
  wait_until(get(p.at->faults) == 2);
  for (unsigned time = 0; time < 3; time++) {
    serve(&p, true);
    wait_until(get(p.from->failure) > PC_OK);
    check(get(p.from->failure) == PC_MEMORY && strstr(p.from->sentence, "cannot be told"), "%s",
          p.from->sentence);
    wait_until(get(p.at->confirmed_pages) == CUT);
    pc_source_disconnect(p.source), pc_dest_disconnect(p.dest);
    check(get(p.from->lost_pages) == 0 && get(p.from->failure) == PC_OK && !get(bad.done), " ");
  }
  must_find(&good, false);
  check(pc_dest_poison(p.dest) == PAGES - CUT, "%s", p.at->sentence); /* a person gives them up */
  must_find(&bad, true);
  close_guest(&p, &g);
}

/* How often reading anonymous memory fails before it goes; the page that cannot be read any more. */
static atomic_int unread;
static _Atomic off_t lost = -1;

ssize_t pread(int fd, void *to, size_t bytes, off_t at) {
  off_t to_lost = atomic_load(&lost) - at;
  if (to_lost > 0 && to_lost < (off_t)bytes)
    bytes = (size_t)to_lost;
  bool fails = bytes == SMALL && atomic_load(&unread) && atomic_fetch_sub(&unread, 1);
  if (fails || to_lost == 0) {
    errno = EIO;
    return -1;
  }
  return syscall(SYS_pread64, fd, to, bytes, at);
}

/* A process that plays the VMM, with anonymous memory. */
struct vmm {
  pid_t pid;
  uint8_t *at;
};

static struct vmm start_vmm(struct ram *m) {
  struct vmm v = {.at = map(m->pages * SMALL, -1)};
  for (uint64_t page = 0; page < m->pages; page++)
    fill_page(m, page, v.at + page * SMALL);
  v.pid = fork();
  if (!v.pid) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    pause();
    _exit(0);
  }
  return v;
}

static void end_vmm(struct vmm *v, struct ram *m) {
  kill(v->pid, SIGKILL), waitpid(v->pid, NULL, 0);
  munmap(v->at, m->pages * SMALL);
}

static void source_of(struct pair *p, struct vmm *v, struct ram *m) {
  char error[200];
  struct pc_region region = {.address = (uintptr_t)v->at, .pages = m->pages, .page_size = SMALL,
                             .fd = -1, .pid = v->pid};
  p->source = pc_source_new(&region, 1, p->wake, error);
  check(p->source, "%s", error);
  p->from = pc_source_stats(p->source);
  pc_source_tell_losses(p->source, true);
}

/* Anonymous memory says the same of a page that is lost and of one that cannot be had just now. */
static void unreadable_anonymous(void) {
  needs_poison();
  struct guest g = {0};
  struct ram *m = guest_of(&g, PAGES, false);
  to_anonymous(m);
  struct vmm v = start_vmm(m);
  struct pair p = new_dest(&g);
  source_of(&p, &v, m);
  struct toucher t[2];
  atomic_store(&unread, 5);
  serve(&p, false);
  touch(&t[0], m, 5);
  must_find(&t[0], false);
  check(atomic_load(&unread) == 0, " ");
  check(get(p.from->lost_pages) == 0 && get(p.at->lost_pages) == 0, " ");
  pc_source_disconnect(p.source), pc_dest_disconnect(p.dest);
  finish(&p);

  struct guest other = {0};
  m = guest_of(&other, PAGES, false);
  p = new_dest(&other);
  source_of(&p, &v, m);
  atomic_store(&lost, (off_t)(v.at + 5 * SMALL));
  touch(&t[0], m, 5), touch(&t[1], m, 6);
  wait_until(get(p.at->faults) == 2);
  serve(&p, true);
  must_find(&t[1], false);
  must_find(&t[0], true);
  wait_until(drained(&p));
  check(get(p.at->lost_pages) == 1 && get(p.from->failure) == PC_OK, "%s", p.from->sentence);
  for (uint64_t page = 0; page < PAGES; page++)
    check(page == 5 ? is_error(m, 5) : page_is(m, page, false), " ");
  end_vmm(&v, m);
  guest_free(&g);
  close_guest(&p, &other);
}

/* A pass leaves out what cannot be read; it stays to be sent, and is not called lost. */
static void unreadable_in_a_pass(void) {
  needs_poison();
  struct guest g = {0};
  struct ram *m = cut_short(&g);
  struct pair p = {.guest = &g, .staged = true, .wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  dest_on(&p, memfd_create("record", MFD_CLOEXEC), false);
  new_source(&p);
  connect_engines(&p, true), connect_engines(&p, false), connect_engines(&p, false);
  for (unsigned pass = 1; pass < 3; pass++) {
    check(!pc_source_scan(p.source) && !pc_source_copy(p.source, 0), " ");
    wait_until(get(p.from->pushing) == 0);
    check(get(p.from->failure) == PC_OK, "%s", p.from->sentence);
    check(get(p.from->passed_pages) == CUT && get(p.from->lost_pages) == 0, "sent again");
  }
  wait_until(get(p.at->passed_pages) == CUT);
  uint8_t bits[PAGES / 8];
  check(!pc_source_scan(p.source), " ");
  check(pc_source_stale(p.source, 0, 0, PAGES, bits) == PAGES - CUT, " ");
  check(!pc_dest_stale(p.dest, 0, 0, PAGES, bits) && !pc_dest_seal(p.dest), " ");
  check(!pc_source_serve(p.source) && !pc_source_push(p.source, 0), " ");
  check(!pc_dest_settle(p.dest), " ");
  wait_until(drained(&p));
  check(get(p.at->lost_pages) == PAGES - CUT && get(p.at->precopied_pages) == CUT, " ");
  for (uint64_t page = 0; page < PAGES; page++)
    check(page < CUT ? page_is(m, page, false) : is_error(m, page), " ");
  close_guest(&p, &g);
}

/* --- at the destination ----------------------------------------------------------------------- */

static struct pair by_hand_dest(struct guest *g, bool staged) {
  struct pair p = {.guest = g, .staged = staged, .wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  dest_on(&p, memfd_create("record", MFD_CLOEXEC), false);
  take_hold(&p);
  return p;
}

static void pass_and_seal(struct pair *p) {
  struct ram *m = p->guest->ram;
  for (uint64_t page = 0; page < m->pages; page++)
    send_page(p->push, m, page);
  wait_until(get(p->at->passed_pages) == m->pages);
  check(!pc_dest_seal(p->dest), " ");
}

/* What is here is not lost, whatever the source says later; and before the seal nothing is. */
static void lost_and_here(void) {
  needs_poison();
  struct guest g = {0};
  struct ram *m = guest_of(&g, PAGES, false);
  struct pair p = by_hand_dest(&g, true);
  send_page(p.push, m, 3);
  wait_until(get(p.at->passed_pages) == 1);
  send_frame(p.push, FRAME_LOST, 0, 4, 1, NULL, 0);
  wait_until(get(p.at->failure) > PC_OK);
  check(get(p.at->failure) == PC_BAD_FRAME, "%s", p.at->sentence);
  pc_dest_disconnect(p.dest);
  let_go(&p);
  check(!pc_dest_seal(p.dest), " ");
  take_hold(&p);
  send_page(p.push, m, 5);
  wait_until(get(p.at->confirmed_pages) == 1);
  send_frame(p.push, FRAME_LOST, 0, 0, 8, NULL, 0);
  wait_until(get(p.at->confirmed_pages) == 7);
  check(get(p.at->lost_pages) == 6 && get(p.at->duplicate_pages) == 2, " ");
  send_page(p.push, m, 4); /* after all: it has been said that it is lost */
  wait_until(get(p.at->duplicate_pages) == 3);
  for (uint64_t page = 0; page < 8; page++)
    check(page == 3 || page == 5 ? page_is(m, page, false) : is_error(m, page), " ");
  let_go(&p);
  close_guest(&p, &g);
}

/* A kernel without memory errors: who touches a lost page waits; all others are served, and the
 * failure comes when nothing else lacks. */
static void no_memory_errors(void) {
  needs_poison();
  struct guest g = {0};
  struct ram *m = cut_short(&g);
  refuse(UFFDIO_POISON, EINVAL, m->at, PAGES * SMALL);
  struct pair p = new_dest(&g);
  new_source(&p);
  struct toucher good, bad[2];
  touch(&bad[0], m, CUT), touch(&good, m, 9);
  for (unsigned time = 0; time < 3; time++) {
    serve(&p, time > 0);
    if (!time) {
      must_find(&good, false);
      touch(&bad[1], m, CUT);
      wait_until(get(p.at->faults) == 3 && refusal.times > 0);
      check(get(p.at->failure) == PC_OK, "%s", p.at->sentence);
    } else {
      wait_until(get(p.at->failure) > PC_OK);
      check(get(p.at->failure) == PC_MEMORY && strstr(p.at->sentence, "24 pages"), "%s",
            p.at->sentence);
    }
    pc_source_disconnect(p.source), pc_dest_disconnect(p.dest);
  }
  check(get(p.at->confirmed_pages) == CUT && get(p.at->lost_pages) == 0, " ");
  check(!get(bad[0].done) && !get(bad[1].done), "answered");
  check(state_of(&p, CUT) == LOST && state_of(&p, CUT - 1) == DONE, " ");
  check(pc_dest_poison(p.dest) == -EINVAL, "%s", p.at->sentence);
  pc_dest_disconnect(p.dest);

  /* One of them can be read after all. */
  int push = by_hand(&p, false);
  send_page(push, m, CUT);
  must_find(&bad[0], false), must_find(&bad[1], false);
  wait_until(get(p.at->confirmed_pages) == CUT + 1);
  close(push);

  /* And the next engine, which may be another version's or kernel's. */
  pc_dest_free(p.dest);
  refuse_no_more();
  dest_on(&p, p.record, true);
  pc_source_disconnect(p.source);
  serve(&p, true);
  wait_until(drained(&p));
  check(get(p.at->lost_pages) == PAGES - CUT - 1, " ");
  close_guest(&p, &g);
}

/* The same of a guest that runs only when all of it is here (precopy), whose pages wait in the
 * backing: the failure comes then, and says what lacks. */
static void no_memory_errors_staged(void) {
  needs_poison();
  struct guest g = {0};
  struct ram *m = guest_of(&g, PAGES, false);
  refuse(UFFDIO_POISON, EINVAL, m->at, PAGES * SMALL);
  struct pair p = by_hand_dest(&g, true);
  for (uint64_t page = 1; page < PAGES - 1; page++)
    send_page(p.push, m, page);
  wait_until(get(p.at->passed_pages) == PAGES - 2);
  check(!pc_dest_seal(p.dest), " ");
  send_frame(p.push, FRAME_LOST, 0, 0, 1, NULL, 0);
  wait_until(state_of(&p, 0) == LOST);
  check(get(p.at->failure) == PC_OK, "%s", p.at->sentence);
  send_page(p.push, m, PAGES - 1);
  wait_until(get(p.at->failure) > PC_OK);
  check(get(p.at->failure) == PC_MEMORY && strstr(p.at->sentence, "1 pages"), "%s",
        p.at->sentence);
  refuse_no_more();
  pc_dest_disconnect(p.dest);
  let_go(&p);
  finish(&p);
  guest_free(&g);
}

/* One that was lost comes after all, as zeros: who waits for it is told, though it stays a hole
 * where nobody waits. */
static void lost_and_zeros(void) {
  needs_poison();
  struct guest g = {0};
  struct ram *m = guest_of(&g, PAGES, false);
  refuse(UFFDIO_POISON, EINVAL, m->at, PAGES * SMALL);
  struct pair p = by_hand_dest(&g, true);
  check(!pc_dest_seal(p.dest), " ");
  send_frame(p.push, FRAME_LOST, 0, 4, 1, NULL, 0);
  wait_until(state_of(&p, 4) == LOST);
  struct toucher t;
  touch(&t, m, 4);
  wait_until(get(p.at->faults) == 1);
  send_frame(p.push, FRAME_ZERO, 0, 4, 1, NULL, 0);
  pthread_join(t.thread, NULL);
  check(!t.error && t.value == 0, " ");
  wait_until(state_of(&p, 4) == DONE); /* the toucher is woken first */
  refuse_no_more();
  let_go(&p);
  close_guest(&p, &g);
}

/* Placing fails for good, for as long as it does. Then all who wait are answered, though no
 * connection comes again for those whose pages were here. */
static void placing_fails(void) {
  enum { ZEROES = 80, ALL = 90 }; /* more than the engine puts off one by one */
  struct guest g = {0};
  struct ram *m = guest_of(&g, 128, false);
  struct pair p = by_hand_dest(&g, false);
  send_frame(p.push, FRAME_ZERO, 0, 0, ZEROES, NULL, 0);
  wait_until(get(p.at->confirmed_pages) == ZEROES);
  refuse(UFFDIO_ZEROPAGE, EPERM, m->at, 128 * SMALL);
  struct reader r[ALL];
  for (unsigned i = 0; i < ZEROES; i++)
    reader_start(&r[i], m, i);
  wait_until(refusal.times > ZEROES && get(p.at->failure) == PC_MEMORY);
  check(strstr(p.at->sentence, "placing page") != NULL, "%s", p.at->sentence);
  pc_dest_disconnect(p.dest);
  let_go(&p);
  refuse_no_more();
  for (unsigned i = 0; i < ZEROES; i++) {
    pthread_join(r[i].thread, NULL);
    check(r[i].value == 0, " ");
  }

  take_hold(&p);
  refuse(UFFDIO_COPY, EPERM, m->at, 128 * SMALL);
  for (unsigned i = ZEROES; i < ALL; i++) {
    reader_start(&r[i], m, i);
    check(read_request(p.urgent) == i, " ");
  }
  send_page(p.urgent, m, ZEROES);
  wait_until(get(p.at->failure) == PC_MEMORY);
  pc_dest_disconnect(p.dest);
  let_go(&p);
  refuse_no_more();
  p.urgent = by_hand(&p, true);
  for (unsigned i = ZEROES; i < ALL; i++)
    send_page(p.urgent, m, read_request(p.urgent));
  for (unsigned i = ZEROES; i < ALL; i++) {
    pthread_join(r[i].thread, NULL);
    check(r[i].value == word_of(m, i, 0), " ");
  }
  close(p.urgent);
  close_guest(&p, &g);
}

/* A page that is in the file is given to the guest though there is no memory for another one. */
static void full_tmpfs(void) {
  struct small_tmpfs s = small_tmpfs(PAGES);
  struct guest g = {0};
  struct ram *m = guest_of(&g, PAGES, false);
  ram_in(&s, m);
  struct pair p = by_hand_dest(&g, true);
  pass_and_seal(&p);
  for (uint64_t page = 0; page < PAGES; page++)
    check(page_is(m, page, false), " ");
  check(!madvise(m->at, PAGES * SMALL, MADV_DONTNEED), "%m"); /* as the kernel does, some day */
  for (uint64_t page = 0; page < PAGES; page++)
    check(page_is(m, page, false), " ");
  check(get(p.at->stalls) == 0, " ");
  /* A hole needs memory: it is waited for, and had. */
  check(!ftruncate(s.ballast, 128 * SMALL), "%m");
  discard(m, 7, 1);
  check(!fallocate(s.ballast, 0, 0, 65 * SMALL), "%m");
  struct reader r;
  reader_start(&r, m, 7);
  wait_until(get(p.at->stalls) > 2);
  check(!get(r.done) && get(p.at->failure) == PC_OK, " ");
  check(!ftruncate(s.ballast, 0), "%m");
  pthread_join(r.thread, NULL);
  check(r.value == 0, " ");
  wait_until(get(p.at->discarded_pages) == 1); /* the reader is woken first */
  let_go(&p);
  close_guest(&p, &g);
  free_tmpfs(&s);
}

/* Memory of the destination breaks: of a page that waits in the file, touched, placed with one that
 * is touched, or settled; and of one that the guest had already. */
static void broken_here(void) {
  needs_poison();
  struct guest g = {0};
  struct ram *m = guest_of(&g, PAGES, false);
  struct pair p = by_hand_dest(&g, true);
  pass_and_seal(&p);
  check(page_is(m, 0, false), " ");
  check(!madvise(m->at, SMALL, MADV_DONTNEED), "%m");
  refuse(UFFDIO_CONTINUE, EIO, m->at, SMALL);
  check(is_error(m, 0), "a page that it had");
  refuse(UFFDIO_CONTINUE, EIO, m->at + 20 * SMALL, SMALL);
  check(is_error(m, 20), "touched");
  refuse(UFFDIO_CONTINUE, EIO, m->at + 51 * SMALL, SMALL);
  check(page_is(m, 55, false), "behind a page that breaks");
  wait_until(get(p.at->lost_pages) == 3);
  refuse(UFFDIO_CONTINUE, EIO, m->at + 30 * SMALL, SMALL);
  check(page_is(m, 25, false), "before a page that breaks");
  wait_until(get(p.at->lost_pages) == 4);
  refuse(UFFDIO_CONTINUE, EHWPOISON, m->at + 40 * SMALL, SMALL);
  check(!pc_dest_settle(p.dest), " ");
  wait_until(drained(&p));
  check(refusal.times > 0 && get(p.at->lost_pages) == 5, " ");
  for (uint64_t page = 0; page < PAGES; page++) {
    bool breaks = page == 0 || page == 20 || page == 30 || page == 40 || page == 51;
    check(breaks ? is_error(m, page) : page_is(m, page, false), "page %llu",
          (unsigned long long)page);
  }
  check(pc_dest_unregister(p.dest, 0) == -EBUSY, " ");
  let_go(&p);
  close_guest(&p, &g);
}

/* The kernel has put something where a page was to come (it makes huge pages of registered memory,
 * some versions): nothing goes on, whoever waits, until somebody has decided. */
static void foreign(bool by_zeros) {
  struct guest g = {0};
  struct ram *m = guest_of(&g, PAGES, false);
  struct pair p = by_hand_dest(&g, false);
  send_page(p.push, m, 2);
  wait_until(get(p.at->confirmed_pages) == 1);
  struct reader r[2];
  reader_start(&r[0], m, 9);
  check(read_request(p.urgent) == 9, " ");
  if (by_zeros) {
    reader_start(&r[1], m, 5);
    check(read_request(p.urgent) == 5, " ");
  }
  check(pwrite(m->file, "\0", 1, 5 * SMALL) == 1, "%m");
  if (by_zeros)
    send_frame(p.push, FRAME_ZERO, 0, 5, 1, NULL, 0);
  else
    send_page(p.push, m, 5);
  wait_until(get(p.at->failure) > PC_OK);
  check(get(p.at->failure) == PC_FOREIGN && strstr(p.at->sentence, "page 5 of region 0"), "%s",
        p.at->sentence);
  send_page(p.urgent, m, 9);
  for (unsigned time = 0; time < 2; time++) {
    pc_dest_disconnect(p.dest);
    check(get(p.at->failure) == PC_FOREIGN, "forgotten");
    let_go(&p);
    take_hold(&p);
    for (uint64_t page = 0; page < PAGES; page++) /* as far as it is taken */
      send_frame(p.push, FRAME_ZERO, 0, page, 1, NULL, 0);
  }
  pc_dest_disconnect(p.dest);
  check(get(p.at->confirmed_pages) == 1 && !get(r[0].done), "it went on");
  check(pc_dest_poison(p.dest) == -EBUSY && pc_dest_unregister(p.dest, 0) == -EBUSY, " ");
  check(pc_dest_gone(p.dest, 0) == -EBUSY, "nor waits it for a page that stays claimed");
  let_go(&p);
  for (unsigned life = 0; life < 2; life++) { /* whoever is killed in whatever moment after it */
    pc_dest_free(p.dest);
    dest_on(&p, p.record, true);
    check(get(p.at->failure) == PC_FOREIGN && strstr(p.at->sentence, "page 5 of region 0"), "%s",
          p.at->sentence);
    check(get(p.at->confirmed_pages) == 1 && !get(r[0].done), "it went on");
  }
  finish(&p); /* gives the guest up */
  pthread_join(r[0].thread, NULL);
  if (by_zeros)
    pthread_join(r[1].thread, NULL);
  guest_free(&g);
}

static void foreign_page(void) { foreign(false); }
static void foreign_zeros(void) { foreign(true); }

/* An engine that goes on with the record of one that was killed finds what that one had in hand, and
 * takes nothing else for its doing: not beside it in a frame either, and not in a later life. */
static void foreign_later(void) {
  struct guest g = {0};
  struct ram *m = guest_of(&g, PAGES, false);
  struct pair p = {.guest = &g, .wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  int record = memfd_create("record", MFD_CLOEXEC);
  uint8_t states[(PAGES + 63) / 64 * 64] = {[3] = CLAIMED, [7] = CLAIMED | WANTED};
  uint8_t bytes[4 * SMALL], now;
  check(pwrite(record, states, sizeof states, 0) == sizeof states, "%m");
  for (uint64_t page = 3; page < 8; page += 4) {
    fill_page(m, page, bytes);
    check(pwrite(m->file, bytes, SMALL, (off_t)(page * SMALL)) == SMALL, "%m");
  }
  dest_on(&p, record, false);
  pc_dest_free(p.dest);
  dest_on(&p, record, true); /* the second in whose life they do not come */
  check(pread(record, &now, 1, 7) == 1 && now == BEGUN, "%x", now);
  take_hold(&p);
  for (uint64_t page = 2; page < 6; page++)
    fill_page(m, page, bytes + (page - 2) * SMALL);
  send_frame(p.push, FRAME_PAGES, 0, 2, 4, bytes, sizeof bytes);
  wait_until(get(p.at->confirmed_pages) == 4);
  check(get(p.at->failure) == PC_OK && page_is(m, 3, false), "%s", p.at->sentence);
  check(pwrite(m->file, "\0", 1, 8 * SMALL) == 1, "%m");
  for (uint64_t page = 6; page < 10; page++)
    fill_page(m, page, bytes + (page - 6) * SMALL);
  send_frame(p.push, FRAME_PAGES, 0, 6, 4, bytes, sizeof bytes);
  wait_until(get(p.at->failure) > PC_OK);
  check(get(p.at->failure) == PC_FOREIGN && strstr(p.at->sentence, "page 8 of region 0"), "%s",
        p.at->sentence);
  check(get(p.at->confirmed_pages) == 6, "6 and 7");
  let_go(&p);
  finish(&p);
  guest_free(&g);
}

/* Of anonymous memory also in what was staged: there are no neighbours. */
static void foreign_staged(void) {
  struct guest g = {0};
  struct ram *m = guest_of(&g, PAGES, false);
  to_anonymous(m);
  struct pair p = by_hand_dest(&g, true);
  pass_and_seal(&p);
  refuse(UFFDIO_COPY, EEXIST, m->at + 20 * SMALL, SMALL);
  struct reader r;
  reader_start(&r, m, 20);
  wait_until(get(p.at->failure) > PC_OK);
  check(get(p.at->failure) == PC_FOREIGN, "%s", p.at->sentence);
  check(!pc_dest_settle(p.dest), " ");
  pc_dest_disconnect(p.dest);
  check(get(p.at->confirmed_pages) == 0 && get(p.at->failure) == PC_FOREIGN, "it went on");
  let_go(&p);
  finish(&p);
  pthread_join(r.thread, NULL);
  guest_free(&g);
}

/* --- much work -------------------------------------------------------------------------------- */

enum { MANY = 4 << 20 };

/* Without anything at the source. */
static struct guest vast(void) {
  struct guest g = {.count = 1};
  g.ram[0] = (struct ram){.pages = MANY, .page_size = SMALL, .content = all_data, .file = -1,
                          .source = -1, .uffd = new_uffd()};
  g.ram[0].at = map((uint64_t)MANY * SMALL, -1);
  return g;
}

/* 24 bytes name all of a guest: who disconnects waits for a part of that only. */
static void flood(bool staged) {
  enum { TIMES = 2000 / RARELY };
  struct guest g = vast();
  struct pair p = by_hand_dest(&g, staged);
  for (unsigned i = 0; i < TIMES; i++)
    send_frame(p.push, FRAME_ZERO, 0, 0, MANY, NULL, 0);
  uint64_t *done = staged ? &p.at->passed_pages : &p.at->duplicate_pages;
  wait_until(get(*done) > 0);
  pc_dest_disconnect(p.dest);
  check(get(*done) < (TIMES - 1) * (uint64_t)MANY, "all of it");
  check(get(p.at->failure) == PC_OK, "%s", p.at->sentence);
  let_go(&p);
  if (!staged)
    check(get(p.at->confirmed_pages) == MANY, " ");
  check(!pc_dest_seal(p.dest), " ");
  finish(&p);
  munmap(g.ram->at, (uint64_t)MANY * SMALL), close(g.ram->uffd);
}

static void flood_zeros(void) { flood(false); }
static void flood_early(void) { flood(true); }

static void flood_lost(void) {
  needs_poison();
  struct guest g = vast();
  struct pair p = by_hand_dest(&g, false);
  send_frame(p.push, FRAME_LOST, 0, 0, MANY, NULL, 0);
  wait_until(get(p.at->lost_pages) > 0);
  pc_dest_disconnect(p.dest);
  check(get(p.at->lost_pages) < MANY && get(p.at->failure) == PC_OK, "%s", p.at->sentence);
  let_go(&p);
  finish(&p);
  munmap(g.ram->at, (uint64_t)MANY * SMALL), close(g.ram->uffd);
}

static enum content every_second(uint64_t page) {
  return page % 2 ? HOLE : DATA;
}

static void *disconnect_run(void *source) {
  pc_source_disconnect(source);
  return NULL;
}

/* To look for holes takes long where there are many: it goes in steps, and one that is broken off
 * tells of no holes that it has not looked at. */
static void scan_in_steps(void) {
  enum { HALVES = 30000 };
  struct guest g = {0};
  for (unsigned i = 0; i < 2; i++)
    fill_source(add_ram(&g, HALVES, SMALL, every_second), 0, HALVES);
  struct pair p = new_dest(&g);
  new_source(&p);
  unsigned steps = 1;
  while (pc_source_scan(p.source))
    steps++;
  check(steps > 5, "%u", steps);
  pc_source_free(p.source);
  for (unsigned time = 0; time < 6; time++) {
    new_source(&p);
    int fd[2];
    tcp_pair(fd);
    check(!pc_source_connect(p.source, fd[1], NULL, false), " ");
    check(!pc_source_push(p.source, 1), " ");
    usleep((useconds_t)(draw() % 20000));
    struct frame_reader reader;
    struct frame f;
    uint8_t *payload;
    pthread_t thread;
    check(!pthread_create(&thread, NULL, disconnect_run, p.source), " ");
    check(!frame_reader_init(&reader, plain(fd[0]), FRAME_MAX_PAYLOAD, 0), " ");
    while (frame_read(&reader, &f, &payload) == 1)
      for (uint64_t page = f.page; f.kind == FRAME_ZERO && page < f.page + f.count; page++)
        check(every_second(page) == HOLE, "page %llu of region %d was called a hole",
              (unsigned long long)page, f.region);
    pthread_join(thread, NULL);
    frame_reader_free(&reader), close(fd[0]);
    pc_source_free(p.source);
  }
  p.source = NULL;
  close_guest(&p, &g);
}

static const struct subtest SUBTESTS[] = {
    {"unreadable_file", unreadable_file},
    {"unreadable_tls", unreadable_tls},
    {"unreadable_untold", unreadable_untold},
    {"unreadable_anonymous", unreadable_anonymous},
    {"unreadable_in_a_pass", unreadable_in_a_pass},
    {"lost_and_here", lost_and_here},
    {"no_memory_errors", no_memory_errors},
    {"no_memory_errors_staged", no_memory_errors_staged},
    {"lost_and_zeros", lost_and_zeros},
    {"placing_fails", placing_fails},
    {"full_tmpfs", full_tmpfs},
    {"broken_here", broken_here},
    {"foreign_page", foreign_page},
    {"foreign_zeros", foreign_zeros},
    {"foreign_later", foreign_later},
    {"foreign_staged", foreign_staged},
    {"flood_zeros", flood_zeros},
    {"flood_early", flood_early},
    {"flood_lost", flood_lost},
    {"scan_in_steps", scan_in_steps},
};

int main(int argc, char **argv) {
  return subtest_main(argc, argv, SUBTESTS, sizeof SUBTESTS / sizeof *SUBTESTS);
}
