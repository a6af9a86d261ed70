/* SPDX-License-Identifier: Apache-2.0
 *
 * Adoption: runs one system call inside a process that knows nothing of us, and leaves it as it
 * was. Owns everything that is ptrace; must not know what the call is for, nor what a VMM is.
 *
 * The way of one call. One thread is seized and interrupted. A stopped thread stands in the
 * kernel's signal path, on its way out of whatever it was doing. There it is given
 *
 *   - a signal frame on its stack, below the red zone, as if a handler had been called: all its
 *     registers, its extended state and its signal mask;
 *   - registers as if that handler were about to make our call: the instruction pointer at an
 *     existing "syscall; ret", the stack pointer at the frame, whose return address is an existing
 *     rt_sigreturn. Putting these in place is one ptrace call, the only one that matters.
 *
 * From there on the thread needs nobody: it makes the call, returns into rt_sigreturn and goes on
 * where it was. That is what happens when this process is killed, at any instant. (So no single
 * stepping: a tracer killed at that leaves a SIGTRAP behind, which kills. A system call stop
 * leaves 0x85 with PTRACE_O_TRACESYSGOOD, which is no signal.)
 *
 * When we live, better is possible. The thread is stopped again as it leaves our call, in the
 * signal path as before, and gets its own registers back, the interrupted call's result and number
 * among them: the kernel then restarts that call by itself, exactly, with what is left of its
 * timeout, since our call has touched no restart block. The extended state needs nothing: no
 * instruction but "syscall" was executed.
 *
 * Signals wait while the call runs, blocked, in the kernel's own queues, in their order.
 *
 * Each thread is tried by a tracer thread of our own that ends with the try. One that does not
 * stop cannot be detached; it is when its tracer ends.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "adopt.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef PTRACE_GET_RSEQ_CONFIGURATION
#define PTRACE_GET_RSEQ_CONFIGURATION 0x420f
#endif
#define GET_SYSCALL_USER_DISPATCH_CONFIG 0x4211 /* PTRACE_, Linux 6.4 */

int adopt_getfd(int pid, int fd)
{
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0), copy, error;

    if (pidfd < 0)
        return -errno;
    copy = (int)syscall(SYS_pidfd_getfd, pidfd, fd, 0);
    error = errno;
    close(pidfd);
    return copy < 0 ? -error : copy;
}

__attribute__((format(printf, 3, 4)))
static int fail(struct adopt_error *error, int code, const char *format, ...)
{
    va_list list;

    va_start(list, format);
    vsnprintf(error->text, sizeof error->text, format, list);
    va_end(list);
    return code;
}

#if defined(__x86_64__)
#include "adopt_x86_64.h"

/* ---- what /proc says ---- */

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

static void close_file(FILE **file)
{
    if (*file)
        fclose(*file);
}

static void free_pointer(void *pointer)
{
    free(*(void **)pointer);
}

#define CLEAN(function) __attribute__((cleanup(function)))

/* The file's beginning as a string; returns its length or -errno. */
__attribute__((format(printf, 3, 4)))
static ssize_t read_text(char *text, size_t size, const char *format, ...)
{
    char path[96];
    va_list list;
    ssize_t len;

    va_start(list, format);
    vsnprintf(path, sizeof path, format, list);
    va_end(list);
    CLEAN(close_fd) int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    len = read(fd, text, size - 1);
    if (len < 0)
        return -errno;
    text[len] = 0;
    return len;
}

struct status {
    pid_t tgid, tracer;
    char state;
    int seccomp, shadow_stack;
    uint64_t pending; /* signals, of this thread only */
};

static int read_status(pid_t pid, pid_t tid, struct status *status)
{
    char text[8192];
    const char *at;
    ssize_t len = read_text(text, sizeof text, "/proc/%d/task/%d/status", pid, tid);

    if (len < 0)
        return (int)len;
    memset(status, 0, sizeof *status);
    if ((at = strstr(text, "\nState:\t")))
        status->state = at[8];
    if ((at = strstr(text, "\nTgid:\t")))
        status->tgid = atoi(at + 7);
    if ((at = strstr(text, "\nTracerPid:\t")))
        status->tracer = atoi(at + 12);
    if ((at = strstr(text, "\nSeccomp:\t")))
        status->seccomp = atoi(at + 10);
    if ((at = strstr(text, "\nSigPnd:\t")))
        status->pending = strtoull(at + 9, NULL, 16);
    if ((at = strstr(text, "\nx86_Thread_features:\t")))
        status->shadow_stack = !strncmp(at + 22, "shstk", 5);
    return 0;
}

static int fail_traced(struct adopt_error *error, pid_t pid, pid_t tracer)
{
    char name[64] = "?";

    read_text(name, sizeof name, "/proc/%d/comm", tracer);
    name[strcspn(name, "\n")] = 0;
    return fail(error, -EBUSY,
                "cannot adopt process %d: process %d (%s) is tracing it already, and there can be "
                "only one tracer; end that one and try again", pid, tracer, name);
}

/* The kernel says EPERM for many reasons; this finds the likeliest. */
static int fail_permission(struct adopt_error *error, pid_t pid)
{
    char text[8192], label[64] = "";
    const char *at;
    int scope = 0, capable = 0;

    if (read_text(text, sizeof text, "/proc/thread-self/status") > 0 &&
        (at = strstr(text, "\nCapEff:\t")))
        capable = strtoull(at + 9, NULL, 16) >> 19 & 1; /* CAP_SYS_PTRACE */
    if (read_text(text, sizeof text, "/proc/sys/kernel/yama/ptrace_scope") > 0)
        scope = atoi(text);
    if (scope >= 3)
        return fail(error, -EPERM,
                    "cannot adopt process %d: kernel.yama.ptrace_scope is %d, which forbids ptrace "
                    "to everybody; set it to 2 or less, which takes a reboot", pid, scope);
    if (!capable)
        return fail(error, -EPERM,
                    "cannot adopt process %d: this process lacks CAP_SYS_PTRACE "
                    "(kernel.yama.ptrace_scope is %d); run postcopyd as its unit does", pid, scope);
    if (read_text(label, sizeof label, "/proc/%d/attr/current", pid) > 0)
        label[strcspn(label, "\n")] = 0;
    return fail(error, -EPERM,
                "cannot adopt process %d: ptrace is forbidden although we have CAP_SYS_PTRACE, by "
                "a security module (its label: %s) or a user namespace; allow ptrace there", pid,
                *label ? label : "none");
}

static FILE *open_maps(pid_t pid)
{
    char path[32];
    FILE *maps;

    snprintf(path, sizeof path, "/proc/%d/maps", pid);
    maps = fopen(path, "re");
    if (maps)
        setvbuf(maps, NULL, _IOFBF, 65536); /* a thread is stopped while we read */
    return maps;
}

/* Finds, in text that is mapped and not writable, the instructions that we need. The C library
 * first: it has them and will not be unmapped. */
static int find_code(pid_t pid, int mem, struct arch_code *code)
{
    enum { CHUNK = 256 * 1024 };
    CLEAN(free_pointer) unsigned char *text = malloc(CHUNK);
    CLEAN(free_pointer) char *line = NULL;
    size_t line_size = 0;

    if (!text)
        return -ENOMEM;
    memset(code, 0, sizeof *code);
    for (int others = 0; others < 2; others++) {
        CLEAN(close_file) FILE *maps = open_maps(pid);

        if (!maps)
            return -errno;
        while (getline(&line, &line_size, maps) > 0 && !(code->call && code->home)) {
            unsigned long start, end;
            char access[5];

            if (sscanf(line, "%lx-%lx %4s", &start, &end, access) != 3 || strcmp(access, "r-xp"))
                continue;
            int libc = strstr(line, "/libc.so") || strstr(line, "/libc-") ||
                       strstr(line, "/ld-musl");
            if (libc == others)
                continue;
            for (unsigned long at = start; at < end && !(code->call && code->home);
                 at += CHUNK - ARCH_CODE_MAX) {
                size_t want = end - at < CHUNK ? end - at : CHUNK;
                ssize_t len = pread(mem, text, want, (off_t)at);

                if (len <= 0)
                    break;
                arch_find_code(text, (size_t)len, at, code);
            }
        }
    }
    return code->call && code->home ? 0 : -ENXIO;
}

/* Whether [start, end), just below a thread's stack pointer, is its to write. /proc/PID/mem would
 * write into a guard page too. The main thread's stack grows when written to, down to its limit. */
static int is_stack(pid_t pid, unsigned long start, unsigned long end)
{
    CLEAN(free_pointer) char *line = NULL;
    size_t line_size = 0;
    CLEAN(close_file) FILE *maps = open_maps(pid);

    while (maps && getline(&line, &line_size, maps) > 0) {
        unsigned long from, to;
        char access[5];

        if (sscanf(line, "%lx-%lx %4s", &from, &to, access) == 3 && from < end && end <= to)
            return access[0] == 'r' && access[1] == 'w' &&
                   (from <= start || strstr(line, "[stack]"));
    }
    return 0;
}

/* ---- one thread ---- */

/* A call to be made, and what all tries at it share. */
struct job {
    pid_t pid;
    long nr;
    const unsigned long *args;
    int mem; /* /proc/PID/mem */
    struct arch_code code;
    int64_t deadline; /* CLOCK_MONOTONIC, ns */
    long result;
    struct adopt_error *error;
};

static void close_job(struct job *job)
{
    close_fd(&job->mem);
}

struct try {
    struct job *job;
    pid_t tid;
    int filtered;    /* a system call may end in SIGSYS: a seccomp filter, or who knows */
    int64_t stop_by; /* when to give up waiting for it to stop */
    int code;
};
enum { TRY_ANOTHER = 1 };

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

#ifdef ADOPT_TEST
int adopt_test_tid, adopt_test_die_at, adopt_test_die_when, adopt_test_calls;

static void test_death(int when)
{
    adopt_test_calls += !when;
    if (adopt_test_die_at && adopt_test_calls == adopt_test_die_at && when == adopt_test_die_when)
        kill(getpid(), SIGKILL);
}
#else
#define test_death(when)
#endif

/* All of ptrace goes through here. Returns what it returns, or -errno. */
static long trace(long request, pid_t tid, unsigned long address, const void *data)
{
    long got;

    test_death(0);
    got = syscall(SYS_ptrace, request, tid, address, data);
    if (got < 0)
        got = -errno;
    test_death(1);
    return got;
}

enum stop {
    STOP_SIGNAL = 1,  /* about to get a signal */
    STOP_SYSCALL = 2, /* at the beginning or end of a system call */
    STOP_EVENT = 4,   /* interrupted by us, or stopped with its process; in the signal path */
    STOP_GONE = 8,
    STOP_LATE = 16,
};

/* Waits for the next stop of whatever kind; *signal is the one about to be delivered. */
static enum stop next_stop(pid_t tid, int64_t deadline, int *signal)
{
    struct timespec pause = { 0, 10000 };
    int status;

    *signal = 0;
    for (;;) {
        pid_t got = waitpid(tid, &status, __WALL | WNOHANG);

        if (got < 0 || (got == tid && !WIFSTOPPED(status)))
            return STOP_GONE;
        if (got == tid)
            break;
        if (now_ns() > deadline)
            return STOP_LATE;
        nanosleep(&pause, NULL);
        if (pause.tv_nsec < 1000000)
            pause.tv_nsec *= 2;
    }
    if (status >> 16 == PTRACE_EVENT_STOP)
        return STOP_EVENT;
    if (WSTOPSIG(status) == (SIGTRAP | 0x80))
        return STOP_SYSCALL;
    *signal = WSTOPSIG(status);
    return STOP_SIGNAL;
}

/* Waits for a stop of kind `wanted`. At any other the thread gets what it was stopped for, a
 * signal or nothing, and goes on. */
static enum stop await(pid_t tid, enum stop wanted, long request, int64_t deadline)
{
    int signal;

    for (;;) {
        enum stop stop = next_stop(tid, deadline, &signal);

        if (stop == wanted || stop == STOP_GONE || stop == STOP_LATE)
            return stop;
        if (trace(request, tid, 0, (void *)(intptr_t)signal) < 0)
            return STOP_GONE;
    }
}

static long get_regs(pid_t tid, arch_regs *regs)
{
    struct iovec vector = { regs, sizeof *regs };
    long code = trace(PTRACE_GETREGSET, tid, 1 /* NT_PRSTATUS */, &vector);

    if (code < 0)
        return code;
    return vector.iov_len == sizeof *regs && arch_is_native(regs) ? 0 : -ENOEXEC;
}

static long set_regs(pid_t tid, const arch_regs *regs)
{
    arch_regs copy = *regs;
    struct iovec vector = { &copy, sizeof copy };

    return trace(PTRACE_SETREGSET, tid, 1 /* NT_PRSTATUS */, &vector);
}

/* Inside a restartable sequence (rseq) the kernel must see the thread's own instruction pointer
 * when it returns to user mode, to abort the sequence; with ours it would forget it. A thread that
 * sleeps in a system call is never there. */
static int in_restartable_sequence(const struct job *job, pid_t tid, unsigned long ip)
{
    struct {
        uint64_t address;
        uint32_t size, signature, flags, pad;
    } setting = { 0 };
    struct {
        uint32_t version, flags;
        uint64_t start, length, abort;
    } sequence;
    uint64_t pointer;

    if (trace(PTRACE_GET_RSEQ_CONFIGURATION, tid, sizeof setting, &setting) < 0 ||
        !setting.address)
        return 0;
    return pread(job->mem, &pointer, sizeof pointer, (off_t)setting.address + 8) == 8 && pointer &&
           pread(job->mem, &sequence, sizeof sequence, (off_t)pointer) == sizeof sequence &&
           ip - sequence.start < sequence.length;
}

/* Whether system calls of this thread are turned into SIGSYS, for a handler of its own process (as
 * Wine does, PR_SET_SYSCALL_USER_DISPATCH): our call would be, while its signals are blocked, and
 * that kills. -1: this kernel does not tell. */
static int dispatches(pid_t tid)
{
    struct {
        uint64_t mode, selector, offset, len;
    } setting = { 0 };

    if (trace(GET_SYSCALL_USER_DISPATCH_CONFIG, tid, sizeof setting, &setting) < 0)
        return -1;
    return setting.mode != 0;
}

/* What a thread was before we touched it. */
struct before {
    arch_regs regs;
    uint64_t mask;
    unsigned long frame; /* where the frame stands */
    size_t frame_size;
    unsigned char stack[ARCH_FRAME_MAX]; /* what stood there */
};

/* Reads what the thread is, writes its frame, and sets it up to make the call; its registers
 * last. Whatever fails before that has changed nothing. Signals are blocked only then: a thread
 * with our registers gets its mask back from the frame, one with its own would keep ours. */
static int set_up(struct try *try, struct before *before)
{
    struct job *job = try->job;
    pid_t tid = try->tid;
    __attribute__((aligned(64))) unsigned char xstate[ARCH_XSTATE_MAX], frame[ARCH_FRAME_MAX];
    struct iovec vector = { xstate, sizeof xstate };
    uint64_t all = ~0ull;
    long code;

    if ((code = get_regs(tid, &before->regs)) == -ENOEXEC)
        return fail(job->error, -ENOEXEC,
                    "cannot adopt process %d: its thread %d is not running this machine's own "
                    "64-bit code; use a 64-bit VMM", job->pid, tid);
    arch_soften(&before->regs);
    if (code == 0)
        code = trace(PTRACE_GETSIGMASK, tid, sizeof before->mask, &before->mask);
    if (code == 0)
        code = trace(PTRACE_GETREGSET, tid, ARCH_XSTATE_SET, &vector);
    if (code < 0)
        return fail(job->error, TRY_ANOTHER, "cannot adopt process %d: the registers of its thread "
                    "%d cannot be read (%s); try again", job->pid, tid, strerror((int)-code));
    if (in_restartable_sequence(job, tid, arch_ip(&before->regs)))
        return fail(job->error, TRY_ANOTHER, "cannot adopt process %d: its thread %d was in a "
                    "restartable sequence; try again", job->pid, tid);
    int dispatched = dispatches(tid);
    if (dispatched > 0)
        return fail(job->error, TRY_ANOTHER, "cannot adopt process %d: its thread %d handles its "
                    "system calls by itself (PR_SET_SYSCALL_USER_DISPATCH), and would handle ours; "
                    "let the VMM hand over its userfaultfd", job->pid, tid);
    if (dispatched < 0) /* if it does, the signal can be taken back */
        try->filtered = 1;

    before->frame_size = arch_build_frame(&before->regs, xstate, vector.iov_len, before->mask,
                                          &job->code, frame, &before->frame);
    if (!before->frame_size)
        return fail(job->error, TRY_ANOTHER, "cannot adopt process %d: the extended state of its "
                    "thread %d (%zu bytes) is unknown here; report this with /proc/cpuinfo",
                    job->pid, tid, vector.iov_len);
    if (!is_stack(job->pid, before->frame, arch_sp(&before->regs)) ||
        pread(job->mem, before->stack, before->frame_size, (off_t)before->frame) !=
            (ssize_t)before->frame_size ||
        pwrite(job->mem, frame, before->frame_size, (off_t)before->frame) !=
            (ssize_t)before->frame_size)
        return fail(job->error, TRY_ANOTHER, "cannot adopt process %d: the stack of its thread %d "
                    "has no room for a signal frame of %zu bytes; give the VMM's threads larger "
                    "stacks", job->pid, tid, before->frame_size);

    arch_regs call = arch_call_regs(&before->regs, before->frame, &job->code, job->nr, job->args);
    if (set_regs(tid, &call) < 0)
        return fail(job->error, TRY_ANOTHER, "cannot adopt process %d: its thread %d ended; try "
                    "again", job->pid, tid);
    if (try->filtered) /* a SIGSYS that finds itself blocked takes the process's handler away */
        all &= ~(1ull << (SIGSYS - 1));
    trace(PTRACE_SETSIGMASK, tid, sizeof all, &all);
    return 0;
}

/* Gives the thread, stopped in the signal path, back to itself. The registers come after the mask,
 * for the reason above; the bytes of the stack after the registers, while nothing needs the frame
 * any more. */
static long send_home(const struct try *try, const struct before *before)
{
    long code = trace(PTRACE_SETSIGMASK, try->tid, sizeof before->mask, &before->mask);

    if (code == 0)
        code = set_regs(try->tid, &before->regs);
    if (code == 0 && pwrite(try->job->mem, before->stack, before->frame_size,
                            (off_t)before->frame) < 0)
        code = 0; /* the bytes below a stack are nobody's; putting them back was a courtesy */
    trace(PTRACE_DETACH, try->tid, 0, NULL);
    return code;
}

static int fail_gone(const struct job *job)
{
    return fail(job->error, -ESRCH, "cannot adopt process %d: it ended meanwhile; see why in its "
                "own log", job->pid);
}

/* A filter that answers with SIGSYS: the signal is pending for this thread. It is taken out at its
 * delivery, which is in the signal path as well. */
static int take_sigsys(const struct try *try)
{
    struct status status;
    int signal;

    if (!try->filtered || read_status(try->job->pid, try->tid, &status) < 0 ||
        !(status.pending >> (SIGSYS - 1) & 1))
        return 0;
    for (;;) {
        if (trace(PTRACE_CONT, try->tid, 0, NULL) < 0)
            return -ESRCH;
        switch (next_stop(try->tid, try->job->deadline + 1000000000ll, &signal)) {
        case STOP_SIGNAL:
            if (signal == SIGSYS)
                return 1;
            break;
        case STOP_GONE:
        case STOP_LATE:
            return -ESRCH;
        default:
            break;
        }
    }
}

/* Runs the call in a thread that is set up for it. */
static int run(const struct try *try, const struct before *before)
{
    struct job *job = try->job;
    pid_t tid = try->tid;
    enum stop stop = STOP_SYSCALL;
    arch_regs regs;
    int refused;

    for (int i = 0; i < 2 && stop == STOP_SYSCALL; i++) { /* beginning, end */
        if (trace(PTRACE_SYSCALL, tid, 0, NULL) < 0)
            return fail_gone(job);
        stop = await(tid, STOP_SYSCALL, PTRACE_SYSCALL, job->deadline);
    }
    /* To the signal path, before an instruction of the target is executed. If it was late, this
     * finds out how far it is. */
    if (stop != STOP_GONE && trace(PTRACE_INTERRUPT, tid, 0, NULL) == 0) {
        if (stop == STOP_SYSCALL)
            trace(PTRACE_CONT, tid, 0, NULL);
        stop = await(tid, STOP_EVENT, PTRACE_CONT, job->deadline + 100000000ll);
    }
    if (stop == STOP_LATE)
        return fail(job->error, -EINPROGRESS,
                    "adopting process %d: the system call was set going in its thread %d and did "
                    "not come back in time; thaw the process, then look in /proc/%d/fd", job->pid,
                    tid, job->pid);
    if (stop != STOP_EVENT || get_regs(tid, &regs) < 0 || (refused = take_sigsys(try)) < 0)
        return fail_gone(job);

    if (refused) {
        send_home(try, before);
        return fail(job->error, -EACCES,
                    "cannot adopt process %d: its seccomp filter refuses system call %ld (or it "
                    "handles system calls by itself); start the VMM with a filter that allows it",
                    job->pid, job->nr);
    }
    if (arch_call_done(&regs, &job->code)) {
        job->result = arch_result(&regs);
        send_home(try, before);
        return 0;
    }
    if (arch_call_not_begun(&regs, &job->code)) {
        send_home(try, before);
        return fail(job->error, -EBUSY,
                    "cannot adopt process %d: its thread %d got no processor in time (frozen "
                    "cgroup?), nothing was done; thaw it and try again", job->pid, tid);
    }
    trace(PTRACE_DETACH, tid, 0, NULL); /* not where it should be: it has its frame */
    return fail(job->error, -EINPROGRESS,
                "adopting process %d: its thread %d left the system call for another place; look "
                "in /proc/%d/fd whether the call was made", job->pid, tid, job->pid);
}

static void *try_thread(void *argument)
{
    struct try *try = argument;
    struct job *job = try->job;
    struct before before;
    long code = trace(PTRACE_SEIZE, try->tid, 0, (void *)(intptr_t)PTRACE_O_TRACESYSGOOD);

    if (code == 0)
        code = trace(PTRACE_INTERRUPT, try->tid, 0, NULL);
    if (code < 0) {
        struct status status;

        if (code != -EPERM)
            try->code = fail(job->error, TRY_ANOTHER, "cannot adopt process %d: its thread %d "
                             "cannot be stopped (%s); try again", job->pid, try->tid,
                             strerror((int)-code));
        else if (read_status(job->pid, try->tid, &status) == 0 && status.tracer)
            try->code = fail_traced(job->error, job->pid, status.tracer);
        else
            try->code = fail_permission(job->error, job->pid);
        return NULL;
    }
    if (await(try->tid, STOP_EVENT, PTRACE_CONT, try->stop_by) != STOP_EVENT) {
        try->code = TRY_ANOTHER; /* the end of this thread detaches it */
        if (!*job->error->text)  /* a reason of another thread says more */
            fail(job->error, 0, "cannot adopt process %d: its thread %d does not stop; see "
                 "/proc/%d/stack for what it waits for, and try again", job->pid, try->tid,
                 try->tid);
        return NULL;
    }
    try->code = set_up(try, &before);
    if (try->code)
        trace(PTRACE_DETACH, try->tid, 0, NULL);
    else
        try->code = run(try, &before);
    return NULL;
}

/* Runs try_thread and waits for its end, and for the end of its tracing. */
static int run_try(struct try *try)
{
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, old;
    struct status status;
    int code;

    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 1024 * 1024);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* our process's handlers are not its business */
    code = pthread_create(&thread, &attributes, try_thread, try);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attributes);
    if (code)
        return fail(try->job->error, -code, "cannot adopt process %d: no thread to do it with (%s)"
                    "; raise the limit of threads", try->job->pid, strerror(code));
    pthread_join(thread, NULL);

    /* The kernel wakes us a little before it detaches what the thread still traced. */
    for (int i = 0; try->code && i < 1000; i++) {
        struct timespec pause = { 0, 100000 };

        if (read_status(try->job->pid, try->tid, &status) < 0 || !status.tracer)
            break;
        char path[64];
        snprintf(path, sizeof path, "/proc/self/task/%d", status.tracer);
        if (access(path, F_OK)) /* another's, or ended just now */
            break;
        nanosleep(&pause, NULL);
    }
    return try->code;
}

/* ---- which thread ---- */

struct candidate {
    pid_t tid;
    int rank;
};

enum { RANK_UNFIT = 100, RANK_DEAD };

/* Sleeping in an ordinary wait is best; see arch_rank. Running ones stop at their next interrupt,
 * but may be the guest's processors. Uninterruptible ones do not stop. Workers of the kernel that
 * live in the process (vhost, KVM, io_uring) stop, but have no user mode to make a call from. */
static int rank_thread(pid_t pid, pid_t tid)
{
    enum { IO_WORKER = 0x10, USER_WORKER = 0x4000, KTHREAD = 0x200000 }; /* PF_, linux/sched.h */
    unsigned flags;
    char text[512], state;
    const char *name_end;

    if (read_text(text, sizeof text, "/proc/%d/task/%d/stat", pid, tid) < 0 ||
        !(name_end = strrchr(text, ')')) ||
        sscanf(name_end, ") %c %*d %*d %*d %*d %*d %u", &state, &flags) != 2 ||
        flags & (IO_WORKER | USER_WORKER | KTHREAD))
        return RANK_DEAD;
    switch (state) {
    case 'S':
        if (read_text(text, sizeof text, "/proc/%d/task/%d/syscall", pid, tid) > 0 &&
            *text >= '0' && *text <= '9')
            return arch_rank(atol(text));
        return 3; /* "-1": waits for a page, as behind a userfaultfd */
    case 'T': /* stopped by SIGSTOP: it makes our call and stops again */
    case 'R':
        return 2;
    case 'Z':
    case 'X':
        return RANK_DEAD;
    default:
        return RANK_UNFIT;
    }
}

static int by_rank(const void *a, const void *b)
{
    const struct candidate *left = a, *right = b;

    return left->rank != right->rank ? left->rank - right->rank : (left->tid > right->tid) * 2 - 1;
}

/* All fit threads, best first; returns their number, or -errno if no thread lives. */
static int list_threads(pid_t pid, struct candidate **list)
{
    char path[32];
    int count = 0, size = 0, living = 0;
    struct dirent *entry;
    DIR *directory;

    snprintf(path, sizeof path, "/proc/%d/task", pid);
    directory = opendir(path);
    if (!directory)
        return -errno;
    while ((entry = readdir(directory))) {
        pid_t tid = atoi(entry->d_name);
        int rank = tid > 0 ? rank_thread(pid, tid) : RANK_DEAD;

        living += rank != RANK_DEAD;
#ifdef ADOPT_TEST
        if (adopt_test_tid && rank != RANK_DEAD)
            rank = tid == adopt_test_tid ? 0 : RANK_UNFIT;
#endif
        if (rank >= RANK_UNFIT)
            continue;
        if (count == size) {
            struct candidate *more = realloc(*list, (size_t)(size += 64) * sizeof *more);

            if (!more)
                break;
            *list = more;
        }
        (*list)[count++] = (struct candidate){ tid, rank };
    }
    closedir(directory);
    if (count)
        qsort(*list, (size_t)count, sizeof **list, by_rank);
    return living ? count : -ESRCH;
}

/* What can be refused by looking. */
static int examine(pid_t pid, int allow_seccomp, pid_t tid, struct status *status,
                   struct adopt_error *error)
{
    int code = read_status(pid, tid, status);

    if (code < 0)
        return fail(error, -ESRCH, "cannot adopt process %d: there is none; attach the VMM as it "
                    "runs now", pid);
    if (status->tgid != pid)
        return fail(error, -EINVAL, "cannot adopt process %d: it is a thread of process %d; name "
                    "the process", pid, status->tgid);
    if (status->tgid == getpid())
        return fail(error, -EINVAL, "cannot adopt process %d: it is this process; make the system "
                    "call directly", pid);
    if (status->tracer)
        return fail_traced(error, pid, status->tracer);
    if (status->seccomp && !(allow_seccomp && status->seccomp == 2))
        return fail(error, -EACCES, "cannot adopt process %d: it has a seccomp filter, and one "
                    "that is an allow-list would kill it; let the VMM hand over its userfaultfd, "
                    "or say that the filter is a deny-list", pid);
    if (status->shadow_stack)
        return fail(error, -ENXIO, "cannot adopt process %d: it has a shadow stack, on which our "
                    "call could not return; start it without (GLIBC_TUNABLES "
                    "glibc.cpu.x86_shstk=off)", pid);
    return 0;
}

/* Before anything is touched: is it a process that we may and can adopt? */
static int open_target(struct job *job, int allow_seccomp)
{
    unsigned char elf[20] = { 0 };
    struct status status;
    char path[32];
    int code = examine(job->pid, allow_seccomp, job->pid, &status, job->error);

    if (code)
        return code;
    if (status.state == 'Z' || status.state == 'X')
        return fail(job->error, -ESRCH, "cannot adopt process %d: it has ended and waits for its "
                    "parent (zombie); start the VMM again", job->pid);

    snprintf(path, sizeof path, "/proc/%d/exe", job->pid);
    CLEAN(close_fd) int exe = open(path, O_RDONLY | O_CLOEXEC);
    if (exe >= 0 && read(exe, elf, sizeof elf) == sizeof elf &&
        (elf[4] != ARCH_ELF_CLASS || (elf[18] | elf[19] << 8) != ARCH_ELF_MACHINE))
        return fail(job->error, -ENOEXEC, "cannot adopt process %d: it is not a 64-bit program of "
                    "this machine's own kind (ELF class %d, machine %d); use a 64-bit VMM",
                    job->pid, elf[4], elf[18] | elf[19] << 8);

    snprintf(path, sizeof path, "/proc/%d/mem", job->pid);
    job->mem = open(path, O_RDWR | O_CLOEXEC);
    if (job->mem < 0) {
        code = errno;
        if (code == EACCES || code == EPERM)
            return fail_permission(job->error, job->pid);
        return fail(job->error, code == ENOENT ? -ESRCH : -code, "cannot adopt process %d: its "
                    "memory cannot be opened (%s); check that it still runs", job->pid,
                    strerror(code));
    }
    code = find_code(job->pid, job->mem, &job->code);
    if (code)
        return fail(job->error, code, "cannot adopt process %d: no %s in its program text (%s); "
                    "use a VMM linked with a common C library", job->pid, ARCH_CODE_NAME,
                    strerror(-code));
    return 0;
}

int adopt_syscall(int pid, long nr, const unsigned long args[6], int timeout_ms,
                  int allow_seccomp, long *result, struct adopt_error *error)
{
    CLEAN(free_pointer) struct candidate *list = NULL;
    CLEAN(close_job) struct job job = {
        .pid = pid, .nr = nr, .args = args, .mem = -1, .error = error
    };
    int64_t slice = timeout_ms * 1000000ll / 4;
    int code, tried = 0;

    error->text[0] = 0;
    job.deadline = now_ns() + timeout_ms * 1000000ll;
    code = open_target(&job, allow_seccomp);
    if (code)
        return code;

    /* Again and again over all threads: one in uninterruptible sleep may be out of it soon. */
    do {
        int count = list_threads(pid, &list);
        struct timespec pause = { 0, 2000000 };

        if (count < 0)
            return fail_gone(&job);
        for (int i = 0; i < count && now_ns() < job.deadline; i++) {
            struct try try = { .job = &job, .tid = list[i].tid };
            struct adopt_error why;
            struct status status;

            code = examine(pid, allow_seccomp, try.tid, &status, &why);
            if (code == -ESRCH)
                continue; /* that thread ended */
            if (code) {
                *error = why;
                return code;
            }
            try.filtered = status.seccomp != 0;
            try.stop_by = now_ns() + slice < job.deadline ? now_ns() + slice : job.deadline;
            code = run_try(&try);
            tried = 1;
            if (code == 0)
                *result = job.result;
            if (code != TRY_ANOTHER)
                return code;
        }
        nanosleep(&pause, NULL);
    } while (now_ns() < job.deadline);

    if (tried)
        return -EBUSY; /* with a thread's reason */
    return fail(error, -EBUSY, "cannot adopt process %d: every thread was in uninterruptible sleep "
                "for %d ms; see /proc/%d/task/*/stack for what they wait for, and try again", pid,
                timeout_ms, pid);
}

#else /* another architecture: wants its own header like adopt_x86_64.h */

int adopt_syscall(int pid, long nr, const unsigned long args[6], int timeout_ms,
                  int allow_seccomp, long *result, struct adopt_error *error)
{
    (void)nr, (void)args, (void)timeout_ms, (void)allow_seccomp, (void)result;
    return fail(error, -ENOSYS, "cannot adopt process %d: not supported on this architecture; "
                "migrate it with the VMM's own means", pid);
}

#endif
