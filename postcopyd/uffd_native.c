/* SPDX-License-Identifier: Apache-2.0 */
/* The destination's engine: turns a fault into a page. The way of one page:
 *
 *   faults_run      reads fault messages from a userfaultfd                here, pc-faults
 *     fault           looks the page up (record_touch)                       here
 *       fault_here      places what came in a pass                           here
 *     ask             sends a request on the urgent connection               native/asking.c
 *   urgent_run      the source reads the page and sends it,                native/answer.c
 *   push_run        or has sent it on a push connection already            native/push.c
 *   receive_run     reads frames                                           native/receive.c
 *     receive_pages   claims their pages (record_claim)                      native/receive.c
 *       deliver         after passes writes them to the RAM file; places     here
 *         place_arrived   them (COPY, or CONTINUE of the file), which wakes  here
 *         confirm         and notes that (record_confirm)                    here
 *
 * native/record.h says what each page's byte in the record means and who may change it,
 * native/backing.h and native/place.h by which call a page gets to the guest, native/dest.h what
 * else the engine has.
 *
 * This file has the fault threads, one for each userfaultfd, and what threads of any kind do with
 * pages that they have claimed. A fault thread owns its messages and the list of faults to be tried
 * again; only pc_dest_free ends it, by pc_dest_stop. It waits for nothing but the next message. A
 * receiving thread may wait for memory, and then only its connection waits; so may the thread that
 * settles, and then only its run.
 *
 * No fault is dropped: one that could not be answered, for whatever reason, is made to come again.
 * A fault before the seal is not looked at: the seal wakes all waiting threads, which fault again.
 * A fault on a DONE page is answered with zeros: the page is a hole, or was placed and the guest
 * has discarded it since. If the message is older than the placing, the kernel says EEXIST, which
 * does no harm. In a file it is answered with what the file has, and with zeros only where that has
 * a hole. Only the record says what is right: the flags of a fault tell of the page cache.
 *
 * A LOST page is never answered with zeros: in shared memory the kernel lets ZEROPAGE and COPY
 * replace a memory error (seen on Linux 6.18). So the error is made before the record says DONE. A
 * fault thread whose message is older than the error makes it again, which wakes the thread that
 * waits.
 *
 * A page that this engine has just claimed may already be in guest memory. Unless an earlier engine
 * (BEGUN) or neighbours in a huge page of a file explain that, it is FOREIGN: the kernel has put
 * zeros into registered memory (khugepaged before Linux 6.4 does), and the guest may have read
 * other such pages. From then on nothing is placed, waiting threads go on waiting, and no
 * connection mends it. The record says so before anybody is told, so that a later engine is FOREIGN
 * too. An engine that is killed before it wrote FOREIGN leaves that page CLAIMED, which explains it
 * to the next engine. That one finds FOREIGN by other pages of the same huge page: they are more
 * than one engine has CLAIMED. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "dest.h"
#include "uffd.h"

/* Messages read at a time. */
enum { FAULTS_AT_ONCE = 64 };
/* How long until placing is tried again, when the destination has no memory or when it has
 * failed. */
enum { AGAIN_MS = 10 };
/* A fault thread with nothing to do goes round this often, to show that it can. */
enum { TURN_MS = 1000 };
/* Bytes around a fault that are placed with its page, if they came in a pass: as many as the kernel
 * maps of a file (fault_around_bytes). */
enum { AROUND_BYTES = 64 << 10 };

/* --- faults ----------------------------------------------------------------------------------- */

/* What a fault thread has to do after a look at a fault: nothing, as the fault is answered, or
 * another thread sees to it; ask for the page; or try again later. */
enum due { NOTHING_DUE, ASK, PUT_OFF };

/* Whatever has failed, the guest's thread is not left behind: it faults again a while later. */
static enum due due_after(struct pc_dest *d, struct region *r, uint64_t page, enum meaning is,
                          const struct placing *p) {
  if (is == PLACED)
    return NOTHING_DUE;
  if (!shall_try_again(d, is))
    place_failed(d, r, page, p->error);
  return PUT_OFF;
}

static enum due fault_done(struct pc_dest *d, struct region *r, uint64_t page, bool lost) {
  struct placing p;
  bool zeros = false;
  enum meaning is = lost ? BROKEN : backing_place_zeros(backing_of(d, r), r, page, &zeros, &p);
  count_add(d->stats.discarded_pages, zeros);
  if (is == BROKEN) {
    is = place(r, POISON, page, 1, NULL, &p);
    if (is == PLACED && record_lost_since(&d->record, r->first + page))
      count_add(d->stats.lost_pages, 1);
  }
  return due_after(d, r, page, is, &p);
}

/* Claims what is HERE and CACHED around a page that the caller has claimed, without a gap. Returns
 * the first page. */
static uint64_t claim_around(struct pc_dest *d, struct region *r, uint64_t page, uint64_t *count) {
  uint64_t most = r->is.page_size < AROUND_BYTES ? AROUND_BYTES >> r->page_shift : 1;
  uint64_t from = page, to = page + 1;
  int cached = CACHED;
  while (from % most && record_claim_here(&d->record, r->first + from - 1, &cached))
    from--;
  while (to % most && to < r->is.pages && record_claim_here(&d->record, r->first + to, &cached))
    to++;
  *count = to - from;
  return from;
}

/* The caller has claimed the page. */
static enum due fault_here(struct pc_dest *d, struct region *r, uint64_t page, bool cached) {
  struct placing p;
  bool zeros;
  uint64_t count = 1, first = cached ? claim_around(d, r, page, &count) : page;
  enum meaning is = cached ? backing_place(backing_of(d, r), r, first, count, NULL, &p)
                           : backing_place_zeros(backing_of(d, r), r, page, &zeros, &p);
  if (!explained(d, r, &p))
    return NOTHING_DUE; /* the thread goes on waiting */
  uint64_t done = p.done;
  confirm_here(d, r, first, done, cached);
  if (is == BROKEN && (is = poison_page(d, r, first + done, &p)) == PLACED)
    done++;
  give_back_here(d, r, first + done, count - done);
  if (page < first + done)
    return NOTHING_DUE;
  if (is == PLACED) { /* a page before it is a memory error */
    wake_page(r, page);
    return NOTHING_DUE;
  }
  return due_after(d, r, first + done, is, &p);
}

static enum due fault(struct pc_dest *d, struct region *r, uint64_t page, uint64_t now) {
  if (!record_sealed(&d->record) || atomic_load(&d->record.foreign))
    return NOTHING_DUE; /* pc_dest_seal wakes the thread; after FOREIGN it waits */
  enum touched is = record_touch(&d->record, r->first + page);
  switch (is) {
  case IS_NEW:
    asked_at(&d->asking, r->first + page, now);
    return ASK;
  case IS_BUSY:
    return NOTHING_DUE;
  case IS_ZEROS:
  case IS_HERE:
    return fault_here(d, r, page, is == IS_HERE);
  default:
    return fault_done(d, r, page, is == IS_LOST);
  }
}

/* Threads of the guest whose faults could not be answered, until they fault again. */
struct laters {
  struct wanted of[FAULTS_AT_ONCE];
  unsigned count; /* FAULTS_AT_ONCE + 1: those in `of` and others */
  uint64_t at_ns;
};

static void put_off(struct laters *l, struct region *r, uint64_t page, uint64_t now) {
  if (!l->count)
    l->at_ns = now + AGAIN_MS * 1000000u;
  if (l->count < FAULTS_AT_ONCE)
    l->of[l->count] = (struct wanted){r, page};
  l->count += l->count <= FAULTS_AT_ONCE;
}

static void wake_put_off(struct fault_thread *taker, struct laters *l) {
  struct pc_dest *d = taker->dest;
  for (unsigned i = 0; l->count <= FAULTS_AT_ONCE && i < l->count; i++)
    wake_page(l->of[i].region, l->of[i].page);
  for (struct region *r = d->regions; l->count > FAULTS_AT_ONCE && r < d->regions + d->registered;
       r++)
    if (r->is.uffd == taker->uffd)
      wake_all(r);
  l->count = 0;
}

static struct region *region_at(struct pc_dest *d, int uffd, uint64_t address) {
  for (unsigned i = 0; i < d->region_count; i++) {
    struct region *r = &d->regions[i];
    if (r->is.uffd == uffd && address - r->is.address < r->is.pages << r->page_shift)
      return r;
  }
  return NULL;
}

/* Answers messages; returns how many pages are to be asked for. */
static unsigned take(struct fault_thread *taker, const struct uffd_msg *messages, ssize_t count,
                     uint64_t now, struct wanted *wanted, struct laters *later) {
  struct pc_dest *d = taker->dest;
  unsigned asks = 0;
  for (ssize_t i = 0; i < count; i++) {
    uint64_t address = messages[i].arg.pagefault.address;
    struct region *r = region_at(d, taker->uffd, address);
    if (messages[i].event != UFFD_EVENT_PAGEFAULT || !r)
      continue;
    count_add(d->stats.faults, 1);
    uint64_t page = (address - r->is.address) >> r->page_shift;
    enum due due = fault(d, r, page, now);
    if (due == ASK)
      wanted[asks++] = (struct wanted){r, page};
    else if (due == PUT_OFF)
      put_off(later, r, page, now);
  }
  return asks;
}

void *faults_run(void *argument) {
  struct fault_thread *taker = argument;
  struct pc_dest *d = taker->dest;
  struct uffd_msg messages[FAULTS_AT_ONCE];
  struct wanted wanted[FAULTS_AT_ONCE];
  struct laters later = {.count = 0};
  while (!atomic_load(&d->stopping)) {
    int room = asking_waits(&d->asking);
    struct pollfd ready[3] = {{.fd = taker->uffd, .events = POLLIN},
                              {.fd = d->notice, .events = POLLIN},
                              {.fd = room, .events = POLLOUT}};
    poll(ready, 3, later.count ? AGAIN_MS : TURN_MS);
    eventfd_t noticed;
    if (ready[1].revents)
      eventfd_read(d->notice, &noticed);
    ssize_t n = ready[0].revents ? read(taker->uffd, messages, sizeof messages) : 0;
    if (n < 0 && errno != EAGAIN && errno != EINTR) {
      engine_fail(&d->stats, d->wake, PC_MEMORY, "reading faults from the userfaultfd: %s",
                  strerrordesc_np(errno));
      poll(NULL, 0, AGAIN_MS); /* tries again, as long as the engine lives */
    }
    uint64_t now = pc_monotonic_ns();
    count_set(d->stats.beat_ns, now);
    atomic_store_explicit(&taker->turned_ns, now, memory_order_relaxed);
    if (later.count && now >= later.at_ns)
      wake_put_off(taker, &later);
    unsigned asks = take(taker, messages, n / (ssize_t)sizeof *messages, now, wanted, &later);
    if (asks || room >= 0)
      ask(&d->asking, wanted, asks);
  }
  atomic_store(&taker->turned_ns, UINT64_MAX);
  eventfd_write(d->notice, 1); /* for the next fault thread */
  return NULL;
}

/* --- pages that have come ---------------------------------------------------------------------- */

bool shall_try_again(struct pc_dest *d, enum meaning is) {
  if (is != LATER)
    return is == AGAIN;
  count_add(d->stats.stalls, 1);
  engine_wake(d->wake); /* so that the session sees the stall */
  return true;
}

void wait_to_try(enum meaning is) {
  poll(NULL, 0, is == AGAIN ? 0 : AGAIN_MS);
}

bool patient(struct pc_dest *d, enum meaning is) {
  if (!shall_try_again(d, is) || shall_stop(d))
    return false;
  wait_to_try(is);
  return true;
}

/* Puts pages that came into the guest's file. They are right there before anybody can see them and
 * write to them. False: it failed, *failed is an errno. */
static bool put_in_file(struct pc_dest *d, struct region *r, const struct arrived *a, int *failed) {
  struct owed o = {0};
  do {
    *failed = a->from            ? -backing_put(backing_of(d, r), r, a->page, a->count, a->from)
              : a->were & CACHED ? -backing_clear(backing_of(d, r), r, a->page, a->count)
                                 : 0; /* a page that is not CACHED is zeros */
  } while (*failed && patient(d, *failed == ENOMEM || *failed == ENOSPC ? LATER : WRONG));
  if (*failed)
    return false;
  for (uint64_t i = 0; i < a->count; i++)
    record_put(&d->record, r->first + a->page + i, &o);
  count_owed(d, &o);
  return true;
}

/* Places as many of the pages as it can. False: one is FOREIGN. */
static bool place_arrived(struct pc_dest *d, struct region *r, const struct arrived *a,
                          uint64_t *placed, int *failed) {
  const struct backing *b = backing_of(d, r);
  enum meaning is = PLACED;
  while (*placed < a->count && (is == PLACED || patient(d, is))) {
    struct placing p;
    bool zeros;
    is = a->from ? backing_place(b, r, a->page + *placed, a->count - *placed,
                                 a->from + (*placed << r->page_shift), &p)
                 : backing_place_zeros(b, r, a->page, &zeros, &p);
    if (!explained(d, r, &p))
      return false;
    *placed += p.done;
    *failed = p.error;
  }
  return true;
}

/* Counts pages that have come, and how long threads waited for them. */
static void count_arrived(struct pc_dest *d, struct region *r, const struct arrived *a,
                          uint64_t count) {
  bool wanted = a->were & WANTED;
  for (uint64_t i = 0; wanted && i < count; i++)
    asked_answered(&d->asking, r->first + a->page + i);
  if (wanted || a->urgent)
    count_set(d->stats.last_urgent_ns, pc_monotonic_ns());
  if (!a->from)
    count_add(d->stats.zero_pages, count);
  else if (a->urgent)
    count_add(d->stats.urgent_pages, count);
  else
    count_add(d->stats.pushed_pages, count);
}

bool deliver(struct pc_dest *d, struct region *r, const struct arrived *a) {
  bool in_file = backing_of(d, r)->kind == IN_FILE;
  uint64_t placed = 0;
  int failed = 0;
  if (!in_file || put_in_file(d, r, a, &failed)) {
    if (in_file && !a->from && !(a->were & (WANTED | LOST))) /* nobody waits: zeros stay a hole */
      placed = a->count;
    if (!place_arrived(d, r, a, &placed, &failed))
      return false; /* the pages stay claimed: all is never here */
  }
  count_arrived(d, r, a, placed);
  confirm(d, r, a->page, placed, false);
  if (placed == a->count)
    return true;
  give_back(d, r, a->page + placed, a->count - placed);
  if (!shall_stop(d))
    place_failed(d, r, a->page + placed, failed);
  return false;
}

enum meaning poison_page(struct pc_dest *d, struct region *r, uint64_t page, struct placing *p) {
  enum meaning is = place(r, POISON, page, 1, NULL, p);
  if (is == PLACED) {
    count_add(d->stats.lost_pages, 1);
    confirm(d, r, page, 1, true);
  }
  return is;
}

/* --- what becomes of a claimed page ------------------------------------------------------------ */

void confirm(struct pc_dest *d, struct region *r, uint64_t page, uint64_t count, bool lost) {
  struct owed o = {0};
  for (uint64_t i = page; i < page + count; i++)
    if (record_confirm(&d->record, r->first + i, lost, &o))
      wake_page(r, i);
  count_owed(d, &o);
}

void confirm_here(struct pc_dest *d, struct region *r, uint64_t page, uint64_t count, bool cached) {
  if (!count)
    return;
  if (cached)
    count_add(d->stats.precopied_pages, count);
  else
    count_add(d->stats.zero_pages, count);
  confirm(d, r, page, count, false);
  if (cached)
    backing_drop(backing_of(d, r), r, page, count);
}

void give_back(struct pc_dest *d, struct region *r, uint64_t page, uint64_t count) {
  struct owed o = {0};
  for (uint64_t i = page; i < page + count; i++)
    record_give_back(&d->record, r->first + i, &o);
  count_owed(d, &o);
}

void give_back_here(struct pc_dest *d, struct region *r, uint64_t page, uint64_t count) {
  for (uint64_t i = page; i < page + count; i++)
    if (record_give_back_here(&d->record, r->first + i))
      wake_page(r, i);
}

void look_at_unpoisoned(struct pc_dest *d) {
  uint64_t lost = atomic_load(&d->record.unpoisoned);
  bool put = d->record.staged && !atomic_load(&d->settling);
  uint64_t here = put ? count_get(d->stats.present_pages) : count_get(d->stats.confirmed_pages);
  if (lost && here + lost == d->stats.total_pages)
    engine_fail(&d->stats, d->wake, PC_MEMORY, "%llu pages could not be read at the source, and "
                "this kernel cannot make memory errors of them (UFFDIO_POISON, Linux 6.6 can): "
                "a guest here waits for ever where it touches one", (unsigned long long)lost);
}

/* Two counts, one after the other, as they cannot be read together. */
void count_owed(struct pc_dest *d, const struct owed *o) {
  uint64_t total = d->stats.total_pages, present = d->record.staged ? o->present : 0;
  if (o->confirmed && __atomic_add_fetch(&d->stats.confirmed_pages, o->confirmed,
                                         __ATOMIC_ACQ_REL) == total)
    engine_wake(d->wake);
  if (present &&
      __atomic_add_fetch(&d->stats.present_pages, present, __ATOMIC_ACQ_REL) == total)
    engine_wake(d->wake);
  if (o->confirmed || present)
    look_at_unpoisoned(d);
}

/* --- what goes wrong --------------------------------------------------------------------------- */

void place_failed(struct pc_dest *d, struct region *r, uint64_t page, int error) {
  if (error == ESRCH)
    engine_fail(&d->stats, d->wake, PC_VMM_GONE, "the VMM has ended while its pages were placed");
  else
    engine_fail(&d->stats, d->wake, PC_MEMORY, "placing page %llu of region %d at %#llx: %s",
                (unsigned long long)page, (int)(r - d->regions),
                (unsigned long long)(r->is.address + (page << r->page_shift)),
                error == ENOENT ? "the VMM has no registered mapping there any more"
                                : strerrordesc_np(error));
}

void foreign_failed(struct pc_dest *d) {
  uint64_t slot = atomic_load(&d->record.foreign) - 1;
  struct region *r = d->regions + d->region_count - 1;
  while (slot < r->first)
    r--;
  engine_fail(&d->stats, d->wake, PC_FOREIGN,
              "page %llu of region %d was in guest memory before it came: the kernel has put zeros "
              "there (khugepaged before Linux 6.4 does), and the guest may have read others",
              (unsigned long long)(slot - r->first), (int)(r - d->regions));
}

bool explained(struct pc_dest *d, struct region *r, const struct placing *p) {
  count_add(d->stats.existing_pages, p->existing);
  if (!p->existing || backing_of(d, r)->kind == IN_FILE ||
      !record_foreign(&d->record, r->first + p->first_existing))
    return true;
  foreign_failed(d);
  return false;
}
