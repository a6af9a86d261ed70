/* SPDX-License-Identifier: Apache-2.0 */
/* The page record: one byte for each page of the guest, in a file that outlives the process. It says
 * who has a page in hand and what is known of it. record.c alone reads and writes these bytes, each
 * change is one atomic operation with a name, and what it leaves to be done (a thread to be woken, a
 * page to be counted) is what its function returns. Nothing here waits, places or asks.
 *
 *   0                nobody knows anything of the page yet
 *   WANTED           a fault waits and the page was asked for
 *   CLAIMED          one thread is busy with it; WANTED beside it: a fault came meanwhile
 *   DONE             confirmed: placed, or known to be zeros
 *   DONE and LOST    given up, and a memory error for whoever touches it
 *   LOST             the source cannot read it, and this kernel can make no memory errors: who
 *                    touches it waits, unless it comes after all
 *   FOREIGN          with CLAIMED: it was there, and nothing explains that, see uffd_native.c
 *   BEGUN            beside any but DONE: an engine that was killed had it CLAIMED
 *
 * A fault thread sets WANTED. A thread that has a page in hand claims it (from 0, WANTED or LOST),
 * and only the claimer makes DONE of it. pc_dest_poison and pc_dest_gone give up what nobody has
 * claimed. DONE is never taken back. So a page is placed once, and a duplicate finds DONE or CLAIMED
 * and is dropped.
 *
 * A staged engine gets most pages while the guest still runs at the source, into its backing
 * (backing.h), where nobody sees them. Two bits more:
 *
 *   HERE             the backing has what belongs there; with CLAIMED: and is being placed
 *   CACHED           the backing may have something else than zeros there, right or not
 *
 *   until pc_dest_seal                           from then on
 *     0 or CACHED --record_early--> HERE           HERE --fault, or settle_run--> DONE
 *     HERE --record_early--> HERE                  other --record_put--> HERE and CLAIMED --> DONE
 *     HERE --record_stale--> CACHED
 *
 * Until the seal a page may come any number of times: its receiver claims it, which takes HERE,
 * writes the backing, and gives it back with HERE. From the seal on HERE is right, and who claims
 * such a page places it. Only a page that is DONE, or HERE and CLAIMED, can have been mapped, and to
 * such nobody writes. The order is: write, HERE, CONTINUE, DONE. HERE without CACHED is zeros.
 *
 * An engine that goes on with the record of one that was killed keeps DONE and LOST, for files HERE
 * and CACHED too, and forgets the rest: who waited faults again, and EEXIST tells of a page that was
 * placed and not yet confirmed, which was CLAIMED then and is BEGUN. A page CLAIMED without HERE was
 * never mapped from the file and may be written again. The byte behind the last page of a staged engine's record is the seal: without it
 * the guest has not run here, and HERE is forgotten as well. */
#ifndef POSTCOPYD_RECORD_H
#define POSTCOPYD_RECORD_H

#include "engine.h"

enum {
  WANTED = 1, CLAIMED = 2, DONE = 4, LOST = 8, HERE = 16, CACHED = 32, FOREIGN = 64, BEGUN = 128
};

struct record {
  _Atomic uint8_t *pages; /* by slot; mapped */
  uint64_t slots;         /* all pages, each region rounded up to 64 */
  bool staged;
  _Atomic uint64_t unpoisoned; /* pages that are LOST and not DONE */
  _Atomic uint64_t foreign;    /* slot + 1 of the first FOREIGN page; 0: there is none */
};

/* What changes add to the counts. Whoever made them adds these up and tells, once for a run. */
struct owed {
  uint64_t confirmed; /* have become DONE */
  uint64_t present;   /* have become HERE or DONE and were neither; less those that are no more */
};

/* Maps a record of `slots` bytes, a new one or that of an engine before this one, which was staged
 * or not; `staged` is for a new one. What is kept of an old one is added to the counts. */
int record_open(struct record *c, int file, uint64_t slots, bool staged,
                const struct region *regions, unsigned count, struct pc_stats *known,
                char error[200]);
void record_close(struct record *c);
/* Whether faults are to be answered. */
bool record_sealed(const struct record *c);
void record_seal(struct record *c);

/* --- a thread of the guest touches a page ------------------------------------------------------ */

enum touched {
  IS_NEW,    /* now WANTED: to be asked for */
  IS_BUSY,   /* asked for already, or being placed (its placer will wake), or LOST */
  IS_ZEROS,  /* HERE: claimed for the caller, who places zeros */
  IS_HERE,   /* HERE and CACHED: claimed for the caller, who places it */
  IS_DONE,   /* placed, or known to be zeros */
  IS_LOST,   /* DONE, a memory error */
};
enum touched record_touch(struct record *c, uint64_t slot);
/* The first page in [from, to) that is WANTED and in nobody's hand, or `to`. */
uint64_t record_next_wanted(const struct record *c, uint64_t from, uint64_t to);
/* A DONE page has turned out to be a memory error. True: that was not known. */
bool record_lost_since(struct record *c, uint64_t slot);

/* --- a page has come, after the seal ----------------------------------------------------------- */

/* Whether an engine that was killed had it in hand, and may have placed it. */
bool record_begun(const struct record *c, uint64_t slot);
/* False when somebody has the page already. `cached`: its backing is going to be written. What it
 * was is added to *were. */
bool record_claim(struct record *c, uint64_t slot, bool cached, uint8_t *were);
/* The backing has it now, before anybody may see it and write to it. */
void record_put(struct record *c, uint64_t slot, struct owed *o);
/* A page that the caller has claimed is placed, or (`lost`) made a memory error. True: wake who waits for it, as it may be discarded again already. */
bool record_confirm(struct record *c, uint64_t slot, bool lost, struct owed *o);
/* A claimed page was not placed: it is WANTED, and is asked for again on the next connection. */
void record_give_back(struct record *c, uint64_t slot, struct owed *o);
/* A claimed page was in guest memory when it was to be placed. True: nothing explains that, and it is
 * FOREIGN from now on, in the record before anybody is told. False: it is BEGUN. */
bool record_foreign(struct record *c, uint64_t slot);
/* A claimed page cannot be read at the source, and here no memory error can be made of it. */
void record_keep_lost(struct record *c, uint64_t slot);
/* Zeros have come: notes up to `most` pages of which nobody knows anything. Returns how many pages
 * are dealt with, 8 or 1; *news: they are DONE now, else they were. 0: the first is to be claimed. */
uint64_t record_zeros(struct record *c, uint64_t slot, uint64_t most, bool *news);

/* --- a page has come, before the seal ---------------------------------------------------------- */

/* Claims a page, whose copy here is old then. Zeros are claimed in runs of those that are CACHED, and
 * of those that are not: *cached is that of the run, -1 for its first. */
bool record_claim_early(struct record *c, uint64_t slot, bool zeros, int *cached, struct owed *o);
/* What it is then. NOTHING: writing has failed. True: wake who waits, as the seal came meanwhile. */
enum put { NOTHING_PUT, DATA_PUT, ZEROS_PUT };
bool record_early(struct record *c, uint64_t slot, enum put put, struct owed *o);
/* Eight pages of zeros at a time where nobody knows anything of them, or all are that. Else false. */
bool record_zeros_early(struct record *c, uint64_t slot, uint64_t most, struct owed *o);
/* The copy of a page here is old. False: somebody is writing it, try again. */
bool record_stale(struct record *c, uint64_t slot, struct owed *o);

/* --- a page is placed that is HERE ------------------------------------------------------------- */

/* Claims it, if it is of the same kind as the pages before it; *cached as above. */
bool record_claim_here(struct record *c, uint64_t slot, int *cached);
/* It was not placed and is HERE as before. True: wake who came to wait, who faults again. */
bool record_give_back_here(struct record *c, uint64_t slot);
/* Whether somebody has it in hand, and may have to give it back. */
bool record_in_hand(const struct record *c, uint64_t slot);
/* Whether none of the eight pages from here on is HERE. */
bool record_none_here(const struct record *c, uint64_t slot);

/* --- what the session asks and decides --------------------------------------------------------- */

bool record_done(const struct record *c, uint64_t slot);
/* Bit i % 8 of byte i / 8 becomes: page slot + i is DONE or HERE. */
void record_have(const struct record *c, uint64_t slot, uint64_t count, uint8_t *bits);
/* Claims a page that lacks, to give it up. False: it does not lack. */
bool record_claim_lacking(struct record *c, uint64_t slot);
/* It could not be given up and lacks as before. */
void record_unclaim(struct record *c, uint64_t slot);
/* Nobody needs the page any more. False: somebody has it in hand, try again. */
bool record_give_up(struct record *c, uint64_t slot, struct owed *o);

#endif
