package loader

import (
	"errors"
	"math/bits"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestOwnAddresses: hooks know an own address, of whatever class it is, as soon as they are
// told, and no other; also after it has gone.
func TestOwnAddresses(t *testing.T) {
	p := newPlace(t)
	var own []netip.Prefix
	for i := range byte(16) {
		own = append(own, netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, 100, 64 + i}), 32),
			netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 5, 14: i, 15: 1}), 128))
	}
	// Who else has one of them is no matter, and nobody waits for him.
	p.App.Do(t, func() error {
		var errs []error
		for _, to := range []string{"198.51.100.0/24", "2001:db8:500::/48"} {
			errs = append(errs, netlink.RouteAdd(someRoute{to: to, kind: unix.RTN_UNREACHABLE}.netlink()))
		}
		return errors.Join(errs...)
	})
	stranger := netip.AddrPortFrom(testutil.WorldV4.Addr(), 1)
	d := p.create(t, "one")
	defer p.unload(t, d)
	setRules(t, d, plain)
	p.attach(t, d)
	check := func(addrs []netip.Prefix) {
		t.Helper()
		if _, err := d.Sync(); err != nil {
			t.Fatal(err)
		}
		var classes uint64
		if err := d.maps.NotOwn.Lookup(uint32(0), &classes); err != nil {
			t.Fatal(err)
		}
		if used := 64 - bits.OnesCount64(classes); used > len(addrs)+4 {
			t.Errorf("%d classes for %d addresses", used, len(addrs))
		}
		for _, a := range own {
			want := uint64(0)
			if slices.Contains(addrs, a) {
				want = 1
			}
			before := stats(t, d).Reasons[flow.ReasonOwnAddress]
			_ = p.connect(t, netip.AddrPortFrom(a.Addr(), 1)) // nobody listens anywhere
			if got := stats(t, d).Reasons[flow.ReasonOwnAddress] - before; got != want {
				t.Errorf("%s: own_address %d times, want %d", a, got, want)
			}
		}
		before := stats(t, d).Reasons[flow.ReasonOwnAddress]
		_ = p.connect(t, stranger)
		if got := stats(t, d).Reasons[flow.ReasonOwnAddress]; got != before {
			t.Errorf("%s is an own address", stranger)
		}
	}
	check(nil)
	p.App.AddAddr(t, "lo", own...)
	check(own)
	p.App.Do(t, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		var errs []error
		for _, a := range own[:len(own)/2] {
			ip := &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Bits())}
			errs = append(errs, netlink.AddrDel(lo, &netlink.Addr{IPNet: ip}))
		}
		return errors.Join(errs...)
	})
	check(own[len(own)/2:])
}

// TestOwnAddressesFail: where own addresses cannot be entered, their classes are looked for
// already, and those of addresses that should have gone still.
func TestOwnAddressesFail(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	if err := d.putNotOwn(0b0111); err != nil {
		t.Fatal(err)
	}
	d.maps.OwnAddrs, d.maps.Routes = d.maps.Routes, d.maps.OwnAddrs // of other keys
	err := d.replaceOwn(map[bpf.IPAddr]uint32{{}: 1}, 0b1110)
	d.maps.OwnAddrs, d.maps.Routes = d.maps.Routes, d.maps.OwnAddrs
	if err == nil {
		t.Fatal("it says that all went well")
	}
	var classes uint64
	if err := d.maps.NotOwn.Lookup(uint32(0), &classes); err != nil || classes != 0b0110 {
		t.Errorf("no address is in %04b: %v; want 0110", classes, err)
	}
}
