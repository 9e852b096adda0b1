package handler

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
	"github.com/pillion-project/pillion/redirect/origdst"
	"github.com/pillion-project/pillion/redirect/route"
)

// ErrLoop means that a connection would have come back to a handler, or that an
// address is none that an application could have been redirected from.
var ErrLoop = flow.NewError(flow.ReasonLoop, "the destination may not be relayed to")

// Options are what a handler is made of.
type Options struct {
	Live  origdst.Live
	Table *route.Table
	// Slots are the prefixes that all instances take their slots from: no
	// handler ever dials there.
	Slots []netip.Prefix
	// Listen4 and Listen6 are the addresses to listen on, one listener per
	// worker; an invalid one is left out.
	Listen4, Listen6 netip.Addr
	Workers          int
	// Inherited, if there are any, are listeners of an earlier process in place of
	// new ones, of IPv4 and of IPv6, one per worker. New takes them over, also when
	// it fails.
	Inherited [2][]int
	// The rest is as in [l4.Options].
	flow.Limits
	MaxConns, MaxPerGroup int
	Exempt                func(fd int) error
	Queues                []l4.Queue
	Registry              *l4.Registry
	AcceptLater           bool
	Answered              func(dst netip.AddrPort, lasts time.Duration)
	// Unnamed, if set, is told of every connection whose destination no service
	// names. Workers call it, so it must not block.
	Unnamed func(dst netip.AddrPort)
	// Pending, if set, tells whether a destination that Unnamed was told of may
	// become a service's at once: its connections wait for that. It must become
	// false within a second, and workers call it, so it must not block.
	Pending func(dst netip.AddrPort) bool
	// Unavailable, if set, is told when a service has no endpoint that may be
	// picked, for how long, and (0) when it has again. It must not block.
	Unavailable func(service netip.AddrPort, wait time.Duration)
}

// Handler accepts redirected connections and carries them.
type Handler struct {
	resolver  *origdst.Resolver
	table     atomic.Pointer[route.Table]
	slots     []netip.Prefix
	relay     *l4.Relay
	listeners [2][]int // of IPv4 and IPv6, one per worker

	unnamed     func(netip.AddrPort)      // nil: nobody asks
	pending     func(netip.AddrPort) bool // nil: nothing is ever
	unavailable func(netip.AddrPort, time.Duration)
	mu          sync.Mutex              // guards without
	without     map[netip.AddrPort]bool // services that were told to be unavailable
	any         atomic.Bool             // whether there are
}

// New opens the listeners. Run serves them, and closes them at its end; if it
// is not called, Close must be.
func New(o Options) (*Handler, error) {
	h := &Handler{
		resolver: origdst.NewResolver(o.Live), slots: o.Slots,
		unnamed: o.Unnamed, pending: o.Pending, unavailable: o.Unavailable, without: map[netip.AddrPort]bool{},
	}
	h.table.Store(o.Table)
	perWorker, err := h.listen(o)
	if err != nil {
		return nil, err
	}
	var undecided func(*l4.Target) bool
	if o.Pending != nil {
		undecided = h.undecided
	}
	h.relay, err = l4.New(l4.Options{
		Listeners:   perWorker,
		Limits:      o.Limits,
		MaxConns:    o.MaxConns,
		MaxPerGroup: o.MaxPerGroup,
		Exempt:      o.Exempt,
		Queues:      o.Queues,
		Answered:    o.Answered,
		Unavailable: h.dialed,
		Undecided:   undecided,
		Present:     h.resolver.Present,
		Registry:    o.Registry,
		AcceptLater: o.AcceptLater,
	}, h)
	if err != nil {
		return nil, fmt.Errorf("start relay: %w", err)
	}
	if o.Registry != nil {
		o.Registry.SetListeners(h.listeners)
	}
	return h, nil
}

func (h *Handler) listen(o Options) ([][]int, error) {
	perWorker := make([][]int, o.Workers)
	if len(o.Inherited[0])+len(o.Inherited[1]) > 0 {
		h.listeners = o.Inherited
		for _, fds := range o.Inherited {
			for i, fd := range fds {
				perWorker[i%o.Workers] = append(perWorker[i%o.Workers], fd)
			}
		}
		return perWorker, nil
	}
	for family, addr := range []netip.Addr{o.Listen4, o.Listen6} {
		if !addr.IsValid() {
			continue
		}
		for i := range perWorker {
			fd, err := l4.Listen(addr, o.Exempt)
			if err != nil {
				return nil, errors.Join(err, l4.CloseListeners(perWorker))
			}
			perWorker[i] = append(perWorker[i], fd)
			h.listeners[family] = append(h.listeners[family], fd)
		}
	}
	return perWorker, nil
}

// Listeners returns the listeners of both families, one per worker, for the
// kernel side to hand connections to. They stay the handler's.
func (h *Handler) Listeners() (v4, v6 []int) { return h.listeners[0], h.listeners[1] }

// Run serves until ctx is done and the open connections have ended, or force is
// done. It owns all threads of the handler.
func (h *Handler) Run(ctx, force context.Context) error {
	if err := h.relay.Run(ctx, force); err != nil {
		return fmt.Errorf("relay: %w", err)
	}
	return nil
}

// Close closes the listeners of a handler that is never run.
func (h *Handler) Close() { h.relay.Close() }

// SetTable makes new connections and further attempts of those being dialed go by
// table. Open ones stay where they are. A service that had no endpoint to pick and
// has one now, or is gone, is told to be available.
func (h *Handler) SetTable(table *route.Table) {
	h.table.Store(table)
	if h.any.Load() {
		h.lookAgain(table)
	}
}

func (h *Handler) lookAgain(table *route.Table) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for service := range h.without {
		s, ok := table.Lookup(flow.OrigDst{AddrPort: service})
		if !ok || s.Cluster.Wait() == 0 {
			h.unavailable(service, 0)
			delete(h.without, service)
		}
	}
	h.any.Store(len(h.without) > 0)
}

// Table returns the table that new connections go by.
func (h *Handler) Table() *route.Table { return h.table.Load() }

// Direct implements [l4.Director].
func (h *Handler) Direct(local, remote netip.AddrPort) (l4.Target, error) {
	d, err := h.resolver.Resolve(local, remote)
	if err != nil {
		return l4.Target{}, err
	}
	table := h.table.Load()
	t := l4.Target{Downstream: d, Terms: table.Terms()}
	if s, ok := table.Lookup(d.OrigDst); ok {
		t.Terms, t.Cluster = &s.Terms, s.Cluster
		return t, nil
	}
	if h.unnamed != nil {
		h.unnamed(d.OrigDst.AddrPort)
	}
	// The connect hook leaves all of these alone. If one arrives here all the
	// same, somebody tries to use the handler as an open relay.
	if a := d.OrigDst.Addr(); a.IsLoopback() || a.IsUnspecified() || a.IsLinkLocalUnicast() || a.IsMulticast() {
		return t, fmt.Errorf("relay to %s: %w", d.OrigDst, ErrLoop)
	}
	return t, nil
}

// undecided gives a target the service that was found for it since, and tells
// whether one may still be.
func (h *Handler) undecided(t *l4.Target) bool {
	if s, ok := h.table.Load().Lookup(t.Downstream.OrigDst); ok {
		t.Terms, t.Cluster = &s.Terms, s.Cluster
		return false
	}
	return h.pending(t.Downstream.OrigDst.AddrPort)
}

// Again implements [l4.Director].
func (h *Handler) Again(t *l4.Target) flow.Reason {
	s, ok := h.table.Load().Lookup(t.Downstream.OrigDst)
	if !ok {
		return flow.ReasonEndpointRemoved
	}
	t.Cluster = s.Cluster
	return flow.ReasonNone
}

// dialed looks whether the target's cluster has an endpoint, when a dial has ended.
func (h *Handler) dialed(t *l4.Target) {
	if h.unavailable == nil {
		return
	}
	if t.Cluster.Wait() == 0 && !h.any.Load() {
		return // as always
	}
	service := t.Downstream.OrigDst.AddrPort
	h.mu.Lock()
	defer h.mu.Unlock()
	// Asked once more, and after any is set: of two workers the last to come
	// here says what is so, and none passes by.
	h.any.Store(true)
	// By the cluster of now: what lookAgain has said must not be undone by what the
	// target's was.
	var wait time.Duration
	if s, ok := h.table.Load().Lookup(t.Downstream.OrigDst); ok {
		wait = s.Cluster.Wait()
	}
	if wait > 0 || h.without[service] {
		h.unavailable(service, wait)
	}
	if wait > 0 {
		h.without[service] = true
	} else {
		delete(h.without, service)
	}
	h.any.Store(len(h.without) > 0)
}

// Allowed implements [l4.Director].
func (h *Handler) Allowed(to netip.AddrPort) flow.Reason {
	for _, p := range h.slots {
		if p.Contains(to.Addr()) {
			return flow.ReasonLoop
		}
	}
	return flow.ReasonNone
}

// End ends the connections to an endpoint that was removed from a cluster, with a
// reset, and returns how many there were; see [l4.Relay.End].
func (h *Handler) End(ctx context.Context, cluster string, endpoint netip.AddrPort) int {
	return h.relay.End(ctx, cluster, endpoint)
}

// Ended appends the records of the connections that ended since the last call.
func (h *Handler) Ended(buf []flow.Record) []flow.Record { return h.relay.Ended(buf) }

// Live returns the open connections.
func (h *Handler) Live(ctx context.Context) []flow.Record { return h.relay.Live(ctx) }

// Lost counts records that nobody took in time.
func (h *Handler) Lost() uint64 { return h.relay.Stats().Lost }

// Stats returns the relay's counters.
func (h *Handler) Stats() l4.Stats { return h.relay.Stats() }

// Backlog returns the fill of the fullest accept queue, from 0 to 1.
func (h *Handler) Backlog() float64 { return h.relay.Backlog() }

// Accepted returns how many connections of each family came in since the start.
func (h *Handler) Accepted() (v4, v6 uint64) { return h.relay.Accepted() }

// Moved tells whether every worker waits for work or has moved since the last
// call. One caller at a time.
func (h *Handler) Moved() bool { return h.relay.Moved() }
