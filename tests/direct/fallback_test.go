package direct

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// patience is how long an application waits that may have come to a handler
// which does not run.
const patience = 3 * time.Second

// fallen is a world with services on relay, at addresses that exist nowhere, whose
// handler is about to fail.
type fallen struct {
	*world
	*rig.Instance
	open, closed, unnamed []netip.AddrPort // destinations, a mapped one with them
}

func newFallen(t *testing.T) *fallen {
	t.Helper()
	f := &fallen{world: newWorld(t)}
	config := "services:\n"
	for _, a := range []struct{ far, vip netip.Addr }{
		{rig.Far4, netip.MustParseAddr("10.96.0.12")},
		{rig.Far6, netip.MustParseAddr("fd00:96::12")},
	} {
		unnamed := f.Serve(t, netip.AddrPortFrom(a.far, 7000), echo)
		one, two := f.Serve(t, netip.AddrPortFrom(a.far, 7001), echo), f.Serve(t, netip.AddrPortFrom(a.far, 7002), echo)
		open, closed := netip.AddrPortFrom(a.vip, 80), netip.AddrPortFrom(a.vip, 81)
		config += service(open, "", one, two) + service(closed, ", on_failure: closed", one, two)
		f.unnamed, f.open, f.closed = append(f.unnamed, unnamed), append(f.open, open), append(f.closed, closed)
		if a.far.Is4() {
			f.unnamed, f.open, f.closed = append(f.unnamed, mapped(unnamed)), append(f.open, mapped(open)), append(f.closed, mapped(closed))
		}
	}
	f.Instance = f.with(t, config)
	return f
}

// serves has applications connect to everything once.
func (f *fallen) serves(t *testing.T, closed string) {
	t.Helper()
	for n := range f.open {
		f.wants(t, f.open[n], talk+" peer", fmt.Sprintf("%s, peer=0 %s %d", talked, f.open[n].Addr(), f.open[n].Port()))
		f.wants(t, f.unnamed[n], talk, talked)
		steps := talk
		if closed != talked {
			steps = "connect"
		}
		f.wants(t, f.closed[n], steps, closed)
	}
}

// churn has applications connect, to services and past them, until it is ended.
type churn struct {
	stop    chan struct{}
	running sync.WaitGroup
	mu      sync.Mutex
	made    int
	failed  []string
}

func (f *fallen) churn() *churn {
	l := &churn{stop: make(chan struct{})}
	for n := range f.open {
		for _, to := range []netip.AddrPort{f.open[n], f.unnamed[n]} {
			l.running.Go(func() { l.connect(f.world, to) })
		}
	}
	return l
}

func (l *churn) connect(w *world, to netip.AddrPort) {
	for {
		select {
		case <-l.stop:
			return
		default:
		}
		saw, err := w.run(appLimit, to, talk)
		l.mu.Lock()
		l.made++
		if saw != talked || err != nil {
			l.failed = append(l.failed, fmt.Sprintf("%s: %s, %v", to, saw, err))
		}
		l.mu.Unlock()
	}
}

// end fails the test if a connect failed, or an echo.
func (l *churn) end(t *testing.T) {
	t.Helper()
	close(l.stop)
	l.running.Wait()
	if l.made == 0 || len(l.failed) > 0 {
		t.Errorf("%d of %d connections failed: %v", len(l.failed), l.made, l.failed)
	}
	t.Logf("%d connections", l.made)
}

// relays waits until everything goes by the handler again.
func (f *fallen) relays(t *testing.T) {
	t.Helper()
	for _, to := range slices.Concat(f.open, f.unnamed) {
		testutil.Eventually(t, rig.Limit, func() bool {
			f.wants(t, to, talk, talked)
			return f.last(t, to).Path == flow.PathRelay
		}, to, " is relayed again")
	}
}

// last is the record of the youngest connection to an address that has ended.
func (f *fallen) last(t *testing.T, to netip.AddrPort) (last flow.Record) {
	t.Helper()
	all, err := f.Flows(context.Background(), admin.FlowQuery{})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range all {
		if r.OrigDst == netip.AddrPortFrom(to.Addr().Unmap(), to.Port()) && r.Start.After(last.Start) {
			last = r
		}
	}
	return last
}

// fell fails the test unless there are records of connections that went around
// the handler, as they should, for one of the reasons.
func (f *fallen) fell(t *testing.T, reasons ...flow.Reason) {
	t.Helper()
	type kind struct {
		path flow.Path
		end  flow.Reason
	}
	want := map[netip.AddrPort]kind{}
	for n := range f.open {
		at := func(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
		want[at(f.open[n])] = kind{flow.PathDirect, flow.ReasonClosed}
		want[at(f.unnamed[n])] = kind{flow.PathPass, flow.ReasonClosed}
		want[at(f.closed[n])] = kind{path: flow.PathDeny}
	}
	found := map[netip.AddrPort]int{}
	testutil.Eventually(t, rig.Limit, func() bool {
		clear(found)
		all, err := f.Flows(context.Background(), admin.FlowQuery{})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range all {
			k, ok := want[r.OrigDst]
			if !ok || r.Path == flow.PathRelay {
				continue
			}
			if k.path == flow.PathDeny {
				k.end = r.Reason
			}
			if !slices.Contains(reasons, r.Reason) || r.Path != k.path || r.End != k.end || k.path == flow.PathDirect && r.Endpoint.Port() != 7001 && r.Endpoint.Port() != 7002 {
				t.Fatalf("%s, want %s, %s, for one of %v: %+v", r.OrigDst, k.path, k.end, reasons, r)
			}
			found[r.OrigDst]++
		}
		return len(found) == len(want)
	}, "records of what went around the handler, so far ", found)
}

// TestHandlerKilled kills the handler. What it carried the kernel carries until
// it is back, and not one connect fails meanwhile.
func TestHandlerKilled(t *testing.T) {
	t.Parallel()
	f := newFallen(t)
	f.serves(t, talked)
	f.Kill(t)
	l := f.churn()
	f.serves(t, refused)
	f.serves(t, refused)
	f.Launch(t)
	f.relays(t)
	l.end(t)
	f.serves(t, talked)
	// A while later the heartbeat is old, too.
	f.fell(t, flow.ReasonHandlerAbsent, flow.ReasonHandlerStale)
	f.Idle(t)
	nobody(t, f.Instance)
}

// TestHandlerStopped stops the handler, which is noticed a moment later.
func TestHandlerStopped(t *testing.T) {
	t.Parallel()
	f := newFallen(t)
	f.serves(t, talked)
	f.Halt(t)
	testutil.Eventually(t, rig.Limit, func() bool {
		saw, err := f.run(patience, f.open[0], talk)
		return err == nil && saw == talked
	}, "it is seen that the handler is stopped")
	l := f.churn()
	f.serves(t, refused)
	f.serves(t, refused)
	f.Signal(t, unix.SIGCONT)
	f.relays(t)
	l.end(t)
	f.serves(t, talked)
	f.fell(t, flow.ReasonHandlerStale, flow.ReasonHandlerBusy)
	f.Idle(t)
	nobody(t, f.Instance)
}

// TestOnlyTheHandler: what a connect hook cannot dial is the handler's alone. Such
// endpoints are no mistake, and without the handler their service goes by
// on_failure.
func TestOnlyTheHandler(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	// Who passes comes here.
	other := w.Serve(t, netip.AddrPortFrom(rig.Far4, 7000), answer("the destination's own"))
	far6 := w.Serve(t, netip.AddrPortFrom(rig.Far6, 7001), answer("handler's"))
	link := netip.MustParseAddrPort("[fe80::7%lo]:7001")
	alone := netip.AddrPortFrom(rig.Far6, 7002)
	i := w.with(t, "services:\n"+service(other, "", far6)+service(alone, "", link))
	says := func(want string) {
		t.Helper()
		w.wants(t, other, "connect recv", "connect=0, recv="+fmt.Sprint(len(want))+" "+want)
	}
	says("handler's")
	i.Kill(t)
	testutil.Eventually(t, rig.Limit, func() bool {
		saw, err := w.run(patience, other, "connect recv")
		return err == nil && strings.Contains(saw, "own")
	}, "connections pass")
	i.Launch(t)
	says("handler's")
}
