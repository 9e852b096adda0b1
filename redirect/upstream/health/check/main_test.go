package check

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// limit is how long something real may take before a test gives up.
const limit = 60 * time.Second

var errProbe = errors.New("not well")

// addr is the address of the nth endpoint.
func addr(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, byte(n >> 8), byte(n)}), 80)
}

// spec is a check without jitter.
func spec(interval time.Duration) Spec {
	s := Default()
	s.Interval, s.Timeout, s.Jitter = interval, interval, 0
	return s
}

func targets(n int, s Spec) []Target {
	all := make([]Target, 0, n)
	for i := range n {
		all = append(all, Target{Cluster: "shop", Addr: addr(i), Spec: s})
	}
	return all
}

// reports keeps what is reported.
type reports struct {
	mu  sync.Mutex
	all []Change
}

func (r *reports) add(c Change) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, c)
}

func (r *reports) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}

// of returns the states that were reported of an endpoint.
func (r *reports) of(a netip.AddrPort) []State {
	r.mu.Lock()
	defer r.mu.Unlock()
	var states []State
	for _, c := range r.all {
		if c.Addr == a {
			states = append(states, c.State)
		}
	}
	return states
}

// want waits until states were reported of an endpoint, and nothing else.
func (r *reports) want(t *testing.T, a netip.AddrPort, states ...State) {
	t.Helper()
	testutil.Eventually(t, limit, func() bool { return len(r.of(a)) >= len(states) }, "states of", a, states)
	if got := r.of(a); !slices.Equal(got, states) {
		t.Fatalf("%s was reported %v, want %v", a, got, states)
	}
}

// run runs a checker until the test ends, or stop is called.
func run(t *testing.T, c *Checker) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := c.Run(ctx); err != nil {
			t.Errorf("run: %v", err)
		}
	})
	stop = func() {
		cancel()
		running.Wait()
	}
	t.Cleanup(stop)
	return stop
}

func set(t *testing.T, c *Checker, targets ...Target) {
	t.Helper()
	if err := c.Set(targets); err != nil {
		t.Fatal(err)
	}
}

// status returns what is known about an endpoint.
func status(t *testing.T, c *Checker, a netip.AddrPort) Status {
	t.Helper()
	for _, s := range c.States() {
		if s.Addr == a {
			return s
		}
	}
	t.Fatalf("nothing is known about %s", a)
	return Status{}
}
