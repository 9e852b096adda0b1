package survive

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A connection begins with a head that says what both sides do. What follows, in each
// direction, is a stream in which every byte tells its place.

// kind is what a connection does.
type kind byte

const (
	kindBoth      kind = 'b' // both send and end when they like
	kindAppFirst  kind = 'a' // the application sends all and ends; then the server
	kindServer    kind = 's' // the other way round
	kindAppResets kind = 'r' // the application resets it in the middle
	kindReset     kind = 'R' // the server does
	kindPing      kind = 'p' // messages and answers, until the end
	kindUrgent    kind = 'u' // the same, each with an urgent byte in its middle
	kindEmpty     kind = 'e' // nothing at all, not even a head
)

// head begins a connection, of which each side sends so much.
type head struct {
	Kind     kind
	ID       uint32
	Up, Down uint32
}

const headSize = 13

func (h head) bytes() []byte {
	b := binary.BigEndian.AppendUint32([]byte{byte(h.Kind)}, h.ID)
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, h.Up), h.Down)
}

func readHead(r io.Reader) (h head, n int, err error) {
	var b [headSize]byte
	n, err = io.ReadFull(r, b[:])
	return head{kind(b[0]), binary.BigEndian.Uint32(b[1:]), binary.BigEndian.Uint32(b[5:]), binary.BigEndian.Uint32(b[9:])}, n, err
}

// word is 8 bytes of a stream.
func word(seed, n uint64) uint64 {
	x := (seed<<32 + n) * 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	return x ^ x>>27
}

// fill writes what a stream has at off.
func fill(b []byte, seed, off uint64) {
	for i := range b {
		at := off + uint64(i)
		b[i] = byte(word(seed, at/8) >> (at % 8 * 8))
	}
}

// check tells where b is not what a stream has at off, or -1.
func check(b []byte, seed, off uint64) int {
	for i := range b {
		at := off + uint64(i)
		if b[i] != byte(word(seed, at/8)>>(at%8*8)) {
			return i
		}
	}
	return -1
}

// lifetime bounds every connection: one that hangs is an error.
const lifetime = 60 * time.Second

// talker is one side of all connections.
type talker struct {
	app  bool
	end  chan struct{} // closed when those without an end of their own are to end
	done atomic.Int64  // connections that did all they were to
	sent atomic.Int64  // bytes that were received and right
	none atomic.Int64  // connections without a byte

	mu   sync.Mutex
	errs []string
}

func (t *talker) fail(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.errs) < 20 {
		t.errs = append(t.errs, fmt.Sprintf(format, args...))
	}
}

func (t *talker) take() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := t.errs
	t.errs = nil
	return all
}

// talk does one side of a connection whose head was sent, or read. It returns the bytes
// of each direction, if they are as many as it likes.
func (t *talker) talk(c *net.TCPConn, h head) (said uint32) {
	c.SetDeadline(time.Now().Add(lifetime))
	if h.Kind == kindPing || h.Kind == kindUrgent {
		c.SetDeadline(time.Time{})
		said, err := t.ping(c, h)
		if err != nil {
			t.fail("ping %d: %v", h.ID, err)
		}
		return said
	}
	seed, other := uint64(h.ID)*2, uint64(h.ID)*2+1
	mine, theirs := h.Up, h.Down
	if !t.app {
		seed, other, mine, theirs = other, seed, theirs, mine
	}
	resets := h.Kind == kindAppResets && t.app || h.Kind == kindReset && !t.app
	isReset := h.Kind == kindAppResets || h.Kind == kindReset
	if resets {
		mine /= 2
	}
	var got uint64
	var readErr, writeErr error
	read := make(chan struct{})
	go func() { got, readErr = t.receive(c, other, h); close(read) }()
	if h.Kind == kindAppFirst && !t.app || h.Kind == kindServer && t.app {
		<-read
	}
	writeErr = t.send(c, seed, uint64(mine), h)
	if resets {
		c.SetLinger(0)
		c.Close()
		<-read
		t.done.Add(1)
		return 0
	}
	if writeErr == nil {
		writeErr = c.CloseWrite()
	}
	<-read
	switch {
	case isReset && (wasReset(readErr) || readErr == nil && wasReset(writeErr)):
	case isReset:
		t.fail("connection %d (%c): a reset was not passed on: read %d of %d: %v, write: %v", h.ID, h.Kind, got, theirs, readErr, writeErr)
	case readErr != nil || writeErr != nil || got != uint64(theirs):
		t.fail("connection %d (%c): read %d of %d: %v, write: %v", h.ID, h.Kind, got, theirs, readErr, writeErr)
	}
	t.done.Add(1)
	return 0
}

func wasReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// send writes n bytes in pieces of all sizes.
func (t *talker) send(c net.Conn, seed, n uint64, h head) error {
	r := rand.New(rand.NewPCG(uint64(h.ID), seed))
	slow := h.ID%4 == 0
	buf := make([]byte, 64<<10)
	for off := uint64(0); off < n; {
		m := 1 + r.Uint64N(uint64(len(buf)))
		if r.IntN(3) == 0 {
			m = 1 + r.Uint64N(200)
		}
		piece := buf[:min(m, n-off)]
		fill(piece, seed, off)
		if _, err := c.Write(piece); err != nil {
			return err
		}
		off += uint64(len(piece))
		if slow || r.IntN(2) == 0 {
			time.Sleep(time.Duration(r.IntN(8000)) * time.Microsecond)
		}
	}
	return nil
}

// receive reads to the end, and returns how many bytes there were.
func (t *talker) receive(c net.Conn, seed uint64, h head) (uint64, error) {
	slow := h.ID%5 == 0
	buf := make([]byte, 64<<10)
	for off := uint64(0); ; {
		n, err := c.Read(buf)
		if bad := check(buf[:n], seed, off); bad >= 0 {
			return off, fmt.Errorf("byte %d is not what was sent", off+uint64(bad))
		}
		off += uint64(n)
		t.sent.Add(int64(n))
		if errors.Is(err, io.EOF) {
			return off, nil
		}
		if err != nil {
			return off, err
		}
		if slow {
			time.Sleep(time.Millisecond)
		}
	}
}

// ping exchanges messages until the end.
func (t *talker) ping(c *net.TCPConn, h head) (said uint32, err error) {
	buf, want := make([]byte, 2048), make([]byte, 2048)
	write := func(b []byte) error { _, err := c.Write(b); return err }
	if h.Kind == kindUrgent {
		if err := inline(c); err != nil {
			return 0, err
		}
		write = func(b []byte) error { return writeUrgent(c, b) }
	}
	for n := uint64(0); ; n++ {
		size := int(word(uint64(h.ID), n)%uint64(len(buf))) + 1
		fill(want[:size], uint64(h.ID), n)
		if t.app {
			select {
			case <-t.end:
				return said, c.CloseWrite()
			case <-time.After(time.Duration(word(uint64(h.ID), n+1)%60_000) * time.Microsecond):
			}
			if err := write(want[:size]); err != nil {
				return said, fmt.Errorf("message %d: write: %w", n, err)
			}
		}
		c.SetReadDeadline(time.Now().Add(lifetime))
		_, err := io.ReadFull(c, buf[:size])
		if errors.Is(err, io.EOF) && !t.app {
			return said, nil
		}
		if err != nil {
			return said, fmt.Errorf("message %d: read: %w", n, err)
		}
		if bad := check(buf[:size], uint64(h.ID), n); bad >= 0 {
			return said, fmt.Errorf("message %d: byte %d is not what was sent", n, bad)
		}
		t.sent.Add(int64(size))
		said += uint32(size)
		if !t.app {
			if err := write(buf[:size]); err != nil {
				return said, fmt.Errorf("message %d: write: %w", n, err)
			}
		}
	}
}

// inline has urgent bytes read in their places.
func inline(c *net.TCPConn) error {
	return control(c, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
}

// writeUrgent writes b with the byte in its middle as an urgent one.
func writeUrgent(c *net.TCPConn, b []byte) error {
	mid := len(b) / 2
	_, err := c.Write(b[:mid])
	err = errors.Join(err, control(c, func(fd int) error {
		_, err := unix.SendmsgN(fd, b[mid:mid+1], nil, nil, unix.MSG_OOB) // there is room: the peer has answered
		return err
	}))
	if mid+1 < len(b) {
		_, last := c.Write(b[mid+1:])
		err = errors.Join(err, last)
	}
	return err
}

func control(c *net.TCPConn, f func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return errors.Join(raw.Control(func(fd uintptr) { err = f(int(fd)) }), err)
}

// serve is the server's side.
func (t *talker) serve(c net.Conn) {
	c.SetDeadline(time.Now().Add(lifetime))
	h, n, err := readHead(c)
	if n == 0 {
		t.none.Add(1)
		return
	}
	if err != nil {
		t.fail("head: %d bytes: %v", n, err)
		return
	}
	t.talk(c.(*net.TCPConn), h)
}
