package testutil

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
)

// The interface names and addresses of a Pair.
const (
	// AppLink is the application's interface, WorldLink the other end.
	AppLink   = "eth0"
	WorldLink = "world0"
)

// The addresses of a Pair. All of them are documentation addresses, so none of
// them is on a list of what is never captured.
var (
	AppV4   = netip.MustParsePrefix("192.0.2.1/24")
	WorldV4 = netip.MustParsePrefix("192.0.2.2/24")
	AppV6   = netip.MustParsePrefix("2001:db8:1::1/64")
	WorldV6 = netip.MustParsePrefix("2001:db8:1::2/64")
)

// Pair is two network namespaces joined by a veth: App, where the application
// and the sidecar run, and World, where the servers do. App's default routes of
// both families lead to World, so an address that World.AddAddr puts on
// WorldLink or "lo" is reachable.
type Pair struct {
	App, World *NS
}

// NewPair makes a Pair. It ends with the test.
func NewPair(t testing.TB) *Pair {
	t.Helper()
	p := &Pair{App: NewNS(t), World: NewNS(t)}
	Join(t, p.App, AppLink, p.World, WorldLink)
	p.App.AddAddr(t, AppLink, AppV4, AppV6)
	p.World.AddAddr(t, WorldLink, WorldV4, WorldV6)
	p.App.Route(t, AppLink, WorldV4.Addr(), WorldV6.Addr())
	return p
}

// Join joins two namespaces by a veth, and sets both of its ends up.
func Join(t testing.TB, a *NS, aLink string, b *NS, bLink string) {
	t.Helper()
	veth := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: aLink},
		PeerName:      bLink,
		PeerNamespace: netlink.NsFd(b.FD()),
	}
	a.Do(t, func() error {
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("add veth: %w", err)
		}
		return linkUp(aLink)
	})
	b.Do(t, func() error { return linkUp(bLink) })
}

// Route gives the namespace default routes by an interface.
func (ns *NS) Route(t testing.TB, link string, gateways ...netip.Addr) {
	t.Helper()
	ns.Do(t, func() error { return defaultVia(link, gateways...) })
}

func defaultVia(link string, gateways ...netip.Addr) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return fmt.Errorf("find link %s: %w", link, err)
	}
	for _, gw := range gateways {
		route := &netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.IP(gw.AsSlice())}
		if err := netlink.RouteAdd(route); err != nil {
			return fmt.Errorf("add default route via %s: %w", gw, err)
		}
	}
	return nil
}
