/* SPDX-License-Identifier: Apache-2.0 */
/* The first access to pages that came in a pass. A staged destination gets every page from this
 * program, by one push connection, and is sealed; then guest threads touch each page once, in random
 * order, with SETTLE 1 while the engine places pages by itself.
 *
 *   first_access MB THREADS SHM SETTLE
 *   e.g. first_access 256 1 1 0
 *
 * Prints JSON: microseconds of an access by percentile over all pages, how many of them waited (3
 * us or more), and CPU seconds of the process, the guest's threads included. SHM 0: private memory. */
#define _GNU_SOURCE
#include <sys/eventfd.h>
#include <sys/resource.h>

#include "guest_threads.h"

#include "native.h"

enum { RUN = 16, PAGES = 2 };

static int push;

static void *send_run(void *unused) {
  uint8_t *run = calloc(1, 24 + RUN * PAGE);
  (void)unused;
  for (uint64_t page = 0; page < pages; page += RUN) {
    pc_frame_encode(run, PAGES, 0, page, RUN, RUN * PAGE);
    for (uint64_t i = 0; i < RUN; i++) {
      memset(run + 24 + i * PAGE, (int)((page + i) | 1), PAGE);
      *(uint64_t *)(run + 24 + i * PAGE) = page + i + 7;
    }
    must(send(push, run, 24 + RUN * PAGE, MSG_WAITALL) == 24 + RUN * PAGE, "send");
  }
  free(run);
  return NULL;
}

static double cpu_s(void) {
  struct rusage r;
  getrusage(RUSAGE_SELF, &r);
  return (double)(r.ru_utime.tv_sec + r.ru_stime.tv_sec) +
         (double)(r.ru_utime.tv_usec + r.ru_stime.tv_usec) / 1e6;
}

int main(int argc, char **argv) {
  uint64_t a[4] = {256, 1, 1, 0};
  for (int i = 1; i < argc && i <= 4; i++)
    a[i - 1] = strtoul(argv[i], NULL, 10);
  pages = a[0] * 256, threads = a[1];
  int file = a[2] ? memfd_create("destination", MFD_CLOEXEC) : -1, ends[2];
  struct pc_region region = {.pages = pages, .page_size = PAGE, .fd = file, .pid = getpid()};
  guest = a[2] ? shared_memory_of(file) : anonymous_memory();
  region.address = (uintptr_t)guest, region.uffd = (int)uffd_open();
  must(region.uffd >= 0, "userfaultfd");
  char error[200];
  struct pc_dest *d = pc_dest_new(&region, 1, memfd_create("record", MFD_CLOEXEC),
                                  eventfd(0, EFD_CLOEXEC), 1, error);
  must(d && !pc_dest_register(d, 0), "destination");
  struct pc_stats *stats = pc_dest_stats(d);
  must(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends), "socketpair");
  push = ends[0];
  must(!pc_dest_connect(d, ends[1], NULL, 0), "connect");
  pthread_t sender;
  pthread_create(&sender, NULL, send_run, NULL);
  pthread_join(sender, NULL);
  while (__atomic_load_n(&stats->present_pages, __ATOMIC_ACQUIRE) < pages) {
    must(stats->failure == PC_OK, stats->sentence);
    usleep(1000);
  }
  must(!pc_dest_seal(d), "seal");
  double before = cpu_s();
  uint64_t begin = now_ns();
  must(!a[3] || !pc_dest_settle(d), "settle");
  guest_start();
  uint64_t all = guest_join(begin), n = 0; /* how many waited; the others are 0 in `sorted` */
  uint32_t *sorted = calloc(pages + 1, sizeof *sorted);
  for (uint64_t i = 0; i < threads; i++) {
    memcpy(sorted + n, stalls[i], stall_count[i] * sizeof *sorted);
    n += stall_count[i];
  }
  qsort(sorted, pages, sizeof *sorted, guest_compare);
  printf("{\"mb\":%llu,\"threads\":%llu,\"shm\":%llu,\"settle\":%llu,\"waited\":%.4f,\"p50_us\":%.1f,"
         "\"p90_us\":%.1f,\"p99_us\":%.1f,\"max_us\":%.1f,\"guest_s\":%.3f,\"cpu_s\":%.3f}\n",
         (unsigned long long)a[0], (unsigned long long)a[1], (unsigned long long)a[2],
         (unsigned long long)a[3], (double)n / (double)pages, sorted[pages / 2] / 1e3,
         sorted[pages * 9 / 10] / 1e3, sorted[pages * 99 / 100] / 1e3, sorted[pages - 1] / 1e3,
         (double)all / 1e9, cpu_s() - before);
  return 0;
}
