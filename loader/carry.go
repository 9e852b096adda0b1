package loader

import (
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// The bodies of the functions of bpf/include/decision.h, which know two layouts of what
// is stored with a socket, and of those of former.h. They are written here, since only
// here both are known; with constant offsets, which the verifier asks for where
// CAP_PERFMON is missing.

// Registers of a call.
const (
	result = asm.R0
	former = asm.R1
	ours   = asm.R2
	number = asm.R3
	other  = asm.R4
	zero   = asm.R5
)

// carrier is what such functions are made of.
type carrier struct {
	from, to *mapLayout
}

// needed are the fields that both layouts must have, with these sizes.
var needed = map[string]uint32{"opened": 8, "released": 1, "pending": 1, "own": 1}

// check tells whether what is stored with sockets can be moved.
func (c carrier) check() error {
	for name, size := range needed {
		for _, l := range []*mapLayout{c.from, c.to} {
			if f, ok := find(l.Value, name); !ok || f.Size != size {
				return fmt.Errorf("%w: what is stored with a socket has no field %s of %d bytes", ErrABI, name, size)
			}
		}
	}
	return nil
}

func at(l *mapLayout, name string) int16 {
	f, _ := find(l.Value, name)
	return int16(f.At)
}

// carry writes the function of that name.
func (c carrier) carry() asm.Instructions {
	released := asm.Instructions{
		asm.LoadMem(number, former, at(c.from, "released"), asm.Byte),
		skip(asm.JEq.Imm(number, 0, ""), 1),
		asm.StoreImm(ours, at(c.to, "released"), 1, asm.Byte),
		asm.Return(),
	}
	all := append(c.fill(),
		asm.StoreMem(former, at(c.from, "pending"), zero, asm.Byte),
		asm.Mov.Imm(result, 1), asm.Return())
	head := asm.Instructions{
		asm.Mov.Imm(result, 0),
		asm.LoadMem(number, former, at(c.from, "opened"), asm.DWord),
		skip(asm.JNE.Imm(number, 0, ""), 1),
		asm.Return(),
		asm.LoadMem(other, ours, at(c.to, "opened"), asm.DWord),
		// Younger: all of it.
		skip(asm.JGT.Reg(number, other, ""), len(released)+2),
		// Of an earlier connection: nothing.
		skip(asm.JEq.Reg(number, other, ""), 1),
		asm.Return(),
	}
	return slices.Concat(head, released, all)
}

// carryBack writes that function for hooks that go on after those of a move that was given
// up: the former entries are of that move, and were made of ours. So the former one counts
// unless ours is younger, and is used up by that: hooks of the move that are still there
// make it anew, of ours, when they need it. Hooks that are older than the move know ours
// alone, and may have noted the release there.
func (c carrier) carryBack() asm.Instructions {
	return slices.Concat(asm.Instructions{
		asm.Mov.Imm(result, 0),
		asm.LoadMem(number, former, at(c.from, "opened"), asm.DWord),
		skip(asm.JNE.Imm(number, 0, ""), 1),
		asm.Return(),
		asm.LoadMem(other, ours, at(c.to, "opened"), asm.DWord),
		skip(asm.JGE.Reg(number, other, ""), 1),
		asm.Return(),
		asm.LoadMem(other, ours, at(c.to, "released"), asm.Byte),
	}, c.fill(), asm.Instructions{
		skip(asm.JEq.Imm(other, 0, ""), 1),
		asm.StoreImm(ours, at(c.to, "released"), 1, asm.Byte),
		asm.StoreMem(former, at(c.from, "opened"), zero, asm.DWord),
		asm.Mov.Imm(result, 1), asm.Return(),
	})
}

// fill writes a whole entry of ours, out of the former one. Whose cell that is stays.
func (c carrier) fill() asm.Instructions {
	all := asm.Instructions{asm.Mov.Imm(zero, 0)}
	owner, cell := find(c.to.Value, "owner")
	for off, size := range pieces(c.to.ValueSize, 0) {
		if !cell || off != owner.At {
			all = append(all, asm.StoreMem(ours, int16(off), zero, size))
		}
	}
	for _, s := range spansOf(c.from.Value, c.to.Value) {
		if cell && s.to == owner.At {
			continue
		}
		for off, size := range pieces(s.size, s.from|s.to) {
			all = append(all,
				asm.LoadMem(number, former, int16(s.from+off), size),
				asm.StoreMem(ours, int16(s.to+off), number, size))
		}
	}
	return all
}

// fieldAt writes a function that tells where a field of a former entry is.
func fieldAt(l *mapLayout, name string) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(result, former), asm.Add.Imm(result, int32(at(l, name))), asm.Return(),
	}
}

// wipe writes the function of that name.
func (c carrier) wipe() asm.Instructions {
	own := uint32(at(c.from, "own"))
	all := asm.Instructions{asm.Mov.Imm(result, 0), asm.Mov.Imm(zero, 0)}
	for off, size := range pieces(c.from.ValueSize, 0) {
		if own < off || own >= off+uint32(size.Sizeof()) {
			all = append(all, asm.StoreMem(former, int16(off), zero, size))
			continue
		}
		for b := off; b < off+uint32(size.Sizeof()); b++ {
			if b != own {
				all = append(all, asm.StoreMem(former, int16(b), zero, asm.Byte))
			}
		}
	}
	return append(all, asm.Return())
}

// skip makes a jump go over so many instructions, of which each takes one place.
func skip(jump asm.Instruction, n int) asm.Instruction {
	jump.Offset = int16(n)
	return jump
}

// pieces splits size bytes into the longest reads, at a place that is aligned as its
// low bits say.
func pieces(size, aligned uint32) func(yield func(uint32, asm.Size) bool) {
	return func(yield func(uint32, asm.Size) bool) {
		for off := uint32(0); off < size; {
			piece := asm.DWord
			for _, piece = range []asm.Size{asm.DWord, asm.Word, asm.Half, asm.Byte} {
				n := uint32(piece.Sizeof())
				if off+n <= size && (off|aligned)%n == 0 {
					break
				}
			}
			if !yield(off, piece) {
				return
			}
			off += uint32(piece.Sizeof())
		}
	}
}

// install puts functions into the programs of an object.
func install(spec *ebpf.CollectionSpec, bodies map[string]asm.Instructions) error {
	for name, p := range spec.Programs {
		for function, body := range bodies {
			all, err := replaceFunction(p.Instructions, function, body)
			if err != nil {
				return fmt.Errorf("program %s: %w", name, err)
			}
			p.Instructions = all
		}
	}
	return nil
}

// replaceFunction gives a function of a program another body, if the program has it.
func replaceFunction(all asm.Instructions, name string, body asm.Instructions) (asm.Instructions, error) {
	start := slices.IndexFunc(all, func(i asm.Instruction) bool { return i.Symbol() == name })
	if start < 0 {
		return all, nil
	}
	if btf.FuncMetadata(&all[start]) == nil {
		return nil, fmt.Errorf("%s is no function", name)
	}
	end := start + 1
	for end < len(all) && btf.FuncMetadata(&all[end]) == nil {
		end++
	}
	// Its name, its type, and where it was in the source.
	body[0].Metadata = all[start].Metadata
	return slices.Concat(all[:start], body, all[end:]), nil
}
