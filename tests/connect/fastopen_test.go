package connect

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// TestFastOpen sends with the SYN: to a server that gives cookies, and by an
// application's host that needs none.
func TestFastOpen(t *testing.T) {
	t.Parallel()
	// Bits of net.ipv4.tcp_fastopen.
	const (
		client, server, noCookieSent, noCookieWanted, allListeners = 0x1, 0x2, 0x4, 0x200, 0x400
	)
	for name, tt := range map[string]struct{ app, world int }{
		"cookies":               {client, client | server | allListeners},
		"no cookies":            {client | noCookieSent, client | server | allListeners | noCookieWanted},
		"sent to who wants one": {client | noCookieSent, client | server | allListeners},
		"server knows it not":   {client | noCookieSent, client},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGround(t)
			g.App.Sysctl(t, "net/ipv4/tcp_fastopen", fmt.Sprint(tt.app))
			g.World.Sysctl(t, "net/ipv4/tcp_fastopen", fmt.Sprint(tt.world))
			g.Serve(t, far4(9300), echo)
			g.Serve(t, far6(9300), echo)
			var all []attempt
			for _, round := range []string{"first", "again"} {
				for _, a := range append(fast("good, "+round, 9300), fast("late, "+round, portLate)...) {
					// A cookie is the server's, and a slot has none. So what is
					// known to be sent with the SYN at once is not, here, and
					// there is no refused port at an address with a cookie.
					if tt.app&noCookieSent == 0 && slices.Contains(a.steps, "nonblock") {
						continue
					}
					// Nor is what is sent with a SYN taken at once: that shows
					// as data that was sent again.
					a.answers, a.soft = true, strings.Contains(a.name, "late") || tt.world&noCookieWanted != 0
					all = append(all, a)
				}
			}
			if tt.app&noCookieSent != 0 {
				all = append(all, fast("refused", portClosed)...)
				all = append(all, fast("reset", portReset)...)
			}
			without := perform(t, g, all)
			if netstat(t, g.App, "TCPFastOpenActive") == 0 && (tt.app&noCookieSent == 0 || tt.world&noCookieWanted != 0) {
				t.Error("without Pillion no data is sent with a SYN: the test tests nothing")
			}
			g.fresh(t)
			i := g.with(t, "connect: mirror")
			compare(t, g, all, without)
			redirected(t, i, len(all)/2)
		})
	}
}

// TestErrorQueue has applications ask what the ICMP error was. There is one, and
// the same errno. What the router meant beyond that, and the packet that it quotes,
// is not the network's own: the kernel finds the socket by that packet.
func TestErrorQueue(t *testing.T) {
	t.Parallel()
	steps := strings.Fields("recverr nonblock connect poll errqueue soerror errqueue")
	g := newGround(t)
	var all []attempt
	for n := range icmp4 {
		for _, at := range farEach(uint16(portLateICMP + n)) {
			// A port that is unreachable gives a reset.
			if code, ok := icmpAt(n, at.Addr()); ok && code != "port-unreachable" {
				all = append(all, attempt{name: code + "/" + familyName(at.Addr()), at: at, steps: steps, soft: true})
			}
		}
	}
	for _, a := range []netip.Addr{neighbour4, neighbour6, mapped(neighbour4)} {
		all = append(all, attempt{name: "no neighbour/" + familyName(a), at: netip.AddrPortFrom(a, portEcho), steps: steps, soft: true})
	}
	without := perform(t, g, all)
	g.fresh(t)
	g.with(t, "connect: mirror")
	with := perform(t, g, all)
	for _, a := range all {
		want, got := kinds(without[a.name]), kinds(with[a.name])
		if a.seen(want) != a.seen(got) {
			t.Errorf("%s:\n without %s\n with    %s", a.name, without[a.name], with[a.name])
		}
		if !strings.Contains(want.String(), "errno E") {
			t.Errorf("%s: no error without Pillion: %s", a.name, want)
		}
	}
}

// kinds leaves in what an error queue says its errno and where that came from.
func kinds(tr transcript) transcript {
	all := slices.Clone(tr)
	for n, r := range all {
		var addr, port, errno string
		var origin int
		if _, err := fmt.Sscanf(r.Note, "%s %s %s origin %d", &addr, &port, &errno, &origin); err == nil {
			all[n].Note = fmt.Sprintf("errno %s origin %d", errno, origin)
		}
	}
	return all
}
