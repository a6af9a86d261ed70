/* SPDX-License-Identifier: Apache-2.0
 *
 * What /proc says of a process that is to be adopted, and the sentences for what stands in the way.
 * Reads only; owns nothing between two calls.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "adopt_parts.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

__attribute__((format(printf, 3, 4)))
int fail(struct adopt_error *error, int code, const char *format, ...)
{
    va_list list;

    va_start(list, format);
    vsnprintf(error->text, sizeof error->text, format, list);
    va_end(list);
    return code;
}

#if defined(__x86_64__)

__attribute__((format(printf, 3, 4)))
ssize_t read_text(char *text, size_t size, const char *format, ...)
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

int read_status(pid_t pid, pid_t tid, struct status *status)
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

int fail_traced(struct adopt_error *error, pid_t pid, pid_t tracer)
{
    char name[64] = "?";

    read_text(name, sizeof name, "/proc/%d/comm", tracer);
    name[strcspn(name, "\n")] = 0;
    return fail(error, -EBUSY,
                "cannot adopt process %d: process %d (%s) is tracing it already, and there can be "
                "only one tracer; end that one and try again", pid, tracer, name);
}

int fail_permission(struct adopt_error *error, pid_t pid)
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

int fail_gone(struct adopt_error *error, pid_t pid)
{
    return fail(error, -ESRCH, "cannot adopt process %d: it ended meanwhile; see why in its own log",
                pid);
}

static FILE *open_maps(pid_t pid)
{
    char path[32];
    FILE *maps;

    snprintf(path, sizeof path, "/proc/%d/maps", pid);
    maps = fopen(path, "re");
    if (maps)
        setvbuf(maps, NULL, _IOFBF, 65536); /* a thread is stopped while this reads */
    return maps;
}

int find_code(pid_t pid, int mem, struct arch_code *code)
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

int is_stack(pid_t pid, unsigned long start, unsigned long end)
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

#endif
