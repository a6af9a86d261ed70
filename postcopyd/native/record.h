/* SPDX-License-Identifier: Apache-2.0 */
/* The page record: one byte for each page of the guest, in a file that outlives the process. It
 * says which thread has a page in hand and what is known of it. Only record.c writes these bytes,
 * and only it reads them while the engine lives; records/store.py reads the record of an engine
 * that has ended, see native.h. Each change is one atomic operation with a name; its function
 * returns what is left to be done (a thread to be woken, a page to be counted). Nothing here waits,
 * places or asks.
 *
 *   0                nothing is known of the page yet
 *   WANTED           a fault waits and the page was asked for
 *   CLAIMED          one thread has the page in hand; with WANTED: a fault came meanwhile
 *   DONE             confirmed: placed, or known to be zeros
 *   DONE and LOST    given up: a memory error for whatever touches it
 *   LOST             the source cannot read it, and this kernel can make no memory errors: a thread
 *                    that touches it waits, unless the page comes after all
 *   FOREIGN          with CLAIMED: it was there, and nothing explains that, see uffd_native.c
 *   BEGUN            with any but DONE: an engine that was killed had it CLAIMED
 *
 * A fault thread sets WANTED. A thread that takes a page in hand claims it (from 0, WANTED or
 * LOST), and only the claimer makes it DONE. pc_dest_poison and pc_dest_gone give up pages that no
 * thread has claimed. DONE is never taken back; a memory error that is found later makes it DONE
 * and LOST. So a page is placed once; a duplicate finds CLAIMED, DONE or HERE and is dropped.
 *
 * A staged engine gets most pages while the guest still runs at the source. It puts them into its
 * backing (backing.h), where the guest does not see them. Two more bits:
 *
 *   HERE             the backing has the right copy; with CLAIMED: it is being placed
 *   CACHED           the backing may have something else than zeros there, right or not
 *
 *   until pc_dest_seal                           from then on
 *     0 or CACHED --record_early--> HERE           HERE --fault, or settle_run--> DONE
 *     HERE --record_early--> HERE                  other --record_put--> HERE and CLAIMED --> DONE
 *     HERE --record_stale--> CACHED
 *
 * Until the seal a page may come any number of times. Its receiver claims it, which takes HERE
 * away, writes the backing, and gives it back with HERE. From the seal on HERE is right, and a
 * thread that claims such a page places it. Only a page that is DONE, or HERE and CLAIMED, can have
 * been mapped, and such a page is never written. The order is: write, HERE, CONTINUE, DONE. HERE
 * without CACHED is zeros.
 *
 * An engine that goes on with the record of a killed one keeps what is DONE (LOST or not) and what
 * is FOREIGN; of staged files also CACHED, and HERE if that engine was sealed; of all other memory,
 * if it was sealed, BEGUN, which CLAIMED becomes there. It forgets the rest: threads that waited
 * fault again.
 * A page that was placed and not yet confirmed is BEGUN or HERE then; EEXIST tells that it is
 * there. In a file a page CLAIMED without HERE was never mapped and may be written again. The byte
 * behind the last page of a staged engine's record is the seal: without it the guest has not run
 * here. */
#ifndef POSTCOPYD_RECORD_H
#define POSTCOPYD_RECORD_H

#include "engine.h"

enum {
  WANTED = 1, CLAIMED = 2, DONE = PC_PAGE_DONE, LOST = PC_PAGE_LOST, HERE = 16, CACHED = 32,
  FOREIGN = 64, BEGUN = 128
};

struct record {
  _Atomic uint8_t *pages; /* by slot; mapped */
  uint64_t slots;         /* all pages, each region rounded up to 64 */
  bool staged;
  _Atomic uint64_t unpoisoned; /* number of pages that are LOST and not DONE */
  _Atomic uint64_t foreign;    /* slot + 1 of the first FOREIGN page; 0: there is none */
};

/* What changes add to the counts. The caller sums them up, and counts them once for a run. */
struct owed {
  uint64_t confirmed; /* pages that became DONE */
  uint64_t present;   /* pages that became HERE or DONE and were neither; less those no longer so */
};

/* Maps a record of `slots` bytes: a new one, or that of an earlier engine, which was staged or not;
 * `staged` is for a new one. Adds to the counts what it keeps of an old one. */
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
  IS_BUSY,   /* asked for already, or being placed (which wakes the thread), or LOST */
  IS_ZEROS,  /* HERE: claimed for the caller, which places zeros */
  IS_HERE,   /* HERE and CACHED: claimed for the caller, which places it */
  IS_DONE,   /* placed, or known to be zeros */
  IS_LOST,   /* DONE, a memory error */
};
enum touched record_touch(struct record *c, uint64_t slot);
/* The first page in [from, to) that is WANTED and not in hand, or `to`. */
uint64_t record_next_wanted(const struct record *c, uint64_t from, uint64_t to);
/* Notes that a DONE page has turned out to be a memory error. True: that was not known. */
bool record_lost_since(struct record *c, uint64_t slot);

/* --- a page has come, after the seal ----------------------------------------------------------- */

/* Whether an engine that was killed had the page in hand, and may have placed it. */
bool record_begun(const struct record *c, uint64_t slot);
/* False if another thread has the page already. `cached`: its backing will be written. Adds the
 * page's former bits to *were. */
bool record_claim(struct record *c, uint64_t slot, bool cached, uint8_t *were);
/* The backing has the page. Called before anybody may see it and write to it. */
void record_put(struct record *c, uint64_t slot, struct owed *o);
/* A page that the caller has claimed is placed, or (`lost`) made a memory error. True: wake the
 * threads that wait for it, as it may be discarded again already. */
bool record_confirm(struct record *c, uint64_t slot, bool lost, struct owed *o);
/* A claimed page was not placed: it becomes WANTED, and is asked for on the next connection. */
void record_give_back(struct record *c, uint64_t slot, struct owed *o);
/* A claimed page was in guest memory when it was to be placed. True: nothing explains that, and it
 * is FOREIGN from here on, in the record before anybody is told. False: it is BEGUN. */
bool record_foreign(struct record *c, uint64_t slot);
/* A claimed page is unreadable at the source, and no memory error can be made of it here. */
void record_keep_lost(struct record *c, uint64_t slot);
/* Zeros have come: notes up to `most` pages of which nothing is known. Returns how many pages are
 * dealt with, 8 or 1; *news: they became DONE, else they were. 0: the first is to be claimed. */
uint64_t record_zeros(struct record *c, uint64_t slot, uint64_t most, bool *news);

/* --- a page has come, before the seal ---------------------------------------------------------- */

/* Claims a page, whose copy here is then old. Zeros are claimed in runs of pages that are all
 * CACHED or all not: *cached is that of the run, -1 for its first page. */
bool record_claim_early(struct record *c, uint64_t slot, bool zeros, int *cached, struct owed *o);
/* Gives the page back with what was put. True: wake waiting threads, as the seal came meanwhile. */
enum put { NOTHING_PUT, DATA_PUT, ZEROS_PUT };
bool record_early(struct record *c, uint64_t slot, enum put put, struct owed *o);
/* Notes eight pages of zeros, if nothing is known of any or all are that already. Else false. */
bool record_zeros_early(struct record *c, uint64_t slot, uint64_t most, struct owed *o);
/* The copy of a page here is old. False: a thread is writing it, try again. */
bool record_stale(struct record *c, uint64_t slot, struct owed *o);

/* --- a page is placed that is HERE ------------------------------------------------------------- */

/* Claims the page, if it is of the same kind as the pages before it; *cached as above. */
bool record_claim_here(struct record *c, uint64_t slot, int *cached);
/* It was not placed and is HERE as before. True: wake the threads that wait, which fault again. */
bool record_give_back_here(struct record *c, uint64_t slot);
/* Whether a thread has it in hand, and may have to give it back. */
bool record_in_hand(const struct record *c, uint64_t slot);
/* Whether none of the eight pages from here on is HERE. */
bool record_none_here(const struct record *c, uint64_t slot);

/* --- what the session asks and decides --------------------------------------------------------- */

bool record_done(const struct record *c, uint64_t slot);
/* Sets bit i % 8 of byte i / 8 if page slot + i is DONE or HERE; clears it otherwise. */
void record_have(const struct record *c, uint64_t slot, uint64_t count, uint8_t *bits);
/* Claims a missing page, to give it up. False: it is not missing. */
bool record_claim_lacking(struct record *c, uint64_t slot);
/* The page could not be given up, and is missing as before. */
void record_unclaim(struct record *c, uint64_t slot);
/* The page is not needed any more. False: a thread has it in hand, try again. */
bool record_give_up(struct record *c, uint64_t slot, struct owed *o);

#endif
