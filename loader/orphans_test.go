package loader

import (
	"net"
	"net/netip"
	"slices"
	"testing"
)

// TestRangeNumber finds the range of every slot.
func TestRangeNumber(t *testing.T) {
	for n := range ranges {
		r := slotRange{number: n}
		for _, slot := range []uint16{0, 9, 65535} {
			if a, b := rangeNumber(r.addr4(slot)), rangeNumber(r.addr6(slot)); a != n || b != n {
				t.Errorf("slot %d of range %d: %d and %d", slot, n, a, b)
			}
		}
	}
}

// TestOrphans: a start removes the slot routes that no instance has, and those
// alone: not of one that runs, of one that has crashed, of one whose pins are in
// another file system, nor where somebody listens.
func TestOrphans(t *testing.T) {
	p, elsewhere := newPlace(t), newPlace(t)
	elsewhere.Pair, elsewhere.scope = p.Pair, p.scope
	// What a sweep from another namespace leaves.
	orphan := func() (r slotRange) {
		t.Helper()
		p.App.Do(t, func() error {
			n, err := openNetwork()
			if err != nil {
				return err
			}
			defer n.close()
			r, err = n.claim(0, func(slotRange) error { return nil })
			return err
		})
		return r
	}
	has := func(r slotRange, want bool, when string) {
		t.Helper()
		for _, prefix := range []netip.Prefix{r.prefix4(), r.prefix6()} {
			if got := slices.Contains(p.routes(t), prefix.String()); got != want {
				t.Errorf("%s: the route to %s is there: %v, want %v", when, prefix, got, want)
			}
		}
	}
	unloaded := func(name string) {
		t.Helper()
		d := p.create(t, name)
		p.unload(t, d)
	}
	first := orphan()
	unloaded("one")
	has(first, false, "nobody has it")

	running := p.create(t, "running")
	p.attach(t, running)
	first = orphan()
	unloaded("two")
	has(first, false, "beside one that runs")
	has(running.slots, true, "one that runs")
	slots := running.slots
	if err := running.Close(); err != nil {
		t.Fatal(err)
	}
	unloaded("three")
	has(slots, true, "one that has crashed")

	first = orphan()
	var ln net.Listener
	p.App.Do(t, func() (err error) {
		ln, err = net.Listen("tcp4", netip.AddrPortFrom(first.addr4(9), 0).String())
		return err
	})
	unloaded("four")
	has(slotRange{number: first.number}, true, "somebody listens on it")
	ln.Close()
	unloaded("five")

	hidden := elsewhere.create(t, "hidden")
	elsewhere.attach(t, hidden)
	if err := hidden.Close(); err != nil {
		t.Fatal(err)
	}
	unloaded("six")
	has(hidden.slots, true, "one whose pins are elsewhere")
	if err := elsewhere.do(t, "hidden", func(o Options) error { return Remove(o.BPFFS, p.root, "hidden") }); err != nil {
		t.Error(err)
	}
	if err := p.do(t, "running", func(o Options) error { return Remove(o.BPFFS, p.root, "running") }); err != nil {
		t.Error(err)
	}
	p.clean(t)
}
