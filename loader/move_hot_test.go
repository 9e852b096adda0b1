package loader

import (
	"errors"
	"net/netip"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/tests/testutil"
)

// hooksBefore does what hooks of the layout before do to its maps.
type hooksBefore struct {
	t    testing.TB
	maps map[string]*ebpf.Map
	move *move
}

// put writes an entry of ours into a map of the layout before.
func put[V any](h *hooksBefore, name string, key any, v V) {
	h.t.Helper()
	from, to := h.move.from.Maps[name], h.move.to.Maps[name]
	raw := unsafe.Slice((*byte)(unsafe.Pointer(&v)), unsafe.Sizeof(v))
	if err := h.maps[name].Put(key, translate(spansOf(to.Value, from.Value), raw, from.ValueSize)); err != nil {
		h.t.Fatal(err)
	}
}

// moving is an instance of another layout that this build has opened, and not attached.
func moving(t *testing.T, p *place, before func(*Datapath)) (*Datapath, *hooksBefore) {
	t.Helper()
	first := p.create(t, "one")
	rules := plain
	rules.Services = []Service{{Addr: shop}}
	setRules(t, first, rules)
	before(first)
	path := first.dir
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	old := disguise(t, path, foreign(t))
	d := p.move(t)
	return d, &hooksBefore{t: t, maps: old, move: d.moved}
}

// conn is an entry of live, and its key.
func conn(d *Datapath, n uint16) (source, slot netip.AddrPort, l bpf.Live) {
	source = netip.AddrPortFrom(testutil.AppV4.Addr(), 10000+n)
	slot = netip.AddrPortFrom(d.slots.addr4(500), 80)
	l = bpf.Live{
		Cookie: uint64(n) + 1, Cgroup: 2, Group: 3, Opened: uint64(d.monotonic()), Orig: bpf.FromAddr(shop.Addr()),
		Mark: 5, Priority: 6, Tos: 7, Reason: 1, Hold: bpf.HoldYes, KeepIdle: 9, UserTimeout: 10,
		Congestion: [16]uint8{'r', 'e', 'n', 'o'}, Seen: bpf.FromAddr(testutil.AppV4.Addr()),
	}
	return source, slot, l
}

// TestMoveLive: each open connection is found at every moment, what hooks of either layout
// write to its entry is in what is left in the end, and one that has ended is gone.
func TestMoveLive(t *testing.T) {
	p := newPlace(t)
	put1 := func(d *Datapath, n uint16) {
		source, slot, l := conn(d, n)
		if err := d.maps.Live.Put(liveKey(source, slot), l); err != nil {
			t.Fatal(err)
		}
	}
	d, hooks := moving(t, p, func(d *Datapath) {
		for n := range uint16(6) {
			put1(d, n)
		}
		source, slot, l := conn(d, 20)
		if err := d.maps.Departed.Put(liveKey(source, slot), l); err != nil {
			t.Fatal(err)
		}
	})
	defer func() { p.unload(t, d) }()
	want := func(n uint16, open bool) {
		t.Helper()
		source, slot, _ := conn(d, n)
		if got := d.Open(source, slot); got != open {
			t.Errorf("connection %d is open: %v", n, got)
		}
		if now, ok := d.Live(source, slot); ok != open || ok && (now.Cookie != uint64(n)+1 || now.Mark != 5 || now.UserTimeout != 10) {
			t.Errorf("connection %d: %+v, %v", n, now, ok)
		}
	}
	// Hooks of the layout before go on: one more, one less.
	source, slot, l := conn(d, 7)
	put(hooks, "live", liveKey(source, slot), l)
	source, slot, _ = conn(d, 5)
	if err := hooks.maps["live"].Delete(liveKey(source, slot)); err != nil {
		t.Fatal(err)
	}
	for _, n := range []uint16{0, 1, 2, 3, 4, 7} {
		want(n, true)
	}
	want(5, false)
	source, slot, _ = conn(d, 20)
	if now, ok := d.Live(source, slot); !ok || now.Cookie != 21 {
		t.Errorf("the connection that is closed already: %+v, %v", now, ok)
	}
	// A canary is for hooks of both.
	if err := d.AdmitCanary(source, slot); err != nil {
		t.Fatal(err)
	}
	var raw []byte
	if err := hooks.maps["live"].Lookup(liveKey(source, slot), &raw); err != nil {
		t.Errorf("hooks of the layout before do not admit the canary: %v", err)
	}
	if err := d.ForgetCanary(source, slot); err != nil {
		t.Fatal(err)
	}
	if err := hooks.maps["live"].Lookup(liveKey(source, slot), &raw); err == nil {
		t.Error("hooks of the layout before admit the canary still")
	}
	step := func(n uint16, last uint32) bool {
		t.Helper()
		source, slot, _ := conn(d, n)
		did, err := d.askMove(bpf.ProgMoveLive, bpf.Move{
			Own: bpf.FromAddr(source.Addr()), Peer: bpf.FromAddr(slot.Addr()), OwnPort: source.Port(), PeerPort: slot.Port(), Last: last,
		}, 0)
		if err != nil {
			t.Fatal(err)
		}
		return did
	}
	// Connection 0 is copied; a hook that has found the former entry says that its answer
	// is out, and who serves it.
	if !step(0, 0) {
		t.Error("connection 0 is not copied")
	}
	source, slot, l = conn(d, 0)
	l.Hold, l.Worker = bpf.HoldOver, 3
	put(hooks, "live", liveKey(source, slot), l)
	// Connection 1 is copied, and ends: sockops deletes both.
	step(1, 0)
	source, slot, _ = conn(d, 1)
	for _, m := range []*ebpf.Map{hooks.maps["live"], d.maps.Live} {
		if err := m.Delete(liveKey(source, slot)); err != nil {
			t.Fatal(err)
		}
	}
	if step(1, 0) || step(1, 1) {
		t.Error("a connection that has ended is moved")
	}
	// Connection 2's end was missed, and its address is another one's.
	source, slot, l = conn(d, 2)
	l.Cookie, l.Worker = 99, 1
	if err := d.maps.Live.Put(liveKey(source, slot), l); err != nil {
		t.Fatal(err)
	}
	if step(2, 0) {
		t.Error("an entry that is another connection's is replaced")
	}
	p.attach(t, d)
	if hooks.maps["live"].Iterate().Next(new(bpf.LiveKey), &raw) || hooks.maps["departed"].Iterate().Next(new(bpf.LiveKey), &raw) {
		t.Error("something is left in the layout before")
	}
	for _, n := range []uint16{0, 3, 4, 7} {
		want(n, true)
		source, slot, l := conn(d, n)
		if n == 0 {
			l.Hold, l.Worker = bpf.HoldOver, 3
		}
		now, ok := lookupLive(d.liveFD, liveKey(source, slot))
		now.Opened, l.Opened = 0, 0
		if diff := cmp.Diff(l, now); !ok || diff != "" {
			t.Errorf("connection %d (-want +got):\n%s", n, diff)
		}
	}
	want(1, false)
	want(5, false)
	source, slot, _ = conn(d, 2)
	if now, ok := d.Live(source, slot); !ok || now.Cookie != 99 {
		t.Errorf("the connection that has the address of another: %+v, %v", now, ok)
	}
	source, slot, _ = conn(d, 20)
	if now, ok := d.Live(source, slot); !ok || now.Cookie != 21 {
		t.Errorf("the connection that is closed already: %+v, %v", now, ok)
	}
}

// TestMoveSlots: a slot resolves at every moment, whoever named it, none is named twice,
// and what is free in the end resolves nowhere.
func TestMoveSlots(t *testing.T) {
	p := newPlace(t)
	named := netip.MustParseAddr("203.0.113.1")
	next := uint32(bpf.SlotFirst + reservedSlots)
	name := func(d *Datapath, n uint32, a netip.Addr) bpf.Slot {
		if err := d.maps.SlotByOrig.Put(bpf.FromAddr(a), n); err != nil {
			t.Fatal(err)
		}
		return bpf.Slot{Orig: bpf.FromAddr(a), Used: uint64(d.monotonic()), Group: 7, State: bpf.SlotNamed}
	}
	d, hooks := moving(t, p, func(d *Datapath) {
		if err := d.maps.Slots.Put(next, name(d, next, named)); err != nil {
			t.Fatal(err)
		}
		d.state.nextSlot().Add(1)
		d.state.live().Store(4)
	})
	defer func() { p.unload(t, d) }()
	resolves := func(n uint32, want netip.Addr) {
		t.Helper()
		if got, err := d.Resolve(d.slots.addr4(uint16(n))); got != want {
			t.Errorf("slot %d resolves to %s, %v, want %s", n, got, err, want)
		}
	}
	resolves(next, named)
	// The old hooks' counter is past those that both find free.
	if got := atomic.LoadUint32(d.moved.word("next_slot")); got != next+1+slotBlock {
		t.Errorf("the next slot of the hooks before is %d, want %d", got, next+1+slotBlock)
	}
	free := map[uint32]bool{}
	for range slotBlock {
		var n uint32
		if err := d.maps.FreeSlots.LookupAndDelete(nil, &n); err != nil {
			t.Fatal(err)
		}
		if free[n] || n <= next || n > next+slotBlock {
			t.Errorf("slot %d is free twice, or should not be", n)
		}
		free[n] = true
	}
	// A hook of the layout before names one by its counter, and one that is free for both.
	byCounter, byQueue := netip.MustParseAddr("203.0.113.2"), netip.MustParseAddr("203.0.113.3")
	count := atomic.AddUint32(d.moved.word("next_slot"), 1) - 1
	put(hooks, "slots", count, name(d, count, byCounter))
	put(hooks, "slots", next+1, name(d, next+1, byQueue))
	resolves(count, byCounter)
	resolves(next+1, byQueue)
	// Rules that come meanwhile are for hooks of both.
	rules := plain
	rules.Services = []Service{{Addr: shop}, {Addr: netip.AddrPortFrom(byQueue, 80)}, {Addr: netip.MustParseAddrPort("203.0.113.4:80")}}
	setRules(t, d, rules)
	for _, a := range []netip.Addr{byQueue, netip.MustParseAddr("203.0.113.4")} {
		var n uint32
		if err := d.maps.SlotByOrig.Lookup(bpf.FromAddr(a), &n); err != nil {
			t.Fatal(err)
		}
		if v, err := d.moved.slotBefore(n); err != nil || v.State != bpf.SlotReserved || bpf.ToAddr(v.Orig) != a {
			t.Errorf("the slot of %s for hooks before: %+v, %v", a, v, err)
		}
	}
	p.attach(t, d)
	resolves(next, named)
	resolves(count, byCounter)
	resolves(next+1, byQueue)
	resolves(next+2, netip.Addr{})
	if got := d.state.nextSlot().Load(); got != count+1 {
		t.Errorf("the next slot is %d, want %d", got, count+1)
	}
	if err := eachValue(hooks.maps["slots"], func(n uint32, raw []byte) error {
		if !isZero(raw) {
			t.Errorf("slot %d is left in the layout before", n)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if got := stats(t, d).Live; got != 4 {
		t.Errorf("%d connections are open, want 4", got)
	}
}

// TestMoveCounts: what hooks of both layouts count is added up, also where one counts
// down what the other has counted up.
func TestMoveCounts(t *testing.T) {
	p := newPlace(t)
	before := bpf.Endpoint{Live: 3, Failures: 1, Connects: 10, Failed: 4, Ejections: 1, Round: 2, Last: bpf.EndingRefused, Down: 1}
	d, hooks := moving(t, p, func(d *Datapath) {
		d.state.live().Store(5)
		if err := d.maps.Endpoints.Put(uint32(9), before); err != nil {
			t.Fatal(err)
		}
		if err := d.maps.UsageByGroup.Put(uint64(7), bpf.Usage{Slots: 1, Conns: 5}); err != nil {
			t.Fatal(err)
		}
	})
	defer func() { p.unload(t, d) }()
	usage := func(group uint64) (u bpf.Usage) {
		t.Helper()
		if err := d.maps.UsageByGroup.Lookup(group, &u); err != nil {
			t.Error(err)
		}
		return u
	}
	endpoint := func() (v bpf.Endpoint) {
		t.Helper()
		if err := d.maps.Endpoints.Lookup(uint32(9), &v); err != nil {
			t.Error(err)
		}
		return v
	}
	if got := endpoint(); got != before {
		t.Errorf("before any hook is swapped: %+v, want %+v", got, before)
	}
	if got := usage(7); got != (bpf.Usage{Slots: 1, Conns: 5}) || d.state.live().Load() != 5 {
		t.Errorf("before any hook is swapped: %+v, %d", got, d.state.live().Load())
	}
	// Hooks of the layout before: two connections more, one of a container that is new;
	// one failure more, and an ejection that ends; one slot.
	after := before
	after.Live, after.Connects, after.Failures, after.Until, after.Round = 5, 12, 0, 1234, 3
	put(hooks, "endpoints", uint32(9), after)
	put(hooks, "usage_by_group", uint64(7), bpf.Usage{Slots: 2, Conns: 6})
	put(hooks, "usage_by_group", uint64(8), bpf.Usage{Conns: 1, EventsLost: 2})
	atomic.AddUint32(d.moved.word("live"), 2)
	// New ones: six are closed, of five that they have seen.
	if _, err := d.askMove(bpf.ProgAddUsage, bpf.Move{Group: 7, Conns: ^uint64(5)}, 0); err != nil {
		t.Fatal(err)
	}
	d.state.live().Add(^uint32(5))
	p.attach(t, d)
	if got := d.state.live().Load(); got != 1 {
		t.Errorf("%d are open, want 1", got)
	}
	if got := usage(7); got != (bpf.Usage{Slots: 2}) {
		t.Errorf("usage %+v", got)
	}
	if got := usage(8); got != (bpf.Usage{Conns: 1, EventsLost: 2}) {
		t.Errorf("usage %+v", got)
	}
	if got := endpoint(); got != after {
		t.Errorf("endpoint %+v, want %+v", got, after)
	}
	if err := d.forgetGroups(); err != nil {
		t.Error(err)
	}
}

// TestEndpointCatchesUp: sums are added; of what is no sum, who changed it last is right,
// and that are the new hooks where both have.
func TestEndpointCatchesUp(t *testing.T) {
	was := bpf.Endpoint{Live: 4, Failures: 1, Until: 100, Connects: 7, Failed: 3, Ejections: 2, Round: 1, Last: 2, Down: 1}
	for name, c := range map[string]struct {
		old, mine func(*bpf.Endpoint)
		want      func(*bpf.Endpoint)
	}{
		"nobody": {},
		"sums of both": {
			old:  func(e *bpf.Endpoint) { e.Live += 3; e.Connects += 5; e.Failed++; e.Ejections++ },
			mine: func(e *bpf.Endpoint) { e.Live -= 6; e.Connects++ },
			want: func(e *bpf.Endpoint) { e.Live = 1; e.Connects = 13; e.Failed = 4; e.Ejections = 3 },
		},
		"the old hooks count down": {
			old:  func(e *bpf.Endpoint) { e.Live -= 4 },
			mine: func(e *bpf.Endpoint) { e.Live++ },
			want: func(e *bpf.Endpoint) { e.Live = 1 },
		},
		"health of the old ones": {
			old:  func(e *bpf.Endpoint) { e.Failures, e.Until, e.Round, e.Last, e.Down = 0, 200, 2, 3, 0 },
			want: func(e *bpf.Endpoint) { e.Failures, e.Until, e.Round, e.Last, e.Down = 0, 200, 2, 3, 0 },
		},
		"health of the new ones": {
			mine: func(e *bpf.Endpoint) { e.Failures, e.Until, e.Round, e.Last, e.Down = 0, 0, 5, 4, 0 },
			want: func(e *bpf.Endpoint) { e.Failures, e.Until, e.Round, e.Last, e.Down = 0, 0, 5, 4, 0 },
		},
		"health of both": {
			old:  func(e *bpf.Endpoint) { e.Failures, e.Until, e.Round, e.Last = 2, 200, 2, 3 },
			mine: func(e *bpf.Endpoint) { e.Until, e.Last = 0, 4 },
			want: func(e *bpf.Endpoint) { e.Failures, e.Until, e.Round, e.Last = 2, 0, 2, 4 },
		},
	} {
		old, mine, want := was, was, was
		for _, v := range []struct {
			f  func(*bpf.Endpoint)
			to *bpf.Endpoint
		}{{c.old, &old}, {c.mine, &mine}, {c.want, &want}} {
			if v.f != nil {
				v.f(v.to)
			}
		}
		(*endpoint)(&mine).catchUp(was, old)
		if diff := cmp.Diff(want, mine); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// TestMend: of what was counted and named by hooks whose process was killed while it
// swapped them, the counts are what live says, and addresses have what their slots say.
func TestMend(t *testing.T) {
	p := newPlace(t)
	orig, n := netip.MustParseAddr("203.0.113.1"), uint32(bpf.SlotFirst+reservedSlots)
	for name, to := range map[string]*description{"another layout": foreign(t), "this one": nil} {
		t.Run(name, func(t *testing.T) {
			first := p.create(t, "one")
			setRules(t, first, plain)
			p.attach(t, first)
			path := first.dir
			// Of five connections, four ended where nobody counts by now.
			source, slot, l := conn(first, 1)
			canary := l
			canary.Canary = 1
			other := netip.AddrPortFrom(source.Addr(), 1)
			if err := errors.Join(
				first.maps.Live.Put(liveKey(source, slot), l), first.maps.Live.Put(liveKey(other, slot), canary),
				first.maps.UsageByGroup.Put(l.Group, bpf.Usage{Slots: 2, Conns: 3}), first.maps.UsageByGroup.Put(uint64(8), bpf.Usage{Conns: 2}),
				first.maps.SlotByOrig.Put(bpf.FromAddr(orig), n),
			); err != nil {
				t.Fatal(err)
			}
			first.state.live().Store(5)
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			if to != nil {
				disguise(t, path, to)
			}
			if err := ownDescription(t).write(path.pin(layoutsPin + nextSuffix)); err != nil {
				t.Fatal(err)
			}
			second := p.move(t)
			defer p.unload(t, second)
			p.attach(t, second)
			var used, idle bpf.Usage
			if err := errors.Join(second.maps.UsageByGroup.Lookup(l.Group, &used), second.maps.UsageByGroup.Lookup(uint64(8), &idle)); err != nil {
				t.Error(err)
			}
			if got := second.state.live().Load(); got != 1 || used != (bpf.Usage{Slots: 2, Conns: 1}) || idle != (bpf.Usage{}) {
				t.Errorf("%d are open, of containers %+v and %+v, want 1", got, used, idle)
			}
			if got, err := second.Resolve(second.slots.addr4(uint16(n))); got != orig || err != nil {
				t.Errorf("the slot resolves to %s, %v", got, err)
			}
		})
	}
}
