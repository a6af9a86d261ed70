/* SPDX-License-Identifier: Apache-2.0 */
/* The life of a destination's engine: makes, registers, connects, disconnects, stops and frees it.
 * Owns the struct pc_dest with all that is in it, the eventfd `notice`, the page of zeros, the
 * backings, the record's mapping and the connections; borrows the userfaultfds, the RAM files, the
 * record's file and `wake`.
 *
 * Only this file starts and joins threads, but for pc-place: settle.c starts it, and joins one that
 * has ended before it starts another. pc_dest_disconnect ends the threads of connections.
 * pc_dest_stop ends all, pc-place last and the fault threads before it. The session makes these
 * calls, one at a time, and pc_dest_stop by pc_dest_free; no thread of the engine ends another. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "dest.h"
#include "uffd.h"

struct pc_stats *pc_dest_stats(struct pc_dest *d) {
  return &d->stats;
}

uint64_t pc_dest_still_ns(struct pc_dest *d) {
  uint64_t now = pc_monotonic_ns(), longest = 0;
  for (unsigned i = 0; i < d->taker_count; i++) {
    uint64_t turned = atomic_load(&d->takers[i].turned_ns);
    if (d->takers[i].running && turned < now && now - turned > longest)
      longest = now - turned;
  }
  return longest;
}

/* --- made and freed --------------------------------------------------------------------------- */

static int backings_open(struct pc_dest *d, char error[200]) {
  for (unsigned i = 0; i < d->region_count; i++) {
    int failed = backing_open(&d->backings[d->backing_count++], &d->regions[i], d->record.staged,
                              d->zeros);
    if (failed) {
      snprintf(error, 200, "making a place for the pages of region %u until the guest comes: %s", i,
               strerrordesc_np(-failed));
      return failed;
    }
  }
  return 0;
}

/* Finds the userfaultfds, each with a fault thread of its own. */
static void name_takers(struct pc_dest *d) {
  for (unsigned i = 0; i < d->region_count; i++) {
    int uffd = d->regions[i].is.uffd;
    unsigned known = 0;
    while (known < d->taker_count && d->takers[known].uffd != uffd)
      known++;
    if (known == d->taker_count)
      d->takers[d->taker_count++] = (struct fault_thread){.dest = d, .uffd = uffd};
  }
}

struct pc_dest *pc_dest_new(const struct pc_region *regions, unsigned count, int record, int wake,
                            int staged, char error[200]) {
  struct pc_dest *d = calloc(1, sizeof *d);
  if (!d) {
    snprintf(error, 200, "no memory for the engine");
    return NULL;
  }
  d->wake = wake, d->region_count = count;
  asking_init(&d->asking, &d->record, d->regions, count, &d->stats);
  for (unsigned i = 0; i < PC_MAX_CONNECTIONS; i++)
    d->connections[i] = (struct connection){.engine = d, .stream = {.fd = -1}};
  d->notice = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  d->zeros = mmap(NULL, FRAME_MAX_PAYLOAD, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  bool made = d->notice >= 0 && d->zeros != MAP_FAILED;
  if (!made)
    snprintf(error, 200, "making the engine: %s", strerrordesc_np(errno));
  uint64_t slots = made ? engine_regions(d->regions, regions, count, error) : 0;
  if (!slots || record_open(&d->record, record, slots, staged, d->regions, count, &d->stats, error) ||
      backings_open(d, error)) {
    pc_dest_free(d);
    return NULL;
  }
  for (unsigned i = 0; i < count; i++)
    d->stats.total_pages += d->regions[i].is.pages;
  name_takers(d);
  if (atomic_load(&d->record.foreign))
    foreign_failed(d);
  return d;
}

void pc_dest_free(struct pc_dest *d) {
  if (d->notice >= 0) {
    pc_dest_stop(d);
    close(d->notice);
  }
  record_close(&d->record);
  for (unsigned i = 0; i < d->backing_count; i++)
    backing_close(&d->backings[i]);
  if (d->zeros != MAP_FAILED)
    munmap((void *)d->zeros, FRAME_MAX_PAYLOAD);
  asking_free(&d->asking);
  free(d);
}

/* --- registered ------------------------------------------------------------------------------- */

static int open_uffd(struct pc_dest *d, int uffd, bool again) {
  struct uffdio_api api = {.api = UFFD_API};
  if (d->record.staged)
    api.features = UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MINOR_HUGETLBFS;
  if (!again && ioctl(uffd, UFFDIO_API, &api)) {
    int failed = errno;
    engine_fail(&d->stats, d->wake, PC_MEMORY, "UFFDIO_API: %s", strerrordesc_np(failed));
    return -failed;
  }
  fcntl(uffd, F_SETFL, fcntl(uffd, F_GETFL) | O_NONBLOCK);
  return 0;
}

static int register_region(struct pc_dest *d, unsigned i) {
  struct region *r = &d->regions[i];
  struct uffdio_register range = {.range = {r->is.address, r->is.pages << r->page_shift},
                                  .mode = UFFDIO_REGISTER_MODE_MISSING};
  if (backing_of(d, r)->kind == IN_FILE)
    range.mode |= UFFDIO_REGISTER_MODE_MINOR;
  if (d->gone[i] || !ioctl(r->is.uffd, UFFDIO_REGISTER, &range))
    return 0;
  int failed = errno;
  engine_fail(&d->stats, d->wake, PC_MEMORY, "registering region %u at %#llx with userfaultfd: %s%s",
              i, (unsigned long long)r->is.address, strerrordesc_np(failed),
              failed == EBUSY    ? " (another userfaultfd has it)"
              : failed == ENOMEM ? " (or the VMM has ended)"
                                 : "");
  return -failed;
}

static int start_taker(struct pc_dest *d, struct fault_thread *taker) {
  atomic_store(&taker->turned_ns, pc_monotonic_ns());
  int failed = engine_thread(&taker->thread, "pc-faults", faults_run, taker);
  if (failed)
    engine_fail(&d->stats, d->wake, PC_MEMORY, "starting a fault thread: %s",
                strerrordesc_np(-failed));
  taker->running = !failed;
  return failed;
}

int pc_dest_register(struct pc_dest *d, int again) {
  int failed = 0;
  for (unsigned i = 0; i < d->taker_count && !failed; i++)
    failed = open_uffd(d, d->takers[i].uffd, again);
  for (unsigned i = 0; i < d->region_count && !failed; i++) {
    failed = register_region(d, i);
    if (!failed)
      d->registered = i + 1;
    else if (!again) /* with `again` the guest may wait there already, and must not read zeros */
      pc_dest_unregister(d, 1);
  }
  for (unsigned i = 0; i < d->taker_count && !failed; i++)
    failed = start_taker(d, &d->takers[i]);
  for (unsigned i = 0; again && i < d->region_count && !failed; i++)
    wake_all(&d->regions[i]); /* a message is read once; an earlier engine may have read it */
  return failed;
}

int pc_dest_unregister(struct pc_dest *d, int called_off) {
  /* With lost pages: huge pages are made of memory that is not registered, and make zeros of a
   * memory error (MADV_COLLAPSE and khugepaged on shared memory, seen on Linux 6.18). */
  if (!called_off && (count_get(d->stats.confirmed_pages) != d->stats.total_pages ||
                      count_get(d->stats.lost_pages)))
    return -EBUSY;
  int failed = 0;
  for (unsigned i = 0; i < d->registered; i++) {
    struct region *r = &d->regions[i];
    struct uffdio_range range = {r->is.address, r->is.pages << r->page_shift};
    if (d->gone[i]) /* what is mapped there is not guest RAM any more */
      continue;
    /* For a VMM that is gone the kernel says ENOMEM here. */
    if (ioctl(r->is.uffd, UFFDIO_UNREGISTER, &range) && errno != ENOMEM)
      failed = -errno;
    /* The kernel wakes the threads that wait, and then ends the registration. Where a fault does not
     * take the lock of the address space, a thread can begin to wait in between, for ever (seen on
     * Linux 6.18). */
    wake_all(r);
  }
  return failed;
}

/* --- connected -------------------------------------------------------------------------------- */

int pc_dest_connect(struct pc_dest *d, int fd, struct pc_tls *tls, int urgent) {
  struct stream stream = {.fd = fd, .tls = tls};
  struct connection *c = NULL;
  bool second = false;
  for (unsigned i = PC_MAX_CONNECTIONS; i-- > 0;) {
    if (d->connections[i].stream.fd < 0)
      c = &d->connections[i];
    else
      second |= urgent && d->connections[i].urgent;
  }
  if (!c || second) {
    engine_fail(&d->stats, d->wake, PC_CONNECTION,
                "the source made more than %d connections, or more than one for urgent pages",
                PC_MAX_CONNECTIONS);
    engine_close(stream);
    return -EMFILE;
  }
  engine_socket(stream, urgent);
  c->stream = stream, c->urgent = urgent;
  int failed = engine_thread(&c->thread, urgent ? "pc-urgent" : "pc-receive", receive_run, c);
  c->running = !failed;
  if (failed) {
    engine_fail(&d->stats, d->wake, PC_CONNECTION, "starting a thread for a connection: %s",
                strerrordesc_np(-failed));
  } else if (urgent) {
    asking_begin(&d->asking, stream);
    eventfd_write(d->notice, 1);
  }
  return failed;
}

void pc_dest_disconnect(struct pc_dest *d) {
  atomic_store(&d->ending, true);
  asking_end(&d->asking);
  engine_end_connections(d->connections);
  atomic_store(&d->ending, false);
  engine_forget_connections(&d->stats);
  if (atomic_load(&d->record.foreign))
    foreign_failed(d);
}

void pc_dest_stop(struct pc_dest *d) {
  atomic_store(&d->stopping, true);
  eventfd_write(d->notice, 1);
  pc_dest_disconnect(d);
  for (unsigned i = 0; i < d->taker_count; i++) {
    if (d->takers[i].running)
      pthread_join(d->takers[i].thread, NULL);
    d->takers[i].running = false;
  }
  if (d->settler_started)
    pthread_join(d->settler, NULL);
  d->settler_started = false;
}
