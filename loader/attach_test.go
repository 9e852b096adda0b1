package loader

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

const patience = 20 * time.Second

var far = netip.MustParseAddrPort("198.51.100.7:7070")

// rules are plain ones.
var plain = Rules{Default: flow.PathRelay, Workers: 1, MaxConns: 1000}

func setRules(t testing.TB, d *Datapath, r Rules) {
	t.Helper()
	if err := d.SetRules(r); err != nil {
		t.Fatal(err)
	}
}

// TestLife goes through the four verbs.
func TestLife(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	if d.Adopted() || d.Name() != "one" {
		t.Errorf("adopted %v, name %s", d.Adopted(), d.Name())
	}
	// Somebody holds it: neither made, nor opened, nor removed a second time.
	for what, try := range map[string]struct {
		f    func(Options) error
		want error
	}{
		"create": {func(o Options) error { _, err := Create(o); return err }, ErrExists},
		"open":   {func(o Options) error { _, err := Open(o); return err }, ErrInUse},
		"remove": {func(o Options) error { return Remove(p.bpffs, p.root, o.Name) }, ErrInUse},
	} {
		if err := p.do(t, "one", try.f); !errors.Is(err, try.want) {
			t.Errorf("%s: %v, want %v", what, err, try.want)
		}
	}
	setRules(t, d, plain)
	p.attach(t, d)
	p.handler(t, d)
	if err := p.connect(t, far); err != nil {
		t.Errorf("captured: %v", err)
	}
	n, _, ok := slotOf(t, d, far.Addr())
	if !ok {
		t.Fatal("no slot")
	}
	pins, routes, before := p.pins("one"), p.routes(t), stats(t, d)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(pins, p.pins("one")); diff != "" {
		t.Errorf("closing changed the pins: %s", diff)
	}
	err := p.do(t, "one", func(o Options) (err error) {
		if _, err := Create(o); !errors.Is(err, ErrExists) {
			t.Errorf("create: %v", err)
		}
		d, err = Open(o)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if !d.Adopted() {
		t.Error("not adopted")
	}
	p.attach(t, d)
	if after, _, _ := slotOf(t, d, far.Addr()); after != n {
		t.Errorf("slot %d, before %d", after, n)
	}
	if diff := cmp.Diff(before.Reasons, stats(t, d).Reasons); diff != "" {
		t.Errorf("counters changed: %s", diff)
	}
	if diff := cmp.Diff(routes, p.routes(t)); diff != "" {
		t.Errorf("routes changed: %s", diff)
	}
	p.unload(t, d)
	p.clean(t)
	if err := p.do(t, "one", func(o Options) error { _, err := Open(o); return err }); !errors.Is(err, ErrNotFound) {
		t.Errorf("open what is gone: %v", err)
	}
}

// TestAnotherScope opens an instance from elsewhere: it is refused, and changes
// nothing.
func TestAnotherScope(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	pins := p.pins("one")
	other := testutil.NewCgroup(t)
	err := p.App.Run(func() error {
		o, err := p.options("one")
		if err != nil {
			return err
		}
		o.Scope.Path, o.Scope.ID = other.Path, other.ID
		_, err = Open(o)
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "cgroup") {
		t.Errorf("from another cgroup: %v", err)
	}
	err = p.World.Run(func() error {
		o, err := p.options("one")
		if err != nil {
			return err
		}
		_, err = Open(o)
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "network namespace") {
		t.Errorf("from another namespace: %v", err)
	}
	if diff := cmp.Diff(pins, p.pins("one")); diff != "" {
		t.Errorf("pins changed: %s", diff)
	}
	if err := p.do(t, "one", func(o Options) error { return Remove(p.bpffs, p.root, o.Name) }); err != nil {
		t.Error(err)
	}
	p.clean(t)
}

// TestReattach removes every link and every pin of one, in turn, from a fresh
// instance and from an adopted one.
func TestReattach(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	setRules(t, d, plain)
	p.attach(t, d)
	p.handler(t, d)
	mend := func(name, how string) {
		t.Helper()
		var mended []string
		p.App.Do(t, func() (err error) {
			mended, err = d.Reattach()
			return err
		})
		if !slices.Equal(mended, []string{name}) {
			t.Errorf("%s of %s: mended %v", how, name, mended)
		}
	}
	all := func() {
		t.Helper()
		for _, name := range attachOrder(d.holds) {
			pin := filepath.Join(p.bpffs, "pillion", "one", linkPrefix+name)
			l, err := link.LoadPinnedLink(pin, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := detach(l); err != nil {
				t.Fatal(err)
			}
			l.Close()
			mend(name, "link")
			if err := os.Remove(pin); err != nil {
				t.Fatal(err)
			}
			mend(name, "pin")
		}
		if err := p.connect(t, far); err != nil {
			t.Errorf("captured: %v", err)
		}
	}
	all()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := p.do(t, "one", func(o Options) (err error) { d, err = Open(o); return err }); err != nil {
		t.Fatal(err)
	}
	p.attach(t, d)
	p.handler(t, d)
	all()
	if got := reason(t, d, flow.ReasonDefault); got != 2 {
		t.Errorf("%d redirected, want 2", got)
	}
	p.unload(t, d)
	p.clean(t)
}

// TestRanges claims ranges until there are none.
func TestRanges(t *testing.T) {
	p := newPlace(t)
	var made []*Datapath
	seen := map[netip.Prefix]bool{}
	// A few instances, and routes of others that stand in the way: one of each
	// family, which a claim must not take half.
	p.App.Do(t, func() error {
		n, err := openNetwork()
		if err != nil {
			return err
		}
		defer n.close()
		for i := range ranges - 3 {
			r := slotRange{number: (os.Getpid() + i) % ranges}
			prefix := r.prefix4()
			if i%2 == 0 {
				prefix = r.prefix6()
			}
			route := n.slotRoute(prefix, n.source(prefix.Addr().Is6()))
			route.Protocol = unix.RTPROT_STATIC // else they were taken for what a dead one left
			if err := n.handle.RouteAdd(route); err != nil {
				return err
			}
		}
		return nil
	})
	before := p.routes(t)
	for n := range 3 {
		d := p.create(t, fmt.Sprintf("i%d", n))
		v4, v6 := d.SlotPrefixes()
		if seen[v4] || seen[v6] || !v4.IsValid() || !v6.IsValid() {
			t.Errorf("ranges %s %s", v4, v6)
		}
		seen[v4], seen[v6] = true, true
		made = append(made, d)
	}
	err := p.do(t, "more", func(o Options) error { _, err := Create(o); return err })
	if !errors.Is(err, ErrNoRange) {
		t.Errorf("one too many: %v", err)
	}
	if left := p.pins("more"); len(left) > 0 {
		t.Errorf("it left %v", left)
	}
	for _, d := range made {
		p.unload(t, d)
	}
	if diff := cmp.Diff(before, p.routes(t)); diff != "" {
		t.Errorf("routes of others: %s", diff)
	}
}

// TestSlotsRetire follows a slot from its first use to its next.
func TestSlotsRetire(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one", func(o *Options) { o.SlotIdle, o.SlotGrace = 300*time.Millisecond, 3*time.Second })
	setRules(t, d, plain)
	p.attach(t, d)
	p.handler(t, d)
	// One that stays open, one that does not, and one of a service.
	service := netip.MustParseAddrPort("10.96.0.12:80")
	with := plain
	with.Services = []Service{{Addr: service}}
	setRules(t, d, with)
	held := netip.MustParseAddrPort("198.51.100.8:7070")
	c, err := p.open(t, held)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := p.connect(t, far); err != nil {
		t.Fatal(err)
	}
	n, _, _ := slotOf(t, d, far.Addr())
	slot := d.slots.addr4(uint16(n))
	if a, err := d.Resolve(slot); err != nil || a != far.Addr() {
		t.Errorf("resolve: %v, %v", a, err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var tidy sync.WaitGroup
	tidy.Go(func() {
		if err := d.Tidy(ctx); err != nil {
			t.Error(err)
		}
	})
	testutil.Eventually(t, patience, func() bool { return stats(t, d).Retiring == 1 }, "the slot retires")
	if _, _, ok := slotOf(t, d, far.Addr()); ok {
		t.Error("a retiring slot is still handed out")
	}
	if a, err := d.Resolve(slot); err != nil || a != far.Addr() {
		t.Errorf("resolve while it retires: %v, %v", a, err)
	}
	testutil.Eventually(t, patience, func() bool { return stats(t, d).Retiring == 0 }, "the slot is free")
	if _, err := d.Resolve(slot); !errors.Is(err, ErrFreeSlot) {
		t.Errorf("resolve a free one: %v", err)
	}
	if _, _, ok := slotOf(t, d, held.Addr()); !ok {
		t.Error("the slot of an open connection is gone")
	}
	if _, s, ok := slotOf(t, d, service.Addr()); !ok || s.State != bpf.SlotReserved {
		t.Error("the slot of a service is gone")
	}
	c.Close()
	testutil.Eventually(t, patience, func() bool { return stats(t, d).Named+stats(t, d).Retiring == 0 }, "the other one goes when its connection does")
	// A service that is no more has a slot like any.
	setRules(t, d, plain)
	testutil.Eventually(t, patience, func() bool { return stats(t, d).Reserved+stats(t, d).Named+stats(t, d).Retiring == 0 }, "the service's goes with it")
	stop()
	tidy.Wait()
	// The next address takes the one that is free, not a new one.
	next := d.state.nextSlot().Load()
	if err := p.connect(t, far); err != nil {
		t.Fatal(err)
	}
	if got := d.state.nextSlot().Load(); got != next {
		t.Errorf("a new slot %d, and free ones are there", got)
	}
	p.unload(t, d)
	p.clean(t)
}

// TestSlotQuota has one container use up its share: the next address goes by
// on_failure, those that have a slot are redirected, and other containers are.
func TestSlotQuota(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one", func(o *Options) { o.SlotIdle, o.SlotGrace = 100*time.Millisecond, 100*time.Millisecond })
	r := plain
	r.SlotQuota, r.Closed = 3, true
	setRules(t, d, r)
	p.attach(t, d)
	p.handler(t, d)
	at := func(n byte) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, n}), 7070)
	}
	for n := range byte(3) {
		if err := p.connect(t, at(n+1)); err != nil {
			t.Errorf("address %d: %v", n, err)
		}
	}
	if err := p.connect(t, at(4)); err == nil {
		t.Error("the quota holds nothing")
	}
	if err := p.connect(t, at(2)); err != nil {
		t.Errorf("an address that has a slot: %v", err)
	}
	other := *p
	other.scope = p.scope.Child(t, "other")
	if err := other.connect(t, at(5)); err != nil {
		t.Errorf("another container: %v", err)
	}
	if got := reason(t, d, flow.ReasonSlotQuota); got != 1 {
		t.Errorf("slot_quota %d, want 1", got)
	}
	// Slots that go are given back.
	testutil.Eventually(t, patience, func() bool {
		if err := d.tidy(); err != nil {
			t.Fatal(err)
		}
		s := stats(t, d)
		return s.Named+s.Retiring == 0
	}, "all slots are free")
	if err := p.connect(t, at(4)); err != nil {
		t.Errorf("after they were given back: %v", err)
	}
	p.unload(t, d)
}

// TestNoSlot uses up all slots.
func TestNoSlot(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	r := plain
	r.Closed = true
	setRules(t, d, r)
	p.attach(t, d)
	p.handler(t, d)
	d.state.nextSlot().Store(bpf.SlotLast)
	if err := p.connect(t, far); err != nil {
		t.Errorf("the last slot: %v", err)
	}
	if n, _, ok := slotOf(t, d, far.Addr()); !ok || n != bpf.SlotLast {
		t.Errorf("slot %d, want the last", n)
	}
	another := netip.MustParseAddrPort("198.51.100.8:7070")
	for range 3 {
		if err := p.connect(t, another); err == nil {
			t.Error("a slot that is none")
		}
	}
	if err := p.connect(t, far); err != nil {
		t.Errorf("who has one: %v", err)
	}
	if got := reason(t, d, flow.ReasonNoSlot); got != 3 {
		t.Errorf("no_slot %d, want 3", got)
	}
	// The listener's and the canary's own slots are nobody's.
	for _, n := range []uint32{bpf.SlotListener, bpf.SlotCanary} {
		var s bpf.Slot
		if err := d.maps.Slots.Lookup(n, &s); err != nil || s.State != bpf.SlotFree {
			t.Errorf("slot %d: %+v, %v", n, s, err)
		}
	}
	if s := stats(t, d); s.Unaccounted() != 0 {
		t.Errorf("%d unaccounted", s.Unaccounted())
	}
	p.unload(t, d)
}

// TestHoldIsFirst has a program of somebody else's on lo, which lets everything
// pass: what comes behind such a one sees nothing.
func TestHoldIsFirst(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	if !d.Holds() {
		t.Skip("needs tcx (Linux 6.6)")
	}
	foreign, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Imm(asm.R0, 0), asm.Return(), // TC_ACT_OK
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	p.App.Do(t, func() error {
		l, err := link.AttachTCX(link.TCXOptions{Interface: 1, Program: foreign, Attach: ebpf.AttachTCXIngress})
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	})
	setRules(t, d, plain)
	p.attach(t, d)
	info, err := d.programs[bpf.ProgHold].Info()
	if err != nil {
		t.Fatal(err)
	}
	want, _ := info.ID()
	p.App.Do(t, func() error {
		all, err := link.QueryPrograms(link.QueryOptions{Target: 1, Attach: ebpf.AttachTCXIngress})
		if err == nil && (len(all.Programs) != 2 || all.Programs[0].ID != want) {
			t.Errorf("programs on lo: %+v, want %d first", all.Programs, want)
		}
		return err
	})
}
