package loader

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
)

// mendTries bounds how often open connections are counted: while one comes or goes the
// result is not exact.
const mendTries = 10

// makeGood mends what a process that was killed while it swapped hooks has left, when
// none of those is at work any more. Where nobody goes on with its move, what they have
// counted, and which slots they have named, is in maps that are gone: how many connections
// are open live says; of slots the way back is missing. Where somebody does, it had perhaps
// added to a count, and was killed before it had noted that.
func (d *Datapath) makeGood() error {
	if err := d.mendSlots(); err != nil {
		return fmt.Errorf("mend map slots: %w", err)
	}
	for try := range mendTries {
		done, err := d.mendOpen(try == mendTries-1)
		if err != nil {
			return fmt.Errorf("mend the counts of open connections: %w", err)
		}
		if done {
			return nil
		}
	}
	d.options.Log.Warn("how many connections are open could not be counted: some that have ended may count still")
	return nil
}

// mendOpen counts the open connections. It changes nothing, and returns false, if one has
// come or gone meanwhile, unless it is the last try.
func (d *Datapath) mendOpen(last bool) (bool, error) {
	before := d.state.live().Load()
	groups := map[uint64]uint64{}
	all := uint32(0)
	var k bpf.LiveKey
	var l bpf.Live
	it := d.maps.Live.Iterate()
	for it.Next(&k, &l) {
		if l.Canary == 0 {
			groups[l.Group]++
			all++
		}
	}
	if err := it.Err(); err != nil {
		if errors.Is(err, ebpf.ErrIterationAborted) {
			return false, nil // what it has counted is not all
		}
		return false, err
	}
	off := map[uint64]uint64{}
	var id uint64
	var u bpf.Usage
	users := d.maps.UsageByGroup.Iterate()
	for users.Next(&id, &u) {
		if n := groups[id] - u.Conns; n != 0 {
			off[id] = n
		}
	}
	if err := users.Err(); err != nil {
		return false, err
	}
	if !last && d.state.live().Load() != before {
		return false, nil
	}
	d.state.live().Add(all - before)
	for id, n := range off {
		if _, err := d.askMove(bpf.ProgAddUsage, bpf.Move{Group: id, Conns: n}, 0); err != nil {
			return false, err
		}
	}
	return true, nil
}

// mendSlots has each address that has a slot be what that resolves to. Hooks write the
// way back first, so what it finds without one is nobody's work of this moment.
func (d *Datapath) mendSlots() error {
	var orig bpf.IPAddr
	var n uint32
	all := map[uint32]bpf.Slot{}
	it := d.maps.SlotByOrig.Iterate()
	for it.Next(&orig, &n) {
		s, err := d.slot(n)
		if err != nil {
			return err
		}
		if s.State == bpf.SlotFree {
			all[n] = bpf.Slot{Orig: orig, Used: uint64(d.monotonic()), State: bpf.SlotNamed}
		}
	}
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return err
	}
	return d.fillSlots(all)
}

// fillSlots fills slots that are free while hooks look at them: one resolves when its
// state says so, which therefore comes last. In between RCU has passed, since neither
// the two stores nor the two loads of a hook keep their order everywhere.
func (d *Datapath) fillSlots(all map[uint32]bpf.Slot) error {
	if len(all) == 0 {
		return nil
	}
	for n, v := range all {
		v.State = bpf.SlotFree
		if err := d.maps.Slots.Put(n, v); err != nil {
			return err
		}
	}
	waitForHooks()
	for n, v := range all {
		var is bpf.Slot
		if err := d.maps.Slots.Lookup(n, &is); err != nil {
			return err
		}
		if is.State != bpf.SlotFree {
			continue // a service has it by now
		}
		if err := d.maps.Slots.Put(n, v); err != nil {
			return err
		}
	}
	return nil
}
