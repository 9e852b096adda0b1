package admin

import (
	"context"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
)

var epoch = time.Unix(1_700_000_000, 0).UTC()

// start serves api on a socket of its own and returns the path. stop ends the
// server and waits for it; the test's end does too.
func start(t *testing.T, api API) (path string, stop func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "admin.sock")
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, ln, api) }()
	stopped := false
	stop = func() {
		cancel()
		if !stopped {
			stopped = true
			if err := <-done; err != nil {
				t.Errorf("Serve: %v", err)
			}
		}
	}
	t.Cleanup(stop)
	return path, stop
}

func status() Status {
	return Status{
		Instance: "i1", Kind: KindRun, Version: "1", Pid: 2, Scope: "/a", Ready: true, State: StateServing,
		OnFailure: "open", Connect: "adaptive", Slots4: "240.0.0.0/16", Started: epoch, Live: 3,
		Counters: map[string]uint64{"service": 4}, Unaccounted: -1,
		Services: []ServiceStatus{{Name: "web", Address: "10.96.0.12:80", Policy: "round_robin", Endpoints: []EndpointStatus{
			{Address: "127.0.0.1:8081", Weight: 1, Live: 3, Connects: 4, Failures: 1, LastReason: flow.ReasonDialRefused},
		}}},
		Problems: []string{"none"},
	}
}

func records() []flow.Record {
	return []flow.Record{
		{Cookie: 1, Path: flow.PathRelay, Reason: flow.ReasonService, End: flow.ReasonClosed, Start: epoch.Add(2 * time.Second),
			Source: netip.MustParseAddrPort("192.0.2.1:4000"), OrigDst: netip.MustParseAddrPort("[2001:db8::1]:80"),
			Endpoint: netip.MustParseAddrPort("127.0.0.1:8081"), Sent: 1 << 40},
		{Cookie: 2, Path: flow.PathPass, Reason: flow.ReasonExcluded, End: flow.ReasonReset, Start: epoch},
		{Cookie: 3, Path: flow.PathRelay, Reason: flow.ReasonDefault, End: flow.ReasonReset, Start: epoch.Add(time.Second)},
	}
}

func testAPI() API {
	return API{
		Status: func(context.Context) (Status, error) { return status(), nil },
		Flows: func(_ context.Context, q FlowQuery) ([]flow.Record, error) {
			return records(), nil
		},
		Metrics: text("pillion_up 1\n"),
		Resolve: func(slot netip.Addr) (netip.Addr, error) {
			if slot != netip.MustParseAddr("240.0.0.1") {
				return netip.Addr{}, errNoSlot
			}
			return netip.MustParseAddr("10.96.0.12"), nil
		},
	}
}
