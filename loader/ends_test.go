package loader

import (
	"errors"
	"net"
	"net/netip"
	"testing"
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
