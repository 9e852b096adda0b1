package events

import (
	"fmt"
	"math"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"golang.org/x/sys/unix"
)

// clock turns the kernel side's times into wall clock.
type clock struct {
	offset int64 // wall clock minus bpf_ktime_get_ns(), in nanoseconds
}

// newClock measures the offset. It is measured once, so that the order of the
// records stays that of the connections when the wall clock is set.
func newClock() (clock, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return clock{}, fmt.Errorf("read monotonic clock: %w", err)
	}
	kernel, err := bpf.NewClock()
	if err != nil {
		return clock{}, err
	}
	return clock{offset: time.Now().UnixNano() - kernel.Kernel(ts.Nano())}, nil
}

// wall converts nanoseconds of bpf_ktime_get_ns().
func (c clock) wall(monotonic uint64) time.Time {
	return time.Unix(0, int64(monotonic)+c.offset)
}

// between is the time from one moment to a later one, and 0 if it is not later.
func between(from, to uint64) time.Duration {
	if to <= from {
		return 0
	}
	return time.Duration(min(to-from, math.MaxInt64))
}
