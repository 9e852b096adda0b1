package flow

import (
	"fmt"
	"net/netip"
	"time"
)

// Policy is how an endpoint is picked. The values are those of enum policy in
// bpf/include/abi.h; a test in package bpf compares them.
type Policy uint8

// The policies, the default first.
const (
	PolicyLeastConnections Policy = iota // the less loaded of two drawn at random
	PolicyRoundRobin                     // in turn
	PolicyRandom                         // by weight alone
	PolicyMaglev                         // the same for the same hash

	policyCount
)

var policyNames = [policyCount]string{"least_connections", "round_robin", "random", "maglev"}

// Policies returns every policy, in the order of their values.
func Policies() []Policy {
	return []Policy{PolicyLeastConnections, PolicyRoundRobin, PolicyRandom, PolicyMaglev}
}

// String returns the name that the configuration and the C enum share.
func (p Policy) String() string {
	if p < policyCount {
		return policyNames[p]
	}
	return fmt.Sprintf("policy(%d)", uint8(p))
}

// HashOn is what PolicyMaglev hashes. The values are those of enum hash_on.
type HashOn uint8

// What may be hashed.
const (
	HashSource      HashOn = iota // the application's address
	HashDestination               // the original destination

	hashCount
)

var hashNames = [hashCount]string{"source", "destination"}

// HashOns returns everything that may be hashed, in the order of their values.
func HashOns() []HashOn { return []HashOn{HashSource, HashDestination} }

// String returns the name that the configuration and the C enum share.
func (h HashOn) String() string {
	if h < hashCount {
		return hashNames[h]
	}
	return fmt.Sprintf("hash(%d)", uint8(h))
}

// Set is the endpoints of one service at one moment, arranged so that a pick takes
// the same time however many there are. The kernel side and the handler pick by
// the same set, so that they agree. It is immutable.
type Set struct {
	Policy Policy
	Hash   HashOn
	// Endpoints are those of the first tier, and then those of the second.
	Endpoints []SetEndpoint
	Tiers     [2]Tier
	// Spill is the share, of 2^32, of the connections that go to the second
	// tier.
	Spill uint32
	// Failures is how many connects in a row must fail until an endpoint is
	// ejected (0: it never is), Base and Max bound how long, and Panic is the
	// share in percent of available endpoints below which ejections do not
	// count.
	Failures  int
	Base, Max time.Duration
	Panic     int
}

// SetEndpoint is one endpoint of a set.
type SetEndpoint struct {
	Addr netip.AddrPort // unmapped
	// Weight is 1 to 65535.
	Weight uint16
	// Cut and Alias draw by weight in one step: endpoint i of a tier stays i for
	// Cut of 2^32 draws, and all of them if it is 1<<32-1, else it is endpoint
	// Alias of the tier.
	Cut, Alias uint32
	// Down is true while a health check says so.
	Down bool
}

// Tier is a part of a set: the endpoints of the local zone, or the others. Where
// there are no zones, the first has all.
type Tier struct {
	First, Count int
	// Table holds indices into the tier: for PolicyRoundRobin in whose turn it
	// is, for PolicyMaglev by hash modulo its length, which is a prime. The
	// other policies have none.
	Table []uint32
}
