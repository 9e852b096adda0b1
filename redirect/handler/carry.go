package handler

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
	"github.com/pillion-project/pillion/redirect/route"
	"github.com/pillion-project/pillion/redirect/upstream"
)

// Freeze stops all that the handler does; see [l4.Relay.Freeze].
func (h *Handler) Freeze(ctx context.Context) (*l4.Frozen, error) { return h.relay.Freeze(ctx) }

// Adopt goes on with the connections of another handler, before Run or while it runs.
// Each is its service's, by the table of now, if that is there still and has the
// cluster that it had. One whose service is gone keeps its names, and goes by the
// limits of what no service names. What is returned is as in [l4.Relay.Adopt].
func (h *Handler) Adopt(g *l4.Given) (done <-chan struct{}, err error) {
	p, err := newPlacement(h.table.Load(), g)
	if err != nil {
		return nil, fmt.Errorf("adopt connections: %w", err)
	}
	if done = h.relay.Adopt(g, p.target); done == nil {
		return nil, errors.New("adopt connections: a worker has ended")
	}
	return done, nil
}

// Accept accepts connections, which [Options.AcceptLater] put off, and begins with
// those that an earlier process has accepted.
func (h *Handler) Accept(accepted []int) {
	h.relay.Begin(accepted)
	h.relay.Accept()
}

// placement finds what connections that were carried belong to.
type placement struct {
	table  *route.Table
	former *upstream.Snapshot     // of endpoints that are no more
	terms  map[string]*flow.Terms // of services that are no more, by name
	has    map[*upstream.Cluster]map[netip.AddrPort]bool
}

func newPlacement(table *route.Table, g *l4.Given) (*placement, error) {
	p := &placement{table: table, terms: map[string]*flow.Terms{}, has: map[*upstream.Cluster]map[netip.AddrPort]bool{}}
	return p, p.findFormer(g)
}

// service returns the one that a connection is of still; nil: there is none.
func (p *placement) service(c *l4.Carried) *route.Service {
	s, ok := p.table.Lookup(c.Downstream.OrigDst)
	if !ok || s.Cluster.Name != c.Cluster || c.Cluster == "" {
		return nil
	}
	return s
}

// known tells whether a cluster has the endpoint that a connection counts for.
func (p *placement) known(cluster *upstream.Cluster, endpoint netip.AddrPort) bool {
	if !endpoint.IsValid() {
		return true
	}
	if p.has[cluster] == nil {
		p.has[cluster] = make(map[netip.AddrPort]bool, len(cluster.Endpoints))
		for _, e := range cluster.Endpoints {
			p.has[cluster][e.Addr] = true
		}
	}
	return p.has[cluster][endpoint]
}

// findFormer makes clusters of what connections count for and the table has not.
func (p *placement) findFormer(g *l4.Given) error {
	specs := map[string]map[netip.AddrPort]bool{}
	for i := range g.Conns {
		c := &g.Conns[i]
		if s := p.service(c); c.Cluster == "" || s != nil && p.known(s.Cluster, c.Endpoint) {
			continue
		}
		if specs[c.Cluster] == nil {
			specs[c.Cluster] = map[netip.AddrPort]bool{}
		}
		if c.Endpoint.IsValid() {
			specs[c.Cluster][c.Endpoint] = true
		}
		for _, e := range c.Tried {
			specs[c.Cluster][e] = true
		}
	}
	all := make([]upstream.ClusterSpec, 0, len(specs))
	for name, endpoints := range specs {
		spec := upstream.ClusterSpec{Name: name, Policy: flow.PolicyRoundRobin}
		for e := range endpoints {
			spec.Endpoints = append(spec.Endpoints, upstream.EndpointSpec{Addr: e, Weight: 1})
		}
		all = append(all, spec)
	}
	var err error
	p.former, err = upstream.Build(nil, all, upstream.Options{})
	return err
}

func (p *placement) target(c *l4.Carried) l4.Target {
	t := l4.Target{Downstream: c.Downstream, Terms: p.termsOf(c)}
	s := p.service(c)
	switch {
	case c.Cluster == "":
	case s != nil && p.known(s.Cluster, c.Endpoint):
		t.Cluster = s.Cluster
	default:
		t.Cluster = p.former.Cluster(c.Cluster)
	}
	return t
}

func (p *placement) termsOf(c *l4.Carried) *flow.Terms {
	if s := p.service(c); s != nil && s.Terms.Service == c.Service {
		return &s.Terms
	}
	common := p.table.Terms()
	if c.Service == "" {
		return common
	}
	if p.terms[c.Service] == nil {
		p.terms[c.Service] = &flow.Terms{Service: c.Service, Limits: common.Limits}
	}
	return p.terms[c.Service]
}
