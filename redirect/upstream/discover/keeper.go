package discover

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// How long a source that has ended is left alone before it is run again: from
// firstWait, doubled up to lastWait. A run that lasted longer than lastWait
// begins anew.
const (
	firstWait = time.Second
	lastWait  = time.Minute
)

// State is what a [Keeper] knows at one moment.
type State struct {
	// Endpoints is the last good set, sorted by address. It is shared and must
	// not be changed.
	Endpoints []Endpoint
	// Generation counts the good sets that differed from the one before. 0 means
	// that there was none yet: Endpoints is then empty because nothing is known,
	// and later because the source says so.
	Generation uint64
	// Lacks is as in [Snapshot]; see [State.With].
	Lacks Lack
	// Changed is when Endpoints last changed.
	Changed time.Time
	// Since is when the source last stood by Endpoints: now for as long as there
	// is no Err, and else when the first Err came. Zero is never. Its age is
	// the staleness of the set.
	Since time.Time
	// Err is why the source cannot tell at present, or nil.
	Err error
	// Failures counts the errors that the source told, Restarts how often it had
	// to be run again.
	Failures, Restarts uint64
}

// With returns Endpoints and those of before, which was in force when there were
// none, that are not in it only because nobody knows. What Endpoints say of an
// address counts. It is sorted, and the caller's.
func (s *State) With(before []Endpoint) []Endpoint {
	all := slices.Clone(s.Endpoints)
	for _, e := range before {
		_, told := slices.BinarySearchFunc(s.Endpoints, e.Addr, func(e Endpoint, a netip.AddrPort) int { return e.Addr.Compare(a) })
		if !told && s.Lacks.Of(e.Addr.Addr()) && len(all) < MaxEndpoints {
			all = append(all, e)
		}
	}
	Sort(all)
	return all
}

// Keeper runs one source and keeps its last good set, whatever comes after it.
type Keeper struct {
	source  Source
	changed func(State)
	ready   chan struct{}

	mu    sync.Mutex // guards state
	state State
}

// NewKeeper returns a keeper of what source finds. changed is called whenever the
// set has changed, and when an error begins or ends; one call at a time, by the
// goroutine of [Keeper.Run], which waits for it. It may be nil.
func NewKeeper(source Source, changed func(State)) *Keeper {
	if changed == nil {
		changed = func(State) {}
	}
	return &Keeper{source: source, changed: changed, ready: make(chan struct{})}
}

// Ready is closed when the source has given its first answer, or its first error.
func (k *Keeper) Ready() <-chan struct{} { return k.ready }

// State returns what is known now. It is safe for concurrent use.
func (k *Keeper) State() State {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.state
	if s.Err == nil && s.Generation > 0 {
		s.Since = time.Now()
	}
	return s
}

// Run runs the source until ctx is done, and then returns nil. A source that ends
// before that is run again after a while.
func (k *Keeper) Run(ctx context.Context) error {
	var wait time.Duration
	for {
		began := time.Now()
		err := k.run(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			err = errors.New("the source ended")
		}
		k.take(Snapshot{Err: err})
		if time.Since(began) > lastWait {
			wait = 0
		}
		wait = min(max(2*wait, firstWait), lastWait)
		if !sleep(ctx, wait-rand.N(wait/4)) {
			return nil
		}
		k.mu.Lock()
		k.state.Restarts++
		k.mu.Unlock()
	}
}

// run runs the source once and takes what it sends.
func (k *Keeper) run(ctx context.Context) error {
	if f, ok := k.source.(Follower); ok {
		return f.Follow(ctx, func(s Snapshot) {
			if ctx.Err() == nil {
				k.take(s)
			}
		})
	}
	out := make(chan Snapshot)
	ended := make(chan error, 1)
	go k.drive(ctx, out, ended)
	for s := range out {
		if ctx.Err() == nil {
			k.take(s)
		}
	}
	return <-ended
}

func (k *Keeper) drive(ctx context.Context, out chan<- Snapshot, ended chan<- error) {
	defer close(out)
	ended <- k.source.Run(ctx, out)
}

// take makes s the state.
func (k *Keeper) take(s Snapshot) {
	if s.Err == nil {
		s.Endpoints, s.Err = clean(s.Endpoints)
	}
	k.mu.Lock()
	st := &k.state
	tell := (s.Err == nil) != (st.Err == nil)
	if s.Err == nil && s.Lacks != st.Lacks {
		st.Lacks, tell = s.Lacks, true
	}
	now := time.Now()
	switch {
	case s.Err != nil:
		if st.Err == nil && st.Generation > 0 {
			st.Since = now
		}
		st.Failures++
	case st.Generation == 0 || !slices.Equal(st.Endpoints, s.Endpoints):
		st.Endpoints, st.Changed = s.Endpoints, now
		st.Generation++
		tell = true
	default:
	}
	st.Err = s.Err
	k.mu.Unlock()
	if tell {
		k.changed(k.State())
	}
	select {
	case <-k.ready:
	default:
		close(k.ready)
	}
}

// clean brings a source's set into the form that all sets have. A set with an
// endpoint that can be none is no good set.
func clean(endpoints []Endpoint) ([]Endpoint, error) {
	all := slices.Clone(endpoints)
	for i := range all {
		e := &all[i]
		e.Addr = netip.AddrPortFrom(e.Addr.Addr().Unmap(), e.Addr.Port())
		err := CheckAddr(e.Addr.Addr())
		switch {
		case err != nil:
		case e.Addr.Port() == 0:
			err = fmt.Errorf("%s has no port", e.Addr)
		case e.Weight < 1 || e.Weight > MaxWeight:
			err = fmt.Errorf("%s has weight %d: want 1 to %d", e.Addr, e.Weight, MaxWeight)
		default:
		}
		if err != nil {
			return nil, fmt.Errorf("endpoint %w", err)
		}
	}
	Sort(all)
	all = slices.CompactFunc(all, func(a, b Endpoint) bool { return a.Addr == b.Addr })
	// Who took them could take nothing of anybody else either.
	if n := len(all); n > MaxEndpoints {
		return nil, fmt.Errorf("%d endpoints: want at most %d", n, MaxEndpoints)
	}
	return all, nil
}

// sleep waits for d, and returns false if ctx is done before.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
