package events

import (
	"context"
	"encoding/binary"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
)

// Flags of bpf_ringbuf_output.
const (
	noWakeup    = 1
	forceWakeup = 2
)

func newMap(t testing.TB) *ebpf.Map {
	t.Helper()
	testutil.RequireRoot(t)
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// emitter returns a function that writes e to the ring n times, by a program
// that holds it.
func emitter(t testing.TB, m *ebpf.Map, e bpf.ConnEvent, flags int32) func(n int) {
	t.Helper()
	b := raw(e)
	var code asm.Instructions
	for at := 0; at < len(b); at += 8 {
		code = append(code,
			asm.LoadImm(asm.R1, int64(binary.NativeEndian.Uint64(b[at:])), asm.DWord),
			asm.StoreMem(asm.RFP, int16(at-len(b)), asm.R1, asm.DWord))
	}
	code = append(code,
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, int32(-len(b))),
		asm.Mov.Imm(asm.R3, int32(len(b))),
		asm.Mov.Imm(asm.R4, flags),
		asm.FnRingbufOutput.Call(),
		asm.Mov.Imm(asm.R0, 0), asm.Return())
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SocketFilter, License: "GPL", Instructions: code})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return func(n int) {
		t.Helper()
		if _, err := p.Run(&ebpf.RunOptions{Data: make([]byte, 64), Repeat: uint32(n)}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRingRead(t *testing.T) {
	testutil.CheckLeaks(t)
	m := newMap(t)
	r, err := openRing(m)
	if err != nil {
		t.Fatal(err)
	}
	want := event(42, flow.PathPass, bpf.EndingClosed)
	quiet, loud := emitter(t, m, want, noWakeup), emitter(t, m, want, forceWakeup)
	for _, emit := range []func(int){quiet, loud, quiet} {
		emit(3)
		n := 0
		all, err := r.read(func(raw []byte) {
			n++
			if e, ok := bpf.ParseEvent(raw); !ok || e != want {
				t.Errorf("read %+v", e)
			}
		})
		if err != nil || n != 3 || !all {
			t.Fatalf("read %d, all: %t, %v", n, all, err)
		}
	}
	if err := r.close(); err != nil {
		t.Error(err)
	}
	if _, err := r.read(func([]byte) {}); err == nil {
		t.Error("read after close")
	}
}

// TestRingWindow reads through many windows, over the end of the ring and on, and a record that
// is longer than a window.
func TestRingWindow(t *testing.T) {
	testutil.CheckLeaks(t)
	m := newMap(t)
	r, err := openRing(m)
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	e := event(42, flow.PathPass, bpf.EndingClosed)
	one, other := emitter(t, m, e, noWakeup), emitter(t, m, bpf.ConnEvent{Cookie: 7}, noWakeup)
	const rounds, each = 60, 300
	var got, odd int
	for range rounds {
		one(each)
		other(each / 3)
		_, err := r.read(func(raw []byte) {
			switch v, ok := bpf.ParseEvent(raw); {
			case ok && v == e:
				got++
			case ok && v == bpf.ConnEvent{Cookie: 7}:
				odd++
			default:
				t.Errorf("read %d bytes: %+v", len(raw), v)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		if n := len(r.window.data); n > windowSize {
			t.Fatalf("%d bytes of the ring are mapped, want at most %d", n, windowSize)
		}
	}
	if got != rounds*each || odd != rounds*each/3 {
		t.Errorf("read %d and %d records, want %d and %d", got, odd, rounds*each, rounds*each/3)
	}
	if size := rounds * each * 4 / 3 * len(raw(e)); size < 3<<20 {
		t.Fatalf("%d bytes are not several rounds", size)
	}
	long(t, m)
	read := 0
	if _, err := r.read(func(raw []byte) { read = len(raw) }); err != nil || read != longRecord {
		t.Errorf("read a record of %d bytes: %v, want %d", read, err, longRecord)
	}
}

// longRecord is longer than a window.
const longRecord = windowSize + 8

// long writes such a record.
func long(t *testing.T, m *ebpf.Map) {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SocketFilter, License: "GPL", Instructions: asm.Instructions{
		asm.LoadMapPtr(asm.R1, m.FD()), asm.Mov.Imm(asm.R2, longRecord), asm.Mov.Imm(asm.R3, 0),
		asm.FnRingbufReserve.Call(),
		asm.JEq.Imm(asm.R0, 0, "none"),
		asm.Mov.Reg(asm.R1, asm.R0), asm.Mov.Imm(asm.R2, noWakeup), asm.FnRingbufSubmit.Call(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("none"), asm.Return(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, err := p.Run(&ebpf.RunOptions{Data: make([]byte, 64)}); err != nil {
		t.Fatal(err)
	}
}

func TestRingWait(t *testing.T) {
	testutil.CheckLeaks(t)
	m := newMap(t)
	r, err := openRing(m)
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	e := event(42, flow.PathPass, bpf.EndingClosed)
	quiet, loud := emitter(t, m, e, noWakeup), emitter(t, m, e, forceWakeup)
	const long = time.Minute

	// Data alone does not wake: that would be a wake-up per event.
	quiet(1)
	start := time.Now()
	r.wait(t.Context(), 20*time.Millisecond)
	if took := time.Since(start); took < 20*time.Millisecond {
		t.Errorf("woken after %s", took)
	}
	rung := make(chan struct{})
	time.AfterFunc(20*time.Millisecond, func() {
		defer close(rung)
		loud(1)
	})
	r.wait(t.Context(), long)
	<-rung

	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	r.wait(ctx, long)
	r.wait(ctx, long)
	if took := time.Since(start); took > long/2 {
		t.Errorf("waits took %s", took)
	}
}

func TestCollectorOnRing(t *testing.T) {
	testutil.CheckLeaks(t)
	m := newMap(t)
	s, h := &sink{}, &fakeHandler{}
	c, err := New(Options{Ring: m, Handler: h, Sinks: []Sink{s}})
	if err != nil {
		t.Fatal(err)
	}
	emitter(t, m, event(1, flow.PathRelay, bpf.EndingClosed), noWakeup)(1)
	// More than a batch would leave the rest for the next poll.
	emitter(t, m, event(2, flow.PathPass, bpf.EndingClosed), noWakeup)(5000)
	h.end(handled(1))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Run(ctx); err != nil {
		t.Fatal(err)
	}
	got := s.taken()
	if len(got) != 5001 || c.Losses() != (Losses{Handler: 5}) {
		t.Fatalf("%d records, %+v", len(got), c.Losses())
	}
	last := got[5000]
	if diff := cmp.Diff(uint64(1), last.Cookie); diff != "" || last.Service != "web" || last.Duration != time.Second {
		t.Errorf("joined: %+v", last)
	}
}

func TestOpenRingRefusesOtherMaps(t *testing.T) {
	testutil.RequireRoot(t)
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if _, err := New(Options{Ring: m}); err == nil {
		t.Error("an array is taken for a ring")
	}
}
