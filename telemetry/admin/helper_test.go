package admin

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
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
	return startWith(t, api, writeTimeout)
}

// startWith is start with a bound of its own for writes, 0 for none.
func startWith(t *testing.T, api API, write time.Duration) (path string, stop func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "admin.sock")
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, ln, api, write) }()
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
		Configuration: ConfigurationStatus{
			Generation: 3, File: "p.yaml", Loaded: epoch, Tried: epoch.Add(time.Second), By: TakenByWatch, Refused: []Refusal{refusal()},
		},
		Services: []ServiceStatus{serviceStatus()},
		Problems: []string{"none"},
	}
}

func refusal() Refusal {
	return Refusal{Name: "shop", Where: "p.yaml:3:7", Text: "unknown policy", Kept: []string{"shop"}}
}

func serviceStatus() ServiceStatus {
	return ServiceStatus{
		Name: "web", Address: "10.96.0.12:80", Policy: "round_robin", Path: flow.PathDirect, PathAsked: "auto",
		Why: []string{"pass cannot balance"}, Where: "p.yaml:2:5",
		Source: SourceStatus{Kind: SourceDNS, Name: "web.example", Updated: epoch, Stale: true, Error: "no answer"},
		Endpoints: []EndpointStatus{{
			Address: "127.0.0.1:8081", Weight: 1, Zone: "a", Local: true, State: EndpointDown, Down: true,
			Live: 3, Connects: 4, Failures: 1, LastReason: flow.ReasonDialRefused, CheckError: "status 500",
		}},
	}
}

func explanation(q ExplainQuery) Explanation {
	s := serviceStatus()
	return Explanation{
		Asked: q.Destination, Destination: netip.MustParseAddrPort("10.96.0.12:80"), Source: q.Source,
		Path: flow.PathDirect, Reason: flow.ReasonService, Meaning: "a service names it",
		Rule: Rule{Kind: RuleService, Text: "service web", Where: "p.yaml:2:5"}, Service: &s, OnFailure: "open",
		Why: []string{"pass: endpoints need path: direct"}, Tier: 1,
		Pick: netip.MustParseAddrPort("127.0.0.1:8081"),
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
		Explain: func(_ context.Context, q ExplainQuery) ([]Explanation, error) {
			switch q.Destination {
			case "nowhere":
				return nil, &Error{Code: http.StatusNotFound, Message: "no such host: nowhere"}
			case "nothing":
				return nil, nil
			}
			return []Explanation{explanation(q)}, nil
		},
		Config: func(context.Context) (json.RawMessage, error) {
			return json.RawMessage(`{"default":"relay"}`), nil
		},
		Diff: func(_ context.Context, name string, text []byte) (DiffResult, error) {
			if len(text) == 0 {
				return DiffResult{}, nil
			}
			return DiffResult{Changes: json.RawMessage(fmt.Sprintf(`{"name":%q,"text":%q}`, name, text)), Refused: []Refusal{refusal()}}, nil
		},
		Reload: func(context.Context) (ReloadResult, error) {
			return reloadResult(), nil
		},
	}
}

func reloadResult() ReloadResult {
	return ReloadResult{
		Generation: 4, File: "p.yaml", Loaded: epoch, By: TakenByWatch, Earlier: true, Changes: []string{},
		Changed: []string{"service web: policy: random -> maglev"}, Refused: []Refusal{refusal()},
	}
}
