package loader

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"golang.org/x/sys/unix"
)

// This file moves an instance from the maps of another layout to those of this build,
// while its hooks are at work: docs/design.md, section 7a. Maps that are the same in
// both are shared, as ever. Of the others there are new ones beside the old ones:
//
//   - what only processes write is copied before the first hook is swapped;
//   - counters too, and what the old hooks have added by the end is added then;
//   - what is stored with sockets is moved by the new hooks, and for sockets at which
//     nothing happens by a test run for each;
//   - for what hooks write to all the time see move_hot.go.

// manner is how a map is moved.
type manner int

const (
	mannerCopy manner = iota + 1
	mannerCount
	mannerStorage
	mannerCells // see cells.go
	mannerLive
	mannerSlots
	mannerSums
	mannerRing // see move_rings.go
	mannerSets // see move_sets.go
	mannerLate // see move_outlived.go
	mannerNew  // it is not: zero means that nothing is known
)

var manners = map[string]manner{
	"settings": mannerCopy, "services": mannerCopy, "deny": mannerCopy, "exclude": mannerCopy, "routes": mannerCopy,
	"own_addrs": mannerCopy, "answered": mannerCopy, "beat": mannerCopy, "endpoint_names": mannerCopy,
	"reasons": mannerCount, "tallies": mannerCount,
	"decisions": mannerStorage, "cells": mannerCells,
	"live": mannerLive, "departed": mannerLive,
	"slots": mannerSlots,
	"state": mannerSums, "endpoints": mannerSums, "usage_by_group": mannerSums,
	"events": mannerRing, "held": mannerRing,
	"sets":      mannerSets,
	"outlived":  mannerLate,
	"not_own":   mannerNew,
	instancePin: mannerCopy,
}

// nextSuffix marks the pins of maps that are to take the place of others. A pin has no
// dot in its name.
const nextSuffix = "_next"

// move is an instance on its way to this build's layout.
type move struct {
	from, to *description
	moved    []string             // names of the maps, sorted
	old      map[string]*ebpf.Map // those of them that the hooks have had,
	bulk     map[string]*ebpf.Map // and of those rings and sets, which end with the move
	sums     sums
	seen     seen
	sets     *formerSets   // nil: they are not moved
	done     chan struct{} // closed when it is
	again    again         // what a process that was killed has begun
}

// plan tells what has to be moved, and fails with [ErrABI] when something cannot be.
func plan(from, to *description) (*move, error) {
	if err := from.agree(to); err != nil {
		return nil, err
	}
	m := &move{from: from, to: to, old: map[string]*ebpf.Map{}, bulk: map[string]*ebpf.Map{}, done: make(chan struct{})}
	for _, name := range slices.Sorted(maps.Keys(to.Maps)) {
		was, known := from.Maps[name]
		is := to.Maps[name]
		switch {
		case !known:
			continue // a new one, which begins empty
		case name != instancePin && was.equal(&is): // the record says the ABI
			continue
		case manners[name] == 0 || was.Type != is.Type:
			return nil, fmt.Errorf("%w: map %s differs from ABI %d to %d, and cannot be moved while hooks use it",
				ErrABI, name, from.ABI, to.ABI)
		}
		m.moved = append(m.moved, name)
	}
	// They have the same entries, and the hooks put those of one into the other.
	if m.has("live") != m.has("departed") {
		m.moved = slices.Compact(slices.Sorted(slices.Values(append(m.moved, "live", "departed"))))
	}
	if c, ok := m.carrier(); ok {
		if err := c.check(); err != nil {
			return nil, err
		}
	}
	if err := m.checkCells(); err != nil {
		return nil, err
	}
	if m.has("sets") {
		if err := m.checkSets(); err != nil {
			return nil, err
		}
	}
	return m, m.checkHot()
}

// carrier is for what is stored with sockets, if that has another layout.
func (m *move) carrier() (carrier, bool) {
	if !m.has("decisions") {
		return carrier{}, false
	}
	return m.between("decisions"), true
}

// between is for entries of a map.
func (m *move) between(name string) carrier {
	from, to := m.from.Maps[name], m.to.Maps[name]
	return carrier{from: &from, to: &to}
}

// has tells whether a map is to be moved.
func (m *move) has(name string) bool { return m != nil && slices.Contains(m.moved, name) }

// creates tells whether there is to be a new map of this name.
func (m *move) creates(name string) bool { return m.renews(name) && m.again == 0 }

// renews tells whether the map of this name is to be another one than the hooks have had.
func (m *move) renews(name string) bool {
	if m == nil || m.again == goesBack {
		return false
	}
	_, known := m.from.Maps[name]
	return !known || m.has(name)
}

// open opens what is to be moved.
func (m *move) open(dir *dir) error {
	for _, name := range m.moved {
		old, err := ebpf.LoadPinnedMap(dir.pin(m.formerPin(name)), nil)
		if err != nil {
			return fmt.Errorf("open map %s: %w", name, err)
		}
		if how := manners[name]; how == mannerRing || how == mannerSets {
			m.bulk[name] = old
		} else {
			m.old[name] = old
		}
		if was := m.from.Maps[name]; old.ValueSize() != was.ValueSize || old.KeySize() != was.KeySize {
			return fmt.Errorf("%w: map %s is not what its description says", ErrABI, name)
		}
	}
	if err := m.seen.open(m, dir); err != nil {
		return err
	}
	return m.sums.open(m)
}

// load loads what only a move needs.
func (m *move) load() (err error) {
	if m.has("sets") {
		m.sets, err = m.loadRows()
	}
	return err
}

func (m *move) close() error {
	if m == nil {
		return nil
	}
	errs := []error{m.sums.close(), m.seen.close(), m.closeBulk()}
	for _, old := range m.old {
		errs = append(errs, old.Close())
	}
	return errors.Join(errs...)
}

// closeBulk frees what takes memory, when no hook uses it.
func (m *move) closeBulk() error {
	errs := []error{m.sets.close()}
	m.sets = nil
	for _, old := range m.bulk {
		errs = append(errs, old.Close())
	}
	clear(m.bulk)
	return errors.Join(errs...)
}

// record reads the record of an instance of another layout.
func (m *move) record() (bpf.Instance, error) {
	var i bpf.Instance
	var raw []byte
	if err := m.old[instancePin].Lookup(uint32(0), &raw); err != nil {
		return i, fmt.Errorf("read map %s: %w", instancePin, err)
	}
	copy((*[unsafe.Sizeof(i)]byte)(unsafe.Pointer(&i))[:], m.value(instancePin, raw))
	return i, nil
}

// value translates a value of a map.
func (m *move) value(name string, raw []byte) []byte {
	from, to := m.from.Maps[name], m.to.Maps[name]
	return translate(spansOf(from.Value, to.Value), raw, to.ValueSize)
}

// moveIn fills the new maps, and pins them beside the old ones. Nothing uses them yet.
// The instance must be this process's.
func (d *Datapath) moveIn() error {
	m := d.moving.Load()
	if m == nil {
		if _, err := os.Stat(d.dir.pin(layoutsPin)); errors.Is(err, os.ErrNotExist) {
			return d.describe(layoutsPin) // an older build made the instance
		}
		return nil
	}
	all := d.mapsByName()
	if m.again != 0 {
		return d.moveAgain(m, all)
	}
	if err := finishMove(d.dir, false); err != nil {
		return err
	}
	for _, name := range m.moved {
		var err error
		switch manners[name] {
		case mannerCopy:
			err = m.copy(name, all[name])
		case mannerCount:
			err = m.copyCounts(name, all[name])
		case mannerStorage, mannerCells, mannerRing, mannerLate:
			// Each socket by itself; what is in rings is read from them; when
			// sockops is swapped.
		case mannerNew:
			// Nothing is known yet.
		case mannerLive:
			// At the end, each entry by itself.
		case mannerSlots:
			err = d.copySlots(m)
		case mannerSums:
			// See catchUp.
		case mannerSets:
			err = d.moveSets(m)
		}
		if err != nil {
			return fmt.Errorf("move map %s: %w", name, err)
		}
	}
	if err := d.beginSums(m, all); err != nil {
		return err
	}
	d.instance.Abi = bpf.ABI
	if err := d.putInstance(); err != nil {
		return err
	}
	// While this one is there, the others are worth nothing: see finishMove.
	if err := d.describe(layoutsPin + nextSuffix); err != nil {
		return err
	}
	if err := m.seen.pin(d.dir); err != nil {
		return err
	}
	for name, n := range all {
		if !m.creates(name) {
			continue
		}
		if err := n.Pin(d.dir.pin(name + nextSuffix)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	return nil
}

// copy copies a map, entry by entry.
func (m *move) copy(name string, to *ebpf.Map) error {
	from, into := m.from.Maps[name], m.to.Maps[name]
	keys, values := spansOf(from.Key, into.Key), spansOf(from.Value, into.Value)
	if len(from.Key) == 0 || from.KeySize == into.KeySize && slices.Equal(from.Key, into.Key) {
		keys = []span{{size: from.KeySize}}
	}
	var key, value []byte
	if into.Type == uint32(ebpf.Array) {
		return eachValue(m.old[name], func(n uint32, value []byte) error {
			if n >= into.MaxEntries || isZero(value) {
				return nil // as it begins
			}
			return to.Put(n, translate(values, value, into.ValueSize))
		})
	}
	it := m.old[name].Iterate()
	for it.Next(&key, &value) {
		if err := to.Put(translate(keys, key, into.KeySize), translate(values, value, into.ValueSize)); err != nil {
			return err
		}
	}
	return it.Err()
}

// manyValues is how many values of an array are read at once.
const manyValues = 4096

// eachValue calls f with the values of an array, which are valid until it returns.
func eachValue(m *ebpf.Map, f func(n uint32, value []byte) error) error {
	size := int(m.ValueSize())
	var cursor ebpf.MapBatchCursor
	keys := make([]uint32, manyValues)
	values := reflect.MakeSlice(reflect.SliceOf(reflect.ArrayOf(size, reflect.TypeFor[byte]())), manyValues, manyValues)
	raw := unsafe.Slice((*byte)(values.UnsafePointer()), manyValues*size)
	for done := false; !done; {
		count, err := m.BatchLookup(&cursor, keys, values.Interface(), nil)
		if done = errors.Is(err, ebpf.ErrKeyNotExist); err != nil && !done {
			return err
		}
		for i, n := range keys[:count] {
			if err := f(n, raw[i*size:(i+1)*size]); err != nil {
				return err
			}
		}
	}
	return nil
}

func isZero(value []byte) bool {
	return !slices.ContainsFunc(value, func(b byte) bool { return b != 0 })
}

// moveOut ends a move when every hook is this build's: it moves what the others have
// left, and makes the new maps the instance's.
func (d *Datapath) moveOut() error {
	m := d.moving.Load()
	if m == nil && !d.former.killed {
		return nil
	}
	waitForHooks()
	d.gatherLast()
	if err := d.former.letGo(); err != nil {
		return err
	}
	if m == nil {
		return d.makeGood()
	}
	if err := d.copyOutlived(m); err != nil {
		return err
	}
	if m.has("decisions") {
		if err := d.moveSockets(m); err != nil {
			return err
		}
	}
	if err := d.addAllCounts(m); err != nil {
		return err
	}
	if err := d.endHot(m); err != nil {
		return err
	}
	if d.former.killed || m.again != 0 {
		if err := d.makeGood(); err != nil {
			return err
		}
	}
	// Back to what it had: then the others are only left.
	if err := finishMove(d.dir, m.again != goesBack); err != nil {
		return err
	}
	// Not before: who is killed here leaves one of the two whole.
	if err := errors.Join(d.clearHot(m), m.seen.close(), m.closeBulk()); err != nil {
		return err
	}
	d.options.Log.Info(m.again.done(), "from", m.from.ABI, "to", m.to.ABI, "maps", m.moved)
	// What it has open stays so: who is in the middle of a call may use it.
	d.moving.Store(nil)
	close(m.done)
	return nil
}

// Settled waits until the instance has this build's layout of maps, which it has from
// the start unless it was moved from another one: then [Datapath.Attach] ends that.
// Before, nobody else can go on with it.
func (d *Datapath) Settled(ctx context.Context) error {
	if d.moved == nil {
		return nil
	}
	select {
	case <-d.moved.done:
		return d.settleQueues(ctx)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// waitForHooks returns when no hook is at work that was there before.
func waitForHooks() {
	const membarrierGlobal = 1 // MEMBARRIER_CMD_GLOBAL waits for RCU
	if _, _, e := unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0); e != 0 {
		time.Sleep(100 * time.Millisecond) // not permitted: hooks take microseconds
	}
}

// finishMove gives the new maps the names of the old ones, in one step: when the new
// description has its name, the others are only behind. An earlier process that did
// not get so far has left maps that are worth nothing, unless commit is set.
func finishMove(dir *dir, commit bool) error {
	found, err := filepath.Glob(dir.pin("*" + nextSuffix))
	if err == nil && len(found) > 0 {
		err = finishNext(dir, commit, found)
	}
	if err != nil {
		return err
	}
	// Of no use without the others.
	seen, err := filepath.Glob(dir.pin("*" + seenSuffix))
	for _, path := range seen {
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("remove what a move has left: %w", err)
		}
	}
	return err
}

func finishNext(dir *dir, commit bool, found []string) error {
	described := dir.pin(layoutsPin + nextSuffix)
	last := func(path string) bool { return path == described }
	_, err := os.Stat(described)
	if err == nil && !commit {
		for _, path := range append(slices.DeleteFunc(found, last), described) {
			if err := os.Remove(path); err != nil {
				return fmt.Errorf("remove what a move has left: %w", err)
			}
		}
		return nil
	}
	paths := slices.DeleteFunc(found, last)
	if err == nil {
		paths = slices.Insert(paths, 0, described)
	}
	for _, path := range paths {
		if err := os.Rename(path, strings.TrimSuffix(path, nextSuffix)); err != nil {
			return fmt.Errorf("name a map that was moved: %w", err)
		}
	}
	return nil
}

// exemptBefore tags a socket for hooks of the layout before.
func (m *move) exemptBefore(fd int) error {
	if !m.has("decisions") {
		return nil
	}
	l := m.from.Maps["decisions"]
	own, _ := find(l.Value, "own")
	value := make([]byte, l.ValueSize)
	value[own.At] = 1
	return m.old["decisions"].Put(uint32(fd), value)
}

// beatBefore writes a sign of life for hooks of the layout before.
func (m *move) beatBefore(b bpf.Beat) error {
	if !m.has("beat") {
		return nil
	}
	from, to := m.from.Maps["beat"], m.to.Maps["beat"]
	raw := (*[unsafe.Sizeof(b)]byte)(unsafe.Pointer(&b))[:]
	return m.old["beat"].Put(uint32(0), translate(spansOf(to.Value, from.Value), raw, from.ValueSize))
}
