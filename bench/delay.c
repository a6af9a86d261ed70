/* SPDX-License-Identifier: Apache-2.0 */
/* A TCP proxy that makes a link longer: what comes in leaves so many microseconds later, in each
 * direction, at any rate. For kernels without netem.
 *
 *   delay LISTEN_PORT CONNECT_ADDRESS CONNECT_PORT MICROSECONDS
 *
 * Listens on 127.0.0.1. Ends with its parent. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* Bytes under way in one direction: more than 10 Gbit/s for 5 ms. */
enum { BYTES = 16 << 20, CHUNKS = 16384, CHUNK_BYTES = 256 << 10 };

struct pump {
  int in, out;
  pthread_mutex_t lock;
  pthread_cond_t changed;
  uint64_t bytes_in, bytes_out, chunks_in, chunks_out;
  struct chunk {
    size_t bytes; /* 0: the end */
    uint64_t due_ns;
  } chunks[CHUNKS];
  uint8_t ring[BYTES];
};

static uint64_t delay_ns;

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void *take(void *argument) {
  struct pump *p = argument;
  for (ssize_t n = 1; n > 0;) {
    pthread_mutex_lock(&p->lock);
    while (p->bytes_in - p->bytes_out == BYTES || p->chunks_in - p->chunks_out == CHUNKS)
      pthread_cond_wait(&p->changed, &p->lock);
    size_t room = BYTES - (p->bytes_in - p->bytes_out), at = p->bytes_in % BYTES;
    pthread_mutex_unlock(&p->lock);
    room = room < BYTES - at ? room : BYTES - at;
    n = read(p->in, p->ring + at, room < CHUNK_BYTES ? room : CHUNK_BYTES);
    pthread_mutex_lock(&p->lock);
    p->chunks[p->chunks_in++ % CHUNKS] =
        (struct chunk){n > 0 ? (size_t)n : 0, now_ns() + delay_ns};
    p->bytes_in += n > 0 ? (uint64_t)n : 0;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
  }
  return NULL;
}

static void *give(void *argument) {
  struct pump *p = argument;
  prctl(PR_SET_TIMERSLACK, 1);
  for (;;) {
    pthread_mutex_lock(&p->lock);
    while (p->chunks_in == p->chunks_out)
      pthread_cond_wait(&p->changed, &p->lock);
    struct chunk c = p->chunks[p->chunks_out % CHUNKS];
    uint8_t *from = p->ring + p->bytes_out % BYTES;
    pthread_mutex_unlock(&p->lock);
    struct timespec due = {(time_t)(c.due_ns / 1000000000u), (long)(c.due_ns % 1000000000u)};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
    for (size_t done = 0; done < c.bytes;) {
      ssize_t n = write(p->out, from + done, c.bytes - done);
      if (n < 0)
        c.bytes = 0;
      done += n > 0 ? (size_t)n : 0;
    }
    if (!c.bytes)
      break;
    pthread_mutex_lock(&p->lock);
    p->bytes_out += c.bytes, p->chunks_out++;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
  }
  shutdown(p->in, SHUT_RDWR), shutdown(p->out, SHUT_RDWR);
  return NULL;
}

static void pump(int in, int out) {
  struct pump *p = calloc(1, sizeof *p); /* until the process ends */
  pthread_t thread;
  p->in = in, p->out = out;
  pthread_mutex_init(&p->lock, NULL), pthread_cond_init(&p->changed, NULL);
  pthread_create(&thread, NULL, take, p), pthread_create(&thread, NULL, give, p);
}

int main(int argc, char **argv) {
  if (argc != 5)
    return 2;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  signal(SIGPIPE, SIG_IGN);
  delay_ns = strtoul(argv[4], NULL, 10) * 1000;
  struct sockaddr_in here = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)},
                             .sin_port = htons((uint16_t)atoi(argv[1]))};
  struct sockaddr_in there = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[3]))};
  int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (inet_pton(AF_INET, argv[2], &there.sin_addr) != 1 ||
      bind(listener, (void *)&here, sizeof here) || listen(listener, 64)) {
    perror("delay: listening");
    return 1;
  }
  printf("listening\n"), fflush(stdout);
  for (;;) {
    int in = accept(listener, NULL, NULL), out = socket(AF_INET, SOCK_STREAM, 0);
    if (in < 0 || connect(out, (void *)&there, sizeof there)) {
      perror("delay: connecting");
      return 1;
    }
    setsockopt(in, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(out, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    pump(in, out), pump(out, in);
  }
}
