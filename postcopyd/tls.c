/* SPDX-License-Identifier: Apache-2.0 */
/* See tls.h.
 *
 * The key is an SSL_SESSION that nobody has negotiated (RFC 8446, external PSK; SSL_CTX_set_psk_
 * use_session_callback(3)): TLS_AES_128_GCM_SHA256, always with a fresh Diffie-Hellman exchange, so
 * a key that becomes known later opens nothing. There are no certificates: who does not have the
 * key of that identity fails the handshake. No tickets and no early data: a connection that is made
 * again has a new key. */
#define _GNU_SOURCE
#include "tls.h"
#include "native.h"

#include <errno.h>
#include <fcntl.h>
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

struct pc_tls {
  int fd;
  SSL *ssl;
  SSL_SESSION *key; /* until the handshake is over */
  char *identity;
  const char *refused; /* why the handshake was made to fail here */
  pthread_mutex_t one;
  char why[160];
};

/* --- what went wrong -------------------------------------------------------------------------- */

static const char *words_for(int reason) {
  switch (reason) {
  case SSL_R_UNEXPECTED_EOF_WHILE_READING:
    return "it was cut off: TLS saw no close_notify";
  case SSL_R_DECRYPTION_FAILED_OR_BAD_RECORD_MAC:
    return "a TLS record was changed on its way";
  case SSL_R_BINDER_DOES_NOT_VERIFY:
    return "the two sides have different TLS keys for it";
  case SSL_R_UNSUPPORTED_PROTOCOL:
    return "TLS 1.3 is wanted, and one side has an older version";
  case SSL_R_WRONG_VERSION_NUMBER:
  case SSL_R_BAD_RECORD_TYPE:
  case SSL_R_PACKET_LENGTH_TOO_LONG:
  case SSL_R_HTTP_REQUEST:
    return "what came is not TLS";
  default:
    return NULL;
  }
}

/* With `one` held: the first words stay. */
static void say(struct pc_tls *t, const char *before, const char *words) {
  if (!t->why[0])
    snprintf(t->why, sizeof t->why, "%s%s", before, words ? words : "for no known reason");
}

/* With `one` held, after a call that did not succeed: POLLIN or POLLOUT to wait for, 0 for the end
 * that the other side has announced, else -errno with `why`. */
static int outcome(struct pc_tls *t, int returned, int error) {
  switch (SSL_get_error(t->ssl, returned)) {
  case SSL_ERROR_WANT_READ:
    return POLLIN;
  case SSL_ERROR_WANT_WRITE:
    return POLLOUT;
  case SSL_ERROR_ZERO_RETURN:
    return 0;
  }
  unsigned long first = ERR_peek_error();
  if (!first || ERR_SYSTEM_ERROR(first)) {
    error = error ? error : ECONNRESET;
    say(t, "", strerrordesc_np(error));
    return -error;
  }
  int reason = ERR_GET_REASON(first);
  const char *words = t->refused ? t->refused : words_for(reason);
  if (words)
    say(t, "", words);
  else if (reason > SSL_AD_REASON_OFFSET)
    say(t, SSL_is_init_finished(t->ssl) ? "the other side has ended it by a TLS alert: "
                                        : "the other side refused the TLS key: ",
        SSL_alert_desc_string_long(reason - SSL_AD_REASON_OFFSET));
  else
    say(t, "TLS failed: ", ERR_reason_error_string(first));
  return -EPROTO;
}

const char *tls_why(struct pc_tls *t) {
  pthread_mutex_lock(&t->one);
  const char *why = t->why[0] ? t->why : "";
  pthread_mutex_unlock(&t->one);
  return why;
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

static void make_context(void) {
  SSL_CTX *c = SSL_CTX_new(TLS_method());
  if (!c)
    return;
  SSL_CTX_set_options(c, SSL_OP_ENABLE_KTLS);
  SSL_CTX_clear_options(c, SSL_OP_ENABLE_MIDDLEBOX_COMPAT); /* no browser's middleboxes here */
  SSL_CTX_set_session_cache_mode(c, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_mode(c, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
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
  if (!t->identity || !t->ssl || !t->key || !SSL_set_fd(t->ssl, t->fd) || !SSL_set_app_data(t->ssl, t))
    return false;
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
  ERR_clear_error();
  if (fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) || !set_up(t, server, key)) {
    unsigned long first = ERR_peek_error();
    snprintf(error, 200, "setting up TLS: %s",
             first ? ERR_reason_error_string(first) : strerrordesc_np(errno));
    pc_tls_free(t);
    return NULL;
  }
  return t;
}

int pc_tls_handshake(struct pc_tls *t, char error[200]) {
  ERR_clear_error();
  errno = 0;
  int done = SSL_do_handshake(t->ssl), now = done == 1 ? 0 : outcome(t, done, errno);
  if (now > 0)
    return now == POLLIN ? 1 : 2;
  if (done == 1 && !SSL_session_reused(t->ssl)) { /* cannot be, without certificates */
    say(t, "", "the other side did not use the key");
    now = -EPROTO;
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

static int wait_for(struct pc_tls *t, int events) {
  struct pollfd ready = {.fd = t->fd, .events = (short)events};
  return poll(&ready, 1, -1) < 0 && errno != EINTR ? -errno : 0;
}

ssize_t tls_read(struct pc_tls *t, void *to, size_t bytes) {
  for (;;) {
    size_t n = 0;
    pthread_mutex_lock(&t->one);
    ERR_clear_error();
    errno = 0;
    int done = SSL_read_ex(t->ssl, to, bytes, &n), now = done ? 0 : outcome(t, done, errno);
    pthread_mutex_unlock(&t->one);
    if (done || now <= 0)
      return done ? (ssize_t)n : now;
    now = wait_for(t, now);
    if (now)
      return now;
  }
}

/* Writes what goes by one call: at most one record. Returns the number of bytes, or 0 with what to
 * wait for, or -errno. */
static ssize_t write_some(struct pc_tls *t, const void *from, size_t bytes, int *events) {
  size_t n = 0;
  pthread_mutex_lock(&t->one);
  ERR_clear_error();
  errno = 0;
  int done = SSL_write_ex(t->ssl, from, bytes, &n), now = done ? 0 : outcome(t, done, errno);
  pthread_mutex_unlock(&t->one);
  *events = now;
  return done ? (ssize_t)n : now > 0 ? 0 : now ? now : -EPIPE;
}

int tls_write_all(struct pc_tls *t, struct iovec *iov, int n) {
  for (; n > 0; iov++, n--)
    while (iov->iov_len) {
      int events;
      ssize_t some = write_some(t, iov->iov_base, iov->iov_len, &events);
      if (some == 0)
        some = wait_for(t, events);
      if (some < 0)
        return (int)some;
      iov->iov_base = (char *)iov->iov_base + some, iov->iov_len -= (size_t)some;
    }
  return 0;
}

ssize_t tls_write_now(struct pc_tls *t, const void *from, size_t bytes) {
  int events;
  return write_some(t, from, bytes, &events);
}

void tls_end(struct pc_tls *t) {
  pthread_mutex_lock(&t->one);
  ERR_clear_error();
  SSL_shutdown(t->ssl);
  pthread_mutex_unlock(&t->one);
}
