package rig

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strings"
	"testing"
)

// NameServer runs a name server in the world that knows these names and no other.
func (r *Rig) NameServer(t testing.TB, at netip.AddrPort, zone map[string][]netip.Addr) {
	t.Helper()
	packets := r.ListenUDP(t, at)
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1500)
		for {
			n, from, err := packets.ReadFrom(buf)
			if err != nil {
				return
			}
			if reply := dnsReply(buf[:n], zone); reply != nil {
				packets.WriteTo(reply, from)
			}
		}
	}()
	t.Cleanup(func() {
		packets.Close()
		<-done
	})
}

// ListenUDP is [Rig.Listen] for datagrams. The caller closes it.
func (r *Rig) ListenUDP(t testing.TB, at netip.AddrPort) net.PacketConn {
	t.Helper()
	r.Give(t, at.Addr())
	var packets net.PacketConn
	r.World.Do(t, func() (err error) {
		packets, err = net.ListenPacket("udp", at.String())
		return err
	})
	return packets
}

// dnsReply answers a question of DNS (RFC 1035, section 4).
func dnsReply(query []byte, zone map[string][]netip.Addr) []byte {
	const header, typeA, typeAAAA = 12, 1, 28
	name, at := "", header
	for at < len(query) && query[at] != 0 {
		next := at + 1 + int(query[at])
		if next >= len(query) {
			return nil
		}
		name, at = name+string(query[at+1:next])+".", next
	}
	if at+5 > len(query) {
		return nil
	}
	kind := binary.BigEndian.Uint16(query[at+1:])
	reply := append([]byte(nil), query[:at+5]...)
	clear(reply[6:header])
	addrs, known := zone[strings.ToLower(name)]
	reply[2], reply[3] = 0x84, 0 // an authoritative answer
	if !known {
		reply[3] = 3 // NXDOMAIN
	}
	count := byte(0)
	for _, a := range addrs {
		if a.Is6() && kind == typeAAAA || a.Is4() && kind == typeA {
			reply = append(reply, 0xc0, header) // the name of the question
			reply = binary.BigEndian.AppendUint16(reply, kind)
			reply = binary.BigEndian.AppendUint16(reply, 1)
			reply = binary.BigEndian.AppendUint32(reply, 60)
			reply = binary.BigEndian.AppendUint16(reply, uint16(a.BitLen()/8))
			reply = append(reply, a.AsSlice()...)
			count++
		}
	}
	reply[7] = count
	return reply
}
