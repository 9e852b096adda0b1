package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// tellsWhom is a server that says its name and whom it sees.
func tellsWhom(name string) func(net.Conn) {
	return func(c net.Conn) { fmt.Fprintf(c, "%s %s\n", name, c.RemoteAddr()) }
}

// TestAttackOpenRelay has the application dial what the handler could reach and
// it must not: in every spelling, it is left alone, for the reason that it is.
func TestAttackOpenRelay(t *testing.T) {
	t.Parallel()
	s := newPrey(t, "")
	metadata := netip.MustParseAddr("169.254.169.254")
	s.Serve(t, netip.AddrPortFrom(metadata, sitePort), tellsWhom("metadata"))
	s.Serve(t, netip.MustParseAddrPort("100.100.100.200:8080"), tellsWhom("metadata"))
	s.Serve(t, netip.MustParseAddrPort("[fd00:ec2::254]:8080"), tellsWhom("metadata"))
	// Only the handler's namespace is the application's own: what it can reach
	// by loopback is what the application can.
	own := outsider(t, s.Rig)
	own.wants("ok", "bind('127.0.0.1', 7001)")
	own.wants("ok", "bind('::1', 7001)")
	tests := []struct {
		to, says, reason string
		port             int
	}{
		{"127.0.0.1", "ok", "loopback", 7001},
		{"127.0.0.2", "ECONNREFUSED", "loopback", 7001},
		{"::ffff:127.0.0.1", "ok", "loopback", 7001},
		{"0.0.0.0", "ok", "loopback", 7001},
		{"::ffff:0.0.0.0", "ok", "loopback", 7001},
		{"::1", "ok", "loopback", 7001},
		{"::", "ok", "loopback", 7001},
		{"169.254.169.254", "metadata", "metadata", sitePort},
		{"::ffff:169.254.169.254", "metadata", "metadata", sitePort},
		{"100.100.100.200", "metadata", "metadata", sitePort},
		{"::ffff:100.100.100.200", "metadata", "metadata", sitePort},
		{"fd00:ec2::254", "metadata", "metadata", sitePort},
		{"169.254.1.1", "", "link_local", sitePort},
		{"::ffff:169.254.1.1", "", "link_local", sitePort},
		{"fe80::1%eth0", "", "link_local", sitePort},
		{"224.0.0.1", "", "multicast", sitePort},
		{"::ffff:224.0.0.1", "", "multicast", sitePort},
		{"255.255.255.255", "", "multicast", sitePort},
		{"ff02::1%eth0", "", "multicast", sitePort},
		{testutil.AppV4.Addr().String(), "ECONNREFUSED", "own_address", 7001},
		{testutil.AppV6.Addr().String(), "ECONNREFUSED", "own_address", 7001},
		{"::ffff:" + testutil.AppV4.Addr().String(), "ECONNREFUSED", "own_address", 7001},
	}
	before := arrived(t, s.i)
	s.app.do("so.setdefaulttimeout(0.3)")
	s.app.learn(`
def meet(a, port):
    s = so.socket(family(a), SOCK_STREAM)
    s.settimeout(0.5 if a.count("169.254.1.") or "%%" in a else 10)
    try:
        s.connect(so.getaddrinfo(a, port)[0][4] if "%%" in a else (a, port))
        if port == 7001: return "ok"
        name, seen = s.makefile("rb").readline().decode().split()
        return name if seen.endswith(":%%d" %% s.getsockname()[1]) else "relayed"
    except TimeoutError: return "timeout"
    except OSError as e: return errno.errorcode[e.errno]
    finally: s.close()
`)
	for _, tt := range tests {
		counters := s.i.Reasons(t)
		got := s.app.do("meet(%q, %d)", tt.to, tt.port)
		if tt.says != "" && got != tt.says || got == "relayed" {
			t.Errorf("%s: %q, want %q", tt.to, got, tt.says)
		}
		counted(t, s.i, counters, map[string]uint64{tt.reason: 1, "default": 0, "service": 0})
	}
	s.undisturbed(t, before)
}

// TestAttackLoopByConfig gives Pillion a configuration that would have it dial
// itself, or stand between an application and its identity.
func TestAttackLoopByConfig(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	for name, tt := range map[string]struct{ config, says string }{
		"an endpoint in the IPv4 slots":   {"services: [{name: a, address: 10.96.0.12:80, endpoints: [240.0.0.1:80]}]", "slot address"},
		"an endpoint in the IPv6 slots":   {`services: [{name: a, address: 10.96.0.12:80, endpoints: ["[fd70:696c:6c69:5::1]:80"]}]`, "slot address"},
		"an endpoint in mapped slots":     {`services: [{name: a, address: 10.96.0.12:80, endpoints: ["[::ffff:240.1.2.3]:80"]}]`, "slot address"},
		"a service in the slots":          {"services: [{name: a, address: 240.1.2.3:80, endpoints: [192.0.2.2:80]}]", "slot address"},
		"a service on the metadata":       {"services: [{name: a, address: 169.254.169.254:80, endpoints: [192.0.2.2:80]}]", "metadata"},
		"a service on mapped metadata":    {`services: [{name: a, address: "[::ffff:169.254.169.254]:80", endpoints: [192.0.2.2:80]}]`, "metadata"},
		"a service on loopback":           {"services: [{name: a, address: 127.0.0.1:80, endpoints: [192.0.2.2:80]}]", "loopback"},
		"a service on mapped loopback":    {`services: [{name: a, address: "[::ffff:127.0.0.1]:80", endpoints: [192.0.2.2:80]}]`, "loopback"},
		"a service on every address":      {"services: [{name: a, address: 0.0.0.0:80, endpoints: [192.0.2.2:80]}]", "unspecified"},
		"metrics on a slot":               {"metrics: 240.1.2.3:9090", "slot address"},
		"a file that is an alias bomb":    {"a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nservices: *c", ""},
		"a service dialed by its own":     {"services: [{name: a, address: 10.96.0.12:80, endpoints: [\"240.0.0.0:0\"]}]", ""},
		"more connections than there are": {"limits: {connections: 1000000000}", "connections"},
	} {
		file := filepath.Join(t.TempDir(), "config.yaml")
		if err := os.WriteFile(file, []byte(tt.config), 0o600); err != nil {
			t.Fatal(err)
		}
		code, said := refusal(t, r, "run", "--cgroup", r.Scope.Path, "--config", file)
		if code != 64 || !strings.Contains(said, tt.says) {
			t.Errorf("%s: %d, %s", name, code, said)
		}
	}
	entries, err := os.ReadDir(r.Runtime)
	if err == nil && len(entries) > 0 {
		t.Errorf("the runtime directory has %v", entries)
	}
}

// TestAttackServiceRing has two services lead to each other's address, with the
// sidecar in the scope that it captures: its own dials are not captured.
func TestAttackServiceRing(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	r.Serve(t, netip.MustParseAddrPort("198.51.100.1:8080"), named("one"))
	r.Serve(t, netip.MustParseAddrPort("198.51.100.2:8080"), named("two"))
	const ring = "services: [{name: a, address: 198.51.100.1:8080, endpoints: [198.51.100.2:8080]}, {name: b, address: 198.51.100.2:8080, endpoints: [198.51.100.1:8080]}]"
	for _, home := range []*testutil.Cgroup{nil, r.Scope, r.Scope.Child(t, "sidecar")} {
		r.Home.Cgroup = home
		i := r.Run(t, ring)
		a := captive(t, r, r.Scope.Child(t, fmt.Sprint("app-", i.Name)))
		a.wants("two", "dial('198.51.100.1', 8080)")
		a.wants("one", "dial('198.51.100.2', 8080)")
		a.end()
		rig.Relayed(t, i.Ended(t, 2))
		if n := arrived(t, i); n != 2 {
			t.Errorf("%v connections were carried, want two", n)
		}
		i.Conserved(t)
		if err := i.Stop(t); err != nil {
			t.Errorf("run: %v", err)
		}
	}
}
