package direct

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// of is a series of an endpoint.
func of(name string, service, endpoint netip.AddrPort) string {
	return fmt.Sprintf(`%s{cluster=%q,endpoint=%q}`, name, service, endpoint)
}

// TestFaultEjection: what the kernel side ejects is avoided at once, and everybody
// who asks is told.
func TestFaultEjection(t *testing.T) {
	t.Parallel()
	r, program := rig.New(t), ends(t)
	r.Give(t, rig.Far4)
	serveEnds(t, r, program, ":8001", ":8002")
	vip, panics, holds := netip.AddrPortFrom(vip4, 80), netip.AddrPortFrom(vip4, 81), netip.AddrPortFrom(vip4, 82)
	closed := netip.AddrPortFrom(rig.Far4, portClosed)
	config := "path: direct\nhealth: {failures: 2, base: 1h, max: 1h}\nno_endpoint: ENETUNREACH\nservices:\n" +
		service(vip, ", policy: round_robin", append(addrs(rig.Far4, 8001, 8002), closed)...) +
		service(panics, ", policy: round_robin", addrs(rig.Far4, portClosed, portClosed+1)...) +
		service(holds, ", policy: round_robin, health: {panic: 0}", addrs(rig.Far4, portClosed)...)
	i := r.Run(t, config)
	a := captive(t, r)
	refused := 0
	for range 30 {
		switch said := a.do("dial(%q, 80)", vip.Addr()); said {
		case "ECONNREFUSED":
			refused++
		case "ok":
		default:
			t.Errorf("connect gives %s", said)
		}
	}
	if refused != 2 {
		t.Errorf("%d connects were refused, want 2", refused)
	}
	all, _ := endpointsOf(t, i, vip.String())
	for _, list := range [][]admin.EndpointStatus{all, explained(t, i, vip.String()).Service.Endpoints} {
		for _, e := range list {
			bad := e.Address == closed.String()
			if e.Ejected != bad || (e.State == admin.EndpointEjected) != bad || (e.Failures == 2) != bad || (e.LastReason == flow.ReasonDialRefused) != bad {
				t.Errorf("%+v", e)
			}
		}
	}
	m := i.Series(t)
	for name, want := range map[string]float64{
		"pillion_endpoint_ejected": 1, "pillion_endpoint_ejections_total": 1, "pillion_endpoint_failures_total": 2,
		"pillion_endpoint_connections": 0, "pillion_endpoint_connects_total": 0,
	} {
		if got, ok := m[of(name, vip, closed)]; !ok || got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}

	// All of them fail: with a panic they are tried all the same, and without one
	// connect fails by what is configured, without a packet.
	for range 12 {
		a.wants("ECONNREFUSED", "dial(%q, 81)", vip4)
	}
	if x := explained(t, i, panics.String()); x.Path != flow.PathDirect || !x.Pick.IsValid() {
		t.Errorf("%+v", x)
	}
	for n := range 6 {
		want := "ENETUNREACH"
		if n < 2 {
			want = "ECONNREFUSED"
		}
		a.wants(want, "dial(%q, 82)", vip4)
	}
	x := explained(t, i, holds.String())
	if x.Path != flow.PathDeny || x.Reason != flow.ReasonNoEndpoint || x.Errno != "ENETUNREACH" || x.Pick.IsValid() {
		t.Errorf("%+v", x)
	}
	denied := 0
	for _, rec := range i.Ended(t, 48) {
		if rec.Path == flow.PathDeny && rec.Reason == flow.ReasonNoEndpoint && rec.OrigDst == holds && !rec.Endpoint.IsValid() {
			denied++
		}
	}
	if denied != 4 {
		t.Errorf("%d are on record as denied, want 4", denied)
	}
}

// TestFaultCheck: an endpoint that a check finds down gets no connection; with all
// of them down connect fails; and they come back.
func TestFaultCheck(t *testing.T) {
	t.Parallel()
	r, program := rig.New(t), ends(t)
	r.Give(t, rig.Far4)
	serveEnds(t, r, program, ":8001", ":8002")
	dir := t.TempDir()
	up := func(ports ...string) {
		t.Helper()
		replace(t, filepath.Join(dir, "up"), strings.Join(ports, "\n")+"\n")
	}
	up("8001", "8002")
	vip := netip.AddrPortFrom(vip4, 80)
	check := fmt.Sprintf(`, no_endpoint: EHOSTUNREACH, health_check: {command: [sh, -c, "grep -qx $PILLION_ENDPOINT_PORT %s/up"], interval: 200ms, timeout: 10s, unhealthy: 1, healthy: 1}`, dir)
	i := r.Run(t, "path: direct\nservices:\n"+service(vip, check, addrs(rig.Far4, 8001, 8002)...))
	a := captive(t, r)
	downs := func(want int) {
		t.Helper()
		testutil.Eventually(t, rig.Limit, func() bool {
			all, _ := endpointsOf(t, i, vip.String())
			down := 0
			for _, e := range all {
				if e.State == admin.EndpointDown {
					down++
				}
			}
			return down == want
		}, want, " endpoints are down")
	}
	downs(0)
	up("8002")
	downs(1)
	for range 20 {
		a.wants("ok", "dial(%q, 80)", vip4)
	}
	for _, f := range i.Ended(t, 20) {
		if f.Endpoint.Port() != 8002 {
			t.Errorf("%+v", f)
		}
	}
	if got := i.Series(t)[of("pillion_endpoint_down", vip, netip.AddrPortFrom(rig.Far4, 8001))]; got != 1 {
		t.Errorf("pillion_endpoint_down is %v", got)
	}
	up()
	downs(2)
	a.wants("EHOSTUNREACH", "dial(%q, 80)", vip4)
	up("8001")
	downs(1)
	a.wants("ok", "dial(%q, 80)", vip4)
}

// TestFaultBlame has an application make every endpoint fail, as anybody can who
// binds an address that is not answered. Others are served all the time: while
// most are ejected, ejections do not count.
func TestFaultBlame(t *testing.T) {
	t.Parallel()
	r, program := rig.New(t), ends(t)
	r.Give(t, rig.Far4)
	mute := netip.MustParsePrefix("192.0.2.77/32")
	r.App.AddAddr(t, testutil.AppLink, mute)
	r.World.Do(t, func() error {
		dst, err := netlink.ParseIPNet(mute.String())
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{Dst: dst, Type: unix.RTN_BLACKHOLE})
	})
	serveEnds(t, r, program, ":8001", ":8002", ":8003")
	vip := netip.AddrPortFrom(vip4, 80)
	i := r.Run(t, "path: direct\nservices:\n"+service(vip, "", addrs(rig.Far4, 8001, 8002, 8003)...))
	attacker := newApp(t, testutil.Place{NS: r.App, Cgroup: r.Scope.Child(t, "attacker")})
	victim := newApp(t, testutil.Place{NS: r.App, Cgroup: r.Scope.Child(t, "victim")})
	// Begun at once, and given up after the SYN was sent again.
	attacker.wants("None", "exec(%q, globals())", `
import time
def blame(a, port, n):
    all = []
    for _ in range(n):
        s = socket(AF_INET, SOCK_STREAM)
        s.setblocking(False)
        s.bind(("192.0.2.77", 0))
        s.connect_ex((a, port))
        all.append(s)
    time.sleep(1.3)
    for s in all: s.close()
`)
	fmt.Fprintf(attacker.in, "[blame(%q, 80, 40) for _ in range(2)] and None\n", vip4)
	served := 0
	done := make(chan string)
	go func() { done <- attacker.line() }()
	for over := false; !over; served++ {
		victim.wants("ok", "dial(%q, 80)", vip4)
		select {
		case said := <-done:
			if over = true; said != "None" {
				t.Errorf("attacker: %s", said)
			}
		default:
		}
	}
	m := i.Series(t)
	var ejections, failures float64
	for _, e := range addrs(rig.Far4, 8001, 8002, 8003) {
		ejections += m[of("pillion_endpoint_ejections_total", vip, e)]
		failures += m[of("pillion_endpoint_failures_total", vip, e)]
	}
	t.Logf("%v failures, %v ejections, %d connections of others", failures, ejections, served)
	if failures < 60 {
		t.Errorf("%v failures: the attack did not work", failures)
	}
	// What is closed at once says nothing.
	before := failures
	attacker.wants("None", "exec(%q, globals())", "time.sleep = lambda s: None")
	attacker.wants("None", "blame(%q, 80, 40)", vip4)
	m, failures = i.Series(t), 0
	for _, e := range addrs(rig.Far4, 8001, 8002, 8003) {
		failures += m[of("pillion_endpoint_failures_total", vip, e)]
	}
	if failures != before {
		t.Errorf("connects that were closed at once count as %v failures", failures-before)
	}
}
