package live

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// names is a dnsmasq in the world.
type names struct {
	at    netip.AddrPort
	hosts string
	cmd   func() *exec.Cmd
	p     *rig.Process
}

// newNames starts a dnsmasq that knows the zone example, of which more tells the
// rest.
func newNames(t *testing.T, r *rig.Rig, hosts string, more ...string) *names {
	t.Helper()
	testutil.Need(t, "dnsmasq")
	dir := t.TempDir()
	for d := dir; d != os.TempDir(); d = filepath.Dir(d) { // it may run as another user
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n := &names{at: netip.AddrPortFrom(netip.MustParseAddr("198.51.100.53"), 5353), hosts: filepath.Join(dir, "hosts")}
	r.Give(t, n.at.Addr())
	n.cmd = func() *exec.Cmd {
		return exec.Command("dnsmasq", append([]string{
			"--no-daemon", "--conf-file=/dev/null", "--pid-file=", "--user=", "--group=",
			"--port=" + fmt.Sprint(n.at.Port()), "--listen-address=" + n.at.Addr().String(), "--bind-interfaces",
			"--no-resolv", "--no-hosts", "--addn-hosts=" + n.hosts, "--local=/example/", "--local-ttl=1",
		}, more...)...)
	}
	n.write(t, hosts)
	n.start(t, r)
	return n
}

func (n *names) write(t *testing.T, hosts string) {
	t.Helper()
	if err := os.WriteFile(n.hosts, []byte(hosts), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (n *names) start(t *testing.T, r *rig.Rig) {
	t.Helper()
	n.p = rig.StartProcess(t, r.World, n.cmd(), unix.SIGTERM)
}

// set changes the addresses that the server gives.
func (n *names) set(t *testing.T, hosts string) {
	t.Helper()
	n.write(t, hosts)
	if err := n.p.Cmd.Process.Signal(unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
}

// hosts is a line of a hosts file for each endpoint.
func hosts(name string, endpoints ...int) string {
	var text strings.Builder
	for _, e := range endpoints {
		fmt.Fprintf(&text, "%s %s\n", far(e).Addr(), name)
	}
	return text.String()
}

// TestDNS has endpoints by name, from a real server that changes its mind and dies.
func TestDNS(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		r := rig.New(t)
		serve(t, r, 1, 2, 3)
		n := newNames(t, r, hosts("web.example", 1))
		s := newStage(t, r, "services:\n"+service(1, fmt.Sprintf(
			"path: %s, discover: {dns: {name: web.example., port: 8080, min_ttl: 200ms, max_ttl: 1s, servers: [%q]}}", path, n.at)))
		s.has(t, "s1", "1")
		s.goes(t, 1, 1)
		s.load(t, 2, 0, vip(1))
		n.set(t, hosts("web.example", 2, 3))
		s.has(t, "s1", "2", "3")
		s.goes(t, 1, 2, 3)

		stale := `pillion_discovery_stale{service="s1",source="dns"}`
		age := `pillion_discovery_age_seconds{service="s1",source="dns"}`
		if s.metric(t, stale) != "0" || s.metric(t, age) != "0" {
			t.Errorf("stale %s, age %s", s.metric(t, stale), s.metric(t, age))
		}
		// The name is gone: nobody says that nobody serves.
		n.set(t, hosts("other.example", 1))
		testutil.Eventually(t, rig.Limit, func() bool { return s.metric(t, stale) == "1" }, "stale without the name")
		s.has(t, "s1", "2", "3")
		n.set(t, hosts("web.example", 1))
		s.has(t, "s1", "1")
		testutil.Eventually(t, rig.Limit, func() bool { return s.metric(t, stale) == "0" }, "it tells again")
		// The server is gone.
		n.p.Kill(t)
		testutil.Eventually(t, rig.Limit, func() bool { return s.metric(t, stale) == "1" && s.metric(t, age) > "0" }, "stale without the server")
		s.has(t, "s1", "1")
		source := s.service(t, "s1").Source
		if !source.Stale || source.Error == "" || source.Name != "web.example." || source.Kind != "dns" {
			t.Errorf("%+v", source)
		}
		s.goes(t, 1, 1)
		n.write(t, hosts("web.example", 3))
		n.start(t, r)
		s.has(t, "s1", "3")
		s.goes(t, 1, 3)
		s.unload(t)
	})
}

// TestSRV has ports and weights in the records, and the file that names the
// server.
func TestSRV(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	serve(t, r, 1, 2)
	server(t, r, netip.AddrPortFrom(far(3).Addr(), 9090))
	n := newNames(t, r, hosts("a.example", 1)+hosts("b.example", 3),
		"--srv-host=_http._tcp.web.example,a.example,8080,1,2", "--srv-host=_http._tcp.web.example,b.example,9090,1,6",
		"--srv-host=_http._tcp.web.example,a.example,8081,2,9") // for when the first are gone
	s := newStage(t, r, "services:\n"+service(1, fmt.Sprintf(
		"policy: random, discover: {dns: {name: _http._tcp.web.example, type: SRV, min_ttl: 200ms, max_ttl: 1s, servers: [%q]}}", n.at)))
	s.has(t, "s1", "1 weight 2", netip.AddrPortFrom(far(3).Addr(), 9090).String()+" weight 6")
	seen := map[string]int{}
	for range 200 {
		seen[s.Dial(t, vip(1))]++
	}
	if len(seen) != 2 || seen[far(1).String()] > 100 {
		t.Errorf("%v, want one of four at %s", seen, far(1))
	}
	n.set(t, hosts("a.example", 1, 2)+hosts("b.example", 3))
	testutil.Eventually(t, rig.Limit, func() bool { return len(s.endpoints(t, "s1")) == 3 }, "a has two addresses")
}

// TestFamilies moves a service to an address of the other family: its name is then
// looked up in that one.
func TestFamilies(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		r := rig.New(t)
		serve(t, r, 1)
		six := netip.AddrPortFrom(rig.Far6, 8080)
		server(t, r, six)
		n := newNames(t, r, hosts("web.example", 1)+six.Addr().String()+" web.example\n")
		at := func(addr netip.AddrPort) string {
			return fmt.Sprintf("services:\n  - {name: s1, address: %q, path: %s, discover: {dns: {name: web.example, port: 8080, min_ttl: 200ms, servers: [%q]}}}\n", addr, path, n.at)
		}
		vip6 := netip.MustParseAddrPort("[fd00:96::1]:80")
		s := newStage(t, r, at(vip(1)))
		s.goes(t, 1, 1)
		s.reload(t, at(vip6))
		testutil.Eventually(t, rig.Limit, func() bool { return s.Dial(t, vip6) == six.String() }, "it is served in IPv6")
		s.reload(t, at(vip(1)))
		s.has(t, "s1", "1")
		s.goes(t, 1, 1)
	})
}
