/* SPDX-License-Identifier: Apache-2.0 */
/* How fast the push may be: an account of when what was sent is paid for. Owns that and its lock;
 * whoever pushes waits by itself, before it takes pages. */
#ifndef POSTCOPYD_RATE_H
#define POSTCOPYD_RATE_H

#include "engine.h"

struct rate {
  pthread_mutex_t lock;
  _Atomic uint64_t bytes_per_second; /* 0: no limit; changed with the lock */
  uint64_t paid_until_ns;
};

void rate_init(struct rate *rate);
void rate_free(struct rate *rate);
/* Another rate. What is not paid for yet is paid at this one. */
void rate_set(struct rate *rate, uint64_t bytes_per_second);
void rate_pay(struct rate *rate, uint64_t bytes);
/* Waits until what was sent is paid for, or `stop` is readable, or a while. False: not yet. */
bool rate_wait(struct rate *rate, int stop);

#endif
