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

// canary connects to one slot over and over.
type canary struct {
	kernel Kernel
	slot   netip.AddrPort
	// source is the address that the kernel gives a socket towards the slot.
	// It changes with the namespace's addresses.
	source netip.Addr
}

var (
	errNoAnswer = errors.New("no answer: a firewall rule, or a handler that hangs")
	errAccepted = errors.New("somebody else answered")
)

// fly connects once. The handler answers a canary with a reset.
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
	// Without lingering: no state is to be left of ten of these a second.
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return os.NewSyscallError("setsockopt", err)
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
	return c.connect(ctx, fd)
}

func (c *canary) connect(ctx context.Context, fd int) error {
	err := unix.Connect(fd, sockaddr(c.slot))
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return os.NewSyscallError("connect", err)
	}
	end := time.Now().Add(canaryLimit)
	for left := canaryLimit; left > 0 && ctx.Err() == nil; left = time.Until(end) {
		ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(ready, int(left/time.Millisecond)+1)
		if n == 0 || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return os.NewSyscallError("poll", err)
		}
		var b [1]byte
		_, err = unix.Read(fd, b[:])
		switch {
		case errors.Is(err, unix.ECONNRESET):
			return nil // the handler had it
		case err != nil:
			return fmt.Errorf("refused: %w", err)
		default:
			return errAccepted
		}
	}
	return errNoAnswer
}

// findSource asks the routing table, by connecting a socket that sends nothing.
func (c *canary) findSource() (netip.Addr, error) {
	fd, err := c.socket(unix.SOCK_DGRAM)
	if err != nil {
		return netip.Addr{}, err
	}
	defer unix.Close(fd)
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
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), nil
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)), nil
	default:
		return netip.AddrPort{}, fmt.Errorf("unexpected address family %T", sa)
	}
}
