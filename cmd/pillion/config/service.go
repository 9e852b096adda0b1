package config

import (
	"net/netip"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
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
func (c *Config) Effective(s *Service) Service { return *s }
