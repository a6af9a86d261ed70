/* SPDX-License-Identifier: Apache-2.0 */
/* What the two engines share: threads, statistics, connections, reading frames. Knows nothing of
 * userfaultfd, nor where pages come from. Every read and write of a data connection is here. */
#ifndef POSTCOPYD_ENGINE_H
#define POSTCOPYD_ENGINE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "native.h"
#include "tls.h"
#include "wire.h"

enum { PC_MAX_REGIONS = 256, PC_MAX_CONNECTIONS = 33 };

/* Statistics are plain words that Python reads while threads count, so all use relaxed atomics. */
#define count_add(field, n) __atomic_fetch_add(&(field), (n), __ATOMIC_RELAXED)
#define count_get(field) __atomic_load_n(&(field), __ATOMIC_RELAXED)
#define count_set(field, n) __atomic_store_n(&(field), (n), __ATOMIC_RELAXED)

struct region {
  struct pc_region is;
  uint64_t first;      /* number of its first page among all pages of the guest */
  uint8_t page_shift;
};

/* A data connection to read from and write to; tls NULL: without TLS. */
struct stream {
  int fd; /* -1: none */
  struct pc_tls *tls;
};

/* One data connection: its stream and the thread that reads (or, pushing, writes) it. */
struct connection {
  void *engine;
  struct stream stream;
  bool urgent, running;
  pthread_t thread;
};

void engine_wake(int wake);
/* Sets failure and sentence, unless one is set, and wakes Python. */
void engine_fail(struct pc_stats *stats, int wake, int failure, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* Ends all of the PC_MAX_CONNECTIONS connections: tells their peers, wakes and joins their threads,
 * closes the sockets. */
void engine_end_connections(struct connection *connections);
/* Forgets a failure once all connections are closed, as the next ones try again; not that the VMM
 * is gone. */
void engine_forget_connections(struct pc_stats *stats);
/* Starts a thread with all signals blocked and a name that shows in top and perf. Returns
 * -errno. */
int engine_thread(pthread_t *thread, const char *name, void *(*run)(void *), void *argument);
/* Prepares a socket that was given to an engine. */
void engine_socket(struct stream s, bool urgent);
void engine_close(struct stream s);
void engine_latency(struct pc_stats *stats, uint64_t ns);
/* Copies and checks a list of regions. Returns the number of all pages, or 0 with a sentence. */
uint64_t engine_regions(struct region *to, const struct pc_region *from, unsigned count,
                        char error[200]);

/* Reads frames from a stream. `ahead` is how many bytes beyond the present frame one recv may take:
 * on the urgent connection many small frames come by one call; on push connections only the next
 * header, so that payloads are not moved. A payload stays valid until the next call. */
struct frame_reader {
  struct stream stream;
  uint8_t *buffer;
  size_t capacity, ahead, from, to;
};
int frame_reader_init(struct frame_reader *r, struct stream s, size_t payload, size_t ahead);
void frame_reader_free(struct frame_reader *r);
/* 1: a frame; 0: the stream ended between frames; -EPROTO: not a frame; -errno otherwise. */
int frame_read(struct frame_reader *r, struct frame *f, uint8_t **payload);
/* Whether another whole header has been received already. */
static inline bool frame_waiting(const struct frame_reader *r) {
  return r->to - r->from >= FRAME_BYTES;
}

/* Writes everything, waiting as needed; changes iov. Returns 0 or -errno. */
int write_all(struct stream s, struct iovec *iov, int n);
/* Writes what it can without waiting. Returns the number of bytes, perhaps 0, or -errno. */
ssize_t write_now(struct stream s, const uint8_t *from, size_t bytes);
/* Why one of these calls has failed, in words. */
const char *stream_why(struct stream s, int failed);

#endif
