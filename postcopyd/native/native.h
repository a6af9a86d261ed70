/* SPDX-License-Identifier: Apache-2.0 */
/* The native engine as Python sees it. This file is read by the C compiler and, unchanged, by cffi:
 * plain declarations only, no preprocessor.
 *
 * Who owns what. An engine (pc_dest, pc_source) belongs to the one Python session that made it;
 * only that session calls its functions, one at a time. An engine owns its threads, its buffers,
 * its own descriptors and every connection given to it by pc_*_connect, with its pc_tls (even when
 * that fails). It borrows the descriptors in its regions and the `wake` eventfd: these stay open
 * until pc_*_free has returned. Only the engine's own functions stop its threads: pc_*_disconnect
 * those of the connections, pc_dest_stop and pc_*_free all. Any thread may read statistics at any
 * time.
 *
 * Functions return 0 or -errno, and leave a sentence in the engine's statistics. */

struct pc_region {
  uint64_t address;   /* in the VMM */
  uint64_t pages;     /* of page_size bytes */
  int64_t offset;     /* of the mapping in the file, bytes */
  uint32_t page_size; /* 4096, or 2 MiB for hugetlbfs */
  int32_t fd;         /* the RAM file; -1: anonymous memory of `pid` */
  int32_t pid;        /* source: the VMM */
  int32_t uffd;       /* destination: the userfaultfd that this region is registered with */
};

/* What failed first. The values are part of the interface between C and Python only. */
enum pc_failure {
  PC_OK = 0,
  PC_CONNECTION = 1, /* a connection ended or broke: the engine waits for new ones */
  PC_BAD_FRAME = 2,  /* the peer sent a frame that it must not send */
  PC_VMM_GONE = 3,   /* the VMM's address space is gone */
  PC_MEMORY = 4,     /* pages could not be read or placed; the sentence says why */
  PC_FOREIGN = 5,    /* destination: the kernel has put pages into guest memory. Nothing is placed
                      * any more, and new connections do not mend it */
};

enum { PC_LATENCY_BUCKETS = 256 };

/* All counts are in pages of the region that they belong to, unless the name says otherwise. */
struct pc_stats {
  uint64_t total_pages;
  uint64_t confirmed_pages;   /* destination: placed, or known to be zero */
  uint64_t zero_pages;        /* of these: holes and pages of zeros, never carried */
  uint64_t urgent_pages;      /* came (or went) on the urgent connection */
  uint64_t pushed_pages;      /* came (or went) on push connections, without zero pages */
  uint64_t duplicate_pages;   /* destination: came again and were dropped */
  uint64_t discarded_pages;   /* destination: faults on pages placed before, given zeros */
  uint64_t passed_pages;      /* of passes: sent, or received; zero pages and repetitions count */
  uint64_t precopied_pages;   /* carried in passes; destination: of the confirmed */
  uint64_t dirty_pages;       /* source: found written again after they were sent */
  uint64_t present_pages;     /* staged destination: confirmed, or put aside and right */
  uint64_t lost_pages;        /* memory errors. Destination: of the confirmed, given up by
                               * pc_dest_poison or unreadable at the source; source: told as such */
  uint64_t existing_pages;    /* destination: the kernel had a page there already (EEXIST) */
  uint64_t faults;            /* fault messages read */
  uint64_t requests;          /* pages asked for (destination), requests received (source) */
  int64_t unanswered;         /* destination: of these, on the present urgent connection */
  uint64_t answered;          /* urgent pages placed whose latency was measured */
  uint64_t transferred_bytes; /* on data connections, headers counted */
  uint64_t stalls;            /* times that placing had to wait for memory at the destination */
  uint64_t last_urgent_ns;    /* CLOCK_MONOTONIC when the last urgent page was placed */
  uint64_t latency_max_ns;    /* from the fault read to the page placed */
  uint64_t latency[256];      /* the same, by 8 * floor(log2 us) + next three bits; below 8: us */
  uint64_t beat_ns;           /* CLOCK_MONOTONIC of the last sign of life of the engine's threads */
  int32_t pushing;            /* source: push threads still at work */
  int32_t failure;            /* enum pc_failure, first one since the last connect */
  char sentence[200];         /* what went wrong; valid once failure is set */
};

/* Two bits of a page's byte in the page record (record.h has all): the page is confirmed; it is a
 * memory error. */
enum { PC_PAGE_DONE = 4, PC_PAGE_LOST = 8 };

struct pc_dest;
struct pc_source;
struct pc_tls; /* TLS 1.3 with a pre-shared key on one data connection */

/* `key` has 32 bytes; `identity` says what it is for, and must be equal on both sides; both are
 * copied. `fd` is borrowed until pc_tls_free. NULL with a sentence. */
struct pc_tls *pc_tls_new(int fd, int server, const uint8_t *key, const char *identity,
                          char error[200]);
/* 0: done; 1, 2: call it again when fd is readable, writable; -errno with a sentence. Never waits.
 * Bytes that have arrived behind the handshake are kept for the engine. */
int pc_tls_handshake(struct pc_tls *t, char error[200]);
/* Wipes the keys; does not close fd. Not to be called for a pc_tls that an engine owns. */
void pc_tls_free(struct pc_tls *t);

/* Destination. `record` is a file of one byte for each page, which the engine maps. The caller
 * makes and keeps it, so that it outlives the process. An empty file becomes a new record. With the
 * record of an earlier engine of the same guest this one goes on, and what that engine confirmed
 * counts at once. `wake` is an eventfd, written when everything is confirmed, or at a failure. */
struct pc_dest *pc_dest_new(const struct pc_region *regions, unsigned count, int record, int wake,
                            int staged, char error[200]);
/* UFFDIO_API, UFFDIO_REGISTER, and fault threads start. `again`: an earlier engine has done the
 * first two on the same userfaultfds and left them registered; threads that wait for it fault
 * again. */
int pc_dest_register(struct pc_dest *d, int again);
/* `tls` has its handshake done; NULL: no TLS. */
int pc_dest_connect(struct pc_dest *d, int fd, struct pc_tls *tls, int urgent);
/* A staged engine takes pages while the guest still runs at the source. It puts them aside (into
 * the RAM file itself, or a memfd for anonymous memory); pages written since come again; and it
 * places them only after pc_dest_seal. Until then the copy that came last is right, so nothing may
 * be on its way when a page is sent again, nor at the seal: stats.passed_pages tells what has
 * arrived, and the source sends nothing between its last pass and the seal. It must be registered
 * before it is connected. pc_dest_stale names pages whose copy here is old (bits as in
 * pc_dest_have; -EBUSY after the seal). pc_dest_seal says that all such pages were named and guest
 * RAM is final: from then on faults are answered. pc_dest_settle (-EBUSY before the seal) starts
 * placing pages that no fault asks for; all is here when stats.present_pages is total_pages. An
 * engine that is not staged is sealed from the start. One that goes on with an old record is as
 * staged and as sealed as the earlier engine; if not sealed, it has nothing yet. */
int pc_dest_stale(struct pc_dest *d, unsigned region, uint64_t first, uint64_t count,
                  const uint8_t *bits);
int pc_dest_seal(struct pc_dest *d);
int pc_dest_settle(struct pc_dest *d);
void pc_dest_disconnect(struct pc_dest *d); /* ends the connections; faults are still taken */
/* Sets bit i % 8 of byte i / 8 if page first + i is confirmed, or was put aside and is right;
 * clears it otherwise. -EINVAL outside the region. */
int pc_dest_have(struct pc_dest *d, unsigned region, uint64_t first, uint64_t count, uint8_t *bits);
/* A person has decided that the missing pages are lost: they become memory errors (SIGBUS) and
 * count as confirmed. Returns how many; -EBUSY while there are connections, when not sealed, and
 * after PC_FOREIGN. Only the VMM's page tables know of the errors; the memory file has holes or old
 * copies there. A reader of the file gets those, so no source's engine may read it; and a huge
 * page made of memory that is not registered turns them into guest memory. */
int64_t pc_dest_poison(struct pc_dest *d);
/* The VMM has unmapped this region for good: its pages are not needed any more, and count as
 * confirmed. The caller must have seen that in /proc: if it is wrong the pages become zeros. -EBUSY
 * as for pc_dest_poison. Called before pc_dest_register of an engine that goes on with a record, or
 * after it. */
int pc_dest_gone(struct pc_dest *d, unsigned region);
/* -EBUSY while pages are missing or when some were lost, unless the guest is called off. */
int pc_dest_unregister(struct pc_dest *d, int called_off);
void pc_dest_stop(struct pc_dest *d);
void pc_dest_free(struct pc_dest *d);
struct pc_stats *pc_dest_stats(struct pc_dest *d);
/* How long ago the fault thread that is furthest behind last went round; idle ones do so every
 * second. May be called at any time by any thread. */
uint64_t pc_dest_still_ns(struct pc_dest *d);

/* Source. pc_source_scan finds data and may be called while the guest runs; pc_source_serve and
 * pc_source_push only while it is stopped, for good or until pc_source_disconnect. */
struct pc_source *pc_source_new(const struct pc_region *regions, unsigned count, int wake,
                                char error[200]);
/* Process `pid` keeps the memory that has no file, also when the VMM has ended. Between
 * connections, or while they are at work. Returns -errno if there is no such process. */
int pc_source_kept(struct pc_source *s, int pid);
/* One step of some milliseconds. 1: there is more to look at, 0: all was looked at. */
int pc_source_scan(struct pc_source *s);
/* Whether the destination understands frames of lost pages; by default not. Called between
 * connections. If it does not, the engine fails once all else was pushed. */
void pc_source_tell_losses(struct pc_source *s, int understood);
int pc_source_connect(struct pc_source *s, int fd, struct pc_tls *tls, int urgent);
/* The destination has these pages (bits as pc_dest_have gives them), so they are not pushed. Called
 * between pc_source_connect and pc_source_push; forgotten by pc_source_disconnect. -EINVAL outside
 * the region. */
int pc_source_have(struct pc_source *s, unsigned region, uint64_t first, uint64_t count,
                   const uint8_t *bits);
/* While the guest runs. `uffd` is a new userfaultfd of the VMM, borrowed; it tracks writes to guest
 * RAM until pc_source_untrack or free. pc_source_look finds what is to be sent, or sent again: new
 * data, pages written since they were armed, and discarded pages; it returns the number of all
 * pages to be sent. pc_source_copy sends them, like pc_source_push but without the holes. Look,
 * copy and push are -EBUSY during a pass (stats.pushing). Before a look all that was sent must have
 * arrived, or a page may overtake its older copy. pc_source_stale sets a bit for each page to be
 * sent and returns their number. pc_source_disconnect forgets a failure to track (-EOPNOTSUPP
 * before Linux 6.7), so that pure postcopy can go on. */
int pc_source_track(struct pc_source *s, int uffd);
enum pc_look {
  PC_LOOK_ONLY = 0,
  PC_LOOK_ARM = 1, /* and arms them again, atomically; never with direct I/O in flight, which is not
                    * seen once its pages are armed */
  PC_LOOK_STOPPED = 2, /* in a blackout: on all CPUs, and without discarded pages */
};
int64_t pc_source_look(struct pc_source *s, int how);
int pc_source_copy(struct pc_source *s, uint64_t bytes_per_second);
int64_t pc_source_stale(struct pc_source *s, unsigned region, uint64_t first, uint64_t count,
                        uint8_t *bits);
void pc_source_untrack(struct pc_source *s);
/* What the first write to a tracked page costs a process of this host, in nanoseconds: the median
 * of some hundred pages of this process. (A vCPU also pays for leaving the guest.) */
int64_t pc_track_cost_ns(void);
int pc_source_serve(struct pc_source *s);
int pc_source_push(struct pc_source *s, uint64_t bytes_per_second); /* 0: no limit */
/* Changes the rate of a pass or a push, at any time; a thread that waits sees it within 0.1 s. */
void pc_source_limit(struct pc_source *s, uint64_t bytes_per_second);
void pc_source_disconnect(struct pc_source *s);
void pc_source_free(struct pc_source *s);
struct pc_stats *pc_source_stats(struct pc_source *s);

uint64_t pc_monotonic_ns(void);

/* What this kernel does with watched memory; tried on this process's memory, in milliseconds
 * (probe.c). -errno: could not be tried; -EOPNOTSUPP: the kernel lacks what is needed. */

/* Whether PAGEMAP_SCAN tells the truth about written pages: 0, or what is wrong with it. */
enum pc_probe {
  PC_SEES_QUIET = 1,     /* a page that was not written since it was armed counts as written */
  PC_MISSES_WRITTEN = 2, /* a write is not seen */
  PC_MISSES_ZAPPED = 4,  /* not after the page has left the page tables (swapped out) */
  PC_MISSES_TABLES = 8,  /* not after the page table has gone (a huge page split or swapped out) */
};
int pc_probe_written(void);
/* 1: a huge page that khugepaged makes of a file's pages, at any time, has zeros for missing pages,
 * even where a userfaultfd waits for them: the guest reads zeros. 0: such a range is left alone. */
int pc_probe_huge_zeros(void);

/* process_madvise(MADV_COLLAPSE) on one range of another process: makes huge pages. Needs
 * CAP_SYS_NICE there. It holds a lock of that process while it copies: give it one huge page at a
 * time. Linux before 6.1 answers -EINVAL. */
int pc_collapse(int pidfd, uint64_t address, uint64_t bytes);

/* The frame codec of wire.h, for the tests that compare it with Python's. */
void pc_frame_encode(uint8_t out[24], int kind, int region, uint64_t page, uint32_t count,
                     uint32_t payload);
int pc_frame_decode(const uint8_t in[24], int64_t fields[5]);
