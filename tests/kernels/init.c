/* SPDX-License-Identifier: Apache-2.0 */
/* Process 1 of a machine that boots one kernel to run tests in it: loads /modules/NN, makes the disk
 * the root and runs the program that the kernel's command line gives it, as its arguments. That
 * speaks by the second serial line, and so does this, last: "exit STATUS". Then the power is off. */
#include <dirent.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void must(int failed, const char *what) {
  if (failed) {
    printf("init: %s: %m\n", what);
    reboot(RB_POWER_OFF);
  }
}

static void load_modules(void) {
  struct dirent **found;
  int count = scandir("/modules", &found, NULL, alphasort); /* in their order */
  for (int i = 0; i < count; i++) {
    char path[300];
    snprintf(path, sizeof path, "/modules/%s", found[i]->d_name);
    int fd = found[i]->d_name[0] == '.' ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0 && syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST)
      printf("init: loading %s: %m\n", path);
    if (fd >= 0)
      close(fd);
  }
}

static void new_root(void) {
  static const struct {
    const char *kind, *at, *options;
  } mounts[] = {
      {"devtmpfs", "/new/dev", ""}, {"proc", "/new/proc", ""},     {"sysfs", "/new/sys", ""},
      {"tmpfs", "/new/tmp", ""},    {"tmpfs", "/new/run", ""},     {"tmpfs", "/new/dev/shm", ""},
      {"cgroup2", "/new/sys/fs/cgroup", ""},
  };
  mkdir("/new", 0755);
  must(mount("/dev/vda", "/new", "ext4", MS_RDONLY, ""), "mounting the disk");
  for (unsigned i = 0; i < sizeof mounts / sizeof *mounts; i++) {
    mkdir(mounts[i].at, 0755); /* in /dev only: the others are there */
    must(mount(mounts[i].kind, mounts[i].at, mounts[i].kind, 0, mounts[i].options), mounts[i].at);
  }
  mkdir("/new/run/lock", 0755);
  must(chroot("/new") || chdir("/"), "changing the root");
}

static void loopback_up(void) {
  struct ifreq lo = {.ifr_name = "lo", .ifr_flags = IFF_UP};
  int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  must(fd < 0 || ioctl(fd, SIOCSIFFLAGS, &lo) < 0, "loopback");
  close(fd);
}

/* Waits for the child, and for whoever has lost its parent; the child's status. */
static int until(pid_t child) {
  int status;
  for (;;) {
    pid_t ended = wait(&status);
    if (ended == child)
      return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    must(ended < 0 && errno != EINTR, "wait");
  }
}

int main(int argc, char **argv) {
  (void)argc;
  setvbuf(stdout, NULL, _IONBF, 0);
  mount("devtmpfs", "/dev", "devtmpfs", 0, "");
  load_modules();
  new_root();
  loopback_up();
  pid_t child = fork();
  if (child == 0) {
    int results = open("/dev/ttyS1", O_WRONLY | O_NOCTTY);
    if (results >= 0)
      dup2(results, 3);
    execv(argv[1], argv + 1);
    printf("init: %s: %m\n", argv[1]);
    _exit(127);
  }
  int status = until(child);
  FILE *results = fopen("/dev/ttyS1", "w");
  if (results) {
    fprintf(results, "exit %d\n", status);
    fclose(results);
  }
  sync();
  reboot(RB_POWER_OFF);
}
