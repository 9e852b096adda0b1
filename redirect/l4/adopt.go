package l4

import (
	"net/netip"
	"slices"
	"sync"
	"syscall"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream"
)

// place is where a connection that was carried goes here.
type place struct {
	target   Target
	endpoint *upstream.Endpoint
	tried    []*upstream.Endpoint
}

// Adopt gives connections to a relay, before Run or while it runs. Each goes to the
// worker of its number. The descriptors are the relay's from now on. where returns
// the target of each, with a cluster that has the endpoint that it counts for and
// those that it tried; it counts for none that is not there.
//
// Every direction is tried once, since nobody was told of what happened meanwhile.
// What is returned is closed when that is done, which takes Run; nil means that a
// worker has ended, and what it was to have is lost.
func (r *Relay) Adopt(g *Given, where func(*Carried) Target) (done <-chan struct{}) {
	if r.options.Registry != nil {
		r.options.Registry.Keep(g)
	}
	find := finder{}
	parts := make([]adoption, len(r.workers))
	for i := range g.Conns {
		c := &g.Conns[i]
		p := place{target: where(c)}
		p.endpoint = find.endpoint(p.target.Cluster, c.Endpoint)
		for _, addr := range c.Tried {
			if e := find.endpoint(p.target.Cluster, addr); e != nil {
				p.tried = append(p.tried, e)
			}
		}
		part := &parts[c.Worker%len(parts)]
		part.conns, part.places = append(part.conns, c), append(part.places, p)
	}
	for i := range g.Refusals {
		part := &parts[g.Refusals[i].Worker%len(parts)]
		part.refusals = append(part.refusals, &g.Refusals[i])
	}
	r.workers[0].ledger.recover(r, g.ended)
	var adopting sync.WaitGroup
	for i, w := range r.workers {
		adopting.Add(1)
		ok := w.post(func() {
			w.adoptAll(&parts[i])
			adopting.Done()
		})
		if !ok {
			return nil
		}
	}
	all := make(chan struct{})
	go closeAfter(&adopting, all)
	return all
}

// closeAfter ends with the adoption, at the latest with Run, which runs what was
// posted.
func closeAfter(wg *sync.WaitGroup, all chan<- struct{}) {
	wg.Wait()
	close(all)
}

// finder finds endpoints by address: clusters may be large.
type finder map[*upstream.Cluster]map[netip.AddrPort]*upstream.Endpoint

func (f finder) endpoint(c *upstream.Cluster, addr netip.AddrPort) *upstream.Endpoint {
	if c == nil || !addr.IsValid() {
		return nil
	}
	if f[c] == nil {
		f[c] = make(map[netip.AddrPort]*upstream.Endpoint, len(c.Endpoints))
		for _, e := range c.Endpoints {
			f[c][e.Addr] = e
		}
	}
	return f[c][addr]
}

// adoption is one worker's part.
type adoption struct {
	conns    []*Carried
	places   []place
	refusals []*CarriedRefusal
}

func (w *worker) adoptAll(a *adoption) {
	w.tick()
	// All are known before any moves: what becomes of one may end others.
	all := make([]*conn, 0, len(a.conns))
	for i, g := range a.conns {
		all = append(all, w.takeUp(g, &a.places[i]))
	}
	for i, c := range all {
		if !c.dead && c.index >= 0 {
			if a.conns[i].End == flow.ReasonNone {
				w.lookAt(c)
			}
			w.carryOn(c, a.conns[i])
		}
	}
	for _, r := range a.refusals {
		w.unheard = append(w.unheard, refusal{
			held: w.keep(&r.Held), cookie: r.Cookie, errno: syscall.Errno(r.Errno), left: r.Left,
		})
	}
}

// takeUp makes a connection of what was carried. It is not watched yet.
func (w *worker) takeUp(g *Carried, p *place) *conn {
	c := w.start(p.target, nil)
	if c.slot = g.slot; c.slot != nil {
		c.slot.worker = uint32(w.index)
	}
	b := w.relay.base
	c.opened, c.began, c.active, c.dialed = b.to(g.Opened), b.to(g.Began), b.to(g.Active), b.to(g.Dialed)
	c.connected, c.last, c.errno, c.attempts, c.round = g.Connected, g.Last, g.Errno, g.Attempts, g.Round
	c.mirrored, c.lingers, c.kept = g.Mirrored, g.Lingers, g.Kept
	c.tried = append(c.tried, p.tried...)
	if p.endpoint != nil {
		c.endpoint = p.endpoint
		if g.Dialing {
			c.endpoint.Begin()
		} else {
			c.endpoint.Carry()
		}
	}
	w.takeUpSide(c, down, &g.Down)
	w.takeUpSide(c, up, &g.Up)
	if h := g.Held; h != nil {
		c.held = w.keep(&h.Held)
		c.held.silent, c.held.reset = h.Silent, h.Reset
		w.held[keyOf(&h.Held)] = c
	}
	switch {
	case g.Waiting:
		c.dialing, c.waiting = true, true
		w.dialing++
		w.waiters = append(w.waiters, c)
	case g.Dialing:
		c.dialing, c.endless = true, c.held != nil && c.target.Cluster == nil
		w.dialing++
		if c.endless {
			w.endless++
		}
	default:
	}
	fault(faultTookUp)
	if r := g.Released; r != nil {
		// At once: its SYN may have come again meanwhile, and nobody answers that.
		w.injected(w.queue.Release(r))
		fd := c.sides[down].fd
		w.released = append(w.released, release{
			held: w.keep(r), fd: fd, gen: c.sides[down].gen, at: w.now, left: g.Repeats, segments: max(sysSegmentsIn(fd), 2),
		})
	}
	return c
}

func (w *worker) takeUpSide(c *conn, k int, g *CarriedSide) {
	s := &c.sides[k]
	if g.FD >= 0 {
		w.adopt(c, k, int32(g.FD))
	}
	switch n := len(g.Rest); {
	case c.slot != nil:
		s.rest, s.restUrgent = g.Rest, g.RestUrgent // where it lies
	case n > copySize: // of a build with other sizes
		s.rest = slices.Clone(g.Rest)
	case n > 0:
		s.rest, s.restUrgent = w.buffers.save(g.Rest), g.RestUrgent
	default:
	}
	if g.PipeRead >= 0 {
		// It may be more than the limit for a while: it holds bytes.
		w.pipes.open.Add(1)
		s.pipe, s.inPipe, s.splicing = pipe{int32(g.PipeRead), int32(g.PipeWrite)}, g.InPipe, true
	}
	if g.Urgent && g.FD >= 0 {
		sysInline(s.fd, 1) // as sawUrgent; an older build has not
	}
	s.eof, s.done, s.fin, s.urgent = g.EOF, g.Done, g.FIN, g.Urgent
	s.tuned, s.chosen, s.wrote, s.moved = g.Tuned, g.Chosen, g.Wrote, g.Moved
}

// carryOn watches what was taken up and tries to write what waits for it. What is
// there to be read, a FIN, an urgent mark, a reset, the answer to a dial: all that
// the first event tells, since to watch a descriptor reports what it is at.
func (w *worker) carryOn(c *conn, g *Carried) {
	switch {
	case g.End == flow.ReasonNone:
	case g.Torn:
		w.end(c, g.End, true)
		return
	case g.End == flow.ReasonDownstreamReset && !c.dialing:
		w.broken(c, down)
		return
	case g.End == flow.ReasonUpstreamReset && !c.dialing:
		w.broken(c, up)
		return
	default:
		w.end(c, g.End, g.End != flow.ReasonClosed)
		return
	}
	for k := range c.sides {
		if c.sides[k].fd < 0 {
			continue
		}
		if e := w.follow(c, k); e != 0 {
			w.dialFailed(c, reasonOf(e))
		}
		if c.dead {
			return
		}
	}
	if c.lingers {
		// Nothing is read of it any more: room to write is what it waits for.
		w.lingered(c)
		return
	}
	if g.Waiting || g.Dialing || c.held != nil {
		return
	}
	for k := range c.sides {
		if !c.dead {
			w.pump(c, k)
		}
	}
}
