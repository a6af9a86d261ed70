/* SPDX-License-Identifier: Apache-2.0
 *
 * Adoption: one system call run inside a process that does not cooperate. adopt.c says how.
 */
#ifndef POSTCOPYD_ADOPT_H
#define POSTCOPYD_ADOPT_H

#include <stdint.h>

/* One sentence: what was being done, to what, why it failed, what to do now. */
struct adopt_error {
    char text[256];
};

/* ALLOWS: the filter, if there is one, lets the call pass. SUSPENDED: it may not; the kernel is told
 * to leave the filter out of this call, for which this process needs CAP_SYS_ADMIN and must have no
 * filter itself. */
enum { ADOPT_FILTER_UNKNOWN = 0, ADOPT_FILTER_ALLOWS = 1, ADOPT_FILTER_SUSPENDED = 2 };

/* Runs system call `nr` with `args` once in some thread of process `pid`.
 *
 * Returns 0 and in *result what the kernel returned there (-errno included), or -errno and a
 * sentence in error->text. `timeout_ms` limits the whole; only threads that do not stop take so
 * long. `filter` says what is known of a seccomp filter that the process may have.
 *
 *   -EINVAL    pid is not another process, or is one thread of a process
 *   -ESRCH     no such process, or it has ended, perhaps to a zombie
 *   -EPERM     the kernel or a security module forbids it
 *   -EBUSY     another process traces it; or no thread stopped in time; nothing was done
 *   -EACCES    it has a seccomp filter of which nothing is known, or which refused the call, or
 *              which this process may not suspend
 *   -ENOEXEC   not a process of this architecture
 *   -ENXIO     no usable system call instruction or stack in it
 *   -EINPROGRESS  the call was started and did not finish in time (the process is frozen): it will
 *              still be made, and the thread then goes on by itself; look in /proc/PID/fd
 *   -ENOSYS    this architecture is not supported
 */
int adopt_syscall(int pid, long nr, const unsigned long args[6], int timeout_ms,
                  int filter, long *result, struct adopt_error *error);

/* Has process `pid` begin a process that shares its memory and nothing else, and only waits; see
 * adopt_keeper.c. `page` is the address of 4096 bytes of that memory, zeros, readable and writable,
 * that are for this alone. `name` has at most 15 letters. `until_s` is when the new process ends by
 * itself, in seconds of CLOCK_BOOTTIME. Returns what adopt_syscall does; *result is the number of
 * the new process as `pid` sees it, or -errno. */
int adopt_keeper(int pid, unsigned long page, const char *name, int64_t until_s, int timeout_ms,
                 long *result, struct adopt_error *error);
/* Has it end later. It notices within a minute. Returns 0 or -errno. */
int adopt_keeper_until(int pid, unsigned long page, int64_t until_s);

/* Duplicates descriptor `fd` of process `pid` into this one, close-on-exec. Returns the new
 * descriptor or -errno. */
int adopt_getfd(int pid, int fd);

#ifdef ADOPT_TEST
/* For tests only: die by SIGKILL just before (die_when 0) or after (1) the die_at-th ptrace call,
 * counted from 1; take only the thread named. 0 disables either. */
extern int adopt_test_tid, adopt_test_die_at, adopt_test_die_when, adopt_test_calls;
#endif

#endif
