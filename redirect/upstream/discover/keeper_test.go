package discover

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/redirect/flow"
)

// scripted is a source that does what its functions say, one for each run.
type scripted struct {
	runs []func(ctx context.Context, out chan<- Snapshot) error
	run  atomic.Int32
}

func (s *scripted) Run(ctx context.Context, out chan<- Snapshot) error {
	n := int(s.run.Add(1))
	return s.runs[min(n, len(s.runs))-1](ctx, out)
}

// sends returns a run that sends snapshots, one a second, until its end.
func sends(snapshots ...Snapshot) func(context.Context, chan<- Snapshot) error {
	return func(ctx context.Context, out chan<- Snapshot) error {
		for _, s := range snapshots {
			time.Sleep(time.Second)
			select {
			case out <- s:
			case <-ctx.Done():
			}
		}
		<-ctx.Done()
		return nil
	}
}

// keep runs a keeper until check returns. told gets every state that it tells.
func keep(t *testing.T, s Source, check func(k *Keeper, told func() []State)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var told []State
		k := NewKeeper(s, func(s State) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, s)
		})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- k.Run(ctx) }()
		check(k, func() []State {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(told)
		})
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// after lets time pass, and what is due then happen.
func after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func isReady(k *Keeper) bool {
	select {
	case <-k.Ready():
		return true
	default:
		return false
	}
}

// follower is a source that needs no goroutine to receive what it tells.
type follower struct{ scripted }

func (f *follower) Follow(ctx context.Context, tell func(Snapshot)) error {
	tell(Snapshot{Endpoints: set("192.0.2.1:80")})
	<-ctx.Done()
	tell(Snapshot{Endpoints: set("192.0.2.2:80")})
	return nil
}

// TestKeeperFollows: of a source that can, it takes what that tells, without its Run,
// and nothing after the end.
func TestKeeperFollows(t *testing.T) {
	var f follower
	var last *Keeper
	keep(t, &f, func(k *Keeper, told func() []State) {
		last = k
		synctest.Wait()
		if !isReady(k) || len(told()) != 1 {
			t.Errorf("ready %v, told %+v", isReady(k), told())
		}
	})
	if diff := cmp.Diff(set("192.0.2.1:80"), last.State().Endpoints, equal); diff != "" || f.run.Load() != 0 {
		t.Errorf("Run was called %d times (-want +got)\n%s", f.run.Load(), diff)
	}
}

func TestKeeperKeepsTheLastGoodSet(t *testing.T) {
	broken := errors.New("broken")
	one := set("192.0.2.1:80")
	s := &scripted{runs: []func(context.Context, chan<- Snapshot) error{sends(
		Snapshot{Endpoints: one}, Snapshot{Err: broken}, Snapshot{Err: broken}, Snapshot{Endpoints: one}, Snapshot{},
	)}}
	keep(t, s, func(k *Keeper, told func() []State) {
		began := time.Now()
		synctest.Wait()
		if isReady(k) || k.State().Generation != 0 || !k.State().Since.IsZero() {
			t.Errorf("before the first answer: ready %v, %+v", isReady(k), k.State())
		}
		after(1500 * time.Millisecond)
		want := State{Endpoints: one, Generation: 1, Changed: began.Add(time.Second), Since: began.Add(1500 * time.Millisecond)}
		if diff := cmp.Diff(want, k.State(), equal); diff != "" || !isReady(k) {
			t.Errorf("ready %v (-want +got)\n%s", isReady(k), diff)
		}
		after(2 * time.Second) // two errors
		st := k.State()
		if !errors.Is(st.Err, broken) || !slices.Equal(st.Endpoints, one) || st.Generation != 1 || st.Failures != 2 {
			t.Errorf("after two errors: %+v", st)
		}
		if age := time.Since(st.Since); age != 1500*time.Millisecond {
			t.Errorf("the set is %v old, want 1.5s: since the first error", age)
		}
		after(time.Second) // the same set
		if st := k.State(); st.Err != nil || st.Generation != 1 || st.Changed != began.Add(time.Second) || time.Since(st.Since) != 0 {
			t.Errorf("after the error: %+v", st)
		}
		after(time.Second) // nobody, explicitly
		if st := k.State(); st.Err != nil || st.Generation != 2 || len(st.Endpoints) != 0 {
			t.Errorf("nobody: %+v", st)
		}
		var generations []uint64
		for _, s := range told() {
			generations = append(generations, s.Generation)
		}
		if diff := cmp.Diff([]uint64{1, 1, 1, 2}, generations); diff != "" {
			t.Errorf("told (-want +got)\n%s", diff)
		}
	})
}

// TestKeeperLacks: that a set lacks nothing any more is told, also if it is the same one,
// and an error leaves what it lacks.
func TestKeeperLacks(t *testing.T) {
	one, broken := set("192.0.2.1:80"), errors.New("broken")
	s := &scripted{runs: []func(context.Context, chan<- Snapshot) error{sends(
		Snapshot{Endpoints: one, Lacks: LackIPv4}, Snapshot{Err: broken}, Snapshot{Endpoints: one}, Snapshot{Endpoints: one},
	)}}
	keep(t, s, func(_ *Keeper, told func() []State) {
		after(4 * time.Second)
		var lacks []Lack
		for _, s := range told() {
			lacks = append(lacks, s.Lacks)
			if s.Generation != 1 {
				t.Errorf("generation %d of the same set", s.Generation)
			}
		}
		if diff := cmp.Diff([]Lack{LackIPv4, LackIPv4, 0}, lacks); diff != "" {
			t.Errorf("told (-want +got)\n%s", diff)
		}
	})
}

func TestStateWith(t *testing.T) {
	told := []Endpoint{{Addr: set("192.0.2.1:80")[0].Addr, Weight: 5, Zone: "a"}}
	before := set("192.0.2.1:80", "192.0.2.2:80", "[2001:db8::1]:80")
	many := make([]Endpoint, flow.SetEndpoints)
	for i := range many {
		many[i] = Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 80), Weight: 1}
	}
	for name, tt := range map[string]struct {
		lacks  Lack
		before []Endpoint
		want   []Endpoint
	}{
		"nothing":          {0, before, told},
		"one family":       {LackIPv4, before, []Endpoint{told[0], before[1]}},
		"the other":        {LackIPv6, before, []Endpoint{told[0], before[2]}},
		"both":             {LackIPv4 | LackIPv6, before, []Endpoint{told[0], before[1], before[2]}},
		"nothing was":      {LackIPv4, nil, told},
		"more than it may": {LackIPv4, many, append(slices.Clone(many[:flow.SetEndpoints-1]), told[0])},
	} {
		s := State{Endpoints: told, Lacks: tt.lacks}
		if diff := cmp.Diff(tt.want, s.With(tt.before), equal); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", name, diff)
		}
	}
}

func TestKeeperFirstError(t *testing.T) {
	s := &scripted{runs: []func(context.Context, chan<- Snapshot) error{sends(Snapshot{Err: errors.New("broken")}, Snapshot{})}}
	keep(t, s, func(k *Keeper, told func() []State) {
		after(time.Second)
		if st := k.State(); !isReady(k) || st.Err == nil || st.Generation != 0 || !st.Since.IsZero() || len(told()) != 1 {
			t.Errorf("ready %v, %+v, told %d", isReady(k), st, len(told()))
		}
		after(time.Second)
		// Nobody is an answer, also as the first.
		if st := k.State(); st.Err != nil || st.Generation != 1 || len(told()) != 2 {
			t.Errorf("%+v, told %d", st, len(told()))
		}
	})
}

func TestKeeperRestarts(t *testing.T) {
	broken := errors.New("makes no sense")
	fails := func(context.Context, chan<- Snapshot) error { return broken }
	returns := func(context.Context, chan<- Snapshot) error { return nil }
	s := &scripted{runs: []func(context.Context, chan<- Snapshot) error{
		fails, returns, fails, fails, fails, fails, fails, fails, sends(Snapshot{Endpoints: set("192.0.2.1:80")}),
	}}
	keep(t, s, func(k *Keeper, told func() []State) {
		synctest.Wait()
		if st := k.State(); s.run.Load() != 1 || !errors.Is(st.Err, broken) || !isReady(k) {
			t.Errorf("%d runs, %+v", s.run.Load(), st)
		}
		after(firstWait)
		if st := k.State(); s.run.Load() != 2 || st.Err == nil || st.Restarts != 1 {
			t.Errorf("%d runs, %+v", s.run.Load(), st)
		}
		// 1 + 2 + 4 + ... + 60 + 60 at most, and less by up to a quarter.
		after(4 * time.Minute)
		st := k.State()
		if s.run.Load() != 9 || st.Err != nil || st.Restarts != 8 || st.Failures != 8 || len(st.Endpoints) != 1 {
			t.Errorf("%d runs, %+v", s.run.Load(), st)
		}
		if len(told()) != 2 {
			t.Errorf("told %d times", len(told()))
		}
	})
}

func TestKeeperCleansSets(t *testing.T) {
	mixed := []Endpoint{
		{Addr: set("[::ffff:192.0.2.2]:80")[0].Addr, Weight: 1},
		{Addr: set("192.0.2.1:80")[0].Addr, Weight: 5, Zone: "a"},
		{Addr: set("192.0.2.2:80")[0].Addr, Weight: 1},
	}
	bad := func(e Endpoint) Snapshot { return Snapshot{Endpoints: []Endpoint{e}} }
	many := make([]Endpoint, flow.SetEndpoints+1)
	for i := range many {
		many[i] = Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 80), Weight: 1}
	}
	s := &scripted{runs: []func(context.Context, chan<- Snapshot) error{sends(
		Snapshot{Endpoints: mixed},
		bad(Endpoint{Addr: set("0.0.0.0:80")[0].Addr, Weight: 1}),
		bad(Endpoint{Addr: set("192.0.2.1:0")[0].Addr, Weight: 1}),
		bad(Endpoint{Addr: set("192.0.2.1:80")[0].Addr}),
		bad(Endpoint{Addr: set("192.0.2.1:80")[0].Addr, Weight: MaxWeight + 1}),
		bad(Endpoint{Weight: 1}),
		Snapshot{Endpoints: many},
	)}}
	keep(t, s, func(k *Keeper, _ func() []State) {
		after(time.Second)
		want := []Endpoint{mixed[1], mixed[2]}
		if diff := cmp.Diff(want, k.State().Endpoints, equal); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
		for i := range 6 {
			after(time.Second)
			if st := k.State(); st.Err == nil || st.Generation != 1 || st.Failures != uint64(i+1) {
				t.Errorf("bad set %d: %+v", i, st)
			}
		}
		if mixed[0].Addr.String() != "[::ffff:192.0.2.2]:80" {
			t.Error("the source's own set was changed")
		}
	})
}

func TestKeeperEndsWhileItWaits(t *testing.T) {
	fails := func(context.Context, chan<- Snapshot) error { return errors.New("no") }
	keep(t, &scripted{runs: []func(context.Context, chan<- Snapshot) error{fails}}, func(*Keeper, func() []State) { synctest.Wait() })
}
