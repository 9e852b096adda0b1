package flow

import (
	"encoding/binary"
	"net/netip"
)

// golden is the odd number next to 2^32 divided by the golden ratio.
const golden = 0x9e3779b9

// Mix spreads the bits of x over all 32, one to one: near numbers become far ones.
// It is mix in bpf/include/hash.h. (It is the permutation that Chris Wellons
// found by search, "lowbias32".)
func Mix(x uint32) uint32 {
	x ^= x >> 16
	x *= 0x7feb352d
	x ^= x >> 15
	x *= 0x846ca68b
	x ^= x >> 16
	return x
}

// Hash is what PolicyMaglev goes by: an address and a port (0: the port does not
// count) as 32 bits. The kernel side and the handler hash alike, so that a key
// has the same endpoint on every path. It starts with the port, and takes in the
// 16 bytes of the address, IPv4 as v4-mapped, as four numbers in network order:
// h = Mix((h ^ number) + 0x9e3779b9).
//
// It is no secret: who chooses the addresses chooses the endpoint.
func Hash(addr netip.Addr, port uint16) uint32 {
	b := addr.As16()
	h := uint32(port)
	for i := 0; i < len(b); i += 4 {
		h = Mix((h ^ binary.BigEndian.Uint32(b[i:])) + golden)
	}
	return h
}

// Words is a stream of words that look random, from one that is: Words(seed).Next()
// and so on. A pick takes all of its randomness from there, and is thereby a
// function of the set, the load, the health and the seed, in both languages.
type Words uint32

// Next returns the next word.
func (w *Words) Next() uint32 {
	*w += golden
	return Mix(uint32(*w))
}
