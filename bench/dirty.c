/* SPDX-License-Identifier: Apache-2.0 */
/* What it costs to see a guest's writes: `dirty MB DATA_MB LOOKS` prints one line of JSON. A child
 * process plays the VMM: it has MB of guest RAM mapped from a memfd, of which DATA_MB, in pieces of
 * 4 MiB far apart, are data. The engine tracks it as the daemon does and looks LOOKS times after
 * nothing was written, 1000 pages of each GiB of data, and a tenth of all data. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine.h"

enum { PAGE = 4096, PIECE = (4 << 20) / PAGE };

static uint64_t all_pages, data_pages;
static uint8_t *ram;

static void must(bool holds, const char *what) {
  if (!holds) {
    perror(what);
    exit(1);
  }
}

/* The place of a page of data: pieces are spread over all of RAM. */
static uint8_t *place(uint64_t page) {
  uint64_t pieces = data_pages / PIECE, apart = all_pages / PIECE / pieces;
  return ram + (page / PIECE * apart * PIECE + page % PIECE) * PAGE;
}

/* Each order is how many pages to write, no two of them neighbours; the answer is a byte. */
static void vmm(int orders, int uffd) {
  uint64_t pages, next = 0;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  must(write(orders, &uffd, sizeof uffd) == sizeof uffd, "socket");
  while (read(orders, &pages, sizeof pages) == sizeof pages) {
    for (uint64_t i = 0; i < pages; i++)
      *(volatile uint64_t *)place((next += pages < data_pages ? 7 : 1) % data_pages) += 1;
    must(write(orders, "", 1) == 1, "socket");
  }
  _exit(0);
}

static void write_pages(int orders, uint64_t pages) {
  char done;
  must(write(orders, &pages, sizeof pages) == sizeof pages && read(orders, &done, 1) == 1, "VMM");
}

static long page_tables_kb(int pid) {
  char path[64], line[256];
  long kb = -1;
  snprintf(path, sizeof path, "/proc/%d/status", pid);
  FILE *f = fopen(path, "r");
  while (f && fgets(line, sizeof line, f))
    sscanf(line, "VmPTE: %ld kB", &kb);
  if (f)
    fclose(f);
  return kb;
}

static double look_ms(struct pc_source *s, int how, uint64_t expected) {
  static uint8_t all[1 << 20];
  uint64_t before = pc_monotonic_ns();
  int64_t found = pc_source_look(s, how);
  double ms = (double)(pc_monotonic_ns() - before) / 1e6;
  if (found != (int64_t)expected) {
    fprintf(stderr, "%lld pages found, %llu written: %s\n", (long long)found,
            (unsigned long long)expected, pc_source_stats(s)->sentence);
    exit(1);
  }
  memset(all, 0xff, sizeof all); /* as if they had been sent */
  for (uint64_t page = 0, n; page < all_pages; page += n) {
    n = all_pages - page < 8 * sizeof all ? all_pages - page : 8 * sizeof all;
    pc_source_have(s, 0, page, n, all);
  }
  return ms;
}

static void looks(const char *name, struct pc_source *s, int orders, uint64_t pages, int times) {
  printf("\"%s\": [", name);
  for (int i = 0; i < times; i++) {
    write_pages(orders, pages);
    printf("%s%.4f", i ? ", " : "", look_ms(s, PC_LOOK_ARM, pages));
  }
  printf("], ");
}

int main(int argc, char **argv) {
  char error[200];
  int ends[2], uffd;
  must(argc == 4, "dirty MB DATA_MB LOOKS");
  all_pages = strtoull(argv[1], NULL, 10) * (1 << 20) / PAGE;
  data_pages = strtoull(argv[2], NULL, 10) * (1 << 20) / PAGE;
  int times = atoi(argv[3]), file = memfd_create("guest", MFD_CLOEXEC);
  must(file >= 0 && !ftruncate(file, (off_t)(all_pages * PAGE)), "memfd");
  ram = mmap(NULL, all_pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  must(ram != MAP_FAILED && !socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), "RAM");
  int pid = fork();
  if (pid == 0)
    vmm(ends[1], (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
  must(read(ends[0], &uffd, sizeof uffd) == sizeof uffd, "VMM");
  uffd = (int)syscall(SYS_pidfd_getfd, (int)syscall(SYS_pidfd_open, pid, 0), uffd, 0);
  must(uffd >= 0, "userfaultfd");
  write_pages(ends[0], data_pages);
  struct pc_region region = {.address = (uintptr_t)ram, .pages = all_pages, .page_size = PAGE,
                             .fd = file, .pid = pid};
  struct pc_source *s = pc_source_new(&region, 1, eventfd(0, 0), error);
  must(s != NULL, error);
  long tables = page_tables_kb(pid);
  uint64_t before = pc_monotonic_ns();
  pc_source_scan(s); /* the search for data is of every migration, tracked or not */
  printf("{\"find_data_ms\": %.3f, ", (double)(pc_monotonic_ns() - before) / 1e6);
  before = pc_monotonic_ns();
  must(!pc_source_track(s, uffd), pc_source_stats(s)->sentence);
  printf("\"track_ms\": %.3f, ", (double)(pc_monotonic_ns() - before) / 1e6);
  printf("\"first_ms\": %.3f, ", look_ms(s, PC_LOOK_ARM, data_pages));
  looks("clean_ms", s, ends[0], 0, times);
  looks("few_ms", s, ends[0], data_pages * 1000 / (1 << 18), times);
  looks("tenth_ms", s, ends[0], data_pages / 10, times);
  looks("all_ms", s, ends[0], data_pages, times);
  write_pages(ends[0], data_pages / 10);
  printf("\"last_ms\": %.3f, ", look_ms(s, PC_LOOK_STOPPED, data_pages / 10));
  printf("\"page_tables_kb\": %ld, ", page_tables_kb(pid) - tables);
  before = pc_monotonic_ns();
  pc_source_untrack(s);
  printf("\"untrack_ms\": %.3f, ", (double)(pc_monotonic_ns() - before) / 1e6);
  printf("\"fault_ns\": %lld}\n", (long long)pc_track_cost_ns());
  pc_source_free(s);
  kill(pid, SIGKILL);
  waitpid(pid, NULL, 0);
  return 0;
}
