/* SPDX-License-Identifier: Apache-2.0 */
/* The two native engines in two processes, under the workload of the floor program and with its
 * arguments and JSON, so that both can be compared in one run.
 *
 *   engine_bench [tls] MB THREADS RUN SHM PUSH [SOURCE CONNECT NAMESPACE]
 *   e.g. engine_bench 512 2 16 1 1
 *
 * RUN, pages in a push frame, belongs to the floor only: the engine has its own. SHM 0: both guests
 * have private memory. PUSH is the number
 * of push connections. The source listens on SOURCE, ADDRESS:PORT, in the network namespace of the
 * file NAMESPACE; the destination stays where it was started and connects to CONNECT. By default
 * both are on loopback. With the word `tls` the connections are encrypted, as by two daemons. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "guest_threads.h"

#include "native.h"

static bool with_tls;

/* One end of a connection, once the other is doing the same. */
static struct pc_tls *secured(int fd, int server) {
  static const uint8_t key[32] = "of a benchmark";
  char error[200];
  int wants;
  if (!with_tls)
    return NULL;
  struct pc_tls *tls = pc_tls_new(fd, server, key, "benchmark", error);
  must(tls != NULL, error);
  while ((wants = pc_tls_handshake(tls, error)) > 0)
    poll(&(struct pollfd){.fd = fd, .events = wants == 1 ? POLLIN : POLLOUT}, 1, -1);
  must(!wants, error);
  return tls;
}

/* Connections arrive in the order in which the other end makes them: urgent, then push. The first
 * byte on the pipe says that the source listens, the second that it is ready, the byte back that
 * the guest runs. */
static void source_run(struct sockaddr_in *name, const char *namespace, bool shared, int pushes,
                       int ready, int go) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  must(!namespace || !setns(open(namespace, O_RDONLY | O_CLOEXEC), CLONE_NEWNET), namespace);
  int listener = listen_at(name), fd = shared ? memfd_create("source", MFD_CLOEXEC) : -1;
  uint8_t byte = 1;
  must(write(ready, &name->sin_port, 2) == 2, "source");
  uint8_t *memory = shared ? shared_memory_of(fd) : anonymous_memory();
  fill(memory);
  struct pc_region region = {(uintptr_t)memory, pages, 0, PAGE, fd, getpid(), -1};
  char error[200];
  struct pc_source *s = pc_source_new(&region, 1, eventfd(0, EFD_CLOEXEC), error);
  must(s && !pc_source_scan(s), "source");
  for (int i = 0; i <= pushes; i++) {
    fd = accept(listener, NULL, NULL);
    must(!pc_source_connect(s, fd, secured(fd, false), i == 0), "accept");
  }
  must(!pc_source_serve(s) && write(ready, &byte, 1) == 1 && read(go, &byte, 1) == 1, "source");
  if (pushes)
    pc_source_push(s, 0);
  for (;;)
    pause();
}

static struct sockaddr_in address(char *text) {
  struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
  char *colon = text ? strchr(text, ':') : NULL;
  if (colon) {
    *colon = 0;
    must(inet_pton(AF_INET, text, &name.sin_addr) == 1, text);
    name.sin_port = htons((uint16_t)atoi(colon + 1));
  }
  return name;
}

int main(int argc, char **argv) {
  uint64_t a[5] = {256, 1, 16, 1, 1};
  if (argc > 1 && !strcmp(argv[1], "tls"))
    with_tls = true, argc--, argv++;
  for (int i = 1; i < argc && i <= 5; i++)
    a[i - 1] = strtoul(argv[i], NULL, 10);
  pages = a[0] * 256, threads = a[1];
  int pushes = (int)a[4], ready[2], go[2];
  struct sockaddr_in name = address(argc > 6 ? argv[6] : NULL);
  struct sockaddr_in peer = address(argc > 7 ? argv[7] : NULL);
  must(!pipe(ready) && !pipe(go), "pipe");
  pid_t source = fork();
  if (!source)
    source_run(&name, argc > 8 ? argv[8] : NULL, a[3], pushes, ready[1], go[0]);
  close(ready[1]), close(go[0]); /* so that its end is seen */
  in_port_t port;
  must(read(ready[0], &port, 2) == 2, "source");
  if (argc <= 7)
    peer.sin_port = port;

  struct pc_region region = {.pages = pages, .page_size = PAGE, .fd = -1};
  guest = a[3] ? shared_memory("destination") : anonymous_memory();
  region.address = (uintptr_t)guest;
  region.uffd = (int)uffd_open();
  must(region.uffd >= 0, "userfaultfd");
  int wake = eventfd(0, EFD_CLOEXEC);
  char error[200];
  struct pc_dest *d = pc_dest_new(&region, 1, memfd_create("record", MFD_CLOEXEC), wake, 0,
                                  error);
  must(d && !pc_dest_register(d, 0), "destination");
  struct pc_stats *stats = pc_dest_stats(d);
  for (int i = 0; i <= pushes; i++) {
    int fd = connect_to(&peer);
    must(!pc_dest_connect(d, fd, secured(fd, true), i == 0), "connect");
  }
  uint8_t byte;
  must(read(ready[0], &byte, 1) == 1, "source");
  uint64_t begin = now_ns();
  must(write(go[1], &byte, 1) == 1, "go");
  guest_start();
  uint64_t pushed = 0;
  eventfd_t events;
  if (pushes) {
    while (__atomic_load_n(&stats->confirmed_pages, __ATOMIC_ACQUIRE) < pages) {
      must(stats->failure == PC_OK, stats->sentence);
      eventfd_read(wake, &events);
    }
    pushed = now_ns() - begin;
  }
  uint64_t all = guest_join(begin);
  guest_print(a, all, pushes ? pushed : all);
  kill(source, SIGKILL);
  waitpid(source, NULL, 0); /* its port is free for the next run */
  return 0;
}
