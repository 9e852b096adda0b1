package loader

import (
	"errors"
	"maps"
	"math"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// reversedEach reverses the fields of each of the types that records or rows are of.
func reversedEach(fields []field) (all []field) {
	var kinds []string
	for _, f := range fields {
		if kind, _, _ := strings.Cut(f.Name, "."); !slices.Contains(kinds, kind) {
			kinds = append(kinds, kind)
		}
	}
	for _, kind := range kinds {
		some, _ := reversed(withPrefix(fields, kind))
		some[0].Name = kind + ".unknown"
		all = append(all, some...)
	}
	return all
}

func ofState(f field) bool { return strings.HasPrefix(f.Name, "set_state.") }

// foreignRow is a row of sets in the layout of foreign.
type foreignRow [40]byte

// disguiseSets copies endpoint sets to maps of another layout, which takes CAP_SYS_ADMIN.
func disguiseSets(t testing.TB, old, to *ebpf.Map, inner *ebpf.MapSpec, was, is *mapLayout) {
	t.Helper()
	spans := map[string][]span{}
	for _, kind := range []string{"set_tiers", "set_config", "set_state", "set_endpoint", "set_table"} {
		spans[kind] = spansOf(withPrefix(was.Value, kind), withPrefix(is.Value, kind))
	}
	var numbers, fds []uint32
	// They are numbered from 0 on; before Linux 6.8 each look waits for RCU.
	for number := uint32(0); ; number++ {
		var id uint32
		err := old.Lookup(number, &id)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		m, err := ebpf.NewMapFromID(ebpf.MapID(id))
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		spec := *inner
		spec.MaxEntries = m.MaxEntries()
		n, err := ebpf.NewMap(&spec)
		if err != nil {
			t.Fatal(err)
		}
		defer n.Close()
		keys, rows := make([]uint32, m.MaxEntries()), make([]bpf.SetRow, m.MaxEntries())
		if n, err := m.BatchLookup(new(ebpf.MapBatchCursor), keys, rows, nil); n != len(rows) {
			t.Fatalf("%d rows of %d: %v", n, len(rows), err)
		}
		tiers := fromRow[bpf.SetTiers](rows[rowTiers])
		var all []foreignRow
		for i := range m.MaxEntries() {
			kind := "set_table"
			switch {
			case i < bpf.SetHead:
				kind = []string{"set_tiers", "set_config", "set_state"}[i]
			case i < bpf.SetHead+tiers.Tier[0].Count+tiers.Tier[1].Count:
				kind = "set_endpoint"
			}
			raw := unsafe.Slice((*byte)(unsafe.Pointer(&rows[i])), unsafe.Sizeof(rows[i]))
			all = append(all, foreignRow(translate(spans[kind], raw, spec.ValueSize)))
		}
		if _, err := n.BatchUpdate(keys, all, nil); err != nil {
			t.Fatal(err)
		}
		numbers, fds = append(numbers, number), append(fds, uint32(n.FD()))
	}
	for k := range slices.Chunk(numbers, 1000) { // each waits for RCU, also here
		if _, err := to.BatchUpdate(k, fds[:len(k)], nil); err != nil {
			t.Fatal(err)
		}
		fds = fds[len(k):]
	}
}

// putRecord puts a record into a ring, as a hook does.
func putRecord(t testing.TB, ring *ebpf.Map, record []byte) {
	t.Helper()
	value, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(record)), MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer value.Close()
	if err := value.Put(uint32(0), record); err != nil {
		t.Fatal(err)
	}
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
			asm.StoreImm(asm.RFP, -4, 0, asm.Word),
			asm.LoadMapPtr(asm.R1, value.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "end"),
			asm.Mov.Reg(asm.R2, asm.R0),
			asm.LoadMapPtr(asm.R1, ring.FD()),
			asm.Mov.Imm(asm.R3, int32(len(record))), asm.Mov.Imm(asm.R4, 0),
			asm.FnRingbufOutput.Call(),
			asm.Return().WithSymbol("end"),
		},
	})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer p.Close()
	if got, err := p.Run(&ebpf.RunOptions{Data: make([]byte, dryRunAt)}); got != 0 || err != nil {
		t.Fatalf("write to a ring: %d, %v", int32(got), err)
	}
}

// rawOf is a record of this build in another layout.
func rawOf[R bpf.ConnEvent | bpf.Held](t testing.TB, to *description, name string, r R) []byte {
	t.Helper()
	is, own := to.Maps[name], ownDescription(t).Maps[name]
	fields, size := withPrefix(is.Value, contentRings[name]), uint32(0)
	for _, f := range fields {
		size = max(size, (f.At+f.Size+7)&^7)
	}
	raw := unsafe.Slice((*byte)(unsafe.Pointer(&r)), unsafe.Sizeof(r))
	return translate(spansOf(withPrefix(own.Value, contentRings[name]), fields), raw, size)
}

// eventsOf reads the ring of records to its end.
func eventsOf(t testing.TB, d *Datapath) (all []bpf.ConnEvent) {
	t.Helper()
	r, err := mapRing(d.Events())
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	for {
		raw, ok := r.peek()
		if !ok {
			return all
		}
		e, ok := bpf.ParseEvent(raw)
		if !ok {
			t.Errorf("a record of %d bytes", len(raw))
		}
		all = append(all, e)
		r.advance()
	}
}

func recordOf(n int) bpf.ConnEvent {
	return bpf.ConnEvent{
		Cookie: uint64(n), Opened: 5, Ended: 6 + uint64(n), Sent: 1 << 40, Source: bpf.FromAddr(shop6.Addr()), SrttUs: 77,
		SourcePort: 40000, OrigPort: 80, Kind: bpf.EventEnd, Path: uint8(flow.PathDirect), Ending: bpf.EndingReset, EndpointPort: 8001,
	}
}

func recordsFrom(n, count int) (all []bpf.ConnEvent) {
	for i := range count {
		all = append(all, recordOf(n+i))
	}
	return all
}

// TestMoveEvents: records that hooks of the layout before have told come out of the new
// ring, once each and in their order, up to the last one; also where a process is killed
// in the middle, and the next one goes on with its maps, or begins anew.
func TestMoveEvents(t *testing.T) {
	if !testutil.InVM() { // a minute there
		t.Run("goes on", func(t *testing.T) { testMoveEvents(t, false) })
	}
	t.Run("begins anew", func(t *testing.T) { testMoveEvents(t, true) })
}

func testMoveEvents(t *testing.T, anew bool) {
	t.Helper()
	p := newPlace(t)
	first := p.create(t, "one")
	setRules(t, first, plain)
	p.attach(t, first)
	path := first.dir
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	to := foreign(t)
	old := disguise(t, path, to)["events"]
	tell := func(n, count int) {
		for _, e := range recordsFrom(n, count) {
			putRecord(t, old, rawOf(t, to, "events", e))
		}
	}
	check := func(what string, d *Datapath, want []bpf.ConnEvent) {
		t.Helper()
		if diff := cmp.Diff(want, eventsOf(t, d)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
	tell(1, 50) // more than one test run has room for
	killed := p.move(t)
	if got := eventsOf(t, killed); len(got) > 0 {
		t.Errorf("%d records before anybody asked", len(got))
	}
	if !killed.GatherEvents() {
		t.Error("there is nothing more to come")
	}
	// Hooks of both layouts tell, and the process that swaps them is killed.
	check("of the layout before", killed, recordsFrom(1, 50))
	tell(51, 3)
	e := recordOf(100)
	putRecord(t, killed.Events(), unsafe.Slice((*byte)(unsafe.Pointer(&e)), unsafe.Sizeof(e)))
	killed.GatherEvents()
	tell(54, 3)
	if err := killed.Close(); err != nil {
		t.Fatal(err)
	}
	left, right := recordsFrom(54, 6), slices.Concat(recordsFrom(100, 1), recordsFrom(51, 3))
	if anew { // as for a build that cannot go on
		if err := os.Remove(path.pin("settings" + nextSuffix)); err != nil {
			t.Fatal(err)
		}
	} else {
		left, right = right, left
	}

	second := p.move(t)
	defer p.unload(t, second)
	of := second.Events()
	if anew {
		of = second.former.left["events"][0].m
	}
	tell(57, 3)
	second.GatherEvents()
	check("of the layout before, and of a killed process", second, slices.Concat(left, right))
	tell(60, 3)
	e = recordOf(101)
	putRecord(t, of, unsafe.Slice((*byte)(unsafe.Pointer(&e)), unsafe.Sizeof(e)))
	p.attach(t, second)
	left, right = recordsFrom(60, 3), recordsFrom(101, 1)
	if !anew {
		left, right = right, left
	}
	check("at the end", second, slices.Concat(left, right))
	if second.GatherEvents() {
		t.Error("there is more to come")
	}
}

// TestMoveEventsBack: the process after a killed one is of the layout before. Nothing is
// moved, but what the killed one's hooks have told.
func TestMoveEventsBack(t *testing.T) {
	p := newPlace(t)
	first := p.create(t, "one")
	setRules(t, first, plain)
	p.attach(t, first)
	path := first.dir
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	// As a process of another build leaves it that was killed in the middle.
	to := foreign(t)
	ring, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: 1 << 16})
	if err != nil {
		t.Fatal(err)
	}
	defer ring.Close()
	if err := errors.Join(to.write(path.pin(layoutsPin+nextSuffix)), ring.Pin(path.pin("events"+nextSuffix))); err != nil {
		t.Fatal(err)
	}
	putRecord(t, ring, rawOf(t, to, "events", recordOf(1)))
	second := p.move(t)
	defer p.unload(t, second)
	putRecord(t, ring, rawOf(t, to, "events", recordOf(2)))
	p.attach(t, second)
	if diff := cmp.Diff(recordsFrom(1, 2), eventsOf(t, second)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if second.moved != nil || len(second.former.left) > 0 {
		t.Errorf("moved %+v, left %+v", second.moved, second.former.left)
	}
}

// TestMoveHeld: a worker hears by one descriptor of what hooks of both layouts hold.
func TestMoveHeld(t *testing.T) {
	p := newPlace(t)
	first := p.create(t, "one")
	if !first.Holds() {
		p.unload(t, first)
		t.Skip("this kernel cannot hold handshakes back")
	}
	setRules(t, first, plain)
	p.attach(t, first)
	path, tag := first.dir, first.frameTag
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	to := foreign(t)
	all := disguise(t, path, to)
	old := all["held"]
	news := bpf.Held{
		Key:  bpf.LiveKey{Source: bpf.FromAddr(shop.Addr()), Slot: bpf.FromAddr(netip.MustParseAddr("240.1.0.9")), SourcePort: 40000, SlotPort: 80},
		Mark: 7, Kind: bpf.HeldAnswer, Size: 54,
	}
	news.Frame[0], news.Frame[53] = 11, 22
	want := flow.Held{
		Source: netip.AddrPortFrom(shop.Addr(), 40000), Slot: netip.MustParseAddrPort("240.1.0.9:80"),
		Mark: 7, Frame: news.Frame, Size: 54,
	}
	check := func(what string, q *Queue, gone bool) {
		t.Helper()
		readable := func() bool {
			for {
				n, err := unix.Poll([]unix.PollFd{{Fd: int32(q.FD()), Events: unix.POLLIN}}, 0)
				if err == nil {
					return n > 0
				}
				if err != unix.EINTR {
					t.Fatalf("%s: poll: %v", what, err)
				}
			}
		}
		if !readable() {
			t.Errorf("%s: nothing is readable", what)
		}
		want := want
		want.Gone = gone
		var got flow.Held
		if !q.Next(&got) || got != want {
			t.Errorf("%s: %+v, want %+v", what, got, want)
		}
		if q.Next(&got) {
			t.Errorf("%s: once more: %+v", what, got)
		}
		if readable() {
			t.Errorf("%s: readable still", what)
		}
	}
	hold := func(ring *ebpf.Map) { putRecord(t, ring, rawOf(t, to, "held", news)) }

	// After a kill: new rings in both maps.
	second := p.move(t)
	queues, err := second.Queues(2)
	if err != nil {
		t.Fatal(err)
	}
	for n := range uint32(2) {
		var id uint32
		if err := old.Lookup(n, &id); err != nil {
			t.Fatal(err)
		}
		ring, err := ebpf.NewMapFromID(ebpf.MapID(id))
		if err != nil {
			t.Fatal(err)
		}
		hold(ring)
		check("a hook of the layout before holds", queues[n], false)
		ring.Close()
		gone := news
		gone.Kind = bpf.HeldGone
		putRecord(t, queues[n].ring, unsafe.Slice((*byte)(unsafe.Pointer(&gone)), unsafe.Sizeof(gone)))
		check("a new hook tells", queues[n], true)
	}
	// Who waits has an entry that an old hook made.
	if queues[0].Waits(&want, 5) {
		t.Error("an application waits that has no entry")
	}
	put(&hooksBefore{t: t, maps: all, move: second.moved}, "live", liveKey(want.Source, want.Slot), bpf.Live{Cookie: 5, Hold: bpf.HoldYes})
	if !queues[0].Waits(&want, 5) || queues[0].Waits(&want, 6) {
		t.Error("an application is not seen to wait, or another one is")
	}
	if got := second.Handover().Rings; len(got) != 2 || got[0] == queues[0].FD() {
		t.Errorf("rings %v to hand over", got)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}

	// On a take-over: the rings of the process before, with what is in them.
	spec, err := second.heldSpec()
	if err != nil {
		t.Fatal(err)
	}
	given, err := ebpf.NewMap(spec)
	if err != nil {
		t.Fatal(err)
	}
	defer given.Close()
	hold(given)
	fd, err := unix.FcntlInt(uintptr(given.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var third *Datapath
	err = p.do(t, "one", func(o Options) (err error) {
		third, err = Join(o, Handover{FrameTag: tag, Rings: []int{fd}})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { p.unload(t, third) }()
	lock, err := third.LockPins(time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if err := third.Take(lock); err != nil {
		t.Fatal(err)
	}
	q := third.Joined()[0]
	check("held before", q, false)
	hold(given)
	check("held after", q, false)
	hold(given)
	p.attach(t, third)
	if err := third.Settled(canceled(t)); err == nil {
		t.Error("it is settled before the worker has read all")
	}
	check("held last", q, false)
	if err := third.Settled(t.Context()); err != nil {
		t.Error(err)
	}
}

// richSets are sets of every policy, some with two tiers and tables.
func richSets() map[netip.AddrPort]*flow.Set {
	all := map[netip.AddrPort]*flow.Set{}
	for n, policy := range []flow.Policy{flow.PolicyRandom, flow.PolicyLeastConnections, flow.PolicyRoundRobin, flow.PolicyMaglev} {
		set := setOf(many(n, 5)...)
		set.Policy, set.Hash, set.Spill = policy, flow.HashDestination, 1<<30
		set.Failures, set.Base, set.Max, set.Panic = 5, 30*time.Second, 5*time.Minute, 40
		set.Tiers = [2]flow.Tier{{Count: 3, Table: []uint32{0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0}}, {First: 3, Count: 2, Table: []uint32{1, 0, 1}}}
		for i := range set.Endpoints {
			e := &set.Endpoints[i]
			e.Weight, e.Cut, e.Alias = uint16(i+1), math.MaxUint32-uint32(i), uint32(i%2)
		}
		all[netip.AddrPortFrom(shop.Addr(), uint16(1000+n))] = set
	}
	all[shop6] = setOf(netip.MustParseAddrPort("[2001:db8::1]:80"))
	return all
}

// TestMoveSets: endpoint sets are what they were, with the turns, also without
// CAP_SYS_ADMIN.
func TestMoveSets(t *testing.T) {
	p := newPlace(t)
	first := p.create(t, "one")
	sets := richSets()
	sets[shop] = nil // it never had one
	setRules(t, first, withServices(sets))
	turns := netip.AddrPortFrom(shop.Addr(), 1002)
	before := map[netip.AddrPort][]bpf.SetRow{}
	for addr, set := range sets {
		if set != nil {
			before[addr] = rowsOf(t, first, addr)
		}
	}
	if fromRow[bpf.SetState](before[turns][rowState]).Turn == [2]uint32{} {
		t.Fatal("nobody's turn")
	}
	path := first.dir
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	disguise(t, path, foreign(t))
	second := p.move(t)
	defer p.unload(t, second)
	for addr, want := range before {
		if diff := cmp.Diff(want, rowsOf(t, second, addr)); diff != "" {
			t.Errorf("set of %s (-want +got):\n%s", addr, diff)
		}
		picked, _ := dryPick(t, second, addr)
		if !slices.ContainsFunc(sets[addr].Endpoints, func(e flow.SetEndpoint) bool { return e.Addr == picked }) {
			t.Errorf("%s is picked for %s", picked, addr)
		}
		kept, ok := second.Kept(addr)
		if !ok || len(kept) != len(sets[addr].Endpoints) {
			t.Errorf("kept of %s: %v, %v", addr, kept, ok)
		}
	}
	// From then on they are published as ever.
	p.attach(t, second)
	setRules(t, second, withServices(map[netip.AddrPort]*flow.Set{shop: setOf(addrPorts("10.9.9.9:80")...)}))
	if picked, _ := dryPick(t, second, shop); picked != netip.MustParseAddrPort("10.9.9.9:80") {
		t.Errorf("%s is picked", picked)
	}
}

// TestMoveManySets: 1,000 sets of 100 endpoints.
func TestMoveManySets(t *testing.T) {
	p := newPlace(t)
	first := p.create(t, "one")
	sets := map[netip.AddrPort]*flow.Set{}
	for n := range 1000 {
		set := setOf(many(n, 100)...)
		set.Policy = flow.PolicyRoundRobin
		set.Tiers[0].Table = make([]uint32, 200)
		for i := range set.Tiers[0].Table {
			set.Tiers[0].Table[i] = uint32(i % 100)
		}
		sets[netip.AddrPortFrom(shop.Addr(), uint16(1000+n))] = set
	}
	setRules(t, first, withServices(sets))
	if first.sets.waitsEach {
		p.unload(t, first)
		t.Skip("to disguise them takes minutes where each look waits for RCU (before Linux 6.8); TestMoveSets has some")
	}
	path := first.dir
	some := slices.Collect(maps.Keys(sets))[:20]
	var want [][]bpf.SetRow
	for _, addr := range some {
		want = append(want, rowsOf(t, first, addr))
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	disguise(t, path, foreign(t))
	begin := time.Now()
	second := p.move(t)
	defer p.unload(t, second)
	all := time.Since(begin)
	for n, addr := range some {
		if diff := cmp.Diff(want[n], rowsOf(t, second, addr)); diff != "" {
			t.Errorf("set of %s (-want +got):\n%s", addr, diff)
		}
	}
	begin = time.Now()
	if err := second.moveSets(second.moving.Load()); err != nil {
		t.Fatal(err)
	}
	t.Logf("1,000 sets of 100 endpoints are moved in %v; the whole start took %v", time.Since(begin), all)
}

// TestMoveOutlived: what getpeername tells of an MPTCP socket is there when its hook is,
// also what is noted while hooks are swapped.
func TestMoveOutlived(t *testing.T) {
	p := newPlace(t)
	first := p.create(t, "one")
	setRules(t, first, plain)
	p.attach(t, first)
	path := first.dir
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	to := foreign(t)
	is, own := to.Maps["outlived"], ownDescription(t).Maps["outlived"]
	old := disguise(t, path, to)["outlived"]
	key := func(port uint16) bpf.LiveKey {
		return bpf.LiveKey{Source: bpf.FromAddr(shop.Addr()), Slot: bpf.FromAddr(shop6.Addr()), SourcePort: port, SlotPort: 80}
	}
	note := func(m *ebpf.Map, port uint16, asked bpf.EndpointKey) {
		t.Helper()
		raw := unsafe.Slice((*byte)(unsafe.Pointer(&asked)), unsafe.Sizeof(asked))
		if m == old {
			raw = translate(spansOf(own.Value, is.Value), raw, is.ValueSize)
		}
		if err := m.Put(key(port), raw); err != nil {
			t.Fatal(err)
		}
	}
	asked := func(port uint16) bpf.EndpointKey { return bpf.EndpointKey{Addr: bpf.FromAddr(shop.Addr()), Port: port} }
	note(old, 1, asked(1))
	second := p.move(t)
	defer p.unload(t, second)
	note(old, 2, asked(2))
	note(old, 3, asked(3))
	note(second.maps.Outlived, 3, asked(33)) // by a new hook
	p.attach(t, second)
	for port, want := range map[uint16]bpf.EndpointKey{1: asked(1), 2: asked(2), 3: asked(33)} {
		var got bpf.EndpointKey
		if err := second.maps.Outlived.Lookup(key(port), &got); err != nil || got != want {
			t.Errorf("of port %d: %+v, %v, want %+v", port, got, err, want)
		}
	}
}
