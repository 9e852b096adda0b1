package bpf

import (
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/tests/testutil"
)

// markLeft does what the process does with the cell of a socket that it does not find.
func (h *hooks) markLeft(t *testing.T, cookie uint64) {
	t.Helper()
	if !atomic.CompareAndSwapUint64(&h.cells.all[cookie%Cells].Owner, cookie, cookie|CellLeft) {
		t.Fatalf("the socket %d has no cell: %s", cookie, h.stateOf(cookie))
	}
}

// TestCellRetaken: who is not gone after all has its cell again at whichever hook, as
// if nothing had been.
func TestCellRetaken(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.endings(t)
	const nowhere, relayed, denied = "203.0.113.9:80", "198.51.100.7:26", "198.51.100.7:25"
	for _, tt := range []struct {
		hook         string
		before, does string
		state        string
	}{
		{"getpeername", "again=" + asked4, "peer " + asked4, "open"},
		{"getsockname", "again=" + relayed, "name 127.0.0.1", "open"},
		{"release", "again=" + asked4, "drop", "none"},
		{"release of what was not sent", "again=" + nowhere, "drop", "none"},
		{"release of what is deferred", "defer=" + relayed, "drop", "none"},
		{"sockops, connected", "defer=" + asked4, "write ok", "open"},
		{"sockops, closed", "again=" + relayed, "leave no peer", "none"},
		{"connect", "again=" + nowhere, "again=" + asked4 + " " + asked4, "open"},
		{"connect, denied", "again=" + nowhere, "again=" + denied + " ECONNREFUSED", "pending"},
		{"bind", "again=" + nowhere, "from=240.5.0.9:80 EADDRNOTAVAIL", "pending"},
	} {
		t.Run(tt.hook, func(t *testing.T) {
			before := h.counts(t, "tallies")
			step, _, _ := strings.Cut(tt.does, " ")
			a := h.start(t, "new=4", tt.before, "wait", step, "wait")
			cookie := a.cookieOf(t, a.said(t, 2)[0])
			h.markLeft(t, cookie)
			a.write("\n")
			if said := a.said(t, 2)[1]; said != tt.does {
				t.Errorf("the application says %q, want %q", said, tt.does)
			}
			h.awaitState(t, cookie, tt.state)
			a.write("\n")
			a.cmd.Wait()
			h.allFree(t)
			after := h.balanced(t)
			decided := uint64(1 + strings.Count(tt.does, "again="+asked4))
			if n := after[TallyDecided] - before[TallyDecided]; n != decided {
				t.Errorf("%d are decided, want %d", n, decided)
			}
			if after[TallyConnects] > before[TallyConnects] {
				if diff := cmp.Diff([]string{strconv.FormatUint(cookie, 10)}, h.records(t, 1, func(raw []byte) string {
					e, _ := ParseEvent(raw)
					if e.Kind == EventDenied {
						return "denied"
					}
					return strconv.FormatUint(e.Cookie, 10)
				})); diff != "" {
					t.Errorf("records (-want +got):\n%s", diff)
				}
			} else if tt.state == "pending" && strings.Contains(tt.does, denied) {
				h.records(t, 1, func([]byte) string { return "" })
			}
		})
	}
	h.same(t, map[uint32]Endpoint{10: {Connects: 4}})
}

// TestCellTaken: another socket may have a cell that is left. What was pending there is
// counted, and who it was of has nothing to do with it any more.
func TestCellTaken(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.services(t)
	for _, tt := range []struct {
		name, before, then string
		unsent             uint64
	}{
		{"pending", "again=203.0.113.9:80", "again=" + asked4, 1},
		{"deferred, and closed", "defer=" + at4, "drop", 1},
		{"open", "again=" + at4, "peer", 0},
		{"open, and disconnected", "again=" + at4, "leave", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			first := h.start(t, "new=4", tt.before, "wait", tt.then, "wait")
			cookie := first.cookieOf(t, first.said(t, 2)[0])
			n := strconv.FormatUint(cookie%Cells, 10)
			// Whose cell is not left stays.
			second := h.start(t, "same="+n, "again="+asked4, "wait")
			before := h.counts(t, "tallies")[TallyUnsent]
			other := second.cookieOf(t, second.said(t, 2)[0])
			if h.stateOf(other) != "none" || h.stateOf(cookie) == "none" {
				t.Fatalf("the cell is taken: %s", h.stateOf(other))
			}
			h.markLeft(t, cookie)
			third := h.start(t, "same="+n, "again="+asked4, "peer", "wait", "peer", "leave", "again="+asked4, "wait")
			heard := third.said(t, 3)
			other = third.cookieOf(t, heard[0])
			if h.stateOf(other) != "open" || heard[2] != "peer "+asked4 {
				t.Fatalf("its cell is %s, it says %q", h.stateOf(other), heard)
			}
			if n := h.counts(t, "tallies")[TallyUnsent] - before; n != tt.unsent {
				t.Errorf("%d are counted as unsent, want %d", n, tt.unsent)
			}
			taken := h.cells.all[other%Cells]
			first.write("\n")
			said := first.said(t, 2)[1]
			if diff := cmp.Diff(taken, h.cells.all[other%Cells]); diff != "" {
				t.Errorf("after %q (-was +is):\n%s", said, diff)
			}
			if n := h.counts(t, "tallies")[TallyUnsent] - before; n != tt.unsent {
				t.Errorf("%d are counted as unsent then, want %d", n, tt.unsent)
			}
			third.write("\n")
			if diff := cmp.Diff([]string{"wait", "peer " + asked4, "leave no peer", "again=" + asked4 + " " + asked4}, third.said(t, 4)); diff != "" {
				t.Errorf("who has it now (-want +got):\n%s", diff)
			}
			first.write("\n")
			first.cmd.Wait()
			second.write("\n")
			third.write("\n")
			second.cmd.Wait()
			third.cmd.Wait()
			h.allFree(t)
			h.balanced(t)
			h.idle(t, 10)
		})
	}
}

// TestCellOfASubflow: no hook hears of the end of an MPTCP socket whose connect the
// kernel refused; its cell is the next one's once it is left, and all is counted then.
func TestCellOfASubflow(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.services(t)
	if said := h.steps(t, "mptcp=203.0.113.9:80", "close"); said[0] != "mptcp=203.0.113.9:80 ENETUNREACH" {
		t.Errorf("the application says %q", said)
	}
	d := h.cells.only(t)
	if d.Pending != 1 {
		t.Errorf("%+v", d)
	}
	h.markLeft(t, d.Owner)
	said := h.steps(t, "same="+strconv.FormatUint(d.Owner&^CellLeft%Cells, 10), "again="+asked4, "close")
	if said[1] != "again="+asked4+" "+asked4 {
		t.Errorf("who has the cell then: %q", said)
	}
	h.allFree(t)
	if n := h.balanced(t); n[TallyUnsent] != 1 || n[TallyDecided] != 2 {
		t.Errorf("tallies: %v", n)
	}
}
