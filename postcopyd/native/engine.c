/* SPDX-License-Identifier: Apache-2.0 */
/* See engine.h. */
#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* Bytes that a push socket may hold unsent. An urgent page competes with no more than this for the
 * wire, and the link stays full at any bandwidth that this host can make. */
enum { PUSH_UNSENT_BYTES = 256 << 10 };

uint64_t pc_monotonic_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void engine_wake(int wake) {
  eventfd_write(wake, 1);
}

void engine_fail(struct pc_stats *stats, int wake, int failure, const char *format, ...) {
  /* The sentence is written before `failure`, so that a reader of that can read the sentence; -1
   * means that a thread is writing it. */
  int32_t none = PC_OK;
  if (!__atomic_compare_exchange_n(&stats->failure, &none, -1, false, __ATOMIC_ACQ_REL,
                                   __ATOMIC_RELAXED))
    return;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(stats->sentence, sizeof stats->sentence, format, arguments);
  va_end(arguments);
  __atomic_store_n(&stats->failure, failure, __ATOMIC_RELEASE);
  engine_wake(wake);
}

void engine_end_connections(struct connection *connections) {
  /* All are shut down before the first is joined: their peer may wait for the last. */
  for (struct connection *c = connections; c < connections + PC_MAX_CONNECTIONS; c++)
    if (c->stream.fd >= 0) {
      if (c->stream.tls)
        tls_end(c->stream.tls);
      shutdown(c->stream.fd, SHUT_RDWR);
    }
  for (struct connection *c = connections; c < connections + PC_MAX_CONNECTIONS; c++) {
    if (c->stream.fd < 0)
      continue;
    if (c->running)
      pthread_join(c->thread, NULL);
    engine_close(c->stream);
    c->stream = (struct stream){.fd = -1}, c->running = false;
  }
}

void engine_forget_connections(struct pc_stats *stats) {
  int32_t failure = count_get(stats->failure);
  if (failure > PC_OK && failure != PC_VMM_GONE)
    __atomic_store_n(&stats->failure, PC_OK, __ATOMIC_RELEASE); /* the sentence was read */
}

int engine_thread(pthread_t *thread, const char *name, void *(*run)(void *), void *argument) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int failed = pthread_create(thread, NULL, run, argument);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (failed)
    return -failed;
  pthread_setname_np(*thread, name);
  return 0;
}

void engine_close(struct stream s) {
  if (s.tls)
    pc_tls_free(s.tls);
  close(s.fd);
}

void engine_socket(struct stream s, bool urgent) {
  /* In tests a data connection may also be a unix socket, where these do not apply. */
  int fd = s.fd, on = 1, unsent = PUSH_UNSENT_BYTES;
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK); /* an event loop may have set it */
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  if (!urgent)
    setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof unsent);
  /* Goes before the push in this host's own queue too: pfifo_fast has bands (tc-prio(8)). Behind
   * one at 1 Gbit/s this took the median from 1.1 ms to 0.12 ms (bench/link.py). */
  int priority = 6;
  if (urgent)
    setsockopt(fd, SOL_SOCKET, SO_PRIORITY, &priority, sizeof priority);
}

void engine_latency(struct pc_stats *stats, uint64_t ns) {
  /* Eight steps for each power of two of a microsecond: percentiles are good to an eighth, and the
   * sum of eight is the plain log2 histogram. Below 8 us the steps are whole microseconds. */
  uint64_t us = ns / 1000;
  unsigned bucket = (unsigned)us;
  if (us >= 8) {
    unsigned log = 63 - (unsigned)__builtin_clzll(us);
    bucket = 8 * log + (unsigned)((us >> (log - 3)) & 7);
  }
  count_add(stats->latency[bucket < PC_LATENCY_BUCKETS ? bucket : PC_LATENCY_BUCKETS - 1], 1);
  count_add(stats->answered, 1);
  uint64_t most = count_get(stats->latency_max_ns);
  while (ns > most && !__atomic_compare_exchange_n(&stats->latency_max_ns, &most, ns, true,
                                                   __ATOMIC_RELAXED, __ATOMIC_RELAXED))
    ;
}

uint64_t engine_regions(struct region *to, const struct pc_region *from, unsigned count,
                        char error[200]) {
  uint64_t pages = 0;
  if (count == 0 || count > PC_MAX_REGIONS) {
    snprintf(error, 200, "%u regions given, 1 to %d are possible", count, PC_MAX_REGIONS);
    return 0;
  }
  for (unsigned i = 0; i < count; i++) {
    uint32_t size = from[i].page_size;
    if ((size != 4096 && size != 2u << 20) || from[i].pages == 0 || from[i].pages > 1ull << 40 ||
        from[i].address % size) {
      snprintf(error, 200, "region %u: %llu pages of %u bytes at %#llx are not possible", i,
               (unsigned long long)from[i].pages, size, (unsigned long long)from[i].address);
      return 0;
    }
    to[i].is = from[i];
    to[i].first = pages;
    to[i].page_shift = (uint8_t)__builtin_ctz(size);
    /* Regions start at multiples of 64 pages, so that no word of a bitmap belongs to two. */
    pages += (from[i].pages + 63) & ~63ull;
  }
  return pages;
}

/* Has a receiving buffer returned to the system with its connection. glibc would keep as many as
 * ever were in use: it raises this limit by itself once such a buffer was freed (mallopt(3)). */
__attribute__((constructor)) static void large_buffers_are_mapped(void) {
  mallopt(M_MMAP_THRESHOLD, 1 << 20);
}

int frame_reader_init(struct frame_reader *r, struct stream s, size_t payload, size_t ahead) {
  *r = (struct frame_reader){.stream = s, .ahead = ahead};
  r->capacity = FRAME_BYTES + payload + ahead;
  r->buffer = malloc(r->capacity);
  return r->buffer ? 0 : -ENOMEM;
}

void frame_reader_free(struct frame_reader *r) {
  free(r->buffer);
}

/* Like recv, but returns -errno. */
static ssize_t read_some(struct stream s, void *to, size_t bytes) {
  if (s.tls)
    return tls_read(s.tls, to, bytes);
  ssize_t n;
  do
    n = recv(s.fd, to, bytes, 0);
  while (n < 0 && errno == EINTR);
  return n < 0 ? -errno : n;
}

/* Gets at least `need` bytes of the frame at `from` into the buffer. 0: it ended before that. */
static int frame_fill(struct frame_reader *r, size_t need) {
  if (r->from && r->from + need > r->to) {
    memmove(r->buffer, r->buffer + r->from, r->to - r->from);
    r->to -= r->from, r->from = 0;
  }
  if (need > r->capacity)
    return -EPROTO;
  while (r->to - r->from < need) {
    size_t limit = need + r->ahead < r->capacity ? need + r->ahead : r->capacity;
    ssize_t n = read_some(r->stream, r->buffer + r->to, limit - r->to);
    if (n == 0)
      return r->to == r->from ? 0 : -ECONNRESET;
    if (n < 0)
      return (int)n;
    r->to += (size_t)n;
  }
  return 1;
}

int frame_read(struct frame_reader *r, struct frame *f, uint8_t **payload) {
  int got = frame_fill(r, FRAME_BYTES);
  if (got <= 0)
    return got;
  if (frame_decode(r->buffer + r->from, f))
    return -EPROTO;
  got = frame_fill(r, FRAME_BYTES + f->payload);
  if (got <= 0)
    return got ? got : -ECONNRESET;
  *payload = r->buffer + r->from + FRAME_BYTES;
  r->from += FRAME_BYTES + f->payload;
  return 1;
}

int write_all(struct stream s, struct iovec *iov, int n) {
  if (s.tls)
    return tls_write_all(s.tls, iov, n);
  struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)n};
  while (message.msg_iovlen) {
    ssize_t sent = sendmsg(s.fd, &message, MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno == EINTR)
        continue;
      return -errno;
    }
    size_t left = (size_t)sent;
    while (message.msg_iovlen && left >= message.msg_iov->iov_len) {
      left -= message.msg_iov->iov_len;
      message.msg_iov++, message.msg_iovlen--;
    }
    if (message.msg_iovlen) {
      message.msg_iov->iov_base = (char *)message.msg_iov->iov_base + left;
      message.msg_iov->iov_len -= left;
    }
  }
  return 0;
}

ssize_t write_now(struct stream s, const uint8_t *from, size_t bytes) {
  if (s.tls)
    return tls_write_now(s.tls, from, bytes);
  ssize_t n;
  do
    n = send(s.fd, from, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
  while (n < 0 && errno == EINTR);
  return n >= 0 ? n : errno == EAGAIN ? 0 : -errno;
}

const char *stream_why(struct stream s, int failed) {
  const char *why = s.tls ? tls_why(s.tls) : "";
  return *why ? why : strerrordesc_np(-failed);
}

void pc_frame_encode(uint8_t out[24], int kind, int region, uint64_t page, uint32_t count,
                     uint32_t payload) {
  struct frame f = {.kind = (uint8_t)kind, .region = (uint16_t)region, .page = page,
                    .count = count, .payload = payload};
  frame_encode(out, &f);
}

int pc_frame_decode(const uint8_t in[24], int64_t fields[5]) {
  struct frame f;
  if (frame_decode(in, &f))
    return -EPROTO;
  fields[0] = f.kind, fields[1] = f.region, fields[2] = (int64_t)f.page;
  fields[3] = f.count, fields[4] = f.payload;
  return 0;
}
