package probe

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The slot supernets of bpf/include/abi.h. An instance claims one /16 or /64.
var (
	super4 = netip.MustParsePrefix("240.0.0.0/10")
	super6 = netip.MustParsePrefix("fd70:696c:6c69::/48")
)

// protoKernel is the protocol of the routes that addresses bring along.
const protoKernel = unix.RTPROT_KERNEL

// checkRanges looks for users of the slot supernets other than Pillion, in this
// thread's network namespace. They are not in the way of a claim, but an
// application in scope cannot reach an address of the supernet.
func checkRanges(_ context.Context, _ *machine) []Finding {
	const name = "slot ranges"
	var clash []string
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return []Finding{warning(name, "run it with access to rtnetlink", "addresses not checked: %v", err)}
	}
	for _, a := range addrs {
		if p, ok := prefixOf(a.IPNet); ok && inSupernet(p) {
			clash = append(clash, "address "+p.String())
		}
	}
	ours := 0
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		// Of every table: without this filter only main is listed.
		all := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
		err := netlink.RouteListFilteredIter(family, all, netlink.RT_FILTER_TABLE, func(r netlink.Route) bool {
			what, mine := judgeRoute(r)
			if mine {
				ours++
			}
			if what != "" {
				clash = append(clash, what)
			}
			return true
		})
		if err != nil {
			return []Finding{warning(name, "run it again", "routes not checked: %v", err)}
		}
	}
	if len(clash) > 0 {
		return []Finding{warning(name, "give these another range: applications in scope are refused when they connect to an address of "+super4.String()+" or "+super6.String(),
			"used by others: %s", listed(clash))}
	}
	return []Finding{good(name, "free of others, %d routes of Pillion's", ours)}
}

// judgeRoute describes a route that clashes, and tells whether it is Pillion's.
func judgeRoute(r netlink.Route) (clash string, ours bool) {
	p, ok := prefixOf(r.Dst)
	if !ok || !inSupernet(p) {
		return "", false
	}
	if r.Protocol == RouteProtocol {
		return "", true
	}
	// An address is reported as such; a blackhole behind the local table
	// has no say over local addresses.
	if r.Protocol == protoKernel || r.Type == unix.RTN_BLACKHOLE || r.Type == unix.RTN_UNREACHABLE || r.Type == unix.RTN_PROHIBIT {
		return "", false
	}
	return fmt.Sprintf("route %s (table %d, protocol %d)", p, r.Table, r.Protocol), false
}

// inSupernet tells whether the prefix has addresses in common with a supernet.
// The default route does not count: it is everybody's.
func inSupernet(p netip.Prefix) bool {
	return p.Bits() > 0 && (p.Overlaps(super4) || p.Overlaps(super6))
}

// prefixOf returns the prefix with its address as it stands, host bits and all.
func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	bits, size := n.Mask.Size()
	a = a.Unmap()
	if !ok || size != a.BitLen() {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a, bits), true
}
