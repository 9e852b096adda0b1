package main

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
)

// serveAdmin serves api as an instance called name.
func serveAdmin(t *testing.T, g *global, name string, api admin.API) {
	t.Helper()
	ln, err := admin.Listen(g.socket(name))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func(ln net.Listener) { done <- admin.Serve(ctx, ln, api) }(ln)
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// lines compares what was printed with what people are to see.
func lines(t *testing.T, got string, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, strings.Split(strings.TrimRight(got, "\n"), "\n")); diff != "" {
		t.Errorf("want -, got +:\n%s", diff)
	}
}

var testNow = time.Unix(1_700_000_000, 0)

func testStatus() admin.Status {
	now := testNow
	return admin.Status{
		Instance: "shop", Kind: admin.KindRun, Pid: 7, Version: "1", State: admin.StateServing, OnFailure: "open", Connect: "adaptive",
		Scope: "/a", Slots4: "240.0.0.0/16", Slots6: "fd70::/64", Started: now.Add(-time.Minute), Live: 3,
		Configuration: admin.ConfigurationStatus{
			Generation: 4, File: "p.yaml", Loaded: now.Add(-time.Hour),
			Refused: []admin.Refusal{
				{Name: "cart", Where: "p.yaml:3:7", Text: "p.yaml:3:7: unknown policy\np.yaml:4:7: no endpoint", Kept: []string{"cart"}},
				{Name: "mail", Text: "no such file"},
				{Name: "chat", Source: true, Where: "p.yaml:8:1", Text: "bad name", Kept: []string{"talk", "chat"}},
			},
		},
		Problems: []string{"Something is wrong."},
		Counters: map[string]uint64{"service": 5},
		Services: []admin.ServiceStatus{
			{
				Name: "web", Address: "10.96.0.12:80", Policy: "maglev", Path: flow.PathDirect, PathAsked: "auto",
				Source: admin.SourceStatus{Kind: admin.SourceDNS, Name: "web.example", Updated: now.Add(-2 * time.Minute), Stale: true},
				Endpoints: []admin.EndpointStatus{
					{Address: "10.1.0.1:80", Weight: 1, Zone: "a", Local: true, State: admin.EndpointAvailable, Live: 2, Connects: 9},
					{Address: "10.1.0.2:80", Weight: 3, Zone: "b", State: admin.EndpointDown, Down: true, Ejected: true, CheckError: "status 500", Failures: 1, LastReason: flow.ReasonDialRefused},
				},
			},
			{Name: "cart", Address: "10.96.0.13:80", Policy: "random", Path: flow.PathRelay, PathAsked: "relay", Source: admin.SourceStatus{Kind: admin.SourceFile, Name: "e.json", Stale: true}},
		},
	}
}

func TestPrintStatus(t *testing.T) {
	s := testStatus()
	var b strings.Builder
	if err := printStatus(&b, &s, testNow); err != nil {
		t.Fatal(err)
	}
	lines(t, b.String(),
		"shop (run, pid 7, 1): serving, on_failure open, connect adaptive, up 1m0s",
		"  scope /a",
		"  slots 240.0.0.0/16 fd70::/64",
		"  open on relay 3, unaccounted 0",
		"  configuration 4 of p.yaml, for 1h0m0s",
		"  ! Something is wrong.",
		"  ! cart is refused, the earlier state stays:",
		"    p.yaml:3:7: unknown policy",
		"    p.yaml:4:7: no endpoint",
		"  ! mail is refused, there is no earlier state:",
		"    no such file",
		"  ! the source of chat is refused, the earlier state stays of talk, chat:",
		"    p.yaml:8:1: bad name",
		"",
		"SERVICE  ADDRESS        PATH           POLICY  SOURCE                            ENDPOINT     ZONE       WEIGHT  STATE                       OPEN  CONNECTS  FAILURES  LAST FAILURE",
		"web      10.96.0.12:80  direct (auto)  maglev  dns web.example (stale for 2m0s)  10.1.0.1:80  a (local)  1       available                   2     9         0         none",
		"web      10.96.0.12:80  direct (auto)  maglev  dns web.example (stale for 2m0s)  10.1.0.2:80  b          3       down, ejected (status 500)  0     0         1         dial_refused",
		"cart     10.96.0.13:80  relay          random  file e.json (has not told yet)    -                       -       -                           -     -         -         -",
		"",
		"REASON   COUNT",
		"service      5",
	)
}

// Without zones and with static lists, those columns are not there.
func TestPrintServicesPlain(t *testing.T) {
	var b strings.Builder
	err := printServices(&b, []admin.ServiceStatus{{
		Name: "web", Address: "10.96.0.12:80", Policy: "random", Path: flow.PathRelay, Source: admin.SourceStatus{Kind: admin.SourceStatic},
		Endpoints: []admin.EndpointStatus{{Address: "10.1.0.1:80", Weight: 1, Ejected: true}},
	}}, testNow)
	if err != nil {
		t.Fatal(err)
	}
	lines(t, b.String(),
		"SERVICE  ADDRESS        PATH   POLICY  ENDPOINT     WEIGHT  STATE    OPEN  CONNECTS  FAILURES  LAST FAILURE",
		"web      10.96.0.12:80  relay  random  10.1.0.1:80       1  ejected     0         0         0  none",
	)
}

// runCommand runs one command line and returns what it printed.
func runCommand(t *testing.T, g *global, args ...string) (string, error) {
	t.Helper()
	var b strings.Builder
	cmd := newRoot(nil)
	cmd.SetOut(&b)
	cmd.SetArgs(append([]string{"--runtime-dir", g.runtime}, args...))
	err := cmd.ExecuteContext(t.Context())
	return b.String(), err
}

func TestReload(t *testing.T) {
	result := admin.ReloadResult{Generation: 5, Changes: []string{"default: relay -> pass"}}
	var failure error
	g := &global{runtime: t.TempDir()}
	if _, err := runCommand(t, g, "reload"); !errors.Is(err, errNoInstance) {
		t.Errorf("nobody runs: %v", err)
	}
	serveAdmin(t, g, "shop", admin.API{
		Status: func(context.Context) (admin.Status, error) { return testStatus(), nil },
		Reload: func(context.Context) (admin.ReloadResult, error) { return result, failure },
	})

	out, err := runCommand(t, g, "reload")
	if err != nil {
		t.Error(err)
	}
	lines(t, out, "configuration 5 holds", "  default: relay -> pass")

	// A watch was faster.
	at := time.Date(2026, 5, 4, 3, 2, 1, 0, time.Local)
	result = admin.ReloadResult{
		Generation: 5, File: "p.yaml", Loaded: at, By: admin.TakenByWatch,
		Earlier: true, Changed: []string{"default: relay -> pass"},
	}
	out, err = runCommand(t, g, "reload")
	if err != nil {
		t.Error(err)
	}
	lines(t, out, "configuration 5 holds, taken at 2026-05-04 03:02:01 by the watch on p.yaml", "  default: relay -> pass")
	for by, want := range map[string]string{
		admin.TakenAtStart: " by the start", admin.TakenBySignal: " by a signal", admin.TakenByReload: " by a reload", "else": "",
	} {
		result = admin.ReloadResult{Generation: 5, Loaded: at, By: by, Earlier: true}
		out, err = runCommand(t, g, "reload")
		if err != nil {
			t.Error(err)
		}
		lines(t, out, "configuration 5 holds, taken at 2026-05-04 03:02:01"+want, "  nothing changed")
	}

	// What is refused is told on stdout, and makes the exit code the user's.
	result = admin.ReloadResult{Generation: 5, Refused: []admin.Refusal{
		{Name: "cart", Where: "p.yaml:3:7", Text: "unknown policy", Kept: []string{"cart"}},
		{Text: "p.yaml:9:1: what is this?"}, {Where: "p.yaml:10:1", Text: "and this?"},
	}}
	out, err = runCommand(t, g, "reload", "--name", "shop")
	exit, ok := errors.AsType[*exitError](err)
	if !ok || exit.code != exitUsage || exit.err != nil {
		t.Errorf("refused: %v", err)
	}
	lines(t, out,
		"configuration 5 holds", "  nothing changed",
		"  ! cart is refused, the earlier state stays:", "    p.yaml:3:7: unknown policy",
		"  ! the configuration is refused, the earlier one stays:", "    p.yaml:9:1: what is this?", "    p.yaml:10:1: and this?",
	)
	out, err = runCommand(t, g, "reload", "-o", "json")
	if exit, ok := errors.AsType[*exitError](err); !ok || exit.code != exitUsage || !strings.Contains(out, `"where": "p.yaml:3:7"`) {
		t.Errorf("refused, as JSON: %v\n%s", err, out)
	}

	failure = errors.New("cannot publish")
	if _, err := runCommand(t, g, "reload"); err == nil || !strings.Contains(err.Error(), "cannot publish") {
		t.Errorf("failed: %v", err)
	} else if _, ok := errors.AsType[*exitError](err); ok {
		t.Errorf("failed: %v has an exit code of its own, want 1", err)
	}
	if _, err := runCommand(t, g, "reload", "--name", "other"); !errors.Is(err, errNoInstance) {
		t.Errorf("another's name: %v", err)
	}
}

// Open connections are listed whoever carries them, and filtered by path.
func TestFlowsLive(t *testing.T) {
	g := &global{runtime: t.TempDir()}
	serveAdmin(t, g, "shop", admin.API{
		Status: func(context.Context) (admin.Status, error) { return testStatus(), nil },
		Flows: func(_ context.Context, q admin.FlowQuery) ([]flow.Record, error) {
			if !q.Live {
				return nil, nil
			}
			return []flow.Record{
				{Cookie: 1, Path: flow.PathRelay, Reason: flow.ReasonService, Open: true, Service: "web", Start: time.Unix(3, 0)},
				{Cookie: 2, Path: flow.PathDirect, Reason: flow.ReasonService, Open: true, Service: "cart", Start: time.Unix(2, 0), Attempts: 1},
				{Cookie: 3, Path: flow.PathPass, Reason: flow.ReasonDefaultPass, Open: true, Start: time.Unix(1, 0)},
			}, nil
		},
	})
	out, err := runCommand(t, g, "flows", "--live")
	if err != nil {
		t.Fatal(err)
	}
	lines(t, out,
		"ASKED FOR  ENDPOINT  PATH    REASON        SENT  RECEIVED  RTT  CONNECT  DURATION  END   SERVICE  SOURCE",
		"-          -         pass    default_pass  0 B   0 B       -    -        -         open  -        -",
		"-          -         direct  service       0 B   0 B       -    -        -         open  cart     -",
		"-          -         relay   service       0 B   0 B       -    -        -         open  web      -",
	)
	out, err = runCommand(t, g, "flows", "--live", "--path", "direct")
	if err != nil {
		t.Fatal(err)
	}
	lines(t, out,
		"ASKED FOR  ENDPOINT  PATH    REASON   SENT  RECEIVED  RTT  CONNECT  DURATION  END   SERVICE  SOURCE",
		"-          -         direct  service  0 B   0 B       -    -        -         open  cart     -",
	)
}
