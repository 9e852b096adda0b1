package loader

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
)

// randomSet is a set of one tier that is picked from by weight alone.
func randomSet(addrs ...netip.AddrPort) *flow.Set {
	s := &flow.Set{Policy: flow.PolicyRandom}
	for i, a := range addrs {
		s.Endpoints = append(s.Endpoints, flow.SetEndpoint{Addr: a, Weight: 1, Cut: 1<<32 - 1, Alias: uint32(i)})
	}
	s.Tiers[0].Count = len(addrs)
	return s
}

// many are endpoints of service n.
func many(n, count int) []netip.AddrPort {
	all := make([]netip.AddrPort, count)
	for i := range all {
		all[i] = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(n >> 8), byte(n), byte(i)}), uint16(8000+i>>8))
	}
	return all
}

func manyServices(services, endpoints int) ([]Service, map[netip.AddrPort]*flow.Set) {
	var all []Service
	sets := map[netip.AddrPort]*flow.Set{}
	for n := range services {
		a := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, byte(100 + n>>8), byte(n)}), 80)
		all = append(all, Service{Addr: a, Path: flow.PathDirect})
		sets[a] = randomSet(many(n, endpoints)...)
	}
	return all, sets
}

func TestPublishMany(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	services, sets := manyServices(1000, 100)
	rules := plain
	rules.Services = services
	setRules(t, d, rules)
	for range 4 {
		start := time.Now()
		if err := d.SetEndpoints(sets); err != nil {
			t.Fatal(err)
		}
		fmt.Println(time.Since(start))
		for a, s := range sets {
			c := *s
			c.Policy = flow.PolicyLeastConnections - c.Policy + flow.PolicyRandom
			sets[a] = &c
		}
	}
}
