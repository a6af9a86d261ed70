/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A cooperating VMM with one real KVM vCPU, for the tests: guest RAM that is accessed by KVM from
 * kernel mode, and a device state that is a CPU's.
 *
 * The guest is 32-bit protected-mode code without paging that walks its RAM for ever.  Each page
 * holds its address xor its version in four words; the guest checks them, writes the next version
 * and reports wrong pages and finished sweeps by port I/O.  The rest of each page is filled once,
 * from here.  It needs no more of KVM than machines without hardware virtualization emulate.
 *
 * Beside the protocol: `verify` checks all of guest RAM, `progress` tells sweeps, page and bad.
 */
#include "../../examples/vmm_protocol.h"

#include <getopt.h>
#include <linux/kvm.h>

#define PAGE 4096
#define CODE 0x1000       /* the code's page; below it nothing */
#define FIRST 0x100000    /* the first page that the guest walks */
#define PORT_BAD 0x80     /* out: the address of a page that is wrong */
#define PORT_SWEEP 0x84   /* out: the version that all pages have now */
#define MAGIC UINT64_C(0x31757063766b) /* "kvcpu1" */

/* Offsets of the words that the guest checks and writes, the last one at the end of the page. */
static const uint32_t word_at[] = {0, 1364, 2728, 4092};

/*
 *  edi page, ebx version being written, esi end of RAM, ecx the version before:
 *
 *  sweep:  mov edi, FIRST
 *          mov ecx, ebx ; dec ecx
 *  page:   mov eax, edi ; xor eax, ecx
 *          cmp [edi], eax ; jne bad         (and at the three other offsets)
 *  write:  mov eax, edi ; xor eax, ebx
 *          mov [edi], eax                   (and at the three other offsets)
 *          add edi, PAGE ; cmp edi, esi ; jb page
 *          mov eax, ebx ; out PORT_SWEEP, eax
 *          inc ebx ; jmp sweep
 *  bad:    mov eax, edi ; out PORT_BAD, eax ; jmp write
 */
static const unsigned char code[] = {
    0xbf, 0x00, 0x00, 0x10, 0x00,             /* 00 sweep: mov edi, 0x100000 */
    0x89, 0xd9, 0x49,                         /* 05 mov ecx, ebx; dec ecx */
    0x89, 0xf8, 0x31, 0xc8,                   /* 08 page: mov eax, edi; xor eax, ecx */
    0x39, 0x07, 0x75, 0x42,                   /* 0c cmp [edi], eax; jne bad */
    0x39, 0x87, 0x54, 0x05, 0x00, 0x00, 0x75, 0x3a, /* 10 cmp [edi+1364], eax; jne bad */
    0x39, 0x87, 0xa8, 0x0a, 0x00, 0x00, 0x75, 0x32, /* 18 cmp [edi+2728], eax; jne bad */
    0x39, 0x87, 0xfc, 0x0f, 0x00, 0x00, 0x75, 0x2a, /* 20 cmp [edi+4092], eax; jne bad */
    0x89, 0xf8, 0x31, 0xd8,                   /* 28 write: mov eax, edi; xor eax, ebx */
    0x89, 0x07,                               /* 2c mov [edi], eax */
    0x89, 0x87, 0x54, 0x05, 0x00, 0x00,       /* 2e mov [edi+1364], eax */
    0x89, 0x87, 0xa8, 0x0a, 0x00, 0x00,       /* 34 mov [edi+2728], eax */
    0x89, 0x87, 0xfc, 0x0f, 0x00, 0x00,       /* 3a mov [edi+4092], eax */
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00,       /* 40 add edi, 4096 */
    0x39, 0xf7, 0x72, 0xbe,                   /* 46 cmp edi, esi; jb page */
    0x89, 0xd8, 0xe7, 0x84,                   /* 4a mov eax, ebx; out 0x84, eax */
    0x43, 0xeb, 0xaf,                         /* 4e inc ebx; jmp sweep */
    0x90,                                     /* 51 */
    0x89, 0xf8, 0xe7, 0x80,                   /* 52 bad: mov eax, edi; out 0x80, eax */
    0xeb, 0xd0,                               /* 56 jmp write */
};

/* What goes to the destination. */
struct device_state {
    uint64_t magic, memory;
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_fpu fpu;
    struct kvm_debugregs debugregs;
    struct kvm_vcpu_events events;
    struct kvm_mp_state mp;
    uint64_t sweeps, bad;
    uint64_t end; /* MAGIC again: nothing was cut off */
};

static struct {
    int vcpu;
    struct kvm_run *run;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    _Atomic uint64_t holds;
    bool parked;
    _Atomic uint64_t sweeps, bad;
} guest = {.lock = PTHREAD_MUTEX_INITIALIZER};

static struct vmm_region region = {.name = "ram0", .size = 4 << 20, .page = PAGE, .fd = -1};
static struct vmm vmm = {.name = "kvm-test", VMM_INIT};

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("kvm_vmm: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    _exit(2);
}

/* --- the vCPU ----------------------------------------------------------------------------- */

static void kick(int signal_number)
{
    (void)signal_number;
    guest.run->immediate_exit = 1; /* also when the signal came just before KVM_RUN */
}

static void park(void)
{
    pthread_mutex_lock(&guest.lock);
    guest.parked = true;
    pthread_cond_broadcast(&guest.changed);
    while (guest.holds)
        pthread_cond_wait(&guest.changed, &guest.lock);
    guest.parked = false;
    guest.run->immediate_exit = 0;
    pthread_mutex_unlock(&guest.lock);
}

static void handle_output(void)
{
    const struct kvm_run *run = guest.run;
    uint32_t value;
    memcpy(&value, (const char *)run + run->io.data_offset, sizeof value);
    if (run->io.port == PORT_SWEEP)
        guest.sweeps = value;
    else if (run->io.port == PORT_BAD && guest.bad++ < 10)
        fprintf(stderr, "kvm_vmm: the guest found page 0x%x wrong\n", value);
}

static void *vcpu_thread(void *argument)
{
    (void)argument;
    if (guest.holds)
        park();
    for (;;) {
        /* Parked only on EINTR: an exit by `out` is finished by the next KVM_RUN, until then the
         * registers are not those to save. */
        if (!ioctl(guest.vcpu, KVM_RUN, 0)) {
            if (guest.run->exit_reason != KVM_EXIT_IO)
                fail("the vCPU stopped with exit reason %u", guest.run->exit_reason);
            handle_output();
        } else if (errno != EINTR && errno != EAGAIN) {
            fail("running the vCPU failed: %m");
        } else if (guest.holds) {
            park();
        } else {
            guest.run->immediate_exit = 0;
        }
    }
    return NULL;
}

static void let_go(void)
{
    pthread_mutex_lock(&guest.lock);
    guest.holds--;
    pthread_cond_broadcast(&guest.changed);
    pthread_mutex_unlock(&guest.lock);
}

static bool hold(unsigned seconds)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += seconds;
    int late = 0;
    pthread_mutex_lock(&guest.lock);
    guest.holds++;
    pthread_kill(guest.thread, SIGUSR1);
    while (!guest.parked && !late) {
        if (seconds)
            late = pthread_cond_timedwait(&guest.changed, &guest.lock, &until);
        else
            pthread_cond_wait(&guest.changed, &guest.lock);
    }
    bool held = guest.parked;
    pthread_mutex_unlock(&guest.lock);
    if (!held)
        let_go();
    return held;
}

static void set_up_vcpu(void)
{
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    int vm = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0);
    if (vm < 0)
        fail("making a VM on /dev/kvm failed: %m");
    struct kvm_userspace_memory_region slot = {.memory_size = region.size,
                                               .userspace_addr = (uintptr_t)region.address};
    if (ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000) ||
        ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot))
        fail("giving the VM its RAM failed: %m");
    guest.vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (guest.vcpu < 0 || size < 0)
        fail("making the vCPU failed: %m");
    guest.run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, guest.vcpu, 0);
    if (guest.run == MAP_FAILED)
        fail("mapping the vCPU's page failed: %m");
}

static void boot_vcpu(void)
{
    struct kvm_sregs sregs;
    if (ioctl(guest.vcpu, KVM_GET_SREGS, &sregs))
        fail("reading the vCPU's registers failed: %m");
    struct kvm_segment flat = {
        .limit = 0xffffffff, .selector = 8, .type = 11, .present = 1, .db = 1, .s = 1, .g = 1};
    sregs.cs = flat;
    flat.selector = 16;
    flat.type = 3;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
    sregs.cr0 |= 1;
    struct kvm_regs regs = {.rip = CODE, .rflags = 2, .rbx = 1, .rsi = region.size};
    if (ioctl(guest.vcpu, KVM_SET_SREGS, &sregs) || ioctl(guest.vcpu, KVM_SET_REGS, &regs))
        fail("setting the vCPU's registers failed: %m");
}

/* --- guest RAM ---------------------------------------------------------------------------- */

static uint32_t filling(uint32_t address, uint32_t i)
{
    return address ^ (i + 1) * UINT32_C(0x9e3779b1);
}

static bool is_checked_word(uint32_t offset)
{
    for (size_t i = 0; i < sizeof word_at / sizeof *word_at; i++)
        if (offset == word_at[i])
            return true;
    return false;
}

static void fill_memory(void)
{
    memcpy(region.address + CODE, code, sizeof code);
    for (uint32_t address = FIRST; address < region.size; address += PAGE) {
        uint32_t *word = (uint32_t *)(region.address + address);
        for (uint32_t i = 0; i < PAGE / 4; i++)
            word[i] = is_checked_word(i * 4) ? address : filling(address, i);
    }
}

/* Of one page: the checked words have version `before` or `after`, everything else its filling. */
static bool page_is(uint32_t address, uint32_t before, uint32_t after)
{
    const uint32_t *word = (const uint32_t *)(region.address + address);
    bool fine = true;
    for (uint32_t i = 0; i < PAGE / 4; i++)
        if (is_checked_word(i * 4))
            fine &= word[i] == (address ^ before) || word[i] == (address ^ after);
        else
            fine &= word[i] == filling(address, i);
    return fine;
}

static uint64_t count_bad_pages(const struct kvm_regs *regs)
{
    uint64_t bad = memcmp(region.address + CODE, code, sizeof code) != 0;
    uint32_t next = (uint32_t)regs->rdi, version = (uint32_t)regs->rbx;
    /* After `inc ebx` the version is one ahead of a sweep that has not begun: edi is still the
     * end of RAM. */
    if (next == region.size && (regs->rip == CODE + 0x4f || regs->rip == CODE))
        version--;
    for (uint32_t address = FIRST; address < region.size; address += PAGE) {
        if (address < next)
            bad += !page_is(address, version, version);
        else if (address == next)
            bad += !page_is(address, version - 1, version);
        else
            bad += !page_is(address, version - 1, version - 1);
    }
    return bad;
}

/* --- what the protocol asks --------------------------------------------------------------- */

static const char *guest_stop(void)
{
    return hold(5) ? NULL : "the vCPU waits for a missing page, stop when it has come";
}

static const char *guest_run(void)
{
    let_go();
    return NULL;
}

static const char *guest_save(int fd, size_t *bytes)
{
    struct device_state state = {.magic = MAGIC,
                                 .memory = region.size,
                                 .sweeps = guest.sweeps,
                                 .bad = guest.bad,
                                 .end = MAGIC};
    if (ioctl(guest.vcpu, KVM_GET_REGS, &state.regs) ||
        ioctl(guest.vcpu, KVM_GET_SREGS, &state.sregs) ||
        ioctl(guest.vcpu, KVM_GET_FPU, &state.fpu) ||
        ioctl(guest.vcpu, KVM_GET_DEBUGREGS, &state.debugregs) ||
        ioctl(guest.vcpu, KVM_GET_VCPU_EVENTS, &state.events) ||
        ioctl(guest.vcpu, KVM_GET_MP_STATE, &state.mp))
        return "KVM did not give the vCPU's state";
    while (*bytes < sizeof state) {
        ssize_t done = write(fd, (char *)&state + *bytes, sizeof state - *bytes);
        if (done < 0 && errno != EINTR)
            return "the device state could not be written, its reader has gone";
        *bytes += done > 0 ? (size_t)done : 0;
    }
    return NULL;
}

static const char *guest_load(int fd, size_t *bytes)
{
    struct device_state state = {0};
    char more;
    ssize_t got = 1;
    while (*bytes < sizeof state && got) {
        got = read(fd, (char *)&state + *bytes, sizeof state - *bytes);
        if (got < 0 && errno != EINTR)
            return "the device state could not be read";
        *bytes += got > 0 ? (size_t)got : 0;
    }
    if (*bytes < sizeof state || state.magic != MAGIC || state.end != MAGIC ||
        read(fd, &more, 1) != 0)
        return "this is not a whole device state of this VMM";
    if (state.memory != region.size)
        return "the device state is of a guest with other --memory";
    if (ioctl(guest.vcpu, KVM_SET_SREGS, &state.sregs) ||
        ioctl(guest.vcpu, KVM_SET_REGS, &state.regs) ||
        ioctl(guest.vcpu, KVM_SET_FPU, &state.fpu) ||
        ioctl(guest.vcpu, KVM_SET_DEBUGREGS, &state.debugregs) ||
        ioctl(guest.vcpu, KVM_SET_VCPU_EVENTS, &state.events) ||
        ioctl(guest.vcpu, KVM_SET_MP_STATE, &state.mp))
        return "KVM did not take the vCPU's state";
    guest.sweeps = state.sweeps;
    guest.bad = state.bad;
    return NULL;
}

static bool extension(struct vmm_client *client, int count, char **words)
{
    bool verify = count && !strcmp(words[0], "verify");
    if (!verify && (!count || strcmp(words[0], "progress")))
        return false;
    if (vmm.state == VMM_INCOMING) {
        vmm_reply(client, -1, "error no device state has been loaded");
        return true;
    }
    if (!verify) {
        vmm_reply(client, -1, "ok sweeps=%" PRIu64 " bad=%" PRIu64, guest.sweeps, guest.bad);
        return true;
    }
    struct kvm_regs regs;
    hold(0);
    if (ioctl(guest.vcpu, KVM_GET_REGS, &regs))
        vmm_reply(client, -1, "error reading the vCPU's registers failed: %m");
    else
        vmm_reply(client, -1, "ok pages=%zu bad=%" PRIu64, (region.size - FIRST) / PAGE,
                  count_bad_pages(&regs) + guest.bad);
    let_go();
    return true;
}

/* --- starting ----------------------------------------------------------------------------- */

static const char usage[] =
    "usage: kvm_vmm --socket PATH [--memory MiB] [--backing memfd|anonymous] [--incoming]\n";

int main(int argc, char **argv)
{
    bool incoming = false, anonymous = false;
    static const struct option options[] = {{"socket", required_argument, NULL, 's'},
                                            {"memory", required_argument, NULL, 'm'},
                                            {"backing", required_argument, NULL, 'b'},
                                            {"incoming", no_argument, NULL, 'i'},
                                            {0}};
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (option) {
        case 's': vmm.socket = optarg; break;
        case 'm': region.size = strtoul(optarg, NULL, 10) << 20; break;
        case 'b': anonymous = !strcmp(optarg, "anonymous"); break;
        case 'i': incoming = true; break;
        default: fputs(usage, stderr); return 2;
        }
    }
    if (!vmm.socket || optind < argc || region.size < 2 << 20 || region.size > 1 << 30) {
        fputs(usage, stderr);
        return 2;
    }
    int listener = vmm_listen(vmm.socket);
    if (listener < 0)
        fail("listening on %s failed: %m", vmm.socket);
    if (!anonymous) {
        region.fd = memfd_create("guest-ram", MFD_CLOEXEC);
        if (region.fd < 0 || ftruncate(region.fd, (off_t)region.size))
            fail("making guest RAM failed: %m");
    }
    region.address = mmap(NULL, region.size, PROT_READ | PROT_WRITE,
                          anonymous ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, region.fd, 0);
    if (region.address == MAP_FAILED)
        fail("mapping guest RAM failed: %m");
    set_up_vcpu();
    if (!incoming) {
        fill_memory();
        boot_vcpu();
    }
    vmm.regions = &region;
    vmm.region_count = 1;
    vmm.fact_count = 1;
    strcpy(vmm.facts[0].key, "cpu");
    strcpy(vmm.facts[0].value, "kvm x86 32-bit");
    vmm.stop = guest_stop;
    vmm.run = guest_run;
    vmm.save = guest_save;
    vmm.load = guest_load;
    vmm.extension = extension;
    vmm.state = incoming ? VMM_INCOMING : VMM_RUNNING;
    guest.holds = incoming;
    sigaction(SIGUSR1, &(struct sigaction){.sa_handler = kick}, NULL);
    pthread_cond_init(&guest.changed, NULL);
    if (pthread_create(&guest.thread, NULL, vcpu_thread, NULL))
        fail("starting the vCPU's thread failed: %m");
    printf("{\"event\":\"listening\",\"socket\":\"%s\"}\n", vmm.socket);
    fflush(stdout);
    vmm_serve(&vmm, listener);
}
