package l4

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream"
)

// Target is where a connection goes.
type Target struct {
	Downstream flow.Downstream
	// Cluster gives the endpoints; nil dials the original destination.
	Cluster *upstream.Cluster
	// Terms are no service and the relay's own limits if nil. They must not
	// change.
	Terms *flow.Terms
}

// Director decides where a connection goes. It is called by every worker at
// once and must not block.
type Director interface {
	// Direct tells about the connection that remote opened to local. An error
	// ends the connection with a reset, for the reason that it carries.
	Direct(local, remote netip.AddrPort) (Target, error)
	// Again brings the cluster of a target up to date, before another attempt: its
	// endpoints may have changed since. It returns ReasonNone, or why there is no
	// cluster any more, and leaves the terms. It is not asked about targets without
	// a cluster.
	Again(t *Target) flow.Reason
	// Allowed reports whether an address may be dialed: ReasonNone, or why
	// not. It is asked before each dial.
	Allowed(to netip.AddrPort) flow.Reason
}

// Options are the knobs of a relay. Zero durations switch a limit off.
type Options struct {
	// Listeners are listening, non-blocking sockets: for each worker those
	// that it accepts from. New takes them over and closes them, also when it
	// fails.
	Listeners [][]int
	// Limits are those of connections whose target has none.
	flow.Limits
	// MaxConns is how many connections may be open: two descriptors each.
	MaxConns int
	// MaxPerGroup is how many of them one container may have open; 0 is no
	// limit. What is above it is reset.
	MaxPerGroup int
	// Exempt, if set, is called with each socket before it connects, so that
	// the kernel side knows it for the handler's own.
	Exempt func(fd int) error
	// Queues, if set, is one per worker, by which it hears of connections whose
	// handshakes wait for their dials. They stay the caller's.
	Queues []Queue
	// Answered, if set, hears of original destinations that answered a dial,
	// which is to count for so long, or whose dials failed (0). Unavailable, if
	// set, hears of targets with a cluster when a dial has ended. Every worker
	// calls them, so they must not block.
	Answered    func(dst netip.AddrPort, lasts time.Duration)
	Unavailable func(t *Target)
	// Undecided, if set, is asked before the original destination of a target
	// without a cluster is dialed. True says that it may be a service's, which is
	// being looked up: the connection waits, held or accepted, and the question is
	// repeated every millisecond until it is false, which it must become within a
	// second. It gives the target the cluster and the terms that were found. Every
	// worker calls it, so it must not block.
	Undecided func(t *Target) bool
	// Present, if set, tells whether the application's socket of an accepted
	// connection is known to be there, by the addresses of the accepted one. It is
	// asked now and then about silent ones; false has the kernel look. Every worker
	// calls it, so it must not block.
	Present func(local, remote netip.AddrPort) bool
	// Registry, if set, is where the relay writes down what another process needs
	// to go on after a kill.
	Registry *Registry
	// AcceptLater has connections accepted, and dialed, from the call of
	// [Relay.Accept] on.
	AcceptLater bool
}

// Stats counts since the start, but for Live and Pipes, which are of now.
type Stats struct {
	Accepted, Ended, Dials, DialFailures, Retries uint64
	// Unknown counts accepted sockets that no live entry names.
	Unknown uint64
	// Pauses counts how often accepting stopped for want of descriptors.
	Pauses uint64
	// Refused counts connections whose applications' handshakes were never
	// completed, so that they were not accepted either: the dial failed, or the
	// application gave up. NotInjected counts frames of which the kernel had
	// none in the end.
	Refused, NotInjected uint64
	// Lost counts records that nobody took in time.
	Lost        uint64
	Live, Pipes int
}

// Relay carries connections. Its methods are safe for concurrent use.
type Relay struct {
	options  Options
	terms    flow.Terms // of targets that have none
	director Director
	workers  []*worker
	start    time.Time
	base     base // start, on CLOCK_MONOTONIC
	pipes    atomic.Int32
	live     atomic.Int64
	stopping atomic.Bool
	copied   atomic.Bool // see Frozen.Copied
	shares   shares
}

// ErrNoPreemption means that the process runs without asynchronous preemption:
// a worker that waits would then hold up a garbage collection for ever.
var ErrNoPreemption = errors.New("GODEBUG=asyncpreemptoff=1 is set, which the relay cannot run with")

// New prepares a relay; Run makes it work.
func New(o Options, d Director) (*Relay, error) {
	r := &Relay{options: o, terms: flow.Terms{Limits: o.Limits}, director: d, start: time.Now()}
	r.base = base(monotonic())
	r.copied.Store(o.Registry != nil && o.Registry.head.copied != 0)
	err := o.check()
	for i, fds := range o.Listeners {
		w := newWorker(r, i, fds)
		if i < len(o.Queues) {
			w.queue = o.Queues[i]
		}
		r.workers = append(r.workers, w)
		if err == nil {
			err = w.open()
		}
	}
	if err != nil {
		for _, w := range r.workers {
			w.close()
		}
		return nil, err
	}
	return r, nil
}

func (o *Options) check() error {
	switch {
	case strings.Contains(os.Getenv("GODEBUG"), "asyncpreemptoff=1"):
		return ErrNoPreemption
	case runtime.GOMAXPROCS(0) < len(o.Listeners)+2:
		// A worker in a raw wait keeps its processor: some must be left for
		// the rest of the process.
		return fmt.Errorf("GOMAXPROCS %d is too few for %d workers: at least %d", runtime.GOMAXPROCS(0),
			len(o.Listeners), len(o.Listeners)+2)
	case o.Attempts < 1 || o.Attempts > maxAttempts:
		return fmt.Errorf("attempts %d: want 1 to %d", o.Attempts, maxAttempts)
	case o.DialTimeout <= 0 || o.DialBudget <= 0:
		return errors.New("the time to dial is not bounded")
	case o.Registry != nil && len(o.Listeners) > registryWorkers:
		return fmt.Errorf("%d workers: a registry has room for %d", len(o.Listeners), registryWorkers)
	case o.MaxConns <= 0:
		return fmt.Errorf("connections %d: want at least 1", o.MaxConns)
	}
	return nil
}

// Accept is when connections are accepted, with [Options.AcceptLater].
func (r *Relay) Accept() { r.each((*worker).accept) }

// Close closes the listeners of a relay that is never run; Run does it itself.
func (r *Relay) Close() {
	for _, w := range r.workers {
		w.close()
	}
}

// Run carries connections until ctx is done, then accepts no more and lets the
// open ones end, at the latest when force is done: those are reset. It owns the
// workers and returns when they have ended.
func (r *Relay) Run(ctx, force context.Context) error {
	var running sync.WaitGroup
	errs := make([]error, len(r.workers))
	for i, w := range r.workers {
		running.Go(func() { errs[i] = w.run() })
	}
	stop := context.AfterFunc(ctx, r.stop)
	end := context.AfterFunc(force, func() {
		// ctx may be done as well, and its stop on the way: nothing may be
		// accepted after the reset.
		r.stop()
		r.each(func(w *worker) {
			w.stopAccepting()
			w.resetAll()
			w.stopIfIdle()
		})
	})
	running.Wait()
	stop()
	end()
	return errors.Join(errs...)
}

func (r *Relay) stop() {
	if r.stopping.CompareAndSwap(false, true) {
		r.each((*worker).stopAccepting)
	}
}

// each runs f on every worker's own thread, some time soon.
func (r *Relay) each(f func(*worker)) {
	for _, w := range r.workers {
		w.post(func() { f(w) })
	}
}

// Ended appends what ended since the last call to buf. One caller at a time.
func (r *Relay) Ended(buf []flow.Record) []flow.Record {
	for _, w := range r.workers {
		buf = w.ledger.take(buf)
	}
	return buf
}

// Live returns the open connections. It waits for each worker to list its own,
// and returns what there is when ctx is done first.
func (r *Relay) Live(ctx context.Context) []flow.Record {
	lists := make(chan []flow.Record, len(r.workers))
	asked := 0
	for _, w := range r.workers {
		if w.post(func() { lists <- w.list() }) {
			asked++
		}
	}
	var all []flow.Record
	for range asked {
		select {
		case l := <-lists:
			all = append(all, l...)
		case <-ctx.Done():
			return all
		}
	}
	return all
}

// End ends the connections to an endpoint of a cluster with a reset, for
// ReasonEndpointRemoved, and returns how many there were. One that is still being
// dialed is tried on another endpoint instead, as when the dial fails. It waits for
// each worker, at most until ctx is done: what a worker has not begun by then is not
// done, so that none is ended that began later.
func (r *Relay) End(ctx context.Context, cluster string, endpoint netip.AddrPort) int {
	counts := make(chan int, len(r.workers))
	asked := 0
	for _, w := range r.workers {
		if w.post(func() { counts <- w.endAll(ctx, cluster, endpoint) }) {
			asked++
		}
	}
	ended := 0
	for range asked {
		select {
		case n := <-counts:
			ended += n
		case <-ctx.Done():
			return ended
		}
	}
	return ended
}

// Moved tells whether every worker waits for work or has moved since the last
// call. One that did neither for long hangs, or gets no processor. One caller at
// a time.
func (r *Relay) Moved() bool {
	moved := true
	for _, w := range r.workers {
		turn := w.turn.Load()
		moved = moved && (w.waiting.Load() || turn != w.seen)
		w.seen = turn
	}
	return moved
}

// Stats returns the counters of all workers together.
func (r *Relay) Stats() Stats {
	s := Stats{Live: int(r.live.Load()), Pipes: int(r.pipes.Load())}
	for _, w := range r.workers {
		w.counters.add(&s)
		s.Lost += w.ledger.lost.Load()
	}
	return s
}

// Accepted returns how many connections of each family came in since the start.
func (r *Relay) Accepted() (v4, v6 uint64) {
	for _, w := range r.workers {
		v4 += w.counters.accepted4.Load()
		v6 += w.counters.accepted6.Load()
	}
	return v4, v6
}

// counters are written by one worker and read by anybody.
type counters struct {
	accepted4, accepted6, ended, dials, dialFailures, retries, unknown, pauses, refused, notInjected atomic.Uint64
}

func (c *counters) add(s *Stats) {
	s.Accepted += c.accepted4.Load() + c.accepted6.Load()
	s.Ended += c.ended.Load()
	s.Dials += c.dials.Load()
	s.DialFailures += c.dialFailures.Load()
	s.Retries += c.retries.Load()
	s.Unknown += c.unknown.Load()
	s.Pauses += c.pauses.Load()
	s.Refused += c.refused.Load()
	s.NotInjected += c.notInjected.Load()
}

// ledgerSize is how many records wait for a reader who comes ten times a
// second: more than a worker can end in a second.
const ledgerSize = 1 << 15

// ledger holds the records of ended connections until they are taken.
type ledger struct {
	mu      sync.Mutex // held for an append or a swap only: the worker must not wait
	records []flow.Record
	spare   []flow.Record
	lost    atomic.Uint64
}

func (l *ledger) add(r *flow.Record) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.records) >= ledgerSize {
		l.lost.Add(1)
		return
	}
	l.records = append(l.records, *r)
}

// take appends the records to buf. One caller at a time.
func (l *ledger) take(buf []flow.Record) []flow.Record {
	l.mu.Lock()
	taken := l.records
	l.records, l.spare = l.spare, nil
	l.mu.Unlock()

	buf = append(buf, taken...)
	if cap(taken) > 4096 && len(taken) < cap(taken)/4 {
		return buf // do not keep the memory of a peak
	}
	clear(taken)
	l.mu.Lock()
	l.spare = taken[:0]
	l.mu.Unlock()
	return buf
}
