/* SPDX-License-Identifier: Apache-2.0 */
/* What floor.c and engine_bench.c have in common, so that they differ in nothing but what moves the
 * pages: memory whose pages prove themselves, guest threads that touch each page once and note how
 * long they waited, and the JSON of it. */
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, MAX_THREADS = 64, STALL_NS = 3000, BUCKETS = 256 };

static uint64_t pages, threads;
static uint8_t *guest;
static uint32_t *stalls[MAX_THREADS], stall_count[MAX_THREADS];
static pthread_t guest_thread[MAX_THREADS];

static void must(int holds, const char *what) {
  if (!holds) {
    perror(what);
    exit(1);
  }
}

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint8_t *shared_memory_of(int fd) {
  must(fd >= 0 && !ftruncate(fd, (off_t)(pages * PAGE)), "memfd");
  uint8_t *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  must(at != MAP_FAILED, "mmap");
  return at;
}

static uint8_t *shared_memory(const char *name) {
  return shared_memory_of(memfd_create(name, MFD_CLOEXEC));
}

static uint8_t *anonymous_memory(void) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
  uint8_t *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
  must(at != MAP_FAILED, "mmap");
  return at;
}

static long uffd_open(void) {
  return syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
}

/* Each page has its number, plus 7, in its first word, and is not zeros. */
static void fill(uint8_t *at) {
  for (uint64_t i = 0; i < pages; i++) {
    memset(at + i * PAGE, (int)(i | 1), PAGE);
    *(uint64_t *)(at + i * PAGE) = i + 7;
  }
}

static int listen_at(struct sockaddr_in *name) {
  socklen_t size = sizeof *name;
  int on = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  must(fd >= 0 && !bind(fd, (void *)name, size) && !listen(fd, 64) &&
           !getsockname(fd, (void *)name, &size), "listening");
  return fd;
}

static int connect_to(const struct sockaddr_in *name) {
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  must(fd >= 0 && !connect(fd, (const void *)name, sizeof *name), "connecting");
  return fd;
}

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
    uint64_t before = now_ns();
    if (*(volatile uint64_t *)(guest + order[i] * PAGE) != order[i] + 7) {
      fprintf(stderr, "page %llu is wrong\n", (unsigned long long)order[i]);
      exit(1);
    }
    uint64_t ns = now_ns() - before;
    if (ns > STALL_NS)
      stalls[id][stall_count[id]++] = (uint32_t)ns;
    for (volatile int k = 0; k < 3000; k++) /* some work of its own */
      ;
  }
  free(order);
  return NULL;
}

static void guest_start(void) {
  for (uint64_t i = 0; i < threads; i++)
    pthread_create(&guest_thread[i], NULL, guest_run, (void *)(uintptr_t)i);
}

/* Nanoseconds from `begin` until the last thread was done. */
static uint64_t guest_join(uint64_t begin) {
  for (uint64_t i = 0; i < threads; i++)
    pthread_join(guest_thread[i], NULL);
  return now_ns() - begin;
}

static int guest_compare(const void *a, const void *b) {
  uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
  return x < y ? -1 : x > y;
}

static unsigned guest_bucket(uint32_t ns) {
  uint32_t us = ns / 1000;
  unsigned log = us >= 8 ? 31 - (unsigned)__builtin_clz(us) : 0;
  return us < 8 ? us : 8 * log + ((us >> (log - 3)) & 7);
}

/* `a`: the five arguments; how long the guest took, and the push. */
static void guest_print(const uint64_t a[5], uint64_t all, uint64_t pushed) {
  uint32_t *sorted = calloc(pages + 1, sizeof *sorted);
  uint64_t n = 0, count[BUCKETS] = {0};
  for (uint64_t i = 0; i < threads; i++) {
    memcpy(sorted + n, stalls[i], stall_count[i] * sizeof *sorted);
    n += stall_count[i];
  }
  qsort(sorted, n, sizeof *sorted, guest_compare);
  for (uint64_t i = 0; i < n; i++)
    count[guest_bucket(sorted[i])]++;
  printf("{\"mb\":%llu,\"threads\":%llu,\"run\":%llu,\"shm\":%llu,\"push\":%llu,\"stalls\":%llu,"
         "\"p50_us\":%.1f,\"p90_us\":%.1f,\"p99_us\":%.1f,\"max_us\":%.1f,\"guest_s\":%.4f,"
         "\"push_s\":%.4f,\"GB/s\":%.3f,\"latency\":{",
         (unsigned long long)a[0], (unsigned long long)a[1], (unsigned long long)a[2],
         (unsigned long long)a[3], (unsigned long long)a[4], (unsigned long long)n,
         sorted[n / 2] / 1e3, sorted[n * 9 / 10] / 1e3, sorted[n * 99 / 100] / 1e3,
         sorted[n ? n - 1 : 0] / 1e3, (double)all / 1e9, (double)pushed / 1e9,
         (double)a[0] / 1024 / ((double)pushed / 1e9));
  const char *comma = "";
  for (unsigned i = 0; i < BUCKETS; i++)
    if (count[i]) {
      printf("%s\"%u\":%llu", comma, i, (unsigned long long)count[i]);
      comma = ",";
    }
  printf("}}\n");
}
