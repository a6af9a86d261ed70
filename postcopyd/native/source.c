/* SPDX-License-Identifier: Apache-2.0 */
/* The life of a source's engine: makes and connects it, has it serve and push, disconnects and
 * frees it. Owns the struct pc_source with all that is in it, the bitmaps, the eventfd `stop` and
 * the connections; borrows the RAM files, the userfaultfd that tracks, and `wake`.
 *
 * Only this file starts and joins threads of connections: pc_source_disconnect joins them, and the
 * next pass or push joins those of one that is over. The session calls these, one at a time; no
 * thread of the engine ends another. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "source.h"

/* No page was sent yet. The slots between regions count as sent, so that none is ever found. */
static void forget_sent(struct pc_source *s) {
  for (uint64_t i = 0; i < s->slots / 64; i++)
    atomic_store_explicit(&s->sent[i], 0, memory_order_relaxed);
  for (struct region *r = s->regions; r < s->regions + s->region_count; r++)
    bits_set(s->sent, r->first + r->is.pages, r->first + ((r->is.pages + 63) & ~63ull));
  s->holes.state = HOLES_UNKNOWN;
}

void pc_source_tell_losses(struct pc_source *s, int understood) {
  s->losses = understood;
}

struct pc_stats *pc_source_stats(struct pc_source *s) {
  return &s->stats;
}

/* False, with a sentence: the memory of a VMM cannot be read. */
static bool open_private(struct pc_source *s, char error[200]) {
  for (unsigned i = 0; i < s->region_count; i++) {
    const struct pc_region *r = &s->regions[i].is;
    if (r->fd >= 0)
      continue;
    int failed = private_open(&s->private, r->pid);
    if (failed)
      snprintf(error, 200, "opening the memory of process %d: %s", r->pid,
               strerrordesc_np(-failed));
    return !failed;
  }
  return true;
}

struct pc_source *pc_source_new(const struct pc_region *regions, unsigned count, int wake,
                                char error[200]) {
  struct pc_source *s = calloc(1, sizeof *s);
  if (!s) {
    snprintf(error, 200, "no memory for the engine");
    return NULL;
  }
  s->wake = wake, s->region_count = count, s->stop = -1, s->pagemap = -1;
  s->private = (struct private){-1, -1, -1, -1};
  rate_init(&s->rate);
  pthread_mutex_init(&s->holes.lock, NULL);
  pthread_cond_init(&s->holes.changed, NULL);
  for (unsigned i = 0; i < PC_MAX_CONNECTIONS; i++)
    s->connections[i] = (struct connection){.engine = s, .stream = {.fd = -1}};
  s->slots = engine_regions(s->regions, regions, count, error);
  if (s->slots) {
    s->data = calloc(s->slots / 64, sizeof *s->data);
    s->sent = calloc(s->slots / 64, sizeof *s->sent);
    if (s->data && s->sent) /* without both, pc_source_free has nothing to end */
      s->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (s->stop < 0)
      snprintf(error, 200, "making bitmaps of %llu pages: %s", (unsigned long long)s->slots,
               strerrordesc_np(errno));
  }
  order_init(&s->order, s->regions, s->slots, s->data, s->sent);
  if (s->stop < 0 || !open_private(s, error)) {
    pc_source_free(s);
    return NULL;
  }
  for (unsigned i = 0; i < count; i++)
    s->stats.total_pages += s->regions[i].is.pages;
  forget_sent(s);
  return s;
}

void connection_failed(struct pc_source *s, struct connection *c, int failed) {
  if (atomic_load(&s->stopping))
    return;
  engine_fail(&s->stats, s->wake, PC_CONNECTION, "the %s connection %s%s",
              c->urgent ? "urgent" : "push", failed ? "broke: " : "was closed by the destination",
              failed ? stream_why(c->stream, failed) : "");
}

int pc_source_connect(struct pc_source *s, int fd, struct pc_tls *tls, int urgent) {
  struct stream stream = {.fd = fd, .tls = tls};
  for (unsigned i = 0; i < PC_MAX_CONNECTIONS; i++) {
    struct connection *c = &s->connections[i];
    if (c->stream.fd >= 0)
      continue;
    engine_socket(stream, urgent);
    c->stream = stream, c->urgent = urgent;
    return 0;
  }
  engine_fail(&s->stats, s->wake, PC_CONNECTION, "more than %d connections", PC_MAX_CONNECTIONS);
  engine_close(stream);
  return -EMFILE;
}

static int start(struct pc_source *s, bool urgent, const char *name, void *(*run)(void *)) {
  for (unsigned i = 0; i < PC_MAX_CONNECTIONS; i++) {
    struct connection *c = &s->connections[i];
    if (c->stream.fd < 0 || c->urgent != urgent || c->running)
      continue;
    if (!urgent)
      count_add(s->stats.pushing, 1);
    int failed = engine_thread(&c->thread, name, run, c);
    if (failed) {
      if (!urgent)
        count_add(s->stats.pushing, -1);
      engine_fail(&s->stats, s->wake, PC_CONNECTION, "starting a thread for a connection: %s",
                  strerrordesc_np(-failed));
      return failed;
    }
    c->running = true;
  }
  return 0;
}

int pc_source_serve(struct pc_source *s) {
  return start(s, true, "pc-urgent", urgent_run);
}

int pc_source_have(struct pc_source *s, unsigned region, uint64_t first, uint64_t count,
                   const uint8_t *bits) {
  struct region *r = region < s->region_count ? &s->regions[region] : NULL;
  if (!r || first > r->is.pages || count > r->is.pages - first)
    return -EINVAL;
  uint64_t slot = r->first + first;
  for (uint64_t i = 0; i < count; i++) {
    uint64_t from = i;
    while (i < count && bits[i / 8] >> i % 8 & 1)
      i++;
    bits_set(s->sent, slot + from, slot + i); /* a word at a time */
  }
  return 0;
}

/* Joins the threads of a pass (or push) that is over, so that their connections are free again. */
static int join_pushes(struct pc_source *s) {
  if (__atomic_load_n(&s->stats.pushing, __ATOMIC_ACQUIRE))
    return -EBUSY;
  for (struct connection *c = s->connections; c < s->connections + PC_MAX_CONNECTIONS; c++)
    if (c->stream.fd >= 0 && !c->urgent && c->running) {
      pthread_join(c->thread, NULL);
      c->running = false;
    }
  return 0;
}

int pc_source_copy(struct pc_source *s, uint64_t bytes_per_second) {
  int failed = join_pushes(s);
  if (failed)
    return failed;
  s->pass = true;
  order_begin(&s->order, true, s->hot);
  rate_set(&s->rate, bytes_per_second);
  return start(s, false, "pc-push", push_run);
}

int pc_source_push(struct pc_source *s, uint64_t bytes_per_second) {
  int failed = s->pass ? join_pushes(s) : 0;
  if (failed)
    return failed;
  s->pass = false;
  order_begin(&s->order, false, s->hot);
  rate_set(&s->rate, bytes_per_second);
  return start(s, false, "pc-push", push_run);
}

void pc_source_limit(struct pc_source *s, uint64_t bytes_per_second) {
  rate_set(&s->rate, bytes_per_second);
}

void pc_source_disconnect(struct pc_source *s) {
  atomic_store(&s->stopping, true);
  eventfd_write(s->stop, 1);
  engine_end_connections(s->connections);
  forget_sent(s); /* pages on their way may be lost; the destination drops those that it has */
  eventfd_t taken;
  eventfd_read(s->stop, &taken);
  atomic_store(&s->stopping, false);
  atomic_store(&s->untold, 0);
  engine_forget_connections(&s->stats);
}

void pc_source_free(struct pc_source *s) {
  if (s->stop >= 0) {
    pc_source_disconnect(s);
    close(s->stop);
  }
  pc_source_untrack(s);
  private_close(&s->private);
  free(s->hot);
  free((void *)s->data);
  free((void *)s->sent);
  pthread_cond_destroy(&s->holes.changed);
  pthread_mutex_destroy(&s->holes.lock);
  rate_free(&s->rate);
  order_free(&s->order);
  free(s);
}
