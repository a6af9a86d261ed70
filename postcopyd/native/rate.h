/* SPDX-License-Identifier: Apache-2.0 */
/* Limits the rate of the push: an account of when what was sent is paid for. Owns that and its
 * lock. A push thread waits for it before it takes pages. */
#ifndef POSTCOPYD_RATE_H
#define POSTCOPYD_RATE_H

#include "engine.h"

struct rate {
  pthread_mutex_t lock;
  _Atomic uint64_t bytes_per_second; /* 0: no limit; changed with the lock held */
  uint64_t paid_until_ns;
};

void rate_init(struct rate *rate);
void rate_free(struct rate *rate);
/* Changes the rate, also of what is not paid for yet. */
void rate_set(struct rate *rate, uint64_t bytes_per_second);
void rate_pay(struct rate *rate, uint64_t bytes);
/* Waits until what was sent is paid for, `stop` is readable, or 0.1 s are over. False: not paid. */
bool rate_wait(struct rate *rate, int stop);

#endif
