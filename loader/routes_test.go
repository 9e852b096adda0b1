package loader

import (
	"net"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/tests/testutil"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The application's addresses beside those of testutil: on the first interface,
// and on another one.
var (
	second4, second6   = netip.MustParsePrefix("192.0.2.50/32"), netip.MustParsePrefix("2001:db8:1::50/128")
	unique             = netip.MustParsePrefix("fd00:1::1/128")
	other4, other6     = netip.MustParsePrefix("203.0.113.65/26"), netip.MustParsePrefix("2001:db8:4::1/64")
	beyond4, beyond6   = netip.MustParseAddr("203.0.113.66"), netip.MustParseAddr("2001:db8:4::2")
	gateway4, gateway6 = testutil.WorldV4.Addr(), testutil.WorldV6.Addr()
)

// someRoute is a route of the main table, if it does not say otherwise.
type someRoute struct {
	to       string
	via, src netip.Addr
	metric   int
	table    int
	kind     int
}

func (r someRoute) netlink() *netlink.Route {
	to := netip.MustParsePrefix(r.to)
	return &netlink.Route{
		Dst: &net.IPNet{IP: to.Addr().AsSlice(), Mask: net.CIDRMask(to.Bits(), to.Addr().BitLen())},
		Gw:  r.via.AsSlice(), Src: r.src.AsSlice(), Priority: r.metric, Table: r.table, Type: r.kind,
	}
}

// source is what the kernel side knows of the way to an address.
func source(t *testing.T, d *Datapath, to string) string {
	t.Helper()
	var r bpf.Route
	key := bpf.PrefixKey{Prefixlen: 128, Addr: bpf.FromAddr(netip.MustParseAddr(to))}
	if err := d.maps.Routes.Lookup(key, &r); err != nil || r.Kind != bpf.RouteUnicast {
		return "none"
	}
	if a := bpf.ToAddr(r.Source); a.IsValid() {
		return a.String()
	}
	return "the slots'"
}

// TestRouteSources gives the namespace routes whose sources differ from that of
// its default routes.
func TestRouteSources(t *testing.T) {
	p := newPlace(t)
	testutil.Join(t, p.App, "eth1", p.World, "world1")
	p.World.AddAddr(t, "world1", netip.PrefixFrom(beyond4, other4.Bits()), netip.PrefixFrom(beyond6, other6.Bits()))
	p.App.AddAddr(t, "eth1", other4, other6)
	p.App.AddAddr(t, "lo", second4, second6)
	p.App.AddAddr(t, testutil.AppLink, unique)
	d := p.create(t, "one")
	setRules(t, d, plain)
	p.attach(t, d)
	const slots, none = "the slots'", "none"
	wanted := map[string]string{
		testutil.WorldV4.Addr().String(): slots, testutil.WorldV6.Addr().String(): slots, // on the link
		"8.8.8.8": slots, "2600::1": slots, // by the default route
		"240.1.2.3": testutil.AppV4.Addr().String(), "fd70:696c:6c69:1::7": testutil.AppV6.Addr().String(), // that itself
		"fd12::1":           unique.Addr().String(), // by the default route, too
		"203.0.113.70":      other4.Addr().String(),
		"2001:db8:4::70":    other6.Addr().String(),
		"198.51.100.40":     slots,
		"198.51.100.41":     slots,
		"198.51.100.130":    slots,
		"198.51.100.60":     slots,
		"198.51.100.61":     slots,
		"2001:db8:7::40":    slots,
		"2001:db8:7::41":    slots,
		"2001:db8:7:1::1:1": slots,
	}
	check := func(when string) {
		t.Helper()
		got := map[string]string{}
		for to := range wanted {
			got[to] = source(t, d, to)
		}
		if diff := cmp.Diff(wanted, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", when, diff)
		}
	}
	check("at first")

	added := []someRoute{
		{to: "198.51.100.40/32", via: gateway4, src: second4.Addr()},
		{to: "198.51.100.41/32", via: beyond4},
		{to: "198.51.100.128/28", kind: unix.RTN_UNREACHABLE},
		// No rule leads to this table.
		{to: "198.51.100.60/32", via: gateway4, src: second4.Addr(), table: 100},
		{to: "198.51.100.61/32", via: gateway4, src: second4.Addr(), metric: 20},
		{to: "198.51.100.61/32", via: beyond4, metric: 10},
		{to: "2001:db8:7::40/128", via: gateway6, src: second6.Addr()},
		{to: "2001:db8:7::41/128", via: beyond6},
		// The beginning of it has another way.
		{to: "2001:db8:7:1::/64", via: beyond6},
		{to: "2001:db8:7:1::/112", via: gateway6},
	}
	p.App.Do(t, func() error {
		for _, r := range added {
			if err := netlink.RouteAdd(r.netlink()); err != nil {
				t.Errorf("add route %s: %v", r.to, err)
			}
		}
		_, err := d.Sync()
		return err
	})
	wanted["198.51.100.40"] = second4.Addr().String()
	wanted["198.51.100.41"] = other4.Addr().String()
	wanted["198.51.100.130"] = none
	wanted["198.51.100.61"] = other4.Addr().String()
	wanted["2001:db8:7::40"] = second6.Addr().String()
	wanted["2001:db8:7::41"] = other6.Addr().String()
	wanted["2001:db8:7:1::1:1"] = other6.Addr().String()
	check("with more routes")

	// What is the other interface's becomes the default. The slots follow in IPv6
	// only: the address that stands for anywhere is on the first link here.
	p.App.Do(t, func() error {
		for _, r := range []someRoute{{to: "0.0.0.0/0", via: beyond4}, {to: "::/0", via: beyond6}} {
			if err := netlink.RouteReplace(r.netlink()); err != nil {
				t.Errorf("replace route %s: %v", r.to, err)
			}
		}
		_, err := d.Sync()
		return err
	})
	for to, from := range wanted {
		if from == other6.Addr().String() {
			wanted[to] = slots
		}
	}
	wanted["8.8.8.8"] = other4.Addr().String()
	wanted["fd70:696c:6c69:1::7"] = other6.Addr().String()
	wanted["198.51.100.60"] = other4.Addr().String()
	wanted[testutil.WorldV6.Addr().String()] = testutil.AppV6.Addr().String()
	// The unique local address is the first interface's.
	wanted["fd12::1"] = slots
	check("with another default")
	p.unload(t, d)
}

// TestManyRoutes has more routes of IPv6 than the kernel is asked for. Those that
// name their source have it all the same.
func TestManyRoutes(t *testing.T) {
	p := newPlace(t)
	p.App.AddAddr(t, "lo", second6)
	p.App.Do(t, func() error {
		for n := range asksMax + 10 {
			to := netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, 9, byte(n >> 8), byte(n)}), 64)
			if err := netlink.RouteAdd(someRoute{to: to.String(), via: gateway6}.netlink()); err != nil {
				return err
			}
		}
		return netlink.RouteAdd(someRoute{to: "2001:db8:f::/64", via: gateway6, src: second6.Addr()}.netlink())
	})
	d := p.create(t, "one")
	setRules(t, d, plain)
	p.attach(t, d)
	for to, want := range map[string]string{
		"2001:db8:9::1": "the slots'", "2001:db8:9:3f1::1": "the slots'", "2001:db8:f::1": second6.Addr().String(),
	} {
		if got := source(t, d, to); got != want {
			t.Errorf("%s: %s, want %s", to, got, want)
		}
	}
	p.unload(t, d)
}
