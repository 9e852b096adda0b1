package direct

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Addresses of services, which nobody has, and of what is behind them.
var (
	vip4 = netip.MustParseAddr("10.96.0.12")
	vip6 = netip.MustParseAddr("fd00:96::12")

	// The world drops what is for these, silently.
	silent4 = rig.Void4
	silent6 = netip.MustParseAddr("2001:db8:dead::1")
	// The world has no route to these, and says so.
	lost4 = netip.MustParseAddr("203.0.113.130")
	lost6 = netip.MustParseAddr("2001:db8:dead::2")
	// The application's namespace has no route to these.
	noRoute4 = netip.MustParseAddr("203.0.113.200")
	noRoute6 = netip.MustParseAddr("2001:db8:dead::3")
)

// Ports of the server of testdata/ends.c, and one where nobody listens.
const (
	portOne    = 8001
	portTwo    = 8002
	portClosed = 9
)

// ends builds testdata/ends.c.
func ends(t testing.TB) string {
	t.Helper()
	testutil.Need(t, "gcc")
	path := filepath.Join(t.TempDir(), "ends")
	out, err := exec.Command("gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", path, "testdata/ends.c").CombinedOutput()
	if err != nil {
		t.Fatalf("build ends: %v\n%s", err, out)
	}
	return path
}

// route adds a route of a kind to a namespace.
func route(t testing.TB, ns *testutil.NS, kind int, to netip.Addr) {
	t.Helper()
	ns.Do(t, func() error {
		dst := &net.IPNet{IP: to.AsSlice(), Mask: net.CIDRMask(to.BitLen(), to.BitLen())}
		return netlink.RouteAdd(&netlink.Route{Dst: dst, Type: kind})
	})
}

// dead makes the addresses that nobody answers at.
func dead(t testing.TB, r *rig.Rig) {
	t.Helper()
	for _, a := range []netip.Addr{silent4, silent6} {
		route(t, r.World, unix.RTN_BLACKHOLE, a)
	}
	for _, a := range []netip.Addr{lost4, lost6} {
		route(t, r.World, unix.RTN_UNREACHABLE, a)
	}
	for _, a := range []netip.Addr{noRoute4, noRoute6} {
		route(t, r.App, unix.RTN_UNREACHABLE, a)
	}
	r.World.Sysctl(t, "net/ipv4/ip_forward", "1")
	r.World.Sysctl(t, "net/ipv6/conf/all/forwarding", "1")
	r.World.Sysctl(t, "net/ipv4/icmp_ratelimit", "0")
	r.World.Sysctl(t, "net/ipv6/icmp/ratelimit", "0")
}

// serveEnds runs the server of testdata/ends.c in the world, at IPv4 addresses or,
// of ":PORT", at all.
func serveEnds(t testing.TB, r *rig.Rig, program string, addrs ...string) {
	t.Helper()
	cmd := exec.Command(program, append([]string{"serve"}, addrs...)...)
	stop, out := testutil.Pipes(t, cmd)
	if err := r.World.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stop.Close()
		io.Copy(io.Discard, out)
		if err := cmd.Wait(); err != nil {
			t.Errorf("server: %v", err)
		}
	})
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
}

// endsServices are the services that testdata/ends.c dials.
func endsServices() string {
	var b strings.Builder
	b.WriteString("path: direct\nhealth: {failures: 0}\nservices:\n")
	for _, f := range []struct{ vip, live, silent, lost, noRoute netip.Addr }{
		{vip4, rig.Far4, silent4, lost4, noRoute4}, {vip6, rig.Far6, silent6, lost6, noRoute6},
	} {
		for port, endpoints := range map[uint16][]netip.AddrPort{
			80: {netip.AddrPortFrom(f.live, portOne), netip.AddrPortFrom(f.live, portTwo)},
			81: {netip.AddrPortFrom(f.live, portClosed), netip.AddrPortFrom(f.live, portClosed+1)},
			82: {netip.AddrPortFrom(f.silent, portOne)},
			83: {netip.AddrPortFrom(f.noRoute, portOne)},
			84: {netip.AddrPortFrom(f.lost, portOne)},
		} {
			b.WriteString(service(netip.AddrPortFrom(f.vip, port), "", endpoints...))
		}
	}
	return b.String()
}

// service is one in YAML, with the keys of more.
func service(at netip.AddrPort, more string, endpoints ...netip.AddrPort) string {
	quoted := make([]string, len(endpoints))
	for n, e := range endpoints {
		quoted[n] = fmt.Sprintf("%q", e)
	}
	of := ""
	if len(endpoints) > 0 {
		of = ", endpoints: [" + strings.Join(quoted, ", ") + "]"
	}
	return fmt.Sprintf("  - {name: %q, address: %q%s%s}\n", at, at, of, more)
}

// liveEverywhere is how many connections are open by status, by metrics and by the
// kernel's map.
func liveEverywhere(t testing.TB, i *rig.Instance) (status, metrics, kernel int) {
	t.Helper()
	s, err := i.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range s.Services {
		for _, e := range v.Endpoints {
			status += int(e.Live)
		}
	}
	for name, n := range i.Series(t) {
		if strings.HasPrefix(name, "pillion_endpoint_connections{") {
			metrics += int(n)
		}
	}
	m, err := ebpf.LoadPinnedMap(filepath.Join("/sys/fs/bpf/pillion", i.Name, "endpoints"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for n := range uint32(32) { // more than there are
		var e bpf.Endpoint
		if err := m.Lookup(n, &e); err != nil {
			t.Fatal(err)
		}
		kernel += int(int32(e.Live))
	}
	return status, metrics, kernel
}

// TestCountsEnds ends 50,000 connections in all ways: nothing is left, and every
// one of them is on record.
func TestCountsEnds(t *testing.T) {
	program := ends(t)
	r := rig.New(t)
	dead(t, r)
	for _, ns := range []*testutil.NS{r.App, r.World} {
		ns.Sysctl(t, "net/ipv4/tcp_fastopen", "3")
	}
	r.App.Sysctl(t, "net/ipv4/tcp_syn_retries", "1")
	r.Give(t, rig.Far4)
	r.Give(t, rig.Far6)
	serveEnds(t, r, program, fmt.Sprint(":", portOne), fmt.Sprint(":", portTwo))
	i := r.Run(t, endsServices())

	var all sync.WaitGroup
	for _, c := range []struct {
		family string
		count  int
		vip    string
	}{{"4", 20_000, vip4.String()}, {"6", 20_000, vip6.String()}, {"6", 12_000, "::ffff:" + vip4.String()}} {
		all.Go(func() {
			out, err := r.Try(program, "end", c.family, fmt.Sprint(c.count), c.vip)
			if err != nil {
				t.Errorf("%s: %v", c.vip, err)
			}
			t.Logf("%s: %s", c.vip, strings.TrimSpace(out))
		})
	}
	all.Wait()
	if t.Failed() {
		return
	}

	var status, metrics, kernel int
	testutil.Eventually(t, rig.Limit, func() bool {
		status, metrics, kernel = liveEverywhere(t, i)
		return status == 0 && metrics == 0 && kernel == 0
	}, "nobody is connected, but by status ", number{&status}, ", by metrics ", number{&metrics}, ", by the kernel ", number{&kernel})
	i.Conserved(t)
	m := i.Series(t)
	if n := m["pillion_connects_total"]; n < 50_000 {
		t.Errorf("there were %v connects", n)
	}
	if n := m["pillion_escapes_total"]; n != 0 {
		t.Errorf("%v escaped", n)
	}
	if n := m["pillion_reconcile_corrections_total"]; n != 0 {
		t.Errorf("%v counts were mended", n)
	}
	// Every one is on record.
	var ended int
	testutil.Eventually(t, rig.Limit, func() bool {
		ended = int(i.Series(t)[`pillion_records_lost_total{where="ring"}`])
		for _, total := range i.Totals(t) {
			ended += total.Count
		}
		return ended == int(m["pillion_connects_total"])
	}, "of ", m["pillion_connects_total"], " connects are on record: ", number{&ended})
	for _, total := range i.Totals(t) {
		t.Logf("%6d %s %s %s", total.Count, total.Path, total.Reason, total.End)
		// Who gave up knows nothing of the endpoint: only a router does.
		if total.End == flow.ReasonDialUnreachable && total.Count > 600 {
			t.Errorf("%d were unreachable, of 600", total.Count)
		}
	}
}

// number is one that is printed as it is then.
type number struct{ of *int }

func (n number) String() string { return fmt.Sprint(*n.of) }
