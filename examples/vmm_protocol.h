/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The VMM's side of docs/VMM-PROTOCOL.md, complete, for copying into a VMM.
 *
 * It owns the listening socket, the lines and descriptors on it, the state word (running, paused,
 * incoming), the userfaultfd copy and the discarding of guest RAM.  It knows nothing of what runs
 * in the guest: the VMM fills in `struct vmm` and calls vmm_serve().
 *
 * Each connection has a thread of its own, so that a verb waiting in a page fault (`load`) holds
 * up nobody else.  One connection at a time holds the claim that `hello` takes; only it may use
 * the protocol's verbs, so these never run beside one another.
 */
#ifndef VMM_PROTOCOL_H
#define VMM_PROTOCOL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define VMM_LINE_MAX 4096
#define VMM_WORDS_MAX 8
#define VMM_CLAIM_SECONDS 2
/* The distributions' headers are older than the kernels: our own constants. */
#define VMM_UFFD_USER_MODE_ONLY 1
#define VMM_UFFD_IOC_NEW 0xaa00

enum vmm_state { VMM_RUNNING, VMM_PAUSED, VMM_INCOMING };

struct vmm_region {
    const char *name;
    char *address;
    size_t size, page;
    int fd; /* of the shared file behind it; -1: anonymous memory */
    off_t offset;
};

/* Initializer of what every `struct vmm` starts with. */
#define VMM_INIT                                                                                   \
    .uffd = -1, .claim_lock = PTHREAD_MUTEX_INITIALIZER, .claim_dropped = PTHREAD_COND_INITIALIZER

struct vmm_fact {
    char key[32], value[128];
};

struct vmm_client {
    int socket;
    int fd; /* came with the line being answered; -1: none; a verb that keeps it sets -1 */
    pthread_mutex_t writes; /* a line is sent whole; nothing follows `ended`, which keeps it */
    size_t used, next;
    char in[VMM_LINE_MAX];
};

/*
 * The callbacks return NULL, or one sentence that says why not and what to do.  `run` that returns
 * a sentence promises that no vCPU has run.  `load` reads to the end of the file and fails on a
 * state that is cut short: the daemon at the other end may have died.
 */
struct vmm {
    const char *name, *socket;
    struct vmm_region *regions;
    size_t region_count;
    struct vmm_fact facts[16];
    size_t fact_count;
    const char *writes; /* NULL: all that is written to guest RAM shows in page tables; "direct" or
                         * "unseen": see `hello` in docs/VMM-PROTOCOL.md */
    int uffd_flags; /* VMM_UFFD_USER_MODE_ONLY when no kernel code touches guest RAM */
    const char *(*stop)(void);
    const char *(*run)(void);
    const char *(*save)(int fd, size_t *bytes);
    const char *(*load)(int fd, size_t *bytes);
    bool (*extension)(struct vmm_client *client, int count, char **words); /* false: unknown */
    void (*before_exit)(void);

    _Atomic int state; /* enum vmm_state; changed by the claim's holder only */
    /* Our copy, from `userfaultfd` to `release`.  At the destination missing pages wait as long as
     * it is open, and never read as zero; at the source it is of no use to us. */
    int uffd;
    bool huge_pages_off; /* by us */
    pthread_mutex_t claim_lock;
    pthread_cond_t claim_dropped;
    struct vmm_client *_Atomic claim;
};

static inline const char *vmm_state_name(const struct vmm *vmm)
{
    static const char *const names[] = {"running", "paused", "incoming"};
    int state = vmm->state;
    return names[state];
}

static inline void vmm_close(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* Sends one line; a descriptor travels with its first byte.  A client that is gone is noticed by
 * the next read, so failures end here. */
__attribute__((format(printf, 3, 4))) static void vmm_reply(struct vmm_client *client, int fd,
                                                            const char *format, ...)
{
    char line[VMM_LINE_MAX];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (length < 0)
        return;
    if ((size_t)length > sizeof line - 2)
        length = sizeof line - 2;
    line[length++] = '\n';

    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec part = {line, (size_t)length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (fd >= 0) {
        message.msg_control = control.space;
        message.msg_controllen = sizeof control.space;
        struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(rights), &fd, sizeof fd);
    }
    pthread_mutex_lock(&client->writes);
    while (part.iov_len > 0) {
        ssize_t sent = sendmsg(client->socket, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            break;
        part.iov_base = (char *)part.iov_base + sent;
        part.iov_len -= (size_t)sent;
        message.msg_control = NULL;
        message.msg_controllen = 0;
    }
    pthread_mutex_unlock(&client->writes);
}

/* More bytes, and the descriptor that came with them; false at the end or when the client breaks
 * the rules (a second descriptor that no line has used). */
static bool vmm_receive(struct vmm_client *client)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(4 * sizeof(int))];
    } control;
    struct iovec part = {client->in + client->used, sizeof client->in - client->used};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.space,
                             .msg_controllen = sizeof control.space};
    ssize_t got;
    do
        got = recvmsg(client->socket, &message, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    if (got <= 0)
        return false;
    client->used += (size_t)got;
    bool fine = !(message.msg_flags & MSG_CTRUNC);
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
            if (client->fd >= 0) {
                close(fd);
                fine = false;
            } else {
                client->fd = fd;
            }
        }
    }
    return fine;
}

/* The next line, without its end; NULL at the end of the connection or for a line too long. */
static char *vmm_read_line(struct vmm_client *client)
{
    memmove(client->in, client->in + client->next, client->used - client->next);
    client->used -= client->next;
    client->next = 0;
    for (size_t seen = 0;;) {
        char *end = memchr(client->in + seen, '\n', client->used - seen);
        if (end) {
            *end = '\0';
            client->next = (size_t)(end - client->in) + 1;
            return client->in;
        }
        seen = client->used;
        if (client->used == sizeof client->in) {
            vmm_reply(client, -1, "error a line is longer than %d bytes", VMM_LINE_MAX);
            return NULL;
        }
        if (!vmm_receive(client))
            return NULL;
    }
}

static const char *vmm_attribute(int count, char **words, const char *key)
{
    size_t length = strlen(key);
    for (int i = 1; i < count; i++)
        if (!strncmp(words[i], key, length) && words[i][length] == '=')
            return words[i] + length + 1;
    return NULL;
}

static bool vmm_number(const char *text, uint64_t *value)
{
    if (!text || *text < '0' || *text > '9')
        return false;
    char *end;
    errno = 0;
    *value = strtoull(text, &end, 0);
    return !errno && !*end;
}

/* Makes a range of a region empty, so that the next access to it is a missing page. */
static bool vmm_empty(const struct vmm_region *region, uint64_t offset, uint64_t length)
{
    char *start = region->address + offset;
    if (region->fd < 0)
        return !madvise(start, length, MADV_DONTNEED);
    if (fallocate(region->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  region->offset + (off_t)offset, (off_t)length))
        return false;
    /* Punching hugetlbfs gives the reservation away; without one the host may have no huge page
     * left when this one arrives.  Mapping the range again takes it back. */
    if (region->page > 4096)
        return mmap(start, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, region->fd,
                    region->offset + (off_t)offset) != MAP_FAILED;
    return true;
}

static void vmm_do_discard(struct vmm *vmm, struct vmm_client *client, int count, char **words)
{
    const char *name = vmm_attribute(count, words, "name");
    uint64_t offset, length;
    if (!name || !vmm_number(vmm_attribute(count, words, "offset"), &offset) ||
        !vmm_number(vmm_attribute(count, words, "length"), &length)) {
        vmm_reply(client, -1, "error discard needs name=, offset= and length=");
        return;
    }
    if (vmm->state != VMM_INCOMING) {
        vmm_reply(client, -1, "error guest RAM is discarded only while incoming, this guest is %s",
                  vmm_state_name(vmm));
        return;
    }
    for (size_t i = 0; i < vmm->region_count; i++) {
        struct vmm_region *region = &vmm->regions[i];
        if (strcmp(region->name, name))
            continue;
        if (offset > region->size || length > region->size - offset || !length ||
            (offset | length) % region->page)
            vmm_reply(client, -1, "error %s has no range of whole pages at %" PRIu64 "+%" PRIu64,
                      name, offset, length);
        else if (!vmm_empty(region, offset, length))
            vmm_reply(client, -1, "error discarding %s at %" PRIu64 "+%" PRIu64 " failed: %m", name,
                      offset, length);
        else
            vmm_reply(client, -1, "ok");
        return;
    }
    vmm_reply(client, -1, "error there is no region %s", name);
}

/* From the start of a VMM that waits for a guest until its memory is whole there are no huge pages:
 * some kernels put zeros where pages lack when they make one of a file's pages.  Whether the guest
 * is to have any at other times is as before. */
static void vmm_huge_pages(struct vmm *vmm, bool allowed)
{
    if (vmm->huge_pages_off == allowed &&
        !prctl(PR_SET_THP_DISABLE, allowed ? 0ul : 1ul, 0ul, 0ul, 0ul))
        vmm->huge_pages_off = !allowed;
}

static int vmm_new_userfaultfd(int flags)
{
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | flags);
    if (uffd >= 0 || errno != EPERM)
        return uffd;
    /* An unprivileged VMM may have been given the device instead. */
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0) {
        errno = EPERM;
        return -1;
    }
    uffd = ioctl(device, VMM_UFFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK | flags);
    close(device);
    return uffd;
}

static void vmm_do_userfaultfd(struct vmm *vmm, struct vmm_client *client)
{
    /* The same one until `release`, in any state: a daemon that was started again asks for it
     * again.  Then a new one: what was done on the one before must not be found on it. */
    if (vmm->uffd < 0)
        vmm->uffd = vmm_new_userfaultfd(vmm->uffd_flags);
    if (vmm->uffd < 0)
        vmm_reply(client, -1,
                  "error userfaultfd: %m (give the VMM CAP_SYS_PTRACE or access to "
                  "/dev/userfaultfd, or set vm.unprivileged_userfaultfd=1)");
    else
        vmm_reply(client, vmm->uffd, "ok");
}

static void vmm_do_run(struct vmm *vmm, struct vmm_client *client)
{
    const char *problem = NULL;
    if (vmm->state == VMM_INCOMING)
        problem = "no device state has been loaded";
    else if (vmm->state == VMM_PAUSED)
        problem = vmm->run();
    if (problem) {
        vmm_reply(client, -1, "error %s", problem);
        return;
    }
    vmm->state = VMM_RUNNING;
    vmm_reply(client, -1, "ok");
}

static void vmm_do_stop(struct vmm *vmm, struct vmm_client *client)
{
    const char *problem = vmm->state == VMM_RUNNING ? vmm->stop() : NULL;
    if (problem) {
        vmm_reply(client, -1, "error %s", problem);
        return;
    }
    if (vmm->state == VMM_RUNNING)
        vmm->state = VMM_PAUSED;
    vmm_reply(client, -1, "ok");
}

/* `save` and `load`: the device state through the descriptor that came with the line, which is
 * closed before the answer, so that who reads it sees the end. */
static void vmm_do_state(struct vmm *vmm, struct vmm_client *client, enum vmm_state wanted,
                         const char *(*transfer)(int, size_t *))
{
    size_t bytes = 0;
    const char *problem;
    if (client->fd < 0)
        problem = "no descriptor came with the line";
    else if ((int)wanted != vmm->state)
        problem = wanted == VMM_PAUSED ? "the guest is not stopped" : "the guest is not incoming";
    else
        problem = transfer(client->fd, &bytes);
    vmm_close(&client->fd);
    if (problem) {
        vmm_reply(client, -1, "error %s", problem);
        return;
    }
    vmm->state = VMM_PAUSED;
    vmm_reply(client, -1, "ok bytes=%zu", bytes);
}

static void vmm_do_regions(struct vmm *vmm, struct vmm_client *client)
{
    for (size_t i = 0; i < vmm->region_count; i++) {
        struct vmm_region *region = &vmm->regions[i];
        vmm_reply(client, region->fd,
                  "region name=%s address=%p size=%zu page=%zu backing=%s offset=%jd", region->name,
                  (void *)region->address, region->size, region->page,
                  region->fd < 0 ? "anonymous" : "file", (intmax_t)region->offset);
    }
    vmm_reply(client, -1, "ok");
}

static void vmm_do_hello(struct vmm *vmm, struct vmm_client *client, int count, char **words)
{
    if (count < 3 || strcmp(words[1], "postcopyd") || strcmp(words[2], "1")) {
        vmm_reply(client, -1, "error this VMM speaks postcopyd 1 only");
        return;
    }
    /* The holder may be gone and its thread not know yet: a daemon that connects again at once. */
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += VMM_CLAIM_SECONDS;
    int late = 0;
    pthread_mutex_lock(&vmm->claim_lock);
    while (vmm->claim && vmm->claim != client && !late)
        late = pthread_cond_timedwait(&vmm->claim_dropped, &vmm->claim_lock, &until);
    bool mine = !vmm->claim || vmm->claim == client;
    if (mine)
        vmm->claim = client;
    pthread_mutex_unlock(&vmm->claim_lock);
    if (mine)
        vmm_reply(client, -1, "ok vmm=%s state=%s writes=%s", vmm->name, vmm_state_name(vmm),
                  vmm->writes ? vmm->writes : "seen");
    else
        vmm_reply(client, -1, "error another client holds this VMM, detach it there first");
}

__attribute__((noreturn)) static void vmm_exit(struct vmm *vmm)
{
    if (vmm->before_exit)
        vmm->before_exit();
    unlink(vmm->socket);
    _exit(0); /* threads may be waiting in page faults that nobody will answer */
}

/* Ends the VMM because its guest has ended, as was meant: who drives it is told why, in words for
 * people ("its guest shut down"), and does not take it for a crash. */
__attribute__((noreturn)) static inline void vmm_ended(struct vmm *vmm, const char *why)
{
    pthread_mutex_lock(&vmm->claim_lock); /* for good: the claim's holder stays */
    if (vmm->claim) {
        pthread_mutex_lock(&vmm->claim->writes); /* for good: `ended` is the last line */
        vmm_reply(vmm->claim, -1, "ended %s", why);
    }
    vmm_exit(vmm);
}

static void vmm_answer(struct vmm *vmm, struct vmm_client *client, char *line)
{
    char *words[VMM_WORDS_MAX + 1] = {0}, *rest = NULL;
    int count = 0;
    for (char *word = strtok_r(line, " ", &rest); word && count < VMM_WORDS_MAX;
         word = strtok_r(NULL, " ", &rest))
        words[count++] = word;
    const char *verb = count ? words[0] : "";

    if (!strcmp(verb, "hello"))
        vmm_do_hello(vmm, client, count, words);
    else if (vmm->extension && vmm->extension(client, count, words))
        ;
    else if (vmm->claim != client)
        vmm_reply(client, -1, "error say \"hello postcopyd 1\" first");
    else if (!strcmp(verb, "regions"))
        vmm_do_regions(vmm, client);
    else if (!strcmp(verb, "facts")) {
        for (size_t i = 0; i < vmm->fact_count; i++)
            vmm_reply(client, -1, "fact %s %s", vmm->facts[i].key, vmm->facts[i].value);
        vmm_reply(client, -1, "ok");
    } else if (!strcmp(verb, "userfaultfd"))
        vmm_do_userfaultfd(vmm, client);
    else if (!strcmp(verb, "discard"))
        vmm_do_discard(vmm, client, count, words);
    else if (!strcmp(verb, "release")) {
        vmm_close(&vmm->uffd);
        if (vmm->state != VMM_INCOMING)
            vmm_huge_pages(vmm, true);
        vmm_reply(client, -1, "ok");
    } else if (!strcmp(verb, "stop"))
        vmm_do_stop(vmm, client);
    else if (!strcmp(verb, "run"))
        vmm_do_run(vmm, client);
    else if (!strcmp(verb, "save"))
        vmm_do_state(vmm, client, VMM_PAUSED, vmm->save);
    else if (!strcmp(verb, "load"))
        vmm_do_state(vmm, client, VMM_INCOMING, vmm->load);
    else if (!strcmp(verb, "quit")) {
        vmm_reply(client, -1, "ok");
        vmm_exit(vmm);
    } else
        vmm_reply(client, -1, "error unknown verb %.64s", verb);
}

struct vmm_thread {
    struct vmm *vmm;
    struct vmm_client client;
};

static void *vmm_client_thread(void *argument)
{
    struct vmm_thread *self = argument;
    char *line;
    while ((line = vmm_read_line(&self->client))) {
        vmm_answer(self->vmm, &self->client, line);
        vmm_close(&self->client.fd);
    }
    vmm_close(&self->client.fd);
    pthread_mutex_lock(&self->vmm->claim_lock);
    if (self->vmm->claim == &self->client) {
        self->vmm->claim = NULL;
        pthread_cond_signal(&self->vmm->claim_dropped);
    }
    pthread_mutex_unlock(&self->vmm->claim_lock);
    close(self->client.socket);
    free(self);
    return NULL;
}

/* Binds and listens; a socket file that nobody listens on any more is replaced. */
static int vmm_listen(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(address.sun_path, path);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int bound = bind(listener, (struct sockaddr *)&address, sizeof address);
    if (bound && errno == EADDRINUSE) {
        if (connect(probe, (struct sockaddr *)&address, sizeof address) && errno == ECONNREFUSED) {
            unlink(path);
            bound = bind(listener, (struct sockaddr *)&address, sizeof address);
        } else {
            errno = EADDRINUSE;
        }
    }
    int why = errno;
    close(probe);
    if (bound || listen(listener, 16)) {
        errno = bound ? why : errno;
        close(listener);
        return -1;
    }
    return listener;
}

/* Answers clients on the calling thread and never returns; `listener` is from vmm_listen(). */
__attribute__((noreturn)) static void vmm_serve(struct vmm *vmm, int listener)
{
    signal(SIGPIPE, SIG_IGN);
    if (vmm->state == VMM_INCOMING)
        vmm_huge_pages(vmm, false);
    for (;;) {
        int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (client < 0) {
            /* Out of descriptors or memory: the guest runs on, the client waits. */
            if (errno != EINTR)
                usleep(10000);
            continue;
        }
        struct vmm_thread *thread = calloc(1, sizeof *thread);
        pthread_t id;
        if (thread) {
            thread->vmm = vmm;
            thread->client.socket = client;
            thread->client.fd = -1;
            thread->client.writes = (pthread_mutex_t)PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
        }
        if (!thread || pthread_create(&id, NULL, vmm_client_thread, thread)) {
            free(thread);
            close(client);
            continue;
        }
        pthread_detach(id);
    }
}

#endif
