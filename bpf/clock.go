package bpf

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"
)

// Clock tells the time as programs see it.
type Clock struct {
	// ahead is by how much this process's CLOCK_MONOTONIC is: a time namespace
	// (that of a container which was restored from a checkpoint, for one) shifts
	// what system calls say, and not bpf_ktime_get_ns().
	ahead int64
}

// NewClock reads how this process's time namespace is shifted, which no process
// changes for itself.
func NewClock() (Clock, error) {
	f, err := os.Open("/proc/self/timens_offsets")
	if errors.Is(err, fs.ErrNotExist) {
		return Clock{}, nil // a kernel without time namespaces
	}
	if err != nil {
		return Clock{}, fmt.Errorf("read time namespace: %w", err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		w := strings.Fields(lines.Text())
		if len(w) != 3 || w[0] != "monotonic" {
			continue
		}
		s, err := strconv.ParseInt(w[1], 10, 64)
		ns, err2 := strconv.ParseInt(w[2], 10, 64)
		if err := errors.Join(err, err2); err != nil {
			return Clock{}, fmt.Errorf("read time namespace: %w", err)
		}
		return Clock{ahead: s*int64(time.Second) + ns}, nil
	}
	return Clock{}, errors.New("read time namespace: no monotonic clock")
}

// Kernel returns what bpf_ktime_get_ns() is when CLOCK_MONOTONIC is at monotonic,
// both in ns.
func (c Clock) Kernel(monotonic int64) int64 { return monotonic - c.ahead }
