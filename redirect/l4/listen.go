package l4

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// localBuffer is what the socket towards an application buffers each way, in
// bytes. The kernel doubles it for its own book-keeping.
const localBuffer = 1 << 20

// maxHops is the largest hop limit of a packet.
const maxHops = 255

// backlog is how many connections may wait to be accepted; the kernel caps it
// at net.core.somaxconn.
const backlog = 4096

// Listen opens a non-blocking listener for a relay on a free port of addr. What
// is set on it, the accepted sockets inherit. exempt is as in [Options]. The
// caller owns the listener until it is in [Options].
func Listen(addr netip.Addr, exempt func(fd int) error) (fd int, err error) {
	family := unix.AF_INET6
	if addr.Is4() {
		family = unix.AF_INET
	}
	// A plain TCP socket: an MPTCP one cannot be in a SOCKMAP.
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, fmt.Errorf("open listener: %w", os.NewSyscallError("socket", err))
	}
	if exempt != nil {
		err = exempt(fd)
	}
	if err == nil {
		err = dressListener(fd, addr)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("listen on %s: %w", addr, err)
	}
	return fd, nil
}

func dressListener(fd int, addr netip.Addr) error {
	// An address that is local by route only is not one of an interface,
	// which is what IPv6 asks for.
	level, option := unix.IPPROTO_IP, unix.IP_FREEBIND
	if addr.Is6() {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_FREEBIND
	}
	if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	// An application that asks for a hop limit of 255 (IP_MINTTL), since its peer is
	// next to it, drops everything else, the answer to its SYN too.
	option = unix.IP_TTL
	if addr.Is6() {
		option = unix.IPV6_UNICAST_HOPS
	}
	if err := unix.SetsockoptInt(fd, level, option, maxHops); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	KeepAlive(fd)
	abort(int32(fd))
	// Fixed buffers, where the kernel's own would grow to tcp_rmem's and
	// tcp_wmem's maxima: what an application sends to an endpoint that does not
	// read has to stop somewhere, and the way to the slot is short.
	for _, option := range []int{unix.SO_RCVBUFFORCE, unix.SO_SNDBUFFORCE} {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, localBuffer); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	// The application's leg never leaves the machine. A kernel without it
	// stays with its default.
	_ = unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, localCongestion)
	var s sockaddr
	s.set(netip.AddrPortFrom(addr, 0))
	if e := s.bind(int32(fd)); e != 0 {
		return os.NewSyscallError("bind", e)
	}
	if err := unix.Listen(fd, backlog); err != nil {
		return os.NewSyscallError("listen", err)
	}
	// net.ipv4.tcp_fastopen can make every listener take data with a SYN,
	// from the call before on. A connection that is accepted with its SYN
	// cannot be held back until the dial has ended.
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 0); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	// An accepted socket has a slot and the original port as its own address,
	// and so stands in the way of an application that is to listen on that
	// port, which nothing else would be. Inherited this lets it, if it sets
	// the option too, as servers do. Set after bind, which without it makes
	// sure that the port is nobody else's.
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
}

// CloseListeners closes what [Listen] opened and no relay has taken.
func CloseListeners(perWorker [][]int) error {
	var errs []error
	for _, fds := range perWorker {
		for _, fd := range fds {
			errs = append(errs, unix.Close(fd))
		}
	}
	return errors.Join(errs...)
}

// Backlog returns the fill of the fullest accept queue, from 0 to 1.
func (r *Relay) Backlog() float64 {
	if r.stopping.Load() {
		return 0 // the listeners may be closed
	}
	fullest := 0.0
	for _, fds := range r.options.Listeners {
		for _, fd := range fds {
			info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
			if err != nil || info.Sacked == 0 {
				continue
			}
			// For a listener these two are the queue and its limit.
			fullest = max(fullest, float64(info.Unacked)/float64(info.Sacked))
		}
	}
	return fullest
}
