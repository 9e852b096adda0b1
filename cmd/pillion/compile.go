package main

import (
	"cmp"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/route"
	"github.com/pillion-project/pillion/redirect/upstream"
	"golang.org/x/sys/unix"
)

// What the configuration says, in the words of those who go by it.

func limits(r *config.Relay) flow.Limits {
	return flow.Limits{
		DialTimeout: r.DialTimeout, DialBudget: r.DialBudget,
		IdleTimeout: r.IdleTimeout, MaxLifetime: r.MaxLifetime, Attempts: r.Attempts,
	}
}

// rules are what the kernel side goes by.
func (i *instance) rules(c *config.Config, services []service) loader.Rules {
	maxConns := i.maxConns()
	r := loader.Rules{
		Default:   c.Default,
		Closed:    c.OnFailure == config.OnFailureClosed,
		Workers:   i.workers(),
		MaxConns:  maxConns,
		ConnQuota: c.Limits.ConnectionsPerContainer,
		SlotQuota: c.Limits.SlotsPerContainer,
		Connect:   c.Connect.Mode(),
	}
	if r.ConnQuota == 0 {
		// One container in a loop must leave something to the others.
		r.ConnQuota = max(maxConns*3/4, 1)
	}
	for n := range services {
		s := &services[n]
		if s.idle() {
			continue
		}
		closed := closes(c, s)
		path := s.path
		if !s.known && !closed {
			path = flow.PathPass
		}
		r.Services = append(r.Services, loader.Service{
			Addr: s.Addr, Path: path, Closed: closed, Connect: cmp.Or(s.Connect, c.Connect).Mode(),
			NoEndpoint: errnoOf(cmp.Or(s.NoEndpoint, c.NoEndpoint)), Set: s.set, Keep: s.kept,
		})
	}
	for _, d := range c.Deny {
		r.Deny = append(r.Deny, loader.Rule(d))
	}
	for _, e := range c.Exclude {
		r.Exclude = append(r.Exclude, loader.Rule(e))
	}
	return r
}

// closes tells whether a service refuses what cannot be redirected.
func closes(c *config.Config, s *service) bool {
	return cmp.Or(s.OnFailure, c.OnFailure) == config.OnFailureClosed
}

// errnoOf returns the value of an errno's name, which Validate has looked at.
func errnoOf(name string) unix.Errno {
	switch name {
	case "EHOSTUNREACH":
		return unix.EHOSTUNREACH
	case "ENETUNREACH":
		return unix.ENETUNREACH
	default:
		return unix.ECONNREFUSED
	}
}

// carried is how many connections of one container the handler carries, when the
// container may have quota open. It hears of an end later than the kernel side
// does: what that lets in meanwhile is not to be reset.
func carried(quota int) int { return quota + quota/8 + 8 }

// specs are the clusters of services.
func specs(next *config.Config, services []service) []upstream.ClusterSpec {
	all := make([]upstream.ClusterSpec, 0, len(services))
	for i := range services {
		s := &services[i]
		h := next.HealthOf(&s.Service)
		spec := upstream.ClusterSpec{
			Name: s.Name, Former: s.former, Policy: s.Policy, Hash: s.Hash, Zone: next.Zone, Health: &h,
			NoEndpoint: errnoOf(cmp.Or(s.NoEndpoint, next.NoEndpoint)),
		}
		spec.Endpoints = s.endpoints
		all = append(all, spec)
	}
	return all
}

// tableOf is what the handler finds services in.
func tableOf(next *config.Config, services []service) (*route.Table, error) {
	all := make([]route.Service, 0, len(services))
	for i := range services {
		s := &services[i]
		// One that is not known and closed has a cluster without endpoints: it
		// refuses.
		if !s.known && !closes(next, s) || s.path == flow.PathPass || s.idle() {
			continue
		}
		all = append(all, route.Service{Name: s.Name, Addr: s.Addr, Cluster: s.cluster, Terms: flow.Terms{Limits: limitsOf(next, s)}})
	}
	return route.NewTable(all, limits(&next.Relay))
}

func limitsOf(next *config.Config, s *service) flow.Limits {
	l := limits(&next.Relay)
	if s.Attempts > 0 {
		l.Attempts = s.Attempts
	}
	if s.IdleTimeout != nil {
		l.IdleTimeout = *s.IdleTimeout
	}
	if s.MaxLifetime != nil {
		l.MaxLifetime = *s.MaxLifetime
	}
	return l
}
