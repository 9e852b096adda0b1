package bpf

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/balance"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// TestHashOfSource: by its source a connection goes where the handler would send it,
// wherever the kernel side knows the source from.
func TestHashOfSource(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.serve(t)
	for id, family := range []struct{ service, endpoint, slots, named, bound string }{
		{"10.96.0.12:80", "192.0.2.%d:80", "192.0.2.201", "192.0.2.202", "127.0.0.9"},
		{"[2001:db8::12]:80", "[2001:db8:2::%d]:80", "2001:db8:1::c9", "2001:db8:1::ca", "2001:db8:1::cb"},
	} {
		service := netip.MustParseAddrPort(family.service)
		h.service(t, family.service, Service{Id: uint32(id), Path: uint8(PathDirect)})
		var list []balance.Endpoint
		for n := range 50 {
			list = append(list, balance.Endpoint{Addr: netip.MustParseAddrPort(fmt.Sprintf(family.endpoint, n+1)), Weight: 1})
		}
		s, _ := balance.Arrange(flow.PolicyMaglev, "", list)
		h.write(t, uint32(id), uint32(100*(id+1)), &s, [2]uint32{})
		super := PrefixKey{Prefixlen: 96 + 10, Addr: abiIpAddr(FromAddr(netip.MustParseAddr("240.0.0.0")))}
		to := PrefixKey{Prefixlen: 128, Addr: abiIpAddr(FromAddr(service.Addr()))}
		if service.Addr().Is6() {
			super = PrefixKey{Prefixlen: 48, Addr: abiIpAddr(FromAddr(netip.MustParseAddr("fd70:696c:6c69::")))}
		}
		h.put(t, "routes", super, Route{Kind: RouteUnicast, Source: abiIpAddr(FromAddr(netip.MustParseAddr(family.slots)))})
		h.put(t, "own_addrs", FromAddr(netip.MustParseAddr(family.bound)), uint32(1))
		for _, tt := range []struct{ named, bound, want string }{
			{"", "", family.slots},
			{family.named, "", family.named},
			{family.named, family.bound, family.bound},
		} {
			q := DryRun{Dst: abiIpAddr(FromAddr(service.Addr())), Port: service.Port(), Seed: 1}
			way := Route{Kind: RouteUnicast}
			if tt.named != "" {
				way.Source = abiIpAddr(FromAddr(netip.MustParseAddr(tt.named)))
			}
			h.put(t, "routes", to, way)
			if tt.bound != "" {
				q.Bound = abiIpAddr(FromAddr(netip.MustParseAddr(tt.bound)))
			}
			var turns balance.Turns
			want := balance.Pick(&s, s.Spill, &turns, &twin{&s, make([]Endpoint, len(list)), 0}, flow.Hash(netip.MustParseAddr(tt.want), 0))
			if got := h.ask(t, q); got.Path != uint8(flow.PathDirect) || int(got.Index) != want {
				t.Errorf("%s from %s: %+v, want number %d", service, tt.want, got, want)
			}
		}
	}
}

// TestReused: what was put off does not keep its endpoint's number from another one,
// which hears nothing of it.
func TestReused(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.services(t)
	h.network(t)
	other := EndpointName{Addr: abiIpAddr(FromAddr(netip.MustParseAddr("192.0.2.9"))), Set: 7, Port: 80, Weight: 1}
	const nowhere = "10.96.0.13:80"
	h.service(t, nowhere, Service{Id: 3, Path: uint8(PathDirect)})
	h.publish(t, 3, healthy, 0, 30, []endpointOf{{"203.0.113.7:80", 1}}, []uint32{0})
	h.put(t, "routes", PrefixKey{Prefixlen: 96 + 24, Addr: abiIpAddr(FromAddr(netip.MustParseAddr("203.0.113.0")))}, Route{Kind: RouteNone})

	a := h.start(t, "new=4", "defer="+asked4, "wait", "write", "peer", "wait", "drop", "new=4", "again="+nowhere, "wait", "drop")
	a.said(t, 2)
	h.put(t, "endpoint_names", uint32(10), other)
	a.write("\n")
	if said := a.said(t, 3); said[2] != "peer "+asked4 {
		t.Errorf("the application: %q", said)
	}
	if e := h.endpoint(t, 10); e != (Endpoint{}) {
		t.Errorf("put off: %+v", e)
	}
	a.write("\n")
	a.said(t, 4)
	h.put(t, "endpoint_names", uint32(30), other)
	a.write("\n")
	if err := a.cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	h.waitClosed(t)
	h.allFree(t)
	h.balanced(t)
	for _, id := range []uint32{10, 30} {
		if e := h.endpoint(t, id); e != (Endpoint{}) {
			t.Errorf("number %d is another's by now: %+v", id, e)
		}
	}
}

// TestTrialGivenBack: a connect that never leaves tells nothing of an endpoint, and does
// not keep it out for longer.
func TestTrialGivenBack(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.serve(t)
	h.network(t)
	const asked = "10.96.0.12:80"
	h.service(t, asked, Service{Id: 1, Path: uint8(PathDirect)})
	h.put(t, "own_addrs", FromAddr(netip.MustParseAddr("127.0.0.1")), uint32(1))
	config := healthy
	config.Failures, config.Base, config.Max, config.Panic = 1, 60_000, 600_000, 0
	h.publish(t, 1, config, 0, 100, []endpointOf{{"192.0.2.66:80", 1}}, []uint32{0})
	const bad = "bound=127.0.0.1," + asked
	for round, want := range map[uint16]uint16{1: 1, 5: 5} {
		h.put(t, "endpoints", uint32(100), Endpoint{Until: 1, Round: round})
		for range 3 {
			if said := h.steps(t, bad); said[0] != bad+" EINVAL" {
				t.Errorf("the application: %q", said)
			}
			var ts unix.Timespec
			if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
				t.Fatal(err)
			}
			now := uint64(ts.Nano())
			if e := h.endpoint(t, 100); e.Round != want || e.Until == 0 || e.Until > now || e.Until < now-uint64(10*time.Second) {
				t.Errorf("round %d: %+v at %d", round, e, now)
			}
		}
	}
	// Another's trial is not its to give back.
	h.put(t, "endpoints", uint32(100), Endpoint{})
	a := h.start(t, bad, "wait")
	a.said(t, 1)
	others := Endpoint{Until: 1 << 62, Round: 3}
	h.put(t, "endpoints", uint32(100), others)
	a.write("\n")
	if err := a.cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	h.allFree(t)
	if e := h.endpoint(t, 100); e != others {
		t.Errorf("another's trial: %+v, want %+v", e, others)
	}
}
