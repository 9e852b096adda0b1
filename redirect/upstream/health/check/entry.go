package check

import (
	"container/heap"
	"context"
	"time"
)

// entry is a target that is checked. A target whose Spec changes gets a new one.
// The checker's lock guards it.
type entry struct {
	target Target
	status Status
	lane   *lane
	due    time.Time
	place  int // in the lane's queue, while it waits there
	// began and cancel belong to the check that is under way; cancel is nil while
	// the entry waits.
	began   time.Time
	cancel  context.CancelFunc
	removed bool // nobody wants to hear of it any more
}

// judge takes a result into account. It returns the change that this makes, if
// any.
func (e *entry) judge(now time.Time, err error) (Change, bool) {
	s, spec := &e.status, &e.target.Spec
	s.Checked, s.Latency, s.Err = now, now.Sub(e.began), ""
	found, enough := StateUp, spec.Healthy
	if err != nil {
		s.Err = err.Error()
		if isOwn(err) {
			return Change{}, false
		}
		found, enough = StateDown, spec.Unhealthy
	}
	if found == StateUp {
		s.Passed++
	} else {
		s.Failed++
	}
	if found == s.State {
		s.Against = 0
		return Change{}, false
	}
	s.Against++
	if s.State != StateUnknown && s.Against < enough {
		return Change{}, false
	}
	s.State, s.Since, s.Against = found, now, 0
	return Change{Cluster: s.Cluster, Addr: s.Addr, State: found, Err: err}, true
}

// lane is the targets of which a number may be checked at once. What is overdue
// comes in the order in which it was due, so that all are late alike.
type lane struct {
	queue   queue
	running int
	most    int
	late    bool // and it was said
}

func (l *lane) push(e *entry, due time.Time) {
	e.due = due
	heap.Push(&l.queue, e)
}

func (l *lane) take(e *entry) { heap.Remove(&l.queue, e.place) }

// queue is the heap of what waits; the first is due first.
type queue []*entry

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].due.Before(q[j].due) }

func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].place, q[j].place = i, j
}

// Push is heap.Interface's, and for package heap alone.
func (q *queue) Push(x any) {
	e := x.(*entry)
	e.place = len(*q)
	*q = append(*q, e)
}

// Pop is heap.Interface's, and for package heap alone.
func (q *queue) Pop() any {
	last := len(*q) - 1
	e := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	return e
}
