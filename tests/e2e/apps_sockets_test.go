package e2e

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// TestUDPUntouched has datagrams go their way: the server sees the application's
// own socket.
func TestUDPUntouched(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "python3")
	r := rig.New(t)
	for _, at := range []netip.AddrPort{at4(7000), at6(7000)} {
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
				a := from.(*net.UDPAddr).AddrPort()
				packets.WriteTo(fmt.Appendf(nil, "%s %s %d", buf[:n], a.Addr().Unmap(), a.Port()), from)
			}
		}()
		t.Cleanup(func() {
			packets.Close()
			<-done
		})
	}
	// A service of the same address and port is one of TCP.
	s := play(t, r, fmt.Sprintf("services: [{name: udp, address: %q, endpoints: [%q]}]", at4(7000), at4(7001)))
	two := func(own string) string {
		return fmt.Sprintf("connected %s True\nunconnected %s True\n", own, own)
	}
	out := runApp(t, r, "", "python3", "testdata/udp.py")
	same(t, "UDP", out, two("192.0.2.1")+two("2001:db8:1::1")+two("192.0.2.1"))
	if totals := s.Totals(t); len(totals) != 0 {
		t.Errorf("recorded connections: %+v", totals)
	}
}

// endings are the servers of testdata/ends.py, and what the last one saw.
type endings struct {
	mu   sync.Mutex
	seen []string
}

func (e *endings) note(text string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.seen = append(e.seen, text)
}

func (e *endings) notes() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.seen)
}

func (e *endings) servers() map[uint16]func(net.Conn) {
	return map[uint16]func(net.Conn){
		9001: func(c net.Conn) {
			h := sha256.New()
			if _, err := io.Copy(h, c); err == nil {
				fmt.Fprintf(c, "%x", h.Sum(nil))
			}
		},
		9002: func(c net.Conn) {
			io.WriteString(c, "bye")
			c.(*net.TCPConn).CloseWrite()
			n, err := io.Copy(io.Discard, c)
			e.note(fmt.Sprintf("9002: %d bytes, %v", n, err))
		},
		9003: func(c net.Conn) {
			c.Read(make([]byte, 1))
			abort(c)
		},
		9004: func(c net.Conn) {
			c.Write(make([]byte, 100000))
			c.Read(make([]byte, 1))
			abort(c)
		},
		9005: func(c net.Conn) {
			buf := make([]byte, 6)
			n, _ := c.Read(buf)
			if text := string(buf[:n]); text != "fin" {
				io.WriteString(c, "k")
			}
			if text := string(buf[:n]); text == "unread" {
				c.Read(make([]byte, 1))
				c.Write(make([]byte, 20)) // it reads half of them
			}
			_, err := io.Copy(io.Discard, c)
			switch {
			case err == nil:
				e.note(fmt.Sprintf("%s: FIN", buf[:n]))
			case isReset(err):
				e.note(fmt.Sprintf("%s: RST", buf[:n]))
			default:
				e.note(fmt.Sprintf("%s: %v", buf[:n], err))
			}
		},
	}
}

// TestEnds ends connections in every way, and each side sees what the other did.
func TestEnds(t *testing.T) {
	t.Parallel()
	for name, at := range map[string]func(uint16) netip.AddrPort{"IPv4": at4, "IPv6": at6} {
		t.Run(name, func(t *testing.T) { testEnds(t, at) })
	}
}

func testEnds(t *testing.T, at func(uint16) netip.AddrPort) {
	testutil.Need(t, "python3")
	r := rig.New(t)
	e := &endings{}
	for port, serve := range e.servers() {
		r.Serve(t, at(port), serve)
	}
	s := play(t, r, "")
	same(t, "the application sees", runApp(t, r, "", "python3", "testdata/ends.py", at(0).Addr().String()), `
half-close: True
nothing but a FIN: True
the server ends first: 3 bytes, FIN
reset by the server: 0 bytes, RST
reset by the server after bytes: 100000 0 bytes, RST`)
	testutil.Eventually(t, rig.Limit, func() bool { return len(e.notes()) == 4 }, "the servers have seen all ends")
	got := e.notes()
	slices.Sort(got)
	same(t, "the servers see", strings.Join(got, "\n"), "9002: 3300000 bytes, <nil>\nfin: FIN\nrst: RST\nunread: RST")

	if n := s.AllRelayed(t, 8); n != 8 {
		t.Errorf("%d connections, want 8", n)
	}
	ends := map[flow.Reason]int{}
	for _, rec := range s.Ended(t, 8) {
		ends[rec.End]++
	}
	if ends[flow.ReasonClosed] != 4 || ends[flow.ReasonUpstreamReset] != 2 || ends[flow.ReasonDownstreamReset] != 2 {
		t.Errorf("ends %v, want 4 closed, 2 upstream_reset, 2 downstream_reset", ends)
	}
}
