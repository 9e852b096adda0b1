package dns

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
)

// How long a failed look-up waits for the next one: from firstWait, doubled up to
// lastWait, and never longer than MaxTTL.
const (
	firstWait = time.Second
	lastWait  = 30 * time.Second
)

// Source is the endpoints that one name has.
type Source struct {
	options Options
	lookup  *lookup
	failed  int // look-ups in a row
	// chance returns a duration below the one given; tests have it return 0.
	chance func(below time.Duration) time.Duration
}

// New returns the source that looks up what o says, or everything that is wrong
// with o. It may be run again, and once at a time.
func New(o Options) (*Source, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	o = o.withDefaults()
	c := &client{exempt: o.Exempt, limit: o.Limit}
	return &Source{options: o, lookup: newLookup(o, c.ask), chance: rand.N[time.Duration]}, nil
}

// Run is as in [discover.Source]. Addresses are an answer, and so is an SRV record
// that says that there is no service (its target is "."). A name that does not
// exist or has no addresses is an error, as a server that fails is.
func (s *Source) Run(ctx context.Context, out chan<- discover.Snapshot) error {
	t := discover.NewTeller(out)
	for ctx.Err() == nil {
		wait := s.tell(ctx, t)
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
	return nil
}

// tell looks the name up once, tells what came of it, and returns when to do so
// again.
func (s *Source) tell(ctx context.Context, t *discover.Teller) time.Duration {
	f, err := s.find(ctx)
	if ctx.Err() != nil {
		return 0 // that is what failed it
	}
	if m, ok := errors.AsType[*missing](err); ok {
		s.failed = 0
		t.Fail(ctx, err)
		return s.hold(max(m.ttl, 0))
	}
	if err != nil {
		t.Fail(ctx, err)
		return s.backOff()
	}
	if f.failed != nil {
		t.Part(ctx, f.endpoints, f.lacks, fmt.Errorf("look up %s: %w", s.options.Name, f.failed))
		return min(s.backOff(), s.hold(f.ttl))
	}
	t.Set(ctx, f.endpoints)
	s.failed = 0
	return s.hold(f.ttl)
}

func (s *Source) find(ctx context.Context) (*found, error) {
	r, err := s.options.resolver()
	if err != nil {
		return nil, err
	}
	f, err := s.lookup.run(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("look up %s: %w", s.options.Name, err)
	}
	return f, nil
}

// hold returns how long to wait when an answer holds for ttl. It is longer by up to
// a tenth: a server that has the answer cached counts the rest of the time down,
// and is to have a fresh one when it is asked; and many sources that began at once
// do not stay in step.
func (s *Source) hold(ttl time.Duration) time.Duration {
	ttl = min(max(ttl, s.options.MinTTL), s.options.MaxTTL)
	return ttl + s.chance(ttl/10)
}

// backOff returns how long to wait after one more failure.
func (s *Source) backOff() time.Duration {
	wait := min(firstWait<<min(s.failed, 5), lastWait, s.options.MaxTTL)
	s.failed++
	return wait - s.chance(wait/4)
}
