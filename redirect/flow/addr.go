package flow

import "net/netip"

// OrigDst is where an application asked to go, before it was redirected. The
// address is unmapped: an IPv4 destination is IPv4 also when the application
// dialed it as ::ffff:a.b.c.d.
type OrigDst struct{ netip.AddrPort }

// Upstream is an address that the handler dials.
type Upstream struct{ netip.AddrPort }

// Downstream is a captured connection as the kernel side knows it, read from
// the map live when the handler accepts it.
type Downstream struct {
	// Cookie is the application's socket cookie: the key that joins the
	// handler's record with the kernel's.
	Cookie uint64
	// Group is the id of the container's cgroup: the unit of quotas.
	Group uint64
	// Cgroup is the id of the cgroup that connected.
	Cgroup uint64
	// Source is the application's own address and port.
	Source netip.AddrPort
	// OrigDst is what it asked for.
	OrigDst OrigDst
	// Waits is true while its handshake waits for the dial.
	Waits bool
	// Reason is why it was redirected: ReasonService or ReasonDefault.
	Reason Reason
	// Mark, Priority and TOS are the application's socket options, to be set
	// on the upstream socket. TOS is IP_TOS or IPV6_TCLASS.
	Mark     uint32
	Priority uint32
	TOS      uint8
	// KeepAlive, UserTimeout (TCP_USER_TIMEOUT, in milliseconds) and Congestion
	// (TCP_CONGESTION, padded with zeroes) are options too, as they were when
	// the application connected. What it sets later is not known.
	KeepAlive   KeepAlive
	UserTimeout uint32
	Congestion  [16]byte
	// BoundSource is the address that the application bound, and is not
	// valid if it bound none. The upstream socket is bound to it.
	BoundSource netip.Addr
}

// KeepAlive is how a socket probes a silent peer: after Idle seconds, then every
// Interval, and Count times before it gives up. It is off when Count is 0.
type KeepAlive struct {
	Count          uint8
	Idle, Interval uint16
}
