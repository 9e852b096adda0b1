package upgrade

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A connection of the test begins with a head that says what it is: its kind and its
// number. What follows, in each direction, is a stream in which every byte tells its
// place, so that one that is lost, doubled or moved is seen.

// kind is what a connection does.
type kind byte

const (
	kindEcho    kind = 'e' // a message and its answer, over and over
	kindDuplex  kind = 'd' // both sides send whenever they like
	kindHalf    kind = 'h' // the application has ended its side at once
	kindHalfFar kind = 'f' // the server has
	kindBlocked kind = 'b' // the application does not read until the end
	kindStuffed kind = 's' // the server does not
	kindIdle    kind = 'i' // nothing until the end
	kindUrgent  kind = 'u' // as echo, with urgent bytes in between
)

// stuffing is what a connection whose reader does not read is to hold: more than all
// buffers on the way.
const stuffing = 12 << 20

// head begins every connection.
type head struct {
	Kind kind
	ID   uint32
}

const headSize = 5

func (h head) bytes() []byte { return binary.BigEndian.AppendUint32([]byte{byte(h.Kind)}, h.ID) }

// stream is one direction: what its bytes are, and how many there were.
type stream struct {
	seed uint64
	at   uint64
}

// fill writes the next bytes.
func (s *stream) fill(b []byte) {
	for i := range b {
		b[i] = s.byteAt(s.at + uint64(i))
	}
	s.at += uint64(len(b))
}

// check compares with the next bytes.
func (s *stream) check(b []byte) error {
	for i := range b {
		if want := s.byteAt(s.at + uint64(i)); b[i] != want {
			return fmt.Errorf("byte %d is %#x, want %#x", s.at+uint64(i), b[i], want)
		}
	}
	s.at += uint64(len(b))
	return nil
}

// byteAt differs between places that are 64 KiB or 1 MiB apart, too.
func (s *stream) byteAt(at uint64) byte {
	return byte((at ^ at>>8 ^ at>>16 ^ at>>20) + s.seed)
}

// toServer and toApp are the streams of a connection.
func toServer(id uint32) stream { return stream{seed: uint64(id) * 31} }
func toApp(id uint32) stream    { return stream{seed: uint64(id)*17 + 3} }

// send writes n bytes of a stream.
func (s *stream) send(c net.Conn, buf []byte, n int) error {
	for n > 0 {
		piece := buf[:min(n, len(buf))]
		s.fill(piece)
		if _, err := c.Write(piece); err != nil {
			return fmt.Errorf("at %d: write: %w", s.at, err)
		}
		n -= len(piece)
	}
	return nil
}

// receive reads n bytes and checks them.
func (s *stream) receive(c net.Conn, buf []byte, n int) error {
	for n > 0 {
		m, err := c.Read(buf[:min(n, len(buf))])
		if e := s.check(buf[:m]); e != nil {
			return e
		}
		n -= m
		if err != nil {
			return fmt.Errorf("at %d: read: %w", s.at, err)
		}
	}
	return nil
}

// drain reads to the end of file.
func (s *stream) drain(c net.Conn, buf []byte) error {
	for {
		n, err := c.Read(buf)
		if e := s.check(buf[:n]); e != nil {
			return e
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("at %d: read: %w", s.at, err)
		}
	}
}

// sendUrgent sends a byte that is not part of the stream.
func sendUrgent(c net.Conn) error {
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	control := raw.Control(func(fd uintptr) { err = unix.Sendto(int(fd), []byte{'!'}, unix.MSG_OOB|unix.MSG_NOSIGNAL, nil) })
	return errors.Join(control, err)
}

// far is the server's side of everything.
type far struct {
	end   chan struct{} // closed when those that do not read are to read
	ended sync.Once

	mu     sync.Mutex
	counts map[uint32]counts
	errs   []error
}

// counts are the bytes of one connection, without the head.
type counts struct{ Up, Down uint64 }

func newFar() *far { return &far{end: make(chan struct{}), counts: map[uint32]counts{}} }

func (f *far) finish() { f.ended.Do(func() { close(f.end) }) }

func (f *far) serve(c net.Conn) {
	buf := make([]byte, 16<<10)
	var b [headSize]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return // a connection of nobody's: a health check
	}
	h := head{kind(b[0]), binary.BigEndian.Uint32(b[1:])}
	up, down := toServer(h.ID), toApp(h.ID)
	err := f.play(c, h, &up, &down, buf)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.counts[h.ID] = counts{Up: up.at, Down: down.at}
	if err != nil {
		f.errs = append(f.errs, fmt.Errorf("server: connection %d (%c): %w", h.ID, h.Kind, err))
	}
}

func (f *far) play(c net.Conn, h head, up, down *stream, buf []byte) error {
	switch h.Kind {
	case kindEcho, kindIdle, kindUrgent:
		return answer(c, up, down, buf)
	case kindHalfFar:
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			return err
		}
		return up.drain(c, buf)
	case kindBlocked:
		return errors.Join(down.send(c, buf, stuffing), c.(*net.TCPConn).CloseWrite(), up.drain(c, make([]byte, 4096)))
	case kindStuffed:
		<-f.end
		return errors.Join(up.drain(c, buf), c.(*net.TCPConn).CloseWrite())
	default: // duplex, half
		return f.duplex(c, up, down, buf)
	}
}

// answer sends as many bytes as come.
func answer(c net.Conn, up, down *stream, buf []byte) error {
	for {
		n, err := c.Read(buf)
		if e := up.check(buf[:n]); e != nil {
			return e
		}
		if n > 0 {
			if err := down.send(c, buf, n); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return c.(*net.TCPConn).CloseWrite()
		}
		if err != nil {
			return fmt.Errorf("at %d: read: %w", up.at, err)
		}
	}
}

// duplex sends until the end of the test, and reads what comes.
func (f *far) duplex(c net.Conn, up, down *stream, buf []byte) error {
	read := make(chan error, 1)
	go func() { read <- up.drain(c, make([]byte, 16<<10)) }()
	err := pace(f.end, func(n int) error { return down.send(c, buf, n) })
	return errors.Join(err, c.(*net.TCPConn).CloseWrite(), <-read)
}

// pace calls send until end is closed, with amounts of all sizes.
func pace(end <-chan struct{}, send func(n int) error) error {
	tick := time.NewTicker(pacing)
	defer tick.Stop()
	for n := 1; ; n = n*5%60_013 + 1 {
		if err := send(n); err != nil {
			return err
		}
		select {
		case <-end:
			return nil
		case <-tick.C:
		}
	}
}

// pacing is how often a connection that sends by itself does.
const pacing = 150 * time.Millisecond
