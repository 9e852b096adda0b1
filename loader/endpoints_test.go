package loader

import (
	"net/netip"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
)

// counter is a program that does to the endpoint with an index what hooks do
// beside down: it adds to round and live, and writes last.
func counter(t testing.TB, d *Datapath, index uint32) *ebpf.Program {
	t.Helper()
	var e bpf.Endpoint
	round, last, live := int16(unsafe.Offsetof(e.Round)), int16(unsafe.Offsetof(e.Last)), int16(unsafe.Offsetof(e.Live))
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{
			asm.StoreImm(asm.RFP, -4, int64(index), asm.Word),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.LoadMapPtr(asm.R1, d.maps.Endpoints.FD()),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "end"),
			asm.LoadMem(asm.R1, asm.R0, round, asm.Half),
			asm.Add.Imm(asm.R1, 1),
			asm.StoreMem(asm.R0, round, asm.R1, asm.Half),
			asm.StoreMem(asm.R0, last, asm.R1, asm.Byte),
			asm.Mov.Imm(asm.R1, 1),
			asm.AddAtomic.Mem(asm.R0, asm.R1, asm.Word, live),
			asm.Mov.Imm(asm.R0, 0).WithSymbol("end"),
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// TestSetDownBesideHooks: what hooks write at the same time into the same word is
// not lost, and what they write does not change down.
func TestSetDownBesideHooks(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: setOf(far)}))
	index := publishedOf(t, d, shop)[far]
	program := counter(t, d, index)
	const runs, rounds = 50_000, 20
	done := make(chan error, 1)
	go repeat(program, runs, rounds, done)
	down := false
	for running := true; running; {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		default:
		}
		down = !down
		if err := d.SetDown(shop, far, down); err != nil {
			t.Fatal(err)
		}
		if e := d.sets.table.at(index).load(); (e.Down == 1) != down {
			t.Fatalf("down is %d, want %v", e.Down, down)
		}
	}
	const total = runs * rounds
	e := d.sets.table.at(index).load()
	// A signal ends a test run, which is then begun again: Live, a word of its own,
	// counts what was really run.
	if n := e.Live; n < total || uint32(e.Round) != n%65536 || uint32(e.Last) != n%256 {
		t.Errorf("%+v, want at least %d runs (of %d: round %d, last %d)", e, total, n, n%65536, n%256)
	}
}

func repeat(p *ebpf.Program, runs uint32, rounds int, done chan<- error) {
	for range rounds {
		if _, err := p.Run(&ebpf.RunOptions{Data: make([]byte, 14), Repeat: runs}); err != nil {
			done <- err
			return
		}
	}
	done <- nil
}

// TestEndpointState says in Go what a hook has written.
func TestEndpointState(t *testing.T) {
	const now = 1_000_000
	for name, test := range map[string]struct {
		in   bpf.Endpoint
		want EndpointState
	}{
		"fresh":   {bpf.Endpoint{}, EndpointState{}},
		"healthy": {bpf.Endpoint{Live: 3, Connects: 9}, EndpointState{Live: 3, Connects: 9}},
		"refused": {
			bpf.Endpoint{Failed: 2, Failures: 1, Last: bpf.EndingRefused},
			EndpointState{Failed: 2, Failures: 1, Last: flow.ReasonDialRefused},
		},
		"ejected": {
			bpf.Endpoint{Failed: 5, Ejections: 2, Until: now + 7, Last: bpf.EndingTimeout},
			EndpointState{Failed: 5, Ejections: 2, Ejected: 7, Last: flow.ReasonDialTimeout},
		},
		"on trial": {
			bpf.Endpoint{Failed: 1, Until: now, Down: 1, Last: bpf.EndingUnreachable},
			EndpointState{Failed: 1, Trial: true, Down: true, Last: flow.ReasonDialUnreachable},
		},
	} {
		e := endpoint(test.in)
		test.want.Addr, test.want.InSet = far, true
		if got := e.state(far, true, now); got != test.want {
			t.Errorf("%s: %+v, want %+v", name, got, test.want)
		}
	}
}
