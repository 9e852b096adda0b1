package traps

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/pillion-project/pillion/tests/testutil"
)

// Offsets in the contexts, and numbers, of linux/bpf.h.
const (
	sockAddrIP4  = 4
	sockAddrPort = 24
	sockOpsOp    = 0
	sockOpsFlags = 84

	opActiveEstablished = 4
	opRTT               = 12
	flagRTT             = 1 << 3
)

// foreign is another agent with programs on the same cgroups. They end with the
// test.
type foreign struct {
	t     testing.TB
	s     *site
	count *ebpf.Map // at 0: what it has seen
}

func newForeign(t testing.TB, s *site) *foreign {
	t.Helper()
	return &foreign{t, s, newMap(t, &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})}
}

func newMap(t testing.TB, spec *ebpf.MapSpec) *ebpf.Map {
	t.Helper()
	m, err := ebpf.NewMap(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// attach has a program of a hook run for a cgroup.
func (f *foreign) attach(at *testutil.Cgroup, kind ebpf.ProgramType, hook ebpf.AttachType, code asm.Instructions) {
	f.t.Helper()
	p := f.load(kind, hook, code)
	l, err := link.AttachCgroup(link.CgroupOptions{Path: at.Path, Attach: hook, Program: p})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { l.Close() })
}

func (f *foreign) load(kind ebpf.ProgramType, hook ebpf.AttachType, code asm.Instructions) *ebpf.Program {
	f.t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: kind, AttachType: hook, Instructions: code, License: "GPL"})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { p.Close() })
	return p
}

// counted adds to the count. The context is in R6.
func (f *foreign) counted() asm.Instructions {
	return asm.Instructions{
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.LoadMapPtr(asm.R1, f.count.FD()),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Imm(asm.R1, 1),
		asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, 0),
	}
}

// program keeps its context in R6, does its pieces, and lets things happen.
func program(pieces ...asm.Instructions) asm.Instructions {
	code := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}
	for _, p := range pieces {
		code = append(code, p...)
	}
	return append(code, asm.Mov.Imm(asm.R0, 1).WithSymbol("out"), asm.Return())
}

// seen is how often the programs counted.
func (f *foreign) seen() (n uint64) {
	f.t.Helper()
	if err := f.count.Lookup(uint32(0), &n); err != nil {
		f.t.Fatal(err)
	}
	return n
}

// big4 and bigPort are an address and a port as the context has them.
func big4(a netip.Addr) int32 {
	b := a.As4()
	return int32(binary.NativeEndian.Uint32(b[:]))
}

func bigPort(port uint16) int32 {
	var b [4]byte
	binary.BigEndian.PutUint16(b[:], port)
	return int32(binary.NativeEndian.Uint32(b[:]))
}

// rewrite is a socket load balancer of the whole pod.
func (f *foreign) rewrite(from, to netip.AddrPort) {
	f.t.Helper()
	f.attach(f.s.outer, ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect, program(f.counted(), asm.Instructions{
		asm.LoadMem(asm.R1, asm.R6, sockAddrIP4, asm.Word),
		asm.JNE.Imm32(asm.R1, big4(from.Addr()), "out"),
		asm.LoadMem(asm.R1, asm.R6, sockAddrPort, asm.Word),
		asm.JNE.Imm32(asm.R1, bigPort(from.Port()), "out"),
		asm.Mov.Imm32(asm.R1, big4(to.Addr())),
		asm.StoreMem(asm.R6, sockAddrIP4, asm.R1, asm.Word),
		asm.Mov.Imm32(asm.R1, bigPort(to.Port())),
		asm.StoreMem(asm.R6, sockAddrPort, asm.R1, asm.Word),
	}))
}

// watch counts connects.
func (f *foreign) watch(at *testutil.Cgroup) {
	f.t.Helper()
	f.attach(at, ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect, program(f.counted()))
}

// forbid refuses every connect, as a policy of the service manager's may.
func (f *foreign) forbid(at *testutil.Cgroup) {
	f.t.Helper()
	f.attach(at, ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect, asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()})
}

// roundTrips has the kernel call it for each round-trip sample, and counts
// these. It knows that the flags of a socket are everybody's.
func (f *foreign) roundTrips(at *testutil.Cgroup) {
	f.t.Helper()
	f.attach(at, ebpf.SockOps, ebpf.AttachCGroupSockOps, program(asm.Instructions{
		asm.LoadMem(asm.R7, asm.R6, sockOpsOp, asm.Word),
		asm.JNE.Imm(asm.R7, opActiveEstablished, "rtt"),
		asm.LoadMem(asm.R2, asm.R6, sockOpsFlags, asm.Word),
		asm.Or.Imm(asm.R2, flagRTT),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.FnSockOpsCbFlagsSet.Call(),
		asm.JNE.Imm(asm.R7, opRTT, "out").WithSymbol("rtt"),
	}, f.counted()))
}

// enrol puts the application's sockets into a map of sockets, with a program
// that sees what they send.
func (f *foreign) enrol(at *testutil.Cgroup) {
	f.t.Helper()
	sockets := newMap(f.t, &ebpf.MapSpec{Type: ebpf.SockHash, KeySize: 8, ValueSize: 8, MaxEntries: 4096})
	verdict := f.load(ebpf.SkMsg, ebpf.AttachSkMsgVerdict, program(f.counted()))
	err := link.RawAttachProgram(link.RawAttachProgramOptions{Target: sockets.FD(), Program: verdict, Attach: ebpf.AttachSkMsgVerdict})
	if err != nil {
		f.t.Fatal(err)
	}
	f.attach(at, ebpf.SockOps, ebpf.AttachCGroupSockOps, program(asm.Instructions{
		asm.LoadMem(asm.R7, asm.R6, sockOpsOp, asm.Word),
		asm.JNE.Imm(asm.R7, opActiveEstablished, "out"),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.FnGetSocketCookie.Call(),
		asm.StoreMem(asm.RFP, -8, asm.R0, asm.DWord),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.LoadMapPtr(asm.R2, sockets.FD()),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, -8),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnSockHashUpdate.Call(),
	}))
}

// attachedTo lists the programs of a hook at a cgroup.
func attachedTo(t testing.TB, at *testutil.Cgroup, hook ebpf.AttachType) []ebpf.ProgramID {
	t.Helper()
	r, err := link.QueryPrograms(link.QueryOptions{Target: at.FD(), Attach: hook})
	if err != nil {
		t.Fatal(err)
	}
	var ids []ebpf.ProgramID
	for _, p := range r.Programs {
		ids = append(ids, p.ID)
	}
	return ids
}
