package capture

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-project/pillion/redirect/pace"
)

const (
	// every is the time between two beats, and restEvery that while nobody is sent
	// to slots, and so nobody asks for them.
	every     = 100 * time.Millisecond
	restEvery = 5 * every
	// relayMaxAge is how old a beat may be before the connect hook takes the handler
	// for gone. With the beat that may still come when all is over, proved by what
	// came in before or by the other family, it is all of the half second that
	// noticing may take: on a busy machine beats are late, and a handler that is
	// late is better than none.
	relayMaxAge = 500*time.Millisecond - every
	// restMaxAge is that of a beat that nobody asks for, until the next one comes
	// since somebody will.
	restMaxAge = 2 * restEvery
	// canaryLimit is how long a canary may take.
	canaryLimit = 300 * time.Millisecond
	// busyAtOnce, busyAbove and busyBelow are fills of the accept queue. Above
	// busyAbove it may be a burst, which a queue is for, and so has to be there for
	// two beats in a row: what is left would take 20,000 more connections a second
	// of one worker to fill meanwhile, with a queue of 4096. They are apart, so that
	// a queue around one mark does not make the hook change its mind all the time.
	busyAtOnce = 0.75
	busyAbove  = 0.5
	busyBelow  = 0.25
	// stuckAfter is how many beats in a row a worker may be at the same turn
	// without waiting: a long turn is no hang.
	stuckAfter = 4
)

// Kernel is where beats are published and canaries let in.
type Kernel interface {
	// Beat publishes the sign of life, which holds for maxAge ns.
	Beat(alive, busy bool, maxAge int64) error
	AdmitCanary(source, slot netip.AddrPort) error
	ForgetCanary(source, slot netip.AddrPort) error
	// SetCanaryListener hands over the socket that connections to the canary
	// slot of a family are to come to.
	SetCanaryListener(v6 bool, fd int) error
	// Exempt tags a socket as the handler's own.
	Exempt(fd int) error
	// Usable tells whether a family's slots can be reached at all. Where they
	// cannot, the connect hook knows, and no canary flies.
	Usable(v6 bool) bool
	// Relays tells whether any connection is sent to slots at all. While none is,
	// no canary flies either: most of what an idle process costs would be the test
	// of a way that nobody goes.
	Relays() bool
	// Relayed has something to be received once there are connections sent to
	// slots, and were none before.
	Relayed() <-chan struct{}
	// Kick asks for routes and links to be looked at: something is wrong.
	Kick()
}

// Handler is whose life it is.
type Handler interface {
	// Backlog is the fill of the fullest accept queue, from 0 to 1.
	Backlog() float64
	// Moved tells whether every worker waits or has moved since the last call.
	Moved() bool
	// Accepted returns how many connections of each family came in.
	Accepted() (v4, v6 uint64)
}

// Beat is the heartbeat of one handler.
type Beat struct {
	kernel  Kernel
	handler Handler
	probes  []*canary
	log     *slog.Logger

	next  int  // which probe flies next
	burst bool // the last fill was above busyAbove
	busy  bool
	alive bool
	stuck int // beats since all workers last moved
	// relays says that somebody goes the way that is tested, as of this beat.
	relays bool
	// untested says that no canary flew lately, since nobody went that way.
	untested bool

	hangs atomic.Bool // a worker does; read by anybody

	turn sync.Mutex // held for a beat of Run, and from Freeze on
	left bool       // another process beats
}

// New returns a heartbeat that tests the way to slots, the canary addresses of
// each family; invalid ones are left out. Run closes what it opens; if Run is
// not called, Close must be.
func New(k Kernel, h Handler, slots []netip.Addr, log *slog.Logger) (*Beat, error) {
	b := &Beat{kernel: k, handler: h, log: log}
	for _, s := range slots {
		if !s.IsValid() {
			continue
		}
		c, err := newCanary(k, s)
		if err != nil {
			b.Close()
			return nil, fmt.Errorf("open canary at %s: %w", s, err)
		}
		b.probes = append(b.probes, c)
	}
	return b, nil
}

// Close closes the sockets.
func (b *Beat) Close() {
	for _, c := range b.probes {
		c.close()
	}
	b.probes = nil
}

// Run beats until ctx is done; then it publishes that nobody is there.
func (b *Beat) Run(ctx context.Context) error {
	defer b.Close()
	tick := time.NewTimer(pace.Next(every))
	defer tick.Stop()
	for {
		if err := b.inTurn(func() error { return b.Once(ctx) }); err != nil && ctx.Err() == nil {
			b.log.Error("cannot publish the heartbeat", "error", err)
		}
		select {
		case <-ctx.Done():
			if err := b.inTurn(func() error { return b.kernel.Beat(false, false, 0) }); err != nil {
				return fmt.Errorf("publish the end: %w", err)
			}
			return nil
		case <-tick.C:
		case <-b.kernel.Relayed():
		}
		tick.Reset(pace.Next(b.interval()))
	}
}

// interval is the time until the beat after the next one, which is due now. It asks anew:
// the next one may be the first for somebody.
func (b *Beat) interval() time.Duration {
	if b.kernel.Relays() {
		return every
	}
	return restEvery
}

// publish a sign of life.
func (b *Beat) publish() error {
	maxAge := restMaxAge
	if b.relays {
		maxAge = relayMaxAge
	}
	return b.kernel.Beat(true, b.busy, int64(maxAge))
}

// inTurn publishes something, unless another process does.
func (b *Beat) inTurn(publish func() error) error {
	b.turn.Lock()
	defer b.turn.Unlock()
	if b.left {
		return nil
	}
	return publish()
}

// Freeze publishes a sign of life that holds for so long, and nothing more until the
// returned function is called: never again if that is told that another process beats
// by now.
func (b *Beat) Freeze(lasts time.Duration) (end func(left bool), err error) {
	b.turn.Lock()
	if b.alive {
		err = b.kernel.Beat(true, b.busy, int64(lasts))
	}
	return func(left bool) {
		b.left = left
		b.turn.Unlock()
	}, err
}

// Once looks at everything and publishes what it found.
func (b *Beat) Once(ctx context.Context) error {
	before := b.relays
	b.relays = b.kernel.Relays()
	err := b.workersMove()
	if b.relays && !before && b.alive && b.stuck == 0 {
		// The last one holds for longer than who asks from now on may go by.
		err = b.publish()
	}
	err = errors.Join(err, b.slotsArrive(ctx))
	if ctx.Err() != nil {
		return nil // what was cut short proves nothing
	}
	b.look()
	if alive := err == nil; alive != b.alive {
		b.alive = alive
		if alive {
			b.log.Info("connections are redirected")
		} else {
			b.log.Warn("connections are not redirected: on_failure decides", "error", err)
		}
	}
	if err != nil {
		b.kernel.Kick()
		// The last good beat runs out by itself. Taking it back at once would
		// make one slow canary a failure.
		return nil
	}
	return b.publish()
}

// Alive tells whether the last look found everything in order. It is to be
// called by who calls Once, or after Run.
func (b *Beat) Alive() bool { return b.alive }

// look at the accept queues.
func (b *Beat) look() {
	fill := b.handler.Backlog()
	if b.busy {
		b.busy = fill > busyBelow
	} else {
		b.busy = fill > busyAtOnce || (fill > busyAbove && b.burst)
	}
	b.burst = fill > busyAbove
}

var errStuck = errors.New("a worker of the handler hangs")

// Hangs tells whether a worker of the handler neither waited nor moved when last
// looked at. It may be called by anybody.
func (b *Beat) Hangs() bool { return b.hangs.Load() }

// workersMove fails when a worker neither waits nor moves.
func (b *Beat) workersMove() error {
	if b.handler.Moved() {
		b.stuck = 0
		b.hangs.Store(false)
		return nil
	}
	if b.stuck++; b.stuck >= stuckAfter {
		b.hangs.Store(true)
		return errStuck
	}
	return nil
}

// slotsArrive tests the families in turn. While something is wrong it tests
// all, since what works says nothing of the other. A family whose connections
// come in needs no canary.
func (b *Beat) slotsArrive(ctx context.Context) error {
	v4, v6 := b.handler.Accepted()
	// Of all, also of who does not fly this time: what came in before the last
	// beat proves nothing now.
	for _, c := range b.probes {
		c.look(v4, v6)
	}
	if !b.relays {
		b.untested = true
		return nil
	}
	proved := b.alive && !b.untested
	for range b.probes {
		c := b.probes[b.next%len(b.probes)]
		b.next++
		if !b.kernel.Usable(c.slot.Addr().Is6()) {
			continue
		}
		if proved && c.seen {
			break
		}
		if err := c.fly(ctx); err != nil {
			return fmt.Errorf("connect to slot %s: %w", c.slot.Addr(), err)
		}
		if proved {
			break
		}
	}
	b.untested = false
	return nil
}
