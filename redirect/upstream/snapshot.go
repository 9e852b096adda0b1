package upstream

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/pillion-project/pillion/redirect/upstream/health"
)

// ClusterSpec says what a cluster is to be. A cluster without endpoints is
// allowed: it picks nothing.
type ClusterSpec struct {
	Name      string
	Endpoints []EndpointSpec
	// Policy makes the picker; package balance has them.
	Policy NewPicker
	// NoEndpoint is as in [Cluster].
	NoEndpoint syscall.Errno
}

// EndpointSpec says what an endpoint is to be.
type EndpointSpec struct {
	Addr netip.AddrPort
	// Weight is at least 1.
	Weight uint32
}

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
	monitor  *health.Monitor
	clusters []*Cluster // sorted by name
}

// Build makes the snapshot that specs describe. An endpoint whose cluster name
// and address were in old keeps its load and its health; old may be nil and
// stays usable. All problems are in one error, and then there is no snapshot.
func Build(old *Snapshot, specs []ClusterSpec, o Options) (*Snapshot, error) {
	if err := check(specs, o); err != nil {
		return nil, err
	}
	s := &Snapshot{clusters: make([]*Cluster, 0, len(specs))}
	if old != nil {
		s.monitor = old.monitor
	} else {
		s.monitor = health.NewMonitor(o.Now, o.Random)
	}
	for _, spec := range specs {
		s.clusters = append(s.clusters, s.build(old.Cluster(spec.Name), spec, o.Health))
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

func (s *Snapshot) build(old *Cluster, spec ClusterSpec, h health.Config) *Cluster {
	kept := make(map[netip.AddrPort]*record)
	if old != nil {
		for _, e := range old.Endpoints {
			kept[e.Addr] = e.record
		}
	}
	c := &Cluster{
		Name:       spec.Name,
		NoEndpoint: spec.NoEndpoint,
		Endpoints:  make([]*Endpoint, 0, len(spec.Endpoints)),
		monitor:    s.monitor,
	}
	members := make([]*health.Ejector, 0, len(spec.Endpoints))
	for _, es := range spec.Endpoints {
		addr := unmap(es.Addr)
		r := kept[addr]
		if r == nil {
			r = &record{ejector: health.NewEjector(s.monitor)}
		}
		members = append(members, r.ejector)
		c.Endpoints = append(c.Endpoints, &Endpoint{Addr: addr, Weight: es.Weight, record: r})
	}
	c.group = health.NewGroup(s.monitor, h, members)
	for _, e := range c.Endpoints {
		e.group = c.group
	}
	c.picker = spec.Policy(c.Endpoints, s.monitor.Random)
	return c
}

func check(specs []ClusterSpec, o Options) error {
	var errs []error
	if err := o.Health.Validate(); err != nil {
		errs = append(errs, fmt.Errorf("health: %w", err))
	}
	names := make(map[string]bool, len(specs))
	for _, spec := range specs {
		if names[spec.Name] {
			errs = append(errs, fmt.Errorf("cluster %q: the name is taken", spec.Name))
		}
		names[spec.Name] = true
		if err := spec.check(); err != nil {
			errs = append(errs, fmt.Errorf("cluster %q: %w", spec.Name, err))
		}
	}
	return errors.Join(errs...)
}

func (spec ClusterSpec) check() error {
	var errs []error
	if spec.Policy == nil {
		errs = append(errs, errors.New("no policy"))
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
		default:
		}
		addrs[addr] = true
	}
	return errors.Join(errs...)
}

// unmap gives ::ffff:a.b.c.d the form a.b.c.d, so that one endpoint has one
// form and is dialed on a socket of its own family.
func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
