package loader

import (
	"net/netip"

	"github.com/pillion-project/pillion/redirect/flow"
)

// Verdict is what the connect hook would do with a connection.
type Verdict struct {
	Path   flow.Path
	Reason flow.Reason
	// Rule is the index in Rules.Deny or Rules.Exclude of the rule that decides;
	// -1: none does.
	Rule int
	// Service is not valid when none has the address.
	Service netip.AddrPort
	// Endpoint is what a pick gives for a service with a set, whatever the path,
	// and Tier is which it is in. It is not valid when there is nothing to pick.
	Endpoint netip.AddrPort
	Tier     int
}

// DryRun asks the connect hook's own code what it would do now with a connection
// from source (not valid: unbound) to dst. It changes no counter.
func (d *Datapath) DryRun(source netip.Addr, dst netip.AddrPort) (Verdict, error) {
	return Verdict{Rule: -1}, nil
}
