package events

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/pace"
)

const (
	// interval is how often the ring and the handler are asked. The ring holds
	// some nine thousand events, and the kernel side wakes the collector before
	// its time when half of that is used.
	interval = 200 * time.Millisecond
	// gatherEvery is how often while hooks tell elsewhere: what fills up there wakes
	// nobody.
	gatherEvery = 20 * time.Millisecond
	// defaultHistory is how many records are kept.
	defaultHistory = 4096
	// bufferMax is the largest buffer, in records, that is kept for the next
	// poll.
	bufferMax = 4096
	// untoldMax is how long nobody is given up while one of the sides does not tell
	// all, by the joiner's clock. One that takes longer hangs, and does not just get no
	// processor.
	untoldMax = 5 * patience
)

// Handler tells what became of the connections that it carries. It is safe for
// concurrent use.
type Handler interface {
	// Ended appends to buf what ended since the last call. It is cheap.
	Ended(buf []flow.Record) []flow.Record
	// Live returns a copy of the open connections, some of them if ctx is done
	// before.
	Live(ctx context.Context) []flow.Record
	// Lost counts the ended connections that the handler had no room for.
	Lost() uint64
}

// Sink takes every record once, complete. It is called by one goroutine at a
// time, must not block, must not keep r, and must not call the collector.
type Sink interface {
	Record(r *flow.Record)
}

// Kernel tells of the connections that no handler carries. It is safe for
// concurrent use.
type Kernel interface {
	// Connections returns the open connections on every path, as far as the
	// kernel side knows them. They are the caller's.
	Connections() ([]flow.Record, error)
}

// Options are what a collector is made of.
type Options struct {
	// Ring is the map events; nil: there is none. It stays the caller's.
	Ring *ebpf.Map
	// Gather has the ring hold what hooks tell elsewhere while they are replaced, and
	// says whether they may do so still. It is called before the ring is read; nil: all
	// tell the ring itself.
	Gather func() (again bool)
	// Handler is asked for its records; nil: there is none.
	Handler Handler
	// Kernel is asked for the open connections on pass and direct; nil: nobody
	// knows them.
	Kernel Kernel
	// Names returns the service that names an original destination and its
	// cluster, both empty if there is none. It is called for every record that
	// no handler made, by several goroutines at once, and must be cheap; nil:
	// those records have no names.
	Names func(orig netip.AddrPort) (service, cluster string)
	// Sinks get every record, in this order.
	Sinks []Sink
	// History is how many ended records are kept, 4096 if 0.
	History int
}

// Losses counts what is missing from the records, or is incomplete in them.
type Losses struct {
	// Unreadable counts events of the kernel side that this build does not
	// understand.
	Unreadable uint64
	// Unmatched counts records that only one side told of, although both must
	// have known.
	Unmatched uint64
	// Handler counts records that the handler had no room for.
	Handler uint64
}

// source is where the kernel side's events come from.
type source interface {
	read(each func(raw []byte)) (all bool, err error)
	wait(ctx context.Context, d time.Duration)
	close() error
}

// Collector joins the records of both sides and gives them out. Its methods are
// safe for concurrent use.
type Collector struct {
	ring    source // nil: none
	gather  func() (again bool)
	handler Handler
	kernel  Kernel // nil: none
	names   func(netip.AddrPort) (service, cluster string)
	sinks   []Sink
	clock   clock
	now     func() time.Time
	history history

	// mu orders polls: it holds the fields below up to closed, the reading side
	// of ring, and the calls of the sinks.
	mu sync.Mutex
	// patient is the joiner's clock, see pass, and told what it was when both sides
	// last told all. polled is when it was set.
	patient, told, polled time.Time
	joiner                *joiner
	buffer                []flow.Record
	scratch               flow.Record // the event that is being read
	closed                bool

	again      atomic.Bool // what gather said last
	unreadable atomic.Uint64
}

// New opens the ring. Run reads it and closes it; if Run is not called, Close
// must be.
func New(o Options) (*Collector, error) {
	if o.History < 0 {
		return nil, fmt.Errorf("keep %d records: negative", o.History)
	}
	var src source
	if o.Ring != nil {
		r, err := openRing(o.Ring)
		if err != nil {
			return nil, err
		}
		src = r
	}
	c := newCollector(o, src)
	var err error
	if c.clock, err = newClock(); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func newCollector(o Options, ring source) *Collector {
	if o.History == 0 {
		o.History = defaultHistory
	}
	c := &Collector{
		ring:    ring,
		gather:  o.Gather,
		handler: o.Handler,
		kernel:  o.Kernel,
		names:   o.Names,
		sinks:   o.Sinks,
		now:     time.Now,
		history: history{max: o.History},
	}
	c.joiner = newJoiner(ring == nil || o.Handler == nil, pendingMax, c.emit)
	return c
}

// Run collects until ctx is done, five times a second. Then it collects once
// more, gives out what still waits for its other half, and closes the ring. Stop
// the handler first: its last records are then in that collection.
func (c *Collector) Run(ctx context.Context) error {
	for {
		c.wait(ctx)
		if err := c.poll(); err != nil {
			return errors.Join(err, c.Close())
		}
		if ctx.Err() != nil {
			return c.Close()
		}
	}
}

// Close gives out what waits for its other half and closes the ring. Run does
// it. A second call does nothing.
func (c *Collector) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	c.closed = true
	c.joiner.flush()
	if c.ring == nil {
		return nil
	}
	if err := c.ring.close(); err != nil {
		return fmt.Errorf("close ring buffer: %w", err)
	}
	return nil
}

// Flush collects once, now, in the caller's goroutine. What still waits for its
// other half keeps waiting. An error is Run's to report, which meets it too.
func (c *Collector) Flush(ctx context.Context) {
	if ctx.Err() == nil {
		_ = c.poll()
	}
}

// Live returns the open connections: those on relay as the handler knows them,
// the others as the kernel side does. An error means that the latter could not be
// read; the former are returned all the same.
func (c *Collector) Live(ctx context.Context) ([]flow.Record, error) {
	var all []flow.Record
	if c.handler != nil {
		all = c.handler.Live(ctx)
	}
	if c.kernel == nil {
		return all, nil
	}
	records, err := c.kernel.Connections()
	if err != nil {
		return all, fmt.Errorf("list connections of the kernel side: %w", err)
	}
	for _, r := range records {
		if r.Path == flow.PathRelay || r.Reason == flow.ReasonSelf {
			continue
		}
		settle(&r)
		c.name(&r)
		all = append(all, r)
	}
	return all, nil
}

// name says which service a record of the kernel side belongs to.
func (c *Collector) name(r *flow.Record) {
	if c.names != nil {
		r.Service, r.Cluster = c.names(r.OrigDst)
	}
}

// History returns a copy of the last records, oldest first.
func (c *Collector) History() []flow.Record { return c.history.list() }

// Losses returns what is missing so far.
func (c *Collector) Losses() Losses {
	l := Losses{Unreadable: c.unreadable.Load(), Unmatched: c.joiner.unmatched.Load()}
	if c.handler != nil {
		l.Handler = c.handler.Lost()
	}
	return l
}

func (c *Collector) wait(ctx context.Context) {
	if c.ring == nil {
		pause(ctx, pace.Next(interval))
		return
	}
	if c.again.Load() {
		c.ring.wait(ctx, gatherEvery)
		return
	}
	c.ring.wait(ctx, pace.Next(interval))
}

// poll takes what both sides have. Once closed, it does nothing.
func (c *Collector) poll() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	c.pass()
	all, err := true, error(nil)
	if c.ring != nil {
		if c.gather != nil {
			c.again.Store(c.gather())
		}
		all, err = c.ring.read(c.event)
	}
	// Before the ended ones are taken: what ends in between is then in both.
	carried, known := c.carried()
	if c.handler != nil {
		c.takeEnded()
	}
	all = all && known
	if all {
		c.told = c.patient
	}
	if all || c.patient.Sub(c.told) >= untoldMax {
		c.joiner.expire(c.patient, carried)
	}
	return err
}

// pass lets the joiner's time pass. A poll counts for an interval at most: who got no
// processor for seconds does not take for lost what the other side, which had none
// either, could not tell.
func (c *Collector) pass() {
	now := c.now()
	c.patient = c.patient.Add(min(max(now.Sub(c.polled), 0), interval))
	c.polled = now
}

// carried are the connections that the handler has, if that is of interest now.
// known is false if the handler has not told of all.
func (c *Collector) carried() (all map[key]bool, known bool) {
	if c.handler == nil || !c.joiner.due(c.patient) {
		return nil, true
	}
	ctx, cancel := context.WithTimeout(context.Background(), interval)
	defer cancel()
	all = map[key]bool{}
	for _, r := range c.handler.Live(ctx) {
		all[key{cookie: r.Cookie, port: r.Source.Port()}] = true
	}
	return all, ctx.Err() == nil
}

// event takes one event of the kernel side.
func (c *Collector) event(raw []byte) {
	e, ok := bpf.ParseEvent(raw)
	if !ok || !readable(&e) {
		c.unreadable.Add(1)
		return
	}
	r := &c.scratch
	c.clock.record(&e, r)
	if r.Reason == flow.ReasonSelf {
		// The handler's own, when it is in the scope itself: a dial, which the
		// application's record tells of, or a test connection, ten of which a
		// second would push everything else out of the history.
		return
	}
	c.name(r)
	if r.Path != flow.PathRelay {
		// Nobody else knows about it.
		c.emit(r)
		return
	}
	c.joiner.add(fromKernel, r, c.patient)
}

func (c *Collector) takeEnded() {
	c.buffer = c.handler.Ended(c.buffer[:0])
	for i := range c.buffer {
		c.joiner.add(fromHandler, &c.buffer[i], c.patient)
	}
	if cap(c.buffer) > bufferMax {
		c.buffer = nil
	}
}

func (c *Collector) emit(r *flow.Record) {
	c.history.add(r)
	for _, s := range c.sinks {
		s.Record(r)
	}
}
