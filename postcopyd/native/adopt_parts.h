/* SPDX-License-Identifier: Apache-2.0
 *
 * What the files of adoption share. adopt.c chooses a thread of the process and explains the whole,
 * adopt_thread.c has that thread make the call, adopt_proc.c reads what /proc says of both.
 * adopt_keeper.c makes a process that shares the memory.
 */
#ifndef POSTCOPYD_ADOPT_PARTS_H
#define POSTCOPYD_ADOPT_PARTS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

#include "adopt.h"

/* Formats a sentence for the caller; returns `code`. */
__attribute__((format(printf, 3, 4)))
int fail(struct adopt_error *error, int code, const char *format, ...);

#if defined(__x86_64__) /* another architecture needs its own header like this */
#include "adopt_x86_64.h"

static inline void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

static inline void close_file(FILE **file)
{
    if (*file)
        fclose(*file);
}

static inline void free_pointer(void *pointer)
{
    free(*(void **)pointer);
}

#define CLEAN(function) __attribute__((cleanup(function)))

/* ---- what /proc says ---- */

/* Reads the beginning of the file as a string; returns its length or -errno. */
__attribute__((format(printf, 3, 4)))
ssize_t read_text(char *text, size_t size, const char *format, ...);

struct status {
    pid_t tgid, tracer;
    char state;
    int seccomp, shadow_stack;
    uint64_t pending; /* signals, of this thread only */
};

/* Returns 0 or -errno. */
int read_status(pid_t pid, pid_t tid, struct status *status);
/* Finds the instructions that adoption needs, in text that is mapped and not writable. Looks in the
 * C library first: it has them and will not be unmapped. Returns 0 or -errno. */
int find_code(pid_t pid, int mem, struct arch_code *code);
/* Whether the thread may write [start, end), just below its stack pointer. /proc/PID/mem would
 * write into a guard page too. The main thread's stack grows when written to, down to its limit. */
int is_stack(pid_t pid, unsigned long start, unsigned long end);

int fail_traced(struct adopt_error *error, pid_t pid, pid_t tracer);
/* The kernel says EPERM for many reasons; this finds the likeliest. */
int fail_permission(struct adopt_error *error, pid_t pid);
int fail_gone(struct adopt_error *error, pid_t pid);

/* ---- one thread ---- */

/* A call to be made, and what all tries at it share. */
struct job {
    pid_t pid;
    long nr;
    const unsigned long *args;
    int suspend; /* a seccomp filter, for this call */
    int mem;     /* /proc/PID/mem */
    struct arch_code code;
    int64_t deadline; /* CLOCK_MONOTONIC, ns */
    long result;
    struct adopt_error *error;
};

struct try {
    struct job *job;
    pid_t tid;
    int filtered;    /* the call may end in SIGSYS: a seccomp filter, or it cannot be known */
    int64_t stop_by; /* when to give up waiting for it to stop */
    int code;
};
enum { TRY_ANOTHER = 1 };

/* Tries one thread, by a new tracer thread of this process, and waits for the end of the try.
 * Returns 0 with job->result, -errno, or TRY_ANOTHER; with a sentence. */
int run_try(struct try *try);
int64_t now_ns(void);

#endif
#endif
