package check

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestSetRefuses(t *testing.T) {
	c, _ := fake(nil)
	set(t, c, targets(1, Default())...)
	bad := spec(time.Second)
	bad.Healthy = 0
	err := c.Set([]Target{
		{Cluster: "shop", Addr: addr(1), Spec: Default()},
		{Cluster: "shop", Addr: netip.MustParseAddrPort("[::ffff:192.0.0.1]:80"), Spec: Default()},
		{Cluster: "other", Addr: addr(1), Spec: Default()},
		{Cluster: "shop", Addr: netip.AddrPort{}, Spec: Default()},
		{Cluster: "shop", Addr: netip.AddrPortFrom(addr(2).Addr(), 0), Spec: Default()},
		{Cluster: "shop", Addr: addr(3), Spec: bad},
	})
	want := []string{
		`check cluster "shop", endpoint 192.0.0.1:80: listed twice`,
		`check cluster "shop", endpoint invalid AddrPort: not an address and a port`,
		`check cluster "shop", endpoint 192.0.0.2:0: not an address and a port`,
		`check cluster "shop", endpoint 192.0.0.3:80: healthy: 0 is less than 1`,
	}
	if err == nil {
		t.Fatal("no error")
	}
	if diff := cmp.Diff(want, strings.Split(err.Error(), "\n")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := c.States(); len(got) != 1 || got[0].Addr != addr(0) {
		t.Errorf("the set is now %+v", got)
	}
}

// TestFormer: what stays under another name of its cluster keeps its state.
func TestFormer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, r := fake(func(context.Context, Target) error { return errors.New("ill") })
		set(t, c, targets(1, spec(time.Second))...)
		stop := run(t, c)
		time.Sleep(time.Minute)
		before := c.States()[0]
		if before.State != StateDown || r.count() != 1 {
			t.Fatalf("%+v, told: %v", before, r.of(addr(0)))
		}
		set(t, c, Target{Cluster: "store", Former: "shop", Addr: addr(0), Spec: spec(time.Hour)})
		before.Cluster, before.Against = "store", 0
		if diff := cmp.Diff([]Status{before}, c.States(), cmpopts.EquateErrors(), cmpopts.EquateComparable(netip.AddrPort{})); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		time.Sleep(2 * time.Hour)
		if told := r.of(addr(0)); len(told) != 1 {
			t.Errorf("told: %v", told)
		}
		stop()
	})
}

// TestStay: what stays in the set keeps state and timing over any number of Sets,
// also in the middle of a check.
func TestStay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		var at []time.Duration
		var over atomic.Bool
		c, r := fake(func(ctx context.Context, _ Target) error {
			at = append(at, time.Since(begin))
			select {
			case <-ctx.Done():
				if !over.Load() {
					t.Errorf("check %d was cancelled", len(at))
				}
			case <-time.After(500 * time.Millisecond):
			}
			if len(at) == 1 {
				return nil
			}
			return errProbe
		})
		s := spec(time.Second)
		s.Unhealthy = 5
		set(t, c, targets(1, s)...)
		stop := run(t, c)
		for range 8 * 7 {
			time.Sleep(time.Second / 7)
			set(t, c, targets(1, s)...)
		}
		over.Store(true)
		stop()
		for i := 1; i < len(at); i++ {
			if got := at[i] - at[i-1]; got != time.Second {
				t.Errorf("check %d began %s after the one before", i, got)
			}
		}
		if got := r.of(addr(0)); len(at) < 7 || !slices.Equal(got, []State{StateUp, StateDown}) {
			t.Errorf("%d checks, and reports %v", len(at), got)
		}
	})
}

// TestOtherSpec: a target whose check has changed keeps its state; what the old
// check had found against it is forgotten, and its result is not waited for.
func TestOtherSpec(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var old, cancelled, fresh atomic.Int32
		c, r := fake(func(ctx context.Context, target Target) error {
			if target.Spec.Port == 0 {
				switch old.Add(1) {
				case 1:
					return nil
				case 2, 3:
					return errProbe
				default:
					<-ctx.Done()
					cancelled.Add(1)
					return errProbe
				}
			}
			fresh.Add(1)
			return errProbe
		})
		s := spec(time.Second)
		s.Timeout = time.Hour
		set(t, c, targets(1, s)...)
		run(t, c)
		time.Sleep(4 * time.Second)
		if got := status(t, c, addr(0)); got.State != StateUp || got.Against != 2 || old.Load() != 4 {
			t.Fatalf("after %d checks: %+v", old.Load(), got)
		}
		s.Port = 81
		set(t, c, targets(1, s)...)
		synctest.Wait()
		if got := status(t, c, addr(0)); got.State != StateUp || got.Against != 0 || got.Since.IsZero() || cancelled.Load() != 1 {
			t.Fatalf("with another spec, %d cancelled: %+v", cancelled.Load(), got)
		}
		time.Sleep(3 * time.Second)
		if got := r.of(addr(0)); fresh.Load() != 3 || !slices.Equal(got, []State{StateUp, StateDown}) {
			t.Errorf("after %d new checks: %v", fresh.Load(), got)
		}
		if n := old.Load(); n != 4 {
			t.Errorf("the old check was made %d times", n)
		}
	})
}

// TestRemove: the check of what is removed is cancelled, and its result says
// nothing. An endpoint that comes back is unknown.
func TestRemove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var cancelled atomic.Int32
		c, r := fake(func(ctx context.Context, target Target) error {
			if target.Addr == addr(1) {
				return nil
			}
			<-ctx.Done()
			cancelled.Add(1)
			return errProbe
		})
		s := spec(time.Second)
		s.Timeout = time.Hour
		set(t, c, targets(10, s)...)
		stop := run(t, c)
		time.Sleep(time.Second)
		set(t, c)
		synctest.Wait()
		if n := cancelled.Load(); n != 9 {
			t.Errorf("%d checks were cancelled", n)
		}
		if len(c.States()) != 0 {
			t.Errorf("what is left: %+v", c.States())
		}
		time.Sleep(time.Minute)
		if n := r.count(); n != 1 {
			t.Errorf("%d reports", n)
		}
		set(t, c, targets(2, s)...)
		if got := status(t, c, addr(1)); got.State != StateUnknown {
			t.Errorf("came back as %+v", got)
		}
		time.Sleep(time.Second)
		if got := r.of(addr(1)); !slices.Equal(got, []State{StateUp, StateUp}) {
			t.Errorf("%v was reported of the one that came back", got)
		}
		stop()
		if n := r.count(); n != 2 {
			t.Errorf("%d reports", n)
		}
	})
}

// TestEnd: Run waits for its checks, and nothing is reported afterwards.
func TestEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ended atomic.Int32
		c, r := fake(func(ctx context.Context, _ Target) error {
			<-ctx.Done()
			time.Sleep(time.Second) // it is slow to end
			ended.Add(1)
			return errProbe
		})
		s := spec(time.Second)
		s.Timeout = time.Hour
		set(t, c, targets(50, s)...)
		stop := run(t, c)
		time.Sleep(time.Second)
		stop()
		if n := ended.Load(); n != 50 {
			t.Errorf("Run returned when %d of 50 checks had ended", n)
		}
		time.Sleep(time.Minute)
		set(t, c, targets(60, s)...)
		time.Sleep(time.Minute)
		if r.count() != 0 || len(c.States()) != 60 {
			t.Errorf("%d reports, %d targets", r.count(), len(c.States()))
		}
		set(t, c) // who is at the end of its life may still learn that endpoints are gone
	})
}

// TestNoReportAfterSet: a report that is under way when its target is removed has
// ended when Set returns.
func TestNoReportAfterSet(t *testing.T) {
	var inside atomic.Bool
	entered, release := make(chan struct{}), make(chan struct{})
	c := New(Options{Report: func(Change) {
		inside.Store(true)
		close(entered)
		<-release
		inside.Store(false)
	}})
	c.probe = func(context.Context, Target) error { return nil }
	set(t, c, targets(1, spec(minInterval))...)
	run(t, c)
	<-entered
	c.States() // does not wait
	returned := make(chan bool)
	go func() {
		err := c.Set(nil)
		returned <- inside.Load() || err != nil
	}()
	time.Sleep(20 * time.Millisecond) // in which a Set that does not wait returns
	close(release)
	if <-returned {
		t.Error("Set returned during a report of what it removed")
	}
}

// TestSetWhileRunning sets at random while checks run, for the race detector. The
// reports are held to what they promise: a removed target is silent, changes
// alternate, and one comes at a time.
func TestSetWhileRunning(t *testing.T) {
	type key struct {
		addr netip.AddrPort
		life int
	}
	var (
		mu   sync.Mutex
		last = map[key]State{}
		life = map[netip.AddrPort]int{}
		in   = map[netip.AddrPort]bool{}
		busy atomic.Int32
	)
	c := New(Options{Parallel: 16, Report: func(ch Change) {
		if busy.Add(1) != 1 {
			t.Error("two reports at once")
		}
		defer busy.Add(-1)
		mu.Lock()
		defer mu.Unlock()
		k := key{ch.Addr, life[ch.Addr]}
		if !in[ch.Addr] {
			t.Errorf("%s was reported, and is not in the set", ch.Addr)
		}
		if last[k] == ch.State {
			t.Errorf("%s was reported %s twice", ch.Addr, ch.State)
		}
		if (ch.Err != nil) != (ch.State == StateDown) {
			t.Errorf("%s is %s with error %v", ch.Addr, ch.State, ch.Err)
		}
		last[k] = ch.State
	}})
	c.probe = func(ctx context.Context, _ Target) error {
		switch rand.IntN(4) {
		case 0:
			<-ctx.Done()
			return ctx.Err()
		case 1:
			return errProbe
		default:
			return nil
		}
	}
	run(t, c)
	s := spec(minInterval)
	s.Timeout, s.Jitter, s.Healthy, s.Unhealthy = time.Millisecond, 100, 1, 1
	other := s
	other.Port = 81
	for range 300 {
		var next []Target
		is := map[netip.AddrPort]bool{}
		for i := range 30 {
			switch rand.IntN(8) {
			case 0:
				continue
			case 1:
				next = append(next, Target{Cluster: "shop", Addr: addr(i), Spec: other})
			default:
				next = append(next, Target{Cluster: "shop", Addr: addr(i), Spec: s})
			}
			is[addr(i)] = true
		}
		// What is new may be reported before Set returns; what is old, not after.
		mu.Lock()
		for a := range is {
			if !in[a] {
				life[a]++
				in[a] = true
			}
		}
		mu.Unlock()
		set(t, c, next...)
		mu.Lock()
		for a := range in {
			if !is[a] {
				delete(in, a)
			}
		}
		mu.Unlock()
		c.States()
		time.Sleep(time.Millisecond) // so that some checks end between two sets
	}
	mu.Lock()
	defer mu.Unlock()
	if len(last) < 30 {
		t.Errorf("only %d targets were reported at all", len(last))
	}
}
