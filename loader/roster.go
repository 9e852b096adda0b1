package loader

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"
)

// enrolled is an endpoint of a service, and its index.
type enrolled struct {
	high, low uint64 // the address's 16 bytes, IPv4 as ::ffff:a.b.c.d
	index     uint32
	port      uint16
}

func enroll(addr netip.AddrPort, index uint32) enrolled {
	b := addr.Addr().As16()
	return enrolled{
		high: binary.BigEndian.Uint64(b[:8]), low: binary.BigEndian.Uint64(b[8:]), index: index, port: addr.Port(),
	}
}

func (e enrolled) addr() netip.AddrPort {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], e.high)
	binary.BigEndian.PutUint64(b[8:], e.low)
	return netip.AddrPortFrom(netip.AddrFrom16(b).Unmap(), e.port)
}

// compare orders by address.
func (e enrolled) compare(o enrolled) int {
	switch {
	case e.high != o.high:
		return cmp.Compare(e.high, o.high)
	case e.low != o.low:
		return cmp.Compare(e.low, o.low)
	default:
		return cmp.Compare(e.port, o.port)
	}
}

// roster is who has which index, sorted by address, each address once. A map was
// rejected: it takes eight times as much memory, and longer to fill.
type roster []enrolled

// find returns the index of an endpoint.
func (r roster) find(addr netip.AddrPort) (uint32, bool) {
	i, ok := slices.BinarySearchFunc(r, enroll(addr, 0), enrolled.compare)
	if !ok {
		return 0, false
	}
	return r[i].index, true
}

// with returns r and what is added, which is sorted, in a roster of its own, or one of
// the two if it is all.
func (r roster) with(added roster) roster {
	if len(added) == 0 {
		return r
	}
	if len(r) == 0 {
		return added
	}
	all := make(roster, 0, len(r)+len(added))
	for _, e := range added {
		n := 0
		for n < len(r) && r[n].compare(e) < 0 {
			n++
		}
		all, r = append(append(all, r[:n]...), e), r[n:]
	}
	return append(all, r...)
}
