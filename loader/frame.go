package loader

import (
	"encoding/binary"
	"syscall"

	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

// Headers of the frames that are held and injected. All is in network byte order.
const (
	ethLen  = 14
	ip4Len  = 20
	ip6Len  = 40
	tcpLen  = 20
	icmpLen = 8

	// embeddedLen is how much of the TCP header an ICMP error carries: ports
	// and sequence number, by which the kernel finds the socket (RFC 792).
	embeddedLen = 8

	// maxHops is the largest hop limit. An application may drop what has less.
	maxHops = 255

	tcpFlagRST = 0x04
	tcpFlagACK = 0x10

	// Options of a TCP header (RFC 9293, RFC 7323).
	tcpOptionEnd       = 0
	tcpOptionNop       = 1
	tcpOptionTimestamp = 8
	timestampLen       = 10
)

// frame is room for the largest that is made: an ICMPv6 error.
type frame struct {
	b [ethLen + 2*ip6Len + tcpLen + flow.FrameMax]byte
	n int
}

func (f *frame) bytes() []byte { return f.b[:f.n] }

// answer reads what a held frame, the handler's SYN-ACK, says.
type answer struct {
	v6  bool
	ip  []byte // the IP header
	tcp []byte // the TCP header with its options
}

// parseAnswer returns false for a frame that the kernel side would not hold.
func parseAnswer(h *flow.Held) (a answer, ok bool) {
	b := h.Frame[:min(max(h.Size, 0), len(h.Frame))]
	if len(b) < ethLen+ip4Len+tcpLen {
		return a, false
	}
	size := ip4Len
	if a.v6 = binary.BigEndian.Uint16(b[12:]) == unix.ETH_P_IPV6; a.v6 {
		size = ip6Len
	}
	if len(b) < ethLen+size+tcpLen {
		return a, false
	}
	a.ip, a.tcp = b[ethLen:ethLen+size], b[ethLen+size:]
	return a, len(a.tcp) == int(a.tcp[12]>>4)*4
}

// addrs returns the slot's address and the application's.
func (a *answer) addrs() (slot, app []byte) {
	if a.v6 {
		return a.ip[8:24], a.ip[24:40]
	}
	return a.ip[12:16], a.ip[16:20]
}

func (a *answer) slotPort() []byte { return a.tcp[0:2] }
func (a *answer) appPort() []byte  { return a.tcp[2:4] }

// isn is the handler's first sequence number, next the application's second.
func (a *answer) isn() uint32  { return binary.BigEndian.Uint32(a.tcp[4:]) }
func (a *answer) next() uint32 { return binary.BigEndian.Uint32(a.tcp[8:]) }

// tag writes the Ethernet source by which the kernel side knows our frames. The
// destination stays zero, which is lo's: with another one the frame would be
// somebody else's.
func (f *frame) tag(tag uint64) {
	var b [8]byte
	binary.NativeEndian.PutUint64(b[:], tag)
	copy(f.b[6:12], b[:6])
}

// begin starts a frame: the Ethernet header, and an IP header for size bytes.
func (f *frame) begin(tag uint64, v6 bool, src, dst []byte, proto byte, size int) (ip, payload []byte) {
	clear(f.b[:])
	f.tag(tag)
	if v6 {
		binary.BigEndian.PutUint16(f.b[12:], unix.ETH_P_IPV6)
		ip = f.b[ethLen : ethLen+ip6Len]
		ipHeader6(ip, src, dst, proto, size)
	} else {
		binary.BigEndian.PutUint16(f.b[12:], unix.ETH_P_IP)
		ip = f.b[ethLen : ethLen+ip4Len]
		ipHeader4(ip, src, dst, proto, size)
	}
	f.n = ethLen + len(ip) + size
	return ip, f.b[ethLen+len(ip) : f.n]
}

func ipHeader4(ip, src, dst []byte, proto byte, size int) {
	ip[0], ip[8], ip[9] = 0x45, maxHops, proto
	binary.BigEndian.PutUint16(ip[2:], uint16(ip4Len+size))
	copy(ip[12:], src)
	copy(ip[16:], dst)
	binary.BigEndian.PutUint16(ip[10:], fold(sumBytes(ip, 0)))
}

func ipHeader6(ip, src, dst []byte, proto byte, size int) {
	ip[0], ip[6], ip[7] = 0x60, proto, maxHops
	binary.BigEndian.PutUint16(ip[4:], uint16(size))
	copy(ip[8:], src)
	copy(ip[24:], dst)
}

// synAck is the held answer, with whole checksums: on lo they are partial.
func (f *frame) synAck(a *answer, tag uint64) {
	clear(f.b[:])
	f.tag(tag)
	binary.BigEndian.PutUint16(f.b[12:], unix.ETH_P_IP)
	if a.v6 {
		binary.BigEndian.PutUint16(f.b[12:], unix.ETH_P_IPV6)
	}
	ip := f.b[ethLen : ethLen+len(a.ip)]
	copy(ip, a.ip)
	if !a.v6 {
		ip[10], ip[11] = 0, 0
		binary.BigEndian.PutUint16(ip[10:], fold(sumBytes(ip, 0)))
	}
	tcp := f.b[ethLen+len(ip) : ethLen+len(ip)+len(a.tcp)]
	copy(tcp, a.tcp)
	putSum(ip, tcp, 16, unix.IPPROTO_TCP)
	f.n = ethLen + len(ip) + len(tcp)
}

// thirdACK ends the handshake with our own listener, as the application's kernel
// would: it echoes the timestamps. The window is small; the real one comes with
// the application's own acknowledgement.
func (f *frame) thirdACK(a *answer, tag uint64) {
	stamp := findTimestamp(a.tcp[tcpLen:])
	size := tcpLen
	if stamp != nil {
		size += 2 + timestampLen
	}
	slot, app := a.addrs()
	ip, tcp := f.begin(tag, a.v6, app, slot, unix.IPPROTO_TCP, size)
	tcpHeader(tcp, a.appPort(), a.slotPort(), a.next(), a.isn()+1, tcpFlagACK)
	binary.BigEndian.PutUint16(tcp[14:], 64)
	if stamp != nil {
		o := tcp[tcpLen:]
		o[0], o[1], o[2], o[3] = tcpOptionNop, tcpOptionNop, tcpOptionTimestamp, timestampLen
		copy(o[4:8], stamp[4:8]) // the application's own, which the answer echoes
		copy(o[8:12], stamp[0:4])
	}
	putSum(ip, tcp, 16, unix.IPPROTO_TCP)
}

// refusal is what a closed port answers to the application's SYN.
func (f *frame) refusal(a *answer, tag uint64) {
	slot, app := a.addrs()
	ip, tcp := f.begin(tag, a.v6, slot, app, unix.IPPROTO_TCP, tcpLen)
	tcpHeader(tcp, a.slotPort(), a.appPort(), 0, a.next(), tcpFlagRST|tcpFlagACK)
	putSum(ip, tcp, 16, unix.IPPROTO_TCP)
}

// abandonment ends the half-open connection at our own listener.
func (f *frame) abandonment(a *answer, tag uint64) {
	slot, app := a.addrs()
	ip, tcp := f.begin(tag, a.v6, app, slot, unix.IPPROTO_TCP, tcpLen)
	tcpHeader(tcp, a.appPort(), a.slotPort(), a.next(), 0, tcpFlagRST)
	putSum(ip, tcp, 16, unix.IPPROTO_TCP)
}

// icmpError answers the application's SYN with an ICMP error.
func (f *frame) icmpError(a *answer, tag uint64, kind, code byte) {
	slot, app := a.addrs()
	proto, size := byte(unix.IPPROTO_ICMP), icmpLen+len(a.ip)+embeddedLen
	if a.v6 {
		proto = unix.IPPROTO_ICMPV6
	}
	ip, m := f.begin(tag, a.v6, slot, app, proto, size)
	m[0], m[1] = kind, code
	inner, syn := m[icmpLen:icmpLen+len(a.ip)], m[icmpLen+len(a.ip):]
	if a.v6 {
		ipHeader6(inner, app, slot, unix.IPPROTO_TCP, tcpLen)
	} else {
		ipHeader4(inner, app, slot, unix.IPPROTO_TCP, tcpLen)
	}
	copy(syn[0:2], a.appPort())
	copy(syn[2:4], a.slotPort())
	binary.BigEndian.PutUint32(syn[4:], a.next()-1)
	if a.v6 {
		putSum(ip, m, 2, unix.IPPROTO_ICMPV6)
	} else {
		binary.BigEndian.PutUint16(m[2:], fold(sumBytes(m, 0)))
	}
}

func tcpHeader(tcp, from, to []byte, seq, ack uint32, flags byte) {
	copy(tcp[0:2], from)
	copy(tcp[2:4], to)
	binary.BigEndian.PutUint32(tcp[4:], seq)
	binary.BigEndian.PutUint32(tcp[8:], ack)
	tcp[12], tcp[13] = byte(len(tcp)/4)<<4, flags
}

// findTimestamp returns the two timestamps of a TCP header's options, or nil.
func findTimestamp(options []byte) []byte {
	for len(options) > 1 && options[0] != tcpOptionEnd {
		size := int(options[1])
		switch {
		case options[0] == tcpOptionNop:
			size = 1
		case size < 2 || size > len(options):
			return nil
		case options[0] == tcpOptionTimestamp && size == timestampLen:
			return options[2:timestampLen]
		}
		options = options[size:]
	}
	return nil
}

// putSum sets the checksum at a position of the payload, with the pseudo header.
func putSum(ip, payload []byte, at int, proto byte) {
	payload[at], payload[at+1] = 0, 0
	addrs := ip[12:20]
	if len(ip) == ip6Len {
		addrs = ip[8:40]
	}
	s := sumBytes(addrs, uint32(proto)+uint32(len(payload)))
	binary.BigEndian.PutUint16(payload[at:], fold(sumBytes(payload, s)))
}

func sumBytes(b []byte, s uint32) uint32 {
	for ; len(b) > 1; b = b[2:] {
		s += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	return s
}

func fold(s uint32) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}

// icmpKind is a type and a code.
type icmpKind struct{ kind, code byte }

// The ICMP errors that the kernel turns into each error of connect(2): the
// inverse of icmp_err_convert (net/ipv4/icmp.c) and of icmpv6_err_convert
// (net/ipv6/icmp.c). Every other error is answered with a reset.
var (
	icmp4 = map[syscall.Errno]icmpKind{
		unix.ENETUNREACH:  {3, 0},
		unix.EHOSTUNREACH: {3, 1},
		unix.ENOPROTOOPT:  {3, 2},
		unix.EOPNOTSUPP:   {3, 5},
		unix.EHOSTDOWN:    {3, 7},
		unix.ENONET:       {3, 8},
		unix.EPROTO:       {12, 0},
		// No ICMP error means it, and this one stands for a filter.
		unix.EACCES:   {3, 13},
		unix.EPERM:    {3, 13},
		unix.ENETDOWN: {3, 0},
	}
	icmp6 = map[syscall.Errno]icmpKind{
		unix.ENETUNREACH:  {1, 0},
		unix.EACCES:       {1, 1},
		unix.EPERM:        {1, 1},
		unix.EHOSTUNREACH: {1, 3},
		unix.EHOSTDOWN:    {1, 3},
		unix.ENETDOWN:     {1, 0},
		unix.EPROTO:       {4, 0},
	}
)
