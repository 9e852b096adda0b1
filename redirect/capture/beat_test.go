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
	listener int
	kicks    int
	fail     error
	noIPv6   bool
	noRelay  bool
	relayed  chan struct{}
	maxAge   time.Duration // of the last beat
}

type beat struct{ alive, busy bool }

func (k *kernel) Beat(alive, busy bool, maxAge int64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.maxAge = time.Duration(maxAge)
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

func (k *kernel) Usable(v6 bool) bool { return !v6 || !k.noIPv6 }

func (k *kernel) Relays() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return !k.noRelay
}

func (k *kernel) Relayed() <-chan struct{} { return k.relayed }

func (k *kernel) SetCanaryListener(_ bool, fd int) error { k.listener = fd; return nil }

func (k *kernel) Kick() { k.kicks++ }

// life is a handler's.
type life struct {
	fill     float64
	still    bool
	accepted uint64 // of IPv4
}

func (l *life) Backlog() float64 { return l.fill }

func (l *life) Moved() bool { return !l.still }

func (l *life) Accepted() (v4, v6 uint64) { return l.accepted, 0 }

// newBeat returns a heartbeat whose canaries fly to loopback. Where the kernel's
// programs would lead them to the canary's listener, they dial it.
func newBeat(t *testing.T, k *kernel, h Handler, slots ...netip.Addr) *Beat {
	t.Helper()
	k.admitted = map[netip.AddrPort]bool{}
	b, err := New(k, h, slots, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	for _, c := range b.probes {
		at, err := ownAddr(c.listener)
		if err != nil {
			t.Fatal(err)
		}
		c.slot = at
	}
	return b
}

var (
	loopback4 = netip.MustParseAddr("127.0.0.1")
	loopback6 = netip.IPv6Loopback()
)

func TestBeat(t *testing.T) {
	none := netip.Addr{}
	tests := map[string]struct {
		slots []netip.Addr
		life  life
		want  []beat
	}{
		"in order":         {slots: []netip.Addr{loopback4, loopback6}, want: []beat{{alive: true}}},
		"one family":       {slots: []netip.Addr{loopback4, none}, want: []beat{{alive: true}}},
		"no family":        {slots: []netip.Addr{none, none}, want: []beat{{alive: true}}},
		"queue is full":    {slots: []netip.Addr{loopback4}, life: life{fill: 0.9}, want: []beat{{alive: true, busy: true}}},
		"queue is not":     {slots: []netip.Addr{loopback4}, life: life{fill: 0.5}, want: []beat{{alive: true}}},
		"workers are busy": {slots: []netip.Addr{loopback4}, life: life{still: true}, want: []beat{{alive: true}}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			k := &kernel{}
			b := newBeat(t, k, &tt.life, tt.slots...)
			once(t, b)
			if !slices.Equal(k.beats, tt.want) || !b.Alive() || k.kicks != 0 {
				t.Errorf("beats %v, want %v; alive %v, %d kicks", k.beats, tt.want, b.Alive(), k.kicks)
			}
			if len(k.admitted) != 0 {
				t.Errorf("canaries %v are still let in", k.admitted)
			}
		})
	}
}

func once(t *testing.T, b *Beat) {
	t.Helper()
	if err := b.Once(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// wantDead fails unless b finds something wrong, and says nothing of life.
func wantDead(t *testing.T, k *kernel, b *Beat) {
	t.Helper()
	once(t, b)
	if len(k.beats) != 0 || b.Alive() || k.kicks == 0 {
		t.Errorf("beats %v, alive %v, %d kicks of a handler that cannot be reached", k.beats, b.Alive(), k.kicks)
	}
	if len(k.admitted) != 0 {
		t.Errorf("canaries %v are still let in", k.admitted)
	}
}

// TestRefused: nobody answers at the slot, in one of two families.
func TestRefused(t *testing.T) {
	k := &kernel{}
	b := newBeat(t, k, &life{}, loopback4, loopback6)
	ln, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	b.probes[1].slot = ln.Addr().(*net.TCPAddr).AddrPort()
	wantDead(t, k, b)
}

// TestFamilyIsGone: what is switched off is not tested, and the other family goes
// on.
func TestFamilyIsGone(t *testing.T) {
	k := &kernel{noIPv6: true}
	b := newBeat(t, k, &life{}, loopback4, loopback6)
	b.probes[1].slot = netip.MustParseAddrPort("[2001:db8::1]:9")
	for range 3 {
		once(t, b)
	}
	if len(k.beats) != 3 || !b.Alive() {
		t.Errorf("beats %v, alive %v", k.beats, b.Alive())
	}
}

// TestNotForUs: somebody answers, and it is not the canary's listener.
func TestNotForUs(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	k := &kernel{}
	b := newBeat(t, k, &life{}, loopback4)
	b.probes[0].slot = ln.Addr().(*net.TCPAddr).AddrPort()
	wantDead(t, k, b)
}

// TestLateBird: a canary of an earlier flight is not taken for the present one.
func TestLateBird(t *testing.T) {
	k := &kernel{}
	b := newBeat(t, k, &life{}, loopback4)
	late, err := net.Dial("tcp4", b.probes[0].slot.String())
	if err != nil {
		t.Fatal(err)
	}
	defer late.Close()
	once(t, b)
	if !b.Alive() {
		t.Error("a stranger in the queue made it fail")
	}
	b.probes[0].close()
	b.probes = nil
}

// TestConnectionsProveTheWay: where connections come in no canary flies, and
// where they stop coming it does.
func TestConnectionsProveTheWay(t *testing.T) {
	k, h := &kernel{}, &life{}
	b := newBeat(t, k, h, loopback4)
	once(t, b) // the first proof is a canary's, whatever came in
	flown := k.exempt
	h.accepted = 7
	once(t, b)
	if k.exempt != flown || len(k.beats) != 2 {
		t.Errorf("%d sockets, had %d, %d beats: a canary flew beside connections", k.exempt, flown, len(k.beats))
	}
	once(t, b)
	if k.exempt == flown || len(k.beats) != 3 {
		t.Errorf("%d sockets, %d beats: no canary flew where nothing came in", k.exempt, len(k.beats))
	}
}

// TestOldConnectionsProveNothing: what came in before the last beat is no proof for
// the family whose turn it is now.
func TestOldConnectionsProveNothing(t *testing.T) {
	k, h := &kernel{}, &life{}
	b := newBeat(t, k, h, loopback4, loopback6)
	once(t, b) // not alive yet: both fly
	h.accepted = 7
	once(t, b) // IPv4's turn: it needs no canary
	once(t, b) // IPv6's
	h.accepted = 9
	b.next = 1
	once(t, b) // IPv6's again, while IPv4 comes in
	flown := k.exempt
	once(t, b)
	if k.exempt == flown {
		t.Error("no canary of IPv4 flew, for what came in two beats ago")
	}
}

// TestNobodyRelays: where no connection goes to slots none is tested, and when one
// may go there both families are, before the beat after the one that is due at once.
func TestNobodyRelays(t *testing.T) {
	k := &kernel{noRelay: true}
	b := newBeat(t, k, &life{}, loopback4, loopback6)
	listeners := k.exempt
	once(t, b)
	once(t, b)
	if k.exempt != listeners || len(k.beats) != 2 || !b.Alive() {
		t.Errorf("%d sockets beside the listeners, beats %v, alive %v", k.exempt-listeners, k.beats, b.Alive())
	}
	ln, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	way := b.probes[1].slot
	b.probes[1].slot = ln.Addr().(*net.TCPAddr).AddrPort()
	k.noRelay = false
	once(t, b)
	if len(k.beats) != 3 || b.Alive() {
		t.Errorf("beats %v, alive %v: IPv6 was not tested", k.beats, b.Alive())
	}
	b.probes[1].slot = way
	once(t, b)
	if len(k.beats) != 4 || !b.Alive() {
		t.Errorf("beats %v, alive %v", k.beats, b.Alive())
	}
	flown := k.exempt
	once(t, b)
	if k.exempt != flown+1 {
		t.Errorf("%d sockets of one canary: both flew where the way is proved", k.exempt-flown)
	}
}

// TestExempt: what the canary opens is the handler's own.
func TestExempt(t *testing.T) {
	k := &kernel{}
	b := newBeat(t, k, &life{}, loopback4)
	if k.exempt != 1 || k.listener != b.probes[0].listener {
		t.Errorf("%d sockets exempt, want the listener; it is %d, handed over %d", k.exempt, b.probes[0].listener, k.listener)
	}
	once(t, b)
	if k.exempt != 3 {
		t.Errorf("%d sockets exempt, want the listener, the canary and what finds its way", k.exempt)
	}
}

func TestStuck(t *testing.T) {
	k, h := &kernel{}, &life{still: true}
	b := newBeat(t, k, h)
	for range stuckAfter {
		once(t, b)
	}
	if len(k.beats) != stuckAfter-1 || b.Alive() {
		t.Errorf("%d beats of a worker that does not move, alive %v", len(k.beats), b.Alive())
	}
	h.still = false
	if once(t, b); !b.Alive() {
		t.Error("not alive after it moved again")
	}
}

// TestHysteresis: a queue that stays filled above one mark, or is so above a higher one,
// makes the handler busy, and idle again at a lower one.
func TestHysteresis(t *testing.T) {
	k, h := &kernel{}, &life{}
	b := newBeat(t, k, h)
	for _, step := range []struct {
		fill float64
		busy bool
	}{
		{0.4, false}, {0.6, false}, {0.4, false}, {0.6, false}, {0.6, true}, {0.4, true}, {0.3, true}, {0.2, false},
		{0.8, true}, {0.6, true}, {0.2, false}, {0.6, false}, {0.2, false},
	} {
		h.fill = step.fill
		once(t, b)
		if got := k.beats[len(k.beats)-1].busy; got != step.busy {
			t.Errorf("busy %v at %v", got, step.fill)
		}
	}
}

// TestSourceChanges: an address that is gone is not dialed from for ever.
func TestSourceChanges(t *testing.T) {
	k := &kernel{}
	b := newBeat(t, k, &life{}, loopback4)
	b.probes[0].source = netip.MustParseAddr("192.0.2.99") // not ours
	if once(t, b); !b.Alive() {
		t.Error("not alive")
	}
	if got := b.probes[0].source; got != netip.MustParseAddr("127.0.0.1") {
		t.Errorf("source %v", got)
	}
}

// TestRun beats until it is told to stop, and says so.
func TestRun(t *testing.T) {
	k := &kernel{}
	b := newBeat(t, k, &life{}, loopback4)
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

// TestRest: where no connection goes to slots beats are rarer and hold for longer, each
// at least until the next, and when one may go there the next comes at once.
func TestRest(t *testing.T) {
	k := &kernel{noRelay: true, relayed: make(chan struct{})}
	b := newBeat(t, k, &life{}, loopback4)
	once(t, b)
	rest := b.interval()
	if k.maxAge < rest+rest/2 {
		t.Errorf("the next beat comes after %v, this one holds for %v", rest, k.maxAge)
	}
	k.noRelay = false
	// The way is not tested yet when somebody goes it: what said so before holds no longer
	// than it may.
	way := b.probes[0].slot
	b.probes[0].slot = netip.MustParseAddrPort("127.0.0.1:1")
	if next := b.interval(); next >= rest {
		t.Errorf("then the one after the next comes after %v", next)
	}
	once(t, b)
	if b.Alive() || len(k.beats) != 2 || k.maxAge != relayMaxAge {
		t.Errorf("the way is broken: alive %v, beats %v, the last holds for %v", b.Alive(), k.beats, k.maxAge)
	}
	b.probes[0].slot = way
	once(t, b)
	if next := b.interval(); k.maxAge < next+next/2 || k.maxAge != relayMaxAge {
		t.Errorf("the next beat comes after %v, this one holds for %v", next, k.maxAge)
	}

	// Which is due long after the test, and is not waited for.
	k.noRelay = true
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	for range 100 {
		k.relayed <- struct{}{}
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if n := len(k.beats); n < 103 {
		t.Errorf("%d beats of 100 that were asked for", n-3)
	}
}

// TestRunCannotPublish: the end must reach the kernel, so a failure is told.
func TestRunCannotPublish(t *testing.T) {
	k := &kernel{fail: unix.EBADF}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := newBeat(t, k, &life{}).Run(ctx); !errors.Is(err, unix.EBADF) {
		t.Errorf("error %v", err)
	}
}

// Frozen, a heartbeat publishes one sign of life and no more; thawed, it goes on; left
// to another process, it does not say that it has ended either.
func TestFreeze(t *testing.T) {
	k := &kernel{}
	b := &Beat{kernel: k, alive: true, log: slog.New(slog.DiscardHandler)}
	publish := func() {
		if err := b.inTurn(func() error { return k.Beat(true, false, 1) }); err != nil {
			t.Error(err)
		}
	}
	for _, left := range []bool{false, true} {
		end, err := b.Freeze(time.Second)
		if err != nil {
			t.Fatal(err)
		}
		before := len(k.beats)
		done := make(chan struct{})
		go func() {
			defer close(done)
			publish()
		}()
		select {
		case <-done:
			t.Fatal("it beats although it is frozen")
		case <-time.After(20 * time.Millisecond):
		}
		end(left)
		<-done
		if beats := len(k.beats) - before; beats == 0 != left {
			t.Errorf("left %v: %d beats", left, beats)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	before := len(k.beats)
	if err := b.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if len(k.beats) != before {
		t.Error("it says that it has ended, and another process beats")
	}
}
