package connect

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// Ports of the world, and what becomes of a SYN there.
const (
	portEcho   = 8001 // accepted; what is sent comes back
	portCloses = 8002 // accepted, and closed at once
	portClosed = 8003 // nobody listens
	portReset  = 8004 // the firewall resets
	portICMP   = 8010 // and those after: the firewall rejects by ICMP
	portSilent = 8020 // dropped
	portDrops  = 8021 // SYNs are dropped until a test has the rule removed
	portGreets = 8022 // accepted; the server speaks first
	// The first SYN is dropped. The second is accepted, refused, or rejected.
	portLate     = 8030
	portLateRST  = 8031
	portLateICMP = 8040 // and those after
)

// A rule for the first SYN holds for these ports.
const (
	firstLate = portLate
	lastLate  = portLateICMP + 9
)

// icmp4 and icmp6 are what the firewall answers at portICMP and the ports after.
var (
	icmp4 = []string{"net-unreachable", "host-unreachable", "prot-unreachable", "port-unreachable", "net-prohibited", "host-prohibited", "admin-prohibited"}
	icmp6 = []string{"no-route", "addr-unreachable", "policy-fail", "port-unreachable", "reject-route", "admin-prohibited"}
)

// Addresses that the application's own namespace has its ideas of.
var (
	neighbour4 = netip.MustParseAddr("192.0.2.77") // on the link, and nobody's
	neighbour6 = netip.MustParseAddr("2001:db8:1::77")
	noRoute4   = netip.MustParseAddr("100.100.1.1")
	noRoute6   = netip.MustParseAddr("2001:db9::1")

	routeTypes = []string{"unreachable", "prohibit", "blackhole", "throw"}
)

// typed4 and typed6 are the addresses with a route of routeTypes[n].
func typed4(n int) netip.Addr { return netip.AddrFrom4([4]byte{203, 0, 113, byte(n + 1)}) }
func typed6(n int) netip.Addr { return netip.MustParseAddr(fmt.Sprintf("2001:db8:66::%d", n+1)) }

// mapped is an IPv4 address as sockets of IPv6 write it.
func mapped(a netip.Addr) netip.Addr { return netip.AddrFrom16(a.As16()) }

func far4(port uint16) netip.AddrPort { return netip.AddrPortFrom(rig.Far4, port) }
func far6(port uint16) netip.AddrPort { return netip.AddrPortFrom(rig.Far6, port) }

// farEach are the ways to write one port of the world: IPv4, IPv6, mapped.
func farEach(port uint16) []netip.AddrPort {
	return []netip.AddrPort{far4(port), far6(port), netip.AddrPortFrom(mapped(rig.Far4), port)}
}

// ground is a world in which connects end in every way.
type ground struct {
	*rig.Rig
	app string // the application's path

	instance *rig.Instance // that with has started, if any
}

// newGround makes it: servers, a firewall before them, and an application's
// namespace without default routes.
func newGround(t testing.TB) *ground {
	t.Helper()
	testutil.Need(t, "nft", "ip")
	g := &ground{Rig: rig.New(t), app: compile(t)}
	for _, at := range []func(uint16) netip.AddrPort{far4, far6} {
		g.Serve(t, at(portEcho), echo)
		g.Serve(t, at(portLate), echo)
		g.Serve(t, at(portDrops), echo)
		g.Serve(t, at(portCloses), func(net.Conn) {})
		g.Serve(t, at(portGreets), greet)
	}
	for _, ns := range []*testutil.NS{g.App, g.World} {
		ns.Sysctl(t, "net/ipv4/icmp_ratelimit", "0")
		ns.Sysctl(t, "net/ipv6/icmp/ratelimit", "0")
	}
	for _, key := range []string{"net/ipv4/neigh/eth0/retrans_time_ms", "net/ipv6/neigh/eth0/retrans_time_ms"} {
		g.App.Sysctl(t, key, "200")
	}
	g.App.Sysctl(t, "net/ipv4/ip_local_port_range", "1024 65535")
	g.routes(t)
	g.firewall(t)
	g.carrier(t)
	return g
}

// carrier waits until the link can be used in both namespaces.
func (g *ground) carrier(t testing.TB) {
	t.Helper()
	testutil.Eventually(t, rig.Limit, func() bool {
		return strings.Contains(in(t, g.App, "", "ip", "link", "show", testutil.AppLink), "state UP") &&
			strings.Contains(in(t, g.World, "", "ip", "link", "show", testutil.WorldLink), "state UP") &&
			g.do(t, far4(portEcho), "connect soerror").String() == "connect=0, soerror=0" &&
			g.do(t, far6(portEcho), "connect soerror").String() == "connect=0, soerror=0"
	}, "the world can be reached")
}

// with starts Pillion beside the applications, which must end as quiet as it
// begins.
func (g *ground) with(t testing.TB, config string) *rig.Instance {
	t.Helper()
	i := g.Run(t, config)
	i.NoLeaks(t)
	g.instance = i
	t.Cleanup(func() { g.instance = nil })
	return i
}

// early counts the connections that a late heartbeat made early, or had passed.
func (g *ground) early(t testing.TB) int {
	t.Helper()
	if g.instance == nil {
		return 0
	}
	r := g.instance.Reasons(t)
	return int(r["hold_stale"] + r["handler_stale"] + r["handler_busy"])
}

// calmly tries something until it succeeds, but goes on only as long as the
// machine was too busy for the handler meanwhile.
func (g *ground) calmly(t testing.TB, try func() bool) bool {
	t.Helper()
	for range 5 {
		before := g.early(t)
		if try() {
			return true
		}
		if g.early(t) == before {
			return false
		}
		t.Log("the machine is busy: once more")
	}
	return false
}

// routes replaces the default routes by what a test needs.
func (g *ground) routes(t testing.TB) {
	t.Helper()
	var b strings.Builder
	for _, gateway := range []netip.Addr{testutil.WorldV4.Addr(), testutil.WorldV6.Addr()} {
		fmt.Fprintf(&b, "route del default via %s\n", gateway)
	}
	for _, to := range []string{"198.51.100.0/24", "203.0.113.0/24"} {
		fmt.Fprintf(&b, "route add %s via %s\n", to, testutil.WorldV4.Addr())
	}
	fmt.Fprintf(&b, "route add 2001:db8:7::/48 via %s\n", testutil.WorldV6.Addr())
	for n, kind := range routeTypes {
		fmt.Fprintf(&b, "route add %s %s\nroute add %s %s\n", kind, typed4(n), kind, typed6(n))
	}
	in(t, g.App, b.String(), "ip", "-batch", "-")
}

// dropsSYNs is the rule of portDrops. What else comes is of connections that were
// answered, and may be on its way when a test has the rule made again: without the
// FIN they would be open as long as it holds.
var dropsSYNs = fmt.Sprintf(`tcp dport %d tcp flags syn / syn,ack counter drop comment "drops"`, portDrops)

// firewall loads the world's rules. They count in no connection's state.
func (g *ground) firewall(t testing.TB) {
	t.Helper()
	var b strings.Builder
	for _, family := range []string{"ip", "ip6"} {
		fmt.Fprintf(&b, `table %s connect {
set seen { typeof tcp sport . tcp sequence; flags dynamic; size 65535; timeout 2m; }
chain switch {
  %s
}
chain count {
  type filter hook prerouting priority 0;
  tcp flags syn / syn,ack counter comment "syns"
}
chain in {
  type filter hook input priority 0;
  tcp dport %d reject with tcp reset
  tcp dport %d counter drop comment "silent"
  jump switch
  tcp dport %d-%d tcp flags syn / syn,ack tcp sport . tcp sequence != @seen add @seen { tcp sport . tcp sequence } counter drop comment "first"
`, family, dropsSYNs, portReset, portSilent, firstLate, lastLate)
		codes, verb := icmp4, "icmp"
		if family == "ip6" {
			codes, verb = icmp6, "icmpv6"
		}
		for n, code := range codes {
			fmt.Fprintf(&b, "  tcp dport {%d, %d} reject with %s %s\n", portICMP+n, portLateICMP+n, verb, code)
		}
		fmt.Fprintln(&b, "}\n}")
	}
	in(t, g.World, b.String(), "nft", "-f", "-")
}

// fresh has the world forget what it has seen.
func (g *ground) fresh(t testing.TB) {
	t.Helper()
	in(t, g.World, "flush set ip connect seen\nflush set ip6 connect seen\n", "nft", "-f", "-")
}

var counted = regexp.MustCompile(`counter packets (\d+) bytes \d+ .*comment "(\w+)"|counter packets (\d+) bytes \d+ comment "(\w+)"`)

// packets returns how many packets a rule of the world has met.
func (g *ground) packets(t testing.TB, family, comment string) int {
	t.Helper()
	out := in(t, g.World, "", "nft", "list", "table", family, "connect")
	for _, m := range counted.FindAllStringSubmatch(out, -1) {
		if m[2]+m[4] == comment {
			n, err := strconv.Atoi(m[1] + m[3])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no rule %q in\n%s", comment, out)
	return 0
}

// answer has portDrops answer from now on, or drop again.
func (g *ground) answer(t testing.TB, answers bool) {
	t.Helper()
	var b strings.Builder
	for _, family := range []string{"ip", "ip6"} {
		fmt.Fprintf(&b, "flush chain %s connect switch\n", family)
		if !answers {
			fmt.Fprintf(&b, "add rule %s connect switch %s\n", family, dropsSYNs)
		}
	}
	in(t, g.World, b.String(), "nft", "-f", "-")
}

// in runs a command in a namespace, with its text on stdin, and returns what it
// wrote. It must succeed.
func in(t testing.TB, ns *testutil.NS, stdin, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	if err := ns.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, errs.String(), stdin)
	}
	return out.String()
}

// echo sends back what it gets, and ends when the client does.
func echo(c net.Conn) {
	io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{c}, make([]byte, 4096))
}

// greeting is what a server says that speaks first, or gets and sends back.
const greeting = "0123456789abcdef"

func greet(c net.Conn) { io.WriteString(c, greeting) }

// echoGreeting sends back one greeting, and ends.
func echoGreeting(c net.Conn) {
	b := make([]byte, len(greeting))
	if _, err := io.ReadFull(c, b); err == nil {
		c.Write(b)
	}
}
