package loader

import (
	"net/netip"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
)

// EndpointState is what the kernel side knows of an endpoint. It outlives sets and
// processes.
type EndpointState struct {
	Addr netip.AddrPort
	// InSet is false for an endpoint that was removed and still has connections,
	// or had some a moment ago.
	InSet bool
	// Live is how many connections are open or connecting.
	Live int
	// Connects counts those that were answered, Failed those that were not,
	// Failures the latter in a row while it is not ejected.
	Connects, Failed uint64
	Failures         int
	// Ejections counts how often it was ejected. Ejected is how much longer it
	// is; Trial is true when that is over, and it has not proved itself yet.
	Ejections int
	Ejected   time.Duration
	Trial     bool
	// Down is what SetDown said.
	Down bool
	// Last is how the last failed connect ended; flow.ReasonNone: none has.
	Last flow.Reason
}

// EndpointStates returns the endpoints of a service, sorted by address. It fails
// with [ErrNoService].
func (d *Datapath) EndpointStates(service netip.AddrPort) ([]EndpointState, error) { return nil, nil }
