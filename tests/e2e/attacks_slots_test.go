package e2e

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"github.com/vishvananda/netlink"
)

// Slots that mean something, by their number (bpf/include/abi.h).
const (
	unusedSlot   = 40000
	listenerSlot = 0xfffd
	canarySlot   = 0xfffe
)

const (
	sitePort    = 8080
	serviceAddr = "10.96.0.12"
)

// prey is a captured application with a service and a destination that it has
// talked to, so that both have slots, and a bait: a listener of its own on every
// address, which the local route of the slots leads to.
type prey struct {
	*rig.Rig
	app   *actor
	i     *rig.Instance
	slots slotRange
	known []uint16 // slots of every kind
}

func newPrey(t testing.TB, config string) *prey {
	t.Helper()
	return newPreyIn(t, rig.New(t), config)
}

func newPreyIn(t testing.TB, r *rig.Rig, config string) *prey {
	t.Helper()
	s := &prey{Rig: r}
	s.Serve(t, netip.AddrPortFrom(rig.Far4, sitePort), named("far"))
	s.Serve(t, netip.AddrPortFrom(rig.Far6, sitePort), named("far"))
	s.i = s.Run(t, fmt.Sprintf("services: [{name: web, address: %s:%d, endpoints: [%s:%d]}]\n%s",
		serviceAddr, sitePort, rig.Far4, sitePort, config))
	s.app = captive(t, s.Rig, nil)
	s.relayed(t, 0)
	s.slots = slotsAt(t, s.i)
	s.known = []uint16{
		slotFor(t, s.i, rig.Far4), slotFor(t, s.i, rig.Far6), slotFor(t, s.i, netip.MustParseAddr(serviceAddr)),
		unusedSlot, listenerSlot, canarySlot,
	}
	for _, kind := range []string{"SOCK_STREAM", "SOCK_DGRAM"} {
		for _, at := range []string{"0.0.0.0", "::"} {
			s.app.wants("ok", "bind(%q, %d, %s, [(IPPROTO_IPV6, IPV6_V6ONLY, 1)] if %q == '::' else [])", at, sitePort, kind, at)
		}
	}
	return s
}

// relayed has the application use everything until all of it was relayed: on a
// busy machine the handler may be late, and connections go by on_failure. before
// is how many connections have ended.
func (s *prey) relayed(t testing.TB, before int) (ended int) {
	t.Helper()
	for _, to := range []string{serviceAddr, rig.Far4.String(), rig.Far6.String()} {
		testutil.Eventually(t, rig.Limit, func() bool {
			said := s.app.do("dial(%q, %d)", to, sitePort)
			records := s.i.Ended(t, before+1)
			before = len(records)
			last := records[before-1]
			if last.Path == flow.PathRelay && said != "far" {
				t.Fatalf("connection to %s: %q, %+v", to, said, last)
			}
			return last.Path == flow.PathRelay && last.OrigDst.Addr().String() == to
		}, "connections to ", to, " are relayed")
	}
	return before
}

// unheard fails the test if anybody reached the bait.
func (s *prey) unheard(t testing.TB) {
	t.Helper()
	s.app.wants("[]", "select.select(kept, [], [], 0.1)[0]")
}

// undisturbed fails the test unless just so many connections ever reached the
// handler.
func (s *prey) undisturbed(t testing.TB, want float64) {
	t.Helper()
	if n := arrived(t, s.i); n != want {
		t.Errorf("%v connections were carried, want the %v that were meant to", n, want)
	}
}

// TestAttackDialSlots has the application dial slots of every kind, in every
// form: each is refused, none arrives anywhere, and each is counted.
func TestAttackDialSlots(t *testing.T) {
	t.Parallel()
	s := newPrey(t, "")
	elsewhere := slotRange{netip.MustParsePrefix("240.63.0.0/16"), netip.MustParsePrefix("fd70:696c:6c69:3f::/64")}
	if s.slots.v4 == elsewhere.v4 {
		elsewhere = slotRange{netip.MustParsePrefix("240.62.0.0/16"), netip.MustParsePrefix("fd70:696c:6c69:3e::/64")}
	}
	before := s.i.Reasons(t)
	tries := uint64(0)
	for _, kind := range []string{"SOCK_STREAM", "SOCK_DGRAM"} {
		for _, ports := range []int{sitePort, 22, 1} {
			for _, n := range s.known {
				for _, a := range append(s.slots.forms(n), elsewhere.forms(n)...) {
					s.app.wants("ECONNREFUSED", "dial(%q, %d, %s)", a, ports, kind)
					tries++
				}
			}
		}
	}
	counted(t, s.i, before, map[string]uint64{"slot_address": tries, "foreign_slot": 0, "not_live": 0})
	s.undisturbed(t, 3)
	s.unheard(t)
	s.relayed(t, 3)
}

// TestAttackDialForeignSlots has the application dial the slots of another
// instance in the same namespace: its lookup program refuses them.
func TestAttackDialForeignSlots(t *testing.T) {
	t.Parallel()
	s := newPrey(t, "")
	other := *s.Rig
	other.Scope = testutil.NewCgroup(t)
	j := other.Run(t, "")
	neighbour := captive(t, &other, nil)
	neighbour.wants("far", "dial(%q, %d)", rig.Far4, sitePort)
	neighbour.wants("far", "dial(%q, %d)", rig.Far6, sitePort)
	j.Ended(t, 2)
	theirs := slotsAt(t, j)
	before, mine := j.Reasons(t), s.i.Reasons(t)
	tries := uint64(0)
	for _, n := range []uint16{slotFor(t, j, rig.Far4), slotFor(t, j, rig.Far6), unusedSlot, listenerSlot, canarySlot} {
		for _, a := range theirs.forms(n) {
			s.app.wants("ECONNREFUSED", "dial(%q, %d)", a, sitePort)
			s.app.wants("ECONNREFUSED", "dial(%q, %d, SOCK_DGRAM)", a, sitePort)
			tries++
		}
	}
	// A datagram takes the same way as a SYN.
	counted(t, j, before, map[string]uint64{"not_live": 2 * tries})
	counted(t, s.i, mine, map[string]uint64{"foreign_slot": 2 * tries, "slot_address": 0})
	s.unheard(t)
	if n := arrived(t, j); n != 2 {
		t.Errorf("%v connections were carried by the other handler, want its own two", n)
	}
	neighbour.wants("far", "dial(%q, %d)", rig.Far4, sitePort)
}

// TestAttackBindSlots has the application bind slots, to answer in the handler's
// place.
func TestAttackBindSlots(t *testing.T) {
	t.Parallel()
	s := newPrey(t, "")
	before := s.i.Reasons(t)
	tries := uint64(0)
	for _, kind := range []string{"SOCK_STREAM", "SOCK_DGRAM"} {
		for _, opts := range []string{"", "(IPPROTO_IP, IP_FREEBIND, 1)", "(IPPROTO_IP, IP_TRANSPARENT, 1)", "(SOL_SOCKET, SO_REUSEPORT, 1)"} {
			for _, n := range s.known {
				for _, a := range s.slots.forms(n) {
					s.app.wants("EADDRNOTAVAIL", "bind(%q, %d, %s, [%s])", a, sitePort+1, kind, opts)
					tries++
				}
			}
		}
	}
	counted(t, s.i, before, map[string]uint64{"slot_address": tries})
	s.relayed(t, 3)
}

// TestAttackOutsiderDials has a process in the namespace that is not in the
// scope dial slots, and send datagrams to them.
func TestAttackOutsiderDials(t *testing.T) {
	t.Parallel()
	s := newPrey(t, "")
	out := outsider(t, s.Rig)
	before := s.i.Reasons(t)
	tries := uint64(0)
	for _, n := range s.known {
		for _, a := range s.slots.forms(n) {
			for _, port := range []int{sitePort, 9} {
				out.wants("ECONNREFUSED", "dial(%q, %d)", a, port)
				out.wants("ECONNREFUSED", "dial(%q, %d, SOCK_DGRAM)", a, port)
				out.wants("ok", "tell(%q, %d)", a, port)
				tries += 3
			}
		}
	}
	counted(t, s.i, before, map[string]uint64{"not_live": tries})
	s.undisturbed(t, 3)
	// Also a datagram of the application itself, which no hook sees.
	for _, n := range s.known {
		for _, a := range s.slots.forms(n) {
			s.app.wants("ok", "tell(%q, %d)", a, sitePort)
		}
	}
	s.unheard(t)
	s.relayed(t, 3)
}

// TestAttackOutsiderListens has a process outside of the scope listen on slots:
// applications still reach the handler, and nobody once it is dead.
func TestAttackOutsiderListens(t *testing.T) {
	t.Parallel()
	s := newPrey(t, "")
	s.app.do("let_go()") // on the same port, the bait would stand in the way
	out := outsider(t, s.Rig)
	for _, n := range s.known {
		for _, a := range s.slots.forms(n)[:2] {
			out.wants("ok", "bind(%q, %d, SOCK_STREAM, [(IPPROTO_IPV6, IPV6_FREEBIND, 1)] if ':' in %q else [])", a, sitePort, a)
		}
	}
	s.relayed(t, 3)
	s.i.Kill(t)
	testutil.Eventually(t, rig.Limit, func() bool {
		return s.app.do("dial(%q, %d)", rig.Far4, sitePort) == "far"
	}, "connections go by on_failure")
	s.app.wants("far", "dial(%q, %d)", rig.Far6, sitePort)
	out.wants("[]", "select.select(kept, [], [], 0.1)[0]")
	s.i.Launch(t)
	s.app.wants("far", "dial(%q, %d)", serviceAddr, sitePort)
	out.wants("[]", "select.select(kept, [], [], 0.1)[0]")
}

// routeSlots has the world send slots to the application's machine.
func routeSlots(t testing.TB, r *rig.Rig) {
	t.Helper()
	r.World.Do(t, func() error {
		link, err := netlink.LinkByName(testutil.WorldLink)
		if err != nil {
			return err
		}
		for to, via := range map[string]netip.Prefix{"240.0.0.0/10": testutil.AppV4, "fd70:696c:6c69::/48": testutil.AppV6} {
			dst, err := netlink.ParseIPNet(to)
			if err != nil {
				return err
			}
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Gw: via.Addr().AsSlice()}); err != nil {
				return fmt.Errorf("route %s: %w", to, err)
			}
		}
		return nil
	})
}

// TestAttackWorldDials has another host dial slots.
func TestAttackWorldDials(t *testing.T) {
	t.Parallel()
	s := newPrey(t, "")
	routeSlots(t, s.Rig)
	world := newActor(t, testutil.Place{NS: s.World}, nil)
	before := s.i.Reasons(t)
	tries := uint64(0)
	for _, n := range s.known {
		for _, a := range s.slots.forms(n) {
			for _, port := range []int{sitePort, 9} {
				world.wants("ECONNREFUSED", "dial(%q, %d)", a, port)
				world.wants("ok", "tell(%q, %d)", a, port)
				tries += 2
			}
		}
	}
	testutil.Eventually(t, rig.Limit, func() bool { return s.i.Reasons(t)["not_live"]-before["not_live"] == tries }, "all of them are refused")
	s.undisturbed(t, 3)
	s.unheard(t)
	s.relayed(t, 3)
}
