package l4

import (
	"net/netip"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
)

// What a worker writes down in the registry, if it has one: c.slot is nil otherwise.
// What matters is the order. What is to be known after a kill is written before the
// call that makes it so, and a descriptor is forgotten before it is closed, since its
// number is another's from then on.

// keepConn writes down a new connection that has nothing yet.
func (w *worker) keepConn(c *conn) {
	if w.registry == nil {
		return
	}
	s := w.registry.take()
	if s == nil {
		return // it goes on unprotected
	}
	s.worker, s.opened = uint32(w.index), w.relay.base.of(c.opened)
	s.downstream.set(&c.target.Downstream)
	c.slot = s
	w.keepNames(c)
}

// keepNames writes down whose the connection is.
func (w *worker) keepNames(c *conn) {
	s := c.slot
	if s == nil {
		return
	}
	s.service.set(c.target.Terms.Service)
	s.cluster.size = 0
	if c.target.Cluster != nil {
		s.cluster.set(c.target.Cluster.Name)
	}
	s.endpoint.set(endpointOf(c))
	s.attempts = c.attempts
}

// endpointOf is what a connection counts for, or not valid.
func endpointOf(c *conn) netip.AddrPort {
	if c.endpoint == nil {
		return netip.AddrPort{}
	}
	return c.endpoint.Addr
}

// keepFD writes down a socket. The application's makes the connection one that
// recovery goes on with: before, its handshake waits, and comes again.
func (w *worker) keepFD(c *conn, k int, fd int32) {
	if s := c.slot; s != nil {
		s.fds[k] = fd
		if k == down {
			s.state = slotOpen
		}
	}
}

// forgetFD comes before the socket is closed.
func (c *conn) forgetFD(k int) {
	if s := c.slot; s != nil {
		s.fds[k] = -1
	}
}

// keepFlag writes down what is so from here on.
func (c *conn) keepFlag(flag uint32) {
	if s := c.slot; s != nil {
		s.flags |= flag
	}
}

func (c *conn) keepDialed() {
	if s := c.slot; s != nil {
		s.connected = int64(c.connected)
		s.flags |= keptDialed
	}
}

// keepPipe writes down a pipe before it is filled, and forgets it, if it is noPipe,
// before it is another's.
func (c *conn) keepPipe(k int, p pipe) {
	s := c.slot
	switch {
	case s == nil:
	case p == noPipe:
		s.pipes[k] = 0
	default:
		s.pipes[k] = uint64(uint32(p[0]))<<32 | uint64(uint32(p[1]))
	}
}

// keepHeld writes down an answer, before it is given.
func (c *conn) keepHeld(h *flow.Held) {
	if s := c.slot; s != nil {
		s.keepHeld(h)
	}
}

// heardOf notes that the application has its answer.
func (c *conn) heardOf() {
	if s := c.slot; s != nil {
		s.flags &^= keptReleased
	}
}

// reading comes before side k is read into the worker's buffer.
func (w *worker) reading(c *conn, k int) {
	if m := w.mark; m != nil {
		m.urgent, m.n = 0, -1
		m.slot, m.side, m.base = w.slotOf(c), uint32(k), c.sides[k].moved
	}
}

// hasRead comes after it.
func (w *worker) hasRead(n int) {
	if m := w.mark; m != nil {
		m.n = int32(n)
	}
}

// readingUrgent is reading for a read of an urgent byte alone.
func (w *worker) readingUrgent(c *conn, k int) {
	w.reading(c, k)
	if m := w.mark; m != nil {
		m.urgent = 1
	}
}

// lookAt comes before a connection is dealt with, so that one that kills its workers
// is found.
func (w *worker) lookAt(c *conn) {
	if m := w.mark; m != nil {
		m.at = w.slotOf(c)
		poison(c)
	}
}

// lookAway comes before a wait.
func (w *worker) lookAway() {
	if m := w.mark; m != nil {
		m.at = 0
	}
}

func (w *worker) slotOf(c *conn) uint32 {
	if c.slot == nil {
		return 0
	}
	return uint32(w.registry.index(c.slot)) + 1
}

// saveRest keeps what was read from side k and could not be written.
func (w *worker) saveRest(c *conn, k int, b []byte) {
	s := &c.sides[k]
	s.from = 0
	if c.slot == nil {
		s.rest = w.buffers.save(b)
		return
	}
	if s.rest = w.registry.save(b); s.rest == nil {
		s.rest = w.buffers.save(b) // unprotected
		return
	}
	fault(faultSaved)
	c.slot.flags &^= keptRestUrgent << k
	if s.restUrgent {
		c.keepFlag(keptRestUrgent << k)
	}
	c.slot.rests[k] = w.registry.word(s.rest)
}

// releaseRest gives the memory of a rest back.
func (w *worker) releaseRest(c *conn, k int) {
	s := &c.sides[k]
	if c.slot != nil && c.slot.rests[k] != 0 {
		c.slot.rests[k] = 0
		fault(faultForgot)
		w.registry.release(s.rest)
	} else {
		w.buffers.release(s.rest)
	}
	s.rest, s.from, s.restUrgent = nil, 0, false
}

// keepRecord writes down what the record of an ended connection says, before somebody
// can have it.
func (w *worker) keepRecord(c *conn, why flow.Reason) {
	if s := c.slot; s != nil {
		s.ended, s.why = w.relay.base.of(w.now), uint8(why)
		s.moved = [2]uint64{c.sides[down].moved, c.sides[up].moved}
		w.registry.await(s)
	}
}

// keepEnd writes down that a connection is being closed.
func (c *conn) keepEnd(why flow.Reason, reset bool) {
	s := c.slot
	if s == nil {
		return
	}
	s.end = uint8(why)
	if reset && s.state == slotOpen {
		s.state = slotReset
	}
	fault(faultEnding)
}

// keepClosed is the last: the sockets are closed.
func (w *worker) keepClosed(c *conn) {
	if s := c.slot; s != nil {
		c.slot = nil
		w.registry.closed(s)
		fault(faultEnded)
	}
}

// duration is of CLOCK_MONOTONIC.
func (s *slot) duration() time.Duration { return time.Duration(s.ended - s.opened) }

// recover takes up records that were never taken.
func (l *ledger) recover(r *Relay, ended []*slot) {
	for _, s := range ended {
		d := s.downstream.get()
		rec := flow.Record{
			Cookie: d.Cookie, Cgroup: d.Cgroup, Source: d.Source, OrigDst: d.OrigDst.AddrPort, Reason: d.Reason,
			Service: s.service.get(), Cluster: s.cluster.get(), Endpoint: s.endpoint.get(), Path: flow.PathRelay,
			End: flow.Reason(s.why), Attempts: int(s.attempts), Start: r.start.Add(time.Duration(r.base.to(s.opened))),
			Duration: s.duration(), Connect: time.Duration(s.connected), Sent: s.moved[down], Received: s.moved[up],
			Mirrored: s.flags&keptMirrored != 0,
		}
		if !rec.Endpoint.IsValid() && s.attempts > 0 {
			rec.Endpoint = rec.OrigDst
		}
		r.options.Registry.await(s)
		l.add(&rec)
	}
}
