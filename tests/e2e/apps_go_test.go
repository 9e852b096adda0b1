package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"golang.org/x/sys/unix"
)

// TestGo has Go's own dialer choose among the addresses of a name.
func TestGo(t *testing.T) {
	r := rig.New(t)
	r.Serve(t, at4(7), echoBack)
	r.Serve(t, at6(7), echoBack)
	serveHTTP(t, r, at4(8080), webSite())
	serveHTTP(t, r, at6(8080), webSite())
	nameServer(t, r, at4(53), map[string][]netip.Addr{
		"both.test.": {rig.Far4, rig.Far6},
		"dead.test.": {netip.MustParseAddr("2001:db8:dead::1"), rig.Far4},
	})
	unroute(t, r)
	s := play(t, r, "")
	same(t, "go", goApp(t, r, "dial", at4(53).String()), `
198.51.100.7:7 198.51.100.7:7 192.0.2.1
[2001:db8:7::7]:7 [2001:db8:7::7]:7 2001:db8:1::1
[::ffff:198.51.100.7]:7 198.51.100.7:7 192.0.2.1
both.test:7 [2001:db8:7::7]:7 2001:db8:1::1
dead.test:7 198.51.100.7:7 192.0.2.1
mptcp 198.51.100.7:7 192.0.2.1
v6 alone: network is unreachable
both.test:8080 200 both.test:8080`)
	// The resolver tries by UDP what it can reach, and puts dead.test's address
	// of IPv6 last: only the one that was dialed alone has met the kernel's no.
	s.relayedBut(t, 7, 1)
}

func dialApp(args []string) error {
	d := dialer(args[0])
	for _, to := range []string{"198.51.100.7:7", "[2001:db8:7::7]:7", "[::ffff:198.51.100.7]:7", "both.test:7", "dead.test:7"} {
		remote, local, err := goTrip(d, to)
		if err != nil {
			return fmt.Errorf("%s: %w", to, err)
		}
		fmt.Println(to, remote, local)
	}
	multipath := *d
	multipath.SetMultipathTCP(true)
	remote, local, err := goTrip(&multipath, "198.51.100.7:7")
	if err != nil {
		return fmt.Errorf("mptcp: %w", err)
	}
	fmt.Println("mptcp", remote, local)
	_, err = d.Dial("tcp", "[2001:db8:dead::1]:7")
	errno, ok := errors.AsType[unix.Errno](err)
	if !ok {
		return fmt.Errorf("dial what has no route: %w", err)
	}
	fmt.Println("v6 alone:", errno)
	client := http.Client{Transport: &http.Transport{DialContext: d.DialContext, DisableKeepAlives: true}}
	answer, err := client.Get("http://both.test:8080/who")
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	who, err := io.ReadAll(answer.Body)
	fmt.Printf("both.test:8080 %d %s", answer.StatusCode, who)
	return err
}

// dialer returns Go's default dialer with a name server of ours.
func dialer(server string) *net.Dialer {
	return &net.Dialer{Timeout: 20 * time.Second, Resolver: &net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "udp", server)
		},
	}}
}

// goTrip has 300 KB echoed, and returns the connection's two ends.
func goTrip(d *net.Dialer, to string) (remote net.Addr, local net.IP, err error) {
	c, err := d.Dial("tcp", to)
	if err != nil {
		return nil, nil, err
	}
	defer c.Close()
	text := strings.Repeat("go ", 100000)
	sent := make(chan error, 1)
	go func() {
		_, err := io.WriteString(c, text)
		sent <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
	}()
	got, err := io.ReadAll(c)
	if err = errors.Join(err, <-sent); err != nil {
		return nil, nil, err
	}
	if string(got) != text {
		return nil, nil, fmt.Errorf("%d bytes came back, or others", len(got))
	}
	return c.RemoteAddr(), c.LocalAddr().(*net.TCPAddr).IP, nil
}

// nameServer runs a name server that knows these names and no other.
func nameServer(t testing.TB, r *rig.Rig, at netip.AddrPort, zone map[string][]netip.Addr) {
	t.Helper()
	packets := listenUDP(t, r, at)
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

func listenUDP(t testing.TB, r *rig.Rig, at netip.AddrPort) net.PacketConn {
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
