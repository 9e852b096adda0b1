package discover

import (
	"context"
	"slices"
)

// Teller sends what a [Source] finds as the source has to: a set that is the one
// told before is told again only after an error. It is for one goroutine.
type Teller struct {
	out  chan<- Snapshot
	last []Endpoint
	// standing is true while last is what the receiver goes by.
	standing bool
}

// NewTeller returns a teller that has told nothing yet.
func NewTeller(out chan<- Snapshot) *Teller { return &Teller{out: out} }

// Set tells the whole set, which it sorts and keeps. Empty is an answer.
func (t *Teller) Set(ctx context.Context, endpoints []Endpoint) {
	Sort(endpoints)
	if t.standing && slices.Equal(t.last, endpoints) {
		return
	}
	t.last, t.standing = endpoints, true
	t.send(ctx, Snapshot{Endpoints: slices.Clone(endpoints)})
}

// Fail tells why there is no set.
func (t *Teller) Fail(ctx context.Context, err error) {
	t.standing = false
	t.send(ctx, Snapshot{Err: err})
}

func (t *Teller) send(ctx context.Context, s Snapshot) {
	select {
	case t.out <- s:
	case <-ctx.Done():
	}
}
