package upstream

import (
	"syscall"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/health"
)

// ErrNoEndpoint means that a cluster has no endpoint that may be picked.
var ErrNoEndpoint = flow.NewError(flow.ReasonNoEndpoint, "no endpoint available")

// Picker chooses an endpoint for one connection: a balancing policy. It is safe
// for concurrent use, does bounded work, takes no lock and allocates nothing.
type Picker interface {
	// Pick returns an available endpoint, or ErrNoEndpoint. A policy that keeps
	// like connections together does so by key; the others ignore it.
	Pick(key uint64) (*Endpoint, error)
}

// NewPicker makes the picker of one cluster in one snapshot. endpoints is the
// cluster's own slice and must not be changed. random gives uniform bits.
type NewPicker func(endpoints []*Endpoint, random func() uint64) Picker

// Cluster is a set of endpoints that serve the same thing. It is immutable.
type Cluster struct {
	Name      string
	Endpoints []*Endpoint
	// NoEndpoint is what connect(2) returns when no endpoint may be picked, where
	// that can still be told; 0 is ECONNREFUSED.
	NoEndpoint syscall.Errno

	picker  Picker
	group   *health.Group
	monitor *health.Monitor
}

// repicks is how often the policy is asked again when it picks an endpoint
// that was tried already. More would only help clusters in which most was
// tried, and there the search that follows is as good.
const repicks = 4

// Pick chooses an endpoint for one attempt of a connection. tried is what
// earlier attempts of the same connection were given; those are avoided as long
// as there is another. A retry also avoids ejected endpoints for as long as it
// can, even in panic, since it is the connection's last chances that it spends.
//
// Pick is lock-free, allocates nothing, and is safe for concurrent use.
func (c *Cluster) Pick(key uint64, tried []*Endpoint) (*Endpoint, error) {
	pick, err := c.picker.Pick(key)
	if err != nil || len(tried) == 0 || len(c.Endpoints) == 1 {
		return pick, err
	}
	first := pick
	for i := range repicks {
		if !has(tried, pick) && !pick.ejected() {
			return pick, nil
		}
		// Another key, or a policy that goes by the key would not move. The
		// multiplier is the odd number next to 2^64 divided by the golden ratio.
		pick, err = c.picker.Pick(key + uint64(i+1)*0x9e3779b97f4a7c15)
		if err != nil {
			return first, nil // everything was ejected in the meantime
		}
	}
	if other := c.untried(tried); other != nil {
		return other, nil
	}
	return first, nil
}

// Wait returns 0 if an endpoint may be picked, and else after how long one may
// again: all of them are ejected, and the configuration knows no panic.
func (c *Cluster) Wait() time.Duration { return c.group.Wait() }

// untried returns an endpoint that is not in tried: one that is not ejected if
// there is any, else an ejected one unless the configuration says that
// ejections always hold, else nil. It starts anywhere, so that the neighbour of
// a dead endpoint does not get all of its connections.
func (c *Cluster) untried(tried []*Endpoint) *Endpoint {
	n := uint64(len(c.Endpoints))
	start := c.monitor.Random() % n
	var resort *Endpoint
	for i := range n {
		e := c.Endpoints[(start+i)%n]
		switch {
		case has(tried, e):
		case !e.ejected():
			return e
		case resort == nil && c.group.Config.Panic > 0:
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
