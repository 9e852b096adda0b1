package direct

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// forgetful attaches another agent's sockops program to a cgroup: it clears the
// flags of every socket of which the port is a multiple of four, as one that sets
// its own and does not add them.
func forgetful(t testing.TB, at *testutil.Cgroup) {
	t.Helper()
	const (
		contextOp, contextPort = 0, 68 // in struct bpf_sock_ops
		established            = 4     // BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB
	)
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SockOps, AttachType: ebpf.AttachCGroupSockOps, License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadMem(asm.R2, asm.R6, contextOp, asm.Word),
			asm.JNE.Imm(asm.R2, established, "out"),
			asm.LoadMem(asm.R2, asm.R6, contextPort, asm.Word),
			asm.And.Imm(asm.R2, 3),
			asm.JNE.Imm(asm.R2, 0, "out"),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Imm(asm.R2, 0),
			asm.FnSockOpsCbFlagsSet.Call(),
			asm.Mov.Imm(asm.R0, 1).WithSymbol("out"),
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	l, err := link.AttachCgroup(link.CgroupOptions{Path: at.Path, Attach: ebpf.AttachCGroupSockOps, Program: p})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
}

// TestCountsForeign: the ends that another agent keeps from the hooks are found by
// looking at the sockets, while connections come and go.
func TestCountsForeign(t *testing.T) {
	t.Parallel()
	r, program := rig.New(t), ends(t)
	above := testutil.NewCgroup(t)
	r.Scope = above.Child(t, "scope")
	forgetful(t, above)
	r.Give(t, rig.Far4)
	serveEnds(t, r, program, ":8001", ":8002")
	vip := netip.AddrPortFrom(vip4, 80)
	i := r.Run(t, "path: direct\nservices:\n"+service(vip, "", addrs(rig.Far4, 8001, 8002)...))
	a := captive(t, r)
	for n := range 200 {
		a.wants("ok", "dial(%q, 80, 'end %d')", vip4, n)
		a.wants("None", "drop('end %d')", n)
	}
	if n := liveOf(t, i, vip.String()); n < 10 {
		t.Fatalf("%d are counted as open: the test tests nothing", n)
	}
	// Some stay open, of which some are flagged and some are not.
	const open = 16
	for n := range open {
		a.wants("ok", "dial(%q, 80, %d)", vip4, n)
	}
	var live int
	testutil.Eventually(t, 4*rig.Limit, func() bool {
		a.wants("hello", "ask(0)")
		live = liveOf(t, i, vip.String())
		return live == open || pause()
	}, "open are ", open, ", counted are ", number{&live})
	for n := range open {
		a.wants("hello", "ask(%d)", n)
	}
	m := i.Series(t)
	if m["pillion_reconcile_corrections_total"] == 0 {
		t.Error("no metric tells of it")
	}
	sum := 0.0
	for _, e := range addrs(rig.Far4, 8001, 8002) {
		sum += m[fmt.Sprintf("pillion_endpoint_connections{cluster=%q,endpoint=%q}", vip, e)]
	}
	if int(sum) != open {
		t.Errorf("by metrics %v are open, want %d", sum, open)
	}
	i.Conserved(t)
}

// relayed is how many connections the hooks count as open on relay, by the counter
// of all and by that of their container, and how many they have entered.
func relayed(t testing.TB, i *rig.Instance) (counted, quota, entered int) {
	t.Helper()
	maps := map[string]*ebpf.Map{"state": nil, "usage_by_group": nil, "live": nil}
	for name := range maps {
		m, err := ebpf.LoadPinnedMap(filepath.Join("/sys/fs/bpf/pillion", i.Name, name), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		maps[name] = m
	}
	raw, err := maps["state"].LookupBytes(uint32(0))
	if err != nil || len(raw) < int(unsafe.Sizeof(bpf.State{})) {
		t.Fatalf("state: %d bytes, %v", len(raw), err)
	}
	counted = int(int32((*bpf.State)(unsafe.Pointer(&raw[0])).Live))
	var group uint64
	var u bpf.Usage
	for it := maps["usage_by_group"].Iterate(); it.Next(&group, &u); {
		quota += int(int64(u.Conns))
	}
	var k bpf.LiveKey
	var l bpf.Live
	for it := maps["live"].Iterate(); it.Next(&k, &l); {
		if l.Canary == 0 {
			entered++
		}
	}
	return counted, quota, entered
}

// TestCountsForeignRelay: a connection whose end another agent keeps from the hooks is
// counted no more when the next one has its address.
func TestCountsForeignRelay(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	above := testutil.NewCgroup(t)
	r.Scope = above.Child(t, "scope")
	forgetful(t, above)
	at := r.Serve(t, netip.AddrPortFrom(rig.Far4, 8001), echo)
	i := r.Run(t, "")
	a := captive(t, r)
	a.wants("None", `exec("def again():\n s = socket.socket()\n s.setsockopt(1, 2, 1)\n s.bind(('', 20000))\n `+
		`s.connect(('%s', %d))\n s.sendall(b'x')\n s.recv(1)\n s.setsockopt(1, 13, struct.pack('ii', 1, 0))\n s.close()", globals())`,
		at.Addr(), at.Port())
	a.wants("None", "import socket, struct")
	for range 20 {
		a.wants("None", "again()")
	}
	counted, quota, entered := relayed(t, i)
	if entered == 0 {
		t.Fatal("no end was kept from the hooks: the test tests nothing")
	}
	if counted != entered || quota != entered {
		t.Errorf("%d connections are counted, %d of the container, but %d are entered", counted, quota, entered)
	}
	i.Conserved(t)
}
