package route

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream"
)

// Service is an address that applications dial and the cluster that serves it.
type Service struct {
	Name    string
	Addr    netip.AddrPort
	Cluster *upstream.Cluster
	// Terms are those of its connections; the table fills in the name, and its
	// own limits where there are none.
	Terms flow.Terms
}

// Table maps original destinations to services. It is immutable; a reload
// makes another and swaps it behind an atomic pointer. A nil table is empty.
type Table struct {
	services []Service
	byAddr   map[netip.AddrPort]*Service
	terms    *flow.Terms
}

// NewTable returns the table of services, which it copies, and of the limits of
// what none of them names. All problems are in
// one error: an address that is not valid or taken, a service without cluster.
func NewTable(services []Service, limits flow.Limits) (*Table, error) {
	t := &Table{
		services: make([]Service, len(services)),
		byAddr:   make(map[netip.AddrPort]*Service, len(services)),
		terms:    &flow.Terms{Limits: limits},
	}
	var errs []error
	for i, s := range services {
		// Original destinations are unmapped, so the keys must be.
		s.Addr = netip.AddrPortFrom(s.Addr.Addr().Unmap(), s.Addr.Port())
		s.Terms.Service = s.Name
		if s.Terms.Limits == (flow.Limits{}) {
			s.Terms.Limits = limits
		}
		t.services[i] = s
		// Not one of services: a connection keeps its service for as long as it
		// lasts, and would keep those of a whole table that was replaced.
		own := new(Service)
		*own = s
		switch other := t.byAddr[s.Addr]; {
		case !s.Addr.IsValid():
			errs = append(errs, fmt.Errorf("service %q: no address", s.Name))
		case s.Cluster == nil:
			errs = append(errs, fmt.Errorf("service %q: no cluster", s.Name))
		case other != nil:
			errs = append(errs, fmt.Errorf("service %q: %s is service %q already", s.Name, s.Addr, other.Name))
		default:
			t.byAddr[s.Addr] = own
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return t, nil
}

// Lookup returns the service that d belongs to. It returns false when no
// service names it: the handler then dials the original destination. The
// service is the table's own and must not be changed.
func (t *Table) Lookup(d flow.OrigDst) (*Service, bool) {
	if t == nil {
		return nil, false
	}
	s, ok := t.byAddr[d.AddrPort]
	return s, ok
}

// Terms are those of connections that no service names. Nobody may change them.
func (t *Table) Terms() *flow.Terms {
	if t == nil {
		return nil
	}
	return t.terms
}

// Services returns every service in the order of the configuration. The caller
// must not change the slice.
func (t *Table) Services() []Service {
	if t == nil {
		return nil
	}
	return t.services
}
