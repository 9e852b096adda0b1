package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/loader/probe"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/discover"
	"github.com/pillion-project/pillion/telemetry/admin"
)

// leaveSocket leaves a socket that nobody listens at, as a killed process does.
func leaveSocket(t *testing.T, g *global, name string) {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: g.socket(name)})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
}

// TestDeadInstance: the socket of a process that was killed is no instance, neither
// alone nor beside one that runs.
func TestDeadInstance(t *testing.T) {
	g := &global{runtime: t.TempDir()}
	nowhere := t.TempDir() // nothing is pinned there
	leaveSocket(t, g, "dead")
	for _, args := range [][]string{{"status", "--bpffs", nowhere}, {"explain", "10.0.0.1"}, {"reload"}, {"flows"}, {"status", "dead"}, {"resolve", "240.0.0.1"}} {
		if _, err := runCommand(t, g, args...); !errors.Is(err, errNoInstance) {
			t.Errorf("%v: %v, want %v", args, err, errNoInstance)
		}
	}
	serveAdmin(t, g, "alive", admin.API{
		Status: func(context.Context) (admin.Status, error) { return testStatus(), nil },
		Flows:  func(context.Context, admin.FlowQuery) ([]flow.Record, error) { return nil, nil },
	})
	for _, args := range [][]string{{"status", "--bpffs", nowhere}, {"flows"}, {"status", "-o", "json"}} {
		if out, err := runCommand(t, g, args...); err != nil || out == "" {
			t.Errorf("%v: %v\n%s", args, err, out)
		}
	}
}

func TestLeftText(t *testing.T) {
	for want, f := range map[string]loader.Found{
		"shop: no process runs it, and on_failure decides on what it would redirect; pillion run goes on with it, pillion unload shop removes it\n  scope /a": {Name: "shop", Cgroup: "/a"},
		"shop: no process runs it, and its scope is gone: pillion unload shop removes what it left":                                                           {Name: "shop"},
	} {
		if got := leftText(&f); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

// TestSilentTexts: status says why a source cannot tell, and not thousands of times.
func TestSilentTexts(t *testing.T) {
	services := []admin.ServiceStatus{{Name: "static"}, {Name: "web", Source: admin.SourceStatus{Kind: admin.SourceFile, Error: "e.json:1:1: not JSON\ne.json:2:1: nor this"}}}
	want := []string{"the source of web cannot tell its endpoints:\n    e.json:1:1: not JSON\n    e.json:2:1: nor this"}
	if diff := cmp.Diff(want, silentTexts(services)); diff != "" {
		t.Error(diff)
	}
	for i := range silentMost + 1 {
		services = append(services, admin.ServiceStatus{Name: fmt.Sprint("s", i), Source: admin.SourceStatus{Error: "no server"}})
	}
	got := silentTexts(services)
	if len(got) != silentMost+1 || got[silentMost] != "nor can the sources of 2 others" {
		t.Errorf("%d lines, the last one %q", len(got), got[len(got)-1])
	}
	var b bytes.Buffer
	if err := printStatus(&b, &admin.Status{Services: services}, testNow); err != nil || !strings.Contains(b.String(), "  ! "+want[0]) {
		t.Errorf("%v\n%s", err, b.String())
	}
}

// TestSourceLog: the log has a line when a source begins to fail and when it ends to,
// not one for each failure.
func TestSourceLog(t *testing.T) {
	var b bytes.Buffer
	calls := 0
	s := newSources(&instance{plan: plan{log: slog.New(slog.NewTextHandler(&b, nil))}}, func() { calls++ })
	tell := s.teller("web", want{kind: admin.SourceDNS, name: "web.test."})
	bad := discover.State{Err: errors.New("no answer"), Generation: 1}
	for _, st := range []discover.State{{Generation: 1}, bad, bad, {Generation: 2}, {Generation: 3}, bad} {
		tell(st)
	}
	if calls != 6 {
		t.Errorf("%d changes were passed on, want 6", calls)
	}
	var got []string
	for line := range strings.Lines(b.String()) {
		_, line, _ = strings.Cut(line, "level=")
		level, _, _ := strings.Cut(line, " ")
		got = append(got, level)
		if !strings.Contains(line, "service=web source=dns name=web.test.") || level == "WARN" && !strings.Contains(line, "no answer") {
			t.Error(line)
		}
	}
	if diff := cmp.Diff([]string{"WARN", "INFO", "WARN"}, got); diff != "" {
		t.Error(diff)
	}
}

// TestCures: what helps against many findings is said once.
func TestCures(t *testing.T) {
	findings := []probe.Finding{
		{Name: "a", Detail: "is missing", Cure: "run as root"}, {Name: "fine", Detail: "works"}, {Name: "other", Detail: "is low", Cure: "raise it"},
		{Name: "b", Detail: "is missing", Cure: "run as root"}, {Name: "c", Detail: "x", Cure: "run as root"}, {Name: "d", Detail: "x", Cure: "run as root"},
	}
	want := []string{"a: is missing\nb: is missing\nc: x\nand 1 more line above\n  run as root", "other: is low\n  raise it"}
	if diff := cmp.Diff(want, cures(findings)); diff != "" {
		t.Error(diff)
	}
}

// TestFlagMessages: what is wrong with a flag is told once, with what it wants, and
// without the words of Go's library.
func TestFlagMessages(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"flows", "--limit", "x"}, `invalid argument "x" for "--limit" flag: want a number (see pillion flows --help)`},
		{[]string{"exec", "--drain-timeout", "soon", "--", "true"}, `invalid argument "soon" for "--drain-timeout" flag: want a duration that is not negative, such as 10s (see pillion exec --help)`},
		{[]string{"help", "statu"}, `unknown command "statu", did you mean status? (see pillion --help)`},
		{[]string{"inject", "a.yaml"}, "inject: the manifest is named by -f: -f a.yaml"},
		{[]string{"doctor", "--cgroup", "/nonexistent"}, "--cgroup: stat /nonexistent: no such file or directory"},
		{[]string{"exec", "--deny", "x", "--exclude", "y", "--service", "1.2.3.4=5", "--", "true"}, strings.Join([]string{
			`--service "1.2.3.4=5": address "1.2.3.4": no port, want 1.2.3.4:PORT`,
			`--service "1.2.3.4=5": endpoint 1 "5": "5" is not an IP address: want ADDR:PORT`,
			`--deny: "x": "x" is a name, and names are not resolved: want an IP address`,
			`--exclude: "y": "y" is a name, and names are not resolved: want an IP address`,
		}, "\n")},
	} {
		_, err := call(t, tt.args...)
		if exit, ok := errors.AsType[*exitError](err); !ok || exit.code != exitUsage {
			t.Errorf("%v: %v, want exit code %d", tt.args, err, exitUsage)
			continue
		}
		if diff := cmp.Diff(tt.want, err.Error()); diff != "" {
			t.Errorf("%v: want -, got +:\n%s", tt.args, diff)
		}
	}
	flag, err := call(t, "--version")
	if err != nil {
		t.Fatal(err)
	}
	if command, err := call(t, "version"); err != nil || command != flag || command != "pillion "+buildVersion()+"\n" {
		t.Errorf("version says %q, --version %q, %v", command, flag, err)
	}
	if out, err := call(t, "help", "status"); err != nil || !strings.Contains(out, "pillion status") {
		t.Errorf("help status: %v\n%s", err, out)
	}
}

// TestInShort: the log says what an unasked reload changed, in a line that ends.
func TestInShort(t *testing.T) {
	many := make([]string, changesLogged+3)
	for i := range many {
		many[i] = fmt.Sprint("c", i)
	}
	if got, want := inShort(many), strings.Join(many[:changesLogged], "; ")+"; and 3 more"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := inShort(many[:2]); got != "c0; c1" || many[2] != "c2" {
		t.Errorf("got %q", got)
	}
}

// TestUnprivileged: who may not is told by the exit code for that.
func TestUnprivileged(t *testing.T) {
	err := unprivileged(fmt.Errorf("list instances: %w", &fs.PathError{Op: "open", Path: "/run/pillion", Err: fs.ErrPermission}))
	if exit, ok := errors.AsType[*exitError](err); !ok || exit.code != exitUnsupported || !strings.HasSuffix(err.Error(), "run as root") {
		t.Errorf("%v", err)
	}
	other := errors.New("other")
	if got := unprivileged(other); got != other {
		t.Errorf("%v, want %v", got, other)
	}
}

// TestPassHasNoPolicy: where nothing is picked, no policy is shown.
func TestPassHasNoPolicy(t *testing.T) {
	s := admin.ServiceStatus{Name: "wire", Address: "192.0.2.1:80", Policy: "least_connections", Path: flow.PathPass, PathAsked: "pass"}
	var b bytes.Buffer
	if err := printServices(&b, []admin.ServiceStatus{s}, testNow); err != nil {
		t.Fatal(err)
	}
	if err := printExplanation(&b, &admin.Explanation{Path: flow.PathPass, Service: &s}, testNow); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(b.String(), s.Policy) {
		t.Errorf("a policy is shown:\n%s", b.String())
	}
}

// TestDenyHasNoPick: where connections are refused, nobody is said to be picked.
func TestDenyHasNoPick(t *testing.T) {
	x := admin.Explanation{
		Path: flow.PathDeny, Errno: "EHOSTUNREACH", Reason: flow.ReasonNoEndpoint, Pick: netip.MustParseAddrPort("127.0.0.1:1"),
		Service: &admin.ServiceStatus{
			Name: "web", Path: flow.PathRelay, PathAsked: "relay", Policy: "random",
			Endpoints: []admin.EndpointStatus{{Address: "127.0.0.1:1", Weight: 1, Ejected: true, State: admin.EndpointEjected}},
		},
	}
	var b bytes.Buffer
	if err := printExplanation(&b, &x, testNow); err != nil {
		t.Fatal(err)
	}
	if out := b.String(); strings.Contains(out, "pick ") || strings.Contains(out, "*") || !strings.Contains(out, "127.0.0.1:1") {
		t.Errorf("a pick is shown:\n%s", out)
	}
}
