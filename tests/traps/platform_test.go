package traps

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

const (
	noPods    = "pods are planned"
	noInbound = "inbound connections are left alone so far, and pods are planned"
)

// platformTraps are those of where a sidecar runs.
var platformTraps = []trap{
	{
		number: 26, title: "Kubelet's probes fail or are rewritten",
		links: []string{"istio/istio/issues/52765", "istio/istio/issues/57911", "istio/istio/issues/58531", "istio/istio/issues/60607",
			"istio/istio/issues/49277", "istio/istio/issues/59778", "cilium/cilium/issues/46625"},
		open: noInbound,
	},
	{
		number: 27, title: "hostNetwork: the whole node is redirected, or nothing",
		how:    "Of two applications in one network namespace one is captured and the other is not, and both reach their servers.",
		links:  []string{"openservicemesh/osm/issues/4359", "istio/istio/issues/9002", "istio/istio/issues/42508", "linkerd/linkerd2/issues/12392"},
		notFor: notForNamed(isNamed),
		run:    hostNetwork,
	},
	{
		number: 28, title: "DNS through the proxy: truncation, sizes, TCP, conntrack zones",
		links: []string{"istio/ztunnel/issues/2060", "istio/istio/issues/61371", "kumahq/kuma/issues/14487", "istio/istio/issues/33469",
			"istio/istio/issues/46935", "istio/ztunnel/issues/1360"},
		open: noUDP,
	},
	{
		number: 29, title: "Redirecting by NAT fills the conntrack table",
		how:   "300 connections leave no entry in the connection tracking of the application's network namespace.",
		links: []string{"kubernetes/kubernetes/issues/71261", "kubernetes/kubernetes/issues/18604", "linkerd/linkerd2/issues/3002", "cilium/cilium/issues/4496"},
		run:   conntrack,
	},
	{
		number: 33, title: "What belongs to the sidecar is guessed wrongly",
		how: "An application that is older than the sidecar has its first connection served, and captured; what it dials on loopback " +
			"stays its own; a port that is used again is no trouble.",
		links: []string{"merbridge/merbridge/issues/401", "merbridge/merbridge/issues/167", "merbridge/merbridge/issues/39",
			"merbridge/merbridge/issues/78", "merbridge/merbridge/issues/120"},
		notFor: notForNamed(isNamed),
		run:    membership,
	},
	{
		number: 35, title: "v4-mapped datagrams arrive at the IPv4 hook as IPv6",
		open: noUDP,
	},
	{
		number: 39, title: "A pod starts before the CNI plug-in has redirected it",
		links: []string{"istio/istio/issues/14327", "istio/istio/issues/49210", "istio/istio/issues/40303", "istio/istio/issues/51176", "kumahq/kuma/issues/4560"},
		open:  noPods + "; that a command never runs uncaptured is in 36",
	},
	{
		number: 40, title: "MPTCP by default changes what sockets can do",
		how:   "To a server that listens with MPTCP the proxy comes with plain TCP; an application's plain socket stays one.",
		links: []string{"golang/go/issues/74643", "landlock-lsm/go-landlock/issues/50", "checkpoint-restore/criu/issues/2655"},
		run:   plainTCP,
	},
	{
		number: 41, title: "TCP Fast Open goes around the check of connect",
		how:   "Bytes that are sent with the SYN (MSG_FASTOPEN) arrive once and in order; a destination that is denied (Pillion) is refused then too.",
		links: []string{"landlock-lsm/linux/issues/41"},
		run:   fastOpen,
	},
	{
		number: 42, title: "One bad resource rejects the whole push",
		links: []string{"envoyproxy/envoy/issues/3079", "envoyproxy/envoy/issues/7939", "agentgateway/agentgateway/issues/1438"},
		open:  "each service and each source is refused alone, which tests/live holds; it is not tried with the others yet",
	},
	{
		number: 47, title: "Headless services are not balanced",
		open: "DNS and Kubernetes tell the endpoints of a headless service, but a service is an address so far: names are planned, with DNS",
	},
	{
		number: 49, title: "Conntrack forgets half-closed connections, and drops what is left as invalid",
		how: "With a firewall that drops what is invalid, and the kernel's timer for half-closed connections (60 s) lowered to one " +
			"second, a half-closed connection is silent for longer: the server's bytes still arrive.",
		links: []string{"istio/istio/issues/43297"},
		run:   invalid,
	},
}

func hostNetwork(t testing.TB, s *site) {
	at := s.server(at4(7000), whom)
	neighbour := startApplication(s.t, testutil.Place{NS: s.App, Cgroup: s.outer.Child(s.t, "neighbour")})
	s.start()
	s.isCaptured(t, "the application", s.app.dial(t, at))
	if !direct(t, neighbour.dial(t, at)) {
		t.Error("its neighbour is captured")
	}
}

func conntrack(t testing.TB, s *site) {
	const conns = 300
	at := s.server(at4(7000), echo)
	s.start()
	for range conns {
		c := s.dial(t, at)
		echoes(t, c, []byte("x"))
		c.Close()
	}
	text := s.inside("cat", "/proc/sys/net/netfilter/nf_conntrack_count")
	n, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil {
		t.Fatal(err)
	}
	switch {
	case n >= conns:
		t.Errorf("every connection has an entry")
	case n > 0:
		t.Errorf("there are %d entries", n)
	}
	s.relayed(t, conns)
}

func membership(t testing.TB, s *site) {
	at := s.server(at4(7000), whom)
	var own net.Listener
	s.App.Do(s.t, func() (err error) {
		own, err = net.Listen("tcp4", "127.0.0.1:0")
		return err
	})
	defer own.Close()
	s.start()
	// The application was there first.
	s.isCaptured(t, "the first connection", s.app.dial(t, at))
	c, err := s.app.try(own.Addr().(*net.TCPAddr).AddrPort())
	if err != nil {
		t.Fatalf("loopback: connect: %v", err)
	}
	defer c.Close()
	server := accepted(t, own)
	defer server.Close()
	if server.RemoteAddr().String() != c.LocalAddr().String() {
		t.Error("a connection to loopback is captured")
	}
	// The same own port, over and over, which nobody is given by the kernel.
	for range 20 {
		s.isCaptured(t, "from a port that was used before", s.dialFrom(t, 20000, at))
	}
}

// dialFrom connects from an own port. The connection ends by a reset, so that
// the port is free at once.
func (s *site) dialFrom(t testing.TB, port uint16, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	fd := s.app.socket(unix.AF_INET, 0)
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err == nil {
		err = unix.Bind(fd, sockaddr(netip.AddrPortFrom(testutil.AppV4.Addr(), port)))
	}
	if err == nil {
		err = connect(fd, to)
	}
	if err != nil {
		unix.Close(fd)
		t.Fatalf("connect from an own port: %v", err)
	}
	c, err := asConn(fd)
	if err == nil {
		err = c.SetLinger(0)
	}
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func plainTCP(t testing.TB, s *site) {
	at := s.nobody(at4(7000))
	var ln net.Listener
	s.World.Do(s.t, func() (err error) {
		lc := net.ListenConfig{}
		lc.SetMultipathTCP(true)
		ln, err = lc.Listen(s.t.Context(), "tcp", at.String())
		return err
	})
	defer ln.Close()
	s.start()
	fd := s.app.socket(unix.AF_INET, 0)
	defer func() { unix.Close(fd) }()
	if err := connect(fd, s.to(at)); err != nil {
		t.Fatalf("connect: %v", err)
	}
	c := accepted(t, ln)
	defer c.Close()
	if multi, err := c.MultipathTCP(); err != nil || multi {
		t.Errorf("the server is spoken to by MPTCP: %v, %v", multi, err)
	}
	if got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || got != unix.IPPROTO_TCP {
		t.Errorf("the application's socket has protocol %d, %v", got, err)
	}
	c.Close()
	unix.Close(fd)
	fd = -1
	s.relayed(t, 1)
}

func fastOpen(t testing.TB, s *site) {
	heard := make(chan string, 16)
	at := s.server(at4(7000), func(c net.Conn) {
		b, _ := io.ReadAll(c)
		heard <- string(b)
	})
	s.extra = "deny: [\"203.0.113.0/24:25\"]"
	// Clients and servers, without a cookie, and every listener.
	for _, ns := range []*testutil.NS{s.App, s.World} {
		ns.Sysctl(s.t, "net/ipv4/tcp_fastopen", strconv.Itoa(0x1|0x2|0x4|0x200|0x400))
	}
	s.start()
	for n := range 10 {
		fd := s.app.socket(unix.AF_INET, 0)
		err := unix.Sendto(fd, []byte("with the SYN,"), unix.MSG_FASTOPEN, sockaddr(s.to(at)))
		if err != nil {
			unix.Close(fd)
			t.Fatalf("send with the SYN: %v", err)
		}
		if !ready(fd, unix.POLLOUT, rig.Limit) {
			t.Fatalf("connection %d is never established", n)
		}
		if _, err := unix.Write(fd, []byte(" and after it")); err != nil {
			t.Fatalf("write: %v", err)
		}
		unix.Close(fd)
		if got := from(t, heard); got != "with the SYN, and after it" {
			t.Fatalf("connection %d: the server reads %q", n, got)
		}
	}
	s.relayed(t, 10)
	if s.sys == pillion {
		fd := s.app.socket(unix.AF_INET, 0)
		defer unix.Close(fd)
		if err := unix.Sendto(fd, []byte("x"), unix.MSG_FASTOPEN, sockaddr(netip.AddrPortFrom(rig.Void4, 25))); err != unix.ECONNREFUSED {
			t.Errorf("denied, sending with the SYN says %v", err)
		}
	}
}

// firewall has the application's network namespace track connections.
func (s *site) firewall(rule string) {
	s.t.Helper()
	s.inside("nft", fmt.Sprintf(`table inet firewall {
	chain input {
		type filter hook input priority 0;
		%[1]s
	}
	chain output {
		type filter hook output priority 0;
		%[1]s
	}
}`, rule))
}

func invalid(t testing.TB, s *site) {
	speak := make(chan bool)
	at := s.server(at4(7000), func(c net.Conn) {
		io.ReadAll(c)
		<-speak
		fmt.Fprintln(c, "late")
	})
	s.start()
	s.firewall("ct state invalid drop")
	for _, timer := range []string{"close_wait", "fin_wait"} {
		s.App.Sysctl(s.t, "net/netfilter/nf_conntrack_tcp_timeout_"+timer, "1")
	}
	c := s.dial(t, at)
	c.CloseWrite()
	// The timer is what is tested: it gives no event.
	time.Sleep(2500 * time.Millisecond)
	close(speak)
	if got := line(c); got != "late" {
		t.Errorf("the application reads %s", got)
	}
	s.relayedAfter(t, c)
}
