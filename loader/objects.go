package loader

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/loader/probe"
	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

// instancePin is the first pin of an instance and the last to go: it says what
// the others belong to.
const instancePin = "instance"

// reservedSlots are kept for services: the first of the range.
const reservedSlots = flow.ServiceSlots

// create makes everything but the links.
func (d *Datapath) create() error {
	specs, err := bpf.Specs()
	if err != nil {
		return err
	}
	if d.layouts, err = ownLayouts(specs); err != nil {
		return err
	}
	if d.network, err = openNetwork(); err != nil {
		return err
	}
	record, err := ebpf.NewMap(specs[0].Maps[instancePin])
	if err != nil {
		return fmt.Errorf("create map %s: %w", instancePin, err)
	}
	d.maps.Instance = record
	if err := record.Pin(d.dir.pin(instancePin)); err != nil {
		return fmt.Errorf("pin map %s: %w", instancePin, err)
	}
	// Afterwards: who is just being made elsewhere, and has not got further than its
	// routes, does not share its range with us then.
	d.slots, err = d.network.claim(os.Getpid(), d.intend)
	if err := d.removeOrphans(); err != nil {
		d.options.Log.Warn("cannot tell whether slot routes are left of others", "error", err)
	}
	if err != nil {
		return err
	}
	if err := d.load(specs, map[string]*ebpf.Map{instancePin: record}); err != nil {
		return err
	}
	if err := d.pinMaps(); err != nil {
		return err
	}
	if err := d.describe(layoutsPin); err != nil {
		return err
	}
	d.state.nextSlot().Store(bpf.SlotFirst + reservedSlots)
	// Written last: with its families it says that all of this is there.
	return d.writeInstance(d.slots)
}

// intend puts on record which range is about to be claimed, so that whoever
// finds the instance half made knows what to look for.
func (d *Datapath) intend(r slotRange) error {
	r.families = 0
	return d.writeInstance(r)
}

func (d *Datapath) writeInstance(r slotRange) error {
	start, err := processStart(os.Getpid())
	if err != nil {
		return err
	}
	d.instance = bpf.Instance{
		Abi:        bpf.ABI,
		Slot4:      r.slot4(),
		Slot6:      r.slot6(),
		Kind:       uint32(d.options.Kind),
		Netns:      d.options.Scope.Netns,
		Cgroup:     d.options.Scope.ID,
		Pid:        uint64(os.Getpid()),
		PidStart:   start,
		Families:   r.families,
		ScopeLevel: d.options.Scope.Level,
		Sandbox:    d.options.Sandbox,
	}
	return d.putInstance()
}

func (d *Datapath) putInstance() error {
	if err := d.maps.Instance.Put(uint32(0), d.instance); err != nil {
		return fmt.Errorf("write map %s: %w", instancePin, err)
	}
	return nil
}

// open takes the pinned maps, loads the programs of this build over them, and
// takes charge.
func (d *Datapath) open() error {
	if err := d.findBegun(); err != nil {
		return err
	}
	if err := d.prepare(); err != nil {
		return err
	}
	return d.takeCharge()
}

// prepare is the part of open that changes nothing.
func (d *Datapath) prepare() error {
	specs, err := bpf.Specs()
	if err != nil {
		return err
	}
	if d.layouts == nil {
		if d.layouts, err = ownLayouts(specs); err != nil {
			return err
		}
	}
	if err := d.findRecord(); err != nil {
		return err
	}
	if d.instance.Families == 0 {
		return ErrIncomplete
	}
	if err := d.sameScope(); err != nil {
		return err
	}
	d.slots = rangeOf(&d.instance)
	m := d.moving.Load()
	pinned := map[string]*ebpf.Map{}
	if d.maps.Instance != nil {
		pinned[instancePin] = d.maps.Instance
	}
	for name := range sharedMaps(specs) {
		if name == instancePin || m.creates(name) {
			continue
		}
		m, err := ebpf.LoadPinnedMap(d.dir.pin(m.ownPin(name)), nil)
		if errors.Is(err, os.ErrNotExist) {
			err = fmt.Errorf("%w: map %s is not pinned", ErrIncomplete, name)
		}
		if err != nil {
			closeAll(pinned, instancePin)
			return fmt.Errorf("open map %s: %w", name, err)
		}
		pinned[name] = m
	}
	if d.network, err = openNetwork(); err != nil {
		closeAll(pinned, instancePin)
		return err
	}
	// The record keeps what was claimed: the next start may have it all.
	d.slots = d.network.usable(d.slots)
	if err := d.load(specs, pinned); err != nil {
		return err
	}
	if err := d.loadTell(m); err != nil {
		return err
	}
	return m.load()
}

// sameScope tells whether the record is of the scope that is asked for.
func (d *Datapath) sameScope() error {
	i, s := &d.instance, &d.options.Scope
	switch {
	case i.Netns != s.Netns:
		return fmt.Errorf("%w: it is of network namespace %d, this is %d", ErrOtherScope, i.Netns, s.Netns)
	case i.Cgroup != s.ID:
		return fmt.Errorf("%w: it is of cgroup %d, %s is %d", ErrOtherScope, i.Cgroup, s.Path, s.ID)
	default:
		return nil
	}
}

// findRecord reads the record of the instance. Where its maps are of another layout,
// it plans how they are moved.
func (d *Datapath) findRecord() error {
	m := d.moved // begun by a process that was killed
	if m == nil {
		was, err := readLayouts(d.dir.pin(layoutsPin))
		if err != nil {
			return err
		}
		if was != nil && was.ABI != bpf.ABI {
			if m, err = plan(was, d.layouts); err != nil {
				return err
			}
		}
	}
	d.moved = m // to be closed
	d.moving.Store(m)
	var err error
	if m != nil {
		if err := m.open(d.dir); err != nil {
			return err
		}
	}
	if m == nil || m.again != 0 {
		d.maps.Instance, d.instance, err = readRecord(d.dir.pin(m.ownPin(instancePin)))
		return err
	}
	d.instance, err = m.record()
	return err
}

// takeCharge goes on from what the maps say.
func (d *Datapath) takeCharge() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.moveIn(); err != nil {
		return err
	}
	if err := d.readFormer(d.moving.Load()); err != nil {
		return err
	}
	if err := d.maps.Settings.Lookup(uint32(0), &d.settings); err != nil {
		return fmt.Errorf("read settings: %w", err)
	}
	// At once: the rules may take a while.
	d.settings.OwnGroup = d.options.Own
	if err := d.putSettings(); err != nil {
		return err
	}
	d.settings.Draining = 0 // that was the earlier process
	d.sets.mu.Lock()
	err := d.sets.recover(d.maps.Services)
	d.sets.mu.Unlock()
	if err != nil {
		return err
	}
	return d.takeOver()
}

// takeOver makes what was prepared for a run one.
func (d *Datapath) takeOver() error {
	if Kind(d.instance.Kind) != KindInit || d.options.Kind != KindRun {
		return nil
	}
	d.instance.Kind = uint32(KindRun)
	return d.putInstance()
}

// Sandbox returns the id of the cgroup of the pod's sandbox, as the instance's maker
// knew it; 0: it did not.
func (d *Datapath) Sandbox() uint64 { return d.instance.Sandbox }

func closeAll(maps map[string]*ebpf.Map, but string) {
	for name, m := range maps {
		if name != but {
			m.Close()
		}
	}
}

// readInstance opens and reads the record of an instance. The map is the
// caller's to close.
func readInstance(dir *dir) (*ebpf.Map, bpf.Instance, error) {
	return readRecord(dir.pin(instancePin))
}

func readRecord(pin string) (*ebpf.Map, bpf.Instance, error) {
	var i bpf.Instance
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil, i, fmt.Errorf("%w: it has no record", ErrIncomplete)
	}
	if err != nil {
		return nil, i, fmt.Errorf("open map %s: %w", instancePin, err)
	}
	if m.ValueSize() != uint32(unsafe.Sizeof(i)) || m.KeySize() != 4 {
		m.Close()
		return nil, i, fmt.Errorf("%w: map %s has values of %d bytes, this build's have %d", ErrABI, instancePin,
			m.ValueSize(), unsafe.Sizeof(i))
	}
	if err := m.Lookup(uint32(0), &i); err != nil {
		m.Close()
		return nil, i, fmt.Errorf("read map %s: %w", instancePin, err)
	}
	if i.Abi != bpf.ABI && i.Abi != 0 {
		m.Close()
		return nil, i, fmt.Errorf("%w: ABI %d, this build has %d", ErrABI, i.Abi, bpf.ABI)
	}
	return m, i, nil
}

// privateMaps are for the programs of one process, and not pinned.
var privateMaps = append(slices.Collect(maps.Keys(formerMaps)), "workbench")

// formerMaps are, by the names of ours, what they are of while another layout has that.
var formerMaps = map[string]string{
	"former": "decisions", "former_live": "live", "former_departed": "departed", "former_slots": "slots",
	"former_cells": "cells",
}

// sharedMaps are all maps but an object's own constants, and privateMaps.
func sharedMaps(specs []*ebpf.CollectionSpec) map[string]*ebpf.MapSpec {
	all := map[string]*ebpf.MapSpec{}
	for _, s := range specs {
		for name, m := range s.Maps {
			if name != ".rodata" && !slices.Contains(privateMaps, name) {
				all[name] = m
			}
		}
	}
	return all
}

// load loads the programs of every object. Maps that have are used as they are;
// the others are created. All of them are d's afterwards, also on failure.
func (d *Datapath) load(specs []*ebpf.CollectionSpec, have map[string]*ebpf.Map) error {
	var tag [8]byte
	defer d.keepMaps(have)
	var err error
	if d.clock, err = bpf.NewClock(); err != nil {
		return err
	}
	d.holds = probe.TCX() == nil
	if !d.holds {
		d.options.Log.Warn("this kernel has no tcx: connects succeed before their dial has", "connect", "early")
	}
	if d.frameTag == 0 {
		// 48 bits, and never zero.
		if _, err := rand.Read(tag[:]); err != nil {
			return fmt.Errorf("make frame tag: %w", err)
		}
		d.frameTag = binary.NativeEndian.Uint64(tag[:])>>16 | 1
	}
	c := consts{
		netns:      d.options.Scope.Netns,
		slot4:      d.slots.slot4(),
		slot6:      d.slots.slot6(),
		scope:      d.options.Scope.ID,
		scopeLevel: d.options.Scope.Level,
		frameTag:   d.frameTag,
	}
	m := d.moving.Load()
	c.moves = m.bits()
	bodies := m.bodies()
	shared := sharedMaps(specs)
	inner := func(outer string) innerSpec {
		return func() (*ebpf.MapSpec, error) { return shared[outer].InnerMap, nil }
	}
	d.heldSpec = inner("held")
	for name, spec := range shared {
		if have[name] != nil {
			continue
		}
		if holdsTwo(name) {
			spec = spec.Copy()
			spec.MaxEntries *= 2
		}
		m, err := ebpf.NewMap(spec)
		if err != nil {
			return fmt.Errorf("create map %s: %w", name, err)
		}
		have[name] = m
	}
	if err := d.makePrivate(specs[0], have); err != nil {
		return err
	}
	for _, spec := range specs {
		if err := c.set(spec); err != nil {
			return err
		}
		if err := install(spec, bodies); err != nil {
			return err
		}
		if err := d.loadPrograms(spec, have); err != nil {
			return err
		}
	}
	d.state, err = mapState(have["state"])
	if err != nil {
		return err
	}
	d.keepMaps(have)
	d.sets.open(&d.maps, inner("sets"))
	return nil
}

// innerSpec tells what the maps in a map of maps are like.
type innerSpec func() (*ebpf.MapSpec, error)

// innerLater reads it when it is asked for: the objects take some milliseconds.
func innerLater(outer string) innerSpec {
	return sync.OnceValues(func() (*ebpf.MapSpec, error) {
		specs, err := bpf.Specs()
		if err != nil {
			return nil, err
		}
		return sharedMaps(specs)[outer].InnerMap, nil
	})
}

// holdsTwo tells whether a map has room for two whole lists: the new one is in force
// before the old one goes. Entries take memory only when they are there. An earlier
// build's has room for one: its size is no part of the layout.
func holdsTwo(name string) bool { return name == "deny" || name == "exclude" }

// makePrivate adds the maps that are this process's own.
func (d *Datapath) makePrivate(spec *ebpf.CollectionSpec, have map[string]*ebpf.Map) error {
	m := d.moving.Load()
	var err error
	for name, of := range formerMaps {
		former := have[of] // nobody looks at it
		if m.has(of) {
			former = m.old[of]
		}
		if have[name], err = former.Clone(); err != nil {
			return fmt.Errorf("open map %s: %w", name, err)
		}
	}
	if have["workbench"], err = ebpf.NewMap(spec.Maps["workbench"]); err != nil {
		return fmt.Errorf("create map workbench: %w", err)
	}
	return nil
}

func (d *Datapath) loadPrograms(spec *ebpf.CollectionSpec, have map[string]*ebpf.Map) error {
	replace := map[string]*ebpf.Map{}
	for name := range spec.Maps {
		if m := have[name]; m != nil {
			replace[name] = m
			if formerMaps[name] != "" || holdsTwo(name) {
				s := spec.Maps[name]
				s.MaxEntries, s.ValueSize, s.Value = m.MaxEntries(), m.ValueSize(), nil
			}
		}
	}
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replace})
	if err != nil {
		if _, ok := errors.AsType[*ebpf.VerifierError](err); !ok && errors.Is(err, ebpf.ErrMapIncompatible) {
			return fmt.Errorf("%w: %w", ErrABI, err)
		}
		return fmt.Errorf("load programs: %w", err)
	}
	for name := range spec.Programs {
		d.programs[name] = c.DetachProgram(name)
	}
	// What is left is the constants, which the programs hold.
	c.Close()
	return nil
}

// keepMaps puts the maps into d.maps by the names in its tags.
func (d *Datapath) keepMaps(have map[string]*ebpf.Map) {
	v := reflect.ValueOf(&d.maps).Elem()
	for i := range v.NumField() {
		if m := have[v.Type().Field(i).Tag.Get("ebpf")]; m != nil {
			v.Field(i).Set(reflect.ValueOf(m))
		}
	}
	d.liveFD, d.departedFD = -1, -1
	if m := have["live"]; m != nil {
		d.liveFD = m.FD()
	}
	if m := have["departed"]; m != nil {
		d.departedFD = m.FD()
	}
}

func (d *Datapath) pinMaps() error {
	for name, m := range d.mapsByName() {
		if name == instancePin {
			continue
		}
		if err := m.Pin(d.dir.pin(name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	return nil
}

// mapsByName are the maps that are pinned.
func (d *Datapath) mapsByName() map[string]*ebpf.Map {
	all := map[string]*ebpf.Map{}
	v := reflect.ValueOf(d.maps)
	for i := range v.NumField() {
		name := v.Type().Field(i).Tag.Get("ebpf")
		if !slices.Contains(privateMaps, name) {
			all[name] = v.Field(i).Interface().(*ebpf.Map)
		}
	}
	return all
}

// describe pins what the layouts of the maps are.
func (d *Datapath) describe(pin string) error {
	if d.layouts == nil { // resumed: nobody has asked yet
		specs, err := bpf.Specs()
		if err != nil {
			return err
		}
		if d.layouts, err = ownLayouts(specs); err != nil {
			return err
		}
	}
	return d.layouts.write(d.dir.pin(pin))
}

// sharedState is the map state in our memory: hooks add to it all the time, so
// writing it whole would lose what they added.
type sharedState struct{ page []byte }

func mapState(m *ebpf.Map) (*sharedState, error) {
	page, err := unix.Mmap(m.FD(), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map state: %w", err)
	}
	return &sharedState{page: page}, nil
}

func (s *sharedState) value() *bpf.State { return (*bpf.State)(unsafe.Pointer(&s.page[0])) }

// nextSlot is the first slot that was never named.
func (s *sharedState) nextSlot() *atomic.Uint32 {
	return (*atomic.Uint32)(unsafe.Pointer(&s.value().NextSlot))
}

// live is how many entries the map live has.
func (s *sharedState) live() *atomic.Uint32 {
	return (*atomic.Uint32)(unsafe.Pointer(&s.value().Live))
}

// owner is the robust futex that the kernel notes the process's death in.
func (s *sharedState) owner() *uint32 { return &s.value().Owner }

// disown says that whoever has died or is going to, it is not who listens now.
func (s *sharedState) disown() { atomic.StoreUint32(s.owner(), 0) }

func (s *sharedState) close() error {
	if err := unix.Munmap(s.page); err != nil {
		return fmt.Errorf("unmap state: %w", err)
	}
	return nil
}
