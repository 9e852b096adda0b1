package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
)

// TestUsage: what a user gets wrong is told before anything is touched.
func TestUsage(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.yaml")
	if err := os.WriteFile(bad, []byte("servces: []\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := map[string][]string{
		"unknown command":    {"exce"},
		"unknown flag":       {"exec", "--sevice", "x", "--", "true"},
		"no command":         {"exec"},
		"no cgroup":          {"run"},
		"bad service":        {"exec", "--service", "nonsense", "--", "true"},
		"host name":          {"exec", "--service", "example.org:80=127.0.0.1:1", "--", "true"},
		"loopback service":   {"exec", "--service", "127.0.0.1:80=127.0.0.1:1", "--", "true"},
		"slot as endpoint":   {"exec", "--service", "10.96.0.1:80=240.1.0.1:80", "--", "true"},
		"bad deny":           {"exec", "--deny", "10.0.0.0/33", "--", "true"},
		"bad exclude":        {"exec", "--exclude", "ten", "--", "true"},
		"bad on-failure":     {"exec", "--on-failure", "maybe", "--", "true"},
		"bad existing":       {"exec", "--existing", "kill", "--", "true"},
		"bad name":           {"exec", "--name", "../x", "--", "true"},
		"no such user":       {"exec", "--user", "nobody-of-that-name", "--", "true"},
		"no such file":       {"exec", "--config", filepath.Join(dir, "none.yaml"), "--", "true"},
		"bad file":           {"exec", "--config", bad, "--", "true"},
		"bad file of run":    {"run", "--cgroup", "/sys/fs/cgroup", "--config", bad},
		"bad duration":       {"run", "--cgroup", "/", "--drain-timeout", "soon"},
		"negative duration":  {"run", "--cgroup", "/", "--drain-timeout", "-1s"},
		"bad output":         {"flows", "-o", "xml"},
		"bad path":           {"flows", "--path", "tunnel"},
		"bad end":            {"flows", "--end", "well"},
		"negative limit":     {"flows", "--limit", "-1"},
		"too many arguments": {"version", "x"},
		"no slot":            {"resolve"},
		"slot is a name":     {"resolve", "localhost"},
		"explain what":       {"explain"},
		"explain nothing":    {"explain", ""},
		"explain too much":   {"explain", "a", "b"},
		"explain from where": {"explain", "10.0.0.1:80", "--source", "here"},
		"explain as xml":     {"explain", "10.0.0.1:80", "-o", "xml"},
		"reload what":        {"reload", "pillion.yaml"},
		"reload as xml":      {"reload", "-o", "xml"},
		"bad exec path":      {"exec", "--path", "http", "--", "true"},
		"path cannot":        {"exec", "--path", "pass", "--service", "10.96.0.1:80=10.0.0.1:80", "--", "true"},
		"no file":            {"validate"},
		"bad file, told":     {"validate", bad},
		"validate output":    {"validate", "-o", "xml", bad},
		"diff of nothing":    {"diff"},
		"diff of three":      {"diff", bad, bad, bad},
		"diff with bad":      {"diff", bad},
		"diff of all":        {"diff", "--instance", "x", bad, bad},
		"bad log level":      {"--log-level", "loud", "exec", "--", "true"},
		"bad log format":     {"--log-format", "xml", "exec", "--", "true"},
	}
	for name, args := range tests {
		t.Run(name, func(t *testing.T) {
			args = append([]string{"--runtime-dir", dir}, args...)
			cmd := newRoot(nil)
			cmd.SetArgs(args)
			err := cmd.ExecuteContext(t.Context())
			exit, ok := errors.AsType[*exitError](err)
			if !ok || exit.code != exitUsage || exit.err == nil || exit.Error() == "" {
				t.Errorf("%v: %v, want a message and exit code %d", args, err, exitUsage)
			}
		})
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 1 << 30: "1.0 GiB", 1 << 62: "4096.0 PiB"} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %s, want %s", n, got, want)
		}
	}
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "-", 1500: "1us", 2300 * time.Microsecond: "2.3ms", 90 * time.Second: "1m30s", 1234 * time.Millisecond: "1.23s",
	} {
		if got := span(d); got != want {
			t.Errorf("span(%d) = %s, want %s", d, got, want)
		}
	}
}

func TestNameOf(t *testing.T) {
	const root = "/sys/fs/cgroup"
	for cgroup, want := range map[string]string{
		root:                                   "root",
		root + "/system.slice/shop.service":    "system.slice-shop.service",
		root + "/a b/é":                        "a-b--",
		root + "/" + strings.Repeat("x", 100):  strings.Repeat("x", 64),
		root + "/.hidden":                      "hidden",
		root + "/system.slice/shop@1.service/": "system.slice-shop-1.service",
	} {
		if got := nameOf(root, cgroup); got != want {
			t.Errorf("nameOf(%q) = %q, want %q", cgroup, got, want)
		}
	}
}

// TestPrintFlows is the table that people see.
func TestPrintFlows(t *testing.T) {
	records := []flow.Record{
		{
			OrigDst: netip.MustParseAddrPort("10.96.0.12:80"), Endpoint: netip.MustParseAddrPort("127.0.0.1:8081"),
			Source: netip.MustParseAddrPort("192.0.2.1:40000"), Path: flow.PathRelay, Reason: flow.ReasonService, End: flow.ReasonClosed,
			Sent: 74, Received: 2048, RTT: 20 * time.Microsecond, Connect: time.Millisecond, Duration: 3 * time.Second, Attempts: 2, Service: "shop",
		},
		{OrigDst: netip.MustParseAddrPort("[2001:db8::1]:443"), Path: flow.PathDeny, Reason: flow.ReasonDenied, End: flow.ReasonDenied},
		{OrigDst: netip.MustParseAddrPort("192.0.2.9:22"), Path: flow.PathPass, Reason: flow.ReasonExcluded, Open: true},
		{
			OrigDst: netip.MustParseAddrPort("10.96.0.13:80"), Endpoint: netip.MustParseAddrPort("10.1.0.9:8080"), Service: "cart",
			Path: flow.PathDirect, Reason: flow.ReasonHandlerAbsent, End: flow.ReasonDialRefused, Attempts: 1, Duration: time.Millisecond,
		},
	}
	var b strings.Builder
	if err := printFlows(&b, records); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"ASKED FOR          ENDPOINT        PATH    REASON          SENT  RECEIVED  RTT   CONNECT  DURATION  END                  SERVICE  SOURCE",
		"10.96.0.12:80      127.0.0.1:8081  relay   service         74 B  2.0 KiB   20us  1.0ms    3s        closed (2 attempts)  shop     192.0.2.1:40000",
		"[2001:db8::1]:443  -               deny    denied          0 B   0 B       -     -        -         denied               -        -",
		"192.0.2.9:22       -               pass    excluded        0 B   0 B       -     -        -         open                 -        -",
		"10.96.0.13:80      10.1.0.9:8080   direct  handler_absent  0 B   0 B       -     -        1.0ms     dial_refused         cart     -",
	}
	if diff := cmp.Diff(want, strings.Split(strings.TrimRight(b.String(), "\n"), "\n")); diff != "" {
		t.Errorf("want -, got +:\n%s", diff)
	}
}

// TestSavedFlows: only so many ended commands are remembered, and the last one
// is what is shown.
func TestSavedFlows(t *testing.T) {
	g := &global{runtime: t.TempDir()}
	if _, err := g.loadSaved(""); err == nil {
		t.Error("found what nobody saved")
	}
	if err := os.MkdirAll(g.savedDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	for n := range savedMax + 3 {
		s := saved{Command: []string{"cmd", fmt.Sprint(n)}, Status: admin.Status{Instance: fmt.Sprint("i", n)}, Flows: []flow.Record{{Cookie: uint64(n)}}}
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(g.savedDir(), s.Status.Instance+".json")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		when := time.Unix(int64(1000+n), 0)
		if err := os.Chtimes(path, when, when); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.pruneSaved(); err != nil {
		t.Fatal(err)
	}
	files, err := g.savedFiles()
	if err != nil || len(files) != savedMax {
		t.Fatalf("%d files, %v, want %d", len(files), err, savedMax)
	}
	last, err := g.loadSaved("")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]flow.Record{{Cookie: savedMax + 2}}, last.Flows, cmpopts.EquateComparable(netip.AddrPort{})); diff != "" {
		t.Errorf("want -, got +:\n%s", diff)
	}
	if _, err := g.loadSaved("i5"); err != nil {
		t.Error(err)
	}
	if _, err := g.loadSaved("i0"); err == nil {
		t.Error("the oldest is still there")
	}
	if err := os.WriteFile(files[savedMax-1], []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := g.loadSaved(""); err == nil || !strings.Contains(err.Error(), files[savedMax-1]) {
		t.Errorf("truncated file: error %v, want its name", err)
	}
}
