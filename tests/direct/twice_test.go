package direct

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
)

// beneath makes a world whose scope is some way below a cgroup that is the root
// to it, and Pillion's own beside it.
func beneath(t *testing.T) (w *world, root *testutil.Cgroup) {
	t.Helper()
	w = newWorld(t)
	root = testutil.NewCgroup(t)
	w.Scope = root.Child(t, "pods").Child(t, "pod")
	w.Home.Cgroup = root.Child(t, "sidecar")
	return w, root
}

// rewritten are the addresses of one family.
type rewritten struct {
	service, endpoint netip.AddrPort // ours; the endpoint answers
	behind            netip.AddrPort // ours, and its endpoint is vip
	vip, backend      netip.AddrPort // the plug-in's; the backend answers
	other             netip.AddrPort // the plug-in's, whose backend is backend too; nobody of ours knows it
	both              netip.AddrPort // each has it; ours: endpoint, the plug-in's: backend
}

func rewrittens() map[string]rewritten {
	return map[string]rewritten{
		"IPv4": {
			at("10.96.0.1:80"), at("198.51.100.7:7100"), at("10.96.0.2:80"), at("10.97.0.1:81"), at("198.51.100.8:7200"),
			at("10.97.0.2:82"), at("10.98.0.1:83"),
		},
		"IPv6": {
			at("[fd00:96::1]:80"), at("[2001:db8:7::7]:7100"), at("[fd00:96::2]:80"), at("[fd00:97::1]:81"), at("[2001:db8:7::8]:7200"),
			at("[fd00:97::2]:82"), at("[fd00:98::1]:83"),
		},
	}
}

// TestTwoRewriters has a network plug-in with socket load balancing at the root.
// Programs of the scope run first, so it sees what Pillion chose.
func TestTwoRewriters(t *testing.T) {
	w, root := beneath(t)
	vips := map[netip.AddrPort]netip.AddrPort{}
	for _, r := range rewrittens() {
		w.Serve(t, r.endpoint, answer("endpoint"))
		w.Serve(t, r.backend, answer("backend"))
		vips[r.vip], vips[r.both] = r.backend, r.backend
		vips[r.other] = netip.AddrPortFrom(r.backend.Addr(), r.backend.Port()+1)
		w.Serve(t, vips[r.other], answer("other"))
	}
	c := newCNI(t, root, vips)
	for _, path := range []flow.Path{flow.PathDirect, flow.PathRelay} {
		t.Run(path.String(), func(t *testing.T) { w.twice(t, c, path, vips) })
	}
}

// twice has applications connect to everything there is.
func (w *world) twice(t *testing.T, c *cni, path flow.Path, vips map[netip.AddrPort]netip.AddrPort) {
	var b strings.Builder
	fmt.Fprintf(&b, "path: %s\nconnect: mirror\nservices:\n", path)
	for _, r := range rewrittens() {
		b.WriteString(service(r.service, "", r.endpoint))
		b.WriteString(service(r.behind, "", r.vip))
		b.WriteString(service(r.both, "", r.endpoint))
	}
	if path == flow.PathDirect {
		b.WriteString("default: pass\n")
	}
	i := w.with(t, b.String())
	for family, r := range rewrittens() {
		before := c.saw(t, r.endpoint)
		meets := func(to netip.AddrPort, who string, want flow.Path, endpoint netip.AddrPort) {
			t.Helper()
			ways := []netip.AddrPort{to}
			if to.Addr().Is4() {
				ways = append(ways, mapped(to))
			}
			n := 0
			for _, to := range ways {
				for _, steps := range []string{"connect peer recv", "mptcp connect peer recv"} {
					n++
					w.wants(t, to, steps, fmt.Sprintf("connect=0, peer=0 %s %d, recv=%d %s", to.Addr(), to.Port(), len(who), who))
				}
			}
			for _, rec := range recordsOf(t, i, to, n) {
				if rec.Path != want || rec.Endpoint != endpoint || rec.Received != uint64(len(who)) {
					t.Errorf("%s to %s, want %s by %s: %+v", family, to, endpoint, want, rec)
				}
			}
		}
		meets(r.service, "endpoint", path, r.endpoint)
		meets(r.both, "endpoint", path, r.endpoint)
		if c.saw(t, r.endpoint) == before || c.saw(t, r.service) > 0 || c.saw(t, r.both) > 0 {
			t.Errorf("%s: the root saw %d connects to the endpoint, %d and %d to the services", family, c.saw(t, r.endpoint)-before, c.saw(t, r.service), c.saw(t, r.both))
		}
		if path == flow.PathDirect {
			// What was dialed in the end is the plug-in's choice.
			meets(r.behind, "backend", path, r.backend)
			meets(r.other, "other", flow.PathPass, vips[r.other])
		} else {
			meets(r.behind, "backend", path, r.vip)
			meets(r.other, "other", path, r.other)
		}
	}
	i.Idle(t)
	nobody(t, i)
	i.Conserved(t)
}

// TestSource has a route to a service's address that names another source than
// that to its endpoint: the application is told the address that the endpoint
// sees, not the one that it would have had.
func TestSource(t *testing.T) {
	w := newWorld(t)
	w.App.AddAddr(t, "lo", netip.MustParsePrefix("192.0.2.50/32"), netip.MustParsePrefix("2001:db8:1::50/128"))
	config := "path: direct\nservices:\n"
	var services []netip.AddrPort
	for _, r := range []struct {
		version, to, via, src string
		service, endpoint     netip.AddrPort
	}{
		{"-4", "10.96.0.0/16", testutil.WorldV4.Addr().String(), "192.0.2.50", at("10.96.0.1:80"), at("198.51.100.7:7100")},
		{"-6", "fd00:96::/32", testutil.WorldV6.Addr().String(), "2001:db8:1::50", at("[fd00:96::1]:80"), at("[2001:db8:7::7]:7100")},
	} {
		w.command(t, w.App, "ip", r.version, "route", "add", r.to, "via", r.via, "src", r.src)
		w.Serve(t, r.endpoint, func(c net.Conn) {
			fmt.Fprint(c, c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap())
			io.Copy(io.Discard, c)
		})
		config += service(r.service, "", r.endpoint)
		services = append(services, r.service)
	}
	i := w.with(t, config)
	for n, own := range []string{testutil.AppV4.Addr().String(), testutil.AppV6.Addr().String()} {
		for _, steps := range []string{"connect source recv", "mptcp connect source recv"} {
			w.wants(t, services[n], steps, fmt.Sprintf("connect=0, source=0 %s 0, recv=%d %s", own, len(own), own))
			if n == 0 {
				w.wants(t, mapped(services[n]), steps, fmt.Sprintf("connect=0, source=0 ::ffff:%s 0, recv=%d %s", own, len(own), own))
			}
		}
		for _, r := range recordsOf(t, i, services[n], 2*(2-n)) {
			if r.Source.Addr().String() != own {
				t.Errorf("want source %s: %+v", own, r)
			}
		}
	}
	nobody(t, i)
}
