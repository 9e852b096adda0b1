package handler

import (
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
	"github.com/pillion-project/pillion/redirect/route"
	"github.com/pillion-project/pillion/redirect/upstream"
	"github.com/pillion-project/pillion/redirect/upstream/health"
)

// The dials of two workers end at once, the first without an answer: what is said
// last is what is so.
func TestUnavailableAndBack(t *testing.T) {
	t.Parallel()
	spec := upstream.ClusterSpec{Name: "web", Policy: flow.PolicyRoundRobin, Endpoints: []upstream.EndpointSpec{
		{Addr: netip.MustParseAddrPort("192.0.2.1:80"), Weight: 1},
	}}
	s, err := upstream.Build(nil, []upstream.ClusterSpec{spec}, upstream.Options{
		Health: health.Config{Failures: 1, Base: time.Hour, Max: time.Hour},
	})
	if err != nil {
		t.Fatal(err)
	}
	target := l4.Target{Cluster: s.Cluster("web")}
	target.Downstream.OrigDst.AddrPort = netip.MustParseAddrPort("10.0.0.1:80")
	endpoint := target.Cluster.Endpoints[0]
	endpoint.Begin()
	endpoint.Failed(flow.ReasonDialRefused)

	h := &Handler{without: map[netip.AddrPort]bool{}}
	table, err := route.NewTable([]route.Service{{Name: "web", Addr: target.Downstream.OrigDst.AddrPort, Cluster: target.Cluster}}, flow.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	h.SetTable(table)
	var told []time.Duration
	done := make(chan struct{})
	h.unavailable = func(_ netip.AddrPort, wait time.Duration) {
		told = append(told, wait)
		if len(told) > 1 {
			return
		}
		endpoint.Connected(0)
		go func() {
			defer close(done)
			h.dialed(&target)
		}()
		// It waits for this one to end, or else has passed by.
		select {
		case <-done:
		case <-time.After(50 * time.Millisecond):
		}
	}
	h.dialed(&target)
	<-done
	if n := len(told); n != 2 || told[0] <= 0 || told[1] != 0 {
		t.Errorf("told %v, want a wait and then that it is over", told)
	}
	if h.any.Load() || len(h.without) != 0 {
		t.Errorf("left: %v", h.without)
	}
}

// A reload that gives a service an endpoint, or takes the service away, ends its
// being unavailable: the connect hook lets nobody through who could find out.
func TestUnavailableUntilReload(t *testing.T) {
	t.Parallel()
	addr := func(i byte) netip.AddrPort { return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, i}), 80) }
	var snapshot *upstream.Snapshot
	table := func(endpoints map[byte]int) *route.Table {
		t.Helper()
		var specs []upstream.ClusterSpec
		for service, n := range endpoints {
			spec := upstream.ClusterSpec{Name: addr(service).String()}
			for i := range n {
				spec.Endpoints = append(spec.Endpoints, upstream.EndpointSpec{Addr: addr(byte(100 + i)), Weight: 1})
			}
			specs = append(specs, spec)
		}
		s, err := upstream.Build(snapshot, specs, upstream.Options{})
		if err != nil {
			t.Fatal(err)
		}
		snapshot = s
		var services []route.Service
		for service := range endpoints {
			services = append(services, route.Service{Addr: addr(service), Cluster: s.Cluster(addr(service).String())})
		}
		made, err := route.NewTable(services, flow.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		return made
	}
	h := &Handler{without: map[netip.AddrPort]bool{}}
	told := map[netip.AddrPort]time.Duration{}
	h.unavailable = func(service netip.AddrPort, wait time.Duration) { told[service] = wait }
	first := table(map[byte]int{1: 0, 2: 0, 3: 0, 4: 1})
	h.SetTable(first)
	var targets []l4.Target
	for _, s := range first.Services() {
		target := l4.Target{Cluster: s.Cluster}
		target.Downstream.OrigDst.AddrPort = s.Addr
		targets = append(targets, target)
		h.dialed(&target)
	}
	if len(told) != 3 || told[addr(1)] <= 0 || told[addr(2)] <= 0 || told[addr(3)] <= 0 {
		t.Fatalf("told %v, want a wait for three", told)
	}
	clear(told)
	h.SetTable(table(map[byte]int{1: 1, 3: 0, 4: 1}))
	if wait, ok := told[addr(1)]; !ok || wait != 0 || len(told) != 2 || told[addr(2)] != 0 {
		t.Errorf("told %v, want that two are over", told)
	}
	if !h.any.Load() || len(h.without) != 1 || !h.without[addr(3)] {
		t.Errorf("left: %v, want the one that has none still", h.without)
	}
	// The last dials by the old table end.
	clear(told)
	for i := range targets {
		h.dialed(&targets[i])
	}
	for service, wait := range told {
		if (wait > 0) != (service == addr(3)) {
			t.Errorf("told %v behind the reload", told)
		}
	}
	clear(told)
	h.SetTable(nil)
	if len(told) != 1 || h.any.Load() {
		t.Errorf("told %v, want that the last is over", told)
	}
}
