package main

import (
	"cmp"
	"errors"
	"net/netip"
	"slices"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream"
	"github.com/pillion-project/pillion/redirect/upstream/health/check"
)

// What is known of the health of endpoints, on its way to who picks.

// targets are what is checked actively.
func targets(services []service) []check.Target {
	var all []check.Target
	for i := range services {
		s := &services[i]
		if s.Check == nil {
			continue
		}
		spec := checkSpec(s.Check)
		for _, e := range s.endpoints {
			all = append(all, check.Target{Cluster: s.Name, Former: s.former, Addr: e.Addr, Spec: spec})
		}
	}
	return all
}

func checkSpec(h *config.HealthCheck) check.Spec {
	s := check.Default()
	s.Interval, s.Timeout, s.Jitter = h.Interval, h.Timeout, h.Jitter
	s.Healthy, s.Unhealthy, s.Port = h.Healthy, h.Unhealthy, h.Port
	switch {
	case h.HTTP != nil:
		s.Kind = check.KindHTTP
		s.HTTP = check.HTTP{Path: h.HTTP.Path, Host: h.HTTP.Host}
		for _, r := range h.HTTP.Status {
			s.HTTP.Status = append(s.HTTP.Status, check.StatusRange(r))
		}
	case len(h.Command) > 0:
		s.Kind, s.Command = check.KindCommand, h.Command
	default:
	}
	return s
}

// setDown writes what a health check found to both sides.
func (c *control) setDown(change check.Change) {
	down := change.State == check.StateDown
	s := c.listing().named(change.Cluster)
	if s == nil || down && s.Check == nil {
		return // it, or its check, is gone meanwhile
	}
	for _, e := range s.cluster.Endpoints {
		// Before this process is in charge, and of a set that is kept, the kernel side has
		// what an earlier one found.
		if e.Addr != change.Addr || e.Down() == down && !s.kept && c.inCharge {
			continue
		}
		e.SetDown(down)
		// The checker has told people.
		c.i.log.Debug("health check", "service", s.Name, "endpoint", e.Addr, "state", change.State, "error", change.Err)
		if s.set != nil || s.kept {
			c.writeDown(s, e.Addr, down)
		}
	}
}

// takeDown has the clusters of services begin with what an earlier process's checks found,
// as the kernel side has it, unless a check of this one has ended: who is down is not picked
// until then.
func (c *control) takeDown(services []service) {
	type at struct {
		cluster string
		addr    netip.AddrPort
	}
	down := make(map[at]bool)
	for i := range services {
		s := &services[i]
		if s.Check == nil {
			continue
		}
		states, err := c.i.datapath.EndpointStates(s.Addr)
		if err != nil {
			continue // there was no such service
		}
		for _, e := range states {
			down[at{s.Name, e.Addr}] = e.Down
		}
	}
	for _, s := range c.checker.States() {
		if s.State != check.StateUnknown {
			down[at{s.Cluster, s.Addr}] = s.State == check.StateDown
		}
	}
	for i := range services {
		s := &services[i]
		for _, e := range s.cluster.Endpoints {
			if is, known := down[at{s.Name, e.Addr}]; known {
				e.SetDown(is)
			}
		}
	}
}

// renameNews has what a check found just before its service had another name be known of
// that: nobody finds it again.
func (c *control) renameNews(services []service) {
	c.newsMu.Lock()
	defer c.newsMu.Unlock()
	if len(c.news) == 0 {
		return
	}
	renamed := renamed(services)
	for n := range c.news {
		c.news[n].Cluster = cmp.Or(renamed[c.news[n].Cluster], c.news[n].Cluster)
	}
}

func (c *control) writeDown(s *service, endpoint netip.AddrPort, down bool) {
	err := c.i.datapath.SetDown(s.Addr, endpoint, down)
	if err != nil && !errors.Is(err, loader.ErrNoService) && !errors.Is(err, loader.ErrNoSuchEndpoint) {
		c.i.log.Error("cannot tell the connect hook what a health check found", "service", s.Name, "error", err)
	}
}

// tellDown has the connect hook know what checks have found of endpoints whose sets it
// was just given, or of all. What a set says is of when it was made; and where another
// service has the address now, what a check of the one before found stands there still.
func (c *control) tellDown(services []service, last *listing, all bool) {
	if c.unsettled {
		return
	}
	for i := range services {
		s := &services[i]
		was := last.at(s.Addr)
		if s.set == nil || !all && was != nil && was.set == s.set || s.Check == nil && (was == nil || was.Check == nil) {
			continue
		}
		for _, e := range s.cluster.Endpoints {
			c.writeDown(s, e.Addr, e.Down())
		}
	}
}

// unchecked forgets what health checks found that there are no more.
func (c *control) unchecked(services []service) {
	for i := range services {
		s := &services[i]
		if s.Check != nil {
			continue
		}
		for _, e := range s.cluster.Endpoints {
			if e.Down() {
				c.setDown(check.Change{Cluster: s.Name, Addr: e.Addr, State: check.StateUp})
			}
		}
	}
}

// closedFor is how long the connect hook refuses a service after it was last told
// to: this process may die.
const closedFor = 3 * overflowEvery

// close has the connect hook refuse, on relay, services that have no endpoint but
// such as health checks found down. The handler would say so too, but only once a
// connection is with it whose connect has succeeded. It is called more often than
// every closedFor. On direct the hook sees for itself.
func (c *control) close(in *config.Config, services []service) {
	if c.unsettled {
		return
	}
	closed := make(map[netip.AddrPort]bool)
	for i := range services {
		s := &services[i]
		up := func(e *upstream.Endpoint) bool { return !e.Down() }
		switch {
		case s.path != flow.PathRelay || !s.known && !closes(in, s) || s.idle():
		case !slices.ContainsFunc(s.cluster.Endpoints, up):
			closed[s.Addr] = true
			c.i.unavailable(s.Addr, closedFor)
		case c.closed[s.Addr]:
			c.i.unavailable(s.Addr, 0)
		default:
		}
	}
	c.closed = closed
}

// spillOf is how much of a set's connections is to leave the local zone while its
// endpoints are so. In panic ejections do not count, as in the hook's pick.
func spillOf(set *flow.Set, states []loader.EndpointState) uint32 {
	up, well := make(map[netip.AddrPort]bool, len(states)), 0
	for _, e := range states {
		if !e.InSet || e.Down {
			continue
		}
		up[e.Addr] = e.Ejected == 0 || set.Failures == 0
		if up[e.Addr] {
			well++
		}
	}
	panics := well*100 < set.Panic*len(up)
	return set.Overflow(func(n int) bool {
		is, known := up[set.Endpoints[n].Addr]
		return known && (is || panics)
	})
}

// overflow tells the connect hook how much is to leave the local zone.
func (c *control) overflow() {
	for _, s := range c.list() {
		if s.set == nil || s.set.Tiers[1].Count == 0 {
			continue
		}
		states, err := c.i.datapath.EndpointStates(s.Addr)
		if err != nil {
			continue // it is gone, and that was told
		}
		spill := spillOf(s.set, states)
		if err := c.i.datapath.SetSpill(s.Addr, spill); err != nil && !errors.Is(err, loader.ErrNoService) {
			c.i.log.Error("cannot tell the connect hook how much leaves the zone", "service", s.Name, "error", err)
		}
	}
}
