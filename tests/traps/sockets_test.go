package traps

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// application makes sockets that are the application's: the kernel goes by where
// a socket was made. The test then uses them itself.
type application struct {
	t    testing.TB
	conn int // to the process that makes them
}

// startApplication starts the process that makes the sockets. It ends with the test.
func startApplication(t testing.TB, place testutil.Place) *application {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "sockets")
	cmd := exec.Command("/proc/self/exe", roleSockets)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{theirs}
	err = place.Start(cmd)
	theirs.Close()
	t.Cleanup(func() {
		unix.Close(pair[0])
		if cmd.Process != nil {
			cmd.Wait()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return &application{t, pair[0]}
}

// makeSockets answers each request, a family, a protocol and a type, with a socket.
func makeSockets([]string) error {
	for {
		req := make([]byte, 8)
		n, err := unix.Read(3, req)
		if err != nil || n == 0 {
			return err
		}
		fd, err := unix.Socket(int(req[0]), int(req[3])|unix.SOCK_CLOEXEC, int(req[1])|int(req[2])<<8)
		if err != nil {
			return fmt.Errorf("make socket: %w", err)
		}
		if err := unix.Sendmsg(3, []byte{0}, unix.UnixRights(fd), nil, 0); err != nil {
			return err
		}
		unix.Close(fd)
	}
}

// socket makes a TCP or MPTCP socket of the application, non-blocking. The test
// closes it.
func (a *application) socket(family, protocol int) int {
	a.t.Helper()
	return a.make(family, protocol, unix.SOCK_STREAM)
}

// datagrams makes an unconnected UDP socket of the application.
func (a *application) datagrams() net.Conn {
	a.t.Helper()
	f := os.NewFile(uintptr(a.make(unix.AF_INET, 0, unix.SOCK_DGRAM)), "application")
	defer f.Close()
	c, err := net.FilePacketConn(f)
	if err != nil {
		a.t.Fatal(err)
	}
	return c.(*net.UDPConn)
}

func (a *application) make(family, protocol, kind int) int {
	a.t.Helper()
	fd, err := func() (int, error) {
		if _, err := unix.Write(a.conn, []byte{byte(family), byte(protocol), byte(protocol >> 8), byte(kind)}); err != nil {
			return -1, err
		}
		oob := make([]byte, unix.CmsgSpace(4))
		_, n, _, _, err := unix.Recvmsg(a.conn, make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
		if err != nil {
			return -1, err
		}
		fd, err := testutil.PassedFD(oob[:n])
		if err != nil {
			return -1, err
		}
		return fd, unix.SetNonblock(fd, true)
	}()
	if err != nil {
		a.t.Fatalf("the application's socket: %v", err)
	}
	return fd
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

func addrPort(sa unix.Sockaddr, err error) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// connect connects a socket, and waits for the result.
func connect(fd int, to netip.AddrPort) error {
	err := unix.Connect(fd, sockaddr(to))
	if !errors.Is(err, unix.EINPROGRESS) {
		return err
	}
	if !ready(fd, unix.POLLOUT, rig.Limit) {
		return errors.New("no result of connect")
	}
	n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && n != 0 {
		err = unix.Errno(n)
	}
	return err
}

// ready waits until a socket is ready, and tells whether it is.
func ready(fd int, events int16, limit time.Duration) bool {
	for end := time.Now().Add(limit); ; {
		fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
		n, err := unix.Poll(fds, int(max(time.Until(end), 0).Milliseconds()))
		if n > 0 {
			return true
		}
		if !errors.Is(err, unix.EINTR) && !time.Now().Before(end) {
			return false
		}
	}
}

// try makes a connection, or says what connect did.
func (a *application) try(to netip.AddrPort) (*net.TCPConn, error) {
	return a.tryBy(to, 0)
}

func (a *application) tryBy(to netip.AddrPort, protocol int) (*net.TCPConn, error) {
	fd := a.socket(familyOf(to.Addr()), protocol)
	if err := connect(fd, to); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return asConn(fd)
}

// deadline is when what has not happened yet hangs.
func deadline() time.Time { return time.Now().Add(rig.Limit) }

// asConn makes a connection of a socket, and closes the socket.
func asConn(fd int) (*net.TCPConn, error) {
	f := os.NewFile(uintptr(fd), "application")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), c.SetDeadline(deadline())
}

// dial makes a connection, which ends with the test.
func (a *application) dial(t testing.TB, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := a.try(to)
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// abort closes a connection by a reset.
func abort(c net.Conn) {
	_ = c.(*net.TCPConn).SetLinger(0)
	c.Close()
}

func isReset(err error) bool { return errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) }

// from waits for what a server has to say to the test.
func from[T any](t testing.TB, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(rig.Limit):
		t.Fatal("the server has seen nothing of it")
		panic("not reached")
	}
}

// accepted waits for a connection that the test serves itself.
func accepted(t testing.TB, ln net.Listener) *net.TCPConn {
	t.Helper()
	tcp := ln.(*net.TCPListener)
	if err := tcp.SetDeadline(deadline()); err != nil {
		t.Fatal(err)
	}
	c, err := tcp.AcceptTCP()
	if err != nil {
		t.Fatalf("the server sees no connection: %v", err)
	}
	if err := c.SetDeadline(deadline()); err != nil {
		t.Fatal(err)
	}
	return c
}

// beApp is a program of its own: it dials, and prints the first line that it hears.
func beApp(args []string) error {
	c, err := net.Dial("tcp", args[0])
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(rig.Limit)); err != nil {
		return err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	said, err := io.ReadAll(c)
	fmt.Print(string(said))
	return err
}
