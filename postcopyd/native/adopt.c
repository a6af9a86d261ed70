/* SPDX-License-Identifier: Apache-2.0
 *
 * Adoption: runs one system call inside a process that does not cooperate, and leaves the process
 * as it was. Must not know what the call is for, nor what a VMM is. This file chooses a thread, and
 * another if that did not do; adopt_thread.c has it make the call, adopt_proc.c knows /proc.
 *
 * The way of one call. One thread is seized and interrupted. A stopped thread stands in the
 * kernel's signal path, on its way out of whatever it was doing. There it is given
 *
 *   - a signal frame on its stack, below the red zone, as if a handler had been called: all its
 *     registers, its extended state and its signal mask;
 *   - registers as if that handler were about to make the call: the instruction pointer at an
 *     existing "syscall; ret", the stack pointer at the frame, whose return address is an existing
 *     rt_sigreturn. One ptrace call puts these in place, the only one that matters.
 *
 * From there on the thread needs no tracer: it makes the call, returns into rt_sigreturn and goes
 * on where it was. That is what happens if this process is killed, at any instant. (So there is no
 * single stepping: a tracer that is killed during it leaves a SIGTRAP behind, which kills. A system
 * call stop leaves 0x85 with PTRACE_O_TRACESYSGOOD, which is no signal.)
 *
 * While this process lives it does better. The thread is stopped again as it leaves the call, in
 * the signal path as before, and gets its own registers back, with the interrupted call's result
 * and number among them. The kernel then restarts that call exactly, with what is left of its
 * timeout, since the inserted call has touched no restart block. The extended state needs nothing:
 * no instruction but "syscall" was executed.
 *
 * While the call runs signals are blocked: they wait in the kernel's own queues, in their order.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "adopt_parts.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

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

#if defined(__x86_64__)

static void close_job(struct job *job)
{
    close_fd(&job->mem);
}

struct candidate {
    pid_t tid;
    int rank;
};

enum { RANK_UNFIT = 100, RANK_DEAD };

/* A thread that sleeps in an ordinary wait is best; see arch_rank. Running threads stop at their
 * next interrupt, but may be the guest's processors. Uninterruptible ones do not stop. Workers of
 * the kernel that live in the process (vhost, KVM, io_uring) stop, but have no user mode. */
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
    case 'T': /* stopped by SIGSTOP: it makes the call and stops again */
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

/* Lists all fit threads, best first; returns their number, or -errno if no thread lives. */
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

/* Refuses what /proc shows to be unfit. */
static int examine(pid_t pid, int filter, pid_t tid, struct status *status,
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
    if (status->seccomp && !(filter && status->seccomp == 2))
        return fail(error, -EACCES, "cannot adopt process %d: it has a seccomp filter, and one "
                    "that is an allow-list would kill it; let the VMM hand over its userfaultfd, "
                    "or say that the filter is a deny-list", pid);
    if (status->shadow_stack)
        return fail(error, -ENXIO, "cannot adopt process %d: it has a shadow stack, on which our "
                    "call could not return; start it without (GLIBC_TUNABLES "
                    "glibc.cpu.x86_shstk=off)", pid);
    return 0;
}

/* Before anything is touched, checks that this process may and can adopt the target. */
static int open_target(struct job *job, int filter)
{
    unsigned char elf[20] = { 0 };
    struct status status;
    char path[32];
    int code = examine(job->pid, filter, job->pid, &status, job->error);

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
                  int filter, long *result, struct adopt_error *error)
{
    CLEAN(free_pointer) struct candidate *list = NULL;
    CLEAN(close_job) struct job job = {
        .pid = pid, .nr = nr, .args = args, .mem = -1, .error = error,
        .suspend = filter == ADOPT_FILTER_SUSPENDED,
    };
    int64_t slice = timeout_ms * 1000000ll / 4;
    int code, tried = 0;

    error->text[0] = 0;
    job.deadline = now_ns() + timeout_ms * 1000000ll;
    code = open_target(&job, filter);
    if (code)
        return code;

    /* All threads again and again: one in uninterruptible sleep may soon leave it. */
    do {
        int count = list_threads(pid, &list);
        struct timespec pause = { 0, 2000000 };

        if (count < 0)
            return fail_gone(error, pid);
        for (int i = 0; i < count && now_ns() < job.deadline; i++) {
            struct try try = { .job = &job, .tid = list[i].tid };
            struct adopt_error why;
            struct status status;

            code = examine(pid, filter, try.tid, &status, &why);
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
        return -EBUSY; /* with the reason of one thread */
    return fail(error, -EBUSY, "cannot adopt process %d: every thread was in uninterruptible sleep "
                "for %d ms; see /proc/%d/task/*/stack for what they wait for, and try again", pid,
                timeout_ms, pid);
}

#else

int adopt_syscall(int pid, long nr, const unsigned long args[6], int timeout_ms,
                  int filter, long *result, struct adopt_error *error)
{
    (void)nr, (void)args, (void)timeout_ms, (void)filter, (void)result;
    return fail(error, -ENOSYS, "cannot adopt process %d: not supported on this architecture; "
                "migrate it with the VMM's own means", pid);
}

#endif
