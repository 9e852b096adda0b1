package capture

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/tests/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// kernel keeps what it is told.
type kernel struct {
	mu       sync.Mutex
	beats    []beat
	admitted map[netip.AddrPort]bool
	exempt   int
	kicks    int
	fail     error
}

type beat struct{ alive, busy bool }

func (k *kernel) Beat(alive, busy bool, _ int64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.beats = append(k.beats, beat{alive, busy})
	return k.fail
}

func (k *kernel) AdmitCanary(source, _ netip.AddrPort) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.admitted[source] = true
	return nil
}

func (k *kernel) ForgetCanary(source, _ netip.AddrPort) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.admitted, source)
	return nil
}

func (k *kernel) Exempt(int) error { k.exempt++; return nil }

func (k *kernel) Kick() { k.kicks++ }

// life is a handler's.
type life struct {
	fill  float64
	still bool
}

func (l *life) Backlog() float64 { return l.fill }

func (l *life) Moved() bool { return !l.still }

// answer listens on loopback, where do treats each connection.
func answer(t *testing.T, do func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	served.Go(func() {
		for {
			c, err := ln.AcceptTCP()
			if err != nil {
				return
			}
			do(c)
			c.Close()
		}
	})
	t.Cleanup(func() { ln.Close(); served.Wait() })
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// reset is what the handler does with a canary.
func reset(c *net.TCPConn) { _ = c.SetLinger(0) }

func newBeat(k *kernel, h Handler, slots ...netip.AddrPort) *Beat {
	k.admitted = map[netip.AddrPort]bool{}
	b := New(k, h, nil, slog.New(slog.DiscardHandler))
	for _, s := range slots {
		b.probes = append(b.probes, &canary{kernel: k, slot: s})
	}
	return b
}

func TestBeat(t *testing.T) {
	closed := answer(t, reset)
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused := ln.Addr().(*net.TCPAddr).AddrPort()
	ln.Close()
	tests := map[string]struct {
		slots []netip.AddrPort
		life  life
		want  []beat
	}{
		"in order":         {slots: []netip.AddrPort{closed}, want: []beat{{alive: true}}},
		"no family":        {want: []beat{{alive: true}}},
		"refused":          {slots: []netip.AddrPort{refused}},
		"one family":       {slots: []netip.AddrPort{closed, refused}},
		"somebody else":    {slots: []netip.AddrPort{answer(t, func(c *net.TCPConn) { _, _ = c.Write([]byte("hello")) })}},
		"end of file":      {slots: []netip.AddrPort{answer(t, func(*net.TCPConn) {})}},
		"queue is full":    {slots: []netip.AddrPort{closed}, life: life{fill: 0.9}, want: []beat{{alive: true, busy: true}}},
		"queue is not":     {slots: []netip.AddrPort{closed}, life: life{fill: 0.5}, want: []beat{{alive: true}}},
		"workers are busy": {slots: []netip.AddrPort{closed}, life: life{still: true}, want: []beat{{alive: true}}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			k := &kernel{}
			b := newBeat(k, &tt.life, tt.slots...)
			if err := b.Once(t.Context()); err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(k.beats, tt.want) {
				t.Errorf("beats %v, want %v", k.beats, tt.want)
			}
			alive := tt.want != nil
			if b.Alive() != alive || (k.kicks > 0) == alive {
				t.Errorf("alive %v, %d kicks, want alive %v", b.Alive(), k.kicks, alive)
			}
			if len(k.admitted) != 0 {
				t.Errorf("canaries %v are still let in", k.admitted)
			}
			if len(tt.slots) > 0 && k.exempt == 0 {
				t.Error("the canary's socket is not exempt")
			}
		})
	}
}

// TestNoAnswer: a listener that accepts and is silent is a handler that hangs.
func TestNoAnswer(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	k := &kernel{}
	b := newBeat(k, &life{}, ln.Addr().(*net.TCPAddr).AddrPort())
	if err := b.Once(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(k.beats) != 0 || b.Alive() {
		t.Errorf("beats %v of a handler that hangs", k.beats)
	}
}

func TestStuck(t *testing.T) {
	k, h := &kernel{}, &life{still: true}
	b := newBeat(k, h)
	for range stuckAfter {
		if err := b.Once(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if len(k.beats) != stuckAfter-1 || b.Alive() {
		t.Errorf("%d beats of a worker that does not move, alive %v", len(k.beats), b.Alive())
	}
	h.still = false
	if err := b.Once(t.Context()); err != nil || !b.Alive() {
		t.Errorf("alive %v after it moved again, %v", b.Alive(), err)
	}
}

// TestHysteresis: a queue that is filling up makes the handler busy at one mark
// and idle again at a lower one.
func TestHysteresis(t *testing.T) {
	k, h := &kernel{}, &life{}
	b := newBeat(k, h)
	for _, step := range []struct {
		fill float64
		busy bool
	}{{0.4, false}, {0.6, true}, {0.4, true}, {0.3, true}, {0.2, false}, {0.4, false}} {
		h.fill = step.fill
		if err := b.Once(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := k.beats[len(k.beats)-1].busy; got != step.busy {
			t.Errorf("busy %v at %v", got, step.fill)
		}
	}
}

// TestSourceChanges: an address that is gone is not dialed from for ever.
func TestSourceChanges(t *testing.T) {
	k := &kernel{}
	b := newBeat(k, &life{}, answer(t, reset))
	b.probes[0].source = netip.MustParseAddr("192.0.2.99") // not ours
	if err := b.Once(t.Context()); err != nil || !b.Alive() {
		t.Errorf("alive %v, %v", b.Alive(), err)
	}
	if got := b.probes[0].source; got != netip.MustParseAddr("127.0.0.1") {
		t.Errorf("source %v", got)
	}
}

// TestRun beats until it is told to stop, and says so.
func TestRun(t *testing.T) {
	k := &kernel{}
	b := newBeat(k, &life{}, answer(t, reset))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	testutil.Eventually(t, 10*time.Second, func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		return len(k.beats) >= 3
	}, "three beats")
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if last := k.beats[len(k.beats)-1]; last.alive {
		t.Error("the last beat says alive")
	}
}

// TestRunCannotPublish: the end must reach the kernel, so a failure is told.
func TestRunCannotPublish(t *testing.T) {
	k := &kernel{fail: unix.EBADF}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := newBeat(k, &life{}).Run(ctx); !errors.Is(err, unix.EBADF) {
		t.Errorf("error %v", err)
	}
}
