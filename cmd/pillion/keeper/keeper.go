package keeper

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// What a process tells itself across exec. The assembly knows the first.
const (
	variable = "PILLION_KEEPER"
	oomScore = "PILLION_OOM_SCORE_ADJ" // what it was before the keeper lowered it
)

// oomKeeper is the score of a keeper, for whom the kernel should look last: it has
// some 100 KiB, and all that the worker has to lose.
const oomKeeper = -999

// ErrNotLinked means that the program was built without the keeper's entry point.
var ErrNotLinked = errors.New("this build has no keeper: build it by make build, or with the -ldflags of the Makefile")

// page is what the keeper itself sees of the memory that workers share. The assembly
// knows the offsets.
type page struct {
	ready  uint64        // how far the worker has come
	deaths uint64        // workers that have died
	status uint64        // of the last of these, as wait(2) tells it,
	died   unix.Timespec // and when, by CLOCK_MONOTONIC
}

// PageSize is how much of the memory is the keeper's own, from its beginning: the
// largest page of any kernel, so that the rest can be mapped on all. The keeper itself
// uses, and maps, the first 4096 bytes.
const PageSize = 64 << 10

// Start makes this process a keeper and its worker, by executing the program again
// with the same arguments. It returns only if that fails.
func Start() error {
	if !linked() {
		return ErrNotLinked
	}
	env := append(os.Environ(), variable+"=1")
	if was, err := os.ReadFile(oomFile); err == nil {
		// Not permitted without CAP_SYS_RESOURCE, and no reason not to start.
		if os.WriteFile(oomFile, []byte(strconv.Itoa(oomKeeper)), 0) == nil {
			env = append(env, oomScore+"="+strings.TrimSpace(string(was)))
		}
	}
	return fmt.Errorf("start the keeper: %w", os.NewSyscallError("execve", unix.Exec("/proc/self/exe", os.Args, env)))
}

const oomFile = "/proc/self/oom_score_adj"

// Keeper is the one that this process is a worker of.
type Keeper struct {
	// Memory is the memfd that workers share. Its first PageSize bytes are the
	// keeper's.
	Memory int

	page *page
}

// Of returns the keeper of this process, or nil if it has none.
func Of() *Keeper {
	memory, p := under()
	if p == nil {
		return nil
	}
	os.Unsetenv(variable) // it is not for those that this process starts
	if score := os.Getenv(oomScore); score != "" {
		os.Unsetenv(oomScore)
		// Up is always permitted.
		_ = os.WriteFile(oomFile, []byte(score), 0)
	}
	return &Keeper{Memory: memory, page: p}
}

// Deaths is how many workers have died before this one.
func (k *Keeper) Deaths() int { return int(atomic.LoadUint64(&k.page.deaths)) }

// Crashed tells whether the last worker that died did so by its own fault, and how
// it died. A kill from outside, the kernel's for want of memory among them, is none.
func (k *Keeper) Crashed() (fault bool, how string) {
	status := unix.WaitStatus(atomic.LoadUint64(&k.page.status))
	if status.Signaled() {
		s := status.Signal()
		return s != unix.SIGKILL && s != unix.SIGTERM && s != unix.SIGINT && s != unix.SIGHUP, unix.SignalName(s)
	}
	return true, "exit code " + strconv.Itoa(status.ExitStatus())
}

// Since is how long the last worker has been dead.
func (k *Keeper) Since() time.Duration {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // cannot fail with this clock
	return time.Duration(now.Nano() - k.page.died.Nano())
}

// Ready says that this worker serves, Settled that it has done so for long. The keeper
// waits longer and longer, and then gives up, when many in a row die before they are
// ready, or by their own fault before they are settled.
func (k *Keeper) Ready() { atomic.StoreUint64(&k.page.ready, 1) }

// Settled is the second part of [Keeper.Ready].
func (k *Keeper) Settled() { atomic.StoreUint64(&k.page.ready, 2) }

// Descriptors returns what was open when this process began, but for standard input,
// output, error, and the memory: what dead workers have left.
func (k *Keeper) Descriptors() ([]int, error) {
	entries, self := listing()
	if self < 0 {
		return nil, fmt.Errorf("list descriptors: %w", unix.Errno(-self))
	}
	var all []int
	_, _, names := unix.ParseDirent(entries, -1, nil)
	for _, name := range names {
		fd, err := strconv.Atoi(name)
		if err == nil && fd > 2 && fd != self && fd != k.Memory {
			all = append(all, fd)
		}
	}
	return all, nil
}
