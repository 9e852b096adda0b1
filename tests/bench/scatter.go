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
	scatterEach = 28 << 10 // bytes of a program of 4,000 instructions on x86-64
)

// scatter has what is loaded next lie anywhere: it loads programs, which never run, of a
// random size in all. Where code lies, nobody chooses, and it makes more of a difference to
// what a hook costs than anything in it: the first programs of a kernel without address
// randomisation (KASLR) have the same last digits as TCP's own code, so to the processor's
// prediction of branches they are the same.
func (w *world) scatter() error {
	code := asm.Instructions{asm.Mov.Imm(asm.R0, 1)}
	for range 4000 {
		code = append(code, asm.Add.Imm(asm.R0, 100000))
	}
	code = append(code, proceed()...)
	for range rand.N(scatterOver / scatterEach) {
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "bench_scatter", Type: ebpf.CGroupSockAddr,
			AttachType: ebpf.AttachCGroupInet4Connect, License: "Dual BSD/GPL", Instructions: code})
		if err != nil {
			return fmt.Errorf("load a program that does nothing: %w", err)
		}
		w.later(p.Close)
	}
	return nil
}
