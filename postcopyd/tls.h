/* SPDX-License-Identifier: Apache-2.0 */
/* TLS 1.3 with a pre-shared key on one data connection, by libssl. Knows nothing of frames or pages.
 *
 * Who owns what. Whoever has made a struct pc_tls drives its handshake, alone; then an engine owns
 * it with its descriptor, which stays non-blocking, and frees both once its threads are joined. One
 * thread may read while another writes: libssl's object is for one at a time, so each call of it is
 * made with `one` held, and none of them waits; who has to wait for the socket polls it without the
 * lock. All reading is by one thread. Writers take turns (the engine's `asking`), because of what
 * follows.
 *
 * A record that was begun is finished before another begins. libssl keeps the rest of one that the
 * socket did not take; the caller's bytes do not count as written until it went, and the next call
 * must come with the same bytes first, wherever they are then. tls_write_all sees to it by itself.
 * After tls_write_now has returned less than it was given, the rest comes again at its next call,
 * with more behind it or not, once the socket is writable; so for as long as a record is half gone
 * its caller has something to write, and waits for POLLOUT. */
#ifndef POSTCOPYD_TLS_H
#define POSTCOPYD_TLS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

struct pc_tls;

/* Reads what there is, waiting for the first byte. 0: ended, and the other side said so; else -errno
 * and tls_why. */
ssize_t tls_read(struct pc_tls *t, void *to, size_t bytes);
/* Writes everything, waiting as needed; changes iov. Returns 0 or -errno. */
int tls_write_all(struct pc_tls *t, struct iovec *iov, int n);
/* Writes what goes without waiting. Returns the number of bytes, 0 when none goes, or -errno. */
ssize_t tls_write_now(struct pc_tls *t, const void *from, size_t bytes);
/* Tells the other side that this is the end, unless that would take waiting. */
void tls_end(struct pc_tls *t);
/* What went wrong first on this connection, in words; empty: nothing. Valid until pc_tls_free, once
 * one of the above has failed. */
const char *tls_why(struct pc_tls *t);

#endif
