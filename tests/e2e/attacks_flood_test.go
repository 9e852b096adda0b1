package e2e

import (
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// TestAttackRecordFlood has one container be refused 50,000 times in a burst, to
// push others' records out of the ring buffer. What is lost is counted, in all
// and for the container; every refusal is counted; another container's records
// are there as soon as there is room again, and nothing is unaccounted for.
func TestAttackRecordFlood(t *testing.T) {
	const flood = 50000
	tests := map[string]bool{"while it reads": false, "while it is stopped": true}
	for name, stopped := range tests {
		t.Run(name, func(t *testing.T) {
			s := newPrey(t, "deny: [100.64.0.0/10]")
			one, two := s.Scope.Child(t, "one"), s.Scope.Child(t, "two")
			a, b := captive(t, s.Rig, one), captive(t, s.Rig, two)
			a.learn("%s", scan)
			denied := s.i.Reasons(t)["denied"]
			before := s.i.Series(t)
			if stopped {
				s.i.Halt(t)
			}
			got := a.do("attempts(addresses('100.64', 0, %d), 80)", flood)
			if got != "{'ECONNREFUSED': 50000}" {
				t.Errorf("the flood: %s", got)
			}
			if stopped {
				stale(t, s.i) // on a fast machine the flood is over before
			}
			// In the flood, one that is not denied.
			b.wants("far", "dial(%q, %d)", rig.Far4, sitePort)
			s.i.Signal(t, unix.SIGCONT)
			if n := s.i.Reasons(t)["denied"] - denied; n != flood {
				t.Errorf("%d are counted as denied, want all %d", n, flood)
			}
			works(t, s.i, b)
			var lost, given, others float64
			testutil.Eventually(t, rig.Limit, func() bool {
				m := s.i.Series(t)
				kind := `pillion_connections_total{end="denied",path="deny",reason="denied"}`
				given = m[kind] - before[kind]
				lost = m[`pillion_records_lost_total{where="ring"}`]
				others = lost - float64(usageOf(t, s.i, one).EventsLost)
				return given+lost-others == flood
			}, "what is given out and what is lost of the container make up the flood: ", &given, &lost, &others)
			if stopped && lost == 0 {
				t.Error("nothing was lost: the test tests nothing")
			}
			if n := usageOf(t, s.i, two).EventsLost; float64(n) != others || n > 1 {
				t.Errorf("%d records of the other container were lost, of all containers %v", n, others)
			}
			// Its later ones are there.
			mine := 0
			for _, r := range s.i.Ended(t, 1) {
				if r.Path == flow.PathRelay && r.Cgroup == two.ID {
					mine++
				}
			}
			if mine < 3 {
				t.Errorf("%d records of the other container, want three at least", mine)
			}
			s.i.Conserved(t)
		})
	}
}
