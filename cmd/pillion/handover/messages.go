package handover

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Protocol is the number of the conversation. It changes when an older end would
// not understand a frame, or its place.
const Protocol = 1

// Hello is the taker's first word. Its form is the same in every protocol.
type Hello struct {
	Protocol int `json:"protocol"`
	// ABI is the layout of the maps, Carry the encoding of connections.
	ABI uint32 `json:"abi"`
	// Moves: what is in maps of another layout is moved, if it can be. Who cannot do
	// that does not say so.
	Moves    bool   `json:"moves,omitempty"`
	Carry    int    `json:"carry"`
	Build    string `json:"build"`
	Instance string `json:"instance"`
	Pid      int    `json:"pid"`
}

// Welcome is the giver's answer. With it come the listeners of the workers, of IPv4
// and then of IPv6, their rings, and the sockets of Sockets.
type Welcome struct {
	Build     string `json:"build"`
	Pid       int    `json:"pid"`
	FrameTag  uint64 `json:"frame_tag"`
	Listeners [2]int `json:"listeners"` // how many, by family
	Rings     int    `json:"rings"`
	// Live is how many connections are open, so that there is room for them.
	Live    int      `json:"live"`
	Sockets []string `json:"sockets"` // what each is for
	// Answered: every source has told endpoints once, so it is ready for good.
	Answered bool `json:"answered"`
	// Services are the giver's, with the endpoints that they have.
	Services []Service `json:"services"`
}

// Service is one with its endpoints.
type Service struct {
	Name      string         `json:"name"`
	Addr      netip.AddrPort `json:"address"`
	Endpoints []Endpoint     `json:"endpoints"`
}

// Endpoint is one of a service.
type Endpoint struct {
	Addr   netip.AddrPort `json:"address"`
	Weight uint32         `json:"weight"`
	Zone   string         `json:"zone,omitempty"`
}

// Refusal says why there is nothing to be taken over. Its form is the same in every
// protocol.
type Refusal struct {
	Why string `json:"why"`
}

// ErrRefused means that the giver will not give.
var ErrRefused = errors.New("the running process refuses")

// Expect receives a frame of this kind. A refusal or an abort is an error that says why.
func (c *Conn) Expect(kind Kind) (Frame, error) {
	f, err := c.receive(func(k Kind) bool { return k == kind || k == KindRefusal || k == KindAbort })
	if err != nil || f.Kind == kind {
		return f, err
	}
	defer f.Close()
	if f.Kind == KindRefusal || f.Kind == KindAbort {
		var r Refusal
		if err := json.Unmarshal(f.Data, &r); err != nil {
			return Frame{}, fmt.Errorf("%w, with words that cannot be read: %w", ErrRefused, err)
		}
		return Frame{}, fmt.Errorf("%w: %s", ErrRefused, r.Why)
	}
	return Frame{}, fmt.Errorf("frame of kind %d where %d was to come", f.Kind, kind)
}

// Listen opens the socket that takers come to. Who calls it has the instance, so what
// is at the path is stale. Nobody but this user can connect.
func Listen(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove stale socket: %w", err)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, os.NewSyscallError("socket", err))
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	// Before the bind, which gives the file the mode of the socket.
	if err := unix.Fchmod(fd, 0o600); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, os.NewSyscallError("fchmod", err))
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, os.NewSyscallError("bind", err))
	}
	if err := unix.Listen(fd, 1); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, os.NewSyscallError("listen", err))
	}
	ln, err := Inherit(fd)
	if err == nil {
		ln.(*net.UnixListener).SetUnlinkOnClose(true) // a file that was made here
	}
	return ln, err
}

// Inherit makes a listener of a descriptor, which stays the caller's. Closed, it
// leaves its file where it is; see [Own].
func Inherit(fd int) (net.Listener, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("take over socket: %w", err)
	}
	f := os.NewFile(uintptr(dup), "socket")
	defer f.Close()
	ln, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("take over socket: %w", err)
	}
	return ln, nil
}

// Own makes a listener this process's: its file goes when it is closed, and who
// connects to it is told of this process.
func Own(ln net.Listener) error {
	u, ok := ln.(*net.UnixListener)
	if !ok {
		return nil
	}
	u.SetUnlinkOnClose(true)
	raw, err := u.SyscallConn()
	if err != nil {
		return err
	}
	// The kernel notes who called listen last.
	control := raw.Control(func(fd uintptr) { err = unix.Listen(int(fd), unix.SOMAXCONN) })
	return errors.Join(control, os.NewSyscallError("listen", err))
}

// Disown makes a listener another process's: its file stays when it is closed.
func Disown(ln net.Listener) {
	if u, ok := ln.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
}

// FD calls f with the descriptor of a listener.
func FD(ln net.Listener, f func(fd int)) error {
	s, ok := ln.(syscall.Conn)
	if !ok {
		return errors.New("the listener has no descriptor")
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { f(int(fd)) })
}
