package main

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/pillion-project/pillion/bpf"
)

// What a connect hook cannot do without, whatever it does with it, if connections are to be
// on record, of one network namespace, with their container, balanced over the endpoints of
// any of 10,000 services: the clock, the socket's cookie, the namespace's, the task's cgroup; the settings;
// whether the address may be an own one, and whether it is a service's; two counters; a cell that is written.
const floorPass = "looks of pass"

// And what a pick by load cannot: the set, its head, two of its endpoints, and what each of
// these has open.
const floorDirect = "looks of direct"

// looksMaps are maps of Pillion's, by name, and as large.
var looksMaps = []string{"cells", "not_own", "settings", "services", "reasons", "tallies", "sets", "endpoints"}

// looker writes such a program.
type looker struct {
	maps map[string]*ebpf.Map
	code asm.Instructions
}

// Where on the stack the keys are: as many zeros as the longest has, which is 20.
const (
	zerosAt  = -40
	numberAt = -8
)

func (l *looker) emit(code ...asm.Instruction) { l.code = append(l.code, code...) }

// find looks up the key at some place of the stack, in a map whose address is in R1: R0.
func (l *looker) find(key int32) {
	l.emit(asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, key), asm.FnMapLookupElem.Call())
}

// number looks up a number.
func (l *looker) number(n int32) {
	l.emit(asm.Mov.Imm(asm.R0, n), asm.StoreMem(asm.RFP, numberAt, asm.R0, asm.DWord))
	l.find(numberAt)
	l.emit(asm.JEq.Imm(asm.R0, 0, "proceed"))
}

func (l *looker) in(name string) { l.emit(asm.LoadMapPtr(asm.R1, l.maps[name].FD())) }

// touch has the processor wait for what was found.
func (l *looker) touch() {
	l.emit(asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord), asm.JEq.Imm(asm.R1, -1, "proceed"))
}

// looks makes the program, and what keeps its maps until it is closed.
func (w *world) looks(pick bool) (code asm.Instructions, err error) {
	l := &looker{maps: map[string]*ebpf.Map{}}
	specs, err := bpf.Specs()
	if err != nil {
		return nil, err
	}
	for _, name := range looksMaps {
		spec := specs[0].Maps[name]
		if spec == nil {
			return nil, errors.New("the connect hook has no map " + name)
		}
		m, err := ebpf.NewMap(spec)
		if err != nil {
			return nil, fmt.Errorf("make map %s: %w", name, err)
		}
		w.later(m.Close)
		l.maps[name] = m
	}
	if err := l.fill(specs[0].Maps["sets"].InnerMap); err != nil {
		return nil, err
	}
	l.emit(asm.Mov.Reg(asm.R6, asm.R1))
	l.emit(asm.Mov.Imm(asm.R0, 0))
	for at := int16(zerosAt); at < 0; at += 8 {
		l.emit(asm.StoreMem(asm.RFP, at, asm.R0, asm.DWord))
	}
	l.emit(asm.FnKtimeGetNs.Call(), asm.FnGetCurrentCgroupId.Call(),
		asm.Mov.Reg(asm.R1, asm.R6), asm.FnGetNetnsCookie.Call(),
		asm.Mov.Reg(asm.R1, asm.R6), asm.FnGetSocketCookie.Call(),
		asm.Mov.Reg(asm.R9, asm.R0), asm.And.Imm(asm.R0, bpf.Cells-1), asm.StoreMem(asm.RFP, numberAt, asm.R0, asm.DWord))
	l.in("cells")
	l.find(numberAt)
	l.emit(asm.JEq.Imm(asm.R0, 0, "proceed"), asm.Mov.Reg(asm.R7, asm.R0))
	l.touch()
	for _, name := range []string{"settings", "not_own"} {
		l.in(name)
		l.number(0)
		l.touch()
	}
	l.in("services")
	l.find(zerosAt)
	l.emit(asm.JEq.Imm(asm.R0, 0, "proceed"))
	l.touch()
	if pick {
		l.in("sets")
		l.number(0)
		l.emit(asm.Mov.Reg(asm.R8, asm.R0))
		for _, row := range []int32{0, 1, bpf.SetHead, bpf.SetHead + 1} {
			l.emit(asm.Mov.Reg(asm.R1, asm.R8))
			l.number(row)
			l.touch()
		}
		for n := range int32(2) {
			l.in("endpoints")
			l.number(n)
			l.touch()
		}
	}
	for _, name := range []string{"reasons", "tallies"} {
		l.in(name)
		l.number(1)
		l.emit(asm.Mov.Imm(asm.R1, 1), asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, 0))
	}
	size := int16(l.maps["cells"].ValueSize())
	for at := int16(0); at < size; at += 8 {
		l.emit(asm.StoreMem(asm.R7, at, asm.R9, asm.DWord))
	}
	return append(l.code, proceed()...), nil
}

// fill makes what is found: a service, and its set of three endpoints.
func (l *looker) fill(inner *ebpf.MapSpec) error {
	spec := inner.Copy()
	spec.MaxEntries = bpf.SetHead + uint32(len(endpoints))
	set, err := ebpf.NewMap(spec)
	if err != nil {
		return fmt.Errorf("make a set: %w", err)
	}
	defer set.Close() // the map of sets keeps it
	return errors.Join(l.maps["sets"].Put(uint32(0), set), l.maps["services"].Put(bpf.EndpointKey{}, bpf.Service{}))
}
