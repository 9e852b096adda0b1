package discover

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/pillion-project/pillion/redirect/flow"
)

// MaxWeight is the largest weight of an endpoint.
const MaxWeight = 65535

// MaxEndpoints is how many a set may have.
const MaxEndpoints = flow.SetEndpoints

// slotRanges are the supernets of which every instance takes its slots: a
// connection to them comes back to a handler.
var slotRanges = []netip.Prefix{
	netip.MustParsePrefix("240.0.0.0/10"),
	netip.MustParsePrefix("fd70:696c:6c69::/48"),
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// CheckAddr says why an address can be no endpoint's: TCP does not reach it, or a
// connection to it would come back to the handler.
func CheckAddr(a netip.Addr) error {
	a = a.Unmap()
	isIn := func(p netip.Prefix) bool { return p.Contains(a.WithZone("")) }
	switch {
	case !a.IsValid():
		return errors.New("no address")
	case slices.ContainsFunc(slotRanges, isIn):
		return fmt.Errorf("%s is a slot address, where Pillion's own handler listens: a connection would go round for ever", a)
	case a.IsUnspecified():
		return fmt.Errorf("%s is the unspecified address: want the one that the endpoint is reached at", a)
	case a.IsMulticast() || a == broadcast:
		return fmt.Errorf("%s is a multicast or broadcast address: TCP reaches none", a)
	case a.Is6() && a.IsLinkLocalUnicast() && a.Zone() == "":
		return fmt.Errorf("%s is a link-local address: want it with its zone, such as %s%%eth0", a, a)
	default:
		return nil
	}
}

// Sort brings endpoints into the order of their addresses, so that sets can be
// compared by [slices.Equal].
func Sort(endpoints []Endpoint) {
	slices.SortFunc(endpoints, func(a, b Endpoint) int {
		return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Weight, b.Weight), cmp.Compare(a.Zone, b.Zone))
	})
}
