package traps

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// shop is a service that nobody in the world has the address of.
var shop = netip.MustParseAddrPort("10.96.0.12:80")

const (
	planned   = "planned, with UDP and DNS"
	noUDP     = "UDP is left alone so far; " + planned
	thatProxy = "it does not redirect, so it sees no original destination"
)

// addressTraps are those of rewriting addresses at connect.
var addressTraps = []trap{
	{
		number: 12, title: "The application sees the rewritten peer (getpeername)",
		how:    "getpeername says what was asked for, and getsockname an own address: IPv4, IPv6, v4-mapped, MPTCP.",
		links:  []string{"cilium/cilium/issues/9974"},
		notFor: notForNamed(isNamed),
		run:    peerName,
	},
	{
		number: 13, title: "UDP replies come from another address than was asked",
		links: []string{"cilium/cilium/issues/7925", "cilium/cilium/issues/24417", "cilium/cilium/issues/48096", "cilium/cilium/issues/12859",
			"cilium/cilium/issues/25169", "cilium/cilium/issues/28820"},
		open: noUDP,
	},
	{
		number: 14, title: "Terminating sockets hits too many of them",
		how: "existing: reset ends the TCP connections of the scope that are older, and neither those beside it in the same " +
			"network namespace nor UDP sockets, connected or not.",
		links: []string{"cilium/cilium/issues/48564", "cilium/cilium/pull/48571", "cilium/cilium/issues/33459", "cilium/cilium/issues/38693",
			"cilium/cilium/issues/40304"},
		notFor: notForPeers("it terminates no sockets of others"),
		run:    terminates,
	},
	{
		number: 15, title: "Entries of live connections are evicted (LRU maps)",
		how:   "2000 connections are opened and kept, to 200 addresses (HAProxy, nginx: one): afterwards the first still knows its peer, and all still carry bytes.",
		links: []string{"cilium/cilium/issues/44835", "cilium/cilium/issues/42649"},
		run:   manyLive,
	},
	{
		number: 16, title: "The application gets a wrong errno",
		how: "connect(2) itself says ECONNREFUSED: where nobody listens, where no endpoint of a service does, " +
			"and (Pillion) where a rule forbids it.",
		links: []string{"cilium/cilium/issues/45184"},
		run:   errnos,
	},
	{
		number: 17, title: "A socket load balancer in the kernel bypasses the sidecar",
		how: "A foreign program at the parent cgroup rewrites the service's address to a backend of its own, as a CNI plug-in does: " +
			"the sidecar still sees the service, and its endpoint answers.",
		links: []string{"cilium/cilium/issues/16583", "cilium/cilium/issues/13882", "cilium/cilium/issues/25322", "cilium/cilium/issues/17847",
			"cilium/cilium/issues/33565", "cilium/cilium/issues/34225"},
		notFor: notForNamed(thatProxy),
		run:    socketLB,
	},
	{
		number: 18, title: "Logs no longer show the address that was asked for",
		how:   "A log line of a connection to a service has both the address that the application dialed and the endpoint that answered.",
		links: []string{"cilium/cilium/issues/19623"},
		run:   bothLogged,
	},
	{
		number: 19, title: "Redirected connections collide in their addresses and ports",
		how: "Connections from one own port to four destinations are open at once and each reaches its own; " +
			"then 1500 to one destination from the ports that the kernel gives.",
		links: []string{"istio/istio/issues/38982", "istio/istio/issues/43301", "istio/istio/issues/26101", "cilium/cilium/issues/36427",
			"cilium/cilium/issues/30406", "cilium/cilium/issues/25613", "cilium/proxy/issues/61", "cilium/cilium/issues/47277"},
		run: onePort,
	},
}

func echo(c net.Conn) { io.Copy(c, c) }

// says is a server that says its name, and then nothing but what it hears.
func says(name string) func(net.Conn) {
	return func(c net.Conn) {
		io.WriteString(c, name+"\n")
		io.Copy(c, c)
	}
}

// line reads a line, or says what came instead.
func line(c net.Conn) string {
	var got []byte
	for b := make([]byte, 1); ; {
		if _, err := c.Read(b); err != nil {
			return fmt.Sprintf("%s(%s)", got, ending(err))
		}
		if b[0] == '\n' {
			return string(got)
		}
		got = append(got, b[0])
	}
}

func peerName(t testing.TB, s *site) {
	four, six := s.server(at4(7000), echo), s.server(at6(7000), echo)
	s.start()
	mapped := netip.AddrPortFrom(netip.AddrFrom16(four.Addr().As16()), four.Port())
	ways := []struct {
		name     string
		to       netip.AddrPort
		protocol int
		own      netip.Addr
	}{
		{"IPv4", four, 0, testutil.AppV4.Addr()},
		{"IPv6", six, 0, testutil.AppV6.Addr()},
		{"v4-mapped", mapped, 0, netip.AddrFrom16(testutil.AppV4.Addr().As16())},
		{"MPTCP", four, unix.IPPROTO_MPTCP, testutil.AppV4.Addr()},
	}
	for _, w := range ways {
		fd := s.app.socket(familyOf(w.to.Addr()), w.protocol)
		if err := connect(fd, w.to); err != nil {
			t.Errorf("%s: connect: %v", w.name, err)
		} else {
			if got := addrPort(unix.Getpeername(fd)); got != w.to {
				t.Errorf("%s: getpeername says %s, want %s", w.name, got, w.to)
			}
			if got := addrPort(unix.Getsockname(fd)); got.Addr() != w.own {
				t.Errorf("%s: getsockname says %s, want %s", w.name, got.Addr(), w.own)
			}
		}
		unix.Close(fd)
	}
	s.relayed(t, len(ways))
}

func terminates(t testing.TB, s *site) {
	at := s.server(at4(7000), says("tcp"))
	var packets net.PacketConn
	s.World.Do(s.t, func() (err error) {
		packets, err = net.ListenPacket("udp4", at.String())
		return err
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for b := make([]byte, 100); ; {
			n, from, err := packets.ReadFrom(b)
			if err != nil {
				return
			}
			packets.WriteTo(b[:n], from)
		}
	}()
	defer func() { packets.Close(); <-done }()

	inside := s.app.dial(t, at)
	var beside, connected net.Conn
	s.App.Do(s.t, func() (err error) {
		if beside, err = net.Dial("tcp4", at.String()); err != nil {
			return err
		}
		connected, err = net.Dial("udp4", at.String())
		return err
	})
	defer beside.Close()
	defer connected.Close()
	free := s.app.datagrams()
	defer free.Close()
	line(inside)
	line(beside)

	s.extra = "existing: reset"
	s.start()
	// That is what the kernel says when somebody else ends a socket.
	if _, err := io.ReadAll(inside); !errors.Is(err, unix.ECONNABORTED) {
		t.Errorf("the older connection of the scope reads %v, want that it was aborted", err)
	}
	io.WriteString(beside, "still\n")
	if got := line(beside); got != "still" {
		t.Errorf("the connection beside the scope reads %s", got)
	}
	for name, c := range map[string]net.Conn{"connected": connected, "of the scope, unconnected": free} {
		if err := packetEchoes(c, at); err != nil {
			t.Errorf("UDP socket, %s: %v", name, err)
		}
	}
}

// packetEchoes sends a datagram and reads it back.
func packetEchoes(c net.Conn, to netip.AddrPort) error {
	u := c.(*net.UDPConn)
	var err error
	if u.RemoteAddr() != nil {
		_, err = u.Write([]byte("x"))
	} else {
		_, err = u.WriteToUDPAddrPort([]byte("x"), to)
	}
	if err == nil {
		err = u.SetReadDeadline(deadline())
	}
	if err == nil {
		_, _, err = u.ReadFrom(make([]byte, 10))
	}
	return err
}

func manyLive(t testing.TB, s *site) {
	const conns, hosts = 2000, 200
	addr := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{198, 51, 100, byte(20 + n%hosts)}) }
	for n := range hosts {
		if s.sys == haproxy || s.sys == nginx {
			// Named by the application, they have one address of their own.
			s.server(netip.AddrPortFrom(addr(0), 7000), echo)
			break
		}
		s.server(netip.AddrPortFrom(addr(n), 7000), echo)
	}
	s.start()
	var all []*net.TCPConn
	for n := range conns {
		to := netip.AddrPortFrom(addr(n), 7000)
		if s.sys == haproxy || s.sys == nginx {
			to = s.endpoints[0]
		}
		c, err := s.app.try(s.to(to))
		if err != nil {
			t.Fatalf("connection %d: %v", n, err)
		}
		defer c.Close()
		all = append(all, c)
	}
	for n, c := range all {
		if s.sys == pillion || s.sys == envoy {
			if got := c.RemoteAddr().(*net.TCPAddr).AddrPort(); got.Addr() != addr(n) {
				t.Fatalf("connection %d: the peer is %s, want %s", n, got, addr(n))
			}
		}
		fmt.Fprintf(c, "%d\n", n)
		if got := line(c); got != fmt.Sprint(n) {
			t.Fatalf("connection %d says %s", n, got)
		}
	}
}

func errnos(t testing.TB, s *site) {
	dead := s.nobody(at4(7009))
	s.service(shop, at4(7008)) // where nobody listens either
	s.extra = "deny: [\"203.0.113.0/24:25\"]"
	s.start()
	refused(t, s, "nobody listens", dead)
	refused(t, s, "the service's endpoint is dead", shop)
	if s.sys == pillion {
		refused(t, s, "a rule forbids it", netip.AddrPortFrom(rig.Void4, 25))
	}
}

// refused fails the test unless connect itself says that nobody listens.
func refused(t testing.TB, s *site, what string, to netip.AddrPort) {
	t.Helper()
	c, err := s.app.try(s.to(to))
	if err == nil {
		c.Close()
		t.Errorf("%s: connect succeeds, want connection refused", what)
	} else if err != unix.ECONNREFUSED {
		t.Errorf("%s: connect says %v, want connection refused", what, err)
	}
}

func socketLB(t testing.TB, s *site) {
	ours := s.server(at4(7001), says("the sidecar's endpoint"))
	theirs := s.server(at4(7002), says("the kernel's endpoint"))
	s.service(shop, ours)
	foreign := newForeign(t, s)
	foreign.rewrite(shop, theirs)
	s.start()
	c := s.dial(t, shop)
	if got := line(c); got != "the sidecar's endpoint" {
		t.Errorf("to the service answers %s", got)
	}
	s.relayedAfter(t, c)
}

func bothLogged(t testing.TB, s *site) {
	s.accessLog = true
	endpoint := s.server(at4(7001), says("hello"))
	s.service(shop, endpoint)
	s.start()
	c := s.dial(t, shop)
	line(c)
	c.Close()
	want := fmt.Sprintf("%s %s", s.to(shop), endpoint)
	var last []string
	testutil.Eventually(t, rig.Limit, func() bool {
		last = s.logged(t)
		for _, l := range last {
			if strings.Contains(l, want) {
				return true
			}
		}
		return wait()
	}, "no log line has the address that was dialed and the endpoint")
}

func onePort(t testing.TB, s *site) {
	var to []netip.AddrPort
	for n, at := range []netip.AddrPort{at4(7000), at4(7001), netip.AddrPortFrom(rig.Far4.Next(), 7000), netip.AddrPortFrom(rig.Far4.Next(), 7001)} {
		to = append(to, s.server(at, says(fmt.Sprint("server ", n))))
	}
	s.start()
	own := netip.AddrPortFrom(testutil.AppV4.Addr(), 20000)
	if s.sys == haproxy || s.sys == nginx {
		// Its own address is its side of the connection already.
		own = netip.AddrPortFrom(own.Addr(), 20001)
	}
	var fds []int
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	for n, at := range to {
		fd := s.app.socket(unix.AF_INET, 0)
		fds = append(fds, fd)
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			t.Fatal(err)
		}
		if err := unix.Bind(fd, sockaddr(own)); err != nil {
			t.Fatalf("bind: %v", err)
		}
		if err := connect(fd, s.to(at)); err != nil {
			t.Errorf("connection %d from the same port: %v", n, err)
			continue
		}
		b := make([]byte, 9)
		if !ready(fd, unix.POLLIN, rig.Limit) {
			t.Errorf("connection %d from the same port: nothing answers", n)
			continue
		}
		if k, err := unix.Read(fd, b); string(b[:max(k, 0)]) != fmt.Sprintf("server %d\n", n) {
			t.Errorf("connection %d from the same port reads %q, %v", n, b[:max(k, 0)], err)
		}
	}
	for n := range 1500 {
		c, err := s.app.try(s.to(to[0]))
		if err != nil {
			t.Fatalf("connection %d to one destination: %v", n, err)
		}
		defer c.Close()
	}
	if s.sys == pillion {
		live, err := s.Flows(context.Background(), admin.FlowQuery{Live: true})
		if err != nil {
			t.Fatal(err)
		}
		rig.Relayed(t, live)
	}
}
