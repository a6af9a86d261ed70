/* SPDX-License-Identifier: Apache-2.0 */
/* See tls.h.
 *
 * The key is an SSL_SESSION that nobody has negotiated (RFC 8446, external PSK; SSL_CTX_set_psk_
 * use_session_callback(3)): TLS_AES_128_GCM_SHA256, always with a fresh Diffie-Hellman exchange, so
 * a key that becomes known later opens nothing. There are no certificates: a side without the key
 * of that identity fails the handshake. No tickets and no early data: a connection that is made
 * again has a new key. */
#define _GNU_SOURCE
#include "tls.h"
#include "native.h"

#include <errno.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { KEY_BYTES = 32 };
static const unsigned char TLS_AES_128_GCM_SHA256[] = {0x13, 0x01};
/* The most plain bytes of one record, and its other bytes: header, kind, tag (RFC 8446, 5.2). */
enum { RECORD_BYTES = SSL3_RT_MAX_PLAIN_LENGTH, RECORD_MORE = 5 + 1 + 16 };
/* Bytes that one send takes: a push frame of 64 KiB with its header; and bytes of one recv. */
enum { SEND_BYTES = 4 * RECORD_BYTES, OUT_RECORDS = 4 + 1, IN_BYTES = 64 << 10 };
/* Room for alerts and key updates that libssl makes by itself. */
enum { OUT_MORE = 256 };
/* Records after which a key is replaced, 256 GiB: up to 2^24.5 are safe (RFC 8446, 5.5). */
#ifndef TLS_KEY_RECORDS
#define TLS_KEY_RECORDS (1u << 24)
#endif

struct pc_tls {
  int fd;
  SSL *ssl;
  SSL_SESSION *key; /* until the handshake is over */
  char *identity;
  const char *refused; /* why this side made the handshake fail */
  pthread_mutex_t one;
  char why[160];
  unsigned records; /* written with this key */
  size_t owed;      /* bytes of the caller of tls_write_now that are in `out` */
  size_t in_from, in_to, out_from, out_to;
  uint8_t in[IN_BYTES]; /* came from the socket; the reader's */
  uint8_t out[SEND_BYTES + RECORD_BYTES + OUT_RECORDS * RECORD_MORE + OUT_MORE]; /* goes there */
  uint8_t small[RECORD_BYTES]; /* pieces that are to share a record; the writer's */
};

/* --- what went wrong -------------------------------------------------------------------------- */

/* Called before each call, or SSL_get_error(3) may report an older error. Clearing takes 0.3 us. */
static void no_errors(void) {
  if (ERR_peek_error())
    ERR_clear_error();
}

static const char *words_for(int reason) {
  switch (reason) {
  case SSL_R_DECRYPTION_FAILED_OR_BAD_RECORD_MAC:
    return "a TLS record was changed on its way";
  case SSL_R_BINDER_DOES_NOT_VERIFY:
    return "the two sides have different TLS keys for it";
  case SSL_R_NO_SUITABLE_SIGNATURE_ALGORITHM: /* for a certificate, in place of the key */
    return "the other side came without a TLS key";
  case SSL_R_CERTIFICATE_VERIFY_FAILED:
    return "the other side did not use the TLS key";
  case SSL_R_UNSUPPORTED_PROTOCOL:
    return "the other side has an older version than TLS 1.3";
  case SSL_R_WRONG_VERSION_NUMBER:
  case SSL_R_BAD_RECORD_TYPE:
  case SSL_R_PACKET_LENGTH_TOO_LONG:
  case SSL_R_HTTP_REQUEST:
    return "what came is not TLS";
  default:
    return NULL;
  }
}

/* With `one` held: keeps the first words. */
static void say(struct pc_tls *t, const char *before, const char *words) {
  if (!t->why[0])
    snprintf(t->why, sizeof t->why, "%s%s", before, words ? words : "for no known reason");
}

/* With `one` held, after a call of libssl that did not succeed: 1 if it wants to read more, 0 for
 * the end that the other side has announced, else -errno with `why`. */
static int outcome(struct pc_tls *t, int returned) {
  int kind = SSL_get_error(t->ssl, returned);
  if (kind == SSL_ERROR_WANT_READ || kind == SSL_ERROR_ZERO_RETURN)
    return kind == SSL_ERROR_WANT_READ;
  int reason = ERR_GET_REASON(ERR_peek_error());
  const char *words = t->refused ? t->refused : words_for(reason);
  if (words)
    say(t, "", words);
  else if (reason > SSL_AD_REASON_OFFSET)
    say(t, SSL_is_init_finished(t->ssl) ? "the other side has ended it by a TLS alert: "
                                        : "the other side refused the TLS key: ",
        SSL_alert_desc_string_long(reason - SSL_AD_REASON_OFFSET));
  else
    say(t, "TLS failed: ", ERR_reason_error_string(ERR_peek_error()));
  return -EBADMSG;
}

const char *tls_why(struct pc_tls *t) {
  pthread_mutex_lock(&t->one);
  const char *why = t->why[0] ? t->why : "";
  pthread_mutex_unlock(&t->one);
  return why;
}

/* --- between libssl and the socket ------------------------------------------------------------ */

static int bio_read(BIO *bio, char *to, int bytes) {
  struct pc_tls *t = BIO_get_data(bio);
  size_t n = t->in_to - t->in_from < (size_t)bytes ? t->in_to - t->in_from : (size_t)bytes;
  BIO_clear_retry_flags(bio);
  if (!n) {
    BIO_set_retry_read(bio);
    return -1;
  }
  memcpy(to, t->in + t->in_from, n);
  t->in_from += n;
  return (int)n;
}

static int bio_write(BIO *bio, const char *from, int bytes) {
  struct pc_tls *t = BIO_get_data(bio);
  BIO_clear_retry_flags(bio);
  if ((size_t)bytes > sizeof t->out - t->out_to)
    return -1; /* only a peer that causes answers and reads none of them gets here */
  memcpy(t->out + t->out_to, from, (size_t)bytes);
  t->out_to += (size_t)bytes;
  return bytes;
}

static long bio_ctrl(BIO *bio, int what, long number, void *at) {
  (void)bio, (void)number, (void)at;
  return what == BIO_CTRL_FLUSH;
}

/* With `one` held: sends what it can without waiting. 0: all of it; POLLOUT; -errno with `why`. */
static int flush(struct pc_tls *t) {
  while (t->out_from < t->out_to) {
    ssize_t n = send(t->fd, t->out + t->out_from, t->out_to - t->out_from,
                     MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0 && errno == EAGAIN)
      return POLLOUT;
    if (n < 0 && errno != EINTR) {
      int failed = errno;
      say(t, "", strerrordesc_np(failed));
      return -failed;
    }
    t->out_from += n > 0 ? (size_t)n : 0;
  }
  t->out_from = t->out_to = 0;
  return 0;
}

/* The reader's, when libssl has used all of `in`. 1, or -errno with `why`; -EAGAIN if asked to. */
static int fill(struct pc_tls *t, int flags) {
  ssize_t n;
  do
    n = recv(t->fd, t->in, sizeof t->in, flags);
  while (n < 0 && errno == EINTR);
  int failed = n < 0 ? errno : ECONNRESET;
  t->in_from = 0, t->in_to = n > 0 ? (size_t)n : 0;
  if (n > 0 || failed == EAGAIN)
    return n > 0 ? 1 : -EAGAIN;
  pthread_mutex_lock(&t->one);
  say(t, "", n ? strerrordesc_np(failed) : "it was cut off: TLS saw no close_notify");
  pthread_mutex_unlock(&t->one);
  return -failed;
}

/* --- the handshake ---------------------------------------------------------------------------- */

static int use_session(SSL *ssl, const EVP_MD *md, const unsigned char **id, size_t *id_bytes,
                       SSL_SESSION **session) {
  struct pc_tls *t = SSL_get_app_data(ssl);
  (void)md; /* one cipher, so one digest */
  *id = (const unsigned char *)t->identity, *id_bytes = strlen(t->identity);
  *session = t->key;
  return SSL_SESSION_up_ref(t->key);
}

static int find_session(SSL *ssl, const unsigned char *id, size_t id_bytes,
                        SSL_SESSION **session) {
  struct pc_tls *t = SSL_get_app_data(ssl);
  *session = NULL;
  if (id_bytes != strlen(t->identity) || memcmp(id, t->identity, id_bytes)) {
    t->refused = "the other side came with the TLS key of another connection";
    return 0;
  }
  *session = t->key;
  return SSL_SESSION_up_ref(t->key);
}

static SSL_CTX *context;
static BIO_METHOD *between;

static void make_context(void) {
  SSL_CTX *c = SSL_CTX_new(TLS_method());
  between = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "data connection");
  if (!c || !between || !BIO_meth_set_read(between, bio_read) ||
      !BIO_meth_set_write(between, bio_write) || !BIO_meth_set_ctrl(between, bio_ctrl)) {
    SSL_CTX_free(c);
    return;
  }
  SSL_CTX_clear_options(c, SSL_OP_ENABLE_MIDDLEBOX_COMPAT); /* no browser's middleboxes here */
  SSL_CTX_set_session_cache_mode(c, SSL_SESS_CACHE_OFF);
  if (SSL_CTX_set_min_proto_version(c, TLS1_3_VERSION) &&
      SSL_CTX_set_max_proto_version(c, TLS1_3_VERSION) &&
      SSL_CTX_set_ciphersuites(c, "TLS_AES_128_GCM_SHA256") && SSL_CTX_set_num_tickets(c, 0))
    context = c;
  else
    SSL_CTX_free(c);
}

static bool set_up(struct pc_tls *t, bool server, const uint8_t *key) {
  t->ssl = context ? SSL_new(context) : NULL;
  t->key = SSL_SESSION_new();
  BIO *bio = BIO_new(between);
  if (!t->identity || !t->ssl || !t->key || !bio || !SSL_set_app_data(t->ssl, t)) {
    BIO_free(bio);
    return false;
  }
  BIO_set_data(bio, t), BIO_set_init(bio, 1);
  SSL_set_bio(t->ssl, bio, bio);
  const SSL_CIPHER *cipher = SSL_CIPHER_find(t->ssl, TLS_AES_128_GCM_SHA256);
  if (!cipher || !SSL_SESSION_set1_master_key(t->key, key, KEY_BYTES) ||
      !SSL_SESSION_set_cipher(t->key, cipher) ||
      !SSL_SESSION_set_protocol_version(t->key, TLS1_3_VERSION))
    return false;
  if (server)
    SSL_set_psk_find_session_callback(t->ssl, find_session), SSL_set_accept_state(t->ssl);
  else
    SSL_set_psk_use_session_callback(t->ssl, use_session), SSL_set_connect_state(t->ssl);
  SSL_set_verify(t->ssl, server ? SSL_VERIFY_NONE : SSL_VERIFY_PEER, NULL); /* none is accepted */
  return true;
}

struct pc_tls *pc_tls_new(int fd, int server, const uint8_t *key, const char *identity,
                          char error[200]) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, make_context);
  struct pc_tls *t = calloc(1, sizeof *t);
  if (!t) {
    snprintf(error, 200, "setting up TLS: no memory");
    return NULL;
  }
  pthread_mutex_init(&t->one, NULL);
  t->fd = fd, t->identity = strdup(identity);
  no_errors();
  if (!set_up(t, server, key)) {
    unsigned long first = ERR_peek_error();
    snprintf(error, 200, "setting up TLS: %s",
             first ? ERR_reason_error_string(first) : "libssl could not");
    pc_tls_free(t);
    return NULL;
  }
  return t;
}

int pc_tls_handshake(struct pc_tls *t, char error[200]) {
  int done, now;
  do {
    no_errors();
    done = SSL_do_handshake(t->ssl), now = done == 1 ? 0 : outcome(t, done);
    int sent = flush(t); /* an alert too */
    if (now >= 0 && sent > 0)
      return 2;
    now = sent < 0 && now >= 0 ? sent : now == 1 ? fill(t, MSG_DONTWAIT) : now;
  } while (now == 1);
  if (now == -EAGAIN)
    return 1;
  if (done == 1 && !SSL_session_reused(t->ssl)) { /* cannot be, as neither has a certificate */
    say(t, "", "the other side did not use the TLS key");
    now = -EBADMSG;
  } else if (done != 1 && now == 0) {
    say(t, "", "the other side ended it");
    now = -ECONNRESET;
  }
  SSL_SESSION_free(t->key); /* wiped with its last reference */
  t->key = NULL;
  if (now)
    snprintf(error, 200, "making a data connection secure: %s", t->why);
  return now;
}

void pc_tls_free(struct pc_tls *t) {
  SSL_SESSION_free(t->key);
  SSL_free(t->ssl);
  pthread_mutex_destroy(&t->one);
  free(t->identity);
  free(t);
}

/* --- records ---------------------------------------------------------------------------------- */

ssize_t tls_read(struct pc_tls *t, void *to, size_t bytes) {
  for (;;) {
    size_t n = 0;
    pthread_mutex_lock(&t->one);
    no_errors();
    int done = SSL_read_ex(t->ssl, to, bytes, &n), now = done ? 0 : outcome(t, done);
    flush(t); /* what libssl had to answer */
    pthread_mutex_unlock(&t->one);
    if (done || now <= 0)
      return done ? (ssize_t)n : now;
    now = fill(t, 0);
    if (now < 0)
      return now;
  }
}

/* With `one` held: encrypts into `out`, which has the room. */
static int encrypt(struct pc_tls *t, const void *from, size_t bytes) {
  size_t n;
  no_errors();
  t->records += (unsigned)((bytes + RECORD_BYTES - 1) / RECORD_BYTES);
  if (t->records > TLS_KEY_RECORDS && SSL_key_update(t->ssl, SSL_KEY_UPDATE_NOT_REQUESTED))
    t->records = 0;
  if (SSL_write_ex(t->ssl, from, bytes, &n))
    return 0;
  int now = outcome(t, 0);
  return now < 0 ? now : -EBADMSG; /* `out` has room, so it can be nothing else */
}

static int flush_all(struct pc_tls *t) {
  for (;;) {
    pthread_mutex_lock(&t->one);
    int now = flush(t);
    pthread_mutex_unlock(&t->one);
    if (now <= 0)
      return now;
    poll(&(struct pollfd){.fd = t->fd, .events = POLLOUT}, 1, -1);
  }
}

/* Encrypts all of these bytes into `out`, and flushes it when it is full. */
static int write_piece(struct pc_tls *t, const uint8_t *from, size_t bytes) {
  int failed = 0;
  while (bytes && !failed) {
    size_t n = bytes < SEND_BYTES ? bytes : SEND_BYTES;
    pthread_mutex_lock(&t->one);
    bool room = t->out_to + n + OUT_RECORDS * RECORD_MORE + OUT_MORE <= sizeof t->out;
    if (room)
      failed = encrypt(t, from, n);
    pthread_mutex_unlock(&t->one);
    if (room)
      from += n, bytes -= n;
    else
      failed = flush_all(t);
  }
  return failed;
}

int tls_write_all(struct pc_tls *t, struct iovec *iov, int n) {
  int failed = 0;
  size_t used = 0;
  for (int i = 0; i < n && !failed; i++) {
    if (used + iov[i].iov_len > sizeof t->small) {
      failed = write_piece(t, t->small, used);
      used = 0;
    }
    if (iov[i].iov_len >= sizeof t->small) {
      failed = failed ? failed : write_piece(t, iov[i].iov_base, iov[i].iov_len);
    } else {
      memcpy(t->small + used, iov[i].iov_base, iov[i].iov_len);
      used += iov[i].iov_len;
    }
  }
  failed = failed ? failed : write_piece(t, t->small, used);
  return failed ? failed : flush_all(t);
}

ssize_t tls_write_now(struct pc_tls *t, const void *from, size_t bytes) {
  pthread_mutex_lock(&t->one);
  int now = flush(t);
  if (!now && !t->owed) {
    size_t n = bytes < RECORD_BYTES ? bytes : RECORD_BYTES;
    now = encrypt(t, from, n);
    t->owed = now ? 0 : n;
    now = now ? now : flush(t);
  }
  ssize_t written = now < 0 ? now : now ? 0 : (ssize_t)t->owed;
  if (!now)
    t->owed = 0;
  pthread_mutex_unlock(&t->one);
  return written;
}

void tls_end(struct pc_tls *t) {
  pthread_mutex_lock(&t->one);
  no_errors();
  SSL_shutdown(t->ssl);
  flush(t);
  pthread_mutex_unlock(&t->one);
}
