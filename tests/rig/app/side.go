package app

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

const (
	// lifetime bounds what is to end by itself: what hangs is an error.
	lifetime = time.Minute
	// stuffing is what a connection whose reader does not read is to hold: more than
	// all buffers on the way.
	stuffing = 12 << 20
	// pacing is how often a side that sends by itself does, and pace the most bytes.
	pacing, pace = 150 * time.Millisecond, 60_000
)

// side is one side of a connection.
type side struct {
	*net.TCPConn
	head
	out, in stream
	// right counts the bytes that were received and are right, of all connections.
	right *atomic.Int64
	buf   []byte
}

func appSide(c net.Conn, h head, right *atomic.Int64) *side {
	s := &side{TCPConn: c.(*net.TCPConn), head: h, right: right, buf: make([]byte, 16<<10)}
	s.out, s.in = h.streams()
	if h.Kind == Marked {
		// An error would be seen: the bytes would not be in the stream.
		_ = s.control(func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
	}
	return s
}

func farSide(c net.Conn, h head, right *atomic.Int64) *side {
	s := appSide(c, h, right)
	s.out, s.in = s.in, s.out
	return s
}

// send writes n bytes.
func (s *side) send(n int) error {
	for n > 0 {
		piece := s.buf[:min(n, len(s.buf))]
		s.out.fill(piece)
		if err := s.put(piece); err != nil {
			return fmt.Errorf("at %d: write: %w", s.out.at, err)
		}
		n -= len(piece)
	}
	return nil
}

// put writes b, and may mark the byte in its middle as an urgent one.
func (s *side) put(b []byte) error {
	if s.Kind != Marked {
		_, err := s.Write(b)
		return err
	}
	mid := len(b) / 2
	if mid > 0 {
		if _, err := s.Write(b[:mid]); err != nil {
			return err
		}
	}
	// There is room: the other side has answered.
	if err := s.oob(b[mid : mid+1]); err != nil || mid+1 == len(b) {
		return err
	}
	_, err := s.Write(b[mid+1:])
	return err
}

// take reads once, checks it, and returns how much it was.
func (s *side) take(b []byte) (int, error) {
	from := io.Reader(s)
	if s.Kind == Urgent || s.Kind == Marked {
		from = testutil.PastMarks(s.TCPConn)
	}
	n, err := from.Read(b)
	if e := s.in.check(b[:n]); e != nil {
		return n, e
	}
	s.right.Add(int64(n))
	if err != nil {
		return n, fmt.Errorf("at %d: read: %w", s.in.at, err)
	}
	return n, nil
}

// receive reads n bytes.
func (s *side) receive(n int) error {
	for n > 0 {
		m, err := s.take(s.buf[:min(n, len(s.buf))])
		if err != nil {
			return err
		}
		n -= m
	}
	return nil
}

// drain reads to the end of file.
func (s *side) drain(b []byte) error {
	for {
		if _, err := s.take(b); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// drains is drain beside whatever else is done.
func (s *side) drains() <-chan error {
	read := make(chan error, 1)
	go func() { read <- s.drain(make([]byte, 16<<10)) }()
	return read
}

// finish ends this side, and waits for the other's end.
func (s *side) finish() error { return errors.Join(s.CloseWrite(), s.drain(s.buf)) }

// exchange sends n bytes and receives as many.
func (s *side) exchange(n int) error {
	if err := s.send(n); err != nil {
		return err
	}
	return s.receive(n)
}

// answer sends as many bytes as come, until the other side ends.
func (s *side) answer() error {
	b := make([]byte, len(s.buf))
	for {
		n, err := s.take(b)
		if n > 0 {
			if err := s.send(n); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return s.CloseWrite()
		}
		if err != nil {
			return err
		}
	}
}

// answerWhole answers each message of [load.talk] when it is there as a whole, so that no
// urgent byte is overtaken by the next one. The head says how long they are at most.
func (s *side) answerWhole() error {
	for n := 0; ; n++ {
		size, at := s.amount(n, int(s.head.Up)), s.in.at
		err := s.receive(size)
		if errors.Is(err, io.EOF) && s.in.at == at {
			return s.CloseWrite()
		}
		if err == nil {
			err = s.send(size)
		}
		if err != nil {
			return fmt.Errorf("message %d: %w", n, err)
		}
	}
}

// amount is the nth of the amounts of a connection, of all sizes up to most.
func (s *side) amount(n, most int) int { return int(word(^uint64(s.ID), uint64(n))%uint64(most)) + 1 }

// pour sends amounts of all sizes, every so often, until end is closed.
func (s *side) pour(end <-chan struct{}, every time.Duration, most int) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for n := 0; ; n++ {
		if err := s.send(s.amount(n, most)); err != nil {
			return err
		}
		select {
		case <-end:
			return nil
		case <-tick.C:
		}
	}
}

// duplex sends until end is closed, and reads what comes meanwhile.
func (s *side) duplex(end <-chan struct{}, every time.Duration, most int) error {
	read := s.drains()
	err := s.pour(end, every, most)
	return errors.Join(err, s.CloseWrite(), <-read)
}

// urgent sends a byte that is not part of the stream.
func (s *side) urgent() error {
	if err := s.oob([]byte{'!'}); err != nil {
		return fmt.Errorf("send urgent byte: %w", err)
	}
	return nil
}

// oob sends b as urgent data.
func (s *side) oob(b []byte) error {
	return s.control(func(fd int) error { return unix.Sendto(fd, b, unix.MSG_OOB|unix.MSG_NOSIGNAL, nil) })
}

func (s *side) control(f func(fd int) error) error {
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	control := raw.Control(func(fd uintptr) { err = f(int(fd)) })
	return errors.Join(control, err)
}

// bounded does one side of a connection that ends by itself: mine is how much this side
// sends, theirs the other, waits that it does so after the other, resets that it is the
// one who resets.
func (s *side) bounded(mine, theirs uint32, waits, resets bool) error {
	s.SetDeadline(time.Now().Add(lifetime))
	if resets {
		mine /= 2
	}
	var readErr error
	read := make(chan struct{})
	go func() { readErr = s.sip(); close(read) }()
	if waits {
		<-read
	}
	writeErr := s.dribble(uint64(mine))
	if resets {
		s.SetLinger(0)
		s.Close()
		<-read
		return nil
	}
	if writeErr == nil {
		writeErr = s.CloseWrite()
	}
	<-read
	what := ""
	switch isReset := s.Kind == AppResets || s.Kind == FarResets; {
	case isReset && (wasReset(readErr) || readErr == nil && wasReset(writeErr)):
	case isReset:
		what = "a reset was not passed on: "
		fallthrough
	case readErr != nil || writeErr != nil || s.in.at != uint64(theirs):
		return fmt.Errorf("%sread %d of %d: %v, write: %v", what, s.in.at, theirs, readErr, writeErr)
	}
	return nil
}

func wasReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// dribble writes n bytes in pieces of all sizes.
func (s *side) dribble(n uint64) error {
	r := rand.New(rand.NewPCG(uint64(s.ID), s.out.key))
	slow := s.ID%4 == 0
	buf := make([]byte, 64<<10)
	for s.out.at < n {
		m := 1 + r.Uint64N(uint64(len(buf)))
		if r.IntN(3) == 0 {
			m = 1 + r.Uint64N(200)
		}
		piece := buf[:min(m, n-s.out.at)]
		s.out.fill(piece)
		if _, err := s.Write(piece); err != nil {
			return err
		}
		if slow || r.IntN(2) == 0 {
			time.Sleep(time.Duration(r.IntN(8000)) * time.Microsecond)
		}
	}
	return nil
}

// sip reads to the end of file; some do so slowly.
func (s *side) sip() error {
	buf := make([]byte, 64<<10)
	for {
		if _, err := s.take(buf); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if s.ID%5 == 0 {
			time.Sleep(time.Millisecond)
		}
	}
}
