/* SPDX-License-Identifier: Apache-2.0 */
/* TLS on data connections: who gets in, what of a broken or spoilt connection shows, and reading
 * while others write. engine_test.c has whole moves with TLS as well, and says how to run one
 * subtest. In the tests of a handshake end 0 is the server, as a destination is. */
#include "engine_rig.h"

#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <poll.h>

/* --- who gets in ------------------------------------------------------------------------------ */

static const uint8_t OTHER_KEY[32] = "of other tests";

/* Both ends' handshake with these keys and identities; the server's sentence must have `server` in
 * it, and so on; NULL: it must succeed. */
static void expect(const uint8_t *keys[2], const char *identities[2], const char *server,
                   const char *client) {
  int fd[2], result[2];
  char error[2][200] = {"", ""};
  struct pc_tls *t[2];
  tcp_pair(fd);
  for (int i = 0; i < 2; i++)
    check((t[i] = pc_tls_new(fd[i], i == 0, keys[i], identities[i], error[i])), "%s", error[i]);
  shake(t, fd, result, error);
  for (int i = 0; i < 2; i++) {
    const char *wanted = i ? client : server;
    check(wanted ? result[i] < 0 && strstr(error[i], wanted) : !result[i], "end %d: %s", i,
          error[i]);
    pc_tls_free(t[i]), close(fd[i]);
  }
}

static void keys(void) {
  const uint8_t *same[2] = {KEY, KEY}, *different[2] = {KEY, OTHER_KEY};
  const char *urgent[2] = {"m1 urgent", "m1 urgent"};
  expect(same, urgent, NULL, NULL);
  expect(different, urgent, "the two sides have different TLS keys",
         "the other side refused the TLS key");
  const char *others[] = {"m2 urgent", "m1 push", "m1 urgent ", "m1 urgen", "M1 urgent", "m"};
  for (unsigned i = 0; i < sizeof others / sizeof *others; i++) {
    const char *identities[2] = {"m1 urgent", others[i]};
    expect(same, identities, "the TLS key of another connection", "refused the TLS key");
  }
}

/* A context of libssl as somebody else might have it. */
static SSL *other(int fd, bool server, int version) {
  SSL_CTX *c = SSL_CTX_new(TLS_method());
  SSL_CTX_set_min_proto_version(c, TLS1_2_VERSION), SSL_CTX_set_max_proto_version(c, version);
  SSL *ssl = SSL_new(c);
  SSL_CTX_free(c);
  SSL_set_fd(ssl, fd);
  if (server)
    SSL_set_accept_state(ssl);
  else
    SSL_set_connect_state(ssl);
  return ssl;
}

/* Its handshake against ours, which must fail with these words. */
static void against(SSL *ssl, int fd[2], bool server, const char *words) {
  char error[200] = "";
  int ours = 1, theirs = 0;
  struct pc_tls *t = pc_tls_new(fd[0], server, KEY, "m1 urgent", error);
  check(t, "%s", error);
  for (unsigned time = 0; time < 1000 && ours >= 0; time++) {
    ours = pc_tls_handshake(t, error);
    theirs = SSL_do_handshake(ssl);
    check(ours != 0, "accepted");
    struct pollfd ready[2] = {{.fd = fd[0], .events = POLLIN}, {.fd = fd[1], .events = POLLIN}};
    poll(ready, 2, 10);
  }
  check(ours < 0 && strstr(error, words), "%d: %s", ours, error);
  check(!server || theirs != 1, "they think that it is done");
  SSL_free(ssl), pc_tls_free(t), close(fd[0]), close(fd[1]);
}

static void other_versions(void) {
  int fd[2];
  tcp_pair(fd), fcntl(fd[1], F_SETFL, O_NONBLOCK);
  against(other(fd[1], false, TLS1_2_VERSION), fd, true, "an older version");
  tcp_pair(fd), fcntl(fd[1], F_SETFL, O_NONBLOCK);
  against(other(fd[1], false, TLS1_3_VERSION), fd, true, "without a TLS key");
}

/* A server with a certificate and no key is not the one. */
static void certificate(void) {
  EVP_PKEY *key = EVP_EC_gen("P-256");
  X509 *x = X509_new();
  ASN1_INTEGER_set(X509_get_serialNumber(x), 1);
  X509_gmtime_adj(X509_getm_notBefore(x), 0), X509_gmtime_adj(X509_getm_notAfter(x), 3600);
  X509_NAME_add_entry_by_txt(X509_get_subject_name(x), "CN", MBSTRING_ASC, (void *)"host", -1, -1,
                             0);
  X509_set_issuer_name(x, X509_get_subject_name(x));
  X509_set_pubkey(x, key), X509_sign(x, key, EVP_sha256());
  int fd[2];
  tcp_pair(fd), fcntl(fd[1], F_SETFL, O_NONBLOCK);
  SSL *ssl = other(fd[1], true, TLS1_3_VERSION);
  check(SSL_use_certificate(ssl, x) == 1 && SSL_use_PrivateKey(ssl, key) == 1, " ");
  X509_free(x), EVP_PKEY_free(key);
  against(ssl, fd, false, "did not use the TLS key");
}

/* What is not TLS, or ends, instead of a handshake. */
static void not_tls(void) {
  static const char *SENT[] = {"", "\x81\xa4kind\xb2postcopyd data tls", "GET / HTTP/1.1\r\n\r\n",
                               "\x95\x01\xcd", "\x16\x03\x01\x00"};
  for (unsigned i = 0; i < sizeof SENT / sizeof *SENT; i++)
    for (int server = 0; server < 2; server++) {
      int fd[2], now;
      char error[200] = "";
      tcp_pair(fd);
      struct pc_tls *t = pc_tls_new(fd[0], server, KEY, "m1 urgent", error);
      check(t && send(fd[1], SENT[i], strlen(SENT[i]), 0) == (ssize_t)strlen(SENT[i]), "%m");
      shutdown(fd[1], SHUT_WR);
      while ((now = pc_tls_handshake(t, error)) > 0)
        poll(&(struct pollfd){.fd = fd[0], .events = now == 1 ? POLLIN : POLLOUT}, 1, -1);
      bool cut = strlen(SENT[i]) < 5;
      check(now < 0 && strstr(error, cut ? "cut off" : "not TLS"), "%u: %d %s", i, now, error);
      pc_tls_free(t), close(fd[0]), close(fd[1]);
    }
}

/* --- how a connection ends -------------------------------------------------------------------- */

/* A destination whose other end is by hand. */
static struct stream by_hand_tls(struct pair *p, bool urgent) {
  int fd[2];
  struct pc_tls *t[2];
  with_tls = true;
  tcp_pair(fd), secure(fd, t);
  check(!pc_dest_connect(p->dest, fd[0], t[0], urgent), "%s", p->at->sentence);
  fcntl(fd[1], F_SETFL, 0);
  return (struct stream){.fd = fd[1], .tls = t[1]};
}

static bool send_tls(struct stream s, struct ram *m, uint64_t page, uint32_t count) {
  uint8_t header[FRAME_BYTES], *bytes = malloc(count * SMALL);
  for (uint32_t i = 0; i < count; i++)
    fill_page(m, page + i, bytes + i * SMALL);
  pc_frame_encode(header, FRAME_PAGES, 0, page, count, count * SMALL);
  struct iovec iov[2] = {{header, sizeof header}, {bytes, count * SMALL}};
  int failed = write_all(s, iov, 2);
  free(bytes);
  return !failed;
}

/* Ended by close_notify, and without: in neither case is it success. */
static void ends(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 64, SMALL, all_data);
  struct pair p = new_dest(&g);
  for (int time = 0; time < 4; time++) {
    struct stream s = by_hand_tls(&p, time % 2);
    check(send_tls(s, m, (uint64_t)time, 1), " ");
    wait_until(get(p.at->confirmed_pages) == (uint64_t)time + 1);
    if (time / 2)
      tls_end(s.tls);
    shutdown(s.fd, SHUT_WR);
    wait_until(get(p.at->failure) > PC_OK);
    check(get(p.at->failure) == PC_CONNECTION, "%s", p.at->sentence);
    check(strstr(p.at->sentence, time / 2 ? "was closed by the source" : "broke: it was cut off"),
          "%s", p.at->sentence);
    pc_dest_disconnect(p.dest);
    uint8_t byte; /* and so is our own end: said */
    check(tls_read(s.tls, &byte, 1) == 0, "%s", tls_why(s.tls));
    engine_close(s);
  }
  finish(&p);
  guest_free(&g);
}

/* Peers that read nothing do not hold up an end, of either engine. */
static void unread(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 4096, SMALL, all_data);
  fill_source(m, 0, m->pages);
  struct pair p = new_dest(&g);
  new_source(&p);
  with_tls = true;
  for (int time = 0; time < 4; time++) {
    int fd[2];
    struct pc_tls *t[2];
    buffer_bytes = 4096;
    tcp_pair(fd), secure(fd, t);
    check(!pc_source_connect(p.source, fd[1], t[1], time % 2), "%s", p.from->sentence);
    if (time % 2) {
      uint8_t requests[FRAME_BYTES * 1000];
      for (unsigned i = 0; i < 1000; i++)
        pc_frame_encode(requests + i * FRAME_BYTES, FRAME_REQUEST, 0, i, 1, 0);
      check(!pc_source_serve(p.source), " ");
      for (size_t sent = 0, n; sent < sizeof requests && get(p.from->requests) < 20; sent += n)
        n = (size_t)tls_write_now(t[0], requests + sent, sizeof requests - sent);
    } else {
      check(!pc_source_push(p.source, 0), " ");
      wait_until(get(p.from->pushed_pages) >= 4);
    }
    pc_source_disconnect(p.source);
    check(get(p.from->failure) == PC_OK, "%s", p.from->sentence);
    pc_tls_free(t[0]), close(fd[0]);
  }
  finish(&p);
  guest_free(&g);
}

/* --- both ways at once ------------------------------------------------------------------------ */

static void *requests_run(void *argument) {
  struct stream *s = argument;
  uint8_t in[64 * FRAME_BYTES];
  while (tls_read(s->tls, in, sizeof in) > 0)
    ;
  return NULL;
}

/* Pages come on the urgent connection as fast as it takes them, asked for or not, while many
 * threads ask on it: fault threads write what the receiving thread reads. */
static void both_ways(void) {
  struct guest g = {0};
  struct ram *m = add_ram(&g, 8192 / RARELY, SMALL, all_data);
  struct pair p = new_dest(&g);
  struct stream s = by_hand_tls(&p, true);
  pthread_t requests;
  check(!pthread_create(&requests, NULL, requests_run, &s), "thread");
  struct guest_thread *t = guest_start(&g, 8, 0);
  wait_until(get(p.at->requests) >= 8);
  for (uint64_t page = m->pages; page-- > 0;)
    check(send_tls(s, m, page, 1), "%s", tls_why(s.tls));
  guest_join(t, 8);
  wait_until(drained(&p));
  check(get(p.at->requests) > 8, " ");
  check_guest(&g);
  finish(&p);
  pthread_join(requests, NULL);
  engine_close(s);
  guest_free(&g);
}

struct taker {
  struct stream stream;
  uint8_t expected[1 << 19];
  _Atomic size_t got;
};

static void *taker_run(void *argument) {
  struct taker *k = argument;
  static uint8_t in[100000];
  ssize_t n;
  while ((n = tls_read(k->stream.tls, in, 1 + draw() % sizeof in)) > 0) {
    check(!memcmp(in, k->expected + k->got, (size_t)n), "after %zu bytes", (size_t)k->got);
    k->got += (size_t)n;
  }
  return NULL;
}

/* What tls_write_now has counted arrives without another call, in a socket that is always full. */
static void written_now(void) {
  struct taker *k = malloc(sizeof *k);
  int fd[2];
  struct pc_tls *t[2];
  pthread_t thread;
  for (size_t i = 0; i < sizeof k->expected; i++)
    k->expected[i] = (uint8_t)mix(i);
  with_tls = true, buffer_bytes = 4096;
  tcp_pair(fd), secure(fd, t), fcntl(fd[1], F_SETFL, 0);
  k->stream = (struct stream){.fd = fd[1], .tls = t[1]}, k->got = 0;
  check(!pthread_create(&thread, NULL, taker_run, k), "thread");
  for (size_t from = 0, to = 0, full = 0; from < sizeof k->expected || !full;) {
    size_t more = from + 1 + mix(from) % 40000;
    to = more < to ? to : more < sizeof k->expected ? more : sizeof k->expected;
    ssize_t n = tls_write_now(t[0], k->expected + from, to - from);
    check(n >= 0, "%s", tls_why(t[0]));
    from += (size_t)n, full += n == 0;
    if (n == 0)
      wait_until(k->got == from);
    check(from < sizeof k->expected || full, "the socket took all");
  }
  wait_until(k->got == sizeof k->expected);
  tls_end(t[0]);
  pthread_join(thread, NULL);
  engine_close((struct stream){.fd = fd[0], .tls = t[0]}), engine_close(k->stream);
  free(k);
}

/* --- what is changed on the way --------------------------------------------------------------- */

/* Passes on `bytes` from one socket to another, one of them changed if `spoil` lies among them. */
static void pass_on(int from, int to, int64_t bytes, int64_t spoil) {
  uint8_t buffer[4096];
  for (int64_t at = 0; at < bytes;) {
    size_t most = (size_t)(bytes - at) < sizeof buffer ? (size_t)(bytes - at) : sizeof buffer;
    ssize_t n = recv(from, buffer, most, 0);
    check(n > 0, "%m");
    if (spoil >= at && spoil < at + n)
      buffer[spoil - at] ^= (uint8_t)(1 << draw() % 8);
    if (send(to, buffer, (size_t)n, MSG_NOSIGNAL) < 0)
      return; /* it has noticed */
    at += n;
  }
}

static void tampered(void) {
  enum { RUN = 6, SENT = 2 * (FRAME_BYTES + RUN * SMALL) + 2 * 3 * 22 };
  struct guest g = {0};
  struct ram *m = add_ram(&g, 2 * RUN, SMALL, all_data);
  struct pair p = new_dest(&g);
  with_tls = true;
  for (unsigned time = 0; time < 60 / RARELY; time++) {
    /* Two connections: the handshake goes on the first and is copied, then one changes bytes. */
    int fd[2], way[2];
    struct pc_tls *t[2];
    tcp_pair(fd), secure(fd, t);
    check(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, way), "%m");
    /* From here on what the source writes comes out at way[1] and goes in at fd[1]. */
    int to = dup(fd[1]), size = 1 << 20;
    setsockopt(way[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    check(dup2(way[0], fd[1]) == fd[1], "%m");
    fcntl(to, F_SETFL, 0);
    struct stream s = {.fd = fd[1], .tls = t[1]};
    check(!pc_dest_connect(p.dest, fd[0], t[0], time % 2), "%s", p.at->sentence);
    uint64_t had = get(p.at->confirmed_pages) + get(p.at->duplicate_pages);
    check(send_tls(s, m, 0, RUN) && send_tls(s, m, RUN, RUN), " ");
    int sent = bytes_waiting(way[1]);
    check(sent >= SENT - 100 && sent < SENT + 200, "%d", sent);
    int64_t spoil = time < 30 ? time : (int64_t)(draw() % (uint64_t)sent);
    bool added = time % 10 == 9;
    pass_on(way[1], to, sent, added ? -1 : spoil);
    if (added)
      check(send(to, "\x17\x03\x03\x00\x1e what is not a record of theirs", 35, 0) == 35, "%m");
    shutdown(to, SHUT_WR);
    wait_until(get(p.at->failure) > PC_OK);
    check(get(p.at->failure) == PC_CONNECTION, "%s", p.at->sentence);
    check(strstr(p.at->sentence, "broke: ") && !strstr(p.at->sentence, "(null)"), "%s",
          p.at->sentence);
    if (spoil >= 5 && !added && spoil < 40)
      check(strstr(p.at->sentence, "was changed on its way"), "byte %lld: %s", (long long)spoil,
            p.at->sentence);
    check(added || get(p.at->confirmed_pages) + get(p.at->duplicate_pages) < had + 2 * RUN,
          "a spoilt page was taken");
    pc_dest_disconnect(p.dest);
    engine_close(s);
    close(to), close(way[0]), close(way[1]);
  }
  for (uint64_t page = 0; page < m->pages; page++)
    check(page_is(m, page, false), "page %llu", (unsigned long long)page);
  finish(&p);
  guest_free(&g);
}

static const struct subtest SUBTESTS[] = {
    {"keys", keys},
    {"other_versions", other_versions},
    {"certificate", certificate},
    {"not_tls", not_tls},
    {"ends", ends},
    {"unread", unread},
    {"both_ways", both_ways},
    {"written_now", written_now},
    {"tampered", tampered},
};

int main(int argc, char **argv) {
  return subtest_main(argc, argv, SUBTESTS, sizeof SUBTESTS / sizeof *SUBTESTS);
}
