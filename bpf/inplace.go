package bpf

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// inPlace has programs take the value of a map of one entry by its address, as they do
// with .rodata, where they would look it up under 0, the only key that they use there. That
// is one instruction in place of twelve, and two jumps less.
// A look-up whose two instructions are not one behind the other stays.
//
// Where the program goes on if there is no value, R0 is an address then, and no zero.
// Nothing ever gets there, but without CAP_PERFMON the verifier of 6.1 walks it all the
// same (the processor may, speculating), and would refuse code that takes R0 for a number.
func inPlace(spec *ebpf.CollectionSpec) {
	for _, p := range spec.Programs {
		targets := jumpTargets(p.Instructions)
		for i := 1; i < len(p.Instructions); i++ {
			load, call := &p.Instructions[i-1], &p.Instructions[i]
			if targets[i] || !isLookup(call) || !isOfOne(spec, load) {
				continue
			}
			load.Dst, load.Src, load.Constant = asm.R0, asm.PseudoMapValue, 0
			// A jump to the next one, which the kernel takes away.
			*call = asm.Instruction{OpCode: asm.Ja.Op(asm.ImmSource), Metadata: call.Metadata}
		}
	}
}

func isLookup(ins *asm.Instruction) bool {
	return ins.IsBuiltinCall() && ins.Constant == int64(asm.FnMapLookupElem)
}

// isOfOne tells whether an instruction has a map of one entry looked up by the next one.
func isOfOne(spec *ebpf.CollectionSpec, ins *asm.Instruction) bool {
	m := spec.Maps[ins.Reference()]
	return m != nil && m.Type == ebpf.Array && m.MaxEntries == 1 && ins.IsLoadFromMap() && ins.Dst == asm.R1
}

// jumpTargets are the indices of instructions that others jump to.
func jumpTargets(all asm.Instructions) map[int]bool {
	index := map[asm.RawInstructionOffset]int{}
	for iter := all.Iterate(); iter.Next(); {
		index[iter.Offset] = iter.Index
	}
	targets := map[int]bool{}
	for iter := all.Iterate(); iter.Next(); {
		if ins := iter.Ins; ins.OpCode.Class().IsJump() && ins.OpCode.JumpOp() != asm.Call && ins.OpCode.JumpOp() != asm.Exit {
			targets[index[iter.Offset+1+asm.RawInstructionOffset(ins.Offset)]] = true
		}
	}
	return targets
}
