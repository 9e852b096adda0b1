package loader

import (
	"errors"
	"slices"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
)

// The entries that hooks of both layouts read and write, each in one place: see move_hot.go.

func (m *move) slot(raw []byte) bpf.Slot { return valueAs[bpf.Slot](m.value("slots", raw)) }

// copySlots copies the slots that the new map has not.
func (d *Datapath) copySlots(m *move) error {
	all := map[uint32]bpf.Slot{}
	err := eachValue(m.old["slots"], func(n uint32, raw []byte) error {
		var is bpf.Slot
		if isZero(raw) {
			return nil
		}
		v := m.slot(raw)
		if v.State == bpf.SlotFree {
			return nil
		}
		if err := d.maps.Slots.Lookup(n, &is); err != nil || is.State != bpf.SlotFree {
			return err
		}
		all[n] = v
		return nil
	})
	if err != nil {
		return err
	}
	return d.fillSlots(all)
}

// clearSlots has nobody find a slot of the layout before that is free by now.
func (m *move) clearSlots() error {
	none := make([]byte, m.from.Maps["slots"].ValueSize)
	return eachValue(m.old["slots"], func(n uint32, raw []byte) error {
		if isZero(raw) {
			return nil
		}
		return m.old["slots"].Put(n, none)
	})
}

func (m *move) slotBefore(n uint32) (bpf.Slot, error) {
	var raw []byte
	if err := m.old["slots"].Lookup(n, &raw); err != nil {
		return bpf.Slot{}, err
	}
	return m.slot(raw), nil
}

// slot reads a slot, whichever layout it is in.
func (d *Datapath) slot(n uint32) (s bpf.Slot, err error) {
	m := d.moving.Load()
	err = d.maps.Slots.Lookup(n, &s)
	if err != nil || s.State != bpf.SlotFree || !m.has("slots") {
		return s, err
	}
	if s, err = m.slotBefore(n); err == nil && s.State == bpf.SlotFree {
		err = d.maps.Slots.Lookup(n, &s) // copied between the two
	}
	return s, err
}

// putSlot writes a slot, also for hooks of the layout before. Those first: see clearSlots.
func (d *Datapath) putSlot(n uint32, s bpf.Slot) error {
	if m := d.moving.Load(); m.has("slots") {
		from, to := m.from.Maps["slots"], m.to.Maps["slots"]
		raw := (*[unsafe.Sizeof(s)]byte)(unsafe.Pointer(&s))[:]
		if err := m.old["slots"].Put(n, translate(spansOf(to.Value, from.Value), raw, from.ValueSize)); err != nil {
			return err
		}
	}
	return d.maps.Slots.Put(n, s)
}

// moveLive takes one of the two steps of pl_move_live for all open connections: they are
// copied, or what is left is removed. It tells how many are still there, whose copies
// had no room.
func (d *Datapath) moveLive(m *move, last uint32) (left int, err error) {
	for range 10 * moveTries {
		var keys []bpf.LiveKey
		var k bpf.LiveKey
		var raw []byte
		it := m.old["live"].Iterate()
		for it.Next(&k, &raw) {
			keys = append(keys, k)
		}
		whole := it.Err() == nil
		if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
			return 0, err
		}
		left = 0
		for _, k := range keys {
			q := bpf.Move{Own: k.Source, Peer: k.Slot, OwnPort: k.SourcePort, PeerPort: k.SlotPort, Last: last}
			did, err := d.askMove(bpf.ProgMoveLive, q, 0)
			if err != nil {
				return 0, err
			}
			if !did {
				left++ // or it has ended: then it is not there the next time
			}
		}
		// Hooks delete some meanwhile, and add none: an interrupted list is shorter the
		// next time.
		if whole && (left == 0 || last == 0) {
			break
		}
	}
	return left, nil
}

// copyDeparted copies connections that are closed and perhaps not accepted yet.
func (m *move) copyDeparted(to *ebpf.Map) error {
	return m.eachDeparted(func(k bpf.LiveKey, raw []byte) error {
		err := to.Update(k, m.value("departed", raw), ebpf.UpdateNoExist)
		if errors.Is(err, ebpf.ErrKeyExist) {
			return nil
		}
		return err
	})
}

// clearDeparted deletes them; sockops does too, when the address is used again.
func (m *move) clearDeparted() error {
	return m.eachDeparted(func(k bpf.LiveKey, _ []byte) error {
		if err := m.old["departed"].Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		return nil
	})
}

func (m *move) eachDeparted(f func(bpf.LiveKey, []byte) error) error {
	var k bpf.LiveKey
	var raw []byte
	all := map[bpf.LiveKey][]byte{}
	it := m.old["departed"].Iterate()
	for it.Next(&k, &raw) {
		all[k] = slices.Clone(raw)
	}
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return err
	}
	for k, raw := range all {
		if err := f(k, raw); err != nil {
			return err
		}
	}
	return nil
}

// lookupBefore is [lookupLive] for what is in the layout before, or was until now.
func (d *Datapath) lookupBefore(m *move, key bpf.LiveKey) (l bpf.Live, ok bool) {
	if l, ok = m.liveBefore("live", key); ok {
		return l, true
	}
	if l, ok = lookupLive(d.liveFD, key); ok {
		return l, true
	}
	return m.liveBefore("departed", key)
}

func (m *move) liveBefore(name string, key bpf.LiveKey) (l bpf.Live, ok bool) {
	var raw []byte
	if m.old[name].Lookup(key, &raw) != nil {
		return l, false
	}
	return valueAs[bpf.Live](m.value(name, raw)), true
}

// admitBefore admits a canary for hooks of the layout before.
func (m *move) admitBefore(key bpf.LiveKey, l bpf.Live) error {
	if !m.has("live") {
		return nil
	}
	from, to := m.from.Maps["live"], m.to.Maps["live"]
	raw := (*[unsafe.Sizeof(l)]byte)(unsafe.Pointer(&l))[:]
	return m.old["live"].Put(key, translate(spansOf(to.Value, from.Value), raw, from.ValueSize))
}

func (m *move) forgetBefore(key bpf.LiveKey) error {
	if !m.has("live") {
		return nil
	}
	if err := m.old["live"].Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	return nil
}
