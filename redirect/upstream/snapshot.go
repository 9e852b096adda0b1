package upstream

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/health"
)

// ClusterSpec says what a cluster is to be. A cluster without endpoints is
// allowed: it picks nothing.
type ClusterSpec struct {
	Name string
	// Former is the name that it had in the snapshot before; empty: the same.
	Former string
	// Endpoints are kept as they are, and must not be changed any more.
	Endpoints []EndpointSpec
	// Policy is how an endpoint is picked, Hash what PolicyMaglev goes by.
	Policy flow.Policy
	Hash   flow.HashOn
	// Zone is where this instance is. Its endpoints come first, and the others
	// take over what they cannot; empty, there are no zones.
	Zone string
	// NoEndpoint is as in [Cluster].
	NoEndpoint syscall.Errno
	// Health is used instead of that of [Options], unless it is nil.
	Health *health.Config
}

// EndpointSpec says what an endpoint is to be; its address may be mapped, and without a
// zone it is in one of its own.
type EndpointSpec = flow.Endpoint

// Options is what all clusters of a snapshot share. The zero value never
// ejects, and uses the process's clock and randomness.
type Options struct {
	Health health.Config
	// Now is a monotonic clock with any origin, Random gives uniform bits. Both
	// must be safe for concurrent use; nil means the process's own. They are
	// taken from the first snapshot: with an old one they are ignored.
	Now    func() time.Duration
	Random func() uint64
}

// Snapshot is all clusters at one moment. It is immutable.
type Snapshot struct {
	now      func() time.Duration
	random   func() uint64
	clusters []*Cluster // sorted by name
}

// Build makes the snapshot that specs describe. An endpoint whose cluster
// and address were in old keeps its load and its health, and a cluster of which
// nothing has changed is the same; old may be nil and stays usable. All problems
// are in one error, and then there is no snapshot.
func Build(old *Snapshot, specs []ClusterSpec, o Options) (*Snapshot, error) {
	if err := check(old, specs, o); err != nil {
		return nil, err
	}
	s := &Snapshot{now: o.Now, random: o.Random, clusters: make([]*Cluster, 0, len(specs))}
	if old != nil {
		s.now, s.random = old.now, old.random
	}
	for i := range specs {
		h := o.Health
		if specs[i].Health != nil {
			h = *specs[i].Health
		}
		s.clusters = append(s.clusters, s.build(old.Cluster(cmp.Or(specs[i].Former, specs[i].Name)), &specs[i], h))
	}
	slices.SortFunc(s.clusters, func(a, b *Cluster) int { return cmp.Compare(a.Name, b.Name) })
	return s, nil
}

// Clusters returns every cluster, sorted by name. The caller must not change
// the slice.
func (s *Snapshot) Clusters() []*Cluster {
	if s == nil {
		return nil
	}
	return s.clusters
}

// Cluster returns the cluster of that name, or nil.
func (s *Snapshot) Cluster(name string) *Cluster {
	clusters := s.Clusters()
	i, found := slices.BinarySearchFunc(clusters, name, func(c *Cluster, name string) int {
		return cmp.Compare(c.Name, name)
	})
	if !found {
		return nil
	}
	return clusters[i]
}

func (s *Snapshot) build(old *Cluster, spec *ClusterSpec, h health.Config) *Cluster {
	c := &Cluster{Name: spec.Name, NoEndpoint: spec.NoEndpoint, hash: spec.Hash}
	kept := make(map[netip.AddrPort]*record)
	switch {
	case old == nil:
		c.shared = &shared{monitor: health.NewMonitor(s.now, s.random)}
		c.layout = newLayout(spec)
	case !old.layout.same(spec):
		c.shared = old.shared
		c.layout = newLayout(spec)
	case old.Name == spec.Name && old.NoEndpoint == spec.NoEndpoint && old.hash == spec.Hash && old.group.Config == h:
		return old
	default:
		c.shared, c.layout = old.shared, old.layout
	}
	if old != nil {
		for _, e := range old.Endpoints {
			kept[e.Addr] = e.record
		}
	}
	c.Endpoints = make([]*Endpoint, 0, len(spec.Endpoints))
	for i := range c.layout.endpoints {
		es := &c.layout.endpoints[i]
		r := kept[es.Addr]
		if r == nil {
			r = &record{ejector: health.NewEjector(c.shared.monitor)}
		}
		c.Endpoints = append(c.Endpoints, &Endpoint{EndpointSpec: es, record: r})
	}
	a := &c.layout.all
	c.members = make(members, len(a.order))
	ejectors := make([]*health.Ejector, len(a.order))
	for i, from := range a.order {
		c.members[i] = c.Endpoints[from]
		ejectors[i] = c.Endpoints[from].ejector
	}
	c.group = health.NewGroup(c.shared.monitor, h, ejectors, a.set.Overflow)
	for _, e := range c.Endpoints {
		e.group = c.group
	}
	return c
}

func check(old *Snapshot, specs []ClusterSpec, o Options) error {
	var errs []error
	if err := o.Health.Validate(); err != nil {
		errs = append(errs, fmt.Errorf("health: %w", err))
	}
	names := make(map[string]bool, len(specs))
	for i := range specs {
		spec := &specs[i]
		if names[spec.Name] {
			errs = append(errs, fmt.Errorf("cluster %q: the name is taken", spec.Name))
		}
		names[spec.Name] = true
		if spec.Health != nil {
			if err := spec.Health.Validate(); err != nil {
				errs = append(errs, fmt.Errorf("cluster %q: health: %w", spec.Name, err))
			}
		}
		if c := old.Cluster(spec.Name); c != nil && c.hash == spec.Hash && c.layout.same(spec) {
			continue // as it was checked then
		}
		if err := spec.check(); err != nil {
			errs = append(errs, fmt.Errorf("cluster %q: %w", spec.Name, err))
		}
	}
	return errors.Join(errs...)
}

func (spec *ClusterSpec) check() error {
	var errs []error
	if !slices.Contains(flow.Policies(), spec.Policy) {
		errs = append(errs, fmt.Errorf("unknown %s", spec.Policy))
	}
	if !slices.Contains(flow.HashOns(), spec.Hash) {
		errs = append(errs, fmt.Errorf("unknown %s", spec.Hash))
	}
	if n := len(spec.Endpoints); n > flow.SetEndpoints {
		errs = append(errs, fmt.Errorf("%d endpoints: want at most %d", n, flow.SetEndpoints))
	}
	addrs := make(map[netip.AddrPort]bool, len(spec.Endpoints))
	for _, e := range spec.Endpoints {
		addr := unmap(e.Addr)
		switch {
		case !addr.IsValid() || addr.Port() == 0:
			errs = append(errs, fmt.Errorf("endpoint %s: not an address and a port", e.Addr))
		case addrs[addr]:
			errs = append(errs, fmt.Errorf("endpoint %s: listed twice", addr))
		case e.Weight == 0:
			errs = append(errs, fmt.Errorf("endpoint %s: weight 0", addr))
		case e.Weight > math.MaxUint16:
			errs = append(errs, fmt.Errorf("endpoint %s: weight %d: want at most %d", addr, e.Weight, math.MaxUint16))
		default:
		}
		addrs[addr] = true
	}
	return errors.Join(errs...)
}

// unmap gives ::ffff:a.b.c.d the form a.b.c.d, so that one endpoint has one
// form and is dialed on a socket of its own family.
func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
