/* SPDX-License-Identifier: Apache-2.0
 *
 * A keeper: a process beside another one, which shares its memory, so that the memory outlives that
 * process. Knows neither what the memory is for nor how long it is needed.
 *
 * The keeper is begun by a system call that adoption has the process make: clone, with CLONE_VM. It
 * needs code of its own and finds none in that memory. So it gets a stack on which signal frames
 * stand in a row (`struct page`): each restores registers that make one system call, and a stack
 * pointer at the next frame. So the keeper makes these calls one after the other, and executes
 * nothing but "syscall; ret" and rt_sigreturn. Nobody has to trace it, so it does not matter when
 * this process ends.
 *
 *   close_range     it has the descriptors of the process (CLONE_FILES) only until it leaves them
 *                   here: with CLOSE_RANGE_UNSHARE the kernel makes it a table without any
 *   prctl           its name, by which people and `keeper.py` know it
 *   timer_create    a timer that ends it by SIGKILL
 *   timer_settime   when: as `until` in its memory says now
 *   clock_nanosleep a minute; then timer_settime again
 *
 * So whoever needs it longer writes a later time into its memory; and it ends by itself, after
 * nobody has for long enough.
 *
 * No signal but SIGKILL and SIGSTOP reaches it. Its end sends no signal to its parent, the process,
 * which has not asked for a child.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "adopt_parts.h"

#include <errno.h>

#if defined(__x86_64__)
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>

enum { PERIOD_S = 60, UNSHARE = 2 /* CLOSE_RANGE_ */ };
enum { CLOSE, NAME, CREATE, SET, SLEEP, LINKS };

struct page {
    char name[16];
    struct itimerspec until; /* CLOCK_BOOTTIME */
    struct timespec period;
    struct sigevent end;
    struct arch_frame links[LINKS];
};
_Static_assert(sizeof(struct page) <= 4096, "the page of a keeper");

static struct page fill(unsigned long at, const struct arch_code *code, int64_t until_s)
{
    struct page page = {
        .until.it_value.tv_sec = until_s,
        .period.tv_sec = PERIOD_S,
        .end = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGKILL },
    };
    struct call {
        long nr;
        unsigned long args[4];
    };
    const struct call calls[LINKS] = {
        [CLOSE] = { SYS_close_range, { 0, ~0u, UNSHARE } },
        [NAME] = { SYS_prctl, { PR_SET_NAME, at + offsetof(struct page, name) } },
        /* The kernel writes the timer's number where the next call has its first argument. */
        [CREATE] = { SYS_timer_create,
                     { CLOCK_BOOTTIME, at + offsetof(struct page, end),
                       at + offsetof(struct page, links[SET]) + ARCH_LINK_FIRST } },
        [SET] = { SYS_timer_settime, { 0, TIMER_ABSTIME, at + offsetof(struct page, until) } },
        [SLEEP] = { SYS_clock_nanosleep, { CLOCK_BOOTTIME, 0, at + offsetof(struct page, period) } },
    };

    for (int i = 0; i < LINKS; i++) {
        int next = i == SLEEP ? SET : i + 1;

        page.links[i] = arch_link(code, calls[i].nr, calls[i].args,
                                  at + offsetof(struct page, links) +
                                      (unsigned long)next * sizeof(struct arch_frame));
    }
    return page;
}

static int open_mem(int pid)
{
    char path[32];

    snprintf(path, sizeof path, "/proc/%d/mem", pid);
    return open(path, O_RDWR | O_CLOEXEC);
}

int adopt_keeper(int pid, unsigned long page, const char *name, int64_t until_s, int timeout_ms,
                 long *result, struct adopt_error *error)
{
    CLEAN(close_fd) int mem = open_mem(pid);
    struct arch_code code;
    int failed = mem < 0 ? -errno : find_code(pid, mem, &code);

    if (failed)
        return fail(error, failed, "making a keeper of process %d: its memory cannot be read (%s)",
                    pid, strerror(-failed));
    struct page filled = fill(page, &code, until_s);
    const unsigned long args[6] = { CLONE_VM | CLONE_FILES,
                                    page + offsetof(struct page, links) };

    snprintf(filled.name, sizeof filled.name, "%s", name);
    if (pwrite(mem, &filled, sizeof filled, (off_t)page) != sizeof filled)
        return fail(error, -EFAULT, "making a keeper of process %d: the page for it is not there",
                    pid);
    return adopt_syscall(pid, SYS_clone, args, timeout_ms, ADOPT_FILTER_SUSPENDED, result, error);
}

int adopt_keeper_until(int pid, unsigned long page, int64_t until_s)
{
    CLEAN(close_fd) int mem = open_mem(pid);
    off_t at = (off_t)(page + offsetof(struct page, until.it_value.tv_sec));

    if (mem < 0)
        return -errno;
    errno = ESRCH; /* nothing is written where nobody has the memory any more */
    return pwrite(mem, &until_s, sizeof until_s, at) == sizeof until_s ? 0 : -errno;
}

#else

int adopt_keeper(int pid, unsigned long page, const char *name, int64_t until_s, int timeout_ms,
                 long *result, struct adopt_error *error)
{
    const unsigned long none[6] = { 0 };

    (void)page, (void)name, (void)until_s;
    return adopt_syscall(pid, 0, none, timeout_ms, ADOPT_FILTER_UNKNOWN, result, error);
}

int adopt_keeper_until(int pid, unsigned long page, int64_t until_s)
{
    (void)pid, (void)page, (void)until_s;
    return -ENOSYS;
}

#endif
