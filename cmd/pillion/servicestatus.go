package main

import (
	"net"
	"slices"
	"time"

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
	if c.trouble != "" {
		s.Refused = append(s.Refused, admin.Refusal{Text: c.trouble})
	}
	return s
}

// serviceStatus tells about every service in force.
func (c *control) serviceStatus() []admin.ServiceStatus {
	cfg, checks := c.inForce(), c.checks()
	all := []admin.ServiceStatus{}
	for _, s := range c.list() {
		all = append(all, serviceStatus(cfg, &s.Service, c.knowledge(&s, checks)))
	}
	return all
}

// checks are what the active checks know, by cluster.
func (c *control) checks() map[string][]check.Status {
	all := map[string][]check.Status{}
	for _, s := range c.checker.States() {
		all[s.Cluster] = append(all[s.Cluster], s)
	}
	return all
}

// knowledge is what is known of a service.
func (c *control) knowledge(s *service, checks map[string][]check.Status) *knowledge {
	k := &knowledge{endpoints: s.endpoints, checks: checks[s.Name]}
	if one, state := c.sources.of(s.Name); one != nil {
		k.source = &state
	}
	if s.set != nil {
		// On an error the service is gone meanwhile.
		k.kernel, _ = c.i.datapath.EndpointStates(s.Addr)
	}
	for _, e := range s.cluster.Endpoints {
		k.handler = append(k.handler, e.State())
	}
	return k
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
	now := time.Now()
	for _, s := range c.list() {
		if one, state := c.sources.of(s.Name); one != nil {
			all = append(all, discoveryStats(&s.Service, &state, c.i.started, now))
		}
	}
	return all
}

// Endpoints implements [metrics.Endpoints].
func (c *control) Endpoints() []metrics.EndpointStats {
	var all []metrics.EndpointStats
	cfg := c.inForce()
	for _, s := range c.list() {
		all = append(all, endpointStats(cfg, &s.Service, c.knowledge(&s, nil))...)
	}
	return all
}

// Checks implements [metrics.Checks].
func (c *control) Checks() []metrics.CheckStats { return checkStats(c.checker.States()) }

// explainer returns what answers what happens to connections.
func (i *instance) explainer() *explainer {
	return &explainer{
		tryOut:   i.datapath.DryRun,
		config:   i.control.inForce,
		services: i.control.serviceStatus,
		lookUp:   net.DefaultResolver.LookupNetIP,
	}
}
