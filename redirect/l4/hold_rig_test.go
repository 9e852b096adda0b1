package l4_test

import (
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
	"golang.org/x/sys/unix"
)

// queue stands for the kernel side and the applications whose handshakes it
// holds: an application is a bound socket, which connects to the relay's listener
// when the relay finishes its handshake.
type queue struct {
	t    testing.TB
	bell int // an eventfd

	mu   sync.Mutex
	news []flow.Held
	apps map[netip.AddrPort]*app
	deaf int // how many refusals the kernel misses
}

// app is an application that connects.
type app struct {
	q        *queue
	fd       int
	held     flow.Held
	released chan struct{}
	refused  chan syscall.Errno
	forgot   chan struct{}
	finished int
	gone     bool
}

func newQueue(t testing.TB) *queue {
	t.Helper()
	bell, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(bell) })
	return &queue{t: t, bell: bell, apps: map[netip.AddrPort]*app{}}
}

// connect is an application's connect(2): its handshake is held.
func (q *queue) connect(slot netip.AddrPort) *app {
	q.t.Helper()
	fd, err := unix.Socket(familyOf(slot.Addr()), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		q.t.Fatal(err)
	}
	if err := unix.Bind(fd, sockaddrOf(netip.AddrPortFrom(slot.Addr(), 0))); err != nil {
		q.t.Fatal(err)
	}
	source := localAddr(q.t, fd)
	a := &app{
		q: q, fd: fd, held: flow.Held{Source: source, Slot: slot},
		released: make(chan struct{}, 1000), refused: make(chan syscall.Errno, 1000), forgot: make(chan struct{}, 1000),
	}
	q.mu.Lock()
	q.apps[source] = a
	q.mu.Unlock()
	q.t.Cleanup(a.close)
	q.tell(a.held)
	return a
}

func (q *queue) tell(h flow.Held) {
	q.mu.Lock()
	q.news = append(q.news, h)
	q.mu.Unlock()
	if _, err := unix.Write(q.bell, []byte{7: 1}); err != nil {
		q.t.Error(err)
	}
}

// again is the application's next SYN.
func (a *app) again() { a.q.tell(a.held) }

// giveUp is the end of the application's socket.
func (a *app) giveUp() {
	a.q.mu.Lock()
	a.gone = true
	a.q.mu.Unlock()
}

// conn is the application's side of a connection that came about.
func (a *app) conn() *net.TCPConn {
	a.q.t.Helper()
	receive(a.q.t, a.released)
	return a.file()
}

// close ends a socket that nobody made a connection of.
func (a *app) close() {
	if a.fd >= 0 {
		unix.Close(a.fd)
	}
}

func (a *app) file() *net.TCPConn {
	a.q.t.Helper()
	c := connOf(a.q.t, a.fd)
	a.fd = -1
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		a.q.t.Fatal(err)
	}
	return c
}

// FD implements l4.Queue.
func (q *queue) FD() int { return q.bell }

// Next implements l4.Queue.
func (q *queue) Next(h *flow.Held) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	var counter [8]byte
	_, _ = unix.Read(q.bell, counter[:])
	if len(q.news) == 0 {
		return false
	}
	*h = q.news[0]
	q.news = q.news[1:]
	return true
}

func (q *queue) app(h *flow.Held) *app {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.apps[h.Source]
}

// Finish implements l4.Queue.
func (q *queue) Finish(h *flow.Held) error {
	a := q.app(h)
	q.mu.Lock()
	a.finished++
	first := a.finished == 1
	q.mu.Unlock()
	if !first {
		return nil
	}
	return unix.Connect(a.fd, sockaddrOf(h.Slot))
}

// Release implements l4.Queue.
func (q *queue) Release(h *flow.Held) error {
	q.app(h).released <- struct{}{}
	return nil
}

// Refuse implements l4.Queue.
func (q *queue) Refuse(h *flow.Held, e syscall.Errno) error {
	a := q.app(h)
	q.mu.Lock()
	defer q.mu.Unlock()
	a.refused <- e
	if q.deaf--; q.deaf < 0 {
		a.gone = true
	}
	return nil
}

// Waits implements l4.Queue.
func (q *queue) Waits(h *flow.Held, _ uint64) bool {
	a := q.app(h)
	q.mu.Lock()
	defer q.mu.Unlock()
	return !a.gone
}

// Forget implements l4.Queue.
func (q *queue) Forget(h *flow.Held) error {
	q.app(h).forgot <- struct{}{}
	return nil
}

// newHeldRig is a rig of one worker with a queue.
func newHeldRig(t *testing.T, s setup) (*rig, *queue) {
	t.Helper()
	q := newQueue(t)
	options := s.options
	s.options = func(o *l4.Options) {
		o.Queues = []l4.Queue{q}
		if options != nil {
			options(o)
		}
	}
	return newRig(t, s), q
}

// wantRefusal wants the connection's end on the application's side.
func (a *app) wantRefusal(want syscall.Errno) {
	a.q.t.Helper()
	if got := receive(a.q.t, a.refused); got != want {
		a.q.t.Errorf("refused with %v, want %v", got, want)
	}
	receive(a.q.t, a.forgot)
}

func wantEnd(t testing.TB, rec flow.Record, want flow.Reason) {
	t.Helper()
	if rec.End != want || !rec.Mirrored {
		t.Errorf("ended with %s (mirrored %v), want %s: %+v", rec.End, rec.Mirrored, want, rec)
	}
}

// acceptOne takes a connection of a listener, and closes it.
func acceptOne(t testing.TB, listener int) {
	t.Helper()
	fd, _, err := unix.Accept(listener)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
}

// connOf makes a connection of a descriptor, which it takes over.
func connOf(t testing.TB, fd int) *net.TCPConn {
	t.Helper()
	f := os.NewFile(uintptr(fd), "application")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}
