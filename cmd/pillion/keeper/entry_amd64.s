// The keeper, where it begins: see doc.go. This is the ELF entry point of the
// program if it is linked with -E (see the Makefile), so it runs before the Go
// runtime is there. What is not to be kept goes on to the runtime's own entry at
// once. The keeper itself never starts the runtime: it only clones workers, waits
// for them, and passes signals on.
#include "textflag.h"

#define SYS_write		1
#define SYS_close		3
#define SYS_mmap		9
#define SYS_rt_sigprocmask	14
#define SYS_nanosleep		35
#define SYS_clone		56
#define SYS_wait4		61
#define SYS_kill		62
#define SYS_ftruncate		77
#define SYS_rt_sigtimedwait	128
#define SYS_prctl		157
#define SYS_getdents64		217
#define SYS_clock_gettime	228
#define SYS_exit_group		231
#define SYS_openat		257
#define SYS_getrandom		318
#define SYS_memfd_create	319

#define SIGTERM	15
#define SIGINT	2
#define SIGCHLD	17

// The fields of state; see entry.go.
#define state_linked	0
#define state_memory	8
#define state_page	16
#define state_signals	24
#define state_mask	32
#define state_status	40
#define state_time	48
#define state_listing	64
#define state_listed	72

// The first words of the page that keeper and workers share; see keeper.go.
#define page_ready	0
#define page_deaths	8
#define page_status	16
#define page_died	24

#define CALL1(nr, a) \
	MOVQ	a, DI; \
	MOVL	$nr, AX; \
	SYSCALL

// On entry, from SP on: argc, argv..., 0, envp..., 0, auxv. It stays in R12.
// R13 is the worker, R14 whether an end was asked for, R15 how many workers in a
// row have died before they were ready.
TEXT ·entry(SB),NOSPLIT|NOFRAME,$0
	MOVQ	SP, R12
	MOVQ	$1, ·state+state_linked(SB)
	MOVQ	0(R12), CX
	LEAQ	16(R12)(CX*8), BX
	MOVQ	$0x5f4e4f494c4c4950, R8		// PILLION_
	MOVQ	$0x313d52455045454b, R9		// KEEPER=1
environment:
	MOVQ	0(BX), AX
	ADDQ	$8, BX
	TESTQ	AX, AX
	JEQ	runtime
	CMPQ	R8, 0(AX)	// in bounds: behind the last string there are 8 zeroes
	JNE	environment
	CMPQ	R9, 8(AX)
	JNE	environment

	// It was executed as /proc/self/exe, which would be its name.
	MOVL	$15, DI				// PR_SET_NAME
	MOVQ	·memoryName(SB), SI
	MOVL	$SYS_prctl, AX
	SYSCALL
	// What workers leave to their successors: a memfd, of which the keeper sees
	// one page.
	MOVQ	·memoryName(SB), DI
	MOVL	$1, SI				// MFD_CLOEXEC
	MOVL	$SYS_memfd_create, AX
	SYSCALL
	TESTQ	AX, AX
	JLT	failed
	MOVQ	AX, ·state+state_memory(SB)
	MOVQ	AX, DI
	MOVL	$4096, SI
	MOVL	$SYS_ftruncate, AX
	SYSCALL
	TESTQ	AX, AX
	JLT	failed
	XORL	DI, DI
	MOVL	$4096, SI
	MOVL	$3, DX				// PROT_READ|PROT_WRITE
	MOVL	$1, R10				// MAP_SHARED
	MOVQ	·state+state_memory(SB), R8
	XORL	R9, R9
	MOVL	$SYS_mmap, AX
	SYSCALL
	CMPQ	AX, $-4095
	JCC	failed
	MOVQ	AX, ·state+state_page(SB)

	// Signals wait until they are asked for. Workers have what was before.
	MOVQ	$0x14a07, AX	// HUP INT QUIT USR1 USR2 TERM CHLD
	MOVQ	AX, ·state+state_signals(SB)
	XORL	DI, DI				// SIG_BLOCK
	LEAQ	·state+state_signals(SB), SI
	LEAQ	·state+state_mask(SB), DX
	MOVL	$8, R10
	MOVL	$SYS_rt_sigprocmask, AX
	SYSCALL
	XORL	R14, R14
	XORL	R15, R15

again:
	MOVQ	·state+state_page(SB), BX
	MOVQ	$0, page_ready(BX)
	// CLONE_FILES|SIGCHLD, and not CLONE_VM: memory of its own, and the same
	// table of descriptors.
	MOVL	$0x411, DI
	XORL	SI, SI
	XORL	DX, DX
	XORL	R10, R10
	XORL	R8, R8
	MOVL	$SYS_clone, AX
	SYSCALL
	TESTQ	AX, AX
	JEQ	worker
	JLT	crashed				// no memory, or no room for a process: as a death
	MOVQ	AX, R13

wait:
	LEAQ	·state+state_signals(SB), DI
	XORL	SI, SI
	XORL	DX, DX
	MOVL	$8, R10
	MOVL	$SYS_rt_sigtimedwait, AX
	SYSCALL
	TESTQ	AX, AX
	JLE	wait
	CMPQ	AX, $SIGCHLD
	JEQ	reap
	CMPQ	AX, $SIGTERM
	JEQ	ending
	CMPQ	AX, $SIGINT
	JNE	pass
ending:
	MOVL	$1, R14
pass:
	MOVQ	R13, DI
	MOVQ	AX, SI
	MOVL	$SYS_kill, AX
	SYSCALL
	JMP	wait

reap:
	MOVQ	$-1, DI
	LEAQ	·state+state_status(SB), SI
	MOVL	$1, DX				// WNOHANG
	XORL	R10, R10
	MOVL	$SYS_wait4, AX
	SYSCALL
	TESTQ	AX, AX
	JLE	wait
	CMPQ	AX, R13
	JNE	reap				// somebody else's orphan, if this is process 1

	// A worker that exits has its reasons, unless the code is that of Go's
	// panics and fatal errors.
	MOVL	·state+state_status(SB), AX
	MOVL	AX, CX
	ANDL	$0x7f, CX
	JNE	signalled
	SHRL	$8, AX
	ANDL	$0xff, AX
	CMPL	AX, $2
	JEQ	died
	CALL1(SYS_exit_group, AX)
signalled:
	LEAL	128(CX), AX
died:
	TESTQ	R14, R14			// it was to end anyway
	JEQ	crashed
	CALL1(SYS_exit_group, AX)

crashed:
	MOVQ	·state+state_page(SB), BX
	MOVL	$1, DI				// CLOCK_MONOTONIC
	LEAQ	page_died(BX), SI
	MOVL	$SYS_clock_gettime, AX
	SYSCALL
	INCQ	page_deaths(BX)
	MOVL	·state+state_status(SB), AX
	MOVQ	AX, page_status(BX)
	INCQ	R15
	// One that has served for long begins anew, and so does one that served and
	// was killed: what counts is that it may be the program's own fault.
	MOVQ	page_ready(BX), CX
	CMPQ	CX, $2
	JEQ	fresh
	CMPQ	CX, $1
	JNE	count
	CMPQ	AX, $9				// SIGKILL
	JNE	count
fresh:
	MOVL	$1, R15
count:
	CMPQ	R15, $10
	JEQ	giveup
	CMPQ	R15, $1
	JEQ	again				// the first successor comes at once
	MOVQ	R15, CX
	MOVQ	$2000000, AX
	SHLQ	CX, AX				// 8 ms, 16 ms ... 1 s
	MOVQ	$0, ·state+state_time(SB)
	CMPQ	AX, $1000000000
	JCS	nap
	MOVL	$999999999, AX
nap:
	MOVQ	AX, ·state+(state_time+8)(SB)
	LEAQ	·state+state_time(SB), DI
	XORL	SI, SI
	MOVL	$SYS_nanosleep, AX
	SYSCALL
	JMP	again

giveup:
	MOVQ	·lastWords(SB), SI
	MOVQ	·lastWords+8(SB), DX
	JMP	say
failed:
	MOVQ	·noKeeper(SB), SI
	MOVQ	·noKeeper+8(SB), DX
say:
	MOVL	$2, DI
	MOVL	$SYS_write, AX
	SYSCALL
	CALL1(SYS_exit_group, $1)

worker:
	MOVL	$2, DI				// SIG_SETMASK
	LEAQ	·state+state_mask(SB), SI
	XORL	DX, DX
	MOVL	$8, R10
	MOVL	$SYS_rt_sigprocmask, AX
	SYSCALL
	// Without its keeper it drains: who started the keeper will start another.
	MOVL	$1, DI				// PR_SET_PDEATHSIG
	MOVL	$SIGTERM, SI
	MOVL	$SYS_prctl, AX
	SYSCALL
	// What is open now is what the last worker has left. The runtime will open
	// descriptors of its own, long before main.
	MOVQ	$-100, DI			// AT_FDCWD
	MOVQ	·directory(SB), SI
	MOVL	$0x90000, DX			// O_RDONLY|O_DIRECTORY|O_CLOEXEC
	MOVL	$SYS_openat, AX
	SYSCALL
	MOVQ	AX, ·state+state_listing(SB)
	TESTQ	AX, AX
	JLT	seeds
	XORL	R15, R15
list:
	MOVQ	·state+state_listing(SB), DI
	LEAQ	·listed(SB), SI
	ADDQ	R15, SI
	MOVL	$0x1000000, DX			// the size of listed
	SUBQ	R15, DX
	MOVL	$SYS_getdents64, AX
	SYSCALL
	TESTQ	AX, AX
	JLE	enough
	ADDQ	AX, R15
	JMP	list
enough:
	MOVQ	R15, ·state+state_listed(SB)
	CALL1(SYS_close, ·state+state_listing(SB))
seeds:
	// AT_RANDOM is the keeper's, so all workers would have the same seeds.
	MOVQ	0(R12), CX
	LEAQ	16(R12)(CX*8), BX
environ:
	MOVQ	0(BX), AX
	ADDQ	$8, BX
	TESTQ	AX, AX
	JNE	environ
auxiliary:
	MOVQ	0(BX), AX
	TESTQ	AX, AX
	JEQ	runtime
	CMPQ	AX, $25
	JEQ	random
	ADDQ	$16, BX
	JMP	auxiliary
random:
	MOVQ	8(BX), DI
	MOVL	$16, SI
	XORL	DX, DX
	MOVL	$SYS_getrandom, AX
	SYSCALL

runtime:
	MOVQ	R12, SP
	XORL	DX, DX
	JMP	_rt0_amd64_linux(SB)
