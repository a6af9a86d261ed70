/* SPDX-License-Identifier: Apache-2.0 */
/* TLS 1.3 with a pre-shared key on one data connection, by libssl. Knows no frames and no pages.
 *
 * libssl never touches the socket: it reads from `in` and writes to `out`, two buffers of a pc_tls.
 * These are filled and flushed around it, many records by one call. So a reader waits in recv, as
 * it does without TLS.
 *
 * Who owns what. The maker of a pc_tls drives its handshake, alone. Then an engine owns it, with
 * its descriptor, and frees both once its threads are joined. One thread may read while another
 * writes, as fault threads do on the urgent connection. libssl's object is for one thread at a
 * time, so each call of it is made with `one` held, and so is each send from `out`. No thread waits
 * with `one` held: to wait in recv or for POLLOUT it lets go of it. `in` is the reader's, always
 * the same thread. Writers take turns (by the engine's `asking`).
 *
 * A record that was begun is finished before another begins, as all go through `out`. Bytes that
 * tls_write_now has encrypted and the socket did not take do not count as written until they went.
 * The caller comes again once the socket is writable, with the same bytes first and perhaps more
 * behind them: while half of a record is sent it has something to write, and waits for POLLOUT. */
#ifndef POSTCOPYD_TLS_H
#define POSTCOPYD_TLS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

struct pc_tls;

/* Reads what there is; waits for the first byte. 0: the other side ended it, and said so; else
 * -errno, see tls_why. */
ssize_t tls_read(struct pc_tls *t, void *to, size_t bytes);
/* Writes everything, waiting as needed; changes iov. Returns 0 or -errno. */
int tls_write_all(struct pc_tls *t, struct iovec *iov, int n);
/* Writes what it can without waiting. Returns the number of bytes, perhaps 0, or -errno. */
ssize_t tls_write_now(struct pc_tls *t, const void *from, size_t bytes);
/* Tells the other side that this is the end, unless it would have to wait for that. */
void tls_end(struct pc_tls *t);
/* What failed first on this connection, in words; "" if nothing has. Valid until pc_tls_free, once
 * one of the above has failed. */
const char *tls_why(struct pc_tls *t);

#endif
