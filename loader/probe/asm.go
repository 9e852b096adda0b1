package probe

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// Offsets of the socket in the contexts of linux/bpf.h.
const (
	sockAddrSk = 64  // struct bpf_sock_addr
	sockOpsSk  = 184 // struct bpf_sock_ops
)

// proceed is the whole of a program that has no opinion: for every hook that
// Pillion uses, 1 lets things happen.
func proceed() asm.Instructions {
	return asm.Instructions{asm.Mov.Imm(asm.R0, 1).WithSymbol("out"), asm.Return()}
}

// then joins pieces of a program, and ends it with proceed.
func then(pieces ...asm.Instructions) asm.Instructions {
	var all asm.Instructions
	for _, p := range pieces {
		all = append(all, p...)
	}
	return append(all, proceed()...)
}

// The programs keep their context in R6.
var keepCtx = asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}

// zeroStack makes R2 point to 16 zero bytes on the stack: a key, a value, a
// tuple.
func zeroStack() asm.Instructions {
	return asm.Instructions{
		asm.Mov.Imm(asm.R2, 0),
		asm.StoreMem(asm.RFP, -16, asm.R2, asm.DWord),
		asm.StoreMem(asm.RFP, -8, asm.R2, asm.DWord),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -16),
	}
}

// lookUpListener is bpf_sk_lookup_tcp of a zero IPv4 tuple.
func lookUpListener() asm.Instructions {
	return then(keepCtx, zeroStack(), asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R3, 12),
		asm.Mov.Imm(asm.R4, -1), // BPF_F_CURRENT_NETNS
		asm.Mov.Imm(asm.R5, 0),
		asm.FnSkLookupTcp.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Reg(asm.R1, asm.R0),
		asm.FnSkRelease.Call(),
	})
}

// setRetval answers the errno that Pillion answers with.
func setRetval() asm.Instructions {
	return then(asm.Instructions{
		asm.Mov.Imm(asm.R1, -int32(unix.ECONNREFUSED)),
		asm.FnSetRetval.Call(),
	})
}

// callWithCtx calls a helper that takes the context only.
func callWithCtx(fn asm.BuiltinFunc) asm.Instructions {
	return then(asm.Instructions{fn.Call()})
}

// ancestorID is bpf_get_current_ancestor_cgroup_id, which quotas need.
func ancestorID() asm.Instructions {
	return then(asm.Instructions{asm.Mov.Imm(asm.R1, 1), asm.FnGetCurrentAncestorCgroupId.Call()})
}

// storage is bpf_sk_storage_get of the socket at offset sk of the context.
func storage(m *ebpf.Map, sk int16) asm.Instructions {
	return then(asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, sk, asm.DWord),
		asm.JEq.Imm(asm.R2, 0, "out"),
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Imm(asm.R3, 0),
		asm.Mov.Imm(asm.R4, 1), // BPF_SK_STORAGE_GET_F_CREATE
		asm.FnSkStorageGet.Call(),
	})
}

// assign is bpf_sk_assign of the listener in a sockmap, by sk_lookup.
func assign(m *ebpf.Map) asm.Instructions {
	return then(keepCtx, zeroStack(), asm.Instructions{
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Reg(asm.R7, asm.R0),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Reg(asm.R2, asm.R7),
		asm.Mov.Imm(asm.R3, 2), // BPF_SK_LOOKUP_F_NO_REUSEPORT
		asm.FnSkAssign.Call(),
		asm.Mov.Reg(asm.R1, asm.R7),
		asm.FnSkRelease.Call(),
	})
}

// reserve takes a record of a ring buffer and gives it back.
func reserve(m *ebpf.Map) asm.Instructions {
	return then(asm.Instructions{
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Imm(asm.R2, 16),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnRingbufReserve.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Reg(asm.R1, asm.R0),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRingbufDiscard.Call(),
	})
}

// withMap calls a helper that takes a map and a pointer to a key or value.
func withMap(fn asm.BuiltinFunc) func(*ebpf.Map) asm.Instructions {
	return func(m *ebpf.Map) asm.Instructions {
		return then(zeroStack(), asm.Instructions{asm.LoadMapPtr(asm.R1, m.FD()), fn.Call()})
	}
}

// load loads one program. The caller closes it.
func load(t ebpf.ProgramType, at ebpf.AttachType, ins asm.Instructions) (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "pillion_probe", Type: t, AttachType: at, Instructions: ins, License: "Dual BSD/GPL",
	})
}

// loads loads one program and closes it.
func loads(t ebpf.ProgramType, at ebpf.AttachType, ins asm.Instructions) error {
	p, err := load(t, at, ins)
	if err != nil {
		return err
	}
	return p.Close()
}

// loadsWith makes a map, loads a program that uses it, and closes both.
func loadsWith(spec *ebpf.MapSpec, t ebpf.ProgramType, at ebpf.AttachType, body func(*ebpf.Map) asm.Instructions) error {
	m, err := ebpf.NewMap(spec)
	if err != nil {
		return fmt.Errorf("create map: %w", err)
	}
	defer m.Close()
	return loads(t, at, body(m))
}

// skStorage is the kind of map that the kernel takes only with type
// information.
func skStorage() *ebpf.MapSpec {
	word := &btf.Int{Name: "u32", Size: 4}
	return &ebpf.MapSpec{
		Name: "pillion_probe", Type: ebpf.SkStorage, KeySize: 4, ValueSize: 4,
		Flags: unix.BPF_F_NO_PREALLOC, Key: &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}, Value: word,
	}
}

func mapSpec(t ebpf.MapType, key, value, entries, flags uint32) *ebpf.MapSpec {
	return &ebpf.MapSpec{Name: "pillion_probe", Type: t, KeySize: key, ValueSize: value, MaxEntries: entries, Flags: flags}
}
