package connect

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// stand has a service on direct stand for every destination of some attempts: an
// address that exists nowhere, and that destination as its endpoint.
type stand struct {
	config strings.Builder
	vips   map[netip.Addr]netip.Addr // by the destination's
	have   map[netip.AddrPort]bool   // the services, by their address
}

func newStand(health string) *stand {
	s := &stand{vips: map[netip.Addr]netip.Addr{}, have: map[netip.AddrPort]bool{}}
	fmt.Fprintf(&s.config, "path: direct\ndefault: pass\nhealth: %s\nservices:\n", health)
	return s
}

// at gives the address that stands for a destination, in the same form.
func (s *stand) at(dest netip.AddrPort) netip.AddrPort {
	a := dest.Addr().Unmap()
	vip, ok := s.vips[a]
	if !ok {
		n := 101 + len(s.vips)
		vip = netip.AddrFrom4([4]byte{10, 97, 0, byte(n)})
		if a.Is6() {
			vip = netip.MustParseAddr(fmt.Sprintf("fd00:97::%d", n))
		}
		s.vips[a] = vip
	}
	at := netip.AddrPortFrom(vip, dest.Port())
	if !s.have[at] {
		s.have[at] = true
		s.config.WriteString(service(at, "", netip.AddrPortFrom(a, dest.Port())))
	}
	if dest.Addr().Is4In6() {
		vip = mapped(vip)
	}
	return netip.AddrPortFrom(vip, dest.Port())
}

// instead gives an attempt at what stands for its destinations.
func (s *stand) instead(a attempt) attempt {
	a.at = s.at(a.at)
	a.steps = slices.Clone(a.steps)
	for n, step := range a.steps {
		if to, ok := strings.CutPrefix(step, "to="); ok {
			host, port, _ := strings.Cut(to, "/")
			at := netip.MustParseAddrPort(net.JoinHostPort(host, port))
			a.steps[n] = "to=" + slashed(s.at(at))
		}
	}
	return a
}

// retold has transcripts tell of what stands for their destinations.
func (s *stand) retold(all map[string]transcript) map[string]transcript {
	retold := make(map[string]transcript, len(all))
	for name, tr := range all {
		tr = slices.Clone(tr)
		for n := range tr {
			for a, vip := range s.vips {
				tr[n].Note = strings.ReplaceAll(tr[n].Note, a.String()+" ", vip.String()+" ")
			}
		}
		retold[name] = tr
	}
	return retold
}

// sameByDirect makes attempts by direct, and compares what they see.
func (g *ground) sameByDirect(t *testing.T, all []attempt, without map[string]transcript) {
	s := newStand("{failures: 0}")
	moved := make([]attempt, len(all))
	for n, a := range all {
		moved[n] = s.instead(a)
	}
	g.fresh(t)
	i := g.with(t, s.config.String())
	compare(t, g, moved, s.retold(without))
	settled(t, i)
	ended := 0
	for _, total := range i.Totals(t) {
		if total.Path != flow.PathDirect {
			t.Errorf("%d connections took %s (%s), want direct", total.Count, total.Path, total.Reason)
		}
		ended += total.Count
	}
	if ended < len(all)/2 {
		t.Errorf("%d connections have ended, of %d attempts", ended, len(all))
	}
}

// endpoints are what an instance says of the endpoints of its services, by the
// address of the one and of the other.
func endpoints(t testing.TB, i *rig.Instance) map[netip.AddrPort]map[netip.AddrPort]admin.EndpointStatus {
	t.Helper()
	s, err := i.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	all := map[netip.AddrPort]map[netip.AddrPort]admin.EndpointStatus{}
	for _, service := range s.Services {
		of := map[netip.AddrPort]admin.EndpointStatus{}
		for _, e := range service.Endpoints {
			of[netip.MustParseAddrPort(e.Address)] = e
		}
		all[netip.MustParseAddrPort(service.Address)] = of
	}
	return all
}

// settled waits until no endpoint has an open connection.
func settled(t testing.TB, i *rig.Instance) {
	t.Helper()
	live := map[netip.AddrPort]int64{}
	testutil.Eventually(t, rig.Limit, func() bool {
		clear(live)
		for _, of := range endpoints(t, i) {
			for at, e := range of {
				if e.Live != 0 {
					live[at] = e.Live
				}
			}
		}
		return len(live) == 0
	}, "no endpoint has a connection, still: ", live)
}

// bads are destinations that fail, each in its way, and what connect says.
func bads() map[netip.AddrPort]string {
	all := map[netip.AddrPort]string{}
	for n := range farEach(0)[:2] {
		all[farEach(portClosed)[n]] = "ECONNREFUSED"
		all[farEach(portReset)[n]] = "ECONNREFUSED"
		all[farEach(portLateICMP + 1)[n]] = "EHOSTUNREACH"
		all[farEach(portSilent)[n]] = "ETIMEDOUT"
	}
	for n, errno := range []string{"EHOSTUNREACH", "EACCES", "EINVAL", "ENETUNREACH"} { // as routeTypes
		all[netip.AddrPortFrom(typed4(n), portEcho)] = errno
		all[netip.AddrPortFrom(typed6(n), portEcho)] = errno
	}
	all[netip.AddrPortFrom(noRoute4, portEcho)] = "ENETUNREACH"
	all[netip.AddrPortFrom(noRoute6, portEcho)] = "ENETUNREACH"
	return all
}

// vipOf numbers the services of a test.
func vipOf(like netip.Addr, n int) netip.AddrPort {
	f := families["IPv4"]
	if like.Is6() {
		f = families["IPv6"]
	}
	return netip.AddrPortFrom(f.vip, uint16(1000+n))
}

// TestNextAvoids has services of a good and a bad endpoint: the one connect that
// meets the bad one fails as the network says, and no other does.
func TestNextAvoids(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	var b strings.Builder
	fmt.Fprint(&b, "path: direct\nhealth: {failures: 1, panic: 0, base: 10m, max: 10m}\nservices:\n")
	type pair struct {
		vip, bad, good netip.AddrPort
		errno          string
	}
	var all []pair
	for bad, errno := range bads() {
		p := pair{vip: vipOf(bad.Addr(), len(all)), bad: bad, good: far4(portEcho), errno: errno}
		if bad.Addr().Is6() {
			p.good = far6(portEcho)
		}
		all = append(all, p)
		b.WriteString(service(p.vip, ", policy: round_robin", p.bad, p.good))
	}
	i := g.with(t, b.String())
	var round []attempt
	for n := range 4 {
		for _, p := range all {
			round = append(round, attempt{name: fmt.Sprintf("%s, %d", p.vip, n), at: p.vip, steps: strings.Fields("syncnt=1 connect soerror")})
		}
	}
	saw := map[string]transcript{}
	for n := range 4 { // one after the other: the next one avoids it
		for name, tr := range perform(t, g, round[n*len(all):][:len(all)]) {
			saw[name] = tr
		}
	}
	state := endpoints(t, i)
	for _, p := range all {
		failed := 0
		for n := range 4 {
			switch got := saw[fmt.Sprintf("%s, %d", p.vip, n)].String(); got {
			case "connect=0, soerror=0":
			case "connect=-1 " + p.errno + ", soerror=0":
				failed++
			default:
				t.Errorf("%s by %s: %s", p.bad, p.vip, got)
			}
		}
		bad, good := state[p.vip][p.bad], state[p.vip][p.good]
		if failed != 1 || !bad.Ejected || bad.Failures != 1 || good.Ejected || good.Failures != 0 || good.Connects != 3 {
			t.Errorf("%s: %d connects failed, want 1; bad: %+v, good: %+v", p.bad, failed, bad, good)
		}
	}
	settled(t, i)
}

// TestReturns has an endpoint return on trial after waits that double, and for
// good once it answers.
func TestReturns(t *testing.T) {
	t.Parallel()
	const base = 200 * time.Millisecond
	g := newGround(t)
	at, vip := far4(9300), netip.AddrPortFrom(vip4, 80)
	i := g.with(t, fmt.Sprintf("path: direct\nno_endpoint: EHOSTUNREACH\nhealth: {failures: 1, panic: 0, base: %s, max: 10m}\nservices:\n%s", base, service(vip, "", at)))
	syns := g.packets(t, "ip", "syns")
	var trials []time.Time
	testutil.Eventually(t, rig.Limit, func() bool {
		before := time.Now()
		switch got := g.do(t, vip, "connect").String(); got {
		case "connect=-1 EHOSTUNREACH":
		case refused:
			// Waits are up to a quarter shorter, and begin with the trial.
			if n := len(trials); n > 0 {
				if least := base << (n - 1) * 3 / 4; time.Since(trials[n-1]) < least {
					t.Errorf("trial %d came after %s, want %s at least", n, time.Since(trials[n-1]), least)
				}
			}
			trials = append(trials, before)
		default:
			t.Fatalf("connect to an endpoint that is dead: %s", got)
		}
		return len(trials) == 4
	}, "the endpoint is tried again and again")
	if n := g.packets(t, "ip", "syns") - syns; n != len(trials) {
		t.Errorf("%d SYNs left for %d trials", n, len(trials))
	}
	g.Serve(t, at, echo)
	testutil.Eventually(t, rig.Limit, func() bool {
		return g.do(t, vip, "connect send=hello recv").String() == alive
	}, "it returns when it answers")
	for range 20 {
		g.wants(t, vip, "connect send=hello recv", alive)
	}
	if e := endpoints(t, i)[vip][at]; e.Ejected || e.Failures != uint64(len(trials)) {
		t.Errorf("the endpoint after its return: %+v, %d trials", e, len(trials))
	}
	settled(t, i)
}

// TestPanic has three of four endpoints fail: where that is a panic they are
// picked all the same.
func TestPanic(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	var all, dead []netip.AddrPort
	for n := range 4 {
		at := far4(uint16(9400 + n))
		all = append(all, at)
		if n > 0 {
			dead = append(dead, at)
		}
	}
	g.Serve(t, all[0], echo)
	vip := func(panics int) netip.AddrPort { return netip.AddrPortFrom(vip4, uint16(panics)) }
	config := "path: direct\nhealth: {failures: 1, base: 10m, max: 10m}\nservices:\n"
	levels := map[int]bool{25: false, 26: true, 50: true}
	for level := range levels {
		config += service(vip(level), fmt.Sprintf(", policy: round_robin, health: {panic: %d}", level), all...)
	}
	i := g.with(t, config)
	for level, panics := range levels {
		testutil.Eventually(t, rig.Limit, func() bool {
			g.do(t, vip(level), "connect")
			state := endpoints(t, i)[vip(level)]
			return !slices.ContainsFunc(dead, func(at netip.AddrPort) bool { return state[at].Failures == 0 })
		}, "all dead endpoints have failed")
		failed := 0
		for range 12 {
			if got := g.do(t, vip(level), "connect").String(); got == refused {
				failed++
			} else if got != "connect=0" {
				t.Errorf("panic %d: %s", level, got)
			}
		}
		if panics && failed == 0 || !panics && failed > 0 {
			t.Errorf("panic %d: %d of 12 connects went to dead endpoints, 25%% are left", level, failed)
		}
	}
	settled(t, i)
}

// TestDown has endpoints that a health check finds down, though they answer:
// nobody is sent there, nor told anything but the configured errno.
func TestDown(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	config := "path: direct\nno_endpoint: ENETUNREACH\nservices:\n"
	check := fmt.Sprintf(", health_check: {tcp: {}, port: %d, interval: 200ms, timeout: 100ms, unhealthy: 1}", portClosed)
	for _, f := range families {
		config += service(netip.AddrPortFrom(f.vip, 80), check, netip.AddrPortFrom(f.far, portEcho), netip.AddrPortFrom(f.far, portGreets))
	}
	i := g.with(t, config)
	for _, f := range families {
		vip := netip.AddrPortFrom(f.vip, 80)
		testutil.Eventually(t, rig.Limit, func() bool {
			for _, e := range endpoints(t, i)[vip] {
				if !e.Down {
					return false
				}
			}
			return true
		}, "the endpoints are down")
		for _, steps := range []string{"connect soerror peer", "nonblock connect soerror peer"} {
			before := endpoints(t, i)[vip]
			// A verdict lasts a second.
			testutil.Eventually(t, rig.Limit, func() bool {
				before = endpoints(t, i)[vip]
				return g.do(t, vip, steps).String() == "connect=-1 ENETUNREACH, soerror=0, peer=-1 ENOTCONN"
			}, steps)
			for at, e := range endpoints(t, i)[vip] {
				if e.Connects != before[at].Connects || e.Failures != 0 || e.Ejected {
					t.Errorf("%s: %+v, before %+v", at, e, before[at])
				}
			}
		}
	}
	settled(t, i)
}

// TestNotToBlame has applications fail by their own doing: no endpoint is
// ejected for it, and others connect.
func TestNotToBlame(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	const port, silentPort = 80, 81
	config := "path: direct\nhealth: {failures: 1, panic: 0, base: 10m, max: 10m}\nservices:\n"
	for _, f := range families {
		config += service(netip.AddrPortFrom(f.vip, port), "", netip.AddrPortFrom(f.far, portEcho))
		config += service(netip.AddrPortFrom(f.vip, silentPort), "", netip.AddrPortFrom(f.far, portSilent))
	}
	i := g.with(t, config)
	on4, on6, as6 := netip.AddrPortFrom(vip4, port), netip.AddrPortFrom(vip6, port), netip.AddrPortFrom(mapped(vip4), port)
	const bound = "reuse bind=192.0.2.1/700 connect"
	first := g.begin(t, arguments(on4, strings.Fields(bound+" wait")...)...)
	if r := first.await(t, "connect"); r.Ret != 0 {
		t.Fatal(r)
	}
	for _, tt := range []struct {
		at          netip.AddrPort
		steps, want string
	}{
		{as6, "v6only connect soerror", "connect=-1 ENETUNREACH, soerror=0"},
		{on4, "bind=127.0.0.1 connect soerror", "connect=-1 EINVAL, soerror=0"},
		{on4, bound, "connect=-1 EADDRNOTAVAIL"},
	} {
		for range 3 {
			g.wants(t, tt.at, tt.steps, tt.want)
		}
	}
	first.kill()
	silences := []netip.AddrPort{netip.AddrPortFrom(vip4, silentPort), netip.AddrPortFrom(vip6, silentPort), netip.AddrPortFrom(mapped(vip4), silentPort)}
	for _, at := range silences {
		for range 3 {
			g.wants(t, at, "nonblock connect", "connect=-1 EINPROGRESS")
			g.wants(t, at, "sndtimeo=50 connect", "connect=-1 EINPROGRESS")
			g.wants(t, at, "nonblock connect unspec", "connect=-1 EINPROGRESS, unspec=0")
			g.wants(t, at, "nonblock connect shutdown", "connect=-1 EINPROGRESS, shutdown=0")
		}
	}
	settled(t, i)
	for vip, of := range endpoints(t, i) {
		for at, e := range of {
			if e.Ejected || e.Failures != 0 {
				t.Errorf("%s of %s is blamed: %+v", at, vip, e)
			}
		}
	}
	for _, at := range []netip.AddrPort{on4, on6, as6} {
		g.wants(t, at, "connect send=hello recv", alive)
	}
	// Who has waited for an answer knows something.
	for _, at := range silences[:2] {
		testutil.Eventually(t, rig.Limit, func() bool {
			return g.do(t, at, "sndtimeo=1500 connect soerror").retrans() > 0
		}, "a SYN is sent again")
		testutil.Eventually(t, rig.Limit, func() bool {
			for _, e := range endpoints(t, i)[at] {
				if !e.Ejected || e.Failures != 1 {
					return false
				}
			}
			return true
		}, at, " is ejected")
	}
	settled(t, i)
}
