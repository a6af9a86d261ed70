/* SPDX-License-Identifier: Apache-2.0 */
/* See record.h. */
#define _GNU_SOURCE
#include "record.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* The same bits in each byte of a word of the record, to look at eight pages at a time. */
#define EIGHT(state) (0x0101010101010101ull * (state))

static _Atomic uint8_t *at(const struct record *c, uint64_t slot) {
  return &c->pages[slot];
}

/* Turns eight pages to `to` if all are 0. *is: their former bits. */
static bool eight_from_nothing(struct record *c, uint64_t slot, uint8_t to, uint64_t *is) {
  *is = 0;
  return __atomic_compare_exchange_n((uint64_t *)at(c, slot), is, EIGHT(to), false,
                                     __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
}

static uint64_t eight(const struct record *c, uint64_t slot) {
  return __atomic_load_n((uint64_t *)at(c, slot), __ATOMIC_RELAXED);
}

/* --- life ------------------------------------------------------------------------------------- */

bool record_sealed(const struct record *c) {
  return !c->staged || atomic_load(at(c, c->slots));
}

void record_seal(struct record *c) {
  if (c->staged)
    atomic_store(at(c, c->slots), 1);
}

/* The part of a page's state that outlives the engine that wrote it. */
static uint8_t kept(const struct record *c, const struct region *r, uint8_t is) {
  if (is & DONE)
    return is & (DONE | LOST);
  if (is & FOREIGN)
    return CLAIMED | FOREIGN;
  if (!c->staged || r->is.fd < 0)
    return record_sealed(c) && is & (CLAIMED | BEGUN) ? BEGUN : 0;
  return (is & (record_sealed(c) ? HERE | CACHED : CACHED)) | (is & CLAIMED ? CACHED : 0);
}

static void go_on(struct record *c, const struct region *r, struct pc_stats *known) {
  for (uint64_t slot = r->first; slot < r->first + r->is.pages; slot++) {
    uint8_t is = atomic_load_explicit(at(c, slot), memory_order_relaxed), keeps = kept(c, r, is);
    known->confirmed_pages += (keeps & DONE) != 0;
    known->present_pages += c->staged && keeps & (DONE | HERE);
    known->lost_pages += (keeps & LOST) != 0;
    if (keeps & FOREIGN && !atomic_load(&c->foreign))
      atomic_store(&c->foreign, slot + 1);
    if (is != keeps)
      atomic_store_explicit(at(c, slot), keeps, memory_order_relaxed);
  }
}

int record_open(struct record *c, int file, uint64_t slots, bool staged,
                const struct region *regions, unsigned count, struct pc_stats *known,
                char error[200]) {
  struct stat is;
  int failed = fstat(file, &is) ? errno : 0;
  bool again = !failed && is.st_size; /* an earlier engine's record */
  *c = (struct record){.slots = slots, .staged = again ? (uint64_t)is.st_size != slots : staged};
  uint64_t bytes = slots + c->staged;
  if (again && (uint64_t)is.st_size != bytes) {
    snprintf(error, 200, "the page record has %lld bytes and this guest needs %llu: it is not this "
             "guest's", (long long)is.st_size, (unsigned long long)slots);
    return -EINVAL;
  }
  /* Allocated at once: if that failed later, a thread would get SIGBUS. */
  while (!failed && (failed = posix_fallocate(file, 0, (off_t)bytes)) == EINTR)
    failed = 0;
  if (failed) {
    snprintf(error, 200, "no room for the page record of %llu bytes in the state directory: %s",
             (unsigned long long)bytes, strerrordesc_np(failed));
    if (!is.st_size && ftruncate(file, 0))
      return -errno;
    return -failed;
  }
  void *pages = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (pages == MAP_FAILED) {
    failed = errno;
    snprintf(error, 200, "mapping the page record of %llu bytes: %s", (unsigned long long)bytes,
             strerrordesc_np(failed));
    return -failed;
  }
  c->pages = pages;
  for (unsigned i = 0; again && i < count; i++)
    go_on(c, &regions[i], known);
  return 0;
}

void record_close(struct record *c) {
  if (c->pages)
    munmap((void *)c->pages, c->slots + c->staged);
  c->pages = NULL;
}

/* --- a thread of the guest touches a page ------------------------------------------------------ */

enum touched record_touch(struct record *c, uint64_t slot) {
  uint8_t is = atomic_load(at(c, slot));
  bool here;
  do {
    if (is & DONE)
      return is & LOST ? IS_LOST : IS_DONE;
    here = (is & (HERE | CLAIMED)) == HERE;
    if (is & (WANTED | LOST) && !here)
      return IS_BUSY;
  } while (!atomic_compare_exchange_weak(at(c, slot), &is,
                                         here ? (is | CLAIMED) & ~WANTED : is | WANTED));
  if (here)
    return is & CACHED ? IS_HERE : IS_ZEROS;
  return is & CLAIMED ? IS_BUSY : IS_NEW;
}

uint64_t record_next_wanted(const struct record *c, uint64_t from, uint64_t to) {
  while (from < to) {
    if (from % 8 == 0 && !(eight(c, from) & EIGHT(WANTED))) {
      from += 8;
      continue;
    }
    if ((atomic_load_explicit(at(c, from), memory_order_relaxed) & ~(CACHED | BEGUN)) == WANTED)
      return from;
    from++;
  }
  return to;
}

bool record_lost_since(struct record *c, uint64_t slot) {
  return !(atomic_fetch_or(at(c, slot), LOST) & LOST);
}

/* --- a page has come, after the seal ----------------------------------------------------------- */

bool record_begun(const struct record *c, uint64_t slot) {
  return atomic_load_explicit(at(c, slot), memory_order_relaxed) & BEGUN;
}

bool record_claim(struct record *c, uint64_t slot, bool cached, uint8_t *were) {
  uint8_t as = cached ? CLAIMED | CACHED : CLAIMED;
  uint8_t is = atomic_load_explicit(at(c, slot), memory_order_relaxed);
  do {
    if (is & (CLAIMED | DONE | HERE))
      return false;
  } while (!atomic_compare_exchange_weak(at(c, slot), &is, as | (is & (CACHED | BEGUN))));
  if (is & LOST)
    atomic_fetch_sub(&c->unpoisoned, 1);
  *were |= is;
  return true;
}

void record_put(struct record *c, uint64_t slot, struct owed *o) {
  atomic_fetch_or(at(c, slot), HERE);
  o->present++;
}

bool record_confirm(struct record *c, uint64_t slot, bool lost, struct owed *o) {
  uint8_t was = atomic_exchange(at(c, slot), lost ? DONE | LOST : DONE);
  if (was & LOST)
    atomic_fetch_sub(&c->unpoisoned, 1);
  o->confirmed++;
  o->present += !(was & HERE);
  return was & WANTED;
}

void record_give_back(struct record *c, uint64_t slot, struct owed *o) {
  uint8_t is = atomic_load(at(c, slot)); /* other threads may only add WANTED to it */
  o->present -= (is & HERE) != 0;
  atomic_store(at(c, slot), WANTED | (is & (CACHED | BEGUN)));
}

bool record_foreign(struct record *c, uint64_t slot) {
  uint64_t none = 0;
  if (atomic_load(at(c, slot)) & BEGUN)
    return false;
  atomic_fetch_or(at(c, slot), FOREIGN);
  atomic_compare_exchange_strong(&c->foreign, &none, slot + 1);
  return true;
}

void record_keep_lost(struct record *c, uint64_t slot) {
  uint8_t is = atomic_load(at(c, slot)); /* as above */
  atomic_fetch_add(&c->unpoisoned, 1);
  atomic_store(at(c, slot), LOST | (is & (CACHED | BEGUN)));
}

uint64_t record_zeros(struct record *c, uint64_t slot, uint64_t most, bool *news) {
  uint64_t eight_are;
  uint8_t none = 0;
  if (slot % 8 == 0 && most >= 8) {
    *news = eight_from_nothing(c, slot, DONE, &eight_are);
    if (*news || eight_are == EIGHT(DONE))
      return 8;
  }
  *news = atomic_compare_exchange_strong(at(c, slot), &none, DONE);
  return *news;
}

/* --- a page has come, before the seal ---------------------------------------------------------- */

bool record_claim_early(struct record *c, uint64_t slot, bool zeros, int *cached, struct owed *o) {
  uint8_t is = atomic_load_explicit(at(c, slot), memory_order_relaxed);
  do {
    if (is & (CLAIMED | DONE) || (zeros && *cached >= 0 && *cached != (is & CACHED)))
      return false;
  } while (!atomic_compare_exchange_weak(at(c, slot), &is,
                                         (is & ~HERE) | CLAIMED | (zeros ? 0 : CACHED)));
  *cached = is & CACHED;
  o->present -= (is & HERE) != 0;
  return true;
}

bool record_early(struct record *c, uint64_t slot, enum put put, struct owed *o) {
  uint8_t is = atomic_load_explicit(at(c, slot), memory_order_relaxed);
  uint8_t gone = put == ZEROS_PUT ? CLAIMED | CACHED : CLAIMED;
  uint8_t comes = put == NOTHING_PUT ? 0 : HERE;
  while (!atomic_compare_exchange_weak(at(c, slot), &is, (uint8_t)(is & ~gone) | comes))
    ;
  o->present += put != NOTHING_PUT;
  return is & WANTED;
}

bool record_zeros_early(struct record *c, uint64_t slot, uint64_t most, struct owed *o) {
  uint64_t are;
  if (slot % 8 || most < 8)
    return false;
  bool news = eight_from_nothing(c, slot, HERE, &are);
  o->present += news ? 8 : 0;
  return news || are == EIGHT(HERE);
}

bool record_stale(struct record *c, uint64_t slot, struct owed *o) {
  uint8_t is = atomic_load(at(c, slot));
  do {
    if (is & CLAIMED)
      return false;
  } while (!atomic_compare_exchange_weak(at(c, slot), &is, is & ~HERE));
  o->present -= (is & HERE) != 0;
  return true;
}

/* --- a page is placed that is HERE ------------------------------------------------------------- */

bool record_claim_here(struct record *c, uint64_t slot, int *cached) {
  uint8_t is = atomic_load_explicit(at(c, slot), memory_order_relaxed);
  do {
    if ((is & (HERE | CLAIMED)) != HERE || (*cached >= 0 && *cached != (is & CACHED)))
      return false;
  } while (!atomic_compare_exchange_weak(at(c, slot), &is, is | CLAIMED));
  *cached = is & CACHED;
  return true;
}

bool record_give_back_here(struct record *c, uint64_t slot) {
  return atomic_fetch_and(at(c, slot), (uint8_t)~(CLAIMED | WANTED)) & WANTED;
}

bool record_in_hand(const struct record *c, uint64_t slot) {
  return (atomic_load(at(c, slot)) & (HERE | CLAIMED)) == (HERE | CLAIMED);
}

bool record_none_here(const struct record *c, uint64_t slot) {
  return slot % 8 == 0 && !(eight(c, slot) & EIGHT(HERE));
}

/* --- what the session asks and decides --------------------------------------------------------- */

bool record_done(const struct record *c, uint64_t slot) {
  return atomic_load(at(c, slot)) & DONE;
}

static bool has(const struct record *c, uint64_t slot) {
  return atomic_load_explicit(at(c, slot), memory_order_acquire) & (DONE | HERE);
}

void record_have(const struct record *c, uint64_t slot, uint64_t count, uint8_t *bits) {
  memset(bits, 0, (count + 7) / 8);
  for (uint64_t i = 0; i < count; i++)
    if (has(c, slot + i))
      bits[i / 8] |= (uint8_t)(1 << i % 8);
}

bool record_claim_lacking(struct record *c, uint64_t slot) {
  if (has(c, slot))
    return false;
  atomic_fetch_or(at(c, slot), CLAIMED); /* no other thread claims a page that is to be given up */
  return true;
}

void record_unclaim(struct record *c, uint64_t slot) {
  atomic_fetch_and(at(c, slot), (uint8_t)~CLAIMED);
}

bool record_give_up(struct record *c, uint64_t slot, struct owed *o) {
  uint8_t is = atomic_load(at(c, slot));
  do {
    if (is & DONE)
      return true;
    if (is & CLAIMED)
      return false;
  } while (!atomic_compare_exchange_weak(at(c, slot), &is, DONE));
  if (is & LOST)
    atomic_fetch_sub(&c->unpoisoned, 1);
  o->confirmed++;
  o->present += !(is & HERE);
  return true;
}
