package testutil

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// errGoexit is what onThread returns when the function ended its goroutine,
// for example by t.FailNow.
var errGoexit = errors.New("function did not return")

// NS is a network namespace with its loopback interface up.
type NS struct {
	handle netns.NsHandle
}

// finTimeout is tcp_fin_timeout in a test's namespaces, in seconds: less than what a
// test waits for. The kernel leaves a closed connection in FIN_WAIT2 for that long,
// which is 60 s by default, if the answer to its FIN comes in the last microseconds of
// close(), and the peer does not end it: one in a thousand on an emulated machine.
const finTimeout = "5"

// NewNS makes an anonymous network namespace. It ends with the test.
func NewNS(t testing.TB) *NS {
	t.Helper()
	RequireRoot(t)
	ns := &NS{handle: netns.None()}
	err := onThread(func() error {
		var err error
		// This also moves the thread there.
		if ns.handle, err = netns.New(); err != nil {
			return err
		}
		return linkUp("lo")
	})
	if err != nil {
		t.Fatalf("create network namespace: %v", err)
	}
	t.Cleanup(func() { ns.handle.Close() })
	ns.Sysctl(t, "net/ipv4/tcp_fin_timeout", finTimeout)
	return ns
}

// Run calls f on a thread that is inside the namespace, and returns its error.
//
// What f opens itself belongs to the namespace for good: net.Listen and a
// net.Dial of a literal address work. A goroutine that f starts does not run
// inside.
func (ns *NS) Run(f func() error) error {
	return onThread(func() error {
		if err := netns.Set(ns.handle); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

// Do is Run for a function that must not fail.
func (ns *NS) Do(t testing.TB, f func() error) {
	t.Helper()
	if err := ns.Run(f); err != nil {
		t.Fatal(err)
	}
}

// Start starts cmd inside the namespace. The caller waits for it.
func (ns *NS) Start(cmd *exec.Cmd) error { return Place{NS: ns}.Start(cmd) }

// FD returns the namespace's descriptor, which ns keeps and closes.
func (ns *NS) FD() int { return int(ns.handle) }

// Cookie returns the namespace's cookie, as bpf_get_netns_cookie gives it.
func (ns *NS) Cookie(t testing.TB) uint64 {
	t.Helper()
	var cookie uint64
	ns.Do(t, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open socket: %w", err)
		}
		defer unix.Close(fd)
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		if err != nil {
			return fmt.Errorf("read SO_NETNS_COOKIE: %w", err)
		}
		return nil
	})
	return cookie
}

// AddAddr adds addresses to an interface of the namespace. They are usable at
// once: duplicate-address detection is off.
func (ns *NS) AddAddr(t testing.TB, link string, addrs ...netip.Prefix) {
	t.Helper()
	ns.Do(t, func() error { return addAddrs(link, addrs) })
}

// Sysctl sets a value below /proc/sys, for example "net/ipv4/tcp_syncookies",
// inside the namespace.
func (ns *NS) Sysctl(t testing.TB, key, value string) {
	t.Helper()
	ns.Do(t, func() error {
		// /proc/sys/net shows the namespace of the thread that opens it.
		return os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0)
	})
}

func linkUp(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set link %s up: %w", name, err)
	}
	return nil
}

func addAddrs(name string, addrs []netip.Prefix) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	for _, p := range addrs {
		addr, err := netlink.ParseAddr(p.String())
		if err != nil {
			return fmt.Errorf("parse address %s: %w", p, err)
		}
		if p.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add %s to %s: %w", p, name, err)
		}
	}
	return nil
}

// uniqueName turns a test's name into a file name that no other test running
// now has.
func uniqueName(t testing.TB) string {
	clean := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		}
		return '-'
	}, t.Name())
	if len(clean) > 60 {
		clean = clean[:60]
	}
	return fmt.Sprintf("pillion-test-%s-%d", clean, os.Getpid())
}
