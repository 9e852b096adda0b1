package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// tree returns a process and all of its descendants.
func tree(pid int) ([]int, error) {
	all := []int{pid}
	for i := 0; i < len(all); i++ {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", all[i], all[i]))
		if err != nil {
			return nil, fmt.Errorf("read children: %w", err)
		}
		for _, f := range strings.Fields(string(b)) {
			child, err := strconv.Atoi(f)
			if err != nil {
				return nil, fmt.Errorf("read children of %d: %w", all[i], err)
			}
			all = append(all, child)
		}
	}
	return all, nil
}

// cpuOf returns the time that a process and its descendants were on a processor,
// in ns: what the scheduler says, since the clock ticks of /proc/PID/stat are 10 ms.
func cpuOf(pid int) (int64, error) {
	pids, err := tree(pid)
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, p := range pids {
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", p))
		if err != nil {
			return 0, err
		}
		for _, name := range files {
			ns, err := onCPU(name)
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
				continue // a thread that has just ended
			}
			if err != nil {
				return 0, err
			}
			sum += ns
		}
	}
	if sum == 0 {
		return 0, fmt.Errorf("process %d has no schedstat: the kernel lacks CONFIG_SCHED_INFO", pid)
	}
	return sum, nil
}

// processClock returns the processor time of one process in ns, to the moment, also
// of one that is running: schedstat is as old as the last tick then.
func processClock(pid int) (int64, error) {
	// As in <linux/posix-timers_types.h>: of the process, by the scheduler.
	const perProcessScheduled = 2
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|perProcessScheduled), &t); err != nil {
		return 0, fmt.Errorf("read clock of process %d: %w", pid, err)
	}
	return t.Nano(), nil
}

func onCPU(schedstat string) (int64, error) {
	b, err := os.ReadFile(schedstat)
	if err != nil {
		return 0, fmt.Errorf("read processor time: %w", err)
	}
	first, _, _ := strings.Cut(string(b), " ")
	ns, err := strconv.ParseInt(first, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", schedstat, err)
	}
	return ns, nil
}

// rssOf returns the resident memory of a process and its descendants in bytes.
// What they share counts once for each.
func rssOf(pid int) (int64, error) {
	pids, err := tree(pid)
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, p := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p))
		if err != nil {
			return 0, fmt.Errorf("read memory: %w", err)
		}
		_, rest, ok := strings.Cut(string(b), "VmRSS:")
		if !ok {
			return 0, fmt.Errorf("process %d shows no VmRSS", p)
		}
		kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read memory of %d: %w", p, err)
		}
		sum += kib << 10
	}
	return sum, nil
}

// spin keeps one processor awake at the lowest priority until it is killed: to
// wake up a halted virtual processor costs more than any proxy.
func spin(args []string) error {
	if len(args) != 1 {
		return errors.New("spinner: want a processor")
	}
	cpu, err := strconv.Atoi(args[0])
	if err != nil {
		return fmt.Errorf("spinner: %w", err)
	}
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("spinner: stay on processor %d: %w", cpu, err)
	}
	// Not nice 19: who wakes up beside that may wait for the end of its slice.
	if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_IDLE}, 0); err != nil {
		return fmt.Errorf("spinner: lower priority: %w", err)
	}
	for {
	}
}

// onlyOn has what f starts keep to one processor. The calling goroutine is locked to
// its thread, as main is.
func onlyOn(cpu int, f func() error) error {
	var own, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &own); err != nil {
		return fmt.Errorf("read affinity: %w", err)
	}
	one.Set(cpu)
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return fmt.Errorf("stay on processor %d: %w", cpu, err)
	}
	return errors.Join(f(), unix.SchedSetaffinity(0, &own))
}

// processors lists those that this process may run on.
func processors() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("read affinity: %w", err)
	}
	var all []int
	for cpu := range len(set) * 64 {
		if set.IsSet(cpu) {
			all = append(all, cpu)
		}
	}
	return all, nil
}

// ticks is what /proc/stat says of all processors.
type ticks struct{ idle, all int64 }

func machineClock() (t ticks) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return t
	}
	line, _, _ := strings.Cut(string(b), "\n")
	// cpu user nice system idle iowait irq softirq steal guest guest_nice; a
	// guest's time is in user too.
	for i, f := range strings.Fields(line) {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil || i > 8 {
			continue
		}
		t.all += n
		if i == 4 || i == 5 {
			t.idle += n
		}
	}
	return t
}

// since is the share of the time since t in which the processors were busy, and
// 0 where that is not known.
func (t ticks) since() float64 {
	now := machineClock()
	if now.all == t.all {
		return 0
	}
	return 1 - float64(now.idle-t.idle)/float64(now.all-t.all)
}
