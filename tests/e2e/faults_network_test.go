package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// TestAddressChange gives the namespace other addresses while an application
// connects: new connections come from them, and they themselves are not
// captured.
func TestAddressChange(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	i := g.Run(t, "")
	l := startLoad(t, g.Rig, g.job())
	l.becomes(t, "relayed", (*outcome).relayed)
	new4, new6 := netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8:1::9")
	w := window{from: now()}
	// Else the second address goes with the first.
	g.App.Sysctl(t, "net/ipv4/conf/all/promote_secondaries", "1")
	g.App.AddAddr(t, testutil.AppLink, netip.PrefixFrom(new4, 24), netip.PrefixFrom(new6, 64))
	g.command(t, "ip", "addr", "del", testutil.AppV4.String(), "dev", testutil.AppLink)
	g.command(t, "ip", "addr", "del", testutil.AppV6.String(), "dev", testutil.AppLink)
	w.to = now() + int64(settling)
	l.becomes(t, "relayed, from the new addresses", func(o *outcome) bool {
		return o.relayed() && (o.Local.Addr() == new4 || o.Local.Addr() == new6)
	})
	all := l.stop(t)
	g.cutOff(t, "src", testutil.AppV4.Addr().String())
	g.cutOff(t, "src", "["+testutil.AppV6.Addr().String()+"]")
	for _, o := range all {
		// One that uses an address when that goes away stays unserved.
		if !o.served() && !w.touches(&o) {
			t.Errorf("unserved: %s", &o)
		}
	}
	before := i.Reasons(t)["own_address"]
	// The client that dials its own new addresses reaches itself there.
	j := g.job()
	j.Targets = []netip.AddrPort{netip.AddrPortFrom(new4, 7070), netip.AddrPortFrom(new6, 7070)}
	l = startLoad(t, g.Rig, j)
	l.becomes(t, "passed", (*outcome).passed)
	all = l.stop(t)
	for _, o := range all {
		if !strings.HasPrefix(o.Said, selfName) {
			t.Errorf("its own address: %s", &o)
		}
	}
	if got := i.Reasons(t)["own_address"] - before; got != uint64(len(all)) {
		t.Errorf("%d connections with reason own_address, want %d", got, len(all))
	}
	// What was its own is not any more: nobody is there, and it is captured.
	s := i.Reasons(t)["default"]
	testutil.Eventually(t, rig.Limit, func() bool {
		g.Try("python3", "-c", talk, testutil.AppV4.Addr().String(), "7070")
		return i.Reasons(t)["default"] > s
	}, "the old address is captured")
}

// cutOff ends the connections in the application's namespace that a test has
// taken the address or the way from. Nobody hears of that: they would stay for as
// long as the kernel sends again what cannot arrive, and the instance with them.
func (g *ground) cutOff(t *testing.T, filter ...string) {
	t.Helper()
	inside(t, g.App, "ss", append([]string{"--tcp", "--kill"}, filter...)...)
}

// byFailure tells whether a connection went by on_failure.
func byFailure(setting string, o *outcome) bool {
	if setting == "open" {
		return o.passed()
	}
	return o.refused()
}

// TestNoIPv6 runs where IPv6 cannot be redirected, since it is off on the
// loopback interface. IPv4 is relayed, IPv6 goes by on_failure.
func TestNoIPv6(t *testing.T) {
	t.Parallel()
	for _, setting := range []string{"open", "closed"} {
		t.Run(setting, func(t *testing.T) {
			g := newGround(t)
			g.App.Sysctl(t, "net/ipv6/conf/lo/disable_ipv6", "1")
			i := g.Run(t, "on_failure: "+setting)
			l := startLoad(t, g.Rig, g.job())
			l.becomes(t, "relayed by IPv4, "+setting+" by IPv6", func(o *outcome) bool {
				if o.To == g.at4 {
					return o.relayed()
				}
				return byFailure(setting, o)
			})
			l.stop(t)
			if reasons := i.Reasons(t); reasons["no_family"] == 0 {
				t.Errorf("reasons %v, want no_family", reasons)
			}
		})
	}
}

// TestIPv6Ends switches IPv6 off on the loopback interface of a running
// instance, and on again: meanwhile IPv6 goes by on_failure, and afterwards all
// is redirected again.
func TestIPv6Ends(t *testing.T) {
	t.Parallel()
	for _, setting := range []string{"open", "closed"} {
		t.Run(setting, func(t *testing.T) {
			g := newGround(t)
			g.Run(t, "on_failure: "+setting)
			l := startLoad(t, g.Rig, g.job())
			l.becomes(t, "relayed", (*outcome).relayed)
			g.App.Sysctl(t, "net/ipv6/conf/lo/disable_ipv6", "1")
			l.becomes(t, setting, func(o *outcome) bool {
				return o.To == g.at6 && byFailure(setting, o) || o.To == g.at4 && o.relayed()
			})
			g.App.Sysctl(t, "net/ipv6/conf/lo/disable_ipv6", "0")
			l.becomes(t, "relayed again", (*outcome).relayed)
			l.stop(t)
			g.cutOff(t, "--ipv6")
		})
	}
}

// TestIPv6EndsWhileAway switches IPv6 off while a killed run is away: the next
// one takes over what it left, without IPv6.
func TestIPv6EndsWhileAway(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	i := g.Run(t, "")
	i.Kill(t)
	g.App.Sysctl(t, "net/ipv6/conf/lo/disable_ipv6", "1")
	i.Launch(t)
	l := startLoad(t, g.Rig, g.job())
	l.becomes(t, "relayed by IPv4", func(o *outcome) bool {
		return o.To == g.at4 && o.relayed() || o.To == g.at6 && o.passed()
	})
	l.stop(t)
	if reasons := i.Reasons(t); reasons["no_family"] == 0 {
		t.Errorf("reasons %v, want no_family", reasons)
	}
}

// TestExisting has a connection that is older than the capture. It is reported
// and left alone, or reset, so that the application comes back captured. One that would
// pass then is not reset.
func TestExisting(t *testing.T) {
	t.Parallel()
	for _, setting := range []string{"report", "reset", "reset\nexclude: [%s]"} {
		t.Run(strings.ReplaceAll(setting, "\n", " "), func(t *testing.T) {
			g := newGround(t)
			passes := strings.Contains(setting, "exclude")
			if passes {
				setting = fmt.Sprintf(setting, g.at4.Addr())
			}
			s := newSession(t, g.Rig, g.at4)
			if strings.HasPrefix(s.first, "errno") {
				t.Fatal(s.first)
			}
			_, own, _ := strings.Cut(s.first, " ")
			// The application has accepted one too, which is nobody's concern.
			inbound := g.inbound(t)
			i := g.Run(t, "existing: "+setting)
			if setting != "reset" {
				if got := s.ask("still there?"); got != "still there?" {
					t.Errorf("the older connection: %q", got)
				}
				st, err := i.Status(context.Background())
				if err != nil {
					t.Fatal(err)
				}
				if !strings.Contains(fmt.Sprint(st.Problems), "older") {
					t.Errorf("problems %q", st.Problems)
				}
				if log := i.Log(); strings.Count(log, "reason=existing") != 1 || !strings.Contains(log, "source="+own) {
					t.Errorf("no report of %s:\n%s", own, log)
				}
			} else {
				if got := s.ask("still there?"); got != "errno ECONNABORTED" && got != "errno EPIPE" && got != "EOF" {
					t.Errorf("the older connection: %q", got)
				}
			}
			if got := inbound.ask("still there?"); got != "still there?" {
				t.Errorf("the connection that the application accepted: %q", got)
			}
			if passes {
				return
			}
			l := startLoad(t, g.Rig, job{Targets: []netip.AddrPort{g.at4}, Workers: 1, Pause: time.Millisecond})
			l.becomes(t, "relayed", (*outcome).relayed)
			l.stop(t)
		})
	}
}

// inbound is a connection from the world to an application that echoes.
func (g *ground) inbound(t *testing.T) *session {
	t.Helper()
	server := g.Command("python3", "-u", "-c", `
import socket
l = socket.create_server(("", 7171))
print("ready")
c, _ = l.accept()
c.sendall(b"echo\n")
while b := c.recv(100): c.sendall(b)
`)
	out, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(server); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		server.Process.Kill()
		server.Wait()
	})
	if _, err := out.Read(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	world := &rig.Rig{Pair: &testutil.Pair{App: g.World}, Scope: testutil.NewCgroup(t)}
	return newSession(t, world, netip.AddrPortFrom(testutil.AppV4.Addr(), 7171))
}

// twoRuns are two applications in one namespace, each with a run of its own, in
// which one address means two servers.
func twoRuns(t *testing.T) (g *ground, a, b *rig.Rig, ia, ib *rig.Instance, vip netip.AddrPort) {
	t.Helper()
	g = newGround(t)
	vip = netip.MustParseAddrPort("10.96.0.12:80")
	// Whoever is not redirected finds this.
	g.Serve(t, vip, introduce("vip"))
	atA := g.Serve(t, netip.AddrPortFrom(rig.Far4, 7001), introduce("a"))
	atB := g.Serve(t, netip.AddrPortFrom(rig.Far4, 7002), introduce("b"))
	a = g.Rig
	b = a.Beside(t)
	config := func(at netip.AddrPort) string {
		return fmt.Sprintf("relay: {workers: 1}\nservices: [{name: web, address: %q, endpoints: [%q]}]", vip, at)
	}
	return g, a, b, a.Run(t, config(atA)), b.Run(t, config(atB)), vip
}

// unhurried is a job whose connections have as long as a busy machine may take: it
// is about who answers, not when.
func unhurried(j job) job {
	j.Limit, j.Patience = rig.Limit/2, rig.Limit/2
	return j
}

// TestTwoRuns has ten thousand connections to one address from two scopes of one
// namespace: none of them comes to the other's server.
func TestTwoRuns(t *testing.T) {
	t.Parallel()
	_, a, b, ia, ib, vip := twoRuns(t)
	sa, err := ia.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	sb, err := ib.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if sa.Slots4 == sb.Slots4 || sa.Slots6 == sb.Slots6 || sa.Slots4 == "" || sb.Slots6 == "" {
		t.Errorf("ranges %s %s and %s %s", sa.Slots4, sa.Slots6, sb.Slots4, sb.Slots6)
	}
	j := unhurried(job{Targets: []netip.AddrPort{vip}, Workers: 3, Count: 5000, Pause: time.Millisecond})
	loads := map[string]*load{"a": startLoad(t, a, j), "b": startLoad(t, b, j)}
	for name, l := range loads {
		counts := map[string]int{}
		for _, o := range l.finish(t) {
			server, _, _ := strings.Cut(o.Said, " ")
			counts[server]++
			if server != name && server != "vip" {
				t.Errorf("%s: %s", name, &o)
			}
		}
		// On a busy machine the handler may be late, and a few pass.
		if counts[name] < j.Count/2 {
			t.Errorf("%s: %v of %d", name, counts, j.Count)
		}
		t.Log(name, counts)
	}
}

// TestNestedExec runs an exec in the scope of a run: its services come first,
// and its handler's own connections are the run's.
func TestNestedExec(t *testing.T) {
	t.Parallel()
	g, a, _, ia, ib, vip := twoRuns(t)
	// The exec sends the address to one that the run knows as a service, too.
	other := netip.MustParseAddrPort("10.96.0.13:80")
	before := ia.Reasons(t)["service"]
	j := unhurried(job{Targets: []netip.AddrPort{other}, Workers: 2, Count: 200, Pause: time.Millisecond})
	l := startLoadAt(t, testutil.Place{NS: a.App, Cgroup: a.Scope}, j,
		rig.Binary(t), "exec", "--runtime-dir", t.TempDir(), "--service", fmt.Sprintf("%s=%s", other, vip), "--")
	counts := map[string]int{}
	for _, o := range l.finish(t) {
		server, _, _ := strings.Cut(o.Said, " ")
		counts[server]++
		if o.connected() && o.Peer != other {
			t.Errorf("getpeername: %s", o.Peer)
		}
		if server != "a" && server != "vip" {
			t.Errorf("nested: %s", &o)
		}
	}
	if counts["a"] < j.Count/2 {
		t.Errorf("%v of %d went by both", counts, j.Count)
	}
	if got := int(ia.Reasons(t)["service"] - before); got < counts["a"] {
		t.Errorf("the run redirected %d connections of the exec's handler, which relayed %d", got, counts["a"])
	}
	if n := ib.Reasons(t)["service"]; n != 0 {
		t.Errorf("%d connections in the other scope", n)
	}
	ia.Conserved(t)
	nested := false
	for _, rec := range ia.Ended(t, counts["a"]) {
		nested = nested || rec.OrigDst == vip
	}
	if !nested {
		t.Error("the run recorded no connection of the exec's handler")
	}
	_ = g
}
