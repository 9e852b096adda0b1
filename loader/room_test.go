package loader

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
)

// lacking are the services for which there was no room.
func lacking(t *testing.T, err, want error) []netip.AddrPort {
	t.Helper()
	short, ok := errors.AsType[*RoomError](err)
	if !ok || !errors.Is(err, want) {
		t.Fatalf("%v, want %v", err, want)
	}
	var all []netip.AddrPort
	for a := range short.Services {
		all = append(all, a)
	}
	slices.SortFunc(all, netip.AddrPort.Compare)
	return all
}

// TestNoRoomForSets: at the limit of sets, a list of other services is in force at
// once, those without a set by on_failure; they get theirs when the ids of the earlier
// ones are free, and a process that begins there is no worse off.
func TestNoRoomForSets(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer func() { p.unload(t, d) }()
	d.sets.nextID = bpf.Sets - 2 // all below are in use
	old := addrPorts("198.51.100.1:80", "198.51.100.2:80")
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{old[0]: setOf(far), old[1]: setOf(far)}))
	d = p.restart(t, d)
	d.sets.freeIDs = nil // so are those
	now := addrPorts("198.51.100.2:80", "198.51.100.3:80", "198.51.100.4:80", "198.51.100.5:80")
	rules := withServices(map[netip.AddrPort]*flow.Set{now[0]: setOf(far), now[1]: setOf(far), now[2]: setOf(far), now[3]: setOf(far)})
	rules.Services[2].Closed = true
	rules.Services[3].Path = flow.PathRelay
	if got := lacking(t, d.SetRules(rules), ErrTooManySets); !slices.Equal(got, now[1:]) {
		t.Errorf("there was no room for %v, want %v", got, now[1:])
	}
	for n, want := range []uint32{bpf.PathDirect, bpf.PathPass, bpf.PathDirect, bpf.PathRelay} {
		if e := entry(t, d, now[n]); uint32(e.Path) != want || (e.Id == noSet) != (n > 0) {
			t.Errorf("%s: %+v, want path %d", now[n], e, want)
		}
	}
	d.sets.grace = 0
	forget(t, d)
	// One id is free: the first that wants it has it.
	if got := lacking(t, d.SetRules(rules), ErrTooManySets); !slices.Equal(got, now[2:]) {
		t.Errorf("then there was no room for %v, want %v", got, now[2:])
	}
	if got := publishedOf(t, d, now[1]); len(got) != 1 || uint32(entry(t, d, now[1]).Path) != bpf.PathDirect {
		t.Errorf("it has room, and %v", got)
	}
	// The list fits: all of it is in force.
	rules.Services = []Service{rules.Services[1], rules.Services[3]}
	_ = d.SetRules(rules) // the one that is gone keeps its id a moment longer
	forget(t, d)
	setRules(t, d, rules)
	for _, a := range []netip.AddrPort{now[1], now[3]} {
		if got := publishedOf(t, d, a); len(got) != 1 {
			t.Errorf("%s: %v", a, got)
		}
	}
}

// TestNoRoomForEndpoints: a service for whose endpoints there is no room keeps those
// that it has, all of them, and does not keep others from theirs.
func TestNoRoomForEndpoints(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer func() { p.unload(t, d) }()
	d.sets.table.next = bpf.Endpoints - 5 // all below are in use
	services := addrPorts("198.51.100.1:80", "198.51.100.2:80", "198.51.100.3:80")
	a := addrPorts("10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80", "10.0.0.5:80", "10.0.0.6:80")
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{services[0]: setOf(a[0]), services[1]: setOf(a[:2]...), services[2]: nil}))
	before := publishedOf(t, d, services[1])
	sets := map[netip.AddrPort]*flow.Set{
		services[0]: setOf(a[:2]...), services[1]: setOf(a...), services[2]: setOf(make([]netip.AddrPort, bpf.SetEndpoints+1)...),
	}
	if got := lacking(t, d.SetEndpoints(sets), ErrTooManyEndpoints); !slices.Equal(got, services[1:]) {
		t.Errorf("there was no room for %v, want %v", got, services[1:])
	}
	if got := publishedOf(t, d, services[0]); len(got) != 2 {
		t.Errorf("who had room has %v", got)
	}
	states, err := d.EndpointStates(services[1])
	if got := publishedOf(t, d, services[1]); err != nil || len(got) != 2 || got[a[0]] != before[a[0]] || len(states) != 2 {
		t.Errorf("who had none has %v, had %v; %v, %v", got, before, states, err)
	}
	if entry(t, d, services[2]).Id != noSet {
		t.Error("a service that has no set points to one")
	}
	// One index is left, and is not lost.
	sets = map[netip.AddrPort]*flow.Set{services[1]: setOf(a[:3]...), services[2]: nil}
	setEndpoints(t, d, sets)
	if got := publishedOf(t, d, services[1]); len(got) != 3 || got[a[1]] != before[a[1]] {
		t.Errorf("with room for one more: %v", got)
	}
}
