package main

import (
	"net/netip"
	"slices"
	"time"

	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream"
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
	failed := c.checkErrors()
	all := []admin.ServiceStatus{}
	cfg := c.inForce()
	for _, s := range c.list() {
		status := admin.ServiceStatus{
			Name: s.Name, Address: s.Addr.String(), Policy: s.Policy.String(),
			Path: s.path, PathAsked: string(cfg.Asked(&s.Service)), Where: s.Where(""),
			Source: c.sourceStatus(&s), Endpoints: []admin.EndpointStatus{},
		}
		for _, o := range cfg.Why(&s.Service) {
			status.Why = append(status.Why, o.Text)
		}
		for _, e := range c.endpointStates(&s) {
			status.Endpoints = append(status.Endpoints, admin.EndpointStatus{
				Address: e.Addr.String(), Weight: e.Weight, Zone: e.Zone, Local: cfg.Zone != "" && e.Zone == cfg.Zone,
				State: admin.StateOf(e.Ejected, e.Down), Ejected: e.Ejected, Down: e.Down,
				Live: e.Live, Connects: e.Connects, Failures: e.Failures, LastReason: e.LastReason,
				CheckError: failed[target{s.Name, e.Addr}],
			})
		}
		all = append(all, status)
	}
	return all
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

// target names what a health check looks at.
type target struct {
	service  string
	endpoint netip.AddrPort
}

// checkErrors are what the last failed checks said.
func (c *control) checkErrors() map[target]string {
	all := map[target]string{}
	for _, s := range c.checker.States() {
		if s.Err != "" {
			all[target{s.Cluster, s.Addr}] = s.Err
		}
	}
	return all
}

// endpointStates joins what the handler and the connect hook know of the endpoints
// of a service: each sees the connections on its own path. Who carries those of
// the service decides whether one is ejected.
func (c *control) endpointStates(s *service) []upstream.EndpointState {
	kernel := map[netip.AddrPort]loader.EndpointState{}
	if s.set != nil {
		states, err := c.i.datapath.EndpointStates(s.Addr)
		if err == nil { // else it is gone meanwhile
			for _, e := range states {
				kernel[e.Addr] = e
			}
		}
	}
	all := make([]upstream.EndpointState, 0, len(s.cluster.Endpoints))
	for _, e := range s.cluster.Endpoints {
		state := e.State()
		if k, ok := kernel[e.Addr]; ok {
			state.Live += int64(k.Live)
			state.Connects += k.Connects
			state.Failures += k.Failed
			state.Ejections += uint64(k.Ejections)
			if s.path == flow.PathDirect {
				state.Ejected = k.Ejected > 0
			}
			if state.LastReason == flow.ReasonNone {
				state.LastReason = k.Last
			}
		}
		all = append(all, state)
	}
	return all
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
				since = c.i.started
			}
			d.Age = time.Since(since)
		}
		all = append(all, d)
	}
	return all
}

// Endpoints implements [metrics.Endpoints].
func (c *control) Endpoints() []metrics.EndpointStats {
	var all []metrics.EndpointStats
	for _, s := range c.list() {
		for _, e := range c.endpointStates(&s) {
			all = append(all, metrics.EndpointStats{
				Cluster: s.Name, Addr: e.Addr.String(), Weight: e.Weight, Zone: e.Zone, Path: s.path,
				Ejected: e.Ejected, Down: e.Down, Live: e.Live,
				Connects: e.Connects, Failures: e.Failures, Ejections: e.Ejections, ConnectTime: e.ConnectTime,
			})
		}
	}
	return all
}

// Checks implements [metrics.Checks].
func (c *control) Checks() []metrics.CheckStats {
	byCluster := map[string]*metrics.CheckStats{}
	var order []string
	for _, s := range c.checker.States() {
		m := byCluster[s.Cluster]
		if m == nil {
			m = &metrics.CheckStats{Cluster: s.Cluster}
			byCluster[s.Cluster] = m
			order = append(order, s.Cluster)
		}
		if s.State == check.StateDown {
			m.Down++
		}
	}
	all := make([]metrics.CheckStats, 0, len(order))
	for _, name := range order {
		all = append(all, *byCluster[name])
	}
	return all
}
