/* SPDX-License-Identifier: Apache-2.0 */
/* The floor: the least that two processes, blocking sockets and userfaultfd can do on this machine.
 * No protocol, no checks, no record of what has arrived. What the engine takes is compared with it.
 *
 *   floor MB THREADS RUN SHM PUSH     e.g. floor 512 2 16 1 1
 *
 * MB of memory at the source. THREADS guest threads at the destination touch each page once, in
 * random order (0: nobody does). RUN pages in a push frame. SHM 1: shared memory at the
 * destination, as VMMs use it, 0: anonymous. PUSH push connections; 0: urgent pages only. One JSON
 * object: latencies in microseconds of the accesses that waited more than 3 us, and their
 * distribution in the buckets of engine_latency() in postcopyd/engine.c. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest_threads.h"

#include "uffd.h"

enum { MAX_PUSHES = 32, UNSENT = 256 << 10 };

struct run {
  uint64_t first, count; /* count 0: no more will come */
};

static uint64_t run_pages, pushes;

static void get(int fd, void *to, size_t bytes) {
  for (char *at = to; bytes;) {
    ssize_t n = read(fd, at, bytes);
    if (n <= 0)
      exit(0); /* the other end is done */
    at += n, bytes -= (size_t)n;
  }
}

static void put(int fd, void *head, size_t head_bytes, void *body, size_t body_bytes) {
  struct iovec iov[2] = {{head, head_bytes}, {body, body_bytes}};
  for (int i = 0; i < 2;) {
    ssize_t n = writev(fd, iov + i, 2 - i);
    if (n < 0)
      exit(0);
    for (; i < 2 && (size_t)n >= iov[i].iov_len; i++)
      n -= (ssize_t)iov[i].iov_len;
    if (i < 2)
      iov[i].iov_base = (char *)iov[i].iov_base + n, iov[i].iov_len -= (size_t)n;
  }
}

/* --- source ----------------------------------------------------------------------------------- */

static uint8_t *memory;
static atomic_uchar *sent;
static uint64_t cursor;
static pthread_mutex_t choosing = PTHREAD_MUTEX_INITIALIZER;

static void *answer(void *argument) {
  int fd = (int)(intptr_t)argument;
  for (uint64_t page;;) {
    get(fd, &page, sizeof page);
    if (!atomic_exchange(&sent[page], 1)) /* else it is on its way on a push connection */
      put(fd, &page, sizeof page, memory + page * PAGE, PAGE);
  }
  return NULL;
}

/* The next pages that nobody has sent yet, at most `run_pages`; count 0: there are no more. */
static struct run next_run(void) {
  struct run r = {0, 0};
  pthread_mutex_lock(&choosing);
  while (cursor < pages && r.count == 0) {
    r.first = cursor;
    while (cursor < pages && r.count < run_pages && !atomic_exchange(&sent[cursor], 1))
      cursor++, r.count++;
    cursor += r.count == 0;
  }
  pthread_mutex_unlock(&choosing);
  return r;
}

static void *push(void *argument) {
  int fd = (int)(intptr_t)argument;
  for (struct run r = {0, 1}; r.count;) {
    r = next_run();
    put(fd, &r, sizeof r, memory + r.first * PAGE, r.count * PAGE);
  }
  return NULL;
}

static void source(int listener, int ready, int go) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  memory = shared_memory("source");
  fill(memory);
  sent = calloc(pages, 1);
  int fd[1 + MAX_PUSHES], on = 1, unsent = UNSENT;
  for (uint64_t i = 0; i <= pushes; i++) {
    fd[i] = accept(listener, NULL, NULL);
    must(fd[i] >= 0, "accept");
    setsockopt(fd[i], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (i)
      setsockopt(fd[i], IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof unsent);
  }
  uint8_t byte = 1;
  must(write(ready, &byte, 1) == 1 && read(go, &byte, 1) == 1, "source");
  for (uint64_t i = 0; i <= pushes; i++) {
    pthread_t thread;
    pthread_create(&thread, NULL, i ? push : answer, (void *)(intptr_t)fd[i]);
  }
  for (;;)
    pause();
}

/* --- destination ------------------------------------------------------------------------------ */

static int uffd, urgent;

static void *take_faults(void *argument) {
  (void)argument;
  struct uffd_msg messages[16];
  uint64_t asked[16];
  for (;;) {
    struct pollfd ready = {uffd, POLLIN, 0};
    poll(&ready, 1, -1);
    ssize_t n = read(uffd, messages, sizeof messages) / (ssize_t)sizeof *messages;
    for (ssize_t i = 0; i < n; i++)
      asked[i] = (messages[i].arg.pagefault.address - (uintptr_t)guest) / PAGE;
    if (n > 0)
      put(urgent, asked, (size_t)n * sizeof *asked, NULL, 0);
  }
  return NULL;
}

static void place(const uint8_t *from, uint64_t page, uint64_t count) {
  while (count) {
    uint64_t to = (uintptr_t)guest + page * PAGE, done = count;
    struct uffdio_copy copy = {.dst = to, .src = (uintptr_t)from, .len = count * PAGE};
    if (ioctl(uffd, UFFDIO_COPY, &copy)) {
      done = copy.copy > 0 ? (uint64_t)copy.copy / PAGE : 0;
      if (!done && errno == EEXIST) {
        struct uffdio_range range = {to, PAGE};
        ioctl(uffd, UFFDIO_WAKE, &range);
        done = 1;
      } else {
        must(done || errno == EAGAIN, "UFFDIO_COPY");
      }
    }
    page += done, count -= done, from += done * PAGE;
  }
}

static void *take_urgent(void *argument) {
  (void)argument;
  uint8_t *page = aligned_alloc(PAGE, PAGE);
  for (uint64_t number;;) {
    get(urgent, &number, sizeof number);
    get(urgent, page, PAGE);
    place(page, number, 1);
  }
  return NULL;
}

static void *take_pushed(void *argument) {
  int fd = (int)(intptr_t)argument;
  uint8_t *buffer = aligned_alloc(PAGE, run_pages * PAGE);
  for (struct run r;;) {
    get(fd, &r, sizeof r);
    if (!r.count)
      break;
    get(fd, buffer, r.count * PAGE);
    place(buffer, r.first, r.count);
  }
  return NULL;
}

int main(int argc, char **argv) {
  uint64_t a[5] = {256, 1, 16, 1, 1};
  for (int i = 1; i < argc && i <= 5; i++)
    a[i - 1] = strtoul(argv[i], NULL, 10);
  pages = a[0] * 256, threads = a[1], run_pages = a[2], pushes = a[4];
  must(pages && threads <= MAX_THREADS && run_pages && pushes <= MAX_PUSHES, "arguments");
  signal(SIGPIPE, SIG_IGN);
  struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
  int ready[2], go[2], listener = listen_at(&name);
  must(!pipe(ready) && !pipe(go), "pipe");
  pid_t child = fork();
  if (!child)
    source(listener, ready[1], go[0]);
  close(ready[1]), close(go[0]); /* so that its end is seen */

  guest = a[3] ? shared_memory("destination") : anonymous_memory();
  uffd = (int)uffd_open();
  struct uffdio_api api = {.api = UFFD_API};
  struct uffdio_register range = {.range = {(uintptr_t)guest, pages * PAGE},
                                  .mode = UFFDIO_REGISTER_MODE_MISSING};
  must(uffd >= 0 && !ioctl(uffd, UFFDIO_API, &api) && !ioctl(uffd, UFFDIO_REGISTER, &range),
       "userfaultfd");
  int fd[1 + MAX_PUSHES];
  for (uint64_t i = 0; i <= pushes; i++)
    fd[i] = connect_to(&name);
  urgent = fd[0];
  int on = 1;
  setsockopt(urgent, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  uint8_t byte;
  must(read(ready[0], &byte, 1) == 1, "source");
  pthread_t thread;
  pthread_create(&thread, NULL, take_faults, NULL);
  pthread_create(&thread, NULL, take_urgent, NULL);
  pthread_t receivers[MAX_PUSHES];
  for (uint64_t i = 0; i < pushes; i++)
    pthread_create(&receivers[i], NULL, take_pushed, (void *)(intptr_t)fd[1 + i]);

  uint64_t begin = now_ns();
  must(write(go[1], &byte, 1) == 1, "go");
  guest_start();
  for (uint64_t i = 0; i < pushes; i++)
    pthread_join(receivers[i], NULL);
  uint64_t pushed = now_ns() - begin, all = guest_join(begin);
  guest_print(a, all, pushes ? pushed : all);
  kill(child, SIGKILL);
  waitpid(child, NULL, 0); /* its port is free for the next run */
  return 0;
}
