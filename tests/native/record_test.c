/* SPDX-License-Identifier: Apache-2.0 */
/* The page record held to a plain model of it: one struct with a bool for each thing that may be said
 * of a page, changed by sentences instead of masks, and one sleeper for each page whose fault waits. */
#include "engine_rig.h"

/* Two regions of 60 pages, the first a file's, the second of anonymous memory; slots 60 to 63 are
 * nobody's. */
enum { SLOTS = 128, OWN = 60 };

static const struct region REGIONS[2] = {
    {.is = {.pages = OWN, .page_size = SMALL, .fd = 0}, .first = 0, .page_shift = 12},
    {.is = {.pages = OWN, .page_size = SMALL, .fd = -1}, .first = 64, .page_shift = 12},
};

static int new_record(void) {
  return memfd_create("record", MFD_CLOEXEC);
}

static struct pc_stats known_of(struct record *c, int file, bool staged) {
  struct pc_stats known = {0};
  char error[200];
  check(!record_open(c, file, SLOTS, staged, REGIONS, 2, &known, error), "%s", error);
  return known;
}

/* --- the model -------------------------------------------------------------------------------- */

struct page {
  bool wanted, claimed, done, lost, here, cached, foreign, begun;
  bool was_here; /* when it was claimed */
  bool sleeper;  /* a thread of the guest waits for it */
};

static struct page pages[SLOTS];
static struct record record;
static struct owed owed; /* all that was ever returned */

static uint8_t byte_of(const struct page *p) {
  return (uint8_t)(p->wanted * WANTED + p->claimed * CLAIMED + p->done * DONE + p->lost * LOST +
                   p->here * HERE + p->cached * CACHED + p->foreign * FOREIGN + p->begun * BEGUN);
}

static bool known(const struct page *p) {
  return byte_of(p) != 0;
}

static void woken(struct page *p, bool wake, const char *by) {
  check(wake == p->wanted, "%s: a sleeper", by);
  p->sleeper &= !wake;
  p->wanted = false;
}

static void become_done(struct page *p, bool lost) {
  *p = (struct page){.done = true, .lost = lost, .sleeper = p->sleeper};
}

/* A thread of the guest touches the page. What the engine answers at once wakes it. */
static void touch(uint64_t slot) {
  struct page *p = &pages[slot];
  enum touched right = p->done     ? p->lost ? IS_LOST : IS_DONE
                       : p->claimed ? IS_BUSY
                       : p->here    ? p->cached ? IS_HERE : IS_ZEROS
                       : p->wanted || p->lost ? IS_BUSY
                                              : IS_NEW;
  check(record_touch(&record, slot) == right, "slot %d", (int)slot);
  p->sleeper = right == IS_BUSY || right == IS_NEW;
  if (right == IS_NEW || (right == IS_BUSY && p->claimed && !p->lost))
    p->wanted = true;
  if (right == IS_HERE || right == IS_ZEROS)
    p->claimed = p->was_here = true, p->wanted = false;
}

static void come(uint64_t slot) {
  struct page *p = &pages[slot];
  uint8_t were = 0, right = byte_of(p);
  bool cached = draw() % 2, free = !p->claimed && !p->done && !p->here;
  check(record_begun(&record, slot) == p->begun, " ");
  check(record_claim(&record, slot, cached, &were) == free, "slot %d", (int)slot);
  check(were == (free ? right : 0), " ");
  if (free)
    *p = (struct page){.claimed = true, .cached = p->cached || cached, .sleeper = p->sleeper,
                       .begun = p->begun};
}

/* Whoever has claimed a page does one thing with it. */
static void go_on_with(uint64_t slot) {
  struct page *p = &pages[slot];
  struct owed o = {0};
  bool lost = draw() % 8 == 0;
  if (p->foreign)
    return; /* it stays as it is */
  switch (draw() % 4) {
  case 0:
    if (p->was_here) {
      woken(p, record_give_back_here(&record, slot), "give_back_here");
      p->claimed = p->was_here = false;
    } else if (!p->here) {
      record_put(&record, slot, &o), p->here = true;
    }
    break;
  case 1:
    if (p->was_here)
      break;
    record_give_back(&record, slot, &o);
    *p = (struct page){.wanted = true, .cached = p->cached, .sleeper = p->sleeper,
                       .begun = p->begun};
    break;
  case 2:
    if (p->here)
      break; /* it is read here, not at the source */
    record_keep_lost(&record, slot);
    *p = (struct page){.lost = true, .cached = p->cached, .sleeper = p->sleeper,
                       .begun = p->begun};
    break;
  default:
    woken(p, record_confirm(&record, slot, lost, &o), "confirm");
    become_done(p, lost);
    /* The call of the kernel that has placed it has woken those who slept before it was claimed. */
    p->sleeper = false;
  }
  owed.confirmed += o.confirmed, owed.present += o.present;
}

static void come_zeros(uint64_t slot) {
  uint64_t most = 1 + draw() % 10, n;
  bool news, all_new = slot % 8 == 0 && most >= 8, all_done = all_new;
  for (uint64_t i = slot; i < slot + 8 && slot % 8 == 0; i++)
    all_new &= !known(&pages[i]), all_done &= byte_of(&pages[i]) == DONE;
  n = record_zeros(&record, slot, most, &news);
  check(n == (all_new || all_done ? 8u : !known(&pages[slot])), "slot %d: %d", (int)slot, (int)n);
  check(!n || news == !all_done, " ");
  for (uint64_t i = slot; n && news && i < slot + n; i++)
    become_done(&pages[i], false), owed.confirmed++, owed.present++;
}

/* Before the seal: claims, writes and gives back. The seal and a fault may come in between. */
static void come_early(uint64_t slot) {
  struct page *p = &pages[slot];
  int cached = draw() % 3 ? -1 : draw() % 2 ? CACHED : 0;
  bool zeros = draw() % 2, fails = draw() % 8 == 0;
  bool right = !p->claimed && !p->done && (!zeros || cached < 0 || (cached > 0) == p->cached);
  check(record_claim_early(&record, slot, zeros, &cached, &owed) == right, " ");
  if (!right)
    return;
  check((cached > 0) == p->cached, " ");
  p->claimed = true, p->here = false;
  if (draw() % 8 == 0) {
    p->cached |= !zeros;
    touch(slot);
  }
  bool wake = record_early(&record, slot, fails ? NOTHING_PUT : zeros ? ZEROS_PUT : DATA_PUT, &owed);
  check(wake == p->wanted, " ");
  p->sleeper &= !wake, p->claimed = false, p->here = !fails;
  p->cached = fails ? p->cached || !zeros : !zeros;
}

static void come_zeros_early(uint64_t slot) {
  bool all_new = slot % 8 == 0, all_zeros = all_new;
  for (uint64_t i = slot; i < slot + 8 && slot % 8 == 0; i++)
    all_new &= !known(&pages[i]), all_zeros &= byte_of(&pages[i]) == HERE;
  check(record_zeros_early(&record, slot, 8, &owed) == (all_new || all_zeros), " ");
  check(!record_zeros_early(&record, slot, 7, &owed), "more than there is");
  for (uint64_t i = slot; all_new && i < slot + 8; i++)
    pages[i].here = true;
}

static void grow_old(uint64_t slot) {
  check(record_stale(&record, slot, &owed) == !pages[slot].claimed, " ");
  pages[slot].here &= pages[slot].claimed;
}

static void settle_one(uint64_t slot) {
  struct page *p = &pages[slot];
  int cached = draw() % 2 ? -1 : draw() % 2 ? CACHED : 0;
  bool right = p->here && !p->claimed && (cached < 0 || (cached > 0) == p->cached);
  check(record_claim_here(&record, slot, &cached) == right, " ");
  if (right)
    p->claimed = p->was_here = true;
}

static void give_up(uint64_t slot) {
  struct page *p = &pages[slot];
  check(record_give_up(&record, slot, &owed) == (p->done || !p->claimed), " ");
  if (!p->done && !p->claimed)
    become_done(p, false), p->sleeper = false; /* its region is gone */
}

static void poison(uint64_t slot) {
  struct page *p = &pages[slot];
  struct owed o = {0};
  if (p->claimed)
    return; /* there are no connections then */
  check(record_claim_lacking(&record, slot) == !(p->done || p->here), " ");
  if (p->done || p->here)
    return;
  p->claimed = true;
  if (draw() % 2)
    touch(slot); /* it waits for the error */
  if (draw() % 2) {
    record_unclaim(&record, slot), p->claimed = false;
  } else {
    woken(p, record_confirm(&record, slot, true, &o), "poison");
    become_done(p, true), p->sleeper = false;
  }
  owed.confirmed += o.confirmed, owed.present += o.present;
}

/* It was there when it was to be placed: one that this record explains, or one that it does not. */
static void was_there(uint64_t slot) {
  struct page *p = &pages[slot];
  if (!p->claimed || p->was_here || p->here || p->foreign)
    return;
  uint64_t first = atomic_load(&record.foreign);
  check(record_foreign(&record, slot) == !p->begun, " ");
  p->foreign = !p->begun;
  check(atomic_load(&record.foreign) == (first || p->begun ? first : slot + 1), "the first");
}

/* Everything that can be asked, and nobody forgotten. */
static void look(uint64_t slot) {
  const struct page *p = &pages[slot];
  uint64_t done = 0, present = 0, stuck = 0, next = SLOTS, none_here = slot % 8 == 0;
  for (uint64_t i = 0; i < SLOTS; i++) {
    done += pages[i].done, present += pages[i].done || pages[i].here;
    stuck += pages[i].lost && !pages[i].done;
    if (i >= slot && next == SLOTS && (byte_of(&pages[i]) & ~(CACHED | BEGUN)) == WANTED)
      next = i;
    none_here &= i < slot || i >= slot + 8 || !pages[i].here;
  }
  check(atomic_load(&record.pages[slot]) == byte_of(p), "slot %d is %#x, not %#x", (int)slot,
        atomic_load(&record.pages[slot]), byte_of(p));
  check(owed.confirmed == done && owed.present == present, "counts");
  check(atomic_load(&record.unpoisoned) == stuck, "of LOST pages");
  check(!p->sleeper || p->wanted || p->claimed || (p->lost && !p->done), "a sleeper is forgotten");
  check(record_next_wanted(&record, slot, SLOTS) == next, " ");
  uint8_t has;
  record_have(&record, slot, 1, &has);
  check(record_done(&record, slot) == p->done && has == (p->done || p->here), " ");
  check(record_in_hand(&record, slot) == (p->here && p->claimed), " ");
  check(record_none_here(&record, slot) == none_here, " ");
}

/* Many guests in which everything happens at random, page by page in no order. */
static void model(void) {
  for (unsigned guest = 0; guest < 400 / RARELY; guest++) {
    int file = new_record();
    bool staged = guest % 2;
    known_of(&record, file, staged);
    memset(pages, 0, sizeof pages), owed = (struct owed){0};
    for (unsigned i = 0; i < SLOTS; i += 1 + draw() % 16) /* an engine was killed */
      pages[i].begun = true, atomic_store(&record.pages[i], BEGUN);
    for (unsigned step = 0; step < 4000; step++) {
      uint64_t slot = draw() % (step < 2000 ? 16 : SLOTS);
      check(record_sealed(&record) == (!staged || step >= 1000), " ");
      if (staged && step < 1000) {
        (void (*const[])(uint64_t)){come_early, come_zeros_early, grow_old}[draw() % 3](slot);
        if (step == 999)
          record_seal(&record);
      } else if (pages[slot].claimed && draw() % 2) {
        go_on_with(slot);
      } else {
        void (*const any[])(uint64_t) = {touch, touch, come, come_zeros, settle_one,
                                         give_up, poison, was_there};
        any[draw() % (draw() % 20 ? 5 : 8)](slot);
      }
      look(slot);
    }
    record_close(&record), close(file);
  }
}

/* --- threads ---------------------------------------------------------------------------------- */

enum { TOUCHERS = 2, PLACERS = 2, FEW = 4, NOTHING = SLOTS };

static _Atomic unsigned placed[FEW];
static _Atomic uint64_t confirmed, sleeps_on[TOUCHERS];
static atomic_bool all_placed;

static void wake(uint64_t slot) {
  for (unsigned i = 0; i < TOUCHERS; i++) {
    uint64_t is = slot;
    atomic_compare_exchange_strong(&sleeps_on[i], &is, NOTHING);
  }
}

/* A thread of the guest sleeps before its fault is looked at, and until it is woken. */
static void *toucher_run(void *number) {
  _Atomic uint64_t *sleeps = &sleeps_on[(uintptr_t)number % TOUCHERS];
  for (uint64_t n = (uintptr_t)number << 32; !atomic_load(&all_placed); n++) {
    uint64_t slot = mix(n) % FEW;
    atomic_store(sleeps, slot);
    enum touched is = record_touch(&record, slot);
    check(is == IS_NEW || is == IS_BUSY || is == IS_DONE, "%d", is);
    if (is == IS_DONE)
      atomic_store(sleeps, NOTHING);
    while (atomic_load(sleeps) != NOTHING)
      sched_yield();
  }
  return NULL;
}

static void *placer_run(void *number) {
  for (uint64_t n = (uintptr_t)number << 32; !atomic_load(&all_placed); n++) {
    uint64_t slot = mix(n) % FEW;
    uint8_t were = 0;
    struct owed o = {0};
    if (!record_claim(&record, slot, false, &were))
      continue;
    if (mix(n) >> 32 & 1) {
      record_give_back(&record, slot, &o);
      continue;
    }
    atomic_fetch_add(&placed[slot], 1);
    wake(slot); /* as the kernel does when it places */
    if (record_confirm(&record, slot, false, &o))
      wake(slot);
    if (atomic_fetch_add(&confirmed, o.confirmed) + o.confirmed == FEW)
      atomic_store(&all_placed, true);
  }
  return NULL;
}

/* Each page is placed once and counted once, and nobody sleeps for ever. */
static void threads(void) {
  int file = new_record();
  known_of(&record, file, false);
  for (unsigned guest = 0; guest < 500 / RARELY; guest++) {
    pthread_t thread[TOUCHERS + PLACERS];
    memset((void *)record.pages, 0, SLOTS);
    atomic_store(&confirmed, 0), atomic_store(&all_placed, false);
    for (unsigned i = 0; i < FEW; i++)
      atomic_store(&placed[i], 0);
    for (uintptr_t i = 0; i < TOUCHERS + PLACERS; i++)
      check(!pthread_create(&thread[i], NULL, i < TOUCHERS ? toucher_run : placer_run,
                            (void *)(guest * 8 + i)), "thread");
    for (unsigned i = 0; i < TOUCHERS + PLACERS; i++)
      pthread_join(thread[i], NULL);
    for (unsigned i = 0; i < FEW; i++)
      check(atomic_load(&placed[i]) == 1 && record_done(&record, i), "slot %u: %u times", i,
            atomic_load(&placed[i]));
  }
  record_close(&record), close(file);
}

/* --- from one engine to the next --------------------------------------------------------------- */

static uint8_t kept_of(uint8_t is, bool staged, bool sealed, bool is_file) {
  if (is & DONE)
    return is & LOST ? DONE | LOST : DONE;
  if (is & FOREIGN)
    return FOREIGN | CLAIMED;
  if (!staged || !is_file) /* whoever had claimed it may have placed it, but nobody before the seal */
    return sealed && is & (CLAIMED | BEGUN) ? BEGUN : 0;
  uint8_t kept = 0;
  if (is & HERE && sealed)
    kept |= HERE;
  if (is & (CACHED | CLAIMED)) /* whoever had claimed it may have written */
    kept |= CACHED;
  return kept;
}

/* Each state that an engine can leave behind, in a file and in anonymous memory. */
static void goes_on(void) {
  for (unsigned kind = 0; kind < 3; kind++) {
    bool staged = kind > 0, sealed = kind != 1;
    int file = new_record();
    uint8_t left[SLOTS + 1] = {0}, bytes = SLOTS + staged;
    for (unsigned from = 0; from < 256; from += OWN) {
      uint64_t done = 0, present = 0, lost = 0, foreign = 0;
      for (unsigned i = 0; i < OWN; i++)
        left[i] = left[64 + i] = from + i < 256 ? (uint8_t)(from + i) : 0;
      left[SLOTS] = sealed && staged;
      check(pwrite(file, left, bytes, 0) == bytes, "record");
      struct pc_stats known = known_of(&record, file, !staged); /* the file says what it is */
      check(record.staged == staged && record_sealed(&record) == sealed, " ");
      for (unsigned slot = 0; slot < SLOTS; slot++) {
        if (slot % 64 >= OWN)
          continue;
        uint8_t right = kept_of(left[slot], staged, sealed, slot < OWN);
        check(atomic_load(&record.pages[slot]) == right, "%#x became %#x", left[slot],
              atomic_load(&record.pages[slot]));
        done += (right & DONE) != 0, lost += (right & LOST) != 0;
        present += staged && right & (DONE | HERE);
        foreign = foreign || !(right & FOREIGN) ? foreign : slot + 1;
      }
      check(known.confirmed_pages == done && known.present_pages == present &&
                known.lost_pages == lost && atomic_load(&record.foreign) == foreign, "counts");
      record_close(&record);
    }
    close(file);
  }
}

static const struct subtest SUBTESTS[] = {
    {"model", model},
    {"threads", threads},
    {"goes_on", goes_on},
};

int main(int argc, char **argv) {
  return subtest_main(argc, argv, SUBTESTS, sizeof SUBTESTS / sizeof *SUBTESTS);
}
