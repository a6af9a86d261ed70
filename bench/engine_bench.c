/* SPDX-License-Identifier: Apache-2.0 */
/* The two native engines in two processes over TCP loopback, under the workload of the floor
 * program (the least that sockets and userfaultfd can do), with the same arguments and the same
 * JSON, so that both can be compared in one run: guest threads touch every page once in random
 * order.
 *
 *   engine_bench MB THREADS RUN SHM PUSH     e.g. engine_bench 512 2 16 1 1
 *
 * RUN, pages in a push frame, belongs to the floor only: the engine has its own. PUSH is the number
 * of push connections. Only accesses of more than 3 us count as stalls. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native.h"

enum { MAX_THREADS = 64 };

static uint64_t pages, threads;
static uint8_t *guest;
static uint32_t *stalls[MAX_THREADS], stall_count[MAX_THREADS];

static void must(int holds, const char *what) {
  if (!holds) {
    perror(what);
    exit(1);
  }
}

/* --- the guest: as in the floor program ------------------------------------------------------- */

static void *guest_run(void *argument) {
  uint64_t id = (uintptr_t)argument, each = pages / threads, x = 88172645463325252ull + id;
  uint64_t *order = malloc(each * sizeof *order);
  for (uint64_t i = 0; i < each; i++)
    order[i] = id * each + i;
  for (uint64_t i = each - 1; i > 0; i--) {
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    uint64_t j = x % (i + 1), other = order[i];
    order[i] = order[j], order[j] = other;
  }
  stalls[id] = malloc(each * sizeof **stalls);
  for (uint64_t i = 0; i < each; i++) {
    uint64_t before = pc_monotonic_ns();
    if (*(volatile uint64_t *)(guest + order[i] * 4096) != order[i] + 7) {
      fprintf(stderr, "page %llu is wrong\n", (unsigned long long)order[i]);
      exit(1);
    }
    uint64_t ns = pc_monotonic_ns() - before;
    if (ns > 3000)
      stalls[id][stall_count[id]++] = (uint32_t)ns;
    for (volatile int k = 0; k < 3000; k++)
      ;
  }
  free(order);
  return NULL;
}

/* --- the two ends ----------------------------------------------------------------------------- */

static uint8_t *shared(int fd) {
  must(fd >= 0 && !ftruncate(fd, (off_t)pages * 4096), "memfd");
  uint8_t *at = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  must(at != MAP_FAILED, "mmap");
  return at;
}

/* Connections arrive in the order in which the other end makes them: urgent, then push. The first
 * byte on the pipe says that the source is ready, the first byte back that the guest runs. */
static void source_run(int listener, int pushes, int ready, int go) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  int fd = memfd_create("source", MFD_CLOEXEC);
  uint8_t *at = shared(fd), byte = 1;
  for (uint64_t i = 0; i < pages; i++) {
    memset(at + i * 4096, (int)i, 4096);
    *(uint64_t *)(at + i * 4096) = i + 7;
  }
  struct pc_region region = {.pages = pages, .page_size = 4096, .fd = fd};
  char error[200];
  struct pc_source *s = pc_source_new(&region, 1, eventfd(0, EFD_CLOEXEC), error);
  must(s && !pc_source_scan(s), "source");
  for (int i = 0; i <= pushes; i++)
    must(!pc_source_connect(s, accept(listener, NULL, NULL), i == 0), "accept");
  must(!pc_source_serve(s) && write(ready, &byte, 1) == 1 && read(go, &byte, 1) == 1, "source");
  if (pushes)
    pc_source_push(s, 0);
  for (;;)
    pause();
}

static int compare(const void *a, const void *b) {
  uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
  return x < y ? -1 : x > y;
}

int main(int argc, char **argv) {
  uint64_t mb = argc > 1 ? strtoul(argv[1], NULL, 10) : 256;
  threads = argc > 2 ? strtoul(argv[2], NULL, 10) : 1;
  int run = argc > 3 ? atoi(argv[3]) : 16, shm = argc > 4 ? atoi(argv[4]) : 0;
  int pushes = argc > 5 ? atoi(argv[5]) : 1;
  pages = mb * 256;
  struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
  socklen_t size = sizeof name;
  int listener = socket(AF_INET, SOCK_STREAM, 0), ready[2], go[2];
  must(!bind(listener, (void *)&name, size) && !listen(listener, 64) &&
           !getsockname(listener, (void *)&name, &size) && !pipe(ready) && !pipe(go), "socket");
  pid_t source = fork();
  if (!source)
    source_run(listener, pushes, ready[1], go[0]);

  struct pc_region region = {.pages = pages, .page_size = 4096, .fd = -1};
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
  guest = shm ? shared(memfd_create("destination", MFD_CLOEXEC))
              : mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, flags, -1, 0);
  region.address = (uintptr_t)guest;
  region.uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
  must(region.uffd >= 0, "userfaultfd");
  int wake = eventfd(0, EFD_CLOEXEC);
  char error[200];
  struct pc_dest *d = pc_dest_new(&region, 1, memfd_create("record", MFD_CLOEXEC), wake, error);
  must(d && !pc_dest_register(d), "destination");
  struct pc_stats *stats = pc_dest_stats(d);
  for (int i = 0; i <= pushes; i++) {
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    must(!connect(fd, (void *)&name, size) && !pc_dest_connect(d, fd, i == 0), "connect");
  }
  uint8_t byte;
  must(read(ready[0], &byte, 1) == 1, "source");
  uint64_t begin = pc_monotonic_ns();
  must(write(go[1], &byte, 1) == 1, "go");
  pthread_t thread[MAX_THREADS];
  for (uint64_t i = 0; i < threads; i++)
    pthread_create(&thread[i], NULL, guest_run, (void *)(uintptr_t)i);
  uint64_t pushed = 0;
  eventfd_t events;
  if (pushes) {
    while (__atomic_load_n(&stats->confirmed_pages, __ATOMIC_ACQUIRE) < pages) {
      must(stats->failure == PC_OK, stats->sentence);
      eventfd_read(wake, &events);
    }
    pushed = pc_monotonic_ns() - begin;
  }
  for (uint64_t i = 0; i < threads; i++)
    pthread_join(thread[i], NULL);
  uint64_t all = pc_monotonic_ns() - begin, n = 0;
  pushed = pushes ? pushed : all;
  uint32_t *sorted = calloc(pages + 1, sizeof *sorted);
  for (uint64_t i = 0; i < threads; i++) {
    memcpy(sorted + n, stalls[i], stall_count[i] * sizeof *sorted);
    n += stall_count[i];
  }
  qsort(sorted, n, sizeof *sorted, compare);
  printf("{\"mb\":%llu,\"threads\":%llu,\"run\":%d,\"shm\":%d,\"stalls\":%llu,\"p50_us\":%.1f,"
         "\"p90_us\":%.1f,\"p99_us\":%.1f,\"max_us\":%.1f,\"guest_s\":%.3f,\"push_s\":%.3f,"
         "\"GB/s\":%.2f}\n",
         (unsigned long long)mb, (unsigned long long)threads, run, shm, (unsigned long long)n,
         sorted[n / 2] / 1e3, sorted[n * 9 / 10] / 1e3, sorted[n * 99 / 100] / 1e3,
         sorted[n ? n - 1 : 0] / 1e3, (double)all / 1e9, (double)pushed / 1e9,
         (double)mb / 1024 / ((double)pushed / 1e9));
  kill(source, SIGKILL);
  return 0;
}
