package upstream

import (
	"slices"
	"syscall"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/balance"
	"github.com/pillion-project/pillion/redirect/upstream/health"
)

// ErrNoEndpoint means that a cluster has no endpoint that may be picked.
var ErrNoEndpoint = flow.NewError(flow.ReasonNoEndpoint, "no endpoint available")

// Cluster is a set of endpoints that serve the same thing. It is immutable.
type Cluster struct {
	Name      string
	Endpoints []*Endpoint
	// NoEndpoint is what connect(2) returns when no endpoint may be picked, where
	// that can still be told; 0 is ECONNREFUSED.
	NoEndpoint syscall.Errno

	hash    flow.HashOn
	layout  *layout
	members members // in the order of layout.all
	group   *health.Group
	shared  *shared
}

// shared is the part of a cluster that outlives a snapshot.
type shared struct {
	monitor *health.Monitor
	turns   balance.Turns
}

// members is the endpoints of a set, for [balance.Pick].
type members []*Endpoint

// Available implements [balance.Members].
func (m *members) Available(i int) bool { return (*m)[i].Available() }

// Live implements [balance.Members].
func (m *members) Live(i int) int64 { return (*m)[i].Live() }

// repicks is how often the policy is asked again when it picks an endpoint
// that was tried already. More would only help clusters in which most was
// tried, and there the search that follows is as good.
const repicks = 4

// Key returns what Pick is to be given for a connection: its hash where the policy
// goes by one. It is the hash that the connect hook takes on path direct.
func (c *Cluster) Key(d *flow.Downstream) uint32 {
	switch {
	case c.layout.policy != flow.PolicyMaglev:
		return 0
	case c.hash == flow.HashDestination:
		return flow.Hash(d.OrigDst.Addr(), d.OrigDst.Port())
	default:
		return flow.Hash(d.Source.Addr(), 0)
	}
}

// Pick chooses an endpoint for one attempt of a connection, by the cluster's
// policy. key is what Key returns. tried is what earlier attempts of the same
// connection were given; those are avoided as long as there is another. A retry
// also avoids ejected endpoints for as long as it can, even in panic, since it is
// the connection's last chances that it spends.
//
// Pick is lock-free, allocates nothing, and is safe for concurrent use.
func (c *Cluster) Pick(key uint32, tried []*Endpoint) (*Endpoint, error) {
	spill := c.Spill()
	first := c.pick(spill, c.seed(key))
	if first == nil {
		return nil, ErrNoEndpoint
	}
	if len(tried) == 0 || len(c.Endpoints) == 1 {
		return first, nil
	}
	pick := first
	// Other keys, or a policy that goes by the key would not move.
	keys := flow.Words(key)
	for range repicks {
		if !has(tried, pick) && !pick.out() {
			return pick, nil
		}
		if pick = c.pick(spill, c.seed(keys.Next())); pick == nil {
			return first, nil // everything was ejected in the meantime
		}
	}
	if other := c.untried(tried); other != nil {
		return other, nil
	}
	return first, nil
}

// seed returns what a pick draws from.
func (c *Cluster) seed(key uint32) uint32 {
	if c.layout.policy == flow.PolicyMaglev {
		return key
	}
	return uint32(c.shared.monitor.Random())
}

func (c *Cluster) pick(spill, seed uint32) *Endpoint {
	i := balance.Pick(&c.layout.all.set, spill, &c.shared.turns, &c.members, seed)
	if i < 0 {
		return nil
	}
	return c.members[i]
}

// Spill returns the share, of 2^32, of the connections that go to other zones: as
// [flow.Set.Overflow] of the endpoints that are available now.
func (c *Cluster) Spill() uint32 {
	if c.layout.all.set.Tiers[1].Count == 0 {
		return 0
	}
	return c.group.Spill()
}

// Set returns the endpoints of one address family, but those with a zone, arranged
// for the kernel side, with their health of now: Down, and a Spill by what is down or was ejected
// here. The hooks eject for themselves; whoever knows their ejections makes the
// Spill of them by [flow.Set.Overflow]. The caller must not change
// the tables nor the endpoints.
//
// Arranging takes a few ms for 10,000 endpoints, once for as long as they stay.
func (c *Cluster) Set(v4 bool) flow.Set {
	a := c.layout.family(v4)
	set := a.set
	set.Hash = c.hash
	set.Failures, set.Panic = c.group.Config.Failures, c.group.Config.Panic
	if set.Failures > 0 { // else nobody waits, and the waits may be any
		set.Base, set.Max = c.group.Config.Base, c.group.Config.Max
	}
	if slices.ContainsFunc(c.Endpoints, (*Endpoint).Down) {
		set.Endpoints = slices.Clone(set.Endpoints)
		for i, from := range a.order {
			set.Endpoints[i].Down = c.Endpoints[from].Down()
		}
	}
	set.Spill = set.Overflow(func(i int) bool { return c.Endpoints[a.order[i]].Available() })
	return set
}

// Wait returns 0 if an endpoint may be picked, and else after how long one may be
// again: all of them are ejected, and the configuration knows no panic, or down, or
// there are none. Of those nobody knows how long it lasts: it counts as a second.
func (c *Cluster) Wait() time.Duration { return c.group.Wait() }

// untried returns an endpoint that is not in tried: one that is neither down nor
// ejected if there is any, else an ejected one unless the configuration says that
// ejections always hold, else nil. It starts anywhere, so that the neighbour of
// a dead endpoint does not get all of its connections.
func (c *Cluster) untried(tried []*Endpoint) *Endpoint {
	n := uint64(len(c.Endpoints))
	start := c.shared.monitor.Random() % n
	var resort *Endpoint
	for i := range n {
		e := c.Endpoints[(start+i)%n]
		switch {
		case has(tried, e):
		case !e.out():
			return e
		case resort == nil && c.group.Config.Panic > 0 && !e.Down():
			resort = e
		default:
		}
	}
	return resort
}

// has compares what endpoints share over snapshots: a reload between two
// attempts does not make an endpoint a new one.
func has(tried []*Endpoint, e *Endpoint) bool {
	for _, t := range tried {
		if t.record == e.record {
			return true
		}
	}
	return false
}
