package main

import (
	"context"
	"maps"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/cmd/pillion/handover"
	"github.com/pillion-project/pillion/redirect/upstream/discover"
)

var somewhere = netip.MustParseAddrPort("10.0.0.1:80")

func goneOf(service string) gone { return gone{service, somewhere, somewhere} }

func is(service string) func(gone) bool { return func(g gone) bool { return g.service == service } }

// ender counts what is ended, by service, until the test ends. It must be made in a
// bubble.
type ender struct {
	mu    sync.Mutex
	ended map[string]int
	// slow, if set, is called first.
	slow func(ctx context.Context, g gone)
}

// newEnder makes removals, and has them carried out.
func newEnder(t *testing.T, slow func(ctx context.Context, g gone)) (*ender, *removals) {
	t.Helper()
	e := &ender{ended: map[string]int{}, slow: slow}
	r := &removals{ends: newEnds(e.end)}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { r.ends.run(ctx) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return e, r
}

// end is like the workers' share of it: nothing is done after ctx.
func (e *ender) end(ctx context.Context, g gone) {
	if e.slow != nil {
		e.slow(ctx, g)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if ctx.Err() == nil {
		e.ended[g.service]++
	}
}

// wants compares what was ended until nothing moves any more.
func (e *ender) wants(t *testing.T, when string, want map[string]int) {
	t.Helper()
	synctest.Wait()
	e.mu.Lock()
	defer e.mu.Unlock()
	if diff := cmp.Diff(want, maps.Clone(e.ended)); diff != "" {
		t.Errorf("%s: ended (-want +got)\n%s", when, diff)
	}
}

// TestRemovals: a reset ends what there is at once, and what was under way a moment
// later; a close ends in time; what is back is spared.
func TestRemovals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, r := newEnder(t, nil)
		r.add(goneOf("reset"), config.OnRemoveReset, time.Hour)
		r.add(goneOf("close"), config.OnRemoveClose, time.Minute)
		r.add(goneOf("keep"), config.OnRemoveKeep, 0)
		r.add(goneOf("back"), config.OnRemoveReset, 0)
		e.wants(t, "at once", map[string]int{"reset": 1, "back": 1})
		if n := len(r.spare(is("back"))); n != 1 {
			t.Errorf("%d were spared, want 1", n)
		}
		<-r.due()
		r.endDue()
		e.wants(t, "a moment later", map[string]int{"reset": 2, "back": 1})
		<-r.due()
		r.endDue()
		e.wants(t, "a minute later", map[string]int{"reset": 2, "back": 1, "close": 1})
		if r.due() != nil {
			t.Error("there is more to end")
		}
	})
}

// TestBackBeforeItsEnd: workers that are busy hold up no change. What comes back before
// they have done what was ordered is not ended any more, and what does not is, in order,
// when they come to it.
func TestBackBeforeItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		busy := make(chan struct{})
		e, r := newEnder(t, func(ctx context.Context, _ gone) {
			select {
			case <-busy:
			case <-ctx.Done():
			}
		})
		began := time.Now()
		for _, service := range []string{"first", "second", "third", "fourth"} {
			r.add(goneOf(service), config.OnRemoveReset, 0)
		}
		synctest.Wait() // the first is under way
		var spared [][]removal
		for _, service := range []string{"first", "third"} {
			spared = append(spared, r.spare(is(service)))
		}
		if len(spared[0]) != 2 || len(spared[1]) != 2 {
			t.Errorf("spared: %v, want of each what is now and what is later", spared)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("the changes took %s", took)
		}
		close(busy)
		e.wants(t, "the workers have come to it", map[string]int{"second": 1, "fourth": 1})
		// It did not come back: the change could not be put in force.
		r.restore(spared[1])
		e.wants(t, "it did not come back", map[string]int{"second": 1, "third": 1, "fourth": 1})
		<-r.due()
		r.endDue()
		e.wants(t, "a moment later", map[string]int{"second": 2, "third": 2, "fourth": 2})
		// And the one that did goes again.
		r.add(goneOf("first"), config.OnRemoveReset, 0)
		e.wants(t, "it goes again", map[string]int{"first": 1, "second": 2, "third": 2, "fourth": 2})
	})
}

// TestEndsStandStill: while nothing may change nothing is ended, and all that was
// ordered is there to be given away; or it goes on.
func TestEndsStandStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		busy := make(chan struct{})
		e, r := newEnder(t, func(ctx context.Context, _ gone) {
			select {
			case <-busy:
			case <-ctx.Done():
			}
		})
		r.add(goneOf("first"), config.OnRemoveReset, 0)
		r.add(goneOf("second"), config.OnRemoveReset, 0)
		r.add(goneOf("third"), config.OnRemoveClose, time.Hour)
		synctest.Wait()
		r.ends.pause()
		close(busy)
		e.wants(t, "at rest", map[string]int{})
		var order []string
		for _, p := range r.all() {
			order = append(order, p.service)
		}
		if diff := cmp.Diff([]string{"first", "second", "first", "second", "third"}, order); diff != "" {
			t.Errorf("what is to be done (-want +got)\n%s", diff)
		}
		r.ends.resume()
		e.wants(t, "it goes on", map[string]int{"first": 1, "second": 1})
	})
}

// TestEndsDone: who waits for the ends hears of the last one, and not for ever of workers
// that hang.
func TestEndsDone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		busy := make(chan struct{})
		e, r := newEnder(t, func(context.Context, gone) { <-busy })
		r.ends.done(t.Context()) // there is nothing
		r.add(goneOf("first"), config.OnRemoveReset, 0)
		r.add(goneOf("second"), config.OnRemoveReset, 0)
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), endsLimit)
		defer cancel()
		r.ends.done(ctx)
		if took := time.Since(began); took != endsLimit {
			t.Errorf("the workers hang: it waited for %s, want %s", took, endsLimit)
		}
		close(busy)
		r.ends.done(t.Context())
		e.mu.Lock()
		defer e.mu.Unlock()
		if diff := cmp.Diff(map[string]int{"first": 1, "second": 1}, e.ended); diff != "" {
			t.Errorf("when it was done (-want +got)\n%s", diff)
		}
	})
}

// TestInheritFormer: connections that a service had under another name, before the
// process that it was renamed in gave it away, are ended too.
func TestInheritFormer(t *testing.T) {
	other := netip.AddrPortFrom(somewhere.Addr(), 81)
	b := service{Service: config.Service{Name: "b", Addr: somewhere, OnRemove: config.OnRemoveReset}, known: true}
	b.endpoints = []discover.Endpoint{{Addr: other}}
	gave := handover.Service{Name: "b", Addr: somewhere, Endpoints: []handover.Endpoint{{Addr: somewhere}, {Addr: other}}}
	former := map[string][]formerly{"b": {{"a", somewhere}}}
	want := map[gone]bool{goneOf("a"): true, goneOf("b"): true}
	for how, begin := range map[string]func(c *control){
		"take-over": func(c *control) { c.inherit(&handed{Services: []handover.Service{gave}, Former: former}) },
		"restart": func(c *control) {
			last := b
			last.endpoints = endpointsOf(&gave)
			c.removedBefore([]service{last}, &note{Former: former})
		},
	} {
		c := newControl(&instance{plan: plan{config: &config.Config{}}})
		c.services = listingOf([]service{b})
		begin(c)
		got := map[gone]bool{}
		for _, r := range c.removals.all() {
			got[r.gone] = true
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(gone{}), cmpopts.EquateComparable(netip.AddrPort{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", how, diff)
		}
	}
}
