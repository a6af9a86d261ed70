/* SPDX-License-Identifier: Apache-2.0
 *
 * Adoption: one system call run inside a process that does not cooperate. adopt.c says how.
 */
#ifndef POSTCOPYD_ADOPT_H
#define POSTCOPYD_ADOPT_H

/* One sentence: what was being done, to what, why it failed, what to do now. */
struct adopt_error {
    char text[256];
};

/* Runs system call `nr` with `args` once in some thread of process `pid`.
 *
 * Returns 0 and in *result what the kernel returned there (-errno included), or -errno and a
 * sentence in error->text. `timeout_ms` limits the whole; only threads that do not stop take so
 * long. `allow_seccomp` says that the process's seccomp filter is known to let the call pass.
 *
 *   -EINVAL    pid is not another process, or is one thread of a process
 *   -ESRCH     no such process, or it has ended, perhaps to a zombie
 *   -EPERM     the kernel or a security module forbids it
 *   -EBUSY     another process traces it; or no thread stopped in time; nothing was done
 *   -EACCES    it has a seccomp filter and allow_seccomp is 0, or the filter refused the call
 *   -ENOEXEC   not a process of this architecture
 *   -ENXIO     no usable system call instruction or stack in it
 *   -EINPROGRESS  the call was started and did not finish in time (the process is frozen): it will
 *              still be made, and the thread then goes on by itself; look in /proc/PID/fd
 *   -ENOSYS    this architecture is not supported
 */
int adopt_syscall(int pid, long nr, const unsigned long args[6], int timeout_ms,
                  int allow_seccomp, long *result, struct adopt_error *error);

/* Duplicates descriptor `fd` of process `pid` into this one, close-on-exec. Returns the new
 * descriptor or -errno. */
int adopt_getfd(int pid, int fd);

#ifdef ADOPT_TEST
/* For tests only: die by SIGKILL just before (die_when 0) or after (1) the die_at-th ptrace call,
 * counted from 1; take only the thread named. 0 disables either. */
extern int adopt_test_tid, adopt_test_die_at, adopt_test_die_when, adopt_test_calls;
#endif

#endif
