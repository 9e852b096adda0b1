package main

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream"
	"github.com/pillion-project/pillion/redirect/upstream/discover"
	"github.com/pillion-project/pillion/redirect/upstream/health/check"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/telemetry/metrics"
)

var (
	endpoint1 = netip.MustParseAddrPort("10.1.0.1:80")
	endpoint2 = netip.MustParseAddrPort("10.1.0.2:80")
	departure = netip.MustParseAddrPort("10.1.0.5:80")
	away      = netip.MustParseAddrPort("10.1.0.9:80")
)

// testKnowledge has something of everybody about two endpoints and one that was
// removed.
func testKnowledge() *knowledge {
	return &knowledge{
		endpoints: []discover.Endpoint{{Addr: endpoint1, Weight: 2, Zone: "a"}, {Addr: endpoint2, Weight: 1}},
		kernel: []loader.EndpointState{
			{Addr: endpoint1, InSet: true, Live: 3, Connects: 10, Failed: 4, Ejections: 1, Ejected: time.Second, Last: flow.ReasonDialTimeout},
			{Addr: endpoint2, InSet: true, Down: true},
			{Addr: away, Live: 5, Connects: 6, Ejected: time.Second},
			{Addr: netip.MustParseAddrPort("10.1.0.8:80"), Connects: 7}, // nobody is there any more
		},
		handler: []upstream.EndpointState{
			{Addr: endpoint1, Live: 1, Connects: 20, Failures: 2, Ejections: 3, ConnectTime: time.Millisecond, LastReason: flow.ReasonDialRefused},
			{Addr: endpoint2, Ejected: true, LastReason: flow.ReasonDialUnreachable},
			{Addr: away, Live: 1},
			{Addr: netip.MustParseAddrPort("10.1.0.7:80"), Connects: 7}, // nor here
		},
		departed: []upstream.EndpointState{
			{Addr: departure, Live: 2, Connects: 9},
			{Addr: endpoint2, Live: 1, Connects: 50},                    // it came back
			{Addr: netip.MustParseAddrPort("10.1.0.6:80"), Connects: 7}, // its last has ended
		},
		checks: []check.Status{
			{Addr: endpoint1, State: check.StateUp, Err: "slow", Passed: 3, Failed: 1},
			{Addr: endpoint2, State: check.StateDown, Err: "status 500"},
			{Addr: away, State: check.StateDown},
		},
	}
}

func TestEndpointStatus(t *testing.T) {
	statuses := func(path flow.Path) []admin.EndpointStatus {
		var all []admin.EndpointStatus
		for _, v := range testKnowledge().views(path) {
			all = append(all, v.status("a"))
		}
		return all
	}
	want := []admin.EndpointStatus{
		{
			Address: "10.1.0.1:80", Weight: 2, Zone: "a", Local: true, State: admin.EndpointEjected, Ejected: true,
			Live: 4, Connects: 30, Failures: 6, LastReason: flow.ReasonDialTimeout, CheckError: "slow", ChecksPassed: 3, ChecksFailed: 1,
		},
		{
			Address: "10.1.0.2:80", Weight: 1, State: admin.EndpointDown, Down: true,
			Live: 1, LastReason: flow.ReasonDialUnreachable, CheckError: "status 500",
		},
		{Address: "10.1.0.9:80", State: admin.EndpointRemoved, Ejected: true, Live: 6, Connects: 6},
		{Address: "10.1.0.5:80", State: admin.EndpointRemoved, Live: 2, Connects: 9},
	}
	if diff := cmp.Diff(want, statuses(flow.PathDirect)); diff != "" {
		t.Errorf("direct: want -, got +:\n%s", diff)
	}
	// On relay it is the handler that ejects.
	want[0].State, want[0].Ejected, want[0].LastReason = admin.EndpointAvailable, false, flow.ReasonDialRefused
	want[1].Ejected, want[2].Ejected = true, false
	if diff := cmp.Diff(want, statuses(flow.PathRelay)); diff != "" {
		t.Errorf("relay: want -, got +:\n%s", diff)
	}
	if got := (&knowledge{}).views(flow.PathDirect); len(got) != 0 {
		t.Errorf("of nothing: %+v", got)
	}
}

func TestEndpointStats(t *testing.T) {
	var got []metrics.EndpointStats
	for _, v := range testKnowledge().views(flow.PathDirect) {
		got = append(got, v.stats("web", flow.PathDirect))
	}
	want := []metrics.EndpointStats{
		{
			Cluster: "web", Addr: netip.MustParseAddrPort("10.1.0.1:80"), Weight: 2, Zone: "a", Path: flow.PathDirect, Ejected: true,
			Live: 4, Connects: 30, Failures: 6, Ejections: 4, ConnectTime: time.Millisecond,
		},
		{Cluster: "web", Addr: netip.MustParseAddrPort("10.1.0.2:80"), Weight: 1, Path: flow.PathDirect, Down: true, Live: 1},
		{Cluster: "web", Addr: netip.MustParseAddrPort("10.1.0.9:80"), Path: flow.PathDirect, Ejected: true, Live: 6, Connects: 6},
		{Cluster: "web", Addr: departure, Path: flow.PathDirect, Live: 2, Connects: 9},
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("want -, got +:\n%s", diff)
	}
}

func TestCheckStats(t *testing.T) {
	got := checkStats([]check.Status{
		{Cluster: "a", State: check.StateUp, Err: "slow"}, {Cluster: "a"}, {Cluster: "a", State: check.StateDown, Err: "refused"},
		{Cluster: "b", State: check.StateUp},
	})
	want := []metrics.CheckStats{{Cluster: "a", Up: 1, Unknown: 1, Down: 1, Failing: 2}, {Cluster: "b", Up: 1}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got := checkStats(nil); got != nil {
		t.Errorf("of nothing: %+v", got)
	}
}

// TestLeftOut: what the connect hook cannot dial does not look available, in listings
// nor in metrics.
func TestLeftOut(t *testing.T) {
	c, _ := crowd(t, 1)
	s := &c.services.services[0]
	s.endpoints = nil
	for _, a := range []string{"10.0.0.1:80", "[2001:db8::1]:80", "[fe80::1%eth0]:80"} {
		s.endpoints = append(s.endpoints, discover.Endpoint{Addr: netip.MustParseAddrPort(a), Weight: 1})
	}
	for path, want := range map[flow.Path][]string{
		flow.PathDirect: {"available", "left out (needs path: relay)", "left out (needs path: relay)"},
		flow.PathRelay:  {"available", "available", "available"},
	} {
		s.path = path
		var got []string
		for _, e := range c.serviceStatus()[0].Endpoints {
			got = append(got, stateText(&e))
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: want -, got +:\n%s", path, diff)
		}
		for n, e := range c.Endpoints() {
			if left := want[n] != "available"; e.LeftOut != left || e.Ejected || e.Down {
				t.Errorf("%s: the metrics of %s: %+v", path, e.Addr, e)
			}
		}
	}
}
