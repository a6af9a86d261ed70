/* SPDX-License-Identifier: Apache-2.0
 *
 * A process to be adopted, which notices whatever adoption could damage. Each thread does one
 * thing over and over, one "lap" after another, and says BAD when a lap was not as it must be.
 *
 * Prints {"tids":{KIND:TID,...}}, then answers lines on stdin: "check" waits until each thread has
 * done two more laps and prints a verdict; the end of stdin ends it. With an argument it is one of
 * the special cases at the end instead: they print {"ready":1} and wait for the end of stdin.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static atomic_int bad;
static atomic_long worst_late_us;

__attribute__((format(printf, 1, 2)))
static void say_bad(const char *format, ...)
{
    va_list list;

    va_start(list, format);
    if (atomic_fetch_add(&bad, 1) < 20) {
        fprintf(stderr, "BAD: ");
        vfprintf(stderr, format, list);
        fprintf(stderr, "\n");
    }
    va_end(list);
}
#define MUST(condition, ...) ((condition) ? (void)0 : say_bad(#condition ": " __VA_ARGS__))

static long long now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000ll + now.tv_nsec / 1000;
}

/* A wait of `us` microseconds that began at `start` is over: was it as long as it had to be? */
static void check_wait(const char *name, long long start, long us)
{
    long late = (long)(now_us() - start) - us;
    long worst = atomic_load(&worst_late_us);

    MUST(late >= 0, "%s woke %ld us early", name, -late);
    while (late > worst && !atomic_compare_exchange_weak(&worst_late_us, &worst, late))
        ;
}

static void sleep_us(long us)
{
    struct timespec time = { us / 1000000, us % 1000000 * 1000 };

    while (nanosleep(&time, &time))
        ;
}

/* ---- registers: known values through a tight loop, the red zone and AVX among them ---- */

struct machine {
    uint64_t general[14]; /* rax rbx rdx rsi rbp r8-r15, and rdi, which points here */
    uint64_t red[16];
    uint8_t vector[16][32];
    uint64_t x87;
};

void spin(const struct machine *in, struct machine *out, long laps, long avx);
__asm__(
    ".pushsection .text\n.globl spin\n.type spin,@function\nspin:\n"
    "push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
    "push %rcx; push %rsi; push %rdx\n"
    "fldl 752(%rdi)\n"
    ".set i,0\n.rept 16\nmov 112+8*i(%rdi),%rax\nmov %rax,-128+8*i(%rsp)\n.set i,i+1\n.endr\n"
    "test %rcx,%rcx\njz 1f\n"
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
    "vmovdqu 240+32*\\n(%rdi),%ymm\\n\n.endr\njmp 2f\n1:\n"
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
    "movdqu 240+32*\\n(%rdi),%xmm\\n\n.endr\n2:\n"
    "mov (%rsp),%rcx\n"
    "mov (%rdi),%rax; mov 8(%rdi),%rbx; mov 16(%rdi),%rdx; mov 24(%rdi),%rsi\n"
    "mov 32(%rdi),%rbp; mov 40(%rdi),%r8; mov 48(%rdi),%r9; mov 56(%rdi),%r10\n"
    "mov 64(%rdi),%r11; mov 72(%rdi),%r12; mov 80(%rdi),%r13; mov 88(%rdi),%r14\n"
    "mov 96(%rdi),%r15\n"
    "3: dec %rcx\njnz 3b\n"
    "mov 8(%rsp),%rcx\n" /* out */
    "mov %rax,(%rcx); mov %rbx,8(%rcx); mov %rdx,16(%rcx); mov %rsi,24(%rcx)\n"
    "mov %rbp,32(%rcx); mov %r8,40(%rcx); mov %r9,48(%rcx); mov %r10,56(%rcx)\n"
    "mov %r11,64(%rcx); mov %r12,72(%rcx); mov %r13,80(%rcx); mov %r14,88(%rcx)\n"
    "mov %r15,96(%rcx); mov %rdi,104(%rcx)\n"
    ".set i,0\n.rept 16\nmov -128+8*i(%rsp),%rax\nmov %rax,112+8*i(%rcx)\n.set i,i+1\n.endr\n"
    "fstpl 752(%rcx)\n"
    "mov 16(%rsp),%rax\ntest %rax,%rax\njz 4f\n"
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
    "vmovdqu %ymm\\n,240+32*\\n(%rcx)\n.endr\nvzeroupper\njmp 5f\n4:\n"
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
    "movdqu %xmm\\n,240+32*\\n(%rcx)\n.endr\n5:\n"
    "add $24,%rsp\npop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\nret\n"
    ".size spin,.-spin\n.popsection\n");
_Static_assert(offsetof(struct machine, red) == 112 && offsetof(struct machine, vector) == 240 &&
               offsetof(struct machine, x87) == 752, "offsets in spin");

static void spin_lap(unsigned seed)
{
    struct machine in, out;
    double number = seed * 1.25 + 3;
    unsigned control = 0x5f80, got; /* MXCSR: round down, the rest as usual */
    int avx = __builtin_cpu_supports("avx");

    memset(&out, 0, sizeof out);
    for (size_t i = 0; i < sizeof in; i++)
        ((uint8_t *)&in)[i] = (uint8_t)(seed * 31 + i * 7 + 1);
    in.general[13] = (uint64_t)&in;
    memcpy(&in.x87, &number, 8);
    if (!avx)
        for (int i = 0; i < 16; i++)
            memset(in.vector[i] + 16, 0, 16);
    __asm__ volatile("ldmxcsr %0" ::"m"(control));
    spin(&in, &out, 200000, avx);
    __asm__ volatile("stmxcsr %0" : "=m"(got));
    MUST((got & ~0x3fu) == control, "MXCSR is %#x", got);
    for (size_t i = 0; i < sizeof in / 8; i++)
        MUST(((uint64_t *)&in)[i] == ((uint64_t *)&out)[i], "register word %zu: %#lx for %#lx", i,
             ((uint64_t *)&out)[i], ((uint64_t *)&in)[i]);
    control = 0x1f80;
    __asm__ volatile("ldmxcsr %0" ::"m"(control));
    sleep_us(500);
}

/* ---- signals: a timer, and queued ones with consecutive numbers, on an alternate stack ---- */

static atomic_long alarms, queued_sent, queued_got, waited_sent;
static atomic_int signal_tid, waiter_tid;

static void on_alarm(int number)
{
    (void)number;
    MUST(gettid() == signal_tid, "an alarm went to thread %d", gettid());
    atomic_fetch_add(&alarms, 1);
}

static void on_queued(int number, siginfo_t *info, void *context)
{
    long expected = atomic_fetch_add(&queued_got, 1) + 1;
    volatile unsigned spun = 0;

    (void)number, (void)context;
    MUST(info->si_value.sival_int == (int)expected, "queued signal %d for %ld",
         info->si_value.sival_int, expected);
    while (spun < 100000) /* to be met here, on the alternate stack */
        spun++;
}

static void queue(int tid, int number, int value)
{
    siginfo_t info = { .si_code = SI_QUEUE };

    info.si_pid = getpid();
    info.si_value.sival_int = value;
    while (syscall(SYS_rt_tgsigqueueinfo, getpid(), tid, number, &info))
        sleep_us(100);
}

/* ---- the threads ---- */

struct worker {
    const char *kind;
    void (*lap)(struct worker *, unsigned);
    int open_signals; /* the thread takes the process's signals */
    atomic_long laps;
    atomic_int tid;
    pthread_t thread;
};

/* Longer than the time between two adoptions of a thread: were a wait begun again at each, it would
 * never end. */
#define WAIT_US 150000

static int ping[2], pong[2], event, epoll;

/* Of epoll_wait and sigwaitinfo, which the kernel ends with EINTR at any stop, even a SIGSTOP. */
static atomic_int eintr;

static void lap_spin(struct worker *worker, unsigned lap)
{
    (void)worker;
    spin_lap(lap);
}

static void lap_signals(struct worker *worker, unsigned lap)
{
    stack_t stack;

    (void)worker;
    spin_lap(lap);
    sigaltstack(NULL, &stack);
    MUST(stack.ss_size == 65536 && stack.ss_flags == 0, "alternate stack lost");
}

static void lap_nanosleep(struct worker *worker, unsigned lap)
{
    struct timespec time = { 0, WAIT_US * 1000 };
    long long start = now_us();
    int code = nanosleep(&time, NULL);

    (void)lap;
    MUST(code == 0, "nanosleep: errno %d", errno);
    check_wait(worker->kind, start, WAIT_US);
}

static void lap_futex(struct worker *worker, unsigned lap)
{
    struct timespec time = { 0, WAIT_US * 1000 };
    long long start = now_us();
    int word = 0, code = (int)syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &time, NULL, 0);

    (void)lap;
    MUST(code == -1 && errno == ETIMEDOUT, "futex: %d, errno %d", code, errno);
    check_wait(worker->kind, start, WAIT_US);
}

static void lap_poll(struct worker *worker, unsigned lap)
{
    struct pollfd never = { ping[0], 0, 0 }; /* no event is asked for */
    long long start = now_us();
    int code = poll(&never, 1, WAIT_US / 1000);

    (void)lap;
    MUST(code == 0, "poll: %d, errno %d", code, errno);
    check_wait(worker->kind, start, WAIT_US);
}

/* ppoll with a mask of its own: at its restart the outer mask must still be there to come back. */
static void lap_ppoll(struct worker *worker, unsigned lap)
{
    struct timespec time = { 0, WAIT_US * 1000 };
    long long start = now_us();
    sigset_t mask;
    int code;

    (void)lap;
    sigfillset(&mask);
    sigdelset(&mask, SIGUSR2);
    code = ppoll(NULL, 0, &time, &mask);
    MUST(code == 0, "ppoll: %d, errno %d", code, errno);
    check_wait(worker->kind, start, WAIT_US);
}

static void lap_epoll(struct worker *worker, unsigned lap)
{
    struct epoll_event got;
    uint64_t count;
    int code;

    (void)worker, (void)lap;
    while ((code = epoll_wait(epoll, &got, 1, -1)) < 0 && errno == EINTR)
        eintr++;
    MUST(code == 1, "epoll_wait: %d, errno %d", code, errno);
    if (code == 1)
        MUST(read(event, &count, 8) == 8, "errno %d", errno);
}

static void lap_sigwait(struct worker *worker, unsigned lap)
{
    sigset_t set;
    siginfo_t info;
    int code;

    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 5);
    waiter_tid = worker->tid;
    while ((code = sigwaitinfo(&set, &info)) < 0 && errno == EINTR)
        eintr++;
    MUST(code == SIGRTMIN + 5, "sigwaitinfo: errno %d", errno);
    MUST(info.si_value.sival_int == (int)lap + 1, "waited signal %d for %u",
         info.si_value.sival_int, lap + 1);
}

static void lap_echo(struct worker *worker, unsigned lap)
{
    unsigned got = 0;

    (void)worker;
    MUST(read(ping[0], &got, 4) == 4 && got == lap, "echo got %u for %u, errno %d", got, lap,
         errno);
    MUST(write(pong[1], &got, 4) == 4, "errno %d", errno);
}

static void lap_caller(struct worker *worker, unsigned lap)
{
    unsigned got = ~0u;

    (void)worker;
    MUST(write(ping[1], &lap, 4) == 4, "errno %d", errno);
    MUST(read(pong[0], &got, 4) == 4 && got == lap, "caller got %u for %u, errno %d", got, lap,
         errno);
    sleep_us(2000);
}

static void lap_pending(struct worker *worker, unsigned lap)
{
    static const int numbers[] = { 10 /* SIGUSR1 */, 40, 40, 41 };
    struct timespec none = { 0, 0 };
    sigset_t pending;

    (void)worker;
    if (lap % 4 == 0)
        for (int i = 0; i < 4; i++)
            queue(gettid(), numbers[i], i + 1);
    sleep_us(30000);
    sigpending(&pending);
    MUST(sigismember(&pending, SIGUSR1) && sigismember(&pending, 40) && sigismember(&pending, 41),
         "pending signals lost");
    if (lap % 4 == 3)
        for (int i = 0; i < 4; i++) {
            siginfo_t info = { 0 };
            sigset_t set;

            sigemptyset(&set);
            sigaddset(&set, numbers[i]);
            MUST(sigtimedwait(&set, &info, &none) == numbers[i] &&
                     info.si_value.sival_int == i + 1, "pending signal %d lost", numbers[i]);
        }
}

/* Feeds those who wait for something. */
static void lap_feeder(struct worker *worker, unsigned lap)
{
    uint64_t one = 1;

    (void)worker, (void)lap;
    sleep_us(3000);
    MUST(write(event, &one, 8) == 8, "errno %d", errno);
    if (waiter_tid)
        queue(waiter_tid, SIGRTMIN + 5, (int)atomic_fetch_add(&waited_sent, 1) + 1);
    if (signal_tid)
        queue(signal_tid, SIGRTMIN + 1, (int)atomic_fetch_add(&queued_sent, 1) + 1);
}

static struct worker workers[] = {
    { .kind = "spin", .lap = lap_spin },
    { .kind = "signals", .lap = lap_signals, .open_signals = 1 },
    { .kind = "nanosleep", .lap = lap_nanosleep },
    { .kind = "futex", .lap = lap_futex },
    { .kind = "poll", .lap = lap_poll },
    { .kind = "ppoll", .lap = lap_ppoll },
    { .kind = "epoll", .lap = lap_epoll },
    { .kind = "sigwait", .lap = lap_sigwait },
    { .kind = "echo", .lap = lap_echo },
    { .kind = "caller", .lap = lap_caller },
    { .kind = "pending", .lap = lap_pending },
    { .kind = "feeder", .lap = lap_feeder },
};
#define WORKERS (sizeof workers / sizeof workers[0])

static void *work(void *argument)
{
    struct worker *worker = argument;
    stack_t none = { .ss_sp = NULL, .ss_flags = 0, .ss_size = 65536 };
    sigset_t mask, now;

    if (worker->open_signals) {
        none.ss_sp = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        sigaltstack(&none, NULL);
        sigemptyset(&mask);
        pthread_sigmask(SIG_SETMASK, &mask, NULL);
        setpriority(PRIO_PROCESS, 0, 5);
    }
    worker->tid = gettid();
    if (worker->open_signals)
        signal_tid = worker->tid;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    for (unsigned lap = 0;; lap++) {
        worker->lap(worker, lap);
        pthread_sigmask(SIG_SETMASK, NULL, &now);
        MUST(!memcmp(&mask, &now, 8), "mask of %s changed", worker->kind);
        atomic_fetch_add(&worker->laps, 1);
    }
    return NULL;
}

static int count_fds(void)
{
    DIR *directory = opendir("/proc/self/fd");
    int count = 0;

    while (readdir(directory))
        count++;
    closedir(directory);
    return count;
}

static void check(void)
{
    long before[WORKERS], alarms_before = alarms;
    long long start = now_us();
    const char *stuck = NULL;

    for (size_t i = 0; i < WORKERS; i++)
        before[i] = workers[i].laps;
    long sent_before = queued_sent;
    do {
        stuck = alarms < alarms_before + 2 ? "alarms" : NULL;
        if (queued_got < sent_before) /* they come in order, each checked by its number */
            stuck = "queued";
        for (size_t i = 0; i < WORKERS; i++)
            if (workers[i].laps < before[i] + 2)
                stuck = workers[i].kind;
        sleep_us(1000);
    } while (stuck && now_us() - start < 8000000);
    MUST(!stuck, "%s is stuck", stuck);
    printf("{\"bad\":%d,\"eintr\":%d,\"fds\":%d,\"worstLateUs\":%ld,\"alarms\":%ld,"
           "\"laps\":{", bad, eintr, count_fds(), atomic_exchange(&worst_late_us, 0), alarms);
    for (size_t i = 0; i < WORKERS; i++)
        printf("%s\"%s\":%ld", i ? "," : "", workers[i].kind, workers[i].laps);
    printf("}}\n");
}

static int run_all(void)
{
    struct sigaction alarm_action = { .sa_handler = on_alarm, .sa_flags = SA_RESTART | SA_ONSTACK };
    struct sigaction queue_action = { .sa_sigaction = on_queued,
                                      .sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK };
    struct itimerval often = { { 0, 3000 }, { 0, 3000 } };
    struct epoll_event input = { .events = EPOLLIN };
    char line[64];
    sigset_t all;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    if (pipe(ping) || pipe(pong))
        return 1;
    event = eventfd(0, EFD_CLOEXEC);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    epoll_ctl(epoll, EPOLL_CTL_ADD, event, &input);
    sigaction(SIGALRM, &alarm_action, NULL);
    sigaction(SIGRTMIN + 1, &queue_action, NULL);

    for (size_t i = 0; i < WORKERS; i++)
        pthread_create(&workers[i].thread, NULL, work, &workers[i]);
    for (size_t i = 0; i < WORKERS; i++)
        while (!workers[i].tid)
            sleep_us(100);
    setitimer(ITIMER_REAL, &often, NULL);

    printf("{\"tids\":{\"main\":%d", getpid());
    for (size_t i = 0; i < WORKERS; i++)
        printf(",\"%s\":%d", workers[i].kind, workers[i].tid);
    printf("}}\n");
    fflush(stdout);
    for (;;) {
        ssize_t len = read(0, line, sizeof line);

        MUST(len >= 0, "main's read: errno %d", errno);
        if (len <= 0)
            break;
        check();
        fflush(stdout);
    }
    return bad != 0;
}

/* ---- special cases ---- */

static int filter(unsigned action, int refused)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)refused, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, action),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { sizeof code / sizeof code[0], code };

    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
           prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

static void ready(void)
{
    if (write(1, "{\"ready\":1}\n", 12) != 12)
        _exit(3);
}

static int wait_for_end(void)
{
    char byte;
    ssize_t len;

    ready();
    len = read(0, &byte, 1);
    if (len < 0)
        return 4;
    return 0;
}

/* A parent in vfork() is uninterruptible until its child ends. */
static int in_vfork(void)
{
    char byte;
    pid_t child = vfork();

    if (child == 0) {
        ready();
        _exit(read(0, &byte, 1) < 0);
    }
    return child < 0;
}

static void *sleep_for_ever(void *unused)
{
    for (;;)
        pause();
    return unused;
}

/* A thread that waits for a page, which it gets at the end. */
static void *touch(void *page)
{
    printf("{\"ready\":1,\"tids\":{\"fault\":%d}}\n", gettid());
    fflush(stdout);
    return (void *)(intptr_t)*(volatile int *)page;
}

static int in_fault(void)
{
    int uffd = (int)syscall(SYS_userfaultfd, 1 /* UFFD_USER_MODE_ONLY */);
    char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct uffdio_range range = { (uintptr_t)page, 4096 };
    struct uffdio_register reg = { .range = range, .mode = UFFDIO_REGISTER_MODE_MISSING };
    struct uffdio_copy copy = { .dst = range.start, .len = 4096 };
    struct uffdio_api api = { .api = UFFD_API };
    char content[4096] = { 77 };
    pthread_t thread;
    void *got;

    copy.src = (uintptr_t)content;
    if (ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &reg) ||
        pthread_create(&thread, NULL, touch, page) || read(0, &content[1], 1) < 0 ||
        ioctl(uffd, UFFDIO_COPY, &copy) || pthread_join(thread, &got))
        return 1;
    return got != (void *)77;
}

/* Sleeps with its stack pointer at the end of a mapping that has nothing below. */
static int on_small_stack(void)
{
    char *page = mmap(NULL, 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char byte;
    long len;

    mprotect(page + 4096, 4096, PROT_READ | PROT_WRITE);
    ready();
    __asm__ volatile("mov %%rsp,%%rbx\nlea 256(%4),%%rsp\nsyscall\nmov %%rbx,%%rsp"
                     : "=a"(len)
                     : "0"(SYS_read), "D"(0), "S"(&byte), "r"(page + 4096), "d"(1)
                     : "rbx", "rcx", "r11", "memory");
    return len < 0;
}

/* Its system calls become SIGSYS, for which it has no handler, but those of this program's own text;
 * with `others` there is a thread whose calls do not. */
static int in_dispatch(int others)
{
    static volatile char selector;
    uintptr_t text = (uintptr_t)in_dispatch & ~0xfffful;
    pthread_t thread;
    char byte;
    long len;

    if (others && pthread_create(&thread, NULL, sleep_for_ever, NULL))
        return 1;
    if (prctl(59 /* PR_SET_SYSCALL_USER_DISPATCH */, 1, text, 0x20000, &selector))
        return 1;
    ready();
    selector = 1; /* SYSCALL_DISPATCH_FILTER_BLOCK */
    __asm__ volatile("syscall" : "=a"(len) : "0"(SYS_read), "D"(0), "S"(&byte), "d"(1)
                     : "rcx", "r11", "memory");
    selector = 0;
    return len < 0;
}

int main(int argc, char **argv)
{
    const char *kind = argc > 1 ? argv[1] : "";

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (!*kind)
        return run_all();
    if (!strcmp(kind, "plain"))
        return wait_for_end();
    if (!strcmp(kind, "seccomp-other")) /* a deny-list that does not concern us */
        return filter(SECCOMP_RET_KILL_PROCESS, SYS_swapon) || wait_for_end();
    if (!strcmp(kind, "seccomp-errno"))
        return filter(SECCOMP_RET_ERRNO | EPERM, SYS_userfaultfd) || wait_for_end();
    if (!strcmp(kind, "seccomp-trap"))
        return filter(SECCOMP_RET_TRAP, SYS_userfaultfd) || wait_for_end();
    if (!strncmp(kind, "dispatch", 8))
        return in_dispatch(!strcmp(kind, "dispatch-one"));
    if (!strcmp(kind, "fault"))
        return in_fault();
    if (!strcmp(kind, "vfork"))
        return in_vfork();
    if (!strcmp(kind, "small-stack"))
        return on_small_stack();
    return 2;
}
