package config

import (
	"fmt"
	"net/netip"

	"github.com/pillion-project/pillion/redirect/flow"
)

// What the kernel side has room for of all services together; a test compares them
// with its maps.
const (
	maxRelayAddrs = flow.ServiceSlots
	maxSets       = 16384  // services with endpoints
	maxEndpoints  = 131072 // in those
)

// room refuses the services for which there is no room beside those before them, as
// far as a file can tell: what is found at run time comes in addition.
func (k *check) room(c *Config) {
	slots := make(map[netip.Addr]bool)
	sets, endpoints := 0, 0
	for i, s := range c.flagsFirst() {
		path := index("services", i)
		own, _ := c.PathOf(s)
		if own == flow.PathPass || !s.Addr.IsValid() {
			continue
		}
		if a := s.Addr.Addr().Unmap(); own == flow.PathRelay && !slots[a] {
			if len(slots) == maxRelayAddrs {
				k.addOn(s.pathSaid(path), path+".address", "%s: services on relay have %d addresses before this one, and there is room for no more: want path: direct, or another instance", a, maxRelayAddrs)
				continue
			}
			slots[a] = true
		}
		if sets == maxSets {
			k.add(path, "%d services that have endpoints are before this one: the kernel side has room for no more", maxSets)
			continue
		}
		if n := len(s.Endpoints); n > maxEndpoints-endpoints {
			k.add(path+".endpoints", "%d endpoints: %s", n, leftOf(maxEndpoints-endpoints))
			continue
		}
		sets++
		endpoints += len(s.Endpoints)
	}
}

// leftOf says how many endpoints there is room for.
func leftOf(n int) string {
	return fmt.Sprintf("of the %d that the kernel side has room for, the services before this one leave %d", maxEndpoints, n)
}
