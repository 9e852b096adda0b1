package loader

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/pillion-project/pillion/bpf"
	"golang.org/x/sys/unix"
)

// This file moves what hooks write to all the time, while hooks of both layouts are at
// work for a moment.
//
//   - live and departed: an entry is in one place. New hooks that find none in the new
//     map read and write the former one where it is (bpf/include/former.h), and what
//     sockops enters is in the new one alone: lookup and hold, which read it, are
//     swapped before. When no old hook is left, pl_move_live moves each entry.
//   - slots: the same, but that only connect writes them, which is swapped last; what it
//     has named by then is copied in the end.
//   - state, endpoints, usage_by_group are counts: what the old ones have grown by is
//     added, again and again, and the last time when no old hook is left. Meanwhile a
//     count may be below zero, which hooks take for none. See catchUp.

// hotFields are what both layouts must have of these maps, with these sizes: what hooks
// use where it is.
var hotFields = map[string]map[string]uint32{
	"live":     {"cookie": 8, "hold": 1, "worker": 1, "canary": 1, "orig.w": 16, "seen.w": 16},
	"departed": {"cookie": 8},
	"slots":    {"state": 4, "orig.w": 16},
	"state":    {"next_slot": 4, "live": 4, "owner": 4},
}

// checkHot fails with [ErrABI] when hooks could not use what they find in another layout.
func (m *move) checkHot() error {
	for _, name := range m.moved {
		from, to := m.from.Maps[name], m.to.Maps[name]
		for field, size := range hotFields[name] {
			for _, l := range []*mapLayout{&from, &to} {
				if f, ok := find(l.Value, field); !ok || f.Size != size {
					return fmt.Errorf("%w: map %s has no field %s of %d bytes", ErrABI, name, field, size)
				}
			}
		}
		same := from.KeySize == to.KeySize && slices.Equal(from.Key, to.Key)
		switch manners[name] {
		case mannerLive:
			theirs := m.from.Maps["live"]
			same = same && from.ValueSize == theirs.ValueSize && slices.Equal(from.Value, theirs.Value)
		case mannerSlots:
			same = same && from.MaxEntries == to.MaxEntries // an address says which
		case mannerSums:
			same = same && from.Flags == to.Flags // mapped into memory, or not
		default:
			continue
		}
		if !same {
			return fmt.Errorf("%w: map %s differs from ABI %d to %d in more than its fields, and cannot be moved while hooks use it",
				ErrABI, name, m.from.ABI, m.to.ABI)
		}
	}
	return nil
}

// bits are what the hooks are told: PL_MOVES_*.
func (m *move) bits() (bits uint32) {
	for name, bit := range map[string]uint32{
		"decisions": bpf.MovesSockets, "live": bpf.MovesLive, "slots": bpf.MovesSlots,
		"state": bpf.MovesCounts, "endpoints": bpf.MovesCounts, "usage_by_group": bpf.MovesCounts,
	} {
		if m.has(name) {
			bits |= bit
		}
	}
	return bits
}

// bodies are the functions of the hooks that know two layouts.
func (m *move) bodies() map[string]asm.Instructions {
	all := map[string]asm.Instructions{}
	if c, ok := m.carrier(); ok {
		all["carry"], all["wipe"] = c.carry(), c.wipe()
	}
	if m.has("live") {
		c := m.between("live")
		all["carry_live"] = append(c.fill(), asm.Mov.Imm(result, 0), asm.Return())
		for function, field := range map[string]string{
			"former_cookie": "cookie", "former_hold": "hold", "former_worker": "worker",
			"former_canary": "canary", "former_orig": "orig.w", "former_seen": "seen.w",
		} {
			all[function] = fieldAt(c.from, field)
		}
	}
	if m.has("slots") {
		c := m.between("slots")
		all["former_slot_state"], all["former_slot_orig"] = fieldAt(c.from, "state"), fieldAt(c.from, "orig.w")
	}
	return all
}

// sums are the counts in the layout before.
type sums struct {
	state, endpoints []byte // mapped
	endpointSize     int
	mine             []byte // our endpoints, mapped
	// What catchUp has seen last. Of endpoints, up to the last that ever was not zero.
	seenState, seenEndpoints []byte
	seenUsage                map[uint64][]byte
}

// open maps what is to be moved, and reads it where it has to.
func (s *sums) open(m *move) error {
	s.seenUsage = map[uint64][]byte{}
	var err error
	if m.has("state") {
		l := m.from.Maps["state"]
		s.seenState = make([]byte, l.ValueSize)
		if s.state, err = mapArray(m.old["state"], l.ValueSize, 1); err != nil {
			return err
		}
	}
	if !m.has("endpoints") {
		return nil
	}
	l, room := m.from.Maps["endpoints"], m.to.Maps["endpoints"].MaxEntries
	s.endpointSize = elementSize(l.ValueSize)
	if s.endpoints, err = mapArray(m.old["endpoints"], l.ValueSize, l.MaxEntries); err != nil {
		return err
	}
	for i := int(room) * s.endpointSize; i < len(s.endpoints); i++ {
		if s.endpoints[i] != 0 {
			return fmt.Errorf("%w: there is room for %d endpoints, and more are in use", ErrABI, room)
		}
	}
	return nil
}

func (s *sums) close() error {
	if s.state != nil {
		return errors.Join(unix.Munmap(s.state), s.end())
	}
	return s.end()
}

// end forgets what catchUp needs.
func (s *sums) end() error {
	var errs []error
	for _, b := range [][]byte{s.endpoints, s.mine} {
		if b != nil {
			errs = append(errs, unix.Munmap(b))
		}
	}
	s.endpoints, s.mine, s.seenEndpoints, s.seenUsage = nil, nil, nil, nil
	return errors.Join(errs...)
}

// elementSize is how far apart the values of an array are.
func elementSize(value uint32) int { return int(value+7) &^ 7 }

// mapArray maps an array's values. To map them changes nothing.
func mapArray(m *ebpf.Map, value, entries uint32) ([]byte, error) {
	b, err := unix.Mmap(m.FD(), 0, elementSize(value)*int(entries), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", m, err)
	}
	return b, nil
}

// word is a number of the state that old hooks go by.
func (m *move) word(name string) *uint32 {
	l := m.from.Maps["state"]
	f, _ := find(l.Value, name)
	return (*uint32)(unsafe.Pointer(&m.sums.state[f.At]))
}

// disown is [sharedState.disown], also for hooks of the layout before.
func (d *Datapath) disown() {
	d.state.disown()
	if m := d.moving.Load(); m.has("state") {
		atomic.StoreUint32(m.word("owner"), 0)
	}
}

// slotBlock is how many slots there are, beside those that were retired, for what hooks of
// both layouts name meanwhile: milliseconds in a take-over, seconds in a start that waits
// for its sources. Who needs more has REASON_NO_SLOT until the move is over.
const slotBlock = 4096

// beginSums is the first catchUp. While hooks of both layouts are at work, slots are named
// out of free_slots, which both have: old ones may go on with their counter too.
func (d *Datapath) beginSums(m *move, all map[string]*ebpf.Map) (err error) {
	if m.has("endpoints") {
		l := m.to.Maps["endpoints"]
		if m.sums.mine, err = mapArray(all["endpoints"], l.ValueSize, l.MaxEntries); err != nil {
			return err
		}
	}
	if m.has("state") {
		next, end := m.word("next_slot"), uint32(bpf.SlotLast+1)
		first := atomic.LoadUint32(next)
		for first < end && !atomic.CompareAndSwapUint32(next, first, min(first+slotBlock, end)) {
			first = atomic.LoadUint32(next)
		}
		for n := first; n < min(first+slotBlock, end); n++ {
			if err := d.maps.FreeSlots.Put(nil, n); err != nil {
				return fmt.Errorf("free slot %d: %w", n, err)
			}
		}
		d.state.nextSlot().Store(end)
	}
	return d.catchUp(m)
}

// catchUp adds what the counts of the layout before have grown by since the last time.
// What it reads in the middle of a hook's write it reads again the next time, so that
// in the end nothing is missing. What the hooks know of an endpoint's health is taken
// over where the new hooks know nothing newer.
func (d *Datapath) catchUp(m *move) error {
	if m.has("state") {
		s := &m.sums
		is := slices.Clone(s.state[:len(s.seenState)])
		was := s.seenState
		s.seenState = is
		d.state.live().Add(m.state(is).Live - m.state(was).Live)
	}
	if m.has("endpoints") {
		d.endpointsCatchUp(m)
	}
	if m.has("usage_by_group") {
		if err := d.usageCatchesUp(m); err != nil {
			return fmt.Errorf("move map usage_by_group: %w", err)
		}
	}
	return nil
}

func (m *move) state(raw []byte) (v bpf.State) {
	copy((*[unsafe.Sizeof(v)]byte)(unsafe.Pointer(&v))[:], m.value("state", raw))
	return v
}

func (m *move) endpoint(raw []byte) (v bpf.Endpoint) {
	copy((*[unsafe.Sizeof(v)]byte)(unsafe.Pointer(&v))[:], m.value("endpoints", raw))
	return v
}

func (m *move) usage(raw []byte) (v bpf.Usage) {
	copy((*[unsafe.Sizeof(v)]byte)(unsafe.Pointer(&v))[:], m.value("usage_by_group", raw))
	return v
}

func (m *move) slot(raw []byte) (v bpf.Slot) {
	copy((*[unsafe.Sizeof(v)]byte)(unsafe.Pointer(&v))[:], m.value("slots", raw))
	return v
}

func (d *Datapath) endpointsCatchUp(m *move) {
	s := &m.sums
	size := s.endpointSize
	for at := 0; at < min(len(s.endpoints), len(s.mine)/endpointSize*size); at += size {
		is := s.endpoints[at : at+size]
		if at >= len(s.seenEndpoints) {
			if isZero(is) {
				continue
			}
			s.seenEndpoints = append(s.seenEndpoints, make([]byte, at+size-len(s.seenEndpoints))...)
		}
		was := s.seenEndpoints[at : at+size]
		if slices.Equal(is, was) {
			continue
		}
		is = slices.Clone(is)
		mine := (*endpoint)(unsafe.Pointer(&s.mine[at/size*endpointSize]))
		mine.catchUp(m.endpoint(was), m.endpoint(is))
		copy(was, is)
	}
}

// catchUp adds what became of an endpoint: what it was, and what it is.
func (e *endpoint) catchUp(was, is bpf.Endpoint) {
	e.live().Add(is.Live - was.Live)
	atomic.AddUint64(&e.Connects, is.Connects-was.Connects)
	atomic.AddUint64(&e.Failed, is.Failed-was.Failed)
	atomic.AddUint32(&e.Ejections, is.Ejections-was.Ejections)
	// It fails where the new hooks know better.
	atomic.CompareAndSwapUint32(&e.Failures, was.Failures, is.Failures)
	atomic.CompareAndSwapUint64(&e.Until, was.Until, is.Until)
	// round, down and last are in one word.
	word := (*uint32)(unsafe.Pointer(&e.Round))
	before, now := *(*uint32)(unsafe.Pointer(&was.Round)), *(*uint32)(unsafe.Pointer(&is.Round))
	for {
		v := atomic.LoadUint32(word)
		next := v
		for _, mask := range []uint32{0xffff, 0xff << downShift, ^uint32(0xffff | 0xff<<downShift)} {
			if v&mask == before&mask {
				next = next&^mask | now&mask
			}
		}
		if next == v || atomic.CompareAndSwapUint32(word, v, next) {
			return
		}
	}
}

func (d *Datapath) usageCatchesUp(m *move) error {
	var id uint64
	var raw []byte
	it := m.old["usage_by_group"].Iterate()
	for it.Next(&id, &raw) {
		before := m.sums.seenUsage[id]
		if slices.Equal(raw, before) {
			continue
		}
		if before == nil {
			before = make([]byte, len(raw))
		}
		was, is := m.usage(before), m.usage(raw)
		q := bpf.Move{Group: id, Slots: is.Slots - was.Slots, Conns: is.Conns - was.Conns, EventsLost: is.EventsLost - was.EventsLost}
		if _, err := d.askMove(bpf.ProgAddUsage, q, 0); err != nil {
			return err
		}
		m.sums.seenUsage[id] = slices.Clone(raw)
	}
	return it.Err()
}

// endHot has the new maps hold all that hooks write to, when all of them are this build's.
func (d *Datapath) endHot(m *move) error {
	if err := d.catchUp(m); err != nil {
		return err
	}
	if m.has("slots") {
		if err := d.copySlots(m); err != nil {
			return fmt.Errorf("move map slots: %w", err)
		}
	}
	if m.has("live") {
		if _, err := d.moveLive(m, 0); err != nil {
			return fmt.Errorf("move map live: %w", err)
		}
		if err := m.copyDeparted(d.maps.Departed); err != nil {
			return fmt.Errorf("move map departed: %w", err)
		}
	}
	if m.has("state") {
		d.state.nextSlot().Store(atomic.LoadUint32(m.word("next_slot")))
	}
	return m.sums.end()
}

// clearHot leaves nothing in the layout before: the hooks look there still, and what has
// ended must not be found. Those that have found something there have read and written
// it by then.
func (d *Datapath) clearHot(m *move) error {
	if !m.has("slots") && !m.has("live") {
		return nil
	}
	waitForHooks()
	if m.has("slots") {
		if err := m.clearSlots(); err != nil {
			return fmt.Errorf("move map slots: %w", err)
		}
	}
	if !m.has("live") {
		return nil
	}
	left, err := d.moveLive(m, 1)
	if err == nil && left > 0 {
		// Its hooks go on with these; the next process would not know them.
		d.options.Log.Warn("no room for all open connections in another layout of maps", "left", left)
	}
	if err == nil {
		// Who found an entry in the former live left one in the former departed.
		err = m.copyDeparted(d.maps.Departed)
	}
	if err == nil {
		err = m.clearDeparted()
	}
	if err != nil {
		return fmt.Errorf("move map live: %w", err)
	}
	return nil
}

// copySlots copies the slots that the new map has not: an entry is there when its state
// is, which therefore comes last.
func (d *Datapath) copySlots(m *move) error {
	return eachValue(m.old["slots"], func(n uint32, raw []byte) error {
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
		state := v.State
		v.State = bpf.SlotFree
		if err := d.maps.Slots.Put(n, v); err != nil {
			return err
		}
		v.State = state
		return d.maps.Slots.Put(n, v)
	})
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
	copy((*[unsafe.Sizeof(l)]byte)(unsafe.Pointer(&l))[:], m.value(name, raw))
	return l, true
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
