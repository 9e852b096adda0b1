package discover

import (
	"context"
	"slices"
)

// Teller sends what a [Source] finds as the source has to: a set that is the one
// told before is told again only after an error. It is for one goroutine.
type Teller struct {
	out   chan<- Snapshot
	last  []Endpoint
	lacks Lack // of last
	// told is true when last was told, standing while no error followed it. whole is
	// true since a set that lacked nothing: from then on the source remembers what
	// there was.
	told, standing, whole bool
}

// NewTeller returns a teller that has told nothing yet.
func NewTeller(out chan<- Snapshot) *Teller { return &Teller{out: out} }

// Set tells the whole set, which it sorts and keeps. Empty is an answer.
func (t *Teller) Set(ctx context.Context, endpoints []Endpoint) {
	Sort(endpoints)
	if t.standing && slices.Equal(t.last, endpoints) {
		return
	}
	t.tell(ctx, endpoints, 0)
}

// Part tells the best set that there is, of which families it may lack some, and why
// a part of it is old or missing. The set is sorted and kept; one that was told
// already is not told again.
func (t *Teller) Part(ctx context.Context, endpoints []Endpoint, lacks Lack, err error) {
	Sort(endpoints)
	if t.whole {
		lacks = 0
	}
	if !t.told || t.lacks != lacks || !slices.Equal(t.last, endpoints) {
		t.tell(ctx, endpoints, lacks)
	}
	t.Fail(ctx, err)
}

func (t *Teller) tell(ctx context.Context, endpoints []Endpoint, lacks Lack) {
	t.last, t.lacks, t.told, t.standing = endpoints, lacks, true, true
	t.whole = t.whole || lacks == 0
	t.send(ctx, Snapshot{Endpoints: slices.Clone(endpoints), Lacks: lacks})
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
