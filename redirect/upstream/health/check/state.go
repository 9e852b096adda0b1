package check

import (
	"net/netip"
	"time"
)

// State is what is known about a target.
type State uint8

// The states of a target.
const (
	StateUnknown State = iota // no check has ended yet: it counts as up
	StateUp
	StateDown
)

// String returns the state as listings and metrics have it.
func (s State) String() string {
	switch s {
	case StateUp:
		return "up"
	case StateDown:
		return "down"
	default:
		return "unknown"
	}
}

// Target is one endpoint of one cluster, and how it is checked.
type Target struct {
	Cluster string
	// Former is the name that the cluster had in the set before, whose state the
	// target takes over where it has none of its own; empty: the same.
	Former string
	Addr   netip.AddrPort
	Spec   Spec
}

// Change says that a target has another state than before.
type Change struct {
	Cluster string
	Addr    netip.AddrPort // unmapped
	// State is StateUp or StateDown. A target's first change comes from
	// StateUnknown.
	State State
	// Err is why it is down, or nil.
	Err error
}

// Status is a target at one moment, for listings.
type Status struct {
	Cluster string
	Addr    netip.AddrPort // unmapped
	State   State
	// Since is when the state began; zero while it is unknown.
	Since time.Time
	// Checked is when the last check ended, Latency how long it took; zero if
	// there was none.
	Checked time.Time
	Latency time.Duration
	// Err is why the last check failed, or empty. It may be set on a target that
	// is up: one failure is not enough, or the failure is not the endpoint's.
	Err string
	// Against is how many checks in a row have spoken against the state.
	Against int
	// Passed and Failed count the checks that ended, since the target or its Spec was
	// set. One whose failure is not the endpoint's is in neither.
	Passed, Failed uint64
}
