package loader

import (
	"encoding/binary"
	"net/netip"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

const testTag = 0x0000_a1b2_c3d4_e5f7

// heldAnswer is a SYN-ACK as the kernel side keeps it: the slot's answer to the
// application, with timestamps behind two other options.
func heldAnswer(v6 bool, options ...byte) *flow.Held {
	h := &flow.Held{Mark: 7}
	slot, app := netip.MustParseAddr("240.1.0.9").AsSlice(), netip.MustParseAddr("192.0.2.2").AsSlice()
	if v6 {
		slot, app = netip.MustParseAddr("fd70:696c:6c69:1::9").AsSlice(), netip.MustParseAddr("2001:db8::2").AsSlice()
	}
	var f frame
	ip, tcp := f.begin(0, v6, slot, app, unix.IPPROTO_TCP, tcpLen+len(options))
	_ = ip
	tcpHeader(tcp, []byte{0x1f, 0x90}, []byte{0xc3, 0x50}, 1000, 5001, 0x12)
	copy(tcp[tcpLen:], options)
	h.Size = copy(h.Frame[:], f.bytes())
	return h
}

// timestamps is MSS, SACK permitted, and timestamps 0x11111111 (the handler's) and
// 0x22222222 (the application's, echoed).
var timestamps = []byte{2, 4, 0xff, 0xd7, 4, 2, 8, 10, 0x11, 0x11, 0x11, 0x11, 0x22, 0x22, 0x22, 0x22}

// segment is what a frame says, read independently of how it was written.
type segment struct {
	From, To         netip.AddrPort
	Seq, Ack         uint32
	Flags            byte
	Options, Payload string
}

// readFrame checks lengths and checksums, and reads a TCP segment or, for an
// ICMP error, its type and code and the segment inside.
func readFrame(t *testing.T, b []byte) (s segment, icmp icmpKind) {
	t.Helper()
	if got := binary.LittleEndian.Uint64(append(append([]byte{}, b[6:12]...), 0, 0)); got != testTag {
		t.Errorf("tag %#x, want %#x", got, uint64(testTag))
	}
	if [6]byte(b[:6]) != [6]byte{} {
		t.Errorf("Ethernet destination %x, want that of lo", b[:6])
	}
	proto, src, dst, payload := readIP(t, b[ethLen:], binary.BigEndian.Uint16(b[12:]) == unix.ETH_P_IPV6, true)
	if proto == unix.IPPROTO_TCP {
		return readTCP(src, dst, payload), icmp
	}
	icmp = icmpKind{payload[0], payload[1]}
	_, src, dst, inner := readIP(t, payload[icmpLen:], proto == unix.IPPROTO_ICMPV6, false)
	return readTCP(src, dst, inner), icmp
}

func readIP(t *testing.T, b []byte, v6, whole bool) (proto byte, src, dst netip.Addr, payload []byte) {
	t.Helper()
	size, length := ip4Len, int(binary.BigEndian.Uint16(b[2:]))-ip4Len
	var pseudo []byte
	if v6 {
		size, length = ip6Len, int(binary.BigEndian.Uint16(b[4:]))
		proto, pseudo = b[6], b[8:40]
		src, dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	} else {
		if s := onesSum(b[:ip4Len], 0); s != 0xffff {
			t.Errorf("IP checksum: %#x", s)
		}
		proto, pseudo = b[9], b[12:20]
		src, dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	}
	payload = b[size:]
	if !whole {
		return proto, src, dst, payload
	}
	if len(payload) != length {
		t.Errorf("IP says %d bytes, there are %d", length, len(payload))
	}
	sum := uint32(0)
	if proto != unix.IPPROTO_ICMP {
		sum = uint32(onesSum(pseudo, uint32(proto)+uint32(len(payload))))
	}
	if s := onesSum(payload, sum); s != 0xffff {
		t.Errorf("checksum of protocol %d: %#x", proto, s)
	}
	return proto, src, dst, payload
}

// onesSum is the sum of RFC 1071, written to be read.
func onesSum(b []byte, sum uint32) uint16 {
	for i, v := range b {
		if i%2 == 0 {
			sum += uint32(v) << 8
		} else {
			sum += uint32(v)
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

func readTCP(src, dst netip.Addr, b []byte) segment {
	s := segment{
		From: netip.AddrPortFrom(src, binary.BigEndian.Uint16(b)),
		To:   netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:])),
		Seq:  binary.BigEndian.Uint32(b[4:]),
	}
	if len(b) >= tcpLen { // else it is inside an ICMP error
		s.Ack, s.Flags = binary.BigEndian.Uint32(b[8:]), b[13]
		s.Options = string(b[tcpLen : int(b[12]>>4)*4])
		s.Payload = string(b[int(b[12]>>4)*4:])
	}
	return s
}

func TestFrames(t *testing.T) {
	for name, v6 := range map[string]bool{"v4": false, "v6": true} {
		t.Run(name, func(t *testing.T) {
			slot, app := netip.MustParseAddrPort("240.1.0.9:8080"), netip.MustParseAddrPort("192.0.2.2:50000")
			if v6 {
				slot, app = netip.MustParseAddrPort("[fd70:696c:6c69:1::9]:8080"), netip.MustParseAddrPort("[2001:db8::2]:50000")
			}
			h := heldAnswer(v6, timestamps...)
			a, ok := parseAnswer(h)
			if !ok {
				t.Fatal("a good answer is not read")
			}
			var f frame
			for _, tt := range []struct {
				name string
				make func()
				want segment
			}{
				{"synAck", func() { f.synAck(&a, testTag) }, segment{From: slot, To: app, Seq: 1000, Ack: 5001, Flags: 0x12, Options: string(timestamps)}},
				{"thirdACK", func() { f.thirdACK(&a, testTag) }, segment{
					From: app, To: slot, Seq: 5001, Ack: 1001, Flags: 0x10,
					Options: "\x01\x01\x08\x0a\x22\x22\x22\x22\x11\x11\x11\x11",
				}},
				{"refusal", func() { f.refusal(&a, testTag) }, segment{From: slot, To: app, Ack: 5001, Flags: 0x14}},
				{"abandonment", func() { f.abandonment(&a, testTag) }, segment{From: app, To: slot, Seq: 5001, Flags: 0x04}},
			} {
				tt.make()
				got, _ := readFrame(t, f.bytes())
				if diff := cmp.Diff(tt.want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
					t.Errorf("%s (-want +got):\n%s", tt.name, diff)
				}
			}
			f.icmpError(&a, testTag, 3, 1)
			inner, kind := readFrame(t, f.bytes())
			// The application's SYN, by which the kernel finds its socket.
			if kind != (icmpKind{3, 1}) || inner.From != app || inner.To != slot || inner.Seq != 5000 {
				t.Errorf("ICMP %v about %+v", kind, inner)
			}
		})
	}
}

// TestThirdACKWithoutTimestamps is for applications whose kernel sends none.
func TestThirdACKWithoutTimestamps(t *testing.T) {
	for _, options := range [][]byte{nil, {2, 4, 5, 0xb4}, {1, 1, 1, 0}, {8, 10, 0, 0}, {8, 0, 0, 0}, {3, 200, 0, 0}} {
		a, ok := parseAnswer(heldAnswer(false, options...))
		if !ok {
			t.Fatalf("options %v: not read", options)
		}
		var f frame
		f.thirdACK(&a, testTag)
		if got, _ := readFrame(t, f.bytes()); got.Options != "" {
			t.Errorf("options %v: answered with %q", options, got.Options)
		}
	}
}

// TestErrnosAsFrames goes through the errors that a dial may end with: each is
// an ICMP error that the kernel turns back into it, or a reset.
func TestErrnosAsFrames(t *testing.T) {
	reset := []syscall.Errno{unix.ECONNREFUSED, unix.ECONNRESET, unix.EADDRNOTAVAIL, unix.EINVAL, unix.EMFILE, 0}
	for _, e := range reset {
		if _, ok := icmp4[e]; ok {
			t.Errorf("%v: want a reset on IPv4", e)
		}
		if _, ok := icmp6[e]; ok {
			t.Errorf("%v: want a reset on IPv6", e)
		}
	}
	for _, e := range []syscall.Errno{unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EPROTO, unix.ENETDOWN} {
		if _, ok := icmp4[e]; !ok {
			t.Errorf("%v: no ICMP error on IPv4", e)
		}
		if _, ok := icmp6[e]; !ok {
			t.Errorf("%v: no ICMP error on IPv6", e)
		}
	}
}

func FuzzParseAnswer(f *testing.F) {
	for _, h := range []*flow.Held{heldAnswer(false, timestamps...), heldAnswer(true, timestamps...), heldAnswer(false)} {
		f.Add(h.Frame[:h.Size])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h := &flow.Held{Size: len(b)}
		copy(h.Frame[:], b)
		a, ok := parseAnswer(h)
		if !ok {
			return
		}
		var out frame
		for _, build := range []func(){
			func() { out.synAck(&a, testTag) },
			func() { out.thirdACK(&a, testTag) },
			func() { out.refusal(&a, testTag) },
			func() { out.abandonment(&a, testTag) },
			func() { out.icmpError(&a, testTag, 3, 1) },
		} {
			build()
			if n := len(out.bytes()); n < ethLen+ip4Len+icmpLen || n > len(out.b) {
				t.Fatalf("a frame of %d bytes", n)
			}
		}
	})
}
