package main

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/balance"
	"github.com/pillion-project/pillion/redirect/upstream/health/check"
)

// TestSpillOf: how much leaves the zone goes by what a hook would pick, in panic too.
func TestSpillOf(t *testing.T) {
	var list []balance.Endpoint
	for n := range 5 {
		zone := "here"
		if n >= 3 {
			zone = "there"
		}
		list = append(list, balance.Endpoint{Addr: netip.MustParseAddrPort(fmt.Sprintf("192.0.2.%d:80", n)), Weight: 1, Zone: zone})
	}
	set, _ := balance.Arrange(flow.PolicyRandom, "here", list)
	for name, tt := range map[string]struct {
		failures, panic int
		ejected, down   []int
		want            uint32
	}{
		"all are well":                 {3, 50, nil, nil, 0},
		"nobody here":                  {3, 0, []int{0, 1, 2}, nil, flow.All},
		"just enough":                  {3, 40, []int{0, 1, 2}, nil, flow.All},
		"panic":                        {3, 41, []int{0, 1, 2}, nil, 0},
		"panic, and all here are down": {3, 100, []int{3}, []int{0, 1, 2}, flow.All},
		"nothing ejects any more":      {0, 0, []int{0, 1, 2}, nil, 0},
	} {
		set.Failures, set.Panic = tt.failures, tt.panic
		var states []loader.EndpointState
		for _, e := range list {
			states = append(states, loader.EndpointState{Addr: e.Addr, InSet: true})
		}
		for _, n := range tt.ejected {
			states[n].Ejected = time.Second
		}
		for _, n := range tt.down {
			states[n].Down = true
		}
		// One that has left, and is there still.
		states = append(states, loader.EndpointState{Addr: netip.MustParseAddrPort("192.0.2.9:80"), Ejected: time.Second})
		if got := spillOf(&set, states); got != tt.want {
			t.Errorf("%s: %#x, want %#x", name, got, tt.want)
		}
	}
}

// TestRenameNews: what a check found just before a reload that renames its service is of
// the service that it is now.
func TestRenameNews(t *testing.T) {
	c := &control{news: []check.Change{{Cluster: "a", State: check.StateUp}, {Cluster: "b", State: check.StateDown}}}
	c.renameNews([]service{{Service: config.Service{Name: "c"}, former: "a"}, {Service: config.Service{Name: "b"}}})
	if c.news[0].Cluster != "c" || c.news[1].Cluster != "b" {
		t.Errorf("%+v", c.news)
	}
}
