package main

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/cmd/pillion/config"
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
	left      = netip.MustParseAddrPort("10.1.0.9:80")
)

// testKnowledge has something of everybody about two endpoints and one that was
// removed.
func testKnowledge() *knowledge {
	return &knowledge{
		endpoints: []discover.Endpoint{{Addr: endpoint1, Weight: 2, Zone: "a"}, {Addr: endpoint2, Weight: 1}},
		kernel: []loader.EndpointState{
			{Addr: endpoint1, InSet: true, Live: 3, Connects: 10, Failed: 4, Ejections: 1, Ejected: time.Second, Last: flow.ReasonDialTimeout},
			{Addr: endpoint2, InSet: true, Down: true},
			{Addr: left, Live: 5, Connects: 6, Ejected: time.Second},
			{Addr: netip.MustParseAddrPort("10.1.0.8:80"), Connects: 7}, // nobody is there any more
		},
		handler: []upstream.EndpointState{
			{Addr: endpoint1, Live: 1, Connects: 20, Failures: 2, Ejections: 3, ConnectTime: time.Millisecond, LastReason: flow.ReasonDialRefused},
			{Addr: endpoint2, Ejected: true, LastReason: flow.ReasonDialUnreachable},
			{Addr: left, Live: 1},
			{Addr: netip.MustParseAddrPort("10.1.0.7:80"), Connects: 7}, // nor here
		},
		checks: []check.Status{
			{Addr: endpoint1, State: check.StateUp, Err: "slow"},
			{Addr: endpoint2, State: check.StateDown, Err: "status 500"},
			{Addr: left, State: check.StateDown},
		},
	}
}

func TestServiceStatus(t *testing.T) {
	c := config.Default()
	c.Zone, c.Path = "a", config.PathDirect
	c.Services = []config.Service{{Name: "web", Addr: netip.MustParseAddrPort("10.96.0.12:80"), Policy: flow.PolicyMaglev, OnRemove: config.OnRemoveKeep}}
	s := &c.Services[0]
	got := serviceStatus(&c, s, testKnowledge())
	want := []admin.EndpointStatus{
		{
			Address: "10.1.0.1:80", Weight: 2, Zone: "a", Local: true, State: admin.EndpointEjected, Ejected: true,
			Live: 4, Connects: 30, Failures: 6, LastReason: flow.ReasonDialTimeout, CheckError: "slow",
		},
		{
			Address: "10.1.0.2:80", Weight: 1, State: admin.EndpointDown, Down: true,
			LastReason: flow.ReasonDialUnreachable, CheckError: "status 500",
		},
		{Address: "10.1.0.9:80", State: admin.EndpointRemoved, Ejected: true, Live: 6, Connects: 6},
	}
	if diff := cmp.Diff(want, got.Endpoints); diff != "" {
		t.Errorf("direct: want -, got +:\n%s", diff)
	}
	if got.Path != flow.PathDirect || got.PathAsked != "direct" || got.Policy != "maglev" || got.Source != (admin.SourceStatus{Kind: admin.SourceStatic}) {
		t.Errorf("%+v", got)
	}

	// On relay it is the handler that ejects.
	s.Path = config.PathRelay
	got = serviceStatus(&c, s, testKnowledge())
	want[0].State, want[0].Ejected, want[0].LastReason = admin.EndpointAvailable, false, flow.ReasonDialRefused
	want[1].Ejected, want[2].Ejected = true, false
	if diff := cmp.Diff(want, got.Endpoints); diff != "" {
		t.Errorf("relay: want -, got +:\n%s", diff)
	}
	if len(got.Why) == 0 || got.Path != flow.PathRelay || got.PathAsked != "relay" {
		t.Errorf("%+v", got)
	}
	// Nothing known is no endpoint, and not null in JSON.
	if got := serviceStatus(&c, s, &knowledge{}); got.Endpoints == nil || len(got.Endpoints) != 0 {
		t.Errorf("%+v", got.Endpoints)
	}
}

func TestEndpointStats(t *testing.T) {
	c := config.Default()
	s := &config.Service{Name: "web", Addr: netip.MustParseAddrPort("10.96.0.12:80"), Path: config.PathDirect}
	want := []metrics.EndpointStats{
		{
			Cluster: "web", Addr: "10.1.0.1:80", Weight: 2, Zone: "a", Path: flow.PathDirect, Ejected: true,
			Live: 4, Connects: 30, Failures: 6, Ejections: 4, ConnectTime: time.Millisecond,
		},
		{Cluster: "web", Addr: "10.1.0.2:80", Weight: 1, Path: flow.PathDirect, Down: true},
		{Cluster: "web", Addr: "10.1.0.9:80", Path: flow.PathDirect, Ejected: true, Live: 6, Connects: 6},
	}
	if diff := cmp.Diff(want, endpointStats(&c, s, testKnowledge())); diff != "" {
		t.Errorf("want -, got +:\n%s", diff)
	}
}

func TestSourceStatus(t *testing.T) {
	now := testNow
	failed := errors.New("no answer")
	for _, tt := range []struct {
		discover *config.Discover
		state    *discover.State
		want     admin.SourceStatus
	}{
		{nil, nil, admin.SourceStatus{Kind: "static"}},
		{&config.Discover{File: "e.json"}, &discover.State{}, admin.SourceStatus{Kind: "file", Name: "e.json", Stale: true}},
		{&config.Discover{DNS: &config.DNS{Name: "web.example"}}, &discover.State{Generation: 1, Since: now}, admin.SourceStatus{Kind: "dns", Name: "web.example", Updated: now}},
		{
			&config.Discover{Kubernetes: &config.KubernetesService{Namespace: "shop", Name: "web", Port: "http"}},
			&discover.State{Generation: 2, Since: now, Err: failed},
			admin.SourceStatus{Kind: "kubernetes", Name: "shop/web:http", Updated: now, Stale: true, Error: "no answer"},
		},
		{
			&config.Discover{Kubernetes: &config.KubernetesService{Namespace: "shop", Name: "web"}}, &discover.State{Err: failed},
			admin.SourceStatus{Kind: "kubernetes", Name: "shop/web", Stale: true, Error: "no answer"},
		},
	} {
		if diff := cmp.Diff(tt.want, sourceStatus(&config.Service{Discover: tt.discover}, tt.state)); diff != "" {
			t.Errorf("want -, got +:\n%s", diff)
		}
	}
}

func TestDiscoveryStats(t *testing.T) {
	s := &config.Service{Name: "web", Discover: &config.Discover{File: "e.json"}}
	asked, now := testNow.Add(-time.Hour), testNow
	for name, tt := range map[string]struct {
		state discover.State
		want  metrics.DiscoveryStats
	}{
		"good": {
			discover.State{Generation: 3, Since: now, Failures: 2, Endpoints: make([]discover.Endpoint, 4)},
			metrics.DiscoveryStats{Changes: 3, Errors: 2, Endpoints: 4},
		},
		"stale": {
			discover.State{Generation: 3, Since: now.Add(-time.Minute), Err: errors.New("x"), Failures: 1},
			metrics.DiscoveryStats{Changes: 3, Errors: 1, Stale: true, Age: time.Minute},
		},
		"never": {discover.State{Err: errors.New("x"), Failures: 1}, metrics.DiscoveryStats{Errors: 1, Stale: true, Age: time.Hour}},
	} {
		tt.want.Service, tt.want.Source = "web", "file"
		if diff := cmp.Diff(tt.want, discoveryStats(s, &tt.state, asked, now)); diff != "" {
			t.Errorf("%s: want -, got +:\n%s", name, diff)
		}
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
