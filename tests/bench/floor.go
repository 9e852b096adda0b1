package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/bpf"
)

// The programs that stand for what of Pillion's cost is the kernel's own.
const (
	// floorNothing returns: what it costs is the timing itself.
	floorNothing = "nothing"
	// floorStorage makes the socket's storage, of the size of Pillion's, and
	// returns. The kernel frees it with the socket.
	floorStorage = "socket storage"
	// floorEntry keeps as much in a hash by the socket's cookie instead, and
	// floorDrop, when the application closes the socket, deletes it.
	floorEntry = "hash entry"
	floorDrop  = "hash entry, deleted"
	// floorCell keeps as much in an array, at the cookie's last digits, whoever is there,
	// and floorLeave marks that free. No state of a connection can be had for less.
	floorCell  = "array cell"
	floorLeave = "array cell, left"
	// floorRecord follows the socket from its SYN to its end, finds its storage there,
	// and tells of it by a record of the size of Pillion's. floorRelease finds the
	// storage when the application closes the socket, and floorPeer and floorName return
	// where an application asks for names: less cannot do what Pillion does on pass.
	floorRecord  = "record"
	floorRelease = "release"
	floorPeer    = "getpeername"
	floorName    = "getsockname"
)

// Offsets in struct bpf_sock_addr, and in struct bpf_sock_ops.
const (
	skOffset      = 64
	opOffset      = 0
	stateOffset   = 8 // of args[1]: the state that follows
	cbFlagsOffset = 84
	opsSkOffset   = 184
)

// storageMap is the map of Pillion's socket storage, by name. Its values are as large as
// those of its cells.
const storageMap = "decisions"

// floorLive is how many sockets may have an entry at once: as many as Pillion's may
// be relayed.
const floorLive = 262144

// floorCells is how many cells there are, a power of two.
const floorCells = bpf.Cells

// cellSize is that of a cell with a value of size bytes: the owner's cookie first.
func cellSize(size uint32) uint32 { return 8 + (size+7)&^7 }

// attachFloor attaches programs, by name, to a cgroup, until the world ends: to
// connect(2) of IPv4, or to the end of a socket. All run on every socket.
func (w *world) attachFloor(cgroup *os.File, names ...string) (programs, error) {
	spec, err := storageSpec()
	if err != nil {
		return nil, err
	}
	size := spec.ValueSize
	storage, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, fmt.Errorf("make socket storage: %w", err)
	}
	defer storage.Close() // the program keeps it
	entries, err := ebpf.NewMap(&ebpf.MapSpec{Name: "bench_floor", Type: ebpf.Hash, KeySize: 8, ValueSize: size,
		MaxEntries: floorLive, Flags: unix.BPF_F_NO_PREALLOC})
	if err != nil {
		return nil, fmt.Errorf("make a hash: %w", err)
	}
	defer entries.Close()
	cells, err := ebpf.NewMap(&ebpf.MapSpec{Name: "bench_floor", Type: ebpf.Array, KeySize: 4, ValueSize: cellSize(size), MaxEntries: floorCells})
	if err != nil {
		return nil, fmt.Errorf("make an array: %w", err)
	}
	defer cells.Close()
	var records *ebpf.Map
	if slices.Contains(names, floorRecord) {
		if records, err = w.records(); err != nil {
			return nil, fmt.Errorf("make a ring: %w", err)
		}
	}
	all := programs{}
	for _, name := range names {
		kind, at, code := ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect, proceed()
		switch name {
		case floorPass, floorDirect:
			if code, err = w.looks(name == floorDirect); err != nil {
				return nil, fmt.Errorf("prepare %q: %w", name, err)
			}
		case floorStorage:
			code = makeStorage(storage)
		case floorEntry:
			code = makeEntry(entries, int(size))
		case floorDrop:
			kind, at, code = ebpf.CGroupSock, ebpf.AttachCgroupInetSockRelease, dropEntry(entries)
		case floorCell:
			code = makeCell(cells, int(cellSize(size)))
		case floorLeave:
			kind, at, code = ebpf.CGroupSock, ebpf.AttachCgroupInetSockRelease, leaveCell(cells)
		case floorRecord:
			kind, at, code = ebpf.SockOps, ebpf.AttachCGroupSockOps, record(storage, records)
		case floorRelease:
			kind, at, code = ebpf.CGroupSock, ebpf.AttachCgroupInetSockRelease, release(storage)
		case floorPeer:
			at = ebpf.AttachCgroupInet4GetPeername
		case floorName:
			at = ebpf.AttachCgroupInet4GetSockname
		}
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "bench_floor", Type: kind, AttachType: at, License: "Dual BSD/GPL", Instructions: code})
		if err != nil {
			return nil, fmt.Errorf("load %q: %w", name, err)
		}
		all[name] = p
		w.later(p.Close)
		l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup.Name(), Attach: at, Program: p})
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

// cookieAt is where on the stack the programs have the socket's cookie.
const cookieAt = -8

// cookie puts the socket's cookie on the stack.
func cookie() asm.Instructions {
	return asm.Instructions{asm.FnGetSocketCookie.Call(), asm.StoreMem(asm.RFP, cookieAt, asm.R0, asm.DWord)}
}

// makeEntry is bpf_map_update_elem(m, &cookie, &value, BPF_ANY) with a value of zeros.
func makeEntry(m *ebpf.Map, size int) asm.Instructions {
	code := append(cookie(), asm.Mov.Imm(asm.R1, 0))
	value := cookieAt - (size+7)&^7
	for at := value; at < cookieAt; at += 8 {
		code = append(code, asm.StoreMem(asm.RFP, int16(at), asm.R1, asm.DWord))
	}
	code = append(code,
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, cookieAt),
		asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, int32(value)),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnMapUpdateElem.Call(),
	)
	return append(code, proceed()...)
}

// dropEntry is bpf_map_delete_elem(m, &cookie).
func dropEntry(m *ebpf.Map) asm.Instructions {
	code := append(cookie(),
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, cookieAt),
		asm.FnMapDeleteElem.Call(),
	)
	return append(code, proceed()...)
}

// cell finds a socket's in m: R0, and its cookie on the stack.
func cell(m *ebpf.Map) asm.Instructions {
	return append(cookie(),
		asm.And.Imm(asm.R0, floorCells-1),
		asm.StoreMem(asm.RFP, cookieAt-8, asm.R0, asm.DWord),
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, cookieAt-8),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "proceed"),
		asm.LoadMem(asm.R2, asm.RFP, cookieAt, asm.DWord),
	)
}

// makeCell writes the cookie and a value of zeros.
func makeCell(m *ebpf.Map, size int) asm.Instructions {
	code := append(cell(m), asm.StoreMem(asm.R0, 0, asm.R2, asm.DWord), asm.Mov.Imm(asm.R1, 0))
	for at := 8; at < size; at += 8 {
		code = append(code, asm.StoreMem(asm.R0, int16(at), asm.R1, asm.DWord))
	}
	return append(code, proceed()...)
}

// leaveCell takes the cookie out, if it is there.
func leaveCell(m *ebpf.Map) asm.Instructions {
	return append(append(cell(m),
		asm.LoadMem(asm.R3, asm.R0, 0, asm.DWord),
		asm.JNE.Reg(asm.R3, asm.R2, "proceed"),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
	), proceed()...)
}

// record is what follows a socket.
func record(storage, records *ebpf.Map) asm.Instructions {
	const (
		size    = int32(unsafe.Sizeof(bpf.ConnEvent{}))
		noWake  = 1 // BPF_RB_NO_WAKEUP
		connect = 3 // BPF_SOCK_OPS_TCP_CONNECT_CB
		state   = 10
		flags   = 1 | 4 // BPF_SOCK_OPS_RTO_CB_FLAG, BPF_SOCK_OPS_STATE_CB_FLAG
	)
	code := asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, opOffset, asm.Word),
		asm.JEq.Imm(asm.R2, connect, "follow"),
		asm.JNE.Imm(asm.R2, state, "proceed"),
		asm.LoadMem(asm.R2, asm.R1, stateOffset, asm.Word),
		asm.JNE.Imm(asm.R2, unix.BPF_TCP_CLOSE, "proceed"),
		asm.LoadMem(asm.R2, asm.R1, opsSkOffset, asm.DWord),
		asm.JEq.Imm(asm.R2, 0, "proceed"),
		asm.LoadMapPtr(asm.R1, storage.FD()),
		asm.Mov.Imm(asm.R3, 0),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnSkStorageGet.Call(),
		asm.JEq.Imm(asm.R0, 0, "proceed"),
		asm.LoadMapPtr(asm.R1, records.FD()),
		asm.Mov.Imm(asm.R2, size),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnRingbufReserve.Call(),
		asm.JEq.Imm(asm.R0, 0, "proceed"),
		asm.Mov.Reg(asm.R6, asm.R0),
	}
	code = append(code, asm.Mov.Imm(asm.R1, 0))
	for at := int16(0); at < int16(size); at += 8 {
		code = append(code, asm.StoreMem(asm.R6, at, asm.R1, asm.DWord))
	}
	code = append(code,
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, noWake),
		asm.FnRingbufSubmit.Call(),
		asm.Ja.Label("proceed"),
		asm.LoadMem(asm.R2, asm.R1, cbFlagsOffset, asm.Word).WithSymbol("follow"),
		asm.Or.Imm(asm.R2, flags),
		asm.FnSockOpsCbFlagsSet.Call(),
	)
	return append(code, proceed()...)
}

// release is bpf_sk_storage_get(m, ctx, NULL, 0).
func release(m *ebpf.Map) asm.Instructions {
	return append(asm.Instructions{
		asm.Mov.Reg(asm.R2, asm.R1),
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Imm(asm.R3, 0),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnSkStorageGet.Call(),
	}, proceed()...)
}

// records makes a ring of the size of Pillion's, which is emptied as often, and not looked
// at.
func (w *world) records() (*ebpf.Map, error) {
	const size = 1 << 20
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "bench_floor", Type: ebpf.RingBuf, MaxEntries: size})
	if err != nil {
		return nil, err
	}
	page := os.Getpagesize()
	read, err := unix.Mmap(m.FD(), 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	written, err := unix.Mmap(m.FD(), int64(page), page, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(err, unix.Munmap(read), m.Close())
	}
	stop, over := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				atomic.StoreUint64((*uint64)(unsafe.Pointer(&read[0])), atomic.LoadUint64((*uint64)(unsafe.Pointer(&written[0]))))
			case <-stop:
				return
			}
		}
	}()
	w.later(func() error {
		close(stop)
		<-over
		return errors.Join(unix.Munmap(read), unix.Munmap(written), m.Close())
	})
	return m, nil
}
