package loader

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// foreignABI is that of a layout that no build has.
const foreignABI = bpf.ABI + 1000

// ownDescription is the one of this build.
func ownDescription(t testing.TB) *description {
	t.Helper()
	specs, err := bpf.Specs()
	if err != nil {
		t.Fatal(err)
	}
	l, err := ownLayouts(specs)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// foreign is a layout in which every map that can be moved has its fields the other way
// round, eight bytes that nobody knows before them, and what is stored in hashes as it is.
func foreign(t testing.TB) *description {
	t.Helper()
	l := ownDescription(t)
	l.ABI = foreignABI
	for name, how := range manners {
		m := l.Maps[name]
		switch how {
		case mannerCount:
			m.MaxEntries-- // an older build, which has not the last reason
		case mannerRing, mannerSets:
			m.Value = reversedEach(m.Value)
			m.MaxEntries *= 2
		default:
			m.Value, m.ValueSize = reversed(m.Value)
		}
		l.Maps[name] = m
	}
	return l
}

func reversed(fields []field) ([]field, uint32) {
	all := []field{{Name: "unknown", At: 0, Size: 8}}
	end := uint32(8)
	for _, f := range slices.Backward(fields) {
		align := min(f.Size&-f.Size, 8)
		end = (end + align - 1) &^ (align - 1)
		f.At = end
		end += f.Size
		all = append(all, f)
	}
	return all, (end + 7) &^ 7
}

// disguise gives an instance that nobody runs a foreign layout, with all that its maps
// hold, and what is stored with some sockets. It returns the foreign maps.
func disguise(t testing.TB, dir *dir, to *description, fds ...int) map[string]*ebpf.Map {
	t.Helper()
	from := ownDescription(t)
	specs, err := bpf.Specs()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]*ebpf.Map{}
	for name, how := range manners {
		was, is := from.Maps[name], to.Maps[name]
		old, err := ebpf.LoadPinnedMap(dir.pin(name), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer old.Close()
		spec := sharedMaps(specs)[name].Copy()
		spec.ValueSize, spec.MaxEntries = is.ValueSize, is.MaxEntries
		if how == mannerSets {
			row, _ := rowOf(&is)
			spec.InnerMap.ValueSize = uint32(row)
		}
		if how != mannerStorage {
			spec.Key, spec.Value = nil, nil
		} else if spec.Value, spec.ValueSize = storedAs(spec, is.ValueSize), is.ValueSize; spec.Value == nil {
			t.Fatal("no type for what is stored with a socket")
		}
		m, err := ebpf.NewMap(spec)
		if err != nil {
			t.Fatalf("map %s: %v", name, err)
		}
		t.Cleanup(func() { m.Close() })
		all[name] = m
		move := &move{from: from, to: to, old: map[string]*ebpf.Map{name: old}}
		switch how {
		case mannerCopy, mannerCells, mannerLive, mannerSlots, mannerSums:
			err = move.copy(name, m)
		case mannerCount:
			err = move.copyCounts(name, m)
		case mannerStorage:
			for _, fd := range fds {
				var raw []byte
				if err := old.Lookup(uint32(fd), &raw); errors.Is(err, ebpf.ErrKeyNotExist) {
					continue // it has a cell
				} else if err != nil {
					t.Fatal(err)
				}
				err = errors.Join(err, m.Put(uint32(fd), translate(spansOf(was.Value, is.Value), raw, is.ValueSize)))
			}
		case mannerSets:
			disguiseSets(t, old, m, spec.InnerMap, &was, &is)
		case mannerRing, mannerLate: // nobody has told anything
		}
		if err != nil {
			t.Fatalf("map %s: %v", name, err)
		}
		if name == instancePin {
			var raw []byte
			if err := m.Lookup(uint32(0), &raw); err != nil {
				t.Fatal(err)
			}
			abi, _ := find(is.Value, "abi")
			*(*uint32)(unsafe.Pointer(&raw[abi.At])) = foreignABI
			if err := m.Put(uint32(0), raw); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(os.Remove(dir.pin(name)), m.Pin(dir.pin(name))); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Remove(dir.pin(layoutsPin)), to.write(dir.pin(layoutsPin))); err != nil {
		t.Fatal(err)
	}
	return all
}

// move opens an instance of another layout again, as the next process does.
func (p *place) move(t testing.TB, change ...func(*Options)) *Datapath {
	t.Helper()
	var d *Datapath
	err := p.do(t, "one", func(o Options) (err error) {
		for _, f := range change {
			f(&o)
		}
		d, err = Open(o)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestMove opens an instance of another layout, and attaches the programs of this one:
// what is configured, counted and stored with sockets is there, and goes on.
func TestMove(t *testing.T) {
	for _, family := range []struct {
		service netip.AddrPort
		world   netip.Addr
	}{{shop, testutil.WorldV4.Addr()}, {shop6, testutil.WorldV6.Addr()}} {
		t.Run(family.service.String(), func(t *testing.T) { testMove(t, family.service, netip.AddrPortFrom(family.world, 8001)) })
	}
}

func testMove(t *testing.T, service, at netip.AddrPort) {
	t.Helper()
	p := newPlace(t)
	first := p.create(t, "one")
	rules := withServices(map[netip.AddrPort]*flow.Set{service: setOf(at)})
	rules.Deny = []Rule{{Prefix: netip.MustParsePrefix("192.0.2.0/24")}}
	setRules(t, first, rules)
	p.attach(t, first)
	conns := serve(t, p.World, at)
	var open []*net.TCPConn
	var fds []int
	for range 5 {
		c, err := p.open(t, service)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		open = append(open, c.(*net.TCPConn))
		defer (<-conns).Close()
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) { fds = append(fds, int(fd)) })
	}
	stored := func(d *Datapath) (all []bpf.Decision) {
		for _, fd := range fds {
			v, _ := decisionOn(t, d, fd)
			v.Owner = 0 // if it has a cell
			all = append(all, v)
		}
		return all
	}
	withoutCell(t, first, fds[0])
	withoutCell(t, first, fds[1])
	before, wantStored, listed := stats(t, first), stored(first), connections(t, first)
	settings, path := first.settings, first.dir
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	old := disguise(t, path, foreign(t), fds...)

	second := p.move(t)
	defer func() { p.unload(t, second) }()
	if second.settings != settings {
		t.Errorf("settings %+v, want %+v", second.settings, settings)
	}
	if diff := cmp.Diff(listed, connections(t, second), cmp.FilterPath(ofTime, cmp.Ignore()), cmp.Comparer(sameAddrPort)); diff != "" {
		t.Errorf("open connections before the hooks are swapped (-want +got):\n%s", diff)
	}
	// Hooks of both layouts go by the beat, and by the tag of a socket.
	if err := second.Beat(true, true, 12345); err != nil {
		t.Fatal(err)
	}
	busy, _ := find(foreign(t).Maps["beat"].Value, "busy")
	var beat []byte
	if err := old["beat"].Lookup(uint32(0), &beat); err != nil || beat[busy.At] != 1 {
		t.Errorf("the beat for hooks of the layout before is %v, %v", beat, err)
	}
	tagged, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(tagged)
	if err := second.Exempt(tagged); err != nil {
		t.Fatal(err)
	}
	own, _ := find(foreign(t).Maps["decisions"].Value, "own")
	var tag []byte
	if err := old["decisions"].Lookup(uint32(tagged), &tag); err != nil || tag[own.At] != 1 {
		t.Errorf("the tag for hooks of the layout before is %v, %v", tag, err)
	}
	// Some hook of the layout before counts once more.
	perCPU := make([]uint64, ebpf.MustPossibleCPU())
	perCPU[0] = before.Connects + 3
	if err := old["tallies"].Put(uint32(bpf.TallyConnects), perCPU); err != nil {
		t.Fatal(err)
	}
	if err := second.Settled(canceled(t)); err == nil {
		t.Error("it is settled before the hooks are swapped")
	}
	p.attach(t, second)
	if err := second.Settled(t.Context()); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(wantStored, stored(second)); diff != "" {
		t.Errorf("stored with sockets (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(before.Reasons, stats(t, second).Reasons); diff != "" {
		t.Errorf("reasons (-want +got):\n%s", diff)
	}
	if got := stats(t, second).Connects; got != before.Connects+3 {
		t.Errorf("%d connects, want %d", got, before.Connects+3)
	}
	if got := stateOf(t, second, service, at).Live; got != len(open) {
		t.Errorf("%d connections are counted, want %d", got, len(open))
	}
	for _, c := range open {
		var peer netip.AddrPort
		p.inScope(t, func() { peer = peerOf(t, c) })
		if peer != service {
			t.Errorf("the application sees %s", peer)
		}
		c.Close()
	}
	testutil.Eventually(t, patience, func() bool { return stateOf(t, second, service, at).Live == 0 }, "nobody is counted")
	if err := p.connect(t, service); err != nil {
		t.Error(err)
	}
	if names := p.pins("one"); slices.ContainsFunc(names, func(n string) bool { return strings.HasSuffix(n, nextSuffix) }) {
		t.Errorf("pins: %v", names)
	}
	// From now on it is like any other.
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	second = p.move(t)
	if second.moved != nil {
		t.Error("it is moved once more")
	}
}

func ofTime(p cmp.Path) bool {
	switch p.Last().String() {
	case ".Start", ".Duration", ".RTT", ".Connect":
		return true
	default:
		return false
	}
}

func sameAddrPort(a, b netip.AddrPort) bool { return a == b }

// peerOf asks the kernel whom a socket is connected to.
func peerOf(t testing.TB, c *net.TCPConn) (peer netip.AddrPort) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		switch sa, _ := unix.Getpeername(int(fd)); sa := sa.(type) {
		case *unix.SockaddrInet4:
			peer = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
		case *unix.SockaddrInet6:
			peer = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
		}
	})
	return peer
}

// TestMoveKilled: a process that moves an instance is killed at each step. The next one
// finds what it needs, of the layout before or of its own.
func TestMoveKilled(t *testing.T) {
	steps := map[string]func(t *testing.T, d *Datapath){
		"when the new maps are filled": func(*testing.T, *Datapath) {},
		"when some are pinned": func(t *testing.T, d *Datapath) {
			for _, name := range []string{"settings", instancePin} {
				if err := os.Remove(d.dir.pin(name + nextSuffix)); err != nil {
					t.Fatal(err)
				}
			}
		},
		"when the new description has its name": func(t *testing.T, d *Datapath) {
			if err := d.endHot(d.moved); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(d.dir.pin(layoutsPin+nextSuffix), d.dir.pin(layoutsPin)); err != nil {
				t.Fatal(err)
			}
		},
		"when some have their names": func(t *testing.T, d *Datapath) {
			if err := d.endHot(d.moved); err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{layoutsPin, instancePin, "decisions"} {
				if err := os.Rename(d.dir.pin(name+nextSuffix), d.dir.pin(name)); err != nil {
					t.Fatal(err)
				}
			}
		},
	}
	for _, name := range slices.Sorted(maps.Keys(steps)) {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			first := p.create(t, "one")
			setRules(t, first, plain)
			p.attach(t, first)
			path, settings := first.dir, first.settings
			source, slot, l := conn(first, 1)
			l.Group = 7
			known, used := bpf.Endpoint{Live: 2, Until: 3}, bpf.Usage{Slots: 4, Conns: 1}
			if err := errors.Join(
				first.maps.Live.Put(liveKey(source, slot), l),
				first.maps.Slots.Put(uint32(bpf.SlotLast), bpf.Slot{Orig: l.Orig, State: bpf.SlotRetiring}),
				first.maps.Endpoints.Put(uint32(1), known), first.maps.UsageByGroup.Put(uint64(7), used),
			); err != nil {
				t.Fatal(err)
			}
			first.state.live().Store(1)
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			disguise(t, path, foreign(t))
			second := p.move(t)
			steps[name](t, second)
			if err := second.Close(); err != nil {
				t.Fatal(err)
			}
			third := p.move(t)
			defer p.unload(t, third)
			p.attach(t, third)
			if third.settings != settings {
				t.Errorf("settings %+v, want %+v", third.settings, settings)
			}
			if third.instance.Abi != bpf.ABI || third.instance.Cgroup != first.instance.Cgroup {
				t.Errorf("record %+v, it was %+v", third.instance, first.instance)
			}
			if got, ok := lookupLive(third.liveFD, liveKey(source, slot)); !ok || got != l {
				t.Errorf("an open connection: %+v, %v, want %+v", got, ok, l)
			}
			if got, err := third.Resolve(third.slots.addr4(bpf.SlotLast)); got != shop.Addr() {
				t.Errorf("a slot resolves to %s, %v", got, err)
			}
			var e bpf.Endpoint
			var u bpf.Usage
			if err := errors.Join(third.maps.Endpoints.Lookup(uint32(1), &e), third.maps.UsageByGroup.Lookup(uint64(7), &u)); err != nil {
				t.Error(err)
			}
			if e != known || u != used || third.state.live().Load() != 1 {
				t.Errorf("endpoint %+v, usage %+v, %d open", e, u, third.state.live().Load())
			}
			for _, pin := range p.pins("one") {
				if strings.HasSuffix(pin, nextSuffix) {
					t.Errorf("%s is left", pin)
				}
			}
		})
	}
}

// TestMoveRefused: what cannot be moved is refused in words, and nothing has changed.
func TestMoveRefused(t *testing.T) {
	own := ownDescription(t)
	change := func(name string, f func(*mapLayout)) func(*description) {
		return func(l *description) {
			m := l.Maps[name]
			m.Value = slices.Clone(m.Value)
			f(&m)
			l.Maps[name] = m
		}
	}
	wider := func(m *mapLayout) { m.Value[0].Size++ }
	for want, f := range map[string]func(*description){
		"rows of endpoint sets":        change("sets", wider),
		"sets have no set_state":       change("sets", func(m *mapLayout) { m.Value = slices.DeleteFunc(m.Value, ofState) }),
		"map events differs":           change("events", func(m *mapLayout) { m.Type = uint32(ebpf.Queue) }),
		"map live differs":             change("live", func(m *mapLayout) { m.KeySize++ }),
		"map departed differs":         change("live", func(m *mapLayout) { rename(m, "worker") }),
		"departed has no field cookie": change("departed", wider),
		"map endpoints differs":        change("endpoints", func(m *mapLayout) { m.Flags = 0 }),
		"no field owner of 4 bytes":    change("state", func(m *mapLayout) { rename(m, "owner") }),
		"map usage_by_group differs":   change("usage_by_group", func(m *mapLayout) { m.KeySize = 4 }),
		"no field orig.w of 16":        change("slots", func(m *mapLayout) { rename(m, "orig.w") }),
		"map slots differs":            change("slots", func(m *mapLayout) { m.MaxEntries++ }),
		"map settings differs":         change("settings", func(m *mapLayout) { m.Type = uint32(ebpf.Hash) }),
		"no field opened of 8 bytes":   change("decisions", func(m *mapLayout) { rename(m, "opened") }),
		"no field own of 1 bytes":      change("decisions", func(m *mapLayout) { rename(m, "own") }),
		"map cells differs":            change("cells", func(m *mapLayout) { m.MaxEntries /= 2 }),
		"in form 99":                   func(l *description) { l.Form = 99 },
		"REASON_SERVICE of enum reason": func(l *description) {
			l.Enums = map[string]map[string]int64{"reason": {"REASON_SERVICE": 77}}
		},
	} {
		from := *own
		from.ABI, from.Maps = foreignABI, maps.Clone(own.Maps)
		f(&from)
		if _, err := plan(&from, own); !errors.Is(err, ErrABI) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if m, err := plan(own, own); err != nil || !slices.Equal(m.moved, []string{instancePin}) {
		t.Errorf("the same layout: %+v, %v", m, err)
	}
}

// TestMoveFromStored: a build without cells is taken over from, and refuses to take over.
func TestMoveFromStored(t *testing.T) {
	own := ownDescription(t)
	stored := *own
	stored.ABI, stored.Form, stored.Maps = foreignABI, layoutFormStored, maps.Clone(own.Maps)
	delete(stored.Maps, "cells")
	delete(stored.Maps, "sent_by_cell")
	delete(stored.Maps, "sent_buckets")
	m, err := plan(&stored, own)
	if err != nil {
		t.Fatal(err)
	}
	if !m.creates("cells") || !m.creates("sent_by_cell") || !m.creates("sent_buckets") || m.hasCells() || m.bits()&bpf.MovesCells != 0 {
		t.Errorf("moved: %v", m.moved)
	}
	if _, err := plan(own, &stored); !errors.Is(err, ErrABI) || !strings.Contains(err.Error(), "in form 2") {
		t.Errorf("back: %v", err)
	}
}

func rename(m *mapLayout, name string) {
	for n := range m.Value {
		if m.Value[n].Name == name {
			m.Value[n].Name += "_before"
		}
	}
}

// TestTranslate: fields go by their names; numbers that got wider or narrower keep what
// they can; what only one side knows is left out, and begins as zero.
func TestTranslate(t *testing.T) {
	from := []field{{"a", 0, 4}, {"gone", 4, 4}, {"b.x", 8, 2}, {"zero", 10, 6}, {"c", 16, 8}}
	to := []field{{"new", 0, 8}, {"c", 8, 4}, {"b.x", 12, 4}, {"zero", 16, 4}, {"a", 20, 4}}
	raw := []byte{1, 2, 3, 4, 9, 9, 9, 9, 5, 6, 8, 8, 8, 8, 8, 8, 11, 12, 13, 14, 0, 0, 0, 0}
	want := []byte{0, 0, 0, 0, 0, 0, 0, 0, 11, 12, 13, 14, 5, 6, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4}
	if diff := cmp.Diff(want, translate(spansOf(from, to), raw, 24)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestDescription is written and read again.
func TestDescription(t *testing.T) {
	own := ownDescription(t)
	for _, name := range []string{"opened", "key.source.w", "orig_port", "own"} {
		if _, ok := find(own.Maps["decisions"].Value, name); !ok {
			t.Errorf("what is stored with a socket has no %s: %v", name, own.Maps["decisions"].Value)
		}
	}
	for name, m := range own.Maps {
		if len(m.Value) == 0 && m.ValueSize > 0 && m.Type != uint32(ebpf.SockMap) {
			t.Errorf("map %s is described by nothing", name)
		}
	}
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	got, err := readLayouts(d.dir.pin(layoutsPin))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(own, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// storedAs is a type of some size: the kernel wants one of what is stored with sockets.
func storedAs(spec *ebpf.MapSpec, size uint32) btf.Type {
	s, ok := spec.Value.(*btf.Struct)
	if !ok {
		return nil
	}
	return &btf.Struct{Name: s.Name, Size: size}
}

// canceled is a context that is done.
func canceled(t testing.TB) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

// TestCarryLoads: the programs that know two layouts are good for the verifier, with no
// more capabilities than always.
func TestCarryLoads(t *testing.T) {
	testutil.CheckLeaks(t)
	testutil.RequireRoot(t)
	from := foreign(t)
	for _, how := range []again{0, goesOn, goesBack} {
		err := withCaps(func() error {
			return loadCarrier(&move{from: from, to: ownDescription(t), moved: slices.Sorted(maps.Keys(manners)), again: how})
		},
			unix.CAP_BPF, unix.CAP_NET_ADMIN)
		if err != nil {
			t.Fatalf("%d: %+v", how, err)
		}
	}
}

func loadCarrier(m *move) error {
	specs, err := bpf.Specs()
	if err != nil {
		return err
	}
	d := newDatapath(Options{Log: slog.New(slog.DiscardHandler)})
	d.moving.Store(m)
	m.old, d.moved = map[string]*ebpf.Map{}, m
	for name, of := range formerMaps {
		former := specs[0].Maps[name].Copy()
		former.ValueSize = m.from.Maps[of].ValueSize
		former.Value = storedAs(former, former.ValueSize)
		if m.old[of], err = ebpf.NewMap(former); err != nil {
			return errors.Join(err, d.Close())
		}
	}
	return errors.Join(d.load(specs, map[string]*ebpf.Map{}), d.Close())
}
