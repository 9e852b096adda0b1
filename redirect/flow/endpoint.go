package flow

import "net/netip"

// Endpoint is one address that serves a service. Lists of them are handed from who finds
// them to who balances over them, and are never changed.
type Endpoint struct {
	Addr netip.AddrPort // unmapped, where nothing else is said
	// Weight is its share of the connections, 1 to 65535.
	Weight uint32
	// Zone is where it is, or empty.
	Zone string
}
