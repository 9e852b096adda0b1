package app

import (
	"fmt"
	"io"
	"maps"
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

// Server is the far side of all connections. It checks what it receives.
type Server struct {
	name  string
	end   chan struct{} // closed when those that do not end by themselves are to
	ended sync.Once
	right atomic.Int64

	mu   sync.Mutex // guards what follows
	seen map[uint32]Bytes
	errs []string
}

// Bytes are those of one connection, without its head and the server's name.
type Bytes struct{ Up, Down uint64 }

// NewServer returns a server that says its name in a line to whoever connects, before
// it has heard anything; or nothing, if it has none.
func NewServer(name string) *Server {
	return &Server{name: name, end: make(chan struct{}), seen: map[uint32]Bytes{}}
}

// Finish has the server read what it was not to read, and end what it was to send.
func (s *Server) Finish() { s.ended.Do(func() { close(s.end) }) }

// Right returns how many bytes came that were right.
func (s *Server) Right() int64 { return s.right.Load() }

// Seen returns the bytes of the connections that have ended, by number.
func (s *Server) Seen() map[uint32]Bytes {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.seen)
}

// Check fails the test for what has gone wrong since it was called before.
func (s *Server) Check(t testing.TB) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, text := range s.errs {
		t.Errorf("server: %s", text)
	}
	s.errs = nil
}

// Serve is the server's side of a connection.
func (s *Server) Serve(c net.Conn) {
	if s.name != "" {
		if _, err := io.WriteString(c, s.name+"\n"); err != nil {
			return
		}
	}
	h, n, err := readHead(c)
	if n == 0 {
		return // nothing was to come; or it is nobody's: a health check
	}
	if err != nil {
		s.ends(h, Bytes{}, fmt.Errorf("%d bytes of its head: %w", n, err))
		return
	}
	far := farSide(c, h, &s.right)
	err = s.play(far)
	s.ends(h, Bytes{Up: far.in.at, Down: far.out.at}, err)
}

func (s *Server) ends(h head, b Bytes, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen[h.ID] = b
	if err != nil {
		s.errs = add(s.errs, fmt.Sprintf("connection %d (%c): %v", h.ID, h.Kind, err))
	}
}

func (s *Server) play(far *side) error {
	switch far.Kind {
	case Echo, Urgent, Stream, Idle, Once:
		return far.answer()
	case Marked:
		return far.answerWhole()
	case Duplex, Half:
		return far.duplex(s.end, pacing, pace)
	case FarHalf:
		return far.finish()
	case Blocked:
		if err := far.send(stuffing); err != nil {
			return err
		}
		return far.finish()
	case Stuffed:
		<-s.end
		if err := far.drain(far.buf); err != nil {
			return err
		}
		return far.CloseWrite()
	case Both, AppFirst, FarFirst, AppResets, FarResets:
		return far.bounded(far.head.Down, far.head.Up, far.Kind == AppFirst, far.Kind == FarResets)
	case Greet, Empty:
	}
	return fmt.Errorf("there is no such kind, or it has no head")
}

// most is how many texts are kept of what went wrong.
const most = 20

func add(all []string, text string) []string {
	if len(all) < most {
		return append(all, text)
	}
	return all
}
