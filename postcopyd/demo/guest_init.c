// SPDX-License-Identifier: Apache-2.0
/*
 * The only program of the verifying guest: PID 1 of a Linux kernel that boots from an initramfs.
 *
 * It owns the guest's test memory and proves that memory right: each page holds content derived
 * from its own number and from a version that a table elsewhere in the guest's memory remembers,
 * so a page of zeros, an earlier version, another page or a torn one is noticed the next time a
 * worker touches it.  It must not know that it is being migrated, nor by what.
 *
 * From the kernel command line:
 *   pc.mb=N        test memory in MiB (default: half of what is free)
 *   pc.threads=N   workers, each pinned to a vCPU (default: one for each vCPU)
 *   pc.hot=N       MiB of it that the workers work on, the rest lies idle (default 0: all)
 *   pc.order=random|sequential
 *   pc.write=N     percent of operations that write after they have checked (default 100)
 *   pc.rate=N      operations per second of all workers, 0 idle, -1 unlimited (default)
 *   pc.report=N    ms between two reports (default 50)
 *   pc.disk=N      operations per second on /dev/vda (default 0: disk left alone)
 *   pc.readers=N   threads that read /dev/vda all the time, which must hold blocks of the page
 *                  pattern, and check what they read then and later (default 0; instead of pc.disk)
 *   pc.read_kb=N   KiB of one read (default 256)
 *   pc.read_mb=N   memory that is read into, of all readers (default 8)
 *   pc.net=N       datagrams per second to pc.peer=A.B.C.D:PORT from pc.ip=A.B.C.D (default 0)
 *
 * Out, on the serial line, one line each, fields as key=value:
 *   pc hello
 *   pc ready   pages= workers= fill_ms=
 *   pc report  t= (guest monotonic ms) ops=N,N.. (of each worker) bad= gap= (us) laps= disk=ops,bad
 *              net=sent,received,bad
 *   pc bad     what=page|table|disk kind=zero|stale|foreign|torn ... (the first MAX_DETAILS only)
 *   pc done    id= and what the command found
 *   pc error   text=...
 * In: "ID sweep;", "ID stop;", "ID go;", "ID rate N;", "ID write N;", "ID hot N;", "ID discard N;",
 * "ID quit;".
 * A command without its semicolon was cut off on its way and is not obeyed; one that repeats the
 * last ID gets the last answer again, so that the host may ask twice.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define WORDS (PAGE / sizeof(uint64_t))
#define GOLDEN UINT64_C(0x9e3779b97f4a7c15)
#define MAX_WORKERS 64
#define MAX_READERS 16
#define MAX_DETAILS 16
#define DISK_BLOCKS 2048u              /* 8 MiB: small enough that each block comes round often */
#define DISK_INDEX (UINT64_C(1) << 40) /* a disk block never passes for a page of memory */
#define DATAGRAM_WORDS 64u
#define MS INT64_C(1000000)

/* One vCPU's share of the test memory.  Only its own thread touches the share. */
struct worker {
    pthread_t thread;
    unsigned number;
    uint64_t first, pages;     /* page numbers in the test memory */
    uint32_t *version;         /* of each page; 0 means "discarded: reads as zeros" */
    uint64_t sum;              /* of table_term() over `version`, so that the table proves itself */
    uint64_t random, position;
    bool sweep;                /* asked for; cleared when done (under `lock`) */
    uint64_t sweep_bad;
    /* Read by the reporter while the worker runs. */
    _Alignas(64) _Atomic uint64_t ops;
    _Atomic uint64_t bad, laps;
    _Atomic int64_t longest;   /* ns, since the last report */
    _Atomic int64_t last;      /* when the last operation ended, 0 while it rests on purpose */
};

static struct worker workers[MAX_WORKERS];
static unsigned worker_count;
static uint8_t *memory;
static int serial = -1;

/* What the host may change while the workers run.  `hold` is all that they look at. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed;
static bool stopped, sweeping;
static unsigned resting;
static _Atomic bool hold;
static _Atomic int64_t rate = -1, write_percent = 100;
static _Atomic uint64_t hot_pages; /* of the test memory, each share its part; 0: all of it */
static uint64_t test_pages;
static bool sequential;

static _Atomic uint64_t disk_ops, disk_bad, net_sent, net_received, net_bad;
static _Atomic unsigned details;

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static struct timespec to_timespec(int64_t ns)
{
    return (struct timespec){.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
}

/* One whole line in one go: lines of several threads must not mix. */
__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
    static pthread_mutex_t writing = PTHREAD_MUTEX_INITIALIZER;
    char line[2048];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (length < 0)
        return;
    if ((size_t)length >= sizeof line)
        length = sizeof line - 1;

    pthread_mutex_lock(&writing);
    for (int done = 0; done < length;) {
        ssize_t n = write(serial, line + done, (size_t)(length - done));
        if (n <= 0 && errno != EINTR)
            break; /* nobody to tell it to */
        done += n > 0 ? (int)n : 0;
    }
    pthread_mutex_unlock(&writing);
}

#include "guest_page.h"

/* ---- workers ---- */

static uint64_t next_random(uint64_t *state)
{
    uint64_t x = *state; /* xorshift64 (Marsaglia: Xorshift RNGs) */
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

static uint64_t *page_at(const struct worker *w, uint64_t i)
{
    return (uint64_t *)(memory + (w->first + i) * PAGE);
}

static void write_version(struct worker *w, uint64_t i, uint32_t version)
{
    uint64_t index = w->first + i;
    fill(page_at(w, i), index, version);
    w->sum += table_term(index, version) - table_term(index, w->version[i]);
    w->version[i] = version;
}

/* Counts a wrong page once: it is mended, so that what is found next is another fault. */
static bool check_page(struct worker *w, uint64_t i)
{
    uint64_t *words = page_at(w, i);
    uint64_t index = w->first + i;
    uint32_t version = w->version[i];
    if (right(words, index, version))
        return true;
    describe("page", words, index, version);
    atomic_fetch_add(&w->bad, 1);
    if (version == 0)
        memset(words, 0, PAGE);
    else
        fill(words, index, version);
    return false;
}

static void sweep_share(struct worker *w)
{
    uint64_t sum = 0, bad = 0;
    for (uint64_t i = 0; i < w->pages; i++) {
        bad += !check_page(w, i);
        sum += table_term(w->first + i, w->version[i]);
    }
    if (sum != w->sum) {
        say("pc bad what=table kind=torn page=%llu expected=%016llx found=%016llx\n",
            (unsigned long long)w->first, (unsigned long long)w->sum, (unsigned long long)sum);
        atomic_fetch_add(&w->bad, 1);
        bad++;
        w->sum = sum;
    }
    w->sweep_bad = bad;
}

/* Until the host lets the workers go on; a sweep is done meanwhile.  Called without `lock`. */
static void rest(struct worker *w)
{
    atomic_store(&w->last, 0);
    pthread_mutex_lock(&lock);
    resting++;
    pthread_cond_broadcast(&changed);
    while (hold || w->sweep) {
        if (!w->sweep) {
            pthread_cond_wait(&changed, &lock);
            continue;
        }
        pthread_mutex_unlock(&lock);
        sweep_share(w);
        pthread_mutex_lock(&lock);
        w->sweep = false;
        pthread_cond_broadcast(&changed);
    }
    resting--;
    pthread_mutex_unlock(&lock);
}

/* Keeps to the rate: sleeps when a millisecond ahead of it, catches up no more than 10 ms, so that
 * work lost to a stall stays lost.  Returns when the next operation could have begun. */
static int64_t pace(struct worker *w, int64_t wanted, int64_t *due, int64_t now)
{
    *due += INT64_C(1000000000) * worker_count / wanted;
    if (*due < now - 10 * MS)
        *due = now;
    if (*due < now + MS)
        return now;
    struct timespec until = to_timespec(*due);
    atomic_store_explicit(&w->last, 0, memory_order_relaxed);
    pthread_mutex_lock(&lock);
    while (!hold && pthread_cond_timedwait(&changed, &lock, &until) != ETIMEDOUT)
        ;
    pthread_mutex_unlock(&lock);
    return *due;
}

static void operate(struct worker *w)
{
    uint64_t r = next_random(&w->random), i, pages = w->pages;
    uint64_t hot = atomic_load_explicit(&hot_pages, memory_order_relaxed);
    if (hot > 0 && hot < test_pages)
        pages = pages * hot / test_pages + 1;
    if (sequential) {
        i = w->position < pages ? w->position : 0;
        w->position = i + 1;
        if (w->position == pages) {
            w->position = 0;
            atomic_fetch_add_explicit(&w->laps, 1, memory_order_relaxed);
        }
    } else {
        i = ((r >> 32) * pages) >> 32;
    }
    check_page(w, i);
    int64_t percent = atomic_load_explicit(&write_percent, memory_order_relaxed);
    if ((int64_t)((r & 0xffff) * 100 >> 16) < percent)
        write_version(w, i, w->version[i] + 1);
}

static void *work(void *argument)
{
    struct worker *w = argument;
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(w->number % (unsigned)get_nprocs(), &cpus);
    sched_setaffinity(0, sizeof cpus, &cpus);
    for (uint64_t i = 0; i < w->pages; i++) {
        w->sum += table_term(w->first + i, 0);
        write_version(w, i, 1);
    }

    int64_t last = 0, due = 0;
    for (;;) {
        if (atomic_load_explicit(&hold, memory_order_relaxed)) {
            rest(w);
            due = last = now_ns();
            atomic_store_explicit(&w->last, last, memory_order_relaxed);
        }
        operate(w);
        atomic_fetch_add_explicit(&w->ops, 1, memory_order_relaxed);
        int64_t now = now_ns();
        if (now - last > atomic_load_explicit(&w->longest, memory_order_relaxed))
            atomic_store_explicit(&w->longest, now - last, memory_order_relaxed);
        last = now;
        int64_t wanted = atomic_load_explicit(&rate, memory_order_relaxed);
        if (wanted > 0)
            last = pace(w, wanted, &due, now);
        atomic_store_explicit(&w->last, last, memory_order_relaxed);
    }
    return NULL;
}

#include "guest_devices.h"

/* ---- reports ---- */

static void *report(void *argument)
{
    int64_t interval = *(const int64_t *)argument * MS, due = now_ns();
    for (;;) {
        char ops[MAX_WORKERS * 21];
        size_t length = 0;
        uint64_t bad = 0, laps = 0;
        int64_t gap = 0, now = now_ns();
        for (unsigned i = 0; i < worker_count; i++) {
            struct worker *w = &workers[i];
            length += (size_t)snprintf(ops + length, sizeof ops - length, "%s%llu", i ? "," : "",
                                       (unsigned long long)atomic_load(&w->ops));
            bad += atomic_load(&w->bad);
            laps += atomic_load(&w->laps);
            int64_t longest = atomic_exchange(&w->longest, 0), last = atomic_load(&w->last);
            if (last && now - last > longest)
                longest = now - last; /* a worker that hangs at this moment counts as well */
            gap = longest > gap ? longest : gap;
        }
        say("pc report t=%lld ops=%s bad=%llu gap=%lld laps=%llu disk=%llu,%llu "
            "net=%llu,%llu,%llu\n",
            (long long)(now / MS), ops, (unsigned long long)bad, (long long)(gap / 1000),
            (unsigned long long)laps, (unsigned long long)atomic_load(&disk_ops),
            (unsigned long long)atomic_load(&disk_bad), (unsigned long long)atomic_load(&net_sent),
            (unsigned long long)atomic_load(&net_received),
            (unsigned long long)atomic_load(&net_bad));
        now = now_ns();
        due = due + interval > now ? due + interval : now + interval;
        struct timespec until = to_timespec(due);
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
    }
    return NULL;
}

/* ---- commands ---- */

static void update_hold(void) /* under `lock` */
{
    atomic_store(&hold, stopped || sweeping || rate == 0);
    pthread_cond_broadcast(&changed);
}

static void stop_workers(void) /* under `lock` */
{
    sweeping = true;
    update_hold();
    while (resting < worker_count)
        pthread_cond_wait(&changed, &lock);
}

static void sweep(char *answer, size_t size)
{
    uint64_t pages = 0, bad = 0;
    int64_t begin = now_ns();
    pthread_mutex_lock(&lock);
    stop_workers();
    for (unsigned i = 0; i < worker_count; i++)
        workers[i].sweep = true;
    pthread_cond_broadcast(&changed);
    for (unsigned i = 0; i < worker_count; i++) {
        while (workers[i].sweep)
            pthread_cond_wait(&changed, &lock);
        pages += workers[i].pages;
        bad += workers[i].sweep_bad;
    }
    pthread_mutex_unlock(&lock);
    for (unsigned i = 0; i < reader_count; i++) {
        struct reader *r = &readers[i];
        pthread_mutex_lock(&r->busy);
        bad += check_blocks(r, 0, r->pages);
        pthread_mutex_unlock(&r->busy);
    }
    pthread_mutex_lock(&lock);
    sweeping = false;
    update_hold();
    pthread_mutex_unlock(&lock);
    snprintf(answer, size, "pages=%llu bad=%llu ms=%lld", (unsigned long long)pages,
             (unsigned long long)bad, (long long)((now_ns() - begin) / MS));
}

/* Gives pages back to the guest's kernel, for a balloon to take; they must read as zeros then. */
static void discard(uint64_t count, char *answer, size_t size)
{
    static uint64_t random = GOLDEN + 2;
    pthread_mutex_lock(&lock);
    stop_workers();
    for (uint64_t n = 0; n < count; n++) {
        struct worker *w = &workers[n % worker_count];
        uint64_t i = ((next_random(&random) >> 32) * w->pages) >> 32;
        if (madvise(page_at(w, i), PAGE, MADV_DONTNEED) < 0)
            continue;
        w->sum += table_term(w->first + i, 0) - table_term(w->first + i, w->version[i]);
        w->version[i] = 0;
    }
    sweeping = false;
    update_hold();
    pthread_mutex_unlock(&lock);
    snprintf(answer, size, "pages=%llu", (unsigned long long)count);
}

/* A reset, which ends a QEMU that may not reboot.  An orderly power-off sometimes hangs while the
 * kernel shuts virtio devices down that are in use; there is nothing here that needs the order. */
static void power_off(void)
{
    tcdrain(serial);
    int fd = open("/proc/sysrq-trigger", O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, "b", 1) != 1)
        reboot(RB_POWER_OFF);
}

static void obey(char *line)
{
    static long long last_id = -1;
    static char answer[160];
    long long id, number = 0;
    char verb[16], *end = strchr(line, ';');
    if (!end)
        return;
    *end = '\0';
    int fields = sscanf(line, "%lld %15s %lld", &id, verb, &number);
    if (fields < 2)
        return;
    if (id != last_id) {
        last_id = id;
        snprintf(answer, sizeof answer, "ok=1");
        pthread_mutex_lock(&lock);
        if (strcmp(verb, "stop") == 0)
            stopped = true;
        else if (strcmp(verb, "go") == 0)
            stopped = false;
        else if (strcmp(verb, "rate") == 0 && fields == 3)
            atomic_store(&rate, number);
        else if (strcmp(verb, "write") == 0 && fields == 3)
            atomic_store(&write_percent, number);
        else if (strcmp(verb, "hot") == 0 && fields == 3)
            atomic_store(&hot_pages, (uint64_t)number << 8);
        else if (strcmp(verb, "sweep") && strcmp(verb, "discard") && strcmp(verb, "quit"))
            snprintf(answer, sizeof answer, "ok=0");
        update_hold();
        while (hold && resting < worker_count) /* "stopped" means that nobody writes any more */
            pthread_cond_wait(&changed, &lock);
        pthread_mutex_unlock(&lock);
        if (strcmp(verb, "sweep") == 0)
            sweep(answer, sizeof answer);
        else if (strcmp(verb, "discard") == 0 && number > 0)
            discard((uint64_t)number, answer, sizeof answer);
    }
    say("pc done id=%lld %s\n", id, answer);
    if (strcmp(verb, "quit") == 0)
        power_off();
}

static void listen_to_host(void)
{
    char line[128];
    size_t length = 0;
    for (;;) {
        char c;
        ssize_t n = read(serial, &c, 1);
        if (n < 1) {
            sleep_ns(10 * MS);
            continue;
        }
        if (c != '\n' && c != '\r') {
            if (length < sizeof line - 1)
                line[length++] = c;
            continue;
        }
        line[length] = '\0';
        length = 0;
        obey(line);
    }
}

/* ---- start ---- */

static char command_line[4096];

static const char *parameter(const char *name)
{
    const char *at = strstr(command_line, name);
    return at ? at + strlen(name) : NULL;
}

static int64_t number_of(const char *name, int64_t otherwise)
{
    const char *text = parameter(name);
    return text ? strtoll(text, NULL, 10) : otherwise;
}

static void address_of(const char *name, struct sockaddr_in *address)
{
    char text[32] = "";
    const char *given = parameter(name);
    if (given)
        sscanf(given, "%31[^ \n]", text);
    char *colon = strchr(text, ':');
    if (colon)
        *colon = '\0';
    address->sin_family = AF_INET;
    address->sin_port = htons((uint16_t)(colon ? atoi(colon + 1) : 0));
    inet_pton(AF_INET, text, &address->sin_addr);
}

/* The initramfs holds them in the order in which they need one another. */
static void load_modules(void)
{
    for (unsigned i = 0;; i++) {
        char path[32];
        snprintf(path, sizeof path, "/modules/%02u", i);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return;
        if (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST)
            say("pc error text=cannot load %s: %s\n", path, strerror(errno));
        close(fd);
    }
}

/* Test memory comes from all nodes alike, also from one that has no vCPU. */
static void interleave_nodes(void)
{
    unsigned long nodes = 0;
    for (unsigned i = 0; i < 8; i++) {
        char path[48];
        snprintf(path, sizeof path, "/sys/devices/system/node/node%u", i);
        if (access(path, F_OK) == 0)
            nodes |= 1ul << i;
    }
    if (nodes > 1)
        syscall(SYS_set_mempolicy, 3 /* MPOL_INTERLEAVE */, &nodes, 8 * sizeof nodes);
}

static void open_serial(void)
{
    serial = open("/dev/ttyS0", O_RDWR | O_NOCTTY | O_CLOEXEC);
    struct termios settings;
    if (serial < 0 || tcgetattr(serial, &settings) < 0)
        return;
    cfmakeraw(&settings);
    tcsetattr(serial, TCSANOW, &settings);
}

static void *map(size_t size)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) {
        say("pc error text=cannot map %zu bytes: %s\n", size, strerror(errno));
        power_off();
    }
    return at;
}

static void start_thread(pthread_t *thread, void *(*run)(void *), void *argument)
{
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 64 << 10);
    if (pthread_create(thread, &small, run, argument) != 0) {
        say("pc error text=cannot start a thread\n");
        power_off();
    }
    pthread_attr_destroy(&small);
}

static void start_readers(uint64_t read_pages, uint64_t pages)
{
    for (unsigned i = 0; i < reader_count; i++) {
        struct reader *r = &readers[i];
        pthread_mutex_init(&r->busy, NULL);
        r->random = mix(i + 1);
        r->each = read_pages;
        r->pages = (pages / reader_count / read_pages + 1) * read_pages;
        r->memory = map(r->pages * PAGE);
        r->block = map(r->pages * sizeof *r->block);
        start_thread(&r->thread, read_disk, r);
    }
}

static void start_workers(uint64_t pages)
{
    interleave_nodes();
    test_pages = pages;
    memory = map(pages * PAGE);
    hold = true; /* all of them fill their share, then rest until the last is ready */
    for (unsigned i = 0; i < worker_count; i++) {
        struct worker *w = &workers[i];
        w->number = i;
        w->first = pages * i / worker_count;
        w->pages = pages * (i + 1) / worker_count - w->first;
        w->version = map(w->pages * sizeof *w->version);
        w->random = mix(i + 1);
        start_thread(&w->thread, work, w);
    }
    int64_t begin = now_ns();
    pthread_mutex_lock(&lock);
    while (resting < worker_count)
        pthread_cond_wait(&changed, &lock);
    update_hold();
    pthread_mutex_unlock(&lock);
    say("pc ready pages=%llu workers=%u fill_ms=%lld\n", (unsigned long long)pages, worker_count,
        (long long)((now_ns() - begin) / MS));
}

int main(void)
{
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mkdir("/dev", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    open_serial();
    say("%s", "pc hello\n");
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, command_line, sizeof command_line - 1) < 1)
        say("pc error text=cannot read /proc/cmdline: %s\n", strerror(errno));
    close(fd);
    load_modules();

    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&changed, &monotonic);

    struct sysinfo info;
    sysinfo(&info);
    int64_t megabytes = number_of("pc.mb=", (int64_t)(info.freeram * info.mem_unit >> 21));
    int64_t threads = number_of("pc.threads=", get_nprocs());
    worker_count = (unsigned)(threads < 1 ? 1 : threads > MAX_WORKERS ? MAX_WORKERS : threads);
    const char *order = parameter("pc.order=");
    sequential = order && strncmp(order, "sequential", 10) == 0;
    rate = number_of("pc.rate=", -1);
    write_percent = number_of("pc.write=", 100);
    hot_pages = (uint64_t)number_of("pc.hot=", 0) << 8;
    start_workers((uint64_t)megabytes << 8);

    static int64_t interval, disk_rate;
    static struct net net;
    pthread_t thread;
    interval = number_of("pc.report=", 50);
    start_thread(&thread, report, &interval);
    disk_rate = number_of("pc.disk=", 0);
    int64_t count = number_of("pc.readers=", 0);
    reader_count = (unsigned)(count < 0 ? 0 : count > MAX_READERS ? MAX_READERS : count);
    if (reader_count > 0)
        start_readers((uint64_t)number_of("pc.read_kb=", 256) >> 2,
                      (uint64_t)number_of("pc.read_mb=", 8) << 8);
    else if (disk_rate > 0)
        start_thread(&thread, use_disk, &disk_rate);
    net.rate = number_of("pc.net=", 0);
    address_of("pc.ip=", &net.self);
    address_of("pc.peer=", &net.peer);
    if (net.rate > 0)
        start_thread(&thread, use_net, &net);
    listen_to_host();
}
