package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/loader/probe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The supernets that all instances take their ranges from (bpf/include/abi.h).
var (
	super4 = netip.MustParsePrefix("240.0.0.0/10")
	super6 = netip.MustParsePrefix("fd70:696c:6c69::/48")
)

// Supernets returns the prefixes that every instance takes its slots from. No
// application's and no endpoint's address is in them.
func Supernets() []netip.Prefix { return []netip.Prefix{super4, super6} }

// ranges is how many /16 are in super4, and how many instances a network
// namespace can have.
const ranges = 64

// ErrNoRange means that every range of slots is taken in this namespace.
var ErrNoRange = errors.New("no free range of slots")

// slotRange is an instance's own part of the supernets, by its number.
type slotRange struct {
	number int
	// families says which of the two could be had: bit 0 IPv4, bit 1 IPv6.
	families uint32
}

func (r slotRange) slot4() uint32 {
	first := super4.Addr().As4()
	return binary.BigEndian.Uint32(first[:]) | uint32(r.number)<<16
}

func (r slotRange) slot6() uint32 { return uint32(r.number) }

func (r slotRange) prefix4() netip.Prefix { return netip.PrefixFrom(r.addr4(0), 16) }

func (r slotRange) prefix6() netip.Prefix { return netip.PrefixFrom(r.addr6(0), 64) }

// addr4 returns the address of slot n.
func (r slotRange) addr4(n uint16) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], r.slot4()|uint32(n))
	return netip.AddrFrom4(b)
}

func (r slotRange) addr6(n uint16) netip.Addr {
	b := super6.Addr().As16()
	binary.BigEndian.PutUint16(b[6:], uint16(r.slot6()))
	binary.BigEndian.PutUint16(b[14:], n)
	return netip.AddrFrom16(b)
}

// listener returns the addresses that the handler listens on, invalid where
// there is no such family.
func (r slotRange) addrs(n uint16) (v4, v6 netip.Addr) {
	if r.families&1 != 0 {
		v4 = r.addr4(n)
	}
	if r.families&2 != 0 {
		v6 = r.addr6(n)
	}
	return v4, v6
}

// prefixes are those of the families that there are.
func (r slotRange) prefixes() []netip.Prefix {
	var all []netip.Prefix
	if r.families&1 != 0 {
		all = append(all, r.prefix4())
	}
	if r.families&2 != 0 {
		all = append(all, r.prefix6())
	}
	return all
}

func rangeOf(i *bpf.Instance) slotRange {
	return slotRange{number: int(i.Slot6), families: i.Families}
}

// claim takes the first range that nobody has, starting at the one that the
// process number says, so that two starts at once seldom meet. Adding the route
// is the claim: the kernel lets only one do it. intend is called before each
// try, to put on record what may have to be swept.
func (n *network) claim(start int, intend func(slotRange) error) (slotRange, error) {
	for i := range ranges {
		r := slotRange{number: (start + i) % ranges}
		if err := intend(r); err != nil {
			return r, err
		}
		err := n.addRoute(r.prefix4())
		if errors.Is(err, unix.EEXIST) {
			continue
		}
		if err != nil {
			return r, fmt.Errorf("claim %s: %w", r.prefix4(), err)
		}
		r.families = 1
		switch err := n.addRoute(r.prefix6()); {
		case err == nil:
			r.families |= 2
		case errors.Is(err, unix.EEXIST):
			// Back goes what we added; the other one is somebody else's.
			if err := n.removeRoute(r.prefix4()); err != nil {
				return r, err
			}
			continue
		default:
			// IPv6 is switched off: its connections go by on_failure, which
			// says no_family.
		}
		return r, nil
	}
	return slotRange{}, ErrNoRange
}

// slotRoute is the route that brings a range of slots home. src is what
// unbound sockets get as their own address.
func (n *network) slotRoute(p netip.Prefix, src netip.Addr) *netlink.Route {
	return &netlink.Route{
		LinkIndex: n.loopback,
		Dst:       &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())},
		Src:       src.AsSlice(),
		Table:     unix.RT_TABLE_LOCAL,
		Type:      unix.RTN_LOCAL,
		Scope:     netlink.SCOPE_HOST,
		Protocol:  probe.RouteProtocol,
	}
}

// addRoute adds a slot route. It fails with EEXIST when there is one.
func (n *network) addRoute(p netip.Prefix) error {
	return n.handle.RouteAdd(n.slotRoute(p, n.source(p.Addr().Is6())))
}

// removeRoutes takes the routes of a range away, as far as they are there.
func (n *network) removeRoutes(r slotRange) error {
	var errs []error
	for _, p := range []netip.Prefix{r.prefix4(), r.prefix6()} {
		errs = append(errs, n.removeRoute(p))
	}
	return errors.Join(errs...)
}

func (n *network) removeRoute(p netip.Prefix) error {
	err := n.handle.RouteDel(n.slotRoute(p, netip.Addr{}))
	if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove route %s: %w", p, err)
	}
	return nil
}
