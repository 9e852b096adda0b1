package direct

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// liveOf is how many connections a service has, by status.
func liveOf(t testing.TB, i *rig.Instance, name string) (live int) {
	t.Helper()
	all, _ := endpointsOf(t, i, name)
	for _, e := range all {
		live += int(e.Live)
	}
	return live
}

// TestCrash kills Pillion: connections and connects go on as before, over all
// endpoints, and who takes over knows of all of them.
func TestCrash(t *testing.T) {
	t.Parallel()
	const kept = 12
	r, program := rig.New(t), ends(t)
	r.Give(t, rig.Far4)
	r.Give(t, rig.Far6)
	serveEnds(t, r, program, ":8001", ":8002", ":8003")
	config := "path: direct\nservices:\n"
	vips := []netip.AddrPort{netip.AddrPortFrom(vip4, 80), netip.AddrPortFrom(vip6, 80)}
	far := map[netip.AddrPort]netip.Addr{vips[0]: rig.Far4, vips[1]: rig.Far6}
	for _, v := range vips {
		config += service(v, ", policy: round_robin", addrs(far[v], 8001, 8002, 8003)...)
	}
	i := r.Run(t, config)
	a := captive(t, r)
	open := func(from, to int) {
		for n := from; n < to; n++ {
			v := vips[n%2]
			a.wants("ok", "dial(%q, 80, %d)", v.Addr(), n)
			a.wants(v.Addr().String()+" 80", "peer(%d)", n)
		}
	}
	open(0, kept)
	i.Kill(t)
	for n := range kept {
		a.wants("hello", "ask(%d)", n)
	}
	open(kept, 2*kept) // nobody is there
	for n := range 2 * kept {
		a.wants("hello", "ask(%d)", n)
	}
	a.wants("None", "drop(0)") // of whose end nobody hears at the time
	i.Launch(t)
	for _, v := range vips {
		all, _ := endpointsOf(t, i, v.String())
		for _, e := range all {
			want := int64(kept / 3)
			if v == vips[0] && e.Live == want-1 {
				want-- // the one that was dropped
			}
			if e.Live != want || e.Connects != kept/3 || e.Failures != 0 {
				t.Errorf("service %s: %+v, want %d open and %d connects", v, e, want, kept/3)
			}
		}
	}
	flows, err := i.Flows(context.Background(), admin.FlowQuery{Live: true})
	if err != nil {
		t.Fatal(err)
	}
	bySource := map[string]flow.Record{}
	for _, f := range flows {
		if far[f.OrigDst].IsValid() && f.Endpoint.Addr() == far[f.OrigDst] && f.Path == flow.PathDirect && f.Reason == flow.ReasonService && f.Service == f.OrigDst.String() && f.Open {
			bySource[fmt.Sprintf("%s%d", f.OrigDst.Addr(), f.Source.Port())] = f
		} else {
			t.Errorf("%+v", f)
		}
	}
	for n := 1; n < 2*kept; n++ {
		key := vips[n%2].Addr().String() + a.do("source(%d)", n)
		if _, ok := bySource[key]; !ok {
			t.Errorf("connection %d is not among the live flows", n)
		}
	}
	if len(flows) != 2*kept-1 {
		t.Errorf("%d flows are live, want %d", len(flows), 2*kept-1)
	}
	for n := 1; n < 2*kept; n++ {
		a.wants("hello", "ask(%d)", n)
		a.wants("None", "drop(%d)", n)
	}
	for _, f := range i.Ended(t, 2*kept) { // what ended meanwhile is in the ring
		if f.Path != flow.PathDirect || f.End != flow.ReasonClosed || !far[f.OrigDst].IsValid() || f.Endpoint.Addr() != far[f.OrigDst] || f.Received < 5 {
			t.Errorf("%+v", f)
		}
	}
	testutil.Eventually(t, rig.Limit, func() bool {
		return liveOf(t, i, vips[0].String()) == 0 && liveOf(t, i, vips[1].String()) == 0
	}, "nobody is connected")
}

// TestCrashSwap kills Pillion while it publishes, over and over: no connection
// fails or goes to half an endpoint, and the next start publishes what the
// configuration says.
func TestCrashSwap(t *testing.T) {
	const rounds = 20
	s := newSwapped(t)
	s.write(t, s.sets[0])
	i := s.run(t)
	l := press(t, s.Rig, s.program, 1, s.service)
	for round := range rounds {
		swapped := make(chan int)
		go func() {
			n := 0
			defer func() { swapped <- n }()
			for {
				s.write(t, s.sets[n%2])
				if _, err := i.Reload(context.Background()); err != nil {
					return // it is dead
				}
				n++
			}
		}()
		// At any moment of a reload.
		time.Sleep(30*time.Millisecond + time.Duration(rand.IntN(20_000))*time.Microsecond)
		i.Kill(t)
		n := <-swapped
		set := s.sets[round%2]
		s.write(t, set)
		i.Launch(t)
		for range 5 {
			if x := explained(t, i, s.service.String()); !slices.Contains(set, x.Pick) || x.Path != flow.PathDirect {
				t.Errorf("round %d, after %d swaps: %s by %s, want one of %v", round, n, x.Pick, x.Path, set)
			}
		}
	}
	conns := l.end()
	t.Logf("%d connections", conns)
	if conns < 10*rounds {
		t.Errorf("only %d connections in %d rounds", conns, rounds)
	}
	to := s.only(t)
	for _, e := range slices.Concat(s.sets[0], s.sets[1]) {
		if to[e] == 0 {
			t.Errorf("nobody went to %s", e)
		}
	}
	// Of who is not in the set, nothing stays.
	testutil.Eventually(t, rig.Limit, func() bool { return liveOf(t, i, s.service.String()) == 0 }, "nobody is connected")
}

// TestCrashServices kills Pillion while services come and go: none is ever mistaken
// for another.
func TestCrashServices(t *testing.T) {
	const rounds, services = 6, 8
	s := newSwapped(t)
	at := func(n int) netip.AddrPort { return netip.AddrPortFrom(vip4, uint16(1000+n)) }
	write := func(has func(n int) bool) {
		t.Helper()
		text := "path: direct\nservices:\n" + service(s.service, "", s.sets[0]...)
		for n := range services {
			if has(n) {
				text += service(at(n), "", addrs(netip.AddrFrom4([4]byte{10, 50, byte(n), 1}), 80, 81)...)
			}
		}
		replace(t, s.config, text)
	}
	some := func(int) bool { return rand.IntN(2) == 0 }
	write(some)
	i := s.run(t)
	own := func(when string) {
		t.Helper()
		for n := range services {
			x := explained(t, i, at(n).String())
			if x.Reason == flow.ReasonService && (!x.Pick.IsValid() || x.Pick.Addr().As4()[2] != byte(n)) {
				t.Errorf("%s: service %d goes to %s", when, n, x.Pick)
			}
		}
		if x := explained(t, i, s.service.String()); !slices.Contains(s.sets[0], x.Pick) {
			t.Errorf("%s: the service that stays goes to %s", when, x.Pick)
		}
	}
	l := press(t, s.Rig, s.program, 1, s.service)
	for round := range rounds {
		dead := make(chan struct{})
		go func() {
			defer close(dead)
			for {
				write(some)
				if _, err := i.Reload(context.Background()); err != nil {
					return
				}
			}
		}()
		time.Sleep(30*time.Millisecond + time.Duration(rand.IntN(30_000))*time.Microsecond)
		own(fmt.Sprint("round ", round))
		i.Kill(t)
		<-dead
		write(func(n int) bool { return n%2 == round%2 })
		i.Launch(t)
		own(fmt.Sprint("after round ", round))
		for n := range services {
			if x := explained(t, i, at(n).String()); (x.Reason == flow.ReasonService) != (n%2 == round%2) {
				t.Errorf("after round %d: service %d is %s", round, n, x.Reason)
			}
		}
	}
	if l.end() == 0 {
		t.Error("there was no load")
	}
}
