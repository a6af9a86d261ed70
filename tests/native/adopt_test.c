/* SPDX-License-Identifier: Apache-2.0
 *
 * A command line around adopt.c for its tests; each result is one JSON object on a line.
 *
 *   adopt_test [OPTION]... PID call NR [ARG]...      one system call
 *   adopt_test [OPTION]... PID cycle COUNT TID...    userfaultfd, duplicate, UFFDIO_API, close;
 *                                                    COUNT times, each on the next thread
 *   adopt_test [OPTION]... PID keep PAGE UNTIL       a keeper
 *   adopt_test PID hold                              be its tracer until killed
 *
 * Options: --tid TID, --die-before N, --die-after N (ptrace calls, from 1), --timeout MS,
 * --allow-seccomp, --nobody (give up root first)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "adopt.h"

static int timeout_ms = 2000, allow_seccomp;

static long long now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000ll + now.tv_nsec / 1000;
}

static void print_text(const char *text)
{
    putchar('"');
    for (; *text; text++)
        printf(strchr("\"\\", *text) ? "\\%c" : "%c", *text);
    putchar('"');
}

static int told(int code, long result, long long start, const struct adopt_error *error)
{
    printf("{\"code\":%d,\"result\":%ld,\"us\":%lld,\"ptraceCalls\":%d,\"error\":", code, result,
           now_us() - start, adopt_test_calls);
    print_text(error->text);
    printf("}\n");
    return code != 0;
}

static int call(int pid, long nr, int count, char **words)
{
    unsigned long args[6] = { 0 };
    struct adopt_error error = { "" };
    long long start = now_us();
    long result = 0;
    int code;

    for (int i = 0; i < count && i < 6; i++)
        args[i] = strtoul(words[i], NULL, 0);
    code = adopt_syscall(pid, nr, args, timeout_ms, allow_seccomp, &result, &error);
    return told(code, result, start, &error);
}

static int keep(int pid, char **words)
{
    struct adopt_error error = { "" };
    long long start = now_us();
    long result = 0;
    int code = adopt_keeper(pid, strtoul(words[0], NULL, 0), "a-keeper", atoll(words[1]),
                            timeout_ms, &result, &error);

    return told(code, result, start, &error);
}

static int cycle(int pid, int count, int tids, char **words)
{
    const unsigned long make[6] = { O_CLOEXEC | O_NONBLOCK };
    struct adopt_error error = { "" };
    long long start = now_us(), worst = 0;
    const char *what = "";
    int code = 0, i;

    for (i = 0; i < count && !code; i++) {
        struct uffdio_api api = { .api = UFFD_API };
        long long began = now_us();
        long fd = -1, closed = -1;

        adopt_test_tid = tids ? atoi(words[i % tids]) : 0;
        what = "userfaultfd";
        code = adopt_syscall(pid, SYS_userfaultfd, make, timeout_ms, allow_seccomp, &fd, &error);
        if (!code && fd < 0)
            code = (int)fd;
        if (code)
            break;
        what = "adopt_getfd";
        int copy = adopt_getfd(pid, (int)fd);
        if (copy < 0) {
            code = copy;
            break;
        }
        what = "UFFDIO_API";
        if (ioctl(copy, UFFDIO_API, &api) || !(fcntl(copy, F_GETFD) & FD_CLOEXEC))
            code = -errno - 1000;
        close(copy);
        const unsigned long shut[6] = { (unsigned long)fd };
        what = code ? what : "close";
        if (!code)
            code = adopt_syscall(pid, SYS_close, shut, timeout_ms, allow_seccomp, &closed, &error);
        if (!code && closed)
            code = (int)closed;
        if (now_us() - began > worst)
            worst = now_us() - began;
    }
    printf("{\"code\":%d,\"done\":%d,\"what\":\"%s\",\"tid\":%d,\"meanUs\":%lld,\"maxUs\":%lld,"
           "\"error\":", code, i, code ? what : "", adopt_test_tid,
           i ? (now_us() - start) / i : 0, worst);
    print_text(error.text);
    printf("}\n");
    return code != 0;
}

static int hold(int pid)
{
    int status;

    if (ptrace(PTRACE_SEIZE, pid, 0, 0) || ptrace(PTRACE_INTERRUPT, pid, 0, 0) ||
        waitpid(pid, &status, __WALL) != pid)
        return 1;
    printf("{\"holding\":%d}\n", pid);
    fflush(stdout);
    for (;;)
        pause();
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        { "tid", 1, 0, 't' },     { "die-before", 1, 0, 'b' },    { "die-after", 1, 0, 'a' },
        { "timeout", 1, 0, 'm' }, { "allow-seccomp", 0, 0, 's' }, { "nobody", 0, 0, 'n' },
        { 0 },
    };
    int option;

    prctl(PR_SET_PDEATHSIG, 9);
    while ((option = getopt_long(argc, argv, "+", options, NULL)) != -1) {
        switch (option) {
        case 't': adopt_test_tid = atoi(optarg); break;
        case 'b': adopt_test_die_at = atoi(optarg); break;
        case 'a': adopt_test_die_at = atoi(optarg), adopt_test_die_when = 1; break;
        case 'm': timeout_ms = atoi(optarg); break;
        case 's': allow_seccomp = 1; break;
        case 'n':
            if (setgid(65534) || setuid(65534))
                return 2;
            break;
        default: return 2;
        }
    }
    argc -= optind, argv += optind;
    if (argc >= 3 && !strcmp(argv[1], "call"))
        return call(atoi(argv[0]), atol(argv[2]), argc - 3, argv + 3);
    if (argc >= 3 && !strcmp(argv[1], "cycle"))
        return cycle(atoi(argv[0]), atoi(argv[2]), argc - 3, argv + 3);
    if (argc == 4 && !strcmp(argv[1], "keep"))
        return keep(atoi(argv[0]), argv + 2);
    if (argc == 2 && !strcmp(argv[1], "hold"))
        return hold(atoi(argv[0]));
    fprintf(stderr, "usage: adopt_test [OPTION]... PID call|cycle|keep|hold ...\n");
    return 2;
}
