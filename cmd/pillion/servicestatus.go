package main

import (
	"slices"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/health/check"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/telemetry/metrics"
)

// status tells which configuration holds.
func (c *control) status() admin.ConfigurationStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.state
	s.Refused = slices.Clone(s.Refused)
	s.Refused = append(append(s.Refused, c.tooMany...), c.lacking...)
	if c.trouble != "" {
		s.Refused = append(s.Refused, admin.Refusal{Text: c.trouble})
	}
	return s
}

// serviceStatus tells about every service in force.
func (c *control) serviceStatus() []admin.ServiceStatus {
	all := []admin.ServiceStatus{}
	said, checks := saidBy(c.inForce()), c.checks()
	var k knowledge
	for _, s := range c.list() {
		status := admin.ServiceStatus{
			Name: s.Name, Address: s.Addr.String(), Policy: s.Policy.String(),
			Path: s.path, PathAsked: string(said.path(s.Name)), Why: said.why(&s.Service), Where: s.Where(""),
			Source: c.sourceStatus(&s), Endpoints: []admin.EndpointStatus{},
		}
		c.know(&k, &s, checks)
		for _, v := range k.views(s.path) {
			e := v.status(said.config.Zone)
			if s.leavesOut(&v) {
				e.State = admin.EndpointLeftOut
			}
			status.Endpoints = append(status.Endpoints, e)
		}
		all = append(all, status)
	}
	return all
}

// leavesOut tells whether an endpoint is none that the service's set can have: a hook
// writes an address into a socket of its family, and no link. Sources find such ones.
func (s *service) leavesOut(v *endpointView) bool {
	a := v.Addr.Addr()
	return s.path == flow.PathDirect && !v.removed && (a.Is4() != s.Addr.Addr().Unmap().Is4() || a.Zone() != "")
}

func (c *control) sourceStatus(s *service) admin.SourceStatus {
	one, state := c.sources.of(s.Name)
	if one == nil {
		return admin.SourceStatus{Kind: admin.SourceStatic}
	}
	return admin.SourceStatus{
		Kind: one.kind, Name: one.name, Updated: state.Since, Stale: state.Err != nil || state.Generation == 0, Error: textOf(state.Err),
	}
}

// checks are the active checks, by cluster.
func (c *control) checks() map[string][]check.Status {
	all := map[string][]check.Status{}
	for _, s := range c.checker.States() {
		all[s.Cluster] = append(all[s.Cluster], s)
	}
	return all
}

// know gathers in k what the handler, the connect hook and the checks know of the
// endpoints of a service.
func (c *control) know(k *knowledge, s *service, checks map[string][]check.Status) {
	k.endpoints, k.checks = s.endpoints, checks[s.Name]
	k.kernel, k.handler, k.departed = k.kernel[:0], k.handler[:0], k.departed[:0]
	if s.set != nil || s.kept {
		// An error: it is gone meanwhile.
		k.kernel, _ = c.i.datapath.AppendEndpointStates(k.kernel, s.Addr)
	}
	if s.cluster != nil {
		for _, e := range s.cluster.Endpoints {
			k.handler = append(k.handler, e.State())
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.departed[s.Name] {
		k.departed = append(k.departed, e.State())
	}
}

// Configuration implements [metrics.Configuration].
func (c *control) Configuration() metrics.ConfigurationStats {
	s := c.status()
	c.mu.Lock()
	defer c.mu.Unlock()
	m := metrics.ConfigurationStats{
		Generation: s.Generation, Reloads: c.reloads, Failures: c.failures, Tried: s.Tried, OK: len(s.Refused) == 0,
	}
	for _, r := range s.Refused {
		if r.Name != "" {
			m.Refused = append(m.Refused, r.Name)
		}
	}
	return m
}

// Discovery implements [metrics.Discovery].
func (c *control) Discovery() []metrics.DiscoveryStats {
	var all []metrics.DiscoveryStats
	for _, s := range c.list() {
		one, state := c.sources.of(s.Name)
		if one == nil {
			continue
		}
		d := metrics.DiscoveryStats{
			Service: s.Name, Source: one.kind, Stale: state.Err != nil || state.Generation == 0,
			Changes: state.Generation, Errors: state.Failures, Endpoints: len(state.Endpoints),
		}
		if d.Stale {
			since := state.Since
			if since.IsZero() {
				since = one.made
			}
			d.Age = time.Since(since)
		}
		all = append(all, d)
	}
	return all
}

// Endpoints implements [metrics.Endpoints].
func (c *control) Endpoints() []metrics.EndpointStats {
	services := c.list()
	n := 0
	for i := range services {
		n += len(services[i].endpoints)
	}
	all := make([]metrics.EndpointStats, 0, n)
	var k knowledge
	for i := range services {
		s := &services[i]
		// What checks say is known to the handler, too.
		c.know(&k, s, nil)
		for _, v := range k.views(s.path) {
			e := v.stats(s.Name, s.path)
			e.LeftOut = s.leavesOut(&v)
			all = append(all, e)
		}
	}
	return all
}

// Checks implements [metrics.Checks].
func (c *control) Checks() []metrics.CheckStats { return checkStats(c.checker.States()) }
