/* SPDX-License-Identifier: Apache-2.0 */
/* What is pushed next, in sequences that can be read. Two regions: 192 pages of 4 KiB, slots 0 to
 * 191; and three pages of 2 MiB, slots 192 to 194. All of them are data, unless it is said. */
#include "engine_rig.h"

#include "order.h"

enum { SLOTS = 256, SMALLS = 192, HUGE_FIRST = SMALLS, HUGES = 3 };

static struct region regions[2] = {
    {.is = {.pages = SMALLS, .page_size = SMALL}, .first = 0, .page_shift = 12},
    {.is = {.pages = HUGES, .page_size = HUGE}, .first = HUGE_FIRST, .page_shift = 21},
};
static _Atomic uint64_t data[SLOTS / 64], sent[SLOTS / 64];
static uint64_t hot[SLOTS / 64];
static struct order order;

static void begin(bool pass, bool knows_hot) {
  order_begin(&order, pass, knows_hot ? hot : NULL);
}

static void fresh(void) {
  for (unsigned i = 0; i < SLOTS / 64; i++)
    atomic_store(&data[i], 0), atomic_store(&sent[i], 0), hot[i] = 0;
  bits_set(data, 0, SMALLS), bits_set(data, HUGE_FIRST, HUGE_FIRST + HUGES);
  bits_set(sent, HUGE_FIRST + HUGES, SLOTS); /* nobody's */
  order = (struct order){0};
  order_init(&order, regions, SLOTS, data, sent);
}

static void next_is(uint64_t slot, uint64_t run) {
  struct region *r = NULL;
  uint64_t page = 0, count = 0;
  bool found = order_next(&order, &r, &page, &count);
  check(found, "nothing; slot %d should come", (int)slot);
  check(r->first + page == slot && count == run, "%d pages from slot %d, not %d from %d",
        (int)count, (int)(r->first + page), (int)run, (int)slot);
  for (uint64_t i = slot; i < slot + run; i++)
    check(!bit_take(sent, i), "slot %d is not taken", (int)i);
}

static void nothing_is_left(void) {
  struct region *r;
  uint64_t page, count;
  check(!order_next(&order, &r, &page, &count), "%d pages more", (int)count);
}

/* From the first page on, 64 KiB at a time or one page where that is more, none across regions. */
static void from_first_to_last(void) {
  fresh(), begin(false, false);
  for (uint64_t slot = 0; slot < SMALLS; slot += 16)
    next_is(slot, 16);
  for (uint64_t slot = HUGE_FIRST; slot < HUGE_FIRST + HUGES; slot++)
    next_is(slot, 1);
  nothing_is_left();
}

/* On from the page asked for last; around; what was sent meanwhile is left out. */
static void asked_for(void) {
  fresh(), begin(false, false);
  next_is(0, 16);
  bit_take(sent, 100), order_hint(&order, 101);
  next_is(101, 16);
  next_is(117, 16);
  bits_set(sent, 137, 150);
  next_is(133, 4);
  next_is(150, 16);
  order_hint(&order, 20), order_hint(&order, 180);
  next_is(180, 12); /* the last counts */
  order_hint(&order, HUGE_FIRST + HUGES); /* behind the last page of all */
  next_is(16, 16);
}

/* A pass sends data only, and what is written again and again after all else; the push that before all
 * else, holes too. Near a page asked for it is all one. */
static void hot_and_cold(void) {
  fresh();
  for (unsigned i = 0; i < SLOTS / 64; i++)
    atomic_store(&data[i], 0);
  bits_set(data, 32, 48), bits_set(data, 64, 72);
  hot[0] = 3ull << 40 | 1ull << 50;
  begin(true, true);
  next_is(32, 8);
  next_is(42, 6);
  next_is(64, 8);
  next_is(40, 2);
  nothing_is_left();
  for (uint64_t slot = 32; slot < 48; slot++)
    bit_clear(sent, slot);
  begin(false, true);
  next_is(50, 1); /* holes were told of before, by their bits in `sent`, or are sent as zeros */
  order_hint(&order, 34);
  next_is(34, 16);
  next_is(51, 13);
}

/* A pass begins with the first page, the push where it is. */
static void where_it_begins(void) {
  fresh(), begin(true, false);
  next_is(0, 16);
  begin(false, false);
  next_is(16, 16);
  bits_set(sent, 0, SMALLS);
  for (uint64_t slot = 4; slot < 8; slot++)
    bit_clear(sent, slot);
  begin(true, false);
  next_is(4, 4);
}

/* Of many pages each is found once, wherever the guest asks, also those that were passed by. */
static void each_once(void) {
  enum { PAGES = 3 << 16, WORDS = PAGES / 64 };
  static _Atomic uint64_t all[WORDS], taken[WORDS];
  static uint64_t often[WORDS];
  struct region many = {.is = {.pages = PAGES - 100, .page_size = SMALL}, .page_shift = 12};
  for (unsigned time = 0; time < 20 / RARELY; time++) {
    uint64_t left = 0;
    for (uint64_t i = 0; i < WORDS; i++) {
      uint64_t some = draw() % 8 ? draw() & draw() : 0;
      atomic_store(&taken[i], time % 3 ? ~some : draw() % 50 ? ~0ull : 0);
      often[i] = draw() % 100 ? 0 : draw();
    }
    bits_set(taken, PAGES - 100, PAGES);
    for (uint64_t i = 0; i < WORDS; i++)
      left += (uint64_t)__builtin_popcountll(~atomic_load(&taken[i]));
    order = (struct order){0};
    order_init(&order, &many, PAGES, all, taken);
    order_begin(&order, false, time % 2 ? often : NULL);
    uint64_t page, count;
    for (struct region *r; order_next(&order, &r, &page, &count); left -= count) {
      check(count <= RUN_PAGES && count <= left, "%d", (int)count);
      if (draw() % 3 == 0) { /* asked for, and perhaps answered */
        uint64_t slot = draw() % (PAGES - 100);
        left -= bit_take(taken, slot);
        order_hint(&order, slot + 1);
      }
    }
    check(left == 0, "%d pages were not found", (int)left);
    order_free(&order);
  }
}

static const struct subtest SUBTESTS[] = {
    {"each_once", each_once},
    {"from_first_to_last", from_first_to_last},
    {"asked_for", asked_for},
    {"hot_and_cold", hot_and_cold},
    {"where_it_begins", where_it_begins},
};

int main(int argc, char **argv) {
  return subtest_main(argc, argv, SUBTESTS, sizeof SUBTESTS / sizeof *SUBTESTS);
}
