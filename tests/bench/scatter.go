package main

import (
	"fmt"
	"math/rand/v2"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// The kernel has room for 2 MiB of programs at a time (bpf_prog_pack_alloc), which is given
// out from its beginning.
const (
	scatterOver = 2 << 20
	scatterSize = 6 // bytes of each instruction, on x86-64
)

// scatter has what is loaded next lie anywhere: it loads programs, which never run, of a
// random size in all. Where code lies, nobody chooses, and it makes more of a difference to
// what a hook costs than most of what is in it: on a kernel without address randomisation
// (KASLR) the first programs may have the last digits of TCP's own code, and the processor
// then seems to take branches of the one for branches of the other (docs/performance.md).
func (w *world) scatter() error {
	const most = 4000 // instructions of one program
	for left := rand.N(scatterOver / scatterSize); left > 0; {
		n := min(left, 1+rand.N(most))
		left -= n
		code := asm.Instructions{asm.Mov.Imm(asm.R0, 1)}
		for range n {
			code = append(code, asm.Add.Imm(asm.R0, 100000))
		}
		code = append(code, proceed()...)
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "bench_scatter", Type: ebpf.CGroupSockAddr,
			AttachType: ebpf.AttachCGroupInet4Connect, License: "Dual BSD/GPL", Instructions: code})
		if err != nil {
			return fmt.Errorf("load a program that does nothing: %w", err)
		}
		w.later(p.Close)
	}
	return nil
}
