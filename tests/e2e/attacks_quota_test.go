package e2e

import (
	"net/netip"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// settled waits until a container has so many relayed connections open, as the
// kernel side counts them.
func settled(t testing.TB, i *rig.Instance, container *testutil.Cgroup, conns uint64) {
	t.Helper()
	var have uint64
	testutil.Eventually(t, rig.Limit, func() bool {
		have = usageOf(t, i, container).Conns
		return have == conns
	}, "open connections of the container: want ", conns, ", have ", &have)
}

// works has an application in a container of its own be served over relay: by
// the service and by a destination that no service names.
func works(t testing.TB, i *rig.Instance, a *actor) {
	t.Helper()
	for _, to := range []string{serviceAddr, rig.Far4.String(), rig.Far6.String()} {
		var why string
		testutil.Eventually(t, rig.Limit, func() bool {
			before := i.Reasons(t)
			said := a.do("dial(%q, %d)", to, sitePort)
			after := i.Reasons(t)
			for _, r := range []flow.Reason{flow.ReasonHandlerStale, flow.ReasonHandlerBusy} {
				if after[r.String()] > before[r.String()] {
					return false // the machine is busy
				}
			}
			why = said
			return true
		}, "connections to ", to, " are relayed")
		if why != "far" {
			t.Errorf("%s: %q", to, why)
		}
	}
}

// scan is Python for an actor: addresses to connect to.
const scan = `
def addresses(net, first, n): return ["%s.%d.%d" % (net, i >> 8, i & 255) for i in range(first, first + n)]
`

// TestAttackSlotScan has one container connect to 30,000 addresses. Its share of
// the slots is soon used up; a second container has its own, and services have
// theirs.
func TestAttackSlotScan(t *testing.T) {
	const quota = 1000
	s := newPrey(t, "limits: {slots_per_container: 1000}")
	one, two := s.Scope.Child(t, "one"), s.Scope.Child(t, "two")
	a, b := captive(t, s.Rig, one), captive(t, s.Rig, two)
	a.learn("%s", scan)
	b.learn("%s", scan)
	before := s.i.Reasons(t)["slot_quota"]
	if n := a.number("sum(attempts(addresses('100.64', 0, 30000), 80).values())"); n != 30000 {
		t.Errorf("%d connects, want all", n)
	}
	if u := usageOf(t, s.i, one); u.Slots != quota {
		t.Errorf("the scanner has %d slots, want its quota", u.Slots)
	}
	if n := s.i.Reasons(t)["slot_quota"] - before; n == 0 || n > 30000-quota {
		t.Errorf("%d connects were over the quota", n)
	}
	works(t, s.i, b)
	b.do("attempts(addresses('100.65', 0, 1500), 80)")
	if u := usageOf(t, s.i, two); u.Slots != quota {
		t.Errorf("the second container has %d slots, want its own quota", u.Slots)
	}
	// The scanner keeps what it had a slot for, and the services.
	a.wants("far", "dial(%q, %d)", serviceAddr, sitePort)
	works(t, s.i, s.app)
	settled(t, s.i, one, 0)
	settled(t, s.i, two, 0)
}

// TestAttackConnectionFlood has one container open many connections and hold
// them, to a destination that answers or to one that does not: what is over its
// quota is no load of the handler's, and others do not notice.
func TestAttackConnectionFlood(t *testing.T) {
	const quota, flood = 40, 200
	tests := map[string]struct {
		setting, to string
		passed      bool // what is over the quota reaches its destination
	}{
		"descriptors, open":   {"open", rig.Far4.String(), true},
		"descriptors, closed": {"closed", rig.Far4.String(), false},
		"half-open dials":     {"closed", rig.Void4.String(), false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := newPrey(t, "on_failure: "+tt.setting+"\nlimits: {connections_per_container: 40}")
			one, two := s.Scope.Child(t, "one"), s.Scope.Child(t, "two")
			a, b := captive(t, s.Rig, one), captive(t, s.Rig, two)
			before := s.i.Reasons(t)
			open := a.number("[begin(%q, %d) for i in range(%d)].count('ok')", tt.to, sitePort, flood)
			if n := usageOf(t, s.i, one).Conns; n != quota {
				t.Errorf("the flood has %d relayed connections, want its quota", n)
			}
			over := s.i.Reasons(t)["conn_quota"] - before["conn_quota"]
			if over < flood-quota-5 || over > flood-quota {
				t.Errorf("%d connects were over the quota, want %d (and some more if the handler was late)", over, flood-quota)
			}
			if tt.passed && open != flood || !tt.passed && open != quota {
				t.Errorf("%d connections are open", open)
			}
			works(t, s.i, b)
			a.do("let_go()")
			settled(t, s.i, one, 0)
			works(t, s.i, a)
		})
	}
}

// TestAttackAbandonedDials has one container dial what does not answer, and let
// go at once, over and over: for the application they are over, the handler is
// still dialing.
func TestAttackAbandonedDials(t *testing.T) {
	t.Parallel()
	const quota = 40
	s := newPrey(t, "on_failure: closed\nlimits: {connections_per_container: 40, connections: 100}")
	one, two := s.Scope.Child(t, "one"), s.Scope.Child(t, "two")
	a, b := captive(t, s.Rig, one), captive(t, s.Rig, two)
	most := 0.0
	for range 20 {
		a.do("[begin(%q, 80) for i in range(20)]", rig.Void4)
		a.do("time.sleep(0.02)")
		a.do("let_go()")
		most = max(most, s.i.Series(t)["pillion_relay_connections"])
	}
	if most > quota+quota/8+8 {
		t.Errorf("the handler carried %v connections of one container, want little more than its quota of %d", most, quota)
	}
	works(t, s.i, b)
}

// TestAttackMoves has a process move between containers. What it opened stays on
// the account of the container that it was in, and is taken off that one.
func TestAttackMoves(t *testing.T) {
	t.Parallel()
	const quota = 10
	s := newPrey(t, "on_failure: closed\nlimits: {connections_per_container: 10}")
	one, two := s.Scope.Child(t, "one"), s.Scope.Child(t, "two")
	deep, other := one.Child(t, "deep"), one.Child(t, "other")
	a := captive(t, s.Rig, deep)
	a.learn("def move(to): open(to + '/cgroup.procs', 'w').write(str(os.getpid()))")
	hold := func(n int) int {
		return a.number("[dial(%q, %d, SOCK_STREAM, [], None, True) for i in range(%d)].count('ok')", rig.Far4, sitePort, n)
	}
	if n := hold(6); n != 6 {
		t.Errorf("%d connections of 6", n)
	}
	// Deeper down it is the same container.
	a.wants("None", "move(%q)", other.Path)
	if n := hold(6); n != 4 {
		t.Errorf("%d connections, want the 4 that are left", n)
	}
	settled(t, s.i, one, quota)
	a.wants("None", "move(%q)", two.Path)
	if n := hold(15); n != quota {
		t.Errorf("%d connections, want the quota of the other container", n)
	}
	settled(t, s.i, one, quota)
	settled(t, s.i, two, quota)
	// What is closed in the one is taken off the other, which opened it.
	a.do("[kept.pop(0).close() for i in range(6)]")
	settled(t, s.i, one, quota-6)
	settled(t, s.i, two, quota)
	// Right in the scope, which is a container of its own, and away from it.
	a.wants("None", "move(%q)", s.Scope.Path)
	if n := hold(1); n != 1 {
		t.Error("no connection in the scope itself")
	}
	settled(t, s.i, s.Scope, 1)
	a.do("let_go()")
	for _, c := range []*testutil.Cgroup{one, two, s.Scope} {
		settled(t, s.i, c, 0)
	}
	s.i.Conserved(t)
}

// TestAttackLeavesScope has a process leave the scope. Its old sockets belong to
// the scope still, its new ones do not.
func TestAttackLeavesScope(t *testing.T) {
	t.Parallel()
	s := newPrey(t, "")
	a := captive(t, s.Rig, s.Scope.Child(t, "one"))
	elsewhere := testutil.NewCgroup(t)
	a.learn("def move(to): open(to + '/cgroup.procs', 'w').write(str(os.getpid()))")
	a.learn("old = new('1.1.1.1')")
	a.wants("None", "move(%q)", elsewhere.Path)
	before := arrived(t, s.i)
	a.wants("far", "dial(%q, %d)", rig.Far4, sitePort)
	s.undisturbed(t, before)
	a.wants("None", "old.connect((%q, %d))", rig.Far4, sitePort)
	testutil.Eventually(t, rig.Limit, func() bool { return arrived(t, s.i) == before+1 }, "the socket that was made in scope is captured")
	a.do("old.close()")
	settled(t, s.i, elsewhere, 0)
	records := s.i.Ended(t, int(before)+1)
	if r := records[len(records)-1]; r.OrigDst != netip.AddrPortFrom(rig.Far4, sitePort) || r.Path != flow.PathRelay {
		t.Errorf("record %+v", r)
	}
}
