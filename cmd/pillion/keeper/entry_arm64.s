// The keeper, where it begins: as entry_amd64.s, which has the comments.
#include "textflag.h"

#define SYS_openat		56
#define SYS_close		57
#define SYS_getdents64		61
#define SYS_ftruncate		46
#define SYS_write		64
#define SYS_exit_group		94
#define SYS_nanosleep		101
#define SYS_clock_gettime	113
#define SYS_kill		129
#define SYS_rt_sigprocmask	135
#define SYS_rt_sigtimedwait	137
#define SYS_prctl		167
#define SYS_clone		220
#define SYS_mmap		222
#define SYS_wait4		260
#define SYS_getrandom		278
#define SYS_memfd_create	279

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

#define CALL(nr) \
	MOVD	$nr, R8; \
	SVC

// On entry, from RSP on: argc, argv..., 0, envp..., 0, auxv. It stays in R19. R20 is
// state, R21 the worker, R22 whether an end was asked for, R23 how many workers in a
// row have died too soon, R24 the page.
TEXT ·entry(SB),NOSPLIT|NOFRAME,$0
	MOVD	RSP, R19
	MOVD	$·state(SB), R20
	MOVD	$1, R0
	MOVD	R0, state_linked(R20)
	MOVD	0(R19), R0
	ADD	R0<<3, R19, R25
	ADD	$16, R25
	MOVD	$0x5f4e4f494c4c4950, R1		// PILLION_
	MOVD	$0x313d52455045454b, R2		// KEEPER=1
environment:
	MOVD.P	8(R25), R0
	CBZ	R0, runtime
	MOVD	0(R0), R3
	CMP	R1, R3
	BNE	environment
	MOVD	8(R0), R3
	CMP	R2, R3
	BNE	environment

	MOVD	$15, R0				// PR_SET_NAME
	MOVD	·memoryName(SB), R1
	CALL(SYS_prctl)
	MOVD	·memoryName(SB), R0
	MOVD	$1, R1				// MFD_CLOEXEC
	CALL(SYS_memfd_create)
	TBNZ	$63, R0, failed
	MOVD	R0, state_memory(R20)
	MOVD	$4096, R1
	CALL(SYS_ftruncate)
	TBNZ	$63, R0, failed
	MOVD	ZR, R0
	MOVD	$4096, R1
	MOVD	$3, R2				// PROT_READ|PROT_WRITE
	MOVD	$1, R3				// MAP_SHARED
	MOVD	state_memory(R20), R4
	MOVD	ZR, R5
	CALL(SYS_mmap)
	TBNZ	$63, R0, failed
	MOVD	R0, state_page(R20)
	MOVD	R0, R24

	MOVD	$0x14a07, R0	// HUP INT QUIT USR1 USR2 TERM CHLD
	MOVD	R0, state_signals(R20)
	MOVD	ZR, R0				// SIG_BLOCK
	ADD	$state_signals, R20, R1
	ADD	$state_mask, R20, R2
	MOVD	$8, R3
	CALL(SYS_rt_sigprocmask)
	MOVD	ZR, R22
	MOVD	ZR, R23

again:
	MOVD	ZR, page_ready(R24)
	MOVD	$0x411, R0			// CLONE_FILES|SIGCHLD
	MOVD	ZR, R1
	MOVD	ZR, R2
	MOVD	ZR, R3
	MOVD	ZR, R4
	CALL(SYS_clone)
	CBZ	R0, worker
	TBNZ	$63, R0, crashed
	MOVD	R0, R21

wait:
	ADD	$state_signals, R20, R0
	MOVD	ZR, R1
	MOVD	ZR, R2
	MOVD	$8, R3
	CALL(SYS_rt_sigtimedwait)
	CMP	$0, R0
	BLE	wait
	CMP	$SIGCHLD, R0
	BEQ	reap
	CMP	$SIGTERM, R0
	BEQ	ending
	CMP	$SIGINT, R0
	BNE	pass
ending:
	MOVD	$1, R22
pass:
	MOVD	R0, R1
	MOVD	R21, R0
	CALL(SYS_kill)
	B	wait

reap:
	MOVD	$-1, R0
	ADD	$state_status, R20, R1
	MOVD	$1, R2				// WNOHANG
	MOVD	ZR, R3
	CALL(SYS_wait4)
	CMP	$0, R0
	BLE	wait
	CMP	R21, R0
	BNE	reap

	MOVWU	state_status(R20), R0
	ANDS	$0x7f, R0, R1
	BNE	signalled
	LSR	$8, R0, R0
	AND	$0xff, R0, R0
	CMP	$2, R0
	BEQ	died
	CALL(SYS_exit_group)
signalled:
	ADD	$128, R1, R0
died:
	CBZ	R22, crashed
	CALL(SYS_exit_group)

crashed:
	MOVD	$1, R0				// CLOCK_MONOTONIC
	ADD	$page_died, R24, R1
	CALL(SYS_clock_gettime)
	MOVD	page_deaths(R24), R0
	ADD	$1, R0
	MOVD	R0, page_deaths(R24)
	MOVWU	state_status(R20), R0
	MOVD	R0, page_status(R24)
	ADD	$1, R23
	MOVD	page_ready(R24), R1
	CMP	$2, R1
	BEQ	fresh
	CMP	$1, R1
	BNE	count
	CMP	$9, R0				// SIGKILL
	BNE	count
fresh:
	MOVD	$1, R23
count:
	CMP	$10, R23
	BEQ	giveup
	CMP	$1, R23
	BEQ	again
	MOVD	$2000000, R0
	LSL	R23, R0, R0
	MOVD	$999999999, R1
	CMP	R1, R0
	CSEL	HI, R1, R0, R0
	MOVD	ZR, state_time(R20)
	MOVD	R0, (state_time+8)(R20)
	ADD	$state_time, R20, R0
	MOVD	ZR, R1
	CALL(SYS_nanosleep)
	B	again

giveup:
	MOVD	·lastWords(SB), R1
	MOVD	·lastWords+8(SB), R2
	B	say
failed:
	MOVD	·noKeeper(SB), R1
	MOVD	·noKeeper+8(SB), R2
say:
	MOVD	$2, R0
	CALL(SYS_write)
	MOVD	$1, R0
	CALL(SYS_exit_group)

worker:
	MOVD	$2, R0				// SIG_SETMASK
	ADD	$state_mask, R20, R1
	MOVD	ZR, R2
	MOVD	$8, R3
	CALL(SYS_rt_sigprocmask)
	MOVD	$1, R0				// PR_SET_PDEATHSIG
	MOVD	$SIGTERM, R1
	CALL(SYS_prctl)
	MOVD	$-100, R0			// AT_FDCWD
	MOVD	·directory(SB), R1
	MOVD	$0x84000, R2			// O_RDONLY|O_DIRECTORY|O_CLOEXEC
	MOVD	ZR, R3
	CALL(SYS_openat)
	MOVD	R0, state_listing(R20)
	TBNZ	$63, R0, seeds
	MOVD	ZR, R23
list:
	MOVD	state_listing(R20), R0
	MOVD	$·listed(SB), R1
	ADD	R23, R1
	MOVD	$0x1000000, R2			// the size of listed
	SUB	R23, R2
	CALL(SYS_getdents64)
	CMP	$0, R0
	BLE	enough
	ADD	R0, R23
	B	list
enough:
	MOVD	R23, state_listed(R20)
	MOVD	state_listing(R20), R0
	CALL(SYS_close)
seeds:
	MOVD	0(R19), R0
	ADD	R0<<3, R19, R25
	ADD	$16, R25
environ:
	MOVD.P	8(R25), R0
	CBNZ	R0, environ
auxiliary:
	MOVD	0(R25), R0
	CBZ	R0, runtime
	CMP	$25, R0
	BEQ	random
	ADD	$16, R25
	B	auxiliary
random:
	MOVD	8(R25), R0
	MOVD	$16, R1
	MOVD	ZR, R2
	CALL(SYS_getrandom)

runtime:
	MOVD	R19, RSP
	B	_rt0_arm64_linux(SB)
