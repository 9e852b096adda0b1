package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/pillion-project/pillion/bpf"
)

// The programs of armFloor: what of the connect hook's cost is the kernel's own.
const (
	// floorNothing returns: what it costs is the timing itself.
	floorNothing = "nothing"
	// floorStorage makes the socket's storage, of the size of Pillion's, and
	// returns.
	floorStorage = "socket storage"
)

// skOffset is that of sk in struct bpf_sock_addr.
const skOffset = 64

// storageMap is the map of Pillion's socket storage, by name.
const storageMap = "decisions"

// attachFloor attaches both programs to connect(2) of IPv4 in a cgroup, until the
// world ends. Both run on every socket.
func (w *world) attachFloor(cgroup *os.File) (programs, error) {
	spec, err := storageSpec()
	if err != nil {
		return nil, err
	}
	storage, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, fmt.Errorf("make socket storage: %w", err)
	}
	defer storage.Close() // the program keeps it
	all := programs{}
	for name, code := range map[string]asm.Instructions{floorNothing: proceed(), floorStorage: makeStorage(storage)} {
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "bench_floor", Type: ebpf.CGroupSockAddr,
			AttachType: ebpf.AttachCGroupInet4Connect, License: "Dual BSD/GPL", Instructions: code})
		if err != nil {
			return nil, fmt.Errorf("load %q: %w", name, err)
		}
		all[name] = p
		w.later(p.Close)
		l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup.Name(), Attach: ebpf.AttachCGroupInet4Connect, Program: p})
		if err != nil {
			return nil, fmt.Errorf("attach %q: %w", name, err)
		}
		w.later(l.Close)
	}
	return all, nil
}

// storageSpec is how Pillion makes its socket storage.
func storageSpec() (*ebpf.MapSpec, error) {
	specs, err := bpf.Specs()
	if err != nil {
		return nil, err
	}
	for _, s := range specs {
		if m := s.Maps[storageMap]; m != nil {
			return m.Copy(), nil
		}
	}
	return nil, errors.New("no object has map " + storageMap)
}

// proceed lets the connect go on.
func proceed() asm.Instructions {
	return asm.Instructions{asm.Mov.Imm(asm.R0, 1).WithSymbol("proceed"), asm.Return()}
}

// makeStorage is bpf_sk_storage_get(m, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE).
func makeStorage(m *ebpf.Map) asm.Instructions {
	return append(asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, skOffset, asm.DWord),
		asm.JEq.Imm(asm.R2, 0, "proceed"),
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Imm(asm.R3, 0),
		asm.Mov.Imm(asm.R4, 1),
		asm.FnSkStorageGet.Call(),
	}, proceed()...)
}
