/* SPDX-License-Identifier: Apache-2.0 */
/* The destination's engine: a page's way from fault to placed.
 *
 *   faults_run    reads fault messages from a userfaultfd            one thread for each descriptor
 *     fault         looks the page up in the record; asks for it once
 *     ask           sends the request on the urgent connection
 *   (source)      answers on the urgent connection, or has it on a push connection already
 *   receive_run   reads frames                                       one thread for each connection
 *     receive       claims pages in the record
 *     place         UFFDIO_COPY, which wakes who waits (place.h)
 *     confirm       notes it in the record
 *
 * The record has one byte for each page, in a file that outlives the process. Its states:
 *
 *   0                nobody knows anything of the page yet
 *   WANTED           a fault waits and the page was asked for
 *   CLAIMED          one thread is busy with it; WANTED beside it: a fault came meanwhile
 *   DONE             confirmed: placed, or known to be zeros
 *   DONE and LOST    given up, and a memory error for whoever touches it
 *   LOST             the source cannot read it, and this kernel can make no memory errors: who
 *                    touches it waits, unless it comes after all
 *   FOREIGN          with CLAIMED: it was there, and nothing explains that, see below
 *   BEGUN            beside any but DONE: an engine that was killed had it CLAIMED
 *
 * Who may change it: a fault thread sets WANTED; a receiving thread claims (from 0, WANTED or LOST)
 * and only the claimer makes DONE of it; pc_dest_poison gives up what nobody can have claimed, as
 * there are no receiving threads then. DONE is never taken back. So a page is placed once, and a
 * duplicate finds DONE or CLAIMED and is dropped. A fault on a DONE page is answered with zeros:
 * the page is a hole, or was placed and the guest has discarded it since (or the message is older
 * than the placing: then the kernel says EEXIST and nobody is harmed).
 *
 * A staged engine gets most pages while the guest still runs at the source, into the stage
 * (stage.h), where nobody sees them: the RAM file, of which the VMM has nothing mapped yet, or a
 * memfd in place of anonymous memory. Two bits more:
 *
 *   HERE             the stage has what belongs there; with CLAIMED: and is being placed
 *   CACHED           the stage may have something else than zeros there, right or not
 *
 *   until pc_dest_seal                           from then on
 *     0 or CACHED --receive_early--> HERE          HERE --fault, or settle_run--> DONE
 *     HERE --receive_early--> HERE                 other --receive--> HERE and CLAIMED --> DONE
 *     HERE --pc_dest_stale--> CACHED
 *
 * Until the seal a page may come any number of times: its receiver claims it, which takes HERE,
 * writes the stage, and gives it back with HERE. Faults are not looked at: the seal wakes all who
 * wait, and they fault again. From the seal on HERE is right, and who claims such a page places it,
 * by UFFDIO_CONTINUE from the file or UFFDIO_COPY from the memfd. Only a page that is DONE, or HERE
 * and CLAIMED, can have been mapped, and to such nobody writes. The order is: write, HERE,
 * CONTINUE, DONE. HERE without CACHED is zeros.
 *
 * What is in the file is not always mapped: the kernel reclaims pages, splits huge ones, and gives
 * a page neighbours that are zeros (a huge page of tmpfs). So a fault on a DONE page of a file is
 * answered with what the file has (MAP), and with zeros only where it has a hole: discarded by the
 * guest. The record alone says what is right: the flags of a fault tell of the cache.
 *
 * A page that was there although this engine has just claimed it, where neither an engine before it
 * (BEGUN) nor such neighbours explain that, is FOREIGN: the kernel has put zeros into registered
 * memory (khugepaged before Linux 6.4 does), and the guest may have read others of them. Nothing is
 * placed from then on, who waits goes on waiting, and no connection mends it. The record says so
 * before anybody is told, so that an engine after this one is FOREIGN too. One that is killed before
 * even that has the page in hand, and the next engine sees it by the others: a huge page of zeros
 * has more of them than one engine has CLAIMED.
 *
 * A LOST page is never answered with zeros: for shared memory the kernel lets ZEROPAGE and COPY
 * replace a memory error (seen on Linux 6.18). So the error is there before the record says DONE,
 * and a fault thread whose message is older than the error makes it again, which wakes who waits.
 *
 * An engine that goes on with the record of one that was killed keeps DONE and LOST, for files HERE
 * and CACHED too, and forgets the rest: who waited faults again, and EEXIST tells of a page that
 * was placed and not yet confirmed, which was CLAIMED then and is BEGUN. A page CLAIMED without
 * HERE was never mapped from the file and may be written again. The byte behind the last page of a
 * staged engine's record is the seal: without it the guest has not run here, and HERE is forgotten
 * as well.
 *
 * Locks: `asking` guards the urgent connection's requests. Everything else is the record's bytes
 * and counters, changed by atomic operations. The fault threads alone send requests; `notice` tells
 * them of a new urgent connection, or to stop. They never wait for anything but the next message: a
 * receiving thread may, for memory, and then only its connection waits; so may settle_run's, and
 * then its run. No fault is dropped: one that could not be answered, for whatever reason, is made
 * to come again.
 *
 * Nothing in here ever closes a userfaultfd, or unregisters what a guest may have touched, on
 * failure: a guest whose engine has stopped waits, it does not read zeros. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"
#include "place.h"
#include "stage.h"
#include "uffd.h"

enum {
  WANTED = 1, CLAIMED = 2, DONE = 4, LOST = 8, HERE = 16, CACHED = 32, FOREIGN = 64, BEGUN = 128
};
/* The same bits in each byte of a word of the record, to look at eight pages at a time. */
#define EIGHT(state) (0x0101010101010101ull * (state))

/* Messages read at a time; requests that may wait for room in the urgent socket. A guest has as
 * many faults as threads (and KVM's asynchronous ones); what does not fit is found in the record
 * again. */
enum { FAULTS_AT_ONCE = 64, REQUESTS_WAITING = 4096 };
/* Frames read at a time from the urgent connection: 16 pages of 4 KiB. */
enum { URGENT_AHEAD = 16 * (4096 + FRAME_BYTES) };
/* When a page was asked for, kept for the latency statistics; a collision loses one sample. */
enum { ASKED_SLOTS = 4096 };
/* How long it takes until placing is tried again: when the destination has no memory, or when it has
 * failed. */
enum { AGAIN_MS = 10 };
/* Pages of one frame between two looks whether its connection is to end: 24 bytes can name all of a
 * guest. */
enum { STEP_PAGES = 1 << 16 };
/* A fault thread with nothing to do goes round as often as this, to show that it can. */
enum { TURN_MS = 1000 };
/* Bytes that settle_run places at a time; a fault on one of them waits for all. CONTINUE takes
 * 0.2 us a page of 4 KiB in runs from 64 KiB on, so 100 ms/GiB and 50 us for 512 KiB; page by page
 * it is 160 ms/GiB. Of hugetlbfs it takes 0.1 to 0.3 ms/GiB, 8 us for 64 MiB. A fault on a page
 * that is HERE takes one call of 0.6 us (0.5 us of hugetlbfs) beside what any fault takes. */
enum { SETTLE_BYTES = 512 << 10, SETTLE_HUGE_BYTES = 64 << 20 };

struct asked {
  _Atomic uint64_t page_and_one, at_ns;
};

struct fault_thread {
  struct pc_dest *dest;
  int uffd;
  bool running;
  pthread_t thread;
  _Atomic uint64_t turned_ns; /* when it last went round; never, once it has ended */
};

struct pc_dest {
  struct pc_stats stats;
  struct region regions[PC_MAX_REGIONS];
  unsigned region_count;
  uint64_t slots; /* bytes of the record: all pages, each region rounded up to 64 */
  _Atomic uint8_t *record;
  bool staged;
  struct stage stages[PC_MAX_REGIONS]; /* of the regions, if `staged` */
  unsigned stage_count;
  const uint8_t *zeros; /* one 2 MiB page of them */
  int wake, notice;
  atomic_bool stopping, ending; /* the engine; the connections */
  unsigned registered;          /* regions, from the first on */
  _Atomic uint64_t foreign;     /* slot + 1 of the first FOREIGN page; 0: there is none */
  _Atomic uint64_t unspoilt;    /* pages that are LOST and not DONE */
  bool gone[PC_MAX_REGIONS];    /* regions that the VMM has unmapped; set and read by the session */

  struct fault_thread takers[PC_MAX_REGIONS];
  unsigned taker_count;
  pthread_t settler;
  bool settler_started;
  atomic_bool settling;

  struct connection connections[PC_MAX_CONNECTIONS];

  pthread_mutex_t asking;
  struct stream urgent; /* none while there is none; owned by its struct connection */
  uint8_t waiting[REQUESTS_WAITING * FRAME_BYTES];
  size_t waiting_from, waiting_to;
  uint64_t look_again; /* slot from which on WANTED pages may not be in `waiting`; slots: none */
  struct asked asked[ASKED_SLOTS];
};

/* Whether faults are to be answered. */
static bool sealed(struct pc_dest *d) {
  return !d->staged || atomic_load(&d->record[d->slots]);
}

static struct stage *stage_of(struct pc_dest *d, struct region *r) {
  return &d->stages[r - d->regions];
}

/* Whether this region's pages come to the guest by way of its file. */
static bool filed(struct pc_dest *d, struct region *r) {
  return d->staged && !stage_of(d, r)->own;
}

/* --- asking ----------------------------------------------------------------------------------- */

static struct asked *asked_slot(struct pc_dest *d, uint64_t slot) {
  return &d->asked[(slot * 0x9e3779b97f4a7c15ull >> 32) % ASKED_SLOTS];
}

/* With `asking` held: puts a request where ask_flush sends it from. False when there is no room:
 * the record has the page as WANTED, and ask_flush looks again. */
static bool ask_page(struct pc_dest *d, const struct region *r, uint64_t page) {
  if (d->waiting_to + FRAME_BYTES > sizeof d->waiting)
    return false;
  struct frame f = {.kind = FRAME_REQUEST, .region = (uint16_t)(r - d->regions), .page = page,
                    .count = 1};
  frame_encode(d->waiting + d->waiting_to, &f);
  d->waiting_to += FRAME_BYTES;
  count_add(d->stats.requests, 1);
  count_add(d->stats.unanswered, 1);
  return true;
}

/* With `asking` held: puts requests for the WANTED pages from `look_again` on, as many as fit. */
static void ask_wanted(struct pc_dest *d) {
  for (unsigned i = 0; i < d->region_count; i++) {
    struct region *r = &d->regions[i];
    uint64_t page = d->look_again > r->first ? d->look_again - r->first : 0;
    while (page < r->is.pages) {
      _Atomic uint8_t *state = &d->record[r->first + page];
      if (page % 8 == 0 &&
          !(__atomic_load_n((uint64_t *)state, __ATOMIC_RELAXED) & EIGHT(WANTED))) {
        page += 8;
        continue;
      }
      if ((atomic_load_explicit(state, memory_order_relaxed) & ~(CACHED | BEGUN)) == WANTED &&
          !ask_page(d, r, page)) {
        d->look_again = r->first + page;
        return;
      }
      page++;
    }
  }
  d->look_again = d->slots;
}

/* With `asking` held: sends what waits, as far as the socket takes it without waiting. */
static void ask_flush(struct pc_dest *d) {
  while (d->urgent.fd >= 0) {
    while (d->waiting_from < d->waiting_to) {
      ssize_t n = write_now(d->urgent, d->waiting + d->waiting_from,
                            d->waiting_to - d->waiting_from);
      if (n < 0) {
        shutdown(d->urgent.fd, SHUT_RDWR); /* the receiving thread sees it and reports */
        d->urgent.fd = -1;
      }
      if (n <= 0)
        return;
      d->waiting_from += (size_t)n;
    }
    d->waiting_from = d->waiting_to = 0;
    if (d->look_again == d->slots)
      return;
    ask_wanted(d);
  }
}

/* --- placing ---------------------------------------------------------------------------------- */

/* Who waits faults again. */
static void wake_all(const struct region *r) {
  struct uffdio_range range = {r->is.address, r->is.pages << r->page_shift};
  ioctl(r->is.uffd, UFFDIO_WAKE, &range);
}

static bool called_off(struct pc_dest *d) {
  return atomic_load(&d->stopping) || atomic_load(&d->ending) || atomic_load(&d->foreign);
}

/* Whether placing may go well a while later: there is no memory now (the guest waits rather than
 * lose a page), or the VMM is changing its mappings. */
static bool shall_try_again(struct pc_dest *d, enum meaning is) {
  if (is != LATER)
    return is == AGAIN;
  count_add(d->stats.stalls, 1);
  engine_wake(d->wake); /* so that somebody is told */
  return true;
}

static void wait_to_try(enum meaning is) {
  poll(NULL, 0, is == AGAIN ? 0 : AGAIN_MS);
}

static void place_failed(struct pc_dest *d, struct region *r, uint64_t page, int error) {
  if (error == ESRCH)
    engine_fail(&d->stats, d->wake, PC_VMM_GONE, "the VMM has ended while its pages were placed");
  else
    engine_fail(&d->stats, d->wake, PC_MEMORY, "placing page %llu of region %d at %#llx: %s",
                (unsigned long long)page, (int)(r - d->regions),
                (unsigned long long)(r->is.address + (page << r->page_shift)),
                error == ENOENT ? "the VMM has no registered mapping there any more"
                                : strerrordesc_np(error));
}

static void foreign_failed(struct pc_dest *d) {
  uint64_t slot = atomic_load(&d->foreign) - 1;
  struct region *r = d->regions + d->region_count - 1;
  while (slot < r->first)
    r--;
  engine_fail(&d->stats, d->wake, PC_FOREIGN,
              "page %llu of region %d was in guest memory before it came: the kernel has put zeros "
              "there (khugepaged before Linux 6.4 does), and the guest may have read others",
              (unsigned long long)(slot - r->first), (int)(r - d->regions));
}

/* Of pages that this thread had claimed, all of them BEGUN or none, some were there. False: nothing
 * explains them. */
static bool explained(struct pc_dest *d, struct region *r, const struct placing *p) {
  uint64_t none = 0;
  count_add(d->stats.existing_pages, p->existing);
  if (!p->existing || filed(d, r))
    return true;
  _Atomic uint8_t *first = &d->record[r->first + p->first_existing];
  if (atomic_load(first) & BEGUN)
    return true;
  atomic_fetch_or(first, FOREIGN);
  atomic_compare_exchange_strong(&d->foreign, &none, r->first + p->first_existing + 1);
  foreign_failed(d);
  return false;
}

/* All is here but for LOST pages of which no memory errors can be made: this is as far as it goes.
 * Until the stage is placed what is in it counts: a guest of a precopy runs only when it is whole. */
static void look_at_unspoilt(struct pc_dest *d) {
  uint64_t lost = atomic_load(&d->unspoilt);
  bool by_stage = d->staged && !atomic_load(&d->settling);
  uint64_t here =
      by_stage ? count_get(d->stats.present_pages) : count_get(d->stats.confirmed_pages);
  if (lost && here + lost == d->stats.total_pages)
    engine_fail(&d->stats, d->wake, PC_MEMORY, "%llu pages could not be read at the source, and "
                "this kernel cannot make memory errors of them (UFFDIO_POISON, Linux 6.6 can): "
                "a guest here waits for ever where it touches one", (unsigned long long)lost);
}

/* So many pages more are HERE or DONE. A word of its own, as no two can be read as one. */
static void present(struct pc_dest *d, uint64_t count) {
  if (!d->staged || !count)
    return;
  if (__atomic_add_fetch(&d->stats.present_pages, count, __ATOMIC_ACQ_REL) == d->stats.total_pages)
    engine_wake(d->wake);
  look_at_unspoilt(d);
}

/* So many pages more are DONE, of which `news` were not HERE. */
static void confirmed(struct pc_dest *d, uint64_t count, uint64_t news) {
  uint64_t all = __atomic_add_fetch(&d->stats.confirmed_pages, count, __ATOMIC_ACQ_REL);
  if (count && all == d->stats.total_pages)
    engine_wake(d->wake);
  present(d, news);
  if (count)
    look_at_unspoilt(d);
}

/* Notes pages that this thread has claimed and placed (DONE), or poisoned (DONE | LOST). A fault
 * that came meanwhile was told to wait for this; wake it, because the page may be discarded again
 * already. */
static void confirm(struct pc_dest *d, struct region *r, uint64_t page, uint64_t count,
                    uint8_t state) {
  uint64_t news = 0;
  for (uint64_t i = page; i < page + count; i++) {
    uint8_t was = atomic_exchange(&d->record[r->first + i], state);
    news += !(was & HERE);
    if (was & WANTED)
      wake_page(r, i);
  }
  confirmed(d, count, news);
}

/* Gives claimed pages back unplaced; whoever waits for them is asked for again. */
static void unclaim(struct pc_dest *d, struct region *r, uint64_t page, uint64_t count) {
  uint64_t here = 0;
  for (uint64_t i = page; i < page + count; i++) {
    uint8_t is = atomic_load(&d->record[r->first + i]); /* others may add WANTED to it, no more */
    here += (is & HERE) != 0;
    atomic_store(&d->record[r->first + i], WANTED | (is & (CACHED | BEGUN)));
  }
  present(d, -here);
}

/* False when somebody has the page already. `as`: CLAIMED, with CACHED where the file is going to
 * be written. */
static bool claim(struct pc_dest *d, struct region *r, uint64_t page, uint8_t as, uint8_t *was) {
  uint8_t state = atomic_load_explicit(&d->record[r->first + page], memory_order_relaxed);
  do {
    if (state & (CLAIMED | DONE | HERE))
      return false;
  } while (!atomic_compare_exchange_weak(&d->record[r->first + page], &state,
                                         as | (state & (CACHED | BEGUN))));
  if (state & LOST)
    atomic_fetch_sub(&d->unspoilt, 1);
  *was = state;
  return true;
}

/* Makes memory errors of one page that this thread has claimed, and notes it. One that was there may
 * be what a killed engine has left, so it is LOST too. */
static enum meaning lose(struct pc_dest *d, struct region *r, uint64_t page, struct placing *p) {
  enum meaning is = place(r, SPOIL, page, 1, NULL, p);
  if (is == PLACED) {
    count_add(d->stats.lost_pages, 1);
    confirm(d, r, page, 1, DONE | LOST);
  }
  return is;
}

/* --- from the stage --------------------------------------------------------------------------- */

/* Places claimed pages that are HERE and CACHED. */
static enum meaning place_staged(struct pc_dest *d, struct region *r, uint64_t page,
                                 uint64_t count, struct placing *p) {
  if (filed(d, r))
    return place(r, MAP, page, count, NULL, p);
  return place(r, COPY, page, count, stage_of(d, r)->at + (page << r->page_shift), p);
}

/* Notes HERE pages that this thread has claimed and placed, or that are zeros and stay holes. */
static void confirm_here(struct pc_dest *d, struct region *r, uint64_t page, uint64_t count,
                         bool cached) {
  if (!count)
    return;
  if (cached)
    count_add(d->stats.precopied_pages, count);
  else
    count_add(d->stats.zero_pages, count);
  confirm(d, r, page, count, DONE);
  if (cached && !filed(d, r)) /* its memory, now that it is twice there; none reads it any more */
    stage_clear(stage_of(d, r), page << r->page_shift, count << r->page_shift, d->zeros);
}

/* Gives HERE pages back as they were; whoever came to wait for them faults again. */
static void unclaim_here(struct pc_dest *d, struct region *r, uint64_t page, uint64_t count) {
  for (uint64_t i = page; i < page + count; i++)
    if (atomic_fetch_and(&d->record[r->first + i], (uint8_t)~(CLAIMED | WANTED)) & WANTED)
      wake_page(r, i);
}

/* Claims a HERE page, of the same kind as the pages before it. */
static bool claim_here(_Atomic uint8_t *state, int *cached) {
  uint8_t is = atomic_load_explicit(state, memory_order_relaxed);
  do {
    if ((is & (HERE | CLAIMED)) != HERE || (*cached >= 0 && *cached != (is & CACHED)))
      return false;
  } while (!atomic_compare_exchange_weak(state, &is, is | CLAIMED));
  *cached = is & CACHED;
  return true;
}

/* Places a run that settle_run has claimed, as far as it goes; `*placed` of it are dealt with. False:
 * it did not go. */
static bool settle(struct pc_dest *d, struct region *r, uint64_t page, uint64_t run, bool cached,
                   uint64_t *placed) {
  *placed = cached ? 0 : run; /* zeros stay holes */
  if (!cached)
    confirm_here(d, r, page, run, false);
  while (*placed < run && !atomic_load(&d->stopping)) {
    struct placing p;
    enum meaning is = place_staged(d, r, page + *placed, run - *placed, &p);
    if (!explained(d, r, &p))
      return false;
    confirm_here(d, r, page + *placed, p.done, true);
    *placed += p.done;
    if (is == BROKEN && (is = lose(d, r, page + *placed, &p)) == PLACED) {
      *placed += 1;
    } else if (is != PLACED && !shall_try_again(d, is)) {
      place_failed(d, r, page + *placed, p.error);
      return false;
    } else if (is != PLACED) {
      wait_to_try(is);
    }
  }
  return true;
}

/* Places what is HERE and no fault has asked for, from the first page to the last. */
static void *settle_run(void *argument) {
  struct pc_dest *d = argument;
  bool passed_by; /* a page that a fault thread has in hand, and may have to give back unplaced */
  bool good = true;
  do {
    passed_by = false;
    for (struct region *r = d->regions; good && r < d->regions + d->region_count; r++) {
      uint64_t most = (stage_of(d, r)->huge ? SETTLE_HUGE_BYTES : SETTLE_BYTES) >> r->page_shift;
      most = most ? most : 1; /* huge pages of anonymous memory */
      for (uint64_t page = 0, run, placed;
           good && page < r->is.pages && !atomic_load(&d->stopping); page += run ? run : 1) {
        _Atomic uint8_t *state = &d->record[r->first + page];
        int cached = -1;
        run = 0;
        if (page % 8 == 0 &&
            !(__atomic_load_n((uint64_t *)state, __ATOMIC_RELAXED) & EIGHT(HERE))) {
          run = 8;
          continue;
        }
        while (run < most && page + run < r->is.pages && claim_here(&state[run], &cached))
          run++;
        passed_by |= !run && (atomic_load(state) & (HERE | CLAIMED)) == (HERE | CLAIMED);
        good = settle(d, r, page, run, cached > 0, &placed);
        if (!atomic_load(&d->foreign))
          unclaim_here(d, r, page + placed, run - placed);
        count_set(d->stats.beat_ns, pc_monotonic_ns());
      }
    }
    if (passed_by)
      poll(NULL, 0, 1);
  } while (good && passed_by && !atomic_load(&d->stopping));
  atomic_store(&d->settling, false);
  return NULL;
}

/* --- receiving -------------------------------------------------------------------------------- */

static void note_latency(struct pc_dest *d, struct region *r, uint64_t page) {
  struct asked *asked = asked_slot(d, r->first + page);
  if (atomic_load_explicit(&asked->page_and_one, memory_order_acquire) != r->first + page + 1)
    return;
  uint64_t at = atomic_load(&asked->at_ns), now = pc_monotonic_ns();
  if (at < now) /* or another page has just taken the slot */
    engine_latency(&d->stats, now - at);
  atomic_store_explicit(&asked->page_and_one, 0, memory_order_relaxed);
}

/* What of a frame this thread has claimed, to the file (zeros: NULL, only over something else).
 * Right there from now on, before anybody may see it and write to it. */
static int put_in_file(struct pc_dest *d, struct region *r, uint64_t page, uint64_t count,
                       const uint8_t *payload, bool cached) {
  uint64_t to = page << r->page_shift, bytes = count << r->page_shift;
  int failed = 0;
  if (payload)
    failed = stage_write(stage_of(d, r), to, payload, bytes);
  else if (cached)
    failed = stage_clear(stage_of(d, r), to, bytes, d->zeros);
  if (failed)
    return failed;
  for (uint64_t i = page; i < page + count; i++)
    atomic_fetch_or(&d->record[r->first + i], HERE);
  present(d, count);
  return 0;
}

/* Counts pages that have come, for whom. */
static void note_received(struct pc_dest *d, struct region *r, uint64_t page, uint64_t count,
                          bool wanted, bool urgent, bool data) {
  for (uint64_t i = page; wanted && i < page + count; i++)
    note_latency(d, r, i);
  if (wanted || urgent)
    count_set(d->stats.last_urgent_ns, pc_monotonic_ns());
  if (!data)
    count_add(d->stats.zero_pages, count);
  else if (urgent)
    count_add(d->stats.urgent_pages, count);
  else
    count_add(d->stats.pushed_pages, count);
}

/* Places the pages of one frame that nobody has yet, in runs as long as they go; zeros (payload
 * NULL) one by one. */
static bool receive_pages(struct pc_dest *d, struct region *r, const struct frame *f,
                          const uint8_t *payload, bool urgent) {
  bool by_file = filed(d, r);
  for (uint64_t i = 0; i < f->count;) {
    uint64_t first = f->page + i, run = 0, placed = 0;
    _Atomic uint8_t *state = &d->record[r->first + first];
    uint8_t was, any = 0;
    enum meaning is = AGAIN;
    struct placing p = {.done = 0};
    while (i + run < f->count && (payload || run == 0) &&
           (run == 0 || !((state[run] ^ state[0]) & BEGUN)) && /* see `explained` */
           claim(d, r, first + run, by_file && payload ? CLAIMED | CACHED : CLAIMED, &was))
      run++, any |= was;
    if (run == 0) {
      count_add(d->stats.duplicate_pages, 1);
      i++;
      continue;
    }
    const uint8_t *from = payload ? payload + (i << r->page_shift) : NULL;
    bool to_put = by_file;
    if (by_file && !payload && !(any & (WANTED | LOST))) /* none waits: zeros need no page */
      placed = run;
    while (to_put || placed < run) {
      int failed = to_put ? put_in_file(d, r, first, run, from, any & CACHED) : 0;
      bool zeros;
      p = (struct placing){.error = -failed};
      is = failed == -ENOMEM || failed == -ENOSPC ? LATER : failed ? WRONG : PLACED;
      to_put = to_put && failed;
      if (!failed && placed < run)
        is = !payload  ? place_zeros(r, by_file, first, d->zeros, &zeros, &p)
             : by_file ? place(r, MAP, first + placed, run - placed, NULL, &p)
                       : place(r, COPY, first + placed, run - placed,
                               from + (placed << r->page_shift), &p);
      if (!explained(d, r, &p))
        return false; /* what is claimed stays so: never all is here */
      placed += p.done;
      if (is != PLACED && (!shall_try_again(d, is) || called_off(d)))
        break;
      if (is != PLACED)
        wait_to_try(is);
    }
    placed = to_put ? 0 : placed;
    note_received(d, r, first, placed, any & WANTED, urgent, payload);
    confirm(d, r, first, placed, DONE);
    if (to_put || placed < run) {
      unclaim(d, r, first + placed, run - placed);
      if (!called_off(d))
        place_failed(d, r, first + placed, p.error);
      return false;
    }
    i += run;
  }
  return true;
}

/* The source cannot read these pages: who touches one gets a memory error. What is here is not
 * lost, so a page that came before it could not be read any more stays. */
static bool receive_lost(struct pc_dest *d, struct region *r, const struct frame *f, bool urgent) {
  for (uint64_t page = f->page; page < f->page + f->count; page++) {
    struct placing p;
    enum meaning is;
    uint8_t was;
    if (!claim(d, r, page, CLAIMED, &was)) {
      count_add(d->stats.duplicate_pages, 1);
      continue;
    }
    while ((is = lose(d, r, page, &p)) == AGAIN || is == LATER) {
      if (!shall_try_again(d, is) || called_off(d))
        break;
      wait_to_try(is);
    }
    if (is == PLACED) {
      if (was & WANTED)
        note_latency(d, r, page);
      if (was & WANTED || urgent)
        count_set(d->stats.last_urgent_ns, pc_monotonic_ns());
    } else if (is == NEVER) {
      atomic_fetch_add(&d->unspoilt, 1);
      atomic_store(&d->record[r->first + page], LOST | (was & (CACHED | BEGUN)));
      look_at_unspoilt(d);
    } else {
      unclaim(d, r, page, 1);
      if (!called_off(d))
        place_failed(d, r, page, p.error);
      return false;
    }
  }
  return true;
}

/* Pages of zeros are noted, not placed: the guest stays as sparse as it was. Only a page that a
 * fault waits for is placed. Eight pages at a time where nobody knows anything of them yet. */
static bool receive_zeros(struct pc_dest *d, struct region *r, const struct frame *f, bool urgent) {
  uint64_t noted = 0, twice = 0;
  bool good = true;
  for (uint64_t page = f->page, end = f->page + f->count; page < end && good;) {
    _Atomic uint8_t *state = &d->record[r->first + page];
    uint64_t eight = 0;
    if (page % 8 == 0 && end - page >= 8 &&
        (__atomic_compare_exchange_n((uint64_t *)state, &eight, EIGHT(DONE), false,
                                     __ATOMIC_SEQ_CST, __ATOMIC_RELAXED) ||
         eight == EIGHT(DONE))) {
      *(eight ? &twice : &noted) += 8, page += 8;
      continue;
    }
    uint8_t none = 0;
    if (atomic_compare_exchange_strong(state, &none, DONE)) {
      noted++, page++;
      continue;
    }
    struct frame one = {.kind = FRAME_ZERO, .region = f->region, .page = page, .count = 1};
    good = receive_pages(d, r, &one, NULL, urgent);
    page++;
  }
  count_add(d->stats.zero_pages, noted);
  count_add(d->stats.duplicate_pages, twice);
  confirmed(d, noted, noted);
  return good;
}

/* Before the seal: claims a page, whose copy here is old then. Zeros are claimed in runs of those
 * that are CACHED, and of those that are not. */
static bool claim_early(_Atomic uint8_t *state, bool zeros, int *cached, uint64_t *here) {
  uint8_t is = atomic_load_explicit(state, memory_order_relaxed);
  do {
    if (is & (CLAIMED | DONE) || (zeros && *cached >= 0 && *cached != (is & CACHED)))
      return false;
  } while (!atomic_compare_exchange_weak(state, &is,
                                         (is & ~HERE) | CLAIMED | (zeros ? 0 : CACHED)));
  *cached = is & CACHED;
  *here += (is & HERE) != 0;
  return true;
}

/* Before the seal: a frame goes to the stage in place of what is there. */
static bool receive_early(struct pc_dest *d, struct region *r, const struct frame *f,
                          const uint8_t *payload) {
  for (uint64_t page = f->page, end = f->page + f->count, run; page < end; page += run) {
    _Atomic uint8_t *state = &d->record[r->first + page];
    uint64_t eight = 0, here = 0;
    if (!payload && page % 8 == 0 && end - page >= 8 &&
        (__atomic_compare_exchange_n((uint64_t *)state, &eight, EIGHT(HERE), false,
                                     __ATOMIC_SEQ_CST, __ATOMIC_RELAXED) ||
         eight == EIGHT(HERE))) {
      run = 8;
      present(d, eight ? 0 : run);
      continue;
    }
    int cached = -1, failed = 0;
    for (run = 0; page + run < end && claim_early(&state[run], !payload, &cached, &here);)
      run++;
    if (run == 0) { /* another connection has the page: what came last is to stay */
      if (atomic_load(state) & DONE) /* no pass sends after the seal */
        run = 1;
      else
        sched_yield();
      continue;
    }
    present(d, -here);
    uint64_t to = page << r->page_shift, bytes = run << r->page_shift;
    uint64_t from = (page - f->page) << r->page_shift;
    if (payload)
      failed = stage_write(stage_of(d, r), to, payload + from, bytes);
    else if (cached)
      failed = stage_clear(stage_of(d, r), to, bytes, d->zeros);
    uint8_t change = failed ? CLAIMED : CLAIMED | HERE | (payload ? 0 : cached);
    for (uint64_t i = page; i < page + run; i++)
      if (atomic_fetch_xor(&d->record[r->first + i], change) & WANTED)
        wake_page(r, i); /* the seal came meanwhile, and a fault */
    if (failed) {
      engine_fail(&d->stats, d->wake, PC_MEMORY, "writing page %llu of region %d, before the guest "
                  "is handed over: %s", (unsigned long long)page, (int)(r - d->regions),
                  strerrordesc_np(-failed));
      return false;
    }
    present(d, run);
  }
  count_add(d->stats.passed_pages, f->count);
  return true;
}

/* Some pages of a frame. */
static bool receive_part(struct pc_dest *d, struct region *r, const struct frame *f,
                         const uint8_t *payload, bool urgent) {
  if (!sealed(d))
    return receive_early(d, r, f, f->kind == FRAME_ZERO ? NULL : payload);
  if (f->kind == FRAME_ZERO)
    return receive_zeros(d, r, f, urgent);
  if (f->kind == FRAME_LOST)
    return receive_lost(d, r, f, urgent);
  return receive_pages(d, r, f, payload, urgent);
}

static bool receive(struct pc_dest *d, const struct frame *f, const uint8_t *payload, bool urgent) {
  struct region *r = f->region < d->region_count ? &d->regions[f->region] : NULL;
  if (!r || f->kind == FRAME_REQUEST || (f->kind == FRAME_LOST && !sealed(d)) ||
      !frame_fits(f, r->is.pages, r->is.page_size)) {
    engine_fail(&d->stats, d->wake, PC_BAD_FRAME,
                "the source sent a frame that does not fit the guest: kind %d, region %d, "
                "page %llu, count %u, payload %u",
                f->kind, f->region, (unsigned long long)f->page, f->count, f->payload);
    return false;
  }
  count_add(d->stats.transferred_bytes, FRAME_BYTES + f->payload);
  if (urgent)
    count_add(d->stats.unanswered, -(int64_t)f->count);
  bool good = true;
  struct frame part = *f;
  for (uint64_t done = 0; good && done < f->count; done += part.count) {
    part.page = f->page + done; /* what has a payload is less than one step */
    part.count = f->count - done < STEP_PAGES ? f->count - (uint32_t)done : STEP_PAGES;
    good = !called_off(d) && receive_part(d, r, &part, payload, urgent);
  }
  return good;
}

static void *receive_run(void *argument) {
  struct connection *c = argument;
  struct pc_dest *d = c->engine;
  struct frame_reader reader;
  struct frame f;
  uint8_t *payload;
  int got = frame_reader_init(&reader, c->stream, FRAME_MAX_PAYLOAD,
                              c->urgent ? URGENT_AHEAD : FRAME_BYTES);
  while (got == 0 || got == 1) {
    got = frame_read(&reader, &f, &payload);
    if (got != 1 || !receive(d, &f, payload, c->urgent))
      break;
  }
  if (got == -EPROTO)
    engine_fail(&d->stats, d->wake, PC_BAD_FRAME, "the source sent what is not a frame");
  else if (got <= 0 && !called_off(d))
    engine_fail(&d->stats, d->wake, PC_CONNECTION, "the %s connection %s%s",
                c->urgent ? "urgent" : "push", got ? "broke: " : "was closed by the source",
                got ? stream_why(c->stream, got) : "");
  frame_reader_free(&reader);
  return NULL;
}

/* --- faults ----------------------------------------------------------------------------------- */

static struct region *region_at(struct pc_dest *d, int uffd, uint64_t address) {
  for (unsigned i = 0; i < d->region_count; i++) {
    struct region *r = &d->regions[i];
    if (r->is.uffd == uffd && address - r->is.address < r->is.pages << r->page_shift)
      return r;
  }
  return NULL;
}

/* One fault: answered from what is known or left to who is placing the page; else the page is to be
 * asked for, or to be tried again later. */
enum answer { ANSWERED, ASK, PUT_OFF };

/* Whatever has failed, the guest's thread is not left behind: it faults again a while later. */
static enum answer fault_answer(struct pc_dest *d, struct region *r, uint64_t page,
                                enum meaning is, const struct placing *p) {
  if (is == PLACED)
    return ANSWERED;
  if (!shall_try_again(d, is))
    place_failed(d, r, page, p->error);
  return PUT_OFF;
}

static enum answer fault_done(struct pc_dest *d, struct region *r, uint64_t page, bool lost) {
  struct placing p;
  bool zeros = false;
  enum meaning is = lost ? BROKEN : place_zeros(r, filed(d, r), page, d->zeros, &zeros, &p);
  count_add(d->stats.discarded_pages, zeros);
  if (is == BROKEN) {
    is = place(r, SPOIL, page, 1, NULL, &p);
    if (is == PLACED && !(atomic_fetch_or(&d->record[r->first + page], LOST) & LOST))
      count_add(d->stats.lost_pages, 1);
  }
  return fault_answer(d, r, page, is, &p);
}

/* With the page claimed. */
static enum answer fault_here(struct pc_dest *d, struct region *r, uint64_t page, bool cached) {
  struct placing p;
  bool zeros;
  enum meaning is = cached ? place_staged(d, r, page, 1, &p)
                           : place_zeros(r, filed(d, r), page, d->zeros, &zeros, &p);
  if (!explained(d, r, &p))
    return ANSWERED; /* it waits */
  if (is == PLACED)
    confirm_here(d, r, page, 1, cached);
  else if (is != BROKEN || (is = lose(d, r, page, &p)) != PLACED)
    unclaim_here(d, r, page, 1);
  return fault_answer(d, r, page, is, &p);
}

static enum answer fault(struct pc_dest *d, struct region *r, uint64_t page, uint64_t now) {
  if (!sealed(d) || atomic_load(&d->foreign))
    return ANSWERED; /* by pc_dest_seal; by nobody */
  _Atomic uint8_t *state = &d->record[r->first + page];
  uint8_t is = atomic_load(state);
  bool here;
  do {
    if (is & DONE)
      return fault_done(d, r, page, is & LOST);
    here = (is & (HERE | CLAIMED)) == HERE;
    if (is & (WANTED | LOST) && !here)
      return ANSWERED;
  } while (!atomic_compare_exchange_weak(state, &is,
                                         here ? (is | CLAIMED) & ~WANTED : is | WANTED));
  if (here)
    return fault_here(d, r, page, is & CACHED);
  if (is & CLAIMED) /* its placer sees WANTED when it confirms */
    return ANSWERED;
  struct asked *asked = asked_slot(d, r->first + page);
  atomic_store(&asked->at_ns, now);
  atomic_store_explicit(&asked->page_and_one, r->first + page + 1, memory_order_release);
  return ASK;
}

/* The guest's threads whose faults could not be answered, until they fault again. */
struct laters {
  struct { struct region *region; uint64_t page; } of[FAULTS_AT_ONCE];
  unsigned count; /* more than FAULTS_AT_ONCE: these and others */
  uint64_t at_ns;
};

static void put_off(struct laters *l, struct region *r, uint64_t page, uint64_t now) {
  if (!l->count)
    l->at_ns = now + AGAIN_MS * 1000000u;
  if (l->count < FAULTS_AT_ONCE)
    l->of[l->count].region = r, l->of[l->count].page = page;
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

static void *faults_run(void *argument) {
  struct fault_thread *taker = argument;
  struct pc_dest *d = taker->dest;
  struct uffd_msg messages[FAULTS_AT_ONCE];
  struct { struct region *region; uint64_t page; } ask[FAULTS_AT_ONCE];
  struct laters later = {.count = 0};
  while (!atomic_load(&d->stopping)) {
    pthread_mutex_lock(&d->asking);
    bool unsent = d->urgent.fd >= 0 && (d->waiting_to > 0 || d->look_again < d->slots);
    struct pollfd ready[3] = {{.fd = taker->uffd, .events = POLLIN},
                              {.fd = d->notice, .events = POLLIN},
                              {.fd = unsent ? d->urgent.fd : -1, .events = POLLOUT}};
    pthread_mutex_unlock(&d->asking);
    poll(ready, 3, later.count ? AGAIN_MS : TURN_MS);
    eventfd_t noticed;
    if (ready[1].revents)
      eventfd_read(d->notice, &noticed);
    ssize_t n = ready[0].revents ? read(taker->uffd, messages, sizeof messages) : 0;
    if (n < 0 && errno != EAGAIN && errno != EINTR) {
      engine_fail(&d->stats, d->wake, PC_MEMORY, "reading faults from the userfaultfd: %s",
                  strerrordesc_np(errno));
      poll(NULL, 0, AGAIN_MS); /* and it is tried again, for as long as the engine lives */
    }
    uint64_t now = pc_monotonic_ns();
    count_set(d->stats.beat_ns, now);
    atomic_store_explicit(&taker->turned_ns, now, memory_order_relaxed);
    if (later.count && now >= later.at_ns)
      wake_put_off(taker, &later);
    unsigned asks = 0;
    for (ssize_t i = 0; i < n / (ssize_t)sizeof *messages; i++) {
      uint64_t address = messages[i].arg.pagefault.address;
      struct region *r = region_at(d, taker->uffd, address);
      if (messages[i].event != UFFD_EVENT_PAGEFAULT || !r)
        continue;
      count_add(d->stats.faults, 1);
      uint64_t page = (address - r->is.address) >> r->page_shift;
      enum answer answer = fault(d, r, page, now);
      if (answer == ASK)
        ask[asks].region = r, ask[asks++].page = page;
      else if (answer == PUT_OFF)
        put_off(&later, r, page, now);
    }
    if (!asks && !unsent)
      continue;
    pthread_mutex_lock(&d->asking);
    for (unsigned i = 0; i < asks && d->urgent.fd >= 0; i++) { /* or pc_dest_connect sees to it */
      uint64_t slot = ask[i].region->first + ask[i].page;
      if (slot < d->look_again && !ask_page(d, ask[i].region, ask[i].page))
        d->look_again = slot;
    }
    ask_flush(d);
    pthread_mutex_unlock(&d->asking);
  }
  atomic_store(&taker->turned_ns, UINT64_MAX);
  eventfd_write(d->notice, 1); /* for the next fault thread */
  return NULL;
}

/* --- life ------------------------------------------------------------------------------------- */

struct pc_stats *pc_dest_stats(struct pc_dest *d) {
  return &d->stats;
}

uint64_t pc_dest_still_ns(struct pc_dest *d) {
  uint64_t now = pc_monotonic_ns(), longest = 0;
  for (unsigned i = 0; i < d->taker_count; i++) {
    uint64_t turned = atomic_load(&d->takers[i].turned_ns);
    if (d->takers[i].running && turned < now && now - turned > longest)
      longest = now - turned;
  }
  return longest;
}

/* What of a page's state outlives the engine that wrote it. */
static uint8_t kept(struct pc_dest *d, struct region *r, uint8_t is) {
  if (is & DONE)
    return is & (DONE | LOST);
  if (is & FOREIGN)
    return CLAIMED | FOREIGN;
  if (!d->staged || r->is.fd < 0)
    return sealed(d) && is & (CLAIMED | BEGUN) ? BEGUN : 0;
  return (is & (sealed(d) ? HERE | CACHED : CACHED)) | (is & CLAIMED ? CACHED : 0);
}

/* Maps the record, a new one or that of an engine before this one, which was staged or not. */
static int record_map(struct pc_dest *d, int record, char error[200]) {
  struct stat file;
  int failed = fstat(record, &file) ? errno : 0;
  if (!failed && file.st_size) /* another engine has been here */
    d->staged = (uint64_t)file.st_size != d->slots;
  uint64_t bytes = d->slots + d->staged;
  if (!failed && file.st_size && (uint64_t)file.st_size != bytes) {
    snprintf(error, 200, "the page record has %lld bytes and this guest needs %llu: it is not this "
             "guest's", (long long)file.st_size, (unsigned long long)d->slots);
    return -EINVAL;
  }
  /* Allocated now: where it did not go later, a thread would get SIGBUS. */
  while (!failed && (failed = posix_fallocate(record, 0, (off_t)bytes)) == EINTR)
    failed = 0;
  if (failed) {
    snprintf(error, 200, "no room for the page record of %llu bytes in the state directory: %s",
             (unsigned long long)bytes, strerrordesc_np(failed));
    if (!file.st_size && ftruncate(record, 0))
      return -errno;
    return -failed;
  }
  d->record = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, record, 0);
  if (d->record == MAP_FAILED) {
    failed = errno;
    snprintf(error, 200, "mapping the page record of %llu bytes: %s", (unsigned long long)bytes,
             strerrordesc_np(failed));
    return -failed;
  }
  for (struct region *r = d->regions; file.st_size && r < d->regions + d->region_count; r++) {
    for (_Atomic uint8_t *state = d->record + r->first; state < d->record + r->first + r->is.pages;
         state++) {
      uint8_t is = atomic_load_explicit(state, memory_order_relaxed), keeps = kept(d, r, is);
      d->stats.confirmed_pages += (keeps & DONE) != 0;
      d->stats.present_pages += d->staged && keeps & (DONE | HERE);
      d->stats.lost_pages += (keeps & LOST) != 0;
      if (keeps & FOREIGN && !d->foreign)
        d->foreign = (uint64_t)(state - d->record) + 1;
      if (is != keeps)
        atomic_store_explicit(state, keeps, memory_order_relaxed);
    }
  }
  return 0;
}

/* The stages of a staged engine, with regions and record there. */
static int stages_open(struct pc_dest *d, char error[200]) {
  for (unsigned i = 0; d->staged && i < d->region_count; i++) {
    int failed = stage_open(&d->stages[d->stage_count++], &d->regions[i].is);
    if (failed) {
      snprintf(error, 200, "making a place for the pages of region %u until the guest comes: %s", i,
               strerrordesc_np(-failed));
      return failed;
    }
  }
  return 0;
}

struct pc_dest *pc_dest_new(const struct pc_region *regions, unsigned count, int record, int wake,
                            int staged, char error[200]) {
  struct pc_dest *d = calloc(1, sizeof *d);
  if (!d) {
    snprintf(error, 200, "no memory for the engine");
    return NULL;
  }
  d->wake = wake, d->urgent.fd = -1, d->region_count = count, d->notice = -1;
  d->record = MAP_FAILED, d->zeros = MAP_FAILED, d->staged = staged;
  pthread_mutex_init(&d->asking, NULL);
  for (unsigned i = 0; i < PC_MAX_CONNECTIONS; i++)
    d->connections[i] = (struct connection){.engine = d, .stream = {.fd = -1}};
  d->slots = engine_regions(d->regions, regions, count, error);
  if (d->slots == 0 || record_map(d, record, error) || stages_open(d, error)) {
    pc_dest_free(d);
    return NULL;
  }
  d->look_again = d->slots;
  d->notice = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  d->zeros = mmap(NULL, FRAME_MAX_PAYLOAD, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (d->notice < 0 || d->zeros == MAP_FAILED) {
    snprintf(error, 200, "making the engine: %s", strerrordesc_np(errno));
    pc_dest_free(d);
    return NULL;
  }
  for (unsigned i = 0; i < count; i++) {
    struct region *r = &d->regions[i];
    d->stats.total_pages += r->is.pages;
    unsigned known = 0;
    while (known < d->taker_count && d->takers[known].uffd != r->is.uffd)
      known++;
    if (known == d->taker_count)
      d->takers[d->taker_count++] = (struct fault_thread){.dest = d, .uffd = r->is.uffd};
  }
  if (d->foreign)
    foreign_failed(d);
  return d;
}

int pc_dest_register(struct pc_dest *d, int again) {
  for (unsigned i = 0; i < d->taker_count; i++) {
    struct uffdio_api api = {.api = UFFD_API};
    if (d->staged)
      api.features = UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MINOR_HUGETLBFS;
    if (!again && ioctl(d->takers[i].uffd, UFFDIO_API, &api)) {
      int failed = errno;
      engine_fail(&d->stats, d->wake, PC_MEMORY, "UFFDIO_API: %s", strerrordesc_np(failed));
      return -failed;
    }
    fcntl(d->takers[i].uffd, F_SETFL, fcntl(d->takers[i].uffd, F_GETFL) | O_NONBLOCK);
  }
  for (unsigned i = 0; i < d->region_count; i++) {
    struct region *r = &d->regions[i];
    struct uffdio_register range = {.range = {r->is.address, r->is.pages << r->page_shift},
                                    .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (filed(d, r))
      range.mode |= UFFDIO_REGISTER_MODE_MINOR;
    if (!d->gone[i] && ioctl(r->is.uffd, UFFDIO_REGISTER, &range)) {
      int failed = errno;
      engine_fail(&d->stats, d->wake, PC_MEMORY,
                  "registering region %u at %#llx with userfaultfd: %s%s", i,
                  (unsigned long long)r->is.address, strerrordesc_np(failed),
                  failed == EBUSY    ? " (another userfaultfd has it)"
                  : failed == ENOMEM ? " (or the VMM has ended)"
                                     : "");
      if (!again) /* else the guest may wait there already, and must not read zeros */
        pc_dest_unregister(d, 1);
      return -failed;
    }
    d->registered = i + 1;
  }
  for (unsigned i = 0; i < d->taker_count; i++) {
    atomic_store(&d->takers[i].turned_ns, pc_monotonic_ns());
    int failed = engine_thread(&d->takers[i].thread, "pc-faults", faults_run, &d->takers[i]);
    if (failed) {
      engine_fail(&d->stats, d->wake, PC_MEMORY, "starting a fault thread: %s",
                  strerrordesc_np(-failed));
      return failed;
    }
    d->takers[i].running = true;
  }
  for (unsigned i = 0; again && i < d->region_count; i++)
    wake_all(&d->regions[i]); /* a message is read once, and was by another engine */
  return 0;
}

int pc_dest_connect(struct pc_dest *d, int fd, struct pc_tls *tls, int urgent) {
  struct stream stream = {.fd = fd, .tls = tls};
  struct connection *c = NULL;
  bool second = false;
  for (unsigned i = PC_MAX_CONNECTIONS; i-- > 0;) {
    if (d->connections[i].stream.fd < 0)
      c = &d->connections[i];
    else
      second |= urgent && d->connections[i].urgent;
  }
  if (!c || second) {
    engine_fail(&d->stats, d->wake, PC_CONNECTION,
                "the source made more than %d connections, or more than one for urgent pages",
                PC_MAX_CONNECTIONS);
    engine_close(stream);
    return -EMFILE;
  }
  engine_socket(stream, urgent);
  c->stream = stream, c->urgent = urgent;
  int failed = engine_thread(&c->thread, urgent ? "pc-urgent" : "pc-receive", receive_run, c);
  c->running = !failed;
  if (failed) {
    engine_fail(&d->stats, d->wake, PC_CONNECTION, "starting a thread for a connection: %s",
                strerrordesc_np(-failed));
  } else if (urgent) { /* all that is wanted is asked for, again where it was asked for already */
    pthread_mutex_lock(&d->asking);
    d->urgent = stream;
    d->waiting_from = d->waiting_to = 0;
    d->look_again = 0;
    count_set(d->stats.unanswered, 0);
    pthread_mutex_unlock(&d->asking);
    eventfd_write(d->notice, 1);
  }
  return failed;
}

int pc_dest_stale(struct pc_dest *d, unsigned region, uint64_t first, uint64_t count,
                  const uint8_t *bits) {
  struct region *r = region < d->region_count ? &d->regions[region] : NULL;
  if (!r || first > r->is.pages || count > r->is.pages - first)
    return -EINVAL;
  if (sealed(d))
    return -EBUSY;
  uint64_t here = 0;
  for (uint64_t i = 0; i < count; i++) {
    if (i % 8 == 0 && !bits[i / 8]) {
      i += 7;
      continue;
    }
    if (!(bits[i / 8] >> i % 8 & 1))
      continue;
    _Atomic uint8_t *state = &d->record[r->first + first + i];
    while (atomic_load(state) & CLAIMED) /* for as long as a write takes */
      sched_yield();
    here += (atomic_fetch_and(state, (uint8_t)~HERE) & HERE) != 0;
  }
  present(d, -here);
  return 0;
}

int pc_dest_seal(struct pc_dest *d) {
  if (sealed(d))
    return 0;
  atomic_store(&d->record[d->slots], 1);
  /* Who has faulted faults again, and is answered. */
  for (struct region *r = d->regions; r < d->regions + d->registered; r++)
    wake_all(r);
  return 0;
}

int pc_dest_settle(struct pc_dest *d) {
  if (!sealed(d))
    return -EBUSY;
  if (!d->staged || atomic_load(&d->settling) || atomic_load(&d->foreign))
    return 0;
  if (d->settler_started)
    pthread_join(d->settler, NULL);
  atomic_store(&d->settling, true);
  int failed = engine_thread(&d->settler, "pc-place", settle_run, d);
  d->settler_started = !failed;
  if (failed) {
    atomic_store(&d->settling, false);
    engine_fail(&d->stats, d->wake, PC_MEMORY, "starting the thread that places pages: %s",
                strerrordesc_np(-failed));
  }
  return failed;
}

void pc_dest_disconnect(struct pc_dest *d) {
  atomic_store(&d->ending, true);
  pthread_mutex_lock(&d->asking);
  d->urgent.fd = -1;
  pthread_mutex_unlock(&d->asking);
  engine_end_connections(d->connections);
  atomic_store(&d->ending, false);
  engine_forget_connections(&d->stats);
  if (atomic_load(&d->foreign))
    foreign_failed(d);
}

int pc_dest_have(struct pc_dest *d, unsigned region, uint64_t first, uint64_t count,
                 uint8_t *bits) {
  struct region *r = region < d->region_count ? &d->regions[region] : NULL;
  if (!r || first > r->is.pages || count > r->is.pages - first)
    return -EINVAL;
  memset(bits, 0, (count + 7) / 8);
  for (uint64_t i = 0; i < count; i++)
    if (atomic_load_explicit(&d->record[r->first + first + i], memory_order_acquire) &
        (DONE | HERE))
      bits[i / 8] |= (uint8_t)(1 << i % 8);
  return 0;
}

int64_t pc_dest_poison(struct pc_dest *d) {
  int64_t poisoned = 0;
  for (unsigned i = 0; i < PC_MAX_CONNECTIONS; i++)
    if (d->connections[i].stream.fd >= 0)
      return -EBUSY;
  if (!sealed(d) || atomic_load(&d->foreign))
    return -EBUSY;
  for (struct region *r = d->regions; r < d->regions + d->region_count; r++) {
    _Atomic uint8_t *state = d->record + r->first;
    for (uint64_t page = 0; page < r->is.pages;) {
      struct placing p;
      uint64_t run = 0;
      while (page + run < r->is.pages && !(atomic_load(&state[page + run]) & (DONE | HERE)))
        atomic_fetch_or(&state[page + run++], CLAIMED); /* or another engine takes it for FOREIGN */
      if (!run && ++page)
        continue;
      enum meaning is = place(r, SPOIL, page, run, NULL, &p);
      /* What is there already may be the error that a killed engine has left, so it is LOST too. */
      confirm(d, r, page, p.done, DONE | LOST);
      count_add(d->stats.lost_pages, p.done);
      poisoned += (int64_t)(p.done - p.existing);
      for (uint64_t i = page + p.done; i < page + run; i++)
        atomic_fetch_and(&state[i], (uint8_t)~CLAIMED);
      page += p.done;
      if (is == AGAIN) {
        sched_yield(); /* from the page that did not go */
      } else if (is == NEVER) {
        engine_fail(&d->stats, d->wake, PC_MEMORY, "giving up the pages that lack: this kernel "
                    "has no UFFDIO_POISON, Linux 6.6 or later is needed");
        return -EINVAL;
      } else if (is != PLACED) {
        place_failed(d, r, page, p.error);
        return -p.error;
      }
    }
  }
  return poisoned;
}

/* Without connections only the thread that places staged pages may have some in hand: it finds the
 * region gone too, and gives them back. */
int pc_dest_gone(struct pc_dest *d, unsigned region) {
  struct region *r = region < d->region_count ? &d->regions[region] : NULL;
  uint64_t count = 0, news = 0;
  if (!r)
    return -EINVAL;
  for (unsigned i = 0; i < PC_MAX_CONNECTIONS; i++)
    if (d->connections[i].stream.fd >= 0)
      return -EBUSY;
  if (!sealed(d) || atomic_load(&d->foreign)) /* what is FOREIGN stays CLAIMED */
    return -EBUSY;
  d->gone[region] = true;
  for (_Atomic uint8_t *state = d->record + r->first, *end = state + r->is.pages; state < end;
       state++) {
    uint8_t was = atomic_load(state);
    while (!(was & DONE) && !atomic_load(&d->foreign)) {
      if (was & CLAIMED) {
        poll(NULL, 0, 1);
        was = atomic_load(state);
      } else if (atomic_compare_exchange_weak(state, &was, DONE)) {
        count++;
        news += !(was & HERE);
        if (was & LOST)
          atomic_fetch_sub(&d->unspoilt, 1);
        break;
      }
    }
  }
  confirmed(d, count, news);
  return 0;
}

int pc_dest_unregister(struct pc_dest *d, int called_off) {
  /* Lost pages: huge pages are made of what is not registered, and of a memory error they make
   * zeros (MADV_COLLAPSE and khugepaged on shared memory, seen on Linux 6.18). */
  if (!called_off && (count_get(d->stats.confirmed_pages) != d->stats.total_pages ||
                      count_get(d->stats.lost_pages)))
    return -EBUSY;
  int failed = 0;
  for (unsigned i = 0; i < d->registered; i++) {
    struct region *r = &d->regions[i];
    struct uffdio_range range = {r->is.address, r->is.pages << r->page_shift};
    if (d->gone[i]) /* what is mapped there now is none of ours */
      continue;
    /* Of a VMM that is gone the kernel says ENOMEM here. */
    if (ioctl(r->is.uffd, UFFDIO_UNREGISTER, &range) && errno != ENOMEM)
      failed = -errno;
  }
  return failed;
}

void pc_dest_stop(struct pc_dest *d) {
  atomic_store(&d->stopping, true);
  eventfd_write(d->notice, 1);
  pc_dest_disconnect(d);
  for (unsigned i = 0; i < d->taker_count; i++) {
    if (d->takers[i].running)
      pthread_join(d->takers[i].thread, NULL);
    d->takers[i].running = false;
  }
  if (d->settler_started)
    pthread_join(d->settler, NULL);
  d->settler_started = false;
}

void pc_dest_free(struct pc_dest *d) {
  if (d->notice >= 0) {
    pc_dest_stop(d);
    close(d->notice);
  }
  if (d->record != MAP_FAILED)
    munmap((void *)d->record, d->slots + d->staged);
  if (d->zeros != MAP_FAILED)
    munmap((void *)d->zeros, FRAME_MAX_PAYLOAD);
  for (unsigned i = 0; i < d->stage_count; i++)
    stage_close(&d->stages[i]);
  pthread_mutex_destroy(&d->asking);
  free(d);
}
