/* SPDX-License-Identifier: Apache-2.0
 *
 * What adoption must know of x86-64: registers, the signal frame by which a thread goes on, the
 * instructions to look for, and what an interrupted system call leaves behind. Of the architecture
 * adopt.c uses only these names; support for another one is a header of the same shape.
 */
#ifndef POSTCOPYD_ADOPT_X86_64_H
#define POSTCOPYD_ADOPT_X86_64_H

#include <cpuid.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/user.h>

#define ARCH_ELF_CLASS 2      /* ELFCLASS64; x32 programs are class 32 and refused with i386 */
#define ARCH_ELF_MACHINE 62   /* EM_X86_64 */
#define ARCH_RED_ZONE 128     /* bytes below rsp that belong to the function (psABI 3.2.2) */
#define ARCH_XSTATE_SET 0x202 /* NT_X86_XSTATE */
#define ARCH_XSTATE_MAX 16384 /* 11,008 bytes with AMX, 2,696 with AVX-512 */

typedef struct user_regs_struct arch_regs;

/* Addresses of existing instructions in the target. */
struct arch_code {
    unsigned long call; /* syscall; ret */
    unsigned long home; /* mov $15,%eax; syscall: rt_sigreturn */
};
#define ARCH_CODE_MAX 9 /* bytes of the longest pattern */
#define ARCH_CODE_NAME "\"syscall; ret\" and \"mov $15,%rax; syscall\" (rt_sigreturn)"

static inline void arch_find_code(const unsigned char *text, size_t len, unsigned long base,
                                  struct arch_code *code)
{
    static const struct {
        unsigned char bytes[ARCH_CODE_MAX];
        size_t len, field;
    } wanted[] = {
        { "\x0f\x05\xc3", 3, offsetof(struct arch_code, call) },
        { "\x48\xc7\xc0\x0f\0\0\0\x0f\x05", 9, offsetof(struct arch_code, home) },
        { "\xb8\x0f\0\0\0\x0f\x05", 7, offsetof(struct arch_code, home) },
    };

    for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++) {
        unsigned long *address = (unsigned long *)((char *)code + wanted[i].field);
        const unsigned char *at;

        if (!*address && (at = memmem(text, len, wanted[i].bytes, wanted[i].len)))
            *address = base + (unsigned long)(at - text);
    }
}

static inline int arch_is_native(const arch_regs *regs)
{
    return regs->cs == 0x33; /* the 64-bit user code segment */
}

/* How well a thread that sleeps in system call `nr` bears being stopped; less is better. 0: the
 * kernel restarts the call exactly, with its remaining timeout. 1: it restarts it, mostly. 2: the
 * call returns EINTR, which arch_soften turns into a restart that waits its whole timeout again. 3:
 * the call is not known, or returns EINTR that must not be hidden (KVM_RUN, whose caller expects
 * it), or is restart_syscall (see arch_frame_of). */
static inline int arch_rank(long nr)
{
    switch (nr) {
    case SYS_futex:
    case SYS_poll:
    case SYS_ppoll:
    case SYS_select:
    case SYS_pselect6:
    case SYS_nanosleep:
    case SYS_clock_nanosleep:
    case SYS_pause:
        return 0;
    case SYS_read: /* a socket with SO_RCVTIMEO returns EINTR */
    case SYS_recvmsg:
    case SYS_recvfrom:
    case SYS_accept:
    case SYS_accept4:
    case SYS_wait4:
    case SYS_waitid:
        return 1;
    case SYS_epoll_wait:
    case SYS_epoll_pwait:
    case SYS_epoll_pwait2:
    case SYS_rt_sigtimedwait:
    case SYS_semop:
    case SYS_semtimedop:
        return 2;
    default:
        return 3;
    }
}

enum { /* kernel-internal results of an interrupted call, include/linux/errno.h */
    ARCH_ERESTARTSYS = 512,
    ARCH_ERESTARTNOINTR = 513,
    ARCH_ERESTARTNOHAND = 514,
    ARCH_ERESTART_RESTARTBLOCK = 516,
};

/* signal(7), "Interruption of system calls by stop signals": these calls return EINTR although no
 * handler ran. If that is replaced by ERESTARTNOHAND the kernel still returns EINTR if one does. */
static inline void arch_soften(arch_regs *regs)
{
    if ((long)regs->orig_rax >= 0 && (long)regs->rax == -4 /* EINTR */ &&
        arch_rank((long)regs->orig_rax) == 2)
        regs->rax = (unsigned long)-ARCH_ERESTARTNOHAND;
}

/* The kernel's struct rt_sigframe, arch/x86/include/asm/sigframe.h, without the siginfo, which
 * rt_sigreturn does not read. */
struct arch_frame {
    uint64_t return_address;
    uint64_t flags, link;
    uint64_t altstack_sp;
    uint32_t altstack_flags, pad;
    uint64_t altstack_size;
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
    uint64_t rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, eflags;
    uint16_t cs, gs, fs, ss;
    uint64_t err, trapno, oldmask, cr2, fpstate, reserved[8];
    uint64_t sigmask;
};
_Static_assert(offsetof(struct arch_frame, sigmask) == 8 + 296, "layout of the kernel's ucontext");

#define ARCH_FRAME_MAX (sizeof(struct arch_frame) + ARCH_XSTATE_MAX + 256)

/* How much of the standard XSAVE layout these features fill. The regset may be longer (AMX that
 * this process has no permission for); but rt_sigreturn takes an area longer than the process may
 * have as x87 and SSE only, and AVX would be lost. */
static inline size_t arch_xstate_size(uint64_t features)
{
    size_t size = 512 + 64;

    for (unsigned i = 2; i < 63; i++) {
        unsigned len, offset, c, d;

        if ((features >> i & 1) && __get_cpuid_count(0xd, i, &len, &offset, &c, &d) &&
            offset + len > size)
            size = offset + len;
    }
    return size;
}

/* The registers, mask and place of extended state that rt_sigreturn is to restore.
 *
 * rt_sigreturn forgets a restart block. So the thread makes its interrupted call anew, and a
 * relative timeout of nanosleep, poll or futex begins again. A handler that runs before that runs
 * before the call, not in it, so it does not end pause() or select() with EINTR. A wait that had
 * been interrupted before is in restart_syscall, which returns EINTR without its restart block. All
 * this concerns only a thread whose tracer died. */
static inline struct arch_frame arch_frame_of(const arch_regs *regs, uint64_t mask,
                                              const struct arch_code *code, unsigned long xstate)
{
    struct arch_frame frame = {
        .return_address = code->home,
        .flags = 1 | 2 | 4, /* UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS */
        /* An invalid mode: the kernel ignores the failure and keeps the thread's own alternate
         * stack, which cannot be asked for from outside. */
        .altstack_flags = 4,
        .r8 = regs->r8, .r9 = regs->r9, .r10 = regs->r10, .r11 = regs->r11,
        .r12 = regs->r12, .r13 = regs->r13, .r14 = regs->r14, .r15 = regs->r15,
        .rdi = regs->rdi, .rsi = regs->rsi, .rbp = regs->rbp, .rbx = regs->rbx,
        .rdx = regs->rdx, .rax = regs->rax, .rcx = regs->rcx, .rsp = regs->rsp,
        .rip = regs->rip, .eflags = regs->eflags,
        .cs = (uint16_t)regs->cs, .gs = (uint16_t)regs->gs,
        .fs = (uint16_t)regs->fs, .ss = (uint16_t)regs->ss,
        .fpstate = xstate,
        .sigmask = mask,
    };

    if ((long)regs->orig_rax >= 0) {
        switch (-(long)regs->rax) {
        case ARCH_ERESTARTSYS:
        case ARCH_ERESTARTNOINTR:
        case ARCH_ERESTARTNOHAND:
        case ARCH_ERESTART_RESTARTBLOCK:
            frame.rax = regs->orig_rax;
            frame.rip = regs->rip - 2;
        }
    }
    return frame;
}

/* Lays out in `out` (ARCH_FRAME_MAX bytes, 64-aligned) what is to stand at *address in the target:
 * a frame that makes rt_sigreturn restore regs, xstate and mask. Returns its length, 0 if the
 * extended state makes no sense. */
static inline size_t arch_build_frame(const arch_regs *regs, const unsigned char *xstate,
                                      size_t xstate_len, uint64_t mask,
                                      const struct arch_code *code, unsigned char *out,
                                      unsigned long *address)
{
    const uint32_t magic1 = 0x46505853, magic2 = 0x46505845; /* FP_XSTATE_MAGIC1, 2 */
    uint64_t features;
    size_t size;

    if (xstate_len < 512 + 64 || xstate_len >= ARCH_XSTATE_MAX)
        return 0;
    memcpy(&features, xstate + 512, sizeof features); /* XSTATE_BV: what is not in it is initial */
    features |= 3;                                    /* x87 and SSE */
    size = arch_xstate_size(features);
    if (size > xstate_len)
        return 0;

    const unsigned long top = regs->rsp - ARCH_RED_ZONE;
    const unsigned long area = (top - size - sizeof magic2) & ~63ul;
    const unsigned long start = ((area - sizeof(struct arch_frame)) & ~15ul) - 8;
    const struct arch_frame frame = arch_frame_of(regs, mask, code, area);
    struct {
        uint32_t magic1, extended_size;
        uint64_t features;
        uint32_t size, padding[7];
    } software = { magic1, (uint32_t)(size + sizeof magic2), features, (uint32_t)size, { 0 } };

    memset(out, 0, area - start);
    memcpy(out, &frame, sizeof frame);
    memcpy(out + (area - start), xstate, size);
    memcpy(out + (area - start) + 464, &software, sizeof software); /* struct _fpx_sw_bytes */
    memcpy(out + (area - start) + size, &magic2, sizeof magic2);
    *address = start;
    return area - start + size + sizeof magic2;
}

/* A frame that makes rt_sigreturn go on with a system call, all signals blocked, and then with the
 * frame at `next`: with it at the address that the stack pointer has, a `ret` begins the call. */
static inline struct arch_frame arch_link(const struct arch_code *code, long nr,
                                          const unsigned long args[4], unsigned long next)
{
    return (struct arch_frame){
        .return_address = code->home,
        .flags = 2 | 4, /* UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS; no extended state: initial */
        .altstack_flags = 4,
        .rax = (uint64_t)nr,
        .rdi = args[0], .rsi = args[1], .rdx = args[2], .r10 = args[3],
        .rip = code->call,
        .rsp = next,
        .eflags = 0x202,
        .cs = 0x33, .ss = 0x2b,
        .sigmask = ~0ull,
    };
}

/* Where in such a frame the first argument of its call stands. */
#define ARCH_LINK_FIRST offsetof(struct arch_frame, rdi)

/* The registers of a thread that is about to make the call on top of its frame. */
static inline arch_regs arch_call_regs(const arch_regs *regs, unsigned long frame,
                                       const struct arch_code *code, long nr,
                                       const unsigned long args[6])
{
    arch_regs call = *regs;

    call.rax = (unsigned long)nr;
    call.orig_rax = (unsigned long)-1; /* there is no interrupted call to restart */
    call.rdi = args[0];
    call.rsi = args[1];
    call.rdx = args[2];
    call.r10 = args[3];
    call.r8 = args[4];
    call.r9 = args[5];
    call.rip = code->call;
    call.rsp = frame;
    return call;
}

static inline int arch_call_done(const arch_regs *now, const struct arch_code *code)
{
    return now->rip == code->call + 2;
}

static inline int arch_call_not_begun(const arch_regs *now, const struct arch_code *code)
{
    return now->rip == code->call;
}

static inline long arch_result(const arch_regs *now)
{
    return (long)now->rax;
}

static inline unsigned long arch_ip(const arch_regs *regs)
{
    return regs->rip;
}

static inline unsigned long arch_sp(const arch_regs *regs)
{
    return regs->rsp;
}

#endif
