package e2e

import (
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// forging is Python for an actor: it sends a SYN with the addresses of somebody
// else's connection, by a raw socket.
const forging = `
def forge(src, sport, dst, dport):
    v6 = ":" in src
    f = AF_INET6 if v6 else AF_INET
    a, b = inet_pton(f, src), inet_pton(f, dst)
    tcp = struct.pack("!HHLLBBHHH", sport, dport, 1000, 0, 5 << 4, 2, 65535, 0, 0)
    pseudo = a + b + struct.pack("!LHBB", len(tcp), 0, 0, 6)
    total = sum(struct.unpack("!%dH" % (len(pseudo + tcp) // 2), pseudo + tcp))
    while total >> 16: total = (total & 0xffff) + (total >> 16)
    tcp = tcp[:16] + struct.pack("!H", ~total & 0xffff) + tcp[18:]
    s = so.socket(f, SOCK_RAW, IPPROTO_TCP)
    s.setsockopt(IPPROTO_IPV6 if v6 else IPPROTO_IP, IPV6_TRANSPARENT if v6 else IP_TRANSPARENT, 1)
    s.bind((src, 0))
    s.sendto(tcp, (dst, 0))
    s.close()
`

// TestAttackForgedLive uses the addresses of a live connection, which the lookup
// program lets in: from a socket beside the application, by raw packets, and
// from another host. Nothing more arrives, and the connection does not suffer.
func TestAttackForgedLive(t *testing.T) {
	s := newPrey(t, "")
	routeSlots(t, s.Rig)
	out := outsider(t, s.Rig)
	world := newActor(t, testutil.Place{NS: s.World}, nil)
	out.learn("%s", forging)
	world.learn("%s", forging)
	for n, to := range []string{rig.Far4.String(), rig.Far6.String()} {
		source := []string{testutil.AppV4.Addr().String(), testutil.AppV6.Addr().String()}[n]
		slot := s.slots.forms(s.known[n])[n]
		s.app.do("c = new(%q)", to)
		s.app.wants("None", "c.connect((%q, %d))", to, sitePort)
		s.app.wants(`b'far\n'`, "c.recv(100)")
		s.app.wants("ping", "ask(c)")
		port := s.app.number("c.getsockname()[1]")
		before := arrived(t, s.i)

		// The application did not say that it shares its port. To say that it is
		// for connecting only does not help either: there is one such tuple.
		for _, opts := range []string{"", "(SOL_SOCKET, SO_REUSEADDR, 1)", "(SOL_SOCKET, SO_REUSEPORT, 1)", "(SOL_SOCKET, SO_REUSEADDR, 1), (IPPROTO_IP, IP_TRANSPARENT, 1)"} {
			switch got := out.do("dial(%q, %d, SOCK_STREAM, [%s], (%q, %d))", slot, sitePort, opts, source, port); got {
			case "EADDRINUSE", "EADDRNOTAVAIL":
			default:
				t.Errorf("a second socket with the application's address and %s: %s", opts, got)
			}
		}
		for range 5 {
			out.wants("None", "forge(%q, %d, %q, %d)", source, port, slot, sitePort)
			world.wants("None", "forge(%q, %d, %q, %d)", source, port, slot, sitePort)
		}
		// Neither a socket of another host with the application's address: its
		// SYN is a martian, or meets the handler's socket.
		world.learn("w = new(%q)\nw.setblocking(False)\nw.setsockopt(*%s, 1)\nw.bind((%q, %d))\nw.connect_ex((%q, %d))",
			slot, []string{"(IPPROTO_IP, IP_TRANSPARENT)", "(IPPROTO_IPV6, IPV6_TRANSPARENT)"}[n], source, port, slot, sitePort)
		s.app.wants("ping", "ask(c)")
		s.undisturbed(t, before)
		world.do("w.close()")

		// When it has ended, its addresses are worth nothing. A reset leaves no
		// TIME_WAIT that would refuse them anyway.
		s.app.do("c.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack('ii', 1, 0))")
		s.app.do("c.close()")
		s.i.Ended(t, 4+n)
		refused := s.i.Reasons(t)["not_live"]
		out.wants("ECONNREFUSED", "dial(%q, %d, SOCK_STREAM, [(SOL_SOCKET, SO_REUSEADDR, 1)], (%q, %d))", slot, sitePort, source, port)
		out.wants("None", "forge(%q, %d, %q, %d)", source, port, slot, sitePort)
		if got := s.i.Reasons(t)["not_live"]; got < refused+2 {
			t.Errorf("%d of two are refused as unknown", got-refused)
		}
		s.undisturbed(t, before)
	}
}
