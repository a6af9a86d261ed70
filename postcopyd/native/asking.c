/* SPDX-License-Identifier: Apache-2.0 */
/* See asking.h. */
#define _GNU_SOURCE
#include "asking.h"

#include <sys/socket.h>

/* `look_again`, when all WANTED pages are in `waiting` or were sent. */
#define NO_SLOT UINT64_MAX

void asking_init(struct asking *a, const struct record *record, const struct region *regions,
                 unsigned count, struct pc_stats *stats) {
  a->record = record, a->regions = regions, a->region_count = count, a->stats = stats;
  a->urgent.fd = -1, a->look_again = NO_SLOT;
  pthread_mutex_init(&a->lock, NULL);
}

void asking_free(struct asking *a) {
  pthread_mutex_destroy(&a->lock);
}

void asking_begin(struct asking *a, struct stream urgent) {
  pthread_mutex_lock(&a->lock);
  a->urgent = urgent;
  a->waiting_from = a->waiting_to = 0;
  a->look_again = 0;
  count_set(a->stats->unanswered, 0);
  pthread_mutex_unlock(&a->lock);
}

void asking_end(struct asking *a) {
  pthread_mutex_lock(&a->lock);
  a->urgent.fd = -1;
  pthread_mutex_unlock(&a->lock);
}

int asking_waits(struct asking *a) {
  pthread_mutex_lock(&a->lock);
  bool unsent = a->waiting_to > 0 || a->look_again != NO_SLOT;
  int fd = unsent ? a->urgent.fd : -1;
  pthread_mutex_unlock(&a->lock);
  return fd;
}

/* With the lock: queues a request for ask_flush to send. False: there is no room. The record has
 * the page as WANTED, and ask_flush looks again. */
static bool ask_page(struct asking *a, const struct region *r, uint64_t page) {
  if (a->waiting_to + FRAME_BYTES > sizeof a->waiting)
    return false;
  struct frame f = {.kind = FRAME_REQUEST, .region = (uint16_t)(r - a->regions), .page = page,
                    .count = 1};
  frame_encode(a->waiting + a->waiting_to, &f);
  a->waiting_to += FRAME_BYTES;
  count_add(a->stats->requests, 1);
  count_add(a->stats->unanswered, 1);
  return true;
}

/* With the lock: queues requests for the WANTED pages from `look_again` on, as many as fit. */
static void ask_wanted(struct asking *a) {
  for (const struct region *r = a->regions; r < a->regions + a->region_count; r++) {
    uint64_t slot = a->look_again > r->first ? a->look_again : r->first;
    uint64_t end = r->first + r->is.pages;
    while ((slot = record_next_wanted(a->record, slot, end)) < end) {
      if (!ask_page(a, r, slot - r->first)) {
        a->look_again = slot;
        return;
      }
      slot++;
    }
  }
  a->look_again = NO_SLOT;
}

/* With the lock: sends queued requests, as far as the socket takes them without waiting. */
static void ask_flush(struct asking *a) {
  while (a->urgent.fd >= 0) {
    while (a->waiting_from < a->waiting_to) {
      ssize_t n = write_now(a->urgent, a->waiting + a->waiting_from,
                            a->waiting_to - a->waiting_from);
      if (n < 0) {
        shutdown(a->urgent.fd, SHUT_RDWR); /* the receiving thread sees it and reports */
        a->urgent.fd = -1;
      }
      if (n <= 0)
        return;
      a->waiting_from += (size_t)n;
    }
    a->waiting_from = a->waiting_to = 0;
    if (a->look_again == NO_SLOT)
      return;
    ask_wanted(a);
  }
}

void ask(struct asking *a, const struct wanted *pages, unsigned count) {
  pthread_mutex_lock(&a->lock);
  for (unsigned i = 0; i < count && a->urgent.fd >= 0; i++) { /* later asking_begin finds them */
    uint64_t slot = pages[i].region->first + pages[i].page;
    if (slot < a->look_again && !ask_page(a, pages[i].region, pages[i].page))
      a->look_again = slot;
  }
  ask_flush(a);
  pthread_mutex_unlock(&a->lock);
}

/* --- how long an answer took ------------------------------------------------------------------ */

static unsigned place_of(uint64_t slot) {
  return (slot * 0x9e3779b97f4a7c15ull >> 32) % ASKED_SLOTS;
}

void asked_at(struct asking *a, uint64_t slot, uint64_t now) {
  unsigned i = place_of(slot);
  atomic_store(&a->asked[i].at_ns, now);
  atomic_store_explicit(&a->asked[i].slot_and_one, slot + 1, memory_order_release);
}

void asked_answered(struct asking *a, uint64_t slot) {
  unsigned i = place_of(slot);
  if (atomic_load_explicit(&a->asked[i].slot_and_one, memory_order_acquire) != slot + 1)
    return;
  uint64_t at = atomic_load(&a->asked[i].at_ns), now = pc_monotonic_ns();
  if (at < now) /* otherwise another page has just taken the slot */
    engine_latency(a->stats, now - at);
  atomic_store_explicit(&a->asked[i].slot_and_one, 0, memory_order_relaxed);
}
