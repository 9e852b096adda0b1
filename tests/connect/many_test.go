package connect

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// patient is a handler that dials for longer than giveUpLimit, so that a dial
// that ends before was cancelled.
const patient = "connect: mirror\nrelay: {dial_timeout: 25s, dial_budget: 25s}"

// giveUpLimit is how long dials that were given up may take to end.
const giveUpLimit = 15 * time.Second

// dialing counts the sockets in the application's namespace that connect to a
// port: the handler's, and applications' that are not redirected. Those of
// redirected ones lead to slots.
func dialing(t testing.TB, g *ground, to netip.AddrPort) int {
	t.Helper()
	family := uint8(unix.AF_INET)
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	n := 0
	g.App.Do(t, func() error {
		all, err := netlink.SocketDiagTCP(family)
		for _, s := range all {
			at, _ := netip.AddrFromSlice(s.ID.Destination)
			if s.State == netlink.TCP_SYN_SENT && at.Unmap() == to.Addr() && s.ID.DestinationPort == to.Port() {
				n++
			}
		}
		return err
	})
	return n
}

// count is a number that is printed as it is then.
type count int

func (c *count) String() string { return fmt.Sprint(int(*c)) }

// dials waits until the handler dials so often.
func dials(t testing.TB, g *ground, to netip.AddrPort, want int) {
	t.Helper()
	var n count
	testutil.Eventually(t, rig.Limit, func() bool {
		n = count(dialing(t, g, to))
		return int(n) == want
	}, "dials under way to ", to, ": want ", want, ", have ", &n)
}

// forgotten fails the test unless an instance has no trace of connections that
// were given up, but for those that became early on a busy machine.
func forgotten(t testing.TB, g *ground, i *rig.Instance, to netip.AddrPort) {
	t.Helper()
	early := g.early(t)
	var n count
	testutil.Eventually(t, giveUpLimit, func() bool {
		n = count(dialing(t, g, to))
		return int(n) <= early
	}, "dials under way to ", to, ": want ", early, " at most, have ", &n)
	testutil.Eventually(t, giveUpLimit, func() bool {
		live, err := i.Flows(context.Background(), admin.FlowQuery{Live: true})
		if err != nil {
			t.Fatal(err)
		}
		s, err := i.Status(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		n = count(max(len(live), s.Live))
		return int(n) <= early
	}, "connections listed as live: want ", early, " at most, have ", &n)
}

// TestManyGivenUp has 2,000 connects wait for one that is silent, and be given
// up: nothing is left of them.
func TestManyGivenUp(t *testing.T) {
	const n = 2000
	g := newGround(t)
	i := g.with(t, patient)
	for _, at := range []netip.AddrPort{far4(portSilent), far6(portSilent)} {
		a := g.begin(t, append([]string{"many"}, arguments(at, fmt.Sprint(n))...)...)
		if r := a.await(t, "many"); r.Ret != n {
			t.Fatalf("%d of %d connects to %s are in progress", r.Ret, n, at)
		}
		dials(t, g, at, n)
		a.tell()
		if r := a.await(t, "pending"); r.Ret < n-g.early(t) {
			t.Errorf("%d of %d connects to %s are still in progress", r.Ret, n, at)
		}
		a.await(t, "given up")
		forgotten(t, g, i, at)
		a.tell()
		if _, err := a.rest(); err != nil {
			t.Error(err)
		}
	}
	// Then all is as before.
	g.wants(t, far4(portClosed), "connect", "connect=-1 ECONNREFUSED")
	g.wants(t, far6(portEcho), "connect send=hello recv", "connect=0, send=5, recv=5 hello")
}

// TestKilledWhilePending kills an application with 300 connects under way, and
// ends single ones by other means: their dials are cancelled.
func TestKilledWhilePending(t *testing.T) {
	t.Parallel()
	const n = 300
	g := newGround(t)
	i := g.with(t, patient)
	for _, at := range []netip.AddrPort{far4(portSilent), far6(portSilent)} {
		a := g.begin(t, append([]string{"many"}, arguments(at, fmt.Sprint(n))...)...)
		a.await(t, "many")
		dials(t, g, at, n)
		a.kill()
		forgotten(t, g, i, at)
		for _, steps := range []string{
			"nonblock connect wait reopen wait",
			"nonblock connect wait unspec wait",
			"sndtimeo=200 connect wait unspec wait",
		} {
			a := g.begin(t, arguments(at, strings.Fields(steps)...)...)
			a.await(t, "wait")
			dials(t, g, at, 1)
			a.tell()
			a.await(t, "wait")
			forgotten(t, g, i, at)
			a.tell()
			if _, err := a.rest(); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestFlood makes 20,000 fast connections by 8 threads, half of them to a server
// that speaks first: none is reset, and no byte is lost.
func TestFlood(t *testing.T) {
	const n, threads = 5000, 8
	g := newGround(t)
	server4 := g.Serve(t, far4(9100), greet)
	client4 := g.Serve(t, far4(9101), echoGreeting)
	server6 := g.Serve(t, far6(9100), greet)
	client6 := g.Serve(t, far6(9101), echoGreeting)
	i := g.with(t, "connect: mirror")
	for _, tt := range []struct {
		at    netip.AddrPort
		first string
	}{{server4, "server"}, {client4, "client"}, {server6, "server"}, {client6, "client"}} {
		a := g.begin(t, append([]string{"flood"}, arguments(tt.at, fmt.Sprint(n), fmt.Sprint(threads), tt.first)...)...)
		if r := a.await(t, "flood"); r.Ret != n || r.Note != "" {
			t.Errorf("%s, the %s first: %d of %d connections are right: %s", tt.at, tt.first, r.Ret, n, r.Note)
		}
		if _, err := a.rest(); err != nil {
			t.Error(err)
		}
	}
	redirected(t, i, 4*n)
	// Refused ones are refused, each, and by no other errno.
	for _, at := range []netip.AddrPort{far4(portClosed), far6(portReset)} {
		g.calmly(t, func() bool {
			early := g.early(t)
			a := g.begin(t, append([]string{"flood"}, arguments(at, fmt.Sprint(n), fmt.Sprint(threads), "client")...)...)
			r := a.await(t, "flood")
			if _, err := a.rest(); err != nil {
				t.Error(err)
			}
			if r.Ret == 0 && r.Note == "connect ECONNREFUSED; " {
				return true
			}
			if g.early(t) == early {
				t.Errorf("%s: of %d connections %d are right, the others %s", at, n, r.Ret, r.Note)
			}
			return false
		})
	}
}
