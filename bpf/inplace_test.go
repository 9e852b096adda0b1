package bpf

import (
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// TestInPlace: the hook takes what it always needs by its address; where it is not plain to
// see that this is the same, the look-up stays.
func TestInPlace(t *testing.T) {
	specs, err := Specs()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{ProgConnect4, ProgConnect6} {
		values := map[string]int{}
		for i := range specs[0].Programs[name].Instructions {
			if ins := &specs[0].Programs[name].Instructions[i]; ins.Src == asm.PseudoMapValue {
				values[ins.Reference()]++
			}
		}
		for _, m := range []string{"settings", "not_own"} {
			if values[m] == 0 {
				t.Errorf("%s never takes the value of %s by its address", name, m)
			}
		}
	}

	one, many := &ebpf.MapSpec{Type: ebpf.Array, MaxEntries: 1}, &ebpf.MapSpec{Type: ebpf.Array, MaxEntries: 2}
	lookUp := func(name string, between ...asm.Instruction) asm.Instructions {
		load := asm.LoadMapPtr(asm.R1, 0).WithReference(name)
		return slices.Concat(asm.Instructions{load}, between, asm.Instructions{asm.FnMapLookupElem.Call(), asm.Return()})
	}
	for name, code := range map[string]asm.Instructions{
		"more than one entry": lookUp("many"),
		"something between":   lookUp("one", asm.Mov.Imm(asm.R0, 0)),
		"another function":    {asm.LoadMapPtr(asm.R1, 0).WithReference("one"), asm.FnMapUpdateElem.Call(), asm.Return()},
		"another register":    {asm.LoadMapPtr(asm.R6, 0).WithReference("one"), asm.FnMapLookupElem.Call(), asm.Return()},
		// To the call, over the two places of the load.
		"a jump in between": slices.Concat(asm.Instructions{{OpCode: asm.JEq.Op(asm.ImmSource), Dst: asm.R3, Offset: 2}}, lookUp("one")),
	} {
		before := slices.Clone(code)
		inPlace(&ebpf.CollectionSpec{
			Maps:     map[string]*ebpf.MapSpec{"one": one, "many": many},
			Programs: map[string]*ebpf.ProgramSpec{"p": {Instructions: code}},
		})
		for i := range code {
			if code[i].OpCode != before[i].OpCode || code[i].Src != before[i].Src || code[i].Dst != before[i].Dst {
				t.Errorf("%s: instruction %d was %v, and is %v", name, i, before[i], code[i])
			}
		}
	}
	code := lookUp("one")
	inPlace(&ebpf.CollectionSpec{Maps: map[string]*ebpf.MapSpec{"one": one}, Programs: map[string]*ebpf.ProgramSpec{"p": {Instructions: code}}})
	if code[0].Src != asm.PseudoMapValue || code[0].Dst != asm.R0 || code[1].IsBuiltinCall() {
		t.Errorf("a plain look-up stays: %v", code)
	}
}
