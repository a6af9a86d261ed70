// SPDX-License-Identifier: Apache-2.0
/* Part of guest_init.c: the threads that use the guest's disk and network. */

static void sleep_ns(int64_t ns)
{
    struct timespec t = to_timespec(ns);
    nanosleep(&t, NULL);
}

static void *use_disk(void *argument)
{
    int64_t pause = INT64_C(1000000000) / *(const int64_t *)argument;
    static uint32_t version[DISK_BLOCKS];
    uint64_t random = GOLDEN;
    uint64_t *block = aligned_alloc(PAGE, PAGE);
    int fd = open("/dev/vda", O_RDWR | O_DIRECT | O_CLOEXEC);
    if (fd < 0 || !block) {
        say("pc error text=cannot open /dev/vda: %s\n", strerror(errno));
        atomic_fetch_add(&disk_bad, 1);
        return NULL;
    }
    for (;; sleep_ns(pause)) {
        uint64_t i = ((next_random(&random) >> 32) * DISK_BLOCKS) >> 32;
        off_t at = (off_t)i * PAGE;
        if (version[i] > 0) { /* what was there before the guest's first write is nobody's claim */
            memset(block, 0xff, PAGE);
            bool read = pread(fd, block, PAGE, at) == PAGE;
            if (!read || !right(block, DISK_INDEX + i, version[i])) {
                describe("disk", block, DISK_INDEX + i, version[i]);
                atomic_fetch_add(&disk_bad, 1);
            }
        }
        fill(block, DISK_INDEX + i, ++version[i]);
        if (pwrite(fd, block, PAGE, at) != PAGE) {
            if (atomic_fetch_add(&details, 1) < MAX_DETAILS)
                say("pc error text=cannot write /dev/vda: %s\n", strerror(errno));
            atomic_fetch_add(&disk_bad, 1);
            version[i] = 0; /* the earlier version or this one: nobody can tell */
        }
        atomic_fetch_add(&disk_ops, 1);
    }
}

/* A thread that reads the disk into memory of its own, by DMA if the device does so.  Each page of
 * that memory is a block of the disk: what the last read has brought must still be there when the
 * next one comes, or when the host asks, which may be after a move. */
struct reader {
    pthread_t thread;
    pthread_mutex_t busy;
    uint64_t random, pages, each; /* pages of memory, and of one read */
    uint8_t *memory;
    uint64_t *block;              /* that a page holds, plus one; 0: nothing was read into it yet */
};

static struct reader readers[MAX_READERS];
static unsigned reader_count;

/* Counts each wrong page once: it is mended. */
static uint64_t check_blocks(struct reader *r, uint64_t first, uint64_t count)
{
    uint64_t bad = 0;
    for (uint64_t i = first; i < first + count; i++) {
        uint64_t *words = (uint64_t *)(r->memory + i * PAGE);
        uint64_t index = DISK_INDEX + r->block[i] - 1;
        uint32_t version = r->block[i] > 0;
        if (right(words, index, version))
            continue;
        describe("disk", words, index, version);
        if (version == 0)
            memset(words, 0, PAGE);
        else
            fill(words, index, version);
        bad++;
    }
    atomic_fetch_add(&disk_bad, bad);
    return bad;
}

static void *read_disk(void *argument)
{
    struct reader *r = argument;
    int fd = open("/dev/vda", O_RDONLY | O_DIRECT | O_CLOEXEC);
    off_t size = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
    if (size < (off_t)(r->each * PAGE)) {
        say("pc error text=cannot read /dev/vda: %s\n", fd < 0 ? strerror(errno) : "too small");
        atomic_fetch_add(&disk_bad, 1);
        return NULL;
    }
    uint64_t blocks = (uint64_t)size / PAGE - r->each + 1;
    for (;;) {
        pthread_mutex_lock(&lock); /* lets a sweep go first */
        while (sweeping)
            pthread_cond_wait(&changed, &lock);
        pthread_mutex_unlock(&lock);

        pthread_mutex_lock(&r->busy);
        uint64_t block = ((next_random(&r->random) >> 32) * blocks) >> 32;
        uint64_t first = ((r->random & 0xffff) * (r->pages / r->each) >> 16) * r->each;
        check_blocks(r, first, r->each);
        ssize_t want = (ssize_t)(r->each * PAGE);
        if (pread(fd, r->memory + first * PAGE, (size_t)want, (off_t)(block * PAGE)) != want) {
            if (atomic_fetch_add(&details, 1) < MAX_DETAILS)
                say("pc error text=cannot read /dev/vda: %s\n", strerror(errno));
            atomic_fetch_add(&disk_bad, 1);
        }
        for (uint64_t i = 0; i < r->each; i++)
            r->block[first + i] = block + i + 1;
        check_blocks(r, first, r->each);
        pthread_mutex_unlock(&r->busy);
        atomic_fetch_add(&disk_ops, 1);
    }
}

struct net {
    int64_t rate;
    struct sockaddr_in self, peer;
};

static bool bring_up(const char *name, const struct sockaddr_in *address)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq request = {0};
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    memcpy(&request.ifr_addr, address, sizeof *address);
    bool done = ioctl(fd, SIOCSIFADDR, &request) == 0;
    ((struct sockaddr_in *)&request.ifr_netmask)->sin_addr.s_addr = htonl(0xffffff00);
    done = done && ioctl(fd, SIOCSIFNETMASK, &request) == 0;
    done = done && ioctl(fd, SIOCGIFFLAGS, &request) == 0;
    request.ifr_flags |= IFF_UP | IFF_RUNNING;
    done = done && ioctl(fd, SIOCSIFFLAGS, &request) == 0;
    close(fd);
    return done;
}

/* Datagrams of the page pattern, the sequence number in place of the page's: the host echoes them.
 * Lost ones are counted by the difference; only wrong content is bad. */
static void *use_net(void *argument)
{
    const struct net *net = argument;
    int64_t pause = INT64_C(1000000000) / net->rate, due = now_ns();
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (!bring_up("eth0", &net->self) ||
        connect(fd, (const struct sockaddr *)&net->peer, sizeof net->peer) < 0) {
        say("pc error text=cannot bring up eth0: %s\n", strerror(errno));
        atomic_fetch_add(&net_bad, 1);
        return NULL;
    }
    static uint64_t out[WORDS];
    uint64_t in[DATAGRAM_WORDS];
    for (uint64_t sequence = 1;;) {
        int64_t now = now_ns();
        if (now >= due) {
            fill(out, sequence, 1);
            if (send(fd, out, sizeof in, 0) == sizeof in) {
                sequence++;
                atomic_fetch_add(&net_sent, 1);
            }
            due = due + pause > now - 100 * MS ? due + pause : now;
        }
        struct pollfd readable = {.fd = fd, .events = POLLIN};
        struct timespec wait = to_timespec(due > now ? due - now : 0);
        if (ppoll(&readable, 1, &wait, NULL) <= 0)
            continue;
        ssize_t n = recv(fd, in, sizeof in, MSG_TRUNC);
        if (n < 0)
            continue; /* refused: nobody answers at present */
        bool good = n == sizeof in && in[0] > 0 && in[0] < sequence;
        for (unsigned i = 0; good && i < DATAGRAM_WORDS; i++)
            good = in[i] == expected_word(in[0], 1, i);
        atomic_fetch_add(good ? &net_received : &net_bad, 1);
    }
}
