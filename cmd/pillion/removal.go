package main

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/redirect/upstream"
)

// removals has connections to endpoints that are gone ended, at once or after a time.
// It belongs to the goroutine of control.
type removals struct {
	ends    *ends
	pending []removal // by time
	timer   *time.Timer
}

// removal is what is to be ended at a time, which was so far off when it was said. due is
// the same time, in ns of CLOCK_MONOTONIC.
type removal struct {
	gone
	at    time.Time
	due   int64
	after time.Duration
}

// add does what a service wants to become of connections to an endpoint.
func (r *removals) add(g gone, how config.OnRemove, after time.Duration) {
	switch how {
	case config.OnRemoveReset:
		r.ends.put(g)
		r.later(g, lateConnects)
	case config.OnRemoveClose:
		r.later(g, after)
	case config.OnRemoveKeep:
	}
}

// lateConnects is when is looked once more for connections to end: a connect that
// was sent to an endpoint a moment before it was gone is no socket to be found yet.
const lateConnects = time.Second

func (r *removals) later(g gone, after time.Duration) {
	next := removal{g, time.Now().Add(after), monotonicNow() + int64(after), after}
	// Behind those of the same time, so at the end where many go at once.
	n, _ := slices.BinarySearchFunc(r.pending, next.at, func(p removal, at time.Time) int {
		if p.at.After(at) {
			return 1
		}
		return -1
	})
	r.pending = slices.Insert(r.pending, n, next)
	r.arm()
}

// spare forgets endpoints that are back, and returns what was to be done with them.
// From then on nothing is ended that began later. It comes before anybody is connected
// to them.
func (r *removals) spare(back func(gone) bool) (spared []removal) {
	r.pending = slices.DeleteFunc(r.pending, func(p removal) bool {
		is := back(p.gone)
		if is {
			spared = append(spared, p)
		}
		return is
	})
	r.arm()
	for _, g := range r.ends.drop(back) {
		spared = append(spared, removal{gone: g})
	}
	return spared
}

// restore undoes spare, where they are not back after all.
func (r *removals) restore(spared []removal) {
	for _, p := range spared {
		if p.at.IsZero() {
			r.ends.put(p.gone)
		} else {
			r.later(p.gone, time.Until(p.at))
		}
	}
}

// all is what is to be done still, the first first.
func (r *removals) all() []removal {
	var all []removal
	for _, g := range r.ends.all() {
		all = append(all, removal{gone: g})
	}
	return append(all, r.pending...)
}

// due is sent to when something is to be ended.
func (r *removals) due() <-chan time.Time {
	if r.timer == nil {
		return nil
	}
	return r.timer.C
}

// endDue has ended what is due.
func (r *removals) endDue() {
	now := time.Now()
	for len(r.pending) > 0 && !r.pending[0].at.After(now) {
		r.ends.put(r.pending[0].gone)
		r.pending = r.pending[1:]
	}
	r.arm()
}

func (r *removals) arm() {
	r.ends.changed.Store(true)
	if r.timer != nil {
		r.timer.Stop()
		r.timer = nil
	}
	if len(r.pending) > 0 {
		r.timer = time.NewTimer(time.Until(r.pending[0].at))
	}
}

// formerly is where connections to a service were made: each side knows them by what
// the service was then.
type formerly struct {
	Name string         `json:"name"`
	Addr netip.AddrPort `json:"addr"`
}

// placesMax bounds the places of a service that gets a new name all the time.
const placesMax = 16

// formerPlaces returns, by name, where services were before, the last place last.
func formerPlaces(former map[string][]formerly, before, now []service) map[string][]formerly {
	next := make(map[string][]formerly)
	listed := listingOf(before)
	for i := range now {
		s := &now[i]
		was := listed.same(s)
		if was == nil {
			continue
		}
		places := former[was.Name]
		if is := (formerly{s.Name, s.Addr}); is != (formerly{was.Name, was.Addr}) {
			places = slices.DeleteFunc(slices.Clone(places), func(p formerly) bool { return p == is })
			places = append(places, formerly{was.Name, was.Addr})
		}
		if n := len(places); n > 0 {
			next[s.Name] = places[max(n-placesMax, 0):]
		}
	}
	return next
}

// removed does what services want to become of connections to endpoints that are
// gone. A service is still there under its name or its address: to rename it or to
// move it ends nothing. One that is gone itself says what it last said.
func (c *control) removed(before, now []service) {
	present := presentIn(now)
	former := c.former
	c.former = formerPlaces(former, before, now)
	for i := range before {
		s := &before[i]
		by, is := s, present.byName[s.Name]
		if is == nil {
			is = present.byAddr[s.Addr]
		}
		if is != nil {
			if slices.Equal(is.endpoints, s.endpoints) {
				continue
			}
			by = is
		}
		if by.OnRemove == config.OnRemoveKeep || by.OnRemove == "" {
			continue
		}
		for _, e := range s.endpoints {
			g := gone{s.Name, s.Addr, e.Addr}
			if present.has(g) {
				continue
			}
			c.removals.add(g, by.OnRemove, by.RemoveAfter)
			for _, p := range former[s.Name] {
				if g := (gone{p.Name, p.Addr, e.Addr}); !present.has(g) {
					c.removals.add(g, by.OnRemove, by.RemoveAfter)
				}
			}
		}
	}
	c.removals.spare(present.has)
}

// present are the endpoints of services, under the names of these and their addresses.
type present struct {
	byName map[string]*service
	byAddr map[netip.AddrPort]*service
	// A change is of few services: only their endpoints are put into maps.
	sets map[*service]map[netip.AddrPort]bool
}

func presentIn(services []service) *present {
	p := &present{
		byName: make(map[string]*service, len(services)), byAddr: make(map[netip.AddrPort]*service, len(services)),
		sets: make(map[*service]map[netip.AddrPort]bool),
	}
	for i := range services {
		s := &services[i]
		p.byName[s.Name], p.byAddr[s.Addr] = s, s
	}
	return p
}

func (p *present) has(g gone) bool {
	return p.in(p.byName[g.service], g.endpoint) || p.in(p.byAddr[g.addr], g.endpoint)
}

func (p *present) in(s *service, endpoint netip.AddrPort) bool {
	if s == nil {
		return false
	}
	if p.sets[s] == nil {
		p.sets[s] = addrsOf(s)
	}
	return p.sets[s][endpoint]
}

// left are the services in force, with the endpoints that an earlier process left.
func (c *control) left() []service {
	var all []service
	for _, s := range c.list() {
		if kept, ok := c.kept(s.Addr); ok && len(kept) > 0 {
			s.endpoints = kept
			all = append(all, s)
		}
	}
	return all
}

// removedBefore does what services want to become of connections to endpoints that
// were removed while no process was there, and what was noted as still to be ended. Of
// a service that is gone nobody knows what it wanted, and one whose endpoints are not
// known has lost none.
func (c *control) removedBefore(left []service, n *note) {
	now := c.list()
	listed := listingOf(now)
	left = slices.DeleteFunc(left, func(s service) bool {
		is := listed.same(&s)
		return is == nil || !is.known
	})
	for _, r := range n.Removals {
		c.removals.later(gone{r.Service, r.Addr, r.Endpoint}, r.left())
	}
	if len(n.Former) > 0 {
		c.former = n.Former
	}
	former := c.former
	c.removed(left, now) // and spares who is there
	c.former = former
}

// departedFrom is how many connections the handler has to endpoints that a service has
// no more.
func (c *control) departedFrom(service string) (live int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.departed[service] {
		live += int(e.Live())
	}
	return live
}

// departed are the endpoints that were removed and that the handler has connections to,
// by the names that services have now.
func departed(last map[string][]*upstream.Endpoint, gone []upstream.Removal, services []service) map[string][]*upstream.Endpoint {
	next := make(map[string][]*upstream.Endpoint)
	renamed := renamed(services)
	add := func(service string, e *upstream.Endpoint) {
		if e.Live() > 0 {
			service = cmp.Or(renamed[service], service)
			next[service] = append(next[service], e)
		}
	}
	for service, all := range last {
		for _, e := range all {
			add(service, e)
		}
	}
	for _, g := range gone {
		add(g.Cluster, g.Endpoint)
	}
	return next
}

// renamed are the names of services that have another one now, by the former.
func renamed(services []service) map[string]string {
	all := make(map[string]string)
	for i := range services {
		if s := &services[i]; s.former != "" {
			all[s.former] = s.Name
		}
	}
	return all
}

func addrsOf(s *service) map[netip.AddrPort]bool {
	all := make(map[netip.AddrPort]bool, len(s.endpoints))
	for _, e := range s.endpoints {
		all[e.Addr] = true
	}
	return all
}
