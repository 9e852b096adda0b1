package testutil

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"testing"
	"time"
)

// leakLimit is how long descriptors and goroutines have to be gone when a test
// has ended: what was told to stop may still be on its way out.
const leakLimit = 5 * time.Second

// CheckLeaks fails the test if it leaves a descriptor or a goroutine behind.
// Call it first, so that it looks after every other clean-up, and not in a test
// that runs in parallel with others, whose own it would see.
func CheckLeaks(t testing.TB) {
	t.Helper()
	startPoller()
	before := openFDs()
	goroutines := countGoroutines()
	t.Cleanup(func() {
		if t.Failed() {
			// It ended half-way: what it left says nothing.
			return
		}
		if err := leaks(before, goroutines); err != nil {
			t.Error(err)
		}
	})
}

// Main runs a package's tests and fails them if, together, they leave a
// descriptor or a goroutine behind. Use it in TestMain:
//
//	func TestMain(m *testing.M) { testutil.Main(m) }
func Main(m *testing.M, after ...func()) {
	startPoller()
	before := openFDs()
	goroutines := countGoroutines()
	code := m.Run()
	if code == 0 {
		if err := leaks(before, goroutines); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	for _, f := range after {
		f()
	}
	os.Exit(code)
}

// leaks waits until what is open is what was open before, and says what is not.
func leaks(before map[string]string, goroutines int) error {
	var fds []string
	ok := poll(leakLimit, func() bool {
		// A finalizer closes what nobody refers to. That is no leak of
		// a descriptor, and the collector needs two turns for it.
		runtime.GC()
		fds = newFDs(before, openFDs())
		return len(fds) == 0 && countGoroutines() <= goroutines
	})
	switch {
	case ok:
		return nil
	case len(fds) > 0:
		return fmt.Errorf("descriptors left open: %s", strings.Join(fds, ", "))
	}
	var stacks strings.Builder
	if err := pprof.Lookup("goroutine").WriteTo(&stacks, 1); err != nil {
		return fmt.Errorf("write goroutine profile: %w", err)
	}
	return fmt.Errorf("%d goroutines left running, %d before:\n%s", countGoroutines(), goroutines, stacks.String())
}

// newFDs returns the descriptors in after that are not, or are something else,
// in before.
func newFDs(before, after map[string]string) []string {
	var left []string
	for _, fd := range slices.Sorted(maps.Keys(after)) {
		if before[fd] != after[fd] {
			left = append(left, fd+" -> "+after[fd])
		}
	}
	return left
}

// openFDs maps each descriptor of this process to what it is.
func openFDs() map[string]string {
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	fds := map[string]string{}
	for _, e := range entries {
		what, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			// The descriptor that ReadDir itself had.
			continue
		}
		fds[e.Name()] = what
	}
	return fds
}

// startPoller makes the Go runtime open the epoll instance and the eventfd that
// it keeps for good, so that they are there before the first look. To leave
// epoll instances out of the comparison instead would hide those of the engine.
func startPoller() {
	r, w, err := os.Pipe()
	if err != nil {
		return
	}
	r.Close()
	w.Close()
}

// countGoroutines counts those that a test can be blamed for: os/signal starts
// one at the first signal.Notify and never ends it.
func countGoroutines() int {
	var stacks strings.Builder
	if err := pprof.Lookup("goroutine").WriteTo(&stacks, 2); err != nil {
		return runtime.NumGoroutine()
	}
	n := 0
	for _, stack := range strings.Split(stacks.String(), "\n\n") {
		if !strings.Contains(stack, "os/signal.loop") {
			n++
		}
	}
	return n
}
