package loader

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"golang.org/x/sys/unix"
)

// The counts that hooks of both layouts add to: see move_hot.go.

// sums are the counts in the layout before.
type sums struct {
	state, endpoints []byte // mapped
	endpointSize     int
	mine             []byte // our endpoints, mapped
}

// open maps what is to be moved, and reads it where it has to.
func (s *sums) open(m *move) error {
	var err error
	if m.has("state") {
		l := m.from.Maps["state"]
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
	s.endpoints, s.mine = nil, nil
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

// slotsEnd is what the counter of slots is when it names none.
const slotsEnd = bpf.SlotLast + 1

// beginSums is the first catchUp. While hooks of both layouts are at work, slots are named
// out of free_slots, which both have: old ones may go on with their counter too, and ours
// rests until they have stopped. Where a process was killed on the way, the counter that
// is at work is one of the two, whichever it is.
func (d *Datapath) beginSums(m *move, all map[string]*ebpf.Map) (err error) {
	if m.has("endpoints") {
		l := m.to.Maps["endpoints"]
		if m.sums.mine, err = mapArray(all["endpoints"], l.ValueSize, l.MaxEntries); err != nil {
			return err
		}
	}
	if next := uint32(slotsEnd); m.has("state") && m.again != goesOn {
		if next, err = d.setSlotsAside(m.word("next_slot")); err != nil {
			return err
		}
		if m.again == 0 || next < slotsEnd {
			d.state.nextSlot().Store(slotsEnd)
		}
	}
	return d.catchUp(m)
}

// setSlotsAside takes a block of slots that were never named, and returns the first.
func (d *Datapath) setSlotsAside(next *uint32) (first uint32, err error) {
	first = atomic.LoadUint32(next)
	for first < slotsEnd && !atomic.CompareAndSwapUint32(next, first, min(first+slotBlock, slotsEnd)) {
		first = atomic.LoadUint32(next)
	}
	for n := first; n < min(first+slotBlock, slotsEnd); n++ {
		if err := d.maps.FreeSlots.Put(nil, n); err != nil {
			return first, fmt.Errorf("free slot %d: %w", n, err)
		}
	}
	return first, nil
}

// catchUp adds what the counts of the layout before have grown by since the last time.
// What it reads in the middle of a hook's write it reads again the next time, so that
// in the end nothing is missing. What the hooks know of an endpoint's health is taken
// over where the new hooks know nothing newer.
func (d *Datapath) catchUp(m *move) error {
	if m.has("state") {
		const name = "state"
		is := slices.Clone(m.sums.state[:m.from.Maps[name].ValueSize])
		d.state.live().Add(valueAs[bpf.State](m.value(name, is)).Live - valueAs[bpf.State](m.seen.ours(m, name, m.seen.state)).Live)
		copy(m.seen.state, m.seen.theirs(m, name, is))
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

func (d *Datapath) endpointsCatchUp(m *move) {
	const name = "endpoints"
	s, size, seenSize := &m.sums, m.sums.endpointSize, m.seen.endpointSize
	zeros := make([]byte, max(size, seenSize))
	for n := range min(len(s.endpoints)/size, len(s.mine)/endpointSize, len(m.seen.endpoints)/seenSize) {
		is, seen := s.endpoints[n*size:][:size], m.seen.endpoints[n*seenSize:][:seenSize]
		if bytes.Equal(is, zeros[:size]) && bytes.Equal(seen, zeros[:seenSize]) {
			continue
		}
		is = slices.Clone(is)
		now := m.seen.theirs(m, name, is)
		if bytes.HasPrefix(seen, now) {
			continue
		}
		mine := (*endpoint)(unsafe.Pointer(&s.mine[n*endpointSize]))
		mine.catchUp(valueAs[bpf.Endpoint](m.seen.ours(m, name, seen)), valueAs[bpf.Endpoint](m.value(name, is)))
		copy(seen, now)
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
	const name = "usage_by_group"
	var id uint64
	var raw []byte
	it := m.old[name].Iterate()
	for it.Next(&id, &raw) {
		before, now := m.seen.usage[id], m.seen.theirs(m, name, raw)
		if bytes.Equal(now, before) {
			continue
		}
		if before == nil {
			before = make([]byte, len(now))
		}
		was, is := valueAs[bpf.Usage](m.seen.ours(m, name, before)), valueAs[bpf.Usage](m.value(name, raw))
		q := bpf.Move{Group: id, Slots: is.Slots - was.Slots, Conns: is.Conns - was.Conns, EventsLost: is.EventsLost - was.EventsLost}
		if _, err := d.askMove(bpf.ProgAddUsage, q, 0); err != nil {
			return err
		}
		if err := m.seen.setUsage(id, slices.Clone(now)); err != nil {
			return err
		}
	}
	return it.Err()
}
