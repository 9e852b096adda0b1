package l4

import (
	"context"
	"errors"
	"fmt"
)

// Frozen is a relay whose workers stand still, each between two events: nothing is
// accepted, read, written or closed. One of Thaw and Leave must be called.
type Frozen struct {
	relay   *Relay
	given   Given
	decided chan struct{}
	leave   bool // valid when decided is closed
	left    []chan struct{}
}

// Freeze stops all workers and returns what they carry. Until Thaw or Leave the open
// connections pause.
//
// It changes nothing, so Thaw has the workers go on as if it had never been called.
// To move the connections of one worker after the other was rejected: what the other
// process has begun to read could not be taken back from it when it dies.
func (r *Relay) Freeze(ctx context.Context) (*Frozen, error) {
	f := &Frozen{relay: r, decided: make(chan struct{}), given: Given{Workers: len(r.workers)}}
	parts := make([]chan Given, 0, len(r.workers))
	for i, w := range r.workers {
		part, left := make(chan Given, 1), make(chan struct{})
		if !w.post(func() { w.stand(f, i, part, left) }) {
			f.Thaw()
			return nil, errors.New("freeze connections: a worker has ended")
		}
		parts, f.left = append(parts, part), append(f.left, left)
	}
	for _, part := range parts {
		select {
		case p := <-part:
			f.given.Conns = append(f.given.Conns, p.Conns...)
			f.given.Refusals = append(f.given.Refusals, p.Refusals...)
		case <-ctx.Done():
			f.Thaw()
			return nil, fmt.Errorf("freeze connections: a worker does not come to rest: %w", context.Cause(ctx))
		}
	}
	return f, nil
}

// Given returns what the workers carry. The descriptors stay theirs, and it is good
// until Thaw or Leave.
func (f *Frozen) Given() *Given { return &f.given }

// Copied notes that another process may have copies of the descriptors, before Thaw: for
// as long as it has, a close ends nothing. From then on connections are ended in so many
// words.
func (f *Frozen) Copied() {
	f.relay.copied.Store(true)
	if r := f.relay.options.Registry; r != nil {
		r.head.copied = 1
	}
}

// Thaw has the workers go on.
func (f *Frozen) Thaw() { close(f.decided) }

// Leave makes the relay forget its connections, without closing a descriptor of
// theirs, since another has them now. Its workers end, and so does Run.
func (f *Frozen) Leave() {
	f.leave = true
	close(f.decided)
	for _, left := range f.left {
		<-left
	}
}

// stand describes what the worker has, and waits for what is to become of it.
func (w *worker) stand(f *Frozen, index int, part chan<- Given, left chan<- struct{}) {
	defer close(left)
	w.tick()
	part <- w.give(index)
	w.waiting.Store(true) // it does not hang
	<-f.decided
	w.waiting.Store(false)
	if f.leave {
		w.leave()
	}
}

func (w *worker) give(index int) Given {
	g := Given{Conns: make([]Carried, 0, len(w.conns))}
	for _, c := range w.conns {
		g.Conns = append(g.Conns, w.carry(c, index))
	}
	for _, r := range w.released {
		c := w.byFD[r.fd]
		if r.left > 0 && c != nil && c.sides[down].gen == r.gen {
			held := r.held.Held
			g.Conns[c.index].Released, g.Conns[c.index].Repeats = &held, r.left
		}
	}
	for _, r := range w.unheard {
		g.Refusals = append(g.Refusals, CarriedRefusal{
			Worker: index, Held: r.held.Held, Cookie: r.cookie, Errno: uint16(r.errno), Left: r.left,
		})
	}
	return g
}

// leave forgets everything. What events are still to be handled find nobody.
func (w *worker) leave() {
	for _, c := range w.conns {
		if c.endpoint != nil {
			c.endpoint.End()
		}
		if c.shared && w.relay.options.MaxPerGroup > 0 {
			w.relay.shares.give(c.target.Downstream.Group)
		}
		for k := range c.sides {
			if fd := c.sides[k].fd; fd >= 0 {
				w.byFD[fd] = nil
			}
		}
	}
	w.relay.live.Add(-int64(len(w.conns)))
	w.conns, w.again, w.waiters, w.unheard, w.released = nil, nil, nil, nil, nil
	w.held, w.owing = map[heldKey]*conn{}, owing{}
	w.dialing, w.endless, w.expiring, w.queueFD = 0, 0, 0, -1
	w.closeListeners()
	w.stopping, w.stopped, w.paused = true, true, false
}
