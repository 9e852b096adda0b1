package l4

import (
	"math"
	"net/netip"
	"syscall"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

// Queue is how a worker hears of connections whose handshake waits for its dial,
// and how it ends that handshake. One thread uses it.
type Queue interface {
	// FD is readable when there is news, Next reads it.
	FD() int
	Next(h *flow.Held) bool
	// Finish makes the connection one that can be accepted; Release lets the
	// application know.
	Finish(h *flow.Held) error
	Release(h *flow.Held) error
	// Refuse makes the application's connect fail with e, unless the kernel
	// misses it: as long as Waits says that the socket is there, it has.
	Refuse(h *flow.Held, e syscall.Errno) error
	Waits(h *flow.Held, cookie uint64) bool
	// Forget ends what the kernel keeps for a connection that will not be.
	Forget(h *flow.Held) error
}

const (
	// waitsEvery is how often it is looked whether an application still waits:
	// that it gave up may have been lost on the way.
	waitsEvery = time.Second
	// refusals is how often a refusal is repeated that the kernel missed, the
	// first time at once and then every refuseEvery. It misses one that
	// arrives while connect(2) is at work on another processor.
	refusals    = 200
	refuseEvery = int64(time.Millisecond)

	// releaseEvery is how often an answer is repeated that nobody seems to
	// have got, releases how many times: until the application's kernel sends
	// its SYN again.
	releaseEvery = int64(100 * time.Millisecond)
	releases     = 8

	// answeredFor is how long an answered dial makes connections to the same
	// destination early, and answeredAgain how soon that is said again.
	answeredFor   = 5 * time.Second
	answeredAgain = time.Second
	// answeredMost bounds what a worker remembers of that.
	answeredMost = 4096
)

// errStopped ends a connection that nobody will accept.
var errStopped = flow.NewError(flow.ReasonDrained, "the listeners are closed")

// heldKey names a connection: the application's address, and the slot.
type heldKey struct{ source, slot netip.AddrPort }

func keyOf(h *flow.Held) heldKey { return heldKey{h.Source, h.Slot} }

// held is what a connection has for as long as its handshake waits.
type held struct {
	flow.Held
	silent  bool  // nobody answered: it waits with the application
	reset   bool  // the endpoint has reset it already
	checked int64 // when it was looked whether the application still waits
}

// release is an answer that the application has been given, until it shows that it
// has it.
type release struct {
	held *held
	fd   int32 // of its side
	gen  uint32
	at   int64
	left int
	// segments is how many had come when it was given the answer: its SYN, and what
	// ended the handshake in its name, but for SYNs that came again.
	segments int
}

// refusal is one that the application's kernel has missed so far.
type refusal struct {
	held   *held
	cookie uint64
	errno  syscall.Errno
	left   int
}

// takeNews reads the queue. What it leaves is still there in the next turn.
func (w *worker) takeNews() {
	h := &w.news
	for range eventsPerWait {
		if !w.queue.Next(h) {
			return
		}
		switch c := w.held[keyOf(h)]; {
		case c == nil && !h.Gone:
			w.hold(h)
		case c == nil: // refused, or early by now
		case h.Gone:
			w.end(c, flow.ReasonAbandoned, true)
		case !w.waits(c): // its end was lost, and another socket has its port
			w.end(c, flow.ReasonAbandoned, true)
			w.hold(h)
		default:
			w.holdAgain(c, h)
		}
	}
}

// hold begins a connection whose application waits for the dial.
func (w *worker) hold(h *flow.Held) {
	if int(w.relay.live.Load()) >= w.relay.options.MaxConns {
		// The answer is sent again after a second, as to anybody who waits for
		// a busy server.
		w.counters.pauses.Add(1)
		return
	}
	target, err := w.relay.director.Direct(h.Slot, h.Source)
	if flow.ReasonOf(err) == flow.ReasonNotOurs {
		// It gave up before anybody looked, and the kernel side says so.
		w.injected(w.queue.Forget(h))
		return
	}
	if !target.Downstream.Waits {
		return // a later answer was let through, and it is accepted as any
	}
	c := w.start(target, err)
	c.held, c.mirrored = w.keep(h), true
	w.keepConn(c)
	c.keepFlag(keptMirrored)
	w.held[keyOf(h)] = c
	if err == nil && !c.shared {
		err = errShare
	}
	if w.stopped {
		err = errStopped
	}
	if err != nil {
		w.end(c, flow.ReasonOf(err), true)
		return
	}
	w.dial(c)
}

// holdAgain hears that the application has sent its SYN again, or the kernel its
// answer.
func (w *worker) holdAgain(c *conn, h *flow.Held) {
	// The younger answer has the younger timestamps.
	c.held.Held = *h
	switch {
	case c.held.silent:
		// Somebody may be there by now: that is what the SYN is sent for.
		c.held.silent = false
		w.dialAnew(c)
	case !c.dialing:
		w.injected(w.queue.Finish(h)) // there was no room for it
	case c.endless && w.named(c):
		w.dialAnew(c)
	default:
	}
}

// dialAnew begins another round of dials.
func (w *worker) dialAnew(c *conn) {
	c.began, c.round, c.last = w.now, 0, flow.ReasonNone
	c.tried = c.tried[:0]
	w.dial(c)
}

// waits tells whether the application of a held connection is still there.
func (w *worker) waits(c *conn) bool {
	c.held.checked = w.now
	return w.queue.Waits(&c.held.Held, c.target.Downstream.Cookie)
}

// keep copies h to memory that lasts.
func (w *worker) keep(h *flow.Held) *held {
	var k *held
	if n := len(w.spareHeld); n > 0 {
		k = w.spareHeld[n-1]
		w.spareHeld = w.spareHeld[:n-1]
	} else {
		k = new(held)
	}
	*k = held{Held: *h, checked: w.now}
	return k
}

// let gives the memory back.
func (w *worker) let(h *held) {
	if len(w.spareHeld) < buffersKept {
		w.spareHeld = append(w.spareHeld, h)
	}
}

// injected counts what could not be sent. What it was for then takes until the
// kernel sends its answer again, or the application its SYN.
func (w *worker) injected(err error) {
	if err != nil {
		w.counters.notInjected.Add(1)
	}
}

// arrive takes up the accepted socket of a connection that was held.
func (w *worker) arrive(c *conn, fd int32) {
	h := c.held
	delete(w.held, keyOf(&h.Held))
	c.held = nil
	answered := !c.dialing && !h.silent
	if answered {
		c.keepHeld(&h.Held)
	}
	w.adopt(c, down, fd)
	fault(faultArrived)
	c.sides[down].tuned = true // inherited from the listener
	if !answered {
		w.let(h)
		w.arriveEarly(c)
		return
	}
	w.injected(w.queue.Release(&h.Held))
	fault(faultReleased)
	w.released = append(w.released, release{held: h, fd: fd, gen: c.sides[down].gen, at: w.now, left: releases, segments: 2})
	w.follow(c, down)
	if c.dead {
		return
	}
	if c.sides[up].readable {
		w.pump(c, up)
	}
	if h.reset && !c.dead {
		w.broken(c, up)
	}
}

// releaseAgain repeats answers that nobody seems to have got: a busy processor's
// queue drops what comes by lo, and the kernel, for which the handshake is over,
// does not send this one again. One too many does no harm.
func (w *worker) releaseAgain() {
	for len(w.released) > 0 && w.now-w.released[0].at >= releaseEvery {
		r := w.released[0]
		w.released = w.released[1:]
		c := w.byFD[r.fd]
		if r.left == 0 || c == nil || c.sides[down].gen != r.gen || c.heard(r.segments) {
			if c != nil && c.sides[down].gen == r.gen {
				c.heardOf()
			}
			w.let(r.held)
			continue
		}
		w.injected(w.queue.Release(&r.held.Held))
		r.left--
		r.at = w.now
		w.released = append(w.released, r)
	}
	if len(w.released) == 0 {
		w.released = nil
	}
}

// heard tells whether the application has sent anything but so many segments.
func (c *conn) heard(segments int) bool {
	s := &c.sides[down]
	return s.moved > 0 || s.fin || s.eof || sysSegmentsIn(s.fd) > segments
}

// arriveEarly goes on as if the connection had never been held: its answer was
// let through.
func (w *worker) arriveEarly(c *conn) {
	w.readFirst(c)
	if c.dead {
		return
	}
	if c.dialing {
		// The time that it has waited for is not counted: up to now it was
		// the application's to say for how long.
		c.began = w.now
		w.limit(c)
	} else {
		w.dialAnew(c)
	}
	if !c.dead {
		w.follow(c, down)
	}
}

// refuseHeld gives the application the result of a connection that ends before
// its handshake has.
func (w *worker) refuseHeld(c *conn, why flow.Reason) {
	w.counters.refused.Add(1)
	h, cookie := c.held, c.target.Downstream.Cookie
	delete(w.held, keyOf(&h.Held))
	c.held = nil
	if why == flow.ReasonAbandoned {
		w.injected(w.queue.Forget(&h.Held))
		w.let(h)
		return
	}
	e := c.errnoOf(why)
	w.injected(w.queue.Refuse(&h.Held, e))
	w.injected(w.queue.Forget(&h.Held))
	if w.queue.Waits(&h.Held, cookie) {
		w.unheard = append(w.unheard, refusal{held: h, cookie: cookie, errno: e, left: refusals})
		return
	}
	w.let(h)
}

// errnoOf is what the application's connect returns.
func (c *conn) errnoOf(why flow.Reason) syscall.Errno {
	switch why {
	case flow.ReasonDialUnreachable, flow.ReasonDialFailed:
		return syscall.Errno(c.errno)
	case flow.ReasonNoEndpoint:
		if e := c.target.Cluster.NoEndpoint; e != 0 {
			return e
		}
	default:
	}
	return unix.ECONNREFUSED
}

// refuseAgain repeats what was missed. A busy worker comes here far more often
// than once a millisecond.
func (w *worker) refuseAgain() {
	if w.now-w.repeated < refuseEvery {
		return
	}
	w.repeated = w.now
	kept := w.unheard[:0]
	for _, r := range w.unheard {
		if r.left == 0 || !w.queue.Waits(&r.held.Held, r.cookie) {
			// When it was missed for good, the next SYN is a new attempt.
			w.let(r.held)
			continue
		}
		r.left--
		w.injected(w.queue.Refuse(&r.held.Held, r.errno))
		kept = append(kept, r)
	}
	clear(w.unheard[len(kept):])
	w.unheard = kept
}

// giveUp ends a connection whose dials all failed.
func (w *worker) giveUp(c *conn, why flow.Reason) {
	// A lack of ours says nothing about the destination, and is no answer
	// either: the next SYN may find us better off.
	own := why == flow.ReasonNoDescriptors
	if !own {
		w.tell(c, false)
	}
	if c.held == nil || why != flow.ReasonDialTimeout && !own {
		w.end(c, why, true)
		return
	}
	if w.stopping {
		w.end(c, flow.ReasonDrained, true) // as in stopAccepting
		return
	}
	// Nobody answered, so nobody does: the application waits for as long as
	// it would. With its next SYN comes the next dial.
	c.held.silent = true
	if c.endpoint != nil {
		c.endpoint.End()
		c.endpoint = nil
	}
}

// tell passes on what became of a dial, for the connect hook.
func (w *worker) tell(c *conn, answered bool) {
	o := &w.relay.options
	if c.target.Cluster != nil && o.Unavailable != nil {
		o.Unavailable(&c.target)
	}
	if o.Answered == nil {
		return
	}
	dst := c.target.Downstream.OrigDst.AddrPort
	if !answered {
		delete(w.told, dst)
		o.Answered(dst, 0)
		return
	}
	if last, known := w.told[dst]; known && w.now-last < int64(answeredAgain) {
		return
	}
	if len(w.told) >= answeredMost {
		clear(w.told)
	}
	w.told[dst] = w.now
	o.Answered(dst, answeredFor)
}

// dialDeadline is when the present dial is given up.
func (w *worker) dialDeadline(c *conn) int64 {
	l := c.target.Terms
	if c.held != nil && c.target.Cluster == nil {
		// There is nobody else to try: it takes as long as the application's
		// own kernel would have tried.
		return math.MaxInt64
	}
	// The round began after the dial if the answer was let through meanwhile.
	return min(max(c.dialed, c.began)+int64(l.DialTimeout), c.began+int64(l.DialBudget))
}
