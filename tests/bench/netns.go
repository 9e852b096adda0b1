package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// within runs f in a network namespace, nil for the one that the thread is in.
// Processes that f starts are in it too; threads are not.
func within(ns *os.File, f func() error) error {
	if ns == nil {
		return f()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer own.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter a network namespace: %w", err)
	}
	err = f()
	if back := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); back != nil {
		return errors.Join(err, fmt.Errorf("leave a network namespace: %w", back))
	}
	return err
}

// namespace makes an application's network, one pair of interfaces away from the
// bench's own, where the server is. n numbers it, from 1.
func (w *world) namespace(n int) (*os.File, error) {
	ns, err := newNetns()
	if err != nil {
		return nil, fmt.Errorf("make network namespace: %w", err)
	}
	w.later(ns.Close)
	if err := join(ns, n); err != nil {
		return nil, fmt.Errorf("join network namespace %d: %w", n, err)
	}
	return ns, nil
}

// newNetns makes an empty one, which is gone with its last process once the file
// is closed.
func newNetns() (ns *os.File, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	defer own.Close()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, err
	}
	ns, err = os.Open("/proc/thread-self/ns/net")
	// As in furnish.
	err = errors.Join(err, os.WriteFile("/proc/sys/net/ipv4/tcp_max_tw_buckets", []byte("500"), 0),
		unix.Setns(int(own.Fd()), unix.CLONE_NEWNET))
	return ns, err
}

// join adds the pair of interfaces, addresses and the way to the server.
func join(ns *os.File, n int) error {
	near := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 201, byte(n), 1}), 24)
	far := netip.PrefixFrom(near.Addr().Next(), 24)
	outer, inner := fmt.Sprintf("app%d", n), "eth0"
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: outer}, PeerName: inner, PeerNamespace: netlink.NsFd(int(ns.Fd()))}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth: %w", err)
	}
	own := &netlink.Handle{}
	there, err := netlink.NewHandleAt(netns.NsHandle(int(ns.Fd())))
	if err != nil {
		return err
	}
	defer there.Close()
	if err := up(own, outer, near); err != nil {
		return err
	}
	if err := up(there, "lo", netip.Prefix{}); err != nil {
		return err
	}
	if err := up(there, inner, far); err != nil {
		return err
	}
	if err := there.RouteAdd(&netlink.Route{Gw: net.IP(near.Addr().AsSlice())}); err != nil {
		return fmt.Errorf("add default route: %w", err)
	}
	return nil
}

// up sets an interface up, with an address if that is valid.
func up(h *netlink.Handle, name string, addr netip.Prefix) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := h.LinkSetUp(l); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	if !addr.IsValid() {
		return nil
	}
	a, err := netlink.ParseAddr(addr.String())
	if err != nil {
		return err
	}
	if err := h.AddrAdd(l, a); err != nil {
		return fmt.Errorf("add %s to %s: %w", addr, name, err)
	}
	return nil
}

// command runs a program in a network namespace, with what it reads.
func command(ns *os.File, input string, name string, args ...string) error {
	return within(ns, func() error {
		cmd := exec.Command(name, args...)
		cmd.Stdin = strings.NewReader(input)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(string(out)))
		}
		return nil
	})
}
