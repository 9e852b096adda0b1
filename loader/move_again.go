package loader

import (
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
)

// A process that is killed while it swaps hooks leaves hooks of two layouts, and maps of
// both, in which all that happened since is: those that the instance has, and the ones to
// come, whose pins end in nextSuffix. The next process does not begin anew, but goes on
// with these: to the maps to come, if they are of its layout; or back to those that the
// instance has, if they are, and then the others are the former ones. A process of a third
// layout begins anew, and what happened since is lost but for what move_mend.go makes good.

// again is what becomes of a move that a process that was killed has begun.
type again int

const (
	goesOn   again = iota + 1 // 0: nobody has begun one
	goesBack                  // the other way
)

// done is what is logged in the end.
func (a again) done() string {
	if a == goesBack {
		return "moved back to the layout of maps before"
	}
	return "moved to another layout of maps"
}

// findBegun looks for a move that a process that was killed has begun.
func (d *Datapath) findBegun() error {
	next, err := readLayouts(d.dir.pin(layoutsPin + nextSuffix))
	if err != nil {
		return err
	}
	if next == nil {
		return finishMove(d.dir, false)
	}
	was, err := readLayouts(d.dir.pin(layoutsPin))
	if err != nil {
		return err
	}
	specs, err := bpf.Specs()
	if err != nil {
		return err
	}
	if d.layouts, err = ownLayouts(specs); err != nil {
		return err
	}
	if d.moved = planAgain(d.dir, was, next, d.layouts); d.moved != nil {
		return nil
	}
	if err := d.leftBehind(next); err != nil {
		return err
	}
	return finishMove(d.dir, false)
}

// planAgain is nil unless a move that was begun can be gone on with: it was ready to swap
// hooks, and one of its layouts is own.
func planAgain(dir *dir, was, next, own *description) *move {
	var m *move
	var err error
	switch {
	case was == nil:
		return nil
	case next.same(own):
		if m, err = plan(was, own); err == nil {
			m.again = goesOn
		}
	case was.same(own):
		if m, err = plan(next, own); err == nil {
			m.again = goesBack
		}
	default:
		return nil
	}
	if err != nil || !m.seen.pinned(m, dir) {
		return nil
	}
	names := m.moved
	if m.again == goesOn {
		names = nil
		for name := range own.Maps {
			if m.renews(name) {
				names = append(names, name)
			}
		}
	}
	for _, name := range names {
		if _, err := os.Stat(dir.pin(name + nextSuffix)); err != nil {
			return nil
		}
	}
	return m
}

// same tells whether the maps are the same.
func (l *description) same(o *description) bool {
	if l.ABI != o.ABI || l.Form != o.Form || len(l.Maps) != len(o.Maps) {
		return false
	}
	for name, m := range l.Maps {
		if is, ok := o.Maps[name]; !ok || !m.equal(&is) {
			return false
		}
	}
	return true
}

// formerPin is the pin of the map that hooks of the other layout have.
func (m *move) formerPin(name string) string {
	if m.again == goesBack {
		return name + nextSuffix
	}
	return name
}

// ownPin is the pin of ours.
func (m *move) ownPin(name string) string {
	if m != nil && m.again == goesOn && m.renews(name) {
		return name + nextSuffix
	}
	return name
}

// moveAgain is moveIn where a process that was killed had come further than that.
func (d *Datapath) moveAgain(m *move, all map[string]*ebpf.Map) error {
	if m.has("state") {
		// For the hooks of the other layout too that process is not who listens.
		atomic.StoreUint32(m.word("owner"), 0)
	}
	if err := d.addAllCounts(m); err != nil {
		return err
	}
	if err := d.beginSums(m, all); err != nil {
		return fmt.Errorf("go on with a move: %w", err)
	}
	return nil
}

// valueAs gives a value that is in this build's layout.
func valueAs[T any](raw []byte) (v T) {
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&v)), unsafe.Sizeof(v)), raw)
	return v
}
