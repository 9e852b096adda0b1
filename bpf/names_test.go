package bpf

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/tests/testutil"
)

// envNames makes the test binary an application that asks its sockets for their
// own addresses, connected to each of three: of IPv4, IPv6, and IPv4 without a
// source of its own.
const envNames = "PILLION_TEST_NAMES"

// asker is an application's socket.
type asker struct {
	fd     int
	family int
}

// newAsker makes a socket of one family and protocol.
func newAsker(family, protocol int) *asker {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		fmt.Println("socket:", err)
		os.Exit(0)
	}
	return &asker{fd, family}
}

func (a *asker) sockaddr(to netip.AddrPort) unix.Sockaddr {
	if a.family == unix.AF_INET {
		return &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	}
	return &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}
}

// say writes what has been done, its error, and what the socket's address is now.
func (a *asker) say(what string, err error) {
	name := "?"
	switch sa, _ := unix.Getsockname(a.fd); sa := sa.(type) {
	case *unix.SockaddrInet4:
		name = netip.AddrFrom4(sa.Addr).String()
	case *unix.SockaddrInet6:
		name = netip.AddrFrom16(sa.Addr).String()
	}
	if err != nil {
		what += fmt.Sprint(" (", unix.ErrnoName(err.(unix.Errno)), ")")
	}
	fmt.Println(what+":", name)
}

func (a *asker) connect(what, to string) {
	a.say(what, unix.Connect(a.fd, a.sockaddr(netip.MustParseAddrPort(to))))
}

func (a *asker) bind(what, at string) {
	a.say(what, unix.Bind(a.fd, a.sockaddr(netip.MustParseAddrPort(at))))
}

// leave connects to nothing.
func (a *asker) leave() error {
	unspec := unix.RawSockaddr{} // the library knows no such address
	_, _, e := unix.Syscall(unix.SYS_CONNECT, uintptr(a.fd), uintptr(unsafe.Pointer(&unspec)), unsafe.Sizeof(unspec))
	if e != 0 {
		return e
	}
	return nil
}

func (a *asker) disconnect(what string) { a.say(what, a.leave()) }

// askNames is the application of envNames.
func askNames(four, six, plain string) {
	a := newAsker(unix.AF_INET, 0)
	a.say("new", nil)
	a.connect("connected", four)
	a.disconnect("disconnected")
	a.connect("connected without a source", plain)
	a.disconnect("disconnected again")
	a.connect("connected with a source", four)
	a.disconnect("for the third time")
	a.connect("refused", "240.5.0.9:80")
	a.bind("bound", "192.0.2.60:0")
	a.connect("bound and connected", four)

	a = newAsker(unix.AF_INET, 0)
	a.bind("bound to loopback", "127.0.0.1:0")
	a.connect("which leads nowhere", four)

	a = newAsker(unix.AF_INET, 0)
	a.connect("nothing there", "127.0.0.1:1")
	a.connect("then something", four)

	a = newAsker(unix.AF_INET, 0)
	a.bind("a port", "0.0.0.0:0")
	a.connect("a port, connected", four)

	a = newAsker(unix.AF_INET, 0)
	unix.SetsockoptInt(a.fd, unix.SOL_TCP, unix.TCP_FASTOPEN_CONNECT, 1)
	a.connect("no SYN yet", four)

	newAsker(unix.AF_INET, unix.IPPROTO_MPTCP).connect("MPTCP", four)
	newAsker(unix.AF_INET6, unix.IPPROTO_MPTCP).connect("MPTCP of IPv6", six)

	a = newAsker(unix.AF_INET6, 0)
	a.say("new of IPv6", nil)
	a.connect("connected", six)
	a.disconnect("disconnected")
	a.connect("mapped", "[::ffff:"+strings.Replace(four, ":", "]:", 1))
}

// TestOwnNames connects to destinations whose route has a source that the slot's
// route has not.
func TestOwnNames(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.serve(t)
	own := netip.MustParseAddr("192.0.2.60")
	h.ns.AddAddr(t, "lo", netip.PrefixFrom(own, 32))
	for _, a := range []netip.Addr{netip.MustParseAddr("127.0.0.1"), own} {
		h.put(t, "own_addrs", FromAddr(a), uint32(1))
	}
	// A deferred connect needs no cookie to send data with its SYN.
	h.ns.Sysctl(t, "net/ipv4/tcp_fastopen", "5")
	const source4, source6 = "192.0.2.50", "2001:db8:1::50"
	way := func(prefix, source string) {
		p, from := netip.MustParsePrefix(prefix), netip.MustParseAddr(source)
		k := PrefixKey{Prefixlen: uint32(p.Bits()), Addr: abiIpAddr(FromAddr(p.Addr()))}
		if p.Addr().Is4() {
			k.Prefixlen += 96
		}
		h.put(t, "routes", k, Route{Kind: RouteUnicast, Source: abiIpAddr(FromAddr(from))})
	}
	way("198.51.100.0/24", source4)
	way("2001:db8:7::/48", source6)

	var out bytes.Buffer
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envNames+"=198.51.100.7:80 [2001:db8:7::7]:80 203.0.113.9:80")
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := (testutil.Place{NS: h.ns, Cgroup: h.cgroup}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("the application: %v\n%s", err, &out)
	}
	want := []string{
		"new: 0.0.0.0",
		"connected: " + source4,
		"disconnected: 0.0.0.0",
		"connected without a source: 127.0.0.1",
		"disconnected again: 0.0.0.0",
		"connected with a source: " + source4,
		"for the third time: 0.0.0.0",
		"refused (ECONNREFUSED): 0.0.0.0",
		"bound: 192.0.2.60",
		"bound and connected: 192.0.2.60",
		"bound to loopback: 127.0.0.1",
		"which leads nowhere (ENETUNREACH): 127.0.0.1",
		"nothing there (ECONNREFUSED): 0.0.0.0",
		"then something: " + source4,
		"a port: 0.0.0.0",
		"a port, connected: " + source4,
		"no SYN yet: " + source4,
		"MPTCP: " + source4,
		"MPTCP of IPv6: " + source6,
		"new of IPv6: ::",
		"connected: " + source6,
		"disconnected: ::",
		"mapped: ::ffff:" + source4,
	}
	if diff := cmp.Diff(want, strings.Split(strings.TrimSpace(out.String()), "\n")); diff != "" {
		t.Errorf("the sockets' own addresses (-want +got):\n%s", diff)
	}
	h.accepted(t) // and closed
	// The records have what the application saw.
	sources := map[string]int{}
	for _, line := range h.records(t, 12, func(raw []byte) string {
		e, _ := ParseEvent(raw)
		return fmt.Sprint(ToAddr(e.Orig), " from ", ToAddr(e.Source))
	}) {
		sources[line]++
	}
	if diff := cmp.Diff(map[string]int{
		"198.51.100.7 from " + source4: 6, "2001:db8:7::7 from " + source6: 2,
		"198.51.100.7 from 192.0.2.60": 1, "203.0.113.9 from 127.0.0.1": 1,
		"127.0.0.1 from 127.0.0.1": 1, "240.5.0.9 from invalid IP": 1,
	}, sources); diff != "" {
		t.Errorf("the records' sources (-want +got):\n%s", diff)
	}
}
