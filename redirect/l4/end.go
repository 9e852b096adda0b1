package l4

import (
	"context"
	"net/netip"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

// windowMin fits in every window: so much does not wait for a reader.
const windowMin = 1 << 10

// finish passes on that side k has ended: everything read from it is written.
func (w *worker) finish(c *conn, k int) {
	s, d := &c.sides[k], &c.sides[1-k]
	// A broken side may have no end to pass on: broken knows.
	if s.done || c.closing {
		return
	}
	s.done = true
	fault(faultEOF)
	c.keepFlag(keptDone << k)
	fault(faultShutting)
	if d.done && !w.unsent(c) {
		// Both ends were seen and passed on; close sends the second FIN.
		w.end(c, flow.ReasonClosed, false)
		return
	}
	sysShutdownWrite(d.fd)
	fault(faultShut)
	if d.done {
		// It has ended, and is on record; what is left is the kernel's work.
		w.enter(c, flow.ReasonClosed)
		c.lingers = true
		c.keepFlag(keptLingers)
	}
}

// enter puts an ended connection on record.
func (w *worker) enter(c *conn, why flow.Reason) {
	w.keepRecord(c, why)
	r := w.record(c)
	r.Open, r.End = false, why
	w.ledger.add(&r)
}

// unsent tells whether bytes wait for a reader's window. The kernel gives up a
// closed socket that waits for long, and one that is open never.
func (w *worker) unsent(c *conn) bool {
	for k := range c.sides {
		// What has gone the other way is what this socket had to send.
		if c.sides[1-k].moved > windowMin && sysUnsent(c.sides[k].fd) > 0 {
			return true
		}
	}
	return false
}

// lingered looks at a connection that has ended but for unsent bytes.
func (w *worker) lingered(c *conn) {
	if !w.unsent(c) {
		w.end(c, flow.ReasonClosed, false)
	}
}

// broken ends a connection whose side k was reset or timed out: what it sent
// before is passed on as far as there is room, then comes the reset.
func (w *worker) broken(c *conn, k int) {
	if c.dead || c.closing {
		return
	}
	c.closing = true
	s, d := &c.sides[k], &c.sides[1-k]
	// The kernel tells a reset behind a FIN, which may be as young, by EPIPE.
	s.fin = sysSocketError(s.fd) == unix.EPIPE || s.fin
	s.readable = !s.eof
	for s.readable && !d.blocked {
		w.pump(c, k)
	}
	if s.fin && s.eof && !s.done {
		sysShutdownWrite(d.fd)
	}
	why := flow.ReasonDownstreamReset
	if k == up {
		why = flow.ReasonUpstreamReset
	}
	w.end(c, why, true)
}

// end closes a connection, records it, and gives its memory back. reset makes
// the closes send resets.
func (w *worker) end(c *conn, why flow.Reason, reset bool) {
	if c.dead {
		return
	}
	if !c.lingers {
		w.enter(c, why)
	}
	c.dead = true
	c.keepEnd(why, reset)
	if c.held != nil {
		w.refuseHeld(c, why)
	}
	switch {
	case c.waiting:
		w.forgetUndecided(c)
	case c.dialing:
		w.dialed(c)
	default:
	}
	if c.endpoint != nil {
		c.endpoint.End()
	}
	if c.slot != nil && c.sides[down].moved+c.sides[up].moved == 0 && c.sides[down].fd >= 0 {
		markTouched(c.sides[down].fd)
	}
	for k := range c.sides {
		switch fd := c.sides[k].fd; {
		case fd < 0:
		case reset:
			w.abort(fd)
			fault(faultAborting)
		default:
			complete(fd)
		}
	}
	w.dropSide(c, down)
	w.dropSide(c, up)
	w.keepClosed(c)
	last := w.conns[len(w.conns)-1]
	w.conns[c.index] = last
	last.index = c.index
	w.conns[len(w.conns)-1] = nil
	w.conns = w.conns[:len(w.conns)-1]
	w.relay.live.Add(-1)
	if c.expires() {
		w.expiring--
	}
	if c.shared && w.relay.options.MaxPerGroup > 0 {
		w.relay.shares.give(c.target.Downstream.Group)
	}
	w.counters.ended.Add(1)
	w.reclaim(c)
}

// endAll ends the connections to an endpoint that was removed, and counts them. It
// does nothing when ctx is done: the endpoint may be there again.
func (w *worker) endAll(ctx context.Context, cluster string, endpoint netip.AddrPort) int {
	if ctx.Err() != nil {
		return 0
	}
	var all []*conn // ending one moves the others, and dialing may begin any
	for _, c := range w.conns {
		if c.endpoint != nil && c.endpoint.Addr == endpoint && c.target.Cluster.Name == cluster {
			all = append(all, c)
		}
	}
	w.tick()
	for _, c := range all {
		switch {
		case c.dead: // by what became of another
		case c.dialing:
			w.dialFailed(c, flow.ReasonEndpointRemoved)
		default:
			w.end(c, flow.ReasonEndpointRemoved, true)
		}
	}
	return len(all)
}

// reclaim gives a conn's memory back, unless the worker's again still names it.
func (w *worker) reclaim(c *conn) {
	if c.dead && !c.sides[down].queued && !c.sides[up].queued && c.index >= 0 {
		c.index = -1
		w.slab.put(c)
	}
}

// abort makes the coming close of a socket send a reset.
func (w *worker) abort(fd int32) {
	abort(fd)
	if w.relay.copied.Load() {
		sysDisconnect(fd)
	}
}

// dropSide closes the socket of side k and returns what it borrowed.
func (w *worker) dropSide(c *conn, k int) {
	s := &c.sides[k]
	if s.fd >= 0 {
		w.byFD[s.fd] = nil
		c.forgetFD(k)
		fault(faultClosing)
		if w.relay.copied.Load() {
			sysShutdown(s.fd)
		}
		sysClose(s.fd)
		fault(faultClosed)
		s.fd = -1
	}
	if c.dead {
		w.releaseRest(c, k)
		c.keepPipe(k, noPipe)
		w.pipes.put(s.pipe, s.inPipe)
		s.pipe, s.inPipe = noPipe, 0
	}
}

// record describes a connection as it is now.
func (w *worker) record(c *conn) flow.Record {
	d := &c.target.Downstream
	r := flow.Record{
		Cookie:   d.Cookie,
		Cgroup:   d.Cgroup,
		Source:   d.Source,
		OrigDst:  d.OrigDst.AddrPort,
		Service:  c.target.Terms.Service,
		Path:     flow.PathRelay,
		Reason:   d.Reason,
		Attempts: int(c.attempts),
		Start:    w.relay.start.Add(time.Duration(c.opened)),
		Duration: time.Duration(w.now - c.opened),
		Connect:  c.connected,
		Sent:     c.sides[down].moved,
		Received: c.sides[up].moved,
		Mirrored: c.mirrored,
		Open:     true,
	}
	if c.target.Cluster != nil {
		r.Cluster = c.target.Cluster.Name
	}
	r.Endpoint = w.dialedAddr(c)
	if fd := c.sides[up].fd; fd >= 0 && !c.dialing {
		r.RTT, r.Retransmits = tcpInfo(fd)
	}
	return r
}

// dialedAddr is what was dialed last.
func (w *worker) dialedAddr(c *conn) (none netip.AddrPort) {
	switch {
	case len(c.tried) > 0:
		return c.tried[len(c.tried)-1].Addr
	case c.attempts > 0:
		return c.target.Downstream.OrigDst.AddrPort
	default:
		return none
	}
}

// list describes every open connection of this worker.
func (w *worker) list() []flow.Record {
	w.tick()
	all := make([]flow.Record, 0, len(w.conns))
	for _, c := range w.conns {
		if !c.lingers { // else it is on record
			all = append(all, w.record(c))
		}
	}
	return all
}
