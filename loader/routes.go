package loader

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"

	"github.com/pillion-project/pillion/bpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// way is what the kernel side knows of one prefix: the value of the map routes.
type way struct {
	kind   uint32
	source netip.Addr // invalid: that of the slot routes
}

var (
	everything4 = netip.MustParsePrefix("0.0.0.0/0")
	everything6 = netip.MustParsePrefix("::/0")
	// unique6 are the unique local addresses: one default route has another
	// source towards them (RFC 6724) where the namespace has one of them.
	unique6 = netip.MustParsePrefix("fc00::/7")
)

const (
	// routesMax is how many routes the kernel side is told of. A router that
	// has more has a way to everywhere.
	routesMax = 60000
	// asksMax bounds how often the kernel is asked for a route's source. Of
	// the routes beyond, only those are known that say it themselves.
	asksMax = 1000
)

// routeTable lists where the namespace has a way to: prefixes, in the form of
// the map routes, whether packets can go there, and from which address.
func (n *network) routeTable(own []netip.Addr) (map[netip.Prefix]way, error) {
	list, err := n.handle.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{}, netlink.RT_FILTER_TABLE)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	all := make(map[netip.Prefix]way, len(list))
	best := make(map[netip.Prefix]*netlink.Route, len(list))
	for i := range list {
		r := &list[i]
		p, ok := routePrefix(r)
		if !ok || r.Table == unix.RT_TABLE_LOCAL {
			continue
		}
		kind := bpf.RouteUnicast
		switch r.Type {
		case unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT, unix.RTN_BLACKHOLE, unix.RTN_THROW:
			kind = bpf.RouteNone
		}
		// Of two tables the one that knows a way wins: which one a packet
		// takes is a matter of rules that we do not read.
		if all[p].kind != bpf.RouteUnicast {
			all[p] = way{kind: kind}
		}
		if _, ok := best[p]; ok {
			best[p] = nil // which of them, the kernel knows
		} else {
			best[p] = r
		}
	}
	if len(all) >= routesMax {
		unicast := way{kind: bpf.RouteUnicast}
		return map[netip.Prefix]way{everything4: unicast, everything6: unicast}, nil
	}
	if _, ok := all[unique6]; !ok && all[everything6].kind == bpf.RouteUnicast {
		all[unique6] = way{kind: bpf.RouteUnicast}
	}
	n.sources(all, best, own)
	// An IPv4 address stands below ::/0 in the map, and must not match the
	// IPv6 default route.
	if _, ok := all[everything4]; !ok {
		all[everything4] = way{kind: bpf.RouteNone}
	}
	return all, nil
}

func routePrefix(r *netlink.Route) (netip.Prefix, bool) {
	if r.Dst == nil {
		return everything4, r.Family == netlink.FAMILY_V4
	}
	ip, ok := netip.AddrFromSlice(r.Dst.IP)
	bits, size := r.Dst.Mask.Size()
	if !ok || size == 0 {
		return netip.Prefix{}, false
	}
	if r.Family == netlink.FAMILY_V4 {
		ip = ip.Unmap()
	}
	return netip.PrefixFrom(ip, bits), true
}

// hop is what the kernel takes the source of an IPv4 route from that names none.
type hop struct {
	table, link int
	scope       netlink.Scope
	via         netip.Addr
}

// sources fills in the source of every way where it is not that of the slot
// routes. best has the route that a prefix has, or nil where it has several.
func (n *network) sources(all map[netip.Prefix]way, best map[netip.Prefix]*netlink.Route, own []netip.Addr) {
	slot := map[bool]netip.Addr{false: n.source(false), true: n.source(true)}
	owned := make(map[netip.Addr]bool, len(own))
	for _, a := range own {
		owned[a] = true
	}
	known := map[hop]netip.Addr{}
	asks := 0
	// In order, so that it is the same ones every time that are not known.
	for _, p := range slices.SortedFunc(maps.Keys(all), netip.Prefix.Compare) {
		w := all[p]
		if w.kind != bpf.RouteUnicast {
			continue
		}
		source, ok := explicit(best[p])
		key, same := hopOf(best[p])
		if !ok && same {
			source, ok = known[key]
		}
		if !ok && asks < asksMax {
			asks++
			source = n.sourceTo(example(p, all, owned))
			if same && source.IsValid() {
				known[key] = source
			}
		}
		// The kernel shows a link-local address with its scope.
		if source == slot[p.Addr().Is6()] || source.IsLinkLocalUnicast() {
			continue
		}
		w.source = source
		all[p] = w
	}
}

// explicit is the source that a route of the main table names.
func explicit(r *netlink.Route) (netip.Addr, bool) {
	if r == nil || r.Table != unix.RT_TABLE_MAIN {
		return netip.Addr{}, false
	}
	a, ok := netip.AddrFromSlice(r.Src)
	return a.Unmap(), ok
}

// hopOf tells whether other routes over the same hop have the same source. IPv6
// chooses one for every destination.
func hopOf(r *netlink.Route) (h hop, ok bool) {
	if r == nil || r.Family != netlink.FAMILY_V4 || len(r.MultiPath) > 0 || r.Via != nil || r.Table != unix.RT_TABLE_MAIN || r.Src != nil {
		return hop{}, false
	}
	via, _ := netip.AddrFromSlice(r.Gw)
	return hop{r.Table, r.LinkIndex, r.Scope, via.Unmap()}, true
}

// exampleTries bounds the search for an address whose route is that of a prefix.
const exampleTries = 8

// example returns an address whose route is that of the prefix: no other prefix
// is nearer to it, and it is not local. It is invalid if there is none at hand.
func example(p netip.Prefix, all map[netip.Prefix]way, own map[netip.Addr]bool) netip.Addr {
	a := p.Addr()
	switch {
	case p == everything4:
		a = anywhere4
	case p == everything6:
		a = anywhere6
	case !p.IsSingleIP() && p.Bits() < a.BitLen()-1:
		a = a.Next() // the first is the network's own
	}
	for range exampleTries {
		if !p.Contains(a) {
			break
		}
		if near := nearest(a, all); near == p && !own[a] {
			return a
		} else if near != p {
			// Beyond what is nearer.
			a = last(near)
		}
		a = a.Next()
	}
	return netip.Addr{}
}

// nearest is the longest prefix that holds an address.
func nearest(a netip.Addr, all map[netip.Prefix]way) netip.Prefix {
	for bits := a.BitLen(); bits >= 0; bits-- {
		p := netip.PrefixFrom(a, bits).Masked()
		if _, ok := all[p]; ok {
			return p
		}
	}
	return netip.Prefix{}
}

// last is a prefix' last address.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// sourceTo asks the kernel which source a socket towards an address has.
func (n *network) sourceTo(to netip.Addr) netip.Addr {
	if !to.IsValid() {
		return netip.Addr{}
	}
	routes, err := n.handle.RouteGet(net.IP(to.AsSlice()))
	if err != nil || len(routes) == 0 {
		return netip.Addr{}
	}
	a, _ := netip.AddrFromSlice(routes[0].Src)
	return a.Unmap()
}
