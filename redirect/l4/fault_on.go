//go:build pillion_fault

package l4

import (
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// faults says how often a worker is killed: at one in so many points.
var faults = sync.OnceValues(func() (n uint64, start time.Time) {
	n, _ = strconv.ParseUint(os.Getenv("PILLION_FAULT"), 10, 64)
	return n, time.Now()
})

// fault kills the process now and then, more seldom while it starts, or only at the
// point that the environment names, so often at most as that says. It counts that in a
// file, a byte for each point.
func fault(point int) {
	n, start := faults()
	only := os.Getenv("PILLION_FAULT_ONLY")
	if n == 0 || only != "" && only != strconv.Itoa(point) {
		return
	}
	if time.Since(start) < time.Second && only == "" {
		n *= 8
	}
	if point == faultRead || point == faultWritten {
		n *= 20 // by far the most frequent
	}
	if rand.Uint64N(n) != 0 {
		return
	}
	var st unix.Stat_t
	if most := os.Getenv("PILLION_FAULT_MOST"); most != "" && unix.Stat(os.Getenv("PILLION_FAULT_COUNT"), &st) == nil {
		if n, _ := strconv.ParseInt(most, 10, 64); st.Size >= n {
			return
		}
	}
	if f, err := unix.Open(os.Getenv("PILLION_FAULT_COUNT"), unix.O_WRONLY|unix.O_APPEND|unix.O_CLOEXEC, 0); err == nil {
		_, _ = unix.Write(f, []byte{byte(point)})
	}
	_, _, _ = syscall.RawSyscall(unix.SYS_KILL, uintptr(os.Getpid()), uintptr(unix.SIGKILL), 0)
	select {}
}

// poison panics at a connection to the port that the environment names.
func poison(c *conn) {
	if n := os.Getenv("PILLION_FAULT_POISON"); n != "" && n == strconv.Itoa(int(c.target.Downstream.OrigDst.Port())) {
		panic("poisoned")
	}
}
