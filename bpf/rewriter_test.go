package bpf

import (
	"encoding/binary"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/tests/testutil"
)

// userPort is where bpf_sock_addr has the port, in network byte order.
const userPort = 24

// rewriter is another agent's program, as a CNI with socket load balancing has it:
// it sends one port to another.
func rewriter(t *testing.T, from, to uint16) *ebpf.Program {
	t.Helper()
	wire := func(port uint16) int32 {
		return int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, port)))
	}
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "rewriter", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, userPort, asm.Word),
			asm.JNE.Imm(asm.R2, wire(from), "done"),
			asm.Mov.Imm(asm.R2, wire(to)),
			asm.StoreMem(asm.R1, userPort, asm.R2, asm.Word),
			asm.Mov.Imm(asm.R0, 1).WithSymbol("done"),
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// TestTwoRewriters: where a program that runs after ours rewrites the endpoint, the
// application still sees what it asked for, the record has what was dialed, and the
// one that was picked is counted.
func TestTwoRewriters(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.serve(t)
	l, err := link.AttachCgroup(link.CgroupOptions{
		Path: h.cgroup.Path, Attach: ebpf.AttachCGroupInet4Connect, Program: rewriter(t, 18001, 18002),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const asked = "10.96.0.12:80"
	h.service(t, asked, Service{Id: 1, Path: uint8(PathDirect)})
	h.publish(t, 1, healthy, 0, 10, []endpointOf{{"127.0.0.1:18001", 1}}, []uint32{0})
	h.listenAt(t, "127.0.0.1:18002")
	a := h.start(t, "tcp="+asked, "tcp=127.0.0.1:18001", "wait")
	if diff := cmp.Diff([]string{"tcp=" + asked + " " + asked, "tcp=127.0.0.1:18001 127.0.0.1:18002"}, a.said(t, 2)); diff != "" {
		t.Errorf("peers (-want +got):\n%s", diff)
	}
	if e := h.endpoint(t, 10); e.Live != 1 {
		t.Errorf("%d connections are counted, want 1", e.Live)
	}
	a.write("\n")
	h.same(t, map[uint32]Endpoint{10: {Connects: 1}})
	if diff := cmp.Diff([]string{
		"direct " + asked + " to 127.0.0.1:18002", "pass 127.0.0.1:18001 to 127.0.0.1:18002",
	}, h.records(t, 2, dialed)); diff != "" {
		t.Errorf("records (-want +got):\n%s", diff)
	}
}
