package direct

import (
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/pillion-project/pillion/tests/testutil"
)

// cni is what a network plug-in with socket load balancing attaches at the root:
// it rewrites addresses of its own at connect, and undoes that at getpeername.
type cni struct {
	backends *ebpf.Map // by the address
	names    *ebpf.Map // the other way round
	asked    *ebpf.Map // how often a connect to an address came by
}

// place is an address and a port in network byte order, as the programs have it.
type place struct {
	addr [16]byte
	port [2]byte
	zero [2]byte
}

func placeOf(at netip.AddrPort) (p place) {
	p.addr = at.Addr().As16()
	p.port = [2]byte{byte(at.Port() >> 8), byte(at.Port())}
	return p
}

func (p place) bytes() []byte { return append(append(p.addr[:], p.port[:]...), p.zero[:]...) }

// Offsets in struct bpf_sock_addr.
const (
	ctxIP4  = 4
	ctxIP6  = 8
	ctxPort = 24
)

// newCNI attaches one to a cgroup. It ends with the test.
func newCNI(t testing.TB, root *testutil.Cgroup, vips map[netip.AddrPort]netip.AddrPort) *cni {
	t.Helper()
	table := func(value uint32) *ebpf.Map {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 20, ValueSize: value, MaxEntries: 1024})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
		return m
	}
	c := &cni{backends: table(20), names: table(20), asked: table(8)}
	for vip, backend := range vips {
		if err := c.backends.Put(placeOf(vip).bytes(), placeOf(backend).bytes()); err != nil {
			t.Fatal(err)
		}
		if err := c.names.Put(placeOf(backend).bytes(), placeOf(vip).bytes()); err != nil {
			t.Fatal(err)
		}
	}
	for _, hook := range []struct {
		attach ebpf.AttachType
		table  *ebpf.Map
		v6     bool
		count  bool
	}{
		{ebpf.AttachCGroupInet4Connect, c.backends, false, true},
		{ebpf.AttachCGroupInet6Connect, c.backends, true, true},
		{ebpf.AttachCgroupInet4GetPeername, c.names, false, false},
		{ebpf.AttachCgroupInet6GetPeername, c.names, true, false},
	} {
		text := rewriting(hook.table, hook.v6)
		if hook.count {
			text = counting(c.asked, hook.v6)
			text = append(text, rewriting(hook.table, hook.v6)...)
		}
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ebpf.CGroupSockAddr, AttachType: hook.attach, License: "GPL", Instructions: text,
		})
		if err != nil {
			t.Fatalf("%s: %+v", hook.attach, err)
		}
		t.Cleanup(func() { p.Close() })
		l, err := link.AttachCgroup(link.CgroupOptions{Path: root.Path, Attach: hook.attach, Program: p})
		if err != nil {
			t.Fatalf("attach %s: %v", hook.attach, err)
		}
		t.Cleanup(func() { l.Close() })
	}
	return c
}

// keyed has the context in R6, and its address and port as a place at the end
// of the stack.
func keyed(v6 bool) asm.Instructions {
	text := asm.Instructions{}
	for n := range 4 {
		var word asm.Instructions
		switch {
		case v6:
			word = asm.Instructions{asm.LoadMem(asm.R1, asm.R6, int16(ctxIP6+4*n), asm.Word)}
		case n == 2:
			word = asm.Instructions{asm.LoadImm(asm.R1, 0xffff0000, asm.DWord)}
		case n == 3:
			word = asm.Instructions{asm.LoadMem(asm.R1, asm.R6, ctxIP4, asm.Word)}
		default:
			word = asm.Instructions{asm.Mov.Imm(asm.R1, 0)}
		}
		text = append(append(text, word...), asm.StoreMem(asm.RFP, int16(4*n-24), asm.R1, asm.Word))
	}
	return append(text,
		asm.LoadMem(asm.R1, asm.R6, ctxPort, asm.Word),
		asm.StoreMem(asm.RFP, -8, asm.R1, asm.Word))
}

// counting counts the address.
func counting(asked *ebpf.Map, v6 bool) asm.Instructions {
	return append(append(asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}, keyed(v6)...),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreMem(asm.RFP, -32, asm.R1, asm.DWord),
		asm.LoadMapPtr(asm.R1, asked.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -24),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "new"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
		asm.Ja.Label("counted"),
		asm.LoadMapPtr(asm.R1, asked.FD()).WithSymbol("new"),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -24),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, -32),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnMapUpdateElem.Call(),
		asm.Mov.Reg(asm.R1, asm.R6).WithSymbol("counted"),
	)
}

// rewriting puts what the table has for the address in its place.
func rewriting(table *ebpf.Map, v6 bool) asm.Instructions {
	text := append(append(asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}, keyed(v6)...),
		asm.LoadMapPtr(asm.R1, table.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -24),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"))
	if v6 {
		for n := range 4 {
			text = append(text,
				asm.LoadMem(asm.R1, asm.R0, int16(4*n), asm.Word),
				asm.StoreMem(asm.R6, int16(ctxIP6+4*n), asm.R1, asm.Word))
		}
	} else {
		text = append(text,
			asm.LoadMem(asm.R1, asm.R0, 12, asm.Word),
			asm.StoreMem(asm.R6, ctxIP4, asm.R1, asm.Word))
	}
	return append(text,
		asm.LoadMem(asm.R1, asm.R0, 16, asm.Word),
		asm.StoreMem(asm.R6, ctxPort, asm.R1, asm.Word),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("out"),
		asm.Return())
}

// saw is how many connects to an address came by, after those before it had
// their say.
func (c *cni) saw(t testing.TB, at netip.AddrPort) uint64 {
	t.Helper()
	var n uint64
	if err := c.asked.Lookup(placeOf(at).bytes(), &n); err != nil {
		return 0
	}
	return n
}
