package rig

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/testutil"
)

// What may be left of a load: a worker keeps 8 pipes, the runtime its threads
// and some of its memory.
const (
	pipesKept   = 2 * 8
	threadsKept = 16
	// Who asks for the metrics is served by some.
	goroutinesKept = 8
	memoryKept     = 96 << 20
)

// footprint is what a process has of the system.
type footprint struct {
	fds     map[string]int // by kind
	threads int
	memory  int // resident, in bytes

	goroutines int // as its metrics tell
}

func (f footprint) String() string {
	return fmt.Sprintf("descriptors %v, %d threads, %d goroutines, %d KiB", f.fds, f.threads, f.goroutines, f.memory>>10)
}

func footprintOf(pid int) (footprint, error) {
	f := footprint{fds: map[string]int{}}
	dir := fmt.Sprintf("/proc/%d", pid)
	entries, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return f, fmt.Errorf("list descriptors: %w", err)
	}
	for _, e := range entries {
		what, err := os.Readlink(filepath.Join(dir, "fd", e.Name()))
		if err != nil {
			continue // closed since
		}
		kind, _, _ := strings.Cut(what, ":[")
		f.fds[kind]++
	}
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return f, fmt.Errorf("read status: %w", err)
	}
	for line := range strings.Lines(string(status)) {
		w := strings.Fields(line)
		switch {
		case len(w) < 2:
		case w[0] == "Threads:":
			f.threads, err = strconv.Atoi(w[1])
		case w[0] == "VmRSS:":
			f.memory, err = strconv.Atoi(w[1])
			f.memory <<= 10
		}
		if err != nil {
			return f, fmt.Errorf("read status: %w", err)
		}
	}
	return f, nil
}

// within tells whether f is what before was, but for what may be kept.
func (f footprint) within(before footprint) bool {
	for kind, n := range f.fds {
		allowed := before.fds[kind]
		if kind == "pipe" {
			allowed += pipesKept * runtime.NumCPU()
		}
		if n > allowed {
			return false
		}
	}
	return f.threads <= before.threads+threadsKept && f.goroutines <= before.goroutines+goroutinesKept && f.memory <= before.memory+memoryKept
}

// NoLeaks has the test end with an instance that holds no connection, no more
// descriptors than now, hardly more threads and memory, and nothing
// unaccounted. Call it before the load, and start servers before the instance:
// what ends at the end of the test then ends after this.
func (i *Instance) NoLeaks(t testing.TB) {
	t.Helper()
	pid := i.Cmd.Process.Pid
	before, err := footprintOf(pid)
	if err != nil {
		t.Fatal(err)
	}
	before.goroutines = i.Metric(t, "go_goroutines")
	t.Cleanup(func() {
		if t.Failed() || i.Cmd.Process.Pid != pid {
			return
		}
		i.Idle(t)
		i.Conserved(t)
		var after footprint
		testutil.Eventually(t, Limit, func() bool {
			if after, err = footprintOf(pid); err != nil {
				t.Fatal(err)
			}
			after.goroutines = i.Metric(t, "go_goroutines")
			return after.within(before) || pause()
		}, "what the instance holds is what it held: ", before, "; it holds ", &after)
	})
}

// Metric returns the value of a metric that is a whole number.
func (i *Instance) Metric(t testing.TB, name string) int {
	t.Helper()
	body, err := i.Metrics(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	for lines := bufio.NewScanner(body); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
			n, err := strconv.Atoi(value)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("there is no metric %s", name)
	return 0
}

// Idle waits until no connection is open.
func (i *Instance) Idle(t testing.TB) {
	t.Helper()
	i.until(t, "no connection is open", func(s admin.Status) (string, bool) {
		return fmt.Sprintf("%d are", s.Live), s.Live == 0
	})
}

// until waits until what the instance says of itself is as wanted. Nobody answers
// while a handler that has died comes back.
func (i *Instance) until(t testing.TB, want string, done func(admin.Status) (string, bool)) {
	t.Helper()
	var seen said
	testutil.Eventually(t, Limit, func() bool {
		s, err := i.Status(context.Background())
		if err != nil {
			seen = said(err.Error())
			return pause()
		}
		is, ok := done(s)
		seen = said(is)
		return ok || pause()
	}, want, ", but ", &seen, "\n", i.log)
}

// number is one that is printed as it is then.
type number int

func (n *number) String() string { return strconv.Itoa(int(*n)) }

// said is what was seen last, printed as it is then.
type said string

func (s *said) String() string { return string(*s) }

// pause lets some time pass between two questions to an instance, whose answers
// cost it more than the look at a variable. It returns false.
func pause() bool {
	time.Sleep(20 * time.Millisecond)
	return false
}

// Total is how many connections of one kind have ended.
type Total struct {
	Path        flow.Path
	Reason, End flow.Reason
	Count       int
}

// Totals returns the kinds of connections that have ended, as the metrics count
// them.
func (i *Instance) Totals(t testing.TB) []Total {
	t.Helper()
	body, err := i.Metrics(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	var all []Total
	lines := bufio.NewScanner(body)
	for lines.Scan() {
		rest, ok := strings.CutPrefix(lines.Text(), "pillion_connections_total{")
		if !ok {
			continue
		}
		total, err := parseTotal(rest)
		if err != nil {
			t.Fatalf("metrics: %q: %v", lines.Text(), err)
		}
		if total.Count > 0 {
			all = append(all, total)
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}

func parseTotal(text string) (total Total, err error) {
	labels, value, _ := strings.Cut(text, "} ")
	n, err := strconv.ParseFloat(value, 64)
	if err != nil {
		return total, err
	}
	total.Count = int(n)
	for label := range strings.SplitSeq(labels, ",") {
		name, value, _ := strings.Cut(label, "=")
		value = strings.Trim(value, `"`)
		switch name {
		case "path":
			err = total.Path.UnmarshalText([]byte(value))
		case "reason":
			err = total.Reason.UnmarshalText([]byte(value))
		case "end":
			err = total.End.UnmarshalText([]byte(value))
		}
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// AllRelayed waits until at least want connections have ended, and fails the
// test unless every one was relayed. It returns how many there are.
func (i *Instance) AllRelayed(t testing.TB, want int) int {
	t.Helper()
	i.Idle(t)
	var sum number
	var totals []Total
	testutil.Eventually(t, Limit, func() bool {
		sum, totals = 0, i.Totals(t)
		for _, total := range totals {
			sum += number(total.Count)
		}
		return int(sum) >= want || pause()
	}, "ended connections: want ", want, ", have ", &sum)
	for _, total := range totals {
		if total.Path != flow.PathRelay {
			t.Errorf("%d connections took %s (%s, %s), want relay", total.Count, total.Path, total.Reason, total.End)
		}
	}
	return int(sum)
}
