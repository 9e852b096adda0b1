package loader

import (
	"errors"
	"maps"
	"math"
	"net/netip"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
)

var (
	shop  = netip.MustParseAddrPort("198.51.100.80:80")
	shop6 = netip.MustParseAddrPort("[2001:db8:1::80]:80")
)

func addrPorts(s ...string) []netip.AddrPort {
	var all []netip.AddrPort
	for _, a := range s {
		all = append(all, netip.MustParseAddrPort(a))
	}
	return all
}

// setOf is a set of one tier that is picked from by weight alone.
func setOf(addrs ...netip.AddrPort) *flow.Set {
	s := &flow.Set{Policy: flow.PolicyRandom}
	for i, a := range addrs {
		s.Endpoints = append(s.Endpoints, flow.SetEndpoint{Addr: a, Weight: 1, Cut: math.MaxUint32, Alias: uint32(i)})
	}
	s.Tiers[0].Count = len(addrs)
	return s
}

// withServices are plain rules with services that have sets.
func withServices(sets map[netip.AddrPort]*flow.Set) Rules {
	r := plain
	for _, a := range slices.SortedFunc(maps.Keys(sets), netip.AddrPort.Compare) {
		r.Services = append(r.Services, Service{Addr: a, Path: flow.PathDirect, Set: sets[a]})
	}
	return r
}

func setEndpoints(t testing.TB, d *Datapath, sets map[netip.AddrPort]*flow.Set) {
	t.Helper()
	if err := d.SetEndpoints(sets); err != nil {
		t.Fatal(err)
	}
}

// entry is what the kernel side has of a service.
func entry(t testing.TB, d *Datapath, service netip.AddrPort) (v bpf.Service) {
	t.Helper()
	if err := d.maps.Services.Lookup(serviceKey(service), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// innerOf is the id of the map that a service's set is in, 0 if there is none.
func innerOf(t testing.TB, d *Datapath, service netip.AddrPort) (inner uint32) {
	t.Helper()
	err := d.maps.Sets.Lookup(entry(t, d, service).Id, &inner)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Fatal(err)
	}
	return inner
}

// rowsOf reads the set of a service back, which takes CAP_SYS_ADMIN.
func rowsOf(t testing.TB, d *Datapath, service netip.AddrPort) []bpf.SetRow {
	t.Helper()
	m, err := ebpf.NewMapFromID(ebpf.MapID(innerOf(t, d, service)))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	rows := make([]bpf.SetRow, m.MaxEntries())
	for i := range rows {
		if err := m.Lookup(uint32(i), &rows[i]); err != nil {
			t.Fatal(err)
		}
	}
	return rows
}

func fromRow[R setRow](r bpf.SetRow) R { return *(*R)(unsafe.Pointer(&r)) }

// publishedOf are the endpoints of the set that the kernel side has, with their
// indices.
func publishedOf(t testing.TB, d *Datapath, service netip.AddrPort) map[netip.AddrPort]uint32 {
	t.Helper()
	rows := rowsOf(t, d, service)
	tiers := fromRow[bpf.SetTiers](rows[rowTiers])
	all := map[netip.AddrPort]uint32{}
	for _, r := range rows[bpf.SetHead:][:tiers.Tier[0].Count+tiers.Tier[1].Count] {
		e := fromRow[bpf.SetEndpoint](r)
		all[netip.AddrPortFrom(bpf.ToAddr(e.Addr), e.Port)] = e.Id
	}
	return all
}

// restart takes the instance over, as after a kill.
func (p *place) restart(t testing.TB, d *Datapath) *Datapath {
	t.Helper()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	err := p.do(t, d.options.Name, func(o Options) (err error) { d, err = Open(o); return err })
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestSetRows: a set of two tiers with tables is what abi.h says.
func TestSetRows(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	set := setOf(addrPorts("10.0.0.1:81", "10.0.0.2:82", "10.0.0.3:83")...)
	set.Policy, set.Hash, set.Spill = flow.PolicyMaglev, flow.HashDestination, 1<<31
	set.Failures, set.Base, set.Max, set.Panic = 5, 30*time.Second, 5*time.Minute, 40
	set.Tiers[0] = flow.Tier{Count: 2, Table: []uint32{0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1}}
	set.Tiers[1] = flow.Tier{First: 2, Count: 1, Table: []uint32{0, 0, 0}}
	set.Endpoints[1].Weight, set.Endpoints[1].Cut, set.Endpoints[1].Alias = 7, 99, 0
	set.Endpoints[2].Alias = 0
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: set}))
	rows := rowsOf(t, d, shop)
	if len(rows) != bpf.SetHead+3+2+1 {
		t.Fatalf("%d rows", len(rows))
	}
	tiers := fromRow[bpf.SetTiers](rows[0])
	if got := tiers.Tier[0]; got.First != 0 || got.Count != 2 || got.Table != 6 || got.Entries != 11 {
		t.Errorf("first tier: %+v", got)
	}
	if got := tiers.Tier[1]; got.First != 2 || got.Count != 1 || got.Table != 8 || got.Entries != 3 {
		t.Errorf("second tier: %+v", got)
	}
	want := bpf.SetConfig{
		Spill: 1 << 31, Base: 30_000, Max: 300_000, Failures: 5, Panic: 40,
		Policy: bpf.PolicyMaglev, Hash: bpf.HashDestination,
	}
	if got := fromRow[bpf.SetConfig](rows[1]); got != want {
		t.Errorf("config: %+v", got)
	}
	e := fromRow[bpf.SetEndpoint](rows[4])
	if e.Addr != bpf.FromAddr(netip.MustParseAddr("10.0.0.2")) || e.Port != 82 || e.Weight != 7 || e.Cut != 99 || e.Alias != 0 {
		t.Errorf("second endpoint: %+v", e)
	}
	if got := fromRow[bpf.SetTable](rows[7]).Entry; got != [8]uint32{0, 1, 1} {
		t.Errorf("the rest of the first table: %v", got)
	}
	if err := d.SetSpill(shop, 7); err != nil {
		t.Fatal(err)
	}
	want.Spill = 7
	if got := fromRow[bpf.SetConfig](rowsOf(t, d, shop)[1]); got != want {
		t.Errorf("config with another spill: %+v", got)
	}
}

// TestBadSet: what the kernel side cannot go by is refused, and changes nothing.
func TestBadSet(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	good := setOf(addrPorts("10.0.0.1:80")...)
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: good, shop6: nil}))
	before := innerOf(t, d, shop)
	for name, change := range map[string]func(s *flow.Set){
		"family":         func(s *flow.Set) { s.Endpoints[0].Addr = shop6 },
		"port":           func(s *flow.Set) { s.Endpoints[0].Addr = netip.AddrPortFrom(shop.Addr(), 0) },
		"no address":     func(s *flow.Set) { s.Endpoints[0].Addr = netip.AddrPort{} },
		"weight":         func(s *flow.Set) { s.Endpoints[0].Weight = 0 },
		"alias":          func(s *flow.Set) { s.Endpoints[0].Alias = 1 },
		"tier too long":  func(s *flow.Set) { s.Tiers[0].Count = 2 },
		"tier too short": func(s *flow.Set) { s.Tiers[0].Count = 0 },
		"tier displaced": func(s *flow.Set) { s.Tiers[1], s.Tiers[0] = flow.Tier{First: 1, Count: 1}, flow.Tier{} },
		"table":          func(s *flow.Set) { s.Tiers[0].Table = []uint32{0, 1} },
		"long table":     func(s *flow.Set) { s.Tiers[0].Table = make([]uint32, bpf.SetTableMax+1) },
		"policy":         func(s *flow.Set) { s.Policy = 200 },
		"panic":          func(s *flow.Set) { s.Panic = 101 },
		"failures":       func(s *flow.Set) { s.Failures = 1 << 16 },
		"waits":          func(s *flow.Set) { s.Base, s.Max = time.Hour, time.Minute },
	} {
		bad := setOf(good.Endpoints[0].Addr)
		change(bad)
		err := d.SetEndpoints(map[netip.AddrPort]*flow.Set{shop: bad, shop6: setOf(shop6)})
		if !errors.Is(err, ErrBadSet) {
			t.Errorf("%s: %v, want %v", name, err, ErrBadSet)
		}
	}
	for want, sets := range map[error]map[netip.AddrPort]*flow.Set{
		ErrNoService:        {far: good},
		ErrTooManyEndpoints: {shop: setOf(make([]netip.AddrPort, bpf.SetEndpoints+1)...)},
	} {
		if err := d.SetEndpoints(sets); !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	}
	if innerOf(t, d, shop) != before || innerOf(t, d, shop6) != 0 || d.sets.table.next != 1 {
		t.Error("something has changed")
	}
}

// TestUnchanged: a set that is published already is not published again, and what
// is written in place is.
func TestUnchanged(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	set := setOf(addrPorts("10.0.0.1:80", "10.0.0.2:80")...)
	set.Tiers = [2]flow.Tier{{Count: 1}, {First: 1, Count: 1}}
	set.Endpoints[1].Alias = 0
	rules := withServices(map[netip.AddrPort]*flow.Set{shop: set})
	setRules(t, d, rules)
	first := innerOf(t, d, shop)
	down := func() (down []bool) {
		states, err := d.EndpointStates(shop)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range states {
			down = append(down, s.Down)
		}
		return down
	}
	// A set that says what the last one said takes nothing back.
	if err := d.SetDown(shop, set.Endpoints[0].Addr, true); err != nil {
		t.Fatal(err)
	}
	setRules(t, d, rules)
	setEndpoints(t, d, map[netip.AddrPort]*flow.Set{shop: set})
	if got := down(); !slices.Equal(got, []bool{true, false}) {
		t.Errorf("down: %v", got)
	}
	other := *set
	other.Endpoints, other.Spill = slices.Clone(set.Endpoints), 9
	other.Endpoints[1].Down = true
	setEndpoints(t, d, map[netip.AddrPort]*flow.Set{shop: &other})
	if got := down(); !slices.Equal(got, []bool{true, true}) {
		t.Errorf("with another set down: %v", got)
	}
	if now := innerOf(t, d, shop); now != first {
		t.Errorf("published again: %d, before %d", now, first)
	}
	if got := fromRow[bpf.SetConfig](rowsOf(t, d, shop)[rowConfig]); got.Spill != 9 {
		t.Errorf("spill %d", got.Spill)
	}
	third := other
	third.Panic = 1
	setEndpoints(t, d, map[netip.AddrPort]*flow.Set{shop: &third})
	if innerOf(t, d, shop) == first {
		t.Error("a changed set was not published")
	}
	for err, want := range map[error]error{
		d.SetDown(far, set.Endpoints[0].Addr, true): ErrNoService,
		d.SetDown(shop, far, true):                  ErrNoSuchEndpoint,
		d.SetSpill(far, 1):                          ErrNoService,
	} {
		if !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	}
}

// TestIndices: an endpoint keeps its index, and its state with it, whatever becomes
// of the set it is in and of the process, until nobody needs it.
func TestIndices(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer func() { p.unload(t, d) }()
	a := addrPorts("10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80")
	publish := func(addrs ...netip.AddrPort) {
		t.Helper()
		setEndpoints(t, d, map[netip.AddrPort]*flow.Set{shop: setOf(addrs...)})
	}
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: setOf(a[:3]...), shop6: setOf(shop6)}))
	id, first := entry(t, d, shop).Id, publishedOf(t, d, shop)
	if len(first) != 3 || entry(t, d, shop6).Id == id {
		t.Fatalf("id %d, endpoints %v", id, first)
	}
	check := func(when string, want ...netip.AddrPort) {
		t.Helper()
		got := publishedOf(t, d, shop)
		for _, e := range want {
			if got[e] != first[e] {
				t.Errorf("%s: %s has index %d, had %d", when, e, got[e], first[e])
			}
		}
		if len(got) != len(want) || entry(t, d, shop).Id != id {
			t.Errorf("%s: id %d, endpoints %v", when, entry(t, d, shop).Id, got)
		}
	}
	d.sets.table.at(first[a[1]]).Live = 1
	publish(a[2], a[1], a[0])
	check("reordered", a[:3]...)
	publish(a[0], a[2])
	check("one removed", a[0], a[2])
	d.sets.grace = 0
	forget(t, d)
	publish(a[:3]...)
	check("one back that was connected", a[:3]...)

	d = p.restart(t, d)
	check("a new process", a[:3]...)
	if n := d.sets.table.at(first[a[1]]).Live; n != 1 {
		t.Errorf("live %d", n)
	}
	d.sets.grace = 0
	forget(t, d)
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: setOf(a[2], a[0])}))
	check("published by it", a[0], a[2])
	forget(t, d)
	states, err := d.EndpointStates(shop)
	if err != nil {
		t.Fatal(err)
	}
	want := []EndpointState{{Addr: a[0], InSet: true}, {Addr: a[1], Live: 1}, {Addr: a[2], InSet: true}}
	if !slices.Equal(states, want) {
		t.Errorf("states %+v, want %+v", states, want)
	}
	// The other service is gone, and so are its id and endpoint.
	if len(d.sets.byID) != 1 || len(d.sets.table.free) != 1 {
		t.Errorf("%d services, %d free endpoints", len(d.sets.byID), len(d.sets.table.free))
	}
	// The last connection of the removed one ends.
	e := d.sets.table.at(first[a[1]])
	e.Live, e.Connects, e.Last = 0, 5, 1
	forget(t, d)
	if got := *(*bpf.Endpoint)(e); got != (bpf.Endpoint{}) {
		t.Errorf("not forgotten: %+v", got)
	}
	publish(a...)
	if got := publishedOf(t, d, shop); len(got) != 4 || got[a[0]] != first[a[0]] || got[a[2]] != first[a[2]] {
		t.Errorf("endpoints %v, before %v", got, first)
	}
}

func forget(t testing.TB, d *Datapath) {
	t.Helper()
	if err := d.sets.forget(); err != nil {
		t.Fatal(err)
	}
}

// TestTwice: an endpoint that a set has twice has one index.
func TestTwice(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	a := addrPorts("10.0.0.1:80", "10.0.0.2:80", "10.0.0.1:80", "[::ffff:10.0.0.2]:80")
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: setOf(a...)}))
	first := publishedOf(t, d, shop)
	// And no index is used up but theirs.
	if used := int(d.sets.table.next) - len(d.sets.table.free); len(first) != 2 || first[a[0]] == first[a[1]] || used != 2 {
		t.Errorf("endpoints %v, %d in use", first, used)
	}
	setEndpoints(t, d, map[netip.AddrPort]*flow.Set{shop: setOf(append(a, far, far)...)})
	if got := publishedOf(t, d, shop); len(got) != 3 || got[a[0]] != first[a[0]] || got[a[1]] != first[a[1]] {
		t.Errorf("endpoints %v, before %v", got, first)
	}
}

// TestNotNamed: what could not be published is taken back.
func TestNotNamed(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: setOf(far), shop6: nil}))
	names := d.sets.table.names
	d.sets.table.names = d.maps.Beat // of another size
	sets := map[netip.AddrPort]*flow.Set{shop: setOf(many(1, 5)...), shop6: setOf(shop6)}
	if err := d.SetEndpoints(sets); err == nil {
		t.Error("no error")
	}
	d.sets.table.names = names
	if got := publishedOf(t, d, shop); len(got) != 1 || len(d.sets.table.free) != 6 || entry(t, d, shop6).Id != noSet {
		t.Errorf("endpoints %v, free %v", got, d.sets.table.free)
	}
	setEndpoints(t, d, sets)
	if got := publishedOf(t, d, shop); len(got) != 5 || len(publishedOf(t, d, shop6)) != 1 {
		t.Errorf("endpoints %v", got)
	}
	if len(d.sets.table.free) != 0 {
		t.Errorf("free %v", d.sets.table.free)
	}
}

// TestForgetWaits: what was in use a moment ago is kept.
func TestForgetWaits(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: setOf(far)}))
	id := entry(t, d, shop).Id
	setRules(t, d, plain)
	forget(t, d)
	if d.sets.byID[id] == nil || len(d.sets.out) != 1 {
		t.Error("forgotten at once")
	}
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: setOf(far)}))
	if now := entry(t, d, shop).Id; now != id {
		t.Errorf("id %d, before %d", now, id)
	}
	if len(d.sets.out) != 0 {
		t.Errorf("out: %v", d.sets.out)
	}
}

// TestSetTakenAway: a service without a set points to none, and its set is not kept.
func TestSetTakenAway(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer func() { p.unload(t, d) }()
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: setOf(far), shop6: nil}))
	id := entry(t, d, shop).Id
	if got := entry(t, d, shop6); got.Id != noSet || uint32(got.Path) != bpf.PathDirect {
		t.Errorf("without a set: %+v", got)
	}
	setEndpoints(t, d, map[netip.AddrPort]*flow.Set{shop: nil, shop6: setOf(shop6)})
	if got := entry(t, d, shop); got.Id != noSet {
		t.Errorf("the set was taken away: %+v", got)
	}
	if got := publishedOf(t, d, shop6); len(got) != 1 {
		t.Errorf("endpoints %v", got)
	}
	// Whatever a process leaves that nothing points to goes with the first rules
	// of the next.
	d = p.restart(t, d)
	d.sets.grace = 0
	setRules(t, d, plain)
	forget(t, d)
	if len(d.sets.byID) != 0 || len(d.sets.table.free) != 2 {
		t.Errorf("%d sets, %d free endpoints", len(d.sets.byID), len(d.sets.table.free))
	}
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: setOf(far)}))
	if now := entry(t, d, shop).Id; now > 1 || id > 1 {
		t.Errorf("id %d, before %d", now, id)
	}
}

// many are count endpoints of service n.
func many(n, count int) []netip.AddrPort {
	all := make([]netip.AddrPort, count)
	for i := range all {
		all[i] = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(n >> 8), byte(n), byte(i)}), uint16(8000+i>>8))
	}
	return all
}

// cpuTime is what the process has used of processors: the time that something takes
// says little on a machine that is busy.
func cpuTime(t testing.TB) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestPublishMany publishes a thousand services of a hundred endpoints in one step.
func TestPublishMany(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	without, sets := map[netip.AddrPort]*flow.Set{}, map[netip.AddrPort]*flow.Set{}
	for n := range 1000 {
		a := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 18, byte(n >> 8), byte(n)}), 80)
		without[a], sets[a] = nil, setOf(many(n, 100)...)
	}
	setRules(t, d, withServices(without))
	for _, what := range []string{"first", "again, all of them changed"} {
		start, before := time.Now(), cpuTime(t)
		setEndpoints(t, d, sets)
		t.Logf("%s: %s, %s of a processor", what, time.Since(start), cpuTime(t)-before)
		for a, set := range sets {
			other := *set
			other.Panic++
			sets[a] = &other
		}
	}
	look := sets
	if testutil.InVM() {
		// Its kernel waits for RCU at every look.
		look = map[netip.AddrPort]*flow.Set{}
		for a, set := range sets {
			if look[a] = set; len(look) == 20 {
				break
			}
		}
	}
	ids := map[uint32]bool{}
	for a, set := range look {
		got := publishedOf(t, d, a)
		for _, e := range set.Endpoints {
			i, ok := got[e.Addr]
			if !ok || ids[i] {
				t.Fatalf("service %s: endpoint %s is published %v, with index %d", a, e.Addr, ok, i)
			}
			ids[i] = true
		}
	}
	for a, set := range sets {
		addr, id := dryPick(t, d, a)
		known := slices.ContainsFunc(set.Endpoints, func(e flow.SetEndpoint) bool { return e.Addr == addr })
		if want, ok := d.sets.byAddr[a].endpoints.find(addr); !known || !ok || id != want {
			t.Errorf("service %s: picked %s, index %d", a, addr, id)
		}
	}
	if len(ids) != 100*len(look) {
		t.Errorf("%d endpoints", len(ids))
	}
}

// TestPublishLarge publishes a service of ten thousand endpoints, with a table.
func TestPublishLarge(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	set := setOf(many(0, 10_000)...)
	set.Policy = flow.PolicyMaglev
	set.Tiers[0].Table = make([]uint32, bpf.SetTableMax)
	for i := range set.Tiers[0].Table {
		set.Tiers[0].Table[i] = uint32(i % 10_000)
	}
	start := time.Now()
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: set}))
	t.Logf("%s", time.Since(start))
	got := publishedOf(t, d, shop)
	if len(got) != 10_000 {
		t.Errorf("%d endpoints", len(got))
	}
	if addr, id := dryPick(t, d, shop); !addr.IsValid() || got[addr] != id {
		t.Errorf("picked %s, index %d", addr, id)
	}
}
