package handover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Kind says what a frame is.
type Kind byte

// The kinds of frames; see the package's comment.
const (
	KindHello Kind = iota + 1
	KindWelcome
	KindRefusal
	KindFreeze
	KindState
	KindHave
	KindCommit
	KindAbort
	KindFarewell
)

const (
	// pieceMax is how much of a frame is in one message: what fits in the send
	// buffer of a socket several times.
	pieceMax = 32 << 10
	// piecesFDs is how many descriptors one message may carry (SCM_MAX_FD).
	pieceFDs = 253
	// frameMax and fdsMax bound what is taken from a peer, wordMax what of one that is
	// not to say much: somebody who only begins to talk makes nobody run out of memory.
	frameMax = 1 << 30
	fdsMax   = 1 << 20
	wordMax  = 64 << 10
)

// The first byte of a message is the kind of the frame, the second tells whether
// there is more of it.
const headSize = 2

// Conn is one end. It is for one goroutine.
type Conn struct {
	c *net.UnixConn
}

// Frame is what was received. The descriptors are the receiver's.
type Frame struct {
	Kind Kind
	Data []byte
	FDs  []int
}

// ErrPeer means that the other end is another user's.
var ErrPeer = errors.New("the other end belongs to another user")

// Dial connects to a giver.
func Dial(ctx context.Context, path string) (*Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, err
	}
	return newConn(c)
}

// Accept takes the next taker.
func Accept(ln net.Listener) (*Conn, error) {
	c, err := ln.Accept()
	if err != nil {
		return nil, err
	}
	return newConn(c)
}

// Pair makes a conversation that nobody is at the other end of: what is sent waits in
// other, which may be given away, and is read after [Open].
func Pair() (conn *Conn, other *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	other = os.NewFile(uintptr(fds[1]), "handover")
	// All of it has to fit.
	if err = unix.SetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, frameMax/2); err != nil {
		err = os.NewSyscallError("setsockopt", errors.Join(err, unix.Close(fds[0])))
	} else {
		conn, err = Open(fds[0])
	}
	if err != nil {
		other.Close()
		return nil, nil, err
	}
	return conn, other, nil
}

// Open makes an end of a descriptor, which is its own from then on, also on an error.
func Open(fd int) (*Conn, error) {
	f := os.NewFile(uintptr(fd), "handover")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("open the other end: %w", err)
	}
	if _, ok := c.(*net.UnixConn); !ok {
		c.Close()
		return nil, errors.New("open the other end: it is no unix socket")
	}
	return newConn(c)
}

func newConn(c net.Conn) (*Conn, error) {
	conn := &Conn{c: c.(*net.UnixConn)}
	peer, err := conn.peer()
	// The file's mode says the same; but descriptors are given away here.
	if err == nil && peer.Uid != uint32(os.Geteuid()) {
		err = ErrPeer
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return conn, nil
}

func (c *Conn) peer() (*unix.Ucred, error) {
	raw, err := c.c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var peer *unix.Ucred
	control := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(control, err); err != nil {
		return nil, fmt.Errorf("read who is at the other end: %w", err)
	}
	return peer, nil
}

// Peer returns the process at the other end, as it is called here.
func (c *Conn) Peer() (pid int, err error) {
	peer, err := c.peer()
	if err != nil {
		return 0, err
	}
	return int(peer.Pid), nil
}

// FD calls f with the descriptor.
func (c *Conn) FD(f func(fd int)) error {
	raw, err := c.c.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { f(int(fd)) })
}

// Close ends the conversation.
func (c *Conn) Close() { c.c.Close() }

// Within bounds what follows.
func (c *Conn) Within(d time.Duration) { _ = c.c.SetDeadline(time.Now().Add(d)) }

// Interrupt makes what is under way fail. Anybody may call it.
func (c *Conn) Interrupt() { _ = c.c.SetDeadline(time.Unix(1, 0)) }

// Send sends a frame. The descriptors stay the caller's.
func (c *Conn) Send(kind Kind, data []byte, fds []int) error {
	for first := true; first || len(data) > 0 || len(fds) > 0; first = false {
		piece, rights := data[:min(len(data), pieceMax)], fds[:min(len(fds), pieceFDs)]
		data, fds = data[len(piece):], fds[len(rights):]
		message := append(make([]byte, 0, headSize+len(piece)), byte(kind), 0)
		if len(data) > 0 || len(fds) > 0 {
			message[1] = 1
		}
		message = append(message, piece...)
		var oob []byte
		if len(rights) > 0 {
			oob = unix.UnixRights(rights...)
		}
		if _, _, err := c.c.WriteMsgUnix(message, oob, nil); err != nil {
			return fmt.Errorf("send frame: %w", err)
		}
	}
	return nil
}

// SendJSON sends a frame whose data is v as JSON.
func (c *Conn) SendJSON(kind Kind, v any, fds []int) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("send frame: %w", err)
	}
	return c.Send(kind, b, fds)
}

// longest is how long a frame of a kind may be.
func longest(k Kind) int {
	switch k {
	case KindWelcome, KindState, KindFarewell:
		return frameMax
	default:
		return wordMax
	}
}

// Receive reads the next frame. It returns [io.EOF] when the other end is closed.
func (c *Conn) Receive() (Frame, error) {
	return c.receive(func(Kind) bool { return true })
}

// receive reads the next frame, if it is of a kind that may come; of any other it reads
// the beginning.
func (c *Conn) receive(mayCome func(Kind) bool) (Frame, error) {
	var f Frame
	buf, oob := make([]byte, headSize+pieceMax), make([]byte, unix.CmsgSpace(4*pieceFDs))
	for more := true; more; {
		n, rights, flags, err := c.read(buf, oob)
		f.FDs = append(f.FDs, rights...)
		switch {
		case err != nil:
		case n == 0:
			err = io.EOF
		case n < headSize:
			err = errors.New("a message is too short")
		case flags&unix.MSG_CTRUNC != 0:
			err = errors.New("no room for all descriptors (RLIMIT_NOFILE)")
		case f.Kind != 0 && Kind(buf[0]) != f.Kind:
			err = errors.New("a frame is not complete")
		case len(f.Data) > longest(Kind(buf[0])) || len(f.FDs) > fdsMax:
			err = errors.New("a frame is too long")
		default:
		}
		if err != nil {
			f.Close()
			if errors.Is(err, io.EOF) {
				return Frame{}, io.EOF
			}
			return Frame{}, fmt.Errorf("receive frame: %w", err)
		}
		f.Kind, more = Kind(buf[0]), buf[1] != 0
		if !mayCome(f.Kind) {
			return f, nil
		}
		f.Data = append(f.Data, buf[headSize:n]...)
	}
	return f, nil
}

// Last has the other end send nothing more, which is EPIPE there, and returns of which kind
// the next frame is that it had sent by then; 0: it had sent none. It waits for nothing,
// also after [Conn.Interrupt], and nothing is to be received after it, such as a farewell.
func (c *Conn) Last() (kind Kind, err error) {
	call := c.FD(func(fd int) {
		if err = unix.Shutdown(fd, unix.SHUT_RD); err != nil {
			return
		}
		buf, oob := make([]byte, headSize+pieceMax), make([]byte, unix.CmsgSpace(4*pieceFDs))
		for again := true; again; {
			var n, oobn int
			n, oobn, _, _, err = unix.Recvmsg(fd, buf, oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
			// Closed without reading all: see read.
			again = errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNRESET)
			if err == nil && n >= headSize {
				kind = Kind(buf[0])
			}
			f := Frame{}
			f.FDs, _ = rightsIn(oob[:oobn])
			f.Close()
		}
	})
	if err = errors.Join(call, err); err != nil {
		return 0, fmt.Errorf("hear the last frame: %w", err)
	}
	return kind, nil
}

func (c *Conn) read(buf, oob []byte) (n int, fds []int, flags int, err error) {
	n, oobn, flags, _, err := c.c.ReadMsgUnix(buf, oob)
	if errors.Is(err, syscall.ECONNRESET) {
		// It closed without reading all. What it said before comes after that.
		n, oobn, flags, _, err = c.c.ReadMsgUnix(buf, oob)
	}
	if err != nil {
		return n, nil, flags, err
	}
	fds, err = rightsIn(oob[:oobn])
	return n, fds, flags, err
}

// rightsIn returns the descriptors that came with a message.
func rightsIn(oob []byte) (fds []int, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	for i := range messages {
		got, parse := unix.ParseUnixRights(&messages[i])
		if parse == nil {
			fds = append(fds, got...)
		}
		err = errors.Join(err, parse)
	}
	return fds, err
}

// Close closes the descriptors of a frame.
func (f *Frame) Close() {
	for _, fd := range f.FDs {
		unix.Close(fd)
	}
	f.FDs = nil
}
