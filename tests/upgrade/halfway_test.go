package upgrade

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/loader/probe"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// halfway are the points at which a process can be killed that moves an instance to another
// layout: between any two hooks, when all of them are swapped, and when the first map has
// got its name.
func halfway() (all []point) {
	hooks := 12
	if probe.TCX() != nil {
		hooks--
	}
	if testutil.InVM() { // its processor is emulated
		return []point{{n: 3}, {n: hooks - 1}, {names: true}}
	}
	for n := 1; n < hooks; n++ {
		all = append(all, point{n: n})
	}
	return append(all, point{names: true}, point{names: true, n: 1})
}

func (p point) String() string {
	if p.names {
		return fmt.Sprintf("all hooks are swapped, and %d maps have their names", p.n)
	}
	return fmt.Sprintf("%d hooks are swapped", p.n)
}

// testLayoutsHalfway has a process that moves an instance killed at each point, when it has
// stood there for as long as applications need to talk on all connections and to make new
// ones. What is left goes on with the next worker of its keeper, or with a process of the
// layout before.
func testLayoutsHalfway(t *testing.T, versions [2]string) {
	t.Run("the new layout", func(t *testing.T) {
		t.Parallel() // much of it is waiting for the kernel
		h := newHalfway(t, "survive: crash\n", vip, direct2, ends[2])
		for n, at := range halfway() {
			before := statusOf(t, h.i)
			cmd, pid := h.stand(t, versions[n%2], at)
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			h.i.Succeeded(t, cmd)
			h.goesOn(t, at, before)
		}
		// And the next worker too.
		before := statusOf(t, h.i)
		cmd, pid := h.stand(t, versions[len(halfway())%2], point{n: 4})
		held := h.gate.hold(point{n: 9})
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := unix.Kill(h.stands(t, cmd, point{n: 9}, held), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		h.i.Succeeded(t, cmd)
		h.goesOn(t, point{n: 9}, before)
		h.end(t)
	})
	t.Run("the one before", func(t *testing.T) {
		t.Parallel()
		// Who is relayed does not outlive both processes.
		h := newHalfway(t, "", direct2, ends[2])
		for _, at := range halfway() {
			before := statusOf(t, h.i)
			h.standAndFall(t, versions[0], at)
			if err := h.i.Wait(t); err != nil {
				t.Errorf("the process before: %v", err)
			}
			h.i.Launch(t)
			h.goesOn(t, at, before)
		}
		// Who goes back is killed too, and another one does, or one goes on.
		for _, program := range []string{versions[1], versions[0]} {
			before := statusOf(t, h.i)
			h.standAndFall(t, versions[0], point{n: 9})
			h.standAndFall(t, versions[1], point{n: 4})
			h.rig.Program = program
			h.i.Launch(t)
			h.goesOn(t, point{n: 4}, before)
		}
		h.end(t)
	})
}

// standAndFall has a process killed at a point.
func (h *halfwayStage) standAndFall(t *testing.T, program string, at point) {
	t.Helper()
	cmd, pid := h.stand(t, program, at)
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
}

// halfwayStage is an instance whose processes pass a gate, and its applications.
type halfwayStage struct {
	i     *rig.Instance
	rig   *rig.Rig
	gate  *gate
	app   peers
	log   string     // of flows
	named netip.Addr // by a slot, at the last point
	to    []netip.AddrPort
	conns int // that stay, at each address
}

const halfwayConns = 12

// halfwayNamed comes before the destinations that are named at points.
var halfwayNamed = netip.MustParseAddr("10.77.200.0")

func newHalfway(t *testing.T, more string, to ...netip.AddrPort) *halfwayStage {
	t.Helper()
	h := &halfwayStage{log: filepath.Join(t.TempDir(), "flows"), to: to, conns: halfwayConns, named: halfwayNamed}
	r, i, app := layoutStage(t, h.log, more, halfwayConns, len(halfway())+4, to...)
	h.i, h.rig, h.app, h.gate = i, r, app, newGate(t, r)
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		for _, r := range recordsOf(t, h.log, len(halfway())) {
			if r.End != flow.ReasonClosed && r.OrigDst != ejected {
				t.Logf("a connection that ended otherwise: %+v", r)
			}
		}
	})
	return h
}

// stand has a process of a build take over, and returns when it stands at a point, and
// applications have made connections there that stay.
func (h *halfwayStage) stand(t *testing.T, program string, at point) (cmd *exec.Cmd, pid int) {
	t.Helper()
	held := h.gate.hold(at)
	cmd = h.i.Successor(t, program)
	pid = h.stands(t, cmd, at, held)
	if o := h.app.turn(t, "more"); o.Least < 2 {
		t.Errorf("%s: a connection stands still", at)
	}
	h.conns++
	h.named = h.named.Next()
	h.relay(t)
	return cmd, pid
}

// stands waits until a process stands at a point.
func (h *halfwayStage) stands(t *testing.T, cmd *exec.Cmd, at point, held <-chan int) (pid int) {
	t.Helper()
	select {
	case pid = <-held:
	case <-time.After(rig.Limit):
		cmd.Process.Kill()
		t.Fatalf("%s: nobody comes there\n%s", at, h.i.Log())
	}
	return pid
}

// relay makes a connection to the destination that has got its slot at the last point.
func (h *halfwayStage) relay(t *testing.T) {
	t.Helper()
	h.rig.Output(t, os.Args[0], "-test.run=^TestKnock$", "-knock="+netip.AddrPortFrom(h.named, widePort).String())
}

// goesOn wants that every connection goes on, that no count is wrong, and none went back.
func (h *halfwayStage) goesOn(t *testing.T, at point, before admin.Status) {
	t.Helper()
	checkTurn(t, h.i, h.app, before, h.conns)
	h.relay(t)
	h.i.Conserved(t)
	if t.Failed() {
		t.Fatalf("killed when %s", at)
	}
}

// end wants nobody counted in the end, and one record of each connection that was made at
// one of the points.
func (h *halfwayStage) end(t *testing.T) {
	t.Helper()
	o := h.app.turn(t, "end")
	for n, to := range h.to {
		t.Logf("%s: %d connections stayed, and %d came", to, h.conns, o.New[n])
	}
	h.i.Conserved(t)
	awaitNobody(t, h.i)
	if strings.Contains(h.i.Log(), "mended a count") {
		t.Errorf("counts were wrong:\n%s", h.i.Log())
	}
	want := map[uint64]netip.AddrPort{}
	for _, c := range o.Later {
		want[c.Cookie] = c.To
	}
	if len(want) != len(h.to)*(h.conns-halfwayConns) {
		t.Fatalf("%d connections are known by their cookies", len(want))
	}
	got := map[uint64][]flow.Record{}
	testutil.Eventually(t, rig.Limit, func() bool {
		clear(got)
		for _, r := range recordsOf(t, h.log, len(halfway())) {
			if _, ok := want[r.Cookie]; ok {
				got[r.Cookie] = append(got[r.Cookie], r)
			}
		}
		return len(got) == len(want)
	}, "a record of each connection that was made on the way, of ", len(want), ": ", &got)
	paths := map[netip.AddrPort]flow.Path{vip: flow.PathRelay, direct2: flow.PathDirect, ends[2]: flow.PathPass}
	for cookie, to := range want {
		for n, r := range got[cookie] {
			if n > 0 || r.OrigDst != to || r.Path != paths[to] && r.Reason != flow.ReasonHandlerStale ||
				r.End != flow.ReasonClosed || r.Connect == 0 || r.Sent == 0 || r.Sent != r.Received {
				t.Errorf("of a connection to %s: %+v", to, r)
			}
		}
	}
}

// recordsOf reads a flow log in which some lines may be torn: a process that is killed
// while it writes leaves half a line.
func recordsOf(t *testing.T, path string, most int) (all []flow.Record) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b = b[:bytes.LastIndexByte(b, '\n')+1]
	torn := 0
	for line := range bytes.Lines(b) {
		var r flow.Record
		if err := json.Unmarshal(line, &r); err != nil {
			torn++
			continue
		}
		all = append(all, r)
	}
	if torn > most {
		t.Fatalf("%d lines are torn", torn)
	}
	return all
}
