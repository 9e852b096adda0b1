package handler

import (
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
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
