package loader

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// TestRoster compares a roster with a map, through many merges.
func TestRoster(t *testing.T) {
	t.Parallel()
	r, want := roster{}, map[netip.AddrPort]uint32{}
	for round := range uint32(50) {
		var added []enrolled
		for n := range uint32(20) {
			addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(rand.N(4)), byte(rand.N(250))}), uint16(80+rand.N(2)))
			if round%2 == 1 {
				addr = netip.AddrPortFrom(netip.AddrFrom16([16]byte{0xfd, 15: byte(rand.N(250))}), addr.Port())
			}
			if _, ok := want[addr]; !ok {
				want[addr] = round*100 + n
				added = append(added, enroll(addr, want[addr]))
			}
		}
		slices.SortFunc(added, enrolled.compare)
		before := slices.Clone(r)
		next := r.with(added)
		if !slices.Equal(r, before) {
			t.Fatal("what was there has changed")
		}
		r = next
		for range 5 {
			e := r[rand.N(len(r))]
			r = slices.DeleteFunc(slices.Clone(r), func(o enrolled) bool { return o == e })
			delete(want, e.addr())
		}
	}
	if len(r) != len(want) || !slices.IsSortedFunc(r, enrolled.compare) {
		t.Errorf("%d entries, want %d, sorted", len(r), len(want))
	}
	for addr, i := range want {
		if got, ok := r.find(addr); !ok || got != i {
			t.Errorf("%s has index %d, %v: want %d", addr, got, ok, i)
		}
	}
	for _, e := range r {
		if _, ok := want[e.addr()]; !ok {
			t.Errorf("%s is there", e.addr())
		}
	}
	if _, ok := r.find(netip.MustParseAddrPort("192.0.2.1:80")); ok {
		t.Error("who is not there is found")
	}
}
