package check

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Options is what a checker needs.
type Options struct {
	// Report is told of every change, of one at a time and of a target's in
	// their order. While it runs no other check can end, and Set waits: it is
	// quick, does not call Set, and takes no lock that a caller of Set holds. It
	// must be given.
	Report func(Change)
	// Exempt marks a socket as the handler's own before it connects, since this
	// process may itself be in the scope that is captured; nil does nothing.
	Exempt func(fd int) error
	// Log may be nil.
	Log *slog.Logger
	// Parallel is how many TCP and HTTP checks are under way at once, at most;
	// 0 is 128. Commands are at most an eighth of it. A check is one descriptor,
	// a command up to five.
	Parallel int
	// Random gives uniform bits; nil means the process's own. It is called by
	// one goroutine at a time.
	Random func() uint64
}

// Checker checks a set of targets. All methods are safe for concurrent use.
type Checker struct {
	o Options
	// probe asks a target once. A test replaces it.
	probe func(ctx context.Context, t Target) error
	wake  chan struct{}

	commands commands

	// reports orders reports, and is what Set waits for, so that a target that
	// it removed is not reported afterwards. It is taken before mu.
	reports sync.Mutex
	// mu guards all that follows, and what is in the entries.
	mu      sync.Mutex
	entries map[id]*entry
	lanes   [2]lane // plain, commands
}

// id is what makes a target the same over two sets.
type id struct {
	cluster string
	addr    netip.AddrPort
}

// defaultParallel is enough for 10,000 endpoints every five seconds that take
// 60 ms each, and few enough to need no descriptors that connections would miss.
const defaultParallel = 128

// New returns a checker without targets. It starts nothing; Run does.
func New(o Options) *Checker {
	if o.Parallel == 0 {
		o.Parallel = defaultParallel
	}
	if o.Random == nil {
		o.Random = rand.Uint64
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	c := &Checker{o: o, wake: make(chan struct{}, 1)}
	c.probe = c.ask
	// A lane of their own, since a process costs what a hundred connections do,
	// and a hundred that hang must not keep the connections waiting.
	c.lanes = [2]lane{{most: o.Parallel}, {most: max(o.Parallel/8, 1)}}
	return c
}

// Set makes targets the whole set, at any time. What stays, by cluster and
// address, keeps its state, and its timing unless its Spec has changed. What is
// new is checked first at a random moment of its interval. When Set returns,
// what is not in the set is not reported any more, and a check of it that is
// under way is being cancelled. If the last report said that it is down, and it
// goes on without a check, the caller is who takes that back.
//
// All problems are in one error, and then nothing has changed: a Spec that is
// not valid, an address that is none, two targets of one cluster and address.
func (c *Checker) Set(targets []Target) error {
	wanted, err := index(targets)
	if err != nil {
		return err
	}
	c.reports.Lock()
	defer c.reports.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	for k, e := range c.entries {
		if t, ok := wanted[k]; !ok || !t.Spec.equal(e.target.Spec) {
			c.remove(e)
		}
	}
	entries := make(map[id]*entry, len(wanted))
	for k, t := range wanted {
		e := c.entries[k]
		switch {
		case e == nil:
			status := Status{Cluster: k.cluster, Addr: k.addr}
			if before := c.entries[id{t.Former, k.addr}]; before != nil {
				status = before.status
				status.Cluster, status.Against = k.cluster, 0
			}
			entries[k] = c.add(t, status, now)
		case e.removed:
			status := e.status
			status.Against = 0 // what the old check found counts for nothing in the new one
			entries[k] = c.add(t, status, now)
		default:
			entries[k] = e
		}
	}
	c.entries = entries
	c.nudge()
	return nil
}

// index returns targets by their id.
func index(targets []Target) (map[id]Target, error) {
	var errs []error
	m := make(map[id]Target, len(targets))
	for _, t := range targets {
		t.Addr = netip.AddrPortFrom(t.Addr.Addr().Unmap(), t.Addr.Port())
		k := id{t.Cluster, t.Addr}
		problem := t.Spec.Validate()
		switch _, twice := m[k]; {
		case !t.Addr.IsValid() || t.Addr.Port() == 0:
			problem = errors.New("not an address and a port")
		case twice:
			problem = errors.New("listed twice")
		default:
		}
		if problem != nil {
			errs = append(errs, fmt.Errorf("check cluster %q, endpoint %s: %w", t.Cluster, t.Addr, problem))
		}
		m[k] = t
	}
	return m, errors.Join(errs...)
}

// add makes an entry of a target and gives it a place in its lane.
func (c *Checker) add(t Target, status Status, now time.Time) *entry {
	e := &entry{target: t, status: status, lane: &c.lanes[0]}
	if t.Spec.Kind == KindCommand {
		e.lane = &c.lanes[1]
	}
	e.lane.push(e, now.Add(c.part(t.Spec.Interval)))
	return e
}

// remove takes an entry out of its lane, and cancels its check.
func (c *Checker) remove(e *entry) {
	e.removed = true
	if e.cancel != nil {
		e.cancel()
		return
	}
	e.lane.take(e)
}

// part returns a random part of d, up to all of it.
func (c *Checker) part(d time.Duration) time.Duration {
	return time.Duration(c.o.Random() % uint64(d+1))
}

// wait returns how long after the start of a check the next one starts.
func (c *Checker) wait(s Spec) time.Duration {
	swing := s.Interval / 100 * time.Duration(s.Jitter)
	return s.Interval - swing + c.part(2*swing)
}

// nudge makes Run look at the lanes again.
func (c *Checker) nudge() {
	select {
	case c.wake <- struct{}{}:
	default: // it is about to
	}
}

// Run checks until ctx is done, and then returns nil. Every goroutine and every
// process that it started has ended then, but for commands that the kernel does not
// let go of and the goroutines that wait for these, and nothing is reported any more.
// It is called once.
func (c *Checker) Run(ctx context.Context) error {
	var probes sync.WaitGroup
	defer probes.Wait()
	c.spread()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-c.wake:
		}
		timer.Reset(c.start(ctx, &probes))
	}
}

// spread gives what was set before the start new moments, since many of the old
// ones may have passed.
func (c *Checker) spread() {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	for i := range c.lanes {
		old := c.lanes[i].queue
		c.lanes[i].queue = nil
		for _, e := range old {
			c.lanes[i].push(e, now.Add(c.part(e.target.Spec.Interval)))
		}
	}
}

// idle is how long Run sleeps where nothing is due; only Set, or the end of a
// check, makes something so.
const idle = time.Hour

// start starts the checks that are due, as many as may be under way at once. It
// returns when to look again.
func (c *Checker) start(ctx context.Context, probes *sync.WaitGroup) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	next := idle
	for i := range c.lanes {
		l := &c.lanes[i]
		for l.running < l.most && len(l.queue) > 0 && !l.queue[0].due.After(now) {
			e := l.queue[0]
			l.take(e)
			l.running++
			c.late(l, e, now)
			var alone context.Context
			alone, e.cancel = context.WithCancel(ctx)
			e.began = now
			probes.Go(func() { c.check(ctx, alone, e) })
		}
		if l.running < l.most && len(l.queue) > 0 {
			next = min(next, l.queue[0].due.Sub(now))
		}
	}
	return next
}

// late says so, once, when checks start so late that an interval is missed, and
// when that is over: too many endpoints do not answer, or too many are checked.
func (c *Checker) late(l *lane, e *entry, now time.Time) {
	behind := now.Sub(e.due)
	switch {
	case !l.late && behind > e.target.Spec.Interval:
		l.late = true
		c.o.Log.Warn("health checks are late: more are due than may run at once",
			"late", behind, "waiting", len(l.queue), "parallel", l.most)
	case l.late && behind < e.target.Spec.Interval/4:
		l.late = false
		c.o.Log.Info("health checks are in time again")
	default:
	}
}

// check asks once and says what came of it. run is Run's context, alone that of
// this check.
func (c *Checker) check(run, alone context.Context, e *entry) {
	ctx, cancel := context.WithTimeout(alone, e.target.Spec.Timeout)
	err := c.probe(ctx, e.target)
	cancel()

	c.reports.Lock()
	defer c.reports.Unlock()
	if change, ok := c.settle(run, e, err); ok {
		c.tell(change)
	}
}

// settle takes the result of a check into account and puts the target back into
// its lane. It returns the change that this makes, if any.
func (c *Checker) settle(run context.Context, e *entry, err error) (Change, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e.lane.running--
	e.cancel()
	e.cancel = nil
	c.nudge()
	if e.removed {
		return Change{}, false // it was cancelled, which is no result
	}
	now := time.Now()
	due := e.began.Add(c.wait(e.target.Spec))
	if due.Before(now) {
		due = now
	}
	// Also when Run ends: Set may take it out after that.
	e.lane.push(e, due)
	if run.Err() != nil {
		return Change{}, false
	}
	return e.judge(now, err)
}

// tell reports a change and logs it.
func (c *Checker) tell(change Change) {
	if change.State == StateDown {
		c.o.Log.Warn("endpoint is down", "cluster", change.Cluster, "endpoint", change.Addr, "error", change.Err)
	} else {
		c.o.Log.Info("endpoint is up", "cluster", change.Cluster, "endpoint", change.Addr)
	}
	c.o.Report(change)
}

// States returns all targets, sorted by cluster and address. They are the
// caller's.
func (c *Checker) States() []Status {
	c.mu.Lock()
	all := make([]Status, 0, len(c.entries))
	for _, e := range c.entries {
		all = append(all, e.status)
	}
	c.mu.Unlock()
	slices.SortFunc(all, func(a, b Status) int {
		return cmp.Or(cmp.Compare(a.Cluster, b.Cluster), a.Addr.Compare(b.Addr))
	})
	return all
}
