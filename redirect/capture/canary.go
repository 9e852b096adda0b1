package capture

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// canaryPort is the port that canaries ask for: the lookup program serves all,
// and a firewall that lets some pass shows itself soonest on an odd one.
const canaryPort = 9

// canary connects to one slot over and over, and answers itself: the slot has a
// listener of its own. That the workers live shows otherwise, and to wake one
// ten times a second would be most of what an idle process costs. On the way
// through the loopback interface a connection is there when connect returns, so
// nothing waits.
type canary struct {
	kernel   Kernel
	slot     netip.AddrPort
	listener int
	// source is the address that the kernel gives a socket towards the slot.
	// It changes with the namespace's addresses.
	source netip.Addr
	// accepted is how many connections of the family had come in when last
	// looked, and seen whether these were more than the time before.
	accepted uint64
	seen     bool
}

var (
	errNoAnswer = errors.New("no answer: a firewall rule, or a route that is gone")
	errStranger = errors.New("somebody else came")
)

func newCanary(k Kernel, slot netip.Addr) (*canary, error) {
	c := &canary{kernel: k, slot: netip.AddrPortFrom(slot, canaryPort), listener: -1}
	err := c.listen()
	if err == nil {
		err = k.SetCanaryListener(slot.Is6(), c.listener)
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func (c *canary) listen() error {
	fd, err := c.socket(unix.SOCK_STREAM)
	if err != nil {
		return err
	}
	c.listener = fd
	if err := c.kernel.Exempt(fd); err != nil {
		return err
	}
	// The address is local by route only, which IPv6 does not take for one.
	level, option := unix.IPPROTO_IP, unix.IP_FREEBIND
	if c.slot.Addr().Is6() {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_FREEBIND
	}
	if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(c.slot.Addr(), 0))); err != nil {
		return os.NewSyscallError("bind", err)
	}
	return os.NewSyscallError("listen", unix.Listen(fd, 16))
}

// look notes whether a connection of the family has come in since the last look.
func (c *canary) look(v4, v6 uint64) {
	now := v4
	if c.slot.Addr().Is6() {
		now = v6
	}
	c.seen = now != c.accepted
	c.accepted = now
}

func (c *canary) close() {
	if c.listener >= 0 {
		unix.Close(c.listener)
		c.listener = -1
	}
}

// fly connects once.
func (c *canary) fly(ctx context.Context) error {
	known := c.source.IsValid()
	err := c.try(ctx)
	if err != nil && known {
		// The address may have changed since.
		c.source = netip.Addr{}
		err = c.try(ctx)
	}
	return err
}

func (c *canary) try(ctx context.Context) error {
	if !c.source.IsValid() {
		source, err := c.findSource()
		if err != nil {
			return err
		}
		c.source = source
	}
	fd, err := c.socket(unix.SOCK_STREAM)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := c.kernel.Exempt(fd); err != nil {
		return err
	}
	if err := noLinger(fd); err != nil {
		return err
	}
	if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(c.source, 0))); err != nil {
		return os.NewSyscallError("bind", err)
	}
	source, err := ownAddr(fd)
	if err != nil {
		return err
	}
	if err := c.kernel.AdmitCanary(source, c.slot); err != nil {
		return err
	}
	defer c.kernel.ForgetCanary(source, c.slot)
	err = unix.Connect(fd, sockaddr(c.slot))
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return os.NewSyscallError("connect", err)
	}
	return c.arrive(ctx, fd, source)
}

// arrive waits for the connection of fd, from source, to come in.
func (c *canary) arrive(ctx context.Context, fd int, source netip.AddrPort) error {
	for end := time.Now().Add(canaryLimit); ; {
		in, peer, err := unix.Accept4(c.listener, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		switch {
		case err == nil:
			err := noLinger(in)
			unix.Close(in)
			// One of an earlier flight that was given up may come first.
			if from(peer) == source {
				return err
			}
			continue
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ECONNABORTED):
			continue
		case !errors.Is(err, unix.EAGAIN):
			return os.NewSyscallError("accept", err)
		}
		if err := c.await(ctx, fd, time.Until(end)); err != nil {
			return err
		}
	}
}

// await waits until the listener has something or the connection of fd fails.
func (c *canary) await(ctx context.Context, fd int, left time.Duration) error {
	if left <= 0 || ctx.Err() != nil {
		return errNoAnswer
	}
	ready := []unix.PollFd{{Fd: int32(c.listener), Events: unix.POLLIN}, {Fd: int32(fd)}}
	if _, err := unix.Poll(ready, int(left/time.Millisecond)+1); err != nil && !errors.Is(err, unix.EINTR) {
		return os.NewSyscallError("poll", err)
	}
	if ready[0].Revents != 0 || ready[1].Revents&(unix.POLLERR|unix.POLLHUP) == 0 {
		return nil
	}
	code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	if code != 0 {
		return os.NewSyscallError("connect", unix.Errno(code))
	}
	return errStranger
}

// noLinger makes the coming close send a reset: no state is to be left of ten
// connections a second.
func noLinger(fd int) error {
	err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	return os.NewSyscallError("setsockopt", err)
}

// findSource asks the routing table, by connecting a socket that sends nothing.
func (c *canary) findSource() (netip.Addr, error) {
	fd, err := c.socket(unix.SOCK_DGRAM)
	if err != nil {
		return netip.Addr{}, err
	}
	defer unix.Close(fd)
	if err := c.kernel.Exempt(fd); err != nil {
		return netip.Addr{}, err
	}
	if err := unix.Connect(fd, sockaddr(c.slot)); err != nil {
		return netip.Addr{}, fmt.Errorf("find the way to a slot: %w", err)
	}
	a, err := ownAddr(fd)
	return a.Addr(), err
}

func (c *canary) socket(kind int) (int, error) {
	family := unix.AF_INET6
	if c.slot.Addr().Is4() {
		family = unix.AF_INET
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	return fd, nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

func ownAddr(fd int) (netip.AddrPort, error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return netip.AddrPort{}, os.NewSyscallError("getsockname", err)
	}
	return from(sa), nil
}

// from returns an invalid address for another family.
func from(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	default:
		return netip.AddrPort{}
	}
}
