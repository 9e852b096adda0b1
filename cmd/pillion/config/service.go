package config

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/discover/spelling"
	"github.com/pillion-project/pillion/redirect/upstream/health"
)

// Service is an address that applications dial, and what serves it. What is
// empty or nil in it is as the configuration says for all; [Config.Effective] has
// it filled in.
type Service struct {
	// Name is unique. It is the address where the user gives none.
	Name string
	// Addr is the original destination, unmapped.
	Addr netip.AddrPort
	// Endpoints and Discover are the two ways to say what serves it: one of them
	// is there, and neither with PathPass.
	Endpoints []Endpoint
	Discover  *Discover
	Policy    flow.Policy
	// Hash is what PolicyMaglev hashes.
	Hash flow.HashOn
	// Path is empty where the configuration's own applies.
	Path PathChoice
	// Attempts is how many endpoints are tried for one connection; 0 is as
	// Relay.Attempts.
	Attempts int
	// IdleTimeout and MaxLifetime are as those of Relay, nil where those apply.
	IdleTimeout, MaxLifetime *time.Duration
	// Check is nil where endpoints are not checked actively.
	Check  *HealthCheck
	Health Health
	// OnRemove is what becomes of connections to an endpoint that is gone, and
	// RemoveAfter how long OnRemoveClose waits.
	OnRemove    OnRemove
	RemoveAfter time.Duration
	// OnFailure, Connect and NoEndpoint are empty where the configuration's own
	// apply.
	OnFailure  OnFailure
	Connect    Connect
	NoEndpoint string

	at positions // of the service's keys

	// kept is what was said of a service that stays as it was; nil: it is as it is said.
	// It is no part of what the service is: only words come from it.
	kept *kept
}

// kept is a service as the user said it, which is in a configuration as it was in force.
type kept struct {
	service Service
	// config has what applied to it of the path of services that say nothing.
	config Config
}

// Endpoint is one of the addresses that serve a service.
type Endpoint struct {
	// Addr is unmapped.
	Addr netip.AddrPort
	// Weight is the endpoint's share of the connections, 1 to 65535.
	Weight uint32
	// Zone is where it is, or empty.
	Zone string
}

// Health is what a service has instead of the configuration's section health,
// nil where that applies.
type Health struct {
	Failures  *int
	Base, Max *time.Duration
	Panic     *int
}

// over returns h with what s has instead.
func (s Health) over(h health.Config) health.Config {
	if s.Failures != nil {
		h.Failures = *s.Failures
	}
	if s.Base != nil {
		h.Base = *s.Base
	}
	if s.Max != nil {
		h.Max = *s.Max
	}
	if s.Panic != nil {
		h.Panic = *s.Panic
	}
	return h
}

// OnRemove says what becomes of connections to an endpoint that is gone.
type OnRemove string

// The values of OnRemove.
const (
	OnRemoveKeep  OnRemove = "keep"  // they live on
	OnRemoveClose OnRemove = "close" // they may end by themselves for RemoveAfter, then they are reset
	OnRemoveReset OnRemove = "reset" // they are reset at once
)

var onRemoves = []OnRemove{OnRemoveKeep, OnRemoveClose, OnRemoveReset}

// defaultRemoveAfter is how long OnRemoveClose waits where nothing is said.
const defaultRemoveAfter = 30 * time.Second

// newService returns the service of a user who says nothing of it.
func newService() Service {
	return Service{Policy: flow.Policies()[0], Hash: flow.HashOns()[0], OnRemove: OnRemoveKeep}
}

// HealthOf returns the section health that applies to a service.
func (c *Config) HealthOf(s *Service) health.Config { return s.Health.over(c.Health) }

// Effective returns the service with everything said that it takes from the
// configuration: its path is the one that PathOf tells and never PathAuto, and
// what the path has no use for stays unsaid.
func (c *Config) Effective(s *Service) Service {
	e := *s
	path, _ := c.PathOf(s)
	e.Path = PathChoice(path.String())
	e.OnFailure = cmp.Or(s.OnFailure, c.OnFailure)
	if path == flow.PathPass {
		return e
	}
	e.NoEndpoint = cmp.Or(s.NoEndpoint, c.NoEndpoint)
	h := c.HealthOf(s)
	e.Health = Health{Failures: &h.Failures, Base: &h.Base, Max: &h.Max, Panic: &h.Panic}
	if path == flow.PathDirect {
		return e
	}
	e.Connect = cmp.Or(s.Connect, c.Connect)
	e.Attempts = cmp.Or(s.Attempts, c.Relay.Attempts)
	// Copies: what is effective must not hold on to the configuration.
	idle, lifetime := c.Relay.IdleTimeout, c.Relay.MaxLifetime
	e.IdleTimeout, e.MaxLifetime = cmp.Or(s.IdleTimeout, &idle), cmp.Or(s.MaxLifetime, &lifetime)
	return e
}

// positive reports whether a limit that may be unsaid is said and is one.
func positive(d *time.Duration) bool { return d != nil && *d > 0 }

func (d *decoder) service(path string, n ast.Node) Service {
	s := newService()
	said := make(map[string]bool)
	d.mapping(path, n, []field{
		{"name", d.text(&s.Name)},
		{"address", d.addrPort(&s.Addr)},
		{"endpoints", func(path string, n ast.Node) {
			d.list(path, n, func(path string, n ast.Node) {
				s.Endpoints = append(s.Endpoints, d.endpoint(path, n))
			})
		}},
		{"discover", func(path string, n ast.Node) { s.Discover = d.discover(path, n) }},
		{"policy", func(path string, n ast.Node) { named(d, path, n, flow.Policies(), &s.Policy) }},
		{"hash", func(path string, n ast.Node) { named(d, path, n, flow.HashOns(), &s.Hash) }},
		{"path", func(path string, n ast.Node) { word(d, path, n, paths, &s.Path) }},
		{"attempts", d.number(&s.Attempts, 1, maxAttempts)},
		{"idle_timeout", func(path string, n ast.Node) { s.IdleTimeout = given(d.duration, path, n) }},
		{"max_lifetime", func(path string, n ast.Node) { s.MaxLifetime = given(d.duration, path, n) }},
		{"health_check", func(path string, n ast.Node) { s.Check = d.healthCheck(path, n) }},
		{"health", func(path string, n ast.Node) { d.serviceHealth(&s.Health, path, n) }},
		{"on_remove", func(path string, n ast.Node) { word(d, path, n, onRemoves, &s.OnRemove) }},
		{"remove_after", d.duration(&s.RemoveAfter)},
		{"on_failure", func(path string, n ast.Node) { word(d, path, n, onFailures, &s.OnFailure) }},
		{"connect", func(path string, n ast.Node) { word(d, path, n, connectModes, &s.Connect) }},
		{"no_endpoint", func(path string, n ast.Node) { word(d, path, n, noEndpoints, &s.NoEndpoint) }},
	}, said)
	if !said["name"] && s.Addr.IsValid() {
		s.Name = s.Addr.String()
	}
	// What is said and is the default, the check of values cannot tell from what
	// is not said.
	if said["hash"] && s.Policy != flow.PolicyMaglev && !d.bad[path+".policy"] {
		d.failAt(path+".hash", d.find(path+".hash"), hashWithout)
		d.bad[path+".hash"] = true
	}
	if !said["remove_after"] && s.OnRemove == OnRemoveClose {
		s.RemoveAfter = defaultRemoveAfter
	}
	if s.Discover != nil && s.Discover.DNS != nil && s.Discover.DNS.Type == "" && s.Addr.IsValid() {
		s.Discover.DNS.Type = ownFamily(s.Addr)
	}
	return s
}

// endpoint reads an address, or a mapping of an address and what goes with it.
func (d *decoder) endpoint(path string, n ast.Node) Endpoint {
	e := Endpoint{Weight: 1}
	if _, ok := n.(ast.MapNode); !ok {
		if addr, weight, ok := strings.Cut(raw(n), "*"); ok {
			d.fail(path, n, "%s: want {address: %s, weight: %s}", spelling.Show(raw(n)), addr, weight)
			return e
		}
		d.addrPort(&e.Addr)(path, n)
		return e
	}
	weight := 1
	d.mapping(path, n, []field{
		{"address", d.addrPort(&e.Addr)},
		{"weight", d.number(&weight, 1, maxWeight)},
		{"zone", d.text(&e.Zone)},
	}, nil)
	e.Weight = uint32(weight)
	return e
}

func (d *decoder) serviceHealth(h *Health, path string, n ast.Node) {
	number := func(high int) func(*int) func(string, ast.Node) {
		return func(into *int) func(string, ast.Node) { return d.number(into, 0, high) }
	}
	d.mapping(path, n, []field{
		{"failures", func(path string, n ast.Node) { h.Failures = given(number(maxFailures), path, n) }},
		{"base", func(path string, n ast.Node) { h.Base = given(d.duration, path, n) }},
		{"max", func(path string, n ast.Node) { h.Max = given(d.duration, path, n) }},
		{"panic", func(path string, n ast.Node) { h.Panic = given(number(100), path, n) }},
	}, nil)
}

// given reads a value that may be unsaid, and then is nil.
func given[T any](read func(*T) func(string, ast.Node), path string, n ast.Node) *T {
	into := new(T)
	read(into)(path, n)
	return into
}

const hashWithout = "only policy: maglev hashes: leave it out, or ask for that policy"

// service checks what stands in a service at path by itself.
func (k *check) service(path string, c *Config, s *Service) {
	k.serviceAddr(path+".address", s.Addr)
	k.name(path+".name", *s)
	k.sources(path, c, s)
	if !slices.Contains(flow.Policies(), s.Policy) {
		k.add(path+".policy", "%s: there is no such policy", s.Policy)
	}
	if s.Hash != flow.HashOns()[0] && s.Policy != flow.PolicyMaglev {
		k.addOn([]string{path + ".policy"}, path+".hash", hashWithout)
	}
	oneWord(k, path+".path", s.Path, paths, "")
	if s.Attempts != 0 {
		k.number(path+".attempts", s.Attempts, 1, maxAttempts)
	}
	for key, d := range map[string]*time.Duration{".idle_timeout": s.IdleTimeout, ".max_lifetime": s.MaxLifetime} {
		if d != nil && *d < 0 {
			k.add(path+key, "%s: want %s", *d, wantLimit)
		}
	}
	if s.Check != nil {
		k.healthCheck(path+".health_check", s.Check)
	}
	if s.Health != (Health{}) {
		for _, err := range split(c.HealthOf(s).Validate()) {
			if err != nil {
				k.add(path+".health", "%v", err)
			}
		}
	}
	k.onRemove(path, s)
	// Empty: the configuration's own.
	oneWord(k, path+".on_failure", s.OnFailure, onFailures, "")
	oneWord(k, path+".connect", s.Connect, connectModes, "")
	oneWord(k, path+".no_endpoint", s.NoEndpoint, noEndpoints, "")
	k.path(path, c, s)
}

// sources checks that there is one way to know the endpoints.
func (k *check) sources(path string, c *Config, s *Service) {
	if s.Discover != nil {
		if len(s.Endpoints) > 0 {
			k.add(path+".endpoints", "endpoints and discover: want one of them")
		}
		k.discover(path+".discover", s.Discover)
	}
	// On auto, too: who forgot the endpoints does not mean that nothing be done.
	if s.Discover == nil && len(s.Endpoints) == 0 && c.takes(s) != PathPass {
		k.addOn(s.pathSaid(path), path+".endpoints", "no endpoints: want one ADDR:PORT at least, or discover, or path: pass")
	}
	k.endpoints(path+".endpoints", s.Endpoints)
}

func (k *check) onRemove(path string, s *Service) {
	oneWord(k, path+".on_remove", s.OnRemove, onRemoves)
	switch {
	case s.OnRemove == OnRemoveClose && s.RemoveAfter <= 0:
		k.add(path+".remove_after", "%s: want more than 0, or on_remove: reset", s.RemoveAfter)
	case s.OnRemove != OnRemoveClose && s.RemoveAfter != 0:
		k.addOn([]string{path + ".on_remove"}, path+".remove_after", "only on_remove: close waits: leave it out, or ask for that")
	default:
	}
}
