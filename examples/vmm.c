/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A small VMM whose guest proves its memory: the demo guest of postcopyd.
 *
 * The guest is threads that write every page of their share of guest RAM in a new random order
 * each sweep, check each page whole before they overwrite it, and check random others in between.
 * What a page must hold follows from a few numbers: the order of a sweep is a permutation that
 * can be inverted, so from a thread's count of visits alone anybody can tell how often, and when
 * last, a page was written.  These numbers are the device state; it stays at a few KiB however
 * large the memory, and a page that is stale, lost, torn or another's is noticed wherever it is.
 *
 * It owns the guest and its command line; the protocol is vmm_protocol.h's.
 */
#include "vmm_protocol.h"

#include <getopt.h>
#include <poll.h>
#include <sys/file.h>

#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21U << 26)
#endif

#define PAGE 4096
#define WORDS (PAGE / 8)
#define HUGE (2UL << 20)
#define THREADS_MAX 256
#define REGIONS_MAX 64
#define BALLOONS_MAX 64
#define MAGIC UINT64_C(0x31747365756770) /* "pguest1" */

/* A range that the guest gave back before its visit number `op`: zeros until written again. */
struct balloon {
    uint64_t first, count, op;
};

/* What goes on at the destination exactly where it stopped at the source. */
struct progress {
    uint64_t op; /* visits done; sweep = op / pages, place in it = op % pages */
    uint64_t random;
    uint64_t checked, zero, stale, torn;
    uint64_t balloon_count;
    struct balloon balloons[BALLOONS_MAX];
};

struct guest_thread {
    struct progress p;
    uint64_t index, first, count; /* its share: `count` touched pages from number `first` */
    uint64_t due;                 /* ns; when the next visit may be, with --rate */
    /* For the report, which looks on without stopping the thread. */
    _Atomic uint64_t ops, checked, zero, stale, torn, last, gap, max_gap;
};

struct state_header {
    uint64_t magic, size, memory, threads, wild, last;
    char boot[40];
};

static struct {
    uint64_t memory, pages, wild, touched, rate, threads, region_pages;
    uint64_t padding, load_touches;
    struct guest_thread thread[THREADS_MAX];
    struct vmm_region region[REGIONS_MAX];
    /* `holds`: how many want the threads parked (stop, verify, balloon). */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    _Atomic uint64_t holds;
    uint64_t parked;
    /* One at a time: verify, balloon, save, load. */
    pthread_mutex_t data;
    bool report;
    char *unlink;
    char *_Atomic misbehave; /* HOW:VERB, until it was done */
    int spared;              /* times that it is told the verb before that */
} guest = {.lock = PTHREAD_MUTEX_INITIALIZER, .data = PTHREAD_MUTEX_INITIALIZER};

static struct vmm vmm = {.name = "demo", VMM_INIT};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static uint64_t mix(uint64_t x) /* splitmix64's finalizer, Steele, Lea, Flood 2014 */
{
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

/* --- the order of a sweep -------------------------------------------------------------------- */

/* A permutation of 0..count-1: steps that can be undone on the next power of two, walked until
 * the result is below `count`. */
struct order {
    uint64_t count, mask, key1, key2;
    unsigned half;
};

#define STEP1 UINT64_C(0xd1342543de82ef95)
#define STEP2 UINT64_C(0xaf251af3b0f025b5)

static uint64_t undo1, undo2; /* inverses of the steps; set once, in main */

static uint64_t inverse(uint64_t odd) /* modulo 2^64, by Newton's iteration */
{
    uint64_t x = odd;
    for (int i = 0; i < 6; i++)
        x *= 2 - odd * x;
    return x;
}

static struct order order_of(const struct guest_thread *t, uint64_t sweep)
{
    unsigned bits = t->count > 1 ? 64 - (unsigned)__builtin_clzll(t->count - 1) : 0;
    uint64_t key = mix(sweep * THREADS_MAX + t->index);
    return (struct order){t->count, (UINT64_C(1) << bits) - 1, key, mix(key), (bits + 1) / 2};
}

static uint64_t page_at(const struct order *o, uint64_t place)
{
    uint64_t x = place;
    do {
        x = (x * STEP1 + o->key1) & o->mask;
        x ^= x >> o->half;
        x = (x * STEP2 + o->key2) & o->mask;
        x ^= x >> o->half;
    } while (x >= o->count);
    return x;
}

static uint64_t place_of(const struct order *o, uint64_t page)
{
    uint64_t x = page;
    do {
        x ^= x >> o->half;
        x = ((x - o->key2) * undo2) & o->mask;
        x ^= x >> o->half;
        x = ((x - o->key1) * undo1) & o->mask;
    } while (x >= o->count);
    return x;
}

/* --- what a page must hold ------------------------------------------------------------------- */

/* Touched page number i -> page of guest RAM: one at a random place in each `wild` pages. */
static uint64_t spread(uint64_t i)
{
    return guest.wild == 1 ? i : i * guest.wild + mix(i) % guest.wild;
}

static uint64_t *page_address(uint64_t page)
{
    const struct vmm_region *region = &guest.region[page / guest.region_pages];
    return (uint64_t *)(region->address + page % guest.region_pages * PAGE);
}

/* The version that the thread's page i (of its share) has now; 0: zeros. */
static uint64_t version_of(const struct guest_thread *t, uint64_t i)
{
    uint64_t sweep = t->p.op / t->count;
    struct order order = order_of(t, sweep);
    uint64_t place = place_of(&order, i), written;
    if (place < t->p.op % t->count) {
        written = sweep * t->count + place;
    } else {
        if (!sweep--)
            return 0;
        order = order_of(t, sweep);
        written = sweep * t->count + place_of(&order, i);
    }
    uint64_t page = t->p.balloon_count ? spread(t->first + i) : 0;
    for (uint64_t b = 0; b < t->p.balloon_count; b++) {
        const struct balloon *balloon = &t->p.balloons[b];
        if (page - balloon->first < balloon->count && written < balloon->op)
            return 0;
    }
    return sweep + 1;
}

static uint64_t word_base(uint64_t page, uint64_t version)
{
    return mix(page ^ version << 40);
}

static void write_page(uint64_t page, uint64_t version)
{
    uint64_t *word = page_address(page), base = word_base(page, version);
    word[0] = page;
    word[1] = version;
    for (uint64_t i = 2; i < WORDS; i++)
        word[i] = base + i * STEP1;
}

static bool page_is(const uint64_t *word, uint64_t page, uint64_t version)
{
    uint64_t wrong = 0;
    if (!version) {
        for (uint64_t i = 0; i < WORDS; i++)
            wrong |= word[i];
        return !wrong;
    }
    uint64_t base = word_base(page, version);
    wrong = (word[0] ^ page) | (word[1] ^ version);
    for (uint64_t i = 2; i < WORDS; i++)
        wrong |= word[i] ^ (base + i * STEP1);
    return !wrong;
}

static _Atomic int complaints;

/* Reads the whole page; counts, and says once in a while, what is wrong with it. */
static bool check_page(struct progress *count, uint64_t page, uint64_t version)
{
    const uint64_t *word = page_address(page);
    count->checked++;
    if (page_is(word, page, version))
        return true;
    const char *what = "torn";
    if (page_is(word, page, 0))
        what = "zero", count->zero++;
    else if (word[0] == page && word[1] && page_is(word, page, word[1]))
        what = "stale", count->stale++;
    else
        count->torn++;
    if (complaints++ < 10)
        fprintf(stderr,
                "vmm: page %" PRIu64 " is %s: expected version %" PRIu64 ", it says page %" PRIu64
                " version %" PRIu64 "\n",
                page, what, version, word[0], word[1]);
    return false;
}

/* --- the guest's threads --------------------------------------------------------------------- */

static void park(struct guest_thread *t)
{
    pthread_mutex_lock(&guest.lock);
    guest.parked++;
    pthread_cond_broadcast(&guest.changed);
    while (guest.holds)
        pthread_cond_wait(&guest.changed, &guest.lock);
    guest.parked--;
    pthread_mutex_unlock(&guest.lock);
    t->due = now_ns();
}

static void wait_until_due(struct guest_thread *t)
{
    uint64_t now = now_ns();
    t->due += 1000000000 * guest.threads / guest.rate;
    if (t->due + 10000000 < now)
        t->due = now; /* time lost is lost: no burst after a fault */
    if (t->due < now + 1000000)
        return;
    struct timespec until = {(time_t)(t->due / 1000000000), (long)(t->due % 1000000000)};
    pthread_mutex_lock(&guest.lock); /* on the condition, so that a stop does not wait for us */
    while (!guest.holds && now_ns() < t->due)
        pthread_cond_timedwait(&guest.changed, &guest.lock, &until);
    pthread_mutex_unlock(&guest.lock);
}

static void forget_old_balloons(struct guest_thread *t)
{
    uint64_t kept = 0;
    for (uint64_t b = 0; b < t->p.balloon_count; b++)
        if (t->p.balloons[b].op + 2 * t->count > t->p.op)
            t->p.balloons[kept++] = t->p.balloons[b];
    t->p.balloon_count = kept;
}

static void note_time(struct guest_thread *t)
{
    uint64_t now = now_ns(), last = t->last, gap = last ? now - last : 0;
    atomic_store_explicit(&t->last, now, memory_order_relaxed);
    if (gap > t->gap)
        t->gap = gap;
    if (gap > t->max_gap)
        t->max_gap = gap;
}

static void publish(struct guest_thread *t)
{
    atomic_store_explicit(&t->ops, t->p.op, memory_order_relaxed);
    atomic_store_explicit(&t->checked, t->p.checked, memory_order_relaxed);
    atomic_store_explicit(&t->zero, t->p.zero, memory_order_relaxed);
    atomic_store_explicit(&t->stale, t->p.stale, memory_order_relaxed);
    atomic_store_explicit(&t->torn, t->p.torn, memory_order_relaxed);
}

/* One visit: the next page in this sweep's order, checked, then written anew.  In the first
 * sweep everything is still zero, so it only writes: memory fills as fast as it can. */
static void visit(struct guest_thread *t)
{
    uint64_t sweep = t->p.op / t->count;
    struct order order = order_of(t, sweep);
    uint64_t i = page_at(&order, t->p.op % t->count), page = spread(t->first + i);
    if (sweep) {
        check_page(&t->p, page, version_of(t, i));
        t->p.random = mix(t->p.random);
        if (t->p.random % 4 == 0) {
            uint64_t other = (t->p.random >> 8) % t->count;
            check_page(&t->p, spread(t->first + other), version_of(t, other));
        }
    }
    write_page(page, sweep + 1);
    t->p.op++;
    if (t->p.balloon_count)
        forget_old_balloons(t);
}

static void *guest_thread(void *argument)
{
    struct guest_thread *t = argument;
    t->due = now_ns();
    for (;;) {
        if (guest.holds)
            park(t);
        visit(t);
        note_time(t);
        publish(t);
        if (guest.rate)
            wait_until_due(t);
    }
    return NULL;
}

/* Every thread at rest between two visits.  With a limit of seconds (0: none): a thread waiting
 * for a missing page cannot be parked, and false leaves the guest as it was. */
static void let_go(void)
{
    pthread_mutex_lock(&guest.lock);
    guest.holds--;
    pthread_cond_broadcast(&guest.changed);
    pthread_mutex_unlock(&guest.lock);
}

static bool hold(unsigned seconds)
{
    uint64_t limit = now_ns() + seconds * UINT64_C(1000000000);
    struct timespec until = {(time_t)(limit / 1000000000), (long)(limit % 1000000000)};
    int late = 0;
    pthread_mutex_lock(&guest.lock);
    guest.holds++;
    pthread_cond_broadcast(&guest.changed);
    while (guest.parked < guest.threads && !late) {
        if (seconds)
            late = pthread_cond_timedwait(&guest.changed, &guest.lock, &until);
        else
            pthread_cond_wait(&guest.changed, &guest.lock);
    }
    bool held = guest.parked == guest.threads;
    pthread_mutex_unlock(&guest.lock);
    if (!held)
        let_go();
    return held;
}

/* --- what the protocol asks of the guest ----------------------------------------------------- */

static const char *guest_stop(void)
{
    return hold(5) ? NULL : "a guest thread waits for a missing page, stop when it has come";
}

static const char *guest_run(void)
{
    let_go();
    return NULL;
}

static void boot_id(char text[40])
{
    memset(text, 0, 40);
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, text, 36) != 36)
        memset(text, 0, 40);
    vmm_close(&fd);
}

static uint64_t checksum(const char *data, size_t size)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < size; i += 8) {
        uint64_t word = 0;
        memcpy(&word, data + i, size - i < 8 ? size - i : 8);
        sum = mix(sum ^ word);
    }
    return sum;
}

static size_t state_size(void)
{
    return sizeof(struct state_header) + guest.threads * sizeof(struct progress) + guest.padding +
           sizeof(uint64_t);
}

static const char *guest_save(int fd, size_t *bytes)
{
    size_t size = state_size();
    char *state = calloc(1, size), *to = state;
    if (!state)
        return "no memory for the device state";
    pthread_mutex_lock(&guest.data);
    struct state_header header = {.magic = MAGIC,
                                  .size = size,
                                  .memory = guest.memory,
                                  .threads = guest.threads,
                                  .wild = guest.wild};
    boot_id(header.boot);
    for (uint64_t i = 0; i < guest.threads; i++)
        if (guest.thread[i].last > header.last)
            header.last = guest.thread[i].last;
    to = mempcpy(to, &header, sizeof header);
    for (uint64_t i = 0; i < guest.threads; i++)
        to = mempcpy(to, &guest.thread[i].p, sizeof guest.thread[i].p);
    pthread_mutex_unlock(&guest.data);
    for (uint64_t i = 0; i < guest.padding; i++)
        *to++ = (char)mix(i);
    uint64_t sum = checksum(state, size - sizeof sum);
    memcpy(to, &sum, sizeof sum);

    const char *problem = NULL;
    while (*bytes < size && !problem) {
        ssize_t done = write(fd, state + *bytes, size - *bytes);
        if (done > 0)
            *bytes += (size_t)done;
        else if (errno != EINTR)
            problem = "the device state could not be written, its reader has gone";
    }
    free(state);
    return problem;
}

static const char *apply_state(const char *state, size_t size)
{
    struct state_header header = {0};
    uint64_t sum;
    memcpy(&header, state, size < sizeof header ? size : sizeof header);
    if (header.magic != MAGIC)
        return "this is not a device state of the demo guest";
    if (header.memory != guest.memory || header.threads != guest.threads ||
        header.wild != guest.wild)
        return "the device state is of a guest with other --memory, --threads or --wild";
    if (header.size != size || size < state_size() - guest.padding)
        return "the device state is cut short";
    memcpy(&sum, state + size - sizeof sum, sizeof sum);
    if (sum != checksum(state, size - sizeof sum))
        return "the device state is damaged";

    char boot[40];
    boot_id(boot);
    const char *from = state + sizeof header;
    for (uint64_t i = 0; i < guest.threads; i++) {
        struct guest_thread *t = &guest.thread[i];
        memcpy(&t->p, from, sizeof t->p);
        from += sizeof t->p;
        if (t->p.balloon_count > BALLOONS_MAX)
            return "the device state is damaged";
        /* On the same machine the clock goes on, and the first gap is the whole blackout. */
        t->last = memcmp(boot, header.boot, sizeof boot) ? 0 : header.last;
        publish(t);
    }
    /* As devices do that find their queues in guest RAM: these are page faults, in `load`. */
    for (uint64_t n = 0; n < guest.load_touches; n++) {
        struct guest_thread *t = &guest.thread[n % guest.threads];
        uint64_t i = mix(n) % t->count;
        if (!check_page(&t->p, spread(t->first + i), version_of(t, i)))
            return "a page that the devices need is wrong";
    }
    return NULL;
}

static const char *guest_load(int fd, size_t *bytes)
{
    size_t room = state_size() + (1 << 20);
    char *state = malloc(room);
    const char *problem = state ? NULL : "no memory for the device state";
    while (!problem) {
        ssize_t got = read(fd, state + *bytes, room - *bytes);
        if (got > 0)
            *bytes += (size_t)got;
        if (got == 0)
            break;
        if (got < 0 && errno != EINTR)
            problem = "the device state could not be read";
        else if (*bytes == room)
            problem = "the device state is longer than this guest's can be";
    }
    pthread_mutex_lock(&guest.data);
    if (!problem)
        problem = apply_state(state, *bytes);
    pthread_mutex_unlock(&guest.data);
    free(state);
    return problem;
}

/* --- verbs of the demo guest, beside the protocol -------------------------------------------- */

static struct progress verify_everything(uint64_t *bad)
{
    struct progress count = {0};
    uint64_t next = 0, owner = 0;
    for (uint64_t page = 0; page < guest.pages; page++) {
        uint64_t version = 0;
        if (next < guest.touched && page == spread(next)) {
            while (next >= guest.thread[owner].first + guest.thread[owner].count)
                owner++;
            version = version_of(&guest.thread[owner], next - guest.thread[owner].first);
            next++;
        }
        check_page(&count, page, version);
    }
    *bad = count.zero + count.stale + count.torn;
    return count;
}

static void do_verify(struct vmm_client *client)
{
    uint64_t bad;
    if (vmm.state == VMM_INCOMING) {
        vmm_reply(client, -1, "error no device state has been loaded, nothing to verify");
        return;
    }
    hold(0);
    pthread_mutex_lock(&guest.data);
    struct progress count = verify_everything(&bad);
    pthread_mutex_unlock(&guest.data);
    let_go();
    vmm_reply(client, -1,
              "ok pages=%" PRIu64 " bad=%" PRIu64 " zero=%" PRIu64 " stale=%" PRIu64
              " torn=%" PRIu64,
              count.checked, bad, count.zero, count.stale, count.torn);
}

static const char *give_back(uint64_t offset, uint64_t length)
{
    uint64_t region_size = guest.memory / vmm.region_count, end = offset + length;
    for (uint64_t i = 0; i < guest.threads; i++)
        if (guest.thread[i].p.balloon_count == BALLOONS_MAX)
            return "too many ranges were given back, wait until they have been written again";
    for (uint64_t at = offset, part; at < end; at += part) {
        const struct vmm_region *region = &guest.region[at / region_size];
        part = region_size - at % region_size;
        if (part > end - at)
            part = end - at;
        if (!vmm_empty(region, at % region_size, part))
            return "the pages could not be given back";
        for (uint64_t i = 0; i < guest.threads; i++) {
            struct progress *p = &guest.thread[i].p;
            if (at == offset)
                p->balloons[p->balloon_count++] =
                    (struct balloon){offset / PAGE, length / PAGE, p->op};
        }
    }
    return NULL;
}

static void do_balloon(struct vmm_client *client, int count, char **words)
{
    uint64_t offset, length;
    const char *problem;
    if (count != 3 || !vmm_number(words[1], &offset) || !vmm_number(words[2], &length) || !length ||
        (offset | length) % guest.region[0].page || offset > guest.memory ||
        length > guest.memory - offset) {
        vmm_reply(client, -1, "error balloon needs OFFSET LENGTH in whole pages of guest RAM");
        return;
    }
    if (vmm.state == VMM_INCOMING) {
        vmm_reply(client, -1, "error no device state has been loaded, nothing to give back");
        return;
    }
    hold(0);
    pthread_mutex_lock(&guest.data);
    problem = give_back(offset, length);
    pthread_mutex_unlock(&guest.data);
    let_go();
    if (problem)
        vmm_reply(client, -1, "error %s", problem);
    else
        vmm_reply(client, -1, "ok");
}

/* What a broken VMM does to who drives it, once. True: the verb is not to be obeyed. */
static bool misbehave(struct vmm_client *client, const char *verb)
{
    const char *how = guest.misbehave, *when = how ? strchr(how, ':') + 1 : NULL;
    if (!how || strcmp(verb, when) || guest.spared-- > 0)
        return false;
    guest.misbehave = NULL;
    if (!strncmp(how, "exit:", 5))
        _exit(1);
    if (!strncmp(how, "refuse:", 7))
        vmm_reply(client, -1, "error it was told to refuse %s", verb);
    else /* hang, until the client has had enough */
        poll(&(struct pollfd){client->socket, POLLRDHUP, 0}, 1, -1);
    return true;
}

static bool extension(struct vmm_client *client, int count, char **words)
{
    if (count && misbehave(client, words[0]))
        return true;
    if (count && !strcmp(words[0], "verify"))
        do_verify(client);
    else if (count && !strcmp(words[0], "balloon"))
        do_balloon(client, count, words);
    else if (count && !strcmp(words[0], "shutdown"))
        vmm_ended(&vmm, "its guest shut down");
    else if (count && !strcmp(words[0], "misbehaved"))
        vmm_reply(client, -1, "ok done=%d", !guest.misbehave);
    else
        return false;
    return true;
}

/* --- the report ------------------------------------------------------------------------------ */

static void print_report(void)
{
    uint64_t ops = 0, checked = 0, zero = 0, stale = 0, torn = 0, gap = 0, max_gap = 0;
    uint64_t sweeps = UINT64_MAX, now = now_ns();
    for (uint64_t i = 0; i < guest.threads; i++) {
        struct guest_thread *t = &guest.thread[i];
        ops += t->ops;
        checked += t->checked;
        zero += t->zero;
        stale += t->stale;
        torn += t->torn;
        if (t->ops / t->count < sweeps)
            sweeps = t->ops / t->count;
        uint64_t last = t->last, recorded = atomic_exchange(&t->gap, 0);
        if (recorded > gap)
            gap = recorded;
        if (last && now > last && now - last > gap)
            gap = now - last; /* one that has not ended yet */
        if (t->max_gap > max_gap)
            max_gap = t->max_gap;
    }
    printf("{\"event\":\"report\",\"ms\":%" PRIu64 ".%03" PRIu64 ",\"state\":\"%s\"",
           now / 1000000, now / 1000 % 1000, vmm_state_name(&vmm));
    printf(",\"ops\":%" PRIu64 ",\"sweeps\":%" PRIu64, ops, sweeps);
    printf(",\"checked\":%" PRIu64 ",\"bad\":%" PRIu64, checked, zero + stale + torn);
    printf(",\"zero\":%" PRIu64 ",\"stale\":%" PRIu64 ",\"torn\":%" PRIu64, zero, stale, torn);
    printf(",\"gapUs\":%" PRIu64 ",\"maxGapUs\":%" PRIu64 "}\n", gap / 1000, max_gap / 1000);
    fflush(stdout);
}

static void *report_thread(void *argument)
{
    (void)argument;
    struct timespec next;
    clock_gettime(CLOCK_MONOTONIC, &next);
    for (;;) {
        next.tv_nsec += 100000000;
        if (next.tv_nsec >= 1000000000)
            next.tv_sec++, next.tv_nsec -= 1000000000;
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
        print_report();
    }
    return NULL;
}

static void before_exit(void)
{
    /* Unless the report waits for a reader that does not read: that must not hold up the end. */
    if (guest.report && !ftrylockfile(stdout))
        print_report();
    if (guest.unlink)
        unlink(guest.unlink);
}

static void on_signal(int number)
{
    unlink(vmm.socket);
    if (guest.unlink)
        unlink(guest.unlink);
    _exit(128 + number);
}

/* --- starting -------------------------------------------------------------------------------- */

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("vmm: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(2);
}

static uint64_t parse_size(const char *text)
{
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, 10);
    const char *units = "KMGT", *unit = *end ? strchr(units, *end & ~0x20) : NULL;
    unsigned shift = unit ? (unsigned)(unit - units + 1) * 10 : 0;
    if (*text < '0' || *text > '9' || errno || (*end && (!unit || end[1])) ||
        value > UINT64_MAX >> shift)
        fail("%s is not a number or size; write it as 512M or 4G", text);
    return value << shift;
}

static int open_backing(const char *backing, const char *path, size_t page)
{
    if (!strcmp(backing, "anonymous"))
        return -1;
    int fd;
    if (path) {
        fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        /* Emptying a file that another VMM runs on would destroy its guest. */
        if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB))
            fail("%s is in use by another VMM; give each its own --path", path);
    } else {
        unsigned huge = page > PAGE ? MFD_HUGETLB | MFD_HUGE_2MB : 0;
        fd = memfd_create("guest-ram", MFD_CLOEXEC | huge);
    }
    if (fd < 0 || ftruncate(fd, 0) || ftruncate(fd, (off_t)guest.memory))
        fail("making guest RAM in %s failed: %m", path ? path : "a memfd");
    return fd;
}

static void map_memory(const char *backing, const char *path, size_t regions)
{
    static char names[REGIONS_MAX][8];
    size_t page = !strcmp(backing, "hugetlbfs") ? HUGE : PAGE, size = guest.memory / regions;
    int fd = open_backing(backing, path, page);
    /* One reservation with a gap after each region: the kernel must not merge two of them. */
    char *base = mmap(NULL, regions * (size + HUGE) + HUGE, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        fail("no address space for %" PRIu64 " bytes of guest RAM: %m", guest.memory);
    base = (char *)(((uintptr_t)base + HUGE - 1) & ~(HUGE - 1));
    for (size_t i = 0; i < regions; i++) {
        struct vmm_region *region = &guest.region[i];
        snprintf(names[i], sizeof names[i], "ram%zu", i);
        *region = (struct vmm_region){names[i], base + i * (size + HUGE), size, page, fd,
                                      fd < 0 ? 0 : (off_t)(i * size)};
        if (mmap(region->address, size, PROT_READ | PROT_WRITE,
                 MAP_FIXED | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED), fd,
                 region->offset) == MAP_FAILED)
            fail("mapping %zu bytes of guest RAM failed: %m%s", size,
                 page > PAGE ? " (are there enough free huge pages in /proc/meminfo?)" : "");
    }
    guest.region_pages = size / PAGE;
    vmm.regions = guest.region;
    vmm.region_count = regions;
}

__attribute__((format(printf, 2, 3))) static void add_fact(const char *key, const char *format, ...)
{
    struct vmm_fact *fact = &vmm.facts[vmm.fact_count++];
    va_list arguments;
    va_start(arguments, format);
    snprintf(fact->key, sizeof fact->key, "%s", key);
    vsnprintf(fact->value, sizeof fact->value, format, arguments);
    va_end(arguments);
}

static void start_threads(void)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&guest.changed, &attributes);
    for (uint64_t i = 0; i < guest.threads; i++) {
        struct guest_thread *t = &guest.thread[i];
        t->index = i;
        t->first = guest.touched * i / guest.threads;
        t->count = guest.touched * (i + 1) / guest.threads - t->first;
        t->p.random = mix(i);
        pthread_t id;
        if (pthread_create(&id, NULL, guest_thread, t))
            fail("starting guest thread %" PRIu64 " failed: %m", i);
    }
}

static const char usage[] =
    "usage: vmm --socket PATH [options]\n"
    "  --memory SIZE      guest RAM, e.g. 256M (default 64M)\n"
    "  --threads N        guest threads (default 2)\n"
    "  --backing KIND     file, memfd (default), anonymous or hugetlbfs\n"
    "  --path FILE        the file for file, or for hugetlbfs (else a memfd of huge pages)\n"
    "  --regions N        guest RAM in N mappings (default 1)\n"
    "  --wild N           the guest touches one page in N, the others stay holes (default 1)\n"
    "  --rate N           pages written per second by all threads together (default: no limit)\n"
    "  --device-state N   bytes added to the device state (default 0)\n"
    "  --load-touches N   pages that loading the device state reads (default 1)\n"
    "  --writes HOW       seen, direct or unseen: what `hello` says of them (default seen)\n"
    "  --misbehave HOW:VERB[@N]  refuse, hang or exit, once, when told this (the Nth time; for tests)\n"
    "  --incoming         wait for a guest instead of starting one\n"
    "  --report           a line of JSON on stdout each 100 ms\n";

int main(int argc, char **argv)
{
    const char *backing = "memfd", *path = NULL;
    size_t regions = 1;
    bool incoming = false;
    undo1 = inverse(STEP1);
    undo2 = inverse(STEP2);
    guest.memory = 64 << 20;
    guest.threads = 2;
    guest.wild = guest.load_touches = 1;
    static const struct option options[] = {{"socket", required_argument, NULL, 's'},
                                            {"memory", required_argument, NULL, 'm'},
                                            {"threads", required_argument, NULL, 't'},
                                            {"backing", required_argument, NULL, 'b'},
                                            {"path", required_argument, NULL, 'p'},
                                            {"regions", required_argument, NULL, 'n'},
                                            {"wild", required_argument, NULL, 'w'},
                                            {"rate", required_argument, NULL, 'r'},
                                            {"device-state", required_argument, NULL, 'd'},
                                            {"load-touches", required_argument, NULL, 'l'},
                                            {"writes", required_argument, NULL, 'W'},
                                            {"misbehave", required_argument, NULL, 'M'},
                                            {"incoming", no_argument, NULL, 'i'},
                                            {"report", no_argument, NULL, 'R'},
                                            {"help", no_argument, NULL, 'h'},
                                            {0}};
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (option) {
        case 's': vmm.socket = optarg; break;
        case 'm': guest.memory = parse_size(optarg); break;
        case 't': guest.threads = parse_size(optarg); break;
        case 'b': backing = optarg; break;
        case 'p': path = optarg; break;
        case 'n': regions = parse_size(optarg); break;
        case 'w': guest.wild = parse_size(optarg); break;
        case 'r': guest.rate = parse_size(optarg); break;
        case 'd': guest.padding = parse_size(optarg); break;
        case 'l': guest.load_touches = parse_size(optarg); break;
        case 'W': vmm.writes = optarg; break;
        case 'M': guest.misbehave = optarg; break;
        case 'i': incoming = true; break;
        case 'R': guest.report = true; break;
        case 'h': fputs(usage, stdout); return 0;
        default: fputs(usage, stderr); return 2;
        }
    }
    if (!vmm.socket || optind < argc) {
        fputs(usage, stderr);
        return 2;
    }
    if (guest.misbehave && !strchr(guest.misbehave, ':'))
        fail("--misbehave %s has no verb; write it as refuse:load", guest.misbehave);
    char *nth = guest.misbehave ? strchr(guest.misbehave, '@') : NULL;
    if (nth) {
        *nth = '\0';
        guest.spared = atoi(nth + 1) - 1;
    }
    bool huge = !strcmp(backing, "hugetlbfs"), file = !strcmp(backing, "file");
    if (!huge && !file && strcmp(backing, "memfd") && strcmp(backing, "anonymous"))
        fail("--backing %s is unknown; it is file, memfd, anonymous or hugetlbfs", backing);
    if (file != !!path && !huge)
        fail("--path goes with --backing file or hugetlbfs, and file needs one");
    if (regions < 1 || regions > REGIONS_MAX || guest.memory % (regions * (huge ? HUGE : PAGE)))
        fail("--memory must be whole pages in each of 1 to %d --regions", REGIONS_MAX);
    guest.pages = guest.memory / PAGE;
    guest.touched = guest.wild ? guest.pages / guest.wild : 0;
    if (guest.threads < 1 || guest.threads > THREADS_MAX || guest.touched < guest.threads)
        fail("--threads must be 1 to %d, with a page to touch for each", THREADS_MAX);
    if (guest.padding > 256 << 20)
        fail("--device-state may be 256M at most");

    int listener = vmm_listen(vmm.socket);
    if (listener < 0)
        fail("listening on %s failed: %m", vmm.socket);
    map_memory(backing, path, regions);
    if (path)
        guest.unlink = strdup(path);
    add_fact("layout", "memory=%" PRIu64 " regions=%zu page=%zu", guest.memory, regions,
             guest.region[0].page);
    add_fact("cpu", "threads=%" PRIu64 " wild=%" PRIu64, guest.threads, guest.wild);
    vmm.uffd_flags = VMM_UFFD_USER_MODE_ONLY;
    vmm.stop = guest_stop;
    vmm.run = guest_run;
    vmm.save = guest_save;
    vmm.load = guest_load;
    vmm.extension = extension;
    vmm.before_exit = before_exit;
    vmm.state = incoming ? VMM_INCOMING : VMM_RUNNING;
    guest.holds = incoming;
    signal(SIGTERM, on_signal);
    signal(SIGINT, on_signal);
    start_threads();
    if (incoming)
        hold(0), let_go(); /* parked before the first client is answered */
    printf("{\"event\":\"listening\",\"socket\":\"%s\"}\n", vmm.socket);
    fflush(stdout);
    pthread_t id;
    if (guest.report && pthread_create(&id, NULL, report_thread, NULL))
        fail("starting the report failed: %m");
    vmm_serve(&vmm, listener);
}
