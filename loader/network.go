package loader

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/pillion-project/pillion/loader/probe"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// network is the routing side of one network namespace: that of the thread
// which opened it, whatever thread uses it later.
type network struct {
	handle     *netlink.Handle
	diagSocket *nl.SocketHandle
	events     *nl.NetlinkSocket // news of addresses and routes
	loopback   int               // the interface's index
}

// watched are the groups whose news may change what the kernel side must know.
var watched = []uint{
	unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
}

func openNetwork() (*network, error) {
	n := &network{}
	var err error
	if n.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	diag, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_INET_DIAG)
	if err != nil {
		n.close()
		return nil, fmt.Errorf("open socket diagnostics: %w", err)
	}
	n.diagSocket = &nl.SocketHandle{Socket: diag}
	if n.events, err = nl.Subscribe(unix.NETLINK_ROUTE, watched...); err != nil {
		n.close()
		return nil, fmt.Errorf("subscribe to routes: %w", err)
	}
	lo, err := n.handle.LinkByName("lo")
	if err != nil {
		n.close()
		return nil, fmt.Errorf("find the loopback interface: %w", err)
	}
	n.loopback = lo.Attrs().Index
	if lo.Attrs().Flags&net.FlagUp == 0 {
		n.close()
		return nil, errors.New("the loopback interface is down: redirected connections go through it")
	}
	return n, nil
}

func (n *network) close() {
	if n.events != nil {
		n.events.Close()
	}
	if n.diagSocket != nil {
		n.diagSocket.Close()
	}
	n.handle.Close()
}

// Addresses of the documentation ranges: where a route to the world at large
// would lead. Nothing is sent there.
var (
	anywhere4 = netip.MustParseAddr("192.0.2.255")
	anywhere6 = netip.MustParseAddr("2001:db8:ffff::ffff")
)

// source returns the address that the namespace's sockets have towards the
// world. It is what an application sees as its own on a redirected connection.
func (n *network) source(v6 bool) netip.Addr {
	to, fallback := anywhere4, netip.AddrFrom4([4]byte{127, 0, 0, 1})
	if v6 {
		to, fallback = anywhere6, netip.IPv6Loopback()
	}
	if a := n.sourceTo(to); a.IsValid() && !a.IsLinkLocalUnicast() {
		return a
	}
	// No way out: an address that others may reach is the next best.
	addrs, err := n.addresses()
	if err != nil {
		return fallback
	}
	for _, a := range addrs {
		if a.Is6() == v6 && a.IsGlobalUnicast() {
			return a
		}
	}
	return fallback
}

// addresses lists the namespace's own addresses.
func (n *network) addresses() ([]netip.Addr, error) {
	list, err := n.handle.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var all []netip.Addr
	for _, a := range list {
		// A tentative address may turn out to be somebody else's, but for
		// as long as it stands it is ours.
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			all = append(all, ip.Unmap())
		}
	}
	return all, nil
}

// repair brings a range's routes back, with the source that is right now. It
// returns what it had to do.
// A family whose route cannot be had is in lost, as in slotRange: IPv6 was
// switched off.
func (n *network) repair(r slotRange) (repaired []string, lost uint32, err error) {
	filter := &netlink.Route{Table: unix.RT_TABLE_LOCAL, Protocol: probe.RouteProtocol}
	list, err := n.handle.RouteListFiltered(netlink.FAMILY_ALL, filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, 0, fmt.Errorf("list slot routes: %w", err)
	}
	var errs []error
	for _, p := range r.prefixes() {
		want := n.source(p.Addr().Is6())
		var have *netlink.Route
		for i := range list {
			if q, ok := routePrefix(&list[i]); ok && q == p {
				have = &list[i]
			}
		}
		switch {
		case have == nil:
			err = n.addRoute(p)
			if err != nil && p.Addr().Is6() {
				lost |= 2
				continue
			}
		case !have.Src.Equal(want.AsSlice()):
			err = n.replaceRoute(p, have, want)
		default:
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("repair route %s: %w", p, err))
			continue
		}
		repaired = append(repaired, fmt.Sprintf("%s src %s", p, want))
	}
	return repaired, lost, errors.Join(errs...)
}

// usable returns the range without IPv6 if that was switched off since it was
// claimed.
func (n *network) usable(r slotRange) slotRange {
	if r.families&2 == 0 {
		return r
	}
	if err := n.addRoute(r.prefix6()); err != nil && !errors.Is(err, unix.EEXIST) {
		r.families &^= 2
	}
	return r
}

// replaceRoute changes a slot route's source. An IPv6 route is not replaced by
// one with another source but joined by it, so the old one goes afterwards.
func (n *network) replaceRoute(p netip.Prefix, have *netlink.Route, want netip.Addr) error {
	if p.Addr().Is4() {
		return n.handle.RouteReplace(n.slotRoute(p, want))
	}
	if err := n.handle.RouteDel(have); err != nil {
		return err
	}
	return n.handle.RouteAdd(n.slotRoute(p, want))
}
