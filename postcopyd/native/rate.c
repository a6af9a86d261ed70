/* SPDX-License-Identifier: Apache-2.0 */
/* See rate.h. */
#define _GNU_SOURCE
#include "rate.h"

#include <poll.h>
#include <time.h>

/* How far a push that was held up may exceed its bandwidth to catch up. */
enum { BURST_NS = 10000000 };
/* How long a push that is held up waits before it looks again: the rate may have changed. */
enum { HOLD_NS = 100000000 };

void rate_init(struct rate *rate) {
  pthread_mutex_init(&rate->lock, NULL);
}

void rate_free(struct rate *rate) {
  pthread_mutex_destroy(&rate->lock);
}

void rate_set(struct rate *rate, uint64_t bytes_per_second) {
  pthread_mutex_lock(&rate->lock);
  uint64_t now = pc_monotonic_ns(), was = rate->bytes_per_second;
  bool owes = rate->paid_until_ns > now;
  double owed = owes && was ? (double)(rate->paid_until_ns - now) * (double)was : 0;
  if (owes)
    rate->paid_until_ns = now + (bytes_per_second ? (uint64_t)(owed / (double)bytes_per_second) : 0);
  rate->bytes_per_second = bytes_per_second;
  pthread_mutex_unlock(&rate->lock);
}

void rate_pay(struct rate *rate, uint64_t bytes) {
  if (!rate->bytes_per_second)
    return;
  pthread_mutex_lock(&rate->lock);
  uint64_t now = pc_monotonic_ns(), is = rate->bytes_per_second;
  if (rate->paid_until_ns + BURST_NS < now)
    rate->paid_until_ns = now - BURST_NS;
  if (is)
    rate->paid_until_ns += (uint64_t)((double)bytes * 1e9 / (double)is);
  pthread_mutex_unlock(&rate->lock);
}

bool rate_wait(struct rate *rate, int stop) {
  if (!rate->bytes_per_second)
    return true;
  pthread_mutex_lock(&rate->lock);
  uint64_t now = pc_monotonic_ns(), until = rate->paid_until_ns;
  pthread_mutex_unlock(&rate->lock);
  if (until <= now)
    return true;
  struct timespec wait = {0, (long)(until - now < HOLD_NS ? until - now : HOLD_NS)};
  struct pollfd stopped = {.fd = stop, .events = POLLIN};
  ppoll(&stopped, 1, &wait, NULL);
  return false;
}
