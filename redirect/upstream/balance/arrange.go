package balance

import (
	"slices"

	"github.com/pillion-project/pillion/redirect/flow"
)

// Endpoint is what an arrangement goes by.
type Endpoint = flow.Endpoint

// Arrange lays endpoints out for a policy. Those of zone are the first tier and all
// others the second; without a zone, or where no endpoint is in it, the first has
// all. In a tier they keep their order. order[i] is the index in endpoints of the
// set's endpoint i.
//
// Only Policy, Endpoints and Tiers are set, and of the endpoints not Down.
func Arrange(policy flow.Policy, zone string, endpoints []Endpoint) (set flow.Set, order []int) {
	local := func(e Endpoint) bool { return e.Zone == zone }
	if zone == "" || !slices.ContainsFunc(endpoints, local) {
		local = func(Endpoint) bool { return true }
	}
	order = make([]int, 0, len(endpoints))
	for tier, isLocal := range []bool{true, false} {
		set.Tiers[tier].First = len(order)
		for i, e := range endpoints {
			if local(e) == isLocal {
				order = append(order, i)
			}
		}
		set.Tiers[tier].Count = len(order) - set.Tiers[tier].First
	}
	set.Policy = policy
	set.Endpoints = make([]flow.SetEndpoint, len(order))
	for i, from := range order {
		e := &endpoints[from]
		set.Endpoints[i] = flow.SetEndpoint{Addr: e.Addr, Weight: uint16(e.Weight)}
	}
	for i := range set.Tiers {
		t := &set.Tiers[i]
		members := set.Endpoints[t.First : t.First+t.Count]
		alias(members)
		switch policy {
		case flow.PolicyRoundRobin:
			t.Table = roundRobinTable(members)
		case flow.PolicyMaglev:
			t.Table = maglevTable(members)
		case flow.PolicyRandom, flow.PolicyLeastConnections:
		}
	}
	return set, order
}

// alias sets Cut and Alias of the endpoints of a tier, by Vose's method, in whole
// numbers. Endpoint i is drawn first for 1/n of draws; what it has too little of
// weight for is given to one that has too much.
func alias(endpoints []flow.SetEndpoint) {
	n := uint64(len(endpoints))
	var sum uint64
	for i := range endpoints {
		sum += uint64(endpoints[i].Weight)
	}
	// left is in n-ths of a weight, of which everyone is to hold sum.
	left := make([]uint64, n)
	var poor, rich []int
	for i := range endpoints {
		endpoints[i].Cut, endpoints[i].Alias = flow.All, uint32(i)
		left[i] = uint64(endpoints[i].Weight) * n
		switch {
		case left[i] < sum:
			poor = append(poor, i)
		case left[i] > sum:
			rich = append(rich, i)
		default:
		}
	}
	for len(poor) > 0 {
		// While somebody has too little, somebody has too much.
		p, r := poor[len(poor)-1], rich[len(rich)-1]
		poor = poor[:len(poor)-1]
		endpoints[p].Cut, endpoints[p].Alias = uint32(left[p]<<32/sum), uint32(r)
		left[r] -= sum - left[p]
		if left[r] <= sum {
			rich = rich[:len(rich)-1]
		}
		if left[r] < sum {
			poor = append(poor, r)
		}
	}
}
