package loader

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
)

// Rings of another layout. While hooks are swapped, those of the layout before write to
// its rings, and the new ones to new rings:
//
//   - records of connections are put from the former ring into the new one, translated,
//     before each time that the new one is read, and once more when no hook writes to the
//     former one any more. So who reads knows of one ring, and a process that is killed in
//     between leaves each record in one of the two;
//   - a worker reads both its rings: an answer that is held must not wait.
//
// A process that was killed while it swapped hooks leaves some of its own attached, whose
// maps are pinned as those to come: those are former ones too, until all are swapped again.

// formerRing is a ring that hooks of another layout write to.
type formerRing struct {
	ring  *ebpf.Map
	read  *ringReader
	spans []span
	size  int // of a record there
}

// newFormerRing reads a ring, which it takes over.
func newFormerRing(ring *ebpf.Map, from, to *mapLayout, content string) (*formerRing, error) {
	read, err := mapRing(ring)
	if err != nil {
		return nil, errors.Join(err, ring.Close())
	}
	fields := withPrefix(from.Value, content)
	f := &formerRing{ring: ring, read: read, spans: spansOf(fields, withPrefix(to.Value, content))}
	for _, v := range fields {
		f.size = max(f.size, int(v.At+v.Size))
	}
	return f, nil
}

func (f *formerRing) close() error { return errors.Join(f.read.close(), f.ring.Close()) }

// next returns the next record in this build's layout, which has so many bytes. It is
// not taken away before f.read.advance.
func (f *formerRing) next(size uintptr) ([]byte, bool) {
	for {
		raw, ok := f.read.peek()
		if !ok {
			return nil, false
		}
		// The layout's own padding may follow.
		if len(raw) >= f.size {
			return translate(f.spans, raw, uint32(size)), true
		}
		f.read.advance()
	}
}

// formerMap is a map of another layout, with what describes it.
type formerMap struct {
	m      *ebpf.Map
	layout mapLayout
}

// leftBehind opens the rings of a process that was killed while it moved the instance to
// a layout that nobody goes on with. Its other maps are worth nothing: see makeGood.
func (d *Datapath) leftBehind(was *description) error {
	d.former.killed = true
	for name := range contentRings {
		m, err := ebpf.LoadPinnedMap(d.dir.pin(name+nextSuffix), nil)
		if errors.Is(err, os.ErrNotExist) {
			continue // it was not moved, or not pinned yet: then no hook has it
		}
		if err != nil {
			return fmt.Errorf("open map %s: %w", name+nextSuffix, err)
		}
		d.former.left[name] = append(d.former.left[name], formerMap{m: m, layout: was.Maps[name]})
	}
	return nil
}

// contentRings are the maps that are rings, or consist of rings, and what the records are.
var contentRings = map[string]string{"events": "conn_event", "held": "held"}

// formerHooks is what hooks of other layouts go on writing to while they are swapped.
type formerHooks struct {
	left   map[string][]formerMap // by name
	killed bool                   // a process was, while it moved the instance

	mu     sync.Mutex // orders readers of rings
	rings  []*formerRing
	failed bool // the last time that they were read
	tell   *ebpf.Program
}

// letGo closes what was left behind, when no hook uses it.
func (f *formerHooks) letGo() error {
	var errs []error
	for _, all := range f.left {
		for _, m := range all {
			errs = append(errs, m.m.Close())
		}
	}
	clear(f.left)
	return errors.Join(errs...)
}

func (f *formerHooks) close() error {
	errs := []error{f.letGo()}
	for _, r := range f.rings {
		errs = append(errs, r.close())
	}
	f.rings = nil
	return errors.Join(append(errs, f.tell.Close())...)
}

// loadTell loads the program that puts records into the ring of this build.
func (d *Datapath) loadTell(m *move) error {
	if !m.has("events") && len(d.former.left["events"]) == 0 {
		return nil
	}
	spec, err := bpf.Former()
	if err != nil {
		return err
	}
	delete(spec.Programs, bpf.ProgRows)
	delete(spec.Maps, bpf.FormerSets)
	delete(spec.Maps, bpf.FormerRows)
	spec.Maps["events"].MaxEntries = d.maps.Events.MaxEntries()
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{"events": d.maps.Events}})
	if err != nil {
		return fmt.Errorf("load the program that writes records: %w", err)
	}
	defer c.Close()
	d.former.tell = c.DetachProgram(bpf.ProgTell)
	return nil
}

// readFormer begins to read the rings of records that this process has now. Nobody else
// reads them any more.
func (d *Datapath) readFormer(m *move) error {
	f := &d.former
	f.mu.Lock()
	defer f.mu.Unlock()
	all := f.left["events"]
	if m.has("events") {
		all = append([]formerMap{{m: m.bulk["events"], layout: m.from.Maps["events"]}}, all...)
	}
	if len(all) == 0 {
		return nil // resumed: nobody knows the layouts
	}
	is := d.layouts.Maps["events"]
	for _, v := range all {
		ring, err := v.m.Clone()
		if err != nil {
			return fmt.Errorf("open ring: %w", err)
		}
		r, err := newFormerRing(ring, &v.layout, &is, contentRings["events"])
		if err != nil {
			return err
		}
		f.rings = append(f.rings, r)
	}
	return nil
}

// GatherEvents has the ring of [Datapath.Events] hold what hooks of the layout before
// have told, and says whether there may be more of that soon. Who reads the ring calls it
// before.
func (d *Datapath) GatherEvents() (again bool) {
	f := &d.former
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.rings) == 0 {
		return false
	}
	_, err := f.gather()
	if err != nil && !f.failed {
		d.options.Log.Error("records of the layout before cannot be read yet", "error", err)
	}
	f.failed = err != nil
	return true
}

// tellBytes is how much of records one test run has room for, beside the packet's own
// needs. Of any size of page: the smallest counts.
const tellBytes = 3200

// gather puts what is in the former rings into the new one, and returns how many records
// there was no room for. The caller has mu.
func (f *formerHooks) gather() (waiting int, err error) {
	for _, r := range f.rings {
		n, err := f.gatherFrom(r)
		if err != nil {
			return 0, err
		}
		waiting += n
	}
	return waiting, nil
}

func (f *formerHooks) gatherFrom(r *formerRing) (waiting int, err error) {
	const size = int(unsafe.Sizeof(bpf.ConnEvent{}))
	for at := r.read.taken(); ; {
		frame := make([]byte, dryRunAt, tellBytes)
		var ends []uint64 // of each record that is in the frame
		for len(frame)+size <= tellBytes {
			raw, next, ok := r.read.after(at)
			if at = next; !ok {
				break
			}
			if len(raw) >= r.size {
				frame, ends = append(frame, translate(r.spans, raw, uint32(size))...), append(ends, next)
			}
		}
		if len(ends) == 0 {
			r.read.take(at)
			return 0, nil
		}
		told, err := f.tell.Run(&ebpf.RunOptions{Data: frame})
		if err != nil {
			return 0, fmt.Errorf("write records: %w", err)
		}
		if told > 0 {
			r.read.take(ends[told-1])
		}
		if int(told) < len(ends) {
			return r.read.count(), nil
		}
	}
}

const (
	// gatherPatience is how long the last records wait for room in the new ring, whose
	// reader comes five times a second.
	gatherPatience = 2 * time.Second
	gatherAgain    = 10 * time.Millisecond
)

// gatherLast is for when no hook writes to the former rings any more. What there is no
// room for is counted as lost, as where a hook finds none.
func (d *Datapath) gatherLast() {
	f := &d.former
	for end := time.Now().Add(gatherPatience); ; time.Sleep(gatherAgain) {
		f.mu.Lock()
		waiting, err := f.gather()
		over := waiting == 0 || err != nil || time.Now().After(end)
		if over {
			waiting = 0
			for _, r := range f.rings {
				waiting += r.read.count() // nobody writes there
				err = errors.Join(err, r.close())
			}
			f.rings = nil
		}
		f.mu.Unlock()
		if err != nil {
			d.options.Log.Error("records of the layout before are lost", "error", err)
		}
		if over && waiting > 0 {
			q := bpf.Move{Counter: bpf.TallyEventsLost, Tally: 1, Add: uint64(waiting)}
			if _, err := d.askMove(bpf.ProgAdd, q, 0); err != nil {
				d.options.Log.Error("cannot count what is lost", "events", waiting, "error", err)
			}
		}
		if over {
			return
		}
	}
}
