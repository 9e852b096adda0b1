package direct

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// TestNames asks for the names of a socket at every turn of its life, at a service
// and, without one, at its endpoint: the answers are the same but for whom the
// application asked for.
func TestNames(t *testing.T) {
	w := newWorld(t)
	pairs := map[netip.AddrPort]netip.AddrPort{}
	config := "path: direct\ndefault: pass\nservices:\n"
	for vip, endpoint := range map[string]string{"10.96.0.1:80": "198.51.100.7:7100", "[fd00:96::1]:80": "[2001:db8:7::7]:7100"} {
		w.Serve(t, at(endpoint), echo)
		config += service(at(vip), "", at(endpoint))
		pairs[at(vip)] = at(endpoint)
		if at(vip).Addr().Is4() {
			pairs[mapped(at(vip))] = mapped(at(endpoint))
		}
	}
	i := w.with(t, config)
	for vip, endpoint := range pairs {
		named := func(a netip.AddrPort) string { return fmt.Sprintf("peer=0 %s %d", a.Addr(), a.Port()) }
		for _, steps := range []string{
			"peer source connect peer source send=hello recv shutdown recv peer source",
			"nonblock connect poll peer source send=hello pollin recv unspec peer source",
			"connect unspec connect peer source unspec peer",
			"mptcp peer source connect peer source send=hello recv",
			"mptcp nonblock connect poll peer source send=hello pollin recv unspec peer source",
			"mptcp connect unspec connect peer source unspec peer",
		} {
			want := strings.ReplaceAll(w.do(t, endpoint, steps), named(endpoint), named(vip))
			if !strings.Contains(want, named(vip)) {
				t.Errorf("%s to %s: nothing is named: %s", steps, endpoint, want)
			}
			w.wants(t, vip, steps, want)
		}
	}
	i.Idle(t)
	nobody(t, i)
}

// TestSharedEndpoint has two services with one endpoint, and one source port for
// both: to the kernel that is one connection, and the second is refused. This is
// the price of no hop in between.
func TestSharedEndpoint(t *testing.T) {
	w := newWorld(t)
	endpoint := w.Serve(t, netip.AddrPortFrom(rig.Far4, 7100), echo)
	one, two := at("10.96.0.1:80"), at("10.96.0.2:80")
	i := w.with(t, "path: direct\nservices:\n"+service(one, "", endpoint)+service(two, "", endpoint))
	bound := "reuse bind=" + testutil.AppV4.Addr().String() + "/700 "
	end := w.hold(t, one, bound+"connect wait")
	w.wants(t, two, bound+"connect soerror", "connect=-1 EADDRNOTAVAIL, soerror=0")
	w.wants(t, two, talk, talked)
	end()
	nobody(t, i)
}
