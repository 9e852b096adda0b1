package matrix

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// direct is the arm in which every destination is a service with one endpoint of
// its own, on path: direct.
const direct = "direct"

// apart is how far an endpoint's port is from the one that the service has.
const apart = 100

// ownEndpoints are the addresses of the endpoints, by that of the service: where
// the route to the one has a source or an interface of its own, so has the other.
func ownEndpoints() map[string]string {
	return map[string]string{
		rig.Far4.String(): "198.51.100.17", other4: "198.51.100.18", routed4: "198.51.100.42", behind4: "198.51.100.43",
		rig.Far6.String(): "2001:db8:7::17", other6: "2001:db8:7::18", routed6: "2001:db8:7::42", behind6: "2001:db8:7::43",
		// Of these nobody answers.
		silent: "2001:db8:7::beef", unrouted: "2001:db8:dead::2",
	}
}

// directly is the configuration of the arm: services of the addresses at these
// ports.
func directly(ports ...string) string {
	var b strings.Builder
	fmt.Fprint(&b, "path: direct\nhealth: {failures: 0}\nservices:\n")
	for service := range ownEndpoints() {
		for _, p := range ports {
			at := netip.MustParseAddrPort(net.JoinHostPort(service, p))
			fmt.Fprintf(&b, "  - {address: %q, endpoints: [%q]}\n", at, endpointOf(at))
		}
	}
	return b.String()
}

// endpointOf is the endpoint of the service at an address.
func endpointOf(service netip.AddrPort) netip.AddrPort {
	a := netip.MustParseAddr(ownEndpoints()[service.Addr().String()])
	return netip.AddrPortFrom(a, service.Port()+apart)
}

// witnesses are what the endpoints saw.
type witnesses struct {
	mu  sync.Mutex
	saw map[ends]int
}

func (w *witnesses) note(remote, local net.Addr) {
	unmapped := func(a net.Addr) netip.AddrPort {
		p := a.(*net.TCPAddr).AddrPort()
		return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.saw[ends{unmapped(remote), unmapped(local)}]++
}

func (w *witnesses) count(e ends) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.saw[e]
}

// serveDirect has the endpoints echo, and tell who came.
func (w *world) serveDirect(t *testing.T) {
	t.Helper()
	for service, endpoint := range ownEndpoints() {
		if service != silent && service != unrouted {
			w.Give(t, netip.MustParseAddr(endpoint))
		}
	}
	w.saw = &witnesses{saw: map[ends]int{}}
	for _, r := range []struct{ version, to, via, src string }{
		{"-4", "198.51.100.42", testutil.WorldV4.Addr().String(), second4},
		{"-6", "2001:db8:7::42", testutil.WorldV6.Addr().String(), second6},
	} {
		run(t, w.App, "ip", r.version, "route", "add", r.to, "via", r.via, "src", r.src)
	}
	run(t, w.App, "ip", "-4", "route", "add", "198.51.100.43", "via", "203.0.113.66")
	run(t, w.App, "ip", "-6", "route", "add", "2001:db8:7::43", "via", "2001:db8:4::2")
	w.Serve(t, netip.MustParseAddrPort("[::]:7100"), w.witnessed)
}

func (w *world) witnessed(c net.Conn) {
	w.saw.note(c.RemoteAddr(), c.LocalAddr())
	echo(c)
}

// witnessedPost is post for an endpoint.
func (w *world) witnessedPost(rw http.ResponseWriter, r *http.Request) {
	remote := net.TCPAddrFromAddrPort(netip.MustParseAddrPort(r.RemoteAddr))
	w.saw.note(remote, r.Context().Value(http.LocalAddrContextKey).(net.Addr))
	post(rw, r)
}

// arm gives what is wanted of a connection in the arm: the cells are relay's.
func (s *sight) arm(want string) string {
	if s.direct && want == relay {
		return direct
	}
	return want
}

// checkDirect compares a connection by direct with its record and with what the
// endpoint saw: getsockname told the truth.
func (s *sight) checkDirect(t *testing.T, c conn, r flow.Record) {
	t.Helper()
	e := c.ends(t)
	to := endpointOf(e.dest)
	if r.Reason != flow.ReasonService || r.Endpoint != to || r.Attempts != 1 || r.Connect <= 0 {
		t.Errorf("%v, want endpoint %s: %+v", c.cell, to, r)
	}
	if n := s.world.saw.count(ends{e.source, to}); n == 0 {
		t.Errorf("%v: %s has not seen %s, which is what the application calls itself", c.cell, to, e.source)
	}
	s.picked[to]++
}

// settled fails the test unless every endpoint was connected to as often as was
// seen, and nobody is any more.
func (s *sight) settled(t *testing.T, exactly bool) {
	t.Helper()
	found := map[netip.AddrPort]int{}
	live := map[netip.AddrPort]int64{}
	testutil.Eventually(t, rig.Limit, func() bool {
		status, err := s.instance.Status(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		clear(live)
		for _, service := range status.Services {
			for _, e := range service.Endpoints {
				at := netip.MustParseAddrPort(e.Address)
				found[at] = int(e.Connects)
				if e.Live != 0 {
					live[at] = e.Live
				}
			}
		}
		return len(live) == 0
	}, "no endpoint has a connection, still: ", live)
	for at, have := range found {
		if have < s.picked[at] || exactly && have != s.picked[at] {
			t.Errorf("endpoint %s has %d connections ever, want %d", at, have, s.picked[at])
		}
	}
	for at := range s.picked {
		if _, ok := found[at]; !ok {
			t.Errorf("endpoint %s is not in the status", at)
		}
	}
}
