package events

import (
	"container/list"
	"slices"
	"sync/atomic"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
)

const (
	// patience is how long one side's record waits for the other's.
	patience = 2 * time.Second
	// pendingMax bounds the records that wait. It is some 6 MB.
	pendingMax = 16384
)

// side says who told of a connection.
type side uint8

const (
	fromHandler side = iota
	fromKernel
)

// key names one connection. The cookie names its socket, which may connect again
// after a refused attempt; the port tells these connections apart. It is not the
// address, whose spelling (zone, mapped) the two sides need not share.
type key struct {
	cookie uint64
	port   uint16
}

// waiting is a record whose other half has not come yet.
type waiting struct {
	record flow.Record
	key    key
	side   side
	since  time.Time
}

// joiner makes one record of the two halves of a connection on relay. It is not
// safe for concurrent use, but for unmatched.
type joiner struct {
	// emit takes what is complete or will not be completed.
	emit func(*flow.Record)
	// single is set when only one side exists: nothing is worth a wait.
	single bool
	// max bounds how many wait.
	max int
	// byKey holds those that wait, oldest first. All of a key are of one side,
	// or else they would have been joined. More than one is rare: an
	// application that bound its port and connected again.
	byKey map[key][]*list.Element
	// order holds the same as *waiting, oldest first.
	order list.List
	// unmatched counts halves whose other half must have existed.
	unmatched atomic.Uint64
}

func newJoiner(single bool, limit int, emit func(*flow.Record)) *joiner {
	return &joiner{emit: emit, single: single, max: limit, byKey: map[key][]*list.Element{}}
}

// add takes one side's half. It is emitted with the other half if that is here,
// and waits for it otherwise.
func (j *joiner) add(from side, r *flow.Record, now time.Time) {
	k := key{cookie: r.Cookie, port: r.Source.Port()}
	// The handler does not know the cookie of a connection that it refused as
	// not ours.
	if j.single || k.cookie == 0 {
		j.emit(r)
		return
	}
	if queue := j.byKey[k]; len(queue) > 0 && queue[0].Value.(*waiting).side != from {
		other := j.take(queue[0])
		joined := join(from, r, &other.record)
		j.emit(&joined)
		return
	}
	if j.order.Len() >= j.max {
		j.giveUp(j.order.Front())
	}
	w := &waiting{record: *r, key: k, side: from, since: now}
	j.byKey[k] = append(j.byKey[k], j.order.PushBack(w))
}

// join merges r, which came from the given side, with the other side's.
func join(from side, r, other *flow.Record) flow.Record {
	if from == fromHandler {
		return merge(r, other)
	}
	return merge(other, r)
}

// due tells whether a record has waited long enough.
func (j *joiner) due(now time.Time) bool {
	e := j.order.Front()
	return e != nil && now.Sub(e.Value.(*waiting).since) >= patience
}

// expire emits what has waited long enough, but for connections that the handler
// still carries: an application may have closed its side long before the endpoint
// closes the other.
func (j *joiner) expire(now time.Time, carried map[key]bool) {
	if len(carried) > 0 {
		j.renew(now, carried)
	}
	for j.due(now) {
		j.giveUp(j.order.Front())
	}
}

// renew has all halves wait anew that wait for what the handler carries, also those
// that are not due: to ask the handler is not cheap.
func (j *joiner) renew(now time.Time, carried map[key]bool) {
	e := j.order.Front()
	for range j.order.Len() {
		next, w := e.Next(), e.Value.(*waiting)
		if w.side == fromKernel && carried[w.key] {
			w.since = now
			j.order.MoveToBack(e)
		}
		e = next
	}
}

// flush emits everything that waits. It counts none as unmatched: the other
// halves were not given the time to come.
func (j *joiner) flush() {
	for e := j.order.Front(); e != nil; e = j.order.Front() {
		j.emit(&j.take(e).record)
	}
}

// forget drops everything that waits: somebody else has it.
func (j *joiner) forget() {
	j.order.Init()
	clear(j.byKey)
}

// pending is how many wait.
func (j *joiner) pending() int { return j.order.Len() }

// giveUp emits one half alone.
func (j *joiner) giveUp(e *list.Element) {
	w := j.take(e)
	// A connection that was refused or never answered did not reach the
	// handler: it has no other half.
	if w.side == fromHandler || w.record.End == flow.ReasonHandlerLost {
		j.unmatched.Add(1)
	}
	j.emit(&w.record)
}

// take removes e.
func (j *joiner) take(e *list.Element) *waiting {
	w := j.order.Remove(e).(*waiting)
	queue := slices.DeleteFunc(j.byKey[w.key], func(other *list.Element) bool { return other == e })
	if len(queue) > 0 {
		j.byKey[w.key] = queue
	} else {
		delete(j.byKey, w.key)
	}
	return w
}
