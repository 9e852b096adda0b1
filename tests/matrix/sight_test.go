package matrix

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// sight is what was seen with one instance, by the applications and by Pillion.
type sight struct {
	world    *world
	instance *rig.Instance
	found    table
	conns    []conn
	records  int               // that are wanted
	existing int               // connections that are older than the instance
	counters map[string]uint64 // that are wanted
	direct   bool              // the arm
	// picked counts the connections by direct, by their endpoint.
	picked map[netip.AddrPort]int
}

// conn is one connection, and what is wanted of it.
type conn struct {
	cell
	seen
	wanted string
	// more: it has moved more bytes than the application's own.
	more bool
}

// ends tell one connection from another.
type ends struct{ source, dest netip.AddrPort }

// ends are as the records have them: unmapped, without a scope.
func (c conn) ends(t *testing.T) ends {
	t.Helper()
	both := [2]netip.AddrPort{}
	for n, text := range []string{c.Own, c.To} {
		a, err := netip.ParseAddr(text)
		if err != nil {
			t.Errorf("%v: %v", c.cell, err)
		}
		both[n] = netip.AddrPortFrom(a.WithZone("").Unmap(), uint16([]int{c.OwnPort, c.PeerPort}[n]))
	}
	return ends{both[0], both[1]}
}

// add compares what an application saw with what it saw without Pillion.
func (s *sight) add(t *testing.T, c cell, before, after []seen) {
	t.Helper()
	wanted := c.wanted(c.family)
	if len(after) != len(before) || len(after) != len(wanted) {
		t.Errorf("%v: %d connections, %d without Pillion, want %d", c, len(after), len(before), len(wanted))
		return
	}
	if s.counters == nil {
		s.counters = map[string]uint64{}
	}
	for n, a := range after {
		c.sound(t, a, wanted[n], "with Pillion")
		if b := before[n]; a.alike() != b.alike() || s.direct && a.SynData != b.SynData {
			t.Errorf("%v:\n   with: %+v\nwithout: %+v", c, a, b)
		}
		s.conns = append(s.conns, conn{c, a, s.arm(wanted[n]), false})
		counter := c.counter(c.family, n)
		if s.direct && counter == flow.ReasonDefault.String() {
			counter = flow.ReasonService.String()
		}
		if counter != "" {
			s.counters[counter]++
		}
		switch {
		case isError(wanted[n]) && counter != "" && a.Protocol == mptcp:
			s.instance.Unsettled++
		case isError(wanted[n]) && counter != "":
			s.counters[flow.ReasonUnsent.String()]++
		case wanted[n] == existing:
			s.existing++
		case !isError(wanted[n]) && wanted[n] != unseen:
			s.records++
		}
	}
}

// check compares all with what Pillion has recorded and counted.
func (s *sight) check(t *testing.T) {
	t.Helper()
	s.instance.Idle(t)
	s.instance.Conserved(t)
	s.instance.Ended(t, s.records)
	all, err := s.instance.Flows(context.Background(), admin.FlowQuery{})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != s.records {
		t.Errorf("%d records, want %d", len(all), s.records)
	}
	records := map[ends][]flow.Record{}
	for _, r := range all {
		e := ends{r.Source, r.OrigDst}
		records[e] = append(records[e], r)
	}
	// Those without a record last: another one may have had the same two ends.
	var others []conn
	for _, c := range s.conns {
		if isError(c.wanted) {
			s.found.note(c, c.Error)
			continue
		}
		e := c.ends(t)
		if have := records[e]; len(have) > 0 && c.wanted != unseen && c.wanted != existing {
			n := max(slices.IndexFunc(have, func(r flow.Record) bool { return outcome(r) == c.wanted }), 0)
			s.compare(t, c, have[n])
			records[e] = slices.Delete(have, n, n+1)
			continue
		}
		others = append(others, c)
	}
	for _, c := range others {
		e, got := c.ends(t), unseen
		switch {
		case len(records[e]) > 0:
			got = "on record"
		case s.reported(e):
			got = existing
		}
		if got != c.wanted {
			t.Errorf("%v: %s to %s is %s, want %s", c.cell, e.source, e.dest, got, c.wanted)
		}
		s.found.note(c, got)
	}
	s.count(t)
}

// reported tells whether a connection was found when the instance began.
func (s *sight) reported(e ends) bool {
	for line := range strings.Lines(s.instance.Log()) {
		if strings.Contains(line, "source="+e.source.String()+" destination="+e.dest.String()+" reason=existing") {
			return true
		}
	}
	return false
}

// outcome is what a record says became of a connection, in the words of the table.
// Two with the same ends may differ in it: one goes by a slot, which is another
// destination to the kernel.
func outcome(r flow.Record) string {
	switch r.Path {
	case flow.PathRelay:
		return relay
	case flow.PathDirect:
		return direct
	}
	return r.Path.String() + ", " + r.Reason.String()
}

// compare compares a connection with its record.
func (s *sight) compare(t *testing.T, c conn, r flow.Record) {
	t.Helper()
	got := outcome(r)
	s.found.note(c, got)
	cgroup := s.cgroup(c.cell)
	bytes := r.Sent == size && r.Received == size || c.more && r.Sent > size && r.Received > size
	if got != c.wanted || r.Cgroup != cgroup.ID || !bytes || r.End != flow.ReasonClosed {
		t.Errorf("%v, want %s of cgroup %d: %+v", c.cell, c.wanted, cgroup.ID, r)
	}
	if r.Path == flow.PathRelay && (r.Reason != flow.ReasonDefault || r.Endpoint != r.OrigDst || r.Attempts != 1) {
		t.Errorf("%v: %+v", c.cell, r)
	}
	if got == direct {
		s.checkDirect(t, c, r)
	}
}

// cgroup is where the process is that connects.
func (s *sight) cgroup(c cell) *testutil.Cgroup {
	switch {
	case c.out:
		return s.world.outside
	case c.box, c.nested:
		return s.world.nested
	}
	return s.world.Scope
}

// count compares the kernel side's counters: every call of connect has made one
// decision, and none was left out.
func (s *sight) count(t *testing.T) {
	t.Helper()
	have := s.instance.Reasons(t)
	for _, r := range flow.Reasons()[:flow.KernelReasons] {
		switch r {
		case flow.ReasonAdmitted, flow.ReasonProbe: // canaries, too
			continue
		case flow.ReasonHeld, flow.ReasonInjected: // as often as it takes
			continue
		case flow.ReasonNotLive:
			// One or two: an acknowledgement may come when its connection has ended.
			if n := have[r.String()] - s.counters[r.String()]; n <= 2 {
				continue
			}
		}
		if name := r.String(); have[name] != s.counters[name] {
			t.Errorf("counted as %s: %d, want %d", name, have[name], s.counters[name])
		}
	}
	if got := strings.Count(s.instance.Log(), "reason=existing"); got != s.existing {
		t.Errorf("%d connections are reported as older, want %d", got, s.existing)
	}
}

// held compares how many handshakes were held back until the dial had ended: all,
// that of the first connection to a destination, or none.
func (s *sight) held(t *testing.T, mode string) {
	t.Helper()
	relayed, least := 0, 0
	known := map[netip.AddrPort]bool{}
	for _, c := range s.conns {
		if c.wanted == relay {
			relayed++
			known[c.ends(t).dest] = true
		}
	}
	switch mode {
	case "mirror":
		least = relayed
	case "adaptive":
		least = len(known)
	}
	have := int(s.instance.Reasons(t)[flow.ReasonHeld.String()])
	if have < least || (mode == "early" || s.direct) && have > 0 || mode == "adaptive" && have >= relayed {
		t.Errorf("%d of %d handshakes were held back, want %d at least", have, relayed, least)
	}
}
