package check

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// fake is a checker whose endpoints answer as a function says, on a fake clock.
func fake(probe func(ctx context.Context, t Target) error) (*Checker, *reports) {
	r := &reports{}
	random := rand.New(rand.NewPCG(1, 2))
	c := New(Options{Report: r.add, Random: random.Uint64})
	c.probe = probe
	return c, r
}

func TestThresholds(t *testing.T) {
	for name, tt := range map[string]struct {
		results string // + well, - not, ? a failure of our own
		want    []State
		against int
	}{
		"the first decides":         {"+", []State{StateUp}, 0},
		"also when it fails":        {"-", []State{StateDown}, 0},
		"one failure is not enough": {"+--", []State{StateUp}, 2},
		"three are":                 {"+---", []State{StateUp, StateDown}, 0},
		"but in a row":              {"+--+--+--", []State{StateUp}, 2},
		"one success is not enough": {"-+", []State{StateDown}, 1},
		"two are":                   {"-++", []State{StateDown, StateUp}, 0},
		"two in a row":              {"-+-+-+-", []State{StateDown}, 0},
		"once per change":           {"+++++-----++++", []State{StateUp, StateDown, StateUp}, 0},
		"our own say nothing":       {"????", nil, 0},
		"and do not interrupt":      {"+-?-?-", []State{StateUp, StateDown}, 0},
		"nor decide first":          {"?-", []State{StateDown}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var n int
				c, r := fake(func(context.Context, Target) error {
					n++
					switch result := tt.results[min(n, len(tt.results))-1]; result {
					case '-':
						return errProbe
					case '?':
						return own(errProbe)
					default:
						return nil
					}
				})
				set(t, c, targets(1, spec(time.Second))...)
				stop := run(t, c)
				time.Sleep(time.Duration(len(tt.results)) * time.Second)
				stop()
				if n != len(tt.results) {
					t.Fatalf("%d checks, want %d", n, len(tt.results))
				}
				if diff := cmp.Diff(tt.want, r.of(addr(0))); diff != "" {
					t.Errorf("reports (-want +got):\n%s", diff)
				}
				s := status(t, c, addr(0))
				last := StateUnknown
				if len(tt.want) > 0 {
					last = tt.want[len(tt.want)-1]
				}
				if s.State != last || s.Against != tt.against {
					t.Errorf("state %s with %d against it, want %s with %d", s.State, s.Against, last, tt.against)
				}
				passed, failed := strings.Count(tt.results, "+"), strings.Count(tt.results, "-")
				if s.Passed != uint64(passed) || s.Failed != uint64(failed) {
					t.Errorf("%d passed, %d failed, want %d and %d", s.Passed, s.Failed, passed, failed)
				}
				if good := strings.HasSuffix(tt.results, "+"); good != (s.Err == "") {
					t.Errorf("the last error is %q", s.Err)
				}
			})
		})
	}
}

func TestStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := fake(func(_ context.Context, t Target) error {
			time.Sleep(30 * time.Millisecond)
			if t.Cluster == "b" {
				return errProbe
			}
			return nil
		})
		s := spec(time.Second)
		start := time.Now()
		set(t, c,
			Target{Cluster: "b", Addr: addr(1), Spec: s}, Target{Cluster: "a", Addr: addr(2), Spec: s}, Target{Cluster: "a", Addr: addr(1), Spec: s},
			Target{Cluster: "a", Addr: netip.MustParseAddrPort("[::ffff:192.0.0.3]:80"), Spec: s})
		if s := status(t, c, addr(1)); s.State != StateUnknown || !s.Checked.IsZero() {
			t.Errorf("before the first check: %+v", s)
		}
		run(t, c)
		time.Sleep(time.Second + 100*time.Millisecond)
		got := c.States()
		for i, s := range got {
			if s.Checked.Before(start) || s.Since.Before(start) || s.Since.After(s.Checked) || s.Checked.After(time.Now()) {
				t.Errorf("%+v has moments that cannot be", s)
			}
			got[i].Checked, got[i].Since = time.Time{}, time.Time{}
		}
		const latency = 30 * time.Millisecond
		want := []Status{
			{Cluster: "a", Addr: addr(1), State: StateUp, Latency: latency, Passed: 1},
			{Cluster: "a", Addr: addr(2), State: StateUp, Latency: latency, Passed: 1},
			{Cluster: "a", Addr: addr(3), State: StateUp, Latency: latency, Passed: 1},
			{Cluster: "b", Addr: addr(1), State: StateDown, Latency: latency, Err: "not well", Failed: 1},
		}
		if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

// starts runs one target for a while and returns when its checks began.
func starts(t *testing.T, s Spec, checks int, takes time.Duration, result error) []time.Duration {
	t.Helper()
	var all []time.Duration
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		done := make(chan struct{})
		c, _ := fake(func(context.Context, Target) error {
			all = append(all, time.Since(begin))
			time.Sleep(takes)
			if len(all) == checks {
				close(done)
			}
			return result
		})
		set(t, c, targets(1, s)...)
		run(t, c)
		<-done
	})
	return all
}

func TestInterval(t *testing.T) {
	for name, tt := range map[string]struct {
		takes, want time.Duration
		result      error
	}{
		"quick":      {0, time.Second, nil},
		"slow":       {900 * time.Millisecond, time.Second, nil},
		"failing":    {time.Millisecond, time.Second, errProbe},
		"our own":    {time.Millisecond, time.Second, own(errProbe)},
		"no overlap": {1500 * time.Millisecond, 1500 * time.Millisecond, nil},
	} {
		t.Run(name, func(t *testing.T) {
			at := starts(t, spec(time.Second), 20, tt.takes, tt.result)
			if at[0] > time.Second {
				t.Errorf("the first check began after %s", at[0])
			}
			for i := 1; i < len(at); i++ {
				if got := at[i] - at[i-1]; got != tt.want {
					t.Errorf("check %d began %s after the one before, want %s", i, got, tt.want)
				}
			}
		})
	}
}

func TestJitter(t *testing.T) {
	for _, percent := range []int{10, 100} {
		s := spec(time.Second)
		s.Jitter = percent
		const n = 1001
		at := starts(t, s, n, 0, nil)
		least, most := time.Duration(1<<62), time.Duration(0)
		for i := 1; i < n; i++ {
			least, most = min(least, at[i]-at[i-1]), max(most, at[i]-at[i-1])
		}
		swing := time.Second / 100 * time.Duration(percent)
		if least < time.Second-swing || most > time.Second+swing {
			t.Errorf("%d percent: waits from %s to %s", percent, least, most)
		}
		if most-least < swing*18/10 {
			t.Errorf("%d percent: waits only from %s to %s", percent, least, most)
		}
		// The standard deviation of the mean is below 2 percent of the swing.
		if mean := (at[n-1] - at[0]) / (n - 1); mean < time.Second-swing/10 || mean > time.Second+swing/10 {
			t.Errorf("%d percent: %s on average", percent, mean)
		}
	}
}

// TestSpread: the first checks are spread over the interval, also when the set is
// older than Run.
func TestSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n, parts = 5000, 10
		var mu sync.Mutex
		var counts [parts]int
		var begin time.Time
		c, r := fake(func(context.Context, Target) error {
			mu.Lock()
			defer mu.Unlock()
			counts[min(int(time.Since(begin)*parts/(10*time.Second)), parts-1)]++
			return nil
		})
		set(t, c, targets(n, spec(10*time.Second))...)
		time.Sleep(time.Hour)
		begin = time.Now()
		stop := run(t, c)
		time.Sleep(10 * time.Second)
		stop()
		if got := r.count(); got != n {
			t.Errorf("%d of %d were checked", got, n)
		}
		for i, got := range counts {
			// Six standard deviations are 130.
			if got < n/parts-130 || got > n/parts+130 {
				t.Errorf("part %d of the interval has %d of %d checks", i, got, n)
			}
		}
	})
}

// TestBounds: 10,000 endpoints that are silent, and 1,000 commands that hang,
// take neither more goroutines nor more turns than they may.
func TestBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var now, most [2]atomic.Int64
		var goroutines atomic.Int64
		c, r := fake(func(ctx context.Context, t Target) error {
			lane := 0
			if t.Spec.Kind == KindCommand {
				lane = 1
			}
			storeMax(&most[lane], now[lane].Add(1))
			storeMax(&goroutines, int64(runtime.NumGoroutine()))
			<-ctx.Done()
			now[lane].Add(-1)
			return errProbe
		})
		plain, command := spec(10*time.Second), spec(10*time.Second)
		plain.Timeout, command.Timeout = 100*time.Millisecond, 10*time.Second
		command.Kind, command.Command = KindCommand, []string{"true"}
		all := targets(10000, plain)
		for _, target := range targets(1000, command) {
			target.Cluster = "commands"
			all = append(all, target)
		}
		set(t, c, all...)
		before := int64(runtime.NumGoroutine())
		stop := run(t, c)
		// 128 at once, each 100 ms: 10,000 are done in 7.8 s of work.
		time.Sleep(20 * time.Second)
		stop()
		if a, b := most[0].Load(), most[1].Load(); a != 128 || b != 16 {
			t.Errorf("%d and %d at once, want 128 and 16", a, b)
		}
		if extra := goroutines.Load() - before; extra > 128+16+10 {
			t.Errorf("%d goroutines", extra)
		}
		if n := r.count(); n < 10000 {
			t.Errorf("%d reports: the commands kept the others waiting", n)
		}
	})
}

func storeMax(a *atomic.Int64, n int64) {
	for old := a.Load(); n > old; old = a.Load() {
		if a.CompareAndSwap(old, n) {
			return
		}
	}
}

// TestOverload: when more is due than may run, all are late alike, and it is
// logged once; it is logged again when that is over.
func TestOverload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		checks := map[netip.AddrPort]int{}
		var slow atomic.Bool
		slow.Store(true)
		c, _ := fake(func(_ context.Context, t Target) error {
			if slow.Load() {
				time.Sleep(time.Second)
			}
			mu.Lock()
			defer mu.Unlock()
			checks[t.Addr]++
			return nil
		})
		var log bytes.Buffer
		c.o.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelWarn}))
		c.lanes[0].most = 10
		set(t, c, targets(100, spec(time.Second))...)
		stop := run(t, c)
		time.Sleep(200 * time.Second) // of 20,000 checks 2,000 fit
		mu.Lock()
		least, most := 1<<30, 0
		for _, n := range checks {
			least, most = min(least, n), max(most, n)
		}
		if len(checks) != 100 || most-least > 1 {
			t.Errorf("%d endpoints had from %d to %d checks", len(checks), least, most)
		}
		mu.Unlock()
		if n := strings.Count(log.String(), "health checks are late"); n != 1 {
			t.Errorf("it was said %d times:\n%s", n, &log)
		}
		slow.Store(false)
		time.Sleep(30 * time.Second)
		slow.Store(true)
		time.Sleep(60 * time.Second)
		stop()
		if n := strings.Count(log.String(), "health checks are late"); n != 2 {
			t.Errorf("it was said %d times, want a second one:\n%s", n, &log)
		}
	})
}

func TestOwnErrors(t *testing.T) {
	err := own(errProbe)
	if !isOwn(err) || !errors.Is(err, errProbe) || isOwn(errProbe) {
		t.Error("an error of our own cannot be told from others")
	}
}
