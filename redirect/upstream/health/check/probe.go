package check

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// ask asks a target once. It returns nil if the target is well.
func (c *Checker) ask(ctx context.Context, t Target) error {
	to := t.Addr
	if t.Spec.Port != 0 {
		to = netip.AddrPortFrom(to.Addr(), t.Spec.Port)
	}
	switch t.Spec.Kind {
	case KindHTTP:
		return c.askHTTP(ctx, to, t.Spec.HTTP)
	case KindCommand:
		return c.commands.ask(ctx, to, t)
	default:
		return c.askTCP(ctx, to)
	}
}

func (c *Checker) askTCP(ctx context.Context, to netip.AddrPort) error {
	conn, err := c.dial(ctx, to)
	if err != nil {
		return err
	}
	// An end and no reset, though a reset would leave no TIME_WAIT: servers
	// complain of resets.
	conn.Close()
	return nil
}

// dial connects. An error that is not the endpoint's is own.
func (c *Checker) dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	d := net.Dialer{KeepAlive: -1, Control: c.exempt}
	// An MPTCP socket is a first subflow's too, which Exempt would not reach.
	d.SetMultipathTCP(false)
	conn, err := d.DialContext(ctx, "tcp", to.String())
	if err == nil {
		return conn, nil
	}
	whose := isEndpoints(err) || isICMP(err) && c.leaves(to)
	if err = fmt.Errorf("connect: %w", shorten(err)); !whose {
		err = own(err)
	}
	return nil, err
}

// leaves tells whether a SYN leaves for there: package net does not tell whether
// connect(2) refused at once, or what became of the connection did.
func (c *Checker) leaves(to netip.AddrPort) bool {
	family, sa := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()})
	if to.Addr().Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	if c.o.Exempt != nil && c.o.Exempt(fd) != nil {
		return false
	}
	return errors.Is(unix.Connect(fd, sa), unix.EINPROGRESS)
}

// exempt runs on every socket before it connects.
func (c *Checker) exempt(_, _ string, raw syscall.RawConn) error {
	if c.o.Exempt == nil {
		return nil
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = c.o.Exempt(int(fd)) }); err != nil {
		return fmt.Errorf("exempt socket: %w", err)
	}
	return failed
}

// errTimeout stands for the many errors that mean it.
var errTimeout = errors.New("no answer in time")

// shorten leaves out the addresses that net puts before what happened, since who
// reads the error knows them.
func shorten(err error) error {
	var op *net.OpError
	if !errors.As(err, &op) {
		return err
	}
	var call *os.SyscallError
	switch {
	case errors.As(op.Err, &call):
		return call.Err
	case op.Timeout():
		return errTimeout
	default:
		return op.Err
	}
}

// isEndpoints tells whether a failed dial is the endpoint's failure or its
// network's, as in a connection's dial: what else can be wrong (no free port, no
// descriptor, a local firewall) hits every endpoint alike.
func isEndpoints(err error) bool {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		var timeout net.Error
		return errors.As(err, &timeout) && timeout.Timeout()
	}
	switch errno {
	case unix.ECONNREFUSED, unix.ECONNRESET, unix.ETIMEDOUT,
		unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENETDOWN:
		return true
	default:
		return false
	}
}

// isICMP is true for what an ICMP error may mean, as in a connection's dial, and a machine
// itself may forbid: see leaves.
func isICMP(err error) bool {
	for _, e := range []syscall.Errno{unix.EACCES, unix.EPROTO, unix.ENOPROTOOPT, unix.EOPNOTSUPP, unix.ENONET} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// ownError is a failure of this side, which says nothing about the endpoint.
type ownError struct{ error }

func (e ownError) Unwrap() error { return e.error }

func own(err error) error { return ownError{err} }

func isOwn(err error) bool { return errors.As(err, new(ownError)) }
