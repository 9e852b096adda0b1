package flow

import (
	"math/bits"
	"net/netip"
	"testing"
)

func TestPolicyNames(t *testing.T) {
	seen := map[string]bool{}
	for i, p := range Policies() {
		if int(p) != i || seen[p.String()] || !label.MatchString(p.String()) {
			t.Errorf("policy %d of value %d is %q", i, p, p)
		}
		seen[p.String()] = true
	}
	for i, h := range HashOns() {
		if int(h) != i || seen[h.String()] || !label.MatchString(h.String()) {
			t.Errorf("hash %d of value %d is %q", i, h, h)
		}
		seen[h.String()] = true
	}
	if len(Policies()) != int(policyCount) || len(HashOns()) != int(hashCount) {
		t.Error("one is not listed")
	}
}

// The values that the C twin has too, from an independent calculation. IPv4 is
// hashed as v4-mapped.
func TestHash(t *testing.T) {
	for _, c := range []struct {
		addr string
		port uint16
		want uint32
	}{
		{"0.0.0.0", 0, 0xdc029787},
		{"192.0.2.1", 0, 0xf0244278},
		{"::ffff:192.0.2.1", 0, 0xf0244278},
		{"192.0.2.1", 443, 0x9391e655},
		{"::", 0, 0xbbcac71f},
		{"2001:db8::1", 80, 0x6b40f7f4},
		{"fe80::1234:5678:9abc:def0", 65535, 0x64743b23},
	} {
		if got := Hash(netip.MustParseAddr(c.addr), c.port); got != c.want {
			t.Errorf("%s, port %d: %#x, want %#x", c.addr, c.port, got, c.want)
		}
	}
	w := Words(7)
	for i, want := range []uint32{0x3fd9abdb, 0x489c36cb, 0xf7fe56e, 0x9bfb7820} {
		if got := w.Next(); got != want {
			t.Errorf("word %d of 7 is %#x, want %#x", i, got, want)
		}
	}
}

// Each bit of an address and a port changes half of the bits of the hash.
func TestHashSpreads(t *testing.T) {
	const n = 2000
	for bit := range 128 + 16 {
		changed := 0
		for i := range uint32(n) {
			w := Words(i)
			var a [16]byte
			for k := range a {
				a[k] = byte(w.Next())
			}
			port := uint16(w.Next())
			before := Hash(netip.AddrFrom16(a), port)
			if bit < 128 {
				a[bit/8] ^= 1 << (bit % 8)
			} else {
				port ^= 1 << (bit - 128)
			}
			changed += bits.OnesCount32(before ^ Hash(netip.AddrFrom16(a), port))
		}
		if mean := float64(changed) / n; mean < 15.5 || mean > 16.5 {
			t.Errorf("bit %d changes %.2f bits", bit, mean)
		}
	}
}
