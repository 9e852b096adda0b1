package connect

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// next is what a program of tc returns to leave the packet to the next one.
const next = -1

// counter is somebody else's program of tc that counts packets.
type counter struct {
	name    string
	program *ebpf.Program
	packets *ebpf.Map
}

func newCounter(t *testing.T, name string) *counter {
	t.Helper()
	packets, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { packets.Close() })
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, packets.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R0, next).WithSymbol("out"),
		asm.Return(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	return &counter{name, program, packets}
}

func (c *counter) count(t *testing.T) uint64 {
	t.Helper()
	var n uint64
	if err := c.packets.Lookup(uint32(0), &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// hook attaches the program to lo as a link of tcx.
func (c *counter) hook(t *testing.T, ns *testutil.NS, attach ebpf.AttachType, anchor link.Anchor) {
	t.Helper()
	ns.Do(t, func() error {
		l, err := link.AttachTCX(link.TCXOptions{Interface: 1, Program: c.program, Attach: attach, Anchor: anchor})
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	})
}

// filter attaches the program to lo as a classic filter.
func (c *counter) filter(t *testing.T, ns *testutil.NS, parent uint32) {
	t.Helper()
	ns.Do(t, func() error {
		qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: 1, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
		if err := netlink.QdiscReplace(qdisc); err != nil {
			return fmt.Errorf("add clsact: %w", err)
		}
		return netlink.FilterAdd(&netlink.BpfFilter{
			FilterAttrs:  netlink.FilterAttrs{LinkIndex: 1, Parent: parent, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1},
			Fd:           c.program.FD(),
			Name:         c.name,
			DirectAction: true,
		})
	})
}

// TestForeignPrograms has programs of others on lo, before ours and after, as
// links and as classic filters: they see traffic, and all works.
func TestForeignPrograms(t *testing.T) {
	t.Parallel()
	type place struct {
		name   string
		attach ebpf.AttachType
		anchor link.Anchor
		parent uint32 // of a classic filter
	}
	places := []place{
		{"ingress, first", ebpf.AttachTCXIngress, link.Head(), 0},
		{"ingress, last", ebpf.AttachTCXIngress, link.Tail(), 0},
		{"egress, first", ebpf.AttachTCXEgress, link.Head(), 0},
		{"egress, last", ebpf.AttachTCXEgress, link.Tail(), 0},
		{"classic ingress", 0, nil, netlink.HANDLE_MIN_INGRESS},
		{"classic egress", 0, nil, netlink.HANDLE_MIN_EGRESS},
	}
	put := func(t *testing.T, g *ground) []*counter {
		var all []*counter
		for _, p := range places {
			c := newCounter(t, p.name)
			if p.parent != 0 {
				c.filter(t, g.App, p.parent)
			} else {
				c.hook(t, g.App, p.attach, p.anchor)
			}
			all = append(all, c)
		}
		return all
	}
	check := func(t *testing.T, g *ground, counters []*counter) {
		t.Helper()
		before := make([]uint64, len(counters))
		for n, c := range counters {
			before[n] = c.count(t)
		}
		for _, far := range []netip.Addr{rig.Far4, rig.Far6, mapped(rig.Far4)} {
			g.wants(t, netip.AddrPortFrom(far, portEcho), "connect send=hello recv", alive)
			g.wants(t, netip.AddrPortFrom(far, portClosed), "connect", refused)
			g.wants(t, netip.AddrPortFrom(far, portLateICMP+1), "connect", "connect=-1 EHOSTUNREACH")
		}
		for n, c := range counters {
			if seen := c.count(t) - before[n]; seen < 9 {
				t.Errorf("%s: the foreign program saw %d packets", c.name, seen)
			}
		}
	}
	t.Run("before", func(t *testing.T) {
		t.Parallel()
		g := newGround(t)
		counters := put(t, g)
		i := g.with(t, "connect: mirror")
		check(t, g, counters)
		redirected(t, i, 9)
	})
	t.Run("after", func(t *testing.T) {
		t.Parallel()
		g := newGround(t)
		i := g.Run(t, "connect: mirror")
		check(t, g, put(t, g))
		redirected(t, i, 9)
		// When ours is gone, theirs are still there.
		c := newCounter(t, "later")
		c.hook(t, g.App, ebpf.AttachTCXIngress, link.Tail())
		if err := i.Stop(t); err != nil {
			t.Error(err)
		}
		ping(t, g)
		if c.count(t) == 0 {
			t.Error("the foreign program sees nothing once ours is gone")
		}
	})
}

// ping has one packet go through lo.
func ping(t *testing.T, g *ground) {
	t.Helper()
	g.wants(t, netip.MustParseAddrPort("127.0.0.1:9"), "connect", refused)
}

// TestTwoInstances has two instances in one network namespace mirror at once:
// each gives its own application the result of its own dials.
func TestTwoInstances(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	other := &ground{Rig: g.Beside(t), app: g.app}
	config := func(good, bad uint16) string {
		s := "connect: mirror\nservices:\n"
		for _, f := range families {
			s += service(netip.AddrPortFrom(f.vip, 80), "", netip.AddrPortFrom(f.far, good))
			s += service(netip.AddrPortFrom(f.vip, 81), "", netip.AddrPortFrom(f.far, bad))
		}
		return s
	}
	one := g.with(t, config(portEcho, portClosed))
	two := other.with(t, config(portGreets, portICMP+1))
	var all, others []attempt
	for n := range 100 {
		for _, f := range families {
			good, bad := netip.AddrPortFrom(f.vip, 80), netip.AddrPortFrom(f.vip, 81)
			all = append(all,
				attempt{name: fmt.Sprintf("good %s %d", good, n), at: good, steps: []string{"connect", "send=hello", "recv"}},
				attempt{name: fmt.Sprintf("bad %s %d", bad, n), at: bad, steps: []string{"connect"}})
			others = append(others,
				attempt{name: fmt.Sprintf("good %s %d", good, n), at: good, steps: []string{"connect", "recv"}})
			if n < 10 { // each waits for a second SYN
				others = append(others, attempt{name: fmt.Sprintf("bad %s %d", bad, n), at: bad, steps: []string{"connect"}})
			}
		}
	}
	done := make(chan map[string]transcript)
	go func() { done <- perform(t, other, others) }()
	saw := perform(t, g, all)
	sawToo := <-done
	is := func(g *ground, saw map[string]transcript, all []attempt, good, bad string) {
		wrong := 0
		for _, a := range all {
			want := bad
			if a.at.Port() == 80 {
				want = good
			}
			if got := saw[a.name].String(); got != want {
				wrong++
				if wrong > g.early(t) {
					t.Errorf("%s: %s, want %s", a.name, got, want)
				}
			}
		}
	}
	is(g, saw, all, alive, refused)
	is(other, sawToo, others, "connect=0, recv=16 "+greeting, "connect=-1 EHOSTUNREACH")
	redirected(t, one, len(all))
	redirected(t, two, len(others))
}
