package bpf

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
)

// holding attaches the program that holds answers to lo, for connections in a
// mode.
func (h *hooks) holding(t *testing.T, mode flow.ConnectMode) {
	t.Helper()
	var l link.Link
	err := h.ns.Run(func() (err error) {
		l, err = link.AttachTCX(link.TCXOptions{Interface: 1, Program: h.progs[ProgHold], Attach: ebpf.AttachTCXIngress})
		return err
	})
	if errors.Is(err, ebpf.ErrNotSupported) && testutil.InVM() {
		t.Skip("needs tcx (Linux 6.6), which the virtual machine's kernel does not have")
	}
	if err != nil {
		t.Fatalf("attach %s: %v", ProgHold, err)
	}
	t.Cleanup(func() { l.Close() })
	var s Settings
	if err := h.maps["settings"].Lookup(uint32(0), &s); err != nil {
		t.Fatal(err)
	}
	s.Connect = uint32(mode)
	h.put(t, "settings", uint32(0), s)
	h.fresh(t)
}

// fresh makes the heartbeat good for longer than the test takes.
func (h *hooks) fresh(t *testing.T) {
	t.Helper()
	h.beat(t, time.Hour)
}

// beat makes a heartbeat of now.
func (h *hooks) beat(t *testing.T, maxAge time.Duration) {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		t.Fatal(err)
	}
	h.put(t, "beat", uint32(0), Beat{Stamp: uint64(now.Nano()), MaxAge: uint64(maxAge)})
}

// ring gives worker 0 a ring and returns a function that waits for a record.
func (h *hooks) ring(t *testing.T) func() Held {
	t.Helper()
	var inner *ebpf.MapSpec
	for _, spec := range mustSpecs(t) {
		inner = spec.Maps["held"].InnerMap
	}
	m, err := ebpf.NewMap(inner)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	h.put(t, "held", uint32(0), uint32(m.FD()))
	r, err := ringbuf.NewReader(m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return func() Held {
		t.Helper()
		r.SetDeadline(time.Now().Add(10 * time.Second))
		record, err := r.Read()
		if err != nil {
			t.Fatalf("read what is held: %v", err)
		}
		if len(record.RawSample) != int(unsafe.Sizeof(Held{})) {
			t.Fatalf("a record of %d bytes", len(record.RawSample))
		}
		return *(*Held)(unsafe.Pointer(&record.RawSample[0]))
	}
}

// TestHold keeps the handler's answer back, and says so when the application ends
// before it gets it.
func TestHold(t *testing.T) {
	for _, to := range []string{"198.51.100.1:80", "[2001:db8::1]:80"} {
		t.Run(to, func(t *testing.T) {
			testutil.CheckLeaks(t)
			h := newHooks(t)
			h.serve(t)
			h.holding(t, flow.ConnectMirror)
			next := h.ring(t)
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), envDial+"="+to)
			if err := (testutil.Place{NS: h.ns, Cgroup: h.cgroup}).Start(cmd); err != nil {
				t.Fatal(err)
			}
			answer := next()
			if answer.Kind != HeldAnswer || answer.Key.SlotPort != 80 || answer.Size < 14+20+20 {
				t.Errorf("held: %+v", answer)
			}
			if a := ToAddr(answer.Key.Slot); a.Is4() != (netip.MustParseAddrPort(to).Addr().Is4()) {
				t.Errorf("held for %s, dialed %s", a, to)
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			cmd.Wait()
			gone := next()
			for ; gone.Kind == HeldAnswer; gone = next() { // sent again meanwhile
			}
			if gone.Kind != HeldGone || gone.Key != answer.Key {
				t.Errorf("then: %+v", gone)
			}
			if n := h.reasons(t)["held"]; n == 0 {
				t.Error("nothing is counted as held")
			}
			h.waitClosed(t)
		})
	}
}

// TestHoldLetsThrough has answers that are not held: the connection is early.
func TestHoldLetsThrough(t *testing.T) {
	const to = "198.51.100.1:80"
	for name, tt := range map[string]struct {
		mode  flow.ConnectMode
		ready func(t *testing.T, h *hooks)
		count string // the reason that is counted, if any
	}{
		"early":      {flow.ConnectEarly, func(t *testing.T, h *hooks) { h.ring(t) }, ""},
		"no ring":    {flow.ConnectMirror, func(*testing.T, *hooks) {}, "hold_stale"},
		"answered":   {flow.ConnectAdaptive, func(t *testing.T, h *hooks) { h.ring(t); h.answered(t, to, 1<<62) }, ""},
		"not lately": {flow.ConnectAdaptive, func(t *testing.T, h *hooks) { h.answered(t, to, 1) }, "hold_stale"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHooks(t)
			h.serve(t)
			h.holding(t, tt.mode)
			tt.ready(t, h)
			if got := h.dial(t, to); got[0] != to+" "+to {
				t.Errorf("dial: %q, counted: %v", got, h.reasons(t))
			}
			h.accepted(t)
			h.waitClosed(t)
			reasons := h.reasons(t)
			for _, reason := range []string{"held", "hold_stale", "hold_full"} {
				if want := reason == tt.count; (reasons[reason] > 0) != want {
					t.Errorf("%s: %d, want some: %v", reason, reasons[reason], want)
				}
			}
		})
	}
}

func (h *hooks) answered(t *testing.T, to string, until uint64) {
	t.Helper()
	a := netip.MustParseAddrPort(to)
	h.put(t, "answered", EndpointKey{Addr: FromAddr(a.Addr()), Port: a.Port()}, until)
}

// TestResetOfLetThrough has an answer that was not held: from then on the
// connection is like any, and its reset is the application's too.
func TestResetOfLetThrough(t *testing.T) {
	h := newHooks(t)
	h.serve(t)
	h.holding(t, flow.ConnectMirror)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envHold+"= 198.51.100.1:80")
	stdin, err := cmd.StdinPipe() // open for as long as the connection is to be
	if err != nil {
		t.Fatal(err)
	}
	if err := (testutil.Place{NS: h.ns, Cgroup: h.cgroup}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer stdin.Close()
	l := h.listeners[0]
	if err := l.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	conn, err := l.AcceptTCP() // there is no ring
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(conn.SetLinger(0), conn.Close()); err != nil {
		t.Fatal(err)
	}
	h.waitClosed(t)
}

// TestRefusalWhileDraining has no listener any more while the heartbeat is fresh,
// which is so when the handler drains: nobody is left to hold anything for.
func TestRefusalWhileDraining(t *testing.T) {
	const to = "198.51.100.1:80"
	h := newHooks(t)
	h.serve(t)
	h.holding(t, flow.ConnectMirror)
	next := h.ring(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envDial+"="+to)
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := (testutil.Place{NS: h.ns, Cgroup: h.cgroup}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	next() // held, and nobody dials
	var s Settings
	if err := h.maps["settings"].Lookup(uint32(0), &s); err != nil {
		t.Fatal(err)
	}
	s.Draining = 1
	h.put(t, "settings", uint32(0), s)
	for _, l := range h.listeners {
		l.Close()
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if want := to + " ECONNREFUSED\n"; out.String() != want {
		t.Errorf("the application: %q, want %q", &out, want)
	}
}

// TestAwaited has no listener when the SYN of a connect comes again: it fails
// only if nobody is back a while after the last sign of life.
func TestAwaited(t *testing.T) {
	const to4, to6 = "198.51.100.1:80", "[2001:db8::1]:80"
	for name, tt := range map[string]struct {
		to        string
		hold      uint8
		onFailure uint32
		named     bool // by a service of that on_failure, where the default has the other
		back      bool
		want      string
		awaited   bool
	}{
		"early, back":    {to: to4, hold: HoldNo, onFailure: OnFailureOpen, back: true, want: to4, awaited: true},
		"held, back, v6": {to: to6, hold: HoldYes, onFailure: OnFailureOpen, named: true, back: true, want: to6, awaited: true},
		"not back, v6":   {to: to6, hold: HoldNo, onFailure: OnFailureOpen, want: "ECONNREFUSED", awaited: true},
		"closed":         {to: to4, hold: HoldNo, onFailure: OnFailureClosed, want: "ECONNREFUSED"},
		"closed service": {to: to4, hold: HoldYes, onFailure: OnFailureClosed, named: true, want: "ECONNREFUSED"},
		"dial's result":  {to: to4, hold: HoldOver, onFailure: OnFailureOpen, want: "ECONNREFUSED"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHooks(t)
			h.serve(t)
			h.holding(t, flow.ConnectMirror)
			next := h.ring(t)
			h.failing(t, tt.to, tt.onFailure, tt.named)
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), envDial+"="+tt.to)
			var out bytes.Buffer
			cmd.Stdout = &out
			if err := (testutil.Place{NS: h.ns, Cgroup: h.cgroup}).Start(cmd); err != nil {
				t.Fatal(err)
			}
			answer := next()
			var entry Live
			if err := h.maps["live"].Lookup(answer.Key, &entry); err != nil {
				t.Fatal(err)
			}
			entry.Hold = tt.hold
			h.put(t, "live", answer.Key, entry)
			for _, l := range h.listeners {
				l.Close()
			}
			h.beat(t, time.Nanosecond) // the last one
			if tt.back {
				testutil.Eventually(t, 10*time.Second, func() bool { return h.reasons(t)["awaited"] > 0 }, "the SYN came again")
				h.listen(t)
				h.beat(t, time.Nanosecond) // the answer is early
			}
			if err := cmd.Wait(); err != nil {
				t.Fatal(err)
			}
			if want := tt.to + " " + tt.want + "\n"; out.String() != want {
				t.Errorf("the application: %q, want %q", &out, want)
			}
			if n := h.reasons(t)["awaited"]; (n > 0) != tt.awaited {
				t.Errorf("%d refusals were kept back, want some: %v", n, tt.awaited)
			}
		})
	}
}

// failing sets on_failure for a destination: by its service, or for all.
func (h *hooks) failing(t *testing.T, to string, onFailure uint32, named bool) {
	t.Helper()
	var s Settings
	if err := h.maps["settings"].Lookup(uint32(0), &s); err != nil {
		t.Fatal(err)
	}
	s.OnFailure = onFailure
	if named {
		s.OnFailure = OnFailureOpen + OnFailureClosed - onFailure
		a := netip.MustParseAddrPort(to)
		h.put(t, "services", EndpointKey{Addr: abiIpAddr(FromAddr(a.Addr())), Port: a.Port()},
			Service{Path: uint8(PathRelay), OnFailure: uint8(onFailure), Connect: uint8(flow.ConnectMirror)})
	}
	h.put(t, "settings", uint32(0), s)
}

// TestDied has a process that the kernel is ending: its listeners are still
// there, and nobody is sent to them.
func TestDied(t *testing.T) {
	const to4, to6 = "198.51.100.1:80", "[2001:db8::1]:80"
	h := newHooks(t)
	h.serve(t)
	h.put(t, "state", uint32(0), State{NextSlot: SlotFirst, Owner: OwnerDied})
	want := []string{to4 + " ENETUNREACH", to6 + " ENETUNREACH"} // passed, and there is no way
	if diff := cmp.Diff(want, h.dial(t, to4, to6)); diff != "" {
		t.Errorf("the application (-want +got):\n%s", diff)
	}
	// And what was sent to them before goes nowhere.
	h.put(t, "state", uint32(0), State{NextSlot: SlotFirst})
	h.holding(t, flow.ConnectMirror)
	next := h.ring(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envDial+"="+to4)
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := (testutil.Place{NS: h.ns, Cgroup: h.cgroup}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	next()
	h.put(t, "state", uint32(0), State{NextSlot: SlotFirst, Owner: OwnerDied})
	for _, l := range h.listeners {
		l.Close()
	}
	h.listen(t) // others, or the kernel would know the SYN that comes again
	h.beat(t, time.Nanosecond)
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if want := to4 + " ECONNREFUSED\n"; out.String() != want {
		t.Errorf("the application: %q, want %q", &out, want)
	}
	if r := h.reasons(t); r["handler_absent"] != 2 || r["awaited"] == 0 || r["no_listener"] <= r["awaited"] {
		t.Errorf("counted: %v", r)
	}
}
