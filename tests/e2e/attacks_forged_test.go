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
	t.Parallel()
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
		// Nobody else is given it by the kernel, when it is free again.
		s.app.wants("None", "c.bind((%q, %d))", source, 20010+n)
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

// parking is Python for an actor: it leaves a socket that connects from a slot
// to the application's address. The SYN is dropped by a listener whose queue is
// full, so the socket waits, and what connects from there to the slot meets it.
const parking = `
def park(slot, port, app, at):
    ln = new(app, SOCK_STREAM, [(SOL_SOCKET, SO_REUSEADDR, 1)])
    ln.bind((app, at))
    ln.listen(0)
    fill = [new(app) for i in range(3)]
    for f in fill:
        f.setblocking(False)
        f.connect_ex((app, at))
    s = new(slot, SOCK_STREAM, [(SOL_SOCKET, SO_REUSEADDR, 1)] + ([(IPPROTO_IPV6, IPV6_FREEBIND, 1)] if ":" in slot else []))
    s.bind((slot, port))
    s.setblocking(False)
    s.connect_ex((app, at))
    for f in [ln] + fill: f.close()
    kept.append(s)
`

// TestAttackMeetsHalfWay has a user without rights, outside of the scope, open a
// connection from the slot to the port that the application connects from: TCP
// takes the two SYNs for one connection, without the handler. No program of the
// scope sees such a bind, but what such a socket sends is dropped on its way: the
// application gets no answer, and never a wrong one.
func TestAttackMeetsHalfWay(t *testing.T) {
	t.Parallel()
	s := newPrey(t, "")
	s.app.do("let_go()") // on the same port, the bait would stand in the way
	out := outsider(t, s.Rig)
	out.learn("%s", parking)
	out.drop()
	before := arrived(t, s.i)
	for n, to := range []string{rig.Far4.String(), rig.Far6.String()} {
		own := []string{testutil.AppV4.Addr().String(), testutil.AppV6.Addr().String()}[n]
		at := 20000 + n
		out.wants("None", "park(%q, %d, %q, %d)", s.slots.forms(s.known[n])[n], sitePort, own, at)
		s.app.wants("ok", "begin(%q, %d, [(SOL_SOCKET, SO_REUSEADDR, 1)], (%q, %d))", to, sitePort, own, at)
	}
	testutil.Eventually(t, rig.Limit, func() bool { return s.i.Reasons(t)["forged"] >= 4 }, "both answers are dropped, too")
	for n := range 2 {
		s.app.wants("ENOTCONN", "peer(kept[%d])", n)
	}
	s.undisturbed(t, before)
	out.do("let_go()")
	s.app.do("let_go()")
	for _, r := range s.i.Ended(t, 5) {
		if r.Source.Port() >= 20000 && r.Source.Port() < 20002 && (r.Sent != 0 || r.Received != 0) {
			t.Errorf("bytes went by the handler: %+v", r)
		}
	}
}
