package connect

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// Addresses of services. Nobody has them.
var (
	vip4 = netip.MustParseAddr("10.96.0.12")
	vip6 = netip.MustParseAddr("fd00:96::12")
)

// service is one in YAML, with the keys of more.
func service(at netip.AddrPort, more string, endpoints ...netip.AddrPort) string {
	quoted := make([]string, len(endpoints))
	for n, e := range endpoints {
		quoted[n] = fmt.Sprintf("%q", e)
	}
	return fmt.Sprintf("  - {name: %q, address: %q, endpoints: [%s]%s}\n", at, at, strings.Join(quoted, ", "), more)
}

// families are the addresses of the two families at which services and their
// endpoints are.
var families = map[string]struct{ vip, far netip.Addr }{
	"IPv4": {vip4, rig.Far4},
	"IPv6": {vip6, rig.Far6},
}

// TestOneDead has a service with one endpoint that is dead, in one way or
// another, and one that is not: every connect succeeds.
func TestOneDead(t *testing.T) {
	t.Parallel()
	const tries = 30 // of two endpoints that are equal
	g := newGround(t)
	dead := map[string]uint16{"closed": portClosed, "reset": portReset, "unreachable": portICMP + 1}
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			var b strings.Builder
			fmt.Fprintf(&b, "connect: %s\nhealth: {failures: 65535}\nservices:\n", mode)
			var vips []netip.AddrPort
			for _, f := range families {
				for _, port := range dead {
					vip := netip.AddrPortFrom(f.vip, port)
					vips = append(vips, vip)
					b.WriteString(service(vip, "", netip.AddrPortFrom(f.far, port), netip.AddrPortFrom(f.far, portEcho)))
				}
			}
			i := g.with(t, b.String())
			var all []attempt
			for _, vip := range vips {
				for n := range tries {
					all = append(all, attempt{name: fmt.Sprintf("%s, %d", vip, n), at: vip, steps: strings.Fields("connect send=hello recv")})
				}
			}
			for name, tr := range perform(t, g, all) {
				if got := tr.String(); got != "connect=0, send=5, recv=5 hello" {
					t.Errorf("%s: %s", name, got)
				}
			}
			s, err := i.Status(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			for _, service := range s.Services {
				for _, e := range service.Endpoints {
					at := netip.MustParseAddrPort(e.Address)
					if at.Port() != portEcho && e.Failures == 0 {
						t.Errorf("endpoint %s of %s was never tried: the test tests nothing", e.Address, service.Name)
					}
				}
			}
		})
	}
}

// TestAllDead has services whose endpoints are all dead: what the last dial got
// is what connect gives. One that is named on early is connected and reset.
func TestAllDead(t *testing.T) {
	t.Parallel()
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			g := newGround(t)
			var b strings.Builder
			fmt.Fprintf(&b, "connect: %s\nservices:\n", mode)
			for _, f := range families {
				far := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(f.far, port) }
				b.WriteString(service(netip.AddrPortFrom(f.vip, 80), "", far(portClosed), far(portReset)))
				b.WriteString(service(netip.AddrPortFrom(f.vip, 81), "", far(portICMP+1)))
				b.WriteString(service(netip.AddrPortFrom(f.vip, 82), ", connect: early", far(portClosed)))
				b.WriteString(service(netip.AddrPortFrom(f.vip, 83), ", connect: mirror", far(portClosed)))
			}
			g.with(t, b.String())
			for _, f := range families {
				vip := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(f.vip, port) }
				for range 3 {
					g.wants(t, vip(80), "connect soerror", "connect=-1 ECONNREFUSED, soerror=0")
					g.wants(t, vip(80), "nonblock connect poll soerror", "connect=-1 EINPROGRESS, poll=1 OUT ERR HUP, soerror=0 ECONNREFUSED")
				}
				g.wants(t, vip(81), "connect", "connect=-1 EHOSTUNREACH")
				g.wants(t, vip(82), "connect recv", "connect=0, recv=-1 ECONNRESET")
				g.wants(t, vip(83), "connect", "connect=-1 ECONNREFUSED")
			}
		})
	}
}

// TestNoEndpoint has services all of whose endpoints are known to be dead:
// connect fails at once with the configured errno, and no packet leaves.
func TestNoEndpoint(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	errnos := []string{"", "ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH"}
	for _, mode := range []string{"connect: mirror", "connect: adaptive", "connect: early", "path: direct"} {
		t.Run(mode, func(t *testing.T) {
			var b strings.Builder
			fmt.Fprintf(&b, "%s\nno_endpoint: EHOSTUNREACH\nhealth: {failures: 1, panic: 0, base: 10m, max: 10m}\nservices:\n", mode)
			for _, f := range families {
				for n, errno := range errnos {
					more := ""
					if errno != "" {
						more = ", no_endpoint: " + errno
					}
					b.WriteString(service(netip.AddrPortFrom(f.vip, uint16(80+n)), more, netip.AddrPortFrom(f.far, portClosed), netip.AddrPortFrom(f.far, portReset)))
				}
			}
			i := g.with(t, b.String())
			for _, f := range families {
				for n := range errnos {
					eject(t, g, i, netip.AddrPortFrom(f.vip, uint16(80+n)))
				}
			}
			syns := g.packets(t, "ip", "syns") + g.packets(t, "ip6", "syns")
			failed, asked, early := unavailable(t, i), uint64(0), g.early(t)
			for _, f := range families {
				for n, errno := range errnos {
					if errno == "" {
						errno = "EHOSTUNREACH"
					}
					vip := netip.AddrPortFrom(f.vip, uint16(80+n))
					asked += 3
					g.wants(t, vip, "connect soerror peer", "connect=-1 "+errno+", soerror=0, peer=-1 ENOTCONN")
					g.wants(t, vip, "nonblock connect", "connect=-1 "+errno)
					g.wants(t, vip, "uring", "uring=-1 "+errno)
				}
			}
			if n := g.packets(t, "ip", "syns") + g.packets(t, "ip6", "syns") - syns; n != 0 {
				t.Errorf("%d SYNs left for endpoints that are known to be dead", n)
			}
			if n := unavailable(t, i) - failed; n != asked && g.early(t) == early {
				t.Errorf("%d are counted, want %d: %v", n, asked, i.Reasons(t))
			}
		})
	}
}

// eject connects to a service until it knows that all its endpoints are dead.
func eject(t *testing.T, g *ground, i *rig.Instance, vip netip.AddrPort) {
	t.Helper()
	testutil.Eventually(t, rig.Limit, func() bool {
		g.do(t, vip, "connect")
		s, err := i.Status(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		for _, service := range s.Services {
			if service.Name != vip.String() {
				continue
			}
			for _, e := range service.Endpoints {
				if !e.Ejected {
					return false
				}
			}
			return true
		}
		t.Fatalf("no service %s in %+v", vip, s.Services)
		return false
	}, "all endpoints of ", vip, " are ejected")
}

// unavailable is how many connects failed since no endpoint was available.
func unavailable(t testing.TB, i *rig.Instance) uint64 {
	t.Helper()
	return i.Reasons(t)["no_endpoint"]
}
