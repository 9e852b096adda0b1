package flow

import "net/netip"

// FrameMax is how many bytes of headers a [Held] has room for: Ethernet, IPv6,
// and TCP with all its options, rounded up.
const FrameMax = 120

// Held is news of a connection whose handshake waits for the handler's dial: the
// handler's own answer to the application, kept back on its way, or that the
// application gave up.
type Held struct {
	// Source is the application's address and port, Slot what it dials in
	// truth. Together they name the connection.
	Source, Slot netip.AddrPort
	// Gone is true when the application gave up. There is no frame then.
	Gone bool
	// Mark is the packet mark of the frame, Frame its headers as they were on
	// the wire, and Size their length.
	Mark  uint32
	Frame [FrameMax]byte
	Size  int
}
