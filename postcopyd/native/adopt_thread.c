/* SPDX-License-Identifier: Apache-2.0
 *
 * Has one thread of another process make one system call; all of ptrace is here. adopt.c tells the
 * way of a call.
 *
 * Each try has a tracer thread in this process, which owns the tracing and ends with the try:
 * run_try starts and joins it. Nobody stops it, as each wait in it has a deadline. A target thread
 * that does not stop cannot be detached by a call; the end of its tracer detaches it.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "adopt_parts.h"

#if defined(__x86_64__)
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>

#ifndef PTRACE_GET_RSEQ_CONFIGURATION
#define PTRACE_GET_RSEQ_CONFIGURATION 0x420f
#endif
#define GET_SYSCALL_USER_DISPATCH_CONFIG 0x4211 /* PTRACE_, Linux 6.4 */

int64_t now_ns(void)
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

/* All ptrace calls are made here. Returns what ptrace returns, or -errno. */
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
    STOP_EVENT = 4,   /* interrupted, or stopped with its process; in the signal path */
    STOP_GONE = 8,
    STOP_LATE = 16,
};

/* Waits for the next stop of any kind; *signal is the signal about to be delivered. */
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

/* Waits for a stop of kind `wanted`. At any other stop the thread gets its signal, if there is one,
 * and goes on. */
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
 * when it returns to user mode, to abort the sequence; with another one it would forget that. A
 * thread that sleeps in a system call is never in such a sequence. */
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

/* Whether system calls of this thread become SIGSYS, for a handler of its own process (as in Wine,
 * PR_SET_SYSCALL_USER_DISPATCH). The inserted call would too, while signals are blocked, and that
 * kills. -1: this kernel does not tell. */
static int dispatches(pid_t tid)
{
    struct {
        uint64_t mode, selector, offset, len;
    } setting = { 0 };

    if (trace(GET_SYSCALL_USER_DISPATCH_CONFIG, tid, sizeof setting, &setting) < 0)
        return -1;
    return setting.mode != 0;
}

/* The state of a thread before it was touched. */
struct before {
    arch_regs regs;
    uint64_t mask;
    unsigned long frame; /* where the frame stands */
    size_t frame_size;
    unsigned char stack[ARCH_FRAME_MAX]; /* what stood there */
};

/* Reads the thread's state, writes its frame, and sets it up to make the call; its registers last.
 * A failure before that has changed nothing. Signals are blocked only after that: a thread with the
 * registers of the call gets its mask back from the frame; one with its own registers would not. */
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
    if (dispatched < 0) /* it may: then take_sigsys takes the signal back */
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
    if (try->filtered) /* a SIGSYS that is blocked removes the process's handler for it */
        all &= ~(1ull << (SIGSYS - 1));
    trace(PTRACE_SETSIGMASK, tid, sizeof all, &all);
    return 0;
}

/* Gives the thread, stopped in the signal path, its own state back. The registers come after the
 * mask, for the reason above; the bytes of the stack after the registers, when nothing needs the
 * frame any more. */
static long send_home(const struct try *try, const struct before *before)
{
    long code = trace(PTRACE_SETSIGMASK, try->tid, sizeof before->mask, &before->mask);

    if (code == 0)
        code = set_regs(try->tid, &before->regs);
    if (code == 0 && pwrite(try->job->mem, before->stack, before->frame_size,
                            (off_t)before->frame) < 0)
        code = 0; /* nobody owns the bytes below a stack; putting them back was a courtesy */
    trace(PTRACE_DETACH, try->tid, 0, NULL);
    return code;
}

/* If a filter has answered with SIGSYS, the signal is pending for this thread. Takes it out at its
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
            return fail_gone(job->error, job->pid);
        stop = await(tid, STOP_SYSCALL, PTRACE_SYSCALL, job->deadline);
    }
    /* Stop in the signal path, before the target executes an instruction. If the thread was late,
     * this shows how far it is. */
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
        return fail_gone(job->error, job->pid);

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
    trace(PTRACE_DETACH, tid, 0, NULL); /* not where it should be: its frame takes it back */
    return fail(job->error, -EINPROGRESS,
                "adopting process %d: its thread %d left the system call for another place; look "
                "in /proc/%d/fd whether the call was made", job->pid, tid, job->pid);
}

static void *try_thread(void *argument)
{
    struct try *try = argument;
    struct job *job = try->job;
    struct before before;
    int suspend = job->suspend && try->filtered ? PTRACE_O_SUSPEND_SECCOMP : 0;
    long code =
        trace(PTRACE_SEIZE, try->tid, 0, (void *)(intptr_t)(PTRACE_O_TRACESYSGOOD | suspend));

    if (code == -EPERM && suspend) {
        try->code = fail(job->error, -EACCES,
                         "cannot adopt process %d: its seccomp filter may refuse system call %ld, "
                         "and this process may not suspend it: that takes CAP_SYS_ADMIN, and a "
                         "daemon without a filter of its own", job->pid, job->nr);
        return NULL;
    }
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
        try->code = TRY_ANOTHER; /* the end of this tracer detaches the thread */
        if (!*job->error->text)  /* the reason of an earlier thread says more */
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

int run_try(struct try *try)
{
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, old;
    struct status status;
    int code;

    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 1024 * 1024);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* handlers of this process must not run in it */
    code = pthread_create(&thread, &attributes, try_thread, try);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attributes);
    if (code)
        return fail(try->job->error, -code, "cannot adopt process %d: no thread to do it with (%s)"
                    "; raise the limit of threads", try->job->pid, strerror(code));
    pthread_join(thread, NULL);

    /* pthread_join returns a little before the kernel detaches what the thread still traced. */
    for (int i = 0; try->code && i < 1000; i++) {
        struct timespec pause = { 0, 100000 };

        if (read_status(try->job->pid, try->tid, &status) < 0 || !status.tracer)
            break;
        char path[64];
        snprintf(path, sizeof path, "/proc/self/task/%d", status.tracer);
        if (access(path, F_OK)) /* another process's tracer, or it has just ended */
            break;
        nanosleep(&pause, NULL);
    }
    return try->code;
}

#endif
