package loader

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
	"unsafe"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestWhoGivesUp: an application that gives a connect up, in whatever way, says
// nothing about the endpoint; a router that has no way to it does.
func TestWhoGivesUp(t *testing.T) {
	p := newPlace(t)
	silent, lost := netip.MustParseAddr("203.0.113.66"), netip.MustParseAddr("203.0.113.67")
	p.World.Do(t, func() error {
		for a, kind := range map[netip.Addr]int{silent: unix.RTN_BLACKHOLE, lost: unix.RTN_UNREACHABLE} {
			dst := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)}
			if err := netlink.RouteAdd(&netlink.Route{Dst: dst, Type: kind}); err != nil {
				return err
			}
		}
		return nil
	})
	p.World.Sysctl(t, "net/ipv4/ip_forward", "1")
	at := netip.AddrPortFrom(silent, 80)
	d, _ := p.direct(t, shop)
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: setOf(at)}))

	begin := func(family int, to unix.Sockaddr) (fd int) {
		t.Helper()
		p.inScope(t, func() {
			p.App.Do(t, func() (err error) {
				fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
				return err
			})
		})
		if err := unix.Connect(fd, to); !errors.Is(err, unix.EINPROGRESS) {
			t.Fatalf("connect: %v", err)
		}
		return fd
	}
	to := &unix.SockaddrInet4{Addr: shop.Addr().As4(), Port: int(shop.Port())}
	for name, end := range map[string]func(fd int) error{
		"close":    func(int) error { return nil },
		"shutdown": func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) },
		"AF_UNSPEC": func(fd int) error {
			none := unix.RawSockaddr{Family: unix.AF_UNSPEC}
			return connectRaw(fd, &none)
		},
	} {
		fd := begin(unix.AF_INET, to)
		if n := stateOf(t, d, shop, at).Live; n != 1 {
			t.Errorf("%s: %d are counted before", name, n)
		}
		if err := end(fd); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		unix.Close(fd)
		if s := stateOf(t, d, shop, at); s.Live != 0 || s.Failed != 0 {
			t.Errorf("%s: %+v", name, s)
		}
	}

	there := netip.AddrPortFrom(lost, 80)
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: setOf(there)}))
	fd := begin(unix.AF_INET, to)
	defer unix.Close(fd)
	testutil.Eventually(t, patience, func() bool {
		s := stateOf(t, d, shop, there)
		return s.Live == 0 && s.Failed == 1 && s.Last == flow.ReasonDialUnreachable
	}, "the router's answer counts as a failure")
}

// connectRaw is for an address that package unix has no type for.
func connectRaw(fd int, to *unix.RawSockaddr) error {
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(to)), unsafe.Sizeof(*to))
	if errno != 0 {
		return errno
	}
	return nil
}

// TestClosedByApplication: what its application has closed is no load of the endpoint's any
// more, and is left to the kernel, which has things to deliver; what it has shut in one
// direction is. Nor does it matter whose end was first.
func TestClosedByApplication(t *testing.T) {
	for name, second := range map[string]bool{"first": false, "after the peer": true} {
		t.Run(name, func(t *testing.T) { closedByApplication(t, second) })
	}
}

func closedByApplication(t *testing.T, second bool) {
	t.Helper()
	p := newPlace(t)
	at := netip.AddrPortFrom(testutil.WorldV4.Addr(), 8001)
	d, conns := p.direct(t, shop, at)
	half, err := p.open(t, shop)
	if err != nil {
		t.Fatal(err)
	}
	defer half.Close()
	halfPeer := <-conns[0]
	defer halfPeer.Close()
	if err := half.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if n, err := halfPeer.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatalf("%d, %v", n, err)
	}
	closed, err := p.open(t, shop)
	if err != nil {
		t.Fatal(err)
	}
	peer := <-conns[0]
	defer peer.Close()
	if second {
		if err := peer.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if n, err := closed.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Fatalf("%d, %v", n, err)
		}
	}
	said := 0
	closed.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	for err == nil { // more than the peer takes in without reading
		var n int
		n, err = closed.Write(make([]byte, 1<<16))
		said += n
	}
	if n := stateOf(t, d, shop, at).Live; n != 2 {
		t.Errorf("%d are counted before, want 2", n)
	}
	closed.Close()
	if n := stateOf(t, d, shop, at).Live; n != 1 {
		t.Errorf("%d are counted, want that which is half open", n)
	}
	for range 2 { // it goes by the sockets, and mends what it sees twice
		if err := d.recount(); err != nil {
			t.Fatal(err)
		}
	}
	if n := stats(t, d).Mended; n != 0 {
		t.Errorf("mended %d", n)
	}
	if n := len(connections(t, d)); n != 2 {
		t.Errorf("%d connections are listed, want 2", n)
	}
	if n, err := d.End(shop, at); n != 1 || err != nil {
		t.Errorf("ended %d: %v; want that which is half open", n, err)
	}
	peer.SetReadDeadline(time.Now().Add(patience))
	if n, err := io.Copy(io.Discard, peer); n != int64(said) || err != nil {
		t.Errorf("the endpoint got %d of %d bytes: %v", n, said, err)
	}
	testutil.Eventually(t, patience, func() bool { return stateOf(t, d, shop, at).Live == 0 && len(connections(t, d)) == 0 }, "all have ended")
}
