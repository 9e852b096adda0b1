package app

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
)

// Load is many connections, until [Application.Unload].
type Load struct {
	To []netip.AddrPort
	// Named: the servers say their names first.
	Named bool
	// Stay connections are there from the beginning to the end, of these kinds in
	// turn; they send messages so often, in the mean, of at most so many bytes (0: 4000).
	Stay    int
	Kinds   []Kind
	Every   time.Duration
	Longest int
	// Come workers make one connection after the other, of these kinds at random,
	// with a pause between them. Each side sends at most so many bytes.
	Come   int
	Visits []Kind
	Pause  time.Duration
	Most   uint32
}

// Report is what became of a load.
type Report struct {
	// Opened counts the connections that were, Names those that came, by what the
	// server called itself.
	Opened int
	Names  map[string]int
	// Rounds counts the messages of Echo, Bytes what was received and right.
	Rounds, Bytes int64
	// Slowest is, of each Echo and Stream, the longest time without an answer, since
	// the report before.
	Slowest []time.Duration
	// Stayed are the connections that were open from the beginning to the end, and
	// Came the others whose bytes are known. They are there in the end.
	Stayed, Came []Conn
	// Failed is what went wrong, since the report before, with those that came, and
	// Broken with those that stay.
	Failed, Broken []string
}

// Conn is a connection that has ended.
type Conn struct {
	ID   uint32
	Kind Kind
	Port uint16 // its own
	Bytes
}

// Check fails the test for everything that went wrong.
func (r *Report) Check(t testing.TB) {
	t.Helper()
	for _, text := range r.Failed {
		t.Errorf("application: a new connection failed: %s", text)
	}
	for _, text := range r.Broken {
		t.Errorf("application: an open connection failed: %s", text)
	}
}

// load is one that goes on.
type load struct {
	Load
	patience time.Duration // with a connect
	end      chan struct{} // closed when those that stay are to end
	all      sync.WaitGroup
	conns    sync.Map      // of those that stay
	id       atomic.Uint32 // the last one given
	rounds   atomic.Int64
	right    atomic.Int64
	slow     []*atomic.Int64 // nanoseconds

	mu     sync.Mutex // guards what follows
	report Report
}

// start opens everything and returns when it is open.
func start(want *Load, patience time.Duration) *load {
	l := &load{Load: *want, patience: patience, end: make(chan struct{}), report: Report{Names: map[string]int{}}}
	l.Longest = cmp.Or(l.Longest, 4000)
	var opened sync.WaitGroup
	for n := range l.Stay {
		opened.Add(1)
		slow := new(atomic.Int64)
		h := head{Kind: l.Kinds[n%len(l.Kinds)], ID: l.id.Add(1), Up: uint32(l.Longest)}
		if h.Kind == Echo || h.Kind == Stream {
			l.slow = append(l.slow, slow)
		}
		l.all.Go(func() { l.stay(l.To[n%len(l.To)], h, slow, opened.Done) })
		if n%50 == 49 {
			opened.Wait() // not all at once
		}
	}
	opened.Wait()
	for n := range l.Come {
		l.all.Go(func() { l.come(n) })
	}
	return l
}

// unload ends it.
func (l *load) unload() *Report {
	close(l.end)
	// What does not end now is an error.
	l.conns.Range(func(c, _ any) bool { c.(net.Conn).SetDeadline(time.Now().Add(lifetime)); return true })
	l.all.Wait()
	return l.turn(true)
}

func (l *load) turn(last bool) *Report {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.report
	r.Rounds, r.Bytes = l.rounds.Load(), l.right.Load()
	for _, s := range l.slow {
		r.Slowest = append(r.Slowest, time.Duration(s.Swap(0)))
	}
	if !last {
		r.Stayed, r.Came = nil, nil
	}
	l.report.Failed, l.report.Broken = nil, nil
	return &r
}

// open connects, and hears the server's name if it has one.
func (l *load) open(to netip.AddrPort) (c net.Conn, name string, err error) {
	if c, err = net.DialTimeout("tcp", to.String(), l.patience); err == nil && l.Named {
		name, err = hear(c)
	}
	if err != nil && c != nil {
		c.Close()
	}
	if err != nil {
		return nil, "", err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.report.Opened++
	return c, name, nil
}

// stay is a connection that lasts until the end.
func (l *load) stay(to netip.AddrPort, h head, slow *atomic.Int64, opened func()) {
	c, name, err := l.open(to)
	if err == nil {
		_, err = c.Write(h.bytes())
	}
	if c != nil {
		defer c.Close()
		l.conns.Store(c, nil)
	}
	opened()
	var s *side
	if err == nil {
		s = appSide(c, h, &l.right)
		err = l.lasts(s, slow)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.report.Broken = add(l.report.Broken, fmt.Sprintf("%d (%c) to %s (%s): %v", h.ID, h.Kind, to, name, err))
	}
	if s != nil {
		l.report.Stayed = append(l.report.Stayed, s.conn())
	}
}

// lasts is the application's side of the kinds that last.
func (l *load) lasts(s *side, slow *atomic.Int64) error {
	switch s.Kind {
	case Echo, Urgent, Marked:
		return errors.Join(l.talk(s, slow), s.finish())
	case Stream:
		return l.stream(s, slow)
	case Idle:
		<-l.end
		return errors.Join(s.exchange(100), s.finish())
	case Half:
		return errors.Join(s.send(1000), s.finish())
	case Blocked:
		if err := s.send(10); err != nil {
			return err
		}
		<-l.end
		return s.finish()
	case Stuffed:
		return errors.Join(s.send(stuffing), s.finish())
	case FarHalf:
		if err := s.drain(s.buf); err != nil {
			return err
		}
		return errors.Join(s.pour(l.end, pacing, pace), s.finish())
	case Duplex:
		return s.duplex(l.end, pacing, pace)
	default:
		return errors.New("it does not last")
	}
}

// talk exchanges messages until the end.
func (l *load) talk(s *side, slow *atomic.Int64) error {
	time.Sleep(time.Duration(s.ID%1000) * l.Every / 1000) // not all at once
	for n := 0; ; n++ {
		if s.Kind == Urgent && n%3 == 0 {
			if err := s.urgent(); err != nil {
				return err
			}
		}
		start := time.Now()
		s.SetDeadline(start.Add(rig.Limit))
		if err := s.exchange(s.amount(n, l.Longest)); err != nil {
			return fmt.Errorf("message %d: %w", n, err)
		}
		l.rounds.Add(1)
		raise(slow, time.Since(start))
		select {
		case <-l.end:
			return nil
		case <-time.After(time.Duration(s.amount(n, int(2*l.Every)))):
		}
	}
}

// stream sends messages until the end, and reads the answers meanwhile.
func (l *load) stream(s *side, slow *atomic.Int64) error {
	read := make(chan error, 1)
	go func() { read <- watch(s, slow) }()
	err := errors.Join(s.pour(l.end, l.Every, l.Longest), s.CloseWrite(), <-read)
	if err == nil && s.in.at != s.out.at {
		err = fmt.Errorf("read %d bytes of %d", s.in.at, s.out.at)
	}
	return err
}

// watch reads to the end of file, which never takes long.
func watch(s *side, slow *atomic.Int64) error {
	b := make([]byte, 64<<10)
	for last := time.Now(); ; last = time.Now() {
		s.SetReadDeadline(last.Add(rig.Limit))
		_, err := s.take(b)
		raise(slow, time.Since(last))
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}

func raise(most *atomic.Int64, took time.Duration) {
	if took := int64(took); took > most.Load() {
		most.Store(took)
	}
}

// come makes connections until the end.
func (l *load) come(n int) {
	for ; ; n++ {
		select {
		case <-l.end:
			return
		default:
		}
		h := head{Kind: l.Visits[rand.IntN(len(l.Visits))]}
		if l.Most > 0 {
			h.Up, h.Down = 1+rand.Uint32N(l.Most), 1+rand.Uint32N(l.Most)
			if rand.IntN(3) == 0 {
				h.Up, h.Down = 1+h.Up%500, 1+h.Down%500
			}
		}
		to := l.To[n%len(l.To)]
		if err := l.visit(to, h); err != nil {
			l.mu.Lock()
			l.report.Failed = add(l.report.Failed, fmt.Sprintf("%c to %s: %v", h.Kind, to, err))
			l.mu.Unlock()
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(l.Pause)
	}
}

func (l *load) visit(to netip.AddrPort, h head) error {
	c, name, err := l.open(to)
	if err != nil {
		return err
	}
	defer c.Close()
	if l.Named {
		l.mu.Lock()
		l.report.Names[name]++
		l.mu.Unlock()
	}
	if h.Kind == Greet || h.Kind == Empty {
		return nil
	}
	h.ID = l.id.Add(1)
	if _, err := c.Write(h.bytes()); err != nil {
		return fmt.Errorf("%d: write its head: %w", h.ID, err)
	}
	s := appSide(c, h, &l.right)
	if err := ends(s); err != nil {
		return fmt.Errorf("%d: %w", h.ID, err)
	}
	if h.Kind != AppResets && h.Kind != FarResets {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.report.Came = append(l.report.Came, s.conn())
	}
	return nil
}

// ends is the application's side of the kinds that end by themselves.
func ends(s *side) error {
	switch s.Kind {
	case Once:
		s.SetDeadline(time.Now().Add(lifetime))
		return errors.Join(s.exchange(int(s.head.Up)), s.finish())
	case Both, AppFirst, FarFirst, AppResets, FarResets:
		return s.bounded(s.head.Up, s.head.Down, s.Kind == FarFirst, s.Kind == AppResets)
	default:
		return errors.New("it does not end by itself")
	}
}

// conn is what is reported of a connection.
func (s *side) conn() Conn {
	return Conn{s.ID, s.Kind, uint16(s.LocalAddr().(*net.TCPAddr).Port), Bytes{s.out.at, s.in.at}}
}
