package flow

import (
	"fmt"
	"math/bits"
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

// Limits of a set, as PL_SET_ENDPOINTS and PL_SET_TABLE in bpf/include/abi.h.
const (
	SetEndpoints = 16384  // of one service
	SetTable     = 131072 // entries of one table, at most
)

// ServiceSlots is how many addresses services on relay may have, all together: each
// has a slot reserved.
const ServiceSlots = 4096

// PickTurns and PickDraws bound how many turns (PolicyRoundRobin) and draws (all
// policies) a pick spends until it looks at every endpoint of a tier. With half of
// the weight left, 16 draws find nothing once in 65536 picks.
const (
	PickTurns = 32
	PickDraws = 16
)

// All is a share of 2^32 that means all of them: as Cut and as Spill.
const All = 1<<32 - 1

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
	// tier; see [Set.Overflow].
	Spill uint32
	// Failures is how many connects in a row must fail until an endpoint is
	// ejected (0: it never is), and Base and Max bound how long. While, of the
	// endpoints that are not down, less than Panic percent are not ejected,
	// ejections do not count. That an endpoint is down always does.
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
	// Cut of 2^32 draws, and for all of them if it is All, else it is endpoint
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

// overprovision is by how much a tier can do more than its usual share: only when
// less than 1/1.4 of its weight is available do connections spill over. It is
// Envoy's factor, in tenths.
const overprovision = 14

// Overflow returns what Spill is to be while available tells of each endpoint, by
// its index, whether it may be picked. All connections stay in the local zone
// while 1/1.4 of its weight is available; below that its share is what is
// available of that, and All is spilled when nothing is.
func (s *Set) Overflow(available func(i int) bool) uint32 {
	local := s.Tiers[0]
	if s.Tiers[1].Count == 0 {
		return 0
	}
	var sum, left uint64
	for i := local.First; i < local.First+local.Count; i++ {
		w := uint64(s.Endpoints[i].Weight)
		sum += w
		if available(i) {
			left += w
		}
	}
	switch can := left * overprovision; {
	case can >= sum*10:
		return 0
	case can == 0:
		return All
	default:
		hi, lo := bits.Mul64(can, All)
		share, _ := bits.Div64(hi, lo, sum*10)
		return All - uint32(share)
	}
}
