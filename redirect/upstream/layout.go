package upstream

import (
	"slices"
	"sync"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/balance"
)

// layout is how the endpoints of a cluster are arranged. It is immutable, and taken
// over by the next snapshot if nothing of it has changed.
type layout struct {
	policy    flow.Policy
	zone      string
	endpoints []EndpointSpec
	all       arrangement
	families  [2]func() arrangement // IPv4 and IPv6, made when they are asked for
}

// arrangement is a set of which endpoint i is endpoint order[i] of the cluster.
type arrangement struct {
	set   flow.Set
	order []int
}

func newLayout(spec *ClusterSpec) *layout {
	l := &layout{policy: spec.Policy, zone: spec.Zone, endpoints: spec.Endpoints}
	if slices.ContainsFunc(spec.Endpoints, func(e EndpointSpec) bool { return e.Addr.Addr().Is4In6() }) {
		l.endpoints = slices.Clone(spec.Endpoints)
		for i := range l.endpoints {
			l.endpoints[i].Addr = unmap(l.endpoints[i].Addr)
		}
	}
	l.all = l.arrange(func(*EndpointSpec) bool { return true })
	for i, v4 := range []bool{true, false} {
		l.families[i] = sync.OnceValue(func() arrangement { return l.arrangeFamily(v4) })
	}
	return l
}

// same tells whether the spec asks for this layout.
func (l *layout) same(spec *ClusterSpec) bool {
	return l.policy == spec.Policy && l.zone == spec.Zone &&
		slices.EqualFunc(l.endpoints, spec.Endpoints, func(a, b EndpointSpec) bool {
			b.Addr = unmap(b.Addr)
			return a == b
		})
}

func (l *layout) family(v4 bool) arrangement {
	if v4 {
		return l.families[0]()
	}
	return l.families[1]()
}

func (l *layout) arrangeFamily(v4 bool) arrangement {
	// A hook can write an address, but not the link that it is on.
	is := func(e *EndpointSpec) bool { return e.Addr.Addr().Is4() == v4 && e.Addr.Addr().Zone() == "" }
	if !slices.ContainsFunc(l.endpoints, func(e EndpointSpec) bool { return !is(&e) }) {
		return l.all
	}
	return l.arrange(is)
}

// arrange arranges the endpoints that are wanted.
func (l *layout) arrange(wanted func(*EndpointSpec) bool) arrangement {
	if !slices.ContainsFunc(l.endpoints, func(e EndpointSpec) bool { return !wanted(&e) }) {
		set, order := balance.Arrange(l.policy, l.zone, l.endpoints)
		return arrangement{set: set, order: order}
	}
	endpoints := make([]balance.Endpoint, 0, len(l.endpoints))
	indices := make([]int, 0, len(l.endpoints))
	for i := range l.endpoints {
		if e := &l.endpoints[i]; wanted(e) {
			endpoints = append(endpoints, *e)
			indices = append(indices, i)
		}
	}
	set, order := balance.Arrange(l.policy, l.zone, endpoints)
	for i := range order {
		order[i] = indices[order[i]]
	}
	return arrangement{set: set, order: order}
}
